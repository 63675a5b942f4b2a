//! What has been shown: it stays so, and it is all that there is.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::{BLOCK, EngineConfig, Export, Host as _, Instant, RevertRequest, payload_buf};
use cdp_sim::disk::{FaultKind, FaultOn, SimDisk};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND, every_within};

async fn write(export: &Rc<dyn Export>, block: u64, byte: u8, len: u32) {
    let mut data = payload_buf(block * BLOCK, len);
    data.fill(byte);
    export.write(block * BLOCK, len, data, false).await.unwrap();
}

/// The byte that fills a block up to some length.
async fn read(export: &Rc<dyn Export>, block: u64, len: u32) -> u8 {
    let parts = export.read(block * BLOCK, len).await.unwrap();
    let first = parts[0][0];
    assert!(parts.iter().all(|part| part.iter().all(|byte| *byte == first)), "block {block}");
    first
}

/// Goal: what a view has shown of an instant, and what was copied of it, no power cut changes: an increment since that instant would leave it out.
/// Method: a write that no flush has covered is seen through a view; then the power goes, and nothing survives that was not synced.
#[test]
fn what_a_view_has_shown_survives_a_power_cut() {
    let (shared, place) = (Shared::new(137, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
    let shown = Rc::new(Cell::new(Instant::ZERO));
    for start in 0..2 {
        let executor = Executor::new(Rc::clone(&shared));
        let (exec, here, at) = (Rc::clone(&executor), Rc::clone(&place), Rc::clone(&shown));
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = here.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            if start == 0 {
                write(&export, 0, 1, BLOCK as u32).await;
                export.flush().await.unwrap();
                host.sleep(5 * SECOND).await;
                write(&export, 0, 2, BLOCK as u32).await;
                at.set(engine.tick().await.unwrap());
            }
            let view = volume.open_view(at.get(), "", false).await.unwrap();
            assert_eq!(read(&view.export(), 0, BLOCK as u32).await, 2, "start {start}");
            if start == 1 {
                engine.stop().await.unwrap();
            }
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        executor.kill();
        for disk in [&place.cdp, &place.primary] {
            disk.power_cut_keeping(|_| false);
        }
    }
}

/// Goal: where a volume ends inside a block nothing is wanted of what lies behind its end: a tail that was written whole is known, though the primary could not
/// read what was there before.
#[test]
fn a_tail_that_was_written_whole_needs_nothing_of_what_lies_behind_the_end() {
    const TAIL: u32 = 2048;
    let last = (16 << 20) / BLOCK;
    let executor = Executor::new(Shared::new(139, 1_700_000_000 * SECOND));
    let primary = SimDisk::new(2, "primary", (16 << 20) + u64::from(TAIL), 512, false);
    let place = Place { primary, ..Place::new(160, 16) };
    place.primary.fault(every_within(FaultOn::Read, FaultKind::Eio, last * BLOCK, u64::from(TAIL)));
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        assert_eq!(export.size() % BLOCK, u64::from(TAIL), "this shows nothing");
        write(&export, last, 1, TAIL).await;
        host.sleep(5 * SECOND).await;
        place.primary.heal();
        let target = engine.tick().await.unwrap();
        write(&export, last, 2, TAIL).await;
        let view = volume.open_view(target, "", false).await.unwrap();
        assert_eq!(read(&view.export(), last, TAIL).await, 1);
        volume.revert(RevertRequest { target, force: false, release: false, dry_run: false }).await.unwrap();
        volume.revert_done().await.unwrap();
        assert_eq!(read(&export, last, TAIL).await, 1, "after a revert");
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}
