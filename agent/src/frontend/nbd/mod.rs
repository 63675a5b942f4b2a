//! The NBD server: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>
//!
//! A connection is accepted and negotiated on tokio (`handshake.rs`), where a slow or hostile client costs nothing but its
//! seat, and one over TCP not even that: it has a seat when its handshake has ended, and handshakes over TCP have a bound of their own
//! ([`tls::Handshakes`]), so whoever reaches the port cannot keep out the guests of this host; then its socket moves to the shard of the export and is served there, on the ring (`transmission.rs`). A TLS connection
//! stays on tokio as a pump between the TLS stream and a socket pair, whose other end moves.
//!
//! Bounds: connections in total ([`NbdConfig::connections_max`]), time of a handshake, bytes of an option, requests and bytes
//! in flight per connection, bytes of a request.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod handshake;
pub mod tls;
pub(crate) mod transmission;
pub mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use uuid::Uuid;

use crate::shard::ShardHandle;

pub use transmission::{ClientStats, ExportSource, NbdSession};

/// Longest read or write, announced as the maximum block size.
pub const PAYLOAD_MAX: u32 = 32 << 20;
/// Smallest unit of offsets and lengths, announced as the minimum block size.
pub const BLOCK_MIN: u32 = 512;
/// The unit that costs least, announced as the preferred block size.
pub const BLOCK_PREFERRED: u32 = 4096;

/// How long to wait when the process is out of descriptors or memory, before accepting again.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Bytes that a TLS connection carries at once in each direction.
const PUMP_BYTES: usize = 256 << 10;
/// How long a TLS client that goes on sending may take to see that the connection has ended.
const PUMP_LINGER: Duration = Duration::from_secs(1);
/// A TCP peer that does not acknowledge for so long is gone, milliseconds: what was sent to it, or that it is asked whether it is there.
const TCP_USER_TIMEOUT_MS: u32 = 30_000;
/// A TCP peer that says nothing for so long is asked whether it is there, seconds.
const TCP_KEEPALIVE_IDLE_S: u32 = 15;
/// And again after so long, seconds. The system gives up at the first question behind the user timeout: so it takes the loss of three, and half a minute. (With the first
/// question behind that timeout, the loss of a single one would do.)
const TCP_KEEPALIVE_INTERVAL_S: u32 = 5;
/// How many go unanswered until a peer is gone, on systems where the user timeout does not count for that.
const TCP_KEEPALIVE_COUNT: u32 = 3;

/// Bounds of the server.
#[derive(Clone, Debug)]
pub struct NbdConfig {
    /// Most connections at a time, over all listeners. Over TCP one counts from the end of its handshake on.
    pub connections_max: usize,
    /// Most handshakes at a time on a TCP listener; the oldest makes room for one more.
    pub tcp_handshakes_max: usize,
    /// A handshake that takes longer is dropped.
    pub handshake_timeout: Duration,
    /// Most requests in flight on a connection.
    pub inflight_requests_max: u32,
    /// Most bytes of payload in flight on a connection. One request is always let in.
    pub inflight_bytes_max: u64,
    /// Bytes of payload in flight on a shard, over all of its connections: each may hold as much as it leaves free. 128 KiB are let in always, and a
    /// larger request that has to be in pieces of that.
    pub shard_bytes_max: u64,
}

impl Default for NbdConfig {
    fn default() -> Self {
        Self {
            connections_max: 256,
            tcp_handshakes_max: 256,
            handshake_timeout: Duration::from_secs(10),
            inflight_requests_max: 128,
            inflight_bytes_max: 64 << 20,
            shard_bytes_max: 256 << 20,
        }
    }
}

/// What an export shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// A volume as it is.
    Volume,
    /// A volume as it was.
    View,
}

/// An export in a list.
#[derive(Clone, Debug)]
pub struct ExportEntry {
    /// What it shows.
    pub kind: ExportKind,
    /// The name to ask for it by.
    pub name: String,
    /// Words for people; may be empty.
    pub description: String,
}

