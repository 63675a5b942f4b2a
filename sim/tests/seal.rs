//! What a guest notices of a log being sealed: in virtual time, so that a latency is a fact and no measurement.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use cdp_journal::clock::HostClock;
use cdp_journal::info::{Priority, Settings};
use cdp_journal::{BLOCK, Engine, EngineConfig, Host as _, InitOptions, Instant, VolumeSpec, payload_buf};
use cdp_sim::disk::{Fault, FaultKind, FaultOn, SimDisk};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use cdp_sim::store::Folder;
use uuid::Uuid;

const SECOND: u64 = 1_000_000_000;

/// Goal: a guest does not wait for the sealing of a log.
/// Method: each read of the CDP disk, which only sealing needs, takes 0.1 s, and it takes a dozen of them; the guest writes 200 blocks a second,
/// of which the backlog has room for 64. So without destaging beside the sealing the backlog would be full after a third of a second of it, and a
/// write would wait for the rest.
#[test]
fn a_guest_does_not_wait_for_a_log_to_be_sealed() {
    let executor = Executor::new(Shared::new(7, 1_700_000_000 * SECOND));
    let cdp = SimDisk::new(1, "cdp", 160 << 20, 4096, false);
    let primary = SimDisk::new(2, "primary", 64 << 20, 4096, false);
    let longest = Rc::new(Cell::new(0));
    let sealed = Rc::new(Cell::new(0));
    let (exec, worst, count) = (Rc::clone(&executor), Rc::clone(&longest), Rc::clone(&sealed));
    let root = async move {
        let config = EngineConfig { backlog_bytes_max: 256 << 10, ..EngineConfig::default() };
        let host = Rc::new(SimHost(Rc::clone(&exec)));
        let store = Rc::new(Folder::default()).attach(&exec);
        let engine =
            Engine::new(host.clone(), Arc::new(HostClock::new(Instant::ZERO)), store, config, Box::new(|_| {}));
        let options = InitOptions { segment_size: 1 << 20, force: false };
        Engine::init_disk(cdp.attach(&exec), options, Uuid::from_u128(1), 0).await.unwrap();
        engine.add_disk(cdp.attach(&exec), "cdp".into()).await.unwrap();
        let spec = VolumeSpec {
            id: Uuid::from_u128(2),
            name: "vol".into(),
            path: "primary".into(),
            size: 0,
            primary: primary.attach(&exec),
            fence: None,
            override_journal: false,
            attach_journal: false,
            undecided_reverts: Vec::new(),
        };
        let volume = engine.open_volume(spec).await.unwrap();
        let kept = Settings { reserve_capacity: 40 << 20, reserve_duration_s: 86400, priority: Priority::Mid };
        volume.edit(kept).await.unwrap();
        volume.enable().await.unwrap();
        let export = volume.export();
        cdp.fault(Fault { on: FaultOn::Read, kind: FaultKind::Slow(SECOND / 10), times: None, after: 0, within: None });
        let writer = async |first: u64| {
            for number in 0..500 {
                let began = host.boot_ns();
                let offset = (number * 8 + first) * 5 % 16384 * BLOCK;
                export.write(offset, BLOCK as u32, payload_buf(offset, BLOCK as u32), false).await.unwrap();
                worst.set(worst.get().max(host.boot_ns() - began));
                host.sleep(SECOND / 25).await;
            }
        };
        futures::future::join_all((0..8).map(writer)).await;
        count.set(volume.info().logs.iter().filter(|log| log.sealed).count());
        cdp.heal();
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    let (sealed, longest_ms) = (sealed.get(), longest.get() / 1_000_000);
    assert!(sealed >= 2, "only {sealed} logs were sealed: this shows nothing");
    assert!(longest_ms < 300, "a write took {longest_ms} ms, and {sealed} logs were sealed");
}
