//! A disk that behaves as badly as a real one may.
//!
//! It keeps two contents: `current`, which reads see, and `stable`, which survives a power cut. A write that is not yet covered
//! by a sync is remembered as a list of sectors; at a power cut any subset of those survives, in any order, and a physical
//! sector (4 KiB) that an unsynced write covered only in part may come out as garbage. A kill of the process leaves what had
//! completed and any part of what was in flight; it stays unsynced. Calls complete after a random time and out of order.
//!
//! A file's modification time moves with writes, zeroes and discards, between a call and its answer; only `sync_all` keeps it from being taken back by a power
//! cut. A discard makes zeroes, or leaves what it likes as it was (see [`SimDisk::set_lazy_discards`]).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use cdp_journal::{Allocation, Device, Identity, IoBuf, LocalFuture, Slice};

use crate::executor::{Completion, Executor, Shared};
use crate::rng::{Rng, mix};

/// Bytes of a page of the simulation.
const PAGE: u64 = 4096;
/// What a CDP disk's call may take: the engine's default.
const STALL_MAX_NS: u64 = 5_000_000_000;
/// Bytes of the unit that is never torn.
const SECTOR: u64 = 512;

type Page = [u8; PAGE as usize];

/// What a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOn {
    /// Reads.
    Read,
    /// Writes and write-zeroes.
    Write,
    /// Syncs.
    Sync,
    /// All calls.
    Any,
}

/// What happens to a call that a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// I/O error; of a write any part may have happened, of a sync nothing is certain.
    Eio,
    /// No space left (writes).
    Enospc,
    /// Completes only when the disk is healed.
    Hang,
    /// Takes this many nanoseconds more.
    Slow(u64),
    /// The write lands this many bytes further on and reports success.
    Misdirect(u64),
    /// The write reports success and never happened.
    Lost,
}

impl FaultKind {
    /// Whether an agent must bear it and keep its protection: slower than usual, but within `stall_max`.
    pub fn is_mild(self) -> bool {
        matches!(self, FaultKind::Slow(ns) if ns < STALL_MAX_NS / 2)
    }
}

/// A fault, armed on a disk.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Calls that it hits.
    pub on: FaultOn,
    /// What it does.
    pub kind: FaultKind,
    /// How many calls it hits; `None`: all until healed.
    pub times: Option<u32>,
    /// Calls that pass before it begins to hit.
    pub after: u32,
    /// Only calls that touch bytes from the first up to the second; a sync touches none.
    pub within: Option<(u64, u64)>,
}

/// Part of a write: some sectors of one page.
#[derive(Clone)]
struct Piece {
    page: u64,
    /// The sectors of it that may still come to be there.
    mask: u8,
    /// The write covered only some of the page's sectors, whatever is left of it by now.
    partial: bool,
    /// `None`: zeroes.
    data: Option<Rc<Page>>,
    /// Zeroes that may become a hole.
    punch: bool,
    /// Zeroes of a discard that is a hint.
    hint: bool,
}

struct Unsynced {
    id: u64,
    pieces: Vec<Piece>,
    /// `current` holds it.
    applied: bool,
    completed: bool,
    /// A failed sync forgot it: no later sync makes it durable.
    dropped: bool,
}

#[derive(Default)]
struct Pages(BTreeMap<u64, Rc<Page>>);

impl Pages {
    fn apply(&mut self, piece: &Piece) {
        self.apply_masked(piece, piece.mask);
    }

    fn apply_masked(&mut self, piece: &Piece, mask: u8) {
        if mask == 0xff {
            match &piece.data {
                Some(data) => drop(self.0.insert(piece.page, Rc::clone(data))),
                None if piece.punch => drop(self.0.remove(&piece.page)),
                None => drop(self.0.insert(piece.page, Rc::new([0; PAGE as usize]))),
            }
            return;
        }
        if mask == 0 {
            return;
        }
        let page = Rc::make_mut(self.0.entry(piece.page).or_insert_with(|| Rc::new([0; PAGE as usize])));
        for sector in (0..8).filter(|sector| mask & (1 << sector) != 0) {
            let range = sector * SECTOR as usize..(sector + 1) * SECTOR as usize;
            match &piece.data {
                Some(data) => page[range.clone()].copy_from_slice(&data[range]),
                None => page[range].fill(0),
            }
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) {
        let mut at = offset;
        let mut out = out;
        while !out.is_empty() {
            let start = (at % PAGE) as usize;
            let len = out.len().min(PAGE as usize - start);
            let (head, rest) = out.split_at_mut(len);
            match self.0.get(&(at / PAGE)) {
                Some(page) => head.copy_from_slice(&page[start..start + len]),
                None => head.fill(0),
            }
            out = rest;
            at += len as u64;
        }
    }
}

struct State {
    size: u64,
    /// What whoever asks is told of it: the rest is there and belongs to nobody yet.
    told: u64,
    size_opened: u64,
    current: Pages,
    stable: Pages,
    unsynced: Vec<Unsynced>,
    next_id: u64,
    faults: Vec<Fault>,
    gone: bool,
    hung: Vec<Box<dyn FnOnce()>>,
    mtime_ns: u64,
    /// What a power cut may take it back to.
    mtime_stable_ns: u64,
    /// Number of the newest sync that was called, and of the newest `sync_all` that completed.
    syncs: (u64, u64),
    misuse: Option<String>,
    calls: u64,
    /// Calls of this incarnation that met a fault which is not mild.
    hits: u64,
    has_dropped: bool,
}

/// The disk itself; it outlives the processes that use it.
pub struct SimDisk {
    /// For messages and as its identity.
    pub name: String,
    /// Physical block in bytes.
    pub physical: u32,
    /// A file has a modification time; a block device has none.
    pub is_file: bool,
    /// Part of the hash of events.
    pub number: u64,
    /// What each call takes longer, nanoseconds.
    slow_ns: Cell<u64>,
    /// Many calls take long.
    stragglers: Cell<bool>,
    /// A discard need not make zeroes.
    lazy_discards: Cell<bool>,
    /// Discards that came here.
    discards: Cell<u64>,
    state: RefCell<State>,
}

/// How a power cut treats the unsynced sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Survival {
    Nothing,
    All,
    WholeWrites,
    EachSector,
    PrefixTorn,
    MostlyNot,
}

