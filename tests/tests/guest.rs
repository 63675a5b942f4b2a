//! A real guest: Linux in QEMU (emulated, no KVM) with two disks on the agent's NBD exports. It writes and syncs, the agent is killed and comes
//! back while it runs, the guest goes on; views of an earlier instant hold what its files were then. Its own QEMU guest agent freezes its file
//! systems for a mark.
//!
//! Kernel, busybox and guest agent are Debian packages, fetched once and kept under `target/`; the agent's libraries are this host's.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use cdp_tests::local::{Loop, assert_nothing_attached, run, try_run};
use cdp_tests::process::Agent;
use cdp_tests::skip_unless_mountable;

/// Emulation on a busy machine is slow; what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// What the kernel needs to see its disks, in an order that works.
const MODULES: [&str; 7] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
];
/// The first process: loads modules, mounts, and then does what the console says.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /bin /run /a /b
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for pass in 1 2 3; do for module in /modules/*.ko; do insmod $module 2>/dev/null; done; done
for try in $(seq 100); do [ -b /dev/vda ] && [ -b /dev/vdb ] && break; sleep 0.1; done
qemu-ga --daemonize --method virtio-serial --path /dev/vport*p1 --statedir /run --pidfile /run/qga.pid --logfile /run/qga.log
mount -t ext4 /dev/vda /a && mount -t ext4 /dev/vdb /b && echo GUEST-IS-UP
while read -r line; do eval \"$line\"; done
poweroff -f
";

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

/// Kernel and initramfs, made from Debian's packages.
struct Boot {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Boot {
    fn fetch() -> Result<Self, String> {
        let exe = std::env::current_exe().map_err(|error| error.to_string())?;
        let dir = exe.ancestors().nth(3).ok_or("no target folder")?.join("guest");
        let found = |root: &Path| -> Option<(PathBuf, PathBuf, PathBuf)> {
            let kernel = fs::read_dir(root.join("boot")).ok()?.flatten().map(|entry| entry.path());
            let kernel = kernel.into_iter().find(|path| text(path).contains("vmlinuz"))?;
            let (busybox, agent) = (root.join("bin/busybox"), root.join("usr/sbin/qemu-ga"));
            (busybox.exists() && agent.exists()).then_some((kernel, busybox, agent))
        };
        let root = dir.join("root");
        if found(&root).is_none() {
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&root).map_err(|error| error.to_string())?;
            // Old package lists name packages that are not there any more.
            let fetch = "cd \"$1\" || exit 1
                get() {
                    kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
                    [ -n \"$kernel\" ] && apt-get download \"$kernel\" busybox-static qemu-guest-agent
                }
                get || { apt-get update >/dev/null && get; } || exit 1
                for deb in *.deb; do dpkg-deb -x \"$deb\" root || exit 1; done";
            let fetched = try_run("sh", &["-c", fetch, "sh", text(&dir)]);
            if !fetched.status.success() {
                return Err(format!(
                    "the packages cannot be fetched: {}",
                    String::from_utf8_lossy(&fetched.stderr).trim()
                ));
            }
        }
        let (kernel, busybox, guest_agent) =
            found(&root).ok_or("the packages do not hold a kernel, busybox and qemu-ga")?;
        let mut archive = Cpio::default();
        for folder in ["bin", "modules", "proc", "sys", "dev"] {
            archive.add_folder(folder);
        }
        let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
        archive.add("bin/busybox", 0o100_755, &read(&busybox)?);
        archive.add("bin/qemu-ga", 0o100_755, &read(&guest_agent)?);
        // "name => /path (address)", and the loader without a name.
        for library in run("ldd", &[text(&guest_agent)]).lines() {
            let Some(path) = library.split_whitespace().find(|word| word.starts_with('/')) else {
                if library.contains("not found") {
                    return Err(format!("a library of qemu-ga is missing here: {}", library.trim()));
                }
                continue;
            };
            let name = path.trim_start_matches('/');
            archive.add_folder(name.rsplit_once('/').map_or("", |(folder, _)| folder));
            archive.add(name, 0o100_755, &read(Path::new(path))?);
        }
        archive.add("init", 0o100_755, INIT.as_bytes());
        let list = run("find", &[text(&root.join("lib/modules")), "-name", "virtio*.ko"]);
        for (number, name) in MODULES.iter().enumerate() {
            if let Some(path) = list.lines().find(|path| path.ends_with(&format!("/{name}.ko"))) {
                archive.add(&format!("modules/{number}-{name}.ko"), 0o100_644, &read(Path::new(path))?);
            }
        }
        let initramfs = dir.join(format!("initramfs-{}", std::process::id()));
        fs::write(&initramfs, archive.end()).map_err(|error| error.to_string())?;
        Ok(Self { kernel, initramfs })
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
struct Guest {
    child: Child,
    console: ChildStdin,
    lines: Receiver<String>,
    said: Vec<String>,
    asked: usize,
}

impl Guest {
    /// `channel`: the socket of its guest agent.
    fn boot(boot: &Boot, socket: &Path, exports: [&str; 2], channel: &Path) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-m", "256", "-smp", "1", "-display", "none", "-no-reboot", "-nodefaults"]);
        command.args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"]);
        command.arg("-kernel").arg(&boot.kernel).arg("-initrd").arg(&boot.initramfs);
        for (number, export) in exports.iter().enumerate() {
            let path = text(socket);
            command.arg("-blockdev").arg(format!(
                "driver=nbd,node-name=disk{number},server.type=unix,server.path={path},export={export},reconnect-delay=120"
            ));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=disk{number}"));
        }
        command.args(["-device", "virtio-serial-pci", "-chardev"]);
        command.arg(format!("socket,id=agent,path={},server=on,wait=off", text(channel)));
        command.args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
        let mut child = command
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
    fn until(&mut self, wanted: &str) -> Vec<String> {
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
    fn tell(&mut self, script: &str) {
        writeln!(self.console, "{script}").expect("write to the console");
    }

    /// Has something done, to its end; what it printed.
    fn ask(&mut self, script: &str) -> Vec<String> {
        self.asked += 1;
        let mark = format!("DONE-{}", self.asked);
        // The console shows what was typed too: there it stands in pieces.
        self.tell(&format!("{script}; echo DONE\"\"-{}", self.asked));
        self.until(&mark)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_guest_goes_on_through_a_killed_agent_and_its_past_can_be_read() {
    skip_unless_mountable!();
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        return println!("SKIPPED: there is no qemu-system-x86_64");
    }
    let boot = match Boot::fetch() {
        Ok(boot) => boot,
        Err(why) => return println!("SKIPPED: no kernel for a guest ({why})"),
    };
    let mut agent = Agent::dev("64MiB", "2GiB");
    agent.ctl(&["edit", "demo", "--reserve-capacity", "700MiB"]);
    let second = agent.file("second.img");
    agent.ctl(&["volume", "add", "second", "--path", text(&second), "--size", "64MiB", "--create"]);
    agent.ctl(&["edit", "second", "--reserve-capacity", "700MiB"]);
    agent.ctl(&["enable", "second"]);
    for volume in ["demo", "second"] {
        let device = Loop::on(&agent.file(&format!("volumes/{volume}")), 0, 0);
        run("mkfs.ext4", &["-q", "-F", &device.0]);
    }
    assert_nothing_attached(agent.dir());

    let begun = Instant::now();
    let channel = agent.file("qga.sock");
    let mut guest = Guest::boot(&boot, &agent.socket(), ["demo", "second"], &channel);
    println!("the guest was up after {:.1} s", begun.elapsed().as_secs_f64());
    guest.ask("echo early >/a/file; echo early >/b/file; sync");
    let early =
        agent.ctl(&["mark", "demo", "second", "--name", "early"])["time"].as_u64().expect("its time").to_string();
    guest.ask("echo late >/a/file; rm /b/file; sync");

    // Under a load that syncs nothing: a plain mark finds file systems in the middle of something, a quiesced one finds them at rest.
    guest.tell(
        "(i=0; while ! [ -e /stop ]; do i=$((i+1)); echo $i >>/a/log; echo $i >>/b/log; done; echo LOG\"\"-ENDED) &",
    );
    std::thread::sleep(Duration::from_secs(1));
    let marks =
        [("plain", vec![], "crash", true), ("quiet", vec!["--quiesce", "--quiesce-max", "20s"], "application", false)];
    for (name, flags, kind, busy) in marks {
        let socket = format!("qga:{}", text(&channel));
        let flags = flags
            .into_iter()
            .flat_map(|flag| [flag].into_iter().chain((flag == "--quiesce").then_some(socket.as_str())));
        let args: Vec<&str> = ["mark", "demo", "second", "--name", name].into_iter().chain(flags).collect();
        let marked = agent.ctl(&args);
        assert!(marked.to_string().contains(kind), "{marked}");
        for volume in ["demo", "second"] {
            let view = agent.ctl(&["view", "open", volume, "--at", name]);
            let image = view["path"].as_str().expect("its file");
            let features = run("dumpe2fs", &["-h", image]);
            let features = features.lines().find(|line| line.contains("features:")).expect("its features");
            assert_eq!(features.contains("needs_recovery"), busy, "{volume} at {name}: {features}");
            if !busy {
                run("e2fsck", &["-fn", image]);
            }
            agent.ctl(&["view", "close", view["id"].as_str().expect("its id")]);
        }
    }
    guest.tell("touch /stop");
    guest.until("LOG-ENDED");

    // Killed while the guest writes, and away for a moment: the guest waits and goes on.
    guest.tell("(i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i >/a/count; echo $i >/b/count; sync; done; echo LOOP\"\"-ENDED) &");
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(700));
        agent.kill();
        std::thread::sleep(Duration::from_millis(700));
        agent.start();
    }
    guest.until("LOOP-ENDED");
    let seen = guest.ask("cat /a/count /b/count /a/file; echo after >/a/after; sync; dmesg | grep -ciE 'i/o error|ext4-fs error|remount'");
    let seen: Vec<&String> = seen.iter().filter(|line| !line.contains("DONE") && !line.is_empty()).collect();
    let last: Vec<&str> = seen.iter().rev().take(4).rev().map(|line| line.as_str()).collect();
    assert_eq!(last, ["60", "60", "late", "0"], "{seen:?}");

    // Both disks at one instant, while the guest runs.
    for volume in ["demo", "second"] {
        let out = agent.file(&format!("{volume}.old"));
        agent.ctl(&["view", "cp", volume, "/file", text(&out), "--at", &early]);
        assert_eq!(fs::read_to_string(&out).expect("the copy"), "early\n", "{volume}");
        let list = agent.ctl(&["view", "ls", volume, "/", "--at", &early]);
        let names: Vec<_> = list["entries"].as_array().expect("a list").iter().map(|e| e["name"].clone()).collect();
        assert!(!names.iter().any(|name| name == "count" || name == "after"), "{names:?}");
    }
    let out = agent.file("now");
    agent.ctl(&["view", "cp", "demo", "/after", text(&out), "--at", "now"]);
    assert_eq!(fs::read_to_string(&out).expect("the copy"), "after\n");
    guest.tell("umount /a; umount /b; poweroff -f");
    let end = Instant::now() + PATIENCE;
    while guest.child.try_wait().expect("wait for QEMU").is_none() {
        assert!(Instant::now() < end, "the guest does not power off:\n{}", guest.said.join("\n"));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_nothing_attached(agent.dir());
    agent.stop();
}
