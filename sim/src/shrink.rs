//! Shortens a failing history: leaves out operations as long as it still fails.

use crate::run::{Report, run};
use crate::workload::History;

/// Most runs that shortening may take.
const RUNS_MAX: usize = 600;

/// Places of the operations that are still needed, and how that shorter history fails.
pub fn shrink(history: &History, failing: &Report) -> (Vec<usize>, Report) {
    // What comes after the failing operation was never reached.
    let mut keep: Vec<usize> = (0..failing.at.min(history.ops.len())).collect();
    let mut best = failing.clone();
    let mut runs = 0;
    let mut chunk = (keep.len() / 2).max(1);
    loop {
        let mut start = 0;
        let mut progress = false;
        while start < keep.len() && runs < RUNS_MAX {
            let mut shorter = keep.clone();
            shorter.drain(start..(start + chunk).min(keep.len()));
            runs += 1;
            let report = run(pick(history, &shorter), false);
            if report.failure.as_deref().map(class) == failing.failure.as_deref().map(class) {
                shorter.truncate(report.at);
                (keep, best, progress) = (shorter, report, true);
            } else {
                start += chunk;
            }
        }
        if runs >= RUNS_MAX || (chunk == 1 && !progress) {
            return (keep, best);
        }
        chunk = (chunk / 2).max(1);
    }
}

/// What kind of failure it is: its words without the numbers.
fn class(text: &str) -> String {
    text.split(|c: char| !c.is_alphabetic()).filter(|word| word.len() > 2).take(6).collect::<Vec<_>>().join(" ")
}

/// The history with these operations only.
pub fn pick(history: &History, keep: &[usize]) -> History {
    let ops = keep.iter().filter_map(|place| history.ops.get(*place).cloned()).collect();
    History { ops, ..history.clone() }
}
