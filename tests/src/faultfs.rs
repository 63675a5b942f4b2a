//! Disks that fail when they are told to, and that remember everything that was done to them: a file system in memory, mounted
//! through FUSE, in this process.
//!
//! * **Faults** ([`FaultFs::inject`]): reads, writes, syncs or allocations of a file fail, take long or hang, from the n-th
//!   on, so many times or for good.
//! * **Recording** ([`FaultFs::record`]): every write, sync and change of a folder, with when it began and when its caller was
//!   told of its end.
//! * **Power cuts** ([`Recording::power_cut`]): the files as a power cut at any place of the recording may leave them.
//!
//! What a power cut leaves: of a file, everything that had ended when a sync began that has ended too; of the rest any
//! subset, each write torn at 512 bytes, and where such a write covers a block of 4 KiB only in part, that block may be garbage.
//! Of the changes of folders, those before the last sync of a folder and any number of the later ones, in their order.
//! A file's mtime is kept by a full sync, and otherwise the old or the new one.
//!
//! If this process dies, the kernel ends all calls on the file system with an error: nobody hangs.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::libc;
use tempfile::TempDir;

use crate::oracle::SECTOR;
use crate::process::scratch;
use crate::{Rng, now_ns};

const ROOT: u64 = 1;
const BLOCK: u64 = 4096;
/// Attributes and names are asked for each time.
const TTL: Duration = Duration::ZERO;

/// What is done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A read.
    Read,
    /// A write.
    Write,
    /// `fsync` or `fdatasync`.
    Sync,
    /// `fallocate`: holes, zeroes, room.
    Allocate,
}

/// What happens instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// This errno.
    Fail(i32),
    /// For a sync: this errno, and all that was written since the last good sync is forgotten.
    FailAndForget(i32),
    /// It waits until [`FaultFs::heal`], and is done then.
    Hang,
    /// It is done so much later.
    Delay(Duration),
    /// Of a read of several blocks only the first half is done, and the answer says so. (Of a write the kernel's FUSE makes an error then.)
    Short,
}

/// A fault of one file.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Of which calls.
    pub op: Op,
    /// What happens.
    pub effect: Effect,
    /// So many calls pass before.
    pub after: u64,
    /// So many calls meet it.
    pub times: u64,
}

impl Fault {
    /// All calls, from the next one on.
    pub fn sticky(op: Op, effect: Effect) -> Self {
        Self { op, effect, after: 0, times: u64::MAX }
    }

    /// Whatever is done, from the next call on.
    pub fn every(effect: Effect) -> [Self; 4] {
        [Op::Read, Op::Write, Op::Sync, Op::Allocate].map(|op| Self::sticky(op, effect))
    }

    /// The next call alone.
    pub fn once(op: Op, effect: Effect) -> Self {
        Self { op, effect, after: 0, times: 1 }
    }

    /// The same, after so many calls that pass.
    pub fn after(self, calls: u64) -> Self {
        Self { after: calls, ..self }
    }
}

/// The file system, mounted until it is dropped.
pub struct FaultFs {
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    _dir: TempDir,
    path: PathBuf,
}

/// All files at one moment. A copy costs nothing until one of both changes.
#[derive(Clone, Debug, Default)]
pub struct Image {
    nodes: BTreeMap<u64, Node>,
}

#[derive(Clone, Debug)]
struct Node {
    content: Content,
    mtime_ns: u64,
}

#[derive(Clone, Debug)]
enum Content {
    File(Arc<Vec<u8>>),
    Dir(BTreeMap<String, u64>),
}

/// What was done, in the order in which it reached the file system.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    start: Image,
    events: Vec<Event>,
}

