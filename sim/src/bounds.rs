//! What must hold whenever anybody looks: bounds, gaps, history that goes only for a reason, trouble that ends when its cause has.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use cdp_journal::FenceState;
use cdp_journal::info::{CdpState, Health, VolumeInfo};

use crate::guest::sleep;
use crate::world::{Look, Vol, World};

/// Longest time that a volume may take to be protected again once all disks work, virtual nanoseconds.
const PROTECTED_NS: u64 = 60_000_000_000;
/// The same for a revert to be copied, and for the backlog of an idle volume to be destaged.
const CAUGHT_UP_NS: u64 = 300_000_000_000;

/// Looks at the bounds now and then.
pub async fn monitor(world: Rc<World>) {
    while !world.failed() && world.running.borrow().is_some() {
        look(&world);
        let ns = world.shared.rng.range(100_000, 400_000_000);
        sleep(&world, ns).await;
    }
}

/// One look at all volumes.
pub fn look(world: &World) {
    if world.failed() || world.running.borrow().is_none() {
        return;
    }
    for vol in &world.volumes {
        let Some(handle) = vol.handle.borrow().clone() else { continue };
        let info = handle.info();
        if info.health == Health::Ok {
            vol.cut_off.set(false);
        } else if !world.any_fault() && !vol.cut_off.get() {
            let text = format!("volume {} is {:?} without a fault: {}", vol.index, info.health, info.health_reason);
            return world.fail(text);
        }
        note_given_back(vol, &info);
        if let Some(settings) = info.settings {
            // A call that is under way may have raised it.
            vol.capacity.set(vol.capacity.get().max(settings.reserve_capacity));
        }
        if info.used_bytes > vol.capacity.get() {
            let text = format!("volume {} uses {} of {} bytes", vol.index, info.used_bytes, vol.capacity.get());
            return world.fail(format!("reserve_capacity is exceeded: {text}: {:?}", info.logs));
        }
        if let Some(settings) = info.settings
            && info.used_bytes <= settings.reserve_capacity
            && vol.editing.get() == 0
        {
            vol.capacity.set(settings.reserve_capacity);
        }
        if info.state == CdpState::On
            && info.health == Health::Ok
            && vol.distrusted.get() == u64::MAX
            && world.journal_is_sound(vol)
        {
            // It came back by itself, on another disk; or the fault was healed before any call met it.
            vol.protect();
            vol.trust(world.clock());
        }
        if !open_end_is_right(world, vol, &info) || !history_is_kept(world, vol, &info) || !recovers(world, vol, &info)
        {
            return;
        }
        let now = world.clock();
        let open = vol.gap_open.get().filter(|from| *from < now).map(|from| (from, now));
        for interval in &info.coverage {
            let end = interval.end.map_or(u64::MAX, |end| end.0);
            let gaps = vol.gaps.borrow();
            if let Some((from, to)) = gaps.iter().chain(&open).find(|(from, to)| interval.start.0 <= *to && end > *from)
            {
                let text = format!("{interval:?} covers instants in ({from}, {to}]");
                return world.fail(format!("a gap is presented as history: volume {}: {text}", vol.index));
            }
        }
    }
}

/// Counts what the logs held that have gone since the last look.
fn note_given_back(vol: &Vol, info: &VolumeInfo) {
    let held: BTreeMap<u64, u64> = info.logs.iter().map(|log| (log.seq, log.use_bytes)).collect();
    let seen = vol.logs_seen.replace(held.clone());
    let gone: u64 = seen.iter().filter(|(seq, _)| !held.contains_key(*seq)).map(|(_, bytes)| bytes).sum();
    vol.given_back.set(vol.given_back.get() + gone);
}

/// What is not recorded now has no history that goes on. While a switch is under way, or a failed CDP disk is being left, writes wait, and it may show.
fn open_end_is_right(world: &World, vol: &Vol, info: &VolumeInfo) -> bool {
    let unrecorded = [Health::Offline, Health::NeedsJournal, Health::PrimaryChanged].contains(&info.health);
    let goes_on = info.coverage.iter().any(|interval| interval.end.is_none());
    let leaving = world.folder.fence(vol.id).is_some_and(|fence| fence.state == FenceState::Detaching);
    if !goes_on || !(unrecorded || info.state == CdpState::Off) || leaving || vol.cleaning.get() > 0 {
        vol.open_end.set(None);
        return true;
    }
    let now = world.awake_ns();
    let since = vol.open_end.get().unwrap_or(now);
    vol.open_end.set(Some(since));
    let right = now - since <= PROTECTED_NS;
    if !right {
        let text = format!("volume {} is {:?}, {:?}: {:?}", vol.index, info.state, info.health, info.coverage);
        world.fail(format!("history goes on while nothing is recorded: {text}"));
    }
    right
}

