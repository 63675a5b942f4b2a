//! A door to the handshake ([`handshake`]).
//!
//! A client's bytes go through the real negotiation, before a shard on this very thread that has exports in memory. What comes back
//! is held against the protocol, told here a second time: each option is answered once and in order, and who is let in was told
//! the truth.

use std::io::{self, Cursor};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use cdp_journal::Export;
use futures::future::{BoxFuture, Either, FutureExt as _, join, select};
use uuid::Uuid;

use super::{Memory, PATIENCE_NS, SIZE, keep_ring, take, take_head, take_ring};
use crate::frontend::nbd::handshake::{EXPORT_NAME_ZEROES, OPTION_MAX, OPTION_SKIP_MAX, plain};
use crate::frontend::nbd::wire::{self, OptionHead, OptionReplyHead, STRING_MAX, info, option, reply, transmission};
use crate::frontend::nbd::{ExportDirectory, ExportEntry, ExportInfo, ExportKind, ExportSource};
use crate::ring::Ring;
use crate::shard::ShardHandle;

/// Handshake flags of the server.
const OFFERED: u16 = wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES;

/// An export that is listed and found.
#[derive(Debug)]
struct Known {
    name: &'static str,
    kind: ExportKind,
    key: Uuid,
    /// Its shard has it, too. Else it went after it was found.
    there: bool,
}

static EXPORTS: [Known; 3] = [
    Known { name: "demo", kind: ExportKind::Volume, key: Uuid::from_u128(1), there: true },
    Known { name: "then", kind: ExportKind::View, key: Uuid::from_u128(2), there: true },
    Known { name: "gone", kind: ExportKind::Volume, key: Uuid::from_u128(3), there: false },
];

impl Known {
    /// The export that a client means. The first one is the default.
    fn by_name(name: &str) -> Option<&'static Self> {
        EXPORTS.iter().find(|known| known.name == name || (name.is_empty() && known.name == EXPORTS[0].name))
    }

    fn read_only(&self) -> bool {
        self.kind == ExportKind::View
    }
}

/// A client's side of the handshake. Answers whether it was let in to an export.
pub(crate) fn handshake(data: &[u8]) -> bool {
    let ring = take_ring();
    let (end, heard) = ring.run_and_keep(shake_hands(ring.clone(), data.to_vec()));
    keep_ring(ring);
    compare(data, &heard, &end);
    matches!(end, Ok(Some(_)))
}

/// Size of the export that a client was let in to, and whether it is read-only. `None`: the client left.
type End = io::Result<Option<(u64, bool)>>;

/// A handshake to its end. Answers it, and what the client heard.
async fn shake_hands(ring: Ring, said: Vec<u8>) -> (End, Vec<u8>) {
    let (shard, served) = ShardHandle::here(ring.clone(), Exports(ring.clone()));
    let talk = async move {
        let shelf = Shelf { shard: Arc::new(shard) };
        let mut stream = tokio::io::join(Cursor::new(said), Vec::<u8>::new());
        let end = plain(&mut stream, &shelf).await;
        // What was claimed is given back here, as by a client that is gone before it is served.
        let end = end.map(|let_in| let_in.map(|(claim, _)| (claim.size(), claim.read_only())));
        (end, stream.into_inner().1)
    };
    // All that the client says is there, and nothing but this thread is waited for: it can only end, or hang.
    let both = pin!(join(talk, served));
    let patience = pin!(ring.sleep_ns(PATIENCE_NS));
    let Either::Left((ended, _)) = select(both, patience).await else { panic!("the handshake does not end") };
    let (heard, clients) = ended;
    assert!(clients.is_idle(), "the handshake has ended and still holds something");
    heard
}

/// What is on the shard. An export is made when it is asked for: most inputs never come so far.
#[derive(Clone)]
struct Exports(Ring);

impl ExportSource for Exports {
    fn export(&self, key: Uuid) -> Option<Rc<dyn Export>> {
        let known = EXPORTS.iter().find(|known| known.key == key && known.there)?;
        let export: Rc<dyn Export> = Memory::new(self.0.clone(), known.read_only());
        Some(export)
    }
}

