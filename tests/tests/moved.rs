//! Promise: all that recovery needs, beside the fence, is on the CDP disk: with its primary it can move to another host, or outlive the state directory,
//! and an admin who says so gets the volume back with its history (design part 5, the fence).

use std::fs;
use std::sync::{Arc, Mutex};

use cdp_tests::load::{Load, Plan};
use cdp_tests::nbd::Client;
use cdp_tests::now_ns;
use cdp_tests::oracle::Oracle;
use cdp_tests::process::{Agent, CONFIG, exit};

const SIZE: u64 = 8 << 20;
const UUID: &str = "6f1c1e0a-3d5b-4d62-9d1e-6f3f1d0f7b11";

/// A volume with a history that was killed under load, whose state directory is lost then.
fn orphaned(seed: u64) -> (Agent, Arc<Mutex<Oracle>>, Vec<u64>) {
    let mut agent = Agent::configured(CONFIG);
    agent.start_unserved();
    let (primary, cdp) = (agent.file("vm.img"), agent.file("cdp.img"));
    let (primary, cdp) = (primary.to_str().unwrap().to_owned(), cdp.to_str().unwrap().to_owned());
    agent.ctl(&["disk", "init", &cdp, "--size", "512MiB"]);
    agent.ctl(&["volume", "add", "demo", "--path", &primary, "--size", "8MiB", "--create", "--uuid", UUID]);
    agent.ctl(&["edit", "demo", "--reserve-capacity", "256MiB", "--reserve-duration", "1h"]);
    agent.ctl(&["enable", "demo"]);
    let oracle = Arc::new(Mutex::new(Oracle::new(seed, SIZE)));
    let load = Load::start(&oracle, &agent.socket(), "demo", Plan::mixed(SIZE, seed));
    let mut instants = Vec::new();
    for _ in 0..4 {
        load.wait_for(150);
        instants.push(now_ns());
    }
    agent.kill();
    load.stop();
    oracle.lock().unwrap().cut();
    fs::remove_dir_all(agent.file("state")).unwrap();
    let more =
        format!("[[disk]]\npath = {cdp:?}\n[[volume]]\nname = \"demo\"\npath = {primary:?}\nuuid = \"{UUID}\"\n");
    let config = CONFIG.replace("DIR", agent.dir().to_str().unwrap());
    fs::write(agent.file("config.toml"), format!("{config}{more}")).unwrap();
    agent.start_unserved();
    (agent, oracle, instants)
}

#[test]
fn a_journal_without_its_fence_is_attached_when_the_admin_says_so_and_loses_nothing() {
    let (mut agent, oracle, instants) = orphaned(11);
    assert_eq!(agent.info("demo")["health"], "needs_journal");
    assert!(Client::connect(&agent.socket(), "demo").is_err(), "served without its newest writes");
    agent.ctl(&["volume", "attach", "demo"]);
    let info = agent.info("demo");
    assert_eq!((&info["health"], &info["cdp_state"]), (&"ok".into(), &"on".into()), "{info}");
    let from = now_ns();
    let mut oracle = Arc::into_inner(oracle).unwrap().into_inner().unwrap();
    oracle.settle(&agent.live_image("demo"), from).unwrap();
    for at in &instants {
        oracle.check_image(&agent.view_image("demo", *at), *at, *at).unwrap();
    }
    // It is this host's volume from now on, through a kill as well.
    agent.kill();
    agent.start();
    let from = now_ns();
    oracle.check_image(&agent.live_image("demo"), from, now_ns()).unwrap();
    for at in &instants {
        oracle.check_image(&agent.view_image("demo", *at), *at, *at).unwrap();
    }
    let refused = agent.ctl_refused(&["volume", "attach", "demo"], &["demo", "no history to attach"]);
    assert_eq!(refused.code, Some(exit::REFUSED));
}

#[test]
fn a_journal_without_its_fence_is_given_up_when_the_admin_says_so() {
    let (agent, _, instants) = orphaned(12);
    agent.ctl(&["volume", "override", "demo", "--accept", "needs_journal"]);
    assert_ne!(agent.info("demo")["health"], "needs_journal");
    agent.connect("demo").close();
    let at = instants[0].to_string();
    agent.ctl_refused(&["view", "open", "demo", "--at", &at], &[&at]);
}
