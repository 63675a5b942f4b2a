//! A shard with exports in memory, and a server in front of it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use cdp_journal::{BlockStatus, ClientGuard, Error, Export, IoBuf, LocalFuture, Slice};
use futures::FutureExt as _;

use super::super::*;
use crate::ring::{Ring, Signal};

pub const SIZE: u64 = 64 << 20;
/// Reads here fail like a broken disk, and report [`Error::NoSpace`] one sector on, [`Error::Gone`] two on.
pub const BROKEN: u64 = SIZE - 4096;

/// A disk in memory. Follows the rules that the engine's exports follow.
pub struct Memory {
    pub bytes: RefCell<Vec<u8>>,
    read_only: bool,
    ring: Ring,
    /// Requests wait while this is set.
    pub paused: Cell<bool>,
    pub resumed: RefCell<Vec<std::rc::Rc<Signal>>>,
    pub running: Cell<u32>,
    pub running_max: Cell<u32>,
    pub flushes: Cell<u32>,
    /// Reads and writes that begin here fail.
    pub fails_at: Cell<u64>,
    /// Bytes that were read.
    pub read_bytes: Cell<u64>,
    pub disconnect: RefCell<Vec<Box<dyn FnOnce()>>>,
}

impl Memory {
    fn run<T: 'static>(self: &std::rc::Rc<Self>, work: impl FnOnce(&Memory) -> T + 'static) -> LocalFuture<'static, T> {
        let memory = std::rc::Rc::clone(self);
        Box::pin(async move {
            memory.running.set(memory.running.get() + 1);
            memory.running_max.set(memory.running_max.get().max(memory.running.get()));
            if memory.paused.get() {
                let signal = std::rc::Rc::<Signal>::default();
                memory.resumed.borrow_mut().push(std::rc::Rc::clone(&signal));
                signal.until(|| (!memory.paused.get()).then_some(())).await;
            } else {
                // A turn through the ring, so that requests really run side by side.
                memory.ring.sleep_ns(0).await;
            }
            let result = work(&memory);
            memory.running.set(memory.running.get() - 1);
            result
        })
    }

    pub fn resume(&self) {
        self.paused.set(false);
        for signal in self.resumed.take() {
            signal.notify();
        }
    }
}

/// The trait wants `&self`, the futures an `Rc`.
pub struct Shared(pub std::rc::Rc<Memory>);

fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    assert!(
        offset.is_multiple_of(512) && len.is_multiple_of(512) && len > 0 && offset + len <= SIZE,
        "the door let {offset}+{len} in"
    );
    offset as usize..(offset + len) as usize
}

