//! What a history is about, across all incarnations of the agent: disks, the state folder, volumes with their oracles, open
//! views, and what was promised so far.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use cdp_journal::clock::HostClock;
use cdp_journal::info::{Health, VolumeInfo};
use cdp_journal::{ClientGuard, Engine, View, Volume};
use uuid::Uuid;

use crate::boot;
use crate::disk::SimDisk;
use crate::executor::{Executor, Shared};
use crate::model::{Oracle, Time};
use crate::rng::{Rng, mix};
use crate::stamp;
use crate::store::Folder;
use crate::workload::History;

/// Bytes of a segment: the least that the format allows.
pub const SEGMENT: u64 = 1 << 20;

/// Profiles whose host does all that one may do.
const IN_FULL: [&str; 5] = ["mixed", "resize", "ring", "discard", "admins"];

/// Whether a history's host does also what the simulator learnt last: discards that are hints, and a crash in a start of another kind than the one before
/// it. Of the other profiles seeds are kept, which go on meaning what they meant.
pub fn in_full(history: &History) -> bool {
    IN_FULL.contains(&history.profile)
}

/// Numbers for the summary.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Counts {
    pub ops: u64,
    /// Histories in which the agent was killed or the power went.
    pub crashed: u64,
    pub kills: u64,
    pub power_cuts: u64,
    /// Crashes in a start that were ordered with the one before it, and are of the other kind.
    pub turned: u64,
    pub restarts: u64,
    pub reads_checked: u64,
    pub views_checked: u64,
    pub views_refused: u64,
    pub reverts: u64,
    pub marks: u64,
    /// Flushes that made something durable.
    pub flushes: u64,
    pub cleans: u64,
    pub edits: u64,
    pub switches: u64,
    pub resizes: u64,
    pub scratch_writes: u64,
    pub evicted: u64,
    /// Logs that were seen to go for want of room.
    pub made_room: u64,
    /// How often all that reservations may hold was given back to be used again.
    pub laps: u64,
    /// Histories with such a lap.
    pub wrapped: u64,
    /// Discards of guests, and those that reached a primary.
    pub discards: u64,
    pub punches: u64,
    pub zeroes: u64,
    /// Calls of admins that began while another one was under way on the same volume.
    pub beside: u64,
    pub steps: u64,
    pub faults: u64,
    pub virtual_ns: u64,
}

impl Counts {
    /// Adds another history's numbers.
    pub fn add(&mut self, other: &Counts) {
        self.ops += other.ops;
        self.crashed += other.crashed;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.turned += other.turned;
        self.restarts += other.restarts;
        self.reads_checked += other.reads_checked;
        self.views_checked += other.views_checked;
        self.views_refused += other.views_refused;
        self.reverts += other.reverts;
        self.marks += other.marks;
        self.flushes += other.flushes;
        self.cleans += other.cleans;
        self.edits += other.edits;
        self.switches += other.switches;
        self.resizes += other.resizes;
        self.scratch_writes += other.scratch_writes;
        self.evicted += other.evicted;
        self.made_room += other.made_room;
        self.laps += other.laps;
        self.wrapped += other.wrapped;
        self.discards += other.discards;
        self.punches += other.punches;
        self.zeroes += other.zeroes;
        self.beside += other.beside;
        self.steps += other.steps;
        self.faults += other.faults;
        self.virtual_ns += other.virtual_ns;
    }
}

/// The running agent.
pub struct Running {
    /// Its tasks.
    pub executor: Rc<Executor>,
    /// Its engine.
    pub engine: Rc<Engine>,
    /// Its clock.
    pub clock: Arc<HostClock>,
    /// Wall and boot clock when it began: ages count from there.
    pub began: (u64, u64),
}

/// What the last look at a volume's history found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// The agent has started since.
    pub fresh: bool,
    /// Logs that had gone for capacity.
    pub evicted: u64,
    /// Bytes of CDP disk that it occupied.
    pub used_bytes: u64,
    /// See [`Vol::revert_steps`].
    pub revert_steps: u64,
    /// Seconds of history to keep.
    pub duration_s: u64,
    /// Number of its newest log.
    pub log: u64,
    /// The agent's clock of ages, and the boot clock.
    pub age: (u64, u64),
}

