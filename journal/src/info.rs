//! What the engine tells about itself: plain data, `Send`, for the control plane, the metrics and the simulator.

use uuid::Uuid;

use crate::types::Instant;

/// A volume's CDP settings (`edit`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of CDP disk that the volume may occupy.
    pub reserve_capacity: u64,
    /// Seconds of history to keep.
    pub reserve_duration_s: u64,
    /// Order at recovery, weight on a shared CDP disk.
    pub priority: Priority,
}

/// `cdp_priority`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Priority {
    /// `low`
    Low,
    /// `mid`
    #[default]
    Mid,
    /// `high`
    High,
}

/// The user's switch (`cdp_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CdpState {
    /// Every write is kept as history.
    On,
    /// Switched off by the user, or never switched on.
    Off,
}

/// How protection is doing, apart from the user's switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// As it should be.
    Ok,
    /// The CDP disk failed; the volume goes on unprotected.
    Offline,
    /// The CDP disk is missing and may hold acked writes: the volume is not served.
    NeedsJournal,
    /// Somebody wrote to the primary past the agent: no redo, no old history, until the admin decides.
    PrimaryChanged,
    /// The CDP disk was lost with a revert pending: some blocks read as errors.
    RevertIncomplete,
    /// The primary fails writes or syncs; the backlog grows and is written again.
    PrimaryFailing,
    /// The state directory takes nothing: the volume's writes wait until it does.
    StateFailing,
}

/// One log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogInfo {
    /// Sequence number, never used twice for a volume.
    pub seq: u64,
    /// First instant.
    pub start: Instant,
    /// Last instant, once closed.
    pub end: Option<Instant>,
    /// Bytes of its segments.
    pub use_bytes: u64,
    /// Bytes of charge at which it rotates.
    pub capacity_bytes: u64,
    /// Instant of its first write (0: none).
    pub io_start: Instant,
    /// Instant of its last write (0: none).
    pub io_last: Instant,
    /// Its writes are gone; its start can still be viewed.
    pub thin: bool,
    /// Its instants can be viewed (not so while CDP was disabled).
    pub recording: bool,
    /// Closed and all on the primary.
    pub sealed: bool,
    /// The disk is there and healthy.
    pub online: bool,
    /// Path of the CDP disk.
    pub disk_path: String,
    /// Bytes of before-images among `use_bytes` (approximate: whole segments).
    pub before_image_bytes: u64,
}

/// What a marker says of the guest's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkerKind {
    /// As after pulling the plug.
    Crash,
    /// Taken at a flush with no write in flight.
    Flush,
    /// The guest was quiesced.
    Application,
}

/// A named instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    /// Name, unique in the volume.
    pub name: String,
    /// The instant.
    pub time: Instant,
    /// What it says of the guest's state.
    pub kind: MarkerKind,
    /// Made by the agent.
    pub auto: bool,
}

/// An interval of history that can be viewed, both ends included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    /// First instant.
    pub start: Instant,
    /// Last instant; `None`: up to now.
    pub end: Option<Instant>,
    /// Why it ends (empty for the one that goes on).
    pub end_reason: String,
}

/// How far a pending revert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevertProgress {
    /// When it was made.
    pub instant: Instant,
    /// What it went back to.
    pub target: Instant,
    /// Blocks to copy in total.
    pub blocks_total: u64,
    /// Blocks copied so far.
    pub blocks_done: u64,
}

/// A revert that is part of the history. The instant just before it undoes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevertPoint {
    /// When it was made.
    pub instant: Instant,
    /// What it went back to; `None`: the log that tells was thinned out.
    pub target: Option<Instant>,
}

/// The flush-clean instants next to an instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushNear {
    /// The newest one at or before it.
    pub before: Option<Instant>,
    /// The oldest one after it.
    pub after: Option<Instant>,
}

/// Kinds of [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// The guest wrote.
    Write,
    /// The guest zeroed.
    Zero,
    /// A revert.
    Revert,
}

/// One step of a volume's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// When.
    pub instant: Instant,
    /// What.
    pub kind: ChangeKind,
    /// First byte; 0 for a revert.
    pub offset: u64,
    /// Bytes; 0 for a revert.
    pub len: u64,
}

