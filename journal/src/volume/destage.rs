//! Behind the ack: the destager brings acked writes to the primary, and history up to its final shape.
//!
//! One task per volume. It works on the oldest log that is not sealed, in batches sorted by LBA (design part 3):
//! 1. read the old content of blocks first touched in this log, 2. append it as before-images, 3. sync the journal,
//! 4. write to the primary the content that 3 made durable, 5. sync the primary, 6. advance the watermark.
//!
//! Steps 1 to 3 of a batch run beside steps 4 to 6 of the batches before it; either are done for one batch after the other. Order is kept per block: a block that is in
//! two of them is written by the later batch later, and needs no before-image there, since the earlier one took it in the same log. Of two logs only one is destaged at a
//! time.
//!
//! When the log is closed and its overlay is empty, it copies the log's revert, merges the index and seals it. The next log is destaged beside the
//! sealing, and no further one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::rc::Rc;

use futures::StreamExt as _;
use futures::future::{join, join_all};
use futures::stream;
use zerocopy::IntoBytes;

use super::{CloseReason, State, Volume, WRITE_FENCE, whole_mask};
use crate::buf::{IoBuf, Slice};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::format::{ControlKind, ControlRevert, StreamKind};
use crate::frame::FrameBuilder;
use crate::info::{EventKind, Health};
use crate::log::{Log, VolumePoint, frame_blocks_max};
use crate::mutation::{Mutation, active};
use crate::overlay::{Batch, Content, Item, compose};
use crate::signal::Signal;
use crate::types::{BLOCK, Instant, SECTOR, SECTORS_PER_BLOCK};

/// Blocks of old content that are read before they are appended.
const BATCH_BLOCKS: u64 = 2048;
/// Batches that are prepared and not finished when another one is prepared, at the most, while the backlog is shallow and while it is deep. More of them let neither
/// half wait for a slow request of the other, and keep the disk busier.
const AHEAD: (usize, usize) = (1, 3);
/// Blocks of zero ranges in a batch. Holes of the primary cost nothing, so this may be large.
const BATCH_ZERO_BLOCKS: u64 = 1 << 28;
/// Bytes of one read or write of the primary at the most.
const IO_BLOCKS: u64 = 256;
/// Bytes of one hole at the most: nothing is destaged, and the journal is not left, while one is made.
const PUNCH_BYTES_MAX: u64 = 1 << 30;
/// Ranges of a piece of a revert that are read at once.
const RANGES: usize = 64;
/// Eighths of the backlog's bound at which the destager begins without waiting for company, and below which it stops again.
const BACKLOG_BEGINS_EIGHTHS: u64 = 4;
const BACKLOG_ENDS_EIGHTHS: u64 = 2;
/// A write waits at most this long for company before it is destaged, nanoseconds.
const LINGER_NS: u64 = 500_000_000;
/// Back-off of a failing primary, nanoseconds.
const BACK_OFF_NS: (u64, u64) = (100_000_000, 5_000_000_000);

/// Requests to the primary that are submitted together, so that they share one system call and one doorbell of the device: the most, when the
/// backlog is deep (see [`Volume::group`]).
const GROUP: usize = 16;
/// Groups under way at once, while the backlog is shallow and otherwise: the device has work while the next one is made. More, or larger ones, keep the guest's own
/// requests waiting.
const GROUPS: (usize, usize) = (1, 3);
/// A guest that asked for nothing for this long does not notice how busy the disk is, nanoseconds.
const QUIET_NS: u64 = 20_000_000;
/// Ranges that are punched in one go.
const PUNCHES: usize = 16;
/// Batches, or pieces of a revert, for one such go at the least.
const PIECES_A_PUNCH: u32 = 8;
/// Blocks of old content in one append, for each request of a group: a guest's own append waits for one that is under way. Its header costs a block.
const APPEND_BLOCKS: u64 = 4;

/// How much of a batch is done already, as the guest may see it. Room in the backlog comes in whole batches; counted like this, a guest
/// at the bound goes on evenly at the destager's pace, and does not wait for a batch and then run for one.
struct Landing {
    volume: Rc<Volume>,
    bytes: Cell<u64>,
    bytes_max: u64,
}

impl Landing {
    fn of(volume: &Rc<Volume>, batch: &Batch) -> Self {
        let blocks = batch.items.iter().filter(|item| matches!(item.content, Content::Data(..))).count() as u64;
        Self { volume: Rc::clone(volume), bytes: Cell::new(0), bytes_max: blocks * BLOCK }
    }

    fn advance_to(&self, bytes: u64) {
        let bytes = bytes.min(self.bytes_max);
        if bytes > self.bytes.get() {
            self.volume.landing.set(self.volume.landing.get() + bytes - self.bytes.replace(bytes));
            self.volume.changed.notify();
        }
    }

    /// So many blocks more have been read, or written: half of their way.
    fn step(&self, blocks: u64) {
        self.advance_to(self.bytes.get() + blocks * BLOCK / 2);
    }

    /// Steps 1 to 3 are done.
    fn half(&self) {
        self.advance_to(self.bytes_max / 2);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.volume.landing.set(self.volume.landing.get() - self.bytes.get());
    }
}

/// A batch whose before-images and writes the journal holds durably.
struct Prepared {
    landing: Landing,
    batch: Batch,
    /// Old content of the blocks of which the guest wrote only some sectors, as far as it was just read.
    bases: Vec<(u64, Slice)>,
    started: u64,
}

/// A piece of a revert whose before-images the journal holds durably.
struct Piece {
    blocks: Vec<u64>,
    /// What the blocks held at the target.
    writes: Vec<Write>,
    /// Blocks of which nobody knows that any more.
    unrestorable: Vec<u64>,
}

/// A piece of a batch's before-images.
enum Before {
    Data(u64, Slice),
    Zero(u64, u64),
    Unreadable(u64),
}

impl Volume {
    /// The destager; ends when the volume leaves the journal, or after it brought the backlog to the primary because the disk failed.
    pub(crate) async fn run_destager(self: Rc<Self>) {
        loop {
            let disk = {
                let state = self.state.borrow();
                state.attach.as_ref().map(|a| Rc::clone(&a.disk))
            };
            let Some(disk) = disk else { break };
            let step = self.destage_step(&disk).await;
            if disk.failure().is_some() {
                self.leave_failed_disk(&disk).await;
                break;
            }
            match step {
                Ok(ControlFlow::Continue(())) => self.state.borrow_mut().fence_failing = None,
                Ok(ControlFlow::Break(())) => break,
                Err(error) => {
                    if self.state.borrow().attach.is_none() {
                        break;
                    }
                    // Not the disk's write path (that latches): damage or a failing primary. Say so, wait, try again; nothing is dropped.
                    tracing::error!(volume = %self.id, %error, "destaging failed");
                    if matches!(error, Error::Device { op: WRITE_FENCE, .. }) {
                        let now = self.host.boot_ns();
                        self.state.borrow_mut().fence_failing.get_or_insert((now, error));
                    } else {
                        self.note_primary_failing(&error);
                    }
                    self.host.sleep(BACK_OFF_NS.1).await;
                }
            }
        }
        self.state.borrow_mut().destager_running = false;
        self.changed.notify();
    }

