//! The picture of a timeline: one column per bucket, one row per kind of thing.

use cdp_proto::{parse::size_text, v1};

use crate::output::{count, instant, span};

const LABEL_COLUMNS: usize = 10;
const COLUMNS_MIN: usize = 20;
const COLUMNS_MAX: usize = 1000;
/// Rows of the write density; each has eight levels.
const DENSITY_ROWS: u64 = 3;
const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Columns that a picture has room for: the terminal's, or those of 80 characters.
pub fn columns() -> u32 {
    let terminal = console::Term::stdout().size_checked().map_or(80, |(_, columns)| usize::from(columns));
    let columns = terminal.saturating_sub(LABEL_COLUMNS + 1).clamp(COLUMNS_MIN, COLUMNS_MAX);
    u32::try_from(columns).unwrap_or(80)
}

/// The picture, and lists of what cannot be read from it.
pub fn timeline(volume: &str, timeline: &v1::TimelineResponse) -> String {
    let columns = timeline.buckets.len();
    if columns == 0 || timeline.to <= timeline.from {
        return format!("{volume}: no history\n");
    }
    let axis = Axis { from: timeline.from, length: timeline.to - timeline.from, columns };
    let mut text = format!(
        "{volume}: {} to {} ({}, a column is {})\n\n",
        instant(timeline.from),
        instant(timeline.to),
        span(axis.length),
        span(axis.length / columns as u64)
    );
    text += &density(&timeline.buckets);
    text += &row("flushes", &flushes(&timeline.buckets));
    text += &row("coverage", &coverage(&axis, &timeline.coverage));
    text += &row("logs", &logs(&axis, &timeline.cdp_info));
    text +=
        &row("markers", &axis.points(timeline.snaps.iter().map(|snap| (snap.time, if snap.auto { '·' } else { '▼' }))));
    if !timeline.reverts.is_empty() {
        let targets = timeline.reverts.iter().map(|revert| (revert.target, '○'));
        text += &row("reverts", &axis.points(targets.chain(timeline.reverts.iter().map(|revert| (revert.time, '◀')))));
    }
    text += &legend(timeline);
    text
}

struct Axis {
    from: u64,
    length: u64,
    columns: usize,
}

impl Axis {
    /// The column of an instant; `None` outside the span.
    fn column(&self, time: u64) -> Option<usize> {
        let offset = time.checked_sub(self.from).filter(|offset| *offset <= self.length)?;
        let column = u128::from(offset) * self.columns as u128 / (u128::from(self.length) + 1);
        usize::try_from(column).ok()
    }

    /// The column of an instant, the nearest one for those outside.
    fn column_near(&self, time: u64) -> usize {
        self.column(time).unwrap_or(if time < self.from { 0 } else { self.columns - 1 })
    }

    fn overlaps(&self, start: u64, end: u64) -> bool {
        start <= self.from + self.length && end >= self.from
    }

    /// A row with a sign at each instant inside; a '▼' is not hidden by what comes after it.
    fn points(&self, points: impl Iterator<Item = (u64, char)>) -> Vec<char> {
        let mut row = vec![' '; self.columns];
        for (time, sign) in points {
            if let Some(column) = self.column(time).filter(|column| row[*column] != '▼') {
                row[column] = sign;
            }
        }
        row
    }
}

fn row(label: &str, cells: &[char]) -> String {
    let line = format!("{label:<LABEL_COLUMNS$}{}", cells.iter().collect::<String>());
    format!("{}\n", line.trim_end())
}

fn density(buckets: &[v1::TimelineBucket]) -> String {
    let peak = buckets.iter().map(|bucket| bucket.blocks).max().unwrap_or(0);
    let level = |bucket: &v1::TimelineBucket, row: u64| {
        // Rounded up: a single write is seen beside a million.
        let height = (u128::from(bucket.blocks) * u128::from(DENSITY_ROWS * 8)).div_ceil(u128::from(peak.max(1)));
        LEVELS
            [usize::try_from(height).unwrap_or(usize::MAX).saturating_sub(usize::try_from(row * 8).unwrap_or(0)).min(8)]
    };
    (0..DENSITY_ROWS)
        .rev()
        .map(|at| {
            row(
                if at == 0 { "writes" } else { "" },
                &buckets.iter().map(|bucket| level(bucket, at)).collect::<Vec<_>>(),
            )
        })
        .collect()
}

