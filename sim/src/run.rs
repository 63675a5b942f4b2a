//! One history from its first start to its last check: incarnations of the agent, and what a crash leaves between two.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::rc::Rc;

use cdp_journal::FenceState;
use cdp_journal::check::{Severity, check_medium};

use crate::boot;
use crate::executor::{Executor, Outcome};
use crate::guest;
use crate::model::CrashKind;
use crate::rng::mix;
use crate::workload::{Crash, History};
use crate::world::{Counts, SEGMENT, World, in_full};

/// How a history went.
#[derive(Clone, Debug)]
pub struct Report {
    /// The violation, if any.
    pub failure: Option<String>,
    /// Operation that was running when it was found.
    pub at: usize,
    /// Hash of all events.
    pub hash: u64,
    /// Numbers for the summary.
    pub counts: Counts,
    /// Writes that no sync had covered when the power went, the last time.
    pub unsynced: usize,
}

/// Most incarnations of a history (each crash is one): more means that the agent cannot start.
const INCARNATIONS_MAX: usize = 400;

/// Runs a history. A panic of the engine is a violation.
pub fn run(history: History, trace: bool) -> Report {
    run_in(World::new(history, trace))
}

/// Runs a history in which exactly these unsynced writes survive a power cut (see [`World::survivors`]).
pub fn run_with_survivors(history: History, survivors: u64, trace: bool) -> Report {
    let world = World::new(history, trace);
    world.survivors.set(Some(survivors));
    run_in(world)
}

/// Runs a history, and answers also at which of its steps a crash is worth trying (see [`crate::executor::Shared::last_steps_before_calls`]).
pub fn run_for_calls(history: History) -> (Report, Vec<u64>) {
    let world = World::new(history, false);
    world.shared.record_calls();
    let shared = Rc::clone(&world.shared);
    let report = run_in(world);
    (report, shared.last_steps_before_calls())
}

/// Runs the history of a world, which stays as the history leaves it.
pub(crate) fn run_in(world: Rc<World>) -> Report {
    let outcome = catch_unwind(AssertUnwindSafe(|| incarnations(&world)));
    if let Err(panic) = outcome {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "a panic without words".to_owned());
        // What the engine holds may be in any state: let it leak rather than run its destructors.
        std::mem::forget(world.running.take());
        let report = report(&world, Some(format!("panic: {text}")));
        std::mem::forget(world);
        return report;
    }
    report(&world, None)
}

fn report(world: &World, panic: Option<String>) -> Report {
    let mut counts = *world.counts.borrow();
    counts.steps = world.shared.steps();
    counts.crashed = u64::from(counts.kills + counts.power_cuts > 0);
    counts.virtual_ns = world.shared.boot_ns();
    let reserved = world.history.setup.reserve_segments * SEGMENT;
    counts.laps = world.volumes.iter().map(|vol| vol.given_back.get() / reserved).sum();
    counts.wrapped = u64::from(counts.laps > 0);
    counts.punches = world.volumes.iter().map(|vol| vol.primary.discards()).sum();
    Report {
        failure: world.failure.borrow().clone().or(panic),
        at: world.next.get(),
        hash: world.shared.hash(),
        counts,
        unsynced: world.unsynced.get(),
    }
}

fn incarnations(world: &Rc<World>) {
    for _ in 0..INCARNATIONS_MAX {
        if world.failed() {
            return;
        }
        let executor = Executor::new(Rc::clone(&world.shared));
        let mut turned = false;
        if let Some(crash @ Crash { again: Some(steps), .. }) = world.armed.get() {
            executor.arm_crash(Some(steps));
            turned = turns(&world.history, crash.steps, steps);
            world.armed.set(Some(Crash { power: crash.power ^ turned, again: None, ..crash }));
        }
        let (w, e) = (Rc::clone(world), Rc::clone(&executor));
        let outcome = executor.run(Box::pin(async move { boot::live(w, e).await }));
        world.clock_ends();
        let stopped = bury(world, &executor);
        if matches!(outcome, Outcome::Crash) || (stopped && !world.unclean.get()) {
            audit(world);
        }
        if world.failed() {
            return;
        }
        match outcome {
            Outcome::Crash => {
                if let Some(armed) = world.armed.get() {
                    world.count(|counts| counts.turned += u64::from(turned));
                    crash(world, armed);
                    audit(world);
                }
            }
            Outcome::Done | Outcome::Halted if world.completed.get() => return,
            Outcome::Done | Outcome::Halted if stopped => {
                if world.unclean.replace(false) {
                    world.armed.set(None);
                    crash(world, Crash { power: false, steps: 0, again: None, down_ns: 1_000_000 });
                }
            }
            Outcome::Done | Outcome::Halted | Outcome::Stuck | Outcome::Spinning => {
                world.fail(format!("{outcome:?}: the agent waits for something that never happens"));
                return;
            }
        }
    }
    world.fail("the agent never gets to its end");
}

