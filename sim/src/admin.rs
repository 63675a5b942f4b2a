//! What admins do, and what they must be answered.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use cdp_journal::info::{CdpState, Health, MarkerKind, Priority, Settings};
use cdp_journal::{Error, Host, Instant, RevertRequest};

use crate::boot;
use crate::disk::{Fault, FaultKind, FaultOn};
use crate::executor::SimHost;
use crate::group;
use crate::guest::{barrier, may_be_lost, read_view, sleep, submit, verify, watch, write_view};
use crate::model::Kind;
use crate::rng::Rng;
use crate::stamp;
use crate::workload::{Action, Crash, Op, Then};
use crate::world::{Counts, OpenView, SEGMENT, Vol, World};

/// Most views that the workload keeps open.
const VIEWS_OPEN_MAX: usize = 8;
/// With more operations in flight the next one waits for its own end.
const IN_FLIGHT_MAX: u32 = 24;
/// Calls of admins that begin beside others.
const CALLS_MAX: u32 = 3;

/// Runs one operation, as far as the next one waits for it.
pub async fn execute(world: &Rc<World>, op: &Op) {
    world.count(|counts| counts.ops += 1);
    world.say(|| format!("--- {} {:?} {:?}", world.next.get() - 1, op.action, op.then));
    let watched = watch(world, format!("{:?}", op.action));
    if let Action::Write { vol, .. }
    | Action::Zero { vol, .. }
    | Action::Trim { vol, .. }
    | Action::Flush { vol }
    | Action::Read { vol, .. } = op.action
    {
        let done = submit(world, &world.volumes[vol], op.action.clone());
        if op.then == Then::Wait || world.in_flight.get() > IN_FLIGHT_MAX {
            done.await;
        }
        watched.set(true);
    } else if overlaps(world, op) {
        let (w, action, watched) = (Rc::clone(world), op.action.clone(), Rc::clone(&watched));
        let call = u32::from(is_call(&action));
        world.in_flight.set(world.in_flight.get() + 1);
        world.calls.set(world.calls.get() + call);
        SimHost(Rc::clone(&world.running().executor)).spawn(Box::pin(async move {
            other(&w, &action, true).await;
            watched.set(true);
            w.in_flight.set(w.in_flight.get() - 1);
            w.calls.set(w.calls.get() - call);
        }));
    } else {
        other(world, &op.action, false).await;
        watched.set(true);
    }
    if op.then == Then::Barrier && world.running.borrow().is_some() {
        barrier(world).await;
    }
    // Drawn in any case: a step of the scheduler goes on meaning what it meant.
    if world.running.borrow().is_some() && world.shared.rng.one_in(2) && !world.history.is_short() {
        world.remember();
    }
}

/// Whether the next operation starts while this one is under way.
fn overlaps(world: &World, op: &Op) -> bool {
    let beside = matches!(
        op.action,
        Action::OpenView { .. }
            | Action::ReadView { .. }
            | Action::WriteView { .. }
            | Action::CloseView { .. }
            | Action::CheckView { .. }
            | Action::Mark { .. }
    );
    let setup = &world.history.setup;
    let may = setup.overlap && beside || setup.admins && is_call(&op.action) && world.calls.get() < CALLS_MAX;
    may && op.then == Then::Go && world.in_flight.get() <= IN_FLIGHT_MAX
}

/// Calls of admins that the engine does one after the other for a volume, whenever they are asked for. They are judged in the order in which they are
/// answered: each is in effect when it is answered, and the next one is not before that.
fn is_call(action: &Action) -> bool {
    matches!(
        action,
        Action::Revert { force: true, .. }
            | Action::RevertGroup { .. }
            | Action::DryRun { .. }
            | Action::UndoRevert { .. }
            | Action::Enable { .. }
            | Action::Disable { .. }
            | Action::Edit { .. }
            | Action::CleanAll { .. }
            | Action::CleanLog { .. }
    )
}

