//! What each sector may hold, now or at an instant, given what was sent, what was acked and when.
//!
//! A write is *certainly in* a state that is taken after its ack, *certainly not in* one taken before it was sent, and may be
//! either in between. Where two writes were in flight at the same time, or one was cut off by a crash, more than one content
//! is right, until somebody has looked: [`Oracle::settle`] pins what was seen, so that it can never come back different.
//! A revert is a write of old content to the whole volume. A discarded block reads as what it held or as zeroes, now one and
//! now the other, until it is written again.
//!
//! Every sector says which write it comes from, so a wrong one names its origin.

use std::collections::{HashMap, HashSet};

use crate::now_ns;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// A write of at most this many bytes is expected to be in a view whole or not at all.
pub const ATOMIC_BYTES_MAX: u64 = 64 << 10;

const MAGIC: u32 = 0xC0DA_7A5E;

/// Index of an operation.
pub type OpId = u32;

/// Zeroes: what a fresh volume, or a write of zeroes, holds.
const ZEROES: u32 = 0;
/// Bytes of a block: a discard takes whole ones only.
const BLOCK: u64 = 4096;

#[derive(Clone, Copy, Debug)]
struct Op {
    /// Wall clock before it was sent.
    submit: u64,
    /// Wall clock after its ack (`u64::MAX`: none came).
    ack: u64,
    /// After this it has happened or never will.
    end: u64,
    first: u32,
    sectors: u32,
    /// Its ack said that it is durable.
    durable: bool,
}

#[derive(Clone, Copy, Debug)]
struct Version {
    op: OpId,
    content: u32,
    /// By a discard: what was there before it is as right as this.
    discard: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Oracle {
    seed: u32,
    ops: Vec<Op>,
    sectors: Vec<Vec<Version>>,
    /// Flushes that were acked: when each was sent, and when its ack came.
    flushes: Vec<(u64, u64)>,
    reverts: Vec<OpId>,
}

impl Oracle {
    /// For a volume of `size` bytes that reads as zeroes.
    pub fn new(seed: u64, size: u64) -> Self {
        let sectors = usize::try_from(size).expect("fits memory") / SECTOR;
        // Operation 0 never happens: its number means zeroes.
        let nothing = Op { submit: 0, ack: 0, end: 0, first: 0, sectors: 0, durable: false };
        let seed = u32::try_from(seed & 0xFFFF_FFFF).expect("32 bits");
        Self { seed, ops: vec![nothing], sectors: vec![Vec::new(); sectors], flushes: Vec::new(), reverts: Vec::new() }
    }

    /// Bytes of the volume.
    pub fn size(&self) -> u64 {
        (self.sectors.len() * SECTOR) as u64
    }

    /// Operations so far.
    pub fn ops(&self) -> usize {
        self.ops.len() - 1
    }

    /// Notes a write that is about to be sent; its data come from [`Oracle::data`].
    pub fn begin_write(&mut self, offset: u64, len: u64) -> OpId {
        let op = self.push(offset, len);
        self.add_versions(op, op, false);
        op
    }

    /// Notes a write of zeroes that is about to be sent.
    pub fn begin_zeroes(&mut self, offset: u64, len: u64) -> OpId {
        let op = self.push(offset, len);
        self.add_versions(op, ZEROES, false);
        op
    }

    /// Notes a discard that is about to be sent.
    pub fn begin_discard(&mut self, offset: u64, len: u64) -> OpId {
        let (start, end) = (offset.next_multiple_of(BLOCK), (offset + len) / BLOCK * BLOCK);
        let op = self.push(start, end.saturating_sub(start));
        self.add_versions(op, ZEROES, true);
        op
    }

    /// Notes the ack of an operation, just received.
    pub fn ack(&mut self, op: OpId) {
        let now = now_ns();
        let op = &mut self.ops[op as usize];
        op.ack = now;
        op.end = now;
    }