/// An export and where it is served.
pub struct ExportInfo<S> {
    /// What it shows.
    pub kind: ExportKind,
    /// Canonical name.
    pub name: String,
    /// Words for people; may be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The shard that serves it.
    pub shard: Arc<ShardHandle<S>>,
    /// What the shard knows it by: the volume's or view's id.
    pub key: Uuid,
}

/// What there is to serve. The control plane's side of the frontend.
pub trait ExportDirectory<S>: Send + Sync + 'static {
    /// All exports that clients may see.
    fn list(&self) -> BoxFuture<'_, Vec<ExportEntry>>;
    /// The export that a client means by `name` (empty: the default one, if there is one).
    fn find<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Option<ExportInfo<S>>>;
}

/// Where clients come from.
pub enum Listener {
    /// A unix socket. Who may use it is a matter of the socket file's permissions.
    Unix(UnixListener),
    /// TCP. Without `tls` everybody who reaches the port may read and write: only for an admin's explicit `insecure = true`.
    Tcp {
        /// The socket.
        listener: TcpListener,
        /// What encrypts the connections and asks clients for certificates ([`tls::acceptor`]).
        tls: Option<TlsAcceptor>,
    },
}

/// One of the server's seats; given back when it is dropped, wherever the connection ends.
#[derive(Debug)]
pub(crate) struct Seat {
    taken: Arc<AtomicUsize>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The server. Cheap to share; its listeners share one bound of connections.
pub struct NbdServer<S> {
    config: NbdConfig,
    directory: Arc<dyn ExportDirectory<S>>,
    taken: Arc<AtomicUsize>,
}

impl<S: ExportSource + Clone + 'static> NbdServer<S> {
    /// A server of what `directory` knows.
    pub fn new(config: NbdConfig, directory: Arc<dyn ExportDirectory<S>>) -> Arc<Self> {
        Arc::new(Self { config, directory, taken: Arc::default() })
    }

    /// Connections that have a seat now, handshakes over unix sockets included.
    pub fn connections(&self) -> usize {
        self.taken.load(Ordering::Acquire)
    }

