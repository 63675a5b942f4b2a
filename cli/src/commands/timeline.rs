//! `timeline`.

use cdp_proto::{parse::When, v1};
use serde_json::json;

use super::when;
use crate::{
    args::{Format, Timeline},
    connect::Agent,
    draw,
    failure::Failure,
    output::{self, Answer},
    shape, svg,
};

pub async fn show(agent: &Agent, args: Timeline, format: Format) -> Result<Answer, Failure> {
    let located = match &args.around {
        Some(around) => Some(when::locate(agent, std::slice::from_ref(&args.volume), around).await?),
        None => None,
    };
    let (from, to) = match &located {
        // The picture is centred; where the history ends, it ends too.
        Some(located) => {
            (located.time.saturating_sub(args.span / 2).max(1), located.time.saturating_add(args.span / 2))
        }
        None => (end(agent, &args.volume, &args.from).await?, end(agent, &args.volume, &args.to).await?),
    };
    let buckets = args.buckets.unwrap_or_else(|| match format {
        Format::Table => draw::columns(),
        Format::Json => 100,
    });
    let what = format!("timeline {}", args.volume);
    let question = v1::TimelineRequest { volume: args.volume.clone(), from, to, buckets };
    let timeline =
        agent.call(what, question, |mut client, question| async move { client.timeline(question).await }).await?;
    let mut json = shape::timeline(&timeline);
    let mut text = draw::timeline(&args.volume, &timeline);
    if let Some(located) = &located {
        json = output::merge(json, json!({ "around": shape::located(located) }));
        text += &draw::around(located);
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, svg::timeline(&args.volume, &timeline))
            .map_err(|source| Failure::io(format!("write {}", path.display()), source))?;
        json = output::merge(json, json!({ "svg": path.display().to_string() }));
        text += &format!("the picture is in {}\n", path.display());
    }
    Ok(Answer::done(json, text))
}

/// An end of the span as an instant; 0: that of the history. Names and relative times are resolved by the agent's clock, not by ours.
async fn end(agent: &Agent, volume: &str, when: &Option<When>) -> Result<u64, Failure> {
    match when {
        None => Ok(0),
        Some(when) => Ok(when::resolve(agent, volume, when).await?.max(1)),
    }
}
