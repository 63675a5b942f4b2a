//! The index against plain lists, over seeded random histories.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use std::task::Poll;

use super::page::encode;
use super::*;
use crate::buf::IoBuf;
use crate::error::{Error, Result};
use crate::format::{EntryKind, IndexEntry, IndexPageHeader, RunRoot, StreamKind};
use crate::host::LocalFuture;
use crate::signal::block_on;
use crate::types::Instant;

const LOG: u64 = 0x1122_3344_5566_7788;

/// xorshift64*: small, seeded, the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Ready at the second poll.
async fn pause() {
    let mut polled = false;
    std::future::poll_fn(|_| if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }).await;
}

/// Pages in memory. Hands out places that jump between segments.
struct Disk {
    pages: RefCell<HashMap<(u32, u32), Vec<u8>>>,
    cache: RefCell<PageCache>,
    reads: Cell<u64>,
    /// Every n-th read fails.
    fails_every: Cell<u64>,
    appends: RefCell<Vec<usize>>,
}

impl Disk {
    fn new(cache_bytes: usize) -> Self {
        Self {
            pages: RefCell::default(),
            cache: RefCell::new(PageCache::new(cache_bytes)),
            reads: Cell::new(0),
            fails_every: Cell::new(u64::MAX),
            appends: RefCell::default(),
        }
    }
    fn put_footer(&self, entries: &MemIndex, segment: u32) -> Run {
        let (pages, root) = layout_footer(entries, LOG, StreamKind::Writes, segment, 900);
        assert_eq!(pages.len(), pages_for(entries.len()));
        for (i, page) in pages.iter().enumerate() {
            self.pages.borrow_mut().insert((segment, 900 + i as u32), page.to_vec());
        }
        Run { root, log_id: LOG, kind: StreamKind::Writes }
    }
    fn build(&self, entries: impl IntoIterator<Item = IndexEntry>) -> Run {
        let mut sink = self;
        let root = block_on(async {
            let mut builder = RunBuilder::new(LOG, StreamKind::Writes);
            for entry in entries {
                builder.push(entry).expect("sorted");
                if builder.is_full() {
                    builder.flush(&mut sink).await.expect("memory");
                }
            }
            builder.finish(&mut sink).await.expect("memory")
        });
        Run { root, log_id: LOG, kind: StreamKind::Writes }
    }
    fn merge(&self, sources: Vec<Source>) -> (Run, u64) {
        let yields = Rc::new(Cell::new(0));
        let yielder = || -> LocalFuture<'static, ()> {
            yields.set(yields.get() + 1);
            Box::pin(pause())
        };
        let mut sink = self;
        let builder = RunBuilder::new(LOG, StreamKind::Writes);
        let root = block_on(merge(sources, builder, &mut sink, self, &yielder)).expect("nothing is damaged");
        (Run { root, log_id: LOG, kind: StreamKind::Writes }, yields.get())
    }
}

impl PageReader for Disk {
    fn page(&self, segment: u32, block: u32, crc: u32) -> LocalFuture<'_, Result<Rc<IndexPage>>> {
        Box::pin(async move {
            let page = self.pages(segment, block, vec![crc]).await?.remove(0);
            if page.crc() == crc {
                self.cache.borrow_mut().insert((0, segment, block), Rc::clone(&page));
            }
            Ok(page)
        })
    }
    fn pages(&self, segment: u32, block: u32, crcs: Vec<u32>) -> LocalFuture<'_, Result<Vec<Rc<IndexPage>>>> {
        Box::pin(async move {
            pause().await;
            self.reads.set(self.reads.get() + 1);
            if self.reads.get().is_multiple_of(self.fails_every.get()) {
                return Err(Error::Gone("read failed".into()));
            }
            let stored = self.pages.borrow();
            let parsed = (block..).take(crcs.len()).map(|block| match stored.get(&(segment, block)) {
                Some(bytes) => IndexPage::parse(bytes, None).map(Rc::new),
                None => IndexPage::parse(&[0; 4096], None).map(Rc::new),
            });
            let (mut pages, mut failed) = (Vec::new(), None);
            for page in parsed {
                match page {
                    Ok(page) => pages.push(page),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            failed.filter(|_| pages.is_empty()).map_or(Ok(pages), Err)
        })
    }
    fn cached(&self, segment: u32, block: u32, crc: u32) -> Option<Rc<IndexPage>> {
        self.cache.borrow_mut().get((0, segment, block), crc)
    }
}

