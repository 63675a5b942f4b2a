//! The harness of the whole-agent tests: it starts real `cdp-agent` processes, talks NBD to them with a client of its own,
//! and keeps an oracle of what each sector may hold at each instant.
//!
//! * [`process`]: an agent as a child process, and `cdpctl` calls on it;
//! * [`nbd`]: an NBD client that knows nothing of the agent's code;
//! * [`oracle`]: what may be read, now or at an instant, given what was sent and what was acked;
//! * [`faultfs`]: disks that fail when told to, and remember what was done to them;
//! * [`load`]: many verifying connections with many requests in flight, which reconnect;
//! * [`mount`]: a file system of the kernel on a volume;
//! * [`rig`]: an agent on such disks;
//! * [`local`]: mounts and loop devices on this host, and their end;
//! * [`tools`]: other people's NBD clients and file system tools.

pub mod faultfs;
pub mod guest;
pub mod load;
pub mod local;
pub mod mount;
pub mod nbd;
pub mod oracle;
pub mod process;
pub mod rig;
pub mod tools;

use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// The wall clock in nanoseconds since the epoch: the time line that instants are on.
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    u64::try_from(since.as_nanos()).expect("before the year 2554")
}

/// How often to repeat what `make test` repeats `rounds` times: `CDP_SOAK` is a factor.
pub fn rounds(rounds: usize) -> usize {
    let factor = std::env::var("CDP_SOAK").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1_usize);
    rounds * factor.max(1)
}

/// Ends a test that this machine cannot run: says why, and also in the file that `CDP_SKIPPED` names, from which `make test` tells it at its end. Whether
/// root, `/dev/fuse` and loop devices are lacking is asked in [`local::lacking`], which may fail instead.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let line = format!("{}: {why}\n", thread.name().unwrap_or("a test"));
    print!("SKIPPED: {line}");
    if let Some(path) = std::env::var_os("CDP_SKIPPED") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("write to the file of CDP_SKIPPED");
    }
}

/// What is added to the seeds that tests have of their own: `CDP_SEED_SHIFT`, which `make soak` sets; nothing in `make test`.
/// Printed, so that a failure shows it.
pub fn seed_shift() -> u64 {
    let shift: u64 = std::env::var("CDP_SEED_SHIFT").ok().and_then(|shift| shift.parse().ok()).unwrap_or(0);
    if shift > 0 {
        println!("CDP_SEED_SHIFT={shift}");
    }
    shift
}

/// The seed of this run: `CDP_SEED` replays one, otherwise it is drawn from the clock. Printed, so that a failure shows it.
pub fn seed() -> u64 {
    let seed =
        std::env::var("CDP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| now_ns() % 1_000_000);
    println!("CDP_SEED={seed}");
    seed
}

/// Pseudo-random numbers (SplitMix64): small, seeded, the same everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that always gives the same row for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9E37_79B9_7F4A_7C15)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound` (which is not 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// True in `percent` of 100 cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        let at = usize::try_from(self.below(choices.len() as u64)).expect("an index");
        choices[at]
    }

    /// Fills `out` with noise.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.number().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}
