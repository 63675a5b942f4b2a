//! An agent as a child process, and `cdpctl` calls on it.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::nbd;

/// What an agent's metrics are now.
pub fn scrape(address: impl ToSocketAddrs) -> String {
    let mut stream = TcpStream::connect(address).expect("connect to the metrics");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a bound for reads");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .expect("ask for metrics");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read metrics");
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    text
}

/// An agent that is not up, or does not end, within this time hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The folder with `cdp-agent` and `cdpctl`: `CDP_BIN`, or the newest build of this target folder.
pub fn binaries() -> PathBuf {
    if let Some(folder) = std::env::var_os("CDP_BIN") {
        let folder = PathBuf::from(folder);
        return fs::canonicalize(&folder).unwrap_or(folder);
    }
    let exe = std::env::current_exe().expect("a test knows its own path");
    // target/PROFILE/deps/test-HASH
    let target = exe.ancestors().nth(3).expect("a test lives in target/PROFILE/deps");
    ["release", "debug"]
        .map(|profile| target.join(profile))
        .into_iter()
        .filter(|folder| folder.join("cdp-agent").exists() && folder.join("cdpctl").exists())
        .max_by_key(|folder| fs::metadata(folder.join("cdp-agent")).and_then(|meta| meta.modified()).ok())
        .unwrap_or_else(|| {
            panic!("no cdp-agent and cdpctl under {}: run `cargo build --release` first", target.display())
        })
}

/// A new folder on a real disk (`CDP_TEST_DIR`, by default `/var/tmp`: unix sockets want short paths), gone when dropped.
pub fn scratch() -> TempDir {
    let base = std::env::var_os("CDP_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    tempfile::Builder::new().prefix("cdp-test-").tempdir_in(base).expect("a temporary folder")
}

/// `cdpctl` said no.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Exit code.
    pub code: Option<i32>,
    /// What it printed: the message of a failed call, or the answers per volume of a batch.
    pub said: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {:?}: {}", self.code, self.said.trim_end())
    }
}

/// A configuration for [`Agent::configured`]: sockets and state in its folder, nothing else.
pub const CONFIG: &str = r#"
state_dir = "DIR/state"
[grpc]
unix = "DIR/agent.sock"
[nbd]
unix = "DIR/nbd.sock"
[metrics]
listen = "off"
"#;

/// One `cdp-agent` and its folder.
#[derive(Debug)]
pub struct Agent {
    dir: Option<TempDir>,
    path: PathBuf,
    args: Vec<OsString>,
    child: Option<Child>,
}

/// An open view.
#[derive(Clone, Debug)]
pub struct View {
    /// Its id, and its export name.
    pub id: String,
    /// The instant that it shows.
    pub time: u64,
    /// For other people's clients.
    pub nbd_uri: String,
}

/// An interval that can be viewed, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// First instant.
    pub start: u64,
    /// Last instant; `None`: up to now.
    pub end: Option<u64>,
}

impl Interval {
    /// Whether `instant` can be viewed.
    pub fn contains(&self, instant: u64) -> bool {
        self.start <= instant && self.end.is_none_or(|end| instant <= end)
    }
}

impl Agent {
    /// `cdp-agent --dev` in a fresh folder, with the volume "demo"; up and serving.
    pub fn dev(size: &str, cdp_size: &str) -> Self {
        let mut agent = Self::dev_stopped(size, cdp_size);
        agent.start();
        agent
    }

    /// The same with further volumes of `bytes` bytes, all protected, with room of 300 MiB each.
    pub fn dev_with(others: &[&str], bytes: u64, cdp_size: &str) -> Self {
        let agent = Self::dev(&bytes.to_string(), cdp_size);
        agent.ctl(&["edit", "demo", "--reserve-capacity", "300MiB"]);
        for name in others {
            let path = agent.file(&format!("{name}.img"));
            File::create(&path).and_then(|file| file.set_len(bytes)).expect("make a primary");
            agent.ctl(&["volume", "add", name, "--path", path.to_str().expect("an ASCII path")]);
            agent.ctl(&["edit", name, "--reserve-capacity", "300MiB", "--reserve-duration", "1h"]);
            agent.ctl(&["enable", name]);
        }
        agent
    }

    /// The same as [`Agent::dev`], not started yet.
    pub fn dev_stopped(size: &str, cdp_size: &str) -> Self {
        let dir = scratch();
        let path = dir.path().to_owned();
        let args = ["--dev".into(), path.clone().into_os_string(), "--size".into(), size.into()];
        let args = args.into_iter().chain(["--cdp-size".into(), cdp_size.into()]).collect();
        Self { dir: Some(dir), path, args, child: None }
    }

