//! Promise: the agent starts, stops, refuses and recovers as the design says: never two on the same disks, never past a
//! primary that somebody else has written, never without a journal that holds acked writes.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cdp_tests::load::{Load, Plan};
use cdp_tests::nbd::Client;
use cdp_tests::oracle::Oracle;
use cdp_tests::process::{Agent, CONFIG, exit, scrape};
use cdp_tests::{now_ns, tools};
use nix::sys::signal::Signal;

const SIZE: u64 = 8 << 20;

fn some_writes(agent: &Agent, seed: u64) -> Oracle {
    let oracle = Arc::new(Mutex::new(Oracle::new(seed, SIZE)));
    let plan = Plan { writes_max: 500, ..Plan::mixed(SIZE, seed) };
    Load::start(&oracle, &agent.socket(), "demo", plan).finish();
    let mut oracle = Arc::into_inner(oracle).expect("the load has ended").into_inner().unwrap();
    let from = now_ns();
    oracle.settle(&agent.live_image("demo"), from).unwrap();
    oracle
}

fn health(agent: &Agent) -> String {
    agent.info("demo")["health"].as_str().expect("a word").to_owned()
}

fn assert_live(agent: &Agent, oracle: &Oracle) {
    let from = now_ns();
    oracle.check_image(&agent.live_image("demo"), from, now_ns()).unwrap();
}

#[test]
fn a_second_agent_on_the_same_folder_is_refused_and_the_first_goes_on() {
    let agent = Agent::dev("8MiB", "512MiB");
    let oracle = some_writes(&agent, 1);
    let output = tools::output(
        cdp_tests::process::binaries().join("cdp-agent").to_str().unwrap(),
        ["--dev", agent.dir().to_str().unwrap()],
    );
    assert!(!output.status.success(), "a second agent started");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(agent.dir().to_str().unwrap()), "it names what is in use: {said}");
    assert!(!said.contains("panicked"), "{said}");
    assert_live(&agent, &oracle);
}

/// Goal: another agent, with a state of its own, gets neither the CDP disk nor the primary of the first.
#[test]
fn a_second_agent_with_its_own_state_gets_no_disk_of_the_first() {
    let agent = Agent::dev("8MiB", "512MiB");
    let oracle = some_writes(&agent, 2);
    let (cdp, primary) = (agent.file("cdp.img"), agent.file("primary.img"));
    let config = format!("{CONFIG}\n[[disk]]\npath = {cdp:?}\n[[volume]]\nname = \"stolen\"\npath = {primary:?}\n");
    let mut thief = Agent::configured(&config);
    thief.spawn();
    // It either refuses to start, or starts and serves neither; both are honest.
    let begun = std::time::Instant::now();
    loop {
        if let Ok(list) = thief.try_ctl(&["disk", "list"]) {
            let disks = list["disks"].as_array().unwrap();
            assert!(disks.iter().all(|disk| disk["online"] == false), "it opened the other's CDP disk: {list}");
            assert!(Client::connect(&thief.socket(), "stolen").is_err(), "it serves the other's primary");
            break;
        }
        if begun.elapsed() > Duration::from_secs(2) {
            let status = thief.wait_for_end();
            assert!(!status.success());
            assert!(
                thief.log_tail().contains(agent.dir().to_str().unwrap()),
                "it names what is in use:\n{}",
                thief.log_tail()
            );
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_live(&agent, &oracle);
}

/// Goal: QEMU's tools see the lock on the primary and keep off, too.
#[test]
fn other_programs_see_that_the_primary_is_in_use() {
    let agent = Agent::dev("8MiB", "512MiB");
    let primary = agent.file("primary.img");
    let said = tools::run_refused("qemu-io", ["-f", "raw", "-c", "write 0 512", primary.to_str().unwrap()]);
    assert!(said.contains("lock"), "{said}");
}

/// Goal: SIGTERM and SIGINT leave everything on the primary, where anybody can read it without the agent.
#[test]
fn a_stop_drains_to_the_primary() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut agent = Agent::dev("8MiB", "512MiB");
        let oracle = some_writes(&agent, 3);
        agent.signal(signal);
        assert!(agent.wait_for_end().success(), "{}", agent.log_tail());
        let image = fs::read(agent.file("primary.img")).unwrap();
        let now = now_ns();
        oracle.check_image(&image, now, now).unwrap();
        agent.start();
        assert_eq!(health(&agent), "ok");
        assert_live(&agent, &oracle);
    }
}

