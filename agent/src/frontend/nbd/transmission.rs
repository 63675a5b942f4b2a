//! The transmission phase, on a shard's ring.
//!
//! Per connection there are a reader and a writer, and a task per request between them:
//! * The **reader** takes requests from a receive buffer that one call fills with as many as have arrived. The payload of a write
//!   goes to where it lies in its block, into the buffer that the engine keeps: what was read ahead is copied, the rest is received
//!   there directly. With too much in flight it stops reading, and the socket slows the client down.
//! * A **request** is checked once, at the door ([`check`]), and then is the engine's.
//! * A read or write that the shard has no room for as a whole, of a connection that has nothing else in flight, is served by the reader itself, piece by
//!   piece: whatever clients ask, and however little they take of the answers, a shard holds no more than [`NbdConfig::shard_bytes_max`] and, for each
//!   connection, [`SHARE_MIN`], or [`STATUS_BYTES`] while extents are looked up.
//! * The **writer** sends all replies that are ready with one call.
//!
//! Invariants:
//! * What was admitted is answered exactly once, or the connection is gone; its room is free again when the answer was sent.
//! * The engine's [`ClientGuard`] is dropped only when no request of the client is in the engine: whoever sees the client gone
//!   sees no more of its writes.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cdp_journal::index::Touched;
use cdp_journal::{
    BlockStatus, ClientGuard, Engine, Error, Export, Host as _, IoBuf, Result, SECTOR, Slice, payload_buf,
};
use futures::future::{Either, select};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockaddrLike as _, SockaddrStorage, getsockname, setsockopt, shutdown, sockopt,
};
use slab::Slab;
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::handshake::MetaContext;
use super::wire::{self, ChunkHead, Request, STRING_MAX, SimpleReply, chunk, command, error};
use super::{NbdConfig, PAYLOAD_MAX, Seat};
use crate::ring::{Ring, SendBatch, Signal};

/// Bytes of the receive buffer: fifteen 4 KiB writes.
const RECEIVE_BYTES: usize = 64 << 10;
/// Send buffer asked of the socket, so that one call takes many replies (the system may grant less).
const SEND_BUFFER: usize = 1 << 20;
/// Longest payload that is read and thrown away after a refused write; a longer one ends the connection.
const REFUSED_PAYLOAD_MAX: u32 = 2 * PAYLOAD_MAX;
/// A batch of replies is closed when it holds so many pieces, or so many bytes. Few bytes: a client that has its first data can ask for more while the
/// rest is sent. With all that is ready in one call, client and server took turns, and the disk was idle in between (docs/performance.md). The replies
/// to writes are small: a batch takes all of them.
const BATCH_PIECES: usize = 900;
const BATCH_BYTES: usize = 8 << 10;
/// Payload that a connection may always have in flight, whatever the others of its shard hold: clients that take their answers slowly, or
/// never, must not slow down the small requests of others.
pub const SHARE_MIN: u64 = 128 << 10;
/// What the engine needs to find the extents of a range; it is given back, but for the answer's own bytes, when it has them.
const STATUS_BYTES: u64 = 512 << 10;
/// How often a drain looks whether all have left.
const DRAIN_LOOK_NS: u64 = 2_000_000;
/// How long a TCP client that goes on sending may take to see that the connection has ended.
const LINGER_NS: u64 = 1_000_000_000;
/// Most extents of one BLOCK_STATUS reply in one context, 8 bytes each. A client asks again for what is left out.
const EXTENTS_MAX: usize = 8 << 10;
/// Changed blocks that one answer goes through: a slice of work, beside the guests' requests.
const STATUS_BLOCKS_MAX: usize = 64 << 10;

/// What a shard serves: how the frontend finds an export in the shard's state.
pub trait ExportSource {
    /// The volume or view with this id.
    fn export(&self, key: Uuid) -> Option<Rc<dyn Export>>;
}

impl ExportSource for Rc<Engine> {
    fn export(&self, key: Uuid) -> Option<Rc<dyn Export>> {
        let volume = self.volume(key).map(|volume| volume.export());
        volume.or_else(|| self.view(key).map(|view| view.export()))
    }
}

/// What the handshake agreed on, and the connection's bounds.
#[derive(Debug)]
pub struct NbdSession {
    export_name: String,
    structured: bool,
    contexts: Vec<MetaContext>,
    inflight_requests_max: u32,
    inflight_bytes_max: u64,
    shard_bytes_max: u64,
    _seat: Option<Seat>,
}

impl NbdSession {
    pub(super) fn new(export_name: String, structured: bool, contexts: Vec<MetaContext>) -> Self {
        let NbdConfig { inflight_requests_max, inflight_bytes_max, shard_bytes_max, .. } = NbdConfig::default();
        Self {
            export_name,
            structured,
            contexts,
            inflight_requests_max,
            inflight_bytes_max,
            shard_bytes_max,
            _seat: None,
        }
    }

    pub(super) fn with_limits(self, config: &NbdConfig, seat: Seat) -> Self {
        Self {
            inflight_requests_max: config.inflight_requests_max.max(1),
            inflight_bytes_max: config.inflight_bytes_max,
            shard_bytes_max: config.shard_bytes_max,
            _seat: Some(seat),
            ..self
        }
    }
}

