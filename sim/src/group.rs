//! Reverts of all volumes at one instant: asked for, and judged after a crash.

use std::io;
use std::rc::Rc;

use cdp_journal::group::{self, Decider, Member};
use cdp_journal::info::{CdpState, RevertReport};
use cdp_journal::{Error, Instant, Result, RevertRequest};
use uuid::Uuid;

use crate::admin;
use crate::boot;
use crate::guest::{barrier, verify};
use crate::world::{Vol, World};

struct Of<'a> {
    world: &'a Rc<World>,
    vol: &'a Rc<Vol>,
    request: RevertRequest,
    /// Its number for the oracle.
    number: u32,
}

impl Member for Of<'_> {
    fn id(&self) -> Uuid {
        self.vol.id
    }
    async fn prepare(&self, group: Uuid) -> Result<()> {
        self.vol.handle().prepare_revert(group, self.request).await
    }
    async fn record(&self, group: Uuid, instant: Instant, members: Vec<Uuid>) -> Result<()> {
        self.vol.handle().record_revert(group, instant, &members).await
    }
    async fn commit(&self, group: Uuid) -> Result<RevertReport> {
        let report = self.vol.handle().commit_revert(group).await?;
        // At once: while other members are waited for, a revert of this volume alone may be made and answered.
        let verdict = self.vol.oracle.borrow_mut().revert_done(self.number, report.instant.0);
        if let Err(text) = verdict {
            self.world.fail(text);
        }
        Ok(report)
    }
    async fn abort(&self, group: Uuid) -> Result<()> {
        self.vol.handle().abort_revert(group).await
    }
}

struct Folder<'a>(&'a Rc<World>);

impl Decider for Folder<'_> {
    async fn tick(&self) -> Result<Instant> {
        self.0.running().engine.tick().await
    }
    async fn begin(&self, group: Uuid, _members: Vec<Uuid>) -> io::Result<()> {
        self.0.folder.begin_revert(&self.0.running().executor, group).await
    }
    async fn decide(&self, group: Uuid) {
        while self.0.folder.decide_revert(&self.0.running().executor, group).await.is_err() {}
    }
}

/// Reverts all volumes to one instant, clients disconnected and let in again. `beside`: other operations are under way, and are not waited for.
pub async fn revert(world: &Rc<World>, at: u64, beside: bool) {
    if !beside {
        barrier(world).await;
    }
    // One group at a time, as the agent does it: each takes its members' locks in no order.
    if world.failed() || world.group_in_doubt.get() > 0 {
        return;
    }
    let target = world.pick_instant(&world.volumes[0].handle().info(), at);
    let number = world.groups.get() + 1;
    world.groups.set(number);
    let infos: Vec<_> = world.volumes.iter().map(|vol| vol.handle().info()).collect();
    let before = infos.iter().all(|info| Vol::covers(info, target));
    let off = infos.iter().any(|info| info.state == CdpState::Off);
    let request = RevertRequest { target: Instant(target), force: true, release: true, dry_run: false };
    let mut members = Vec::new();
    let mut calls = Vec::new();
    for vol in &world.volumes {
        calls.push(world.call_begins(vol));
        vol.revert_begins(true);
        vol.hold_begins(false);
        let now = world.now(vol);
        let mut oracle = vol.oracle.borrow_mut();
        let revert = oracle.revert_begin(target, now);
        oracle.revert_in_group(revert, number);
        members.push(Of { world, vol, request, number: revert });
    }
    world.group_in_doubt.set(number);
    let results = group::revert(&members, &Folder(world), Uuid::from_u64_pair(7, number)).await;
    let mut alone = true;
    for (vol, call) in world.volumes.iter().zip(calls) {
        vol.revert_ends();
        vol.hold_ends(vol.held.get().unwrap_or_else(|| vol.handle().info().held));
        alone &= world.call_ends(vol, call);
    }
    let after = world.volumes.iter().all(|vol| Vol::covers(&vol.handle().info(), target));
    let done = results.iter().filter(|result| result.is_ok()).count();
    if done > 0 && done < results.len() && !world.any_fault() {
        return world.fail(format!("{done} of {} volumes of a group were reverted: {results:?}", results.len()));
    }
    if done > 0 && !before && !after {
        return world.fail(format!("a group's revert to {target}, outside the coverage, went through"));
    }
    for (Of { vol, number, .. }, result) in members.iter().zip(results) {
        match result {
            Ok(report) => {
                vol.history_grows(report.needed_bytes);
                vol.last_revert.set(vol.last_revert.get().max(report.instant.0));
                world.instants.borrow_mut().extend([report.instant.0 - 1, report.instant.0]);
            }
            Err(error) => {
                world.say(|| format!("volume {}: revert of the group to {target}: {error}", vol.index));
                vol.oracle.borrow_mut().revert_refused(*number);
                vol.revert_refused(true);
                let expected = match &error {
                    // Its own refusal, or another member's; beside other calls whatever they left it in.
                    Error::State(text) => off || !before || !alone || text.starts_with("not done"),
                    Error::OutOfCoverage { .. } => !before || !after,
                    Error::NoSpace { .. } => true,
                    _ => false,
                };
                if !expected && !world.any_fault() {
                    return world.fail(format!("revert of a group to {target}: {error}"));
                }
            }
        }
    }
    if done > 0 {
        world.count(|counts| counts.reverts += 1);
    }
    world.group_in_doubt.set(0);
    for vol in &world.volumes {
        verify(world, vol).await;
        if world.failed() {
            return;
        }
        if world.history.setup.admins {
            admin::come_back(world, vol).await;
        } else if vol.guard.borrow().is_none() || vol.disconnected.get() {
            vol.guard.take();
            boot::connect(world, vol);
        }
    }
}

/// After a start: a group's revert that was cut off happened on all volumes or on none, and is done with. Answers whether it is so.
pub async fn settle(world: &Rc<World>) -> bool {
    let number = world.group_in_doubt.replace(0);
    if number > 0 {
        let seen: Vec<_> = world.volumes.iter().map(|vol| vol.oracle.borrow().reverted_in_group(number)).collect();
        if seen.contains(&Some(true)) && seen.contains(&Some(false)) {
            world.fail(format!("a crash left the revert of a group on some volumes only: {seen:?}"));
            return false;
        }
        if let Some(happened) = seen.iter().flatten().next() {
            for vol in &world.volumes {
                vol.oracle.borrow_mut().settle_group(number, *happened);
            }
        }
    }
    for group in world.folder.undecided() {
        while world.folder.decide_revert(&world.running().executor, group).await.is_err() {}
    }
    true
}