/// A flush with no write in flight is a dot; a column that has only others has a small one.
fn flushes(buckets: &[v1::TimelineBucket]) -> Vec<char> {
    let sign = |bucket: &v1::TimelineBucket| match (bucket.flushes, bucket.flushes_clean) {
        (0, _) => ' ',
        (_, 0) => '.',
        _ => '•',
    };
    buckets.iter().map(sign).collect()
}

/// What lies next to an instant.
pub fn around(located: &v1::LocateResponse) -> String {
    let mut text = format!("\nAround {} ({})\n", instant(located.time), located.time);
    for one in &located.results {
        let name = one.result.as_ref().map_or("?", |result| &result.volume_name);
        if let Some(result) = one.result.as_ref().filter(|result| result.code != 0) {
            text += &format!("{}: {}\n", result.volume, result.message);
            continue;
        }
        let distance = |time: u64| match time.cmp(&located.time) {
            std::cmp::Ordering::Equal => "at it".to_owned(),
            std::cmp::Ordering::Less => format!("{} before", span(located.time - time)),
            std::cmp::Ordering::Greater => format!("{} after", span(time - located.time)),
        };
        let flush = |time: u64| match time {
            0 => "none".to_owned(),
            time => format!("{} ({time}), {}", instant(time), distance(time)),
        };
        let snap = |snap: &Option<v1::Snap>| {
            let found = snap.as_ref();
            found.map_or_else(|| "none".to_owned(), |snap| format!("{}, {}", snap.name, distance(snap.time)))
        };
        text += &crate::output::fields(&[
            ("Volume", name.to_owned()),
            ("Can be viewed", if one.viewable { "yes" } else { "no" }.to_owned()),
            ("Flush-clean before", flush(one.flush_before)),
            ("Flush-clean after", flush(one.flush_after)),
            ("Marker before", snap(&one.snap_before)),
            ("Marker after", snap(&one.snap_after)),
        ]);
    }
    text
}

fn coverage(axis: &Axis, intervals: &[v1::Interval]) -> Vec<char> {
    let mut row = vec![' '; axis.columns];
    for interval in intervals {
        let end = if interval.end == 0 { u64::MAX } else { interval.end };
        if axis.overlaps(interval.start, end) {
            row[axis.column_near(interval.start)..=axis.column_near(end)].fill('━');
            // Where it begins or ends inside the picture.
            for edge in [interval.start, end] {
                if edge != axis.from
                    && edge != axis.from + axis.length
                    && let Some(column) = axis.column(edge)
                {
                    row[column] = '┿';
                }
            }
        }
    }
    row
}

fn logs(axis: &Axis, logs: &[v1::CdpInfo]) -> Vec<char> {
    let mut row = vec![' '; axis.columns];
    let mut free = 0;
    for log in logs {
        let end = if log.end_time == 0 { u64::MAX } else { log.end_time };
        if !axis.overlaps(log.start_time, end) {
            continue;
        }
        let start = axis.column_near(log.start_time);
        row[start] = '|';
        let state = if log.thin {
            "t"
        } else if !log.recording {
            "x"
        } else {
            ""
        };
        let name = format!("{}{state}", log.seq);
        // A number that would run into the next log's is left out.
        if start >= free && start + 1 + name.len() <= axis.column_near(end) + 1 {
            for (place, digit) in row[start + 1..].iter_mut().zip(name.chars()) {
                *place = digit;
            }
            free = start + 1 + name.len();
        }
    }
    row
}

