//! Recovery: from what a stop left on the disks (clean, kill -9, power cut) to a served volume.
//!
//! 1. The fence decides whether the journal may, must or must not be used.
//! 2. The segment table names the volume's segments. The newest log with a complete carry holds the control state; later records of it change it.
//! 3. Streams of logs that were not sealed are scanned: full segments that are known to be durable by their footers, the rest frame by frame, payloads
//!    verified, along the chain. The first frame that does not fit is the cut; a later frame that says that the missing one was durable means that
//!    history has a hole, and nothing is guessed.
//! 4. Writes past the watermark go back into the overlay; pending reverts go on; a new log starts.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;

use uuid::Uuid;

use super::write::HINTS_MAX;
use super::{Attach, CloseReason, Mode, State, Ticket, Volume, whole_mask};
use crate::buf::{IoBuf, Slice};
use crate::disk::{Disk, SegmentRef};
use crate::engine::{Engine, VolumeSpec};
use crate::error::{Error, Result};
use crate::fence::{Fence, FenceState};
use crate::format::{
    self, ControlKind, ControlLog, ControlRevert, ControlSettings, DescriptorKind, EntryKind, FrameHeader, IndexEntry,
    SegmentFooter, SegmentHeader, StreamKind, crc, log_flags,
};
use crate::frame::{self, Descriptor, ParsedFrame};
use crate::index::{Filter, Key, Run, Touched};
use crate::info::{EventKind, Health, Marker, Priority, Settings, VolumeStats};
use crate::log::{Log, PendingRevert, Stream, second_frame_at_most};
use crate::mutation::{Mutation, active};
use crate::signal::{Signal, yield_now};
use crate::types::{BLOCK, Instant, SECTOR, SECTORS_PER_BLOCK};

/// Generation of a fence that was made for a journal found without one.
const ANY_GENERATION: u64 = u64::MAX;
/// Blocks that one read of a scan fetches.
const WINDOW_BLOCKS: u32 = 256;

/// Opens a volume, whatever its last stop was.
pub(crate) async fn open(engine: &Rc<Engine>, spec: VolumeSpec) -> Result<Rc<Volume>> {
    let primary_size = spec.primary.current_size().map_err(|e| Error::device("size of", spec.path.clone(), &e))?;
    let size = if spec.size == 0 { primary_size - primary_size % SECTOR } else { spec.size };
    if size == 0 || size % SECTOR != 0 || size > primary_size {
        return Err(Error::invalid(
            "size",
            size,
            format!("a multiple of 512 from 512 to {primary_size}, the size of {}", spec.path),
        ));
    }
    let fence = spec.fence.clone();
    let settings = fence.as_ref().and_then(|f| f.settings);
    let volume = Rc::new(Volume {
        id: spec.id,
        engine: Rc::downgrade(engine),
        host: Rc::clone(engine.host()),
        primary: Rc::clone(&spec.primary),
        primary_bytes: Cell::new(primary_size),
        state: RefCell::new(State {
            name: spec.name.clone(),
            path: spec.path.clone(),
            size,
            mode: Mode::Direct,
            health: Health::Ok,
            health_reason: String::new(),
            settings,
            on: fence.as_ref().is_some_and(|f| f.on),
            created_ns: fence.as_ref().map_or(0, |f| f.created_ns),
            held: fence.as_ref().is_some_and(|f| f.held),
            held_told: None,
            turning_away: false,
            reverting: None,
            generation: fence.as_ref().map_or(0, |f| f.generation),
            next_seq: fence.as_ref().map_or(0, |f| f.next_seq),
            attach: None,
            fence: fence.clone(),
            logs: VecDeque::new(),
            leaving: Vec::new(),
            open: VecDeque::new(),
            inflight: VecDeque::new(),
            records_at_once: 0,
            instant_last: Instant::ZERO,
            framed: Instant::ZERO,
            completed: Instant::ZERO,
            durable: Instant::ZERO,
            recorded: (Instant::ZERO, Instant::ZERO),
            markers: BTreeMap::new(),
            marker_last: Instant::ZERO,
            wrote_since_marker: false,
            wrote_since_flush: false,
            flush_habit: Default::default(),
            sizes: Vec::new(),
            views: BTreeMap::new(),
            clients: BTreeMap::new(),
            client_next: 0,
            direct_inflight: 0,
            writes_inflight: 0,
            lost_blocks: None,
            lost_changed: false,
            stale_blocks: BTreeMap::new(),
            punch: Default::default(),
            punching: false,
            drain_waiters: 0,
            backlog_full: false,
            destager_running: false,
            appender_running: false,
            primary_failing: None,
            fence_failing: None,
            last_write_ns: 0,
            window_short_told: false,
            primary_size_seen: 0,
            flushes: VecDeque::new(),
        }),
        changed: Signal::default(),
        kick: Signal::default(),
        work: Signal::default(),
        stats: RefCell::new(VolumeStats::default()),
        index_bytes: Rc::default(),
        image_epoch: Cell::new(0),
        throttled: Cell::new(0),
        syncs: RefCell::default(),
        samples: RefCell::default(),
        requests: Cell::new((0, 0)),
        answered: Cell::new((0, 0)),
        landing: Cell::new(0),
        pieces_since_punch: Cell::new(0),
        admin: Cell::new(false),
        fence_busy: Cell::new(false),
        left_in_order: Cell::new(false),
        emptied: Cell::new(false),
    });
    if let Some(fence) = &fence
        && let Some(lost) = lost_of(fence)
        && spec.accept != Some(Health::RevertIncomplete)
    {
        let mut state = volume.state.borrow_mut();
        state.lost_blocks = Some(lost);
        state.health = Health::RevertIncomplete;
        state.health_reason = fence.reason.clone();
    }
    volume.decide(engine, fence, &spec).await?;
    volume.host.spawn(Box::pin(Rc::clone(&volume).run_caretaker()));
    Ok(volume)
}

/// Blocks of a revert that the fence calls lost.
fn lost_of(fence: &Fence) -> Option<Touched> {
    let mut lost = Touched::default();
    for (block, count) in &fence.lost_blocks {
        lost.insert_range(*block, *count);
    }
    (!lost.is_empty()).then_some(lost)
}

