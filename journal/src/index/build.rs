//! Writing runs: streamed bottom-up, merged from others, or laid out at once in a segment's footer.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::rc::Rc;

use super::entry::Key;
use super::mem::MemIndex;
use super::page::{IndexPage, PageReader, PageSink, encode};
use super::run::{Run, RunCursor};
use crate::buf::IoBuf;
use crate::error::{Error, Result};
use crate::format::{ChildEntry, IndexEntry, IndexPageHeader, RunRoot, StreamKind};
use crate::host::LocalFuture;

/// Most pages of one [`PageSink::append`].
pub const PAGES_PER_APPEND: usize = 16;
/// Entries merged between two yields.
const MERGE_SLICE: u32 = 1024;
/// Entries taken from a [`MemIndex`] at a time.
const MEM_CHUNK: usize = 128;

/// Writes a run. Leaves and inner pages are streamed: what is in memory is one page per height and the pages that wait to be
/// appended. After an error the run is lost (its pages are garbage in the log).
pub struct RunBuilder {
    log_id: u64,
    kind: StreamKind,
    leaf: Vec<IndexEntry>,
    /// Children of the page in the making, per height from 1 on.
    inner: Vec<Vec<ChildEntry>>,
    waiting: Vec<Waiting>,
    last: Option<Key>,
    entries: u64,
    levels: u32,
}

/// A page that has no place yet.
struct Waiting {
    page: IoBuf,
    height: u8,
    first: Key,
    crc: u32,
}

impl RunBuilder {
    /// A builder of an empty run.
    pub fn new(log_id: u64, kind: StreamKind) -> Self {
        Self {
            log_id,
            kind,
            leaf: Vec::with_capacity(IndexPageHeader::ENTRIES),
            inner: Vec::new(),
            waiting: Vec::new(),
            last: None,
            entries: 0,
            levels: 0,
        }
    }

    /// Adds the next entry; keys ascend. When [`is_full`](Self::is_full) answers true after it, [`flush`](Self::flush) is due.
    pub fn push(&mut self, entry: IndexEntry) -> Result<()> {
        let key = entry.key();
        if self.last.is_some_and(|last| key <= last) {
            return Err(Error::invalid("index entry", format!("{key:?}"), "keys of a run ascend"));
        }
        self.last = Some(key);
        self.entries += 1;
        self.levels |= 1 << key.level;
        self.leaf.push(entry);
        if self.leaf.len() == IndexPageHeader::ENTRIES {
            self.close_leaf();
        }
        Ok(())
    }

