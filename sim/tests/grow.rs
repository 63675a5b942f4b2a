//! A primary that grows while the agent runs.

mod common;

use std::rc::Rc;

use cdp_journal::{BLOCK, EngineConfig, Host as _, payload_buf};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};

const MIB: u64 = 1 << 20;

/// Goal: what a guest writes into the space that `resize` gave it is on the primary once it is destaged, and stays there.
/// Method: the device goes on saying what it was opened with, as an open one does.
#[test]
fn what_is_written_into_new_space_reaches_the_primary() {
    let executor = Executor::new(Shared::new(11, 1_700_000_000 * SECOND));
    let place = Place::new(160, 16);
    place.primary.hide_behind(8 * MIB);
    let exec = Rc::clone(&executor);
    let root = async move {
        let host = SimHost(Rc::clone(&exec));
        let (engine, volume) = place.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        place.primary.grow_to(12 * MIB);
        assert_eq!(volume.resize(None).await.unwrap(), 12 * MIB);
        for offset in [8 * MIB - BLOCK, 8 * MIB, 12 * MIB - BLOCK] {
            let mut data = payload_buf(offset, BLOCK as u32);
            data.fill(7);
            export.write(offset, BLOCK as u32, data, false).await.unwrap();
        }
        export.write_zeroes(10 * MIB, BLOCK as u32, false, false).await.unwrap();
        export.flush().await.unwrap();
        let read = async |offset: u64| {
            let parts = export.read(offset, BLOCK as u32).await.unwrap();
            parts.iter().all(|part| part.iter().all(|byte| *byte == 7))
        };
        for seconds in [0, 10] {
            host.sleep(seconds * SECOND).await;
            for offset in [8 * MIB - BLOCK, 8 * MIB, 12 * MIB - BLOCK] {
                assert!(read(offset).await, "at {offset}, {seconds} s after the write");
            }
        }
        engine.stop().await.unwrap();
        assert!(place.primary.peek(12 * MIB - BLOCK, BLOCK).iter().all(|byte| *byte == 7), "it is on the primary");
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
}
