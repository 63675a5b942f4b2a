//! The engine's front door: one shard's CDP disks and volumes, and what a frontend serves.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use futures::future::{Either, join_all, select};
use uuid::Uuid;

use crate::buf::{IoBuf, Slice};
use crate::clock::{HostClock, RESERVE_AHEAD_NS};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::fence::{Fence, FenceState};
use crate::host::{Device, Host, LocalFuture, StateStore};
use crate::index::{PageCache, Touched};
use crate::info::*;
use crate::mutation::{Mutation, active};
use crate::signal::Signal;
use crate::types::Instant;
use crate::view::View;
use crate::volume::{self, AdminLock, DRAIN_PATIENCE_NS, Mode, Volume};

/// Bounds and defaults of an engine (one per shard).
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most bytes acked and not destaged, per volume.
    pub backlog_bytes_max: u64,
    /// Most blocks of data that the destager takes at once; up to three such batches are under way at a time.
    pub destage_blocks_max: u64,
    /// Most frames of a volume's writes that are on their way to the CDP disk at once: so many while no more writes than that are in flight, else two.
    pub frames_in_flight_max: usize,
    /// Blocks of payload with which a frame goes while another is on its way, however many writes are in flight: each frame costs a block of header.
    pub frame_company_blocks: u32,
    /// Up to so many writes in flight a frame also goes beside another with half of them in it: their latency counts for more than the headers then.
    pub few_writes: usize,
    /// How many flushes in a row, each after as many writes as the one before, until the next is expected and its sync begins ahead of it.
    pub flush_habit: u32,
    /// Longest time that a guest request waits for any CDP-disk operation, nanoseconds.
    pub stall_max_ns: u64,
    /// Time between automatic markers, seconds.
    pub marker_interval_s: u64,
    /// Settings that `enable` gives to a volume that has none.
    pub default_settings: Settings,
    /// The sum of reservations may exceed the disk.
    pub overcommit: bool,
    /// A flush waits for the primary too (`durability = "both"`).
    pub flush_primary: bool,
    /// Bytes of cached index pages.
    pub index_cache_bytes: u64,
    /// Bytes of sets, in memory, of the blocks that sealed logs touched; beyond it the oldest logs are asked by their index.
    pub touched_bytes_max: u64,
    /// Most bytes of scratch of a writable view.
    pub scratch_bytes_max: u64,
    /// Most views of a volume.
    pub views_max: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            backlog_bytes_max: 64 << 20,
            // 8 MiB: enough to sort well, little enough to hold in memory several times.
            destage_blocks_max: 2048,
            frames_in_flight_max: 4,
            // A block of header to 20 of payload: 5 % at the most.
            frame_company_blocks: 20,
            few_writes: 16,
            flush_habit: 3,
            stall_max_ns: 5_000_000_000,
            marker_interval_s: 60,
            default_settings: Settings {
                reserve_capacity: 30 << 30,
                reserve_duration_s: 86400,
                priority: Priority::Mid,
            },
            overcommit: false,
            flush_primary: false,
            index_cache_bytes: 64 << 20,
            touched_bytes_max: 64 << 20,
            scratch_bytes_max: 1 << 30,
            views_max: 64,
        }
    }
}

/// What a new CDP disk is to be.
#[derive(Clone, Copy, Debug)]
pub struct InitOptions {
    /// Bytes of a segment: a power of two, 1 MiB to 256 MiB. 0: chosen by the disk's size.
    pub segment_size: u64,
    /// Overwrite a superblock that is there.
    pub force: bool,
}

/// A volume to be served.
pub struct VolumeSpec {
    /// Its uuid.
    pub id: Uuid,
    /// Its name, for people.
    pub name: String,
    /// Path, for people.
    pub path: String,
    /// Bytes the guest sees; 0: the primary's size rounded down to a sector.
    pub size: u64,
    /// Where its bytes live.
    pub primary: Rc<dyn Device>,
    /// What the state directory says.
    pub fence: Option<Fence>,
    /// The admin's named override of `needs_journal`, `primary_changed` or `revert_incomplete`: where that is what the volume's state is, it goes on with
    /// the primary as it is, and the journal of the fence's generation is never redone, or the lost blocks of a revert show what they held before. Where
    /// it is another state, or the journal is there after all, it changes nothing.
    pub accept: Option<Health>,
    /// The admin's named decision to take over the journal that a CDP disk has of this volume, though this host has no fence for it: the disk was moved
    /// here, or the state directory was lost. Where there is a fence, that the primary is the one it names, whatever its identity is now. Without such a journal
    /// it changes nothing.
    pub attach_journal: bool,
    /// Groups whose revert was begun and never decided ([`crate::group`]): theirs do not count.
    pub undecided_reverts: Vec<Uuid>,
}

