//! Requests, checked once at the door: what is past here is valid in itself.

use std::path::PathBuf;
use std::time::Duration;

use cdp_journal::info::{Health, MarkerKind, Priority, Settings};
use cdp_journal::{Error, Result};
use cdp_proto::parse::{self, InputError};
use cdp_proto::v1;
use uuid::Uuid;

use crate::config::{check_settings, priority};
use crate::control::NewVolume;
use crate::events::EVENTS_MAX;

/// Most guests that are frozen for one mark.
const QUIESCE_MAX: usize = 64;
/// Longest time that a guest stays frozen, where none is given.
const QUIESCE_MS_DEFAULT: u32 = 2000;
/// Most volumes of one call.
const VOLUMES_MAX: usize = 1024;
/// Most changes of one answer.
const CHANGES_MAX: u32 = 10_000;
const WAIT_INTERVAL_MS_DEFAULT: u32 = 200;
/// Longest life of a view that has an end: ten years.
const VIEW_TTL_S_MAX: u64 = 10 * 365 * 86400;
/// Most bytes of a view's owner.
const OWNER_BYTES_MAX: usize = 255;

/// What `Edit` changes; the rest stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    capacity: Option<u64>,
    duration_s: Option<u64>,
    priority: Option<Priority>,
}

impl Edit {
    /// The settings after the change.
    pub fn apply(&self, before: Settings) -> Settings {
        Settings {
            reserve_capacity: self.capacity.unwrap_or(before.reserve_capacity),
            reserve_duration_s: self.duration_s.unwrap_or(before.reserve_duration_s),
            priority: self.priority.unwrap_or(before.priority),
        }
    }
}

impl TryFrom<&v1::EditRequest> for Edit {
    type Error = Error;

    fn try_from(wire: &v1::EditRequest) -> Result<Self> {
        let word = wire.cdp_priority.as_deref();
        let priority = word
            .map(|word| {
                priority(word).ok_or_else(|| Error::invalid("cdp_priority", format!("{word:?}"), "low, mid or high"))
            })
            .transpose()?;
        let edit = Self { capacity: wire.reserve_capacity, duration_s: wire.reserve_duration, priority };
        if edit == (Self { capacity: None, duration_s: None, priority: None }) {
            let bound = "give reserve_capacity, reserve_duration or cdp_priority";
            return Err(Error::invalid("settings", "none", bound));
        }
        // What is not given is replaced by something that is right, so that only what is given is judged.
        check_settings(&edit.apply(Settings { reserve_capacity: 1, reserve_duration_s: 1, priority: Priority::Mid }))?;
        Ok(edit)
    }
}

/// What a marker is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Empty: an automatic one.
    pub name: String,
    /// What it says of the guest's state.
    pub kind: MarkerKind,
    /// Guests to quiesce.
    pub quiesce: Vec<PathBuf>,
    /// Longest time that they stay frozen.
    pub frozen_max: Duration,
}

impl TryFrom<&v1::MarkRequest> for Mark {
    type Error = Error;

    fn try_from(wire: &v1::MarkRequest) -> Result<Self> {
        if !wire.name.is_empty() {
            parse::marker_name(&wire.name).map_err(|error| invalid("name", error))?;
        }
        let kind = match v1::MarkerKind::try_from(wire.kind) {
            Ok(v1::MarkerKind::Unspecified | v1::MarkerKind::Crash) => MarkerKind::Crash,
            Ok(v1::MarkerKind::Application) => MarkerKind::Application,
            Ok(v1::MarkerKind::Flush) => {
                return Err(Error::invalid("kind", "FLUSH", "CRASH or APPLICATION: the agent sets FLUSH itself"));
            }
            Err(_) => return Err(Error::invalid("kind", wire.kind, "CRASH or APPLICATION")),
        };
        let quiesce = wire.quiesce.iter().map(|text| quiesce_path(text)).collect::<Result<Vec<_>>>()?;
        if quiesce.len() > QUIESCE_MAX {
            return Err(Error::invalid(
                "quiesce",
                format!("{} guests", quiesce.len()),
                format!("at most {QUIESCE_MAX}"),
            ));
        }
        if (1..quiesce.len()).any(|at| quiesce[..at].contains(&quiesce[at])) {
            return Err(Error::invalid("quiesce", format!("{:?}", wire.quiesce), "each guest once"));
        }
        let frozen_max = match wire.quiesce_ms {
            0 => QUIESCE_MS_DEFAULT,
            100..=60_000 => wire.quiesce_ms,
            other => return Err(Error::invalid("quiesce_ms", other, "0, or 100 to 60000")),
        };
        let kind = if quiesce.is_empty() { kind } else { MarkerKind::Application };
        Ok(Self { name: wire.name.clone(), kind, quiesce, frozen_max: Duration::from_millis(frozen_max.into()) })
    }
}

