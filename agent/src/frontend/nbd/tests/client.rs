//! A small synchronous client that can also say what a client must not.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::super::wire::{self, chunk, option, reply};

pub struct Client {
    pub stream: UnixStream,
    pub structured: bool,
    pub size: u64,
    pub flags: u16,
    cookie: u64,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Ok,
    Data(Vec<u8>),
    Extents(Vec<(u32, u32)>),
    Error(u32, String),
}

impl Client {
    /// Greets, and says nothing more.
    pub fn greet(path: &std::path::Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        let mut words = [0; 18];
        stream.read_exact(&mut words)?;
        assert_eq!(words[..16], *b"NBDMAGICIHAVEOPT");
        assert_eq!(words[16..], [0, 3]);
        stream.write_all(&3_u32.to_be_bytes())?;
        Ok(Self { stream, structured: false, size: 0, flags: 0, cookie: 0 })
    }

    /// Opens an export, with structured replies and block status or without.
    pub fn open(path: &std::path::Path, export: &str, structured: bool) -> io::Result<Self> {
        let mut client = Self::greet(path)?;
        if structured {
            assert_eq!(client.option(option::STRUCTURED_REPLY, &[])?, [(reply::ACK, vec![])]);
            let answers = client.option(option::SET_META_CONTEXT, &queries(export, &["base:allocation"]))?;
            assert_eq!(answers[0], (reply::META_CONTEXT, [&1_u32.to_be_bytes()[..], b"base:allocation"].concat()));
            client.structured = true;
        }
        client.go(export)?;
        Ok(client)
    }

    /// GO, remembering size and flags.
    pub fn go(&mut self, export: &str) -> io::Result<()> {
        let answers = self.option(option::GO, &info(export, &[]))?;
        let last = answers.last().expect("an answer");
        if last.0 != reply::ACK {
            return Err(io::Error::other(format!("{:#x} {}", last.0, String::from_utf8_lossy(&last.1))));
        }
        let export = &answers[0].1;
        assert_eq!((answers[0].0, export.len(), &export[..2]), (reply::INFO, 12, &[0, 0][..]));
        self.size = u64::from_be_bytes(export[2..10].try_into().unwrap());
        self.flags = u16::from_be_bytes(export[10..].try_into().unwrap());
        Ok(())
    }

