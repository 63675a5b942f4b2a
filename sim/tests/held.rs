//! Forced reverts and those whom they send away.

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use cdp_journal::RevertRequest;
use cdp_journal::{BLOCK, ClientGuard, EngineConfig, Host as _, payload_buf};
use cdp_sim::disk::{FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND, every};

fn forced(target: cdp_journal::Instant, release: bool) -> RevertRequest {
    RevertRequest { target, force: true, release, dry_run: false }
}

/// A client that goes as soon as it is asked to.
fn obedient(export: &Rc<dyn cdp_journal::Export>) {
    let guard = Rc::new(RefCell::new(None::<ClientGuard>));
    let kept = Rc::clone(&guard);
    *guard.borrow_mut() = Some(export.connect(true, Box::new(move || drop(kept.take()))).unwrap());
}

/// Goal: a revert that counts after a crash keeps the guest out whose caches are of before it.
/// Method: the process is killed at every step of a forced revert.
#[test]
fn a_forced_revert_that_survives_a_kill_holds_the_export() {
    let (mut survived, mut before) = (0, 0);
    for steps in 1.. {
        let place = Rc::new(Place::new(160, 16));
        let shared = Shared::new(17, 1_700_000_000 * SECOND);
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, here) = (Rc::clone(&executor), Rc::clone(&place));
        let root = async move {
            let (engine, volume) = here.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            let write = async || export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
            write().await;
            let target = engine.tick().await.unwrap();
            write().await;
            obedient(&export);
            exec.arm_crash(Some(steps));
            volume.revert(forced(target, false)).await.unwrap();
            exec.arm_crash(None);
        };
        let ended = executor.run(Box::pin(root)) == Outcome::Done;
        executor.kill();
        place.cdp.kill(&shared.rng);
        place.primary.kill(&shared.rng);
        let executor = Executor::new(shared);
        let exec = Rc::clone(&executor);
        let found = Rc::new(Cell::new(None));
        let tell = Rc::clone(&found);
        let root = async move {
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let reverted = !volume.reverts().await.unwrap().is_empty();
            tell.set(Some((reverted, volume.info().held)));
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        let (reverted, held) = found.get().expect("it was opened");
        assert!(held || !reverted, "killed after {steps} steps: reverted, and anybody gets in");
        if ended {
            assert!(reverted);
            break;
        }
        survived += u32::from(reverted);
        before += u32::from(!reverted);
    }
    assert!(survived > 0 && before > 0, "{survived} kills after it counted, {before} before: this shows nothing");
}

/// Goal: the export stays held when the CDP disk whose journal said so is lost, also over a restart, until `release`; and then it is not held any more.
#[test]
fn a_held_export_stays_held_without_its_journal() {
    let place = Rc::new(Place::new(160, 16));
    for start in 0..3 {
        let executor = Executor::new(Shared::new(19 + start, (1_700_000_000 + start * 1000) * SECOND));
        let (exec, place) = (Rc::clone(&executor), Rc::clone(&place));
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            match start {
                0 => {
                    export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
                    let target = engine.tick().await.unwrap();
                    obedient(&export);
                    volume.revert(forced(target, false)).await.unwrap();
                    volume.revert_done().await.unwrap();
                    let broken = every(FaultOn::Write, FaultKind::Eio);
                    place.cdp.fault(broken);
                    volume
                        .mark("x", cdp_journal::info::MarkerKind::Crash, engine.tick().await.unwrap())
                        .await
                        .unwrap_err();
                    while volume.is_leaving() {
                        host.sleep(SECOND / 10).await;
                    }
                    assert!(volume.info().held);
                    place.cdp.heal();
                }
                1 => {
                    assert!(volume.info().held, "after the CDP disk failed and a restart");
                    assert!(export.connect(true, Box::new(|| ())).is_err());
                    volume.release().await.unwrap();
                }
                _ => assert!(!volume.info().held, "it was released"),
            }
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
    }
}