fn quiesce_path(text: &str) -> Result<PathBuf> {
    let path = text.strip_prefix("qga:").filter(|path| path.starts_with('/') && !path.contains('\0'));
    let path = path.filter(|path| path.len() <= 107);
    let bound = "qga: and the absolute path of a socket, at most 107 bytes";
    path.map(PathBuf::from).ok_or_else(|| Error::invalid("quiesce", format!("{text:?}"), bound))
}

/// An instant as a request gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// Exactly.
    Time(u64),
    /// That of a marker.
    Marker(String),
    /// Exactly, and not before a marker.
    NotBefore(String, u64),
    /// So many nanoseconds ago.
    Ago(u64),
    /// The newest flush-clean instant at or before another.
    FlushBefore(Box<At>),
}

impl At {
    fn new(snapshot_name: &str, timestamp: u64, ago_ns: Option<u64>) -> Result<Self> {
        match (snapshot_name, timestamp, ago_ns) {
            ("", 0, None) => Err(Error::invalid("timestamp", 0, "give timestamp, snapshot_name or ago_ns")),
            ("", 0, Some(ago)) => Ok(Self::Ago(ago)),
            (_, _, Some(ago)) => Err(Error::invalid("ago_ns", ago, "not together with timestamp or snapshot_name")),
            ("", time, None) => Ok(Self::Time(time)),
            (name, 0, None) => Ok(Self::Marker(name.to_owned())),
            (name, time, None) => Ok(Self::NotBefore(name.to_owned(), time)),
        }
    }

    /// The same, or the flush-clean instant before it.
    fn with(self, flush_before: bool) -> Self {
        if flush_before { Self::FlushBefore(Box::new(self)) } else { self }
    }
}

/// What `View` is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Close it, not open it.
    pub off: bool,
    /// When.
    pub at: At,
    /// Onto scratch.
    pub writable: bool,
    /// It ends after so long.
    pub ttl: Option<std::time::Duration>,
    /// Whose it is; empty: not said.
    pub owner: String,
    /// Where it is to be mounted.
    pub mount: Option<PathBuf>,
    /// Which partition.
    pub partition: Option<u32>,
}

impl TryFrom<&v1::ViewRequest> for View {
    type Error = Error;

    fn try_from(wire: &v1::ViewRequest) -> Result<Self> {
        let off = match wire.op.as_str() {
            "" | "on" => false,
            "off" => true,
            op => return Err(Error::invalid("op", format!("{op:?}"), "\"on\" or \"off\"")),
        };
        let at = At::new(&wire.snapshot_name, wire.timestamp, wire.ago_ns)?;
        if let (true, At::Ago(ago)) = (off, &at) {
            return Err(Error::invalid(
                "ago_ns",
                ago,
                "not with op \"off\": name the view by timestamp or snapshot_name",
            ));
        }
        if wire.ttl_s > VIEW_TTL_S_MAX {
            return Err(Error::invalid("ttl_s", wire.ttl_s, format!("at most {VIEW_TTL_S_MAX}")));
        }
        let ttl = Some(wire.ttl_s).filter(|ttl| *ttl > 0).map(std::time::Duration::from_secs);
        let mount = match wire.mount.as_str() {
            "" => None,
            path => Some(mount_dir(path)?),
        };
        if let (None, Some(partition)) = (&mount, wire.partition) {
            return Err(Error::invalid("partition", partition, "only together with mount"));
        }
        if off && wire.flush_before {
            return Err(Error::invalid("flush_before", true, "not with op \"off\": name the view by its own instant"));
        }
        let (writable, partition, at) = (wire.writable, wire.partition, at.with(wire.flush_before));
        Ok(Self { off, at, writable, ttl, owner: owner(&wire.owner)?, mount, partition })
    }
}

