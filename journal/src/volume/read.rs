//! Reads: the live state, and the state at any instant (design part 2, the four rules).
//!
//! A block is resolved to layers, newest first, each giving some of its sectors: a piece of the journal, bytes in memory, zeroes, an error, or the
//! primary. What comes from the primary is checked again after the read (invariant I6): when a before-image of the block came in between, the block is
//! resolved anew.

use std::rc::Rc;

use futures::future::join_all;

use super::{Mode, State, Volume, blocks_of, whole_mask};
use crate::buf::{IoBuf, Slice};
use crate::engine::BlockStatus;
use crate::error::{Error, Result};
use crate::format::{EntryKind, IndexEntry, crc};
use crate::frame::damaged;
use crate::host::LocalFuture;
use crate::log::{Log, ReadPin};
use crate::mutation::{Mutation, active};
use crate::overlay::{Content, copy_sectors};
use crate::types::{BLOCK, Instant};

/// Bytes that one step of a long read works on.
const STEP: u64 = 1 << 20;
/// Most blocks that one status request resolves.
const STATUS_BLOCKS: u64 = 16384;
/// How deep reverts of reverts may nest while none of them is copied.
pub(crate) const REVERT_DEPTH: u32 = 64;

/// Which state is read.
#[derive(Clone)]
pub(crate) enum Point {
    /// The newest.
    Live,
    /// As of an instant, which lies in this log.
    At(Instant, Rc<Log>),
}

/// Where some sectors of a block come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Zero,
    Memory(Slice),
    Journal {
        log: usize,
        segment: u32,
        page: u32,
        crc: u32,
    },
    Unreadable,
    Lost,
    /// Right as long as no log from this seq on has a before-image of the block (I6); `None`: whatever comes in between is concurrent.
    Primary {
        unless_imaged_from: Option<u64>,
    },
}

/// Some sectors of a block.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub mask: u8,
    pub source: Source,
}

/// The layers of one block; together they give all eight sectors.
type Layers = Vec<Layer>;

/// The row of logs as a read sees it, pinned: segments are not reused while it lives.
pub(crate) struct Row {
    logs: Vec<Rc<Log>>,
    /// The logs of it that were not sealed when it was taken: in these, and in later ones, before-images may come in.
    unsealed: Vec<u64>,
    _pins: Vec<ReadPin>,
}

impl Row {
    fn of(state: &State) -> Self {
        let logs: Vec<_> = state.logs.iter().cloned().collect();
        let unsealed = logs.iter().filter(|l| !l.state.borrow().sealed).map(|l| l.seq).collect();
        let _pins = logs.iter().map(|l| l.pin()).collect();
        Self { logs, unsealed, _pins }
    }

    fn position(&self, log: &Rc<Log>) -> Option<usize> {
        self.logs.iter().position(|l| Rc::ptr_eq(l, log))
    }

    fn at(&self, instant: Instant) -> Option<usize> {
        self.logs.iter().rposition(|l| l.start <= instant)
    }
}

impl Volume {
    /// A guest read.
    pub(crate) async fn read(self: &Rc<Self>, offset: u64, len: u32) -> Result<Vec<Slice>> {
        self.check_range(offset, u64::from(len))?;
        let started = self.host.boot_ns();
        let result = self.read_live(offset, u64::from(len)).await;
        let mut stats = self.stats.borrow_mut();
        match &result {
            Ok(_) => {
                stats.reads += 1;
                stats.read_bytes += u64::from(len);
                stats.read_latency.record(self.host.boot_ns().saturating_sub(started));
            }
            Err(_) => stats.errors += 1,
        }
        result
    }

    async fn read_live(self: &Rc<Self>, offset: u64, len: u64) -> Result<Vec<Slice>> {
        self.serving()?;
        if !self.live_needs_layers(offset, len) {
            return Ok(vec![self.read_primary(offset, len).await?]);
        }
        self.of_live(async || self.read_at(&Point::Live, offset, len).await).await
    }