impl PageSink for &Disk {
    fn append(&mut self, pages: Vec<IoBuf>) -> LocalFuture<'_, Result<Vec<(u32, u32)>>> {
        Box::pin(async move {
            pause().await;
            self.appends.borrow_mut().push(pages.len());
            let mut places = Vec::new();
            for page in pages {
                let number = self.pages.borrow().len() as u32;
                let place = (1000 + number / 50, 1 + number % 50 * 3);
                assert!(self.pages.borrow_mut().insert(place, page.to_vec()).is_none());
                places.push(place);
            }
            Ok(places)
        })
    }
}

/// The meaning of a lookup: walk all that covers the block from new to old, take what gives a missing sector.
fn naive_lookup(entries: &[IndexEntry], block: u64, upto: Instant, missing: &mut u8) -> Vec<IndexEntry> {
    let mut covering: Vec<_> =
        entries.iter().filter(|entry| entry.covers(block) && entry.instant.get() <= upto.0).copied().collect();
    covering.sort_by_key(|entry| std::cmp::Reverse(entry.instant.get()));
    let mut out = Vec::new();
    for entry in covering {
        if *missing & entry.sectors() != 0 {
            *missing &= !entry.sectors();
            out.push(entry);
        }
    }
    out
}

/// Writes whole and in part, zeroes whole, in part and over long ranges; some blocks hot. Instants are unique.
fn history(random: &mut Random, requests: u64, blocks: u64) -> Vec<IndexEntry> {
    let mut entries = Vec::new();
    for i in 1..=requests {
        let instant = Instant(i * 10);
        let block = if random.one_in(3) { random.below(4) } else { random.below(blocks) };
        let mask = if random.one_in(3) { 0xff } else { 1 << random.below(3) };
        match random.below(40) {
            0 => {
                let zero = |level, block| entries.push(IndexEntry::extent(EntryKind::Zero, level, block, instant));
                split_extent(block, 1 + random.below(700), zero);
            }
            1..4 => entries.push(IndexEntry::zero(block, instant, mask)),
            _ => {
                let (segment, page) = (random.below(9) as u32, random.below(65536) as u16);
                entries.push(IndexEntry::write(block, instant, segment, page, mask, random.next() as u32));
            }
        }
    }
    entries
}

fn sorted(entries: &[IndexEntry]) -> Vec<IndexEntry> {
    let mut entries = entries.to_vec();
    entries.sort_by_key(IndexEntry::key);
    entries
}

fn scan(run: &Run, reader: &dyn PageReader, from: Key) -> Result<Vec<IndexEntry>> {
    block_on(async {
        let mut cursor = run.cursor(from);
        let mut out = Vec::new();
        while let Some(entry) = cursor.next(reader).await? {
            out.push(entry);
        }
        Ok(out)
    })
}

fn lookup(run: &Run, reader: &dyn PageReader, block: u64, upto: Instant, missing: &mut u8) -> Result<Vec<IndexEntry>> {
    let mut out = Vec::new();
    block_on(run.lookup(reader, block, upto, missing, &mut out))?;
    Ok(out)
}