/// What was history is history still, or there is a reason: its age, a reservation that is used, an admin's clean or override, a CDP disk that failed.
fn history_is_kept(world: &World, vol: &Vol, info: &VolumeInfo) -> bool {
    let (last, stats) = (vol.last_look.get(), vol.handle().stats());
    let (running, boot_ns) = (world.running(), world.shared.boot_ns());
    let age_now = running.began.0 + (boot_ns - running.began.1);
    let look = Look {
        fresh: false,
        evicted: stats.evicted_capacity,
        used_bytes: info.used_bytes,
        revert_steps: vol.revert_steps.get(),
        duration_s: info.settings.map_or(0, |settings| settings.reserve_duration_s),
        log: info.logs.last().map_or(last.log, |log| log.seq),
        age: (age_now, boot_ns),
    };
    if vol.cleaning.get() > 0 {
        return true;
    }
    vol.last_look.set(look);
    // The agent counts from its start.
    let made_room = look.evicted.saturating_sub(if last.fresh { 0 } else { last.evicted });
    world.count(|counts| counts.made_room += made_room);
    let shortest_s = vol.shortest_s.get();
    if vol.editing.get() == 0 {
        vol.shortest_s.set(u64::MAX);
    }
    // Over a restart the clock of ages may step back with the wall clock: what was old enough before is gone.
    let age_now = age_now.max(last.age.0 + (boot_ns - last.age.1));
    let duration_s = look.duration_s.min(last.duration_s).min(shortest_s);
    let aged = |instant: u64| age_now.saturating_sub(instant) / 1_000_000_000 >= duration_s;
    // An eviction before a crash may not have been counted at a look.
    let evicted = (last.fresh || stats.evicted_capacity > last.evicted)
        && (last.used_bytes.max(look.used_bytes) > vol.capacity.get() / 4
            || look.revert_steps > last.revert_steps
            || vol.reverts_under_way.get() > 0);
    let mut kept = vol.kept.borrow_mut();
    kept.retain(|instant| !world.distrusts(vol, *instant));
    let gone: Vec<u64> = kept.iter().copied().filter(|instant| !Vol::covers(info, *instant)).collect();
    for instant in gone {
        kept.remove(&instant);
        let cleaned = vol.gaps.borrow().iter().any(|(from, to)| (*from..=*to).contains(&instant));
        if !evicted && !cleaned && !aged(instant) {
            let text = format!("{:?}; used {} of {}", info.coverage, info.used_bytes, vol.capacity.get());
            world.fail(format!("history went for no reason: volume {}: instant {instant}: {text}", vol.index));
            return false;
        }
    }
    let seen = world.instants.borrow();
    let ends = info.coverage.iter().flat_map(|interval| [Some(interval.start), interval.end]).flatten();
    kept.extend(seen.iter().copied().chain(ends.map(|end| end.0)).filter(|instant| Vol::covers(info, *instant)));
    true
}

/// Where all disks work a volume is protected again after a while, and what is to be copied is copied.
fn recovers(world: &World, vol: &Vol, info: &VolumeInfo) -> bool {
    let now = world.awake_ns();
    // A CDP disk that failed is used again after the next start; of a primary nothing remains.
    let works = world.cdp.iter().all(|disk| disk.is_sound())
        && world.volumes.iter().all(|vol| !vol.primary.is_faulty())
        && !world.folder.is_failing()
        && !world.damaged.get();
    let protected = info.state == CdpState::Off || [Health::Ok, Health::RevertIncomplete].contains(&info.health);
    let since = |cell: &Cell<Option<u64>>, well: bool| {
        cell.set(if works && !well { Some(cell.get().unwrap_or(now)) } else { None });
        now - cell.get().unwrap_or(now)
    };
    let (ailing, reverting) = (since(&vol.ailing, protected), since(&vol.reverting, info.revert.is_none()));
    let backlog = since(&vol.backlog, info.backlog_bytes == 0 || world.in_flight.get() > 0);
    let slow = if world.history.setup.primary_slow_ns > 0 { 10 } else { 1 };
    let text = match () {
        () if ailing > PROTECTED_NS => format!("is {:?}: {}", info.health, info.health_reason),
        () if reverting > CAUGHT_UP_NS * slow => format!("still reverts: {:?}", info.revert),
        () if backlog > CAUGHT_UP_NS * slow => format!("still has a backlog of {} bytes", info.backlog_bytes),
        () => return true,
    };
    world.fail(format!("volume {} {text}, and all disks work", vol.index));
    false
}

/// Whether a volume waits still for what [`look`] gives it time for.
pub fn is_behind(world: &World) -> bool {
    world.volumes.iter().any(|vol| {
        let waits = [&vol.ailing, &vol.reverting, &vol.backlog];
        vol.handle.borrow().is_some() && waits.iter().any(|since| since.get().is_some())
    })
}