impl Volume {
    /// What the fence, the disks and the primary say together.
    async fn decide(self: &Rc<Self>, engine: &Rc<Engine>, fence: Option<Fence>, spec: &VolumeSpec) -> Result<()> {
        let accepted = |health: Health| spec.accept == Some(health);
        let lost = |fence: &Fence| lost_of(fence).filter(|_| !accepted(Health::RevertIncomplete));
        let Some(fence) = fence else {
            // Of several the one with the newest log: what others have was left there when the journal moved.
            let newest = |d: &Rc<Disk>| d.segments_of(self.id).iter().map(|(_, entry)| entry.log_seq.get()).max();
            let found =
                engine.disk_list().into_iter().filter_map(|d| Some((newest(&d)?, d))).max_by_key(|(seq, _)| *seq);
            let Some((_, disk)) = found else { return Ok(()) };
            if spec.attach_journal {
                return self.attach_found(engine, &disk).await;
            }
            if !accepted(Health::NeedsJournal) {
                let reason = format!(
                    "CDP disk {} holds history of this volume, but this host has no fence for it: attach it, or give it up",
                    disk.path
                );
                return self.refuse(Health::NeedsJournal, EventKind::NeedsJournal, reason);
            }
            self.drop_leftovers(engine).await;
            return Ok(());
        };
        match fence.state {
            FenceState::Detached => {
                self.drop_leftovers(engine).await;
                if accepted(Health::RevertIncomplete) && !fence.lost_blocks.is_empty() {
                    self.put_fence(FenceState::Detached, fence.disk, "lost blocks were given up").await?;
                }
                let mut state = self.state.borrow_mut();
                if fence.on && state.lost_blocks.is_none() {
                    state.health = Health::Offline;
                    state.health_reason = fence.reason.clone();
                }
                Ok(())
            }
            FenceState::Clean | FenceState::Dirty | FenceState::Detaching => {
                let clean = fence.state == FenceState::Clean;
                // One that failed in writing, perhaps for another volume, is read; then this one leaves it, too.
                let disk = engine.disk_list().into_iter().find(|d| d.id == fence.disk && d.can_be_read());
                let Some(disk) = disk else {
                    if clean || accepted(Health::NeedsJournal) {
                        let why = format!("CDP disk {} is missing", fence.disk);
                        return self.go_on_without(&why, lost(&fence)).await;
                    }
                    let reason = format!(
                        "CDP disk {} is missing and may hold acked writes: bring it back, or say explicitly to go on without",
                        fence.disk
                    );
                    return self.refuse(Health::NeedsJournal, EventKind::NeedsJournal, reason);
                };
                if let Some(what) = self.primary_differs(&fence, clean, spec.attach_journal).await? {
                    if accepted(Health::PrimaryChanged) {
                        // What is on the primary is what the admin wants, in blocks that were lost, too.
                        self.go_on_without(&what, None).await?;
                        self.drop_leftovers(engine).await;
                        return Ok(());
                    }
                    return self.refuse(Health::PrimaryChanged, EventKind::PrimaryChanged, what);
                }
                if disk.clock_high_water().0 < fence.disk_clock_ns {
                    let reason = format!(
                        "CDP disk {} is an older copy of itself (its clock stands at {}, it was at {}): newer acked writes may be missing",
                        disk.path,
                        disk.clock_high_water(),
                        Instant(fence.disk_clock_ns)
                    );
                    if accepted(Health::NeedsJournal) {
                        self.go_on_without(&reason, lost(&fence)).await?;
                        self.drop_leftovers(engine).await;
                        return Ok(());
                    }
                    return self.refuse(Health::NeedsJournal, EventKind::NeedsJournal, reason);
                }
                let _read = disk.read_although_failed();
                let Err(error) = self.recover(engine, &disk, &fence, &spec.undecided_reverts).await else {
                    self.drop_older(engine, &disk).await;
                    return Ok(());
                };
                let (health, event) = match error {
                    Error::State(_) => (Health::PrimaryChanged, EventKind::PrimaryChanged),
                    _ => (Health::NeedsJournal, EventKind::Damage),
                };
                if accepted(health) {
                    let lost = lost(&fence).filter(|_| health != Health::PrimaryChanged);
                    self.go_on_without(&error.to_string(), lost).await?;
                    self.drop_leftovers(engine).await;
                    return Ok(());
                }
                self.refuse(health, event, error.to_string())
            }
        }
    }

    /// Takes over a journal that this host has no fence for. Whether the primary is the one that it belongs to, and whether this journal is the volume's
    /// newest, the admin vouches for; that what was destaged last is on the primary is checked.
    async fn attach_found(self: &Rc<Self>, engine: &Rc<Engine>, disk: &Rc<Disk>) -> Result<()> {
        let fence = {
            let mut state = self.state.borrow_mut();
            state.generation = ANY_GENERATION;
            self.make_fence(&state, FenceState::Dirty, disk.id, "attached")
        };
        match self.recover(engine, disk, &fence, &[]).await {
            Ok(()) => {
                self.drop_older(engine, disk).await;
                Ok(())
            }
            Err(error @ Error::State(_)) => {
                self.refuse(Health::PrimaryChanged, EventKind::PrimaryChanged, error.to_string())
            }
            Err(error) => self.refuse(Health::NeedsJournal, EventKind::Damage, error.to_string()),
        }
    }

    fn refuse(self: &Rc<Self>, health: Health, kind: EventKind, reason: String) -> Result<()> {
        {
            let mut state = self.state.borrow_mut();
            state.mode = Mode::Refused;
            state.health = health;
            state.health_reason = reason.clone();
            state.attach = None;
            state.logs.clear();
            state.open.clear();
        }
        self.event(kind, reason);
        Ok(())
    }

    /// Serves the primary as it is; the journal of this generation is never redone.
    async fn go_on_without(self: &Rc<Self>, why: &str, lost: Option<Touched>) -> Result<()> {
        let disk = {
            let mut state = self.state.borrow_mut();
            state.health = match &lost {
                Some(_) => Health::RevertIncomplete,
                None if state.on => Health::Offline,
                None => Health::Ok,
            };
            state.health_reason = if state.health == Health::Ok { String::new() } else { why.to_owned() };
            state.lost_blocks = lost;
            state.stale_blocks.clear();
            state.mode = Mode::Direct;
            state.attach = None;
            state.logs.clear();
            state.open.clear();
            state.markers.clear();
            state.fence.as_ref().map_or(Uuid::nil(), |f| f.disk)
        };
        self.put_fence(FenceState::Detached, disk, why).await?;
        self.event(EventKind::Offline, why);
        Ok(())
    }

    /// Frees what dead generations left on the disks that are here.
    async fn drop_leftovers(self: &Rc<Self>, engine: &Rc<Engine>) {
        for disk in engine.disk_list() {
            let old: Vec<_> = disk.segments_of(self.id).into_iter().map(|(s, _)| s).collect();
            // What stays is never redone: it is freed before anything of this volume is written there.
            self.try_release(&disk, &old).await;
        }
    }

    /// Frees what the journal left on other disks before it came to this one. What is newer than its oldest log stays: the fence may be an old copy of itself.
    pub(super) async fn drop_older(self: &Rc<Self>, engine: &Rc<Engine>, disk: &Rc<Disk>) {
        let Some(oldest) = self.state.borrow().logs.front().map(|log| log.seq) else { return };
        for other in engine.disk_list().iter().filter(|d| d.id != disk.id && d.failure().is_none()) {
            let segments = other.segments_of(self.id).into_iter();
            let old: Vec<_> = segments.filter(|(_, entry)| entry.log_seq.get() < oldest).map(|(s, _)| s).collect();
            self.try_release(other, &old).await;
        }
    }

    /// Frees segments that nothing needs; a disk that cannot be written keeps them.
    async fn try_release(&self, disk: &Disk, segments: &[SegmentRef]) {
        if let Err(error) = disk.release(segments).await {
            tracing::warn!(volume = %self.id, disk = %disk.path, %error, "segments that nothing needs stay there");
        }
    }

    /// Whether somebody wrote past the agent, as far as the fence tells. That it is the same primary under another identity may be vouched for.
    async fn primary_differs(&self, fence: &Fence, clean: bool, vouched: bool) -> Result<Option<String>> {
        let identity = self.primary.identity().map_err(|e| Error::device("identify", self.path(), &e))?;
        let size = self.primary.current_size().map_err(|e| Error::device("size of", self.path(), &e))?;
        if !vouched && !fence.primary_id.is_empty() && identity.id != fence.primary_id {
            return Ok(Some(format!("the primary is {} now, it was {}", identity.id, fence.primary_id)));
        }
        if size < fence.primary_size {
            return Ok(Some(format!("the primary has {size} bytes now, it had {}", fence.primary_size)));
        }
        if clean && fence.primary_mtime_ns != 0 && identity.mtime_ns != fence.primary_mtime_ns {
            return Ok(Some("the primary was written to while the agent was down (its mtime changed)".into()));
        }
        if clean && !fence.primary_samples.is_empty() {
            let now: BTreeMap<u64, u32> = self.sample_primary().await.into_iter().collect();
            let changed = |(block, sum): &&(u64, u32)| now.get(block).is_some_and(|now| now != sum);
            if let Some((block, _)) = fence.primary_samples.iter().find(changed) {
                let what = format!("the primary was written to while the agent was down (block {block} changed)");
                return Ok(Some(what));
            }
        }
        Ok(None)
    }

