//! A log: one span of a volume's history, self-contained (design part 2). It owns two streams of segments, an index for each, the overlay of what
//! has not reached the primary, and the hints of discards.
//!
//! Each stream has one appender at a time: the volume's appender for the writes of the active log, the destager for before-images, and the sealer
//! (which is the destager) for the writes stream of a log that is closed.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use uuid::Uuid;

use crate::buf::{IoBuf, Slice};
use crate::disk::{Disk, Owner, SegmentRef};
use crate::error::{Error, Result};
use crate::format::{
    self, ControlLog, EntryKind, FrameHeader, IndexEntry, RunRoot, SegmentFooter, SegmentHeader, StreamKind, log_flags,
};
use crate::frame::{FrameBuilder, FramePoint, SealedFrame};
use crate::host::{Host, LocalFuture};
use crate::index::{self, Filter, MemIndex, PageSink, Run, RunBuilder, Source, Touched, layout_footer, pages_for};
use crate::mutation::{Mutation, active};
use crate::overlay::{ExtentMap, Overlay};
use crate::signal::{Signal, yield_now};
use crate::types::{BLOCK, Instant};

/// Blocks that one frame may carry at the most, for a segment size: 1 MiB, less on small segments.
pub fn frame_blocks_max(segment_size: u64) -> u32 {
    (segment_size / 4 / BLOCK).min(256) as u32
}

/// The last block of a segment at which its second frame may begin.
pub fn second_frame_at_most(segment_size: u64) -> u32 {
    1 + frame_blocks_max(segment_size) + u32::from(FrameHeader::HEADER_BLOCKS_MAX)
}

/// Bytes of a segment that appends can count on: what is left after header, footer and the gap before a frame that does not fit.
pub fn usable_bytes(segment_size: u64) -> u64 {
    let blocks = segment_size / BLOCK;
    let frame = u64::from(frame_blocks_max(segment_size)) + 33;
    (blocks - 2 - frame - blocks / 64).saturating_mul(BLOCK)
}

/// One source of a [`LogIndex`].
#[derive(Clone)]
enum Part {
    /// Of a full segment whose footer is being written.
    Frozen(u32, Rc<MemIndex>),
    /// On disk, with what it may hold where that is in memory: of a log that is not sealed.
    Run(Run, Option<Rc<Filter>>),
}

/// The index of a stream: what is in memory (the open segment), and runs, oldest first.
#[derive(Default)]
pub struct LogIndex {
    mem: MemIndex,
    parts: Vec<Part>,
}

impl LogIndex {
    /// Adds an entry of the open segment.
    pub fn insert(&mut self, entry: IndexEntry) {
        self.mem.insert(entry);
    }

    /// Adds an extent of the open segment.
    pub fn insert_extent(&mut self, kind: EntryKind, block: u64, count: u64, instant: Instant) {
        self.mem.insert_extent(kind, block, count, instant);
    }

    /// Adds a run that was found at recovery.
    pub fn push_run(&mut self, run: Run, filter: Option<Filter>) {
        if run.root.entries.get() > 0 {
            self.parts.push(Part::Run(run, filter.map(Rc::new)));
        }
    }

    /// What recovery read from frames of segments up to `number` stays apart: the footer of the next segment holds its own entries only.
    pub fn close_recovered(&mut self, number: u32) {
        if !self.mem.is_empty() {
            self.freeze(number);
        }
    }

    /// Replaces everything by one run.
    pub fn replace(&mut self, run: Option<Run>) {
        self.mem = MemIndex::default();
        self.parts = run.into_iter().map(|run| Part::Run(run, None)).collect();
    }

    /// Closes what is in memory as the index of segment `number` and answers it.
    fn freeze(&mut self, number: u32) -> Rc<MemIndex> {
        let mem = Rc::new(std::mem::take(&mut self.mem));
        self.parts.push(Part::Frozen(number, Rc::clone(&mem)));
        mem
    }

