//! A CDP disk: superblock, clock page, segment table and the pool of segments that many volumes share.
//!
//! Invariants:
//! * A segment is given out only while the table says durably that it is free, and used only after its new owner stands in the table.
//! * A table page is written to the older of its two copies, and only when the newer one is durable, so a torn write loses nothing.
//! * The first write, sync or table error, and any operation that outlives the stall bound, latches the disk as failed: every waiter is
//!   answered at once and nothing is tried again. Read errors answer their caller only: a bad sector of the past must not end protection
//!   (but the merge of indexes when a log is sealed cannot do without what it reads: `docs/decisions/0002`).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use futures::future::{Either, select};
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::buf::{IoBuf, Slice};
use crate::engine::InitOptions;
use crate::error::{Error, Result};
use crate::format::{self, ClockPage, Geometry, StreamKind, Superblock, TableEntry, TablePageHeader};
use crate::host::{Device, Host, LocalFuture};
use crate::index::{IndexPage, PageCache, PageReader};
use crate::info::DiskInfo;
use crate::signal::Signal;
use crate::types::{BLOCK, Instant};

/// How many slices the stall bound is counted in: a stopped and continued process is charged one slice, not the whole pause.
const STALL_SLICES: u32 = 20;

/// A segment that a log owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRef {
    /// Its number on the disk.
    pub segment: u32,
    /// How often it was given out.
    pub lap: u64,
    /// Its number in its log and kind.
    pub number: u32,
}

/// Whose segment it is to be.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// Volume.
    pub volume: Uuid,
    /// Seq of the log.
    pub log_seq: u64,
    /// Random id of the log.
    pub log_id: u64,
    /// Which of its two kinds.
    pub kind: StreamKind,
}

struct Pool {
    entries: Vec<TableEntry>,
    /// Durably free.
    free: BTreeSet<u32>,
    /// Where the search for a free segment goes on, so that wear and appends move forward.
    cursor: u32,
    page_generation: Vec<u64>,
    dirty_pages: BTreeSet<u64>,
    reserved: HashMap<Uuid, u64>,
}

/// See the module's text.
pub struct Disk {
    /// Id from the superblock.
    pub id: Uuid,
    /// For people.
    pub path: String,
    /// Layout.
    pub geometry: Geometry,
    device: Rc<dyn Device>,
    host: Rc<dyn Host>,
    pool: RefCell<Pool>,
    cache: Rc<RefCell<PageCache>>,
    cache_id: u32,
    failed: RefCell<Option<String>>,
    /// It failed by an error of a write or a sync.
    failed_writing: Cell<bool>,
    /// Starts under way that read it although it failed so.
    recovering: Cell<u32>,
    changed: Signal,
    errors: Cell<u64>,
    /// Operations under way: stall slices counted so far, and whom to wake when the disk fails.
    running: RefCell<BTreeMap<u64, (u32, Option<Waker>)>>,
    running_next: Cell<u64>,
    sync_started: Cell<u64>,
    sync_done: Cell<u64>,
    sync_running: Cell<bool>,
    table_started: Cell<u64>,
    table_done: Cell<u64>,
    table_running: Cell<bool>,
    clock_generation: Cell<u64>,
    clock_high_water: Cell<u64>,
    clock_running: Cell<bool>,
    /// How many wait for a segment.
    starving: Cell<u32>,
    stall_max_ns: u64,
    size: u64,
}

