//! `mark`.

use cdp_proto::v1::{self, MarkerKind};
use serde_json::json;

use super::batch::{self, Part};
use crate::{
    args::{Kind, Mark},
    connect::Agent,
    failure::Failure,
    output::{self, Answer, instant},
    shape,
};

pub async fn mark(agent: &Agent, args: Mark) -> Result<Answer, Failure> {
    let kind = match args.kind {
        Kind::Crash => MarkerKind::Crash,
        Kind::Application => MarkerKind::Application,
    };
    let quiesced = !args.quiesce.is_empty();
    let question = v1::MarkRequest {
        volumes: args.volumes,
        name: args.name.unwrap_or_default(),
        kind: kind as i32,
        quiesce: args.quiesce,
        quiesce_ms: if quiesced { args.quiesce_max } else { 0 },
    };
    let answer =
        agent.call("mark", question, |mut client, question| async move { client.mark(question).await }).await?;
    let frozen = match answer.frozen_ns {
        0 => String::new(),
        ns => format!("; the guest was frozen for {}", output::span(ns)),
    };
    let part = |result: v1::MarkResult| {
        let snap = result.snap.unwrap_or_default();
        Part {
            line: format!(
                "{}: {} at {} ({}), {}{frozen}",
                batch::name(result.result.as_ref()),
                snap.name,
                instant(snap.time),
                snap.time,
                snap.kind().word()
            ),
            data: shape::snap(&snap),
            result: result.result,
        }
    };
    let top = json!({
        "name": answer.name,
        "time": output::instant_or_null(answer.time),
        "frozen_ns": answer.frozen_ns,
    });
    Ok(batch::answer(answer.results.into_iter().map(part).collect(), top))
}