impl SimDisk {
    /// An empty disk.
    pub fn new(number: u64, name: &str, size: u64, physical: u32, is_file: bool) -> Rc<Self> {
        Rc::new(Self {
            name: name.to_owned(),
            physical,
            is_file,
            number,
            slow_ns: Cell::new(0),
            stragglers: Cell::new(false),
            lazy_discards: Cell::new(false),
            discards: Cell::new(0),
            state: RefCell::new(State {
                size,
                told: size,
                size_opened: size,
                current: Pages::default(),
                stable: Pages::default(),
                unsynced: Vec::new(),
                next_id: 0,
                faults: Vec::new(),
                gone: false,
                hung: Vec::new(),
                mtime_ns: 1,
                mtime_stable_ns: 1,
                syncs: (0, 0),
                misuse: None,
                calls: 0,
                hits: 0,
                has_dropped: false,
            }),
        })
    }

    /// From now on each call takes so much longer.
    pub fn set_slow(&self, ns: u64) {
        self.slow_ns.set(ns);
    }

    /// From now on one call of eight takes 1 to 60 ms, not one of 64.
    pub fn set_stragglers(&self, stragglers: bool) {
        self.stragglers.set(stragglers);
    }

    /// From now on a discard is a hint, as most drives take it: of the physical sectors that it covers whole any become zeroes, and the others keep what they
    /// hold; so too after a power cut. Otherwise, as of a file, it makes zeroes.
    pub fn set_lazy_discards(&self, lazy: bool) {
        self.lazy_discards.set(lazy);
    }

    /// Discards that came here so far.
    pub fn discards(&self) -> u64 {
        self.discards.get()
    }

    /// The device as one incarnation of the agent sees it.
    pub fn attach(self: &Rc<Self>, executor: &Rc<Executor>) -> Rc<dyn Device> {
        let mut state = self.state.borrow_mut();
        state.size_opened = state.told;
        state.hits = 0;
        drop(state);
        Rc::new(Handle { disk: Rc::clone(self), executor: Rc::clone(executor) })
    }

    /// Puts bytes there, durably, past everything (a factory, or another writer).
    pub fn poke(&self, offset: u64, bytes: &[u8], wall_ns: u64) {
        let mut state = self.state.borrow_mut();
        for piece in pieces_of(offset, bytes.len() as u64, Some(bytes), false) {
            state.current.apply(&piece);
            state.stable.apply(&piece);
        }
        state.mtime_ns = wall_ns;
        state.mtime_stable_ns = wall_ns;
    }

    /// What a read would see now.
    pub fn peek(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        self.state.borrow().current.read(offset, &mut out);
        out
    }