/// `beside`: the next operations do not wait for this one.
async fn other(world: &Rc<World>, action: &Action, beside: bool) {
    match *action {
        Action::Verify { vol } => {
            barrier(world).await;
            verify(world, &world.volumes[vol]).await;
        }
        Action::Status { vol, sector, count } => {
            barrier(world).await;
            status(world, &world.volumes[vol], sector, count).await;
        }
        Action::DryRun { vol, at } => dry_run(world, &world.volumes[vol], at).await,
        Action::Freeze { ns } => {
            world.shared.pass(ns);
            world.frozen_ns.set(world.frozen_ns.get() + ns);
        }
        Action::Tick => world.remember(),
        Action::Ask => {
            if let Err(error) = world.running().engine.tick().await {
                world.fail(format!("no instant: {error}"));
            }
        }
        Action::Mark { vol, pick } => mark(world, vol, pick).await,
        Action::OpenView { vol, at, writable } => open_view(world, &world.volumes[vol], at, writable).await,
        Action::ReadView { pick, sector, count } => {
            let Some(view) = pick_view(world, pick) else { return };
            let sectors = view.sectors();
            let sector = sector % sectors;
            let works = read_view(world, &view, sector, count.min(sectors - sector)).await;
            if !works && !world.failed() {
                close(world, &view).await;
            }
        }
        Action::WriteView { pick, sector, count } => {
            let Some(view) = pick_view(world, pick) else { return };
            let sectors = view.sectors();
            let sector = sector % sectors;
            write_view(world, &view, sector, count.min(sectors - sector)).await;
        }
        Action::CloseView { pick } => {
            if let Some(view) = pick_view(world, pick) {
                close(world, &view).await;
            }
        }
        Action::CheckView { vol, at } => check_view(world, &world.volumes[vol], at).await,
        Action::Revert { vol, at, force, release } => {
            revert(world, &world.volumes[vol], at, None, force, release).await
        }
        Action::RevertGroup { at } => group::revert(world, at, beside).await,
        Action::UndoRevert { vol } => {
            let vol = &world.volumes[vol];
            if vol.last_revert.get() > 0 {
                revert(world, vol, 0, Some(vol.last_revert.get() - 1), true, true).await;
            }
        }
        Action::UndoWrite { vol } => {
            let vol = &world.volumes[vol];
            if let Some(before) = vol.before_write.get() {
                revert(world, vol, 0, Some(before), true, true).await;
            }
        }
        Action::Enable { vol } => enable(world, &world.volumes[vol]).await,
        Action::Disable { vol } => disable(world, &world.volumes[vol]).await,
        Action::Edit { vol, capacity, duration_s } => edit(world, &world.volumes[vol], capacity, duration_s).await,
        Action::CleanAll { vol } => clean_all(world, &world.volumes[vol]).await,
        Action::CleanLog { vol, pick } => clean_log(world, &world.volumes[vol], pick).await,
        Action::Resize { vol, sectors } => resize(world, &world.volumes[vol], sectors).await,
        Action::Reopen { vol } => reopen(world, &world.volumes[vol]).await,
        Action::Sleep { ns } => sleep(world, ns).await,
        Action::StepClock { by_ns } => world.shared.step_wall(by_ns),
        Action::Crash(crash) => {
            let executor = &world.running().executor;
            if !executor.crash_armed() {
                world.armed.set(Some(crash));
                executor.arm_crash(Some(crash.steps));
            }
        }
        Action::Restart => {
            barrier(world).await;
            if !world.failed() {
                stop(world).await;
            }
        }
        Action::Tamper { vol, sector } => {
            barrier(world).await;
            if !world.failed() {
                world.tamper.set(Some((vol, sector)));
                stop(world).await;
            }
        }
        Action::Misdirect { disk, vol, by } => {
            disarm(world);
            barrier(world).await;
            world.damaged.set(true);
            // Or nowhere at all.
            let kind = if by % 16384 == 0 { FaultKind::Lost } else { FaultKind::Misdirect(by) };
            world.disk(disk).fault(Fault { on: FaultOn::Write, kind, times: Some(1), after: 0, within: None });
            let count = world.volumes[vol].shown.get().min(8);
            submit(world, &world.volumes[vol], Action::Write { vol, sector: 0, count, fua: false }).await;
            // Later records vouch for what is missing now.
            barrier(world).await;
            sleep(world, 3_000_000_000).await;
            world.disk(disk).heal();
            world.count(|counts| counts.faults += 1);
        }
        Action::Fault { disk, on, kind, times, after } => {
            if disk < world.cdp.len() && kind.is_mild() {
                world.count(|counts| counts.faults += 1);
            } else {
                fault_begins(world, disk);
            }
            world.slow.set(world.slow.get() || matches!(kind, FaultKind::Slow(_)));
            world.disk(disk).fault(Fault { on, kind, times, after, within: None });
        }
        Action::Gone { disk } => {
            fault_begins(world, disk);
            world.disk(disk).set_gone(true);
        }
        Action::FailStore { ns } => {
            world.count(|counts| counts.faults += 1);
            world.store_faulty.set(true);
            for vol in &world.volumes {
                vol.unprotect();
            }
            world.folder.set_failing(true);
            let folder = Rc::clone(&world.folder);
            world.running().executor.after(ns, move || folder.set_failing(false));
        }
        Action::Heal => heal(world).await,
        Action::Flip { disk, pick } => {
            // Once a volume has been idle for a second, everything on its disk is vouched for by a later record.
            disarm(world);
            barrier(world).await;
            sleep(world, 3_000_000_000).await;
            world.damaged.set(true);
            let disk = world.disk(disk);
            let pages = disk.pages();
            // The superblock and the segment table have their own copies; what is tried here are the segments.
            let pages: Vec<u64> = pages.into_iter().filter(|page| *page * 4096 >= SEGMENT).collect();
            if !pages.is_empty() {
                let page = pages[(pick % pages.len() as u64) as usize];
                disk.flip_bit(page * 4096 + (pick >> 20) % 4096, (pick >> 40) as u8);
            }
            world.count(|counts| counts.faults += 1);
        }
        _ => {}
    }
}

