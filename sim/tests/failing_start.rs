//! Starts on disks that are not what they were: a volume is served if what it needs can be read.

mod common;

use std::rc::Rc;

use cdp_journal::format::{CLOCK_A, CLOCK_B, Geometry, SUPERBLOCK_A, SUPERBLOCK_B};
use cdp_journal::info::Health;
use cdp_journal::{BLOCK, EngineConfig, Host as _, payload_buf};
use cdp_sim::disk::{Fault, FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND, every, every_within};

const PIECE: u32 = 64 << 10;
const PIECES: u64 = 12;

fn unreadable(at: u64) -> Fault {
    every_within(FaultOn::Read, FaultKind::Eio, at, BLOCK)
}

/// Writes, flushed, more than half a segment, so that there is a spare one. Then `more`, and a kill.
fn killed(
    shared: &Rc<Shared>,
    place: &Rc<Place>,
    more: impl AsyncFnOnce(&Place, &SimHost, &Rc<cdp_journal::Volume>) + 'static,
) {
    let executor = Executor::new(Rc::clone(shared));
    let (exec, here) = (Rc::clone(&executor), Rc::clone(place));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (_engine, volume) = here.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        for piece in 0..PIECES {
            let offset = piece * u64::from(PIECE);
            let mut data = payload_buf(offset, PIECE);
            data.fill(piece as u8 + 1);
            export.write(offset, PIECE, data, false).await.unwrap();
        }
        export.flush().await.unwrap();
        host.sleep(SECOND / 10).await;
        more(&here, &host, &volume).await;
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    executor.kill();
    place.cdp.kill(&shared.rng);
    place.primary.kill(&shared.rng);
}

/// Starts, and checks that everything can be read. Answers the volume's health a while later.
fn health_at_start(shared: &Rc<Shared>, place: &Rc<Place>) -> Health {
    let executor = Executor::new(Rc::clone(shared));
    let found = Rc::new(std::cell::Cell::new(None));
    let (exec, here, tell) = (Rc::clone(&executor), Rc::clone(place), Rc::clone(&found));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = here.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        for _ in 0..2 {
            for piece in 0..PIECES {
                let parts = export.read(piece * u64::from(PIECE), PIECE).await.unwrap();
                assert!(parts.iter().all(|part| part.iter().all(|byte| *byte == piece as u8 + 1)), "piece {piece}");
            }
            host.sleep(20 * SECOND).await;
        }
        tell.set(Some(volume.info().health));
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    executor.kill();
    found.get().expect("it was opened")
}

