//! Walking one stream of a log (its segments of one kind): headers, frames, chain, payloads, footers.
//!
//! A place that does not check out may be a torn tail, which is what any power cut leaves and the next start cuts off, or damage to what was
//! durable. Evidence decides: a valid frame further on, or of the log's other stream, that says that the missing one was durable. So problems wait
//! until such a frame comes.

use zerocopy::FromBytes;

use super::run::{self, RunOf};
use super::source::{Findings, Layout, Owned, Source, Tally};
use crate::format::{
    self, ControlKind, ControlLog, ControlRevert, ControlSettings, DescriptorHeader, DescriptorKind, FrameHeader,
    SegmentFooter, SegmentHeader, StreamKind, crc,
};
use crate::types::{BLOCK, SECTORS_PER_BLOCK};

/// Problems of one stream that wait for evidence, of frames and of footers each; it is the first ones that tell.
const PENDING_MAX: usize = 64;

/// What is told while a stream is walked.
pub(super) enum Event<'a> {
    /// A valid frame.
    Frame(&'a FrameHeader, &'a [Descriptor<'a>]),
    /// From here on frames may be behind a cut.
    Doubt,
    /// All that was in doubt was durable.
    Certain,
    /// A segment is done.
    Segment,
}

/// What a walk found.
#[derive(Default)]
pub(super) struct Outcome {
    /// Payload blocks of guest writes or before-images.
    pub data_blocks: u64,
    /// Segments that were given out and never written.
    pub unwritten: u64,
    /// Segments behind a cut.
    pub cut: u64,
    /// Valid frames.
    pub frames: u64,
    /// First frame that is torn or lost at the end of the stream.
    pub tail: Option<u64>,
    /// Frames of the log's other stream below this were durable.
    pub claim_other: u64,
    /// Instant of the newest write, write of zeroes or discard; 0: none.
    pub io_last: u64,
    /// Number of the frame after the last one.
    end: u64,
    /// What no frame of the stream proved to be damage.
    pending: Vec<Pending>,
    /// Everything was found to be in order, so that counts can be compared.
    pub whole: bool,
}

impl Outcome {
    /// Of a stream that has no segments.
    pub fn of_nothing() -> Self {
        Self { whole: true, ..Self::default() }
    }

    /// Judges what is left open of a stream; `claim`: frames below it were durable, as the log's other stream says. `log` is any segment of the log.
    pub fn settle(&mut self, findings: &mut Findings, tally: &mut Tally, log: &Owned, kind: StreamKind, claim: u64) {
        let of = match kind {
            StreamKind::Writes => "writes",
            StreamKind::Before => "before-images",
        };
        let mut tail: Option<Pending> = None;
        let mut convicted = false;
        for pending in std::mem::take(&mut self.pending) {
            if pending.frames && pending.number < claim {
                convicted = true;
                findings.damage(pending.place, pending.what);
            } else if !pending.frames {
                findings.note(pending.place, format!("{} (the frames are read instead)", pending.what));
            } else if tail.as_ref().is_none_or(|t| pending.number < t.number) {
                tail = Some(pending);
            }
        }
        if self.end < claim && !convicted {
            convicted = true;
            let what = format!(
                "{of} end before frame {}, the log's other frames say that those below {claim} were durable",
                self.end
            );
            findings.damage(format!("volume {} log {}", uuid::Uuid::from_bytes(log.volume), log.seq), what);
        }
        self.whole &= !convicted;
        if let Some(tail) = tail {
            self.tail = Some(tail.number);
            tally.tails += 1;
            let what = format!(
                "tail: {of} of log {} from frame {} on are torn or lost and were never durable; the next start cuts them off ({})",
                log.seq, tail.number, tail.what
            );
            findings.note(tail.place, what);
        }
    }
}

/// A descriptor of a valid frame.
pub(super) struct Descriptor<'a> {
    pub kind: DescriptorKind,
    pub header: DescriptorHeader,
    pub extra: &'a [u8],
    /// All of it, padding too.
    raw: &'a [u8],
}

/// A problem that waits for evidence.
struct Pending {
    /// A frame that says that frames below a number above this were durable proves damage.
    number: u64,
    /// Of frames (a tail if not proven), or of a footer (derived data: noted if not proven).
    frames: bool,
    /// Of a footer: it looks like a write that a power cut tore. That proves nothing, whatever later frames say: footers come
    /// from the frames and are not synced with them, and a start that does not find one whole reads the frames.
    torn: bool,
    place: String,
    what: String,
}

