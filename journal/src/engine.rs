//! The engine's front door (skeleton: signatures only; the bodies are being written).
#![allow(unused_variables, clippy::todo, missing_docs)]
use crate::buf::{IoBuf, Slice};
use crate::clock::HostClock;
use crate::error::Result;
use crate::fence::Fence;
use crate::host::{Allocation, Device, Host, LocalFuture, StateStore};
use crate::info::*;
use crate::types::Instant;
use std::rc::Rc;
use std::sync::Arc;
use uuid::Uuid;

/// Bounds and defaults of an engine (one per shard).
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most bytes acked and not destaged, per volume.
    pub backlog_bytes_max: u64,
    /// Longest time that a guest request waits for any CDP-disk operation, nanoseconds.
    pub stall_max_ns: u64,
    /// Time between automatic markers, seconds.
    pub marker_interval_s: u64,
    /// Settings that `enable` gives to a volume that has none.
    pub default_settings: Settings,
    /// The sum of reservations may exceed the disk.
    pub overcommit: bool,
    /// A flush waits for the primary too (`durability = "both"`).
    pub flush_primary: bool,
    /// Bytes of cached index pages.
    pub index_cache_bytes: u64,
    /// Most bytes of scratch of a writable view.
    pub scratch_bytes_max: u64,
    /// Most views of a volume.
    pub views_max: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            backlog_bytes_max: 64 << 20,
            stall_max_ns: 5_000_000_000,
            marker_interval_s: 60,
            default_settings: Settings {
                reserve_capacity: 30 << 30,
                reserve_duration_s: 86400,
                priority: Priority::Mid,
            },
            overcommit: false,
            flush_primary: false,
            index_cache_bytes: 64 << 20,
            scratch_bytes_max: 1 << 30,
            views_max: 64,
        }
    }
}

/// What a new CDP disk is to be.
#[derive(Clone, Copy, Debug)]
pub struct InitOptions {
    /// Bytes of a segment: a power of two, 1 MiB to 256 MiB. 0: chosen by the disk's size.
    pub segment_size: u64,
    /// Overwrite a superblock that is there.
    pub force: bool,
}

/// A volume to be served.
pub struct VolumeSpec {
    pub id: Uuid,
    pub name: String,
    /// Path, for people.
    pub path: String,
    /// Bytes the guest sees; 0: the primary's size rounded down to a sector.
    pub size: u64,
    pub primary: Rc<dyn Device>,
    /// What the state directory says.
    pub fence: Option<Fence>,
    /// The admin's named override of `needs_journal`, `primary_changed` or `revert_incomplete`: go on with the primary as it is; the journal
    /// of the fence's generation is never redone.
    pub override_journal: bool,
}

/// What `revert` is asked for.
#[derive(Clone, Copy, Debug)]
pub struct RevertRequest {
    pub target: Instant,
    /// Disconnect clients and hold the export until `release`.
    pub force: bool,
    /// Release the export at once.
    pub release: bool,
    /// Change nothing, only report.
    pub dry_run: bool,
    /// The group's id and all member volumes; a lone revert has none.
    pub group: Option<(Uuid, u32)>,
}

/// One shard's CDP disks and volumes.
pub struct Engine {}

impl Engine {
    /// `events` is called on the engine's thread for each state change and must not block.
    pub fn new(
        host: Rc<dyn Host>,
        clock: Arc<HostClock>,
        store: Rc<dyn StateStore>,
        config: EngineConfig,
        events: Box<dyn Fn(Event)>,
    ) -> Rc<Engine> {
        todo!()
    }
    /// Writes an empty superblock and segment table. Needs no engine.
    pub async fn init_disk(device: Rc<dyn Device>, options: InitOptions, id: Uuid) -> Result<()> {
        todo!()
    }
    /// Opens a CDP disk; `path` is for people. The clock is raised past the disk's high-water mark.
    pub async fn add_disk(self: &Rc<Self>, device: Rc<dyn Device>, path: String) -> Result<DiskInfo> {
        todo!()
    }
    pub fn disks(&self) -> Vec<DiskInfo> {
        todo!()
    }
    /// Recovers a volume (whatever its last stop was) and serves it. With a state that forbids serving (`NeedsJournal`…) it answers Ok and the volume's
    /// `health` says so; its I/O is refused.
    pub async fn open_volume(self: &Rc<Self>, spec: VolumeSpec) -> Result<Rc<Volume>> {
        todo!()
    }
    /// Stops one volume: drains, records the clean state, forgets it. Its history stays on the CDP disk.
    pub async fn close_volume(self: &Rc<Self>, id: Uuid) -> Result<()> {
        todo!()
    }
    pub fn volume(&self, id: Uuid) -> Option<Rc<Volume>> {
        todo!()
    }
    pub fn volumes(&self) -> Vec<Rc<Volume>> {
        todo!()
    }
    pub fn view(&self, id: Uuid) -> Option<Rc<View>> {
        todo!()
    }
    /// Drains everything and records the clean state.
    pub async fn stop(self: &Rc<Self>) -> Result<()> {
        todo!()
    }
}

/// Block status of a piece, for `base:allocation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    pub len: u64,
    pub hole: bool,
    pub zero: bool,
}