/// What `revert` is asked for.
#[derive(Clone, Copy, Debug)]
pub struct RevertRequest {
    /// Back to.
    pub target: Instant,
    /// Disconnect clients and hold the export until `release`.
    pub force: bool,
    /// Release the export at once.
    pub release: bool,
    /// Change nothing, only report.
    pub dry_run: bool,
}

/// A wall clock that moves by more than this against the boot clock has stepped.
const CLOCK_STEP_NS: u64 = 3600 * 1_000_000_000;
/// A lead of the clock up to this is waited for at start.
const LEAD_WAIT_MAX_NS: u64 = 4 * RESERVE_AHEAD_NS;
/// How often a stop looks whether a volume's clients have left, nanoseconds.
const CLIENTS_LOOK_NS: u64 = 2_000_000;

/// One shard's CDP disks and volumes.
pub struct Engine {
    host: Rc<dyn Host>,
    clock: Arc<HostClock>,
    store: Rc<dyn StateStore>,
    config: EngineConfig,
    events: Box<dyn Fn(Event)>,
    disks: RefCell<Vec<Rc<Disk>>>,
    volumes: RefCell<BTreeMap<Uuid, Rc<Volume>>>,
    /// Volumes that are being opened: of one whose primary hangs that may take for ever.
    opening: RefCell<BTreeSet<Uuid>>,
    cache: Rc<RefCell<PageCache>>,
    raising: Cell<bool>,
    raised: Signal,
    clock_ready: Cell<bool>,
    /// How long the last raise took.
    raise_took_ns: Cell<u64>,
    /// Since when (boot clock) the state directory takes no mark, and its error.
    mark_failing: RefCell<Option<(u64, String)>>,
    /// That was told.
    mark_failing_told: Cell<bool>,
    /// Wall and boot clock when the engine began: age runs on the boot clock from there.
    began: (u64, u64),
    step_told: Cell<bool>,
    /// When a stop was announced, on the boot clock.
    stops_since: Cell<Option<u64>>,
    /// Volumes that are being closed; whoever asked for it, a stop waits for them.
    closing: Cell<usize>,
    /// How closing one of them failed since a stop was announced.
    not_closed: RefCell<Option<Error>>,
    closed: Signal,
}

impl Drop for Engine {
    /// An engine that is dropped without a stop (a simulated crash) leaves nothing behind: views hold their volume, and it holds them.
    fn drop(&mut self) {
        for volume in self.volumes.borrow().values() {
            let views = std::mem::take(&mut volume.state.borrow_mut().views);
            let clients = std::mem::take(&mut volume.state.borrow_mut().clients);
            drop((views, clients));
        }
    }
}

impl Engine {
    /// `events` is called on the engine's thread for each state change and must not block.
    pub fn new(
        host: Rc<dyn Host>,
        clock: Arc<HostClock>,
        store: Rc<dyn StateStore>,
        config: EngineConfig,
        events: Box<dyn Fn(Event)>,
    ) -> Rc<Engine> {
        let began = (host.wall_ns(), host.boot_ns());
        Rc::new(Engine {
            cache: Rc::new(RefCell::new(PageCache::new(config.index_cache_bytes as usize))),
            host,
            clock,
            store,
            config,
            events,
            disks: RefCell::default(),
            volumes: RefCell::default(),
            opening: RefCell::default(),
            raising: Cell::new(false),
            raised: Signal::default(),
            clock_ready: Cell::new(false),
            raise_took_ns: Cell::new(0),
            mark_failing: RefCell::default(),
            mark_failing_told: Cell::new(false),
            began,
            step_told: Cell::new(false),
            stops_since: Cell::new(None),
            closing: Cell::new(0),
            not_closed: RefCell::default(),
            closed: Signal::default(),
        })
    }

