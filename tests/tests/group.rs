//! Promise: a revert of several volumes happens on all of them, at one instant, or on none, whenever the agent dies
//! (design part 5, the revert's group; `docs/decisions/0006`).

use std::time::Duration;

use cdp_tests::process::{Agent, exit};
use cdp_tests::{Rng, now_ns, rounds, seed};

const NAMES: [&str; 3] = ["demo", "second", "third"];
const SIZE: u64 = 4 << 20;

fn images(agent: &Agent) -> Vec<Vec<u8>> {
    NAMES.iter().map(|name| agent.live_image(name)).collect()
}

fn change(agent: &Agent, rng: &mut Rng) {
    for name in NAMES {
        let mut client = agent.connect(name);
        for _ in 0..20 {
            let mut block = vec![0; 4096 * usize::try_from(1 + rng.below(8)).unwrap()];
            rng.fill(&mut block);
            let last = (SIZE - block.len() as u64) / 4096;
            client.write(rng.below(last + 1) * 4096, &block).unwrap();
        }
        client.close();
    }
}

/// Goal: no kill leaves a part of the group reverted.
/// Method: kills at random moments of the call, from before it begins to after it has ended.
#[test]
fn a_kill_leaves_the_revert_of_a_group_on_all_volumes_or_on_none() {
    let mut agent = Agent::dev_with(&NAMES[1..], SIZE, "2GiB");
    let mut rng = Rng::new(seed());
    let (mut happened, mut not) = (0, 0);
    for round in 0..rounds(16) {
        change(&agent, &mut rng);
        let (at, old) = (now_ns(), images(&agent));
        change(&agent, &mut rng);
        let new = images(&agent);
        // From well below the length of the call to well above it, on a fast machine as on a slow one.
        let most = 1 << (10 + rng.below(8));
        let delay = Duration::from_micros(rng.below(most));
        std::thread::scope(|scope| {
            let call = scope.spawn(|| {
                let mut args = vec!["revert"];
                args.extend(NAMES);
                let at = at.to_string();
                args.extend(["--at", &at]);
                agent.try_ctl(&args).is_ok()
            });
            std::thread::sleep(delay);
            agent.signal(nix::sys::signal::Signal::SIGKILL);
            let _ = call.join().unwrap(); // it may have been answered before
        });
        agent.kill();
        agent.start();
        let now = images(&agent);
        let reverted: Vec<bool> = now.iter().zip(&old).map(|(now, old)| now == old).collect();
        if reverted.contains(&true) {
            assert_eq!(reverted, [true; 3], "round {round}, killed after {delay:?}: a part of the group was reverted");
            happened += 1;
        } else {
            assert!(now == new, "round {round}, killed after {delay:?}: neither the old nor the new state");
            not += 1;
        }
    }
    println!("{happened} reverts happened, {not} did not");
    agent.stop();
}

#[test]
fn a_group_shows_one_instant_and_is_undone_by_it() {
    let agent = Agent::dev_with(&NAMES[1..], SIZE, "2GiB");
    let mut rng = Rng::new(7);
    change(&agent, &mut rng);
    let (at, old) = (now_ns(), images(&agent));
    change(&agent, &mut rng);
    let new = images(&agent);
    let answer = agent.ctl(&["revert", "demo", "second", "third", "--at", &at.to_string()]);
    let times: Vec<_> = answer["results"].as_array().unwrap().iter().map(|result| result["time"].clone()).collect();
    assert!(times.iter().all(|time| *time == times[0] && time.as_u64() > Some(at)), "{times:?}");
    assert!(images(&agent) == old, "every volume is as it was");
    let undo = (times[0].as_u64().unwrap() - 1).to_string();
    agent.ctl(&["revert", "demo", "second", "third", "--at", &undo]);
    assert!(images(&agent) == new, "every volume is as it was before the revert");
    agent.ctl(&["revert", "demo", "second", "third", "--undo"]);
    assert!(images(&agent) == old, "undone by one command");
    // Reverts of different calls are not undone together: that would be no instant of the group.
    agent.ctl(&["revert", "second", "--undo"]);
    agent.ctl_refused(&["revert", "demo", "second", "--undo"], &["not of one call", "second at"]);
}

/// Goal: views of a group have an owner and an end, as others have.
#[test]
fn views_of_a_group_have_an_owner_and_an_end() {
    let agent = Agent::dev_with(&NAMES[1..], SIZE, "2GiB");
    agent.ctl(&["view", "open", "demo", "second", "--at", "now", "--owner", "anna", "--ttl", "1h"]);
    let views = agent.ctl(&["view", "list"])["views"].as_array().unwrap().clone();
    assert_eq!(views.len(), 2);
    assert!(views.iter().all(|view| view["owner"] == "anna" && view["expires"].as_u64() > Some(0)), "{views:?}");
}

#[test]
fn one_volume_that_refuses_keeps_the_others_as_they_are_and_writable() {
    let agent = Agent::dev_with(&NAMES[1..], SIZE, "2GiB");
    let mut rng = Rng::new(8);
    change(&agent, &mut rng);
    let at = now_ns().to_string();
    change(&agent, &mut rng);
    let before = images(&agent);
    let guest = agent.connect("second");
    let refused = agent.ctl_refused(&["revert", "demo", "second", "third", "--at", &at], &["second", "for writing"]);
    assert_eq!(refused.code, Some(exit::REFUSED));
    guest.close();
    assert!(images(&agent) == before);
    change(&agent, &mut rng);
    agent.ctl(&["revert", "demo", "second", "third", "--at", &at]);
}

/// Goal: reverts of the same volumes at the same time, named in another order, all end.
#[test]
fn reverts_of_overlapping_groups_at_once_all_end() {
    let agent = Agent::dev_with(&NAMES[1..], SIZE, "2GiB");
    change(&agent, &mut Rng::new(seed()));
    let at = now_ns().to_string();
    let done = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for names in [["demo", "second"], ["second", "demo"], ["demo", "second"], ["second", "demo"]] {
            let (agent, at, done) = (&agent, &at, &done);
            scope.spawn(move || {
                for _ in 0..15 {
                    // It may be refused: another one is under way.
                    let _ = agent.try_ctl(&["--timeout", "60", "revert", names[0], names[1], "--at", at]);
                }
                done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            });
        }
    });
    assert_eq!(done.into_inner(), 4);
    for name in NAMES {
        assert_eq!(agent.info(name)["health"], "ok");
        agent.connect(name).close();
    }
}
