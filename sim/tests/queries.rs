//! Long questions about the history: what they may not cost.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::{BLOCK, EngineConfig, Host as _, Instant, Volume, payload_buf};
use cdp_sim::disk::{FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND, every};

const PIECE: u32 = 64 << 10;

async fn write(volume: &Rc<Volume>, piece: u64) {
    let offset = piece * u64::from(PIECE);
    volume.export().write(offset, PIECE, payload_buf(offset, PIECE), false).await.unwrap();
}

/// Goal: a clean of a log ends, though clients read a view without a pause.
#[test]
fn freeing_a_log_does_not_wait_for_reads_that_begin_later() {
    let executor = Executor::new(Shared::new(79, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        // Each switch closes a log.
        for number in 0..4 {
            write(&volume, number).await;
            volume.disable().await.unwrap();
            volume.enable().await.unwrap();
        }
        host.sleep(10 * SECOND).await;
        let logs: Vec<_> = volume.info().logs.iter().filter(|log| log.recording).map(|log| log.seq).collect();
        let now = engine.tick().await.unwrap();
        let view = volume.open_view(now, "", false).await.unwrap();
        let over = Cell::new(false);
        let export = view.export();
        let reader = async || {
            while !over.get() {
                export.read(0, BLOCK as u32).await.unwrap();
            }
        };
        let cleaned = async {
            host.sleep(SECOND).await;
            let clean = volume.clean(Some(logs[1]));
            let late = host.sleep(30 * SECOND);
            let in_time = matches!(
                futures::future::select(std::pin::pin!(clean), std::pin::pin!(late)).await,
                futures::future::Either::Left((Ok(()), _))
            );
            over.set(true);
            assert!(in_time, "it waits for reads that have begun since");
        };
        futures::join!(reader(), reader(), reader(), cleaned);
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: a question about all of the history does not make the guest wait for room; the history is what gives way.
/// Method: each read of the CDP disk takes 0.1 s; a guest writes 4 MiB a second into a reservation that is full.
#[test]
fn a_guest_does_not_wait_for_a_long_query() {
    for queried in [false, true] {
        let executor = Executor::new(Shared::new(83, 1_700_000_000 * SECOND));
        let place = Place::new(160, 64);
        let (longest, asked) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let (exec, worst, count) = (Rc::clone(&executor), Rc::clone(&longest), Rc::clone(&asked));
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            for number in 0..800 {
                write(&volume, number * 7 % 16).await;
            }
            host.sleep(10 * SECOND).await;
            let slow = FaultKind::Slow(SECOND / 10);
            place.cdp.fault(every(FaultOn::Read, slow));
            let over = Cell::new(false);
            let queries = async {
                while queried && !over.get() {
                    let now = engine.tick().await.unwrap();
                    let first = volume.info().coverage[0].start;
                    // What leaves meanwhile is no part of the answer.
                    volume.timeline(first, now, 10).await.unwrap();
                    _ = volume.changes(Instant(first.0 + 1), now, 0, 10).await;
                    count.set(count.get() + 1);
                }
            };
            let writes = async {
                for number in 0..1200 {
                    let began = host.boot_ns();
                    write(&volume, number * 7 % 16).await;
                    worst.set(worst.get().max(host.boot_ns() - began));
                    host.sleep(SECOND / 64).await;
                }
                over.set(true);
            };
            futures::join!(queries, writes);
            place.cdp.heal();
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        assert!(!queried || asked.get() > 0, "no query ended: this shows nothing");
        assert!(longest.get() < SECOND, "queries: {queried}; a write took {} ms", longest.get() / 1_000_000);
    }
}

/// Goal: a timeline counts the blocks that were written, of zeroes too.
#[test]
fn a_timeline_counts_zeroes_by_their_blocks() {
    let executor = Executor::new(Shared::new(89, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let from = volume.info().coverage[0].start;
        volume.export().write_zeroes(0, 16 << 20, false, false).await.unwrap();
        for sealed in [false, true] {
            let now = engine.tick().await.unwrap();
            let blocks: u64 = volume.timeline(from, now, 4).await.unwrap().iter().map(|bucket| bucket.blocks).sum();
            assert_eq!(blocks, 4096, "sealed: {sealed}");
            volume.disable().await.unwrap();
            volume.enable().await.unwrap();
            host.sleep(10 * SECOND).await;
        }
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}