    /// The agent is about to stop: what waits for the state directory to work again is answered with its error instead, so that clients can be drained.
    pub fn will_stop(&self) {
        let since = self.stops_since.get().unwrap_or_else(|| self.host.boot_ns());
        self.stops_since.set(Some(since));
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stops_since.get().is_some()
    }

    /// Whether a stop was announced so long ago, nanoseconds.
    pub(crate) fn stopping_for(&self, ns: u64) -> bool {
        self.stops_since.get().is_some_and(|since| self.host.boot_ns().saturating_sub(since) > ns)
    }

    /// Writes an empty superblock, clock and segment table. Needs no engine.
    pub async fn init_disk(device: Rc<dyn Device>, options: InitOptions, id: Uuid, created_ns: u64) -> Result<()> {
        Disk::init(&device, options, id, created_ns).await
    }

    /// Opens a CDP disk; `path` is for people. The clock is raised past the disk's high-water mark.
    pub async fn add_disk(self: &Rc<Self>, device: Rc<dyn Device>, path: String) -> Result<DiskInfo> {
        let number = self.disks.borrow().len() as u32;
        let host = Rc::clone(&self.host);
        let disk = Disk::open(device, path, host, self.config.stall_max_ns, Rc::clone(&self.cache), number).await?;
        // A disk that failed and came back is opened anew; the failed one is forgotten.
        if self.disks.borrow().iter().any(|d| d.id == disk.id && d.failure().is_none()) {
            return Err(Error::Exists { what: "CDP disk", name: disk.id.to_string() });
        }
        self.clock.past(disk.clock_high_water());
        let info = disk.info();
        self.host.spawn(Box::pin(feed_starving(Rc::downgrade(self), Rc::downgrade(&disk))));
        let mut disks = self.disks.borrow_mut();
        disks.retain(|d| d.id != disk.id);
        disks.push(disk);
        Ok(info)
    }

    /// What `disk list` shows.
    pub fn disks(&self) -> Vec<DiskInfo> {
        self.disks.borrow().iter().map(|d| d.info()).collect()
    }

    /// The paths of the disks here that have history of a volume, open or not.
    pub fn disks_with(&self, volume: Uuid) -> Vec<String> {
        let disks = self.disks.borrow();
        disks.iter().filter(|d| !d.segments_of(volume).is_empty()).map(|d| d.path.clone()).collect()
    }

    pub(crate) fn disk_list(&self) -> Vec<Rc<Disk>> {
        self.disks.borrow().clone()
    }

    /// A healthy disk with the most room for a volume; `bytes`: that many must be unreserved (unless overcommitted).
    pub(crate) fn pick_disk(&self, volume: Uuid, bytes: Option<u64>) -> Option<Rc<Disk>> {
        let room = |d: &Rc<Disk>| d.room_for(volume);
        let disks = self.disks.borrow();
        let fits =
            |d: &&Rc<Disk>| d.failure().is_none() && bytes.is_none_or(|b| self.config.overcommit || room(d) >= b);
        disks.iter().filter(fits).max_by_key(|d| room(d)).cloned()
    }

    /// Recovers a volume (whatever its last stop was) and serves it. In a state that forbids serving (`NeedsJournal` and the like) it answers Ok, the
    /// volume's `health` says so, and its I/O is refused. With a primary that hangs it does not end; meanwhile the volume cannot be opened again.
    pub async fn open_volume(self: &Rc<Self>, spec: VolumeSpec) -> Result<Rc<Volume>> {
        if self.volumes.borrow().contains_key(&spec.id) {
            return Err(Error::Exists { what: "volume", name: spec.id.to_string() });
        }
        let id = spec.id;
        if !self.opening.borrow_mut().insert(id) {
            return Err(Error::State(format!("volume {:?} is still being opened: its primary hangs", spec.name)));
        }
        let opened = volume::open(self, spec).await;
        self.opening.borrow_mut().remove(&id);
        let volume = opened?;
        self.volumes.borrow_mut().insert(id, Rc::clone(&volume));
        Ok(volume)
    }

