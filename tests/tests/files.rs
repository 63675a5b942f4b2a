//! Volumes and views as local files (FUSE): they hold what NBD clients see, take what a file takes, and leave nothing behind.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cdp_tests::local::{self, Loop, Mounted, assert_nothing_attached, mounts_under, run};
use cdp_tests::process::{Agent, exit, scrape};
use cdp_tests::{Rng, seed, skip_unless_mountable};
use nix::fcntl::{FallocateFlags, fallocate};

const SIZE: usize = 16 << 20;

fn volume_file(agent: &Agent) -> PathBuf {
    agent.file("volumes/demo")
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).open(path)
}

fn code(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn image(path: &Path) -> Vec<u8> {
    let mut out = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut out))
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    out
}

/// Goal: a file takes reads and writes at any byte, and the same bytes are there for NBD clients and in views.
#[test]
fn a_volumes_file_holds_what_its_export_holds_at_any_byte() {
    skip_unless_mountable!();
    let mut rng = Rng::new(seed());
    let mut agent = Agent::dev("16MiB", "1GiB");
    let path = volume_file(&agent);
    assert_eq!(fs::metadata(&path).unwrap().len(), SIZE as u64);
    let mut model = vec![0_u8; SIZE];
    let mut client = agent.connect("demo");
    let file = open(&path, true).unwrap();
    let mut states = Vec::new();
    for round in 0..400 {
        let len = match rng.below(4) {
            0 => 1 + rng.below(700),
            1 => 512 * (1 + rng.below(16)),
            2 => 4096 * (1 + rng.below(8)),
            _ => 1 + rng.below(300_000),
        };
        let at = rng.below(SIZE as u64 - len);
        let (at_usize, len_usize) = (usize::try_from(at).unwrap(), usize::try_from(len).unwrap());
        let range = at_usize..at_usize + len_usize;
        match rng.below(10) {
            0 => {
                // By NBD, which wants whole sectors.
                let (at, len) = (at / 512 * 512, len.next_multiple_of(512).min(1 << 18));
                let mut data = vec![0; usize::try_from(len).unwrap()];
                rng.fill(&mut data);
                let at_usize = usize::try_from(at).unwrap();
                let room = data.len().min(SIZE - at_usize);
                client.write(at, &data[..room]).unwrap();
                model[at_usize..at_usize + room].copy_from_slice(&data[..room]);
            }
            1 => {
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let mode = rng.pick(&[punch, FallocateFlags::FALLOC_FL_ZERO_RANGE]);
                fallocate(&file, mode, at.cast_signed(), len.cast_signed()).unwrap();
                model[range].fill(0);
            }
            2 => file.sync_data().unwrap(),
            _ => {
                let mut data = vec![0; len_usize];
                rng.fill(&mut data);
                file.write_all_at(&data, at).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
        let (at, len) = (rng.below(SIZE as u64 - 5000), 1 + rng.below(5000));
        let mut seen = vec![0; usize::try_from(len).unwrap()];
        file.read_exact_at(&mut seen, at).unwrap();
        let at = usize::try_from(at).unwrap();
        assert!(seen == model[at..at + seen.len()], "round {round}: {len} bytes at {at}");
        if round % 100 == 50 {
            let time = agent.ctl(&["mark", "demo", "--name", &format!("round {round}")])["time"].as_u64().unwrap();
            states.push((time, model.clone()));
        }
    }
    assert!(client.read_all().unwrap() == model, "by NBD");
    assert!(image(&path) == model, "by the file");
    for (time, model) in states {
        let view = agent.ctl(&["view", "open", "demo", "--at", &time.to_string()]);
        assert!(image(Path::new(view["path"].as_str().unwrap())) == model, "the view's file at {time}");
        agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
    }
    drop(file);
    agent.stop();
    assert_nothing_attached(agent.dir());
    assert!(mounts_under(agent.dir()).is_empty(), "{:?}", mounts_under(agent.dir()));
}

#[test]
fn what_a_file_of_a_device_cannot_do_is_refused() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("16MiB", "1GiB");
    let path = volume_file(&agent);
    let file = open(&path, true).unwrap();
    let end = SIZE as u64;
    assert_eq!(file.write_at(&[1; 4096], end - 100).unwrap(), 100, "what fits is written");
    assert_eq!(code(file.write_at(&[1; 100], end)), Some(libc_errno::ENOSPC));
    assert_eq!(file.read_at(&mut [0; 10], end + 5).unwrap(), 0);
    assert_eq!(code(file.set_len(1 << 20)), Some(libc_errno::EPERM));
    file.set_len(end).unwrap();
    assert_eq!(code(OpenOptions::new().write(true).truncate(true).open(&path)), Some(libc_errno::EPERM));
    assert!(fallocate(&file, FallocateFlags::empty(), 0, 4096).is_err(), "room is not promised");
    assert!(fs::remove_file(&path).is_err() && File::create(agent.file("volumes/other")).is_err());
    // Holes are found, and only where nothing was written.
    file.write_all_at(&[7; 4096], 8 << 20).unwrap();
    let mut file = file;
    let data = nix::unistd::lseek(&file, 4096, nix::unistd::Whence::SeekData).unwrap();
    assert_eq!(data, 8 << 20);
    assert_eq!(nix::unistd::lseek(&file, data, nix::unistd::Whence::SeekHole).unwrap(), (8 << 20) + 4096);
    file.seek(SeekFrom::Start(0)).unwrap();
    // A view of now refuses writes; a writable one takes them and keeps them from the volume.
    let view = agent.ctl(&["view", "open", "demo", "--at", "now"]);
    let scratch = agent.ctl(&["view", "open", "demo", "--at", "now", "--writable"]);
    let (view, scratch) = (view["path"].as_str().unwrap().to_owned(), scratch["path"].as_str().unwrap().to_owned());
    assert_eq!(code(open(Path::new(&view), true)), Some(libc_errno::EROFS));
    open(Path::new(&scratch), true).unwrap().write_all_at(b"scratch", 3).unwrap();
    assert_eq!(&image(Path::new(&scratch))[..11], b"\0\0\0scratch\0");
    assert!(image(&path)[..4096] == [0; 4096]);
    let names: Vec<_> = fs::read_dir(agent.file("views")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&PathBuf::from(&view)) && names.contains(&PathBuf::from(&scratch)));
    drop(file);
    agent.stop();
}

