//! The oracle: a list of writes, and what follows from it.
//!
//! It knows nothing of logs, frames or before-images. It knows for each write when the client called and when it was
//! acknowledged, both on the host's clock, and so that its instant lies in between: the interval `(lo, hi]`. A read at instant T
//! must give, for each sector, a write whose instant may be at most T and that no other write, certainly later and certainly at
//! most T, has covered. What a read shows narrows the intervals and fixes the order of overlapping writes, so that every later
//! read, of any view or of the volume, must agree with it.
//!
//! A revert starts an epoch: below its own writes lies what a read at its target gives. Several may be under way at once: they are made in the order in which
//! they are answered, each after the answer to the one before. A crash has an unknown cut: the writes
//! up to it survive, the others are gone for good; what is seen afterwards narrows the cut, and a lost write before a surviving
//! one is a violation. Where two histories are possible (a revert in flight at a crash) both are carried on until one fails.

use std::collections::{BTreeMap, BTreeSet};

use crate::stamp::{SECTOR, Value, decode};

/// A place on the time line: the clock's newest instant, then a counter of the model's own for what happens between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64, pub u64);

/// When a read took place.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// A view at this instant.
    At(u64),
    /// A read of the volume: not before the first, not after the second.
    Between(Time, Time),
}

impl When {
    /// What is certainly before the read, and what is certainly not after it.
    fn bounds(self) -> (Time, Time) {
        match self {
            When::At(instant) => (Time(instant, u64::MAX), Time(instant, 0)),
            When::Between(from, to) => (from, to),
        }
    }
}

/// What an operation did to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stamped bytes.
    Data,
    /// Zeroes.
    Zero,
    /// Undefined until written again: zeroes or anything that was there before.
    Discard,
    /// Anything at all (a physical sector damaged while nothing protected it).
    Garbage,
}

/// How the agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKind {
    /// kill -9: every acked write survives.
    Kill,
    /// Power cut: every flushed write survives.
    Power,
}

#[derive(Clone, Debug)]
struct Version {
    op: u32,
    mask: u8,
    kind: Kind,
    lo: Time,
    hi: Time,
    /// Sectors seen since the last crash that put them at risk.
    seen: u8,
    /// Sectors known to be lost.
    lost: u8,
    /// Crashes that it is known to have survived.
    survived: usize,
}

#[derive(Clone, Debug)]
struct Op {
    submitted: u64,
    acked: Option<u64>,
    durable: Option<u64>,
    /// Perhaps not journaled: its sectors are lost one by one.
    weak: bool,
    /// Written straight to a disk whose sync failed since: no later flush makes it durable.
    forgotten: bool,
    block: u64,
    blocks: u64,
}

#[derive(Clone, Debug)]
struct Revert {
    id: u32,
    lo: Time,
    hi: Time,
    target: u64,
    /// Number of the group's revert that it is part of; 0: alone.
    group: u64,
}

impl Revert {
    /// Neither answered nor cut off.
    fn is_pending(&self) -> bool {
        self.hi.0 == u64::MAX
    }
}

#[derive(Clone, Debug)]
struct Crash {
    event: u64,
    kind: CrashKind,
    /// The cut lies after this …
    after: Time,
    /// … and before this.
    before: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Alive,
    Maybe,
    Lost,
}

/// A write that a read may show: its place in the block's list (`None`: the initial content), and the epochs that the read
/// fell through, with the instant at which it looked into each.
struct Candidate {
    version: Option<usize>,
    path: Vec<(usize, Time, Time)>,
}

/// Whether it certainly took place: it was acknowledged, or seen after a crash.
fn existed(version: &Version, op: &Op) -> bool {
    op.acked.is_some() || version.survived > 0
}

/// One possible history of one volume.
#[derive(Clone)]
pub struct Model {
    volume: u32,
    initial: Vec<bool>,
    blocks: Vec<Vec<Version>>,
    order: Vec<BTreeSet<(u32, u32)>>,
    ops: Vec<Op>,
    /// In the order in which they were made; those that are pending last.
    reverts: Vec<Revert>,
    reverts_begun: u32,
    crashes: Vec<Crash>,
    /// Blocks of which nothing is known up to an instant.
    ruined: BTreeMap<u64, u64>,
    event: u64,
}

