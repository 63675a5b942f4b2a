//! A shard: one OS thread with its ring, some state that lives on it (the engine), and the clients served from it.
//!
//! Everything on a shard runs on its thread, so nothing of it is locked. The control plane reaches it through a [`ShardHandle`]:
//! it sends a closure, the shard runs it, the answer comes back.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use futures::future::join;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::frontend::fuse::files::{self, Files};
use crate::frontend::nbd::transmission::{Claimed, Clients};
use crate::frontend::nbd::{ClientStats, ExportSource, NbdSession};
use crate::ring::Ring;

/// How long clients may take for the rest of their answers when a shard is stopped without a drain before.
const STOP_GRACE_NS: u64 = 1_000_000_000;
/// How long a drain waits for what the engine has: a disk that hangs ends nothing of it.
const ENGINE_PATIENCE_NS: u64 = 30_000_000_000;

/// The shard's thread has ended: it was stopped, or something on it panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the shard has stopped")]
pub struct ShardGone;

/// What is on the shard's thread.
struct Context<S> {
    state: S,
    ring: Ring,
    clients: Rc<Clients>,
    files: Rc<Files>,
}

type Work<S> = Box<dyn FnOnce(&Context<S>) + Send>;

enum Message<S> {
    Run(Work<S>),
    Stop,
}

/// A shard as other threads see it. `S` is the state that lives on it (`Rc<Engine>`), cloned for each call.
///
/// Dropping the handle stops the shard like [`ShardHandle::stop`], without waiting for it.
pub struct ShardHandle<S> {
    name: String,
    messages: mpsc::UnboundedSender<Message<S>>,
    heartbeat: Arc<AtomicU64>,
    clients: Arc<ClientStats>,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl<S: Clone + 'static> ShardHandle<S> {
    /// Starts the thread `name` (at most 15 bytes are seen by the system) and makes its ring, then its state.
    ///
    /// # Errors
    /// When there is no thread or no io_uring to be had.
    pub fn start(name: &str, build: impl FnOnce(Ring) -> S + Send + 'static) -> io::Result<Self> {
        let (messages, mut received) = mpsc::unbounded_channel::<Message<S>>();
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let clients = Arc::<ClientStats>::default();
        let stats = Arc::clone(&clients);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let ring = match Ring::new() {
                Ok(ring) => ring,
                Err(error) => {
                    let _ = tell.send(Err(error));
                    return;
                }
            };
            protect_from_writeback();
            let _ = tell.send(Ok(ring.heartbeat()));
            let handle = ring.clone();
            ring.run(async move {
                let clients = Clients::new(handle.clone(), stats);
                let files = Files::new(handle.clone());
                let context = Context { state: build(handle.clone()), ring: handle, clients, files };
                while let Some(Message::Run(run)) = received.recv().await {
                    run(&context);
                }
                drain(context.clients, context.files, STOP_GRACE_NS, 2 * STOP_GRACE_NS).await;
            });
        })?;
        let heartbeat =
            told.recv().unwrap_or_else(|_| Err(io::Error::other("the shard's thread ended at its start")))?;
        Ok(Self { name: name.to_owned(), messages, heartbeat, clients, thread: Some(thread).into() })
    }

    /// A shard on the caller's own thread and ring: for the fuzzers, since another thread's answers take longer than an input. The
    /// future serves it; it ends when the handle is dropped and with it all that it gave out, and answers what is left.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn here(ring: Ring, state: S) -> (Self, impl Future<Output = Rc<Clients>>) {
        let (messages, mut received) = mpsc::unbounded_channel::<Message<S>>();
        let stats = Arc::<ClientStats>::default();
        let handle = Self {
            name: "here".to_owned(),
            messages,
            heartbeat: ring.heartbeat(),
            clients: Arc::clone(&stats),
            thread: std::sync::Mutex::new(None),
        };
        let (clients, files) = (Clients::new(ring.clone(), stats), Files::new(ring.clone()));
        let context = Context { state, ring, clients, files };
        let served = async move {
            while let Some(Message::Run(run)) = received.recv().await {
                run(&context);
            }
            context.clients
        };
        (handle, served)
    }

    /// Runs a closure on the shard and the future that it makes, beside the shard's other work. Dropping the returned future does
    /// not stop the work.
    ///
    /// # Errors
    /// [`ShardGone`] when the shard ended before the answer.
    pub async fn call<F, Fut, T>(&self, work: F) -> Result<T, ShardGone>
    where
        F: FnOnce(S, Ring) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        self.send(move |context| {
            let future = work(context.state.clone(), context.ring.clone());
            context.ring.spawn(async move {
                let _ = answer.send(future.await); // nobody waits any more: so be it
            });
        })?;
        answered.await.map_err(|_| ShardGone)
    }

    /// The thread's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rises several times a second as long as the thread runs its loop. Standing still for seconds means stuck.
    pub fn heartbeat(&self) -> u64 {
        self.heartbeat.load(Ordering::Relaxed)
    }

    /// Counters of its clients.
    pub fn client_stats(&self) -> &ClientStats {
        &self.clients
    }

    /// Takes in no more clients and requests, answers those it has, closes the connections; what clients have not taken after
    /// `grace` is cut off. Answers how many clients were. What the engine still has after half a minute is left to it.
    ///
    /// # Errors
    /// [`ShardGone`].
    pub async fn drain(&self, grace: std::time::Duration) -> Result<usize, ShardGone> {
        let (answer, answered) = oneshot::channel();
        let grace_ns = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
        self.send(move |context| {
            let (clients, files) = (Rc::clone(&context.clients), Rc::clone(&context.files));
            context.ring.spawn(async move {
                let cut = drain(clients, files, grace_ns, ENGINE_PATIENCE_NS).await;
                let _ = answer.send(cut); // nobody waits any more: so be it
            });
        })?;
        answered.await.map_err(|_| ShardGone)
    }

    /// Ends the thread: clients are drained briefly, the state is dropped. What the engine has to write down before is the
    /// caller's to ask for, by [`ShardHandle::call`].
    ///
    /// # Errors
    /// [`ShardGone`] when the thread had panicked, or was stopped already.
    pub async fn stop(&self) -> Result<(), ShardGone> {
        let _ = self.messages.send(Message::Stop);
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take().ok_or(ShardGone)?;
        match tokio::task::spawn_blocking(move || thread.join()).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(ShardGone),
        }
    }

    fn send(&self, work: impl FnOnce(&Context<S>) + Send + 'static) -> Result<(), ShardGone> {
        self.messages.send(Message::Run(Box::new(work))).map_err(|_| ShardGone)
    }
}

