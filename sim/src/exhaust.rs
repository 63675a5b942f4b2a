//! All short histories: every sequence of a few operations over a small alphabet, with a crash before and after every call to a disk or to the folder of
//! states, of both kinds and with several subsets of the unsynced writes, each with another order of events.

use crate::run::{Report, run, run_for_calls};
use crate::workload::{Action, Crash, History, Op, Setup, Then};

/// The alphabet: on a volume of two blocks, so that nearly everything overlaps.
pub const ALPHABET: [(&str, &[(Action, Then)]); 11] = [
    ("write A", &[(Action::Write { vol: 0, sector: 0, count: 8, fua: false }, Then::Go)]),
    ("write A+B", &[(Action::Write { vol: 0, sector: 0, count: 16, fua: false }, Then::Go)]),
    ("write B's middle", &[(Action::Write { vol: 0, sector: 10, count: 3, fua: false }, Then::Go)]),
    ("zero A", &[(Action::Zero { vol: 0, sector: 0, count: 8, no_hole: false, fua: false }, Then::Go)]),
    ("flush", &[(Action::Flush { vol: 0 }, Then::Go)]),
    // A guest that waits for its writes and for its flush: what was written before must survive whatever comes after.
    ("flush all", &[(Action::Tick, Then::Barrier), (Action::Flush { vol: 0 }, Then::Wait)]),
    ("mark", &[(Action::Mark { vol: Some(0), pick: 1 }, Then::Go)]),
    ("revert", &[(Action::Revert { vol: 0, at: 1, force: true, release: true }, Then::Go)]),
    ("undo the revert", &[(Action::UndoRevert { vol: 0 }, Then::Go)]),
    ("disable, enable", &[(Action::Disable { vol: 0 }, Then::Go), (Action::Enable { vol: 0 }, Then::Go)]),
    // Closes the active log and drops or thins it: rotation and eviction in one.
    ("clean the newest log", &[(Action::CleanLog { vol: 0, pick: NEWEST }, Then::Go)]),
];

/// The last of up to 20 logs: one less than a multiple of all numbers up to 20.
const NEWEST: u64 = 232_792_560 - 1;

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
        History { seed: self.seed, profile: "exhaust", setup: setup(), ops }
    }

    /// Runs it.
    pub fn run(&self) -> Report {
        run(self.history(), false)
    }

    /// In words.
    pub fn name(&self) -> String {
        let letters: Vec<&str> = self.letters.iter().map(|letter| ALPHABET[*letter].0).collect();
        format!("[{}] crash {:?} seed {}", letters.join(", "), self.crash, self.seed)
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
    }
}

/// Sequences of `depth` letters.
pub fn sequences(depth: u32) -> u64 {
    (ALPHABET.len() as u64).pow(depth)
}

/// All cases of the sequence number `place` of `depth` letters: no crash, and a crash at every `stride`-th step before or after a call: a power cut with
/// each of `subsets` seeds for the order of events and what survives, a kill with the first. Answers how many cases ran and the first that failed.
pub fn check(depth: u32, place: u64, stride: u64, subsets: u64) -> (u64, Option<(Case, Report)>) {
    let n = ALPHABET.len() as u64;
    let letters: Vec<usize> = (0..depth).map(|i| (place / n.pow(i) % n) as usize).collect();
    let mut cases = 0;
    for seed in 1..=subsets {
        let plain = Case { letters: letters.clone(), crash: (NEVER, false), seed };
        let (report, calls) = run_for_calls(plain.history());
        cases += 1;
        if report.failure.is_some() {
            return (cases, Some((plain, report)));
        }
        let kinds: &[bool] = if seed == 1 { &[false, true] } else { &[true] };
        for at in calls.into_iter().step_by(stride.max(1) as usize) {
            for power in kinds {
                let case = Case { crash: (at, *power), ..plain.clone() };
                let mut report = case.run();
                cases += 1;
                if report.counts.kills + report.counts.power_cuts != 1 {
                    report.failure.get_or_insert_with(|| "the crash did not come, or not once".to_owned());
                }
                if report.failure.is_some() {
                    return (cases, Some((case, report)));
                }
            }
        }
    }
    (cases, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(letters: &[usize]) -> Vec<u64> {
        let case = Case { letters: letters.to_vec(), crash: (NEVER, false), seed: 1 };
        let (report, places) = run_for_calls(case.history());
        assert_eq!(report.failure, None);
        places
    }

    /// Goal: the places of a crash are those of the operations, not of what comes before or behind them.
    #[test]
    fn more_operations_have_more_places_for_a_crash() {
        let counts = [&[][..], &[0], &[0, 2], &[0, 2, 4], &[0, 2, 4, 6]].map(|letters| places(letters).len());
        // Calls that two operations make in one step share a place.
        assert!(counts.is_sorted() && counts[0] < counts[1] && counts[2] < counts[4], "{counts:?}");
    }

    /// Goal: no place for a crash lies beyond the operations.
    /// Method: a crash at each step up to the last place comes, and one behind it never.
    #[test]
    fn the_last_place_is_the_last_step_that_can_crash() {
        let letters = vec![0, 2, 4, 6];
        let last = *places(&letters).last().expect("there are some");
        for step in (1..=last + 1).rev() {
            let case = Case { letters: letters.clone(), crash: (step, false), seed: 1 };
            let report = case.run();
            assert_eq!((report.failure, report.counts.kills), (None, u64::from(step <= last)), "{}", case.name());
        }
    }
}
