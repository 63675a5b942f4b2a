//! What a test attaches to this host (mounts, loop devices), and how it is taken away again whatever happens.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// How long the kernel may take to let go of a loop device after its mount.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why nothing can be mounted here; `None`: it can. A test that needs it says so and ends.
pub fn why_not() -> Option<String> {
    lacking(&["/dev/fuse", "/dev/loop-control"])
}

/// Why a test that needs root and these devices cannot run here; `None`: it can. All tests that need them ask here.
///
/// # Panics
/// Where something is lacking and `CDP_REQUIRE_ALL` is 1, as `make test` sets it on a machine that has all of it: a test
/// that does not run there has failed.
pub fn lacking(devices: &[&str]) -> Option<String> {
    let why = if nix::unistd::geteuid().is_root() {
        devices.iter().find_map(|path| {
            let opened = fs::OpenOptions::new().read(true).write(true).open(path);
            opened.err().map(|error| format!("{path}: {error}"))
        })
    } else {
        Some("not root".to_owned())
    };
    if let Some(why) = &why {
        let all = std::env::var("CDP_REQUIRE_ALL").is_ok_and(|all| all == "1");
        assert!(!all, "this test cannot run here ({why}), and CDP_REQUIRE_ALL is 1");
    }
    why
}

/// Ends the test, with a clear line, where nothing can be mounted.
#[macro_export]
macro_rules! skip_unless_mountable {
    () => {
        if let Some(why) = $crate::local::why_not() {
            return $crate::skip(&format!("nothing can be mounted here ({why})"));
        }
    };
}

/// Runs a program of this host that must succeed; what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = try_run(program, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {}: {}\n{out}{err}", args.join(" "), output.status);
    out.trim().to_owned()
}

/// Runs a program of this host.
pub fn try_run(program: &str, args: &[&str]) -> Output {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(args).env("PATH", path).env("LC_ALL", "C").output();
    output.unwrap_or_else(|error| panic!("run {program}: {error}"))
}

/// Directories in or below `dir` at which something is mounted, in order. Programs that wait for a dead file system are not touched.
pub fn mounts_under(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("the list of mounts");
    let dirs = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    dirs.filter(|mounted| mounted.starts_with(dir)).collect()
}

/// Loop devices whose file lies in `dir`.
pub fn loops_under(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").expect("the list of block devices").flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if !file.is_empty() && Path::new(file.trim_end()).starts_with(dir) {
            found.push(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

/// What is attached below `dir`, without the agent's own two directories of files: empty when a test has left nothing.
pub fn attached(dir: &Path) -> Vec<String> {
    let own = [dir.join("views"), dir.join("volumes")];
    let mounts = mounts_under(dir).into_iter().filter(|mounted| !own.contains(mounted));
    mounts.map(|mounted| mounted.display().to_string()).chain(loops_under(dir)).collect()
}

/// Nothing is attached below `dir`, at the latest after a moment.
pub fn assert_nothing_attached(dir: &Path) {
    let begun = Instant::now();
    loop {
        let left = attached(dir);
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "left behind: {left:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ends every wait for the FUSE mounts below `dir`: their requests fail. A process that waits in the kernel for one of them cannot even be
/// killed before.
pub fn abort(dir: &Path) {
    let control = Path::new("/sys/fs/fuse/connections");
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in text.lines().filter(|line| line.contains(" - fuse ")) {
        let mut fields = line.split(' ');
        let (number, place) = (fields.nth(2).and_then(|device| device.split(':').nth(1)), fields.nth(1));
        let (Some(number), Some(place)) = (number, place) else { continue };
        if Path::new(place).starts_with(dir) {
            if !control.join(number).exists() {
                let _ = Command::new("mount").args(["-t", "fusectl", "none"]).arg(control).output();
            }
            let _ = fs::write(control.join(number).join("abort"), "1");
        }
    }
}

/// Takes everything away that is attached below `dir`, by an agent that is gone.
pub fn clean(dir: &Path) {
    abort(dir);
    for mounted in mounts_under(dir).iter().rev() {
        let _ = Command::new("umount").arg("--lazy").arg(mounted).output();
    }
    for device in loops_under(dir) {
        let _ = Command::new("losetup").args(["--detach", &device]).output();
    }
}

/// A loop device on a part of a file; detached when dropped.
#[derive(Debug)]
pub struct Loop(pub String);

impl Loop {
    /// `size` 0: up to the end.
    pub fn on(file: &Path, offset: u64, size: u64) -> Self {
        let mut args = vec!["--find".to_owned(), "--show".to_owned(), "--direct-io=on".to_owned()];
        args.push(format!("--offset={offset}"));
        if size > 0 {
            args.push(format!("--sizelimit={size}"));
        }
        args.push(file.display().to_string());
        // Somebody else may take the device between the search and the use.
        for _ in 0..20 {
            let output = try_run("losetup", &args.iter().map(String::as_str).collect::<Vec<_>>());
            if output.status.success() {
                return Self(String::from_utf8_lossy(&output.stdout).trim().to_owned());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("no loop device on {}", file.display());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).output();
    }
}

/// A mounted file system; unmounted when dropped.
#[derive(Debug)]
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Mounts a device with everything that can be written.
    pub fn new(device: &str, dir: &Path) -> Self {
        fs::create_dir_all(dir).expect("a directory to mount at");
        run("mount", &["-o", "nodev,nosuid", device, dir.to_str().expect("an ASCII path")]);
        Self(dir.to_owned())
    }

    /// A file or directory in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Everything is on the device.
    pub fn sync(&self) {
        run("sync", &["-f", self.0.to_str().expect("an ASCII path")]);
    }

    /// Unmounts it, which must work.
    pub fn unmount(self) {
        run("umount", &[self.0.to_str().expect("an ASCII path")]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if mounts_under(&self.0).contains(&self.0) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
        }
    }
}