/// Goal: a guest that connects anew the moment it is sent away does not keep a forced revert from being made.
#[test]
fn a_client_that_comes_back_at_once_does_not_stop_a_forced_revert() {
    let executor = Executor::new(Shared::new(23, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = Rc::new(SimHost(Rc::clone(&exec)));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        let target = engine.tick().await.unwrap();
        // Its last request takes a second more; by then it has been back three times.
        let guard = Rc::new(RefCell::new(None::<ClientGuard>));
        let asked = {
            let (guard, export, host, again) =
                (Rc::clone(&guard), Rc::clone(&export), Rc::clone(&host), Rc::clone(&host));
            move || {
                host.spawn(Box::pin(async move {
                    for _ in 0..3 {
                        if let Ok(guard) = export.connect(true, Box::new(|| ())) {
                            std::mem::forget(guard);
                        }
                        again.sleep(SECOND / 3).await;
                    }
                    drop(guard.take());
                }));
            }
        };
        *guard.borrow_mut() = Some(export.connect(true, Box::new(asked)).unwrap());
        volume.revert(forced(target, true)).await.unwrap();
        host.sleep(SECOND).await;
        drop(export.connect(true, Box::new(|| ())).expect("it is released"));
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: a revert on a CDP disk that has failed is refused and changes nothing, also in the moment before that disk is left.
/// Method: the primary takes 10 s for a write, so that the destager does not see for so long that an append failed.
#[test]
fn a_revert_on_a_failed_disk_loses_nothing() {
    let executor = Executor::new(Shared::new(43, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        let write = async |offset: u64, byte: u8| {
            let mut data = payload_buf(offset, BLOCK as u32);
            data.fill(byte);
            export.write(offset, BLOCK as u32, data, false).await.unwrap();
        };
        write(0, 1).await;
        let target = engine.tick().await.unwrap();
        write(0, 2).await;
        host.sleep(5 * SECOND).await;
        place.primary.fault(every(FaultOn::Write, FaultKind::Slow(10 * SECOND)));
        write(8 * BLOCK, 3).await;
        host.sleep(3 * SECOND).await;
        place.cdp.fault(every(FaultOn::Write, FaultKind::Eio));
        let late = write(16 * BLOCK, 4);
        let reverts = async {
            while !volume.is_leaving() {
                host.sleep(SECOND / 1000).await;
            }
            assert!(volume.revert(forced(target, true)).await.is_err(), "it cannot be kept");
        };
        futures::future::join(late, reverts).await;
        place.primary.heal();
        host.sleep(30 * SECOND).await;
        for (offset, byte) in [(0, 2), (8 * BLOCK, 3), (16 * BLOCK, 4)] {
            let parts = export.read(offset, BLOCK as u32).await.unwrap();
            assert!(parts.iter().all(|part| part.iter().all(|found| *found == byte)), "at {offset}");
        }
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: a CDP disk that fails while a revert waits for room ends that wait, and the guest goes on.
/// Method: on a thread of its own, since what this is about never came back.
#[test]
fn a_disk_that_fails_while_a_revert_makes_room_stops_nobody() {
    let (done, over) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let executor = Executor::new(Shared::new(47, 1_700_000_000 * SECOND));
        let place = Place::new(160, 64);
        let exec = Rc::clone(&executor);
        let waited = Rc::new(Cell::new(false));
        let told = Rc::clone(&waited);
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            let fill = async |from: u64, count: u64| {
                for number in from..from + count {
                    let (offset, len) = (number % 16 * (64 << 10), 64 << 10);
                    export.write(offset, len, payload_buf(offset, len), false).await.unwrap();
                }
            };
            // A reservation of 40 segments.
            fill(0, 480).await;
            host.sleep(10 * SECOND).await;
            let target = engine.tick().await.unwrap();
            fill(0, 60).await;
            host.sleep(10 * SECOND).await;
            engine.tick().await.unwrap();
            place.cdp.fault(every(FaultOn::Sync, FaultKind::Hang));
            let reverted = volume.revert(forced(target, true)).await;
            told.set(reverted.is_err());
            fill(0, 1).await;
            place.cdp.heal();
            engine.stop().await.unwrap();
        };
        let outcome = executor.run(Box::pin(root));
        done.send((outcome, waited.get())).unwrap();
    });
    let (outcome, refused) = over.recv_timeout(std::time::Duration::from_secs(120)).expect("it never came back");
    assert_eq!(outcome, Outcome::Done);
    assert!(refused, "it needed no room: this shows nothing");
}

/// Goal: a group's revert that was never decided leaves nothing behind, nor a volume that is held for it.
#[test]
fn an_undecided_revert_holds_nobody() {
    let place = Rc::new(Place::new(160, 16));
    let shared = Shared::new(53, 1_700_000_000 * SECOND);
    let group = uuid::Uuid::from_u128(5);
    for undecided in [Vec::new(), vec![group]] {
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, place, first) = (Rc::clone(&executor), Rc::clone(&place), undecided.is_empty());
        let root = async move {
            if !first {
                let (engine, volume) = place.start_undecided(&exec, undecided).await;
                assert!(!volume.info().held);
                engine.stop().await.unwrap();
                return;
            }
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
            let target = engine.tick().await.unwrap();
            obedient(&export);
            volume.prepare_revert(group, forced(target, false)).await.unwrap();
            assert!(volume.info().held);
            let instant = engine.tick().await.unwrap();
            volume.record_revert(group, instant, &[uuid::Uuid::from_u128(2)]).await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
    }
}

/// Goal: the fence, which alone speaks where there is no journal, knows a hold as soon as the revert is made, and none of a revert that was refused.
#[test]
fn the_fence_knows_the_hold_of_a_revert_that_was_made_and_of_no_other() {
    let executor = Executor::new(Shared::new(109, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        let held = || place.folder.fence(uuid::Uuid::from_u128(2)).expect("it has one").held;
        export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        let target = engine.tick().await.unwrap();
        obedient(&export);
        volume.revert(forced(target, false)).await.unwrap();
        assert!(held(), "it was made");
        volume.release().await.unwrap();
        assert!(!held(), "it was released");
        // A client that does not go, and a CDP disk that fails meanwhile: the fence is written twice on the way out.
        let stubborn = export.connect(true, Box::new(|| ())).unwrap();
        let reverts = async { assert!(volume.revert(forced(target, false)).await.is_err()) };
        let fails = async {
            host.sleep(SECOND).await;
            place.cdp.fault(every(FaultOn::Write, FaultKind::Eio));
            export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        };
        futures::join!(reverts, fails);
        while volume.is_leaving() {
            host.sleep(SECOND / 10).await;
        }
        assert!(!volume.info().held && !held(), "it was refused");
        drop(stubborn);
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: a forced revert that was refused leaves nothing in the journal either: not in what the next log carries, while its clients were waited for.
/// Method: a client that does not go and writes more than a log's share meanwhile; then a stop and a start.
#[test]
fn a_refused_revert_is_no_hold_after_a_start() {
    let place = Rc::new(Place::new(160, 16));
    let shared = Shared::new(113, 1_700_000_000 * SECOND);
    for start in 0..2 {
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, place) = (Rc::clone(&executor), Rc::clone(&place));
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            if start == 1 {
                assert!(!volume.info().held, "nothing was reverted");
                engine.stop().await.unwrap();
                return;
            }
            let target = engine.tick().await.unwrap();
            let logs = volume.info().logs.len();
            let stubborn = export.connect(true, Box::new(|| ())).unwrap();
            let reverts = async { assert!(volume.revert(forced(target, false)).await.is_err()) };
            let writes = async {
                host.sleep(SECOND).await;
                for piece in 0..128 {
                    let (offset, len) = (piece * (64 << 10), 64 << 10);
                    export.write(offset, len, payload_buf(offset, len), false).await.unwrap();
                }
                assert!(volume.info().logs.len() > logs, "no log has begun meanwhile: this shows nothing");
                assert!(volume.info().held, "the revert is over: this shows nothing");
            };
            futures::join!(reverts, writes);
            drop(stubborn);
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
    }
}
