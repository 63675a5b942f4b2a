//! How long a guest waits for a CDP disk that hangs: in virtual time, so that a latency is a fact and no measurement.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::info::Health;
use cdp_journal::{BLOCK, EngineConfig, Host as _, payload_buf};
use cdp_sim::disk::{Fault, FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};

/// What the calls of a primary take at most that bring a backlog of a few blocks over, with the fences before and behind it.
const BACKLOG_NS: u64 = SECOND / 2;

/// The longest wait of four guests that write and flush without a pause, the CDP disk hanging in calls of a kind after some of them.
fn longest_wait(seed: u64, on: FaultOn, after: u32) -> u64 {
    let executor = Executor::new(Shared::new(seed, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let longest = Rc::new(Cell::new(0));
    let (exec, worst) = (Rc::clone(&executor), Rc::clone(&longest));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        place.cdp.fault(Fault { on, kind: FaultKind::Hang, times: None, after, within: None });
        let until = host.boot_ns() + 20 * SECOND;
        let guest = async |first: u64| {
            let mut number = 0;
            while host.boot_ns() < until {
                let began = host.boot_ns();
                let offset = (number % 64 * 4 + first) * BLOCK;
                export.write(offset, BLOCK as u32, payload_buf(offset, BLOCK as u32), false).await.unwrap();
                worst.set(worst.get().max(host.boot_ns() - began));
                let began = host.boot_ns();
                export.flush().await.unwrap();
                worst.set(worst.get().max(host.boot_ns() - began));
                host.sleep(SECOND / 50).await;
                number += 1;
            }
        };
        futures::future::join_all((0..4).map(guest)).await;
        assert_eq!(volume.info().health, Health::Offline, "seed {seed}: {on:?} did not hang");
        engine.stop().await.unwrap();
        place.cdp.heal();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    longest.get()
}

/// Goal: a guest waits at most `stall_max` for a CDP disk, whatever of it hangs, and then for what is in memory to reach the primary.
/// Method: writes, syncs or all calls hang from some call on, under several orders of events.
#[test]
fn a_guest_waits_for_a_hanging_cdp_disk_no_longer_than_stall_max() {
    let stall_max = EngineConfig::default().stall_max_ns;
    for (seed, on) in (0..4).flat_map(|seed| [FaultOn::Write, FaultOn::Sync, FaultOn::Any].map(|on| (seed, on))) {
        let waited = longest_wait(seed, on, 10 + 7 * seed as u32);
        assert!(waited > stall_max / 2, "seed {seed}: nobody waited for {on:?}: this shows nothing");
        let waited_ms = waited / 1_000_000;
        assert!(waited <= stall_max / 10 * 11 + BACKLOG_NS, "seed {seed}: a guest waited {waited_ms} ms for {on:?}");
    }
}
