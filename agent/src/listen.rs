//! Sockets to listen on: unix sockets that appear with the right permissions, replace only what is stale and are removed at the
//! end; TCP sockets with TLS and client certificates.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::config::{TcpListen, TlsFiles, UnixListen};
use crate::frontend::nbd;

/// A TLS handshake that takes longer is dropped.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// TLS handshakes at a time on one listener; the oldest makes room for one more.
const TLS_HANDSHAKES_MAX: usize = if cfg!(test) { 8 } else { 256 };
/// How long to wait when the process is out of descriptors, before accepting again.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Removes a unix socket's file when it is dropped, if it is still the one that was made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    made: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.made) {
            let _ = fs::remove_file(&self.path); // somebody else removed it just now
        }
    }
}

/// Listens on a unix socket. What is there is replaced only if it is a socket that nobody listens on.
pub fn unix(listen: &UnixListen) -> Result<(UnixListener, SocketFile)> {
    let path = &listen.path;
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => bail!("{shown} is there and is no socket: it is left alone"),
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => bail!("{shown}: another process listens on it"),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).with_context(|| format!("find out who listens on {shown}")),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("look at {shown}")),
    }
    // Made beside and renamed, so that it never stands there with the wrong permissions, and replaces a stale one at once.
    let beside = beside(path)?;
    let listener = UnixListener::bind(&beside).with_context(|| format!("listen on {}", beside.display()))?;
    let finish = || -> Result<SocketFile> {
        if let Some(group) = &listen.group {
            let found = nix::unistd::Group::from_name(group).with_context(|| format!("look up group {group:?}"))?;
            let group = found.with_context(|| format!("group {group:?} does not exist"))?;
            nix::unistd::chown(&beside, None, Some(group.gid)).with_context(|| format!("give {shown} its group"))?;
        }
        fs::set_permissions(&beside, fs::Permissions::from_mode(listen.mode))
            .context("set the socket's permissions")?;
        let made = fs::symlink_metadata(&beside).context("look at the new socket")?;
        fs::rename(&beside, path).with_context(|| format!("put the socket to {shown}"))?;
        Ok(SocketFile { path: path.clone(), made: (made.dev(), made.ino()) })
    };
    match finish() {
        Ok(file) => Ok((listener, file)),
        Err(error) => {
            let _ = fs::remove_file(&beside); // the error that counts is the one above
            Err(error)
        }
    }
}

/// A short name in the same directory (a socket's path has 107 bytes at most).
fn beside(path: &Path) -> Result<PathBuf> {
    let dir = path.parent().with_context(|| format!("{} has no directory", path.display()))?;
    for number in 0..1000_u32 {
        let candidate = dir.join(format!(".s{number}"));
        match fs::symlink_metadata(&candidate) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(candidate),
            // Left by an agent that was killed between the two steps.
            Ok(found)
                if found.file_type().is_socket() && std::os::unix::net::UnixStream::connect(&candidate).is_err() =>
            {
                fs::remove_file(&candidate).with_context(|| format!("remove {}", candidate.display()))?;
                return Ok(candidate);
            }
            Ok(_) => {}
            Err(error) => return Err(error).with_context(|| format!("look at {}", candidate.display())),
        }
    }
    bail!("{}: no free name for a new socket", dir.display())
}

/// Listens on TCP. The acceptor is `None` where the admin said `insecure = true`.
pub async fn tcp(listen: &TcpListen, what: &str, protocols: &[&[u8]]) -> Result<(TcpListener, Option<TlsAcceptor>)> {
    let acceptor = match &listen.tls {
        Some(files) => Some(acceptor(files, protocols)?),
        None => {
            tracing::warn!(
                address = %listen.address,
                "INSECURE: {what} listens on TCP without TLS: everybody who reaches the port may read, write and revert"
            );
            None
        }
    };
    let listener =
        TcpListener::bind(listen.address).await.with_context(|| format!("{what}: listen on {}", listen.address))?;
    Ok((listener, acceptor))
}

/// Reads the PEM files of a listener.
pub fn acceptor(files: &TlsFiles, protocols: &[&[u8]]) -> Result<TlsAcceptor> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let (cert, key, authorities) = (read(&files.cert)?, read(&files.key)?, read(&files.client_ca)?);
    let acceptor = nbd::tls::acceptor(&cert, &key, &authorities).with_context(|| {
        format!("TLS with {}, {} and {}", files.cert.display(), files.key.display(), files.client_ca.display())
    })?;
    let mut config = tokio_rustls::rustls::ServerConfig::clone(acceptor.config());
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Who is at the other end, as far as the system says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// The user, on the unix socket.
    pub uid: Option<u32>,
}

impl Peer {
    /// Refuses whoever is not root on this host, or the agent's own user.
    pub fn may_mount(&self) -> std::result::Result<(), tonic::Status> {
        match self.uid {
            Some(uid) if uid == 0 || uid == nix::unistd::geteuid().as_raw() => Ok(()),
            _ => {
                Err(tonic::Status::permission_denied("mounting is for root on the agent's host, over the unix socket"))
            }
        }
    }