    /// An agent with the configuration `config`, in which `DIR` stands for its fresh folder. Not started.
    pub fn configured(config: &str) -> Self {
        let dir = scratch();
        let path = dir.path().to_owned();
        let file = path.join("config.toml");
        fs::write(&file, config.replace("DIR", path.to_str().expect("an ASCII path")))
            .expect("write the configuration");
        let args = vec!["--config".into(), file.into_os_string()];
        Self { dir: Some(dir), path, args, child: None }
    }

    /// The agent's folder.
    pub fn dir(&self) -> &Path {
        &self.path
    }

    /// A file in the agent's folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The NBD socket.
    pub fn socket(&self) -> PathBuf {
        self.file("nbd.sock")
    }

    /// An NBD URI for other people's clients.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Starts the process and waits until it answers calls and serves "demo".
    pub fn start(&mut self) {
        self.start_until(|agent| {
            agent.try_ctl(&["info", "demo"]).is_ok()
                && nbd::Client::connect(&agent.socket(), "demo").map(nbd::Client::close).is_ok()
        });
    }

    /// Starts the process and waits until it answers calls: for states in which a volume is not served.
    pub fn start_unserved(&mut self) {
        self.start_until(|agent| agent.try_ctl(&["volume", "list"]).is_ok());
    }

    fn start_until(&mut self, ready: impl Fn(&Agent) -> bool) {
        self.spawn();
        let begun = Instant::now();
        while !ready(self) {
            if let Some(status) = self.child.as_mut().expect("just spawned").try_wait().expect("wait for the agent") {
                self.child = None;
                panic!("the agent ended with {status}:\n{}", self.log_tail());
            }
            assert!(begun.elapsed() < PATIENCE, "the agent did not come up:\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts the process and does not wait.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = || -> File {
            OpenOptions::new().create(true).append(true).open(self.file("agent.log")).expect("open agent.log")
        };
        let child = Command::new(binaries().join("cdp-agent"))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("start cdp-agent");
        self.child = Some(child);
    }

    /// Runs the agent with its arguments until it ends by itself, and returns its status and what it said.
    pub fn run_to_end(&mut self) -> (ExitStatus, String) {
        self.spawn();
        let status = self.wait_for_end();
        (status, self.log_tail())
    }

    /// Process id of the running agent.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the agent runs").id()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let status = self.wait_for_end();
        assert_eq!(status.signal(), Some(9), "the agent ended before it was killed:\n{}", self.log_tail());
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the agent runs");
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("signal the agent");
    }