/// Goal: a stop ends with clients connected and writing; what was acked is on the primary.
#[test]
fn a_stop_under_load_loses_no_acked_write() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    let oracle = Arc::new(Mutex::new(Oracle::new(4, SIZE)));
    // A write that comes too late may be answered with an error (shutting down) instead of silence.
    let plan = Plan { errors_fail: false, ..Plan::mixed(SIZE, 4) };
    let load = Load::start(&oracle, &agent.socket(), "demo", plan);
    load.wait_for(1000);
    agent.stop();
    load.stop();
    oracle.lock().unwrap().cut();
    let image = fs::read(agent.file("primary.img")).unwrap();
    let from = now_ns();
    oracle.lock().unwrap().settle(&image, from).unwrap();
    agent.start();
    assert_live(&agent, &oracle.lock().unwrap());
}

/// Goal: an agent that was stopped and continued for longer than `stall_max` keeps its protection.
#[test]
fn a_stopped_and_continued_agent_keeps_its_protection() {
    let agent = Agent::dev("8MiB", "512MiB");
    let oracle = Arc::new(Mutex::new(Oracle::new(5, SIZE)));
    let load = Load::start(&oracle, &agent.socket(), "demo", Plan::mixed(SIZE, 5));
    load.wait_for(200);
    let before = now_ns();
    agent.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_millis(6500)); // the default of stall_max is 5 s
    agent.signal(Signal::SIGCONT);
    load.wait_for(200);
    load.stop();
    let info = agent.info("demo");
    assert_eq!(info["health"], "ok", "{info}");
    let coverage = agent.coverage("demo");
    assert!(coverage.iter().any(|interval| interval.contains(before) && interval.end.is_none()), "{coverage:?}");
    let image = agent.view_image("demo", before);
    oracle.lock().unwrap().check_image(&image, before, before).unwrap();
}

#[test]
fn a_bad_configuration_is_refused_by_line_and_key() {
    let table: &[(&str, &[&str])] = &[
        ("stat_dir = \"DIR/state\"\n", &["config.toml:1", "stat_dir", "state_dir"]),
        ("[nbd]\nconnections_max = 0\n", &["config.toml:2", "nbd.connections_max", "65536"]),
        ("[grpc]\ntcp = \"127.0.0.1:0\"\n", &["config.toml:2", "grpc.tcp", "insecure"]),
        ("[engine]\nbacklog = \"a lot\"\n", &["config.toml:2", "engine.backlog", "a lot"]),
        ("this is no TOML\n", &["config.toml:1"]),
    ];
    for (text, words) in table {
        let mut agent = Agent::configured(text);
        let (status, said) = agent.run_to_end();
        assert!(!status.success(), "{text:?} was accepted");
        for word in *words {
            assert!(said.contains(word), "{text:?}: it should say {word:?}: {said}");
        }
        assert!(!said.contains("panicked"), "{text:?}: {said}");
    }
}

/// Goal: status 2, after which the unit tries no more, is for what no further start mends: not for a state folder that a predecessor still has because it
/// cannot die yet, but for one that is damaged.
#[test]
fn a_state_folder_that_is_in_use_may_be_tried_again_and_a_damaged_one_may_not() {
    let mut agent = Agent::configured(CONFIG);
    fs::create_dir(agent.file("state")).unwrap();
    let lock = fs::File::create(agent.file("state/lock")).unwrap();
    lock.try_lock().unwrap();
    let (status, said) = agent.run_to_end();
    assert!(status.code() == Some(1) && said.contains("another agent runs on it"), "{status}: {said}");
    drop(lock);
    agent.start_unserved();
    agent.stop();
    fs::write(agent.file("state/clock"), "junk").unwrap();
    let (status, said) = agent.run_to_end();
    assert!(status.code() == Some(2) && said.contains("state/clock"), "{status}: {said}");
}