    /// Notes that an operation that carried FUA was acked, just now.
    pub fn ack_durable(&mut self, op: OpId) {
        self.ack(op);
        self.ops[op as usize].durable = true;
    }

    /// Notes the ack of a flush that was sent at `submit`.
    pub fn flushed(&mut self, submit: u64) {
        self.flushes.push((submit, now_ns()));
    }

    /// Checks what a power cut at `cut` left: what was flushed is there, nothing that was sent later is, and of the rest a prefix
    /// in the order of the journal: a write that is there has all those with it that were acked before it was sent. Small
    /// writes are there whole. A revert that was in flight happened, or did not. Answers the time up to which everything acked
    /// is known to be there.
    pub fn check_power_cut(&self, image: &[u8], cut: u64) -> Result<u64, String> {
        if image.len() as u64 != self.size() {
            return Err(format!("an image of {} bytes, expected {}", image.len(), self.size()));
        }
        let in_flight = |revert: &&OpId| {
            let op = self.ops[**revert as usize];
            op.submit <= cut && op.ack > cut
        };
        let Some(&revert) = self.reverts.iter().find(in_flight) else { return self.check_cut(image, cut, None) };
        self.check_cut(image, cut, Some((revert, true))).or_else(|with| {
            let without = self.check_cut(image, cut, Some((revert, false)));
            without.map_err(|without| format!("as if the revert had happened: {with}; as if it had not: {without}"))
        })
    }

    /// The same where it is known of the revert in flight whether it happened.
    fn check_cut(&self, image: &[u8], cut: u64, revert: Option<(OpId, bool)>) -> Result<u64, String> {
        let shown: HashSet<u32> = image.chunks_exact(SECTOR).map(decode).collect();
        let known = |content: &&u32| (**content as usize) < self.ops.len() && **content != ZEROES;
        let newest = shown.iter().filter(known).map(|op| self.ops[*op as usize].submit).filter(|at| *at <= cut).max();
        let flushed = self.flushes.iter().filter(|(_, ack)| *ack <= cut).map(|(submit, _)| *submit).max();
        // A revert is in the journal behind everything that was acked before it was sent.
        let reverted = revert.filter(|(_, happened)| *happened).map(|(id, _)| self.ops[id as usize].submit);
        let safe = newest.max(flushed).max(reverted).unwrap_or(0);
        let certain = |id: OpId| {
            let op = self.ops[id as usize];
            let whole = u64::from(op.sectors) * SECTOR as u64 <= ATOMIC_BYTES_MAX;
            let seen = whole && id != ZEROES && shown.contains(&id);
            op.ack <= safe || op.durable && op.ack <= cut || seen || revert == Some((id, true))
        };
        let mut expected = [0; SECTOR];
        for (sector, bytes) in image.chunks_exact(SECTOR).enumerate() {
            let versions = &self.sectors[sector];
            let floor = versions.iter().filter(|v| !v.discard && certain(v.op)).map(|v| self.ops[v.op as usize].submit);
            let floor = floor.max().unwrap_or(0);
            let content = decode(bytes);
            let possible = floor == 0 && content == ZEROES
                || versions.iter().any(|v| {
                    let op = self.ops[v.op as usize];
                    v.content == content && op.submit <= cut && op.end >= floor && revert != Some((v.op, false))
                });
            expected.fill(0);
            if content != ZEROES {
                fill(self.seed, content, u32::try_from(sector).expect("a small volume"), &mut expected);
            }
            if !possible || bytes != expected {
                let what = self.describe(sector, bytes, bytes == expected, safe, cut);
                return Err(format!("a power cut at {cut}, everything acked by {safe} must be there: {what}"));
            }
        }
        Ok(safe)
    }

    /// Checks a view of `at` after a power cut, when everything acked by `safe` is known to be there.
    pub fn check_view_after_cut(&self, image: &[u8], at: u64, safe: u64) -> Result<(), String> {
        self.check_image(image, at.min(safe), at)
    }

