//! The handshake: fixed newstyle, option by option, until the client chooses an export or leaves.
//!
//! Nothing that a client sends is kept beyond the option that it belongs to, and no length is believed before it is compared
//! with a bound: an option that is too long is skipped and answered, one that is absurdly long ends the connection.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zerocopy::IntoBytes;

use cdp_journal::{Error, Instant};

use super::transmission::{ExportSource, NbdSession};
use super::wire::{self, OptionHead, OptionReplyHead, STRING_MAX, info, option, reply, transmission};
use super::{BLOCK_MIN, BLOCK_PREFERRED, ExportDirectory, ExportInfo, PAYLOAD_MAX};
use crate::shard::{ExportClaim, ShardGone};

/// Longest option that is read.
pub(super) const OPTION_MAX: u32 = 64 << 10;
/// Longest option that is skipped; a longer one ends the connection.
pub(super) const OPTION_SKIP_MAX: u32 = 1 << 20;
/// Zero bytes after the answer to EXPORT_NAME, for clients that do not ask to leave them out.
pub(super) const EXPORT_NAME_ZEROES: usize = 124;

/// A metadata context that clients can choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MetaContext {
    /// `base:allocation`: what is a hole, what reads as zeroes.
    Allocation,
    /// `qemu:dirty-bitmap:since-<instant>`: which blocks of a view may differ from the volume at an instant.
    Since(Instant),
}

const ALLOCATION: &str = "base:allocation";
const SINCE: &str = "qemu:dirty-bitmap:since-";

impl MetaContext {
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Since(_) => 2,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Allocation => ALLOCATION.to_owned(),
            Self::Since(instant) => format!("{SINCE}{instant}"),
        }
    }

    /// What a query means. `base:` alone means all of that namespace, but only in a list.
    fn asked(query: &str, set: bool) -> Option<Self> {
        match query {
            ALLOCATION => Some(Self::Allocation),
            "base:" if !set => Some(Self::Allocation),
            other => {
                let digits = other.strip_prefix(SINCE)?;
                let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
                digits.parse().ok().filter(|_| plain).map(|ns| Self::Since(Instant(ns)))
            }
        }
    }
}

/// Negotiates in the clear. `None`: the client left.
pub(crate) async fn plain<S, T>(
    stream: &mut T,
    directory: &dyn ExportDirectory<S>,
) -> io::Result<Option<(ExportClaim<S>, NbdSession)>>
where
    S: ExportSource + Clone + 'static,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let no_zeroes = greet(stream).await?;
    let mut negotiation = Negotiation::new(stream, directory, no_zeroes);
    match negotiation.run(Encryption::None).await? {
        Outcome::Serve(claim, session) => Ok(Some((claim, session))),
        Outcome::Left | Outcome::StartTls => Ok(None),
    }
}

/// What an encrypted negotiation ends with: the export, how it is spoken to, and through what.
type Encrypted<S> = (ExportClaim<S>, NbdSession, TlsStream<TcpStream>);

/// Negotiates with STARTTLS first: nothing else but leaving is possible in the clear. `None`: the client left.
pub(super) async fn encrypted<S: ExportSource + Clone + 'static>(
    mut stream: TcpStream,
    acceptor: &TlsAcceptor,
    directory: &dyn ExportDirectory<S>,
) -> io::Result<Option<Encrypted<S>>> {
    let no_zeroes = greet(&mut stream).await?;
    match Negotiation::new(&mut stream, directory, no_zeroes).run(Encryption::Required).await? {
        Outcome::StartTls => {}
        Outcome::Serve(..) | Outcome::Left => return Ok(None),
    }
    let mut stream = acceptor.accept(stream).await?;
    match Negotiation::new(&mut stream, directory, no_zeroes).run(Encryption::Done).await? {
        Outcome::Serve(claim, session) => Ok(Some((claim, session, stream))),
        Outcome::Left | Outcome::StartTls => Ok(None),
    }
}