    /// The frozen index of segment `number` is on disk now.
    fn thaw(&mut self, number: u32, run: Run) {
        for part in &mut self.parts {
            if let Part::Frozen(n, mem) = part
                && *n == number
            {
                *part = Part::Run(run, Some(Rc::new(Filter::of(mem.iter()))));
                return;
            }
        }
    }

    /// Everything as sources of a merge, oldest first.
    fn sources(&self) -> Vec<Source> {
        let mut sources: Vec<Source> = self
            .parts
            .iter()
            .map(|part| match part {
                Part::Frozen(_, mem) => Source::Mem(Rc::clone(mem)),
                Part::Run(run, _) => Source::Run(*run),
            })
            .collect();
        if !self.mem.is_empty() {
            sources.push(Source::Mem(Rc::new(self.mem.clone())));
        }
        sources
    }

    /// The runs on disk, oldest first.
    pub fn runs(&self) -> Vec<Run> {
        self.parts
            .iter()
            .filter_map(|part| match part {
                Part::Run(run, _) => Some(*run),
                Part::Frozen(..) => None,
            })
            .collect()
    }

    /// The parts in memory, oldest first.
    pub fn in_memory(&self) -> Vec<Rc<MemIndex>> {
        let mut list: Vec<_> = self
            .parts
            .iter()
            .filter_map(|part| match part {
                Part::Frozen(_, mem) => Some(Rc::clone(mem)),
                Part::Run(..) => None,
            })
            .collect();
        if !self.mem.is_empty() {
            list.push(Rc::new(self.mem.clone()));
        }
        list
    }
}

/// Where a stream's next frame goes.
#[derive(Default)]
pub struct Stream {
    /// Its segments in order.
    pub segments: Vec<SegmentRef>,
    /// A segment taken ahead of need.
    pub spare: Option<SegmentRef>,
    /// A spare is being fetched.
    spare_running: bool,
    /// Next free block of the last segment; 0: its header is not written.
    position: u32,
    /// No frame is appended to the last segment any more (recovery cut it off, or it is full).
    finished: bool,
    /// Number of the next frame.
    pub frame_next: u64,
    /// `crc` of the last frame.
    pub previous_crc: u32,
    /// Frames below this completed, and are in the index.
    pub frames_completed: u64,
    /// What the frames from there on, which have their place, will add to the index, at the most.
    entries_placed: usize,
    /// Frames below this are durable.
    pub frames_durable: u64,
    /// Descriptors for the footer of the open segment.
    side: Vec<u8>,
    /// The number of the next segment.
    pub number_next: u32,
}

impl Stream {
    /// The stream goes on in a fresh segment after what recovery found.
    pub fn resume(segments: Vec<SegmentRef>, number_next: u32, frame_next: u64, previous_crc: u32) -> Self {
        Self {
            segments,
            number_next,
            frame_next,
            previous_crc,
            frames_completed: frame_next,
            finished: true,
            ..Self::default()
        }
    }

    /// Segments that it holds, the spare too.
    pub fn segment_count(&self) -> u64 {
        self.segments.len() as u64 + u64::from(self.spare.is_some()) + u64::from(self.spare_running)
    }
}

/// A revert that closed this log and is not copied yet.
pub struct PendingRevert {
    /// When.
    pub instant: Instant,
    /// Back to.
    pub target: Instant,
    /// Blocks not copied yet.
    pub left: Touched,
    /// Blocks in total.
    pub total: u64,
    /// Blocks copied.
    pub done: u64,
    /// Everything below is copied.
    pub next_block: u64,
}

