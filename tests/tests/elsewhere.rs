//! Promise: what is in the history can be had elsewhere: as a file, as an increment, by NBD tools that know nothing of us; and the write that broke it
//! is found.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cdp_tests::local::{self, Loop, Mounted};
use cdp_tests::nbd;
use cdp_tests::process::{Agent, binaries};
use cdp_tests::{Rng, now_ns, rounds, seed, skip_unless_mountable, tools};
use serde_json::Value;

const SIZE: u64 = 16 << 20;
const BLOCK: u64 = 4096;

/// What is awaited happens within a minute.
fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ids of the views that are open.
fn views(agent: &Agent) -> Vec<String> {
    let listed = agent.ctl(&["view", "list"]);
    listed["views"].as_array().unwrap().iter().map(|view| view["id"].as_str().unwrap().to_owned()).collect()
}

/// A `cdpctl` call that answers in JSON and can be killed.
fn cdpctl(agent: &Agent, args: &[&str]) -> Command {
    let mut command = Command::new(binaries().join("cdpctl"));
    command
        .args(["--agent", &format!("unix:{}", agent.file("agent.sock").display()), "--output", "json"])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// kill -9, unless it has ended.
fn end(mut child: Child) {
    let _ = child.kill();
    child.wait().unwrap();
}

/// The blocks that extents touch.
fn blocks(extents: impl IntoIterator<Item = (u64, u64)>) -> BTreeSet<u64> {
    extents.into_iter().flat_map(|(offset, len)| offset / BLOCK..(offset + len).div_ceil(BLOCK)).collect()
}

/// The extents of a map that `wanted` picks, after a check that the map covers the whole volume without a gap.
fn extents(map: &Value, start: &str, wanted: impl Fn(&Value) -> bool) -> Vec<(u64, u64)> {
    let mut end = 0;
    let mut found = Vec::new();
    for extent in map.as_array().unwrap() {
        let (offset, len) = (extent[start].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        assert_eq!(offset, end, "{map}");
        end += len;
        if wanted(extent) {
            found.push((offset, len));
        }
    }
    assert_eq!(end, SIZE, "{map}");
    found
}

/// An instant, what the volume held then, and where it was written since the instant before in the list.
type State = (u64, Vec<u8>, Vec<(u64, u64)>);

/// Random writes, zeroes, discards and flushes; answers instants between them.
fn history(agent: &Agent, rng: &mut Rng, steps: usize) -> Vec<State> {
    let mut client = agent.connect("demo");
    let mut image = client.read_all().unwrap();
    let mut states = Vec::new();
    let mut written = Vec::new();
    for step in 0..steps {
        let len = rng.pick(&[512, 4096, 12288, 65536, 131_072]);
        let offset = rng.below((SIZE - len) / 512) * 512;
        let range = offset as usize..(offset + len) as usize;
        written.push((offset, len));
        if rng.percent(80) {
            let mut data = vec![0; len as usize];
            if !rng.percent(10) {
                rng.fill(&mut data);
            }
            client.write(offset, &data).unwrap();
            image[range].copy_from_slice(&data);
        } else {
            client.write_zeroes(offset, len as u32, 0).unwrap();
            image[range].fill(0);
        }
        if step % 10 == 9 {
            states.push((now_ns(), image.clone(), std::mem::take(&mut written)));
        }
    }
    client.close();
    states
}

/// Puts an increment onto a copy, as its list of blocks says.
fn apply(overlay: &Path, onto: &Path) {
    let (from, to) = (File::open(overlay).unwrap(), File::options().write(true).open(onto).unwrap());
    let blocks = fs::read_to_string(format!("{}.blocks", overlay.display())).unwrap();
    for line in blocks.lines() {
        let (offset, len) = line.split_once(' ').unwrap();
        let (offset, len): (u64, usize) = (offset.parse().unwrap(), len.parse().unwrap());
        let mut bytes = vec![0; len];
        from.read_exact_at(&mut bytes, offset).unwrap();
        to.write_all_at(&bytes, offset).unwrap();
    }
}

/// Goal: for any two instants, the increment put onto the state of the first is the state of the second, byte for byte; what nbdinfo and qemu-img make of
/// `qemu:dirty-bitmap:` says the same of every block: what differs is dirty, and so is what was written and nothing else.
/// Method: a random history with a rotation, a revert and a restart in it; random pairs; raw overlays and qcow2 chains.
#[test]
fn increments_make_one_state_of_another() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let mut rng = Rng::new(seed());
    let mut states = history(&agent, &mut rng, 120);
    agent.ctl(&["disable", "demo"]);
    agent.ctl(&["enable", "demo"]);
    states.extend(history(&agent, &mut rng, 100));
    // Back to the middle of it: what a revert puts back has changed, too.
    let (middle, reverted) = (states.len() / 2, states.len());
    let (target, image, _) = states[middle].clone();
    agent.ctl(&["revert", "demo", "--at", &target.to_string()]);
    assert!(agent.live_image("demo") == image);
    agent.kill();
    agent.start();
    states.extend(history(&agent, &mut rng, 100));
    for pair in 0..rounds(6) {
        let (a, b) = (rng.below(states.len() as u64) as usize, rng.below(states.len() as u64) as usize);
        let ((from, before, _), (to, after, _)) = (&states[a.min(b)], &states[a.max(b)]);
        let (since, at) = (from.to_string(), to.to_string());
        let file = |name: &str| agent.file(&format!("{pair}-{name}"));
        let (base, overlay, qcow2, whole) = (file("base.img"), file("inc.img"), file("inc.qcow2"), file("whole.qcow2"));
        agent.ctl(&["export", "demo", "--at", &since, base.to_str().unwrap()]);
        assert!(&fs::read(&base).unwrap() == before, "the state at {from} as a raw file");
        let done = agent.ctl(&["export", "demo", "--at", &at, "--since", &since, overlay.to_str().unwrap()]);
        let dirty = done["changed_bytes"].as_u64().unwrap();
        let format = ["--format", "qcow2"];
        let backing = ["--backing", base.to_str().unwrap()];
        let args = ["export", "demo", "--at", &at, "--since", &since, qcow2.to_str().unwrap()];
        agent.ctl(&[&args[..], &format[..], &backing[..]].concat());
        agent.ctl(&[&["export", "demo", "--at", &at, whole.to_str().unwrap()][..], &format[..]].concat());
        let expected = file("expected.img");
        fs::write(&expected, after).unwrap();
        for image in [&qcow2, &whole] {
            tools::run("qemu-img", ["check", "-f", "qcow2", image.to_str().unwrap()]);
            let (image, expected) = (image.to_str().unwrap(), expected.to_str().unwrap());
            tools::run("qemu-img", ["compare", "-f", "qcow2", "-F", "raw", image, expected]);
        }
        // What other people's tools are told is what was exported.
        let view = agent.open_view("demo", at);
        let map = tools::run("nbdinfo", ["--json", &format!("--map=qemu:dirty-bitmap:since-{since}"), &view.nbd_uri]);
        let map: Value = serde_json::from_str(&map).unwrap();
        let told = extents(&map, "offset", |extent| extent["type"] == 1);
        let listed = fs::read_to_string(format!("{}.blocks", overlay.display())).unwrap();
        let listed: Vec<(u64, u64)> = listed
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(offset, len)| (offset.parse().unwrap(), len.parse().unwrap()))
            .collect();
        assert_eq!(told, listed, "what nbdinfo is told is what was exported");
        assert_eq!(told.iter().map(|(_, len)| len).sum::<u64>(), dirty);
        let differing: BTreeSet<u64> = (0..SIZE / BLOCK)
            .filter(|block| {
                let range = (block * BLOCK) as usize..((block + 1) * BLOCK) as usize;
                before[range.clone()] != after[range]
            })
            .collect();
        // A revert counts whole logs, from its target's on: what it may have put back is all that was written before it.
        let across = a.min(b) < reverted && a.max(b) >= reverted;
        let written = states[..=a.max(b)].iter().skip(if across { 0 } else { a.min(b) + 1 });
        let written = blocks(written.flat_map(|(.., written)| written.clone()));
        let told = blocks(told);
        assert_eq!(&differing - &told, BTreeSet::new(), "blocks that differ and are not dirty, from {from} to {to}");
        assert_eq!(&told - &written, BTreeSet::new(), "blocks that are dirty and nobody wrote, from {from} to {to}");
        if !across {
            assert_eq!(
                &written - &told,
                BTreeSet::new(),
                "blocks that were written and are not dirty, from {from} to {to}"
            );
        }
        let socket = agent.socket();
        let bitmap = format!(
            "driver=nbd,export={},server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:since-{since}",
            view.id,
            socket.display()
        );
        let map: Value =
            serde_json::from_str(&tools::run("qemu-img", ["map", "--output=json", "--image-opts", &bitmap])).unwrap();
        // QEMU shows a dirty extent as one without data.
        assert_eq!(blocks(extents(&map, "start", |extent| extent["data"] == false)), told, "{map}");
        agent.close_view(&view);
        apply(&overlay, &base);
        assert!(&fs::read(&base).unwrap() == after, "the state at {from} with the increment is not that at {to}");
        for path in [base, overlay, qcow2, whole, expected] {
            fs::remove_file(path).unwrap();
        }
    }
    assert_eq!(agent.ctl(&["view", "list"])["views"], serde_json::json!([]), "exports leave no view");
    let view = agent.open_view("demo", states[3].0);
    tools::run_refused("nbdinfo", ["--map=qemu:dirty-bitmap:since-1", &view.nbd_uri]);
    tools::run_refused("nbdinfo", [format!("--map=qemu:dirty-bitmap:since-{}", states[9].0), view.nbd_uri.clone()]);
    tools::run_refused("nbdinfo", [format!("--map=qemu:dirty-bitmap:since-{}", states[1].0), agent.uri("demo")]);
    agent.stop();
}

