//! The shard's side: open files, and what is done with them on the shard's thread.
//!
//! Invariants:
//! * A file's [`ClientGuard`] goes only when no request of the file is in the engine: whoever sees the client gone sees no more of
//!   its writes.
//! * Who wants a file gone, and a stop, wait for what is in the engine, which ends by the engine's own bounds (a stop not without end: a disk may hang): a request
//!   that is many of the engine's (zeroes and holes of any length) asks for no more of them from then on, and fails.
//! * A write of part of a sector reads, changes and writes that sector alone: no other write through a file of the same export is
//!   in the engine meanwhile, so none is undone.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use cdp_journal::{ClientGuard, Error, Export, Host as _, IoBuf, Result, SECTOR, Slice, payload_buf};
use fuser::{Errno, ReplyData, ReplyEmpty, ReplyLseek, ReplyWrite};
use uuid::Uuid;

use crate::frontend::nbd::ExportSource;
use crate::ring::Ring;

/// Most bytes that one engine request makes zero.
const ZERO_BYTES_MAX: u64 = 256 << 20;
/// How often a drain looks whether all requests have ended.
const DRAIN_LOOK_NS: u64 = 2_000_000;

/// What to do with a file.
pub(crate) enum Request {
    /// Read.
    Read {
        /// Where.
        offset: u64,
        /// Bytes.
        len: u32,
        /// To whom.
        reply: ReplyData,
    },
    /// Write whole sectors; the bytes lie in the buffer as the engine wants them.
    Write {
        /// Where.
        offset: u64,
        /// Bytes.
        len: u32,
        /// See [`payload_buf`].
        payload: IoBuf,
        /// Durable before the answer.
        fua: bool,
        /// To whom.
        reply: ReplyWrite,
    },
    /// Write anything.
    WritePart {
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
        /// Durable before the answer.
        fua: bool,
        /// To whom.
        reply: ReplyWrite,
    },
    /// Make durable.
    Flush(ReplyEmpty),
    /// Make zero.
    Zero {
        /// Where.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Keep the room on the primary.
        no_hole: bool,
        /// All of it must be inside of the file.
        within: bool,
        /// To whom.
        reply: ReplyEmpty,
    },
    /// The next data (or hole) at or after the offset.
    Seek {
        /// From where.
        offset: u64,
        /// Look for a hole.
        hole: bool,
        /// To whom.
        reply: ReplyLseek,
    },
    /// Close.
    Close,
}

/// The files that are open on a shard.
pub(crate) struct Files {
    ring: Ring,
    open: RefCell<HashMap<u64, Rc<File>>>,
    gates: RefCell<HashMap<Uuid, Weak<Gate>>>,
    ticket_next: Cell<u64>,
    inflight: Rc<Cell<usize>>,
    closing: Rc<Cell<bool>>,
}

/// What was opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opened {
    pub(crate) ticket: u64,
    pub(crate) read_only: bool,
}

/// An open file.
struct File {
    export: Rc<dyn Export>,
    gate: Rc<Gate>,
    guard: RefCell<Option<ClientGuard>>,
    /// The engine wants it gone, or it was closed.
    cut: Rc<Cell<bool>>,
    /// The shard is being drained.
    closing: Rc<Cell<bool>>,
    inflight: Cell<usize>,
}

impl Files {
    pub(crate) fn new(ring: Ring) -> Rc<Self> {
        Rc::new(Self {
            ring,
            open: RefCell::default(),
            gates: RefCell::default(),
            ticket_next: Cell::new(1),
            inflight: Rc::default(),
            closing: Rc::default(),
        })
    }

