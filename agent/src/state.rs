//! The state directory: what must survive beside the CDP disks. Small files, each replaced as a whole.
//!
//! | file | holds |
//! | --- | --- |
//! | `lock` | nothing; locked while an agent runs, so that a second one is refused |
//! | `host` | the uuid of this host; written last at the first start, so it says that the others must be there |
//! | `clock` | the clock's high-water mark |
//! | `volumes`, `disks`, `views`, `groups` | what was added and opened, to be served again after a restart |
//! | `fences/<uuid>` | the fence of a volume |
//! | `reverts/<uuid>` | the volumes of a group whose revert is not decided |
//!
//! A file is one line `cdp-state <version> <kind> <bytes> <crc32>` and then that many bytes of JSON, whose CRC-32 (IEEE) the
//! line tells. A file that is damaged, of another kind or newer than this agent stops the start and is named: it is never
//! taken for absent. A replacement is written beside, synced, renamed, and the directory synced, on a thread of its own;
//! whoever waits is woken through a channel, so that shards wait without blocking.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cdp_journal::info::Settings;
use cdp_journal::{Fence, FenceState, Instant, LocalFuture, StateStore};
use crossbeam_channel::{Receiver, Sender};
use futures::channel::oneshot;
use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{priority, priority_word};

const MAGIC: &str = "cdp-state";
const VERSION: u32 = 1;
/// No state file is larger; a length beyond it is damage.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another agent runs on it.
    #[error("state directory {}: another agent runs on it ({holder})", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// What its lock file says of the other one.
        holder: String,
    },
    /// A file is not what was written.
    #[error("state file {}: {why}; restore it from a backup: the agent does not guess what it said", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The system refused.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

/// A volume that is served again after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Path of the primary.
    pub path: PathBuf,
    /// Bytes that the guest sees; 0: all of the primary.
    pub size: u64,
    /// It stands in the configuration: the record only keeps its uuid and size.
    pub configured: bool,
}

/// A CDP disk that is opened again after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// Its path.
    pub path: PathBuf,
}

/// A read-only view that comes back under its id after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewRecord {
    /// Its id.
    pub id: Uuid,
    /// Of which volume.
    pub volume: Uuid,
    /// The instant that it shows.
    pub time_ns: u64,
    /// The marker that it was opened by; empty: by instant.
    pub snapshot_name: String,
    /// It was writable: its scratch is lost with the agent, which is told once.
    pub writable: bool,
    /// Whose it is, in words.
    #[serde(default)]
    pub owner: String,
    /// When it was opened (wall clock, nanoseconds); 0: not known.
    #[serde(default)]
    pub opened_ns: u64,
    /// When it ends (wall clock, nanoseconds); `None`: when it is closed.
    #[serde(default)]
    pub expires_ns: Option<u64>,
    /// It belongs to a call, and does not come back.
    #[serde(default)]
    pub temporary: bool,
    /// Where it is mounted; written before it is, and until it is not any more.
    #[serde(default)]
    pub mount: Option<MountRecord>,
}

/// Where a view is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRecord {
    /// The directory.
    pub dir: PathBuf,
    /// The agent made it, and takes it away.
    pub made: bool,
    /// Number of the partition; 0: the whole; `None`: the only file system there is.
    pub partition: Option<u32>,
    /// The loop or NBD device; empty: not mounted yet.
    pub device: String,
    /// Type of the file system.
    pub kind: String,
}

/// A group of volumes that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRecord {
    /// Its name.
    pub name: String,
    /// Uuids of its volumes.
    pub volumes: Vec<Uuid>,
}

/// What the directory held at start.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Nothing at or past it was ever given out.
    pub high_water: Instant,
    /// Volumes added, and those of the configuration that have a uuid by now.
    pub volumes: Vec<VolumeRecord>,
    /// CDP disks taken into use.
    pub disks: Vec<DiskRecord>,
    /// Views open when the agent ended.
    pub views: Vec<ViewRecord>,
    /// Groups added.
    pub groups: Vec<GroupRecord>,
    /// Sockets of guest agents whose guests may be frozen: an agent ended between a freeze and its thaw.
    pub frozen: Vec<PathBuf>,
    /// Fences by volume.
    pub fences: BTreeMap<Uuid, Fence>,
}

