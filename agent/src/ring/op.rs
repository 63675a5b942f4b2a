//! Operations as futures. All `unsafe` of the data plane's I/O is here.
//!
//! The rule that makes it sound: an operation's buffers, its iovecs and its file descriptor move into the ring's [`Slot`]
//! before the kernel learns of their addresses, and leave it when the completion was reaped. A future that is dropped earlier
//! leaves them there; so nothing that the caller does can free or reuse memory that the kernel may still touch.
#![allow(unsafe_code)]

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::ptr;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use cdp_journal::{IoBuf, Slice};
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::{Inner, Ring};

/// Most iovecs of one call (IOV_MAX).
pub const IOVECS_MAX: usize = 1024;
/// Longest single transfer: far below what the kernel cuts at (0x7ffff000), and a multiple of every block.
const TRANSFER_MAX: usize = 1 << 30;
/// `user_data` of entries whose completion nobody waits for.
const NOBODY: u64 = u64::MAX;

/// One operation between its submission and the end of its future.
pub(super) struct Slot {
    memory: Memory,
    /// Keeps the descriptor open: its number must not come to mean another file while the kernel has yet to look.
    file: Option<Rc<OwnedFd>>,
    state: State,
}

enum State {
    Waiting(Option<Waker>),
    /// The future is gone; the slot goes with the completion.
    Abandoned,
    Done(i32),
}

/// What the kernel reads or writes in an operation.
enum Memory {
    None,
    Buf(IoBuf),
    Vectored(Vectored),
    Batch(Box<SendBatch>),
}

impl Slot {
    pub(super) fn in_kernel(&self) -> bool {
        !matches!(self.state, State::Done(_))
    }

    pub(super) fn take_waker(&mut self) -> Option<Waker> {
        match &mut self.state {
            State::Waiting(waker) => waker.take(),
            _ => None,
        }
    }
}

/// Puts an entry into the submission queue if it has room.
pub(super) fn try_push(uring: &mut IoUring, entry: &squeue::Entry) -> bool {
    // SAFETY: every entry is made in this file, by `Inner::start` or a cancellation: what it points to is owned by a slot
    // until the completion, as the module's text says.
    unsafe { uring.submission().push(entry) }.is_ok()
}

impl Inner {
    /// Puts `memory` into a slot, makes the entry from its final place, queues it.
    fn start(
        self: &Rc<Self>,
        file: Option<Rc<OwnedFd>>,
        memory: Memory,
        cancel_on_drop: bool,
        entry: impl FnOnce(&mut Memory, Fd) -> squeue::Entry,
    ) -> Op {
        let fd = Fd(file.as_ref().map_or(-1, |file| file.as_raw_fd()));
        let mut slots = self.slots.borrow_mut();
        let vacant = slots.vacant_entry();
        let index = vacant.key();
        let slot = vacant.insert(Slot { memory, file, state: State::Waiting(None) });
        // The addresses in the entry are of heap memory that `memory` owns, so a slab that grows does not move them.
        let entry = entry(&mut slot.memory, fd).user_data(index as u64);
        drop(slots);
        self.push(entry);
        Op { ring: Rc::clone(self), index: Some(index), cancel_on_drop }
    }

