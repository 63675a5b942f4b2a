//! Disks: a regular file or a block device, opened for this agent alone, read and written over a shard's ring.
//!
//! * [`DiskFile`] is the opened, locked and probed thing. Opening may block, so it is done off the shards.
//! * [`Disk`] is a `DiskFile` on a ring: the engine's [`Device`].
//!
//! O_DIRECT is used where a real read shows that it works. A second, buffered descriptor serves what does not fit its
//! alignment: in practice the last bytes of a file whose size is no multiple of 4 KiB. The two stay coherent because a page is
//! always reached through the same one of them, and because the kernel writes dirty pages back before it reads directly and
//! drops clean ones after it writes directly. One `fdatasync` covers both: they are one file.
#![allow(unsafe_code)]

use std::cell::{Cell, OnceCell};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use cdp_journal::{Allocation, BLOCK, Device, Identity, IoBuf, LocalFuture, Slice};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fcntl};
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek};

use crate::ring::{Ring, Vectored};

/// QEMU's lock bytes (`block/file-posix.c`): "I use permission n" is a shared lock on byte 100 + n, "nobody else may use
/// permission n" one on byte 200 + n.
const QEMU_USED_BASE: i64 = 100;
const QEMU_UNSHARED_BASE: i64 = 200;
/// consistent-read, write, write-unchanged, resize; the names that QEMU prints.
const QEMU_PERMISSIONS: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
/// How long somebody else may hold a disk before it is refused: udev holds a block device's lock while it probes. (A killed
/// agent, whose last requests end after its process is gone, is waited for at start, by the caller.)
const CLAIM_TRIES: u32 = 10;
const CLAIM_RETRY: Duration = Duration::from_millis(50);
/// Most steps of one allocation query. Each is a system call made on the shard's thread, about a microsecond when the extent
/// map is in memory; the rest of the range is answered as data.
const ALLOCATION_STEPS_MAX: usize = 256;
/// Zeroes per call where the file cannot make them by itself.
const ZEROES_PER_WRITE: u64 = 4 << 20;
/// Between two looks at a disk that may hang. Time is counted in them: a stopped and continued agent is charged one, not the whole pause.
const HANG_LOOK_NS: u64 = 1_000_000_000;

