//! Markers: what they may not cost, and what they may not say.

mod common;

use std::rc::Rc;

use cdp_journal::info::MarkerKind;
use cdp_journal::{BLOCK, EngineConfig, Host as _, RevertRequest, payload_buf};
use cdp_sim::disk::{FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND, every};

/// Goal: however long a volume is protected, markers that nobody named stay few, and a named one can always be set; the newest of them all stay, the oldest too, and
/// named or quiesced ones never go.
/// Method: half as many again as the bound, 0.1 s apart, with a named and a quiesced one among the first; then the journal is opened anew.
#[test]
fn automatic_markers_grow_fewer_with_age_and_named_ones_stay() {
    const MADE: u64 = 6000;
    let executor = Executor::new(Shared::new(13, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let mut made: Vec<_> = volume.info().markers.iter().map(|marker| marker.time).collect();
        assert_eq!(made.len(), 1, "`enable` sets one");
        for number in 0..MADE {
            let name = if number == 5 { "before the upgrade" } else { "" };
            let kind = if number == 7 { MarkerKind::Application } else { MarkerKind::Crash };
            let instant = engine.tick().await.unwrap();
            made.push(volume.mark(name, kind, instant).await.unwrap().time);
            host.sleep(SECOND / 10).await;
        }
        let check = |found: Vec<_>| {
            assert!((2048..=4096 + 2).contains(&found.len()), "{} markers", found.len());
            for number in [0, 6, 8] {
                assert!(found.contains(&made[number]), "marker {number} is gone");
            }
            assert!(found.ends_with(&made[made.len() - 1024..]), "the newest are not all there");
        };
        check(volume.info().markers.iter().map(|marker| marker.time).collect());
        engine.stop().await.unwrap();
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        check(volume.info().markers.iter().map(|marker| marker.time).collect());
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: a marker says `flush` only of an instant at which the disk is what a flush has left.
#[test]
fn no_marker_says_flush_after_a_revert_or_a_time_without_a_journal() {
    let executor = Executor::new(Shared::new(97, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        let write = async || export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        let mark = async |name: &str| {
            let now = engine.tick().await.unwrap();
            volume.mark(name, MarkerKind::Crash, now).await.unwrap().kind
        };
        write().await;
        let target = engine.tick().await.unwrap();
        write().await;
        export.flush().await.unwrap();
        assert_eq!(mark("flushed").await, MarkerKind::Flush, "this shows nothing");
        volume.revert(RevertRequest { target, force: false, release: false, dry_run: false }).await.unwrap();
        assert_eq!(mark("reverted").await, MarkerKind::Crash);
        volume.revert_done().await.unwrap();
        write().await;
        export.flush().await.unwrap();
        let settings = volume.info().settings.unwrap();
        volume.clean(None).await.unwrap();
        write().await;
        volume.edit(|_| settings).await.unwrap();
        volume.enable().await.unwrap();
        assert_eq!(mark("enabled").await, MarkerKind::Crash);
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: what was written, and acked, while a flush was under way was not flushed: no instant behind it is flush-clean, and no marker says so.
/// Method: the sync of a flush takes 0.2 s, less than the clock's mark lies ahead; half of that later there is a write. Then the same without it.
#[test]
fn what_is_written_while_a_flush_is_under_way_is_not_flushed() {
    let executor = Executor::new(Shared::new(103, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        let write = async || export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        for beside in [true, false] {
            write().await;
            let before = engine.tick().await.unwrap();
            place.cdp.fault(every(FaultOn::Sync, FaultKind::Slow(SECOND / 5)));
            let writer = async {
                host.sleep(SECOND / 10).await;
                if beside {
                    write().await;
                }
            };
            let (flushed, ()) = futures::future::join(export.flush(), writer).await;
            flushed.unwrap();
            place.cdp.heal();
            let now = engine.tick().await.unwrap();
            let clean = volume.flush_near(now).await.unwrap().before.is_some_and(|at| at > before);
            let kind = volume.mark("", MarkerKind::Crash, now).await.unwrap().kind;
            assert_eq!((clean, kind == MarkerKind::Flush), (!beside, !beside), "a write beside the flush: {beside}");
        }
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: over a restart markers of history that is gone stay gone, and one whose name is used again is the new one.
#[test]
fn a_name_that_is_used_again_is_the_new_marker_after_a_start() {
    let shared = Shared::new(101, 1_700_000_000 * SECOND);
    let place = Rc::new(Place::new(160, 16));
    let again = Rc::new(std::cell::Cell::new(cdp_journal::Instant::ZERO));
    for start in 0..3 {
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, place, again) = (Rc::clone(&executor), Rc::clone(&place), Rc::clone(&again));
        let root = async move {
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            let write = async || export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
            let mark = async |name: &str| {
                let now = engine.tick().await.unwrap();
                volume.mark(name, MarkerKind::Crash, now).await.unwrap().time
            };
            if start == 0 {
                write().await;
                mark("x").await;
                mark("gone").await;
                write().await;
                // The new log carries them; then their own goes.
                let first = volume.info().logs[0].seq;
                volume.clean(Some(first)).await.unwrap();
                again.set(mark("x").await);
                return;
            }
            let found: Vec<_> =
                volume.info().markers.iter().filter(|m| !m.auto).map(|m| (m.name.clone(), m.time)).collect();
            assert_eq!(found, [("x".to_owned(), again.get())], "start {start}");
            if start == 2 {
                mark("gone").await;
            }
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
    }
}