/// What is wrong with a footer, or with what it names.
struct Bad {
    torn: bool,
    what: String,
}

impl Bad {
    fn torn(what: impl Into<String>) -> Self {
        Self { torn: true, what: what.into() }
    }

    fn whole(what: impl Into<String>) -> Self {
        Self { torn: false, what: what.into() }
    }
}

/// What block 0 of a segment turned out to be.
enum Head {
    Written(SegmentHeader),
    /// Left over, blank or torn.
    Blank,
    /// Valid, and contradicts the table.
    Wrong(&'static str),
    Unreadable(String),
}

/// Whose stream is walked, and who listens.
pub(super) struct Walk<'a> {
    pub source: &'a mut Source,
    pub layout: &'a Layout,
    pub findings: &'a mut Findings,
    pub tally: &'a mut Tally,
    pub listener: &'a mut dyn FnMut(Event<'_>),
}

/// Where the walk is.
struct State {
    /// Number of the next frame.
    expected: u64,
    /// `crc` of the frame before it; `None`: not known, the chain starts anew.
    chain: Option<u32>,
    pending: Vec<Pending>,
    instant_last: u64,
    outcome: Outcome,
    damage: bool,
}

/// What the frames of one segment add up to, for its footer.
struct SegmentSum {
    /// Checksum of each payload block, and the entry kind that its index entry has; 0: none.
    sums: Vec<(u32, u8)>,
    data_blocks: u64,
    side: crc32fast::Hasher,
    side_bytes: u64,
    whole: bool,
}

