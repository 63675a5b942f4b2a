//! What the engine needs from the world: disks, a clock, a place for the fence, and somebody who runs its tasks.
//!
//! The engine is single-threaded `async` code and knows nothing else of its surroundings. In production these traits are
//! io_uring on a shard's ring; in tests they are the simulator's seeded scheduler and disks that lose, tear and damage writes.
//! All futures are boxed: one allocation (about 50 ns) per device call, against the 10 µs and more that the call itself takes.

use std::future::Future;
use std::io;
use std::pin::Pin;

use uuid::Uuid;

use crate::buf::{IoBuf, Slice};
use crate::fence::Fence;
use crate::types::Instant;

/// A boxed future of the engine's single thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What tells a device or file from another, as far as the host can say. Compared at start (design part 5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Name of the thing that stays the same over a reboot as far as it can: a file's inode and birth time, a block device's WWID, serial number or uuid; numbers
    /// of devices where there is nothing else; empty where there is nothing at all. The same for as long as the thing is open.
    pub id: String,
    /// Modification time of a file, nanoseconds since the epoch; 0 for a block device.
    pub mtime_ns: u64,
}

/// A piece of a device's allocation map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Bytes that the piece covers.
    pub len: u64,
    /// A hole: reads as zeroes and occupies nothing.
    pub hole: bool,
}

/// A block device or file, addressed in bytes. Offsets and lengths that the engine passes are multiples of 512, and of 4096
/// except at the very end of a primary whose size is no multiple of 4096.
///
/// Calls may overlap in time and complete in any order; nothing is durable before a `sync` that was *called* after the write
/// had completed. Dropping a returned future does not cancel the operation (buffers stay owned by it until it completes).
pub trait Device {
    /// Size in bytes when it was opened.
    fn size(&self) -> u64;
    /// Size in bytes now (a file may have shrunk, a device may have grown).
    fn current_size(&self) -> io::Result<u64>;
    /// Physical block of the medium in bytes (512 to 65536); what a power cut may damage as a whole.
    fn physical_block(&self) -> u32;
    /// What tells this device from another.
    fn identity(&self) -> io::Result<Identity>;
    /// Fills `buf` from `offset`. Reading past the end is an error of kind `UnexpectedEof`.
    fn read(&self, offset: u64, buf: IoBuf) -> LocalFuture<'static, (io::Result<()>, IoBuf)>;
    /// Writes all of `parts`, one after the other, at `offset`. Many parts may be given (the device splits at IOV_MAX).
    fn write(&self, offset: u64, parts: Vec<Slice>) -> LocalFuture<'static, io::Result<()>>;
    /// Makes the range read as zeroes; `punch` allows (does not demand) a hole.
    fn write_zeroes(&self, offset: u64, len: u64, punch: bool) -> LocalFuture<'static, io::Result<()>>;
    /// A hint that the content of the range is not needed any more: it may read as zeroes afterwards, or as before. Unless a device knows better the range is made
    /// zero.
    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'static, io::Result<()>> {
        self.write_zeroes(offset, len, true)
    }
    /// Makes everything durable that had completed when this was called.
    fn sync(&self) -> LocalFuture<'static, io::Result<()>>;
    /// The same, and of a file its modification time too: a start compares it after a clean stop.
    fn sync_all(&self) -> LocalFuture<'static, io::Result<()>> {
        self.sync()
    }
    /// The allocation map of a range, in order and without gaps. A device that cannot tell answers one piece of data.
    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'static, io::Result<Vec<Allocation>>>;
    /// Ends when calls have been under way for so many nanoseconds, from now on, and none of them has ended: it hangs. Of a device that cannot tell it never ends.
    fn until_hanging(&self, _ns: u64) -> LocalFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

/// Clock, timers, tasks and randomness.
pub trait Host {
    /// CLOCK_REALTIME, nanoseconds since the epoch.
    fn wall_ns(&self) -> u64;
    /// CLOCK_BOOTTIME, nanoseconds: never steps, also runs during suspend.
    fn boot_ns(&self) -> u64;
    /// Ends after at least `ns` nanoseconds.
    fn sleep(&self, ns: u64) -> LocalFuture<'static, ()>;
    /// Runs a task to its end beside the others, on the same thread.
    fn spawn(&self, task: LocalFuture<'static, ()>);
    /// Random bits for ids (not secrets).
    fn random_u64(&self) -> u64;
}

/// Small precious state outside the CDP disk: the fence per volume and the clock's high-water mark. Each `put` is durable and
/// atomic when its future ends (write, sync, rename, sync of the folder).
pub trait StateStore {
    /// Replaces the fence of a volume; `None` removes it.
    fn put_fence(&self, volume: Uuid, fence: Option<Fence>) -> LocalFuture<'static, io::Result<()>>;
    /// Raises the clock's high-water mark.
    fn put_clock(&self, high_water: Instant) -> LocalFuture<'static, io::Result<()>>;
}