    /// Checks that two images of the same state, which lies between `from` and `to`, differ at most where one of them has zeroes
    /// because of a discard.
    pub fn check_same(&self, one: &[u8], other: &[u8], from: u64, to: u64) -> Result<(), String> {
        if one.len() != other.len() {
            return Err(format!("images of {} and {} bytes", one.len(), other.len()));
        }
        let blank = [0_u8; SECTOR];
        for (sector, (one, other)) in one.chunks_exact(SECTOR).zip(other.chunks_exact(SECTOR)).enumerate() {
            let open = || (one == blank || other == blank) && self.discarded(sector, from, to);
            if one != other && !open() {
                return Err(format!("sector {sector} was {:02x?} and is {:02x?}", &one[..32], &other[..32]));
            }
        }
        Ok(())
    }

    /// Notes that an operation was answered with an error: it may have happened in part, and nothing more will.
    pub fn fail(&mut self, op: OpId) {
        self.ops[op as usize].end = now_ns();
    }

    /// What the write `op` writes.
    pub fn data(&self, op: OpId) -> Vec<u8> {
        let Op { first, sectors, .. } = self.ops[op as usize];
        let mut out = vec![0; sectors as usize * SECTOR];
        for (sector, bytes) in (first..).zip(out.chunks_exact_mut(SECTOR)) {
            fill(self.seed, op, sector, bytes);
        }
        out
    }

    /// Nothing that was sent can still happen: the agent is dead, or its connections were cut and their requests ended.
    pub fn cut(&mut self) {
        let now = now_ns();
        for op in &mut self.ops {
            op.end = op.end.min(now);
        }
    }

    /// Checks `data`, read from `offset` in the span of time from `from` to `to`. A view's span is its instant.
    pub fn check(&self, offset: u64, data: &[u8], from: u64, to: u64) -> Result<(), String> {
        self.contents(offset, data, from, to).map(drop)
    }

    /// Checks a whole image as [`Oracle::check`] does, and that no small write is in it by halves.
    pub fn check_image(&self, image: &[u8], from: u64, to: u64) -> Result<(), String> {
        if image.len() as u64 != self.size() {
            return Err(format!("an image of {} bytes, expected {}", image.len(), self.size()));
        }
        let contents = self.contents(0, image, from, to)?;
        self.check_whole(&contents)
    }

    /// Pins what `image`, read since `from`, shows wherever more than one content would be right, after checking it. What was
    /// discarded stays open: it may read otherwise the next time.
    /// No write may be in flight. Call [`Oracle::cut`] before reading it when some never got an answer.
    pub fn settle(&mut self, image: &[u8], from: u64) -> Result<usize, String> {
        let now = now_ns();
        self.check_image(image, from, now)?;
        let mut op = None;
        let mut pinned = 0;
        for (sector, bytes) in image.chunks_exact(SECTOR).enumerate() {
            if self.candidates(sector, from, now).nth(1).is_none() || self.discarded(sector, from, now) {
                continue;
            }
            let content = decode(bytes);
            let op = *op.get_or_insert_with(|| {
                self.ops.push(Op { submit: from, ack: now, end: now, first: 0, sectors: 0, durable: false });
                u32::try_from(self.ops.len() - 1).expect("fewer than 2^32 operations")
            });
            self.sectors[sector].push(Version { op, content, discard: false });
            pinned += 1;
        }
        Ok(pinned)
    }

