//! What the fuzzers reach; among it a door to the transmission phase as a whole ([`stream`]) and one to the handshake ([`handshake`]).
//!
//! A client's bytes go through a pair of sockets to the real reader and writer, on a real ring, before an export in memory. What
//! comes back is held against the protocol, told here a second time: which requests have to be done, what they read, what the
//! export holds in the end.

mod negotiation;

use std::cell::{Cell, RefCell};
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cdp_journal::index::Touched;
use cdp_journal::{
    BLOCK, BlockStatus, ClientGuard, Error, Export, Instant, IoBuf, LocalFuture, Result, SECTOR, SECTORS_PER_BLOCK,
    Slice,
};
use futures::future::{Either, join, select};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes as _};

use super::handshake::MetaContext;
use super::transmission::Clients;
use super::wire::{self, ChunkHead, Request, STRING_MAX, SimpleReply, chunk, command, error};
use super::{ClientStats, ExportSource, NbdConfig, NbdSession, Seat};
use crate::ring::{Ring, SendBatch};

pub(crate) use super::transmission::fuzz_request;
pub(crate) use negotiation::handshake;

/// Bytes of the export: a few blocks and part of one.
const SIZE: u64 = (64 << 10) + SECTOR;
/// Reads and writes that begin here fail, as on a broken disk.
const BROKEN: u64 = 5 * BLOCK;
/// Reads that begin here are answered with nothing: a bug of the engine.
const SHORT: u64 = BROKEN + SECTOR;
/// Bytes of a part of the export's answers: they come in parts, as overlays answer.
const PART_BYTES: usize = 9 * SECTOR as usize;
/// Blocks that are said to have changed.
const CHANGED: [u64; 4] = [1, 2, 5, 16];
/// Requests of an input that are said: more say nothing new, and cost memory.
const REQUESTS_MAX: usize = 256;
/// Sends of an input, about: more cost time.
const SENDS_MAX: usize = 64;
/// Bytes that the client receives at once.
const RECEIVE_BYTES: usize = 64 << 10;
/// A connection that takes longer to end hangs.
const PATIENCE_NS: u64 = 15_000_000_000;
/// What a refusal may say.
const ERRORS: [u32; 7] =
    [error::EPERM, error::EIO, error::ENOMEM, error::EINVAL, error::ENOSPC, error::ENOTSUP, error::ESHUTDOWN];
/// The bits of a cookie by which the client finds its request. The others are the fuzzer's.
const NUMBER_BITS: u64 = 0xFFFF_FFFF;

thread_local! {
    /// The thread's ring between two inputs. Never closed: at the end of a thread the ring's queue is gone already.
    static RING: Cell<Option<ManuallyDrop<Ring>>> = const { Cell::new(None) };
}

/// What a client says after its handshake, to the real server. The first byte is what the handshake agreed on, the second in what
/// pieces the rest is sent. Answers whether there was a request that is to be done.
pub(crate) fn stream(data: &[u8]) -> bool {
    let [kind, pace, bytes @ ..] = data else { return false };
    let agreed = Agreed::of(*kind);
    let mut bytes = bytes.to_vec();
    let said = Said::of(&mut bytes);
    let piece = match *pace {
        0 => usize::MAX,
        pace => (usize::from(pace) * 8 + 5).max(bytes.len() / SENDS_MAX),
    };
    let ring = take_ring();
    let memory = Memory::new(ring.clone(), agreed.read_only);
    let heard = ring.run_and_keep(converse(ring.clone(), Rc::clone(&memory), agreed, bytes.clone(), piece));
    keep_ring(ring);
    said.compare(&bytes, &heard, agreed, &memory);
    said.asked.iter().any(|asked| is_good(&asked.request, agreed))
}

/// The thread's ring, for one input.
fn take_ring() -> Ring {
    RING.take().map_or_else(|| Ring::new().expect("io_uring"), ManuallyDrop::into_inner)
}

/// Gives it back. After a panic nobody does: it is closed then.
fn keep_ring(ring: Ring) {
    RING.set(Some(ManuallyDrop::new(ring)));
}

