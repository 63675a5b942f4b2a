//! Numbers that must not be mixed up, and the sizes that everything is cut by.

use std::fmt;

/// Bytes of a block: the unit of before-images, index entries and checksums.
pub const BLOCK: u64 = 4096;
/// Bytes of a sector: the unit of guest I/O.
pub const SECTOR: u64 = 512;
/// Sectors of a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK / SECTOR;

/// A point on the host's one time line: nanoseconds since the epoch, unique and strictly increasing over every write, marker,
/// view and revert of all volumes (see [`crate::clock`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// Before everything.
    pub const ZERO: Instant = Instant(0);
    /// After everything.
    pub const MAX: Instant = Instant(u64::MAX);
    /// The instant just before this one.
    pub fn before(self) -> Instant {
        Instant(self.0.saturating_sub(1))
    }
    /// The instant just after this one.
    pub fn after(self) -> Instant {
        Instant(self.0.saturating_add(1))
    }
}

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
