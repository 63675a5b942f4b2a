//! What markers may not cost: a bound on those that nobody named.

mod common;

use std::rc::Rc;

use cdp_journal::info::MarkerKind;
use cdp_journal::{EngineConfig, Host as _};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use common::{Place, SECOND};

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