    /// Accepts and negotiates until the future is dropped. Dropping it ends the handshakes that are under way; connections
    /// that reached their shard live on until the shard drains them ([`ShardHandle::drain`]).
    pub async fn serve(self: Arc<Self>, listener: Listener) {
        let mut handshakes = JoinSet::new();
        let mut strangers = tls::Handshakes::new(self.config.tcp_handshakes_max);
        let mut full = false;
        loop {
            while handshakes.try_join_next().is_some() {}
            let accepted = match &listener {
                Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
                Listener::Tcp { listener, tls } => {
                    listener.accept().await.map(|(stream, _)| Stream::Tcp(stream, tls.clone()))
                }
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accepting an NBD connection failed");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            // The permissions of a unix socket's file let its clients in: they have their seat at once. Of a TCP peer nothing is known yet.
            let (known, admitted) = match &stream {
                Stream::Unix(_) => (true, self.seat().map(Some)),
                Stream::Tcp(..) => (false, (self.connections() < self.config.connections_max).then_some(None)),
            };
            match admitted {
                Some(seat) => {
                    full = false;
                    let server = Arc::clone(&self);
                    let handshake = handshakes.spawn(async move { server.welcome(stream, seat).await });
                    if !known {
                        strangers.begun(handshake);
                    }
                }
                None => {
                    if !full {
                        tracing::warn!(
                            max = self.config.connections_max,
                            "too many NBD connections: new ones are closed"
                        );
                    }
                    full = true;
                }
            }
        }
    }

    /// Negotiates one connection that the caller accepted, and hands it to its shard. `Ok(false)`: it left without an export.
    ///
    /// # Errors
    /// When the client broke off, broke the protocol or took too long, or all seats are taken.
    pub async fn welcome_unix(self: &Arc<Self>, stream: UnixStream) -> io::Result<bool> {
        let seat = self.seat().ok_or_else(all_taken)?;
        self.negotiate(Stream::Unix(stream), Some(seat)).await
    }

    fn seat(&self) -> Option<Seat> {
        let more = |taken| (taken < self.config.connections_max).then_some(taken + 1);
        self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some(Seat { taken: Arc::clone(&self.taken) })
    }

    async fn welcome(&self, stream: Stream, seat: Option<Seat>) {
        match self.negotiate(stream, seat).await {
            Ok(served) => tracing::debug!(served, "NBD handshake done"),
            Err(error) => tracing::debug!(%error, "NBD handshake failed"),
        }
    }

    /// Without a seat it takes one when the handshake has ended.
    async fn negotiate(&self, stream: Stream, seat: Option<Seat>) -> io::Result<bool> {
        let directory = &*self.directory;
        let end = tokio::time::Instant::now() + self.config.handshake_timeout;
        // Either the socket itself moves to the shard, or the near end of a pair whose far end is pumped to and from it.
        let (claim, session, socket) = match stream {
            Stream::Unix(mut stream) => {
                let Some((claim, session)) = within(end, handshake::plain(&mut stream, directory)).await? else {
                    return Ok(false);
                };
                (claim, session, OwnedFd::from(blocking(stream.into_std()?)?))
            }
            Stream::Tcp(mut stream, tls) => {
                prepare_tcp(&stream)?;
                match tls {
                    None => {
                        let Some((claim, session)) = within(end, handshake::plain(&mut stream, directory)).await?
                        else {
                            return Ok(false);
                        };
                        let stream = stream.into_std()?;
                        stream.set_nonblocking(false)?;
                        (claim, session, stream.into())
                    }
                    Some(acceptor) => {
                        let negotiation = handshake::encrypted(stream, &acceptor, directory);
                        let Some((claim, session, stream)) = within(end, negotiation).await? else {
                            return Ok(false);
                        };
                        let (near, far) =
                            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
                        let far = std::os::unix::net::UnixStream::from(far);
                        far.set_nonblocking(true)?;
                        tokio::spawn(pump(stream, UnixStream::from_std(far)?));
                        (claim, session, near)
                    }
                }
            }
        };
        // Dropped here, the socket ends its pump too.
        let seat = seat.or_else(|| self.seat()).ok_or_else(all_taken)?;
        claim.adopt(socket, session.with_limits(&self.config, seat));
        Ok(true)
    }
}

fn all_taken() -> io::Error {
    io::Error::other("all connections are taken")
}

/// Carries bytes between an encrypted stream and the shard, until the shard has closed its end: so the last replies reach the
/// client also when the shard takes no more requests.
async fn pump(client: TlsStream<TcpStream>, shard: UnixStream) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_shard, mut to_shard) = shard.into_split();
    let mut requests = pin!(async {
        // A shard that takes no more has stopped: what still comes is thrown away, so that TCP does not throw away replies.
        if copy_all(&mut from_client, &mut to_shard).await.is_err() {
            let _ = copy_all(&mut from_client, &mut tokio::io::sink()).await;
        }
        let _ = to_shard.shutdown().await;
    });
    let mut replies = pin!(async {
        let _ = copy_all(&mut from_shard, &mut to_client).await;
        let _ = to_client.shutdown().await;
    });
    tokio::select! {
        () = &mut requests => replies.await,
        () = &mut replies => {
            let _ = tokio::time::timeout(PUMP_LINGER, requests).await;
        }
    }
}

async fn copy_all(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buf = vec![0; PUMP_BYTES];
    loop {
        let count = from.read(&mut buf).await?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buf[..count]).await?;
        to.flush().await?;
    }
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream, Option<TlsAcceptor>),
}

async fn within<T>(end: tokio::time::Instant, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout_at(end, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")),
    }
}

/// A ring waits for a socket by itself, and only for one that is not in non-blocking mode.
fn blocking(stream: std::os::unix::net::UnixStream) -> io::Result<std::os::unix::net::UnixStream> {
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn prepare_tcp(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &TCP_KEEPALIVE_IDLE_S)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &TCP_KEEPALIVE_INTERVAL_S)?;
    setsockopt(stream, sockopt::TcpKeepCount, &TCP_KEEPALIVE_COUNT)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &TCP_USER_TIMEOUT_MS)?;
    Ok(())
}

#[cfg(test)]
mod tests;