/// How many syncs of the CDP disk the volume has waited for.
fn syncs(agent: &Agent) -> u64 {
    let address = fs::read_to_string(agent.file("metrics.addr")).unwrap();
    let text = scrape(address.trim());
    let of_syncs = |line: &&str| line.starts_with("cdp_volume_latency_seconds_count") && line.contains("\"sync\"");
    let line = text.lines().find(of_syncs).unwrap_or_else(|| panic!("no count of syncs:\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Goal: a write through a handle that was opened with O_DSYNC is durable when it returns, of whole sectors and of parts. (The kernel asks for no sync of its
/// own behind a write that it does not cache.)
#[test]
fn a_write_of_a_synchronous_handle_is_synced_before_it_returns() {
    use std::os::unix::fs::OpenOptionsExt as _;
    const WRITES: u64 = 40;
    skip_unless_mountable!();
    let agent = Agent::dev("16MiB", "1GiB");
    let path = volume_file(&agent);
    let synced = |flags: i32, len: usize| {
        let file = OpenOptions::new().write(true).custom_flags(flags).open(&path).unwrap();
        let before = syncs(&agent);
        for number in 0..WRITES {
            file.write_all_at(&vec![7; len], number * 8192).unwrap();
        }
        syncs(&agent) - before
    };
    assert!(synced(0, 4096) < WRITES / 2, "without the flag nothing is synced: else this shows nothing");
    for len in [4096, 100] {
        let count = synced(nix::fcntl::OFlag::O_DSYNC.bits(), len);
        assert!(count >= WRITES, "{count} syncs for {WRITES} writes of {len} bytes");
    }
}

/// Goal: a handle that was open when its volume grew has the new space: it takes writes there, and what is to be zero reads as zeroes.
#[test]
fn an_open_file_of_a_volume_that_grows_has_the_new_space() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("16MiB", "1GiB");
    let path = volume_file(&agent);
    let file = open(&path, true).unwrap();
    // As of a logical volume that is extended: what was there shows.
    let primary = OpenOptions::new().write(true).open(agent.file("primary.img")).unwrap();
    let (old, new) = (SIZE as u64, SIZE as u64 + (4 << 20));
    primary.write_all_at(&vec![0xEE; 4 << 20], old).unwrap();
    agent.ctl(&["volume", "resize", "demo"]);
    let read = |at: u64| {
        let mut bytes = vec![1; 8192];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    assert!(read(old).iter().all(|byte| *byte == 0xEE));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, old.cast_signed(), 8192).unwrap();
    assert!(read(old).iter().all(|byte| *byte == 0), "a hole in the new space");
    fallocate(&file, punch, (new - 8192).cast_signed(), 1 << 20).unwrap();
    assert!(read(new - 8192).iter().all(|byte| *byte == 0), "a hole over its end");
    file.write_all_at(&[5; 8192], old + 65536).unwrap();
    assert!(read(old + 65536).iter().all(|byte| *byte == 5), "a write into the new space");
    assert_eq!(code(file.write_at(&[1; 100], new)), Some(libc_errno::ENOSPC));
    file.sync_all().unwrap();
    drop(file);
    agent.kill();
    agent.start();
    let after = image(&path);
    assert!(after.len() as u64 == new && after[SIZE + 65536..][..8192] == [5; 8192], "after a kill");
}

/// Goal: nobody writes stale bytes over a reverted volume through a file either.
#[test]
fn a_revert_counts_open_files_as_clients() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("16MiB", "1GiB");
    let path = volume_file(&agent);
    let file = open(&path, true).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    let time = agent.ctl(&["mark", "demo", "--name", "good"])["time"].as_u64().unwrap().to_string();
    file.write_all_at(b"after!", 0).unwrap();
    agent.ctl_refused(&["revert", "demo", "--at", &time], &["open"]);
    agent.ctl(&["revert", "demo", "--at", &time, "--force"]);
    assert_eq!(code(file.write_all_at(b"stale!", 0)), Some(libc_errno::EIO));
    assert_eq!(code(open(&path, true)), Some(libc_errno::EBUSY), "held until release");
    agent.ctl(&["release", "demo"]);
    let mut seen = [0; 6];
    open(&path, true).unwrap().read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"before");
    drop(file);
    // Who reads only is in nobody's way.
    let reader = open(&path, false).unwrap();
    agent.ctl(&["revert", "demo", "--at", &time]);
    reader.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"before");
    agent.stop();
}

