//! The agent's life: start, recover, serve, drain, stop.
//!
//! Readiness is told after recovery; the watchdog is fed only while every shard's loop turns. The first SIGTERM or SIGINT
//! drains and stops, the second one ends at once: what was acked is in the journal either way.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use cdp_journal::info::{CdpState, DiskInfo, Health, Settings};
use cdp_journal::{EngineConfig, Error, InitOptions};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Attach, Config, Listen, UnixListen};
use crate::control::{Control, Local, NewVolume, VolumeStatus};
use crate::events::{EventHub, wall_ns};
use crate::frontend::fuse::{self, FuseServer};
use crate::frontend::nbd::{ExportDirectory, ExportKind, Listener, NbdConfig, NbdServer};
use crate::grpc::convert::Place;
use crate::grpc::{About, Service};
use crate::mounts::{self, Mount};
use crate::state::{StateDir, ViewRecord};
use crate::{listen, metrics, quiesce};

/// Clients get so long for the rest of their answers.
const DRAIN_GRACE: Duration = Duration::from_secs(10);
/// gRPC calls under way get so long to end.
const CALLS_GRACE: Duration = Duration::from_secs(5);
/// Unmounting the views gets so long: a mount under way may wait for a disk that hangs.
const UNMOUNT_GRACE: Duration = Duration::from_secs(30);
/// Guests that a call holds frozen get so long to be thawed: one whose freeze takes long takes the thaw only after it.
const THAW_GRACE: Duration = Duration::from_secs(30);
/// Between two looks at the shards' heartbeats, at most.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// The volume of `--dev`.
const DEMO: &str = "demo";

/// What `--dev` was given.
#[derive(Clone, Debug)]
pub struct Dev {
    /// Everything lives here.
    pub dir: PathBuf,
    /// Bytes of the demo volume, when it is made.
    pub size: u64,
    /// Bytes of the CDP disk, when it is made.
    pub cdp_size: u64,
}

impl Dev {
    /// Makes the directory, and the configuration for it.
    pub fn prepare(&mut self) -> Result<Config> {
        std::fs::create_dir_all(&self.dir).with_context(|| format!("create {}", self.dir.display()))?;
        self.dir = self.dir.canonicalize().with_context(|| format!("find {}", self.dir.display()))?;
        let socket = |name: &str| -> Result<Listen> {
            let path = self.dir.join(name);
            if path.as_os_str().len() > 107 {
                bail!(
                    "{}: the path of a socket has at most 107 bytes; choose a directory with a shorter path",
                    path.display()
                );
            }
            Ok(Listen { unix: Some(UnixListen { mode: 0o600, ..UnixListen::at(path) }), tcp: None })
        };
        // Where `enable` has to choose, it takes what this CDP disk can give.
        let mut engine = EngineConfig::default();
        let cdp_size = std::fs::metadata(self.cdp()).map_or(self.cdp_size, |found| found.len());
        engine.default_settings.reserve_capacity = cdp_size - cdp_size / 16;
        Ok(Config {
            engine,
            state_dir: self.dir.join("state"),
            lock_memory: false,
            grpc: socket("agent.sock")?,
            nbd: socket("nbd.sock")?,
            metrics: Some(([127, 0, 0, 1], 0).into()),
            ..Config::default()
        })
    }

    fn primary(&self) -> PathBuf {
        self.dir.join("primary.img")
    }

    fn cdp(&self) -> PathBuf {
        self.dir.join("cdp.img")
    }
}

/// Looks at everything that can be looked at without taking it into use.
pub fn check(config: &Config) -> Result<()> {
    StateDir::check(&config.state_dir)?;
    for (what, listen) in [("grpc", &config.grpc), ("nbd", &config.nbd)] {
        if let Some(files) = listen.tcp.as_ref().and_then(|tcp| tcp.tls.as_ref()) {
            listen::acceptor(files, &[]).with_context(|| format!("[{what}]"))?;
        }
    }
    for path in config.disks.iter().chain(config.volumes.iter().map(|volume| &volume.path)) {
        std::fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    }
    Ok(())
}

