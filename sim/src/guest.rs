//! What guests do, and the judging of what they see.

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::{Error, Host, Slice, payload_buf};

use crate::executor::{Completion, SimHost};
use crate::model::{Kind, When};
use crate::stamp::{self, SECTOR, Value, decode};
use crate::workload::Action;
use crate::world::{OpenView, SCRATCH_VOLUME, Vol, World};

/// Longest time that any call may take where no disk is slow, virtual nanoseconds.
const PATIENCE_NS: u64 = 300_000_000_000;

/// Longest time that a guest may wait for anything while no disk is slow and its own works: `stall_max`, and what leaving a CDP disk takes.
const GUEST_WAIT_NS: u64 = 20_000_000_000;

/// The same while a primary fails: an admin's switch waits for it for half a minute, and then takes itself back.
const GUEST_WAIT_FAILING_NS: u64 = 45_000_000_000;

/// Fails the run if the returned flag is not set in time. Time in which the agent was frozen does not count: it cannot answer then.
pub fn watch(world: &Rc<World>, what: String) -> Rc<Cell<bool>> {
    let done = Rc::new(Cell::new(false));
    watch_for(world, patience_ns(world), what, Rc::clone(&done));
    done
}

/// Longest time that any call may take, virtual nanoseconds.
fn patience_ns(world: &World) -> u64 {
    // A primary that takes up to 200 ms a call, brought one block at a time what two reverts copy, has work for longer.
    if world.history.setup.primary_slow_ns > 0 { 10 * PATIENCE_NS } else { PATIENCE_NS }
}

fn watch_for(world: &Rc<World>, ns: u64, what: String, done: Rc<Cell<bool>>) {
    let (weak, frozen) = (Rc::downgrade(world), world.frozen_ns.get());
    world.running().executor.after(ns, move || {
        if let (false, Some(world)) = (done.get(), weak.upgrade()) {
            match world.frozen_ns.get() - frozen {
                0 => world.fail(format!("no answer in {} s: {what}", patience_ns(&world) / 1_000_000_000)),
                longer => watch_for(&world, longer, what, done),
            }
        }
    });
}

/// Waits.
pub async fn sleep(world: &World, ns: u64) {
    SimHost(Rc::clone(&world.running().executor)).sleep(ns).await;
}

/// Waits until no guest request is in flight.
pub async fn barrier(world: &Rc<World>) {
    while world.in_flight.get() > 0 && !world.failed() {
        sleep(world, 200_000).await;
    }
}

/// The part of a request that lies in a volume of so many sectors.
fn within(mut action: Action, sectors: u64) -> Option<Action> {
    if let Action::Write { sector, count, .. }
    | Action::Zero { sector, count, .. }
    | Action::Trim { sector, count, .. }
    | Action::Read { sector, count, .. } = &mut action
    {
        *count = (*count).min(sectors.checked_sub(*sector).filter(|left| *left > 0)?);
    }
    Some(action)
}

/// Starts a guest's request beside the others; the answer tells when it is acknowledged.
pub fn submit(world: &Rc<World>, vol: &Rc<Vol>, action: Action) -> Completion<()> {
    let done = Completion::new();
    let Some(action) = within(action, vol.shown.get()) else {
        done.complete(());
        return done;
    };
    let (sender, w, v) = (done.clone(), Rc::clone(world), Rc::clone(vol));
    world.in_flight.set(world.in_flight.get() + 1);
    SimHost(Rc::clone(&world.running().executor)).spawn(Box::pin(async move {
        let watched = watch(&w, format!("{action:?}"));
        request(&w, &v, &action).await;
        watched.set(true);
        w.in_flight.set(w.in_flight.get() - 1);
        sender.complete(());
    }));
    done
}

/// Whether it may be the error of a volume's primary: it fails, or it failed once, and what could not be read there when it was overwritten stays unreadable (a
/// revert may bring that back).
fn is_of_primary(world: &World, vol: &Vol, error: &Error) -> bool {
    world.primary_errors.get() && matches!(error, Error::Device { device, .. } if *device == vol.primary.name)
        || world.primary_faulty.get() && matches!(error, Error::Device { op: "read before-image of", .. })
}

