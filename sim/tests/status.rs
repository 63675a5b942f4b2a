//! What BLOCK_STATUS says while content moves: in virtual time, under many orders of events.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::{BLOCK, EngineConfig, Host as _, RevertRequest, payload_buf};
use cdp_sim::disk::{Fault, FaultKind, FaultOn};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};

const BLOCKS: u64 = 192;

/// Goal: what a view says to be zero reads as zeroes, while a revert that it rests on is being copied: an export skips what is said to be zero.
/// Method: blocks of data are zeroed, which makes holes of them, and a revert brings them back; a view of that is asked again and again until all is copied.
#[test]
fn what_a_view_says_to_be_zero_reads_as_zeroes_while_a_revert_is_copied() {
    let mut asked_while_copied = 0;
    for seed in 0..200 {
        let executor = Executor::new(Shared::new(seed, 1_700_000_000 * SECOND));
        let place = Place::new(160, 16);
        let found = Rc::new(Cell::new((0, None)));
        let (exec, tell) = (Rc::clone(&executor), Rc::clone(&found));
        let root = async move {
            let host = SimHost(Rc::clone(&exec));
            let config = EngineConfig { destage_blocks_max: 8, ..EngineConfig::default() };
            let (engine, volume) = place.start(&exec, config).await;
            let export = volume.export();
            for block in 0..BLOCKS {
                let offset = block * BLOCK;
                let mut data = payload_buf(offset, BLOCK as u32);
                data.fill(9);
                export.write(offset, BLOCK as u32, data, false).await.unwrap();
            }
            let target = engine.tick().await.unwrap();
            host.sleep(5 * SECOND).await;
            export.write_zeroes(0, (BLOCKS * BLOCK) as u32, false, false).await.unwrap();
            host.sleep(5 * SECOND).await;
            // A look into an index takes longer than a piece of the copy.
            let slow = FaultKind::Slow(SECOND / 50);
            place.cdp.fault(Fault { on: FaultOn::Read, kind: slow, times: Some(40), after: seed as u32, within: None });
            let request = RevertRequest { target, force: true, release: true, dry_run: false };
            let report = volume.revert(request).await.unwrap();
            let view = volume.open_view(report.instant, "", false).await.unwrap();
            let (mut rounds, mut wrong) = (0, None);
            while volume.revert_progress().is_some() {
                let mut at = 0;
                while at < BLOCKS * BLOCK {
                    for piece in view.export().status(at, BLOCKS * BLOCK - at).await.unwrap() {
                        // All of it holds data, at every moment.
                        wrong = wrong.or(piece.zero.then_some(at));
                        at += piece.len;
                    }
                }
                rounds += 1;
            }
            tell.set((rounds, wrong));
            engine.stop().await.unwrap();
        };
        assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
        let (rounds, wrong) = found.get();
        assert_eq!(wrong, None, "seed {seed}: said to be zero at this byte");
        asked_while_copied += rounds;
    }
    assert!(asked_while_copied > 200, "{asked_while_copied}: the copy was never met, this shows nothing");
}
