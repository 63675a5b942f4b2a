//! Histories: an explicit list of operations drawn from a seed, so that a failing one can be shortened by leaving some out.
//!
//! What an operation needs to know of the run (instants, open views, logs) it names by a random number that is taken modulo what
//! there is when it runs: leaving out an operation leaves the others meaningful.

use crate::disk::{FaultKind, FaultOn};
use crate::rng::Rng;

/// When the next operation starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// At once: this one is still in flight.
    Go,
    /// When this one has been acknowledged.
    Wait,
    /// When all in flight have been acknowledged.
    Barrier,
}

/// How the agent dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The host's power goes, too.
    pub power: bool,
    /// Scheduler steps from now.
    pub steps: u64,
    /// Dies again this many steps into the recovery, if nobody has finished it by then.
    pub again: Option<u64>,
    /// How long the host is down, nanoseconds.
    pub down_ns: u64,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    Write {
        vol: usize,
        sector: u64,
        count: u64,
        fua: bool,
    },
    Zero {
        vol: usize,
        sector: u64,
        count: u64,
        no_hole: bool,
        fua: bool,
    },
    Trim {
        vol: usize,
        sector: u64,
        count: u64,
    },
    Flush {
        vol: usize,
    },
    Read {
        vol: usize,
        sector: u64,
        count: u64,
    },
    /// Reads the whole volume with nothing in flight.
    Verify {
        vol: usize,
    },
    /// Asks what is a hole or zero, with nothing in flight, and compares with a read.
    Status {
        vol: usize,
        sector: u64,
        count: u64,
    },
    /// Remembers the present instant.
    Tick,
    /// Somebody asks for an instant: where the clock's mark lies too low for that, it is raised.
    Ask,
    /// A marker on one volume, or at one instant on all.
    Mark {
        vol: Option<usize>,
        pick: u64,
    },
    OpenView {
        vol: usize,
        at: u64,
        writable: bool,
    },
    /// Reads a part of an open view (or all of it).
    ReadView {
        pick: u64,
        sector: u64,
        count: u64,
    },
    WriteView {
        pick: u64,
        sector: u64,
        count: u64,
    },
    CloseView {
        pick: u64,
    },
    /// Opens, reads all, closes.
    CheckView {
        vol: usize,
        at: u64,
    },
    Revert {
        vol: usize,
        at: u64,
        force: bool,
        release: bool,
    },
    /// All volumes at one instant, or none.
    RevertGroup {
        at: u64,
    },
    /// Only asks what a revert would need.
    DryRun {
        vol: usize,
        at: u64,
    },
    /// Goes to the instant just before the newest revert.
    UndoRevert {
        vol: usize,
    },
    /// Goes to the instant just before the newest acknowledged write.
    UndoWrite {
        vol: usize,
    },
    Enable {
        vol: usize,
    },
    Disable {
        vol: usize,
    },
    Edit {
        vol: usize,
        capacity: u64,
        duration_s: u64,
    },
    CleanAll {
        vol: usize,
    },
    CleanLog {
        vol: usize,
        pick: u64,
    },
    /// Offers the guest more of the primary: up to so many sectors.
    Resize {
        vol: usize,
        sectors: u64,
    },
    /// Closes the volume and opens it again.
    Reopen {
        vol: usize,
    },
    Sleep {
        ns: u64,
    },
    StepClock {
        by_ns: i64,
    },
    /// The agent is stopped and continued (SIGSTOP): time passes, the disks go on, nothing of the agent runs.
    Freeze {
        ns: u64,
    },
    Crash(Crash),
    /// A clean stop and start of the agent.
    Restart,
    /// A fault on CDP disk `disk` (or, past those, on a primary).
    Fault {
        disk: usize,
        on: FaultOn,
        kind: FaultKind,
        times: Option<u32>,
        after: u32,
    },
    /// The disk is taken away.
    Gone {
        disk: usize,
    },
    /// All disks work again.
    Heal,
    /// A clean stop; somebody writes to the primary; a start.
    Tamper {
        vol: usize,
        sector: u64,
    },
    /// A write to a CDP disk lands this many bytes further on.
    Misdirect {
        disk: usize,
        vol: usize,
        by: u64,
    },
    /// The state directory takes nothing for so long; what it refuses may be there all the same.
    FailStore {
        ns: u64,
    },
    /// One bit of a CDP disk flips at rest.
    Flip {
        disk: usize,
        pick: u64,
    },
}

