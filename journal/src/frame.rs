//! Frames: what one append to a log carries. Building them from records, and reading them back with every length bounded before it is trusted.

use zerocopy::{FromBytes, IntoBytes};

use crate::buf::{IoBuf, Slice};
use crate::disk::SegmentRef;
use crate::error::{Error, Result};
use crate::format::{
    ControlKind, DescriptorHeader, DescriptorKind, EntryKind, FrameHeader, IndexEntry, TableEntry, crc,
};
use crate::info::{Marker, MarkerKind};
use crate::types::{BLOCK, Instant, SECTORS_PER_BLOCK};

/// Most bytes of descriptors in a frame that is being filled (one more descriptor always fits the format's bound).
pub const DESCRIPTOR_BYTES_MAX: usize = 128 << 10;

/// Sectors `[first, first + count)` cut into blocks: calls `f(block, mask)` for each block that is touched.
pub fn for_each_block(first: u64, count: u64, mut f: impl FnMut(u64, u8)) {
    let end = first + count;
    let mut sector = first;
    while sector < end {
        let block = sector / SECTORS_PER_BLOCK;
        let block_end = ((block + 1) * SECTORS_PER_BLOCK).min(end);
        f(block, mask_of(sector % SECTORS_PER_BLOCK, block_end - sector));
        sector = block_end;
    }
}

/// The mask of `count` sectors from sector `from` of a block.
pub fn mask_of(from: u64, count: u64) -> u8 {
    debug_assert!(from + count <= 8);
    (((1u16 << count) - 1) << from) as u8
}

/// Sectors cut into: a partial first block, whole blocks, a partial last block.
pub struct Cut {
    /// Blocks of which only some sectors are in the range.
    pub partial: [Option<(u64, u8)>; 2],
    /// First whole block and how many.
    pub whole: (u64, u64),
}

/// Cuts `[first, first + count)` sectors.
pub fn cut(first: u64, count: u64) -> Cut {
    let end = first + count;
    let whole_first = first.div_ceil(SECTORS_PER_BLOCK);
    let whole_end = end / SECTORS_PER_BLOCK;
    let mut partial = [None, None];
    if whole_first > whole_end {
        // All inside one block.
        partial[0] = Some((whole_end, mask_of(first % SECTORS_PER_BLOCK, count)));
        return Cut { partial, whole: (whole_first, 0) };
    }
    if !first.is_multiple_of(SECTORS_PER_BLOCK) {
        let from = first % SECTORS_PER_BLOCK;
        partial[0] = Some((whole_first - 1, mask_of(from, SECTORS_PER_BLOCK - from)));
    }
    if !end.is_multiple_of(SECTORS_PER_BLOCK) {
        partial[1] = Some((whole_end, mask_of(0, end % SECTORS_PER_BLOCK)));
    }
    Cut { partial, whole: (whole_first, whole_end - whole_first) }
}

/// A frame that is being filled.
#[derive(Default)]
pub struct FrameBuilder {
    descriptors: Vec<u8>,
    /// Descriptors that recovery wants without walking the frames: all but writes, zeroes and before-images.
    side: Vec<u8>,
    payload: Vec<Slice>,
    payload_blocks: u32,
    /// Index entries whose `page` still counts from the start of the payload.
    entries: Vec<IndexEntry>,
    extents: Vec<(EntryKind, u64, u64, Instant)>,
    instant_last: Instant,
    records: usize,
}

/// A frame with its place, ready to be written and indexed.
pub struct SealedFrame {
    /// What to write at its place.
    pub parts: Vec<Slice>,
    /// Blocks in all.
    pub blocks: u32,
    /// Blocks of header and descriptors among them.
    pub header_blocks: u32,
    /// Its `crc`, which the next frame names.
    pub crc: u32,
    /// Index entries with their final places.
    pub entries: Vec<IndexEntry>,
    /// Extents without payload, for the index.
    pub extents: Vec<(EntryKind, u64, u64, Instant)>,
    /// For the segment's footer.
    pub side: Vec<u8>,
}

