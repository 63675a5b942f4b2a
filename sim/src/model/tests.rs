//! The oracle against a perfect volume (it must never complain) and against deliberately wrong ones (it must).

use super::*;
use crate::rng::Rng;
use crate::stamp::fill;

/// What is wrong with the volume under test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// A view shows one write too many.
    ViewLate,
    /// A view misses its newest write.
    ViewEarly,
    /// A kill loses an acked write.
    KillLoses,
    /// A power cut loses a flushed write.
    FlushLost,
    /// A power cut loses a write out of the middle.
    HoleInJournal,
    /// A revert goes to one write before its target.
    RevertShort,
    /// What a crash cut off comes back.
    ComesBack,
    /// Two overlapping writes stand in one order in views and in the other in the volume.
    OrderFlips,
    /// A power cut loses what an earlier one left.
    SecondCutLoses,
    /// A write that a kill cut off and left is seen, flushed, and lost by a power cut.
    CutOffNeverDurable,
}

/// One event of the journal: a write of one sector, or a revert.
#[derive(Clone, Copy)]
enum Event {
    Write { at: u64, sector: u64, op: u32 },
    Revert { at: u64, target: u64 },
}

struct Volume {
    events: Vec<Event>,
    lost: Vec<Event>,
    wrong: Wrong,
}

impl Volume {
    fn value(&self, sector: u64, until: u64) -> u32 {
        let mut value = 0;
        for event in &self.events {
            match *event {
                Event::Write { at, sector: s, op } if s == sector && at <= until => value = op,
                Event::Revert { at, target } if at <= until => {
                    let short = u64::from(self.wrong == Wrong::RevertShort);
                    value = Volume { events: self.before(at), lost: Vec::new(), wrong: self.wrong }
                        .value(sector, target.saturating_sub(20 * short));
                }
                _ => {}
            }
        }
        value
    }
    fn before(&self, instant: u64) -> Vec<Event> {
        let at = |event: &Event| match *event {
            Event::Write { at, .. } | Event::Revert { at, .. } => at,
        };
        self.events.iter().filter(|event| at(event) < instant).copied().collect()
    }
    fn view(&self, sector: u64, instant: u64) -> u32 {
        match self.wrong {
            Wrong::ViewLate => self.value(sector, instant + 15),
            Wrong::ViewEarly => self.value(sector, instant.saturating_sub(15)),
            _ => self.value(sector, instant),
        }
    }
}

const SECTORS: u64 = 16;

fn read(volume: &Volume, instant: Option<u64>) -> Vec<u8> {
    let mut bytes = vec![0; SECTORS as usize * SECTOR];
    for (sector, out) in bytes.chunks_exact_mut(SECTOR).enumerate() {
        let op = match instant {
            Some(instant) => volume.view(sector as u64, instant),
            None if volume.wrong == Wrong::OrderFlips => {
                // Of two writes of the same sector that are closest together, the earlier one wins in the volume.
                let mut last: Vec<u32> = Vec::new();
                for event in &volume.events {
                    if let Event::Write { sector: s, op, .. } = *event
                        && s == sector as u64
                    {
                        last.push(op);
                    }
                }
                if last.len() > 1 { last[last.len() - 2] } else { volume.value(sector as u64, u64::MAX) }
            }
            None => volume.value(sector as u64, u64::MAX),
        };
        fill(1, op, sector as u64, out);
    }
    bytes
}