impl Action {
    /// Bytes that a guest's write carries.
    pub fn bytes(&self) -> u64 {
        match self {
            Action::Write { count, .. } | Action::Zero { count, .. } => count * 512,
            _ => 0,
        }
    }
}

/// An operation and what the next one waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// What is done.
    pub action: Action,
    /// When the next starts.
    pub then: Then,
}

/// The world of one history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Sectors of each volume.
    pub volumes: Vec<u64>,
    /// Segments of each CDP disk.
    pub disks: Vec<u64>,
    /// Physical block of CDP disks, of primaries.
    pub physical: (u32, u32),
    /// Primaries are files (with a modification time).
    pub files: bool,
    /// Segments that each volume may occupy.
    pub reserve_segments: u64,
    /// Seconds of history.
    pub duration_s: u64,
    /// Most bytes acked and not destaged.
    pub backlog_bytes: u64,
    /// `durability = "both"`.
    pub flush_primary: bool,
    /// Seconds between automatic markers.
    pub marker_interval_s: u64,
    /// CDP is enabled from the start.
    pub enabled: bool,
    /// What each call of a primary takes longer, nanoseconds.
    pub primary_slow_ns: u64,
    /// One call of eight to a CDP disk takes 1 to 60 ms, not one of 64.
    pub stragglers: bool,
    /// Volumes begin with so many eighths of their sectors.
    pub begin_eighths: u64,
    /// Views are opened, read and written, and marks set, while other operations of admins are under way.
    pub overlap: bool,
    /// Admins' calls that change history, settings or the switch begin while others are under way, too.
    pub admins: bool,
    /// Several times the reservation is written: in larger batches, or a history would take minutes, and history goes quickly.
    pub heavy: bool,
}

/// A seed's history.
#[derive(Clone, Debug)]
pub struct History {
    /// Seed of the scheduler, the disks and the clocks.
    pub seed: u64,
    /// Name of the profile.
    pub profile: &'static str,
    /// Its world.
    pub setup: Setup,
    /// What happens.
    pub ops: Vec<Op>,
}

/// Name of the short histories that [`crate::exhaust`] makes; no profile is called so.
pub const SHORT: &str = "exhaust";

impl History {
    /// Whether it is a short one: it crashes where it is told to and nowhere else, and all of its instants are looked at, not some.
    pub fn is_short(&self) -> bool {
        self.profile == SHORT
    }
}

/// Kinds of history. Numbers are weights.
struct Profile {
    name: &'static str,
    write: u64,
    trim: u64,
    flush: u64,
    read: u64,
    view: u64,
    revert: u64,
    switch: u64,
    clean: u64,
    crash: u64,
    restart: u64,
    fault: u64,
    primary_fault: u64,
    flip: u64,
    clock: u64,
    big: bool,
    huge: bool,
    many: bool,
    group: bool,
    /// A few blocks that are written again as soon as a revert is recorded, flushes that wait for the primary, and disks of which many calls take long: what
    /// is newer than a revert is destaged while that is still being finished.
    rewrite: bool,
    resize: u64,
    overlap: bool,
    /// Writes of the whole volume, again and again, into the least reservation that there is.
    ring: bool,
    /// Zeroes as often as data, history that goes by its age (only then do discards reach the primary), and the time for that.
    discard: bool,
    admins: bool,
}

const BASE: Profile = Profile {
    name: "mixed",
    write: 40,
    trim: 2,
    flush: 6,
    read: 6,
    view: 14,
    revert: 3,
    switch: 2,
    clean: 1,
    crash: 3,
    restart: 1,
    fault: 0,
    primary_fault: 0,
    flip: 0,
    clock: 2,
    big: false,
    huge: false,
    many: false,
    group: false,
    rewrite: false,
    resize: 0,
    overlap: false,
    ring: false,
    discard: false,
    admins: false,
};