/// What `changes` answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeList {
    /// Changes in the span.
    pub total: u64,
    /// Those that were asked for, by instant.
    pub changes: Vec<Change>,
}

/// What `revert --dry-run` and `revert` answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevertReport {
    /// Instant of the revert (for a dry run: now). The instant just before it undoes the revert.
    pub instant: Instant,
    /// What it went back to.
    pub target: Instant,
    /// Blocks that change (an upper bound: touched since the target).
    pub blocks: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Bytes of CDP disk that it needs.
    pub needed_bytes: u64,
    /// Bytes of CDP disk that the volume can have for it (older logs evicted).
    pub available_bytes: u64,
}

/// A view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewInfo {
    /// Its id, which is its NBD export name too.
    pub id: Uuid,
    /// Of which volume.
    pub volume: Uuid,
    /// The instant it shows.
    pub time: Instant,
    /// The marker it was opened by; empty when by instant.
    pub snapshot_name: String,
    /// Bytes: the volume's size at that instant.
    pub size: u64,
    /// Writes go to a scratch overlay.
    pub writable: bool,
    /// Bytes of scratch in use.
    pub scratch_bytes: u64,
    /// Most bytes of scratch.
    pub scratch_bytes_max: u64,
    /// When it was opened (wall clock, nanoseconds).
    pub opened_ns: u64,
    /// Clients that have it open.
    pub clients: u32,
    /// Why reads fail, when they do.
    pub lost: Option<String>,
}

/// All about one volume.
#[derive(Clone, Debug)]
pub struct VolumeInfo {
    /// Its uuid.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Bytes that the primary has now (larger: `volume resize` offers them).
    pub primary_size: u64,
    /// Path of the primary.
    pub path: String,
    /// CDP settings; `None`: it has no CDP.
    pub settings: Option<Settings>,
    /// The user's switch.
    pub state: CdpState,
    /// Health.
    pub health: Health,
    /// Why, when not `Ok`.
    pub health_reason: String,
    /// When CDP was created, nanoseconds of the wall clock (0: no CDP).
    pub cdp_create_time_ns: u64,
    /// Logs, oldest to newest, thin and disabled ones included.
    pub logs: Vec<LogInfo>,
    /// Markers by instant.
    pub markers: Vec<Marker>,
    /// Intervals that can be viewed.
    pub coverage: Vec<Interval>,
    /// Bytes of CDP disk in use, of all kinds.
    pub used_bytes: u64,
    /// Acked bytes that are not on the primary yet.
    pub backlog_bytes: u64,
    /// The pending revert.
    pub revert: Option<RevertProgress>,
    /// Refuses clients until `release`.
    pub held: bool,
    /// Clients that have it open for writing.
    pub clients: u32,
    /// Seconds of history at the current rate before capacity evicts (0: not known).
    pub window_forecast_s: u64,
    /// An instant after every write acked so far.
    pub now: Instant,
}

/// What a density query answers (`timeline`).
#[derive(Clone, Debug, Default)]
pub struct TimelineBucket {
    /// First instant of the bucket.
    pub start: Instant,
    /// Blocks written in it: a write of 64 KiB counts 16.
    pub blocks: u64,
    /// Bytes written in it.
    pub bytes: u64,
    /// Flush points in it.
    pub flushes: u64,
    /// Those of them with no write in flight.
    pub flushes_clean: u64,
}

/// A CDP disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Its id from the superblock.
    pub id: Uuid,
    /// Path.
    pub path: String,
    /// Bytes in total.
    pub size: u64,
    /// Bytes of a segment.
    pub segment_size: u64,
    /// Segments in total.
    pub segments: u64,
    /// Segments free.
    pub segments_free: u64,
    /// Bytes promised to volumes by `reserve_capacity`.
    pub reserved_bytes: u64,
    /// Healthy.
    pub online: bool,
    /// Why not.
    pub error: String,
    /// I/O errors seen.
    pub errors: u64,
}

