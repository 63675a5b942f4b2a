//! A volume: the primary as its head, a row of logs as its history, and the tasks that move data between them.
//!
//! | file | what |
//! |---|---|
//! | `write.rs` | admission, the open frame, acks, flushes |
//! | `read.rs` | the live state and the state at any instant |
//! | `destage.rs` | the destager: before-images, the primary, sealing, copying of reverts |
//! | `history.rs` | logs come and go: rotate, mark, enable, disable, evict, clean, coverage |
//! | `query.rs` | what the journal tells on demand: flush points, reverts, writes in order, changed blocks |
//! | `revert.rs` | back to an instant, alone or with a group |
//! | `recover.rs` | from what a stop left on the disks to a served volume |
//! | `detach.rs` | the way out when the CDP disk fails |
//!
//! All state lives on one thread. `State` is borrowed only between two awaits, never across one.

mod destage;
mod detach;
mod history;
mod query;
pub(crate) mod read;
mod recover;
mod revert;
mod write;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::{Rc, Weak};

use futures::future::{Either, join_all, select};
use uuid::Uuid;

use crate::buf::{IoBuf, Slice};
use crate::disk::Disk;
use crate::engine::{BlockStatus, ClientGuard, Engine, Export};
use crate::error::{Error, Result};
use crate::fence::{Fence, FenceState};
use crate::format::crc;
use crate::frame::FrameBuilder;
use crate::host::{Device, LocalFuture};
use crate::index::Touched;
use crate::info::{CdpState, Event, EventKind, Health, Marker, Settings, ViewInfo, VolumeInfo, VolumeStats};
use crate::log::{IndexBytes, Log};
use crate::overlay::ExtentMap;
use crate::signal::Signal;
use crate::types::{BLOCK, Instant, SECTOR, SECTORS_PER_BLOCK};
use crate::view::View;

pub(crate) use history::CloseReason;
pub use history::auto_names;
pub(crate) use recover::open;
#[cfg(feature = "fuzzing")]
pub(crate) use recover::read_frame;

/// What an error says was done when the state directory could not take a fence.
const WRITE_FENCE: &str = "write fence of";

/// Blocks of a primary that a fence remembers: partition tables and the superblocks of ext4 and XFS (0, 1), of btrfs (16), and the same in a first partition at
/// 1 MiB. ext4 and btrfs change theirs at each mount.
const SAMPLED: [u64; 6] = [0, 1, 16, 256, 257, 272];

/// How requests are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Straight to the primary: no CDP, or offline.
    Direct,
    /// Through the journal.
    Journal,
    /// Between the two: new requests wait.
    Switching,
    /// Not served; `health` says why.
    Refused,
    /// Stopped.
    Closed,
}

/// How long a stop or a switch waits for a primary that fails, nanoseconds.
pub(crate) const DRAIN_PATIENCE_NS: u64 = 30_000_000_000;
/// How long a stop waits for a state directory that takes no fence, nanoseconds: less than the service manager waits for the stop.
pub(crate) const FENCE_PATIENCE_NS: u64 = 240_000_000_000;

/// Where the journal lives.
#[derive(Clone)]
pub(crate) struct Attach {
    pub disk: Rc<Disk>,
    /// Segments that `reserve_capacity` allows.
    pub capacity: u64,
}

impl Attach {
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity * self.disk.geometry.segment_size
    }
}

/// Tells those who wait for a frame how it ended.
#[derive(Default)]
pub(crate) struct Ticket {
    done: RefCell<Option<Result<()>>>,
    signal: Signal,
}

impl Ticket {
    pub fn finish(&self, result: Result<()>) {
        if self.done.borrow().is_none() {
            *self.done.borrow_mut() = Some(result);
        }
        self.signal.notify();
    }

    pub async fn wait(&self) -> Result<()> {
        self.signal.until(|| self.done.borrow().clone()).await
    }
}

/// A frame that is being filled, with its log.
pub(crate) struct OpenFrame {
    pub log: Rc<Log>,
    pub builder: FrameBuilder,
    pub ticket: Rc<Ticket>,
    /// Somebody waits for it: it goes out as soon as the frame before it has completed.
    pub urgent: bool,
    /// Bytes of `LogState::unframed` that it stands for.
    pub unframed: u64,
}

