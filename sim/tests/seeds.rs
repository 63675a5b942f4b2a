//! The seeds that once found something stay fixed, and a seed fixes a history.

use std::ops::Range;

use cdp_sim::run::run;
use cdp_sim::workload::generate;
use cdp_sim::world::Counts;

/// Lines of `seeds.txt`: profile, seed, operations.
fn seeds() -> Vec<(String, u64, usize)> {
    let text = include_str!("../seeds.txt");
    text.lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|line| {
            let mut words = line.split_whitespace();
            let mut word = || words.next().unwrap_or_else(|| panic!("seeds.txt: {line:?}"));
            let (profile, seed, ops) = (word().to_owned(), word(), word());
            (profile, seed.parse().expect("a seed"), ops.parse().expect("a number of operations"))
        })
        .collect()
}

/// Goal: a bug that a seed found does not come back.
#[test]
fn every_seed_that_once_failed_passes() {
    for (profile, seed, ops) in seeds() {
        let history = generate(seed, &profile, ops).expect("the profile exists");
        let report = run(history, false);
        assert_eq!(report.failure, None, "profile {profile} seed {seed} ops {ops}");
    }
}

/// Goal: a printed seed replays its failure: all events of two runs are the same.
#[test]
fn the_same_seed_gives_the_same_hash_of_all_events() {
    for (profile, seed) in (0..24).map(|seed| ("all", seed)).chain((0..3).map(|seed| ("more", seed))) {
        let hash = || run(generate(seed, profile, 60).expect("a profile"), false).hash;
        assert_eq!(hash(), hash(), "{profile} seed {seed}");
    }
}

/// Runs a lot of histories, of which none may fail.
fn lot(profile: &str, seeds: Range<u64>) -> Counts {
    let mut all = Counts::default();
    for seed in seeds {
        let report = run(generate(seed, profile, 60).expect("a profile"), false);
        assert_eq!(report.failure, None, "cdp-sim --seed {seed} --profile {profile}");
        all.add(&report.counts);
    }
    all
}

/// The leasts are far below what the numbers are: nothing that a lot is to do may come to nothing.
fn at_least(leasts: &[(&str, u64, u64)]) {
    for (what, count, least) in leasts {
        assert!(count >= least, "{what}: only {count}");
    }
}

/// Goal: no violation in a first, small lot of histories of every kind that `all` takes, and all that they are to do is done in them.
#[test]
fn a_first_lot_of_histories_holds() {
    let all = lot("all", 1000..1240);
    at_least(&[
        ("histories with crashes", all.crashed, 120),
        ("kills", all.kills, 100),
        ("power cuts", all.power_cuts, 100),
        ("crashes in a start of another kind than the one before", all.turned, 1),
        ("clean stops", all.restarts, 240),
        ("reads", all.reads_checked, 2000),
        ("reads of views", all.views_checked, 2000),
        ("views refused", all.views_refused, 20),
        ("reverts", all.reverts, 100),
        ("evictions", all.evicted, 5),
        ("switches", all.switches, 200),
        ("edits", all.edits, 10),
        ("cleans", all.cleans, 20),
        ("resizes", all.resizes, 10),
        ("marks", all.marks, 100),
        ("writes into scratch", all.scratch_writes, 5),
        ("faults", all.faults, 50),
    ]);
}

/// Goal: a history of `ring` goes round its reservation: logs go for want of room, and what they held is used again, while views are open, reverts are asked for
/// and the agent dies.
#[test]
fn a_first_lot_of_rings_wraps() {
    const HISTORIES: u64 = 8;
    let all = lot("ring", 1000..1000 + HISTORIES);
    at_least(&[
        ("histories with a lap", all.wrapped, HISTORIES * 3 / 4),
        ("laps", all.laps, HISTORIES),
        ("logs that went to make room", all.made_room, HISTORIES * 4),
        ("histories with crashes", all.crashed, HISTORIES / 2),
        ("reads of views", all.views_checked, HISTORIES * 5),
        ("reverts", all.reverts, 2),
    ]);
}

/// Goal: a history of `discard` discards and zeroes, some of it reaches the primary when history goes, and views, reverts and crashes come between.
#[test]
fn a_first_lot_of_discards_reaches_the_primaries() {
    const HISTORIES: u64 = 24;
    let all = lot("discard", 1000..1000 + HISTORIES);
    at_least(&[
        ("discards", all.discards, HISTORIES * 4),
        ("zeroes", all.zeroes, HISTORIES * 2),
        ("discards that reached a primary", all.punches, HISTORIES / 2),
        ("histories with crashes", all.crashed, HISTORIES / 2),
        ("reads of views", all.views_checked, HISTORIES * 5),
        ("reverts", all.reverts, HISTORIES / 2),
    ]);
}

/// Goal: in a history of `admins` calls are under way beside others on the same volume, of all kinds.
#[test]
fn a_first_lot_of_calls_of_admins_overlaps() {
    const HISTORIES: u64 = 24;
    let all = lot("admins", 1000..1000 + HISTORIES);
    at_least(&[
        ("calls beside others", all.beside, HISTORIES),
        ("reverts", all.reverts, HISTORIES / 2),
        ("switches", all.switches, HISTORIES),
        ("edits", all.edits, HISTORIES / 4),
        ("cleans", all.cleans, HISTORIES / 4),
        ("histories with crashes", all.crashed, HISTORIES / 2),
    ]);
}