    /// Notes a revert to `target`, sent at `submit` with nothing else in flight and answered now, that made the volume equal
    /// `image` (which the caller has checked as the view of the target). Its answer says that it is durable, and with it
    /// everything acked before.
    pub fn reverted(&mut self, image: &[u8], target: u64, submit: u64) {
        let now = now_ns();
        self.ops.push(Op { submit, ack: now, end: now, first: 0, sectors: 0, durable: true });
        let op = u32::try_from(self.ops.len() - 1).expect("fewer than 2^32 operations");
        for (sector, bytes) in image.chunks_exact(SECTOR).enumerate() {
            let shown = decode(bytes);
            // What a discard left open at the target is as open as before.
            let open: Vec<u32> = match self.discarded(sector, target, target) {
                true => self.candidates(sector, target, target).filter(|content| *content != shown).collect(),
                false => Vec::new(),
            };
            let versions = &mut self.sectors[sector];
            versions.push(Version { op, content: shown, discard: false });
            versions.extend(open.into_iter().map(|content| Version { op, content, discard: true }));
        }
        self.reverts.push(op);
        self.flushes.push((now, now));
    }

    fn push(&mut self, offset: u64, len: u64) -> OpId {
        let (first, sectors) = (offset / SECTOR as u64, len / SECTOR as u64);
        self.ops.push(Op {
            submit: now_ns(),
            ack: u64::MAX,
            end: u64::MAX,
            first: u32::try_from(first).expect("a small volume"),
            sectors: u32::try_from(sectors).expect("a small volume"),
            durable: false,
        });
        u32::try_from(self.ops.len() - 1).expect("fewer than 2^32 operations")
    }

    fn add_versions(&mut self, op: OpId, content: u32, discard: bool) {
        let Op { first, sectors, .. } = self.ops[op as usize];
        for versions in &mut self.sectors[first as usize..(first + sectors) as usize] {
            versions.push(Version { op, content, discard });
        }
    }

    /// The newest start of a write to `sector` that is certainly in from `from` on: whatever ended before it is gone.
    fn floor(&self, sector: usize, from: u64) -> u64 {
        let writes = self.sectors[sector].iter().filter(|v| !v.discard).map(|v| self.ops[v.op as usize]);
        writes.filter(|op| op.ack <= from).map(|op| op.submit).max().unwrap_or(0)
    }

    /// Whether `sector` may read in two ways in the span because of a discard.
    fn discarded(&self, sector: usize, from: u64, to: u64) -> bool {
        let floor = self.floor(sector, from);
        let mut discards = self.sectors[sector].iter().filter(|v| v.discard).map(|v| self.ops[v.op as usize]);
        discards.any(|op| op.submit <= to && op.end >= floor)
    }

    /// Contents that a read of `sector` in the span may give, without repetition.
    fn candidates(&self, sector: usize, from: u64, to: u64) -> impl Iterator<Item = u32> + '_ {
        let versions = &self.sectors[sector];
        let floor = self.floor(sector, from);
        let possible = move |version: &Version| {
            let op = self.ops[version.op as usize];
            op.submit <= to && op.end >= floor
        };
        let initial = (floor == 0).then_some(ZEROES);
        let mut seen: Vec<u32> = Vec::new();
        initial.into_iter().chain(versions.iter().filter(move |v| possible(v)).map(|v| v.content)).filter(
            move |content| {
                let new = !seen.contains(content);
                if new {
                    seen.push(*content);
                }
                new
            },
        )
    }

    fn contents(&self, offset: u64, data: &[u8], from: u64, to: u64) -> Result<Vec<u32>, String> {
        let first = usize::try_from(offset).expect("fits memory") / SECTOR;
        let mut contents = Vec::with_capacity(data.len() / SECTOR);
        let mut wrong = 0;
        let mut first_wrong = None;
        for (sector, bytes) in (first..).zip(data.chunks_exact(SECTOR)) {
            let content = decode(bytes);
            let mut expected = [0; SECTOR];
            if content != ZEROES {
                fill(self.seed, content, u32::try_from(sector).expect("a small volume"), &mut expected);
            }
            if bytes != expected || !self.candidates(sector, from, to).any(|candidate| candidate == content) {
                wrong += 1;
                if first_wrong.is_none() {
                    first_wrong = Some(self.describe(sector, bytes, bytes == expected, from, to));
                }
            }
            contents.push(content);
        }
        match first_wrong {
            None => Ok(contents),
            Some(text) => Err(format!("{wrong} of {} sectors are wrong; {text}", data.len() / SECTOR)),
        }
    }