    /// Waits for work and does one piece of it.
    async fn destage_step(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<ControlFlow<()>> {
        enum Work {
            Stop,
            Destage(Rc<Log>),
            Copy(Rc<Log>),
            Seal(Rc<Log>),
            Punch,
        }
        let work = self
            .work
            .until(|| {
                let state = self.state.borrow();
                if state.attach.is_none() {
                    return Some(Work::Stop);
                }
                if disk.failure().is_some() {
                    return Some(Work::Stop);
                }
                let punch = !state.punch.is_empty();
                if punch && self.punch_is_due(&state) {
                    return Some(Work::Punch);
                }
                let Some(log) = state.logs.iter().find(|l| !l.state.borrow().sealed) else {
                    return punch.then_some(Work::Punch);
                };
                if self.is_due(&state, log, BACKLOG_BEGINS_EIGHTHS) {
                    return Some(Work::Destage(Rc::clone(log)));
                }
                let inner = log.state.borrow();
                if inner.closed && inner.frames_pending == 0 && inner.overlay.is_empty() {
                    return Some(if inner.revert.is_some() {
                        Work::Copy(Rc::clone(log))
                    } else {
                        Work::Seal(Rc::clone(log))
                    });
                }
                drop(inner);
                punch.then_some(Work::Punch)
            })
            .await;
        match work {
            Work::Stop => return Ok(ControlFlow::Break(())),
            Work::Destage(log) => self.destage_log(disk, &log).await?,
            Work::Copy(log) => self.copy_revert(disk, &log).await?,
            Work::Seal(log) => {
                let sealing = Cell::new(true);
                let seal = async {
                    let result = self.seal(disk, &log).await;
                    sealing.set(false);
                    self.work.notify();
                    result
                };
                // A start copies a revert anew unless it finds that done or the log sealed, and that copy may only meet writes which are in the overlay: so
                // what says it must be durable before anything newer is destaged.
                let alone = log.state.borrow().close_reason == CloseReason::Reverted as u32;
                if alone && !active(Mutation::RevertSealedInCompany) {
                    seal.await?;
                } else {
                    let (sealed, destaged) = join(seal, self.destage_beside(disk, &log, &sealing)).await;
                    sealed?;
                    destaged?;
                }
            }
            Work::Punch => self.punch_some(disk).await,
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Punches a few of the ranges that wait for it. What is written meanwhile is destaged behind it, on this same task.
    async fn punch_some(&self, disk: &Disk) {
        self.pieces_since_punch.set(0);
        for _ in 0..PUNCHES {
            let range = {
                let mut state = self.state.borrow_mut();
                let left = disk.failure().is_some() || state.attach.is_none();
                let range = state.punch.pop_first().filter(|_| !left);
                // The rest of a long one waits its turn, where a write or a stop can still take it back.
                let range = range.map(|(block, count)| {
                    let now = count.min(PUNCH_BYTES_MAX / BLOCK);
                    state.punch.insert(block + now, count - now, Instant::ZERO);
                    self.bytes_of(block, now)
                });
                state.punching = range.is_some();
                range
            };
            let Some((start, len)) = range else { break };
            if len > 0 {
                // A hint: a device that cannot punch loses nothing.
                let _ = self.primary.discard(start, len).await;
            }
        }
        self.state.borrow_mut().punching = false;
        self.changed.notify();
    }

    /// Whether ranges have waited to be punched for long enough, beside work that does not end.
    fn punch_is_due(&self, state: &State) -> bool {
        !state.punch.is_empty() && self.pieces_since_punch.get() >= PIECES_A_PUNCH
    }

    /// Counts a batch or a piece of a revert for [`Volume::punch_is_due`].
    fn count_piece(&self) {
        self.pieces_since_punch.set(self.pieces_since_punch.get().saturating_add(1));
    }

    /// Writes at or before this instant have waited long enough for company.
    fn linger_until(&self) -> u64 {
        self.host.wall_ns().saturating_sub(LINGER_NS)
    }

    /// Bytes of a block range, cut at the end of the primary.
    fn bytes_of(&self, block: u64, count: u64) -> (u64, u64) {
        let start = block.saturating_mul(BLOCK);
        (start, count.saturating_mul(BLOCK).min(self.primary_bytes.get().saturating_sub(start)))
    }

    /// Brings what is due of a log to the primary: batches are prepared while earlier ones are finished.
    async fn destage_log(self: &Rc<Self>, disk: &Rc<Disk>, log: &Rc<Log>) -> Result<()> {
        let ready: RefCell<VecDeque<Prepared>> = RefCell::default();
        let unfinished = Cell::new(0);
        let over = Cell::new(false);
        let moved = Signal::default();
        let end = || {
            over.set(true);
            moved.notify();
        };
        let prepare = async {
            let prepared = loop {
                let most = if self.backlog_is_deep() { AHEAD.1 } else { AHEAD.0 };
                let room = || (over.get() || unfinished.get() < most).then(|| over.get());
                if moved.until(room).await {
                    break Ok(());
                }
                let Some(batch) = self.next_batch(disk, log) else { break Ok(()) };
                match self.prepare_batch(disk, log, batch).await {
                    Ok(prepared) => {
                        unfinished.set(unfinished.get() + 1);
                        ready.borrow_mut().push_back(prepared);
                    }
                    Err((error, batch)) => {
                        // It was taken last, so it goes back first.
                        log.state.borrow_mut().overlay.put_back(&batch);
                        break Err(error);
                    }
                }
                moved.notify();
            };
            end();
            prepared
        };
        let finish = async {
            loop {
                let next = || ready.borrow_mut().pop_front().map(Some).or_else(|| over.get().then_some(None));
                let Some(earliest) = moved.until(next).await else { return Ok(()) };
                if let Err(failed) = self.finish_batch(disk, log, earliest).await {
                    end();
                    return Err(failed);
                }
                unfinished.set(unfinished.get() - 1);
                moved.notify();
            }
        };
        let (prepared, finished) = join(prepare, finish).await;
        if let Err((error, batch)) = finished {
            // What is not on the primary goes back into the overlay, the latest batch first.
            let unfinished = ready.take();
            let mut state = log.state.borrow_mut();
            unfinished.iter().rev().for_each(|later| state.overlay.put_back(&later.batch));
            state.overlay.put_back(&batch);
            return Err(error);
        }
        prepared
    }

    /// Destages the log behind `log` for as long as that is being sealed: the merge of a large log takes longer than the backlog has room for.
    ///
    /// `log` was not ended by a revert. All of it is on the primary, durably, and every frame that is appended from here on says so by its watermark. A before-image of the next log
    /// is durable before the block is overwritten, so a start that finds one never redoes a write of `log` over it.
    async fn destage_beside(self: &Rc<Self>, disk: &Rc<Disk>, log: &Rc<Log>, sealing: &Cell<bool>) -> Result<()> {
        loop {
            let next = self.work.until(|| {
                let state = self.state.borrow();
                if !sealing.get() || state.attach.is_none() || disk.failure().is_some() {
                    return Some(None);
                }
                let next = state.logs.iter().find(|l| l.seq > log.seq)?;
                self.is_due(&state, next, BACKLOG_BEGINS_EIGHTHS).then(|| Some(Rc::clone(next)))
            });
            let Some(next) = next.await else { return Ok(()) };
            // Nobody else comes to it while a log is sealed, and batches wait for it. Sealing has nothing to do with the primary.
            if self.punch_is_due(&self.state.borrow()) {
                self.punch_some(disk).await;
                continue;
            }
            self.destage_log(disk, &next).await?;
        }
    }

    /// Takes a batch of a log, if one is due and nothing else comes first.
    fn next_batch(&self, disk: &Disk, log: &Log) -> Option<Batch> {
        let state = self.state.borrow();
        let stop = state.attach.is_none() || disk.failure().is_some() || self.punch_is_due(&state);
        // Once begun it goes on for a while: a pipeline that stops and starts again runs half empty.
        if stop || !self.is_due(&state, log, BACKLOG_ENDS_EIGHTHS) {
            return None;
        }
        drop(state);
        let blocks_max = self.engine.upgrade()?.config().destage_blocks_max;
        loop {
            let mut inner = log.state.borrow_mut();
            let batch = inner.overlay.take(blocks_max, BATCH_ZERO_BLOCKS);
            if !batch.items.is_empty() {
                self.count_piece();
                return Some(batch);
            }
            // All that the queue named is under way already, in a newer version.
            inner.overlay.put_back(&batch);
            if !inner.overlay.has_work() {
                drop(inner);
                self.changed.notify();
                return None;
            }
        }
    }

    /// How many requests to the primary go together now. Few while the backlog is shallow, so that a guest with few writes in flight does not find the
    /// disk busy with ours; more the nearer it gets to its bound, at which the guest would wait; all when somebody waits for it, and all for a revert
    /// that is copied while the guest is quiet.
    fn group(&self) -> usize {
        let Some(engine) = self.engine.upgrade() else { return GROUP };
        let quiet = self.guest_is_quiet();
        let state = self.state.borrow();
        let hurried = state.logs.iter().rev().take_while(|log| !log.state.borrow().sealed).any(|log| {
            let log = log.state.borrow();
            (log.closed && log.overlay.has_work()) || (quiet && log.revert.is_some())
        });
        if hurried || state.backlog_full || state.drain_waiters > 0 || self.throttled.get() > 0 {
            return GROUP;
        }
        match Self::backlog(&state) * 8 / engine.config().backlog_bytes_max.max(1) {
            ..=4 => GROUP / 8,
            5 => GROUP / 4,
            6 => GROUP / 2,
            _ => GROUP,
        }
    }

    /// How many groups are under way at once.
    fn groups(&self) -> usize {
        if self.backlog_is_deep() { GROUPS.1 } else { GROUPS.0 }
    }

    /// Whether the disk's pace counts more than a guest with few requests in flight.
    fn backlog_is_deep(&self) -> bool {
        self.group() > GROUP / 8
    }

    /// Whether no request of the guest is under way, and none was for [`QUIET_NS`], as far as was seen from one call to the next.
    fn guest_is_quiet(&self) -> bool {
        let ((begun, ended), (seen, since)) = (self.requests.get(), self.answered.get());
        let now = self.host.boot_ns();
        if begun != ended || ended != seen {
            self.answered.set((ended, now));
            return false;
        }
        now.saturating_sub(since) >= QUIET_NS
    }

    /// Pieces of `all`, each as large as [`Self::group`] says when it is its turn.
    fn in_groups<'a, T>(&'a self, mut all: &'a [T]) -> impl Iterator<Item = &'a [T]> {
        std::iter::from_fn(move || {
            let (group, rest) = all.split_at(self.group().min(all.len()));
            all = rest;
            (!group.is_empty()).then_some(group)
        })
    }

    /// Whether a log has something that must not wait any longer.
    fn is_due(&self, state: &State, log: &Log, eighths: u64) -> bool {
        let inner = log.state.borrow();
        if !inner.overlay.has_work() {
            return false;
        }
        let Some(engine) = self.engine.upgrade() else { return false };
        let deep = Self::backlog(state) * 8 >= engine.config().backlog_bytes_max * eighths;
        // Also where instants run ahead of a wall clock that was set back.
        let rests = self.host.boot_ns().saturating_sub(state.last_write_ns) >= LINGER_NS;
        let urgent = inner.closed || state.drain_waiters > 0 || deep || state.backlog_full || rests;
        urgent || inner.overlay.oldest().is_some_and(|oldest| oldest.0 <= self.linger_until())
    }

    /// Steps 1 to 3.
    async fn prepare_batch(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        log: &Rc<Log>,
        batch: Batch,
    ) -> std::result::Result<Prepared, (Error, Batch)> {
        let started = self.host.boot_ns();
        let landing = Landing::of(self, &batch);
        match self.keep_before(disk, log, &batch, &landing).await {
            Ok(bases) => {
                landing.half();
                Ok(Prepared { landing, batch, bases, started })
            }
            Err(error) => Err((error, batch)),
        }
    }

    async fn keep_before(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        log: &Rc<Log>,
        batch: &Batch,
        landing: &Landing,
    ) -> Result<Vec<(u64, Slice)>> {
        // 1, 2: before-images of blocks that have none in this log.
        let wanted: Vec<(u64, u64)> = {
            let state = log.state.borrow();
            let imaged = state.imaged.as_ref().expect("an unsealed log knows its before-images");
            let mut wanted = Vec::new();
            for item in &batch.items {
                missing_ranges(imaged, item.block, item.count, &mut wanted);
                if active(Mutation::BeforeImageTwice) {
                    push_range(&mut wanted, item.block, item.count);
                }
            }
            if active(Mutation::BeforeImageSkipped) {
                wanted.retain(|(block, _)| block % 4 != 1);
            }
            wanted
        };
        let partial = batch.items.iter().filter(|item| matches!(item.content, Content::Data(_, mask) if mask != 0xFF));
        let partial: Vec<u64> = partial.map(|item| item.block).collect();
        let bases = self.take_before_images(log, &wanted, &partial, Some(landing)).await?;
        // 3: the journal holds durably what is about to be overwritten and what is about to be written.
        if !active(Mutation::DestageBeforeSync) {
            self.sync_journal(disk, batch.newest).await?;
            self.sync_before(disk, log).await?;
        }
        Ok(bases)
    }

    /// Steps 4 to 6.
    async fn finish_batch(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        log: &Rc<Log>,
        prepared: Prepared,
    ) -> std::result::Result<(), (Error, Batch)> {
        let Prepared { landing, batch, bases, started } = prepared;
        // 4, 5: the primary, again and again until it holds.
        let writes = self.compose_batch(&batch, &bases).await;
        if let Err(error) = self.write_until_durable(disk, &writes, Some(&landing)).await {
            return Err((error, batch));
        }
        // 6
        drop(landing);
        log.state.borrow_mut().overlay.complete(&batch);
        {
            let mut stats = self.stats.borrow_mut();
            stats.destaged_bytes += writes.iter().map(Write::len).sum::<u64>();
            stats.destage_latency.record(self.host.boot_ns().saturating_sub(started));
        }
        self.note_backlog();
        self.changed.notify();
        Ok(())
    }

    fn note_backlog(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let Ok(engine) = self.engine() else { return };
        if state.backlog_full && Self::backlog(&state) * 2 < engine.config().backlog_bytes_max {
            state.backlog_full = false;
            self.event_later(EventKind::BacklogDrained, "the backlog is below half of its bound again");
        }
    }

    /// Makes the frames of the before-image stream durable.
    async fn sync_before(self: &Rc<Self>, disk: &Rc<Disk>, log: &Rc<Log>) -> Result<()> {
        let frames = log.state.borrow().before.frames_completed;
        if log.state.borrow().before.frames_durable >= frames {
            return Ok(());
        }
        self.sync_completed(disk).await
    }

    /// Steps 1 and 2: reads the old content of the ranges and appends it. The blocks are marked as imaged when their frame has completed, which is
    /// before anything overwrites them.
    /// Answers the old content of those among them that are in `partial`, which is sorted.
    async fn take_before_images(
        self: &Rc<Self>,
        log: &Rc<Log>,
        wanted: &[(u64, u64)],
        partial: &[u64],
        landing: Option<&Landing>,
    ) -> Result<Vec<(u64, Slice)>> {
        let mut kept: Vec<(u64, Slice)> = Vec::new();
        let mut group: Vec<(u64, u64)> = Vec::new();
        let mut grouped = 0;
        let (wanted, lost) = self.without_lost(log, wanted);
        self.append_before(log, lost.into_iter().map(Before::Unreadable).collect()).await?;
        // What was read last is appended while the next is read.
        let mut images = Vec::new();
        for (block, count) in wanted {
            if count > BATCH_BLOCKS {
                // A long range of zeroes: what is a hole needs no read, the rest goes in pieces of a batch.
                for piece in self.allocation_of(block, count).await? {
                    match piece {
                        (start, len, true) => self.append_before(log, vec![Before::Zero(start, len)]).await?,
                        (start, len, false) => {
                            for piece in pieces_of(start, len, BATCH_BLOCKS) {
                                let images = self.read_before(&[piece], None).await;
                                self.append_before(log, images).await?;
                            }
                        }
                    }
                }
                continue;
            }
            for (at, n) in pieces_of(block, count, IO_BLOCKS) {
                group.push((at, n));
                grouped += n;
                if grouped < APPEND_BLOCKS * self.group() as u64 {
                    continue;
                }
                let (read, appended) =
                    join(self.read_before(&group, landing), self.append_before(log, std::mem::take(&mut images))).await;
                appended?;
                keep_bases(&read, partial, &mut kept);
                images = read;
                group.clear();
                grouped = 0;
            }
        }
        let (read, appended) = join(self.read_before(&group, landing), self.append_before(log, images)).await;
        appended?;
        keep_bases(&read, partial, &mut kept);
        self.append_before(log, read).await?;
        Ok(kept)
    }

    /// The ranges without the blocks whose content at the log's start was lost, and those.
    fn without_lost(&self, log: &Rc<Log>, wanted: &[(u64, u64)]) -> (Vec<(u64, u64)>, Vec<u64>) {
        let state = self.state.borrow();
        if state.lost_blocks.is_none() && state.stale_blocks.is_empty() {
            return (wanted.to_vec(), Vec::new());
        }
        let (mut ranges, mut lost) = (Vec::new(), Vec::new());
        for (first, count) in wanted {
            for block in *first..first + count {
                if state.lost_before(block, log.seq) {
                    lost.push(block);
                } else {
                    push_range(&mut ranges, block, 1);
                }
            }
        }
        (ranges, lost)
    }

    /// The allocation of a block range: (first block, blocks, all of it a hole), in whole blocks.
    async fn allocation_of(&self, block: u64, count: u64) -> Result<Vec<(u64, u64, bool)>> {
        let (start, len) = self.bytes_of(block, count);
        let mut out: Vec<(u64, u64, bool)> = Vec::new();
        let mut push = |first: u64, end: u64, hole: bool| {
            if end <= first {
                return;
            }
            match out.last_mut() {
                Some(last) if last.2 == hole => last.1 = end - last.0,
                _ => out.push((first, end - first, hole)),
            }
        };
        let mut at = start;
        let mut done = block;
        if len > 0 {
            for piece in self
                .primary
                .allocation(start, len)
                .await
                .map_err(|e| Error::device("allocation map of", self.path(), &e))?
            {
                let end = at + piece.len;
                if piece.hole {
                    // Only whole blocks of a hole.
                    let first = at.div_ceil(BLOCK).max(done);
                    let last = if end == start + len { end.div_ceil(BLOCK) } else { end / BLOCK };
                    if last > first {
                        push(done, first, false);
                        push(first, last, true);
                        done = last;
                    }
                }
                at = end;
            }
        }
        push(done, block + count, false);
        Ok(out)
    }

    /// Step 1: reads ranges of the primary, side by side. What cannot be read is tried block by block.
    async fn read_before(self: &Rc<Self>, ranges: &[(u64, u64)], landing: Option<&Landing>) -> Vec<Before> {
        let reads: Vec<_> = ranges.iter().flat_map(|(block, count)| pieces_of(*block, *count, IO_BLOCKS)).collect();
        let mut out = Vec::new();
        let groups = self.in_groups(&reads).map(|group| async move {
            (group, join_all(group.iter().map(|(block, count)| self.read_old(*block, *count))).await)
        });
        let mut groups = stream::iter(groups).buffered(self.groups());
        while let Some((reads, results)) = groups.next().await {
            if let Some(landing) = landing {
                landing.step(reads.iter().map(|(_, count)| count).sum());
            }
            for ((block, count), result) in reads.iter().zip(results) {
                match result {
                    Ok(data) => push_images(&mut out, *block, &data),
                    Err(_) if *count == 1 => out.push(Before::Unreadable(*block)),
                    Err(_) => {
                        for b in *block..block + count {
                            match self.read_old(b, 1).await {
                                Ok(data) => push_images(&mut out, b, &data),
                                Err(_) => out.push(Before::Unreadable(b)),
                            }
                        }
                    }
                }
            }
        }
        out
    }

    /// Whole blocks of the primary; what lies past its end is zero.
    pub(super) async fn read_old(&self, block: u64, count: u64) -> Result<Slice> {
        let (start, len) = self.bytes_of(block, count);
        if len == count * BLOCK {
            let (result, buf) = self.primary.read(start, IoBuf::for_overwrite(len as usize)).await;
            result.map_err(|e| Error::device("read", self.path(), &e))?;
            return Ok(buf.share());
        }
        let mut whole = IoBuf::zeroed((count * BLOCK) as usize);
        if len > 0 {
            let (result, buf) = self.primary.read(start, IoBuf::for_overwrite(len as usize)).await;
            result.map_err(|e| Error::device("read", self.path(), &e))?;
            whole[..len as usize].copy_from_slice(&buf);
        }
        Ok(whole.share())
    }

    /// Step 2: appends before-images to the log and marks their blocks.
    async fn append_before(self: &Rc<Self>, log: &Rc<Log>, images: Vec<Before>) -> Result<()> {
        let blocks_max = frame_blocks_max(log.disk.geometry.segment_size);
        let mut frame = FrameBuilder::default();
        let mut marks: Vec<(u64, u64)> = Vec::new();
        let instant = self.state.borrow().instant_last;
        for image in images {
            let blocks = match &image {
                Before::Data(_, data) => (data.len() as u64 / BLOCK) as u32,
                _ => 0,
            };
            let full = frame.payload_blocks() + blocks > blocks_max
                || frame.descriptor_bytes() > 32 << 10
                || frame.entry_count() > 1024;
            if full && !frame.is_empty() {
                self.append_before_frame(log, std::mem::take(&mut frame), &std::mem::take(&mut marks)).await?;
            }
            match image {
                Before::Data(block, data) => {
                    let count = data.len() as u64 / BLOCK;
                    // A piece is at most IO_BLOCKS long; a small segment's frame may be shorter.
                    let mut at = 0;
                    while at < count {
                        let n = (count - at).min(u64::from(blocks_max));
                        if frame.payload_blocks() + n as u32 > blocks_max {
                            self.append_before_frame(log, std::mem::take(&mut frame), &std::mem::take(&mut marks))
                                .await?;
                        }
                        frame.push_before(block + at, data.slice((at * BLOCK) as usize, (n * BLOCK) as usize), instant);
                        marks.push((block + at, n));
                        at += n;
                    }
                }
                Before::Zero(block, count) => {
                    frame.push_before_extent(block, count, true, instant);
                    marks.push((block, count));
                }
                Before::Unreadable(block) => {
                    frame.push_before_extent(block, 1, false, instant);
                    marks.push((block, 1));
                }
            }
        }
        if !frame.is_empty() {
            self.append_before_frame(log, frame, &marks).await?;
        }
        Ok(())
    }

    async fn append_before_frame(
        self: &Rc<Self>,
        log: &Rc<Log>,
        frame: FrameBuilder,
        marks: &[(u64, u64)],
    ) -> Result<()> {
        let point = self.volume_point();
        let appended = match log.append(&self.host, StreamKind::Before, frame, point).await {
            Ok(appended) => appended,
            Err(error) => {
                // What sealing needs is reserved, so an empty pool here is as bad as a failed write.
                log.disk.fail(format!("append before-images: {error}"));
                return Err(error);
            }
        };
        self.stats.borrow_mut().before_image_bytes += appended.bytes;
        let mut state = log.state.borrow_mut();
        if let Some(imaged) = &mut state.imaged {
            for (block, count) in marks {
                imaged.insert_range(*block, *count);
            }
        }
        self.image_epoch.set(self.image_epoch.get() + 1);
        drop(state);
        let mut state = self.state.borrow_mut();
        if !state.stale_blocks.is_empty() {
            for (block, count) in marks {
                let taken: Vec<u64> = state.stale_blocks.range(*block..block + count).map(|(b, _)| *b).collect();
                for block in taken {
                    if state.stale_blocks.get(&block).is_some_and(|seq| *seq <= log.seq) {
                        state.stale_blocks.remove(&block);
                        state.lost_changed = true;
                    }
                }
            }
        }
        Ok(())
    }

    pub(crate) fn volume_point(&self) -> VolumePoint {
        let state = self.state.borrow();
        VolumePoint { instant_last: state.framed, durable: state.durable, watermark: Self::watermark(&state) }
    }

    /// Step 4's content: whole blocks, also where the guest wrote only some sectors.
    async fn compose_batch(self: &Rc<Self>, batch: &Batch, bases: &[(u64, Slice)]) -> Vec<Write> {
        let mut writes = Vec::with_capacity(batch.items.len());
        for item in &batch.items {
            match &item.content {
                Content::Zero => writes.push(Write::Zero(item.block, item.count)),
                Content::Data(data, 0xFF) => push_write(&mut writes, item.block, data.clone()),
                Content::Data(data, mask) => match self.base_of(item, bases).await {
                    Some(base) => push_write(&mut writes, item.block, compose(&base, data, *mask)),
                    // The old content cannot be read: only what the guest wrote is written, which may heal the sector.
                    None => push_sectors(&mut writes, item.block, data, *mask),
                },
            }
        }
        writes
    }

    /// What a partly written block held before: the before-image just taken, else what the primary holds. (A block whose copy on the primary may have been
    /// damaged by a power cut in the middle of an earlier destaging was completed from the journal at recovery.) `None`: it cannot be read.
    async fn base_of(&self, item: &Item, bases: &[(u64, Slice)]) -> Option<Slice> {
        match bases.binary_search_by_key(&item.block, |(block, _)| *block) {
            Ok(found) => Some(bases[found].1.clone()),
            Err(_) => self.read_old(item.block, 1).await.ok(),
        }
    }

    /// Steps 4 and 5. A failing primary is tried again with back-off; everything since the last good sync is written again.
    async fn write_until_durable(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        writes: &[Write],
        landing: Option<&Landing>,
    ) -> Result<()> {
        let mut pause = BACK_OFF_NS.0;
        loop {
            match self.write_and_sync_with(writes, landing).await {
                Ok(()) => {
                    self.note_primary_recovered();
                    return Ok(());
                }
                Err(error) => {
                    self.note_primary_failing(&error);
                    self.host.sleep(pause).await;
                    pause = (pause * 2).min(BACK_OFF_NS.1);
                    if disk.failure().is_some() || self.state.borrow().attach.is_none() {
                        return Err(error);
                    }
                }
            }
        }
    }

    pub(crate) async fn write_and_sync(self: &Rc<Self>, writes: &[Write]) -> Result<()> {
        self.write_and_sync_with(writes, None).await
    }

    async fn write_and_sync_with(self: &Rc<Self>, writes: &[Write], landing: Option<&Landing>) -> Result<()> {
        let failed = RefCell::new(None);
        // After an error no more is begun, but what is under way is waited for: the writes of the next attempt must not meet these.
        let groups = self.in_groups(writes).take_while(|_| failed.borrow().is_none());
        let groups = groups.map(|group| async move {
            let results = join_all(group.iter().map(|write| self.write_one(write))).await;
            (group.iter().map(Write::len).sum::<u64>(), results.into_iter().find_map(Result::err))
        });
        let mut groups = stream::iter(groups).buffered(self.groups());
        while let Some((bytes, error)) = groups.next().await {
            if let Some(landing) = landing {
                landing.step(bytes / BLOCK);
            }
            let first = failed.take().or(error);
            failed.replace(first);
        }
        drop(groups);
        if let Some(error) = failed.into_inner() {
            return Err(error);
        }
        if active(Mutation::WatermarkEarly) {
            return Ok(());
        }
        self.primary.sync().await.map_err(|e| Error::device("sync", self.path(), &e))
    }

    async fn write_one(&self, write: &Write) -> Result<()> {
        let size = self.primary_bytes.get();
        match write {
            Write::Data(block, parts) => {
                let start = block * BLOCK;
                let mut room = size.saturating_sub(start) as usize;
                let mut list = Vec::with_capacity(parts.len());
                for part in parts {
                    let n = part.len().min(room);
                    if n > 0 {
                        list.push(part.slice(0, n));
                    }
                    room -= n;
                }
                if list.is_empty() {
                    return Err(self.past_the_end(*block));
                }
                self.primary.write(start, list).await.map_err(|e| Error::device("write to", self.path(), &e))
            }
            Write::Sectors(at, data) => self
                .primary
                .write(*at, vec![data.clone()])
                .await
                .map_err(|e| Error::device("write to", self.path(), &e)),
            Write::Zero(block, count) => {
                let (start, len) = self.bytes_of(*block, *count);
                if len == 0 {
                    return Err(self.past_the_end(*block));
                }
                self.primary
                    .write_zeroes(start, len, true)
                    .await
                    .map_err(|e| Error::device("write zeroes to", self.path(), &e))
            }
        }
    }

    /// What was acked to the guest has no place: that is said, and nothing is dropped.
    fn past_the_end(&self, block: u64) -> Error {
        let bytes = self.primary_bytes.get();
        Error::State(format!("block {block} is past the end of the primary, which has {bytes} bytes"))
    }

    pub(crate) fn note_primary_failing(self: &Rc<Self>, error: &Error) {
        let mut state = self.state.borrow_mut();
        let since = state.primary_failing.as_ref().map_or_else(|| self.host.boot_ns(), |(since, _)| *since);
        if state.primary_failing.is_none() {
            self.event_later(EventKind::PrimaryFailing, error.to_string());
        }
        if state.health == Health::Ok {
            state.health = Health::PrimaryFailing;
            state.health_reason = error.to_string();
        }
        state.primary_failing = Some((since, error.clone()));
        drop(state);
        self.changed.notify();
    }

    pub(super) fn note_primary_recovered(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        if state.primary_failing.take().is_some() {
            if state.health == Health::PrimaryFailing {
                state.health = Health::Ok;
                state.health_reason.clear();
            }
            self.event_later(EventKind::PrimaryRecovered, "writes and syncs of the primary succeed again");
        }
    }

    /// Copies a pending revert, two pieces at a time, one behind the other, until it is done or something else comes first.
    async fn copy_revert(self: &Rc<Self>, disk: &Rc<Disk>, log: &Rc<Log>) -> Result<()> {
        let (target, instant, mut next) = {
            let state = log.state.borrow();
            let revert = state.revert.as_ref().expect("the caller saw it");
            (revert.target, revert.instant, revert.next_block)
        };
        let mut ready: Option<Piece> = None;
        loop {
            let blocks = self.next_piece(disk, log, next);
            if let Some(last) = blocks.last() {
                next = last + 1;
            }
            let (finished, prepared) = match (ready.take(), blocks.is_empty()) {
                (None, true) => break,
                (None, false) => (Ok(()), Some(self.prepare_piece(disk, log, target, blocks).await)),
                (Some(earlier), true) => (self.finish_piece(disk, log, instant, earlier).await, None),
                (Some(earlier), false) => {
                    let finish = self.finish_piece(disk, log, instant, earlier);
                    let (finished, prepared) = join(finish, self.prepare_piece(disk, log, target, blocks)).await;
                    (finished, Some(prepared))
                }
            };
            // What was not finished is still left to copy.
            finished?;
            ready = prepared.transpose()?;
        }
        // A revert may have nothing to copy.
        if log.state.borrow().revert.as_ref().is_some_and(|revert| revert.left.is_empty()) {
            self.note_copied(log, &[]);
        }
        Ok(())
    }

    /// The blocks of a pending revert that are copied next, from `next` on; none when there are none, or when something else comes first.
    fn next_piece(&self, disk: &Disk, log: &Log, next: u64) -> Vec<u64> {
        let state = self.state.borrow();
        if state.attach.is_none() || disk.failure().is_some() || self.punch_is_due(&state) {
            return Vec::new();
        }
        self.count_piece();
        let blocks_max = self.engine.upgrade().map_or(BATCH_BLOCKS, |engine| engine.config().destage_blocks_max).max(1);
        let log = log.state.borrow();
        log.revert.iter().flat_map(|revert| revert.left.iter_from(next)).take(blocks_max as usize).collect()
    }

    /// Reads what the blocks held at the target, and keeps what they hold now.
    async fn prepare_piece(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        log: &Rc<Log>,
        target: Instant,
        blocks: Vec<u64>,
    ) -> Result<Piece> {
        let source = {
            let state = self.state.borrow();
            state.logs.iter().rev().find(|l| l.start <= target).cloned()
        };
        let source = source.ok_or_else(|| Error::Gone("the source of a pending revert was evicted".into()))?;
        let ranges = ranges_of(&blocks);
        let mut wanted = Vec::new();
        {
            let state = log.state.borrow();
            let imaged = state.imaged.as_ref().expect("an unsealed log knows its before-images");
            for (block, count) in &ranges {
                missing_ranges(imaged, *block, *count, &mut wanted);
            }
        }
        // Both at once. The target's content is read as the state was, before-images of this log or not; and it comes from the journal: whatever a log from the
        // target's on touched has a record or a before-image in one of them, now that their overlays are empty. So a primary that cannot be read for a while
        // does not cost it.
        let contents = stream::iter(&ranges)
            .map(|(block, count)| self.blocks_at(target, &source, *block, *count))
            .buffered(RANGES)
            .collect::<Vec<_>>();
        let (contents, kept) = join(contents, self.take_before_images(log, &wanted, &[], None)).await;
        kept?;
        let mut writes = Vec::new();
        let mut unrestorable = Vec::new();
        for ((block, count), content) in ranges.iter().zip(contents) {
            match content {
                Ok(data) => push_write(&mut writes, *block, data),
                Err(_) => {
                    // One bad block must not hold up the rest: it is copied alone, or reads as an error from now on. A primary that fails is tried
                    // again.
                    for b in *block..block + count {
                        match self.blocks_at(target, &source, b, 1).await {
                            Ok(data) => push_write(&mut writes, b, data),
                            Err(error @ Error::Device { op: "read", .. }) => return Err(error),
                            Err(error) => {
                                tracing::error!(volume = %self.id, block = b, %error, "revert: block cannot be restored");
                                unrestorable.push(b);
                            }
                        }
                    }
                }
            }
        }
        self.sync_before(disk, log).await?;
        // Only now: what the primary holds of them is what this log began with, and is kept, also through a power cut.
        unrestorable.iter().for_each(|block| self.lose_block(log, *block));
        Ok(Piece { blocks, writes, unrestorable })
    }

    /// Brings a piece to the primary; it is copied then.
    async fn finish_piece(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        log: &Rc<Log>,
        instant: Instant,
        piece: Piece,
    ) -> Result<()> {
        // The revert itself, too: what it overwrites must not outlive it.
        self.sync_journal(disk, instant).await?;
        self.write_until_durable(disk, &piece.writes, None).await?;
        self.end_losses(&piece.blocks, &piece.unrestorable);
        self.store_lost_blocks().await?;
        self.note_copied(log, &piece.blocks);
        Ok(())
    }

    /// Records how far a revert is copied.
    fn note_copied(self: &Rc<Self>, log: &Log, blocks: &[u64]) {
        let (row, done) = {
            let mut state = log.state.borrow_mut();
            let revert = state.revert.as_mut().expect("only the destager ends it");
            for (block, count) in ranges_of(blocks) {
                revert.left.remove_range(block, count);
            }
            revert.done += blocks.len() as u64;
            let done = revert.left.is_empty();
            revert.next_block = if done { u64::MAX } else { blocks.last().map_or(u64::MAX, |b| b + 1) };
            let row = ControlRevert {
                log_seq: log.seq.into(),
                instant: revert.instant.0.into(),
                target: revert.target.0.into(),
                blocks: revert.total.into(),
                next_block: revert.next_block.into(),
                blocks_done: revert.done.into(),
            };
            if done {
                state.revert = None;
            }
            (row, done)
        };
        // Who waits for all records must not wait for the next piece.
        let urgent = done || self.state.borrow().drain_waiters > 0;
        self.control(ControlKind::Revert, Instant::ZERO, log.seq, 0, row.as_bytes(), urgent);
        if done {
            let target = Instant(row.target.get());
            self.event(EventKind::RevertDone, format!("the volume holds the state of {target} in full"));
        }
        self.changed.notify();
    }

    /// A block that the revert at the end of `log` cannot bring back. What was written whole in a newer log is good from there on.
    pub(super) fn lose_block(&self, log: &Log, block: u64) {
        let mut state = self.state.borrow_mut();
        let whole = whole_mask(state.size, block);
        let newer = state.logs.iter().filter(|l| l.seq > log.seq);
        let overwritten = newer
            .filter(|l| match l.state.borrow().overlay.get(block) {
                Some(Content::Zero) => true,
                Some(Content::Data(_, mask)) => mask & whole == whole,
                None => false,
            })
            .map(|l| l.seq)
            .next();
        state.lost_changed = true;
        log.state.borrow_mut().revert_lost = true;
        if let Some(seq) = overwritten {
            state.stale_blocks.insert(block, seq);
            return;
        }
        state.lost_blocks.get_or_insert_with(Default::default).insert(block);
        state.health = Health::RevertIncomplete;
        state.health_reason =
            "the history that a revert goes back to is damaged: some blocks read as errors until overwritten".into();
    }

    /// Blocks that a revert brought back are not lost any more.
    fn end_losses(&self, blocks: &[u64], unrestorable: &[u64]) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        for block in blocks.iter().filter(|block| !unrestorable.contains(block)) {
            let was_lost = state.lost_blocks.as_mut().is_some_and(|lost| lost.remove_range(*block, 1) > 0);
            let was_stale = state.stale_blocks.remove(block).is_some();
            state.lost_changed |= was_lost || was_stale;
        }
    }

    /// Everything of a closed log is on the primary: its indexes become one run each, and the log is final.
    async fn seal(self: &Rc<Self>, disk: &Rc<Disk>, log: &Rc<Log>) -> Result<()> {
        let recording = log.state.borrow().recording;
        // What it overwrote is known from its own records only while they are scanned.
        self.store_lost_blocks().await?;
        let point = self.volume_point();
        // Damage too: a log that cannot be sealed keeps every later one from being destaged, and in the end the guest from writing.
        let fail = |error: Error| {
            disk.fail(format!("seal log: {error}"));
            error
        };
        let writes = async {
            match recording {
                true => log.merge_index(&self.host, StreamKind::Writes, point).await,
                false => Ok(Default::default()),
            }
        };
        let (writes_root, before_root) = join(writes, log.merge_index(&self.host, StreamKind::Before, point)).await;
        let (writes_root, before_root) = (writes_root.map_err(fail)?, before_root.map_err(fail)?);
        self.sync_completed(disk).await?;
        if self.state.borrow().attach.is_none() {
            // The volume left meanwhile: nobody records that the log is sealed, so nothing of it may be freed for that.
            return Err(Error::Gone("the volume has left the journal".into()));
        }
        {
            let mut state = log.state.borrow_mut();
            state.sealed = true;
            state.thin = !recording;
            state.writes_root = writes_root;
            state.before_root = before_root;
            let run = |root: crate::format::RunRoot, kind| {
                (root.entries.get() > 0).then_some(crate::index::Run { root, log_id: log.id, kind })
            };
            state.writes_index.replace(run(writes_root, StreamKind::Writes));
            state.before_index.replace(run(before_root, StreamKind::Before));
            state.touched = Default::default();
            state.overlay.clear();
        }
        // In the same step as the flag: whoever sees the log sealed may evict it, and that record must come later.
        let recorded = self.control(ControlKind::Log, Instant::ZERO, log.seq, 0, log.row().as_bytes(), true);
        log.release_spares().await.map_err(fail)?;
        // The destager itself leads the way out of a failed disk: it must not wait for that.
        disk.unless_failed(recorded.wait()).await??;
        if !recording {
            self.free_writes(disk, log).await?;
        }
        self.changed.notify();
        Ok(())
    }

    /// Gives back the writes segments of a thin log, whose row is in a completed frame.
    pub(crate) async fn free_writes(self: &Rc<Self>, disk: &Rc<Disk>, log: &Rc<Log>) -> Result<()> {
        self.sync_completed(disk).await?;
        log.until_unread().await;
        let segments = std::mem::take(&mut log.state.borrow_mut().writes.segments);
        log.state.borrow_mut().writes_index.replace(None);
        disk.release(&segments).await?;
        self.changed.notify();
        Ok(())
    }
}

/// A range in pieces of at most `most` blocks.
fn pieces_of(block: u64, count: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = block + count;
    (block..end).step_by(most as usize).map(move |at| (at, most.min(end - at)))
}

/// A write to the primary.
pub(crate) enum Write {
    /// Whole blocks, one after the other.
    Data(u64, Vec<Slice>),
    /// Some bytes at an offset.
    Sectors(u64, Slice),
    /// Zeroes.
    Zero(u64, u64),
}

impl Write {
    fn len(&self) -> u64 {
        match self {
            Write::Data(_, parts) => parts.iter().map(|p| p.len() as u64).sum(),
            Write::Sectors(_, data) => data.len() as u64,
            Write::Zero(..) => 0,
        }
    }
}

/// Adds blocks to a list of writes; neighbours become one write.
pub(crate) fn push_write(writes: &mut Vec<Write>, block: u64, data: Slice) {
    if let Some(Write::Data(start, parts)) = writes.last_mut() {
        let blocks: u64 = parts.iter().map(|p| p.len() as u64 / BLOCK).sum();
        if *start + blocks == block && blocks < IO_BLOCKS {
            parts.push(data);
            return;
        }
    }
    writes.push(Write::Data(block, vec![data]));
}

/// Adds only the sectors of a mask.
pub(crate) fn push_sectors(writes: &mut Vec<Write>, block: u64, data: &Slice, mask: u8) {
    for sector in (0..SECTORS_PER_BLOCK).filter(|s| mask & (1 << s) != 0) {
        let part = IoBuf::copy_of(&data[(sector * SECTOR) as usize..((sector + 1) * SECTOR) as usize]);
        writes.push(Write::Sectors(block * BLOCK + sector * SECTOR, part.share()));
    }
}

/// The parts of a range that are not in a set.
fn missing_ranges(set: &crate::index::Touched, block: u64, count: u64, out: &mut Vec<(u64, u64)>) {
    let end = block + count;
    if count == 1 {
        if !set.contains(block) {
            push_range(out, block, 1);
        }
        return;
    }
    let mut at = block;
    for present in set.iter_from(block) {
        if present >= end {
            break;
        }
        if present > at {
            push_range(out, at, present - at);
        }
        at = present + 1;
    }
    if at < end {
        push_range(out, at, end - at);
    }
}

fn push_range(out: &mut Vec<(u64, u64)>, block: u64, count: u64) {
    match out.last_mut() {
        Some((start, len)) if *start + *len == block => *len += count,
        _ => out.push((block, count)),
    }
}

/// Sorted blocks as ranges of at most `IO_BLOCKS`.
fn ranges_of(blocks: &[u64]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for block in blocks {
        match ranges.last_mut() {
            Some((start, len)) if *start + *len == *block && *len < IO_BLOCKS => *len += 1,
            _ => ranges.push((*block, 1)),
        }
    }
    ranges
}

/// Keeps, of what was read, the blocks that are in `partial`, which is sorted.
fn keep_bases(images: &[Before], partial: &[u64], kept: &mut Vec<(u64, Slice)>) {
    if partial.is_empty() {
        return;
    }
    for image in images {
        let (first, count, data) = match image {
            Before::Data(block, data) => (*block, data.len() as u64 / BLOCK, Some(data)),
            Before::Zero(block, count) => (*block, *count, None),
            Before::Unreadable(_) => continue,
        };
        let from = partial.partition_point(|block| *block < first);
        for block in partial[from..].iter().take_while(|block| **block < first + count) {
            let old = data.map(|data| data.slice(((block - first) * BLOCK) as usize, BLOCK as usize));
            kept.push((*block, old.unwrap_or_else(zero_block)));
        }
    }
}

/// Cuts what was read into data and zeroes: blocks of zeroes need no payload.
fn push_images(out: &mut Vec<Before>, block: u64, data: &Slice) {
    let is_zero = |at: usize| data[at..at + BLOCK as usize].iter().all(|b| *b == 0);
    let blocks = data.len() / BLOCK as usize;
    let mut i = 0;
    while i < blocks {
        let zero = is_zero(i * BLOCK as usize);
        let mut j = i + 1;
        while j < blocks && is_zero(j * BLOCK as usize) == zero {
            j += 1;
        }
        let (first, count) = (block + i as u64, (j - i) as u64);
        if zero {
            out.push(Before::Zero(first, count));
        } else {
            out.push(Before::Data(first, data.slice(i * BLOCK as usize, (j - i) * BLOCK as usize)));
        }
        i = j;
    }
}

fn zero_block() -> Slice {
    IoBuf::zeroed(BLOCK as usize).share()
}