/// The server's first words and the client's. Answers whether zeroes are left out.
async fn greet<T: AsyncRead + AsyncWrite + Unpin>(stream: &mut T) -> io::Result<bool> {
    let ours = wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES;
    let mut words = [0; 18];
    words[..8].copy_from_slice(&wire::MAGIC.to_be_bytes());
    words[8..16].copy_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    words[16..].copy_from_slice(&ours.to_be_bytes());
    stream.write_all(&words).await?;
    stream.flush().await?;
    let theirs = stream.read_u32().await?;
    if theirs & !u32::from(ours) != 0 {
        return Err(broken(format!("client flags {theirs:#x} hold bits that were not offered")));
    }
    Ok(theirs & u32::from(wire::handshake::NO_ZEROES) != 0)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Encryption {
    /// Not offered here.
    None,
    /// Nothing else is answered before.
    Required,
    /// This stream is encrypted.
    Done,
}

enum Outcome<S: 'static> {
    Serve(ExportClaim<S>, NbdSession),
    StartTls,
    Left,
}

/// An answer that is not the wished one: its number and words for people.
type Refusal = (u32, String);

struct Negotiation<'a, S, T> {
    stream: &'a mut T,
    directory: &'a dyn ExportDirectory<S>,
    no_zeroes: bool,
    structured: bool,
    /// The contexts chosen, and for which export.
    contexts: Option<(String, Vec<MetaContext>)>,
    /// The answer that is being put together; sent as a whole.
    answer: Vec<u8>,
}

