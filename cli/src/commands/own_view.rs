//! A view of a command's own: nobody shares it, and the agent takes it away when the call ends that it belongs to: also when this program is killed.

use cdp_proto::v1;
use tonic::Status;

use super::{missing, view::user};
use crate::{
    connect::{Agent, Answers},
    exit::Exit,
    failure::Failure,
};

/// An open view; dropped, it goes a moment later.
pub struct OwnView<'a> {
    agent: &'a Agent,
    what: String,
    /// What the agent says of it.
    pub view: v1::ViewInfo,
    /// Its life: the view is closed when this ends.
    _call: Answers<'a, v1::UseViewResponse>,
}

impl<'a> OwnView<'a> {
    /// Opens what `question` asks for, in this program's name.
    pub async fn open(agent: &'a Agent, what: String, question: v1::UseViewRequest) -> Result<Self, Failure> {
        let question = v1::UseViewRequest { owner: format!("{}, cdpctl {}", user(), std::process::id()), ..question };
        let mut call = agent
            .stream(what.clone(), question, |mut client, question| async move { client.use_view(question).await })
            .await?;
        let view = call.next().await?.and_then(|answer| answer.view).ok_or_else(|| missing(&what))?;
        Ok(Self { agent, what, view, _call: call })
    }

    /// Opens the read-only view of a volume at an instant, mounted nowhere.
    pub async fn unmounted(agent: &'a Agent, what: &str, volume: &str, time: u64) -> Result<Self, Failure> {
        let question =
            v1::UseViewRequest { volume: volume.to_owned(), timestamp: time, unmounted: true, ..Default::default() };
        Self::open(agent, format!("{what} {volume} at {time}"), question).await
    }

    /// Closes it. That this goes well says that it was served without a break, by one and the same agent, up to now.
    pub async fn close(self) -> Result<(), Failure> {
        let question = v1::CloseViewRequest { id: self.view.id.clone(), force: true };
        let closed = self
            .agent
            .call(format!("{}: close", self.what), question, |mut client, question| async move {
                client.close_view(question).await
            })
            .await;
        let gone = |why: &str| {
            let words = format!("view {} was not served to the end: {why}", self.view.id);
            Err(Failure::call(self.what.clone(), Status::failed_precondition(words)))
        };
        match closed {
            Err(failure) if failure.exit() == Exit::NotFound => gone("the agent restarted, or somebody closed it"),
            Err(failure) => Err(failure),
            Ok(answer) => match answer.view.map(|view| view.lost).unwrap_or_default().as_str() {
                "" => Ok(()),
                lost => gone(lost),
            },
        }
    }
}