impl Model {
    /// A volume of `sectors`; `initial` says of each block whether it holds stamps of operation 0 (else zeroes).
    pub fn new(volume: u32, sectors: u64, initial: Vec<bool>) -> Self {
        let blocks = sectors.div_ceil(8) as usize;
        let first =
            Op { submitted: 0, acked: Some(0), durable: Some(0), weak: false, forgotten: false, block: 0, blocks: 0 };
        Self {
            volume,
            initial,
            blocks: vec![Vec::new(); blocks],
            order: vec![BTreeSet::new(); blocks],
            ops: vec![first],
            reverts: Vec::new(),
            reverts_begun: 0,
            crashes: Vec::new(),
            ruined: BTreeMap::new(),
            event: 1,
        }
    }

    /// The place on the time line of something that happens now.
    pub fn now(&mut self, previous: u64) -> Time {
        self.event += 1;
        Time(previous, self.event)
    }

    /// A client calls: the operation's number.
    pub fn begin(&mut self, kind: Kind, sector: u64, count: u64, weak: bool, now: Time) -> u32 {
        let op = self.ops.len() as u32;
        let (block, end) = (sector / 8, (sector + count).div_ceil(8));
        for b in block..end {
            let first = sector.max(b * 8) - b * 8;
            let last = (sector + count).min(b * 8 + 8) - b * 8;
            let mask = (((1u16 << (last - first)) - 1) << first) as u8;
            let hi = Time(u64::MAX, u64::MAX);
            self.blocks[b as usize].push(Version { op, mask, kind, lo: now, hi, seen: 0, lost: 0, survived: 0 });
        }
        self.ops.push(Op {
            submitted: now.1,
            acked: None,
            durable: None,
            weak,
            forgotten: false,
            block,
            blocks: end - block,
        });
        op
    }

    /// The operation was acknowledged. `weak`: perhaps not journaled.
    pub fn ack(&mut self, op: u32, weak: bool, now: Time) {
        self.ops[op as usize].acked = Some(now.1);
        self.ops[op as usize].weak |= weak;
        self.for_versions(op, |version| version.hi = version.hi.min(now));
    }

    /// A flush that began when the model's counter stood at `began` was acknowledged. It covers also what a crash before it cut off and left. Answers how many
    /// operations are durable by it.
    pub fn flushed(&mut self, began: Time, now: Time) -> usize {
        let crashed = self.crashes.last().map_or(0, |crash| crash.event);
        let mut count = 0;
        for op in &mut self.ops {
            let covered = op.acked.is_some_and(|acked| acked <= began.1) || op.submitted < crashed;
            if op.durable.is_none() && !op.forgotten && covered {
                op.durable = Some(now.1);
                count += 1;
            }
        }
        count
    }

    /// The operation itself is durable (FUA).
    pub fn durable(&mut self, op: u32, now: Time) {
        self.ops[op as usize].durable.get_or_insert(now.1);
    }

    /// A sync of the plain disk failed, and somebody was told: what it should have covered may never become durable.
    pub fn sync_failed(&mut self) {
        self.ops.iter_mut().filter(|op| op.weak && op.durable.is_none()).for_each(|op| op.forgotten = true);
    }

    /// The disk itself lost a block: it could not be read, a part of it was overwritten, and the power went. Nothing is known of it up to now, and what is
    /// there now is anything; what is written from now on is judged again.
    pub fn ruin(&mut self, block: u64, now: Time) {
        self.ruined.insert(block, now.0);
        if (block as usize) < self.blocks.len() {
            self.settled(Kind::Garbage, block * 8, 8, now);
        }
    }

    /// Whether nothing is known of what a read shows: of an instant before the block was lost, or from there by a revert.
    fn is_ruined(&self, block: u64, when: When) -> bool {
        let Some(lost) = self.ruined.get(&block) else { return false };
        let back = |revert: &Revert| revert.target <= *lost && revert.hi.0 >= *lost;
        matches!(when, When::At(instant) if instant <= *lost) || self.reverts.iter().any(back)
    }

