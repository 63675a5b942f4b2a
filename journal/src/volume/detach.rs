//! The way out when the CDP disk fails (design part 6): the guest sees no error, protection goes off loudly, and no gap is ever presented as history.
//!
//! Order: fence `Detaching` → the backlog goes from memory to the primary and is synced → fence `Detached`, durable → acks that waited → unprotected.

use std::rc::Rc;

use futures::future::{Either, select};

use super::{FENCE_PATIENCE_NS, Mode, Volume, destage, whole_mask};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::fence::FenceState;
use crate::info::{EventKind, Health};
use crate::overlay::{Content, Item, compose};

impl Volume {
    /// Runs on the destager's task, so that nothing else writes to the primary meanwhile.
    pub(crate) async fn leave_failed_disk(self: &Rc<Self>, disk: &Rc<Disk>) {
        let reason = disk.failure().unwrap_or_else(|| "unknown".into());
        // Where it is being left in order everything is on the primary already, and the fence is about to say so; unless that fails.
        self.changed.until(|| (!self.left_in_order.get()).then_some(())).await;
        // New requests wait from here on.
        {
            let mut state = self.state.borrow_mut();
            let attached = state.attach.as_ref().is_some_and(|a| Rc::ptr_eq(&a.disk, disk));
            if state.mode == Mode::Closed || !attached {
                return;
            }
            state.mode = Mode::Switching;
            state.health = Health::Offline;
            state.health_reason = format!("CDP disk {}: {reason}", disk.path);
            // Whether the primary takes what is in memory is for this way out to see.
            state.primary_failing = None;
        }
        self.event(EventKind::Offline, format!("protection is off: {reason}"));
        self.kick.notify();
        self.changed.notify();
        let views: Vec<_> = self.state.borrow().views.values().cloned().collect();
        for view in views {
            view.lose(&format!("the CDP disk failed: {reason}"));
            self.event(EventKind::ViewLost, format!("view {}: the CDP disk failed", view.id()));
        }
        self.changed.until(|| (!self.state.borrow().appender_running).then_some(())).await;
        if let Err(error) = self.leave_for_primary(disk, &reason).await {
            // A stop has waited long enough. The fence says what was reached, and those who wait for their frames hold what the stop needs.
            tracing::error!(volume = %self.id, %error, "the failed CDP disk was not left");
            let tickets = self.state.borrow_mut().take_tickets();
            tickets.iter().for_each(|ticket| ticket.finish(Err(error.clone())));
        }
    }

    async fn leave_for_primary(self: &Rc<Self>, disk: &Rc<Disk>, reason: &str) -> Result<()> {
        self.persist_fence(FenceState::Detaching, disk, reason).await?;
        // The backlog, oldest log first: each block's versions in order, so the newest one ends up on the primary.
        self.give_up_reverts();
        self.backlog_to_primary().await?;
        // What was overwritten is on the primary, and no before-image of it is taken any more.
        self.state.borrow_mut().stale_blocks.clear();
        let lost = self.state.borrow().lost_blocks.as_ref().map(|l| l.len());
        let reason = match lost {
            Some(blocks) => {
                format!("{blocks} blocks of a revert were lost with the CDP disk ({reason})")
            }
            None => reason.to_owned(),
        };
        self.persist_fence(FenceState::Detached, disk, &reason).await?;
        let (logs, tickets) = {
            let mut state = self.state.borrow_mut();
            state.attach = None;
            // This is the destager's own task, so none of them is on its way.
            state.punch.clear();
            state.markers.clear();
            state.sizes.clear();
            state.primary_failing = None;
            let tickets = state.take_tickets();
            state.leaving.clear();
            let logs = std::mem::take(&mut state.logs);
            if state.mode == Mode::Switching {
                state.mode = Mode::Direct;
            }
            if state.lost_blocks.is_some() {
                state.health = Health::RevertIncomplete;
            } else if !state.on && state.health == Health::Offline {
                // Switched off: history is gone, but nobody waits for protection.
                state.health = Health::Ok;
                state.health_reason.clear();
            }
            (logs, tickets)
        };
        for log in logs {
            log.state.borrow_mut().gone = true;
        }
        let _ = disk.reserve(self.id, 0, true);
        // What waited for its frame is on the primary now.
        for ticket in tickets {
            ticket.finish(Ok(()));
        }
        self.changed.notify();
        self.work.notify();
        self.kick.notify();
        Ok(())
    }