    /// Stops one volume: drains, records the clean state, forgets it. Its history stays on the CDP disk. With a primary that hangs it ends once the engine is
    /// stopped, with an error.
    pub async fn close_volume(self: &Rc<Self>, id: Uuid) -> Result<()> {
        let unknown = || Error::NotFound { what: "volume", name: id.to_string() };
        let volume = self.volume(id).ok_or_else(unknown)?;
        self.closing.set(self.closing.get() + 1);
        // Whoever has the lock may need to find the volume, to give it back: a group's revert goes by ids from step to step.
        let (mine, result) = match volume.unless_hanging(volume.lock_admin()).await {
            Ok(lock) => {
                let mine = self.volume(id).is_some_and(|found| Rc::ptr_eq(&found, &volume));
                match mine.then(|| self.volumes.borrow_mut().remove(&id)) {
                    Some(_) => (true, volume.close(lock).await),
                    None => (false, Err(unknown())),
                }
            }
            Err(hangs) => (true, Err(hangs)),
        };
        self.closing.set(self.closing.get() - 1);
        if let (Err(error), true) = (&result, mine && self.stopping()) {
            self.not_closed.borrow_mut().get_or_insert_with(|| error.clone());
        }
        self.closed.notify();
        result
    }

    /// A volume by id.
    pub fn volume(&self, id: Uuid) -> Option<Rc<Volume>> {
        self.volumes.borrow().get(&id).cloned()
    }

    /// All volumes.
    pub fn volumes(&self) -> Vec<Rc<Volume>> {
        self.volumes.borrow().values().cloned().collect()
    }

    /// A view of any volume by id.
    pub fn view(&self, id: Uuid) -> Option<Rc<View>> {
        self.volumes.borrow().values().find_map(|v| v.state.borrow().views.get(&id).cloned())
    }

    /// Drains everything and records the clean state.
    pub async fn stop(self: &Rc<Self>) -> Result<()> {
        self.will_stop();
        let ids: Vec<_> = self.volumes.borrow().keys().copied().collect();
        join_all(ids.into_iter().map(|id| self.close_volume(id))).await;
        self.until_closed().await
    }

    /// The same, and each volume is closed as soon as its own clients have left: none waits for the disks of others. Clients that have not left after
    /// `patience_ns` are disconnected.
    pub async fn stop_after_clients(self: &Rc<Self>, patience_ns: u64) -> Result<()> {
        self.will_stop();
        let closed = self.volumes().into_iter().map(|volume| async move {
            volume.until_clients_left(patience_ns).await;
            let _ = self.close_volume(volume.id).await; // what failed is in `not_closed`
        });
        join_all(closed).await;
        self.until_closed().await
    }

    async fn until_closed(&self) -> Result<()> {
        // Also those that somebody else closes: what is acked may be in their memory alone.
        self.closed.until(|| (self.closing.get() == 0).then_some(())).await;
        self.not_closed.take().map_or(Ok(()), Err)
    }

    pub(crate) fn host(&self) -> &Rc<dyn Host> {
        &self.host
    }

    pub(crate) fn config(&self) -> &EngineConfig {
        &self.config
    }

    pub(crate) fn store(&self) -> &Rc<dyn StateStore> {
        &self.store
    }

    pub(crate) fn clock(&self) -> &HostClock {
        &self.clock
    }

    pub(crate) fn emit(&self, event: Event) {
        (self.events)(event);
    }

    // -- the clock -----------------------------------------------------------------------------------------------------

    /// A new instant at once, or `None` when the mark must be raised first. That is begun: whoever does without an instant for now, as the rounds of an idle
    /// volume do, finds one later.
    pub(crate) fn try_tick(self: &Rc<Self>) -> Option<Instant> {
        if !self.clock_ready.get() {
            return None;
        }
        let instant = self.clock.tick(self.host.wall_ns());
        // Raised ahead of need, so that the guest seldom waits for it.
        let low = instant.is_none_or(|i| i.0 + RESERVE_AHEAD_NS / 2 >= self.clock.high_water().0);
        if low && !self.raising.get() {
            let engine = Rc::clone(self);
            self.host.spawn(Box::pin(async move {
                let _ = engine.raise_clock().await; // whoever needs an instant raises it again
            }));
        }
        instant
    }

