//! Entries and their order.

use crate::format::{ChildEntry, EntryKind, IndexEntry};
use crate::types::Instant;

/// Highest level of an entry.
pub const LEVEL_MAX: u8 = 15;

/// All sectors of a block.
pub(super) const ALL_SECTORS: u8 = 0xff;

/// What entries are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The entry stands for `16^level` blocks.
    pub level: u8,
    /// First block.
    pub block: u64,
    /// When; 0 for a before-image.
    pub instant: u64,
}

/// First block of the area of a level that holds `block`.
pub fn aligned(block: u64, level: u8) -> u64 {
    let shift = 4 * u32::from(level.min(LEVEL_MAX));
    block >> shift << shift
}

/// Cuts a range of blocks into the fewest areas of 16^level blocks, aligned to that, in ascending order: at most 30 per level.
/// A range that would end past `u64::MAX` ends there.
pub fn split_extent(block: u64, count: u64, mut f: impl FnMut(u8, u64)) {
    let mut at = block;
    let mut left = count.min(u64::MAX - block);
    while left > 0 {
        let alignment = (at.trailing_zeros() / 4) as u8;
        let fits = (left.ilog2() / 4) as u8;
        let level = alignment.min(fits).min(LEVEL_MAX);
        f(level, at);
        let blocks = 1u64 << (4 * level);
        at += blocks;
        left -= blocks;
    }
}

/// An entry in memory is always valid: pages are checked when they are read, and the constructors make nothing else.
impl IndexEntry {
    /// A guest write of the sectors `mask` of one block.
    pub fn write(block: u64, instant: Instant, segment: u32, page: u16, mask: u8, crc: u32) -> Self {
        Self {
            block: block.into(),
            instant: instant.0.into(),
            segment: segment.into(),
            page: page.into(),
            mask,
            kind_level: EntryKind::Write as u8,
            crc: crc.into(),
            reserved: 0.into(),
        }
    }

    /// Guest zeroes over the sectors `mask` of one block.
    pub fn zero(block: u64, instant: Instant, mask: u8) -> Self {
        Self { mask, ..Self::extent(EntryKind::Zero, 0, block, instant) }
    }

    /// An entry without payload for `16^level` whole blocks; `block` is aligned to that.
    pub fn extent(kind: EntryKind, level: u8, block: u64, instant: Instant) -> Self {
        debug_assert!(level <= LEVEL_MAX && aligned(block, level) == block);
        Self {
            block: block.into(),
            instant: instant.0.into(),
            mask: ALL_SECTORS,
            kind_level: kind as u8 | level << 4,
            ..Self::default()
        }
    }

    /// A before-image with data.
    pub fn before_data(block: u64, segment: u32, page: u16, crc: u32) -> Self {
        let write = Self::write(block, Instant::ZERO, segment, page, ALL_SECTORS, crc);
        Self { kind_level: EntryKind::BeforeData as u8, ..write }
    }

    /// What it is sorted by.
    pub fn key(&self) -> Key {
        Key { level: self.level(), block: self.block.get(), instant: self.instant.get() }
    }

    /// What it stands for. (A byte that is no kind cannot occur; it would count as unreadable, which is never served as data.)
    pub fn kind(&self) -> EntryKind {
        EntryKind::from_byte(self.kind_level & 15).unwrap_or(EntryKind::BeforeUnreadable)
    }

    /// Its level: it stands for `16^level` blocks.
    pub fn level(&self) -> u8 {
        self.kind_level >> 4
    }

    /// How many blocks it stands for.
    pub fn blocks(&self) -> u64 {
        1 << (4 * self.level())
    }

    /// Whether it stands for this block.
    pub fn covers(&self, block: u64) -> bool {
        aligned(block, self.level()) == self.block.get()
    }

    /// The sectors that it gives of each of its blocks.
    pub fn sectors(&self) -> u8 {
        if self.level() > 0 { ALL_SECTORS } else { self.mask }
    }

    /// Whether it points to a payload block.
    pub fn has_payload(&self) -> bool {
        matches!(self.kind(), EntryKind::Write | EntryKind::BeforeData)
    }

    /// What is wrong with an entry that was read from a disk.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let Some(kind) = EntryKind::from_byte(self.kind_level & 15) else {
            return Err("index entry (unknown kind)");
        };
        let level = self.level();
        if level > 0 && matches!(kind, EntryKind::Write | EntryKind::BeforeData) {
            return Err("index entry (payload above level 0)");
        }
        if aligned(self.block.get(), level) != self.block.get() {
            return Err("index entry (not aligned to its level)");
        }
        if self.mask == 0 || (self.mask != ALL_SECTORS && (level > 0 || self.instant.get() == 0)) {
            return Err("index entry (sector mask)");
        }
        Ok(())
    }

    /// Adds it to the answer of a lookup when it gives a sector that is still missing.
    pub(super) fn contribute(&self, missing: &mut u8, out: &mut Vec<IndexEntry>) {
        if self.sectors() & *missing != 0 {
            *missing &= !self.sectors();
            out.push(*self);
        }
    }
}

impl ChildEntry {
    /// A child page whose first key is `first`.
    pub fn new(first: Key, segment: u32, page: u16, crc: u32) -> Self {
        Self {
            block: first.block.into(),
            instant: first.instant.into(),
            segment: segment.into(),
            page: page.into(),
            reserved: 0,
            level: first.level << 4,
            crc: crc.into(),
            reserved2: 0.into(),
        }
    }

    /// The first key below the child.
    pub fn key(&self) -> Key {
        Key { level: self.level >> 4, block: self.block.get(), instant: self.instant.get() }
    }
}