#[test]
fn every_form_of_an_index_answers_like_a_plain_list() {
    for seed in 1..=24 {
        let random = &mut Random::new(seed);
        let blocks = 1 + random.below(3000);
        let requests = 1 + random.below(4000);
        let entries = history(random, requests, blocks);
        let disk = Disk::new(if random.one_in(2) { 0 } else { 40_000 });

        let mem: MemIndex = entries.iter().copied().collect();
        let footer = disk.put_footer(&mem, 7);
        let built = disk.build(sorted(&entries));
        // Merged from parts as segments give them, one of them still in memory.
        let cuts = 1 + random.below(6) as usize;
        let parts: Vec<MemIndex> =
            entries.chunks(entries.len().div_ceil(cuts)).map(|part| part.iter().copied().collect()).collect();
        let in_memory = random.below(parts.len() as u64) as usize;
        let sources = parts.into_iter().enumerate().map(|(i, part)| match i == in_memory {
            true => Source::Mem(Rc::new(part)),
            false => Source::Run(disk.put_footer(&part, 20 + i as u32)),
        });
        let (merged, yields) = disk.merge(sources.collect());
        assert_eq!(yields, entries.len() as u64 / 1024);
        assert!(disk.appends.borrow().iter().all(|&pages| (1..=PAGES_PER_APPEND).contains(&pages)));

        let order = sorted(&entries);
        assert!(mem.iter().eq(&order));
        assert_eq!(mem.len(), entries.len());
        for run in [&footer, &built, &merged] {
            assert_eq!(run.len(), entries.len() as u64);
            assert_eq!(run.root.levels.get(), mem.levels());
            assert_eq!(scan(run, &disk, Key::default()).unwrap(), order);
            let from = Key { level: random.below(3) as u8, block: random.below(blocks), instant: random.below(9999) };
            let tail = &order[order.partition_point(|entry| entry.key() < from)..];
            assert_eq!(scan(run, &disk, from).unwrap(), tail);
        }
        for _ in 0..300 {
            let block = if random.one_in(3) { random.below(4) } else { random.below(blocks + 800) };
            let upto = if random.one_in(4) { Instant::MAX } else { Instant(random.below(requests * 10 + 20)) };
            let wanted = if random.one_in(2) { 0xff } else { random.below(256) as u8 };
            let mut left = wanted;
            let expected = naive_lookup(&entries, block, upto, &mut left);
            let mut missing = wanted;
            let mut out = Vec::new();
            mem.lookup(block, upto, &mut missing, &mut out);
            assert_eq!((&out, missing), (&expected, left), "block {block} upto {upto} wanted {wanted:#x}");
            for run in [&footer, &built, &merged] {
                let mut missing = wanted;
                let out = lookup(run, &disk, block, upto, &mut missing).unwrap();
                assert_eq!((&out, missing), (&expected, left), "block {block} upto {upto} wanted {wanted:#x}");
            }
        }
    }
}

#[test]
fn runs_of_every_shape_are_whole() {
    let page = IndexPageHeader::ENTRIES;
    for (count, height) in [
        (0, 0),
        (1, 0),
        (page, 0),
        (page + 1, 1),
        (page * page, 1),
        (page * page + 1, 2),
        (page * page * 2, 2),
        (page * page * 17 + 5, 2),
    ] {
        let entries: Vec<_> =
            (0..count as u64).map(|i| IndexEntry::write(i * 3, Instant(i + 1), 1, 2, 0xff, i as u32)).collect();
        let disk = Disk::new(1 << 20);
        let run = disk.build(entries.iter().copied());
        assert_eq!(disk.pages.borrow().len(), pages_for(count), "{count} entries");
        assert_eq!((run.len(), run.root.height.get()), (count as u64, height), "{count} entries");
        assert!(scan(&run, &disk, Key::default()).unwrap() == entries, "{count} entries");
        let mem: MemIndex = entries.iter().copied().collect();
        let footer = Disk::new(0);
        let footer_run = footer.put_footer(&mem, 3);
        assert_eq!(footer_run.root.height, run.root.height);
        assert!(scan(&footer_run, &footer, Key::default()).unwrap() == entries, "{count} entries");
        for at in [0, 1, count / 2, count.saturating_sub(1)].into_iter().filter(|&at| at < count) {
            let mut missing = 0xff;
            let found = lookup(&run, &disk, at as u64 * 3, Instant::MAX, &mut missing).unwrap();
            assert_eq!((found, missing), (vec![entries[at]], 0));
            assert!(lookup(&run, &disk, at as u64 * 3 + 1, Instant::MAX, &mut 0xff).unwrap().is_empty());
        }
    }
    assert_eq!(Disk::new(0).build([]).root, RunRoot::default());
}

