//! Golden bytes of format 1: each structure and each kind of descriptor, from fixed values to exact bytes and back. Whoever has to change a line here
//! has changed the format, and needs a new version instead. The bytes were not taken from this program: another one, which knows only the tables of
//! `docs/format.md`, wrote them. The document takes its example from here.

use cdp_journal::check::{CheckError, check};
use cdp_journal::format::*;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const ID: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
const VOLUME: [u8; 16] =
    [0xf0, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff];

/// Hex as in the table: blanks and line ends do not count.
fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    digits.chunks(16).map(|line| line.join(" ")).collect::<Vec<_>>().join("\n")
}

fn same(bytes: &[u8], golden: &str) {
    let golden: Vec<&str> = golden.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(hex(bytes), golden.join("\n"), "\n{}\n", hex(bytes));
}

/// A sealed block: its structure is golden, the rest zero, and it opens again to the same bytes, but not when any of them is another.
fn same_block<T: IntoBytes + FromBytes + KnownLayout + Immutable>(value: &T, magic: &[u8; 8], golden: &str) {
    let block = sealed_block(value, 8);
    let size = size_of::<T>();
    assert_eq!(block.len(), 4096);
    same(&block[..size], golden);
    assert!(block[size..].iter().all(|b| *b == 0), "the rest of the block is zero");
    assert_eq!(
        block[8..12],
        crc(&block[12..size]).to_le_bytes(),
        "the checksum covers what follows it in the structure"
    );
    let opened = open_block::<T>(&block, magic, 8).expect("opens");
    assert_eq!(opened.as_bytes(), &block[..size]);
    for at in 0..size {
        let mut bent = block.clone();
        bent[at] ^= 1;
        assert!(open_block::<T>(&bent, magic, 8).is_none(), "byte {at} changed");
    }
    assert!(open_block::<T>(&block[..size - 1], magic, 8).is_none(), "cut short");
    assert!(open_block::<T>(&block, b"CDPOTHER", 8).is_none(), "of another kind");
}

/// A structure without a checksum of its own, to bytes and back.
fn same_struct<T: IntoBytes + FromBytes + KnownLayout + Immutable>(value: &T, golden: &str) {
    same(value.as_bytes(), golden);
    let back = T::read_from_bytes(value.as_bytes()).expect("reads back");
    assert_eq!(back.as_bytes(), value.as_bytes());
}

fn root() -> RunRoot {
    RunRoot {
        entries: 0x0102.into(),
        segment: 0x0304.into(),
        block: 0x0506.into(),
        height: 1.into(),
        levels: 3.into(),
        crc: 0xa1a2_a3a4.into(),
        reserved: 0.into(),
    }
}

fn superblock(version: u16, flags: u16) -> Superblock {
    let size = 64 << 20;
    let geometry = Geometry::of(size, 1 << 20).expect("fits");
    Superblock {
        magic: Superblock::MAGIC,
        crc: 0.into(),
        version: version.into(),
        flags: flags.into(),
        disk_id: ID,
        generation: 2.into(),
        disk_size: size.into(),
        segment_size: geometry.segment_size.into(),
        segments: geometry.segments.into(),
        table_a: geometry.table_a.into(),
        table_b: geometry.table_b.into(),
        segments_at: geometry.segments_at.into(),
        created_ns: 1_700_000_000_000_000_000.into(),
        reserved: [0; 32],
    }
}

#[test]
fn places_on_the_disk() {
    assert_eq!((SUPERBLOCK_A, SUPERBLOCK_B, CLOCK_A, CLOCK_B, TABLE_A), (0, 65536, 131_072, 196_608, 262_144));
    assert_eq!((SEGMENT_MIN, SEGMENT_MAX, VERSION), (1 << 20, 256 << 20, 1));
    let small = Geometry::of(64 << 20, 1 << 20).expect("fits");
    assert_eq!((small.segments, small.table_pages), (63, 2));
    assert_eq!((small.table_a, small.table_b, small.segments_at), (262_144, 327_680, 1 << 20));
    assert_eq!(small.at(2, 3), (3 << 20) + 3 * 4096);
    let large = Geometry::of(16 << 40, 16 << 20).expect("fits");
    assert_eq!((large.segments, large.table_pages), (1_048_567, 16_645));
    assert_eq!((large.table_b, large.segments_at), (68_485_120, 137_363_456));
    assert_eq!(Geometry::of(8 << 20, 1 << 20), None, "8 segments do not fit beside the tables");
    assert_eq!(Geometry::of(64 << 20, 3 << 20), None, "no power of two");
    assert_eq!(Geometry::of(64 << 30, 512 << 20), None, "more than the most");
}