    /// A new instant. Volumes of other shards get theirs from the same clock.
    ///
    /// # Errors
    /// The state directory takes no mark, and a stop was announced.
    pub async fn tick(self: &Rc<Self>) -> Result<Instant> {
        loop {
            if let Some(instant) = self.try_tick() {
                return Ok(instant);
            }
            self.raise_clock().await?;
        }
    }

    /// An instant after every write acked so far.
    pub(crate) fn clock_now(self: &Rc<Self>) -> Instant {
        self.try_tick().unwrap_or_else(|| self.clock.previous())
    }

    /// Makes a higher mark durable on each healthy CDP disk and in the state directory. Callers that come while one runs wait for it.
    ///
    /// # Errors
    /// The state directory takes none, and a stop was announced: until then it is tried again and again.
    pub(crate) async fn raise_clock(self: &Rc<Self>) -> Result<()> {
        if self.raising.replace(true) {
            self.raised.until(|| (!self.raising.get()).then_some(())).await;
            return self.mark_given_up();
        }
        if !self.clock_ready.get() {
            // After a crash the mark lies a little ahead of the wall clock: a short lead is waited for, so that instants agree with everybody's clocks.
            let lead = self.clock.lead_ns(self.host.wall_ns());
            if lead > 0 && lead <= LEAD_WAIT_MAX_NS {
                self.host.sleep(lead).await;
            } else if lead > LEAD_WAIT_MAX_NS {
                self.emit(Event {
                    time_ns: self.host.wall_ns(),
                    volume: None,
                    disk: None,
                    kind: EventKind::ClockLead,
                    message: format!("instants run {} s ahead of the wall clock", lead / 1_000_000_000),
                });
            }
            self.clock_ready.set(true);
        }
        let now = self.host.wall_ns().max(self.clock.previous().0);
        // Slow disks: the mark must still lie ahead when it is durable.
        let began = self.host.boot_ns();
        let mark = Instant(now + RESERVE_AHEAD_NS.max(4 * self.raise_took_ns.get()));
        let disks = self.disk_list();
        // A disk that fails here is latched, and leaves by its own way.
        let skip = active(Mutation::ClockPastMark);
        join_all(disks.iter().filter(|d| d.failure().is_none() && !skip).map(|d| d.put_clock(mark))).await;
        let disks_took_ns = self.host.boot_ns().saturating_sub(began);
        let stored = if skip { Ok(0) } else { self.store_mark(mark).await };
        if let Ok(took_ns) = &stored {
            self.raise_took_ns.set(disks_took_ns + took_ns);
            self.clock.raised(mark);
        }
        self.raising.set(false);
        self.raised.notify();
        stored.map(|_| ())
    }

    /// Makes a mark durable in the state directory. Answers how long that took the directory, without the times that it failed: they say nothing of the next mark.
    async fn store_mark(&self, mark: Instant) -> Result<u64> {
        let mut pause = 10_000_000;
        let mut began = self.host.boot_ns();
        while let Err(error) = self.store.put_clock(mark).await {
            tracing::error!(%error, "clock: the state directory does not take the high-water mark");
            self.note_mark_failing(&error);
            self.mark_given_up()?;
            self.host.sleep(pause).await;
            pause = (pause * 2).min(1_000_000_000);
            began = self.host.boot_ns();
        }
        self.mark_failing.replace(None);
        if self.mark_failing_told.replace(false) {
            self.tell_state(EventKind::StateRecovered, "the state directory takes the clock's mark again".into());
        }
        Ok(self.host.boot_ns().saturating_sub(began))
    }

    fn note_mark_failing(&self, error: &std::io::Error) {
        let since = self.mark_failing.borrow().as_ref().map_or_else(|| self.host.boot_ns(), |(since, _)| *since);
        self.mark_failing.replace(Some((since, error.to_string())));
        if let Some(reason) = self.state_failing()
            && !self.mark_failing_told.replace(true)
        {
            self.tell_state(EventKind::StateFailing, reason);
        }
    }

    fn tell_state(&self, kind: EventKind, message: String) {
        self.emit(Event { time_ns: self.host.wall_ns(), volume: None, disk: None, kind, message });
    }

