use std::os::unix::fs::FileExt as _;
use std::process::Command;

use futures::future::{Either, select};

use super::*;

fn with_disk<T: Send + 'static, F: Future<Output = T> + 'static>(
    path: &Path,
    test: impl FnOnce(Disk) -> F + Send + 'static,
) -> T {
    let file = DiskFile::open(path).unwrap();
    let thread = std::thread::spawn(move || {
        let ring = Ring::new().expect("io_uring");
        let disk = Disk::new(&ring, file);
        let future = test(disk);
        ring.run(future)
    });
    thread.join().expect("the disk's thread")
}

fn file_of(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn pattern(seed: u64, len: usize) -> IoBuf {
    let mut buf = IoBuf::zeroed(len);
    let mut state = seed | 1;
    for byte in buf.iter_mut() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 56) as u8;
    }
    buf
}

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        eprintln!("{tool} is not installed: this part is not checked");
    }
    found
}

/// Goal: a disk hangs when calls are under way and none of them ends; one of which nothing is asked does not, nor one that ends a call now and then.
#[test]
fn a_disk_of_which_no_call_ends_hangs() {
    let file = file_of(4096);
    with_disk(file.path(), |disk| async move {
        let hangs = disk.until_hanging(2 * HANG_LOOK_NS);
        let later = disk.ring.sleep_ns(3 * HANG_LOOK_NS + HANG_LOOK_NS / 2);
        assert!(matches!(select(hangs, later).await, Either::Right(_)), "nothing is under way");
        let first = Call::begin(&disk.shared.calls);
        let second = Call::begin(&disk.shared.calls);
        let hangs = disk.until_hanging(2 * HANG_LOOK_NS);
        let later = disk.ring.sleep_ns(HANG_LOOK_NS + HANG_LOOK_NS / 2);
        let Either::Right((_, hangs)) = select(hangs, later).await else { panic!("too early") };
        drop(first);
        let later = disk.ring.sleep_ns(HANG_LOOK_NS);
        let Either::Right((_, hangs)) = select(hangs, later).await else { panic!("one of them has just ended") };
        hangs.await;
        drop(second);
    });
}

/// Goal: a file whose size is no multiple of a block is exact to its last byte, by whichever descriptor.
#[test]
fn an_odd_tail_is_written_and_read_through_both_descriptors() {
    let size = 10 * 4096 + 1536;
    let file = file_of(size);
    let expected = with_disk(file.path(), move |disk| async move {
        assert_eq!((disk.size(), disk.current_size().unwrap(), disk.physical_block()), (size, size, 4096));
        let data = pattern(1, size as usize).share();
        // Parts that fit nothing: the device copies what O_DIRECT cannot take.
        let parts = vec![data.slice(0, 1000), data.slice(1000, 8192), data.slice(9192, size as usize - 9192)];
        disk.write(0, parts).await.unwrap();
        disk.sync().await.unwrap();
        let (result, read) = disk.read(0, IoBuf::zeroed(size as usize)).await;
        result.unwrap();
        assert!(read[..] == data[..]);
        // Over the tail again, then the block before it, then both at once.
        let fresh = pattern(2, 1536).share();
        disk.write(10 * 4096, vec![fresh.clone()]).await.unwrap();
        let before = pattern(3, 4096).share();
        disk.write(9 * 4096, vec![before.clone()]).await.unwrap();
        let (result, read) = disk.read(9 * 4096, IoBuf::zeroed(4096 + 1536)).await;
        result.unwrap();
        assert!(read[..4096] == before[..] && read[4096..] == fresh[..]);
        // One sector inside: not aligned at all.
        let (result, read) = disk.read(512, IoBuf::zeroed(1024)).await;
        result.unwrap();
        assert!(read[..] == data[512..1536]);
        disk.write(512, vec![fresh.slice(0, 512)]).await.unwrap();
        let (result, read) = disk.read(0, IoBuf::zeroed(4096)).await;
        result.unwrap();
        assert!(read[..512] == data[..512] && read[512..1024] == fresh[..512] && read[1024..] == data[1024..4096]);
        let mut expected = data.to_vec();
        expected[512..1024].copy_from_slice(&fresh[..512]);
        expected[9 * 4096..10 * 4096].copy_from_slice(&before);
        expected[10 * 4096..].copy_from_slice(&fresh);
        expected
    });
    assert!(std::fs::read(file.path()).unwrap() == expected);
}

#[test]
fn reading_past_the_end_says_so() {
    for size in [8192, 8192 + 512] {
        let file = file_of(size);
        with_disk(file.path(), move |disk| async move {
            for (offset, len) in [(8192, 4096), (4096, 8192), (0, 16384), (1 << 40, 512)] {
                let (result, _) = disk.read(offset, IoBuf::zeroed(len)).await;
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{offset}+{len} of {size}");
            }
        });
    }
}

