//! A small NBD client for `export`: one export, read only, structured replies, one metadata context, several reads under way.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::nbd::Export;

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;

const CMD_READ: u16 = 0;
const CMD_DISCONNECT: u16 = 2;
const CMD_BLOCK_STATUS: u16 = 7;

const CHUNK_DONE: u16 = 1;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_OFFSET_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;

/// Longest answer to an option, and longest chunk, that is read.
const OPTION_ANSWER_MAX: u32 = 64 << 10;
const CHUNK_MAX: u32 = 40 << 20;
/// Bytes of one read.
pub const READ_BYTES: u32 = 1 << 20;
/// Reads under way at a time.
const READS: usize = 8;
/// A server that says nothing for this long is gone.
const PATIENCE: Duration = Duration::from_secs(120);

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection to an export.
pub struct Client {
    stream: Box<dyn Stream>,
    /// Bytes of the export.
    pub size: u64,
    cookie: u64,
}

/// What came in answer to a request.
enum Chunk {
    /// Bytes at an offset.
    Data(u64, Vec<u8>),
    /// Zeroes at an offset.
    Hole(u64, u32),
    /// Lengths and flags.
    Status(Vec<(u32, u32)>),
    /// Nothing but the end.
    End,
}

impl Client {
    /// Connects to an export; `context` is the one metadata context that [`Self::status`] will ask about.
    pub fn connect(export: &Export, context: &str) -> io::Result<Self> {
        let (name, stream): (&str, Box<dyn Stream>) = match export {
            Export { name, server: crate::nbd::Server::Unix { socket } } => {
                let stream = UnixStream::connect(socket)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                (name, Box::new(stream))
            }
            Export { name, server: crate::nbd::Server::Tcp { host, port, tls: false } } => {
                let stream = TcpStream::connect((host.as_str(), *port))?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                (name, Box::new(stream))
            }
            Export { server: crate::nbd::Server::Tcp { tls: true, .. }, .. } => {
                let words =
                    "export does not speak TLS yet: run it on the agent's host, or use nbdcopy on the view's URI";
                return Err(io::Error::new(io::ErrorKind::Unsupported, words));
            }
        };
        let mut client = Self { stream, size: 0, cookie: 0 };
        client.negotiate(name, context)?;
        Ok(client)
    }

    fn negotiate(&mut self, name: &str, context: &str) -> io::Result<()> {
        if self.u64()? != MAGIC || self.u64()? != OPTION_MAGIC {
            return Err(broken("this is no NBD server"));
        }
        let flags = self.u16()?;
        if flags & 1 == 0 {
            return Err(broken("the server does not speak fixed newstyle"));
        }
        self.stream.write_all(&u32::from(flags & 3).to_be_bytes())?;
        self.option(OPT_STRUCTURED_REPLY, &[])?;
        let mut data = text(name);
        data.extend(1u32.to_be_bytes());
        data.extend(text(context));
        let answers = self.option(OPT_SET_META_CONTEXT, &data)?;
        if !answers.iter().any(|(kind, _)| *kind == REP_META_CONTEXT) {
            return Err(broken(&format!("the server does not know {context}")));
        }
        let mut data = text(name);
        data.extend(0u16.to_be_bytes());
        for (kind, answer) in self.option(OPT_GO, &data)? {
            if kind == REP_INFO && answer.len() >= 10 && answer[..2] == [0, 0] {
                self.size = u64::from_be_bytes(answer[2..10].try_into().expect("eight bytes"));
            }
        }
        Ok(())
    }

