//! Walking an index run: every page, every order, every count.

use zerocopy::FromBytes;

use super::source::{Layout, Source, Tally};
use crate::format::{ChildEntry, EntryKind, IndexEntry, IndexPageHeader, RunRoot, StreamKind, crc};
use crate::types::BLOCK;

/// No run is higher: 127^10 entries are more than 2^64.
const HEIGHT_MAX: u32 = 9;
/// The highest level whose area (`16^level` blocks) is less than the whole address space.
const LEVEL_MAX: u8 = 15;

/// Sort key of entries: level, block, instant.
type Key = (u8, u64, u64);

/// Something is wrong with a run.
pub(super) struct RunError {
    /// Segment and block of the page.
    pub at: (u32, u32),
    /// The page is not there or not whole, as a power cut may leave one that was not synced.
    pub torn: bool,
    pub what: String,
}

/// Which run, and what its pages have to be.
pub(super) struct RunOf<'a> {
    pub root: &'a RunRoot,
    pub log_id: u64,
    pub kind: StreamKind,
    /// Whether a page of it may lie there.
    pub allowed: &'a dyn Fn(u32, u32) -> bool,
}

/// Walks a run in order and hands out its leaf entries. The order is strict, so no page is reached twice and the walk ends on any bytes.
pub(super) fn walk(
    source: &mut Source,
    layout: &Layout,
    run: &RunOf<'_>,
    tally: &mut Tally,
    on_entry: &mut dyn FnMut(&mut Source, &IndexEntry) -> Result<(), String>,
) -> Result<(), RunError> {
    let root = run.root;
    let root_at = (root.segment.get(), root.block.get());
    let fail = |at, what: &str| Err(RunError { at, torn: false, what: what.to_owned() });
    if root.entries.get() == 0 {
        return if *root == RunRoot::default() { Ok(()) } else { fail(root_at, "root of an empty run is not zero") };
    }
    if root.height.get() > HEIGHT_MAX {
        return fail(root_at, "height of the root is impossible");
    }
    let mut stack: Vec<std::vec::IntoIter<ChildEntry>> = Vec::new();
    let mut next = Some((root_at, root.height.get() as u8, root.crc.get(), None));
    let (mut entries, mut levels, mut last) = (0u64, 0u32, None::<Key>);
    loop {
        let Some((at, height, sum, first)) = next.take() else {
            let Some(children) = stack.last_mut() else { break };
            let Some(child) = children.next() else {
                stack.pop();
                continue;
            };
            let height = root.height.get() as u8 - stack.len() as u8;
            let at = (child.segment.get(), u32::from(child.page.get()));
            next =
                Some((at, height, child.crc.get(), Some((child.level >> 4, child.block.get(), child.instant.get()))));
            continue;
        };
        let page = read_page(source, layout, run, at, height, sum, tally)?;
        if height > 0 {
            let children: Vec<ChildEntry> = items(&page);
            let keys: Vec<Key> = children.iter().map(|c| (c.level >> 4, c.block.get(), c.instant.get())).collect();
            if !keys.is_sorted_by(|a, b| a < b) {
                return fail(at, "children of an index page are out of order");
            }
            if first.is_some_and(|first| keys.first() != Some(&first)) {
                return fail(at, "first key of an index page is not what its parent says");
            }
            stack.push(children.into_iter());
            continue;
        }
        for (i, entry) in items::<IndexEntry>(&page).iter().enumerate() {
            let key = (entry.kind_level >> 4, entry.block.get(), entry.instant.get());
            if let Err(what) = sound(entry, run.kind) {
                return fail(at, what);
            }
            if last.is_some_and(|last| key <= last) {
                return fail(at, "index entries are out of order");
            }
            if i == 0 && first.is_some_and(|first| first != key) {
                return fail(at, "first key of an index page is not what its parent says");
            }
            last = Some(key);
            entries += 1;
            levels |= 1 << key.0;
            tally.index_entries += 1;
            on_entry(source, entry).map_err(|what| RunError { at, torn: false, what })?;
        }
    }
    if entries != root.entries.get() {
        return fail(root_at, &format!("run has {entries} entries, its root says {}", root.entries.get()));
    }
    if levels != root.levels.get() {
        return fail(root_at, &format!("run has levels {levels:#x}, its root says {:#x}", root.levels.get()));
    }
    Ok(())
}

fn read_page(
    source: &mut Source,
    layout: &Layout,
    run: &RunOf<'_>,
    at: (u32, u32),
    height: u8,
    sum: u32,
    tally: &mut Tally,
) -> Result<Vec<u8>, RunError> {
    let fail = |what: String| RunError { at, torn: false, what };
    if !(run.allowed)(at.0, at.1) {
        return Err(fail("pointer to an index page leads out of the log".into()));
    }
    let page =
        source.block(layout.geometry.at(at.0, at.1)).map_err(|e| fail(format!("index page cannot be read: {e}")))?;
    let Ok((head, _)) = IndexPageHeader::read_from_prefix(&page) else {
        return Err(fail("index page is too short".into()));
    };
    let torn = |what: &str| Err(RunError { at, torn: true, what: format!("index page {what}") });
    if head.magic.get() != IndexPageHeader::MAGIC {
        return torn("is none");
    }
    if head.crc.get() != crc(&page[8..]) {
        return torn("has a wrong checksum");
    }
    if head.crc.get() != sum {
        return torn("is not the one that its parent names");
    }
    let what = if head.log_id.get() != run.log_id {
        "belongs to another log"
    } else if head.kind != run.kind as u8 {
        "is of the other kind"
    } else if head.height != height {
        "has a wrong height"
    } else if head.count.get() == 0 || usize::from(head.count.get()) > IndexPageHeader::ENTRIES {
        "has an impossible number of entries"
    } else {
        tally.index_pages += 1;
        tally.bytes += BLOCK;
        return Ok(page);
    };
    Err(fail(format!("index page {what}")))
}