/// Goal: the way of an admin on a fresh host: configuration, a CDP disk, a volume, history, restart.
#[test]
fn a_configured_agent_takes_disks_and_volumes_and_has_them_again_after_a_restart() {
    let mut agent = Agent::configured(&format!("{CONFIG}\n[engine]\nreserve_capacity = \"256MiB\"\n"));
    agent.start_unserved();
    let (cdp, primary) = (agent.file("cdp.img"), agent.file("vm.img"));
    let primary = primary.to_str().unwrap();
    agent.ctl(&["volume", "add", "demo", "--path", primary, "--size", "8MiB", "--create"]);
    agent.ctl(&["volume", "add", "demo", "--path", primary]);
    agent.ctl_refused(&["enable", "demo"], &["disk"]);
    agent.ctl(&["disk", "init", cdp.to_str().unwrap(), "--size", "512MiB"]);
    agent.ctl(&["enable", "demo"]);
    let oracle = some_writes(&agent, 6);
    let at = now_ns();
    for kill in [true, false] {
        if kill {
            agent.kill();
        } else {
            agent.stop();
        }
        agent.start();
        assert_eq!(health(&agent), "ok");
        assert_eq!(agent.info("demo")["cdp_state"], "on");
        let image = agent.view_image("demo", at);
        oracle.check_image(&image, at, at).unwrap();
    }
    let refusal = {
        let client = agent.connect("demo");
        let refusal = agent.ctl_refused(&["volume", "remove", "demo"], &["demo"]);
        client.close();
        refusal
    };
    assert_eq!(refusal.code, Some(exit::REFUSED));
    agent.ctl(&["volume", "remove", "demo"]);
    assert!(Client::connect(&agent.socket(), "demo").is_err());
    let image = fs::read(primary).unwrap();
    let now = now_ns();
    oracle.check_image(&image, now, now).expect("a removed volume's data are on its primary");
}

/// Goal: a volume of the configuration stays the one it was when its entry gets another name, or is left out for a start; and a primary whose
/// journal holds acked writes is served as nothing else.
/// Method: no uuid in the configuration, as in the example; kills, so that the newest writes are in the journal only.
#[test]
fn a_configured_volume_keeps_its_history_when_it_is_renamed_or_left_out_for_a_start() {
    let mut agent = Agent::configured("");
    let primary = agent.file("vm.img");
    fs::File::create(&primary).and_then(|file| file.set_len(SIZE)).unwrap();
    let base = format!("{CONFIG}\n[engine]\nreserve_capacity = \"256MiB\"\n");
    let restart = |agent: &mut Agent, name: Option<&str>| {
        let entry = name.map(|name| format!("[[volume]]\nname = {name:?}\npath = {primary:?}\n")).unwrap_or_default();
        let text = format!("{base}{entry}").replace("DIR", agent.dir().to_str().unwrap());
        fs::write(agent.file("config.toml"), text).unwrap();
        agent.start_unserved();
    };
    restart(&mut agent, Some("a"));
    agent.ctl(&["disk", "init", agent.file("cdp.img").to_str().unwrap(), "--size", "512MiB"]);
    agent.ctl(&["enable", "a"]);
    let write = |agent: &Agent, name: &str, byte: u8| {
        let mut client = agent.connect(name);
        client.write(0, &[byte; 4096]).unwrap();
        client.close();
        now_ns()
    };
    let first = write(&agent, "a", 1);
    agent.kill();
    let holds = |agent: &Agent, name: &str, byte: u8| {
        assert_eq!(agent.info(name)["health"], "ok");
        assert_eq!(agent.info(name)["cdp_state"], "on");
        assert!(agent.live_image(name)[..4096] == [byte; 4096], "{name}: acked writes are missing");
        assert!(agent.view_image(name, first)[..4096] == [1; 4096], "{name}: history is missing");
    };
    restart(&mut agent, Some("b"));
    holds(&agent, "b", 1);
    write(&agent, "b", 2);
    agent.kill();
    restart(&mut agent, None);
    assert!(agent.try_ctl(&["info", "b"]).is_err());
    let path = primary.to_str().unwrap();
    let refused = agent.ctl_refused(&["volume", "add", "c", "--path", path], &[path, "acked writes", "uuid"]);
    let uuid = refused.to_string().split("primary of volume ").nth(1).unwrap()[..36].to_owned();
    agent.kill();
    restart(&mut agent, Some("b"));
    holds(&agent, "b", 2);
    agent.kill();
    restart(&mut agent, None);
    agent.ctl(&["volume", "add", "c", "--path", path, "--uuid", &uuid]);
    holds(&agent, "c", 2);
    // Let go of in good order everything is on the primary, and that may be anything.
    agent.ctl(&["volume", "remove", "c"]);
    assert!(fs::read(&primary).unwrap()[..4096] == [2; 4096]);
    agent.ctl(&["volume", "add", "d", "--path", path]);
    assert!(agent.live_image("d")[..4096] == [2; 4096]);
}

