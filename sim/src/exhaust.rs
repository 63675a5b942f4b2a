//! All short histories: every sequence of a few operations over a small alphabet, with a crash before and after every call to a disk or to the folder of
//! states, of both kinds. Where the power goes with few unsynced writes every subset of them survives once; besides, several torn and shuffled ones
//! survive, each with another order of events. Behind the crash, and after one more start, a view of each instant of the history is opened and read.

use std::fmt;
use std::str::FromStr;

use crate::run::{Report, run, run_for_calls, run_with_survivors};
use crate::workload::{Action, Crash, History, Op, SHORT, Setup, Then};

/// The alphabet: on a volume of two blocks, so that nearly everything overlaps. A case names its letters by their place here: new ones come last.
///
/// B is written apart from A in its middle, not whole: that is the write which leaves a part of a block, at both of its ends, as it was. All of B, alone, would be
/// write A at another place; beside A it is written whole by A+B.
pub const ALPHABET: [(&str, &[(Action, Then)]); 14] = [
    ("write A", &[(Action::Write { vol: 0, sector: 0, count: 8, fua: false }, Then::Go)]),
    ("write A+B", &[(Action::Write { vol: 0, sector: 0, count: 16, fua: false }, Then::Go)]),
    ("write B's middle", &[(Action::Write { vol: 0, sector: 10, count: 3, fua: false }, Then::Go)]),
    ("zero A", &[(Action::Zero { vol: 0, sector: 0, count: 8, no_hole: false, fua: false }, Then::Go)]),
    ("flush", &[(Action::Flush { vol: 0 }, Then::Go)]),
    // A guest that waits for its writes and for its flush: what was written before must survive whatever comes after.
    ("flush all", &[(Action::Tick, Then::Barrier), (Action::Flush { vol: 0 }, Then::Wait)]),
    // Asked first: where the clock's mark lies too low there is no instant for a marker.
    ("mark", &[(Action::Ask, Then::Go), (Action::Mark { vol: Some(0), pick: 1 }, Then::Go)]),
    // To before the first operation, or where that is gone to the oldest instant known. Writes before it may still be in flight.
    ("revert", &[(Action::Revert { vol: 0, at: OLDEST, force: true, release: true }, Then::Go)]),
    ("undo the revert", &[(Action::UndoRevert { vol: 0 }, Then::Go)]),
    ("disable, enable", &[(Action::Disable { vol: 0 }, Then::Go), (Action::Enable { vol: 0 }, Then::Go)]),
    // Closes the active log and drops or thins it.
    ("clean the newest log", &[(Action::CleanLog { vol: 0, pick: NEWEST }, Then::Go)]),
    // An eighth of the reserved duration goes by, and two rounds of the engine, since the clock's mark has to be raised: the active log is closed, if it has a write.
    (
        "rotate",
        &[(Action::Freeze { ns: 10_801 * SECOND }, Then::Go), (Action::Sleep { ns: SECOND * 6 / 10 }, Then::Go)],
    ),
    // All of it goes by: what is closed, and older than the active log, is evicted.
    ("evict", &[(Action::Freeze { ns: 86_401 * SECOND }, Then::Go), (Action::Sleep { ns: SECOND }, Then::Go)]),
    // To between two writes: an instant that is not the oldest, mostly of the active log.
    ("undo the newest write", &[(Action::Tick, Then::Barrier), (Action::UndoWrite { vol: 0 }, Then::Go)]),
];

const SECOND: u64 = 1_000_000_000;

/// A multiple of all numbers up to 20.
const OF_UP_TO_20: u64 = 232_792_560;

/// The last of up to 20 logs.
const NEWEST: u64 = OF_UP_TO_20 - 1;

/// The first of up to 20 instants that history holds still, and no other near it (see [`crate::world::World::pick_instant`]).
const OLDEST: u64 = ((1u64 << 56) | (4 << 48)).next_multiple_of(OF_UP_TO_20);

/// Later than any step: such a crash never comes.
pub const NEVER: u64 = 1 << 40;

