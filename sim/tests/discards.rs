//! What discards and zeroes may not cost: room, memory, time, and what is written after them. In virtual time.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::info::{Health, Settings};
use cdp_journal::{BLOCK, EngineConfig, Host as _, payload_buf};
use cdp_sim::disk::{FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND, every};

/// Goal: discards one by one, each of which takes a frame of its own, end logs like anything else: history that they have no use for is kept, and no guest
/// waits for room that nothing can make.
/// Method: more discards than the reservation of 40 MiB has room for frames of 4 KiB.
#[test]
fn discards_one_by_one_fill_no_log_beyond_its_share() {
    let executor = Executor::new(Shared::new(3, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let found = Rc::new(Cell::new((0, 0)));
    let (exec, tell) = (Rc::clone(&executor), Rc::clone(&found));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        let (mut longest, mut fewest) = (0, usize::MAX);
        for number in 0..12_000u64 {
            let began = host.boot_ns();
            export.trim(number % 16_384 * BLOCK, BLOCK as u32).await.unwrap();
            longest = longest.max(host.boot_ns() - began);
            if number > 6_000 {
                fewest = fewest.min(volume.info().logs.len());
            }
        }
        tell.set((longest, fewest));
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    let (longest, fewest) = found.get();
    assert!(longest < 30 * SECOND, "a discard took {} ms", longest / 1_000_000);
    assert!(fewest >= 2, "at times one log had everything");
}

/// Goal: the holes that old discards become on the primary are punched before anything newer is there, also when the journal is left meanwhile.
/// Method: protection is switched off, and its history grows too old; punching what was discarded takes the primary 0.1 s a range, of which there are 64. As soon as the
/// first is punched the guest writes to all of them: those writes wait for the change to the bare primary, and go there.
#[test]
fn nothing_discarded_is_punched_over_what_was_written_since() {
    const RANGES: u64 = 64;
    let executor = Executor::new(Shared::new(5, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let lost = Rc::new(Cell::new(None));
    let (exec, tell) = (Rc::clone(&executor), Rc::clone(&lost));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        volume.edit(|kept| Settings { reserve_duration_s: 60, ..kept.expect("it is protected") }).await.unwrap();
        let export = volume.export();
        // Not side by side, or they would be one range.
        let places: Vec<u64> = (0..RANGES).map(|number| number * 2 * BLOCK).collect();
        let write = async |offset: u64, byte: u8| {
            let mut data = payload_buf(offset, BLOCK as u32);
            data.fill(byte);
            export.write(offset, BLOCK as u32, data, false).await.unwrap();
        };
        for offset in &places {
            write(*offset, 1).await;
        }
        host.sleep(5 * SECOND).await;
        for offset in &places {
            export.trim(*offset, BLOCK as u32).await.unwrap();
        }
        volume.disable().await.unwrap();
        host.sleep(SECOND).await;
        let on_disk = |offset: u64| place.primary.peek(offset, 1)[0];
        assert!(places.iter().all(|offset| on_disk(*offset) == 1), "nothing was punched before its time");
        let slow = FaultKind::Slow(SECOND / 10);
        place.primary.fault(every(FaultOn::Write, slow));
        let mut waited = 0;
        while places.iter().all(|offset| on_disk(*offset) == 1) {
            host.sleep(SECOND / 100).await;
            waited += 1;
            assert!(waited < 100_000, "nothing is ever punched: this shows nothing");
        }
        futures::future::join_all(places.iter().map(|offset| write(*offset, 2))).await;
        host.sleep(20 * SECOND).await;
        place.primary.heal();
        tell.set(Some(places.iter().filter(|offset| on_disk(**offset) != 2).count()));
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    assert_eq!(lost.get(), Some(0), "blocks that were written after they had been discarded are zeroes");
}

/// Goal: zeroes, which carry no payload, take no more memory than the backlog may: at its bound they wait for the primary as writes do.
/// Method: a primary that takes an hour for each request; zeroes for every second block, again and again over the same ones, as long as they are acked.
#[test]
fn zeroes_wait_for_room_in_the_backlog() {
    const BACKLOG: u64 = 256 << 10;
    let executor = Executor::new(Shared::new(7, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let found = Rc::new(Cell::new((0, 0)));
    let (exec, tell) = (Rc::clone(&executor), Rc::clone(&found));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let config = EngineConfig { backlog_bytes_max: BACKLOG, ..EngineConfig::default() };
        let (engine, volume) = place.start(&exec, config).await;
        let slow = FaultKind::Slow(3600 * SECOND);
        place.primary.fault(every(FaultOn::Write, slow));
        let acked = Cell::new(0u64);
        let export = volume.export();
        let zeroes = async {
            for number in 0..100_000u64 {
                export.write_zeroes(number % 1024 * 2 * BLOCK, BLOCK as u32, false, false).await.unwrap();
                acked.set(acked.get() + 1);
            }
        };
        let waited = std::pin::pin!(host.sleep(600 * SECOND));
        futures::future::select(std::pin::pin!(zeroes), waited).await;
        tell.set((acked.get(), volume.info().backlog_bytes));
        place.primary.heal();
        host.sleep(4000 * SECOND).await;
        assert_eq!(volume.info().backlog_bytes, 0, "all of it is on the primary in the end");
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    let (acked, backlog) = found.get();
    assert!((512..2048).contains(&acked), "{acked} requests were acked");
    assert!(backlog <= BACKLOG, "{backlog} bytes in the backlog");
}

/// Goal: what old discards become on the primary costs the guest no wait.
/// Method: a thousand scattered ranges, each of which takes the primary 10 ms; a backlog for 64 blocks; 200 writes a second.
#[test]
fn a_guest_does_not_wait_for_old_discards_to_be_punched() {
    const RANGES: u64 = 1000;
    let executor = Executor::new(Shared::new(103, 1_700_000_000 * SECOND));
    let place = Place::new(160, 64);
    let found = Rc::new(Cell::new((0, 0)));
    let (exec, tell) = (Rc::clone(&executor), Rc::clone(&found));
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let config = EngineConfig { backlog_bytes_max: 256 << 10, ..EngineConfig::default() };
        let (engine, volume) = place.start(&exec, config).await;
        let export = volume.export();
        let write = async |offset: u64| {
            let mut data = payload_buf(offset, BLOCK as u32);
            data.fill(1);
            export.write(offset, BLOCK as u32, data, false).await.unwrap();
        };
        for range in 0..RANGES {
            write(range * 2 * BLOCK).await;
        }
        host.sleep(5 * SECOND).await;
        for range in 0..RANGES {
            export.trim(range * 2 * BLOCK, BLOCK as u32).await.unwrap();
        }
        host.sleep(5 * SECOND).await;
        let slow = FaultKind::Slow(SECOND / 100);
        place.primary.fault(every(FaultOn::Write, slow));
        let first = volume.info().logs[0].seq;
        volume.clean(Some(first)).await.unwrap();
        let mut longest = 0;
        for number in 0..4000u64 {
            let began = host.boot_ns();
            write((8192 + number % 4096) * BLOCK).await;
            longest = longest.max(host.boot_ns() - began);
            host.sleep(SECOND / 200).await;
        }
        host.sleep(30 * SECOND).await;
        let left = (0..RANGES).filter(|range| place.primary.peek(range * 2 * BLOCK, 1)[0] == 1).count();
        tell.set((longest, left));
        place.primary.heal();
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    let (longest, left) = found.get();
    assert!(longest < SECOND, "a write took {} ms", longest / 1_000_000);
    assert_eq!(left, 0, "ranges are not punched");
}

/// Goal: destaging beside the sealing of a log goes on while ranges wait to be punched.
/// Method: each read of the CDP disk takes 0.1 s, so that sealing lasts; hundreds of ranges of an evicted log wait meanwhile, each of 10 ms. On a thread of its own: what this is about
/// never came back.
#[test]
fn ranges_are_punched_beside_the_sealing_of_a_log() {
    const RANGES: u64 = 1000;
    let (done, over) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let executor = Executor::new(Shared::new(107, 1_700_000_000 * SECOND));
        let place = Place::new(160, 64);
        let exec = Rc::clone(&executor);
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let config = EngineConfig { backlog_bytes_max: 256 << 10, ..EngineConfig::default() };
            let (engine, volume) = place.start(&exec, config).await;
            let export = volume.export();
            let write = async |offset: u64| {
                export.write(offset, BLOCK as u32, payload_buf(offset, BLOCK as u32), false).await.unwrap();
            };
            for range in 0..RANGES {
                write(range * 2 * BLOCK).await;
                export.trim(range * 2 * BLOCK, BLOCK as u32).await.unwrap();
            }
            host.sleep(5 * SECOND).await;
            let first = volume.info().logs[0].seq;
            let slow = FaultKind::Slow(SECOND / 10);
            place.cdp.fault(every(FaultOn::Read, slow));
            let slow = FaultKind::Slow(SECOND / 100);
            place.primary.fault(every(FaultOn::Write, slow));
            let cleaned = async { volume.clean(Some(first)).await.unwrap() };
            let writes = async {
                for number in 0..6000u64 {
                    write((8192 + number * 5 % 8192) * BLOCK).await;
                    host.sleep(SECOND / 400).await;
                }
            };
            futures::join!(cleaned, writes);
            place.cdp.heal();
            place.primary.heal();
            engine.stop().await.unwrap();
        };
        done.send(executor.run(Box::pin(root))).unwrap();
    });
    let outcome = over.recv_timeout(std::time::Duration::from_secs(120)).expect("it never came back");
    assert_eq!(outcome, Outcome::Done);
}

/// Goal: however the guest writes into what it discarded, and over a start, few discards are remembered: all of them are in what a new log begins with, and the
/// guest's next write waits for that.
/// Method: every second block of one large discard is written; then discards side by side, one block each, beyond what is remembered. After either the
/// agent starts anew, and a new log begins.
#[test]
fn what_is_remembered_of_discards_stays_small_in_what_a_log_begins_with() {
    const WRITES: u64 = 60_000;
    // 64 bytes for each, and what else a log begins with.
    const CARRY_MAX: u64 = 32_768 * 64 * 5 / 4;
    let (shared, place) = (Shared::new(7, 1_700_000_000 * SECOND), Rc::new(Place::new(2048, 1024)));
    for start in 0..3 {
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, place) = (Rc::clone(&executor), Rc::clone(&place));
        let root = async move {
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let kept = |now: Option<Settings>| Settings { reserve_capacity: 1800 << 20, ..now.unwrap() };
            volume.edit(kept).await.unwrap();
            let export = volume.export();
            match start {
                0 => {
                    export.trim(0, 512 << 20).await.unwrap();
                    for number in 0..WRITES {
                        let offset = number * 2 * BLOCK;
                        export.write(offset, BLOCK as u32, payload_buf(offset, BLOCK as u32), false).await.unwrap();
                    }
                }
                1 => {
                    for number in 0..WRITES {
                        export.trim((512 << 20) + number * 2 * BLOCK, BLOCK as u32).await.unwrap();
                    }
                }
                _ => {}
            }
            export.flush().await.unwrap();
            let before = volume.stats().journal_bytes;
            volume.disable().await.unwrap();
            let carried = volume.stats().journal_bytes - before;
            volume.enable().await.unwrap();
            assert!(carried < CARRY_MAX, "start {start}: a log begins with {} KiB", carried >> 10);
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
    }
}

/// Goal: whatever is zeroed, a frame that does not fit the open segment goes into the next one: a CDP disk does not fail for it.
/// Method: frames of nothing but zeroes, whose index entries fill the open segment's footer; then a write as large as a frame may be.
#[test]
fn zeroes_that_fill_an_index_cost_no_cdp_disk() {
    for frames in 10..18u64 {
        let executor = Executor::new(Shared::new(frames, 1_700_000_000 * SECOND));
        let place = Place::new(160, 64);
        let exec = Rc::clone(&executor);
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            for _ in 0..frames {
                let zero = |_| export.write_zeroes(BLOCK, 30 * BLOCK as u32, false, false);
                futures::future::try_join_all((0..69).map(zero)).await.unwrap();
            }
            let len = 64 * BLOCK as u32;
            export.write(64 * BLOCK, len, payload_buf(64 * BLOCK, len), false).await.unwrap();
            host.sleep(SECOND).await;
            assert_eq!(volume.info().health, Health::Ok, "after {frames} frames");
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    }
}