/// Counters of a shard's clients, since start. Written by the shard alone, read by anybody.
#[derive(Debug, Default)]
pub struct ClientStats {
    /// Connections now.
    pub connections: AtomicU64,
    /// Connections ever.
    pub connections_total: AtomicU64,
    /// Requests taken in.
    pub requests: AtomicU64,
    /// Requests answered with an error.
    pub errors: AtomicU64,
    /// Bytes of payload received.
    pub bytes_in: AtomicU64,
    /// Bytes of replies sent.
    pub bytes_out: AtomicU64,
    /// Calls that sent replies; `requests / sends` is how well they share.
    pub sends: AtomicU64,
    /// Times that a reader stopped because too much was in flight.
    pub throttled: AtomicU64,
}

/// One writer: a plain addition, no locked instruction.
fn count(counter: &AtomicU64, step: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(step), Ordering::Relaxed);
}

/// A shard's clients: those that hold an export and still shake hands, and those that are served.
pub(crate) struct Clients {
    ring: Ring,
    stats: Arc<ClientStats>,
    claims: RefCell<HashMap<u64, Claim>>,
    ticket_next: Cell<u64>,
    served: RefCell<Slab<Rc<Connection>>>,
    closing: Cell<bool>,
    budget: Rc<Budget>,
}

/// Payload in flight on a shard.
#[derive(Default)]
struct Budget {
    bytes: Cell<u64>,
    /// Connections whose reader waits for room.
    waiting: RefCell<Vec<Rc<Connection>>>,
}

impl Budget {
    fn take(&self, bytes: u64) {
        self.bytes.set(self.bytes.get() + bytes);
    }

    fn give_back(&self, bytes: u64) {
        self.bytes.set(self.bytes.get() - bytes);
        let waiting = self.waiting.take();
        waiting.iter().for_each(|connection| connection.room.notify());
    }
}

/// An export held for a client whose handshake is about to end.
struct Claim {
    export: Rc<dyn Export>,
    read_only: bool,
    guard: ClientGuard,
    link: Rc<Link>,
}

/// How the engine reaches the connection that it wants gone.
#[derive(Default)]
struct Link {
    cut: Cell<bool>,
    connection: RefCell<Weak<Connection>>,
}

/// What a client is told of the export that it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claimed {
    pub(crate) ticket: u64,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
}

impl Clients {
    pub(crate) fn new(ring: Ring, stats: Arc<ClientStats>) -> Rc<Self> {
        Rc::new(Self {
            ring,
            stats,
            claims: RefCell::default(),
            ticket_next: Cell::new(1),
            served: RefCell::default(),
            closing: Cell::new(false),
            budget: Rc::default(),
        })
    }

    /// Opens an export for a client.
    pub(crate) fn claim(self: &Rc<Self>, source: &impl ExportSource, key: Uuid) -> Result<Claimed> {
        if self.closing.get() {
            return Err(Error::Gone("the agent is stopping".to_owned()));
        }
        let export = source.export(key).ok_or_else(|| Error::NotFound { what: "export", name: key.to_string() })?;
        let ticket = self.ticket_next.get();
        self.ticket_next.set(ticket + 1);
        let link = Rc::<Link>::default();
        let read_only = export.read_only();
        let (clients, cut) = (Rc::downgrade(self), Rc::clone(&link));
        let on_disconnect = Box::new(move || {
            cut.cut.set(true);
            let connection = cut.connection.borrow().upgrade();
            if let Some(connection) = connection {
                connection.cut();
            } else if let Some(clients) = clients.upgrade() {
                // Not from inside the engine's call: the guard's drop calls the engine.
                clients.ring.clone().spawn(async move { clients.release(ticket) });
            }
        });
        let guard = export.connect(!read_only, on_disconnect)?;
        let size = export.size();
        self.claims.borrow_mut().insert(ticket, Claim { export, read_only, guard, link });
        Ok(Claimed { ticket, size, read_only })
    }

    /// The client left during its handshake.
    pub(crate) fn release(&self, ticket: u64) {
        let claim = self.claims.borrow_mut().remove(&ticket);
        drop(claim);
    }

    /// Serves the client that holds `ticket` on `socket`.
    pub(crate) fn adopt(self: &Rc<Self>, ticket: u64, socket: OwnedFd, session: NbdSession) {
        let claim = self.claims.borrow_mut().remove(&ticket);
        let Some(Claim { export, read_only, guard, link }) = claim else { return };
        if link.cut.get() || self.closing.get() {
            return;
        }
        let _ = setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER);
        let connection = Rc::new(Connection {
            ring: self.ring.clone(),
            socket: Rc::new(socket),
            export,
            read_only,
            session,
            stats: Arc::clone(&self.stats),
            changed: RefCell::default(),
            reading: Cell::new(true),
            sending: Cell::new(true),
            inflight: Cell::new(0),
            inflight_bytes: Cell::new(0),
            replies: RefCell::default(),
            room: Signal::default(),
            ready: Signal::default(),
            stopped: Signal::default(),
            budget: Rc::clone(&self.budget),
        });
        link.connection.replace(Rc::downgrade(&connection));
        let key = self.served.borrow_mut().insert(Rc::clone(&connection));
        count(&self.stats.connections, 1);
        count(&self.stats.connections_total, 1);
        let clients = Rc::clone(self);
        self.ring.spawn(async move {
            let end = connection.serve().await;
            drop(guard);
            connection.close(end).await;
            let connection = clients.served.borrow_mut().remove(key);
            drop(connection);
            count(&clients.stats.connections, 1_u64.wrapping_neg());
        });
    }

    /// Takes in no more clients and no more requests, answers what was taken in, closes. Clients that do not take their
    /// answers within `grace_ns` are cut off. Answers how many those were. What is in the engine ends by the engine's own bounds, unless a disk hangs: after
    /// `patience_ns`, if that is longer, it is not waited for any more.
    pub(crate) async fn drain(&self, grace_ns: u64, patience_ns: u64) -> usize {
        self.closing.set(true);
        let claims = self.claims.take();
        drop(claims);
        self.each(Connection::stop_reading);
        let begun = self.ring.boot_ns();
        let (end, give_up) = (begun.saturating_add(grace_ns), begun.saturating_add(grace_ns.max(patience_ns)));
        let mut cut = None;
        while !self.served.borrow().is_empty() {
            let now = self.ring.boot_ns();
            if cut.is_none() && now >= end {
                cut = Some(self.each(Connection::cut));
            } else if now >= give_up {
                let clients = self.served.borrow().len();
                tracing::warn!(clients, "requests are in the engine still, and not waited for any longer");
                break;
            }
            self.ring.sleep_ns(DRAIN_LOOK_NS).await;
        }
        cut.unwrap_or(0)
    }

    /// Nobody is served or about to be, and all room is free: for the fuzzers, after the last client.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn is_idle(&self) -> bool {
        let nobody = self.claims.borrow().is_empty() && self.served.borrow().is_empty();
        nobody && self.budget.bytes.get() == 0 && self.budget.waiting.borrow().is_empty()
    }

    fn each(&self, act: impl Fn(&Connection)) -> usize {
        let served: Vec<_> = self.served.borrow().iter().map(|(_, connection)| Rc::clone(connection)).collect();
        served.iter().for_each(|connection| act(connection));
        served.len()
    }
}

