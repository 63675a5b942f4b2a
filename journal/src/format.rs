//! On-disk format 1: every byte that the engine writes to a CDP disk, as types, sizes pinned at compile time.
//!
//! `docs/format.md` is the same as tables. All integers are little-endian. All checksums are CRC-32 (IEEE 802.3, reflected,
//! polynomial 0xEDB88320, as zlib computes it). Unknown versions are refused.
//!
//! ```text
//! 0        superblock A      64 KiB  superblock B
//! 128 KiB  clock A          192 KiB  clock B
//! 256 KiB  segment table A, then (aligned to 64 KiB) segment table B, then (aligned to 1 MiB) the segments
//! segment: header (4 KiB) | frames … | index pages | footer (last 4 KiB), the last two when full
//! frame:   header, descriptors, padding to 4 KiB | payload blocks of 4 KiB
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::types::BLOCK;

/// Version of everything in this module.
pub const VERSION: u16 = 1;
/// Offset of superblock A.
pub const SUPERBLOCK_A: u64 = 0;
/// Offset of superblock B.
pub const SUPERBLOCK_B: u64 = 64 << 10;
/// Offset of clock page A.
pub const CLOCK_A: u64 = 128 << 10;
/// Offset of clock page B.
pub const CLOCK_B: u64 = 192 << 10;
/// Offset of segment table A.
pub const TABLE_A: u64 = 256 << 10;
/// Least and most bytes of a segment.
pub const SEGMENT_MIN: u64 = 1 << 20;
/// See [`SEGMENT_MIN`].
pub const SEGMENT_MAX: u64 = 256 << 20;

/// CRC-32 (IEEE) of some bytes.
pub fn crc(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// CRC-32 of 4096 zero bytes.
pub fn crc_of_zero_block() -> u32 {
    crc(&[0u8; BLOCK as usize])
}

/// First structure of a CDP disk; A and B hold the same but for `generation`, the newer valid one counts.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Superblock {
    /// [`Superblock::MAGIC`]
    pub magic: [u8; 8], //   0
    /// CRC-32 of bytes 12..128.
    pub crc: U32, //   8
    /// [`VERSION`]
    pub version: U16, //  12
    /// Unknown bits: do not open.
    pub flags: U16, //  14
    /// Id of the disk.
    pub disk_id: [u8; 16], //  16
    /// Raised with each rewrite.
    pub generation: U64, //  32
    /// Bytes of the disk that are used.
    pub disk_size: U64, //  40
    /// Bytes of a segment, a power of two.
    pub segment_size: U64, //  48
    /// Number of segments.
    pub segments: U64, //  56
    /// Offset of table A.
    pub table_a: U64, //  64
    /// Offset of table B.
    pub table_b: U64, //  72
    /// Offset of segment 0.
    pub segments_at: U64, //  80
    /// Wall clock at init, nanoseconds.
    pub created_ns: U64, //  88
    /// Zero.
    pub reserved: [u8; 32], //  96
}
const _: () = assert!(size_of::<Superblock>() == 128);
impl Superblock {
    /// "CDPDISK\x01"
    pub const MAGIC: [u8; 8] = *b"CDPDISK\x01";
}

/// The clock's high-water mark on this disk (A/B, the newer valid one counts).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ClockPage {
    /// [`ClockPage::MAGIC`]
    pub magic: [u8; 8], //  0
    /// CRC-32 of bytes 12..48.
    pub crc: U32, //  8
    /// [`VERSION`]
    pub version: U16, // 12
    /// Zero.
    pub flags: U16, // 14
    /// Id of the disk.
    pub disk_id: [u8; 16], // 16
    /// Raised with each rewrite.
    pub generation: U64, // 32
    /// No instant at or past this was given out before it was raised.
    pub high_water: U64, // 40
}
const _: () = assert!(size_of::<ClockPage>() == 48);
impl ClockPage {
    /// "CDPCLOCK"
    pub const MAGIC: [u8; 8] = *b"CDPCLOCK";
}