/// Why a disk was not opened. The texts name the path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Somebody else has it.
    #[error("{path}: in use by {by}")]
    Busy {
        /// Path as given.
        path: PathBuf,
        /// Who, as far as it can be told.
        by: String,
    },
    /// Neither a regular file nor a block device.
    #[error("{path}: {what} cannot be a disk: a regular file or a block device is needed")]
    Unsuitable {
        /// Path as given.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The system's error.
    #[error("{path}: {op}: {source}")]
    Io {
        /// Path as given.
        path: PathBuf,
        /// What was tried.
        op: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It answers nothing.
    #[error("{path}: it hangs: no answer within {seconds} s")]
    Hangs {
        /// Path as given.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
}

/// An opened disk that this process, and within it this value, has for itself until it is dropped.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    /// Holds the locks; O_DIRECT when `direct`.
    main: OwnedFd,
    /// For what does not fit O_DIRECT's alignment.
    buffered: Option<OwnedFd>,
    is_block: bool,
    size: u64,
    /// Offsets and lengths of direct I/O are multiples of this.
    align: usize,
    /// So are addresses and lengths of the parts of a direct write.
    part_align: usize,
    physical_block: u32,
    /// What it is known by ([`Identity`]): as it was when it was opened. A device that goes takes what tells of it along.
    id: String,
}

impl DiskFile {
    /// Opens `path` for reading and writing, takes its locks and finds out how it wants to be used. May block.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |op| move |source: io::Error| OpenError::Io { path: path.to_owned(), op, source };
        let metadata = std::fs::metadata(path).map_err(failed("stat"))?;
        let kind = metadata.file_type();
        let is_block = kind.is_block_device();
        if !is_block && !kind.is_file() {
            let what = match kind {
                kind if kind.is_dir() => "a directory",
                kind if kind.is_char_device() => "a character device",
                kind if kind.is_socket() => "a socket",
                _ => "a special file",
            };
            return Err(OpenError::Unsuitable { path: path.to_owned(), what });
        }
        let open = |direct: bool, exclusive: bool| {
            let flags = if direct { libc::O_DIRECT } else { 0 } | if exclusive && is_block { libc::O_EXCL } else { 0 };
            OpenOptions::new().read(true).write(true).custom_flags(flags | libc::O_CLOEXEC).open(path)
        };
        let busy = |by: &str| OpenError::Busy { path: path.to_owned(), by: by.to_owned() };
        let claim = |error: io::Error| match error.raw_os_error() {
            Some(libc::EBUSY) => busy("the system (mounted, or held by another program or driver)"),
            Some(libc::ETXTBSY) => busy("the system (a running program or swap)"),
            _ => failed("open")(error),
        };
        let open_alone = |direct: bool| {
            for _ in 1..CLAIM_TRIES {
                match open(direct, true) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(CLAIM_RETRY),
                    done => return done,
                }
            }
            open(direct, true)
        };
        let (main, direct) = match open_alone(true) {
            Ok(file) if reads_directly(&file) => (file, true),
            Ok(file) => {
                drop(file); // a block device has one exclusive opener at a time
                (open_alone(false).map_err(claim)?, false)
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (open_alone(false).map_err(claim)?, false),
            Err(error) => return Err(claim(error)),
        };
        lock(&main, path)?;
        let buffered = if direct { Some(open(false, false).map_err(claim)?) } else { None };
        if let Some(buffered) = &buffered {
            let (one, other) = (main.metadata().map_err(failed("stat"))?, buffered.metadata().map_err(failed("stat"))?);
            if (one.dev(), one.ino(), one.rdev()) != (other.dev(), other.ino(), other.rdev()) {
                return Err(busy("somebody who replaced the file while it was being opened"));
            }
        }
        let (align, part_align, physical_block) = if is_block {
            let logical = ioctl::logical_block(&main).map_err(failed("ask for the logical block"))?;
            (logical, logical, ioctl::physical_block(&main).map_err(failed("ask for the physical block"))?)
        } else {
            (BLOCK as usize, file_part_align(&main), BLOCK as u32)
        };
        let size = size_of(&main, is_block).map_err(failed("ask for the size"))?;
        let id = identity_of(&main, is_block).map_err(failed("stat"))?;
        let opened = Self {
            path: path.to_owned(),
            main: main.into(),
            buffered: buffered.map(OwnedFd::from),
            is_block,
            size,
            align: if direct { align } else { 1 },
            part_align: if direct { part_align } else { 1 },
            physical_block: physical_block.clamp(512, 65536),
            id,
        };
        tracing::info!(path = %path.display(), size, io = opened.io_mode(), physical_block, "disk opened");
        Ok(opened)
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// `direct` (past the page cache) or `buffered`.
    pub fn io_mode(&self) -> &'static str {
        if self.buffered.is_some() { "direct" } else { "buffered" }
    }
}

/// Whether a read past the page cache works. Opening with O_DIRECT succeeds on file systems where reading fails.
fn reads_directly(file: &File) -> bool {
    let mut buf = IoBuf::zeroed(BLOCK as usize);
    !matches!(pread(file, &mut buf, 0), Err(Errno::EINVAL | Errno::EOPNOTSUPP))
}

/// What the file system says of a file, if it tells what was asked for.
fn statx(file: &File, wanted: u32) -> Option<libc::statx> {
    // SAFETY: plain data, all zeroes is a value.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the empty path with AT_EMPTY_PATH means the descriptor; `answer` is writable and of the right type.
    let result = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, wanted, &raw mut answer) };
    (result == 0 && answer.stx_mask & wanted == wanted).then_some(answer)
}

/// What a part of a direct write must be a multiple of, as the file system says (Linux 6.1 and newer).
fn file_part_align(file: &File) -> usize {
    let told = statx(file, libc::STATX_DIOALIGN);
    let align = told.map(|answer| answer.stx_dio_mem_align.max(answer.stx_dio_offset_align) as usize);
    align.filter(|align| align.is_power_of_two() && *align <= BLOCK as usize).unwrap_or(BLOCK as usize)
}

/// What an opened disk is known by. May block: a device may be asked.
fn identity_of(file: &File, is_block: bool) -> io::Result<String> {
    let metadata = file.metadata()?;
    if is_block {
        return Ok(block_identity(libc::major(metadata.rdev()), libc::minor(metadata.rdev())));
    }
    // Not by the number of its file system's device, which may be another after a reboot; unless there is nothing else.
    Ok(match statx(file, libc::STATX_BTIME).map(|answer| answer.stx_btime) {
        Some(born) => {
            let born_ns = i128::from(born.tv_sec) * 1_000_000_000 + i128::from(born.tv_nsec);
            format!("file:{}:{born_ns}", metadata.ino())
        }
        // A file system without a device of its own (NFS, FUSE) has a number that only counts its mounts.
        None => {
            let number = Some(metadata.dev()).filter(|dev| libc::major(*dev) != 0);
            format!("inode:{}:{}", number.unwrap_or_default(), metadata.ino())
        }
    })
}