/// Whether it may be the error of a block that a revert could not bring back: the lost CDP disk held it alone, or a primary could not read it when it was to
/// be kept.
fn is_of_revert(world: &World, vol: &Vol, error: &Error) -> bool {
    let faulty = world.cdp_faulty.get() || (world.primary_faulty.get() || world.damaged.get()) && vol.reverts.get() > 0;
    faulty && matches!(error, Error::Device { op: "read lost" | "write a part of", .. })
}

/// Whether the guest may get this error.
fn forgiven(world: &World, vol: &Vol, forced: u64, error: &Error) -> bool {
    let held = vol.forced.get() != forced || vol.disconnected.get();
    let refused = matches!(error, Error::State(_) | Error::Gone(_));
    let of_forced = matches!(error, Error::Device { op: "read CDP disk", .. } if vol.reverts.get() > 0)
        // The same blocks, kept as unreadable by a later log, and shown by a revert to before it while that is copied.
        || matches!(error, Error::Device { op: "read before-image of", .. } if vol.reverts.get() > 0);
    // Damage on the CDP disk shows where a pending revert or the overlay needs it: an error, never wrong bytes.
    let damage = world.damaged.get() && matches!(error, Error::Damaged { .. });
    let of_disks = is_of_primary(world, vol, error) || is_of_revert(world, vol, error) || damage;
    of_disks || (held && refused) || ((world.cdp_faulty.get() || world.damaged.get()) && of_forced)
}

async fn request(world: &Rc<World>, vol: &Rc<Vol>, action: &Action) {
    let export = vol.handle().export();
    let forced = vol.forced.get();
    let started = world.shared.boot_ns();
    let frozen = world.frozen_ns.get();
    let (unprotected, switches) = (!vol.protected.get(), vol.switches.get());
    let began = world.now(vol);
    let writes = matches!(action, Action::Write { .. } | Action::Zero { .. } | Action::Trim { .. });
    if writes && world.history.is_short() {
        world.remember();
    }
    let begin = |kind, sector, count| vol.oracle.borrow_mut().begin(kind, sector, count, unprotected, began);
    let bytes = |count: u64| count as u32 * SECTOR as u32;
    let (op, result, fua) = match *action {
        Action::Write { sector, count, fua, .. } => {
            let op = begin(Kind::Data, sector, count);
            let offset = sector * SECTOR as u64;
            let mut buf = payload_buf(offset, bytes(count));
            let start = (offset % 4096) as usize;
            let filled = &mut buf[start..start + bytes(count) as usize];
            stamp::fill_all(vol.index as u32, op, sector, filled);
            world.say(|| format!("vol {} op {op}: write {sector}+{count}{}", vol.index, if fua { " FUA" } else { "" }));
            (Some(op), export.write(offset, bytes(count), buf, fua).await, fua)
        }
        Action::Zero { sector, count, no_hole, fua, .. } => {
            let op = begin(Kind::Zero, sector, count);
            world.say(|| format!("vol {} op {op}: zero {sector}+{count}{}", vol.index, if fua { " FUA" } else { "" }));
            (Some(op), export.write_zeroes(sector * SECTOR as u64, bytes(count), no_hole, fua).await, fua)
        }
        Action::Trim { sector, count, .. } => {
            let op = begin(Kind::Discard, sector, count);
            world.say(|| format!("vol {} op {op}: trim {sector}+{count}", vol.index));
            (Some(op), export.trim(sector * SECTOR as u64, bytes(count)).await, false)
        }
        Action::Flush { .. } => {
            world.say(|| format!("vol {}: flush", vol.index));
            let result = export.flush().await;
            if result.is_ok() {
                let now = world.now(vol);
                let made_durable = vol.oracle.borrow_mut().flushed(began, now);
                world.count(|counts| counts.flushes += u64::from(made_durable > 0));
                if !unprotected && vol.protected.get() && vol.switches.get() == switches {
                    vol.history_is_durable(began.0);
                }
                world.say(|| format!("vol {}: flushed", vol.index));
            } else {
                vol.oracle.borrow_mut().sync_failed();
            }
            (None, result, false)
        }
        Action::Read { sector, count, .. } => {
            read_volume(world, vol, sector, count).await;
            (None, Ok(()), false)
        }
        _ => return,
    };
    let waited = world.shared.boot_ns() - started - (world.frozen_ns.get() - frozen);
    let slow = world.slow.get() || world.history.setup.primary_slow_ns > 0;
    let most = if world.primary_faulty.get() { GUEST_WAIT_FAILING_NS } else { GUEST_WAIT_NS };
    if waited > most && !slow {
        return world.fail(format!("a guest waited {} s: {action:?}", waited / 1_000_000_000));
    }
    match (op, result) {
        (Some(op), Ok(())) => {
            let now = world.now(vol);
            let weak = unprotected || !vol.protected.get() || vol.switches.get() != switches;
            vol.oracle.borrow_mut().ack(op, weak, now);
            if !weak {
                vol.history_goes_on(began.0, action.bytes());
            }
            if fua {
                vol.oracle.borrow_mut().durable(op, now);
            }
            vol.before_write.set(vol.before_write.get().max(Some(began.0)));
            if world.history.is_short() {
                world.remember();
            }
            world.count(|counts| match action {
                Action::Zero { .. } => counts.zeroes += 1,
                Action::Trim { .. } => counts.discards += 1,
                _ => {}
            });
            world.say(|| format!("vol {} op {op}: acked at {}", vol.index, now.0));
        }
        (_, Err(error)) if !forgiven(world, vol, forced, &error) => {
            world.fail(format!("the guest got an error: {action:?}: {error}"));
        }
        (_, Err(error)) => {
            // FUA on a plain disk is a write and a sync of everything.
            if fua {
                vol.oracle.borrow_mut().sync_failed();
            }
            world.say(|| format!("vol {}: {action:?}: {error}", vol.index));
        }
        (None, Ok(())) => {}
    }
}