pub(crate) struct Client {
    writable: bool,
    on_disconnect: Option<Box<dyn FnOnce()>>,
}

pub(crate) struct State {
    pub name: String,
    pub path: String,
    pub size: u64,
    pub mode: Mode,
    pub health: Health,
    pub health_reason: String,
    pub settings: Option<Settings>,
    pub on: bool,
    pub created_ns: u64,
    pub held: bool,
    /// What is told of `held` until a revert that changes it is made: it may still be refused.
    pub held_told: Option<bool>,
    /// A forced revert has asked its clients to go: no other writer may come in their place.
    pub turning_away: bool,
    /// A revert is prepared: writes wait.
    pub reverting: Option<revert::Reverting>,
    pub generation: u64,
    pub next_seq: u64,
    pub attach: Option<Attach>,
    pub fence: Option<Fence>,
    /// Oldest to newest; the last one is active. Empty when requests go straight to the primary.
    pub logs: VecDeque<Rc<Log>>,
    /// On their way out: their segments still count.
    pub leaving: Vec<Rc<Log>>,
    pub open: VecDeque<OpenFrame>,
    /// The frames on their way to the disk, in their order.
    pub inflight: VecDeque<FrameOnItsWay>,
    /// How many records were on their way at once of late, a frame's own among them: how many writes the guest has in flight, about.
    pub records_at_once: usize,
    /// Newest instant admitted.
    pub instant_last: Instant,
    /// Newest instant in a frame that was sealed.
    pub framed: Instant,
    /// Every write at or before it is in a completed frame.
    pub completed: Instant,
    /// Every write at or before it is durable in the journal.
    pub durable: Instant,
    /// What the last frame said of the durable point and the watermark.
    pub recorded: (Instant, Instant),
    pub markers: BTreeMap<(Instant, String), Marker>,
    pub marker_last: Instant,
    pub wrote_since_marker: bool,
    /// Something was admitted since the last flush point with no write in flight.
    pub wrote_since_flush: bool,
    pub flush_habit: write::FlushHabit,
    /// Guest-visible size from each instant on.
    pub sizes: Vec<(Instant, u64)>,
    pub views: BTreeMap<Uuid, Rc<View>>,
    pub clients: BTreeMap<u64, Client>,
    pub client_next: u64,
    pub direct_inflight: u32,
    pub writes_inflight: u32,
    /// Blocks whose content was lost with the CDP disk, or could not be read when a revert needed it: they read as errors until overwritten.
    pub lost_blocks: Option<Touched>,
    /// Overwritten whole since, with the seq of the log that did it: at that log's start, and before, their content was lost, whatever the
    /// primary holds. They leave when that log has its (unreadable) before-image.
    pub stale_blocks: BTreeMap<u64, u64>,
    /// The fence does not know yet that some were overwritten.
    pub lost_changed: bool,
    /// Ranges to punch on the primary, of discards whose log was evicted, without what was written since. Only where a journal is attached: there a write that comes while a
    /// range is punched waits in the overlay, and the destager does one after the other.
    pub punch: ExtentMap,
    /// Some of them are on their way to the primary: requests must not go there directly.
    pub punching: bool,
    /// Somebody waits until everything is on the primary.
    pub drain_waiters: u32,
    pub backlog_full: bool,
    pub destager_running: bool,
    pub appender_running: bool,
    /// Since when primary writes fail, and with what.
    pub primary_failing: Option<(u64, Error)>,
    /// Since when (boot clock) the destager gets no fence into the state directory, and its error.
    pub fence_failing: Option<(u64, Error)>,
    pub last_write_ns: u64,
    pub window_short_told: bool,
    pub primary_size_seen: u64,
    /// The newest flush points: instant, and whether no write was in flight.
    pub flushes: VecDeque<(Instant, bool)>,
}

/// A frame between the appender and its completion.
pub(crate) struct FrameOnItsWay {
    pub log: Rc<Log>,
    /// Who waits for it.
    pub ticket: Rc<Ticket>,
    /// How many it holds.
    pub records: usize,
}

/// How far the fence's `next_seq` runs ahead of the journal's.
const SEQS_AHEAD: u64 = 1 << 20;