/// What the handshake agreed on, and how much may be in flight.
#[derive(Clone, Copy)]
struct Agreed {
    read_only: bool,
    structured: bool,
    allocation: bool,
    since: bool,
    /// The connection may have little in flight.
    few: bool,
    /// The shard may have little in flight.
    crowded: bool,
}

impl Agreed {
    fn of(kind: u8) -> Self {
        let bit = |number: u32| (kind >> number) & 1 == 1;
        let (read_only, structured) = (bit(0), bit(1));
        Self {
            read_only,
            structured,
            // Contexts want structured replies, and only what is read-only can tell what changed.
            allocation: bit(2) && structured,
            since: bit(3) && structured && read_only,
            few: bit(4),
            crowded: bit(5),
        }
    }

    fn contexts(self) -> Vec<MetaContext> {
        let allocation = self.allocation.then_some(MetaContext::Allocation);
        let since = self.since.then_some(MetaContext::Since(Instant::ZERO));
        allocation.into_iter().chain(since).collect()
    }

    fn config(self) -> NbdConfig {
        let mut config = NbdConfig::default();
        if self.few {
            config.inflight_requests_max = 3;
            config.inflight_bytes_max = 8 << 10;
        }
        if self.crowded {
            config.shard_bytes_max = 64 << 10;
        }
        config
    }
}

/// A connection from its first request to its end. Answers what the client heard.
async fn converse(ring: Ring, memory: Rc<Memory>, agreed: Agreed, bytes: Vec<u8>, piece: usize) -> Vec<u8> {
    let (near, far) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).expect("a pair of sockets");
    let client = Rc::new(far);
    let stats = Arc::<ClientStats>::default();
    let clients = Clients::new(ring.clone(), Arc::clone(&stats));
    let seats = Arc::new(AtomicUsize::new(1));
    let seat = Seat { taken: Arc::clone(&seats) };
    let session = NbdSession::new("memory".to_owned(), agreed.structured, agreed.contexts());
    let claimed = clients.claim(&memory, Uuid::nil()).expect("nobody is refused");
    clients.adopt(claimed.ticket, near, session.with_limits(&agreed.config(), seat));
    let talk = pin!(async {
        let ((), heard) = join(say(&ring, &client, &bytes, piece), listen(&ring, &client)).await;
        // A client that is cut off may hear the end before its requests are done.
        while stats.connections.load(Ordering::Relaxed) > 0 {
            ring.sleep_ns(0).await;
        }
        heard
    });
    let patience = pin!(ring.sleep_ns(PATIENCE_NS));
    let Either::Left((heard, _)) = select(talk, patience).await else { panic!("the connection does not end") };
    assert!(clients.is_idle(), "the connection has ended and still holds something");
    assert_eq!(seats.load(Ordering::Acquire), 0, "the connection has ended and keeps its seat");
    heard
}

/// The client's sending side.
async fn say(ring: &Ring, client: &Rc<OwnedFd>, bytes: &[u8], piece: usize) {
    let mut batch = Box::<SendBatch>::default();
    for piece in bytes.chunks(piece) {
        batch.push_head(piece);
        let sent;
        (sent, batch) = ring.send(client, batch).await;
        batch.clear();
        if sent.is_err() {
            return; // the server has ended the connection
        }
    }
    let _ = shutdown(client.as_raw_fd(), Shutdown::Write);
}

/// The client's receiving side, to the end.
async fn listen(ring: &Ring, client: &Rc<OwnedFd>) -> Vec<u8> {
    let mut heard = vec![];
    let mut buf = IoBuf::zeroed(RECEIVE_BYTES);
    loop {
        let result;
        (result, buf) = ring.recv(client, buf, 0, RECEIVE_BYTES, false).await;
        match result {
            Ok(count @ 1..) => heard.extend_from_slice(&buf[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return heard, // a reset, too: the server need not read all
        }
    }
}

/// An export in memory. A request is done when it is called for, so requests take effect in the order in which they came; every
/// second block's answers come a turn of the ring later, so they overtake one another.
struct Memory {
    ring: Ring,
    read_only: bool,
    bytes: RefCell<Vec<u8>>,
    /// Flushes, and writes that were to be durable.
    durable: Cell<u32>,
}

/// What the export holds at first: each sector its number, but every second block is zeroes.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for (number, sector) in (0_u64..).zip(bytes.chunks_mut(SECTOR as usize)) {
        if (number / SECTORS_PER_BLOCK).is_multiple_of(2) {
            sector.fill(number as u8 + 1);
        }
    }
    bytes
}

