//! The write path: admission, the open frame, the appender, flushes.
//!
//! A request is admitted when there is room for it (backlog, capacity). In the same step, without an await between, it gets its instant, its place in
//! the open frame, and is in the overlay; so the order of instants is the order in the journal. The appender sends frames in that order, a few side by side;
//! what arrives meanwhile shares the next one, and nobody waits for a timer. A write is acked when its frame and every earlier one have completed.

use std::pin::pin;
use std::rc::Rc;

use futures::{StreamExt as _, stream};

use super::{CloseReason, FrameOnItsWay, Mode, OpenFrame, State, Ticket, Volume, blocks_of};
use crate::buf::{IoBuf, Slice};
use crate::engine::EngineConfig;
use crate::error::{Error, Result};
use crate::format::StreamKind;
use crate::frame::{self, DESCRIPTOR_BYTES_MAX, FrameBuilder};
use crate::info::EventKind;
use crate::log::{Log, Placed, VolumePoint, frame_blocks_max, usable_bytes};
use crate::mutation::{Mutation, active};
use crate::overlay::RANGE_BYTES;
use crate::signal::yield_now;
use crate::types::{BLOCK, Instant, SECTOR};

/// Most ranges of a volume's discards that are remembered: each is in memory, and in the carry of every log, which the guest's next write waits for. Without one
/// room on the primary is not given back, and nothing else.
pub(crate) const HINTS_MAX: usize = 32768;

/// What admission decided.
enum Admitted {
    /// Goes into the open frame with this instant, at once.
    Journal(Instant),
    /// Goes straight to the primary; `direct_inflight` was raised.
    Direct,
    /// Larger than a record may be by now: protection came on, or moved, while the request waited. It is cut anew.
    TooLarge,
}

/// What a request wants to put into the journal.
#[derive(Clone, Copy)]
struct Wanted {
    /// Blocks that it touches.
    first: u64,
    blocks: u64,
    /// Bytes of payload.
    payload: u64,
    /// First and last block, where it covers them only in part.
    partial: [Option<u64>; 2],
}

/// A frame at the end of its way to the disk.
struct Sent {
    log: Rc<Log>,
    ticket: Rc<Ticket>,
    unframed: u64,
    point: VolumePoint,
    started: u64,
    /// `None`: the disk has failed.
    written: Option<Placed>,
}

/// Keeps `writes_inflight` right on every way out.
struct InFlight<'a>(&'a Volume);

impl<'a> InFlight<'a> {
    fn enter(volume: &'a Volume) -> Self {
        volume.state.borrow_mut().writes_inflight += 1;
        Self(volume)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.state.borrow_mut().writes_inflight -= 1;
    }
}

/// A request that waits for room: the destager hurries while there is one.
struct Throttled<'a>(&'a Volume);

impl<'a> Throttled<'a> {
    fn enter(volume: &'a Volume) -> Self {
        volume.throttled.set(volume.throttled.get() + 1);
        Self(volume)
    }
}

impl Drop for Throttled<'_> {
    fn drop(&mut self) {
        self.0.throttled.set(self.0.throttled.get() - 1);
    }
}

/// A sync of the CDP disk that is under way, and up to which instant everything had completed before it.
struct Syncing<'a>(&'a Volume, Instant);

impl<'a> Syncing<'a> {
    fn begin(volume: &'a Volume, covers: Instant) -> Self {
        volume.syncs.borrow_mut().push(covers);
        Self(volume, covers)
    }
}

impl Drop for Syncing<'_> {
    fn drop(&mut self) {
        let mut syncs = self.0.syncs.borrow_mut();
        if let Some(at) = syncs.iter().position(|covers| *covers == self.1) {
            syncs.swap_remove(at);
        }
        drop(syncs);
        // Whoever waits for it looks whether it was enough.
        self.0.changed.notify();
    }
}

/// After how many writes a guest flushes. One that did so after as many several times in a row is expected to do it again: what its flush waits for is begun
/// with the ack of the last of these writes, while the guest still gets that ack and sends the flush. A database that commits, or a journaling file system,
/// writes that way. An expectation that fails costs one sync, and there is none until the guest has a habit again.
#[derive(Debug, Default)]
pub(crate) struct FlushHabit {
    /// Since the last flush.
    writes: u32,
    /// Before the last flush.
    usual: u32,
    /// How many flushes before the last one came after as many writes.
    times: u32,
    /// The flush that was expected has not come yet.
    expected: bool,
}

impl FlushHabit {
    fn wrote(&mut self) {
        self.writes = self.writes.saturating_add(1);
        if std::mem::take(&mut self.expected) {
            self.usual = 0;
        }
    }