impl Disk {
    /// Writes an empty superblock, clock and table.
    pub async fn init(device: &Rc<dyn Device>, options: InitOptions, id: Uuid, created_ns: u64) -> Result<()> {
        let size = device.size();
        let segment_size =
            if options.segment_size == 0 { Geometry::default_segment_size(size) } else { options.segment_size };
        let io = |op| move |e: io::Error| Error::device(op, "CDP disk", &e);
        if device.physical_block() > 4096 {
            return Err(Error::invalid("physical_block", device.physical_block(), "at most 4096 bytes"));
        }
        let geometry = Geometry::of(size, segment_size).ok_or_else(|| {
            Error::invalid(
                "segment_size",
                segment_size,
                format!("a power of two from 1 MiB to 256 MiB, of which at least 8 fit a disk of {size} bytes"),
            )
        })?;
        // Either copy makes it a CDP disk, as it does for a start.
        for at in [format::SUPERBLOCK_A, format::SUPERBLOCK_B].into_iter().filter(|_| !options.force) {
            let (result, page) = device.read(at, IoBuf::zeroed(4096)).await;
            result.map_err(io("read superblock"))?;
            if page.starts_with(&Superblock::MAGIC) {
                return Err(Error::Exists { what: "CDP disk", name: "superblock".into() });
            }
        }
        // The old superblocks go first, so that a crash in the middle leaves no disk that looks whole.
        for at in [format::SUPERBLOCK_A, format::SUPERBLOCK_B] {
            device.write(at, vec![IoBuf::zeroed(4096).share()]).await.map_err(io("clear superblock"))?;
        }
        device.sync().await.map_err(io("sync"))?;
        for page in 0..geometry.table_pages {
            let bytes = table_page(id, page, 1, &[]);
            for table in [geometry.table_a, geometry.table_b] {
                device.write(table + page * BLOCK, vec![bytes.clone()]).await.map_err(io("write segment table"))?;
            }
        }
        for at in [format::CLOCK_A, format::CLOCK_B] {
            device.write(at, vec![clock_page(id, 1, 0)]).await.map_err(io("write clock"))?;
        }
        device.sync().await.map_err(io("sync"))?;
        for (at, generation) in [(format::SUPERBLOCK_A, 1u64), (format::SUPERBLOCK_B, 2)] {
            let superblock = Superblock {
                magic: Superblock::MAGIC,
                crc: 0.into(),
                version: format::VERSION.into(),
                flags: 0.into(),
                disk_id: *id.as_bytes(),
                generation: generation.into(),
                disk_size: size.into(),
                segment_size: segment_size.into(),
                segments: geometry.segments.into(),
                table_a: geometry.table_a.into(),
                table_b: geometry.table_b.into(),
                segments_at: geometry.segments_at.into(),
                created_ns: created_ns.into(),
                reserved: [0; 32],
            };
            let page = IoBuf::copy_of(&format::sealed_block(&superblock, 8)).share();
            device.write(at, vec![page]).await.map_err(io("write superblock"))?;
        }
        device.sync().await.map_err(io("sync"))
    }

