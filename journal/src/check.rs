//! Checks a CDP disk offline: every structure, every checksum, every chain, with code of its own.
//!
//! It shares with the engine nothing but the structs of [`crate::format`], reads only, needs no more memory than a few MiB and the table of what is
//! owned, and takes any bytes whatsoever: it never panics on them, and always ends. The disk may belong to a stopped agent, a dead host, or to nobody.
//! (On the disk of a running agent it sees things in the middle of being written, and may take them for damage.)
//!
//! What it tells apart:
//! * **Damage**: bytes that were durable, or that something durable names, are not what was written.
//! * **Notes**: what any power cut leaves and the next start puts right: a torn copy of an A/B pair, a torn tail, segments of a log that is gone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use uuid::Uuid;
use zerocopy::FromBytes;

use crate::format::{
    self, CLOCK_A, CLOCK_B, ClockPage, ControlLog, Geometry, SUPERBLOCK_A, SUPERBLOCK_B, SegmentHeader, StreamKind,
    Superblock, TableEntry, TablePageHeader, crc, log_flags,
};
use crate::types::BLOCK;

mod control;
mod run;
mod source;
mod stream;

use control::{Control, Fold};
use run::{PayloadBatch, RunOf};
use source::{Findings, Layout, Owned, Source, Tally};
use stream::{Event, Outcome, Walk};

/// Why a disk cannot be checked at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// It cannot be opened or read.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// The disk.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// Neither superblock is one.
    #[error("{0} is not a CDP disk: neither superblock is valid")]
    NotACdpDisk(PathBuf),
    /// Written by another version.
    #[error(
        "{path}: format version {version} with flags {flags:#x} is unknown: this program reads version {} without flags",
        format::VERSION
    )]
    Version {
        /// The disk.
        path: PathBuf,
        /// Version that the superblock states.
        version: u16,
        /// Flags that the superblock states.
        flags: u16,
    },
    /// The superblock's checksum fits, its numbers do not fit each other or the disk.
    #[error("{path}: the superblock states an impossible layout: {what}")]
    Layout {
        /// The disk.
        path: PathBuf,
        /// What is impossible.
        what: String,
    },
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// What a power cut leaves, or worth knowing; nothing is lost.
    Note,
    /// Bytes that count are not what was written.
    Damage,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Note => "note",
            Self::Damage => "damage",
        })
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where: structure, segment and block.
    pub place: String,
    /// What.
    pub what: String,
}

/// A log on the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogRow {
    /// Seq.
    pub seq: u64,
    /// Random id.
    pub id: u64,
    /// Its flags in the control records ([`log_flags`]); `None`: no complete control record names it.
    pub flags: Option<u32>,
    /// Segments of writes that it owns.
    pub writes_segments: u64,
    /// Segments of before-images that it owns.
    pub before_segments: u64,
    /// Bytes that it owns: segments times their size.
    pub bytes: u64,
    /// Frames that were verified.
    pub frames: u64,
    /// First frames of its streams (writes, before-images) that are torn or lost at the end.
    pub tails: [Option<u64>; 2],
}