/// Newest flush points in memory: those that may not be in a completed frame yet. The rest is read from the journal.
const FLUSHES_MAX: usize = 4096;

impl State {
    /// Who waits for a frame, on its way or not: for those who end what the appender did not.
    pub fn take_tickets(&mut self) -> Vec<Rc<Ticket>> {
        let open = std::mem::take(&mut self.open).into_iter().map(|frame| frame.ticket);
        let inflight = std::mem::take(&mut self.inflight).into_iter().map(|frame| frame.ticket);
        inflight.chain(open).collect()
    }

    /// Whether the CDP disk that holds the journal has failed, and was not left yet.
    pub fn disk_failed(&self) -> bool {
        self.attach.as_ref().is_some_and(|a| a.disk.failure().is_some())
    }

    /// What the journal and the fence are told of `held`.
    pub fn told_held(&self) -> bool {
        self.held_told.unwrap_or(self.held)
    }

    /// Whether a block's content at the start of a log was lost: what the primary holds of it is not that.
    pub fn lost_before(&self, block: u64, seq: u64) -> bool {
        self.stale_blocks.get(&block).is_some_and(|from| *from >= seq)
            || self.lost_blocks.as_ref().is_some_and(|lost| lost.contains(block))
    }

    /// Whether guests get an error for a block: its content was lost, and no pending revert brings it back.
    pub fn unreadable(&self, block: u64) -> bool {
        self.lost_blocks.as_ref().is_some_and(|lost| lost.contains(block))
            && !self.logs.iter().any(|l| l.state.borrow().revert.as_ref().is_some_and(|r| r.left.contains(block)))
    }

    pub fn note_flush(&mut self, instant: Instant, clean: bool) {
        if self.flushes.len() >= FLUSHES_MAX {
            self.flushes.pop_front();
        }
        self.flushes.push_back((instant, clean));
        self.wrote_since_flush &= !clean;
    }
}

/// See the module's text.
pub struct Volume {
    pub(crate) id: Uuid,
    pub(crate) engine: Weak<Engine>,
    pub(crate) host: Rc<dyn crate::host::Host>,
    pub(crate) primary: Rc<dyn Device>,
    /// Bytes of the primary that may be used: what it had when the volume was opened, or last resized. What the device itself was opened with may be less.
    pub(crate) primary_bytes: Cell<u64>,
    pub(crate) state: RefCell<State>,
    /// Anything that somebody may wait for has changed, but for the next two.
    pub(crate) changed: Signal,
    /// The appender has work.
    pub(crate) kick: Signal,
    /// The destager has work.
    pub(crate) work: Signal,
    pub(crate) stats: RefCell<VolumeStats>,
    /// What its logs add to the stats.
    pub(crate) index_bytes: Rc<IndexBytes>,
    /// Raised whenever a before-image was added (invariant I6).
    pub(crate) image_epoch: Cell<u64>,
    /// Requests that wait for room.
    pub(crate) throttled: Cell<u64>,
    /// Syncs of the CDP disk that are under way: up to which instant everything had completed before each.
    pub(crate) syncs: RefCell<Vec<Instant>>,
    /// What a clean stop found in some blocks of the primary, for the fence.
    pub(crate) samples: RefCell<Vec<(u64, u32)>>,
    /// Requests of the guest: begun, and ended.
    pub(crate) requests: Cell<(u64, u64)>,
    /// How many had ended when the destager last looked, and when it first saw that many and none under way.
    pub(crate) answered: Cell<(u64, u64)>,
    /// Bytes of the backlog that the destager has as good as done.
    pub(crate) landing: Cell<u64>,
    /// Batches and pieces of reverts since ranges were punched last.
    pub(crate) pieces_since_punch: Cell<u32>,
    /// Only one admin call at a time changes the row of logs.
    pub(crate) admin: Cell<bool>,
    /// A fence is on its way to the state directory.
    pub(crate) fence_busy: Cell<bool>,
    /// The journal is being left in order, with everything on the primary: a disk that fails now changes nothing.
    pub(crate) left_in_order: Cell<bool>,
    /// It is being closed, and everything is on the primary.
    pub(crate) emptied: Cell<bool>,
}

