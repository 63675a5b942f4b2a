//! The fence: what the state directory, outside the CDP disk, says of a volume's journal (design part 5).
//!
//! It decides whether a journal found on a disk may be redone, must be there, or must never be redone again. Each state is
//! durable before the step that it announces.

use uuid::Uuid;

use crate::info::Settings;

/// Where a volume's journal lives and what the primary may rely on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The CDP disk that holds the active log.
    pub disk: Uuid,
    /// Raised with every attachment; a journal of an older generation is never redone.
    pub generation: u64,
    /// What may be assumed.
    pub state: FenceState,
    /// Size of the primary in bytes, when the fence was written.
    pub primary_size: u64,
    /// Identity of the primary, when the fence was written.
    pub primary_id: String,
    /// mtime of the primary (a file) in the state `Clean`, nanoseconds; 0 otherwise.
    pub primary_mtime_ns: u64,
    /// In the state `Clean`: some blocks of the primary and the CRC-32 of what they held, where a partition table or a file system keeps what changes when it is
    /// mounted. A block device has no mtime.
    pub primary_samples: Vec<(u64, u32)>,
    /// The CDP disk's clock mark when the fence was written: a disk whose mark is lower is an older copy of itself, and lacks
    /// acked writes.
    pub disk_clock_ns: u64,
    /// Log seqs below this were given out and are never used again, not even after clean.
    pub next_seq: u64,
    /// CDP settings, so that protection comes back on another CDP disk after a restart; `None`: the volume has no CDP.
    pub settings: Option<Settings>,
    /// The user's switch.
    pub on: bool,
    /// Since a forced revert no client gets in, until `release`. While there is a journal, that knows better.
    pub held: bool,
    /// When CDP was created, wall clock, nanoseconds.
    pub created_ns: u64,
    /// Blocks (first, how many) whose content was lost with a CDP disk while a revert was pending: they read as errors until overwritten.
    pub lost_blocks: Vec<(u64, u64)>,
    /// Why the state is `Detaching` or `Detached` (for people; at most 255 bytes).
    pub reason: String,
}

/// State of a [`Fence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceState {
    /// Acked writes may be on the CDP disk only: without it the volume is not served.
    Dirty,
    /// Everything is on the primary: the volume may be served without its CDP disk.
    Clean,
    /// The CDP disk failed; the backlog is being written from memory. Not yet safe to forget the journal.
    Detaching,
    /// The journal of this generation ended and is never redone.
    Detached,
}
