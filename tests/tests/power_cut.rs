//! Promise: whatever a power cut leaves on the CDP disk, the primary and in the state folder, the agent recovers from it:
//! every flushed write is there, of the others a prefix, no earlier view has changed, and a file system on the volume is sound
//! (design I1, I2, I3, I4).
//!
//! Method: the agent's disks and state folder are on a file system of ours that records every write and sync. Images that a
//! power cut may have left are built for many places of the recording, and the built agent is started on each. `CDP_SEED`
//! replays a run, `CDP_CUT` one cut of it: the recording differs from run to run, what is done with it does not.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cdp_tests::faultfs::{FaultFs, Image, Recording};
use cdp_tests::load::Plan;
use cdp_tests::mount::{Mount, live_on};
use cdp_tests::rig::{CDP, PRIMARY, Rig, Sizes};
use cdp_tests::tools::{self, assert_ext4_sound, check_ext4};
use cdp_tests::{Rng, now_ns, rounds, seed};

/// Small, so that logs rotate, seal and are evicted while it is recorded.
const SIZES: Sizes = Sizes { volume: 4, cdp: 64, reserve: 56 };

/// What was done beside the load while it was recorded, and when.
#[derive(Default)]
struct Story {
    /// Protected from here on.
    begun: u64,
    marks: Vec<Mark>,
    off: Option<Off>,
    /// Instants of which the views are looked at, beside random ones.
    instants: Vec<u64>,
    /// Calls of admins, from before they were sent to after their answer: more cuts than by chance are in and behind them.
    calls: Vec<(u64, u64)>,
}

struct Mark {
    name: &'static str,
    time: u64,
    answered: u64,
}

/// A span in which protection was off: each call from before it was sent to after its answer.
struct Off {
    disable: (u64, u64),
    enable: (u64, u64),
}

impl Story {
    fn certainly_off(&self, at: u64) -> bool {
        self.off.as_ref().is_some_and(|off| (off.disable.1..off.enable.0).contains(&at))
    }

    fn perhaps_off(&self, at: u64) -> bool {
        self.off.as_ref().is_some_and(|off| (off.disable.0..=off.enable.1).contains(&at))
    }
}

/// Starts the agent on an image; it must come up, serve and protect.
fn start_on(rig: &mut Rig, image: &Image, what: &str) {
    rig.disks.restore(image);
    rig.agent.start_unserved();
    let info = rig.info();
    assert_eq!(info["health"], "ok", "{what}: {info}");
}

/// A place of the recording; one in four is at its end, where the agent stopped. Where there were calls, two in five are in one of them or shortly behind it:
/// a revert is copied then, and evicted logs are let go of.
fn some_cut(recording: &Recording, story: &Story, rng: &mut Rng) -> usize {
    let cuts = recording.cuts();
    if !story.calls.is_empty() && rng.percent(40) {
        let (from, to) = rng.pick(&story.calls);
        let (from, to) = (recording.place(from), recording.place(to) + 60);
        return (from + usize::try_from(rng.below((to - from) as u64)).expect("a place")).min(cuts);
    }
    let back = if rng.percent(25) { cuts.min(20) } else { cuts };
    cuts - usize::try_from(rng.below(back as u64 + 1)).expect("a place")
}