    /// The error of all who wait for a mark that the state directory does not take, once a stop was announced: what they hold is needed to stop.
    fn mark_given_up(&self) -> Result<()> {
        match &*self.mark_failing.borrow() {
            Some((_, error)) if self.stopping() => Err(Error::Gone(format!(
                "the agent is stopping, and its state directory takes no mark of the clock: {error}"
            ))),
            _ => Ok(()),
        }
    }

    /// Why writes wait for the state directory, once they may have waited for longer than for any disk.
    pub fn state_failing(&self) -> Option<String> {
        let failing = self.mark_failing.borrow();
        let (since, error) = failing.as_ref()?;
        let long = self.host.boot_ns().saturating_sub(*since) > self.config.stall_max_ns;
        long.then(|| format!("the state directory takes no mark of the clock, and writes wait for it: {error}"))
    }

    /// The wall clock for ages: it runs on the boot clock, so a step of the wall clock ages nothing.
    pub(crate) fn age_now_ns(&self) -> u64 {
        self.began.0 + self.host.boot_ns().saturating_sub(self.began.1)
    }

    /// The same, or `None` while the wall clock has stepped: eviction by age is paused then.
    pub(crate) fn age_for_eviction_ns(&self) -> Option<u64> {
        let age = self.age_now_ns();
        let stepped = self.host.wall_ns().abs_diff(age) > CLOCK_STEP_NS;
        if stepped && !self.step_told.get() {
            self.emit(Event {
                time_ns: self.host.wall_ns(),
                volume: None,
                disk: None,
                kind: EventKind::ClockStep,
                message: "the wall clock stepped: eviction by age is paused".into(),
            });
        }
        self.step_told.set(stepped);
        (!stepped).then_some(age)
    }
}

/// With `overcommit` the pool may run empty: then the volume furthest over its fair share loses its oldest log.
async fn feed_starving(engine: Weak<Engine>, disk: Weak<Disk>) {
    loop {
        let Some(starving) = disk.upgrade() else { return };
        if starving.until_starving().await.is_err() {
            return;
        }
        let Some(engine) = engine.upgrade() else { return };
        let share = |v: &Rc<Volume>| v.share_of(&starving);
        let volumes = engine.volumes();
        let worst = volumes
            .iter()
            .filter(|v| v.can_lose_oldest(&starving))
            .max_by(|a, b| share(a).partial_cmp(&share(b)).unwrap_or(std::cmp::Ordering::Equal));
        if let Some(volume) = worst {
            volume.lose_oldest();
        }
        engine.host.sleep(20_000_000).await;
    }
}

impl Volume {
    /// Whether a client has it or one of its views open.
    fn has_clients(&self) -> bool {
        let state = self.state.borrow();
        !state.clients.is_empty() || state.views.values().any(|view| view.has_clients())
    }

    /// Ends when it has no clients any more, or after so long.
    async fn until_clients_left(&self, patience_ns: u64) {
        let left = async {
            while self.has_clients() {
                self.host.sleep(CLIENTS_LOOK_NS).await;
            }
        };
        select(pin!(left), self.host.sleep(patience_ns)).await;
    }

    /// What a step of a close answers; an error once a stop was announced and the primary answers nothing for [`DRAIN_PATIENCE_NS`]. The fence stays as it is
    /// then, and the next start redoes.
    async fn unless_hanging<T>(&self, step: impl Future<Output = T>) -> Result<T> {
        let hangs = async {
            loop {
                self.primary.until_hanging(DRAIN_PATIENCE_NS).await;
                // Nothing but a stop gives up: with its CDP disk failed, what is acked may be in memory alone.
                if self.engine.upgrade().is_none_or(|engine| engine.stopping()) {
                    break;
                }
            }
        };
        match select(pin!(step), pin!(hangs)).await {
            Either::Left((answer, _)) => Ok(answer),
            Either::Right(_) => {
                let message = "it hangs, and was not waited for any longer".to_owned();
                Err(Error::Device { op: "close", device: self.path(), message, errno: 110 })
            }
        }
    }

