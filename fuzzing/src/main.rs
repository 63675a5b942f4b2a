//! `cdp-fuzz SECONDS [TARGET...]`: mutates the inputs of the corpus for so long, the targets in turns, of which each has at least one;
//! a crash leaves its input in the corpus, and so does a hang, which ends the run. Ends with one line of counts.

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cdp_fuzz::{TARGETS, Watchdog, corpus, inputs, largest_since, mutate};

/// One input asks for no more memory at once than this.
const ALLOCATION_MAX: usize = 64 << 20;
/// Inputs of a target before the next one has its turn.
const TURN: u64 = 2000;
/// A turn ends earlier after so long: a slow target must not take the time of the others.
const TURN_MAX: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(seconds) = args.next().and_then(|seconds| seconds.parse().ok()) else {
        eprintln!("usage: cdp-fuzz SECONDS [TARGET...]");
        return ExitCode::from(2);
    };
    let wanted: Vec<String> = args.collect();
    if let Some(unknown) = wanted.iter().find(|wanted| TARGETS.iter().all(|(name, _)| name != *wanted)) {
        eprintln!("no target {unknown}");
        return ExitCode::from(2);
    }
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let end = Instant::now() + Duration::from_secs(seconds);
    let targets: Vec<_> = TARGETS
        .iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name))
        .map(|(name, run)| (*name, *run, inputs(name)))
        .collect();
    let watchdog = Watchdog::start();
    let (mut runs, mut crashes) = (0_u64, 0_u64);
    for turn in 0_u64.. {
        for (name, run, corpus_of) in &targets {
            if turn > 0 && Instant::now() >= end {
                println!("fuzz: {} targets, {runs} inputs, {crashes} crashes, seed {seed}", targets.len());
                return if crashes == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            }
            let turn_end = Instant::now() + TURN_MAX;
            for number in turn * TURN..(turn + 1) * TURN {
                let data = mutate(corpus_of, seed, number);
                largest_since();
                let what = format!("{seed}-{number}");
                let ended = watchdog.watch(name, &what, &data, || catch_unwind(|| run(&data)));
                let fine = ended.is_ok() && largest_since() <= ALLOCATION_MAX;
                runs += 1;
                if !fine {
                    crashes += 1;
                    let path = corpus(name).join(format!("crash-{what}"));
                    eprintln!("{name}: seed {seed}, input {number} crashed; it is kept: {}", path.display());
                    if let Err(error) = std::fs::write(&path, &data) {
                        eprintln!("{}: {error}", path.display());
                    }
                }
                if Instant::now() >= turn_end {
                    break;
                }
            }
        }
    }
    ExitCode::SUCCESS
}