#[test]
fn a_list_longer_than_iov_max_is_written_whole() {
    let file = file_of(0);
    with_disk(file.path(), |disk| async move {
        let data = pattern(4, 3000 * 512).share();
        let parts = (0..3000).map(|i| data.slice(i * 512, 512)).collect();
        disk.write(4096, parts).await.unwrap();
        let (result, read) = disk.read(4096, IoBuf::zeroed(3000 * 512)).await;
        result.unwrap();
        assert!(read[..] == data[..]);
    });
}

#[test]
fn zeroes_are_zeroes_whichever_way_they_are_made() {
    let size = 5_000_192;
    let file = file_of(size);
    with_disk(file.path(), move |disk| async move {
        let data = pattern(5, size as usize).share();
        for (offset, len) in [(0, size), (4096, 8192), (512, 5000 * 512), (size - 1024, 1024), (4096, 0)] {
            for way in ["punch", "zero range", "write"] {
                disk.shared.no_zero_range.set(way == "write");
                disk.write(0, vec![data.clone()]).await.unwrap();
                disk.write_zeroes(offset, len, way == "punch").await.unwrap();
                let (result, read) = disk.read(0, IoBuf::zeroed(size as usize)).await;
                result.unwrap();
                let (start, end) = (offset as usize, (offset + len) as usize);
                assert!(read[..start] == data[..start] && read[end..] == data[end..], "{way} {offset}+{len}");
                assert!(read[start..end].iter().all(|&byte| byte == 0), "{way} {offset}+{len}");
                assert_eq!(disk.current_size().unwrap(), size);
            }
        }
    });
}

#[test]
fn the_allocation_map_covers_the_range_and_finds_holes() {
    let file = file_of(64 << 20);
    with_disk(file.path(), |disk| async move {
        disk.write(1 << 20, vec![pattern(6, 65536).share()]).await.unwrap();
        disk.write(8 << 20, vec![pattern(7, 65536).share()]).await.unwrap();
        disk.sync().await.unwrap();
        let map = disk.allocation(0, 64 << 20).await.unwrap();
        let expected =
            [(1 << 20, true), (65536, false), ((7 << 20) - 65536, true), (65536, false), ((56 << 20) - 65536, true)];
        assert_eq!(map.iter().map(|piece| (piece.len, piece.hole)).collect::<Vec<_>>(), expected);
        let map = disk.allocation((1 << 20) + 4096, 8192).await.unwrap();
        assert_eq!(map, [Allocation { len: 8192, hole: false }]);
        // More pieces than are looked up: the rest counts as data, nothing is left out.
        for block in 0..400 {
            disk.write((16 << 20) + block * 65536, vec![pattern(8, 4096).share()]).await.unwrap();
        }
        let map = disk.allocation(0, 64 << 20).await.unwrap();
        assert_eq!(map.iter().map(|piece| piece.len).sum::<u64>(), 64 << 20);
        assert!(map.len() <= ALLOCATION_STEPS_MAX + 1 && !map.last().unwrap().hole);
    });
}

#[test]
fn identity_and_size_follow_the_file() {
    let file = file_of(4096);
    let path = file.path().to_owned();
    with_disk(file.path(), move |disk| async move {
        let metadata = std::fs::metadata(&path).unwrap();
        let identity = disk.identity().unwrap();
        let born = metadata.created().map_or(0, |at| at.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos());
        assert_eq!(identity.id, format!("file:{}:{born}", metadata.ino()));
        assert_eq!(identity.mtime_ns, metadata.mtime() as u64 * 1_000_000_000 + metadata.mtime_nsec() as u64);
        std::fs::File::options().write(true).open(&path).unwrap().set_len(512).unwrap();
        assert_eq!((disk.size(), disk.current_size().unwrap()), (4096, 512));
    });
}

#[test]
fn a_second_opener_is_refused_by_name() {
    let file = file_of(1 << 20);
    let first = DiskFile::open(file.path()).unwrap();
    let error = DiskFile::open(file.path()).unwrap_err();
    assert!(matches!(&error, OpenError::Busy { path, .. } if path == file.path()), "{error}");
    assert!(error.to_string().starts_with(&file.path().display().to_string()), "{error}");
    drop(first);
    DiskFile::open(file.path()).unwrap();
}

#[test]
fn qemu_is_refused_while_the_disk_is_open_and_the_other_way_round() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let file = file_of(1 << 20);
    let run = |tool: &str, arguments: &[&str]| Command::new(tool).args(arguments).arg(file.path()).output().unwrap();
    let open = DiskFile::open(file.path()).unwrap();
    for (tool, arguments) in [
        ("qemu-img", &["bench", "-c", "1", "-f", "raw"][..]),
        ("qemu-io", &["-f", "raw", "-r", "-c", "read 0 512"]),
        ("qemu-io", &["-f", "raw", "-c", "write 0 512"]),
    ] {
        let output = run(tool, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("lock"), "{tool} {arguments:?}: {said}");
    }
    drop(open);
    assert!(run("qemu-io", &["-f", "raw", "-c", "write 0 512"]).status.success());
    // QEMU first: qemu-io keeps the file open as long as its standard input is.
    let mut qemu = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(file.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0; 4];
    io::Read::read_exact(qemu.stdout.as_mut().unwrap(), &mut prompt).unwrap(); // the prompt: it is open
    let error = DiskFile::open(file.path()).unwrap_err();
    assert!(error.to_string().contains("QEMU"), "{error}");
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    DiskFile::open(file.path()).unwrap();
}

