//! Instants on their way to the agent, which alone knows its clock, its markers and its flush points.

use cdp_proto::{parse::When, v1};

use crate::{connect::Agent, failure::Failure};

/// The fields that requests give an instant by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    pub snapshot_name: String,
    pub timestamp: u64,
    pub ago_ns: Option<u64>,
    pub flush_before: bool,
}

impl From<When> for Fields {
    fn from(when: When) -> Self {
        match when {
            When::At(ns) => Self { timestamp: ns, ..Self::default() },
            When::Ago(ns) => Self { ago_ns: Some(ns), ..Self::default() },
            When::Marker(name) => Self { snapshot_name: name, ..Self::default() },
            When::FlushBefore(other) => Self { flush_before: true, ..Self::from(*other) },
        }
    }
}

/// What lies around an instant.
pub async fn locate(agent: &Agent, volumes: &[String], when: &When) -> Result<v1::LocateResponse, Failure> {
    let Fields { snapshot_name, timestamp, ago_ns, flush_before } = when.clone().into();
    let question = v1::LocateRequest { volumes: volumes.to_vec(), snapshot_name, timestamp, ago_ns, flush_before };
    let what = format!("{} at {when}", volumes.join(" "));
    agent.call(what, question, |mut client, question| async move { client.locate(question).await }).await
}

/// The instant that is meant in a volume.
pub async fn resolve(agent: &Agent, volume: &str, when: &When) -> Result<u64, Failure> {
    match when {
        When::At(ns) => Ok(*ns),
        when => Ok(locate(agent, &[volume.to_owned()], when).await?.time),
    }
}