/// A volume on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRow {
    /// Uuid of the volume.
    pub id: Uuid,
    /// Segments that it owns.
    pub segments: u64,
    /// Bytes that it owns: segments times their size.
    pub bytes: u64,
    /// Of these, segments of writes.
    pub writes_segments: u64,
    /// Of these, segments of before-images.
    pub before_segments: u64,
    /// Of these, segments that were given out and not written yet.
    pub unwritten_segments: u64,
    /// Of these, segments that no record needs any more; the next start frees them.
    pub orphaned_segments: u64,
    /// Bytes that it may own, as its control records say.
    pub reserve_capacity: Option<u64>,
    /// Its logs by seq.
    pub logs: Vec<LogRow>,
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The disk.
    pub path: PathBuf,
    /// Id of the disk.
    pub disk_id: Uuid,
    /// Format version.
    pub version: u16,
    /// Wall clock at init, nanoseconds.
    pub created_ns: u64,
    /// The clock's high-water mark; 0: unreadable.
    pub clock_high_water: u64,
    /// Bytes of the disk that are used.
    pub disk_size: u64,
    /// Bytes of a segment.
    pub segment_size: u64,
    /// Segments in all.
    pub segments: u64,
    /// Segments that nobody owns.
    pub segments_free: u64,
    /// Segments that are owned.
    pub segments_used: u64,
    /// Segments whose table page is lost in both copies.
    pub segments_unknown: u64,
    /// Of the owned: segments of writes.
    pub segments_writes: u64,
    /// Of the owned: segments of before-images.
    pub segments_before: u64,
    /// Of the owned: given out and not written yet.
    pub segments_unwritten: u64,
    /// Of the owned: behind a cut; the next start frees them.
    pub segments_cut: u64,
    /// Of the owned: of logs that are gone; the next start frees them.
    pub segments_orphaned: u64,
    /// By volume.
    pub volumes: Vec<VolumeRow>,
    /// Frames verified.
    pub frames: u64,
    /// Checks of payload blocks against their checksums (a block is checked for its frame, and again for the index of a sealed log).
    pub payload_blocks: u64,
    /// Index pages verified.
    pub index_pages: u64,
    /// Index entries verified.
    pub index_entries: u64,
    /// Bytes that a checksum was computed over.
    pub bytes_verified: u64,
    /// Streams that end in a torn or lost tail.
    pub tails: u64,
    /// Logs whose first frame names a last frame of an older log that is there.
    pub links: u64,
    /// What was found; at most 1000 of each severity.
    pub findings: Vec<Finding>,
    /// Findings of severity damage, also those that were not kept.
    pub damage: u64,
    /// Findings of severity note, also those that were not kept.
    pub notes: u64,
}

impl Report {
    /// Whether nothing is damaged.
    pub fn is_clean(&self) -> bool {
        self.damage == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: CDP disk {}, format {}", self.path.display(), self.disk_id, self.version)?;
        writeln!(
            f,
            "segments of {} bytes: {} in all, {} free, {} used ({} writes, {} before-images; {} unwritten, {} cut off, {} orphaned), {} unknown",
            self.segment_size,
            self.segments,
            self.segments_free,
            self.segments_used,
            self.segments_writes,
            self.segments_before,
            self.segments_unwritten,
            self.segments_cut,
            self.segments_orphaned,
            self.segments_unknown
        )?;
        for volume in &self.volumes {
            write!(
                f,
                "volume {}: {} segments, {} bytes ({} writes, {} before-images)",
                volume.id, volume.segments, volume.bytes, volume.writes_segments, volume.before_segments
            )?;
            match volume.reserve_capacity {
                Some(bytes) => writeln!(f, " of {bytes} reserved")?,
                None => writeln!(f)?,
            }
            for log in &volume.logs {
                writeln!(
                    f,
                    "  log {}: {} bytes ({} writes, {} before-images), {} frames",
                    log.seq, log.bytes, log.writes_segments, log.before_segments, log.frames
                )?;
            }
        }
        writeln!(
            f,
            "verified: {} bytes, {} frames, {} payload blocks, {} index pages, {} index entries",
            self.bytes_verified, self.frames, self.payload_blocks, self.index_pages, self.index_entries
        )?;
        for finding in &self.findings {
            writeln!(f, "{}: {}: {}", finding.severity, finding.place, finding.what)?;
        }
        let left_out = self.damage + self.notes - self.findings.len() as u64;
        if left_out > 0 {
            writeln!(f, "… and {left_out} more")?;
        }
        match self.damage {
            0 => write!(f, "clean"),
            n => write!(f, "DAMAGED: {n} findings"),
        }
    }
}