    fn check_whole(&self, contents: &[u32]) -> Result<(), String> {
        let mut shown: HashMap<u32, usize> = HashMap::new();
        for (sector, content) in contents.iter().enumerate() {
            if *content != ZEROES {
                shown.entry(*content).or_insert(sector);
            }
        }
        // Pins and reverts bring back old contents; what they cover is judged by the version, not by the write.
        for (op_id, sector) in shown {
            let op = self.ops[op_id as usize];
            if u64::from(op.sectors) * SECTOR as u64 > ATOMIC_BYTES_MAX {
                continue;
            }
            let latest = self.latest_showing(sector, op_id);
            if latest != op_id {
                continue;
            }
            let covered = contents.iter().enumerate().skip(op.first as usize).take(op.sectors as usize);
            for (other, &content) in covered {
                if content == op_id {
                    continue;
                }
                let may_be_later = self.sectors[other]
                    .iter()
                    .any(|v| v.content == content && v.op != op_id && self.ops[v.op as usize].end >= op.submit);
                if !may_be_later {
                    return Err(format!(
                        "write {op_id} (sectors {} to {}) is in sector {sector} and not in sector {other}",
                        op.first,
                        op.first + op.sectors - 1
                    ));
                }
            }
        }
        Ok(())
    }

    /// The newest operation that gave `sector` the content of `content`.
    fn latest_showing(&self, sector: usize, content: u32) -> OpId {
        self.sectors[sector].iter().rev().find(|v| v.content == content).map_or(content, |v| v.op)
    }

    fn describe(&self, sector: usize, bytes: &[u8], intact: bool, from: u64, to: u64) -> String {
        let found = match (decode(bytes), intact) {
            (ZEROES, true) => "zeroes".to_owned(),
            (content, true) if (content as usize) < self.ops.len() => {
                let op = self.ops[content as usize];
                format!("write {content} (sent {}, acked {})", op.submit, show(op.ack))
            }
            (content, _) => format!("garbage (claims to be write {content}): {:02x?}", &bytes[..32]),
        };
        let allowed: Vec<String> = self
            .candidates(sector, from, to)
            .map(|content| match content {
                ZEROES => "zeroes".to_owned(),
                content => {
                    let op = self.ops[content as usize];
                    format!("write {content} (sent {}, acked {})", op.submit, show(op.ack))
                }
            })
            .collect();
        format!("sector {sector} read from {from} to {to} holds {found}, expected {}", allowed.join(" or "))
    }
}

fn show(instant: u64) -> String {
    if instant == u64::MAX { "never".to_owned() } else { instant.to_string() }
}

/// Fills one sector: who wrote it, where it belongs, and noise that depends on both.
fn fill(seed: u32, content: u32, sector: u32, out: &mut [u8]) {
    let mut state = (u64::from(seed) << 32 | u64::from(content)) ^ (u64::from(sector) << 17) | 1;
    for word in out.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    out[..4].copy_from_slice(&MAGIC.to_le_bytes());
    out[4..8].copy_from_slice(&seed.to_le_bytes());
    out[8..12].copy_from_slice(&content.to_le_bytes());
    out[12..16].copy_from_slice(&sector.to_le_bytes());
}