/// One volume.
pub struct Vol {
    /// Place in the history's list; part of the stamps.
    pub index: usize,
    /// Its uuid.
    pub id: Uuid,
    /// Its own disk.
    pub primary: Rc<SimDisk>,
    /// Sectors of its primary, and of the oracle.
    pub sectors: u64,
    /// Sectors that the guest sees.
    pub shown: Cell<u64>,
    /// Sizes that it had: instants at which each was asked for and acknowledged (none: cut off by a crash), sectors.
    pub sizes: RefCell<Vec<(u64, Option<u64>, u64)>>,
    /// What its reads must give.
    pub oracle: RefCell<Oracle>,
    /// Certainly journaled: enabled, and no fault since.
    pub protected: Cell<bool>,
    /// Newest instants that the history must reach, whatever comes: one that a power cut cannot take, and one that only a power cut can. 0: none.
    pub history: Cell<(u64, u64)>,
    /// Bytes written since the first of these, with what reverts needed.
    pub history_bytes: Cell<u64>,
    /// What its history holds of instants up to this one may be gone or unreadable: the CDP disk failed that held it, or may have. `u64::MAX`: so it is now.
    pub distrusted: Cell<u64>,
    /// Instants that were history at the last look, and must be still unless there is a reason.
    pub kept: RefCell<BTreeSet<u64>>,
    /// The last look.
    pub last_look: Cell<Look>,
    /// Newest instants that a power cut, and that a kill, must leave.
    pub lasting: Cell<(u64, u64)>,
    /// Since when its history goes on although nothing is recorded.
    pub open_end: Cell<Option<u64>>,
    /// Since when all disks work, and it is not protected.
    pub ailing: Cell<Option<u64>>,
    /// Since when all disks work, and a revert is pending.
    pub reverting: Cell<Option<u64>>,
    /// Since when all disks work and nobody asks for anything, and there is a backlog.
    pub backlog: Cell<Option<u64>>,
    /// Calls under way that clean: what is acked meanwhile may lie in what they take.
    pub cleaning: Cell<u32>,
    /// When a log was cleaned last: what began before that may have lain in it.
    pub cleaned: Cell<u64>,
    /// Raised whenever protection may change.
    pub switches: Cell<u64>,
    /// The user's switch as last acknowledged; `None`: a call that may change it is under way, or was cut off by a crash.
    pub expect_on: Cell<Option<bool>>,
    /// Offline until protection comes on by itself: an enable was cut off by a crash.
    pub cut_off: Cell<bool>,
    /// Somebody wrote to its primary while the agent was down.
    pub tampered: Cell<bool>,
    /// Instants that no interval may cover: after the first, up to the second.
    pub gaps: RefCell<Vec<(u64, u64)>>,
    /// Not recording since this instant.
    pub gap_open: Cell<Option<u64>>,
    /// Calls of admins that are under way on it, and how many there were so far.
    pub calls: Cell<(u32, u64)>,
    /// Those of them that may change the switch, and those that may switch it on.
    pub switching: Cell<u32>,
    /// See `switching`.
    pub enabling: Cell<u32>,
    /// Those that may change the settings' capacity and duration.
    pub editing: Cell<u32>,
    /// Reverts that are under way.
    pub reverts_under_way: Cell<u32>,
    /// Calls under way that may change the hold.
    pub holding: Cell<u32>,
    /// Least seconds of history that an edit has asked for since the last look.
    pub shortest_s: Cell<u64>,
    /// What its logs held at the last look, by their seq.
    pub logs_seen: RefCell<BTreeMap<u64, u64>>,
    /// What those held that have gone since.
    pub given_back: Cell<u64>,
    /// Bytes of CDP disk that it may occupy now.
    pub capacity: Cell<u64>,
    /// Instant of the newest revert.
    pub last_revert: Cell<u64>,
    /// An instant just before the newest acknowledged write.
    pub before_write: Cell<Option<u64>>,
    /// The serving volume.
    pub handle: RefCell<Option<Rc<Volume>>>,
    /// The client's hold.
    pub guard: RefCell<Option<ClientGuard>>,
    /// How often a client has come.
    pub connections: Cell<u64>,
    /// The engine asked the client to go.
    pub disconnected: Cell<bool>,
    /// Markers that were set: name, instant.
    pub marks: RefCell<Vec<(String, u64)>>,
    /// Held by a forced revert until the release; `None`: a call that may change it is under way, or was cut off by a crash.
    pub held: Cell<Option<bool>>,
    /// Forced reverts begun, but for those that were refused and sent nobody away: calls that overlap one may be refused.
    pub forced: Cell<u64>,
    /// Begins and ends of reverts, refused ones too. What one needs costs history, whatever comes of it.
    pub revert_steps: Cell<u64>,
    /// Reverts that happened, or may have.
    pub reverts: Cell<u64>,
}

