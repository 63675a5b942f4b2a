//! Reverts: back to an instant, alone or together with other volumes (`crate::group`).
//!
//! 1. *Estimate*: the blocks touched since the target, and the room that their before-images need.
//! 2. *Prepare*: clients are out, room is made, the target's log is pinned, writes wait ([`Reverting`]).
//! 3. *Record*: the revert descriptor is the last event of the active log. A lone revert does this together with 4.
//! 4. *Switch*: the next log begins at the revert's own instant; from this step on reads are answered from the target. The destager copies behind.

use std::rc::Rc;

use futures::future::{Either, select};
use uuid::Uuid;
use zerocopy::IntoBytes as _;

use super::history::CloseReason;
use super::read::REVERT_DEPTH;
use super::{AdminLock, Mode, State, Ticket, Volume};
use crate::engine::{Engine, RevertRequest};
use crate::error::{Error, Result};
use crate::fence::FenceState;
use crate::format::{ControlKind, ControlSettings};
use crate::group::MEMBERS_MAX;
use crate::index::Touched;
use crate::info::{EventKind, RevertReport};
use crate::log::{Log, PendingRevert, usable_bytes};
use crate::mutation::{Mutation, active};
use crate::types::{BLOCK, Instant};

/// A revert that is prepared and not made yet: as long as the volume has it, writes wait and the target's log stays.
pub(crate) struct Reverting {
    report: RevertReport,
    /// Blocks that may differ between the target and the head.
    changed: Touched,
    /// The group that it is part of, and the group's instant once the revert stands in the journal.
    group: Option<(Uuid, Option<Instant>)>,
    /// The export was held before.
    held_before: bool,
}

impl Reverting {
    pub fn target(&self) -> Instant {
        self.report.target
    }
}

impl Volume {
    /// Goes back to an instant: reads are switched when this ends, copying goes on behind.
    pub async fn revert(self: &Rc<Self>, request: RevertRequest) -> Result<RevertReport> {
        let engine = self.engine()?;
        let _lock = self.lock_admin().await;
        if request.dry_run {
            return Ok(self.estimate(&engine, &request).await?.0);
        }
        self.prepare(&engine, &request, None).await?;
        let (report, ticket) = loop {
            // Taken in the step that uses it: no write lies between.
            match engine.try_tick() {
                Some(instant) => break self.switch(instant)?,
                None => engine.raise_clock().await.inspect_err(|_| self.give_up_prepared())?,
            }
        };
        self.switched(report, ticket).await
    }

    /// First step of a group's revert: all that can be refused is refused; writes wait until [`Volume::commit_revert`] or
    /// [`Volume::abort_revert`], one of which must follow.
    ///
    /// # Errors
    /// As of [`Volume::revert`]; then nothing has changed, but that a forced one has disconnected the clients.
    pub async fn prepare_revert(self: &Rc<Self>, group: Uuid, request: RevertRequest) -> Result<()> {
        let engine = self.engine()?;
        let lock = self.lock_admin().await;
        self.prepare(&engine, &request, Some(group)).await?;
        lock.keep();
        Ok(())
    }

    /// Second step: the revert stands durably in the journal, and counts as soon as the group is decided. `instant` comes from the host's clock,
    /// taken after all members were prepared.
    ///
    /// # Errors
    /// The CDP disk failed. The group must be aborted.
    pub async fn record_revert(self: &Rc<Self>, group: Uuid, instant: Instant, members: &[Uuid]) -> Result<()> {
        if members.len() > MEMBERS_MAX {
            return Err(Error::invalid("members", members.len(), format!("at most {MEMBERS_MAX}")));
        }
        let ticket = {
            let mut state = self.state.borrow_mut();
            self.in_journal(&state)?;
            let (last, log) = (state.instant_last, state.logs.back().cloned());
            let log = log.ok_or_else(|| Error::Gone("no active log".into()))?;
            let reverting = Self::prepared(&mut state, group)?;
            if instant <= last {
                return Err(Error::invalid("instant", instant, format!("after {last}")));
            }
            reverting.group = Some((group, Some(instant)));
            let (target, total) = (reverting.report.target, reverting.changed.len());
            state.instant_last = instant;
            let ids: Vec<u8> = [group].iter().chain(members).flat_map(|id| *id.as_bytes()).collect();
            self.push_revert(&mut state, &log, instant, target, total, &ids)
        };
        self.kick.notify();
        self.durable(&ticket).await
    }

