//! What is served where: the registry of shards, CDP disks, volumes and views, and the calls that change it.
//!
//! The engine of a shard lives on the shard's thread; this side knows names, ids and places, and sends work there. Invariants:
//! * `registry` is locked for moments only, never across an `await`; a change of what is registered holds `changing` from its
//!   checks to its record in the state directory, so two changes never cross.
//! * What a change made is recorded durably before the caller is told.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cdp_journal::clock::HostClock;
use cdp_journal::info::{DiskInfo, Health, ViewInfo, VolumeInfo, VolumeStats};
use cdp_journal::{
    Device, Engine, EngineConfig, Error, Export, Fence, FenceState, InitOptions, Instant, Result, Volume, VolumeSpec,
};
use cdp_proto::v1::EventKind;
use futures::future::{BoxFuture, Either, FutureExt as _, join, join_all, select};
use parking_lot::RwLock;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::config::{Attach, Config, VolumeConfig};
use crate::copying::{self, Copying};
use crate::device::{Disk, DiskFile, OpenError};
use crate::events::{EventHub, wall_ns};
use crate::frontend::nbd::{ExportDirectory, ExportEntry, ExportInfo, ExportKind, ExportSource};
use crate::groups::Group;
use crate::mounts::nbd::NbdDevices;
use crate::quiesce::Quiesces;
use crate::ring::Ring;
use crate::shard::ShardHandle;
use crate::state::{DiskRecord, Saved, ShardStore, StateDir, ViewRecord, VolumeRecord};

mod local;
mod signature;
mod unfenced;

pub use local::{MountWish, Terms, ViewStatus};

/// A predecessor that was killed keeps its disks locked until the kernel has ended its last requests; the lock on the state
/// directory, which we have by then, says that it is gone.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(10);
/// A disk that answers nothing for so long when it is opened hangs: the agent goes on without it.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);
/// How long an answer that can do without a new instant waits for one.
const INSTANT_PATIENCE: Duration = Duration::from_secs(2);
/// Connections that are cut off get so long to end.
const CUT_GRACE: Duration = Duration::from_secs(1);
/// A shard's thread gets so long to end: it waits seconds for what the kernel still has of it.
const SHARD_GRACE: Duration = Duration::from_secs(10);

/// A shard with its engine.
pub type Shard = ShardHandle<Local>;

/// What lives on a shard's thread.
#[derive(Clone)]
pub struct Local {
    /// The engine.
    pub engine: Rc<Engine>,
    /// The primaries, kept so that a volume can be opened anew without losing their locks.
    primaries: Rc<RefCell<HashMap<Uuid, Disk>>>,
}

impl Local {
    /// Opens a volume on its primary, and keeps that. Where the primary hangs the opening is left to itself: it keeps the primary, the engine opens the volume no
    /// second time meanwhile, and what comes of it is closed again.
    async fn open(&self, ring: &Ring, spec: VolumeSpec, primary: Disk) -> Result<VolumeInfo> {
        let (id, path) = (spec.id, PathBuf::from(&spec.path));
        let hangs = primary.until_hanging(u64::try_from(OPEN_PATIENCE.as_nanos()).unwrap_or(u64::MAX));
        let (tell, told) = oneshot::channel();
        let local = self.clone();
        ring.spawn(async move {
            let opened = local.engine.open_volume(spec).await.map(|volume| {
                local.primaries.borrow_mut().insert(id, primary);
                volume.info()
            });
            if let Err(Ok(_)) = tell.send(opened) {
                tracing::warn!(volume = %id, "its primary answers now, too late to be served: restart the agent");
                if let Err(error) = local.close(id).await {
                    tracing::warn!(volume = %id, %error, "it could not be closed again");
                }
            }
        });
        match select(told, hangs).await {
            Either::Left((opened, _)) => opened.unwrap_or_else(|_| Err(stopping())),
            Either::Right(_) => Err(open_error(hanging(&path))),
        }
    }

    /// Closes a volume, whether it is open or not, and lets its primary go.
    async fn close(&self, volume: Uuid) -> Result<()> {
        let closed = self.engine.close_volume(volume).await;
        // However it ended, nothing of the volume runs any more.
        self.primaries.borrow_mut().remove(&volume);
        match closed {
            Err(Error::NotFound { .. }) => Ok(()),
            closed => closed,
        }
    }
}

impl ExportSource for Local {
    fn export(&self, key: Uuid) -> Option<Rc<dyn Export>> {
        self.engine.export(key)
    }
}

/// A volume that a request means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
}

/// A volume as the registry has it; `info` is absent when it could not be opened.
pub struct VolumeStatus {
    /// The record.
    pub record: VolumeRecord,
    /// What the engine says, or why there is no engine to ask.
    pub info: std::result::Result<VolumeInfo, String>,
}

/// A CDP disk as the registry has it.
pub struct DiskStatus {
    /// What the engine says; for a disk that could not be opened, its path and the reason.
    pub info: DiskInfo,
    /// Past the page cache.
    pub direct: bool,
}

/// What the metrics take from a shard, in one message.
pub struct ShardStats {
    /// By volume.
    pub volumes: Vec<(VolumeInfo, VolumeStats, usize)>,
    /// By CDP disk.
    pub disks: Vec<DiskInfo>,
    /// Writes wait for the state directory.
    pub state_failing: bool,
}

/// A volume to be added.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its name.
    pub name: String,
    /// Path of the primary.
    pub path: PathBuf,
    /// Its uuid; `None`: a new one.
    pub uuid: Option<Uuid>,
    /// Bytes that the guest sees; 0: all of it.
    pub size: u64,
    /// Make the file, sparse, where there is none.
    pub create: bool,
}

/// See the module's text.
pub struct Control {
    shards: Vec<Arc<Shard>>,
    state: Arc<StateDir>,
    clock: Arc<HostClock>,
    events: Arc<EventHub>,
    engine_config: EngineConfig,
    pub(crate) registry: RwLock<Registry>,
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// One group is reverted at a time: each takes its members' locks in no order. Whoever holds `changing` too took that first.
    pub(crate) reverting: tokio::sync::Mutex<()>,
    /// How fast reverts are copied.
    pub(crate) copying: Arc<Copying>,
    /// Guests that calls hold frozen.
    pub(crate) quiesces: Arc<Quiesces>,
    /// Where views are files, while they are.
    local: RwLock<Option<PathBuf>>,
    /// The kernel's NBD devices, where views are mounted by them.
    nbd_devices: Option<Arc<NbdDevices>>,
    pub(crate) mounting: tokio::sync::Mutex<()>,
    recording: tokio::sync::Mutex<()>,
    views_max: usize,
    views_scratch_bytes_max: u64,
}

#[derive(Default)]
pub(crate) struct Registry {
    volumes: BTreeMap<Uuid, VolumeSlot>,
    /// Volumes that left the configuration and have a journal still: not served, and remembered, so that they are the same when they come back.
    left: Vec<VolumeRecord>,
    disks: Vec<DiskSlot>,
    views: BTreeMap<Uuid, ViewSlot>,
    pub(crate) groups: BTreeMap<String, Group>,
}

impl Registry {
    /// Whether a volume of this name is remembered, though it has left the configuration.
    pub(crate) fn has_left(&self, name: &str) -> bool {
        self.left.iter().any(|volume| volume.name == name)
    }
}

struct VolumeSlot {
    record: VolumeRecord,
    shard: usize,
    identity: Option<FileId>,
    /// Why it could not be opened.
    failed: Option<String>,
}

/// Volumes whose journal alone holds what their primary lacks: by the primary's identity, the volume and its CDP disk.
type Claims = BTreeMap<String, (Uuid, Uuid)>;