fn join(parts: &[Slice]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(parts.iter().map(Slice::len).sum());
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes
}

/// Reads a part of a volume and judges it.
pub async fn read_volume(world: &Rc<World>, vol: &Rc<Vol>, sector: u64, count: u64) {
    let forced = vol.forced.get();
    let from = world.now(vol);
    let result = vol.handle().export().read(sector * SECTOR as u64, count as u32 * SECTOR as u32).await;
    match result {
        Ok(parts) => {
            let to = world.now(vol);
            let bytes = join(&parts);
            if bytes.len() as u64 != count * SECTOR as u64 {
                return world.fail(format!("a read of {count} sectors gave {} bytes", bytes.len()));
            }
            let verdict = vol.oracle.borrow_mut().check(sector, &bytes, When::Between(from, to));
            if let Err(text) = verdict {
                return world.fail(text);
            }
            world.count(|counts| counts.reads_checked += 1);
        }
        Err(error) if forgiven(world, vol, forced, &error) => {}
        Err(error) => world.fail(format!("volume {}: read {sector}+{count}: {error}", vol.index)),
    }
}

/// Reads all of a volume and judges it.
pub async fn verify(world: &Rc<World>, vol: &Rc<Vol>) {
    let watched = watch(world, format!("verify volume {}", vol.index));
    read_volume(world, vol, 0, vol.shown.get()).await;
    watched.set(true);
}

/// Whether an open view may say that it is lost: its log is gone, and no interval tells of its instant any more. Age alone takes no log from it.
pub fn may_be_lost(world: &World, vol: &Vol, time: u64, why: &str) -> bool {
    world.distrusts(vol, time) || !why.contains("reserve_duration") && !Vol::covers(&vol.handle().info(), time)
}

