//! The file system: two directories' worth of names, and what each request means. Runs on the session's threads, which wait for
//! nothing: metadata is asked for on the control plane, data on the export's shard, and both answer by themselves.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cdp_journal::{SECTOR, payload_buf};
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::files::{self, errno_of};
use crate::frontend::nbd::{ExportDirectory, ExportInfo, ExportKind, ExportSource};
use crate::shard::ShardHandle;

/// Names and sizes are asked for again after so long.
const TTL: Duration = Duration::from_secs(1);
/// Longest read or write.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Requests that the kernel keeps under way by itself (read-ahead, direct I/O in the background).
const BACKGROUND_MAX: u16 = 128;

/// The exports of one kind, as files.
pub(super) struct Tree<S: 'static> {
    shared: Arc<Shared<S>>,
    runtime: Handle,
}

struct Shared<S: 'static> {
    kind: ExportKind,
    directory: Arc<dyn ExportDirectory<S>>,
    owner: (u32, u32),
    made: SystemTime,
    nodes: Mutex<Nodes>,
    handles: Mutex<HashMap<u64, Arc<OpenFile<S>>>>,
    handle_next: AtomicU64,
}

/// What the kernel knows by number.
#[derive(Default)]
struct Nodes {
    by_number: HashMap<u64, Node>,
    by_key: HashMap<Uuid, u64>,
    next: u64,
}

struct Node {
    key: Uuid,
    lookups: u64,
}

struct OpenFile<S: 'static> {
    shard: Arc<ShardHandle<S>>,
    ticket: u64,
    writable: bool,
}

impl<S: ExportSource + Clone + 'static> Tree<S> {
    pub(super) fn new(kind: ExportKind, directory: Arc<dyn ExportDirectory<S>>, runtime: Handle) -> Self {
        let owner = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let shared = Shared {
            kind,
            directory,
            owner,
            made: SystemTime::now(),
            nodes: Mutex::new(Nodes { next: 2, ..Nodes::default() }),
            handles: Mutex::default(),
            handle_next: AtomicU64::new(1),
        };
        Self { shared: Arc::new(shared), runtime }
    }

    fn handle(&self, handle: FileHandle) -> Option<Arc<OpenFile<S>>> {
        self.shared.handles.lock().get(&handle.0).cloned()
    }
}

impl<S: ExportSource + Clone + 'static> OpenFile<S> {
    /// A shard that is gone drops the request, and so answers it with an I/O error.
    fn send(&self, request: files::Request) {
        let _ = self.shard.file_request(self.ticket, request);
    }
}

