//! Questions about history that the journal answers when they are asked: flush points, reverts, the writes in their order, and what changed between
//! two instants.
//!
//! Nothing of this is kept in memory but a count per segment that was asked about. A full segment answers from its footer (the copy of its descriptors,
//! the run of its index); the last segment of a log, and one whose footer is not there yet, by the headers of its frames. Payloads are never read.

use std::collections::BTreeSet;
use std::rc::Rc;

use super::recover::{read_footer, read_header};
use super::{State, Volume};
use crate::buf::IoBuf;
use crate::disk::SegmentRef;
use crate::error::{Error, Result};
use crate::format::{self, DescriptorKind, EntryKind, IndexEntry, SegmentHeader, StreamKind};
use crate::frame::{self, Descriptor};
use crate::index::{Run, Touched};
use crate::info::{Change, ChangeKind, ChangeList, FlushNear, RevertPoint, RevertProgress};
use crate::log::{Log, ReadPin, SegmentCount};
use crate::signal::yield_now;
use crate::types::{BLOCK, Instant, SECTOR};

use super::history::CloseReason;

/// Blocks that a walk over frame headers reads at once: with small frames several headers lie in them.
const WALK_BLOCKS: u32 = 16;
/// Most changes of one answer.
const CHANGES_MAX: u32 = 10_000;

/// A log whose writes can be asked for. It may be evicted between two questions, so that a long query costs history and never the guest: whoever reads holds it for as long.
struct Part {
    log: Rc<Log>,
    segments: Vec<SegmentRef>,
    /// Frames below this have completed; `None`: all of them.
    completed: Option<u64>,
    /// Last write of a log that takes no more; behind it there is only what a crash cut off.
    io_last: Option<Instant>,
    /// First instant of the next log.
    end: Option<Instant>,
    /// It ends with a revert, at `end`.
    reverted: bool,
}

impl Part {
    fn of(log: &Rc<Log>, next: Option<&Rc<Log>>) -> Option<Self> {
        let state = log.state.borrow();
        if state.thin || !state.recording || state.gone {
            return None;
        }
        Some(Self {
            segments: state.writes.segments.clone(),
            completed: (!state.sealed).then_some(state.writes.frames_completed),
            io_last: state.closed.then_some(state.io_last),
            end: next.map(|n| n.start),
            reverted: next.is_some() && state.close_reason == CloseReason::Reverted as u32,
            log: Rc::clone(log),
        })
    }

    /// Whether its writes have left the history since.
    fn has_left(&self) -> bool {
        let state = self.log.state.borrow();
        state.thin || state.gone
    }

    /// Keeps its segments while they are read.
    fn hold(&self) -> Result<ReadPin> {
        held(&self.log, self.has_left())
    }

    /// What was found, or nothing where the log has left: the history is now without it.
    fn unless_left<T>(&self, found: Result<T>) -> Result<Option<T>> {
        match found {
            Err(_) if self.has_left() => Ok(None),
            found => found.map(Some),
        }
    }

    fn segment_blocks(&self) -> u32 {
        (self.log.disk.geometry.segment_size / BLOCK) as u32
    }

    /// The header of a segment; `None` where nothing of this log is written yet.
    async fn header(&self, i: usize) -> Result<Option<SegmentHeader>> {
        let _held = self.hold()?;
        let stream = (self.log.seq, self.log.id, StreamKind::Writes);
        read_header(&self.log.disk, self.log.volume, stream, self.segments[i]).await
    }

    /// Number of the first frame that belongs to a later segment, or is not complete.
    async fn limit(&self, i: usize) -> Result<Option<u64>> {
        for later in i + 1..self.segments.len() {
            if let Some(header) = self.header(later).await? {
                return Ok(Some(header.frame_first.get()));
            }
        }
        Ok(self.completed)
    }

    /// `instant_last` of the first frame of a segment; `None` where there is no frame.
    async fn first_instant(&self, i: usize) -> Result<Option<Instant>> {
        let _held = self.hold()?;
        let s = self.segments[i];
        let bytes = self.log.disk.read(s.segment, 1, 1).await?;
        Ok(frame::peek_frame(&bytes, self.log.id, s, 1).map(|h| Instant(h.instant_last.get())))
    }