/// Goal: a CDP disk that is in use is one that the next start knows of, also where its record cannot be written at first.
#[test]
fn a_cdp_disk_that_cannot_be_recorded_is_not_taken_into_use() {
    let mut agent = Agent::configured(&format!("{CONFIG}\n[engine]\nreserve_capacity = \"256MiB\"\n"));
    agent.start_unserved();
    let (cdp, primary) = (agent.file("cdp.img"), agent.file("vm.img"));
    let init = ["disk", "init", cdp.to_str().unwrap(), "--size", "512MiB"];
    // What the state directory cannot replace: a folder stands where the new list would be written.
    let obstacle = agent.file("state/disks.tmp");
    fs::create_dir(&obstacle).unwrap();
    agent.ctl_refused(&init, &["disks"]);
    assert!(agent.ctl(&["disk", "list"])["disks"].as_array().is_some_and(Vec::is_empty), "it is in use");
    fs::remove_dir(&obstacle).unwrap();
    agent.ctl(&init);
    // One whose making was cut off behind its record is made anew in its place.
    agent.stop();
    fs::File::create(&cdp).and_then(|file| file.set_len(512 << 20)).unwrap();
    agent.start_unserved();
    assert_eq!(agent.ctl(&["disk", "list"])["disks"][0]["online"], false);
    agent.ctl(&["disk", "init", cdp.to_str().unwrap(), "--force"]);
    agent.ctl(&["volume", "add", "demo", "--path", primary.to_str().unwrap(), "--size", "8MiB", "--create"]);
    agent.ctl(&["enable", "demo"]);
    let oracle = some_writes(&agent, 9);
    agent.kill();
    agent.start();
    assert_eq!(health(&agent), "ok");
    assert_live(&agent, &oracle);
}

