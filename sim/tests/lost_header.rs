//! A segment whose header and first frame (one write) are gone, while later frames stand there and say that they were durable.

mod common;

use std::cell::Cell;
use std::rc::Rc;

use cdp_journal::format::{FrameHeader, Geometry, SegmentHeader, StreamKind, open_block};
use cdp_journal::info::Health;
use cdp_journal::{BLOCK, EngineConfig, payload_buf};
use cdp_sim::executor::{Executor, Outcome, Shared};
use common::{Place, SECOND};
use zerocopy::FromBytes as _;

/// Bytes of a frame's magic at a block of a segment, if a frame begins there.
fn begins_frame(place: &Place, at: u64) -> bool {
    let bytes = place.cdp.peek(at, BLOCK);
    FrameHeader::read_from_prefix(&bytes).is_ok_and(|(header, _)| header.magic.get() == FrameHeader::MAGIC)
}

/// Writes, each flushed, and a kill; then the newest writes segment loses its header and first frame. Answers how the volume comes up, and the
/// segment's number in its log.
fn health_after_loss(pieces: u64, lose: bool) -> (Health, u32) {
    let place = Rc::new(Place::new(160, 16));
    let shared = Shared::new(11, 1_700_000_000 * SECOND);
    let executor = Executor::new(Rc::clone(&shared));
    let (exec, here) = (Rc::clone(&executor), Rc::clone(&place));
    let root = async move {
        let (_engine, volume) = here.start(&exec, EngineConfig::default()).await;
        let export = volume.export();
        for piece in 0..pieces {
            let (offset, len) = (piece * (64 << 10), 64 << 10);
            export.write(offset, len, payload_buf(offset, len), false).await.unwrap();
            export.flush().await.unwrap();
        }
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    executor.kill();
    place.cdp.kill(&shared.rng);
    place.primary.kill(&shared.rng);
    let geometry = Geometry::of(place.cdp.size(), 1 << 20).unwrap();
    let header = |segment: u32| {
        open_block::<SegmentHeader>(&place.cdp.peek(geometry.at(segment, 0), BLOCK), &SegmentHeader::MAGIC, 8)
    };
    let headers =
        (0..geometry.segments as u32).filter_map(header).filter(|header| header.kind == StreamKind::Writes as u8);
    let newest = headers.max_by_key(|header| (header.log_seq.get(), header.number.get())).expect("there is a journal");
    let at = |block: u32| geometry.at(newest.segment.get(), block);
    let frames: Vec<u32> = (1..256).filter(|block| begins_frame(&place, at(*block))).collect();
    assert!(frames.len() >= 3, "{frames:?}: this shows nothing");
    if lose {
        place.cdp.poke(at(0), &vec![0; (at(frames[1]) - at(0)) as usize], 0);
    }
    let executor = Executor::new(shared);
    let health = Rc::new(Cell::new(None));
    let (exec, here, found) = (Rc::clone(&executor), Rc::clone(&place), Rc::clone(&health));
    let root = async move {
        let (_engine, volume) = here.start(&exec, EngineConfig::default()).await;
        found.set(Some(volume.info().health));
    };
    assert_eq!(executor.run(Box::pin(root)), Outcome::Done);
    executor.kill();
    (health.get().expect("it was opened"), newest.number.get())
}

/// Goal: what a flush has promised is never cut off like a torn tail: the volume is not served until a person has decided.
#[test]
fn durable_frames_behind_a_lost_header_and_first_frame_are_missed() {
    // The second segment of the log, and the only one there is.
    for (pieces, number) in [(20, 1), (6, 0)] {
        assert_eq!(health_after_loss(pieces, false), (Health::Ok, number), "{pieces} pieces, nothing lost");
        assert_eq!(health_after_loss(pieces, true), (Health::NeedsJournal, number), "{pieces} pieces");
    }
}