    fn flushed(&mut self) {
        self.expected = false;
        // A flush with nothing before it says nothing.
        if self.writes > 0 {
            self.times = if self.writes == self.usual { self.times.saturating_add(1) } else { 0 };
            self.usual = std::mem::take(&mut self.writes);
        }
    }

    /// Every write has been acked: whether a flush comes next, after `times` that were alike. Answered once.
    fn expects(&mut self, times: u32) -> bool {
        let expects = !self.expected && self.writes > 0 && self.writes == self.usual && self.times >= times;
        self.expected |= expects;
        expects
    }
}

impl Volume {
    pub(crate) async fn write(self: &Rc<Self>, offset: u64, len: u32, data: IoBuf, fua: bool) -> Result<()> {
        let len = u64::from(len);
        self.check_range(offset, len)?;
        let (_, blocks) = blocks_of(offset, len);
        if (data.len() as u64) < blocks * BLOCK {
            return Err(Error::invalid("payload buffer", data.len(), format!("at least {} bytes", blocks * BLOCK)));
        }
        let started = self.host.boot_ns();
        let result = self.write_pieces(offset, len, data.share(), fua).await;
        let mut stats = self.stats.borrow_mut();
        match &result {
            Ok(()) => {
                stats.writes += 1;
                stats.write_bytes += len;
                let spent = self.host.boot_ns().saturating_sub(started);
                stats.write_latency.record(spent);
            }
            Err(_) => stats.errors += 1,
        }
        result
    }

    async fn write_pieces(self: &Rc<Self>, offset: u64, len: u64, data: Slice, fua: bool) -> Result<()> {
        let inflight = InFlight::enter(self);
        let end = offset + len;
        let base = offset - offset % BLOCK;
        let mut at = offset;
        let mut ticket = None;
        let mut direct = false;
        while at < end {
            let piece_end = end.min(at - at % BLOCK + self.piece_blocks_max() * BLOCK);
            let (first, blocks) = blocks_of(at, piece_end - at);
            let bytes = data.slice((first * BLOCK - base) as usize, (blocks * BLOCK) as usize);
            let wanted = Wanted { first, blocks, payload: blocks * BLOCK, partial: self.partial_of(at, piece_end) };
            match self.admit(wanted).await? {
                Admitted::Journal(instant) => {
                    let (sector, sectors) = (at / SECTOR, (piece_end - at) / SECTOR);
                    let mut state = self.state.borrow_mut();
                    let log = self.record(&mut state, wanted, instant);
                    log.state.borrow_mut().overlay.insert_data(sector, sectors, &bytes, instant);
                    let frame = self.open_frame(&mut state, &log, blocks as u32, true);
                    frame.builder.push_write(sector, sectors, bytes, instant);
                    ticket = Some(Rc::clone(&frame.ticket));
                }
                Admitted::Direct => {
                    let part = bytes.slice((at - first * BLOCK) as usize, (piece_end - at) as usize);
                    let result = self.primary.write(at, vec![part]).await;
                    self.leave_direct(first, blocks, result.is_ok());
                    result.map_err(|e| Error::device("write to", self.path(), &e))?;
                    self.store_lost_for_guest().await?;
                    direct = true;
                }
                Admitted::TooLarge => continue,
            }
            at = piece_end;
        }
        self.kick.notify();
        if let Some(ticket) = ticket {
            ticket.wait().await?;
        }
        // What is whole in the journal is in flight no more: the flush point of a FUA write that was alone is a clean one.
        drop(inflight);
        if fua || (direct && self.state.borrow().mode == Mode::Journal) {
            // A request that began before protection came on may lie partly on the primary only: its ack then stands for the primary, too.
            self.flush_inner().await?;
        }
        Ok(())
    }

    pub(crate) async fn write_zeroes(self: &Rc<Self>, offset: u64, len: u32, no_hole: bool, fua: bool) -> Result<()> {
        let len = u64::from(len);
        self.check_range(offset, len)?;
        let inflight = InFlight::enter(self);
        let end = offset + len;
        let mut at = offset;
        let mut ticket = None;
        while at < end {
            let piece_end = end.min(at - at % BLOCK + self.zero_piece_blocks_max() * BLOCK);
            let (first, blocks) = blocks_of(at, piece_end - at);
            let wanted = Wanted { first, blocks, payload: 0, partial: self.partial_of(at, piece_end) };
            match self.admit(wanted).await? {
                Admitted::Journal(instant) => {
                    let (sector, sectors) = (at / SECTOR, (piece_end - at) / SECTOR);
                    let mut state = self.state.borrow_mut();
                    let log = self.record(&mut state, wanted, instant);
                    log.state.borrow_mut().overlay.insert_zero(sector, sectors, instant);
                    let frame = self.open_frame(&mut state, &log, 0, true);
                    frame.builder.push_zero(sector, sectors, instant);
                    ticket = Some(Rc::clone(&frame.ticket));
                }
                Admitted::Direct => {
                    let result = self.primary.write_zeroes(at, piece_end - at, !no_hole).await;
                    self.leave_direct(first, blocks, result.is_ok());
                    result.map_err(|e| Error::device("write zeroes to", self.path(), &e))?;
                    self.store_lost_for_guest().await?;
                }
                Admitted::TooLarge => continue,
            }
            at = piece_end;
            self.kick.notify();
        }
        if let Some(ticket) = ticket {
            ticket.wait().await?;
        }
        drop(inflight);
        self.stats.borrow_mut().zeroes += 1;
        if fua {
            self.flush_inner().await?;
        }
        Ok(())
    }