/// The state directory, locked for this process.
pub struct StateDir {
    dir: PathBuf,
    host: Uuid,
    writer: Writer,
    /// Groups whose revert is not decided, with their volumes.
    undecided: Mutex<BTreeMap<Uuid, Vec<Uuid>>>,
    /// Sockets of guests that are being quiesced, one for each call.
    frozen: Mutex<Vec<PathBuf>>,
    _lock: Flock<File>,
}

impl StateDir {
    /// Locks and reads the directory; makes it where there is none.
    pub fn open(dir: &Path) -> Result<(Arc<Self>, Saved), StateError> {
        let fences_dir = dir.join("fences");
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&fences_dir);
        made.map_err(io_error("create directory", &fences_dir))?;
        let reverts_dir = dir.join("reverts");
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&reverts_dir);
        made.map_err(io_error("create directory", &reverts_dir))?;
        let lock = lock(dir)?;
        remove_leftovers(dir)?;
        remove_leftovers(&reverts_dir)?;
        let undecided = read_reverts(&reverts_dir)?;
        remove_leftovers(&fences_dir)?;
        let fences = read_fences(&fences_dir)?;
        let host_path = dir.join("host");
        let host = match read_file::<Uuid>(&host_path, "host")? {
            Some(host) => host,
            None => {
                if !fences.is_empty() {
                    return Err(missing(&host_path));
                }
                first_start(dir)?
            }
        };
        let saved = Saved {
            high_water: Instant(required(&dir.join("clock"), "clock")?),
            volumes: required(&dir.join("volumes"), "volumes")?,
            disks: required(&dir.join("disks"), "disks")?,
            views: required(&dir.join("views"), "views")?,
            // There only once a group was added.
            groups: read_file(&dir.join("groups"), "groups")?.unwrap_or_default(),
            // There only once a guest was quiesced.
            frozen: read_file(&dir.join("frozen"), "frozen")?.unwrap_or_default(),
            fences,
        };
        let frozen = Mutex::new(saved.frozen.clone());
        let writer = Writer::start(saved.high_water).map_err(io_error("start the writer of", dir))?;
        let undecided = Mutex::new(undecided);
        Ok((Arc::new(Self { dir: dir.to_owned(), host, writer, undecided, frozen, _lock: lock }), saved))
    }

    /// Whether the directory can be read and whether all in it is right. Changes nothing and takes no lock.
    pub fn check(dir: &Path) -> Result<(), StateError> {
        read_file::<Uuid>(&dir.join("host"), "host")?;
        read_file::<u64>(&dir.join("clock"), "clock")?;
        read_file::<Vec<VolumeRecord>>(&dir.join("volumes"), "volumes")?;
        read_file::<Vec<DiskRecord>>(&dir.join("disks"), "disks")?;
        read_file::<Vec<ViewRecord>>(&dir.join("views"), "views")?;
        read_file::<Vec<GroupRecord>>(&dir.join("groups"), "groups")?;
        read_file::<Vec<PathBuf>>(&dir.join("frozen"), "frozen")?;
        if dir.join("fences").exists() {
            read_fences(&dir.join("fences"))?;
        }
        if dir.join("reverts").exists() {
            read_reverts(&dir.join("reverts"))?;
        }
        Ok(())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The uuid of this host, made at the first start.
    pub fn host_uuid(&self) -> Uuid {
        self.host
    }

    /// The fence of a volume, as it is on disk now.
    pub fn fence(&self, volume: Uuid) -> Result<Option<Fence>, StateError> {
        read_fence(&self.fence_path(volume), volume)
    }

    /// The fences of all volumes that this host has known, as they are on disk now.
    pub fn fences(&self) -> Result<BTreeMap<Uuid, Fence>, StateError> {
        read_fences(&self.dir.join("fences"))
    }

    /// Replaces the list of volumes.
    pub async fn put_volumes(&self, volumes: &[VolumeRecord]) -> io::Result<()> {
        self.writer.put(self.dir.join("volumes"), encode("volumes", &volumes)).await
    }

    /// Replaces the list of CDP disks.
    pub async fn put_disks(&self, disks: &[DiskRecord]) -> io::Result<()> {
        self.writer.put(self.dir.join("disks"), encode("disks", &disks)).await
    }

    /// Replaces the list of views.
    pub async fn put_views(&self, views: &[ViewRecord]) -> io::Result<()> {
        self.writer.put(self.dir.join("views"), encode("views", &views)).await
    }

    /// Replaces the list of groups.
    pub async fn put_groups(&self, groups: &[GroupRecord]) -> io::Result<()> {
        self.writer.put(self.dir.join("groups"), encode("groups", &groups)).await
    }

    /// Guests are about to be frozen: whoever starts next after a crash thaws them.
    pub async fn note_frozen(&self, guests: &[PathBuf]) -> io::Result<()> {
        self.change_frozen(|frozen| frozen.extend_from_slice(guests)).await
    }

    /// One of them is thawed again.
    pub async fn note_thawed(&self, guest: &Path) {
        let removed = self.change_frozen(|frozen| {
            if let Some(at) = frozen.iter().position(|noted| noted == guest) {
                frozen.remove(at);
            }
        });
        if let Err(error) = removed.await {
            // Then it is thawed once more at the next start, which does no harm.
            tracing::warn!(guest = %guest.display(), %error, "its thaw could not be recorded");
        }
    }

    async fn change_frozen(&self, change: impl FnOnce(&mut Vec<PathBuf>)) -> io::Result<()> {
        let written = {
            let mut frozen = self.frozen.lock();
            change(&mut frozen);
            // Sent under the lock: the writer keeps the order.
            self.writer.send(self.dir.join("frozen"), Change::Replace(encode("frozen", &*frozen)))
        };
        answer(written).await
    }

    /// Groups whose revert is not decided: their records do not count at recovery.
    pub fn undecided_reverts(&self) -> Vec<Uuid> {
        self.undecided.lock().keys().copied().collect()
    }

    /// The same, with their volumes.
    pub fn undecided_members(&self) -> BTreeMap<Uuid, Vec<Uuid>> {
        self.undecided.lock().clone()
    }

    /// From now on the revert of a group is undecided, durably.
    pub async fn begin_revert(&self, group: Uuid, members: Vec<Uuid>) -> io::Result<()> {
        self.undecided.lock().insert(group, members.clone());
        self.writer.put(self.revert_path(group), encode("revert", &members)).await
    }

    /// It is not undecided any more, durably: repeated with back-off for as long as the directory fails, since either answer may be on disk then.
    pub async fn decide_revert(&self, group: Uuid) {
        let mut pause = Duration::from_millis(10);
        while answer(self.writer.send(self.revert_path(group), Change::Remove)).await.is_err() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        self.undecided.lock().remove(&group);
    }

    fn revert_path(&self, group: Uuid) -> PathBuf {
        self.dir.join("reverts").join(group.to_string())
    }

    fn fence_path(&self, volume: Uuid) -> PathBuf {
        self.dir.join("fences").join(volume.to_string())
    }
}