const PROFILES: [Profile; 21] = [
    BASE,
    Profile {
        name: "writes",
        view: 6,
        trim: 0,
        revert: 0,
        switch: 0,
        clean: 0,
        crash: 0,
        restart: 0,
        clock: 0,
        ..BASE
    },
    Profile { name: "crash", crash: 9, revert: 0, switch: 0, clean: 0, ..BASE },
    Profile { name: "views", view: 30, revert: 0, switch: 0, clean: 0, crash: 1, ..BASE },
    Profile { name: "revert", revert: 10, crash: 4, switch: 0, clean: 0, ..BASE },
    Profile { name: "switch", switch: 10, clean: 5, ..BASE },
    Profile { name: "wrap", write: 60, big: true, ..BASE },
    Profile { name: "capacity", write: 80, huge: true, revert: 1, ..BASE },
    Profile { name: "many", many: true, ..BASE },
    Profile { name: "clock", clock: 14, ..BASE },
    Profile { name: "cdp-fault", fault: 6, many: true, ..BASE },
    Profile { name: "primary-fault", primary_fault: 6, ..BASE },
    Profile { name: "damage", flip: 5, ..BASE },
    Profile { name: "group", revert: 10, crash: 8, group: true, many: true, switch: 0, clean: 0, ..BASE },
    Profile { name: "resize", resize: 6, crash: 5, revert: 5, switch: 4, ..BASE },
    Profile { name: "rewrite", rewrite: true, revert: 12, crash: 8, flush: 16, view: 4, switch: 0, clean: 0, ..BASE },
    Profile { name: "overlap", overlap: true, view: 40, revert: 8, clean: 4, crash: 2, ..BASE },
    Profile { name: "both-fault", fault: 4, primary_fault: 4, revert: 5, crash: 5, many: true, ..BASE },
    Profile {
        name: "ring",
        ring: true,
        write: 100,
        view: 16,
        revert: 4,
        switch: 1,
        clean: 0,
        crash: 5,
        clock: 1,
        read: 3,
        ..BASE
    },
    Profile {
        name: "discard",
        discard: true,
        write: 26,
        trim: 26,
        view: 16,
        revert: 5,
        clean: 3,
        crash: 6,
        restart: 2,
        clock: 3,
        ..BASE
    },
    Profile {
        name: "admins",
        admins: true,
        overlap: true,
        view: 16,
        revert: 14,
        switch: 16,
        clean: 6,
        crash: 4,
        ..BASE
    },
];

/// `all` takes so many in turn, and `more` those that came later: so the seeds of `all` go on meaning what they meant.
const IN_TURN: u64 = 18;

/// Names of all profiles. `all` takes the first 18 in turn by the seed (the long ones of `capacity` less often), `more` the others.
pub fn profiles() -> Vec<&'static str> {
    PROFILES.iter().map(|profile| profile.name).collect()
}

/// The history of a seed; `None` when there is no such profile.
pub fn generate(seed: u64, profile: &str, ops: usize) -> Option<History> {
    let place = match profile {
        "all" => match (seed % IN_TURN) as usize {
            // Its histories take ten times as long as others: three of four turns are given to the mixed ones.
            place if PROFILES[place].huge && !(seed / IN_TURN).is_multiple_of(4) => 0,
            place => place,
        },
        "more" => (IN_TURN + seed % (PROFILES.len() as u64 - IN_TURN)) as usize,
        name => PROFILES.iter().position(|profile| profile.name == name)?,
    };
    let profile = &PROFILES[place];
    let rng = Rng::new(seed ^ (place as u64) << 56);
    // What came later draws from a stream of its own, so that the old seeds go on meaning what they meant.
    let extra = Rng::new(!seed ^ (place as u64) << 56);
    let setup = setup(profile, &rng, &extra);
    let ops = (0..ops).map(|place| match place % 8 {
        place @ 0..5 if profile.rewrite => rewrite(place, &setup, &rng),
        _ => op(profile, &setup, &rng, &extra),
    });
    let ops = ops.collect();
    Some(History { seed, profile: profile.name, setup, ops })
}