/// Runs the agent until it is told to stop. `config_path` is for `status`; `None`: by `--dev`.
pub async fn run(config: Config, config_path: Option<&Path>, dev: Option<Dev>) -> Result<()> {
    let start_ns = wall_ns();
    let (stop, stopping) = watch::channel(false);
    watch_signals(stop.clone())?;
    let (state, saved) = StateDir::open(&config.state_dir)?;
    let events = Arc::new(EventHub::default());
    // Before anything that can take long: guests may stand still since the last agent ended.
    quiesce::thaw_left_behind(saved.frozen.clone(), &events, &state);
    let files = take_files(&config, &saved.views).await;
    let begun = std::time::Instant::now();
    let control = Control::start(&config, state, saved, events).await?;
    tracing::info!(ms = begun.elapsed().as_millis(), "recovered");

    let served = match serve(&config, config_path, dev.as_ref(), files, start_ns, &control, &stopping).await {
        Ok(served) => served,
        Err(error) => {
            // What was opened is closed in order, also when a socket is taken.
            control.stop(Duration::ZERO).await.context("stop after a failed start")?;
            return Err(error);
        }
    };
    ready(&control).await;
    let watchdog = tokio::spawn(watch_shards(Arc::clone(&control)));
    let expiry = tokio::spawn(Arc::clone(&control).expire_views());
    if let Some(dev) = &dev {
        println!("{}", usage(dev, &demo_state(&control).await));
    }

    let mut stopped = stopping.clone();
    let _ = stopped.wait_for(|stopping| *stopping).await; // the sender lives until the end of this function
    notify(&[NotifyState::Stopping, NotifyState::Status("draining")]);
    tracing::info!("stopping: no new clients; draining");
    watchdog.abort();
    expiry.abort();
    // While the guests' disks are served as ever: a guest writes what it has before it can take a thaw.
    if !control.quiesces.stop(THAW_GRACE).await {
        tracing::warn!("guests may be frozen still: the next start thaws them");
    }
    // Then: calls under way that wait for a disk, or the state directory, end with its error, and let go of what the rest of this needs.
    control.will_stop().await;
    served.stop(&control).await;
    let result = control.stop(DRAIN_GRACE).await;
    tracing::info!("stopped");
    drop(stop);
    result
}

/// Everything that listens.
struct Served {
    listeners: JoinSet<()>,
    grpc: tokio::task::JoinHandle<std::result::Result<(), tonic::transport::Error>>,
    /// Unmounted when dropped.
    files: Option<FuseServer>,
    /// Removed when dropped.
    _sockets: Vec<listen::SocketFile>,
    _metrics_file: Option<MetricsFile>,
}

impl Served {
    /// Ends the listeners; connections that reached their shard are the shard's to drain.
    async fn stop(mut self, control: &Control) {
        self.listeners.shutdown().await;
        match tokio::time::timeout(CALLS_GRACE, &mut self.grpc).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(%error, "the gRPC service ended with an error"),
            Ok(Err(error)) => tracing::warn!(%error, "the gRPC service ended early"),
            Err(_) => {
                tracing::warn!("gRPC calls under way were cut off");
                self.grpc.abort();
            }
        }
        if tokio::time::timeout(UNMOUNT_GRACE, control.take_local()).await.is_err() {
            tracing::warn!("views may be mounted still: the next start unmounts them");
        }
        drop(self.files.take());
    }
}

/// `DIR/metrics.addr`, there while the metrics are.
struct MetricsFile(PathBuf);

impl Drop for MetricsFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // somebody removed it already
    }
}