#[test]
fn a_lookup_reads_one_page_per_height_and_level() {
    let entries: Vec<_> = (0..40_000).map(|i| IndexEntry::write(i, Instant(i + 1), 1, 2, 0xff, 0)).collect();
    let disk = Disk::new(0);
    let run = disk.build(entries);
    lookup(&run, &disk, 12_345, Instant::MAX, &mut 0xff).unwrap();
    assert_eq!(disk.reads.get(), 3);
}

#[test]
fn a_scan_reads_leaves_that_lie_together_at_once() {
    let disk = Disk::new(0);
    let count = 40 * IndexPageHeader::ENTRIES;
    let entries: MemIndex = (0..count as u64).map(|i| IndexEntry::write(i, Instant(5), 1, 1, 0xff, 1)).collect();
    let run = disk.put_footer(&entries, 3);
    assert_eq!(scan(&run, &disk, Key::default()).unwrap().len(), count);
    // The root, the first leaf, and the 39 others by sixteen.
    assert_eq!(disk.reads.get(), 2 + 3);
}

#[test]
fn of_equal_keys_the_last_source_wins() {
    let old: MemIndex = (0..500).map(|i| IndexEntry::write(i, Instant(5), 1, 1, 0xff, 1)).collect();
    let new: MemIndex = (100..300).map(|i| IndexEntry::write(i, Instant(5), 2, 2, 0xff, 2)).collect();
    let disk = Disk::new(1 << 20);
    let (run, _) = disk.merge(vec![Source::Run(disk.put_footer(&old, 1)), Source::Mem(Rc::new(new))]);
    let entries = scan(&run, &disk, Key::default()).unwrap();
    assert_eq!((entries.len(), run.len()), (500, 500));
    for entry in entries {
        let expected = if (100..300).contains(&entry.block.get()) { 2 } else { 1 };
        assert_eq!(entry.crc.get(), expected);
    }
    let (empty, _) = disk.merge(vec![Source::Mem(Rc::new(MemIndex::new())), Source::Run(empty_run())]);
    assert_eq!(empty.root, RunRoot::default());
}

fn empty_run() -> Run {
    Run { root: RunRoot::default(), log_id: LOG, kind: StreamKind::Writes }
}

#[test]
fn a_builder_refuses_disorder() {
    let mut builder = RunBuilder::new(LOG, StreamKind::Writes);
    builder.push(IndexEntry::write(5, Instant(5), 1, 1, 0xff, 1)).unwrap();
    assert!(matches!(builder.push(IndexEntry::write(5, Instant(5), 1, 1, 0xff, 1)), Err(Error::Invalid { .. })));
    assert!(matches!(builder.push(IndexEntry::write(4, Instant(9), 1, 1, 0xff, 1)), Err(Error::Invalid { .. })));
    builder.push(IndexEntry::write(5, Instant(6), 1, 1, 0xff, 1)).unwrap();
}