    /// All bytes as they are now, for one who reads them like a file.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state.borrow();
        Snapshot { pages: Pages(state.current.0.clone()), size: state.size, at: 0 }
    }

    /// Flips one bit at rest.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        let mut state = self.state.borrow_mut();
        let State { current, stable, .. } = &mut *state;
        for pages in [current, stable] {
            if let Some(page) = pages.0.get_mut(&(offset / PAGE)) {
                Rc::make_mut(page)[(offset % PAGE) as usize] ^= 1 << (bit & 7);
            }
        }
    }

    /// Numbers of the pages that hold data, in order.
    pub fn pages(&self) -> Vec<u64> {
        self.state.borrow().current.0.keys().copied().collect()
    }

    /// The size changes at rest (a file truncated or grown).
    pub fn set_size(&self, size: u64) {
        let mut state = self.state.borrow_mut();
        state.size = size;
        state.told = size;
        let State { current, stable, .. } = &mut *state;
        for pages in [current, stable] {
            pages.0.retain(|page, _| (page + 1) * PAGE <= size.next_multiple_of(PAGE));
        }
    }

    /// Only the first so many bytes of the disk are there for now.
    pub fn hide_behind(&self, told: u64) {
        self.state.borrow_mut().told = told;
    }

    /// The disk is at least so large from now on, whatever it was opened with; what lies there shows (as when a logical volume is extended).
    pub fn grow_to(&self, told: u64) {
        let mut state = self.state.borrow_mut();
        state.told = told.clamp(state.told, state.size);
    }

    /// Size in bytes now.
    pub fn size(&self) -> u64 {
        self.state.borrow().size
    }

    /// Arms a fault.
    pub fn fault(&self, fault: Fault) {
        self.state.borrow_mut().faults.push(fault);
    }

    /// The disk is not there any more (or again): every call fails.
    pub fn set_gone(&self, gone: bool) {
        self.state.borrow_mut().gone = gone;
    }

    /// Whether the disk is away.
    pub fn is_gone(&self) -> bool {
        self.state.borrow().gone
    }

    /// Whether a fault is armed or the disk is away.
    pub fn is_faulty(&self) -> bool {
        let state = self.state.borrow();
        state.gone || !state.faults.is_empty()
    }

    /// Whether it does now, and has done since it was opened, what a disk should; what is merely slow does.
    pub fn is_sound(&self) -> bool {
        let state = self.state.borrow();
        !state.gone && state.hits == 0 && state.faults.iter().all(|fault| fault.kind.is_mild())
    }

    /// Whether a failed sync has dropped writes that reads still showed.
    pub fn has_dropped(&self) -> bool {
        self.state.borrow().has_dropped
    }

    /// Removes all faults; hung calls go on.
    pub fn heal(&self) {
        let hung = {
            let mut state = self.state.borrow_mut();
            state.faults.clear();
            state.gone = false;
            std::mem::take(&mut state.hung)
        };
        for call in hung {
            call();
        }
    }

    /// What the engine did that no device allows (unaligned, past the end), if anything.
    pub fn misuse(&self) -> Option<String> {
        self.state.borrow().misuse.clone()
    }

    /// Calls served so far.
    pub fn calls(&self) -> u64 {
        self.state.borrow().calls
    }

    /// The process died: what was in flight happened, did not, or happened in part. Nothing becomes durable by it.
    pub fn kill(&self, rng: &Rng) {
        let mut state = self.state.borrow_mut();
        state.hung.clear();
        let in_flight: Vec<u64> =
            state.unsynced.iter().filter(|write| !write.completed).map(|write| write.id).collect();
        for id in in_flight {
            let policy = rng.below(3);
            for write in state.unsynced.iter_mut().filter(|write| write.id == id && !write.applied) {
                for piece in &mut write.pieces {
                    piece.mask &= match policy {
                        0 => 0,
                        1 => 0xff,
                        _ => self.part_of(piece.mask, rng),
                    };
                }
            }
            state.apply(id, false);
        }
        state.unsynced.iter_mut().for_each(|write| write.completed = true);
    }

    /// The power went: what no sync had covered survives in any subset and order. Answers the pages that came out as garbage.
    pub fn power_cut(&self, rng: &Rng) -> Vec<u64> {
        let mut state = self.state.borrow_mut();
        state.hung.clear();
        let policy = *rng.pick(&[
            Survival::Nothing,
            Survival::All,
            Survival::WholeWrites,
            Survival::EachSector,
            Survival::PrefixTorn,
            Survival::MostlyNot,
        ]);
        let mut writes = std::mem::take(&mut state.unsynced);
        if rng.one_in(3) && policy != Survival::PrefixTorn {
            rng.shuffle(&mut writes);
        }
        let torn_at = rng.below(writes.len() as u64 + 1) as usize;
        let damage = rng.one_in(2);
        let mut garbage = Vec::new();
        for (place, write) in writes.iter().enumerate().filter(|(_, write)| !write.dropped) {
            let whole = rng.one_in(2);
            for piece in &write.pieces {
                let keep = match policy {
                    Survival::Nothing => 0,
                    Survival::All => 0xff,
                    Survival::WholeWrites => 0xff * u8::from(whole),
                    Survival::EachSector => rng.bits() as u8,
                    Survival::PrefixTorn if place < torn_at => 0xff,
                    Survival::PrefixTorn if place == torn_at => rng.bits() as u8,
                    Survival::PrefixTorn => 0,
                    Survival::MostlyNot => (rng.bits() & rng.bits() & rng.bits()) as u8,
                };
                // A discard is not torn.
                let keep = if piece.hint && self.has_large_sectors() { 0xff * (keep & 1) } else { keep };
                state.stable.apply_masked(piece, piece.mask & keep);
            }
            if damage {
                self.damage(&mut state.stable, write, rng, &mut garbage);
            }
        }
        state.current = Pages(state.stable.0.clone());
        if rng.one_in(2) {
            state.mtime_ns = state.mtime_stable_ns;
        }
        state.mtime_stable_ns = state.mtime_ns;
        garbage
    }

    /// Writes that no sync has covered, in the order in which they began: what a power cut may keep or not.
    pub fn unsynced(&self) -> usize {
        self.state.borrow().unsynced.iter().filter(|write| !write.dropped).count()
    }

    /// The power went, and of these writes exactly those survive, whole, that are asked for by their place.
    pub fn power_cut_keeping(&self, survives: impl Fn(usize) -> bool) {
        let mut state = self.state.borrow_mut();
        state.hung.clear();
        let writes = std::mem::take(&mut state.unsynced);
        for (_, write) in writes.iter().filter(|write| !write.dropped).enumerate().filter(|(place, _)| survives(*place))
        {
            write.pieces.iter().for_each(|piece| state.stable.apply(piece));
        }
        state.current = Pages(state.stable.0.clone());
        state.mtime_stable_ns = state.mtime_ns;
    }

    /// Which sectors of a page a write leaves that is cut off while the power stays on: a physical sector is written whole or not at all.
    fn part_of(&self, mask: u8, rng: &Rng) -> u8 {
        let bits = rng.bits() as u8;
        if mask == 0xff && self.has_large_sectors() { 0xff * (bits & 1) } else { bits }
    }

    /// Whether a physical sector is a page.
    fn has_large_sectors(&self) -> bool {
        u64::from(self.physical) >= PAGE
    }

    /// What is left of a discard that the disk takes for a hint: all, nothing, or any of its physical sectors, as `chance` says.
    fn take_for_hint(&self, pieces: &mut [Piece], chance: u64) {
        for piece in pieces {
            let any = match chance % 4 {
                0 => 0,
                1 => 0xff,
                _ => mix(chance ^ piece.page) as u8,
            };
            let zeroed = if !self.has_large_sectors() {
                any
            } else if piece.partial {
                0
            } else {
                0xff * (any & 1)
            };
            piece.mask &= zeroed;
            piece.hint = true;
        }
    }

    /// Garbage in physical sectors that the unsynced write covered only in part, if any of it may still survive.
    fn damage(&self, stable: &mut Pages, write: &Unsynced, rng: &Rng, damaged: &mut Vec<u64>) {
        assert!(u64::from(self.physical) <= PAGE, "a page is the largest physical sector");
        if self.physical <= SECTOR as u32 {
            return;
        }
        for piece in write.pieces.iter().filter(|piece| piece.partial && piece.mask != 0) {
            if !rng.one_in(3) {
                continue;
            }
            let mut garbage = [0u8; PAGE as usize];
            for chunk in garbage.chunks_mut(8) {
                chunk.copy_from_slice(&rng.bits().to_le_bytes());
            }
            stable.0.insert(piece.page, Rc::new(garbage));
            damaged.push(piece.page);
        }
    }
}