async fn serve(
    config: &Config,
    config_path: Option<&Path>,
    dev: Option<&Dev>,
    files: Option<fuse::Place>,
    start_ns: u64,
    control: &Arc<Control>,
    stopping: &watch::Receiver<bool>,
) -> Result<Served> {
    if let Some(dev) = dev {
        set_up_demo(control, dev).await.context("set up the demo volume")?;
    }
    let mut listeners = JoinSet::new();
    let mut sockets = Vec::new();
    let mut place =
        Place { host_uuid: control.state().host_uuid().to_string(), host_name: host_name(), ..Place::default() };

    let files = files.and_then(|files| serve_files(files, control));
    if let Some(files) = &files {
        place.volumes = Some(files.volumes().to_owned());
        place.views = Some(files.views().to_owned());
    }

    let nbd_config = NbdConfig {
        connections_max: config.nbd_connections_max,
        // As many guests as may be connected may come back at once.
        tcp_handshakes_max: config.nbd_connections_max.max(NbdConfig::default().tcp_handshakes_max),
        ..NbdConfig::default()
    };
    let server = NbdServer::new(nbd_config, Arc::clone(control) as _);
    if let Some(unix) = &config.nbd.unix {
        let (listener, socket) = listen::unix(unix).context("[nbd]")?;
        place.nbd.push(format!("nbd+unix:///{{}}?socket={}", percent(&unix.path.display().to_string())));
        sockets.push(socket);
        listeners.spawn(Arc::clone(&server).serve(Listener::Unix(listener)));
    }
    // Views that were mounted are mounted again: by their files, or by the socket that is served now.
    let files_dir = config.fuse_dir().filter(|_| files.is_some() || config.attach == Attach::Nbd);
    if let Some(dir) = files_dir {
        control.give_local(&fuse::directory_of(&dir, ExportKind::View)).await;
    }
    if let Some(tcp) = &config.nbd.tcp {
        let (listener, tls) = listen::tcp(tcp, "NBD", &[]).await?;
        let scheme = if tls.is_some() { "nbds" } else { "nbd" };
        place.nbd.push(format!("{scheme}://{}/{{}}", listener.local_addr().context("ask for the NBD port")?));
        listeners.spawn(Arc::clone(&server).serve(Listener::Tcp { listener, tls }));
    }

    let mut metrics_file = None;
    if let Some(address) = config.metrics {
        let listener = metrics::listen(address).await.with_context(|| format!("[metrics] listen on {address}"))?;
        let address = listener.local_addr().context("ask for the metrics port")?;
        tracing::info!(%address, "metrics are served at /metrics");
        if let Some(dev) = dev {
            let path = dev.dir.join("metrics.addr");
            std::fs::write(&path, format!("{address}\n")).with_context(|| format!("write {}", path.display()))?;
            metrics_file = Some(MetricsFile(path));
        }
        listeners.spawn(metrics::serve(listener, Arc::clone(control)));
    }

    let (mut incoming, mut endpoints) = (Vec::new(), Vec::new());
    if let Some(unix) = &config.grpc.unix {
        let (listener, socket) = listen::unix(unix).context("[grpc]")?;
        endpoints.push(format!("unix:{}", unix.path.display()));
        sockets.push(socket);
        incoming.push(listen::accept_unix(listener));
    }
    if let Some(tcp) = &config.grpc.tcp {
        let (listener, acceptor) = listen::tcp(tcp, "gRPC", &[b"h2"]).await?;
        let scheme = if acceptor.is_some() { "https" } else { "http" };
        endpoints.push(format!("{scheme}://{}", listener.local_addr().context("ask for the gRPC port")?));
        incoming.push(listen::accept_tcp(listener, acceptor));
    }
    let config_path = config_path.map(|path| path.display().to_string()).unwrap_or_default();
    tracing::info!(grpc = ?endpoints, nbd = ?place.nbd, "serving");
    let about = About { place, start_ns, endpoints, config_path };
    let service = Service::new(Arc::clone(control), about, stopping.clone());
    let grpc = tokio::spawn(service.serve(incoming));
    Ok(Served { listeners, grpc, files, _sockets: sockets, _metrics_file: metrics_file })
}

/// Takes the directory of local files, and away what an earlier agent left attached there. Without it the agent goes on.
async fn take_files(config: &Config, views: &[ViewRecord]) -> Option<fuse::Place> {
    let dir = config.fuse_dir()?;
    let ids: Vec<String> = views.iter().map(|view| view.id.to_string()).collect();
    let places: Vec<(PathBuf, String)> =
        views.iter().filter_map(|view| view.mount.clone()).map(|mount| (mount.dir, mount.device)).collect();
    let taken = tokio::task::spawn_blocking(move || {
        // First of all: whatever is attached there while another agent has the directory is not an earlier one's.
        let place = fuse::Place::take(&dir)?;
        let images = fuse::directory_of(&dir, ExportKind::View);
        let calls = images.with_file_name("calls");
        // Also of a view that was opened and not recorded any more.
        let ours =
            |file: &Path| file.parent() == Some(&images) || ids.iter().any(|id| mounts::lies_in(file, &images, id));
        let placed = |mount: &Mount| {
            let device = mounts::nbd::device_of(&mount.source);
            let on_record = |(dir, known): &(PathBuf, String)| {
                *dir == mount.dir && (known.is_empty() || Some(known.as_str()) == device)
            };
            mount.dir.parent() == Some(&calls) || places.iter().any(on_record)
        };
        let swept = mounts::sweep(ours, placed);
        for dir in swept {
            tracing::warn!(dir = %dir.display(), "a view of an agent that is gone was mounted there: it is unmounted");
        }
        place.clear();
        Ok::<_, std::io::Error>(place)
    });
    match taken.await {
        Ok(Ok(place)) => Some(place),
        Ok(Err(error)) => {
            tracing::warn!(%error, "volumes and views are not served as local files");
            None
        }
        Err(_) => None, // the runtime ends
    }
}

