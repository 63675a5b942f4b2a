//! What is due by the clock alone, on a host where nobody asks for anything.

mod common;

use cdp_journal::info::Settings;
use cdp_journal::{BLOCK, EngineConfig, Host as _, payload_buf};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};
use std::rc::Rc;

/// Goal: retention and automatic markers need no guest and no admin: where a volume rests, its history goes when it is too old, and what was written last gets
/// its marker.
/// Method: one write, and then nothing, for many times the clock's lead and for several spans of retention.
#[test]
fn a_volume_that_rests_loses_what_is_too_old_and_gets_its_marker() {
    const KEPT_S: u64 = 200;
    let executor = Executor::new(Shared::new(61, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        volume.edit(|now| Settings { reserve_duration_s: KEPT_S, ..now.unwrap() }).await.unwrap();
        let export = volume.export();
        export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        let written = engine.tick().await.unwrap();
        host.sleep(KEPT_S / 2 * SECOND).await;
        assert!(volume.info().markers.iter().any(|marker| marker.time > written), "no marker behind the last write");
        host.sleep(3 * KEPT_S * SECOND).await;
        let oldest = volume.info().coverage[0].start;
        assert!(oldest > written, "history of {written}, older than three times its retention, is still there");
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}

/// Goal: a wall clock that was set back keeps nothing from the primary: instants run ahead of it until it has come up.
#[test]
fn what_is_written_after_the_clock_was_set_back_reaches_the_primary() {
    let executor = Executor::new(Shared::new(67, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        exec.shared.step_wall(-3600 * SECOND as i64);
        let export = volume.export();
        export.write(0, BLOCK as u32, payload_buf(0, BLOCK as u32), false).await.unwrap();
        host.sleep(5 * SECOND).await;
        assert_eq!(volume.info().backlog_bytes, 0);
        engine.stop().await.unwrap();
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}