/// Goal: a killed agent leaves no dead mount: the next one takes the place over, also while programs hold files of the old one.
#[test]
fn a_killed_agents_mounts_are_replaced() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("16MiB", "1GiB");
    let path = volume_file(&agent);
    let held = open(&path, true).unwrap();
    held.write_all_at(b"kept", 4096).unwrap();
    held.sync_all().unwrap();
    for _ in 0..2 {
        agent.kill();
        assert!(fs::metadata(&path).is_err(), "nobody serves it");
        agent.start();
        let mut seen = [0; 4];
        open(&path, false).unwrap().read_exact_at(&mut seen, 4096).unwrap();
        assert_eq!(&seen, b"kept");
        assert_eq!(mounts_under(agent.dir()).len(), 2, "two directories, each mounted once");
        assert!(held.read_at(&mut seen, 4096).is_err(), "a file of the old agent stays dead");
    }
    agent.stop();
    assert!(mounts_under(agent.dir()).is_empty());
}

/// Goal: the agent takes nothing for a disk that it serves itself: its shard would wait for its own answer, for ever.
/// Method: files of a volume and of a view, by their names, by a link, by another mount of them, and behind a loop device.
#[test]
fn the_agents_own_files_are_no_disks_for_it() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("16MiB", "1GiB");
    let file = |name: &str| agent.file(name).to_str().unwrap().to_owned();
    let (volume, link, bound) = (file("volumes/demo"), file("link"), file("bound"));
    agent.connect("demo").write(0, &[1; 4096]).unwrap();
    let view = agent.ctl(&["view", "open", "demo", "--at", "now"])["path"].as_str().unwrap().to_owned();
    std::os::unix::fs::symlink(&volume, &link).unwrap();
    fs::create_dir(&bound).unwrap();
    run("mount", &["--bind", &file("volumes"), &bound]);
    let mounted = Mounted(PathBuf::from(&bound));
    let device = Loop::on(Path::new(&volume), 0, 0);
    for own in [volume.clone(), view, link, format!("{bound}/demo"), device.0.clone()] {
        let own = own.as_str();
        for call in [&["volume", "add", "own", "--path", own][..], &["disk", "init", own, "--force"][..]] {
            let refused = agent.ctl_refused(call, &[own, "own files"]);
            assert_eq!(refused.code, Some(exit::USAGE), "{refused}");
        }
    }
    assert_eq!(agent.ctl(&["volume", "list"])["list"].as_array().map(Vec::len), Some(1));
    assert_eq!(agent.ctl(&["disk", "list"])["disks"].as_array().map(Vec::len), Some(1));
    assert!(agent.live_image("demo")[..4096] == [1; 4096], "it is served as ever");
    drop(device);
    mounted.unmount();
    assert_nothing_attached(agent.dir());
    agent.stop();
}

