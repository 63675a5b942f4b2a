//! Views as admins use them: mounted by file system and partition, single files out of them, and nothing left attached afterwards, also
//! when the agent or `cdpctl` is killed in the middle.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cdp_tests::local::{Loop, Mounted, assert_nothing_attached, attached, mounts_under, run};
use cdp_tests::process::{Agent, CONFIG, binaries, exit};
use cdp_tests::{Rng, rounds, seed, skip_unless_mountable};
use serde_json::Value;

/// XFS wants at least 300 MiB.
const SIZE: u64 = 400 << 20;
const SECTOR: u64 = 512;

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

fn mark(agent: &Agent, name: &str) -> String {
    agent.ctl(&["mark", "demo", "--name", name])["time"].as_u64().expect("its time").to_string()
}

/// A file system on the volume, as a guest would have it.
struct Disk {
    agent: Agent,
    /// Number of the partition with the file system.
    partition: Option<u64>,
    offset: u64,
    size: u64,
}

impl Disk {
    /// Makes a file system, on the whole disk or in the second of two partitions (the first has another one).
    fn make(kind: &str, partitioned: bool) -> Self {
        let agent = Agent::dev(&SIZE.to_string(), "2GiB");
        let file = agent.file("volumes/demo");
        let mut disk = Self { agent, partition: None, offset: 0, size: 0 };
        if partitioned {
            let table = disk.agent.file("table");
            fs::write(&table, "label: gpt\nstart=2048, size=16384\nstart=20480, size=794624\n")
                .expect("write the table");
            run(
                "sh",
                &["-c", &format!("sfdisk --quiet --no-reread --no-tell-kernel {} <{}", text(&file), text(&table))],
            );
            disk.partition = Some(2);
            disk.offset = 20480 * SECTOR;
            disk.size = 794_624 * SECTOR;
            let boot = Loop::on(&file, 2048 * SECTOR, 16384 * SECTOR);
            run("mkfs.ext2", &["-q", "-F", "-L", "boot", &boot.0]);
        }
        let device = disk.device();
        let quiet = if kind == "btrfs" { "--quiet" } else { "-q" };
        let force = if kind == "ext4" { "-F" } else { "-f" };
        run(&format!("mkfs.{kind}"), &[quiet, force, &device.0]);
        drop(device);
        disk
    }

    fn device(&self) -> Loop {
        Loop::on(&self.agent.file("volumes/demo"), self.offset, self.size)
    }

    /// `--partition N`, where there are several.
    fn which<'a>(&self, args: &[&'a str]) -> Vec<&'a str> {
        let mut args = args.to_vec();
        if self.partition.is_some() {
            args.extend(["--partition", "2"]);
        }
        args
    }

    fn open(&self, args: &[&str]) -> Value {
        self.agent.ctl(&self.which(&[&["view", "open", "demo"], args].concat()))
    }
}

/// A named instant at which a read-only mount, which replays nothing, shows everything. XFS leaves what `sync` wrote in its log alone: there the
/// file system is frozen for it.
fn guest_instant(disk: &Disk, guest: &Mounted, kind: &str, name: &str) -> String {
    guest.sync();
    if kind != "xfs" {
        return mark(&disk.agent, name);
    }
    run("fsfreeze", &["--freeze", text(&guest.0)]);
    let marked = disk.agent.try_ctl(&["mark", "demo", "--name", name]);
    run("fsfreeze", &["--unfreeze", text(&guest.0)]);
    marked.unwrap_or_else(|refusal| panic!("mark: {refusal}"))["time"].as_u64().expect("its time").to_string()
}