/// A block device by what stays the same when devices get other numbers, as at a reboot: what it says of itself, or what it is made of. Where it says nothing, by
/// its numbers.
fn block_identity(major: u32, minor: u32) -> String {
    /// Below the device's folder in sysfs, with what each is a word for.
    const TOLD: [(&str, &str); 7] = [
        ("dm/uuid", "dm"),
        ("md/uuid", "md"),
        ("loop/backing_file", "loop"),
        ("wwid", "wwid"),
        ("device/wwid", "wwid"),
        ("serial", "serial"),
        ("device/serial", "serial"),
    ];
    let by_number = || format!("block:{major}:{minor}");
    let Ok(mut folder) = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else { return by_number() };
    let read = |folder: &Path, name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).ok()?;
        let text = text.trim().trim_end_matches(" (deleted)");
        Some(text.to_owned()).filter(|text| !text.is_empty())
    };
    let mut within = String::new();
    if let Some(number) = read(&folder, "partition") {
        within = format!(":partition:{number}");
        folder.pop();
    }
    if let Some(start) = read(&folder, "loop/offset").filter(|start| start != "0") {
        within += &format!(":offset:{start}");
    }
    let told = TOLD.iter().find_map(|(name, kind)| Some(format!("{kind}:{}", read(&folder, name)?)));
    told.map_or_else(by_number, |told| told + &within)
}

fn size_of(file: &File, is_block: bool) -> io::Result<u64> {
    if is_block { ioctl::size(file) } else { Ok(file.metadata()?.len()) }
}

mod ioctl {
    //! Questions to a block device.
    use std::io;
    use std::os::fd::{AsFd, AsRawFd};

    mod raw {
        nix::ioctl_read_bad!(logical_block, libc::BLKSSZGET, libc::c_int);
        nix::ioctl_read_bad!(physical_block, libc::BLKPBSZGET, libc::c_uint);
        nix::ioctl_read!(size64, 0x12, 114, u64);
    }

    pub(super) fn logical_block(device: impl AsFd) -> io::Result<usize> {
        let mut bytes = 0;
        // SAFETY: BLKSSZGET writes an int.
        unsafe { raw::logical_block(device.as_fd().as_raw_fd(), &raw mut bytes) }?;
        usize::try_from(bytes).map_err(io::Error::other)
    }

    pub(super) fn physical_block(device: impl AsFd) -> io::Result<u32> {
        let mut bytes = 0;
        // SAFETY: BLKPBSZGET writes an unsigned int.
        unsafe { raw::physical_block(device.as_fd().as_raw_fd(), &raw mut bytes) }?;
        Ok(bytes)
    }

    pub(super) fn size(device: impl AsFd) -> io::Result<u64> {
        let mut bytes = 0;
        // SAFETY: BLKGETSIZE64 writes an u64 (its number was once defined with size_t, which is the same here).
        unsafe { raw::size64(device.as_fd().as_raw_fd(), &raw mut bytes) }?;
        Ok(bytes)
    }
}

/// Keeps everybody out who asks: other agents (and whoever uses `flock`) by a whole-file lock, QEMU by its own byte locks.
/// Both belong to the open file, so they go when it is closed, also by the death of the process.
fn lock(file: &File, path: &Path) -> Result<(), OpenError> {
    let busy = |by: String| OpenError::Busy { path: path.to_owned(), by };
    let failed = |source: io::Error| OpenError::Io { path: path.to_owned(), op: "lock", source };
    let mut tries = CLAIM_TRIES;
    loop {
        tries -= 1;
        match file.try_lock() {
            Ok(()) => break,
            Err(std::fs::TryLockError::WouldBlock) if tries > 0 => std::thread::sleep(CLAIM_RETRY),
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(busy("another agent, or another program that locks it".to_owned()));
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
        }
    }
    // As QEMU does it: first say what is used and not shared, then look whether anybody objects. So of two that come at the
    // same time at most one gets in.
    let bytes = (0_i64..).zip(QEMU_PERMISSIONS);
    for (number, _) in bytes.clone() {
        for byte in [QEMU_USED_BASE + number, QEMU_UNSHARED_BASE + number] {
            fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte))).map_err(|errno| match errno {
                Errno::EAGAIN | Errno::EACCES => {
                    busy("another program (an exclusive lock on QEMU's lock bytes)".to_owned())
                }
                errno => failed(errno.into()),
            })?;
        }
    }
    for (number, permission) in bytes {
        for byte in [QEMU_USED_BASE + number, QEMU_UNSHARED_BASE + number] {
            let mut found = byte_lock(libc::F_WRLCK, byte);
            fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).map_err(|errno| failed(errno.into()))?;
            if i32::from(found.l_type) != libc::F_UNLCK {
                return Err(busy(format!("QEMU or a program that locks like it (\"{permission}\" lock)")));
            }
        }
    }
    Ok(())
}

