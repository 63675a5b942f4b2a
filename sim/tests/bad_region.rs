//! CDP disks of which one region alone is bad: what needs that region fails and says so, and everything else goes on.

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use cdp_journal::format::Geometry;
use cdp_journal::info::Health;
use cdp_journal::{BLOCK, EngineConfig, Error, Export, Host as _, Instant, Volume, payload_buf};
use cdp_sim::disk::{FaultKind, FaultOn, SimDisk};
use cdp_sim::executor::{Shared, SimHost};
use common::{Place, SECOND, every_within, until_killed};

/// Blocks that a life of the agent writes.
const BLOCKS: u64 = 8;
/// The one of them whose place on the CDP disk goes bad.
const BAD: u64 = 3;

/// What a block holds, or nothing where the CDP disk cannot read it and says so.
type Shown = Option<u8>;

/// What a life writes to a block, over and over.
fn byte(life: u64, block: u64) -> u8 {
    (life * BLOCKS + block + 1) as u8
}

/// What all blocks hold after a life.
fn after(life: u64) -> Vec<Shown> {
    (0..BLOCKS).map(|block| Some(byte(life, block))).collect()
}

/// Writes all blocks, each by itself, and flushes.
async fn write_all(export: &Rc<dyn Export>, life: u64) {
    for block in 0..BLOCKS {
        let mut data = payload_buf(block * BLOCK, BLOCK as u32);
        data.fill(byte(life, block));
        export.write(block * BLOCK, BLOCK as u32, data, false).await.unwrap();
    }
    export.flush().await.unwrap();
}

async fn shown(export: &Rc<dyn Export>) -> Vec<Shown> {
    let mut all = Vec::new();
    for block in 0..BLOCKS {
        all.push(match export.read(block * BLOCK, BLOCK as u32).await {
            Ok(parts) => {
                let first = parts[0][0];
                assert!(parts.iter().all(|part| part.iter().all(|byte| *byte == first)), "block {block} is no one's");
                Some(first)
            }
            Err(Error::Device { op: "read CDP disk", .. }) => None,
            Err(error) => panic!("block {block}: {error}"),
        });
    }
    all
}

/// The volume shows what it should now, and did at each instant; and it is protected.
async fn check(volume: &Rc<Volume>, now: &[Shown], instants: &[(Instant, Vec<Shown>)]) {
    assert_eq!(shown(&volume.export()).await, now);
    for (instant, expected) in instants {
        let view = volume.open_view(*instant, "", false).await.unwrap();
        assert_eq!(shown(&view.export()).await, *expected, "at {instant}");
        volume.close_view(view.id()).await.unwrap();
    }
    assert_eq!(volume.info().health, Health::Ok);
}

/// Where a block full of one byte stands on the CDP disk: it stands there once.
fn place_of(disk: &SimDisk, byte: u8) -> u64 {
    let is_full = |page: &u64| disk.peek(page * BLOCK, BLOCK).iter().all(|found| *found == byte);
    let found: Vec<u64> = disk.pages().into_iter().filter(is_full).collect();
    assert_eq!(found.len(), 1, "places of {byte}: this shows nothing");
    found[0] * BLOCK
}