/// Where a range lies, if the door was right to let it in.
fn place(offset: u64, len: u64) -> Range<usize> {
    let whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) && len > 0;
    assert!(whole && offset <= SIZE && len <= SIZE - offset, "the door let {offset}+{len} in");
    offset as usize..(offset + len) as usize
}

fn broken(op: &'static str) -> Error {
    Error::device(op, "memory", &io::Error::from_raw_os_error(libc::EILSEQ))
}

impl Memory {
    fn new(ring: Ring, read_only: bool) -> Rc<Self> {
        Rc::new(Self { ring, read_only, bytes: RefCell::new(content()), durable: Cell::new(0) })
    }

    fn note(&self, durable: bool) {
        self.durable.set(self.durable.get() + u32::from(durable));
    }

    fn answer<T: 'static>(&self, offset: u64, result: Result<T>) -> LocalFuture<'static, Result<T>> {
        let later = (!(offset / BLOCK).is_multiple_of(2)).then(|| self.ring.sleep_ns(0));
        Box::pin(async move {
            if let Some(later) = later {
                later.await;
            }
            result
        })
    }
}

impl Export for Memory {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<Vec<Slice>>> {
        let bytes = self.bytes.borrow();
        let parts = bytes[place(offset, len.into())].chunks(PART_BYTES).map(|part| IoBuf::copy_of(part).share());
        let result = match offset {
            BROKEN => Err(broken("read")),
            SHORT => Ok(vec![]),
            _ => Ok(parts.collect()),
        };
        self.answer(offset, result)
    }

    fn write(&self, offset: u64, len: u32, data: IoBuf, fua: bool) -> LocalFuture<'static, Result<()>> {
        assert!(!self.read_only, "the door let a write in");
        let place = place(offset, len.into());
        let (head, rest) = data.split_at((offset % BLOCK) as usize);
        let (payload, tail) = rest.split_at(place.len());
        assert!(data.len().is_multiple_of(BLOCK as usize), "{} bytes are not whole blocks", data.len());
        assert!(head.iter().chain(tail).all(|byte| *byte == 0), "around the payload there are old bytes");
        let result = if offset == BROKEN {
            Err(broken("write"))
        } else {
            self.bytes.borrow_mut()[place].copy_from_slice(payload);
            self.note(fua);
            Ok(())
        };
        self.answer(offset, result)
    }

    fn write_zeroes(&self, offset: u64, len: u32, _no_hole: bool, fua: bool) -> LocalFuture<'static, Result<()>> {
        assert!(!self.read_only, "the door let zeroes in");
        self.bytes.borrow_mut()[place(offset, len.into())].fill(0);
        self.note(fua);
        self.answer(offset, Ok(()))
    }

    fn trim(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<()>> {
        assert!(!self.read_only && !place(offset, len.into()).is_empty(), "the door let a trim in");
        self.answer(offset, Ok(()))
    }

    fn flush(&self) -> LocalFuture<'static, Result<()>> {
        self.note(true);
        self.answer(0, Ok(()))
    }

    fn status(&self, offset: u64, len: u64) -> LocalFuture<'static, Result<Vec<BlockStatus>>> {
        let status = |piece: &[u8]| {
            let zero = piece.iter().all(|byte| *byte == 0);
            BlockStatus { len: piece.len() as u64, hole: zero, zero }
        };
        let pieces = self.bytes.borrow()[place(offset, len)].chunks(PART_BYTES).map(status).collect();
        self.answer(offset, Ok(pieces))
    }

    fn changed_since(&self, _since: Instant) -> LocalFuture<'static, Result<Rc<Touched>>> {
        if !self.read_only {
            return self.answer(0, Err(Error::State("only what is read-only can tell".to_owned())));
        }
        let mut changed = Touched::new();
        for block in CHANGED {
            changed.insert(block);
        }
        self.answer(0, Ok(Rc::new(changed)))
    }

    fn connect(&self, writable: bool, _on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard> {
        assert_eq!(writable, !self.read_only);
        Ok(ClientGuard::none())
    }
}