/// One short history: the letters, and where and how it crashes.
#[derive(Clone, Debug)]
pub struct Case {
    /// Letters of the alphabet.
    pub letters: Vec<usize>,
    /// Scheduler step of the crash, counted from the first operation, and whether it is a power cut. [`NEVER`]: no crash.
    pub crash: (u64, bool),
    /// Seed of the scheduler and of what survives.
    pub seed: u64,
    /// Instead of what the seed says: which of the unsynced writes survive, one bit for each (see [`crate::world::World::survivors`]).
    pub survivors: Option<u64>,
}

impl Case {
    /// The history of this case.
    pub fn history(&self) -> History {
        let op = |action: &Action| Op { action: action.clone(), then: Then::Go };
        let step = |(action, then): &(Action, Then)| Op { action: action.clone(), then: *then };
        let (steps, power) = self.crash;
        // Also one that never comes: the order of events is the same with it.
        let mut ops = vec![op(&Action::Crash(Crash { power, steps, again: None, down_ns: 1_000_000 }))];
        ops.extend(self.letters.iter().flat_map(|letter| ALPHABET[*letter].1.iter().map(step)));
        // What is in flight gets time to reach the primary, or to crash on the way.
        ops.push(Op { action: Action::Tick, then: Then::Barrier });
        ops.push(op(&Action::Sleep { ns: 30_000_000 }));
        // Of the first seed, and every second one, a power cut damages what a write covered in part of a primary's sector of 4 KiB.
        let physical = (4096, if self.seed % 2 == 1 { 4096 } else { 512 });
        History { seed: self.seed, profile: SHORT, setup: Setup { physical, ..setup() }, ops }
    }

    /// Runs it.
    pub fn run(&self, trace: bool) -> Report {
        match self.survivors {
            Some(survivors) => run_with_survivors(self.history(), survivors, trace),
            None => run(self.history(), trace),
        }
    }

    /// In words.
    pub fn name(&self) -> String {
        let letters: Vec<&str> = self.letters.iter().map(|letter| ALPHABET[*letter].0).collect();
        format!("[{}] {self}", letters.join(", "))
    }
}

/// As `cdp-sim --case` takes it: the letters' numbers, the step and the kind of the crash, the seed and, if they were chosen, the survivors.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters: Vec<String> = self.letters.iter().map(usize::to_string).collect();
        let (step, power) = self.crash;
        write!(f, "{}:{step}:{}:{}", letters.join("+"), if power { "cut" } else { "kill" }, self.seed)?;
        self.survivors.map_or(Ok(()), |survivors| write!(f, ":{survivors}"))
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            format!("{text:?}: {what}; a case is LETTERS:STEP:cut or kill:SEED[:SURVIVORS], as a violation prints it")
        };
        let number = |part: &str| part.parse::<u64>().map_err(|_| wrong(&format!("{part:?} is no number")));
        let parts: Vec<&str> = text.split(':').collect();
        let [letters, step, kind, seed, ref survivors @ ..] = parts[..] else { return Err(wrong("too few parts")) };
        let letters = letters.split('+').map(|letter| match letter.parse() {
            Ok(letter) if letter < ALPHABET.len() => Ok(letter),
            _ => Err(wrong(&format!("{letter:?} is no letter, 0 to {}", ALPHABET.len() - 1))),
        });
        let power = match kind {
            "cut" => true,
            "kill" => false,
            _ => return Err(wrong(&format!("{kind:?} is neither cut nor kill"))),
        };
        let survivors = match survivors {
            [] => None,
            [one] => Some(number(one)?),
            _ => return Err(wrong("too many parts")),
        };
        Ok(Self {
            letters: letters.collect::<Result<_, _>>()?,
            crash: (number(step)?, power),
            seed: number(seed)?,
            survivors,
        })
    }
}