/// What changes in a log.
pub struct LogState {
    /// Its instants can be viewed.
    pub recording: bool,
    /// No more guest writes.
    pub closed: bool,
    /// All on the primary, index merged.
    pub sealed: bool,
    /// Writes dropped.
    pub thin: bool,
    /// Evicted or cleaned: nothing may start to read it.
    pub gone: bool,
    /// Why it was closed.
    pub close_reason: u32,
    /// First write.
    pub io_start: Instant,
    /// Last write.
    pub io_last: Instant,
    /// Writes stream.
    pub writes: Stream,
    /// Before-image stream.
    pub before: Stream,
    /// Index of the writes.
    pub writes_index: LogIndex,
    /// Index of the before-images.
    pub before_index: LogIndex,
    /// Blocks with a write here. Empty once sealed.
    pub touched: Touched,
    /// Blocks with a before-image here; `None`: not in memory (sealed logs only), the index tells.
    pub imaged: Option<Touched>,
    /// Not on the primary yet.
    pub overlay: Overlay,
    /// Discarded here and not written since.
    pub hints: ExtentMap,
    /// The revert that closed it.
    pub revert: Option<PendingRevert>,
    /// Blocks of that revert are lost: of those nothing that was written here, or before, counts any more.
    pub revert_lost: bool,
    /// Target of the revert that closed it, once it was asked for.
    pub reverted_to: Option<Instant>,
    /// Bytes charged to it.
    pub charged: u64,
    /// Bytes admitted for the writes stream and not framed yet.
    pub unframed: u64,
    /// Guest frames of it that have not completed.
    pub frames_pending: u64,
    /// Roots once sealed.
    pub writes_root: RunRoot,
    /// See `writes_root`.
    pub before_root: RunRoot,
}

/// How many writes a segment holds.
#[derive(Clone, Copy, Debug)]
pub struct SegmentCount {
    /// Number of writes.
    pub writes: u64,
    /// First of them.
    pub first: Instant,
    /// Last of them.
    pub last: Instant,
}

/// Bytes of index that the logs of a volume have appended beside the frames that carry payload: indexes and footers of full segments, merged runs.
#[derive(Default)]
pub struct IndexBytes {
    /// In the streams of writes.
    pub writes: Cell<u64>,
    /// In the streams of before-images.
    pub before: Cell<u64>,
}

impl IndexBytes {
    fn add(&self, kind: StreamKind, bytes: u64) {
        let sum = match kind {
            StreamKind::Writes => &self.writes,
            StreamKind::Before => &self.before,
        };
        sum.set(sum.get() + bytes);
    }
}

/// See the module's text.
pub struct Log {
    /// Seq, never used twice.
    pub seq: u64,
    /// Random id.
    pub id: u64,
    /// First instant.
    pub start: Instant,
    /// Volume.
    pub volume: Uuid,
    /// Its CDP disk.
    pub disk: Rc<Disk>,
    /// What changes.
    pub state: RefCell<LogState>,
    /// Reads under way that may touch its segments: each holds the newest epoch of when it began. The first one's number beside.
    epochs: RefCell<(u64, VecDeque<Rc<()>>)>,
    index_bytes: Rc<IndexBytes>,
    /// Counts of full segments of writes that were asked for, by number.
    pub counts: RefCell<BTreeMap<u32, SegmentCount>>,
    changed: Signal,
}

/// Keeps the segments of a log from being reused while it lives.
pub struct ReadPin {
    log: Rc<Log>,
    epoch: Rc<()>,
}

impl Drop for ReadPin {
    fn drop(&mut self) {
        // The last one of its epoch, which the log holds, too.
        if Rc::strong_count(&self.epoch) == 2 {
            self.log.changed.notify();
        }
    }
}

/// What the volume says in each frame header.
#[derive(Clone, Copy, Debug, Default)]
pub struct VolumePoint {
    /// Newest instant so far.
    pub instant_last: Instant,
    /// Durable point.
    pub durable: Instant,
    /// Destage watermark.
    pub watermark: Instant,
}

/// A frame that has its place in a stream.
pub struct Placed {
    kind: StreamKind,
    segment: u32,
    /// First block of the write: the frame's, or the segment's header before it.
    first: u32,
    /// First block of the frame.
    block: u32,
    bytes: u64,
    /// What it adds to the index, at the most.
    entries: usize,
    sealed: SealedFrame,
}

/// What an append did.
pub struct Appended {
    /// Segment that holds the frame.
    pub segment: u32,
    /// First block of its payload.
    pub payload_at: u32,
    /// Bytes written.
    pub bytes: u64,
}