    /// A discard is a hint: it is kept in the log, and acts on the primary when the log is evicted.
    pub(crate) async fn trim(self: &Rc<Self>, offset: u64, len: u32) -> Result<()> {
        let len = u64::from(len);
        self.check_range(offset, len)?;
        self.stats.borrow_mut().discards += 1;
        // Only whole blocks: the rest of a block that the guest still uses must stay.
        let cut = frame::cut(offset / SECTOR, len / SECTOR);
        let (first, blocks) = cut.whole;
        if blocks == 0 {
            return Ok(());
        }
        let wanted = Wanted { first, blocks: 0, payload: 0, partial: [None; 2] };
        match self.admit(wanted).await? {
            Admitted::Journal(instant) => {
                let ticket = {
                    let mut state = self.state.borrow_mut();
                    let log = self.record(&mut state, wanted, instant);
                    if Self::hints(&state) < HINTS_MAX {
                        log.state.borrow_mut().hints.insert(first, blocks, instant);
                    }
                    let frame = self.open_frame(&mut state, &log, 0, true);
                    frame.builder.push_discard(first * (BLOCK / SECTOR), blocks * (BLOCK / SECTOR), instant);
                    Rc::clone(&frame.ticket)
                };
                self.kick.notify();
                ticket.wait().await
            }
            Admitted::Direct => {
                let result = self.primary.discard(first * BLOCK, blocks * BLOCK).await;
                self.leave_direct(first, blocks, result.is_ok());
                result.map_err(|e| Error::device("discard on", self.path(), &e))
            }
            // A hint has no payload and touches nothing.
            Admitted::TooLarge => Ok(()),
        }
    }

    /// Every write acked before this was called is durable when it ends.
    pub(crate) async fn flush(self: &Rc<Self>) -> Result<()> {
        self.state.borrow_mut().flush_habit.flushed();
        let result = self.flush_inner().await;
        let mut stats = self.stats.borrow_mut();
        match result {
            Ok(()) => stats.flushes += 1,
            Err(_) => stats.errors += 1,
        }
        drop(stats);
        result
    }

    async fn flush_inner(self: &Rc<Self>) -> Result<()> {
        loop {
            self.serving()?;
            let mode = self.state.borrow().mode;
            match mode {
                Mode::Switching => self.until_switched().await?,
                Mode::Journal => {
                    let (disk, upto) = {
                        let state = self.state.borrow();
                        (state.attach.as_ref().map(|a| Rc::clone(&a.disk)), state.instant_last)
                    };
                    let Some(disk) = disk else { continue };
                    if active(Mutation::FlushWithoutSync) {
                        return Ok(());
                    }
                    if let Err(error) = self.sync_journal(&disk, upto).await {
                        if active(Mutation::ErrorToGuest) {
                            return Err(error);
                        }
                        // The disk failed: the answer is the primary's, once the backlog is there.
                        self.until_left().await?;
                        continue;
                    }
                    self.note_flush_point(upto);
                    if self.engine()?.config().flush_primary {
                        self.drained(upto).await?;
                    }
                    return Ok(());
                }
                _ => {
                    return self.primary.sync().await.map_err(|e| Error::device("sync", self.path(), &e));
                }
            }
        }
    }

    /// Waits for every frame up to `upto`, then syncs the journal; raises the durable point. A sync that covers all of that may be under way already, or
    /// done: it counts.
    pub(crate) async fn sync_journal(&self, disk: &Rc<crate::disk::Disk>, upto: Instant) -> Result<()> {
        if self.state.borrow().durable >= upto {
            return Ok(());
        }
        self.kick.notify();
        let durable = self
            .changed
            .until(|| {
                let state = self.state.borrow();
                if state.durable >= upto {
                    return Some(Ok(true));
                }
                if let Some(reason) = disk.failure() {
                    return Some(Err(Error::Gone(reason)));
                }
                let covered = self.syncs.borrow().iter().any(|covers| *covers >= upto);
                (state.completed >= upto && !covered).then_some(Ok(false))
            })
            .await?;
        if durable { Ok(()) } else { self.sync_completed(disk).await }
    }

