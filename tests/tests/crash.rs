//! Promise: an acked write survives kill -9 at any moment, what a crash cut off never comes back, and no earlier view
//! changes (design I1, I2, I3).

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cdp_tests::load::{Load, Plan};
use cdp_tests::oracle::Oracle;
use cdp_tests::process::Agent;
use cdp_tests::{Rng, now_ns, rounds, seed};

const SIZE: u64 = 32 << 20;

fn hash(image: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    image.hash(&mut hasher);
    hasher.finish()
}

fn plan(seed: u64) -> Plan {
    Plan { sizes: vec![512, 1536, 4096, 4096, 8192, 16384, 65536], ..Plan::mixed(SIZE, seed) }
}

struct Crashes {
    agent: Agent,
    oracle: Arc<Mutex<Oracle>>,
    rng: Rng,
    /// Views that were looked at: instant and hash of the image.
    seen: Vec<(u64, u64)>,
}

impl Crashes {
    fn new(seed: u64, cdp_size: &str) -> Self {
        let agent = Agent::dev(&format!("{}MiB", SIZE >> 20), cdp_size);
        let oracle = Arc::new(Mutex::new(Oracle::new(seed, SIZE)));
        Crashes { agent, oracle, rng: Rng::new(seed), seen: Vec::new() }
    }

    /// Kills the agent, sometimes again while it recovers, and starts it.
    fn kill_and_start(&mut self) {
        self.agent.kill();
        while self.rng.percent(30) {
            self.agent.spawn();
            std::thread::sleep(Duration::from_millis(self.rng.below(60)));
            self.agent.kill();
        }
        self.agent.start();
    }

    /// Nothing is in flight: every acked write is there, and what is seen now is pinned for ever.
    fn check_live(&self, what: &str) {
        let mut oracle = self.oracle.lock().unwrap();
        oracle.cut();
        let from = now_ns();
        let image = self.agent.live_image("demo");
        oracle.settle(&image, from).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    }

    fn check_view(&mut self, at: u64) {
        let image = self.agent.view_image("demo", at);
        let checked = self.oracle.lock().unwrap().check_image(&image, at, at);
        checked.unwrap_or_else(|wrong| panic!("view at {at}: {wrong}"));
        self.seen.push((at, hash(&image)));
    }

    /// A view looked at earlier shows the same bytes.
    fn check_seen(&mut self) {
        let (at, expected) = self.rng.pick(&self.seen);
        assert_eq!(hash(&self.agent.view_image("demo", at)), expected, "the view at {at} has changed");
    }
}

/// Goal: no acked write is missing after a kill, and every earlier view stays exact.
/// Method: four connections with 16 requests in flight each; kill at a random moment; check the whole volume and views at
/// random instants of before, among them ones that were looked at before the kill.
#[test]
fn acked_writes_and_earlier_views_survive_every_kill() {
    let mut crashes = Crashes::new(seed(), "2GiB");
    for round in 0..rounds(20) {
        let begun = now_ns();
        let plan = plan(crashes.rng.number());
        let load = Load::start(&crashes.oracle, &crashes.agent.socket(), "demo", plan);
        load.wait_for(200 + crashes.rng.below(400));
        std::thread::sleep(Duration::from_micros(crashes.rng.below(20_000)));
        let killed = now_ns();
        crashes.agent.kill();
        load.stop();
        crashes.oracle.lock().unwrap().cut();
        while crashes.rng.percent(30) {
            crashes.agent.spawn();
            std::thread::sleep(Duration::from_millis(crashes.rng.below(60)));
            crashes.agent.kill();
        }
        crashes.agent.start();
        crashes.check_live(&format!("round {round}"));
        let at = begun + crashes.rng.below(killed - begun);
        crashes.check_view(at);
        crashes.check_seen();
    }
    for (at, expected) in crashes.seen.clone() {
        assert_eq!(hash(&crashes.agent.view_image("demo", at)), expected, "the view at {at} has changed");
    }
    crashes.agent.stop();
}

/// Goal: clients that reconnect go on, and nothing of theirs is lost, without any pause for the agent to settle.
/// Method: one load runs through all kills; its reads are checked as they come, the whole volume at the end.
#[test]
fn a_load_that_reconnects_loses_nothing_over_many_kills() {
    let mut crashes = Crashes::new(seed() + 1, "2GiB");
    let begun = now_ns();
    let plan = plan(crashes.rng.number());
    let connections = plan.connections as u64;
    let load = Load::start(&crashes.oracle, &crashes.agent.socket(), "demo", plan);
    let kills = rounds(5);
    for round in 0..=kills as u64 {
        // All of them are there, and there again after each kill.
        let end = Instant::now() + Duration::from_secs(60);
        while load.connects() < connections * (round + 1) {
            assert!(Instant::now() < end, "{} connections after {round} kills", load.connects());
            std::thread::sleep(Duration::from_millis(5));
        }
        load.wait_for(300);
        if round < kills as u64 {
            crashes.kill_and_start();
        }
    }
    load.stop();
    crashes.check_live("after the last kill");
    for _ in 0..6 {
        let at = begun + crashes.rng.below(now_ns() - begun);
        crashes.check_view(at);
    }
    crashes.agent.stop();
    // A clean stop leaves everything on the primary, where anybody can read it.
    let image = std::fs::read(crashes.agent.file("primary.img")).unwrap();
    let now = now_ns();
    crashes.oracle.lock().unwrap().check_image(&image, now, now).expect("the primary after a clean stop");
}