    /// Last step, after the group was decided: reads are switched.
    ///
    /// # Errors
    /// The CDP disk failed after the decision: the volume stands as it was before the revert.
    pub async fn commit_revert(self: &Rc<Self>, group: Uuid) -> Result<RevertReport> {
        let instant = match Self::prepared(&mut self.state.borrow_mut(), group)?.group {
            Some((_, Some(instant))) => instant,
            _ => return Err(Error::State(format!("the revert of group {group} is not recorded"))),
        };
        let _lock = AdminLock::kept(self);
        let (report, ticket) = self.switch(instant)?;
        self.switched(report, ticket).await
    }

    /// Gives a prepared revert up: writes go on. One that is recorded does not count, since the group is undecided; the next log makes sure that it
    /// never will.
    ///
    /// # Errors
    /// The CDP disk failed before the next log was durable: the group must stay undecided, for the next start.
    pub async fn abort_revert(self: &Rc<Self>, group: Uuid) -> Result<()> {
        let recorded = {
            let mut state = self.state.borrow_mut();
            let reverting = Self::prepared(&mut state, group)?;
            let (held, recorded) = (reverting.held_before, matches!(reverting.group, Some((_, Some(_)))));
            state.held = held;
            state.held_told = None;
            recorded
        };
        let _lock = AdminLock::kept(self);
        if !recorded {
            return Ok(());
        }
        let ticket = self.rotate_now(CloseReason::Rotation, |_| ()).await?;
        self.durable(&ticket).await
    }

    /// A revert that is prepared is not made: writes go on.
    fn give_up_prepared(&self) {
        let mut state = self.state.borrow_mut();
        state.held_told = None;
        if let Some(reverting) = state.reverting.take() {
            state.held = reverting.held_before;
        }
    }

    fn prepared(state: &mut State, group: Uuid) -> Result<&mut Reverting> {
        match &mut state.reverting {
            Some(reverting) if reverting.group.is_some_and(|(id, _)| id == group) => Ok(reverting),
            _ => Err(Error::State(format!("no revert of group {group} is prepared"))),
        }
    }

    fn in_journal(&self, state: &State) -> Result<()> {
        if state.mode != Mode::Journal {
            return Err(Error::State(format!(
                "volume {:?} is not protected: there is no history to go back to",
                state.name
            )));
        }
        // A disk that has failed is left as soon as the destager comes to it: what is reverted until then would be lost.
        state.attach.as_ref().map_or(Ok(()), |attach| attach.disk.check())
    }

    /// What the revert would change, and the room that it needs.
    async fn estimate(
        self: &Rc<Self>,
        engine: &Rc<Engine>,
        request: &RevertRequest,
    ) -> Result<(RevertReport, Touched)> {
        self.serving()?;
        {
            let state = self.state.borrow();
            self.in_journal(&state)?;
            if !state.on && !request.dry_run {
                return Err(Error::State(format!(
                    "volume {:?} is switched off: `enable` it first, so that the revert can be undone",
                    state.name
                )));
            }
            let pending =
                |log: &&Rc<Log>| log.state.borrow().revert.as_ref().is_some_and(|revert| !revert.left.is_empty());
            let pending = state.logs.iter().filter(pending).count();
            if pending >= REVERT_DEPTH as usize && !request.dry_run {
                return Err(Error::State(format!(
                    "{pending} reverts of volume {:?} wait to be copied: what they bring back could not be told any more",
                    state.name
                )));
            }
        }
        let now = engine.tick().await?;
        self.viewable(request.target, now)?;
        let changed = self.touched_since(request.target, None).await?;
        let state = self.state.borrow();
        let attach = state.attach.as_ref().ok_or_else(|| Error::Gone("the CDP disk is offline".into()))?;
        let segment_size = attach.disk.geometry.segment_size;
        let first = state.logs.iter().rposition(|l| l.start <= request.target).unwrap_or(0);
        // What an earlier revert still has to copy takes room as well.
        let pending = Self::revert_segments(&state, usable_bytes(segment_size));
        let kept: u64 = pending + state.logs.iter().skip(first).map(|l| l.segments_bound()).sum::<u64>();
        let report = RevertReport {
            instant: now,
            target: request.target,
            blocks: changed.len(),
            bytes: changed.len() * BLOCK,
            needed_bytes: segments_for(&changed, segment_size) * segment_size,
            available_bytes: attach.capacity.saturating_sub(kept + 4) * segment_size,
        };
        Ok((report, changed))
    }