    /// Opens a disk: reads and checks superblock, clock and table.
    pub async fn open(
        device: Rc<dyn Device>,
        path: String,
        host: Rc<dyn Host>,
        stall_max_ns: u64,
        cache: Rc<RefCell<PageCache>>,
        cache_id: u32,
    ) -> Result<Rc<Disk>> {
        let fail = |op: &'static str, e: io::Error| Error::device(op, path.clone(), &e);
        // No watch runs yet: a disk that hangs is given up after the stall bound.
        let timed_out = || io::Error::from_raw_os_error(110);
        let timed = async |read: LocalFuture<'static, (io::Result<()>, IoBuf)>| {
            let done = in_time(read, &*host, stall_max_ns).await;
            done.unwrap_or_else(|| (Err(timed_out()), IoBuf::zeroed(4096)))
        };
        let mut best: Option<Superblock> = None;
        let mut wrong_version = None;
        let mut unreadable = None;
        for at in [format::SUPERBLOCK_A, format::SUPERBLOCK_B] {
            let (result, page) = timed(device.read(at, IoBuf::zeroed(4096))).await;
            // A torn rewrite may leave one copy that cannot be read.
            if let Err(e) = result {
                unreadable = Some(fail("read superblock of", e));
                continue;
            }
            let Some(found) = format::open_block::<Superblock>(&page, &Superblock::MAGIC, 8) else { continue };
            if found.version.get() != format::VERSION || found.flags.get() != 0 {
                wrong_version = Some((found.version.get(), found.flags.get()));
            } else if best.is_none_or(|b| b.generation.get() < found.generation.get()) {
                best = Some(found);
            }
        }
        // Also when the other copy is ours: the newer one may be the unknown one.
        let Some(superblock) = best.filter(|_| wrong_version.is_none()) else {
            return Err(match wrong_version {
                Some((version, flags)) => Error::invalid(
                    "format version",
                    format!("{version} (flags {flags:#x})"),
                    format!("this agent reads version {} only", format::VERSION),
                ),
                None => unreadable
                    .unwrap_or(Error::Damaged { what: "superblock (is it a CDP disk? see `disk init`)", place: path }),
            });
        };
        let size = superblock.disk_size.get();
        let geometry = Geometry::of(size, superblock.segment_size.get()).filter(|g| {
            g.segments == superblock.segments.get()
                && g.table_a == superblock.table_a.get()
                && g.table_b == superblock.table_b.get()
                && g.segments_at == superblock.segments_at.get()
        });
        let Some(geometry) = geometry else { return Err(Error::Damaged { what: "superblock geometry", place: path }) };
        let now = device.current_size().map_err(|e| fail("size of", e))?;
        if now < size {
            return Err(Error::invalid("CDP disk size", now, format!("{path} was initialised with {size} bytes")));
        }
        let id = Uuid::from_bytes(superblock.disk_id);
        let mut clock: Option<(u64, u64)> = None;
        for at in [format::CLOCK_A, format::CLOCK_B] {
            let (result, page) = timed(device.read(at, IoBuf::zeroed(4096))).await;
            // Where the newer copy is lost, the state directory and the records know a later mark, and the fence whether this is an older copy of the disk.
            if let Err(e) = result {
                unreadable = Some(fail("read clock of", e));
                continue;
            }
            if let Some(found) = format::open_block::<ClockPage>(&page, &ClockPage::MAGIC, 8)
                && found.disk_id == superblock.disk_id
                && found.version.get() == format::VERSION
                && found.flags.get() == 0
                && clock.is_none_or(|c| c.0 < found.generation.get())
            {
                clock = Some((found.generation.get(), found.high_water.get()));
            }
        }
        let Some((clock_generation, high_water)) = clock else {
            return Err(unreadable.unwrap_or(Error::Damaged { what: "clock page", place: path }));
        };
        let mut entries = Vec::with_capacity(geometry.segments as usize);
        let mut page_generation = vec![0u64; geometry.table_pages as usize];
        for (page, generation) in page_generation.iter_mut().enumerate() {
            let mut newest: Option<(u64, Vec<TableEntry>)> = None;
            for table in [geometry.table_a, geometry.table_b] {
                let (result, bytes) = timed(device.read(table + page as u64 * BLOCK, IoBuf::zeroed(4096))).await;
                result.map_err(|e| fail("read segment table of", e))?;
                if let Some((found, list)) = parse_table_page(&bytes, id, page as u64)
                    && newest.as_ref().is_none_or(|n| n.0 < found)
                {
                    newest = Some((found, list));
                }
            }
            let Some((found, list)) = newest else {
                return Err(Error::Damaged {
                    what: "both copies of a segment table page",
                    place: format!("{path} page {page}"),
                });
            };
            *generation = found;
            entries.extend(list.into_iter().take((geometry.segments as usize).saturating_sub(entries.len())));
        }
        let free = (0u32..).zip(&entries).filter(|(_, e)| e.state == 0).map(|(i, _)| i).collect();
        // What a killed agent wrote last may be in the drive's cache alone. Whatever is done by it from now on, such as overwriting the older copy of a page, must not become
        // durable before it.
        let synced = in_time(device.sync(), &*host, stall_max_ns).await.unwrap_or_else(|| Err(timed_out()));
        let disk = Rc::new(Disk {
            id,
            path,
            geometry,
            device,
            host: Rc::clone(&host),
            pool: RefCell::new(Pool {
                entries,
                free,
                cursor: 0,
                page_generation,
                dirty_pages: BTreeSet::new(),
                reserved: HashMap::new(),
            }),
            cache,
            cache_id,
            failed: RefCell::new(None),
            failed_writing: Cell::new(false),
            recovering: Cell::new(0),
            changed: Signal::default(),
            errors: Cell::new(0),
            running: RefCell::new(BTreeMap::new()),
            running_next: Cell::new(0),
            sync_started: Cell::new(0),
            sync_done: Cell::new(0),
            sync_running: Cell::new(false),
            table_started: Cell::new(0),
            table_done: Cell::new(0),
            table_running: Cell::new(false),
            clock_generation: Cell::new(clock_generation),
            clock_high_water: Cell::new(high_water),
            clock_running: Cell::new(false),
            starving: Cell::new(0),
            stall_max_ns,
            size,
        });
        disk.host.spawn(Box::pin(watch_stalls(Rc::downgrade(&disk), Rc::clone(&disk.host), stall_max_ns)));
        if let Err(error) = synced {
            // What it holds can still be read, and brought to the primaries.
            disk.fail_io("sync", &error);
        }
        Ok(disk)
    }

    // -- health --------------------------------------------------------------------------------------------------------

    /// Latches the disk as failed and answers everyone who waits for it.
    pub fn fail(&self, reason: String) {
        self.errors.set(self.errors.get() + 1);
        if self.failed.borrow().is_none() {
            tracing::error!(disk = %self.path, %reason, "CDP disk failed");
            *self.failed.borrow_mut() = Some(reason);
        }
        for (_, waker) in self.running.borrow_mut().values_mut() {
            if let Some(waker) = waker.take() {
                waker.wake();
            }
        }
        self.changed.notify();
    }

    /// Why the disk is failed, if it is.
    pub fn failure(&self) -> Option<String> {
        self.failed.borrow().clone()
    }

    /// Ends when the disk fails.
    pub async fn until_failed(&self) {
        self.changed.until(|| self.failed.borrow().is_some().then_some(())).await;
    }

    /// What a future answers, or an error where the disk fails first.
    pub async fn unless_failed<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        match select(pin!(future), pin!(self.until_failed())).await {
            Either::Left((value, _)) => Ok(value),
            Either::Right(_) => Err(self.offline()),
        }
    }

    /// An error once it has failed.
    pub fn check(&self) -> Result<()> {
        if self.failed.borrow().is_some() { Err(self.offline()) } else { Ok(()) }
    }

    fn offline(&self) -> Error {
        match self.failure() {
            Some(reason) => Error::Gone(format!("CDP disk {} is offline: {reason}", self.path)),
            None => Error::Gone(format!("CDP disk {} is offline", self.path)),
        }
    }

    /// Runs a device operation until it ends, the disk fails, or it stalls. The operation itself is never cancelled: the device owns its buffers.
    async fn guard<T: 'static>(&self, mut operation: LocalFuture<'static, T>) -> Result<T> {
        self.check()?;
        let running = Running::enter(self);
        let ended = poll_fn(|context| {
            if let Poll::Ready(value) = operation.as_mut().poll(context) {
                return Poll::Ready(Some(value));
            }
            if self.failed.borrow().is_some() {
                return Poll::Ready(None);
            }
            if let Some(slot) = self.running.borrow_mut().get_mut(&running.id) {
                slot.1 = Some(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
        drop(running);
        ended.ok_or_else(|| self.offline())
    }

    // -- I/O -----------------------------------------------------------------------------------------------------------

    /// Writes at a block of a segment; an error fails the disk.
    pub async fn write(&self, segment: u32, block: u32, parts: Vec<Slice>) -> Result<()> {
        let at = self.geometry.at(segment, block);
        let result = self.guard(self.device.write(at, parts)).await?;
        result.map_err(|e| self.fail_io("write", &e))
    }

    /// Whether all that failed is that it cannot be written: a start reads what it holds all the same.
    pub fn can_be_read(&self) -> bool {
        self.failure().is_none() || self.failed_writing.get()
    }

    /// While what this answers lives, a disk that failed in writing is read. Each read takes no longer than a stall may.
    pub fn read_although_failed(self: &Rc<Self>) -> impl Drop + use<> {
        self.recovering.set(self.recovering.get() + 1);
        Recovering(Rc::clone(self))
    }

    /// Reads `blocks` blocks; an error is the caller's alone.
    pub async fn read(&self, segment: u32, block: u32, blocks: u32) -> Result<IoBuf> {
        let at = self.geometry.at(segment, block);
        let read = || self.device.read(at, IoBuf::for_overwrite(blocks as usize * BLOCK as usize));
        let although_failed = || self.recovering.get() > 0 && self.failed_writing.get();
        let guarded = if although_failed() { Err(self.offline()) } else { self.guard(read()).await };
        let (result, buf) = match guarded {
            // Also where it failed meanwhile, by somebody else's write.
            Err(_) if although_failed() => {
                let done = in_time(read(), &*self.host, self.stall_max_ns).await;
                done.ok_or_else(|| self.offline())?
            }
            guarded => guarded?,
        };
        match result {
            Ok(()) => Ok(buf),
            Err(e) => {
                self.errors.set(self.errors.get() + 1);
                Err(Error::device("read CDP disk", format!("{} segment {segment} block {block}", self.path), &e))
            }
        }
    }

    fn fail_io(&self, op: &'static str, e: &io::Error) -> Error {
        let error = Error::device(op, self.path.clone(), e);
        if self.failure().is_none() {
            self.failed_writing.set(true);
        }
        self.fail(error.to_string());
        error
    }

    /// Makes durable what had completed when this was called. One device sync serves all who wait for one that was not yet submitted.
    pub async fn sync(&self) -> Result<()> {
        // The sync numbered `wanted` is submitted after this point.
        let wanted = self.sync_started.get() + 1;
        loop {
            self.check()?;
            if self.sync_done.get() >= wanted {
                return Ok(());
            }
            if !self.sync_running.get() {
                self.sync_running.set(true);
                let number = self.sync_started.get() + 1;
                self.sync_started.set(number);
                let result = self.guard(self.device.sync()).await;
                self.sync_running.set(false);
                match result {
                    Ok(Ok(())) => self.sync_done.set(self.sync_done.get().max(number)),
                    Ok(Err(e)) => return Err(self.fail_io("sync", &e)),
                    Err(e) => {
                        self.changed.notify();
                        return Err(e);
                    }
                }
                self.changed.notify();
            } else {
                self.changed
                    .until(|| {
                        (!self.sync_running.get() || self.sync_done.get() >= wanted || self.failed.borrow().is_some())
                            .then_some(())
                    })
                    .await;
            }
        }
    }

    // -- clock ---------------------------------------------------------------------------------------------------------

    /// The high-water mark that was found at start or written last.
    pub fn clock_high_water(&self) -> Instant {
        Instant(self.clock_high_water.get())
    }

    /// Makes a higher mark durable (a lower one is kept out).
    pub async fn put_clock(&self, mark: Instant) -> Result<()> {
        self.changed.until(|| (!self.clock_running.get() || self.failed.borrow().is_some()).then_some(())).await;
        if mark.0 <= self.clock_high_water.get() {
            return self.check();
        }
        self.check()?;
        self.clock_running.set(true);
        let generation = self.clock_generation.get() + 1;
        let at = if generation.is_multiple_of(2) { format::CLOCK_A } else { format::CLOCK_B };
        let result = self.guard(self.device.write(at, vec![clock_page(self.id, generation, mark.0)])).await;
        let result = match result {
            Ok(Ok(())) => self.sync().await,
            Ok(Err(e)) => Err(self.fail_io("write clock of", &e)),
            Err(e) => Err(e),
        };
        if result.is_ok() {
            self.clock_generation.set(generation);
            self.clock_high_water.set(mark.0);
        }
        self.clock_running.set(false);
        self.changed.notify();
        result
    }

    // -- pool ----------------------------------------------------------------------------------------------------------

    /// Takes a free segment; it is the owner's in the table, durably, when this ends. An empty pool (possible with `overcommit` only) is waited for, as
    /// long as a stall may last.
    pub async fn allocate(&self, owner: Owner, number: u32) -> Result<SegmentRef> {
        let taken = loop {
            self.check()?;
            if let Some(taken) = self.take_free(owner, number) {
                break taken;
            }
            self.starving.set(self.starving.get() + 1);
            self.changed.notify();
            let free =
                self.changed.until(|| (!self.pool.borrow().free.is_empty() || self.failure().is_some()).then_some(()));
            futures::pin_mut!(free);
            let waited = select(free, self.host.sleep(self.stall_max_ns)).await;
            self.starving.set(self.starving.get() - 1);
            if matches!(waited, Either::Right(_)) {
                return Err(Error::NoSpace { what: "segment pool", needed: self.geometry.segment_size, free: 0 });
            }
        };
        self.store_table().await?;
        Ok(taken)
    }

    fn take_free(&self, owner: Owner, number: u32) -> Option<SegmentRef> {
        let mut pool = self.pool.borrow_mut();
        let cursor = pool.cursor;
        let segment = *pool.free.range(cursor..).next().or_else(|| pool.free.iter().next())?;
        pool.free.remove(&segment);
        pool.cursor = segment + 1;
        let lap = pool.entries[segment as usize].lap.get() + 1;
        pool.entries[segment as usize] = TableEntry {
            state: 1,
            kind: owner.kind as u8,
            reserved: [0; 2],
            number: number.into(),
            volume_id: *owner.volume.as_bytes(),
            log_seq: owner.log_seq.into(),
            log_id: owner.log_id.into(),
            lap: lap.into(),
            reserved2: [0; 16],
        };
        pool.dirty_pages.insert(u64::from(segment) / TablePageHeader::ENTRIES);
        Some(SegmentRef { segment, lap, number })
    }

    /// Ends when somebody waits for a segment; an error when the disk failed.
    pub async fn until_starving(&self) -> Result<()> {
        self.changed.until(|| (self.starving.get() > 0 || self.failure().is_some()).then_some(())).await;
        self.check()
    }

    /// Gives segments back. They can be given out again when the table says so durably. The caller has made durable the record that frees them
    /// and has seen the last read on them end.
    pub async fn release(&self, segments: &[SegmentRef]) -> Result<()> {
        if segments.is_empty() {
            return Ok(());
        }
        {
            let mut pool = self.pool.borrow_mut();
            for s in segments {
                let entry = &mut pool.entries[s.segment as usize];
                debug_assert!(entry.state == 1 && entry.lap.get() == s.lap);
                *entry = TableEntry { lap: entry.lap, ..TableEntry::default() };
                pool.dirty_pages.insert(u64::from(s.segment) / TablePageHeader::ENTRIES);
            }
        }
        self.store_table().await?;
        self.pool.borrow_mut().free.extend(segments.iter().map(|s| s.segment));
        self.changed.notify();
        Ok(())
    }

    /// Writes all dirty table pages to their older copies and syncs. Callers that come while one runs share the next.
    async fn store_table(&self) -> Result<()> {
        let wanted = self.table_started.get() + 1;
        loop {
            self.check()?;
            if self.table_done.get() >= wanted {
                return Ok(());
            }
            if self.table_running.get() {
                self.changed
                    .until(|| {
                        (!self.table_running.get() || self.table_done.get() >= wanted || self.failed.borrow().is_some())
                            .then_some(())
                    })
                    .await;
                continue;
            }
            self.table_running.set(true);
            let number = self.table_started.get() + 1;
            self.table_started.set(number);
            let result = self.store_table_pages().await;
            self.table_running.set(false);
            if result.is_ok() {
                self.table_done.set(self.table_done.get().max(number));
            }
            self.changed.notify();
            result?;
        }
    }

    async fn store_table_pages(&self) -> Result<()> {
        let mut writes = Vec::new();
        {
            let mut pool = self.pool.borrow_mut();
            for page in std::mem::take(&mut pool.dirty_pages) {
                let generation = pool.page_generation[page as usize] + 1;
                pool.page_generation[page as usize] = generation;
                let first = (page * TablePageHeader::ENTRIES) as usize;
                let last = (first + TablePageHeader::ENTRIES as usize).min(pool.entries.len());
                let bytes = table_page(self.id, page, generation, &pool.entries[first..last]);
                // Odd generations live in A, even ones in B: init wrote generation 1 to both.
                let table = if generation.is_multiple_of(2) { self.geometry.table_b } else { self.geometry.table_a };
                writes.push(self.device.write(table + page * BLOCK, vec![bytes]));
            }
        }
        for write in writes {
            self.guard(write).await?.map_err(|e| self.fail_io("write segment table of", &e))?;
        }
        self.sync().await
    }

    /// Segments that the table gives to a volume.
    pub fn segments_of(&self, volume: Uuid) -> Vec<(SegmentRef, TableEntry)> {
        let pool = self.pool.borrow();
        (0u32..)
            .zip(&pool.entries)
            .filter(|(_, e)| e.state == 1 && e.volume_id == *volume.as_bytes())
            .map(|(segment, e)| (SegmentRef { segment, lap: e.lap.get(), number: e.number.get() }, *e))
            .collect()
    }

    /// Segments free now.
    pub fn free_segments(&self) -> u64 {
        self.pool.borrow().free.len() as u64
    }

    /// Bytes that are not for a new volume: those promised to volumes, and those that volumes without a promise have in use (they are not served, or have gone; what they
    /// left here may be wanted).
    pub fn reserved_bytes(&self) -> u64 {
        self.reserved_but_for(None)
    }

    /// Bytes that a volume could be promised: all but what is for others.
    pub(crate) fn room_for(&self, volume: Uuid) -> u64 {
        (self.geometry.segments * self.geometry.segment_size).saturating_sub(self.reserved_but_for(Some(volume)))
    }

    fn reserved_but_for(&self, volume: Option<Uuid>) -> u64 {
        let pool = self.pool.borrow();
        let others = |id: &Uuid| Some(*id) != volume;
        let promised: u64 = pool.reserved.iter().filter(|(id, _)| others(id)).map(|(_, bytes)| bytes).sum();
        let is_left = |e: &&TableEntry| {
            let id = Uuid::from_bytes(e.volume_id);
            e.state == 1 && others(&id) && !pool.reserved.contains_key(&id)
        };
        promised + pool.entries.iter().filter(is_left).count() as u64 * self.geometry.segment_size
    }

    /// Promises `bytes` to a volume (0: takes the promise back). Refused when the sum does not fit, unless `overcommit`.
    pub fn reserve(&self, volume: Uuid, bytes: u64, overcommit: bool) -> Result<()> {
        let free = self.room_for(volume);
        if bytes > 0 && !overcommit && bytes > free {
            return Err(Error::NoSpace { what: "reserve_capacity", needed: bytes, free });
        }
        let mut pool = self.pool.borrow_mut();
        if bytes == 0 {
            pool.reserved.remove(&volume);
        } else {
            pool.reserved.insert(volume, bytes);
        }
        Ok(())
    }

    /// What `disk list` shows.
    pub fn info(&self) -> DiskInfo {
        DiskInfo {
            id: self.id,
            path: self.path.clone(),
            size: self.size,
            segment_size: self.geometry.segment_size,
            segments: self.geometry.segments,
            segments_free: self.free_segments(),
            reserved_bytes: self.reserved_bytes(),
            online: self.failed.borrow().is_none(),
            error: self.failure().unwrap_or_default(),
            errors: self.errors.get(),
        }
    }
}

/// See [`Disk::read_although_failed`].
struct Recovering(Rc<Disk>);

impl Drop for Recovering {
    fn drop(&mut self) {
        self.0.recovering.set(self.0.recovering.get() - 1);
    }
}

/// An operation's place in [`Disk::running`]; leaves it also when the caller is dropped.
struct Running<'a> {
    disk: &'a Disk,
    id: u64,
}

impl<'a> Running<'a> {
    fn enter(disk: &'a Disk) -> Self {
        let id = disk.running_next.get();
        disk.running_next.set(id + 1);
        disk.running.borrow_mut().insert(id, (0, None));
        Self { disk, id }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.disk.running.borrow_mut().remove(&self.id);
    }
}

impl PageReader for Disk {
    fn page(&self, segment: u32, block: u32, crc: u32) -> LocalFuture<'_, Result<Rc<IndexPage>>> {
        Box::pin(async move {
            if let Some(page) = self.cached(segment, block, crc) {
                return Ok(page);
            }
            let page = self.pages(segment, block, vec![crc]).await?.remove(0);
            self.cache.borrow_mut().insert((self.cache_id, segment, block), Rc::clone(&page));
            Ok(page)
        })
    }

    fn pages(&self, segment: u32, block: u32, crcs: Vec<u32>) -> LocalFuture<'_, Result<Vec<Rc<IndexPage>>>> {
        Box::pin(async move {
            let place = || format!("{} segment {segment} block {block}", self.path);
            let room = (self.geometry.segment_size / BLOCK).saturating_sub(u64::from(block));
            let count = crcs.len().min(room as usize);
            if u64::from(segment) >= self.geometry.segments || count == 0 {
                return Err(Error::Damaged { what: "pointer to an index page", place: place() });
            }
            let bytes = self.read(segment, block, count as u32).await?;
            let parsed =
                bytes.chunks(BLOCK as usize).zip(&crcs).map(|(bytes, crc)| match IndexPage::parse(bytes, None) {
                    Ok(page) if page.crc() != *crc => Err(Error::Damaged { what: "index page", place: place() }),
                    result => result.map(Rc::new),
                });
            let mut pages = Vec::with_capacity(count);
            for page in parsed {
                match page {
                    Ok(page) => pages.push(page),
                    Err(error) if pages.is_empty() => return Err(error),
                    Err(_) => break,
                }
            }
            Ok(pages)
        })
    }

    fn cached(&self, segment: u32, block: u32, crc: u32) -> Option<Rc<IndexPage>> {
        self.cache.borrow_mut().get((self.cache_id, segment, block), crc)
    }
}