    /// What is asked of the newest state. A CDP disk that fails meanwhile is no business of the guest's: the answer is what is there once that disk has been left.
    async fn of_live<T>(self: &Rc<Self>, ask: impl AsyncFn() -> Result<T>) -> Result<T> {
        loop {
            let error = match ask().await {
                Err(error @ (Error::Gone(_) | Error::Device { .. })) => error,
                result => return result,
            };
            if !self.state.borrow().disk_failed() {
                return Err(error);
            }
            self.until_left().await?;
            self.serving()?;
        }
    }

    /// Whether anything but the primary may have a say in the range.
    fn live_needs_layers(&self, offset: u64, len: u64) -> bool {
        let (first, count) = blocks_of(offset, len);
        let state = self.state.borrow();
        if state.lost_blocks.is_some() {
            return true;
        }
        state.mode != Mode::Direct
            && state.logs.iter().rev().take_while(|l| !l.state.borrow().sealed).any(|l| {
                let log = l.state.borrow();
                log.revert.is_some() || log.overlay.intersects(first, count)
            })
    }

    async fn read_primary(&self, offset: u64, len: u64) -> Result<Slice> {
        let (result, buf) = self.primary.read(offset, IoBuf::for_overwrite(len as usize)).await;
        result.map_err(|e| Error::device("read", self.path(), &e))?;
        Ok(buf.share())
    }