    /// Notes a completion.
    pub(super) fn complete(&self, user_data: u64, result: i32) {
        if user_data == NOBODY {
            return;
        }
        let index = usize::try_from(user_data).expect("an index that was a usize");
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(index) else { return };
        match std::mem::replace(&mut slot.state, State::Done(result)) {
            State::Waiting(waker) => {
                drop(slots);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            State::Abandoned => {
                let slot = slots.remove(index);
                drop(slots);
                drop(slot);
            }
            State::Done(_) => debug_assert!(false, "one completion per operation"),
        }
    }

    /// Operations that the kernel has not completed.
    pub(super) fn in_kernel(&self) -> usize {
        self.slots.borrow().iter().filter(|(_, slot)| slot.in_kernel()).count()
    }

    /// Asks for the end of everything that is in flight.
    pub(super) fn cancel_all(&self) {
        let indexes: Vec<usize> =
            self.slots.borrow().iter().filter(|(_, slot)| slot.in_kernel()).map(|(index, _)| index).collect();
        for index in indexes {
            self.push(opcode::AsyncCancel::new(index as u64).build().user_data(NOBODY));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Closing a ring lets go of buffers some time later, without telling. What is not known to be free is left to it.
        let slots = self.slots.get_mut();
        if slots.iter().any(|(_, slot)| slot.in_kernel()) {
            std::mem::forget(std::mem::take(slots));
        }
    }
}

/// A started operation. Dropping it does not stop it, except receives and polls, which are asked to end.
struct Op {
    ring: Rc<Inner>,
    index: Option<usize>,
    cancel_on_drop: bool,
}

impl Future for Op {
    type Output = (i32, Memory);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let index = self.index.expect("not polled again after its end");
        let ring = Rc::clone(&self.ring);
        let mut slots = ring.slots.borrow_mut();
        let slot = &mut slots[index];
        match &mut slot.state {
            State::Done(result) => {
                let result = *result;
                let Slot { memory, file, .. } = slots.remove(index);
                drop(slots);
                drop(file);
                self.index = None;
                Poll::Ready((result, memory))
            }
            State::Waiting(waker) => {
                let stale = match waker {
                    Some(waker) if waker.will_wake(context.waker()) => None,
                    waker => waker.replace(context.waker().clone()),
                };
                drop(slots);
                drop(stale);
                Poll::Pending
            }
            State::Abandoned => unreachable!("abandoned by the drop of this future alone"),
        }
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let Some(index) = self.index else { return };
        let mut slots = self.ring.slots.borrow_mut();
        match std::mem::replace(&mut slots[index].state, State::Abandoned) {
            State::Waiting(waker) => {
                drop(slots);
                drop(waker);
                if self.cancel_on_drop {
                    self.ring.push(opcode::AsyncCancel::new(index as u64).build().user_data(NOBODY));
                }
            }
            _ => {
                let slot = slots.remove(index);
                drop(slots);
                drop(slot);
            }
        }
    }
}

/// A list of shared parts on its way to a file, with how much of it is done.
#[derive(Default)]
pub struct Vectored {
    parts: Vec<Slice>,
    iovecs: Vec<libc::iovec>,
    /// First iovec that is not done.
    next: usize,
    left: usize,
}

impl Vectored {
    /// All of `parts`, one after the other.
    pub fn new(parts: Vec<Slice>) -> Self {
        let iovecs = parts.iter().filter(|part| !part.is_empty()).map(iovec_of).collect();
        let left = parts.iter().map(Slice::len).sum();
        Self { parts, iovecs, next: 0, left }
    }

    /// Bytes not yet transferred.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Whether all that is left fits `align`, in its place in memory and in its length.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.iovecs[self.next..].iter().all(|io| (io.iov_base as usize | io.iov_len).is_multiple_of(align))
    }

    /// The parts, for copying them elsewhere.
    pub fn parts(&self) -> &[Slice] {
        &self.parts
    }

    /// Notes that `count` bytes more are done.
    pub fn advance(&mut self, count: usize) {
        advance(&mut self.iovecs, &mut self.next, count);
        self.left -= count;
    }
}

fn iovec_of(part: &Slice) -> libc::iovec {
    libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }
}

fn advance(iovecs: &mut [libc::iovec], next: &mut usize, mut count: usize) {
    while count > 0 {
        let io = &mut iovecs[*next];
        let step = count.min(io.iov_len);
        io.iov_base = io.iov_base.cast::<u8>().wrapping_add(step).cast();
        io.iov_len -= step;
        count -= step;
        *next += usize::from(io.iov_len == 0);
    }
}

/// Everything that one `sendmsg` (or as many as it takes) carries: small headers, copied, and shared parts, not copied, in
/// the order in which they were pushed. Made once per connection and used again.
pub struct SendBatch {
    heads: Vec<u8>,
    parts: Vec<Slice>,
    pieces: Vec<Piece>,
    bytes: usize,
    iovecs: Vec<libc::iovec>,
    next: usize,
    message: libc::msghdr,
}