impl Export for Shared {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        self.0.read_only
    }
    fn read(&self, offset: u64, len: u32) -> LocalFuture<'static, cdp_journal::Result<Vec<Slice>>> {
        self.0.run(move |memory| match offset {
            BROKEN => Err(Error::device("read", "memory", &io::Error::from_raw_os_error(libc::EILSEQ))),
            offset if offset == BROKEN + 512 => Err(Error::NoSpace { what: "view", needed: 2, free: 1 }),
            offset if offset == BROKEN + 1024 => Err(Error::Gone("the view is closed".to_owned())),
            offset if offset == BROKEN + 1536 => Ok(vec![]), // a bug of the engine
            offset if offset == memory.fails_at.get() => {
                Err(Error::device("read", "memory", &io::Error::from_raw_os_error(libc::EIO)))
            }
            _ => {
                memory.read_bytes.set(memory.read_bytes.get() + u64::from(len));
                let bytes = &memory.bytes.borrow()[range(offset, len.into())];
                // In pieces of different sizes, as overlays answer.
                Ok(bytes
                    .chunks(4096 + (offset as usize / 512 % 3) * 512)
                    .map(|piece| IoBuf::copy_of(piece).share())
                    .collect())
            }
        })
    }
    fn write(&self, offset: u64, len: u32, data: IoBuf, fua: bool) -> LocalFuture<'static, cdp_journal::Result<()>> {
        self.0.run(move |memory| {
            if offset == memory.fails_at.get() {
                return Err(Error::device("write", "memory", &io::Error::from_raw_os_error(libc::EIO)));
            }
            let head = (offset % 4096) as usize;
            assert!(data.len().is_multiple_of(4096) && data.len() >= head + len as usize);
            memory.bytes.borrow_mut()[range(offset, len.into())].copy_from_slice(&data[head..head + len as usize]);
            memory.flushes.set(memory.flushes.get() + u32::from(fua));
            Ok(())
        })
    }
    fn write_zeroes(
        &self,
        offset: u64,
        len: u32,
        no_hole: bool,
        fua: bool,
    ) -> LocalFuture<'static, cdp_journal::Result<()>> {
        self.0.run(move |memory| {
            memory.bytes.borrow_mut()[range(offset, len.into())].fill(0);
            memory.flushes.set(memory.flushes.get() + u32::from(fua) + u32::from(no_hole) * 1000);
            Ok(())
        })
    }
    fn trim(&self, offset: u64, len: u32) -> LocalFuture<'static, cdp_journal::Result<()>> {
        self.0.run(move |_| assert!(!range(offset, len.into()).is_empty())).map(Ok).boxed_local()
    }
    fn flush(&self) -> LocalFuture<'static, cdp_journal::Result<()>> {
        self.0.run(move |memory| memory.flushes.set(memory.flushes.get() + 1)).map(Ok).boxed_local()
    }
    fn status(&self, offset: u64, len: u64) -> LocalFuture<'static, cdp_journal::Result<Vec<BlockStatus>>> {
        self.0.run(move |memory| {
            let bytes = &memory.bytes.borrow()[range(offset, len)];
            Ok(bytes
                .chunks(4096)
                .map(|piece| {
                    let zero = piece.iter().all(|&byte| byte == 0);
                    BlockStatus { len: piece.len() as u64, hole: zero, zero }
                })
                .collect())
        })
    }
    fn connect(&self, writable: bool, on_disconnect: Box<dyn FnOnce()>) -> cdp_journal::Result<ClientGuard> {
        assert_eq!(writable, !self.0.read_only);
        self.0.disconnect.borrow_mut().push(on_disconnect);
        Ok(ClientGuard::none())
    }
}

/// Refuses clients, like a volume that is held after a forced revert.
struct Held;

impl Export for Held {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, _: u64, _: u32) -> LocalFuture<'static, cdp_journal::Result<Vec<Slice>>> {
        unreachable!("nobody is let in")
    }
    fn write(&self, _: u64, _: u32, _: IoBuf, _: bool) -> LocalFuture<'static, cdp_journal::Result<()>> {
        unreachable!("nobody is let in")
    }
    fn write_zeroes(&self, _: u64, _: u32, _: bool, _: bool) -> LocalFuture<'static, cdp_journal::Result<()>> {
        unreachable!("nobody is let in")
    }
    fn trim(&self, _: u64, _: u32) -> LocalFuture<'static, cdp_journal::Result<()>> {
        unreachable!("nobody is let in")
    }
    fn flush(&self) -> LocalFuture<'static, cdp_journal::Result<()>> {
        unreachable!("nobody is let in")
    }
    fn status(&self, _: u64, _: u64) -> LocalFuture<'static, cdp_journal::Result<Vec<BlockStatus>>> {
        unreachable!("nobody is let in")
    }
    fn connect(&self, _: bool, _: Box<dyn FnOnce()>) -> cdp_journal::Result<ClientGuard> {
        Err(Error::State("the volume is held after a forced revert: release it first".to_owned()))
    }
}

/// What lives on the test's shard.
#[derive(Clone)]
pub struct State {
    pub disk: std::rc::Rc<Memory>,
    exports: std::rc::Rc<HashMap<Uuid, std::rc::Rc<dyn Export>>>,
}

impl ExportSource for State {
    fn export(&self, key: Uuid) -> Option<std::rc::Rc<dyn Export>> {
        self.exports.get(&key).cloned()
    }
}

const DISK: Uuid = Uuid::from_u128(1);
const READ_ONLY: Uuid = Uuid::from_u128(2);
const HELD: Uuid = Uuid::from_u128(3);
const MISSING: Uuid = Uuid::from_u128(4);