#[test]
fn checksums_are_crc32_ieee() {
    assert_eq!(crc(b"123456789"), 0xcbf4_3926, "the check value of CRC-32/ISO-HDLC");
    assert_eq!(crc(b""), 0);
    assert_eq!(crc_of_zero_block(), 0xc71c_0011);
}

#[test]
fn superblock_bytes() {
    same_block(&superblock(VERSION, 0), &Superblock::MAGIC, GOLDEN_SUPERBLOCK);
}

#[test]
fn clock_page_bytes() {
    let page = ClockPage {
        magic: ClockPage::MAGIC,
        crc: 0.into(),
        version: VERSION.into(),
        flags: 0.into(),
        disk_id: ID,
        generation: 5.into(),
        high_water: 1_700_000_000_123_456_789.into(),
    };
    same_block(&page, &ClockPage::MAGIC, GOLDEN_CLOCK);
}

#[test]
fn table_page_bytes() {
    let mut header = TablePageHeader {
        magic: TablePageHeader::MAGIC,
        crc: 0.into(),
        version: VERSION.into(),
        flags: 0.into(),
        disk_id: ID,
        page: 1.into(),
        generation: 9.into(),
        reserved: [0; 16],
    };
    let entry = TableEntry {
        state: 1,
        kind: StreamKind::Before as u8,
        reserved: [0; 2],
        number: 7.into(),
        volume_id: VOLUME,
        log_seq: 11.into(),
        log_id: 0x1122_3344_5566_7788.into(),
        lap: 3.into(),
        reserved2: [0; 16],
    };
    same_struct(&entry, GOLDEN_ENTRY);
    assert_eq!(TablePageHeader::ENTRIES as usize * size_of::<TableEntry>() + size_of::<TablePageHeader>(), 4096);
    let mut page = header.as_bytes().to_vec();
    page.extend_from_slice(entry.as_bytes());
    page.resize(4096, 0);
    header.crc = crc(&page[12..]).into();
    same_struct(&header, GOLDEN_TABLE_PAGE);
}

#[test]
fn segment_header_bytes() {
    let header = SegmentHeader {
        magic: SegmentHeader::MAGIC,
        crc: 0.into(),
        version: VERSION.into(),
        flags: 0.into(),
        disk_id: ID,
        volume_id: VOLUME,
        log_id: 0x1122_3344_5566_7788.into(),
        log_seq: 11.into(),
        segment: 5.into(),
        number: 7.into(),
        lap: 3.into(),
        frame_first: 0x0901.into(),
        previous_crc: 0xdead_beef.into(),
        kind: StreamKind::Writes as u8,
        reserved: [0; 35],
    };
    same_block(&header, &SegmentHeader::MAGIC, GOLDEN_SEGMENT);
}

#[test]
fn segment_footer_bytes() {
    let footer = SegmentFooter {
        magic: SegmentFooter::MAGIC,
        crc: 0.into(),
        version: VERSION.into(),
        flags: 0.into(),
        log_id: 0x1122_3344_5566_7788.into(),
        lap: 3.into(),
        segment: 5.into(),
        descriptors_at: 250.into(),
        descriptor_bytes: 88.into(),
        descriptor_crc: 0x0bad_cafe.into(),
        frames_end: 240.into(),
        last_crc: 0xdead_beef.into(),
        frame_next: 0x0a01.into(),
        instant_last: 1_700_000_000_000_000_009.into(),
        durable: 1_700_000_000_000_000_008.into(),
        watermark: 1_700_000_000_000_000_007.into(),
        root: root(),
        reserved: [0; 8],
    };
    same_block(&footer, &SegmentFooter::MAGIC, GOLDEN_FOOTER);
}

