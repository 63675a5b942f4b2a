//! Reading a run: point lookups and ordered scans. Each page is checked against what its parent says of it.

use std::collections::VecDeque;
use std::rc::Rc;

use super::entry::{Key, aligned};
use super::page::{IndexPage, PageReader};
use crate::error::{Error, Result};
use crate::format::{ChildEntry, IndexEntry, RunRoot, StreamKind};
use crate::signal::yield_now;
use crate::types::Instant;

/// No run is higher: 127^10 entries are more than 2^64.
const HEIGHT_MAX: u32 = 9;
/// Entries between two yields of a whole scan.
const YIELD_ENTRIES: u32 = 1024;
/// Most leaves that a scan reads at once where they lie one after the other, as in a segment's footer.
const READ_AHEAD: usize = 16;
/// Most leaves that all scans of a merge hold ahead.
const READ_AHEAD_ALL: usize = 1024;

/// An immutable sorted run of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it hangs.
    pub root: RunRoot,
    /// Random id of its log.
    pub log_id: u64,
    /// Kind of its segments.
    pub kind: StreamKind,
}

/// An entry on a leaf.
struct Spot {
    leaf: Rc<IndexPage>,
    at: usize,
}

impl Spot {
    fn entry(&self) -> &IndexEntry {
        &self.leaf.entries()[self.at]
    }
}

impl Run {
    /// Whether it has no entries.
    pub fn is_empty(&self) -> bool {
        self.root.entries == 0
    }

    /// Number of entries.
    pub fn len(&self) -> u64 {
        self.root.entries.get()
    }

    /// The same question as [`MemIndex::lookup`](super::MemIndex::lookup): pushes, newest first, the entries of `block` at or
    /// before `upto` that give a sector that is still set in `missing`, and clears their sectors there. One descent per level
    /// that the run has, and none past the last missing sector.
    pub async fn lookup(
        &self,
        reader: &dyn PageReader,
        block: u64,
        upto: Instant,
        missing: &mut u8,
        out: &mut Vec<IndexEntry>,
    ) -> Result<()> {
        if self.is_empty() || *missing == 0 {
            return Ok(());
        }
        // The newest entry of each level that was not looked at.
        let mut heads: Vec<Spot> = Vec::new();
        let mut levels = self.root.levels.get() & 0xffff;
        while levels != 0 {
            let level = levels.trailing_zeros() as u8;
            levels &= levels - 1;
            let key = Key { level, block: aligned(block, level), instant: upto.0 };
            heads.extend(self.newest(reader, key).await?);
        }
        while *missing != 0 {
            // Of equal instants the lowest level comes first: the narrower statement about the block.
            let newest = (0..heads.len()).rev().max_by_key(|&i| heads[i].entry().instant.get());
            let Some(newest) = newest else { break };
            let entry = *heads[newest].entry();
            entry.contribute(missing, out);
            if *missing == 0 {
                break;
            }
            match self.older(reader, &heads[newest]).await? {
                Some(spot) => heads[newest] = spot,
                None => drop(heads.remove(newest)),
            }
        }
        Ok(())
    }

    /// A scan of the entries from `from` on, by key.
    pub fn cursor(&self, from: Key) -> RunCursor {
        RunCursor {
            run: *self,
            from,
            state: CursorState::Start,
            path: Vec::new(),
            ahead: VecDeque::new(),
            ahead_max: READ_AHEAD,
            last: None,
        }
    }

    /// Calls `each` with every entry, by key; yields now and then.
    pub async fn for_each(&self, reader: &dyn PageReader, mut each: impl FnMut(&IndexEntry)) -> Result<()> {
        let mut cursor = self.cursor(Key::default());
        let mut n = 0u32;
        while let Some(entry) = cursor.next(reader).await? {
            each(&entry);
            n += 1;
            if n.is_multiple_of(YIELD_ENTRIES) {
                yield_now().await;
            }
        }
        Ok(())
    }

    /// The newest entry of the area `key.block` at level `key.level` that is not newer than `key.instant`.
    async fn newest(&self, reader: &dyn PageReader, key: Key) -> Result<Option<Spot>> {
        let mut page = self.root_page(reader).await?;
        loop {
            let Some(at) = page.count_upto(key).checked_sub(1) else { return Ok(None) };
            if page.height() == 0 {
                let spot = Spot { leaf: page, at };
                let found = spot.entry().key();
                return Ok((found.level == key.level && found.block == key.block).then_some(spot));
            }
            page = self.child_page(reader, &page.children()[at], page.height()).await?;
        }
    }