/// What a test of one file system does; the guest writes, and looks back.
fn mounted_listed_copied_and_closed(kind: &str, partitioned: bool) {
    let mut disk = Disk::make(kind, partitioned);
    let device = disk.device();
    let guest = Mounted::new(&device.0, &disk.agent.file("guest"));
    fs::create_dir_all(guest.path("etc/conf")).unwrap();
    fs::write(guest.path("etc/conf/one"), "first\n").unwrap();
    fs::write(guest.path("etc/big"), vec![7; 3 << 20]).unwrap();
    std::os::unix::fs::symlink("/etc/conf", guest.path("link")).unwrap();
    let old = guest_instant(&disk, &guest, kind, "old");
    fs::write(guest.path("etc/conf/one"), "second\n").unwrap();
    fs::remove_file(guest.path("etc/big")).unwrap();
    let new = guest_instant(&disk, &guest, kind, "new");
    guest.unmount();
    drop(device);
    let agent = &disk.agent;
    assert_nothing_attached(agent.dir());

    if partitioned {
        let refused = agent.ctl_refused(
            &["view", "open", "demo", "--at", &old, "--mount", text(&agent.file("x"))],
            &["boot", "partition"],
        );
        assert_eq!(refused.code, Some(exit::USAGE));
        assert_eq!(agent.ctl(&["view", "list"])["views"], Value::Array(Vec::new()), "together or not at all");
    }
    // Single files, without mounting by hand.
    let list = agent.ctl(&disk.which(&["view", "ls", "demo", "/etc", "--at", &old]));
    let names: Vec<_> = list["entries"].as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["big", "conf"]);
    let out = agent.file("out");
    fs::create_dir(&out).unwrap();
    agent.ctl(&disk.which(&["view", "cp", "demo", "/etc/big", text(&out), "--at", &old]));
    assert!(fs::read(out.join("big")).unwrap() == vec![7; 3 << 20]);
    // A link in there means the directory in there, not this host's.
    agent.ctl(&disk.which(&["view", "cp", "demo", "/link", text(&out.join("conf")), "--at", &new]));
    assert_eq!(fs::read_to_string(out.join("conf/one")).unwrap(), "second\n");
    let none = out.join("none");
    let missing = disk.which(&["view", "cp", "demo", "/etc/big", text(&none), "--at", &new]);
    agent.ctl_refused(&missing, &["no such file"]);
    assert_nothing_attached(agent.dir());
    assert_eq!(agent.ctl(&["view", "list"])["views"], Value::Array(Vec::new()));

    // Mounted as it was, read-only.
    let dir = agent.file("looked-at");
    let view = disk.open(&["--at", &old, "--mount", text(&dir), "--owner", "anna"]);
    assert_eq!((view["mount"].as_str(), view["fstype"].as_str()), (Some(text(&dir)), Some(kind)), "{view}");
    assert_eq!(fs::read_to_string(dir.join("etc/conf/one")).unwrap(), "first\n");
    assert_eq!(fs::metadata(dir.join("etc/big")).unwrap().len(), 3 << 20);
    assert!(fs::write(dir.join("new"), "x").is_err(), "it is read-only");
    let listed = &agent.ctl(&["view", "list"])["views"][0];
    assert_eq!((&listed["mount"], &listed["owner"]), (&view["mount"], &Value::from("anna")), "{listed}");
    let id = view["id"].as_str().unwrap().to_owned();
    let busy = fs::File::open(dir.join("etc/big")).unwrap();
    let refused = agent.ctl_refused(&["view", "close", &id], &["busy"]);
    assert_eq!(refused.code, Some(exit::REFUSED));
    assert_eq!(fs::read_to_string(dir.join("etc/conf/one")).unwrap(), "first\n", "it stays as it was");
    drop(busy);

    // A restart and a kill: it is mounted again, under the same id.
    for killed in [false, true] {
        if killed {
            disk.agent.kill();
        } else {
            disk.agent.stop();
            assert_nothing_attached(disk.agent.dir());
        }
        disk.agent.start();
        let listed = &disk.agent.ctl(&["view", "list"])["views"][0];
        assert_eq!((listed["id"].as_str(), listed["mount"].as_str()), (Some(&*id), Some(text(&dir))), "{listed}");
        assert_eq!(fs::read_to_string(dir.join("etc/conf/one")).unwrap(), "first\n", "killed {killed}");
    }
    let agent = &disk.agent;
    agent.ctl(&["view", "close", &id]);
    assert!(!dir.exists(), "it was made for the mount");
    assert_nothing_attached(agent.dir());

    // On scratch the file system brings itself in order and takes writes, which touch nothing else.
    let view = disk.open(&["--at", &old, "--mount", text(&dir), "--writable"]);
    fs::write(dir.join("etc/conf/one"), "scratch\n").unwrap();
    fs::write(dir.join("etc/conf/more"), vec![1; 1 << 20]).unwrap();
    run("sync", &["-f", text(&dir)]);
    agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
    assert_nothing_attached(agent.dir());
    let again = disk.open(&["--at", &old, "--mount", text(&dir)]);
    assert_eq!(fs::read_to_string(dir.join("etc/conf/one")).unwrap(), "first\n");
    // In use, and forced.
    let busy = fs::File::open(dir.join("etc/big")).unwrap();
    agent.ctl(&["view", "close", again["id"].as_str().unwrap(), "--force"]);
    assert!(mounts_under(&dir).is_empty());
    drop(busy);
    assert_nothing_attached(agent.dir());
    disk.agent.stop();
}

