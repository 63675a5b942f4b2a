//! Reading a disk that may hold anything: a window for what is read in order, single reads for the rest, what was found, what was counted.

use std::io::{self, Seek, SeekFrom};

use super::{Finding, Medium, Severity};
use crate::types::BLOCK;

/// Bytes that one read of the window fetches.
const WINDOW: usize = 1 << 20;
/// Findings of one severity that are kept; the rest is counted.
pub(super) const FINDINGS_MAX: u64 = 1000;

/// The disk, opened read-only.
pub(super) struct Source {
    medium: Box<dyn Medium>,
    /// Bytes of the disk.
    pub size: u64,
    window: Vec<u8>,
    start: u64,
}

impl Source {
    pub fn new(mut medium: Box<dyn Medium>) -> io::Result<Self> {
        // A block device has no length, but an end.
        let size = medium.seek(SeekFrom::End(0))?;
        Ok(Self { medium, size, window: Vec::new(), start: 0 })
    }

    /// Reads exactly `buf` from `at`.
    pub fn read_into(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.medium.seek(SeekFrom::Start(at))?;
        self.medium.read_exact(buf)
    }

    /// One block.
    pub fn block(&mut self, at: u64) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; BLOCK as usize];
        self.read_into(at, &mut buf)?;
        Ok(buf)
    }

    /// `len` bytes (at most [`WINDOW`]) from `at`, through the window.
    pub fn get(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        debug_assert!(len <= WINDOW);
        let inside = at >= self.start && at - self.start + len as u64 <= self.window.len() as u64;
        if !inside {
            let ahead = self.size.saturating_sub(at).min(WINDOW as u64) as usize;
            let mut window = std::mem::take(&mut self.window);
            window.resize(ahead.max(len), 0);
            let mut read = self.read_into(at, &mut window);
            if read.is_err() && window.len() > len {
                // A bad sector further on is not this reader's.
                window.truncate(len);
                read = self.read_into(at, &mut window);
            }
            if let Err(error) = read {
                self.start = 0;
                return Err(error);
            }
            self.window = window;
            self.start = at;
        }
        let from = (at - self.start) as usize;
        Ok(&self.window[from..from + len])
    }
}

/// What was found, bounded.
#[derive(Default)]
pub(super) struct Findings {
    pub list: Vec<Finding>,
    pub damage: u64,
    pub notes: u64,
}

impl Findings {
    pub fn damage(&mut self, place: impl Into<String>, what: impl Into<String>) {
        self.damage += 1;
        if self.damage <= FINDINGS_MAX {
            self.list.push(Finding { severity: Severity::Damage, place: place.into(), what: what.into() });
        }
    }

    pub fn note(&mut self, place: impl Into<String>, what: impl Into<String>) {
        self.notes += 1;
        if self.notes <= FINDINGS_MAX {
            self.list.push(Finding { severity: Severity::Note, place: place.into(), what: what.into() });
        }
    }
}

/// What was read and verified.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    pub frames: u64,
    pub payload_blocks: u64,
    pub index_pages: u64,
    pub index_entries: u64,
    pub bytes: u64,
    pub tails: u64,
}

/// Where things lie, and whose disk it is.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub disk_id: [u8; 16],
    pub geometry: crate::format::Geometry,
}

impl Layout {
    pub fn segment_blocks(&self) -> u32 {
        // At most 256 MiB / 4 KiB.
        (self.geometry.segment_size / BLOCK) as u32
    }
}

/// A segment that the table gives to a log.
#[derive(Clone, Copy)]
pub(super) struct Owned {
    pub volume: [u8; 16],
    pub seq: u64,
    pub log_id: u64,
    pub kind: u8,
    pub number: u32,
    pub lap: u64,
    pub segment: u32,
}

impl Owned {
    /// Order of a volume's logs, streams and segments.
    pub fn key(&self) -> ([u8; 16], u64, u64, u8, u32, u64) {
        (self.volume, self.seq, self.log_id, self.kind, self.number, self.lap)
    }
}