/// The images of one recording, each tried; `cuts` of them.
fn try_cuts(rig: &mut Rig, recording: &Recording, seed: u64, cuts: usize, story: &Story) {
    let only: Option<usize> = std::env::var("CDP_CUT").ok().and_then(|cut| cut.parse().ok());
    let (mut lost, mut again, mut viewed) = (0, 0, 0);
    for number in 0..cuts {
        if only.is_some_and(|only| only != number) {
            continue;
        }
        let mut rng = Rng::new(seed.wrapping_mul(1_000_003).wrapping_add(number as u64));
        let cut = some_cut(recording, story, &mut rng);
        let what = format!("CDP_SEED={seed} CDP_CUT={number}, event {cut} of {}", recording.cuts());
        let time = recording.time_ns(cut);
        let image = recording.power_cut(cut, &mut rng);
        start_on(rig, &image, &what);
        let on = rig.info()["cdp_state"] == "on";
        let switched = if on { !story.certainly_off(time) } else { story.perhaps_off(time) };
        assert!(switched, "{what}: protection is switched on: {on}");
        // In a third of all cases the power goes again while it recovers, and again.
        let recovery_seed = rng.number();
        rig.disks.record(recovery_seed, 30);
        let live = rig.agent.live_image("demo");
        let checked = rig.oracle.lock().expect("no panic").check_power_cut(&live, time);
        let safe = checked.unwrap_or_else(|wrong| panic!("{what}: {wrong}\n{}", rig.agent.log_tail()));
        lost += usize::from(safe < time.saturating_sub(1_000_000));
        let oracle = Arc::clone(&rig.oracle);
        let same = |image: &[u8], whose: &str| {
            let checked = oracle.lock().expect("no panic").check_same(&live, image, safe, time);
            checked.unwrap_or_else(|wrong| panic!("{what}: {whose} is not what was recovered: {wrong}"));
        };
        // What was promised last has not aged out, and is history.
        let reached = safe <= story.begun || story.perhaps_off(safe) || covers(rig, safe);
        assert!(reached, "{what}: {safe} is not covered: {:?}", rig.agent.coverage("demo"));
        for _ in 0..2 {
            viewed += usize::from(check_some_view(rig, &mut rng, story, time, safe, &what));
        }
        for at in story.instants.iter().copied().filter(|at| *at <= time) {
            viewed += usize::from(rng.percent(50) && check_view(rig, story, at, safe, &what));
        }
        for mark in story.marks.iter().filter(|mark| mark.answered <= time) {
            viewed += usize::from(check_mark(rig, story, mark, &what));
        }
        if rng.percent(30) {
            again += 1;
            for level in 0..2 {
                rig.agent.kill();
                let recovery = rig.disks.recorded();
                let second = usize::try_from(rng.below(recovery.cuts() as u64 + 1)).expect("a place");
                start_on(rig, &recovery.power_cut(second, &mut rng), &format!("{what}, cut again {level}"));
                rig.disks.record(recovery_seed, 30);
                same(&rig.agent.live_image("demo"), "the volume after another cut during recovery");
            }
            viewed += usize::from(check_some_view(rig, &mut rng, story, time, safe, &what));
        }
        // It goes on from there.
        if !on {
            rig.agent.ctl(&["enable", "demo"]);
        }
        let mut client = rig.agent.connect("demo");
        let before = now_ns();
        client.write_fua(0, &[0xA5; 4096]).unwrap_or_else(|e| panic!("{what}: {e}"));
        same(&rig.agent.view_image("demo", before), "the view of what was recovered");
        client.close();
        if number % 4 == 0 {
            // A stop does not wait for a revert that is being copied.
            rig.eventually("the end of the copying", || rig.info()["revert"].is_null());
            rig.agent.stop();
            let found = rig.agent.check_disk(&rig.disks.path_str(CDP));
            assert_eq!(found["sound"], true, "{what}: {found}");
            let mut primary = rig.disks.content(PRIMARY).to_vec();
            primary[..4096].copy_from_slice(&live[..4096]);
            same(&primary, "the primary after a stop");
        } else {
            rig.agent.kill();
        }
    }
    println!(
        "{cuts} power cuts, {again} of them cut again twice; {lost} lost something that was not flushed; {viewed} views"
    );
    assert!(viewed > 0 || only.is_some(), "no random instant was covered: that shows nothing");
}

/// Goal: this test would notice. Disks that forget what they said was synced leave a volume that lacks flushed writes, or one
/// that is not served.
fn liars_are_found_out(rig: &mut Rig, recording: &Recording, seed: u64) {
    let mut rng = Rng::new(seed);
    for _ in 0..20 {
        let cut = recording.cuts() / 2 + usize::try_from(rng.below(recording.cuts() as u64 / 4)).expect("a place");
        rig.disks.restore(&recording.power_cut_of_liars(cut, &mut rng));
        rig.agent.start_unserved();
        let honest = rig.health() == "ok" && {
            let live = rig.agent.live_image("demo");
            let oracle = rig.oracle.lock().expect("no panic");
            oracle.check_power_cut(&live, recording.time_ns(cut)).is_ok()
        };
        rig.agent.kill();
        if !honest {
            return;
        }
    }
    panic!("CDP_SEED={seed}: disks that lie about syncs were not noticed");
}