    /// Drains, records the clean state, stops. With a primary that fails the fence stays dirty, and the next start redoes.
    pub(crate) async fn close(self: &Rc<Self>, _lock: AdminLock) -> Result<()> {
        self.disconnect_all();
        let (mode, disk) = {
            let mut state = self.state.borrow_mut();
            let mode = state.mode;
            if mode == Mode::Journal {
                state.mode = Mode::Switching;
            }
            (mode, state.attach.as_ref().map(|a| Rc::clone(&a.disk)))
        };
        let ended = self.unless_hanging(self.bring_to_rest(mode, disk)).await;
        let hangs = ended.is_err();
        let mut result = ended.unwrap_or_else(Err);
        let views: Vec<_> = std::mem::take(&mut self.state.borrow_mut().views).into_values().collect();
        for view in views {
            view.lose("the agent stopped");
        }
        {
            let mut state = self.state.borrow_mut();
            state.mode = Mode::Closed;
            state.attach = None;
        }
        self.kick.notify();
        self.work.notify();
        self.changed.notify();
        if !hangs {
            let tasks_ended = self.changed.until(|| {
                let state = self.state.borrow();
                (!state.appender_running && !state.destager_running).then_some(())
            });
            result = result.and(self.unless_hanging(tasks_ended).await);
        }
        // Left behind where a disk failed while this was under way: nobody else answers those who wait for them.
        let left = self.state.borrow_mut().take_tickets();
        for ticket in left {
            ticket.finish(Err(Error::Gone("the volume is closed".into())));
        }
        result
    }

    /// Brings everything to where the next start looks for it.
    async fn bring_to_rest(self: &Rc<Self>, mode: Mode, disk: Option<Rc<Disk>>) -> Result<()> {
        let mut result = Ok(());
        if let (Mode::Journal, Some(disk)) = (mode, &disk) {
            result = self.close_journal(disk).await;
        }
        if let Some(disk) = disk.filter(|disk| disk.failure().is_some()) {
            // What is acked is in memory alone: the way out of the failed disk brings it to the primary first.
            result = self.left_for_stop(&disk).await;
        } else if mode == Mode::Switching {
            result = Err(Error::State(format!("volume {:?} could not record that it left its journal", self.name())));
        }
        if self.state.borrow().mode == Mode::Direct {
            self.changed.until(|| (self.state.borrow().direct_inflight == 0).then_some(())).await;
            result = self.primary.sync().await.map_err(|e| Error::device("sync", self.path(), &e));
        }
        result
    }

    /// Ends when a failed CDP disk has been left. Only a stop of the agent gives up: the primary fails for too long, or the way out did, since the state
    /// directory took no fence. What is acked would be lost.
    async fn left_for_stop(&self, disk: &Rc<Disk>) -> Result<()> {
        let left = || {
            let state = self.state.borrow();
            if !state.attach.as_ref().is_some_and(|a| Rc::ptr_eq(&a.disk, disk)) {
                return Some(Ok(()));
            }
            if !state.destager_running {
                let reason = disk.failure().unwrap_or_default();
                return Some(Err(Error::Gone(format!("CDP disk {} was not left: {reason}", disk.path))));
            }
            let stops = self.engine.upgrade().is_none_or(|engine| engine.stopping_for(DRAIN_PATIENCE_NS));
            self.primary_error(&state, DRAIN_PATIENCE_NS).filter(|_| stops).map(Err)
        };
        self.until_in_time(left).await
    }

