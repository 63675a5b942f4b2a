//! `status`.

use cdp_proto::{parse::size_text, v1};

use crate::{
    connect::Agent,
    failure::Failure,
    output::{self, Answer, instant, span},
    shape,
};

pub async fn show(agent: &Agent) -> Result<Answer, Failure> {
    let status = agent
        .call("status", v1::StatusRequest {}, |mut client, question| async move { client.status(question).await })
        .await?;
    Ok(Answer::done(shape::status(&status), text(&status)))
}

fn text(status: &v1::StatusResponse) -> String {
    let part_bad =
        |all: u32, bad: u32, word: &str| if bad == 0 { all.to_string() } else { format!("{all}, {bad} {word}") };
    let lead = if status.clock_lead_ns == 0 {
        String::new()
    } else {
        format!(", {} ahead of the wall clock", span(status.clock_lead_ns))
    };
    let bound = if status.backlog_bytes_max == 0 {
        String::new()
    } else {
        format!(" of {}", size_text(status.backlog_bytes_max))
    };
    output::fields(&[
        ("Agent", format!("cdp-agent {} (format {}), {} shards", status.version, status.format_version, status.shards)),
        ("Host", format!("{} ({})", status.host_name, status.host_uuid)),
        (
            "Started",
            format!("{} ({} ago)", instant(status.start_time), span(status.now.saturating_sub(status.start_time))),
        ),
        ("Now", format!("{}{lead}", instant(status.now))),
        ("Volumes", part_bad(status.volumes, status.volumes_unhealthy, "UNHEALTHY")),
        ("Views", status.views.to_string()),
        ("CDP disks", part_bad(status.disks, status.disks_offline, "OFFLINE")),
        ("History", size_text(status.used_bytes)),
        ("Backlog", format!("{}{bound}", size_text(status.backlog_bytes))),
        ("NBD", status.nbd_uris.join(", ")),
        ("gRPC", status.grpc_endpoints.join(", ")),
        ("Config", status.config_path.clone()),
        ("State", status.state_dir.clone()),
    ])
}