/// The engine's way to the state directory: one for each shard.
pub struct ShardStore(pub Arc<StateDir>);

impl StateStore for ShardStore {
    fn put_fence(&self, volume: Uuid, fence: Option<Fence>) -> LocalFuture<'static, io::Result<()>> {
        let path = self.0.fence_path(volume);
        let done = match fence {
            Some(fence) => {
                self.0.writer.send(path, Change::Replace(encode("fence", &FenceRecord::new(volume, &fence))))
            }
            None => self.0.writer.send(path, Change::Remove),
        };
        Box::pin(answer(done))
    }

    fn put_clock(&self, high_water: Instant) -> LocalFuture<'static, io::Result<()>> {
        Box::pin(answer(self.0.writer.send(self.0.dir.join("clock"), Change::Raise(high_water.0))))
    }
}

/// A fence as it is written. The volume's id is inside too, so that a misnamed file shows.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FenceRecord {
    volume: Uuid,
    disk: Uuid,
    generation: u64,
    state: String,
    primary_size: u64,
    primary_id: String,
    primary_mtime_ns: u64,
    #[serde(default)]
    primary_samples: Vec<(u64, u32)>,
    #[serde(default)]
    disk_clock_ns: u64,
    next_seq: u64,
    settings: Option<SettingsRecord>,
    on: bool,
    #[serde(default)]
    held: bool,
    created_ns: u64,
    #[serde(default)]
    lost_blocks: Vec<(u64, u64)>,
    reason: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SettingsRecord {
    reserve_capacity: u64,
    reserve_duration_s: u64,
    priority: String,
}