    /// Tries until the state directory holds the fence: without it no unprotected write may be acked. An error once the volume is closed, or a stop has waited
    /// for [`FENCE_PATIENCE_NS`].
    pub(crate) async fn persist_fence(self: &Rc<Self>, fence: FenceState, disk: &Rc<Disk>, reason: &str) -> Result<()> {
        let mut pause = 10_000_000;
        while let Err(error) = self.put_fence(fence, disk.id, reason).await {
            tracing::error!(volume = %self.id, %error, "fence");
            if self.engine()?.stopping_for(FENCE_PATIENCE_NS) {
                return Err(error);
            }
            self.wait_unless_closed(error, pause).await?;
            pause = (pause * 2).min(5_000_000_000);
        }
        Ok(())
    }

    /// A pause before what failed is tried again; the error itself once a stop has waited long enough and the volume is closed.
    async fn wait_unless_closed(&self, error: Error, pause_ns: u64) -> Result<()> {
        let closed = || (self.state.borrow().mode == Mode::Closed).then_some(());
        let closed = self.changed.until(closed);
        futures::pin_mut!(closed);
        match select(closed, self.host.sleep(pause_ns)).await {
            Either::Left(_) => Err(error),
            Either::Right(_) => Ok(()),
        }
    }

    /// Writes everything that is not on the primary from memory, and syncs; again and again until it holds, or the volume is closed.
    async fn backlog_to_primary(self: &Rc<Self>) -> Result<()> {
        let logs: Vec<_> = self.state.borrow().logs.iter().cloned().collect();
        for log in logs {
            let items = log.state.borrow().overlay.everything();
            let mut pause = 100_000_000;
            while let Err(error) = self.write_items(&items).await {
                self.note_primary_failing(&error);
                // Guests whose writes are in memory alone have waited long enough: what a plain disk would answer. The writes stay, and are tried again.
                let tickets = {
                    let mut state = self.state.borrow_mut();
                    let patience_over = self.primary_error_for_guest(&state).is_some();
                    if patience_over { state.take_tickets() } else { Vec::new() }
                };
                tickets.iter().for_each(|ticket| ticket.finish(Err(error.clone())));
                self.wait_unless_closed(error, pause).await?;
                pause = (pause * 2).min(5_000_000_000);
            }
            self.note_primary_recovered();
            log.state.borrow_mut().overlay.clear();
        }
        Ok(())
    }

    async fn write_items(self: &Rc<Self>, items: &[Item]) -> Result<()> {
        let mut writes = Vec::with_capacity(items.len());
        for item in items {
            match &item.content {
                Content::Zero => writes.push(destage::Write::Zero(item.block, item.count)),
                Content::Data(data, 0xFF) => destage::push_write(&mut writes, item.block, data.clone()),
                // Whole blocks, so that a power cut in the middle damages no neighbour; where the rest cannot be read, what there is.
                Content::Data(data, mask) => match self.read_old(item.block, 1).await {
                    Ok(base) => destage::push_write(&mut writes, item.block, compose(&base, data, *mask)),
                    Err(error) if self.state.borrow().mode == Mode::Closed => return Err(error),
                    Err(_) => destage::push_sectors(&mut writes, item.block, data, *mask),
                },
            }
        }
        self.write_and_sync(&writes).await
    }

    /// Blocks of a pending revert that were not copied existed only on the lost disk.
    fn give_up_reverts(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let mut lost = crate::index::Touched::default();
        for log in &state.logs {
            let mut inner = log.state.borrow_mut();
            // What was written whole after the revert will be on the primary.
            for item in inner.overlay.everything() {
                let whole = whole_mask(state.size, item.block);
                if !matches!(item.content, Content::Data(_, mask) if mask & whole != whole) {
                    lost.remove_range(item.block, item.count);
                }
            }
            if let Some(revert) = inner.revert.take() {
                lost.union(&revert.left);
                inner.revert_lost = true;
            }
        }
        // Reads under way look again.
        self.image_epoch.set(self.image_epoch.get() + 1);
        if !lost.is_empty() {
            let blocks = lost.len();
            state.lost_blocks.get_or_insert_with(Default::default).union(&lost);
            state.health = Health::RevertIncomplete;
            state.health_reason = format!(
                "{blocks} blocks of a pending revert were lost with the CDP disk: they read as errors until overwritten"
            );
            self.event_later(EventKind::RevertIncomplete, format!("{blocks} blocks were lost"));
        }
    }
}