fn setup() -> Setup {
    Setup {
        volumes: vec![16],
        disks: vec![34],
        physical: (4096, 512),
        files: false,
        reserve_segments: 32,
        duration_s: 86400,
        backlog_bytes: 1 << 20,
        flush_primary: false,
        marker_interval_s: 60,
        enabled: true,
        primary_slow_ns: 0,
        stragglers: false,
        begin_eighths: 8,
        overlap: false,
        admins: false,
        heavy: false,
    }
}

/// Sequences of `depth` letters.
pub fn sequences(depth: u32) -> u64 {
    (ALPHABET.len() as u64).pow(depth)
}

/// How thoroughly a sequence is tried.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// A crash at every so many of the steps before or after a call.
    pub stride: u64,
    /// Seeds, each with an order of events of its own and with writes that survive in part, torn or out of order.
    pub seeds: u64,
    /// With the first seed, and no more than so many unsynced writes at a power cut: every subset of them, whole.
    pub whole: usize,
}

/// All cases of the sequence number `place` of `depth` letters: no crash, and a crash at every place for one: a power cut with each seed and each subset,
/// a kill with the first seed. Answers how many cases ran and the first that failed.
pub fn check(depth: u32, place: u64, bounds: Bounds) -> (u64, Option<(Case, Report)>) {
    let n = ALPHABET.len() as u64;
    let letters: Vec<usize> = (0..depth).map(|i| (place / n.pow(i) % n) as usize).collect();
    let mut cases = 0;
    for seed in 1..=bounds.seeds {
        let plain = Case { letters: letters.clone(), crash: (NEVER, false), seed, survivors: None };
        let (report, calls) = run_for_calls(plain.history());
        cases += 1;
        if report.failure.is_some() {
            return (cases, Some((plain, report)));
        }
        let kinds: &[bool] = if seed == 1 { &[false, true] } else { &[true] };
        for at in calls.into_iter().step_by(bounds.stride.max(1) as usize) {
            for power in kinds {
                let case = Case { crash: (at, *power), ..plain.clone() };
                let first = one(&case);
                cases += 1;
                if first.failure.is_some() {
                    return (cases, Some((case, first)));
                }
                if seed > 1 || !power || first.unsynced > bounds.whole {
                    continue;
                }
                for survivors in 0..1 << first.unsynced {
                    let case = Case { survivors: Some(survivors), ..case.clone() };
                    let report = one(&case);
                    cases += 1;
                    if report.failure.is_some() {
                        return (cases, Some((case, report)));
                    }
                }
            }
        }
    }
    (cases, None)
}