impl Log {
    /// A new, empty log. What it appends of indexes is added to `index_bytes`.
    pub fn new(
        seq: u64,
        id: u64,
        start: Instant,
        volume: Uuid,
        disk: Rc<Disk>,
        recording: bool,
        index_bytes: Rc<IndexBytes>,
    ) -> Rc<Self> {
        Rc::new(Self {
            seq,
            id,
            start,
            volume,
            disk,
            state: RefCell::new(LogState {
                recording,
                closed: false,
                sealed: false,
                thin: false,
                gone: false,
                close_reason: 0,
                io_start: Instant::ZERO,
                io_last: Instant::ZERO,
                writes: Stream::default(),
                before: Stream::default(),
                writes_index: LogIndex::default(),
                before_index: LogIndex::default(),
                touched: Touched::default(),
                imaged: Some(Touched::default()),
                overlay: Overlay::default(),
                hints: ExtentMap::default(),
                revert: None,
                revert_lost: false,
                reverted_to: None,
                charged: 0,
                unframed: 0,
                frames_pending: 0,
                writes_root: RunRoot::default(),
                before_root: RunRoot::default(),
            }),
            epochs: RefCell::new((0, VecDeque::from([Rc::default()]))),
            index_bytes,
            counts: RefCell::default(),
            changed: Signal::default(),
        })
    }

    /// Segments are not reused while the pin lives.
    pub fn pin(self: &Rc<Self>) -> ReadPin {
        let epoch = Rc::clone(self.epochs.borrow().1.back().expect("there is always one"));
        ReadPin { log: Rc::clone(self), epoch }
    }

    /// Ends when no read goes on that has begun before now. Later ones must know that segments are being freed, or they would be waited for for ever.
    pub async fn until_unread(&self) {
        let mine = {
            let (first, epochs) = &mut *self.epochs.borrow_mut();
            epochs.push_back(Rc::default());
            *first + epochs.len() as u64 - 1
        };
        let unread = || {
            let (first, epochs) = &mut *self.epochs.borrow_mut();
            while *first < mine && epochs.front().is_some_and(|epoch| Rc::strong_count(epoch) == 1) {
                epochs.pop_front();
                *first += 1;
            }
            (*first >= mine).then_some(())
        };
        self.changed.until(unread).await;
    }

    /// Segments that it holds.
    pub fn segment_count(&self) -> u64 {
        let state = self.state.borrow();
        state.writes.segment_count() + state.before.segment_count()
    }

    /// An upper bound of the segments that it holds or will need until it is sealed (a pending revert's copies not counted). For a sealed log what it
    /// holds.
    pub fn segments_bound(&self) -> u64 {
        let state = self.state.borrow();
        if active(Mutation::BeforeImagesUncounted) {
            return state.writes.segment_count() + 1;
        }
        if state.sealed {
            return state.writes.segment_count() + state.before.segment_count();
        }
        let usable = usable_bytes(self.disk.geometry.segment_size);
        let touched = state.touched.len();
        let imaged = state.imaged.as_ref().map_or(0, Touched::len);
        // The merged run of a stream costs 33 bytes an entry; its entries are at most the blocks written.
        let run = |bytes: u64| (bytes / BLOCK + 1) * 40;
        let writes_more = state.unframed + run(state.charged);
        let before_more = touched.saturating_sub(imaged) * (BLOCK + 64) + run(touched * BLOCK);
        let more = |stream: &Stream, bytes: u64| stream.segment_count() + bytes.div_ceil(usable) + 1;
        more(&state.writes, writes_more) + more(&state.before, before_more)
    }

    fn stream(state: &mut LogState, kind: StreamKind) -> (&mut Stream, &mut LogIndex) {
        match kind {
            StreamKind::Writes => (&mut state.writes, &mut state.writes_index),
            StreamKind::Before => (&mut state.before, &mut state.before_index),
        }
    }

    fn owner(&self, kind: StreamKind) -> Owner {
        Owner { volume: self.volume, log_seq: self.seq, log_id: self.id, kind }
    }