/// What the control plane says that there is.
struct Shelf {
    shard: Arc<ShardHandle<Exports>>,
}

impl ExportDirectory<Exports> for Shelf {
    fn list(&self) -> BoxFuture<'_, Vec<ExportEntry>> {
        let entry = |known: &Known| ExportEntry {
            kind: known.kind,
            name: known.name.to_owned(),
            description: "in memory".to_owned(),
        };
        let entries: Vec<ExportEntry> = EXPORTS.iter().map(entry).collect();
        async move { entries }.boxed()
    }

    fn find<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Option<ExportInfo<Exports>>> {
        let found = Known::by_name(name).map(|known| ExportInfo {
            kind: known.kind,
            name: known.name.to_owned(),
            description: "in memory".to_owned(),
            size: SIZE,
            read_only: known.read_only(),
            shard: Arc::clone(&self.shard),
            key: known.key,
        });
        async move { found }.boxed()
    }
}

/// How a handshake has to end.
#[derive(Debug)]
enum Wanted {
    /// The client said something that ends the connection, or broke off.
    Broken,
    Left,
    LetIn(&'static Known),
}

/// Holds what a client heard, and how it ended, against what it said.
fn compare(said: &[u8], mut heard: &[u8], end: &End) {
    let greeting = take(&mut heard, 18).expect("a greeting");
    assert_eq!(greeting[..8], wire::MAGIC.to_be_bytes());
    assert_eq!(greeting[8..16], wire::OPTION_MAGIC.to_be_bytes());
    assert_eq!(u16::from_be_bytes([greeting[16], greeting[17]]), OFFERED);
    let wanted = follow(said, &mut heard);
    assert!(heard.is_empty(), "{wanted:?}, and {} bytes more are said", heard.len());
    match (wanted, end) {
        (Wanted::Broken, Err(_)) | (Wanted::Left, Ok(None)) => {}
        (Wanted::LetIn(export), Ok(Some(told))) => assert_eq!(*told, (SIZE, export.read_only())),
        (wanted, end) => panic!("{wanted:?}, and the server says {end:?}"),
    }
}

/// Goes through what a client said, and takes off the front of what it heard what answers it.
fn follow(mut said: &[u8], heard: &mut &[u8]) -> Wanted {
    let Some(flags) = take_u32(&mut said).filter(|flags| flags & !u32::from(OFFERED) == 0) else {
        return Wanted::Broken;
    };
    let mut structured = false;
    loop {
        let Some(head) = take_head::<OptionHead>(&mut said) else { return Wanted::Broken };
        let (code, len) = (head.option.get(), head.len.get());
        if head.magic.get() != wire::OPTION_MAGIC || len > OPTION_SKIP_MAX {
            return Wanted::Broken;
        }
        let Some(data) = take(&mut said, len as usize) else { return Wanted::Broken };
        let too_long = len > OPTION_MAX;
        if code == option::EXPORT_NAME {
            let known = std::str::from_utf8(data).ok().and_then(Known::by_name);
            let Some(export) = known.filter(|known| known.there && !too_long) else { return Wanted::Broken };
            check_export(take(heard, 10).expect("size and flags"), export, structured);
            if flags & u32::from(wire::handshake::NO_ZEROES) == 0 {
                let zeroes = take(heard, EXPORT_NAME_ZEROES).expect("zeroes");
                assert!(zeroes.iter().all(|byte| *byte == 0));
            }
            return Wanted::LetIn(export);
        }
        let (pieces, last, words) = take_answer(heard, code);
        let done = match code {
            _ if too_long => false,
            option::ABORT => true,
            option::LIST | option::STRUCTURED_REPLY => data.is_empty(),
            option::INFO => described(data).is_some(),
            option::GO => described(data).is_some_and(|known| known.there),
            // What queries mean is not told a second time.
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => structured && last == reply::ACK,
            _ => false,
        };
        assert_eq!(last == reply::ACK, done, "option {code} is answered with {last:#x}");
        if !done {
            assert!(pieces.is_empty(), "option {code} is refused, and answered besides");
            assert!(words.len() <= STRING_MAX && std::str::from_utf8(words).is_ok(), "{words:?}");
            continue;
        }
        assert!(words.is_empty(), "{words:?}");
        match code {
            option::ABORT => return Wanted::Left,
            option::LIST => assert_eq!(pieces.len(), EXPORTS.len()),
            option::STRUCTURED_REPLY => structured = true,
            option::INFO | option::GO => {
                let export = described(data).expect("it was described");
                let kind = info::EXPORT.to_be_bytes();
                let told: Vec<&[u8]> = pieces.iter().filter_map(|piece| piece.strip_prefix(&kind)).collect();
                assert_eq!(told.len(), 1, "an export is described once");
                check_export(told[0], export, structured);
                if code == option::GO {
                    return Wanted::LetIn(export);
                }
            }
            _ => pieces.into_iter().for_each(|piece| check_context(piece, code == option::SET_META_CONTEXT)),
        }
    }
}

/// The export that INFO and GO ask for, if they are well formed.
fn described(mut data: &[u8]) -> Option<&'static Known> {
    let len = take_u32(&mut data)?;
    let name = std::str::from_utf8(take(&mut data, len as usize)?).ok()?;
    let kinds = take(&mut data, 2)?;
    let kinds = usize::from(u16::from_be_bytes([kinds[0], kinds[1]]));
    if data.len() == 2 * kinds { Known::by_name(name) } else { None }
}

