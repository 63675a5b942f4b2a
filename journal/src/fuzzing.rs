//! Doors for the fuzzers: each takes any bytes, as a disk may hold them, through the engine's own parsers. Nothing else uses them.
//!
//! The first byte of an input says whether checksums are made right first (odd): random bytes would never get past them. Each answers whether the bytes were
//! taken for what they claim to be, so that a test can tell a corpus that reaches behind the checks from one that does not.

mod tree;

use crate::disk::SegmentRef;
use crate::format::{
    self, ClockPage, FrameHeader, Geometry, IndexPageHeader, SegmentFooter, SegmentHeader, StreamKind, Superblock,
    TablePageHeader, crc,
};
use crate::index::IndexPage;
use crate::types::BLOCK;
use uuid::Uuid;

pub use tree::run;

/// The blocks of an input, padded to whole ones, and whether checksums are to be made right.
fn blocks(data: &[u8]) -> Option<(bool, Vec<u8>)> {
    let (first, rest) = data.split_first()?;
    // What a frame's header may take, and a little payload.
    let mut bytes = rest[..rest.len().min(256 << 10)].to_vec();
    bytes.resize(bytes.len().next_multiple_of(BLOCK as usize).max(BLOCK as usize), 0);
    Some((first % 2 == 1, bytes))
}

fn seal(bytes: &mut [u8], at: usize, end: usize) {
    let sum = crc(&bytes[at + 4..end]);
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

/// Superblock and clock page.
pub fn superblock(data: &[u8]) -> bool {
    let Some((sealed, mut bytes)) = blocks(data) else { return false };
    if sealed {
        bytes[..8].copy_from_slice(&Superblock::MAGIC);
        seal(&mut bytes, 8, size_of::<Superblock>());
    }
    let mut taken = false;
    if let Some(found) = format::open_block::<Superblock>(&bytes, &Superblock::MAGIC, 8)
        && let Some(geometry) = Geometry::of(found.disk_size.get(), found.segment_size.get())
    {
        let last = u32::try_from(geometry.segments - 1).expect("bounded by Geometry::of");
        let last_block = u32::try_from(geometry.segment_size / BLOCK - 1).expect("at most 256 MiB");
        assert!(geometry.at(last, last_block) + BLOCK <= found.disk_size.get());
        assert!(geometry.table_b + geometry.table_pages * BLOCK <= geometry.segments_at);
        taken = true;
    }
    if sealed {
        bytes[..8].copy_from_slice(&ClockPage::MAGIC);
        seal(&mut bytes, 8, size_of::<ClockPage>());
    }
    taken & format::open_block::<ClockPage>(&bytes, &ClockPage::MAGIC, 8).is_some()
}

/// A page of the segment table.
pub fn table(data: &[u8]) -> bool {
    let Some((sealed, mut bytes)) = blocks(data) else { return false };
    if sealed {
        seal(&mut bytes, 8, BLOCK as usize);
    }
    let id: [u8; 16] = bytes[16..32].try_into().expect("16 bytes");
    let Some((_, entries)) = crate::disk::parse_table_page(&bytes, Uuid::from_bytes(id), 0) else { return false };
    assert!(entries.len() as u64 <= TablePageHeader::ENTRIES);
    true
}

/// Header and footer of a segment.
pub fn segment(data: &[u8]) -> bool {
    let Some((sealed, mut bytes)) = blocks(data) else { return false };
    if sealed {
        bytes[..8].copy_from_slice(&SegmentHeader::MAGIC);
        seal(&mut bytes, 8, size_of::<SegmentHeader>());
    }
    let header = format::open_block::<SegmentHeader>(&bytes, &SegmentHeader::MAGIC, 8);
    let kind = header.and_then(|header| StreamKind::from_byte(header.kind));
    if sealed {
        bytes[..8].copy_from_slice(&SegmentFooter::MAGIC);
        seal(&mut bytes, 8, size_of::<SegmentFooter>());
    }
    let footer = format::open_block::<SegmentFooter>(&bytes, &SegmentFooter::MAGIC, 8);
    kind.is_some() && footer.is_some()
}

/// A frame: header, descriptors, payload checksums, and what recovery makes of them.
pub fn frame(data: &[u8]) -> bool {
    let Some((sealed, mut bytes)) = blocks(data) else { return false };
    if sealed {
        bytes[..4].copy_from_slice(&FrameHeader::MAGIC.to_le_bytes());
        let descriptors = u32::from_le_bytes(bytes[28..32].try_into().expect("four bytes")) as usize;
        let end = (size_of::<FrameHeader>() + descriptors).min(bytes.len());
        seal(&mut bytes, 4, end);
    }
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let log_id = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
    let lap = u64::from_le_bytes(bytes[88..96].try_into().expect("eight bytes"));
    let place = SegmentRef { segment: word(40), lap, number: 0 };
    let Some(header) = crate::frame::peek_frame(&bytes, log_id, place, word(44)) else { return false };
    // Recovery has looked before that the frame ends inside its segment.
    if u64::from(word(44)) + u64::from(header.header_blocks.get()) + u64::from(header.payload_blocks.get()) > 65536 {
        return false;
    }
    let parsed = crate::frame::parse_frame(&bytes, header);
    if let Some(parsed) = &parsed {
        for descriptor in &parsed.descriptors {
            let _ = descriptor.marker();
            let _ = descriptor.sums().count();
        }
    }
    crate::volume::read_frame(&bytes, header) && parsed.is_some()
}

/// A page of an index run. ([`run`] takes whole ones.)
pub fn index(data: &[u8]) -> bool {
    let Some((sealed, mut bytes)) = blocks(data) else { return false };
    let page = &mut bytes[..BLOCK as usize];
    if sealed {
        page[..4].copy_from_slice(&IndexPageHeader::MAGIC.to_le_bytes());
        seal(page, 4, BLOCK as usize);
    }
    let Ok(page) = IndexPage::parse(page, None) else { return false };
    for entry in page.entries() {
        assert!(entry.covers(entry.block.get()));
    }
    let _ = (page.children().len(), page.first_key(), page.bytes());
    true
}