/// Checks the CDP disk at `path` (a file or a block device). `progress` is told bytes done and bytes in all, now and then.
pub fn check(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Report, CheckError> {
    let open = |source| CheckError::Io { op: "open", path: path.to_owned(), source };
    check_medium(Box::new(File::open(path).map_err(open)?), path, progress)
}

/// The entries of a run, if nothing is wrong with it: for the fuzzers, who hold the engine's reader against this one.
#[cfg(feature = "fuzzing")]
pub(crate) fn whole_run(
    medium: Box<dyn Medium>,
    geometry: Geometry,
    root: &format::RunRoot,
    log_id: u64,
    kind: StreamKind,
) -> Option<Vec<format::IndexEntry>> {
    let mut source = Source::new(medium).expect("a medium that has an end");
    let layout = Layout { disk_id: [0; 16], geometry };
    let inside = |segment: u32, block: u32| u64::from(segment) < geometry.segments && block < layout.segment_blocks();
    let run = RunOf { root, log_id, kind, allowed: &inside };
    let mut entries = Vec::new();
    let walked = run::walk(&mut source, &layout, &run, &mut Tally::default(), &mut |_, entry| {
        entries.push(*entry);
        Ok(())
    });
    walked.ok().map(|()| entries)
}

/// What a disk's bytes are read from.
pub trait Medium: Read + Seek {}

impl<T: Read + Seek> Medium for T {}

/// The same for bytes that are anywhere; `path` is what the report calls them.
pub fn check_medium(
    medium: Box<dyn Medium>,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report, CheckError> {
    let mut source =
        Source::new(medium).map_err(|source| CheckError::Io { op: "open", path: path.to_owned(), source })?;
    let mut findings = Findings::default();
    let mut tally = Tally::default();
    let superblock = superblock(&mut source, path, &mut findings)?;
    let geometry = geometry(&superblock, &source, path)?;
    let layout = Layout { disk_id: superblock.disk_id, geometry };
    let clock_high_water = clock(&mut source, &layout, &mut findings);
    let table = table(&mut source, &layout, &mut findings, &mut tally);
    let mut checker = Checker {
        source,
        layout,
        findings,
        tally,
        done: geometry.segments_at,
        total: geometry.segments_at + table.owned.len() as u64 * geometry.segment_size,
        progress,
        cut: 0,
        links: 0,
    };
    (checker.progress)(checker.done, checker.total);
    let mut volumes = Vec::new();
    for segments in table.owned.chunk_by(|a, b| a.volume == b.volume) {
        volumes.push(checker.volume(segments));
    }
    (checker.progress)(checker.total, checker.total);
    let Checker { findings, tally, cut, links, .. } = checker;
    let sum = |of: fn(&VolumeRow) -> u64| volumes.iter().map(of).sum::<u64>();
    Ok(Report {
        path: path.to_owned(),
        disk_id: Uuid::from_bytes(superblock.disk_id),
        version: superblock.version.get(),
        created_ns: superblock.created_ns.get(),
        clock_high_water,
        disk_size: superblock.disk_size.get(),
        segment_size: geometry.segment_size,
        segments: geometry.segments,
        segments_free: table.free,
        segments_used: geometry.segments - table.free - table.unknown,
        segments_unknown: table.unknown,
        segments_writes: sum(|v| v.writes_segments),
        segments_before: sum(|v| v.before_segments),
        segments_unwritten: sum(|v| v.unwritten_segments),
        segments_cut: cut,
        segments_orphaned: sum(|v| v.orphaned_segments),
        volumes,
        frames: tally.frames,
        payload_blocks: tally.payload_blocks,
        index_pages: tally.index_pages,
        index_entries: tally.index_entries,
        bytes_verified: tally.bytes,
        tails: tally.tails,
        links,
        damage: findings.damage,
        notes: findings.notes,
        findings: findings.list,
    })
}

/// The newer valid superblock.
fn superblock(source: &mut Source, path: &Path, findings: &mut Findings) -> Result<Superblock, CheckError> {
    let mut best: Option<Superblock> = None;
    let mut unknown = None;
    let mut broken = Vec::new();
    for (name, at) in [("superblock A", SUPERBLOCK_A), ("superblock B", SUPERBLOCK_B)] {
        let found = source.block(at).ok().and_then(|b| format::open_block::<Superblock>(&b, &Superblock::MAGIC, 8));
        match found {
            None => broken.push(name),
            Some(s) if s.version.get() != format::VERSION || s.flags.get() != 0 => {
                unknown = Some((s.version.get(), s.flags.get()));
            }
            Some(s) if best.is_none_or(|b| b.generation.get() < s.generation.get()) => best = Some(s),
            Some(_) => {}
        }
    }
    match (best, unknown) {
        // The other copy may be the newer one: nothing is guessed.
        (_, Some((version, flags))) => Err(CheckError::Version { path: path.to_owned(), version, flags }),
        (None, None) => Err(CheckError::NotACdpDisk(path.to_owned())),
        (Some(best), None) => {
            for name in broken {
                findings.damage(name, "does not check out; the other copy is used");
            }
            Ok(best)
        }
    }
}

fn geometry(superblock: &Superblock, source: &Source, path: &Path) -> Result<Geometry, CheckError> {
    let fail = |what: String| CheckError::Layout { path: path.to_owned(), what };
    let size = superblock.disk_size.get();
    if size > source.size {
        return Err(fail(format!("it was initialised with {size} bytes and has {}", source.size)));
    }
    let geometry = Geometry::of(size, superblock.segment_size.get())
        .ok_or_else(|| fail(format!("segments of {} bytes on {size} bytes", superblock.segment_size.get())))?;
    let same = geometry.segments == superblock.segments.get()
        && geometry.table_a == superblock.table_a.get()
        && geometry.table_b == superblock.table_b.get()
        && geometry.segments_at == superblock.segments_at.get();
    if same { Ok(geometry) } else { Err(fail("places that do not follow from its sizes".into())) }
}

/// The clock's high-water mark.
fn clock(source: &mut Source, layout: &Layout, findings: &mut Findings) -> u64 {
    let mut best: Option<ClockPage> = None;
    let mut broken = Vec::new();
    for (name, at) in [("clock A", CLOCK_A), ("clock B", CLOCK_B)] {
        let found = source.block(at).ok().and_then(|b| format::open_block::<ClockPage>(&b, &ClockPage::MAGIC, 8));
        match found {
            Some(c) if c.disk_id == layout.disk_id && c.version.get() == format::VERSION && c.flags.get() == 0 => {
                if best.is_none_or(|b| b.generation.get() < c.generation.get()) {
                    best = Some(c);
                }
            }
            _ => broken.push(name),
        }
    }
    match best {
        None => findings.damage("clock A and B", "neither copy checks out"),
        Some(_) => broken.into_iter().for_each(|name| {
            findings.note(name, "does not check out (a torn rewrite leaves this); the other copy is used");
        }),
    }
    best.map_or(0, |c| c.high_water.get())
}

/// What the table says.
struct Table {
    /// Owned segments, by volume, log, kind and number.
    owned: Vec<Owned>,
    free: u64,
    /// Segments of pages that are lost.
    unknown: u64,
}

fn table(source: &mut Source, layout: &Layout, findings: &mut Findings, tally: &mut Tally) -> Table {
    let geometry = &layout.geometry;
    let mut table = Table { owned: Vec::new(), free: 0, unknown: 0 };
    for page in 0..geometry.table_pages {
        let first = page * TablePageHeader::ENTRIES;
        let here = geometry.segments.saturating_sub(first).min(TablePageHeader::ENTRIES);
        let mut best: Option<(u64, Vec<u8>)> = None;
        let mut broken = Vec::new();
        for (name, start) in [("A", geometry.table_a), ("B", geometry.table_b)] {
            let bytes = source.block(start + page * BLOCK).ok();
            match bytes.and_then(|bytes| Some((table_page(&bytes, layout, page)?, bytes))) {
                Some((generation, bytes)) => {
                    tally.bytes += BLOCK;
                    if best.as_ref().is_none_or(|b| b.0 < generation) {
                        best = Some((generation, bytes));
                    }
                }
                None => broken.push(name),
            }
        }
        let Some((_, bytes)) = best else {
            table.unknown += here;
            let what = format!("neither copy checks out: the owners of {here} segments from {first} on are unknown");
            findings.damage(format!("segment table page {page}"), what);
            continue;
        };
        for name in broken {
            let what = "does not check out (a torn rewrite leaves this); the other copy is used";
            findings.note(format!("segment table {name} page {page}"), what);
        }
        let entries = bytes[size_of::<TablePageHeader>()..].chunks_exact(size_of::<TableEntry>());
        for (segment, entry) in (first..first + here).zip(entries) {
            let Ok(entry) = TableEntry::read_from_bytes(entry) else { continue };
            let place = || format!("segment table, segment {segment}");
            match entry.state {
                0 => table.free += 1,
                1 if StreamKind::from_byte(entry.kind).is_some() => table.owned.push(Owned {
                    volume: entry.volume_id,
                    seq: entry.log_seq.get(),
                    log_id: entry.log_id.get(),
                    kind: entry.kind,
                    number: entry.number.get(),
                    lap: entry.lap.get(),
                    segment: segment as u32, // Geometry::of bounds the number of segments
                }),
                1 => findings.damage(place(), format!("owned by an unknown kind of stream, {}", entry.kind)),
                state => findings.damage(place(), format!("unknown state {state}")),
            }
        }
    }
    table.owned.sort_unstable_by_key(Owned::key);
    table
}

/// The generation of a valid table page.
fn table_page(bytes: &[u8], layout: &Layout, page: u64) -> Option<u64> {
    let (header, _) = TablePageHeader::read_from_prefix(bytes).ok()?;
    let valid = header.magic == TablePageHeader::MAGIC
        && header.crc.get() == crc(&bytes[12..])
        && header.version.get() == format::VERSION
        && header.flags.get() == 0
        && header.disk_id == layout.disk_id
        && header.page.get() == page;
    valid.then_some(header.generation.get())
}

/// A first frame that names the last frame of an older log.
struct Link {
    seq: u64,
    place: String,
}

struct Checker<'a> {
    source: Source,
    layout: Layout,
    findings: Findings,
    tally: Tally,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    cut: u64,
    links: u64,
}

impl Checker<'_> {
    /// Checks all that a volume owns; `segments` are in order.
    fn volume(&mut self, segments: &[Owned]) -> VolumeRow {
        let segment_size = self.layout.geometry.segment_size;
        let count = |kind: StreamKind| segments.iter().filter(|s| s.kind == kind as u8).count() as u64;
        let mut row = VolumeRow {
            id: Uuid::from_bytes(segments[0].volume),
            segments: segments.len() as u64,
            bytes: segments.len() as u64 * segment_size,
            writes_segments: count(StreamKind::Writes),
            before_segments: count(StreamKind::Before),
            unwritten_segments: 0,
            orphaned_segments: 0,
            reserve_capacity: None,
            logs: Vec::new(),
        };
        let base = self.control(segments);
        if let Some((_, control)) = &base {
            row.reserve_capacity = control.settings.map(|s| s.reserve_capacity.get());
            if row.reserve_capacity.is_some_and(|capacity| row.bytes > capacity) {
                let what = format!("owns {} bytes, more than its reserve_capacity", row.bytes);
                self.findings.note(format!("volume {}", row.id), what);
            }
            if control.unknown_flags {
                self.findings.damage(format!("volume {}", row.id), "a control record has an unknown flag");
            }
        } else {
            let what = "no log has complete control records (none was begun, or they are damaged)";
            self.findings.note(format!("volume {}", row.id), what);
        }
        let mut links = self.wanted_links(segments);
        // Streams that were walked, by kind and seq.
        let mut walked = HashSet::new();
        for log in segments.chunk_by(|a, b| (a.seq, a.log_id) == (b.seq, b.log_id)) {
            let (seq, id) = (log[0].seq, log[0].log_id);
            let known = base.as_ref().and_then(|(_, control)| control.rows.get(&seq)).filter(|r| r.id.get() == id);
            // A log that the newest control records do not know is gone, unless it is newer than they are.
            let gone = base.as_ref().is_some_and(|((base_seq, base_id), _)| {
                known.is_none() && seq <= *base_seq && (seq, id) != (*base_seq, *base_id)
            });
            let flags = known.map(|r| r.flags.get());
            let thin = flags.is_some_and(|f| f & log_flags::THIN != 0 && f & log_flags::SEALED != 0);
            let mut log_row = LogRow {
                seq,
                id,
                flags,
                writes_segments: log.iter().filter(|s| s.kind == StreamKind::Writes as u8).count() as u64,
                before_segments: log.iter().filter(|s| s.kind == StreamKind::Before as u8).count() as u64,
                bytes: log.len() as u64 * segment_size,
                frames: 0,
                tails: [None; 2],
            };
            let mut outcomes = [None, None];
            for stream in log.chunk_by(|a, b| a.kind == b.kind) {
                let kind = stream[0].kind;
                if gone || (thin && kind == StreamKind::Writes as u8) {
                    row.orphaned_segments += stream.len() as u64;
                    let what = format!(
                        "{} segments of writes or before-images that no control record needs any more; the next start frees them",
                        stream.len()
                    );
                    self.findings.note(format!("volume {} log {seq}", row.id), what);
                    self.advance(stream.len() as u64);
                    continue;
                }
                let outcome = self.stream(stream, &mut links);
                let slot = usize::from(kind) - 1;
                walked.insert((kind, seq));
                outcomes[slot] = Some(outcome);
            }
            // Each stream says what was durable of the other, too.
            let claims = [1, 0].map(|other: usize| outcomes[other].as_ref().map_or(0, |o: &Outcome| o.claim_other));
            for (slot, kind) in [StreamKind::Writes, StreamKind::Before].into_iter().enumerate() {
                if gone || (thin && kind == StreamKind::Writes) {
                    continue;
                }
                // A stream without segments ends before frame 0.
                let outcome = outcomes[slot].get_or_insert_with(Outcome::of_nothing);
                outcome.settle(&mut self.findings, &mut self.tally, &log[0], kind, claims[slot]);
                row.unwritten_segments += outcome.unwritten;
                self.cut += outcome.cut;
                log_row.frames += outcome.frames;
                log_row.tails[slot] = outcome.tail;
            }
            if let Some(known) = known {
                self.last_frames(known, log, &outcomes);
                self.roots(known, log, &outcomes);
            }
            row.logs.push(log_row);
        }
        if let Some((_, control)) = &base {
            self.missing_logs(&row, control);
        }
        // A link is only missed where the log right before is there.
        let missed = |kind: u8, link: &Link| link.seq > 0 && walked.contains(&(kind, link.seq - 1));
        let mut missed: Vec<Link> =
            links.into_iter().flat_map(|((kind, _), list)| list.into_iter().filter(move |l| missed(kind, l))).collect();
        missed.sort_unstable_by_key(|link| link.seq);
        for link in missed {
            self.findings.note(link.place, "first frame names a frame before it that no older log has any more");
        }
        row
    }

    /// The newest log with complete control records, and what they say.
    fn control(&mut self, segments: &[Owned]) -> Option<((u64, u64), Control)> {
        let logs: Vec<&[Owned]> = segments.chunk_by(|a, b| (a.seq, a.log_id) == (b.seq, b.log_id)).collect();
        logs.iter().rev().find_map(|log| {
            let writes = log.chunk_by(|a, b| a.kind == b.kind).find(|s| s[0].kind == StreamKind::Writes as u8)?;
            // What is wrong there is told when the log has its turn.
            let (mut unheard, mut uncounted) = (Findings::default(), Tally::default());
            let mut fold = Fold::default();
            Walk {
                source: &mut self.source,
                layout: &self.layout,
                findings: &mut unheard,
                tally: &mut uncounted,
                listener: &mut |event| fold.event(&event),
            }
            .stream(writes);
            let control = fold.finish();
            control.complete.then_some(((log[0].seq, log[0].log_id), control))
        })
    }

    /// What the first frames of logs name as the frame before them, by kind and checksum, in order of seq.
    fn wanted_links(&mut self, segments: &[Owned]) -> HashMap<(u8, u32), Vec<Link>> {
        let mut links: HashMap<(u8, u32), Vec<Link>> = HashMap::new();
        for s in segments.iter().filter(|s| s.number == 0) {
            let Ok(bytes) = self.source.block(self.layout.geometry.at(s.segment, 0)) else { continue };
            let header = format::open_block::<SegmentHeader>(&bytes, &SegmentHeader::MAGIC, 8);
            let Some(header) = header.filter(|h| h.lap.get() == s.lap && h.log_id.get() == s.log_id) else { continue };
            if header.previous_crc.get() != 0 {
                let place = format!("segment {} (volume {}, log {})", s.segment, Uuid::from_bytes(s.volume), s.seq);
                let link = Link { seq: s.seq, place };
                links.entry((s.kind, header.previous_crc.get())).or_default().push(link);
            }
        }
        links
    }

    /// Walks one stream.
    fn stream(&mut self, segments: &[Owned], links: &mut HashMap<(u8, u32), Vec<Link>>) -> Outcome {
        let (seq, kind) = (segments[0].seq, segments[0].kind);
        let segment_size = self.layout.geometry.segment_size;
        let (done, total, progress, found) = (&mut self.done, self.total, &mut self.progress, &mut self.links);
        Walk {
            source: &mut self.source,
            layout: &self.layout,
            findings: &mut self.findings,
            tally: &mut self.tally,
            listener: &mut |event| match event {
                Event::Frame(frame, _) => {
                    let list = links.get_mut(&(kind, frame.crc.get()));
                    if let Some(list) = list {
                        // Each is answered once: the list shrinks.
                        while list.pop_if(|link| link.seq > seq).is_some() {
                            *found += 1;
                        }
                    }
                }
                Event::Segment => {
                    *done += segment_size;
                    progress(*done, total);
                }
                Event::Doubt | Event::Certain => {}
            },
        }
        .stream(segments)
    }

    fn advance(&mut self, segments: u64) {
        self.done += segments * self.layout.geometry.segment_size;
        (self.progress)(self.done, self.total);
    }

    /// The newest control records are in a log that was begun when all frames of the one before were durable: that one goes as far as they say.
    fn last_frames(&mut self, row: &ControlLog, log: &[Owned], outcomes: &[Option<Outcome>; 2]) {
        let flags = row.flags.get();
        let complete = flags & log_flags::CLOSED != 0 && flags & log_flags::SEALED == 0;
        let found = outcomes[StreamKind::Writes as usize - 1].as_ref().map_or(0, |o| o.io_last);
        if complete && row.disk_id == self.layout.disk_id && found < row.io_last.get() {
            let what =
                format!("the last write is of {found}, its row says that one of {} was durable", row.io_last.get());
            self.findings.damage(format!("volume {} log {}", Uuid::from_bytes(log[0].volume), row.seq.get()), what);
        }
    }

    /// Checks the merged indexes of a sealed log, and every payload block that they name.
    fn roots(&mut self, row: &ControlLog, log: &[Owned], outcomes: &[Option<Outcome>; 2]) {
        let flags = row.flags.get();
        if flags & log_flags::SEALED == 0 || row.disk_id != self.layout.disk_id {
            return;
        }
        let name = format!("volume {} log {}", Uuid::from_bytes(log[0].volume), row.seq.get());
        for (kind, root) in [(StreamKind::Writes, &row.writes_root), (StreamKind::Before, &row.before_root)] {
            if kind == StreamKind::Writes && flags & log_flags::THIN != 0 {
                continue;
            }
            let mut own: Vec<u32> = log.iter().filter(|s| s.kind == kind as u8).map(|s| s.segment).collect();
            own.sort_unstable();
            let last = self.layout.segment_blocks();
            let inside = |segment: u32, block: u32| own.binary_search(&segment).is_ok() && (1..last).contains(&block);
            let run = RunOf { root, log_id: row.id.get(), kind, allowed: &inside };
            let mut batch = PayloadBatch::new();
            let mut data = 0u64;
            let mut payload = Tally::default();
            let layout = self.layout;
            let walked = run::walk(&mut self.source, &layout, &run, &mut self.tally, &mut |source, entry| {
                if !run::has_payload(entry) {
                    return Ok(());
                }
                if !inside(entry.segment.get(), u32::from(entry.page.get())) {
                    return Err("index entry leads out of the log".into());
                }
                data += 1;
                batch.push(source, &layout, entry, &mut payload)
            });
            let walked = walked.map_err(|error| (format!("segment {} block {}", error.at.0, error.at.1), error.what));
            let verified = batch.verify(&mut self.source, &layout, &mut payload).map_err(|what| (name.clone(), what));
            self.tally.payload_blocks += payload.payload_blocks;
            self.tally.bytes += payload.bytes;
            for (place, what) in [walked.clone().err(), verified.err()].into_iter().flatten() {
                self.findings.damage(place, format!("index of {kind:?} of {name}: {what}"));
            }
            let outcome = &outcomes[kind as usize - 1];
            let blocks = outcome.as_ref().map_or(Some(0), |o| o.whole.then_some(o.data_blocks));
            if walked.is_ok() && blocks.is_some_and(|blocks| blocks != data) {
                let what =
                    format!("index of {kind:?} has {data} data entries for {} blocks", blocks.unwrap_or_default());
                self.findings.damage(name.clone(), what);
            }
        }
    }

    /// Sealed logs that the control records name, and that own nothing, must have nothing.
    fn missing_logs(&mut self, row: &VolumeRow, control: &Control) {
        let here: BTreeMap<u64, u64> = row.logs.iter().map(|l| (l.seq, l.id)).collect();
        for known in control.rows.values() {
            let there = here.get(&known.seq.get()) == Some(&known.id.get());
            if there || known.disk_id != self.layout.disk_id {
                continue;
            }
            let flags = known.flags.get();
            let writes = if flags & log_flags::THIN == 0 { known.writes_root.entries.get() } else { 0 };
            let entries = known.before_root.entries.get().saturating_add(writes);
            if flags & log_flags::SEALED != 0 && entries > 0 {
                let what =
                    format!("control records name log {} with {entries} index entries, it owns no segment", known.seq);
                self.findings.damage(format!("volume {}", row.id), what);
            }
        }
    }
}