enum Piece {
    /// So many bytes of `heads`.
    Head(usize),
    /// The next of `parts`.
    Part,
}

impl Default for SendBatch {
    fn default() -> Self {
        // SAFETY: `msghdr` is plain data for which all zeroes (null pointers, lengths of 0) is a value.
        let message = unsafe { std::mem::zeroed() };
        Self { heads: vec![], parts: vec![], pieces: vec![], bytes: 0, iovecs: vec![], next: 0, message }
    }
}

impl SendBatch {
    /// Appends a copy of `bytes`.
    pub fn push_head(&mut self, bytes: &[u8]) {
        self.heads.extend_from_slice(bytes);
        self.bytes += bytes.len();
        match self.pieces.last_mut() {
            Some(Piece::Head(len)) => *len += bytes.len(),
            _ => self.pieces.push(Piece::Head(bytes.len())),
        }
    }

    /// Appends `part` without a copy.
    pub fn push_part(&mut self, part: Slice) {
        self.bytes += part.len();
        self.parts.push(part);
        self.pieces.push(Piece::Part);
    }

    /// Bytes in it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Iovecs in it.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.heads.clear();
        self.parts.clear();
        self.pieces.clear();
        self.iovecs.clear();
        self.bytes = 0;
        self.next = 0;
    }

    /// Fixes the addresses: nothing is pushed from here to `clear`.
    fn seal(&mut self) {
        self.iovecs.clear();
        self.next = 0;
        let (mut head, mut part) = (0, 0);
        for piece in &self.pieces {
            let bytes: &[u8] = match piece {
                Piece::Head(len) => {
                    head += len;
                    &self.heads[head - len..head]
                }
                Piece::Part => {
                    part += 1;
                    &self.parts[part - 1]
                }
            };
            self.iovecs.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
        }
    }

    /// Points the message at what is not sent yet.
    fn message(&mut self) -> *const libc::msghdr {
        let rest = &mut self.iovecs[self.next..];
        self.message.msg_iov = rest.as_mut_ptr();
        self.message.msg_iovlen = rest.len().min(IOVECS_MAX);
        ptr::from_ref(&self.message)
    }
}