/// One client.
struct Connection {
    ring: Ring,
    socket: Rc<OwnedFd>,
    export: Rc<dyn Export>,
    read_only: bool,
    session: NbdSession,
    /// The blocks of `qemu:dirty-bitmap:`, once they were asked for.
    changed: RefCell<Option<Rc<Touched>>>,
    stats: Arc<ClientStats>,
    budget: Rc<Budget>,
    /// More requests are taken.
    reading: Cell<bool>,
    /// Replies are of use to somebody.
    sending: Cell<bool>,
    /// Requests admitted and not answered.
    inflight: Cell<u32>,
    inflight_bytes: Cell<u64>,
    replies: RefCell<VecDeque<Reply>>,
    /// The reader waits here for room.
    room: Signal,
    /// The writer waits here for replies.
    ready: Signal,
    /// A receive waits here for its end.
    stopped: Signal,
}

/// How a connection's service ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client left, or broke off.
    Left,
    /// We stopped, and it may still be sending.
    Stopped,
}

/// A request that passed the door. Ranges lie inside the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Read,
    Write,
    Flush,
    Trim,
    Cache,
    WriteZeroes { no_hole: bool },
    Status { one: bool },
}

/// The answer to a request, or a piece of it.
struct Reply {
    cookie: u64,
    offset: u64,
    /// Bytes of in-flight room that go back with it.
    charge: u64,
    /// Nothing more comes: the request is answered.
    last: bool,
    body: Body,
}

/// What stands before data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// That of an answer that has so many bytes, here and in what follows right behind.
    Answer(u32),
    /// That of a chunk of its own (structured replies only), behind which others may come.
    Chunk { last: bool },
    /// Nothing: they go on where the last ones ended.
    None,
}

/// How a request was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// With room for all of it.
    Whole,
    /// Without any: for each of its pieces there has to be room.
    InPieces,
}

enum Body {
    Done,
    Data(Vec<Slice>, Head),
    /// Extents by the number of their context.
    Status(Vec<(u32, Vec<(u32, u32)>)>),
    Error(u32, String),
}

/// A request that is refused: the protocol's error number and words for people.
type Refusal = (u32, String);

/// Bytes received and not yet looked at.
struct Received {
    buf: IoBuf,
    start: usize,
    end: usize,
}

impl Connection {
    async fn serve(self: &Rc<Self>) -> End {
        let writer_done = Rc::new((Cell::new(false), Signal::default()));
        let (connection, done) = (Rc::clone(self), Rc::clone(&writer_done));
        self.ring.spawn(async move {
            connection.write_replies().await;
            done.0.set(true);
            done.1.notify();
        });
        if let Err(reason) = self.read_requests().await {
            tracing::debug!(export = self.session.export_name, %reason, "NBD connection dropped");
            self.cut();
        }
        let stopped = !self.reading.replace(false);
        self.ready.notify();
        writer_done.1.until(|| writer_done.0.get().then_some(())).await;
        if stopped && self.sending.get() { End::Stopped } else { End::Left }
    }

    /// Closes without losing the last replies. TCP throws away what the client has not read yet when a socket is closed that holds
    /// requests; so where we are the one who ends, they are read and thrown away, until the client has seen the end.
    async fn close(&self, end: End) {
        let tcp = matches!(
            getsockname::<SockaddrStorage>(self.socket.as_raw_fd()).ok().and_then(|name| name.family()),
            Some(AddressFamily::Inet | AddressFamily::Inet6)
        );
        if end == End::Stopped && tcp && shutdown(self.socket.as_raw_fd(), Shutdown::Write).is_ok() {
            let discard = async {
                let mut buf = IoBuf::zeroed(RECEIVE_BYTES);
                loop {
                    let result;
                    (result, buf) = self.ring.recv(&self.socket, buf, 0, RECEIVE_BYTES, false).await;
                    match result {
                        Ok(1..) => {}
                        Err(error) if is_passing(&error) => {}
                        _ => return,
                    }
                }
            };
            select(pin!(discard), pin!(self.ring.sleep_ns(LINGER_NS))).await;
        }
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// No more requests; those taken in are answered.
    fn stop_reading(&self) {
        self.reading.set(false);
        self.room.notify();
        self.ready.notify();
        self.stopped.notify();
    }

    /// No more requests and no more answers.
    fn cut(&self) {
        self.sending.set(false);
        self.stop_reading();
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both); // ends a send that waits
    }