/// Head of a 4 KiB page of the segment table. Page `i` describes segments `i * 63 ..`. Each page lives at the same place in table A and B;
/// the valid copy with the higher generation counts.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct TablePageHeader {
    /// [`TablePageHeader::MAGIC`]
    pub magic: [u8; 8], //  0
    /// CRC-32 of bytes 12..4096 of the page.
    pub crc: U32, //  8
    /// [`VERSION`]
    pub version: U16, // 12
    /// Zero.
    pub flags: U16, // 14
    /// Id of the disk.
    pub disk_id: [u8; 16], // 16
    /// Number of the page.
    pub page: U64, // 32
    /// Raised with each rewrite of this page.
    pub generation: U64, // 40
    /// Zero.
    pub reserved: [u8; 16], // 48
}
const _: () = assert!(size_of::<TablePageHeader>() == 64);
impl TablePageHeader {
    /// "CDPTABLE"
    pub const MAGIC: [u8; 8] = *b"CDPTABLE";
    /// Entries of a page.
    pub const ENTRIES: u64 = 63;
}

/// One segment's owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct TableEntry {
    /// 0 free, 1 owned.
    pub state: u8, //  0
    /// [`StreamKind`] of the owner.
    pub kind: u8, //  1
    /// Zero.
    pub reserved: [u8; 2], //  2
    /// Number of the segment in its log and kind, from 0.
    pub number: U32, //  4
    /// Owner.
    pub volume_id: [u8; 16], //  8
    /// Seq of the log.
    pub log_seq: U64, // 24
    /// Random id of the log.
    pub log_id: U64, // 32
    /// Raised each time that the segment is given out.
    pub lap: U64, // 40
    /// Zero.
    pub reserved2: [u8; 16], // 48
}
const _: () = assert!(size_of::<TableEntry>() == 64);

/// The two kinds of segments of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum StreamKind {
    /// Writes, markers, control records.
    Writes = 1,
    /// Before-images.
    Before = 2,
}
impl StreamKind {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Writes),
            2 => Some(Self::Before),
            _ => None,
        }
    }
}

/// First 4 KiB of a segment (the rest of the block is zero).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SegmentHeader {
    /// [`SegmentHeader::MAGIC`]
    pub magic: [u8; 8], //   0
    /// CRC-32 of bytes 12..128.
    pub crc: U32, //   8
    /// [`VERSION`]
    pub version: U16, //  12
    /// Zero.
    pub flags: U16, //  14
    /// Id of the disk.
    pub disk_id: [u8; 16], //  16
    /// Owner.
    pub volume_id: [u8; 16], //  32
    /// Random id of the log.
    pub log_id: U64, //  48
    /// Seq of the log.
    pub log_seq: U64, //  56
    /// The segment's number on the disk: exposes a misdirected write.
    pub segment: U32, //  64
    /// Number in its log and kind.
    pub number: U32, //  68
    /// As in the table.
    pub lap: U64, //  72
    /// Number of the first frame here; frames of earlier segments at or past it are cut off.
    pub frame_first: U64, //  80
    /// [`FrameHeader::crc`] of the frame before it.
    pub previous_crc: U32, //  88
    /// [`StreamKind`]
    pub kind: u8, //  92
    /// Zero.
    pub reserved: [u8; 35], //  93
}
const _: () = assert!(size_of::<SegmentHeader>() == 128);
impl SegmentHeader {
    /// "CDPSEGMT"
    pub const MAGIC: [u8; 8] = *b"CDPSEGMT";
}