/// A loop device over a file, where the machine lets us have one.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(path).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
            }
            refused => {
                eprintln!("no loop device to be had: block devices are not checked ({refused:?})");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_a_disk_of_its_own_kind() {
    let size = (8 << 20) + 512;
    let file = file_of(size);
    let Some(device) = Loop::over(file.path()) else { return };
    let path = PathBuf::from(&device.0);
    let second = path.clone();
    with_disk(&path, move |disk| async move {
        let error = DiskFile::open(&second).unwrap_err();
        assert!(matches!(error, OpenError::Busy { .. }), "{error}");
        assert_eq!((disk.size(), disk.current_size().unwrap()), (size, size));
        assert!(disk.identity().unwrap().id.starts_with("loop:/") && disk.identity().unwrap().mtime_ns == 0);
        assert!(disk.physical_block() >= 512);
        let data = pattern(10, size as usize).share();
        for punch in [true, false] {
            disk.write(0, vec![data.clone()]).await.unwrap();
            disk.write_zeroes(4096, 1 << 20, punch).await.unwrap();
            disk.write_zeroes(size - 512, 512, punch).await.unwrap();
            disk.sync().await.unwrap();
            let (result, read) = disk.read(0, IoBuf::zeroed(size as usize)).await;
            result.unwrap();
            let (start, end) = (4096, 4096 + (1 << 20));
            assert!(read[..start] == data[..start] && read[end..size as usize - 512] == data[end..size as usize - 512]);
            assert!(read[start..end].iter().chain(&read[size as usize - 512..]).all(|&byte| byte == 0));
        }
        assert_eq!(disk.allocation(0, size).await.unwrap(), [Allocation { len: size, hole: false }]);
        let (result, _) = disk.read(size - 512, IoBuf::zeroed(1024)).await;
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    });
    DiskFile::open(&path).unwrap();
}

#[test]
fn what_cannot_be_a_disk_is_refused_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    for (path, words) in
        [(folder.path(), "a directory"), (Path::new("/dev/null"), "a character device"), (&missing, "stat")]
    {
        let error = DiskFile::open(path).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(&path.display().to_string()), "{error}");
    }
}

/// Method: the state that `open` leaves when its probing read fails.
#[test]
fn without_direct_io_the_disk_is_buffered_and_works() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(8192).unwrap();
    let mut file = DiskFile::open(&path).unwrap();
    if let Some(buffered) = file.buffered.take() {
        file.main = buffered;
        (file.align, file.part_align) = (1, 1);
    }
    assert_eq!(file.io_mode(), "buffered");
    std::thread::spawn(move || {
        let ring = Ring::new().unwrap();
        let disk = Disk::new(&ring, file);
        ring.run(async move {
            let data = pattern(9, 1024).share();
            disk.write(512, vec![data.slice(0, 100), data.slice(100, 924)]).await.unwrap();
            disk.sync().await.unwrap();
            let (result, read) = disk.read(512, IoBuf::zeroed(1024)).await;
            result.unwrap();
            assert!(read[..] == data[..]);
        });
    })
    .join()
    .unwrap();
    let mut found = [0; 1024];
    std::fs::File::open(&path).unwrap().read_exact_at(&mut found, 512).unwrap();
    assert!(found[..] == pattern(9, 1024)[..]);
}

/// Goal: a write that a disk cuts short inside the same block again and again ends in an error, and not never.
/// Method: a process of its own with a limit for files that lies inside a block. The file is in memory, where direct I/O wants no alignment, so that the write is
/// cut right there.
#[test]
fn a_write_that_is_cut_short_at_the_same_place_again_ends_in_an_error() {
    const NAME: &str = "device::tests::a_write_that_is_cut_short_at_the_same_place_again_ends_in_an_error";
    const PATH: &str = "CDP_TEST_CUT_SHORT";
    if let Ok(path) = std::env::var(PATH) {
        let write = |disk: Disk| async move { disk.write(0, vec![pattern(1, 16 << 10).share()]).await };
        let result = with_disk(Path::new(&path), write);
        assert!(result.is_err(), "16 KiB went into a file of at most 13");
        return;
    }
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(16 << 10).unwrap();
    let mut limited = Command::new("timeout");
    limited.args(["20", "bash", "-c", "trap '' XFSZ; ulimit -f 13; exec \"$0\" --exact \"$1\""]);
    let output = limited.arg(std::env::current_exe().unwrap()).arg(NAME).env(PATH, file.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}", output.status);
}