/// No crash for now.
fn disarm(world: &World) {
    world.running().executor.arm_crash(None);
    world.armed.set(None);
}

fn fault_begins(world: &World, disk: usize) {
    world.count(|counts| counts.faults += 1);
    if disk >= world.cdp.len() {
        // What is acked meanwhile is in the journal.
        world.primary_errors.set(true);
        return world.primary_faulty.set(true);
    }
    world.cdp_faulty.set(true);
    let journaled_elsewhere =
        |vol: &&Rc<Vol>| world.folder.fence(vol.id).is_some_and(|fence| fence.disk != boot::disk_id(disk));
    for vol in world.volumes.iter().filter(|vol| !journaled_elsewhere(vol)) {
        vol.unprotect();
        vol.distrusted.set(u64::MAX);
    }
}

async fn heal(world: &Rc<World>) {
    for disk in world.disks() {
        disk.heal();
    }
    // Volumes that lost their protection get it back by the admin's hand.
    for vol in &world.volumes {
        let info = vol.handle().info();
        if info.state == CdpState::On && info.health == Health::Offline && world.shared.rng.one_in(2) {
            enable(world, vol).await;
        }
    }
}

/// Ends this incarnation; the next one starts.
pub fn leave(world: &World) {
    world.clock_ends();
    world.folder.set_failing(false);
    let running = world.running.take();
    for vol in &world.volumes {
        vol.guard.take();
        vol.handle.take();
    }
    for view in world.views.borrow().iter() {
        view.handle.take();
    }
    if let Some(running) = running {
        running.executor.halt();
    }
}

/// One stop in four is cut off: the service manager has waited long enough, or the host loses its power while it shuts down. Drawn by itself, so that the
/// draws before and after it are what they were without.
fn arm_in_stop(world: &World) {
    disarm(world);
    let Counts { restarts, kills, power_cuts, .. } = *world.counts.borrow();
    let rng = Rng::new(world.history.seed.rotate_left(17) ^ (restarts + kills + power_cuts));
    // After damage a torn tail and a flipped bit look alike; the exhaustion has its crash where it was asked for.
    if world.damaged.get() || world.history.is_short() || !rng.one_in(4) {
        return;
    }
    let crash = Crash { power: rng.one_in(2), steps: rng.range(1, 400), again: None, down_ns: 1_000_000_000 };
    world.armed.set(Some(crash));
    world.running().executor.arm_crash(Some(crash.steps));
}

/// A clean stop; the primaries must hold everything, also through a power cut.
pub async fn stop(world: &Rc<World>) {
    arm_in_stop(world);
    let tamper_after = world.tamper.take();
    let watched = watch(world, "stop".to_owned());
    for vol in &world.volumes {
        let stats = vol.handle().stats();
        world.count(|counts| counts.evicted += stats.evicted_capacity + stats.evicted_duration);
    }
    // A pending revert goes on after the next start: until then the primary is not all.
    let whole: Vec<bool> = world.volumes.iter().map(|vol| vol.handle().info().revert.is_none()).collect();
    let result = world.running().engine.stop().await;
    disarm(world);
    watched.set(true);
    match result {
        Ok(()) => {
            for (vol, whole) in world.volumes.iter().zip(whole.iter().copied()) {
                let began = world.now(vol);
                let now = world.now(vol);
                vol.oracle.borrow_mut().flushed(began, now);
                vol.history_lasts(world.clock());
                if whole && !world.damaged.get() && !vol.primary.is_faulty() {
                    boot::check_primary(world, vol);
                }
            }
            if world.shared.rng.one_in(2) && !world.any_fault() {
                world.say(|| "power cut after a clean stop".to_owned());
                for disk in world.disks() {
                    disk.power_cut(&world.shared.rng);
                }
            }
            if let Some((vol, sector)) = tamper_after
                && whole[vol]
                && !world.any_fault()
            {
                tamper(world, &world.volumes[vol], sector);
            }
        }
        Err(error) if world.any_fault() => {
            world.say(|| format!("stop: {error}"));
            world.volumes.iter().for_each(|vol| vol.oracle.borrow_mut().sync_failed());
            world.unclean.set(true);
        }
        Err(error) => return world.fail(format!("stop: {error}")),
    }
    world.count(|counts| counts.restarts += 1);
    if !world.failed() {
        crate::guest::forget_scratch(world);
        leave(world);
    }
}