fn setup(profile: &Profile, rng: &Rng, extra: &Rng) -> Setup {
    let volumes = if profile.many && extra.one_in(4) {
        3
    } else if profile.many || (!profile.huge && !profile.ring && rng.one_in(6)) || (profile.admins && extra.one_in(2)) {
        2
    } else {
        1
    };
    let disks = if profile.many && extra.one_in(6) {
        3
    } else if profile.many || rng.one_in(8) {
        2
    } else {
        1
    };
    let reserve_segments =
        if profile.big || profile.huge || profile.ring { rng.range(32, 34) } else { rng.range(34, 44) };
    let sectors = |_| {
        let blocks = match (profile.big, profile.huge) {
            (_, true) => rng.range(800, 1200),
            (true, _) => 64 + rng.below(64),
            _ if profile.ring => rng.range(400, 560),
            _ if profile.rewrite => *rng.pick(&[1, 2, 3]),
            _ => *rng.pick(&[1, 2, 4, 8, 16, 32, 64]),
        };
        blocks * 8 + if rng.one_in(6) { rng.range(1, 7) } else { 0 }
    };
    // A destager that is far behind: what it still needs must have been counted.
    let primary_slow_ns = if profile.huge && extra.one_in(2) { extra.range(5, 200) * 1_000_000 } else { 0 };
    let backlog_least: u64 = if primary_slow_ns > 0 { 16 << 20 } else { 0 };
    Setup {
        volumes: (0..volumes).map(sectors).collect(),
        disks: vec![reserve_segments * volumes + rng.range(2, 6); disks],
        physical: (*rng.pick(&[512, 4096]), *rng.pick(&[512, 4096])),
        files: rng.one_in(2),
        reserve_segments,
        duration_s: match profile {
            // What goes there goes for want of room.
            Profile { ring: true, .. } => 86400,
            Profile { discard: true, .. } if !rng.one_in(4) => rng.range(5, 40),
            Profile { discard: true, .. } => 86400,
            _ if rng.one_in(4) => rng.range(5, 100),
            _ => 86400,
        },
        backlog_bytes: backlog_least.max(*rng.pick(&[256 << 10, 1 << 20, 16 << 20])),
        flush_primary: rng.one_in(8) || profile.rewrite,
        stragglers: profile.rewrite,
        marker_interval_s: *rng.pick(&[1, 5, 60]),
        enabled: profile.ring || !rng.one_in(10),
        primary_slow_ns,
        begin_eighths: if profile.resize > 0 { extra.range(1, 7) } else { 8 },
        overlap: profile.overlap,
        admins: profile.admins,
        heavy: profile.ring,
    }
}

/// A revert, new writes behind it, and a power cut about when these are destaged.
fn rewrite(place: usize, setup: &Setup, rng: &Rng) -> Op {
    let blocks = setup.volumes[0] / 8;
    let action = match place {
        0 => Action::Revert { vol: 0, at: rng.bits(), force: true, release: true },
        1 | 2 => {
            Action::Write { vol: 0, sector: rng.below(blocks.max(1)) * 8, count: setup.volumes[0].min(8), fua: false }
        }
        3 => Action::Crash(Crash { power: true, steps: rng.range(1, 400), again: None, down_ns: 1_000_000 }),
        _ => Action::Flush { vol: 0 },
    };
    Op { action, then: if place == 0 { Then::Wait } else { Then::Go } }
}

