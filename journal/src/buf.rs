//! Buffers that a disk takes as they are: heap memory aligned to 4 KiB, so that O_DIRECT needs no copy.
//!
//! * [`IoBuf`] is owned and mutable: it is filled by a read or by a socket.
//! * [`Slice`] is a shared, immutable window onto an `IoBuf`: the same bytes go into a journal frame, stay in the overlay
//!   and are written to the primary, and are copied nowhere.
//!
//! Buffers of the usual sizes are kept by the thread that drops them and given out again, up to [`POOL_BYTES_MAX`] and [`POOL_LARGE_BYTES_MAX`]: aligned
//! memory is slow to get from the allocator, and slower to fault in. What is given out again is initialised, if with old bytes.
//!
//! Those of 1 MiB come two to a huge page, where the system has one: in memory that hangs together a request of 1 MiB is one piece to the disk, and not 256,
//! which is more than many a disk takes at once (docs/performance.md).
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

/// Alignment of every buffer, bytes: the largest physical block that disks in use report.
pub const BUF_ALIGN: usize = 4096;

/// Bytes of buffers that a thread keeps for their next use, those of 1 MiB aside.
pub const POOL_BYTES_MAX: usize = 32 << 20;

/// Bytes of buffers of 1 MiB that it keeps besides: small ones must not crowd out what is dearest to get.
pub const POOL_LARGE_BYTES_MAX: usize = 16 << 20;

/// Sizes that are kept: powers of two from one block to 1 MiB.
const CLASSES: usize = 9;

/// The largest of them.
const LARGE: usize = BUF_ALIGN << (CLASSES - 1);

/// Bytes of a huge page, as most systems have them. Where pages are of another size the buffers are as good, and no faster.
const HUGE_PAGE: usize = 2 * LARGE;

/// A thread's buffers between two uses, by size.
struct Pool {
    free: [Vec<NonNull<u8>>; CLASSES],
    /// Bytes of the small and of the large ones.
    bytes: [usize; 2],
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { free: [const { Vec::new() }; CLASSES], bytes: [0; 2] }) };
}

/// The size class of a length, if buffers of that length are kept.
fn class_of(len: usize) -> Option<usize> {
    let class = (len.trailing_zeros() as usize).wrapping_sub(BUF_ALIGN.trailing_zeros() as usize);
    (len.is_power_of_two() && class < CLASSES).then_some(class)
}

impl Pool {
    /// Memory of a buffer that was dropped on this thread.
    fn take(len: usize) -> Option<NonNull<u8>> {
        let class = class_of(len)?;
        let kept = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            let memory = pool.free[class].pop()?;
            pool.bytes[usize::from(len == LARGE)] -= len;
            Some(memory)
        });
        kept.ok().flatten()
    }

    /// Keeps a buffer's memory, unless there is enough already. `false`: it is still the caller's.
    fn keep(memory: NonNull<u8>, len: usize) -> bool {
        let Some(class) = class_of(len) else { return false };
        let kept = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            let kind = usize::from(len == LARGE);
            if pool.bytes[kind] + len > [POOL_BYTES_MAX, POOL_LARGE_BYTES_MAX][kind] {
                return false;
            }
            pool.bytes[kind] += len;
            pool.free[class].push(memory);
            true
        });
        kept.unwrap_or(false) // the thread is ending
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.free.iter_mut().enumerate() {
            for memory in list.drain(..) {
                // SAFETY: an `IoBuf` of this class owned it and gave it up in `keep`.
                unsafe { release(memory, BUF_ALIGN << class) }
            }
        }
    }
}

/// Two buffers of [`LARGE`] bytes of zeroes, in one huge page if the system has one to give. Each is a mapping of its own to whoever ends it.
fn map_large() -> Option<[NonNull<u8>; 2]> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the system's choice touches nothing that there is.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), 2 * HUGE_PAGE, access, kind, -1, 0) };
    if start == libc::MAP_FAILED {
        return None;
    }
    let start = start.cast::<u8>();
    let before = start.align_offset(HUGE_PAGE);
    let page = start.wrapping_add(before);
    let unmap = |from: *mut u8, len: usize| {
        if len > 0 {
            // SAFETY: a part of the mapping above that nobody uses.
            unsafe { libc::munmap(from.cast(), len) };
        }
    };
    unmap(start, before);
    unmap(page.wrapping_add(HUGE_PAGE), HUGE_PAGE - before);
    // A wish: where it is not granted, small pages do. SAFETY: the mapping above, which stays what it is.
    unsafe { libc::madvise(page.cast(), HUGE_PAGE, libc::MADV_HUGEPAGE) };
    Some([NonNull::new(page)?, NonNull::new(page.wrapping_add(LARGE))?])
}