    /// Everything up to the point of no return; after it writes wait.
    async fn prepare(self: &Rc<Self>, engine: &Rc<Engine>, request: &RevertRequest, group: Option<Uuid>) -> Result<()> {
        let (report, changed) = self.estimate(engine, request).await?;
        let writers = self.state.borrow().clients.values().filter(|c| c.writable).count();
        if writers > 0 && !request.force {
            return Err(Error::State(format!(
                "{writers} client(s) hold volume {:?} open for writing: stop them, or use force",
                self.name()
            )));
        }
        let (needed, free) = (report.needed_bytes, report.available_bytes);
        if needed > free {
            return Err(Error::NoSpace { what: "revert", needed, free });
        }
        let held_before = self.state.borrow().held;
        if request.force {
            // Clients are disconnected, and stay out until release: a guest with stale caches must not write over the reverted state.
            let mut state = self.state.borrow_mut();
            state.held_told = Some(held_before);
            state.held = !request.release && (writers > 0 || held_before);
        }
        let reverting = Reverting { report, changed, group: group.map(|id| (id, None)), held_before };
        let ready = self.settle(engine, request, reverting).await;
        if ready.is_err() {
            let mut state = self.state.borrow_mut();
            state.held = held_before;
            state.held_told = None;
            state.turning_away = false;
            state.reverting = None;
        }
        ready
    }

    /// Clients go, writes wait, room is made.
    async fn settle(self: &Rc<Self>, engine: &Rc<Engine>, request: &RevertRequest, reverting: Reverting) -> Result<()> {
        if request.force {
            // One that comes back before the last request of its old connection has ended would be waited for in vain.
            self.state.borrow_mut().turning_away = true;
            self.disconnect_all();
            self.until_writers_gone(engine.config().stall_max_ns).await?;
        }
        let estimated_at = reverting.report.instant;
        {
            let mut state = self.state.borrow_mut();
            self.in_journal(&state)?;
            // From here on no write is admitted, and the target's log stays.
            state.reverting = Some(reverting);
            state.turning_away = false;
        }
        // Capacity or age may have taken the target's log meanwhile.
        self.viewable(request.target, estimated_at)?;
        // What was written since the estimate, perhaps into logs that have been closed by now.
        let since = self.touched_since(estimated_at, None).await?;
        let segments = {
            let mut state = self.state.borrow_mut();
            let size = state.attach.as_ref().map(|a| a.disk.geometry.segment_size);
            let size = size.ok_or_else(|| Error::Gone("the CDP disk is offline".into()))?;
            let reverting = state.reverting.as_mut().expect("set above, under the admin lock");
            reverting.changed.union(&since);
            let segments = segments_for(&reverting.changed, size);
            let report = &mut reverting.report;
            report.blocks = reverting.changed.len();
            report.bytes = report.blocks * BLOCK;
            report.needed_bytes = segments * size;
            segments
        };
        self.make_room(request.target, segments).await
    }

    /// The revert happens, in one step. The next log begins at the revert's own instant, so every instant from the revert on resolves in it.
    fn switch(self: &Rc<Self>, instant: Instant) -> Result<(RevertReport, Option<Rc<Ticket>>)> {
        let mut state = self.state.borrow_mut();
        state.held_told = None;
        if state.mode != Mode::Journal || state.disk_failed() {
            if let Some(reverting) = state.reverting.take() {
                state.held = reverting.held_before;
            }
            return Err(Error::Gone("the CDP disk failed before the revert: the volume stands as it was".into()));
        }
        let closing = Rc::clone(state.logs.back().ok_or_else(|| Error::Gone("no active log".into()))?);
        let reverting = state.reverting.take().ok_or_else(|| Error::State("no revert is prepared".into()))?;
        let (left, target) = (reverting.changed, reverting.report.target);
        for log in &state.logs {
            log.state.borrow_mut().hints.remove_since(target.after());
        }
        state.instant_last = state.instant_last.max(instant);
        // What the target shows need not be what a flush has left.
        state.wrote_since_flush = true;
        let total = left.len();
        if reverting.group.is_none() {
            self.push_revert(&mut state, &closing, instant, target, total, &[]);
        }
        if total > 0 {
            let pending = PendingRevert { instant, target, left, total, done: 0, next_block: 0 };
            closing.state.borrow_mut().revert = Some(pending);
        }
        self.rotate(&mut state, instant, true, CloseReason::Reverted);
        let ticket = state.open.back().map(|f| Rc::clone(&f.ticket));
        Ok((RevertReport { instant, ..reverting.report }, ticket))
    }

    /// The revert's record, the last event of a log. That the export is held goes into the same frame: a crash before the next log must not let in a guest whose caches
    /// are of before the revert.
    fn push_revert(
        &self,
        state: &mut State,
        log: &Rc<Log>,
        instant: Instant,
        target: Instant,
        blocks: u64,
        ids: &[u8],
    ) -> Rc<Ticket> {
        let settings = state.held.then(|| ControlSettings { held: 1, ..Self::settings_row(state) });
        let frame = self.open_frame(state, log, 0, true);
        if let Some(row) = settings {
            frame.builder.push_control(ControlKind::Settings, Instant::ZERO, 0, 0, row.as_bytes());
        }
        frame.builder.push_revert(instant, target, blocks, ids);
        Rc::clone(&frame.ticket)
    }