fn covers(rig: &Rig, at: u64) -> bool {
    rig.agent.coverage("demo").iter().any(|interval| interval.contains(at))
}

/// A view of a random instant before the cut. Answers whether it was looked at.
fn check_some_view(rig: &Rig, rng: &mut Rng, story: &Story, time: u64, safe: u64, what: &str) -> bool {
    let begun = story.begun;
    check_view(rig, story, begun + rng.below(time.max(begun + 1) - begun), safe, what)
}

/// The whole view of an instant before the cut is right. What is not covered was not recorded, or has gone for room, as the oldest there was, or is younger
/// than all that was promised. Answers whether it was looked at.
fn check_view(rig: &Rig, story: &Story, at: u64, safe: u64, what: &str) -> bool {
    let coverage = rig.agent.coverage("demo");
    let covered = coverage.iter().any(|interval| interval.contains(at));
    assert!(!covered || !story.certainly_off(at), "{what}: at {at} protection was off: {coverage:?}");
    let gone = coverage.first().is_none_or(|oldest| at < oldest.start);
    let may_lack = gone || at > safe || at < story.begun || story.perhaps_off(at);
    assert!(covered || may_lack, "{what}: {at} is not covered: {coverage:?}");
    if covered {
        let image = rig.agent.view_image("demo", at);
        let checked = rig.oracle.lock().expect("no panic").check_view_after_cut(&image, at, safe);
        checked.unwrap_or_else(|wrong| panic!("{what}: view at {at}: {wrong}"));
    }
    covered
}

/// A mark that was answered before the cut is there under its name, and its view has everything that was acked by then, unless that has gone for room.
fn check_mark(rig: &Rig, story: &Story, mark: &Mark, what: &str) -> bool {
    let Mark { name, time, .. } = *mark;
    // It was durable when it was answered, and so was all before it.
    if !check_view(rig, story, time, time, what) {
        return false;
    }
    let info = rig.info();
    let mut snaps = info["snaps"].as_array().expect("a list of marks").iter();
    assert!(snaps.any(|snap| snap["name"] == name && snap["time"] == time), "{what}: no mark {name} at {time}: {info}");
    let view = rig.agent.open_view("demo", name);
    assert_eq!(view.time, time, "{what}: the view of mark {name}");
    rig.agent.close_view(&view);
    true
}

#[test]
fn flushed_writes_and_earlier_views_survive_a_power_cut_anywhere() {
    if !FaultFs::possible() {
        cdp_tests::skip("needs root and /dev/fuse");
        return;
    }
    let seed = seed();
    let mut rig = Rig::new(seed, SIZES, "");
    rig.disks.record(seed, 30);
    let begun = now_ns();
    let plan = Plan { flush_percent: 4, fua_percent: 4, depth: 6, ..rig.plan(seed) };
    let load = rig.load(plan);
    load.wait_for(600);
    // A pause in which everything is destaged and sealed, and the idle frame is written.
    let sent = load.stop();
    std::thread::sleep(Duration::from_millis(1300));
    let load = rig.load(Plan { flush_percent: 4, fua_percent: 4, depth: 6, ..rig.plan(seed + 1) });
    load.wait_for(600);
    // A load that is cut off by the stop would leave writes that nobody knows of; so it ends first.
    load.stop();
    rig.agent.stop();
    let recording = rig.disks.recorded();
    println!(
        "{sent:?}, {} events, CDP disk and primary: {:?}, {:?}",
        recording.cuts(),
        recording.counts(CDP),
        recording.counts(PRIMARY)
    );
    liars_are_found_out(&mut rig, &recording, seed);
    try_cuts(&mut rig, &recording, seed, rounds(40), &Story { begun, ..Story::default() });
}

/// Here the loads of the second recording do not write: what is discarded stays so, until its log is evicted.
const QUIET: Range<u64> = 3 << 20..4 << 20;
/// Discarded early on, and not written again.
const DISCARDED: Range<u64> = QUIET.start..QUIET.start + (256 << 10);