    /// Makes durable whatever has completed, and remembers how far that is.
    pub(crate) async fn sync_completed(&self, disk: &Rc<crate::disk::Disk>) -> Result<()> {
        let (completed, frames) = {
            let state = self.state.borrow();
            let completed = if active(Mutation::SyncCoversAll) { state.instant_last } else { state.completed };
            (completed, Self::completed_frames(&state))
        };
        let _under_way = Syncing::begin(self, completed);
        let started = self.host.boot_ns();
        disk.sync().await?;
        self.stats.borrow_mut().sync_latency.record(self.host.boot_ns().saturating_sub(started));
        let mut state = self.state.borrow_mut();
        let completed = if active(Mutation::SyncCoversLater) { state.completed } else { completed };
        state.durable = state.durable.max(completed);
        for (log, writes, before) in frames {
            let mut log = log.state.borrow_mut();
            log.writes.frames_durable = log.writes.frames_durable.max(writes);
            log.before.frames_durable = log.before.frames_durable.max(before);
        }
        Ok(())
    }

    /// Of each unsealed log: how many frames of its streams have completed.
    fn completed_frames(state: &State) -> Vec<(Rc<Log>, u64, u64)> {
        state
            .logs
            .iter()
            .rev()
            .take_while(|l| !l.state.borrow().sealed)
            .map(|l| {
                let log = l.state.borrow();
                (Rc::clone(l), log.writes.frames_completed, log.before.frames_completed)
            })
            .collect()
    }

    /// Records a flush of all up to an instant in the open frame; it travels with the next write, or with the frame that marks an idle volume.
    fn note_flush_point(self: &Rc<Self>, upto: Instant) {
        let Ok(engine) = self.engine() else { return };
        let mut state = self.state.borrow_mut();
        if state.mode != Mode::Journal || !state.wrote_since_flush || state.reverting.is_some() {
            return;
        }
        let Some(instant) = engine.try_tick() else { return };
        // What was written, and perhaps acked, while the sync was under way is in a view of now, and was not flushed.
        let clean = state.writes_inflight == 0 && state.instant_last == upto;
        let Some(log) = state.logs.back().cloned() else { return };
        if log.state.borrow().unframed > usable_bytes(log.disk.geometry.segment_size) / 4 {
            return;
        }
        // Not an instant that a flush waits for: the point travels when something else does.
        state.note_flush(instant, clean);
        let frame = self.open_frame(&mut state, &log, 0, false);
        frame.builder.push_flush_point(instant, clean);
    }

    /// Ends when every write at or before `upto` is durable on the primary.
    pub(crate) async fn drained(self: &Rc<Self>, upto: Instant) -> Result<()> {
        self.state.borrow_mut().drain_waiters += 1;
        self.work.notify();
        let result = self
            .changed
            .until(|| {
                let state = self.state.borrow();
                if let Some(error) = self.primary_error_for_guest(&state) {
                    return Some(Err(error));
                }
                match state.mode {
                    Mode::Closed => Some(Err(Error::Gone("the volume is closed".into()))),
                    _ => (Self::watermark(&state) >= upto || state.logs.is_empty()).then_some(Ok(())),
                }
            })
            .await;
        self.state.borrow_mut().drain_waiters -= 1;
        result
    }

    pub(crate) fn path(&self) -> String {
        self.state.borrow().path.clone()
    }

    /// Most blocks of a record: a request is charged at most 1/16 of the capacity at once, and must fit a frame.
    fn piece_blocks_max(&self) -> u64 {
        Self::payload_blocks_max(&self.state.borrow())
    }

    fn payload_blocks_max(state: &State) -> u64 {
        let Some(attach) = &state.attach else { return 8192 };
        let frame = u64::from(frame_blocks_max(attach.disk.geometry.segment_size));
        frame.min((attach.capacity_bytes() / 16 / (2 * BLOCK + 64)).max(1))
    }

    fn zero_piece_blocks_max(&self) -> u64 {
        Self::zero_blocks_max(&self.state.borrow())
    }

    fn zero_blocks_max(state: &State) -> u64 {
        state.attach.as_ref().map_or(1 << 20, |a| (a.capacity_bytes() / 16 / (BLOCK + 64)).max(1))
    }

