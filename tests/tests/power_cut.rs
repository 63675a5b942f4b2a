//! Promise: whatever a power cut leaves on the CDP disk, the primary and in the state folder, the agent recovers from it:
//! every flushed write is there, of the others a prefix, no earlier view has changed, and a file system on the volume is sound
//! (design I1, I2, I3, I4).
//!
//! Method: the agent's disks and state folder are on a file system of ours that records every write and sync. Images that a
//! power cut may have left are built for many places of the recording, and the built agent is started on each. `CDP_SEED`
//! replays a run, `CDP_CUT` one cut of it: the recording differs from run to run, what is done with it does not.

use std::fs;
use std::path::Path;
use std::time::Duration;

use cdp_tests::faultfs::{FaultFs, Image, Recording};
use cdp_tests::load::Plan;
use cdp_tests::mount::{Mount, live_on};
use cdp_tests::rig::{CDP, PRIMARY, Rig, Sizes};
use cdp_tests::tools::{self, assert_ext4_sound, check_ext4};
use cdp_tests::{Rng, now_ns, rounds, seed};

/// Small, so that logs rotate, seal and are evicted while it is recorded.
const SIZES: Sizes = Sizes { volume: 4, cdp: 64, reserve: 56 };

/// Starts the agent on an image; it must come up, serve and protect.
fn start_on(rig: &mut Rig, image: &Image, what: &str) {
    rig.disks.restore(image);
    rig.agent.start_unserved();
    let info = rig.info();
    assert_eq!(info["health"], "ok", "{what}: {info}");
}

/// A place of the recording; one in four is at its end, where the agent stopped.
fn some_cut(recording: &Recording, rng: &mut Rng) -> usize {
    let cuts = recording.cuts();
    let back = if rng.percent(25) { cuts.min(20) } else { cuts };
    cuts - usize::try_from(rng.below(back as u64 + 1)).expect("a place")
}

/// The images of one recording, each tried; `cuts` of them.
fn try_cuts(rig: &mut Rig, recording: &Recording, seed: u64, cuts: usize, begun: u64) {
    let only: Option<usize> = std::env::var("CDP_CUT").ok().and_then(|cut| cut.parse().ok());
    let (mut lost, mut again, mut viewed) = (0, 0, 0);
    for number in 0..cuts {
        if only.is_some_and(|only| only != number) {
            continue;
        }
        let mut rng = Rng::new(seed.wrapping_mul(1_000_003).wrapping_add(number as u64));
        let cut = some_cut(recording, &mut rng);
        let what = format!("CDP_SEED={seed} CDP_CUT={number}, event {cut} of {}", recording.cuts());
        let time = recording.time_ns(cut);
        let image = recording.power_cut(cut, &mut rng);
        start_on(rig, &image, &what);
        // In a third of all cases the power goes again while it recovers, and again.
        let recovery_seed = rng.number();
        rig.disks.record(recovery_seed, 30);
        let live = rig.agent.live_image("demo");
        let checked = rig.oracle.lock().expect("no panic").check_power_cut(&live, time);
        let safe = checked.unwrap_or_else(|wrong| panic!("{what}: {wrong}\n{}", rig.agent.log_tail()));
        lost += usize::from(safe < time.saturating_sub(1_000_000));
        // What was promised last has not aged out, and is history.
        let reached = safe <= begun || covers(rig, safe);
        assert!(reached, "{what}: {safe} is not covered: {:?}", rig.agent.coverage("demo"));
        for _ in 0..2 {
            viewed += usize::from(check_some_view(rig, &mut rng, begun, time, safe, &what));
        }
        if rng.percent(30) {
            again += 1;
            for level in 0..2 {
                rig.agent.kill();
                let recovery = rig.disks.recorded();
                let second = usize::try_from(rng.below(recovery.cuts() as u64 + 1)).expect("a place");
                start_on(rig, &recovery.power_cut(second, &mut rng), &format!("{what}, cut again {level}"));
                rig.disks.record(recovery_seed, 30);
                assert!(
                    rig.agent.live_image("demo") == live,
                    "{what}: another cut during recovery gave another volume"
                );
            }
            viewed += usize::from(check_some_view(rig, &mut rng, begun, time, safe, &what));
        }
        // It goes on from there.
        let mut client = rig.agent.connect("demo");
        let before = now_ns();
        client.write_fua(0, &[0xA5; 4096]).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(rig.agent.view_image("demo", before) == live, "{what}: the view of what was recovered");
        client.close();
        if number % 4 == 0 {
            rig.agent.stop();
            let found = rig.agent.check_disk(&rig.disks.path_str(CDP));
            assert_eq!(found["sound"], true, "{what}: {found}");
            assert!(rig.disks.content(PRIMARY)[4096..] == live[4096..], "{what}: the primary after a stop");
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

/// A view of a random instant: right, or outside of what is covered. Answers whether it was looked at.
fn check_some_view(rig: &Rig, rng: &mut Rng, begun: u64, time: u64, safe: u64, what: &str) -> bool {
    let at = begun + rng.below(time.max(begun + 1) - begun);
    if !covers(rig, at) {
        return false;
    }
    let image = rig.agent.view_image("demo", at);
    let checked = rig.oracle.lock().expect("no panic").check_view_after_cut(&image, at, safe);
    checked.unwrap_or_else(|wrong| panic!("{what}: view at {at}: {wrong}"));
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
    try_cuts(&mut rig, &recording, seed, rounds(40), begun);
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
