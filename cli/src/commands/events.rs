//! `events`.

use cdp_proto::v1;
use serde_json::json;

use crate::{
    args::{Events, Format},
    connect::Agent,
    failure::Failure,
    output::{self, Answer, instant},
    shape,
};

pub async fn show(agent: &Agent, args: Events, format: Format) -> Result<Answer, Failure> {
    let Events { volumes, follow, last } = args;
    let replay = last.unwrap_or(if follow { 10 } else { 100 });
    let question = v1::WatchEventsRequest { volumes, replay, follow };
    let mut answers = agent
        .stream("events", question, |mut client, question| async move { client.watch_events(question).await })
        .await?;
    let mut events = Vec::new();
    while let Some(event) = answers.next().await? {
        match (format, follow) {
            (Format::Json, false) => events.push(shape::event(&event)),
            (Format::Json, true) => output::write(&format!("{}\n", shape::event(&event)))?,
            (Format::Table, _) => output::write(&line(&event))?,
        }
    }
    if follow { Ok(Answer::printed()) } else { Ok(Answer::done(json!({ "events": events }), "")) }
}

fn line(event: &v1::Event) -> String {
    let about = match (event.volume_name.as_str(), event.disk.as_str()) {
        ("", "") => "-",
        ("", disk) => disk,
        (volume, _) => volume,
    };
    format!("{}  {:<17}  {about:<16}  {}\n", instant(event.time), event.kind().word(), event.message)
}
