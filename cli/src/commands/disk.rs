//! `disk init`, `disk list`, `disk check`.

use std::path::Path;

use cdp_proto::{parse::size_text, v1};
use serde_json::json;

use super::{missing, path_for};
use crate::{
    args::DiskInit,
    connect::Agent,
    disk_check::{self, Findings},
    failure::Failure,
    output::{self, Answer},
    shape,
};

pub async fn init(agent: &Agent, args: DiskInit) -> Result<Answer, Failure> {
    let path = path_for(agent, "path", &args.path)?;
    let what = format!("disk init {path}");
    let question = v1::InitDiskRequest {
        path,
        size: args.size.unwrap_or_default(),
        segment_size: args.segment_size.unwrap_or_default(),
        force: args.force,
    };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.init_disk(question).await })
        .await?;
    let disk = answer.disk.ok_or_else(|| missing(&what))?;
    let (size, segment) = (size_text(disk.size), size_text(disk.segment_size));
    let text = format!("{}: CDP disk {} of {size}, {} segments of {segment}\n", disk.path, disk.id, disk.segments);
    Ok(Answer::done(shape::disk(&disk), text))
}

pub async fn list(agent: &Agent) -> Result<Answer, Failure> {
    let answer =
        agent
            .call("disk list", v1::ListDisksRequest {}, |mut client, question| async move {
                client.list_disks(question).await
            })
            .await?;
    let row = |disk: &v1::DiskInfo| {
        vec![
            disk.path.clone(),
            if disk.online { "online".into() } else { format!("OFFLINE: {}", disk.error) },
            size_text(disk.size),
            size_text(disk.segments_free.saturating_mul(disk.segment_size)),
            size_text(disk.reserved_bytes),
            size_text(disk.segment_size),
            disk.errors.to_string(),
            if disk.direct { "direct".into() } else { "buffered".into() },
            disk.id.clone(),
        ]
    };
    let rows: Vec<_> = answer.disks.iter().map(row).collect();
    let headers = ["PATH", "STATE", ">SIZE", ">FREE", ">RESERVED", ">SEGMENT", ">ERRORS", "I/O", "ID"];
    let json = json!({ "disks": answer.disks.iter().map(shape::disk).collect::<Vec<_>>() });
    Ok(Answer::done(json, output::table(&headers, &rows, "no CDP disks: cdpctl disk init PATH")))
}

/// Offline: the engine's checker reads the disk itself, no agent is asked.
pub fn check(path: &Path) -> Result<Answer, Failure> {
    disk_check::run(path, cdp_journal::check::check, |report| Findings {
        json: shape::disk_report(&report),
        text: format!("{report}\n"),
        sound: report.is_clean(),
    })
}
