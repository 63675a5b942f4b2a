//! The host's one clock: `max(previous + 1, CLOCK_REALTIME)`, shared by all shards.
//!
//! Every instant that is given out or resolved passes here, so instants are unique, strictly increasing and never step back
//! with the wall clock; and since they come from one place, any instant is a crash-consistent cut across all volumes of the
//! host. A high-water mark, reserved ahead and durable on each CDP disk and in the state directory, keeps that true across a
//! restart: no instant at or past the mark is given out before the mark was raised durably.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

use crate::types::Instant;

/// How far ahead of the instants given out the mark is reserved, nanoseconds. Also the longest wait of the first write
/// after a crash.
pub const RESERVE_AHEAD_NS: u64 = 500_000_000;

/// See the module's text. All shards share one behind an `Arc`.
#[derive(Debug, Default)]
pub struct HostClock {
    previous: AtomicU64,
    high_water: AtomicU64,
}

impl HostClock {
    /// A clock that goes on after `high_water` (0 on a host that never ran).
    pub fn new(high_water: Instant) -> Self {
        Self { previous: AtomicU64::new(high_water.0), high_water: AtomicU64::new(high_water.0) }
    }

    /// A new, unique instant, or `None` when the mark must be raised first (see [`HostClock::high_water_wanted`]).
    ///
    /// Cost: one compare-and-swap on a cache line that the shards share; about 20 ns, once per request.
    pub fn tick(&self, wall_ns: u64) -> Option<Instant> {
        let high_water = self.high_water.load(Ordering::Acquire);
        let mut previous = self.previous.load(Ordering::Relaxed);
        loop {
            let next = wall_ns.max(previous + 1);
            if next >= high_water {
                return None;
            }
            // AcqRel: whoever sees a later instant also sees what was done before the earlier one was given out.
            match self.previous.compare_exchange_weak(previous, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Some(Instant(next)),
                Err(now) => previous = now,
            }
        }
    }

    /// The newest instant given out.
    pub fn previous(&self) -> Instant {
        Instant(self.previous.load(Ordering::Acquire))
    }

    /// The durable mark.
    pub fn high_water(&self) -> Instant {
        Instant(self.high_water.load(Ordering::Acquire))
    }

    /// The mark to make durable next, if it is time: when less than half of the reserve is left.
    pub fn high_water_wanted(&self, wall_ns: u64) -> Option<Instant> {
        let now = wall_ns.max(self.previous().0);
        (now + RESERVE_AHEAD_NS / 2 >= self.high_water().0).then(|| Instant(now + RESERVE_AHEAD_NS))
    }

    /// Announces that `mark` is durable everywhere that it must be.
    pub fn raised(&self, mark: Instant) {
        self.high_water.fetch_max(mark.0, Ordering::AcqRel);
    }

    /// Never gives out an instant at or before `instant` from now on (found on a disk at start).
    pub fn past(&self, instant: Instant) {
        self.previous.fetch_max(instant.0, Ordering::AcqRel);
    }

    /// How far the clock runs ahead of the wall clock, nanoseconds.
    pub fn lead_ns(&self, wall_ns: u64) -> u64 {
        self.previous().0.saturating_sub(wall_ns)
    }
}
