//! How history grows and shrinks: logs begin, close, thin out and leave; markers; the user's switch; reverts; what can be viewed.

use std::rc::Rc;

use futures::future::{Either, select};
use zerocopy::IntoBytes;

use super::{Attach, DRAIN_PATIENCE_NS, Held, Mode, State, Ticket, Volume, write::done_ticket};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::fence::{Fence, FenceState};
use crate::format::{ControlKind, ControlRevert, ControlSettings, EntryKind, StreamKind};
use crate::index::Touched;
use crate::info::{EventKind, Health, Interval, LogInfo, Marker, MarkerKind, Priority, Settings, TimelineBucket};
use crate::log::{Log, usable_bytes};
use crate::mutation::{Mutation, active};
use crate::types::Instant;

/// Fewest segments of a `reserve_capacity`: eight logs of four.
pub(crate) const CAPACITY_SEGMENTS_MIN: u64 = 32;
/// Most markers of a volume, those that may be thinned out aside.
const MARKERS_MAX: usize = 16384;
/// Most markers of a volume that the agent set by itself: beyond them, every second one of the older half goes. At one a minute that is every minute of the newest day,
/// every second minute of the day before, and so on.
const AUTO_MARKERS_MAX: usize = 4096;
/// Most bytes of a marker's name.
const MARKER_NAME_MAX: usize = 255;
/// Time between two rounds of the caretaker, nanoseconds.
const ROUND_NS: u64 = 250_000_000;
/// A volume without writes for this long is idle, nanoseconds.
const IDLE_NS: u64 = 1_000_000_000;

/// Why a log was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum CloseReason {
    Rotation = 0,
    Switched = 1,
    Reverted = 2,
    Restarted = 3,
    Cleaned = 5,
}

impl Volume {
    // -- logs ----------------------------------------------------------------------------------------------------------

    /// Closes the active log, if there is one, and starts the next at `instant`. All of the volume's control state is carried into its first frames.
    pub(crate) fn rotate(self: &Rc<Self>, state: &mut State, instant: Instant, recording: bool, reason: CloseReason) {
        let Some(attach) = state.attach.clone() else { return };
        if let Some(active) = state.logs.back() {
            let mut active = active.state.borrow_mut();
            // Recovery finds it closed, by a revert perhaps.
            if !std::mem::replace(&mut active.closed, true) {
                active.close_reason = reason as u32;
            }
        }
        if let Some(last) = state.open.back_mut() {
            last.urgent = true;
        }
        let seq = state.next_seq;
        state.next_seq += 1;
        let (id, disk, index_bytes) = (self.host.random_u64(), Rc::clone(&attach.disk), Rc::clone(&self.index_bytes));
        let log = Log::new(seq, id, instant, self.id, disk, recording, index_bytes);
        state.logs.push_back(Rc::clone(&log));
        state.instant_last = state.instant_last.max(instant);
        self.carry(state, &log);
        if recording {
            self.add_marker(state, &auto_name(instant), MarkerKind::Crash, instant, true);
        }
        self.kick.notify();
        self.work.notify();
    }

    /// Rotates with an instant taken in the same step, so that no write of the old log is newer than the new log's start. Answers the ticket of the
    /// new log's first frames.
    pub(super) async fn rotate_now(
        self: &Rc<Self>,
        reason: CloseReason,
        set: impl Fn(&mut State),
    ) -> Result<Rc<Ticket>> {
        let engine = self.engine()?;
        loop {
            {
                let mut state = self.state.borrow_mut();
                if state.mode != Mode::Journal {
                    return Err(Error::Gone(format!(
                        "volume {:?} left the journal meanwhile: {}",
                        state.name, state.health_reason
                    )));
                }
                if let Some(instant) = engine.try_tick() {
                    set(&mut state);
                    let recording = state.on;
                    self.rotate(&mut state, instant, recording, reason);
                    return Ok(state.open.back().map_or_else(done_ticket, |f| Rc::clone(&f.ticket)));
                }
            }
            engine.raise_clock().await?;
        }
    }

    /// Writes all control state into the open frames of a new log.
    fn carry(&self, state: &mut State, log: &Rc<Log>) {
        let settings = Self::settings_row(state);
        let push = |state: &mut State, kind: ControlKind, instant: Instant, start: u64, count: u64, body: &[u8]| {
            self.open_frame(state, log, 0, true).builder.push_control(kind, instant, start, count, body);
        };
        push(state, ControlKind::Settings, Instant::ZERO, 0, 0, settings.as_bytes());
        let logs: Vec<_> = state.logs.iter().cloned().collect();
        for old in &logs {
            push(state, ControlKind::Log, Instant::ZERO, old.seq, 0, old.row().as_bytes());
            let hints: Vec<_> = old.state.borrow().hints.iter().collect();
            for (block, count, instant) in hints {
                push(state, ControlKind::Hint, instant, block, count, &old.seq.to_le_bytes());
            }
            if let Some(row) = Self::revert_row(old) {
                push(state, ControlKind::Revert, Instant::ZERO, old.seq, 0, row.as_bytes());
            }
        }
        for (instant, bytes) in state.sizes.clone() {
            self.open_frame(state, log, 0, true).builder.push_size(instant, bytes);
        }
        for marker in state.markers.values().cloned().collect::<Vec<_>>() {
            self.open_frame(state, log, 0, true).builder.push_marker(&marker);
        }
        push(state, ControlKind::End, log.start, log.seq, 0, &[]);
    }

    pub(super) fn settings_row(state: &State) -> ControlSettings {
        let settings =
            state.settings.unwrap_or(Settings { reserve_capacity: 0, reserve_duration_s: 0, priority: Priority::Mid });
        ControlSettings {
            reserve_capacity: settings.reserve_capacity.into(),
            reserve_duration_s: settings.reserve_duration_s.into(),
            created_ns: state.created_ns.into(),
            generation: state.generation.into(),
            size: state.size.into(),
            next_seq: state.next_seq.into(),
            priority: settings.priority as u8,
            on: u8::from(state.on),
            // Of a revert that may still be refused nothing is told yet.
            held: u8::from(state.told_held()),
            reserved: [0; 13],
        }
    }

    fn revert_row(log: &Log) -> Option<ControlRevert> {
        log.state.borrow().revert.as_ref().map(|r| ControlRevert {
            log_seq: log.seq.into(),
            instant: r.instant.0.into(),
            target: r.target.0.into(),
            blocks: r.total.into(),
            next_block: r.next_block.into(),
            blocks_done: r.done.into(),
        })
    }

    /// Appends a control record to the active log; `urgent`: at once. Answers the ticket of its frame.
    pub(crate) fn control(
        self: &Rc<Self>,
        kind: ControlKind,
        instant: Instant,
        start: u64,
        count: u64,
        body: &[u8],
        urgent: bool,
    ) -> Rc<Ticket> {
        let mut state = self.state.borrow_mut();
        let Some(log) = state.logs.back().cloned() else { return done_ticket() };
        if state.attach.is_none() {
            // The appender has left: what is not recorded must not be acted upon.
            let ticket = Ticket::default();
            ticket.finish(Err(Error::Gone("the volume has left the journal".into())));
            return Rc::new(ticket);
        }
        let frame = self.open_frame(&mut state, &log, 0, urgent);
        frame.builder.push_control(kind, instant, start, count, body);
        let ticket = Rc::clone(&frame.ticket);
        drop(state);
        self.kick.notify();
        ticket
    }