fn history(seed: u64, wrong: Wrong) -> Result<(), String> {
    let rng = Rng::new(seed);
    let mut volume = Volume { events: Vec::new(), lost: Vec::new(), wrong };
    let mut oracle = Oracle::new(1, SECTORS, vec![true; SECTORS as usize / 8]);
    let mut clock = 100u64;
    // Writes in flight: operation, first sector, count, whether its instant was given out.
    let mut flying: Vec<(u32, u64, u64, bool)> = Vec::new();
    let mut flushed_until = 0u64;
    // What a kill cut off and left, and whether a flush came behind it.
    let mut cut_off: Vec<(u32, bool)> = Vec::new();
    let mut instants = vec![clock];
    let apply = |volume: &mut Volume, clock: &mut u64, write: &mut (u32, u64, u64, bool)| {
        *clock += rng.range(1, 10);
        for sector in write.1..write.1 + write.2 {
            volume.events.push(Event::Write { at: *clock, sector, op: write.0 });
        }
        write.3 = true;
    };
    for _ in 0..60 {
        match rng.below(12) {
            0..4 => {
                let sector = rng.below(SECTORS);
                let count = rng.range(1, (SECTORS - sector).min(8 - sector % 8));
                let now = oracle.now(clock);
                let op = oracle.begin(Kind::Data, sector, count, false, now);
                flying.push((op, sector, count, false));
            }
            4..8 if !flying.is_empty() => {
                let i = rng.below(flying.len() as u64) as usize;
                if !flying[i].3 {
                    apply(&mut volume, &mut clock, &mut flying[i]);
                } else {
                    let write = flying.remove(i);
                    let now = oracle.now(clock);
                    oracle.ack(write.0, false, now);
                }
            }
            8 => {
                instants.push(clock);
                let instant = *rng.pick(&instants);
                let bytes = read(&volume, Some(instant));
                oracle.check(0, &bytes, When::At(instant))?;
                let from = oracle.now(clock);
                let bytes = read(&volume, None);
                let to = oracle.now(clock);
                oracle.check(0, &bytes, When::Between(from, to))?;
            }
            9 => {
                let began = oracle.now(clock);
                flushed_until = clock;
                cut_off.iter_mut().for_each(|(_, flushed)| *flushed = true);
                let now = oracle.now(clock);
                oracle.flushed(began, now);
            }
            10 if rng.one_in(2) => {
                let target = *rng.pick(&instants);
                let now = oracle.now(clock);
                let revert = oracle.revert_begin(target, now);
                clock += 5;
                volume.events.push(Event::Revert { at: clock, target });
                flushed_until = clock;
                cut_off.iter_mut().for_each(|(_, flushed)| *flushed = true);
                oracle.revert_done(revert, clock)?;
                instants.extend([clock, clock - 1]);
            }
            11 if rng.one_in(2) => {
                let power = rng.one_in(2);
                let acked: BTreeSet<u32> = flying.iter().map(|write| write.0).collect();
                let must = |event: &Event| match *event {
                    Event::Write { at, op, .. } => at <= flushed_until || (!power && !acked.contains(&op)),
                    Event::Revert { .. } => true,
                };
                let least = volume.events.iter().rposition(must).map_or(0, |i| i + 1);
                let mut keep = least + rng.below((volume.events.len() - least) as u64 + 1) as usize;
                // All sectors of one operation share an instant, so they go together.
                let at = |event: &Event| match *event {
                    Event::Write { at, .. } | Event::Revert { at, .. } => at,
                };
                while keep > 0 && keep < volume.events.len() && at(&volume.events[keep]) == at(&volume.events[keep - 1])
                {
                    keep += 1;
                }
                match wrong {
                    Wrong::KillLoses if !power => keep = keep.saturating_sub(2),
                    Wrong::FlushLost if power => keep = least.saturating_sub(2),
                    Wrong::HoleInJournal if keep > 2 => drop(volume.events.remove(keep - 2)),
                    _ => {}
                }
                let keep = keep.min(volume.events.len());
                volume.lost = volume.events.split_off(keep);
                if wrong == Wrong::CutOffNeverDurable && power {
                    let forgotten = |op: u32| cut_off.contains(&(op, true));
                    volume.events.retain(|event| !matches!(*event, Event::Write { op, .. } if forgotten(op)));
                }
                if !power {
                    cut_off.extend(flying.iter().map(|write| (write.0, false)));
                }
                let now = oracle.now(clock);
                oracle.crash(if power { CrashKind::Power } else { CrashKind::Kill }, 4096, now);
                clock += 1000;
                flying.clear();
                let from = oracle.now(clock);
                let bytes = read(&volume, None);
                oracle.check(0, &bytes, When::Between(from, from))?;
                if power && rng.one_in(2) {
                    // The power goes again, with nothing written since.
                    if wrong == Wrong::SecondCutLoses && least < volume.events.len() {
                        volume.lost.extend(volume.events.split_off(least));
                    }
                    let now = oracle.now(clock);
                    oracle.crash(CrashKind::Power, 4096, now);
                    clock += 1000;
                    let from = oracle.now(clock);
                    let bytes = read(&volume, None);
                    oracle.check(0, &bytes, When::Between(from, from))?;
                }
                if power {
                    flushed_until = clock;
                }
                if wrong == Wrong::ComesBack {
                    let lost = std::mem::take(&mut volume.lost);
                    volume.events.extend(lost);
                }
            }
            _ => clock += 1,
        }
    }
    for instant in instants {
        let bytes = read(&volume, Some(instant));
        oracle.check(0, &bytes, When::At(instant))?;
    }
    let from = oracle.now(clock);
    let bytes = read(&volume, None);
    oracle.check(0, &bytes, When::Between(from, from))
}