impl Vol {
    /// The serving volume.
    ///
    /// # Panics
    /// When it is not open: a bug of the simulator.
    pub fn handle(&self) -> Rc<Volume> {
        Rc::clone(self.handle.borrow().as_ref().expect("operations run while the volume is open"))
    }
    /// What is known of the size once a call has ended, or the agent has started again.
    pub fn settle_size(&self, now: u64, sectors: u64) {
        let mut sizes = self.sizes.borrow_mut();
        sizes.retain(|(_, acked, size)| acked.is_some() || *size <= sectors);
        for (_, acked, _) in sizes.iter_mut() {
            acked.get_or_insert(now);
        }
        self.shown.set(sectors);
    }
    /// Whether it may have had this size at an instant. Sizes only grow.
    pub fn had_size(&self, instant: u64, sectors: u64) -> bool {
        let sizes = self.sizes.borrow();
        let certain = sizes.iter().filter(|(_, acked, _)| acked.is_some_and(|acked| acked <= instant));
        let least = certain.map(|(.., size)| *size).max().unwrap_or(0);
        sectors >= least && sizes.iter().any(|(asked, _, size)| *size == sectors && *asked <= instant)
    }
    /// Whether an instant lies in an interval that can be viewed.
    pub fn covers(info: &VolumeInfo, instant: u64) -> bool {
        info.coverage.iter().any(|i| i.start.0 <= instant && i.end.is_none_or(|end| instant <= end.0))
    }
    /// A revert is asked for.
    pub fn revert_begins(&self, force: bool) {
        self.reverts.set(self.reverts.get() + 1);
        self.revert_steps.set(self.revert_steps.get() + 1);
        self.reverts_under_way.set(self.reverts_under_way.get() + 1);
        self.forced.set(self.forced.get() + u64::from(force));
    }
    /// It was made or refused.
    pub fn revert_ends(&self) {
        self.revert_steps.set(self.revert_steps.get() + 1);
        self.reverts_under_way.set(self.reverts_under_way.get() - 1);
    }
    /// The agent died: no call is under way any more. What was being cleaned is for whoever looks at what is left.
    pub fn calls_are_over(&self) {
        self.revert_steps.set(self.revert_steps.get() + u64::from(self.reverts_under_way.replace(0)));
        self.calls.set((0, self.calls.get().1));
        for under_way in [&self.switching, &self.enabling, &self.editing, &self.holding] {
            under_way.set(0);
        }
    }
    /// A call that may change the hold begins; `may_hold`: not only take one back.
    pub fn hold_begins(&self, may_hold: bool) {
        self.holding.set(self.holding.get() + 1);
        if may_hold || self.holding.get() > 1 || self.held.get() != Some(false) {
            self.held.set(None);
        }
    }
    /// It has ended, and this is how the hold is now. While another is under way, that one may have changed it by the next step.
    pub fn hold_ends(&self, held: bool) {
        self.holding.set(self.holding.get() - 1);
        self.held.set((self.holding.get() == 0).then_some(held));
    }
    /// It was refused, certainly.
    pub fn revert_refused(&self, force: bool) {
        self.reverts.set(self.reverts.get() - 1);
        if force && !self.disconnected.get() {
            self.forced.set(self.forced.get() - 1);
        }
    }
    /// A write that began at this instant was journaled and acknowledged.
    pub fn history_goes_on(&self, instant: u64, bytes: u64) {
        let (durable, acked) = self.history.get();
        if self.was_not_cleaned(instant) {
            self.history.set((durable, acked.max(instant)));
        }
        self.lasting.set((self.lasting.get().0, self.lasting.get().1.max(instant)));
        self.history_grows(bytes);
    }
    /// So many bytes more are behind what the history must reach.
    pub fn history_grows(&self, bytes: u64) {
        self.history_bytes.set(self.history_bytes.get() + bytes);
    }
    /// All that was acknowledged before this instant is durable.
    pub fn history_is_durable(&self, instant: u64) {
        let (durable, acked) = self.history.get();
        self.lasting.set((self.lasting.get().0.max(instant), self.lasting.get().1.max(instant)));
        if self.was_not_cleaned(instant) {
            self.history.set((durable.max(instant), acked.max(instant)));
            self.history_bytes.set(0);
        }
    }
    /// A clean stop: all of it lasts.
    pub fn history_lasts(&self, now: u64) {
        self.lasting.set((now, now));
    }
    /// The agent died: what must be history still.
    pub fn history_after_crash(&self, power: bool) {
        let (durable, acked) = self.lasting.get();
        let lasting = if power { durable } else { acked };
        self.lasting.set((durable, lasting));
        // A clean that was cut off happened, or did not.
        let cleaning = self.cleaning.get() > 0;
        self.kept.borrow_mut().retain(|instant| *instant <= lasting && !cleaning);
        if power {
            self.history.set((self.history.get().0, self.history.get().0));
        }
        for since in [&self.open_end, &self.ailing, &self.reverting, &self.backlog] {
            since.set(None);
        }
    }
    fn was_not_cleaned(&self, instant: u64) -> bool {
        self.cleaning.get() == 0 && instant > self.cleaned.get()
    }
    /// A call that cleans begins.
    pub fn begin_cleaning(&self) {
        self.cleaning.set(self.cleaning.get() + 1);
    }
    /// It has ended.
    pub fn end_cleaning(&self, now: u64) {
        self.cleaning.set(self.cleaning.get() - 1);
        self.cleaned.set(now);
    }
    /// What was history may be gone, and rightly.
    pub fn forget_history(&self) {
        self.history.set((0, 0));
        self.history_bytes.set(0);
    }
    /// The instant that the history must reach still, and does not, of all that is known. `heavy`: much may be in flight besides.
    pub fn forgotten(&self, info: &VolumeInfo, now: u64, heavy: bool) -> Option<u64> {
        /// Far from what fills a reservation: bytes, and logs.
        const LITTLE: (u64, usize) = (4 << 20, 4);
        /// The same with several MiB in flight; of the two logs one is begun by the start.
        const LITTLE_HEAVY: (u64, usize) = (1 << 20, 2);
        /// Far from what ages out.
        const AGE_NS: u64 = 43_200_000_000_000;
        let (bytes, logs) = if heavy { LITTLE_HEAVY } else { LITTLE };
        let newest = self.history.get().1;
        let kept = info.settings.is_some_and(|settings| settings.reserve_duration_s >= 86400);
        let near = self.history_bytes.get() <= bytes && now.saturating_sub(newest) <= AGE_NS;
        // Each log behind it takes segments, however little it holds.
        let newer = info.logs.iter().filter(|log| log.start.0 > newest).count();
        (newest > 0 && kept && near && newer <= logs && !Self::covers(info, newest)).then_some(newest)
    }
    /// Certainly not journaled from here until [`Vol::protect`].
    pub fn unprotect(&self) {
        self.forget_history();
        self.protected.set(false);
        self.switches.set(self.switches.get() + 1);
    }
    /// Its journal is on a sound disk: what comes after this instant must be there as long as anything.
    pub fn trust(&self, now: u64) {
        if self.distrusted.get() == u64::MAX {
            self.distrusted.set(now);
        }
    }
    /// Certainly journaled from here on.
    pub fn protect(&self) {
        self.protected.set(true);
        self.switches.set(self.switches.get() + 1);
    }
}