    async fn recover(
        self: &Rc<Self>,
        engine: &Rc<Engine>,
        disk: &Rc<Disk>,
        fence: &Fence,
        undecided: &[Uuid],
    ) -> Result<()> {
        let streams = group_segments(disk, self.id);
        // The newest log with a complete carry.
        let mut candidates: Vec<(u64, u64)> = streams.keys().map(|(seq, id, _)| (*seq, *id)).collect();
        candidates.dedup();
        let next_seq = candidates.last().map_or(0, |(seq, _)| seq + 1);
        let several = candidates.len() > 1;
        let mut base = None;
        let mut dead: Vec<SegmentRef> = Vec::new();
        while let Some((seq, id)) = candidates.pop() {
            let segments = streams.get(&(seq, id, StreamKind::Writes)).cloned().unwrap_or_default();
            let scan = scan_stream(disk, self.id, seq, id, StreamKind::Writes, segments).await?;
            if scan.side.iter().any(is_end) {
                base = Some((seq, id, scan));
                break;
            }
            // Also before-images, of which none is taken before there are control records.
            let before = streams.get(&(seq, id, StreamKind::Before)).cloned().unwrap_or_default();
            let before = scan_stream(disk, self.id, seq, id, StreamKind::Before, before).await?;
            let told = (before.claim_other > scan.frame_next).then(|| format!("{} log {seq}", disk.path));
            if let Some(place) = scan.hole.or(told) {
                return Err(Error::Damaged { what: "journal: control records that were durable are missing", place });
            }
            for kind in Self::STREAMS {
                dead.extend(streams.get(&(seq, id, kind)).into_iter().flatten().copied());
            }
        }
        let Some((base_seq, base_id, base_scan)) = base else {
            // Refused as it is: nothing is given back. A journal that has come to a second log had a first frame once.
            if fence.state == FenceState::Clean || several {
                return Err(Error::Damaged {
                    what: "journal: no log with its control records",
                    place: disk.path.clone(),
                });
            }
            // A journal that never got its first frame: nothing was acked into it.
            self.try_release(disk, &dead).await;
            if fence.generation == ANY_GENERATION {
                self.state.borrow_mut().generation = 0;
            }
            self.go_on_without("the journal was not begun", lost_of(fence)).await?;
            // The call that switched protection on was cut off: it is brought to its end. Where the disk fails in that, the volume is served without, and that is all.
            if let Some(settings) = fence.settings.filter(|_| fence.on && disk.failure().is_none())
                && let Err(error) = self.attach_to(Some(Rc::clone(disk)), settings).await
            {
                tracing::warn!(volume = %self.id, %error, "not protected again yet");
            }
            return Ok(());
        };
        let control = fold(&base_scan.side, base_seq, &disk.path, undecided)?;
        if control.settings.generation.get() != fence.generation && fence.generation != ANY_GENERATION {
            // The fence knows a newer attachment than the disk: what is here is never redone.
            return Err(Error::Damaged {
                what: "journal: it is of another generation than the fence says",
                place: disk.path.clone(),
            });
        }
        // Logs and their streams.
        let mut logs = VecDeque::new();
        let mut watermark = base_scan.watermark;
        let mut instant_last = base_scan.instant_last;
        let mut base_scan = Some(base_scan);
        let mut hole = None;
        // Logs that ended with a revert of nothing.
        let mut reverted_nothing = Vec::new();
        for row in control.logs.values() {
            let (seq, id) = (row.seq.get(), row.id.get());
            let flags = row.flags.get();
            let has = |flag: u32| flags & flag != 0;
            let (start, index_bytes) = (Instant(row.start.get()), Rc::clone(&self.index_bytes));
            let recording = has(log_flags::RECORDING);
            let log = Log::new(seq, id, start, self.id, Rc::clone(disk), recording, index_bytes);
            let segments = |kind| streams.get(&(seq, id, kind)).cloned().unwrap_or_default();
            if has(log_flags::SEALED) {
                let mut state = log.state.borrow_mut();
                state.closed = true;
                state.sealed = true;
                state.thin = has(log_flags::THIN);
                state.close_reason = row.close_reason.get();
                state.io_start = Instant(row.io_start.get());
                state.io_last = Instant(row.io_last.get());
                state.imaged = None;
                state.writes_root = row.writes_root;
                state.before_root = row.before_root;
                let run = |root, kind| Run { root, log_id: id, kind };
                if state.thin {
                    dead.extend(segments(StreamKind::Writes));
                } else {
                    state.writes_index.push_run(run(row.writes_root, StreamKind::Writes), None);
                    state.writes.segments = segments(StreamKind::Writes);
                }
                state.before_index.push_run(run(row.before_root, StreamKind::Before), None);
                state.before.segments = segments(StreamKind::Before);
            } else {
                let writes = match base_scan.take_if(|_| seq == base_seq && id == base_id) {
                    Some(scan) => scan,
                    None => {
                        scan_stream(disk, self.id, seq, id, StreamKind::Writes, segments(StreamKind::Writes)).await?
                    }
                };
                let before =
                    scan_stream(disk, self.id, seq, id, StreamKind::Before, segments(StreamKind::Before)).await?;
                for scan in [&writes, &before] {
                    watermark = watermark.max(scan.watermark);
                    instant_last = instant_last.max(scan.instant_last);
                    hole = hole.or(scan.hole.clone());
                }
                if before.frame_next < writes.claim_other || writes.frame_next < before.claim_other {
                    hole.get_or_insert_with(|| format!("{} log {seq}: the tail of one of its streams", disk.path));
                }
                if writes
                    .side
                    .iter()
                    .rfind(|d| d.kind == DescriptorKind::Revert)
                    .is_some_and(|d| d.header.count.get() == 0)
                {
                    reverted_nothing.push(seq);
                }
                let mut touched = Touched::default();
                let mut imaged = Touched::default();
                let mut io = (Instant::MAX, Instant::ZERO);
                // Checksums say that these are the bytes that were written, not that they make sense.
                let end = self.primary_bytes.get().div_ceil(BLOCK);
                let mut inside = true;
                let writes_filters = for_each_entry(disk, id, StreamKind::Writes, &writes, |entry| {
                    inside &= touch(&mut touched, entry, end);
                    io = (io.0.min(Instant(entry.instant.get())), io.1.max(Instant(entry.instant.get())));
                })
                .await?;
                let before_filters = for_each_entry(disk, id, StreamKind::Before, &before, |entry| {
                    inside &= touch(&mut imaged, entry, end);
                })
                .await?;
                // The log after it was begun when all of its frames were durable; or a sync said so that had dropped one.
                let discards = writes.side.iter().filter(|d| d.kind == DescriptorKind::Discard);
                let io_last = discards.map(Descriptor::instant).fold(io.1, Instant::max);
                let cut_short = has(log_flags::CLOSED) && io_last < Instant(row.io_last.get());
                if cut_short && !active(Mutation::LastFramesUnmissed) {
                    hole.get_or_insert_with(|| format!("{} log {seq}: its last frames", disk.path));
                }
                if !inside {
                    let place = format!("{} log {seq}", disk.path);
                    return Err(Error::Damaged { what: "journal: a record lies past the volume's end", place });
                }
                let mut state = log.state.borrow_mut();
                state.closed = true;
                state.close_reason = if has(log_flags::CLOSED) {
                    row.close_reason.get()
                } else if seq == base_seq && control.reverted_at.is_some() {
                    CloseReason::Reverted as u32
                } else {
                    CloseReason::Restarted as u32
                };
                if io.1 != Instant::ZERO {
                    (state.io_start, state.io_last) = io;
                }
                state.charged = touched.len() * 2 * BLOCK;
                state.touched = touched;
                state.imaged = Some(imaged);
                for (scan, filters, kind) in
                    [(&writes, writes_filters, StreamKind::Writes), (&before, before_filters, StreamKind::Before)]
                {
                    dead.extend(&scan.dead);
                    let stream =
                        Stream::resume(scan.segments.clone(), scan.number_next, scan.frame_next, scan.previous_crc);
                    let state = &mut *state;
                    let (slot, index) = match kind {
                        StreamKind::Writes => (&mut state.writes, &mut state.writes_index),
                        StreamKind::Before => (&mut state.before, &mut state.before_index),
                    };
                    *slot = stream;
                    for (run, filter) in scan.runs.iter().zip(filters) {
                        index.push_run(Run { root: *run, log_id: id, kind }, Some(filter));
                    }
                    for entry in &scan.entries {
                        index.insert(*entry);
                    }
                    index.close_recovered(scan.number_next.saturating_sub(1));
                }
            }
            if active(Mutation::HistoryForgotten) {
                log.state.borrow_mut().recording = false;
            }
            logs.push_back(log);
        }
        if let Some(place) = hole.filter(|_| !active(Mutation::HoleAccepted)) {
            return Err(Error::Damaged { what: "journal: a frame that was durable is missing", place });
        }
        // Segments of logs that are in no row were freed by a record that is durable.
        for ((seq, id, _), segments) in &streams {
            if !control.logs.contains_key(seq) && (*seq, *id) != (base_seq, base_id) {
                dead.extend(segments);
            }
        }
        dead.sort_by_key(|s| s.segment);
        dead.dedup();
        engine.clock().past(instant_last.max(Instant(base_last_instant(&control))));
        self.assume(disk, &control, logs, instant_last, next_seq)?;
        self.restore_overlay(watermark).await?;
        self.restore_lost_blocks(&control, &reverted_nothing).await?;
        self.restore_reverts(&control, fence.state == FenceState::Detaching).await?;
        let detaching = fence.state == FenceState::Detaching;
        if !detaching {
            // A way out that was cut off wrote to the primary what the journal may have lost.
            self.check_destaged(watermark).await?;
        }
        // Before anything is appended: a segment that was cut off must not follow the new one. On a disk that cannot be written nothing will be.
        self.try_release(disk, &dead).await;
        self.resume_journal_after_recovery(engine, disk, control.reverted_at, detaching).await?;
        self.event(
            EventKind::Recovered,
            format!("{} logs, writes after {watermark} redone", self.state.borrow().logs.len()),
        );
        Ok(())
    }