/// Reads a part of a view and judges it. Answers whether the view still works.
pub async fn read_view(world: &Rc<World>, view: &Rc<OpenView>, sector: u64, count: u64) -> bool {
    let vol = &world.volumes[view.vol];
    let Some(handle) = view.handle.borrow().clone() else { return false };
    let watched = watch(world, format!("read of view {} of volume {}", view.time, view.vol));
    view.busy.set(view.busy.get() + 1);
    let before = view.scratch.borrow().clone();
    let result = handle.export().read(sector * SECTOR as u64, count as u32 * SECTOR as u32).await;
    view.busy.set(view.busy.get() - 1);
    watched.set(true);
    let bytes = match result {
        Ok(parts) => join(&parts),
        Err(error) => {
            let lost = handle.info().lost;
            world.say(|| format!("view {} of volume {}: {error}", view.time, view.vol));
            let closed = world.closed.borrow().contains(&view.id);
            // What a view shows of blocks that no log has touched is on the primary.
            let of_primary = is_of_primary(world, vol, &error) || is_of_revert(world, vol, &error);
            let rightly = lost.is_some_and(|why| may_be_lost(world, vol, view.time, &why));
            if !rightly && !closed && !of_primary && !world.distrusts(vol, view.time) {
                world.fail(format!("view {} of volume {}: read {sector}+{count}: {error}", view.time, view.vol));
            }
            return false;
        }
    };
    if bytes.len() as u64 != count * SECTOR as u64 {
        world.fail(format!("a view's read of {count} sectors gave {} bytes", bytes.len()));
        return false;
    }
    world.count(|counts| counts.views_checked += 1);
    for (i, chunk) in bytes.chunks_exact(SECTOR).enumerate() {
        let at = sector + i as u64;
        // A write into scratch that ran beside the read may show or not.
        let (early, late) = (before.get(&at).copied(), view.scratch.borrow().get(&at).copied());
        let in_scratch =
            |stamp: Option<u32>| stamp.is_some_and(|stamp| decode(SCRATCH_VOLUME, at, chunk) == Value::Stamp(stamp));
        if in_scratch(early) || in_scratch(late) {
            continue;
        }
        let verdict = match early {
            Some(stamp) => Err(format!("sector {at} of a writable view: scratch write {stamp} is not there")),
            None => vol.oracle.borrow_mut().check(at, chunk, When::At(view.time)),
        };
        if let Err(text) = verdict {
            world.fail(format!("view {} (writable: {}): {text}", view.time, view.writable));
            return false;
        }
    }
    true
}

/// Writes into the scratch of a writable view.
pub async fn write_view(world: &Rc<World>, view: &Rc<OpenView>, sector: u64, count: u64) {
    let Some(handle) = view.handle.borrow().clone() else { return };
    let stamp_number = world.scratch_stamps.get();
    world.scratch_stamps.set(stamp_number + 1);
    let offset = sector * SECTOR as u64;
    let len = count as u32 * SECTOR as u32;
    let mut buf = payload_buf(offset, len);
    let start = (offset % 4096) as usize;
    stamp::fill_all(SCRATCH_VOLUME, stamp_number, sector, &mut buf[start..start + len as usize]);
    let watched = watch(world, format!("write to view {}", view.time));
    let result = handle.export().write(offset, len, buf, false).await;
    watched.set(true);
    match result {
        Ok(()) if !view.writable => world.fail("a read-only view took a write"),
        Ok(()) => {
            world.count(|counts| counts.scratch_writes += 1);
            let mut scratch = view.scratch.borrow_mut();
            scratch.extend((sector..sector + count).map(|at| (at, stamp_number)));
        }
        Err(error) => {
            let vol = &world.volumes[view.vol];
            let lost = handle.info().lost.is_some_and(|why| may_be_lost(world, vol, view.time, &why));
            let full = matches!(error, Error::NoSpace { .. });
            let closed = world.closed.borrow().contains(&view.id);
            if view.writable && !lost && !full && !closed && !world.any_fault() {
                world.fail(format!("writable view {}: write {sector}+{count}: {error}", view.time));
            }
        }
    }
}

/// Writable views lose their scratch with the agent; they are closed.
pub fn forget_scratch(world: &World) {
    world.views.borrow_mut().retain(|view| !view.writable);
}