    /// What was not flushed went to the disk out of the journal's order: it is lost sector by sector from now on. Where the power stayed, what was not
    /// acknowledged is: what was is in the journal, and redone, if over a part of a block that such a write had reached.
    pub fn unordered(&mut self, power: bool) {
        let unordered = self.ops.iter_mut().filter(|op| if power { op.durable.is_none() } else { op.acked.is_none() });
        unordered.for_each(|op| op.weak = true);
    }

    /// A revert is asked for: its number.
    pub fn revert_begin(&mut self, target: u64, now: Time) -> u32 {
        self.reverts_begun += 1;
        let id = self.reverts_begun;
        self.reverts.push(Revert { id, lo: now, hi: Time(u64::MAX, u64::MAX), target, group: 0 });
        id
    }

    /// The revert is part of a group's.
    pub fn revert_in_group(&mut self, id: u32, group: u64) {
        if let Some(revert) = self.reverts.iter_mut().find(|revert| revert.id == id) {
            revert.group = group;
        }
    }

    /// The revert took place at `instant`, and is answered.
    pub fn revert_done(&mut self, id: u32, instant: u64) -> Result<(), String> {
        let mut revert = self.take_revert(id).ok_or("a revert that was not begun")?;
        if instant <= revert.lo.0 {
            return Err(format!(
                "revert at {instant}, not after it was asked for and the one before it was made: {:?}",
                revert.lo
            ));
        }
        let at = Time(instant, revert.lo.1);
        (revert.lo, revert.hi) = (at, at);
        self.put_revert(revert);
        // One of them is made only when the one before it is answered.
        self.reverts.iter_mut().filter(|other| other.is_pending()).for_each(|other| other.lo = other.lo.max(at));
        Ok(())
    }

    /// The revert was refused.
    pub fn revert_refused(&mut self, id: u32) {
        self.take_revert(id);
    }

    /// The revert took place at some time before now.
    pub fn revert_happened(&mut self, id: u32, now: Time) {
        if let Some(mut revert) = self.take_revert(id) {
            revert.hi = revert.hi.min(now);
            self.put_revert(revert);
        }
    }

    fn take_revert(&mut self, id: u32) -> Option<Revert> {
        let place = self.reverts.iter().position(|revert| revert.id == id)?;
        Some(self.reverts.remove(place))
    }

    /// Puts one that was made before those that are pending.
    fn put_revert(&mut self, revert: Revert) {
        let place = self.reverts.iter().position(Revert::is_pending).unwrap_or(self.reverts.len());
        self.reverts.insert(place, revert);
    }

    fn pending(&self) -> Vec<u32> {
        self.reverts.iter().filter(|revert| revert.is_pending()).map(|revert| revert.id).collect()
    }

    /// Of those that are pending at most this one was made.
    fn keep_pending(&mut self, id: Option<u32>) {
        self.reverts.retain(|revert| !revert.is_pending() || Some(revert.id) == id);
    }

    /// The agent died.
    pub fn crash(&mut self, kind: CrashKind, physical_bytes: u64, now: Time) {
        let mut after = Time::default();
        for block in &self.blocks {
            for version in block {
                let op = &self.ops[version.op as usize];
                let safe = op.durable.is_some() || (kind == CrashKind::Kill && op.acked.is_some());
                if safe && !op.weak && version.lost == 0 {
                    after = after.max(version.lo);
                }
            }
        }
        // A revert is durable when it returns; a pending one that happened is too (this world assumes that it did).
        for revert in &self.reverts {
            after = after.max(if revert.lo == revert.hi { Time(revert.lo.0, 0) } else { revert.lo });
        }
        for versions in &mut self.blocks {
            for version in versions.iter_mut() {
                let op = &self.ops[version.op as usize];
                version.hi = version.hi.min(now);
                let safe = op.durable.is_some() || (kind == CrashKind::Kill && op.acked.is_some());
                if !safe {
                    version.seen = 0;
                }
            }
        }
        if let Some(revert) = self.reverts.last_mut() {
            revert.hi = revert.hi.min(now);
        }
        self.crashes.push(Crash { event: now.1, kind, after, before: now });
        if kind != CrashKind::Kill {
            self.damage_unprotected(physical_bytes, now);
            // What this cut left is on the disks: no later one may take it, or damage it again.
            for op in &mut self.ops {
                op.durable.get_or_insert(now.1);
            }
        }
    }

