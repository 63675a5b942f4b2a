//! An NBD client: fixed newstyle, simple and structured replies, many requests in flight.
//!
//! Written from the protocol's text alone; it shares no code with the agent. [`Client`] sends one request at a time;
//! [`Client::split`] gives a sending and a receiving half for requests in flight. Every failed command carries the errno.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Read data.
pub const CMD_READ: u16 = 0;
/// Write data.
pub const CMD_WRITE: u16 = 1;
/// Say good-bye.
pub const CMD_DISC: u16 = 2;
/// Make acked writes durable.
pub const CMD_FLUSH: u16 = 3;
/// Discard.
pub const CMD_TRIM: u16 = 4;
/// Prefetch.
pub const CMD_CACHE: u16 = 5;
/// Write zeroes.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Ask for the allocation map.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Command flag: durable when acked.
pub const FLAG_FUA: u16 = 1;
/// Command flag of write zeroes: do not make a hole.
pub const FLAG_NO_HOLE: u16 = 2;

/// Option: choose an export, the old way, without an answer in case of failure.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: end the negotiation.
pub const OPT_ABORT: u32 = 2;
/// Option: list exports.
pub const OPT_LIST: u32 = 3;
/// Option: tell about an export.
pub const OPT_INFO: u32 = 6;
/// Option: choose an export.
pub const OPT_GO: u32 = 7;
/// Option: structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: choose metadata contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;

/// Option reply: done.
pub const REP_ACK: u32 = 1;
/// Option reply: one export.
pub const REP_SERVER: u32 = 2;
/// Option reply: about the export.
pub const REP_INFO: u32 = 3;
/// Option reply: a metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Bit of option replies that are errors.
pub const REP_ERROR: u32 = 1 << 31;

/// Transmission flag: the export is read-only.
pub const TRANSMIT_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: several connections may be used.
pub const TRANSMIT_CAN_MULTI_CONN: u16 = 1 << 8;

const MAGIC_INIT: u64 = 0x4e42_444d_4147_4943;
const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_SIMPLE_REPLY: u32 = 0x6744_6698;
const MAGIC_STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// No reply within this time is a hang, and a failure.
pub const HANG: Duration = Duration::from_secs(60);

/// A command, or the choice of an export, that the server refused.
#[derive(Debug)]
pub enum NbdError {
    /// The socket failed or was closed.
    Io(io::Error),
    /// The server answered with an errno (or with an option error).
    Refused {
        /// errno of a command; the option reply's type, without its error bit, in the handshake.
        code: u32,
        /// The server's words, if it said any.
        message: String,
    },
}

impl NbdError {
    /// The errno, when the server gave one.
    pub fn code(&self) -> Option<u32> {
        match self {
            NbdError::Refused { code, .. } => Some(*code),
            NbdError::Io(_) => None,
        }
    }
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdError::Io(source) => write!(f, "NBD connection: {source}"),
            NbdError::Refused { code, message } => write!(f, "refused with {code}: {message}"),
        }
    }
}

impl std::error::Error for NbdError {}

impl From<io::Error> for NbdError {
    fn from(source: io::Error) -> Self {
        NbdError::Io(source)
    }
}

/// Shorthand.
pub type Result<T, E = NbdError> = std::result::Result<T, E>;

/// A connection in the negotiation phase: bare enough to send what no client should.
#[derive(Debug)]
pub struct Handshake {
    /// The socket.
    pub stream: UnixStream,
}

/// An answer to an option.
#[derive(Debug)]
pub struct OptionReply {
    /// `REP_*`.
    pub kind: u32,
    /// Payload.
    pub data: Vec<u8>,
}