/// Which write a sector claims to come from.
fn decode(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_of(oracle: &Oracle, ops: &[OpId]) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(oracle.size()).unwrap()];
        for &op in ops {
            let start = oracle.ops[op as usize].first as usize * SECTOR;
            let data = oracle.data(op);
            image[start..start + data.len()].copy_from_slice(&data);
        }
        image
    }

    #[test]
    fn an_acked_write_must_be_in_and_an_unsent_one_must_not() {
        let mut oracle = Oracle::new(1, 1 << 20);
        let before = now_ns();
        let op = oracle.begin_write(4096, 8192);
        oracle.ack(op);
        let after = now_ns();
        let empty = image_of(&oracle, &[]);
        let written = image_of(&oracle, &[op]);
        oracle.check_image(&empty, before, before).unwrap();
        oracle.check_image(&written, after, after).unwrap();
        assert!(oracle.check_image(&empty, after, after).unwrap_err().contains("holds zeroes, expected write 1"));
        assert!(oracle.check_image(&written, before, before).is_err());
        let mut bad = written;
        bad[4096 + 100] ^= 1;
        assert!(oracle.check_image(&bad, after, after).unwrap_err().contains("garbage"));
    }

    #[test]
    fn a_write_in_flight_may_be_in_or_not_but_not_by_halves() {
        let mut oracle = Oracle::new(1, 1 << 20);
        let old = oracle.begin_write(0, 8192);
        oracle.ack(old);
        let new = oracle.begin_write(0, 8192);
        let now = now_ns();
        let with = image_of(&oracle, &[old, new]);
        let without = image_of(&oracle, &[old]);
        oracle.check_image(&with, now, now).unwrap();
        oracle.check_image(&without, now, now).unwrap();
        let mut half = with;
        half[4096..8192].copy_from_slice(&without[4096..8192]);
        assert!(oracle.check_image(&half, now, now).unwrap_err().contains("and not in sector"));
    }

    #[test]
    fn what_was_seen_after_a_crash_stays() {
        let mut oracle = Oracle::new(1, 1 << 20);
        let old = oracle.begin_write(0, 4096);
        oracle.ack(old);
        let new = oracle.begin_write(0, 4096);
        oracle.cut();
        let from = now_ns();
        let without = image_of(&oracle, &[old]);
        assert_eq!(oracle.settle(&without, from).unwrap(), 8);
        let now = now_ns();
        oracle.check_image(&without, now, now).unwrap();
        let with = image_of(&oracle, &[old, new]);
        assert!(oracle.check_image(&with, now, now).is_err(), "a cut-off write came back");
    }

    #[test]
    fn a_power_cut_may_lose_a_suffix_of_what_was_not_flushed() {
        let mut oracle = Oracle::new(1, 1 << 20);
        let write = |oracle: &mut Oracle, at: u64| {
            let op = oracle.begin_write(at, 4096);
            oracle.ack(op);
            op
        };
        let flushed = write(&mut oracle, 0);
        let submit = now_ns();
        oracle.flushed(submit);
        let (second, third) = (write(&mut oracle, 4096), write(&mut oracle, 8192));
        let cut = now_ns();
        let late = write(&mut oracle, 12288);
        for good in [&[flushed][..], &[flushed, second], &[flushed, second, third]] {
            oracle.check_power_cut(&image_of(&oracle, good), cut).unwrap();
        }
        for bad in [&[][..], &[second], &[flushed, third], &[flushed, second, third, late]] {
            assert!(oracle.check_power_cut(&image_of(&oracle, bad), cut).is_err(), "{bad:?}");
        }
        let mut half = image_of(&oracle, &[flushed, second]);
        half[4096..4608].fill(0);
        assert!(oracle.check_power_cut(&half, cut).is_err(), "by halves");
    }

    #[test]
    fn an_overwritten_content_is_gone_and_a_reverted_one_is_back() {
        let mut oracle = Oracle::new(1, 1 << 20);
        let first = oracle.begin_write(0, 4096);
        oracle.ack(first);
        let (target, at) = (image_of(&oracle, &[first]), now_ns());
        let second = oracle.begin_write(0, 4096);
        oracle.ack(second);
        let now = now_ns();
        assert!(oracle.check_image(&target, now, now).is_err());
        oracle.reverted(&target, at, now);
        let now = now_ns();
        oracle.check_image(&target, now, now).unwrap();
        assert!(oracle.check_image(&image_of(&oracle, &[first, second]), now, now).is_err());
    }

    #[test]
    fn a_revert_in_flight_at_a_power_cut_happened_or_did_not() {
        let mut oracle = Oracle::new(1, 1 << 20);
        let write = |oracle: &mut Oracle| {
            let op = oracle.begin_write(0, 8192);
            oracle.ack(op);
            op
        };
        let first = write(&mut oracle);
        let target = now_ns();
        let second = write(&mut oracle);
        oracle.flushed(now_ns());
        let (old, new) = (image_of(&oracle, &[first]), image_of(&oracle, &[second]));
        let before = now_ns();
        let submit = now_ns();
        let within = now_ns();
        oracle.reverted(&old, target, submit);
        let after = now_ns();
        for (cut, reverted, not) in [(before, false, true), (within, true, true), (after, true, false)] {
            assert_eq!(oracle.check_power_cut(&old, cut).is_ok(), reverted);
            assert_eq!(oracle.check_power_cut(&new, cut).is_ok(), not);
        }
        let mut half = new;
        half[..4096].copy_from_slice(&old[..4096]);
        assert!(oracle.check_power_cut(&half, within).is_err(), "by halves");
    }

    #[test]
    fn a_discarded_block_shows_zeroes_or_what_was_there_until_it_is_written_again() {
        let mut oracle = Oracle::new(1, 1 << 20);
        let write = |oracle: &mut Oracle, len: u64| {
            let op = oracle.begin_write(0, len);
            oracle.ack(op);
            op
        };
        write(&mut oracle, 16384);
        let older = image_of(&oracle, &[1]);
        let second = write(&mut oracle, 16384);
        let before = now_ns();
        // Blocks 1 and 2: the others are there in part only.
        let discard = oracle.begin_discard(512, 12288);
        oracle.ack(discard);
        let target = now_ns();
        let kept = image_of(&oracle, &[second]);
        let (mut gone, mut more) = (kept.clone(), kept.clone());
        gone[4096..12288].fill(0);
        more[512..12800].fill(0);
        let right = |oracle: &Oracle, image: &[u8]| {
            let now = now_ns();
            oracle.check_image(image, now, now).is_ok()
        };
        assert!(right(&oracle, &kept) && right(&oracle, &gone));
        assert!(!right(&oracle, &more) && !right(&oracle, &older));
        assert!(oracle.check_image(&gone, before, before).is_err(), "it was not sent yet");
        oracle.check_same(&kept, &gone, target, target).unwrap();
        assert!(oracle.check_same(&kept, &more, target, target).is_err());
        assert!(oracle.check_same(&gone, &older, target, target).is_err());
        assert_eq!(oracle.settle(&kept, target).unwrap(), 0, "what was seen of a discard does not stay");
        // So it is after a revert to behind it; to before it, it is no more.
        let third = write(&mut oracle, 4096);
        oracle.reverted(&kept, target, now_ns());
        assert!(right(&oracle, &kept) && right(&oracle, &gone));
        assert!(!right(&oracle, &image_of(&oracle, &[second, third])));
        oracle.reverted(&kept, before, now_ns());
        assert!(right(&oracle, &kept) && !right(&oracle, &gone));
        // A power cut may take it, and its zeroes; not what was flushed since.
        let discard = oracle.begin_discard(0, 4096);
        oracle.ack(discard);
        let mut gone = kept.clone();
        gone[..4096].fill(0);
        oracle.check_power_cut(&gone, now_ns()).unwrap();
        oracle.check_power_cut(&kept, now_ns()).unwrap();
        let fourth = write(&mut oracle, 512);
        oracle.flushed(now_ns());
        let mut gone = image_of(&oracle, &[second, fourth]);
        gone[512..4096].fill(0);
        oracle.check_power_cut(&gone, now_ns()).unwrap();
        gone[..512].fill(0);
        assert!(oracle.check_power_cut(&gone, now_ns()).is_err());
    }
}
