//! One incarnation of the agent: start, the operations, and the checks at the end.

use std::rc::Rc;
use std::sync::Arc;

use cdp_journal::clock::HostClock;
use cdp_journal::info::{CdpState, Health, Priority, Settings};
use cdp_journal::{Engine, EngineConfig, Error, Host, InitOptions, VolumeSpec};
use uuid::Uuid;

use crate::admin;
use crate::bounds;
use crate::executor::{Executor, SimHost};
use crate::group;
use crate::guest::{barrier, read_view, sleep, verify, watch};
use crate::model::When;
use crate::workload::{Action, Op};
use crate::world::{Look, Running, SEGMENT, Vol, World};

/// The agent's life: until it has done everything, is told to halt, or dies.
pub async fn live(world: Rc<World>, executor: Rc<Executor>) {
    if !start(&world, &executor).await {
        return;
    }
    let (w, host) = (Rc::clone(&world), SimHost(Rc::clone(&executor)));
    host.spawn(Box::pin(async move { bounds::monitor(w).await }));
    if world.finished.get() {
        last_checks(&world).await;
        world.completed.set(true);
        return;
    }
    while let Some(op) = world.history.ops.get(world.next.get()).cloned() {
        world.next.set(world.next.get() + 1);
        admin::execute(&world, &op).await;
        bounds::look(&world);
        if world.failed() {
            return;
        }
        if world.running.borrow().is_none() {
            return executor.halt();
        }
    }
    finish(&world).await;
    executor.halt();
}

fn config(world: &World) -> EngineConfig {
    let setup = &world.history.setup;
    EngineConfig {
        backlog_bytes_max: setup.backlog_bytes,
        // Small batches, so that two of them are under way also on small volumes.
        destage_blocks_max: match setup.stragglers {
            true => 1,
            false if setup.heavy => [8, 64, 2048][(world.history.seed % 3) as usize],
            false => [1, 4, 2048][(world.history.seed % 3) as usize],
        },
        // Frames side by side as often as can be, like an agent's, and one after the other.
        frames_in_flight_max: [2, 4, 1, 2][(world.history.seed % 4) as usize],
        frame_company_blocks: [0, 2, 20][(world.history.seed / 4 % 3) as usize],
        few_writes: [16, 0, 4][(world.history.seed / 12 % 3) as usize],
        // Syncs ahead of flushes as often as can be, like an agent's, and none.
        flush_habit: [0, 3, u32::MAX][(world.history.seed / 36 % 3) as usize],
        marker_interval_s: setup.marker_interval_s,
        default_settings: Settings {
            reserve_capacity: setup.reserve_segments * SEGMENT,
            reserve_duration_s: setup.duration_s,
            priority: Priority::Mid,
        },
        flush_primary: setup.flush_primary,
        index_cache_bytes: 64 << 10,
        scratch_bytes_max: 256 << 10,
        ..EngineConfig::default()
    }
}

/// Starts the agent. Answers whether it serves.
async fn start(world: &Rc<World>, executor: &Rc<Executor>) -> bool {
    let watched = start_watch(world, executor);
    if world.volumes.iter().all(|vol| !vol.primary.is_faulty()) {
        world.primary_errors.set(false);
    }
    let host = Rc::new(SimHost(Rc::clone(executor)));
    let clock = Arc::new(HostClock::new(world.folder.clock()));
    let weak = Rc::downgrade(world);
    let events = Box::new(move |event: cdp_journal::info::Event| {
        if let Some(world) = weak.upgrade() {
            world.say(|| format!("event {:?}: {}", event.kind, event.message));
        }
    });
    let store = world.folder.attach(executor);
    let engine = Engine::new(host, Arc::clone(&clock), store, config(world), events);
    let began = (world.shared.wall_ns(), world.shared.boot_ns());
    *world.running.borrow_mut() = Some(Rc::new(Running {
        executor: Rc::clone(executor),
        engine: Rc::clone(&engine),
        clock: Arc::clone(&clock),
        began,
    }));
    let mut missing = false;
    for (i, disk) in world.cdp.iter().enumerate() {
        let device = disk.attach(executor);
        if !world.initialised.get() {
            let options = InitOptions { segment_size: SEGMENT, force: false };
            if let Err(error) = Engine::init_disk(Rc::clone(&device), options, disk_id(i), world.shared.wall_ns()).await
            {
                world.fail(format!("init of {}: {error}", disk.name));
                return false;
            }
        }
        match engine.add_disk(device, disk.name.clone()).await {
            Ok(info) => world.say(|| format!("disk {i}: {} of {} segments free", info.segments_free, info.segments)),
            Err(error) if world.cdp_faulty.get() || world.damaged.get() => {
                world.say(|| format!("disk {i}: {error}"));
                missing = true;
            }
            Err(error) => {
                world.fail(format!("disk {i} does not open: {error}"));
                return false;
            }
        }
    }
    world.disk_missing.set(missing);
    world.clock_found.set(clock.previous().0);
    if clock.previous().0 < world.given.get() && !missing {
        world.fail(format!("the clock stepped back over a restart: {} to {}", world.given.get(), clock.previous().0));
        return false;
    }
    for vol in &world.volumes {
        if !open(world, vol).await {
            return false;
        }
    }
    if !group::settle(world).await {
        return false;
    }
    world.accepted.set(None);
    let first = !world.initialised.replace(true);
    if first && world.history.setup.enabled {
        for vol in &world.volumes {
            admin::enable(world, vol).await;
        }
    }
    watched.set(true);
    world.retries.set(0);
    // What an admin was told and is not on record has been settled with what is.
    world.store_faulty.set(false);
    !world.failed()
}

