//! Promise: a revert is there when the call returns, holds through crashes, can be undone, and never pulls the volume from
//! under a guest that was not asked (design I5, part 8).

use cdp_tests::nbd::{Client, NbdError};
use cdp_tests::process::{Agent, exit};
use cdp_tests::{Rng, now_ns};

const SIZE: usize = 16 << 20;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    Rng::new(seed).fill(&mut out);
    out
}

/// A volume with a history: instants, each with the image that it must show.
struct History {
    agent: Agent,
    states: Vec<(u64, Vec<u8>)>,
    image: Vec<u8>,
}

impl History {
    fn new() -> Self {
        let agent = Agent::dev("16MiB", "2GiB");
        let mut history = Self { agent, states: Vec::new(), image: vec![0; SIZE] };
        history.note();
        for step in 0..5 {
            history.change(step);
        }
        history
    }

    fn note(&mut self) {
        self.states.push((now_ns(), self.image.clone()));
    }

    /// Writes all over the volume, big and small pieces.
    fn change(&mut self, seed: u64) {
        let mut rng = Rng::new(seed);
        let mut client = self.agent.connect("demo");
        for _ in 0..60 {
            let len = usize::try_from(rng.pick(&[512_u64, 4096, 8192, 65536, 1 << 20])).unwrap();
            let offset = usize::try_from(rng.below(((SIZE - len) / 512) as u64 + 1)).unwrap() * 512;
            let data = noise(rng.number(), len);
            client.write(offset as u64, &data).unwrap();
            self.image[offset..offset + len].copy_from_slice(&data);
        }
        client.close();
        self.note();
    }

    fn revert(&mut self, to: usize) {
        let (at, image) = self.states[to].clone();
        self.agent.ctl(&["revert", "demo", "--at", &at.to_string()]);
        self.image = image;
        self.check_live("at once after the revert");
        self.note();
    }

    fn check_live(&self, what: &str) {
        assert!(self.agent.live_image("demo") == self.image, "{what}: the volume differs");
    }

    fn check_all_views(&self, what: &str) {
        for (number, (at, image)) in self.states.iter().enumerate() {
            assert!(&self.agent.view_image("demo", *at) == image, "{what}: the view of state {number} differs");
        }
    }
}

#[test]
fn a_revert_can_be_reverted_to_any_side_of_it() {
    let mut history = History::new();
    history.revert(2); // back
    history.check_all_views("after one revert");
    history.revert(5); // to just before it: undo
    history.revert(3); // to before its target's age
    history.change(77);
    history.revert(0); // to the beginning: an empty volume
    history.revert(8);
    history.check_all_views("after many reverts");
    history.agent.stop();
    let primary = std::fs::read(history.agent.file("primary.img")).unwrap();
    assert!(primary == history.image, "after a clean stop the primary holds what the volume showed");
}

#[test]
fn a_revert_holds_through_a_kill_at_any_point_of_its_copying() {
    let mut history = History::new();
    let mut rng = Rng::new(5);
    for round in 0..6 {
        let to = usize::try_from(rng.below(history.states.len() as u64)).unwrap();
        history.revert(to);
        if round % 2 == 0 {
            // Writes on top of blocks that are not copied yet.
            history.change(100 + round);
        }
        std::thread::sleep(std::time::Duration::from_millis(rng.below(15)));
        history.agent.kill();
        history.agent.start();
        history.check_live(&format!("round {round}, after a kill"));
    }
    history.check_all_views("after kills during reverts");
    history.agent.ctl(&["revert", "demo", "--at", &history.states[1].0.to_string(), "--wait"]);
    assert!(history.agent.live_image("demo") == history.states[1].1);
    assert!(history.agent.info("demo")["revert"].is_null(), "--wait returns when nothing is left to copy");
    history.agent.stop();
}

#[test]
fn a_dry_run_tells_and_changes_nothing() {
    let history = History::new();
    let (at, _) = history.states[4];
    let answer = history.agent.ctl(&["revert", "demo", "--at", &at.to_string(), "--dry-run"]);
    assert_eq!(answer["dry_run"], true);
    let (blocks, bytes) = (answer["blocks"].as_u64().unwrap(), answer["bytes"].as_u64().unwrap());
    let old = &history.states[4].1;
    let differing = old.chunks(4096).zip(history.image.chunks(4096)).filter(|(a, b)| a != b).count() as u64;
    assert!(blocks >= differing, "{blocks} blocks announced, {differing} differ");
    assert!(blocks <= SIZE as u64 / 4096);
    assert_eq!(bytes, blocks * 4096);
    history.check_live("after a dry run");
    history.check_all_views("after a dry run");
}

/// Goal: a guest with the volume open is not reverted under its feet; with --force it is cut off and kept out, so that its
/// stale caches cannot reach the reverted volume, until the admin says so.
#[test]
fn an_open_volume_is_reverted_only_by_force_and_held_until_released() {
    let mut history = History::new();
    let at = history.states[2].0.to_string();
    let mut guest = history.agent.connect("demo");
    guest.write(0, &noise(1, 4096)).unwrap();
    history.image[..4096].copy_from_slice(&noise(1, 4096));
    history.note();
    let refusal = history.agent.ctl_refused(&["revert", "demo", "--at", &at], &["demo", "force"]);
    assert_eq!(refusal.code, Some(exit::REFUSED));
    assert!(guest.read(0, 4096).unwrap() == noise(1, 4096), "the refused revert has not touched the client");

    let answer = history.agent.ctl(&["revert", "demo", "--at", &at, "--force"]);
    assert_eq!(answer["held"], true, "{answer}");
    assert!(matches!(guest.write(0, &noise(2, 4096)), Err(NbdError::Io(_))), "the client was disconnected");
    assert!(Client::connect(&history.agent.socket(), "demo").is_err(), "nobody gets in while it is held");
    assert_eq!(history.agent.info("demo")["held"], true);
    // Held is held, also for a guest that outlasts a restart of the agent.
    history.agent.kill();
    history.agent.start_unserved();
    assert!(Client::connect(&history.agent.socket(), "demo").is_err(), "held after a restart too");
    history.agent.ctl(&["release", "demo"]);
    history.agent.ctl(&["release", "demo"]);
    history.image = history.states[2].1.clone();
    history.check_live("after the release");
    history.note();

    let mut guest = history.agent.connect("demo");
    guest.write(0, &noise(3, 4096)).unwrap();
    let answer = history.agent.ctl(&["revert", "demo", "--at", &at, "--force", "--release"]);
    assert_eq!(answer["held"], false, "{answer}");
    assert!(matches!(guest.read(0, 512), Err(NbdError::Io(_))));
    history.check_live("reverted by force and released at once");
    history.check_all_views("at the end");
}

#[test]
fn a_reader_of_a_view_does_not_stand_in_the_way_of_a_revert() {
    let mut history = History::new();
    let view = history.agent.open_view("demo", history.states[3].0);
    let mut reader = history.agent.connect(&view.id);
    history.revert(1);
    assert!(reader.read_all().unwrap() == history.states[3].1);
    history.agent.stop();
}
