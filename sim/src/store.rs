//! The state directory in memory: each `put` is atomic, and one in flight at a crash happened or did not.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use cdp_journal::{Fence, Instant, LocalFuture, StateStore};
use uuid::Uuid;

use crate::executor::{Completion, Executor};
use crate::rng::Rng;

#[derive(Clone)]
enum Put {
    Fence(Uuid, Option<Fence>),
    Clock(Instant),
    BeginRevert(Uuid),
    DecideRevert(Uuid),
}

/// What the folder holds; it outlives the processes.
#[derive(Default)]
pub struct Folder {
    fences: RefCell<BTreeMap<Uuid, Fence>>,
    clock: Cell<u64>,
    undecided: RefCell<BTreeSet<Uuid>>,
    in_flight: RefCell<BTreeMap<u64, Put>>,
    next: Cell<u64>,
    failing: Cell<bool>,
}

impl Folder {
    /// The fence of a volume.
    pub fn fence(&self, volume: Uuid) -> Option<Fence> {
        self.fences.borrow().get(&volume).cloned()
    }
    /// The clock's high-water mark.
    pub fn clock(&self) -> Instant {
        Instant(self.clock.get())
    }
    /// Groups whose revert is not decided.
    pub fn undecided(&self) -> Vec<Uuid> {
        self.undecided.borrow().iter().copied().collect()
    }
    /// The revert of a group is begun, and not decided.
    pub fn begin_revert(self: &Rc<Self>, executor: &Rc<Executor>, group: Uuid) -> LocalFuture<'static, io::Result<()>> {
        Store { folder: Rc::clone(self), executor: Rc::clone(executor) }.put(Put::BeginRevert(group))
    }
    /// The revert of a group is decided.
    pub fn decide_revert(
        self: &Rc<Self>,
        executor: &Rc<Executor>,
        group: Uuid,
    ) -> LocalFuture<'static, io::Result<()>> {
        Store { folder: Rc::clone(self), executor: Rc::clone(executor) }.put(Put::DecideRevert(group))
    }
    /// From now on every `put` fails (or works again); one that failed may have happened all the same.
    pub fn set_failing(&self, failing: bool) {
        self.failing.set(failing);
    }
    /// Whether every `put` fails now.
    pub fn is_failing(&self) -> bool {
        self.failing.get()
    }
    /// Kill or power cut: each `put` in flight happened or did not.
    pub fn crash(&self, rng: &Rng) {
        for put in std::mem::take(&mut *self.in_flight.borrow_mut()).into_values() {
            if rng.one_in(2) {
                self.apply(put);
            }
        }
    }
    /// The store as one incarnation of the agent sees it.
    pub fn attach(self: &Rc<Self>, executor: &Rc<Executor>) -> Rc<dyn StateStore> {
        Rc::new(Store { folder: Rc::clone(self), executor: Rc::clone(executor) })
    }
    fn apply(&self, put: Put) {
        match put {
            Put::Fence(volume, Some(fence)) => drop(self.fences.borrow_mut().insert(volume, fence)),
            Put::Fence(volume, None) => drop(self.fences.borrow_mut().remove(&volume)),
            Put::BeginRevert(group) => drop(self.undecided.borrow_mut().insert(group)),
            Put::DecideRevert(group) => drop(self.undecided.borrow_mut().remove(&group)),
            Put::Clock(mark) => self.clock.set(self.clock.get().max(mark.0)),
        }
    }
}

struct Store {
    folder: Rc<Folder>,
    executor: Rc<Executor>,
}

impl Store {
    fn put(&self, put: Put) -> LocalFuture<'static, io::Result<()>> {
        let done = Completion::new();
        let (sender, folder) = (done.clone(), Rc::clone(&self.folder));
        let ns = self.executor.shared.rng.range(20_000, 2_000_000);
        if folder.failing.get() {
            // The rename may have happened before the sync of the directory failed.
            if self.executor.shared.rng.one_in(2) {
                folder.apply(put);
            }
            self.executor.after(ns, move || sender.complete(Err(io::Error::from_raw_os_error(5))));
            return Box::pin(done);
        }
        let id = folder.next.get();
        folder.next.set(id + 1);
        folder.in_flight.borrow_mut().insert(id, put);
        self.executor.shared.note(&[21, id]);
        self.executor.after(ns, move || {
            let put = folder.in_flight.borrow_mut().remove(&id);
            if let Some(put) = put {
                folder.apply(put);
            }
            sender.complete(Ok(()));
        });
        Box::pin(done)
    }
}

impl StateStore for Store {
    fn put_fence(&self, volume: Uuid, fence: Option<Fence>) -> LocalFuture<'static, io::Result<()>> {
        self.put(Put::Fence(volume, fence))
    }
    fn put_clock(&self, high_water: Instant) -> LocalFuture<'static, io::Result<()>> {
        self.put(Put::Clock(high_water))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{Outcome, Shared};

    #[test]
    fn a_put_in_flight_at_a_crash_happened_or_did_not_and_a_finished_one_stays() {
        let (mut old, mut new) = (0, 0);
        for seed in 0..60 {
            let folder = Rc::new(Folder::default());
            let executor = Executor::new(Shared::new(seed, 0));
            let store = folder.attach(&executor);
            let outcome = executor.run(Box::pin(async move {
                store.put_clock(Instant(5)).await.expect("put");
                drop(store.put_clock(Instant(9)));
            }));
            assert_eq!(outcome, Outcome::Done);
            executor.kill();
            folder.crash(&executor.shared.rng);
            match folder.clock().0 {
                5 => old += 1,
                9 => new += 1,
                other => panic!("{other}"),
            }
        }
        assert!(old > 10 && new > 10, "{old} {new}");
    }
}