/// As [`watch`], while the engine is not there yet.
fn start_watch(world: &Rc<World>, executor: &Rc<Executor>) -> Rc<std::cell::Cell<bool>> {
    let done = Rc::new(std::cell::Cell::new(false));
    let (flag, weak) = (Rc::clone(&done), Rc::downgrade(world));
    executor.after(600_000_000_000, move || {
        if let (false, Some(world)) = (flag.get(), weak.upgrade()) {
            world.fail("the agent does not get to serving in 600 s");
        }
    });
    done
}

/// The uuid of CDP disk number `i`.
pub fn disk_id(i: usize) -> Uuid {
    Uuid::from_u64_pair(0x6469_736b, i as u64 + 1)
}

/// Opens a volume, checks what survived and reopens its views. Answers whether it is served.
pub async fn open(world: &Rc<World>, vol: &Rc<Vol>) -> bool {
    let running = world.running();
    vol.calls_are_over();
    let accepted = world.accepted.get().filter(|(index, _)| *index == vol.index).map(|(_, health)| health);
    let spec = VolumeSpec {
        id: vol.id,
        name: format!("vol{}", vol.index),
        path: vol.primary.name.clone(),
        size: vol.shown.get() * 512,
        primary: vol.primary.attach(&running.executor),
        fence: world.folder.fence(vol.id),
        accept: accepted,
        attach_journal: false,
        undecided_reverts: world.folder.undecided(),
    };
    let handle = match running.engine.open_volume(spec).await {
        Ok(handle) => handle,
        Err(error) if world.any_fault() => {
            world.say(|| format!("volume {}: does not open: {error}", vol.index));
            return unserved(world, vol).await;
        }
        Err(error) => {
            world.fail(format!("volume {} does not open: {error}", vol.index));
            return false;
        }
    };
    let info = handle.info();
    world.say(|| format!("volume {}: {:?} {:?} {}", vol.index, info.state, info.health, info.health_reason));
    *vol.handle.borrow_mut() = Some(Rc::clone(&handle));
    let sectors = info.size / 512;
    // A resize that a crash cut off happened, or did not.
    let known = sectors == vol.shown.get()
        || vol.sizes.borrow().iter().any(|(_, acked, size)| acked.is_none() && *size == sectors);
    if !known && !world.record_fault() {
        world.fail(format!("volume {} has {sectors} sectors after a restart, it had {}", vol.index, vol.shown.get()));
        return false;
    }
    vol.settle_size(world.clock(), sectors);
    if vol.tampered.get() && accepted.is_none() {
        return tampered(world, vol, info.health).await;
    }
    if vol.tampered.replace(false) {
        // The admin goes on with the primary as it is: what was history has ended.
        let now = world.clock();
        vol.gaps.borrow_mut().push((0, now));
        vol.forget_history();
        vol.cut_off.set(true);
        world.views.borrow_mut().retain(|view| view.vol != vol.index);
    }
    match info.health {
        Health::Ok => {}
        Health::RevertIncomplete if world.any_fault() => return unserved(world, vol).await,
        Health::Offline if world.cdp_faulty.get() || world.store_faulty.get() => {}
        // An enable was cut off after its fence; protection comes on by itself.
        Health::Offline if vol.expect_on.get().is_none() || vol.cut_off.get() => vol.cut_off.set(true),
        Health::PrimaryFailing if world.primary_faulty.get() => {}
        Health::NeedsJournal if world.any_fault() => return unserved(world, vol).await,
        health => {
            world.fail(format!("volume {}: {health:?} after a restart: {}", vol.index, info.health_reason));
            return false;
        }
    }
    match vol.expect_on.get() {
        Some(on) if on != (info.state == CdpState::On) && !world.record_fault() => {
            world.fail(format!(
                "volume {}: the switch is {:?} after a restart, expected on: {on}",
                vol.index, info.state
            ));
            return false;
        }
        _ => vol.expect_on.set(Some(info.state == CdpState::On)),
    }
    let healthy = info.health == Health::Ok && world.journal_is_sound(vol);
    if healthy {
        vol.trust(world.clock());
    }
    vol.cleaning.set(0);
    if accepted.is_some() {
        vol.kept.borrow_mut().clear();
    }
    vol.last_look.set(Look { fresh: true, ..vol.last_look.get() });
    if accepted.is_some() || world.distrusts(vol, vol.history.get().1) {
        vol.forget_history();
    }
    if let Some(instant) = vol.forgotten(&info, world.clock(), world.history.setup.heavy) {
        let text = format!("volume {}: instant {instant} is not covered after a restart", vol.index);
        world.fail(format!("history was forgotten: {text}: {:?} {:?}", info.coverage, info.logs));
        return false;
    }
    // A marker is in the journal before whatever was acked behind it, and where the volume was protected it was answered when it was durable.
    if !admin::check_marks(world, vol, vol.lasting.get().1) {
        return false;
    }
    if info.state == CdpState::On && healthy {
        let reached = vol.history.get().1;
        vol.protect();
        if Vol::covers(&info, reached) {
            vol.history_is_durable(reached);
        } else {
            // Evicted, and rightly: it need not be there after the next start, either.
            vol.forget_history();
        }
        vol.gap_open.set(None);
    } else {
        vol.unprotect();
        if info.state == CdpState::On
            && let Some(from) = vol.gap_open.take()
        {
            // Protection comes on by itself, and nobody says when.
            vol.gaps.borrow_mut().push((from, world.clock()));
        }
    }
    if info.state == CdpState::Off {
        // A disable that a crash cut off, at the latest.
        vol.gap_open.set(Some(vol.gap_open.get().unwrap_or_else(|| world.clock())));
    }
    if vol.held.get().is_some_and(|held| held != info.held) && !world.record_fault() {
        world.fail(format!("volume {}: held: {} after a restart, expected {:?}", vol.index, info.held, vol.held.get()));
        return false;
    }
    vol.held.set(Some(info.held));
    if info.held {
        release(world, vol).await;
    }
    connect(world, vol);
    if accepted.is_some() && world.give_up.get() {
        // The bytes from before the revert are served, where the revert's are lost: each was once there, and that is all.
        rebase(world, vol).await;
        world.completed.set(true);
        admin::leave(world);
        return false;
    }
    // Where the journal was there after all, the override changed nothing.
    if accepted.is_some() && info.coverage.is_empty() && !rebase(world, vol).await {
        world.completed.set(true);
        admin::leave(world);
        return false;
    }
    verify(world, vol).await;
    reopen_views(world, vol).await;
    if looks_back_first(world) && !world.failed() {
        admin::check_all_views(world, vol).await;
    }
    !world.failed()
}

