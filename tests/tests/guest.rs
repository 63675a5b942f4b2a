//! A real guest: Linux in QEMU (emulated, no KVM) with two disks on the agent's NBD exports. It writes and syncs, the agent is killed and comes
//! back while it runs, the guest goes on; views of an earlier instant hold what its files were then. Its own QEMU guest agent freezes its file
//! systems for a mark.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use cdp_tests::guest::{Boot, Contents, Guest};
use cdp_tests::local::{Loop, assert_nothing_attached, run};
use cdp_tests::process::Agent;
use cdp_tests::skip_unless_mountable;

const START: &str = "
mkdir -p /a /b
for try in $(seq 600); do [ -b /dev/vda ] && [ -b /dev/vdb ] && ls /dev/vport*p1 >/dev/null 2>&1 && break; sleep 0.1; done
qemu-ga --daemonize --method virtio-serial --path /dev/vport*p1 --statedir /run --pidfile /run/qga.pid --logfile /run/qga.log
mount -t ext4 /dev/vda /a; mount -t ext4 /dev/vdb /b
";

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

#[test]
fn a_guest_goes_on_through_a_killed_agent_and_its_past_can_be_read() {
    skip_unless_mountable!();
    let contents =
        Contents { modules: &["virtio_console"], packaged: &["qemu-ga"], programs: &[], files: &[], start: START };
    let boot = match Boot::fetch(&contents) {
        Ok(boot) => boot,
        Err(why) => return cdp_tests::skip(&format!("no kernel for a guest ({why})")),
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
    let disks = ["demo", "second"].map(|export| {
        let path = agent.socket();
        format!("driver=nbd,server.type=unix,server.path={},export={export},reconnect-delay=120", text(&path))
    });
    let socket = format!("socket,id=agent,path={},server=on,wait=off", text(&channel));
    let port = "virtserialport,chardev=agent,name=org.qemu.guest_agent.0";
    let more = ["-device", "virtio-serial-pci", "-chardev", &socket, "-device", port];
    let mut guest = Guest::boot(&boot, &disks, &more);
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
        // A thaw that takes too long on a busy machine is refused: then nothing was marked, and it can be asked again.
        let end = Instant::now() + Duration::from_secs(300);
        let marked = loop {
            match agent.try_ctl(&args) {
                Ok(marked) => break marked,
                Err(refusal) => {
                    assert!(refusal.said.contains("no answer within") && Instant::now() < end, "{refusal}");
                    assert!(!agent.info("demo").to_string().contains(name), "{refusal}");
                }
            }
        };
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
    guest.until_off();
    assert_nothing_attached(agent.dir());
    agent.stop();
}