    /// Appends a frame to a stream and indexes it. When this ends the frame has completed on the device (it is not yet durable). One appender at a time
    /// for each stream. On an error the disk has failed or the pool is empty; nothing was indexed.
    pub async fn append(
        self: &Rc<Self>,
        host: &Rc<dyn Host>,
        kind: StreamKind,
        frame: FrameBuilder,
        point: VolumePoint,
    ) -> Result<Appended> {
        let mut placed = self.place(host, kind, frame, point).await?;
        self.write_placed(&mut placed).await?;
        Ok(self.complete(host, placed))
    }

    /// Gives a frame its place, behind all that have one. The frames of a stream are placed one after the other and may then be on their way to the disk side
    /// by side: the chain of checksums does not need the one before to have arrived. No frame is lost track of by that: a start cuts the stream at the first one that
    /// is missing. A full segment ends only when all of its frames have completed, since its index names them.
    pub async fn place(
        self: &Rc<Self>,
        host: &Rc<dyn Host>,
        kind: StreamKind,
        frame: FrameBuilder,
        point: VolumePoint,
    ) -> Result<Placed> {
        let segment_blocks = (self.disk.geometry.segment_size / BLOCK) as u32;
        // Blocks of a footer for so many entries, with a copy of so many bytes of control records.
        let footer = |entries: usize, side: usize| (pages_for(entries) + side.div_ceil(BLOCK as usize) + 1) as u32;
        let alone = 1 + frame.blocks() + footer(frame.entry_count(), frame.side_bytes());
        if alone > segment_blocks {
            // It would fit no segment, however many were taken for it.
            let needed = u64::from(alone) * BLOCK;
            return Err(Error::NoSpace { what: "frame", needed, free: self.disk.geometry.segment_size });
        }
        loop {
            // Does it fit the open segment? What the footer will need is kept free.
            let full = {
                let mut state = self.state.borrow_mut();
                let (stream, index) = Self::stream(&mut state, kind);
                let entries = index.mem.len() + stream.entries_placed + frame.entry_count();
                let footer = footer(entries, stream.side.len() + frame.side_bytes());
                let position = stream.position.max(1);
                if stream.segments.is_empty() || stream.finished {
                    None
                } else if position + frame.blocks() + footer <= segment_blocks {
                    break;
                } else {
                    Some(position)
                }
            };
            if let Some(position) = full {
                let completed = self.changed.until(|| {
                    let mut state = self.state.borrow_mut();
                    let (stream, _) = Self::stream(&mut state, kind);
                    (stream.frames_completed == stream.frame_next).then_some(())
                });
                self.disk.unless_failed(completed).await?;
                self.finish_segment(host, kind, position, point);
            }
            self.next_segment(kind).await?;
        }
        let mut state = self.state.borrow_mut();
        let durable_frames_other = match kind {
            StreamKind::Writes => state.before.frames_durable,
            StreamKind::Before => state.writes.frames_durable,
        };
        let (stream, _) = Self::stream(&mut state, kind);
        let place = *stream.segments.last().expect("a segment was just ensured");
        let fresh = stream.position == 0;
        let block = stream.position.max(1);
        let entries = frame.entry_count();
        let mut sealed = frame.seal(FramePoint {
            log_id: self.id,
            number: stream.frame_next,
            previous_crc: stream.previous_crc,
            segment: place.segment,
            lap: place.lap,
            block,
            instant_last: point.instant_last,
            durable: point.durable,
            watermark: point.watermark,
            durable_frames: stream.frames_durable,
            durable_frames_other,
        });
        if fresh {
            // The segment's header and its first frame are one write.
            sealed.parts.insert(0, segment_header(self, kind, place, stream));
        }
        stream.position = block + sealed.blocks;
        stream.frame_next += 1;
        stream.previous_crc = sealed.crc;
        stream.side.append(&mut sealed.side);
        stream.entries_placed += entries;
        let bytes = sealed.parts.iter().map(|p| p.len() as u64).sum();
        Ok(Placed { kind, segment: place.segment, first: if fresh { 0 } else { block }, block, bytes, entries, sealed })
    }