/// A flag that is taken back when this goes.
pub(crate) struct Held<'a>(&'a Cell<bool>, &'a Signal);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.set(false);
        self.1.notify();
    }
}

/// Held by the admin call that changes the row of logs.
pub(crate) struct AdminLock(Option<Rc<Volume>>);

impl AdminLock {
    /// Ends the call but not the lock: a later call of the same work takes it over with [`AdminLock::kept`].
    fn keep(mut self) {
        self.0 = None;
    }

    /// Takes over a lock that was kept.
    fn kept(volume: &Rc<Volume>) -> Self {
        debug_assert!(volume.admin.get());
        Self(Some(Rc::clone(volume)))
    }
}

impl Drop for AdminLock {
    fn drop(&mut self) {
        if let Some(volume) = self.0.take() {
            volume.state.borrow_mut().reverting = None;
            volume.admin.set(false);
            volume.changed.notify();
        }
    }
}

impl Volume {
    pub(crate) fn engine(&self) -> Result<Rc<Engine>> {
        self.engine.upgrade().ok_or_else(|| Error::Gone("the engine has stopped".into()))
    }

    /// Its uuid.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.state.borrow().name.clone()
    }

    /// As something that a frontend serves.
    pub fn export(self: &Rc<Self>) -> Rc<dyn Export> {
        Rc::new(VolumeExport(Rc::clone(self)))
    }

    /// Counters since start.
    pub fn stats(&self) -> VolumeStats {
        let IndexBytes { writes, before } = &*self.index_bytes;
        VolumeStats { index_bytes: writes.get(), before_index_bytes: before.get(), ..*self.stats.borrow() }
    }

    /// Finds a marker.
    pub fn marker(&self, name: &str) -> Option<Marker> {
        self.state.borrow().markers.values().find(|m| m.name == name).cloned()
    }

    /// Open views.
    pub fn views(&self) -> Vec<ViewInfo> {
        self.state.borrow().views.values().map(|v| v.info()).collect()
    }

    pub(crate) fn event(&self, kind: EventKind, message: impl Into<String>) {
        let message = message.into();
        tracing::debug!(volume = %self.id, ?kind, %message);
        if let Some(engine) = self.engine.upgrade() {
            let disk = self.state.borrow().attach.as_ref().map(|a| a.disk.path.clone());
            engine.emit(Event { time_ns: self.host.wall_ns(), volume: Some(self.id), disk, kind, message });
        }
    }

    pub(crate) async fn lock_admin(self: &Rc<Self>) -> AdminLock {
        self.changed.until(|| (!self.admin.replace(true)).then_some(())).await;
        AdminLock(Some(Rc::clone(self)))
    }

    /// Ends when no revert is between its first and its last step: what is asked for at an instant after it must show it.
    pub(crate) async fn until_not_reverting(&self) {
        let over = || {
            let state = self.state.borrow();
            (state.reverting.is_none() || state.mode != Mode::Journal).then_some(())
        };
        self.changed.until(over).await;
    }

    /// Waits for a condition that time alone may change, too: it is looked at every second.
    pub(crate) async fn until_in_time<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        loop {
            let met = self.changed.until(&mut condition);
            futures::pin_mut!(met);
            if let Either::Left((value, _)) = select(met, self.host.sleep(1_000_000_000)).await {
                return value;
            }
        }
    }

    /// The primary's own error, once it has failed for longer than a time.
    pub(crate) fn primary_error(&self, state: &State, patience_ns: u64) -> Option<Error> {
        self.after_patience(&state.primary_failing, patience_ns)
    }

    /// The error of something that has failed for longer than a time.
    pub(crate) fn after_patience(&self, failing: &Option<(u64, Error)>, patience_ns: u64) -> Option<Error> {
        let (since, error) = failing.as_ref()?;
        (self.host.boot_ns().saturating_sub(*since) > patience_ns).then(|| error.clone())
    }

    /// The primary's own error, once it has failed for longer than a guest waits for anything.
    pub(crate) fn primary_error_for_guest(&self, state: &State) -> Option<Error> {
        self.primary_error(state, self.engine.upgrade().map_or(0, |e| e.config().stall_max_ns))
    }

    /// Ends when requests may go on: the volume is not between two ways of serving. As of [`Volume::until_left`] where that is because of a failed CDP disk.
    pub(crate) async fn until_switched(&self) -> Result<()> {
        let switched = || {
            let state = self.state.borrow();
            if state.mode != Mode::Switching {
                return Some(Ok(()));
            }
            // An admin's switch ends by itself when the primary fails for too long, and the journal takes writes again.
            self.primary_error_for_guest(&state).filter(|_| state.disk_failed()).map(Err)
        };
        self.until_in_time(switched).await
    }

    /// Whether a failed CDP disk is being left, or is about to be: what is acked is in memory alone until that is done.
    pub fn is_leaving(&self) -> bool {
        let state = self.state.borrow();
        state.mode != Mode::Closed && state.disk_failed()
    }

    /// Ends when no failed CDP disk is there to be left any more. Where its primary does not take what is in memory alone, the primary's error is the answer, as it is
    /// of a plain disk.
    pub(crate) async fn until_left(&self) -> Result<()> {
        let left = || {
            let state = self.state.borrow();
            match state.disk_failed() {
                true => self.primary_error_for_guest(&state).map(Err),
                false => Some(Ok(())),
            }
        };
        self.until_in_time(left).await
    }

    /// Ends when the volume is not between two ways of serving: a failed disk that is being left, say. Nothing about the journal can be decided
    /// meanwhile. The caller holds the admin lock.
    pub(crate) async fn settled(&self) -> Result<()> {
        let patience = self.engine()?.config().stall_max_ns;
        let done = self.changed.until(|| (self.state.borrow().mode != Mode::Switching).then_some(()));
        futures::pin_mut!(done);
        match select(done, self.host.sleep(patience)).await {
            Either::Left(_) => self.serving(),
            Either::Right(_) => {
                Err(Error::State(format!("volume {:?} is still leaving its failed CDP disk: try again", self.name())))
            }
        }
    }

    /// The state that an admin call needs; names what is in the way otherwise.
    pub(crate) fn serving(&self) -> Result<()> {
        let state = self.state.borrow();
        match state.mode {
            Mode::Refused => {
                Err(Error::State(format!("volume {:?} is not served: {}", state.name, state.health_reason)))
            }
            Mode::Closed => Err(Error::Gone(format!("volume {:?} is closed", state.name))),
            _ => Ok(()),
        }
    }

    /// Acked bytes that are not on the primary yet.
    pub(crate) fn backlog(state: &State) -> u64 {
        state.logs.iter().rev().take_while(|l| !l.state.borrow().sealed).map(|l| l.state.borrow().overlay.bytes()).sum()
    }

    /// Every write at or before this is durable on the primary.
    pub(crate) fn watermark(state: &State) -> Instant {
        let oldest = state.logs.iter().filter_map(|l| l.state.borrow().overlay.oldest()).min();
        oldest.map_or(state.instant_last, Instant::before)
    }

    /// Bytes of CDP disk in use.
    pub(crate) fn used_segments(state: &State) -> u64 {
        state.logs.iter().chain(&state.leaving).map(|l| l.segment_count()).sum()
    }

    /// Everything about it.
    pub fn info(self: &Rc<Self>) -> VolumeInfo {
        let engine = self.engine.upgrade();
        let now = engine.as_ref().map_or(Instant::ZERO, |e| e.clock_now());
        let state = self.state.borrow();
        let segment_size = state.attach.as_ref().map_or(0, |a| a.disk.geometry.segment_size);
        let revert = self.revert_progress();
        // Its guests wait; whatever else is wrong with it is told first.
        let in_journal = state.health == Health::Ok && state.mode == Mode::Journal;
        let waits = engine.filter(|_| in_journal).and_then(|e| e.state_failing());
        VolumeInfo {
            id: self.id,
            name: state.name.clone(),
            size: state.size,
            primary_size: self.primary.current_size().unwrap_or(0),
            path: state.path.clone(),
            settings: state.settings,
            state: if state.on { CdpState::On } else { CdpState::Off },
            health: if waits.is_some() { Health::StateFailing } else { state.health },
            health_reason: waits.unwrap_or_else(|| state.health_reason.clone()),
            cdp_create_time_ns: state.created_ns,
            logs: self.log_infos(&state),
            markers: state.markers.values().cloned().collect(),
            // Of a failed disk nothing can be viewed, also while it is still being left.
            coverage: if state.mode == Mode::Switching && state.disk_failed() {
                Vec::new()
            } else {
                Self::coverage(&state)
            },
            used_bytes: Self::used_segments(&state) * segment_size,
            backlog_bytes: Self::backlog(&state),
            revert,
            held: state.held,
            clients: state.clients.values().filter(|c| c.writable).count() as u32,
            window_forecast_s: Self::window_forecast(&state, self.host.wall_ns()),
            now,
        }
    }

    /// The fence as it should read now, in a given state.
    pub(crate) fn make_fence(&self, state: &State, fence_state: FenceState, disk: Uuid, reason: &str) -> Fence {
        let identity = self.primary.identity().unwrap_or_default();
        Fence {
            disk,
            generation: state.generation,
            state: fence_state,
            primary_size: self.primary.current_size().unwrap_or(0),
            primary_id: identity.id,
            primary_mtime_ns: if fence_state == FenceState::Clean { identity.mtime_ns } else { 0 },
            primary_samples: if fence_state == FenceState::Clean { self.samples.borrow().clone() } else { Vec::new() },
            disk_clock_ns: {
                let disks = self.engine.upgrade().map(|e| e.disk_list()).unwrap_or_default();
                disks.iter().find(|d| d.id == disk).map_or(0, |d| d.clock_high_water().0)
            },
            // With a journal the disk knows better; ahead of it, so that no seq is used twice even when that disk is lost.
            next_seq: state.next_seq + if fence_state == FenceState::Detached { 0 } else { SEQS_AHEAD },
            settings: state.settings,
            on: state.on,
            held: state.told_held(),
            created_ns: state.created_ns,
            lost_blocks: {
                let mut lost = state.lost_blocks.clone().unwrap_or_default();
                for block in state.stale_blocks.keys() {
                    lost.insert(*block);
                }
                ranges(&lost)
            },
            reason: reason.chars().take(200).collect(),
        }
    }

    /// Some blocks of the primary and their checksums: those that [`SAMPLED`] names, and the last one. What cannot be read is left out.
    pub(crate) async fn sample_primary(&self) -> Vec<(u64, u32)> {
        let blocks = self.primary_bytes.get().div_ceil(BLOCK);
        let wanted: BTreeSet<u64> =
            SAMPLED.into_iter().filter(|block| *block < blocks).chain(blocks.checked_sub(1)).collect();
        let read =
            wanted.into_iter().map(|block| async move { Some((block, crc(&self.read_old(block, 1).await.ok()?))) });
        join_all(read).await.into_iter().flatten().collect()
    }

    /// Tells the fence of lost blocks that were overwritten, before the overwrite is acked or forgotten.
    pub(crate) async fn store_lost_blocks(&self) -> Result<()> {
        {
            let state = self.state.borrow();
            // Not while somebody else is still telling it.
            let told = state.fence.as_ref().is_none_or(|fence| fence.lost_blocks.is_empty());
            if !state.lost_changed && state.lost_blocks.is_none() && told {
                return Ok(());
            }
        }
        let _order = self.fence_order().await;
        // Of a volume that was closed meanwhile the fence is another's by now.
        if self.state.borrow().mode == Mode::Closed
            || !std::mem::replace(&mut self.state.borrow_mut().lost_changed, false)
        {
            return Ok(());
        }
        {
            let mut state = self.state.borrow_mut();
            if state.lost_blocks.as_ref().is_some_and(Touched::is_empty) {
                state.lost_blocks = None;
                if state.health == Health::RevertIncomplete {
                    let offline = state.on && state.attach.is_none();
                    state.health = if offline { Health::Offline } else { Health::Ok };
                    state.health_reason.clear();
                }
            }
        }
        let result = self.store_lost_in_order().await;
        self.state.borrow_mut().lost_changed |= result.is_err();
        result
    }

    /// The same for a guest, whose ack waits for it. A state directory that cannot be written costs it time, as everywhere; what its own primary answers
    /// is its own.
    pub(crate) async fn store_lost_for_guest(&self) -> Result<()> {
        let mut pause = 10_000_000;
        let goes_on =
            || self.state.borrow().mode != Mode::Closed && self.engine().is_ok_and(|engine| !engine.stopping());
        loop {
            match self.store_lost_blocks().await {
                Err(Error::Device { op: WRITE_FENCE, .. }) if goes_on() => {
                    self.host.sleep(pause).await;
                    pause = (pause * 2).min(1_000_000_000);
                }
                stored => return stored,
            }
        }
    }

    /// A block that was overwritten leaves the fence only when what overwrote it is durable: a power cut must not bring back what was there before.
    async fn store_lost_in_order(&self) -> Result<()> {
        let (fence, journal) = {
            let state = self.state.borrow();
            let Some(old) = &state.fence else { return Ok(()) };
            let fence = self.make_fence(&state, old.state, old.disk, &old.reason);
            let journal = state.attach.as_ref().filter(|_| state.mode != Mode::Direct);
            (fence, journal.map(|a| (Rc::clone(&a.disk), state.instant_last)))
        };
        match journal {
            Some((disk, upto)) => {
                self.sync_journal(&disk, upto).await?;
                // A before-image carries no instant: one that says of a block that it was lost may have completed behind that.
                self.sync_completed(&disk).await?;
            }
            None => self.primary.sync().await.map_err(|e| Error::device("sync", self.path(), &e))?,
        }
        self.put_made_fence(fence).await
    }

    /// Makes a fence durable. One after the other: the last call's is the one that stays.
    pub(crate) async fn put_fence(&self, fence_state: FenceState, disk: Uuid, reason: &str) -> Result<()> {
        let _order = self.fence_order().await;
        self.put_fence_in_order(fence_state, disk, reason).await
    }

    /// Lets the fence of a journal know the switch, the hold and the settings as they are. It must not revive an attachment that ended while this waited: asked for
    /// when nobody else writes the fence.
    pub(crate) async fn refence(&self) -> Result<()> {
        let _order = self.fence_order().await;
        let (disk, fence) = {
            let state = self.state.borrow();
            let current = |f: &Fence| (f.on, f.held, f.settings) == (state.on, state.told_held(), state.settings);
            let attached = state.attach.as_ref().filter(|a| state.mode == Mode::Journal && a.disk.failure().is_none());
            let Some(attach) = attached.filter(|_| !state.fence.as_ref().is_some_and(current)) else { return Ok(()) };
            let fence = self.make_fence(&state, FenceState::Dirty, attach.disk.id, "");
            (Rc::clone(&attach.disk), fence)
        };
        if self.state.borrow().lost_changed {
            // As in `store_lost_in_order`: what is not in it any more must be durable first.
            self.sync_completed(&disk).await?;
        }
        self.put_made_fence(fence).await
    }

    async fn fence_order(&self) -> Held<'_> {
        self.changed.until(|| (!self.fence_busy.replace(true)).then_some(())).await;
        Held(&self.fence_busy, &self.changed)
    }

    async fn put_fence_in_order(&self, fence_state: FenceState, disk: Uuid, reason: &str) -> Result<()> {
        let fence = self.make_fence(&self.state.borrow(), fence_state, disk, reason);
        self.put_made_fence(fence).await
    }

    async fn put_made_fence(&self, fence: Fence) -> Result<()> {
        self.engine()?
            .store()
            .put_fence(self.id, Some(fence.clone()))
            .await
            .map_err(|e| Error::device(WRITE_FENCE, self.name(), &e))?;
        self.state.borrow_mut().fence = Some(fence);
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let state = self.state.borrow();
        check_range(offset, len, state.size)
    }

    fn connect(self: &Rc<Self>, writable: bool, on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard> {
        self.serving()?;
        let mut state = self.state.borrow_mut();
        if (state.reverting.is_some() || state.turning_away) && writable {
            return Err(Error::State(format!("volume {:?} is being reverted: try again", state.name)));
        }
        if state.held {
            return Err(Error::State(format!(
                "volume {:?} is held after a forced revert: `release` lets clients in again",
                state.name
            )));
        }
        let id = state.client_next;
        state.client_next += 1;
        state.clients.insert(id, Client { writable, on_disconnect: Some(on_disconnect) });
        let volume = Rc::clone(self);
        Ok(ClientGuard::new(move || {
            volume.state.borrow_mut().clients.remove(&id);
            volume.changed.notify();
        }))
    }

    /// Asks every client to go.
    pub(crate) fn disconnect_all(&self) {
        let calls: Vec<_> = {
            let mut state = self.state.borrow_mut();
            state.clients.values_mut().filter_map(|c| c.on_disconnect.take()).collect()
        };
        for call in calls {
            call();
        }
    }
}