fn byte_lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// A [`DiskFile`] on a shard's ring. Clones share it.
#[derive(Clone)]
pub struct Disk {
    ring: Ring,
    shared: Rc<Shared>,
}

struct Shared {
    path: PathBuf,
    main: Rc<OwnedFd>,
    buffered: Option<Rc<OwnedFd>>,
    is_block: bool,
    size: u64,
    align: usize,
    part_align: usize,
    physical_block: u32,
    id: String,
    /// The file refused these once; it is not asked again.
    no_punch: Cell<bool>,
    no_zero_range: Cell<bool>,
    zeroes: OnceCell<Slice>,
    /// Calls begun, and ended.
    calls: Cell<(u64, u64)>,
}

/// A call that is under way.
struct Call<'a>(&'a Cell<(u64, u64)>);

impl<'a> Call<'a> {
    fn begin(calls: &'a Cell<(u64, u64)>) -> Self {
        let (begun, ended) = calls.get();
        calls.set((begun + 1, ended));
        Self(calls)
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let (begun, ended) = self.0.get();
        self.0.set((begun, ended + 1));
    }
}

impl Disk {
    /// Puts an opened disk on this thread's ring.
    pub fn new(ring: &Ring, file: DiskFile) -> Self {
        let DiskFile { path, main, buffered, is_block, size, align, part_align, physical_block, id } = file;
        let shared = Shared {
            path,
            main: Rc::new(main),
            buffered: buffered.map(Rc::new),
            is_block,
            size,
            align,
            part_align,
            physical_block,
            id,
            no_punch: Cell::new(false),
            no_zero_range: Cell::new(false),
            zeroes: OnceCell::new(),
            calls: Cell::default(),
        };
        Self { ring: ring.clone(), shared: Rc::new(shared) }
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// `direct` (past the page cache) or `buffered`.
    pub fn io_mode(&self) -> &'static str {
        if self.shared.buffered.is_some() { "direct" } else { "buffered" }
    }

    /// How many of `len` bytes at `offset` go through the main descriptor; the rest goes through the buffered one.
    fn direct_len(&self, offset: u64, len: usize) -> usize {
        if offset.is_multiple_of(self.shared.align as u64) { len - len % self.shared.align } else { 0 }
    }

    /// The descriptor for what does not fit the main one's alignment. Without O_DIRECT everything fits.
    fn odd(&self) -> &Rc<OwnedFd> {
        self.shared.buffered.as_ref().unwrap_or(&self.shared.main)
    }

    async fn read_range(
        &self,
        file: &Rc<OwnedFd>,
        align: usize,
        mut buf: IoBuf,
        offset: u64,
        (mut start, end): (usize, usize),
    ) -> (io::Result<()>, IoBuf) {
        while start < end {
            let (result, returned) = self.ring.read_at(file, buf, start, end - start, offset + start as u64).await;
            buf = returned;
            match result {
                // Cut inside a block: only the end of the file does that.
                Ok(count) if count == 0 || count % align != 0 && start + count < end => {
                    return (Err(past_the_end(offset + (start + count) as u64)), buf);
                }
                Ok(count) => start += count,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return (Err(error), buf),
            }
        }
        (Ok(()), buf)
    }

