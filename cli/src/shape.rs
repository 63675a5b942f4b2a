//! The JSON of each message: names of the HTTP interface where it has them, all times and sizes exact numbers.

use cdp_journal::check::{Finding, LogRow, Report, VolumeRow};
use cdp_proto::v1;
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    exit::code_name,
    output::{instant_or_null, merge},
};

/// Which volume of a batch, and whether it was done.
pub fn result(result: Option<&v1::VolumeResult>) -> Value {
    let result = result.cloned().unwrap_or_default();
    json!({
        "volume": result.volume,
        "volume_uuid": result.volume_uuid,
        "volume_name": result.volume_name,
        "code": result.code,
        "status": code_name(Code::from_i32(result.code)),
        "message": result.message,
    })
}

pub fn settings(settings: Option<&v1::Settings>) -> Value {
    settings.map_or_else(crate::output::object, |settings| {
        json!({
            "reserve_capacity": settings.reserve_capacity,
            "reserve_duration": settings.reserve_duration,
            "cdp_priority": settings.cdp_priority,
        })
    })
}

pub fn volume(volume: &v1::VolumeEntry) -> Value {
    json!({
        "volume_uuid": volume.volume_uuid,
        "volume_name": volume.volume_name,
        "reserve_duration": volume.reserve_duration,
        "reserve_capacity": volume.reserve_capacity,
        "cdp_create_time": volume.cdp_create_time,
        "cdp_state": volume.cdp_state,
        "cdp_priority": volume.cdp_priority,
        "size": volume.size,
        "path": volume.path,
        "health": volume.health().word(),
        "health_reason": volume.health_reason,
        "used_bytes": volume.used_bytes,
        "backlog_bytes": volume.backlog_bytes,
        "clients": volume.clients,
        "held": volume.held,
        "nbd_uri": volume.nbd_uri,
        "cdp_create_time_ns": volume.cdp_create_time_ns,
    })
}

pub fn snap(snap: &v1::Snap) -> Value {
    json!({ "name": snap.name, "time": snap.time, "kind": snap.kind().word(), "auto": snap.auto })
}

pub fn log(log: &v1::CdpInfo) -> Value {
    json!({
        "snaps": log.snaps.iter().map(snap).collect::<Vec<_>>(),
        "seq": log.seq,
        "startTime": log.start_time,
        "use": log.r#use,
        "capacity": log.capacity,
        "ioStartTime": log.io_start_time,
        "ioLastTime": log.io_last_time,
        "online": log.online,
        "usd_maddr": log.usd_maddr,
        "usd_path": log.usd_path,
        "endTime": instant_or_null(log.end_time),
        "thin": log.thin,
        "recording": log.recording,
        "sealed": log.sealed,
        "before_image_bytes": log.before_image_bytes,
    })
}

pub fn interval(interval: &v1::Interval) -> Value {
    json!({ "start": interval.start, "end": instant_or_null(interval.end), "end_reason": interval.end_reason })
}

pub fn progress(progress: &v1::RevertProgress) -> Value {
    json!({
        "volume_uuid": progress.volume_uuid,
        "volume_name": progress.volume_name,
        "time": instant_or_null(progress.time),
        "target": instant_or_null(progress.target),
        "blocks_total": progress.blocks_total,
        "blocks_done": progress.blocks_done,
        "blocks_per_s": progress.blocks_per_s,
        "eta_s": if progress.eta_s == 0 { Value::Null } else { progress.eta_s.into() },
        "done": progress.done,
    })
}

pub fn view(view: &v1::ViewInfo) -> Value {
    json!({
        "id": view.id,
        "nbd_uri": view.nbd_uri,
        "time": view.time,
        "snapshot_name": view.snapshot_name,
        "volume_uuid": view.volume_uuid,
        "volume_name": view.volume_name,
        "size": view.size,
        "writable": view.writable,
        "scratch_bytes": view.scratch_bytes,
        "scratch_bytes_max": view.scratch_bytes_max,
        "opened": view.opened,
        "clients": view.clients,
        "lost": view.lost,
        "path": view.path,
        "owner": view.owner,
        "expires": view.expires,
        "mount": view.mount,
        "fstype": view.fstype,
        "partition": view.partition,
        "device": view.device,
        "temporary": view.temporary,
    })
}

pub fn info(info: &v1::InfoResponse) -> Value {
    let named = json!({
        "cdp_info": info.cdp_info.iter().map(log).collect::<Vec<_>>(),
        "host_uuid": info.host_uuid,
        "snaps": info.snaps.iter().map(snap).collect::<Vec<_>>(),
    });
    let more = json!({
        "coverage": info.coverage.iter().map(interval).collect::<Vec<_>>(),
        "revert": info.revert.as_ref().map(progress),
        "primary_size": info.primary_size,
        "window_forecast_s": info.window_forecast_s,
        "now": info.now,
        "views": info.views.iter().map(view).collect::<Vec<_>>(),
        "reverts": info.reverts.iter().map(revert_point).collect::<Vec<_>>(),
        "flush_clean": instant_or_null(info.flush_clean),
    });
    let volume = info.volume.as_ref().map_or_else(crate::output::object, volume);
    merge(merge(named, volume), more)
}

/// A revert of the past.
pub fn revert_point(revert: &v1::RevertPoint) -> Value {
    json!({
        "time": revert.time,
        "target": instant_or_null(revert.target),
        "undo_time": revert.time.saturating_sub(1),
    })
}

pub fn group(group: &v1::Group) -> Value {
    json!({
        "name": group.name,
        "volumes": group.volumes,
        "volume_uuids": group.volume_uuids,
        "configured": group.configured,
    })
}

