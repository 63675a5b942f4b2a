//! Promise: `reserve_duration` and `reserve_capacity` hold at every moment, also after `edit` made them smaller or larger.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cdp_tests::load::{Load, Plan};
use cdp_tests::now_ns;
use cdp_tests::oracle::Oracle;
use cdp_tests::process::{Agent, Interval, exit};

const SIZE: u64 = 8 << 20;
const SECOND: u64 = 1_000_000_000;

fn slow_load(agent: &Agent, oracle: &Arc<Mutex<Oracle>>, seed: u64) -> Load {
    let plan = Plan { connections: 1, depth: 1, sizes: vec![512, 4096], ..Plan::mixed(SIZE, seed) };
    Load::start(oracle, &agent.socket(), "demo", plan)
}

fn oldest(agent: &Agent) -> u64 {
    agent.coverage("demo").first().map_or(u64::MAX, |interval: &Interval| interval.start)
}

/// Waits for what must come; hangs are failures.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not happen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Goal: history is kept for the duration, and not for ever.
/// Method: write on and on; what is younger than the duration can always be viewed, and what is old goes.
#[test]
fn history_is_kept_for_its_duration_and_goes_after_it() {
    let agent = Agent::dev("8MiB", "2GiB");
    let oracle = Arc::new(Mutex::new(Oracle::new(3, SIZE)));
    let seconds = 4;
    agent.ctl(&["edit", "demo", "--reserve-duration", "4s"]);
    let load = slow_load(&agent, &oracle, 3);
    let first = now_ns();
    eventually("eviction by age", || {
        // The horizon is taken after the answer: it moves on while the agent is asked.
        let start = oldest(&agent);
        let horizon = now_ns().saturating_sub(seconds * SECOND).max(first);
        assert!(
            start <= horizon,
            "history younger than {seconds} s is gone: it starts {} ns too late",
            start - horizon
        );
        start > first + SECOND
    });
    // What is inside the window is exact, and what has left it is refused.
    let at = now_ns();
    let image = agent.view_image("demo", at);
    oracle.lock().unwrap().check_image(&image, at, at).unwrap();
    let refusal = agent.ctl_refused(&["view", "open", "demo", "--at", &first.to_string()], &["retained"]);
    assert_eq!(refusal.code, Some(exit::OUT_OF_COVERAGE));

    // Shorter: old history goes. Longer: nothing comes back, and from now on more is kept.
    agent.ctl(&["edit", "demo", "--reserve-duration", "1s"]);
    let edited = now_ns();
    eventually("eviction after a shorter duration", || oldest(&agent) > edited);
    agent.ctl(&["edit", "demo", "--reserve-duration", "1h"]);
    let start = oldest(&agent);
    load.wait_for(200);
    eventually("history longer than it was allowed before", || now_ns() > start + 3 * SECOND);
    assert_eq!(oldest(&agent), start, "with an hour to keep, nothing more has gone");
    load.stop();
    let image = agent.view_image("demo", start);
    oracle.lock().unwrap().check_image(&image, start, start).unwrap();
}

/// Goal: after `edit` made the capacity smaller, it holds at once; made larger, more history is kept.
#[test]
fn a_smaller_capacity_holds_at_once_and_a_larger_one_keeps_more() {
    let mut agent = Agent::dev("8MiB", "2GiB");
    let used = |agent: &Agent| agent.info("demo")["used_bytes"].as_u64().unwrap();
    let oracle = Arc::new(Mutex::new(Oracle::new(4, SIZE)));
    let write = |agent: &Agent, seed: u64, bytes: u64| {
        let sizes = vec![65536];
        let plan = Plan { sizes, writes_max: bytes / 65536, reads_percent: 0, ..Plan::mixed(SIZE, seed) };
        Load::start(&oracle, &agent.socket(), "demo", plan).finish();
    };
    agent.ctl(&["edit", "demo", "--reserve-capacity", "768MiB"]);
    write(&agent, 1, 700 << 20);
    let before = used(&agent);
    assert!(before > 400 << 20 && before <= 768 << 20, "{before} bytes used");
    let old_start = oldest(&agent);

    agent.ctl(&["edit", "demo", "--reserve-capacity", "256MiB"]);
    let after = used(&agent);
    assert!(after <= 256 << 20, "{after} bytes used at once after the edit to 256 MiB");
    assert!(oldest(&agent) > old_start);
    write(&agent, 2, 300 << 20);
    assert!(used(&agent) <= 256 << 20);
    let at = now_ns();
    let image = agent.view_image("demo", at);
    oracle.lock().unwrap().check_image(&image, at, at).unwrap();

    agent.ctl(&["edit", "demo", "--reserve-capacity", "1GiB"]);
    let start = oldest(&agent);
    write(&agent, 3, 300 << 20);
    assert_eq!(oldest(&agent), start, "there is room now: nothing goes");
    assert!(used(&agent) > 300 << 20);
    let refusal = agent.ctl_refused(&["edit", "demo", "--reserve-capacity", "3GiB"], &["reserve_capacity", "bytes"]);
    assert!(matches!(refusal.code, Some(exit::USAGE | exit::NO_SPACE | exit::REFUSED)), "{refusal}");
    assert_eq!(agent.info("demo")["reserve_capacity"].as_u64(), Some(1 << 30), "a refused edit changes nothing");
    agent.stop();
}