    /// Waits until the request may go on, and gives it its instant. With `Journal` the caller records it before its next await.
    async fn admit(self: &Rc<Self>, wanted: Wanted) -> Result<Admitted> {
        let engine = self.engine()?;
        let mut throttled = None;
        loop {
            enum Next {
                Wait,
                Revert,
                Raise,
                Throttle,
            }
            let next = {
                let mut state = self.state.borrow_mut();
                if let Some(block) = wanted.partial.into_iter().flatten().find(|block| state.unreadable(*block)) {
                    // As a disk answers whose physical sector cannot be read: the rest of the block is not known.
                    let path = state.path.clone();
                    return Err(super::read::lost_error("write a part of", block, &path));
                }
                match state.mode {
                    Mode::Refused | Mode::Closed => {
                        drop(state);
                        self.serving()?;
                        return Err(Error::Gone("the volume is closed".into()));
                    }
                    Mode::Switching => Next::Wait,
                    Mode::Journal if state.reverting.is_some() => Next::Revert,
                    Mode::Direct => {
                        state.direct_inflight += 1;
                        return Ok(Admitted::Direct);
                    }
                    Mode::Journal if wanted.blocks > Self::zero_blocks_max(&state) => return Ok(Admitted::TooLarge),
                    Mode::Journal if wanted.payload > Self::payload_blocks_max(&state) * BLOCK => {
                        return Ok(Admitted::TooLarge);
                    }
                    Mode::Journal => match self.room(&mut state, wanted, &engine)? {
                        Room::Enough => match engine.try_tick() {
                            Some(instant) => {
                                if throttled.is_some() {
                                    self.stats.borrow_mut().throttled += 1;
                                }
                                return Ok(Admitted::Journal(instant));
                            }
                            None => Next::Raise,
                        },
                        Room::Rotate => match engine.try_tick() {
                            Some(instant) => {
                                let recording = state.on;
                                self.rotate(&mut state, instant, recording, CloseReason::Rotation);
                                continue;
                            }
                            None => Next::Raise,
                        },
                        Room::Later => Next::Throttle,
                    },
                }
            };
            match next {
                Next::Raise => engine.raise_clock().await?,
                Next::Wait => self.until_switched().await?,
                Next::Revert => self.until_not_reverting().await,
                Next::Throttle => {
                    throttled.get_or_insert_with(|| Throttled::enter(self));
                    self.work.notify();
                    self.wait_for_room().await?;
                }
            }
        }
    }

    /// Waits for a change that may make room; a primary that fails for longer than the stall bound answers with its own error.
    async fn wait_for_room(self: &Rc<Self>) -> Result<()> {
        let mut first = true;
        self.changed
            .until(|| {
                if std::mem::take(&mut first) {
                    return None;
                }
                Some(())
            })
            .await;
        self.primary_error_for_guest(&self.state.borrow()).map_or(Ok(()), Err)
    }

    /// Whether a request may be admitted now. Starts what makes room.
    fn room(self: &Rc<Self>, state: &mut State, wanted: Wanted, engine: &crate::engine::Engine) -> Result<Room> {
        let Some(attach) = state.attach.clone() else { return Ok(Room::Later) };
        let backlog = Self::backlog(state);
        let backlog_max = engine.config().backlog_bytes_max;
        // From three quarters on, a guest gets as much room as the destager has under way and nearly done.
        // Zeroes carry nothing, and still take memory until they are on the primary. A discard is only a hint: no blocks.
        let takes = if wanted.blocks > 0 { wanted.payload.max(RANGE_BYTES) } else { 0 };
        let even = backlog.saturating_sub(self.landing.get()) + takes > backlog_max / 4 * 3;
        if takes > 0 && backlog > 0 && (even || backlog + takes > backlog_max) {
            if !state.backlog_full {
                state.backlog_full = true;
                self.event_later(EventKind::BacklogFull, "acks run at the destager's pace");
            }
            return Ok(Room::Later);
        }
        let Some(active) = state.logs.back().cloned() else { return Ok(Room::Later) };
        let (fresh, charge) = {
            let log = active.state.borrow();
            let fresh = log.touched.missing(wanted.first, wanted.blocks);
            (fresh, charge_of(wanted, fresh))
        };
        let charged = active.state.borrow().charged;
        // Small requests one by one are charged far less than their frames take (a discard 256 bytes of 4 KiB): a log that could not end for its charge would
        // take everything, and then nothing could be evicted for it.
        let large = active.segment_count() > (attach.capacity / 3).max(4);
        if charged > 0 && (large || charged + charge > attach.capacity_bytes() / 8) {
            return Ok(Room::Rotate);
        }
        // Segments that this request adds to the bound of the active log, rounded up.
        let usable = usable_bytes(attach.disk.geometry.segment_size);
        let more = (wanted.payload + 2 * BLOCK).div_ceil(usable) + (fresh * (BLOCK + 128)).div_ceil(usable);
        let revert = Self::revert_segments(state, usable);
        let mut total = revert + state.leaving.iter().map(|log| log.segment_count()).sum::<u64>();
        let (mut unsealed, mut unsealed_logs) = (0, 0);
        for log in &state.logs {
            let bound = log.segments_bound();
            total += bound;
            if !log.state.borrow().sealed {
                unsealed += bound;
                unsealed_logs += 1;
            }
        }
        if unsealed + more > attach.capacity / 2 && unsealed_logs > 1 {
            return Ok(Room::Later);
        }
        if total + more + 1 > attach.capacity {
            self.evict_for_capacity(state);
            return Ok(Room::Later);
        }
        if total + more + 1 + attach.capacity / 16 > attach.capacity {
            // Room is made ahead of need, so that the guest seldom waits for it.
            self.evict_for_capacity(state);
        }
        Ok(Room::Enough)
    }