/// What a frame says of its stream and volume when it is sealed.
#[derive(Clone, Copy, Debug, Default)]
pub struct FramePoint {
    /// Random id of the log.
    pub log_id: u64,
    /// Number of the frame.
    pub number: u64,
    /// `crc` of the frame before.
    pub previous_crc: u32,
    /// Segment of the disk.
    pub segment: u32,
    /// Its lap.
    pub lap: u64,
    /// Block in the segment.
    pub block: u32,
    /// Newest instant so far in the volume, this frame's own not counted.
    pub instant_last: Instant,
    /// Durable point.
    pub durable: Instant,
    /// Destage watermark.
    pub watermark: Instant,
    /// Frames of this stream below this number are durable.
    pub durable_frames: u64,
    /// The same of the log's other stream.
    pub durable_frames_other: u64,
}

impl FrameBuilder {
    /// Nothing in it.
    pub fn is_empty(&self) -> bool {
        self.descriptors.is_empty()
    }

    /// Blocks of payload so far.
    pub fn payload_blocks(&self) -> u32 {
        self.payload_blocks
    }

    /// Records so far.
    pub fn record_count(&self) -> usize {
        self.records
    }

    /// Bytes of descriptors so far.
    pub fn descriptor_bytes(&self) -> usize {
        self.descriptors.len()
    }

    /// Newest instant of a guest record in it.
    pub fn instant_last(&self) -> Instant {
        self.instant_last
    }

    /// Blocks that the frame would take on disk.
    pub fn blocks(&self) -> u32 {
        self.header_blocks() + self.payload_blocks
    }

    /// Index entries that it adds (an upper bound for the footer's size).
    pub fn entry_count(&self) -> usize {
        // An extent becomes at most 15 entries at each side of each of its levels.
        self.entries.len() + self.extents.iter().map(|e| extent_entries_max(e.2)).sum::<usize>()
    }

    /// Bytes that it adds to the footer's copy of descriptors.
    pub fn side_bytes(&self) -> usize {
        self.side.len()
    }

    fn header_blocks(&self) -> u32 {
        (size_of::<FrameHeader>() + self.descriptors.len()).div_ceil(BLOCK as usize) as u32
    }

    fn push(&mut self, header: DescriptorHeader, extra: &[u8], side: bool) {
        let header = DescriptorHeader { extra_bytes: (extra.len() as u32).into(), ..header };
        let start = self.descriptors.len();
        self.records += 1;
        self.descriptors.extend_from_slice(header.as_bytes());
        self.descriptors.extend_from_slice(extra);
        self.descriptors.resize(self.descriptors.len().next_multiple_of(8), 0);
        if side {
            self.side.extend_from_slice(&self.descriptors[start..]);
        }
    }

    /// A guest write of `sectors` sectors from `sector`; `data` holds the blocks it touches, whole.
    pub fn push_write(&mut self, sector: u64, sectors: u64, data: Slice, instant: Instant) {
        let first_block = sector / SECTORS_PER_BLOCK;
        let base = self.payload_blocks;
        let mut sums = Vec::with_capacity(data.len() / BLOCK as usize);
        for_each_block(sector, sectors, |block, mask| {
            let at = (block - first_block) as usize;
            let sum = crc(&data[at * BLOCK as usize..(at + 1) * BLOCK as usize]);
            sums.push(zerocopy::little_endian::U32::new(sum));
            self.entries.push(IndexEntry::write(block, instant, 0, (base as usize + at) as u16, mask, sum));
        });
        self.push(
            descriptor(DescriptorKind::Write, instant, sector, sectors, base, sums.len() as u32),
            sums.as_bytes(),
            false,
        );
        self.payload_blocks += sums.len() as u32;
        self.payload.push(data);
        self.instant_last = self.instant_last.max(instant);
    }