    /// SIGTERM, and a clean end.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait_for_end();
        assert!(status.success(), "the agent ended with {status}:\n{}", self.log_tail());
    }

    /// Waits for the process to end.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            let child = self.child.as_mut().expect("the agent runs");
            if let Some(status) = child.try_wait().expect("wait for the agent") {
                self.child = None;
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the agent does not end:\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the process, if it runs, without a word.
    pub fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Either it still runs, or there is nothing left to end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The process lives.
    pub fn assert_alive(&mut self) {
        let child = self.child.as_mut().expect("the agent was started");
        if let Some(status) = child.try_wait().expect("wait for the agent") {
            self.child = None;
            panic!("the agent ended with {status}:\n{}", self.log_tail());
        }
    }

    /// The end of what the agent printed.
    pub fn log_tail(&self) -> String {
        let text = fs::read(self.file("agent.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// A `cdpctl` call that must work; its JSON answer.
    pub fn ctl(&self, args: &[&str]) -> Value {
        self.try_ctl(args).unwrap_or_else(|refusal| panic!("cdpctl {}: {refusal}\n{}", args.join(" "), self.log_tail()))
    }

    /// A `cdpctl` call that must be refused, in words that contain `words` (whatever the case).
    pub fn ctl_refused(&self, args: &[&str], words: &[&str]) -> Refusal {
        match self.try_ctl(args) {
            Ok(answer) => panic!("cdpctl {} should have been refused; it said {answer}", args.join(" ")),
            Err(refusal) => {
                let text = refusal.said.to_lowercase();
                for word in words {
                    assert!(
                        text.contains(&word.to_lowercase()),
                        "cdpctl {}: the refusal should say {word:?}, it says: {refusal}",
                        args.join(" ")
                    );
                }
                assert!(!text.contains("panicked"), "cdpctl {} panicked: {refusal}", args.join(" "));
                refusal
            }
        }
    }

    /// A `cdpctl` call.
    pub fn try_ctl(&self, args: &[&str]) -> Result<Value, Refusal> {
        let output = Command::new(binaries().join("cdpctl"))
            .args(["--agent", &format!("unix:{}", self.file("agent.sock").display()), "--output", "json"])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("run cdpctl");
        if !output.status.success() {
            let said =
                format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
            return Err(Refusal { code: output.status.code(), said });
        }
        let text = String::from_utf8(output.stdout).expect("UTF-8 on standard output");
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        Ok(serde_json::from_str(&text).unwrap_or_else(|e| panic!("cdpctl {}: no JSON ({e}): {text}", args.join(" "))))
    }

    /// `disk check` of a disk that no agent uses; its JSON, also when damage was found.
    pub fn check_disk(&self, path: &str) -> Value {
        let output = Command::new(binaries().join("cdpctl"))
            .args(["--output", "json", "disk", "check", path])
            .stdin(Stdio::null())
            .output()
            .expect("run cdpctl");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("disk check: no JSON ({e}): {output:?}"))
    }

    /// Connects to an export.
    pub fn connect(&self, export: &str) -> nbd::Client {
        nbd::Client::connect(&self.socket(), export)
            .unwrap_or_else(|e| panic!("connect to {export}: {e}\n{}", self.log_tail()))
    }

    /// Opens a read-only view of `volume`.
    pub fn open_view(&self, volume: &str, at: impl fmt::Display) -> View {
        let at = at.to_string();
        View::from_json(&self.ctl(&["view", "open", volume, "--at", &at]))
    }

    /// Opens a view of `volume` that takes writes.
    pub fn open_scratch(&self, volume: &str, at: impl fmt::Display) -> View {
        let at = at.to_string();
        View::from_json(&self.ctl(&["view", "open", volume, "--at", &at, "--writable"]))
    }

    /// Closes a view.
    pub fn close_view(&self, view: &View) {
        self.ctl(&["view", "close", &view.id]);
    }

    /// The whole of `volume` as it was at an instant.
    pub fn view_image(&self, volume: &str, at: u64) -> Vec<u8> {
        let view = self.open_view(volume, at);
        assert_eq!(view.time, at, "the view shows the instant that was asked for");
        let mut client = self.connect(&view.id);
        let image = client.read_all().unwrap_or_else(|e| panic!("read the view at {at}: {e}"));
        client.close();
        self.close_view(&view);
        image
    }

    /// The whole of `volume` as it is.
    pub fn live_image(&self, volume: &str) -> Vec<u8> {
        let mut client = self.connect(volume);
        let image = client.read_all().unwrap_or_else(|e| panic!("read {volume}: {e}"));
        client.close();
        image
    }

    /// `info`.
    pub fn info(&self, volume: &str) -> Value {
        self.ctl(&["info", volume])
    }

    /// The intervals of `volume` that can be viewed.
    pub fn coverage(&self, volume: &str) -> Vec<Interval> {
        let info = self.info(volume);
        let list = info["coverage"].as_array().unwrap_or_else(|| panic!("info has no coverage: {info}"));
        list.iter()
            .map(|interval| Interval {
                start: interval["start"].as_u64().unwrap_or_else(|| panic!("an interval without start: {info}")),
                end: interval["end"].as_u64().filter(|end| *end != 0),
            })
            .collect()
    }
}

/// Exit codes of `cdpctl` (see `cdpctl --help`).
pub mod exit {
    /// A device failed, or the agent did.
    pub const FAILED: i32 = 1;
    /// A value can never be right.
    pub const USAGE: i32 = 2;
    /// No such volume, disk, view, marker or log.
    pub const NOT_FOUND: i32 = 4;
    /// Not in the present state.
    pub const REFUSED: i32 = 6;
    /// An instant outside the history that can be viewed.
    pub const OUT_OF_COVERAGE: i32 = 7;
    /// Not enough room.
    pub const NO_SPACE: i32 = 8;
    /// Damage was found on a disk.
    pub const DAMAGE: i32 = 10;
}

impl View {
    /// From what `view open` answers.
    pub fn from_json(answer: &Value) -> Self {
        let text = |name: &str| {
            answer[name].as_str().unwrap_or_else(|| panic!("view open answers without {name}: {answer}")).to_owned()
        };
        let time = answer["time"].as_u64().unwrap_or_else(|| panic!("view open answers without time: {answer}"));
        Self { id: text("id"), time, nbd_uri: text("nbd_uri") }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
        crate::local::clean(&self.path);
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            eprintln!("kept {}\n{}", dir.keep().display(), self.log_tail());
        }
    }
}
