//! What a guest that writes, waits and flushes gains by its habit: in virtual time, so that a latency is a fact and no measurement.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::{BLOCK, EngineConfig, Host as _, payload_buf};
use cdp_sim::disk::{Fault, FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};

const MS: u64 = 1_000_000;
/// What a sync of the CDP disk takes.
const SYNC_NS: u64 = 10 * MS;
/// Between an ack and the guest's next request.
const TURN_NS: u64 = 4 * MS;
const FLUSHES: usize = 14;

/// Writes as often as `writes` says before each flush. Answers how long each flush took, and how many syncs of the CDP disk there were besides those of the
/// flushes.
fn flushes(seed: u64, flush_habit: u32, writes: fn(usize) -> u64) -> (Vec<u64>, i64) {
    let executor = Executor::new(Shared::new(seed, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let (took, syncs) = (Rc::new(Cell::new(vec![])), Rc::new(Cell::new(0)));
    let (exec, heard, count) = (Rc::clone(&executor), Rc::clone(&took), Rc::clone(&syncs));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let config = EngineConfig { flush_habit, ..EngineConfig::default() };
        let (engine, volume) = place.start(&exec, config).await;
        let export = volume.export();
        let slow = Fault { on: FaultOn::Sync, kind: FaultKind::Slow(SYNC_NS), times: None, after: 0, within: None };
        place.cdp.fault(slow);
        let syncs_before = volume.stats().sync_latency.count as i64;
        let mut took = vec![];
        for flush in 0..FLUSHES {
            for write in 0..writes(flush) {
                let offset = (flush as u64 * 8 + write) * BLOCK;
                export.write(offset, BLOCK as u32, payload_buf(offset, BLOCK as u32), false).await.unwrap();
                host.sleep(TURN_NS).await;
            }
            let began = host.boot_ns();
            export.flush().await.unwrap();
            took.push(host.boot_ns() - began);
        }
        count.set(volume.stats().sync_latency.count as i64 - syncs_before - FLUSHES as i64);
        heard.set(took);
        place.cdp.heal();
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    (took.take(), syncs.get())
}

/// The fewest syncs besides those of the flushes, of a few runs: the destager makes one in some of them.
fn syncs_besides(writes: fn(usize) -> u64) -> i64 {
    (7..13).map(|seed| flushes(seed, 3, writes).1).min().expect("some runs")
}

/// Goal: a guest with a habit waits for the rest of a sync only, and no sync more is made than it asks for.
#[test]
fn the_sync_of_an_expected_flush_is_under_way_before_the_flush() {
    let (took, _) = flushes(7, 3, |_| 2);
    let (first, settled) = took.split_at(5);
    assert!(first[0] >= SYNC_NS, "the first flush, which nobody could expect, took {} us", first[0] / 1000);
    // A sync of the clock's mark or of the destager may run first.
    let waited = settled.iter().filter(|ns| **ns > SYNC_NS - TURN_NS + MS).count();
    assert!(
        waited * 4 <= settled.len(),
        "{waited} of {} flushes that were expected waited for more than the rest of their sync",
        settled.len()
    );
    assert_eq!(syncs_besides(|_| 2), 0, "syncs that no flush asked for");
}

/// Goal: without a habit nothing is expected; with one that ends a single sync is made for nothing.
#[test]
fn a_guest_without_a_habit_costs_no_sync_more_and_one_that_changes_costs_one() {
    let (took, _) = flushes(7, 3, |flush| 1 + flush as u64 % 3);
    assert!(took.iter().all(|ns| *ns >= SYNC_NS), "{took:?}");
    assert_eq!(syncs_besides(|flush| 1 + flush as u64 % 3), 0, "syncs that no flush asked for");
    assert_eq!(syncs_besides(|flush| if flush < FLUSHES / 2 { 1 } else { 2 }), 1, "syncs that no flush asked for");
}