impl TryFrom<&v1::UseViewRequest> for At {
    type Error = Error;

    fn try_from(wire: &v1::UseViewRequest) -> Result<Self> {
        if let (true, Some(partition)) = (wire.unmounted, wire.partition) {
            return Err(Error::invalid("partition", partition, "not together with unmounted"));
        }
        Ok(Self::new(&wire.snapshot_name, wire.timestamp, wire.ago_ns)?.with(wire.flush_before))
    }
}

/// Whose a view is: words for people.
pub fn owner(text: &str) -> Result<String> {
    if text.len() > OWNER_BYTES_MAX || text.chars().any(char::is_control) {
        let bound = format!("at most {OWNER_BYTES_MAX} bytes, no control characters");
        return Err(Error::invalid("owner", format!("{text:?}"), bound));
    }
    Ok(text.to_owned())
}

/// A directory to mount at.
fn mount_dir(text: &str) -> Result<PathBuf> {
    use std::path::{Component, Path};
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || path == Path::new("/") || text.contains('\0') {
        return Err(Error::invalid("mount", format!("{text:?}"), "an absolute path without \"..\", not \"/\""));
    }
    Ok(path.components().collect())
}

impl TryFrom<&v1::ViewGroupRequest> for View {
    type Error = Error;

    fn try_from(wire: &v1::ViewGroupRequest) -> Result<Self> {
        Self::try_from(&v1::ViewRequest {
            volume: String::new(),
            op: wire.op.clone(),
            snapshot_name: wire.snapshot_name.clone(),
            timestamp: wire.timestamp,
            writable: wire.writable,
            ago_ns: wire.ago_ns,
            ttl_s: wire.ttl_s,
            owner: wire.owner.clone(),
            flush_before: wire.flush_before,
            ..v1::ViewRequest::default()
        })
    }
}

/// Where a revert goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Back {
    /// To an instant.
    To(At),
    /// To just before each volume's newest revert.
    Undo,
}

impl TryFrom<&v1::RevertRequest> for Back {
    type Error = Error;

    fn try_from(wire: &v1::RevertRequest) -> Result<Self> {
        let given = !wire.snapshot_name.is_empty() || wire.timestamp != 0 || wire.ago_ns.is_some() || wire.flush_before;
        match wire.undo {
            true if given => Err(Error::invalid("undo", true, "not together with an instant")),
            true => Ok(Self::Undo),
            false => Ok(Self::To(At::new(&wire.snapshot_name, wire.timestamp, wire.ago_ns)?.with(wire.flush_before))),
        }
    }
}

impl TryFrom<&v1::LocateRequest> for At {
    type Error = Error;

    fn try_from(wire: &v1::LocateRequest) -> Result<Self> {
        Ok(Self::new(&wire.snapshot_name, wire.timestamp, wire.ago_ns)?.with(wire.flush_before))
    }
}

/// What `Changes` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Behind this instant.
    pub from: u64,
    /// Up to this one; 0: now.
    pub to: u64,
    /// Number of the first to tell.
    pub skip: u64,
    /// How many to tell.
    pub limit: u32,
}

impl TryFrom<&v1::ChangesRequest> for Changes {
    type Error = Error;

    fn try_from(wire: &v1::ChangesRequest) -> Result<Self> {
        if wire.from == 0 {
            return Err(Error::invalid("from", 0, "an instant of the volume's history"));
        }
        if wire.to != 0 && wire.to < wire.from {
            return Err(Error::invalid("to", wire.to, format!("0, or not before from, which is {}", wire.from)));
        }
        if wire.limit > CHANGES_MAX {
            return Err(Error::invalid("limit", wire.limit, format!("at most {CHANGES_MAX}")));
        }
        Ok(Self { from: wire.from, to: wire.to, skip: wire.skip, limit: wire.limit })
    }
}

