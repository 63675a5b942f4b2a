//! How other threads wake a task of this one: the task goes through a channel, and an eventfd ends the ring's wait.
//!
//! Wake-ups on the ring's own thread touch neither: they push onto a thread-local queue.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_task::Runnable;
use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::notice::Notice;

thread_local! {
    static READY: RefCell<VecDeque<Runnable>> = const { RefCell::new(VecDeque::new()) };
    /// Number of the executor on this thread; 0: none.
    static EXECUTOR: Cell<u64> = const { Cell::new(0) };
}

static EXECUTOR_NEXT: AtomicU64 = AtomicU64::new(1);

/// The executor as other threads see it.
pub(super) struct Remote {
    executor: u64,
    inbox: Sender<Runnable>,
    /// Something was put into the inbox and not yet looked at.
    noticed: Notice,
    eventfd: EventFd,
}

impl Remote {
    /// Claims this thread for a new executor.
    pub(super) fn for_this_thread() -> io::Result<(Arc<Self>, Receiver<Runnable>)> {
        if EXECUTOR.get() != 0 {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "this thread has an executor already"));
        }
        let eventfd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        let executor = EXECUTOR_NEXT.fetch_add(1, Ordering::Relaxed);
        let (inbox, received) = crossbeam_channel::unbounded();
        EXECUTOR.set(executor);
        Ok((Arc::new(Self { executor, inbox, noticed: Notice::default(), eventfd }), received))
    }

    /// Makes a task ready, from any thread.
    pub(super) fn schedule(&self, runnable: Runnable) {
        if EXECUTOR.try_with(Cell::get) == Ok(self.executor) {
            return make_ready(runnable);
        }
        // Waking can fail only when the counter is full, and then the reader is awake anyway.
        let wake = || _ = self.eventfd.write(1);
        if let Err(refused) = self.noticed.put(|| self.inbox.send(runnable), wake) {
            // The executor is gone. A task must not be dropped on a foreign thread; its memory is all that is lost.
            std::mem::forget(refused.into_inner());
        }
    }

    /// Has the inbox emptied, if there is something in it.
    pub(super) fn look(&self, empty: impl FnMut()) {
        self.noticed.look(empty);
    }

    /// A second descriptor of the eventfd, for the ring to read.
    pub(super) fn eventfd(&self) -> Rc<OwnedFd> {
        use std::os::fd::AsFd as _;
        Rc::new(self.eventfd.as_fd().try_clone_to_owned().expect("one descriptor more, at the thread's start"))
    }
}

/// Appends to this thread's queue.
pub(super) fn make_ready(runnable: Runnable) {
    let mut runnable = Some(runnable);
    let _ = READY.try_with(|ready| ready.borrow_mut().extend(runnable.take()));
    // The thread's locals are already gone (it is ending): the task stays where it is.
    std::mem::forget(runnable);
}

/// The next task of this thread's queue.
pub(super) fn next_ready() -> Option<Runnable> {
    READY.with_borrow_mut(VecDeque::pop_front)
}

/// Whether this thread's queue holds a task.
pub(super) fn has_ready() -> bool {
    READY.with_borrow(|ready| !ready.is_empty())
}

impl super::Inner {
    /// Lets the thread have another executor.
    pub(super) fn leave_thread(&self) {
        EXECUTOR.set(0);
    }
}