/// An open view.
pub struct OpenView {
    /// Place of its volume.
    pub vol: usize,
    /// Its id.
    pub id: Uuid,
    /// The instant that it shows.
    pub time: u64,
    /// Takes writes into scratch.
    pub writable: bool,
    /// Sectors written into it, with the stamp's operation number.
    pub scratch: RefCell<BTreeMap<u64, u32>>,
    /// The serving view.
    pub handle: RefCell<Option<Rc<View>>>,
    /// Calls in flight on it.
    pub busy: Cell<u32>,
}

impl OpenView {
    /// Its size.
    pub fn sectors(&self) -> u64 {
        self.handle.borrow().as_ref().map_or(1, |view| view.info().size / 512)
    }
}

/// All of it.
pub struct World {
    /// What is to happen.
    pub history: History,
    /// The revert of a group that a crash may have cut off: its number; 0: none.
    pub group_in_doubt: Cell<u64>,
    /// Reverts of groups so far.
    pub groups: Cell<u64>,
    /// Time and chance.
    pub shared: Rc<Shared>,
    /// The state directory.
    pub folder: Rc<Folder>,
    /// The CDP disks.
    pub cdp: Vec<Rc<SimDisk>>,
    /// The volumes.
    pub volumes: Vec<Rc<Vol>>,
    /// Instants worth going back to.
    pub instants: RefCell<Vec<u64>>,
    /// Open views.
    pub views: RefCell<Vec<Rc<OpenView>>>,
    /// Views that were closed: whoever reads one at that moment may be told so.
    pub closed: RefCell<BTreeSet<Uuid>>,
    /// Stamps given out for scratch.
    pub scratch_stamps: Cell<u32>,
    /// The next operation.
    pub next: Cell<usize>,
    /// The crash that is armed.
    pub armed: Cell<Option<crate::workload::Crash>>,
    /// Which unsynced writes survive a power cut, by their place: all CDP disks' first, then the primaries'. `None`: as the seed says.
    pub survivors: Cell<Option<u64>>,
    /// How many there were at the newest power cut.
    pub unsynced: Cell<usize>,
    /// The first violation.
    pub failure: RefCell<Option<String>>,
    /// A CDP disk has failed at some time: views may be gone.
    pub cdp_faulty: Cell<bool>,
    /// A primary has failed at some time.
    pub primary_faulty: Cell<bool>,
    /// A primary fails, or has failed in this life of the agent: the guest may get its errors.
    pub primary_errors: Cell<bool>,
    /// A disk is slow, or was.
    pub slow: Cell<bool>,
    /// The state directory has failed at some time: admins may get errors, guests may have to wait.
    pub store_faulty: Cell<bool>,
    /// Bits were flipped: errors are right, wrong bytes are not.
    pub damaged: Cell<bool>,
    /// The CDP disks have their superblocks.
    pub initialised: Cell<bool>,
    /// All operations are done and the agent has stopped: one more start checks what it left.
    pub finished: Cell<bool>,
    /// The history has come to its end (or cannot go on: a damaged journal refuses).
    pub completed: Cell<bool>,
    /// A CDP disk did not open at this start.
    pub disk_missing: Cell<bool>,
    /// At the next clean stop somebody writes to this sector of this volume's primary.
    pub tamper: Cell<Option<(usize, u64)>>,
    /// The agent was left without a clean stop: for the disks that is a kill.
    pub unclean: Cell<bool>,
    /// Starts in a row at which a CDP disk failed.
    pub retries: Cell<u32>,
    /// What the admin accepts is that the history cannot go on.
    pub give_up: Cell<bool>,
    /// The state of a volume that the admin accepts at the next start.
    pub accepted: Cell<Option<(usize, Health)>>,
    /// The running agent.
    pub running: RefCell<Option<Rc<Running>>>,
    /// The newest instant seen on any clock.
    pub previous: Cell<u64>,
    /// What the clock showed at this start, before it gave out anything.
    pub clock_found: Cell<u64>,
    /// The newest instant that an earlier incarnation gave out.
    pub given: Cell<u64>,
    /// Time that the agent was stopped (SIGSTOP) so far.
    pub frozen_ns: Cell<u64>,
    /// Guest requests in flight, and what admins do beside them.
    pub in_flight: Cell<u32>,
    /// Calls of admins among these that others may be beside.
    pub calls: Cell<u32>,
    /// Numbers for the summary.
    pub counts: RefCell<Counts>,
    /// Print what happens.
    pub trace: bool,
}

