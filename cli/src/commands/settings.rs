//! `edit`, `enable`, `disable`.

use cdp_proto::{
    parse::{duration_text, size_text},
    v1,
};
use serde_json::json;

use super::batch::{self, Part};
use crate::{
    args::{Edit, Priority, Volumes},
    connect::Agent,
    failure::Failure,
    output::{self, Answer},
    shape,
};

pub async fn edit(agent: &Agent, args: Edit) -> Result<Answer, Failure> {
    let priority = args.priority.map(|priority| match priority {
        Priority::Low => "low".to_owned(),
        Priority::Mid => "mid".to_owned(),
        Priority::High => "high".to_owned(),
    });
    let question = v1::EditRequest {
        volumes: args.volumes,
        reserve_capacity: args.reserve_capacity,
        reserve_duration: args.reserve_duration,
        cdp_priority: priority,
    };
    let answer =
        agent.call("edit", question, |mut client, question| async move { client.edit(question).await }).await?;
    let part = |result: v1::EditResult| Part {
        line: format!(
            "{}: {}, {}",
            batch::name(result.result.as_ref()),
            words(result.settings.as_ref()),
            result.cdp_state
        ),
        data: output::merge(shape::settings(result.settings.as_ref()), json!({ "cdp_state": result.cdp_state })),
        result: result.result,
    };
    Ok(batch::answer(answer.results.into_iter().map(part).collect(), output::object()))
}

pub async fn enable(agent: &Agent, args: Volumes) -> Result<Answer, Failure> {
    let question = v1::EnableRequest { volumes: args.volumes };
    let answer =
        agent.call("enable", question, |mut client, question| async move { client.enable(question).await }).await?;
    let part = |result: v1::EnableResult| Part {
        line: format!(
            "{}: on, {}, history from {}",
            batch::name(result.result.as_ref()),
            words(result.settings.as_ref()),
            output::instant(result.time)
        ),
        data: output::merge(
            shape::settings(result.settings.as_ref()),
            json!({ "cdp_state": "on", "time": output::instant_or_null(result.time) }),
        ),
        result: result.result,
    };
    Ok(batch::answer(answer.results.into_iter().map(part).collect(), output::object()))
}

pub async fn disable(agent: &Agent, args: Volumes) -> Result<Answer, Failure> {
    let question = v1::DisableRequest { volumes: args.volumes };
    let answer =
        agent.call("disable", question, |mut client, question| async move { client.disable(question).await }).await?;
    let part = |result: v1::DisableResult| Part {
        line: match result.time {
            0 => format!("{}: off", batch::name(result.result.as_ref())),
            time => format!(
                "{}: off, history up to {} stays until it ages out",
                batch::name(result.result.as_ref()),
                output::instant(time)
            ),
        },
        data: json!({ "cdp_state": "off", "time": output::instant_or_null(result.time) }),
        result: result.result,
    };
    Ok(batch::answer(answer.results.into_iter().map(part).collect(), output::object()))
}

fn words(settings: Option<&v1::Settings>) -> String {
    settings.map_or_else(String::new, |settings| {
        let (capacity, duration) = (size_text(settings.reserve_capacity), duration_text(settings.reserve_duration));
        format!("up to {capacity}, {duration}, priority {}", settings.cdp_priority)
    })
}