/// What a call answers, or nothing where it outlives the stall bound: of a disk over which nobody watches yet, or not any more.
async fn in_time<T>(call: LocalFuture<'static, T>, host: &dyn Host, stall_max_ns: u64) -> Option<T> {
    match select(call, host.sleep(stall_max_ns)).await {
        Either::Left((answer, _)) => Some(answer),
        Either::Right(_) => None,
    }
}

/// Fails the disk when an operation has been running for the whole stall bound.
async fn watch_stalls(disk: Weak<Disk>, host: Rc<dyn Host>, stall_max_ns: u64) {
    loop {
        host.sleep((stall_max_ns / u64::from(STALL_SLICES)).max(1)).await;
        let Some(disk) = disk.upgrade() else { return };
        if disk.failed.borrow().is_some() {
            return;
        }
        let mut stalled = false;
        for (ticks, _) in disk.running.borrow_mut().values_mut() {
            *ticks += 1;
            stalled |= *ticks > STALL_SLICES;
        }
        if stalled {
            disk.fail(format!("an operation took longer than {} ms", stall_max_ns / 1_000_000));
        }
    }
}

fn clock_page(id: Uuid, generation: u64, high_water: u64) -> Slice {
    let page = ClockPage {
        magic: ClockPage::MAGIC,
        crc: 0.into(),
        version: format::VERSION.into(),
        flags: 0.into(),
        disk_id: *id.as_bytes(),
        generation: generation.into(),
        high_water: high_water.into(),
    };
    IoBuf::copy_of(&format::sealed_block(&page, 8)).share()
}