impl ExportSource for Rc<Memory> {
    fn export(&self, _key: Uuid) -> Option<Rc<dyn Export>> {
        let export: Rc<dyn Export> = Rc::<Memory>::clone(self);
        Some(export)
    }
}

/// A request that was said, with all of its payload.
struct Asked {
    request: Request,
    /// Where its payload lies in what was said.
    payload: Range<usize>,
}

/// What a client's bytes mean.
struct Said {
    asked: Vec<Asked>,
    /// The client ends where a request ends, or says that it leaves: so each request is answered, and wholly.
    orderly: bool,
}

impl Said {
    /// Finds the requests. Gives each its number as part of its cookie, so that its answer is known, and ends after the last one
    /// that is to be said.
    fn of(bytes: &mut Vec<u8>) -> Self {
        let mut asked: Vec<Asked> = vec![];
        let mut at = 0;
        let orderly = loop {
            if asked.len() == REQUESTS_MAX {
                bytes.truncate(at);
            }
            if bytes.len() - at < size_of::<Request>() {
                break at == bytes.len();
            }
            let head = &mut bytes[at..at + size_of::<Request>()];
            let mut request = Request::read_from_bytes(head).expect("as many bytes as a request has");
            at += size_of::<Request>();
            if request.magic.get() != wire::REQUEST_MAGIC {
                break false;
            }
            if request.command.get() == command::DISC {
                break true;
            }
            request.cookie = ((request.cookie.get() & !NUMBER_BITS) | asked.len() as u64).into();
            head.copy_from_slice(request.as_bytes());
            let len = if request.command.get() == command::WRITE { request.len.get() as usize } else { 0 };
            if bytes.len() - at < len {
                break false;
            }
            asked.push(Asked { request, payload: at..at + len });
            at += len;
        };
        Self { asked, orderly }
    }

    /// Holds what the client heard, and what the export has become, against what had to come of what was said.
    fn compare(&self, bytes: &[u8], heard: &[u8], agreed: Agreed, memory: &Memory) {
        let mut answers: Vec<Option<Answer<'_>>> = self.asked.iter().map(|_| None).collect();
        let mut rest = heard;
        while !rest.is_empty() {
            let Some((number, answer)) = take_reply(&mut rest, &self.asked, agreed) else {
                assert!(!self.orderly, "the connection ends inside a reply");
                break;
            };
            let earlier = answers[number].replace(answer);
            assert!(earlier.is_none(), "answered twice: {:?}", self.asked[number].request);
        }
        let mut model = content();
        let mut durable = 0;
        for (Asked { request, payload }, answer) in self.asked.iter().zip(answers) {
            let good = is_good(request, agreed);
            match answer {
                None => assert!(!self.orderly, "not answered: {request:?}"),
                Some(Answer::Error(errno)) => {
                    assert!(ERRORS.contains(&errno), "error {errno} is none of the protocol: {request:?}");
                    assert!(!good, "refused with {errno}: {request:?}");
                }
                Some(answer) => {
                    assert!(good, "done: {request:?}");
                    check_answer(request, &answer, agreed, &model);
                }
            }
            if good {
                let (code, fua) = (request.command.get(), request.flags.get() & command::FLAG_FUA != 0);
                let changes = matches!(code, command::WRITE | command::WRITE_ZEROES | command::TRIM);
                durable += u32::from(code == command::FLUSH || changes && fua);
                match code {
                    command::WRITE => model[range(request)].copy_from_slice(&bytes[payload.clone()]),
                    command::WRITE_ZEROES => model[range(request)].fill(0),
                    _ => {}
                }
            }
        }
        assert!(*memory.bytes.borrow() == model, "the export is not what the requests make of it");
        assert_eq!(memory.durable.get(), durable, "flushes and durable writes");
    }
}