    /// Takes requests until the client leaves or is to leave. An error: the client broke the protocol or the socket.
    async fn read_requests(self: &Rc<Self>) -> io::Result<()> {
        let mut received = Received { buf: IoBuf::zeroed(RECEIVE_BYTES), start: 0, end: 0 };
        loop {
            let filled;
            (filled, received) = self.fill(received, size_of::<Request>()).await;
            if !filled? || !self.reading.get() {
                return Ok(());
            }
            let head = &received.buf[received.start..received.start + size_of::<Request>()];
            let request = Request::read_from_bytes(head).expect("as many bytes as a request has");
            received.start += size_of::<Request>();
            if request.magic.get() != wire::REQUEST_MAGIC {
                return Err(broken(format!("request magic {:#x}", request.magic.get())));
            }
            let outcome;
            (outcome, received) = self.take_in(request, received).await;
            if outcome?.is_break() {
                return Ok(());
            }
        }
    }

    /// Checks one request, receives its payload, starts it.
    async fn take_in(
        self: &Rc<Self>,
        request: Request,
        mut received: Received,
    ) -> (io::Result<ControlFlow<()>>, Received) {
        let len = request.len.get();
        let is_write = request.command.get() == command::WRITE;
        if request.command.get() == command::DISC {
            return (Ok(ControlFlow::Break(())), received);
        }
        let verdict = check(&request, self.export.size(), self.read_only, &self.session);
        let divisible = matches!(&verdict, Ok(Command::Read | Command::Write));
        let charge = match &verdict {
            Ok(Command::Read | Command::Write) => u64::from(len),
            Ok(Command::Status { .. }) => STATUS_BYTES,
            _ => 0,
        };
        let Some(entry) = self.admit(charge, divisible).await else {
            return (Ok(ControlFlow::Break(())), received);
        };
        let (cookie, offset) = (request.cookie.get(), request.offset.get());
        let fua = request.flags.get() & command::FLAG_FUA != 0;
        match verdict {
            Err((errno, words)) => {
                if is_write {
                    if len > REFUSED_PAYLOAD_MAX {
                        self.release(1, charge);
                        return (Err(broken(format!("a write of {len} bytes"))), received);
                    }
                    let skipped;
                    (skipped, received) = self.skip(received, len as usize).await;
                    if !matches!(skipped, Ok(true)) {
                        self.release(1, charge);
                        return (skipped.map(|_| ControlFlow::Break(())), received);
                    }
                }
                self.answer(Reply { cookie, offset, charge, last: true, body: Body::Error(errno, words) });
            }
            Ok(Command::Write) if entry == Entry::InPieces => {
                let done;
                (done, received) = self.write_in_pieces(offset, len, fua, received).await;
                let body = match done {
                    Ok(Some(body)) => body,
                    ended => {
                        self.release(1, 0);
                        return (ended.map(|_| ControlFlow::Break(())), received);
                    }
                };
                self.answer(Reply { cookie, offset, charge: 0, last: true, body });
            }
            Ok(Command::Read) if entry == Entry::InPieces => {
                let one_chunk = !self.session.structured || request.flags.get() & command::FLAG_DF != 0;
                if let Err(error) = self.read_in_pieces(cookie, offset, len, one_chunk).await {
                    self.release(1, 0);
                    return (Err(error), received);
                }
            }
            Ok(command) => {
                let mut payload = None;
                if command == Command::Write {
                    let whole;
                    (whole, payload, received) = self.payload(offset, len, received).await;
                    if !matches!(whole, Ok(true)) {
                        self.release(1, charge);
                        return (whole.map(|_| ControlFlow::Break(())), received);
                    }
                    count(&self.stats.bytes_in, u64::from(len));
                }
                let connection = Rc::clone(self);
                self.ring.spawn(async move {
                    let body = connection.execute(command, offset, len, fua, payload).await;
                    let mut charge = charge;
                    if let Command::Status { one } = command {
                        // What is left is what its answer may take: a client that asks and never reads must not fill the memory with extents.
                        let extents = if one { 1 } else { EXTENTS_MAX };
                        let kept = ((connection.session.contexts.len() * extents * 8) as u64).min(charge);
                        connection.release(0, charge - kept);
                        charge = kept;
                    }
                    connection.answer(Reply { cookie, offset, charge, last: true, body });
                });
            }
        }
        (Ok(ControlFlow::Continue(())), received)
    }