#[derive(Clone, Debug)]
struct Event {
    time_ns: u64,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    WriteBegun {
        ino: u64,
        offset: u64,
        data: Arc<[u8]>,
    },
    /// Of the write at this place of the recording.
    WriteEnded(usize),
    SyncBegun {
        ino: u64,
        full: bool,
    },
    SyncEnded(usize),
    Truncated {
        ino: u64,
        size: u64,
    },
    /// A change of folders, with all of them after it.
    Folders(Arc<BTreeMap<u64, BTreeMap<String, u64>>>),
    FoldersSynced,
}

#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    image: Image,
    next_ino: u64,
    faults: HashMap<String, Vec<Fault>>,
    met: u64,
    /// By file: reads of which a part was done.
    parts: HashMap<String, u64>,
    parked: Vec<(String, Box<dyn FnOnce() + Send>)>,
    /// Files that may have to forget: as their last good sync left them.
    synced: HashMap<u64, Arc<Vec<u8>>>,
    recording: Option<Recording>,
    /// Of 100 writes while it records, so many end later than they began.
    late_percent: u64,
    rng: Option<Rng>,
    calls: HashMap<(String, &'static str), u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere has failed the test already; hanging its agent as well helps nobody.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl FaultFs {
    /// Whether this machine lets us mount.
    pub fn possible() -> bool {
        crate::local::lacking(&["/dev/fuse"]).is_none()
    }

    /// Mounts an empty one.
    pub fn new() -> Self {
        let dir = scratch();
        let path = dir.path().join("disks");
        std::fs::create_dir(&path).expect("make the mount point");
        let shared = Arc::<Shared>::default();
        {
            let mut state = shared.lock();
            state.next_ino = ROOT + 1;
            state.image.nodes.insert(ROOT, Node::dir());
        }
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("faultfs".into()), MountOption::NoAtime];
        let session = fuser::spawn_mount(Handler(Arc::clone(&shared)), &path, &config)
            .expect("mount a FUSE file system (root and /dev/fuse)");
        Self { shared, session: Some(session), _dir: dir, path }
    }

    /// A path inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A path inside, for configurations and command lines.
    pub fn path_str(&self, name: &str) -> String {
        self.path(name).to_str().expect("an ASCII path").to_owned()
    }

    /// Makes a file of zeroes in the root folder.
    pub fn create(&self, name: &str, size: usize) {
        let mut state = self.shared.lock();
        let ino = state.new_node(Node::file(vec![0; size]));
        state.folder(ROOT).expect("the root is a folder").insert(name.to_owned(), ino);
    }

    /// Takes a file out of the root folder; [`FaultFs::put_back`] puts it back, the same inode.
    pub fn take_away(&self, name: &str) -> u64 {
        let mut state = self.shared.lock();
        state.folder(ROOT).expect("the root is a folder").remove(name).expect("the file is there")
    }

    /// See [`FaultFs::take_away`].
    pub fn put_back(&self, name: &str, ino: u64) {
        self.shared.lock().folder(ROOT).expect("the root is a folder").insert(name.to_owned(), ino);
    }

    /// A file's bytes.
    pub fn content(&self, name: &str) -> Arc<Vec<u8>> {
        let mut state = self.shared.lock();
        let ino = *state.folder(ROOT).expect("the root is a folder").get(name).expect("the file is there");
        Arc::clone(state.file(ino).expect("it is a file"))
    }

    /// Changes a file behind everybody's back.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        self.change_unseen(name, change);
        let mut state = self.shared.lock();
        let ino = state.entry(ROOT, OsStr::new(name)).expect("the file is there");
        state.image.nodes.get_mut(&ino).expect("it is there").mtime_ns = now_ns();
    }

    /// The same without a trace in the file's mtime, as on a block device.
    pub fn change_unseen(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.shared.lock();
        let ino = state.entry(ROOT, OsStr::new(name)).expect("the file is there");
        let node = state.image.nodes.get_mut(&ino).expect("it is there");
        let Content::File(content) = &mut node.content else { panic!("{name} is a folder") };
        change(Arc::make_mut(content));
    }

    /// From now on calls on the file `name` (in whatever folder) meet this fault.
    pub fn inject(&self, name: &str, fault: Fault) {
        self.inject_all(name, &[fault]);
    }

    /// The same with several faults, from the same moment on.
    pub fn inject_all(&self, name: &str, faults: &[Fault]) {
        let mut state = self.shared.lock();
        for fault in faults {
            if matches!(fault.effect, Effect::FailAndForget(_))
                && let Ok(ino) = state.entry(ROOT, OsStr::new(name))
            {
                // What is not synced yet is forgotten only if it was written after this.
                let now = Arc::clone(state.file(ino).expect("it is a file"));
                state.synced.insert(ino, now);
            }
            state.faults.entry(name.to_owned()).or_default().push(*fault);
        }
    }

    /// Ends all faults; what hangs is done now.
    pub fn heal(&self) {
        let parked = {
            let mut state = self.shared.lock();
            state.faults.clear();
            std::mem::take(&mut state.parked)
        };
        for (_, call) in parked {
            call();
        }
    }

    /// The same for one file.
    pub fn heal_file(&self, name: &str) {
        let parked: Vec<_> = {
            let mut state = self.shared.lock();
            state.faults.remove(name);
            state.parked.extract_if(.., |(file, _)| file == name).collect()
        };
        for (_, call) in parked {
            call();
        }
    }

    /// Calls that met a fault.
    pub fn met(&self) -> u64 {
        self.shared.lock().met
    }

    /// Reads of a file of which only a part was done.
    pub fn parts(&self, name: &str) -> u64 {
        self.shared.lock().parts.get(name).copied().unwrap_or(0)
    }

    /// Calls that hang now.
    pub fn hanging(&self) -> usize {
        self.shared.lock().parked.len()
    }

    /// How often a call was made on a file: `read`, `write`, `sync`, `allocate`.
    pub fn calls(&self, name: &str, op: &'static str) -> u64 {
        self.shared.lock().calls.get(&(name.to_owned(), op)).copied().unwrap_or(0)
    }

    /// Records from here on. `late_percent` of 100 writes end up to two milliseconds after they began, so that others overtake
    /// them.
    pub fn record(&self, seed: u64, late_percent: u64) {
        let mut state = self.shared.lock();
        state.recording = Some(Recording { start: state.image.clone(), events: Vec::new() });
        state.late_percent = late_percent;
        state.rng = Some(Rng::new(seed));
    }

    /// Ends the recording. Writes that have not ended yet are begun ones in it.
    pub fn recorded(&self) -> Recording {
        self.shared.lock().recording.take().expect("it recorded")
    }

    /// Replaces everything. Nobody may have a file open.
    pub fn restore(&self, image: &Image) {
        let mut state = self.shared.lock();
        state.recording = None;
        state.image = image.clone();
    }

    /// Everything as it is.
    pub fn image(&self) -> Image {
        self.shared.lock().image.clone()
    }
}

