//! The seeded scheduler: which ready task runs next, how long each device call takes and what the clocks say are all drawn
//! from one generator, so a seed fixes the whole run. Every decision goes into a hash; equal seeds must give equal hashes.
//!
//! Time is virtual: it jumps to the next event when no task is ready (and now and then although one is: a slow processor).

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use cdp_journal::{Host, LocalFuture};

use crate::rng::{Rng, mix};

/// Why [`Executor::run`] came back.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The root task ended.
    Done,
    /// The armed crash point was reached.
    Crash,
    /// Somebody called [`Executor::halt`].
    Halted,
    /// No task is ready and no event will come: the root task waits for something that never happens.
    Stuck,
    /// The step limit was reached: something spins.
    Spinning,
}

/// What survives from one incarnation of the agent to the next: time and chance.
pub struct Shared {
    /// The one source of chance.
    pub rng: Rng,
    boot_ns: Cell<u64>,
    wall_offset_ns: Cell<u64>,
    hash: Cell<u64>,
    steps: Cell<u64>,
    /// Calls to what is outside the process; `None`: nobody asked for them.
    calls: RefCell<Option<Calls>>,
}

/// Steps in which anything outside the process was begun or went on while a crash was armed.
#[derive(Default)]
struct Calls {
    /// The step at which it was armed, and the one at which it was disarmed.
    armed: Option<(u64, Option<u64>)>,
    steps: Vec<u64>,
}

impl Shared {
    /// A host just booted; the wall clock says `wall_ns`.
    pub fn new(seed: u64, wall_ns: u64) -> Rc<Self> {
        Rc::new(Self {
            rng: Rng::new(seed),
            boot_ns: Cell::new(0),
            wall_offset_ns: Cell::new(wall_ns),
            hash: Cell::new(0),
            steps: Cell::new(0),
            calls: RefCell::default(),
        })
    }
    /// From now on remembers the steps of calls.
    pub fn record_calls(&self) {
        self.calls.replace(Some(Calls::default()));
    }
    /// Each last step before a call is begun, takes effect or is answered, and the last of all, while a crash was armed for the first time; counted from the step
    /// at which it was. A crash at any other step finds the same disks as one of these, and no more answers given to the guest.
    pub fn last_steps_before_calls(&self) -> Vec<u64> {
        let calls = self.calls.borrow();
        let Some(Calls { armed: Some((armed, Some(disarmed))), steps }) = &*calls else { return Vec::new() };
        // A crash counts only when it comes before the step that disarms it.
        let before = steps.iter().map(|step| step - 1).chain([disarmed - 1]);
        let mut before: Vec<u64> = before.filter_map(|step| step.checked_sub(*armed)).filter(|n| *n > 0).collect();
        before.dedup();
        before
    }
    fn note_call(&self) {
        if let Some(Calls { armed: Some((_, None)), steps }) = &mut *self.calls.borrow_mut()
            && steps.last() != Some(&self.steps())
        {
            steps.push(self.steps());
        }
    }
    fn note_armed(&self, armed: bool) {
        if let Some(calls) = &mut *self.calls.borrow_mut() {
            match (&mut calls.armed, armed) {
                (first @ None, true) => *first = Some((self.steps(), None)),
                (Some((_, end @ None)), false) => *end = Some(self.steps()),
                _ => {}
            }
        }
    }
    /// Folds an event into the hash of all events.
    pub fn note(&self, words: &[u64]) {
        self.hash.set(words.iter().fold(self.hash.get(), |hash, word| mix(hash ^ word)));
    }
    /// The hash of all events so far.
    pub fn hash(&self) -> u64 {
        self.hash.get()
    }
    /// Tasks polled and events fired so far.
    pub fn steps(&self) -> u64 {
        self.steps.get()
    }
    /// Nanoseconds since boot.
    pub fn boot_ns(&self) -> u64 {
        self.boot_ns.get()
    }
    /// The wall clock, nanoseconds.
    pub fn wall_ns(&self) -> u64 {
        self.boot_ns.get().wrapping_add(self.wall_offset_ns.get())
    }
    /// Steps the wall clock.
    pub fn step_wall(&self, by_ns: i64) {
        self.wall_offset_ns.set(self.wall_offset_ns.get().wrapping_add_signed(by_ns));
    }
    /// Lets time pass while nothing runs (the host is down).
    pub fn pass(&self, ns: u64) {
        self.boot_ns.set(self.boot_ns.get() + ns);
    }
}

type Ready = Arc<Mutex<Vec<u64>>>;

struct TaskWaker {
    id: u64,
    queued: AtomicBool,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.ready.lock().expect("no holder panics").push(self.id);
        }
    }
}

struct Task {
    future: LocalFuture<'static, ()>,
    waker: Arc<TaskWaker>,
}