const FENCE_STATES: [(FenceState, &str); 4] = [
    (FenceState::Dirty, "dirty"),
    (FenceState::Clean, "clean"),
    (FenceState::Detaching, "detaching"),
    (FenceState::Detached, "detached"),
];

impl FenceRecord {
    fn new(volume: Uuid, fence: &Fence) -> Self {
        let state = FENCE_STATES.iter().find(|(state, _)| *state == fence.state).expect("the table has every state").1;
        Self {
            volume,
            disk: fence.disk,
            generation: fence.generation,
            state: state.to_owned(),
            primary_size: fence.primary_size,
            primary_id: fence.primary_id.clone(),
            primary_mtime_ns: fence.primary_mtime_ns,
            primary_samples: fence.primary_samples.clone(),
            disk_clock_ns: fence.disk_clock_ns,
            next_seq: fence.next_seq,
            settings: fence.settings.map(|settings| SettingsRecord {
                reserve_capacity: settings.reserve_capacity,
                reserve_duration_s: settings.reserve_duration_s,
                priority: priority_word(settings.priority).to_owned(),
            }),
            on: fence.on,
            held: fence.held,
            created_ns: fence.created_ns,
            lost_blocks: fence.lost_blocks.clone(),
            reason: fence.reason.clone(),
        }
    }

    /// `None`: a word in it is unknown.
    fn fence(self) -> Option<Fence> {
        let state = FENCE_STATES.iter().find(|(_, word)| *word == self.state)?.0;
        let settings = match self.settings {
            Some(settings) => Some(Settings {
                reserve_capacity: settings.reserve_capacity,
                reserve_duration_s: settings.reserve_duration_s,
                priority: priority(&settings.priority)?,
            }),
            None => None,
        };
        Some(Fence {
            disk: self.disk,
            generation: self.generation,
            state,
            primary_size: self.primary_size,
            primary_id: self.primary_id,
            primary_mtime_ns: self.primary_mtime_ns,
            primary_samples: self.primary_samples,
            disk_clock_ns: self.disk_clock_ns,
            next_seq: self.next_seq,
            settings,
            on: self.on,
            held: self.held,
            created_ns: self.created_ns,
            lost_blocks: self.lost_blocks,
            reason: self.reason,
        })
    }
}

fn lock(dir: &Path) -> Result<Flock<File>, StateError> {
    let path = dir.join("lock");
    let opened = OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path);
    let mut file = opened.map_err(io_error("open", &path))?;
    let mut holder = String::new();
    let _ = (&mut file).take(256).read_to_string(&mut holder); // for the message only
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // For people; the lock itself is what counts.
            let _ = lock.set_len(0);
            let _ = writeln!(lock, "pid {}", std::process::id());
            Ok(lock)
        }
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            Err(StateError::InUse { dir: dir.to_owned(), holder: holder.trim().to_owned() })
        }
        Err((_, error)) => Err(io_error("lock", &path)(error.into())),
    }
}

/// What a crash in the middle of a replacement left: never renamed, so never valid.
fn remove_leftovers(dir: &Path) -> Result<(), StateError> {
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Writes the files of a fresh directory; what an interrupted first start wrote is kept only when it is whole.
fn first_start(dir: &Path) -> Result<Uuid, StateError> {
    let host = Uuid::new_v4();
    let clock = read_file::<u64>(&dir.join("clock"), "clock")?.unwrap_or(0);
    let files: [(&str, Vec<u8>); 5] = [
        ("clock", encode("clock", &clock)),
        (
            "volumes",
            encode("volumes", &read_file::<Vec<VolumeRecord>>(&dir.join("volumes"), "volumes")?.unwrap_or_default()),
        ),
        ("disks", encode("disks", &read_file::<Vec<DiskRecord>>(&dir.join("disks"), "disks")?.unwrap_or_default())),
        ("views", encode("views", &read_file::<Vec<ViewRecord>>(&dir.join("views"), "views")?.unwrap_or_default())),
        ("host", encode("host", &host)),
    ];
    for (name, bytes) in files {
        let path = dir.join(name);
        replace(&path, &bytes).map_err(io_error("write", &path))?;
    }
    Ok(host)
}

fn read_fences(dir: &Path) -> Result<BTreeMap<Uuid, Fence>, StateError> {
    let mut fences = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            continue;
        }
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| Uuid::parse_str(name).ok());
        let volume = name.ok_or_else(|| damaged(&path, "its name is no volume's uuid"))?;
        if let Some(fence) = read_fence(&path, volume)? {
            fences.insert(volume, fence);
        }
    }
    Ok(fences)
}

