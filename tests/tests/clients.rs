//! Promise: the NBD clients and file systems that people use work on volumes and views alike.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cdp_tests::mount::{Mount, live_on};
use cdp_tests::process::{Agent, View};
use cdp_tests::tools::{self, assert_ext4_sound, assert_xfs_sound, run, run_refused};
use cdp_tests::{Rng, now_ns};
use serde_json::Value;

fn path(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

/// A file with data, holes and zeroes.
fn patchwork(file: &Path, size: u64, seed: u64) {
    let out = File::create(file).unwrap();
    out.set_len(size).unwrap();
    let mut rng = Rng::new(seed);
    let mut piece = vec![0; 256 << 10];
    for at in (0..size).step_by(1 << 20) {
        if rng.percent(60) {
            rng.fill(&mut piece);
            out.write_all_at(&piece, at).unwrap();
        }
    }
}

fn export_view(agent: &Agent, view: &View, to: &Path) {
    run("nbdcopy", [&view.nbd_uri, path(to)]);
    assert_eq!(view.nbd_uri, agent.uri(&view.id), "the URI is the one that clients need");
}

#[test]
fn nbdinfo_tells_what_an_export_is_and_can() {
    let agent = Agent::dev("64MiB", "512MiB");
    let info: Value = serde_json::from_str(&run("nbdinfo", ["--json", &agent.uri("demo")])).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed", "{info}");
    assert_eq!(info["structured"], true, "{info}");
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 64 << 20, "{info}");
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_cache", "can_multi_conn", "can_block_status"] {
        let name = if can == "can_block_status" { "contexts" } else { can };
        assert!(export[name] == true || export[name].is_array(), "{can}: {info}");
    }
    assert_eq!(export["is_read_only"], false, "{info}");
    assert!(export["contexts"].as_array().unwrap().contains(&"base:allocation".into()), "{info}");
    assert_eq!(export["block_size_minimum"], 512, "{info}");

    let view = agent.open_view("demo", "now");
    let listed: Value = serde_json::from_str(&run("nbdinfo", ["--json", "--list", &agent.uri("")])).unwrap();
    let names: Vec<&str> =
        listed["exports"].as_array().unwrap().iter().filter_map(|export| export["export-name"].as_str()).collect();
    assert!(names.contains(&"demo") && names.contains(&view.id.as_str()), "{listed}");
    let info: Value = serde_json::from_str(&run("nbdinfo", ["--json", &view.nbd_uri])).unwrap();
    assert_eq!(info["exports"][0]["is_read_only"], true, "{info}");
    run_refused("nbdinfo", [&agent.uri("nobody")]);
}

/// Goal: images go in and come out the same through nbdcopy (several connections, many requests in flight) and qemu-img,
/// and holes stay holes.
#[test]
fn nbdcopy_and_qemu_img_copy_compare_and_map() {
    let mut agent = Agent::dev("64MiB", "1GiB");
    let (first, second, out) = (agent.file("first.raw"), agent.file("second.raw"), agent.file("out.raw"));
    patchwork(&first, 64 << 20, 1);
    patchwork(&second, 64 << 20, 2);
    let demo = agent.uri("demo");
    run("nbdcopy", ["--flush", path(&first), &demo]);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", path(&first), &demo]);
    let between = now_ns();
    run("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", path(&second), &demo]);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", path(&second), &demo]);
    run("nbdcopy", ["--connections=4", "--requests=64", &demo, path(&out)]);
    assert!(fs::read(&out).unwrap() == fs::read(&second).unwrap(), "nbdcopy out of the volume");

    let view = agent.open_view("demo", between);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", path(&first), &view.nbd_uri]);
    export_view(&agent, &view, &out);
    assert!(fs::read(&out).unwrap() == fs::read(&first).unwrap(), "nbdcopy out of the view");
    let qcow = agent.file("out.qcow2");
    run("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &view.nbd_uri, path(&qcow)]);
    run("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", path(&first), path(&qcow)]);

    // What the map calls zero is zero; and what was never written is found to be.
    for (uri, image) in [(&demo, &second), (&view.nbd_uri, &first)] {
        let map: Value = serde_json::from_str(&run("qemu-img", ["map", "--output=json", "-f", "raw", uri])).unwrap();
        let bytes = fs::read(image).unwrap();
        let mut covered = 0;
        let mut zero = 0;
        for extent in map.as_array().unwrap() {
            let (start, length) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
            assert_eq!(start, covered, "{map}");
            covered += length;
            if extent["zero"] == true {
                zero += length;
                let range = usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap();
                assert!(bytes[range].iter().all(|byte| *byte == 0), "the map calls data zero at {start}");
            }
        }
        assert_eq!(covered, 64 << 20);
        assert!(zero > 8 << 20, "{zero} bytes of zeroes found, much more was never written");
        let total: u64 = run("nbdinfo", ["--map", uri])
            .lines()
            .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
            .sum();
        assert_eq!(total, 64 << 20);
    }
    agent.stop();
    assert!(fs::read(agent.file("primary.img")).unwrap() == fs::read(&second).unwrap());
}