/// The name of a group.
pub fn group_name(text: &str) -> Result<&str> {
    parse::volume_name(text).map_err(|error| invalid("name", error))
}

impl TryFrom<v1::AddVolumeRequest> for NewVolume {
    type Error = Error;

    fn try_from(wire: v1::AddVolumeRequest) -> Result<Self> {
        parse::volume_name(&wire.name).map_err(|error| invalid("name", error))?;
        let uuid = match wire.uuid.as_str() {
            "" => None,
            text => Some(Uuid::parse_str(text).ok().filter(|uuid| !uuid.is_nil()).ok_or_else(|| {
                Error::invalid("uuid", format!("{text:?}"), "empty, or a uuid of 32 hexadecimal digits, not all zero")
            })?),
        };
        if !wire.size.is_multiple_of(512) || wire.size > 1 << 60 {
            return Err(Error::invalid("size", wire.size, "a multiple of 512 bytes, at most 2^60"));
        }
        if wire.create && wire.size == 0 {
            return Err(Error::invalid("size", 0, "with create, the size of the new file"));
        }
        Ok(Self { name: wire.name, path: absolute(&wire.path)?, uuid, size: wire.size, create: wire.create })
    }
}

/// A CDP disk to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// Path of the device or file.
    pub path: PathBuf,
    /// Bytes; 0: what it has.
    pub size: u64,
    /// Bytes of a segment; 0: chosen by size.
    pub segment_size: u64,
    /// Overwrite what is there.
    pub force: bool,
}

impl TryFrom<v1::InitDiskRequest> for NewDisk {
    type Error = Error;

    fn try_from(wire: v1::InitDiskRequest) -> Result<Self> {
        let segment_size = wire.segment_size;
        if segment_size != 0 && !(segment_size.is_power_of_two() && (1 << 20..=256 << 20).contains(&segment_size)) {
            return Err(Error::invalid("segment_size", segment_size, "0, or a power of two from 1 MiB to 256 MiB"));
        }
        if !wire.size.is_multiple_of(4096) || wire.size > 1 << 60 {
            return Err(Error::invalid("size", wire.size, "a multiple of 4096 bytes, at most 2^60"));
        }
        Ok(Self { path: absolute(&wire.path)?, size: wire.size, segment_size, force: wire.force })
    }
}

/// Names of volumes: 1 to 1024, none twice. That two of them mean one volume shows only later.
pub fn volumes(names: &[String]) -> Result<&[String]> {
    if names.is_empty() || names.len() > VOLUMES_MAX {
        return Err(Error::invalid("volumes", format!("{} volumes", names.len()), format!("1 to {VOLUMES_MAX}")));
    }
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::invalid("volumes", format!("{:?} twice", pair[0]), "each volume once")),
        None => Ok(names),
    }
}

/// The state that an override leaves.
pub fn override_health(wire: i32) -> Result<Health> {
    match v1::Health::try_from(wire) {
        Ok(v1::Health::NeedsJournal) => Ok(Health::NeedsJournal),
        Ok(v1::Health::PrimaryChanged) => Ok(Health::PrimaryChanged),
        Ok(v1::Health::RevertIncomplete) => Ok(Health::RevertIncomplete),
        Ok(other) => Err(Error::invalid("health", other.word(), "needs_journal, primary_changed or revert_incomplete")),
        Err(_) => Err(Error::invalid("health", wire, "needs_journal, primary_changed or revert_incomplete")),
    }
}

/// The id of a view.
pub fn view_id(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| Error::invalid("id", format!("{text:?}"), "the uuid of a view"))
}

/// Milliseconds between two messages of `WaitRevert`.
pub fn wait_interval(wire: u32) -> Result<Duration> {
    let ms = match wire {
        0 => WAIT_INTERVAL_MS_DEFAULT,
        50..=60_000 => wire,
        _ => return Err(Error::invalid("interval_ms", wire, "0, or 50 to 60000")),
    };
    Ok(Duration::from_millis(ms.into()))
}