/// Latency histogram: bucket `i` counts durations in `[2^i, 2^(i+1))` nanoseconds; the sum is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Counts by power of two.
    pub buckets: [u64; 40],
    /// Sum of all durations, nanoseconds.
    pub sum_ns: u64,
    /// Number of durations.
    pub count: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; 40], sum_ns: 0, count: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, ns: u64) {
        let bucket = (63 - ns.max(1).leading_zeros() as usize).min(39);
        self.buckets[bucket] += 1;
        self.sum_ns += ns;
        self.count += 1;
    }
}

/// Counters of one volume since start. Plain numbers on the shard's thread: no atomics, no locks.
#[derive(Clone, Copy, Debug, Default)]
pub struct VolumeStats {
    /// Reads served.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes acked.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Write-zeroes requests acked.
    pub zeroes: u64,
    /// Discard requests acked.
    pub discards: u64,
    /// Flushes acked.
    pub flushes: u64,
    /// Requests that ended in an error.
    pub errors: u64,
    /// Bytes of frames appended to the CDP disk for guest writes (headers and padding included).
    pub journal_bytes: u64,
    /// Bytes written there besides for the index of these: of each full segment with its footer, and the merged one of a log that is sealed. Not in it, since
    /// they are the CDP disk's: the table of its segments, a page for each segment that is taken or given back, and its clock.
    pub index_bytes: u64,
    /// Bytes of frames appended for before-images.
    pub before_image_bytes: u64,
    /// Bytes written besides for their index.
    pub before_index_bytes: u64,
    /// Bytes written to the primary by the destager.
    pub destaged_bytes: u64,
    /// Times that a request waited for room (backlog, capacity).
    pub throttled: u64,
    /// Logs evicted for capacity.
    pub evicted_capacity: u64,
    /// Logs evicted for age.
    pub evicted_duration: u64,
    /// Time from admission to ack of writes.
    pub write_latency: Histogram,
    /// Time from admission to the frame's submission.
    pub queue_latency: Histogram,
    /// Time of a frame's append.
    pub append_latency: Histogram,
    /// Time of a sync of the CDP disk.
    pub sync_latency: Histogram,
    /// Time of reads.
    pub read_latency: Histogram,
    /// Time of one destage batch.
    pub destage_latency: Histogram,
}

/// A state change worth telling (`WatchEvents`).
#[derive(Clone, Debug)]
pub struct Event {
    /// Wall clock, nanoseconds.
    pub time_ns: u64,
    /// About which volume.
    pub volume: Option<Uuid>,
    /// About which CDP disk (path).
    pub disk: Option<String>,
    /// What.
    pub kind: EventKind,
    /// In words.
    pub message: String,
}

/// Kinds of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Protection is on.
    Protected,
    /// Protection went off because of an error.
    Offline,
    /// The user switched CDP on.
    Enabled,
    /// The user switched CDP off.
    Disabled,
    /// Settings changed.
    Edited,
    /// A log went for capacity before `reserve_duration`.
    EvictedEarly,
    /// A log went by age.
    Evicted,
    /// The history window at the current rate is shorter than `reserve_duration`.
    WindowShort,
    /// A view was opened.
    ViewOpened,
    /// A view was closed.
    ViewClosed,
    /// A view lost its log, or its scratch.
    ViewLost,
    /// The backlog reached its bound: acks run at the destager's pace.
    BacklogFull,
    /// The backlog fell below half of its bound again.
    BacklogDrained,
    /// The clock runs ahead of the wall clock.
    ClockLead,
    /// The wall clock stepped; eviction by age is paused.
    ClockStep,
    /// A revert was made.
    Reverted,
    /// A revert's copying is done.
    RevertDone,
    /// A revert's source was lost.
    RevertIncomplete,
    /// The primary fails.
    PrimaryFailing,
    /// The primary works again.
    PrimaryRecovered,
    /// Somebody wrote to the primary past the agent.
    PrimaryChanged,
    /// The primary has another size than the guest sees.
    PrimaryResized,
    /// A CDP disk is needed to serve the volume.
    NeedsJournal,
    /// Recovery is done.
    Recovered,
    /// History was cleaned.
    Cleaned,
    /// A marker was made by a user.
    Marked,
    /// Damage was found on a disk.
    Damage,
    /// The state directory has taken nothing for longer than a guest waits for any disk: writes wait for it.
    StateFailing,
    /// The state directory works again.
    StateRecovered,
}
