//! See `Cargo.toml`. The sources are the product's own.
#![cfg(all(loom, test))]
#![allow(dead_code)]

#[path = "../../journal/src/clock.rs"]
mod clock;
#[path = "../../agent/src/ring/notice.rs"]
mod notice;
#[path = "../../journal/src/types.rs"]
mod types;

/// Every interleaving with at most two preemptions: most mistakes need no more, and all of them would take hours.
fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

mod ring {
    use std::collections::VecDeque;

    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use crate::notice::Notice;

    /// The inbox and the eventfd as they are to the two sides: a queue, and a counter whose reader sleeps while it is 0.
    #[derive(Default)]
    struct Door {
        /// A mistake, to see that it is found: the notice goes up before there is something in the inbox.
        early: bool,
        notice: Notice,
        inbox: Mutex<VecDeque<u32>>,
        eventfd: Mutex<u32>,
        rung: Condvar,
    }

    impl Door {
        fn put(&self, task: u32) {
            let push = || self.inbox.lock().unwrap().push_back(task);
            let wake = || {
                *self.eventfd.lock().unwrap() += 1;
                self.rung.notify_one();
            };
            if self.early {
                self.notice.put(|| Ok::<(), ()>(()), wake).unwrap();
                push();
            } else {
                self.notice.put(|| Ok::<(), ()>(push()), wake).unwrap();
            }
        }

        /// One turn of the reader's loop: look if there is a notice, and sleep if there was nothing.
        fn turn(&self) -> usize {
            let mut taken = 0;
            self.notice.look(|| {
                while self.inbox.lock().unwrap().pop_front().is_some() {
                    taken += 1;
                }
            });
            if taken == 0 {
                let mut count = self.eventfd.lock().unwrap();
                while *count == 0 {
                    count = self.rung.wait(count).unwrap();
                }
                *count = 0;
            }
            taken
        }
    }

    /// Goal: whatever is put in is taken out, and the reader never sleeps for good with something in the inbox (loom reports a
    /// sleep that nobody ends as a deadlock).
    #[test]
    fn nothing_put_in_goes_unseen() {
        crate::check(|| {
            let door = Arc::new(Door::default());
            let writers: Vec<_> = (0..2)
                .map(|number| {
                    let door = Arc::clone(&door);
                    thread::spawn(move || door.put(number))
                })
                .collect();
            let mut taken = 0;
            while taken < 2 {
                taken += door.turn();
            }
            for writer in writers {
                writer.join().unwrap();
            }
        });
    }

    /// Goal: the check can fail: a notice that goes up before there is something in the inbox is found out.
    #[test]
    #[should_panic(expected = "unseen")]
    fn a_notice_ahead_of_what_it_is_about_is_found_out() {
        crate::check(|| put_beside_a_look(true));
    }

    /// Goal: the same with the right order finds nothing.
    #[test]
    fn a_notice_behind_what_it_is_about_is_enough() {
        crate::check(|| put_beside_a_look(false));
    }

    /// One writer beside one look; then the reader goes on for as often as it is woken.
    fn put_beside_a_look(early: bool) {
        let door = Arc::new(Door { early, ..Door::default() });
        let writer = {
            let door = Arc::clone(&door);
            thread::spawn(move || door.put(1))
        };
        let look = || door.notice.look(|| door.inbox.lock().unwrap().clear());
        look();
        writer.join().unwrap();
        if std::mem::take(&mut *door.eventfd.lock().unwrap()) > 0 {
            look();
        }
        assert!(door.inbox.lock().unwrap().is_empty(), "something in the inbox goes unseen");
    }
}

mod instants {
    use loom::sync::Arc;
    use loom::thread;

    use crate::clock::HostClock;
    use crate::types::Instant;

    /// Goal: instants of several shards are unique and rise for each of them, also while one finds a higher mark on a disk; and
    /// none is given out at or past the durable mark.
    #[test]
    fn instants_are_unique_rise_and_stay_below_the_mark() {
        crate::check(|| {
            let clock = Arc::new(HostClock::new(Instant(10)));
            clock.raised(Instant(14));
            let shards: Vec<_> = (0..2)
                .map(|number| {
                    let clock = Arc::clone(&clock);
                    thread::spawn(move || {
                        if number == 1 {
                            clock.past(Instant(11));
                        }
                        let first = clock.tick(5);
                        let second = clock.tick(12);
                        (first, second, clock.high_water())
                    })
                })
                .collect();
            clock.raised(Instant(13)); // a lower mark changes nothing
            let mut seen = Vec::new();
            for shard in shards {
                let (first, second, mark) = shard.join().unwrap();
                assert!(mark == Instant(14));
                if let (Some(first), Some(second)) = (first, second) {
                    assert!(first < second);
                }
                seen.extend(first.into_iter().chain(second));
            }
            assert!(seen.iter().all(|instant| *instant > Instant(10) && *instant < Instant(14)));
            let count = seen.len();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), count, "an instant was given out twice");
            assert!(count >= 2 && clock.previous() < clock.high_water());
        });
    }

    /// Goal: whoever sees that a mark is raised sees it for good, and ticks below it.
    #[test]
    fn a_mark_that_is_raised_meanwhile_lets_ticks_through() {
        crate::check(|| {
            let clock = Arc::new(HostClock::new(Instant(10)));
            let raiser = {
                let clock = Arc::clone(&clock);
                thread::spawn(move || clock.raised(Instant(20)))
            };
            match clock.tick(0) {
                Some(instant) => assert!(instant == Instant(11) && clock.high_water() == Instant(20)),
                None => assert!(clock.previous() == Instant(10)),
            }
            raiser.join().unwrap();
            assert!(clock.tick(0).is_some());
        });
    }
}