impl<'a, S, T> Negotiation<'a, S, T>
where
    S: ExportSource + Clone + 'static,
    T: AsyncRead + AsyncWrite + Unpin,
{
    fn new(stream: &'a mut T, directory: &'a dyn ExportDirectory<S>, no_zeroes: bool) -> Self {
        Self { stream, directory, no_zeroes, structured: false, contexts: None, answer: vec![] }
    }

    async fn run(&mut self, encryption: Encryption) -> io::Result<Outcome<S>> {
        loop {
            let (code, len) = self.head().await?;
            if len > OPTION_MAX {
                self.skip(len).await?;
                if code == option::EXPORT_NAME {
                    return Err(broken(format!("an export name of {len} bytes")));
                }
                self.refuse(
                    code,
                    (reply::ERR_TOO_BIG, format!("{len} bytes of option, at most {OPTION_MAX} are read")),
                );
                self.send().await?;
                continue;
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data).await?;
            if encryption == Encryption::Required && !matches!(code, option::STARTTLS | option::ABORT) {
                if code == option::EXPORT_NAME {
                    return Err(broken("an export was asked for before STARTTLS".to_owned()));
                }
                self.refuse(code, (reply::ERR_TLS_REQD, "TLS is required here: use STARTTLS first".to_owned()));
                self.send().await?;
                continue;
            }
            let result = match code {
                option::EXPORT_NAME => return self.export_name(&data).await,
                option::ABORT => {
                    self.put(code, reply::ACK, &[]);
                    let _ = self.send().await; // the client may be gone already
                    return Ok(Outcome::Left);
                }
                option::LIST => self.list(code, &data).await,
                option::STARTTLS => match starttls(encryption, &data) {
                    Ok(()) => {
                        self.put(code, reply::ACK, &[]);
                        self.send().await?;
                        return Ok(Outcome::StartTls);
                    }
                    Err(refusal) => Err(refusal),
                },
                option::INFO => self.info(code, &data).await,
                option::GO => match self.go(code, &data).await {
                    Ok((claim, session)) => {
                        self.send().await?;
                        return Ok(Outcome::Serve(claim, session));
                    }
                    Err(refusal) => Err(refusal),
                },
                option::STRUCTURED_REPLY => empty(&data).map(|()| {
                    self.structured = true;
                    self.put(code, reply::ACK, &[]);
                }),
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(code, &data).await,
                unknown => Err((reply::ERR_UNSUP, format!("option {unknown} is not known"))),
            };
            if let Err(refusal) = result {
                self.answer.clear();
                self.refuse(code, refusal);
            }
            self.send().await?;
        }
    }

    async fn head(&mut self) -> io::Result<(u32, u32)> {
        let mut head = OptionHead { magic: 0.into(), option: 0.into(), len: 0.into() };
        self.stream.read_exact(head.as_mut_bytes()).await?;
        if head.magic.get() != wire::OPTION_MAGIC {
            return Err(broken(format!("option magic {:#x}", head.magic.get())));
        }
        Ok((head.option.get(), head.len.get()))
    }

    async fn skip(&mut self, len: u32) -> io::Result<()> {
        if len > OPTION_SKIP_MAX {
            return Err(broken(format!("an option of {len} bytes, at most {OPTION_SKIP_MAX} are skipped")));
        }
        let mut left = len as usize;
        let mut sink = [0; 4096];
        while left > 0 {
            let step = left.min(sink.len());
            self.stream.read_exact(&mut sink[..step]).await?;
            left -= step;
        }
        Ok(())
    }

    fn put(&mut self, code: u32, kind: u32, data: &[u8]) {
        let head = OptionReplyHead {
            magic: wire::OPTION_REPLY_MAGIC.into(),
            option: code.into(),
            kind: kind.into(),
            len: (data.len() as u32).into(),
        };
        self.answer.extend_from_slice(head.as_bytes());
        self.answer.extend_from_slice(data);
    }

    fn refuse(&mut self, code: u32, (kind, words): Refusal) {
        tracing::debug!(option = code, refusal = kind & 0x7fff_ffff, words, "NBD option refused");
        self.put(code, kind, bounded(&words).as_bytes());
    }

    async fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.answer).await?;
        self.answer.clear();
        self.stream.flush().await
    }

    async fn list(&mut self, code: u32, data: &[u8]) -> Result<(), Refusal> {
        empty(data)?;
        for export in self.directory.list().await {
            let name = bounded(&export.name);
            let mut entry = (name.len() as u32).to_be_bytes().to_vec();
            entry.extend_from_slice(name.as_bytes());
            entry.extend_from_slice(bounded(&export.description).as_bytes());
            self.put(code, reply::SERVER, &entry);
        }
        self.put(code, reply::ACK, &[]);
        Ok(())
    }

    async fn find(&self, name: &str) -> Result<ExportInfo<S>, Refusal> {
        let found = self.directory.find(name).await;
        found.ok_or_else(|| (reply::ERR_UNKNOWN, format!("export {name:?} is not known")))
    }

    async fn info(&mut self, code: u32, data: &[u8]) -> Result<(), Refusal> {
        let (name, wishes) = parse_info(data)?;
        let export = self.find(name).await?;
        self.describe(code, &export, export.size, export.read_only, &wishes);
        self.put(code, reply::ACK, &[]);
        Ok(())
    }

    async fn go(&mut self, code: u32, data: &[u8]) -> Result<(ExportClaim<S>, NbdSession), Refusal> {
        let (name, wishes) = parse_info(data)?;
        let export = self.find(name).await?;
        let claim = claim(&export).await?;
        self.describe(code, &export, claim.size(), claim.read_only(), &wishes);
        self.put(code, reply::ACK, &[]);
        let session = self.session(name, &export.name);
        Ok((claim, session))
    }

    /// The old way in: no answer but the export itself, so a refusal can only be the end.
    async fn export_name(&mut self, data: &[u8]) -> io::Result<Outcome<S>> {
        let refused = |(_, words): Refusal| broken(words);
        let name = name_of(data).map_err(refused)?;
        let export = self.find(name).await.map_err(refused)?;
        let claim = claim(&export).await.map_err(refused)?;
        self.answer.extend_from_slice(&claim.size().to_be_bytes());
        self.answer.extend_from_slice(&self.flags(claim.read_only()).to_be_bytes());
        if !self.no_zeroes {
            self.answer.resize(self.answer.len() + EXPORT_NAME_ZEROES, 0);
        }
        self.send().await?;
        let session = self.session(name, &export.name);
        Ok(Outcome::Serve(claim, session))
    }

    fn session(&mut self, asked: &str, canonical: &str) -> NbdSession {
        let contexts = match self.contexts.take() {
            // They were chosen for one export; for another they mean nothing.
            Some((name, contexts)) if name == asked => contexts,
            _ => vec![],
        };
        NbdSession::new(canonical.to_owned(), self.structured, contexts)
    }

    fn flags(&self, read_only: bool) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_CACHE
            | transmission::CAN_MULTI_CONN;
        flags |=
            if read_only { transmission::READ_ONLY } else { transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES };
        if self.structured {
            flags |= transmission::SEND_DF;
        }
        flags
    }

    fn describe(&mut self, code: u32, export: &ExportInfo<S>, size: u64, read_only: bool, wishes: &[u16]) {
        let mut bytes = info::EXPORT.to_be_bytes().to_vec();
        bytes.extend_from_slice(&size.to_be_bytes());
        bytes.extend_from_slice(&self.flags(read_only).to_be_bytes());
        self.put(code, reply::INFO, &bytes);
        // Told to everybody: requests that do not fit are refused.
        let mut bytes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [BLOCK_MIN, BLOCK_PREFERRED, PAYLOAD_MAX] {
            bytes.extend_from_slice(&size.to_be_bytes());
        }
        self.put(code, reply::INFO, &bytes);
        for (kind, words) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if wishes.contains(&kind) && !words.is_empty() {
                let mut bytes = kind.to_be_bytes().to_vec();
                bytes.extend_from_slice(bounded(words).as_bytes());
                self.put(code, reply::INFO, &bytes);
            }
        }
    }

    async fn meta_context(&mut self, code: u32, data: &[u8]) -> Result<(), Refusal> {
        let set = code == option::SET_META_CONTEXT;
        if set {
            // "replaces all previously-set metadata contexts (including when this command fails)": the protocol's text of this option.
            self.contexts = None;
        }
        let (name, queries) = parse_queries(data)?;
        if !self.structured {
            return Err((reply::ERR_INVALID, "structured replies have to be negotiated first".to_owned()));
        }
        let export = self.find(name).await?;
        let mut chosen: Vec<MetaContext> = match set || !queries.is_empty() {
            true => queries.iter().filter_map(|query| MetaContext::asked(query, set)).collect(),
            false => vec![MetaContext::Allocation],
        };
        chosen.sort_by_key(|context| context.id());
        chosen.dedup();
        // They would share a number, and a connection compares with one instant only.
        if chosen.iter().filter(|context| matches!(context, MetaContext::Since(_))).count() > 1 {
            return Err((reply::ERR_INVALID, "one instant to compare with, not several".to_owned()));
        }
        if let Some(MetaContext::Since(instant)) = chosen.last() {
            // A client that goes without would take everything for unchanged, or copy all: it is told why.
            can_compare(&export, *instant).await?;
        }
        for context in &chosen {
            // In a list the numbers mean nothing and are 0.
            let mut bytes = if set { context.id() } else { 0 }.to_be_bytes().to_vec();
            bytes.extend_from_slice(context.name().as_bytes());
            self.put(code, reply::META_CONTEXT, &bytes);
        }
        if set {
            self.contexts = Some((name.to_owned(), chosen));
        }
        self.put(code, reply::ACK, &[]);
        Ok(())
    }
}