    /// Sends a placed frame to the disk; ends when it has completed there.
    pub async fn write_placed(&self, placed: &mut Placed) -> Result<()> {
        let parts = std::mem::take(&mut placed.sealed.parts);
        self.disk.write(placed.segment, placed.first, parts).await
    }

    /// Indexes a frame that has completed. Called in the order in which frames were placed: whoever counts them takes all earlier ones for completed.
    pub fn complete(self: &Rc<Self>, host: &Rc<dyn Host>, placed: Placed) -> Appended {
        let segment_blocks = (self.disk.geometry.segment_size / BLOCK) as u32;
        let Placed { kind, segment, block, bytes, entries, sealed, .. } = placed;
        let wants_spare = {
            let mut state = self.state.borrow_mut();
            let (stream, index) = Self::stream(&mut state, kind);
            stream.frames_completed += 1;
            stream.entries_placed -= entries;
            for entry in &sealed.entries {
                index.insert(*entry);
            }
            for (entry_kind, start, count, instant) in &sealed.extents {
                index.insert_extent(*entry_kind, *start, *count, *instant);
            }
            stream.spare.is_none() && !stream.spare_running && stream.position > segment_blocks / 2
        };
        if wants_spare && kind == StreamKind::Writes {
            self.fetch_spare(host, kind);
        }
        self.changed.notify();
        Appended { segment, payload_at: block + sealed.header_blocks, bytes }
    }

    /// Takes the next segment for a stream: the spare when there is one.
    async fn next_segment(self: &Rc<Self>, kind: StreamKind) -> Result<()> {
        self.changed
            .until(|| {
                let mut state = self.state.borrow_mut();
                (!Self::stream(&mut state, kind).0.spare_running).then_some(())
            })
            .await;
        let (spare, number) = {
            let mut state = self.state.borrow_mut();
            let (stream, _) = Self::stream(&mut state, kind);
            (stream.spare.take(), stream.number_next)
        };
        let place = match spare {
            Some(place) => place,
            None => self.disk.allocate(self.owner(kind), number).await?,
        };
        let mut state = self.state.borrow_mut();
        let (stream, _) = Self::stream(&mut state, kind);
        stream.segments.push(place);
        stream.number_next = number + 1;
        stream.position = 0;
        stream.finished = false;
        stream.side.clear();
        Ok(())
    }

    /// Fetches a segment ahead of need, so that the append that needs it does not wait for the table.
    fn fetch_spare(self: &Rc<Self>, host: &Rc<dyn Host>, kind: StreamKind) {
        let number = {
            let mut state = self.state.borrow_mut();
            if state.closed {
                return;
            }
            let (stream, _) = Self::stream(&mut state, kind);
            stream.spare_running = true;
            stream.number_next
        };
        let log = Rc::clone(self);
        host.spawn(Box::pin(async move {
            let spare = log.disk.allocate(log.owner(kind), number).await;
            {
                let mut state = log.state.borrow_mut();
                let (stream, _) = Self::stream(&mut state, kind);
                stream.spare_running = false;
                // An empty pool is found again by the append that needs the segment.
                stream.spare = spare.ok();
            }
            log.changed.notify();
        }));
    }