/// A rig that tells its own story while it is recorded. Every call comes with nothing else in flight.
struct Teller {
    rig: Rig,
    story: Story,
    seed: u64,
}

impl Teller {
    fn plan(&mut self) -> Plan {
        self.seed += 1;
        let region = 0..QUIET.start;
        Plan { region, flush_percent: 4, fua_percent: 4, trims_percent: 8, depth: 6, ..self.rig.plan(self.seed) }
    }

    fn write(&mut self, writes: u64) {
        let plan = self.plan();
        self.rig.load(Plan { writes_max: writes, ..plan }).finish();
        self.note();
    }

    /// Views of now are looked at later.
    fn note(&mut self) {
        self.story.instants.push(now_ns());
    }

    fn call(&mut self, args: &[&str]) -> (u64, u64) {
        let sent = now_ns();
        self.rig.agent.ctl(args);
        self.story.calls.push((sent, now_ns()));
        (sent, now_ns())
    }

    fn mark(&mut self, name: &'static str) -> u64 {
        let sent = now_ns();
        let time = self.rig.agent.ctl(&["mark", "demo", "--name", name])["time"].as_u64().expect("its time");
        // Durable, and so is what was acked before it.
        self.rig.oracle.lock().expect("no panic").flushed(sent);
        let answered = now_ns();
        self.story.calls.push((sent, answered));
        self.story.marks.push(Mark { name, time, answered });
        time
    }

    /// Writes all of the quiet region.
    fn fill(&self) {
        let mut client = self.rig.agent.connect("demo");
        for at in QUIET.step_by(64 << 10) {
            let mut oracle = self.rig.oracle.lock().expect("no panic");
            let op = oracle.begin_write(at, 64 << 10);
            client.write(at, &oracle.data(op)).expect("a write");
            oracle.ack(op);
        }
        client.close();
    }

    fn discard(&self, range: Range<u64>) {
        let len = range.end - range.start;
        let mut client = self.rig.agent.connect("demo");
        let mut oracle = self.rig.oracle.lock().expect("no panic");
        let op = oracle.begin_discard(range.start, len);
        client.trim(range.start, u32::try_from(len).expect("less than 4 GiB")).expect("a discard");
        oracle.ack(op);
        drop(oracle);
        client.close();
    }

    fn revert(&mut self, target: u64) {
        // Connections that were hung up are gone only when the agent has seen it.
        let rig = &self.rig;
        rig.eventually("no client", || rig.metric(&["cdp_volume_clients{", "\"demo\""]) == 0.0);
        let image = self.rig.agent.view_image("demo", target);
        let checked = self.rig.oracle.lock().expect("no panic").check_image(&image, target, target);
        checked.unwrap_or_else(|wrong| panic!("view at {target}: {wrong}"));
        let (sent, _) = self.call(&["revert", "demo", "--at", &target.to_string()]);
        self.rig.oracle.lock().expect("no panic").reverted(&image, target, sent);
        self.rig.check_live("after a revert");
        self.note();
    }

    /// What was discarded early on is zeroes on the primary: its log has gone, and it was punched.
    fn is_punched(&self) -> bool {
        let primary = self.rig.disks.content(PRIMARY);
        primary[DISCARDED.start as usize..DISCARDED.end as usize].iter().all(|byte| *byte == 0)
    }
}