/// Whether an export can tell what changed since an instant.
async fn can_compare<S: ExportSource + Clone + 'static>(export: &ExportInfo<S>, since: Instant) -> Result<(), Refusal> {
    let key = export.key;
    let asked = export.shard.call(move |source, _| async move {
        match source.export(key) {
            Some(export) => export.changed_since(since).await.map(drop),
            None => Err(Error::NotFound { what: "export", name: key.to_string() }),
        }
    });
    match asked.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err((reply::ERR_INVALID, error.to_string())),
        Err(ShardGone) => Err((reply::ERR_SHUTDOWN, ShardGone.to_string())),
    }
}

fn starttls(encryption: Encryption, data: &[u8]) -> Result<(), Refusal> {
    empty(data)?;
    match encryption {
        Encryption::Required => Ok(()),
        Encryption::None => Err((reply::ERR_POLICY, "TLS is not configured here".to_owned())),
        Encryption::Done => Err((reply::ERR_INVALID, "this connection is encrypted already".to_owned())),
    }
}

/// Takes a seat at the export, on its shard.
async fn claim<S: ExportSource + Clone + 'static>(export: &ExportInfo<S>) -> Result<ExportClaim<S>, Refusal> {
    match export.shard.open_export(export.key).await {
        Ok(Ok(claim)) => Ok(claim),
        Ok(Err(error @ Error::NotFound { .. })) => Err((reply::ERR_UNKNOWN, error.to_string())),
        Ok(Err(error @ Error::Gone(_))) => Err((reply::ERR_SHUTDOWN, error.to_string())),
        Ok(Err(error)) => Err((reply::ERR_POLICY, error.to_string())),
        Err(ShardGone) => Err((reply::ERR_SHUTDOWN, ShardGone.to_string())),
    }
}