    /// Takes over the recovered row of logs and control state.
    fn assume(
        &self,
        disk: &Rc<Disk>,
        control: &Control,
        logs: VecDeque<Rc<Log>>,
        instant_last: Instant,
        next_seq: u64,
    ) -> Result<()> {
        let s = &control.settings;
        let settings = Settings {
            reserve_capacity: s.reserve_capacity.get(),
            reserve_duration_s: s.reserve_duration_s.get(),
            priority: match s.priority {
                0 => Priority::Low,
                2 => Priority::High,
                _ => Priority::Mid,
            },
        };
        let mut state = self.state.borrow_mut();
        state.settings = Some(settings);
        state.on = s.on == 1;
        state.held = s.held == 1;
        state.created_ns = s.created_ns.get();
        state.generation = s.generation.get();
        state.next_seq = next_seq.max(s.next_seq.get());
        state.attach =
            Some(Attach { disk: Rc::clone(disk), capacity: settings.reserve_capacity / disk.geometry.segment_size });
        if let Some((_, size)) = control.sizes.last()
            && *size <= self.primary.current_size().unwrap_or(0)
        {
            state.size = *size;
        }
        state.sizes = control.sizes.clone();
        state.markers = control.markers.iter().map(|m| ((m.time, m.name.clone()), m.clone())).collect();
        Self::thin_markers(&mut state);
        // The frames have them all, also those for which there was no room any more.
        for (seq, block, count, instant) in control.hints.iter().take(HINTS_MAX) {
            if let Some(log) = logs.iter().find(|l| l.seq == *seq) {
                log.state.borrow_mut().hints.insert(*block, *count, *instant);
            }
        }
        // Whatever the newest log wrote cancels hints; one that came after such a write is given up, too, which costs only its room.
        if let Some(last) = logs.back() {
            let touched = std::mem::take(&mut last.state.borrow_mut().touched);
            for log in &logs {
                let mut log = log.state.borrow_mut();
                let hints: Vec<_> = log.hints.iter().collect();
                for (block, count, _) in hints {
                    for b in touched.iter_from(block).take_while(|b| *b < block + count) {
                        let may_split = log.hints.len() < HINTS_MAX;
                        log.hints.cut(b, 1, may_split);
                    }
                }
            }
            last.state.borrow_mut().touched = touched;
        }
        state.logs = logs;
        Self::prune_markers(&mut state);
        for (instant, clean) in &control.flushes {
            state.note_flush(*instant, *clean);
        }
        // What came behind them is not looked for: the guest's next flush is noted.
        state.wrote_since_flush = true;
        state.instant_last = instant_last;
        state.framed = instant_last;
        state.completed = instant_last;
        state.durable = Instant::ZERO;
        Ok(())
    }