    pub fn send_option(&mut self, code: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes)
    }

    /// Sends an option and takes its replies, up to the acknowledgement or the error.
    pub fn option(&mut self, code: u32, data: &[u8]) -> io::Result<Vec<(u32, Vec<u8>)>> {
        self.send_option(code, data)?;
        let mut answers = vec![];
        loop {
            let mut head = [0; 20];
            self.stream.read_exact(&mut head)?;
            assert_eq!(head[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
            assert_eq!(head[8..12], code.to_be_bytes());
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            self.stream.read_exact(&mut data)?;
            answers.push((kind, data));
            if kind == reply::ACK || kind >> 31 == 1 {
                return Ok(answers);
            }
        }
    }

    /// Sends a request; answers its cookie.
    pub fn send(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<u64> {
        self.cookie += 1;
        let mut bytes = request(command, flags, self.cookie, offset, len);
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes)?;
        Ok(self.cookie)
    }

    /// Takes one reply, to whichever request; `len` tells how long the data of a read is.
    pub fn receive(&mut self, len: impl Fn(u64) -> Option<u32>) -> io::Result<(u64, Answer)> {
        let mut magic = [0; 4];
        self.stream.read_exact(&mut magic)?;
        match u32::from_be_bytes(magic) {
            wire::SIMPLE_REPLY_MAGIC => {
                let mut rest = [0; 12];
                self.stream.read_exact(&mut rest)?;
                let errno = u32::from_be_bytes(rest[..4].try_into().unwrap());
                let cookie = u64::from_be_bytes(rest[4..].try_into().unwrap());
                Ok((
                    cookie,
                    match (errno, len(cookie)) {
                        (0, Some(len)) => {
                            assert!(!self.structured, "a read wants a structured reply once they are negotiated");
                            Answer::Data(self.take(len as usize)?)
                        }
                        (0, None) => Answer::Ok,
                        (errno, _) => Answer::Error(errno, String::new()),
                    },
                ))
            }
            wire::CHUNK_MAGIC => {
                assert!(self.structured);
                let mut rest = [0; 16];
                self.stream.read_exact(&mut rest)?;
                assert_eq!(rest[..2], [0, 1], "one chunk is all");
                let cookie = u64::from_be_bytes(rest[4..12].try_into().unwrap());
                let data = self.take(u32::from_be_bytes(rest[12..].try_into().unwrap()) as usize)?;
                let u32_at = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().unwrap());
                Ok((
                    cookie,
                    match u16::from_be_bytes(rest[2..4].try_into().unwrap()) {
                        chunk::OFFSET_DATA => Answer::Data(data[8..].to_vec()),
                        chunk::BLOCK_STATUS => {
                            assert_eq!(u32_at(0), 1);
                            Answer::Extents((4..data.len()).step_by(8).map(|at| (u32_at(at), u32_at(at + 4))).collect())
                        }
                        chunk::ERROR => {
                            assert_eq!(usize::from(u16::from_be_bytes(data[4..6].try_into().unwrap())), data.len() - 6);
                            Answer::Error(u32_at(0), String::from_utf8(data[6..].to_vec()).unwrap())
                        }
                        kind => panic!("chunk of kind {kind}"),
                    },
                ))
            }
            magic => panic!("reply magic {magic:#x}"),
        }
    }

    /// Takes the structured answer to a read, in however many chunks it comes: their number, and the data or the error. Data are written over `into`.
    pub fn receive_chunks(&mut self, offset: u64, into: &mut [u8]) -> io::Result<(u32, Answer)> {
        let mut chunks = 0;
        loop {
            let head = self.take(20)?;
            assert_eq!(head[..4], wire::CHUNK_MAGIC.to_be_bytes());
            let u16_at = |at: usize| u16::from_be_bytes(head[at..at + 2].try_into().unwrap());
            let (flags, kind) = (u16_at(4), u16_at(6));
            let data = self.take(u32::from_be_bytes(head[16..].try_into().unwrap()) as usize)?;
            chunks += 1;
            match kind {
                chunk::OFFSET_DATA => {
                    let at = (u64::from_be_bytes(data[..8].try_into().unwrap()) - offset) as usize;
                    into[at..at + data.len() - 8].copy_from_slice(&data[8..]);
                }
                chunk::ERROR => {
                    assert_eq!(flags, chunk::FLAG_DONE, "nothing follows an error");
                    let errno = u32::from_be_bytes(data[..4].try_into().unwrap());
                    return Ok((chunks, Answer::Error(errno, String::from_utf8(data[6..].to_vec()).unwrap())));
                }
                kind => panic!("chunk of kind {kind}"),
            }
            if flags & chunk::FLAG_DONE != 0 {
                return Ok((chunks, Answer::Ok));
            }
        }
    }

    fn take(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// One request, one answer.
    pub fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<Answer> {
        let cookie = self.send(command, flags, offset, len, payload)?;
        let (answered, answer) = self.receive(|_| (command == wire::command::READ).then_some(len))?;
        assert_eq!(answered, cookie);
        Ok(answer)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<Answer> {
        self.ask(wire::command::WRITE, 0, offset, data.len() as u32, data)
    }

    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Answer> {
        self.ask(wire::command::READ, 0, offset, len, &[])
    }

    /// Whether the server has closed: nothing more to read, or a reset.
    pub fn hears_the_end(mut self) -> bool {
        let mut rest = vec![];
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => rest.is_empty(),
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

/// The data of INFO and GO.
pub fn info(export: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&(kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// Reproducible bytes.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}