    /// Serves a read for which there is no room as a whole: a piece is read when there is room for it. Nothing else of this connection is in flight, so the
    /// pieces follow each other. An error: the connection is cut, or has to be, since an answer that has begun cannot turn into an error.
    async fn read_in_pieces(self: &Rc<Self>, cookie: u64, offset: u64, len: u32, one_chunk: bool) -> io::Result<()> {
        let end = offset + u64::from(len);
        let mut at = offset;
        while at < end {
            let step = piece(at, end);
            let charge = u64::from(step);
            // Also while this is drained: the answer may have begun.
            if !self.piece_room(charge).await {
                return Err(broken("it is cut off inside an answer".to_owned()));
            }
            let begins = at == offset;
            let last = at + charge == end;
            let body = match self.execute(Command::Read, at, step, false, None).await {
                Body::Data(parts, _) if one_chunk => {
                    Body::Data(parts, if begins { Head::Answer(len) } else { Head::None })
                }
                Body::Data(parts, _) => Body::Data(parts, Head::Chunk { last }),
                _ if one_chunk && !begins => {
                    self.release(0, charge);
                    return Err(broken(format!("the read at {at} failed, and its answer has begun")));
                }
                error => {
                    self.answer(Reply { cookie, offset: at, charge, last: true, body: error });
                    return Ok(());
                }
            };
            self.answer(Reply { cookie, offset: at, charge, last, body });
            at += charge;
        }
        Ok(())
    }

    /// Receives and makes a write for which there is no room as a whole, piece by piece, flushed behind the last; after an error the rest is only received. `None`: no more
    /// requests are taken.
    async fn write_in_pieces(
        self: &Rc<Self>,
        offset: u64,
        len: u32,
        fua: bool,
        mut received: Received,
    ) -> (io::Result<Option<Body>>, Received) {
        let end = offset + u64::from(len);
        let mut at = offset;
        // Half of it is no state that a flush has left.
        let mut under_way = None;
        while at < end {
            let step = piece(at, end);
            let charge = u64::from(step);
            if !self.piece_room(charge).await {
                return (Ok(None), received);
            }
            let (whole, payload);
            (whole, payload, received) = self.payload(at, step, received).await;
            if !matches!(whole, Ok(true)) {
                self.release(0, charge);
                return (whole.map(|_| None), received);
            }
            count(&self.stats.bytes_in, charge);
            under_way.get_or_insert_with(|| self.export.begin_write());
            let body = self.execute(Command::Write, at, step, false, payload).await;
            self.release(0, charge);
            at += charge;
            if matches!(body, Body::Error(..)) {
                let skipped;
                (skipped, received) = self.skip(received, (end - at) as usize).await; // at most what a request has
                return (skipped.map(|whole| whole.then_some(body)), received);
            }
        }
        drop(under_way);
        let body = if fua { self.execute(Command::Flush, 0, 0, false, None).await } else { Body::Done };
        (Ok(Some(body)), received)
    }

    /// Waits until the request fits what may be in flight. `None`: no more requests are taken.
    async fn admit(self: &Rc<Self>, bytes: u64, divisible: bool) -> Option<Entry> {
        let alone = || self.inflight.get() == 0;
        let own = || {
            let all = self.inflight_bytes.get() + bytes;
            alone()
                || self.inflight.get() < self.session.inflight_requests_max && all <= self.session.inflight_bytes_max
        };
        let enter = || match own() {
            false => None,
            true if self.has_room(bytes) => Some(Entry::Whole),
            true if alone() => Some(if divisible { Entry::InPieces } else { Entry::Whole }),
            true => {
                self.budget.waiting.borrow_mut().push(Rc::clone(self));
                None
            }
        };
        if enter().is_none() {
            count(&self.stats.throttled, 1);
        }
        let entry = self.room.until(|| if self.reading.get() { enter().map(Some) } else { Some(None) }).await?;
        self.inflight.set(self.inflight.get() + 1);
        if entry == Entry::Whole {
            self.take_room(bytes);
        }
        count(&self.stats.requests, 1);
        Some(entry)
    }

    /// Whether the shard has room for so much more of this connection. A connection may hold as much as it leaves free: so a few that hold all they can leave
    /// something for the next.
    fn has_room(&self, bytes: u64) -> bool {
        let all = self.inflight_bytes.get() + bytes;
        all <= SHARE_MIN || all <= self.session.shard_bytes_max.saturating_sub(self.budget.bytes.get())
    }

    /// Waits for room for a piece of a request that was let in without, and takes it. `false`: the connection is cut.
    async fn piece_room(self: &Rc<Self>, bytes: u64) -> bool {
        let enter = || {
            let fits = self.has_room(bytes);
            if !fits {
                self.budget.waiting.borrow_mut().push(Rc::clone(self));
            }
            fits
        };
        let go_on = self.room.until(|| if self.sending.get() { enter().then_some(true) } else { Some(false) }).await;
        if go_on {
            self.take_room(bytes);
        }
        go_on
    }

    fn take_room(&self, bytes: u64) {
        self.inflight_bytes.set(self.inflight_bytes.get() + bytes);
        self.budget.take(bytes);
    }

    fn release(&self, requests: u32, bytes: u64) {
        self.inflight.set(self.inflight.get() - requests);
        self.inflight_bytes.set(self.inflight_bytes.get() - bytes);
        self.room.notify();
        self.budget.give_back(bytes);
    }

    /// Receives, unless and until no more requests are to be taken: then `None`, and the buffer stays with the ring.
    async fn recv(&self, buf: IoBuf, start: usize, len: usize, all: bool) -> Option<(io::Result<usize>, IoBuf)> {
        let stopped = pin!(self.stopped.until(|| (!self.reading.get()).then_some(())));
        let received = pin!(self.ring.recv(&self.socket, buf, start, len, all));
        match select(stopped, received).await {
            Either::Left(_) => None,
            Either::Right((received, _)) => Some(received),
        }
    }