/// What a frontend serves: a volume or a view. Offsets and lengths are bytes, multiples of 512, inside `size` (the frontend has checked
/// them against the protocol; the export checks again and answers [`crate::Error::Invalid`]). Dropping a future does not cancel the request.
pub trait Export {
    /// Bytes.
    fn size(&self) -> u64;
    fn read_only(&self) -> bool;
    /// Reads `len` bytes: parts in order, that together are exactly `len` bytes (so that overlay hits need no copy).
    fn read(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<Vec<Slice>>>;
    /// Writes `len` bytes found in `data` from byte `offset % 4096` on: the frontend receives the payload into a buffer with the same alignment as on
    /// disk, so that the engine need not copy (`data.len() >= offset % 4096 + len`, rounded up to 4096). See [`payload_buf`].
    fn write(&self, offset: u64, len: u32, data: IoBuf, fua: bool) -> LocalFuture<'static, Result<()>>;
    fn write_zeroes(&self, offset: u64, len: u32, no_hole: bool, fua: bool) -> LocalFuture<'static, Result<()>>;
    fn trim(&self, offset: u64, len: u32) -> LocalFuture<'static, Result<()>>;
    fn flush(&self) -> LocalFuture<'static, Result<()>>;
    fn status(&self, offset: u64, len: u64) -> LocalFuture<'static, Result<Vec<BlockStatus>>>;
    /// A client opens the export. Refused with [`crate::Error::State`] while the export is held (after a forced revert) or not served.
    /// `on_disconnect` is called (once, on the shard's thread) when the engine wants the client gone: forced revert, view closed or lost, volume removed.
    fn connect(&self, writable: bool, on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard>;
}

/// A client's hold on an export; dropping it says that the client is gone.
pub struct ClientGuard {}

/// A buffer for a write of `len` bytes at `offset`: whole 4 KiB blocks; the payload belongs at byte `offset % 4096`.
pub fn payload_buf(offset: u64, len: u32) -> IoBuf {
    let head = (offset % 4096) as usize;
    IoBuf::for_overwrite((head + len as usize).next_multiple_of(4096))
}

/// A volume: serves as [`Export`] and takes the admin's calls. Make the export with `Rc<Volume>` (the trait is implemented for it).
pub struct Volume {}

impl Volume {
    pub fn id(&self) -> Uuid {
        todo!()
    }
    pub fn name(&self) -> String {
        todo!()
    }
    pub fn export(self: &Rc<Self>) -> Rc<dyn Export> {
        todo!()
    }
    pub fn info(self: &Rc<Self>) -> VolumeInfo {
        todo!()
    }
    pub fn stats(&self) -> VolumeStats {
        todo!()
    }
    /// Creates the settings in state `off` where there are none.
    pub async fn edit(self: &Rc<Self>, settings: Settings) -> Result<()> {
        todo!()
    }
    pub async fn enable(self: &Rc<Self>) -> Result<()> {
        todo!()
    }
    pub async fn disable(self: &Rc<Self>) -> Result<()> {
        todo!()
    }
    /// Appends a marker for `instant` (taken from the host's clock by the caller, so that several volumes can share it). An empty name makes an automatic one.
    pub async fn mark(self: &Rc<Self>, name: &str, kind: MarkerKind, instant: Instant) -> Result<Marker> {
        todo!()
    }
    /// Finds a marker.
    pub fn marker(&self, name: &str) -> Option<Marker> {
        todo!()
    }
    /// Idempotent per instant and kind: the same view is answered again.
    pub async fn open_view(self: &Rc<Self>, time: Instant, snapshot_name: &str, writable: bool) -> Result<Rc<View>> {
        todo!()
    }
    /// As it was opened before a restart, under its old id.
    pub async fn reopen_view(self: &Rc<Self>, id: Uuid, time: Instant, snapshot_name: &str) -> Result<Rc<View>> {
        todo!()
    }
    pub fn views(&self) -> Vec<ViewInfo> {
        todo!()
    }
    pub async fn close_view(self: &Rc<Self>, id: Uuid) -> Result<()> {
        todo!()
    }
    pub async fn revert(self: &Rc<Self>, request: RevertRequest) -> Result<RevertReport> {
        todo!()
    }
    /// Ends when no revert is pending.
    pub async fn revert_done(self: &Rc<Self>) -> Result<()> {
        todo!()
    }
    /// Lets clients in again after a forced revert.
    pub async fn release(self: &Rc<Self>) -> Result<()> {
        todo!()
    }
    /// `None`: all history and the settings; otherwise exactly that log.
    pub async fn clean(self: &Rc<Self>, seq: Option<u64>) -> Result<()> {
        todo!()
    }
    /// Offers the primary's grown size (or `size` bytes of it) to the guest. Shrinking is refused.
    pub async fn resize(self: &Rc<Self>, size: Option<u64>) -> Result<u64> {
        todo!()
    }
    /// Write density between two instants in `buckets` equal pieces.
    pub async fn timeline(self: &Rc<Self>, from: Instant, to: Instant, buckets: u32) -> Result<Vec<TimelineBucket>> {
        todo!()
    }
}

/// A view: serves as [`Export`].
pub struct View {}

impl View {
    pub fn id(&self) -> Uuid {
        todo!()
    }
    pub fn info(&self) -> ViewInfo {
        todo!()
    }
    pub fn export(self: &Rc<Self>) -> Rc<dyn Export> {
        todo!()
    }
}