impl Default for FaultFs {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        self.heal();
        let Some(session) = self.session.take() else { return };
        // An agent that is being killed may hold it for a moment; a lazy unmount does not mind.
        let _ = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH);
        drop(session);
    }
}

impl Image {
    /// The bytes of a file in the root folder.
    pub fn content(&self, name: &str) -> Option<Arc<Vec<u8>>> {
        let Content::Dir(root) = &self.nodes.get(&ROOT)?.content else { return None };
        match &self.nodes.get(root.get(name)?)?.content {
            Content::File(content) => Some(Arc::clone(content)),
            Content::Dir(_) => None,
        }
    }
}

impl Recording {
    /// Places at which it can be cut: 0 is before everything.
    pub fn cuts(&self) -> usize {
        self.events.len()
    }

    /// Wall clock of a cut: what was acked before it was acked before the power went.
    pub fn time_ns(&self, cut: usize) -> u64 {
        self.events.get(cut).map_or_else(now_ns, |event| event.time_ns)
    }

    /// The first place at or behind a moment of the wall clock.
    pub fn place(&self, time_ns: u64) -> usize {
        self.events.partition_point(|event| event.time_ns < time_ns)
    }

    /// The files as a power cut before the event `cut` may leave them.
    pub fn power_cut(&self, cut: usize, rng: &mut Rng) -> Image {
        self.image_after(cut, rng, false)
    }