fn serve_files(place: fuse::Place, control: &Arc<Control>) -> Option<FuseServer> {
    let dir = place.dir().display().to_string();
    match FuseServer::start(place, &(Arc::clone(control) as Arc<dyn ExportDirectory<Local>>)) {
        Ok(server) => {
            tracing::info!(dir, "volumes and views are local files");
            Some(server)
        }
        Err(error) => {
            tracing::warn!(dir, %error, "volumes and views are not served as local files: FUSE is not to be had");
            None
        }
    }
}

/// Makes what is missing of the demo; what is there goes on as it is.
async fn set_up_demo(control: &Control, dev: &Dev) -> Result<()> {
    let demo = control.resolve(DEMO).ok();
    // With a fence it had its journal somewhere: an empty disk in that place would only hide the loss.
    let had_journal = match &demo {
        Some(demo) => control.state().fence(demo.uuid)?.is_some(),
        None => false,
    };
    let known = control.disks().await.into_iter().find(|disk| Path::new(&disk.info.path) == dev.cdp());
    // Recorded, and its making was cut off.
    let known = known.filter(|disk| disk.info.online || had_journal);
    let disk = match known {
        Some(disk) => Some(disk.info),
        None if had_journal => None,
        None => {
            let there = dev.cdp().exists();
            let options = InitOptions { segment_size: 0, force: there }; // left by a first start that was interrupted
            let made = control.init_disk(dev.cdp(), if there { 0 } else { dev.cdp_size }, options).await;
            Some(made.context("make the CDP disk")?.info)
        }
    };
    let uuid = match demo {
        Some(demo) => demo.uuid,
        None => {
            let there = dev.primary().exists();
            let size = if there { 0 } else { dev.size };
            let new = NewVolume { name: DEMO.into(), path: dev.primary(), uuid: None, size, create: !there };
            control.add_volume(new).await.context("add the volume")?
        }
    };
    if had_journal {
        return Ok(());
    }
    let mut settings = Settings {
        reserve_capacity: disk.as_ref().map_or(0, room),
        reserve_duration_s: 24 * 3600,
        ..control.engine_config().default_settings
    };
    let edit = |settings| control.on_volume(uuid, move |volume| async move { volume.edit(move |_| settings).await });
    match edit(settings).await {
        Err(Error::NoSpace { free, .. }) if free > 0 && free < settings.reserve_capacity => {
            settings.reserve_capacity = free;
            edit(settings).await
        }
        done => done,
    }
    .context("set its capacity")?;
    control.on_volume(uuid, |volume| async move { volume.enable().await }).await.context("enable it")
}

/// What a CDP disk can promise to one volume.
fn room(disk: &DiskInfo) -> u64 {
    (disk.segments * disk.segment_size).saturating_sub(disk.reserved_bytes)
}

/// How the demo is doing, in a sentence.
async fn demo_state(control: &Control) -> String {
    let demo = match control.resolve(DEMO) {
        Ok(demo) => control.volume(demo.uuid).await,
        Err(error) => Err(error),
    };
    match demo {
        Ok(VolumeStatus { info: Ok(info), .. }) => match (info.health, info.state) {
            (Health::Ok, CdpState::On) => format!("The volume \"{DEMO}\" is protected and served."),
            (Health::Ok, CdpState::Off) => format!("The volume \"{DEMO}\" is served; its protection is switched off."),
            _ => format!("The volume \"{DEMO}\" NEEDS ATTENTION: {}.", info.health_reason),
        },
        Ok(VolumeStatus { info: Err(why), .. }) => format!("The volume \"{DEMO}\" is NOT SERVED: {why}."),
        Err(error) => format!("The volume \"{DEMO}\" is not served: {error}."),
    }
}

fn usage(dev: &Dev, state: &str) -> String {
    let dir = dev.dir.display();
    format!(
        "\
{state}
Everything is in {dir}; stop with Ctrl-C, start again with the same --dev.

  look at it      nbdinfo 'nbd+unix:///{DEMO}?socket={dir}/nbd.sock'
  as a file       {dir}/volumes/{DEMO}
  write to it     nbdcopy some.img 'nbd+unix:///{DEMO}?socket={dir}/nbd.sock'
  boot from it    qemu-system-x86_64 -drive driver=nbd,server.type=unix,server.path={dir}/nbd.sock,export={DEMO},if=virtio

  export CDP_AGENT=unix:{dir}/agent.sock
  cdpctl info {DEMO}                          its history
  cdpctl mark {DEMO} --name before-upgrade    names this instant
  cdpctl view open {DEMO} --at before-upgrade the volume as it was, as an export of its own
  cdpctl revert {DEMO} --at before-upgrade    takes it back (no client may have it open, or --force)
"
    )
}

