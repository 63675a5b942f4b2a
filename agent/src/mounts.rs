//! File systems inside of images, mounted on this host by its own tools: which partitions and file systems there are, mounting
//! them through a loop device or the kernel's NBD client ([`nbd`]), and taking all of that away again.
//!
//! Everything that may wait for the agent's own files (a mount, a probe, an unmount that writes) runs in a program of its own, never in
//! a thread of the agent: a thread that waits for its own process cannot be killed. The programs die with the agent.
//!
//! What is attached is found again in what the kernel says (`/proc/self/mountinfo`, `/sys/block`), not only in our records: so nothing is
//! left behind by an agent that was killed in the middle. Loop devices are made with *autoclear*: they go with their mount, also
//! when the mounting program is killed, or when an admin unmounts by hand. NBD devices go with the agent.

pub mod nbd;

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cdp_journal::{Error, Result};
use nix::mount::{MntFlags, umount2};

/// A tool that takes longer is killed.
const TOOL_PATIENCE: Duration = Duration::from_secs(120);
/// How long a loop device may take to go after its mount.
const LOOP_PATIENCE: Duration = Duration::from_secs(5);
/// What images have for a sector.
const SECTOR: u64 = 512;

/// A line of the kernel's list of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Major and minor number of the device.
    pub device: (u32, u32),
    /// Where.
    pub dir: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// Of what.
    pub source: String,
}

/// A loop device that has a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loop {
    /// `loop3`.
    pub name: String,
    /// Its number.
    pub device: (u32, u32),
    /// The file, as the kernel says its path now.
    pub file: PathBuf,
}

/// A place in an image that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Number of the partition; 0: the whole image.
    pub number: u32,
    /// Where it begins, bytes.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// What it holds (`ext4`, `LVM2_member`); empty: nothing known.
    pub kind: String,
    /// It is a file system.
    pub mountable: bool,
    /// Its label.
    pub label: String,
}

/// What was mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// `/dev/loop3`, `/dev/nbd3`.
    pub device: String,
    /// Type of the file system.
    pub kind: String,
    /// Number of the partition; 0: the whole image.
    pub partition: u32,
}

/// The mounts that this process sees, in order.
///
/// # Errors
/// When the list cannot be read.
pub fn mounted() -> io::Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(mount_line).collect())
}

/// `36 35 98:0 /root /dir options - type source super-options`, with any number of fields before the dash.
fn mount_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let dir = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let mut text = || rest.next().map(|field| String::from_utf8_lossy(&unescape(field)).into_owned());
    Some(Mount { device: numbers(device)?, dir, kind: text()?, source: text()? })
}

/// Spaces and the like are written as `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = field.get(at + 1..at + 4).filter(|_| field[at] == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(value.unwrap_or(field[at]));
        at += if value.is_some() { 4 } else { 1 };
    }
    out
}

fn numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The loop devices that have a file now.
pub fn loops() -> Vec<Loop> {
    let Ok(entries) = std::fs::read_dir("/sys/block") else { return Vec::new() };
    let read = |path: PathBuf| std::fs::read(path).ok();
    let one = |name: String| {
        let dir = Path::new("/sys/block").join(&name);
        let mut file = read(dir.join("loop/backing_file"))?;
        while file.last() == Some(&b'\n') {
            file.pop();
        }
        let device = numbers(&String::from_utf8_lossy(&read(dir.join("dev"))?))?;
        Some(Loop { name, device, file: PathBuf::from(OsString::from_vec(file)) })
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("loop")).filter_map(one).collect()
}

/// Whether to use `path` is to use a file of the agent's own, which are mounted at `dirs`: such a file, by whatever name, or a block device that rests on one by way of
/// a loop device. The look may wait for the agent's own answer: only from a thread that answers nobody.
///
/// # Errors
/// When the list of mounts cannot be read.
pub fn is_own(path: &Path, dirs: &[PathBuf]) -> io::Result<bool> {
    let ours = |mount: &&Mount| mount.kind.starts_with("fuse") && dirs.contains(&mount.dir);
    let systems: Vec<(u32, u32)> = mounted()?.iter().filter(ours).map(|mount| mount.device).collect();
    if systems.is_empty() {
        return Ok(false);
    }
    let split = |device: u64| (libc::major(device), libc::minor(device));
    // First by its name, which asks nobody.
    let lies_there = |file: &Path| {
        let there = || std::fs::metadata(file).is_ok_and(|found| systems.contains(&split(found.dev())));
        dirs.iter().any(|dir| file.starts_with(dir)) || there()
    };
    if lies_there(path) {
        return Ok(true);
    }
    let found = std::fs::metadata(path).ok().filter(|found| found.file_type().is_block_device());
    let Some(found) = found else { return Ok(false) };
    let below = rests_on(split(found.rdev()));
    Ok(loops().iter().any(|bound| below.contains(&bound.device) && lies_there(&bound.file)))
}