    /// Opens an export.
    pub(crate) fn open(self: &Rc<Self>, source: &impl ExportSource, key: Uuid, write: bool) -> Result<Opened> {
        if self.closing.get() {
            return Err(Error::Gone("the agent is stopping".to_owned()));
        }
        let export = source.export(key).ok_or_else(|| Error::NotFound { what: "export", name: key.to_string() })?;
        let read_only = export.read_only();
        if write && read_only {
            let message = "it is read-only".to_owned();
            return Err(Error::Device { op: "write to", device: format!("export {key}"), message, errno: libc::EROFS });
        }
        let ticket = self.ticket_next.get();
        self.ticket_next.set(ticket + 1);
        let cut = Rc::<Cell<bool>>::default();
        let (files, flag) = (Rc::downgrade(self), Rc::clone(&cut));
        let on_disconnect = Box::new(move || {
            flag.set(true);
            if let Some(files) = files.upgrade() {
                // Not from inside the engine's call: the guard's drop calls the engine.
                files.ring.clone().spawn(async move {
                    let file = files.open.borrow().get(&ticket).cloned();
                    if let Some(file) = file {
                        file.leave_if_idle();
                    }
                });
            }
        });
        let guard = export.connect(write, on_disconnect)?;
        let gate = {
            let mut gates = self.gates.borrow_mut();
            gates.retain(|_, gate| gate.strong_count() > 0);
            match gates.get(&key).and_then(Weak::upgrade) {
                Some(gate) => gate,
                None => {
                    let gate = Rc::<Gate>::default();
                    gates.insert(key, Rc::downgrade(&gate));
                    gate
                }
            }
        };
        let (guard, closing) = (RefCell::new(Some(guard)), Rc::clone(&self.closing));
        let file = File { export, gate, guard, cut, closing, inflight: Cell::new(0) };
        self.open.borrow_mut().insert(ticket, Rc::new(file));
        Ok(Opened { ticket, read_only })
    }

    /// Does what is asked, beside everything else, and answers.
    pub(crate) fn request(self: &Rc<Self>, ticket: u64, request: Request) {
        if let Request::Close = request {
            let file = self.open.borrow_mut().remove(&ticket);
            if let Some(file) = file {
                file.cut.set(true);
                file.leave_if_idle();
            }
            return;
        }
        let file = self.open.borrow().get(&ticket).cloned();
        let Some(file) = file.filter(|file| !file.cut.get() && !self.closing.get()) else {
            return request.refuse(Errno::EIO);
        };
        let worker = Rc::clone(&file);
        self.run(file, async move { worker.execute(request).await });
    }

    /// Has work done with a file that counts as in flight until it ends.
    fn run(&self, file: Rc<File>, work: impl Future<Output = ()> + 'static) {
        file.inflight.set(file.inflight.get() + 1);
        self.inflight.set(self.inflight.get() + 1);
        let all = Rc::clone(&self.inflight);
        self.ring.spawn(async move {
            work.await;
            all.set(all.get() - 1);
            file.inflight.set(file.inflight.get() - 1);
            if file.cut.get() {
                file.leave_if_idle();
            }
        });
    }

    /// Takes no more requests, and closes each file as soon as nothing of it is in the engine; waits for that, at most `patience_ns`.
    pub(crate) async fn drain(&self, patience_ns: u64) {
        self.closing.set(true);
        for file in self.open.take().into_values() {
            file.cut.set(true);
            file.leave_if_idle();
        }
        let end = self.ring.boot_ns().saturating_add(patience_ns);
        while self.inflight.get() > 0 && self.ring.boot_ns() < end {
            self.ring.sleep_ns(DRAIN_LOOK_NS).await;
        }
    }
}

impl Request {
    fn refuse(self, errno: Errno) {
        match self {
            Self::Read { reply, .. } => reply.error(errno),
            Self::Write { reply, .. } | Self::WritePart { reply, .. } => reply.error(errno),
            Self::Flush(reply) | Self::Zero { reply, .. } => reply.error(errno),
            Self::Seek { reply, .. } => reply.error(errno),
            Self::Close => {}
        }
    }
}

impl File {
    fn leave_if_idle(&self) {
        if self.inflight.get() == 0 {
            let guard = self.guard.take();
            drop(guard);
        }
    }

    /// Before each step of what may take many: whether there is somebody for it still.
    fn still_wanted(&self) -> Result<()> {
        match self.cut.get() || self.closing.get() {
            true => Err(Error::Gone("the file is being closed".to_owned())),
            false => Ok(()),
        }
    }

