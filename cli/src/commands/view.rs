//! `view open`, `view list`, `view close`.

use cdp_proto::{
    parse::{duration_text, size_text},
    v1,
};
use serde_json::json;

use super::{missing, when::Fields};
use crate::{
    args::ViewOpen,
    connect::Agent,
    exit::Exit,
    failure::Failure,
    output::{self, Answer, instant},
    shape,
};

pub async fn open(agent: &Agent, args: ViewOpen) -> Result<Answer, Failure> {
    let names = args.volumes.join(" ");
    let what = format!("view {names} at {}", args.at);
    let Fields { snapshot_name, timestamp, ago_ns, flush_before } = args.at.into();
    let (ttl_s, owner) = (args.ttl.unwrap_or(0), args.owner.unwrap_or_else(user));
    let of_group = |volumes: &[String]| v1::ViewGroupRequest {
        volumes: volumes.to_vec(),
        op: "on".into(),
        snapshot_name: snapshot_name.clone(),
        timestamp,
        writable: args.writable,
        ago_ns,
        ttl_s,
        owner: owner.clone(),
        flush_before,
    };
    let [volume] = args.volumes.as_slice() else {
        if args.mount.is_some() {
            return Err(Failure::Usage("--mount goes with one volume: mount the members one by one".into()));
        }
        return open_group(agent, what, of_group(&args.volumes)).await;
    };
    let mount = match &args.mount {
        Some(dir) => super::path_for(agent, "--mount", dir)?,
        None => String::new(),
    };
    let question = v1::ViewRequest {
        ttl_s,
        owner: owner.clone(),
        mount,
        partition: args.partition,
        volume: volume.clone(),
        op: "on".into(),
        snapshot_name: snapshot_name.clone(),
        timestamp,
        writable: args.writable,
        ago_ns,
        flush_before,
    };
    let asked = agent.call(what.clone(), question, |mut client, question| async move { client.view(question).await });
    let answer = match asked.await {
        Err(failure)
            if failure.exit() == Exit::NotFound
                && args.mount.is_none()
                && super::group::is_one(agent, volume).await =>
        {
            return open_group(agent, what, of_group(&args.volumes)).await;
        }
        answer => answer?,
    };
    let view = answer.view.ok_or_else(|| missing(&what))?;
    let json = output::merge(shape::view(&view), json!({ "host_uuid": answer.host_uuid }));
    let text = output::fields(&[
        ("View", view.id.clone()),
        ("Shows", format!("{} at {} ({})", view.volume_name, instant(view.time), view.time)),
        ("Marker", view.snapshot_name.clone()),
        ("Size", size_text(view.size)),
        (
            "Writes",
            if view.writable {
                format!("to a scratch overlay of up to {}", size_text(view.scratch_bytes_max))
            } else {
                "refused".into()
            },
        ),
        ("Read it at", view.nbd_uri.clone()),
        ("As a file", view.path.clone()),
        ("Mounted at", mounted(&view)),
        ("Until", if view.expires == 0 { String::new() } else { instant(view.expires) }),
        ("Close with", format!("cdpctl view close {}", view.id)),
    ]);
    Ok(Answer::done(json, text))
}

/// Opens the views of several volumes at one instant.
async fn open_group(agent: &Agent, what: String, question: v1::ViewGroupRequest) -> Result<Answer, Failure> {
    let answer =
        agent.call(what, question, |mut client, question| async move { client.view_group(question).await }).await?;
    let json = json!({
        "time": answer.time,
        "views": answer.views.iter().map(shape::view).collect::<Vec<_>>(),
    });
    let mut text =
        format!("{} at {} ({})\n", output::count(answer.views.len() as u64, "view"), instant(answer.time), answer.time);
    let rows: Vec<_> =
        answer.views.iter().map(|view| vec![view.volume_name.clone(), view.id.clone(), view.nbd_uri.clone()]).collect();
    text += &output::table(&["VOLUME", "ID", "READ IT AT"], &rows, "no views");
    Ok(Answer::done(json, text))
}

pub async fn list(agent: &Agent, volume: Option<String>) -> Result<Answer, Failure> {
    let question = v1::ListViewsRequest { volume: volume.unwrap_or_default() };
    let answer = agent
        .call("view list", question, |mut client, question| async move { client.list_views(question).await })
        .await?;
    let json = json!({ "views": answer.views.iter().map(shape::view).collect::<Vec<_>>() });
    Ok(Answer::done(json, table(&answer.views)))
}

pub async fn close(agent: &Agent, id: String, force: bool) -> Result<Answer, Failure> {
    let what = format!("view close {id}");
    let question = v1::CloseViewRequest { id, force };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.close_view(question).await })
        .await?;
    let view = answer.view.ok_or_else(|| missing(&what))?;
    Ok(Answer::done(
        shape::view(&view),
        format!("closed view {} of {} at {}\n", view.id, view.volume_name, instant(view.time)),
    ))
}

/// Where and what; empty: nowhere.
fn mounted(view: &v1::ViewInfo) -> String {
    match (view.mount.as_str(), view.partition) {
        ("", _) => String::new(),
        (dir, 0) => format!("{dir} ({})", view.fstype),
        (dir, partition) => format!("{dir} ({}, partition {partition})", view.fstype),
    }
}

/// How long it has been open, and how long it still will be.
fn age(view: &v1::ViewInfo) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let open = duration_text(now.saturating_sub(view.opened / 1_000_000_000));
    match view.expires {
        0 => open,
        end => format!("{open}, ends in {}", duration_text((end / 1_000_000_000).saturating_sub(now))),
    }
}

/// Who asks, for `view list`.
pub fn user() -> String {
    let found = nix::unistd::User::from_uid(nix::unistd::geteuid());
    let name = found.ok().flatten().map(|user| user.name).unwrap_or_default();
    match std::env::var("SUDO_USER") {
        Ok(real) if !real.is_empty() && name == "root" => format!("{real} (root)"),
        _ => name,
    }
}

/// Views for people.
pub fn table(views: &[v1::ViewInfo]) -> String {
    let row = |view: &v1::ViewInfo| {
        let mode = match (view.lost.as_str(), view.writable) {
            ("", false) => "read-only".into(),
            ("", true) => format!("scratch {} of {}", size_text(view.scratch_bytes), size_text(view.scratch_bytes_max)),
            (lost, _) => format!("LOST: {lost}"),
        };
        vec![
            view.id.clone(),
            view.volume_name.clone(),
            instant(view.time),
            if view.snapshot_name.is_empty() { "-".into() } else { view.snapshot_name.clone() },
            view.clients.to_string(),
            if view.owner.is_empty() { "-".into() } else { view.owner.clone() },
            age(view),
            mode,
            mounted(view),
        ]
    };
    let rows: Vec<_> = views.iter().map(row).collect();
    output::table(
        &["ID", "VOLUME", "TIME", "MARKER", ">CLIENTS", "OWNER", "AGE", "STATE", "MOUNTED AT"],
        &rows,
        "no open views",
    )
}