/// See [`SimDisk::snapshot`].
pub struct Snapshot {
    pages: Pages,
    size: u64,
    at: u64,
}

impl io::Read for Snapshot {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = (buf.len() as u64).min(self.size.saturating_sub(self.at)) as usize;
        self.pages.read(self.at, &mut buf[..len]);
        self.at += len as u64;
        Ok(len)
    }
}

impl io::Seek for Snapshot {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        let to = match to {
            io::SeekFrom::Start(at) => Some(at),
            io::SeekFrom::End(by) => self.size.checked_add_signed(by),
            io::SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

fn pieces_of(offset: u64, len: u64, bytes: Option<&[u8]>, punch: bool) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity((len / PAGE + 2) as usize);
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let page = at / PAGE;
        let stop = end.min((page + 1) * PAGE);
        let first = (at % PAGE / SECTOR) as u32;
        let count = ((stop - at) / SECTOR) as u32;
        let mask = (((1u16 << count) - 1) << first) as u8;
        let data = bytes.map(|bytes| {
            let mut data: Page = [0; PAGE as usize];
            let from = (at - offset) as usize;
            data[(at % PAGE) as usize..][..(stop - at) as usize]
                .copy_from_slice(&bytes[from..][..(stop - at) as usize]);
            Rc::new(data)
        });
        pieces.push(Piece { page, mask, partial: mask != 0xff, data, punch, hint: false });
        at = stop;
    }
    pieces
}

/// What was decided about a call when it was made.
struct Verdict {
    error: Option<i32>,
    hang: bool,
    slow_ns: u64,
    misdirect: Option<u64>,
    lost: bool,
}

const EIO: i32 = 5;
const ENODEV: i32 = 19;
const ENOSPC: i32 = 28;

struct Handle {
    disk: Rc<SimDisk>,
    executor: Rc<Executor>,
}

impl Handle {
    fn rng(&self) -> &Rng {
        &self.executor.shared.rng
    }

    fn latency(&self) -> u64 {
        let rng = self.rng();
        let (slow, medium, of) = if self.disk.stragglers.get() { (1, 2, 8) } else { (1, 8, 64) };
        match rng.below(of) {
            place if place < slow => rng.range(1_000_000, 60_000_000),
            place if place < medium => rng.range(100_000, 3_000_000),
            _ => rng.range(5_000, 100_000),
        }
    }

    fn judge(&self, on: FaultOn, offset: u64, len: u64) -> Verdict {
        let mut state = self.disk.state.borrow_mut();
        state.calls += 1;
        let mut verdict = Verdict { error: None, hang: false, slow_ns: 0, misdirect: None, lost: false };
        if state.gone {
            state.hits += 1;
            verdict.error = Some(ENODEV);
            return verdict;
        }
        let State { faults, hits: met, .. } = &mut *state;
        for fault in faults {
            let hits = (fault.on == on || fault.on == FaultOn::Any)
                && fault.within.is_none_or(|(from, to)| offset < to && from < offset + len)
                && fault.times != Some(0);
            if !hits {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
                continue;
            }
            if let Some(times) = &mut fault.times {
                *times -= 1;
            }
            *met += u64::from(!fault.kind.is_mild());
            match fault.kind {
                FaultKind::Eio => verdict.error = Some(EIO),
                FaultKind::Enospc if on == FaultOn::Write => verdict.error = Some(ENOSPC),
                FaultKind::Enospc => {}
                FaultKind::Hang => verdict.hang = true,
                FaultKind::Slow(ns) => verdict.slow_ns += ns,
                FaultKind::Misdirect(by) if on == FaultOn::Write => verdict.misdirect = Some(by),
                FaultKind::Misdirect(_) => {}
                FaultKind::Lost if on == FaultOn::Write => verdict.lost = true,
                FaultKind::Lost => {}
            }
        }
        state.faults.retain(|fault| fault.times != Some(0));
        verdict
    }

    /// Remembers what no device allows; the run fails by it.
    fn check_range(&self, what: &str, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.disk.state.borrow_mut();
        let end_ok = offset + len <= state.size_opened || offset + len <= state.told;
        if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) || !end_ok {
            let (name, size) = (&self.disk.name, state.size);
            let text = format!("{name}: {what} of {len} bytes at {offset} is unaligned or past the size {size}");
            state.misuse.get_or_insert(text);
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }

    /// Runs `effect` somewhere between now and the completion, and `complete` at the completion.
    fn schedule(&self, verdict: &Verdict, effect: impl FnOnce() + 'static, complete: impl FnOnce() + 'static) {
        let latency = self.latency() + verdict.slow_ns + self.disk.slow_ns.get();
        if verdict.hang {
            let executor = Rc::clone(&self.executor);
            self.disk.state.borrow_mut().hung.push(Box::new(move || {
                executor.after(latency, move || {
                    effect();
                    complete();
                });
            }));
            return;
        }
        match self.rng().below(4) {
            0 => {
                effect();
                self.executor.after(latency, complete);
            }
            1 => {
                let early = self.rng().below(latency);
                self.executor.after(early, effect);
                self.executor.after(latency, complete);
            }
            _ => self.executor.after(latency, move || {
                effect();
                complete();
            }),
        }
    }

