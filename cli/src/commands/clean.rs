//! `clean`.

use cdp_proto::{parse::size_text, v1};
use serde_json::json;

use crate::{args::Clean, connect::Agent, failure::Failure, output::Answer};

pub async fn clean(agent: &Agent, args: Clean) -> Result<Answer, Failure> {
    let Clean { volume, seq } = args;
    let what = match seq {
        Some(seq) => format!("clean {volume}, log {seq}"),
        None => format!("clean {volume}"),
    };
    let question = v1::CleanRequest { volume: volume.clone(), usd_seq: seq };
    let answer = agent.call(what, question, |mut client, question| async move { client.clean(question).await }).await?;
    let freed = size_text(answer.freed_bytes);
    let text = match seq {
        Some(seq) if answer.thinned => {
            format!("{volume}: log {seq} is thin now, only its start can be viewed; {freed} freed\n")
        }
        Some(seq) => format!("{volume}: log {seq} removed; {freed} freed\n"),
        None => format!("{volume}: all history and the CDP settings removed; {freed} freed\n"),
    };
    let json =
        json!({ "volume": volume, "usd_seq": seq, "freed_bytes": answer.freed_bytes, "thinned": answer.thinned });
    Ok(Answer::done(json, text))
}