#[test]
fn ext4_on_the_whole_disk() {
    skip_unless_mountable!();
    mounted_listed_copied_and_closed("ext4", false);
}

#[test]
fn ext4_in_a_partition() {
    skip_unless_mountable!();
    mounted_listed_copied_and_closed("ext4", true);
}

#[test]
fn xfs_on_the_whole_disk() {
    skip_unless_mountable!();
    mounted_listed_copied_and_closed("xfs", false);
}

#[test]
fn xfs_in_a_partition() {
    skip_unless_mountable!();
    mounted_listed_copied_and_closed("xfs", true);
}

#[test]
fn btrfs_on_the_whole_disk() {
    skip_unless_mountable!();
    mounted_listed_copied_and_closed("btrfs", false);
}

#[test]
fn btrfs_in_a_partition() {
    skip_unless_mountable!();
    mounted_listed_copied_and_closed("btrfs", true);
}

fn cdpctl(agent: &Agent, args: &[&str]) -> Child {
    Command::new(binaries().join("cdpctl"))
        .args(["--agent", &format!("unix:{}", text(&agent.file("agent.sock")))])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start cdpctl")
}

fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Goal: whoever is killed, and whenever, nothing stays mounted or attached that no open view owns, and closing those leaves nothing.
#[test]
fn killed_in_the_middle_nothing_is_left_that_nobody_owns() {
    skip_unless_mountable!();
    let mut rng = Rng::new(seed());
    let mut disk = Disk::make("ext4", false);
    let device = disk.device();
    let guest = Mounted::new(&device.0, &disk.agent.file("guest"));
    for number in 0..8 {
        fs::write(guest.path(&format!("file{number}")), vec![number; 4 << 20]).unwrap();
    }
    guest.sync();
    let time = mark(&disk.agent, "full");
    guest.unmount();
    drop(device);
    let dir = disk.agent.file("looked-at");
    let out = disk.agent.file("out");
    for round in 0..rounds(8) {
        let agent_dies = round % 2 == 0;
        let open: &[&str] = match round % 4 {
            0 | 1 => &["view", "open", "demo", "--at", &time, "--mount", text(&dir)],
            _ => &["view", "cp", "demo", "/", text(&out), "--at", &time],
        };
        let mut child = cdpctl(&disk.agent, open);
        std::thread::sleep(Duration::from_millis(rng.below(400)));
        if agent_dies {
            disk.agent.kill();
            let _ = child.wait();
            disk.agent.start();
        } else {
            let _ = child.kill();
            let _ = child.wait();
        }
        let agent = &disk.agent;
        // What a call held goes with it; what was opened to stay is listed, and is all that is attached.
        let views = || agent.ctl(&["view", "list"])["views"].as_array().cloned().unwrap_or_default();
        until("a view of a call that ended stays", || views().iter().all(|view| view["temporary"] == false));
        until("a view is being mounted for ever", || {
            let views = views();
            let mounts = views.iter().filter(|view| view["mount"] != "").count();
            attached(agent.dir()).len() == 2 * mounts
        });
        for view in views() {
            agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
        }
        assert_nothing_attached(agent.dir());
        let _ = fs::remove_dir_all(&out);
    }
    disk.agent.stop();
    assert_nothing_attached(disk.agent.dir());
}