    fn start_write(
        &self,
        what: u64,
        offset: u64,
        len: u64,
        pieces: Vec<Piece>,
    ) -> LocalFuture<'static, io::Result<()>> {
        if let Err(error) = self.check_range("write", offset, len) {
            return Box::pin(async move { Err(error) });
        }
        let verdict = self.judge(FaultOn::Write, offset, len);
        self.executor.shared.note(&[what, self.disk.number, offset, len]);
        let mut pieces = pieces;
        if let Some(by) = verdict.misdirect {
            let pages = self.disk.size() / PAGE;
            for piece in &mut pieces {
                piece.page = (piece.page + by / PAGE) % pages.max(1);
            }
        }
        let truncated = offset + len > self.disk.size();
        let error = if truncated { Some(ENOSPC) } else { verdict.error };
        if verdict.lost || truncated || verdict.error == Some(ENODEV) || verdict.error == Some(ENOSPC) {
            pieces.clear();
        } else if verdict.error.is_some() {
            for piece in &mut pieces {
                piece.mask &= self.disk.part_of(piece.mask, self.rng());
            }
        }
        let id = {
            let mut state = self.disk.state.borrow_mut();
            let id = state.next_id;
            state.next_id += 1;
            state.unsynced.push(Unsynced { id, pieces, applied: false, completed: false, dropped: false });
            state.touch(&self.disk, &self.executor.shared);
            id
        };
        let split = self.rng().one_in(4);
        let done = Completion::new();
        let (sender, disk, shared) = (done.clone(), Rc::clone(&self.disk), Rc::clone(&self.executor.shared));
        let (disk2, clock) = (Rc::clone(&self.disk), Rc::clone(&self.executor.shared));
        self.schedule(
            &verdict,
            move || {
                let mut state = disk.state.borrow_mut();
                state.apply(id, split);
                state.touch(&disk, &clock);
            },
            move || {
                let mut state = disk2.state.borrow_mut();
                state.apply(id, false);
                for write in state.unsynced.iter_mut().filter(|write| write.id == id) {
                    write.completed = true;
                }
                drop(state);
                shared.note(&[what + 100, disk2.number, id]);
                sender.complete(error.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code))));
            },
        );
        Box::pin(done)
    }

    /// `all`: of a file the modification time is made durable, too.
    fn start_sync(&self, all: bool) -> LocalFuture<'static, io::Result<()>> {
        let verdict = self.judge(FaultOn::Sync, 0, 0);
        self.executor.shared.note(&[14, self.disk.number]);
        let error = verdict.error;
        // Durable will be what had completed when this was called, and nothing else.
        let (covered, mtime_ns, number): (BTreeSet<u64>, u64, u64) = {
            let mut state = self.disk.state.borrow_mut();
            state.syncs.0 += 1;
            let covered = state.unsynced.iter().filter(|write| write.completed && !write.dropped).map(|write| write.id);
            (covered.collect(), state.mtime_ns, state.syncs.0)
        };
        let forgets = self.rng().one_in(2);
        // Half of the syncs that forget keep some writes. Drawn from the time, so that the draws before and after are what they were.
        let chance = mix(self.executor.shared.boot_ns() ^ number << 48);
        let forgets = move |id: u64| forgets && (chance & 1 == 0 || mix(chance ^ id) & 1 == 0);
        let done = Completion::new();
        let (sender, disk, shared) = (done.clone(), Rc::clone(&self.disk), Rc::clone(&self.executor.shared));
        self.schedule(
            &verdict,
            || {},
            move || {
                {
                    let mut state = disk.state.borrow_mut();
                    let State { stable, unsynced, has_dropped, .. } = &mut *state;
                    if error.is_none() {
                        supersede(unsynced, &covered);
                    }
                    for write in unsynced.iter_mut().filter(|write| covered.contains(&write.id)) {
                        if error.is_some() {
                            write.dropped |= forgets(write.id);
                            *has_dropped |= write.dropped;
                        } else if !write.dropped {
                            write.pieces.iter().for_each(|piece| stable.apply(piece));
                        }
                    }
                    if error.is_none() {
                        unsynced.retain(|write| write.dropped || !covered.contains(&write.id));
                        if all && number > state.syncs.1 {
                            state.mtime_stable_ns = mtime_ns;
                            state.syncs.1 = number;
                        }
                    }
                }
                shared.note(&[114, disk.number]);
                sender.complete(error.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code))));
            },
        );
        Box::pin(done)
    }
}

impl State {
    /// Something is written: a file's modification time moves, failed or not.
    fn touch(&mut self, disk: &SimDisk, clock: &Shared) {
        if disk.is_file {
            self.mtime_ns = clock.wall_ns();
        }
    }

    /// Makes a write visible to reads: half of it, or what is left. The list of unsynced writes is in the order in which they
    /// became visible (a write seen half done stands there twice), so that what overlapping writes leave is the same before and
    /// after a sync.
    fn apply(&mut self, id: u64, half: bool) {
        let Some(place) = self.unsynced.iter().position(|write| write.id == id && !write.applied) else { return };
        let mut write = self.unsynced.remove(place);
        if half {
            let rest = write.pieces.split_off(write.pieces.len() / 2);
            self.unsynced.insert(place, Unsynced { pieces: rest, ..write });
        }
        write.pieces.iter().for_each(|piece| self.current.apply(piece));
        write.applied = true;
        self.unsynced.push(write);
    }
}