    /// The next older entry of the same area.
    async fn older(&self, reader: &dyn PageReader, spot: &Spot) -> Result<Option<Spot>> {
        let key = spot.entry().key();
        if let Some(at) = spot.at.checked_sub(1) {
            let older = Spot { leaf: Rc::clone(&spot.leaf), at };
            let found = older.entry().key();
            return Ok((found.level == key.level && found.block == key.block).then_some(older));
        }
        match key.instant.checked_sub(1) {
            Some(instant) => self.newest(reader, Key { instant, ..key }).await,
            None => Ok(None),
        }
    }

    async fn root_page(&self, reader: &dyn PageReader) -> Result<Rc<IndexPage>> {
        let root = &self.root;
        let height = root.height.get();
        if height > HEIGHT_MAX {
            return Err(damaged("index root (height)", root.segment.get(), root.block.get()));
        }
        self.page(reader, root.segment.get(), root.block.get(), root.crc.get(), height as u8, None).await
    }

    async fn child_page(&self, reader: &dyn PageReader, child: &ChildEntry, height: u8) -> Result<Rc<IndexPage>> {
        let (segment, block, crc) = (child.segment.get(), u32::from(child.page.get()), child.crc.get());
        self.page(reader, segment, block, crc, height - 1, Some(child.key())).await
    }

    async fn page(
        &self,
        reader: &dyn PageReader,
        segment: u32,
        block: u32,
        crc: u32,
        height: u8,
        first: Option<Key>,
    ) -> Result<Rc<IndexPage>> {
        let page = match reader.cached(segment, block, crc) {
            Some(page) => page,
            None => reader.page(segment, block, crc).await.map_err(|error| placed(error, segment, block))?,
        };
        self.checked(page, (segment, block), crc, height, first)
    }

    /// A page, if it is the one that its parent means.
    fn checked(
        &self,
        page: Rc<IndexPage>,
        (segment, block): (u32, u32),
        crc: u32,
        height: u8,
        first: Option<Key>,
    ) -> Result<Rc<IndexPage>> {
        let wrong = if page.log_id() != self.log_id {
            "index page (of another log)"
        } else if page.crc() != crc {
            "index page (not the one that was written)"
        } else if page.kind() != self.kind {
            "index page (kind)"
        } else if page.height() != height {
            "index page (height)"
        } else if first.is_some_and(|first| first != page.first_key()) {
            "index page (first key)"
        } else {
            return Ok(page);
        };
        Err(damaged(wrong, segment, block))
    }
}

/// The error of a reader that does not know the place.
fn placed(error: Error, segment: u32, block: u32) -> Error {
    match error {
        Error::Damaged { what, place } if place.is_empty() => damaged(what, segment, block),
        error => error,
    }
}

fn damaged(what: &'static str, segment: u32, block: u32) -> Error {
    Error::Damaged { what, place: format!("segment {segment}, block {block}") }
}

/// An ordered scan of a run. After an error the same call can be made again.
#[derive(Debug)]
pub struct RunCursor {
    run: Run,
    from: Key,
    state: CursorState,
    /// Inner pages above the leaf, each with the next child to visit.
    path: Vec<(Rc<IndexPage>, usize)>,
    /// The next leaves below the last page of `path`, read ahead.
    ahead: VecDeque<Rc<IndexPage>>,
    ahead_max: usize,
    last: Option<Key>,
}

#[derive(Debug)]
enum CursorState {
    Start,
    /// A leaf and its next entry.
    Leaf(Rc<IndexPage>, usize),
    Between,
}

impl RunCursor {
    /// As one of so many scans side by side, which are to hold a bounded number of leaves together.
    pub fn among(mut self, scans: usize) -> Self {
        self.ahead_max = (READ_AHEAD_ALL / scans.max(1)).clamp(1, READ_AHEAD);
        self
    }