/// Goal: acked writes that can be read are brought to the primary, and the volume is served, though the CDP disk takes no more writes.
#[test]
fn a_journal_on_a_disk_that_cannot_be_written_is_redone() {
    for on in [FaultOn::Write, FaultOn::Sync] {
        let (shared, place) = (Shared::new(59, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
        killed(&shared, &place, async |_, _, _| ());
        place.cdp.fault(every(on, FaultKind::Eio));
        assert_eq!(health_at_start(&shared, &place), Health::Offline, "{on:?}");
    }
}

/// Goal: a volume that has left a failed CDP disk is served at the next start, though what it left there still cannot be freed.
#[test]
fn a_volume_that_has_left_a_broken_disk_is_served_while_that_is_broken() {
    let (shared, place) = (Shared::new(61, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
    killed(&shared, &place, async |place, host, volume| {
        place.cdp.fault(every(FaultOn::Write, FaultKind::Eio));
        let offset = u64::from(PIECE) * 20;
        volume_write(volume, offset).await;
        while volume.info().health != Health::Offline || volume.is_leaving() {
            host.sleep(SECOND).await;
        }
    });
    place.cdp.fault(every(FaultOn::Write, FaultKind::Eio));
    assert_eq!(health_at_start(&shared, &place), Health::Offline);
}

async fn volume_write(volume: &Rc<cdp_journal::Volume>, offset: u64) {
    volume.export().write(offset, PIECE, payload_buf(offset, PIECE), false).await.unwrap();
}

/// Goal: one block that nobody needs does not keep a volume, or a whole CDP disk, from being served.
#[test]
fn a_start_does_not_need_what_it_does_not_use() {
    let geometry = Geometry::of(160 << 20, 1 << 20).unwrap();
    let in_segment = |block: u32| move |segment: u32| geometry.at(segment, block);
    for block in [SUPERBLOCK_A, SUPERBLOCK_B, CLOCK_A, CLOCK_B] {
        let (shared, place) = (Shared::new(67, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
        killed(&shared, &place, async |_, _, _| ());
        place.cdp.fault(unreadable(block));
        assert_eq!(health_at_start(&shared, &place), Health::Ok, "at {block}");
    }
    // Behind all frames of a segment, where nothing was written yet.
    for block in [245, 250, 254] {
        let (shared, place) = (Shared::new(71, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
        killed(&shared, &place, async |_, _, _| ());
        for segment in 0..8 {
            place.cdp.fault(unreadable(in_segment(block)(segment)));
        }
        assert_eq!(health_at_start(&shared, &place), Health::Ok, "block {block} of each segment");
    }
}

/// A kill, or a power cut.
fn crash(shared: &Shared, place: &Place, power: bool) {
    for disk in [&place.cdp, &place.primary] {
        if power {
            disk.power_cut(&shared.rng);
        } else {
            disk.kill(&shared.rng);
        }
    }
    place.folder.crash(&shared.rng);
}

/// Goal: a start after a crash may be cut off by a crash of the other kind: what was flushed is there, and the volume is served and protected.
/// Method: a kill, and a power cut at every few steps of the start after it, until that comes behind it; and the other way round.
#[test]
fn a_start_after_a_kill_may_end_in_a_power_cut_and_the_other_way_round() {
    for power in [false, true] {
        let mut cut_off = 0;
        for steps in (1..).step_by(7) {
            let (shared, place) = (Shared::new(79 + steps, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
            killed(&shared, &place, async |_, _, volume| volume_write(volume, u64::from(PIECE) * 20).await);
            crash(&shared, &place, power);
            let executor = Executor::new(Rc::clone(&shared));
            let (exec, here) = (Rc::clone(&executor), Rc::clone(&place));
            executor.arm_crash(Some(steps));
            let root = async move { drop(here.start(&exec, EngineConfig::default()).await) };
            let outcome = executor.run(Box::pin(root));
            assert!(matches!(outcome, Outcome::Done | Outcome::Crash), "{outcome:?} after {steps} steps");
            executor.kill();
            crash(&shared, &place, !power);
            let health = health_at_start(&shared, &place);
            assert_eq!(health, Health::Ok, "the second crash after {steps} steps, a kill: {power}");
            if outcome == Outcome::Done {
                break;
            }
            cut_off += 1;
        }
        assert!(cut_off > 1, "{cut_off} starts were cut off: this shows nothing");
    }
}

/// Goal: what a killed agent left in the drive's cache is durable before the next one overwrites what is older.
#[test]
fn a_start_syncs_what_it_read() {
    let (shared, place) = (Shared::new(73, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
    killed(&shared, &place, async |place, _, volume| {
        volume_write(volume, u64::from(PIECE) * 20).await;
        assert!(place.cdp.unsynced() > 0, "this shows nothing");
    });
    assert!(place.cdp.unsynced() > 0, "this shows nothing");
    let executor = Executor::new(Rc::clone(&shared));
    let (exec, here) = (Rc::clone(&executor), Rc::clone(&place));
    let root = async move {
        let clock = std::sync::Arc::new(cdp_journal::clock::HostClock::new(here.folder.clock()));
        let host = Rc::new(SimHost(Rc::clone(&exec)));
        let (store, config) = (here.folder.attach(&exec), EngineConfig::default());
        let engine = cdp_journal::Engine::new(host, clock, store, config, Box::new(|_| {}));
        engine.add_disk(here.cdp.attach(&exec), "cdp".into()).await.unwrap();
        assert_eq!(here.cdp.unsynced(), 0);
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}