/// A block device, or the one that it is a partition of, and all that it is made of (by device mapper, MD).
fn rests_on(device: (u32, u32)) -> Vec<(u32, u32)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(format!("/sys/dev/block/{}:{}", device.0, device.1))];
    while let Some(folder) = folders.pop() {
        let Ok(mut folder) = folder.canonicalize() else { continue };
        if folder.join("partition").exists() {
            folder.pop();
        }
        let Some(device) = std::fs::read_to_string(folder.join("dev")).ok().and_then(|text| numbers(&text)) else {
            continue;
        };
        if !found.contains(&device) {
            found.push(device);
            let made_of = std::fs::read_dir(folder.join("slaves")).into_iter().flatten().flatten();
            folders.extend(made_of.map(|entry| entry.path()));
        }
    }
    found
}

/// Looks into an image: its partitions, or the whole where there are none, and what each one holds.
///
/// # Errors
/// When a tool is missing or fails.
pub fn probe(image: &Path) -> Result<Vec<Part>> {
    let columns = ["--raw", "--bytes", "--noheadings", "--output", "NR,START,SECTORS"];
    let mut partx = Command::new("partx");
    partx.args(columns).arg("--").arg(image);
    let listed = run(&partx)?;
    let mut parts = Vec::new();
    // Its status says "no table" and "not readable" alike; what can be read is seen by the next tool.
    for line in String::from_utf8_lossy(&listed.stdout).lines().filter(|_| listed.status.success()) {
        let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        let [number, start, sectors] = fields[..] else { continue };
        let Ok(number) = u32::try_from(number) else { continue };
        parts.push(Part { number, offset: start * SECTOR, size: sectors * SECTOR, ..Part::whole() });
    }
    if parts.is_empty() {
        parts.push(Part::whole());
    }
    for part in &mut parts {
        let mut blkid = Command::new("blkid");
        blkid.args(["--probe", "--output", "export"]);
        if part.number != 0 {
            blkid.arg(format!("--offset={}", part.offset)).arg(format!("--size={}", part.size));
        }
        blkid.arg(image);
        let found = run(&blkid)?;
        for line in String::from_utf8_lossy(&found.stdout).lines() {
            match line.split_once('=') {
                Some(("TYPE", kind)) => part.kind = kind.to_owned(),
                Some(("LABEL", label)) => part.label = label.to_owned(),
                Some(("USAGE", usage)) => part.mountable = usage == "filesystem",
                _ => {}
            }
        }
    }
    Ok(parts)
}

impl Part {
    fn whole() -> Self {
        Self { number: 0, offset: 0, size: 0, kind: String::new(), mountable: false, label: String::new() }
    }

    fn words(&self) -> String {
        let place = if self.number == 0 { "the whole disk".to_owned() } else { self.number.to_string() };
        let kind = if self.kind.is_empty() { "nothing known" } else { &self.kind };
        match self.label.as_str() {
            "" => format!("{place} ({kind})"),
            label => format!("{place} ({kind}, {label:?})"),
        }
    }
}

/// The part that is meant: the one of this number (0: the whole), else the only one with a file system.
fn choose(parts: &[Part], wanted: Option<u32>) -> Result<&Part> {
    let all = || parts.iter().map(Part::words).collect::<Vec<_>>().join(", ");
    if let Some(number) = wanted {
        let part = parts.iter().find(|part| part.number == number);
        let part = part.ok_or_else(|| Error::invalid("partition", number, format!("one of: {}", all())))?;
        if !part.mountable {
            return Err(Error::State(format!("there is no file system to mount: {}", part.words())));
        }
        return Ok(part);
    }
    let mountable: Vec<&Part> = parts.iter().filter(|part| part.mountable).collect();
    match mountable[..] {
        [part] => Ok(part),
        [] => Err(Error::State(format!("there is no file system to mount: {}", all()))),
        _ => {
            let words = mountable.iter().map(|part| part.words()).collect::<Vec<_>>().join(", ");
            Err(Error::invalid("partition", "none", format!("one of the file systems that there are: {words}")))
        }
    }
}

