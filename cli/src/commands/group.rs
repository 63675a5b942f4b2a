//! `group add`, `group list`, `group remove`.

use cdp_proto::v1;
use serde_json::json;

use super::missing;
use crate::{
    connect::Agent,
    failure::Failure,
    output::{self, Answer},
    shape,
};

pub async fn add(agent: &Agent, name: String, volumes: Vec<String>) -> Result<Answer, Failure> {
    let what = format!("group add {name}");
    let question = v1::AddGroupRequest { name, volumes };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.add_group(question).await })
        .await?;
    let group = answer.group.ok_or_else(|| missing(&what))?;
    let text = format!("{}: {}\n", group.name, group.volumes.join(", "));
    Ok(Answer::done(shape::group(&group), text))
}

pub async fn list(agent: &Agent) -> Result<Answer, Failure> {
    let question = v1::ListGroupsRequest {};
    let answer = agent
        .call("group list", question, |mut client, question| async move { client.list_groups(question).await })
        .await?;
    let row = |group: &v1::Group| {
        let from = if group.configured { "configuration" } else { "added" };
        vec![group.name.clone(), group.volumes.join(", "), from.into()]
    };
    let rows: Vec<_> = answer.groups.iter().map(row).collect();
    let json = json!({ "groups": answer.groups.iter().map(shape::group).collect::<Vec<_>>() });
    Ok(Answer::done(json, output::table(&["NAME", "VOLUMES", "FROM"], &rows, "no groups")))
}

pub async fn remove(agent: &Agent, name: String) -> Result<Answer, Failure> {
    let what = format!("group remove {name}");
    let question = v1::RemoveGroupRequest { name };
    let answer = agent
        .call(what.clone(), question, |mut client, question| async move { client.remove_group(question).await })
        .await?;
    let group = answer.group.ok_or_else(|| missing(&what))?;
    Ok(Answer::done(shape::group(&group), format!("{}: forgotten; its volumes stay as they are\n", group.name)))
}

/// Whether a name is a group's; an agent that cannot tell has none.
pub async fn is_one(agent: &Agent, name: &str) -> bool {
    let question = v1::ListGroupsRequest {};
    let answer = agent
        .call("group list", question, |mut client, question| async move { client.list_groups(question).await })
        .await;
    answer.is_ok_and(|answer| answer.groups.iter().any(|group| group.name == name))
}
