//! A shard's executor: one thread, one io_uring, one queue of ready tasks.
//!
//! [`Ring::run`] repeats: run what is ready (a bounded batch), submit everything that these tasks asked for with **one**
//! system call, take the completions, wake their tasks. With nothing ready the same call waits, at most until the next timer.
//!
//! Invariants:
//! * Memory that the kernel may touch belongs to the operation's slot until its completion was reaped, also when the future
//!   that waits for it is dropped (`op.rs`).
//! * Tasks are polled, and dropped, on the ring's thread only; wakers may be used from any thread (`remote.rs`).
//! * A full submission queue never blocks and never loses an entry: entries wait in `overflow`, in order.

mod notice;
mod op;
mod remote;
mod signal;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use async_task::Runnable;
use cdp_journal::{Host, LocalFuture};
use futures::FutureExt as _;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};
use nix::time::{ClockId, clock_gettime};
use slab::Slab;

pub use op::{SendBatch, Vectored};
pub use signal::Signal;

use remote::Remote;

/// Entries of the submission queue; the completion queue has four times as many.
const SQ_ENTRIES: u32 = 512;
/// Tasks polled before requests are submitted and completions taken again.
const TASKS_PER_TURN: usize = 256;
/// Longest wait, so that the heartbeat moves also on an idle shard.
const IDLE_WAIT_NS: u64 = 250_000_000;
/// How long `run` waits, at its end, for the kernel to let go of buffers.
const LET_GO_NS: u64 = 5_000_000_000;

/// A handle on the thread's executor and io_uring. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Ring {
    inner: Rc<Inner>,
}

struct Inner {
    uring: RefCell<IoUring>,
    /// Entries that the submission queue had no room for.
    overflow: RefCell<VecDeque<squeue::Entry>>,
    slots: RefCell<Slab<op::Slot>>,
    timers: RefCell<BTreeMap<TimerKey, Option<Waker>>>,
    timer_next: Cell<u64>,
    /// Completions taken from the ring and not yet handed to their slots (kept to reuse its memory).
    reaped: RefCell<Vec<(u64, i32)>>,
    remote: Arc<Remote>,
    inbox: crossbeam_channel::Receiver<Runnable>,
    heartbeat: Arc<AtomicU64>,
}

/// Closes the executor when it goes, also when a task panics: whoever waits for an answer of another task must learn that none
/// comes.
struct Closing<'a>(&'a Ring);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Deadline on CLOCK_BOOTTIME and a number that tells timers with the same deadline apart.
type TimerKey = (u64, u64);

