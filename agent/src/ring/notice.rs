//! A flag between those who put something into an inbox and the one who looks into it, so that only the first of many has to wake
//! the reader. `loom/` checks its interleavings.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering};

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Notice(AtomicBool);

impl Notice {
    /// Puts something into the inbox, and then wakes the reader, unless somebody else has done so.
    ///
    /// # Errors
    /// What `put` answers: nothing was put in, and nobody is woken.
    pub(super) fn put<E>(&self, put: impl FnOnce() -> Result<(), E>, wake: impl FnOnce()) -> Result<(), E> {
        put()?;
        if !self.0.swap(true, Ordering::AcqRel) {
            wake();
        }
        Ok(())
    }

    /// Empties the inbox, again and again until nothing was put in since the last time. What is put in after that comes with a wake-up.
    pub(super) fn look(&self, mut empty: impl FnMut()) {
        // Down before the look, so that nothing put in after it goes unseen.
        while self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::AcqRel) {
            empty();
        }
    }
}