type Action = Box<dyn FnOnce()>;

/// One incarnation of the agent's thread: its tasks and what they wait for. Dropping all of it is the process's death.
pub struct Executor {
    /// Time and chance.
    pub shared: Rc<Shared>,
    tasks: RefCell<BTreeMap<u64, Task>>,
    task_next: Cell<u64>,
    ready: Ready,
    events: RefCell<BinaryHeap<Reverse<(u64, u64)>>>,
    actions: RefCell<BTreeMap<u64, Action>>,
    event_next: Cell<u64>,
    crash_at_step: Cell<Option<u64>>,
    halted: Cell<bool>,
    dead: Cell<bool>,
}

/// Most steps of one incarnation.
const STEPS_MAX: u64 = 20_000_000;
/// How far a slow processor may fall behind an event, nanoseconds.
const SLOW_CPU_NS: u64 = 5_000_000;

impl Executor {
    /// A new incarnation.
    pub fn new(shared: Rc<Shared>) -> Rc<Self> {
        Rc::new(Self {
            shared,
            tasks: RefCell::default(),
            task_next: Cell::new(0),
            ready: Arc::default(),
            events: RefCell::default(),
            actions: RefCell::default(),
            event_next: Cell::new(0),
            crash_at_step: Cell::new(None),
            halted: Cell::new(false),
            dead: Cell::new(false),
        })
    }

    /// Calls `action` after `ns` nanoseconds of virtual time.
    pub fn after(&self, ns: u64, action: impl FnOnce() + 'static) {
        if self.dead.get() {
            return;
        }
        self.shared.note_call();
        let id = self.event_next.get();
        self.event_next.set(id + 1);
        self.events.borrow_mut().push(Reverse((self.shared.boot_ns() + ns, id)));
        self.actions.borrow_mut().insert(id, Box::new(action));
    }

    /// The process dies `steps` steps from now; `None` disarms.
    pub fn arm_crash(&self, steps: Option<u64>) {
        self.crash_at_step.set(steps.map(|n| self.shared.steps() + n));
        self.shared.note_armed(steps.is_some());
    }

    /// Whether a crash is armed.
    pub fn crash_armed(&self) -> bool {
        self.crash_at_step.get().is_some()
    }

    /// Makes [`Executor::run`] come back.
    pub fn halt(&self) {
        self.halted.set(true);
    }

    /// Runs `root` and everything it starts until `root` ends.
    pub fn run(&self, root: LocalFuture<'static, ()>) -> Outcome {
        let done = Rc::new(Cell::new(false));
        let flag = Rc::clone(&done);
        self.add(Box::pin(async move {
            root.await;
            flag.set(true);
        }));
        let last = self.shared.steps() + STEPS_MAX;
        loop {
            if done.get() {
                return Outcome::Done;
            }
            if self.halted.get() {
                return Outcome::Halted;
            }
            if self.crash_at_step.get().is_some_and(|at| self.shared.steps() >= at) {
                return Outcome::Crash;
            }
            if self.shared.steps() >= last {
                return Outcome::Spinning;
            }
            self.shared.steps.set(self.shared.steps() + 1);
            if !self.step() {
                return Outcome::Stuck;
            }
        }
    }

    /// Drops every task and event: the process is gone. What a destructor starts is dropped as well.
    pub fn kill(&self) {
        self.dead.set(true);
        loop {
            let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
            let actions = std::mem::take(&mut *self.actions.borrow_mut());
            self.events.borrow_mut().clear();
            if tasks.is_empty() && actions.is_empty() {
                return;
            }
        }
    }

    fn add(&self, future: LocalFuture<'static, ()>) {
        if self.dead.get() {
            return;
        }
        let id = self.task_next.get();
        self.task_next.set(id + 1);
        let waker = Arc::new(TaskWaker { id, queued: AtomicBool::new(true), ready: Arc::clone(&self.ready) });
        self.tasks.borrow_mut().insert(id, Task { future, waker });
        self.ready.lock().expect("no holder panics").push(id);
    }

    fn step(&self) -> bool {
        let ready_count = self.ready.lock().expect("no holder panics").len() as u64;
        let event_near =
            self.events.borrow().peek().is_some_and(|Reverse((at, _))| *at <= self.shared.boot_ns() + SLOW_CPU_NS);
        if ready_count == 0 || (event_near && self.shared.rng.one_in(16)) {
            return self.fire();
        }
        let place = self.shared.rng.below(ready_count) as usize;
        let id = self.ready.lock().expect("no holder panics").swap_remove(place);
        self.poll(id);
        true
    }