    async fn write_range(
        &self,
        file: &Rc<OwnedFd>,
        align: usize,
        parts: Vec<Slice>,
        mut offset: u64,
    ) -> io::Result<()> {
        let mut data = Vectored::new(parts);
        let mut len = data.left();
        if !data.is_aligned(if align == 1 { 1 } else { self.shared.part_align }) {
            data = Vectored::new(vec![joined(data.parts(), len)]);
        }
        // The first block was cut short before, and is written anew.
        let mut anew = false;
        while data.left() > 0 {
            let done = len - data.left();
            let (result, returned) = self.ring.write_at(file, data, offset + done as u64).await;
            data = returned;
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) if count % align != 0 => {
                    // Cut inside a block (no space): what follows cannot be written directly from there.
                    let whole = done + count - count % align;
                    if whole == 0 && anew {
                        return Err(io::ErrorKind::WriteZero.into());
                    }
                    anew = true;
                    data = Vectored::new(vec![joined(data.parts(), len).slice(whole, len - whole)]);
                    (offset, len) = (offset + whole as u64, len - whole);
                }
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tries to make zeroes without writing them. `Ok(false)`: the file cannot.
    async fn allocate_zeroes(
        &self,
        mode: FallocateFlags,
        refused: &Cell<bool>,
        offset: u64,
        len: u64,
    ) -> io::Result<bool> {
        if refused.get() {
            return Ok(false);
        }
        let mode = (mode | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits();
        loop {
            match self.ring.fallocate(&self.shared.main, mode, offset, len).await {
                Ok(()) => return Ok(true),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EOPNOTSUPP | libc::ENOSYS) => {
                        refused.set(true);
                        return Ok(false);
                    }
                    Some(libc::EINVAL) => return Ok(false), // an alignment that the device wants: writing takes care of it
                    _ => return Err(error),
                },
            }
        }
    }

    fn zeroes(&self, len: usize) -> Vec<Slice> {
        const PIECE: usize = 256 << 10;
        let zeroes = self.shared.zeroes.get_or_init(|| IoBuf::zeroed(PIECE).share());
        (0..len).step_by(PIECE).map(|start| zeroes.slice(0, PIECE.min(len - start))).collect()
    }
}

fn past_the_end(offset: u64) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the disk ends at byte {offset}"))
}

