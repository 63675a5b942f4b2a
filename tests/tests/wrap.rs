//! Promise: the space taken never exceeds `reserve_capacity`, what `info` calls covered is exact and the rest is refused,
//! however often the ring wraps (design I9, I10).
//!
//! `cdpctl disk check` reads the disk offline with code of its own, counts segments and verifies every checksum.

use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::{Arc, Mutex};

use cdp_tests::load::{Load, Plan};
use cdp_tests::nbd::FLAG_NO_HOLE;
use cdp_tests::oracle::Oracle;
use cdp_tests::process::{Agent, binaries, exit};
use cdp_tests::{Rng, now_ns, seed};
use serde_json::Value;

const SIZE: u64 = 16 << 20;

struct Wrap {
    agent: Agent,
    oracle: Arc<Mutex<Oracle>>,
    capacity: u64,
    first: u64,
    rng: Rng,
}

impl Wrap {
    /// An agent whose volume has the least capacity that is allowed: the refusal of less names it.
    fn new(seed: u64) -> Self {
        let agent = Agent::dev("16MiB", "1GiB");
        let refusal = agent.ctl_refused(&["edit", "demo", "--reserve-capacity", "1"], &["reserve_capacity", "1"]);
        // Not just any number: the volume's uuid is in the answer, too.
        let least = refusal.said.split("at least ").nth(1).expect("the refusal names the least value");
        let capacity: u64 = least.split(' ').next().and_then(|word| word.parse().ok()).expect("a number of bytes");
        assert!(capacity < 1 << 30, "the least capacity would be {capacity}: {refusal}");
        let too_small = (capacity - 1).to_string();
        agent.ctl_refused(&["edit", "demo", "--reserve-capacity", &too_small], &["reserve_capacity"]);
        agent.ctl(&["edit", "demo", "--reserve-capacity", &capacity.to_string()]);
        println!("least capacity: {capacity}");
        let oracle = Arc::new(Mutex::new(Oracle::new(seed, SIZE)));
        Self { agent, oracle, capacity, first: now_ns(), rng: Rng::new(seed) }
    }

    fn load(&mut self, plan: Plan) {
        let seed = self.rng.number();
        let plan = Plan { reads_percent: 5, seed, ..plan };
        let load = Load::start(&self.oracle, &self.agent.socket(), "demo", plan);
        let (acked, bytes) = load.finish();
        println!("{acked} writes, {bytes} bytes");
        self.assert_bound_online();
    }

    fn assert_bound_online(&self) {
        let used = self.agent.info("demo")["used_bytes"].as_u64().unwrap();
        assert!(used <= self.capacity, "{used} bytes used of {}", self.capacity);
    }

    /// Stops the agent one way or the other, counts the segments offline, and starts it again.
    fn assert_bound_offline(&mut self, kill: bool) {
        if kill {
            self.agent.kill();
        } else {
            self.agent.stop();
        }
        let (used, segments) = check_disk(&self.agent);
        assert!(segments > 0, "nothing on the disk");
        assert!(used <= self.capacity, "kill {kill}: {used} bytes on the disk, {} allowed", self.capacity);
        self.agent.start();
        self.assert_bound_online();
    }

    /// Random instants of the whole run: covered ones are exact, the others are refused.
    fn check_coverage(&mut self, count: usize) {
        let coverage = self.agent.coverage("demo");
        let now = now_ns();
        let oldest = coverage.first().expect("some coverage").start;
        assert!(oldest > self.first, "nothing was evicted: the test wrote too little");
        let mut instants: Vec<u64> = (0..count).map(|_| self.first + self.rng.below(now - self.first)).collect();
        instants.extend((0..count).map(|_| oldest + self.rng.below(now - oldest)));
        instants.extend([oldest, oldest - 1]);
        let (mut exact, mut refused) = (0, 0);
        for at in instants {
            if coverage.iter().any(|interval| interval.contains(at)) {
                let image = self.agent.view_image("demo", at);
                let checked = self.oracle.lock().unwrap().check_image(&image, at, at);
                checked.unwrap_or_else(|wrong| panic!("view at {at}: {wrong}"));
                exact += 1;
            } else {
                let refusal = self.agent.ctl_refused(&["view", "open", "demo", "--at", &at.to_string()], &["retained"]);
                assert_eq!(refusal.code, Some(exit::OUT_OF_COVERAGE));
                refused += 1;
            }
        }
        assert!(exact > 0 && refused > 0, "{exact} exact, {refused} refused");
        let from = now_ns();
        let image = self.agent.live_image("demo");
        self.oracle.lock().unwrap().settle(&image, from).unwrap_or_else(|wrong| panic!("the volume: {wrong}"));
    }
}

/// Bytes and number of the segments that the offline check counts, after it found no fault.
fn check_disk(agent: &Agent) -> (u64, u64) {
    let output = Command::new(binaries().join("cdpctl"))
        .args(["--output", "json", "disk", "check"])
        .arg(agent.file("cdp.img"))
        .output()
        .expect("run cdpctl");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "disk check: {said}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&said).expect("JSON");
    let number = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("disk check tells no {name}: {report}"));
    (number("used_bytes"), number("segments_used"))
}