    /// Where nothing protected an unaligned write, the power cut may have damaged the physical sector around it.
    fn damage_unprotected(&mut self, physical_bytes: u64, now: Time) {
        if physical_bytes <= SECTOR as u64 {
            return;
        }
        let group = (physical_bytes / 4096).max(1) as usize;
        let mut damaged = BTreeSet::new();
        for (block, versions) in self.blocks.iter().enumerate() {
            for version in versions {
                let op = &self.ops[version.op as usize];
                let whole = version.mask == 0xff && group == 1;
                if op.weak && op.durable.is_none() && !whole && version.kind != Kind::Garbage {
                    damaged.extend(block / group * group..(block / group + 1) * group);
                }
            }
        }
        let blocks = self.blocks.len();
        for block in damaged.into_iter().filter(|block| *block < blocks) {
            self.settled(Kind::Garbage, block as u64 * 8, 8, now);
        }
    }

    /// Judges what a read from `sector` on gave.
    pub fn check(&mut self, sector: u64, bytes: &[u8], when: When) -> Result<(), String> {
        for (i, chunk) in bytes.chunks_exact(SECTOR).enumerate() {
            let at = sector + i as u64;
            if self.is_ruined(at / 8, when) {
                continue;
            }
            let value = decode(self.volume, at, chunk);
            self.check_sector(at, &value, when).map_err(|text| {
                let within = format!("sector {at} (block {}, sector {} of it)", at / 8, at % 8);
                format!("volume {} {when:?}: {within}: {text}", self.volume)
            })?;
        }
        Ok(())
    }

    /// Forgets everything and takes the bytes for the initial state, if each sector is something that was once there.
    pub fn rebase(&mut self, sector: u64, bytes: &[u8], now: Time) -> Result<(), String> {
        for (i, chunk) in bytes.chunks_exact(SECTOR).enumerate() {
            let at = sector + i as u64;
            let value = decode(self.volume, at, chunk);
            if !self.once_there(at, &value, now) {
                return Err(format!("volume {}: sector {at}: {value:?} was never there", self.volume));
            }
            let (block, bit) = ((at / 8) as usize, 1u8 << (at % 8));
            for version in &mut self.blocks[block] {
                if value != Value::Stamp(version.op) {
                    version.lost |= bit;
                } else {
                    version.seen |= bit;
                    version.lost &= !bit;
                }
            }
            match value {
                Value::Zero => self.settled(Kind::Zero, at, 1, now),
                Value::Other(_) => self.settled(Kind::Garbage, at, 1, now),
                Value::Stamp(_) => {}
            }
        }
        self.reverts.clear();
        Ok(())
    }

    /// Something that is there from `now` on, and durable.
    fn settled(&mut self, kind: Kind, sector: u64, count: u64, now: Time) {
        let op = self.begin(kind, sector, count, false, now);
        let after = self.now(now.0);
        self.ops[op as usize].acked = Some(after.1);
        self.ops[op as usize].durable = Some(after.1);
        self.for_versions(op, |version| version.hi = after);
    }

    fn check_sector(&mut self, sector: u64, value: &Value, when: When) -> Result<(), String> {
        let (block, bit) = ((sector / 8) as usize, 1u8 << (sector % 8));
        let (t1, t2) = when.bounds();
        let mut candidates = Vec::new();
        for epoch in self.epochs(t1, t2) {
            self.collect(block, bit, epoch, t1, t2, &mut Vec::new(), &mut candidates);
        }
        let mut hits = candidates.iter().filter(|candidate| self.shows(block, bit, sector, candidate, value, t2));
        let first = hits.next();
        let unique = hits.next().is_none();
        match first {
            None => Err(self.explain(block, bit, &candidates, value)),
            Some(hit) if unique => {
                let (version, path) = (hit.version, hit.path.clone());
                self.learn(block, bit, version, &path, matches!(when, When::At(_)))
            }
            Some(_) => Ok(()),
        }
    }