impl Handshake {
    /// Connects and exchanges the greeting flags.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(HANG))?;
        stream.set_write_timeout(Some(HANG))?;
        let magic = read_u64(&mut stream)?;
        let option_magic = read_u64(&mut stream)?;
        if (magic, option_magic) != (MAGIC_INIT, MAGIC_OPTION) {
            return Err(io::Error::other(format!("no NBD greeting: {magic:#x} {option_magic:#x}")).into());
        }
        let flags = read_u16(&mut stream)?;
        stream.write_all(&u32::from(flags & 3).to_be_bytes())?;
        Ok(Self { stream })
    }

    /// Sends one option.
    pub fn send(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut out = Vec::with_capacity(16 + data.len());
        out.extend_from_slice(&MAGIC_OPTION.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&u32::try_from(data.len()).expect("a short option").to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out)?;
        Ok(())
    }

    /// Takes one reply to `option`.
    pub fn reply(&mut self, option: u32) -> Result<OptionReply> {
        let magic = read_u64(&mut self.stream)?;
        let answered = read_u32(&mut self.stream)?;
        if magic != MAGIC_OPTION_REPLY || answered != option {
            return Err(io::Error::other(format!("reply {magic:#x} to option {answered}, expected {option}")).into());
        }
        let kind = read_u32(&mut self.stream)?;
        let len = read_len(&mut self.stream, 1 << 20)?;
        let data = read_vec(&mut self.stream, len)?;
        Ok(OptionReply { kind, data })
    }

    /// Sends an option and takes its replies up to the acknowledgement; an error reply is an error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        self.send(option, data)?;
        let mut replies = Vec::new();
        loop {
            let reply = self.reply(option)?;
            if reply.kind & REP_ERROR != 0 {
                let message = String::from_utf8_lossy(&reply.data).into_owned();
                return Err(NbdError::Refused { code: reply.kind & !REP_ERROR, message });
            }
            if reply.kind == REP_ACK {
                return Ok(replies);
            }
            replies.push(reply);
        }
    }

    /// Names of all exports.
    pub fn list(&mut self) -> Result<Vec<String>> {
        let replies = self.option(OPT_LIST, &[])?;
        Ok(replies
            .iter()
            .filter(|reply| reply.kind == REP_SERVER && reply.data.len() >= 4)
            .map(|reply| {
                let len = u32::from_be_bytes(reply.data[..4].try_into().expect("four bytes")) as usize;
                String::from_utf8_lossy(&reply.data[4..4 + len]).into_owned()
            })
            .collect())
    }

    /// Chooses an export with OPT_GO.
    pub fn go(mut self, export: &str) -> Result<Client> {
        let mut data = Vec::new();
        data.extend_from_slice(&u32::try_from(export.len()).expect("a short name").to_be_bytes());
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&1_u16.to_be_bytes()); // one information request:
        data.extend_from_slice(&3_u16.to_be_bytes()); // block sizes
        let mut client = None;
        let mut block_sizes = None;
        for reply in self.option(OPT_GO, &data)? {
            match (reply.kind, reply.data.get(..2), reply.data.len()) {
                (REP_INFO, Some([0, 0]), 12) => {
                    let size = u64::from_be_bytes(reply.data[2..10].try_into().expect("eight bytes"));
                    let flags = u16::from_be_bytes(reply.data[10..12].try_into().expect("two bytes"));
                    client = Some((size, flags));
                }
                (REP_INFO, Some([0, 3]), 14) => {
                    let word = |at: usize| u32::from_be_bytes(reply.data[at..at + 4].try_into().expect("four bytes"));
                    block_sizes = Some((word(2), word(6), word(10)));
                }
                _ => {}
            }
        }
        let Some((size, flags)) = client else {
            return Err(io::Error::other("the server told no export size").into());
        };
        Ok(Client {
            sender: Sender { stream: self.stream.try_clone()?, cookie_last: 0, reads: Arc::default() },
            stream: self.stream,
            size,
            flags,
            block_sizes,
        })
    }
}

/// What to do at an offset.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// `CMD_*`.
    pub command: u16,
    /// `FLAG_*`.
    pub flags: u16,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// A reply to one request.
#[derive(Debug)]
pub struct Reply {
    /// Cookie of the request.
    pub cookie: u64,
    /// errno; 0 is success.
    pub error: u32,
    /// The server's words to an error.
    pub message: String,
    /// Data of a read.
    pub data: Vec<u8>,
    /// Extents of a block status: length and flags (1: hole, 2: reads as zeroes).
    pub extents: Vec<(u32, u32)>,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    sender: Sender,
    /// Bytes of the export.
    pub size: u64,
    /// `TRANSMIT_*`.
    pub flags: u16,
    /// Least, preferred and largest block size, if the server told.
    pub block_sizes: Option<(u32, u32, u32)>,
}

/// Offset and length of the reads in flight, by cookie: a simple reply tells neither.
type Reads = HashMap<u64, (u64, u32)>;

/// The sending half.
#[derive(Debug)]
pub struct Sender {
    stream: UnixStream,
    cookie_last: u64,
    reads: Arc<Mutex<Reads>>,
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    stream: io::BufReader<UnixStream>,
    reads: Arc<Mutex<Reads>>,
}

impl Client {
    /// Connects with simple replies.
    pub fn connect(socket: &Path, export: &str) -> Result<Self> {
        Handshake::connect(socket)?.go(export)
    }

