//! Waiting inside one thread: tasks wait until a condition holds, whoever changes it calls [`Signal::notify`].

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// A place to wait for a change. Waiters re-check their own condition, so a spurious wake-up does no harm.
#[derive(Default)]
pub struct Signal {
    waiters: RefCell<Vec<Waker>>,
}

impl Signal {
    /// Wakes everyone who waits.
    pub fn notify(&self) {
        // The waiters are taken out first: a waker may run code that waits here again.
        let waiters = std::mem::take(&mut *self.waiters.borrow_mut());
        for waker in waiters {
            waker.wake();
        }
    }

    /// Waits until `condition` answers something.
    pub async fn until<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| match condition() {
            Some(value) => Poll::Ready(value),
            None => {
                let mut waiters = self.waiters.borrow_mut();
                if !waiters.last().is_some_and(|last| last.will_wake(context.waker())) {
                    waiters.push(context.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }
}

/// Lets the other tasks run once: the cut between slices of long computations.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// Runs a future that waits for nothing but its own turns, for tests and fuzzers: it is polled again and again, whether or not it was woken.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}