fn read_reverts(dir: &Path) -> Result<BTreeMap<Uuid, Vec<Uuid>>, StateError> {
    let mut reverts = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            continue;
        }
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| Uuid::parse_str(name).ok());
        let group = name.ok_or_else(|| damaged(&path, "its name is no group's uuid"))?;
        if let Some(members) = read_file::<Vec<Uuid>>(&path, "revert")? {
            reverts.insert(group, members);
        }
    }
    Ok(reverts)
}

fn read_fence(path: &Path, volume: Uuid) -> Result<Option<Fence>, StateError> {
    let Some(record) = read_file::<FenceRecord>(path, "fence")? else { return Ok(None) };
    if record.volume != volume {
        return Err(damaged(path, format!("it is the fence of volume {}", record.volume)));
    }
    record
        .fence()
        .map(Some)
        .ok_or_else(|| damaged(path, "it names a state or a priority that this agent does not know"))
}

fn required<T: DeserializeOwned>(path: &Path, kind: &str) -> Result<T, StateError> {
    read_file(path, kind)?.ok_or_else(|| missing(path))
}

/// `None`: there is no such file.
fn read_file<T: DeserializeOwned>(path: &Path, kind: &str) -> Result<Option<T>, StateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    decode(&bytes, kind).map(Some).map_err(|why| damaged(path, why))
}

fn encode<T: Serialize>(kind: &str, value: &T) -> Vec<u8> {
    let body = serde_json::to_vec(value).expect("plain data with text keys always encodes");
    let mut bytes = format!("{MAGIC} {VERSION} {kind} {} {:08x}\n", body.len(), crc32fast::hash(&body)).into_bytes();
    bytes.extend_from_slice(&body);
    bytes
}

fn decode<T: DeserializeOwned>(bytes: &[u8], kind: &str) -> Result<T, String> {
    let end = bytes.iter().take(256).position(|byte| *byte == b'\n').ok_or("it has no header")?;
    let header = std::str::from_utf8(&bytes[..end]).map_err(|_| "its header is no text")?;
    let body = &bytes[end + 1..];
    let [magic, version, found_kind, length, checksum] = header.split(' ').collect::<Vec<_>>()[..] else {
        return Err(format!("{header:?} is no header"));
    };
    if magic != MAGIC {
        return Err(format!("it begins with {magic:?}, not with {MAGIC:?}"));
    }
    if version != VERSION.to_string() {
        return Err(format!("it has version {version}; this agent knows {VERSION}"));
    }
    if found_kind != kind {
        return Err(format!("it holds {found_kind:?}, not {kind:?}"));
    }
    if length != body.len().to_string() {
        return Err(format!("it is torn: {length} bytes were written, {} are there", body.len()));
    }
    if checksum != format!("{:08x}", crc32fast::hash(body)) {
        return Err("its checksum does not match".to_owned());
    }
    serde_json::from_slice(body).map_err(|error| format!("its content is not valid: {error}"))
}

/// Write beside, sync, rename, sync the directory.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    sync_parent(path)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        // Gone, perhaps by a call before this one whose sync failed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => sync_parent(path),
        Err(error) => Err(error),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    File::open(parent)?.sync_all()
}

fn io_error<'a>(op: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io { op, path: path.to_owned(), source }
}

fn damaged(path: &Path, why: impl Into<String>) -> StateError {
    StateError::Damaged { path: path.to_owned(), why: why.into() }
}

fn missing(path: &Path) -> StateError {
    damaged(path, "it is missing, though this directory was in use")
}

enum Change {
    Replace(Vec<u8>),
    Remove,
    /// Of the clock: a lower value than the one on disk changes nothing.
    Raise(u64),
}

struct Job {
    path: PathBuf,
    change: Change,
    done: oneshot::Sender<io::Result<()>>,
}