/// What a sync makes durable lies over what became visible before it and is not covered, since it has not completed: of that nothing can come back.
fn supersede(unsynced: &mut [Unsynced], covered: &BTreeSet<u64>) {
    for place in 1..unsynced.len() {
        let (before, rest) = unsynced.split_at_mut(place);
        let newer = &rest[0];
        if newer.dropped || !covered.contains(&newer.id) {
            continue;
        }
        for older in before.iter_mut().filter(|older| older.applied && !covered.contains(&older.id)) {
            for piece in &mut older.pieces {
                let over = newer.pieces.iter().filter(|over| over.page == piece.page);
                piece.mask &= !over.fold(0, |mask, over| mask | over.mask);
            }
            older.pieces.retain(|piece| piece.mask != 0);
        }
    }
}

impl Device for Handle {
    #[allow(clippy::misnamed_getters)] // the size when it was opened, as the trait says
    fn size(&self) -> u64 {
        self.disk.state.borrow().size_opened
    }

    fn current_size(&self) -> io::Result<u64> {
        if self.disk.is_gone() {
            return Err(io::Error::from_raw_os_error(ENODEV));
        }
        Ok(self.disk.state.borrow().told)
    }

    fn physical_block(&self) -> u32 {
        self.disk.physical
    }

    fn identity(&self) -> io::Result<Identity> {
        if self.disk.is_gone() {
            return Err(io::Error::from_raw_os_error(ENODEV));
        }
        let mtime_ns = if self.disk.is_file { self.disk.state.borrow().mtime_ns } else { 0 };
        Ok(Identity { id: format!("sim:{}", self.disk.name), mtime_ns })
    }