    /// Whose something is: as it was said, else who the connection says.
    pub fn owner(&self, said: String) -> String {
        match (said.is_empty(), self.uid) {
            (false, _) => said,
            (true, Some(uid)) => format!("uid {uid}"),
            (true, None) => "a client over the network".to_owned(),
        }
    }
}

/// A connection to the gRPC service.
pub enum Connection {
    /// Over the unix socket, with the user at its other end.
    Unix(UnixStream, Option<u32>),
    /// Over TCP without TLS.
    Tcp(TcpStream),
    /// Over TCP with TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        match self {
            Self::Unix(_, uid) => Peer { uid: *uid },
            Self::Tcp(_) | Self::Tls(_) => Peer::default(),
        }
    }
}

/// Accepts on a unix socket and logs who connects.
pub fn accept_unix(listener: UnixListener) -> ReceiverStream<io::Result<Connection>> {
    let (accepted, stream) = mpsc::channel(16);
    tokio::spawn(async move {
        while !accepted.is_closed() {
            let connection = tokio::select! {
                connection = listener.accept() => connection,
                () = accepted.closed() => return,
            };
            match connection {
                Ok((stream, _)) => {
                    let peer = stream.peer_cred();
                    let uid = peer.as_ref().ok().map(|peer| peer.uid());
                    match peer {
                        Ok(peer) => {
                            tracing::info!(
                                pid = peer.pid(),
                                uid = peer.uid(),
                                gid = peer.gid(),
                                "gRPC client connected"
                            );
                        }
                        Err(error) => tracing::warn!(%error, "gRPC client connected; the system does not say who"),
                    }
                    if accepted.send(Ok(Connection::Unix(stream, uid))).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a gRPC connection failed");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    });
    ReceiverStream::new(stream)
}

/// Accepts on TCP, with the TLS handshakes beside each other so that a slow client delays nobody, and silent ones however many keep nobody out.
pub fn accept_tcp(listener: TcpListener, acceptor: Option<TlsAcceptor>) -> ReceiverStream<io::Result<Connection>> {
    let (accepted, stream) = mpsc::channel(16);
    let mut handshakes = nbd::tls::Handshakes::new(TLS_HANDSHAKES_MAX);
    tokio::spawn(async move {
        loop {
            let connection = tokio::select! {
                connection = listener.accept() => connection,
                () = accepted.closed() => return,
            };
            let (stream, peer) = match connection {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "accepting a gRPC connection failed");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let _ = stream.set_nodelay(true); // it only costs latency
            let Some(acceptor) = acceptor.clone() else {
                tracing::info!(%peer, "gRPC client connected without TLS");
                if accepted.send(Ok(Connection::Tcp(stream))).await.is_err() {
                    return;
                }
                continue;
            };
            let accepted = accepted.clone();
            let handshake = tokio::spawn(async move {
                match tokio::time::timeout(TLS_TIMEOUT, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        tracing::info!(%peer, "gRPC client connected with its certificate");
                        let _ = accepted.send(Ok(Connection::Tls(Box::new(stream)))).await; // the service is stopping
                    }
                    Ok(Err(error)) => tracing::warn!(%peer, %error, "TLS handshake of a gRPC client failed"),
                    Err(_) => tracing::warn!(%peer, "TLS handshake of a gRPC client took too long"),
                }
            });
            handshakes.begun(handshake.abort_handle());
        }
    });
    ReceiverStream::new(stream)
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Unix(stream, _) => Pin::new(stream).poll_read(cx, buf),
            Connection::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Connection::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Unix(stream, _) => Pin::new(stream).poll_write(cx, buf),
            Connection::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Connection::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Unix(stream, _) => Pin::new(stream).poll_flush(cx),
            Connection::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Unix(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Connection::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let path = temp.path().join("a.sock");
        drop(UnixListener::bind(&path).expect("a socket that nobody listens on"));
        let listen = UnixListen { mode: 0o600, ..UnixListen::at(&path) };
        let (listener, file) = unix(&listen).expect("replaces the stale one");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let error = unix(&listen).expect_err("taken").to_string();
        assert!(error.contains("another process listens"), "{error}");
        let client = UnixStream::connect(&path);
        assert!(client.await.is_ok() && listener.accept().await.is_ok());
        drop((listener, file));
        assert!(!path.exists(), "removed at the end");
        assert_eq!(fs::read_dir(temp.path()).expect("readable").count(), 0, "nothing is left");
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone_and_so_is_a_successors_socket() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let path = temp.path().join("a.sock");
        fs::write(&path, "precious").expect("a file");
        let error = unix(&UnixListen::at(&path)).expect_err("no socket").to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(fs::read(&path).expect("still there"), b"precious");
        fs::remove_file(&path).expect("remove it");
        let (listener, file) = unix(&UnixListen::at(&path)).expect("free now");
        drop(listener);
        let (_successor, _its_file) = unix(&UnixListen::at(&path)).expect("stale now");
        drop(file);
        assert!(path.exists(), "the successor's socket stays");
    }

    #[test]
    fn tls_files_are_named_when_they_are_missing() {
        let files = TlsFiles { cert: "/nonexistent/c".into(), key: "/k".into(), client_ca: "/a".into() };
        let error = acceptor(&files, &[]).err().expect("missing").to_string();
        assert!(error.contains("/nonexistent/c"), "{error}");
    }

    struct Papers {
        authority: String,
        certificate: String,
        key: String,
    }

    /// An authority, and a certificate for "localhost" that it signed.
    fn papers() -> Papers {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
        let mut params = CertificateParams::new(vec![]).expect("valid");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let authority = params.self_signed(&key).expect("signed");
        let issuer = Issuer::from_params(&params, &key);
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("valid");
        let certificate = params.signed_by(&key, &issuer).expect("signed");
        Papers { authority: authority.pem(), certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// A client that trusts `server`'s authority and shows the papers of `client`; it asks for HTTP/2.
    fn connector(server: &Papers, client: Option<&Papers>) -> tokio_rustls::TlsConnector {
        use tokio_rustls::rustls::pki_types::pem::PemObject as _;
        use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
        use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(server.authority.as_bytes()).expect("PEM")).expect("a root");
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let mut config = match client {
            None => builder.with_no_client_auth(),
            Some(papers) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(papers.certificate.as_bytes()).expect("PEM")],
                    PrivateKeyDer::from_pem_slice(papers.key.as_bytes()).expect("PEM"),
                )
                .expect("they fit"),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        tokio_rustls::TlsConnector::from(Arc::new(config))
    }

    /// Goal: over TCP only a client with a certificate of the configured authority gets in, and it gets HTTP/2.
    #[tokio::test]
    async fn only_clients_with_a_certificate_of_the_authority_get_in() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        use tokio_stream::StreamExt as _;
        let (ours, strangers) = (papers(), papers());
        let temp = tempfile::tempdir().expect("temporary directory");
        let write = |name: &str, text: &str| {
            let path = temp.path().join(name);
            fs::write(&path, text).expect("write");
            path
        };
        let files = TlsFiles {
            cert: write("cert", &ours.certificate),
            key: write("key", &ours.key),
            client_ca: write("ca", &ours.authority),
        };
        let listen = TcpListen { address: ([127, 0, 0, 1], 0).into(), tls: Some(files) };
        let (listener, acceptor) = tcp(&listen, "test", &[b"h2"]).await.expect("listens");
        let address = listener.local_addr().expect("an address");
        let mut accepted = accept_tcp(listener, acceptor);
        for client in [None, Some(&strangers)] {
            let stream = TcpStream::connect(address).await.expect("connect");
            let name = "localhost".try_into().expect("a name");
            // With TLS 1.3 the client learns of its refusal when it reads.
            if let Ok(mut stream) = connector(&ours, client).connect(name, stream).await {
                let mut byte = [0; 1];
                assert!(!matches!(stream.read(&mut byte).await, Ok(1)), "a client without our papers got in");
            }
        }
        let stream = TcpStream::connect(address).await.expect("connect");
        let name = "localhost".try_into().expect("a name");
        let mut stream = connector(&ours, Some(&ours)).connect(name, stream).await.expect("let in");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        stream.write_all(b"hello").await.expect("write");
        let mut connection = accepted.next().await.expect("accepts").expect("no error");
        let mut hello = [0; 5];
        connection.read_exact(&mut hello).await.expect("read");
        assert_eq!(&hello, b"hello", "the first to come out is the first that was let in");
    }

    /// Goal: peers that connect and say nothing keep no client out, however many they are.
    /// Method: more of them than there may be handshakes; a client with a certificate gets in all the same, and at once.
    #[tokio::test]
    async fn silent_peers_keep_no_client_out() {
        use tokio_stream::StreamExt as _;
        let ours = papers();
        let acceptor = nbd::tls::acceptor(ours.certificate.as_bytes(), ours.key.as_bytes(), ours.authority.as_bytes());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let address = listener.local_addr().expect("an address");
        let mut accepted = accept_tcp(listener, Some(acceptor.expect("they fit")));
        let mut silent = Vec::new();
        for _ in 0..TLS_HANDSHAKES_MAX + 8 {
            silent.push(TcpStream::connect(address).await.expect("connect"));
        }
        let stream = TcpStream::connect(address).await.expect("connect");
        let let_in = async {
            let name = "localhost".try_into().expect("a name");
            let _stream = connector(&ours, Some(&ours)).connect(name, stream).await.expect("let in");
            accepted.next().await.expect("accepts").expect("no error")
        };
        let connection = tokio::time::timeout(TLS_TIMEOUT / 2, let_in).await;
        assert!(matches!(connection, Ok(Connection::Tls(_))), "it waits for the silent ones");
        drop(silent);
    }
}