fn claims(fences: &BTreeMap<Uuid, Fence>) -> Claims {
    let open = fences.iter().filter(|(_, fence)| only_in_journal(fence) && !fence.primary_id.is_empty());
    open.map(|(volume, fence)| (fence.primary_id.clone(), (*volume, fence.disk))).collect()
}

/// Whether acked writes may be in the journal only.
fn only_in_journal(fence: &Fence) -> bool {
    matches!(fence.state, FenceState::Dirty | FenceState::Detaching)
}

struct DiskSlot {
    path: PathBuf,
    /// It stands in the configuration, so it is not recorded.
    configured: bool,
    shard: usize,
    identity: Option<FileId>,
    id: Option<Uuid>,
    direct: bool,
    /// Why it could not be opened.
    failed: Option<String>,
}

struct ViewSlot {
    record: ViewRecord,
    shard: usize,
}

/// What tells a file or device from another: kind, device, inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId(bool, u64, u64);

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        let block = found.file_type().is_block_device();
        Some(if block { Self(true, found.rdev(), 0) } else { Self(false, found.dev(), found.ino()) })
    }
}

impl Control {
    /// Starts the shards, opens the CDP disks, then the volumes by priority, then the views that were open.
    ///
    /// # Errors
    /// When the agent must not run: a shard that cannot start, a CDP disk that another process uses, a state directory that
    /// cannot be written. A disk or volume that is missing is registered as such, and the agent runs.
    pub async fn start(
        config: &Config,
        state: Arc<StateDir>,
        saved: Saved,
        events: Arc<EventHub>,
    ) -> anyhow::Result<Arc<Self>> {
        let clock = Arc::new(HostClock::new(saved.high_water));
        let mut shards = Vec::new();
        for number in 0..config.shards {
            let (clock, state, events, engine_config) =
                (Arc::clone(&clock), Arc::clone(&state), Arc::clone(&events), config.engine.clone());
            let shard = Shard::start(&format!("cdp-shard-{number}"), move |ring| {
                let store = Rc::new(ShardStore(state));
                let publish = Box::new(move |event| events.publish_engine(event));
                let engine = Engine::new(Rc::new(ring), clock, store, engine_config, publish);
                Local { engine, primaries: Rc::default() }
            });
            shards.push(Arc::new(shard.with_context(|| format!("start shard {number}"))?));
        }
        let control = Arc::new(Self {
            shards,
            state,
            clock,
            events,
            engine_config: config.engine.clone(),
            registry: RwLock::default(),
            changing: tokio::sync::Mutex::new(()),
            reverting: tokio::sync::Mutex::new(()),
            local: RwLock::default(),
            nbd_devices: nbd_devices(config),
            mounting: tokio::sync::Mutex::new(()),
            recording: tokio::sync::Mutex::new(()),
            views_max: config.views_max,
            views_scratch_bytes_max: config.views_scratch_bytes_max,
            copying: Arc::default(),
            quiesces: Arc::default(),
        });
        let deadline = tokio::time::Instant::now() + PREDECESSOR_PATIENCE;
        control.open_disks(config, &saved.disks, deadline).await?;
        control.open_volumes(config, &saved, deadline).await?;
        control.settle_reverts().await;
        control.reopen_views(saved.views).await?;
        control.take_groups(&config.groups, saved.groups);
        tokio::spawn(copying::watch(Arc::downgrade(&control)));
        Ok(control)
    }

    /// Events of this agent.
    pub fn events(&self) -> &Arc<EventHub> {
        &self.events
    }

    /// The state directory.
    pub fn state(&self) -> &Arc<StateDir> {
        &self.state
    }

    /// The shards.
    pub fn shards(&self) -> &[Arc<Shard>] {
        &self.shards
    }

    /// Bounds and defaults of the engines.
    pub fn engine_config(&self) -> &EngineConfig {
        &self.engine_config
    }

    /// How far the clock of instants runs ahead of the wall clock, nanoseconds.
    pub fn clock_lead_ns(&self) -> u64 {
        self.clock.lead_ns(wall_ns())
    }