    /// Whether there are pages enough for an append.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= PAGES_PER_APPEND
    }

    /// Appends the pages that are complete.
    pub async fn flush(&mut self, sink: &mut dyn PageSink) -> Result<()> {
        while !self.waiting.is_empty() {
            let batch: Vec<Waiting> = self.waiting.drain(..self.waiting.len().min(PAGES_PER_APPEND)).collect();
            let mut pages = Vec::with_capacity(batch.len());
            let mut about = Vec::with_capacity(batch.len());
            for Waiting { page, height, first, crc } in batch {
                pages.push(page);
                about.push((height, first, crc));
            }
            let places = sink.append(pages).await?;
            if places.len() != about.len() {
                return Err(Error::invalid("places of index pages", places.len(), format!("{} pages", about.len())));
            }
            for ((height, first, crc), (segment, block)) in about.into_iter().zip(places) {
                let page = u16::try_from(block)
                    .map_err(|_| Error::invalid("block of an index page", block, "at most 65535"))?;
                self.add_child(usize::from(height), ChildEntry::new(first, segment, page, crc));
            }
        }
        Ok(())
    }

    /// Appends what is left and answers where the run hangs.
    pub async fn finish(mut self, sink: &mut dyn PageSink) -> Result<RunRoot> {
        self.close_leaf();
        self.flush(sink).await?;
        // From the bottom up; a height whose only page is known needs none above it.
        let mut height = 0;
        while height < self.inner.len() {
            let top = height + 1 == self.inner.len();
            if let (true, [root]) = (top, &self.inner[height][..]) {
                return Ok(self.root(height as u32, root));
            }
            self.close_inner(height);
            self.flush(sink).await?;
            height += 1;
        }
        Ok(RunRoot::default())
    }

    fn root(&self, height: u32, page: &ChildEntry) -> RunRoot {
        RunRoot {
            entries: self.entries.into(),
            segment: page.segment,
            block: u32::from(page.page.get()).into(),
            height: height.into(),
            levels: self.levels.into(),
            crc: page.crc,
            reserved: 0.into(),
        }
    }

    fn close_leaf(&mut self) {
        if let Some(first) = self.leaf.first().map(IndexEntry::key) {
            let (page, crc) = encode(self.log_id, self.kind, 0, &self.leaf);
            self.waiting.push(Waiting { page, height: 0, first, crc });
            self.leaf.clear();
        }
    }

    /// A page of `height` got its place: `inner[height]` holds the children of the page above it.
    fn add_child(&mut self, height: usize, child: ChildEntry) {
        if self.inner.len() <= height {
            self.inner.push(Vec::with_capacity(IndexPageHeader::ENTRIES));
        }
        self.inner[height].push(child);
        if self.inner[height].len() == IndexPageHeader::ENTRIES {
            self.close_inner(height);
        }
    }

    fn close_inner(&mut self, height: usize) {
        let children = &mut self.inner[height];
        if let Some(first) = children.first().map(ChildEntry::key) {
            let above = height as u8 + 1;
            let (page, crc) = encode(self.log_id, self.kind, above, children);
            self.waiting.push(Waiting { page, height: above, first, crc });
            children.clear();
        }
    }
}

/// What is merged.
pub enum Source {
    /// A run.
    Run(Run),
    /// An index in memory.
    Mem(Rc<MemIndex>),
}

/// Merges sources into one run and answers where it hangs. Of entries with the same key the last source's is kept. Yields about
/// every 1,024 entries, so that the guest's I/O goes on beside it. `reader` reads the sources that are runs.
pub async fn merge(
    sources: Vec<Source>,
    mut builder: RunBuilder,
    sink: &mut dyn PageSink,
    reader: &dyn PageReader,
    yielder: &dyn Fn() -> LocalFuture<'static, ()>,
) -> Result<RunRoot> {
    let count = sources.len();
    let mut feeds: Vec<Feed> = sources.into_iter().map(|source| Feed::new(source, count)).collect();
    let mut next = BinaryHeap::with_capacity(feeds.len());
    for (number, feed) in feeds.iter_mut().enumerate() {
        feed.fill(reader).await?;
        next.extend(feed.head().map(|entry| Reverse((entry.key(), number))));
    }
    // The entry that a later source may still replace.
    let mut held: Option<IndexEntry> = None;
    let mut slice = 0;
    while let Some(&Reverse((key, number))) = next.peek() {
        let feed = &mut feeds[number];
        let entry = feed.take();
        if feed.head().is_none() {
            feed.fill(reader).await?;
        }
        match (feed.head(), next.peek_mut()) {
            (Some(head), Some(mut top)) => *top = Reverse((head.key(), number)),
            (_, Some(top)) => drop(PeekMut::pop(top)),
            (_, None) => {}
        }
        let Some(entry) = entry else { continue };
        if let Some(done) = held.replace(entry).filter(|done| done.key() != key) {
            builder.push(done)?;
            if builder.is_full() {
                builder.flush(sink).await?;
            }
        }
        slice += 1;
        if slice == MERGE_SLICE {
            slice = 0;
            yielder().await;
        }
    }
    if let Some(last) = held {
        builder.push(last)?;
    }
    builder.finish(sink).await
}

