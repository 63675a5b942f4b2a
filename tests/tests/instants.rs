//! Promise: the right instant is found, named, and gone back to: flush-clean instants, undo, groups, marks, the time line.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use cdp_tests::process::{Agent, binaries, exit};
use cdp_tests::{now_ns, tools};
use serde_json::Value;

const SIZE: u64 = 16 << 20;

fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(512)
}

fn number(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at * 4096..at * 4096 + 8].try_into().unwrap())
}

fn around(agent: &Agent, at: u64) -> Value {
    agent.ctl(&["info", "demo", "--at", &at.to_string()])["around"]["results"][0].clone()
}

/// Goal: for any instant the agent tells the flush-clean instants next to it, also behind rotations, a kill, and a restart.
/// Method: numbered writes, a flush after each tenth; between two flushes the answer can only lie between the acks of one flush
/// and of the next write; a view at the instant shows the tenth write and not the one after.
#[test]
fn flush_clean_instants_are_found_through_rotation_and_restart() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let mut flushes: Vec<(u64, u64, u64)> = Vec::new();
    let mut written = 0;
    for round in 0..6 {
        let mut client = agent.connect("demo");
        for _ in 0..10 {
            for _ in 0..10 {
                written += 1;
                client.write(0, &block(written)).unwrap();
            }
            let before = now_ns();
            client.flush().unwrap();
            flushes.push((written, before, now_ns()));
        }
        client.close();
        match round {
            // A new log, without a rotation by size: the switch off and on again would make a gap, a revert to now does not.
            1 => drop(agent.ctl(&["revert", "demo", "--at", "now"])),
            2 => {
                agent.stop();
                agent.start();
            }
            4 => {
                // So that the newest flush point has travelled.
                let mut client = agent.connect("demo");
                client.write(4096, &block(7)).unwrap();
                client.close();
                agent.kill();
                agent.start();
            }
            _ => {}
        }
    }
    for (place, (written, before, after)) in flushes.iter().enumerate() {
        let found = around(&agent, *after);
        let flush = found["flush_before"].as_u64().unwrap_or_else(|| panic!("flush {place}: {found}"));
        assert!((*before..=*after).contains(&flush), "flush {place}: {flush} is not in {before}..={after}");
        assert_eq!(number(&agent.view_image("demo", flush), 0), *written, "flush {place}");
        // One nanosecond before it, it is the one that comes after.
        let found = around(&agent, flush - 1);
        assert_eq!(found["flush_after"].as_u64(), Some(flush), "{found}");
        if let Some((_, before, after)) = place.checked_sub(1).map(|place| flushes[place]) {
            let earlier = found["flush_before"].as_u64().expect("there was one before");
            assert!((before..=after).contains(&earlier), "{earlier} is not in {before}..={after}");
        }
        // Everywhere an instant is taken, so is this one.
        if place % 20 == 0 {
            let view = agent.open_view("demo", format!("flush-before:{after}"));
            assert_eq!(view.time, flush);
            agent.close_view(&view);
        }
    }
    let info = agent.info("demo");
    let newest = info["flush_clean"].as_u64().expect("the newest one");
    assert!(newest >= flushes.last().unwrap().1);
    agent.ctl_refused(&["view", "open", "demo", "--at", "flush-before:1000"], &["flush-clean"]);
    // A time line counts them from the disk, not from what memory happens to hold.
    let timeline = agent.ctl(&["timeline", "demo"]);
    let counted: u64 =
        timeline["buckets"].as_array().unwrap().iter().map(|b| b["flushes_clean"].as_u64().unwrap()).sum();
    assert!(counted >= flushes.len() as u64, "{counted} of {}", flushes.len());
    agent.stop();
}

