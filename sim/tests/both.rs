//! `durability = "both"`: what is flushed is on the primary, too.

mod common;

use std::rc::Rc;

use cdp_journal::{BLOCK, EngineConfig, payload_buf};
use cdp_sim::executor::{Executor, Outcome, Shared};
use cdp_sim::rng::Rng;
use common::{Place, SECOND};

/// Goal: after a flush the primary alone holds what was written before it, whatever becomes of the CDP disk.
/// Method: a write and a flush; the power of the primary is cut, and it is looked at by itself. Without `both` some of that is lost, or this shows nothing.
#[test]
fn what_is_flushed_is_on_the_primary_after_a_power_cut() {
    assert_eq!((0..40).filter(|seed| is_there(*seed, true)).count(), 40);
    assert!((0..40).filter(|seed| is_there(*seed, false)).count() < 20);
}

fn is_there(seed: u64, flush_primary: bool) -> bool {
    let executor = Executor::new(Shared::new(seed, 1_700_000_000 * SECOND));
    let place = Rc::new(Place::new(160, 64));
    let (exec, inner) = (Rc::clone(&executor), Rc::clone(&place));
    let root = async move {
        let config = EngineConfig { flush_primary, ..EngineConfig::default() };
        let (_engine, volume) = inner.start(&exec, config).await;
        for block in [3, 4, 77] {
            let mut buf = payload_buf(block * BLOCK, BLOCK as u32);
            buf.fill(block as u8);
            volume.export().write(block * BLOCK, BLOCK as u32, buf, false).await.unwrap();
        }
        volume.export().flush().await.unwrap();
        inner.primary.power_cut(&Rng::new(seed));
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    executor.kill();
    [3, 4, 77].iter().all(|block| place.primary.peek(block * BLOCK, BLOCK).iter().all(|byte| *byte == *block as u8))
}