/// Head of a frame, at a 4 KiB boundary of a segment. Descriptors follow at once; `header_blocks` blocks in all, then the payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct FrameHeader {
    /// [`FrameHeader::MAGIC`]
    pub magic: U32, //   0
    /// CRC-32 of bytes 8.. of the header and all descriptor bytes (not of the padding). Payload is covered by the checksums in the descriptors.
    pub crc: U32, //   4
    /// Random id of the log.
    pub log_id: U64, //   8
    /// Number of the frame in its log and kind, from 0.
    pub number: U64, //  16
    /// `crc` of the frame before it in this log and kind (the first: of the last frame of the same kind in the log before, else 0).
    pub previous_crc: U32, //  24
    /// Bytes of descriptors.
    pub descriptor_bytes: U32, //  28
    /// Blocks of header and descriptors.
    pub header_blocks: U16, //  32
    /// Zero.
    pub flags: U16, //  34
    /// Blocks of payload.
    pub payload_blocks: U32, //  36
    /// Number of the segment on the disk.
    pub segment: U32, //  40
    /// Block of the frame within the segment.
    pub block: U32, //  44
    /// Newest instant in this and all earlier frames of the volume.
    pub instant_last: U64, //  48
    /// Durable point: every write at or before it was known to be durable in the journal.
    pub durable: U64, //  56
    /// Destage watermark: every write at or before it is durable on the primary.
    pub watermark: U64, //  64
    /// Frames of this log and kind with a number below this were known to be durable.
    pub durable_frames: U64, //  72
    /// The same of the log's other kind: so that a missing tail of one stream is convicted by the other.
    pub durable_frames_other: U64, //  80
    /// Lap of the segment, as in the table: exposes what is left of its last life, also where that was in the same log.
    pub lap: U64, //  88
}
const _: () = assert!(size_of::<FrameHeader>() == 96);
impl FrameHeader {
    /// "CDPF"
    pub const MAGIC: u32 = u32::from_le_bytes(*b"CDPF");
    /// Most blocks of header and descriptors.
    pub const HEADER_BLOCKS_MAX: u16 = 64;
}

/// Kinds of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DescriptorKind {
    /// Guest data. Payload: the blocks it touches, whole; sectors outside it are zero.
    Write = 1,
    /// Guest zeroes; no payload.
    Zero = 2,
    /// Guest discard: a hint.
    Discard = 3,
    /// Before-images with data; payload.
    BeforeData = 4,
    /// Before-images that are all zero; no payload.
    BeforeZero = 5,
    /// Before-images that could not be read.
    BeforeUnreadable = 6,
    /// A guest flush.
    FlushPoint = 7,
    /// A marker; `extra` = name.
    Marker = 8,
    /// A revert; `extra` = its group's id and the uuids of its members.
    Revert = 9,
    /// A control record; `sub` says which; `extra` = its body.
    Control = 10,
    /// The guest-visible size changed; `start` = bytes.
    Size = 11,
    /// Pages of an index run; payload.
    Index = 12,
}
impl DescriptorKind {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use DescriptorKind::*;
        Some(match byte {
            1 => Write,
            2 => Zero,
            3 => Discard,
            4 => BeforeData,
            5 => BeforeZero,
            6 => BeforeUnreadable,
            7 => FlushPoint,
            8 => Marker,
            9 => Revert,
            10 => Control,
            11 => Size,
            12 => Index,
            _ => return None,
        })
    }
}

/// Fixed part of a descriptor; `extra_bytes` bytes follow, padded with zeroes to a multiple of 8.
///
/// | kind | `start` | `count` | `extra` |
/// |---|---|---|---|
/// | write | first sector | sectors | CRC-32 of each payload block (u32 each) |
/// | zero, discard | first sector | sectors | |
/// | before-data | first block | blocks | CRC-32 of each payload block |
/// | before-zero, before-unreadable | first block | blocks | |
/// | flush point | 0 | 1: no write was in flight | |
/// | marker | flags (1: automatic) | 0 | name, UTF-8; `sub` = kind |
/// | revert | target instant | changed blocks | group id (16), then member uuids (16 each); empty: no group |
/// | control | | | see [`ControlKind`] |
/// | size | bytes | 0 | |
/// | index | 0 | pages | CRC-32 of each payload block |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DescriptorHeader {
    /// [`DescriptorKind`]
    pub kind: u8, //  0
    /// How the payload is coded: 0 raw.
    pub codec: u8, //  1
    /// Sub-kind ([`ControlKind`], marker kind).
    pub sub: u8, //  2
    /// Zero.
    pub flags: u8, //  3
    /// Bytes of `extra`, before padding.
    pub extra_bytes: U32, //  4
    /// When.
    pub instant: U64, //  8
    /// See the table.
    pub start: U64, // 16
    /// See the table.
    pub count: U64, // 24
    /// Block of the payload within the frame's payload.
    pub payload_block: U32, // 32
    /// Blocks of payload.
    pub payload_blocks: U32, // 36
}
const _: () = assert!(size_of::<DescriptorHeader>() == 40);