/// Goal: when somebody wrote to the primary behind the agent's back, nothing is redone over it and no old history is shown
/// for it, until the admin decides; then protection goes on.
#[test]
fn a_primary_that_was_written_past_the_agent_is_noticed() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    let oracle = some_writes(&agent, 7);
    let old = now_ns();
    agent.stop();
    let mut file = OpenOptions::new().write(true).open(agent.file("primary.img")).unwrap();
    file.seek(SeekFrom::Start(123 * 4096)).unwrap();
    file.write_all(&[0x5A; 4096]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let intruder = fs::read(agent.file("primary.img")).unwrap();
    agent.start_unserved();
    let info = agent.info("demo");
    assert_eq!(info["health"], "primary_changed", "{info}");
    assert_ne!(info["health_reason"], "", "{info}");
    agent.ctl_refused(&["view", "open", "demo", "--at", &old.to_string()], &[]);
    agent.ctl_refused(&["volume", "override", "demo", "--accept", "needs_journal"], &["primary_changed"]);
    agent.ctl(&["volume", "override", "demo", "--accept", "primary_changed"]);
    assert!(agent.live_image("demo") == intruder, "the intruder's bytes are what there is");
    agent.ctl(&["enable", "demo"]);
    let mut client = agent.connect("demo");
    let between = now_ns();
    client.write(0, &[1; 4096]).unwrap();
    assert!(agent.view_image("demo", between) == intruder, "protection goes on from there");
    agent.ctl_refused(&["view", "open", "demo", "--at", &old.to_string()], &["retained"]);
    drop(oracle);
}

/// Goal: a primary that is the same and only known by another identity (another inode, a device that says something else of itself) costs nothing: the admin
/// vouches for it, and what was acked and all history are there.
#[test]
fn a_primary_under_another_identity_can_be_vouched_for() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    let oracle = some_writes(&agent, 9);
    let at = now_ns();
    some_more(&agent);
    let newest = agent.live_image("demo");
    agent.kill();
    let (primary, copy) = (agent.file("primary.img"), agent.file("copy.img"));
    fs::copy(&primary, &copy).unwrap();
    fs::rename(&copy, &primary).unwrap();
    agent.start_unserved();
    let info = agent.info("demo");
    assert_eq!(info["health"], "primary_changed", "{info}");
    agent.ctl(&["volume", "attach", "demo"]);
    assert_eq!(health(&agent), "ok");
    assert!(agent.live_image("demo") == newest, "acked writes are missing");
    oracle.check_image(&agent.view_image("demo", at), at, at).unwrap();
    agent.ctl_refused(&["volume", "attach", "demo"], &["no history to attach"]);
    agent.kill();
    agent.start();
    assert_eq!(health(&agent), "ok", "it is known by its new identity from then on");
}

/// Goal: an attach after which the volume is not served does not say that its history was taken over.
/// Method: as above behind a clean stop, which says what mtime the primary had: a copy has another, and for what is in it nobody can vouch.
#[test]
fn an_attach_that_leaves_the_volume_unserved_is_an_error_with_the_reason() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    some_writes(&agent, 12);
    agent.stop();
    let (primary, copy) = (agent.file("primary.img"), agent.file("copy.img"));
    fs::copy(&primary, &copy).unwrap();
    fs::rename(&copy, &primary).unwrap();
    agent.start_unserved();
    assert_eq!(health(&agent), "primary_changed");
    let refused = agent.ctl_refused(&["volume", "attach", "demo"], &["its mtime changed"]);
    assert_eq!(refused.code, Some(exit::REFUSED), "{refused}");
    assert_eq!(health(&agent), "primary_changed");
    assert!(Client::connect(&agent.socket(), "demo").is_err(), "it is served");
    agent.ctl(&["volume", "override", "demo", "--accept", "primary_changed"]);
    agent.connect("demo").close();
}