/// Refuses what is no whole sectors or lies outside.
pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<()> {
    if len == 0 {
        return Err(Error::invalid("length", len, "at least 512 bytes"));
    }
    if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
        return Err(Error::invalid("offset and length", format!("{offset}+{len}"), "multiples of 512 bytes"));
    }
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => {
            Err(Error::invalid("offset + length", format!("{offset}+{len}"), format!("at most the size, {size} bytes")))
        }
    }
}

/// Blocks that bytes `[offset, offset + len)` touch: the first, and how many.
pub(crate) fn blocks_of(offset: u64, len: u64) -> (u64, u64) {
    let first = offset / BLOCK;
    (first, (offset + len).div_ceil(BLOCK) - first)
}

/// Sectors that make a block whole; less than eight for the last one of a volume that ends inside it.
pub(crate) fn whole_mask(size: u64, block: u64) -> u8 {
    let sectors = (size / SECTOR).saturating_sub(block * SECTORS_PER_BLOCK);
    if sectors >= SECTORS_PER_BLOCK { 0xFF } else { (1u8 << sectors) - 1 }
}

/// A set as ranges.
fn ranges(set: &Touched) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for block in set.iter() {
        match out.last_mut() {
            Some((start, count)) if *start + *count == block => *count += 1,
            _ => out.push((block, 1)),
        }
    }
    out
}