impl<S: ExportSource + Clone + 'static> Shared<S> {
    async fn find(&self, name: &str) -> Option<ExportInfo<S>> {
        if name.is_empty() {
            return None; // the default export has no file of its own
        }
        let found = self.directory.find(name).await?;
        // A volume is a file under its name alone, so that a directory shows all that there is.
        (found.kind == self.kind && found.name == name).then_some(found)
    }

    /// The export behind a node's number.
    async fn export(&self, number: INodeNo) -> Option<ExportInfo<S>> {
        let key = self.nodes.lock().by_number.get(&number.0)?.key;
        self.directory.find(&key.to_string()).await.filter(|found| found.kind == self.kind)
    }

    fn directory_attr(&self) -> FileAttr {
        self.attr(INodeNo::ROOT, FileType::Directory, 0, 0o755)
    }

    fn file_attr(&self, number: u64, export: &ExportInfo<S>) -> FileAttr {
        self.attr(INodeNo(number), FileType::RegularFile, export.size, if export.read_only { 0o400 } else { 0o600 })
    }

    fn attr(&self, ino: INodeNo, kind: FileType, size: u64, perm: u16) -> FileAttr {
        FileAttr {
            ino,
            size,
            // One sector less than all: so that programs look for holes. What is a hole is asked for by SEEK_HOLE.
            blocks: (size / 512).saturating_sub(1).max(u64::from(size > 0)),
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// The number of an export's node, with one more lookup to be forgotten.
    fn looked_up(&self, key: Uuid) -> u64 {
        let mut nodes = self.nodes.lock();
        let Nodes { by_number, by_key, next } = &mut *nodes;
        let number = *by_key.entry(key).or_insert_with(|| {
            let number = *next;
            *next += 1;
            number
        });
        by_number.entry(number).or_insert(Node { key, lookups: 0 }).lookups += 1;
        number
    }
}

impl<S: ExportSource + Clone + 'static> Filesystem for Tree<S> {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each is taken where the kernel has it.
        for wish in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP] {
            let _ = config.add_capabilities(wish);
        }
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        if let Err(most) = config.set_max_readahead(REQUEST_BYTES_MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (shared, name) = (Arc::clone(&self.shared), name.to_str().map(str::to_owned));
        let Some(name) = name.filter(|_| parent == INodeNo::ROOT) else { return reply.error(Errno::ENOENT) };
        self.runtime.spawn(async move {
            match shared.find(&name).await {
                Some(export) => {
                    let number = shared.looked_up(export.key);
                    reply.entry(&TTL, &shared.file_attr(number, &export), Generation(0));
                }
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn forget(&self, _: &Request, number: INodeNo, lookups: u64) {
        let mut nodes = self.shared.nodes.lock();
        let Some(node) = nodes.by_number.get_mut(&number.0) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0 {
            let key = node.key;
            nodes.by_number.remove(&number.0);
            nodes.by_key.remove(&key);
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if number == INodeNo::ROOT {
            return reply.attr(&TTL, &self.shared.directory_attr());
        }
        let shared = Arc::clone(&self.shared);
        self.runtime.spawn(async move {
            match shared.export(number).await {
                Some(export) => reply.attr(&TTL, &shared.file_attr(number.0, &export)),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    /// Times and owners are nobody's to change; a size is, but not here. What changes nothing is taken.
    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if mode.is_some() || uid.is_some() || gid.is_some() || number == INodeNo::ROOT {
            return reply.error(Errno::EPERM);
        }
        let shared = Arc::clone(&self.shared);
        self.runtime.spawn(async move {
            match shared.export(number).await {
                Some(export) if size.is_none_or(|size| size == export.size) => {
                    reply.attr(&TTL, &shared.file_attr(number.0, &export));
                }
                Some(_) => reply.error(Errno::EPERM),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn open(&self, _: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let shared = Arc::clone(&self.shared);
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        self.runtime.spawn(async move {
            let Some(export) = shared.export(number).await else { return reply.error(Errno::ENOENT) };
            let opened = match export.shard.open_file(export.key, write).await {
                Ok(Ok(opened)) => opened,
                Ok(Err(error)) => return reply.error(errno_of(&error)),
                Err(_) => return reply.error(Errno::EIO),
            };
            // A view that takes no writes never changes, so the page cache may keep it. What can change (by another client, by a
            // revert) is never cached.
            let how = match opened.read_only {
                true => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
                false if write => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
                false => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
            };
            let handle = shared.handle_next.fetch_add(1, Ordering::Relaxed);
            let file = OpenFile { shard: export.shard, ticket: opened.ticket, writable: write };
            shared.handles.lock().insert(handle, Arc::new(file));
            reply.opened(FileHandle(handle), how);
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.handle(handle) {
            Some(file) => file.send(files::Request::Read { offset, len: size, reply }),
            None => reply.error(Errno::EBADF),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(file) = self.handle(handle).filter(|file| file.writable) else { return reply.error(Errno::EBADF) };
        let len = data.len();
        // The file is never cached, so no sync of the kernel's follows a write that is to be durable (O_SYNC has this bit, too; RWF_DSYNC sets it for one write).
        let fua = flags.0 & libc::O_DSYNC != 0;
        let whole = offset.is_multiple_of(SECTOR) && (len as u64).is_multiple_of(SECTOR) && len > 0;
        file.send(match u32::try_from(len).ok().filter(|_| whole) {
            Some(len) => {
                let mut payload = payload_buf(offset, len);
                let at = (offset % 4096) as usize;
                payload[at..at + data.len()].copy_from_slice(data);
                files::Request::Write { offset, len, payload, fua, reply }
            }
            None => files::Request::WritePart { offset, bytes: data.to_vec(), fua, reply },
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        match self.handle(handle) {
            Some(file) if file.writable => file.send(files::Request::Flush(reply)),
            _ => reply.ok(),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.handle(handle) {
            Some(file) => file.send(files::Request::Flush(reply)),
            None => reply.error(Errno::EBADF),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let file = self.shared.handles.lock().remove(&handle.0);
        if let Some(file) = file {
            file.send(files::Request::Close);
        }
        reply.ok();
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if number != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let shared = Arc::clone(&self.shared);
        self.runtime.spawn(async move {
            let mut names: Vec<String> = vec![".".to_owned(), "..".to_owned()];
            let exports = shared.directory.list().await;
            names.extend(exports.into_iter().filter(|entry| entry.kind == shared.kind).map(|entry| entry.name));
            for (at, name) in (1_u64..).zip(&names).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
                let kind = if at <= 2 { FileType::Directory } else { FileType::RegularFile };
                // The kernel asks for a number again before it uses it.
                if reply.add(INodeNo(0xffff_ffff), at, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    /// It is a file, and no device.
    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    /// There are none; the kernel does not ask again.
    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE;
        let Some(file) = self.handle(handle).filter(|file| file.writable) else { return reply.error(Errno::EBADF) };
        // A hole must read as zeroes, and a loop device asks for zeroes in this way too: so it cannot be a mere hint.
        let no_hole = match mode {
            PUNCH => false,
            mode if mode & !KEEP_SIZE == libc::FALLOC_FL_ZERO_RANGE => true,
            _ => return reply.error(Errno::EOPNOTSUPP), // room is not promised: the primary may be thin
        };
        let within = mode & KEEP_SIZE == 0;
        file.send(files::Request::Zero { offset, len, no_hole, within, reply });
    }

    fn lseek(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let Some(file) = self.handle(handle) else { return reply.error(Errno::EBADF) };
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return reply.error(Errno::EINVAL),
        };
        match u64::try_from(offset) {
            Ok(offset) => file.send(files::Request::Seek { offset, hole, reply }),
            Err(_) => reply.error(Errno::ENXIO),
        }
    }
}