/// Goal: the same with everything that changes what history shows: marks, reverts, discards, a span without protection, and logs that go for room. The volume
/// and whole views are compared after each cut: of random instants, of those between the steps, and of the marks.
#[test]
fn marks_reverts_discards_switches_and_evictions_survive_a_power_cut_anywhere() {
    if !FaultFs::possible() {
        cdp_tests::skip("needs root and /dev/fuse");
        return;
    }
    let seed = seed();
    let rig = Rig::new(seed, SIZES, "");
    let evicted = |rig: &Rig| rig.metric(&["cdp_volume_evicted_capacity_total{", "\"demo\""]);
    rig.disks.record(seed, 30);
    let story = Story { begun: now_ns(), ..Story::default() };
    let mut teller = Teller { rig, story, seed };
    teller.fill();
    teller.write(150);
    teller.discard(DISCARDED);
    teller.write(50);
    let first = teller.mark("first");
    // The revert takes this discard back.
    teller.discard(DISCARDED.end..DISCARDED.end + (256 << 10));
    teller.write(100);
    let disable = teller.call(&["disable", "demo"]);
    let plan = teller.plan();
    teller.rig.load(Plan { writes_max: 80, ..plan }).finish();
    let enable = teller.call(&["enable", "demo"]);
    teller.story.off = Some(Off { disable, enable });
    teller.write(100);
    let second = teller.mark("second");
    teller.revert(first);
    teller.write(50);
    let plan = teller.plan();
    let load = teller.rig.load(plan);
    for round in 0.. {
        if evicted(&teller.rig) > 0.0 && teller.is_punched() {
            break;
        }
        assert!(round < 100, "{} logs were evicted, punched: {}", evicted(&teller.rig), teller.is_punched());
        load.wait_for(100);
    }
    load.stop();
    teller.note();
    let rig = &teller.rig;
    rig.eventually("an event of the eviction", || rig.events("evicted_early") > 0);
    println!("the second mark is {}", if covers(&teller.rig, second) { "still there" } else { "evicted" });
    let third = teller.mark("third");
    teller.discard(DISCARDED.end..QUIET.end);
    teller.write(100);
    teller.revert(third);
    teller.write(100);
    // A pause in which everything is destaged and sealed, and the idle frame is written.
    std::thread::sleep(Duration::from_millis(1300));
    teller.write(50);
    let Teller { mut rig, story, .. } = teller;
    rig.agent.stop();
    let recording = rig.disks.recorded();
    println!(
        "{} events, CDP disk: {:?}, primary: {:?}",
        recording.cuts(),
        recording.counts(CDP),
        recording.counts(PRIMARY)
    );
    try_cuts(&mut rig, &recording, seed, rounds(30), &story);
}

/// A file that a guest wrote once and then left alone.
struct Kept {
    name: String,
    content: Vec<u8>,
    /// Before it was made: no earlier state has it.
    begun: u64,
    /// After the return of the sync behind it: every later state has it.
    synced: u64,
}

/// Files come and go in rounds; each round makes one that stays, and ends with a sync.
fn live_and_keep(folder: &Path, seed: u64) -> Vec<Kept> {
    let mut rng = Rng::new(seed);
    let round = |round: u64| {
        let name = format!("kept-{round}");
        let mut content = vec![0; usize::try_from(4096 + rng.below(40_000)).expect("a small file")];
        rng.fill(&mut content);
        let begun = now_ns();
        fs::write(folder.join(&name), &content).expect("write a file");
        let (_, synced) = live_on(folder, seed.wrapping_add(round), 6);
        Kept { name, content, begun, synced }
    };
    (0..10).map(round).collect()
}

/// Checks that an image of the file system as of `at`, whose log is replayed, has all files that were synced by then, and none that came later.
fn check_kept(image: &Path, tree: &Path, kept: &[Kept], at: u64) -> Result<(), String> {
    if tree.exists() {
        fs::remove_dir_all(tree).expect("remove the files of the image before");
    }
    fs::create_dir(tree).expect("make a folder");
    let (image, dump) = (image.to_str().expect("an ASCII path"), format!("rdump / {}", tree.display()));
    let dumped = tools::output("debugfs", ["-R", &dump, image]);
    for Kept { name, content, begun, synced } in kept {
        let found = fs::read(tree.join(name));
        let wrong = match &found {
            Ok(_) if *begun > at => "is there, though it was made later",
            Ok(found) if *synced <= at && found != content => "has other bytes than when it was synced",
            Err(_) if *synced <= at => "was synced and is not there",
            _ => continue,
        };
        let said = String::from_utf8_lossy(&dumped.stderr);
        return Err(format!("{name} (made at {begun}, synced at {synced}) {wrong}, at {at}; debugfs: {said}"));
    }
    Ok(())
}

