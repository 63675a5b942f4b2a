//! How fast the copying behind reverts is, and when it will be done: looked at four times a second, told in `Info`, in `WaitRevert`, and as an event
//! after a second and every ten seconds.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cdp_journal::info::RevertProgress;
use cdp_proto::v1::EventKind;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::control::Control;

const ROUND: Duration = Duration::from_millis(250);
/// Rounds before the first event, and between any two.
const TELL_FIRST_ROUNDS: u32 = 4;
const TELL_ROUNDS: u32 = 40;
/// Weight of the newest round in the rate: a change shows within some five seconds, and one slow moment does not.
const WEIGHT: f64 = 0.1;

/// Rates of pending reverts by volume.
#[derive(Default)]
pub struct Copying {
    known: Mutex<HashMap<Uuid, Rate>>,
}

#[derive(Clone, Copy, Debug)]
struct Rate {
    /// Instant of the revert that it is about.
    revert: u64,
    seen: Instant,
    done: u64,
    blocks_per_s: Option<f64>,
    rounds: u32,
}

impl Rate {
    fn begin(revert: &RevertProgress, now: Instant) -> Self {
        Self { revert: revert.instant.0, seen: now, done: revert.blocks_done, blocks_per_s: None, rounds: 0 }
    }

    /// Takes another look.
    fn look(&mut self, revert: &RevertProgress, now: Instant) {
        let spent = now.saturating_duration_since(self.seen).as_secs_f64();
        if self.revert != revert.instant.0 || revert.blocks_done < self.done {
            *self = Self::begin(revert, now);
        } else if spent > 0.0 {
            let lately = (revert.blocks_done - self.done) as f64 / spent;
            let rate = self.blocks_per_s.map_or(lately, |before| before + WEIGHT * (lately - before));
            *self = Self {
                seen: now,
                done: revert.blocks_done,
                blocks_per_s: Some(rate),
                rounds: self.rounds + 1,
                ..*self
            };
        }
    }

    /// Blocks a second, and seconds until it is done; zeroes while they are not known.
    fn forecast(&self, revert: &RevertProgress) -> (u64, u64) {
        match self.blocks_per_s.filter(|rate| *rate >= 1.0 && self.revert == revert.instant.0) {
            None => (0, 0),
            Some(rate) => {
                let left = revert.blocks_total.saturating_sub(revert.blocks_done);
                (rate as u64, (left as f64 / rate).ceil().max(1.0) as u64)
            }
        }
    }
}

impl Copying {
    /// Blocks a second and seconds left of a volume's pending revert; zeroes while they are not known.
    pub fn forecast(&self, volume: Uuid, revert: &RevertProgress) -> (u64, u64) {
        self.known.lock().get(&volume).map_or((0, 0), |rate| rate.forecast(revert))
    }

    /// Takes a look at the pending reverts; answers those that are due for an event.
    fn look(&self, pending: &[(Uuid, RevertProgress)], now: Instant) -> Vec<(Uuid, RevertProgress)> {
        let mut known = self.known.lock();
        known.retain(|volume, _| pending.iter().any(|(id, _)| id == volume));
        let mut due = Vec::new();
        for (volume, revert) in pending {
            let rate = known.entry(*volume).or_insert_with(|| Rate::begin(revert, now));
            rate.look(revert, now);
            if rate.rounds == TELL_FIRST_ROUNDS || (rate.rounds > 0 && rate.rounds.is_multiple_of(TELL_ROUNDS)) {
                due.push((*volume, *revert));
            }
        }
        due
    }
}

/// Looks at the copying for as long as the control plane lives.
pub async fn watch(control: Weak<Control>) {
    loop {
        tokio::time::sleep(ROUND).await;
        let Some(control) = control.upgrade() else { return };
        round(&control).await;
    }
}

async fn round(control: &Arc<Control>) {
    let pending = control.pending_reverts().await;
    for (volume, revert) in control.copying.look(&pending, Instant::now()) {
        let (rate, eta) = control.copying.forecast(volume, &revert);
        let (done, total) = (revert.blocks_done, revert.blocks_total);
        let left = if rate == 0 {
            "it stands still".to_owned()
        } else {
            format!("about {eta} s left at {rate} blocks a second")
        };
        let message = format!("the revert to {}: {done} of {total} blocks copied, {left}", revert.target);
        control.events().publish_now(EventKind::RevertProgress, Some(volume), None, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(instant: u64, done: u64) -> RevertProgress {
        let instant = cdp_journal::Instant(instant);
        RevertProgress { instant, target: cdp_journal::Instant(1), blocks_total: 1000, blocks_done: done }
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds_and_a_new_revert_begins_anew() {
        let (copying, volume, start) = (Copying::default(), Uuid::from_u128(1), Instant::now());
        let mut due = Vec::new();
        for round in 0..=40 {
            let now = start + ROUND * round;
            due = copying.look(&[(volume, progress(7, u64::from(round) * 5))], now);
            assert_eq!(due.len(), usize::from(round == 4 || round == 40), "round {round}");
        }
        assert_eq!(due[0].1.blocks_done, 200);
        assert_eq!(copying.forecast(volume, &progress(7, 200)), (20, 40));
        // Another revert of the same volume has no rate yet.
        assert_eq!(copying.forecast(volume, &progress(8, 0)), (0, 0));
        copying.look(&[(volume, progress(8, 0))], start + ROUND * 41);
        assert_eq!(copying.forecast(volume, &progress(8, 0)), (0, 0));
        // Nothing moves: no rate, and no time left that would be a guess.
        copying.look(&[(volume, progress(8, 0))], start + ROUND * 42);
        assert_eq!(copying.forecast(volume, &progress(8, 0)), (0, 0));
        copying.look(&[], start + ROUND * 43);
        assert_eq!(copying.forecast(volume, &progress(8, 500)), (0, 0));
    }
}