    /// Has at least `need` bytes in the receive buffer. `Ok(false)`: the client closed before the first of them.
    async fn fill(&self, mut received: Received, need: usize) -> (io::Result<bool>, Received) {
        while received.end - received.start < need {
            if received.start == received.end {
                (received.start, received.end) = (0, 0);
            } else if RECEIVE_BYTES - received.start < need {
                received.buf.copy_within(received.start..received.end, 0);
                (received.start, received.end) = (0, received.end - received.start);
            }
            let Received { buf, start, end } = received;
            let Some((result, buf)) = self.recv(buf, end, RECEIVE_BYTES - end, false).await else {
                return (Ok(false), Received { buf: IoBuf::zeroed(0), start: 0, end: 0 });
            };
            received = Received { buf, start, end };
            match result {
                Ok(0) if start == end => return (Ok(false), received),
                Ok(0) => return (Err(broken("the client closed inside a request".to_owned())), received),
                Ok(count) => received.end += count,
                Err(error) if is_passing(&error) => {}
                Err(error) => return (Err(error), received),
            }
        }
        (Ok(true), received)
    }

    /// The payload of a write, at its place in its block. `Ok(false)`: no more requests are taken.
    async fn payload(
        &self,
        offset: u64,
        len: u32,
        mut received: Received,
    ) -> (io::Result<bool>, Option<IoBuf>, Received) {
        let mut payload = payload_buf(offset, len);
        let mut at = (offset % BLOCK_BYTES) as usize;
        let end = at + len as usize;
        let ahead = (len as usize).min(received.end - received.start);
        payload[at..at + ahead].copy_from_slice(&received.buf[received.start..received.start + ahead]);
        received.start += ahead;
        at += ahead;
        while at < end {
            let Some((result, buf)) = self.recv(payload, at, end - at, true).await else {
                return (Ok(false), None, received);
            };
            payload = buf;
            match result {
                Ok(0) => return (Err(broken("the client closed inside a payload".to_owned())), None, received),
                Ok(count) => at += count,
                Err(error) if is_passing(&error) => {}
                Err(error) => return (Err(error), None, received),
            }
        }
        (Ok(true), Some(payload), received)
    }

    /// Throws away the payload of a refused write.
    async fn skip(&self, mut received: Received, mut len: usize) -> (io::Result<bool>, Received) {
        while len > 0 {
            if received.start == received.end {
                let filled;
                (filled, received) = self.fill(received, 1).await;
                match filled {
                    Ok(true) if self.reading.get() => {}
                    Ok(_) => return (Ok(false), received),
                    Err(error) => return (Err(error), received),
                }
            }
            let step = len.min(received.end - received.start);
            received.start += step;
            len -= step;
        }
        (Ok(true), received)
    }

    /// Has the engine do it.
    async fn execute(&self, command: Command, offset: u64, len: u32, fua: bool, payload: Option<IoBuf>) -> Body {
        let export = &self.export;
        let done = |result: Result<()>| result.map(|()| Body::Done);
        let result = match command {
            Command::Read => export.read(offset, len).await.and_then(|parts| {
                // A reply of another length would garble everything behind it.
                let read: usize = parts.iter().map(Slice::len).sum();
                if read == len as usize {
                    Ok(Body::Data(parts, Head::Answer(len)))
                } else {
                    Err(wrong_length(read, len))
                }
            }),
            Command::Write => match payload {
                Some(payload) => done(export.write(offset, len, payload, fua).await),
                None => Err(wrong_length(0, len)),
            },
            Command::Flush => done(export.flush().await),
            Command::Trim => match export.trim(offset, len).await {
                Ok(()) if fua => done(export.flush().await),
                result => done(result),
            },
            Command::Cache => Ok(Body::Done), // a hint; the engine caches what it sees fit
            Command::WriteZeroes { no_hole } => done(export.write_zeroes(offset, len, no_hole, fua).await),
            Command::Status { one } => self.block_status(offset, len, one).await,
        };
        result.unwrap_or_else(|failure| Body::Error(errno_of(&failure), failure.to_string()))
    }

    /// The extents of a range in each context that was chosen.
    async fn block_status(&self, offset: u64, len: u32, one: bool) -> Result<Body> {
        let mut answers = Vec::new();
        for context in &self.session.contexts {
            let extents = match context {
                MetaContext::Allocation => extents(&self.export.status(offset, u64::from(len)).await?, len, one),
                MetaContext::Since(since) => {
                    let known = self.changed.borrow().clone();
                    let changed = match known {
                        Some(changed) => changed,
                        None => {
                            // Asked once for a connection: a view shows the same for as long as it lives.
                            let changed = self.export.changed_since(*since).await?;
                            *self.changed.borrow_mut() = Some(Rc::clone(&changed));
                            changed
                        }
                    };
                    changed_extents(&changed, offset, len, one)
                }
            };
            answers.push((context.id(), extents));
        }
        Ok(Body::Status(answers))
    }

    fn answer(&self, reply: Reply) {
        self.replies.borrow_mut().push_back(reply);
        self.ready.notify();
    }

    /// Sends what is ready, as much as possible at once, until all that was admitted is answered and no more is coming.
    async fn write_replies(&self) {
        let mut batch = Box::<SendBatch>::default();
        loop {
            let more = self.ready.until(|| match self.replies.borrow().is_empty() {
                false => Some(true),
                true => (!self.reading.get() && self.inflight.get() == 0).then_some(false),
            });
            if !more.await {
                return;
            }
            let (mut requests, mut bytes) = (0, 0);
            while batch.pieces() < BATCH_PIECES && batch.bytes() < BATCH_BYTES {
                let Some(reply) = self.replies.borrow_mut().pop_front() else { break };
                requests += u32::from(reply.last);
                bytes += reply.charge;
                if matches!(reply.body, Body::Error(..)) {
                    count(&self.stats.errors, 1);
                }
                if self.sending.get() {
                    encode(reply, self.session.structured, &mut batch);
                }
            }
            if self.sending.get() {
                count(&self.stats.sends, 1);
                count(&self.stats.bytes_out, batch.bytes() as u64);
                let result;
                (result, batch) = self.ring.send(&self.socket, batch).await;
                if let Err(error) = result {
                    tracing::debug!(export = self.session.export_name, %error, "sending NBD replies failed");
                    self.cut();
                }
            }
            batch.clear();
            self.release(requests, bytes);
        }
    }
}