/// Goal: where a region of the past is bad, what lies in it cannot be viewed, and that is said; all other history can, the volume is right and stays
/// protected, and no start needs that region.
/// Method: blocks are written in two lives; of one what the first life wrote goes bad when that life's log is final. Instants of the second life before its
/// writes are told by its before-images.
#[test]
fn a_bad_region_of_the_past_costs_what_lies_there_and_nothing_else() {
    let (shared, place) = (Shared::new(127, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
    let instants: Rc<RefCell<Vec<(Instant, Vec<Shown>)>>> = Rc::default();
    let bad = Rc::new(Cell::new(0u64));
    for life in 0..3 {
        let (known, region) = (Rc::clone(&instants), Rc::clone(&bad));
        until_killed(&shared, &place, |exec, here| async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = here.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            if life == 1 {
                // The log of the first life is final soon after.
                while !volume.info().logs[0].sealed {
                    host.sleep(SECOND).await;
                }
                let instant = engine.tick().await.unwrap();
                known.borrow_mut().push((instant, after(0)));
            }
            if life < 2 {
                write_all(&export, life).await;
                host.sleep(5 * SECOND).await;
                let instant = engine.tick().await.unwrap();
                known.borrow_mut().push((instant, after(life)));
            }
            if life == 0 {
                region.set(place_of(&here.cdp, byte(0, BAD)));
                engine.stop().await.unwrap();
                return;
            }
            if life == 1 {
                here.cdp.fault(every_within(FaultOn::Any, FaultKind::Eio, region.get(), BLOCK));
                known.borrow_mut()[0].1[BAD as usize] = None;
            }
            let expected = known.borrow().clone();
            check(&volume, &after(1), &expected).await;
            if life == 2 {
                host.sleep(20 * SECOND).await;
                check(&volume, &after(1), &expected).await;
                engine.stop().await.unwrap();
            }
        });
    }
}

/// Goal: a start that needs what lies in a bad region serves nothing and says so; once that can be read again all is there.
#[test]
fn a_start_that_needs_a_bad_region_is_refused_until_it_can_be_read() {
    let (shared, place) = (Shared::new(131, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
    for life in 0..3 {
        until_killed(&shared, &place, |exec, here| async move {
            let (engine, volume) = here.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            match life {
                0 => {
                    write_all(&export, 0).await;
                    let at = place_of(&here.cdp, byte(0, BAD));
                    here.cdp.fault(every_within(FaultOn::Any, FaultKind::Eio, at, BLOCK));
                }
                1 => {
                    assert_eq!(volume.info().health, Health::NeedsJournal);
                    assert!(export.read(0, BLOCK as u32).await.is_err(), "it is served");
                    here.cdp.heal();
                }
                _ => {
                    check(&volume, &after(0), &[]).await;
                    engine.stop().await.unwrap();
                }
            }
        });
    }
}

/// Goal: a region that takes no writes ends protection when the journal comes to it, and only that: no guest gets an error, nothing acked is lost, and after
/// the next start the disk is used again.
/// Method: the segments from the sixth to the ninth; the guest writes more than eight hold.
#[test]
fn a_region_that_takes_no_writes_costs_protection_and_no_write() {
    const PIECE: u32 = 64 << 10;
    const PIECES: u64 = 160;
    let (shared, place) = (Shared::new(137, 1_700_000_000 * SECOND), Rc::new(Place::new(160, 16)));
    let geometry = Geometry::of(place.cdp.size(), 1 << 20).unwrap();
    place.cdp.fault(every_within(FaultOn::Any, FaultKind::Eio, geometry.at(5, 0), 4 << 20));
    for life in 0..2 {
        until_killed(&shared, &place, |exec, here| async move {
            let host = SimHost(Rc::clone(&exec));
            let (engine, volume) = here.start(&exec, EngineConfig::default()).await;
            let export = volume.export();
            let is_right = async || {
                for piece in 0..PIECES {
                    let parts = export.read(piece * u64::from(PIECE), PIECE).await.unwrap();
                    let expected = piece as u8 + 1;
                    assert!(parts.iter().all(|part| part.iter().all(|byte| *byte == expected)), "piece {piece}");
                }
            };
            if life == 0 {
                for piece in 0..PIECES {
                    let offset = piece * u64::from(PIECE);
                    let mut data = payload_buf(offset, PIECE);
                    data.fill(piece as u8 + 1);
                    export.write(offset, PIECE, data, false).await.unwrap();
                }
                while volume.is_leaving() {
                    host.sleep(SECOND).await;
                }
                assert_eq!(volume.info().health, Health::Offline, "the journal never came there: this shows nothing");
                is_right().await;
                return;
            }
            is_right().await;
            host.sleep(20 * SECOND).await;
            assert_eq!(volume.info().health, Health::Ok);
            is_right().await;
            engine.stop().await.unwrap();
        });
    }
}