#[test]
fn qemu_io_writes_zeroes_discards_flushes_and_reads_back() {
    let agent = Agent::dev("64MiB", "512MiB");
    let demo = agent.uri("demo");
    let qemu_io = |uri: &str, commands: &[&str]| {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let said = run("qemu-io", ["-f", "raw", uri].into_iter().chain(commands));
        assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    };
    qemu_io(&demo, &["write -P 0x11 0 1M", "write -P 0x22 512 512", "flush", "write -f -P 0x33 64k 4k"]);
    let between = now_ns();
    qemu_io(
        &demo,
        &["write -z 0 128k", "write -z -u 256k 128k", "discard 512k 64k", "write -P 0x44 700k 3584", "flush"],
    );
    let now = [
        "read -P 0 0 128k",
        "read -P 0x11 128k 128k",
        "read -P 0 256k 128k",
        "read -P 0x44 700k 3584",
        "read -P 0x11 704k 320k",
    ];
    qemu_io(&demo, &now);
    let before = [
        "read -P 0x11 0 512",
        "read -P 0x22 512 512",
        "read -P 0x11 1k 63k",
        "read -P 0x33 64k 4k",
        "read -P 0x11 68k 956k",
    ];
    let view = agent.open_view("demo", between);
    let commands = before.iter().flat_map(|command| ["-c", command]);
    run("qemu-io", ["-r", "-f", "raw", &view.nbd_uri].into_iter().chain(commands));
    let said = tools::output("qemu-io", ["-f", "raw", "-c", "write 0 512", &view.nbd_uri]);
    let said = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(
        ["read-only", "not permitted", "Permission denied"].iter().any(|words| said.contains(words)),
        "a view took a write: {said}"
    );
    // Four requests at once, out of order.
    qemu_io(
        &demo,
        &["aio_write -P 1 8M 64k", "aio_write -P 2 9M 64k", "aio_write -P 3 10M 64k", "aio_flush", "read -P 2 9M 64k"],
    );
}

/// Goal: fio's own verification, four jobs at once, with the agent staying up.
#[test]
fn fio_verifies_what_four_jobs_wrote() {
    let agent = Agent::dev("64MiB", "1GiB");
    let uri = agent.uri("demo");
    let said = run(
        "fio",
        [
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--numjobs=4",
            "--size=16m",
            "--offset_increment=16m",
            "--iodepth=16",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--do_verify=1",
            "--randseed=7",
            "--group_reporting",
        ],
    );
    assert!(said.contains("err= 0"), "{said}");
    assert_eq!(agent.info("demo")["health"], "ok");
}

/// Writes what differs between two images to the volume, as a guest would that changed it: piece by piece.
fn push_changes(agent: &Agent, old: &Path, new: &Path) {
    let (old, new) = (fs::read(old).unwrap(), fs::read(new).unwrap());
    assert_eq!(old.len(), new.len());
    let mut client = agent.connect("demo");
    for (at, (old, new)) in (0..).step_by(4096).zip(old.chunks(4096).zip(new.chunks(4096))) {
        if old != new {
            client.write(at, new).unwrap();
        }
    }
    client.flush().unwrap();
    client.close();
}

/// Some real files, different ones for each seed.
fn make_tree(root: &Path, seed: u64) {
    let mut rng = Rng::new(seed);
    for folder in ["etc", "home/anna/photos", "var/log"] {
        fs::create_dir_all(root.join(folder)).unwrap();
        for number in 0..6 {
            let mut data = vec![0; usize::try_from(rng.below(200_000)).unwrap() + 1];
            rng.fill(&mut data);
            fs::write(root.join(folder).join(format!("file-{number}")), data).unwrap();
        }
    }
}