    /// How many segments, from the first on, may hold something at or before an instant.
    async fn segments_upto(&self, at: Instant) -> Result<usize> {
        let (mut low, mut high) = (0, self.segments.len());
        while low < high {
            let middle = (low + high) / 2;
            match self.first_instant(middle).await? {
                Some(instant) if instant <= at => low = middle + 1,
                _ => high = middle,
            }
        }
        // The first frame of the next one may reach from before the instant to behind it.
        Ok((low + 1).min(self.segments.len()))
    }

    /// The segments that may hold something between two instants, both included.
    async fn segments_between(&self, from: Instant, to: Instant) -> Result<std::ops::Range<usize>> {
        let end = self.segments_upto(to).await?;
        let start = if from <= self.log.start { 0 } else { self.segments_upto(from.before()).await?.saturating_sub(2) };
        Ok(start.min(end)..end)
    }

    /// Calls `each` with the descriptors of a segment's frames, in order; payloads are skipped.
    async fn walk(&self, i: usize, limit: Option<u64>, mut each: impl FnMut(&Descriptor)) -> Result<()> {
        let _held = self.hold()?;
        let s = self.segments[i];
        let Some(header) = self.header(i).await? else { return Ok(()) };
        let blocks = self.segment_blocks();
        let mut number = header.frame_first.get();
        let mut previous = None;
        let (mut start, mut bytes) = (0u32, IoBuf::zeroed(0));
        let mut block = 1;
        while block < blocks && limit.is_none_or(|limit| number < limit) {
            let have = start + (bytes.len() as u64 / BLOCK) as u32;
            if block < start || block >= have {
                bytes = self.log.disk.read(s.segment, block, WALK_BLOCKS.min(blocks - block)).await?;
                start = block;
            }
            let here = |bytes: &IoBuf, start: u32| ((block - start) as usize * BLOCK as usize).min(bytes.len());
            let Some(head) = frame::peek_frame(&bytes[here(&bytes, start)..], self.log.id, s, block) else {
                break;
            };
            let header_blocks = u32::from(head.header_blocks.get());
            let total = header_blocks + head.payload_blocks.get();
            let have = start + (bytes.len() as u64 / BLOCK) as u32;
            if block + header_blocks > have {
                if block + header_blocks > blocks {
                    break;
                }
                bytes = self.log.disk.read(s.segment, block, header_blocks).await?;
                start = block;
            }
            if head.number.get() != number || previous.is_some_and(|p| p != head.previous_crc.get()) {
                break;
            }
            let Some(parsed) = frame::parse_frame(&bytes[here(&bytes, start)..], head) else { break };
            parsed.descriptors.iter().for_each(&mut each);
            previous = Some(head.crc.get());
            number += 1;
            block += total;
            yield_now().await;
        }
        if limit.is_some_and(|limit| number < limit) {
            return Err(frame::damaged("frame", &self.log.disk.path, s.segment, block));
        }
        Ok(())
    }

    /// The footer of a full segment, where it is the whole truth about it.
    async fn footer(&self, i: usize) -> Result<Option<(format::SegmentFooter, Vec<Descriptor>)>> {
        let _held = self.hold()?;
        if i + 1 == self.segments.len() {
            return Ok(None);
        }
        let found = read_footer(&self.log.disk, self.segments[i], self.log.id, self.segment_blocks()).await?;
        let Some((footer, side)) = found else { return Ok(None) };
        let limit = self.limit(i).await?;
        // Recovery may have cut frames off that the footer still counts.
        let whole = limit.is_none_or(|limit| footer.frame_next.get() <= limit)
            && self.header_after(i).await?.is_none_or(|first| first == footer.frame_next.get());
        Ok(whole.then_some((footer, side)))
    }

    async fn header_after(&self, i: usize) -> Result<Option<u64>> {
        Ok(self.header(i + 1).await?.map(|h| h.frame_first.get()))
    }