/// Somebody writes to the primary while the agent is down.
fn tamper(world: &World, vol: &Vol, sector: u64) {
    world.say(|| format!("somebody writes to sector {sector} of volume {}", vol.index));
    let sector = sector.min(vol.shown.get() - 1);
    let count = (vol.shown.get() - sector).min(8);
    let mut bytes = vec![0; count as usize * stamp::SECTOR];
    let now = world.now(vol);
    let op = vol.oracle.borrow_mut().begin(Kind::Data, sector, count, true, now);
    stamp::fill_all(vol.index as u32, op, sector, &mut bytes);
    vol.primary.poke(sector * 512, &bytes, world.shared.wall_ns() + 1);
    let now = world.now(vol);
    vol.oracle.borrow_mut().ack(op, true, now);
    vol.oracle.borrow_mut().durable(op, now);
    vol.tampered.set(true);
}

async fn mark(world: &Rc<World>, vol: Option<usize>, pick: u64) {
    let running = world.running();
    let Some(instant) = running.clock.tick(world.shared.wall_ns()) else { return };
    let name = format!("mark-{pick:x}");
    for target in world.volumes.iter().filter(|target| vol.is_none_or(|vol| vol == target.index)) {
        let (protected, switches) = (target.protected.get(), target.switches.get());
        let result = target.handle().mark(&name, MarkerKind::Crash, instant).await;
        match result {
            Ok(marker) if marker.time != instant || marker.name != name => {
                return world.fail(format!("marker {name} at {instant} came back as {marker:?}"));
            }
            Ok(_) => {
                world.count(|counts| counts.marks += 1);
                target.marks.borrow_mut().push((name.clone(), instant.0));
                if protected && target.protected.get() && target.switches.get() == switches {
                    // It was answered when it was durable, and with it whatever came before it.
                    target.history_is_durable(instant.0);
                }
                if !check_marks(world, target, instant.0) {
                    return;
                }
            }
            Err(Error::State(_) | Error::Exists { .. } | Error::NoSpace { .. }) => {}
            Err(_) if world.any_fault() => {}
            Err(error) => return world.fail(format!("marker {name}: {error}")),
        }
    }
    world.instants.borrow_mut().push(instant.0);
}

/// Looks up the markers of a volume that its history must hold still, of those up to an instant. Answers whether all are there.
pub fn check_marks(world: &World, vol: &Vol, up_to: u64) -> bool {
    let handle = vol.handle();
    let info = handle.info();
    vol.marks.borrow_mut().retain(|(_, instant)| *instant <= up_to && Vol::covers(&info, *instant));
    for (name, instant) in vol.marks.borrow().iter() {
        let found = handle.marker(name).map(|marker| marker.time.0);
        if found != Some(*instant) && !world.distrusts(vol, *instant) {
            world.fail(format!("volume {}: marker {name} of {instant} is not found: {found:?}", vol.index));
            return false;
        }
    }
    true
}

fn pick_view(world: &World, pick: u64) -> Option<Rc<OpenView>> {
    let views = world.views.borrow();
    let count = views.len() as u64;
    (count > 0).then(|| Rc::clone(&views[(pick % count) as usize]))
}

async fn close(world: &Rc<World>, view: &Rc<OpenView>) {
    let vol = &world.volumes[view.vol];
    world.views.borrow_mut().retain(|other| !Rc::ptr_eq(other, view));
    view.handle.take();
    world.closed.borrow_mut().insert(view.id);
    match vol.handle().close_view(view.id).await {
        Ok(()) | Err(Error::NotFound { .. }) => {}
        Err(error) => world.fail(format!("close of view {}: {error}", view.time)),
    }
}

/// Opens a view, or reports a refusal that is not right. `None`: rightly refused.
async fn try_view(world: &Rc<World>, vol: &Rc<Vol>, time: u64, writable: bool) -> Option<Rc<OpenView>> {
    let handle = vol.handle();
    let before = Vol::covers(&handle.info(), time);
    let cleaning = vol.cleaning.get() > 0;
    let result = handle.open_view(Instant(time), "", writable).await;
    // All of history is about to end, and says so.
    let ending = (cleaning || vol.cleaning.get() > 0) && matches!(result, Err(Error::State(_)));
    let info = handle.info();
    let after = Vol::covers(&info, time);
    match result {
        // One that was lost is answered again until it is closed.
        Ok(view) if view.info().lost.is_some() => {
            let why = view.info().lost.unwrap_or_default();
            let closed = world.closed.borrow().contains(&view.id());
            if !closed && !may_be_lost(world, vol, time, &why) {
                world.fail(format!("volume {}: view at {time} is lost inside the coverage: {why}", vol.index));
            }
            None
        }
        Ok(view) => {
            if !before && !after {
                let text = format!("view at {time} was opened, outside the coverage {:?}", info.coverage);
                world.fail(format!("volume {}: {text}", vol.index));
                return None;
            }
            world.say(|| format!("view at {time} of volume {} is open", vol.index));
            let sectors = view.info().size / 512;
            world.closed.borrow_mut().remove(&view.id());
            if !vol.had_size(time, sectors) && !world.distrusts(vol, time) {
                let sizes = vol.sizes.borrow().clone();
                world.fail(format!("view at {time} of volume {} has {sectors} sectors; sizes: {sizes:?}", vol.index));
                return None;
            }
            Some(Rc::new(OpenView {
                vol: vol.index,
                id: view.id(),
                time,
                writable,
                scratch: RefCell::default(),
                handle: RefCell::new(Some(view)),
                busy: Cell::new(0),
            }))
        }
        Err(error) => {
            world.count(|counts| counts.views_refused += 1);
            world.say(|| format!("view at {time} of volume {}: {error}", vol.index));
            if before && after && !ending && !world.distrusts(vol, time) {
                let text = format!("view at {time} was refused inside the coverage {:?}: {error}", info.coverage);
                world.fail(format!("volume {}: {text}", vol.index));
            }
            None
        }
    }
}