    async fn execute(&self, request: Request) {
        let export = &self.export;
        match request {
            Request::Read { offset, len, reply } => match self.read(offset, len).await {
                Ok(parts) => match parts.as_slice() {
                    [] => reply.data(&[]),
                    [part] => reply.data(part),
                    // The reply is one piece.
                    parts => reply.data(&parts.iter().map(|part| &part[..]).collect::<Vec<_>>().concat()),
                },
                Err(error) => reply.error(errno_of(&error)),
            },
            Request::Write { offset, len, mut payload, fua, reply } => {
                let _shared = self.gate.shared().await;
                let Some(len) = self.inside(offset, len as usize) else { return reply.error(Errno::ENOSPC) };
                payload[(offset % 4096) as usize + len..].fill(0);
                let len = len as u32; // not more than was asked for
                match export.write(offset, len, payload, fua).await {
                    Ok(()) => reply.written(len),
                    Err(error) => reply.error(errno_of(&error)),
                }
            }
            Request::WritePart { offset, bytes, fua, reply } => {
                let _alone = self.gate.exclusive().await;
                let Some(len) = self.inside(offset, bytes.len()) else { return reply.error(Errno::ENOSPC) };
                match self.write_part(offset, &bytes[..len], fua).await {
                    Ok(()) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)), // a request has at most a megabyte
                    Err(error) => reply.error(errno_of(&error)),
                }
            }
            Request::Flush(reply) => match export.flush().await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno_of(&error)),
            },
            Request::Zero { offset, len, no_hole, within, reply } => {
                if within && offset.saturating_add(len) > export.size() {
                    return reply.error(Errno::EFBIG);
                }
                match self.zero(offset, len, no_hole).await {
                    Ok(()) => reply.ok(),
                    Err(error) => reply.error(errno_of(&error)),
                }
            }
            Request::Seek { offset, hole, reply } => match self.seek(offset, hole).await {
                Ok(Some(found)) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)), // sizes are below 2^63
                Ok(None) => reply.error(Errno::ENXIO),
                Err(error) => reply.error(errno_of(&error)),
            },
            Request::Close => {}
        }
    }

    /// How much of a write lies inside of the file, whose size may have grown since it was opened: as at the end of a device what fits is written, and what begins behind
    /// it has no space (`None`).
    fn inside(&self, offset: u64, len: usize) -> Option<usize> {
        let room = self.export.size().checked_sub(offset).filter(|room| *room > 0)?;
        Some(len.min(usize::try_from(room).unwrap_or(usize::MAX)))
    }

    /// Exactly the bytes asked for, or fewer at the end.
    async fn read(&self, offset: u64, len: u32) -> Result<Vec<Slice>> {
        let size = self.export.size();
        let end = offset.saturating_add(u64::from(len)).min(size);
        if offset >= end {
            return Ok(Vec::new());
        }
        let (first, last) = (offset / SECTOR * SECTOR, end.next_multiple_of(SECTOR).min(size));
        let span = u32::try_from(last - first).map_err(|_| Error::invalid("length", len, "at most 2^32 - 1024"))?;
        let parts = self.export.read(first, span).await?;
        Ok(trim(parts, (offset - first) as usize, (end - offset) as usize))
    }

    /// A write that begins or ends inside a sector; the caller is alone.
    async fn write_part(&self, offset: u64, bytes: &[u8], fua: bool) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let end = offset + bytes.len() as u64;
        let (first, last) = (offset / SECTOR * SECTOR, end.next_multiple_of(SECTOR));
        let span = u32::try_from(last - first).map_err(|_| Error::invalid("length", bytes.len(), "less than 2^32"))?;
        let mut payload = payload_buf(first, span);
        let base = (first % 4096) as usize;
        let mut edges = Vec::new();
        if offset != first {
            edges.push(first);
        }
        if end != last && edges.last() != Some(&(last - SECTOR)) {
            edges.push(last - SECTOR);
        }
        for edge in edges {
            let mut at = base + (edge - first) as usize;
            for part in self.export.read(edge, SECTOR as u32).await? {
                payload[at..at + part.len()].copy_from_slice(&part);
                at += part.len();
            }
        }
        let at = base + (offset - first) as usize;
        payload[at..at + bytes.len()].copy_from_slice(bytes);
        self.export.write(first, span, payload, fua).await
    }

    async fn zero(&self, offset: u64, len: u64, no_hole: bool) -> Result<()> {
        let end = offset.saturating_add(len).min(self.export.size());
        let (first, last) = (offset.next_multiple_of(SECTOR), end / SECTOR * SECTOR);
        if first >= last {
            // Inside one sector, or around one border.
            let _alone = self.gate.exclusive().await;
            return self.write_part(offset, &vec![0; end.saturating_sub(offset) as usize], false).await;
        }
        if offset < first || last < end {
            let _alone = self.gate.exclusive().await;
            self.write_part(offset, &vec![0; (first - offset) as usize], false).await?;
            self.write_part(last, &vec![0; (end - last) as usize], false).await?;
        }
        let mut at = first;
        while at < last {
            let step = (last - at).min(ZERO_BYTES_MAX);
            let _shared = self.gate.shared().await;
            self.still_wanted()?;
            self.export.write_zeroes(at, step as u32, no_hole, false).await?;
            at += step;
        }
        Ok(())
    }

    /// `None`: there is none (`ENXIO`). The end of the file counts as a hole.
    async fn seek(&self, offset: u64, hole: bool) -> Result<Option<u64>> {
        let size = self.export.size();
        if offset >= size {
            return Ok(None);
        }
        let mut at = offset / SECTOR * SECTOR;
        while at < size {
            let mut moved = false;
            self.still_wanted()?;
            for piece in self.export.status(at, size - at).await? {
                if (piece.hole || piece.zero) == hole && piece.len > 0 {
                    return Ok(Some(at.max(offset)));
                }
                at += piece.len;
                moved |= piece.len > 0;
            }
            if !moved {
                return Ok(Some(if hole { size } else { at.max(offset) })); // not known: call the rest data
            }
        }
        Ok(hole.then_some(size))
    }
}

