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
    /// Called after something was put into the inbox. True: the reader has to be woken, since nobody else has done so.
    pub(super) fn raise(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Called before the look into the inbox, so that nothing put in after it goes unseen. False: nothing was put in since the
    /// last look, or whoever did is about to wake the reader.
    pub(super) fn take(&self) -> bool {
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::AcqRel)
    }
}