/// One aligned copy of all parts.
fn joined(parts: &[Slice], len: usize) -> Slice {
    let mut all = IoBuf::for_overwrite(len);
    let mut at = 0;
    for part in parts {
        all[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    all.share()
}

/// Cuts a list of parts after `len` bytes.
fn split(parts: Vec<Slice>, mut len: usize) -> (Vec<Slice>, Vec<Slice>) {
    let (mut head, mut tail) = (Vec::with_capacity(parts.len()), vec![]);
    for part in parts {
        let cut = len.min(part.len());
        len -= cut;
        match cut {
            0 => tail.push(part),
            cut if cut == part.len() => head.push(part),
            cut => {
                head.push(part.slice(0, cut));
                tail.push(part.slice(cut, part.len() - cut));
            }
        }
    }
    (head, tail)
}

impl Device for Disk {
    fn size(&self) -> u64 {
        self.shared.size
    }

    fn current_size(&self) -> io::Result<u64> {
        let file = File::from(self.shared.main.try_clone()?);
        size_of(&file, self.shared.is_block)
    }

    fn physical_block(&self) -> u32 {
        self.shared.physical_block
    }

    fn identity(&self) -> io::Result<Identity> {
        let mtime_ns = if self.shared.is_block {
            0
        } else {
            let metadata = File::from(self.shared.main.try_clone()?).metadata()?;
            let mtime_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
            u64::try_from(mtime_ns).unwrap_or(0)
        };
        Ok(Identity { id: self.shared.id.clone(), mtime_ns })
    }

    fn read(&self, offset: u64, buf: IoBuf) -> LocalFuture<'static, (io::Result<()>, IoBuf)> {
        let disk = self.clone();
        Box::pin(async move {
            let _call = Call::begin(&disk.shared.calls);
            let (len, align) = (buf.len(), disk.shared.align);
            let direct = disk.direct_len(offset, len);
            let (result, buf) = disk.read_range(&disk.shared.main, align, buf, offset, (0, direct)).await;
            if result.is_err() || direct == len {
                return (result, buf);
            }
            disk.read_range(disk.odd(), 1, buf, offset, (direct, len)).await
        })
    }

    fn write(&self, offset: u64, parts: Vec<Slice>) -> LocalFuture<'static, io::Result<()>> {
        let disk = self.clone();
        Box::pin(async move {
            let _call = Call::begin(&disk.shared.calls);
            let (len, align) = (parts.iter().map(|part| part.len()).sum(), disk.shared.align);
            let direct = disk.direct_len(offset, len);
            if direct == len {
                return disk.write_range(&disk.shared.main, align, parts, offset).await;
            }
            let (body, tail) = split(parts, direct);
            disk.write_range(&disk.shared.main, align, body, offset).await?;
            disk.write_range(disk.odd(), 1, tail, offset + direct as u64).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, punch: bool) -> LocalFuture<'static, io::Result<()>> {
        let disk = self.clone();
        Box::pin(async move {
            if len == 0 {
                return Ok(());
            }
            let _call = Call::begin(&disk.shared.calls);
            let shared = &disk.shared;
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
            if punch && disk.allocate_zeroes(hole, &shared.no_punch, offset, len).await? {
                return Ok(());
            }
            let range = FallocateFlags::FALLOC_FL_ZERO_RANGE;
            if disk.allocate_zeroes(range, &shared.no_zero_range, offset, len).await? {
                return Ok(());
            }
            let mut at = offset;
            while at < offset + len {
                // Steps end at multiples of their length, so all but the first and the last fit O_DIRECT.
                let step = (ZEROES_PER_WRITE - at % ZEROES_PER_WRITE).min(offset + len - at);
                disk.write(at, disk.zeroes(step as usize)).await?;
                at += step;
            }
            Ok(())
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'static, io::Result<()>> {
        let disk = self.clone();
        Box::pin(async move {
            let _call = Call::begin(&disk.shared.calls);
            // A device that cannot punch (a thin pool, a hard disk) keeps the bytes: zeroes written there would take the room that was to be given back.
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
            disk.allocate_zeroes(hole, &disk.shared.no_punch, offset, len).await.map(|_| ())
        })
    }

    fn sync(&self) -> LocalFuture<'static, io::Result<()>> {
        let disk = self.clone();
        Box::pin(async move {
            let _call = Call::begin(&disk.shared.calls);
            loop {
                match disk.ring.sync_data(&disk.shared.main).await {
                    Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                    result => return result,
                }
            }
        })
    }

    fn sync_all(&self) -> LocalFuture<'static, io::Result<()>> {
        let disk = self.clone();
        Box::pin(async move {
            let _call = Call::begin(&disk.shared.calls);
            loop {
                match disk.ring.sync_all(&disk.shared.main).await {
                    Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                    result => return result,
                }
            }
        })
    }

    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'static, io::Result<Vec<Allocation>>> {
        let disk = self.clone();
        Box::pin(async move {
            if disk.shared.is_block {
                return Ok(vec![Allocation { len, hole: false }]);
            }
            Ok(map_file(&disk.shared.main, offset, len))
        })
    }

    fn until_hanging(&self, ns: u64) -> LocalFuture<'static, ()> {
        let disk = self.clone();
        Box::pin(async move {
            let mut quiet_ns = 0;
            let (_, mut before) = disk.shared.calls.get();
            while quiet_ns < ns {
                disk.ring.sleep_ns(HANG_LOOK_NS).await;
                let (begun, ended) = disk.shared.calls.get();
                quiet_ns = if begun > ended && ended == before { quiet_ns + HANG_LOOK_NS } else { 0 };
                before = ended;
            }
        })
    }
}

/// The allocation map of a file, as far as it takes no more than [`ALLOCATION_STEPS_MAX`] questions.
fn map_file(file: &OwnedFd, offset: u64, len: u64) -> Vec<Allocation> {
    let end = offset.saturating_add(len);
    let seek = |from: u64, whence| match lseek(file, i64::try_from(from).unwrap_or(i64::MAX), whence) {
        Ok(at) => Some(u64::try_from(at).unwrap_or(0).clamp(from, end)),
        Err(Errno::ENXIO) => Some(end), // no data, or nothing at all, from here on
        Err(_) => None,
    };
    let mut map: Vec<Allocation> = vec![];
    let mut at = offset;
    let mut hole = true;
    for _ in 0..ALLOCATION_STEPS_MAX {
        if at == end {
            break;
        }
        let Some(next) = seek(at, if hole { Whence::SeekData } else { Whence::SeekHole }) else { break };
        if next > at {
            map.push(Allocation { len: next - at, hole });
        }
        at = next;
        hole = !hole;
    }
    match map.last_mut() {
        _ if at == end => {}
        Some(last) if !last.hole => last.len += end - at,
        _ => map.push(Allocation { len: end - at, hole: false }),
    }
    map
}

#[cfg(test)]
mod tests;