/// Goal: an export that is killed goes on where it was, and ends with the same bytes; none leaves a view, or closes somebody else's.
#[test]
fn an_export_that_was_killed_goes_on() {
    let mut agent = Agent::dev("512MiB", "2GiB");
    let mut client = agent.connect("demo");
    let mut megabyte = vec![0; 1 << 20];
    for at in 0..384u64 {
        Rng::new(at).fill(&mut megabyte);
        client.write(at << 20, &megabyte).unwrap();
    }
    client.close();
    let at = now_ns().to_string();
    for (format, name) in [("raw", "all.img"), ("qcow2", "all.qcow2")] {
        let target = agent.file(name);
        let command = || cdpctl(&agent, &["export", "demo", "--at", &at, "--format", format, target.to_str().unwrap()]);
        let notes = format!("{}.cdp-export", target.display());
        // Killed once it has noted that something is done: which file it is, nothing, something.
        let noted = |child: &mut Child| {
            while fs::read_to_string(&notes).map_or(0, |text| text.lines().count()) < 4 {
                assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
            }
        };
        let mut child = command().spawn().unwrap();
        noted(&mut child);
        end(child);
        until("a killed export leaves a view", || views(&agent).is_empty());
        let other = ["export", "demo", "--at", "now", "--format", format, target.to_str().unwrap()];
        agent.ctl_refused(&other, &["asked with", "--restart"]);
        // Somebody else looks at the same instant meanwhile, and still does when the export is done.
        let child = command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("the export opens no view", || !views(&agent).is_empty());
        let view = agent.open_view("demo", &at);
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let done: Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(done["resumed"], true);
        assert_eq!(views(&agent), [view.id.as_str()], "the other one's view, and no other");
        tools::run("qemu-img", ["compare", "-f", format, "-F", "raw", target.to_str().unwrap(), &view.nbd_uri]);
        agent.close_view(&view);
        let said = agent.ctl_refused(&["export", "demo", "--at", &at, target.to_str().unwrap()], &["is there already"]);
        assert!(!said.said.contains("--restart"), "it is done, there is nothing to begin anew: {said}");
        fs::remove_file(&target).unwrap();
        // Begun anew, from half of another one.
        let mut child = command().spawn().unwrap();
        noted(&mut child);
        end(child);
        let anew = [&other[..], &["--restart"]].concat();
        assert_eq!(agent.ctl(&anew)["resumed"], false);
        agent.ctl_refused(&anew, &["is no export that was interrupted", "stays as it is"]);
        fs::remove_file(target).unwrap();
    }
    agent.stop();
}