    /// Epochs (0: before any revert) that a read between the two may fall into.
    fn epochs(&self, t1: Time, t2: Time) -> Vec<usize> {
        let certain = self.reverts.iter().rposition(|revert| revert.hi <= t1).map_or(0, |i| i + 1);
        let mut epochs = vec![certain];
        epochs.extend((certain..self.reverts.len()).filter(|i| self.reverts[*i].lo < t2).map(|i| i + 1));
        epochs
    }

    #[allow(clippy::too_many_arguments)]
    fn collect(
        &self,
        block: usize,
        bit: u8,
        epoch: usize,
        t1: Time,
        t2: Time,
        path: &mut Vec<(usize, Time, Time)>,
        out: &mut Vec<Candidate>,
    ) {
        path.push((epoch, t1, t2));
        let (start_lo, _) = self.start(epoch);
        let versions = &self.blocks[block];
        let covering: Vec<Time> = (0..versions.len())
            .filter(|i| self.covers(block, *i, bit, epoch, (t1, t2)))
            .map(|i| versions[i].lo)
            .collect();
        let newest = covering.iter().max().copied();
        for (i, version) in versions.iter().enumerate() {
            let possible = version.mask & bit != 0 && version.hi > start_lo && version.lo < t2;
            if possible && newest.is_none_or(|lo| lo < version.hi) && self.fate(version, bit) != Fate::Lost {
                out.push(Candidate { version: Some(i), path: path.clone() });
            }
        }
        if newest.is_none() {
            if epoch == 0 {
                out.push(Candidate { version: None, path: path.clone() });
            } else {
                let (t1, t2) = When::At(self.reverts[epoch - 1].target).bounds();
                for lower in self.epochs(t1, t2).into_iter().filter(|lower| *lower < epoch) {
                    self.collect(block, bit, lower, t1, t2, path, out);
                }
            }
        }
        path.pop();
    }

    fn start(&self, epoch: usize) -> (Time, Time) {
        if epoch == 0 { Default::default() } else { (self.reverts[epoch - 1].lo, self.reverts[epoch - 1].hi) }
    }

    /// Whether the version is certainly part of what a read in `epoch` shows, or has been covered there.
    fn covers(&self, block: usize, i: usize, bit: u8, epoch: usize, (t1, t2): (Time, Time)) -> bool {
        let version = &self.blocks[block][i];
        version.mask & bit != 0
            && version.hi <= t1
            && version.lo < t2
            && version.lo >= self.start(epoch).1
            && self.fate(version, bit) == Fate::Alive
    }

    fn fate(&self, version: &Version, bit: u8) -> Fate {
        if version.lost & bit != 0 {
            return Fate::Lost;
        }
        if version.seen & bit != 0 {
            return Fate::Alive;
        }
        let op = &self.ops[version.op as usize];
        let mut fate = if existed(version, op) { Fate::Alive } else { Fate::Maybe };
        for crash in &self.crashes[version.survived..] {
            if crash.event <= op.submitted {
                continue;
            }
            if !op.weak && version.lo >= crash.before {
                return Fate::Lost;
            }
            if !self.survives(version, op, crash) {
                fate = Fate::Maybe;
            }
        }
        fate
    }

    fn survives(&self, version: &Version, op: &Op, crash: &Crash) -> bool {
        (crash.kind == CrashKind::Kill && op.acked.is_some_and(|acked| acked < crash.event))
            || op.durable.is_some_and(|durable| durable < crash.event)
            || (!op.weak && existed(version, op) && version.hi <= crash.after)
    }

    fn shows(&self, block: usize, bit: u8, sector: u64, candidate: &Candidate, value: &Value, t2: Time) -> bool {
        let Some(i) = candidate.version else {
            return *value == if self.initial[block] { Value::Stamp(0) } else { Value::Zero };
        };
        let version = &self.blocks[block][i];
        debug_assert!(version.mask & bit != 0);
        match version.kind {
            Kind::Data => *value == Value::Stamp(version.op),
            Kind::Zero => *value == Value::Zero,
            Kind::Discard => self.once_there(sector, value, t2),
            Kind::Garbage => true,
        }
    }

