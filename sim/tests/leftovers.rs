//! What volumes leave on CDP disks: room that nobody else was promised, until it is free.

mod common;

use std::rc::Rc;

use cdp_journal::format;
use cdp_journal::info::{CdpState, Health, Priority, Settings};
use cdp_journal::{BLOCK, Engine, EngineConfig, Error, Host as _, InitOptions, IoBuf, VolumeSpec, payload_buf};
use cdp_sim::disk::{FaultKind, FaultOn, SimDisk};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND, every};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// Goal: the history of a volume that is not served is not promised to another one.
/// Method: a volume fills 40 MiB of a CDP disk of 64 MiB; another agent's life sees that disk without it.
#[test]
fn room_that_an_absent_volume_has_in_use_is_not_promised_again() {
    let place = Rc::new(Place::new(66, 64));
    let shared = Shared::new(29, 1_700_000_000 * SECOND);
    for served in [true, false] {
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, place) = (Rc::clone(&executor), Rc::clone(&place));
        let root = async move {
            if served {
                let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
                for number in 0..30 {
                    let (offset, len) = (number * MIB, MIB as u32);
                    volume.export().write(offset, len, payload_buf(offset, len), false).await.unwrap();
                }
                engine.stop().await.unwrap();
                return;
            }
            let host = Rc::new(SimHost(Rc::clone(&exec)));
            let clock = std::sync::Arc::new(cdp_journal::clock::HostClock::new(place.folder.clock()));
            let engine =
                Engine::new(host, clock, place.folder.attach(&exec), EngineConfig::default(), Box::new(|_| {}));
            engine.add_disk(place.cdp.attach(&exec), "cdp".into()).await.unwrap();
            let info = engine.disks().remove(0);
            let in_use = (info.segments - info.segments_free) * info.segment_size;
            assert!(in_use > 20 * MIB, "{in_use}: this shows nothing");
            assert_eq!(info.reserved_bytes, in_use);
            let other = SimDisk::new(9, "other", 16 * MIB, 4096, false);
            let spec = VolumeSpec {
                id: Uuid::from_u128(99),
                name: "other".into(),
                path: "other".into(),
                size: 0,
                primary: other.attach(&exec),
                fence: None,
                accept: None,
                attach_journal: false,
                undecided_reverts: Vec::new(),
            };
            let volume = engine.open_volume(spec).await.unwrap();
            let asked = Settings { reserve_capacity: 40 * MIB, reserve_duration_s: 86400, priority: Priority::Mid };
            volume.edit(|_| asked).await.unwrap();
            let refused = volume.enable().await.unwrap_err().to_string();
            let free = info.segments * info.segment_size - in_use;
            assert!(refused.contains(&free.to_string()), "{refused}");
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
    }
}

/// Goal: when a journal has moved to another CDP disk, what it left on the first is freed once that is well again.
#[test]
fn what_a_journal_left_on_another_disk_is_freed_at_the_next_start() {
    let place = Rc::new(Place::new(160, 16));
    let spare = SimDisk::new(3, "spare", 160 << 20, 4096, false);
    let shared = Shared::new(31, 1_700_000_000 * SECOND);
    for start in 0..2 {
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, place, spare) = (Rc::clone(&executor), Rc::clone(&place), Rc::clone(&spare));
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let id = Uuid::from_u128(3);
            if start == 1 {
                let (engine, volume) = place.start_with(&exec, EngineConfig::default(), &[&spare]).await;
                assert_eq!((volume.info().health, volume.info().state), (Health::Ok, CdpState::On));
                for disk in engine.disks() {
                    let used = disk.segments - disk.segments_free;
                    assert_eq!(used > 0, disk.id == id, "{}: {used} segments in use", disk.path);
                }
                engine.stop().await.unwrap();
                return;
            }
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            Engine::init_disk(spare.attach(&exec), InitOptions { segment_size: MIB, force: false }, id, 0)
                .await
                .unwrap();
            engine.add_disk(spare.attach(&exec), "spare".into()).await.unwrap();
            let export = volume.export();
            let write = async || export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
            write().await;
            place.cdp.fault(every(FaultOn::Write, FaultKind::Eio));
            write().await;
            while engine.disks().iter().all(|disk| disk.id != id || disk.segments == disk.segments_free)
                || volume.info().health != Health::Ok
            {
                host.sleep(SECOND).await;
            }
            write().await;
            place.cdp.heal();
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
    }
}

/// Goal: whoever goes on without a journal goes on with the switch as the user left it.
/// Method: off and on again, and a kill; the CDP disk does not come back.
#[test]
fn protection_that_was_switched_on_again_is_on_without_its_journal() {
    let place = Rc::new(Place::new(160, 16));
    let shared = Shared::new(37, 1_700_000_000 * SECOND);
    let executor = Executor::new(Rc::clone(&shared));
    let (exec, here) = (Rc::clone(&executor), Rc::clone(&place));
    let root = async move {
        let (_engine, volume) = here.start(&exec, EngineConfig::default()).await;
        volume.disable().await.unwrap();
        volume.edit(|kept| Settings { reserve_duration_s: 7200, ..kept.expect("it has settings") }).await.unwrap();
        assert!(!here.folder.fence(Uuid::from_u128(2)).expect("it has one").on);
        volume.enable().await.unwrap();
        assert!(here.folder.fence(Uuid::from_u128(2)).expect("it has one").on, "the fence knows the switch");
        volume.disable().await.unwrap();
        assert!(!here.folder.fence(Uuid::from_u128(2)).expect("it has one").on, "both ways");
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    executor.kill();
}

/// Goal: a volume that is closed while a group's revert is prepared can still be found by the one who has to end that.
#[test]
fn a_prepared_revert_can_be_given_up_while_its_volume_is_being_closed() {
    let executor = Executor::new(Shared::new(41, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let id = Uuid::from_u128(2);
        volume.export().write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        let target = engine.tick().await.unwrap();
        let group = Uuid::from_u128(77);
        let request = cdp_journal::RevertRequest { target, force: false, release: false, dry_run: false };
        volume.prepare_revert(group, request).await.unwrap();
        let closing = engine.close_volume(id);
        let ends = async {
            host.sleep(SECOND).await;
            engine.volume(id).expect("it is still there").abort_revert(group).await.unwrap();
        };
        let (closed, ()) = futures::future::join(closing, ends).await;
        closed.unwrap();
        assert!(engine.volume(id).is_none());
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: a CDP disk that has lost one copy of its superblock is not made anew by mistake: a start would take the other one, with all history.
#[test]
fn a_cdp_disk_with_one_superblock_left_is_not_made_anew_unasked() {
    let (one, id) = (SimDisk::new(3, "one", 160 << 20, 4096, false), Uuid::from_u128(3));
    let executor = Executor::new(Shared::new(43, 1_700_000_000 * SECOND));
    let exec = Rc::clone(&executor);
    let root = async move {
        let init = async |force: bool| {
            Engine::init_disk(one.attach(&exec), InitOptions { segment_size: MIB, force }, id, 0).await
        };
        init(false).await.unwrap();
        for lost in [format::SUPERBLOCK_A, format::SUPERBLOCK_B] {
            one.attach(&exec).write(lost, vec![IoBuf::zeroed(4096).share()]).await.unwrap();
            let made = init(false).await;
            assert!(matches!(made, Err(Error::Exists { .. })), "without the copy at {lost}: {made:?}");
            init(true).await.unwrap();
        }
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    executor.kill();
}