/// Sub-kinds of control records: the state of the volume is the fold of them. Each new log starts with all of it, ended by `End`;
/// later records of the log change it. Bodies are the structs below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ControlKind {
    /// [`ControlSettings`]
    Settings = 1,
    /// [`ControlLog`]: a log's row is added or replaced.
    Log = 2,
    /// A log is gone (`start` = seq).
    LogGone = 3,
    /// A discard hint (`start` = first block, `count` = blocks, `instant` = of the discard; extra: seq of its log, u64).
    Hint = 4,
    /// [`ControlRevert`]: a pending revert's progress; done when `next_block` is `u64::MAX`.
    Revert = 5,
    /// The carried state is complete.
    End = 6,
}
impl ControlKind {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use ControlKind::*;
        Some(match byte {
            1 => Settings,
            2 => Log,
            3 => LogGone,
            4 => Hint,
            5 => Revert,
            6 => End,
            _ => return None,
        })
    }
}

/// A volume's settings.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ControlSettings {
    /// Bytes that the volume may occupy.
    pub reserve_capacity: U64, //  0
    /// Seconds of history.
    pub reserve_duration_s: U64, //  8
    /// Wall clock at creation, nanoseconds.
    pub created_ns: U64, // 16
    /// Generation of the attachment (see the fence).
    pub generation: U64, // 24
    /// Bytes that the guest sees.
    pub size: U64, // 32
    /// Seqs below this were given out.
    pub next_seq: U64, // 40
    /// 0 low, 1 mid, 2 high.
    pub priority: u8, // 48
    /// 1: the user's switch is on.
    pub on: u8, // 49
    /// 1: held until release.
    pub held: u8, // 50
    /// Zero.
    pub reserved: [u8; 13], // 51
}
const _: () = assert!(size_of::<ControlSettings>() == 64);

/// Flags of [`ControlLog`].
pub mod log_flags {
    /// Its instants can be viewed.
    pub const RECORDING: u32 = 1;
    /// No more guest writes go there.
    pub const CLOSED: u32 = 2;
    /// Closed and all on the primary; its runs are the whole index.
    pub const SEALED: u32 = 4;
    /// Its writes are dropped.
    pub const THIN: u32 = 8;
    /// Every flag of format 1.
    pub const KNOWN: u32 = 15;
}

/// A log's row.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ControlLog {
    /// Seq.
    pub seq: U64, //   0
    /// Random id.
    pub id: U64, //   8
    /// First instant.
    pub start: U64, //  16
    /// First write, 0: none.
    pub io_start: U64, //  24
    /// Last write, 0: none.
    pub io_last: U64, //  32
    /// [`log_flags`]
    pub flags: U32, //  40
    /// Why it was closed (for `info`): 0 rotation, 1 enable/disable, 2 revert, 3 restart, 5 cleaned.
    pub close_reason: U32, //  44
    /// Id of its CDP disk.
    pub disk_id: [u8; 16], //  48
    /// Root of the writes index (sealed, not thin).
    pub writes_root: RunRoot, //  64
    /// Root of the before-image index (sealed).
    pub before_root: RunRoot, //  96
}
const _: () = assert!(size_of::<ControlLog>() == 128);

/// Where an index run hangs: a tree of 4 KiB pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct RunRoot {
    /// Entries in the run; 0: there is no run, the rest is zero.
    pub entries: U64, //  0
    /// Segment of the root page.
    pub segment: U32, //  8
    /// Block of the root page in its segment.
    pub block: U32, // 12
    /// 0: the root is a leaf.
    pub height: U32, // 16
    /// Bit `l`: the run has entries of level `l`.
    pub levels: U32, // 20
    /// CRC-32 of the root page.
    pub crc: U32, // 24
    /// Zero.
    pub reserved: U32, // 28
}
const _: () = assert!(size_of::<RunRoot>() == 32);