    fn fire(&self) -> bool {
        let Some(Reverse((at, id))) = self.events.borrow_mut().pop() else { return false };
        self.shared.note_call();
        self.shared.boot_ns.set(at.max(self.shared.boot_ns()));
        self.shared.note(&[1, at, id]);
        let action = self.actions.borrow_mut().remove(&id);
        if let Some(action) = action {
            action();
        }
        true
    }

    fn poll(&self, id: u64) {
        // The task is out of the table while it runs, so that it may start others.
        let Some(mut task) = self.tasks.borrow_mut().remove(&id) else { return };
        self.shared.note(&[2, id]);
        task.waker.queued.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&task.waker));
        if task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.tasks.borrow_mut().insert(id, task);
        }
    }
}

/// The engine's host: an executor and its clocks.
pub struct SimHost(pub Rc<Executor>);

impl Host for SimHost {
    fn wall_ns(&self) -> u64 {
        self.0.shared.wall_ns()
    }
    fn boot_ns(&self) -> u64 {
        self.0.shared.boot_ns()
    }
    fn sleep(&self, ns: u64) -> LocalFuture<'static, ()> {
        let done = Completion::new();
        let sender = done.clone();
        self.0.after(ns, move || sender.complete(()));
        Box::pin(done)
    }
    fn spawn(&self, task: LocalFuture<'static, ()>) {
        self.0.add(task);
    }
    fn random_u64(&self) -> u64 {
        self.0.shared.rng.bits()
    }
}

/// A value that comes later: both ends of it.
pub struct Completion<T>(Rc<RefCell<(Option<T>, Option<Waker>)>>);

impl<T> Clone for Completion<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T> Default for Completion<T> {
    fn default() -> Self {
        Self(Rc::new(RefCell::new((None, None))))
    }
}

impl<T> Completion<T> {
    /// Not there yet.
    pub fn new() -> Self {
        Self::default()
    }
    /// Hands over the value.
    pub fn complete(&self, value: T) {
        let waker = {
            let mut inner = self.0.borrow_mut();
            inner.0 = Some(value);
            inner.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Completion<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut inner = self.0.borrow_mut();
        match inner.0.take() {
            Some(value) => Poll::Ready(value),
            None => {
                inner.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64) -> (Vec<u64>, u64, u64) {
        let executor = Executor::new(Shared::new(seed, 1_000));
        let host = Rc::new(SimHost(Rc::clone(&executor)));
        let seen = Rc::new(RefCell::new(Vec::new()));
        let (h, s) = (Rc::clone(&host), Rc::clone(&seen));
        let outcome = executor.run(Box::pin(async move {
            for i in 0..20u64 {
                let (h2, s2) = (Rc::clone(&h), Rc::clone(&s));
                h.spawn(Box::pin(async move {
                    let ns = h2.random_u64() % 5;
                    h2.sleep(ns).await;
                    s2.borrow_mut().push(i);
                }));
            }
            h.sleep(1_000_000).await;
        }));
        assert_eq!(outcome, Outcome::Done);
        let order = seen.borrow().clone();
        (order, executor.shared.hash(), executor.shared.boot_ns())
    }

    #[test]
    fn the_same_seed_gives_the_same_order_and_hash_and_another_seed_another() {
        let (a, hash_a, time_a) = order(7);
        let (b, hash_b, time_b) = order(7);
        let (c, hash_c, _) = order(8);
        assert_eq!((&a, hash_a, time_a), (&b, hash_b, time_b));
        assert_eq!(a.len(), 20);
        assert!(a != c && hash_a != hash_c, "two seeds gave the same run");
    }

    #[test]
    fn a_root_that_waits_for_nothing_is_stuck() {
        let executor = Executor::new(Shared::new(1, 0));
        let never: Completion<()> = Completion::new();
        let keep = never.clone();
        assert_eq!(executor.run(Box::pin(never)), Outcome::Stuck);
        drop(keep);
    }

    #[test]
    fn an_armed_crash_stops_the_run_and_kill_drops_every_task() {
        let executor = Executor::new(Shared::new(1, 0));
        let host = Rc::new(SimHost(Rc::clone(&executor)));
        let alive = Rc::new(());
        let held = Rc::clone(&alive);
        executor.arm_crash(Some(50));
        let outcome = executor.run(Box::pin(async move {
            let _held = held;
            loop {
                host.sleep(10).await;
            }
        }));
        assert_eq!(outcome, Outcome::Crash);
        executor.kill();
        assert_eq!(Rc::strong_count(&alive), 1);
    }

    #[test]
    fn the_wall_clock_steps_and_the_boot_clock_does_not() {
        let shared = Shared::new(1, 1_000_000);
        shared.pass(500);
        shared.step_wall(-1_000);
        assert_eq!((shared.boot_ns(), shared.wall_ns()), (500, 999_500));
    }
}