impl Walk<'_> {
    /// Walks a stream; `segments` are all of one log and kind, by number. What it leaves open is for [`Outcome::settle`].
    pub fn stream(&mut self, segments: &[Owned]) -> Outcome {
        let mut heads = Vec::with_capacity(segments.len());
        for s in segments {
            heads.push(self.head(s));
        }
        let first_frame = |head: &Head| match head {
            Head::Written(header) => Some(header.frame_first.get()),
            _ => None,
        };
        // Frames at or past the first frame of any later segment were cut off.
        let mut cuts = vec![u64::MAX; segments.len()];
        let mut least = u64::MAX;
        for (i, head) in heads.iter().enumerate().rev() {
            cuts[i] = least;
            least = least.min(first_frame(head).unwrap_or(u64::MAX));
        }
        let mut state = State {
            expected: 0,
            chain: None,
            pending: Vec::new(),
            instant_last: 0,
            outcome: Outcome::default(),
            damage: false,
        };
        let mut written_number = None;
        for (i, (s, head)) in segments.iter().zip(&heads).enumerate() {
            match head {
                Head::Written(header) => {
                    if written_number == Some(s.number) {
                        state.damage = true;
                        let what = format!("number {} of the log is given to two segments", s.number);
                        self.findings.damage(place(s, 0), what);
                    }
                    written_number = Some(s.number);
                    if header.frame_first.get() >= cuts[i] {
                        state.outcome.cut += 1;
                    } else {
                        self.enter(s, header, &mut state);
                        self.segment(s, 1, cuts[i], true, &mut state);
                    }
                }
                Head::Blank => match self.find_frame(s, 1, 0) {
                    // The first header that is there says where frames end, so a frame past it is a leftover.
                    Some((block, frame)) if frame.number.get() < cuts[i] && frame.number.get() >= state.expected => {
                        // The header came with the first frame, which may be missing as well.
                        let first = state.expected;
                        self.doubt(&mut state, first, true, place(s, 0), "segment header does not check out".into());
                        state.expected = frame.number.get();
                        state.chain = None;
                        self.segment(s, block, cuts[i], false, &mut state);
                    }
                    _ => state.outcome.unwritten += 1,
                },
                Head::Wrong(what) => {
                    state.damage = true;
                    self.findings.damage(place(s, 0), format!("segment header {what}"));
                }
                Head::Unreadable(error) => {
                    state.damage = true;
                    self.findings.damage(place(s, 0), format!("segment header cannot be read: {error}"));
                }
            }
            (self.listener)(Event::Segment);
        }
        state.outcome.whole = !state.damage && state.pending.is_empty();
        state.outcome.end = state.expected;
        state.outcome.io_last = state.instant_last;
        state.outcome.pending = state.pending;
        state.outcome
    }

    /// What block 0 says, compared with the table.
    fn head(&mut self, s: &Owned) -> Head {
        let bytes = match self.source.block(self.layout.geometry.at(s.segment, 0)) {
            Ok(bytes) => bytes,
            Err(error) => return Head::Unreadable(error.to_string()),
        };
        let Some(header) = format::open_block::<SegmentHeader>(&bytes, &SegmentHeader::MAGIC, 8) else {
            return Head::Blank;
        };
        self.tally.bytes += BLOCK;
        if header.disk_id != self.layout.disk_id {
            return Head::Blank; // from before the disk was initialised anew
        }
        if header.version.get() != format::VERSION || header.flags.get() != 0 {
            Head::Wrong("has an unknown version or flag")
        } else if header.segment.get() != s.segment {
            Head::Wrong("is another segment's: a misdirected write")
        } else if header.lap.get() < s.lap {
            Head::Blank
        } else if header.lap.get() > s.lap {
            Head::Wrong("has a later lap than the table")
        } else if header.volume_id != s.volume {
            Head::Wrong("names another volume than the table")
        } else if header.log_id.get() != s.log_id || header.log_seq.get() != s.seq {
            Head::Wrong("names another log than the table")
        } else if header.number.get() != s.number || header.kind != s.kind {
            Head::Wrong("names another number or kind than the table")
        } else {
            Head::Written(header)
        }
    }

    /// Goes on into a segment with a valid header.
    fn enter(&mut self, s: &Owned, header: &SegmentHeader, state: &mut State) {
        let (first, previous) = (header.frame_first.get(), header.previous_crc.get());
        let told = state.pending.iter().any(|p| p.frames && p.number == state.expected);
        if first > state.expected && told {
            // The frames that ended early were told of where they ended.
        } else if first > state.expected {
            let what = format!("frames {} to {} are missing before this segment", state.expected, first - 1);
            self.doubt(state, state.expected, true, place(s, 0), what);
        } else if state.chain.is_some_and(|chain| chain != previous) {
            let what = "segment header breaks the chain: it names another frame before it".to_owned();
            self.doubt(state, first, true, place(s, 0), what);
        }
        state.expected = first;
        state.chain = Some(previous);
    }

    /// Walks the frames of a segment from a block on, then checks its footer.
    fn segment(&mut self, s: &Owned, from: u32, cut: u64, header_valid: bool, state: &mut State) {
        let segment_blocks = self.layout.segment_blocks();
        let footer = self.footer(s);
        // A footer that counts frames that were cut off says nothing any more.
        let footer_counts = matches!(&footer, Ok(Some(f)) if f.frame_next.get() <= cut);
        let limit = match &footer {
            Ok(Some(f)) if footer_counts => f.frames_end.get().min(segment_blocks - 1),
            _ => segment_blocks,
        };
        let mut sum = SegmentSum {
            sums: vec![(0, 0); segment_blocks as usize],
            data_blocks: 0,
            side: crc32fast::Hasher::new(),
            side_bytes: 0,
            whole: header_valid,
        };
        let mut block = from;
        let mut head = Vec::new();
        while block < limit && state.expected < cut {
            let frame = match self.frame_at(s, block, limit, &mut head) {
                Ok(frame) => frame,
                Err(what) => {
                    sum.whole = false;
                    let found = self.find_frame(s, block + 1, state.expected).filter(|(_, f)| f.number.get() < cut);
                    match found {
                        Some((at, frame)) => {
                            let number = frame.number.get();
                            let what = format!("frame {} {what}", state.expected);
                            self.doubt(state, state.expected, true, place(s, block), what);
                            state.expected = number;
                            state.chain = None;
                            block = at;
                            continue;
                        }
                        // The end of what was written: a torn frame, or nothing.
                        None if what != NO_FRAME || footer_counts || cut != u64::MAX => {
                            let what = format!("frame {} {what}", state.expected);
                            self.doubt(state, state.expected, true, place(s, block), what);
                        }
                        None => {}
                    }
                    break;
                }
            };
            let number = frame.number.get();
            if number != state.expected {
                sum.whole = false;
                let what = format!("frame {number} lies where frame {} belongs", state.expected);
                self.doubt(state, state.expected.min(number), true, place(s, block), what);
                state.chain = None;
            }
            if number >= cut {
                break;
            }
            if state.chain.is_some_and(|chain| chain != frame.previous_crc.get()) {
                sum.whole = false;
                let what = format!("frame {number} breaks the chain: it names another frame before it");
                self.doubt(state, number, true, place(s, block), what);
            }
            self.evidence(state, frame.durable_frames.get());
            state.outcome.claim_other = state.outcome.claim_other.max(frame.durable_frames_other.get());
            self.take(s, block, &frame, &head, state, &mut sum);
            state.expected = number.saturating_add(1);
            state.chain = Some(frame.crc.get());
            block += u32::from(frame.header_blocks.get()) + frame.payload_blocks.get();
        }
        let last = state.expected.saturating_sub(1);
        match footer {
            Ok(None) => {}
            Err(Bad { torn, what }) => {
                self.doubt_of(
                    state,
                    Pending { number: last, frames: false, torn, place: place(s, segment_blocks - 1), what },
                );
            }
            Ok(Some(footer)) if footer_counts => {
                let proven_by = footer.frame_next.get().saturating_sub(1);
                if sum.whole && (footer.frame_next.get() != state.expected || footer.frames_end.get() != block) {
                    let what = format!(
                        "footer says that frames end at block {} before frame {}, they end at block {block} before frame {}",
                        footer.frames_end.get(),
                        footer.frame_next.get(),
                        state.expected
                    );
                    self.doubt(state, proven_by, false, place(s, segment_blocks - 1), what);
                    sum.whole = false;
                }
                if sum.whole && state.chain.is_some_and(|chain| chain != footer.last_crc.get()) {
                    let what = "footer names another last frame".to_owned();
                    self.doubt(state, proven_by, false, place(s, segment_blocks - 1), what);
                }
                for (at, Bad { torn, what }) in self.footer_content(s, &footer, &sum) {
                    self.doubt_of(state, Pending { number: proven_by, frames: false, torn, place: place(s, at), what });
                }
            }
            Ok(Some(_)) => {}
        }
    }

    /// The header of a valid frame at a block; `head` gets all its header blocks.
    fn frame_at(&mut self, s: &Owned, block: u32, limit: u32, head: &mut Vec<u8>) -> Result<FrameHeader, String> {
        let at = self.layout.geometry.at(s.segment, block);
        let unreadable = |e: std::io::Error| format!("cannot be read: {e}");
        let bytes = self.source.get(at, BLOCK as usize).map_err(unreadable)?;
        let Ok((header, _)) = FrameHeader::read_from_prefix(bytes) else { return Err(NO_FRAME.into()) };
        if header.magic.get() != FrameHeader::MAGIC || header.log_id.get() != s.log_id {
            return Err(NO_FRAME.into());
        }
        if header.segment.get() != s.segment || header.block.get() != block {
            return Err("belongs elsewhere: a misdirected write".into());
        }
        if header.lap.get() != s.lap {
            // Left over from an earlier life of the segment, maybe in the same log.
            return Err(NO_FRAME.into());
        }
        let blocks = header.header_blocks.get();
        let end = size_of::<FrameHeader>() as u64 + u64::from(header.descriptor_bytes.get());
        if !(1..=FrameHeader::HEADER_BLOCKS_MAX).contains(&blocks) || end > u64::from(blocks) * BLOCK {
            return Err("has impossible lengths".into());
        }
        let whole = u64::from(block) + u64::from(blocks) + u64::from(header.payload_blocks.get());
        if whole > u64::from(self.layout.segment_blocks()) {
            return Err("reaches past the end of its segment".into());
        }
        let bytes = self.source.get(at, usize::from(blocks) * BLOCK as usize).map_err(unreadable)?;
        if crc(&bytes[8..end as usize]) != header.crc.get() {
            return Err("has a wrong checksum".into());
        }
        if header.flags.get() != 0 {
            return Err("has an unknown flag".into());
        }
        if whole > u64::from(limit) {
            return Err("reaches past the end that the footer states".into());
        }
        head.clear();
        head.extend_from_slice(bytes);
        Ok(header)
    }

    /// The first valid frame of the log from a block on with at least this number.
    fn find_frame(&mut self, s: &Owned, from: u32, number: u64) -> Option<(u32, FrameHeader)> {
        let blocks = self.layout.segment_blocks();
        let mut head = Vec::new();
        (from..blocks).find_map(|block| {
            let frame = self.frame_at(s, block, blocks, &mut head).ok()?;
            (frame.number.get() >= number).then_some((block, frame))
        })
    }

    /// Takes a valid frame: descriptors, instants, payload.
    fn take(
        &mut self,
        s: &Owned,
        block: u32,
        frame: &FrameHeader,
        head: &[u8],
        state: &mut State,
        sum: &mut SegmentSum,
    ) {
        let number = frame.number.get();
        self.tally.frames += 1;
        state.outcome.frames += 1;
        self.tally.bytes += head.len() as u64;
        let end = size_of::<FrameHeader>() + frame.descriptor_bytes.get() as usize;
        let descriptors = match parse(&head[size_of::<FrameHeader>()..end], frame.payload_blocks.get(), s.kind) {
            Ok(descriptors) => descriptors,
            Err(what) => {
                // Its checksum fits, so no disk did this.
                (state.damage, sum.whole) = (true, false);
                self.findings.damage(place(s, block), format!("frame {number}: {what}"));
                return;
            }
        };
        let payload_at = block + u32::from(frame.header_blocks.get());
        for d in &descriptors {
            let data = match d.kind {
                DescriptorKind::Write => 1,
                DescriptorKind::BeforeData => 4,
                _ => 0,
            };
            if matches!(d.kind, DescriptorKind::Write | DescriptorKind::Zero | DescriptorKind::Discard) {
                let instant = d.header.instant.get();
                if instant <= state.instant_last || instant > frame.instant_last.get() {
                    state.damage = true;
                    let what = format!("frame {number}: instant {instant} is out of order");
                    self.findings.damage(place(s, block), what);
                }
                state.instant_last = state.instant_last.max(instant);
            }
            if is_side(d.kind) {
                sum.side.update(d.raw);
                sum.side_bytes += d.raw.len() as u64;
            }
            for (i, expected) in (0u32..).zip(d.extra.as_chunks::<4>().0) {
                if i == d.header.payload_blocks.get() {
                    break; // `extra` is something else
                }
                let expected = u32::from_le_bytes(*expected);
                let at = payload_at + d.header.payload_block.get() + i;
                let intact = match self.source.get(self.layout.geometry.at(s.segment, at), BLOCK as usize) {
                    Ok(bytes) if crc(bytes) == expected => Ok(()),
                    Ok(_) => Err("has a wrong checksum".to_owned()),
                    Err(error) => Err(format!("cannot be read: {error}")),
                };
                match intact {
                    Ok(()) => {
                        self.tally.payload_blocks += 1;
                        self.tally.bytes += BLOCK;
                        sum.sums[at as usize] = (expected, data);
                        if data != 0 {
                            sum.data_blocks += 1;
                            state.outcome.data_blocks += 1;
                        }
                    }
                    Err(what) => {
                        sum.whole = false;
                        self.doubt(state, number, true, place(s, at), format!("payload of frame {number} {what}"));
                    }
                }
            }
        }
        (self.listener)(Event::Frame(frame, &descriptors));
    }

    /// The segment's footer: `None` when it has none (or a leftover), an error when it is this segment's and does not check out.
    fn footer(&mut self, s: &Owned) -> Result<Option<SegmentFooter>, Bad> {
        let last = self.layout.segment_blocks() - 1;
        let bytes = self
            .source
            .block(self.layout.geometry.at(s.segment, last))
            .map_err(|error| Bad::whole(format!("footer cannot be read: {error}")))?;
        let Ok((raw, _)) = SegmentFooter::read_from_prefix(&bytes) else { return Ok(None) };
        let ours = raw.magic == SegmentFooter::MAGIC && raw.log_id.get() == s.log_id && raw.segment.get() == s.segment;
        let Some(footer) = format::open_block::<SegmentFooter>(&bytes, &SegmentFooter::MAGIC, 8) else {
            return if ours { Err(Bad::torn("footer has a wrong checksum")) } else { Ok(None) };
        };
        if !ours || footer.lap.get() != s.lap {
            return Ok(None);
        }
        if footer.version.get() != format::VERSION || footer.flags.get() != 0 {
            return Err(Bad::whole("footer has an unknown version or flag"));
        }
        let copy_blocks = u64::from(footer.descriptor_bytes.get()).div_ceil(BLOCK);
        let fits = footer.frames_end.get() >= 1
            && footer.frames_end.get() <= footer.descriptors_at.get()
            && u64::from(footer.descriptors_at.get()) + copy_blocks <= u64::from(last);
        if !fits {
            return Err(Bad::whole("footer has impossible places"));
        }
        self.tally.bytes += BLOCK;
        Ok(Some(footer))
    }

    /// What a valid footer names: the copy of descriptors, and the index.
    fn footer_content(&mut self, s: &Owned, footer: &SegmentFooter, sum: &SegmentSum) -> Vec<(u32, Bad)> {
        let mut problems = Vec::new();
        let mut copy = crc32fast::Hasher::new();
        let mut left = u64::from(footer.descriptor_bytes.get());
        let mut block = footer.descriptors_at.get();
        while left > 0 {
            let n = left.min(BLOCK);
            match self.source.get(self.layout.geometry.at(s.segment, block), BLOCK as usize) {
                Ok(bytes) => copy.update(&bytes[..n as usize]),
                Err(error) => problems.push((block, Bad::whole(format!("copied descriptors cannot be read: {error}")))),
            }
            left -= n;
            block += 1;
        }
        if copy.finalize() != footer.descriptor_crc.get() {
            problems.push((footer.descriptors_at.get(), Bad::torn("copied descriptors have a wrong checksum")));
        } else {
            self.tally.bytes += u64::from(footer.descriptor_bytes.get());
            let frames = (sum.side_bytes, sum.side.clone().finalize());
            if sum.whole && frames != (u64::from(footer.descriptor_bytes.get()), footer.descriptor_crc.get()) {
                problems
                    .push((footer.descriptors_at.get(), Bad::whole("copied descriptors are not those of the frames")));
            }
        }
        let Some(kind) = StreamKind::from_byte(s.kind) else { return problems };
        let pages = footer.frames_end.get()..footer.descriptors_at.get();
        let allowed = |segment: u32, block: u32| segment == s.segment && pages.contains(&block);
        let run = RunOf { root: &footer.root, log_id: s.log_id, kind, allowed: &allowed };
        let mut data = 0u64;
        let walked = run::walk(self.source, self.layout, &run, self.tally, &mut |_, entry| {
            if !run::has_payload(entry) {
                return Ok(());
            }
            data += 1;
            let found = sum.sums.get(usize::from(entry.page.get())).copied();
            let same = entry.segment.get() == s.segment && found == Some((entry.crc.get(), entry.kind_level & 15));
            if same || !sum.whole { Ok(()) } else { Err("index entry names a payload that no frame has".into()) }
        });
        match walked {
            // A page that is not there, or not whole; what whole pages say wrongly no power cut made.
            Err(error) => {
                let what = format!("index of the segment: {}", error.what);
                problems.push((error.at.1, Bad { torn: error.torn, what }));
            }
            Ok(()) if sum.whole && data != sum.data_blocks => {
                let what = format!("index of the segment has {data} data entries for {} blocks", sum.data_blocks);
                problems.push((self.layout.segment_blocks() - 1, Bad::whole(what)));
            }
            Ok(()) => {}
        }
        problems
    }

    /// Something does not check out: damage once a frame proves that frame `number` was durable.
    fn doubt(&mut self, state: &mut State, number: u64, frames: bool, place: String, what: String) {
        self.doubt_of(state, Pending { number, frames, torn: false, place, what });
    }

    fn doubt_of(&mut self, state: &mut State, pending: Pending) {
        let frames = pending.frames;
        if state.pending.iter().all(|p| !p.frames) && frames {
            (self.listener)(Event::Doubt);
        }
        if state.pending.iter().filter(|p| p.frames == frames).count() < PENDING_MAX {
            state.pending.push(pending);
        }
    }

    /// A valid frame says that frames below `durable` were durable.
    fn evidence(&mut self, state: &mut State, durable: u64) {
        if state.pending.is_empty() {
            return;
        }
        let in_doubt = state.pending.iter().any(|p| p.frames);
        let findings = &mut *self.findings;
        let mut proven = false;
        state.pending.retain(|p| {
            if p.number < durable && !p.torn {
                proven = true;
                findings.damage(p.place.clone(), p.what.clone());
            }
            p.number >= durable || p.torn
        });
        state.damage |= proven;
        if in_doubt && state.pending.iter().all(|p| !p.frames) {
            (self.listener)(Event::Certain);
        }
    }
}

