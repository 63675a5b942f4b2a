//! The timeline as a picture for documents and pages: one SVG without scripts or fonts of its own.

use cdp_proto::v1;

use crate::output::{count, instant, span};

const WIDTH: u64 = 1200;
const LEFT: u64 = 90;
const RIGHT: u64 = 20;
const DENSITY_TOP: u64 = 50;
const DENSITY_HEIGHT: u64 = 140;
const ROW: u64 = 26;

/// Draws a timeline.
pub fn timeline(volume: &str, timeline: &v1::TimelineResponse) -> String {
    let length = timeline.to.saturating_sub(timeline.from).max(1);
    // Tenths of a unit, in whole numbers: a picture of the same answer is always the same.
    let x = |time: u64| {
        let inside = time.clamp(timeline.from, timeline.from + length) - timeline.from;
        let tenths = u128::from(inside) * u128::from((WIDTH - LEFT - RIGHT) * 10) / u128::from(length);
        LEFT * 10 + u64::try_from(tenths).unwrap_or(0)
    };
    let at = |tenths: u64| format!("{}.{}", tenths / 10, tenths % 10);
    let rows = ["flushes", "coverage", "logs", "markers", "reverts"];
    let row_y = |name: &str| {
        let place = rows.iter().position(|row| *row == name).unwrap_or(0) as u64;
        DENSITY_TOP + DENSITY_HEIGHT + 20 + place * ROW
    };
    let height = row_y("reverts") + ROW + 40;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>{0}: {1} to {2}</title>\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{0}</text>\n\
         <text x=\"{LEFT}\" y=\"41\" fill=\"#555\">{1} to {2} ({3})</text>\n",
        escape(volume),
        instant(timeline.from),
        instant(timeline.to),
        span(length)
    );
    for name in rows {
        out += &format!("<text x=\"8\" y=\"{}\" fill=\"#555\">{name}</text>\n", row_y(name) + 14);
    }
    out += &format!("<text x=\"8\" y=\"{}\" fill=\"#555\">writes</text>\n", DENSITY_TOP + DENSITY_HEIGHT);
    let peak = timeline.buckets.iter().map(|bucket| bucket.blocks).max().unwrap_or(0);
    let most_flushes = timeline.buckets.iter().map(|bucket| bucket.flushes).max().unwrap_or(0);
    for (place, bucket) in timeline.buckets.iter().enumerate() {
        let end = timeline.buckets.get(place + 1).map_or(timeline.to, |next| next.start);
        let (left, right) = (x(bucket.start), x(end).max(x(bucket.start) + 1));
        let tip = format!(
            "{}: {} written, {} bytes, {} flushes ({} clean)",
            instant(bucket.start),
            count(bucket.blocks, "block"),
            bucket.bytes,
            bucket.flushes,
            bucket.flushes_clean
        );
        if bucket.blocks > 0 {
            let tall =
                (u128::from(bucket.blocks) * u128::from(DENSITY_HEIGHT)).div_ceil(u128::from(peak.max(1))) as u64;
            out += &format!(
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{tall}\" fill=\"#4477aa\"><title>{tip}</title></rect>\n",
                at(left),
                DENSITY_TOP + DENSITY_HEIGHT - tall,
                at(right - left),
            );
        }
        if bucket.flushes > 0 {
            // Darker where there are more; green where one of them is clean.
            let color = if bucket.flushes_clean > 0 { "#228833" } else { "#ccbb44" };
            let shade = 30 + u128::from(bucket.flushes) * 70 / u128::from(most_flushes.max(1));
            out += &format!(
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"14\" fill=\"{color}\" opacity=\"0.{:02}\"><title>{tip}</title></rect>\n",
                at(left),
                row_y("flushes") + 2,
                at(right - left),
                shade.min(99)
            );
        }
    }
    for interval in &timeline.coverage {
        let end = if interval.end == 0 { timeline.to } else { interval.end };
        let (left, right) = (x(interval.start), x(end).max(x(interval.start) + 5));
        let why = if interval.end_reason.is_empty() { "goes on" } else { &interval.end_reason };
        out += &format!(
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"10\" fill=\"#66ccee\"><title>{} to {}: {}</title></rect>\n",
            at(left),
            row_y("coverage") + 4,
            at(right - left),
            instant(interval.start),
            if interval.end == 0 { "now".into() } else { instant(interval.end) },
            escape(why)
        );
    }
    for log in &timeline.cdp_info {
        let end = if log.end_time == 0 { timeline.to } else { log.end_time };
        let (left, right) = (x(log.start_time), x(end).max(x(log.start_time) + 5));
        let fill = match (log.thin, log.recording) {
            (true, _) => "#eeeeee",
            (_, false) => "#ddaaaa",
            _ => "#bbbbcc",
        };
        out += &format!(
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"16\" fill=\"{fill}\" stroke=\"#fff\"><title>log {}{}</title></rect>\n",
            at(left),
            row_y("logs") + 1,
            at(right - left),
            log.seq,
            if log.thin {
                ", thin"
            } else if log.recording {
                ""
            } else {
                ", CDP was disabled"
            }
        );
        if right - left > 250 {
            out += &format!(
                "<text x=\"{}\" y=\"{}\" font-size=\"10\">{}</text>\n",
                at(left + 30),
                row_y("logs") + 13,
                log.seq
            );
        }
    }
    for snap in &timeline.snaps {
        let (color, tall) = if snap.auto { ("#999999", 6) } else { ("#aa3377", 14) };
        out += &format!(
            "<rect x=\"{}\" y=\"{}\" width=\"2\" height=\"{tall}\" fill=\"{color}\"><title>{} at {} ({})</title></rect>\n",
            at(x(snap.time)),
            row_y("markers") + 16 - tall,
            escape(&snap.name),
            instant(snap.time),
            snap.kind().word()
        );
    }
    for revert in &timeline.reverts {
        let y = row_y("reverts") + 8;
        let from = at(x(revert.time));
        if revert.target != 0 {
            let to = at(x(revert.target));
            out += &format!(
                "<path d=\"M{from} {y} L{to} {y}\" stroke=\"#ee6677\" stroke-width=\"2\" fill=\"none\"/>\n\
                 <circle cx=\"{to}\" cy=\"{y}\" r=\"4\" fill=\"#fff\" stroke=\"#ee6677\"/>\n"
            );
        }
        out += &format!(
            "<circle cx=\"{from}\" cy=\"{y}\" r=\"4\" fill=\"#ee6677\"><title>revert at {} to {}; undo with --at {}</title></circle>\n",
            instant(revert.time),
            instant(revert.target),
            revert.time.saturating_sub(1)
        );
    }
    let axis = row_y("reverts") + ROW + 6;
    out += &format!(
        "<path d=\"M{LEFT} {axis} L{} {axis}\" stroke=\"#555\"/>\n<text x=\"{LEFT}\" y=\"{}\" fill=\"#555\">{}</text>\n\
         <text x=\"{}\" y=\"{}\" fill=\"#555\" text-anchor=\"end\">{}</text>\n</svg>\n",
        WIDTH - RIGHT,
        axis + 18,
        instant(timeline.from),
        WIDTH - RIGHT,
        axis + 18,
        instant(timeline.to)
    );
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_everything_and_is_well_formed() {
        let mut sample = v1::TimelineResponse {
            from: 1_000,
            to: 101_000,
            buckets: (0..10u64)
                .map(|i| v1::TimelineBucket {
                    start: 1_000 + i * 10_000,
                    blocks: i,
                    bytes: i * 4096,
                    flushes: i % 3,
                    flushes_clean: 1,
                })
                .collect(),
            snaps: vec![v1::Snap { name: "a<b".into(), time: 50_000, kind: 1, auto: false }],
            reverts: vec![
                v1::RevertPoint { time: 90_000, target: 20_000 },
                v1::RevertPoint { time: 95_000, target: 0 },
            ],
            cdp_info: vec![v1::CdpInfo { seq: 3, start_time: 1, recording: true, ..Default::default() }],
            coverage: vec![v1::Interval { start: 5_000, end: 70_000, end_reason: "protection was \"off\"".into() }],
        };
        let picture = timeline("demo & co", &sample);
        for piece in
            ["demo &amp; co", "a&lt;b", "undo with --at 89999", "protection was &quot;off&quot;", "log 3", "#4477aa"]
        {
            assert!(picture.contains(piece), "lacks {piece}: {picture}");
        }
        let opened =
            picture.matches("<rect").count() + picture.matches("<circle").count() + picture.matches("<path").count();
        let closed =
            picture.matches("/>").count() + picture.matches("</rect>").count() + picture.matches("</circle>").count();
        assert_eq!(opened, closed);
        (sample.from, sample.to) = (0, u64::MAX);
        sample.snaps[0].time = u64::MAX;
        sample.buckets[0].blocks = u64::MAX;
        assert!(timeline("demo", &sample).ends_with("</svg>\n"));
        assert!(timeline("demo", &v1::TimelineResponse::default()).ends_with("</svg>\n"));
    }
}
