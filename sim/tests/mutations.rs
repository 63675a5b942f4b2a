//! Goal: a simulator that catches nothing proves nothing. Each deliberate fault of the engine must be found by a few seeds.
//! Runs with `cargo test -p cdp-sim --features mutations --test mutations`.
#![cfg(feature = "mutations")]

use std::time::Instant;

use cdp_journal::mutation::{Mutation, set};
use cdp_sim::run::run;
use cdp_sim::workload::generate;

/// The fault, what it breaks, and the profile that looks for it.
const FAULTS: [(Mutation, &str, &str); 20] = [
    (Mutation::AckBeforeAppend, "I1", "crash"),
    (Mutation::FlushWithoutSync, "I1", "crash"),
    (Mutation::FlushSyncEarly, "I1", "crash"),
    (Mutation::WatermarkEarly, "I1", "crash"),
    (Mutation::ViewExclusive, "I2", "views"),
    (Mutation::BeforeImageTwice, "I2", "crash"),
    (Mutation::TornTailAccepted, "I3", "crash"),
    (Mutation::ClockPastMark, "I3", "clock"),
    (Mutation::DestageBeforeSync, "I4", "crash"),
    (Mutation::BeforeImageSkipped, "I4", "views"),
    (Mutation::RevertNotDurable, "I5", "revert"),
    (Mutation::RevertNotRedirected, "I5", "revert"),
    (Mutation::UndecidedCounts, "I5", "group"),
    (Mutation::NoRecheck, "I6", "views"),
    (Mutation::PayloadUnchecked, "I7", "damage"),
    (Mutation::HoleAccepted, "I7", "damage"),
    (Mutation::ErrorToGuest, "I8", "cdp-fault"),
    (Mutation::DisabledSpanCovered, "I9", "switch"),
    (Mutation::BeforeImagesUncounted, "I10", "capacity"),
    (Mutation::ReuseEarly, "I2", "wrap"),
];

/// Most seeds tried for one fault.
const SEEDS_MAX: u64 = 6000;

#[test]
fn every_deliberate_fault_is_caught() {
    let mut missed = Vec::new();
    let only = std::env::var("MUTATION").ok();
    for (mutation, invariant, profile) in FAULTS {
        if only.as_ref().is_some_and(|only| *only != format!("{mutation:?}")) {
            continue;
        }
        let began = Instant::now();
        let caught = (0..SEEDS_MAX).find_map(|seed| {
            set(mutation);
            let report = run(generate(seed, profile, 60).expect("the profile exists"), false);
            set(Mutation::None);
            // The engine as it is must pass the same seed, or the fault was not what failed.
            let clean = || run(generate(seed, profile, 60).expect("the profile exists"), false).failure.is_none();
            report.failure.filter(|_| clean()).map(|failure| (seed, failure))
        });
        let seconds = began.elapsed().as_secs_f64();
        match caught {
            Some((seed, failure)) => {
                let words: String = failure.chars().take(100).collect();
                println!("{mutation:?} ({invariant}): {profile} seed {seed}, {seconds:.1} s: {words}");
            }
            None => {
                println!("{mutation:?} ({invariant}): not caught by {SEEDS_MAX} seeds of {profile}, {seconds:.1} s");
                missed.push(mutation);
            }
        }
    }
    assert_eq!(missed, []);
}