fn op(profile: &Profile, setup: &Setup, rng: &Rng, extra: &Rng) -> Op {
    let weights = [
        profile.write,
        profile.trim,
        profile.flush,
        profile.read,
        profile.view,
        profile.revert,
        profile.switch,
        profile.clean,
        profile.crash,
        profile.restart,
        profile.fault,
        profile.primary_fault,
        profile.flip,
        profile.clock,
        8,
        profile.resize,
    ];
    let mut draw = rng.below(weights.iter().sum());
    let kind = weights.iter().position(|weight| match draw.checked_sub(*weight) {
        Some(rest) => {
            draw = rest;
            false
        }
        None => true,
    });
    let vol = rng.below(setup.volumes.len() as u64) as usize;
    let sectors = setup.volumes[vol];
    let action = match kind.unwrap_or(0) {
        0 => write(profile, vol, sectors, rng),
        1 => {
            let (sector, count) = range(profile, sectors, rng);
            Action::Trim { vol, sector, count }
        }
        2 => Action::Flush { vol },
        3 if rng.one_in(3) => Action::Verify { vol },
        3 if rng.one_in(4) => {
            let (sector, count) = range(profile, sectors, rng);
            Action::Status { vol, sector, count }
        }
        3 => {
            let (sector, count) = range(profile, sectors, rng);
            Action::Read { vol, sector, count }
        }
        4 => view(profile, vol, sectors, rng),
        5 if profile.group && !rng.one_in(3) => Action::RevertGroup { at: rng.bits() },
        5 if profile.admins && rng.one_in(4) => Action::RevertGroup { at: rng.bits() },
        5 if rng.one_in(4) => Action::UndoRevert { vol },
        5 if rng.one_in(6) => Action::DryRun { vol, at: rng.bits() },
        // Whether one without force is refused hangs on what another, beside it, has done to the client.
        5 if profile.admins => Action::Revert { vol, at: rng.bits(), force: true, release: rng.one_in(2) },
        5 => Action::Revert { vol, at: rng.bits(), force: !rng.one_in(4), release: rng.one_in(2) },
        6 if profile.ring => {
            Action::Edit { vol, capacity: rng.range(32, setup.reserve_segments), duration_s: setup.duration_s }
        }
        6 if profile.admins && rng.one_in(3) => edit(setup, vol, rng),
        6 => switch(setup, vol, rng),
        7 if rng.one_in(4) => Action::CleanAll { vol },
        7 => Action::CleanLog { vol, pick: rng.bits() },
        8 => Action::Crash(Crash {
            power: rng.one_in(2),
            steps: match profile {
                // Its operations take many.
                Profile { ring: true, .. } => rng.range(1, *rng.pick(&[200, 3000, 30_000])),
                _ if rng.one_in(4) => rng.range(1, 3000),
                _ => rng.range(1, 200),
            },
            again: if rng.one_in(4) { Some(rng.range(1, 300)) } else { None },
            down_ns: *rng.pick(&[1_000_000, 1_000_000_000, 100_000_000_000]),
        }),
        9 if rng.one_in(3) => Action::Reopen { vol },
        9 if setup.files && rng.one_in(6) => Action::Tamper { vol, sector: rng.below(sectors / 8 + 1) * 8 },
        // A disk without an mtime: seen where a file system would have been mounted.
        9 if !setup.files && extra.one_in(6) => Action::Tamper { vol, sector: 0 },
        9 => Action::Restart,
        10 => fault(setup, rng, extra),
        11 => primary_fault(setup, rng),
        12 if rng.one_in(4) => {
            Action::Misdirect { disk: rng.below(setup.disks.len() as u64) as usize, vol, by: rng.range(1, 4000) * 4096 }
        }
        12 => Action::Flip { disk: rng.below(setup.disks.len() as u64) as usize, pick: rng.bits() },
        13 if rng.one_in(4) => Action::Freeze { ns: *rng.pick(&[2_000_000_000, 10_000_000_000, 100_000_000_000]) },
        15 => Action::Resize { vol, sectors: rng.range(1, sectors) },
        13 => Action::StepClock {
            by_ns: *rng.pick(&[-3_600_000_000_000, -1_000_000_000, -1_000, 1_000, 1_000_000_000, 3_600_000_000_000]),
        },
        14 if profile.discard && rng.one_in(2) => {
            Action::Sleep { ns: *rng.pick(&[1_500_000_000, 6_000_000_000, 30_000_000_000]) }
        }
        _ if rng.one_in(3) => {
            Action::Sleep { ns: *rng.pick(&[1_000, 300_000, 20_000_000, 1_500_000_000, 30_000_000_000]) }
        }
        _ if rng.one_in(3) => Action::Mark { vol: if rng.one_in(3) { None } else { Some(vol) }, pick: rng.bits() },
        _ => Action::Tick,
    };
    let then = match rng.below(8) {
        0..4 => Then::Go,
        4..6 if profile.admins => Then::Go,
        4..7 => Then::Wait,
        _ => Then::Barrier,
    };
    Op { action, then }
}

fn range(profile: &Profile, sectors: u64, rng: &Rng) -> (u64, u64) {
    let sector = rng.below(sectors);
    let most = sectors - sector;
    match rng.below(8) {
        0 => (sector, rng.range(1, most.min(16))),
        1 if !profile.huge => (sector, most),
        2 | 3 if profile.big => (0, sectors),
        1..5 if profile.huge => {
            let sector = sector / 8 * 8;
            (sector, most.min(rng.range(1, 256) * 8))
        }
        _ => {
            // Whole blocks, as most guests write.
            let sector = sector / 8 * 8;
            let most = sectors - sector;
            (sector, (rng.range(1, 4) * 8).min(most))
        }
    }
}