    /// Whether a sync is one of a file in the root folder: a disk, not the agent's state.
    fn is_disk(&self, sync: usize) -> bool {
        match (&self.events[sync].what, self.start.nodes.get(&ROOT).map(|root| &root.content)) {
            (What::SyncBegun { ino, .. }, Some(Content::Dir(root))) => root.values().any(|disk| disk == ino),
            _ => false,
        }
    }

    /// The same with disks that forget what they said was synced: what a test of power cuts must find.
    pub fn power_cut_of_liars(&self, cut: usize, rng: &mut Rng) -> Image {
        self.image_after(cut, rng, true)
    }

    fn image_after(&self, cut: usize, rng: &mut Rng, liars: bool) -> Image {
        let events = &self.events[..cut];
        let mut ended: HashMap<usize, usize> = HashMap::new();
        // By file: the newest sync that ended, by where it began; the same for full ones.
        let mut synced: HashMap<u64, usize> = HashMap::new();
        let mut synced_full: HashMap<u64, usize> = HashMap::new();
        let mut folders_synced = 0;
        for (at, event) in events.iter().enumerate() {
            match &event.what {
                What::WriteEnded(begun) => drop(ended.insert(*begun, at)),
                What::SyncEnded(begun) if liars && self.is_disk(*begun) => {}
                What::SyncEnded(begun) => {
                    let What::SyncBegun { ino, full } = events[*begun].what else { unreachable!("a sync's place") };
                    let newest = synced.entry(ino).or_default();
                    *newest = (*newest).max(*begun);
                    if full {
                        let newest = synced_full.entry(ino).or_default();
                        *newest = (*newest).max(*begun);
                    }
                }
                What::FoldersSynced => folders_synced = at,
                _ => {}
            }
        }
        // Everything lost, or everything kept, or a mix: each is a case of its own.
        let keep_percent = rng.pick(&[0, 10, 50, 50, 90, 100]);
        let mut image = self.start.clone();
        let mut folders_end = false;
        for (at, event) in events.iter().enumerate() {
            match &event.what {
                What::WriteBegun { ino, offset, data } => {
                    let safe = ended.get(&at).is_some_and(|end| synced.get(ino).is_some_and(|sync| end < sync));
                    let node = image.nodes.entry(*ino).or_insert_with(|| Node::file(Vec::new()));
                    let Content::File(content) = &mut node.content else { continue };
                    if safe {
                        overwrite(Arc::make_mut(content), *offset, data);
                    } else if rng.percent(keep_percent) {
                        tear(Arc::make_mut(content), *offset, data, keep_percent, rng);
                    }
                }
                What::Truncated { ino, size } => {
                    let node = image.nodes.entry(*ino).or_insert_with(|| Node::file(Vec::new()));
                    let safe = synced_full.get(ino).is_some_and(|sync| at < *sync);
                    if let Content::File(content) = &mut node.content
                        && (safe || rng.percent(keep_percent))
                    {
                        Arc::make_mut(content).resize(usize::try_from(*size).expect("fits memory"), 0);
                    }
                }
                What::Folders(folders) => {
                    folders_end = folders_end || at > folders_synced && !rng.percent(keep_percent);
                    if folders_end {
                        continue;
                    }
                    image.nodes.retain(|_, node| matches!(node.content, Content::File(_)));
                    for (ino, entries) in folders.iter() {
                        let content = Content::Dir(entries.clone());
                        image.nodes.insert(*ino, Node { content, mtime_ns: event.time_ns });
                        for file in entries.values().filter(|file| !folders.contains_key(file)) {
                            image.nodes.entry(*file).or_insert_with(|| Node::file(Vec::new()));
                        }
                    }
                }
                What::WriteEnded(begun) => {
                    let What::WriteBegun { ino, .. } = events[*begun].what else { unreachable!("a write's place") };
                    let safe = synced_full.get(&ino).is_some_and(|sync| at < *sync);
                    if let Some(node) = image.nodes.get_mut(&ino)
                        && (safe || rng.percent(50))
                    {
                        node.mtime_ns = event.time_ns;
                    }
                }
                What::SyncBegun { .. } | What::SyncEnded(_) | What::FoldersSynced => {}
            }
        }
        image
    }

