//! A door to index runs ([`run`]): scans, look-ups, a merge and the offline check, over pages that say whatever the fuzzer says.
//!
//! The pages lie on a CDP disk in memory, so it is the engine's own [`Disk`] that reads them. An input is a byte of wishes (the
//! constants below), a [`RunRoot`], and pages. Each page is four bytes (height, number of entries, kind, odd for another log) and
//! its entries.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::rc::Rc;

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::seal;
use crate::buf::{IoBuf, Slice};
use crate::check;
use crate::disk::Disk;
use crate::engine::InitOptions;
use crate::error::Result;
use crate::format::{ChildEntry, IndexEntry, IndexPageHeader, RunRoot, SEGMENT_MIN, StreamKind};
use crate::host::{Allocation, Device, Host, Identity, LocalFuture};
use crate::index::{Filter, IndexPage, Key, MemIndex, PageCache, PageSink, Run, RunBuilder, Source, merge};
use crate::signal::{block_on, yield_now};
use crate::types::{BLOCK, Instant};

/// Wish: the root and parents name the checksum of the page that lies where they point. (A page's own is always right.)
const CHECKSUMS: u8 = 1;
/// Wish: parents also name its first key, and the root its height.
const KEYS: u8 = 2;
/// Wish: for the block where a page lies, the root and parents give its number in the input, and any number means a page.
const NUMBERS: u8 = 4;
/// Wish: the run is one of before-images.
const BEFORE: u8 = 8;
/// Wish: no page stays in memory.
const NO_CACHE: u8 = 16;

/// Most pages of an input.
const PAGES_MAX: usize = 32;
/// The pages lie at the ends of segments, so many in each: what is read ahead ends with the segment.
const PAGES_PER_SEGMENT: usize = 16;
/// Where they begin in a segment.
const FIRST_BLOCK: u32 = (SEGMENT_MIN / BLOCK) as u32 - PAGES_PER_SEGMENT as u32;
/// Entries that are looked up and searched for.
const QUESTIONS_MAX: usize = 8;
/// Bytes of the disk: segments of the least size, a few more than there have to be.
const DISK: u64 = 16 << 20;
/// Random id of the run's log.
const LOG: u64 = 0x0123_4567_89AB_CDEF;
/// Bytes before the entries of a page, and of an entry.
const HEAD: usize = size_of::<IndexPageHeader>();
const ENTRY: usize = size_of::<IndexEntry>();
/// Byte of a page that says its height.
const HEIGHT: usize = 18;

/// An index run. Answers whether it can be read from its first entry to its last, of which there is at least one.
pub fn run(data: &[u8]) -> bool {
    let Some(tree) = Tree::of(data) else { return false };
    SHELF.with(|shelf| {
        shelf.put(&tree);
        block_on(shelf.read(&tree))
    })
}

/// What an input means.
struct Tree {
    wishes: u8,
    root: RunRoot,
    pages: Vec<Vec<u8>>,
}

impl Tree {
    fn of(data: &[u8]) -> Option<Self> {
        let (wishes, rest) = data.split_first()?;
        let (root, mut rest) = RunRoot::read_from_prefix(rest).ok()?;
        let mut pages = Vec::new();
        while let Some(([height, count, kind, log], behind)) = rest.split_first_chunk::<4>()
            && pages.len() < PAGES_MAX
        {
            let count = usize::from(*count).min(IndexPageHeader::ENTRIES).min(behind.len() / ENTRY);
            let (entries, behind) = behind.split_at(count * ENTRY);
            let head = IndexPageHeader {
                magic: IndexPageHeader::MAGIC.into(),
                crc: 0.into(),
                log_id: (LOG + u64::from(log % 2)).into(),
                count: (count as u16).into(),
                height: *height,
                kind: *kind,
                reserved: [0; 12],
            };
            let mut page = vec![0_u8; BLOCK as usize];
            page[..HEAD].copy_from_slice(head.as_bytes());
            page[HEAD..HEAD + entries.len()].copy_from_slice(entries);
            pages.push(page);
            rest = behind;
        }
        let mut tree = Self { wishes: *wishes, root, pages };
        tree.grant_wishes();
        Some(tree)
    }

    fn wants(&self, wish: u8) -> bool {
        self.wishes & wish != 0
    }

    fn run(&self) -> Run {
        let kind = if self.wants(BEFORE) { StreamKind::Before } else { StreamKind::Writes };
        Run { root: self.root, log_id: LOG, kind }
    }

