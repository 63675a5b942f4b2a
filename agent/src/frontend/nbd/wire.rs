//! The NBD protocol's numbers and fixed structures, big-endian as on the wire (the protocol's `doc/proto.md`).

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of the server: "NBDMAGIC".
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second bytes of the server, and first of each option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First bytes of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First bytes of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First bytes of a structured reply chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest string that the protocol allows (names, messages).
pub const STRING_MAX: usize = 4096;

/// Handshake flags, of server and client alike.
pub mod handshake {
    /// Options can be answered with errors.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The reply to EXPORT_NAME has no 124 zero bytes.
    pub const NO_ZEROES: u16 = 2;
}

/// What the server says of an export.
pub mod transmission {
    /// The other bits mean something.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag DF works (structured replies only).
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was acked on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE works.
    pub const SEND_CACHE: u16 = 1 << 10;
}

/// Options of the handshake.
pub mod option {
    /// Choose an export and start, the old way: without an answer.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Go on encrypted.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// A piece of information on an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Not known here.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Not allowed here.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// Not understood.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// Only after STARTTLS.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    const ERROR: u32 = 1 << 31;
}

/// Kinds of [`reply::INFO`].
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Words for people.
    pub const DESCRIPTION: u16 = 2;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Finish and close.
    pub const DISC: u16 = 2;
    /// Make durable what was acked.
    pub const FLUSH: u16 = 3;
    /// A hint that the bytes are not needed.
    pub const TRIM: u16 = 4;
    /// A hint that the bytes will be read.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for metadata.
    pub const BLOCK_STATUS: u16 = 7;

    /// Durable before the reply.
    pub const FLAG_FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: keep the space allocated.
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
    /// READ: answer in one chunk.
    pub const FLAG_DF: u16 = 1 << 2;
    /// BLOCK_STATUS: answer with one extent.
    pub const FLAG_REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fail rather than be slow.
    pub const FLAG_FAST_ZERO: u16 = 1 << 4;
}

/// Structured replies.
pub mod chunk {
    /// The last chunk of its reply.
    pub const FLAG_DONE: u16 = 1;
    /// Bytes read: their offset, then they.
    pub const OFFSET_DATA: u16 = 1;
    /// Metadata.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error: its number, then a message.
    pub const ERROR: u16 = (1 << 15) | 1;
    /// `base:allocation`: nothing is allocated here.
    pub const STATE_HOLE: u32 = 1;
    /// `base:allocation`: reads as zeroes.
    pub const STATE_ZERO: u32 = 2;
    /// `qemu:dirty-bitmap:`: changed.
    pub const STATE_DIRTY: u32 = 1;
}

/// Errors of the transmission phase: the protocol's own numbers (they are Linux's).
pub mod error {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// I/O error.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// Not understood.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server is stopping.
    pub const ESHUTDOWN: u32 = 108;
}

/// Head of an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHead {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// One of [`option`].
    pub option: U32,
    /// Bytes that follow.
    pub len: U32,
}

/// Head of a reply to an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionReplyHead {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// One of [`reply`].
    pub kind: U32,
    /// Bytes that follow.
    pub len: U32,
}

/// A request; the payload of a write follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Request {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// `FLAG_…` of [`command`].
    pub flags: U16,
    /// One of [`command`].
    pub command: U16,
    /// The client's name for the request, given back in the reply.
    pub cookie: U64,
    /// First byte.
    pub offset: U64,
    /// Bytes.
    pub len: U32,
}

/// A simple reply; the bytes of a successful read follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// One of [`error`], or 0.
    pub error: U32,
    /// Of the request.
    pub cookie: U64,
}

/// Head of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkHead {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`chunk::FLAG_DONE`] or 0.
    pub flags: U16,
    /// Kind, one of [`chunk`].
    pub kind: U16,
    /// Of the request.
    pub cookie: U64,
    /// Bytes that follow.
    pub len: U32,
}

const _: () = assert!(size_of::<OptionHead>() == 16 && size_of::<OptionReplyHead>() == 20);
const _: () = assert!(size_of::<Request>() == 28 && size_of::<SimpleReply>() == 16 && size_of::<ChunkHead>() == 20);