/// Goal: however early an export is killed, the same words go on with it.
/// Method: killed at the very moment at which its file is there, and at random ones.
#[test]
fn an_export_that_was_killed_early_goes_on() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let mut rng = Rng::new(seed());
    let (at, image, _) = history(&agent, &mut rng, 60).pop().unwrap();
    let at = at.to_string();
    for round in 0..rounds(24) {
        let target = agent.file(&format!("{round}.img"));
        let format = ["raw", "qcow2"][round % 2];
        let args = ["export", "demo", "--at", &at, "--format", format, target.to_str().unwrap()];
        let mut child = cdpctl(&agent, &args).spawn().unwrap();
        match round % 4 {
            0 | 1 => while !target.exists() && child.try_wait().unwrap().is_none() {},
            _ => std::thread::sleep(Duration::from_micros(rng.below(60_000))),
        }
        end(child);
        let notes = format!("{}.cdp-export", target.display());
        if !target.exists() || Path::new(&notes).exists() {
            agent.ctl(&args);
        }
        let expected = agent.file("expected.img");
        fs::write(&expected, &image).unwrap();
        let (target, expected) = (target.to_str().unwrap(), expected.to_str().unwrap());
        tools::run("qemu-img", ["compare", "-f", format, "-F", "raw", target, expected]);
        assert!(!Path::new(&notes).exists());
    }
    until("a killed export leaves a view", || views(&agent).is_empty());
    agent.stop();
}