fn descriptor(kind: DescriptorKind, sub: u8, start: u64, count: u64, payload: (u32, u32), extra: &[u8]) -> Vec<u8> {
    let header = DescriptorHeader {
        kind: kind as u8,
        codec: 0,
        sub,
        flags: 0,
        extra_bytes: (extra.len() as u32).into(),
        instant: 1_700_000_000_000_000_001.into(),
        start: start.into(),
        count: count.into(),
        payload_block: payload.0.into(),
        payload_blocks: payload.1.into(),
    };
    assert_eq!(DescriptorHeader::read_from_bytes(header.as_bytes()).expect("reads back").as_bytes(), header.as_bytes());
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(extra);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

#[test]
fn descriptor_bytes_of_each_kind() {
    use DescriptorKind::*;
    let sums = [U32::new(0x1111_1111), U32::new(0x2222_2222), U32::new(0x3333_3333)];
    let group: Vec<u8> = [ID, VOLUME].concat();
    let all = [
        (Write, descriptor(Write, 0, 14, 18, (2, 3), sums.as_bytes())),
        (Zero, descriptor(Zero, 0, 8, 1 << 32, (0, 0), &[])),
        (Discard, descriptor(Discard, 0, 16, 8, (0, 0), &[])),
        (BeforeData, descriptor(BeforeData, 0, 4, 2, (0, 2), sums[..2].as_bytes())),
        (BeforeZero, descriptor(BeforeZero, 0, 6, 100, (0, 0), &[])),
        (BeforeUnreadable, descriptor(BeforeUnreadable, 0, 106, 1, (0, 0), &[])),
        (FlushPoint, descriptor(FlushPoint, 0, 0, 1, (0, 0), &[])),
        (Marker, descriptor(Marker, 2, 1, 0, (0, 0), b"before upgrade")),
        (Revert, descriptor(Revert, 0, 1_600_000_000_000_000_000, 55, (0, 0), &group)),
        (Control, descriptor(Control, ControlKind::LogGone as u8, 4, 0, (0, 0), &[])),
        (Size, descriptor(Size, 0, 1 << 40, 0, (0, 0), &[])),
        (Index, descriptor(Index, 0, 0, 1, (7, 1), sums[..1].as_bytes())),
    ];
    for (i, ((kind, bytes), golden)) in all.iter().zip(GOLDEN_DESCRIPTORS).enumerate() {
        assert_eq!(*kind as usize, i + 1);
        assert_eq!(DescriptorKind::from_byte(bytes[0]), Some(*kind));
        same(bytes, golden);
    }
    assert_eq!(all.len(), GOLDEN_DESCRIPTORS.len());
    assert!((0..=255).filter(|b| DescriptorKind::from_byte(*b).is_some()).eq(1..=12), "no other kinds");
}

#[test]
fn control_bodies() {
    let settings = ControlSettings {
        reserve_capacity: (30u64 << 30).into(),
        reserve_duration_s: 86_400.into(),
        created_ns: 1_700_000_000_000_000_000.into(),
        generation: 3.into(),
        size: (1u64 << 40).into(),
        next_seq: 12.into(),
        priority: 1,
        on: 1,
        held: 0,
        reserved: [0; 13],
    };
    same_struct(&settings, GOLDEN_SETTINGS);
    let row = ControlLog {
        seq: 11.into(),
        id: 0x1122_3344_5566_7788.into(),
        start: 1_700_000_000_000_000_000.into(),
        io_start: 1_700_000_000_000_000_001.into(),
        io_last: 1_700_000_000_000_000_002.into(),
        flags: (log_flags::RECORDING | log_flags::CLOSED | log_flags::SEALED).into(),
        close_reason: 2.into(),
        disk_id: ID,
        writes_root: root(),
        before_root: RunRoot::default(),
    };
    same_struct(&row, GOLDEN_LOG);
    let revert = ControlRevert {
        log_seq: 11.into(),
        instant: 1_700_000_000_000_000_003.into(),
        target: 1_700_000_000_000_000_001.into(),
        blocks: 55.into(),
        next_block: u64::MAX.into(),
        blocks_done: 54.into(),
    };
    same_struct(&revert, GOLDEN_REVERT);
    use ControlKind::*;
    for (byte, kind) in [(1, Settings), (2, Log), (3, LogGone), (4, Hint), (5, Revert), (6, End)] {
        assert_eq!((kind as u8, ControlKind::from_byte(byte)), (byte, Some(kind)));
    }
    assert!((0..=255).filter(|b| ControlKind::from_byte(*b).is_some()).eq(1..=6), "no other kinds");
    use log_flags::*;
    assert_eq!((RECORDING, CLOSED, SEALED, THIN, KNOWN), (1, 2, 4, 8, 15));
    assert!((0..=255).filter(|b| StreamKind::from_byte(*b).is_some()).eq(1..=2), "no other kinds of streams");
}

#[test]
fn a_whole_frame() {
    // One write of one block of zeroes at sector 16, as `docs/format.md` shows it.
    let payload = [0u8; 4096];
    let sums = [U32::new(crc_of_zero_block())];
    let descriptors = descriptor(DescriptorKind::Write, 0, 16, 8, (0, 1), sums.as_bytes());
    let header = FrameHeader {
        magic: FrameHeader::MAGIC.into(),
        crc: 0.into(),
        log_id: 0x1122_3344_5566_7788.into(),
        number: 0x0901.into(),
        previous_crc: 0xdead_beef.into(),
        descriptor_bytes: (descriptors.len() as u32).into(),
        header_blocks: 1.into(),
        flags: 0.into(),
        payload_blocks: 1.into(),
        segment: 5.into(),
        block: 1.into(),
        instant_last: 1_700_000_000_000_000_001.into(),
        durable: 1_700_000_000_000_000_000.into(),
        watermark: 1_699_999_999_000_000_000.into(),
        durable_frames: 0x0900.into(),
        durable_frames_other: 0x0700.into(),
        lap: 3.into(),
    };
    let mut head = header.as_bytes().to_vec();
    head.extend_from_slice(&descriptors);
    let sum = crc(&head[8..]);
    head[4..8].copy_from_slice(&sum.to_le_bytes());
    same(&head, GOLDEN_FRAME);
    assert_eq!(crc(&payload), u32::from_le_bytes(head[136..140].try_into().expect("4 bytes")));
    let back = FrameHeader::read_from_prefix(&head).expect("reads back").0;
    assert_eq!((back.number.get(), back.crc.get()), (0x0901, sum));
    assert_eq!((back.durable_frames.get(), back.durable_frames_other.get(), back.lap.get()), (0x0900, 0x0700, 3));
    assert_eq!(FrameHeader::HEADER_BLOCKS_MAX, 64);
}

#[test]
fn index_page_bytes() {
    let entry = IndexEntry {
        block: 2.into(),
        instant: 1_700_000_000_000_000_001.into(),
        segment: 5.into(),
        page: 2.into(),
        mask: 0b0000_1111,
        kind_level: EntryKind::Write as u8,
        crc: crc_of_zero_block().into(),
        reserved: 0.into(),
    };
    same_struct(&entry, GOLDEN_INDEX_ENTRY);
    let extent = IndexEntry {
        block: 0x1000.into(),
        mask: 0xff,
        kind_level: EntryKind::BeforeZero as u8 | 3 << 4,
        ..IndexEntry::default()
    };
    same_struct(&extent, GOLDEN_INDEX_EXTENT);
    let child = ChildEntry {
        block: 2.into(),
        instant: 1_700_000_000_000_000_001.into(),
        segment: 5.into(),
        page: 3.into(),
        reserved: 0,
        level: 0x30,
        crc: 0xa1a2_a3a4.into(),
        reserved2: 0.into(),
    };
    same_struct(&child, GOLDEN_CHILD);
    same_struct(&root(), GOLDEN_ROOT);
    let mut header = IndexPageHeader {
        magic: IndexPageHeader::MAGIC.into(),
        crc: 0.into(),
        log_id: 0x1122_3344_5566_7788.into(),
        count: 1.into(),
        height: 0,
        kind: StreamKind::Writes as u8,
        reserved: [0; 12],
    };
    let mut page = header.as_bytes().to_vec();
    page.extend_from_slice(entry.as_bytes());
    page.resize(4096, 0);
    header.crc = crc(&page[8..]).into();
    same_struct(&header, GOLDEN_INDEX_PAGE);
    assert_eq!(IndexPageHeader::ENTRIES * size_of::<IndexEntry>() + size_of::<IndexPageHeader>(), 4096);
    use EntryKind::*;
    for (byte, kind) in [(1, Write), (2, Zero), (4, BeforeData), (5, BeforeZero), (6, BeforeUnreadable)] {
        assert_eq!((kind as u8, EntryKind::from_byte(byte)), (byte, Some(kind)));
    }
    assert_eq!((0..=255).filter(|b| EntryKind::from_byte(*b).is_some()).count(), 5, "no other kinds");
}

#[test]
fn unknown_versions_and_flags_are_refused() {
    let mut image = vec![0u8; 64 << 20];
    for (version, flags) in [(0, 0), (2, 0), (u16::MAX, 0), (1, 1), (1, 0x8000)] {
        // Copy B is of this version and still valid: the newer agent's copy decides.
        for (at, block) in [(0, superblock(version, flags)), (SUPERBLOCK_B as usize, superblock(VERSION, 0))] {
            image[at..at + 4096].copy_from_slice(&sealed_block(&block, 8));
        }
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        std::fs::write(file.path(), &image).expect("write image");
        match check(file.path(), &mut |_, _| {}) {
            Err(CheckError::Version { version: v, flags: f, .. }) => assert_eq!((v, f), (version, flags)),
            other => panic!("version {version}, flags {flags}: {other:?}"),
        }
    }
}

#[test]
fn integers_are_little_endian() {
    assert_eq!(U64::new(0x0102_0304_0506_0708).as_bytes(), [8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(FrameHeader::MAGIC.to_le_bytes(), *b"CDPF");
    assert_eq!(IndexPageHeader::MAGIC.to_le_bytes(), *b"CDPX");
}

const GOLDEN_SUPERBLOCK: &str = "
    43 44 50 44 49 53 4b 01 3e d2 bc d5 01 00 00 00
    00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f
    02 00 00 00 00 00 00 00 00 00 00 04 00 00 00 00
    00 00 10 00 00 00 00 00 3f 00 00 00 00 00 00 00
    00 00 04 00 00 00 00 00 00 00 05 00 00 00 00 00
    00 00 10 00 00 00 00 00 00 00 2a 36 fe 9c 97 17
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_CLOCK: &str = "
    43 44 50 43 4c 4f 43 4b 01 a7 91 b4 01 00 00 00
    00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f
    05 00 00 00 00 00 00 00 15 cd 85 3d fe 9c 97 17
";

const GOLDEN_ENTRY: &str = "
    01 02 00 00 07 00 00 00 f0 f1 f2 f3 f4 f5 f6 f7
    f8 f9 fa fb fc fd fe ff 0b 00 00 00 00 00 00 00
    88 77 66 55 44 33 22 11 03 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_TABLE_PAGE: &str = "
    43 44 50 54 41 42 4c 45 23 0d a1 0c 01 00 00 00
    00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f
    01 00 00 00 00 00 00 00 09 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_SEGMENT: &str = "
    43 44 50 53 45 47 4d 54 f8 86 61 5e 01 00 00 00
    00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f
    f0 f1 f2 f3 f4 f5 f6 f7 f8 f9 fa fb fc fd fe ff
    88 77 66 55 44 33 22 11 0b 00 00 00 00 00 00 00
    05 00 00 00 07 00 00 00 03 00 00 00 00 00 00 00
    01 09 00 00 00 00 00 00 ef be ad de 01 00 00 00
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_FOOTER: &str = "
    43 44 50 46 4f 4f 54 52 76 7d f8 8a 01 00 00 00
    88 77 66 55 44 33 22 11 03 00 00 00 00 00 00 00
    05 00 00 00 fa 00 00 00 58 00 00 00 fe ca ad 0b
    f0 00 00 00 ef be ad de 01 0a 00 00 00 00 00 00
    09 00 2a 36 fe 9c 97 17 08 00 2a 36 fe 9c 97 17
    07 00 2a 36 fe 9c 97 17 02 01 00 00 00 00 00 00
    04 03 00 00 06 05 00 00 01 00 00 00 03 00 00 00
    a4 a3 a2 a1 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_SETTINGS: &str = "
    00 00 00 80 07 00 00 00 80 51 01 00 00 00 00 00
    00 00 2a 36 fe 9c 97 17 03 00 00 00 00 00 00 00
    00 00 00 00 00 01 00 00 0c 00 00 00 00 00 00 00
    01 01 00 00 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_LOG: &str = "
    0b 00 00 00 00 00 00 00 88 77 66 55 44 33 22 11
    00 00 2a 36 fe 9c 97 17 01 00 2a 36 fe 9c 97 17
    02 00 2a 36 fe 9c 97 17 07 00 00 00 02 00 00 00
    00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f
    02 01 00 00 00 00 00 00 04 03 00 00 06 05 00 00
    01 00 00 00 03 00 00 00 a4 a3 a2 a1 00 00 00 00
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_REVERT: &str = "
    0b 00 00 00 00 00 00 00 03 00 2a 36 fe 9c 97 17
    01 00 2a 36 fe 9c 97 17 37 00 00 00 00 00 00 00
    ff ff ff ff ff ff ff ff 36 00 00 00 00 00 00 00
";

const GOLDEN_FRAME: &str = "
    43 44 50 46 18 aa 7e 62 88 77 66 55 44 33 22 11
    01 09 00 00 00 00 00 00 ef be ad de 30 00 00 00
    01 00 00 00 01 00 00 00 05 00 00 00 01 00 00 00
    01 00 2a 36 fe 9c 97 17 00 00 2a 36 fe 9c 97 17
    00 36 8f fa fd 9c 97 17 00 09 00 00 00 00 00 00
    00 07 00 00 00 00 00 00 03 00 00 00 00 00 00 00
    01 00 00 00 04 00 00 00 01 00 2a 36 fe 9c 97 17
    10 00 00 00 00 00 00 00 08 00 00 00 00 00 00 00
    00 00 00 00 01 00 00 00 11 00 1c c7 00 00 00 00
";

const GOLDEN_INDEX_ENTRY: &str = "
    02 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    05 00 00 00 02 00 0f 01 11 00 1c c7 00 00 00 00
";

const GOLDEN_INDEX_EXTENT: &str = "
    00 10 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    00 00 00 00 00 00 ff 35 00 00 00 00 00 00 00 00
";

const GOLDEN_CHILD: &str = "
    02 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    05 00 00 00 03 00 00 30 a4 a3 a2 a1 00 00 00 00
";

const GOLDEN_ROOT: &str = "
    02 01 00 00 00 00 00 00 04 03 00 00 06 05 00 00
    01 00 00 00 03 00 00 00 a4 a3 a2 a1 00 00 00 00
";

const GOLDEN_INDEX_PAGE: &str = "
    43 44 50 58 72 9e 07 be 88 77 66 55 44 33 22 11
    01 00 00 01 00 00 00 00 00 00 00 00 00 00 00 00
";

const GOLDEN_DESCRIPTORS: [&str; 12] = [
    "
    01 00 00 00 0c 00 00 00 01 00 2a 36 fe 9c 97 17
    0e 00 00 00 00 00 00 00 12 00 00 00 00 00 00 00
    02 00 00 00 03 00 00 00 11 11 11 11 22 22 22 22
    33 33 33 33 00 00 00 00
    ",
    "
    02 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    08 00 00 00 00 00 00 00 00 00 00 00 01 00 00 00
    00 00 00 00 00 00 00 00
    ",
    "
    03 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    10 00 00 00 00 00 00 00 08 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00
    ",
    "
    04 00 00 00 08 00 00 00 01 00 2a 36 fe 9c 97 17
    04 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00
    00 00 00 00 02 00 00 00 11 11 11 11 22 22 22 22
    ",
    "
    05 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    06 00 00 00 00 00 00 00 64 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00
    ",
    "
    06 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    6a 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00
    ",
    "
    07 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    00 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00
    ",
    "
    08 00 02 00 0e 00 00 00 01 00 2a 36 fe 9c 97 17
    01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00 62 65 66 6f 72 65 20 75
    70 67 72 61 64 65 00 00
    ",
    "
    09 00 00 00 20 00 00 00 01 00 2a 36 fe 9c 97 17
    00 00 a0 d8 85 57 34 16 37 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00 00 01 02 03 04 05 06 07
    08 09 0a 0b 0c 0d 0e 0f f0 f1 f2 f3 f4 f5 f6 f7
    f8 f9 fa fb fc fd fe ff
    ",
    "
    0a 00 03 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00
    ",
    "
    0b 00 00 00 00 00 00 00 01 00 2a 36 fe 9c 97 17
    00 00 00 00 00 01 00 00 00 00 00 00 00 00 00 00
    00 00 00 00 00 00 00 00
    ",
    "
    0c 00 00 00 04 00 00 00 01 00 2a 36 fe 9c 97 17
    00 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
    07 00 00 00 01 00 00 00 11 11 11 11 00 00 00 00
    ",
];
