//! `list` and `volume list`: the same call, the same JSON, two tables.

use cdp_proto::{
    parse::{duration_text, size_text},
    v1,
};
use serde_json::json;

use crate::{
    args::List,
    connect::Agent,
    failure::Failure,
    output::{self, Answer},
    shape,
};

/// Volumes asked for at once, so that an answer stays small however many there are.
const PAGE: u32 = 1000;

pub async fn settings(agent: &Agent, args: List) -> Result<Answer, Failure> {
    let row = |volume: &v1::VolumeEntry| {
        let has = volume.reserve_capacity > 0;
        vec![
            volume.volume_name.clone(),
            volume.cdp_state.clone(),
            health(volume),
            if has { size_text(volume.reserve_capacity) } else { "-".into() },
            if has { duration_text(volume.reserve_duration) } else { "-".into() },
            if has { volume.cdp_priority.clone() } else { "-".into() },
            size_text(volume.used_bytes),
            size_text(volume.backlog_bytes),
            volume.volume_uuid.clone(),
        ]
    };
    list(
        agent,
        args,
        &["NAME", "STATE", "HEALTH", ">CAPACITY", ">DURATION", "PRIORITY", ">USED", ">BACKLOG", "UUID"],
        row,
    )
    .await
}

pub async fn volumes(agent: &Agent, args: List) -> Result<Answer, Failure> {
    let row = |volume: &v1::VolumeEntry| {
        vec![
            volume.volume_name.clone(),
            size_text(volume.size),
            health(volume),
            volume.clients.to_string(),
            volume.path.clone(),
            volume.nbd_uri.clone(),
        ]
    };
    list(agent, args, &["NAME", ">SIZE", "HEALTH", ">CLIENTS", "PATH", "NBD"], row).await
}

/// Health and what people should see beside it.
pub fn health(volume: &v1::VolumeEntry) -> String {
    let word = volume.health().word();
    if volume.held { format!("{word}, held") } else { word }
}

async fn list(
    agent: &Agent,
    args: List,
    headers: &[&str],
    row: impl Fn(&v1::VolumeEntry) -> Vec<String>,
) -> Result<Answer, Failure> {
    let mut volumes: Vec<v1::VolumeEntry> = Vec::new();
    for page_num in 0.. {
        let question = v1::ListRequest { filter_name: args.filter.clone(), page_num, page_size: PAGE };
        let page =
            agent.call("list", question, |mut client, question| async move { client.list(question).await }).await?;
        let ended = page.list.is_empty();
        volumes.extend(page.list);
        if ended || volumes.len() >= page.total_count as usize {
            break;
        }
    }
    let rows: Vec<_> = volumes.iter().map(row).collect();
    let empty = if args.filter.is_empty() {
        "no volumes: cdpctl volume add NAME --path DEVICE"
    } else {
        "no volumes with such a name"
    };
    let json = json!({ "total_count": volumes.len(), "list": volumes.iter().map(shape::volume).collect::<Vec<_>>() });
    Ok(Answer::done(json, output::table(headers, &rows, empty)))
}
