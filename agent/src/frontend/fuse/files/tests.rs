//! Open files over an export that takes its time.

use std::collections::HashMap;

use cdp_journal::{BlockStatus, LocalFuture};

use super::*;
use crate::ring::Signal;

/// Bytes of the export, of which each step takes a part.
const SIZE: u64 = 1 << 30;
/// Status answers are so long.
const STATUS_BYTES: u64 = 64 << 20;

/// An export whose steps wait until they are let through, one by one.
#[derive(Default)]
struct Gated {
    /// Steps that have begun.
    steps: Cell<u32>,
    /// Steps that may end.
    let_through: Cell<u32>,
    opened: Signal,
    disconnect: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Gated {
    fn step<T: 'static>(self: &Rc<Self>, answer: T) -> LocalFuture<'static, Result<T>> {
        let gated = Rc::clone(self);
        Box::pin(async move {
            gated.steps.set(gated.steps.get() + 1);
            gated.opened.until(|| (gated.steps.get() <= gated.let_through.get()).then_some(())).await;
            Ok(answer)
        })
    }

    fn let_one_through(&self) {
        self.let_through.set(self.let_through.get() + 1);
        self.opened.notify();
    }
}

/// The trait wants `&self`, the futures an `Rc`.
struct Shared(Rc<Gated>);

impl Export for Shared {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, _: u64, _: u32) -> LocalFuture<'static, Result<Vec<Slice>>> {
        unreachable!("whole sectors only")
    }
    fn write(&self, _: u64, _: u32, _: IoBuf, _: bool) -> LocalFuture<'static, Result<()>> {
        unreachable!("zeroes only")
    }
    fn write_zeroes(&self, _: u64, _: u32, _: bool, _: bool) -> LocalFuture<'static, Result<()>> {
        self.0.step(())
    }
    fn trim(&self, _: u64, _: u32) -> LocalFuture<'static, Result<()>> {
        unreachable!("zeroes only")
    }
    fn flush(&self) -> LocalFuture<'static, Result<()>> {
        unreachable!("zeroes only")
    }
    fn status(&self, _: u64, _: u64) -> LocalFuture<'static, Result<Vec<BlockStatus>>> {
        self.0.step(vec![BlockStatus { len: STATUS_BYTES, hole: false, zero: false }])
    }
    fn connect(&self, _: bool, on_disconnect: Box<dyn FnOnce()>) -> Result<ClientGuard> {
        self.0.disconnect.replace(Some(on_disconnect));
        Ok(ClientGuard::none())
    }
}

struct Source(HashMap<Uuid, Rc<dyn Export>>);

impl ExportSource for Source {
    fn export(&self, key: Uuid) -> Option<Rc<dyn Export>> {
        self.0.get(&key).cloned()
    }
}

/// What wants the file gone.
#[derive(Clone, Copy, Debug)]
enum End {
    Disconnect,
    Drain,
}

/// What a program asked for that is many requests to the engine.
#[derive(Clone, Copy, Debug)]
enum Long {
    Zero,
    Seek,
}

/// Goal: a file that is wanted gone, by a forced revert or a stop, waits for the one request that is in the engine and not for the thousands that a program
/// asked for with one call.
/// Method: of zeroes, and of a search, over the whole file one step is let through; then the end comes, and one more step.
#[test]
fn a_long_request_ends_with_its_file() {
    for (end, long) in [
        (End::Disconnect, Long::Zero),
        (End::Drain, Long::Zero),
        (End::Disconnect, Long::Seek),
        (End::Drain, Long::Seek),
    ] {
        let thread = std::thread::spawn(move || {
            let ring = Ring::new().expect("io_uring");
            ring.run(ended_in_the_middle(ring.clone(), end, long))
        });
        assert_eq!(thread.join().expect("the ring's thread"), Some(libc::EIO), "{end:?} {long:?}");
    }
}

/// How the request was answered.
async fn ended_in_the_middle(ring: Ring, end: End, long: Long) -> Option<i32> {
    let gated = Rc::<Gated>::default();
    let export: Rc<dyn Export> = Rc::new(Shared(Rc::clone(&gated)));
    let (files, key) = (Files::new(ring.clone()), Uuid::from_u128(1));
    let opened = files.open(&Source([(key, export)].into()), key, true).expect("opens");
    let file = files.open.borrow().get(&opened.ticket).cloned().expect("it is open");
    let (worker, answer) = (Rc::clone(&file), Rc::<Cell<_>>::default());
    let told = Rc::clone(&answer);
    files.run(Rc::clone(&file), async move {
        let result = match long {
            Long::Zero => worker.zero(0, SIZE, false).await,
            Long::Seek => worker.seek(0, true).await.map(drop),
        };
        told.set(Some(result.map_err(|error| i32::from(errno_of(&error)))));
    });
    let steps = |wanted: u32| {
        let (ring, gated) = (ring.clone(), Rc::clone(&gated));
        async move {
            while gated.steps.get() < wanted {
                ring.sleep_ns(1_000_000).await;
            }
        }
    };
    steps(1).await;
    gated.let_one_through();
    steps(2).await;
    let drained = Rc::<Cell<bool>>::default();
    match end {
        End::Disconnect => (gated.disconnect.take().expect("connected"))(),
        End::Drain => {
            let (files, drained) = (Rc::clone(&files), Rc::clone(&drained));
            ring.spawn(async move {
                files.drain(u64::MAX).await;
                drained.set(true);
            });
        }
    }
    ring.sleep_ns(5_000_000).await;
    assert!(file.guard.borrow().is_some() && !drained.get(), "a request is in the engine still");
    gated.let_one_through();
    while answer.get().is_none() && gated.steps.get() == 2 {
        ring.sleep_ns(1_000_000).await;
    }
    assert_eq!(gated.steps.get(), 2, "nothing more was asked of the engine");
    match end {
        End::Disconnect => {
            while file.guard.borrow().is_some() {
                ring.sleep_ns(1_000_000).await;
            }
        }
        End::Drain => {
            while !drained.get() {
                ring.sleep_ns(1_000_000).await;
            }
        }
    }
    answer.get().and_then(Result::err)
}