    /// Ends when the next log is durable.
    async fn switched(self: &Rc<Self>, report: RevertReport, ticket: Option<Rc<Ticket>>) -> Result<RevertReport> {
        self.changed.notify();
        if let Some(ticket) = ticket.filter(|_| !active(Mutation::RevertNotDurable)) {
            self.durable(&ticket).await?;
        }
        if let Err(error) = self.refence().await {
            tracing::warn!(volume = %self.id, %error, "the fence does not know yet that the export is held; the journal does");
        }
        self.event(
            EventKind::Reverted,
            format!("to {} at {}; {} blocks to copy", report.target, report.instant, report.blocks),
        );
        Ok(report)
    }

    /// Clients that were asked to go finish the requests that they have under way; that takes no longer than a stall may.
    async fn until_writers_gone(self: &Rc<Self>, wait_ns: u64) -> Result<()> {
        let gone = self.changed.until(|| self.state.borrow().clients.values().all(|c| !c.writable).then_some(()));
        futures::pin_mut!(gone);
        match select(gone, self.host.sleep(wait_ns)).await {
            Either::Left(_) => Ok(()),
            Either::Right(_) => Err(Error::State(format!(
                "clients of volume {:?} were asked to go and did not: nothing was reverted",
                self.name()
            ))),
        }
    }

    /// Logs older than the target go until the revert has the room that it needs.
    async fn make_room(self: &Rc<Self>, target: Instant, segments: u64) -> Result<()> {
        loop {
            {
                let mut state = self.state.borrow_mut();
                self.in_journal(&state)?;
                let Some(attach) = state.attach.clone() else {
                    return Err(Error::Gone("the CDP disk is offline".into()));
                };
                let usable = usable_bytes(attach.disk.geometry.segment_size);
                let bound = Self::total_bound(&state) + Self::revert_segments(&state, usable);
                if bound + segments + 2 <= attach.capacity {
                    return Ok(());
                }
                let older = state.logs.get(1).is_some_and(|second| second.start <= target);
                if state.leaving.is_empty() {
                    if !older || !Self::oldest_can_go(&state) {
                        let free = attach.capacity.saturating_sub(bound) * attach.disk.geometry.segment_size;
                        let needed = segments * attach.disk.geometry.segment_size;
                        return Err(Error::NoSpace { what: "revert", needed, free });
                    }
                    self.evict_for_capacity(&mut state);
                }
            }
            self.changed
                .until(|| {
                    let state = self.state.borrow();
                    (state.leaving.is_empty() || state.mode != Mode::Journal || state.disk_failed()).then_some(())
                })
                .await;
        }
    }

    /// Ends when no revert is pending.
    pub async fn revert_done(self: &Rc<Self>) -> Result<()> {
        self.changed
            .until(|| {
                let state = self.state.borrow();
                if state.mode == Mode::Closed {
                    return Some(Err(Error::Gone("the volume is closed".into())));
                }
                if state.lost_blocks.is_some() {
                    return Some(Err(Error::State(state.health_reason.clone())));
                }
                state.logs.iter().all(|l| l.state.borrow().revert.is_none()).then_some(Ok(()))
            })
            .await
    }

    /// Lets clients in again after a forced revert.
    pub async fn release(self: &Rc<Self>) -> Result<()> {
        let _lock = self.lock_admin().await;
        self.settled().await?;
        if std::mem::replace(&mut self.state.borrow_mut().held, false) && self.state.borrow().mode == Mode::Journal {
            let ticket = self.store_settings();
            match self.durable(&ticket).await {
                // The journal that held the volume is being left; the fence of that says how it is now, or is told below.
                Err(Error::Gone(_) | Error::Device { .. }) => self.settled().await?,
                result => result?,
            }
        }
        self.refence().await?;
        let fence = self.state.borrow().fence.clone();
        match fence.filter(|fence| fence.held && fence.state == FenceState::Detached) {
            Some(fence) => self.put_fence(FenceState::Detached, fence.disk, &fence.reason).await,
            None => Ok(()),
        }
    }
}

/// Segments that the before-images of so many blocks fill.
fn segments_for(blocks: &Touched, segment_size: u64) -> u64 {
    (blocks.len() * (BLOCK + 128)).div_ceil(usable_bytes(segment_size)) + 2
}