/// Goal: switching off and on leaves a gap that is never presented as history, and what came before stays exact.
#[test]
fn the_span_in_which_it_was_off_is_a_gap_and_the_history_before_it_stays() {
    let mut agent = Agent::dev("8MiB", "1GiB");
    let oracle = Arc::new(Mutex::new(Oracle::new(5, SIZE)));
    let write = |agent: &Agent, seed: u64| {
        let plan = Plan { writes_max: 300, sizes: vec![512, 4096, 65536], ..Plan::mixed(SIZE, seed) };
        Load::start(&oracle, &agent.socket(), "demo", plan).finish();
    };
    let check = |agent: &Agent, at: u64| {
        let image = agent.view_image("demo", at);
        oracle.lock().unwrap().check_image(&image, at, at).unwrap_or_else(|wrong| panic!("view at {at}: {wrong}"));
    };
    write(&agent, 1);
    let on = now_ns();
    agent.ctl(&["disable", "demo"]);
    agent.ctl(&["disable", "demo"]);
    let off_before = now_ns();
    write(&agent, 2);
    let off_after = now_ns();
    agent.kill();
    agent.start();
    agent.ctl(&["enable", "demo"]);
    agent.ctl(&["enable", "demo"]);
    write(&agent, 3);
    let again = now_ns();
    for at in [on, again] {
        check(&agent, at);
    }
    for at in [off_before, off_after] {
        let refusal = agent.ctl_refused(&["view", "open", "demo", "--at", &at.to_string()], &[]);
        assert_eq!(refusal.code, Some(exit::OUT_OF_COVERAGE), "{refusal}");
    }
    let coverage = agent.coverage("demo");
    assert_eq!(coverage.len(), 2, "{coverage:?}");
    assert!(coverage[0].contains(on) && coverage[1].contains(again));
    assert!(!coverage.iter().any(|interval| interval.contains(off_before) || interval.contains(off_after)));
    agent.stop();
}

/// Goal: `clean` of one log takes exactly that one: the oldest goes whole, one in the middle becomes thin and leaves every
/// older instant exact; `clean` of everything ends CDP for the volume and leaves its data.
#[test]
fn clean_takes_one_log_or_all_of_history_and_never_the_data() {
    let mut agent = Agent::dev("8MiB", "1GiB");
    let oracle = Arc::new(Mutex::new(Oracle::new(6, SIZE)));
    let mut instants = Vec::new();
    // Logs end at each switch, so there are several small ones.
    for seed in 0..4 {
        let plan = Plan { writes_max: 150, sizes: vec![512, 4096, 65536], ..Plan::mixed(SIZE, seed) };
        Load::start(&oracle, &agent.socket(), "demo", plan).finish();
        instants.push(now_ns());
        agent.ctl(&["disable", "demo"]);
        agent.ctl(&["enable", "demo"]);
    }
    let check = |agent: &Agent, at: u64| {
        let image = agent.view_image("demo", at);
        oracle.lock().unwrap().check_image(&image, at, at).unwrap_or_else(|wrong| panic!("view at {at}: {wrong}"));
    };
    let refused = |agent: &Agent, at: u64| {
        let refusal = agent.ctl_refused(&["view", "open", "demo", "--at", &at.to_string()], &[]);
        assert_eq!(refusal.code, Some(exit::OUT_OF_COVERAGE), "{refusal}");
    };
    let seq_of = |agent: &Agent, at: u64| {
        let info = agent.info("demo");
        let logs = info["cdp_info"].as_array().unwrap().clone();
        let inside = |log: &&serde_json::Value| {
            log["startTime"].as_u64().unwrap() <= at && log["endTime"].as_u64().is_none_or(|end| at <= end)
        };
        logs.iter().find(inside).unwrap_or_else(|| panic!("no log covers {at}: {info}"))["seq"].as_u64().unwrap()
    };
    let middle = seq_of(&agent, instants[2]);
    agent.ctl(&["clean", "demo", "--seq", &middle.to_string()]);
    refused(&agent, instants[2]);
    check(&agent, instants[0]);
    check(&agent, instants[1]);
    check(&agent, instants[3]);
    let oldest = seq_of(&agent, instants[0]);
    agent.ctl(&["clean", "demo", "--seq", &oldest.to_string()]);
    refused(&agent, instants[0]);
    check(&agent, instants[1]);
    check(&agent, instants[3]);
    let refusal = agent.ctl_refused(&["clean", "demo", "--seq", "123456789"], &["123456789"]);
    assert_eq!(refusal.code, Some(exit::NOT_FOUND));

    agent.kill();
    agent.start();
    refused(&agent, instants[0]);
    refused(&agent, instants[2]);
    check(&agent, instants[1]);
    check(&agent, instants[3]);

    let view = agent.open_view("demo", instants[3]);
    agent.ctl_refused(&["clean", "demo"], &["view"]);
    agent.close_view(&view);
    agent.ctl(&["clean", "demo"]);
    assert_eq!(agent.info("demo")["cdp_state"], "off");
    refused(&agent, instants[3]);
    let from = now_ns();
    oracle.lock().unwrap().check_image(&agent.live_image("demo"), from, now_ns()).expect("clean leaves the data");
    agent.ctl(&["enable", "demo"]);
    let plan = Plan { writes_max: 100, sizes: vec![4096], ..Plan::mixed(SIZE, 9) };
    Load::start(&oracle, &agent.socket(), "demo", plan).finish();
    check(&agent, now_ns());
    agent.stop();
}