/// Goal: an export removes nothing that is not its own, makes nothing among the devices, and takes no backing file that cannot be right.
#[test]
fn an_export_touches_nothing_that_is_not_its_own() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let mut client = agent.connect("demo");
    let from = now_ns().to_string();
    client.write(0, &[7; 4096]).unwrap();
    client.flush().unwrap();
    client.close();
    let primary = agent.info("demo")["path"].as_str().unwrap().to_owned();
    let refused = |target: &str, more: &[&str], words: &[&str]| {
        let args = [&["export", "demo", "--at", "now", target], more].concat();
        agent.ctl_refused(&args, words).said
    };
    let held = fs::read(&primary).unwrap();
    refused(&primary, &["--restart"], &["is no export that was interrupted"]);
    assert!(!refused(&primary, &[], &["is there already"]).contains("--restart"));
    // Notes that are of another file do not make it ours.
    let notes = format!("{primary}.cdp-export");
    for odd in ["", "mine", "{\"version\":2}\n"] {
        fs::write(&notes, odd).unwrap();
        refused(&primary, &["--restart"], &["is not what an export notes"]);
        assert_eq!(fs::read_to_string(&notes).unwrap(), odd);
    }
    fs::remove_file(&notes).unwrap();
    assert!(fs::read(&primary).unwrap() == held, "the volume's own file");
    refused("/dev/cdp-no-device", &[], &["no files in /dev"]);
    assert!(!Path::new("/dev/cdp-no-device").exists());
    // An increment on a file that is not there, or is not as long as the volume was.
    let (target, base) = (agent.file("new.qcow2"), agent.file("base.img"));
    let increment = ["--since", &from, "--format", "qcow2", "--backing", "base.img"];
    let name = base.to_str().unwrap();
    refused(target.to_str().unwrap(), &increment, &[name, "no such file"]);
    for bytes in [0, SIZE - 512, SIZE + 512] {
        File::create(&base).unwrap().set_len(bytes).unwrap();
        refused(target.to_str().unwrap(), &increment, &[name, &format!("{bytes} bytes"), &SIZE.to_string()]);
    }
    assert!(!target.exists() && views(&agent).is_empty());
    fs::remove_file(&base).unwrap();
    agent.ctl(&["export", "demo", "--at", &from, name]);
    agent.ctl(&[&["export", "demo", "--at", "now", target.to_str().unwrap()], &increment[..]].concat());
    let bare = agent.file("bare.qcow2");
    let args = [&["export", "demo", "--at", "now", bare.to_str().unwrap()], &increment[..4]].concat();
    let said = cdpctl(&agent, &args).stderr(Stdio::piped()).output().unwrap();
    assert!(said.status.success() && String::from_utf8_lossy(&said.stderr).contains("read as zeroes"), "{said:?}");
    agent.stop();
}