/// Stamps in the scratch of writable views bear this volume number.
pub const SCRATCH_VOLUME: u32 = 1000;

impl World {
    /// The world of a history, before the agent's first start.
    pub fn new(history: History, trace: bool) -> Rc<Self> {
        let setup = history.setup.clone();
        let lazy_discards = in_full(&history) && !setup.files;
        let rng = Rng::new(mix(history.seed));
        let wall_ns = 1_700_000_000_000_000_000 + rng.below(1_000_000_000);
        let shared = Shared::new(history.seed, wall_ns);
        let cdp = setup.disks.iter().enumerate().map(|(i, segments)| {
            // Superblock, table and a remainder besides the segments.
            let size = (segments + 2) * SEGMENT + rng.below(200) * 4096;
            let disk = SimDisk::new(i as u64, &format!("cdp{i}"), size, setup.physical.0, false);
            disk.set_stragglers(setup.stragglers);
            disk
        });
        let volumes = setup.volumes.iter().enumerate().map(|(i, sectors)| {
            let size = sectors * 512;
            let primary = SimDisk::new(100 + i as u64, &format!("primary{i}"), size, setup.physical.1, setup.files);
            primary.set_slow(setup.primary_slow_ns);
            primary.set_lazy_discards(lazy_discards);
            let blocks = sectors.div_ceil(8);
            let first = (sectors * setup.begin_eighths / 8).max(1);
            primary.hide_behind(first.next_multiple_of(8).min(*sectors) * 512);
            let initial: Vec<bool> = (0..blocks).map(|_| rng.one_in(2)).collect();
            for block in (0..blocks).filter(|block| initial[*block as usize]) {
                let count = (sectors - block * 8).min(8) as usize;
                let mut bytes = vec![0; count * stamp::SECTOR];
                stamp::fill_all(i as u32, 0, block * 8, &mut bytes);
                primary.poke(block * 4096, &bytes, wall_ns);
            }
            Rc::new(Vol {
                index: i,
                id: Uuid::from_u64_pair(0x766f_6c00, i as u64 + 1),
                primary,
                sectors: *sectors,
                shown: Cell::new(first),
                sizes: RefCell::new(vec![(0, Some(0), first)]),
                oracle: RefCell::new(Oracle::new(i as u32, *sectors, initial)),
                protected: Cell::new(false),
                history: Cell::default(),
                history_bytes: Cell::default(),
                distrusted: Cell::new(0),
                kept: RefCell::default(),
                last_look: Cell::default(),
                lasting: Cell::default(),
                open_end: Cell::default(),
                ailing: Cell::default(),
                reverting: Cell::default(),
                backlog: Cell::default(),
                cleaning: Cell::new(0),
                cleaned: Cell::new(0),
                switches: Cell::new(0),
                expect_on: Cell::new(Some(false)),
                cut_off: Cell::new(false),
                tampered: Cell::new(false),
                gaps: RefCell::default(),
                gap_open: Cell::new(Some(0)),
                calls: Cell::new((0, 0)),
                switching: Cell::new(0),
                enabling: Cell::new(0),
                editing: Cell::new(0),
                reverts_under_way: Cell::new(0),
                holding: Cell::new(0),
                shortest_s: Cell::new(u64::MAX),
                logs_seen: RefCell::default(),
                given_back: Cell::new(0),
                capacity: Cell::new(setup.reserve_segments * SEGMENT),
                last_revert: Cell::new(0),
                before_write: Cell::new(None),
                handle: RefCell::default(),
                guard: RefCell::default(),
                connections: Cell::new(0),
                disconnected: Cell::new(false),
                marks: RefCell::default(),
                held: Cell::new(Some(false)),
                forced: Cell::new(0),
                revert_steps: Cell::new(0),
                reverts: Cell::new(0),
            })
        });
        Rc::new(Self {
            cdp: cdp.collect(),
            volumes: volumes.collect(),
            history,
            group_in_doubt: Cell::new(0),
            groups: Cell::new(0),
            shared,
            folder: Rc::default(),
            instants: RefCell::default(),
            views: RefCell::default(),
            scratch_stamps: Cell::new(1),
            next: Cell::new(0),
            armed: Cell::new(None),
            survivors: Cell::new(None),
            unsynced: Cell::new(0),
            failure: RefCell::default(),
            cdp_faulty: Cell::new(false),
            primary_faulty: Cell::new(false),
            primary_errors: Cell::new(false),
            slow: Cell::new(false),
            closed: RefCell::default(),
            damaged: Cell::new(false),
            store_faulty: Cell::new(false),
            initialised: Cell::new(false),
            finished: Cell::new(false),
            completed: Cell::new(false),
            disk_missing: Cell::new(false),
            tamper: Cell::new(None),
            unclean: Cell::new(false),
            retries: Cell::new(0),
            give_up: Cell::new(false),
            accepted: Cell::new(None),
            running: RefCell::default(),
            previous: Cell::new(0),
            clock_found: Cell::new(0),
            given: Cell::new(0),
            frozen_ns: Cell::new(0),
            in_flight: Cell::new(0),
            calls: Cell::new(0),
            counts: RefCell::default(),
            trace,
        })
    }

