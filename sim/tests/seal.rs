//! What a guest notices of a log being sealed: in virtual time, so that a latency is a fact and no measurement.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::{BLOCK, EngineConfig, Host as _, payload_buf};
use cdp_sim::disk::{Fault, FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};

/// Goal: a guest does not wait for the sealing of a log.
/// Method: each read of the CDP disk, which only sealing needs, takes 0.1 s, and it takes a dozen of them; the guest writes 200 blocks a second,
/// of which the backlog has room for 64. So without destaging beside the sealing the backlog would be full after a third of a second of it, and a
/// write would wait for the rest.
#[test]
fn a_guest_does_not_wait_for_a_log_to_be_sealed() {
    let executor = Executor::new(Shared::new(7, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let longest = Rc::new(Cell::new(0));
    let sealed = Rc::new(Cell::new(0));
    let (exec, worst, count) = (Rc::clone(&executor), Rc::clone(&longest), Rc::clone(&sealed));
    let root = async move {
        let config = EngineConfig { backlog_bytes_max: 256 << 10, ..EngineConfig::default() };
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, config).await;
        let export = volume.export();
        let slow = Fault { on: FaultOn::Read, kind: FaultKind::Slow(SECOND / 10), times: None, after: 0, within: None };
        place.cdp.fault(slow);
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
        place.cdp.heal();
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    let (sealed, longest_ms) = (sealed.get(), longest.get() / 1_000_000);
    assert!(sealed >= 2, "only {sealed} logs were sealed: this shows nothing");
    assert!(longest_ms < 300, "a write took {longest_ms} ms, and {sealed} logs were sealed");
}