    /// Writes past the watermark go back into the overlay of their log, with their bytes.
    async fn restore_overlay(self: &Rc<Self>, watermark: Instant) -> Result<()> {
        let logs: Vec<_> = self.state.borrow().logs.iter().filter(|l| !l.state.borrow().sealed).cloned().collect();
        for log in &logs {
            let mut entries: Vec<IndexEntry> = Vec::new();
            let (memory, runs) = {
                let state = log.state.borrow();
                (state.writes_index.in_memory(), state.writes_index.runs())
            };
            for mem in memory {
                entries.extend(mem.iter().filter(|e| Instant(e.instant.get()) > watermark));
            }
            for run in runs {
                run.for_each(&*log.disk, |entry| {
                    if Instant(entry.instant.get()) > watermark {
                        entries.push(*entry);
                    }
                })
                .await?;
            }
            entries.sort_unstable_by_key(|e| (e.instant.get(), e.block.get()));
            let mut at = 0;
            while at < entries.len() {
                let entry = entries[at];
                let (block, instant) = (entry.block.get(), Instant(entry.instant.get()));
                if entry.kind() == EntryKind::Zero {
                    let (sector, sectors) = if entry.level() > 0 {
                        (block * SECTORS_PER_BLOCK, entry.blocks() * SECTORS_PER_BLOCK)
                    } else {
                        sectors_of(block, entry.mask)
                    };
                    log.state.borrow_mut().overlay.insert_zero(sector, sectors, instant);
                    at += 1;
                    continue;
                }
                // Neighbours in the journal are read together.
                let mut n = 1;
                while at + n < entries.len() && n < WINDOW_BLOCKS as usize && follows(&entry, &entries[at + n], n) {
                    n += 1;
                }
                let (segment, page) = (entry.segment.get(), u32::from(entry.page.get()));
                let bytes = log.disk.read(segment, page, n as u32).await?.share();
                for (i, entry) in entries[at..at + n].iter().enumerate() {
                    let data: Slice = bytes.slice(i * BLOCK as usize, BLOCK as usize);
                    if crc(&data) != entry.crc.get() {
                        return Err(frame::damaged("payload", &log.disk.path, segment, page + i as u32));
                    }
                    let (sector, sectors) = sectors_of(entry.block.get(), entry.mask);
                    log.state.borrow_mut().overlay.insert_data(sector, sectors, &data, Instant(entry.instant.get()));
                }
                at += n;
                yield_now().await;
            }
        }
        // A power cut in the middle of destaging may have damaged the primary's copy of a block: where a before-image says that it was being
        // overwritten, the sectors that the overlay lacks come from the journal.
        for log in &logs {
            let partial = log.state.borrow().overlay.partial_blocks();
            for block in partial {
                if log.imaged(block) != Some(true) {
                    continue;
                }
                let end = self.end_of(log);
                match self.blocks_at(end, log, block, 1).await {
                    Ok(base) => log.state.borrow_mut().overlay.fill(block, &base),
                    // Unreadable before the write, unreadable after it.
                    Err(Error::Device { op: "read before-image of", .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn end_of(&self, log: &Rc<Log>) -> Instant {
        let state = self.state.borrow();
        let next = state.logs.iter().find(|l| l.seq > log.seq);
        next.map_or(state.instant_last, |n| n.start.before())
    }

    /// Of the blocks that the fence calls lost, those that were written whole since are not lost any more. A block is lost when a revert is copied, and
    /// that begins when everything up to the log of that revert is on the primary, and out of the fence where it had ended a loss: what those logs wrote
    /// came before. Of the logs `reverted_nothing` there was nothing to copy.
    async fn restore_lost_blocks(self: &Rc<Self>, control: &Control, reverted_nothing: &[u64]) -> Result<()> {
        let (lost, logs): (Vec<u64>, Vec<_>) = {
            let state = self.state.borrow();
            let Some(lost) = &state.lost_blocks else { return Ok(()) };
            let mut logs: Vec<_> = state.logs.iter().filter(|l| !l.state.borrow().sealed).cloned().collect();
            let copied = |i: &usize| {
                let log = &logs[*i];
                let reverted = log.state.borrow().close_reason == CloseReason::Reverted as u32;
                // A newer log's records do not carry a revert that was copied to its end; all older logs were sealed before, which they do carry.
                let begun = control.reverts.get(&log.seq).map_or(*i == 0, |row| row.next_block.get() > 0);
                reverted && begun && !reverted_nothing.contains(&log.seq)
            };
            let copied = (0..logs.len()).rfind(copied).filter(|_| !active(Mutation::LossEndedEarly));
            let before = copied.map_or(0, |at| at + 1);
            (lost.iter().collect(), logs.split_off(before))
        };
        for block in lost {
            for log in &logs {
                if !log.state.borrow().touched.contains(block) {
                    continue;
                }
                let mut missing = whole_mask(self.state.borrow().size, block);
                log.lookup_writes(block, Instant::MAX, &mut missing, &mut Vec::new()).await?;
                if missing == 0 {
                    let mut state = self.state.borrow_mut();
                    if log.imaged(block) != Some(true) {
                        state.stale_blocks.insert(block, log.seq);
                    }
                    state.lost_blocks.get_or_insert_with(Default::default).remove_range(block, 1);
                    state.lost_changed = true;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Reverts that were not copied to the end go on where they were.
    async fn restore_reverts(self: &Rc<Self>, control: &Control, detaching: bool) -> Result<()> {
        for row in control.reverts.values() {
            let log = self.state.borrow().logs.iter().find(|l| l.seq == row.log_seq.get()).cloned();
            let Some(log) = log else { continue };
            if row.next_block.get() == u64::MAX || log.state.borrow().sealed {
                continue;
            }
            let target = Instant(row.target.get());
            let mut left = self.touched_since(target, Some(log.seq)).await?;
            left.remove_range(0, row.next_block.get());
            let left_blocks = left.len();
            if left_blocks == 0 {
                continue;
            }
            if detaching {
                // A way out that was cut off wrote to the primary without before-images: what rests on it may be newer than the target.
                let since: Vec<_> =
                    self.state.borrow().logs.iter().filter(|l| !l.state.borrow().sealed).cloned().collect();
                for block in left.iter().collect::<Vec<_>>() {
                    let touched = since.iter().any(|l| l.state.borrow().touched.contains(block));
                    if touched && self.rests_on_primary(target, block).await? {
                        left.remove_range(block, 1);
                        self.lose_block(&log, block);
                    }
                }
            }
            log.state.borrow_mut().revert = Some(PendingRevert {
                instant: Instant(row.instant.get()),
                target,
                left,
                total: row.blocks.get().max(row.blocks_done.get() + left_blocks),
                done: row.blocks_done.get(),
                next_block: row.next_block.get(),
            });
        }
        Ok(())
    }

    /// Blocks that were destaged last must be on the primary as the journal has them; otherwise somebody wrote past the agent.
    async fn check_destaged(self: &Rc<Self>, watermark: Instant) -> Result<()> {
        const SAMPLES: usize = 16;
        let logs: Vec<_> = self.state.borrow().logs.iter().cloned().collect();
        let Some(position) = logs.iter().rposition(|l| l.start <= watermark && !l.state.borrow().sealed) else {
            return Ok(());
        };
        let log = &logs[position];
        let mut newest: Vec<IndexEntry> = Vec::new();
        for mem in log.state.borrow().writes_index.in_memory() {
            newest.extend(
                mem.iter().filter(|e| {
                    Instant(e.instant.get()) <= watermark && e.kind() == EntryKind::Write && e.mask == 0xFF
                }),
            );
        }
        newest.sort_unstable_by_key(|e| std::cmp::Reverse(e.instant.get()));
        let mut seen = Touched::default();
        let mut checked = 0;
        for entry in newest {
            let block = entry.block.get();
            // Only the block's newest version, and only where nothing newer may have reached the primary.
            if !seen.insert(block) {
                continue;
            }
            let newer = logs.iter().skip(position).any(|l| {
                let state = l.state.borrow();
                state.overlay.intersects(block, 1)
                    || (!Rc::ptr_eq(l, log)
                        && (state.touched.contains(block) || state.imaged.as_ref().is_none_or(|i| i.contains(block))))
                    || state.revert.is_some()
                    || state.hints.iter().any(|(b, n, _)| b <= block && block < b + n)
            });
            if newer || (block + 1) * BLOCK > self.primary_bytes.get() {
                continue;
            }
            let mut missing = 0xFF;
            let mut found = Vec::new();
            log.lookup_writes(block, Instant::MAX, &mut missing, &mut found).await?;
            if found.first() != Some(&entry) {
                continue;
            }
            let (result, bytes) = self.primary.read(block * BLOCK, IoBuf::zeroed(BLOCK as usize)).await;
            if result.is_ok() && crc(&bytes) != entry.crc.get() {
                return Err(Error::State(format!(
                    "the primary was written to while the agent was down: block {block} is not what was destaged"
                )));
            }
            checked += 1;
            if checked >= SAMPLES {
                break;
            }
        }
        Ok(())
    }

    /// The row is whole: a new log starts, requests go through the journal.
    async fn resume_journal_after_recovery(
        self: &Rc<Self>,
        engine: &Rc<Engine>,
        disk: &Rc<Disk>,
        reverted_at: Option<Instant>,
        detaching: bool,
    ) -> Result<()> {
        let (settings, on) = {
            let state = self.state.borrow();
            (state.settings, state.on)
        };
        let reserve = settings.map_or(0, |s| s.reserve_capacity);
        disk.reserve(self.id, reserve, true)?;
        // A way out that was cut off stays one: part of the backlog went to the primary without before-images.
        let fence = if detaching { FenceState::Detaching } else { FenceState::Dirty };
        // The instant first: it raises the disk's clock mark, which the fence then tells from older copies of this disk.
        let now = engine.tick().await?;
        self.put_fence(fence, disk.id, "").await?;
        let instant = reverted_at.unwrap_or(now);
        let (ticket, empty) = {
            let mut state = self.state.borrow_mut();
            // A log without a write leaves no trace: what is viewed in it, the log before it shows as well.
            let empty = match (
                state.logs.len().checked_sub(2).map(|i| Rc::clone(&state.logs[i])),
                state.logs.back().cloned(),
            ) {
                (Some(before), Some(last)) => {
                    let (a, b) = (before.state.borrow(), last.state.borrow());
                    let gone = b.touched.is_empty()
                        && b.imaged.as_ref().is_some_and(Touched::is_empty)
                        && b.revert.is_none()
                        && a.recording == b.recording
                        // After a revert the log before shows another state.
                        && a.close_reason != CloseReason::Reverted as u32
                        && !a.thin
                        && b.hints.is_empty();
                    gone.then(|| Rc::clone(&last))
                }
                _ => None,
            };
            if empty.is_some() {
                state.logs.pop_back();
            }
            self.rotate(&mut state, instant, on, CloseReason::Restarted);
            state.mode = if detaching { Mode::Switching } else { Mode::Journal };
            (state.open.back().map(|f| Rc::clone(&f.ticket)), empty)
        };
        self.start_tasks();
        let begun = self.begin_again(disk, ticket, empty, detaching).await;
        let Some(reason) = disk.failure().filter(|_| begun.is_err() && !active(Mutation::RecoveredBacklogDropped))
        else {
            return begun;
        };
        // The way out begins, or has begun, on the destager's task: it brings what was recovered to the primary, and then that is served. The row of logs is
        // its own by now: whoever took it away here would leave the primary without the backlog, and the fence would say that it has it.
        let mut state = self.state.borrow_mut();
        if state.on && state.health == Health::Ok {
            state.health = Health::Offline;
            state.health_reason = format!("CDP disk {}: {reason}", disk.path);
        }
        Ok(())
    }

    /// The first frame of the new log, and what waits for it.
    async fn begin_again(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        ticket: Option<Rc<Ticket>>,
        empty: Option<Rc<Log>>,
        detaching: bool,
    ) -> Result<()> {
        if let Some(ticket) = ticket {
            ticket.wait().await?;
            self.sync_completed(disk).await?;
        }
        if let Some(log) = empty {
            let segments = {
                let mut inner = log.state.borrow_mut();
                inner.gone = true;
                let mut list = std::mem::take(&mut inner.writes.segments);
                list.append(&mut inner.before.segments);
                list
            };
            disk.release(&segments).await?;
        }
        if detaching {
            disk.check()?;
            // Redone, then over: this history has a gap from where the disk failed.
            self.state.borrow_mut().mode = Mode::Journal;
            self.leave_journal("the CDP disk had failed", false).await?;
            let mut state = self.state.borrow_mut();
            if state.on && state.health == Health::Ok {
                state.health = Health::Offline;
                state.health_reason = "the CDP disk had failed".into();
            }
        }
        Ok(())
    }
}

fn sectors_of(block: u64, mask: u8) -> (u64, u64) {
    (block * SECTORS_PER_BLOCK + u64::from(mask.trailing_zeros()), u64::from(mask.count_ones()))
}

fn follows(first: &IndexEntry, next: &IndexEntry, n: usize) -> bool {
    next.kind() == EntryKind::Write
        && next.segment == first.segment
        && usize::from(next.page.get()) == usize::from(first.page.get()) + n
}

fn is_end(descriptor: &Descriptor) -> bool {
    descriptor.kind == DescriptorKind::Control
        && ControlKind::from_byte(descriptor.header.sub) == Some(ControlKind::End)
}

type Streams = BTreeMap<(u64, u64, StreamKind), Vec<SegmentRef>>;

fn group_segments(disk: &Disk, volume: Uuid) -> Streams {
    let mut streams = Streams::new();
    for (segment, entry) in disk.segments_of(volume) {
        let Some(kind) = StreamKind::from_byte(entry.kind) else { continue };
        streams.entry((entry.log_seq.get(), entry.log_id.get(), kind)).or_default().push(segment);
    }
    for list in streams.values_mut() {
        list.sort_unstable_by_key(|s| s.number);
    }
    streams
}

/// The control state, folded.
struct Control {
    settings: ControlSettings,
    logs: BTreeMap<u64, ControlLog>,
    markers: Vec<Marker>,
    sizes: Vec<(Instant, u64)>,
    hints: Vec<(u64, u64, u64, Instant)>,
    reverts: BTreeMap<u64, ControlRevert>,
    flushes: Vec<(Instant, bool)>,
    /// The newest log ends with a revert: the next one begins at its instant.
    reverted_at: Option<Instant>,
}

fn base_last_instant(control: &Control) -> u64 {
    control.markers.iter().map(|m| m.time.0).chain(control.sizes.iter().map(|s| s.0.0)).max().unwrap_or(0)
}

/// Folds the records of the newest log: the carry, then what changed since. Reverts of `undecided` groups do not count.
fn fold(side: &[Descriptor], base_seq: u64, place: &str, undecided: &[Uuid]) -> Result<Control> {
    let bad = || Error::Damaged { what: "control record", place: place.to_owned() };
    let mut settings: Option<ControlSettings> = None;
    // As they were before the newest ones: a revert comes behind settings that say who is held for it.
    let mut settings_before: Option<ControlSettings> = None;
    let mut named = HashMap::new();
    let mut control = Control {
        settings: frame::body(&[0; size_of::<ControlSettings>()], place)?,
        logs: BTreeMap::new(),
        markers: Vec::new(),
        sizes: Vec::new(),
        hints: Vec::new(),
        reverts: BTreeMap::new(),
        flushes: Vec::new(),
        reverted_at: None,
    };
    for descriptor in side {
        match descriptor.kind {
            DescriptorKind::Marker => {
                let marker = descriptor.marker().ok_or_else(bad)?;
                // A name comes again only where the first of that name went with its history: the last one counts.
                match named.get(&marker.name) {
                    Some(at) => control.markers[*at] = marker,
                    None => {
                        named.insert(marker.name.clone(), control.markers.len());
                        control.markers.push(marker);
                    }
                }
            }
            DescriptorKind::Size => control.sizes.push((descriptor.instant(), descriptor.header.start.get())),
            DescriptorKind::FlushPoint => {
                control.flushes.push((descriptor.instant(), descriptor.header.count.get() == 1))
            }
            DescriptorKind::Discard => {
                let cut = frame::cut(descriptor.header.start.get(), descriptor.header.count.get());
                control.hints.push((base_seq, cut.whole.0, cut.whole.1, descriptor.instant()));
            }
            DescriptorKind::Revert
                if undecided.iter().any(|group| descriptor.extra.starts_with(group.as_bytes()))
                    && !active(Mutation::UndecidedCounts) =>
            {
                // Settings that hold somebody, right before a revert, came with it.
                if let (Some(settings), Some(before)) = (settings.as_mut().filter(|s| s.held == 1), settings_before) {
                    settings.held = before.held;
                }
            }
            DescriptorKind::Revert => {
                let target = Instant(descriptor.header.start.get());
                control.hints.retain(|(_, _, _, instant)| *instant <= target);
                let row = ControlRevert {
                    log_seq: base_seq.into(),
                    instant: descriptor.header.instant,
                    target: descriptor.header.start,
                    blocks: descriptor.header.count,
                    next_block: 0.into(),
                    blocks_done: 0.into(),
                };
                control.reverts.insert(base_seq, row);
                control.reverted_at = Some(descriptor.instant());
            }
            DescriptorKind::Control => match ControlKind::from_byte(descriptor.header.sub).ok_or_else(bad)? {
                ControlKind::Settings => {
                    settings_before = settings.replace(frame::body::<ControlSettings>(&descriptor.extra, place)?);
                }
                ControlKind::Log => {
                    let row = frame::body::<ControlLog>(&descriptor.extra, place)?;
                    if row.flags.get() & !log_flags::KNOWN != 0 {
                        return Err(bad());
                    }
                    control.logs.insert(row.seq.get(), row);
                }
                ControlKind::LogGone => {
                    control.logs.remove(&descriptor.header.start.get());
                }
                ControlKind::Hint => {
                    let seq = descriptor.extra.as_slice().try_into().map(u64::from_le_bytes).map_err(|_| bad())?;
                    let (block, count) = (descriptor.header.start.get(), descriptor.header.count.get());
                    control.hints.push((seq, block, count, descriptor.instant()));
                }
                ControlKind::Revert => {
                    let row = frame::body::<ControlRevert>(&descriptor.extra, place)?;
                    control.reverts.insert(row.log_seq.get(), row);
                }
                ControlKind::End => {}
            },
            _ => {}
        }
    }
    control.settings = settings.ok_or_else(bad)?;
    Ok(control)
}

/// What a scan of one stream found.
#[derive(Default)]
struct Scan {
    /// Segments in use, in order.
    segments: Vec<SegmentRef>,
    /// Segments behind a cut, and such that were never written.
    dead: Vec<SegmentRef>,
    /// Indexes of full segments.
    runs: Vec<format::RunRoot>,
    /// Entries of the others.
    entries: Vec<IndexEntry>,
    /// Descriptors that are no data.
    side: Vec<Descriptor>,
    frame_next: u64,
    previous_crc: u32,
    number_next: u32,
    instant_last: Instant,
    watermark: Instant,
    /// A frame that must be there is not.
    hole: Option<String>,
    /// Frames of the log's other stream below this were durable.
    claim_other: u64,
}

/// Calls `f` for every entry that a scan found. Answers a filter for each run.
async fn for_each_entry(
    disk: &Rc<Disk>,
    log_id: u64,
    kind: StreamKind,
    scan: &Scan,
    mut f: impl FnMut(&IndexEntry),
) -> Result<Vec<Filter>> {
    let mut filters = Vec::with_capacity(scan.runs.len());
    for root in &scan.runs {
        let mut filter = Filter::new(root.entries.get());
        let run = Run { root: *root, log_id, kind };
        run.for_each(&**disk, |entry| {
            f(entry);
            filter.insert(entry);
        })
        .await?;
        filters.push(filter);
    }
    scan.entries.iter().for_each(f);
    Ok(filters)
}

/// Scans one stream of a log.
async fn scan_stream(
    disk: &Rc<Disk>,
    volume: Uuid,
    seq: u64,
    id: u64,
    kind: StreamKind,
    segments: Vec<SegmentRef>,
) -> Result<Scan> {
    let mut scan = Scan { number_next: segments.last().map_or(0, |s| s.number + 1), ..Scan::default() };
    // Headers first: each says where the frames of the segment before it end.
    let mut headers: Vec<Option<SegmentHeader>> = Vec::with_capacity(segments.len());
    for s in &segments {
        headers.push(read_header(disk, volume, (seq, id, kind), *s).await?);
    }
    // What later frames say of what was durable: a footer is believed only below that.
    let mut durable_frames = 0;
    for (s, header) in segments.iter().zip(&headers).rev().take(2) {
        // Frames name their log and their place themselves: a damaged header hides nothing, nor does a first frame that went with it.
        if header.is_some() || has_frames(disk, *s, id).await? {
            let (own, other) = durable_claim(disk, *s, id).await?;
            durable_frames = durable_frames.max(own);
            scan.claim_other = scan.claim_other.max(other);
        }
    }
    let segment_blocks = (disk.geometry.segment_size / BLOCK) as u32;
    let mut cut = false;
    for (i, (s, header)) in segments.iter().zip(&headers).enumerate() {
        let fits = header.as_ref().filter(|h| {
            !cut && h.frame_first.get() == scan.frame_next
                && (scan.frame_next == 0 || h.previous_crc.get() == scan.previous_crc)
        });
        let Some(header) = fits else {
            cut = true;
            scan.dead.push(*s);
            continue;
        };
        if scan.frame_next == 0 {
            scan.previous_crc = header.previous_crc.get();
        }
        scan.segments.push(*s);
        // Frames at or past the next valid segment's first were cut off.
        let limit =
            headers[i + 1..].iter().flatten().map(|h| h.frame_first.get()).find(|f| *f >= header.frame_first.get());
        // Once a segment had to be walked its entries are in memory, and what is in memory counts as newer than every run: the rest is walked, too.
        if scan.entries.is_empty()
            && let Some((footer, side)) = read_footer(disk, *s, id, segment_blocks).await?
            && footer.frame_next.get() <= durable_frames
            && limit.is_none_or(|l| l == footer.frame_next.get())
            // The frames are durable; the footer's pages, which are derived from them, need not be.
            && whole_run(disk, id, kind, footer.root).await
        {
            scan.runs.push(footer.root);
            scan.side.extend(side);
            scan.frame_next = footer.frame_next.get();
            scan.previous_crc = footer.last_crc.get();
            scan.instant_last = scan.instant_last.max(Instant(footer.instant_last.get()));
            scan.watermark = scan.watermark.max(Instant(footer.watermark.get()));
            continue;
        }
        let ended = walk_frames(disk, *s, id, limit, &mut scan).await?;
        if !ended && limit.is_some_and(|l| l != scan.frame_next) {
            // The next segment goes on from a frame that is not here.
            cut = true;
        }
    }
    if durable_frames > scan.frame_next {
        let last = scan.segments.last().map_or(0, |s| s.segment);
        scan.hole = Some(format!("{} log {seq} {kind:?} frame {} (segment {last})", disk.path, scan.frame_next));
    }
    Ok(scan)
}

/// The header of a segment; `None` where it is not what the table says of the segment: nothing of this life is written yet, or it is damaged.
pub(super) async fn read_header(
    disk: &Disk,
    volume: Uuid,
    (seq, id, kind): (u64, u64, StreamKind),
    s: SegmentRef,
) -> Result<Option<SegmentHeader>> {
    let bytes = disk.read(s.segment, 0, 1).await?;
    Ok(format::open_block::<SegmentHeader>(&bytes, &SegmentHeader::MAGIC, 8).filter(|h| {
        h.version.get() == format::VERSION
            && h.disk_id == *disk.id.as_bytes()
            && h.volume_id == *volume.as_bytes()
            && h.log_id.get() == id
            && h.log_seq.get() == seq
            && h.segment.get() == s.segment
            && h.number.get() == s.number
            && h.lap.get() == s.lap
            && h.kind == kind as u8
    }))
}

/// Whether a frame of this log begins where the first or the second frame of a segment may: the first one is one write with the segment's header, and
/// may have been lost with it.
async fn has_frames(disk: &Rc<Disk>, s: SegmentRef, log_id: u64) -> Result<bool> {
    let segment_size = disk.geometry.segment_size;
    let end = (second_frame_at_most(segment_size) + 1).min((segment_size / BLOCK) as u32);
    let bytes = match disk.read(s.segment, 1, end - 1).await {
        Err(Error::Device { .. }) => {
            // Where a block cannot be read, the others tell.
            for block in 1..end {
                match disk.read(s.segment, block, 1).await {
                    Ok(bytes) if frame::peek_frame(&bytes, log_id, s, block).is_some() => return Ok(true),
                    Ok(_) | Err(Error::Device { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            return Ok(false);
        }
        read => read?,
    };
    Ok((1..end)
        .zip(bytes.chunks(BLOCK as usize))
        .any(|(block, bytes)| frame::peek_frame(bytes, log_id, s, block).is_some()))
}

/// The highest `durable_frames` and `durable_frames_other` that any whole frame header of a segment claims.
async fn durable_claim(disk: &Rc<Disk>, s: SegmentRef, log_id: u64) -> Result<(u64, u64)> {
    let segment_blocks = (disk.geometry.segment_size / BLOCK) as u32;
    let mut claim = (0, 0);
    let mut block = 1;
    while block < segment_blocks {
        let mut n = WINDOW_BLOCKS.min(segment_blocks - block);
        let bytes = match disk.read(s.segment, block, n).await {
            Err(Error::Device { .. }) => {
                // Past a block that cannot be read the claims of others are found.
                n = u32::from(FrameHeader::HEADER_BLOCKS_MAX).min(segment_blocks - block);
                match disk.read(s.segment, block, n).await {
                    Err(Error::Device { .. }) => {
                        block += 1;
                        continue;
                    }
                    read => read?,
                }
            }
            read => read?,
        };
        let mut at = 0;
        while at < n {
            let here = &bytes[(at * BLOCK as u32) as usize..];
            let Some(header) = frame::peek_frame(here, log_id, s, block + at) else {
                at += 1;
                continue;
            };
            let head_blocks = u32::from(header.header_blocks.get());
            if at + head_blocks > n {
                if at == 0 {
                    at += 1;
                    continue;
                }
                break;
            }
            match frame::parse_frame(here, header) {
                Some(parsed) => {
                    claim.0 = claim.0.max(parsed.header.durable_frames.get());
                    claim.1 = claim.1.max(parsed.header.durable_frames_other.get());
                    at += head_blocks + header.payload_blocks.get();
                }
                None => at += 1,
            }
        }
        // A frame whose header lies across the window's end is looked at again from its start.
        block += at.max(1);
        yield_now().await;
    }
    Ok(claim)
}

/// Walks the frames of a segment along the chain, payloads verified. Answers whether it ended at `limit`.
async fn walk_frames(disk: &Rc<Disk>, s: SegmentRef, log_id: u64, limit: Option<u64>, scan: &mut Scan) -> Result<bool> {
    let segment_blocks = (disk.geometry.segment_size / BLOCK) as u32;
    let mut window = Window { disk: Rc::clone(disk), segment: s.segment, start: 0, bytes: IoBuf::zeroed(0) };
    let mut block = 1;
    while block < segment_blocks {
        if limit == Some(scan.frame_next) {
            return Ok(true);
        }
        let head = window.get(block, 1, segment_blocks).await?;
        let Some(header) = frame::peek_frame(head, log_id, s, block) else { return Ok(false) };
        let header_blocks = u32::from(header.header_blocks.get());
        let total = header_blocks + header.payload_blocks.get();
        if block + total > segment_blocks
            || header.number.get() != scan.frame_next
            || (header.previous_crc.get() != scan.previous_crc && !active(Mutation::ChainUnchecked))
        {
            return Ok(false);
        }
        let bytes = window.get(block, total, segment_blocks).await?;
        let Some(parsed) = verified(bytes, header) else { return Ok(false) };
        take_frame(parsed, s.segment, block, scan);
        block += total;
        yield_now().await;
    }
    Ok(limit == Some(scan.frame_next))
}

/// Parses a frame and checks each of its payload blocks.
fn verified(bytes: &[u8], header: FrameHeader) -> Option<ParsedFrame> {
    let parsed = frame::parse_frame(bytes, header)?;
    let payload_at = usize::from(header.header_blocks.get()) * BLOCK as usize;
    for descriptor in &parsed.descriptors {
        if descriptor.header.payload_blocks.get() == 0 {
            continue;
        }
        for (i, sum) in descriptor.sums().enumerate() {
            let at = payload_at + (descriptor.header.payload_block.get() as usize + i) * BLOCK as usize;
            if crc(bytes.get(at..at + BLOCK as usize)?) != sum && !active(Mutation::TornTailAccepted) {
                return None;
            }
        }
    }
    Some(parsed)
}

fn take_frame(parsed: ParsedFrame, segment: u32, block: u32, scan: &mut Scan) {
    let header = parsed.header;
    let payload_at = block + u32::from(header.header_blocks.get());
    scan.frame_next = header.number.get() + 1;
    scan.previous_crc = header.crc.get();
    scan.instant_last = scan.instant_last.max(Instant(header.instant_last.get()));
    scan.watermark = scan.watermark.max(Instant(header.watermark.get()));
    for descriptor in parsed.descriptors {
        let (start, count, instant) =
            (descriptor.header.start.get(), descriptor.header.count.get(), descriptor.instant());
        let page = |i: usize| (payload_at + descriptor.header.payload_block.get() + i as u32) as u16;
        match descriptor.kind {
            DescriptorKind::Write => {
                let sums: Vec<u32> = descriptor.sums().collect();
                let first = start / SECTORS_PER_BLOCK;
                frame::for_each_block(start, count, |b, mask| {
                    let i = (b - first) as usize;
                    scan.entries.push(IndexEntry::write(b, instant, segment, page(i), mask, sums[i]));
                });
            }
            DescriptorKind::Zero => {
                let cut = frame::cut(start, count);
                for (b, mask) in cut.partial.into_iter().flatten() {
                    scan.entries.push(IndexEntry::zero(b, instant, mask));
                }
                crate::index::split_extent(cut.whole.0, cut.whole.1, |level, b| {
                    scan.entries.push(IndexEntry::extent(EntryKind::Zero, level, b, instant));
                });
            }
            DescriptorKind::BeforeData => {
                for (i, sum) in descriptor.sums().enumerate() {
                    scan.entries.push(IndexEntry::before_data(start + i as u64, segment, page(i), sum));
                }
            }
            DescriptorKind::BeforeZero | DescriptorKind::BeforeUnreadable => {
                let kind = if descriptor.kind == DescriptorKind::BeforeZero {
                    EntryKind::BeforeZero
                } else {
                    EntryKind::BeforeUnreadable
                };
                crate::index::split_extent(start, count, |level, b| {
                    scan.entries.push(IndexEntry::extent(kind, level, b, Instant::ZERO));
                });
            }
            DescriptorKind::Index => {}
            _ => scan.side.push(descriptor),
        }
    }
}

/// Notes the blocks of an entry; false when they lie past `end`: so much memory is not there for what cannot be.
fn touch(touched: &mut Touched, entry: &IndexEntry, end: u64) -> bool {
    let inside = entry.block.get().checked_add(entry.blocks()).is_some_and(|last| last <= end);
    if inside {
        touched.insert_range(entry.block.get(), entry.blocks());
    }
    inside
}

/// Whether every page of a run can be read.
async fn whole_run(disk: &Rc<Disk>, log_id: u64, kind: StreamKind, root: format::RunRoot) -> bool {
    if root.entries.get() == 0 {
        return true;
    }
    let mut cursor = Run { root, log_id, kind }.cursor(Key::default());
    loop {
        match cursor.next_page(&**disk).await {
            Ok(Some(_)) => yield_now().await,
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// The footer of a full segment, with its copy of descriptors.
pub(super) async fn read_footer(
    disk: &Rc<Disk>,
    s: SegmentRef,
    log_id: u64,
    segment_blocks: u32,
) -> Result<Option<(SegmentFooter, Vec<Descriptor>)>> {
    let bytes = disk.read(s.segment, segment_blocks - 1, 1).await?;
    let footer = format::open_block::<SegmentFooter>(&bytes, &SegmentFooter::MAGIC, 8).filter(|f| {
        f.version.get() == format::VERSION
            && f.log_id.get() == log_id
            && f.lap.get() == s.lap
            && f.segment.get() == s.segment
    });
    let Some(footer) = footer else { return Ok(None) };
    let len = footer.descriptor_bytes.get();
    let blocks = len.div_ceil(BLOCK as u32);
    let Some(end) = footer.descriptors_at.get().checked_add(blocks).filter(|end| *end < segment_blocks) else {
        return Ok(None);
    };
    let _ = end;
    if blocks == 0 {
        return Ok(Some((footer, Vec::new())));
    }
    let bytes = disk.read(s.segment, footer.descriptors_at.get(), blocks).await?;
    let bytes = &bytes[..len as usize];
    if crc(bytes) != footer.descriptor_crc.get() {
        return Ok(None);
    }
    Ok(frame::parse_descriptors(bytes, 0).map(|side| (footer, side)))
}

/// A read-ahead over a segment.
struct Window {
    disk: Rc<Disk>,
    segment: u32,
    start: u32,
    bytes: IoBuf,
}

impl Window {
    async fn get(&mut self, block: u32, blocks: u32, segment_blocks: u32) -> Result<&[u8]> {
        let have = self.start + (self.bytes.len() as u64 / BLOCK) as u32;
        if block < self.start || block + blocks > have || self.bytes.is_empty() {
            let n = blocks.max(WINDOW_BLOCKS).min(segment_blocks - block);
            self.bytes = match self.disk.read(self.segment, block, n).await {
                // A bad sector further on is not this reader's.
                Err(Error::Device { .. }) if n > blocks => self.disk.read(self.segment, block, blocks).await?,
                read => read?,
            };
            self.start = block;
        }
        let at = ((block - self.start) as u64 * BLOCK) as usize;
        Ok(&self.bytes[at..at + (u64::from(blocks) * BLOCK) as usize])
    }
}

/// What recovery does with the bytes of a frame, without a disk: for the fuzzers. Answers whether the frame and its payload are whole.
#[cfg(feature = "fuzzing")]
pub(crate) fn read_frame(bytes: &[u8], header: FrameHeader) -> bool {
    let Some(parsed) = verified(bytes, header) else { return false };
    let mut scan = Scan::default();
    take_frame(parsed, header.segment.get(), header.block.get(), &mut scan);
    let mut touched = Touched::default();
    for entry in &scan.entries {
        // A volume of 16 TiB.
        touch(&mut touched, entry, 1 << 32);
    }
    // A damaged record is an error; whatever else it says is taken as it is.
    let _ = fold(&scan.side, 0, "frame", &[]);
    true
}