fn table_page(id: Uuid, page: u64, generation: u64, entries: &[TableEntry]) -> Slice {
    let header = TablePageHeader {
        magic: TablePageHeader::MAGIC,
        crc: 0.into(),
        version: format::VERSION.into(),
        flags: 0.into(),
        disk_id: *id.as_bytes(),
        page: page.into(),
        generation: generation.into(),
        reserved: [0; 16],
    };
    let mut buf = IoBuf::zeroed(BLOCK as usize);
    buf[..64].copy_from_slice(header.as_bytes());
    let body = entries.as_bytes();
    buf[64..64 + body.len()].copy_from_slice(body);
    let sum = format::crc(&buf[12..]);
    buf[8..12].copy_from_slice(&sum.to_le_bytes());
    buf.share()
}

pub(crate) fn parse_table_page(bytes: &[u8], id: Uuid, page: u64) -> Option<(u64, Vec<TableEntry>)> {
    let (header, rest) = TablePageHeader::read_from_prefix(bytes).ok()?;
    let whole = header.magic == TablePageHeader::MAGIC
        && header.version.get() == format::VERSION
        && header.flags.get() == 0
        && header.disk_id == *id.as_bytes()
        && header.page.get() == page
        && header.crc.get() == format::crc(&bytes[12..BLOCK as usize]);
    if !whole {
        return None;
    }
    let entries = rest
        .chunks_exact(size_of::<TableEntry>())
        .take(TablePageHeader::ENTRIES as usize)
        .filter_map(|chunk| TableEntry::read_from_bytes(chunk).ok())
        .collect();
    Some((header.generation.get(), entries))
}