/// Goal: without the CDP disk that holds acked writes, the volume is not served; with it again, nothing is missing; only a
/// named override goes on without.
#[test]
fn without_the_journal_that_holds_acked_writes_the_volume_is_not_served() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    let oracle = some_writes(&agent, 8);
    agent.kill();
    let (disk, hidden) = (agent.file("cdp.img"), agent.file("hidden.img"));
    fs::rename(&disk, &hidden).unwrap();
    agent.start_unserved();
    let info = agent.info("demo");
    assert_eq!(info["health"], "needs_journal", "{info}");
    assert!(Client::connect(&agent.socket(), "demo").is_err(), "its newest acked writes are elsewhere");
    agent.stop();
    if disk.exists() {
        fs::remove_file(&disk).unwrap();
    }
    fs::rename(&hidden, &disk).unwrap();
    agent.start();
    assert_eq!(health(&agent), "ok");
    assert_live(&agent, &oracle);

    some_more(&agent);
    agent.kill();
    fs::rename(&disk, &hidden).unwrap();
    agent.start_unserved();
    agent.ctl_refused(&["volume", "override", "demo", "--accept", "primary_changed"], &["needs_journal"]);
    agent.ctl(&["volume", "override", "demo", "--accept", "needs_journal"]);
    let mut client = agent.connect("demo");
    client.write(0, &[9; 4096]).unwrap();
    client.close();
    // The journal that was given up never comes back over what was written since.
    agent.stop();
    if disk.exists() {
        fs::remove_file(&disk).unwrap();
    }
    fs::rename(&hidden, &disk).unwrap();
    agent.start_unserved();
    let mut client = agent.connect("demo");
    assert!(client.read(0, 4096).unwrap() == [9; 4096], "a journal that was given up was redone");
}

/// Goal: a volume that was closed to be removed, and whose removal could not be recorded, says that it is not served, and can be removed once the state
/// directory takes it; nothing of it is left then.
/// Method: a view waits for its volume, which waits for its journal; a folder stands where the new list of views would be written.
#[test]
fn a_volume_whose_removal_cannot_be_recorded_says_that_it_is_not_served() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    some_writes(&agent, 10);
    let view = agent.open_view("demo", now_ns());
    agent.kill();
    fs::rename(agent.file("cdp.img"), agent.file("hidden.img")).unwrap();
    agent.start_unserved();
    assert_eq!(health(&agent), "needs_journal");
    let obstacle = agent.file("state/views.tmp");
    fs::create_dir(&obstacle).unwrap();
    agent.ctl_refused(&["volume", "remove", "demo", "--force"], &["views"]);
    agent.ctl_refused(&["enable", "demo"], &["not served", "the record could not be written"]);
    let recorded = || fs::read_to_string(agent.file("state/views")).unwrap().contains(&view.id);
    assert!(recorded(), "the list was written: the test shows nothing");
    fs::remove_dir(&obstacle).unwrap();
    agent.ctl(&["volume", "remove", "demo", "--force"]);
    assert!(agent.ctl(&["volume", "list"])["list"].as_array().is_some_and(Vec::is_empty));
    assert!(!recorded(), "a view of a volume that is gone is on record");
}

