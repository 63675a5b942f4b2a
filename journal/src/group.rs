//! Reverts of several volumes at one instant: all of them happen, or none, whatever stops the host in between.
//!
//! The volumes may live on different shards, threads and CDP disks, so no frame can hold the decision. It is a line in the host's state directory, beside
//! the fences: a group is *undecided* from before its first record until that line is durably gone, and the revert descriptors of an undecided group
//! do not count at recovery ([`crate::VolumeSpec::undecided_reverts`]). Steps:
//!
//! 1. each member prepares: everything that can be refused is refused, clients are out, writes wait;
//! 2. the group becomes undecided, durably;
//! 3. one instant is taken, and each member records the revert in its journal, durably;
//! 4. the line goes: the group is decided;
//! 5. each member switches its reads, and writes go on.
//!
//! Before 4 any failure takes everything back; after it, only a CDP disk that fails between 4 and 5 can keep its member from switching, and the
//! answer says so.

use std::future::Future;
use std::io;

use futures::future::join_all;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::info::RevertReport;
use crate::types::Instant;

/// Most volumes of one group's revert: their ids must fit a descriptor.
pub const MEMBERS_MAX: usize = 64;

/// One volume of a group, on whatever thread it lives. Each call ends, also when its CDP disk hangs (design part 6).
pub trait Member {
    /// Its uuid.
    fn id(&self) -> Uuid;
    /// [`crate::Volume::prepare_revert`].
    fn prepare(&self, group: Uuid) -> impl Future<Output = Result<()>>;
    /// [`crate::Volume::record_revert`].
    fn record(&self, group: Uuid, instant: Instant, members: Vec<Uuid>) -> impl Future<Output = Result<()>>;
    /// [`crate::Volume::commit_revert`].
    fn commit(&self, group: Uuid) -> impl Future<Output = Result<RevertReport>>;
    /// [`crate::Volume::abort_revert`].
    fn abort(&self, group: Uuid) -> impl Future<Output = Result<()>>;
}

/// Where groups are decided: the host's clock and its state directory. Each call is durable and atomic when its future ends.
pub trait Decider {
    /// A new instant of the host's clock.
    fn tick(&self) -> impl Future<Output = Result<Instant>>;
    /// From now on the group is undecided.
    fn begin(&self, group: Uuid, members: Vec<Uuid>) -> impl Future<Output = io::Result<()>>;
    /// The group is not undecided any more. After an error it may be either; the call is repeated until it succeeds.
    fn decide(&self, group: Uuid) -> impl Future<Output = ()>;
}

/// Reverts all members at one instant, or none; answers in their order.
pub async fn revert<M: Member>(members: &[M], decider: &impl Decider, group: Uuid) -> Vec<Result<RevertReport>> {
    let ids: Vec<Uuid> = members.iter().map(Member::id).collect();
    let fail = |why: &Error| members.iter().map(|_| Err(why.clone())).collect::<Vec<_>>();
    if members.len() > MEMBERS_MAX {
        return fail(&Error::invalid("volumes", members.len(), format!("at most {MEMBERS_MAX} in one revert")));
    }
    let prepared = join_all(members.iter().map(|m| m.prepare(group))).await;
    if prepared.iter().any(Result::is_err) {
        join_all(members.iter().zip(&prepared).filter(|(_, p)| p.is_ok()).map(|(m, _)| m.abort(group))).await;
        return blame(prepared);
    }
    if let Err(error) = decider.begin(group, ids.clone()).await {
        join_all(members.iter().map(|m| m.abort(group))).await;
        // Whether the line is there does not matter: no record names the group.
        return fail(&Error::device("record the revert in", "the state directory", &error));
    }
    let recorded = match decider.tick().await {
        Ok(instant) => join_all(members.iter().map(|m| m.record(group, instant, ids.clone()))).await,
        Err(error) => members.iter().map(|_| Err(error.clone())).collect(),
    };
    if recorded.iter().any(Result::is_err) {
        let aborted = join_all(members.iter().map(|m| m.abort(group))).await;
        if aborted.iter().all(Result::is_ok) {
            decider.decide(group).await;
        }
        // Otherwise a journal may still end with the group's record: the next start settles it.
        return blame(recorded);
    }
    decider.decide(group).await;
    join_all(members.iter().map(|m| m.commit(group))).await
}

/// The members that failed say why; the others, that they were left as they were.
fn blame(results: Vec<Result<()>>) -> Vec<Result<RevertReport>> {
    let other = || Error::State("not done: another volume of the group failed or was refused".into());
    results.into_iter().map(|result| Err(result.err().unwrap_or_else(other))).collect()
}
