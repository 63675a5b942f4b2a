//! `cdp-bench`: the engine alone, on a shard's io_uring, without a socket. It measures and judges nothing.
//!
//! * `engine`: 4 KiB writes (or another size), many in flight, on one protected volume.
//! * `views`: opening views and reading through them, with a given number of records in the journal.
//!
//! Both print one JSON object. Files are made in the folder that is given, and removed at the end.

use std::cell::{Cell, RefCell};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cdp_agent::device::{Disk, DiskFile};
use cdp_agent::ring::Ring;
use cdp_journal::clock::HostClock;
use cdp_journal::info::{Priority, Settings, VolumeStats};
use cdp_journal::{
    BLOCK, Device, Engine, EngineConfig, Fence, InitOptions, LocalFuture, StateStore, Volume, VolumeSpec, payload_buf,
};
use clap::{Parser, Subcommand};
use futures::future::join_all;
use serde_json::{Value, json};
use uuid::Uuid;

/// As in the agent.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measures the engine alone, without a socket, and prints a JSON object.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Random writes to one protected volume.
    Engine(EngineArgs),
    /// Views, with so many records in the journal.
    Views(ViewArgs),
}

#[derive(Parser)]
struct EngineArgs {
    /// Folder for the files.
    dir: PathBuf,
    /// MiB of the volume.
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// MiB of it that are written to; 0: all.
    #[arg(long, default_value_t = 0)]
    working_set: u64,
    /// MiB of other blocks that are written between two writes of a block, which is the same for all of them; 0: blocks at random.
    #[arg(long, default_value_t = 0, conflicts_with = "working_set")]
    distance: u64,
    /// MiB of history that it may keep.
    #[arg(long, default_value_t = 2048)]
    reserve: u64,
    /// Bytes of a write.
    #[arg(long, default_value_t = 4096)]
    block_size: u32,
    /// Writes in flight.
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Seconds of the same load before that.
    #[arg(long, default_value_t = 2.0)]
    ramp: f64,
    /// Leave the two files; the result names them.
    #[arg(long)]
    keep: bool,
}

#[derive(Parser)]
struct ViewArgs {
    /// Folder for the files.
    dir: PathBuf,
    /// Records to make. They are 4 KiB writes of zeroes, which have index entries like any other and no payload, so that many fit a small disk.
    #[arg(long, default_value_t = 1_000_000)]
    records: u64,
    /// MiB of the volume.
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// MiB of the reservation, of which a log is a fixed share; 0: as many as the records take.
    #[arg(long, default_value_t = 0)]
    reserve: u64,
    /// Views to open.
    #[arg(long, default_value_t = 200)]
    views: usize,
    /// Reads of each view, one after the other.
    #[arg(long, default_value_t = 50)]
    reads: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let ring = Ring::new().context("io_uring")?;
    let handle = ring.clone();
    let result = ring.run(async move {
        match args.command {
            Command::Engine(args) => engine(&handle, &args).await,
            Command::Views(args) => views(&handle, &args).await,
        }
    })?;
    println!("{result:#}");
    Ok(())
}

/// Nothing here outlives the process.
struct Forgetful;

impl StateStore for Forgetful {
    fn put_fence(&self, _: Uuid, _: Option<Fence>) -> LocalFuture<'static, std::io::Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn put_clock(&self, _: cdp_journal::Instant) -> LocalFuture<'static, std::io::Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

/// Two files that go when this goes, unless they are kept.
struct Files {
    primary: PathBuf,
    cdp: PathBuf,
    keep: bool,
}

impl Drop for Files {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let _ = fs::remove_file(&self.primary);
        let _ = fs::remove_file(&self.cdp);
    }
}

/// A volume on fresh files, protected.
struct World {
    engine: Rc<Engine>,
    volume: Rc<Volume>,
    files: Files,
}

async fn world(ring: &Ring, dir: &Path, size_mib: u64, reserve_mib: u64, filled: bool) -> Result<World> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let number = std::process::id();
    let files = Files {
        primary: dir.join(format!("bench-{number}-primary.img")),
        cdp: dir.join(format!("bench-{number}-cdp.img")),
        keep: false,
    };
    // The CDP disk is written once, so that the file system below has nothing left to allocate: the ring has wrapped.
    make(&files.primary, size_mib, filled)?;
    make(&files.cdp, reserve_mib + reserve_mib / 8 + 64, filled)?;
    let open = |path: &Path| -> Result<Rc<dyn Device>> { Ok(Rc::new(Disk::new(ring, DiskFile::open(path)?))) };
    let engine = Engine::new(
        Rc::new(ring.clone()),
        Arc::new(HostClock::new(cdp_journal::Instant::ZERO)),
        Rc::new(Forgetful),
        EngineConfig::default(),
        Box::new(|_| {}),
    );
    let cdp = open(&files.cdp)?;
    Engine::init_disk(Rc::clone(&cdp), InitOptions { segment_size: 0, force: false }, Uuid::new_v4(), 0).await?;
    engine.add_disk(cdp, files.cdp.display().to_string()).await?;
    let volume = engine
        .open_volume(VolumeSpec {
            id: Uuid::new_v4(),
            name: "bench".to_owned(),
            path: files.primary.display().to_string(),
            size: 0,
            primary: open(&files.primary)?,
            fence: None,
            accept: None,
            attach_journal: false,
            undecided_reverts: Vec::new(),
        })
        .await?;
    volume
        .edit(|_| Settings { reserve_capacity: reserve_mib << 20, reserve_duration_s: 86400, priority: Priority::Mid })
        .await?;
    volume.enable().await?;
    Ok(World { engine, volume, files })
}