    /// How many writes of the file were begun, and how many syncs of it ended.
    pub fn counts(&self, name: &str) -> (usize, usize) {
        let root = self.start.nodes.get(&ROOT).map(|node| &node.content);
        let wanted = match root {
            Some(Content::Dir(root)) => root.get(name).copied(),
            _ => None,
        };
        let of = |event: &&Event| match &event.what {
            What::WriteBegun { ino, .. } | What::SyncBegun { ino, .. } => Some(*ino) == wanted,
            _ => false,
        };
        let writes = |event: &&Event| matches!(event.what, What::WriteBegun { .. });
        let mine = self.events.iter().filter(of);
        let total = mine.clone().count();
        let writes = mine.filter(writes).count();
        (writes, total - writes)
    }
}

/// A write of which the sectors survive one by one, and that may damage what shares a block with it.
fn tear(content: &mut Vec<u8>, offset: u64, data: &[u8], keep_percent: u64, rng: &mut Rng) {
    // Cut once is what a power cut does most; a mix is what it may do.
    let whole = rng.percent(50);
    let mut at = 0;
    while at < data.len() {
        let place = offset + at as u64;
        let step = (SECTOR - usize::try_from(place % SECTOR as u64).expect("small")).min(data.len() - at);
        if whole || rng.percent(keep_percent) {
            overwrite(content, place, &data[at..at + step]);
        }
        at += step;
    }
    let end = offset + data.len() as u64;
    for edge in [offset, end] {
        let block = edge - edge % BLOCK;
        let inside = block >= offset && block + BLOCK <= end || block >= end;
        let (from, to) = (usize::try_from(block).expect("fits"), usize::try_from(block + BLOCK).expect("fits"));
        if !inside && to <= content.len() && rng.percent(10) {
            rng.fill(&mut content[from..to]);
        }
    }
}

fn overwrite(content: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let start = usize::try_from(offset).expect("fits memory");
    let end = start + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[start..end].copy_from_slice(data);
}

impl Node {
    fn dir() -> Self {
        Self { content: Content::Dir(BTreeMap::new()), mtime_ns: now_ns() }
    }

    fn file(content: Vec<u8>) -> Self {
        Self { content: Content::File(Arc::new(content)), mtime_ns: now_ns() }
    }