#[test]
fn a_perfect_volume_is_never_accused() {
    for seed in 0..3000 {
        history(seed, Wrong::Nothing).unwrap_or_else(|text| panic!("seed {seed}: {text}"));
    }
}

#[test]
fn every_wrong_volume_is_caught() {
    for (name, wrong) in [
        ("view late", Wrong::ViewLate),
        ("view early", Wrong::ViewEarly),
        ("kill loses", Wrong::KillLoses),
        ("flush lost", Wrong::FlushLost),
        ("hole in the journal", Wrong::HoleInJournal),
        ("revert short", Wrong::RevertShort),
        ("comes back", Wrong::ComesBack),
        ("order flips", Wrong::OrderFlips),
        ("second cut loses what the first left", Wrong::SecondCutLoses),
        ("cut off, seen, flushed, lost", Wrong::CutOffNeverDurable),
    ] {
        let caught = (0..300).filter(|seed| history(*seed, wrong).is_err()).count();
        assert!(caught >= 40, "{name}: caught in {caught} of 300");
    }
}

#[test]
fn a_discarded_sector_may_be_old_or_zero_but_not_foreign() {
    let mut oracle = Oracle::new(1, 8, vec![true]);
    let mut sector = [0; SECTOR];
    let now = oracle.now(10);
    let op = oracle.begin(Kind::Discard, 0, 8, false, now);
    let now = oracle.now(12);
    oracle.ack(op, false, now);
    let between = When::Between(now, now);
    oracle.check(0, &sector, between).expect("zeroes");
    fill(1, 0, 0, &mut sector);
    oracle.check(0, &sector, between).expect("the old bytes");
    fill(1, 0, 1, &mut sector);
    assert!(oracle.check(0, &sector, between).is_err(), "another sector's bytes");
    assert!(oracle.check(0, &[0; SECTOR], When::At(10)).is_err(), "before the discard the old bytes are there");
}

#[test]
fn unprotected_writes_are_lost_sector_by_sector_and_damage_whole_physical_sectors_only_when_unaligned() {
    let mut oracle = Oracle::new(1, 16, vec![true; 2]);
    let now = oracle.now(10);
    let aligned = oracle.begin(Kind::Data, 0, 8, true, now);
    let unaligned = oracle.begin(Kind::Data, 9, 1, true, now);
    let now = oracle.now(10);
    oracle.ack(aligned, true, now);
    oracle.ack(unaligned, true, now);
    oracle.crash(CrashKind::Power, 4096, now);
    let now = oracle.now(20);
    let between = When::Between(now, now);
    let (mut old, mut new) = ([0; SECTOR], [0; SECTOR]);
    fill(1, 0, 0, &mut old);
    fill(1, aligned, 1, &mut new);
    oracle.check(0, &old, between).expect("lost");
    oracle.check(1, &new, between).expect("kept");
    assert!(oracle.check(2, &[7; SECTOR], between).is_err(), "a whole physical sector is never garbage");
    oracle.check(15, &[7; SECTOR], between).expect("damaged beside an unaligned write");
    fill(1, aligned, 0, &mut new);
    assert!(oracle.check(0, &new, between).is_err(), "lost once is lost for good");
}

#[test]
fn a_revert_in_flight_at_a_crash_may_have_happened_or_not_but_not_both() {
    for happened in [true, false] {
        let mut oracle = Oracle::new(1, 8, vec![true]);
        let now = oracle.now(10);
        let op = oracle.begin(Kind::Data, 0, 8, false, now);
        let now = oracle.now(20);
        oracle.ack(op, false, now);
        oracle.revert_begin(10, now);
        let now = oracle.now(30);
        oracle.crash(CrashKind::Kill, 4096, now);
        assert_eq!(oracle.worlds(), 2);
        let now = oracle.now(100);
        let (mut a, mut b) = ([0; SECTOR], [0; SECTOR]);
        fill(1, if happened { 0 } else { op }, 0, &mut a);
        fill(1, if happened { op } else { 0 }, 1, &mut b);
        oracle.check(0, &a, When::Between(now, now)).expect("one of the two");
        assert_eq!(oracle.worlds(), 1);
        assert!(oracle.check(1, &b, When::Between(now, now)).is_err(), "the other one");
    }
}

