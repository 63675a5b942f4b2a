//! Promise: any instant is a crash-consistent cut across all volumes of the host (design part 3, the clock).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cdp_tests::process::Agent;
use cdp_tests::{Rng, now_ns, rounds, seed};

const CHAINS: u64 = 6;
const SIZE: u64 = 8 << 20;

/// What the chains' blocks of an export hold.
fn counters(agent: &Agent, export: &str) -> Vec<u64> {
    let mut client = agent.connect(export);
    let read = |chain| {
        let block = client.read(chain * 65536, 4096).unwrap();
        assert!(block.chunks(8).all(|word| word == &block[..8]), "a torn block in {export}");
        u64::from_le_bytes(block[..8].try_into().unwrap())
    };
    let counters = (0..CHAINS).map(read).collect();
    client.close();
    counters
}

fn assert_cut(agent: &Agent, at: u64) -> Vec<u64> {
    // The dependent volume first or last: the order of opening must not matter.
    let second = agent.open_view("second", at);
    let first = agent.open_view("demo", at);
    let (a, b) = (counters(agent, &first.id), counters(agent, &second.id));
    for (chain, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!(a >= b, "at {at}, chain {chain}: B shows {b}, and A, written and acked before it, shows {a}");
        assert!(a - b <= 1, "at {at}, chain {chain}: A shows {a}, but its writer waited for B, which shows {b}");
    }
    agent.close_view(&first);
    agent.close_view(&second);
    a
}

/// Goal: a pair of views never shows B without A.
/// Method: chains that write a number to A, after its ack the same to B; views at random instants while they run, after
/// a kill, and all of it again.
#[test]
fn at_any_instant_two_volumes_show_dependent_writes_in_their_order() {
    let mut agent = Agent::dev_with(&["second"], SIZE, "1GiB");
    let mut rng = Rng::new(seed());
    let mut instants = Vec::new();
    let acked: Arc<Vec<AtomicU64>> = Arc::new((0..CHAINS).map(|_| AtomicU64::new(0)).collect());
    for _ in 0..rounds(2) {
        let stop = Arc::new(AtomicBool::new(false));
        let chains: Vec<_> = (0..CHAINS)
            .map(|chain| {
                let (stop, acked) = (Arc::clone(&stop), Arc::clone(&acked));
                let (mut a, mut b) = (agent.connect("demo"), agent.connect("second"));
                std::thread::spawn(move || {
                    let mut number = acked[chain as usize].load(Ordering::SeqCst);
                    while !stop.load(Ordering::Relaxed) {
                        number += 1;
                        let block = number.to_le_bytes().repeat(512);
                        if a.write(chain * 65536, &block).is_err() || b.write(chain * 65536, &block).is_err() {
                            return; // killed
                        }
                        acked[chain as usize].store(number, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let begun = now_ns();
        for _ in 0..15 {
            let at = now_ns();
            let floor: Vec<u64> = acked.iter().map(|number| number.load(Ordering::SeqCst)).collect();
            let now = now_ns();
            let shown = assert_cut(&agent, now);
            assert!(
                shown.iter().zip(&floor).all(|(shown, floor)| shown >= floor),
                "acked before {at}: {floor:?}, shown {shown:?}"
            );
            instants.push(now);
        }
        let ended = now_ns();
        agent.kill();
        stop.store(true, Ordering::Relaxed);
        for chain in chains {
            chain.join().unwrap();
        }
        agent.start();
        // A write to A may have been cut off before its B; start level again, above everything before.
        let (a, b) = (counters(&agent, "demo"), counters(&agent, "second"));
        for chain in 0..CHAINS as usize {
            let floor = acked[chain].load(Ordering::SeqCst);
            assert!(
                a[chain] >= b[chain] && b[chain] >= floor,
                "chain {chain}: A {}, B {}, acked {floor}",
                a[chain],
                b[chain]
            );
        }
        let (mut first, mut second) = (agent.connect("demo"), agent.connect("second"));
        for (chain, &number) in (0..CHAINS).zip(&a) {
            let block = number.to_le_bytes().repeat(512);
            first.write(chain * 65536, &block).unwrap();
            second.write(chain * 65536, &block).unwrap();
            acked[chain as usize].store(number, Ordering::SeqCst);
        }
        for _ in 0..15 {
            instants.push(begun + rng.below(ended - begun));
        }
        for &at in &instants {
            assert_cut(&agent, at);
        }
    }
    agent.stop();
}

/// Goal: one marker, one instant for all its volumes; a revert of the group takes all members to it.
#[test]
fn a_marker_and_a_revert_of_a_group_are_one_instant_for_all_members() {
    let mut agent = Agent::dev_with(&["second"], SIZE, "1GiB");
    let put = |agent: &Agent, number: u64| {
        for export in ["demo", "second"] {
            let mut client = agent.connect(export);
            for chain in 0..CHAINS {
                client.write(chain * 65536, &number.to_le_bytes().repeat(512)).unwrap();
            }
            client.close();
        }
    };
    put(&agent, 1);
    agent.ctl(&["mark", "demo", "second", "--name", "both"]);
    put(&agent, 2);
    let time = |volume: &str| {
        let info = agent.info(volume);
        let snaps = info["snaps"].as_array().unwrap().clone();
        snaps.iter().find(|snap| snap["name"] == "both").and_then(|snap| snap["time"].as_u64()).expect("the marker")
    };
    assert_eq!(time("demo"), time("second"));
    let before = now_ns();
    agent.ctl(&["revert", "demo", "second", "--at", &time("demo").to_string()]);
    assert_eq!(counters(&agent, "demo"), vec![1; CHAINS as usize]);
    assert_eq!(counters(&agent, "second"), vec![1; CHAINS as usize]);
    agent.kill();
    agent.start();
    assert_eq!(counters(&agent, "demo"), vec![1; CHAINS as usize]);
    assert_eq!(counters(&agent, "second"), vec![1; CHAINS as usize]);
    agent.ctl(&["revert", "demo", "second", "--at", &before.to_string()]);
    assert_eq!(counters(&agent, "demo"), vec![2; CHAINS as usize]);
    assert_eq!(counters(&agent, "second"), vec![2; CHAINS as usize]);
    agent.stop();
}