/// The items of a page whose head was checked.
fn items<T: FromBytes>(page: &[u8]) -> Vec<T> {
    let head = size_of::<IndexPageHeader>();
    let count = usize::from(u16::from_le_bytes([page[16], page[17]]));
    page[head..].chunks_exact(32).take(count).filter_map(|bytes| T::read_from_bytes(bytes).ok()).collect()
}

/// Whether an entry is possible in itself.
fn sound(entry: &IndexEntry, kind: StreamKind) -> Result<(), &'static str> {
    let level = entry.kind_level >> 4;
    let Some(entry_kind) = EntryKind::from_byte(entry.kind_level & 15) else {
        return Err("index entry of an unknown kind");
    };
    let of = match entry_kind {
        EntryKind::Write | EntryKind::Zero => StreamKind::Writes,
        EntryKind::BeforeData | EntryKind::BeforeZero | EntryKind::BeforeUnreadable => StreamKind::Before,
    };
    if of != kind {
        return Err("index entry of the other kind");
    }
    if kind == StreamKind::Before && (entry.instant.get() != 0 || entry.mask != 0xff) {
        return Err("index entry of a before-image with an instant or a partial mask");
    }
    if level > 0 && (has_payload(entry) || entry.mask != 0xff) {
        return Err("index entry above level 0 that cannot be there");
    }
    if level > LEVEL_MAX || entry.block.get() & ((1u64 << (4 * u32::from(level))) - 1) != 0 {
        return Err("index entry that is not aligned to its level");
    }
    if entry.mask == 0 {
        return Err("index entry without sectors");
    }
    // The engine takes none of these either.
    if entry.mask != 0xff && entry.instant.get() == 0 {
        return Err("index entry of some sectors without an instant");
    }
    Ok(())
}

/// Whether an entry points to a payload block.
pub(super) fn has_payload(entry: &IndexEntry) -> bool {
    matches!(entry.kind_level & 15, 1 | 4)
}

/// Verifies payload blocks that entries name, in batches sorted by place, so that a scattered run is still read forwards.
pub(super) struct PayloadBatch {
    waiting: Vec<(u32, u16, u32)>,
    buf: Vec<u8>,
}

/// Entries of a batch (12 bytes each).
const BATCH: usize = 1 << 17;
/// Blocks of one read.
const READ_BLOCKS: u32 = 256;
/// Blocks between two wanted ones that are read along.
const GAP_BLOCKS: u32 = 16;

impl PayloadBatch {
    pub fn new() -> Self {
        Self { waiting: Vec::new(), buf: Vec::new() }
    }

    /// Adds a block; verifies when the batch is full.
    pub fn push(
        &mut self,
        source: &mut Source,
        layout: &Layout,
        entry: &IndexEntry,
        tally: &mut Tally,
    ) -> Result<(), String> {
        self.waiting.push((entry.segment.get(), entry.page.get(), entry.crc.get()));
        if self.waiting.len() >= BATCH { self.verify(source, layout, tally) } else { Ok(()) }
    }

    /// Verifies what waits.
    pub fn verify(&mut self, source: &mut Source, layout: &Layout, tally: &mut Tally) -> Result<(), String> {
        self.waiting.sort_unstable();
        self.waiting.dedup();
        let list = std::mem::take(&mut self.waiting);
        let mut at = 0;
        while at < list.len() {
            let (segment, first, _) = list[at];
            let mut end = at + 1;
            while end < list.len()
                && list[end].0 == segment
                && list[end].1 - list[end - 1].1 <= GAP_BLOCKS as u16
                && u32::from(list[end].1 - first) < READ_BLOCKS
            {
                end += 1;
            }
            let blocks = usize::from(list[end - 1].1 - first) + 1;
            self.buf.resize(blocks * BLOCK as usize, 0);
            let place = |page: u16| format!("payload block at segment {segment} block {page}");
            source
                .read_into(layout.geometry.at(segment, u32::from(first)), &mut self.buf)
                .map_err(|e| format!("{} cannot be read: {e}", place(first)))?;
            for (_, page, sum) in &list[at..end] {
                let from = usize::from(*page - first) * BLOCK as usize;
                if crc(&self.buf[from..from + BLOCK as usize]) != *sum {
                    return Err(format!("{} has not the checksum that its entry names", place(*page)));
                }
                tally.payload_blocks += 1;
                tally.bytes += BLOCK;
            }
            at = end;
        }
        Ok(())
    }
}
