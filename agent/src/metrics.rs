//! Prometheus metrics over HTTP, rendered from what the shards answer when they are asked.
//!
//! Counters live on the shards as plain numbers; one message per shard and scrape fetches them, so the data path pays nothing.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cdp_journal::info::{CdpState, DiskInfo, Health, Histogram, VolumeInfo, VolumeStats};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::control::{Control, DiskStatus, Shard, ShardStats};
use crate::events::wall_ns;

/// A scraper that takes longer is cut off.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 8192;
/// Scrapes at a time.
const SCRAPES_MAX: usize = 8;
/// Buckets of histograms that are shown: 2^10 ns (1 µs) to 2^34 ns (17 s).
const BUCKETS_SHOWN: std::ops::RangeInclusive<usize> = 10..=33;

/// Serves `GET /metrics` until it is dropped.
pub async fn serve(listener: TcpListener, control: Arc<Control>) {
    let seats = Arc::new(Semaphore::new(SCRAPES_MAX));
    loop {
        let Ok(seat) = Arc::clone(&seats).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let control = Arc::clone(&control);
                tokio::spawn(async move {
                    let _seat = seat;
                    match tokio::time::timeout(SCRAPE_TIMEOUT, answer(stream, &control)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::debug!(%peer, %error, "a scrape failed"),
                        Err(_) => tracing::debug!(%peer, "a scrape took too long"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a scrape failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Binds the listener of [`serve`].
///
/// # Errors
/// The system's.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

async fn answer(mut stream: TcpStream, control: &Control) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= HEAD_BYTES_MAX || stream.read_buf(&mut head).await? == 0 {
            return respond(&mut stream, "400 Bad Request", "no request of at most 8 KiB\n").await;
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    match words[..] {
        [b"GET", path, _] if path.split(|byte| *byte == b'?').next() == Some(b"/metrics") => {
            let text = render(control).await;
            respond(&mut stream, "200 OK", &text).await
        }
        [b"GET", _, _] => respond(&mut stream, "404 Not Found", "metrics are at /metrics\n").await,
        _ => respond(&mut stream, "405 Method Not Allowed", "only GET /metrics\n").await,
    }
}

async fn respond(stream: &mut TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

async fn render(control: &Control) -> String {
    let mut page = Page::default();
    let stats = control.stats().await;
    let volumes: Vec<_> = stats.iter().flat_map(|shard: &ShardStats| &shard.volumes).collect();
    render_volumes(&mut page, &volumes);
    render_health(&mut page, &volumes, &control.unserved());
    render_disks(&mut page, &control.disks().await);
    render_agent(&mut page, control, &volumes, stats.iter().any(|shard| shard.state_failing));
    page.text
}

type Row = (VolumeInfo, VolumeStats, usize);
/// Name, help, and where the value is.
type Value<T> = (&'static str, &'static str, fn(&T) -> u64);
/// Name, help, type, and where the value is.
type TypedValue<T> = (&'static str, &'static str, &'static str, fn(&T) -> u64);
/// A stage of a request and its durations.
type Stage = (&'static str, fn(&VolumeStats) -> &Histogram);

fn render_volumes(page: &mut Page, volumes: &[&Row]) {
    let labels = |row: &Row| vec![("volume", row.0.name.clone()), ("volume_uuid", row.0.id.to_string())];
    let counters: [Value<VolumeStats>; 16] = [
        ("cdp_volume_reads_total", "Reads served.", |s| s.reads),
        ("cdp_volume_read_bytes_total", "Bytes read.", |s| s.read_bytes),
        ("cdp_volume_writes_total", "Writes acked.", |s| s.writes),
        ("cdp_volume_write_bytes_total", "Bytes written.", |s| s.write_bytes),
        ("cdp_volume_zeroes_total", "Write-zeroes requests acked.", |s| s.zeroes),
        ("cdp_volume_discards_total", "Discards acked.", |s| s.discards),
        ("cdp_volume_flushes_total", "Flushes acked.", |s| s.flushes),
        ("cdp_volume_errors_total", "Requests that ended in an error. A rise means that the guest sees errors.", |s| {
            s.errors
        }),
        ("cdp_volume_journal_bytes_total", "Bytes appended to the CDP disk for the guest's writes.", |s| {
            s.journal_bytes
        }),
        (
            "cdp_volume_index_bytes_total",
            "Bytes of index written to the CDP disk besides, for the guest's writes.",
            |s| s.index_bytes,
        ),
        ("cdp_volume_before_image_bytes_total", "Bytes appended to the CDP disk for before-images.", |s| {
            s.before_image_bytes
        }),
        (
            "cdp_volume_before_index_bytes_total",
            "Bytes of index written to the CDP disk besides, for before-images.",
            |s| s.before_index_bytes,
        ),
        ("cdp_volume_destaged_bytes_total", "Bytes written to the primary behind the ack.", |s| s.destaged_bytes),
        (
            "cdp_volume_throttled_total",
            "Requests that waited for room. A rise means that the primary or the CDP disk is too slow.",
            |s| s.throttled,
        ),
        (
            "cdp_volume_evicted_capacity_total",
            "Logs evicted for capacity. A rise means that history is shorter than asked for.",
            |s| s.evicted_capacity,
        ),
        ("cdp_volume_evicted_duration_total", "Logs evicted because of their age.", |s| s.evicted_duration),
    ];
    for (name, help, value) in counters {
        page.metric(name, help, "counter");
        for row in volumes {
            page.sample(name, &labels(row), value(&row.1));
        }
    }
    let gauges: [Value<Row>; 12] = [
        ("cdp_volume_size_bytes", "Bytes that the guest sees.", |r| r.0.size),
        ("cdp_volume_backlog_bytes", "Acked bytes that are not on the primary yet.", |r| r.0.backlog_bytes),
        ("cdp_volume_journal_used_bytes", "Bytes of CDP disk in use.", |r| r.0.used_bytes),
        ("cdp_volume_reserve_capacity_bytes", "Bytes of CDP disk that the volume may occupy; 0: no CDP.", |r| {
            r.0.settings.map_or(0, |settings| settings.reserve_capacity)
        }),
        ("cdp_volume_reserve_duration_seconds", "Seconds of history asked for; 0: no CDP.", |r| {
            r.0.settings.map_or(0, |settings| settings.reserve_duration_s)
        }),
        ("cdp_volume_window_seconds", "Seconds of history that can be viewed without a gap up to now.", |r| {
            window_s(&r.0)
        }),
        (
            "cdp_volume_window_forecast_seconds",
            "Seconds of history that capacity allows at the current rate; 0: not known.",
            |r| r.0.window_forecast_s,
        ),
        ("cdp_volume_logs", "Logs, thin ones included.", |r| r.0.logs.len() as u64),
        ("cdp_volume_views", "Open views.", |r| r.2 as u64),
        ("cdp_volume_clients", "Clients that have it open for writing.", |r| r.0.clients.into()),
        ("cdp_volume_enabled", "1: every write is kept as history.", |r| u64::from(r.0.state == CdpState::On)),
        ("cdp_volume_revert_blocks_left", "Blocks that a pending revert still has to copy.", |r| {
            r.0.revert.map_or(0, |revert| revert.blocks_total.saturating_sub(revert.blocks_done))
        }),
    ];
    for (name, help, value) in gauges {
        page.metric(name, help, "gauge");
        for row in volumes {
            page.sample(name, &labels(row), value(row));
        }
    }
    page.metric(
        "cdp_volume_before_image_ratio",
        "Share of before-images in the CDP disk space in use, 0 to 1.",
        "gauge",
    );
    for row in volumes {
        let images: u64 = row.0.logs.iter().map(|log| log.before_image_bytes).sum();
        let used: u64 = row.0.logs.iter().map(|log| log.use_bytes).sum();
        page.sample(
            "cdp_volume_before_image_ratio",
            &labels(row),
            if used == 0 { 0.0 } else { images as f64 / used as f64 },
        );
    }
    let stages: [Stage; 6] = [
        ("write", |s| &s.write_latency),
        ("queue", |s| &s.queue_latency),
        ("append", |s| &s.append_latency),
        ("sync", |s| &s.sync_latency),
        ("read", |s| &s.read_latency),
        ("destage", |s| &s.destage_latency),
    ];
    let name = "cdp_volume_latency_seconds";
    page.metric(
        name,
        "Time by stage: write (admission to ack), queue (admission to submission), append (a frame), sync (a CDP disk), read, destage (a batch).",
        "histogram",
    );
    for row in volumes {
        for (stage, histogram) in stages {
            let mut labels = labels(row);
            labels.push(("stage", stage.to_owned()));
            page.histogram(name, &labels, histogram(&row.1));
        }
    }
}

/// Volumes that could not be opened have this series, too, as lists have them: an alert must not miss them.
fn render_health(page: &mut Page, volumes: &[&Row], unserved: &[(String, Uuid)]) {
    page.metric("cdp_volume_health", "1 for the state that the volume is in; anything but ok needs a person.", "gauge");
    let served = volumes.iter().map(|row| (&row.0.name, row.0.id, row.0.health));
    let others = unserved.iter().map(|(name, id)| (name, *id, Health::PrimaryFailing));
    for (name, id, is) in served.chain(others) {
        for (health, word) in HEALTH {
            let labels = [("volume", name.clone()), ("volume_uuid", id.to_string()), ("health", (*word).to_owned())];
            page.sample("cdp_volume_health", &labels, u64::from(is == *health));
        }
    }
}

const HEALTH: &[(Health, &str)] = &[
    (Health::Ok, "ok"),
    (Health::Offline, "offline"),
    (Health::NeedsJournal, "needs_journal"),
    (Health::PrimaryChanged, "primary_changed"),
    (Health::RevertIncomplete, "revert_incomplete"),
    (Health::PrimaryFailing, "primary_failing"),
    (Health::StateFailing, "state_failing"),
];

fn window_s(info: &VolumeInfo) -> u64 {
    let open = info.coverage.last().filter(|interval| interval.end.is_none());
    open.map_or(0, |interval| info.now.0.saturating_sub(interval.start.0) / 1_000_000_000)
}

fn render_disks(page: &mut Page, disks: &[DiskStatus]) {
    let values: [TypedValue<DiskInfo>; 6] = [
        ("cdp_disk_size_bytes", "Bytes of the CDP disk.", "gauge", |d| d.size),
        ("cdp_disk_segments", "Segments.", "gauge", |d| d.segments),
        ("cdp_disk_segments_free", "Segments free.", "gauge", |d| d.segments_free),
        (
            "cdp_disk_reserved_bytes",
            "Bytes promised to volumes, or in use by volumes that are not served.",
            "gauge",
            |d| d.reserved_bytes,
        ),
        ("cdp_disk_online", "1: there and healthy.", "gauge", |d| u64::from(d.online)),
        ("cdp_disk_errors_total", "I/O errors. The first one takes the disk out of service.", "counter", |d| d.errors),
    ];
    for (name, help, kind, value) in values {
        page.metric(name, help, kind);
        for disk in disks {
            let id = if disk.info.id.is_nil() { String::new() } else { disk.info.id.to_string() };
            page.sample(name, &[("disk", disk.info.path.clone()), ("disk_id", id)], value(&disk.info));
        }
    }
}

fn render_agent(page: &mut Page, control: &Control, volumes: &[&Row], state_failing: bool) {
    use std::sync::atomic::Ordering::Relaxed;
    page.metric("cdp_agent_info", "Version of the agent.", "gauge");
    page.sample("cdp_agent_info", &[("version", env!("CARGO_PKG_VERSION").to_owned())], 1_u64);
    page.metric("cdp_agent_time_seconds", "The wall clock, to see that a scrape is fresh.", "gauge");
    page.sample("cdp_agent_time_seconds", &[], wall_ns() as f64 / 1e9);
    page.metric(
        "cdp_agent_clock_lead_seconds",
        "By how much the clock of instants runs ahead of the wall clock.",
        "gauge",
    );
    page.sample("cdp_agent_clock_lead_seconds", &[], control.clock_lead_ns() as f64 / 1e9);
    page.metric(
        "cdp_agent_state_failing",
        "1: the state directory has taken nothing for longer than stall_max; writes of protected volumes wait for it.",
        "gauge",
    );
    page.sample("cdp_agent_state_failing", &[], u64::from(state_failing));
    page.metric("cdp_agent_backlog_bytes", "Acked bytes of all volumes that are not on their primaries yet.", "gauge");
    page.sample("cdp_agent_backlog_bytes", &[], volumes.iter().map(|row| row.0.backlog_bytes).sum::<u64>());
    page.metric("cdp_agent_events_total", "State changes by kind.", "counter");
    for (kind, count) in control.events().counts() {
        page.sample("cdp_agent_events_total", &[("kind", kind.word())], count);
    }
    let shards: [TypedValue<Shard>; 8] = [
        ("cdp_shard_heartbeat_total", "Turns of a shard's loop. Standing still means stuck.", "counter", |s| {
            s.heartbeat()
        }),
        ("cdp_nbd_connections", "NBD connections.", "gauge", |s| s.client_stats().connections.load(Relaxed)),
        ("cdp_nbd_connections_total", "NBD connections ever.", "counter", |s| {
            s.client_stats().connections_total.load(Relaxed)
        }),
        ("cdp_nbd_requests_total", "NBD requests.", "counter", |s| s.client_stats().requests.load(Relaxed)),
        ("cdp_nbd_errors_total", "NBD requests answered with an error.", "counter", |s| {
            s.client_stats().errors.load(Relaxed)
        }),
        ("cdp_nbd_received_bytes_total", "Bytes of payload received.", "counter", |s| {
            s.client_stats().bytes_in.load(Relaxed)
        }),
        ("cdp_nbd_sent_bytes_total", "Bytes of replies sent.", "counter", |s| s.client_stats().bytes_out.load(Relaxed)),
        ("cdp_nbd_sends_total", "System calls that sent replies.", "counter", |s| s.client_stats().sends.load(Relaxed)),
    ];
    for (name, help, kind, value) in shards {
        page.metric(name, help, kind);
        for shard in control.shards() {
            page.sample(name, &[("shard", shard.name().to_owned())], value(shard));
        }
    }
}

/// A page in Prometheus' text format.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn metric(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}"); // writing to memory cannot fail
    }

    fn sample(&mut self, name: &str, labels: &[(&str, String)], value: impl std::fmt::Display) {
        let shown: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        let labels = if shown.is_empty() { String::new() } else { format!("{{{}}}", shown.join(",")) };
        let _ = writeln!(self.text, "{name}{labels} {value}");
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, String)], histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        let mut below: u64 = histogram.buckets[..*BUCKETS_SHOWN.start()].iter().sum();
        for index in BUCKETS_SHOWN {
            below += histogram.buckets[index];
            let bound = (1_u64 << (index + 1)) as f64 / 1e9;
            let labels = [labels, &[("le", bound.to_string())]].concat();
            self.sample(&bucket, &labels, below);
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf".to_owned())]].concat(), histogram.count);
        self.sample(&format!("{name}_sum"), labels, histogram.sum_ns as f64 / 1e9);
        self.sample(&format!("{name}_count"), labels, histogram.count);
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_cumulative_and_whole() {
        let mut histogram = Histogram::default();
        for ns in [5, 2_000, 2_000, 5_000_000, 100_000_000_000] {
            histogram.record(ns);
        }
        let mut page = Page::default();
        page.histogram("h", &[("stage", "x".to_owned())], &histogram);
        let value = |le: &str| {
            let start = format!("h_bucket{{stage=\"x\",le=\"{le}\"}} ");
            page.text.lines().find_map(|line| line.strip_prefix(&start)).map(str::to_owned)
        };
        assert_eq!(value("0.000002048").as_deref(), Some("3"), "{}", page.text);
        assert_eq!(value("0.008388608").as_deref(), Some("4"));
        assert_eq!(value("17.179869184").as_deref(), Some("4"));
        assert_eq!(value("+Inf").as_deref(), Some("5"));
        assert!(page.text.contains("h_count{stage=\"x\"} 5"));
    }

    #[test]
    fn names_cannot_break_the_format() {
        let mut page = Page::default();
        page.metric("m", "What it is.", "gauge");
        page.sample("m", &[("disk", "/a\"b\\c\nd".to_owned())], 1);
        assert_eq!(page.text, "# HELP m What it is.\n# TYPE m gauge\nm{disk=\"/a\\\"b\\\\c\\nd\"} 1\n");
    }

    #[test]
    fn every_health_has_its_series() {
        let words: Vec<&str> = HEALTH.iter().map(|(_, word)| *word).collect();
        for health in [
            Health::Ok,
            Health::Offline,
            Health::NeedsJournal,
            Health::PrimaryChanged,
            Health::RevertIncomplete,
            Health::PrimaryFailing,
            Health::StateFailing,
        ] {
            assert!(words.contains(&crate::grpc::convert::health(health).word().as_str()), "{health:?}");
        }
    }
}