async fn open_view(world: &Rc<World>, vol: &Rc<Vol>, at: u64, writable: bool) {
    if world.views.borrow().len() >= VIEWS_OPEN_MAX {
        return;
    }
    let time = world.pick_instant(&vol.handle().info(), at);
    let Some(view) = try_view(world, vol, time, writable).await else { return };
    let known = world.views.borrow().iter().any(|other| other.id == view.id);
    if !known {
        world.views.borrow_mut().push(view);
    }
}

/// Opens a view, reads all of it, closes it.
pub async fn check_view(world: &Rc<World>, vol: &Rc<Vol>, at: u64) {
    let time = world.pick_instant(&vol.handle().info(), at);
    check_view_of(world, vol, time).await;
}

/// The same with each instant of a short history.
pub async fn check_all_views(world: &Rc<World>, vol: &Rc<Vol>) {
    let instants = world.all_instants(&vol.handle().info());
    for time in instants {
        if world.failed() {
            return;
        }
        check_view_of(world, vol, time).await;
    }
}

async fn check_view_of(world: &Rc<World>, vol: &Rc<Vol>, time: u64) {
    let Some(view) = try_view(world, vol, time, false).await else { return };
    read_view(world, &view, 0, view.sectors()).await;
    let known = world.views.borrow().iter().any(|other| other.id == view.id);
    if !known && !world.failed() {
        close(world, &view).await;
    }
}

async fn revert(world: &Rc<World>, vol: &Rc<Vol>, at: u64, exact: Option<u64>, force: bool, release: bool) {
    let handle = vol.handle();
    let target = exact.unwrap_or_else(|| world.pick_instant(&handle.info(), at));
    let leave_first = !force && at & 1 == 0;
    if leave_first {
        barrier(world).await;
        vol.guard.take();
    }
    let connected = vol.guard.borrow().is_some() && !vol.disconnected.get();
    let call = world.call_begins(vol);
    vol.revert_begins(force);
    vol.hold_begins(force && !release);
    if world.history.setup.heavy {
        // Room for one that is refused, or cut off, may cost all but the newest log.
        vol.forget_history();
    }
    let before = Vol::covers(&handle.info(), target);
    let now = world.now(vol);
    let number = vol.oracle.borrow_mut().revert_begin(target, now);
    let request = RevertRequest { target: Instant(target), force, release, dry_run: false };
    let result = handle.revert(request).await;
    vol.revert_ends();
    vol.hold_ends(handle.info().held);
    let alone = world.call_ends(vol, call);
    let after = Vol::covers(&handle.info(), target);
    let done = result.is_ok();
    match result {
        Ok(report) => {
            vol.history_grows(report.needed_bytes);
            world.say(|| format!("volume {}: reverted to {target}: {report:?}", vol.index));
            world.count(|counts| counts.reverts += 1);
            vol.last_revert.set(report.instant.0);
            world.instants.borrow_mut().extend([report.instant.0 - 1, report.instant.0]);
            let verdict = vol.oracle.borrow_mut().revert_done(number, report.instant.0);
            if let Err(text) = verdict {
                return world.fail(text);
            }
            if !force && !leave_first {
                return world.fail("a revert without force went through while a client held the volume");
            }
            if !before && !after {
                return world.fail(format!("a revert to {target}, outside the coverage, went through"));
            }
        }
        Err(error) => {
            world.say(|| format!("volume {}: revert to {target}: {error}", vol.index));
            if world.any_fault() && matches!(error, Error::Gone(_) | Error::Device { .. }) {
                let now = world.now(vol);
                vol.oracle.borrow_mut().revert_uncertain(number, now);
            } else {
                vol.oracle.borrow_mut().revert_refused(number);
                vol.revert_refused(force);
            }
            let held = !force && !leave_first;
            let expected = match error {
                Error::State(_) => held || !before || !alone || handle.info().state == CdpState::Off,
                Error::OutOfCoverage { .. } => !before || !after,
                Error::NoSpace { .. } => true,
                _ => false,
            };
            if !expected && !world.any_fault() {
                return world.fail(format!("revert to {target}: {error}"));
            }
        }
    }
    if world.history.setup.admins {
        // In the step of the answer: what is under way beside it may change this in the next.
        let held = handle.info().held;
        if done && connected && alone && held == release {
            return world.fail(format!("held: {held} after a forced revert with release: {release}"));
        }
        verify(world, vol).await;
        return come_back(world, vol).await;
    }
    verify(world, vol).await;
    if world.failed() {
        return;
    }
    if vol.disconnected.get() {
        vol.guard.take();
        let held = handle.info().held;
        // One that was refused leaves the clients free to come back.
        if done && held == release && !world.any_fault() {
            return world.fail(format!("held: {held} after a forced revert with release: {release}"));
        }
        if held {
            if handle.export().connect(true, Box::new(|| {})).is_ok() {
                return world.fail("a client came in before the release");
            }
            boot::release(world, vol).await;
            if world.failed() {
                return;
            }
        }
    }
    if vol.guard.borrow().is_none() || vol.disconnected.get() {
        boot::connect(world, vol);
    }
}