/// One request in flight after the other on `clients` connections: `writes` of them, each its own change. Answers how many writes were acked when the
/// broken one was sent, and when.
fn many_writes(agent: &Agent, blocks: &Arc<Vec<u64>>, writes: u64, broken: u64) {
    const CLIENTS: u64 = 4;
    const DEPTH: u64 = 64;
    let next = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (socket, next, blocks) = (agent.socket(), Arc::clone(&next), Arc::clone(blocks));
            std::thread::spawn(move || {
                let (mut sender, mut receiver) = nbd::Client::connect(&socket, "demo").unwrap().split();
                let (mut sent, mut got) = (0, 0);
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= writes {
                        break;
                    }
                    // The broken one is the only one that writes there.
                    let place = if number == broken { 0 } else { 1 + number % (blocks.len() as u64 - 1) };
                    let offset = blocks[usize::try_from(place).unwrap()] * 4096;
                    // One in eight carries bytes; a write of zeroes is a change like any other.
                    if number == broken || number % 8 == 0 {
                        sender
                            .send(
                                nbd::Request { command: nbd::CMD_WRITE, flags: 0, offset, len: 4096 },
                                &vec![0x5A; 4096],
                            )
                            .unwrap();
                    } else {
                        sender
                            .send(nbd::Request { command: nbd::CMD_WRITE_ZEROES, flags: 0, offset, len: 4096 }, &[])
                            .unwrap();
                    }
                    sent += 1;
                    while sent - got >= DEPTH {
                        assert_eq!(receiver.receive().unwrap().error, 0);
                        got += 1;
                    }
                }
                while got < sent {
                    assert_eq!(receiver.receive().unwrap().error, 0);
                    got += 1;
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Makes an ext4 on the volume with one file, `data`, of so many blocks of 0x11; answers which blocks of the volume they are.
fn file_of_blocks(agent: &Agent, blocks: u64) -> Vec<u64> {
    let (volume, content) = (agent.file("volumes/demo"), agent.file("content"));
    fs::create_dir(&content).unwrap();
    fs::write(content.join("data"), vec![0x11; usize::try_from(blocks * 4096).unwrap()]).unwrap();
    let (volume, content) = (volume.to_str().unwrap(), content.to_str().unwrap());
    local::run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-O", "^has_journal", "-d", content, volume]);
    let list = local::run("debugfs", &["-R", "blocks /data", volume]);
    let list: Vec<u64> = list.split_whitespace().filter_map(|block| block.parse().ok()).collect();
    assert_eq!(list.len() as u64, blocks);
    list
}

/// Goal: bisect names the very write that broke it, within log2 + 2 runs, and goes on after a crash.
/// Method: many changes of a file in an ext4, as by a guest that writes past its cache; one of them puts bytes into the file's first block, where none may
/// be. The check compares the file in the mounted view; where nothing can be mounted, it is qemu-io on the view. In between, cdpctl is killed.
#[test]
fn bisect_finds_the_write_among_very_many() {
    let optimised = binaries().ends_with("release");
    // CDP_BISECT_WRITES: another number, to measure.
    let asked = std::env::var("CDP_BISECT_WRITES").ok().and_then(|writes| writes.parse().ok());
    let writes: u64 = asked.unwrap_or(if optimised { 1_000_000 } else { 30_000 });
    let mut agent = Agent::dev("16MiB", "4GiB");
    let mut rng = Rng::new(seed());
    agent.ctl(&["edit", "demo", "--reserve-capacity", "3GiB"]);
    let whole = agent.file("whole");
    fs::write(&whole, [0x11; 4096]).unwrap();
    let in_file = local::why_not().is_none();
    let (blocks, sound) = if in_file { (file_of_blocks(&agent, 2049), 0x11) } else { ((0..2049).collect(), 0) };
    let base = blocks[0] * 4096;
    let from = now_ns();
    let broken = writes / 10 + rng.below(writes * 8 / 10);
    many_writes(&agent, &Arc::new(blocks), writes, broken);
    let to = now_ns();
    let state = agent.file("bisect.json");
    let seen = agent.file("seen");
    let check = match in_file {
        true => format!("echo run >> {}; cmp -s -n 4096 \"$CDP_VIEW_MOUNT/data\" {}", seen.display(), whole.display()),
        false => format!(
            "echo run >> {}; qemu-io -r -f raw -c 'read -P 0 0 4096' \"$CDP_VIEW_NBD_URI\" | grep -q 'verification failed' && exit 1 || exit 0",
            seen.display()
        ),
    };
    let command = || {
        let mut command = Command::new(binaries().join("cdpctl"));
        command
            .args([
                "--agent",
                &format!("unix:{}", agent.file("agent.sock").display()),
                "--output",
                "json",
                "bisect",
                "demo",
            ])
            .args(["--from", &from.to_string(), "--to", &to.to_string(), "--state", state.to_str().unwrap()])
            .args(in_file.then_some("--mount"))
            .args(["--", "sh", "-c", &check])
            .stdin(Stdio::null());
        command
    };
    let runs = || fs::read_to_string(&seen).map_or(0, |text| text.lines().count() as u64);
    let mut child = command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while runs() < 5 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let killed_after = runs();
    let done = command().output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let found: Value = serde_json::from_slice(&done.stdout).unwrap();
    println!("{found}");
    assert_eq!(found["changes"], writes);
    assert_eq!((found["offset"].as_u64(), found["length"].as_u64()), (Some(base), Some(4096)));
    let bound = u64::from(writes.next_power_of_two().trailing_zeros()) + 2;
    assert!(found["runs"].as_u64().unwrap() <= bound, "{found}, at most {bound}");
    // The run that was killed is done once more, and that is all that the crash cost.
    assert!(runs() <= found["runs"].as_u64().unwrap() + 1, "{} after {killed_after}", runs());
    let (good, bad) = (found["last_good"].as_u64().unwrap(), found["first_bad"].as_u64().unwrap());
    assert_eq!(good + 1, bad);
    for (at, expected) in [(good, sound), (bad, 0x5A)] {
        let view = agent.open_view("demo", at);
        let mut client = agent.connect(&view.id);
        assert_eq!(client.read(base, 4096).unwrap(), vec![expected; 4096], "at {at}");
        client.close();
        agent.close_view(&view);
    }
    assert_eq!(agent.ctl(&["view", "list"])["views"], serde_json::json!([]), "it leaves no view");
    local::assert_nothing_attached(agent.dir());
    let mut log = String::new();
    File::open(state.with_extension("log")).unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("goes on after") && log.contains("found after"), "{log}");
    assert!(!state.exists());
    agent.stop();
}

/// Goal: a question without an answer is refused, and says why.
#[test]
fn bisect_refuses_what_has_no_answer() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let from = now_ns();
    let mut client = agent.connect("demo");
    client.write(0, &[1; 4096]).unwrap();
    client.write(4096, &[2; 4096]).unwrap();
    client.close();
    let (from, to, state) = (from.to_string(), now_ns().to_string(), agent.file("state.json"));
    let ask = |from: &str, to: &str, check: &str, words: &[&str]| {
        let state = state.to_str().unwrap();
        agent.ctl_refused(
            &["bisect", "demo", "--from", from, "--to", to, "--state", state, "--", "sh", "-c", check],
            words,
        );
    };
    ask(&from, &to, "exit 0", &["--to", "good there too"]);
    ask(&from, &to, "exit 1", &["--from", "bad there already"]);
    ask(&to, &from, "exit 0", &["must lie before"]);
    ask(&to, "now", "exit 0", &["nothing was written"]);
    ask(&from, &to, "exit 125", &["could not judge"]);
    // That search is remembered; another question is not taken for it.
    ask(&from, "now", "exit 125", &["asked with", "--restart"]);
    agent.ctl(&["disable", "demo"]);
    agent.ctl(&["enable", "demo"]);
    fs::remove_file(&state).unwrap();
    ask(&from, "now", "exit 0", &["not kept"]);
    agent.stop();
}

/// Goal: however a search is broken off, no view stays.
#[test]
fn a_search_that_is_broken_off_leaves_no_view() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let from = now_ns().to_string();
    let mut client = agent.connect("demo");
    for at in 0..8 {
        client.write(at * 4096, &[1; 4096]).unwrap();
    }
    client.close();
    let (to, state, begun) = (now_ns().to_string(), agent.file("state.json"), agent.file("begun"));
    let log = agent.file("log");
    let search = |state: &str, command: &[&str]| {
        let _ = fs::remove_file(&begun);
        let args = ["bisect", "demo", "--from", &from, "--to", &to, "--state", state];
        let args = [&args[..], &["--restart", "--log", log.to_str().unwrap(), "--"], command].concat();
        cdpctl(&agent, &args).spawn().unwrap()
    };
    let state = state.to_str().unwrap();
    let nowhere = agent.file("no/folder/state.json");
    for (state, command) in [
        (state, &["sh", "-c", "exit 125"][..]),
        (state, &["sh", "-c", "kill -9 $$"]),
        (state, &["/no/such/command"]),
        (nowhere.to_str().unwrap(), &["true"]),
    ] {
        let ended = search(state, command).wait().unwrap();
        assert!(!ended.success(), "{command:?}");
        until(&format!("a view stays after {command:?}"), || views(&agent).is_empty());
    }
    let sleep = format!("touch {}; exec sleep 1", begun.display());
    for signal in ["KILL", "INT", "TERM"] {
        let mut child = search(state, &["sh", "-c", &sleep]);
        until("the command begins", || begun.exists());
        assert!(!views(&agent).is_empty());
        tools::run("kill", [format!("-{signal}"), child.id().to_string()]);
        assert!(!child.wait().unwrap().success());
        until(&format!("a view stays after {signal}"), || views(&agent).is_empty());
    }
    agent.stop();
}