fn make(path: &Path, size_mib: u64, filled: bool) -> Result<()> {
    let file = OpenOptions::new().create_new(true).read(true).write(true).open(path)?;
    file.set_len(size_mib << 20)?;
    if filled {
        let mut random = Random(size_mib);
        let piece: Vec<u8> = (0..1 << 17).flat_map(|_| random.next().to_le_bytes()).collect();
        (0..size_mib).try_for_each(|at| file.write_all_at(&piece, at << 20))?;
        file.sync_all()?;
    }
    Ok(())
}

/// xorshift64*: which block comes next must not cost anything.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// A step that visits each of so many blocks once before it comes back, neighbours far apart: the golden section of them, or the next that has no
/// divisor in common with them.
fn far_step(blocks: u64) -> u64 {
    let divisor = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let golden = (blocks as f64 * 0.618_034) as u64;
    (golden..).find(|step| divisor(*step, blocks) == 1).unwrap_or(1)
}

/// Processor seconds of this process, its threads in the kernel too.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap_or("").split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
    // Clock ticks are 1/100 s on Linux.
    fields.get(11..13).map_or(0.0, |times| times.iter().sum::<u64>() as f64 / 100.0)
}

/// Waits until all that was written is on the primary, and the logs that are closed have their merged indexes: what a write brings about is counted whole
/// then. Answers whether that came to be in time.
async fn drained(ring: &Ring, volume: &Rc<Volume>) -> bool {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let info = volume.info();
        if info.backlog_bytes == 0 && info.logs.iter().all(|log| log.sealed || log.end.is_none()) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        ring.sleep_ns(20_000_000).await;
    }
}

/// Resident memory, MiB.
fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn percentile(sorted: &[u64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * part) as usize).map_or(0.0, |ns| *ns as f64 / 1000.0)
}

fn spread(mut ns: Vec<u64>) -> Value {
    ns.sort_unstable();
    let mean = ns.iter().sum::<u64>() as f64 / ns.len().max(1) as f64 / 1000.0;
    json!({
        "count": ns.len(), "mean_us": mean, "p50_us": percentile(&ns, 0.5), "p99_us": percentile(&ns, 0.99),
        "p999_us": percentile(&ns, 0.999), "max_us": percentile(&ns, 1.0),
    })
}

async fn engine(ring: &Ring, args: &EngineArgs) -> Result<Value> {
    ensure!(
        args.block_size > 0 && args.block_size.is_multiple_of(512),
        "--block-size is in whole sectors of 512 bytes"
    );
    ensure!(args.depth > 0, "--depth is at least 1");
    ensure!(args.distance <= args.size, "--distance {}: at most --size, {} MiB", args.distance, args.size);
    let mut world = world(ring, &args.dir, args.size, args.reserve, true).await?;
    let export = world.volume.export();
    let working = match args.working_set.max(args.distance) {
        0 => args.size,
        some => some.min(args.size),
    } << 20;
    let blocks = working / u64::from(args.block_size);
    ensure!(blocks > 0, "--working-set or --distance holds no block");
    let step = far_step(blocks);
    let turn = Cell::new(0);
    let next_block = |random: &mut Random| {
        if args.distance == 0 {
            return random.below(blocks);
        }
        turn.set((turn.get() + step) % blocks);
        turn.get()
    };
    // Bytes are counted from here, where nothing waits to be destaged, until nothing waits again: in between, the ramp's writes would be destaged beside others
    // that stay behind. Rates are of the seconds that are measured only.
    let empty = world.volume.stats();
    let begin = Instant::now();
    let from = begin + Duration::from_secs_f64(args.ramp);
    let until = from + Duration::from_secs_f64(args.seconds);
    let latencies = RefCell::new(Vec::new());
    let before: Cell<Option<(VolumeStats, f64)>> = Cell::new(None);
    let writer = async |number: usize| -> Result<()> {
        let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (number as u64 + 1));
        loop {
            let began = Instant::now();
            if began >= until {
                return Ok(());
            }
            if began >= from && before.get().is_none() {
                before.set(Some((world.volume.stats(), cpu_seconds())));
            }
            let offset = next_block(&mut random) * u64::from(args.block_size);
            let mut data = payload_buf(offset, args.block_size);
            let stamp = random.next().to_le_bytes();
            let start = (offset % BLOCK) as usize;
            data[start..start + args.block_size as usize]
                .chunks_exact_mut(64)
                .for_each(|l| l[..8].copy_from_slice(&stamp));
            export.write(offset, args.block_size, data, false).await?;
            if began >= from {
                latencies.borrow_mut().push(began.elapsed().as_nanos() as u64);
            }
        }
    };
    let ended = join_all((0..args.depth).map(writer)).await;
    ended.into_iter().collect::<Result<Vec<_>>>()?;
    let (old, cpu) = before.get().context("no write was measured: --seconds is too short")?;
    let (stats, cpu) = (world.volume.stats(), cpu_seconds() - cpu);
    let drained = drained(ring, &world.volume).await;
    let whole = world.volume.stats();
    let latencies = latencies.into_inner();
    let writes = latencies.len() as f64;
    let guest = whole.write_bytes - empty.write_bytes;
    let share = |bytes: fn(&VolumeStats) -> u64| (bytes(&whole) - bytes(&empty)) as f64 / guest.max(1) as f64;
    let result = json!({
        "iops": writes / args.seconds,
        "latency": spread(latencies),
        "cpu_us_per_write": cpu * 1e6 / writes.max(1.0),
        "guest_bytes": guest,
        "journal_bytes_per_guest_byte": share(|s| s.journal_bytes + s.index_bytes),
        "index_bytes_per_guest_byte": share(|s| s.index_bytes),
        "before_image_bytes_per_guest_byte": share(|s| s.before_image_bytes + s.before_index_bytes),
        "before_index_bytes_per_guest_byte": share(|s| s.before_index_bytes),
        "primary_bytes_per_guest_byte": share(|s| s.destaged_bytes),
        "drained": drained,
        "throttled": stats.throttled - old.throttled,
        "evicted": stats.evicted_capacity - old.evicted_capacity,
        "resident_mib": resident_mib(),
        "primary": world.files.primary,
        "cdp": world.files.cdp,
    });
    world.engine.stop().await?;
    world.files.keep = args.keep;
    Ok(result)
}