    fn grant_wishes(&mut self) {
        // From the bottom up: a page's checksum covers those of its children.
        let mut order: Vec<usize> = (0..self.pages.len()).collect();
        order.sort_by_key(|&number| self.pages[number][HEIGHT]);
        for number in order {
            if self.pages[number][HEIGHT] > 0 {
                let children = items::<ChildEntry>(&self.pages[number]);
                let children: Vec<ChildEntry> = children.into_iter().map(|child| self.granted(child)).collect();
                let bytes = children.as_bytes();
                self.pages[number][HEAD..HEAD + bytes.len()].copy_from_slice(bytes);
            }
            seal(&mut self.pages[number], 4, BLOCK as usize);
        }
        let (segment, block) = self.meant(self.root.segment.get(), self.root.block.get());
        let named = self.page_at(segment, block).map(|page| (crc_of(page), u32::from(page[HEIGHT])));
        self.root.segment = segment.into();
        self.root.block = block.into();
        if let Some((crc, height)) = named {
            if self.wants(CHECKSUMS) {
                self.root.crc = crc.into();
            }
            if self.wants(KEYS) {
                self.root.height = height.into();
            }
        }
    }

    fn granted(&self, child: ChildEntry) -> ChildEntry {
        let (segment, block) = self.meant(child.segment.get(), child.page.get().into());
        let mut child = ChildEntry { segment: segment.into(), page: (block as u16).into(), ..child };
        let Some(page) = self.page_at(segment, block) else { return child };
        if self.wants(CHECKSUMS) {
            child.crc = crc_of(page).into();
        }
        // Entries of leaves have their keys where children have theirs.
        if self.wants(KEYS)
            && let Some(first) = items::<ChildEntry>(page).first().copied()
        {
            child = ChildEntry { block: first.block, instant: first.instant, level: first.level & 0xF0, ..child };
        }
        child
    }

    /// The place that is meant by one that the input gives.
    fn meant(&self, segment: u32, block: u32) -> (u32, u32) {
        if self.wants(NUMBERS) && !self.pages.is_empty() {
            place_of(block as usize % self.pages.len())
        } else {
            (segment, block)
        }
    }

    fn page_at(&self, segment: u32, block: u32) -> Option<&[u8]> {
        let number = block.checked_sub(FIRST_BLOCK)? as usize;
        if number >= PAGES_PER_SEGMENT {
            return None;
        }
        self.pages.get(segment as usize * PAGES_PER_SEGMENT + number).map(Vec::as_slice)
    }

    /// What is looked up and searched for: keys, and the sectors that are wanted. All pages have a say, also those out of reach.
    fn questions(&self) -> Vec<(Key, u8)> {
        let entries = self.pages.iter().flat_map(|page| {
            let entries = items::<IndexEntry>(page);
            [entries.first().copied(), entries.last().copied()]
        });
        let questions = entries.flatten().take(QUESTIONS_MAX).flat_map(|entry| {
            let key = entry.key();
            [(key, 0xFF), (Key { block: key.block ^ 1, instant: u64::MAX, ..key }, entry.mask | 1)]
        });
        questions.collect()
    }
}

/// Where a page of an input lies: segment and block.
fn place_of(number: usize) -> (u32, u32) {
    ((number / PAGES_PER_SEGMENT) as u32, FIRST_BLOCK + (number % PAGES_PER_SEGMENT) as u32)
}

/// What a page holds, believed as it is.
fn items<T: FromBytes>(page: &[u8]) -> Vec<T> {
    let count = usize::from(u16::from_le_bytes([page[16], page[17]]));
    page[HEAD..].chunks_exact(ENTRY).take(count).filter_map(|bytes| T::read_from_bytes(bytes).ok()).collect()
}

fn crc_of(page: &[u8]) -> u32 {
    u32::from_le_bytes([page[4], page[5], page[6], page[7]])
}

thread_local! {
    static SHELF: Shelf = Shelf::new();
}

/// A CDP disk in memory, opened once for all inputs of a thread.
struct Shelf {
    memory: Rc<Memory>,
    disk: Rc<Disk>,
    cache: Rc<RefCell<PageCache>>,
}