/// Goal: a verdict on a view that was not served to the end does not count; the search goes on from there and names the right write.
/// Method: the command kills the agent and says that the state is bad; the agent is down when it ends, or up again.
#[test]
fn a_verdict_without_the_view_does_not_count() {
    let mut agent = Agent::dev("16MiB", "1GiB");
    let mut client = agent.connect("demo");
    let from = now_ns().to_string();
    for at in 0..40u64 {
        client.write(at * 4096, &[if at == 30 { 0x5A } else { 1 }; 4096]).unwrap();
    }
    client.flush().unwrap();
    client.close();
    let (to, state) = (now_ns().to_string(), agent.file("state.json"));
    for up_again in [false, true] {
        let (pid, done) = (agent.file("pid"), agent.file("done"));
        let _ = fs::remove_file(&done);
        fs::write(&pid, agent.pid().to_string()).unwrap();
        // Once, on a state between the good one and the broken one.
        let check = format!(
            "if [ $CDP_BISECT_STATE -gt 0 -a $CDP_BISECT_STATE -lt 31 -a -e {pid} ]; then \
             kill -9 $(cat {pid}); rm {pid}; until [ -e {done} ]; do sleep 0.02; done; exit 1; fi; \
             said=$(qemu-io -r -f raw -c 'read -P 0x5A 122880 512' \"$CDP_VIEW_NBD_URI\") || [ -n \"$said\" ] || exit 126; \
             echo \"$said\" | grep -q 'verification failed'",
            pid = pid.display(),
            done = done.display()
        );
        let args = ["bisect", "demo", "--from", &from, "--to", &to, "--state", state.to_str().unwrap(), "--restart"];
        let args = |restart: bool| [&args[..args.len() - usize::from(!restart)], &["--", "sh", "-c", &check]].concat();
        let child = cdpctl(&agent, &args(true)).stderr(Stdio::piped()).spawn().unwrap();
        until("the agent is killed", || !pid.exists());
        agent.wait_for_end();
        if up_again {
            agent.start();
        }
        fs::write(&done, "").unwrap();
        let said = child.wait_with_output().unwrap();
        let words = String::from_utf8_lossy(&said.stderr);
        assert!(!said.status.success() && words.contains("does not count"), "{words}");
        if !up_again {
            agent.start();
        }
        let found = agent.ctl(&args(false));
        assert_eq!((found["offset"].as_u64(), found["number"].as_u64()), (Some(30 * 4096), Some(31)), "{found}");
        assert!(views(&agent).is_empty());
    }
    agent.stop();
}