/// Where a good request's range lies.
fn range(request: &Request) -> Range<usize> {
    place(request.offset.get(), request.len.get().into())
}

/// Whether a request is to be done, rather than refused.
fn is_good(request: &Request, agreed: Agreed) -> bool {
    let (code, flags) = (request.command.get(), request.flags.get());
    let (offset, len) = (request.offset.get(), u64::from(request.len.get()));
    let known = match code {
        command::READ | command::FLUSH | command::CACHE => true,
        command::WRITE | command::TRIM | command::WRITE_ZEROES => !agreed.read_only,
        command::BLOCK_STATUS => agreed.allocation || agreed.since,
        _ => false,
    };
    let own_flags = match code {
        command::READ if agreed.structured => command::FLAG_DF,
        command::WRITE_ZEROES => command::FLAG_NO_HOLE,
        command::BLOCK_STATUS => command::FLAG_REQ_ONE,
        _ => 0,
    };
    let whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) && len > 0;
    let inside = offset.checked_add(len).is_some_and(|end| end <= SIZE);
    let fails = match code {
        command::READ => offset == BROKEN || offset == SHORT,
        command::WRITE => offset == BROKEN,
        _ => false,
    };
    let flags_fit = flags & !(own_flags | command::FLAG_FUA) == 0;
    known && flags_fit && (code == command::FLUSH || whole && inside && !fails)
}

/// What a request was answered.
#[derive(Debug)]
enum Answer<'a> {
    Done,
    Data(&'a [u8]),
    /// Extents by the number of their context.
    Extents(Vec<(u32, Vec<(u32, u32)>)>),
    Error(u32),
}

/// Takes one reply off the front: the number of its request, and what it says. `None`: it is not there as a whole.
fn take_reply<'a>(rest: &mut &'a [u8], asked: &[Asked], agreed: Agreed) -> Option<(usize, Answer<'a>)> {
    if rest.starts_with(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes()) {
        let head: SimpleReply = take_head(rest)?;
        let number = number_of(asked, head.cookie.get());
        let request = &asked[number].request;
        let answer = match head.error.get() {
            0 if request.command.get() == command::READ => {
                assert!(!agreed.structured, "a simple reply to a client that takes data in chunks: {request:?}");
                Answer::Data(take(rest, request.len.get() as usize)?)
            }
            0 => Answer::Done,
            errno => Answer::Error(errno),
        };
        return Some((number, answer));
    }
    let mut contexts = vec![];
    let mut first = None;
    loop {
        let head: ChunkHead = take_head(rest)?;
        assert_eq!(head.magic.get(), wire::CHUNK_MAGIC, "neither a reply nor a chunk");
        assert!(agreed.structured, "a chunk to a client that takes simple replies");
        let number = number_of(asked, head.cookie.get());
        assert_eq!(*first.get_or_insert(number), number, "a chunk of another reply before the last of this one");
        let request = &asked[number].request;
        let last = match head.flags.get() {
            0 => false,
            chunk::FLAG_DONE => true,
            flags => panic!("chunk flags {flags:#x}"),
        };
        let kind = head.kind.get();
        // Before the bytes are waited for: a length that is too long would pass for a connection that was cut.
        match kind {
            chunk::OFFSET_DATA => assert_eq!(head.len.get(), 8 + request.len.get(), "{request:?}"),
            _ => assert!(head.len.get() <= 8 << 10, "a chunk of {} bytes: {request:?}", head.len.get()),
        }
        let body = take(rest, head.len.get() as usize)?;
        match kind {
            chunk::OFFSET_DATA => {
                let (offset, data) = body.split_first_chunk::<8>().expect("an offset");
                assert!(last && contexts.is_empty(), "more than data: {request:?}");
                assert_eq!(u64::from_be_bytes(*offset), request.offset.get(), "data of another place: {request:?}");
                return Some((number, Answer::Data(data)));
            }
            chunk::BLOCK_STATUS => {
                let (id, extents) = body.split_first_chunk::<4>().expect("the number of a context");
                assert!(extents.len().is_multiple_of(8), "half an extent: {request:?}");
                let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("four bytes"));
                let extents = extents.chunks_exact(8).map(|extent| (word(&extent[..4]), word(&extent[4..]))).collect();
                contexts.push((u32::from_be_bytes(*id), extents));
                if last {
                    return Some((number, Answer::Extents(contexts)));
                }
            }
            chunk::ERROR => {
                let (errno, behind) = body.split_first_chunk::<4>().expect("an error's number");
                let (len, words) = behind.split_first_chunk::<2>().expect("the length of its words");
                assert!(last && contexts.is_empty(), "more than an error: {request:?}");
                assert_eq!(usize::from(u16::from_be_bytes(*len)), words.len(), "{request:?}");
                assert!(words.len() <= STRING_MAX && std::str::from_utf8(words).is_ok(), "{request:?}");
                return Some((number, Answer::Error(u32::from_be_bytes(*errno))));
            }
            kind => panic!("a chunk of kind {kind}"),
        }
    }
}

