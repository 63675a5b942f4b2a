//! One protected volume on simulated disks, for tests of a single thing.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::rc::Rc;
use std::sync::Arc;

use cdp_journal::clock::HostClock;
use cdp_journal::info::{Priority, Settings};
use cdp_journal::{Engine, EngineConfig, InitOptions, Instant, Volume, VolumeSpec};
use cdp_sim::disk::{Fault, FaultKind, FaultOn, SimDisk};
use cdp_sim::executor::{Executor, Outcome, Shared, SimHost};
use cdp_sim::store::Folder;
use uuid::Uuid;

pub const SECOND: u64 = 1_000_000_000;

/// A fault of every call of a kind, until the disk is healed.
pub fn every(on: FaultOn, kind: FaultKind) -> Fault {
    Fault { on, kind, times: None, after: 0, within: None }
}

/// The same for calls that touch some bytes.
pub fn every_within(on: FaultOn, kind: FaultKind, at: u64, len: u64) -> Fault {
    Fault { within: Some((at, at + len)), ..every(on, kind) }
}

/// A life of the agent: `root` to its end, and then a kill.
pub fn until_killed<F>(shared: &Rc<Shared>, place: &Rc<Place>, root: impl FnOnce(Rc<Executor>, Rc<Place>) -> F)
where
    F: Future<Output = ()> + 'static,
{
    let executor = Executor::new(Rc::clone(shared));
    assert_eq!(executor.run(Box::pin(root(Rc::clone(&executor), Rc::clone(place)))), Outcome::Done);
    executor.kill();
    place.cdp.kill(&shared.rng);
    place.primary.kill(&shared.rng);
}

/// Where the volume lives, over all starts.
pub struct Place {
    pub cdp: Rc<SimDisk>,
    pub primary: Rc<SimDisk>,
    pub folder: Rc<Folder>,
}

impl Place {
    pub fn new(cdp_mib: u64, primary_mib: u64) -> Self {
        Self {
            cdp: SimDisk::new(1, "cdp", cdp_mib << 20, 4096, false),
            primary: SimDisk::new(2, "primary", primary_mib << 20, 4096, false),
            folder: Rc::default(),
        }
    }

    /// Starts an engine and opens the volume; the first start makes the CDP disk and switches protection on.
    pub async fn start(&self, executor: &Rc<Executor>, config: EngineConfig) -> (Rc<Engine>, Rc<Volume>) {
        self.start_with(executor, config, &[]).await
    }

    /// The same, with reverts of groups that were not decided.
    pub async fn start_undecided(&self, executor: &Rc<Executor>, undecided: Vec<Uuid>) -> (Rc<Engine>, Rc<Volume>) {
        self.start_as(executor, EngineConfig::default(), &[], undecided).await
    }

    /// The same, with other CDP disks beside.
    pub async fn start_with(
        &self,
        executor: &Rc<Executor>,
        config: EngineConfig,
        others: &[&Rc<SimDisk>],
    ) -> (Rc<Engine>, Rc<Volume>) {
        self.start_as(executor, config, others, Vec::new()).await
    }

    async fn start_as(
        &self,
        executor: &Rc<Executor>,
        config: EngineConfig,
        others: &[&Rc<SimDisk>],
        undecided_reverts: Vec<Uuid>,
    ) -> (Rc<Engine>, Rc<Volume>) {
        let (disk, id) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let fence = self.folder.fence(id);
        let first = fence.is_none();
        let clock = Arc::new(HostClock::new(if first { Instant::ZERO } else { self.folder.clock() }));
        let host = Rc::new(SimHost(Rc::clone(executor)));
        let engine = Engine::new(host, clock, self.folder.attach(executor), config, Box::new(|_| {}));
        if first {
            let options = InitOptions { segment_size: 1 << 20, force: false };
            Engine::init_disk(self.cdp.attach(executor), options, disk, 0).await.unwrap();
        }
        for disk in [&self.cdp].into_iter().chain(others.iter().copied()) {
            engine.add_disk(disk.attach(executor), disk.name.clone()).await.unwrap();
        }
        let spec = VolumeSpec {
            id,
            name: "vol".into(),
            path: "primary".into(),
            size: 0,
            primary: self.primary.attach(executor),
            fence,
            accept: None,
            attach_journal: false,
            undecided_reverts,
        };
        let volume = engine.open_volume(spec).await.unwrap();
        if first {
            let kept = Settings { reserve_capacity: 40 << 20, reserve_duration_s: 86400, priority: Priority::Mid };
            volume.edit(|_| kept).await.unwrap();
            volume.enable().await.unwrap();
        }
        (engine, volume)
    }
}
