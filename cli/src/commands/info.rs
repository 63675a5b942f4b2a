//! `info`.

use cdp_proto::{
    parse::{duration_text, size_text},
    v1,
};

use super::{list::health, when};
use crate::{
    args::Info,
    connect::Agent,
    draw,
    failure::Failure,
    output::{self, Answer, instant},
    shape,
};

/// Automatic markers beyond this many are counted, not listed, unless all are asked for.
const AUTO_SNAPS_SHOWN: usize = 10;

pub async fn show(agent: &Agent, args: Info) -> Result<Answer, Failure> {
    let info = fetch(agent, &args.volume, args.all).await?;
    let (mut json, mut text) = (shape::info(&info), text(&info, args.all));
    if let Some(at) = &args.at {
        let located = when::locate(agent, std::slice::from_ref(&args.volume), at).await?;
        json = output::merge(json, serde_json::json!({ "around": shape::located(&located) }));
        text += &draw::around(&located);
    }
    Ok(Answer::done(json, text))
}

/// One volume's info.
pub async fn fetch(agent: &Agent, volume: &str, all: bool) -> Result<v1::InfoResponse, Failure> {
    let question = v1::InfoRequest { volume: volume.to_owned(), all };
    let what = format!("info {volume}");
    agent.call(what, question, |mut client, question| async move { client.info(question).await }).await
}

fn text(info: &v1::InfoResponse, all: bool) -> String {
    let mut text = info.volume.as_ref().map(|volume| head(info, volume)).unwrap_or_default();
    text += "\nCan be viewed\n";
    text += &coverage(info);
    text += "\nLogs\n";
    text += &logs(&info.cdp_info);
    text += "\nMarkers\n";
    text += &snaps(&info.snaps, all);
    if !info.reverts.is_empty() {
        text += "\nReverts\n";
        let row = |revert: &v1::RevertPoint| {
            vec![instant(revert.time), instant(revert.target), revert.time.saturating_sub(1).to_string()]
        };
        let rows: Vec<_> = info.reverts.iter().map(row).collect();
        text += &output::table(&["MADE", "WENT BACK TO", "UNDONE BY --AT"], &rows, "none");
    }
    if !info.views.is_empty() {
        text += "\nViews\n";
        text += &super::view::table(&info.views);
    }
    text
}

fn head(info: &v1::InfoResponse, volume: &v1::VolumeEntry) -> String {
    let has = volume.reserve_capacity > 0;
    let keep = || {
        let (used, capacity) = (size_text(volume.used_bytes), size_text(volume.reserve_capacity));
        format!(
            "{} in up to {capacity} ({used} used), priority {}",
            duration_text(volume.reserve_duration),
            volume.cdp_priority
        )
    };
    let size = match info.primary_size {
        primary if primary > volume.size && volume.size > 0 => {
            format!(
                "{} (the device has {}: cdpctl volume resize {})",
                size_text(volume.size),
                size_text(primary),
                volume.volume_name
            )
        }
        _ => size_text(volume.size),
    };
    let health = match volume.health_reason.as_str() {
        "" => health(volume),
        reason => format!("{}: {reason}", health(volume)),
    };
    let revert = info.revert.as_ref().filter(|revert| !revert.done).map_or_else(String::new, |revert| {
        let percent = revert.blocks_done.saturating_mul(100).checked_div(revert.blocks_total).unwrap_or(0);
        let (done, total) = (revert.blocks_done, revert.blocks_total);
        let left = match revert.eta_s {
            0 => String::new(),
            eta => format!(", about {} left", duration_text(eta)),
        };
        format!(
            "to {}, made {}: {done} of {total} blocks copied ({percent}%){left}",
            instant(revert.target),
            instant(revert.time)
        )
    });
    output::fields(&[
        ("Volume", format!("{} ({})", volume.volume_name, volume.volume_uuid)),
        ("Size", size),
        ("Device", volume.path.clone()),
        ("Served at", volume.nbd_uri.clone()),
        ("CDP", volume.cdp_state.clone()),
        ("Health", health),
        ("Keeps", if has { keep() } else { "nothing: no CDP settings (cdpctl enable, cdpctl edit)".into() }),
        (
            "Forecast",
            if info.window_forecast_s > 0 {
                format!("{} of history at the current rate", duration_text(info.window_forecast_s))
            } else {
                String::new()
            },
        ),
        ("Backlog", size_text(volume.backlog_bytes)),
        ("Clients", volume.clients.to_string()),
        (
            "Held",
            if volume.held {
                format!("refuses clients until: cdpctl release {}", volume.volume_name)
            } else {
                String::new()
            },
        ),
        ("Revert", revert),
        (
            "Flush-clean",
            if info.flush_clean == 0 { String::new() } else { format!("last at {}", instant(info.flush_clean)) },
        ),
        ("Now", instant(info.now)),
    ])
}

fn coverage(info: &v1::InfoResponse) -> String {
    let row = |interval: &v1::Interval| {
        let last = if interval.end == 0 { info.now } else { interval.end };
        vec![
            instant(interval.start),
            if interval.end == 0 { "now".into() } else { instant(interval.end) },
            output::span(last.saturating_sub(interval.start)),
            interval.end_reason.clone(),
        ]
    };
    let rows: Vec<_> = info.coverage.iter().map(row).collect();
    output::table(&["FROM", "TO", ">LENGTH", "ENDS BECAUSE"], &rows, "no history")
}

fn logs(logs: &[v1::CdpInfo]) -> String {
    let row = |log: &v1::CdpInfo| {
        let state = match log {
            log if !log.online => "offline",
            log if log.thin => "thin",
            log if !log.recording => "disabled",
            log if log.end_time == 0 => "active",
            log if log.sealed => "sealed",
            _ => "closed",
        };
        vec![
            log.seq.to_string(),
            state.into(),
            instant(log.start_time),
            if log.end_time == 0 { "now".into() } else { instant(log.end_time) },
            size_text(log.r#use),
            size_text(log.before_image_bytes),
            size_text(log.capacity),
            instant(log.io_last_time),
            log.usd_path.clone(),
        ]
    };
    let rows: Vec<_> = logs.iter().map(row).collect();
    output::table(
        &[">SEQ", "STATE", "START", "END", ">USE", ">BEFORE", ">ROTATES AT", "LAST WRITE", "DISK"],
        &rows,
        "no logs",
    )
}

fn snaps(snaps: &[v1::Snap], all: bool) -> String {
    let auto = snaps.iter().filter(|snap| snap.auto).count();
    let mut hide = if all { 0 } else { auto.saturating_sub(AUTO_SNAPS_SHOWN) };
    let hidden = hide;
    let shown = snaps.iter().filter(|snap| {
        let is_hidden = snap.auto && hide > 0;
        hide -= usize::from(is_hidden);
        !is_hidden
    });
    let rows: Vec<_> = shown.map(|snap| vec![snap.name.clone(), instant(snap.time), snap.kind().word()]).collect();
    let mut text = output::table(&["NAME", "TIME", "KIND"], &rows, "no markers");
    if hidden > 0 {
        text += &format!("({hidden} older automatic markers: --all)\n");
    }
    text
}