    /// Guest zeroes.
    pub fn push_zero(&mut self, sector: u64, sectors: u64, instant: Instant) {
        let cut = cut(sector, sectors);
        for (block, mask) in cut.partial.into_iter().flatten() {
            let mut entry = IndexEntry::extent(EntryKind::Zero, 0, block, instant);
            entry.mask = mask;
            self.entries.push(entry);
        }
        if cut.whole.1 > 0 {
            self.extents.push((EntryKind::Zero, cut.whole.0, cut.whole.1, instant));
        }
        self.push(descriptor(DescriptorKind::Zero, instant, sector, sectors, 0, 0), &[], false);
        self.instant_last = self.instant_last.max(instant);
    }

    /// A guest discard.
    pub fn push_discard(&mut self, sector: u64, sectors: u64, instant: Instant) {
        self.push(descriptor(DescriptorKind::Discard, instant, sector, sectors, 0, 0), &[], true);
        self.instant_last = self.instant_last.max(instant);
    }

    /// Before-images with data.
    pub fn push_before(&mut self, block: u64, data: Slice, instant: Instant) {
        let base = self.payload_blocks;
        let mut sums = Vec::with_capacity(data.len() / BLOCK as usize);
        for (i, bytes) in data.chunks_exact(BLOCK as usize).enumerate() {
            let sum = crc(bytes);
            sums.push(zerocopy::little_endian::U32::new(sum));
            self.entries.push(IndexEntry::before_data(block + i as u64, 0, (base as usize + i) as u16, sum));
        }
        let count = sums.len() as u32;
        self.push(
            descriptor(DescriptorKind::BeforeData, instant, block, u64::from(count), base, count),
            sums.as_bytes(),
            false,
        );
        self.payload_blocks += count;
        self.payload.push(data);
    }

    /// Before-images without data: zero, or unreadable.
    pub fn push_before_extent(&mut self, block: u64, count: u64, readable: bool, instant: Instant) {
        let (kind, entry) = if readable {
            (DescriptorKind::BeforeZero, EntryKind::BeforeZero)
        } else {
            (DescriptorKind::BeforeUnreadable, EntryKind::BeforeUnreadable)
        };
        self.extents.push((entry, block, count, Instant::ZERO));
        self.push(descriptor(kind, instant, block, count, 0, 0), &[], false);
    }

    /// A guest flush; `clean`: no write was in flight.
    pub fn push_flush_point(&mut self, instant: Instant, clean: bool) {
        self.push(descriptor(DescriptorKind::FlushPoint, instant, 0, u64::from(clean), 0, 0), &[], true);
        self.instant_last = self.instant_last.max(instant);
    }

    /// A marker.
    pub fn push_marker(&mut self, marker: &Marker) {
        let mut header = descriptor(DescriptorKind::Marker, marker.time, u64::from(marker.auto), 0, 0, 0);
        header.sub = match marker.kind {
            MarkerKind::Crash => 0,
            MarkerKind::Flush => 1,
            MarkerKind::Application => 2,
        };
        self.push(header, marker.name.as_bytes(), true);
    }

    /// A revert; `group`: group id, then its members.
    pub fn push_revert(&mut self, instant: Instant, target: Instant, blocks: u64, group: &[u8]) {
        self.push(descriptor(DescriptorKind::Revert, instant, target.0, blocks, 0, 0), group, true);
        self.instant_last = self.instant_last.max(instant);
    }

    /// The guest-visible size from `instant` on.
    pub fn push_size(&mut self, instant: Instant, bytes: u64) {
        self.push(descriptor(DescriptorKind::Size, instant, bytes, 0, 0, 0), &[], true);
    }

    /// A control record.
    pub fn push_control(&mut self, kind: ControlKind, instant: Instant, start: u64, count: u64, body: &[u8]) {
        let mut header = descriptor(DescriptorKind::Control, instant, start, count, 0, 0);
        header.sub = kind as u8;
        self.push(header, body, true);
        self.instant_last = self.instant_last.max(instant);
    }

    /// Index pages; answers the block of the first one within the payload.
    pub fn push_index(&mut self, pages: Vec<Slice>) -> u32 {
        let base = self.payload_blocks;
        let sums: Vec<_> = pages.iter().map(|p| zerocopy::little_endian::U32::new(crc(p))).collect();
        let count = sums.len() as u32;
        self.push(
            descriptor(DescriptorKind::Index, Instant::ZERO, 0, u64::from(count), base, count),
            sums.as_bytes(),
            false,
        );
        self.payload_blocks += count;
        self.payload.extend(pages);
        base
    }

