//! The overlay of a log: the newest version of each block that is not on the primary yet, and the order in which they became so.
//! Beside it, a small map of block ranges for discard hints.
//!
//! Invariants:
//! * Entries never overlap. A data entry is one block; a zero entry is a range.
//! * Each entry is `queued` (a range of the queue covers it) or part of the batch that is being destaged.
//! * The queue is sorted by instant, so its front tells the oldest write that the primary lacks.

use std::collections::{BTreeMap, VecDeque};

use crate::buf::{IoBuf, Slice};
use crate::frame;
use crate::types::{BLOCK, Instant, SECTOR, SECTORS_PER_BLOCK};

/// Bytes that a range of zeroes counts for: its entry, its place in the queue and their share of a tree's nodes, rounded up.
pub const RANGE_BYTES: u64 = 256;

/// See [`Overlay::note_left`].
const LEFT_BYTES: u64 = 8 << 20;

/// What an overlay entry holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// One block; only the sectors of the mask count.
    Data(Slice, u8),
    /// All sectors are zero.
    Zero,
}

#[derive(Clone, Debug)]
struct Entry {
    count: u64,
    content: Content,
    instant: Instant,
    queued: bool,
}

/// A range that waits for the destager.
#[derive(Clone, Copy, Debug)]
struct Dirty {
    block: u64,
    count: u64,
    instant: Instant,
}

/// Something to destage.
#[derive(Clone, Debug)]
pub struct Item {
    /// First block.
    pub block: u64,
    /// Blocks.
    pub count: u64,
    /// What to write.
    pub content: Content,
    /// Of the version that was taken.
    pub instant: Instant,
}

/// What the destager took.
#[derive(Default, Debug)]
pub struct Batch {
    /// Sorted by block, not overlapping.
    pub items: Vec<Item>,
    /// Oldest write that is not on the primary before this batch is.
    pub oldest: Option<Instant>,
    /// Newest version taken.
    pub newest: Instant,
}

/// See the module's text.
#[derive(Default)]
pub struct Overlay {
    entries: BTreeMap<u64, Entry>,
    queue: VecDeque<Dirty>,
    /// Oldest instants of the batches under way, in the order in which they were taken.
    taken: VecDeque<Option<Instant>>,
    data_blocks: u64,
    /// Bytes of blocks that left since buffers were last looked at ([`Overlay::note_left`]), of those that share a buffer with others.
    left: u64,
}

impl Overlay {
    /// Bytes of memory held: data, and what ranges of zeroes take ([`RANGE_BYTES`] each, or each request that waits, where those are more).
    pub fn bytes(&self) -> u64 {
        let ranges = (self.entries.len() as u64).max(self.queue.len() as u64).saturating_sub(self.data_blocks);
        self.data_blocks * BLOCK + ranges * RANGE_BYTES
    }

    /// A block of a request of many goes: its memory stays as long as another block of that request. Where such leftovers may have come to [`LEFT_BYTES`], and to half of
    /// what is held, blocks that keep more than twice their share alive move to buffers of their own. So no more memory is taken than 2.5 times [`Overlay::bytes`] and
    /// that, whatever overlaps what. A walk over all entries for so many bytes, and no cost for requests of one block.
    fn note_left(&mut self, old: &Slice) {
        if old.is_whole() {
            return;
        }
        self.left += BLOCK;
        if self.left < LEFT_BYTES.max(self.bytes() / 2) {
            return;
        }
        self.left = 0;
        for entry in self.entries.values_mut() {
            if let Content::Data(data, _) = &mut entry.content
                && data.keeps_more_than(2)
            {
                *data = IoBuf::copy_of(data).share();
            }
        }
    }

