//! The offline check against disks that are built here by hand, byte by byte, from the structs of the format: a whole disk is clean, each
//! damaged structure is found, what a power cut leaves is no damage, and no bytes whatsoever make it panic or hang.

use std::io::Write;

use cdp_journal::check::{CheckError, Finding, Report, Severity, check};
use cdp_journal::format::*;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

const B: usize = 4096;
const SEGMENT: u64 = 1 << 20;
const SEGMENT_BLOCKS: u32 = 256;
const DISK_ID: [u8; 16] = [0xd1; 16];
const VOLUME: [u8; 16] = [0xa1; 16];

/// A disk image in the making.
#[derive(Clone)]
struct Disk {
    bytes: Vec<u8>,
    geometry: Geometry,
    table: Vec<TableEntry>,
}

impl Disk {
    fn new() -> Self {
        let size = 16 << 20;
        let geometry = Geometry::of(size, SEGMENT).expect("16 MiB hold 8 segments");
        let segments = geometry.segments as usize;
        let mut disk = Disk { bytes: vec![0; size as usize], geometry, table: vec![TableEntry::default(); segments] };
        for (at, generation) in [(SUPERBLOCK_A, 1), (SUPERBLOCK_B, 2)] {
            disk.put(at, &sealed_block(&superblock(&geometry, size, generation), 8));
        }
        for (at, generation) in [(CLOCK_A, 4u64), (CLOCK_B, 3)] {
            let clock = ClockPage {
                magic: ClockPage::MAGIC,
                crc: 0.into(),
                version: VERSION.into(),
                flags: 0.into(),
                disk_id: DISK_ID,
                generation: generation.into(),
                high_water: (1000 * generation).into(),
            };
            disk.put(at, &sealed_block(&clock, 8));
        }
        disk
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn at(&self, segment: u32, block: u32) -> usize {
        self.geometry.at(segment, block) as usize
    }

    /// Writes the table: the older copy has generation 1 and is empty.
    fn store_table(&mut self) {
        for page in 0..self.geometry.table_pages {
            let first = (page * TablePageHeader::ENTRIES) as usize;
            let last = (first + 63).min(self.table.len());
            for (start, generation, entries) in
                [(self.geometry.table_a, 1u64, &[][..]), (self.geometry.table_b, 2, &self.table.clone()[first..last])]
            {
                let header = TablePageHeader {
                    magic: TablePageHeader::MAGIC,
                    crc: 0.into(),
                    version: VERSION.into(),
                    flags: 0.into(),
                    disk_id: DISK_ID,
                    page: page.into(),
                    generation: generation.into(),
                    reserved: [0; 16],
                };
                let mut bytes = header.as_bytes().to_vec();
                bytes.extend_from_slice(entries.as_bytes());
                bytes.resize(B, 0);
                reseal(&mut bytes, 8, B);
                self.put(start + page * B as u64, &bytes);
            }
        }
    }

    fn flip(&mut self, at: usize) {
        self.bytes[at] ^= 0x40;
    }

    fn check(&self) -> Result<Report, CheckError> {
        let mut file = tempfile::NamedTempFile::new().expect("temporary file");
        file.write_all(&self.bytes).expect("write image");
        let (mut last, mut total) = (0, 0);
        let report = check(file.path(), &mut |done, of| {
            assert!(done >= last && done <= of, "progress goes forward and stays within its total");
            (last, total) = (done, of);
        });
        if report.is_ok() {
            assert!(total > 0 && last == total, "progress ends at its total");
        }
        report
    }

    fn report(&self) -> Report {
        self.check().expect("a CDP disk")
    }
}

/// Puts the checksum of `bytes[at + 4..end]` at `at`.
fn reseal(bytes: &mut [u8], at: usize, end: usize) {
    let sum = crc(&bytes[at + 4..end]);
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

fn superblock(geometry: &Geometry, size: u64, generation: u64) -> Superblock {
    Superblock {
        magic: Superblock::MAGIC,
        crc: 0.into(),
        version: VERSION.into(),
        flags: 0.into(),
        disk_id: DISK_ID,
        generation: generation.into(),
        disk_size: size.into(),
        segment_size: geometry.segment_size.into(),
        segments: geometry.segments.into(),
        table_a: geometry.table_a.into(),
        table_b: geometry.table_b.into(),
        segments_at: geometry.segments_at.into(),
        created_ns: 77.into(),
        reserved: [0; 32],
    }
}

/// A descriptor and its payload.
#[derive(Clone)]
struct Record {
    header: DescriptorHeader,
    extra: Vec<u8>,
    payload: Vec<u8>,
    entry: Option<EntryKind>,
}

fn record(kind: DescriptorKind, instant: u64, start: u64, count: u64, extra: &[u8]) -> Record {
    let header = DescriptorHeader {
        kind: kind as u8,
        codec: 0,
        sub: 0,
        flags: 0,
        extra_bytes: (extra.len() as u32).into(),
        instant: instant.into(),
        start: start.into(),
        count: count.into(),
        payload_block: 0.into(),
        payload_blocks: 0.into(),
    };
    Record { header, extra: extra.to_vec(), payload: Vec::new(), entry: None }
}

fn with_payload(mut record: Record, payload: Vec<u8>) -> Record {
    let sums: Vec<U32> = payload.chunks(B).map(|block| crc(block).into()).collect();
    record.extra = sums.as_bytes().to_vec();
    record.header.extra_bytes = (record.extra.len() as u32).into();
    record.payload = payload;
    record
}

fn filled(blocks: u64, seed: u64) -> Vec<u8> {
    (0..blocks * B as u64).map(|i| (i / 7 + seed * 31 + i * seed) as u8).collect()
}

fn write(instant: u64, block: u64, blocks: u64) -> Record {
    let record = record(DescriptorKind::Write, instant, block * 8, blocks * 8, &[]);
    Record { entry: Some(EntryKind::Write), ..with_payload(record, filled(blocks, instant)) }
}

fn before(instant: u64, block: u64, blocks: u64) -> Record {
    let record = record(DescriptorKind::BeforeData, instant, block, blocks, &[]);
    Record { entry: Some(EntryKind::BeforeData), ..with_payload(record, filled(blocks, instant + 5)) }
}

fn marker(instant: u64, name: &str) -> Record {
    record(DescriptorKind::Marker, instant, 0, 0, name.as_bytes())
}

fn control(kind: ControlKind, start: u64, body: &[u8]) -> Record {
    let mut record = record(DescriptorKind::Control, 0, start, 0, body);
    record.header.sub = kind as u8;
    record
}

/// Where a frame lies.
#[derive(Clone, Copy, Debug)]
struct Spot {
    segment: u32,
    block: u32,
    head: u32,
}

/// One stream of a log in the making.
#[derive(Clone)]
struct Stream {
    seq: u64,
    id: u64,
    kind: StreamKind,
    segments: Vec<u32>,
    block: u32,
    frame_next: u64,
    previous_crc: u32,
    first_crc: u32,
    instant_last: u64,
    entries: Vec<IndexEntry>,
    all: Vec<IndexEntry>,
    side: Vec<u8>,
    spots: Vec<Spot>,
    /// What its frames say of the log's other stream.
    claim_other: u64,
}

impl Stream {
    fn new(seq: u64, kind: StreamKind) -> Self {
        Self {
            seq,
            id: 0x1111 * (seq + 1),
            kind,
            segments: Vec::new(),
            block: 0,
            frame_next: 0,
            previous_crc: 0,
            first_crc: 0,
            instant_last: 0,
            entries: Vec::new(),
            all: Vec::new(),
            side: Vec::new(),
            spots: Vec::new(),
            claim_other: 0,
        }
    }

    fn own(&self, disk: &mut Disk, segment: u32, number: u32) {
        disk.table[segment as usize] = TableEntry {
            state: 1,
            kind: self.kind as u8,
            reserved: [0; 2],
            number: number.into(),
            volume_id: VOLUME,
            log_seq: self.seq.into(),
            log_id: self.id.into(),
            lap: 3.into(),
            reserved2: [0; 16],
        };
    }

    fn open(&mut self, disk: &mut Disk, segment: u32) {
        let number = self.segments.len() as u32;
        self.own(disk, segment, number);
        let header = SegmentHeader {
            magic: SegmentHeader::MAGIC,
            crc: 0.into(),
            version: VERSION.into(),
            flags: 0.into(),
            disk_id: DISK_ID,
            volume_id: VOLUME,
            log_id: self.id.into(),
            log_seq: self.seq.into(),
            segment: segment.into(),
            number: number.into(),
            lap: 3.into(),
            frame_first: self.frame_next.into(),
            previous_crc: self.previous_crc.into(),
            kind: self.kind as u8,
            reserved: [0; 35],
        };
        disk.put(disk.geometry.at(segment, 0), &sealed_block(&header, 8));
        self.segments.push(segment);
        self.block = 1;
        self.entries.clear();
        self.side.clear();
    }

    /// Appends a frame that says that frames below `durable` are durable.
    fn frame(&mut self, disk: &mut Disk, records: &[Record], durable: u64) -> Spot {
        let segment = *self.segments.last().expect("open");
        let mut descriptors = Vec::new();
        let mut payload = Vec::new();
        let mut entries = Vec::new();
        for r in records {
            let mut header = r.header;
            let base = (payload.len() / B) as u32;
            header.payload_block = if r.payload.is_empty() { 0 } else { base }.into();
            header.payload_blocks = ((r.payload.len() / B) as u32).into();
            let from = descriptors.len();
            descriptors.extend_from_slice(header.as_bytes());
            descriptors.extend_from_slice(&r.extra);
            descriptors.resize(descriptors.len().next_multiple_of(8), 0);
            if r.entry.is_none() && header.kind != DescriptorKind::Index as u8 && header.kind != 2 {
                self.side.extend_from_slice(&descriptors[from..]);
            }
            if let Some(kind) = r.entry {
                let first = if kind == EntryKind::Write { header.start.get() / 8 } else { header.start.get() };
                for (i, block) in r.payload.chunks(B).enumerate() {
                    entries.push(IndexEntry {
                        block: (first + i as u64).into(),
                        instant: if kind == EntryKind::Write { header.instant } else { 0.into() },
                        segment: segment.into(),
                        page: ((base + i as u32) as u16).into(),
                        mask: 0xff,
                        kind_level: kind as u8,
                        crc: crc(block).into(),
                        reserved: 0.into(),
                    });
                }
            }
            if header.kind <= 3 {
                self.instant_last = self.instant_last.max(header.instant.get());
            }
            payload.extend_from_slice(&r.payload);
        }
        let head = (96 + descriptors.len()).div_ceil(B) as u32;
        let header = FrameHeader {
            magic: FrameHeader::MAGIC.into(),
            crc: 0.into(),
            log_id: self.id.into(),
            number: self.frame_next.into(),
            previous_crc: self.previous_crc.into(),
            descriptor_bytes: (descriptors.len() as u32).into(),
            header_blocks: (head as u16).into(),
            flags: 0.into(),
            payload_blocks: ((payload.len() / B) as u32).into(),
            segment: segment.into(),
            block: self.block.into(),
            instant_last: self.instant_last.into(),
            durable: 0.into(),
            watermark: 0.into(),
            durable_frames: durable.into(),
            durable_frames_other: self.claim_other.into(),
            lap: 3.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&descriptors);
        let end = bytes.len();
        reseal(&mut bytes, 4, end);
        self.previous_crc = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
        if self.frame_next == 0 {
            self.first_crc = self.previous_crc;
        }
        bytes.resize(head as usize * B, 0);
        bytes.extend_from_slice(&payload);
        disk.put(disk.geometry.at(segment, self.block), &bytes);
        for entry in &mut entries {
            entry.page = (entry.page.get() + (self.block + head) as u16).into();
        }
        self.entries.extend_from_slice(&entries);
        self.all.extend_from_slice(&entries);
        let spot = Spot { segment, block: self.block, head };
        self.spots.push(spot);
        self.block += (bytes.len() / B) as u32;
        self.frame_next += 1;
        spot
    }

    /// Writes the open segment's index, copied descriptors and footer.
    fn footer(&mut self, disk: &mut Disk) {
        let segment = *self.segments.last().expect("open");
        let (pages, root) = run(&self.entries, self.id, self.kind, segment, self.block);
        let descriptors_at = self.block + (pages.len() / B) as u32;
        disk.put(disk.geometry.at(segment, self.block), &pages);
        disk.put(disk.geometry.at(segment, descriptors_at), &self.side.clone());
        let footer = SegmentFooter {
            magic: SegmentFooter::MAGIC,
            crc: 0.into(),
            version: VERSION.into(),
            flags: 0.into(),
            log_id: self.id.into(),
            lap: 3.into(),
            segment: segment.into(),
            descriptors_at: descriptors_at.into(),
            descriptor_bytes: (self.side.len() as u32).into(),
            descriptor_crc: crc(&self.side).into(),
            frames_end: self.block.into(),
            last_crc: self.previous_crc.into(),
            frame_next: self.frame_next.into(),
            instant_last: self.instant_last.into(),
            durable: 0.into(),
            watermark: 0.into(),
            root,
            reserved: [0; 8],
        };
        disk.put(disk.geometry.at(segment, SEGMENT_BLOCKS - 1), &sealed_block(&footer, 8));
    }

    /// Merges everything into one run, appended as a frame.
    fn merge(&mut self, disk: &mut Disk) -> RunRoot {
        let segment = *self.segments.last().expect("open");
        let (pages, root) = run(&self.all.clone(), self.id, self.kind, segment, self.block + 1);
        let count = (pages.len() / B) as u64;
        let index = with_payload(record(DescriptorKind::Index, 0, 0, count, &[]), pages);
        self.frame(disk, &[index], self.frame_next);
        root
    }
}

/// The pages of a run, leaves first, from `block` of a segment on.
fn run(entries: &[IndexEntry], id: u64, kind: StreamKind, segment: u32, block: u32) -> (Vec<u8>, RunRoot) {
    if entries.is_empty() {
        return (Vec::new(), RunRoot::default());
    }
    let mut sorted = entries.to_vec();
    sorted.sort_by_key(|e| (e.kind_level >> 4, e.block.get(), e.instant.get()));
    let mut bytes = Vec::new();
    let page = |bytes: &mut Vec<u8>, height: u8, count: usize, items: &[u8]| {
        let header = IndexPageHeader {
            magic: IndexPageHeader::MAGIC.into(),
            crc: 0.into(),
            log_id: id.into(),
            count: (count as u16).into(),
            height,
            kind: kind as u8,
            reserved: [0; 12],
        };
        let mut page = header.as_bytes().to_vec();
        page.extend_from_slice(items);
        page.resize(B, 0);
        reseal(&mut page, 4, B);
        bytes.extend_from_slice(&page);
        u32::from_le_bytes(page[4..8].try_into().expect("4 bytes"))
    };
    // Leaves of 20 entries keep small runs two pages high.
    let mut row = Vec::new();
    for leaf in sorted.chunks(20) {
        let at = block + (bytes.len() / B) as u32;
        let sum = page(&mut bytes, 0, leaf.len(), leaf.as_bytes());
        row.push(ChildEntry {
            block: leaf[0].block,
            instant: leaf[0].instant,
            segment: segment.into(),
            page: (at as u16).into(),
            reserved: 0,
            level: leaf[0].kind_level & 0xf0,
            crc: sum.into(),
            reserved2: 0.into(),
        });
    }
    let (mut at, mut sum, mut height) = (block, row[0].crc.get(), 0u32);
    if row.len() > 1 {
        at = block + (bytes.len() / B) as u32;
        sum = page(&mut bytes, 1, row.len(), row.as_bytes());
        height = 1;
    }
    let root = RunRoot {
        entries: (sorted.len() as u64).into(),
        segment: segment.into(),
        block: at.into(),
        height: height.into(),
        levels: 1.into(),
        crc: sum.into(),
        reserved: 0.into(),
    };
    (bytes, root)
}

fn settings() -> ControlSettings {
    ControlSettings {
        reserve_capacity: (15 * SEGMENT).into(),
        reserve_duration_s: 60.into(),
        created_ns: 1.into(),
        generation: 1.into(),
        size: (1u64 << 20).into(),
        next_seq: 2.into(),
        priority: 1,
        on: 1,
        held: 0,
        reserved: [0; 13],
    }
}

fn log_row(seq: u64, id: u64, flags: u32, writes_root: RunRoot, before_root: RunRoot) -> ControlLog {
    ControlLog {
        seq: seq.into(),
        id: id.into(),
        start: 1.into(),
        io_start: 0.into(),
        io_last: 0.into(),
        flags: flags.into(),
        close_reason: 0.into(),
        disk_id: DISK_ID,
        writes_root,
        before_root,
    }
}

/// Log 0, sealed: writes in segments 0 (full) and 1, before-images in 2. Log 1, active: writes in 3 (full) and 4, before-images in 5, segment 6 taken
/// ahead. The rest is free.
#[derive(Clone)]
struct Whole {
    disk: Disk,
    writes0: Stream,
    before0: Stream,
    writes1: Stream,
    before1: Stream,
    root0: RunRoot,
}

fn whole() -> Whole {
    let mut disk = Disk::new();
    let mut writes0 = Stream::new(0, StreamKind::Writes);
    writes0.open(&mut disk, 0);
    for i in 0..20 {
        let durable = writes0.frame_next;
        let zero = record(DescriptorKind::Zero, 101 + i * 10, 4, 9, &[]);
        writes0.frame(&mut disk, &[write(100 + i * 10, i * 3, 3), zero, marker(100 + i * 10, "m")], durable);
    }
    // Partial zeroes have entries without payload.
    writes0.footer(&mut disk);
    writes0.open(&mut disk, 1);
    for i in 20..25 {
        let durable = writes0.frame_next;
        writes0.frame(&mut disk, &[write(100 + i * 10, i * 3, 3)], durable);
    }
    let root0 = writes0.merge(&mut disk);
    let mut before0 = Stream::new(0, StreamKind::Before);
    before0.open(&mut disk, 2);
    for i in 0..10 {
        let durable = before0.frame_next;
        let extent = record(DescriptorKind::BeforeZero, 1, 500 + i, 1, &[]);
        before0.frame(&mut disk, &[before(1, i * 9, 9), extent], durable);
    }
    let before_root0 = before0.merge(&mut disk);
    let mut writes1 = Stream::new(1, StreamKind::Writes);
    writes1.previous_crc = writes0.previous_crc;
    writes1.open(&mut disk, 3);
    let sealed = log_flags::RECORDING | log_flags::CLOSED | log_flags::SEALED;
    let row0 = log_row(0, writes0.id, sealed, root0, before_root0);
    let row1 = log_row(1, writes1.id, log_flags::RECORDING, RunRoot::default(), RunRoot::default());
    let carry = [
        control(ControlKind::Settings, 0, settings().as_bytes()),
        control(ControlKind::Log, 0, row0.as_bytes()),
        control(ControlKind::Log, 1, row1.as_bytes()),
        record(DescriptorKind::Size, 1, 1 << 20, 0, &[]),
        control(ControlKind::End, 1, &[]),
    ];
    writes1.frame(&mut disk, &carry, 0);
    for i in 0..8 {
        let durable = writes1.frame_next;
        let discard = record(DescriptorKind::Discard, 1001 + i * 10, 800, 8, &[]);
        let flush = record(DescriptorKind::FlushPoint, 1002 + i * 10, 0, 1, &[]);
        writes1.frame(&mut disk, &[write(1000 + i * 10, i, 5), discard, flush], durable);
    }
    writes1.footer(&mut disk);
    writes1.open(&mut disk, 4);
    for i in 8..14 {
        let durable = writes1.frame_next;
        writes1.frame(&mut disk, &[write(1000 + i * 10, i, 5)], durable);
    }
    let mut before1 = Stream::new(1, StreamKind::Before);
    before1.previous_crc = before0.previous_crc;
    before1.open(&mut disk, 5);
    for i in 0..4 {
        let durable = before1.frame_next;
        let unreadable = record(DescriptorKind::BeforeUnreadable, 1, 900 + i, 1, &[]);
        before1.frame(&mut disk, &[before(1, i, 1), unreadable], durable);
    }
    writes1.own(&mut disk, 6, 2);
    disk.store_table();
    Whole { disk, writes0, before0, writes1, before1, root0 }
}

fn damage(report: &Report) -> Vec<&Finding> {
    report.findings.iter().filter(|f| f.severity == Severity::Damage).collect()
}

/// Expects damage, and a finding of it that says `what`.
fn expect_damage(report: &Report, what: &str) {
    assert!(!report.is_clean(), "{what}: {report}");
    assert!(damage(report).iter().any(|f| f.what.contains(what)), "no finding says {what:?}: {report}");
}

/// Expects no damage, and a note that says `what`.
fn expect_note(report: &Report, what: &str) {
    assert!(report.is_clean(), "{what}: {report}");
    assert!(report.findings.iter().any(|f| f.what.contains(what)), "no note says {what:?}: {report}");
}

#[test]
fn a_whole_disk_is_clean_and_counted() {
    let whole = whole();
    let report = whole.disk.report();
    assert!(report.findings.is_empty(), "{report}");
    assert_eq!((report.damage, report.notes, report.tails), (0, 0, 0));
    assert_eq!((report.segments, report.segments_free, report.segments_used), (15, 8, 7));
    assert_eq!((report.segments_writes, report.segments_before, report.segments_unwritten), (5, 2, 1));
    assert_eq!(report.clock_high_water, 4000);
    assert_eq!(report.disk_id.as_bytes(), &DISK_ID);
    let [volume] = &report.volumes[..] else { panic!("one volume: {report}") };
    assert_eq!((volume.id.as_bytes(), volume.segments, volume.bytes), (&VOLUME, 7, 7 * SEGMENT));
    assert_eq!(volume.reserve_capacity, Some(15 * SEGMENT));
    let logs: Vec<_> = volume.logs.iter().map(|l| (l.seq, l.writes_segments, l.before_segments, l.flags)).collect();
    assert_eq!(logs, [(0, 2, 1, Some(7)), (1, 3, 1, Some(1))]);
    assert_eq!(volume.logs[0].frames, whole.writes0.frame_next + whole.before0.frame_next);
    assert_eq!(report.frames, report.volumes[0].logs.iter().map(|l| l.frames).sum::<u64>());
    assert_eq!(report.links, 2, "both streams of log 1 name a frame of log 0");
    // Each payload block once for its frame, those of the sealed log once more for its index, and the index pages as payload.
    let data = |s: &Stream| s.all.len() as u64;
    let merged = data(&whole.writes0) + data(&whole.before0);
    let pages = data(&whole.writes0).div_ceil(20) + 1 + data(&whole.before0).div_ceil(20) + 1;
    assert_eq!(report.payload_blocks, 2 * merged + data(&whole.writes1) + data(&whole.before1) + pages);
    assert!(report.to_string().ends_with("clean"), "{report}");
}

#[test]
fn what_is_no_cdp_disk_is_refused() {
    let disk = whole().disk;
    let mut none = disk.clone();
    none.flip(20);
    none.flip(SUPERBLOCK_B as usize + 20);
    assert!(matches!(none.check(), Err(CheckError::NotACdpDisk(_))));
    for (field, value) in [(12, 2u8), (14, 1)] {
        let mut newer = disk.clone();
        newer.bytes[field] = value;
        reseal(&mut newer.bytes, 8, 128);
        let Err(CheckError::Version { version, flags, .. }) = newer.check() else { panic!("refused") };
        assert_eq!((version, flags), if field == 12 { (2, 0) } else { (1, 1) });
    }
    let mut layout = disk.clone();
    for at in [0, SUPERBLOCK_B as usize] {
        layout.bytes[at + 80] ^= 1;
        reseal(&mut layout.bytes[at..], 8, 128);
    }
    assert!(matches!(layout.check(), Err(CheckError::Layout { .. })));
    let mut short = disk.clone();
    short.bytes.truncate(15 << 20);
    assert!(matches!(short.check(), Err(CheckError::Layout { .. })));
    let empty = Disk { bytes: Vec::new(), ..disk };
    assert!(matches!(empty.check(), Err(CheckError::NotACdpDisk(_))));
    let missing = check(std::path::Path::new("/nonexistent/cdp.img"), &mut |_, _| {});
    assert!(matches!(missing, Err(CheckError::Io { .. })));
}

#[test]
fn one_bad_copy_of_a_pair_is_told_and_two_are_damage() {
    let whole = whole().disk;
    let mut disk = whole.clone();
    disk.flip(40);
    expect_damage(&disk.report(), "the other copy is used");
    let mut disk = whole.clone();
    disk.flip(CLOCK_A as usize + 41);
    let report = disk.report();
    expect_note(&report, "the other copy is used");
    assert_eq!(report.clock_high_water, 3000);
    disk.flip(CLOCK_B as usize + 41);
    expect_damage(&disk.report(), "neither copy");
    let (a, b) = (whole.geometry.table_a as usize, whole.geometry.table_b as usize);
    let mut disk = whole.clone();
    disk.flip(a + 4000);
    let report = disk.report();
    expect_note(&report, "the other copy is used");
    assert_eq!(report.segments_used, 7, "the newer copy counts");
    disk.flip(b + 4000);
    let report = disk.report();
    expect_damage(&report, "neither copy");
    assert_eq!((report.segments_unknown, report.segments_used), (15, 0));
}

#[test]
fn table_entries_that_cannot_be_are_damage() {
    let Whole { disk, .. } = whole();
    let mut kind = disk.clone();
    kind.table[1].kind = 9;
    kind.store_table();
    expect_damage(&kind.report(), "unknown kind of stream");
    let mut state = disk.clone();
    state.table[14].state = 2;
    state.store_table();
    expect_damage(&state.report(), "unknown state");
    // Segment 6 has no header; give its number to segment 4 a second time, written.
    let mut twice = disk.clone();
    let copy: Vec<u8> = twice.bytes[twice.at(4, 0)..twice.at(5, 0)].to_vec();
    let to = twice.at(6, 0);
    twice.bytes[to..to + copy.len()].copy_from_slice(&copy);
    twice.table[6] = twice.table[4];
    twice.bytes[to + 64] = 6;
    reseal(&mut twice.bytes[to..], 8, 128);
    twice.store_table();
    expect_damage(&twice.report(), "given to two segments");
}

#[test]
fn a_segment_header_that_contradicts_the_table_is_damage() {
    let Whole { disk, .. } = whole();
    let at = disk.at(4, 0);
    for (field, what) in [
        (12, "unknown version"),
        (32, "another volume"),
        (48, "another log"),
        (56, "another log"),
        (64, "misdirected"),
        (68, "another number"),
        (72, "later lap"),
        (92, "another number or kind"),
    ] {
        let mut disk = disk.clone();
        disk.bytes[at + field] ^= 0x44;
        reseal(&mut disk.bytes[at..], 8, 128);
        expect_damage(&disk.report(), what);
    }
    // Of the next number than the last frame: the frames between were durable.
    let mut gap = disk.clone();
    gap.bytes[at + 80] += 1;
    reseal(&mut gap.bytes[at..], 8, 128);
    expect_damage(&gap.report(), "frame 9 lies where frame 10 belongs");
    let mut chain = disk.clone();
    chain.bytes[at + 88] ^= 1;
    reseal(&mut chain.bytes[at..], 8, 128);
    expect_damage(&chain.report(), "breaks the chain");
}

#[test]
fn a_damaged_header_of_a_segment_in_use_is_damage() {
    let Whole { mut disk, .. } = whole();
    let at = disk.at(4, 0) + 50;
    disk.flip(at);
    expect_damage(&disk.report(), "segment header does not check out");
}

#[test]
fn a_damaged_frame_below_the_durable_point_is_damage() {
    let whole = whole();
    for (stream, frames) in
        [(&whole.writes0, 0..24), (&whole.before0, 0..9), (&whole.writes1, 0..13), (&whole.before1, 0..3)]
    {
        for i in frames {
            let spot = stream.spots[i];
            let mut disk = whole.disk.clone();
            let at = disk.at(spot.segment, spot.block);
            disk.flip(at + 17); // its number
            expect_damage(&disk.report(), "wrong checksum");
            let mut disk = whole.disk.clone();
            disk.flip(at); // its magic
            expect_damage(&disk.report(), "is not there");
            let mut disk = whole.disk.clone();
            disk.flip(at + 100); // its first descriptor
            expect_damage(&disk.report(), "wrong checksum");
        }
    }
}

/// A segment that was cut off and given to the same log again holds frames of that log, at their places, with claims of their own.
#[test]
fn frames_of_an_earlier_life_of_a_segment_prove_nothing() {
    let Whole { disk, writes1, .. } = whole();
    let last = *writes1.spots.last().expect("it has frames");
    for (lap, damaged) in [(2u64, false), (3, true)] {
        let mut disk = disk.clone();
        let (from, to) = (disk.at(last.segment, last.block), disk.at(last.segment, last.block + 8));
        let mut head = disk.bytes[from..from + B].to_vec();
        let descriptors = u32::from_le_bytes(head[28..32].try_into().expect("4 bytes")) as usize;
        head[16..24].copy_from_slice(&(writes1.frame_next + 9).to_le_bytes());
        head[44..48].copy_from_slice(&(last.block + 8).to_le_bytes());
        head[72..80].copy_from_slice(&(writes1.frame_next + 9).to_le_bytes());
        head[88..96].copy_from_slice(&lap.to_le_bytes());
        reseal(&mut head, 4, 96 + descriptors);
        disk.bytes[to..to + B].copy_from_slice(&head);
        let report = disk.report();
        assert_eq!(report.is_clean(), !damaged, "lap {lap}: {report}");
    }
}

#[test]
fn a_damaged_payload_below_the_durable_point_is_damage() {
    let whole = whole();
    for spot in [whole.writes0.spots[3], whole.before0.spots[3], whole.writes1.spots[3], whole.before1.spots[1]] {
        let mut disk = whole.disk.clone();
        let at = disk.at(spot.segment, spot.block + spot.head) + 1234;
        disk.flip(at);
        expect_damage(&disk.report(), "payload of frame");
    }
    // In a sealed log the index names the block too, whatever the frames prove.
    let mut disk = whole.disk.clone();
    let last = whole.writes0.spots[24];
    let at = disk.at(last.segment, last.block + last.head);
    disk.flip(at);
    expect_damage(&disk.report(), "has not the checksum that its entry names");
}

#[test]
fn a_torn_last_frame_is_a_tail() {
    let whole = whole();
    for (stream, offsets) in [(&whole.writes1, [20, 120, 4096 + 7]), (&whole.before1, [20, 120, 4096 + 7])] {
        let spot = *stream.spots.last().expect("frames");
        for offset in offsets {
            let mut disk = whole.disk.clone();
            let at = disk.at(spot.segment, spot.block) + offset;
            disk.flip(at);
            let report = disk.report();
            expect_note(&report, "tail");
            assert_eq!(report.tails, 1);
            let tails = report.volumes[0].logs[1].tails;
            assert_eq!(tails[stream.kind as usize - 1], Some(stream.frame_next - 1));
        }
    }
    // Lost without a trace: nothing tells, and nothing is wrong.
    let mut disk = whole.disk.clone();
    let spot = *whole.writes1.spots.last().expect("frames");
    let at = disk.at(spot.segment, spot.block);
    disk.bytes[at..at + 6 * B].fill(0);
    let report = disk.report();
    assert!(report.findings.is_empty(), "{report}");
}

#[test]
fn several_frames_that_no_later_one_calls_durable_are_a_tail() {
    let mut whole = whole();
    // Three more frames; nothing was synced since the first of them.
    let durable = whole.writes1.frame_next;
    let lost = whole.writes1.frame(&mut whole.disk, &[write(5000, 1, 2)], durable);
    whole.writes1.frame(&mut whole.disk, &[write(5001, 1, 2)], durable);
    whole.writes1.frame(&mut whole.disk, &[write(5002, 1, 2)], durable);
    let at = whole.disk.at(lost.segment, lost.block);
    let mut torn = whole.disk.clone();
    torn.flip(at + 16);
    let report = torn.report();
    expect_note(&report, "tail");
    assert_eq!(report.volumes[0].logs[1].tails, [Some(durable), None]);
    // The same with a sync in between is damage.
    whole.writes1.frame(&mut whole.disk, &[write(5003, 1, 2)], durable + 1);
    whole.disk.flip(at + 16);
    expect_damage(&whole.disk.report(), "wrong checksum");
}

/// Two frames side by side: of the first, which brings the segment's header, nothing arrived, of the second everything.
#[test]
fn a_segment_without_header_and_first_frame_is_judged_by_what_later_frames_call_durable() {
    let mut whole = whole();
    let durable = whole.writes1.frame_next;
    whole.writes1.open(&mut whole.disk, 6);
    let lost = whole.writes1.frame(&mut whole.disk, &[write(5000, 1, 2)], durable);
    let there = whole.writes1.frame(&mut whole.disk, &[write(5001, 1, 2)], durable);
    let (from, to) = (whole.disk.at(lost.segment, 0), whole.disk.at(there.segment, there.block));
    whole.disk.bytes[from..to].fill(0);
    let report = whole.disk.report();
    expect_note(&report, "segment header does not check out");
    assert_eq!(report.volumes[0].logs[1].tails, [Some(durable), None]);
    // The same with a sync in between is damage.
    whole.writes1.frame(&mut whole.disk, &[write(5002, 1, 2)], durable + 1);
    expect_damage(&whole.disk.report(), "segment header does not check out");
}

#[test]
fn a_tail_that_the_other_stream_calls_durable_is_damage() {
    let mut whole = whole();
    // Before-images say that all writes so far are durable.
    let durable = whole.before1.frame_next;
    whole.before1.claim_other = whole.writes1.frame_next;
    whole.before1.frame(&mut whole.disk, &[before(1, 50, 1)], durable);
    let report = whole.disk.report();
    assert!(report.findings.is_empty(), "{report}");
    // The last of them torn, and lost without a trace.
    let last = *whole.writes1.spots.last().expect("frames");
    let at = whole.disk.at(last.segment, last.block);
    whole.disk.flip(at + 16);
    expect_damage(&whole.disk.report(), "wrong checksum");
    whole.disk.bytes[at..at + 6 * B].fill(0);
    expect_damage(&whole.disk.report(), "writes end before frame 14");
    // And of before-images none is left, not even a segment.
    let mut whole = self::whole();
    let durable = whole.writes1.frame_next;
    whole.writes1.claim_other = 4;
    whole.writes1.frame(&mut whole.disk, &[write(5000, 1, 2)], durable);
    assert!(whole.disk.report().findings.is_empty());
    whole.disk.table[5] = TableEntry::default();
    whole.disk.store_table();
    expect_damage(&whole.disk.report(), "before-images end before frame 0");
}

#[test]
fn frames_that_the_next_header_cuts_off_do_not_count() {
    let mut whole = whole();
    // A torn frame and two behind it, then the log goes on in segment 6 from the torn one's number.
    let resume = whole.writes1.clone();
    let durable = whole.writes1.frame_next;
    let torn = whole.writes1.frame(&mut whole.disk, &[write(5000, 1, 2)], durable);
    whole.writes1.frame(&mut whole.disk, &[write(5001, 1, 2)], durable);
    let at = whole.disk.at(torn.segment, torn.block);
    whole.disk.flip(at + 16);
    let mut resumed = resume;
    resumed.open(&mut whole.disk, 6);
    resumed.frame(&mut whole.disk, &[write(6000, 1, 2)], durable);
    resumed.frame(&mut whole.disk, &[write(6001, 1, 2)], durable + 1);
    whole.disk.store_table();
    let report = whole.disk.report();
    assert!(report.findings.is_empty(), "{report}");
    // And so does a segment that lies behind the cut as a whole: segment 7 was begun before it.
    let mut behind = whole.writes1.clone();
    behind.open(&mut whole.disk, 7);
    behind.own(&mut whole.disk, 7, 2);
    behind.frame(&mut whole.disk, &[write(5002, 1, 2)], durable);
    let header = whole.disk.at(7, 0);
    whole.disk.bytes[header + 68] = 2;
    reseal(&mut whole.disk.bytes[header..], 8, 128);
    let header = whole.disk.at(6, 0);
    resumed.own(&mut whole.disk, 6, 3);
    whole.disk.bytes[header + 68] = 3;
    reseal(&mut whole.disk.bytes[header..], 8, 128);
    whole.disk.store_table();
    let report = whole.disk.report();
    assert!(report.findings.is_empty(), "{report}");
    assert_eq!(report.segments_cut, 1);
}

#[test]
fn damaged_descriptors_in_a_valid_frame_are_damage() {
    let whole = whole();
    let spot = whole.writes1.spots[2];
    for (field, value, what) in [
        (0, 200u8, "unknown kind"),
        (1, 1, "codec"),
        (3, 1, "codec or flag"),
        (4, 255, "descriptor"),
        (0, DescriptorKind::BeforeData as u8, "stream of the other kind"),
        (24, 77, "impossible number of payload blocks"),
        (31, 255, "impossible number of payload blocks"),
        (32, 9, "payload outside its frame"),
        (36, 1, "impossible number of payload blocks"),
        (8, 0, "out of order"),
    ] {
        let mut disk = whole.disk.clone();
        let at = disk.at(spot.segment, spot.block);
        disk.bytes[at + 96 + field] = value;
        let end = 96 + u32::from_le_bytes(disk.bytes[at + 28..at + 32].try_into().expect("4 bytes")) as usize;
        reseal(&mut disk.bytes[at..], 4, end);
        let report = disk.report();
        expect_damage(&report, what);
    }
}

#[test]
fn a_frame_whose_checksum_changed_breaks_the_chain() {
    let whole = whole();
    let spot = whole.writes1.spots[2];
    let mut disk = whole.disk.clone();
    let at = disk.at(spot.segment, spot.block);
    disk.bytes[at + 56] ^= 1; // the durable point
    let end = 96 + u32::from_le_bytes(disk.bytes[at + 28..at + 32].try_into().expect("4 bytes")) as usize;
    reseal(&mut disk.bytes[at..], 4, end);
    expect_damage(&disk.report(), "frame 3 breaks the chain");
}

#[test]
fn footers_are_verified_against_the_frames() {
    // What a power cut may have torn is noted; what whole pages say wrongly is damage.
    let whole = whole();
    let segment = 3;
    let footer_at = whole.disk.at(segment, SEGMENT_BLOCKS - 1);
    let footer =
        SegmentFooter::read_from_bytes(&whole.disk.bytes[footer_at..footer_at + 128]).expect("footer of segment 3");
    let with = |change: &dyn Fn(&mut Disk)| {
        let mut disk = whole.disk.clone();
        change(&mut disk);
        disk.report()
    };
    let field = |at: usize, value: u8| {
        with(&|disk| {
            disk.bytes[footer_at + at] ^= value;
            reseal(&mut disk.bytes[footer_at..], 8, 128);
        })
    };
    expect_note(&with(&|disk| disk.flip(footer_at + 60)), "footer has a wrong checksum");
    expect_damage(&field(12, 3), "unknown version");
    expect_damage(&field(37, 1), "impossible places");
    expect_damage(&field(52, 1), "another last frame");
    expect_damage(&field(56, 1), "footer says that frames end");
    expect_note(&field(44, 1), "copied descriptors have a wrong checksum");
    expect_damage(&field(88, 1), "its root says");
    expect_damage(&field(108, 2), "its root says");
    expect_note(&field(112, 1), "is not the one that its parent names");
    expect_damage(&field(96, 1), "leads out of the log");
    let copy = whole.disk.at(segment, footer.descriptors_at.get());
    expect_note(&with(&|disk| disk.flip(copy + 3)), "copied descriptors have a wrong checksum");
    // A copy that is consistent in itself and not what the frames say.
    let report = with(&|disk| {
        disk.flip(copy + 3);
        let end = copy + footer.descriptor_bytes.get() as usize;
        let sum = crc(&disk.bytes[copy..end]);
        disk.bytes[footer_at + 44..footer_at + 48].copy_from_slice(&sum.to_le_bytes());
        reseal(&mut disk.bytes[footer_at..], 8, 128);
    });
    expect_damage(&report, "copied descriptors are not those of the frames");
    for block in footer.frames_end.get()..footer.descriptors_at.get() {
        let at = whole.disk.at(segment, block);
        expect_note(&with(&|disk| disk.flip(at + 77)), "index page has a wrong checksum");
    }
    // A footer of the segment's last life is nobody's.
    let report = field(24, 1);
    assert!(report.is_clean(), "{report}");
    // The last full segment's footer is believed by nobody until a later frame is durable.
    let mut last = whole.clone();
    last.writes1.footer(&mut last.disk);
    assert!(last.disk.report().findings.is_empty());
    let at = last.disk.at(4, SEGMENT_BLOCKS - 1);
    last.disk.flip(at + 60);
    expect_note(&last.disk.report(), "footer has a wrong checksum");
}

#[test]
fn an_index_that_misses_a_write_is_damage() {
    let mut whole = whole();
    let dropped = whole.writes1.entries.pop().expect("entries");
    whole.writes1.footer(&mut whole.disk);
    let durable = whole.writes1.frame_next;
    let mut next = whole.writes1.clone();
    next.open(&mut whole.disk, 6);
    next.frame(&mut whole.disk, &[write(7000, 1, 1)], durable);
    whole.disk.store_table();
    expect_damage(&whole.disk.report(), "data entries for");
    // One that names another block than was written, too.
    whole.writes1.entries.push(IndexEntry { crc: 1.into(), ..dropped });
    whole.writes1.footer(&mut whole.disk);
    expect_damage(&whole.disk.report(), "names a payload that no frame has");
    whole.writes1.entries.pop();
    whole.writes1.entries.push(dropped);
    whole.writes1.footer(&mut whole.disk);
    let report = whole.disk.report();
    assert!(report.findings.is_empty(), "{report}");
}

#[test]
fn merged_indexes_of_sealed_logs_are_walked() {
    let whole = whole();
    let index = *whole.writes0.spots.last().expect("the index frame");
    for block in 0..4 {
        let mut disk = whole.disk.clone();
        let at = disk.at(index.segment, index.block + index.head + block) + 40;
        disk.flip(at);
        expect_damage(&disk.report(), "index page has a wrong checksum");
    }
    assert_eq!(whole.root0.height.get(), 1);
    // A log that is named and owns nothing.
    let mut disk = whole.disk.clone();
    for segment in [0, 1, 2] {
        disk.table[segment] = TableEntry::default();
    }
    disk.store_table();
    expect_damage(&disk.report(), "owns no segment");
    // One whose before-images are gone.
    let mut disk = whole.disk.clone();
    disk.table[2] = TableEntry::default();
    disk.store_table();
    expect_damage(&disk.report(), "leads out of the log");
}

#[test]
fn logs_that_are_gone_and_writes_of_thin_logs_are_orphans() {
    let mut whole = whole();
    let durable = whole.writes1.frame_next;
    let sealed = log_flags::RECORDING | log_flags::CLOSED | log_flags::SEALED;
    // Thin: only the before-images count.
    let mut thin = whole.clone();
    let before_root = {
        let spot = *whole.before0.spots.last().expect("the index frame");
        run(&whole.before0.all, whole.before0.id, StreamKind::Before, spot.segment, spot.block + spot.head).1
    };
    let row = log_row(0, whole.writes0.id, sealed | log_flags::THIN, RunRoot::default(), before_root);
    thin.writes1.frame(&mut thin.disk, &[control(ControlKind::Log, 0, row.as_bytes())], durable);
    let at = thin.disk.at(0, 3);
    thin.disk.flip(at); // nobody reads it any more
    let report = thin.disk.report();
    expect_note(&report, "no control record needs");
    assert_eq!(report.segments_orphaned, 2);
    let at = thin.disk.at(2, 3);
    thin.disk.flip(at);
    assert!(!thin.disk.report().is_clean(), "before-images of a thin log count");
    // Gone: nothing does.
    whole.writes1.frame(&mut whole.disk, &[control(ControlKind::LogGone, 0, &[])], durable);
    for segment in 0..3 {
        let at = whole.disk.at(segment, 3);
        whole.disk.flip(at);
    }
    let report = whole.disk.report();
    expect_note(&report, "no control record needs");
    assert_eq!((report.segments_orphaned, report.volumes[0].orphaned_segments), (3, 3));
}

#[test]
fn control_records_behind_a_doubt_do_not_count() {
    let mut whole = whole();
    let durable = whole.writes1.frame_next;
    let torn = whole.writes1.frame(&mut whole.disk, &[write(5000, 1, 2)], durable);
    whole.writes1.frame(&mut whole.disk, &[control(ControlKind::LogGone, 0, &[])], durable);
    assert_eq!(whole.disk.report().segments_orphaned, 3);
    let at = whole.disk.at(torn.segment, torn.block + 1);
    whole.disk.flip(at);
    let report = whole.disk.report();
    expect_note(&report, "tail");
    assert_eq!(report.segments_orphaned, 0, "the log is not gone: the record that says so is behind a torn frame");
}

#[test]
fn a_first_frame_that_names_no_frame_is_noted() {
    let mut whole = whole();
    let mut log2 = Stream::new(2, StreamKind::Writes);
    log2.previous_crc = 0x1234_5678;
    log2.open(&mut whole.disk, 7);
    log2.frame(&mut whole.disk, &[write(9000, 1, 1)], 0);
    whole.disk.store_table();
    let report = whole.disk.report();
    expect_note(&report, "names a frame before it that no older log has");
    assert_eq!(report.links, 2);
}

#[test]
fn a_volume_above_its_capacity_is_noted() {
    let mut whole = whole();
    let durable = whole.writes1.frame_next;
    let less = ControlSettings { reserve_capacity: (2 * SEGMENT).into(), ..settings() };
    whole.writes1.frame(&mut whole.disk, &[control(ControlKind::Settings, 0, less.as_bytes())], durable);
    let report = whole.disk.report();
    expect_note(&report, "more than its reserve_capacity");
    assert_eq!(report.volumes[0].reserve_capacity, Some(2 * SEGMENT));
}

/// A small generator whose seed can be printed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Goal: no bytes whatsoever make the check panic, hang or allocate without bound. Method: random bytes in random places of a whole disk, mostly in its
/// structures, and checksums put right again, so that the damage gets past the first gate.
#[test]
fn random_damage_with_valid_checksums_never_panics() {
    let whole = whole();
    let mut disk = whole.disk.clone();
    let mut spots: Vec<(usize, usize, Option<usize>)> = Vec::new(); // place, where its checksum is, covered bytes
    for at in [SUPERBLOCK_A as usize, SUPERBLOCK_B as usize] {
        spots.push((at, 8, Some(128)));
    }
    for table in [disk.geometry.table_a, disk.geometry.table_b] {
        spots.push((table as usize, 8, Some(B)));
    }
    for segment in 0..7 {
        spots.push((disk.at(segment, 0), 8, Some(128)));
        spots.push((disk.at(segment, SEGMENT_BLOCKS - 1), 8, Some(128)));
        for block in 1..SEGMENT_BLOCKS - 1 {
            let at = disk.at(segment, block);
            match &disk.bytes[at..at + 4] {
                b"CDPX" => spots.push((at, 4, Some(B))),
                b"CDPF" => spots.push((at, 4, None)),
                _ => {}
            }
        }
    }
    assert!(spots.len() > 80, "frames and index pages were found");
    let mut damaged = 0;
    for seed in 0..400u64 {
        let mut random = Random(seed);
        let before = disk.bytes.clone();
        for _ in 0..=random.below(12) {
            let (at, sum, covered) = spots[random.below(spots.len() as u64) as usize];
            let length = covered.unwrap_or(400);
            for _ in 0..=random.below(4) {
                let offset = at + random.below(length as u64) as usize;
                disk.bytes[offset] = match random.below(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => disk.bytes[offset].wrapping_add(1),
                    _ => random.next() as u8,
                };
            }
            if random.below(8) > 0 {
                let bytes = &mut disk.bytes[at..at + 64 * B.min(length.max(B))];
                let stated = u32::from_le_bytes(bytes[28..32].try_into().expect("4 bytes")) as usize;
                let end = covered.unwrap_or_else(|| (96usize.saturating_add(stated)).min(bytes.len()));
                reseal(bytes, sum, end);
            }
        }
        match disk.check() {
            Ok(report) => {
                assert_eq!(report.segments, report.segments_free + report.segments_used + report.segments_unknown);
                assert!(report.segments_used <= 15 && report.findings.len() <= 2000, "seed {seed}");
                damaged += u64::from(!report.is_clean());
                let _ = report.to_string();
            }
            Err(CheckError::Io { source, .. }) => panic!("seed {seed}: {source}"),
            Err(_) => {}
        }
        disk.bytes = before;
    }
    assert!(damaged > 200, "most of it is seen: {damaged} of 400");
}

/// The same with noise over whole stretches.
#[test]
fn random_noise_never_panics() {
    let whole = whole();
    for seed in 0..60u64 {
        let mut random = Random(1000 + seed);
        let mut disk = whole.disk.clone();
        for _ in 0..=random.below(6) {
            let from = random.below(8 << 20) as usize;
            let magnitude = random.below(20);
            let length = 1 + random.below(1 << magnitude) as usize;
            match random.below(3) {
                0 => disk.bytes[from..from + length].fill(0),
                1 => disk.bytes[from..from + length].iter_mut().for_each(|b| *b = random.next() as u8),
                _ => {
                    let other = random.below(8 << 20) as usize;
                    disk.bytes.copy_within(other..other + length, from);
                }
            }
        }
        if let Err(CheckError::Io { source, .. }) = disk.check() {
            panic!("seed {}: {source}", 1000 + seed);
        }
    }
}