const BLOCK_BYTES: u64 = cdp_journal::BLOCK;

/// The door: what is wrong with a request, if anything. Also decides which flags go with which command.
fn check(request: &Request, size: u64, read_only: bool, session: &NbdSession) -> Result<Command, Refusal> {
    let refuse = |errno, words: String| Err((errno, words));
    let (code, flags) = (request.command.get(), request.flags.get());
    let (offset, len) = (request.offset.get(), request.len.get());
    let (command, allowed) = match code {
        command::READ => (Command::Read, if session.structured { command::FLAG_DF } else { 0 }),
        command::WRITE => (Command::Write, 0),
        command::FLUSH => (Command::Flush, 0),
        command::TRIM => (Command::Trim, 0),
        command::CACHE => (Command::Cache, 0),
        command::WRITE_ZEROES => {
            let no_hole = flags & command::FLAG_NO_HOLE != 0;
            (Command::WriteZeroes { no_hole }, command::FLAG_NO_HOLE | command::FLAG_FAST_ZERO)
        }
        command::BLOCK_STATUS if !session.contexts.is_empty() => {
            (Command::Status { one: flags & command::FLAG_REQ_ONE != 0 }, command::FLAG_REQ_ONE)
        }
        command::BLOCK_STATUS => return refuse(error::EINVAL, "no metadata context was negotiated".to_owned()),
        _ => return refuse(error::EINVAL, format!("command {code} is not known")),
    };
    // FUA may come with any command, and means nothing to those that change nothing.
    let unknown = flags & !(allowed | command::FLAG_FUA);
    if unknown != 0 {
        return refuse(error::EINVAL, format!("flags {unknown:#x} do not go with command {code}"));
    }
    let changes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes { .. });
    if changes && read_only {
        return refuse(error::EPERM, "the export is read-only".to_owned());
    }
    if flags & command::FLAG_FAST_ZERO != 0 && code == command::WRITE_ZEROES {
        return refuse(error::ENOTSUP, "zeroes are not known to be faster than a write".to_owned());
    }
    if command == Command::Flush {
        return Ok(command); // it has no range
    }
    if len == 0 {
        return refuse(error::EINVAL, "a length of 0".to_owned());
    }
    if matches!(command, Command::Read | Command::Write) && len > PAYLOAD_MAX {
        return refuse(error::EINVAL, format!("{len} bytes, at most {PAYLOAD_MAX} fit a request"));
    }
    if offset % SECTOR != 0 || u64::from(len) % SECTOR != 0 {
        return refuse(error::EINVAL, format!("{offset}+{len} is not in whole sectors of {SECTOR} bytes"));
    }
    if offset.checked_add(u64::from(len)).is_none_or(|end| end > size) {
        let errno =
            if matches!(command, Command::Write | Command::WriteZeroes { .. }) { error::ENOSPC } else { error::EINVAL };
        return refuse(errno, format!("{offset}+{len} ends past the export's {size} bytes"));
    }
    Ok(command)
}

/// What is done with the 28 bytes of a request before anything of it is believed: for the fuzzers.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_request(head: &[u8; 28], size: u64, read_only: bool, structured: bool, allocation: bool) -> bool {
    let request = Request::read_from_bytes(head).expect("as many bytes as a request has");
    let contexts = if allocation { vec![MetaContext::Allocation] } else { vec![] };
    let session = NbdSession::new(String::new(), structured, contexts);
    let (offset, len) = (request.offset.get(), u64::from(request.len.get()));
    match check(&request, size, read_only, &session) {
        Ok(Command::Flush) => true,
        Err(_) => false,
        Ok(command) => {
            assert!(offset + len <= size && len > 0 && offset % SECTOR == 0 && len % SECTOR == 0, "{command:?}");
            assert!(!read_only || !matches!(command, Command::Write | Command::Trim | Command::WriteZeroes { .. }));
            assert!(len <= u64::from(PAYLOAD_MAX) || !matches!(command, Command::Read | Command::Write));
            true
        }
    }
}

/// What the engine's errors are to a client. The only place where they are translated.
fn errno_of(failure: &Error) -> u32 {
    match failure {
        Error::NoSpace { .. } => error::ENOSPC,
        Error::Invalid { .. } => error::EINVAL,
        Error::Gone(_) => error::ESHUTDOWN,
        Error::Device { errno, .. } => match *errno {
            libc::EPERM | libc::EACCES | libc::EROFS => error::EPERM,
            libc::ENOMEM => error::ENOMEM,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => error::ENOSPC,
            libc::EOPNOTSUPP => error::ENOTSUP,
            _ => error::EIO, // also EINVAL: it is the disk that objects, not the client that is wrong
        },
        _ => error::EIO,
    }
}

fn wrong_length(got: usize, wanted: u32) -> Error {
    Error::Damaged { what: "answer", place: format!("the frontend ({got} bytes instead of {wanted})") }
}