/// Said of a block that holds no frame of the log.
const NO_FRAME: &str = "is not there";

fn place(s: &Owned, block: u32) -> String {
    format!("segment {} block {block} (volume {}, log {})", s.segment, uuid::Uuid::from_bytes(s.volume), s.seq)
}

/// Whether the footer has a copy of it.
fn is_side(kind: DescriptorKind) -> bool {
    use DescriptorKind::*;
    !matches!(kind, Write | Zero | BeforeData | BeforeZero | BeforeUnreadable | Index)
}

/// Cuts descriptors apart and judges each by the rules of its kind.
fn parse(mut bytes: &[u8], payload_blocks: u32, stream: u8) -> Result<Vec<Descriptor<'_>>, String> {
    let mut list = Vec::new();
    while !bytes.is_empty() {
        let Ok((header, rest)) = DescriptorHeader::read_from_prefix(bytes) else {
            return Err("descriptor is cut short".into());
        };
        let extra_bytes = header.extra_bytes.get() as usize;
        let padded = extra_bytes.checked_next_multiple_of(8).map(|n| n.saturating_add(size_of::<DescriptorHeader>()));
        let (Some(extra), Some(raw)) = (rest.get(..extra_bytes), padded.and_then(|n| bytes.get(..n))) else {
            return Err("descriptor is cut short".into());
        };
        let Some(kind) = DescriptorKind::from_byte(header.kind) else {
            return Err(format!("descriptor of unknown kind {}", header.kind));
        };
        judge(kind, &header, extra, payload_blocks, stream).map_err(|what| format!("{kind:?} descriptor {what}"))?;
        list.push(Descriptor { kind, header, extra, raw });
        bytes = &bytes[raw.len()..];
    }
    Ok(list)
}

