//! `cdp-sim`: runs seeded histories of the engine and judges every read. A seed replays its failure exactly.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cdp_sim::exhaust::{Bounds, Case, check, sequences};
use cdp_sim::run::{Report, run};
use cdp_sim::shrink::{pick, shrink};
use cdp_sim::workload::{generate, profiles};
use cdp_sim::world::Counts;
use clap::Parser;

/// Runs the real engine on a simulated host, disk and clock, and judges every read by a simple model.
///
/// Exit code 0: no violation. 1: a violation (its seed, the commit and a shortened history are printed). 2: bad arguments.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Operations of each history.
    #[arg(long, default_value_t = 60)]
    ops: usize,
    /// Histories to run, with seeds counting up.
    #[arg(long, default_value_t = 1)]
    histories: u64,
    /// Run for so many seconds instead of a number of histories; with --exhaust: no longer than this.
    #[arg(long)]
    seconds: Option<u64>,
    /// Threads, each with a history of its own.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Kind of history; `all` takes most of them in turn, `more` those that came later.
    #[arg(long, default_value = "all")]
    profile: String,
    /// Only these operations (as a shortened history prints them).
    #[arg(long, value_delimiter = ',')]
    keep: Option<Vec<usize>>,
    /// Instead of seeds: all sequences of so many operations, with a crash before and after every call (see --stride, --subsets); --seed says which is the first.
    /// The last line names the one to go on with, for a run that --seconds has ended.
    #[arg(long)]
    exhaust: Option<u32>,
    /// With --exhaust: a crash at every so many of these places only.
    #[arg(long, default_value_t = 1)]
    stride: u64,
    /// With --exhaust: orders of events, each with a subset of the unsynced writes at every power cut.
    #[arg(long, default_value_t = 4)]
    subsets: u64,
    /// With --exhaust: where a power cut finds at most so many unsynced writes, every subset of them.
    #[arg(long, default_value_t = 3)]
    whole: usize,
    /// One case of the exhaustion, as a violation prints it.
    #[arg(long)]
    case: Option<Case>,
    /// Fail if fewer histories than this had a crash.
    #[arg(long, default_value_t = 0)]
    least_crashed: u64,
    /// Print everything that happens.
    #[arg(long)]
    trace: bool,
    /// Go on after a violation: the first five are shortened and told in full, the others in a line each.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    ensure!(
        ["all", "more"].contains(&args.profile.as_str()) || profiles().contains(&args.profile.as_str()),
        "--profile {}: one of all, more, {}",
        args.profile,
        profiles().join(", ")
    );
    ensure!(args.threads >= 1, "--threads 0: at least 1");
    if !args.trace {
        // A panic of the engine is reported as a violation; its own message would only come twice.
        std::panic::set_hook(Box::new(|info| {
            if let Some(place) = info.location() {
                LAST_PANIC.with(|last| *last.borrow_mut() = place.to_string());
            }
            if cfg!(panic = "abort") {
                // Nobody will catch it: this is the last that is heard.
                println!("VIOLATION in {}, commit {COMMIT}: {info}", RUNNING.with(|run| run.borrow().clone()));
            }
        }));
    }
    if let Some(case) = &args.case {
        let report = case.run(args.trace);
        println!("{} hash {:016x}: {}", case.name(), report.hash, report.failure.as_deref().unwrap_or("no violation"));
        return Ok(if report.failure.is_some() { ExitCode::from(1) } else { ExitCode::SUCCESS });
    }
    if let Some(keep) = &args.keep {
        return one(&args, keep);
    }
    if let Some(depth) = args.exhaust {
        return exhaust(&args, depth);
    }
    many(&args)
}

/// Time between two words of how far the exhaustion is.
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// How far the exhaustion is.
struct Tried {
    sequences: u64,
    cases: u64,
    failed: u64,
    told: Instant,
}