/// Whether the crash in a start, `again` steps into it, is of another kind than the one before it, which came after `steps`: half of them are. Drawn from
/// what the operation says, so that a shortened history keeps it.
fn turns(history: &History, steps: u64, again: u64) -> bool {
    in_full(history) && mix(history.seed ^ steps << 20 ^ again << 40) & 1 == 1
}

/// The process is gone: everything that it held is dropped. Answers whether it had stopped of its own will.
fn bury(world: &World, executor: &Rc<Executor>) -> bool {
    let clean = world.running.borrow().as_ref().is_none();
    for disk in world.disks() {
        if let Some(misuse) = disk.misuse() {
            world.fail(misuse);
        }
    }
    for vol in &world.volumes {
        vol.guard.take();
        vol.handle.take();
    }
    for view in world.views.borrow().iter() {
        view.handle.take();
    }
    executor.kill();
    world.running.take();
    world.in_flight.set(0);
    world.calls.set(0);
    if clean {
        // What was still on its way, a segment fetched ahead of need, say, has happened or not when the process is gone.
        for disk in world.disks() {
            disk.kill(&world.shared.rng);
        }
    }
    clean
}

/// The offline check reads what the agent left with code of its own: whatever the stop was, nothing that counts may be damaged.
fn audit(world: &World) {
    if world.journal_fault() || !world.initialised.get() {
        return;
    }
    for disk in &world.cdp {
        match check_medium(Box::new(disk.snapshot()), Path::new(&disk.name), &mut |_, _| {}) {
            Ok(report) if report.is_clean() => {
                // The engine's own count is compared while it runs; here what is really owned.
                for vol in &world.volumes {
                    let bytes = report.volumes.iter().filter(|row| row.id == vol.id).map(|row| row.bytes).sum::<u64>();
                    if bytes > vol.capacity.get() {
                        let text = format!("volume {} owns {bytes} of {} bytes", vol.index, vol.capacity.get());
                        world.fail(format!("reserve_capacity is exceeded on {}: {text}", disk.name));
                    }
                }
            }
            Ok(report) => {
                let damage = report.findings.iter().find(|finding| finding.severity == Severity::Damage);
                world.fail(format!("the offline check of {}: {damage:?}", disk.name));
            }
            Err(error) => world.fail(format!("the offline check of {}: {error}", disk.name)),
        }
    }
}

/// What the disks, the state folder and the oracles make of the agent's death.
fn crash(world: &World, crash: Crash) {
    world.say(|| format!("==== {} ====", if crash.power { "power cut" } else { "kill" }));
    let rng = &world.shared.rng;
    let unsynced: Vec<usize> = world.disks().map(|disk| disk.unsynced()).collect();
    if crash.power {
        world.unsynced.set(unsynced.iter().sum());
    }
    let chosen = world.survivors.get().filter(|_| crash.power);
    let first_of = |disk: usize| unsynced[..disk].iter().sum::<usize>();
    let keeps = |mask: u64, disk: usize, place: usize| (mask >> (first_of(disk) + place).min(63)) & 1 == 1;
    for (number, disk) in world.cdp.iter().enumerate() {
        match chosen {
            Some(mask) => disk.power_cut_keeping(|place| keeps(mask, number, place)),
            None if crash.power => drop(disk.power_cut(rng)),
            None => disk.kill(rng),
        }
    }
    for (number, vol) in world.volumes.iter().enumerate() {
        if let Some(mask) = chosen {
            vol.primary.power_cut_keeping(|place| keeps(mask, world.cdp.len() + number, place));
        } else if crash.power {
            let garbage = vol.primary.power_cut(rng);
            // Where the old content could not be read, a part of a physical sector had to be written.
            if world.primary_faulty.get() {
                for page in garbage {
                    let now = world.now(vol);
                    vol.oracle.borrow_mut().ruin(page, now);
                }
            }
        } else {
            vol.primary.kill(rng);
        }
    }
    world.folder.crash(rng);
    world.folder.set_failing(false);
    let kind = if crash.power { CrashKind::Power } else { CrashKind::Kill };
    for vol in &world.volumes {
        let now = world.now(vol);
        let physical = u64::from(vol.primary.physical);
        // A failed CDP disk was being left: the backlog was on its way from memory to the primary, and the journal may have lost it.
        let leaving = world.folder.fence(vol.id).is_some_and(|fence| fence.state == FenceState::Detaching);
        if leaving {
            vol.oracle.borrow_mut().unordered(crash.power);
        }
        vol.oracle.borrow_mut().crash(kind, physical, now);
        vol.history_after_crash(crash.power);
        vol.protected.set(false);
    }
    world.count(|counts| *if crash.power { &mut counts.power_cuts } else { &mut counts.kills } += 1);
    world.shared.pass(crash.down_ns);
    // The next incarnation dies too, if it was so ordered, but only once.
    world.armed.set(crash.again.map(|_| crash));
    guest::forget_scratch(world);
    if world.cdp.iter().any(|disk| disk.is_faulty()) && !rng.one_in(4) {
        world.say(|| "all disks work again".to_owned());
        world.cdp.iter().for_each(|disk| disk.heal());
    }
}