impl Shelf {
    fn new() -> Self {
        let memory = Rc::new(Memory::default());
        let device: Rc<dyn Device> = Rc::<Memory>::clone(&memory);
        let cache = Rc::new(RefCell::new(PageCache::new(0)));
        let options = InitOptions { segment_size: SEGMENT_MIN, force: true };
        let opened: Result<Rc<Disk>> = block_on(async {
            Disk::init(&device, options, Uuid::from_u128(1), 0).await?;
            let host: Rc<dyn Host> = Rc::new(Idle);
            Disk::open(Rc::clone(&device), "memory".to_owned(), host, 1 << 40, Rc::clone(&cache), 0).await
        });
        Self { memory, disk: opened.expect("a disk in memory"), cache }
    }

    /// Puts the pages of an input in the place of the last one's.
    fn put(&self, tree: &Tree) {
        let geometry = &self.disk.geometry;
        let mut blocks = self.memory.blocks.borrow_mut();
        blocks.retain(|number, _| *number < geometry.segments_at / BLOCK);
        for (number, page) in tree.pages.iter().enumerate() {
            let (segment, block) = place_of(number);
            blocks.insert(geometry.at(segment, block) / BLOCK, page.clone());
        }
        self.cache.replace(PageCache::new(if tree.wants(NO_CACHE) { 0 } else { 1 << 20 }));
    }

    /// Reads the run in every way that there is. Where all of it can be read the answers are those of a plain index.
    async fn read(&self, tree: &Tree) -> bool {
        let (run, disk) = (tree.run(), &*self.disk);
        let (entries, whole) = scan(&run, disk, Key::default()).await;
        let has_level = |entry: &&IndexEntry| (run.root.levels.get() >> entry.level()) & 1 == 1;
        let known: MemIndex = entries.iter().filter(has_level).copied().collect();
        let mut filter = Filter::new(run.len());
        entries.iter().for_each(|entry| filter.insert(entry));
        for (key, wanted) in tree.questions() {
            let (block, upto) = (key.block, Instant(key.instant));
            let found = look_up(&run, disk, block, upto, wanted).await;
            let (behind, to_end) = scan(&run, disk, key).await;
            if !whole {
                continue;
            }
            let (mut missing, mut expected) = (wanted, Vec::new());
            known.lookup(block, upto, &mut missing, &mut expected);
            assert!(expected.is_empty() || filter.may_hold(block, upto), "block {block} at {upto} is denied");
            assert_eq!(found, Some((expected, missing)), "block {block} at {upto}");
            let expected = &entries[entries.partition_point(|entry| entry.key() < key)..];
            assert!(to_end && behind == expected, "from {key:?} on: {behind:?}");
        }
        let mut sink = Sink { pages: 0 };
        let turn = || -> LocalFuture<'static, ()> { Box::pin(yield_now()) };
        let builder = RunBuilder::new(LOG, run.kind);
        match merge(vec![Source::Run(run)], builder, &mut sink, disk, &turn).await {
            Ok(root) => {
                let levels = entries.iter().fold(0_u32, |levels, entry| levels | 1_u32 << entry.level());
                assert!(whole, "a merge of what cannot be read");
                assert_eq!((root.entries.get(), root.levels.get()), (entries.len() as u64, levels));
            }
            Err(error) => assert!(!whole, "{error}"),
        }
        // The offline check wants more of a run than the engine does.
        let reader = Reader { memory: Rc::clone(&self.memory), at: 0 };
        if let Some(checked) = check::whole_run(Box::new(reader), disk.geometry, &run.root, LOG, run.kind) {
            assert!(whole && checked == entries, "the check takes a run of which the engine reads {entries:?}");
        }
        whole && !entries.is_empty()
    }
}

/// The entries from a key on, and whether there was nothing damaged up to the end of the run.
async fn scan(run: &Run, disk: &Disk, from: Key) -> (Vec<IndexEntry>, bool) {
    let mut cursor = run.cursor(from);
    let mut entries: Vec<IndexEntry> = Vec::new();
    loop {
        match cursor.next(disk).await {
            Ok(Some(entry)) => {
                assert!(entries.len() < PAGES_MAX * IndexPageHeader::ENTRIES, "more entries than there are");
                let ascends = entries.last().map_or(entry.key() >= from, |last| last.key() < entry.key());
                assert!(ascends && entry.covers(entry.block.get()), "{entry:?} from {from:?} on");
                entries.push(entry);
            }
            Ok(None) => return (entries, true),
            Err(_) => {
                assert!(cursor.next(disk).await.is_err(), "what is damaged can be read the second time");
                return (entries, false);
            }
        }
    }
}

