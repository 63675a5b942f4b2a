//! The index: (level, block, instant) to the place, checksum and sectors of a payload; one per log and kind of segment.
//!
//! * [`MemIndex`]: what the open segment holds, sorted in memory.
//! * [`Run`]: an immutable sorted tree of 4 KiB pages: one in each full segment's footer ([`layout_footer`]), merged to one
//!   per sealed log ([`merge`], [`RunBuilder`]). Pages come through a [`PageReader`], kept by a bounded [`PageCache`].
//! * [`Filter`]: which blocks a run may hold, for the many runs of a log that is not sealed yet.
//! * [`Touched`]: the blocks that a log touched, so that logs that never saw a block are not asked.
//!
//! An entry of level `l` stands for `16^l` blocks aligned to that, so a zeroed disk is a few dozen entries. All lookups answer
//! the same question: which entries, newest first, make up the wanted sectors of a block as of an instant?

mod build;
mod cache;
mod entry;
mod filter;
mod mem;
mod page;
mod run;
mod touched;

pub use build::{PAGES_PER_APPEND, RunBuilder, Source, layout_footer, merge, pages_for};
pub use cache::PageCache;
pub use entry::{Key, LEVEL_MAX, aligned, split_extent};
pub use filter::Filter;
pub use mem::MemIndex;
pub use page::{IndexPage, PageReader, PageSink};
pub use run::{Run, RunCursor};
pub use touched::Touched;

#[cfg(test)]
mod tests;
