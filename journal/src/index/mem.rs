//! The index of what is not in a run yet.

use std::collections::BTreeMap;
use std::collections::btree_map::Range;
use std::ops::Bound;

use super::entry::{Key, aligned, split_extent};
use crate::format::{EntryKind, IndexEntry};
use crate::types::Instant;

/// A sorted index in memory. Invariant: bit `l` of `levels` is set when there is an entry of level `l`.
#[derive(Clone, Debug, Default)]
pub struct MemIndex {
    entries: BTreeMap<Key, IndexEntry>,
    levels: u32,
}

impl MemIndex {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry; one with the same key is replaced.
    pub fn insert(&mut self, entry: IndexEntry) {
        self.levels |= 1 << entry.level();
        self.entries.insert(entry.key(), entry);
    }

    /// Adds a range of whole blocks without payload, as the fewest entries.
    pub fn insert_extent(&mut self, kind: EntryKind, block: u64, count: u64, instant: Instant) {
        split_extent(block, count, |level, block| self.insert(IndexEntry::extent(kind, level, block, instant)));
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bit `l`: there are entries of level `l`.
    pub fn levels(&self) -> u32 {
        self.levels
    }

    /// Estimate of the memory in use, bytes.
    pub fn bytes(&self) -> usize {
        // Nodes of a B-tree are two thirds full on average.
        self.entries.len() * size_of::<(Key, IndexEntry)>() * 3 / 2
    }

    /// All entries by key.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &IndexEntry> + ExactSizeIterator {
        self.entries.values()
    }

    /// The entries behind a key (`None`: all), by key.
    pub fn iter_after(&self, after: Option<Key>) -> impl Iterator<Item = &IndexEntry> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.entries.range((from, Bound::Unbounded)).map(|(_, entry)| entry)
    }

    /// Pushes, newest first, the entries of `block` at or before `upto` that give a sector that is still set in `missing`, and
    /// clears their sectors there; ends when nothing is missing.
    pub fn lookup(&self, block: u64, upto: Instant, missing: &mut u8, out: &mut Vec<IndexEntry>) {
        // Per level: the entries of the area that holds the block, and the newest of them that was not looked at.
        let mut heads: [Option<(Range<'_, Key, IndexEntry>, &IndexEntry)>; 16] = [const { None }; 16];
        let mut levels = if *missing == 0 { 0 } else { self.levels };
        while levels != 0 {
            let level = levels.trailing_zeros() as u8;
            levels &= levels - 1;
            let block = aligned(block, level);
            let mut range =
                self.entries.range(Key { level, block, instant: 0 }..=Key { level, block, instant: upto.0 });
            if let Some((_, newest)) = range.next_back() {
                heads[usize::from(level)] = Some((range, newest));
            }
        }
        while *missing != 0 {
            // Of equal instants the lowest level comes first: the narrower statement about the block.
            let newest = heads.iter_mut().rev().filter(|head| head.is_some());
            let Some(head) = newest.max_by_key(|head| head.as_ref().map(|(_, entry)| entry.instant.get())) else {
                return;
            };
            let Some((mut range, entry)) = head.take() else { return };
            entry.contribute(missing, out);
            *head = range.next_back().map(|(_, entry)| (range, entry));
        }
    }
}

impl FromIterator<IndexEntry> for MemIndex {
    fn from_iter<I: IntoIterator<Item = IndexEntry>>(entries: I) -> Self {
        let mut index = Self::new();
        entries.into_iter().for_each(|entry| index.insert(entry));
        index
    }
}