    /// Segments in use or promised, of all logs.
    pub(crate) fn total_bound(state: &State) -> u64 {
        state.logs.iter().map(|l| l.segments_bound()).sum::<u64>()
            + state.leaving.iter().map(|l| l.segment_count()).sum::<u64>()
    }

    /// Segments that pending reverts still need for before-images.
    pub(crate) fn revert_segments(state: &State, usable: u64) -> u64 {
        state
            .logs
            .iter()
            .map(|l| {
                l.state.borrow().revert.as_ref().map_or(0, |r| (r.left.len() * (BLOCK + 128)).div_ceil(usable) + 1)
            })
            .sum()
    }

    /// The bookkeeping of an admitted request: charge, first touches, hints.
    fn record(&self, state: &mut State, wanted: Wanted, instant: Instant) -> Rc<Log> {
        debug_assert!(instant > state.instant_last);
        state.instant_last = instant;
        state.last_write_ns = self.host.boot_ns();
        state.wrote_since_marker = true;
        state.wrote_since_flush = true;
        state.flush_habit.wrote();
        // Admission saw the active log in this same step.
        let active = Rc::clone(state.logs.back().expect("journal mode has an active log"));
        if state.lost_blocks.is_some() {
            Self::overwrite_lost(state, wanted, active.seq);
        }
        if wanted.blocks > 0 {
            let may_split = state.punch.len() < HINTS_MAX;
            state.punch.cut(wanted.first, wanted.blocks, may_split);
            let hints = Self::hints(state);
            if hints > 0 {
                for log in state.logs.iter().chain(&state.leaving) {
                    log.state.borrow_mut().hints.cut(wanted.first, wanted.blocks, hints < HINTS_MAX);
                }
            }
        }
        {
            let mut log = active.state.borrow_mut();
            let fresh = if wanted.blocks == 0 { 0 } else { log.touched.insert_range(wanted.first, wanted.blocks) };
            log.charged += charge_of(wanted, fresh);
            if log.io_start == Instant::ZERO {
                log.io_start = instant;
            }
            log.io_last = instant;
        }
        active
    }

    /// Ranges of discards that are remembered.
    fn hints(state: &State) -> usize {
        state.logs.iter().chain(&state.leaving).map(|log| log.state.borrow().hints.len()).sum()
    }

    /// Lost blocks that are written through the journal can be read again; their old content stays lost.
    fn overwrite_lost(state: &mut State, wanted: Wanted, seq: u64) {
        let Some(lost) = &mut state.lost_blocks else { return };
        let found: Vec<u64> = lost.iter_from(wanted.first).take_while(|b| *b < wanted.first + wanted.blocks).collect();
        // Where a pending revert brings the block back, a part of it may be written: the copying ends the loss.
        for block in found.into_iter().filter(|block| !wanted.partial.contains(&Some(*block))) {
            lost.remove_range(block, 1);
            state.stale_blocks.insert(block, seq);
            state.lost_changed = true;
        }
    }

    /// First and last block of a range of bytes, where the range covers them only in part.
    fn partial_of(&self, from: u64, to: u64) -> [Option<u64>; 2] {
        let size = self.state.borrow().size;
        let (first, last) = (from / BLOCK, (to - 1) / BLOCK);
        let (head, tail) = (!from.is_multiple_of(BLOCK), !to.is_multiple_of(BLOCK) && to < size);
        [(head || (tail && first == last)).then_some(first), (tail && last > first).then_some(last)]
    }