    /// A new instant, after everything that was acked so far.
    pub async fn instant(&self) -> Result<Instant> {
        let ticked = self.shards[0].call(|local, _| async move { local.engine.tick().await });
        ticked.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// The same; where none is to be had, since the state directory takes no mark, the newest one that was given out.
    pub async fn instant_or_newest(&self) -> Result<Instant> {
        let ticked = tokio::time::timeout(INSTANT_PATIENCE, self.instant()).await;
        ticked.unwrap_or_else(|_| Ok(self.clock.previous()))
    }

    // ---- volumes ----

    /// The volume of this uuid (in any case) or name.
    pub fn resolve(&self, volume: &str) -> Result<Resolved> {
        let registry = self.registry.read();
        let slot = match Uuid::parse_str(volume) {
            Ok(uuid) => registry.volumes.get(&uuid),
            Err(_) => registry.volumes.values().find(|slot| slot.record.name == volume),
        };
        let slot = slot.ok_or_else(|| Error::NotFound { what: "volume", name: volume.to_owned() })?;
        Ok(Resolved { uuid: slot.record.uuid, name: slot.record.name.clone() })
    }

    /// The volume of this uuid.
    pub fn resolved(&self, uuid: Uuid) -> Option<Resolved> {
        let registry = self.registry.read();
        registry.volumes.get(&uuid).map(|slot| Resolved { uuid, name: slot.record.name.clone() })
    }

    /// Runs work on a volume's shard. Dropping the future does not stop the work.
    pub async fn on_volume<T, F, Fut>(&self, volume: Uuid, work: F) -> Result<T>
    where
        F: FnOnce(Rc<Volume>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T>> + 'static,
        T: Send + 'static,
    {
        let shard = self.shard_of(volume)?;
        let done = shard.call(move |local, _| async move {
            match local.engine.volume(volume) {
                Some(volume) => work(volume).await,
                None => Err(Error::Gone(format!("volume {volume} was removed meanwhile"))),
            }
        });
        done.await.unwrap_or_else(|_| Err(stopping()))
    }

    fn shard_of(&self, volume: Uuid) -> Result<Arc<Shard>> {
        let registry = self.registry.read();
        let slot = registry.volumes.get(&volume);
        let slot = slot.ok_or_else(|| Error::NotFound { what: "volume", name: volume.to_string() })?;
        match &slot.failed {
            Some(why) => Err(Error::State(format!(
                "volume {:?} is not served: {why}; mend that and restart the agent",
                slot.record.name
            ))),
            None => Ok(Arc::clone(&self.shards[slot.shard])),
        }
    }

    /// All about a volume.
    pub async fn info(&self, volume: Uuid) -> Result<VolumeInfo> {
        self.on_volume(volume, |volume| async move { Ok(volume.info()) }).await
    }

    /// A volume as the registry has it, served or not.
    pub async fn volume(&self, volume: Uuid) -> Result<VolumeStatus> {
        let (record, failed) = {
            let registry = self.registry.read();
            let slot = registry.volumes.get(&volume);
            let slot = slot.ok_or_else(|| Error::NotFound { what: "volume", name: volume.to_string() })?;
            (slot.record.clone(), slot.failed.clone())
        };
        let info = match failed {
            Some(why) => Err(why),
            None => match self.info(volume).await {
                // Removed just now.
                Err(error @ Error::NotFound { .. }) => return Err(error),
                // It stays in every list: what is not served must be seen.
                info => info.map_err(|error| error.to_string()),
            },
        };
        Ok(VolumeStatus { record, info })
    }

    /// Names and ids of the volumes that could not be opened: no shard knows of them.
    pub fn unserved(&self) -> Vec<(String, Uuid)> {
        let registry = self.registry.read();
        let failed = registry.volumes.values().filter(|slot| slot.failed.is_some());
        failed.map(|slot| (slot.record.name.clone(), slot.record.uuid)).collect()
    }

    /// All volumes, by name.
    pub async fn volumes(&self) -> Vec<VolumeStatus> {
        let mut uuids: Vec<(String, Uuid)> =
            self.registry.read().volumes.values().map(|slot| (slot.record.name.clone(), slot.record.uuid)).collect();
        uuids.sort();
        // One that is removed meanwhile is left out.
        join_all(uuids.iter().map(|(_, uuid)| self.volume(*uuid))).await.into_iter().flatten().collect()
    }

    /// Takes a device or file into service. Answers the volume that is there when it is the same one.
    pub async fn add_volume(&self, new: NewVolume) -> Result<Uuid> {
        self.refuse_own(&new.path).await?;
        let _changing = self.changing.lock().await;
        if let Some(same) = self.same_volume(&new) {
            return Ok(same);
        }
        self.check_new_volume(&new)?;
        if new.create {
            create_sparse(&new.path, new.size).await?;
        }
        self.check_identity(&new.path, "path", false)?;
        let mut record = VolumeRecord {
            uuid: new.uuid.unwrap_or_else(Uuid::new_v4),
            name: new.name,
            path: new.path,
            size: new.size,
            configured: false,
        };
        self.events.name_volume(record.uuid, &record.name);
        let claims = match new.uuid {
            Some(_) => Claims::new(),
            None => claims(&self.state.fences().map_err(|error| Error::State(error.to_string()))?),
        };
        let file = open_file(&record.path).await?;
        let (shard, info) = self.open_volume(&record, &claims, file).await?;
        record.size = info.size;
        let uuid = record.uuid;
        let message = format!("volume {:?} added: {}", record.name, record.path.display());
        let slot = VolumeSlot { identity: FileId::of(&record.path), record, shard, failed: None };
        self.registry.write().volumes.insert(uuid, slot);
        if let Err(error) = self.record_volumes().await {
            self.registry.write().volumes.remove(&uuid);
            self.close_on_shard(shard, uuid).await?;
            return Err(error);
        }
        self.events.publish_now(EventKind::VolumeAdded, Some(uuid), None, message);
        Ok(uuid)
    }

    fn same_volume(&self, new: &NewVolume) -> Option<Uuid> {
        let registry = self.registry.read();
        let slot = registry.volumes.values().find(|slot| slot.record.name == new.name)?;
        let same = slot.record.path == new.path
            && new.uuid.is_none_or(|uuid| uuid == slot.record.uuid)
            && (new.size == 0 || new.size == slot.record.size);
        same.then_some(slot.record.uuid)
    }

    fn check_new_volume(&self, new: &NewVolume) -> Result<()> {
        let registry = self.registry.read();
        if registry.volumes.values().any(|slot| slot.record.name == new.name) {
            return Err(Error::Exists { what: "volume", name: new.name.clone() });
        }
        if registry.groups.contains_key(&new.name) {
            return Err(Error::Exists { what: "group", name: new.name.clone() });
        }
        match new.uuid {
            Some(uuid) if registry.volumes.contains_key(&uuid) => {
                Err(Error::Exists { what: "volume", name: uuid.to_string() })
            }
            Some(uuid) if registry.views.contains_key(&uuid) => {
                Err(Error::Exists { what: "view", name: uuid.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// Refuses a device or file that is in use here already, under whatever path.
    /// `anew`: but for a CDP disk of that path that could not be opened, because its making was cut off, say.
    fn check_identity(&self, path: &Path, field: &'static str, anew: bool) -> Result<()> {
        self.check_unused(FileId::of(path), path, field, anew)
    }

    /// The same of what was found at the path.
    fn check_unused(&self, identity: Option<FileId>, path: &Path, field: &'static str, anew: bool) -> Result<()> {
        let Some(identity) = identity else { return Ok(()) };
        let registry = self.registry.read();
        let used =
            |disk: &&DiskSlot| disk.identity == Some(identity) && !(anew && disk.failed.is_some() && disk.path == path);
        if let Some(disk) = registry.disks.iter().find(used) {
            let bound = format!("it is the CDP disk {}", disk.path.display());
            return Err(Error::invalid(field, path.display(), bound));
        }
        if let Some(slot) = registry.volumes.values().find(|slot| slot.identity == Some(identity)) {
            return Err(primary_taken(path, &slot.record));
        }
        Ok(())
    }

    /// Stops serving a volume.
    pub async fn remove_volume(&self, volume: Uuid, force: bool, clean: bool) -> Result<VolumeStatus> {
        let _mounting = self.mounting.lock().await;
        let _changing = self.changing.lock().await;
        let status = self.volume(volume).await?;
        if status.record.configured {
            return Err(Error::State(format!(
                "volume {:?} is part of the configuration file: take it out there and restart the agent",
                status.record.name
            )));
        }
        let group = self.group_with(volume).filter(|group| !force || group.configured);
        if let Some(group) = group {
            let text = format!("volume {:?} is in group {:?}: remove the group first", status.record.name, group.name);
            return Err(Error::State(text));
        }
        let left_behind = self.left_behind(volume, &status.info)?.filter(|_| !clean);
        if let Some(what) = left_behind.filter(|_| !force) {
            return Err(Error::State(format!(
                "volume {:?}: {what} are in its journal only, and its primary lacks them: wait until that is over, mend it, or use force",
                status.record.name
            )));
        }
        if let Ok(info) = &status.info {
            if self.on_volume(volume, |volume| async move { Ok(volume.is_leaving()) }).await? {
                // What is acked is in memory alone, and closing it waits until that is on the primary: so would every other change.
                return Err(still_leaving(&info.name));
            }
            let views = self.on_volume(volume, |volume| async move { Ok(volume.views()) }).await?;
            if !force && info.clients > 0 {
                let text =
                    format!("volume {:?} is open by {} clients: disconnect them or use force", info.name, info.clients);
                return Err(Error::State(text));
            }
            if !force && !views.is_empty() {
                let text = format!("volume {:?} has {} open views: close them or use force", info.name, views.len());
                return Err(Error::State(text));
            }
            for view in views {
                self.unmount(view.id, force).await?;
                self.close_view_locked(view.id).await?;
            }
            if clean && info.settings.is_some() {
                self.on_volume(volume, |volume| async move { volume.clean(None).await }).await?;
            }
        } else if clean {
            return Err(Error::State("history can be cleaned only while the volume is served".to_owned()));
        }
        let shard = self.registry.read().volumes.get(&volume).map_or(0, |slot| slot.shard);
        // Also one that could not be served: what was opened of it is let go.
        let closed = self.close_on_shard(shard, volume).await.map_err(|error| error.to_string());
        let dirty = || self.fence(volume).is_ok_and(|fence| fence.as_ref().is_some_and(only_in_journal));
        let closed = match closed {
            Ok(()) if left_behind.is_none() && dirty() => Err("a revert began while it was being removed".to_owned()),
            closed => closed,
        };
        if let Err(why) = closed.as_ref()
            && !force
        {
            let lacking = if dirty() { "; its journal holds what its primary lacks" } else { "" };
            let why = format!("it was closed to be removed, and that failed: {why}{lacking}");
            if let Some(slot) = self.registry.write().volumes.get_mut(&volume) {
                slot.failed = Some(why.clone());
            }
            return Err(Error::State(format!(
                "volume {:?}: {why}; remove it with force, or restart the agent to serve it again",
                status.record.name
            )));
        }
        let slot = self.registry.write().volumes.remove(&volume);
        let recorded = match self.drop_views_of(volume).await {
            Ok(()) => self.record_volumes().await,
            failed => failed,
        };
        if let Err(error) = recorded {
            // It is not served any more; the record still says so until it can be written.
            self.registry.write().volumes.extend(slot.map(|slot| {
                (
                    volume,
                    VolumeSlot {
                        failed: Some("it was removed, but the record could not be written".to_owned()),
                        ..slot
                    },
                )
            }));
            return Err(error);
        }
        self.leave_groups(volume).await?;
        let mut message = format!("volume {:?} removed", status.record.name);
        if dirty() {
            message.push_str(&format!(
                ": its primary is not all of it, its journal holds the rest; to serve it again, add it with uuid {volume}"
            ));
        }
        self.events.publish_now(EventKind::VolumeRemoved, Some(volume), None, message);
        Ok(status)
    }

    /// What would be in a volume's journal only, if it were closed now; `None`: its primary would hold everything.
    fn left_behind(&self, volume: Uuid, info: &Result<VolumeInfo, String>) -> Result<Option<&'static str>> {
        let served = |info: &&VolumeInfo| !matches!(info.health, Health::NeedsJournal | Health::PrimaryChanged);
        if let Some(info) = info.as_ref().ok().filter(served) {
            return Ok(info.revert.is_some().then_some("blocks of a revert that is being copied"));
        }
        let fence = self.fence(volume)?;
        Ok(fence.as_ref().is_some_and(only_in_journal).then_some("acked writes"))
    }

    /// Forgets the views of a volume that is not served any more: those that waited for it, or that it lost when it was opened anew. What such a view was mounted
    /// by goes first: nobody else knows of it once its record is gone. The caller holds `mounting` and `changing`.
    async fn drop_views_of(&self, volume: Uuid) -> Result<()> {
        let views: Vec<Uuid> = {
            let registry = self.registry.read();
            registry.views.iter().filter(|(_, slot)| slot.record.volume == volume).map(|(id, _)| *id).collect()
        };
        for view in &views {
            if let Err(error) = self.unmount(*view, true).await {
                tracing::warn!(%view, %error, "a view of a volume that is removed could not be unmounted");
            }
        }
        if views.is_empty() {
            return Ok(());
        }
        let dropped: Vec<_> = {
            let mut registry = self.registry.write();
            views.iter().filter_map(|id| registry.views.remove_entry(id)).collect()
        };
        let recorded = self.record_views().await;
        if recorded.is_err() {
            // Still on record, so that whoever tries again takes them off it.
            self.registry.write().views.extend(dropped);
        }
        recorded
    }

    /// Offers the primary's grown size to the guest.
    pub async fn resize_volume(&self, volume: Uuid, size: Option<u64>) -> Result<(u64, VolumeInfo)> {
        let _changing = self.changing.lock().await;
        let (old, info) = self
            .on_volume(volume, move |volume| async move {
                let old = volume.info().size;
                volume.resize(size).await?;
                Ok((old, volume.info()))
            })
            .await?;
        if let Some(slot) = self.registry.write().volumes.get_mut(&volume) {
            slot.record.size = info.size;
        }
        self.record_volumes().await?;
        Ok((old, info))
    }

    /// The admin's decision to go on with the primary as it is: opens the volume anew.
    pub async fn override_volume(&self, volume: Uuid, health: Health) -> Result<VolumeStatus> {
        let _changing = self.changing.lock().await;
        let info = self.info(volume).await?;
        if info.health != health {
            return Err(Error::State(format!(
                "volume {:?} is in state {}, not in {}",
                info.name,
                health_word(info.health),
                health_word(health)
            )));
        }
        self.open_anew(volume, Some(health), false).await
    }

    /// The admin's decision to take over the history that a CDP disk has of this volume, though this host knows nothing of it; or though the primary is known by another
    /// identity than before.
    pub async fn attach_volume(&self, volume: Uuid) -> Result<VolumeStatus> {
        let _changing = self.changing.lock().await;
        let fence = self.fence(volume)?;
        let info = self.info(volume).await?;
        let wanted = if fence.is_none() { Health::NeedsJournal } else { Health::PrimaryChanged };
        if info.health != wanted {
            let name = info.name;
            return Err(Error::State(format!(
                "volume {name:?} has no history to attach: that is for one in state needs_journal whose CDP disk came from elsewhere, or primary_changed because its \
                 primary is known by another name"
            )));
        }
        self.open_anew(volume, None, true).await
    }

    /// Opens a volume anew by an admin's word; a state that forbids serving it all the same is an error.
    async fn open_anew(&self, volume: Uuid, accept: Option<Health>, attach: bool) -> Result<VolumeStatus> {
        let (record, shard) = {
            let registry = self.registry.read();
            let slot = registry.volumes.get(&volume);
            let slot = slot.ok_or_else(|| Error::NotFound { what: "volume", name: volume.to_string() })?;
            (slot.record.clone(), slot.shard)
        };
        let closed = self.shards[shard].call(move |local, _| async move {
            // What is acked is in memory alone: that is not to be given up.
            if local.engine.volume(volume).is_some_and(|volume| volume.is_leaving()) {
                return Ok(false);
            }
            local.engine.close_volume(volume).await.map(|()| true)
        });
        if !self.noted(volume, closed.await.unwrap_or_else(|_| Err(stopping())))? {
            return Err(still_leaving(&record.name));
        }
        // As the close has left it.
        let fence = self.noted(volume, self.fence(volume))?;
        let undecided_reverts = self.state.undecided_reverts();
        let reopened = self.shards[shard].call(move |local, ring| async move {
            let primary = local.primaries.borrow().get(&volume).cloned();
            let primary = primary.ok_or_else(|| Error::Gone(format!("volume {volume} is being removed")))?;
            let spec = VolumeSpec {
                id: volume,
                name: record.name,
                path: record.path.display().to_string(),
                size: record.size,
                primary: Rc::new(primary.clone()),
                fence,
                accept,
                attach_journal: attach,
                undecided_reverts,
            };
            local.open(&ring, spec, primary).await.map(drop)
        });
        self.noted(volume, reopened.await.unwrap_or_else(|_| Err(stopping())))?;
        self.settle_reverts().await;
        let after = self.volume(volume).await?;
        match &after.info {
            // It was opened, and refused: what the admin said was not enough.
            Ok(info) if matches!(info.health, Health::NeedsJournal | Health::PrimaryChanged) => {
                Err(Error::State(info.health_reason.clone()))
            }
            _ => Ok(after),
        }
    }

    /// Notes of a volume that it is not served, where that is how closing or opening it ended.
    fn noted<T>(&self, volume: Uuid, result: Result<T>) -> Result<T> {
        if let (Err(error), Some(slot)) = (&result, self.registry.write().volumes.get_mut(&volume)) {
            slot.failed = Some(error.to_string());
        }
        result
    }

    /// The fence of a volume, as it is on disk now.
    fn fence(&self, volume: Uuid) -> Result<Option<Fence>> {
        self.state.fence(volume).map_err(|error| Error::State(error.to_string()))
    }

    async fn record_volumes(&self) -> Result<()> {
        let records: Vec<_> = {
            let registry = self.registry.read();
            let left = registry.left.iter().filter(|record| !registry.volumes.contains_key(&record.uuid));
            registry.volumes.values().map(|slot| &slot.record).chain(left).cloned().collect()
        };
        self.recorded("volumes", self.state.put_volumes(&records).await)
    }

    pub(crate) fn recorded(&self, what: &str, result: std::io::Result<()>) -> Result<()> {
        let place = || self.state.path().join(what).display().to_string();
        result.map_err(|error| Error::device("write", place(), &error))
    }

    /// `claims` are looked at where the host knows nothing of this volume, and nobody gave it a uuid: served under a new one, a primary would lack what its
    /// own volume's journal holds.
    async fn open_volume(&self, record: &VolumeRecord, claims: &Claims, file: DiskFile) -> Result<(usize, VolumeInfo)> {
        let fence = self.fence(record.uuid)?;
        let beside_its_journal = match &fence {
            Some(fence) => self.shard_of_disk(fence.disk),
            None => self.find_journal(record).await?,
        };
        let shard = match beside_its_journal {
            Some(shard) => shard,
            None => self.roomiest_shard().await,
        };
        let record = record.clone();
        let undecided_reverts = self.state.undecided_reverts();
        let claims = if fence.is_none() { claims.clone() } else { Claims::new() };
        let opened = self.shards[shard].call(move |local, ring| async move {
            let primary = Disk::new(&ring, file);
            let identity = primary.identity().map_err(|e| Error::device("identify", record.path.display().to_string(), &e))?;
            if let Some((owner, disk)) = claims.get(&identity.id).filter(|(owner, _)| *owner != record.uuid) {
                return Err(Error::State(format!(
                    "{} is the primary of volume {owner}, whose journal on CDP disk {disk} holds acked writes that it lacks: serve it with uuid {owner}; \
                     or, if the number of its file or device ({}) is another one's by now, with a uuid of its own",
                    record.path.display(),
                    identity.id
                )));
            }
            let spec = VolumeSpec {
                id: record.uuid,
                name: record.name,
                path: record.path.display().to_string(),
                size: record.size,
                primary: Rc::new(primary.clone()),
                fence,
                accept: None,
                attach_journal: false,
                undecided_reverts,
            };
            local.open(&ring, spec, primary).await
        });
        opened.await.unwrap_or_else(|_| Err(stopping())).map(|info| (shard, info))
    }

    async fn close_on_shard(&self, shard: usize, volume: Uuid) -> Result<()> {
        let closed = self.shards[shard].call(move |local, _| async move { local.close(volume).await });
        closed.await.unwrap_or_else(|_| Err(stopping()))
    }

    fn shard_of_disk(&self, disk: Uuid) -> Option<usize> {
        self.registry.read().disks.iter().find(|slot| slot.id == Some(disk)).map(|slot| slot.shard)
    }

    /// The shard for a volume that has no journal here: that of the disk with most room, else the first.
    async fn roomiest_shard(&self) -> usize {
        let mut best = (0, 0);
        for (number, shard) in self.shards.iter().enumerate() {
            let disks = shard.call(|local, _| async move { local.engine.disks() }).await.unwrap_or_default();
            let unpromised = disks
                .iter()
                .filter(|disk| disk.online)
                .map(|disk| (disk.segments * disk.segment_size).saturating_sub(disk.reserved_bytes))
                .max();
            if let Some(bytes) = unpromised.filter(|bytes| *bytes > best.1) {
                best = (number, bytes);
            }
        }
        best.0
    }

    async fn open_volumes(&self, config: &Config, saved: &Saved, deadline: tokio::time::Instant) -> anyhow::Result<()> {
        let mut records = Vec::new();
        for volume in &config.volumes {
            let known = known_volume(&saved.volumes, &config.volumes, volume);
            let recorded_size = known.filter(|known| known.path == volume.path).map_or(0, |known| known.size);
            records.push(VolumeRecord {
                uuid: volume.uuid.or(known.map(|known| known.uuid)).unwrap_or_else(Uuid::new_v4),
                name: volume.name.clone(),
                path: volume.path.clone(),
                // What a resize has given the guest stays.
                size: volume.size.max(recorded_size),
                configured: true,
            });
        }
        for record in &saved.volumes {
            if records.iter().any(|other| other.uuid == record.uuid) {
                continue;
            }
            if record.configured {
                tracing::warn!(volume = record.name, uuid = %record.uuid, "it left the configuration and is not served");
                if saved.fences.get(&record.uuid).is_some_and(|fence| fence.state != FenceState::Detached) {
                    self.registry.write().left.push(record.clone());
                }
                continue;
            }
            if let Some(other) = records.iter().find(|other| other.name == record.name) {
                anyhow::bail!(
                    "volume {:?} was added with uuid {}, and the configuration has another one of that name (uuid {})",
                    record.name,
                    record.uuid,
                    other.uuid
                );
            }
            records.push(record.clone());
        }
        // High priority first; the sort keeps the order of equals.
        records.sort_by_key(|record| {
            let settings = saved.fences.get(&record.uuid).and_then(|fence| fence.settings);
            std::cmp::Reverse(settings.map(|settings| settings.priority).unwrap_or_default())
        });
        // Side by side: however many hang, the others wait for one of them.
        let identities = join_all(records.iter().map(|record| file_id(&record.path))).await;
        let files = {
            let (records, identities) = (&records, &identities);
            let open = move |number: usize| async move {
                let (record, identity) = (&records[number], identities[number]);
                self.check_unused(identity, &record.path, "path", false)?;
                // Of several with one primary the first has it.
                match identities[..number].iter().position(|other| other.is_some() && *other == identity) {
                    Some(first) => Err(primary_taken(&record.path, &records[first])),
                    None => open_patiently(&record.path, deadline).await.map_err(open_error),
                }
            };
            join_all((0..records.len()).map(open)).await
        };
        // Those that were served before are what they were: a device's number may be another's by now.
        let (claims, nobodys) = (claims(&saved.fences), Claims::new());
        for ((mut record, identity), file) in records.into_iter().zip(identities).zip(files) {
            self.events.name_volume(record.uuid, &record.name);
            let given = config.volumes.iter().any(|volume| volume.uuid == Some(record.uuid));
            let new = !given && !saved.volumes.iter().any(|known| known.uuid == record.uuid);
            let opened = match file {
                Ok(file) => self.open_volume(&record, if new { &claims } else { &nobodys }, file).await,
                Err(error) => Err(error),
            };
            let (shard, failed) = match opened {
                Ok((shard, info)) => {
                    record.size = info.size;
                    (shard, None)
                }
                Err(error) => {
                    let message = format!("volume {:?} cannot be served: {error}", record.name);
                    self.events.publish_now(EventKind::PrimaryFailing, Some(record.uuid), None, message);
                    (0, Some(error.to_string()))
                }
            };
            self.registry.write().volumes.insert(record.uuid, VolumeSlot { record, shard, identity, failed });
        }
        self.record_volumes().await.context("record the volumes")
    }

    // ---- CDP disks ----

    /// Makes a CDP disk of a device or file and takes it into use.
    pub async fn init_disk(&self, path: PathBuf, size: u64, options: InitOptions) -> Result<DiskStatus> {
        self.refuse_own(&path).await?;
        let _changing = self.changing.lock().await;
        if self.registry.read().disks.iter().any(|disk| disk.path == path && disk.failed.is_none()) {
            return Err(Error::Exists { what: "CDP disk", name: path.display().to_string() });
        }
        self.check_identity(&path, "path", true)?;
        prepare_disk_file(&path, size, options.force).await?;
        let file = open_file(&path).await?;
        // Recorded before it is one: a disk in use that the next start does not know of would cost the history on it.
        if let Err(error) = self.record_disks_with(Some(&path)).await {
            // What was written of it may be there all the same.
            let _ = self.record_disks_with(None).await;
            return Err(error);
        }
        let shard = self.shard_for_disk();
        let direct = file.io_mode() == "direct";
        let (shown, id) = (path.display().to_string(), Uuid::new_v4());
        let label = shown.clone();
        let opened = self.shards[shard].call(move |local, ring| async move {
            let device: Rc<dyn Device> = Rc::new(Disk::new(&ring, file));
            Engine::init_disk(Rc::clone(&device), options, id, wall_ns()).await?;
            local.engine.add_disk(device, label).await
        });
        let info = match opened.await.unwrap_or_else(|_| Err(stopping())) {
            Ok(info) => info,
            Err(error) => {
                if let Err(recorded) = self.record_disks_with(None).await {
                    tracing::warn!(%recorded, "a CDP disk that could not be made stays in the record, and the next start will say that it cannot be used");
                }
                return Err(error);
            }
        };
        let identity = FileId::of(&path);
        let slot = DiskSlot { path, configured: false, shard, identity, id: Some(info.id), direct, failed: None };
        {
            let mut registry = self.registry.write();
            registry.disks.retain(|disk| disk.path != slot.path);
            registry.disks.push(slot);
        }
        let message =
            format!("CDP disk {shown} taken into use: {} segments of {} bytes", info.segments, info.segment_size);
        self.events.publish_now(EventKind::DiskAdded, None, Some(shown), message);
        Ok(DiskStatus { info, direct })
    }

    /// The CDP disks, by path.
    pub async fn disks(&self) -> Vec<DiskStatus> {
        let mut infos = Vec::new();
        for shard in &self.shards {
            infos.extend(shard.call(|local, _| async move { local.engine.disks() }).await.unwrap_or_default());
        }
        let registry = self.registry.read();
        let mut disks: Vec<DiskStatus> = registry
            .disks
            .iter()
            .map(|slot| match infos.iter().find(|info| Some(info.id) == slot.id) {
                Some(info) => DiskStatus { info: info.clone(), direct: slot.direct },
                None => DiskStatus { info: absent_disk(slot), direct: false },
            })
            .collect();
        disks.sort_by(|a, b| a.info.path.cmp(&b.info.path));
        disks
    }

    /// Records the disks that are not configured, and one more that is about to be used.
    async fn record_disks_with(&self, new: Option<&Path>) -> Result<()> {
        let records: Vec<_> = {
            let registry = self.registry.read();
            let added = registry.disks.iter().filter(|slot| !slot.configured).map(|slot| slot.path.as_path());
            let known = added.filter(|path| Some(*path) != new);
            known.chain(new).map(|path| DiskRecord { path: path.to_owned() }).collect()
        };
        self.recorded("disks", self.state.put_disks(&records).await)
    }

    /// The shard with the fewest disks.
    fn shard_for_disk(&self) -> usize {
        let registry = self.registry.read();
        let count = |shard: &usize| registry.disks.iter().filter(|disk| disk.shard == *shard).count();
        (0..self.shards.len()).min_by_key(count).unwrap_or(0)
    }

    async fn open_disks(
        &self,
        config: &Config,
        added: &[DiskRecord],
        deadline: tokio::time::Instant,
    ) -> anyhow::Result<()> {
        let mut paths: Vec<(PathBuf, bool)> = config.disks.iter().map(|path| (path.clone(), true)).collect();
        let added = added.iter().map(|record| record.path.clone()).filter(|path| !config.disks.contains(path));
        paths.extend(added.map(|path| (path, false)));
        // Side by side: however many hang, the others wait for one of them.
        let identities = join_all(paths.iter().map(|(path, _)| file_id(path))).await;
        for (number, identity) in identities.iter().enumerate() {
            if identity.is_some() && identities[..number].contains(identity) {
                anyhow::bail!("CDP disk {}: it is given twice, under another path", paths[number].0.display());
            }
        }
        let files = join_all(paths.iter().map(|(path, _)| open_patiently(path, deadline))).await;
        for (((path, configured), identity), file) in paths.into_iter().zip(identities).zip(files) {
            let shard = self.shard_for_disk();
            let opened = match file {
                Ok(file) => {
                    let (label, direct) = (path.display().to_string(), file.io_mode() == "direct");
                    let added = self.shards[shard].call(move |local, ring| async move {
                        local.engine.add_disk(Rc::new(Disk::new(&ring, file)), label).await
                    });
                    added.await.unwrap_or_else(|_| Err(stopping())).map(|info| (info.id, direct))
                }
                // Its journal may have a writer already: two of them would destroy it.
                Err(error @ OpenError::Busy { .. }) => return Err(error).context("open the CDP disk"),
                Err(error) => Err(open_error(error)),
            };
            let (id, direct, failed) = match opened {
                Ok((id, direct)) => (Some(id), direct, None),
                Err(error) => {
                    let (shown, message) =
                        (path.display().to_string(), format!("the CDP disk cannot be used: {error}"));
                    self.events.publish_now(EventKind::Offline, None, Some(shown), message);
                    (None, false, Some(error.to_string()))
                }
            };
            self.registry.write().disks.push(DiskSlot { path, configured, shard, identity, id, direct, failed });
        }
        Ok(())
    }

    // ---- views ----

    pub(crate) async fn close_view_locked(&self, id: Uuid) -> Result<ViewStatus> {
        let record = self.registry.read().views.get(&id).map(|slot| slot.record.clone());
        let record = record.ok_or_else(|| Error::NotFound { what: "view", name: id.to_string() })?;
        let volume = record.volume;
        let shard = match self.shard_of(volume) {
            Ok(shard) => shard,
            // Its volume is not served: nothing runs of the view, and there is nothing to close but what is remembered of it.
            Err(error) => {
                self.registry.write().views.remove(&id);
                self.record_views().await?;
                let why = format!("its volume is not served: {error}");
                return Ok(ViewStatus { info: unserved_view(&record, why), record });
            }
        };
        let closed = shard.call(move |local, _| async move {
            let view = local.engine.view(id).ok_or_else(|| Error::NotFound { what: "view", name: id.to_string() })?;
            let info = view.info();
            drop(view);
            let volume = local.engine.volume(volume).ok_or_else(stopping)?;
            volume.close_view(id).await?;
            Ok(info)
        });
        let closed = closed.await.unwrap_or_else(|_| Err(stopping()));
        if matches!(closed, Ok(_) | Err(Error::NotFound { .. })) {
            self.registry.write().views.remove(&id);
            self.record_views().await?;
        }
        closed.map(|info| ViewStatus { info, record })
    }

    async fn record_views(&self) -> Result<()> {
        // One after the other, so that what was changed last is written last.
        let _recording = self.recording.lock().await;
        let records: Vec<_> = self.registry.read().views.values().map(|slot| slot.record.clone()).collect();
        self.recorded("views", self.state.put_views(&records).await)
    }

    async fn reopen_views(&self, records: Vec<ViewRecord>) -> anyhow::Result<()> {
        for record in records {
            let (id, volume, time) = (record.id, record.volume, Instant(record.time_ns));
            // What was made for its mount; where something is in it or on it, it stays.
            let unmade = record.mount.iter().filter(|mount| mount.made).map(|mount| mount.dir.clone()).next();
            let gone = || {
                if let Some(dir) = &unmade {
                    let _ = std::fs::remove_dir(dir);
                }
            };
            let lost = |why: String| {
                let message = format!("view {id} at {time} did not come back after the restart: {why}");
                self.events.publish_now(EventKind::ViewLost, Some(volume), None, message);
            };
            if record.temporary {
                gone();
                continue; // the call that it belonged to is gone
            }
            if record.expires_ns.is_some_and(|end| end <= wall_ns()) {
                let message = format!("view {id} at {time}: its time was over while the agent was not there");
                self.events.publish_now(EventKind::ViewExpired, Some(volume), None, message);
                gone();
                continue;
            }
            if record.writable {
                lost("it was writable, and its scratch ended with the agent".to_owned());
                gone();
                continue;
            }
            let name = record.snapshot_name.clone();
            let reopened = self
                .on_volume(volume, move |volume| async move { volume.reopen_view(id, time, &name).await.map(drop) })
                .await;
            match reopened {
                Ok(()) => {}
                // Its volume is not served now; it may be after the next start.
                Err(Error::State(why)) => tracing::warn!(view = %id, %volume, why, "the view waits for its volume"),
                Err(error) => {
                    lost(error.to_string());
                    gone();
                    continue;
                }
            }
            let shard = self.registry.read().volumes.get(&volume).map_or(0, |slot| slot.shard);
            self.registry.write().views.insert(id, ViewSlot { record, shard });
        }
        self.record_views().await.context("record the views")
    }

    /// Groups whose revert was not decided when the agent ended, and all of whose volumes have been recovered without it: they are told, and done with.
    async fn settle_reverts(&self) {
        // A group that is being reverted decides for itself.
        let _alone = self.reverting.lock().await;
        for (group, members) in self.state.undecided_members() {
            let mut open = false;
            for volume in &members {
                let known = self.registry.read().volumes.contains_key(volume);
                // One that is not served yet, or not here now with a journal that may come back, still has to be recovered without it.
                open |= match known {
                    // Nor is one settled that is on its way out of a CDP disk which failed since: cut off, it is recovered once more.
                    true => {
                        let asked =
                            self.on_volume(
                                *volume,
                                |volume| async move { Ok((volume.info().health, volume.is_leaving())) },
                            );
                        !matches!(asked.await, Ok((health, false)) if !matches!(health, Health::NeedsJournal | Health::PrimaryChanged))
                    }
                    false => {
                        !matches!(self.fence(*volume), Ok(fence) if fence.as_ref().is_none_or(|fence| fence.state == FenceState::Detached))
                    }
                };
            }
            if !open {
                let message = format!(
                    "the revert of {} volumes was cut off before it was decided: none of them was reverted",
                    members.len()
                );
                self.events.publish_now(EventKind::Recovered, members.first().copied(), None, message);
                self.state.decide_revert(group).await;
            }
        }
    }

    /// Reverts that are being copied.
    pub(crate) async fn pending_reverts(&self) -> Vec<(Uuid, cdp_journal::info::RevertProgress)> {
        let asked = self.shards.iter().map(|shard| {
            shard.call(|local, _| async move {
                let volumes = local.engine.volumes();
                volumes.iter().filter_map(|volume| Some((volume.id(), volume.revert_progress()?))).collect::<Vec<_>>()
            })
        });
        join_all(asked).await.into_iter().flatten().flatten().collect()
    }

    // ---- metrics, health, end ----

    /// Counters of all shards.
    pub async fn stats(&self) -> Vec<ShardStats> {
        let asked = self.shards.iter().map(|shard| {
            shard.call(|local, _| async move {
                let volumes = local.engine.volumes();
                let volumes =
                    volumes.iter().map(|volume| (volume.info(), volume.stats(), volume.views().len())).collect();
                let state_failing = local.engine.state_failing().is_some();
                ShardStats { volumes, disks: local.engine.disks(), state_failing }
            })
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// Heartbeats of the shards.
    pub fn heartbeats(&self) -> Vec<u64> {
        self.shards.iter().map(|shard| shard.heartbeat()).collect()
    }

    /// Says that the agent is about to stop. Can be said again.
    pub async fn will_stop(&self) {
        let told = self.shards.iter().map(|shard| shard.call(|local, _| async move { local.engine.will_stop() }));
        join_all(told).await;
    }

    /// Ends everything in order: clients are drained, engines record their clean state, threads end. A volume is closed as soon as its own clients are out: one whose
    /// disk hangs keeps none of the others from it, and is given up after a while.
    ///
    /// # Errors
    /// The first of what failed; the rest is stopped all the same.
    pub async fn stop(&self, grace: Duration) -> anyhow::Result<()> {
        self.will_stop().await;
        let patience_ns = u64::try_from((grace + CUT_GRACE).as_nanos()).unwrap_or(u64::MAX);
        let stopped = join_all(self.shards.iter().map(|shard| async move {
            let closed = shard.call(move |local, _| async move { local.engine.stop_after_clients(patience_ns).await });
            // The drain is asked for first: from then on nobody comes.
            let (cut, closed) = join(shard.drain(grace), closed).await;
            if let Some(clients) = cut.ok().filter(|cut| *cut > 0) {
                tracing::warn!(clients, "clients did not take their answers in time and were cut off");
            }
            closed.context("the shard ended early")?.with_context(|| format!("stop {}", shard.name()))
        }));
        let stopped: Vec<anyhow::Result<()>> = stopped.await;
        let ended = join_all(self.shards.iter().map(|shard| async move {
            let ended = tokio::time::timeout(SHARD_GRACE, shard.stop()).await;
            let ended = ended.with_context(|| format!("{} does not end", shard.name()))?;
            ended.with_context(|| format!("end {}", shard.name()))
        }));
        let ended: Vec<anyhow::Result<()>> = ended.await;
        stopped.into_iter().chain(ended).collect()
    }
}

impl ExportDirectory<Local> for Control {
    fn list(&self) -> BoxFuture<'_, Vec<ExportEntry>> {
        let registry = self.registry.read();
        let served = registry.volumes.values().filter(|slot| slot.failed.is_none());
        let mut entries: Vec<ExportEntry> = served
            .map(|slot| ExportEntry {
                kind: ExportKind::Volume,
                name: slot.record.name.clone(),
                description: format!("volume {}", slot.record.uuid),
            })
            .collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries.extend(registry.views.iter().map(|(id, slot)| {
            let volume = registry.volumes.get(&slot.record.volume).map_or("?", |volume| &volume.record.name);
            ExportEntry {
                kind: ExportKind::View,
                name: id.to_string(),
                description: format!("view of {volume} at {}", slot.record.time_ns),
            }
        }));
        async move { entries }.boxed()
    }

    fn find<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Option<ExportInfo<Local>>> {
        let found = {
            let registry = self.registry.read();
            let volume = |slot: &VolumeSlot| {
                let kind = ExportKind::Volume;
                (kind, slot.record.name.clone(), slot.record.uuid, slot.shard, "volume".to_owned())
            };
            let mut served = registry.volumes.values().filter(|slot| slot.failed.is_none());
            match (name, Uuid::parse_str(name)) {
                // The default export is the only volume, where there is just one.
                ("", _) => served.next().filter(|_| registry.volumes.len() == 1).map(volume),
                (_, Ok(id)) => served.find(|slot| slot.record.uuid == id).map(volume).or_else(|| {
                    let view = registry.views.get(&id)?;
                    let description = format!("view at {}", view.record.time_ns);
                    Some((ExportKind::View, id.to_string(), id, view.shard, description))
                }),
                (name, Err(_)) => served.find(|slot| slot.record.name == name).map(volume),
            }
        };
        async move {
            let (kind, name, key, shard, description) = found?;
            let shard = Arc::clone(&self.shards[shard]);
            let asked = shard.call(move |local, _| async move {
                local.export(key).map(|export| (export.size(), export.read_only()))
            });
            let (size, read_only) = asked.await.ok().flatten()?;
            Some(ExportInfo { kind, name, description, size, read_only, shard, key })
        }
        .boxed()
    }
}

fn health_word(health: Health) -> String {
    crate::grpc::convert::health(health).word()
}

fn still_leaving(name: &str) -> Error {
    Error::State(format!("volume {name:?} is still leaving its failed CDP disk: try again"))
}

pub(crate) fn stopping() -> Error {
    Error::Gone("the agent is stopping".to_owned())
}

/// What is remembered of a volume of the configuration: by its uuid, else by its name, else (it was renamed) by its path.
fn known_volume<'a>(
    saved: &'a [VolumeRecord],
    configured: &[VolumeConfig],
    volume: &VolumeConfig,
) -> Option<&'a VolumeRecord> {
    if let Some(uuid) = volume.uuid {
        return saved.iter().find(|record| record.uuid == uuid);
    }
    let named = saved.iter().filter(|record| record.name == volume.name).max_by_key(|record| record.configured);
    let anothers = |record: &VolumeRecord| {
        configured.iter().any(|other| other.name == record.name || other.uuid == Some(record.uuid))
    };
    named.or_else(|| saved.iter().find(|record| record.configured && record.path == volume.path && !anothers(record)))
}

fn unserved_view(record: &ViewRecord, why: String) -> ViewInfo {
    ViewInfo {
        id: record.id,
        volume: record.volume,
        time: Instant(record.time_ns),
        snapshot_name: record.snapshot_name.clone(),
        size: 0,
        writable: record.writable,
        scratch_bytes: 0,
        scratch_bytes_max: 0,
        opened_ns: record.opened_ns,
        clients: 0,
        lost: Some(why),
    }
}

fn absent_disk(slot: &DiskSlot) -> DiskInfo {
    DiskInfo {
        id: slot.id.unwrap_or_default(),
        path: slot.path.display().to_string(),
        size: 0,
        segment_size: 0,
        segments: 0,
        segments_free: 0,
        reserved_bytes: 0,
        online: false,
        error: slot.failed.clone().unwrap_or_else(|| "its shard has stopped".to_owned()),
        errors: 0,
    }
}

/// Does what may hang on a thread of its own, which nobody else needs. An error once it has taken [`OPEN_PATIENCE`]; what it answers after that is dropped.
async fn unless_hanging<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce(&Path) -> T + Send + 'static,
) -> std::result::Result<T, OpenError> {
    let (tell, told) = oneshot::channel();
    let place = path.to_owned();
    let thread = std::thread::Builder::new().name("cdp-open".to_owned()).spawn(move || {
        let _ = tell.send(work(&place)); // too late: a disk is closed again
    });
    thread.map_err(|source| OpenError::Io { path: path.to_owned(), op: "start a thread for", source })?;
    let done = tokio::time::timeout(OPEN_PATIENCE, told).await.map_err(|_| hanging(path))?;
    Ok(done.expect("opening a disk does not panic"))
}

fn hanging(path: &Path) -> OpenError {
    OpenError::Hangs { path: path.to_owned(), seconds: OPEN_PATIENCE.as_secs() }
}

/// What is at a path; `None` also where its file system hangs.
async fn file_id(path: &Path) -> Option<FileId> {
    unless_hanging(path, FileId::of).await.ok().flatten()
}

async fn open_disk_file(path: &Path) -> std::result::Result<DiskFile, OpenError> {
    unless_hanging(path, DiskFile::open).await?
}

/// Opens a disk; until the deadline, one that is in use is asked for again.
async fn open_patiently(path: &Path, deadline: tokio::time::Instant) -> std::result::Result<DiskFile, OpenError> {
    loop {
        match open_disk_file(path).await {
            Err(OpenError::Busy { .. }) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            opened => return opened,
        }
    }
}

fn primary_taken(path: &Path, owner: &VolumeRecord) -> Error {
    Error::Exists { what: "primary", name: format!("{} (primary of volume {:?})", path.display(), owner.name) }
}

async fn open_file(path: &Path) -> Result<DiskFile> {
    open_disk_file(path).await.map_err(open_error)
}

fn open_error(error: OpenError) -> Error {
    match error {
        OpenError::Io { path, source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::NotFound { what: "device or file", name: path.display().to_string() }
        }
        OpenError::Io { path, op, source } => Error::device(op, path.display().to_string(), &source),
        OpenError::Unsuitable { path, what } => {
            Error::invalid("path", path.display(), format!("it is {what}; a block device or a regular file is needed"))
        }
        other => Error::State(other.to_string()),
    }
}

/// Makes a sparse file where there is nothing; what is there stays as it is.
async fn create_sparse(path: &Path, size: u64) -> Result<()> {
    let path = path.to_owned();
    blocking(move || {
        let made = std::fs::OpenOptions::new().write(true).create_new(true).open(&path);
        let file = match made {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
            Err(error) => return Err(Error::device("create", path.display().to_string(), &error)),
        };
        let finish = || file.set_len(size).and_then(|()| file.sync_all()).and_then(|()| sync_parent(&path));
        finish().map_err(|error| {
            let _ = std::fs::remove_file(&path); // the error that counts is the other one
            Error::device("create", path.display().to_string(), &error)
        })
    })
    .await
}

/// Makes a CDP disk's file with all its room taken, or looks whether what is there may be overwritten.
async fn prepare_disk_file(path: &Path, size: u64, force: bool) -> Result<()> {
    let path = path.to_owned();
    blocking(move || {
        let shown = path.display().to_string();
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if size == 0 {
                    return Err(Error::invalid(
                        "size",
                        0,
                        format!("there is no {shown} yet: a file is made with the size given"),
                    ));
                }
                preallocate(&path, size)
            }
            Err(error) => Err(Error::device("look at", shown, &error)),
            // Opening such a one could wait for ever.
            Ok(found) if !found.is_file() && !found.file_type().is_block_device() => {
                Err(Error::invalid("path", shown, "a block device or a regular file"))
            }
            Ok(found) => {
                let is = signature::size(&path)
                    .map_err(|error| Error::device("ask for the size of", shown.clone(), &error))?;
                if size != 0 && size != is {
                    return Err(Error::invalid("size", size, format!("{shown} is there and has {is} bytes")));
                }
                let unread = |error: std::io::Error| Error::device("read", shown.clone(), &error);
                if !force && let Some(content) = signature::find(&path).map_err(unread)? {
                    return Err(Error::State(format!("{shown} holds {content}: use force to overwrite it")));
                }
                if found.is_file() { reserve(&path, is) } else { Ok(()) }
            }
        }
    })
    .await
}

fn preallocate(path: &Path, size: u64) -> Result<()> {
    let failed = |error: &std::io::Error| Error::device("create", path.display().to_string(), error);
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| failed(&error))?;
    drop(file);
    let made = reserve(path, size).and_then(|()| sync_parent(path).map_err(|error| failed(&error)));
    if made.is_err() {
        let _ = std::fs::remove_file(path); // the error that counts is the other one
    }
    made
}

/// Takes a file's room now, so that a full file system cannot stop the journal later.
fn reserve(path: &Path, size: u64) -> Result<()> {
    let failed = |error: std::io::Error| match error.raw_os_error() {
        Some(libc::ENOSPC) => Error::NoSpace { what: "file of the CDP disk", needed: size, free: 0 },
        _ => Error::device("take the room of", path.display().to_string(), &error),
    };
    let length = i64::try_from(size).map_err(|_| Error::invalid("size", size, "at most 2^63 - 1 bytes"))?;
    let file = std::fs::OpenOptions::new().write(true).open(path).map_err(failed)?;
    match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, length) {
        Ok(()) => {}
        Err(nix::errno::Errno::EOPNOTSUPP) => {
            tracing::warn!(path = %path.display(), "its file system cannot reserve room: a full one will stop the journal");
            if file.metadata().map_err(failed)?.len() < size {
                file.set_len(size).map_err(failed)?;
            }
        }
        Err(error) => return Err(failed(error.into())),
    }
    file.sync_all().map_err(failed)
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

fn nbd_devices(config: &Config) -> Option<Arc<NbdDevices>> {
    let socket = config.nbd.unix.as_ref().filter(|_| config.attach == Attach::Nbd)?;
    Some(Arc::new(NbdDevices::new(socket.path.clone())))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(stopping()))
}