/// The engine's pieces as extents of `base:allocation`: alike neighbours joined, no more than the protocol and `one` allow.
fn extents(pieces: &[BlockStatus], len: u32, one: bool) -> Vec<(u32, u32)> {
    let mut extents: Vec<(u32, u32)> = vec![];
    let mut left = u64::from(len);
    for piece in pieces {
        let step = piece.len.min(left) as u32; // no more than `len`
        left -= u64::from(step);
        let state = if piece.hole { chunk::STATE_HOLE } else { 0 } | if piece.zero { chunk::STATE_ZERO } else { 0 };
        let known = extents.len();
        match extents.last_mut() {
            _ if step == 0 => {}
            Some((len, last)) if *last == state => *len += step,
            Some(_) if one || known == EXTENTS_MAX => break,
            _ => extents.push((step, state)),
        }
    }
    if extents.is_empty() {
        extents.push((len, 0)); // an answer without an extent is none: call it data
    }
    extents
}

/// What changed in a range as extents of `qemu:dirty-bitmap:`; the answer may be shorter than the question.
fn changed_extents(changed: &Touched, offset: u64, len: u32, one: bool) -> Vec<(u32, u32)> {
    let end = offset + u64::from(len);
    let mut extents: Vec<(u32, u32)> = vec![];
    let mut at = offset;
    let mut push = |extents: &mut Vec<(u32, u32)>, upto: u64, state: u32| {
        let step = (upto - at) as u32; // at most `len`
        at = upto;
        match extents.last_mut() {
            _ if step == 0 => {}
            Some((len, last)) if *last == state => *len += step,
            _ => extents.push((step, state)),
        }
    };
    let mut upto = offset;
    let last_block = end.div_ceil(BLOCK_BYTES);
    let blocks = changed.iter_from(offset / BLOCK_BYTES).take_while(|block| *block < last_block);
    for block in blocks.take(STATUS_BLOCKS_MAX) {
        let start = (block * BLOCK_BYTES).max(offset);
        let stop = ((block + 1) * BLOCK_BYTES).min(end);
        if start > upto {
            push(&mut extents, start, 0);
        }
        push(&mut extents, stop, chunk::STATE_DIRTY);
        upto = stop;
        if extents.len() > EXTENTS_MAX || (one && extents.len() > 1) {
            break;
        }
    }
    let asked_all = changed.iter_from(upto.div_ceil(BLOCK_BYTES)).next().is_none_or(|block| block >= last_block);
    if asked_all && upto < end {
        push(&mut extents, end, 0);
    }
    extents.truncate(if one { 1 } else { EXTENTS_MAX });
    extents
}

/// How much of a request that ends at `end` is served at once, at `at`: pieces end where blocks do.
fn piece(at: u64, end: u64) -> u32 {
    (SHARE_MIN - at % SHARE_MIN).min(end - at) as u32 // at most SHARE_MIN
}

/// Appends a reply as the client expects it.
fn encode(reply: Reply, structured: bool, batch: &mut SendBatch) {
    let Reply { cookie, offset, body, .. } = reply;
    let simple = |batch: &mut SendBatch, errno: u32| {
        let head = SimpleReply { magic: wire::SIMPLE_REPLY_MAGIC.into(), error: errno.into(), cookie: cookie.into() };
        batch.push_head(head.as_bytes());
    };
    let chunk_head = |batch: &mut SendBatch, kind: u16, flags: u16, len: usize| {
        let head = ChunkHead {
            magic: wire::CHUNK_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            len: (len as u32).into(), // at most 32 MiB and a little
        };
        batch.push_head(head.as_bytes());
    };
    match body {
        // A request without an answer's payload may be answered simply in either case.
        Body::Done => simple(batch, 0),
        Body::Data(parts, head) => {
            let announced = match head {
                Head::None => None,
                // One chunk for all, so the flag DF is honoured without being looked at.
                Head::Answer(len) => Some((len as usize, chunk::FLAG_DONE)),
                Head::Chunk { last } => {
                    Some((parts.iter().map(Slice::len).sum(), if last { chunk::FLAG_DONE } else { 0 }))
                }
            };
            match announced {
                Some((len, flags)) if structured => {
                    chunk_head(batch, chunk::OFFSET_DATA, flags, 8 + len);
                    batch.push_head(&offset.to_be_bytes());
                }
                Some(_) => simple(batch, 0),
                None => {}
            }
            parts.into_iter().for_each(|part| batch.push_part(part));
        }
        Body::Status(contexts) => {
            let last = contexts.len();
            for (at, (id, extents)) in contexts.into_iter().enumerate() {
                let done = at + 1 == last;
                chunk_head(batch, chunk::BLOCK_STATUS, if done { chunk::FLAG_DONE } else { 0 }, 4 + 8 * extents.len());
                batch.push_head(&id.to_be_bytes());
                for (len, state) in extents {
                    batch.push_head(&len.to_be_bytes());
                    batch.push_head(&state.to_be_bytes());
                }
            }
        }
        Body::Error(errno, words) if structured => {
            let words = &words.as_bytes()[..words.floor_char_boundary(STRING_MAX)];
            chunk_head(batch, chunk::ERROR, chunk::FLAG_DONE, 6 + words.len());
            batch.push_head(&errno.to_be_bytes());
            batch.push_head(&(words.len() as u16).to_be_bytes());
            batch.push_head(words);
        }
        Body::Error(errno, _) => simple(batch, errno),
    }
}

/// Errors after which the same call is simply made again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn broken(words: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}
