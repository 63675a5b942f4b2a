//! Promise: any instant can be viewed and reverted to, exactly, through kills, wraps and reverts (design I2, I5).
//!
//! One connection writes one request after the other, so between two acks there is exactly one right state, and every
//! instant in between must show it.

use std::path::Path;
use std::process::Command;

use cdp_tests::nbd::Client;
use cdp_tests::oracle::Oracle;
use cdp_tests::process::{Agent, binaries};
use cdp_tests::{Rng, now_ns, rounds};

const SIZE: u64 = 24 << 20;

struct Run {
    agent: Agent,
    oracle: Oracle,
    rng: Rng,
    /// Instants between two operations.
    between: Vec<u64>,
}

impl Run {
    fn new(seed: u64, cdp_size: &str) -> Self {
        println!("seed {seed}, CDP disk of {cdp_size}");
        let agent = Agent::dev(&format!("{}MiB", SIZE >> 20), cdp_size);
        Run { agent, oracle: Oracle::new(seed, SIZE), rng: Rng::new(seed), between: Vec::new() }
    }

    fn write(&mut self, count: usize) {
        let mut client = self.agent.connect("demo");
        for _ in 0..count {
            self.write_one(&mut client);
            self.between.push(now_ns());
        }
        client.close();
    }

    fn write_one(&mut self, client: &mut Client) {
        let rng = &mut self.rng;
        let len = rng.pick(&[512_u64, 1536, 4096, 4096, 4096, 8192, 65536, 262_144]);
        let span = if rng.percent(50) { SIZE / 16 } else { SIZE };
        let align = if len.is_multiple_of(4096) && rng.percent(75) { 4096 } else { 512 };
        let offset = rng.below((span - len) / align + 1) * align;
        let op = if rng.percent(5) {
            let op = self.oracle.begin_zeroes(offset, len);
            client.write_zeroes(offset, u32::try_from(len).unwrap(), 0).unwrap();
            op
        } else {
            let op = self.oracle.begin_write(offset, len);
            client.write(offset, &self.oracle.data(op)).unwrap();
            op
        };
        self.oracle.ack(op);
        if self.rng.percent(1) {
            client.flush().unwrap();
        }
    }

    fn check_live(&self, what: &str) {
        let from = now_ns();
        let image = self.agent.live_image("demo");
        self.oracle.check_image(&image, from, now_ns()).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    }

    fn check_view(&self, at: u64) -> Vec<u8> {
        let image = self.agent.view_image("demo", at);
        self.oracle.check_image(&image, at, at).unwrap_or_else(|wrong| panic!("view at {at}: {wrong}"));
        image
    }

    /// Checks views at `count` of the instants noted so far.
    fn check_views(&mut self, count: usize) {
        for _ in 0..count {
            let at = self.rng.pick(&self.between);
            self.check_view(at);
        }
    }

    fn revert(&mut self, to: u64) {
        let image = self.check_view(to);
        let submit = now_ns();
        self.agent.ctl(&["revert", "demo", "--at", &to.to_string()]);
        self.oracle.reverted(&image, to, submit);
        self.check_live("volume after the revert");
    }

    fn kill(&mut self) {
        self.agent.kill();
        self.agent.start();
        self.check_live("volume after kill -9");
    }
}

fn rewind(seed: u64, kill: bool) {
    let mut run = Run::new(seed, "1GiB");
    run.check_live("fresh volume");
    run.write(400);
    let mark = run.agent.ctl(&["mark", "demo", "--name", "halfway"]);
    let mark = mark["time"].as_u64().or_else(|| mark[0]["time"].as_u64()).expect("mark answers its time");
    if kill {
        run.kill();
    }
    run.write(400);
    run.check_views(5);
    let by_name = run.agent.open_view("demo", "halfway");
    assert_eq!(by_name.time, mark);
    run.agent.close_view(&by_name);
    let (first, before) = (run.between[run.between.len() / 3], now_ns());
    run.revert(first);
    if kill {
        run.kill();
    }
    run.write(100);
    run.check_view(before);
    run.check_view(first);
    run.revert(before);
    run.check_views(5);
    run.check_view(mark);
    let info = run.agent.info("demo");
    let names: Vec<&str> = info["snaps"].as_array().unwrap().iter().filter_map(|snap| snap["name"].as_str()).collect();
    assert!(names.contains(&"halfway"), "the user's marker is missing: {names:?}");
    assert!(names.iter().any(|name| name.starts_with("CDP-auto-")), "no automatic marker: {names:?}");
    run.agent.stop();
}

#[test]
fn any_instant_can_be_viewed_and_reverted_to() {
    for seed in 0..rounds(2) as u64 {
        rewind(100 + seed, false);
    }
}

#[test]
fn any_instant_can_be_viewed_and_reverted_to_through_kills() {
    for seed in 0..rounds(2) as u64 {
        rewind(200 + seed, true);
    }
}

/// Goal: on a CDP disk too small for all history, an evicted instant is refused in clear words, a retained one is exact.
/// Method: write several times the disk's size, then ask for instants on both sides of the coverage's start.
#[test]
fn on_a_small_cdp_disk_an_evicted_instant_is_refused_and_a_retained_one_is_exact() {
    for kill in [false, true] {
        let mut run = Run::new(300 + u64::from(kill), "192MiB");
        for part in 0..6 {
            run.write(3000);
            if kill && part % 2 == 1 {
                run.kill();
            }
        }
        let coverage = run.agent.coverage("demo");
        let covered = |at: u64| coverage.iter().any(|interval| interval.contains(at));
        let evicted: Vec<u64> = run.between.iter().copied().filter(|at| !covered(*at)).collect();
        let retained: Vec<u64> = run.between.iter().copied().filter(|at| covered(*at)).collect();
        assert!(!evicted.is_empty(), "nothing was evicted: the test wrote too little");
        assert!(retained.len() > 100, "only {} of {} instants are retained", retained.len(), run.between.len());
        for _ in 0..6 {
            let at = run.rng.pick(&evicted).to_string();
            run.agent.ctl_refused(&["view", "open", "demo", "--at", &at], &[&at, "retained"]);
            run.agent.ctl_refused(&["revert", "demo", "--at", &at], &[&at, "retained"]);
            let at = run.rng.pick(&retained);
            run.check_view(at);
        }
        run.check_view(retained[0]);
        run.check_live("volume at the end");
        run.revert(retained[retained.len() / 2]);
        run.agent.stop();
    }
}

/// The acceptance script of the project's owner, where it lies beside the repository.
#[test]
fn the_acceptance_script_agrees() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/accept/rewind.py");
    if !script.exists() {
        cdp_tests::skip(&format!("there is no {}", script.display()));
        return;
    }
    let mut failures = Vec::new();
    let soak = rounds(1) > 1;
    let seeds = if soak { 20 } else { 2 };
    for seed in 1..=seeds {
        for kill in [false, true] {
            let mut command = Command::new("python3");
            command.arg(&script).arg("--bin").arg(binaries()).args(["--seed", &seed.to_string()]);
            if kill {
                command.arg("--kill");
            }
            let output = command.output().expect("python3 runs (scripts/setup.sh installs it)");
            print!("{}", String::from_utf8_lossy(&output.stdout));
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                failures.push(format!("seed {seed}, kill {kill}: {text}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