    /// Gives the frame its place.
    pub fn seal(mut self, point: FramePoint) -> SealedFrame {
        let header_blocks = self.header_blocks();
        let header = FrameHeader {
            magic: FrameHeader::MAGIC.into(),
            crc: 0.into(),
            log_id: point.log_id.into(),
            number: point.number.into(),
            previous_crc: point.previous_crc.into(),
            descriptor_bytes: (self.descriptors.len() as u32).into(),
            header_blocks: (header_blocks as u16).into(),
            flags: 0.into(),
            payload_blocks: self.payload_blocks.into(),
            segment: point.segment.into(),
            block: point.block.into(),
            instant_last: point.instant_last.max(self.instant_last).0.into(),
            durable: point.durable.0.into(),
            watermark: point.watermark.0.into(),
            durable_frames: point.durable_frames.into(),
            durable_frames_other: point.durable_frames_other.into(),
            lap: point.lap.into(),
        };
        let mut head = IoBuf::zeroed(header_blocks as usize * BLOCK as usize);
        let end = size_of::<FrameHeader>() + self.descriptors.len();
        head[..size_of::<FrameHeader>()].copy_from_slice(header.as_bytes());
        head[size_of::<FrameHeader>()..end].copy_from_slice(&self.descriptors);
        let sum = crc(&head[8..end]);
        head[4..8].copy_from_slice(&sum.to_le_bytes());
        let payload_at = point.block + header_blocks;
        for entry in &mut self.entries {
            if matches!(entry.kind(), EntryKind::Write | EntryKind::BeforeData) {
                entry.segment = point.segment.into();
                entry.page = ((payload_at + u32::from(entry.page.get())) as u16).into();
            }
        }
        let mut parts = Vec::with_capacity(1 + self.payload.len());
        parts.push(head.share());
        parts.append(&mut self.payload);
        SealedFrame {
            parts,
            blocks: header_blocks + self.payload_blocks,
            header_blocks,
            crc: sum,
            entries: self.entries,
            extents: self.extents,
            side: self.side,
        }
    }
}

/// Most index entries that an extent of `blocks` blocks becomes.
pub fn extent_entries_max(blocks: u64) -> usize {
    let levels = (64 - blocks.leading_zeros()).div_ceil(4) as usize;
    (blocks as usize).min(30 * levels.max(1))
}

fn descriptor(
    kind: DescriptorKind,
    instant: Instant,
    start: u64,
    count: u64,
    payload: u32,
    blocks: u32,
) -> DescriptorHeader {
    DescriptorHeader {
        kind: kind as u8,
        codec: 0,
        sub: 0,
        flags: 0,
        extra_bytes: 0.into(),
        instant: instant.0.into(),
        start: start.into(),
        count: count.into(),
        payload_block: payload.into(),
        payload_blocks: blocks.into(),
    }
}

/// A descriptor that was read back.
#[derive(Clone, Debug)]
pub struct Descriptor {
    /// Its kind.
    pub kind: DescriptorKind,
    /// Fixed part.
    pub header: DescriptorHeader,
    /// Variable part, without padding.
    pub extra: Vec<u8>,
}

impl Descriptor {
    /// When.
    pub fn instant(&self) -> Instant {
        Instant(self.header.instant.get())
    }

    /// The marker that it is.
    pub fn marker(&self) -> Option<Marker> {
        let kind = match self.header.sub {
            0 => MarkerKind::Crash,
            1 => MarkerKind::Flush,
            2 => MarkerKind::Application,
            _ => return None,
        };
        let name = String::from_utf8(self.extra.clone()).ok()?;
        Some(Marker { name, time: self.instant(), kind, auto: self.header.start.get() & 1 == 1 })
    }

    /// Its checksums, one for each payload block.
    pub fn sums(&self) -> impl Iterator<Item = u32> + '_ {
        self.extra.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }
}