    /// Whether the value was ever in the sector before `t2`.
    fn once_there(&self, sector: u64, value: &Value, t2: Time) -> bool {
        let (block, bit) = ((sector / 8) as usize, 1u8 << (sector % 8));
        match value {
            Value::Zero => true,
            Value::Stamp(0) => self.initial[block],
            Value::Stamp(op) => {
                self.blocks[block].iter().any(|version| version.op == *op && version.mask & bit != 0 && version.lo < t2)
            }
            Value::Other(_) => self.blocks[block].iter().any(|version| version.kind == Kind::Garbage),
        }
    }

    /// Draws the conclusions of a read that showed `hit` and nothing else.
    fn learn(
        &mut self,
        block: usize,
        bit: u8,
        hit: Option<usize>,
        path: &[(usize, Time, Time)],
        view: bool,
    ) -> Result<(), String> {
        let (_, t1, t2) = *path.last().expect("a path has its first epoch");
        if let Some(i) = hit {
            if !matches!(self.blocks[block][i].kind, Kind::Data | Kind::Zero) {
                return Ok(());
            }
            self.survivor(block, i, bit, if view || path.len() > 1 { t1 } else { t2 })?;
        }
        let hit_hi = hit.map(|i| self.blocks[block][i].hi);
        let hit_lo = hit.map(|i| self.blocks[block][i].lo);
        let hit_op = hit.map(|i| self.blocks[block][i].op);
        for (depth, (epoch, t1, _)) in path.iter().enumerate() {
            let deepest = depth + 1 == path.len();
            for i in 0..self.blocks[block].len() {
                let version = &self.blocks[block][i];
                let belongs = version.mask & bit != 0 && version.lo >= self.start(*epoch).1;
                if Some(i) == hit || !belongs || matches!(version.kind, Kind::Discard | Kind::Garbage) {
                    continue;
                }
                let after_hit = !deepest || hit_hi.is_none_or(|hi| version.lo >= hi);
                let fate = self.fate(version, bit);
                if version.hi <= *t1 && fate == Fate::Maybe && after_hit {
                    self.casualty(block, i, bit)?;
                } else if version.hi <= *t1 && fate == Fate::Alive && deepest {
                    if hit_lo.is_none_or(|lo| lo < version.hi) {
                        self.ordered(block, version.op, hit_op)?;
                    }
                } else if version.hi > *t1 && fate == Fate::Alive && after_hit && (view || depth > 0) {
                    let version = &mut self.blocks[block][i];
                    version.lo = version.lo.max(*t1);
                    if version.lo >= version.hi {
                        return Err(format!("op {} is in no view that it could be in", version.op));
                    }
                }
            }
        }
        Ok(())
    }

    /// A version was seen: it happened by `by`, and survived every crash so far.
    fn survivor(&mut self, block: usize, i: usize, bit: u8, by: Time) -> Result<(), String> {
        let version = &self.blocks[block][i];
        let op = &self.ops[version.op as usize];
        let (id, lo, weak, submitted) = (version.op, version.lo, op.weak, op.submitted);
        let known = version.seen & bit != 0;
        let survived = version.survived;
        let crashes = self.crashes.len();
        {
            let version = &mut self.blocks[block][i];
            if !weak {
                // On a plain disk a write that is seen may still be overtaken by one that came later.
                version.hi = version.hi.min(by);
            }
            version.seen |= if weak { bit } else { 0xff };
            if !weak {
                version.survived = crashes;
            }
        }
        if known || weak {
            return Ok(());
        }
        for crash in self.crashes[survived..].iter_mut().filter(|crash| crash.event > submitted) {
            crash.after = crash.after.max(lo);
            if crash.before <= crash.after {
                return Err(format!("op {id} survived a {:?} crash that lost an earlier write: {crash:?}", crash.kind));
            }
        }
        Ok(())
    }