/// Type and options to mount with. Read-only, nothing is replayed and nothing written: the image is as a crash left it. Writable, the
/// file system brings itself in order.
fn options(kind: &str, writable: bool) -> (&str, &'static str) {
    match (kind, writable) {
        ("ext3" | "ext4", false) => (kind, "ro,noload"),
        ("xfs", false) => (kind, "ro,norecovery,nouuid"),
        ("xfs", true) => (kind, "rw,nouuid"),
        ("btrfs", false) => (kind, "ro,rescue=nologreplay"),
        ("f2fs" | "nilfs2", false) => (kind, "ro,norecovery"),
        ("ntfs", false) => ("ntfs3", "ro"),
        ("ntfs", true) => ("ntfs3", "rw"),
        (_, false) => (kind, "ro"),
        (_, true) => (kind, "rw"),
    }
}

/// Mounts a file system of `image` at `dir`: by a loop device, or as it is where it is an NBD device.
///
/// # Errors
/// When there is none, or several and none was chosen, or the system refuses; then nothing is left.
pub fn attach(image: &Path, dir: &Path, partition: Option<u32>, writable: bool) -> Result<Attached> {
    let parts = probe(image)?;
    let part = choose(&parts, partition)?;
    let (kind, options) = options(&part.kind, writable);
    let mut options = format!("{options},nodev,nosuid,noatime");
    let device = image.to_str().and_then(nbd::device_of);
    let source = match device {
        Some(device) if part.number != 0 => nbd::partition(device, part.number)?,
        _ => image.to_owned(),
    };
    if device.is_none() {
        options.push_str(",loop");
        if part.number != 0 {
            options.push_str(&format!(",offset={},sizelimit={}", part.offset, part.size));
        }
    }
    let mut mount = Command::new("mount");
    mount.args(["-t", kind, "-o", &options, "--"]).arg(source).arg(dir);
    let done = run(&mount)?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        return Err(Error::State(format!("mounting {} at {}: {said}", part.words(), dir.display())));
    }
    let Some(mounted) = devices_at(dir)?.pop() else {
        let mut umount = Command::new("umount");
        umount.arg("--").arg(dir);
        run(&umount)?;
        return Err(Error::State(format!(
            "mounting {} at {}: the kernel does not list it",
            part.words(),
            dir.display()
        )));
    };
    // Past the page cache of the loop device, with many requests in flight. Where that is refused it works without.
    if device.is_none() {
        let mut losetup = Command::new("losetup");
        losetup.args(["--direct-io=on", &mounted]);
        if let Ok(refused) = run(&losetup)
            && !refused.status.success()
        {
            tracing::debug!(mounted, "no direct I/O: {}", String::from_utf8_lossy(&refused.stderr).trim());
        }
    }
    Ok(Attached { device: mounted, kind: part.kind.clone(), partition: part.number })
}

/// What is mounted where, in order; of a loop or NBD device its path, of anything else what the kernel calls it.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn places() -> Result<Vec<(PathBuf, String)>> {
    let mounts = mounted().map_err(|error| Error::device("read", "/proc/self/mountinfo", &error))?;
    let loops = loops();
    let device = |mount: &Mount| match nbd::device_of(&mount.source) {
        Some(device) => device.to_owned(),
        // btrfs has a number of its own; its source is the device.
        None => match loops.iter().find(|bound| bound.device == mount.device) {
            Some(bound) => format!("/dev/{}", bound.name),
            None => mount.source.clone(),
        },
    };
    Ok(mounts.iter().map(|mount| (mount.dir.clone(), device(mount))).collect())
}

/// The devices that are mounted at `dir`, the topmost last.
fn devices_at(dir: &Path) -> Result<Vec<String>> {
    Ok(places()?.into_iter().filter(|(place, _)| place == dir).map(|(_, device)| device).collect())
}

/// Whether a device is mounted at `dir`, also below other mounts.
pub fn is_mounted(places: &[(PathBuf, String)], dir: &Path, device: &str) -> bool {
    places.iter().any(|(place, found)| place == dir && found == device)
}

