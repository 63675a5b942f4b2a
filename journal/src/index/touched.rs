//! The set of blocks that a log touched.

use std::collections::BTreeMap;

use roaring::RoaringBitmap;

/// Blocks of a granule, as a power of two: 16 GiB of volume. Small enough that tidying one up is no pause.
const SHIFT: u32 = 22;
const GRANULE: u64 = 1 << SHIFT;
/// Inserts into a granule between two tidyings: roaring never leaves the run form by itself, in which scattered blocks cost
/// 4 bytes each and up to 16 times of a plain bitmap.
const TIDY: u32 = 4096;

/// A set of blocks. Memory: 2 bytes per scattered block, at most 1 bit per block of the volume (but for a few KiB), and next to
/// nothing for long ranges: a granule that is full is a number, so 2^32 zeroed blocks take some 100 KiB.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    granules: BTreeMap<u64, Granule>,
    len: u64,
}

/// Invariant: `count` blocks are in; when all are, `bits` is empty.
#[derive(Clone, Debug, Default)]
struct Granule {
    bits: RoaringBitmap,
    count: u64,
    inserts: u32,
}

impl Granule {
    fn is_full(&self) -> bool {
        self.count == GRANULE
    }

    /// `first..=last` within the granule; answers how many are new.
    fn insert_range(&mut self, first: u32, last: u32) -> u64 {
        if self.is_full() {
            return 0;
        }
        if u64::from(last - first) + 1 == GRANULE {
            // Without 64 containers that would be made to be thrown away: a long range is made of such.
            let new = GRANULE - self.count;
            *self = Self { count: GRANULE, ..Self::default() };
            return new;
        }
        let new = if first == last { u64::from(self.bits.insert(first)) } else { self.bits.insert_range(first..=last) };
        self.count += new;
        self.inserts += 1;
        self.tidy(self.inserts >= TIDY);
        new
    }

    fn union(&mut self, other: &Granule) -> u64 {
        if self.is_full() {
            return 0;
        }
        let before = self.count;
        if other.is_full() {
            self.count = GRANULE;
        } else {
            self.bits |= &other.bits;
            self.count = self.bits.len();
        }
        self.tidy(true);
        self.count - before
    }

    fn tidy(&mut self, compact: bool) {
        if self.is_full() {
            self.bits = RoaringBitmap::new();
        } else if compact {
            self.inserts = 0;
            self.bits.optimize();
        }
    }

    /// How many of `first..=last` are in.
    fn count_range(&self, first: u32, last: u32) -> u64 {
        if self.is_full() { u64::from(last - first) + 1 } else { self.bits.range_cardinality(first..=last) }
    }

    fn iter_from(&self, first: u32) -> impl Iterator<Item = u32> + '_ {
        let all = if self.is_full() { first..GRANULE as u32 } else { 0..0 };
        all.chain(self.bits.range(first..))
    }
}

/// Granule and place in it.
fn split(block: u64) -> (u64, u32) {
    (block >> SHIFT, (block & (GRANULE - 1)) as u32)
}

/// The granules of a range, each with its first and last place. A range that would end past `u64::MAX` ends there.
fn parts(block: u64, count: u64) -> impl Iterator<Item = (u64, u32, u32)> {
    let end = block.saturating_add(count);
    let mut at = block;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (granule, first) = split(at);
        let blocks = (GRANULE - u64::from(first)).min(end - at);
        at += blocks;
        Some((granule, first, first + (blocks - 1) as u32))
    })
}

impl Touched {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a block; answers whether it was new.
    pub fn insert(&mut self, block: u64) -> bool {
        let (granule, at) = split(block);
        let new = self.granules.entry(granule).or_default().insert_range(at, at);
        self.len += new;
        new > 0
    }

    /// Adds a range; answers how many blocks of it were new.
    pub fn insert_range(&mut self, block: u64, count: u64) -> u64 {
        let mut new = 0;
        for (granule, first, last) in parts(block, count) {
            new += self.granules.entry(granule).or_default().insert_range(first, last);
        }
        self.len += new;
        new
    }

    /// Takes a range out; answers how many blocks of it were in.
    pub fn remove_range(&mut self, block: u64, count: u64) -> u64 {
        let mut gone = 0;
        for (number, first, last) in parts(block, count) {
            let Some(granule) = self.granules.get_mut(&number) else { continue };
            if granule.is_full() {
                granule.bits.insert_range(0..=(GRANULE - 1) as u32);
            }
            let removed = granule.bits.remove_range(first..=last);
            granule.count -= removed;
            gone += removed;
            if granule.count == 0 {
                self.granules.remove(&number);
            } else {
                granule.tidy(false);
            }
        }
        self.len -= gone;
        gone
    }

    /// Whether a block is in.
    pub fn contains(&self, block: u64) -> bool {
        let (granule, at) = split(block);
        self.granules.get(&granule).is_some_and(|granule| granule.is_full() || granule.bits.contains(at))
    }

    /// Whether all of a range is in (an empty range is).
    pub fn contains_all(&self, block: u64, count: u64) -> bool {
        parts(block, count).all(|(granule, first, last)| {
            let granule = self.granules.get(&granule);
            granule.is_some_and(|granule| granule.is_full() || granule.bits.contains_range(first..=last))
        })
    }

    /// Whether any block of a range is in.
    pub fn contains_any(&self, block: u64, count: u64) -> bool {
        self.iter_from(block).next().is_some_and(|first| first - block < count)
    }

    /// How many blocks of a range are not in.
    pub fn missing(&self, block: u64, count: u64) -> u64 {
        if count == 1 {
            return u64::from(!self.contains(block));
        }
        let missing = |(granule, first, last): (u64, u32, u32)| {
            let present = self.granules.get(&granule).map_or(0, |granule| granule.count_range(first, last));
            u64::from(last - first) + 1 - present
        };
        parts(block, count).map(missing).sum()
    }

    /// Adds another set.
    pub fn union(&mut self, other: &Touched) {
        for (number, granule) in &other.granules {
            self.len += self.granules.entry(*number).or_default().union(granule);
        }
    }

    /// Number of blocks.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no block is in.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All blocks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.iter_from(0)
    }

    /// The blocks from `block` on, ascending.
    pub fn iter_from(&self, block: u64) -> impl Iterator<Item = u64> + '_ {
        let (start, at) = split(block);
        self.granules.range(start..).flat_map(move |(&number, granule)| {
            let first = if number == start { at } else { 0 };
            granule.iter_from(first).map(move |at| (number << SHIFT) + u64::from(at))
        })
    }

    /// Estimate of the memory in use, bytes.
    pub fn bytes(&self) -> usize {
        let granule = |granule: &Granule| {
            let s = granule.bits.statistics();
            // (The crate counts its 2-byte arrays as of 4 bytes, and its bitmaps in bits.)
            let content =
                s.n_bytes_array_containers / 2 + s.n_bytes_run_containers + u64::from(s.n_bitset_containers) * 8192;
            content as usize + s.n_containers as usize * 64 + (size_of::<Granule>() + 8) * 3 / 2
        };
        self.granules.values().map(granule).sum()
    }
}