/// Goal: an agent that may not have a directory of files, because another one serves its files there, takes nothing away that the other one has attached.
#[test]
fn a_second_agent_on_the_same_directory_of_files_leaves_the_views_of_the_first_mounted() {
    skip_unless_mountable!();
    let mut disk = Disk::make("ext4", false);
    let dir = disk.agent.file("looked-at");
    let view = disk.open(&["--at", "now", "--mount", text(&dir)]);
    let mut second = Agent::configured(&format!("{CONFIG}[fuse]\ndir = {:?}\n", disk.agent.dir()));
    second.start_unserved();
    assert!(second.log_tail().contains("another agent serves its files"), "{}", second.log_tail());
    for running in [true, false] {
        assert_eq!(mounts_under(&dir), std::slice::from_ref(&dir), "unmounted; the second one runs: {running}");
        assert!(dir.join("lost+found").exists(), "it is not served; the second one runs: {running}");
        if running {
            second.stop();
        }
    }
    disk.agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
    assert_nothing_attached(disk.agent.dir());
    disk.agent.stop();
}

/// Goal: a view with an end ends by itself, with an event, also when it is mounted and in use.
#[test]
fn a_view_ends_when_its_time_is_over() {
    skip_unless_mountable!();
    let mut disk = Disk::make("ext4", false);
    let agent = &disk.agent;
    let dir = agent.file("looked-at");
    let view = agent.ctl(&["view", "open", "demo", "--at", "now", "--mount", text(&dir), "--ttl", "5s"]);
    let (opened, expires) = (view["opened"].as_u64().unwrap(), view["expires"].as_u64().unwrap());
    assert!(expires > opened && expires - opened < 10_000_000_000, "{view}");
    let busy = fs::File::open(&dir).unwrap();
    until("it is still open", || agent.ctl(&["view", "list"])["views"] == Value::Array(Vec::new()));
    assert!(mounts_under(&dir).is_empty());
    drop(busy);
    assert_nothing_attached(agent.dir());
    // Told once it is off the record, too: a moment after it is closed.
    until("no event tells it", || {
        let events = Command::new(binaries().join("cdpctl"))
            .args(["--agent", &format!("unix:{}", text(&agent.file("agent.sock"))), "events", "demo"])
            .output()
            .unwrap();
        let events = String::from_utf8_lossy(&events.stdout).into_owned();
        events.contains("view_expired") && events.contains(view["id"].as_str().unwrap())
    });
    // Whoever wants it longer has it.
    let at = mark(agent, "kept");
    let short = agent.ctl(&["view", "open", "demo", "--at", &at, "--ttl", "60s"]);
    let long = agent.ctl(&["view", "open", "demo", "--at", &at]);
    assert_eq!((&short["id"], long["expires"].as_u64()), (&long["id"], Some(0)));
    disk.agent.stop();
}

/// Goal: what was made for the mount of a view goes with its volume, also when neither is served.
/// Method: a start without the primary, and without local files, by which the mount would have been tried again.
#[test]
fn a_directory_made_for_a_mount_goes_with_a_volume_that_is_not_served() {
    skip_unless_mountable!();
    let mut disk = Disk::make("ext4", false);
    let dir = disk.agent.file("looked-at");
    disk.open(&["--at", "now", "--mount", text(&dir)]);
    disk.agent.stop();
    assert!(dir.exists(), "it is kept for the next start");
    fs::rename(disk.agent.file("primary.img"), disk.agent.file("elsewhere.img")).unwrap();
    for name in ["volumes", "views"] {
        let _ = fs::remove_dir(disk.agent.file(name)); // removed at the stop, or empty
        fs::write(disk.agent.file(name), "in the way").unwrap();
    }
    disk.agent.start_unserved();
    assert!(dir.exists(), "the view waits for its volume, and its mount too");
    disk.agent.ctl(&["volume", "remove", "demo", "--force"]);
    assert!(!dir.exists(), "a directory that the agent made stays, and nobody knows of it any more");
}