/// Takes bytes off the front. `None`: there are fewer.
fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (bytes, behind) = rest.split_at_checked(len)?;
    *rest = behind;
    Some(bytes)
}

fn take_head<T: FromBytes>(rest: &mut &[u8]) -> Option<T> {
    T::read_from_bytes(take(rest, size_of::<T>())?).ok()
}

/// Which request has this cookie.
fn number_of(asked: &[Asked], cookie: u64) -> usize {
    let number = (cookie & NUMBER_BITS) as usize;
    let known = asked.get(number).is_some_and(|asked| asked.request.cookie.get() == cookie);
    assert!(known, "a reply with the cookie {cookie:#x}, which no request had");
    number
}

/// Holds the answer to a good request against what the export held before it.
fn check_answer(request: &Request, answer: &Answer<'_>, agreed: Agreed, model: &[u8]) {
    let code = request.command.get();
    match (code, answer) {
        (command::READ, Answer::Data(data)) => assert!(**data == model[range(request)], "wrong data: {request:?}"),
        (command::BLOCK_STATUS, Answer::Extents(contexts)) => {
            let ids: Vec<u32> = contexts.iter().map(|(id, _)| *id).collect();
            let wanted: Vec<u32> = agreed.contexts().into_iter().map(MetaContext::id).collect();
            assert_eq!(ids, wanted, "{request:?}");
            for (id, extents) in contexts {
                let one = request.flags.get() & command::FLAG_REQ_ONE != 0;
                assert!(!extents.is_empty() && (!one || extents.len() == 1), "{request:?}: {answer:?}");
                check_extents(request, *id == MetaContext::Allocation.id(), extents, model);
            }
        }
        (_, Answer::Done) if code != command::READ && code != command::BLOCK_STATUS => {}
        (_, answer) => panic!("{request:?}: {answer:?}"),
    }
}

/// Extents lie inside what was asked for, and are true.
fn check_extents(request: &Request, allocation: bool, extents: &[(u32, u32)], model: &[u8]) {
    let mut at = request.offset.get();
    let asked = at + u64::from(request.len.get());
    for (len, state) in extents {
        let end = at + u64::from(*len);
        assert!(at < end && end <= asked, "{request:?}: {extents:?}");
        let is_true = if allocation {
            // Zeroes need not be known as such.
            state & chunk::STATE_ZERO == 0 || model[at as usize..end as usize].iter().all(|byte| *byte == 0)
        } else {
            let dirty = state & chunk::STATE_DIRTY != 0;
            (at / BLOCK..end.div_ceil(BLOCK)).all(|block| CHANGED.contains(&block) == dirty)
        };
        assert!(is_true, "{request:?}: {extents:?}");
        at = end;
    }
}