    fn read(&self, offset: u64, buf: IoBuf) -> LocalFuture<'static, (io::Result<()>, IoBuf)> {
        let len = buf.len() as u64;
        if offset + len > self.disk.size() {
            return Box::pin(async move { (Err(io::ErrorKind::UnexpectedEof.into()), buf) });
        }
        if let Err(error) = self.check_range("read", offset, len) {
            return Box::pin(async move { (Err(error), buf) });
        }
        let verdict = self.judge(FaultOn::Read, offset, len);
        self.executor.shared.note(&[11, self.disk.number, offset, len]);
        let error = verdict.error;
        let done = Completion::new();
        let (sender, disk, shared) = (done.clone(), Rc::clone(&self.disk), Rc::clone(&self.executor.shared));
        let holder = Rc::new(RefCell::new(Some(buf)));
        let filled = Rc::clone(&holder);
        self.schedule(
            &verdict,
            move || {
                if error.is_none()
                    && let Some(buf) = filled.borrow_mut().as_mut()
                {
                    disk.state.borrow().current.read(offset, buf);
                }
            },
            move || {
                let buf = holder.borrow_mut().take().expect("completed once");
                shared.note(&[111, offset]);
                sender.complete((error.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code))), buf));
            },
        );
        Box::pin(done)
    }

    fn write(&self, offset: u64, parts: Vec<Slice>) -> LocalFuture<'static, io::Result<()>> {
        let len: usize = parts.iter().map(Slice::len).sum();
        let pieces = match parts.as_slice() {
            [one] => pieces_of(offset, len as u64, Some(one), false),
            _ => {
                let mut all = Vec::with_capacity(len);
                parts.iter().for_each(|part| all.extend_from_slice(part));
                pieces_of(offset, len as u64, Some(&all), false)
            }
        };
        self.start_write(12, offset, len as u64, pieces)
    }

    fn write_zeroes(&self, offset: u64, len: u64, punch: bool) -> LocalFuture<'static, io::Result<()>> {
        self.start_write(13, offset, len, pieces_of(offset, len, None, punch))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'static, io::Result<()>> {
        self.disk.discards.set(self.disk.discards.get() + 1);
        let mut pieces = pieces_of(offset, len, None, true);
        if self.disk.lazy_discards.get() {
            // Drawn from the time, so that the draws before and after are what they were.
            self.disk.take_for_hint(&mut pieces, mix(self.executor.shared.boot_ns() ^ offset << 20));
        }
        self.start_write(13, offset, len, pieces)
    }

    fn sync(&self) -> LocalFuture<'static, io::Result<()>> {
        self.start_sync(false)
    }

    fn sync_all(&self) -> LocalFuture<'static, io::Result<()>> {
        self.start_sync(true)
    }

    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'static, io::Result<Vec<Allocation>>> {
        let verdict = self.judge(FaultOn::Any, offset, len);
        let error = verdict.error;
        let done = Completion::new();
        let (sender, disk) = (done.clone(), Rc::clone(&self.disk));
        self.schedule(
            &verdict,
            || {},
            move || {
                let state = disk.state.borrow();
                let mut map: Vec<Allocation> = Vec::new();
                let (mut at, end) = (offset, offset + len);
                while at < end {
                    let stop = end.min((at / PAGE + 1) * PAGE);
                    let hole = !state.current.0.contains_key(&(at / PAGE));
                    match map.last_mut() {
                        Some(last) if last.hole == hole => last.len += stop - at,
                        _ => map.push(Allocation { len: stop - at, hole }),
                    }
                    at = stop;
                }
                sender.complete(error.map_or(Ok(map), |code| Err(io::Error::from_raw_os_error(code))));
            },
        );
        Box::pin(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Outcome;

    fn filled(len: usize, byte: u8) -> Vec<Slice> {
        let mut buf = IoBuf::zeroed(len);
        buf.fill(byte);
        vec![buf.share()]
    }

    fn on(disk: &Rc<SimDisk>, seed: u64, work: impl AsyncFnOnce(Rc<dyn Device>) + 'static) -> Rc<Shared> {
        let shared = Shared::new(seed, 1_000_000_000);
        let executor = Executor::new(Rc::clone(&shared));
        let device = disk.attach(&executor);
        assert_eq!(executor.run(Box::pin(async move { work(device).await })), Outcome::Done);
        executor.kill();
        shared
    }

    /// Goal: what a sync covered survives a power cut; of the rest any subset of sectors, each old or new.
    #[test]
    fn a_power_cut_keeps_synced_writes_and_any_sectors_of_the_others() {
        let (mut kept_all, mut kept_none, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let disk = SimDisk::new(1, "d", 1 << 20, 4096, false);
            let shared = on(&disk, seed, async |device| {
                device.write(0, filled(8192, 1)).await.expect("write");
                device.sync().await.expect("sync");
                device.write(0, filled(8192, 2)).await.expect("write");
                device.write(16384, filled(4096, 3)).await.expect("write");
            });
            disk.power_cut(&shared.rng);
            let after = disk.peek(0, 8192);
            for sector in after.chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]) && (1..=2).contains(&sector[0]), "seed {seed}");
            }
            match after.chunks(512).filter(|sector| sector[0] == 2).count() {
                0 => kept_none += 1,
                16 => kept_all += 1,
                _ => torn += 1,
            }
        }
        assert!(kept_all > 10 && kept_none > 10 && torn > 10, "{kept_all} {kept_none} {torn}");
    }

    /// Goal: a sync covers only what had completed when it was called.
    #[test]
    fn a_sync_does_not_cover_a_write_that_was_in_flight_when_it_was_called() {
        let mut lost = 0;
        for seed in 0..100 {
            let disk = SimDisk::new(1, "d", 1 << 20, 512, false);
            let shared = on(&disk, seed, async |device| {
                let write = device.write(0, filled(4096, 9));
                let sync = device.sync();
                write.await.expect("write");
                sync.await.expect("sync");
            });
            disk.power_cut(&shared.rng);
            lost += u32::from(disk.peek(0, 1)[0] == 0);
        }
        assert!(lost > 20, "{lost}");
    }

    /// Goal: a kill loses nothing that had completed, and leaves it unsynced for a later power cut.
    #[test]
    fn a_kill_keeps_completed_writes_but_makes_nothing_durable() {
        let mut lost_later = 0;
        for seed in 0..100 {
            let disk = SimDisk::new(1, "d", 1 << 20, 512, false);
            let shared = on(&disk, seed, async |device| {
                device.write(4096, filled(4096, 5)).await.expect("write");
            });
            disk.kill(&shared.rng);
            assert!(disk.peek(4096, 4096).iter().all(|byte| *byte == 5));
            disk.power_cut(&shared.rng);
            lost_later += u32::from(disk.peek(4096, 1)[0] == 0);
        }
        assert!(lost_later > 20, "{lost_later}");
    }

    /// Goal: a physical sector covered only in part by an unsynced write may come out as garbage, a whole one never.
    #[test]
    fn only_partly_covered_physical_sectors_are_damaged() {
        let mut damaged = 0;
        for seed in 0..200 {
            let disk = SimDisk::new(1, "d", 1 << 20, 4096, false);
            let shared = on(&disk, seed, async |device| {
                device.write(0, filled(8192, 1)).await.expect("write");
                device.sync().await.expect("sync");
                device.write(512, filled(512, 2)).await.expect("write");
                device.write(4096, filled(4096, 2)).await.expect("write");
            });
            disk.power_cut(&shared.rng);
            damaged += u32::from(disk.peek(2048, 512).iter().any(|byte| *byte != 1));
            assert!(disk.peek(4096, 4096).iter().all(|byte| (1..=2).contains(byte)));
        }
        assert!(damaged > 10, "{damaged}");
    }

    /// Goal: a write of whole physical sectors damages none of them, also where a newer, durable write of a part lies over it.
    #[test]
    fn a_whole_sector_is_not_damaged_for_what_lies_over_a_part_of_it() {
        let mut half_hidden = 0;
        for seed in 0..200 {
            let disk = SimDisk::new(1, "d", 1 << 20, 4096, false);
            let slow = FaultKind::Slow(60_000_000_000);
            disk.fault(Fault { on: FaultOn::Write, kind: slow, times: Some(1), after: 0, within: None });
            let shared = on(&disk, seed, async |device| {
                let whole = device.write(0, filled(4096, 1));
                device.write(512, filled(3584, 2)).await.expect("write");
                device.sync().await.expect("sync");
                drop(whole);
            });
            half_hidden += u32::from(disk.peek(0, 512)[0] == 1 && disk.peek(512, 512)[0] == 2);
            disk.power_cut(&shared.rng);
            assert!(disk.peek(0, 4096).iter().all(|byte| *byte <= 2), "seed {seed}");
        }
        assert!(half_hidden > 20, "{half_hidden}");
    }

    #[test]
    fn a_failed_sync_may_forget_writes_for_good() {
        let mut lost = 0;
        for seed in 0..100 {
            let disk = SimDisk::new(1, "d", 1 << 20, 512, false);
            disk.fault(Fault { on: FaultOn::Sync, kind: FaultKind::Eio, times: Some(1), after: 0, within: None });
            let shared = on(&disk, seed, async |device| {
                device.write(0, filled(512, 5)).await.expect("write");
                assert!(device.sync().await.is_err());
                device.sync().await.expect("the second sync");
            });
            disk.power_cut(&shared.rng);
            lost += u32::from(disk.peek(0, 1)[0] == 0);
        }
        assert!(lost > 20 && lost < 80, "{lost}");
    }

    #[test]
    fn faults_hit_what_they_name_and_holes_are_mapped() {
        let disk = SimDisk::new(1, "d", 1 << 20, 4096, true);
        disk.fault(Fault { on: FaultOn::Any, kind: FaultKind::Eio, times: None, after: 0, within: Some((4096, 8192)) });
        let inner = Rc::clone(&disk);
        on(&disk, 3, async move |device| {
            device.write(8192, filled(4096, 1)).await.expect("write");
            assert!(device.read(0, IoBuf::zeroed(4096)).await.0.is_ok());
            assert!(device.read(0, IoBuf::zeroed(8192)).await.0.is_err());
            assert!(device.write(4096, filled(512, 1)).await.is_err());
            device.sync().await.expect("a sync is of no region");
            inner.heal();
            device.write_zeroes(4096, 4096, true).await.expect("zeroes");
            assert!(device.read(0, IoBuf::zeroed(8192)).await.0.is_ok());
            let map = device.allocation(0, 16384).await.expect("map");
            assert_eq!(
                map.iter().map(|a| (a.len, a.hole)).collect::<Vec<_>>(),
                [(8192, true), (4096, false), (4096, true)]
            );
            device.write_zeroes(8192, 4096, true).await.expect("zeroes");
            assert!(device.allocation(0, 16384).await.expect("map")[0].hole);
            inner.set_size(8192);
            assert_eq!(
                device.read(8192, IoBuf::zeroed(4096)).await.0.expect_err("truncated").kind(),
                io::ErrorKind::UnexpectedEof
            );
            inner.set_gone(true);
            assert!(device.sync().await.is_err() && device.current_size().is_err());
        });
        assert_eq!(disk.misuse(), None);
    }

    /// Goal: a power cut may take back a modification time that no `sync_all` has kept, and no other; neither reads nor syncs move it.
    #[test]
    fn only_a_sync_of_all_keeps_the_modification_time() {
        let is_kept = |seed: u64, all: bool| {
            let disk = SimDisk::new(1, "d", 1 << 20, 4096, true);
            let told = Rc::new(Cell::new(0));
            let tell = Rc::clone(&told);
            let shared = on(&disk, seed, async move |device| {
                let mtime = || device.identity().expect("it is there").mtime_ns;
                let before = mtime();
                device.write(0, filled(4096, 1)).await.expect("write");
                tell.set(mtime());
                assert!(tell.get() > before);
                device.read(0, IoBuf::zeroed(4096)).await.0.expect("read");
                let synced = if all { device.sync_all().await } else { device.sync().await };
                synced.expect("sync");
                assert_eq!(mtime(), tell.get());
            });
            disk.power_cut(&shared.rng);
            disk.state.borrow().mtime_ns == told.get()
        };
        let kept = |all: bool| (0..100).filter(|seed| is_kept(*seed, all)).count();
        assert_eq!(kept(true), 100);
        assert!((20..80).contains(&kept(false)));
    }

    /// Goal: a discard that is a hint leaves each physical sector zero or as it was, also after a power cut, and as it was where it covers only a part of
    /// it. Of a file it punches a hole.
    #[test]
    fn a_lazy_discard_zeroes_whole_physical_sectors_or_leaves_them() {
        for physical in [512, 4096] {
            let (mut zeroed, mut left, mut back) = (0, 0, 0);
            for seed in 0..100 {
                let disk = SimDisk::new(1, "d", 1 << 20, physical, false);
                disk.set_lazy_discards(true);
                let shared = on(&disk, seed, async |device| {
                    device.write(0, filled(5 * 4096, 1)).await.expect("write");
                    device.sync().await.expect("sync");
                    device.discard(512, 5 * 4096 - 512).await.expect("discard");
                });
                let sectors = || {
                    let bytes = disk.peek(0, 5 * 4096);
                    let whole = |sector: &[u8]| {
                        assert!(sector.iter().all(|byte| *byte == sector[0]) && sector[0] <= 1, "seed {seed}");
                        sector[0]
                    };
                    bytes.chunks(physical as usize).map(whole).collect::<Vec<u8>>()
                };
                let before = sectors();
                disk.power_cut(&shared.rng);
                let after = sectors();
                assert_eq!(before[0], 1, "seed {seed}: it was not discarded, or only in part");
                for (before, after) in before.into_iter().zip(after) {
                    assert!(after >= before, "seed {seed}: a sector that was left alone became zeroes");
                    zeroed += u32::from(before == 0);
                    left += u32::from(before == 1);
                    back += u32::from(after > before);
                }
            }
            assert!(zeroed > 50 && left > 50 && back > 20, "{zeroed} {left} {back}");
        }
        let disk = SimDisk::new(1, "d", 1 << 20, 4096, true);
        on(&disk, 1, async |device| {
            device.write(0, filled(8192, 1)).await.expect("write");
            device.discard(0, 8192).await.expect("discard");
        });
        assert!(disk.peek(0, 8192).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_hung_call_completes_only_after_healing() {
        let disk = SimDisk::new(1, "d", 1 << 20, 4096, true);
        disk.fault(Fault { on: FaultOn::Sync, kind: FaultKind::Hang, times: None, after: 0, within: None });
        let inner = Rc::clone(&disk);
        let shared = Shared::new(1, 0);
        let executor = Executor::new(shared);
        let device = disk.attach(&executor);
        let e = Rc::clone(&executor);
        let outcome = executor.run(Box::pin(async move {
            e.after(7_000_000_000, move || inner.heal());
            device.sync().await.expect("sync");
            assert!(e.shared.boot_ns() >= 7_000_000_000);
        }));
        assert_eq!(outcome, Outcome::Done);
        executor.kill();
    }

    #[test]
    fn an_unaligned_call_is_remembered_as_misuse() {
        let disk = SimDisk::new(1, "d", 1 << 20, 4096, true);
        on(&disk, 1, async |device| {
            assert!(device.write(100, filled(512, 1)).await.is_err());
        });
        assert!(disk.misuse().is_some());
    }
}