fn wait_for_health(agent: &Agent, wanted: &str) {
    let begun = std::time::Instant::now();
    while health(agent) != wanted {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}\n{}", agent.info("demo"), agent.log_tail());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Goal: a state folder that takes nothing (its disk is full, say) is told by health, event and metric, and `status` answers; writes wait, and go on when it takes
/// something again. A stop meanwhile ends in good time, and what was acked is there after it.
/// Method: a folder stands where the clock's next mark would be written.
#[test]
fn a_state_folder_that_takes_nothing_is_told_and_lets_the_agent_stop() {
    let mut agent = Agent::dev("8MiB", "512MiB");
    let metrics = fs::read_to_string(agent.file("metrics.addr")).unwrap();
    let obstacle = agent.file("state/clock.tmp");
    // One block after the other, for longer than the mark reaches ahead; in the end how many were acked.
    let write = |agent: &Agent, byte: u8| {
        let mut client = agent.connect("demo");
        std::thread::spawn(move || {
            let mut acked = 0;
            while acked < SIZE / 4096 && client.write(acked * 4096, &[byte; 4096]).is_ok() {
                acked += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            acked
        })
    };
    let obstruct = || {
        // The next mark may be on its way there.
        while fs::create_dir(&obstacle).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let told = |agent: &Agent, kind: &str| {
        let events = agent.ctl(&["events"]);
        events["events"].as_array().unwrap().iter().any(|event| event["kind"] == kind)
    };
    // With the next attempt, a second later at the most.
    let is_told = |agent: &Agent, kind: &str| {
        let begun = std::time::Instant::now();
        while !told(agent, kind) {
            assert!(begun.elapsed() < Duration::from_secs(15), "no event {kind}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let metric = |line: &str| scrape(metrics.trim()).lines().any(|found| found == line);
    assert!(metric("cdp_agent_state_failing 0"));
    obstruct();
    let writer = write(&agent, 1);
    wait_for_health(&agent, "state_failing");
    let info = agent.info("demo");
    assert!(info["health_reason"].as_str().is_some_and(|why| why.contains("state directory")), "{info}");
    is_told(&agent, "state_failing");
    assert!(metric("cdp_agent_state_failing 1"), "the metric");
    let asked = std::time::Instant::now();
    assert_eq!(agent.ctl(&["status"])["volumes_unhealthy"], 1);
    assert!(asked.elapsed() < Duration::from_secs(10), "status took {:?}", asked.elapsed());
    assert!(!writer.is_finished(), "nothing waits: the test shows nothing");
    fs::remove_dir(&obstacle).unwrap();
    assert_eq!(writer.join().unwrap(), SIZE / 4096, "a write that waited got an error");
    wait_for_health(&agent, "ok");
    is_told(&agent, "state_recovered");

    obstruct();
    let writer = write(&agent, 2);
    wait_for_health(&agent, "state_failing");
    let begun = std::time::Instant::now();
    agent.stop();
    assert!(begun.elapsed() < Duration::from_secs(30), "the stop took {:?}", begun.elapsed());
    let acked = usize::try_from(writer.join().unwrap()).unwrap();
    assert!(acked * 4096 < 8 << 20, "nothing waited: the test shows nothing");
    fs::remove_dir(&obstacle).unwrap();
    agent.start();
    let image = agent.live_image("demo");
    assert!(image[..acked * 4096].iter().all(|byte| *byte == 2), "acked writes are missing");
    assert_eq!(health(&agent), "ok");
}

fn some_more(agent: &Agent) {
    let mut client = agent.connect("demo");
    client.write(0, &[7; 65536]).unwrap();
    client.close();
}

/// Goal: metrics are there for a scraper, on loopback, with the volume's name.
#[test]
fn metrics_are_served_over_http() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let config = CONFIG.replace("\"off\"", &format!("\"{address}\""));
    let mut agent = Agent::configured(&config);
    agent.start_unserved();
    let primary = agent.file("vm.img");
    let cdp = agent.file("cdp.img");
    agent.ctl(&["disk", "init", cdp.to_str().unwrap(), "--size", "512MiB"]);
    agent.ctl(&["volume", "add", "demo", "--path", primary.to_str().unwrap(), "--size", "8MiB", "--create"]);
    agent.ctl(&["edit", "demo", "--reserve-capacity", "256MiB", "--reserve-duration", "1h"]);
    agent.ctl(&["enable", "demo"]);
    let mut client = agent.connect("demo");
    for block in 0..10_u64 {
        client.write(block * 4096, &[1; 4096]).unwrap();
    }
    let shows = |text: &str, words: &[&str]| {
        text.lines().any(|line| !line.starts_with('#') && words.iter().all(|word| line.contains(word)))
    };
    let begun = std::time::Instant::now();
    loop {
        let text = scrape(address);
        let counted = text.lines().any(|line| line.ends_with(" 10") && shows(line, &["write", "demo"]));
        if counted {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "no counter shows the ten writes:\n{text}");
        std::thread::sleep(Duration::from_millis(200));
    }
    client.close();
    agent.stop();
    // A volume that cannot be opened is in the metrics as well: an alert must not miss it.
    fs::rename(&primary, agent.file("elsewhere.img")).unwrap();
    agent.start_unserved();
    let text = scrape(address);
    assert!(shows(&text, &["cdp_volume_health{", "\"demo\"", "\"primary_failing\"", "} 1"]), "{text}");
}