fn count_of(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// A transfer's length as the kernel wants it, bounded.
fn length(len: usize) -> u32 {
    len.min(TRANSFER_MAX) as u32
}

impl Ring {
    /// Reads into `buf[start..start + len]` from `offset`. May read less, 0 at the end of the file.
    ///
    /// # Panics
    /// When the range is not inside the buffer.
    pub async fn read_at(
        &self,
        file: &Rc<OwnedFd>,
        buf: IoBuf,
        start: usize,
        len: usize,
        offset: u64,
    ) -> (io::Result<usize>, IoBuf) {
        assert!(start <= buf.len() && len <= buf.len() - start);
        let op = self.inner.start(Some(Rc::clone(file)), Memory::Buf(buf), false, |memory, fd| {
            // In bounds: checked above.
            let target = memory.buf().as_mut_ptr().wrapping_add(start);
            opcode::Read::new(fd, target, length(len)).offset(offset).build()
        });
        let (result, memory) = op.await;
        (count_of(result), memory.into_buf())
    }

    /// Writes the next parts of `data` at `offset` and notes how much of it is done. May write less than all.
    pub async fn write_at(&self, file: &Rc<OwnedFd>, data: Vectored, offset: u64) -> (io::Result<usize>, Vectored) {
        let op = self.inner.start(Some(Rc::clone(file)), Memory::Vectored(data), false, |memory, fd| {
            let Memory::Vectored(data) = memory else { unreachable!("put in just above") };
            let rest = &data.iovecs[data.next..];
            if let [one] = rest {
                return opcode::Write::new(fd, one.iov_base.cast(), length(one.iov_len)).offset(offset).build();
            }
            opcode::Writev::new(fd, rest.as_ptr(), rest.len().min(IOVECS_MAX) as u32).offset(offset).build()
        });
        let (result, memory) = op.await;
        let Memory::Vectored(mut data) = memory else { unreachable!("a slot gives back what it was given") };
        let result = count_of(result);
        if let Ok(count) = result {
            data.advance(count);
        }
        (result, data)
    }

    /// `fdatasync`: the data, and of the metadata what is needed to read it again.
    pub async fn sync_data(&self, file: &Rc<OwnedFd>) -> io::Result<()> {
        self.plain(file, |fd| opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build()).await.map(drop)
    }

    /// `fsync`: data and metadata.
    pub async fn sync_all(&self, file: &Rc<OwnedFd>) -> io::Result<()> {
        self.plain(file, |fd| opcode::Fsync::new(fd).build()).await.map(drop)
    }

    /// `fallocate` with the mode bits of the system.
    pub async fn fallocate(&self, file: &Rc<OwnedFd>, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        self.plain(file, |fd| opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()).await.map(drop)
    }

    /// Receives into `buf[start..start + len]`; with `all`, waits for the whole length unless the peer closes. 0: closed.
    ///
    /// # Panics
    /// When the range is not inside the buffer.
    pub async fn recv(
        &self,
        socket: &Rc<OwnedFd>,
        buf: IoBuf,
        start: usize,
        len: usize,
        all: bool,
    ) -> (io::Result<usize>, IoBuf) {
        assert!(start <= buf.len() && len <= buf.len() - start);
        let op = self.inner.start(Some(Rc::clone(socket)), Memory::Buf(buf), true, |memory, fd| {
            // In bounds: checked above.
            let target = memory.buf().as_mut_ptr().wrapping_add(start);
            let flags = if all { libc::MSG_WAITALL } else { 0 };
            opcode::Recv::new(fd, target, length(len)).flags(flags).build()
        });
        let (result, memory) = op.await;
        (count_of(result), memory.into_buf())
    }

    /// Sends the whole batch; the batch comes back for its next use.
    pub async fn send(&self, socket: &Rc<OwnedFd>, mut batch: Box<SendBatch>) -> (io::Result<()>, Box<SendBatch>) {
        batch.seal();
        let mut left = batch.bytes;
        while left > 0 {
            let op = self.inner.start(Some(Rc::clone(socket)), Memory::Batch(batch), false, |memory, fd| {
                let Memory::Batch(batch) = memory else { unreachable!("put in just above") };
                // WAITALL: the kernel itself goes on after a short send.
                opcode::SendMsg::new(fd, batch.message()).flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32).build()
            });
            let (result, memory) = op.await;
            let Memory::Batch(returned) = memory else { unreachable!("a slot gives back what it was given") };
            batch = returned;
            match count_of(result) {
                Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), batch),
                Ok(count) => {
                    let SendBatch { iovecs, next, .. } = &mut *batch;
                    advance(iovecs, next, count);
                    left -= count;
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return (Err(error), batch),
            }
        }
        (Ok(()), batch)
    }

    /// Waits for `poll(2)` events; answers those that happened. Dropping the future ends the wait.
    pub async fn poll(&self, file: &Rc<OwnedFd>, events: i16) -> io::Result<i16> {
        let events = u32::from(events.unsigned_abs());
        let op = self
            .inner
            .start(Some(Rc::clone(file)), Memory::None, true, |_, fd| opcode::PollAdd::new(fd, events).build());
        count_of(op.await.0).map(|events| events as i16)
    }

    async fn plain(&self, file: &Rc<OwnedFd>, entry: impl FnOnce(Fd) -> squeue::Entry) -> io::Result<usize> {
        let op = self.inner.start(Some(Rc::clone(file)), Memory::None, false, |_, fd| entry(fd));
        count_of(op.await.0)
    }
}

impl Memory {
    fn buf(&mut self) -> &mut IoBuf {
        match self {
            Memory::Buf(buf) => buf,
            _ => unreachable!("put in by the same function"),
        }
    }

    fn into_buf(self) -> IoBuf {
        match self {
            Memory::Buf(buf) => buf,
            _ => unreachable!("a slot gives back what it was given"),
        }
    }
}