    /// A version should be seen and is not: a crash took it.
    fn casualty(&mut self, block: usize, i: usize, bit: u8) -> Result<(), String> {
        let version = &self.blocks[block][i];
        let op = &self.ops[version.op as usize];
        let (id, hi) = (version.op, version.hi);
        if op.weak {
            self.blocks[block][i].lost |= bit;
            return Ok(());
        }
        let existed = existed(version, op);
        let doubtful: Vec<usize> = (version.survived..self.crashes.len())
            .filter(|c| self.crashes[*c].event > op.submitted && !self.survives(version, op, &self.crashes[*c]))
            .collect();
        self.blocks[block][i].lost = 0xff;
        if let ([only], true) = (doubtful.as_slice(), existed) {
            let crash = &mut self.crashes[*only];
            crash.before = crash.before.min(hi);
            if crash.before <= crash.after {
                return Err(format!(
                    "op {id} is lost in a {:?} crash that a later write survived: {crash:?}",
                    crash.kind
                ));
            }
        }
        Ok(())
    }

    /// `earlier` and `later` are both in the past of a read that shows `later`.
    fn ordered(&mut self, block: usize, earlier: u32, later: Option<u32>) -> Result<(), String> {
        let Some(later) = later else {
            return Err(format!("op {earlier} is certainly there and not seen"));
        };
        if self.ops[earlier as usize].weak || self.ops[later as usize].weak {
            // Straight on a disk, overlapping writes may win sector by sector.
            return Ok(());
        }
        if self.order[block].contains(&(later, earlier)) {
            return Err(format!("op {earlier} before op {later}, but another read showed the other order"));
        }
        self.order[block].insert((earlier, later));
        Ok(())
    }

    fn explain(&self, block: usize, bit: u8, candidates: &[Candidate], value: &Value) -> String {
        let name = |i: Option<usize>| match i {
            None => "the initial content".to_owned(),
            Some(i) => {
                let v = &self.blocks[block][i];
                let op = &self.ops[v.op as usize];
                format!(
                    "op {} {:?} ({:?}, {:?}] acked {} durable {} weak {} {:?}",
                    v.op,
                    v.kind,
                    v.lo,
                    v.hi,
                    op.acked.is_some(),
                    op.durable.is_some(),
                    op.weak,
                    self.fate(v, bit)
                )
            }
        };
        let allowed: Vec<String> = candidates.iter().map(|candidate| name(candidate.version)).collect();
        let actual = match value {
            Value::Stamp(op) if *op > 0 => name(self.blocks[block].iter().position(|version| version.op == *op)),
            other => format!("{other:?}"),
        };
        let mut text = format!("read {actual}; allowed: {}", allowed.join(" | "));
        for revert in &self.reverts {
            text.push_str(&format!("; revert ({:?}, {:?}] to {}", revert.lo, revert.hi, revert.target));
        }
        for crash in &self.crashes {
            text.push_str(&format!("; {:?} crash cut in ({:?}, {:?})", crash.kind, crash.after, crash.before));
        }
        text
    }

    fn for_versions(&mut self, op: u32, change: impl Fn(&mut Version)) {
        let Op { block, blocks, .. } = self.ops[op as usize];
        for b in block..block + blocks {
            if let Some(version) = self.blocks[b as usize].iter_mut().rfind(|version| version.op == op) {
                change(version);
            }
        }
    }
}

/// All histories of a volume that are still possible.
#[derive(Clone)]
pub struct Oracle {
    worlds: Vec<Model>,
}