fn empty(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() {
        Ok(())
    } else {
        Err((reply::ERR_INVALID, format!("{} bytes of data with an option that takes none", data.len())))
    }
}

fn name_of(bytes: &[u8]) -> Result<&str, Refusal> {
    if bytes.len() > STRING_MAX {
        return Err((reply::ERR_TOO_BIG, format!("a name of {} bytes, at most {STRING_MAX} are allowed", bytes.len())));
    }
    std::str::from_utf8(bytes).map_err(|_| (reply::ERR_INVALID, "the name is not UTF-8".to_owned()))
}

/// Cuts the next `len` bytes off.
fn take<'a>(data: &mut &'a [u8], len: usize) -> Result<&'a [u8], Refusal> {
    match data.split_at_checked(len) {
        Some((head, rest)) => {
            *data = rest;
            Ok(head)
        }
        None => Err((reply::ERR_INVALID, format!("the option ends {} bytes too early", len - data.len()))),
    }
}

fn take_u32(data: &mut &[u8]) -> Result<usize, Refusal> {
    let bytes = take(data, 4)?;
    Ok(u32::from_be_bytes(bytes.try_into().expect("four bytes")) as usize)
}

/// INFO and GO: a name, then the kinds of information that are wished for.
fn parse_info(mut data: &[u8]) -> Result<(&str, Vec<u16>), Refusal> {
    let len = take_u32(&mut data)?;
    let name = take(&mut data, len)?;
    let count = take(&mut data, 2)?;
    let count = usize::from(u16::from_be_bytes([count[0], count[1]]));
    let kinds = take(&mut data, count * 2)?;
    empty(data)?;
    Ok((name_of(name)?, kinds.chunks_exact(2).map(|kind| u16::from_be_bytes([kind[0], kind[1]])).collect()))
}

/// LIST_META_CONTEXT and SET_META_CONTEXT: a name, then queries.
fn parse_queries(mut data: &[u8]) -> Result<(&str, Vec<&str>), Refusal> {
    let len = take_u32(&mut data)?;
    let name = take(&mut data, len)?;
    let count = take_u32(&mut data)?;
    let mut queries = vec![];
    for _ in 0..count {
        let len = take_u32(&mut data)?;
        queries.push(name_of(take(&mut data, len)?)?);
    }
    empty(data)?;
    Ok((name_of(name)?, queries))
}

/// The longest start of `words` that the protocol carries.
fn bounded(words: &str) -> &str {
    let mut end = words.len().min(STRING_MAX);
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    &words[..end]
}

fn broken(words: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}