/// Goal: a dry run names the files that a revert would change, and bisect judges by a file in a mounted view.
/// Method: an ext4 on the volume, mounted by the kernel; files are written, replaced, removed, each synced, with instants in between. A new
/// text takes its file's name only when it is on the disk: a file that is rewritten in place is empty for a moment, and so neither good nor
/// bad, and a search that met such a state rightly found a later write (once, in a run on a busy machine).
#[test]
fn a_dry_run_names_files_and_bisect_judges_them() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("64MiB", "1GiB");
    let volume = agent.file("volumes/demo");
    let folder = agent.file("mnt");
    local::run("mkfs.ext4", &["-q", "-F", volume.to_str().unwrap()]);
    let (mut early, mut broken) = (0, 0);
    {
        let device = Loop::on(&volume, 0, 0);
        let mounted = Mounted::new(&device.0, &folder);
        let synced = |name: &str, text: &str| {
            let whole = mounted.path("whole");
            fs::write(&whole, text).unwrap();
            mounted.sync();
            fs::rename(&whole, mounted.path(name)).unwrap();
            mounted.sync();
            std::thread::sleep(std::time::Duration::from_millis(10)); // the kernel's clock of files ticks slowly
            now_ns()
        };
        synced("kept", "kept");
        synced("removed", "removed");
        for round in 0..8 {
            let at = synced("config", &format!("{} {round}", if round < 5 { "good" } else { "bad" }));
            match round {
                2 => early = at,
                5 => broken = at,
                _ => {}
            }
        }
        fs::remove_file(mounted.path("removed")).unwrap();
        synced("new", "new");
        mounted.unmount();
    }
    let early = early.to_string();
    let dry = agent.ctl(&["revert", "demo", "--at", &early, "--dry-run"]);
    let told: Vec<_> =
        dry["files"].as_array().unwrap_or_else(|| panic!("no files: {dry}")).iter().map(|f| f.to_string()).collect();
    let has =
        |path: &str, fate: &str| told.iter().any(|one| one.contains(&format!("\"{path}\"")) && one.contains(fate));
    assert!(has("/config", "differs") && has("/removed", "comes back") && has("/new", "vanishes"), "{told:?}");
    assert!(!told.iter().any(|one| one.contains("/kept")), "{told:?}");
    let found = agent.ctl(&[
        "bisect",
        "demo",
        "--from",
        &early,
        "--to",
        "now",
        "--state",
        agent.file("state.json").to_str().unwrap(),
        "--mount",
        "--",
        "sh",
        "-c",
        "! grep -q bad \"$CDP_VIEW_MOUNT/config\"",
    ]);
    let bad = found["first_bad"].as_u64().unwrap();
    assert!(bad <= broken && bad > early.parse().unwrap(), "{found}, and the file was bad at {broken}");
    agent.stop();
    local::assert_nothing_attached(agent.dir());
}