/// Goal: a revert is undone by one command, and so is the undoing; a restart in between changes nothing.
#[test]
fn undo_takes_back_the_newest_revert_and_undoes_itself() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    agent.ctl_refused(&["revert", "demo", "--undo"], &["revert to undo"]);
    agent.ctl_refused(&["revert", "demo", "--undo", "--at", "now"], &["cannot be used with"]);
    let put = |agent: &Agent, number: u64| {
        let mut client = agent.connect("demo");
        client.write(0, &block(number)).unwrap();
        client.close();
    };
    let shown = |agent: &Agent| number(&agent.live_image("demo"), 0);
    put(&agent, 1);
    let first = now_ns();
    put(&agent, 2);
    agent.ctl(&["revert", "demo", "--at", &first.to_string(), "--wait"]);
    assert_eq!(shown(&agent), 1);
    let dry = agent.ctl(&["revert", "demo", "--undo", "--dry-run"]);
    assert_eq!(dry["blocks"], 1);
    agent.kill();
    agent.start();
    agent.ctl(&["revert", "demo", "--undo"]);
    assert_eq!(shown(&agent), 2);
    agent.ctl(&["revert", "demo", "--undo"]);
    assert_eq!(shown(&agent), 1);
    agent.stop();
    agent.start();
    // All of them are told, with what each went back to, also after a restart.
    let reverts = agent.info("demo")["reverts"].as_array().unwrap().clone();
    assert_eq!(reverts.len(), 3, "{reverts:?}");
    assert_eq!(reverts[0]["target"], first);
    assert_eq!(reverts[1]["target"].as_u64(), reverts[0]["undo_time"].as_u64());
    assert_eq!(reverts[2]["target"].as_u64(), reverts[1]["undo_time"].as_u64());
    let timeline = agent.ctl(&["timeline", "demo"]);
    assert_eq!(timeline["reverts"].as_array().unwrap().len(), 3);
    agent.stop();
}

/// Goal: a group is one name for its volumes everywhere: one instant, all views or none, one revert, one undo.
#[test]
fn a_group_is_marked_viewed_and_reverted_as_one() {
    let mut agent = Agent::dev_with(&["second"], SIZE, "1GiB");
    agent.ctl_refused(&["group", "add", "demo", "second"], &["demo", "already exists"]);
    agent.ctl_refused(&["group", "add", "vm", "demo", "nowhere"], &["nowhere", "not found"]);
    agent.ctl(&["group", "add", "vm", "demo", "second"]);
    agent.ctl(&["group", "add", "vm", "demo", "second"]);
    agent.ctl_refused(&["group", "add", "vm", "demo"], &["vm", "already exists"]);
    agent.ctl_refused(&["volume", "add", "vm", "--path", "/dev/null"], &["vm", "already exists"]);
    agent.ctl_refused(&["volume", "remove", "second"], &["group", "vm"]);
    agent.ctl_refused(&["mark", "vm", "second"], &["once"]);
    let put = |agent: &Agent, number: u64| {
        for export in ["demo", "second"] {
            let mut client = agent.connect(export);
            client.write(0, &block(number)).unwrap();
            client.flush().unwrap();
            client.close();
        }
    };
    let shown = |agent: &Agent| ["demo", "second"].map(|volume| number(&agent.live_image(volume), 0));
    put(&agent, 1);
    // Marks without a name in one second: each is its own instant, and the same in both volumes.
    let marks: Vec<Value> = (0..3).map(|_| agent.ctl(&["mark", "vm"])).collect();
    for mark in &marks {
        let times: Vec<_> =
            mark["results"].as_array().unwrap().iter().map(|one| one["time"].as_u64().unwrap()).collect();
        assert_eq!(times, [mark["time"].as_u64().unwrap(); 2], "{mark}");
        assert!(mark["name"].as_str().unwrap().starts_with("CDP-auto-"), "{mark}");
        assert!(
            mark["results"].as_array().unwrap().iter().all(|one| one["kind"] == "flush"),
            "flushed, nothing since: {mark}"
        );
    }
    assert!(
        marks[0]["time"].as_u64() < marks[1]["time"].as_u64() && marks[1]["time"].as_u64() < marks[2]["time"].as_u64()
    );
    agent.kill();
    agent.start();
    let listed = agent.ctl(&["group", "list"]);
    assert_eq!(listed["groups"][0]["volumes"], serde_json::json!(["demo", "second"]));
    put(&agent, 2);
    let at = marks[1]["name"].as_str().unwrap();
    let opened = agent.ctl(&["view", "open", "vm", "--at", at]);
    let views = opened["views"].as_array().unwrap();
    assert_eq!((views.len(), opened["time"].as_u64()), (2, marks[1]["time"].as_u64()));
    for view in views {
        let mut client = agent.connect(view["id"].as_str().unwrap());
        assert_eq!(client.read(0, 512).unwrap()[..1], [1]);
        client.close();
    }
    // The same, named one by one: the same views.
    let again = agent.ctl(&["view", "open", "demo", "second", "--at", &opened["time"].to_string()]);
    assert_eq!(again["views"][0]["id"], views[0]["id"]);
    for view in views {
        agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
    }
    // A member that has no history then: none appears.
    let early = agent.coverage("demo")[0].start;
    assert!(agent.coverage("second")[0].start > early);
    agent.ctl_refused(&["view", "open", "vm", "--at", &(early + 1).to_string()], &["outside"]);
    assert_eq!(agent.ctl(&["view", "list"])["views"].as_array().unwrap().len(), 0, "no half of a group is left open");
    // An instant that is flush-clean in both: each volume's second write was flushed before the other's.
    let both = agent.ctl(&["view", "open", "vm", "--at", "flush-before:now"]);
    for view in both["views"].as_array().unwrap() {
        agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
    }
    agent.ctl(&["revert", "vm", "--at", at]);
    assert_eq!(shown(&agent), [1, 1]);
    agent.ctl(&["revert", "vm", "--undo"]);
    assert_eq!(shown(&agent), [2, 2]);
    agent.ctl(&["group", "remove", "vm"]);
    let refused = agent.ctl_refused(&["group", "remove", "vm"], &["vm", "not found"]);
    assert_eq!(refused.code, Some(exit::NOT_FOUND));
    agent.ctl_refused(&["mark", "vm", "--name", "x"], &["vm"]);
    agent.stop();
}