    /// Descriptors of a segment that are no data: markers, flush points, reverts.
    async fn side(&self, i: usize) -> Result<Vec<Descriptor>> {
        if let Some((_, side)) = self.footer(i).await? {
            return Ok(side);
        }
        let limit = self.limit(i).await?;
        let mut side = Vec::new();
        self.walk(i, limit, |d| {
            if matches!(d.kind, DescriptorKind::FlushPoint | DescriptorKind::Revert) {
                side.push(d.clone());
            }
        })
        .await?;
        Ok(side)
    }

    fn counts(&self, instant: Instant) -> bool {
        self.io_last.is_none_or(|last| instant <= last)
    }

    /// The instants of the writes of a segment, ascending, each once.
    async fn instants(&self, i: usize) -> Result<Vec<Instant>> {
        let _held = self.hold()?;
        let mut found = Vec::new();
        match self.footer(i).await? {
            Some((footer, _)) if footer.root.entries.get() == 0 => {}
            Some((footer, _)) => {
                let run = Run { root: footer.root, log_id: self.log.id, kind: StreamKind::Writes };
                run.for_each(&*self.log.disk, |entry| {
                    if is_write(entry) {
                        found.push(Instant(entry.instant.get()));
                    }
                })
                .await?;
            }
            None => {
                let limit = self.limit(i).await?;
                self.walk(i, limit, |d| {
                    if matches!(d.kind, DescriptorKind::Write | DescriptorKind::Zero) {
                        found.push(d.instant());
                    }
                })
                .await?;
            }
        }
        found.retain(|instant| self.counts(*instant));
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// How many writes a segment holds, and when; from memory where it was asked before.
    async fn count(&self, i: usize) -> Result<SegmentCount> {
        let number = self.segments[i].number;
        if let Some(count) = self.log.counts.borrow().get(&number) {
            return Ok(*count);
        }
        let instants = self.instants(i).await?;
        let count = SegmentCount {
            writes: instants.len() as u64,
            first: instants.first().copied().unwrap_or_default(),
            last: instants.last().copied().unwrap_or_default(),
        };
        // The last segment of an open log still grows.
        if i + 1 < self.segments.len() || self.completed.is_none() {
            self.log.counts.borrow_mut().insert(number, count);
        }
        Ok(count)
    }

    /// What the writes of some instants (ascending) were.
    async fn changes(&self, i: usize, instants: &[Instant]) -> Result<Vec<Change>> {
        let mut found = Vec::with_capacity(instants.len());
        let limit = self.limit(i).await?;
        self.walk(i, limit, |d| {
            let kind = match d.kind {
                DescriptorKind::Write => ChangeKind::Write,
                DescriptorKind::Zero => ChangeKind::Zero,
                _ => return,
            };
            if instants.binary_search(&d.instant()).is_ok() {
                let (offset, len) = (d.header.start.get() * SECTOR, d.header.count.get() * SECTOR);
                found.push(Change { instant: d.instant(), kind, offset, len });
            }
        })
        .await?;
        Ok(found)
    }
}

/// Keeps a log while it is read, unless what is read has left the history.
fn held(log: &Rc<Log>, has_left: bool) -> Result<ReadPin> {
    if has_left {
        return Err(Error::Gone(format!("log {} has left the history meanwhile", log.seq)));
    }
    Ok(log.pin())
}

fn is_write(entry: &IndexEntry) -> bool {
    matches!(entry.kind(), EntryKind::Write | EntryKind::Zero)
}

impl Volume {
    /// The logs that can be viewed, oldest to newest.
    fn parts(state: &State) -> Vec<Part> {
        let next = state.logs.iter().skip(1).map(Some).chain([None]);
        state.logs.iter().zip(next).filter_map(|(log, next)| Part::of(log, next)).collect()
    }

    /// Ends when every write at or before an instant is in the journal.
    pub(crate) async fn completed_up_to(self: &Rc<Self>, at: Instant) {
        self.kick.notify();
        self.changed
            .until(|| {
                let state = self.state.borrow();
                let pending = state.open.iter().any(|f| f.urgent) || !state.inflight.is_empty();
                (!pending || state.completed >= at || state.attach.is_none()).then_some(())
            })
            .await;
    }

    // -- flush points --------------------------------------------------------------------------------------------------