    /// The open segment is full: its index goes to its end, behind the appends.
    fn finish_segment(self: &Rc<Self>, host: &Rc<dyn Host>, kind: StreamKind, position: u32, point: VolumePoint) {
        let segment_blocks = (self.disk.geometry.segment_size / BLOCK) as u32;
        let (place, writes) = {
            let mut state = self.state.borrow_mut();
            let (stream, index) = Self::stream(&mut state, kind);
            stream.finished = true;
            let place = *stream.segments.last().expect("a full segment is a segment");
            let mem = index.freeze(place.number);
            let (pages, root) = layout_footer(&mem, self.id, kind, place.segment, position);
            let descriptors_at = position + pages.len() as u32;
            let side = std::mem::take(&mut stream.side);
            let mut parts: Vec<Slice> = pages.into_iter().map(IoBuf::share).collect();
            if !side.is_empty() {
                let mut buf = IoBuf::zeroed(side.len().next_multiple_of(BLOCK as usize));
                buf[..side.len()].copy_from_slice(&side);
                parts.push(buf.share());
            }
            let footer = SegmentFooter {
                magic: SegmentFooter::MAGIC,
                crc: 0.into(),
                version: format::VERSION.into(),
                flags: 0.into(),
                log_id: self.id.into(),
                lap: place.lap.into(),
                segment: place.segment.into(),
                descriptors_at: descriptors_at.into(),
                descriptor_bytes: (side.len() as u32).into(),
                descriptor_crc: format::crc(&side).into(),
                frames_end: position.into(),
                last_crc: stream.previous_crc.into(),
                frame_next: stream.frame_next.into(),
                instant_last: point.instant_last.0.into(),
                durable: point.durable.0.into(),
                watermark: point.watermark.0.into(),
                root,
                reserved: [0; 8],
            };
            let footer = IoBuf::copy_of(&format::sealed_block(&footer, 8)).share();
            (place, (parts, footer, root))
        };
        // Until these are written the segment may get no other owner.
        let (log, pin) = (Rc::clone(self), self.pin());
        host.spawn(Box::pin(async move {
            let _pin = pin;
            let (parts, footer, root) = writes;
            let bytes = parts.iter().map(|part| part.len() as u64).sum::<u64>() + BLOCK;
            if !parts.is_empty() && log.disk.write(place.segment, position, parts).await.is_err() {
                return;
            }
            if log.disk.write(place.segment, segment_blocks - 1, vec![footer]).await.is_err() {
                return;
            }
            log.index_bytes.add(kind, bytes);
            let mut state = log.state.borrow_mut();
            let (_, index) = Self::stream(&mut state, kind);
            index.thaw(place.number, Run { root, log_id: log.id, kind });
        }));
    }

    /// Looks up the newest versions of a block at or before `upto` among the writes.
    pub async fn lookup_writes(
        &self,
        block: u64,
        upto: Instant,
        missing: &mut u8,
        out: &mut Vec<IndexEntry>,
    ) -> Result<()> {
        self.lookup(StreamKind::Writes, block, upto, missing, out).await
    }

    /// Looks up the before-image of a block.
    pub async fn lookup_before(&self, block: u64, missing: &mut u8, out: &mut Vec<IndexEntry>) -> Result<()> {
        let imaged = self.state.borrow().imaged.as_ref().map(|set| set.contains(block));
        if imaged == Some(false) {
            return Ok(());
        }
        self.lookup(StreamKind::Before, block, Instant::MAX, missing, out).await
    }

    /// Whether the block has a before-image here, as far as memory tells without a read.
    pub fn imaged(&self, block: u64) -> Option<bool> {
        self.state.borrow().imaged.as_ref().map(|set| set.contains(block))
    }

    async fn lookup(
        &self,
        kind: StreamKind,
        block: u64,
        upto: Instant,
        missing: &mut u8,
        out: &mut Vec<IndexEntry>,
    ) -> Result<()> {
        // What is in memory is looked up, and the list of runs is taken, in one step: nothing moves between them meanwhile.
        let runs = {
            let state = self.state.borrow();
            let index = match kind {
                StreamKind::Writes => &state.writes_index,
                StreamKind::Before => &state.before_index,
            };
            index.mem.lookup(block, upto, missing, out);
            let mut older = Vec::new();
            for part in index.parts.iter().rev() {
                if *missing == 0 {
                    return Ok(());
                }
                match part {
                    // In-memory parts newer than every run are searched at once, others in their turn.
                    Part::Frozen(_, mem) if older.is_empty() => mem.lookup(block, upto, missing, out),
                    Part::Run(_, Some(filter)) if !filter.may_hold(block, upto) => {}
                    other => older.push(other.clone()),
                }
            }
            older
        };
        for part in runs {
            if *missing == 0 {
                break;
            }
            match part {
                Part::Frozen(_, mem) => mem.lookup(block, upto, missing, out),
                Part::Run(run, _) => run.lookup(&*self.disk, block, upto, missing, out).await?,
            }
        }
        Ok(())
    }