/// Unmounts what is mounted at `dir` from `device` (empty: from any loop or NBD device). Nothing there is no error. `lazily`: also when it is in
/// use; programs that use it get errors when the image goes.
///
/// # Errors
/// When it is in use, or something else is mounted on top of it, or the system refuses.
pub fn detach(dir: &Path, device: &str, lazily: bool) -> Result<()> {
    let ours = |found: &String| match device {
        "" => found.starts_with("/dev/loop") || nbd::device_of(found).is_some(),
        device => found == device,
    };
    let there = devices_at(dir)?;
    let Some(found) = there.iter().rfind(|found| ours(found)) else { return Ok(()) };
    if let Some(top) = there.last().filter(|top| !ours(top)) {
        let what = format!("{top} is mounted at {} on top of the view: unmount that first", dir.display());
        return Err(Error::State(what));
    }
    let mut umount = Command::new("umount");
    umount.args(lazily.then_some("--lazy")).arg("--").arg(dir);
    let done = run(&umount)?;
    if !done.status.success() && devices_at(dir)?.last() == Some(found) {
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        return Err(Error::State(format!("{said}; end what uses it, or force it")));
    }
    Ok(())
}
/// Waits until no loop device has a file that `ours` says is ours; after a while it is asked to go.
pub fn wait_for_loops(ours: impl Fn(&Loop) -> bool) {
    let end = Instant::now() + LOOP_PATIENCE;
    loop {
        let left: Vec<Loop> = loops().into_iter().filter(&ours).collect();
        if left.is_empty() {
            return;
        }
        if Instant::now() >= end {
            for bound in left {
                tracing::warn!(device = bound.name, file = %bound.file.display(), "the loop device is still in use");
                release(&bound);
            }
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn release(bound: &Loop) {
    let mut losetup = Command::new("losetup");
    losetup.arg("--detach").arg(format!("/dev/{}", bound.name));
    if let Err(error) = run(&losetup) {
        tracing::warn!(device = bound.name, %error, "the loop device cannot be detached");
    }
}

/// Takes away every mount and loop device on files that are `ours`, for files that nobody serves any more, and every mount of an NBD device
/// that is `placed` by us: its device died with the agent that had made it. Answers the directories.
pub fn sweep(ours: impl Fn(&Path) -> bool, placed: impl Fn(&Mount) -> bool) -> Vec<PathBuf> {
    let found: Vec<Loop> = loops().into_iter().filter(|bound| ours(&bound.file)).collect();
    let mounts = mounted().unwrap_or_default();
    let of = |mount: &&Mount| {
        let named = |bound: &Loop| bound.device == mount.device || mount.source == format!("/dev/{}", bound.name);
        found.iter().any(named) || (nbd::device_of(&mount.source).is_some() && placed(mount))
    };
    let mut dirs = Vec::new();
    for mount in mounts.iter().rev().filter(of) {
        // Its reads and writes fail at once, so this waits for nobody.
        match umount2(&mount.dir, MntFlags::MNT_DETACH) {
            Ok(()) => dirs.push(mount.dir.clone()),
            Err(error) => {
                tracing::warn!(dir = %mount.dir.display(), %error, "a mount of a dead view cannot be detached")
            }
        }
    }
    let names: Vec<String> = found.iter().map(|bound| bound.name.clone()).collect();
    for bound in loops().iter().filter(|bound| names.contains(&bound.name) && ours(&bound.file)) {
        release(bound); // one that is in use goes with its last user
    }
    dirs
}

/// Runs a tool to its end, in the program's own words. It is killed when it takes too long, and when the agent ends.
fn run(command: &Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |error: io::Error| Error::device("run", program.clone(), &error);
    let child = in_own_words(command).spawn().map_err(failed)?;
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if ended.recv_timeout(TOOL_PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    });
    let output = child.wait_with_output().map_err(failed);
    let _ = done.send(());
    let _ = watchdog.join();
    let output = output?;
    if output.status.code() == Some(127) {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::State(format!("{program} is missing on this host: {said}")));
    }
    Ok(output)
}

/// A tool that speaks its own words (no translations) and is killed when the thread that started it ends.
fn in_own_words(command: &Command) -> Command {
    // By `setpriv` and not between fork and exec: so no copy of this process, with all its locked memory, is made.
    let mut wrapped = Command::new(setpriv());
    wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    wrapped.env("LC_ALL", "C").env("PATH", tool_path());
    wrapped.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    wrapped
}

/// Where `setpriv` is: for a bare name and a search path of its own for the child, the standard library would fork this process.
fn setpriv() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        let path = tool_path();
        let mut places = std::env::split_paths(&path).map(|dir| dir.join("setpriv"));
        // Where there is none, starting it says so.
        places.find(|place| place.is_absolute() && place.is_file()).unwrap_or_else(|| PathBuf::from("setpriv"))
    })
}