/// Goal: views and their scratch have bounds over all volumes, and the error names them.
#[test]
fn views_and_scratch_are_bounded_over_all_volumes() {
    let mut agent = Agent::configured(
        "state_dir = \"DIR/state\"\nlock_memory = false\n[grpc]\nunix = \"DIR/agent.sock\"\n[nbd]\nunix = \"DIR/nbd.sock\"\n\
         [metrics]\nlisten = \"off\"\n[views]\nmax = 3\nscratch_total = \"64MiB\"\n[engine]\nscratch = \"40MiB\"\n\
         [[volume]]\nname = \"demo\"\npath = \"DIR/primary.img\"\n",
    );
    fs::File::create(agent.file("primary.img")).unwrap().set_len(16 << 20).unwrap();
    agent.start();
    agent.ctl(&["disk", "init", text(&agent.file("cdp.img")), "--size", "512MiB"]);
    agent.ctl(&["edit", "demo", "--reserve-capacity", "400MiB"]);
    agent.ctl(&["enable", "demo"]);
    agent.connect("demo").write(0, &[1; 4096]).unwrap();
    agent.ctl(&["view", "open", "demo", "--at", "now", "--writable"]);
    let refused = agent.ctl_refused(&["view", "open", "demo", "--at", "now", "--writable"], &["scratch_total"]);
    assert_eq!(refused.code, Some(exit::NO_SPACE));
    for name in ["a", "b"] {
        let at = mark(&agent, name);
        agent.ctl(&["view", "open", "demo", "--at", &at]);
    }
    agent.ctl_refused(&["view", "open", "demo", "--at", "now"], &["views.max"]);
    agent.stop();
}

/// Goal: nothing can be mounted over the agent's own files or by a path that is not plain.
#[test]
fn bad_directories_are_refused() {
    skip_unless_mountable!();
    let mut disk = Disk::make("ext4", false);
    let agent = &disk.agent;
    let at = mark(agent, "here");
    let table: &[(PathBuf, &str)] = &[
        (agent.file("views/x"), "own files"),
        (agent.file("volumes"), "own files"),
        (agent.file("primary.img"), "directory"),
        (PathBuf::from("/proc"), "nothing is mounted"),
        (PathBuf::from("/etc"), "empty directory"),
        (agent.file("link/x"), "own files"),
        (agent.file("nowhere/../x"), "without"),
    ];
    std::os::unix::fs::symlink(agent.file("views"), agent.file("link")).unwrap();
    for (dir, words) in table {
        agent.ctl_refused(&["view", "open", "demo", "--at", &at, "--mount", text(dir)], &[words]);
    }
    assert_eq!(agent.ctl(&["view", "list"])["views"], Value::Array(Vec::new()));
    assert_nothing_attached(agent.dir());
    disk.agent.stop();
}

/// Goal: a mount is listed and undone whatever way its directory was named, and what others do to it by hand is seen.
#[test]
fn a_mount_is_known_by_its_real_directory_and_by_what_the_kernel_says() {
    skip_unless_mountable!();
    let mut disk = Disk::make("ext4", false);
    let agent = &disk.agent;
    let at = mark(agent, "here");
    let real = agent.file("real");
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, agent.file("link")).unwrap();
    let listed = || agent.ctl(&["view", "list"])["views"][0]["mount"].as_str().unwrap_or("none").to_owned();
    let open = |dir: &Path| agent.ctl(&["view", "open", "demo", "--at", &at, "--mount", text(dir)]);
    let close = |view: &Value| agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
    // A link as the last part, in the middle of it, and a directory behind one that is not there yet.
    for (asked, meant) in [("link", "real"), ("link/new", "real/new")] {
        let view = open(&agent.file(asked));
        assert_eq!(Path::new(&listed()), agent.file(meant), "{asked}");
        assert_eq!(mounts_under(&real), [agent.file(meant)], "{asked}");
        assert_eq!(open(&agent.file(asked))["id"], view["id"], "asked again it is the same");
        close(&view);
        assert_nothing_attached(agent.dir());
    }
    // Unmounted by hand: it says so, and mounts again when it is asked to, also elsewhere.
    let view = open(&real);
    for dir in [&real, &agent.file("other")] {
        run("umount", &[text(&mounts_under(agent.dir()).into_iter().find(|dir| !own(agent, dir)).unwrap())]);
        assert_eq!(listed(), "");
        open(dir);
        assert_eq!(Path::new(&listed()), dir);
        assert!(dir.join("lost+found").exists(), "it is mounted");
    }
    // With something else on top it is not closed behind anybody's back.
    run("mount", &["-t", "tmpfs", "none", text(&agent.file("other"))]);
    agent.ctl_refused(&["view", "close", view["id"].as_str().unwrap()], &["on top of the view"]);
    run("umount", &[text(&agent.file("other"))]);
    close(&view);
    assert_nothing_attached(agent.dir());
    disk.agent.stop();
}

/// The agent's own two directories of files are mounts, too.
fn own(agent: &Agent, dir: &Path) -> bool {
    [agent.file("views"), agent.file("volumes")].iter().any(|own| own == dir)
}