    /// The state at a point, in parts that together are exactly the range.
    pub(crate) async fn read_at(self: &Rc<Self>, point: &Point, offset: u64, len: u64) -> Result<Vec<Slice>> {
        let mut parts = Vec::with_capacity(len.div_ceil(STEP) as usize);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let step_end = end.min(at - at % STEP + STEP);
            parts.push(self.read_step(point, at, step_end - at).await?);
            at = step_end;
        }
        Ok(parts)
    }

    async fn read_step(self: &Rc<Self>, point: &Point, offset: u64, len: u64) -> Result<Slice> {
        let (first, count) = blocks_of(offset, len);
        let skip = (offset - first * BLOCK) as usize;
        let mut buf = None;
        let mut todo: Vec<u64> = (first..first + count).collect();
        // Each round reads what was resolved; blocks whose before-image came in between go into the next round. A before-image is taken once in a
        // log, so the rounds end.
        while !todo.is_empty() {
            let row = Row::of(&self.state.borrow());
            let epoch = self.image_epoch.get();
            let mut resolved = Vec::with_capacity(todo.len());
            for block in &todo {
                resolved.push((*block, self.resolve(point, &row, *block).await?));
            }
            // What lies in one piece is answered as it was read.
            let whole = if buf.is_none() { self.read_whole(&row, &resolved).await? } else { None };
            if whole.is_none() {
                let buf = buf.get_or_insert_with(|| IoBuf::zeroed((count * BLOCK) as usize));
                self.fill(&row, first, buf, &resolved).await?;
            }
            todo = if self.image_epoch.get() == epoch { Vec::new() } else { self.overtaken(&row, &resolved) };
            if let Some(whole) = whole {
                if todo.is_empty() {
                    return Ok(whole.slice(skip, len as usize));
                }
                // Some of it was overtaken: all is read again.
                todo = (first..first + count).collect();
            }
        }
        let buf = buf.unwrap_or_else(|| IoBuf::zeroed((count * BLOCK) as usize));
        Ok(buf.share().slice(skip, len as usize))
    }

    /// Blocks that were read from the primary while a before-image of them came in: what was read may be newer than the point.
    fn overtaken(&self, row: &Row, resolved: &[(u64, Layers)]) -> Vec<u64> {
        if active(Mutation::NoRecheck) {
            return Vec::new();
        }
        // Logs that began since the row was taken count, too.
        let state = self.state.borrow();
        let overtaken = |block: u64, layer: &Layer| match layer.source {
            Source::Primary { unless_imaged_from: Some(from) } => {
                // A log that was sealed meanwhile may have had to give up its set: then nobody knows, and the next row asks its index.
                let since = |seq: u64| row.unsealed.contains(&seq) || row.logs.last().is_none_or(|last| last.seq < seq);
                let forgotten = |l: &Rc<Log>| since(l.seq) && l.state.borrow().sealed;
                let imaged = |l: &Rc<Log>| l.seq >= from && l.imaged(block).unwrap_or_else(|| forgotten(l));
                state.lost_before(block, from) || row.logs.iter().any(imaged) || state.logs.iter().any(imaged)
            }
            _ => false,
        };
        let blocks = resolved.iter().filter(|(block, layers)| layers.iter().any(|l| overtaken(*block, l)));
        blocks.map(|(block, _)| *block).collect()
    }

    /// A block at a point.
    async fn resolve(self: &Rc<Self>, point: &Point, row: &Row, block: u64) -> Result<Layers> {
        let mut layers = match point {
            Point::Live => self.resolve_live(row, block).await?,
            Point::At(instant, log) => {
                let h = row.position(log).ok_or_else(|| Error::Gone("the log of this instant was evicted".into()))?;
                self.resolve_at(row, h, block, *instant, 0).await?
            }
        };
        // What lies behind the end of a volume that ends inside the block nobody asks for: it may be unknown.
        let bad = |layer: &&mut Layer| matches!(layer.source, Source::Lost | Source::Unreadable);
        for layer in layers.iter_mut().filter(bad) {
            let state = self.state.borrow();
            // An older state may have been larger than what there is of the primary now.
            let most = state.sizes.iter().map(|(_, size)| *size).fold(state.size, u64::max);
            if layer.mask & whole_mask(most, block) == 0 {
                layer.source = Source::Zero;
            }
        }
        Ok(layers)
    }

    /// Rule 3 and 4 for the newest state.
    async fn resolve_live(self: &Rc<Self>, row: &Row, block: u64) -> Result<Layers> {
        let mut missing = 0xFF;
        let mut layers = Vec::with_capacity(1);
        self.unwritten(row, row.logs.len(), block, &mut missing, &mut layers, 0, None).await?;
        Ok(layers)
    }

    /// The four rules: block `block` at `instant`, which lies in log `h` of the row.
    fn resolve_at<'a>(
        self: &'a Rc<Self>,
        row: &'a Row,
        h: usize,
        block: u64,
        instant: Instant,
        depth: u32,
    ) -> LocalFuture<'a, Result<Layers>> {
        Box::pin(async move {
            let mut missing = 0xFFu8;
            let mut layers = Vec::with_capacity(1);
            let mut entries = Vec::new();
            let log = &row.logs[h];
            // 1. The newest write in h at or before the instant.
            let (thin, may_have) = {
                let state = log.state.borrow();
                // A block that was written in a sealed log has a before-image there.
                let wrote = if state.sealed {
                    state.imaged.as_ref().is_none_or(|set| set.contains(block))
                } else {
                    state.touched.contains(block)
                };
                (state.thin, wrote)
            };
            let instant = if active(Mutation::ViewExclusive) { instant.before() } else { instant };
            if !thin && may_have {
                log.lookup_writes(block, instant, &mut missing, &mut entries).await?;
                push_entries(&mut layers, h, &mut entries)?;
            }
            // 2. The first before-image from h on.
            // The row may have grown since it was taken: what was added is looked up in the volume's own row by the re-check (I6).
            for (i, log) in row.logs.iter().enumerate().skip(h) {
                if missing == 0 {
                    return Ok(layers);
                }
                // Most logs have none of most blocks: told without a future.
                if log.imaged(block) == Some(false) {
                    continue;
                }
                log.lookup_before(block, &mut missing, &mut entries).await?;
                push_entries(&mut layers, i, &mut entries)?;
            }
            // 3. and 4. What older logs have not brought to the primary, else the primary.
            self.unwritten(row, h, block, &mut missing, &mut layers, depth, Some(row.logs[h].seq)).await?;
            Ok(layers)
        })
    }

    /// Rule 3 over the logs before position `below`, newest first, then rule 4.
    #[expect(clippy::too_many_arguments, reason = "the working set of one resolution; a struct would only rename it")]
    async fn unwritten(
        self: &Rc<Self>,
        row: &Row,
        below: usize,
        block: u64,
        missing: &mut u8,
        layers: &mut Layers,
        depth: u32,
        unless_imaged_from: Option<u64>,
    ) -> Result<()> {
        if *missing == 0 {
            return Ok(());
        }
        let mut revert_to = None;
        for log in row.logs[..below].iter().rev() {
            let state = log.state.borrow();
            if state.sealed {
                break;
            }
            // A revert is the last event of its log.
            if let Some(revert) = &state.revert
                && revert.left.contains(block)
                && !active(Mutation::RevertNotRedirected)
            {
                revert_to = Some(revert.target);
                break;
            }
            if state.revert_lost && self.state.borrow().lost_before(block, u64::MAX) {
                layers.push(Layer { mask: *missing, source: Source::Lost });
                *missing = 0;
                return Ok(());
            }
            match state.overlay.get(block) {
                Some(Content::Zero) => {
                    layers.push(Layer { mask: *missing, source: Source::Zero });
                    *missing = 0;
                }
                Some(Content::Data(data, mask)) if mask & *missing != 0 => {
                    layers.push(Layer { mask: mask & *missing, source: Source::Memory(data.clone()) });
                    *missing &= !mask;
                }
                _ => {}
            }
            if *missing == 0 {
                return Ok(());
            }
        }
        if let Some(target) = revert_to {
            if depth >= REVERT_DEPTH {
                return Err(Error::State(format!("more than {REVERT_DEPTH} reverts are pending on top of each other")));
            }
            let h = row.at(target).ok_or_else(|| Error::Gone("the source of a pending revert was evicted".into()))?;
            for layer in self.resolve_at(row, h, block, target, depth + 1).await? {
                let mask = layer.mask & *missing;
                if mask != 0 {
                    layers.push(Layer { mask, source: layer.source });
                    *missing &= !mask;
                }
            }
            return Ok(());
        }
        let lost = self.state.borrow().lost_before(block, unless_imaged_from.unwrap_or(u64::MAX));
        layers.push(Layer {
            mask: *missing,
            source: if lost { Source::Lost } else { Source::Primary { unless_imaged_from } },
        });
        *missing = 0;
        Ok(())
    }

    /// Whether a block's content at an instant would be read from the primary.
    pub(crate) async fn rests_on_primary(self: &Rc<Self>, instant: Instant, block: u64) -> Result<bool> {
        let row = Row::of(&self.state.borrow());
        let Some(h) = row.at(instant) else { return Ok(true) };
        let layers = self.resolve_at(&row, h, block, instant, 0).await?;
        Ok(layers.iter().any(|l| matches!(l.source, Source::Primary { .. })))
    }

    /// Reads what was resolved, where all of it is one run of whole blocks of the primary, or one block of the journal. Otherwise `None`, and nothing was read.
    async fn read_whole(&self, row: &Row, resolved: &[(u64, Layers)]) -> Result<Option<Slice>> {
        let [(first, layers), rest @ ..] = resolved else { return Ok(None) };
        if let ([Layer { mask: 0xFF, source: Source::Journal { log, segment, page, crc } }], []) = (&layers[..], rest) {
            let bytes = row.logs[*log].disk.read(*segment, *page, 1).await?.share();
            self.verify(&row.logs[*log], *first, &bytes, *crc, (*segment, *page))?;
            return Ok(Some(bytes));
        }
        let of_primary =
            |(_, layers): &(u64, Layers)| matches!(&layers[..], [Layer { mask: 0xFF, source: Source::Primary { .. } }]);
        let count = resolved.len() as u64;
        if !resolved.iter().all(of_primary) || (first + count) * BLOCK > self.primary_bytes.get() {
            return Ok(None);
        }
        self.read_primary(first * BLOCK, count * BLOCK).await.map(Some)
    }

    /// Whether a block of the journal is what its index says.
    fn verify(&self, log: &Log, block: u64, bytes: &[u8], sum: u32, (segment, page): (u32, u32)) -> Result<()> {
        if crc(bytes) == sum || active(Mutation::PayloadUnchecked) {
            return Ok(());
        }
        self.event(crate::info::EventKind::Damage, format!("payload of block {block} in log {}", log.seq));
        Err(damaged("payload", &log.disk.path, segment, page))
    }

    /// Reads what was resolved into `buf`, whose first block is `first`: runs of the primary and of the journal in one read each, all at once.
    async fn fill(&self, row: &Row, first: u64, buf: &mut IoBuf, resolved: &[(u64, Layers)]) -> Result<()> {
        // (kind of source, place, blocks, [(index of the block in buf, mask, crc)])
        let mut primary: Vec<(u64, Vec<(u64, u8)>)> = Vec::new();
        let mut journal: Vec<(usize, u32, u32, Vec<(u64, u8, u32)>)> = Vec::new();
        for (block, layers) in resolved {
            let at = ((block - first) * BLOCK) as usize;
            for layer in layers {
                match &layer.source {
                    Source::Zero => copy_sectors(&mut buf[at..at + BLOCK as usize], &[0; BLOCK as usize], layer.mask),
                    Source::Memory(data) => copy_sectors(&mut buf[at..at + BLOCK as usize], data, layer.mask),
                    Source::Unreadable => {
                        return Err(Error::Device {
                            op: "read before-image of",
                            device: format!("block {block} of {}", self.path()),
                            message: "the primary could not read it when it was to be kept".into(),
                            errno: 5,
                        });
                    }
                    Source::Lost => {
                        return Err(lost_error("read lost", *block, &self.path()));
                    }
                    Source::Primary { .. } => match primary.last_mut() {
                        Some((start, list)) if *start + list.len() as u64 == *block => list.push((*block, layer.mask)),
                        _ => primary.push((*block, vec![(*block, layer.mask)])),
                    },
                    Source::Journal { log, segment, page, crc } => match journal.last_mut() {
                        Some((l, s, start, list))
                            if l == log && s == segment && *start + list.len() as u32 == *page && list.len() < 256 =>
                        {
                            list.push((*block, layer.mask, *crc));
                        }
                        _ => journal.push((*log, *segment, *page, vec![(*block, layer.mask, *crc)])),
                    },
                }
            }
        }
        let size = self.primary_bytes.get();
        let from_primary = join_all(primary.iter().map(|(start, list)| async move {
            let len = (list.len() as u64 * BLOCK).min(size.saturating_sub(start * BLOCK));
            if len == 0 { Ok(None) } else { self.read_primary(start * BLOCK, len).await.map(Some) }
        }));
        let from_journal = join_all(journal.iter().map(|(log, segment, page, list)| async move {
            row.logs[*log].disk.read(*segment, *page, list.len() as u32).await
        }));
        let (from_primary, from_journal) = futures::future::join(from_primary, from_journal).await;
        for ((_, list), bytes) in primary.iter().zip(from_primary) {
            let bytes = bytes?;
            for (i, (block, mask)) in list.iter().enumerate() {
                let at = ((block - first) * BLOCK) as usize;
                let mut whole = [0u8; BLOCK as usize];
                if let Some(bytes) = &bytes {
                    // Past the end of a primary that ends inside a block there is nothing: zeroes.
                    let piece = bytes.get(i * BLOCK as usize..).unwrap_or_default();
                    let n = piece.len().min(BLOCK as usize);
                    whole[..n].copy_from_slice(&piece[..n]);
                }
                copy_sectors(&mut buf[at..at + BLOCK as usize], &whole, *mask);
            }
        }
        for ((log, segment, page, list), bytes) in journal.iter().zip(from_journal) {
            let bytes = bytes?;
            for (i, (block, mask, sum)) in list.iter().enumerate() {
                let piece = &bytes[i * BLOCK as usize..(i + 1) * BLOCK as usize];
                self.verify(&row.logs[*log], *block, piece, *sum, (*segment, *page + i as u32))?;
                let at = ((block - first) * BLOCK) as usize;
                copy_sectors(&mut buf[at..at + BLOCK as usize], piece, *mask);
            }
        }
        Ok(())
    }

    /// One whole block as of an instant in a log, for the destager and for reverts.
    pub(crate) async fn blocks_at(
        self: &Rc<Self>,
        instant: Instant,
        log: &Rc<Log>,
        block: u64,
        count: u64,
    ) -> Result<Slice> {
        self.read_step(&Point::At(instant, Rc::clone(log)), block * BLOCK, count * BLOCK).await
    }

    /// Allocation of a range, for `base:allocation`: a hole is what lies in a hole of the primary and in no overlay, and what the guest zeroed.
    pub(crate) async fn status(self: &Rc<Self>, offset: u64, len: u64) -> Result<Vec<BlockStatus>> {
        self.check_range(offset, len)?;
        self.serving()?;
        self.of_live(async || self.status_at(&Point::Live, offset, len).await).await
    }

    pub(crate) async fn status_at(self: &Rc<Self>, point: &Point, offset: u64, len: u64) -> Result<Vec<BlockStatus>> {
        let mut out: Vec<BlockStatus> = Vec::new();
        let mut push = |len: u64, hole: bool, zero: bool| match out.last_mut() {
            Some(last) if last.hole == hole && last.zero == zero => last.len += len,
            _ => out.push(BlockStatus { len, hole, zero }),
        };
        let device = |e: std::io::Error| Error::device("allocation map of", self.path(), &e);
        if matches!(point, Point::Live) && !self.live_needs_layers(offset, len) {
            for piece in self.primary.allocation(offset, len).await.map_err(device)? {
                push(piece.len, piece.hole, piece.hole);
            }
            return Ok(out);
        }
        // The answer may be shorter than the question: the client asks again from there.
        let end = (offset + len).min(offset - offset % BLOCK + STATUS_BLOCKS * BLOCK);
        let row = Row::of(&self.state.borrow());
        let (first, count) = blocks_of(offset, end - offset);
        // Resolved before the map is asked: what moves from the overlay to the primary in between is in the map.
        let mut resolved = Vec::with_capacity(count as usize);
        for block in first..first + count {
            resolved.push((block, self.resolve(point, &row, block).await?));
        }
        let primary_end = end.min(self.primary_bytes.get());
        let holes = if primary_end > offset {
            self.primary.allocation(offset, primary_end - offset).await.map_err(device)?
        } else {
            Vec::new()
        };
        // An older state, and the newest one while a revert is pending, may have rested on the primary and no more, where a before-image came in between: the map
        // may be of what was written since.
        let overtaken = self.overtaken(&row, &resolved);
        let (mut piece, mut piece_end) = (0, offset + holes.first().map_or(0, |p| p.len));
        for (block, layers) in resolved {
            let from = offset.max(block * BLOCK);
            let until = end.min((block + 1) * BLOCK);
            while piece_end <= from && piece + 1 < holes.len() {
                piece += 1;
                piece_end += holes[piece].len;
            }
            let in_hole = holes.get(piece).is_none_or(|p| p.hole) && until <= piece_end;
            let zero = layers.iter().all(|l| match l.source {
                Source::Zero => true,
                Source::Primary { .. } => in_hole && overtaken.binary_search(&block).is_err(),
                _ => false,
            });
            push(until - from, zero, zero);
        }
        Ok(out)
    }
}