/// What lies around an instant.
pub fn located(located: &v1::LocateResponse) -> Value {
    let one = |one: &v1::Located| {
        let around = json!({
            "viewable": one.viewable,
            "flush_before": instant_or_null(one.flush_before),
            "flush_after": instant_or_null(one.flush_after),
            "snap_before": one.snap_before.as_ref().map(snap),
            "snap_after": one.snap_after.as_ref().map(snap),
        });
        merge(result(one.result.as_ref()), around)
    };
    json!({ "time": located.time, "results": located.results.iter().map(one).collect::<Vec<_>>() })
}

pub fn revert(result: &v1::RevertResult) -> Value {
    json!({
        "time": result.time,
        "target": result.target,
        "blocks": result.blocks,
        "bytes": result.bytes,
        "needed_bytes": result.needed_bytes,
        "available_bytes": result.available_bytes,
        "undo_time": instant_or_null(result.undo_time),
        "held": result.held,
    })
}

pub fn disk(disk: &v1::DiskInfo) -> Value {
    json!({
        "id": disk.id,
        "path": disk.path,
        "size": disk.size,
        "segment_size": disk.segment_size,
        "segments": disk.segments,
        "segments_free": disk.segments_free,
        "reserved_bytes": disk.reserved_bytes,
        "online": disk.online,
        "error": disk.error,
        "errors": disk.errors,
        "direct": disk.direct,
    })
}

pub fn event(event: &v1::Event) -> Value {
    json!({
        "time": event.time,
        "kind": event.kind().word(),
        "volume_uuid": event.volume_uuid,
        "volume_name": event.volume_name,
        "disk": event.disk,
        "message": event.message,
    })
}

pub fn timeline(timeline: &v1::TimelineResponse) -> Value {
    let bucket = |bucket: &v1::TimelineBucket| json!({ "start": bucket.start, "blocks": bucket.blocks, "bytes": bucket.bytes, "flushes": bucket.flushes, "flushes_clean": bucket.flushes_clean });
    json!({
        "from": timeline.from,
        "to": timeline.to,
        "buckets": timeline.buckets.iter().map(bucket).collect::<Vec<_>>(),
        "snaps": timeline.snaps.iter().map(snap).collect::<Vec<_>>(),
        "reverts": timeline.reverts.iter().map(revert_point).collect::<Vec<_>>(),
        "cdp_info": timeline.cdp_info.iter().map(log).collect::<Vec<_>>(),
        "coverage": timeline.coverage.iter().map(interval).collect::<Vec<_>>(),
    })
}

pub fn status(status: &v1::StatusResponse) -> Value {
    json!({
        "version": status.version,
        "format_version": status.format_version,
        "host_uuid": status.host_uuid,
        "host_name": status.host_name,
        "start_time": status.start_time,
        "now": status.now,
        "clock_lead_ns": status.clock_lead_ns,
        "shards": status.shards,
        "nbd_uris": status.nbd_uris,
        "grpc_endpoints": status.grpc_endpoints,
        "config_path": status.config_path,
        "state_dir": status.state_dir,
        "volumes": status.volumes,
        "volumes_unhealthy": status.volumes_unhealthy,
        "views": status.views,
        "disks": status.disks,
        "disks_offline": status.disks_offline,
        "backlog_bytes": status.backlog_bytes,
        "backlog_bytes_max": status.backlog_bytes_max,
        "used_bytes": status.used_bytes,
    })
}

/// What an offline check of a CDP disk found.
pub fn disk_report(report: &Report) -> Value {
    let log = |log: &LogRow| {
        json!({
            "seq": log.seq,
            "bytes": log.bytes,
            "writes_segments": log.writes_segments,
            "before_segments": log.before_segments,
            "frames": log.frames,
        })
    };
    let volume = |volume: &VolumeRow| {
        json!({
            "volume_uuid": volume.id.to_string(),
            "used_bytes": volume.bytes,
            "reserve_capacity": volume.reserve_capacity,
            "segments": volume.segments,
            "segments_writes": volume.writes_segments,
            "segments_before": volume.before_segments,
            "segments_unwritten": volume.unwritten_segments,
            "segments_orphaned": volume.orphaned_segments,
            "logs": volume.logs.iter().map(log).collect::<Vec<_>>(),
        })
    };
    let finding = |finding: &Finding| json!({ "severity": finding.severity.to_string(), "place": finding.place, "what": finding.what });
    json!({
        "id": report.disk_id.to_string(),
        "version": report.version,
        "created_ns": report.created_ns,
        "size": report.disk_size,
        "segment_size": report.segment_size,
        "segments": report.segments,
        "segments_free": report.segments_free,
        "segments_used": report.segments_used,
        "segments_unknown": report.segments_unknown,
        "segments_writes": report.segments_writes,
        "segments_before": report.segments_before,
        "segments_unwritten": report.segments_unwritten,
        "segments_cut": report.segments_cut,
        "segments_orphaned": report.segments_orphaned,
        "used_bytes": report.segments_used * report.segment_size,
        "volumes": report.volumes.iter().map(volume).collect::<Vec<_>>(),
        "frames": report.frames,
        "payload_blocks": report.payload_blocks,
        "index_pages": report.index_pages,
        "index_entries": report.index_entries,
        "bytes_verified": report.bytes_verified,
        "tails": report.tails,
        "damage": report.damage,
        "notes": report.notes,
        "findings": report.findings.iter().map(finding).collect::<Vec<_>>(),
    })
}