    /// The running agent.
    ///
    /// # Panics
    /// When none runs: a bug of the simulator.
    pub fn running(&self) -> Rc<Running> {
        Rc::clone(self.running.borrow().as_ref().expect("called while the agent runs"))
    }

    /// Time in which the agent could do something.
    pub fn awake_ns(&self) -> u64 {
        self.shared.boot_ns() - self.frozen_ns.get()
    }

    /// The newest instant that was given out.
    pub fn clock(&self) -> u64 {
        let now = self.running.borrow().as_ref().map_or(0, |running| running.clock.previous().0);
        let clock = now.max(self.previous.get());
        self.previous.set(clock);
        clock
    }

    /// The agent ends: what it gave out must never come again. (A mark that it only found on a disk and never used may be lost
    /// with that disk's cache.)
    pub fn clock_ends(&self) {
        self.clock();
        if let Some(running) = self.running.borrow().as_ref()
            && running.clock.previous().0 > self.clock_found.get()
        {
            self.given.set(self.given.get().max(running.clock.previous().0));
        }
    }

    /// The present place on a volume's time line.
    pub fn now(&self, vol: &Vol) -> Time {
        vol.oracle.borrow_mut().now(self.clock())
    }

    /// Remembers the present instant.
    pub fn remember(&self) {
        let now = self.clock();
        let mut instants = self.instants.borrow_mut();
        if now > 0 && instants.last().is_none_or(|last| *last < now) {
            instants.push(now);
        }
    }