/// Two writes of a volume of one block, and two reverts that are under way: to before the first write, and to between them.
fn with_two_reverts() -> (Oracle, [u32; 2], [u32; 2]) {
    let mut oracle = Oracle::new(1, 8, vec![true]);
    let writes = [10, 30].map(|clock| {
        let now = oracle.now(clock);
        let op = oracle.begin(Kind::Data, 0, 8, false, now);
        let now = oracle.now(clock + 10);
        oracle.ack(op, false, now);
        op
    });
    let reverts = [10, 25].map(|target| {
        let now = oracle.now(50);
        oracle.revert_begin(target, now)
    });
    (oracle, writes, reverts)
}

/// Whether the first sector may hold what an operation wrote.
fn may_show(oracle: &Oracle, op: u32, when: When) -> bool {
    let mut sector = [0; SECTOR];
    fill(1, op, 0, &mut sector);
    oracle.clone().check(0, &sector, when).is_ok()
}

#[test]
fn of_two_reverts_under_way_that_which_is_answered_first_was_made_first() {
    let (mut oracle, [first, second], [far, near]) = with_two_reverts();
    let now = oracle.now(50);
    let all = [0, first, second].map(|op| may_show(&oracle, op, When::Between(now, now)));
    assert_eq!(all, [true; 3], "neither is answered");
    oracle.revert_done(near, 60).expect("it was asked for");
    let now = oracle.now(60);
    let seen = |oracle: &Oracle, when| [0, first, second].map(|op| may_show(oracle, op, when));
    assert_eq!(seen(&oracle, When::Between(now, now)), [true, true, false], "the other may have been made since");
    assert_eq!(seen(&oracle, When::At(55)), [false, false, true], "nothing was made by then");
    assert!(oracle.clone().revert_done(far, 58).is_err(), "the other was made first, and answered last");
    let mut refused = oracle.clone();
    refused.revert_refused(far);
    assert_eq!(seen(&refused, When::Between(now, now)), [false, true, false]);
    oracle.revert_done(far, 70).expect("it was asked for");
    let now = oracle.now(70);
    assert_eq!(seen(&oracle, When::Between(now, now)), [true, false, false]);
    assert_eq!(seen(&oracle, When::At(65)), [false, true, false]);
    assert_eq!(seen(&oracle, When::At(55)), [false, false, true]);
}

#[test]
fn of_two_reverts_in_flight_at_a_crash_one_was_made_or_none() {
    let (mut oracle, [first, second], [far, _]) = with_two_reverts();
    oracle.revert_in_group(far, 7);
    let now = oracle.now(60);
    oracle.crash(CrashKind::Kill, 4096, now);
    assert_eq!((oracle.worlds(), oracle.reverted_in_group(7)), (3, None));
    let now = oracle.now(100);
    for (op, group) in [(0, true), (first, false), (second, false)] {
        let mut seen = oracle.clone();
        let mut sector = [0; SECTOR];
        fill(1, op, 0, &mut sector);
        seen.check(0, &sector, When::Between(now, now)).expect("one of the three");
        assert_eq!((seen.worlds(), seen.reverted_in_group(7)), (1, Some(group)));
    }
}

#[test]
fn a_block_that_its_disk_lost_is_judged_again_once_it_is_written() {
    let mut oracle = Oracle::new(1, 8, vec![true]);
    let now = oracle.now(10);
    oracle.ruin(0, now);
    let now = oracle.now(10);
    oracle.crash(CrashKind::Power, 4096, now);
    let now = oracle.now(20);
    oracle.check(0, &[7; SECTOR], When::Between(now, now)).expect("anything");
    oracle.check(0, &[7; SECTOR], When::At(9)).expect("anything, too");
    let op = oracle.begin(Kind::Data, 0, 1, false, now);
    let now = oracle.now(30);
    oracle.ack(op, false, now);
    let mut written = [0; SECTOR];
    fill(1, op, 0, &mut written);
    oracle.check(0, &written, When::Between(now, now)).expect("what was written");
    assert!(oracle.check(0, &[7; SECTOR], When::Between(now, now)).is_err(), "anything else");
    oracle.check(1, &[7; SECTOR], When::Between(now, now)).expect("what was not written is still lost");
}