/// A QEMU guest agent on a socket, as far as freezing goes: it notes what it was asked.
fn guest_agent(path: &Path) -> Arc<Mutex<Vec<String>>> {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let listener = UnixListener::bind(path).unwrap();
    let noted = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).unwrap_or(0) > 0 {
                line.retain(|byte| *byte != 0xFF);
                let question: Value = serde_json::from_slice(&line).unwrap();
                line.clear();
                let command = question["execute"].as_str().unwrap().to_owned();
                let answer = match command.as_str() {
                    "guest-sync-delimited" => {
                        stream.write_all(&[0xFF]).unwrap();
                        question["arguments"]["id"].clone()
                    }
                    _ => 1.into(),
                };
                noted.lock().unwrap().push(command);
                if stream.write_all(format!("{{\"return\": {answer}}}\n").as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
    asked
}

/// Goal: a quiesced mark freezes, takes its instant, thaws, and says that it is one; when the guest cannot be quiesced nothing is marked.
#[test]
fn a_quiesced_mark_is_taken_between_freeze_and_thaw() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let socket = agent.file("qga.sock");
    let asked = guest_agent(&socket);
    let quiesce = format!("qga:{}", socket.display());
    let marked = agent.ctl(&["mark", "demo", "--name", "quiet", "--quiesce", &quiesce]);
    assert_eq!(marked["kind"], "application");
    assert!(marked["frozen_ns"].as_u64().unwrap() > 0);
    let order: Vec<String> = asked.lock().unwrap().clone();
    assert_eq!(order, ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
    agent.ctl_refused(
        &["mark", "demo", "--name", "loud", "--quiesce", "qga:/nonexistent/qga"],
        &["/nonexistent/qga", "synchronise"],
    );
    agent.ctl_refused(&["mark", "demo", "--quiesce", "tcp:1"], &["qga:"]);
    agent.ctl_refused(&["mark", "demo", "--quiesce", &quiesce, "--quiesce-max", "1h"], &["60s"]);
    agent.ctl_refused(&["mark", "demo", "--quiesce", &quiesce, "--kind", "crash"], &["cannot be used with"]);
    let snaps = agent.info("demo")["snaps"].as_array().unwrap().clone();
    assert!(!snaps.iter().any(|snap| snap["name"] == "loud"), "{snaps:?}");
    agent.stop();
}

/// Goal: the picture has what the history has, in the terminal and as a file that is well-formed.
#[test]
fn the_time_line_is_drawn_and_zoomed() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let mut client = agent.connect("demo");
    for at in 0..200 {
        client.write(at * 4096, &block(at)).unwrap();
    }
    client.flush().unwrap();
    client.close();
    let mark = agent.ctl(&["mark", "demo", "--name", "middle"])["time"].as_u64().unwrap();
    agent.ctl(&["disable", "demo"]);
    agent.ctl(&["enable", "demo"]);
    let picture = agent.file("line.svg");
    let line =
        agent.ctl(&["timeline", "demo", "--around", "middle", "--span", "1m", "--svg", picture.to_str().unwrap()]);
    assert_eq!(line["around"]["time"], mark);
    assert_eq!(line["to"].as_u64().unwrap() - line["from"].as_u64().unwrap(), 60_000_000_000);
    let reasons: Vec<_> = line["coverage"].as_array().unwrap().iter().map(|i| i["end_reason"].to_string()).collect();
    assert!(reasons.iter().any(|reason| reason.contains("switched off")), "{reasons:?}");
    let written: u64 = line["buckets"].as_array().unwrap().iter().map(|b| b["blocks"].as_u64().unwrap()).sum();
    assert_eq!(written, 200);
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.contains("middle") && svg.contains("switched off"), "{svg}");
    tools::run("python3", ["-c", "import sys, xml.dom.minidom as m; m.parse(sys.argv[1])", picture.to_str().unwrap()]);
    let drawn = Command::new(binaries().join("cdpctl"))
        .args([
            "--agent",
            &format!("unix:{}", agent.file("agent.sock").display()),
            "timeline",
            "demo",
            "--around",
            "middle",
        ])
        .output()
        .unwrap();
    let drawn = String::from_utf8(drawn.stdout).unwrap();
    for piece in [
        "writes",
        "flushes",
        "coverage",
        "logs",
        "▼",
        "Flush-clean before",
        "Marker before",
        "coverage ends: protection was switched off",
    ] {
        assert!(drawn.contains(piece), "lacks {piece:?}:\n{drawn}");
    }
    agent.stop();
}