    /// The open frame of a log, with room for `payload_blocks` more.
    pub(crate) fn open_frame<'a>(
        &self,
        state: &'a mut State,
        log: &Rc<Log>,
        payload_blocks: u32,
        urgent: bool,
    ) -> &'a mut OpenFrame {
        let blocks_max = frame_blocks_max(log.disk.geometry.segment_size);
        let fits = state.open.back().is_some_and(|f| {
            Rc::ptr_eq(&f.log, log)
                && f.builder.payload_blocks() + payload_blocks <= blocks_max
                && f.builder.descriptor_bytes() < DESCRIPTOR_BYTES_MAX / 4
                && f.builder.side_bytes() < 16 << 10
                && f.builder.entry_count() < 2048
        });
        let mut unframed = u64::from(payload_blocks) * BLOCK;
        if !fits {
            unframed += 2 * BLOCK;
            log.state.borrow_mut().frames_pending += 1;
            state.open.push_back(OpenFrame {
                log: Rc::clone(log),
                builder: FrameBuilder::default(),
                ticket: Rc::default(),
                urgent: false,
                unframed: 0,
            });
        }
        log.state.borrow_mut().unframed += unframed;
        let frame = state.open.back_mut().expect("just ensured");
        frame.unframed += unframed;
        frame.urgent |= urgent;
        frame
    }

    fn leave_direct(&self, first: u64, blocks: u64, written: bool) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.direct_inflight -= 1;
        if written && let Some(lost) = &mut state.lost_blocks {
            // Whole blocks only: others were not admitted.
            state.lost_changed |= lost.remove_range(first, blocks) > 0;
        }
        let idle = state.direct_inflight == 0;
        drop(guard);
        if idle {
            self.changed.notify();
        }
    }

    /// Tells an event from inside a borrow of the state.
    pub(crate) fn event_later(self: &Rc<Self>, kind: EventKind, message: impl Into<String>) {
        let (volume, message) = (Rc::clone(self), message.into());
        self.host.spawn(Box::pin(async move { volume.event(kind, message) }));
    }

    /// The chain goes on across logs: the first frame of a log names the last frame of the log before it.
    fn chain_across_logs(&self, log: &Rc<Log>) {
        if log.state.borrow().writes.frame_next > 0 {
            return;
        }
        let state = self.state.borrow();
        let Some(position) = state.logs.iter().position(|l| Rc::ptr_eq(l, log)) else { return };
        if let Some(previous) = position.checked_sub(1).map(|p| &state.logs[p]) {
            log.state.borrow_mut().writes.previous_crc = previous.state.borrow().writes.previous_crc;
        }
    }

    /// The next frame that may go: there is something urgent in it, or it is full; and while others are on their way it has enough in it to be worth a header of
    /// its own. `None` when the volume has left the journal, or its disk failed.
    async fn next_frame(&self) -> Option<(OpenFrame, VolumePoint)> {
        let worth = self.engine.upgrade().map_or_else(Worth::default, |engine| Worth::of(engine.config()));
        self.kick
            .until(|| {
                let mut state = self.state.borrow_mut();
                let Some(attach) = state.attach.as_ref() else { return Some(None) };
                if attach.disk.failure().is_some() {
                    return Some(None);
                }
                let first = state.open.front()?;
                let full = state.open.len() > 1;
                let goes = match state.inflight.back() {
                    None => full || first.urgent,
                    // A start takes what the first frame of a log says of the one before on trust: all of that has completed by then.
                    Some(before) if !Rc::ptr_eq(&before.log, &first.log) => false,
                    Some(_) => worth.a_header(&first.builder, first.urgent, full, &state),
                };
                if !goes {
                    return None;
                }
                let frame = state.open.pop_front()?;
                let point = VolumePoint {
                    instant_last: state.framed.max(frame.builder.instant_last()),
                    durable: state.durable,
                    watermark: Self::watermark(&state),
                };
                state.framed = point.instant_last;
                state.recorded = (point.durable, point.watermark);
                let records = frame.builder.record_count();
                let at_once = state.inflight.iter().map(|f| f.records).sum::<usize>() + records;
                // A guest that asks for less from now on is known after a few frames.
                state.records_at_once = at_once.max(state.records_at_once - state.records_at_once.div_ceil(4));
                state.inflight.push_back(FrameOnItsWay {
                    log: Rc::clone(&frame.log),
                    ticket: Rc::clone(&frame.ticket),
                    records,
                });
                Some(Some((frame, point)))
            })
            .await
    }

    /// Waits for the next frame and gives it its place; answers the rest of its way. Called for one frame after the other.
    async fn send_next_frame(&self) -> Option<impl Future<Output = Sent> + use<>> {
        let (frame, point) = self.next_frame().await?;
        self.chain_across_logs(&frame.log);
        let OpenFrame { log, builder, ticket, unframed, .. } = frame;
        let started = self.host.boot_ns();
        if active(Mutation::AckBeforeAppend) {
            ticket.finish(Ok(()));
        }
        let placed = log.place(&self.host, StreamKind::Writes, builder, point).await;
        // Whatever it was, the frame is not in the journal, and nothing behind it may be: the way out is to leave the disk, before another one takes its place.
        let placed = placed.inspect_err(|error| log.disk.fail(format!("append: {error}")));
        Some(async move {
            let written = match placed {
                Ok(mut placed) => log.write_placed(&mut placed).await.ok().map(|()| placed),
                Err(_) => None,
            };
            if written.is_some() && active(Mutation::AckAheadOfEarlier) {
                ticket.finish(Ok(()));
            }
            Sent { log, ticket, unframed, point, started, written }
        })
    }

    /// A frame has completed, and all before it have; answers whether the appender goes on.
    fn end_frame(self: &Rc<Self>, sent: Sent) -> bool {
        let Sent { log, ticket, unframed, point, started, written } = sent;
        let Some(placed) = written else { return false };
        let appended = log.complete(&self.host, placed);
        let flush_expected = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            state.completed = state.completed.max(point.instant_last);
            state.inflight.pop_front();
            let mut log = log.state.borrow_mut();
            log.unframed = log.unframed.saturating_sub(unframed);
            log.frames_pending -= 1;
            let nothing_left = state.inflight.is_empty() && !state.open.iter().any(|frame| frame.urgent);
            let times = self.engine.upgrade().map_or(u32::MAX, |engine| engine.config().flush_habit);
            nothing_left && state.flush_habit.expects(times)
        };
        let mut stats = self.stats.borrow_mut();
        stats.journal_bytes += appended.bytes;
        stats.append_latency.record(self.host.boot_ns().saturating_sub(started));
        drop(stats);
        ticket.finish(Ok(()));
        if flush_expected {
            let (volume, disk) = (Rc::clone(self), Rc::clone(&log.disk));
            // An error is the disk's: it has failed by then, and the flush finds that.
            self.host.spawn(Box::pin(async move {
                // What has completed by now may be another disk's.
                if volume.state.borrow().attach.as_ref().is_some_and(|a| Rc::ptr_eq(&a.disk, &disk)) {
                    _ = volume.sync_completed(&disk).await;
                }
            }));
        }
        true
    }

    /// The appender: sends the open frames until the disk fails or the volume leaves the journal. Some are on their way side by side; whatever one of them
    /// stands for counts from when it and all before it have completed.
    pub(crate) async fn run_appender(self: Rc<Self>) {
        let frames = stream::unfold(&self, |volume| async move {
            let sent = volume.send_next_frame().await?;
            Some((sent, volume))
        });
        let frames_max = self.engine.upgrade().map_or(1, |engine| engine.config().frames_in_flight_max);
        let mut frames = pin!(frames.buffered(frames_max.max(1)));
        while let Some(sent) = frames.next().await {
            if !self.end_frame(sent) {
                break;
            }
            self.changed.notify();
            self.work.notify();
            // Whoever writes again at once shares the next frame: no wait, only the turn of tasks that are ready.
            yield_now().await;
        }
        let abandoned = {
            let mut state = self.state.borrow_mut();
            state.appender_running = false;
            // Left in order, with everything on the primary: what comes after that (a row of a log that was just sealed, say) is not needed. After a
            // failure the way out answers.
            if state.attach.is_none() { state.take_tickets() } else { Vec::new() }
        };
        for ticket in abandoned {
            ticket.finish(Err(Error::Gone("the volume has left the journal".into())));
        }
        self.changed.notify();
        self.work.notify();
    }
}