/// A pending revert.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ControlRevert {
    /// Seq of the log that it closed.
    pub log_seq: U64, //  0
    /// When.
    pub instant: U64, //  8
    /// Back to.
    pub target: U64, // 16
    /// Blocks in total.
    pub blocks: U64, // 24
    /// Blocks below this one are copied; `u64::MAX`: done.
    pub next_block: U64, // 32
    /// Blocks copied so far.
    pub blocks_done: U64, // 40
}
const _: () = assert!(size_of::<ControlRevert>() == 48);

/// Head of an index page; [`IndexPageHeader::ENTRIES`] entries of 32 bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IndexPageHeader {
    /// [`IndexPageHeader::MAGIC`]
    pub magic: U32, //  0
    /// CRC-32 of bytes 8..4096 of the page.
    pub crc: U32, //  4
    /// Random id of the log.
    pub log_id: U64, //  8
    /// Entries in use.
    pub count: U16, // 16
    /// 0: leaf.
    pub height: u8, // 18
    /// [`StreamKind`]
    pub kind: u8, // 19
    /// Zero.
    pub reserved: [u8; 12], // 20
}
const _: () = assert!(size_of::<IndexPageHeader>() == 32);
impl IndexPageHeader {
    /// "CDPX"
    pub const MAGIC: u32 = u32::from_le_bytes(*b"CDPX");
    /// Entries of a page.
    pub const ENTRIES: usize = 127;
}

/// Kinds of index entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// Guest data.
    Write = 1,
    /// Guest zeroes.
    Zero = 2,
    /// Before-image with data.
    BeforeData = 4,
    /// Before-image of zeroes.
    BeforeZero = 5,
    /// Unreadable before-image.
    BeforeUnreadable = 6,
}
impl EntryKind {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Write,
            2 => Self::Zero,
            4 => Self::BeforeData,
            5 => Self::BeforeZero,
            6 => Self::BeforeUnreadable,
            _ => return None,
        })
    }
}

/// A leaf entry. Sorted by (level, block, instant). An entry of level `l` stands for `16^l` blocks, aligned to that; only entries without payload
/// have a level above 0. Before-images have instant 0: there is one of a block in a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IndexEntry {
    /// First block.
    pub block: U64, //  0
    /// When.
    pub instant: U64, //  8
    /// Segment of the payload.
    pub segment: U32, // 16
    /// Block of the payload in its segment.
    pub page: U16, // 20
    /// Bit `s`: sector `s` of the block is in it.
    pub mask: u8, // 22
    /// [`EntryKind`] in the low four bits, level in the high four.
    pub kind_level: u8, // 23
    /// CRC-32 of the payload block.
    pub crc: U32, // 24
    /// Zero.
    pub reserved: U32, // 28
}
const _: () = assert!(size_of::<IndexEntry>() == 32);

/// An entry of an inner page: the first key below a child, and where the child is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ChildEntry {
    /// First key: block.
    pub block: U64, //  0
    /// First key: instant.
    pub instant: U64, //  8
    /// Segment of the child page.
    pub segment: U32, // 16
    /// Block of the child page in its segment.
    pub page: U16, // 20
    /// Zero.
    pub reserved: u8, // 22
    /// First key: level, in the high four bits.
    pub level: u8, // 23
    /// CRC-32 of the child page (its `crc` field).
    pub crc: U32, // 24
    /// Zero.
    pub reserved2: U32, // 28
}
const _: () = assert!(size_of::<ChildEntry>() == 32);

