//! Forced reverts and those whom they send away.

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use cdp_journal::RevertRequest;
use cdp_journal::{BLOCK, ClientGuard, EngineConfig, Host as _, payload_buf};
use cdp_sim::disk::{Fault, FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};

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
                    let broken =
                        Fault { on: FaultOn::Write, kind: FaultKind::Eio, times: None, after: 0, within: None };
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