/// Goal: a copy that takes a while says how long it will take.
#[test]
fn a_revert_that_is_copied_tells_its_progress() {
    let mut agent = Agent::dev("256MiB", "2GiB");
    let before = now_ns();
    let mut client = agent.connect("demo");
    let megabyte = vec![7; 1 << 20];
    for at in 0..192 {
        client.write(at << 20, &megabyte).unwrap();
    }
    client.flush().unwrap();
    client.close();
    agent.ctl(&["revert", "demo", "--at", &before.to_string()]);
    // Progress is told as long as there is any; a machine that is done within a second need not have told how fast.
    let (begun, mut told) = (std::time::Instant::now(), false);
    loop {
        let info = agent.info("demo");
        let Some(revert) = info["revert"].as_object() else { break };
        let (done, total) = (revert["blocks_done"].as_u64().unwrap(), revert["blocks_total"].as_u64().unwrap());
        assert!(done <= total && total == 192 * 256, "{info}");
        told |= revert["eta_s"].as_u64().is_some_and(|eta| eta > 0) && revert["blocks_per_s"].as_u64() > Some(0);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(told || begun.elapsed() < std::time::Duration::from_secs(1), "no rate and no time left were told");
    assert!(agent.live_image("demo").iter().all(|byte| *byte == 0));
    agent.stop();
}