/// A service's path may lack the administrator's tools.
fn tool_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    for dir in ["/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        if !path.is_empty() {
            path.push(":");
        }
        path.push(dir);
    }
    path
}

/// Whether `file`, as the kernel names a loop device's file, lies in `dir`. A directory that was detached lazily is not part of the name any
/// more.
pub fn lies_in(file: &Path, dir: &Path, id: &str) -> bool {
    let name = file.file_name().map(|name| name.as_bytes());
    let name = name.map(|name| name.strip_suffix(b" (deleted)").unwrap_or(name));
    name == Some(id.as_bytes()) && (file.starts_with(dir) || file.parent() == Some(Path::new("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_is_read_with_its_escapes() {
        let line = b"118 28 7:3 / /mnt/with\\040space rw,relatime shared:64 - ext4 /dev/loop3 rw";
        let mount = mount_line(line).expect("a mount");
        assert_eq!((mount.device, mount.dir.as_path()), ((7, 3), Path::new("/mnt/with space")));
        assert_eq!((mount.kind.as_str(), mount.source.as_str()), ("ext4", "/dev/loop3"));
        assert_eq!(mount_line(b""), None);
        assert_eq!(mount_line(b"1 2 x:y / /a - b c"), None);
        assert_eq!(unescape(b"a\\04"), b"a\\04");
        assert!(mounted().expect("there is a list").iter().any(|mount| mount.dir == Path::new("/")));
    }

    #[test]
    fn tools_are_started_by_a_path() {
        let command = in_own_words(&Command::new("true"));
        let program = Path::new(command.get_program());
        assert!(program.is_absolute() || !Path::new("/usr/bin/setpriv").exists(), "{}", program.display());
    }

    #[test]
    fn what_is_on_no_mount_of_ours_is_not_ours() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let file = temp.path().join("file");
        std::fs::write(&file, "x").expect("write");
        assert!(!is_own(&file, &[temp.path().to_owned()]).expect("there is a list"), "nothing is mounted there");
        assert!(rests_on((0, 0)).is_empty(), "there is no such device");
        for bound in loops() {
            assert!(rests_on(bound.device).contains(&bound.device), "{}", bound.name);
        }
    }

    #[test]
    fn the_only_file_system_is_chosen_and_among_several_one_must_be_named() {
        let part = |number, kind: &str, mountable| Part {
            number,
            kind: kind.to_owned(),
            mountable,
            label: if number == 2 { "root".to_owned() } else { String::new() },
            ..Part::whole()
        };
        let (one, two) = (part(1, "vfat", true), part(2, "ext4", true));
        let swap = part(3, "swap", false);
        let both = [one.clone(), two.clone(), swap.clone()];
        assert_eq!(choose(&[two.clone(), swap.clone()], None).expect("the only one"), &two);
        assert_eq!(choose(&both, Some(1)).expect("named"), &one);
        let words = |parts: &[Part], wanted| choose(parts, wanted).expect_err("refused").to_string();
        let several = words(&both, None);
        assert!(
            several.contains("partition") && several.contains("1 (vfat)") && several.contains("2 (ext4, \"root\")")
        );
        assert!(words(&both, Some(7)).contains('7'));
        assert!(words(&both, Some(3)).contains("swap"));
        assert!(words(&[Part::whole()], None).contains("nothing known"));
    }

    #[test]
    fn a_read_only_mount_replays_nothing() {
        assert_eq!(options("ext4", false), ("ext4", "ro,noload"));
        assert_eq!(options("xfs", false), ("xfs", "ro,norecovery,nouuid"));
        assert_eq!(options("ntfs", false), ("ntfs3", "ro"));
        for kind in ["ext2", "ext4", "xfs", "btrfs", "vfat", "f2fs"] {
            assert!(options(kind, false).1.split(',').any(|word| word == "ro"));
            assert!(options(kind, true).1.split(',').any(|word| word == "rw"));
        }
    }

    #[test]
    fn a_file_is_found_again_after_its_directory_was_detached() {
        let (dir, id) = (Path::new("/run/a/views"), "0d7c");
        assert!(lies_in(Path::new("/run/a/views/0d7c"), dir, id) && lies_in(Path::new("/0d7c"), dir, id));
        assert!(lies_in(Path::new("/run/a/views/0d7c (deleted)"), dir, id));
        assert!(!lies_in(Path::new("/run/b/views/0d7c"), dir, id) && !lies_in(Path::new("/run/a/views/0d7"), dir, id));
    }
}