    /// The next entry; `None` at the end.
    pub async fn next(&mut self, reader: &dyn PageReader) -> Result<Option<IndexEntry>> {
        loop {
            if let CursorState::Leaf(leaf, at) = &mut self.state {
                if let Some(entry) = leaf.entries().get(*at) {
                    *at += 1;
                    return Ok(Some(*entry));
                }
                self.state = CursorState::Between;
            }
            match self.next_page(reader).await? {
                Some((leaf, at)) => self.state = CursorState::Leaf(leaf, at),
                None => return Ok(None),
            }
        }
    }

    /// The next leaf and its first entry that belongs to the scan; `None` at the end. What [`next`](Self::next) has not answered
    /// of the present leaf comes first.
    pub async fn next_page(&mut self, reader: &dyn PageReader) -> Result<Option<(Rc<IndexPage>, usize)>> {
        if self.run.is_empty() {
            return Ok(None);
        }
        loop {
            let (leaf, at) = match std::mem::replace(&mut self.state, CursorState::Between) {
                CursorState::Leaf(leaf, at) => (leaf, at),
                CursorState::Start => {
                    // Until the descent is done, a repeated call starts it anew.
                    self.state = CursorState::Start;
                    let first = self.descend(reader).await?;
                    self.state = CursorState::Between;
                    first
                }
                CursorState::Between => match self.forward(reader).await? {
                    Some(leaf) => (leaf, 0),
                    None => return Ok(None),
                },
            };
            if at < leaf.entries().len() {
                return Ok(Some((leaf, at)));
            }
        }
    }

    /// To the leaf that holds `from`, if any does.
    async fn descend(&mut self, reader: &dyn PageReader) -> Result<(Rc<IndexPage>, usize)> {
        self.path.clear();
        self.ahead.clear();
        let mut page = self.run.root_page(reader).await?;
        while page.height() > 0 {
            let at = page.count_upto(self.from).saturating_sub(1);
            let child = self.run.child_page(reader, &page.children()[at], page.height()).await?;
            self.path.push((page, at + 1));
            page = child;
        }
        self.last = page.entries().last().map(IndexEntry::key);
        let at = page.count_before(self.from);
        Ok((page, at))
    }

    /// The child at `at` of `page`, which is the last page of the path. Of leaves those behind it are read with it.
    async fn child(&mut self, reader: &dyn PageReader, page: &IndexPage, at: usize) -> Result<Rc<IndexPage>> {
        let child = &page.children()[at];
        let (segment, block, crc) = (child.segment.get(), u32::from(child.page.get()), child.crc.get());
        if self.ahead.is_empty() {
            let neighbours = (block..).zip(&page.children()[at..]).take(self.ahead_max);
            let neighbours = neighbours.take_while(|(block, c)| {
                page.height() == 1 && c.segment == child.segment && u32::from(c.page.get()) == *block
            });
            let crcs: Vec<u32> = neighbours.map(|(_, child)| child.crc.get()).collect();
            if crcs.len() < 2 || reader.cached(segment, block, crc).is_some() {
                return self.run.child_page(reader, child, page.height()).await;
            }
            let pages = reader.pages(segment, block, crcs).await.map_err(|error| placed(error, segment, block))?;
            self.ahead = pages.into();
        }
        match self.ahead.front().cloned() {
            Some(leaf) => self.run.checked(leaf, (segment, block), crc, page.height() - 1, Some(child.key())),
            None => Err(damaged("index page", segment, block)),
        }
    }

    /// To the next leaf.
    async fn forward(&mut self, reader: &dyn PageReader) -> Result<Option<Rc<IndexPage>>> {
        while let Some((page, next)) = self.path.last().map(|(page, next)| (Rc::clone(page), *next)) {
            let Some(child) = page.children().get(next) else {
                self.path.pop();
                continue;
            };
            let (segment, block) = (child.segment.get(), u32::from(child.page.get()));
            let child = self.child(reader, &page, next).await?;
            if self.last.is_some_and(|last| child.first_key() <= last) {
                return Err(damaged("index page (order)", segment, block));
            }
            // Only now: after an error the same page is asked for again.
            self.ahead.pop_front();
            self.path.last_mut().expect("looked at just above").1 += 1;
            if child.height() == 0 {
                self.last = child.entries().last().map(IndexEntry::key);
                return Ok(Some(child));
            }
            self.path.push((child, 0));
        }
        Ok(None)
    }
}
