//! An agent whose disks and state folder are on a [`FaultFs`]: what faults and power cuts are tried on.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::faultfs::FaultFs;
use crate::load::{Load, Plan};
use crate::oracle::Oracle;
use crate::process::{Agent, scrape};
use crate::{now_ns, seed_shift, tools};

/// The CDP disk that is in use from the start.
pub const CDP: &str = "cdp.img";
/// A second one, initialised when [`Rig::add_spare`] is called.
pub const SPARE: &str = "spare.img";
/// The volume's own file.
pub const PRIMARY: &str = "primary.img";

/// See the module's text.
pub struct Rig {
    /// The agent, with the volume "demo".
    pub agent: Agent,
    /// Its disks.
    pub disks: FaultFs,
    /// What was written.
    pub oracle: Arc<Mutex<Oracle>>,
    /// Path of the CDP disk in use from the start.
    pub cdp: String,
    size: u64,
    metrics: std::net::SocketAddr,
    seed_shift: u64,
}

/// Sizes of a [`Rig`].
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// MiB of the volume.
    pub volume: u64,
    /// MiB of each CDP disk.
    pub cdp: u64,
    /// MiB of `reserve_capacity`.
    pub reserve: u64,
}

impl Sizes {
    /// What most tests take.
    pub const SMALL: Self = Self { volume: 8, cdp: 256, reserve: 192 };
}

impl Rig {
    /// Up, protected, and idle.
    pub fn new(seed: u64, sizes: Sizes, engine: &str) -> Self {
        Self::with(seed, sizes, engine, |disks| disks.path_str(CDP))
    }

    /// The same with the CDP disk as a block device: a loop device on the file. [`Rig::drop`] lets go of it.
    pub fn on_block_device(seed: u64, sizes: Sizes, engine: &str) -> Self {
        Self::with(seed, sizes, engine, |disks| {
            tools::run("losetup", ["--find", "--show", &disks.path_str(CDP)]).trim().to_owned()
        })
    }

    fn with(seed: u64, sizes: Sizes, engine: &str, cdp: impl FnOnce(&FaultFs) -> String) -> Self {
        let disks = FaultFs::new();
        let size = sizes.volume << 20;
        disks.create(PRIMARY, usize::try_from(size).expect("fits memory"));
        for name in [CDP, SPARE] {
            disks.create(name, usize::try_from(sizes.cdp << 20).expect("fits memory"));
        }
        // A port that is free now; nobody else takes such ports on purpose.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let metrics = listener.local_addr().expect("its address");
        drop(listener);
        let mut agent = Agent::configured(&format!(
            r#"
state_dir = "{state}"
lock_memory = false
[grpc]
unix = "DIR/agent.sock"
[nbd]
unix = "DIR/nbd.sock"
[metrics]
listen = "{metrics}"
[engine]
reserve_capacity = "{reserve}MiB"
{engine}
"#,
            state = disks.path_str("state"),
            reserve = sizes.reserve,
        ));
        let cdp = cdp(&disks);
        agent.start_unserved();
        agent.ctl(&["disk", "init", &cdp, "--segment-size", "1MiB"]);
        agent.ctl(&["volume", "add", "demo", "--path", &disks.path_str(PRIMARY)]);
        agent.ctl(&["enable", "demo"]);
        let oracle = Arc::new(Mutex::new(Oracle::new(seed, size)));
        Self { agent, disks, oracle, cdp, size, metrics, seed_shift: seed_shift() }
    }

    /// Takes the second CDP disk into use.
    pub fn add_spare(&self) {
        self.agent.ctl(&["disk", "init", &self.disks.path_str(SPARE), "--segment-size", "1MiB"]);
    }

    /// Everything at once, small requests, without end.
    pub fn plan(&self, seed: u64) -> Plan {
        let sizes = vec![512, 1536, 4096, 4096, 8192, 16384, 65536];
        let seed = seed.wrapping_add(self.seed_shift);
        Plan { connections: 2, depth: 8, sizes, flush_percent: 3, ..Plan::mixed(self.size, seed) }
    }

    /// Starts a verifying load.
    pub fn load(&self, plan: Plan) -> Load {
        Load::start(&self.oracle, &self.agent.socket(), "demo", plan)
    }

    /// Some writes, to their end.
    pub fn write_some(&self, seed: u64, writes: u64) {
        self.load(Plan { writes_max: writes, ..self.plan(seed) }).finish();
    }

    /// Nothing is in flight: checks the whole volume, and pins what it shows.
    pub fn check_live(&self, what: &str) {
        let from = now_ns();
        let image = self.agent.live_image("demo");
        let settled = self.oracle.lock().expect("no panic").settle(&image, from);
        settled.unwrap_or_else(|wrong| panic!("{what}: {wrong}\n{}", self.agent.log_tail()));
    }

    /// Checks the whole volume as it was.
    pub fn check_view(&self, at: u64) {
        let image = self.agent.view_image("demo", at);
        let checked = self.oracle.lock().expect("no panic").check_image(&image, at, at);
        checked.unwrap_or_else(|wrong| panic!("view at {at}: {wrong}"));
    }

    /// `info`.
    pub fn info(&self) -> Value {
        self.agent.info("demo")
    }

    /// The word for its state.
    pub fn health(&self) -> String {
        self.info()["health"].as_str().expect("a word").to_owned()
    }

    /// Waits for a state of the volume.
    pub fn wait_for_health(&self, health: &str) {
        self.eventually(&format!("health {health}"), || self.health() == health);
    }

    /// Waits for what must come.
    pub fn eventually(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{what} does not happen; info: {}\n{}",
                self.agent.try_ctl(&["info", "demo"]).map_or_else(|e| e.to_string(), |info| info.to_string()),
                self.agent.log_tail()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Events of this kind so far.
    pub fn events(&self, kind: &str) -> usize {
        let events = self.agent.ctl(&["events"]);
        let list = events["events"].as_array().unwrap_or_else(|| panic!("events without a list: {events}"));
        list.iter().filter(|event| event["kind"] == kind).count()
    }

    /// The sample of a metric whose line contains all of `words`.
    pub fn metric(&self, words: &[&str]) -> f64 {
        let text = scrape(self.metrics);
        let found = text.lines().find(|line| !line.starts_with('#') && words.iter().all(|word| line.contains(word)));
        let line = found.unwrap_or_else(|| panic!("no metric with {words:?}:\n{text}"));
        let value = line.rsplit(' ').next().expect("a value");
        value.parse().unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    /// The volume was never without an error-free answer, and protection is on.
    pub fn assert_protected(&self) {
        let info = self.info();
        assert_eq!(info["health"], "ok", "{info}");
        assert_eq!(info["cdp_state"], "on", "{info}");
        assert!(self.agent.coverage("demo").iter().any(|interval| interval.end.is_none()), "{info}");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A call that hangs would keep the agent from ending.
        self.disks.heal();
        if self.cdp.starts_with("/dev/loop") {
            self.agent.end();
            // Lazy, if somebody still holds it.
            tools::output("losetup", ["--detach", &self.cdp]);
        }
    }
}