async fn views(ring: &Ring, args: &ViewArgs) -> Result<Value> {
    // Index, frames and headers of records without payload: about 100 bytes each.
    let taken = 1024 + args.records * 200 / (1 << 20);
    let reserve = if args.reserve == 0 { taken } else { args.reserve };
    let world = world(ring, &args.dir, args.size, reserve, false).await?;
    let export = world.volume.export();
    let blocks = (args.size << 20) / BLOCK;
    let made = Cell::new(0);
    let instants = RefCell::new(vec![world.engine.tick().await?]);
    let writer = async |number: u64| -> Result<()> {
        let mut random = Random(number + 1);
        while made.get() < args.records {
            made.set(made.get() + 1);
            if made.get().is_multiple_of((args.records / 1000).max(1)) {
                let instant = world.engine.tick().await?;
                instants.borrow_mut().push(instant);
            }
            export.write_zeroes(random.below(blocks) * BLOCK, BLOCK as u32, false, false).await?;
        }
        Ok(())
    };
    let began = Instant::now();
    let ended = join_all((0..256).map(writer)).await;
    ended.into_iter().collect::<Result<Vec<_>>>()?;
    let filling_s = began.elapsed().as_secs_f64();
    let resident_filled = resident_mib();
    let instants = instants.into_inner();
    let coverage = world.volume.info().coverage;
    let instants: Vec<_> = instants
        .into_iter()
        .filter(|at| coverage.iter().any(|c| c.start <= *at && c.end.is_none_or(|end| *at <= end)))
        .collect();
    ensure!(instants.len() > 1, "the history holds none of the instants that were noted");
    let mut random = Random(7);
    let (mut opened, mut young, mut old, mut live) = (vec![], vec![], vec![], vec![]);
    for number in 0..args.views {
        // All ages, evenly.
        let place = number * (instants.len() - 1) / args.views.max(2).saturating_sub(1).max(1);
        let began = Instant::now();
        let view = world.volume.open_view(instants[place.min(instants.len() - 1)], "", false).await?;
        opened.push(began.elapsed().as_nanos() as u64);
        let export = view.export();
        for _ in 0..args.reads {
            let began = Instant::now();
            export.read(random.below(blocks) * BLOCK, BLOCK as u32).await?;
            let list = if place * 2 < instants.len() { &mut old } else { &mut young };
            list.push(began.elapsed().as_nanos() as u64);
        }
        world.volume.close_view(view.id()).await?;
    }
    for _ in 0..args.reads * 20 {
        let began = Instant::now();
        export.read(random.below(blocks) * BLOCK, BLOCK as u32).await?;
        live.push(began.elapsed().as_nanos() as u64);
    }
    let result = json!({
        "records": args.records,
        "filling_s": filling_s,
        "logs": world.volume.info().logs.len(),
        "used_mib": world.volume.info().used_bytes >> 20,
        "evicted": world.volume.stats().evicted_capacity,
        "open": spread(opened),
        "read_old": spread(old),
        "read_young": spread(young),
        "read_volume": spread(live),
        "resident_after_filling_mib": resident_filled,
        "resident_mib": resident_mib(),
    });
    world.engine.stop().await?;
    Ok(result)
}
