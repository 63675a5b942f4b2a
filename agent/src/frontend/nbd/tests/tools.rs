//! Other people's clients. A tool that is not installed is named and left out.

use std::process::{Command, Output};

use super::client::Random;
use super::fixture::{BROKEN, Fixture, SIZE};

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        eprintln!("{tool} is not installed: this part is not checked");
    }
    found
}

fn run(tool: &str, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = Command::new(tool).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{tool} {arguments:?}: {status}\n{out}\n{err}");
    out.into_owned()
}

/// A file with data and holes, and its path.
fn image(fixture: &Fixture, seed: u64) -> (Vec<u8>, String) {
    let mut random = Random(seed);
    let mut bytes = vec![0; SIZE as usize];
    for _ in 0..40 {
        let at = random.below(BROKEN - (1 << 20)) as usize;
        let len = random.below(1 << 20) as usize;
        let data = random.bytes(len);
        bytes[at..at + len].copy_from_slice(&data);
    }
    let path = fixture.folder.path().join(format!("image-{seed}")).display().to_string();
    std::fs::write(&path, &bytes).unwrap();
    (bytes, path)
}

#[test]
fn nbdinfo_sees_what_there_is() {
    if !has("nbdinfo") {
        return;
    }
    let fixture = Fixture::new();
    assert_eq!(run("nbdinfo", &["--size", &fixture.uri("disk")]).trim(), SIZE.to_string());
    let all = run("nbdinfo", &[&fixture.uri("disk")]);
    for line in [
        "can_multi_conn: true",
        "can_fua: true",
        "can_df: true",
        "base:allocation",
        "block_size_minimum: 512",
        "is_read_only: false",
    ] {
        assert!(all.contains(line), "{line}:\n{all}");
    }
    let listed = run("nbdinfo", &["--list", &format!("nbd+unix://?socket={}", fixture.socket().display())]);
    assert!(listed.contains("export=\"disk\"") && listed.contains("export=\"read-only\""), "{listed}");
    run("nbdinfo", &["--is", "readonly", &fixture.uri("read-only")]);
    let (_, path) = image(&fixture, 1);
    if has("nbdcopy") {
        run("nbdcopy", &[&path, &fixture.uri("disk")]);
    }
    let map = run("nbdinfo", &["--map", &fixture.uri("disk")]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
}

#[test]
fn nbdcopy_brings_an_image_in_and_out() {
    if !has("nbdcopy") {
        return;
    }
    let fixture = Fixture::new();
    for (seed, options) in
        [(2, &["--requests=64"][..]), (3, &["--connections=1", "--requests=200", "--request-size=4096"])]
    {
        let (bytes, path) = image(&fixture, seed);
        let uri = fixture.uri("disk");
        run("nbdcopy", &[options, &["--flush", &path, &uri]].concat());
        assert!(fixture.on_shard(|state| state.disk.bytes.borrow().clone()) == bytes, "in, {options:?}");
        assert!(fixture.on_shard(|state| state.disk.flushes.replace(0)) > 0);
        let back = fixture.folder.path().join("back").display().to_string();
        run("nbdcopy", &[options, &[&uri, &back]].concat());
        assert!(std::fs::read(&back).unwrap() == bytes, "out, {options:?}");
        // An error is an error there, too.
        fixture.on_shard(|state| state.disk.bytes.borrow_mut()[BROKEN as usize] = 1);
        let failed = Command::new("nbdcopy").args(["--request-size=4096", &uri, "null:"]).output().unwrap();
        assert!(!failed.status.success() && String::from_utf8_lossy(&failed.stderr).contains("Input/output error"));
    }
}

#[test]
fn qemu_reads_writes_zeroes_discards_and_compares() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let fixture = Fixture::new();
    let (bytes, path) = image(&fixture, 4);
    // The broken block at the end is left out of what is read.
    let uri = fixture.uri("disk");
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &path, &uri]);
    assert!(fixture.on_shard(|state| state.disk.bytes.borrow().clone()) == bytes);
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
    let window = format!(
        "json:{{\"driver\":\"raw\",\"size\":{BROKEN},\"file\":{{\"driver\":\"nbd\",\"export\":\"disk\",\"server\":{{\"type\":\"unix\",\"path\":\"{}\"}}}}}}",
        fixture.socket().display()
    );
    let cut = format!(
        "json:{{\"driver\":\"raw\",\"size\":{BROKEN},\"file\":{{\"driver\":\"file\",\"filename\":\"{path}\"}}}}"
    );
    run("qemu-img", &["compare", &cut, &window]);
    let commands = [
        "write -P 0xaa 512 1024",
        "read -P 0xaa 512 1024",
        "write -P 0xbb -f 1M 3M",
        "write -z 1M 64k",
        "write -z -u 2M 64k",
        "read -P 0 1M 64k",
        "read -P 0 2M 64k",
        "read -P 0xbb 1114112 983040",
        "discard 4M 1M",
        "flush",
        "aio_write -P 0xcc 8M 1M",
        "aio_write -P 0xdd 9M 1M",
        "aio_read 0 1M",
        "aio_flush",
        "read -P 0xcc 8M 1M",
        "read -P 0xdd 9M 1M",
    ];
    let mut arguments = vec!["-f", "raw", &uri];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn fio_verifies_what_four_jobs_wrote() {
    if !has("fio")
        || !Command::new("fio")
            .arg("--enghelp")
            .output()
            .is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains("nbd"))
    {
        return;
    }
    let fixture = Fixture::new();
    run(
        "fio",
        &[
            "--name=verify",
            "--verify_state_save=0",
            "--ioengine=nbd",
            &format!("--uri={}", fixture.uri("disk")),
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--numjobs=4",
            "--size=8m",
            "--offset_increment=12m",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--fsync=64",
            "--minimal",
        ],
    );
    assert!(fixture.on_shard(|state| state.disk.flushes.get()) > 0);
    assert!(fixture.stat(|stats| &stats.requests) >= 4 * 2048 * 2);
}