    fn attr(&self, ino: u64) -> FileAttr {
        let time = UNIX_EPOCH + Duration::from_nanos(self.mtime_ns);
        let (kind, size) = match &self.content {
            Content::File(content) => (FileType::RegularFile, content.len() as u64),
            Content::Dir(_) => (FileType::Directory, 0),
        };
        FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: if kind == FileType::Directory { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl State {
    fn new_node(&mut self, node: Node) -> u64 {
        let ino = self.next_ino;
        self.next_ino += 1;
        self.image.nodes.insert(ino, node);
        ino
    }

    fn folder(&mut self, ino: u64) -> Result<&mut BTreeMap<String, u64>, Errno> {
        match self.image.nodes.get_mut(&ino) {
            Some(Node { content: Content::Dir(entries), .. }) => Ok(entries),
            Some(_) => Err(Errno::ENOTDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn file(&mut self, ino: u64) -> Result<&mut Arc<Vec<u8>>, Errno> {
        match self.image.nodes.get_mut(&ino) {
            Some(Node { content: Content::File(content), .. }) => Ok(content),
            Some(_) => Err(Errno::EISDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn entry(&mut self, parent: u64, name: &OsStr) -> Result<u64, Errno> {
        let name = name.to_str().ok_or(Errno::EINVAL)?;
        self.folder(parent)?.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn attr(&self, ino: u64) -> Result<FileAttr, Errno> {
        self.image.nodes.get(&ino).map(|node| node.attr(ino)).ok_or(Errno::ENOENT)
    }

    fn note(&mut self, what: What) -> Option<usize> {
        let recording = self.recording.as_mut()?;
        recording.events.push(Event { time_ns: now_ns(), what });
        Some(recording.events.len() - 1)
    }

    fn note_folders(&mut self) {
        if self.recording.is_none() {
            return;
        }
        let folders = self.image.nodes.iter().filter_map(|(ino, node)| match &node.content {
            Content::Dir(entries) => Some((*ino, entries.clone())),
            Content::File(_) => None,
        });
        let folders = Arc::new(folders.collect());
        self.note(What::Folders(folders));
    }

    fn name_of(&self, ino: u64) -> String {
        let named = self.image.nodes.values().find_map(|node| match &node.content {
            Content::Dir(entries) => entries.iter().find(|(_, entry)| **entry == ino).map(|(name, _)| name.clone()),
            Content::File(_) => None,
        });
        named.unwrap_or_default()
    }

    /// The bytes that are done of a read.
    fn cut(&mut self, ino: u64, len: usize) -> usize {
        let name = self.name_of(ino);
        let short = self.meet(&name, |fault| fault.op == Op::Read && fault.effect == Effect::Short && len > 4096);
        if short.is_none() {
            return len;
        }
        *self.parts.entry(name).or_default() += 1;
        // Whole blocks, as disks and file systems do it.
        (len / 2).next_multiple_of(4096)
    }

    /// The first fault of a file that fits a call and is due.
    fn meet(&mut self, name: &str, fits: impl Fn(&Fault) -> bool) -> Option<Effect> {
        for fault in self.faults.get_mut(name)?.iter_mut().filter(|fault| fits(fault) && fault.times > 0) {
            if fault.after > 0 {
                fault.after -= 1;
                continue;
            }
            fault.times -= 1;
            self.met += 1;
            return Some(fault.effect);
        }
        None
    }

    /// The fault that a call meets.
    fn fault(&mut self, ino: u64, op: Op) -> Option<Effect> {
        let name = self.name_of(ino);
        let word = match op {
            Op::Read => "read",
            Op::Write => "write",
            Op::Sync => "sync",
            Op::Allocate => "allocate",
        };
        *self.calls.entry((name.clone(), word)).or_default() += 1;
        self.meet(&name, |fault| fault.op == op && fault.effect != Effect::Short)
    }

    fn forget_unsynced(&mut self, ino: u64) {
        if let Some(kept) = self.synced.get(&ino).cloned()
            && let Ok(content) = self.file(ino)
        {
            *content = kept;
        }
    }

    fn reserve(&mut self, ino: u64, end: u64) -> Result<(), Errno> {
        let content = self.file(ino)?;
        let end = usize::try_from(end).map_err(|_| Errno::EFBIG)?;
        if content.len() < end {
            Arc::make_mut(content).resize(end, 0);
            self.note(What::Truncated { ino, size: end as u64 });
        }
        Ok(())
    }

    fn write(&mut self, ino: u64, offset: u64, data: &[u8], begun: Option<usize>) -> Result<(), Errno> {
        overwrite(Arc::make_mut(self.file(ino)?), offset, data);
        let now = now_ns();
        if let Some(node) = self.image.nodes.get_mut(&ino) {
            node.mtime_ns = now;
        }
        if let (Some(begun), Some(recording)) = (begun, &mut self.recording) {
            recording.events.push(Event { time_ns: now, what: What::WriteEnded(begun) });
        }
        Ok(())
    }
}

struct Handler(Arc<Shared>);

impl Handler {
    /// Does a call now, later or never, as the faults say. `work` gets the state and answers; `refuse` answers an errno.
    fn act(
        &self,
        ino: u64,
        op: Op,
        late: Option<Duration>,
        work: impl FnOnce(&mut State, Option<Errno>) + Send + 'static,
    ) {
        let effect = self.0.lock().fault(ino, op);
        let shared = Arc::clone(&self.0);
        let run = move |errno: Option<Errno>| work(&mut shared.lock(), errno);
        let later = |delay: Duration, run: Box<dyn FnOnce() + Send>| {
            std::thread::spawn(move || {
                std::thread::sleep(delay);
                run();
            });
        };
        match (effect, late) {
            (Some(Effect::Fail(errno)), _) => run(Some(Errno::from_i32(errno))),
            (Some(Effect::FailAndForget(errno)), _) => {
                self.0.lock().forget_unsynced(ino);
                run(Some(Errno::from_i32(errno)));
            }
            (Some(Effect::Hang), _) => {
                let mut state = self.0.lock();
                let name = state.name_of(ino);
                state.parked.push((name, Box::new(move || run(None))));
            }
            (Some(Effect::Delay(delay)), _) | (None, Some(delay)) => later(delay, Box::new(move || run(None))),
            (Some(Effect::Short) | None, None) | (Some(Effect::Short), Some(_)) => run(None),
        }
    }
}

/// Answers a call by its result.
macro_rules! answer {
    ($reply:ident, $result:expr, $value:pat => $good:expr) => {
        match $result {
            Ok($value) => $good,
            Err(errno) => $reply.error(errno),
        }
    };
}

impl Filesystem for Handler {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Best effort: without them it is only slower.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_PARALLEL_DIROPS);
        let _ = config.set_max_write(1 << 20);
        let _ = config.set_max_background(128);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.0.lock();
        let found = state.entry(parent.0, name).and_then(|ino| state.attr(ino));
        answer!(reply, found, attr => reply.entry(&TTL, &attr, Generation(0)));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.0.lock().attr(ino.0), attr => reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.0.lock();
        if let Some(size) = size {
            match state.file(ino.0) {
                Ok(content) => Arc::make_mut(content).resize(usize::try_from(size).unwrap_or(0), 0),
                Err(errno) => return reply.error(errno),
            }
            state.note(What::Truncated { ino: ino.0, size });
        }
        if let Some(node) = state.image.nodes.get_mut(&ino.0)
            && (size.is_some() || mtime.is_some())
        {
            node.mtime_ns = match mtime {
                Some(TimeOrNow::SpecificTime(time)) => time
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)),
                _ => now_ns(),
            };
        }
        answer!(reply, state.attr(ino.0), attr => reply.attr(&TTL, &attr));
    }

    fn mkdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        let mut state = self.0.lock();
        let made = make(&mut state, parent.0, name, Node::dir());
        answer!(reply, made, attr => reply.entry(&TTL, &attr, Generation(0)));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.0.lock();
        let gone = state.entry(parent.0, name).and_then(|_| {
            let name = name.to_str().ok_or(Errno::EINVAL)?;
            state.folder(parent.0)?.remove(name);
            state.note_folders();
            Ok(())
        });
        answer!(reply, gone, () => reply.ok());
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.unlink(req, parent, name, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = self.0.lock();
        let moved = state.entry(parent.0, name).and_then(|ino| {
            let (name, newname) = (name.to_str().ok_or(Errno::EINVAL)?, newname.to_str().ok_or(Errno::EINVAL)?);
            state.folder(parent.0)?.remove(name);
            state.folder(newparent.0)?.insert(newname.to_owned(), ino);
            state.note_folders();
            Ok(())
        });
        answer!(reply, moved, () => reply.ok());
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Past the page cache, whatever the caller asks for: what it does is what is recorded.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let mut state = self.0.lock();
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        let made = make(&mut state, parent.0, name, Node::file(Vec::new()));
        answer!(reply, made, attr => reply.created(&TTL, &attr, Generation(0), FileHandle(0), flags));
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = self.0.lock().cut(ino.0, size as usize);
        self.act(ino.0, Op::Read, None, move |state, errno| match (errno, state.file(ino.0)) {
            (Some(errno), _) | (None, Err(errno)) => reply.error(errno),
            (None, Ok(content)) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
                let end = start.saturating_add(size).min(content.len());
                reply.data(&content[start..end]);
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data: Arc<[u8]> = data.into();
        let (begun, late) = {
            let mut state = self.0.lock();
            let percent = state.late_percent;
            let late = state.rng.as_mut().and_then(|rng| {
                let delay = Duration::from_micros(rng.below(2000));
                rng.percent(percent).then_some(delay)
            });
            let begun = state.note(What::WriteBegun { ino: ino.0, offset, data: Arc::clone(&data) });
            (begun, late.filter(|_| begun.is_some()))
        };
        self.act(ino.0, Op::Write, late, move |state, errno| match errno {
            Some(errno) => reply.error(errno),
            None => {
                let written = state.write(ino.0, offset, &data, begun);
                answer!(reply, written, () => reply.written(u32::try_from(data.len()).expect("at most 1 MiB")));
            }
        });
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let begun = self.0.lock().note(What::SyncBegun { ino: ino.0, full: !datasync });
        self.act(ino.0, Op::Sync, None, move |state, errno| match errno {
            Some(errno) => reply.error(errno),
            None => {
                if let Some(begun) = begun {
                    state.note(What::SyncEnded(begun));
                }
                if state.synced.contains_key(&ino.0)
                    && let Ok(content) = state.file(ino.0)
                {
                    let content = Arc::clone(content);
                    state.synced.insert(ino.0, content);
                }
                reply.ok();
            }
        });
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.0.lock().note(What::FoldersSynced);
        reply.ok();
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut state = self.0.lock();
        let entries = match state.folder(ino.0) {
            Ok(entries) => entries.clone(),
            Err(errno) => return reply.error(errno),
        };
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (number, (name, entry)) in (1..).zip(&entries).skip(skip) {
            let kind = match state.image.nodes.get(entry).map(|node| &node.content) {
                Some(Content::Dir(_)) => FileType::Directory,
                _ => FileType::RegularFile,
            };
            if reply.add(INodeNo(*entry), number, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let zeroes = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        let keep = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let begun = zeroes.then(|| {
            let mut state = self.0.lock();
            let size = state.file(ino.0).map_or(0, |content| content.len() as u64);
            let len = if keep { length.min(size.saturating_sub(offset)) } else { length };
            let data: Arc<[u8]> = vec![0; usize::try_from(len).unwrap_or(0)].into();
            (state.note(What::WriteBegun { ino: ino.0, offset, data: Arc::clone(&data) }), data)
        });
        self.act(ino.0, Op::Allocate, None, move |state, errno| {
            let done = match (errno, begun) {
                (Some(errno), _) => Err(errno),
                (None, Some((begun, data))) => state.write(ino.0, offset, &data, begun),
                (None, None) => state.reserve(ino.0, if keep { 0 } else { offset + length }),
            };
            answer!(reply, done, () => reply.ok());
        });
    }
}

fn make(state: &mut State, parent: u64, name: &OsStr, node: Node) -> Result<FileAttr, Errno> {
    let name = name.to_str().ok_or(Errno::EINVAL)?.to_owned();
    if state.folder(parent)?.contains_key(&name) {
        return Err(Errno::EEXIST);
    }
    let ino = state.new_node(node);
    state.folder(parent)?.insert(name, ino);
    state.note_folders();
    state.attr(ino)
}