/// A frame's header and descriptors, checked.
pub struct ParsedFrame {
    /// Header.
    pub header: FrameHeader,
    /// Descriptors in order.
    pub descriptors: Vec<Descriptor>,
}

/// The header of a frame of a log at a block of a segment, its own bounds checked (not its checksum: that needs all header blocks).
pub fn peek_frame(bytes: &[u8], log_id: u64, s: SegmentRef, block: u32) -> Option<FrameHeader> {
    let (header, _) = FrameHeader::read_from_prefix(bytes).ok()?;
    let blocks = header.header_blocks.get();
    let fits = header.magic.get() == FrameHeader::MAGIC
        && header.log_id.get() == log_id
        && header.segment.get() == s.segment
        && header.lap.get() == s.lap
        && header.block.get() == block
        && header.flags.get() == 0
        // The next one has a number too.
        && header.number.get() < u64::MAX
        && (1..=FrameHeader::HEADER_BLOCKS_MAX).contains(&blocks)
        && size_of::<FrameHeader>() + header.descriptor_bytes.get() as usize <= usize::from(blocks) * BLOCK as usize
        && header.payload_blocks.get() <= 65536;
    fits.then_some(header)
}

/// Parses the header blocks of a frame that [`peek_frame`] accepted; `None` when the checksum or a descriptor does not fit.
pub fn parse_frame(bytes: &[u8], header: FrameHeader) -> Option<ParsedFrame> {
    let end = size_of::<FrameHeader>() + header.descriptor_bytes.get() as usize;
    let covered = bytes.get(8..end)?;
    if header.crc.get() != crc(covered) {
        return None;
    }
    let descriptors = parse_descriptors(&bytes[size_of::<FrameHeader>()..end], header.payload_blocks.get())?;
    Some(ParsedFrame { header, descriptors })
}

/// Parses a run of descriptors; `payload_blocks` bounds their payload.
pub fn parse_descriptors(mut bytes: &[u8], payload_blocks: u32) -> Option<Vec<Descriptor>> {
    let mut descriptors = Vec::new();
    while !bytes.is_empty() {
        let (header, rest) = DescriptorHeader::read_from_prefix(bytes).ok()?;
        let extra_bytes = header.extra_bytes.get() as usize;
        let padded = (size_of::<DescriptorHeader>() + extra_bytes).next_multiple_of(8);
        let kind = DescriptorKind::from_byte(header.kind)?;
        let extra = rest.get(..extra_bytes)?.to_vec();
        let payload_end = header.payload_block.get().checked_add(header.payload_blocks.get())?;
        if header.codec != 0 || payload_end > payload_blocks {
            return None;
        }
        header.start.get().checked_add(header.count.get())?;
        let payload_known = match kind {
            DescriptorKind::Write => {
                let first = header.start.get() / SECTORS_PER_BLOCK;
                let end = (header.start.get() + header.count.get()).div_ceil(SECTORS_PER_BLOCK);
                header.count.get() > 0 && end - first == u64::from(header.payload_blocks.get())
            }
            DescriptorKind::BeforeData | DescriptorKind::Index => {
                header.count.get() == u64::from(header.payload_blocks.get())
            }
            _ => header.payload_blocks.get() == 0,
        };
        if !payload_known
            || (header.payload_blocks.get() > 0 && extra_bytes != header.payload_blocks.get() as usize * 4)
        {
            return None;
        }
        descriptors.push(Descriptor { kind, header, extra });
        bytes = bytes.get(padded..)?;
    }
    Some(descriptors)
}

/// The error for bytes that are not what was written.
pub fn damaged(what: &'static str, disk: &str, segment: u32, block: u32) -> Error {
    Error::Damaged { what, place: format!("{disk} segment {segment} block {block}") }
}

/// Reads a body of a control record.
pub fn body<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable>(bytes: &[u8], place: &str) -> Result<T> {
    T::read_from_bytes(bytes).map_err(|_| Error::Damaged { what: "control record", place: place.to_owned() })
}

const _: () = assert!(size_of::<TableEntry>() == 64);