/// Goal: an agent that cannot have FUSE says so and serves everything else.
#[test]
fn files_can_be_switched_off() {
    let mut agent = Agent::configured(
        "state_dir = \"DIR/state\"\n[grpc]\nunix = \"DIR/agent.sock\"\n[nbd]\nunix = \"DIR/nbd.sock\"\n[fuse]\ndir = \"off\"\n\
         [metrics]\nlisten = \"off\"\n[[volume]]\nname = \"demo\"\npath = \"DIR/primary.img\"\n",
    );
    File::create(agent.file("primary.img")).unwrap().set_len(SIZE as u64).unwrap();
    agent.start();
    let disk = agent.file("cdp.img").display().to_string();
    agent.ctl(&["disk", "init", &disk, "--size", "512MiB"]);
    agent.ctl(&["edit", "demo", "--reserve-capacity", "400MiB"]);
    agent.ctl(&["enable", "demo"]);
    agent.connect("demo").write(0, &[1; 4096]).unwrap();
    let view = agent.ctl(&["view", "open", "demo", "--at", "now"]);
    assert_eq!(view["path"], "");
    assert!(mounts_under(agent.dir()).is_empty());
    let dir = agent.file("mnt").display().to_string();
    agent.ctl_refused(&["view", "open", "demo", "--at", "now", "--mount", &dir], &["fuse"]);
    agent.stop();
}

/// Goal: many requests at a time, through the kernel's asynchronous I/O, each verified.
#[test]
fn fio_verifies_a_volumes_file_with_many_requests_in_flight() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("64MiB", "1GiB");
    let file = volume_file(&agent);
    let name = format!("--filename={}", file.display());
    let args = [
        "--name=files",
        &name,
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--size=64m",
        "--io_size=24m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--fsync=256",
        "--minimal",
    ];
    run("fio", &args);
    run(
        "fio",
        &[
            &args[..5],
            &[
                "--bs=64k",
                "--iodepth=16",
                "--size=64m",
                "--rw=write",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--minimal",
            ],
        ]
        .concat(),
    );
    agent.stop();
}

