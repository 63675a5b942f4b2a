//! Promise: where the configuration prefers it, views are mounted by the kernel's own NBD client, and nothing of it is left behind, also when
//! the agent is killed. Most build machines have no such client: so the agent runs in an emulated guest here, on real block devices.

use std::path::{Path, PathBuf};

use cdp_tests::guest::{Boot, Contents, Guest, last_line};
use cdp_tests::local::{Loop, run};
use cdp_tests::process::{binaries, scratch};
use cdp_tests::skip_unless_mountable;

const CONFIG: &str = r#"
state_dir = "/state"

[grpc]
unix = "/run/cdp/agent.sock"

[nbd]
unix = "/run/cdp/nbd.sock"

[fuse]
dir = "/run/cdp"

[views]
attach = "nbd"

[[volume]]
name = "vm"
path = "/dev/vda"
"#;

/// FUSE is not loaded: no loop device can stand in.
const START: &str = r#"
mkdir -p /state /run/cdp /live
ctl() { cdpctl --agent unix:/run/cdp/agent.sock "$@" 2>>/agent.log; }
up() {
    cdp-agent --config /etc/agent.toml >>/agent.log 2>&1 & pid=$!
    for try in $(seq 600); do ctl list >/dev/null 2>&1 && return; sleep 0.1; done
    cat /agent.log
}
shut() { ctl view close $(ctl view list --output json | sed -n 's/.*"id": *"\([^"]*\)".*/\1/p' | head -n 1) >/dev/null; }
mounts() { grep -c ' /view' /proc/mounts; }
devices() { cat /sys/block/nbd*/pid 2>/dev/null | wc -l; }
settled() {
    for try in $(seq 600); do [ "$(mounts) $(devices)" = "$1" ] && break; sleep 0.1; done
    echo "$(mounts) $(devices)"
}
"#;

/// The path of a tool of this host.
fn tool(name: &str) -> PathBuf {
    let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().map(|dir| Path::new(dir).join(name));
    found.into_iter().find(|path| path.exists()).unwrap_or_else(|| panic!("there is no {name} here"))
}

/// A disk with a partition table and an ext4 in its only partition, 48 MiB from 1 MiB on.
fn make_disk(path: &Path) {
    let file = std::fs::File::create(path).expect("a file");
    file.set_len(64 << 20).expect("its size");
    let table = format!("printf 'start=2048,size=98304,type=83\\n' | sfdisk -q {}", path.display());
    run("sh", &["-c", &format!("PATH=$PATH:/sbin:/usr/sbin; {table}")]);
    let partition = Loop::on(path, 1 << 20, 48 << 20);
    run("mkfs.ext4", &["-q", "-F", &partition.0]);
}

#[test]
fn views_are_mounted_by_the_kernels_nbd_client_and_leave_no_device_behind() {
    skip_unless_mountable!();
    let tools = ["setpriv", "mount", "umount", "partx", "blkid", "cp"].map(tool);
    let (agent, ctl) = (binaries().join("cdp-agent"), binaries().join("cdpctl"));
    let mut programs: Vec<&Path> = tools.iter().map(PathBuf::as_path).collect();
    programs.extend([agent.as_path(), ctl.as_path()]);
    let contents = Contents {
        modules: &["nbd"],
        packaged: &["nbd-client"],
        programs: &programs,
        files: &[("etc/agent.toml", CONFIG)],
        start: START,
    };
    let boot = match Boot::fetch(&contents) {
        Ok(boot) => boot,
        Err(why) => return cdp_tests::skip(&format!("no guest ({why})")),
    };
    let dir = scratch();
    let (primary, journal) = (dir.path().join("primary.img"), dir.path().join("journal.img"));
    make_disk(&primary);
    std::fs::File::create(&journal).expect("a file").set_len(1 << 30).expect("its size");
    let disks = [&primary, &journal].map(|path| format!("driver=file,filename={}", path.display()));
    let mut guest = Guest::boot(&boot, &disks, &[]);
    let expect = |guest: &mut Guest, script: &str, wanted: &str| {
        let said = guest.ask(script);
        if last_line(&said) != wanted {
            panic!("wanted {wanted:?}:\n{}\n{}", said.join("\n"), guest.ask("cat /agent.log").join("\n"));
        }
    };

    expect(
        &mut guest,
        "up; ctl disk init /dev/vdb >/dev/null && ctl edit vm --reserve-capacity 512MiB >/dev/null && ctl enable vm >/dev/null; echo $?",
        "0",
    );
    // The volume itself, by hand: two states of it.
    guest.ask("nbd-client -unix /run/cdp/nbd.sock /dev/nbd7 -name vm -nonetlink -block-size 512 >/dev/null 2>&1");
    guest
        .ask("for try in $(seq 600); do [ -b /dev/nbd7p1 ] && break; sleep 0.1; done; mount -t ext4 /dev/nbd7p1 /live");
    guest.ask("echo early >/live/file; sync; ctl mark vm --name early; rm /live/file; echo late >/live/other; sync");
    expect(&mut guest, "umount /live; nbd-client -d /dev/nbd7; settled '0 0'", "0 0");

    // Read-only: the partition is found, nothing is replayed, and closing ends the device.
    expect(
        &mut guest,
        "ctl view open vm --at early --mount /view >/open 2>&1; echo $?; cat /open >&2; settled '1 1'",
        "1 1",
    );
    expect(&mut guest, "grep ' /view ' /proc/mounts | cut -d' ' -f1", "/dev/nbd0p1");
    expect(&mut guest, "cat /view/file", "early");
    expect(&mut guest, "touch /view/new 2>/dev/null; echo $?", "1");
    expect(&mut guest, "ls /view | grep -c other", "0");
    expect(&mut guest, "shut; echo $?", "0");
    expect(&mut guest, "settled '0 0'", "0 0");

    // Writable: the file system replays its journal in the scratch overlay; the volume sees nothing of it.
    expect(
        &mut guest,
        "ctl view open vm --at early --mount /view --writable >/dev/null; echo scratch >/view/new; sync; cat /view/new",
        "scratch",
    );
    expect(&mut guest, "shut; settled '0 0'", "0 0");
    expect(&mut guest, "ctl view cp vm /other /copy --at now >/dev/null; cat /copy", "late");
    expect(&mut guest, "settled '0 0'", "0 0");

    // A mount that cannot be made leaves no device.
    expect(&mut guest, "ctl view open vm --at early --mount /view --partition 3 >/dev/null 2>&1; settled '0 0'", "0 0");

    // Killed with a view mounted: its client dies with the agent (the device is named until its mount goes); the next agent takes the dead
    // mount away and makes it anew.
    expect(&mut guest, "ctl view open vm --at early --mount /view >/dev/null; settled '1 1'", "1 1");
    expect(
        &mut guest,
        "kill -9 $pid; for try in $(seq 600); do pidof nbd-client >/dev/null || break; sleep 0.1; done; pidof nbd-client | wc -w",
        "0",
    );
    expect(&mut guest, "up; settled '1 1'", "1 1");
    expect(&mut guest, "cat /view/file", "early");

    // A clean stop unmounts; the next start mounts again.
    expect(&mut guest, "kill $pid; wait $pid; settled '0 0'", "0 0");
    expect(&mut guest, "up; settled '1 1'; cat /view/file", "early");
    expect(&mut guest, "shut; settled '0 0'", "0 0");
    expect(&mut guest, "kill $pid; wait $pid; echo $?", "0");
    guest.tell("poweroff -f");
    guest.until_off();
}
