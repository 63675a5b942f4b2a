//! `timeline`.

use cdp_proto::{parse::When, v1};

use super::info;
use crate::{
    args::{Format, Timeline},
    connect::Agent,
    draw,
    failure::Failure,
    output::Answer,
    shape,
};

pub async fn show(agent: &Agent, args: Timeline, format: Format) -> Result<Answer, Failure> {
    let (from, to) = span(agent, &args).await?;
    let buckets = args.buckets.unwrap_or_else(|| match format {
        Format::Table => draw::columns(),
        Format::Json => 100,
    });
    let what = format!("timeline {}", args.volume);
    let question = v1::TimelineRequest { volume: args.volume.clone(), from, to, buckets };
    let timeline =
        agent.call(what, question, |mut client, question| async move { client.timeline(question).await }).await?;
    Ok(Answer::done(shape::timeline(&timeline), draw::timeline(&args.volume, &timeline)))
}

/// Both ends as instants. Names and relative times are resolved by the volume's own markers and clock, not by ours.
async fn span(agent: &Agent, args: &Timeline) -> Result<(u64, u64), Failure> {
    let known = |when: &Option<When>| match when {
        None => Some(0),
        Some(When::At(ns)) => Some(*ns),
        Some(_) => None,
    };
    if let (Some(from), Some(to)) = (known(&args.from), known(&args.to)) {
        return Ok((from, to));
    }
    let info = info::fetch(agent, &args.volume, true).await?;
    let resolve = |option: &str, when: &Option<When>| match when {
        None => Ok(0),
        Some(When::At(ns)) => Ok(*ns),
        Some(When::Ago(ns)) => Ok(info.now.saturating_sub(*ns).max(1)),
        Some(When::Marker(name)) => {
            info.snaps.iter().find(|snap| snap.name == *name).map(|snap| snap.time).ok_or_else(|| {
                let what = format!("timeline {}", args.volume);
                Failure::call(what, tonic::Status::not_found(format!("{option}: marker {name:?} not found")))
            })
        }
    };
    Ok((resolve("--from", &args.from)?, resolve("--to", &args.to)?))
}