/// Events to begin with.
pub fn replay(wire: u32) -> Result<usize> {
    let max = EVENTS_MAX;
    usize::try_from(wire)
        .ok()
        .filter(|count| *count <= max)
        .ok_or_else(|| Error::invalid("replay", wire, format!("0 to {max}")))
}

/// Pieces of a timeline.
pub fn buckets(wire: u32) -> Result<u32> {
    match wire {
        0 => Ok(100),
        1..=10_000 => Ok(wire),
        _ => Err(Error::invalid("buckets", wire, "0, or 1 to 10000")),
    }
}

fn absolute(path: &str) -> Result<PathBuf> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 {
        return Err(Error::invalid("path", format!("{path:?}"), "an absolute path of at most 4095 bytes"));
    }
    Ok(PathBuf::from(path))
}

fn invalid(field: &'static str, error: InputError) -> Error {
    Error::invalid(field, format!("{:?}", error.value), error.bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
        let Err(Error::Invalid { field, value, bound }) = result else { panic!("accepted: {result:?}") };
        let text = format!("{field}: {value}: {bound}");
        for word in words {
            assert!(text.contains(word), "{text:?} lacks {word:?}");
        }
    }

    #[test]
    fn edit_changes_what_is_given_and_refuses_what_cannot_be() {
        let edit = |capacity, duration, priority: Option<&str>| {
            Edit::try_from(&v1::EditRequest {
                volumes: vec![],
                reserve_capacity: capacity,
                reserve_duration: duration,
                cdp_priority: priority.map(str::to_owned),
            })
        };
        let before = Settings { reserve_capacity: 9, reserve_duration_s: 8, priority: Priority::Low };
        let after = edit(None, Some(7), Some("high")).expect("valid").apply(before);
        assert_eq!(after, Settings { reserve_duration_s: 7, priority: Priority::High, ..before });
        refused(edit(None, None, None), &["settings", "reserve_capacity"]);
        refused(edit(Some(0), None, None), &["reserve_capacity", "0"]);
        refused(edit(Some(u64::MAX), None, None), &["reserve_capacity", "2^60"]);
        refused(edit(None, Some(0), None), &["reserve_duration", "3153600000"]);
        refused(edit(None, Some(3_153_600_001), None), &["reserve_duration"]);
        refused(edit(None, None, Some("urgent")), &["cdp_priority", "urgent", "low, mid or high"]);
    }

    #[test]
    fn an_instant_is_given_in_one_way() {
        let at = |name, time, ago| At::new(name, time, ago);
        assert_eq!(at("", 5, None).expect("valid"), At::Time(5));
        assert_eq!(at("m", 0, None).expect("valid"), At::Marker("m".into()));
        assert_eq!(at("m", 5, None).expect("valid"), At::NotBefore("m".into(), 5));
        assert_eq!(at("", 0, Some(0)).expect("valid"), At::Ago(0));
        refused(at("", 0, None), &["timestamp", "ago_ns"]);
        refused(at("", 5, Some(1)), &["ago_ns", "not together"]);
        refused(at("m", 0, Some(1)), &["ago_ns", "not together"]);
        let used = |partition, unmounted| {
            At::try_from(&v1::UseViewRequest { timestamp: 5, partition, unmounted, ..Default::default() })
        };
        assert_eq!(used(Some(1), false).expect("valid"), At::Time(5));
        assert_eq!(used(None, true).expect("valid"), At::Time(5));
        refused(used(Some(1), true), &["partition", "unmounted"]);
    }

    #[test]
    fn a_view_is_opened_or_closed_and_nothing_else() {
        let view = |op: &str, ago| {
            View::try_from(&v1::ViewRequest {
                op: op.into(),
                timestamp: u64::from(ago == 0) * 9,
                ago_ns: (ago > 0).then_some(ago),
                ..Default::default()
            })
        };
        assert!(!view("", 0).expect("valid").off && view("off", 0).expect("valid").off);
        refused(view("toggle", 0), &["op", "toggle"]);
        refused(view("off", 5), &["ago_ns", "off"]);
    }

    #[test]
    fn a_view_is_mounted_only_where_a_path_is_plain() {
        let view = |mount: &str, partition, ttl_s| {
            let mount = mount.to_owned();
            View::try_from(&v1::ViewRequest { timestamp: 9, mount, partition, ttl_s, ..Default::default() })
        };
        let plain = view("/mnt//old/", Some(2), 60).expect("valid");
        assert_eq!((plain.mount, plain.partition), (Some(PathBuf::from("/mnt/old")), Some(2)));
        assert_eq!(plain.ttl, Some(std::time::Duration::from_secs(60)));
        for path in ["mnt", "/", "/mnt/../etc", "/mnt/\0"] {
            refused(view(path, None, 0), &["mount"]);
        }
        refused(view("", Some(1), 0), &["partition", "mount"]);
        refused(view("/mnt", None, u64::MAX), &["ttl_s"]);
        refused(owner(&"x".repeat(256)), &["owner", "255"]);
        refused(owner("a\nb"), &["owner"]);
    }

    #[test]
    fn volumes_are_counted_and_given_once() {
        let names = |count: usize| (0..count).map(|n| n.to_string()).collect::<Vec<_>>();
        assert!(volumes(&names(1)).is_ok() && volumes(&names(1024)).is_ok());
        refused(volumes(&[]), &["volumes", "1 to 1024"]);
        refused(volumes(&names(1025)), &["1025"]);
        refused(volumes(&["a".into(), "b".into(), "a".into()]), &["\"a\" twice"]);
    }

    #[test]
    fn disks_and_volumes_are_checked_field_by_field() {
        let volume = |name: &str, path: &str, uuid: &str, size, create| {
            NewVolume::try_from(v1::AddVolumeRequest {
                name: name.into(),
                path: path.into(),
                uuid: uuid.into(),
                size,
                create,
            })
        };
        assert!(volume("a", "/p", "", 0, false).is_ok() && volume("a", "/p", "", 512, true).is_ok());
        refused(volume("a/b", "/p", "", 0, false), &["name", "a/b"]);
        refused(volume("", "/p", "", 0, false), &["name"]);
        refused(volume("a", "p", "", 0, false), &["path", "absolute"]);
        refused(volume("a", "/p", "xyz", 0, false), &["uuid", "xyz"]);
        refused(volume("a", "/p", "00000000-0000-0000-0000-000000000000", 0, false), &["uuid"]);
        refused(volume("a", "/p", "", 513, false), &["size", "513", "512"]);
        refused(volume("a", "/p", "", 0, true), &["size", "create"]);
        let disk = |path: &str, size, segment_size| {
            NewDisk::try_from(v1::InitDiskRequest { path: path.into(), size, segment_size, force: false })
        };
        assert!(disk("/d", 0, 0).is_ok() && disk("/d", 1 << 30, 1 << 20).is_ok());
        refused(disk("d", 0, 0), &["path"]);
        refused(disk("/d", 0, 3 << 20), &["segment_size", "power of two"]);
        refused(disk("/d", 0, 512 << 20), &["segment_size", "256 MiB"]);
        refused(disk("/d", 1000, 0), &["size", "4096"]);
    }

    #[test]
    fn small_numbers_have_bounds() {
        assert_eq!(wait_interval(0).expect("valid").as_millis(), 200);
        refused(wait_interval(49), &["interval_ms", "49"]);
        refused(wait_interval(60_001), &["60000"]);
        refused(replay(1025), &["replay", "1024"]);
        refused(buckets(10_001), &["buckets", "10000"]);
        refused(view_id("demo"), &["id", "demo"]);
        refused(override_health(v1::Health::Ok.into()), &["health", "ok", "needs_journal"]);
        refused(override_health(99), &["health", "99"]);
        let flush = v1::MarkRequest { kind: v1::MarkerKind::Flush.into(), ..Default::default() };
        refused(Mark::try_from(&flush), &["kind", "FLUSH"]);
        let name = v1::MarkRequest { name: "12345".into(), ..Default::default() };
        refused(Mark::try_from(&name), &["name", "12345"]);
    }
}
