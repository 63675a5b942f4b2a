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
    orphaned_with(seed, CONFIG, false)
}

/// The same; `config` is what the agent starts with afterwards. `beside`: it has another CDP disk then, listed first, empty and with more room.
fn orphaned_with(seed: u64, config: &str, beside: bool) -> (Agent, Arc<Mutex<Oracle>>, Vec<u64>) {
    let mut agent = Agent::configured(CONFIG);
    agent.start_unserved();
    let (primary, cdp) = (agent.file("vm.img"), agent.file("cdp.img"));
    let (primary, cdp) = (primary.to_str().unwrap().to_owned(), cdp.to_str().unwrap().to_owned());
    agent.ctl(&["disk", "init", &cdp, "--size", "512MiB"]);
    agent.ctl(&["volume", "add", "demo", "--path", &primary, "--size", "8MiB", "--create", "--uuid", UUID]);
    agent.ctl(&["edit", "demo", "--reserve-capacity", "256MiB", "--reserve-duration", "1h"]);
    agent.ctl(&["enable", "demo"]);
    let other = agent.file("other.img");
    let other = other.to_str().unwrap();
    if beside {
        // Only now: with more room it would have had the journal.
        agent.ctl(&["disk", "init", other, "--size", "1GiB"]);
    }
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
    let first = if beside { format!("[[disk]]\npath = {other:?}\n") } else { String::new() };
    let more = format!(
        "{first}[[disk]]\npath = {cdp:?}\n[[volume]]\nname = \"demo\"\npath = {primary:?}\nuuid = \"{UUID}\"\n"
    );
    let config = config.replace("DIR", agent.dir().to_str().unwrap());
    fs::write(agent.file("config.toml"), format!("{config}{more}")).unwrap();
    agent.start_unserved();
    (agent, oracle, instants)
}

/// Goal: what an admin does for such a volume loses nothing. Until then it is not served.
fn attached_it_loses_nothing((mut agent, oracle, instants): (Agent, Arc<Mutex<Oracle>>, Vec<u64>)) {
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
fn a_journal_without_its_fence_is_attached_when_the_admin_says_so_and_loses_nothing() {
    attached_it_loses_nothing(orphaned(11));
}

/// Goal: a journal without its fence is found whichever shard its CDP disk is on: the volume is not served as one that never had a journal, which would lack
/// acked writes and say that all is well.
/// Method: two shards; the first disk, and so the first shard, is where a volume without a journal would go.
#[test]
fn a_journal_without_its_fence_is_found_on_the_disk_of_another_shard() {
    let orphan = orphaned_with(13, &format!("shards = 2\n{CONFIG}"), true);
    let events = orphan.0.ctl(&["events"]);
    let told = |event: &&serde_json::Value| event["kind"] == "needs_journal";
    let told = events["events"].as_array().unwrap().iter().filter(told).count();
    assert_eq!(told, 1, "looking for it is no event of its own: {events}");
    attached_it_loses_nothing(orphan);
}

/// Goal: with history of it on the disks of two shards, and no fence to tell which is the newest, a volume is refused in words that name both, be it
/// configured or added; with one of the disks it is served when the admin says so.
/// Method: a state directory that is lost twice, with another CDP disk each time.
#[test]
fn a_volume_with_history_on_two_shards_and_no_fence_is_refused_until_one_is_taken_out() {
    let mut agent = Agent::configured(CONFIG);
    let file = |name: &str| agent.file(name).to_str().unwrap().to_owned();
    let (primary, disks) = (file("vm.img"), [file("old.img"), file("new.img")]);
    for (byte, disk) in (1..).zip(&disks) {
        agent.start_unserved();
        agent.ctl(&["disk", "init", disk, "--size", "512MiB"]);
        agent.ctl(&["volume", "add", "demo", "--path", &primary, "--size", "8MiB", "--create", "--uuid", UUID]);
        agent.ctl(&["edit", "demo", "--reserve-capacity", "256MiB"]);
        agent.ctl(&["enable", "demo"]);
        let mut client = agent.connect("demo");
        client.write(0, &[byte; 4096]).unwrap();
        client.close();
        agent.kill();
        fs::remove_dir_all(agent.file("state")).unwrap();
    }
    let start = |agent: &mut Agent, disks: &[String], volume: &str| {
        let disks: String = disks.iter().map(|disk| format!("[[disk]]\npath = {disk:?}\n")).collect();
        let config = CONFIG.replace("DIR", agent.dir().to_str().unwrap());
        fs::write(agent.file("config.toml"), format!("shards = 2\n{config}{disks}{volume}")).unwrap();
        agent.start_unserved();
    };
    start(&mut agent, &disks, "");
    let add = ["volume", "add", "demo", "--path", &primary, "--uuid", UUID];
    agent.ctl_refused(&add, &[&disks[0], &disks[1], UUID, "shards"]);
    assert!(agent.ctl(&["volume", "list"])["list"].as_array().is_some_and(Vec::is_empty));
    agent.stop();
    let configured = format!("[[volume]]\nname = \"demo\"\npath = {primary:?}\nuuid = \"{UUID}\"\n");
    start(&mut agent, &disks, &configured);
    agent.ctl_refused(&["enable", "demo"], &[&disks[0], &disks[1], "not served"]);
    assert!(Client::connect(&agent.socket(), "demo").is_err(), "served without its newest writes");
    agent.stop();
    start(&mut agent, &disks[1..], &configured);
    assert_eq!(agent.info("demo")["health"], "needs_journal");
    agent.ctl(&["volume", "attach", "demo"]);
    assert!(agent.live_image("demo")[..4096] == [2; 4096], "the newest write is missing");
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
