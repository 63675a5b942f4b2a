use std::cell::Cell;
use std::time::Duration;

use super::*;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn calls_run_on_the_shard_and_see_its_state() {
    let shard = ShardHandle::start("cdp-shard-7", |_| Rc::new(Cell::new(1))).unwrap();
    runtime().block_on(async {
        let name = shard.call(|_, _| async { std::thread::current().name().map(str::to_owned) }).await.unwrap();
        assert_eq!((name.as_deref(), shard.name()), (Some("cdp-shard-7"), "cdp-shard-7"));
        // Two calls at a time; the second ends while the first waits.
        let slow = shard.call(|state, ring| async move {
            while state.get() != 3 {
                ring.sleep_ns(100_000).await;
            }
            state.replace(4)
        });
        let fast = shard.call(|state, _| async move { state.replace(3) });
        assert_eq!(futures::join!(slow, fast), (Ok(3), Ok(1)));
        assert_eq!(shard.call(|state, _| async move { state.get() }).await, Ok(4));
        let before = shard.heartbeat();
        while shard.heartbeat() < before + 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(shard.drain(Duration::ZERO).await, Ok(0));
        assert_eq!(shard.stop().await, Ok(()));
        assert_eq!(shard.stop().await, Err(ShardGone));
        assert_eq!(shard.call(|_, _| async {}).await, Err(ShardGone));
    });
}

#[test]
fn the_state_is_dropped_with_the_shard() {
    struct Told(std::sync::mpsc::Sender<()>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }
    let (tell, told) = std::sync::mpsc::channel();
    let shard = ShardHandle::start("state", |ring| {
        let state = Rc::new(Told(tell));
        let held = Rc::clone(&state); // by a task that would wait for ever
        ring.clone().spawn(async move {
            ring.sleep_ns(u64::MAX).await;
            drop(held);
        });
        state
    });
    drop(shard.unwrap()); // the handle's end is the shard's
    told.recv().unwrap();
}

#[test]
fn a_panic_on_the_shard_is_told_to_whoever_waits() {
    let shard = ShardHandle::start("panics", |_| ()).unwrap();
    runtime().block_on(async {
        let waiting = shard.call(|(), ring| async move { ring.sleep_ns(u64::MAX).await });
        let failing = shard.call(|(), _| async { assert!(std::hint::black_box(false), "this is the test's panic") });
        assert_eq!(futures::join!(waiting, failing), (Err(ShardGone), Err(ShardGone)));
        assert_eq!(shard.call(|(), _| async {}).await, Err(ShardGone));
        assert_eq!(shard.stop().await, Err(ShardGone));
    });
}