/// Whether all of a short history is looked at right after its crash, too, and not only behind what is left of it. That is so where the crash came at an even step: at
/// an odd one the history goes on at once, beside the work that the start has left.
fn looks_back_first(world: &World) -> bool {
    let counts = *world.counts.borrow();
    let even = |op: &Op| matches!(op.action, Action::Crash(crash) if crash.steps.is_multiple_of(2));
    let crashed = counts.kills + counts.power_cuts > 0;
    world.history.is_short() && crashed && !world.finished.get() && world.history.ops.iter().any(even)
}

/// The primary was written to while the agent was down, and CDP was on: that must be noticed, nothing served, and the admin
/// asked.
async fn tampered(world: &World, vol: &Vol, health: Health) -> bool {
    let had_cdp = world.folder.fence(vol.id).is_some_and(|fence| fence.state == cdp_journal::FenceState::Clean);
    if had_cdp && health != Health::PrimaryChanged {
        world.fail(format!("volume {}: somebody wrote to the primary, and health is {health:?}", vol.index));
        return false;
    }
    if had_cdp && vol.handle().export().read(0, 512).await.is_ok() {
        world.fail(format!("volume {}: served although the primary was changed", vol.index));
        return false;
    }
    world.accepted.set(Some((vol.index, health)));
    world.unclean.set(true);
    admin::leave(world);
    false
}