impl Oracle {
    /// See [`Model::new`].
    pub fn new(volume: u32, sectors: u64, initial: Vec<bool>) -> Self {
        Self { worlds: vec![Model::new(volume, sectors, initial)] }
    }
    /// See [`Model::now`].
    pub fn now(&mut self, previous: u64) -> Time {
        self.all(|world| world.now(previous))
    }
    /// See [`Model::begin`].
    pub fn begin(&mut self, kind: Kind, sector: u64, count: u64, weak: bool, now: Time) -> u32 {
        self.all(|world| world.begin(kind, sector, count, weak, now))
    }
    /// See [`Model::ack`].
    pub fn ack(&mut self, op: u32, weak: bool, now: Time) {
        self.all(|world| world.ack(op, weak, now));
    }
    /// See [`Model::flushed`].
    pub fn flushed(&mut self, began: Time, now: Time) -> usize {
        self.all(|world| world.flushed(began, now))
    }
    /// See [`Model::durable`].
    pub fn durable(&mut self, op: u32, now: Time) {
        self.all(|world| world.durable(op, now));
    }
    /// See [`Model::sync_failed`].
    pub fn sync_failed(&mut self) {
        self.all(Model::sync_failed);
    }
    /// See [`Model::ruin`].
    pub fn ruin(&mut self, block: u64, now: Time) {
        self.all(|world| world.ruin(block, now));
    }
    /// See [`Model::unordered`].
    pub fn unordered(&mut self, power: bool) {
        self.all(|world| world.unordered(power));
    }
    /// See [`Model::revert_begin`].
    pub fn revert_begin(&mut self, target: u64, now: Time) -> u32 {
        self.all(|world| world.revert_begin(target, now))
    }
    /// See [`Model::revert_in_group`].
    pub fn revert_in_group(&mut self, id: u32, group: u64) {
        self.all(|world| world.revert_in_group(id, group));
    }
    /// Whether a group's revert happened here; `None`: both are still possible.
    pub fn reverted_in_group(&self, group: u64) -> Option<bool> {
        let happened = |world: &Model| world.reverts.iter().any(|revert| revert.group == group);
        let first = happened(&self.worlds[0]);
        self.worlds.iter().all(|world| happened(world) == first).then_some(first)
    }
    /// It happened, or did not, as another member of the group has shown.
    pub fn settle_group(&mut self, group: u64, happened: bool) {
        self.worlds.retain(|world| world.reverts.iter().any(|revert| revert.group == group) == happened);
    }
    /// See [`Model::revert_done`].
    pub fn revert_done(&mut self, id: u32, instant: u64) -> Result<(), String> {
        self.judge(|world| world.revert_done(id, instant))
    }
    /// See [`Model::revert_refused`].
    pub fn revert_refused(&mut self, id: u32) {
        self.all(|world| world.revert_refused(id));
    }
    /// The call failed in the middle: the revert happened or did not.
    pub fn revert_uncertain(&mut self, id: u32, now: Time) {
        let mut others = self.worlds.clone();
        others.iter_mut().for_each(|world| world.revert_refused(id));
        self.all(|world| world.revert_happened(id, now));
        self.worlds.extend(others);
    }
    /// See [`Model::crash`]. A revert in flight happened or did not; of several at most one did.
    pub fn crash(&mut self, kind: CrashKind, physical_bytes: u64, now: Time) {
        let mut others = Vec::new();
        for world in &mut self.worlds {
            let pending = world.pending();
            let instead = pending.iter().skip(1).map(|id| Some(*id)).chain(pending.first().map(|_| None));
            for made in instead {
                let mut other = world.clone();
                other.keep_pending(made);
                others.push(other);
            }
            world.keep_pending(pending.first().copied());
        }
        self.worlds.extend(others);
        self.all(|world| world.crash(kind, physical_bytes, now));
    }
    /// See [`Model::check`].
    pub fn check(&mut self, sector: u64, bytes: &[u8], when: When) -> Result<(), String> {
        self.judge(|world| world.check(sector, bytes, when))
    }
    /// See [`Model::rebase`].
    pub fn rebase(&mut self, sector: u64, bytes: &[u8], now: Time) -> Result<(), String> {
        self.judge(|world| world.rebase(sector, bytes, now))
    }
    /// Histories still possible.
    pub fn worlds(&self) -> usize {
        self.worlds.len()
    }

    fn all<T>(&mut self, mut change: impl FnMut(&mut Model) -> T) -> T {
        let mut last = None;
        for world in &mut self.worlds {
            last = Some(change(world));
        }
        last.expect("a violation is reported before the last world goes")
    }

    /// Keeps the worlds that agree; an error when none does.
    fn judge(&mut self, mut change: impl FnMut(&mut Model) -> Result<(), String>) -> Result<(), String> {
        let mut why = None;
        let mut agreeing = Vec::new();
        for mut world in std::mem::take(&mut self.worlds) {
            match change(&mut world) {
                Ok(()) => agreeing.push(world),
                Err(text) => {
                    why.get_or_insert((text, world));
                }
            }
        }
        self.worlds = agreeing;
        match (self.worlds.is_empty(), why) {
            (true, Some((text, world))) => {
                self.worlds.push(world);
                Err(text)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
