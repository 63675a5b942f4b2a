//! Ends the process when an input takes too long: one that hangs says nothing by itself.

use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::corpus;

/// One input takes no longer than this. Most take microseconds; a machine that is busy with other work is not a hang.
const INPUT_MAX: Duration = Duration::from_secs(20);
/// How often the watchdog looks.
const LOOK: Duration = Duration::from_secs(1);

/// Watches the inputs of one thread.
pub struct Watchdog {
    input: Arc<Mutex<Input>>,
}

/// The input that runs now.
#[derive(Default)]
struct Input {
    /// `None`: there is none.
    since: Option<Instant>,
    target: String,
    what: String,
    data: Vec<u8>,
}

impl Watchdog {
    /// Starts the thread that looks. It ends some time after the watchdog was dropped.
    pub fn start() -> Self {
        let input = Arc::<Mutex<Input>>::default();
        let watched = Arc::downgrade(&input);
        std::thread::spawn(move || {
            while let Some(input) = watched.upgrade() {
                lock(&input).check();
                drop(input);
                std::thread::sleep(LOOK);
            }
        });
        Self { input }
    }

    /// Runs one input. When that takes too long the process ends, and its last words say where the input lies: `what` in the
    /// target's corpus, or `hang-what` if there is no such file.
    pub fn watch<T>(&self, target: &str, what: &str, data: &[u8], run: impl FnOnce() -> T) -> T {
        lock(&self.input).begin(target, what, data);
        let _ended = Ended(&self.input);
        run()
    }
}

/// Also an input that panics has ended.
struct Ended<'a>(&'a Mutex<Input>);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        lock(self.0).since = None;
    }
}

impl Input {
    /// Into the memory of the last input: there are many, and most are short.
    fn begin(&mut self, target: &str, what: &str, data: &[u8]) {
        self.target.clear();
        self.target.push_str(target);
        self.what.clear();
        self.what.push_str(what);
        self.data.clear();
        self.data.extend_from_slice(data);
        self.since = Some(Instant::now());
    }

    /// Ends the process if this input runs for too long.
    fn check(&self) {
        if self.since.is_none_or(|since| since.elapsed() <= INPUT_MAX) {
            return;
        }
        let mut path = corpus(&self.target).join(&self.what);
        let mut kept = Ok(());
        if !path.exists() {
            path.set_file_name(format!("hang-{}", self.what));
            kept = std::fs::write(&path, &self.data);
        }
        // Written directly: what a test prints is held back until its end, and this one has none.
        let mut stderr = std::io::stderr();
        let (target, what, seconds) = (&self.target, &self.what, INPUT_MAX.as_secs());
        let _ = writeln!(stderr, "{target}: input {what} hangs (more than {seconds} s); it lies in {}", path.display());
        if let Err(error) = kept {
            let _ = writeln!(stderr, "{}: {error}", path.display());
        }
        std::process::exit(1);
    }
}

fn lock(input: &Mutex<Input>) -> MutexGuard<'_, Input> {
    input.lock().unwrap_or_else(PoisonError::into_inner)
}