/// Last 4 KiB of a full segment (the rest of the block is zero). The index pages lie before it; between them and it, a copy of the descriptors
/// of the segment's frames that are no writes, zeroes, before-images or index pages (markers, control records …), so that recovery need not walk the
/// frames.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SegmentFooter {
    /// [`SegmentFooter::MAGIC`]
    pub magic: [u8; 8], //   0
    /// CRC-32 of bytes 12..128.
    pub crc: U32, //   8
    /// [`VERSION`]
    pub version: U16, //  12
    /// Zero.
    pub flags: U16, //  14
    /// Random id of the log.
    pub log_id: U64, //  16
    /// As in the segment's header.
    pub lap: U64, //  24
    /// Number of the segment on the disk.
    pub segment: U32, //  32
    /// First block of the copied descriptors.
    pub descriptors_at: U32, //  36
    /// Bytes of the copied descriptors.
    pub descriptor_bytes: U32, //  40
    /// CRC-32 of the copied descriptors.
    pub descriptor_crc: U32, //  44
    /// Frames end before this block.
    pub frames_end: U32, //  48
    /// `crc` of the last frame.
    pub last_crc: U32, //  52
    /// Number of the next frame.
    pub frame_next: U64, //  56
    /// As in the last frame.
    pub instant_last: U64, //  64
    /// As in the last frame.
    pub durable: U64, //  72
    /// As in the last frame.
    pub watermark: U64, //  80
    /// The index of the segment.
    pub root: RunRoot, //  88
    /// Zero.
    pub reserved: [u8; 8], // 120
}
const _: () = assert!(size_of::<SegmentFooter>() == 128);
impl SegmentFooter {
    /// "CDPFOOTR"
    pub const MAGIC: [u8; 8] = *b"CDPFOOTR";
}

/// Writes `crc` (at bytes `at..at+4`) over the bytes after it up to the end, and answers the bytes padded to a block.
pub fn sealed_block<T: IntoBytes + Immutable>(value: &T, at: usize) -> Vec<u8> {
    let mut bytes = value.as_bytes().to_vec();
    let sum = crc(&bytes[at + 4..]);
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    bytes.resize(BLOCK as usize, 0);
    bytes
}

/// Reads a structure whose CRC-32 at byte `at` covers what follows it in the structure; `None` when magic bytes or checksum do not fit.
pub fn open_block<T: FromBytes + IntoBytes + KnownLayout + Immutable>(
    bytes: &[u8],
    magic: &[u8],
    at: usize,
) -> Option<T> {
    let size = size_of::<T>();
    let bytes = bytes.get(..size)?;
    if !bytes.starts_with(magic) {
        return None;
    }
    let stored = u32::from_le_bytes(bytes[at..at + 4].try_into().ok()?);
    if stored != crc(&bytes[at + 4..]) {
        return None;
    }
    T::read_from_bytes(bytes).ok()
}

/// Where things lie on a disk of a given size and segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a segment.
    pub segment_size: u64,
    /// Number of segments.
    pub segments: u64,
    /// Pages of a table.
    pub table_pages: u64,
    /// Offset of table A.
    pub table_a: u64,
    /// Offset of table B.
    pub table_b: u64,
    /// Offset of segment 0.
    pub segments_at: u64,
}

impl Geometry {
    /// The geometry of a disk; `None` when it is too small for 8 segments or the segment size is not allowed.
    pub fn of(disk_size: u64, segment_size: u64) -> Option<Self> {
        if !segment_size.is_power_of_two() || !(SEGMENT_MIN..=SEGMENT_MAX).contains(&segment_size) {
            return None;
        }
        let most = disk_size / segment_size;
        let table_pages = most.div_ceil(TablePageHeader::ENTRIES);
        let table_bytes = (table_pages * BLOCK).next_multiple_of(64 << 10);
        let table_b = TABLE_A + table_bytes;
        let segments_at = (table_b + table_bytes).next_multiple_of(1 << 20);
        let segments = disk_size.checked_sub(segments_at)? / segment_size;
        (segments >= 8 && segments <= u64::from(u32::MAX)).then_some(Self {
            segment_size,
            segments,
            table_pages,
            table_a: TABLE_A,
            table_b,
            segments_at,
        })
    }

    /// The segment size chosen for a disk of this size: about 1,024 segments, 1 to 16 MiB.
    pub fn default_segment_size(disk_size: u64) -> u64 {
        (disk_size / 1024).max(1).next_power_of_two().clamp(SEGMENT_MIN, 16 << 20)
    }

    /// Offset of a block of a segment.
    pub fn at(&self, segment: u32, block: u32) -> u64 {
        self.segments_at + u64::from(segment) * self.segment_size + u64::from(block) * BLOCK
    }
}
