//! Guests: Linux in QEMU (emulated, no KVM), spoken to over the serial console.
//!
//! Kernel, busybox and some programs are Debian packages, fetched once and kept under `target/`; all other programs and libraries are this
//! host's.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::local::{run, try_run};

/// Emulation on a busy machine is slow; what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// What the kernel needs to see its disks, in an order that works.
const MODULES: [&str; 6] =
    ["virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];
/// The first process: loads modules, does what the test wants at first, and then what the console says.
const INIT_HEAD: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /bin /run /tmp
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/sbin:/usr/bin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for pass in 1 2 3; do for module in /modules/*.ko; do insmod $module 2>/dev/null; done; done
";
const INIT_TAIL: &str = "
echo GUEST-IS-UP
while read -r line; do eval \"$line\"; done
poweroff -f
";

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

/// What is in a guest beside kernel and busybox.
#[derive(Debug)]
pub struct Contents<'a> {
    /// Names of further modules.
    pub modules: &'a [&'a str],
    /// Programs of the packages: `qemu-ga`, `nbd-client`.
    pub packaged: &'a [&'a str],
    /// Programs of this host, by path.
    pub programs: &'a [&'a Path],
    /// Further files: path in the guest without the slash, and text.
    pub files: &'a [(&'a str, &'a str)],
    /// Shell commands at the end of its start.
    pub start: &'a str,
}

/// Kernel and initramfs, made from Debian's packages.
#[derive(Debug)]
pub struct Boot {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Boot {
    /// # Errors
    /// Why there can be none here: the test that needs it says so and ends.
    pub fn fetch(contents: &Contents<'_>) -> Result<Self, String> {
        if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
            return Err("there is no qemu-system-x86_64".to_owned());
        }
        let exe = std::env::current_exe().map_err(|error| error.to_string())?;
        let dir = exe.ancestors().nth(3).ok_or("no target folder")?.join("guest");
        let root = dir.join("root");
        let packages = Packages::fetch(&dir, &root)?;
        let mut archive = Cpio::default();
        for folder in ["bin", "modules", "proc", "sys", "dev"] {
            archive.add_folder(folder);
        }
        archive.add("bin/busybox", 0o100_755, &read(&packages.busybox)?);
        let library_path = ["lib", "usr/lib"].map(|dir| text(&root.join(dir).join("x86_64-linux-gnu")).to_owned());
        let library_path = library_path.join(":");
        let mut libraries = BTreeSet::new();
        for name in contents.packaged {
            let found = packages.programs.iter().find(|path| path.ends_with(name));
            let path = found.ok_or_else(|| format!("the packages hold no {name}"))?;
            archive.add_program(path, &library_path, &mut libraries)?;
        }
        for path in contents.programs {
            archive.add_program(path, &library_path, &mut libraries)?;
        }
        for library in &libraries {
            // Where its loader looks, wherever it lies here.
            let name = library.file_name().and_then(|name| name.to_str()).ok_or("a library without a name")?;
            let place = if name.starts_with("ld-linux") { "lib64" } else { "usr/lib/x86_64-linux-gnu" };
            archive.add_folder(place);
            archive.add(&format!("{place}/{name}"), 0o100_755, &read(library)?);
        }
        for (name, content) in contents.files {
            archive.add_folder(name.rsplit_once('/').map_or("", |(folder, _)| folder));
            archive.add(name, 0o100_644, content.as_bytes());
        }
        archive.add("init", 0o100_755, format!("{INIT_HEAD}{}{INIT_TAIL}", contents.start).as_bytes());
        let list = run("find", &[text(&root.join("lib/modules")), "-name", "*.ko"]);
        for (number, name) in MODULES.iter().chain(contents.modules).enumerate() {
            if let Some(path) = list.lines().find(|path| path.ends_with(&format!("/{name}.ko"))) {
                archive.add(&format!("modules/{number:02}-{name}.ko"), 0o100_644, &read(Path::new(path))?);
            }
        }
        let initramfs = dir.join(format!("initramfs-{}", std::process::id()));
        fs::write(&initramfs, archive.end()).map_err(|error| error.to_string())?;
        Ok(Self { kernel: packages.kernel, initramfs })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// What the packages hold.
struct Packages {
    kernel: PathBuf,
    busybox: PathBuf,
    programs: Vec<PathBuf>,
}

impl Packages {
    fn fetch(dir: &Path, root: &Path) -> Result<Self, String> {
        if let Some(there) = Self::found(root) {
            return Ok(there);
        }
        let _ = fs::remove_dir_all(dir); // there may be none
        fs::create_dir_all(root).map_err(|error| error.to_string())?;
        // Old package lists name packages that are not there any more.
        let fetch = "cd \"$1\" || exit 1
            get() {
                kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
                libraries=$(apt-cache depends nbd-client | awk '/Depends: libnl/ {print $2}')
                [ -n \"$kernel\" ] && apt-get download \"$kernel\" busybox-static qemu-guest-agent nbd-client $libraries
            }
            get || { apt-get update >/dev/null && get; } || exit 1
            for deb in *.deb; do dpkg-deb -x \"$deb\" root || exit 1; done";
        let fetched = try_run("sh", &["-c", fetch, "sh", text(dir)]);
        if !fetched.status.success() {
            return Err(format!("the packages cannot be fetched: {}", String::from_utf8_lossy(&fetched.stderr).trim()));
        }
        Self::found(root).ok_or_else(|| "the packages do not hold what they should".to_owned())
    }

    fn found(root: &Path) -> Option<Self> {
        let there = |places: &[&str]| places.iter().map(|place| root.join(place)).find(|path| path.exists());
        let files = fs::read_dir(root.join("boot")).ok()?.flatten().map(|entry| entry.path());
        let kernel = files.into_iter().find(|path| text(path).contains("vmlinuz"))?;
        Some(Self {
            kernel,
            busybox: there(&["bin/busybox", "usr/bin/busybox"])?,
            programs: vec![there(&["usr/sbin/qemu-ga"])?, there(&["sbin/nbd-client", "usr/sbin/nbd-client"])?],
        })
    }
}

impl Drop for Boot {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.initramfs);
    }
}

/// An archive as the kernel takes it ("newc").
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    files: u32,
    folders: BTreeSet<String>,
}

impl Cpio {
    /// A folder and those above it, each once.
    fn add_folder(&mut self, path: &str) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.add_folder(above);
        }
        if !path.is_empty() && self.folders.insert(path.to_owned()) {
            self.add(path, 0o040_755, &[]);
        }
    }

    /// A program, as `bin/NAME`; its libraries join those that are to be added.
    fn add_program(
        &mut self,
        program: &Path,
        library_path: &str,
        libraries: &mut BTreeSet<PathBuf>,
    ) -> Result<(), String> {
        let ldd = format!("LD_LIBRARY_PATH={library_path} ldd {}", text(program));
        // "name => /path (address)", and the loader without a name.
        for library in run("sh", &["-c", &ldd]).lines() {
            match library.split_whitespace().find(|word| word.starts_with('/')) {
                Some(path) => _ = libraries.insert(PathBuf::from(path)),
                None if library.contains("not found") => {
                    return Err(format!("a library of {} is missing here: {}", program.display(), library.trim()));
                }
                None => {}
            }
        }
        let name = program.file_name().and_then(|name| name.to_str()).ok_or("a program without a name")?;
        self.add(&format!("bin/{name}"), 0o100_755, &read(program)?);
        Ok(())
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files += 1;
        let size = u32::try_from(content.len()).expect("a small file");
        let name_size = u32::try_from(name.len() + 1).expect("a short name");
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// A running guest, spoken to over its serial console. Killed when dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    console: ChildStdin,
    lines: Receiver<String>,
    said: Vec<String>,
    asked: usize,
}

impl Guest {
    /// `disks`: what each disk's `-blockdev` has beside its name; `/dev/vda` is the first. `more`: further arguments.
    pub fn boot(boot: &Boot, disks: &[String], more: &[&str]) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        // Half of it may hold files, and the agent with its symbols is a hundred megabytes.
        command.args(["-accel", "tcg", "-m", "1024", "-smp", "1", "-display", "none", "-no-reboot", "-nodefaults"]);
        command.args(["-serial", "stdio", "-append", "console=ttyS0 quiet loglevel=1 panic=-1"]);
        command.arg("-kernel").arg(&boot.kernel).arg("-initrd").arg(&boot.initramfs);
        for (number, disk) in disks.iter().enumerate() {
            command.arg("-blockdev").arg(format!("node-name=disk{number},{disk}"));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=disk{number}"));
        }
        let mut child = command
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("start qemu-system-x86_64");
        let console = child.stdin.take().expect("its console");
        let from = BufReader::new(child.stdout.take().expect("its console"));
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in from.split(b'\n').map_while(Result::ok) {
                if tell.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    return;
                }
            }
        });
        let mut guest = Self { child, console, lines, said: Vec::new(), asked: 0 };
        guest.until("GUEST-IS-UP");
        guest
    }

    /// Waits for a line; what was said before it since the last wait.
    pub fn until(&mut self, wanted: &str) -> Vec<String> {
        let from = self.said.len();
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line == wanted => return self.said[from..].to_vec(),
                Ok(line) => self.said.push(line),
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the guest does not say {wanted:?}:\n{}", self.said.join("\n"))
                }
                Err(RecvTimeoutError::Disconnected) => panic!("the guest has ended:\n{}", self.said.join("\n")),
            }
        }
    }

    /// Begins something.
    pub fn tell(&mut self, script: &str) {
        writeln!(self.console, "{script}").expect("write to the console");
    }

    /// Has something done, to its end; what it printed.
    pub fn ask(&mut self, script: &str) -> Vec<String> {
        self.asked += 1;
        let mark = format!("DONE-{}", self.asked);
        // The console shows what was typed too: there it stands in pieces.
        self.tell(&format!("{script}; echo DONE\"\"-{}", self.asked));
        self.until(&mark)
    }

    /// Waits until it has powered off.
    pub fn until_off(&mut self) {
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("wait for QEMU").is_none() {
            assert!(Instant::now() < end, "the guest does not power off:\n{}", self.said.join("\n"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The last line of what [`Guest::ask`] answered that is not the script's own.
pub fn last_line(said: &[String]) -> &str {
    said.iter().rev().find(|line| !line.is_empty() && !line.contains("DONE")).map_or("", String::as_str)
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