/// Gives a buffer's memory back to the system.
///
/// # Safety
/// The memory is what [`IoBuf::fresh`] made for this length, and nobody uses it any more.
unsafe fn release(memory: NonNull<u8>, len: usize) {
    // SAFETY: as the caller says; a part of a mapping may be ended alone.
    unsafe {
        match len {
            LARGE => _ = libc::munmap(memory.as_ptr().cast(), LARGE),
            _ => dealloc(memory.as_ptr(), IoBuf::layout(len)),
        }
    }
}

/// An owned, 4 KiB-aligned buffer of a fixed length.
pub struct IoBuf {
    memory: NonNull<u8>,
    len: usize,
}

// SAFETY: an `IoBuf` owns its memory alone, like a `Box<[u8]>`.
unsafe impl Send for IoBuf {}
// SAFETY: shared access is read-only through `Deref`, like a `Box<[u8]>`.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), BUF_ALIGN).expect("buffer lengths are bounded far below isize::MAX")
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        if let Some(memory) = Pool::take(len) {
            let mut buf = Self { memory, len };
            buf.fill(0);
            return buf;
        }
        Self::fresh(len)
    }

    fn fresh(len: usize) -> Self {
        let layout = Self::layout(len);
        if len == LARGE {
            let Some([memory, other]) = map_large() else { handle_alloc_error(layout) };
            // Kept for the next one: dropped by itself.
            drop(Self { memory: other, len });
            return Self { memory, len };
        }
        // SAFETY: the layout has a size of at least 1.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(memory) = NonNull::new(memory) else { handle_alloc_error(layout) };
        Self { memory, len }
    }

    /// A buffer of `len` bytes whose content is unspecified: the caller overwrites all of it, or lets nobody see the rest.
    pub fn for_overwrite(len: usize) -> Self {
        let Some(memory) = Pool::take(len) else { return Self::fresh(len) };
        #[allow(unused_mut, reason = "only a build with debug assertions changes it")]
        let mut buf = Self { memory, len };
        // Old bytes that somebody looks at are to be seen in the tests, and the same in each run.
        #[cfg(debug_assertions)]
        buf.fill(0xA5);
        buf
    }

    /// A buffer that holds a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::for_overwrite(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Length, bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address for the kernel; valid as long as the buffer lives, also when the `IoBuf` is moved.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Shares the whole buffer.
    pub fn share(self) -> Slice {
        let len = self.len;
        Slice { buf: Rc::new(self), start: 0, len }
    }
}

impl Deref for IoBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `memory` is valid and initialised for `len` bytes while `self` lives.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        if !Pool::keep(self.memory, self.len) {
            // SAFETY: it is this buffer's alone, and of this length.
            unsafe { release(self.memory, self.len) }
        }
    }
}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({} bytes)", self.len)
    }
}

/// A shared, read-only window onto an [`IoBuf`].
#[derive(Clone)]
pub struct Slice {
    buf: Rc<IoBuf>,
    start: usize,
    len: usize,
}

impl Slice {
    /// The part `range` of this window (no copy).
    ///
    /// # Panics
    /// When the range ends past the window: a bug of the caller, never reachable from outside input.
    pub fn slice(&self, start: usize, len: usize) -> Slice {
        assert!(start + len <= self.len, "slice {start}+{len} of {}", self.len);
        Slice { buf: Rc::clone(&self.buf), start: self.start + start, len }
    }

    /// Whether the window is all of its buffer.
    pub(crate) fn is_whole(&self) -> bool {
        self.len == self.buf.len
    }

    /// Whether the buffer is more than so many times what all windows onto it show, if they are as long as this one.
    pub(crate) fn keeps_more_than(&self, times: usize) -> bool {
        self.buf.len > times * Rc::strong_count(&self.buf) * self.len
    }

    /// Which buffer, and its length.
    #[cfg(test)]
    pub(crate) fn buffer(&self) -> (*const IoBuf, usize) {
        (Rc::as_ptr(&self.buf), self.buf.len)
    }

    /// Length, bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Deref for Slice {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buf[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for Slice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slice({} bytes)", self.len)
    }
}