    pub(super) fn store_settings(self: &Rc<Self>) -> Rc<Ticket> {
        let row = Self::settings_row(&self.state.borrow());
        self.control(ControlKind::Settings, Instant::ZERO, 0, 0, row.as_bytes(), true)
    }

    /// Waits for a control record and makes it durable.
    pub(super) async fn durable(self: &Rc<Self>, ticket: &Ticket) -> Result<()> {
        // Of now: whoever leaves a failed disk answers all who wait, and what they wait for is recorded nowhere.
        let disk = self.state.borrow().attach.as_ref().map(|a| Rc::clone(&a.disk));
        ticket.wait().await?;
        let Some(disk) = disk else { return Ok(()) };
        disk.check()?;
        // Where it was left in order since, there is nothing to make durable any more, and what was begun elsewhere is not its.
        if !self.state.borrow().attach.as_ref().is_some_and(|a| Rc::ptr_eq(&a.disk, &disk)) {
            return Ok(());
        }
        self.sync_completed(&disk).await
    }

    // -- markers -------------------------------------------------------------------------------------------------------

    /// Adds a marker for an instant taken from the host's clock. An empty name makes an automatic one, whose name tells the second, and the nanosecond
    /// too where the second is taken.
    pub async fn mark(self: &Rc<Self>, name: &str, kind: MarkerKind, instant: Instant) -> Result<Marker> {
        if !name.is_empty() {
            return self.mark_as(name, kind, instant, false).await;
        }
        let mut names = auto_names(instant).into_iter();
        let first = names.next().unwrap_or_default();
        match self.mark_as(&first, kind, instant, true).await {
            Err(Error::Exists { .. }) => self.mark_as(&names.next().unwrap_or_default(), kind, instant, true).await,
            marked => marked,
        }
    }