/// Goal: the bound holds, and history stays exact, over ten times the capacity in writes of all sizes.
#[test]
fn ten_times_the_capacity_in_mixed_writes_never_takes_more_than_the_capacity() {
    let mut wrap = Wrap::new(seed());
    for part in 0..5 {
        let bytes_mean = 13_000;
        let plan = Plan {
            sizes: vec![512, 1536, 4096, 4096, 8192, 65536],
            writes_max: 2 * wrap.capacity / bytes_mean,
            ..Plan::mixed(SIZE, 0)
        };
        wrap.load(plan);
        wrap.assert_bound_offline(part % 2 == 0);
    }
    wrap.check_coverage(4);
    wrap.agent.stop();
}

/// The same with 512-byte writes: each takes a padded frame or a share of one, and a before-image of 4 KiB.
#[test]
fn small_writes_never_take_more_than_the_capacity() {
    let mut wrap = Wrap::new(seed());
    for kill in [true, false] {
        // A write is charged with at least a sector and its share of a frame; 4 KiB on average is on the safe side.
        let plan = Plan { sizes: vec![512], depth: 32, writes_max: 5 * wrap.capacity / 4096, ..Plan::mixed(SIZE, 0) };
        wrap.load(plan);
        wrap.assert_bound_offline(kill);
    }
    wrap.check_coverage(3);
    wrap.agent.stop();
}

/// The same with writes of zeroes as large as the volume: no payload, but before-images of all that they overwrite.
#[test]
fn huge_writes_of_zeroes_never_take_more_than_the_capacity() {
    let mut wrap = Wrap::new(seed());
    let rounds = 10 * wrap.capacity / SIZE / 2;
    for round in 0..rounds {
        let mut client = wrap.agent.connect("demo");
        let mut oracle = wrap.oracle.lock().unwrap();
        for at in (0..SIZE).step_by(1 << 20) {
            let op = oracle.begin_write(at, 1 << 20);
            client.write(at, &oracle.data(op)).unwrap();
            oracle.ack(op);
        }
        let op = oracle.begin_zeroes(0, SIZE);
        let flags = if round % 2 == 0 { FLAG_NO_HOLE } else { 0 };
        client.write_zeroes(0, u32::try_from(SIZE).unwrap(), flags).unwrap();
        oracle.ack(op);
        drop(oracle);
        wrap.assert_bound_online();
        if round % 8 == 7 {
            wrap.assert_bound_offline(round % 16 == 7);
        }
    }
    wrap.assert_bound_offline(true);
    wrap.check_coverage(3);
    wrap.agent.stop();
}

/// Goal: a view whose history must go loses, in words; the guest and the bound never do.
#[test]
fn a_view_whose_log_must_go_loses_and_the_guest_does_not() {
    let mut wrap = Wrap::new(seed());
    wrap.load(Plan { writes_max: 200, ..Plan::mixed(SIZE, 0) });
    let at = now_ns();
    let view = wrap.agent.open_view("demo", at);
    let mut reader = wrap.agent.connect(&view.id);
    let image = reader.read_all().unwrap();
    wrap.oracle.lock().unwrap().check_image(&image, at, at).unwrap();
    let plan = Plan { sizes: vec![65536], writes_max: 3 * wrap.capacity / 65536, ..Plan::mixed(SIZE, 0) };
    wrap.load(plan);
    assert!(reader.read(0, 4096).is_err(), "the view's history is gone; nothing else may be shown for it");
    let listed = wrap.agent.ctl(&["view", "list"]);
    let lost = listed["views"].as_array().unwrap().iter().find(|entry| entry["id"] == view.id.as_str());
    assert!(lost.is_none_or(|entry| entry["lost"] != ""), "the list says so: {listed}");
    let events = wrap.agent.ctl(&["events", "demo", "--last", "1000"]);
    let kinds = events.to_string();
    assert!(kinds.contains("view_lost"), "an event says so: {events}");
    assert!(kinds.contains("evicted_early"), "and that history went early: {events}");
    wrap.check_coverage(2);
    wrap.agent.stop();
}

/// Goal: one flipped bit on the CDP disk is found offline, named, and told by the exit code; what is no CDP disk is no answer.
/// Method: look for the written bytes on the disk, flip a bit of them, check; put it back, check again.
#[test]
fn the_offline_check_finds_a_flipped_bit() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    let mut data = vec![0; 65536];
    Rng::new(42).fill(&mut data);
    let mut client = agent.connect("demo");
    client.write(4096, &data).unwrap();
    client.close();
    agent.stop();
    check_disk(&agent);

    let path = agent.file("cdp.img");
    let image = std::fs::read(&path).unwrap();
    let payload = image.chunks(4096).position(|block| block == &data[8192..12288]);
    let at = payload.expect("the journal holds what was written") as u64 * 4096 + 1234;
    let flip = || {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    };
    flip();
    let refusal = agent.ctl_refused(&["disk", "check", path.to_str().unwrap()], &["damage"]);
    assert_eq!(refusal.code, Some(exit::DAMAGE), "{refusal}");
    let report: Value = serde_json::from_str(&refusal.said).expect("JSON");
    assert_eq!(report["sound"], false, "{report}");
    assert_ne!(report["damage"], 0, "{report}");
    flip();
    check_disk(&agent);

    let refusal =
        agent.ctl_refused(&["disk", "check", agent.file("primary.img").to_str().unwrap()], &["not a CDP disk"]);
    assert_eq!(refusal.code, Some(exit::FAILED), "{refusal}");
}