/// `len` bytes from byte `skip` on.
fn trim(parts: Vec<Slice>, mut skip: usize, mut len: usize) -> Vec<Slice> {
    let mut kept = Vec::with_capacity(parts.len());
    for part in parts {
        let from = skip.min(part.len());
        let take = (part.len() - from).min(len);
        skip -= from;
        len -= take;
        if take > 0 {
            kept.push(part.slice(from, take));
        }
    }
    kept
}

/// What the engine's errors are to a program.
pub(super) fn errno_of(failure: &Error) -> Errno {
    match failure {
        Error::NoSpace { .. } => Errno::ENOSPC,
        Error::NotFound { .. } => Errno::ENOENT,
        // Held after a forced revert, not served now: not a matter of the file.
        Error::State(_) => Errno::EBUSY,
        Error::Device { errno, .. } => match *errno {
            libc::EROFS | libc::EPERM => Errno::EROFS,
            libc::ENOSPC | libc::EDQUOT => Errno::ENOSPC,
            libc::ENOMEM => Errno::ENOMEM,
            _ => Errno::EIO, // also EINVAL: it is the disk that objects
        },
        _ => Errno::EIO,
    }
}

/// Many share it, or one has it alone; who asks for it alone goes before who comes later.
#[derive(Default)]
struct Gate {
    shared: Cell<usize>,
    alone: Cell<bool>,
    alone_wanted: Cell<usize>,
    waiting: RefCell<VecDeque<Waker>>,
}

struct Pass {
    gate: Rc<Gate>,
    alone: bool,
}

impl Gate {
    async fn shared(self: &Rc<Self>) -> Pass {
        self.when(|| !self.alone.get() && self.alone_wanted.get() == 0).await;
        self.shared.set(self.shared.get() + 1);
        Pass { gate: Rc::clone(self), alone: false }
    }

    async fn exclusive(self: &Rc<Self>) -> Pass {
        self.alone_wanted.set(self.alone_wanted.get() + 1);
        self.when(|| !self.alone.get() && self.shared.get() == 0).await;
        self.alone_wanted.set(self.alone_wanted.get() - 1);
        self.alone.set(true);
        Pass { gate: Rc::clone(self), alone: true }
    }

    async fn when(&self, ready: impl Fn() -> bool) {
        poll_fn(|context| {
            if ready() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push_back(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        match self.alone {
            true => self.gate.alone.set(false),
            false => self.gate.shared.set(self.gate.shared.get() - 1),
        }
        let waiting = self.gate.waiting.take();
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests;