    /// Sends an option and takes its answers up to the last.
    fn option(&mut self, code: u32, data: &[u8]) -> io::Result<Vec<(u32, Vec<u8>)>> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(code.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes)?;
        let mut answers = Vec::new();
        loop {
            if self.u64()? != OPTION_REPLY_MAGIC || self.u32()? != code {
                return Err(broken("an answer to another option"));
            }
            let (kind, len) = (self.u32()?, self.u32()?);
            if len > OPTION_ANSWER_MAX {
                return Err(broken("an answer that is too long"));
            }
            let answer = self.bytes(len as usize)?;
            match kind {
                REP_ACK => return Ok(answers),
                kind if kind & REP_ERROR != 0 => {
                    return Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()));
                }
                kind => answers.push((kind, answer)),
            }
        }
    }

    fn request(&mut self, command: u16, offset: u64, len: u32) -> io::Result<u64> {
        self.cookie += 1;
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        self.stream.write_all(&bytes)?;
        Ok(self.cookie)
    }

    /// The next chunk: of which request, what, and whether it is that request's last.
    fn chunk(&mut self) -> io::Result<(u64, Chunk, bool)> {
        match self.u32()? {
            SIMPLE_REPLY_MAGIC => {
                let error = self.u32()?;
                let cookie = self.u64()?;
                if error != 0 {
                    return Err(io::Error::from_raw_os_error(error as i32));
                }
                Ok((cookie, Chunk::End, true))
            }
            CHUNK_MAGIC => {
                let (flags, kind) = (self.u16()?, self.u16()?);
                let (cookie, len) = (self.u64()?, self.u32()?);
                if len > CHUNK_MAX {
                    return Err(broken("a chunk that is too long"));
                }
                let body = self.bytes(len as usize)?;
                let done = flags & CHUNK_DONE != 0;
                let number = |at: usize| body.get(at..at + 4).map(|b| u32::from_be_bytes(b.try_into().expect("four")));
                let place = || body.get(..8).map(|b| u64::from_be_bytes(b.try_into().expect("eight")));
                let chunk = match kind {
                    CHUNK_OFFSET_DATA => place().map(|at| Chunk::Data(at, body[8..].to_vec())),
                    CHUNK_OFFSET_HOLE => place().zip(number(8)).map(|(at, len)| Chunk::Hole(at, len)),
                    CHUNK_BLOCK_STATUS => {
                        let pairs = body.get(4..).unwrap_or_default().chunks_exact(8);
                        let pair = |b: &[u8]| {
                            let word = |at: usize| u32::from_be_bytes(b[at..at + 4].try_into().expect("four"));
                            (word(0), word(4))
                        };
                        Some(Chunk::Status(pairs.map(pair).collect()))
                    }
                    kind if kind & CHUNK_ERROR != 0 => {
                        let words = String::from_utf8_lossy(body.get(6..).unwrap_or_default()).into_owned();
                        let errno = number(0).unwrap_or(5);
                        return Err(io::Error::other(format!("{words} (errno {errno})")));
                    }
                    _ => Some(Chunk::End),
                };
                Ok((cookie, chunk.ok_or_else(|| broken("a chunk that is too short"))?, done))
            }
            _ => Err(broken("a reply without its magic")),
        }
    }

    /// Extents of the context for which `wanted` holds, of the whole export, in order; neighbours are joined.
    pub fn status(&mut self, wanted: impl Fn(u32) -> bool) -> io::Result<Vec<(u64, u64)>> {
        const STEP: u64 = 1 << 30;
        let mut found: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        while at < self.size {
            let len = (self.size - at).min(STEP);
            let cookie = self.request(CMD_BLOCK_STATUS, at, len as u32)?;
            let start = at;
            loop {
                let (of, chunk, done) = self.chunk()?;
                if of != cookie {
                    return Err(broken("an answer to another request"));
                }
                if let Chunk::Status(pairs) = chunk {
                    for (len, flags) in pairs {
                        let len = u64::from(len).min(self.size - at);
                        match found.last_mut() {
                            _ if !wanted(flags) || len == 0 => {}
                            Some((offset, known)) if *offset + *known == at => *known += len,
                            _ => found.push((at, len)),
                        }
                        at += len;
                    }
                }
                if done {
                    break;
                }
            }
            if at == start {
                return Err(broken("an answer that covers nothing"));
            }
        }
        Ok(found)
    }

    /// Reads extents and hands over what they hold, in pieces and in any order; answers when all are there.
    pub fn read(
        &mut self,
        extents: &[(u64, u64)],
        mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut pieces = extents.iter().flat_map(|(offset, len)| {
            (0..len.div_ceil(u64::from(READ_BYTES))).map(move |i| {
                let at = i * u64::from(READ_BYTES);
                (offset + at, (len - at).min(u64::from(READ_BYTES)) as u32)
            })
        });
        let mut under_way: HashMap<u64, (u64, u32, u32)> = HashMap::new();
        loop {
            while under_way.len() < READS {
                let Some((offset, len)) = pieces.next() else { break };
                let cookie = self.request(CMD_READ, offset, len)?;
                under_way.insert(cookie, (offset, len, 0));
            }
            if under_way.is_empty() {
                return Ok(());
            }
            let (cookie, chunk, done) = self.chunk()?;
            let Some((offset, len, got)) = under_way.get_mut(&cookie) else {
                return Err(broken("an answer to a request that was not made"));
            };
            let inside = |at: u64, n: u64| at >= *offset && at + n <= *offset + u64::from(*len);
            match chunk {
                Chunk::Data(at, bytes) if inside(at, bytes.len() as u64) => {
                    *got += bytes.len() as u32;
                    take(at, &bytes)?;
                }
                Chunk::Hole(at, n) if inside(at, u64::from(n)) => {
                    *got += n;
                    take(at, &vec![0; n as usize])?;
                }
                Chunk::End => {}
                _ => return Err(broken("bytes that were not asked for")),
            }
            if done {
                if got != len {
                    return Err(broken("a read that came short"));
                }
                under_way.remove(&cookie);
            }
        }
    }

    fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.request(CMD_DISCONNECT, 0, 0); // the server may be gone already
    }
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn broken(words: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}