/// A client comes back after a revert. Others may be under way: the last of them lets it in.
pub async fn come_back(world: &Rc<World>, vol: &Rc<Vol>) {
    let others = || world.failed() || vol.reverts_under_way.get() > 0;
    if others() {
        return;
    }
    if vol.handle().info().held {
        if vol.handle().export().connect(true, Box::new(|| {})).is_ok() {
            return world.fail("a client came in before the release");
        }
        boot::release(world, vol).await;
    }
    if !others() && (vol.guard.borrow().is_none() || vol.disconnected.get()) {
        vol.guard.take();
        boot::connect(world, vol);
    }
}

/// A revert that is only asked about must change nothing.
async fn dry_run(world: &Rc<World>, vol: &Rc<Vol>, at: u64) {
    let handle = vol.handle();
    let target = world.pick_instant(&handle.info(), at);
    let before = Vol::covers(&handle.info(), target);
    let request = RevertRequest { target: Instant(target), force: true, release: false, dry_run: true };
    // Reverts beside it, and those whose client has not come back, do what it must not.
    let reverting = || vol.disconnected.get() || handle.info().held || vol.reverts_under_way.get() > 0;
    let (beside, steps) = (world.history.setup.admins && reverting(), vol.revert_steps.get());
    let call = world.call_begins(vol);
    let result = handle.revert(request).await;
    world.call_ends(vol, call);
    let info = handle.info();
    let others = beside || world.history.setup.admins && vol.revert_steps.get() != steps;
    if (vol.disconnected.get() || info.held) && !others {
        return world.fail("a dry run of a revert disconnected the client");
    }
    match result {
        Ok(report) if report.target.0 != target => world.fail(format!("dry run to {target}: {report:?}")),
        Ok(_) => {}
        Err(Error::OutOfCoverage { .. }) if !before || !Vol::covers(&info, target) => {}
        Err(Error::State(_) | Error::NoSpace { .. }) => {}
        Err(_) if world.any_fault() => {}
        Err(error) => world.fail(format!("dry run to {target}: {error}")),
    }
    verify(world, vol).await;
}

/// The primary grows under the agent, and the guest gets it.
async fn resize(world: &Rc<World>, vol: &Rc<Vol>, sectors: u64) {
    let before = vol.shown.get();
    let wanted = sectors.clamp(before, vol.sectors);
    vol.sizes.borrow_mut().push((world.clock(), None, wanted));
    vol.primary.grow_to(wanted.next_multiple_of(8).min(vol.sectors) * 512);
    match vol.handle().resize(Some(wanted * 512)).await {
        Ok(bytes) if bytes == wanted * 512 => {
            world.count(|counts| counts.resizes += 1);
            vol.settle_size(world.clock(), wanted);
        }
        Ok(bytes) => world.fail(format!("volume {} was to have {wanted} sectors and has {bytes} bytes", vol.index)),
        Err(error) if world.any_fault() => {
            world.say(|| format!("volume {}: resize: {error}", vol.index));
            vol.settle_size(world.clock(), vol.handle().info().size / 512);
        }
        Err(error) => world.fail(format!("resize of volume {}: {error}", vol.index)),
    }
}

/// What is said to be zero must read as zeroes.
async fn status(world: &Rc<World>, vol: &Rc<Vol>, sector: u64, count: u64) {
    let export = vol.handle().export();
    let sector = sector.min(vol.shown.get() - 1);
    let count = count.min(vol.shown.get() - sector);
    let (offset, len) = (sector * 512, count * 512);
    let pieces = match export.status(offset, len).await {
        Ok(pieces) => pieces,
        Err(_) if world.any_fault() => return,
        Err(error) => return world.fail(format!("status of volume {}: {error}", vol.index)),
    };
    let covered: u64 = pieces.iter().map(|piece| piece.len).sum();
    if covered > len || covered == 0 {
        return world.fail(format!("status of {len} bytes describes {covered}"));
    }
    let Ok(parts) = export.read(offset, len as u32).await else { return };
    let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
    let mut at = 0;
    for piece in pieces {
        let end = at + piece.len as usize;
        if piece.zero && bytes[at..end].iter().any(|byte| *byte != 0) {
            return world.fail(format!("volume {}: {piece:?} at {} is not zero", vol.index, offset + at as u64));
        }
        at = end;
    }
}