    /// Adds a marker of a given name, which may be one of [`auto_names`] with `auto`.
    pub async fn mark_as(
        self: &Rc<Self>,
        name: &str,
        kind: MarkerKind,
        instant: Instant,
        auto: bool,
    ) -> Result<Marker> {
        self.serving()?;
        if name.is_empty() {
            return Err(Error::invalid("name", "\"\"", "1 byte or more"));
        }
        if name.len() > MARKER_NAME_MAX {
            return Err(Error::invalid(
                "name",
                format!("{} bytes", name.len()),
                format!("at most {MARKER_NAME_MAX} bytes"),
            ));
        }
        if name.chars().any(char::is_control) {
            return Err(Error::invalid("name", format!("{name:?}"), "no control characters"));
        }
        if name.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Error::invalid("name", name, "not digits alone: those are read as an instant"));
        }
        self.until_not_reverting().await;
        let (marker, ticket) = {
            let mut state = self.state.borrow_mut();
            if state.mode != Mode::Journal || !state.on {
                return Err(Error::State(format!("volume {:?} is not protected: `enable` it first", state.name)));
            }
            if !thinned(auto, kind)
                && state.markers.values().filter(|m| !thinned(m.auto, m.kind)).count() >= MARKERS_MAX
            {
                return Err(Error::NoSpace { what: "markers of a volume", needed: 1, free: 0 });
            }
            if let Some(found) = state.markers.values().find(|m| m.name == name) {
                if found.time == instant {
                    return Ok(found.clone());
                }
                return Err(Error::Exists { what: "marker", name: name.to_owned() });
            }
            let marker = self
                .add_marker(&mut state, name, kind, instant, auto)
                .ok_or_else(|| Error::Exists { what: "marker", name: name.to_owned() })?;
            let ticket = state.open.back_mut().map(|frame| {
                frame.urgent = true;
                Rc::clone(&frame.ticket)
            });
            (marker, ticket)
        };
        self.kick.notify();
        if let Some(ticket) = ticket.filter(|_| !active(Mutation::MarkNotDurable)) {
            self.durable(&ticket).await?;
        }
        if !marker.auto {
            self.event(EventKind::Marked, format!("marker {:?} at {}", marker.name, marker.time));
        }
        Ok(marker)
    }

    /// Adds a marker to the open frame; a name that is taken is left alone.
    fn add_marker(
        &self,
        state: &mut State,
        name: &str,
        kind: MarkerKind,
        instant: Instant,
        auto: bool,
    ) -> Option<Marker> {
        if state.markers.values().rev().take(4).any(|m| m.name == name)
            || (!auto && state.markers.values().any(|m| m.name == name))
        {
            return None;
        }
        let log = state.logs.back().cloned()?;
        // Nothing was admitted since a flush that left nothing in flight: the file system is as after a sync.
        let flushed =
            !state.wrote_since_flush && state.flushes.back().is_some_and(|(at, clean)| *clean && *at <= instant);
        let kind = if kind == MarkerKind::Crash && flushed { MarkerKind::Flush } else { kind };
        let marker = Marker { name: name.to_owned(), time: instant, kind, auto };
        self.open_frame(state, &log, 0, false).builder.push_marker(&marker);
        state.markers.insert((instant, name.to_owned()), marker.clone());
        Self::thin_markers(state);
        if auto {
            state.marker_last = instant;
            state.wrote_since_marker = false;
        }
        Some(marker)
    }

    /// Keeps automatic markers to [`AUTO_MARKERS_MAX`], the newest of them all, older ones ever farther apart: each is in memory, in every answer of `info` and in the
    /// carry of each log. Nothing is recorded: the next carry lacks them, and until then recovery thins what it finds in the same way.
    pub(super) fn thin_markers(state: &mut State) {
        while state.markers.len() > AUTO_MARKERS_MAX {
            let auto: Vec<_> =
                state.markers.iter().filter(|(_, m)| thinned(m.auto, m.kind)).map(|(key, _)| key.clone()).collect();
            if auto.len() <= AUTO_MARKERS_MAX {
                break;
            }
            for key in auto[..auto.len() / 2].iter().skip(1).step_by(2) {
                state.markers.remove(key);
            }
        }
    }

    /// Markers whose instants cannot be viewed any more go.
    pub(super) fn prune_markers(state: &mut State) {
        let coverage = Self::coverage(state);
        state.markers.retain(|(instant, _), _| covered(&coverage, *instant));
    }

    // -- what can be viewed --------------------------------------------------------------------------------------------

    /// The intervals of history that can be viewed.
    pub(crate) fn coverage(state: &State) -> Vec<Interval> {
        let mut out: Vec<Interval> = Vec::new();
        let mut reaches = false;
        for (i, log) in state.logs.iter().enumerate() {
            let inner = log.state.borrow();
            let next = state.logs.get(i + 1);
            let end = next.map(|n| n.start.before());
            let reason = match next {
                None => "",
                Some(next) if !next.state.borrow().recording => "protection was switched off",
                Some(_) => "",
            };
            if (inner.recording && !inner.thin) || active(Mutation::DisabledSpanCovered) {
                match out.last_mut() {
                    Some(last) if reaches => {
                        last.end = end;
                        last.end_reason = reason.into();
                    }
                    _ => out.push(Interval { start: log.start, end, end_reason: reason.into() }),
                }
                reaches = true;
            } else if inner.recording {
                // Thin: only its start is left.
                match out.last_mut() {
                    Some(last) if reaches => {
                        last.end = Some(log.start);
                        last.end_reason = "the log after it was cleaned".into();
                    }
                    _ => out.push(Interval {
                        start: log.start,
                        end: Some(log.start),
                        end_reason: "the rest of the log was cleaned".into(),
                    }),
                }
                reaches = false;
            } else {
                reaches = false;
            }
        }
        out
    }

    /// The log in which an instant lies, if it can be viewed.
    pub(crate) fn viewable(&self, instant: Instant, now: Instant) -> Result<Rc<Log>> {
        let state = self.state.borrow();
        let coverage = Self::coverage(&state);
        if instant <= now && covered(&coverage, instant) {
            let log = state.logs.iter().rev().find(|l| l.start <= instant);
            if let Some(log) = log {
                return Ok(Rc::clone(log));
            }
        }
        let mut text: Vec<String> = coverage
            .iter()
            .map(|i| match i.end {
                Some(end) => format!("{} to {end}", i.start),
                None => format!("{} to now ({now})", i.start),
            })
            .collect();
        if text.is_empty() {
            text.push("there is none".into());
        }
        Err(Error::OutOfCoverage { instant, coverage: text.join(", ") })
    }

    pub(crate) fn log_infos(&self, state: &State) -> Vec<LogInfo> {
        let capacity_bytes = state.attach.as_ref().map_or(0, |a| a.capacity_bytes() / 8);
        state
            .logs
            .iter()
            .enumerate()
            .map(|(i, log)| {
                let inner = log.state.borrow();
                let size = log.disk.geometry.segment_size;
                LogInfo {
                    seq: log.seq,
                    start: log.start,
                    end: state.logs.get(i + 1).map(|n| n.start.before()),
                    use_bytes: (inner.writes.segment_count() + inner.before.segment_count()) * size,
                    capacity_bytes,
                    io_start: inner.io_start,
                    io_last: inner.io_last,
                    thin: inner.thin,
                    recording: inner.recording,
                    sealed: inner.sealed,
                    online: log.disk.failure().is_none(),
                    disk_path: log.disk.path.clone(),
                    before_image_bytes: inner.before.segment_count() * size,
                }
            })
            .collect()
    }

    /// Seconds of history that the capacity holds at the rate so far.
    pub(crate) fn window_forecast(state: &State, now_ns: u64) -> u64 {
        let (Some(attach), Some(first)) = (&state.attach, state.logs.front()) else { return 0 };
        let used = Self::used_segments(state);
        let span = now_ns.saturating_sub(first.start.0) / 1_000_000_000;
        if used < 8 || span == 0 {
            return 0;
        }
        (u128::from(span) * u128::from(attach.capacity) / u128::from(used)) as u64
    }

    // -- eviction ------------------------------------------------------------------------------------------------------

    /// Whether a revert, pending or being made, needs the log at a position.
    fn pinned(state: &State, position: usize) -> bool {
        let end = state.logs.get(position + 1).map_or(Instant::MAX, |n| n.start);
        state.reverting.as_ref().is_some_and(|r| r.target() < end)
            || state.logs.iter().any(|l| l.state.borrow().revert.as_ref().is_some_and(|r| r.target < end))
    }

    pub(super) fn oldest_can_go(state: &State) -> bool {
        state.logs.len() > 1 && state.logs.front().is_some_and(|l| l.state.borrow().sealed) && !Self::pinned(state, 0)
    }

    /// Evicts the oldest log to make room, if it can go.
    pub(crate) fn evict_for_capacity(self: &Rc<Self>, state: &mut State) {
        if !state.leaving.is_empty() || !Self::oldest_can_go(state) {
            return;
        }
        let log = Rc::clone(state.logs.front().expect("just seen"));
        let next_start = state.logs[1].start;
        let duration_ns = state.settings.map_or(0, |s| s.reserve_duration_s.saturating_mul(1_000_000_000));
        let recording = log.state.borrow().recording;
        let now = self.engine.upgrade().map_or(0, |e| e.age_now_ns());
        if recording && now.saturating_sub(next_start.0) < duration_ns {
            self.event_later(
                EventKind::EvictedEarly,
                format!("log {} went for capacity, ahead of reserve_duration", log.seq),
            );
        }
        self.stats.borrow_mut().evicted_capacity += 1;
        self.evict_oldest(state, "evicted for capacity");
    }

    /// How much of its fair share (its reservation) of a disk the volume takes.
    pub(crate) fn share_of(&self, disk: &Rc<Disk>) -> f64 {
        let state = self.state.borrow();
        match &state.attach {
            Some(attach) if Rc::ptr_eq(&attach.disk, disk) => {
                Self::used_segments(&state) as f64 / attach.capacity.max(1) as f64
            }
            _ => 0.0,
        }
    }

    /// Whether the oldest log can be given up for somebody else's sake.
    pub(crate) fn can_lose_oldest(&self, disk: &Rc<Disk>) -> bool {
        let state = self.state.borrow();
        // Once everything is on the primary a volume on its way out of the journal gives all of it back itself; until then it may need the room, too. Of one that is
        // being closed a log that went would leave holes to punch, behind a fence that tells what the primary is.
        !self.left_in_order.get()
            && !self.emptied.get()
            && state.attach.as_ref().is_some_and(|a| Rc::ptr_eq(&a.disk, disk))
            && state.leaving.is_empty()
            && Self::oldest_can_go(&state)
    }

    /// Gives the oldest log up.
    pub(crate) fn lose_oldest(self: &Rc<Self>) {
        self.evict_for_capacity(&mut self.state.borrow_mut());
    }

    /// Keeps the sets of touched blocks of sealed logs within their bound: the oldest go first, and what is missing is read back, newest first.
    async fn keep_sets(self: &Rc<Self>, bytes_max: u64) {
        let logs: Vec<_> = self.state.borrow().logs.iter().filter(|l| l.state.borrow().sealed).cloned().collect();
        let mut bytes = 0;
        let mut missing = None;
        for log in logs.iter().rev() {
            let held = log.state.borrow().imaged.as_ref().map(|set| set.bytes() as u64);
            match held {
                Some(held) if bytes + held > bytes_max => log.state.borrow_mut().imaged = None,
                Some(held) => bytes += held,
                None if missing.is_none() => missing = Some(log),
                None => {}
            }
        }
        let Some(log) = missing else { return };
        // A scattered block costs two bytes: what surely does not fit is not read.
        let root = log.state.borrow().before_root;
        if bytes + root.entries.get() * 2 > bytes_max {
            return;
        }
        let _pin = log.pin();
        let mut set = Touched::default();
        let runs = log.state.borrow().before_index.runs();
        for run in runs {
            let read = run.for_each(&*log.disk, |entry| {
                set.insert_range(entry.block.get(), entry.blocks());
            });
            if read.await.is_err() {
                return;
            }
        }
        log.state.borrow_mut().imaged = Some(set);
    }

    /// Tells once when the primary has another size than it had.
    fn note_primary_size(self: &Rc<Self>) {
        let Ok(now) = self.primary.current_size() else { return };
        let mut state = self.state.borrow_mut();
        let seen = std::mem::replace(&mut state.primary_size_seen, now);
        if seen != 0 && seen != now {
            let size = state.size;
            self.event_later(
                EventKind::PrimaryResized,
                format!("the primary has {now} bytes now, the guest sees {size}: `volume resize` offers what it grew"),
            );
        }
    }

    /// Takes the oldest log out of the row and lets it leave. Nothing is read back, nothing is moved.
    fn evict_oldest(self: &Rc<Self>, state: &mut State, why: &str) {
        let Some(log) = state.logs.pop_front() else { return };
        log.state.borrow_mut().gone = true;
        state.leaving.push(Rc::clone(&log));
        Self::prune_markers(state);
        let lost: Vec<_> = state.views.values().filter(|v| Rc::ptr_eq(&v.log, &log)).cloned().collect();
        let message = format!("its log {} was {why}", log.seq);
        let volume = Rc::clone(self);
        self.host.spawn(Box::pin(async move {
            for view in lost {
                view.lose(&message);
                volume.event(EventKind::ViewLost, format!("view {} at {}: {message}", view.id(), view.time));
            }
            if let Err(error) = volume.let_go(&log).await {
                tracing::warn!(volume = %volume.id, log = log.seq, %error, "evicted log could not be freed");
            }
        }));
        self.work.notify();
    }

    /// Makes an eviction durable, waits for the last read, and frees the segments.
    async fn let_go(self: &Rc<Self>, log: &Rc<Log>) -> Result<()> {
        let ticket = self.control(ControlKind::LogGone, Instant::ZERO, log.seq, 0, &[], true);
        if !active(Mutation::ReuseEarly) {
            self.durable(&ticket).await?;
            log.until_unread().await;
        }
        {
            // Only now: while the log may come back after a power cut, the primary holds what its instants before the discard show.
            let mut state = self.state.borrow_mut();
            let hints = std::mem::take(&mut log.state.borrow_mut().hints);
            if state.attach.as_ref().is_some_and(|attach| Rc::ptr_eq(&attach.disk, &log.disk)) {
                // Without their instants neighbours are one range.
                hints.iter().for_each(|(block, count, _)| state.punch.insert(block, count, Instant::ZERO));
            }
        }
        self.work.notify();
        let segments = {
            let mut inner = log.state.borrow_mut();
            let mut list = std::mem::take(&mut inner.writes.segments);
            list.append(&mut inner.before.segments);
            list
        };
        let released = log.disk.release(&segments).await;
        self.state.borrow_mut().leaving.retain(|l| !Rc::ptr_eq(l, log));
        self.changed.notify();
        released
    }

    // -- the caretaker -------------------------------------------------------------------------------------------------

    /// What time alone brings: the idle frame, automatic markers, rotation and eviction by age, the way back to protection.
    pub(crate) async fn run_caretaker(self: Rc<Self>) {
        let mut rounds = 0u64;
        loop {
            self.host.sleep(ROUND_NS).await;
            rounds += 1;
            let mode = self.state.borrow().mode;
            match mode {
                Mode::Closed => break,
                Mode::Journal => {
                    self.round().await;
                    if rounds.is_multiple_of(8) {
                        if let Err(error) = self.store_lost_blocks().await {
                            tracing::error!(volume = %self.id, %error, "fence");
                        }
                        self.note_primary_size();
                        let share = self
                            .engine
                            .upgrade()
                            .map_or(0, |e| e.config().touched_bytes_max / (e.volumes().len() as u64).max(1));
                        self.keep_sets(share).await;
                    }
                }
                Mode::Direct if rounds.is_multiple_of(8) => self.try_protect_again().await,
                _ => {}
            }
        }
    }

    async fn round(self: &Rc<Self>) {
        let Ok(engine) = self.engine() else { return };
        self.work.notify();
        // Rotation by age, and the automatic marker.
        let duration_ns =
            self.state.borrow().settings.map_or(0, |s| s.reserve_duration_s.saturating_mul(1_000_000_000));
        let wall = self.host.wall_ns();
        let wants_rotation = {
            let state = self.state.borrow();
            state.logs.back().is_some_and(|l| {
                let old = wall.saturating_sub(l.start.0) >= (duration_ns / 8).max(1_000_000_000);
                old && l.state.borrow().io_start != Instant::ZERO
            })
        };
        let wants_marker = {
            let state = self.state.borrow();
            let interval = engine.config().marker_interval_s.saturating_mul(1_000_000_000);
            state.on && state.wrote_since_marker && wall.saturating_sub(state.marker_last.0) >= interval
        };
        if wants_rotation || wants_marker {
            // The next round does it where the clock has to be raised first.
            let mut state = self.state.borrow_mut();
            if state.mode == Mode::Journal
                && !self.admin.get()
                && let Some(instant) = engine.try_tick()
            {
                if wants_rotation {
                    let recording = state.on;
                    self.rotate(&mut state, instant, recording, CloseReason::Rotation);
                } else {
                    self.add_marker(&mut state, &auto_name(instant), MarkerKind::Crash, instant, true);
                }
            }
        }
        self.evict_by_age(&engine, duration_ns);
        self.shrink_to_capacity();
        self.note_window(duration_ns);
        self.idle_frame().await;
        let off_and_empty = {
            let state = self.state.borrow();
            // What is left to punch is punched while the guest goes on.
            !state.on
                && !self.admin.get()
                && state.punch.is_empty()
                && !state.punching
                && state.logs.iter().all(|l| !l.state.borrow().recording)
        };
        if off_and_empty {
            let _lock = self.lock_admin().await;
            if let Err(error) = self.leave_journal("switched off, and no history is left", false).await {
                tracing::warn!(volume = %self.id, %error, "leaving the journal failed");
            }
        }
    }

    fn evict_by_age(self: &Rc<Self>, engine: &crate::engine::Engine, duration_ns: u64) {
        let Some(now) = engine.age_for_eviction_ns() else { return };
        let mut state = self.state.borrow_mut();
        if self.admin.get() || !state.leaving.is_empty() || !Self::oldest_can_go(&state) {
            return;
        }
        let log = Rc::clone(state.logs.front().expect("just seen"));
        let end = state.logs[1].start;
        let viewed = state.views.values().any(|v| Rc::ptr_eq(&v.log, &log)) && !active(Mutation::ViewLostByAge);
        if now.saturating_sub(end.0) > duration_ns && !viewed {
            self.stats.borrow_mut().evicted_duration += 1;
            self.event_later(EventKind::Evicted, format!("log {} is older than reserve_duration", log.seq));
            self.evict_oldest(&mut state, "older than reserve_duration");
        }
    }

    /// After `edit` made the capacity smaller.
    fn shrink_to_capacity(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let Some(attach) = state.attach.clone() else { return };
        let usable = usable_bytes(attach.disk.geometry.segment_size);
        let capacity = if active(Mutation::EvictedForNothing) { attach.capacity / 6 } else { attach.capacity };
        if Self::total_bound(&state) + Self::revert_segments(&state, usable) + 1 > capacity {
            self.evict_for_capacity(&mut state);
        }
    }

    fn note_window(self: &Rc<Self>, duration_ns: u64) {
        let mut state = self.state.borrow_mut();
        let forecast = Self::window_forecast(&state, self.host.wall_ns());
        let short = forecast > 0 && forecast.saturating_mul(1_000_000_000) < duration_ns;
        if short && !state.window_short_told {
            self.event_later(
                EventKind::WindowShort,
                format!(
                    "at the current rate reserve_capacity holds {forecast} s of history, less than reserve_duration"
                ),
            );
        }
        state.window_short_told = short;
    }

    /// A volume that has been idle for a second records its durable point and watermark, so that recovery redoes nothing, and so that every frame of
    /// the log before it is vouched for. That frame is synced too: what a power cut could take vouches for nothing.
    async fn idle_frame(self: &Rc<Self>) {
        let (idle, disk) = {
            let state = self.state.borrow();
            let idle = self.host.boot_ns().saturating_sub(state.last_write_ns) >= IDLE_NS && state.inflight.is_empty();
            let wanted = (state.completed.max(state.durable), Self::watermark(&state));
            let stale = state.recorded != wanted || state.open.front().is_some();
            let disk = state.attach.as_ref().map(|a| Rc::clone(&a.disk));
            (idle && stale, disk)
        };
        let (true, Some(disk)) = (idle, disk) else { return };
        // Records without an instant are covered as well: `sync_journal` would see nothing to do.
        if self.sync_completed(&disk).await.is_err() {
            return;
        }
        let ticket = {
            let mut state = self.state.borrow_mut();
            let recorded = (state.durable, Self::watermark(&state));
            let pending = state.open.back().is_some();
            let log =
                state.logs.back().filter(|_| state.mode == Mode::Journal && (pending || state.recorded != recorded));
            let Some(log) = log.cloned() else { return };
            Rc::clone(&self.open_frame(&mut state, &log, 0, true).ticket)
        };
        self.kick.notify();
        if let Err(error) = self.durable(&ticket).await {
            tracing::debug!(volume = %self.id, %error, "idle frame");
        }
    }

    // -- the user's switch ---------------------------------------------------------------------------------------------

    /// Checks settings against a disk; answers the capacity in segments.
    fn check_settings(settings: &Settings, disk: &Disk) -> Result<u64> {
        let size = disk.geometry.segment_size;
        let least = CAPACITY_SEGMENTS_MIN * size;
        if settings.reserve_capacity < least {
            return Err(Error::invalid(
                "reserve_capacity",
                settings.reserve_capacity,
                format!("at least {least} bytes ({CAPACITY_SEGMENTS_MIN} segments of {size} bytes on {})", disk.path),
            ));
        }
        Ok(settings.reserve_capacity / size)
    }

    fn check_duration(settings: &Settings) -> Result<()> {
        if settings.reserve_duration_s == 0 || settings.reserve_duration_s > 100 * 366 * 86400 {
            return Err(Error::invalid("reserve_duration", settings.reserve_duration_s, "1 second to 100 years"));
        }
        Ok(())
    }

    /// Changes the settings; creates them in state `off` where there are none.
    ///
    /// `change` makes the new ones of those that hold when no other call of an admin is under way: of two edits at once, neither loses what the other set.
    pub async fn edit(self: &Rc<Self>, change: impl FnOnce(Option<Settings>) -> Settings) -> Result<()> {
        self.serving()?;
        let _lock = self.lock_admin().await;
        self.settled().await?;
        let settings = change(self.state.borrow().settings);
        Self::check_duration(&settings)?;
        let attach = self.state.borrow().attach.clone();
        match attach {
            Some(attach) => {
                let capacity = Self::check_settings(&settings, &attach.disk)?;
                let overcommit = self.engine()?.config().overcommit;
                attach.disk.reserve(self.id, settings.reserve_capacity, overcommit)?;
                {
                    let mut state = self.state.borrow_mut();
                    state.settings = Some(settings);
                    if let Some(attach) = &mut state.attach {
                        attach.capacity = capacity;
                    }
                    state.window_short_told = false;
                }
                let ticket = self.store_settings();
                self.durable(&ticket).await?;
                self.refence().await?;
                self.shrink_within(capacity).await?;
            }
            None => {
                let disk = self.engine()?.pick_disk(self.id, None);
                if let Some(disk) = &disk {
                    Self::check_settings(&settings, disk)?;
                }
                let reason = {
                    let mut state = self.state.borrow_mut();
                    state.settings = Some(settings);
                    if state.created_ns == 0 {
                        state.created_ns = self.host.wall_ns();
                    }
                    if state.on { state.health_reason.clone() } else { "off".to_owned() }
                };
                self.put_fence(FenceState::Detached, disk.map_or(uuid::Uuid::nil(), |d| d.id), &reason).await?;
            }
        }
        self.changed.notify();
        self.event(EventKind::Edited, format!("{settings:?}"));
        Ok(())
    }

    /// After a smaller capacity: ends when the volume fits it, or only what a pending revert or the active log needs is left.
    async fn shrink_within(self: &Rc<Self>, capacity: u64) -> Result<()> {
        loop {
            let oldest = {
                let mut state = self.state.borrow_mut();
                if Self::used_segments(&state) <= capacity || state.mode != Mode::Journal || Self::pinned(&state, 0) {
                    return Ok(());
                }
                if state.leaving.is_empty() && Self::oldest_can_go(&state) {
                    self.evict_for_capacity(&mut state);
                }
                state.logs.front().cloned().filter(|_| state.leaving.is_empty())
            };
            match oldest {
                None => {
                    self.changed
                        .until(|| {
                            let state = self.state.borrow();
                            (state.leaving.is_empty() || state.mode != Mode::Journal).then_some(())
                        })
                        .await;
                }
                Some(log) => {
                    let (closed, wrote) = {
                        let log = log.state.borrow();
                        (log.closed, log.io_start != Instant::ZERO)
                    };
                    if !closed && !wrote {
                        return Ok(());
                    }
                    if !closed {
                        self.rotate_now(CloseReason::Rotation, |_| ()).await?;
                    }
                    self.until_sealed(&log).await?;
                }
            }
        }
    }

    /// Switches protection on; history starts now.
    pub async fn enable(self: &Rc<Self>) -> Result<()> {
        self.serving()?;
        let engine = self.engine()?;
        let _lock = self.lock_admin().await;
        self.settled().await?;
        let (mode, on) = {
            let state = self.state.borrow();
            (state.mode, state.on)
        };
        match (mode, on) {
            (Mode::Journal, true) => return self.refence().await,
            (Mode::Journal, false) => {
                let ticket = self.rotate_now(CloseReason::Switched, |state| state.on = true).await?;
                self.durable(&ticket).await?;
                // Whoever goes on without this journal goes on with the switch as it is now.
                self.refence().await?;
            }
            _ => {
                let settings = self.state.borrow().settings.unwrap_or(engine.config().default_settings);
                self.attach_to(None, settings).await?;
            }
        }
        self.event(EventKind::Enabled, "");
        Ok(())
    }

    /// Starts a journal on a CDP disk (any that has room, without `disk`); requests go through it from then on.
    pub(crate) async fn attach_to(self: &Rc<Self>, disk: Option<Rc<Disk>>, settings: Settings) -> Result<()> {
        let engine = self.engine()?;
        Self::check_duration(&settings)?;
        let disk = match disk.or_else(|| engine.pick_disk(self.id, Some(settings.reserve_capacity))) {
            Some(disk) => disk,
            None => {
                return Err(match engine.pick_disk(self.id, None) {
                    None => Error::State("no CDP disk is online: `disk init` one first; one that failed is used again after a restart of the agent".into()),
                    Some(disk) => {
                        Self::check_settings(&settings, &disk)?;
                        let free = disk.room_for(self.id);
                        Error::NoSpace { what: "reserve_capacity", needed: settings.reserve_capacity, free }
                    }
                });
            }
        };
        let capacity = Self::check_settings(&settings, &disk)?;
        disk.reserve(self.id, settings.reserve_capacity, engine.config().overcommit)?;
        let result = self.attach_reserved(&engine, &disk, settings, capacity).await;
        if result.is_err() && self.state.borrow().attach.is_none() {
            disk.reserve(self.id, 0, true)?;
        }
        result
    }

    async fn attach_reserved(
        self: &Rc<Self>,
        engine: &Rc<crate::engine::Engine>,
        disk: &Rc<Disk>,
        settings: Settings,
        capacity: u64,
    ) -> Result<()> {
        // What an earlier generation left here is never redone.
        let old: Vec<_> = disk.segments_of(self.id).into_iter().map(|(s, _)| s).collect();
        disk.release(&old).await?;
        let was = {
            let mut state = self.state.borrow_mut();
            let was = (state.settings, state.on, state.created_ns, state.fence.clone());
            state.settings = Some(settings);
            state.on = true;
            state.generation += 1;
            if state.created_ns == 0 {
                state.created_ns = self.host.wall_ns();
            }
            state.mode = Mode::Switching;
            was
        };
        // Writes under way to the primary end before the first log begins.
        self.changed.until(|| (self.state.borrow().direct_inflight == 0).then_some(())).await;
        let instant = match self.fence_in(engine, disk).await {
            Ok(instant) => instant,
            Err(error) => {
                let fence = {
                    let mut state = self.state.borrow_mut();
                    state.mode = Mode::Direct;
                    (state.settings, state.on, state.created_ns) = (was.0, was.1, was.2);
                    was.3
                };
                self.changed.notify();
                self.take_fence_back(fence).await;
                return Err(error);
            }
        };
        let ticket = {
            let mut state = self.state.borrow_mut();
            state.attach = Some(Attach { disk: Rc::clone(disk), capacity });
            state.logs.clear();
            state.markers.clear();
            let size = state.size;
            state.sizes = vec![(instant, size)];
            state.durable = instant;
            state.completed = instant;
            state.instant_last = instant;
            state.recorded = (Instant::ZERO, Instant::ZERO);
            // What was written without a journal, and what the last one knew of flushes, says nothing here.
            state.wrote_since_flush = true;
            state.flushes.clear();
            self.rotate(&mut state, instant, true, CloseReason::Switched);
            state.mode = Mode::Journal;
            state.health = if state.lost_blocks.is_some() { Health::RevertIncomplete } else { Health::Ok };
            state.health_reason.clear();
            state.open.back().map(|f| Rc::clone(&f.ticket))
        };
        self.start_tasks();
        self.changed.notify();
        if let Some(ticket) = ticket {
            self.durable(&ticket).await?;
        }
        self.drop_older(engine, disk).await;
        self.event(EventKind::Protected, format!("on {}", disk.path));
        Ok(())
    }

    /// Makes what went straight to the primary durable (from now on a flush syncs the journal only), then says in the fence that the journal on `disk`
    /// holds writes. Answers the instant at which its first log begins.
    async fn fence_in(&self, engine: &Rc<crate::engine::Engine>, disk: &Disk) -> Result<Instant> {
        self.primary.sync().await.map_err(|e| Error::device("sync", self.path(), &e))?;
        self.put_fence(FenceState::Dirty, disk.id, "").await?;
        engine.tick().await
    }

    /// After an attachment that failed behind its fence, or in it: no later start shall look for a journal that never began, nor find protection on
    /// that nobody was told of.
    async fn take_fence_back(&self, was: Option<Fence>) {
        let Some(dirty) = self.state.borrow().fence.clone().filter(|f| f.state == FenceState::Dirty) else { return };
        let (disk, reason) = was.map_or((dirty.disk, "off".to_owned()), |f| (f.disk, f.reason));
        if let Err(error) = self.put_fence(FenceState::Detached, disk, &reason).await {
            tracing::warn!(volume = %self.id, %error, "the fence of an attachment that failed stays until the next start");
        }
    }

    /// Starts the appender and the destager of a volume that has just entered the journal.
    pub(crate) fn start_tasks(self: &Rc<Self>) {
        let (appender, destager) = {
            let mut state = self.state.borrow_mut();
            (
                !std::mem::replace(&mut state.appender_running, true),
                !std::mem::replace(&mut state.destager_running, true),
            )
        };
        if appender {
            self.host.spawn(Box::pin(Rc::clone(self).run_appender()));
        }
        if destager {
            self.host.spawn(Box::pin(Rc::clone(self).run_destager()));
        }
        let disk = self.state.borrow().attach.as_ref().map(|a| Rc::clone(&a.disk));
        if let Some(disk) = disk {
            // Also a disk that fails while this volume is idle is left at once.
            let volume = Rc::downgrade(self);
            self.host.spawn(Box::pin(async move {
                disk.until_failed().await;
                if let Some(volume) = volume.upgrade() {
                    volume.kick.notify();
                    volume.work.notify();
                    volume.changed.notify();
                }
            }));
        }
    }

    /// Switches protection off: history stays until it ages out.
    pub async fn disable(self: &Rc<Self>) -> Result<()> {
        self.serving()?;
        let _lock = self.lock_admin().await;
        self.settled().await?;
        let (mode, on, settings) = {
            let state = self.state.borrow();
            (state.mode, state.on, state.settings)
        };
        if settings.is_none() {
            return Err(Error::State(format!("volume {:?} has no CDP", self.name())));
        }
        if !on {
            return self.refence().await;
        }
        if mode == Mode::Journal {
            let ticket = self.rotate_now(CloseReason::Switched, |state| state.on = false).await?;
            self.durable(&ticket).await?;
            self.refence().await?;
        } else {
            self.state.borrow_mut().on = false;
            let disk = self.state.borrow().fence.as_ref().map_or(uuid::Uuid::nil(), |f| f.disk);
            if let Err(error) = self.put_fence(FenceState::Detached, disk, "off").await {
                self.state.borrow_mut().on = true;
                return Err(error);
            }
            let mut state = self.state.borrow_mut();
            if state.health == Health::Offline {
                state.health = Health::Ok;
                state.health_reason.clear();
            }
        }
        self.event(EventKind::Disabled, "");
        Ok(())
    }

    /// Brings everything to the primary and leaves the journal; all history goes, with `forget` the settings, too. The caller holds the admin lock.
    pub(crate) async fn leave_journal(self: &Rc<Self>, why: &str, forget: bool) -> Result<()> {
        let disk = {
            let mut state = self.state.borrow_mut();
            if state.mode != Mode::Journal {
                return Ok(());
            }
            state.mode = Mode::Switching;
            state.attach.as_ref().map(|a| Rc::clone(&a.disk))
        };
        let Some(disk) = disk else { return Ok(()) };
        if let Err(error) = self.drain_all().await {
            self.resume_journal();
            return Err(error);
        }
        // Evictions under way end first: their segments are theirs to free.
        let none_leaves = || {
            let state = self.state.borrow();
            (state.leaving.is_empty() || disk.failure().is_some()).then_some(())
        };
        self.changed.until(none_leaves).await;
        let lost: Vec<_> = {
            let state = self.state.borrow();
            state.views.values().cloned().collect()
        };
        for view in lost {
            view.lose(&format!("history is gone: {why}"));
        }
        if let Some(reason) = disk.failure() {
            return Err(Error::Gone(reason));
        }
        // From here on this generation is never redone, and a disk that fails changes nothing: what is on its way out of it is on the primary.
        self.left_in_order.set(true);
        let in_order = Held(&self.left_in_order, &self.changed);
        let (kept, before) = {
            let state = self.state.borrow();
            let before = state.fence.as_ref().map_or(FenceState::Dirty, |fence| fence.state);
            ((state.settings, state.on, state.created_ns), before)
        };
        if forget {
            self.forget_settings();
        }
        if let Err(error) = self.put_fence(FenceState::Detached, disk.id, why).await {
            {
                let mut state = self.state.borrow_mut();
                (state.settings, state.on, state.created_ns) = kept;
            }
            // It may stand there all the same: nothing may be acked into a journal that a start would drop. What stood there before says whether this
            // generation has a gap. Where a stop has waited for that long enough, the volume stays between the two: everything is on the primary.
            self.persist_fence(before, &disk, "").await?;
            self.resume_journal();
            return Err(error);
        }
        // From the next step on requests go straight to the primary: nothing old may be on its way there. Hints: what is not punched only keeps its room.
        self.state.borrow_mut().punch.clear();
        self.changed.until(|| (!self.state.borrow().punching).then_some(())).await;
        let (logs, leaving) = {
            let mut state = self.state.borrow_mut();
            state.attach = None;
            state.markers.clear();
            state.sizes.clear();
            state.mode = Mode::Direct;
            (std::mem::take(&mut state.logs), std::mem::take(&mut state.leaving))
        };
        drop(in_order);
        self.kick.notify();
        self.work.notify();
        self.changed.notify();
        self.changed
            .until(|| {
                let state = self.state.borrow();
                (!state.appender_running && !state.destager_running).then_some(())
            })
            .await;
        // An appender that ended with its disk left them.
        let abandoned = self.state.borrow_mut().take_tickets();
        for ticket in abandoned {
            ticket.finish(Err(Error::Gone("the volume has left the journal".into())));
        }
        for log in logs.iter().chain(&leaving) {
            log.state.borrow_mut().gone = true;
            log.until_unread().await;
            log.release_spares().await?;
        }
        let all: Vec<_> = disk.segments_of(self.id).into_iter().map(|(s, _)| s).collect();
        disk.release(&all).await?;
        disk.reserve(self.id, 0, true)
    }

    fn resume_journal(&self) {
        let mut state = self.state.borrow_mut();
        // A disk that failed meanwhile is being left: the way out alone says how requests go on.
        let healthy = state.attach.as_ref().is_some_and(|a| a.disk.failure().is_none());
        if state.mode == Mode::Switching && healthy {
            state.mode = Mode::Journal;
        }
        drop(state);
        self.changed.notify();
    }

    /// Ends when every frame is out, every write is on the primary, and no revert is pending.
    pub(crate) async fn drain_all(self: &Rc<Self>) -> Result<()> {
        self.drain(true).await
    }

    /// The same, but for what waits behind a pending revert: that goes on after the next start.
    pub(crate) async fn drain_for_stop(self: &Rc<Self>) -> Result<()> {
        self.drain(false).await
    }

    async fn drain(self: &Rc<Self>, reverts: bool) -> Result<()> {
        self.state.borrow_mut().drain_waiters += 1;
        self.work.notify();
        let result = loop {
            // Records that nobody waits for come in meanwhile, too: of a revert that is being copied, say.
            if let Some(last) = self.state.borrow_mut().open.back_mut() {
                last.urgent = true;
            }
            self.kick.notify();
            let done = self.changed.until(|| self.drained_or_failed(reverts));
            futures::pin_mut!(done);
            // A failing primary may change nothing for a long time: its patience is looked at every second.
            if let Either::Left((result, _)) = select(done, self.host.sleep(1_000_000_000)).await {
                break result;
            }
        };
        self.state.borrow_mut().drain_waiters -= 1;
        result
    }

    fn drained_or_failed(&self, reverts: bool) -> Option<Result<()>> {
        let state = self.state.borrow();
        if let Some(reason) = state.attach.as_ref().and_then(|a| a.disk.failure()) {
            return Some(Err(Error::Gone(reason)));
        }
        let fence_error = || self.after_patience(&state.fence_failing, DRAIN_PATIENCE_NS);
        if let Some(error) = self.primary_error(&state, DRAIN_PATIENCE_NS).or_else(fence_error) {
            return Some(Err(error));
        }
        let on_primary = |l: &Rc<Log>| {
            let log = l.state.borrow();
            log.sealed || (log.overlay.is_empty() && log.revert.is_none())
        };
        let mut logs = state.logs.iter().take_while(|l| reverts || l.state.borrow().revert.is_none());
        (state.open.is_empty() && state.inflight.is_empty() && logs.all(on_primary)).then_some(Ok(()))
    }

    async fn try_protect_again(self: &Rc<Self>) {
        let settings = {
            let state = self.state.borrow();
            let wants =
                state.on && matches!(state.health, Health::Offline | Health::RevertIncomplete) && !self.admin.get();
            state.settings.filter(|_| wants)
        };
        let Some(settings) = settings.filter(|_| !active(Mutation::NeverProtectedAgain)) else { return };
        let Ok(engine) = self.engine() else { return };
        if engine.pick_disk(self.id, Some(settings.reserve_capacity)).is_none() {
            return;
        }
        let _lock = self.lock_admin().await;
        if self.state.borrow().mode != Mode::Direct || !self.state.borrow().on {
            return;
        }
        if let Err(error) = self.attach_to(None, settings).await {
            tracing::debug!(volume = %self.id, %error, "not protected again yet");
        }
    }

    // -- clean ---------------------------------------------------------------------------------------------------------

    /// `None`: all history and the settings; otherwise exactly that log.
    pub async fn clean(self: &Rc<Self>, seq: Option<u64>) -> Result<()> {
        self.serving()?;
        let _lock = self.lock_admin().await;
        self.settled().await?;
        let Some(seq) = seq else {
            if let Some(view) = self.state.borrow().views.keys().next() {
                return Err(Error::State(format!("view {view} is open: close it first")));
            }
            self.leave_journal("cleaned", true).await?;
            self.forget_settings();
            let disk = self.state.borrow().fence.as_ref().map_or(uuid::Uuid::nil(), |f| f.disk);
            self.put_fence(FenceState::Detached, disk, "cleaned").await?;
            self.event(EventKind::Cleaned, "all history and settings");
            return Ok(());
        };
        let (newest, log) = {
            let state = self.state.borrow();
            let position = Self::unneeded(&state, seq)?;
            (position + 1 == state.logs.len(), Rc::clone(&state.logs[position]))
        };
        if newest {
            self.rotate_now(CloseReason::Cleaned, |_| ()).await?;
        }
        self.until_sealed(&log).await?;
        let oldest = {
            let mut state = self.state.borrow_mut();
            // Asked again: a view of it may have been opened meanwhile, or a revert begun.
            let oldest = match Self::unneeded(&state, seq) {
                Err(Error::State(_)) if active(Mutation::CleanedUnderView) => false,
                position => position? == 0,
            };
            if oldest {
                self.evict_oldest(&mut state, "cleaned");
            } else {
                log.state.borrow_mut().thin = true;
                Self::prune_markers(&mut state);
            }
            oldest
        };
        if oldest {
            // With a disk that failed before the record was durable the log may come back at the next start.
            let gone = || {
                let gone = !self.state.borrow().leaving.iter().any(|l| Rc::ptr_eq(l, &log));
                gone.then_some(Ok(())).or_else(|| log.disk.failure().map(|reason| Err(Error::Gone(reason))))
            };
            self.changed.until(gone).await?;
        } else {
            let ticket = self.control(ControlKind::Log, Instant::ZERO, log.seq, 0, log.row().as_bytes(), true);
            ticket.wait().await?;
            self.free_writes(&log.disk, &log).await?;
        }
        self.event(EventKind::Cleaned, format!("log {seq}"));
        Ok(())
    }

    /// The position of a log that nothing needs but the history itself.
    fn unneeded(state: &State, seq: u64) -> Result<usize> {
        let position = state.logs.iter().position(|l| l.seq == seq);
        let position = position.ok_or(Error::NotFound { what: "log", name: seq.to_string() })?;
        let log = &state.logs[position];
        if let Some(view) = state.views.values().find(|v| Rc::ptr_eq(&v.log, log)) {
            return Err(Error::State(format!("view {} needs log {seq}: close it first", view.id())));
        }
        if Self::pinned(state, position) {
            return Err(Error::State(format!("log {seq} is needed by a revert that is being copied")));
        }
        Ok(position)
    }

    fn forget_settings(&self) {
        let mut state = self.state.borrow_mut();
        state.settings = None;
        state.on = false;
        state.created_ns = 0;
        if state.health == Health::Offline {
            state.health = Health::Ok;
            state.health_reason.clear();
        }
    }

    async fn until_sealed(self: &Rc<Self>, log: &Rc<Log>) -> Result<()> {
        self.state.borrow_mut().drain_waiters += 1;
        self.work.notify();
        let result = self
            .changed
            .until(|| {
                if let Some(reason) = log.disk.failure() {
                    return Some(Err(Error::Gone(reason)));
                }
                let failing = self.primary_error_for_guest(&self.state.borrow());
                failing.map(Err).or_else(|| log.state.borrow().sealed.then_some(Ok(())))
            })
            .await;
        self.state.borrow_mut().drain_waiters -= 1;
        result
    }

    // -- size ----------------------------------------------------------------------------------------------------------

    /// Offers the primary's grown size (or `size` bytes of it) to the guest. Shrinking is refused.
    pub async fn resize(self: &Rc<Self>, size: Option<u64>) -> Result<u64> {
        self.serving()?;
        let _lock = self.lock_admin().await;
        self.settled().await?;
        let primary = self.primary.current_size().map_err(|e| Error::device("size of", self.path(), &e))?;
        let now = self.state.borrow().size;
        let wanted = size.unwrap_or(primary - primary % 512);
        if wanted < now || wanted > primary || !wanted.is_multiple_of(512) {
            return Err(Error::invalid(
                "size",
                wanted,
                format!("a multiple of 512 from {now} (shrinking is refused) to {primary} (the primary)"),
            ));
        }
        if wanted == now {
            return Ok(now);
        }
        let engine = self.engine()?;
        // Before the guest may write there: what is destaged and read is cut at this.
        self.primary_bytes.set(self.primary_bytes.get().max(primary));
        if self.state.borrow().mode == Mode::Journal {
            let instant = engine.tick().await?;
            let ticket = {
                let mut state = self.state.borrow_mut();
                let Some(log) = state.logs.back().cloned() else { return Err(Error::Gone("no active log".into())) };
                state.sizes.push((instant, wanted));
                let frame = self.open_frame(&mut state, &log, 0, true);
                frame.builder.push_size(instant, wanted);
                Rc::clone(&frame.ticket)
            };
            self.kick.notify();
            if let Err(error) = self.durable(&ticket).await {
                // It was not made: nothing may show the size.
                self.state.borrow_mut().sizes.retain(|(at, _)| *at != instant);
                return Err(error);
            }
        }
        self.state.borrow_mut().size = wanted;
        let ticket = self.store_settings();
        self.durable(&ticket).await?;
        self.event(EventKind::PrimaryResized, format!("the guest sees {wanted} bytes now"));
        Ok(wanted)
    }

    /// Guest-visible size at an instant.
    pub(crate) fn size_at(&self, instant: Instant) -> u64 {
        let state = self.state.borrow();
        state
            .sizes
            .iter()
            .rev()
            .find(|(from, _)| *from <= instant)
            .or(state.sizes.first())
            .map_or(state.size, |(_, size)| *size)
    }

    // -- timeline ------------------------------------------------------------------------------------------------------

    /// Write density between two instants, in equal pieces: blocks and bytes written in each.
    pub async fn timeline(self: &Rc<Self>, from: Instant, to: Instant, buckets: u32) -> Result<Vec<TimelineBucket>> {
        if buckets == 0 || buckets > 10_000 {
            return Err(Error::invalid("buckets", buckets, "1 to 10000"));
        }
        if to <= from {
            return Err(Error::invalid("to", to, format!("after from ({from})")));
        }
        let width = (to.0 - from.0).div_ceil(u64::from(buckets)).max(1);
        let mut out: Vec<TimelineBucket> = (0..u64::from(buckets))
            .map(|i| TimelineBucket { start: Instant(from.0.saturating_add(i * width)), ..TimelineBucket::default() })
            .collect();
        let logs: Vec<_> = {
            let state = self.state.borrow();
            let ends = state.logs.iter().skip(1).map(|l| l.start).chain([Instant::MAX]);
            state
                .logs
                .iter()
                .zip(ends)
                .filter(|(l, end)| l.start <= to && *end > from)
                .map(|(l, _)| Rc::clone(l))
                .collect()
        };
        for log in logs {
            let _pin = log.pin();
            let (memory, runs) = {
                let state = log.state.borrow();
                if state.thin || state.gone {
                    continue;
                }
                (state.writes_index.in_memory(), state.writes_index.runs())
            };
            let mut count = |entry: &crate::format::IndexEntry| {
                let at = entry.instant.get();
                if at < from.0 || at >= to.0 || !matches!(entry.kind(), EntryKind::Write | EntryKind::Zero) {
                    return;
                }
                if let Some(bucket) = out.get_mut(((at - from.0) / width) as usize) {
                    bucket.blocks += entry.blocks();
                    if entry.kind() == EntryKind::Write {
                        bucket.bytes += u64::from(entry.mask.count_ones()) * 512;
                    }
                }
            };
            for mem in memory {
                mem.iter().for_each(&mut count);
            }
            for run in runs {
                run.for_each(&*log.disk, &mut count).await?;
            }
        }
        self.each_flush(from, to, |instant, clean| {
            if let Some(bucket) = out.get_mut(((instant.0 - from.0) / width) as usize) {
                bucket.flushes += 1;
                bucket.flushes_clean += u64::from(clean);
            }
        })
        .await?;
        Ok(out)
    }

    /// Kinds of streams, for those who walk both.
    pub(crate) const STREAMS: [StreamKind; 2] = [StreamKind::Writes, StreamKind::Before];
}

/// Name of the automatic marker of an instant.
fn auto_name(instant: Instant) -> String {
    format!("CDP-auto-{}", instant.0 / 1_000_000_000)
}

/// Names that an automatic marker of an instant may have, in the order to try them. The last one is nobody else's: instants are unique.
pub fn auto_names(instant: Instant) -> [String; 2] {
    [auto_name(instant), format!("{}.{:09}", auto_name(instant), instant.0 % 1_000_000_000)]
}

/// Whether a marker may go when there are too many: nobody named it, and no guest was held for it.
fn thinned(auto: bool, kind: MarkerKind) -> bool {
    auto && kind != MarkerKind::Application
}

fn covered(coverage: &[Interval], instant: Instant) -> bool {
    coverage.iter().any(|i| i.start <= instant && i.end.is_none_or(|end| instant <= end))
}
