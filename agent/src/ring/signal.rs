//! "Something changed": how one task of a thread tells another, without a lock and without losing a change.

use std::cell::RefCell;
use std::future::Future;
use std::task::{Poll, Waker};

/// Wakes the one task that waits for a condition over state that both share.
#[derive(Default)]
pub struct Signal {
    waiting: RefCell<Option<Waker>>,
}

impl Signal {
    /// Has the waiting task look at its condition again.
    pub fn notify(&self) {
        let waker = self.waiting.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ends as soon as `ready` gives something. One task at a time may wait: a second one takes the first one's place.
    pub fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> impl Future<Output = T> {
        std::future::poll_fn(move |context| match ready() {
            Some(value) => Poll::Ready(value),
            None => {
                let previous = self.waiting.borrow_mut().replace(context.waker().clone());
                drop(previous);
                Poll::Pending
            }
        })
    }
}
