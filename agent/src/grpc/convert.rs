//! What the engine tells, as messages.

use std::path::PathBuf;

use cdp_journal::info::{
    CdpState, Change, ChangeKind, DiskInfo, Health, Interval, LogInfo, Marker, MarkerKind, RevertPoint, RevertProgress,
    Settings, VolumeInfo,
};
use cdp_proto::v1;

use crate::config::priority_word;
use crate::control::{DiskStatus, ViewStatus, VolumeStatus};

/// Where things are served and by whom, for the messages that say so.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Uuid of this host.
    pub host_uuid: String,
    /// Name of this host.
    pub host_name: String,
    /// URIs of the NBD server with `{}` where the export name goes; the first is the one to use.
    pub nbd: Vec<String>,
    /// Where volumes are local files, if they are.
    pub volumes: Option<PathBuf>,
    /// Where views are local files, if they are.
    pub views: Option<PathBuf>,
}

impl Place {
    /// Where an export is served.
    pub fn nbd_uri(&self, export: &str) -> String {
        self.nbd.first().map(|uri| uri.replace("{}", export)).unwrap_or_default()
    }
}

/// The user's switch, in words.
pub fn state_word(state: CdpState) -> &'static str {
    match state {
        CdpState::On => "on",
        CdpState::Off => "off",
    }
}

/// A volume of `List`.
pub fn volume(status: &VolumeStatus, place: &Place) -> v1::VolumeEntry {
    match &status.info {
        Ok(info) => served_volume(info, place),
        Err(why) => v1::VolumeEntry {
            volume_uuid: status.record.uuid.to_string(),
            volume_name: status.record.name.clone(),
            cdp_state: "off".to_owned(),
            size: status.record.size,
            path: status.record.path.display().to_string(),
            health: v1::Health::PrimaryFailing.into(),
            health_reason: format!("it is not served: {why}"),
            ..v1::VolumeEntry::default()
        },
    }
}

/// A volume of `List` that an engine serves.
pub fn served_volume(info: &VolumeInfo, place: &Place) -> v1::VolumeEntry {
    v1::VolumeEntry {
        volume_uuid: info.id.to_string(),
        volume_name: info.name.clone(),
        reserve_duration: info.settings.map_or(0, |settings| settings.reserve_duration_s),
        reserve_capacity: info.settings.map_or(0, |settings| settings.reserve_capacity),
        cdp_create_time: i64::try_from(info.cdp_create_time_ns / 1_000_000_000).unwrap_or(i64::MAX),
        cdp_state: state_word(info.state).to_owned(),
        cdp_priority: info.settings.map_or("", |settings| priority_word(settings.priority)).to_owned(),
        size: info.size,
        path: info.path.clone(),
        health: health(info.health).into(),
        health_reason: info.health_reason.clone(),
        used_bytes: info.used_bytes,
        backlog_bytes: info.backlog_bytes,
        clients: info.clients,
        held: info.held,
        nbd_uri: place.nbd_uri(&info.name),
        cdp_create_time_ns: info.cdp_create_time_ns,
    }
}

/// Health on the wire.
pub fn health(health: Health) -> v1::Health {
    match health {
        Health::Ok => v1::Health::Ok,
        Health::Offline => v1::Health::Offline,
        Health::NeedsJournal => v1::Health::NeedsJournal,
        Health::PrimaryChanged => v1::Health::PrimaryChanged,
        Health::RevertIncomplete => v1::Health::RevertIncomplete,
        Health::PrimaryFailing => v1::Health::PrimaryFailing,
        Health::StateFailing => v1::Health::StateFailing,
    }
}

/// Settings on the wire.
pub fn settings(settings: &Settings) -> v1::Settings {
    v1::Settings {
        reserve_capacity: settings.reserve_capacity,
        reserve_duration: settings.reserve_duration_s,
        cdp_priority: priority_word(settings.priority).to_owned(),
    }
}

/// A marker.
pub fn snap(marker: &Marker) -> v1::Snap {
    let kind = match marker.kind {
        MarkerKind::Crash => v1::MarkerKind::Crash,
        MarkerKind::Flush => v1::MarkerKind::Flush,
        MarkerKind::Application => v1::MarkerKind::Application,
    };
    v1::Snap { name: marker.name.clone(), time: marker.time.0, kind: kind.into(), auto: marker.auto }
}

/// A log, with the markers that lie in it.
pub fn log(log: &LogInfo, markers: &[Marker], place: &Place) -> v1::CdpInfo {
    let inside = |marker: &&Marker| log.start <= marker.time && log.end.is_none_or(|end| marker.time <= end);
    v1::CdpInfo {
        snaps: markers.iter().filter(inside).map(snap).collect(),
        seq: log.seq,
        start_time: log.start.0,
        r#use: log.use_bytes,
        capacity: log.capacity_bytes,
        io_start_time: log.io_start.0,
        io_last_time: log.io_last.0,
        online: log.online,
        usd_maddr: place.host_name.clone(),
        usd_path: log.disk_path.clone(),
        end_time: log.end.map_or(0, |end| end.0),
        thin: log.thin,
        recording: log.recording,
        sealed: log.sealed,
        before_image_bytes: log.before_image_bytes,
    }
}

