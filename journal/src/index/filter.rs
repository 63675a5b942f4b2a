//! Which blocks a run may hold, in memory: a Bloom filter (Bloom 1970), so that of the many runs of a log that is not merged yet, one for each full
//! segment, a lookup reads a page of hardly more than those that have the block.

use crate::format::IndexEntry;
use crate::types::Instant;

/// Bits for an entry, and probes for a lookup: 1 lookup in 400 reads a run in vain.
const BITS_PER_ENTRY: u64 = 16;
const PROBES: u32 = 4;
/// No more memory than for so many, whatever a footer claims: beyond it the filter only gets worse.
const ENTRIES_MAX: u64 = 1 << 22;

/// See the module's text. Two bytes for each entry.
#[derive(Debug)]
pub struct Filter {
    words: Box<[u64]>,
    /// Some entry stands for more than one block: those are not in the bits.
    extents: bool,
    /// The oldest instant of an entry.
    oldest: u64,
}

impl Filter {
    /// A filter for about so many entries.
    pub fn new(entries: u64) -> Self {
        let words = (entries.min(ENTRIES_MAX) * BITS_PER_ENTRY).div_ceil(64).max(1);
        Self { words: vec![0; words as usize].into(), extents: false, oldest: u64::MAX }
    }

    /// A filter of these entries.
    pub fn of<'a>(entries: impl ExactSizeIterator<Item = &'a IndexEntry>) -> Self {
        let mut filter = Self::new(entries.len() as u64);
        entries.for_each(|entry| filter.insert(entry));
        filter
    }

    /// Adds an entry.
    pub fn insert(&mut self, entry: &IndexEntry) {
        self.oldest = self.oldest.min(entry.instant.get());
        if entry.level() > 0 {
            self.extents = true;
            return;
        }
        for bit in self.bits(entry.block.get()) {
            self.words[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    /// Whether there may be an entry for the block at or before an instant. `false` is certain.
    pub fn may_hold(&self, block: u64, upto: Instant) -> bool {
        let has = |bit: u64| self.words[(bit / 64) as usize] & (1 << (bit % 64)) != 0;
        self.oldest <= upto.0 && (self.extents || self.bits(block).all(has))
    }

    /// Double hashing (Kirsch and Mitzenmacher 2006).
    fn bits(&self, block: u64) -> impl Iterator<Item = u64> + use<> {
        let bits = self.words.len() as u64 * 64;
        let first = mix(block);
        let step = mix(first) | 1;
        (0..PROBES).map(move |i| {
            let hash = first.wrapping_add(step.wrapping_mul(u64::from(i)));
            // A fixed-point multiplication instead of a division.
            ((u128::from(hash) * u128::from(bits)) >> 64) as u64
        })
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::EntryKind;

    fn entry(level: u8, block: u64, instant: u64) -> IndexEntry {
        IndexEntry::extent(EntryKind::Zero, level, block, Instant(instant))
    }

    #[test]
    fn what_is_in_is_never_denied_and_what_is_not_is_seldom_claimed() {
        // Blocks in order, in strides, and scattered: what guests write.
        for pattern in [|i: u64| i, |i: u64| i * 1024, |i: u64| i.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 24] {
            let entries: Vec<_> = (0..4000).map(|i| entry(0, pattern(2 * i), 5)).collect();
            let filter = Filter::of(entries.iter());
            assert!(entries.iter().all(|e| filter.may_hold(e.block.get(), Instant(5))));
            let claimed = (0..4000).filter(|i| filter.may_hold(pattern(2 * i + 1), Instant(5))).count();
            assert!(claimed < 30, "{claimed} of 4000 claimed in vain");
        }
    }

    #[test]
    fn an_extent_or_an_instant_decides_alone() {
        let mut filter = Filter::new(10);
        filter.insert(&entry(0, 7, 50));
        assert!(!filter.may_hold(7, Instant(49)), "all of it is newer");
        assert!(filter.may_hold(7, Instant(50)));
        filter.insert(&entry(2, 256, 60));
        assert!(filter.may_hold(300, Instant(60)), "inside an extent that is not looked up block by block");
    }
}