/// A call that may change the switch begins.
fn switch_begins(vol: &Vol) {
    vol.switching.set(vol.switching.get() + 1);
}

/// It has ended, and this is how the switch is now. While another is under way, that one may have changed it by the next step.
fn switch_ends(vol: &Vol, on: Option<bool>) {
    vol.switching.set(vol.switching.get() - 1);
    vol.expect_on.set(on.filter(|_| vol.switching.get() == 0));
}

/// The last of several calls that might have changed the switch has ended: if it is on, what comes is journaled again.
fn protect_again(world: &World, vol: &Vol) {
    let info = vol.handle().info();
    let on = info.state == CdpState::On && info.health == Health::Ok && world.journal_is_sound(vol);
    if on && vol.switching.get() == 0 {
        vol.protect();
    }
}

/// Switches CDP on.
pub async fn enable(world: &Rc<World>, vol: &Rc<Vol>) {
    let call = world.call_begins(vol);
    let gap = vol.gap_open.take();
    let began = world.clock();
    // However the call ends, also by a crash.
    if let Some(from) = gap.filter(|from| *from < began) {
        vol.gaps.borrow_mut().push((from, began));
    }
    let was = vol.expect_on.replace(None);
    switch_begins(vol);
    vol.enabling.set(vol.enabling.get() + 1);
    let result = vol.handle().enable().await;
    vol.enabling.set(vol.enabling.get() - 1);
    let alone = world.call_ends(vol, call);
    match result {
        Ok(()) => {
            switch_ends(vol, Some(true));
            world.count(|counts| counts.switches += 1);
            let info = vol.handle().info();
            if info.state != CdpState::On {
                return world.fail("the switch is off after enable");
            }
            // What may switch it off again is not under way.
            if info.health == Health::Ok && world.journal_is_sound(vol) && vol.switching.get() == 0 {
                vol.protect();
                vol.trust(world.clock());
            }
            world.remember();
        }
        Err(error) => {
            switch_ends(vol, was.filter(|_| alone));
            // After an error the protection may come on by itself later.
            vol.gap_open.set(gap.filter(|_| !world.any_fault()));
            vol.oracle.borrow_mut().sync_failed();
            if !world.any_fault() {
                world.fail(format!("enable of volume {}: {error}", vol.index));
            }
        }
    }
}

async fn disable(world: &Rc<World>, vol: &Rc<Vol>) {
    let call = world.call_begins(vol);
    vol.unprotect();
    let was = vol.expect_on.replace(None);
    switch_begins(vol);
    let result = vol.handle().disable().await;
    let alone = world.call_ends(vol, call);
    match result {
        Ok(()) => {
            switch_ends(vol, Some(false));
            world.count(|counts| counts.switches += 1);
            if vol.handle().info().state != CdpState::Off {
                return world.fail("the switch is on after disable");
            }
            let from = vol.gap_open.get().unwrap_or_else(|| world.clock());
            // Unless it may be on again at any step.
            vol.gap_open.set(Some(from).filter(|_| vol.enabling.get() == 0));
            world.remember();
        }
        Err(error) => {
            switch_ends(vol, was.filter(|_| alone));
            if !alone {
                protect_again(world, vol);
            }
            let has_cdp = vol.handle().info().settings.is_some();
            if has_cdp && !world.any_fault() {
                world.fail(format!("disable of volume {}: {error}", vol.index));
            }
        }
    }
}

async fn edit(world: &Rc<World>, vol: &Rc<Vol>, segments: u64, duration_s: u64) {
    let settings = Settings {
        reserve_capacity: segments * SEGMENT,
        reserve_duration_s: duration_s,
        priority: if segments.is_multiple_of(2) { Priority::Low } else { Priority::High },
    };
    vol.capacity.set(vol.capacity.get().max(settings.reserve_capacity));
    vol.shortest_s.set(vol.shortest_s.get().min(duration_s));
    let call = world.call_begins(vol);
    vol.editing.set(vol.editing.get() + 1);
    let had = vol.handle().info().settings;
    // What was old enough until now may be gone; beside other edits nobody knows what held until now.
    let longer = world.history.setup.admins || had.is_some_and(|had| had.reserve_duration_s < duration_s);
    if longer {
        vol.forget_history();
    }
    let result = vol.handle().edit(move |_| settings).await;
    vol.editing.set(vol.editing.get() - 1);
    let alone = world.call_ends(vol, call);
    match result {
        Ok(()) => {
            world.count(|counts| counts.edits += 1);
            if longer {
                vol.forget_history();
            }
            let info = vol.handle().info();
            if info.settings != Some(settings) {
                world.fail(format!("settings after edit: {:?}, expected {settings:?}", info.settings));
            }
        }
        Err(Error::NoSpace { .. } | Error::Invalid { .. } | Error::State(_)) => {
            if alone && vol.handle().info().settings != had {
                world.fail("a refused edit changed the settings");
            }
        }
        Err(_) if world.any_fault() => {}
        Err(error) => world.fail(format!("edit of volume {}: {error}", vol.index)),
    }
}