fn judge(
    kind: DescriptorKind,
    header: &DescriptorHeader,
    extra: &[u8],
    payload_blocks: u32,
    stream: u8,
) -> Result<(), &'static str> {
    use DescriptorKind::*;
    let (start, count) = (header.start.get(), header.count.get());
    let blocks = header.payload_blocks.get();
    if header.codec != 0 || header.flags != 0 {
        return Err("has an unknown codec or flag");
    }
    if header.payload_block.get().checked_add(blocks).is_none_or(|end| end > payload_blocks) {
        return Err("has payload outside its frame");
    }
    let before = matches!(kind, BeforeData | BeforeZero | BeforeUnreadable);
    if kind != Index && before != (stream == StreamKind::Before as u8) {
        return Err("is in a stream of the other kind");
    }
    let touched = match kind {
        Write | Zero | Discard | BeforeData | BeforeZero | BeforeUnreadable => {
            let Some(end) = start.checked_add(count) else { return Err("has an impossible range") };
            if count == 0 {
                return Err("has an empty range");
            }
            match kind {
                Write => end.div_ceil(SECTORS_PER_BLOCK) - start / SECTORS_PER_BLOCK,
                BeforeData => count,
                _ => 0,
            }
        }
        Index => count,
        _ => 0,
    };
    if touched != u64::from(blocks) {
        return Err("has an impossible number of payload blocks");
    }
    let extra_fits = match kind {
        Write | BeforeData | Index => extra.len() as u64 == touched * 4,
        Zero | Discard | BeforeZero | BeforeUnreadable | FlushPoint | Size => extra.is_empty(),
        Marker => header.sub <= 2 && std::str::from_utf8(extra).is_ok(),
        Revert => extra.len().is_multiple_of(16),
        Control => match ControlKind::from_byte(header.sub) {
            None => return Err("is of an unknown sub-kind"),
            Some(ControlKind::Settings) => extra.len() == size_of::<ControlSettings>(),
            Some(ControlKind::Log) => extra.len() == size_of::<ControlLog>(),
            Some(ControlKind::Revert) => extra.len() == size_of::<ControlRevert>(),
            Some(ControlKind::Hint) => extra.len() == 8,
            Some(ControlKind::LogGone | ControlKind::End) => extra.is_empty(),
        },
    };
    if extra_fits { Ok(()) } else { Err("has impossible extra bytes") }
}