/// Answer of [`Volume::room`].
enum Room {
    Enough,
    Rotate,
    Later,
}

/// When a frame goes beside others that are on their way, from the engine's configuration. One at a time, a write would wait for the end of the frame before
/// its own: with two to sixteen writes in flight that costs up to half of their rate. With more, the CDP disk and the destager are busy all the time, and
/// headers count.
#[derive(Clone, Copy, Default)]
struct Worth {
    frames_max: usize,
    company: u32,
    few: usize,
}

impl Worth {
    fn of(config: &EngineConfig) -> Self {
        let EngineConfig { frames_in_flight_max, frame_company_blocks, few_writes, .. } = config;
        Self { frames_max: *frames_in_flight_max, company: *frame_company_blocks, few: *few_writes }
    }

    /// Whether the next frame is worth a header of its own. With no more writes in flight than there may be frames each has one; else there are two.
    fn a_header(self, frame: &FrameBuilder, urgent: bool, full: bool, state: &State) -> bool {
        let (at_once, records) = (state.records_at_once, frame.record_count());
        let alone = urgent && at_once <= self.frames_max.min(self.few);
        let half = urgent && at_once <= self.few && 2 * records >= at_once;
        alone || (state.inflight.len() < 2 && (full || half || (urgent && frame.payload_blocks() >= self.company)))
    }
}

/// What a request is charged: payload, frame and index overhead, a before-image for each block not touched yet.
fn charge_of(wanted: Wanted, fresh: u64) -> u64 {
    wanted.payload + 256 + wanted.blocks.min(wanted.payload / BLOCK + 64) * 40 + fresh * (BLOCK + 64)
}

/// A frame's ticket that is already done.
pub(crate) fn done_ticket() -> Rc<Ticket> {
    let ticket = Ticket::default();
    ticket.finish(Ok(()));
    Rc::new(ticket)
}