fn legend(timeline: &v1::TimelineResponse) -> String {
    // An agent is not trusted to send numbers that add up.
    let total = |of: fn(&v1::TimelineBucket) -> u64| timeline.buckets.iter().map(of).fold(0, u64::saturating_add);
    let blocks = total(|bucket| bucket.blocks);
    let bytes = total(|bucket| bucket.bytes);
    let flushes = total(|bucket| bucket.flushes);
    let clean = total(|bucket| bucket.flushes_clean);
    let peak = timeline.buckets.iter().map(|bucket| bucket.blocks).max().unwrap_or(0);
    let mut text = format!(
        "\n{} written ({}), {flushes} flush points, {clean} of them clean; at most {} in a column\n",
        count(blocks, "block"),
        size_text(bytes),
        count(peak, "block")
    );
    for snap in timeline.snaps.iter().filter(|snap| !snap.auto) {
        text += &format!("▼ {}  {} ({})\n", instant(snap.time), snap.name, snap.time);
    }
    let auto = timeline.snaps.iter().filter(|snap| snap.auto).count();
    if auto > 0 {
        text += &format!("· {}\n", count(auto as u64, "automatic marker"));
    }
    for revert in &timeline.reverts {
        text += &format!(
            "◀ {}  revert to ○ {}; undo with --at {}\n",
            instant(revert.time),
            instant(revert.target),
            revert.time.saturating_sub(1)
        );
    }
    for interval in timeline.coverage.iter().filter(|interval| interval.end != 0) {
        text += &format!("┿ {}  coverage ends: {}\n", instant(interval.end), interval.end_reason);
    }
    if timeline.cdp_info.iter().any(|log| log.thin) {
        text += "t thin log: only its start can be viewed\n";
    }
    if timeline.cdp_info.iter().any(|log| !log.recording && !log.thin) {
        text += "x CDP was disabled\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn sample() -> v1::TimelineResponse {
        let bucket = |at: u64, writes| v1::TimelineBucket {
            start: at * S,
            blocks: writes,
            bytes: writes * 4096,
            flushes: writes % 3,
            flushes_clean: writes % 2,
        };
        let snap = |time, auto| v1::Snap { name: format!("m{time}"), time: time * S, kind: 1, auto };
        let log = |seq, start, end| v1::CdpInfo {
            seq,
            start_time: start * S,
            end_time: end * S,
            recording: true,
            ..Default::default()
        };
        v1::TimelineResponse {
            from: 0,
            to: 10 * S - 1,
            buckets: (0..10).map(|at| bucket(at, if at == 9 { 1000 } else { at })).collect(),
            snaps: vec![snap(1, true), snap(3, false), snap(3, true), snap(99, false)],
            reverts: vec![v1::RevertPoint { time: 8 * S, target: 2 * S }],
            cdp_info: vec![log(7, 0, 5), log(8, 5, 0)],
            coverage: vec![v1::Interval { start: 4 * S, end: 0, end_reason: String::new() }],
        }
    }

    #[test]
    fn everything_has_its_column() {
        let picture = timeline("demo", &sample());
        let lines: Vec<&str> = picture.lines().collect();
        assert_eq!(lines[0], "demo: - to 1970-01-01T00:00:09.999999999Z (9.999s, a column is 999.999ms)");
        assert_eq!(
            &lines[2..10],
            [
                "                   █",
                "                   █",
                "writes     ▁▁▁▁▁▁▁▁█",
                "flushes    •. .• •..",
                "coverage      ┿━━━━━",
                "logs      |7   |8",
                "markers    · ▼",
                "reverts     ○     ◀",
            ]
        );
        assert!(picture.contains("undo with --at 7999999999"), "{picture}");
    }

    #[test]
    fn extremes_do_not_panic() {
        assert_eq!(timeline("demo", &v1::TimelineResponse::default()), "demo: no history\n");
        let mut wide = sample();
        (wide.from, wide.to) = (1, u64::MAX);
        for bucket in &mut wide.buckets {
            (bucket.blocks, bucket.bytes) = (u64::MAX, u64::MAX);
        }
        wide.snaps[0].time = u64::MAX;
        wide.cdp_info[0].end_time = u64::MAX;
        wide.coverage[0].start = u64::MAX;
        assert!(timeline("demo", &wide).contains("█"));
        wide.buckets.truncate(1);
        assert!(timeline("demo", &wide).contains("writes"));
    }
}