/// Goal: both checks would notice: a file system that lost half of the blocks that it wrote between two instants, and one whose directory names a file
/// that has no inode; nothing is wrong with it before.
fn lost_blocks_are_found_out(old: &[u8], new: &[u8], kept: &[Kept], out: &Path, tree: &Path, seed: u64) {
    let at = now_ns();
    fs::write(out, new).expect("write the image");
    assert_ext4_sound(out, "before anything is lost");
    check_kept(out, tree, kept, at).expect("before anything is lost");
    // Its replayed image, in which a name leads to nothing.
    let cleared = tools::output(
        "debugfs",
        ["-w", "-R", &format!("clri /{}", kept[0].name), out.to_str().expect("an ASCII path")],
    );
    assert!(
        cleared.status.success() && check_ext4(out).is_err(),
        "CDP_SEED={seed}: a file without an inode is not noticed"
    );
    let mut rng = Rng::new(seed);
    let (mut unsound, mut lacking) = (0, 0);
    for _ in 0..20 {
        let mut image = new.to_vec();
        for (block, before) in image.chunks_mut(4096).zip(old.chunks(4096)) {
            if *block != *before && rng.percent(50) {
                block.copy_from_slice(before);
            }
        }
        fs::write(out, &image).expect("write the image");
        // What it lost of its journal cuts that short, so it may well be sound: as it was before.
        unsound += usize::from(check_ext4(out).is_err());
        lacking += usize::from(check_kept(out, tree, kept, at).is_err());
        if unsound > 0 && lacking > 0 {
            return;
        }
    }
    panic!("CDP_SEED={seed}: lost blocks are not noticed: of 20 images {unsound} are unsound, {lacking} lack files");
}

/// Goal: an ext4 on the volume, mounted by a real kernel, is sound after a power cut anywhere, and so is a view of an instant before the
/// cut: its own log replays, the check finds no fault, and what was synced by then is there with its bytes.
#[test]
fn a_mounted_ext4_is_sound_after_a_power_cut_anywhere() {
    if !FaultFs::possible() || !Mount::possible() {
        cdp_tests::skip("needs root, /dev/fuse and loop devices");
        return;
    }
    let seed = seed();
    let mut rig = Rig::new(seed, Sizes { volume: 24, cdp: 160, reserve: 144 }, "");
    let mount = Mount::new(&rig.agent, &["mkfs.ext4", "-q", "-F", "-J", "size=4", "-b", "4096"], "ext4");
    rig.disks.record(seed, 30);
    let begun = now_ns();
    let kept = live_and_keep(&mount.folder, seed);
    drop(mount);
    let recording = rig.disks.recorded();
    let (out, tree) = (rig.agent.file("out"), rig.agent.file("tree"));
    let old = rig.agent.view_image("demo", kept[kept.len() / 2].synced);
    let new = rig.agent.live_image("demo");
    rig.agent.kill();
    lost_blocks_are_found_out(&old, &new, &kept, &out, &tree, seed);
    let look = |image: &[u8], at: u64, what: &str| {
        fs::write(&out, image).expect("write the image");
        assert_ext4_sound(&out, what);
        check_kept(&out, &tree, &kept, at).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    };
    let (cuts, mut viewed) = (rounds(10), 0);
    for number in 0..cuts {
        let mut rng = Rng::new(seed.wrapping_mul(1_000_003).wrapping_add(number as u64));
        let cut = usize::try_from(rng.below(recording.cuts() as u64 + 1)).expect("a place");
        let what = format!("CDP_SEED={seed}, cut {number}, event {cut} of {}", recording.cuts());
        let time = recording.time_ns(cut);
        start_on(&mut rig, &recording.power_cut(cut, &mut rng), &what);
        look(&rig.agent.live_image("demo"), time, &what);
        // Any instant before the cut, or the end of a sync: that is when most is promised.
        let synced: Vec<u64> = kept.iter().map(|file| file.synced).filter(|synced| *synced <= time).collect();
        let at = if synced.is_empty() || rng.percent(50) {
            begun + rng.below(time.max(begun + 1) - begun)
        } else {
            rng.pick(&synced)
        };
        if covers(&rig, at) {
            viewed += 1;
            look(&rig.agent.view_image("demo", at), at, &format!("{what}, view at {at}"));
        }
        rig.agent.kill();
    }
    println!("{cuts} power cuts, {viewed} views");
    assert!(viewed > 0, "no instant was covered: that shows nothing");
}