fn exhaust(args: &Args, depth: u32) -> anyhow::Result<ExitCode> {
    ensure!(depth <= 6, "--exhaust {depth}: at most 6");
    ensure!(args.whole <= 16, "--whole {}: at most 16", args.whole);
    let bounds = Bounds { stride: args.stride, seeds: args.subsets, whole: args.whole };
    let began = Instant::now();
    let all = sequences(depth);
    let first = args.seed.wrapping_sub(1) % all;
    let next = AtomicU64::new(0);
    let tried = Mutex::new(Tried { sequences: 0, cases: 0, failed: 0, told: began });
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                // Looked at before a sequence is taken: whichever is taken is tried, so that none is left out between the first and the last.
                while args.seconds.is_none_or(|seconds| began.elapsed().as_secs() < seconds) {
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    if turn >= all {
                        return;
                    }
                    let place = (first + turn) % all;
                    running(format!("--exhaust {depth} --seed {}, its first sequence", place + 1));
                    let (cases, failure) = check(depth, place, bounds);
                    let mut tried = tried.lock().expect("no holder panics");
                    tried.sequences += 1;
                    tried.cases += cases;
                    if let Some((case, report)) = failure {
                        tried.failed += 1;
                        println!("VIOLATION, commit {COMMIT}: {}: {}", case.name(), in_words(&report));
                        println!("  replay: cdp-sim --case {case} --trace");
                    }
                    if tried.told.elapsed() >= TOLD_EVERY {
                        tried.told = Instant::now();
                        eprintln!(
                            "{} of {all} sequences, {} cases, {} violations",
                            tried.sequences, tried.cases, tried.failed
                        );
                    }
                }
            });
        }
    });
    let Tried { sequences: done, cases, failed, .. } = tried.into_inner().expect("no holder panics");
    let seconds = began.elapsed().as_secs_f64();
    let place = format!("from {} on; --seed {} goes on", first + 1, (first + done) % all + 1);
    println!("{done} of {all} sequences of {depth}, {cases} cases, {failed} violations, {seconds:.1} s, {place}");
    Ok(if failed > 0 { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

thread_local! {
    static LAST_PANIC: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
    /// The arguments that replay what this thread runs.
    static RUNNING: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
}

fn running(replay: String) {
    RUNNING.with(|run| *run.borrow_mut() = replay);
}

/// What it was built from.
const COMMIT: &str = env!("CDP_COMMIT");

/// Violations that are shortened and told in full: with `--keep-going` there may be many.
const EXPLAINED_MAX: u64 = 5;

/// Switches on the deliberate fault that `CDP_MUTATION` names, for this thread: for the test of what is printed.
#[cfg(feature = "mutations")]
fn mutate() {
    use cdp_journal::mutation::{Mutation, set};
    if let Ok(name) = std::env::var("CDP_MUTATION") {
        let named = Mutation::ALL.into_iter().find(|mutation| format!("{mutation:?}") == name);
        set(named.unwrap_or_else(|| panic!("CDP_MUTATION={name}: there is no such fault")));
    }
}

#[cfg(not(feature = "mutations"))]
fn mutate() {}

fn one(args: &Args, keep: &[usize]) -> anyhow::Result<ExitCode> {
    mutate();
    let history = generate(args.seed, &args.profile, args.ops).context("the profile exists")?;
    let report = run(pick(&history, keep), args.trace);
    println!("seed {} hash {:016x}: {}", args.seed, report.hash, report.failure.as_deref().unwrap_or("no violation"));
    Ok(if report.failure.is_some() { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn many(args: &Args) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let explained = AtomicU64::new(0);
    let totals = Mutex::new((0u64, 0u64, Counts::default()));
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                mutate();
                while !stop.load(Ordering::Relaxed) {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let over = match args.seconds {
                        Some(seconds) => began.elapsed().as_secs() >= seconds,
                        None => place >= args.histories,
                    };
                    if over {
                        return;
                    }
                    let seed = args.seed + place;
                    let Some(history) = generate(seed, &args.profile, args.ops) else { return };
                    running(format!("--seed {seed} --ops {} --profile {}", args.ops, history.profile));
                    let report = run(history.clone(), args.trace);
                    let failed = report.failure.is_some();
                    {
                        let mut totals = totals.lock().expect("no holder panics");
                        totals.0 += 1;
                        totals.1 += u64::from(failed);
                        totals.2.add(&report.counts);
                    }
                    if failed {
                        stop.fetch_or(!args.keep_going, Ordering::Relaxed);
                        if explained.fetch_add(1, Ordering::Relaxed) < EXPLAINED_MAX {
                            explain(args, seed, &report);
                        } else {
                            println!("seed {seed} ({}), commit {COMMIT}: {}", history.profile, in_words(&report));
                        }
                    } else if args.histories == 1 && args.seconds.is_none() {
                        println!("seed {seed} hash {:016x}: no violation", report.hash);
                    }
                }
            });
        }
    });
    let (histories, failed, counts) = *totals.lock().expect("no holder panics");
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{histories} histories, {failed} violations, {seconds:.1} s: {} with crashes, {} operations, {} kills, {} power cuts, \
         {} of either in a start after the other, {} clean stops, {} reverts, {} evictions, {} to make room seen, {} laps in {} histories, {} switches, {} edits, {} cleans, {} resizes, {} marks, {} calls beside others, {} discards, {} zeroes, {} punches, {} scratch writes, {} reads and {} view reads checked, {} views refused, {} faults, {} steps, {:.1} h of virtual time",
        counts.crashed,
        counts.ops,
        counts.kills,
        counts.power_cuts,
        counts.turned,
        counts.restarts,
        counts.reverts,
        counts.evicted,
        counts.made_room,
        counts.laps,
        counts.wrapped,
        counts.switches,
        counts.edits,
        counts.cleans,
        counts.resizes,
        counts.marks,
        counts.beside,
        counts.discards,
        counts.zeroes,
        counts.punches,
        counts.scratch_writes,
        counts.reads_checked,
        counts.views_checked,
        counts.views_refused,
        counts.faults,
        counts.steps,
        counts.virtual_ns as f64 / 3.6e12,
    );
    if counts.crashed < args.least_crashed {
        println!("too few histories with crashes: {} of at least {}", counts.crashed, args.least_crashed);
    }
    Ok(if failed > 0 || counts.crashed < args.least_crashed { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn in_words(report: &Report) -> String {
    let text = report.failure.clone().unwrap_or_default();
    let place = LAST_PANIC.with(|last| last.borrow().clone());
    if text.starts_with("panic") { format!("{text} at {place}") } else { text }
}

fn explain(args: &Args, seed: u64, report: &Report) {
    /// One after the other, not line by line.
    static TELLING: Mutex<()> = Mutex::new(());
    let _telling = TELLING.lock();
    let Some(history) = generate(seed, &args.profile, args.ops) else { return };
    println!("VIOLATION in seed {seed}, profile {}, commit {COMMIT}", history.profile);
    println!("  {}", in_words(report));
    println!("  replay: cdp-sim --seed {seed} --ops {} --profile {} --trace", args.ops, args.profile);
    let (keep, shorter) = shrink(&history, report);
    println!("shortened to {} operations: {}", keep.len(), in_words(&shorter));
    println!("  {:?}", history.setup);
    for place in &keep {
        println!("  {place:>4} {:?} then {:?}", history.ops[*place].action, history.ops[*place].then);
    }
    let list: Vec<String> = keep.iter().map(usize::to_string).collect();
    let list = if list.is_empty() { "999999".to_owned() } else { list.join(",") };
    println!("  replay: cdp-sim --seed {seed} --ops {} --profile {} --keep {list} --trace", args.ops, args.profile);
}