/// Takes the answer to an option off the front: its pieces, and the reply that ends it.
fn take_answer<'a>(heard: &mut &'a [u8], code: u32) -> (Vec<&'a [u8]>, u32, &'a [u8]) {
    let piece_kind = match code {
        option::LIST => Some(reply::SERVER),
        option::INFO | option::GO => Some(reply::INFO),
        option::LIST_META_CONTEXT | option::SET_META_CONTEXT => Some(reply::META_CONTEXT),
        _ => None,
    };
    let mut pieces = vec![];
    loop {
        let head: OptionReplyHead = take_head(heard).expect("an answer to each option");
        assert_eq!((head.magic.get(), head.option.get()), (wire::OPTION_REPLY_MAGIC, code));
        let data = take(heard, head.len.get() as usize).expect("as many bytes as the reply's head says");
        let kind = head.kind.get();
        if kind == reply::ACK || kind >> 31 == 1 {
            return (pieces, kind, data);
        }
        assert_eq!(Some(kind), piece_kind, "option {code}");
        pieces.push(data);
    }
}

/// Size and flags of an export.
fn check_export(bytes: &[u8], export: &Known, structured: bool) {
    let (size, flags) = bytes.split_first_chunk::<8>().expect("a size");
    let flags = u16::from_be_bytes(flags.try_into().expect("flags"));
    let has = |flag: u16| flags & flag != 0;
    assert_eq!(u64::from_be_bytes(*size), SIZE);
    assert!(has(transmission::HAS_FLAGS));
    assert_eq!(has(transmission::READ_ONLY), export.read_only());
    assert_eq!(has(transmission::SEND_TRIM), !export.read_only());
    assert_eq!(has(transmission::SEND_DF), structured);
}

/// A context that is listed or was set: its number and its name.
fn check_context(bytes: &[u8], set: bool) {
    let (id, name) = bytes.split_first_chunk::<4>().expect("the number of a context");
    let number = match name {
        b"base:allocation" => 1,
        since => {
            assert!(since.starts_with(b"qemu:dirty-bitmap:since-"), "{since:?}");
            2
        }
    };
    assert_eq!(u32::from_be_bytes(*id), if set { number } else { 0 });
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    take(rest, 4).map(|bytes| u32::from_be_bytes(bytes.try_into().expect("four bytes")))
}
