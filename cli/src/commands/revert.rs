//! `revert` and `release`.

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
};

use cdp_proto::{
    parse::{When, size_text},
    v1,
};
use serde_json::json;

use super::batch::{self, Part};
use super::{files::with_files, when::Fields};
use crate::{
    args::{Format, Revert, ViewFiles, Volumes},
    connect::Agent,
    failure::Failure,
    files_differ,
    output::{self, Answer, count, instant},
    progress::RevertBars,
    shape,
};

pub async fn revert(agent: &Agent, args: Revert, format: Format) -> Result<Answer, Failure> {
    let what = args.at.as_ref().map_or_else(|| "revert --undo".to_owned(), |at| format!("revert to {at}"));
    let Fields { snapshot_name, timestamp, ago_ns, flush_before } = args.at.map(Fields::from).unwrap_or_default();
    let question = v1::RevertRequest {
        volumes: args.volumes,
        force: args.force,
        release: args.release,
        dry_run: args.dry_run,
        undo: args.undo,
        snapshot_name,
        timestamp,
        ago_ns,
        flush_before,
    };
    let dry_run = args.dry_run;
    let answer =
        agent.call(what, question, |mut client, question| async move { client.revert(question).await }).await?;
    let mut parts: Vec<Part> = answer.results.into_iter().map(|result| part(result, dry_run)).collect();
    if dry_run {
        for part in parts.iter_mut().filter(|part| part.is_done()) {
            tell_files(agent, part).await;
        }
    }
    let done: Vec<String> = parts
        .iter()
        .filter(|part| part.is_done())
        .filter_map(|part| Some(part.result.as_ref()?.volume_uuid.clone()))
        .collect();
    let mut top = json!({ "dry_run": dry_run });
    if args.wait && !done.is_empty() {
        let copied = wait(agent, done).await;
        top = output::merge(top, json!({ "copied": copied.is_ok() }));
        if let Err(failure) = copied {
            // The revert is made and holds; losing sight of its copying must not hide that, nor how to undo it.
            let _ = output::print(&batch::answer(parts, top), format); // how the wait ended is what counts
            return Err(failure);
        }
    }
    Ok(batch::answer(parts, top))
}

/// Adds to a dry run which files would change, where the volume has a file system that this host can mount. Best effort: it says why not.
async fn tell_files(agent: &Agent, part: &mut Part) {
    let (Some(result), Some(target)) = (&part.result, part.data["target"].as_u64()) else { return };
    let of = |at: When| ViewFiles { volume: result.volume_uuid.clone(), at, partition: None };
    let found = with_files(agent, "revert --dry-run", of(When::At(target)), async |then, _| {
        with_files(agent, "revert --dry-run", of(When::Ago(0)), async |now, _| {
            // Paths of open folders: nobody can put another file system in their place meanwhile.
            let open = |fd: &OwnedFd| PathBuf::from(format!("/proc/self/fd/{}/", fd.as_raw_fd()));
            files_differ::compare(&open(then), &open(now))
                .map_err(|source| Failure::io("compare the files of both instants", source))
        })
        .await
    })
    .await;
    let data = match found {
        Ok(found) => {
            let shown = found.files.len() as u64;
            for (path, fate) in &found.files {
                part.line += &format!("\n  {:<10}  {}", fate.word(), path.display());
            }
            let more = if found.total > shown {
                format!(", {} of them not listed", found.total - shown)
            } else {
                String::new()
            };
            let partial = if found.partial { "; there are more files than were looked at" } else { "" };
            part.line += &format!(
                "\n  {} would change{more}{partial}, as far as their attributes tell",
                count(found.total, "file")
            );
            let files: Vec<_> = found
                .files
                .iter()
                .map(|(path, fate)| json!({ "path": path.display().to_string(), "fate": fate.word() }))
                .collect();
            json!({ "files": files, "files_total": found.total, "files_partial": found.partial })
        }
        Err(failure) => {
            part.line += &format!("\n  files: not listed: {failure}");
            json!({ "files": null, "files_note": failure.to_string() })
        }
    };
    part.data = output::merge(part.data.clone(), data);
}

pub async fn release(agent: &Agent, args: Volumes) -> Result<Answer, Failure> {
    let question = v1::ReleaseRequest { volumes: args.volumes };
    let answer =
        agent.call("release", question, |mut client, question| async move { client.release(question).await }).await?;
    let part = |result: v1::VolumeResult| Part {
        line: format!("{}: clients may connect", batch::name(Some(&result))),
        data: output::object(),
        result: Some(result),
    };
    Ok(batch::answer(answer.results.into_iter().map(part).collect(), output::object()))
}

fn part(result: v1::RevertResult, dry_run: bool) -> Part {
    let name = batch::name(result.result.as_ref()).to_owned();
    let changes = format!("{} ({})", count(result.blocks, "block"), size_text(result.bytes));
    let line = if dry_run {
        let (needed, available) = (size_text(result.needed_bytes), size_text(result.available_bytes));
        let enough = if result.needed_bytes > result.available_bytes { "NOT ENOUGH" } else { "enough" };
        format!(
            "{name}: would go back to {}: at most {changes} change; needs {needed} of CDP disk, {available} available: {enough}",
            instant(result.target)
        )
    } else {
        let held =
            if result.held { format!("; it refuses clients until: cdpctl release {name}") } else { String::new() };
        format!(
            "{name}: is back at {}; at most {changes} change; undo with: cdpctl revert {name} --undo{held}",
            instant(result.target)
        )
    };
    Part { line, data: shape::revert(&result), result: result.result }
}

/// Until the copying behind is done for all volumes.
async fn wait(agent: &Agent, volumes: Vec<String>) -> Result<(), Failure> {
    let question = v1::WaitRevertRequest { volumes, interval_ms: 0 };
    let mut answers =
        agent
            .stream("wait for the revert", question, |mut client, question| async move {
                client.wait_revert(question).await
            })
            .await?;
    let mut bars = RevertBars::new();
    let ended = loop {
        match answers.next().await {
            Ok(Some(progress)) => bars.show(&progress),
            Ok(None) => break Ok(()),
            Err(failure) => break Err(failure),
        }
    };
    bars.clear();
    ended
}
