//! Promise: whatever bytes come from outside, no parser panics, overflows, hangs or asks for much memory.

use cdp_fuzz::{TARGETS, Watchdog, inputs, largest_since, mutate};

/// One input asks for no more memory at once than this.
const ALLOCATION_MAX: usize = 64 << 20;

fn run(watchdog: &Watchdog, name: &str, target: fn(&[u8]) -> bool, what: &str, data: &[u8]) {
    largest_since();
    let ended = watchdog.watch(name, what, data, || std::panic::catch_unwind(|| target(data)));
    assert!(ended.is_ok(), "{name}: input {what} panics");
    let largest = largest_since();
    assert!(largest <= ALLOCATION_MAX, "{name}: input {what} asks for {largest} bytes at once");
}

#[test]
fn every_input_of_the_corpus_is_taken() {
    let watchdog = Watchdog::start();
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(!inputs.is_empty(), "{name} has no corpus");
        for (file, data) in inputs {
            run(&watchdog, name, *target, &file, &data);
        }
    }
}

/// Seeds are fixed: a change fails by its own fault. `make soak` draws new ones. An input is named by seed and number.
#[test]
fn mutated_inputs_are_taken() {
    let watchdog = Watchdog::start();
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        for number in 0..20_000 {
            let data = mutate(&inputs, 1, number);
            run(&watchdog, name, *target, &format!("1-{number}"), &data);
        }
    }
}

/// The corpus reaches behind the checks: without this a target that refuses everything would pass.
#[test]
fn the_corpus_holds_what_parsers_accept() {
    for (name, target) in TARGETS {
        let taken = inputs(name).iter().filter(|(_, data)| target(data)).count();
        assert!(taken > 0, "{name}: everything in its corpus is refused");
    }
}