fn write(profile: &Profile, vol: usize, sectors: u64, rng: &Rng) -> Action {
    let (sector, count) = if profile.ring && !rng.one_in(3) { (0, sectors) } else { range(profile, sectors, rng) };
    let fua = rng.one_in(10);
    if rng.one_in(if profile.discard { 2 } else { 8 }) {
        Action::Zero { vol, sector, count, no_hole: rng.one_in(2), fua }
    } else {
        Action::Write { vol, sector, count, fua }
    }
}

fn view(profile: &Profile, vol: usize, sectors: u64, rng: &Rng) -> Action {
    let (sector, count) = range(profile, sectors, rng);
    let (pick, at) = (rng.bits(), rng.bits());
    match rng.below(10) {
        0..3 => Action::OpenView { vol, at, writable: rng.one_in(4) },
        3..6 => Action::ReadView { pick, sector, count },
        6 => Action::WriteView { pick, sector, count },
        7 => Action::CloseView { pick },
        _ => Action::CheckView { vol, at },
    }
}

fn switch(setup: &Setup, vol: usize, rng: &Rng) -> Action {
    match rng.below(6) {
        0 | 1 => Action::Disable { vol },
        2..5 => Action::Enable { vol },
        _ => edit(setup, vol, rng),
    }
}

fn edit(setup: &Setup, vol: usize, rng: &Rng) -> Action {
    Action::Edit {
        vol,
        capacity: rng.range(setup.reserve_segments - 2, setup.reserve_segments),
        duration_s: *rng.pick(&[10, 100, 86400]),
    }
}

fn fault(setup: &Setup, rng: &Rng, extra: &Rng) -> Action {
    let disk = rng.below(setup.disks.len() as u64) as usize;
    if extra.one_in(12) {
        return Action::FailStore { ns: *extra.pick(&[1_000_000, 100_000_000, 3_000_000_000]) };
    }
    match rng.below(6) {
        0 => Action::Gone { disk },
        1 | 2 => Action::Heal,
        _ => {
            let on = *rng.pick(&[FaultOn::Read, FaultOn::Write, FaultOn::Sync, FaultOn::Any]);
            let kind = *rng.pick(&[
                FaultKind::Eio,
                FaultKind::Eio,
                FaultKind::Enospc,
                FaultKind::Hang,
                FaultKind::Slow(300_000_000),
                FaultKind::Slow(20_000_000_000),
            ]);
            let times = if rng.one_in(2) { Some(1) } else { None };
            Action::Fault { disk, on: met_by(kind, on), kind, times, after: rng.below(6) as u32 }
        }
    }
}

fn primary_fault(setup: &Setup, rng: &Rng) -> Action {
    let disk = setup.disks.len() + rng.below(setup.volumes.len() as u64) as usize;
    match rng.below(3) {
        0 => Action::Heal,
        _ => {
            let on = *rng.pick(&[FaultOn::Read, FaultOn::Write, FaultOn::Sync, FaultOn::Any]);
            let kind = *rng.pick(&[FaultKind::Eio, FaultKind::Enospc, FaultKind::Slow(300_000_000)]);
            let times = if rng.one_in(2) { Some(rng.range(1, 3) as u32) } else { None };
            Action::Fault { disk, on: met_by(kind, on), kind, times, after: rng.below(6) as u32 }
        }
    }
}

/// The calls that can meet a fault: a full disk is met by writes alone.
fn met_by(kind: FaultKind, on: FaultOn) -> FaultOn {
    if kind == FaultKind::Enospc { FaultOn::Write } else { on }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_fixes_the_history_and_every_range_lies_inside_its_volume() {
        for seed in 0..1000u64 {
            let profile = if seed.is_multiple_of(2) { "all" } else { "more" };
            let a = generate(seed / 2, profile, 80).expect("a profile");
            let b = generate(seed / 2, profile, 80).expect("a profile");
            assert_eq!(a.ops, b.ops);
            assert_eq!(a.setup, b.setup);
            for op in &a.ops {
                if let Action::Write { vol, sector, count, .. } | Action::Zero { vol, sector, count, .. } = op.action {
                    assert!(count > 0 && sector + count <= a.setup.volumes[vol], "{op:?}");
                }
            }
        }
        assert!(generate(1, "no such profile", 1).is_none());
    }
}