    /// A call of an admin begins on a volume. Answers its number; 0: another one is under way there.
    pub fn call_begins(&self, vol: &Vol) -> u64 {
        let (under_way, begun) = vol.calls.get();
        vol.calls.set((under_way + 1, begun + 1));
        if under_way == 0 {
            return begun + 1;
        }
        self.count(|counts| counts.beside += 1);
        0
    }

    /// It has ended. Answers whether no other one was under way there at any time of it.
    pub fn call_ends(&self, vol: &Vol, number: u64) -> bool {
        let (under_way, begun) = vol.calls.get();
        vol.calls.set((under_way - 1, begun));
        number == begun
    }

    /// An instant to look at or go back to: mostly one that was remembered and is in the volume's history.
    pub fn pick_instant(&self, info: &VolumeInfo, pick: u64) -> u64 {
        let now = self.clock();
        let instants = self.instants.borrow();
        let inside: Vec<u64> = instants.iter().copied().filter(|instant| Vol::covers(info, *instant)).collect();
        let choice = match (pick >> 56) % 8 {
            0 => &*instants,
            _ if inside.is_empty() => &*instants,
            _ => &inside,
        };
        if choice.is_empty() {
            return now;
        }
        let place = (pick % choice.len() as u64) as usize;
        let base = choice[place];
        let next = choice.get(place + 1).copied().unwrap_or(now).max(base);
        match (pick >> 48) % 8 {
            0 | 1 => base + (pick >> 8) % (next - base + 1),
            2 => info.coverage.get(place % info.coverage.len().max(1)).map_or(base, |i| i.start.0),
            3 => info.coverage.get(place % info.coverage.len().max(1)).and_then(|i| i.end).map_or(base, |end| end.0),
            _ => base,
        }
    }