/// The answer for a block whose content existed only in history that is gone.
pub(crate) fn lost_error(op: &'static str, block: u64, path: &str) -> Error {
    Error::Device {
        op,
        device: format!("block {block} of {path}"),
        message: "what a revert was to put there is lost: its CDP disk, or an unreadable sector, held it alone; overwrite the whole block".into(),
        errno: 5,
    }
}

/// Turns index entries, newest first, into layers.
fn push_entries(layers: &mut Layers, log: usize, entries: &mut Vec<IndexEntry>) -> Result<()> {
    let mut covered: u8 = layers.iter().fold(0, |m, l| m | l.mask);
    for entry in entries.drain(..) {
        let mask = entry_mask(&entry) & !covered;
        covered |= mask;
        let source = match entry.kind() {
            EntryKind::Write | EntryKind::BeforeData => Source::Journal {
                log,
                segment: entry.segment.get(),
                page: u32::from(entry.page.get()),
                crc: entry.crc.get(),
            },
            EntryKind::Zero | EntryKind::BeforeZero => Source::Zero,
            EntryKind::BeforeUnreadable => Source::Unreadable,
        };
        layers.push(Layer { mask, source });
    }
    Ok(())
}

/// The sectors that an entry gives.
pub(crate) fn entry_mask(entry: &IndexEntry) -> u8 {
    if entry.level() > 0
        || matches!(entry.kind(), EntryKind::BeforeData | EntryKind::BeforeZero | EntryKind::BeforeUnreadable)
    {
        0xFF
    } else {
        entry.mask
    }
}
