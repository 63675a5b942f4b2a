//! Goal: a simulator that catches nothing proves nothing. Each deliberate fault of the engine must be found by a few seeds.
//! Runs with `cargo test -p cdp-sim --features mutations --test mutations`.
#![cfg(feature = "mutations")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use cdp_journal::mutation::{Mutation, set};
use cdp_sim::exhaust::{Bounds, check, sequences};
use cdp_sim::run::run;
use cdp_sim::shrink::{pick, shrink};
use cdp_sim::workload::{Action, History, Op, Setup, Then, generate};

/// The fault, what it breaks, the profile that looks for it, and a seed that found it when this was written.
const FAULTS: [(Mutation, &str, &str, u64); 28] = [
    (Mutation::AckBeforeAppend, "I1", "crash", 27),
    (Mutation::AckAheadOfEarlier, "I1", "crash", 399),
    (Mutation::FlushWithoutSync, "I1", "crash", 5),
    (Mutation::FlushSyncEarly, "I1", "crash", 176),
    (Mutation::SyncCoversAll, "I1", "crash", 0),
    (Mutation::WatermarkEarly, "I1", "crash", 5),
    (Mutation::ViewExclusive, "I2", "views", 0),
    (Mutation::CleanedUnderView, "I2", "overlap", 211_666),
    (Mutation::BeforeImageTwice, "I2", "crash", 0),
    (Mutation::HistoryForgotten, "I2", "crash", 0),
    (Mutation::TornTailAccepted, "I3", "crash", 13),
    (Mutation::ClockPastMark, "I3", "clock", 0),
    (Mutation::DestageBeforeSync, "I4", "crash", 40),
    (Mutation::BeforeImageSkipped, "I4", "views", 0),
    (Mutation::RevertNotDurable, "I5", "revert", 0),
    (Mutation::RevertNotRedirected, "I5", "revert", 0),
    (Mutation::RevertSealedInCompany, "I5", "rewrite", 7642),
    (Mutation::UndecidedCounts, "I5", "group", 18),
    (Mutation::NoRecheck, "I6", "views", 1),
    (Mutation::PayloadUnchecked, "I7", "damage", 2),
    (Mutation::HoleAccepted, "I7", "damage", 4),
    (Mutation::LastFramesUnmissed, "I7", "both-fault", 500_538),
    (Mutation::LossEndedEarly, "I5", "both-fault", 891),
    (Mutation::ErrorToGuest, "I8", "cdp-fault", 7),
    (Mutation::RecoveredBacklogDropped, "I8", "cdp-fault", 6829),
    (Mutation::DisabledSpanCovered, "I9", "switch", 0),
    (Mutation::BeforeImagesUncounted, "I10", "capacity", 1),
    (Mutation::ReuseEarly, "I2", "wrap", 1015),
];

/// Most seeds tried for one fault, when the known one does not find it any more.
const SEEDS_MAX: u64 = 8000;

/// A history made for one fault, where seeds seldom come to the point; else what the seed gives.
fn history(mutation: Mutation, profile: &str, seed: u64) -> History {
    let mut history = generate(seed, profile, 60).expect("the profile exists");
    if mutation == Mutation::BeforeImagesUncounted {
        // Each write is of blocks that were never touched, and gets the time to be sealed: half of all segments are before-images.
        let mib = |n: u64| Op {
            action: Action::Write { vol: 0, sector: n * 2048, count: 2048, fua: false },
            then: Then::Wait,
        };
        let sleep = Op { action: Action::Sleep { ns: 3_000_000_000 }, then: Then::Wait };
        history.ops = (0..24).flat_map(|n| [mib(n), sleep.clone()]).collect();
        history.setup = Setup {
            volumes: vec![24 * 2048],
            disks: vec![52],
            reserve_segments: 32,
            duration_s: 86400,
            backlog_bytes: 16 << 20,
            enabled: true,
            ..history.setup
        };
    }
    history
}

/// How the engine with the fault fails a seed that it passes without.
fn caught(mutation: Mutation, profile: &str, seed: u64) -> Option<String> {
    set(mutation);
    let report = run(history(mutation, profile, seed), false);
    set(Mutation::None);
    let failure = report.failure?;
    // The engine as it is must pass the same seed, or the fault was not what failed.
    run(history(mutation, profile, seed), false).failure.is_none().then_some(failure)
}

/// Goal: the exhaustion of short histories can fail, too.
/// Method: all sequences of two operations with a crash at every place, under one order of events, until one fails.
#[test]
fn the_exhaustion_catches_faults_that_need_no_long_history() {
    for mutation in [
        Mutation::AckBeforeAppend,
        Mutation::FlushWithoutSync,
        Mutation::WatermarkEarly,
        Mutation::BeforeImageTwice,
        Mutation::HistoryForgotten,
        Mutation::DestageBeforeSync,
        Mutation::RevertNotDurable,
    ] {
        set(mutation);
        let failed = (0..sequences(2)).find_map(|place| check(2, place, Bounds { stride: 1, seeds: 1, whole: 2 }).1);
        set(Mutation::None);
        let Some((case, report)) = failed else { panic!("{mutation:?}: no sequence of two operations fails") };
        let words: String = report.failure.unwrap_or_default().chars().take(200).collect();
        println!("{mutation:?}: {}: {words}", case.name());
        assert_eq!(case.run(false).failure, None, "{mutation:?}: {} fails without it, too", case.name());
    }
}

/// Goal: a shortened history fails in the same way, and what is printed of it replays that.
#[test]
fn a_shortened_history_fails_alike_and_replays() {
    let (mutation, profile, seed) = (Mutation::FlushWithoutSync, "crash", 5);
    let whole = history(mutation, profile, seed);
    set(mutation);
    let report = run(whole.clone(), false);
    let (keep, shorter) = shrink(&whole, &report);
    let again = run(pick(&whole, &keep), false);
    set(Mutation::None);
    assert!(report.failure.is_some() && keep.len() < whole.ops.len() / 2, "{keep:?} of {}", whole.ops.len());
    assert_eq!((&shorter.failure, shorter.hash), (&again.failure, again.hash), "{keep:?}");
    assert_eq!(run(pick(&whole, &keep), false).failure, None, "it fails without the fault, too: {keep:?}");
}

/// `MUTATION=Name` looks at one fault only, `SEARCH=1` for the first seed instead of the known one.
#[test]
fn every_deliberate_fault_is_caught() {
    let only = std::env::var("MUTATION").ok();
    let search = std::env::var_os("SEARCH").is_some();
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((mutation, invariant, profile, known)) = FAULTS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if only.as_ref().is_some_and(|only| *only != format!("{mutation:?}")) {
                        continue;
                    }
                    let began = Instant::now();
                    let first = (!search).then_some(*known);
                    let mut seeds = first.into_iter().chain(0..SEEDS_MAX);
                    let found = seeds.find_map(|seed| Some((seed, caught(*mutation, profile, seed)?)));
                    let seconds = began.elapsed().as_secs_f64();
                    match found {
                        Some((seed, failure)) => {
                            let words: String = failure.chars().take(400).collect();
                            println!("{mutation:?} ({invariant}): {profile} seed {seed}, {seconds:.1} s: {words}");
                        }
                        None => {
                            println!("{mutation:?} ({invariant}): not caught by {SEEDS_MAX} seeds of {profile}, {seconds:.1} s");
                            missed.lock().expect("no holder panics").push(*mutation);
                        }
                    }
                }
            });
        }
    });
    assert_eq!(*missed.lock().expect("no holder panics"), []);
}