    /// The flush-clean instants next to an instant: a guest flush, and no write was in flight when it was acked. One at the instant itself counts as
    /// before it.
    pub async fn flush_near(self: &Rc<Self>, at: Instant) -> Result<FlushNear> {
        self.serving()?;
        let (parts, recent) = {
            let state = self.state.borrow();
            (Self::parts(&state), state.flushes.clone())
        };
        // What is in memory may not be in a frame that has completed; all else is on the disk.
        let covered =
            |instant: Instant| parts.iter().any(|p| p.log.start <= instant && p.end.is_none_or(|end| instant < end));
        let oldest = recent.front().map(|(instant, _)| *instant);
        let recent = recent.iter().filter(|(instant, clean)| *clean && covered(*instant)).map(|(instant, _)| *instant);
        let recent: BTreeSet<Instant> = recent.collect();
        let mut near = FlushNear {
            before: recent.range(..=at).next_back().copied(),
            after: recent.range(at.after()..).next().copied(),
        };
        // Memory has all of them from its first one on.
        let all_after = oldest.is_some_and(|oldest| oldest <= at);
        if all_after && near.before.is_some() {
            return Ok(near);
        }
        let clean = |d: &&Descriptor| d.kind == DescriptorKind::FlushPoint && d.header.count.get() == 1;
        'before: for part in parts.iter().rev().filter(|p| p.log.start <= at) {
            let Some(end) = part.unless_left(part.segments_upto(at).await)? else { continue };
            for i in (0..end).rev() {
                let Some(side) = part.unless_left(part.side(i).await)? else { break };
                let found = side.iter().filter(clean).map(Descriptor::instant).filter(|instant| *instant <= at).max();
                if found.is_some() {
                    near.before = near.before.max(found);
                    break 'before;
                }
            }
        }
        'after: for part in parts.iter().filter(|p| !all_after && p.end.is_none_or(|end| end > at)) {
            let start = match part.log.start <= at {
                true => {
                    part.unless_left(part.segments_between(at.after(), Instant::MAX).await)?.map(|these| these.start)
                }
                false => Some(0),
            };
            let Some(start) = start else { continue };
            for i in start..part.segments.len() {
                let Some(side) = part.unless_left(part.side(i).await)? else { break };
                let found = side.iter().filter(clean).map(Descriptor::instant).filter(|instant| *instant > at).min();
                if let Some(found) = found {
                    near.after = Some(near.after.map_or(found, |known| known.min(found)));
                    break 'after;
                }
            }
        }
        Ok(near)
    }

    /// Calls `each` with every flush point from `from` on and before `to`, in no order: its instant, and whether no write was in flight.
    pub(crate) async fn each_flush(
        self: &Rc<Self>,
        from: Instant,
        to: Instant,
        mut each: impl FnMut(Instant, bool),
    ) -> Result<()> {
        let (parts, recent) = {
            let state = self.state.borrow();
            (Self::parts(&state), state.flushes.clone())
        };
        let inside = |instant: &Instant| *instant >= from && *instant < to;
        let mut told: BTreeSet<Instant> = BTreeSet::new();
        for (instant, clean) in recent.iter().filter(|(instant, _)| inside(instant)) {
            told.insert(*instant);
            each(*instant, *clean);
        }
        for part in parts.iter().filter(|p| p.log.start < to && p.end.is_none_or(|end| end > from)) {
            let Some(segments) = part.unless_left(part.segments_between(from, to).await)? else { continue };
            for i in segments {
                let Some(side) = part.unless_left(part.side(i).await)? else { break };
                for d in side.iter().filter(|d| d.kind == DescriptorKind::FlushPoint) {
                    if inside(&d.instant()) && !told.contains(&d.instant()) {
                        each(d.instant(), d.header.count.get() == 1);
                    }
                }
            }
        }
        Ok(())
    }

    /// How far the pending revert is; of several the oldest.
    pub fn revert_progress(&self) -> Option<RevertProgress> {
        self.state.borrow().logs.iter().find_map(|l| {
            l.state.borrow().revert.as_ref().map(|r| RevertProgress {
                instant: r.instant,
                target: r.target,
                blocks_total: r.total,
                blocks_done: r.done,
            })
        })
    }

    // -- reverts -------------------------------------------------------------------------------------------------------

    /// The reverts that are part of the history, oldest to newest.
    pub async fn reverts(self: &Rc<Self>) -> Result<Vec<RevertPoint>> {
        self.serving()?;
        let (logs, parts) = {
            let state = self.state.borrow();
            (state.logs.iter().cloned().collect::<Vec<_>>(), Self::parts(&state))
        };
        let mut found = Vec::new();
        for pair in logs.windows(2) {
            let (closed, known, pending) = {
                let log = pair[0].state.borrow();
                (
                    log.close_reason == CloseReason::Reverted as u32,
                    log.reverted_to,
                    log.revert.as_ref().map(|r| r.target),
                )
            };
            if !closed {
                continue;
            }
            let mut target = pending.or(known);
            if let (None, Some(part)) = (target, parts.iter().find(|p| Rc::ptr_eq(&p.log, &pair[0]))) {
                // It is the last event of its log.
                for i in (0..part.segments.len()).rev() {
                    let Some(side) = part.unless_left(part.side(i).await)? else { break };
                    let revert =
                        side.iter().rfind(|d| d.kind == DescriptorKind::Revert && d.instant() == pair[1].start);
                    if let Some(revert) = revert {
                        target = Some(Instant(revert.header.start.get()));
                        break;
                    }
                }
            }
            pair[0].state.borrow_mut().reverted_to = target;
            found.push(RevertPoint { instant: pair[1].start, target });
        }
        Ok(found)
    }

    // -- writes in their order -----------------------------------------------------------------------------------------

    /// The changes behind `after` up to `upto`: how many there are, and those from number `skip` on, at most `limit`. Each write request is one (a large
    /// one that was split is several), and each revert.
    pub async fn changes(self: &Rc<Self>, after: Instant, upto: Instant, skip: u64, limit: u32) -> Result<ChangeList> {
        self.serving()?;
        if upto < after {
            return Err(Error::invalid("to", upto, format!("not before from ({after})")));
        }
        if limit > CHANGES_MAX {
            return Err(Error::invalid("limit", limit, format!("at most {CHANGES_MAX}")));
        }
        let now = self.engine()?.tick().await?;
        self.viewable(after, now)?;
        self.viewable(upto, now)?;
        self.completed_up_to(upto).await;
        // What came in meanwhile may have evicted it.
        self.viewable(after, now)?;
        let parts = {
            let state = self.state.borrow();
            let ends = state.logs.iter().skip(1).map(|l| l.start).chain([Instant::MAX]);
            for (log, end) in state.logs.iter().zip(ends).filter(|(l, end)| l.start <= upto && *end > after) {
                let inner = log.state.borrow();
                if log.start < upto && (inner.thin || !inner.recording) {
                    return Err(Error::State(format!(
                        "the writes from {} to {end} are not kept: choose instants on one side of that",
                        log.start
                    )));
                }
            }
            Self::parts(&state)
        };
        let wanted = skip..skip.saturating_add(u64::from(limit));
        let inside = |instant: Instant| instant > after && instant <= upto;
        let mut list = ChangeList { total: 0, changes: Vec::new() };
        for part in parts.iter().filter(|p| p.log.start <= upto && p.end.is_none_or(|end| end > after)) {
            for i in part.segments_between(after.after(), upto).await? {
                let count = part.count(i).await?;
                if count.writes == 0 || count.last <= after || count.first > upto {
                    continue;
                }
                let whole = inside(count.first) && inside(count.last);
                let meets = |writes: u64| list.total < wanted.end && list.total + writes > wanted.start;
                if whole && !meets(count.writes) {
                    list.total += count.writes;
                    continue;
                }
                let mut instants = part.instants(i).await?;
                instants.retain(|instant| inside(*instant));
                let writes = instants.len() as u64;
                if meets(writes) {
                    let from = wanted.start.saturating_sub(list.total).min(writes) as usize;
                    let to = wanted.end.saturating_sub(list.total).min(writes) as usize;
                    list.changes.append(&mut part.changes(i, &instants[from..to]).await?);
                }
                list.total += writes;
            }
            if let Some(end) = part.end.filter(|end| part.reverted && inside(*end)) {
                if wanted.contains(&list.total) {
                    list.changes.push(Change { instant: end, kind: ChangeKind::Revert, offset: 0, len: 0 });
                }
                list.total += 1;
            }
        }
        Ok(list)
    }

    // -- what changed --------------------------------------------------------------------------------------------------

    /// The blocks whose content may differ between two instants: those written behind `from` up to `to`, and those that a revert in between put back.
    pub async fn changed_between(self: &Rc<Self>, from: Instant, to: Instant) -> Result<Touched> {
        self.serving()?;
        if to < from {
            return Err(Error::invalid("to", to, format!("not before from ({from})")));
        }
        let now = self.engine()?.tick().await?;
        self.viewable(from, now)?;
        self.viewable(to, now)?;
        self.completed_up_to(to).await;
        // What came in meanwhile may have evicted it.
        self.viewable(from, now)?;
        let row: Vec<(Rc<Log>, Instant)> = {
            let state = self.state.borrow();
            let ends = state.logs.iter().skip(1).map(|l| l.start).chain([Instant::MAX]);
            let row = state.logs.iter().zip(ends).filter(|(l, end)| l.start <= to && *end > from);
            row.map(|(l, end)| (Rc::clone(l), end)).collect()
        };
        let mut changed = Touched::default();
        for (log, end) in row {
            // One at a time: the guest may need the room of the others.
            let _pin = held(&log, log.state.borrow().gone)?;
            let (whole, by_writes) = {
                let state = log.state.borrow();
                let reverted = state.close_reason == CloseReason::Reverted as u32 && end <= to;
                let inside = log.start > from && end <= to;
                // Of a thin log only the start can be `from`, and nothing of it comes before a `to` there.
                let whole = inside || (log.start < to && (reverted || state.thin || !state.recording));
                (whole, !whole && log.start < to)
            };
            if whole {
                self.add_touched(&log, &mut changed).await?;
            } else if by_writes {
                let (memory, runs) = {
                    let state = log.state.borrow();
                    (state.writes_index.in_memory(), state.writes_index.runs())
                };
                let mut add = |entry: &IndexEntry| {
                    let instant = Instant(entry.instant.get());
                    if is_write(entry) && instant > from && instant <= to {
                        changed.insert_range(entry.block.get(), entry.blocks());
                    }
                };
                for mem in memory {
                    mem.iter().for_each(&mut add);
                }
                for run in runs {
                    run.for_each(&*log.disk, &mut add).await?;
                }
            }
        }
        Ok(changed)
    }

    /// The blocks that may differ between an instant and the end of log `last`, or now.
    pub(super) async fn touched_since(self: &Rc<Self>, from: Instant, last: Option<u64>) -> Result<Touched> {
        let row: Vec<Rc<Log>> = {
            let state = self.state.borrow();
            let first = state.logs.iter().rposition(|l| l.start <= from).unwrap_or(0);
            state.logs.iter().skip(first).filter(|l| last.is_none_or(|last| l.seq <= last)).cloned().collect()
        };
        let mut changed = Touched::default();
        for log in row {
            let _pin = held(&log, log.state.borrow().gone)?;
            self.add_touched(&log, &mut changed).await?;
        }
        Ok(changed)
    }

    /// Adds every block that a log changed.
    async fn add_touched(&self, log: &Rc<Log>, changed: &mut Touched) -> Result<()> {
        let (memory, runs) = {
            let state = log.state.borrow();
            changed.union(&state.touched);
            if let Some(revert) = &state.revert {
                changed.union(&revert.left);
            }
            match &state.imaged {
                Some(imaged) => {
                    changed.union(imaged);
                    (Vec::new(), Vec::new())
                }
                None => (state.before_index.in_memory(), state.before_index.runs()),
            }
        };
        for mem in memory {
            for entry in mem.iter() {
                changed.insert_range(entry.block.get(), entry.blocks());
            }
        }
        for run in runs {
            run.for_each(&*log.disk, |entry| {
                changed.insert_range(entry.block.get(), entry.blocks());
            })
            .await?;
        }
        Ok(())
    }
}