/// A volume that is not served for want of its journal: the disks come back, or the admin goes on without.
async fn unserved(world: &World, vol: &Vol) -> bool {
    let health = vol.handle.borrow().as_ref().map(|handle| handle.info().health);
    // An agent runs on like that: whatever it does meanwhile must lose nothing.
    if world.shared.rng.one_in(2) {
        sleep(world, 5_000_000_000).await;
    }
    if world.primary_faulty.get() && world.shared.rng.one_in(2) {
        world.say(|| "all primaries work again".to_owned());
        world.volumes.iter().for_each(|vol| vol.primary.heal());
    }
    let all_there = !world.disk_missing.get() && world.disks().all(|disk| !disk.is_faulty());
    // A failed sync dropped what reads still showed, and a power cut came: the journal has a hole, as it says.
    let dropped = all_there && health.is_some() && world.cdp.iter().any(|disk| disk.has_dropped());
    let given_up = dropped || health == Some(Health::RevertIncomplete);
    if let Some(health) = health.filter(|_| given_up || !all_there && world.shared.rng.one_in(5)) {
        world.say(|| format!("not served: the admin accepts {health:?}"));
        world.accepted.set(Some((vol.index, health)));
        world.give_up.set(given_up);
    } else if all_there && world.damaged.get() {
        // The journal is damaged below its durable point: a person decides. Nothing was served.
        world.say(|| "the journal is damaged; the history ends here".to_owned());
        world.completed.set(true);
    } else if all_there && world.cdp_faulty.get() && world.retries.get() < 5 {
        world.retries.set(world.retries.get() + 1);
        world.say(|| "not served: a CDP disk failed just now; the agent starts again".to_owned());
    } else if all_there {
        let reason = vol.handle.borrow().as_ref().map(|handle| handle.info().health_reason);
        world.fail(format!("volume {} is not served although all disks are there: {reason:?}", vol.index));
        return false;
    } else {
        world.say(|| "not served: all disks are put back, the agent starts again".to_owned());
        world.disks().for_each(|disk| disk.heal());
    }
    world.unclean.set(true);
    admin::leave(world);
    false
}

/// The admin lets clients in again.
pub async fn release(world: &World, vol: &Vol) {
    vol.hold_begins(true);
    let released = vol.handle().release().await;
    vol.holding.set(vol.holding.get() - 1);
    match released {
        // Another call that is under way may have held it again by the next step.
        Ok(()) => vol.held.set((vol.holding.get() == 0).then_some(false)),
        // A CDP disk is being left, and the primary does not take what is in memory alone.
        Err(Error::State(why)) if world.cdp_faulty.get() && vol.primary.is_faulty() => {
            world.say(|| format!("volume {}: release: {why}; all disks work again", vol.index));
            world.disks().for_each(|disk| disk.heal());
            sleep(world, 20_000_000_000).await;
            Box::pin(release(world, vol)).await;
        }
        // The fence has to know.
        Err(error @ Error::Device { .. }) if world.store_faulty.get() => {
            world.say(|| format!("volume {}: release: {error}; the state directory works again", vol.index));
            world.folder.set_failing(false);
            Box::pin(release(world, vol)).await;
        }
        Err(error) => world.fail(format!("release of volume {}: {error}", vol.index)),
    }
}

/// A client opens the volume for writing. Asked to go, it does so after a moment.
pub fn connect(world: &Rc<World>, vol: &Rc<Vol>) {
    vol.disconnected.set(false);
    let number = vol.connections.get() + 1;
    vol.connections.set(number);
    let (w, v) = (Rc::downgrade(world), Rc::clone(vol));
    let leave = move || {
        v.disconnected.set(true);
        let Some(world) = w.upgrade().filter(|world| world.running.borrow().is_some()) else { return };
        let host = SimHost(Rc::clone(&world.running().executor));
        let ns = world.shared.rng.below(2_000_000);
        host.0.after(ns, move || {
            // Not the next one, if that has come by then.
            if v.connections.get() == number {
                drop(v.guard.take());
            }
        });
    };
    match vol.handle().export().connect(true, Box::new(leave)) {
        Ok(guard) => *vol.guard.borrow_mut() = Some(guard),
        Err(error) => world.fail(format!("volume {}: connect: {error}", vol.index)),
    }
}