struct VolumeExport(Rc<Volume>);

/// A request of the guest. Two counts and no look at a clock: the destager asks for them, the request leaves nothing else behind.
struct Request(Rc<Volume>);

impl Request {
    fn of(volume: &Rc<Volume>) -> Self {
        let (begun, ended) = volume.requests.get();
        volume.requests.set((begun + 1, ended));
        Self(Rc::clone(volume))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let (begun, ended) = self.0.requests.get();
        self.0.requests.set((begun, ended + 1));
    }
}

impl Export for VolumeExport {
    fn size(&self) -> u64 {
        self.0.state.borrow().size
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<Vec<Slice>>> {
        let request = Request::of(&self.0);
        Box::pin(async move { request.0.read(offset, len).await })
    }
    fn begin_write(&self) -> ClientGuard {
        let volume = Rc::clone(&self.0);
        volume.state.borrow_mut().writes_inflight += 1;
        ClientGuard::new(move || volume.state.borrow_mut().writes_inflight -= 1)
    }
    fn write(&self, offset: u64, len: u32, data: IoBuf, fua: bool) -> LocalFuture<'static, Result<()>> {
        let request = Request::of(&self.0);
        Box::pin(async move { request.0.write(offset, len, data, fua).await })
    }
    fn write_zeroes(&self, offset: u64, len: u32, no_hole: bool, fua: bool) -> LocalFuture<'static, Result<()>> {
        let request = Request::of(&self.0);
        Box::pin(async move { request.0.write_zeroes(offset, len, no_hole, fua).await })
    }
    fn trim(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<()>> {
        let request = Request::of(&self.0);
        Box::pin(async move { request.0.trim(offset, len).await })
    }
    fn flush(&self) -> LocalFuture<'static, Result<()>> {
        let request = Request::of(&self.0);
        Box::pin(async move { request.0.flush().await })
    }
    fn status(&self, offset: u64, len: u64) -> LocalFuture<'static, Result<Vec<BlockStatus>>> {
        let volume = Rc::clone(&self.0);
        Box::pin(async move { volume.status(offset, len).await })
    }
    fn connect(&self, writable: bool, on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard> {
        self.0.connect(writable, on_disconnect)
    }
}