async fn ready(control: &Control) {
    let status = status_line(control).await;
    tracing::info!(status, "ready");
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

async fn status_line(control: &Control) -> String {
    let volumes = control.volumes().await;
    let healthy = |info: &cdp_journal::info::VolumeInfo| info.health == cdp_journal::info::Health::Ok;
    let well = volumes.iter().filter(|volume| volume.info.as_ref().is_ok_and(healthy)).count();
    match volumes.len() - well {
        0 => format!("serving {well} volumes"),
        ill => format!("serving {} volumes, {ill} of them need attention", volumes.len()),
    }
}

/// Feeds systemd's watchdog while every shard's heartbeat moves, and keeps the status line fresh.
async fn watch_shards(control: Arc<Control>) {
    let watchdog = sd_notify::watchdog_enabled();
    let interval = watchdog.map_or(WATCH_INTERVAL, |limit| (limit / 3).min(WATCH_INTERVAL));
    let mut before = control.heartbeats();
    let mut said = String::new();
    loop {
        tokio::time::sleep(interval).await;
        let now = control.heartbeats();
        let stuck = before.iter().zip(&now).position(|(before, now)| before == now);
        before = now;
        if let Some(shard) = stuck {
            tracing::error!(shard, "the shard's loop stands still: the watchdog is not fed");
            continue;
        }
        if watchdog.is_some() {
            notify(&[NotifyState::Watchdog]);
        }
        let status = status_line(&control).await;
        if status != said {
            notify(&[NotifyState::Status(&status)]);
            said = status;
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

/// The first signal stops in order, the second one at once.
fn watch_signals(stop: watch::Sender<bool>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::spawn(async move {
        for turn in 0.. {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            tracing::info!(signal = name, "signal received");
            if turn > 0 {
                tracing::warn!("second signal: ending at once; the next start recovers");
                std::process::exit(1);
            }
            stop.send_replace(true);
        }
    });
    Ok(())
}

/// Locks the process's memory, if it may keep all that it will ever get: a partial right would make later allocations fail.
pub fn lock_memory() {
    if !may_lock_all() {
        tracing::warn!("memory is not locked: LimitMEMLOCK=infinity or CAP_IPC_LOCK is needed");
        return;
    }
    match mlockall() {
        Ok(()) => tracing::debug!("memory is locked"),
        Err(error) => tracing::warn!(%error, "memory is not locked"),
    }
}

fn may_lock_all() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let unlimited = limit.is_some_and(|limit| limit.split_whitespace().next() == Some("unlimited"));
    unlimited || effective >> CAP_IPC_LOCK & 1 == 1
}

/// Pages are locked when they are first touched, so that reserved address space (stacks, arenas) costs nothing.
#[allow(unsafe_code)]
fn mlockall() -> std::io::Result<()> {
    // SAFETY: the call takes plain numbers and changes no memory's content.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

/// A path as the value of a URI's query.
fn percent(path: &str) -> String {
    let mut encoded = String::new();
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' | b'~' => {
                encoded.push(char::from(byte))
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_uris_are_encoded() {
        assert_eq!(percent("/run/cdp-agent/nbd.sock"), "/run/cdp-agent/nbd.sock");
        assert_eq!(percent("/a b/ü&?{}"), "/a%20b/%C3%BC%26%3F%7B%7D");
    }

    #[test]
    fn dev_keeps_everything_in_its_directory_and_refuses_one_that_is_too_deep() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let mut dev = Dev { dir: temp.path().join("a/../demo"), size: 1 << 20, cdp_size: 1 << 30 };
        std::fs::create_dir(temp.path().join("a")).expect("a directory");
        let config = dev.prepare().expect("prepared");
        assert!(dev.dir.is_absolute() && !dev.dir.ends_with("a/../demo"));
        for path in [&config.state_dir, &config.grpc.unix.expect("there").path, &config.nbd.unix.expect("there").path] {
            assert!(path.starts_with(&dev.dir), "{}", path.display());
        }
        let mut deep = Dev { dir: temp.path().join("d".repeat(100)), ..dev };
        assert!(deep.prepare().expect_err("too deep").to_string().contains("107 bytes"));
    }
}