struct Directory {
    shard: Arc<ShardHandle<State>>,
    /// `find` never answers.
    stuck: Arc<AtomicBool>,
}

impl ExportDirectory<State> for Directory {
    fn list(&self) -> BoxFuture<'_, Vec<ExportEntry>> {
        let entry = |name: &str, description: &str| ExportEntry {
            kind: ExportKind::Volume,
            name: name.to_owned(),
            description: description.to_owned(),
        };
        std::future::ready(vec![entry("disk", "the disk"), entry("read-only", "")]).boxed()
    }
    fn find<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Option<ExportInfo<State>>> {
        if self.stuck.load(Ordering::Relaxed) {
            return std::future::pending().boxed();
        }
        let key = match name {
            "disk" | "" => Some((DISK, false)),
            "read-only" => Some((READ_ONLY, true)),
            "held" => Some((HELD, false)),
            "vanished" => Some((MISSING, false)),
            _ => None,
        };
        let info = key.map(|(key, read_only)| ExportInfo {
            kind: ExportKind::Volume,
            name: if name.is_empty() { "disk" } else { name }.to_owned(),
            description: "words".to_owned(),
            size: SIZE,
            read_only,
            shard: Arc::clone(&self.shard),
            key,
        });
        std::future::ready(info).boxed()
    }
}

pub struct Fixture {
    pub runtime: tokio::runtime::Runtime,
    pub shard: Arc<ShardHandle<State>>,
    pub server: Arc<NbdServer<State>>,
    pub folder: tempfile::TempDir,
    pub stuck: Arc<AtomicBool>,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(NbdConfig { handshake_timeout: Duration::from_secs(60), ..NbdConfig::default() })
    }

    pub fn with(config: NbdConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shard = ShardHandle::start("shard-test", |ring| {
            let memory = |read_only| {
                std::rc::Rc::new(Memory {
                    bytes: RefCell::new(vec![0; SIZE as usize]),
                    read_only,
                    ring: ring.clone(),
                    paused: Cell::new(false),
                    resumed: RefCell::default(),
                    running: Cell::new(0),
                    running_max: Cell::new(0),
                    flushes: Cell::new(0),
                    fails_at: Cell::new(u64::MAX),
                    read_bytes: Cell::new(0),
                    disconnect: RefCell::default(),
                })
            };
            let disk = memory(false);
            let exports: [(Uuid, std::rc::Rc<dyn Export>); 3] = [
                (DISK, std::rc::Rc::new(Shared(std::rc::Rc::clone(&disk)))),
                (READ_ONLY, std::rc::Rc::new(Shared(memory(true)))),
                (HELD, std::rc::Rc::new(Held)),
            ];
            State { disk, exports: std::rc::Rc::new(exports.into()) }
        });
        let shard = Arc::new(shard.unwrap());
        let stuck = Arc::<AtomicBool>::default();
        let server =
            NbdServer::new(config, Arc::new(Directory { shard: Arc::clone(&shard), stuck: Arc::clone(&stuck) }));
        let folder = tempfile::tempdir().unwrap();
        let fixture = Self { runtime, shard, server, folder, stuck };
        let listener = {
            let _context = fixture.runtime.enter();
            UnixListener::bind(fixture.socket()).unwrap()
        };
        fixture.runtime.spawn(Arc::clone(&fixture.server).serve(Listener::Unix(listener)));
        fixture
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Runs on the shard's thread.
    pub fn on_shard<T: Send + 'static>(&self, work: impl FnOnce(&State) -> T + Send + 'static) -> T {
        self.runtime.block_on(self.shard.call(|state, _| async move { work(&state) })).unwrap()
    }

    /// Waits until a condition on the shard holds. A condition that never comes hangs the test.
    pub fn until(&self, mut condition: impl FnMut(&Self) -> bool) {
        while !condition(self) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn stat(&self, counter: impl Fn(&ClientStats) -> &std::sync::atomic::AtomicU64) -> u64 {
        counter(self.shard.client_stats()).load(Ordering::Relaxed)
    }
}