impl Ring {
    /// Makes the executor of this thread, with the best mode of io_uring that the kernel has.
    ///
    /// # Errors
    /// When the thread has one already, or the kernel offers no io_uring, or one older than 5.11 (no wait with a timeout).
    pub fn new() -> io::Result<Self> {
        let uring = open_uring()?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "io_uring is too old: Linux 5.11 or newer is needed",
            ));
        }
        let (remote, inbox) = Remote::for_this_thread()?;
        let ring = Self {
            inner: Rc::new(Inner {
                uring: RefCell::new(uring),
                overflow: RefCell::default(),
                slots: RefCell::new(Slab::with_capacity(SQ_ENTRIES as usize)),
                timers: RefCell::default(),
                timer_next: Cell::new(0),
                reaped: RefCell::default(),
                remote,
                inbox,
                heartbeat: Arc::default(),
            }),
        };
        let waker = ring.clone();
        ring.spawn(async move { waker.listen_for_other_threads().await });
        Ok(ring)
    }

    /// Runs `main`, and every task spawned beside it, until `main` ends. Tasks that are left are dropped.
    pub fn run<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> T {
        let _closing = Closing(self);
        let main = self.task(main);
        while !main.is_finished() {
            self.turn();
        }
        main.now_or_never().expect("a finished task has its output")
    }

    /// Runs `main` until it ends, and leaves the other tasks and the executor for the next call: for the fuzzers, since making and
    /// closing a ring takes longer than an input. After a panic the ring is closed.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn run_and_keep<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> T {
        let closing = Closing(self);
        let main = self.task(main);
        loop {
            self.run_ready();
            if main.is_finished() {
                break; // before the wait, which nothing might end
            }
            self.exchange();
        }
        std::mem::forget(closing);
        main.now_or_never().expect("a finished task has its output")
    }

    /// Runs a task beside the others, on this thread.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.task(task).detach();
    }

    /// Rises at least every quarter of a second while the thread is alive and not stuck in a task.
    pub fn heartbeat(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.inner.heartbeat)
    }

    /// Ends after at least `ns` nanoseconds of CLOCK_BOOTTIME.
    pub fn sleep_ns(&self, ns: u64) -> Sleep {
        let number = self.inner.timer_next.get();
        self.inner.timer_next.set(number + 1);
        Sleep { ring: Rc::clone(&self.inner), key: (self.boot_ns().saturating_add(ns), number), armed: false }
    }

    fn task<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> async_task::Task<T> {
        let remote = Arc::clone(&self.inner.remote);
        let (runnable, task) = async_task::spawn_local(future, move |runnable| remote.schedule(runnable));
        runnable.schedule();
        task
    }

    /// One round of the loop.
    fn turn(&self) {
        self.run_ready();
        self.exchange();
    }

    /// Polls tasks that are ready, a bounded batch of them.
    fn run_ready(&self) {
        for _ in 0..TASKS_PER_TURN {
            let Some(runnable) = remote::next_ready() else { break };
            runnable.run();
        }
    }

    /// The rest of a round: submits what the tasks asked for, waits if none is ready, wakes those whose operations are done.
    fn exchange(&self) {
        self.fire_timers();
        self.enter(remote::has_ready());
        self.reap();
        self.inner.remote.look(|| self.inner.inbox.try_iter().for_each(remote::make_ready));
        // One writer: a plain store is enough.
        let beats = self.inner.heartbeat.load(Ordering::Relaxed);
        self.inner.heartbeat.store(beats + 1, Ordering::Relaxed);
    }

    /// Submits what is queued; with nothing to run also waits for a completion or the next timer.
    fn enter(&self, busy: bool) {
        let inner = &*self.inner;
        let mut uring = inner.uring.borrow_mut();
        inner.refill(&mut uring);
        let completions = !uring.completion().is_empty();
        let (queued, deferred) = {
            let queue = uring.submission();
            (!queue.is_empty(), queue.taskrun() || queue.cq_overflow())
        };
        let result = if busy || completions {
            if !queued && !deferred {
                return;
            }
            uring.submit()
        } else {
            let wait_ns = match inner.timers.borrow().first_key_value() {
                Some((&(deadline, _), _)) => deadline.saturating_sub(self.boot_ns()).min(IDLE_WAIT_NS),
                None => IDLE_WAIT_NS,
            };
            let wait = Timespec::new().nsec(u32::try_from(wait_ns).unwrap_or(u32::MAX));
            uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&wait))
        };
        match result.map_err(|error| error.raw_os_error()) {
            // EBUSY, EAGAIN: the kernel wants completions taken, or memory; the entries stay queued.
            Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            // Anything else means that the ring itself is broken (EBADF, EFAULT): nothing on this thread can work.
            Err(errno) => panic!("io_uring_enter failed: {}", io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO))),
        }
    }

    /// Hands completions to their slots and wakes the tasks that wait for them.
    fn reap(&self) {
        let mut reaped = self.inner.reaped.take();
        reaped.extend(self.inner.uring.borrow_mut().completion().map(|entry| (entry.user_data(), entry.result())));
        for (user_data, result) in reaped.drain(..) {
            self.inner.complete(user_data, result);
        }
        self.inner.reaped.replace(reaped);
    }

    fn fire_timers(&self) {
        if self.inner.timers.borrow().is_empty() {
            return;
        }
        let now = self.boot_ns();
        loop {
            let waker = {
                let mut timers = self.inner.timers.borrow_mut();
                match timers.first_entry() {
                    Some(first) if first.key().0 <= now => first.remove(),
                    _ => return,
                }
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// Keeps a read armed on the eventfd by which other threads end the wait. What they want is in the inbox.
    async fn listen_for_other_threads(&self) {
        let eventfd = self.inner.remote.eventfd();
        let mut count = cdp_journal::IoBuf::zeroed(8);
        loop {
            let (result, buf) = self.read_at(&eventfd, count, 0, 8, 0).await;
            count = buf;
            match result {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) => return, // cancelled at the end of `run`
            }
        }
    }

    /// The end: asks the kernel to let go of everything, waits until it has, drops what is left of the tasks.
    fn close(&self) {
        let inner = &*self.inner;
        inner.cancel_all();
        let deadline = self.boot_ns() + LET_GO_NS;
        while inner.in_kernel() > 0 && self.boot_ns() < deadline {
            self.enter(false);
            self.reap();
        }
        let stuck = inner.in_kernel();
        if stuck > 0 {
            tracing::error!(
                operations = stuck,
                "the kernel still holds buffers of this shard; their memory is left to it"
            );
        }
        // A task lives as long as somebody may wake it. Dropping the wakers drops the tasks, which may drop further wakers.
        loop {
            let wakers: Vec<Waker> = (inner.slots.borrow_mut().iter_mut().filter_map(|(_, slot)| slot.take_waker()))
                .chain(std::mem::take(&mut *inner.timers.borrow_mut()).into_values().flatten())
                .collect();
            drop(wakers);
            let mut dropped = 0;
            inner.inbox.try_iter().for_each(remote::make_ready);
            while let Some(runnable) = remote::next_ready() {
                drop(runnable);
                dropped += 1;
            }
            if dropped == 0 {
                break;
            }
        }
        inner.leave_thread();
    }
}

impl Inner {
    /// Queues an entry; the next `enter` submits it.
    fn push(&self, entry: squeue::Entry) {
        let mut overflow = self.overflow.borrow_mut();
        if overflow.is_empty() && op::try_push(&mut self.uring.borrow_mut(), &entry) {
            return;
        }
        overflow.push_back(entry);
    }

    /// Moves what waited in `overflow` into the submission queue, submitting when it is full.
    fn refill(&self, uring: &mut IoUring) {
        let mut overflow = self.overflow.borrow_mut();
        while let Some(entry) = overflow.front() {
            if op::try_push(uring, entry) {
                overflow.pop_front();
            } else if !matches!(uring.submit(), Ok(n) if n > 0) {
                return; // the kernel takes no more now: completions first
            }
        }
    }
}

/// io_uring in the best mode that the kernel has, from the newest to the plainest.
fn open_uring() -> io::Result<IoUring> {
    let mut refused = None;
    for (mode, setup) in [("SINGLE_ISSUER + DEFER_TASKRUN", 3), ("COOP_TASKRUN", 2), ("SUBMIT_ALL", 1), ("plain", 0)] {
        for entries in [SQ_ENTRIES, SQ_ENTRIES / 8] {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(entries * 4).dontfork();
            match setup {
                3 => _ = builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all(),
                2 => _ = builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all(),
                1 => _ = builder.setup_submit_all(),
                _ => {}
            }
            match builder.build(entries) {
                Ok(uring) => {
                    match refused {
                        None => tracing::debug!(mode, entries, "io_uring is up"),
                        Some(reason) => {
                            let reason: io::Error = reason;
                            tracing::warn!(mode, entries, %reason, "io_uring is up in a slower mode than the best");
                        }
                    }
                    return Ok(uring);
                }
                Err(error) => refused = Some(error),
            }
        }
    }
    let reason = refused.unwrap_or_else(|| io::ErrorKind::Unsupported.into());
    let advice = "needed: Linux 5.11 or newer, kernel.io_uring_disabled = 0, a seccomp filter that lets io_uring pass";
    Err(io::Error::new(reason.kind(), format!("io_uring is not available: {reason} ({advice})")))
}

/// See [`Ring::sleep_ns`].
pub struct Sleep {
    ring: Rc<Inner>,
    key: TimerKey,
    armed: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let ring = Rc::clone(&self.ring);
        let mut timers = ring.timers.borrow_mut();
        if self.armed && !timers.contains_key(&self.key) {
            return Poll::Ready(());
        }
        self.armed = true;
        timers.insert(self.key, Some(context.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let waker = self.ring.timers.borrow_mut().remove(&self.key);
        drop(waker); // after the borrow: dropping a waker may drop a task, and with it another timer
    }
}

fn clock_ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock).expect("the kernel has this clock since 2.6.39");
    u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}

impl Host for Ring {
    fn wall_ns(&self) -> u64 {
        clock_ns(ClockId::CLOCK_REALTIME)
    }
    fn boot_ns(&self) -> u64 {
        clock_ns(ClockId::CLOCK_BOOTTIME)
    }
    fn sleep(&self, ns: u64) -> LocalFuture<'static, ()> {
        Box::pin(self.sleep_ns(ns))
    }
    fn spawn(&self, task: LocalFuture<'static, ()>) {
        Ring::spawn(self, task);
    }
    fn random_u64(&self) -> u64 {
        rand::random()
    }
}

#[cfg(test)]
mod tests;
