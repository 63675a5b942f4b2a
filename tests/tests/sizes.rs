//! Promise: a volume may be as small as 1 MiB, as large as 16 TiB (sparse), and of any number of sectors; memory does not grow with its size.

use std::fs::File;
use std::path::Path;

use cdp_tests::nbd::Client;
use cdp_tests::process::Agent;
use cdp_tests::{Rng, now_ns};

const TIB: u64 = 1 << 40;

/// An agent with a second volume on a sparse file of `size` bytes in `folder`.
fn agent_with(path: &Path, size: u64) -> Agent {
    File::create(path).unwrap().set_len(size).unwrap();
    let agent = Agent::dev("1MiB", "4GiB");
    agent.ctl(&["edit", "demo", "--reserve-capacity", "300MiB"]);
    agent.ctl(&["volume", "add", "sized", "--path", path.to_str().unwrap()]);
    agent.ctl(&["edit", "sized", "--reserve-capacity", "3GiB", "--reserve-duration", "1h"]);
    agent.ctl(&["enable", "sized"]);
    assert_eq!(agent.info("sized")["size"], size);
    agent
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    Rng::new(seed).fill(&mut out);
    out
}

fn assert_pieces(client: &mut Client, pieces: &[(u64, Vec<u8>)], what: &str) {
    for (offset, bytes) in pieces {
        assert!(client.read(*offset, bytes.len() as u32).unwrap() == *bytes, "{what}: at {offset}");
    }
}

/// Resident memory of the agent, bytes.
fn resident(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn sixteen_tebibytes_are_protected_viewed_and_reverted_in_bounded_memory() {
    // Only a file system in memory takes a file of this size everywhere.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut agent = agent_with(&folder.path().join("sized.img"), 16 * TIB);
    let places = [0, 4 * TIB - 4096, 8 * TIB + 512, 16 * TIB - 65536];
    let first: Vec<_> = places.iter().map(|at| (*at, noise(*at, 65536))).collect();
    let second: Vec<_> = places.iter().map(|at| (*at, noise(*at + 1, 65536))).collect();
    let mut client = agent.connect("sized");
    for (offset, bytes) in &first {
        client.write(*offset, bytes).unwrap();
    }
    let at = now_ns();
    for (offset, bytes) in &second {
        client.write(*offset, bytes).unwrap();
    }
    // Zeroes over a gibibyte. Each of its blocks is charged a before-image, a hole or not, and a revert over them must find that room.
    client.write_zeroes(8 * TIB, 1 << 30, 0).unwrap();
    assert!(client.read(8 * TIB + 512, 65536).unwrap().iter().all(|byte| *byte == 0));
    client.close();
    agent.kill();
    agent.start();
    let view = agent.open_view("sized", at);
    assert_pieces(&mut agent.connect(&view.id), &first, "the view, after a kill");
    agent.close_view(&view);
    let revert = agent.ctl(&["revert", "sized", "--at", &at.to_string(), "--wait"]);
    assert_pieces(&mut agent.connect("sized"), &first, "after the revert");
    let undo = (revert["results"][0]["time"].as_u64().unwrap() - 1).to_string();
    agent.ctl(&["revert", "sized", "--at", &undo, "--wait"]);
    let mut client = agent.connect("sized");
    assert!(client.read(8 * TIB + 512, 65536).unwrap().iter().all(|byte| *byte == 0), "after it was undone");
    assert_pieces(&mut client, &second[..2], "after it was undone");
    client.close();
    assert!(resident(&agent) < 512 << 20, "{} bytes of memory", resident(&agent));
    agent.stop();
}

#[test]
fn a_volume_that_ends_within_a_block_is_exact_to_its_last_sector() {
    for size in [1_u64 << 20, (1 << 20) + 512, (1 << 20) + 7 * 512] {
        let folder = cdp_tests::process::scratch();
        let path = folder.path().join("sized.img");
        let mut agent = agent_with(&path, size);
        let mut image = noise(size, size as usize);
        let mut client = agent.connect("sized");
        client.write(0, &image).unwrap();
        let (at, old) = (now_ns(), image.clone());
        let tail = noise(size + 1, 1024);
        let begin = size as usize - tail.len();
        image[begin..].copy_from_slice(&tail);
        client.write(begin as u64, &tail).unwrap();
        assert!(client.write(size - 512, &[0; 1024]).is_err(), "past the end");
        client.close();
        assert!(agent.view_image("sized", at) == old, "{size} bytes: the view");
        agent.kill();
        agent.start();
        assert!(agent.live_image("sized") == image, "{size} bytes: after a kill");
        agent.ctl(&["revert", "sized", "--at", &at.to_string(), "--wait"]);
        agent.stop();
        assert!(std::fs::read(&path).unwrap() == old, "{size} bytes: the primary after a revert and a stop");
    }
}

/// Goal: a volume that grows under its agent holds what is written into the new space: live, once it is destaged, after a kill and on the bare primary; older
/// views keep their size.
#[test]
fn a_volume_that_is_grown_in_service_keeps_what_is_written_into_the_new_space() {
    const OLD: u64 = 2 << 20;
    const NEW: u64 = 5 << 20;
    let folder = cdp_tests::process::scratch();
    let path = folder.path().join("sized.img");
    let mut agent = agent_with(&path, OLD);
    let mut client = agent.connect("sized");
    client.write(OLD - 4096, &noise(1, 4096)).unwrap();
    let before = now_ns();
    client.close();
    File::options().write(true).open(&path).unwrap().set_len(NEW).unwrap();
    agent.ctl(&["volume", "resize", "sized"]);
    assert_eq!(agent.info("sized")["size"], NEW);
    let pieces = [(OLD - 4096, noise(2, 8192)), (3 << 20, noise(3, 65536)), (NEW - 4096, noise(4, 4096))];
    let mut client = agent.connect("sized");
    for (offset, bytes) in &pieces {
        client.write(*offset, bytes).unwrap();
    }
    client.flush().unwrap();
    assert_pieces(&mut client, &pieces, "at once");
    let begun = std::time::Instant::now();
    while agent.info("sized")["backlog_bytes"] != 0 {
        assert!(begun.elapsed().as_secs() < 60, "nothing is destaged: {}", agent.info("sized"));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_pieces(&mut client, &pieces, "once it is destaged");
    client.close();
    assert_eq!(agent.view_image("sized", before).len() as u64, OLD);
    agent.kill();
    agent.start();
    assert_pieces(&mut agent.connect("sized"), &pieces, "after a kill");
    agent.stop();
    let image = std::fs::read(&path).unwrap();
    for (offset, bytes) in &pieces {
        assert!(image[*offset as usize..][..bytes.len()] == bytes[..], "the primary at {offset}");
    }
}