/// Goal: views of a volume with ext4 show each earlier file system, byte for byte and without a fault.
#[test]
fn an_ext4_image_is_sound_in_every_view_of_its_changes() {
    let agent = Agent::dev("64MiB", "1GiB");
    let tree = agent.file("tree");
    make_tree(&tree, 1);
    let image = agent.file("image-0");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    run("mkfs.ext4", ["-q", "-F", "-d", path(&tree), path(&image)]);
    run("nbdcopy", ["--flush", path(&image), &agent.uri("demo")]);
    let mut states: Vec<(u64, PathBuf)> = vec![(now_ns(), image)];
    let changes = [
        "rm /home/anna/photos/file-0\nrm /etc/file-1\n".to_owned(),
        format!("cd /var\nwrite {} new-file\nmkdir spool\n", path(&tree.join("etc/file-2"))),
        "rm /var/log/file-3\nrm /var/log/file-4\nrm /var/new-file\nrmdir /var/spool\n".to_owned(),
    ];
    for (number, commands) in (1..).zip(&changes) {
        let old = states.last().unwrap().1.clone();
        let new = agent.file(&format!("image-{number}"));
        fs::copy(&old, &new).unwrap();
        let script = agent.file("commands");
        fs::write(&script, commands).unwrap();
        run("debugfs", ["-w", "-f", path(&script), path(&new)]);
        push_changes(&agent, &old, &new);
        states.push((now_ns(), new));
    }
    for (at, image) in &states {
        let out = agent.file("out");
        let view = agent.open_view("demo", at);
        export_view(&agent, &view, &out);
        assert_ext4_sound(&out, &format!("view at {at}"));
        export_view(&agent, &view, &out);
        assert!(fs::read(&out).unwrap() == fs::read(image).unwrap(), "the view at {at} differs");
        agent.close_view(&view);
    }
    let view = agent.open_view("demo", states[0].0);
    export_view(&agent, &view, &agent.file("out"));
    let back = agent.file("back");
    run("debugfs", ["-R", &format!("dump /home/anna/photos/file-0 {}", path(&back)), path(&agent.file("out"))]);
    assert!(fs::read(&back).unwrap() == fs::read(tree.join("home/anna/photos/file-0")).unwrap(), "the deleted file");
}

/// Goal: the same with XFS images.
#[test]
fn an_xfs_image_is_sound_in_every_view_of_its_changes() {
    let agent = Agent::dev("320MiB", "2GiB");
    let mut states: Vec<(u64, PathBuf)> = Vec::new();
    for number in 0..3_u64 {
        let image = agent.file(&format!("image-{number}"));
        File::create(&image).unwrap().set_len(320 << 20).unwrap();
        let content = agent.file(&format!("content-{number}"));
        let mut data = vec![0; 300_000];
        Rng::new(number).fill(&mut data);
        fs::write(&content, data).unwrap();
        let proto = agent.file("proto");
        fs::write(&proto, format!("/\n0 0\nd--755 0 0\nfile-{number} ---644 0 0 {}\n$\n", path(&content))).unwrap();
        let uuid = format!("uuid=00000000-0000-0000-0000-00000000000{number}");
        run("mkfs.xfs", ["-q", "-f", "-m", &uuid, "-p", path(&proto), path(&image)]);
        match states.last() {
            None => drop(run("nbdcopy", ["--flush", path(&image), &agent.uri("demo")])),
            Some((_, old)) => push_changes(&agent, old, &image),
        }
        states.push((now_ns(), image));
    }
    for (at, image) in &states {
        let out = agent.file("out");
        let view = agent.open_view("demo", at);
        export_view(&agent, &view, &out);
        run("cmp", [path(&out), path(image)]);
        assert_xfs_sound(&out, &format!("view at {at}"));
        agent.close_view(&view);
    }
}

/// Goal: a view at any random instant is what a power cut would have left: the file system's own log replays and the check
/// finds no fault.
/// Method: a real kernel file system on the volume; views at random instants are copied, replayed and checked.
#[test]
fn mounted_file_systems_are_sound_at_random_instants() {
    if !Mount::possible() {
        cdp_tests::skip("needs root, /dev/fuse and loop devices");
        return;
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let mut tried = 0;
    for (kind, mkfs) in [("ext4", &["mkfs.ext4", "-q", "-F"][..]), ("xfs", &["mkfs.xfs", "-q", "-f"][..])] {
        if !known.contains(kind) {
            cdp_tests::skip(&format!("this kernel has no {kind}"));
            continue;
        }
        tried += 1;
        let agent = Agent::dev("320MiB", "2GiB");
        let mut rng = Rng::new(now_ns());
        let mount = Mount::new(&agent, mkfs, kind);
        let (begun, ended) = live_on(&mount.folder, 11, 120);
        drop(mount);
        let mut instants: Vec<u64> = (0..6).map(|_| begun + rng.below(ended - begun)).collect();
        instants.push(ended);
        for at in instants {
            let view = agent.open_view("demo", at);
            let out = agent.file("out");
            run("nbdcopy", [&view.nbd_uri, path(&out)]);
            if kind == "ext4" {
                assert_ext4_sound(&out, &format!("view at {at}"));
            } else {
                // xfs_repair does not replay a log; a mount does.
                let folder = agent.file("replay");
                fs::create_dir_all(&folder).unwrap();
                run("mount", ["-o", "loop,nouuid", path(&out), path(&folder)]);
                run("umount", [path(&folder)]);
                assert_xfs_sound(&out, &format!("view at {at}"));
            }
            agent.close_view(&view);
            fs::remove_file(&out).unwrap();
        }
    }
    assert!(tried > 0, "root, and no file system to try");
}