/// A revert of the past.
pub fn revert_point(revert: &RevertPoint) -> v1::RevertPoint {
    v1::RevertPoint { time: revert.instant.0, target: revert.target.map_or(0, |target| target.0) }
}

/// A step of the history.
pub fn change(change: &Change) -> v1::Change {
    let kind = match change.kind {
        ChangeKind::Write => v1::ChangeKind::Write,
        ChangeKind::Zero => v1::ChangeKind::Zero,
        ChangeKind::Revert => v1::ChangeKind::Revert,
    };
    v1::Change { time: change.instant.0, kind: kind.into(), offset: change.offset, length: change.len }
}

/// An interval that can be viewed.
pub fn interval(interval: &Interval) -> v1::Interval {
    v1::Interval {
        start: interval.start.0,
        end: interval.end.map_or(0, |end| end.0),
        end_reason: interval.end_reason.clone(),
    }
}

/// How far a revert is; `None`: none is pending.
pub fn progress(id: uuid::Uuid, name: &str, revert: Option<&RevertProgress>) -> v1::RevertProgress {
    let none = v1::RevertProgress {
        volume_uuid: id.to_string(),
        volume_name: name.to_owned(),
        done: true,
        ..v1::RevertProgress::default()
    };
    match revert {
        None => none,
        Some(revert) => v1::RevertProgress {
            time: revert.instant.0,
            target: revert.target.0,
            blocks_total: revert.blocks_total,
            blocks_done: revert.blocks_done,
            done: false,
            ..none
        },
    }
}

/// All about a volume.
pub fn info(info: &VolumeInfo, views: &[ViewStatus], all: bool, place: &Place) -> v1::InfoResponse {
    let shown = |log: &&LogInfo| all || (!log.thin && log.recording);
    v1::InfoResponse {
        cdp_info: info.logs.iter().filter(shown).map(|entry| log(entry, &info.markers, place)).collect(),
        host_uuid: place.host_uuid.clone(),
        snaps: info.markers.iter().map(snap).collect(),
        volume: Some(served_volume(info, place)),
        coverage: info.coverage.iter().map(interval).collect(),
        revert: info.revert.as_ref().map(|revert| progress(info.id, &info.name, Some(revert))),
        primary_size: info.primary_size,
        window_forecast_s: info.window_forecast_s,
        now: info.now.0,
        views: views.iter().map(|status| view(status, &info.name, place)).collect(),
        ..v1::InfoResponse::default()
    }
}

/// A view.
pub fn view(status: &ViewStatus, volume_name: &str, place: &Place) -> v1::ViewInfo {
    let ViewStatus { info, record } = status;
    let mount = record.mount.as_ref().filter(|mount| !mount.device.is_empty());
    let path = place.views.as_ref().map(|views| views.join(info.id.to_string()).display().to_string());
    v1::ViewInfo {
        id: info.id.to_string(),
        volume_uuid: info.volume.to_string(),
        volume_name: volume_name.to_owned(),
        time: info.time.0,
        snapshot_name: info.snapshot_name.clone(),
        writable: info.writable,
        scratch_bytes: info.scratch_bytes,
        scratch_bytes_max: info.scratch_bytes_max,
        opened: info.opened_ns,
        clients: info.clients,
        lost: info.lost.clone().unwrap_or_default(),
        nbd_uri: place.nbd_uri(&info.id.to_string()),
        size: info.size,
        path: path.unwrap_or_default(),
        owner: record.owner.clone(),
        expires: record.expires_ns.unwrap_or(0),
        mount: mount.map(|mount| mount.dir.display().to_string()).unwrap_or_default(),
        fstype: mount.map(|mount| mount.kind.clone()).unwrap_or_default(),
        partition: mount.and_then(|mount| mount.partition).unwrap_or(0),
        device: mount.map(|mount| mount.device.clone()).unwrap_or_default(),
        temporary: record.temporary,
    }
}

/// A CDP disk.
pub fn disk(status: &DiskStatus) -> v1::DiskInfo {
    let DiskInfo { id, path, size, segment_size, segments, segments_free, reserved_bytes, online, error, errors } =
        status.info.clone();
    v1::DiskInfo {
        id: if id.is_nil() { String::new() } else { id.to_string() },
        path,
        size,
        segment_size,
        segments,
        segments_free,
        reserved_bytes,
        online,
        error,
        errors,
        direct: status.direct,
    }
}