/// After an override the primary is what it is: each sector must be something that was once there. Flushed first, so that a power cut takes nothing of
/// it back. Answers whether it can be the base of what comes.
async fn rebase(world: &Rc<World>, vol: &Rc<Vol>) -> bool {
    let export = vol.handle().export();
    let seen = match export.flush().await {
        Ok(()) => export.read(0, (vol.shown.get() * 512) as u32).await,
        Err(error) => Err(error),
    };
    let parts = match seen {
        Ok(parts) => parts,
        Err(error) => {
            if !world.any_fault() {
                world.fail(format!("volume {} after an override: {error}", vol.index));
            }
            return false;
        }
    };
    let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
    let now = world.now(vol);
    let verdict = vol.oracle.borrow_mut().rebase(0, &bytes, now);
    if let Err(text) = verdict {
        world.fail(text);
    }
    !world.failed()
}

async fn reopen_views(world: &Rc<World>, vol: &Rc<Vol>) {
    let views: Vec<_> = world.views.borrow().iter().filter(|view| view.vol == vol.index).cloned().collect();
    for view in views {
        let before = Vol::covers(&vol.handle().info(), view.time);
        let result = vol.handle().reopen_view(view.id, cdp_journal::Instant(view.time), "").await;
        let after = Vol::covers(&vol.handle().info(), view.time);
        match result {
            Ok(handle) => {
                if handle.id() != view.id || handle.info().time.0 != view.time {
                    return world.fail(format!("view {} came back as another: {:?}", view.id, handle.info()));
                }
                *view.handle.borrow_mut() = Some(handle);
                let whole = read_view(world, &view, 0, view.sectors()).await;
                world.say(|| format!("view {} of volume {} is back: {whole}", view.time, view.vol));
            }
            Err(error) => {
                world.say(|| format!("view {} of volume {} is not back: {error}", view.time, view.vol));
                if before && after && !world.distrusts(vol, view.time) {
                    return world.fail(format!("view {} does not come back after a restart: {error}", view.time));
                }
                world.views.borrow_mut().retain(|other| !Rc::ptr_eq(other, &view));
            }
        }
    }
}

/// After the last operation: everything is checked, the agent stops, and the primaries must hold all by themselves.
async fn finish(world: &Rc<World>) {
    world.running().executor.arm_crash(None);
    world.armed.set(None);
    barrier(world).await;
    if world.failed() {
        return;
    }
    check_everything(world, 4).await;
    world.finished.set(true);
    admin::stop(world).await;
    // Every other history ends on disks that work: then nothing may stay as it must not.
    if world.history.seed.is_multiple_of(2) {
        world.disks().for_each(|disk| disk.heal());
    }
}

/// After the last start.
async fn last_checks(world: &Rc<World>) {
    check_everything(world, 2).await;
    sleep(world, 3_000_000_000).await;
    while !world.failed() && bounds::is_behind(world) {
        sleep(world, 1_000_000_000).await;
        bounds::look(world);
    }
    if !world.failed() {
        admin::stop(world).await;
    }
}

async fn check_everything(world: &Rc<World>, instants: u64) {
    for vol in &world.volumes {
        verify(world, vol).await;
        if world.history.is_short() {
            admin::check_all_views(world, vol).await;
            continue;
        }
        for _ in 0..instants {
            if world.failed() {
                return;
            }
            let pick = world.shared.rng.bits();
            admin::check_view(world, vol, pick).await;
        }
    }
    let views = world.views.borrow().clone();
    for view in views {
        if world.failed() {
            return;
        }
        read_view(world, &view, 0, view.sectors()).await;
    }
    let watched = watch(world, "the end".to_owned());
    watched.set(true);
}

/// What the primary holds by itself, after a clean stop: everything but the blocks that a revert could not bring back, which the fence names.
pub fn check_primary(world: &World, vol: &Vol) {
    let lost = world.folder.fence(vol.id).map(|fence| fence.lost_blocks).unwrap_or_default();
    let now = world.now(vol);
    let mut from = 0;
    for (first, count) in lost.into_iter().chain([(vol.sectors.div_ceil(8), 0)]) {
        let end = (first * 8).min(vol.sectors);
        let bytes = vol.primary.peek(from * 512, (end - from) * 512);
        let verdict = vol.oracle.borrow_mut().check(from, &bytes, When::Between(now, now));
        if let Err(text) = verdict {
            return world.fail(format!("the primary after a clean stop: {text}"));
        }
        from = ((first + count) * 8).min(vol.sectors);
    }
}