/// The thread that writes, one file after the other.
struct Writer {
    jobs: Option<Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    fn start(high_water: Instant) -> io::Result<Self> {
        let (jobs, received) = crossbeam_channel::unbounded();
        let thread = std::thread::Builder::new().name("cdp-state".into()).spawn(move || {
            // Writes wait for what it writes (the clock's mark), so it must not wait for writes.
            crate::shard::protect_from_writeback();
            write_all(&received, high_water.0);
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    fn send(&self, path: PathBuf, change: Change) -> oneshot::Receiver<io::Result<()>> {
        let (done, answer) = oneshot::channel();
        if let Some(jobs) = &self.jobs {
            // A refusal drops `done`, which the waiter sees.
            let _ = jobs.send(Job { path, change, done });
        }
        answer
    }

    async fn put(&self, path: PathBuf, bytes: Vec<u8>) -> io::Result<()> {
        answer(self.send(path, Change::Replace(bytes))).await
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn answer(done: oneshot::Receiver<io::Result<()>>) -> io::Result<()> {
    done.await.unwrap_or_else(|_| Err(io::Error::other("the writer of the state directory ended")))
}

fn write_all(jobs: &Receiver<Job>, mut clock: u64) {
    while let Ok(job) = jobs.recv() {
        let result = match job.change {
            Change::Replace(bytes) => replace(&job.path, &bytes),
            Change::Remove => remove(&job.path),
            Change::Raise(mark) if mark <= clock => Ok(()),
            Change::Raise(mark) => replace(&job.path, &encode("clock", &mark)).map(|()| clock = mark),
        };
        if let Err(error) = &result {
            tracing::error!(path = %job.path.display(), %error, "write to the state directory");
        }
        let _ = job.done.send(result); // nobody waits any more: it is written all the same
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_journal::info::Priority;

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(work)
    }

    fn fence(generation: u64, state: FenceState) -> Fence {
        Fence {
            disk: Uuid::from_u128(7),
            generation,
            state,
            primary_size: 1 << 30,
            primary_id: "file:1:2".to_owned(),
            primary_mtime_ns: u64::MAX,
            primary_samples: vec![(0, u32::MAX), (u64::MAX, 0)],
            disk_clock_ns: u64::MAX,
            next_seq: 3,
            settings: Some(Settings { reserve_capacity: 1 << 40, reserve_duration_s: 86400, priority: Priority::High }),
            held: true,
            on: true,
            created_ns: 9,
            lost_blocks: vec![(0, 1), (u64::MAX, 1)],
            reason: "why \"not\"".to_owned(),
        }
    }

    #[test]
    fn what_was_put_comes_back() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let dir = temp.path().join("a/b");
        let id = Uuid::from_u128(1);
        let host = {
            let (state, saved) = StateDir::open(&dir).expect("fresh");
            assert_eq!((saved.high_water, saved.fences.len()), (Instant(0), 0));
            let store = ShardStore(Arc::clone(&state));
            for (generation, (fence_state, _)) in FENCE_STATES.iter().enumerate() {
                block_on(store.put_fence(id, Some(fence(generation as u64, *fence_state)))).expect("put");
                assert_eq!(state.fence(id).expect("read"), Some(fence(generation as u64, *fence_state)));
            }
            block_on(store.put_fence(Uuid::from_u128(2), Some(fence(1, FenceState::Clean)))).expect("put");
            block_on(store.put_fence(Uuid::from_u128(2), None)).expect("remove");
            block_on(store.put_fence(Uuid::from_u128(3), None)).expect("removing what is not there is no error");
            block_on(store.put_clock(Instant(u64::MAX - 1))).expect("raise");
            block_on(store.put_clock(Instant(5))).expect("a lower mark is answered");
            let volume = VolumeRecord { uuid: id, name: "v".into(), path: "/p".into(), size: 512, configured: false };
            block_on(state.put_volumes(&[volume])).expect("put");
            block_on(state.put_disks(&[DiskRecord { path: "/d".into() }])).expect("put");
            let view = ViewRecord {
                id,
                volume: id,
                time_ns: u64::MAX,
                snapshot_name: "ü\n".into(),
                writable: false,
                owner: "root".into(),
                opened_ns: 1,
                expires_ns: Some(2),
                temporary: false,
                mount: None,
            };
            block_on(state.put_views(&[view])).expect("put");
            state.host_uuid()
        };
        let (state, saved) = StateDir::open(&dir).expect("again");
        assert_eq!(state.host_uuid(), host);
        assert_eq!(saved.high_water, Instant(u64::MAX - 1), "the clock never steps back");
        assert_eq!(saved.fences.into_iter().collect::<Vec<_>>(), [(id, fence(3, FenceState::Detached))]);
        assert_eq!((saved.volumes[0].name.as_str(), saved.disks[0].path.as_path()), ("v", Path::new("/d")));
        assert_eq!((saved.views[0].time_ns, saved.views[0].snapshot_name.as_str()), (u64::MAX, "ü\n"));
    }

    #[test]
    fn a_second_agent_is_refused_until_the_first_is_gone() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let (first, _) = StateDir::open(temp.path()).expect("first");
        let error = StateDir::open(temp.path()).err().expect("second").to_string();
        assert!(error.contains("another agent") && error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        StateDir::open(temp.path()).expect("after the first");
    }

    /// Goal: no damage of any file is taken for "nothing there". Method: each file, cut at every length and with every
    /// byte changed, refuses the start and is named.
    #[test]
    fn every_damage_is_refused_by_the_files_name() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let id = Uuid::from_u128(0xabc);
        {
            let (state, _) = StateDir::open(temp.path()).expect("fresh");
            let store = ShardStore(state);
            block_on(store.put_fence(id, Some(fence(1, FenceState::Dirty)))).expect("put");
            block_on(store.put_clock(Instant(12345))).expect("put");
        }
        for name in ["host", "clock", "volumes", "disks", "views", &format!("fences/{id}")] {
            let path = temp.path().join(name);
            let good = fs::read(&path).expect("it is there");
            let refused = |bytes: &[u8], what: &str| {
                fs::write(&path, bytes).expect("damage it");
                for result in [StateDir::check(temp.path()).err(), StateDir::open(temp.path()).err()] {
                    let error = result.unwrap_or_else(|| panic!("{name}: {what} was accepted")).to_string();
                    assert!(error.contains(&path.display().to_string()), "{name}: {what}: {error}");
                }
            };
            for length in 0..good.len() {
                refused(&good[..length], &format!("cut at {length}"));
            }
            for at in 0..good.len() {
                let mut bytes = good.clone();
                bytes[at] ^= 0x01;
                refused(&bytes, &format!("byte {at} changed"));
            }
            refused(&[good.as_slice(), b"x"].concat(), "a byte appended");
            fs::remove_file(&path).expect("remove it");
            if !name.starts_with("fences/") {
                let error = StateDir::open(temp.path()).err().expect("missing").to_string();
                assert!(error.contains(&path.display().to_string()), "{error}");
            }
            fs::write(&path, &good).expect("mend it");
        }
        StateDir::open(temp.path()).expect("mended");
    }

    #[test]
    fn a_file_in_anothers_place_is_refused() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let (id, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        {
            let (state, _) = StateDir::open(temp.path()).expect("fresh");
            block_on(ShardStore(state).put_fence(id, Some(fence(1, FenceState::Dirty)))).expect("put");
        }
        let fences = temp.path().join("fences");
        fs::rename(fences.join(id.to_string()), fences.join(other.to_string())).expect("misname it");
        let error = StateDir::open(temp.path()).err().expect("misnamed").to_string();
        assert!(error.contains(&other.to_string()) && error.contains(&id.to_string()), "{error}");
        fs::remove_file(fences.join(other.to_string())).expect("remove it");
        fs::write(fences.join("readme"), "x").expect("a stranger");
        assert!(StateDir::open(temp.path()).err().expect("stranger").to_string().contains("readme"));
    }

    #[test]
    fn what_a_crash_left_beside_is_removed() {
        let temp = tempfile::tempdir().expect("temporary directory");
        drop(StateDir::open(temp.path()).expect("fresh"));
        fs::write(temp.path().join("clock.tmp"), "half").expect("leftover");
        fs::write(temp.path().join("fences/x.tmp"), "half").expect("leftover");
        StateDir::open(temp.path()).expect("opens");
        assert!(!temp.path().join("clock.tmp").exists() && !temp.path().join("fences/x.tmp").exists());
    }

    #[test]
    fn a_newer_version_is_refused() {
        let newer = String::from_utf8(encode("clock", &5_u64)).expect("text").replacen("cdp-state 1", "cdp-state 2", 1);
        let error = decode::<u64>(newer.as_bytes(), "clock").expect_err("newer");
        assert!(error.contains("version 2"), "{error}");
    }
}