/// What a look-up finds and which sectors it misses; `None`: it came to something damaged. What it found before that is true, too.
async fn look_up(run: &Run, disk: &Disk, block: u64, upto: Instant, wanted: u8) -> Option<(Vec<IndexEntry>, u8)> {
    let (mut missing, mut found) = (wanted, Vec::new());
    let ended = run.lookup(disk, block, upto, &mut missing, &mut found).await;
    let mut left = wanted;
    for entry in &found {
        assert!(entry.covers(block) && entry.instant.get() <= upto.0, "{entry:?} for block {block} at {upto}");
        assert!(entry.sectors() & left != 0, "{entry:?} adds nothing");
        left &= !entry.sectors();
    }
    assert_eq!(left, missing);
    assert!(found.is_sorted_by(|newer, older| newer.instant.get() >= older.instant.get()), "{found:?}");
    ended.ok().map(|()| (found, missing))
}

/// Takes the pages of a merge, which have to be whole, and keeps none.
struct Sink {
    pages: u32,
}

impl PageSink for Sink {
    fn append(&mut self, pages: Vec<IoBuf>) -> LocalFuture<'_, Result<Vec<(u32, u32)>>> {
        Box::pin(async move {
            let mut places = Vec::with_capacity(pages.len());
            for page in &pages {
                IndexPage::parse(page, Some(LOG)).expect("a page as it is written");
                places.push((0, self.pages));
                self.pages += 1;
            }
            Ok(places)
        })
    }
}

/// A device in memory. Blocks that were never written are zero.
#[derive(Default)]
struct Memory {
    /// By their number.
    blocks: RefCell<HashMap<u64, Vec<u8>>>,
}

impl Device for Memory {
    fn size(&self) -> u64 {
        DISK
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(DISK)
    }

    fn physical_block(&self) -> u32 {
        512
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::default())
    }

    fn read(&self, offset: u64, mut buf: IoBuf) -> LocalFuture<'static, (io::Result<()>, IoBuf)> {
        assert!(offset + buf.len() as u64 <= DISK, "a read of {} bytes at {offset}", buf.len());
        let blocks = self.blocks.borrow();
        for (number, piece) in (offset / BLOCK..).zip(buf.chunks_exact_mut(BLOCK as usize)) {
            match blocks.get(&number) {
                Some(block) => piece.copy_from_slice(block),
                None => piece.fill(0),
            }
        }
        let all_there: io::Result<()> = Ok(());
        Box::pin(async move { (all_there, buf) })
    }

    fn write(&self, offset: u64, parts: Vec<Slice>) -> LocalFuture<'static, io::Result<()>> {
        let mut blocks = self.blocks.borrow_mut();
        let pieces = parts.iter().flat_map(|part| part.chunks_exact(BLOCK as usize));
        for (number, piece) in (offset / BLOCK..).zip(pieces) {
            blocks.insert(number, piece.to_vec());
        }
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _punch: bool) -> LocalFuture<'static, io::Result<()>> {
        unreachable!("reading makes no zeroes")
    }

    fn sync(&self) -> LocalFuture<'static, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn allocation(&self, _offset: u64, _len: u64) -> LocalFuture<'static, io::Result<Vec<Allocation>>> {
        unreachable!("reading asks for no holes")
    }
}

/// The same device, as the offline check reads it.
struct Reader {
    memory: Rc<Memory>,
    at: u64,
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at >= DISK {
            return Ok(0);
        }
        let from = (self.at % BLOCK) as usize;
        let len = buf.len().min(BLOCK as usize - from);
        match self.memory.blocks.borrow().get(&(self.at / BLOCK)) {
            Some(block) => buf[..len].copy_from_slice(&block[from..from + len]),
            None => buf[..len].fill(0),
        }
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::End(by) => DISK.saturating_add_signed(by),
            SeekFrom::Current(by) => self.at.saturating_add_signed(by),
        };
        Ok(self.at)
    }
}

/// A host on which no time passes. The tasks of a disk look after stalls, and there are none.
struct Idle;

impl Host for Idle {
    fn wall_ns(&self) -> u64 {
        0
    }

    fn boot_ns(&self) -> u64 {
        0
    }

    fn sleep(&self, _ns: u64) -> LocalFuture<'static, ()> {
        Box::pin(std::future::pending::<()>())
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        drop(task);
    }

    fn random_u64(&self) -> u64 {
        0
    }
}