    /// Merges a stream's index into one run, appended to the stream. The stream has no other appender any more.
    pub async fn merge_index(
        self: &Rc<Self>,
        host: &Rc<dyn Host>,
        kind: StreamKind,
        point: VolumePoint,
    ) -> Result<RunRoot> {
        let sources = {
            let mut state = self.state.borrow_mut();
            Self::stream(&mut state, kind).1.sources()
        };
        if sources.is_empty() {
            return Ok(RunRoot::default());
        }
        if let [Source::Run(run)] = &sources[..] {
            return Ok(run.root);
        }
        let mut sink = StreamSink { log: Rc::clone(self), host: Rc::clone(host), kind, point };
        let builder = RunBuilder::new(self.id, kind);
        let root = index::merge(sources, builder, &mut sink, &*self.disk, &|| -> LocalFuture<'static, ()> {
            Box::pin(yield_now())
        })
        .await?;
        Ok(root)
    }

    /// Gives spare segments back.
    pub async fn release_spares(&self) -> Result<()> {
        self.changed
            .until(|| {
                let state = self.state.borrow();
                (!state.writes.spare_running && !state.before.spare_running).then_some(())
            })
            .await;
        let spares: Vec<_> = {
            let mut state = self.state.borrow_mut();
            [state.writes.spare.take(), state.before.spare.take()].into_iter().flatten().collect()
        };
        self.disk.release(&spares).await
    }

    /// Its row among the control records.
    pub fn row(&self) -> ControlLog {
        let state = self.state.borrow();
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        ControlLog {
            seq: self.seq.into(),
            id: self.id.into(),
            start: self.start.0.into(),
            io_start: state.io_start.0.into(),
            io_last: state.io_last.0.into(),
            flags: (flag(state.recording, log_flags::RECORDING)
                | flag(state.closed, log_flags::CLOSED)
                | flag(state.sealed, log_flags::SEALED)
                | flag(state.thin, log_flags::THIN))
            .into(),
            close_reason: state.close_reason.into(),
            disk_id: *self.disk.id.as_bytes(),
            writes_root: state.writes_root,
            before_root: state.before_root,
        }
    }
}

fn segment_header(log: &Log, kind: StreamKind, place: SegmentRef, stream: &Stream) -> Slice {
    let header = SegmentHeader {
        magic: SegmentHeader::MAGIC,
        crc: 0.into(),
        version: format::VERSION.into(),
        flags: 0.into(),
        disk_id: *log.disk.id.as_bytes(),
        volume_id: *log.volume.as_bytes(),
        log_id: log.id.into(),
        log_seq: log.seq.into(),
        segment: place.segment.into(),
        number: place.number.into(),
        lap: place.lap.into(),
        frame_first: stream.frame_next.into(),
        previous_crc: stream.previous_crc.into(),
        kind: kind as u8,
        reserved: [0; 35],
    };
    IoBuf::copy_of(&format::sealed_block(&header, 8)).share()
}

/// Appends index pages to a log's own stream.
struct StreamSink {
    log: Rc<Log>,
    host: Rc<dyn Host>,
    kind: StreamKind,
    point: VolumePoint,
}

impl PageSink for StreamSink {
    fn append(&mut self, pages: Vec<IoBuf>) -> LocalFuture<'_, Result<Vec<(u32, u32)>>> {
        Box::pin(async move {
            let count = pages.len() as u32;
            let mut frame = FrameBuilder::default();
            let base = frame.push_index(pages.into_iter().map(IoBuf::share).collect());
            let at = self.log.append(&self.host, self.kind, frame, self.point).await?;
            self.log.index_bytes.add(self.kind, at.bytes);
            Ok((0..count).map(|i| (at.segment, at.payload_at + base + i)).collect())
        })
    }
}