async fn clean_all(world: &Rc<World>, vol: &Rc<Vol>) {
    let has_views = world.views.borrow().iter().any(|view| view.vol == vol.index);
    let was_protected = vol.protected.get();
    let call = world.call_begins(vol);
    vol.unprotect();
    vol.begin_cleaning();
    let was = vol.expect_on.replace(None);
    switch_begins(vol);
    let cleaned = vol.handle().clean(None).await;
    vol.end_cleaning(world.clock());
    let alone = world.call_ends(vol, call);
    match cleaned {
        Ok(()) => {
            world.count(|counts| counts.cleans += 1);
            let now = world.clock();
            let info = vol.handle().info();
            if info.settings.is_some() || !info.coverage.is_empty() || !info.logs.is_empty() {
                return world.fail(format!("volume {} after clean: {info:?}", vol.index));
            }
            switch_ends(vol, Some(false));
            vol.gaps.borrow_mut().push((0, now));
            vol.gap_open.set(Some(now).filter(|_| vol.enabling.get() == 0));
            // Enable gives the defaults again.
            let default = world.history.setup.reserve_segments * SEGMENT;
            vol.capacity.set(vol.capacity.get().max(default));
        }
        Err(error) => {
            switch_ends(vol, was.filter(|_| alone));
            if !alone {
                protect_again(world, vol);
            } else if was_protected {
                vol.protect();
            }
            if world.any_fault() {
                vol.kept.borrow_mut().clear();
            }
            if !has_views && !matches!(error, Error::State(_)) && !world.any_fault() {
                world.fail(format!("clean of volume {}: {error}", vol.index));
            }
        }
    }
}

async fn clean_log(world: &Rc<World>, vol: &Rc<Vol>, pick: u64) {
    let info = vol.handle().info();
    if info.logs.is_empty() {
        return;
    }
    let log = info.logs[(pick % info.logs.len() as u64) as usize].clone();
    let began = world.clock();
    let call = world.call_begins(vol);
    vol.forget_history();
    vol.begin_cleaning();
    let cleaned = vol.handle().clean(Some(log.seq)).await;
    vol.end_cleaning(world.clock());
    world.call_ends(vol, call);
    match cleaned {
        Ok(()) => {
            world.count(|counts| counts.cleans += 1);
            let end = log.end.map_or(began, |end| end.0);
            world.say(|| format!("volume {}: cleaned log {} ({}, {end}]", vol.index, log.seq, log.start));
            let gone = log.start.0..=log.end.map_or_else(|| world.clock(), |end| end.0);
            vol.kept.borrow_mut().retain(|instant| !gone.contains(instant));
            if end > log.start.0 {
                vol.gaps.borrow_mut().push((log.start.0, end));
            }
        }
        Err(Error::State(text)) => world.say(|| format!("clean of log {}: {text}", log.seq)),
        // It was evicted meanwhile.
        Err(Error::NotFound { .. }) => {}
        Err(_) if world.any_fault() => vol.kept.borrow_mut().clear(),
        Err(error) => world.fail(format!("clean of log {} of volume {}: {error}", log.seq, vol.index)),
    }
}

async fn reopen(world: &Rc<World>, vol: &Rc<Vol>) {
    barrier(world).await;
    if world.failed() {
        return;
    }
    let views: Vec<_> = world.views.borrow().iter().filter(|view| view.vol == vol.index).cloned().collect();
    for view in &views {
        view.handle.take();
    }
    world.views.borrow_mut().retain(|view| view.vol != vol.index || !view.writable);
    vol.guard.take();
    let whole = vol.handle().info().revert.is_none();
    // It is not for a call like this to give up what is acknowledged and in memory alone: it waits for the primary.
    let v = Rc::clone(vol);
    world.running().executor.after(100_000_000_000, move || v.primary.heal());
    match world.running().engine.close_volume(vol.id).await {
        Ok(()) => {
            let began = world.now(vol);
            let now = world.now(vol);
            vol.oracle.borrow_mut().flushed(began, now);
            vol.handle.take();
            if whole && !world.damaged.get() && !vol.primary.is_faulty() {
                boot::check_primary(world, vol);
            }
            boot::open(world, vol).await;
        }
        Err(_) if world.any_fault() => {
            vol.oracle.borrow_mut().sync_failed();
            world.unclean.set(true);
            leave(world);
        }
        Err(error) => world.fail(format!("close of volume {}: {error}", vol.index)),
    }
}