    async fn close_journal(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<()> {
        // A pending revert goes on after the next start; everything else goes to the primary.
        let upto = self.state.borrow().instant_last;
        self.drain_for_stop().await?;
        self.sync_journal(disk, upto).await?;
        let log = self.state.borrow().logs.back().cloned();
        if let Some(log) = log {
            let ticket = {
                let mut state = self.state.borrow_mut();
                let frame = self.open_frame(&mut state, &log, 0, true);
                Rc::clone(&frame.ticket)
            };
            self.kick.notify();
            ticket.wait().await?;
            self.sync_completed(disk).await?;
        }
        self.changed.until(|| (self.state.borrow().leaving.is_empty() || disk.failure().is_some()).then_some(())).await;
        self.emptied.set(true);
        // Hints: a stop does not wait for what is not punched yet.
        self.state.borrow_mut().punch.clear();
        self.changed.until(|| (!self.state.borrow().punching || disk.failure().is_some()).then_some(())).await;
        // Before the sync: what it is to cover is on the primary by then. A revert that is copied to its end meanwhile leaves the fence dirty.
        let clean = {
            let state = self.state.borrow();
            !state.punching
                && state.logs.iter().all(|l| {
                    let log = l.state.borrow();
                    log.sealed || (log.overlay.is_empty() && log.revert.is_none())
                })
        };
        // The fence tells the primary's mtime: one that a power cut takes back would look like somebody else's write.
        self.primary.sync_all().await.map_err(|e| Error::device("sync", self.path(), &e))?;
        if let Some(reason) = disk.failure() {
            return Err(Error::Gone(reason));
        }
        if clean {
            let samples = self.sample_primary().await;
            self.samples.replace(samples);
        }
        let fence = if clean { FenceState::Clean } else { FenceState::Dirty };
        self.put_fence(fence, disk.id, "").await
    }
}

/// Block status of a piece, for `base:allocation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bytes.
    pub len: u64,
    /// Occupies nothing.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// What a frontend serves: a volume or a view. Offsets and lengths are bytes, multiples of 512, inside `size` (the frontend has checked
/// them against the protocol; the export checks again and answers [`crate::Error::Invalid`]). Dropping a future does not cancel the request.
pub trait Export {
    /// Bytes.
    fn size(&self) -> u64;
    /// Writes are refused.
    fn read_only(&self) -> bool;
    /// Reads `len` bytes: parts in order, that together are exactly `len` bytes (so that overlay hits need no copy).
    fn read(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<Vec<Slice>>>;
    /// Writes `len` bytes found in `data` from byte `offset % 4096` on: the frontend receives the payload into a buffer with the same alignment as on
    /// disk, so that the engine need not copy (`data.len() >= offset % 4096 + len`, rounded up to 4096). See [`payload_buf`].
    fn write(&self, offset: u64, len: u32, data: IoBuf, fua: bool) -> LocalFuture<'static, Result<()>>;
    /// While the answer lives, a write of several parts is under way: no flush between them is taken for one at which nothing was.
    fn begin_write(&self) -> ClientGuard {
        ClientGuard::none()
    }
    /// Makes the range read as zeroes; `no_hole` keeps its room on the primary.
    fn write_zeroes(&self, offset: u64, len: u32, no_hole: bool, fua: bool) -> LocalFuture<'static, Result<()>>;
    /// A hint that the content is not needed any more.
    fn trim(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<()>>;
    /// Every write acked before the call, on any connection, is durable when it ends.
    fn flush(&self) -> LocalFuture<'static, Result<()>>;
    /// Allocation of a range, in order; the answer may be shorter than the question.
    fn status(&self, offset: u64, len: u64) -> LocalFuture<'static, Result<Vec<BlockStatus>>>;
    /// The blocks (of 4 KiB) whose content may differ from what the export was at an instant. Only a read-only view can tell.
    fn changed_since(&self, since: Instant) -> LocalFuture<'static, Result<Rc<Touched>>> {
        let error = Error::State(format!("what changed since {since} is told by a read-only view, and this is none"));
        Box::pin(async move { Err(error) })
    }
    /// A client opens the export. Refused with [`crate::Error::State`] while the export is held (after a forced revert) or not served.
    /// `on_disconnect` is called (once, on the shard's thread) when the engine wants the client gone: forced revert, view closed or lost, volume removed.
    fn connect(&self, writable: bool, on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard>;
}

/// A client's hold on an export; dropping it says that the client is gone.
pub struct ClientGuard(Option<Box<dyn FnOnce()>>);

impl ClientGuard {
    pub(crate) fn new(leave: impl FnOnce() + 'static) -> Self {
        Self(Some(Box::new(leave)))
    }

    /// A guard that tells nobody, for exports that do not count their clients.
    pub fn none() -> Self {
        Self(None)
    }
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        if let Some(leave) = self.0.take() {
            leave();
        }
    }
}

/// A buffer for a write of `len` bytes at `offset`: whole 4 KiB blocks; the payload belongs at byte `offset % 4096`.
pub fn payload_buf(offset: u64, len: u32) -> IoBuf {
    let head = (offset % 4096) as usize;
    let end = head + len as usize;
    let mut buf = IoBuf::for_overwrite(end.next_multiple_of(4096));
    // What lies around the payload goes to the journal with it.
    buf[..head].fill(0);
    buf[end..].fill(0);
    buf
}