/// A source as pages of entries.
struct Feed {
    rest: Rest,
    page: Chunk,
    at: usize,
}

enum Rest {
    Run(Box<RunCursor>),
    Mem(Rc<MemIndex>, Option<Key>),
}

enum Chunk {
    Page(Rc<IndexPage>),
    Entries(Vec<IndexEntry>),
}

impl Feed {
    fn new(source: Source, of: usize) -> Self {
        let rest = match source {
            Source::Run(run) => Rest::Run(Box::new(run.cursor(Key::default()).among(of))),
            Source::Mem(index) => Rest::Mem(index, None),
        };
        Self { rest, page: Chunk::Entries(Vec::new()), at: 0 }
    }

    fn head(&self) -> Option<&IndexEntry> {
        match &self.page {
            Chunk::Page(page) => page.entries().get(self.at),
            Chunk::Entries(entries) => entries.get(self.at),
        }
    }

    fn take(&mut self) -> Option<IndexEntry> {
        let entry = self.head().copied();
        self.at += 1;
        entry
    }

    /// Replaces a page that was taken whole; leaves an empty one at the end.
    async fn fill(&mut self, reader: &dyn PageReader) -> Result<()> {
        (self.page, self.at) = match &mut self.rest {
            Rest::Run(cursor) => match cursor.next_page(reader).await? {
                Some((page, at)) => (Chunk::Page(page), at),
                None => (Chunk::Entries(Vec::new()), 0),
            },
            Rest::Mem(index, after) => {
                let entries: Vec<IndexEntry> = index.iter_after(*after).take(MEM_CHUNK).copied().collect();
                *after = entries.last().map(IndexEntry::key).or(*after);
                (Chunk::Entries(entries), 0)
            }
        };
        Ok(())
    }
}

/// How many pages a run of so many entries has.
pub fn pages_for(entries: usize) -> usize {
    let mut pages = entries.div_ceil(IndexPageHeader::ENTRIES);
    let mut sum = pages;
    while pages > 1 {
        pages = pages.div_ceil(IndexPageHeader::ENTRIES);
        sum += pages;
    }
    sum
}

/// The pages of a run that lie one after the other from `first_block` of a segment on (leaves first, the root last), and where
/// the run hangs. No entries: no pages.
///
/// # Panics
/// When the pages would end past block 65535: no segment has more blocks, so the caller's room for the footer is wrong.
pub fn layout_footer(
    entries: &MemIndex,
    log_id: u64,
    kind: StreamKind,
    segment: u32,
    first_block: u32,
) -> (Vec<IoBuf>, RunRoot) {
    if entries.is_empty() {
        return (Vec::new(), RunRoot::default());
    }
    let mut pages = Vec::with_capacity(pages_for(entries.len()));
    let mut place = |(page, crc): (IoBuf, u32), first: Key| {
        let block = u16::try_from(first_block as usize + pages.len()).expect("a segment has at most 65536 blocks");
        pages.push(page);
        ChildEntry::new(first, segment, block, crc)
    };
    let sorted: Vec<IndexEntry> = entries.iter().copied().collect();
    let leaves = sorted.chunks(IndexPageHeader::ENTRIES);
    let mut row: Vec<ChildEntry> = leaves.map(|leaf| place(encode(log_id, kind, 0, leaf), leaf[0].key())).collect();
    let mut height = 0u8;
    while row.len() > 1 {
        height += 1;
        let parents = row.chunks(IndexPageHeader::ENTRIES);
        row = parents.map(|part| place(encode(log_id, kind, height, part), part[0].key())).collect();
    }
    let root = RunRoot {
        entries: (sorted.len() as u64).into(),
        segment: segment.into(),
        block: u32::from(row[0].page.get()).into(),
        height: u32::from(height).into(),
        levels: entries.levels().into(),
        crc: row[0].crc,
        reserved: 0.into(),
    };
    (pages, root)
}