#[test]
fn a_cursor_goes_on_where_a_read_failed() {
    let random = &mut Random::new(77);
    let entries = history(random, 6000, 2000);
    let disk = Disk::new(0);
    let run = disk.build(sorted(&entries));
    disk.fails_every.set(3);
    let mut cursor = run.cursor(Key::default());
    let (mut out, mut failures) = (Vec::new(), 0);
    loop {
        match block_on(cursor.next(&disk)) {
            Ok(Some(entry)) => out.push(entry),
            Ok(None) => break,
            Err(Error::Gone(_)) => failures += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(failures > 10);
    assert_eq!(out, sorted(&entries));
}

/// I7: damage is never served. Any bit of any page, lost writes, and pages that belong elsewhere.
#[test]
fn damage_is_found_or_does_not_matter() {
    let random = &mut Random::new(5);
    let entries = history(random, 9000, 3000);
    let disk = Disk::new(0);
    let run = disk.build(sorted(&entries));
    let places: Vec<_> = disk.pages.borrow().keys().copied().collect();
    let mut found = 0;
    for round in 0..300 {
        let place = places[random.below(places.len() as u64) as usize];
        let whole = disk.pages.borrow()[&place].clone();
        let damaged = match round % 3 {
            0 => {
                let mut page = whole.clone();
                page[random.below(4096) as usize] ^= 1 << random.below(8);
                page
            }
            1 => vec![0; 4096],
            // Another page of the same run: a misdirected write.
            _ => disk.pages.borrow()[&places[random.below(places.len() as u64) as usize]].clone(),
        };
        let differs = damaged != whole;
        disk.pages.borrow_mut().insert(place, damaged);
        let scanned = scan(&run, &disk, Key::default());
        assert_eq!(matches!(scanned, Err(Error::Damaged { .. })), differs);
        for _ in 0..20 {
            let block = random.below(3000);
            let (mut missing, mut left) = (0xff, 0xff);
            match lookup(&run, &disk, block, Instant::MAX, &mut missing) {
                Ok(out) => assert_eq!(out, naive_lookup(&entries, block, Instant::MAX, &mut left)),
                Err(Error::Damaged { place, .. }) => {
                    assert!(place.starts_with("segment 1"), "{place:?}");
                    found += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        disk.pages.borrow_mut().insert(place, whole);
    }
    assert!(found > 0);
}

#[test]
fn a_run_does_not_read_the_pages_of_others() {
    let mem: MemIndex = (0..500).map(|i| IndexEntry::write(i, Instant(5), 1, 1, 0xff, 1)).collect();
    let disk = Disk::new(1 << 20);
    let run = disk.put_footer(&mem, 4);
    assert!(lookup(&run, &disk, 3, Instant::MAX, &mut 0xff).is_ok());
    for wrong in [
        Run { log_id: LOG + 1, ..run },
        Run { kind: StreamKind::Before, ..run },
        Run { root: RunRoot { height: 0.into(), ..run.root }, ..run },
        Run { root: RunRoot { height: 2.into(), ..run.root }, ..run },
        Run { root: RunRoot { height: u32::MAX.into(), ..run.root }, ..run },
        Run { root: RunRoot { crc: 1.into(), ..run.root }, ..run },
        Run { root: RunRoot { block: 1.into(), ..run.root }, ..run },
    ] {
        let answer = lookup(&wrong, &disk, 3, Instant::MAX, &mut 0xff);
        assert!(matches!(answer, Err(Error::Damaged { .. })), "{wrong:?}: {answer:?}");
        assert!(matches!(scan(&wrong, &disk, Key::default()), Err(Error::Damaged { .. })), "{wrong:?}");
    }
}

#[test]
fn pages_that_make_no_sense_are_damaged() {
    let good = IndexEntry::write(7, Instant(9), 1, 2, 0xff, 3);
    let parse = |entries: &[IndexEntry]| IndexPage::parse(&encode(LOG, StreamKind::Writes, 0, entries).0, Some(LOG));
    let page = parse(&[good]).unwrap();
    assert_eq!((page.entries(), page.children().len(), page.first_key()), (&[good][..], 0, good.key()));
    let what = |result: Result<IndexPage>| match result {
        Err(Error::Damaged { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what(parse(&[])), "index page (count)");
    assert_eq!(what(parse(&[good, good])), "index page (order)");
    assert_eq!(what(parse(&[IndexEntry { kind_level: 3, ..good }])), "index entry (unknown kind)");
    assert_eq!(what(parse(&[IndexEntry { kind_level: 0x11, ..good }])), "index entry (payload above level 0)");
    assert_eq!(what(parse(&[IndexEntry { kind_level: 0x12, ..good }])), "index entry (not aligned to its level)");
    assert_eq!(what(parse(&[IndexEntry { mask: 0, ..good }])), "index entry (sector mask)");
    let (bytes, _) = encode(LOG, StreamKind::Writes, 0, &[good]);
    assert_eq!(what(IndexPage::parse(&bytes, Some(LOG + 1))), "index page (of another log)");
    assert_eq!(what(IndexPage::parse(&bytes[..4095], None)), "index page (length)");
    assert_eq!(what(IndexPage::parse(&[0; 4096], None)), "index page (magic)");
}

#[test]
fn a_page_has_these_bytes() {
    let entry = IndexEntry::write(0x0102, Instant(0x0304), 0x0506, 0x0708, 0x0f, 0x090a_0b0c);
    let (page, crc) = encode(LOG, StreamKind::Before, 0, &[entry]);
    let mut expected = b"CDPX____\x88\x77\x66\x55\x44\x33\x22\x11\x01\x00\x00\x02".to_vec();
    expected[4..8].copy_from_slice(&crc.to_le_bytes());
    expected.resize(32, 0);
    expected.extend(b"\x02\x01\0\0\0\0\0\0\x04\x03\0\0\0\0\0\0\x06\x05\0\0\x08\x07\x0f\x01\x0c\x0b\x0a\x09\0\0\0\0");
    expected.resize(4096, 0);
    assert_eq!(page[..], expected[..]);
    assert_eq!(crc, crate::format::crc(&expected[8..]));
}

#[test]
fn extents_are_tiled_by_the_fewest_aligned_areas() {
    let random = &mut Random::new(9);
    for round in 0..2000 {
        let (block, count) = match round {
            0 => (0, u64::MAX),
            1 => (u64::MAX - 5, 100),
            2 => (3, 0),
            _ => (random.next() >> random.below(56), random.next() >> random.below(56)),
        };
        let (mut at, mut pieces) = (block, 0);
        split_extent(block, count, |level, piece| {
            let entry = IndexEntry::extent(EntryKind::Zero, level, piece, Instant(1));
            assert_eq!((piece, aligned(piece, level)), (at, piece));
            at += entry.blocks();
            assert!(entry.covers(piece) && entry.covers(at - 1) && !entry.covers(at));
            pieces += 1;
        });
        assert_eq!(at, block.saturating_add(count));
        assert!(pieces <= 16 * 30, "{pieces} pieces of {block}+{count}");
    }
    let mut pieces = Vec::new();
    split_extent(15, 16 * 16 + 18, |level, block| pieces.push((level, block)));
    let expected: Vec<_> = [(0, 15)].into_iter().chain((1..=17).map(|i| (1, i * 16))).chain([(0, 288)]).collect();
    assert_eq!(pieces, expected);
    let mut index = MemIndex::new();
    index.insert_extent(EntryKind::BeforeZero, 0, 1 << 32, Instant::ZERO);
    assert_eq!((index.len(), index.levels()), (1, 1 << 8));
    let mut out = Vec::new();
    index.lookup(123_456_789, Instant::ZERO, &mut 0xff, &mut out);
    assert_eq!((out.len(), out[0].kind()), (1, EntryKind::BeforeZero));
}

#[test]
fn the_cache_forgets_what_was_longest_not_asked_for() {
    let page = |crc: u32| {
        let entry = IndexEntry::write(crc.into(), Instant(1), 1, 1, 0xff, crc);
        Rc::new(IndexPage::parse(&encode(LOG, StreamKind::Writes, 0, &[entry]).0, None).unwrap())
    };
    let mut probe = PageCache::new(1 << 20);
    probe.insert((0, 0, 0), page(0));
    let each = probe.bytes();
    let random = &mut Random::new(3);
    let mut cache = PageCache::new(each * 10 + each / 2);
    // Newest last.
    let mut model: Vec<((u32, u32, u32), Rc<IndexPage>)> = Vec::new();
    for i in 0..20_000 {
        let place = (random.below(2) as u32, random.below(3) as u32, random.below(4) as u32);
        let at = model.iter().position(|(known, _)| *known == place);
        if random.one_in(3) {
            let page = page(i);
            at.map(|at| model.remove(at));
            model.push((place, Rc::clone(&page)));
            cache.insert(place, page);
            if model.len() > 10 {
                model.remove(0);
            }
        } else {
            let stale = random.one_in(20);
            let crc = at.map_or(0, |at| model[at].1.crc()).wrapping_add(u32::from(stale));
            let found = cache.get(place, crc);
            let known = at.map(|at| model.remove(at));
            assert_eq!(found.is_some(), known.is_some() && !stale);
            if let (Some(known), false) = (known, stale) {
                assert!(Rc::ptr_eq(&known.1, &found.unwrap()));
                model.push(known);
            }
        }
        assert_eq!((cache.len(), cache.bytes()), (model.len(), model.len() * each));
    }
    assert!(cache.hits() > 1000 && cache.misses() > 1000);
    let mut none = PageCache::new(0);
    none.insert((0, 0, 0), page(1));
    assert!(none.is_empty() && none.bytes() == 0);
}

#[test]
fn touched_is_a_set() {
    // Around the edge between two granules, where the parts meet.
    let base = (1u64 << 22) - 3000;
    for seed in 1..=8 {
        let random = &mut Random::new(seed);
        let mut touched = Touched::new();
        let mut model = BTreeSet::new();
        for _ in 0..3000 {
            let block = base + random.below(6000);
            let count = if random.one_in(50) { random.below(3000) } else { random.below(6) };
            match random.below(6) {
                0 | 1 => assert_eq!(touched.insert(block), model.insert(block)),
                2 => {
                    let new = (block..block + count).filter(|&block| model.insert(block)).count();
                    assert_eq!(touched.insert_range(block, count), new as u64);
                }
                3 => assert_eq!(touched.contains(block), model.contains(&block)),
                4 => {
                    let present = model.range(block..block + count).count() as u64;
                    assert_eq!(touched.missing(block, count), count - present);
                    assert_eq!(touched.contains_all(block, count), present == count);
                    assert_eq!(touched.contains_any(block, count), present > 0);
                }
                _ => assert!(touched.iter_from(block).take(50).eq(model.range(block..).copied().take(50))),
            }
            assert_eq!(touched.len(), model.len() as u64);
        }
        assert!(touched.iter().eq(model.iter().copied()));
        let mut other = Touched::new();
        for _ in 0..500 {
            let block = base + random.below(9000);
            other.insert(block);
            model.insert(block);
        }
        touched.union(&other);
        assert!(touched.iter().eq(model.iter().copied()));
        assert_eq!(touched.len(), model.len() as u64);
    }
}

#[test]
fn touched_stays_small() {
    let mut touched = Touched::new();
    touched.insert(5 << 22);
    assert_eq!(touched.insert_range(1000, 1 << 32), (1 << 32) - 1);
    assert_eq!(touched.len(), 1 << 32);
    assert!(touched.bytes() < 256 << 10, "{} bytes for a range", touched.bytes());
    assert!(touched.contains_all(1000, 1 << 32));
    assert_eq!(touched.missing(0, 1 << 33), (1 << 33) - (1 << 32));
    assert!(touched.contains(999 + (1 << 32)) && !touched.contains(1000 + (1 << 32)) && !touched.contains(999));
    assert_eq!(touched.iter_from((1 << 32) + 990).count(), 10);
    let mut other = Touched::new();
    other.insert_range(0, 5000);
    other.union(&touched);
    assert_eq!((other.len(), other.insert_range(0, 1 << 23)), ((1 << 32) + 1000, 0));
    assert!(other.bytes() < 256 << 10, "{} bytes for a union", other.bytes());

    // Scattered blocks beside a range: runs that fall apart become bitmaps. 2^22 blocks are at most 512 KiB of bits.
    let random = &mut Random::new(4);
    let mut scattered = Touched::new();
    for container in 0..64 {
        scattered.insert_range(container << 16, 100);
    }
    for _ in 0..1_000_000 {
        scattered.insert(random.below(1 << 22));
    }
    assert!(scattered.bytes() < 640 << 10, "{} bytes for scattered blocks", scattered.bytes());
    // A granule that fills up block by block ends as a number.
    let mut full = Touched::new();
    for block in 0..1 << 22 {
        full.insert(block ^ 1);
    }
    assert!(full.contains_all(0, 1 << 22) && full.bytes() < 1024);
}