    /// Nothing in it and nothing being destaged.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.taken.is_empty()
    }

    /// Whether something waits for the destager.
    pub fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The oldest write that is not on the primary yet.
    pub fn oldest(&self) -> Option<Instant> {
        let queued = self.queue.front().map(|dirty| dirty.instant);
        self.taken.iter().copied().flatten().chain(queued).min()
    }

    /// A write of `sectors` sectors from `sector`; `data` holds the blocks it touches, whole.
    pub fn insert_data(&mut self, sector: u64, sectors: u64, data: &Slice, instant: Instant) {
        let first = sector / SECTORS_PER_BLOCK;
        let mut needs_queue = false;
        let mut last = first;
        frame::for_each_block(sector, sectors, |block, mask| {
            let bytes = data.slice(((block - first) * BLOCK) as usize, BLOCK as usize);
            needs_queue |= self.insert_block(block, bytes, mask, instant);
            last = block;
        });
        if needs_queue {
            self.queue.push_back(Dirty { block: first, count: last - first + 1, instant });
        }
    }

    /// Zeroes over `sectors` sectors from `sector`.
    pub fn insert_zero(&mut self, sector: u64, sectors: u64, instant: Instant) {
        let cut = frame::cut(sector, sectors);
        for (block, mask) in cut.partial.into_iter().flatten() {
            let zeroes = IoBuf::zeroed(BLOCK as usize).share();
            if self.insert_block(block, zeroes, mask, instant) {
                self.queue.push_back(Dirty { block, count: 1, instant });
            }
        }
        let (block, count) = cut.whole;
        if count > 0 {
            self.carve(block, count);
            self.entries.insert(block, Entry { count, content: Content::Zero, instant, queued: true });
            self.queue.push_back(Dirty { block, count, instant });
        }
    }

    /// Answers whether the block must be queued.
    fn insert_block(&mut self, block: u64, data: Slice, mask: u8, instant: Instant) -> bool {
        if let Some(entry) = self.entries.get_mut(&block)
            && let Content::Data(old, old_mask) = &mut entry.content
        {
            let new = if mask == 0xFF { data } else { compose(old, &data, mask) };
            let old = std::mem::replace(old, new);
            *old_mask |= mask;
            entry.instant = instant;
            let queued = std::mem::replace(&mut entry.queued, true);
            self.note_left(&old);
            return !queued;
        }
        let (data, mask, queued) = match self.find(block) {
            // Inside a zero range: the rest of the block is zero too.
            Some((_, entry)) => {
                let queued = entry.queued;
                let zeroes = IoBuf::zeroed(BLOCK as usize).share();
                let whole = if mask == 0xFF { data } else { compose(&zeroes, &data, mask) };
                self.carve(block, 1);
                (whole, 0xFF, queued)
            }
            None => (data, mask, false),
        };
        self.data_blocks += 1;
        self.entries.insert(block, Entry { count: 1, content: Content::Data(data, mask), instant, queued: true });
        !queued
    }

    fn find(&self, block: u64) -> Option<(u64, &Entry)> {
        let (start, entry) = self.entries.range(..=block).next_back()?;
        (block < start + entry.count).then_some((*start, entry))
    }

    /// Removes what lies in a range; zero ranges that stick out keep their outer parts.
    fn carve(&mut self, block: u64, count: u64) {
        let end = block + count;
        let first = self.find(block).map_or(block, |(start, _)| start);
        // Most carves hit one entry: collecting the keys costs one small allocation.
        let keys: Vec<u64> = self.entries.range(first..end).map(|(k, _)| *k).collect();
        for key in keys {
            let Some(entry) = self.entries.remove(&key) else { continue };
            if let Content::Data(old, _) = &entry.content {
                self.data_blocks -= 1;
                self.note_left(old);
                continue;
            }
            let entry_end = key + entry.count;
            if key < block {
                self.entries.insert(key, Entry { count: block - key, ..entry.clone() });
            }
            if entry_end > end {
                self.entries.insert(end, Entry { count: entry_end - end, ..entry });
            }
        }
    }

    /// The version of a block.
    pub fn get(&self, block: u64) -> Option<&Content> {
        self.find(block).map(|(_, entry)| &entry.content)
    }

    /// Whether anything lies in a range.
    pub fn intersects(&self, block: u64, count: u64) -> bool {
        self.find(block).is_some() || self.entries.range(block..block + count).next().is_some()
    }

    /// Takes the oldest work: up to about `blocks_max` blocks of data and ranges of zeroes, these of up to `zero_blocks_max` blocks in all.
    /// Batches are completed in the order in which they were taken: of a block that is in two, the later holds the newer version.
    pub fn take(&mut self, blocks_max: u64, zero_blocks_max: u64) -> Batch {
        let mut batch = Batch { oldest: self.queue.front().map(|d| d.instant), ..Batch::default() };
        let (mut items, mut zero_blocks) = (0, 0);
        while items < blocks_max && zero_blocks < zero_blocks_max {
            let Some(dirty) = self.queue.pop_front() else { break };
            let end = dirty.block + dirty.count;
            let mut at = dirty.block;
            while at < end {
                if items >= blocks_max || zero_blocks >= zero_blocks_max {
                    self.queue.push_front(Dirty { block: at, count: end - at, ..dirty });
                    break;
                }
                let Some((start, entry)) = self.first_from(at, end) else { break };
                if !entry.queued {
                    at = start + entry.count;
                    continue;
                }
                let from = start.max(at);
                let until = (start + entry.count).min(end).min(from + (zero_blocks_max - zero_blocks));
                let (content, instant) = (entry.content.clone(), entry.instant);
                match content {
                    Content::Data(..) => {
                        self.entries.get_mut(&start).expect("just found").queued = false;
                    }
                    Content::Zero => {
                        zero_blocks += until - from;
                        self.carve(from, until - from);
                        let taken = Entry { count: until - from, content: Content::Zero, instant, queued: false };
                        self.entries.insert(from, taken);
                    }
                }
                items += 1;
                batch.newest = batch.newest.max(instant);
                batch.items.push(Item { block: from, count: until - from, content, instant });
                at = until;
            }
        }
        batch.items.sort_unstable_by_key(|item| item.block);
        if batch.items.is_empty() {
            batch.oldest = None;
        }
        self.taken.push_back(batch.oldest);
        batch
    }

    fn first_from(&self, at: u64, end: u64) -> Option<(u64, &Entry)> {
        self.find(at).or_else(|| self.entries.range(at..end).next().map(|(start, entry)| (*start, entry)))
    }

    /// The batch that was taken first is durable on the primary: versions that are still the newest leave.
    pub fn complete(&mut self, batch: &Batch) {
        for item in &batch.items {
            let mut at = item.block;
            let end = item.block + item.count;
            while at < end {
                let Some((start, entry)) = self.first_from(at, end) else { break };
                let (count, instant, queued) = (entry.count, entry.instant, entry.queued);
                if instant == item.instant && !queued {
                    let from = start.max(at);
                    self.carve(from, (start + count).min(end) - from);
                }
                at = start + count;
            }
        }
        self.taken.pop_front();
    }

    /// The batch that was taken last could not be brought to the primary: what it took waits again, ahead of everything else.
    pub fn put_back(&mut self, batch: &Batch) {
        self.taken.pop_back();
        // A version of this batch may stand for an older one in a batch that is still under way, and may come back with this one.
        let oldest = self.taken.iter().copied().flatten().chain(batch.oldest).min();
        let mut again = Vec::new();
        for item in &batch.items {
            let (mut at, end) = (item.block, item.block + item.count);
            while at < end {
                let Some((start, entry)) = self.first_from(at, end) else { break };
                let next = start + entry.count;
                // One that is queued since counts as old as what it replaced: only it can bring that to the primary.
                again.push(Dirty { block: start, count: entry.count, instant: oldest.unwrap_or(item.instant) });
                self.entries.get_mut(&start).expect("just found").queued = true;
                at = next;
            }
        }
        for dirty in again.into_iter().rev() {
            self.queue.push_front(dirty);
        }
    }

    /// Every version, for the way out when the CDP disk is lost: sorted by block.
    pub fn everything(&self) -> Vec<Item> {
        self.entries
            .iter()
            .map(|(block, e)| Item { block: *block, count: e.count, content: e.content.clone(), instant: e.instant })
            .collect()
    }

    /// Completes a partial version with the sectors that it lacks (recovery: the primary's copy may be damaged).
    pub fn fill(&mut self, block: u64, base: &[u8]) {
        if let Some(Entry { content: Content::Data(data, mask), .. }) = self.entries.get_mut(&block)
            && *mask != 0xFF
        {
            let base = IoBuf::copy_of(base).share();
            *data = compose(&base, data, *mask);
            *mask = 0xFF;
        }
    }

    /// Blocks whose version is partial.
    pub fn partial_blocks(&self) -> Vec<u64> {
        self.entries
            .iter()
            .filter(|(_, e)| matches!(e.content, Content::Data(_, mask) if mask != 0xFF))
            .map(|(block, _)| *block)
            .collect()
    }

    /// Forgets the order: for a scratch overlay, which is never destaged.
    pub fn forget_queue(&mut self) {
        self.queue.clear();
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// `base` with the sectors of `mask` taken from `data`.
pub fn compose(base: &[u8], data: &[u8], mask: u8) -> Slice {
    let mut buf = IoBuf::copy_of(base);
    copy_sectors(&mut buf, data, mask);
    buf.share()
}

/// Copies the sectors of `mask` from one block to another.
pub fn copy_sectors(to: &mut [u8], from: &[u8], mask: u8) {
    if mask == 0xFF {
        to[..BLOCK as usize].copy_from_slice(&from[..BLOCK as usize]);
        return;
    }
    for sector in (0..SECTORS_PER_BLOCK as usize).filter(|s| mask & (1 << s) != 0) {
        let at = sector * SECTOR as usize;
        to[at..at + SECTOR as usize].copy_from_slice(&from[at..at + SECTOR as usize]);
    }
}

/// Ranges of blocks, each with an instant. Later ranges replace what they overlap.
#[derive(Default, Clone)]
pub struct ExtentMap {
    ranges: BTreeMap<u64, (u64, Instant)>,
}

impl ExtentMap {
    /// Adds a range.
    pub fn insert(&mut self, block: u64, count: u64, instant: Instant) {
        if count == 0 {
            return;
        }
        self.remove(block, count);
        // Neighbours of the same instant grow together, so a split request leaves one range.
        let mut start = block;
        let mut end = block + count;
        if let Some((&s, &(c, i))) = self.ranges.range(..block).next_back()
            && s + c == block
            && i == instant
        {
            self.ranges.remove(&s);
            start = s;
        }
        if let Some(&(c, i)) = self.ranges.get(&end)
            && i == instant
        {
            self.ranges.remove(&end);
            end += c;
        }
        self.ranges.insert(start, (end - start, instant));
    }

    /// Takes a range out.
    pub fn remove(&mut self, block: u64, count: u64) {
        self.cut(block, count, true);
    }

    /// Takes a range out. Where one of those in it would be two pieces behind that, and may not be split, the shorter piece goes, too.
    pub fn cut(&mut self, block: u64, count: u64, may_split: bool) {
        if self.ranges.is_empty() || count == 0 {
            return;
        }
        let end = block + count;
        let first =
            self.ranges.range(..=block).next_back().filter(|(s, (c, _))| **s + c > block).map_or(block, |(s, _)| *s);
        let keys: Vec<u64> = self.ranges.range(first..end).map(|(s, _)| *s).collect();
        for key in keys {
            let Some((count, instant)) = self.ranges.remove(&key) else { continue };
            let (before, behind) = (block.saturating_sub(key), (key + count).saturating_sub(end));
            if before > 0 && (may_split || before >= behind) {
                self.ranges.insert(key, (before, instant));
            }
            if behind > 0 && (may_split || behind > before) {
                self.ranges.insert(end, (behind, instant));
            }
        }
    }

    /// Takes out every range of an instant at or after `since`.
    pub fn remove_since(&mut self, since: Instant) {
        self.ranges.retain(|_, (_, instant)| *instant < since);
    }

    /// The ranges: first block, blocks, instant.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, Instant)> + '_ {
        self.ranges.iter().map(|(s, (c, i))| (*s, *c, *i))
    }

    /// Ranges in it.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// The first range, if any: it is not in it any more.
    pub fn pop_first(&mut self) -> Option<(u64, u64)> {
        self.ranges.pop_first().map(|(start, (count, _))| (start, count))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Nothing in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Bytes of all buffers that something in the overlay keeps alive.
    fn kept(overlay: &Overlay) -> u64 {
        let slices = overlay.entries.values().filter_map(|entry| match &entry.content {
            Content::Data(data, _) => Some(data.buffer()),
            Content::Zero => None,
        });
        slices.collect::<HashMap<_, _>>().values().map(|len| *len as u64).sum()
    }

    /// Goal: what a backlog keeps in memory is bound to what it counts, however requests overlap.
    /// Method: requests of 1 MiB, each one block further, so that each leaves one block of the one before; the same from the end, with zeroes, and as a batch takes the
    /// blocks between.
    #[test]
    fn a_block_that_is_left_of_a_large_request_does_not_keep_all_of_it() {
        const BLOCKS: u64 = 256;
        let bound = |overlay: &Overlay| overlay.bytes() * 5 / 2 + LEFT_BYTES + 2 * BLOCKS * BLOCK;
        let sectors = |blocks: u64| blocks * SECTORS_PER_BLOCK;
        let request = |byte: u8| {
            let mut buf = IoBuf::zeroed((BLOCKS * BLOCK) as usize);
            buf.fill(byte);
            buf.share()
        };
        let (mut forth, mut back, mut zeroed, mut taken) =
            (Overlay::default(), Overlay::default(), Overlay::default(), Overlay::default());
        for number in 0..600 {
            let (byte, instant) = (number as u8, Instant(number + 1));
            forth.insert_data(sectors(number), sectors(BLOCKS), &request(byte), instant);
            back.insert_data(sectors(1200 - number), sectors(BLOCKS), &request(byte), instant);
            zeroed.insert_data(sectors(number * BLOCKS), sectors(BLOCKS), &request(byte), instant);
            zeroed.insert_zero(sectors(number * BLOCKS + 1), sectors(BLOCKS - 1), instant);
            taken.insert_data(sectors(number * BLOCKS), sectors(BLOCKS), &request(byte), instant);
            let batch = taken.take(BLOCKS - 1, 1);
            taken.complete(&batch);
            for overlay in [&forth, &back, &zeroed, &taken] {
                assert!(kept(overlay) <= bound(overlay), "{} kept, {} counted", kept(overlay), overlay.bytes());
            }
        }
        let byte_at = |overlay: &Overlay, block: u64| match overlay.get(block) {
            Some(Content::Data(data, 0xFF)) => Some(data[0]),
            _ => None,
        };
        for number in 0..600 {
            assert_eq!(byte_at(&forth, number), Some(number as u8), "block {number}");
            assert_eq!(byte_at(&back, 1200 - number + BLOCKS - 1), Some(number as u8), "from the end, {number}");
            assert_eq!(byte_at(&zeroed, number * BLOCKS), Some(number as u8), "beside zeroes, {number}");
        }
    }
}