/// A memory cgroup of this test; `None`, with the reason: there can be none.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bytes: u64) -> Result<Self, String> {
        let name = format!("cdp-test-{}", std::process::id());
        let (dir, limit) = if Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
            (Path::new("/sys/fs/cgroup/memory").join(name), "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup").join(name), "memory.max")
        };
        fs::create_dir(&dir).map_err(|error| format!("make {}: {error}", dir.display()))?;
        let made = Self(dir);
        fs::write(made.0.join(limit), bytes.to_string()).map_err(|error| format!("set {limit}: {error}"))?;
        let _ = fs::write(made.0.join("memory.swap.max"), "0"); // there may be no swap to be kept from
        Ok(made)
    }

    fn add(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("put a process into the cgroup");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let begun = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Whether threads may be marked as I/O flushers here (CAP_SYS_RESOURCE), as the agent marks its own.
fn may_flush_io() -> bool {
    const SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let caps = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    caps.and_then(|caps| u64::from_str_radix(caps.trim(), 16).ok()).is_some_and(|caps| caps >> SYS_RESOURCE & 1 == 1)
}

/// Goal: the host writes back dirty pages through the agent; memory that is all dirty must not wait for an agent that waits for memory.
/// Method: a writer in a memory cgroup that is far too small for what it writes through a file system on the volume's file. The agent is
/// in the same cgroup where its threads may be marked as I/O flushers; without that mark the kernel does let them wait.
#[test]
fn heavy_writes_through_a_loop_mount_in_a_small_memory_cgroup_end() {
    skip_unless_mountable!();
    const LIMIT: u64 = 128 << 20;
    const WRITTEN: u64 = 384 << 20;
    let mut agent = Agent::configured(
        "state_dir = \"DIR/state\"\nlock_memory = false\n[grpc]\nunix = \"DIR/agent.sock\"\n[nbd]\nunix = \"DIR/nbd.sock\"\n\
         [metrics]\nlisten = \"off\"\n[engine]\nbacklog = \"16MiB\"\n[[volume]]\nname = \"demo\"\npath = \"DIR/primary.img\"\n",
    );
    File::create(agent.file("primary.img")).unwrap().set_len(1 << 30).unwrap();
    let cgroup = match Cgroup::new(LIMIT) {
        Ok(cgroup) => cgroup,
        Err(why) => return cdp_tests::skip(&format!("no memory cgroup can be made here ({why})")),
    };
    agent.start();
    let disk = agent.file("cdp.img").display().to_string();
    agent.ctl(&["disk", "init", &disk, "--size", "2GiB"]);
    agent.ctl(&["edit", "demo", "--reserve-capacity", "1800MiB"]);
    agent.ctl(&["enable", "demo"]);
    let device = Loop::on(&volume_file(&agent), 0, 0);
    run("mkfs.ext4", &["-q", "-F", &device.0]);
    let mounted = Mounted::new(&device.0, &agent.file("mnt"));
    match may_flush_io() {
        true => cgroup.add(agent.pid()),
        false => println!("the agent stays outside of the small cgroup: there is no CAP_SYS_RESOURCE here"),
    }
    let script = format!(
        "echo $$ >{}/cgroup.procs && exec dd if=/dev/urandom of={} bs=1M count={} conv=fsync status=none",
        cgroup.0.display(),
        mounted.path("big").display(),
        WRITTEN >> 20
    );
    let mut writer = Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).spawn().expect("start the writer");
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = writer.try_wait().expect("wait for the writer") {
            break status;
        }
        if begun.elapsed() > Duration::from_secs(180) {
            let stack = fs::read_to_string(format!("/proc/{}/stack", writer.id())).unwrap_or_default();
            local::abort(agent.dir()); // which ends every wait for it
            panic!("the writer does not end; it waits in\n{stack}");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(status.success(), "the writer: {status}");
    agent.assert_alive();
    println!("{} MiB through {} MiB of memory in {:.1} s", WRITTEN >> 20, LIMIT >> 20, begun.elapsed().as_secs_f64());
    let sum = run("sha256sum", &[mounted.path("big").to_str().unwrap()]);
    mounted.unmount();
    drop(device);
    assert_nothing_attached(agent.dir());
    // What the host's cache held is what the volume holds.
    let view = agent.ctl(&["view", "open", "demo", "--at", "now", "--mount", agent.file("old").to_str().unwrap()]);
    let again = run("sha256sum", &[agent.file("old/big").to_str().unwrap()]);
    assert_eq!(sum.split(' ').next(), again.split(' ').next());
    agent.ctl(&["view", "close", view["id"].as_str().unwrap()]);
    agent.stop();
    drop(agent);
    drop(cgroup);
}

/// The numbers of this host's errors that files give.
mod libc_errno {
    pub const EPERM: i32 = 1;
    pub const EIO: i32 = 5;
    pub const EBUSY: i32 = 16;
    pub const ENOSPC: i32 = 28;
    pub const EROFS: i32 = 30;
}

/// Goal: a plain program reads a view's file at full length, and holes stay holes.
#[test]
fn a_views_file_is_copied_sparse() {
    skip_unless_mountable!();
    let mut agent = Agent::dev("64MiB", "1GiB");
    let mut file = open(&volume_file(&agent), true).unwrap();
    file.seek(SeekFrom::Start(48 << 20)).unwrap();
    file.write_all(&[9; 1 << 20]).unwrap();
    assert!(file.as_raw_fd() >= 0);
    drop(file);
    let view = agent.ctl(&["view", "open", "demo", "--at", "now"]);
    let copy = agent.file("copy.img");
    run("cp", &["--sparse=auto", view["path"].as_str().unwrap(), copy.to_str().unwrap()]);
    let meta = fs::metadata(&copy).unwrap();
    assert_eq!(meta.len(), 64 << 20);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
    assert!((1 << 20..16 << 20).contains(&blocks), "{blocks} bytes are allocated");
    assert!(image(&copy) == image(&volume_file(&agent)));
    agent.stop();
}
