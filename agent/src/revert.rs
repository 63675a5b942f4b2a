//! Reverts of volumes that may live on different shards: together or not at all (`cdp_journal::group`).

use std::io;

use cdp_journal::group::{self, Decider, Member};
use cdp_journal::info::RevertReport;
use cdp_journal::{Instant, Result, RevertRequest};
use futures::future::join_all;
use uuid::Uuid;

use std::sync::Arc;

use crate::control::Control;

/// A revert of one or several volumes.
#[derive(Clone, Copy, Debug)]
pub struct Rewind {
    /// Disconnect clients and hold the export.
    pub force: bool,
    /// Let clients in at once.
    pub release: bool,
    /// Change nothing.
    pub dry_run: bool,
}

/// A volume of the group, reached by messages to its shard.
struct OnShard<'a> {
    control: &'a Control,
    volume: Uuid,
    request: RevertRequest,
}

impl Member for OnShard<'_> {
    fn id(&self) -> Uuid {
        self.volume
    }

    async fn prepare(&self, group: Uuid) -> Result<()> {
        let request = self.request;
        self.control
            .on_volume(self.volume, move |volume| async move { volume.prepare_revert(group, request).await })
            .await
    }

    async fn record(&self, group: Uuid, instant: Instant, members: Vec<Uuid>) -> Result<()> {
        let record = move |volume: std::rc::Rc<cdp_journal::Volume>| async move {
            volume.record_revert(group, instant, &members).await
        };
        self.control.on_volume(self.volume, record).await
    }

    async fn commit(&self, group: Uuid) -> Result<RevertReport> {
        self.control.on_volume(self.volume, move |volume| async move { volume.commit_revert(group).await }).await
    }

    async fn abort(&self, group: Uuid) -> Result<()> {
        self.control.on_volume(self.volume, move |volume| async move { volume.abort_revert(group).await }).await
    }
}

impl Decider for Control {
    async fn tick(&self) -> Result<Instant> {
        self.instant().await
    }

    async fn begin(&self, group: Uuid, members: Vec<Uuid>) -> io::Result<()> {
        self.state().begin_revert(group, members).await
    }

    async fn decide(&self, group: Uuid) {
        self.state().decide_revert(group).await;
    }
}

impl Control {
    /// Takes volumes back, together or not at all. Answers in the order given. Once begun it goes to its end, also when the caller has gone: a member
    /// must not be left waiting.
    pub async fn revert(self: &Arc<Self>, targets: Vec<(Uuid, Instant)>, how: Rewind) -> Vec<Result<RevertReport>> {
        let count = targets.len();
        let control = Arc::clone(self);
        let work = tokio::spawn(async move { control.revert_to_the_end(targets, how).await });
        work.await.unwrap_or_else(|_| (0..count).map(|_| Err(crate::control::stopping())).collect())
    }

    async fn revert_to_the_end(&self, targets: Vec<(Uuid, Instant)>, how: Rewind) -> Vec<Result<RevertReport>> {
        let Rewind { force, release, dry_run } = how;
        let request = |target| RevertRequest { target, force, release, dry_run };
        if dry_run || targets.len() == 1 {
            let alone = |volume, request| self.on_volume(volume, move |v| async move { v.revert(request).await });
            return join_all(targets.into_iter().map(|(volume, target)| alone(volume, request(target)))).await;
        }
        let members: Vec<_> = targets
            .into_iter()
            .map(|(volume, target)| OnShard { control: self, volume, request: request(target) })
            .collect();
        let _alone = self.reverting.lock().await;
        group::revert(&members, self, Uuid::new_v4()).await
    }
}