    /// Connects with structured replies and the allocation map.
    pub fn connect_structured(socket: &Path, export: &str) -> Result<Self> {
        let mut handshake = Handshake::connect(socket)?;
        handshake.option(OPT_STRUCTURED_REPLY, &[])?;
        let context = b"base:allocation";
        let mut data = Vec::new();
        data.extend_from_slice(&u32::try_from(export.len()).expect("a short name").to_be_bytes());
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&1_u32.to_be_bytes());
        data.extend_from_slice(&u32::try_from(context.len()).expect("short").to_be_bytes());
        data.extend_from_slice(context);
        let contexts = handshake.option(OPT_SET_META_CONTEXT, &data)?;
        if !contexts.iter().any(|reply| reply.kind == REP_META_CONTEXT && reply.data.ends_with(context)) {
            return Err(io::Error::other("no base:allocation").into());
        }
        handshake.go(export)
    }

    /// A sending and a receiving half, for two threads.
    pub fn split(self) -> (Sender, Receiver) {
        let reads = Arc::clone(&self.sender.reads);
        (self.sender, Receiver { stream: io::BufReader::with_capacity(1 << 16, self.stream), reads })
    }

    /// Sends `request` (and `data`) and waits for the answer.
    pub fn call(&mut self, request: Request, data: &[u8]) -> Result<Reply> {
        let cookie = self.sender.send(request, data)?;
        let reply = receive(&mut self.stream, &self.sender.reads)?;
        if reply.cookie != cookie {
            return Err(io::Error::other(format!("reply to {}, expected {cookie}", reply.cookie)).into());
        }
        if reply.error != 0 {
            return Err(NbdError::Refused { code: reply.error, message: reply.message });
        }
        Ok(reply)
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        self.call(Request { command: CMD_READ, flags: 0, offset, len }, &[]).map(|reply| reply.data)
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len()).expect("a request of less than 4 GiB");
        self.call(Request { command: CMD_WRITE, flags: 0, offset, len }, data).map(drop)
    }

    /// Writes, durable when acked.
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len()).expect("a request of less than 4 GiB");
        self.call(Request { command: CMD_WRITE, flags: FLAG_FUA, offset, len }, data).map(drop)
    }

    /// Writes zeroes.
    pub fn write_zeroes(&mut self, offset: u64, len: u32, flags: u16) -> Result<()> {
        self.call(Request { command: CMD_WRITE_ZEROES, flags, offset, len }, &[]).map(drop)
    }

    /// Discards.
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<()> {
        self.call(Request { command: CMD_TRIM, flags: 0, offset, len }, &[]).map(drop)
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<()> {
        self.call(Request { command: CMD_FLUSH, flags: 0, offset: 0, len: 0 }, &[]).map(drop)
    }

    /// The allocation map of a range: length and flags (1: hole, 2: reads as zeroes).
    pub fn block_status(&mut self, offset: u64, len: u32) -> Result<Vec<(u32, u32)>> {
        self.call(Request { command: CMD_BLOCK_STATUS, flags: 0, offset, len }, &[]).map(|reply| reply.extents)
    }

    /// The whole export.
    pub fn read_all(&mut self) -> Result<Vec<u8>> {
        let mut image = Vec::with_capacity(usize::try_from(self.size).expect("fits memory"));
        while (image.len() as u64) < self.size {
            let len = (self.size - image.len() as u64).min(1 << 20);
            image.extend_from_slice(&self.read(image.len() as u64, u32::try_from(len).expect("1 MiB"))?);
        }
        Ok(image)
    }

    /// Says good-bye, and waits until the server has let go: from then on it does not count as a client.
    pub fn close(mut self) {
        // The server may be gone already; there is nobody left to tell.
        let _ = self.sender.send(Request { command: CMD_DISC, flags: 0, offset: 0, len: 0 }, &[]);
        let _ = std::io::copy(&mut self.stream, &mut std::io::sink());
    }

    /// The socket, to send what no client should.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

impl Sender {
    /// Sends one request and returns its cookie.
    pub fn send(&mut self, request: Request, data: &[u8]) -> Result<u64> {
        self.cookie_last += 1;
        let cookie = self.cookie_last;
        if request.command == CMD_READ {
            self.reads.lock().expect("no panic under this lock").insert(cookie, (request.offset, request.len));
        }
        let mut out = Vec::with_capacity(28 + data.len());
        out.extend_from_slice(&encode(request, cookie));
        out.extend_from_slice(data);
        self.stream.write_all(&out)?;
        Ok(cookie)
    }

    /// The cookie that the next request gets.
    pub fn next_cookie(&self) -> u64 {
        self.cookie_last + 1
    }

    /// Closes the connection in both directions: the other half sees the end of it.
    pub fn hang_up(&self) {
        // An already closed socket is what is wanted.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Receiver {
    /// Takes the next reply.
    pub fn receive(&mut self) -> Result<Reply> {
        receive(&mut self.stream, &self.reads)
    }
}

/// The 28 bytes of a request.
pub fn encode(request: Request, cookie: u64) -> [u8; 28] {
    let mut out = [0; 28];
    out[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
    out[4..6].copy_from_slice(&request.flags.to_be_bytes());
    out[6..8].copy_from_slice(&request.command.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&request.offset.to_be_bytes());
    out[24..].copy_from_slice(&request.len.to_be_bytes());
    out
}

fn receive(stream: &mut impl Read, reads: &Mutex<Reads>) -> Result<Reply> {
    let mut reply = Reply { cookie: 0, error: 0, message: String::new(), data: Vec::new(), extents: Vec::new() };
    let mut covered = 0;
    loop {
        match read_u32(stream)? {
            MAGIC_SIMPLE_REPLY => {
                reply.error = read_u32(stream)?;
                reply.cookie = read_u64(stream)?;
                let read = reads.lock().expect("no panic under this lock").remove(&reply.cookie);
                let len = read.map_or(0, |(_, len)| len);
                if reply.error == 0 && len > 0 {
                    reply.data = read_vec(stream, len as usize)?;
                }
                return Ok(reply);
            }
            MAGIC_STRUCTURED_REPLY => {
                let flags = read_u16(stream)?;
                let kind = read_u16(stream)?;
                reply.cookie = read_u64(stream)?;
                let len = read_len(stream, 64 << 20)?;
                let payload = read_vec(stream, len)?;
                let read = reads.lock().expect("no panic under this lock").get(&reply.cookie).copied();
                covered += take_chunk(&mut reply, kind, &payload, read)?;
                if flags & 1 != 0 {
                    reads.lock().expect("no panic under this lock").remove(&reply.cookie);
                    if reply.error == 0 && read.is_some_and(|(_, len)| u64::from(len) != covered) {
                        return Err(io::Error::other("a read reply of another length").into());
                    }
                    return Ok(reply);
                }
            }
            other => return Err(io::Error::other(format!("bad reply magic {other:#x}")).into()),
        }
    }
}

/// One chunk of a structured reply to a read at `read`; chunks may come in any order. Returns the bytes that it covered.
fn take_chunk(reply: &mut Reply, kind: u16, payload: &[u8], read: Option<(u64, u32)>) -> Result<u64> {
    let word = |at: usize| payload.get(at..at + 4).map(|bytes| u32::from_be_bytes(bytes.try_into().expect("4 bytes")));
    let wrong = || NbdError::from(io::Error::other("a chunk that does not fit the request"));
    match kind {
        0 => Ok(0),
        1 | 2 => {
            let (start, len) = read.ok_or_else(wrong)?;
            let offset = payload.get(..8).ok_or_else(wrong)?;
            let offset = u64::from_be_bytes(offset.try_into().expect("8 bytes"));
            let zeroes;
            let bytes = if kind == 1 {
                &payload[8..]
            } else {
                zeroes = vec![0; word(8).ok_or_else(wrong)?.min(len) as usize];
                &zeroes[..]
            };
            reply.data.resize(len as usize, 0);
            let at = offset.checked_sub(start).and_then(|at| usize::try_from(at).ok()).ok_or_else(wrong)?;
            reply.data.get_mut(at..at + bytes.len()).ok_or_else(wrong)?.copy_from_slice(bytes);
            Ok(bytes.len() as u64)
        }
        5 => {
            for at in (4..payload.len()).step_by(8) {
                reply.extents.push((word(at).ok_or_else(wrong)?, word(at + 4).ok_or_else(wrong)?));
            }
            Ok(0)
        }
        kind if kind & (1 << 15) != 0 => {
            reply.error = word(0).ok_or_else(wrong)?;
            reply.message = String::from_utf8_lossy(payload.get(6..).unwrap_or_default()).into_owned();
            Ok(0)
        }
        kind => Err(io::Error::other(format!("unknown chunk {kind}")).into()),
    }
}

fn read_vec(stream: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut out = vec![0; len];
    stream.read_exact(&mut out)?;
    Ok(out)
}

fn read_len(stream: &mut impl Read, bound: u32) -> io::Result<usize> {
    let len = read_u32(stream)?;
    if len > bound {
        return Err(io::Error::other(format!("a payload of {len} bytes")));
    }
    Ok(len as usize)
}

fn read_u16(stream: &mut impl Read) -> io::Result<u16> {
    let mut out = [0; 2];
    stream.read_exact(&mut out)?;
    Ok(u16::from_be_bytes(out))
}

fn read_u32(stream: &mut impl Read) -> io::Result<u32> {
    let mut out = [0; 4];
    stream.read_exact(&mut out)?;
    Ok(u32::from_be_bytes(out))
}

fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    let mut out = [0; 8];
    stream.read_exact(&mut out)?;
    Ok(u64::from_be_bytes(out))
}