    /// All instants of a short history, in order: those that were remembered, the first and the last of each log, and the present one.
    pub fn all_instants(&self, info: &VolumeInfo) -> BTreeSet<u64> {
        let mut all: BTreeSet<u64> = self.instants.borrow().iter().copied().collect();
        all.extend(info.logs.iter().flat_map(|log| [Some(log.start), log.end]).flatten().map(|instant| instant.0));
        all.insert(self.clock());
        all
    }

    /// What lies on CDP disks may be gone, or not to be read.
    pub fn journal_fault(&self) -> bool {
        self.cdp_faulty.get() || self.damaged.get()
    }

    /// Whether what a volume's history holds of an instant may be gone or unreadable.
    pub fn distrusts(&self, vol: &Vol, instant: u64) -> bool {
        self.damaged.get() || instant <= vol.distrusted.get()
    }

    /// Whether a volume's journal is on a disk that does what it should, and has done so in this life of the agent.
    pub fn journal_is_sound(&self, vol: &Vol) -> bool {
        let fence = self.folder.fence(vol.id);
        let place = fence.and_then(|fence| (0..self.cdp.len()).find(|i| boot::disk_id(*i) == fence.disk));
        place.is_some_and(|place| self.cdp[place].is_sound())
    }

    /// What an admin was told may not be on record.
    pub fn record_fault(&self) -> bool {
        self.journal_fault() || self.store_faulty.get()
    }

    /// Some disk does not do what a disk should, or has not done so.
    pub fn any_fault(&self) -> bool {
        self.record_fault() || self.primary_faulty.get()
    }

    /// Records a violation (the first counts) and stops the run.
    pub fn fail(&self, text: impl Into<String>) {
        let text = text.into();
        self.say(|| format!("VIOLATION: {text}"));
        self.failure.borrow_mut().get_or_insert(text);
        if let Some(running) = self.running.borrow().as_ref() {
            running.executor.halt();
        }
    }

    /// Whether a violation was found.
    pub fn failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    /// A line of the trace.
    pub fn say(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("[{:>14} {:>7}] {}", self.shared.boot_ns(), self.shared.steps(), text());
        }
    }

    /// Changes the numbers of the summary.
    pub fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.borrow_mut());
    }

    /// All disks: CDP disks first, then primaries.
    pub fn disks(&self) -> impl Iterator<Item = &Rc<SimDisk>> {
        self.cdp.iter().chain(self.volumes.iter().map(|vol| &vol.primary))
    }

    /// Disk number `disk`: CDP disks first, then primaries.
    pub fn disk(&self, disk: usize) -> &Rc<SimDisk> {
        match disk.checked_sub(self.cdp.len()) {
            None => &self.cdp[disk],
            Some(volume) => &self.volumes[volume % self.volumes.len()].primary,
        }
    }
}