impl<S: ExportSource + Clone + 'static> ShardHandle<S> {
    /// Takes a client's seat at an export. The inner error is the engine's refusal.
    ///
    /// # Errors
    /// [`ShardGone`].
    pub async fn open_export(&self, key: Uuid) -> Result<cdp_journal::Result<ExportClaim<S>>, ShardGone> {
        let (answer, answered) = oneshot::channel();
        let messages = self.messages.clone();
        self.send(move |context| {
            let claim = (context.clients.claim(&context.state, key)).map(|claimed| ExportClaim {
                messages,
                claimed,
                adopted: false,
            });
            let _ = answer.send(claim); // a claim that nobody takes gives its seat back
        })?;
        answered.await.map_err(|_| ShardGone)
    }
}

impl<S: ExportSource + Clone + 'static> ShardHandle<S> {
    /// Opens an export as a file. The inner error is the engine's refusal.
    ///
    /// # Errors
    /// [`ShardGone`].
    pub(crate) async fn open_file(
        &self,
        key: Uuid,
        write: bool,
    ) -> Result<cdp_journal::Result<files::Opened>, ShardGone> {
        let (answer, answered) = oneshot::channel();
        self.send(move |context| {
            let opened = context.files.open(&context.state, key, write);
            if let Err(Ok(unwanted)) = answer.send(opened) {
                context.files.request(unwanted.ticket, files::Request::Close);
            }
        })?;
        answered.await.map_err(|_| ShardGone)
    }

    /// Has something done with an open file; the request carries its answer's way.
    ///
    /// # Errors
    /// [`ShardGone`]; the request was dropped, which answers it.
    pub(crate) fn file_request(&self, ticket: u64, request: files::Request) -> Result<(), ShardGone> {
        self.send(move |context| context.files.request(ticket, request))
    }
}

/// See [`Clients::drain`] and [`Files::drain`]: side by side, so that neither keeps the other's holds on volumes.
async fn drain(clients: Rc<Clients>, files: Rc<Files>, grace_ns: u64, patience_ns: u64) -> usize {
    join(clients.drain(grace_ns, patience_ns), files.drain(patience_ns)).await.0
}

/// A client's hold on an export, on its way through the handshake. Dropped, it is given back; adopted, it lasts as long as the
/// connection.
pub struct ExportClaim<S: 'static> {
    messages: mpsc::UnboundedSender<Message<S>>,
    claimed: Claimed,
    adopted: bool,
}

impl<S: 'static> ExportClaim<S> {
    /// Bytes of the export now.
    pub fn size(&self) -> u64 {
        self.claimed.size
    }

    /// Writes are refused.
    pub fn read_only(&self) -> bool {
        self.claimed.read_only
    }

    /// Hands the connection over: from here on the shard serves it. The socket is in blocking mode.
    pub fn adopt(mut self, socket: OwnedFd, session: NbdSession) {
        self.adopted = true;
        let ticket = self.claimed.ticket;
        let adopt = Box::new(move |context: &Context<S>| context.clients.adopt(ticket, socket, session));
        let _ = self.messages.send(Message::Run(adopt)); // a shard that is gone has closed it
    }
}

impl<S: 'static> Drop for ExportClaim<S> {
    fn drop(&mut self) {
        if !self.adopted {
            let ticket = self.claimed.ticket;
            let release = Box::new(move |context: &Context<S>| context.clients.release(ticket));
            let _ = self.messages.send(Message::Run(release));
        }
    }
}

/// The kernel may come to this thread to get dirty pages written back (a guest's disk can be mounted on this very host): its
/// own allocations must then not wait for that write-back. Needs CAP_SYS_RESOURCE; without it the risk stays.
#[allow(unsafe_code)]
pub(crate) fn protect_from_writeback() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    static TOLD: std::sync::Once = std::sync::Once::new();
    // SAFETY: this prctl takes plain numbers and only sets flags of the calling thread.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        let error = io::Error::last_os_error();
        TOLD.call_once(|| {
            tracing::warn!(
                %error,
                "the data path is not marked as an I/O flusher (it wants CAP_SYS_RESOURCE): file systems that this host has \
                 mounted on its own volumes can hang when the agent's memory cgroup is full"
            );
        });
    }
}

#[cfg(test)]
mod tests;