/// Runs a case that must crash once.
fn one(case: &Case) -> Report {
    let mut report = case.run(false);
    if report.counts.kills + report.counts.power_cuts != 1 {
        report.failure.get_or_insert_with(|| "the crash did not come, or not once".to_owned());
    }
    report
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ops::Range;
    use std::rc::Rc;

    use super::*;
    use crate::run::run_in;
    use crate::stamp::{SECTOR, Value, decode};
    use crate::world::{Counts, World};

    /// What a history without a crash came to.
    #[derive(Debug)]
    struct Came {
        /// What the primary held before it, and holds alone after the last stop.
        initial: Vec<Value>,
        content: Vec<Value>,
        counts: Counts,
        /// Number of its newest log.
        log: u64,
        /// Markers that the last start found.
        marks: usize,
    }

    impl Came {
        fn of(names: &[&str], seed: u64) -> Self {
            let letter = |name: &&str| ALPHABET.iter().position(|(other, _)| other == name).expect("a letter");
            let letters = names.iter().map(letter).collect();
            let case = Case { letters, crash: (NEVER, false), seed, survivors: None };
            let world = World::new(case.history(), false);
            let vol = &world.volumes[0];
            let content = || -> Vec<Value> {
                let bytes = vol.primary.peek(0, vol.sectors * SECTOR as u64);
                bytes.chunks_exact(SECTOR).enumerate().map(|(at, sector)| decode(0, at as u64, sector)).collect()
            };
            let initial = content();
            let report = run_in(Rc::clone(&world));
            assert_eq!(report.failure, None, "{}", case.name());
            let (log, marks) = (vol.last_look.get().log, vol.marks.borrow().len());
            Self { initial, content: content(), counts: report.counts, log, marks }
        }

        /// Nothing is changed but these sectors, and they hold what the first write wrote.
        fn holds_first(&self, sectors: Range<usize>) -> bool {
            let first = Value::Stamp(1);
            let expected = |at: usize| if sectors.contains(&at) { &first } else { &self.initial[at] };
            self.content.iter().enumerate().all(|(at, value)| value == expected(at))
        }

        /// A is zeroes now.
        fn zeroed(&self, before: &Self) -> bool {
            let zeroes = |came: &Self| came.content[..8].iter().all(|value| *value == Value::Zero);
            zeroes(self) && !zeroes(before)
        }

        /// One revert more, that changed something.
        fn reverted(&self, before: &Self) -> bool {
            self.counts.reverts == before.counts.reverts + 1 && self.content != before.content
        }

        /// Instants that were history are none any more.
        fn lost_history(&self, before: &Self) -> bool {
            before.counts.views_refused == 0 && self.counts.views_refused > 0
        }
    }

    /// Goal: no letter is refused, or comes to nothing, without a word.
    /// Method: for each of them what a history comes to without it, and with it behind, under each order of events.
    #[test]
    fn each_letter_does_what_it_says() {
        let shown: [(&str, &[&str], fn(&Came, &Came) -> bool); 16] = [
            ("write A", &[], |_, with| with.holds_first(0..8)),
            ("write A+B", &[], |_, with| with.holds_first(0..16)),
            ("write B's middle", &[], |_, with| with.holds_first(10..13)),
            ("zero A", &["write A", "flush all"], |without, with| with.zeroed(without)),
            ("flush", &["write A", "rotate"], |without, with| with.counts.flushes > without.counts.flushes),
            ("flush all", &["write A"], |without, with| with.counts.flushes > without.counts.flushes),
            ("mark", &[], |without, with| with.marks > without.marks),
            ("mark", &["write A", "rotate"], |without, with| with.marks > without.marks),
            ("revert", &["write A", "flush all"], |without, with| with.reverted(without) && with.holds_first(0..0)),
            ("undo the revert", &["write A", "flush all", "revert"], |without, with| {
                with.reverted(without) && with.holds_first(0..8)
            }),
            ("disable, enable", &["write A"], |without, with| {
                with.counts.switches == without.counts.switches + 2 && with.log == without.log + 2
            }),
            ("clean the newest log", &["write A", "flush all"], |without, with| {
                with.counts.cleans == 1 && with.log > without.log && with.lost_history(without)
            }),
            ("rotate", &["write A"], |without, with| with.log == without.log + 1),
            ("rotate", &["write A", "flush all"], |without, with| with.log == without.log + 1),
            ("evict", &["write A", "rotate"], |without, with| {
                with.counts.evicted > without.counts.evicted && with.lost_history(without)
            }),
            // Back to the first of two writes, where a revert to the beginning would take both.
            ("undo the newest write", &["write A", "flush all", "write A+B"], |without, with| {
                with.reverted(without) && with.holds_first(0..8)
            }),
        ];
        for (name, before, does) in shown {
            for seed in 1..=4 {
                let (without, with) = (Came::of(before, seed), Came::of(&[before, &[name][..]].concat(), seed));
                assert!(does(&without, &with), "{before:?}, {name:?}, seed {seed}: {without:?}, with it {with:?}");
            }
        }
        for (name, _) in ALPHABET {
            assert!(shown.iter().any(|(letter, ..)| *letter == name), "{name:?}: nothing is shown of it");
        }
    }

    /// Goal: which views are looked at is not left to chance.
    /// Method: a kill at each place of two writes and a flush. Each instant that is known in the end was looked at behind the history and after the last
    /// start, and some right after a crash at an even step.
    #[test]
    fn each_instant_is_looked_at_behind_a_crash() {
        let letters = vec![0, 5, 2];
        let mut most = 0;
        for at in places(&letters) {
            let case = Case { letters: letters.clone(), crash: (at, false), seed: 1, survivors: None };
            let world = World::new(case.history(), false);
            let report = run_in(Rc::clone(&world));
            assert_eq!((report.failure, report.counts.kills), (None, 1), "{}", case.name());
            let instants: BTreeSet<u64> = world.instants.borrow().iter().copied().collect();
            let looks = report.counts.views_checked + report.counts.views_refused;
            let least = 2 * instants.len() as u64 + u64::from(at.is_multiple_of(2));
            assert!(looks >= least, "{}: {looks} looks at {instants:?}", case.name());
            most = most.max(instants.len());
        }
        // Before and after each write, at the least.
        assert!(most >= 4, "{most}");
    }

    fn places(letters: &[usize]) -> Vec<u64> {
        places_under(letters, 1)
    }

    fn places_under(letters: &[usize], seed: u64) -> Vec<u64> {
        let case = Case { letters: letters.to_vec(), crash: (NEVER, false), seed, survivors: None };
        let (report, places) = run_for_calls(case.history());
        assert_eq!(report.failure, None);
        places
    }

    /// Goal: the places of a crash are those of the operations, not of what comes before or behind them.
    #[test]
    fn more_operations_have_more_places_for_a_crash() {
        let of = |letters: &[usize]| (1..=8).map(|seed| places_under(letters, seed).len()).sum::<usize>();
        let counts = [&[][..], &[0], &[0, 2], &[0, 2, 4], &[0, 2, 4, 6]].map(of);
        // Calls that two operations make in one step share a place, and the clock's mark is raised in some.
        assert!(counts[0] * 2 < counts[1] && counts[1] < counts[3] && counts[2] < counts[4], "{counts:?}");
    }

    /// Goal: no place for a crash lies beyond the operations.
    /// Method: a crash at each step up to the last place comes, and one behind it never.
    #[test]
    fn the_last_place_is_the_last_step_that_can_crash() {
        let letters = vec![0, 2, 4, 6];
        let last = *places(&letters).last().expect("there are some");
        for step in (1..=last + 1).rev() {
            let case = Case { letters: letters.clone(), crash: (step, false), seed: 1, survivors: None };
            let report = case.run(false);
            assert_eq!((report.failure, report.counts.kills), (None, u64::from(step <= last)), "{}", case.name());
        }
    }

    /// Goal: what a violation prints is what `--case` takes.
    #[test]
    fn a_case_is_read_as_it_was_printed() {
        for text in ["0:5:kill:1", "3+10+0:1099511627776:cut:7", "1+2:40:cut:1:6"] {
            assert_eq!(text.parse::<Case>().expect("it was printed").to_string(), text);
        }
        let no_letter = format!("{}:5:kill:1", ALPHABET.len());
        for text in ["", "0:5:kill", &no_letter, "0:5:both:1", "0:x:cut:1", "0:5:cut:1:2:3"] {
            assert!(text.parse::<Case>().is_err(), "{text:?}");
        }
    }

    /// Goal: what survives of the unsynced writes is what a case asks for, and every choice passes.
    /// Method: at each place of two writes and a flush where the power finds an unsynced write, it survives once and is lost once; somewhere that
    /// makes a difference to what the next life of the agent does.
    #[test]
    fn each_subset_of_the_unsynced_writes_can_be_asked_for() {
        let letters = vec![0, 2, 4];
        let mut different = 0;
        for at in places(&letters) {
            let case = Case { letters: letters.clone(), crash: (at, true), seed: 1, survivors: None };
            if case.run(false).unsynced != 1 {
                continue;
            }
            let [lost, kept] = [0, 1].map(|survivors| Case { survivors: Some(survivors), ..case.clone() }.run(false));
            assert!(lost.failure.is_none() && kept.failure.is_none(), "{}", case.name());
            different += u32::from(lost.hash != kept.hash);
        }
        assert!(different > 0);
    }
}
