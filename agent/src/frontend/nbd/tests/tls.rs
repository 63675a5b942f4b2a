//! NBD over TCP: in the clear where that is wanted, else with certificates on both sides.

use std::process::Command;

use nix::sys::socket::getsockopt;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::super::wire::{command, option, reply};
use super::super::*;
use super::client::{Answer, Client, info, request};
use super::fixture::{Fixture, SIZE};

/// An authority, and a certificate with its key that it signed for "localhost".
struct Papers {
    authority: String,
    certificate: String,
    key: String,
}

fn papers() -> Papers {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let issuer = Issuer::from_params(&params, &key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    Papers { authority: authority.pem(), certificate: certificate.pem(), key: key.serialize_pem() }
}

impl Papers {
    fn acceptor(&self) -> TlsAcceptor {
        tls::acceptor(self.certificate.as_bytes(), self.key.as_bytes(), self.authority.as_bytes()).unwrap()
    }

    /// A client that believes the authority and shows the papers of `client`.
    fn connector(&self, client: Option<&Papers>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match client {
            Some(papers) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(papers.certificate.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(papers.key.as_bytes()).unwrap(),
                )
                .unwrap(),
            None => builder.with_no_client_auth(),
        };
        TlsConnector::from(Arc::new(config))
    }
}

fn listen(fixture: &Fixture, tls: Option<TlsAcceptor>) -> u16 {
    let listener = fixture.runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    fixture.runtime.spawn(Arc::clone(&fixture.server).serve(Listener::Tcp { listener, tls }));
    port
}

/// Greets and sends one option; answers the kind of the reply.
async fn first_option(stream: &mut TcpStream, code: u32, data: &[u8]) -> io::Result<u32> {
    stream.read_exact(&mut [0; 18]).await?;
    stream.write_all(&3_u32.to_be_bytes()).await?;
    an_option(stream, code, data).await
}

async fn an_option(
    stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    code: u32,
    data: &[u8],
) -> io::Result<u32> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&code.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).await?;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head).await?;
        let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
        stream.read_exact(&mut vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize]).await?;
        if kind == reply::ACK || kind >> 31 == 1 {
            return Ok(kind);
        }
    }
}

#[test]
fn with_tls_nothing_is_served_in_the_clear() {
    let (fixture, papers) = (Fixture::new(), papers());
    let port = listen(&fixture, Some(papers.acceptor()));
    fixture.runtime.block_on(async {
        for (code, data) in
            [(option::LIST, vec![]), (option::GO, info("disk", &[])), (option::STRUCTURED_REPLY, vec![])]
        {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            assert_eq!(first_option(&mut stream, code, &data).await.unwrap(), reply::ERR_TLS_REQD);
        }
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert!(first_option(&mut stream, option::EXPORT_NAME, b"disk").await.is_err());
    });
}

#[test]
fn a_client_with_a_certificate_is_served_over_tls() {
    let (fixture, papers) = (Fixture::new(), papers());
    let port = listen(&fixture, Some(papers.acceptor()));
    fixture.runtime.block_on(async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(first_option(&mut stream, option::STARTTLS, &[]).await.unwrap(), reply::ACK);
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = papers.connector(Some(&papers)).connect(name, stream).await.unwrap();
        assert_eq!(an_option(&mut stream, option::STARTTLS, &[]).await.unwrap(), reply::ERR_INVALID);
        assert_eq!(an_option(&mut stream, option::GO, &info("disk", &[])).await.unwrap(), reply::ACK);
        // More than any buffer on the way holds.
        let data: Vec<u8> = (0..8_u32 << 20).map(|at| (at % 251) as u8).collect();
        stream.write_all(&request(command::WRITE, 0, 1, 512, data.len() as u32)).await.unwrap();
        stream.write_all(&data).await.unwrap();
        // What the socket did not take at once waits in the client's session: reading does not send it.
        stream.flush().await.unwrap();
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[4..], [[0; 4].as_slice(), &1_u64.to_be_bytes()].concat());
        stream.write_all(&request(command::READ, 0, 2, 512, data.len() as u32)).await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        let mut found = vec![0; data.len()];
        stream.read_exact(&mut found).await.unwrap();
        assert!(found == data);
        stream.write_all(&request(command::DISC, 0, 3, 0, 0)).await.unwrap();
        assert_eq!(stream.read(&mut answer).await.unwrap(), 0, "closed");
    });
    fixture.until(|fixture| fixture.server.connections() == 0);
}

/// Goal: when the agent stops, what it has done reaches the client, also one that goes on sending meanwhile.
fn a_drain_answers(fixture: &Fixture, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    fixture.on_shard(|state| state.disk.paused.set(true));
    fixture.runtime.block_on(async {
        for cookie in 0..5 {
            stream.write_all(&request(command::READ, 0, cookie, 0, 65536)).await.unwrap();
        }
        stream.flush().await.unwrap();
    });
    fixture.until(|fixture| fixture.on_shard(|state| state.disk.running.get()) == 5);
    let shard = Arc::clone(&fixture.shard);
    let drain = fixture.runtime.spawn(async move { shard.drain(Duration::from_secs(600)).await });
    fixture.until(|fixture| fixture.runtime.block_on(fixture.shard.open_export(Uuid::from_u128(1))).unwrap().is_err());
    fixture.runtime.block_on(async {
        stream.write_all(&request(command::READ, 0, 9, 0, 65536)).await.unwrap();
        stream.flush().await.unwrap();
    });
    fixture.on_shard(|state| state.disk.resume());
    let mut answers = vec![];
    fixture.runtime.block_on(stream.read_to_end(&mut answers)).unwrap();
    assert_eq!(answers.len(), 5 * (16 + 65536));
    drop(stream);
    assert_eq!(fixture.runtime.block_on(drain).unwrap(), Ok(0));
}

#[test]
fn a_drain_answers_over_tls() {
    let (fixture, papers) = (Fixture::new(), papers());
    let port = listen(&fixture, Some(papers.acceptor()));
    let stream = fixture.runtime.block_on(async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(first_option(&mut stream, option::STARTTLS, &[]).await.unwrap(), reply::ACK);
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = papers.connector(Some(&papers)).connect(name, stream).await.unwrap();
        assert_eq!(an_option(&mut stream, option::GO, &info("disk", &[])).await.unwrap(), reply::ACK);
        stream
    });
    a_drain_answers(&fixture, stream);
}

#[test]
fn a_drain_answers_over_tcp() {
    let fixture = Fixture::new();
    let port = listen(&fixture, None);
    let stream = fixture.runtime.block_on(async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(first_option(&mut stream, option::GO, &info("disk", &[])).await.unwrap(), reply::ACK);
        stream
    });
    a_drain_answers(&fixture, stream);
}

#[test]
fn a_client_without_the_right_certificate_gets_nothing() {
    let (fixture, papers, others) = (Fixture::new(), papers(), papers());
    let port = listen(&fixture, Some(papers.acceptor()));
    fixture.runtime.block_on(async {
        for client in [None, Some(&others)] {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            assert_eq!(first_option(&mut stream, option::STARTTLS, &[]).await.unwrap(), reply::ACK);
            let name = ServerName::try_from("localhost").unwrap();
            // In TLS 1.3 the client may learn of it only with the first answer.
            match papers.connector(client).connect(name, stream).await {
                Ok(mut stream) => assert!(an_option(&mut stream, option::LIST, &[]).await.is_err()),
                Err(error) => assert_ne!(error.kind(), io::ErrorKind::TimedOut),
            }
        }
    });
    fixture.until(|fixture| fixture.server.connections() == 0);
    Client::open(&fixture.socket(), "disk", true).unwrap();
}

/// Goal: whoever reaches the TCP port and shows nothing can keep out neither this host's guests nor clients that have a certificate.
/// Method: more silent TCP connections than there are seats, and than there may be handshakes; then one client of each kind.
#[test]
fn silent_tcp_peers_keep_nobody_out() {
    let (timeout, papers) = (Duration::from_secs(600), papers());
    let config =
        NbdConfig { connections_max: 3, tcp_handshakes_max: 4, handshake_timeout: timeout, ..NbdConfig::default() };
    let fixture = Fixture::with(config);
    let port = listen(&fixture, Some(papers.acceptor()));
    fixture.runtime.block_on(async {
        let mut silent = Vec::new();
        for _ in 0..12 {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            // Greeted: the server has it.
            stream.read_exact(&mut [0; 18]).await.unwrap();
            silent.push(stream);
        }
        let mut rest = vec![];
        let ended = silent[0].read_to_end(&mut rest).await;
        assert!(!matches!(ended, Ok(1..)), "the oldest made room");
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(first_option(&mut stream, option::STARTTLS, &[]).await.unwrap(), reply::ACK);
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = papers.connector(Some(&papers)).connect(name, stream).await.unwrap();
        assert_eq!(an_option(&mut stream, option::GO, &info("disk", &[])).await.unwrap(), reply::ACK);
        let socket = fixture.socket();
        let guest = tokio::task::spawn_blocking(move || Client::open(&socket, "disk", true).unwrap().read(0, 512));
        assert_eq!(guest.await.unwrap().unwrap(), Answer::Data(vec![0; 512]));
        drop(silent);
    });
}

/// Goal: the bound of connections holds also for those that began their handshake while there was room.
#[test]
fn a_tcp_peer_that_ends_its_handshake_too_late_finds_no_seat() {
    let fixture = Fixture::with(NbdConfig { connections_max: 3, ..NbdConfig::default() });
    let port = listen(&fixture, None);
    let mut late = fixture.runtime.block_on(TcpStream::connect(("127.0.0.1", port))).unwrap();
    fixture.runtime.block_on(late.readable()).unwrap(); // greeted
    let clients: Vec<_> = (0..3).map(|_| Client::open(&fixture.socket(), "disk", false).unwrap()).collect();
    fixture.runtime.block_on(async {
        let _ = first_option(&mut late, option::GO, &info("disk", &[])).await; // told yes or no, it ends
        let mut byte = [0; 1];
        let ended = tokio::time::timeout(Duration::from_secs(20), late.read(&mut byte)).await;
        assert!(!matches!(ended.expect("it is not served"), Ok(1)));
        let mut refused = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert!(!matches!(refused.read(&mut [0; 1]).await, Ok(1)), "closed without a word");
    });
    assert_eq!(fixture.server.connections(), 3);
    drop(clients);
    fixture.until(|fixture| fixture.server.connections() == 0);
    let mut stream = fixture.runtime.block_on(TcpStream::connect(("127.0.0.1", port))).unwrap();
    let go = info("disk", &[]);
    assert_eq!(fixture.runtime.block_on(first_option(&mut stream, option::GO, &go)).unwrap(), reply::ACK);
}

/// Goal: a client whose host died without a word goes after a while, though nothing is sent to it: it holds a seat, and counts as one that writes.
#[test]
fn a_silent_tcp_client_is_asked_whether_it_is_there() {
    let fixture = Fixture::new();
    fixture.runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        prepare_tcp(&stream).unwrap();
        assert!(getsockopt(&stream, sockopt::KeepAlive).unwrap());
        let idle = getsockopt(&stream, sockopt::TcpKeepIdle).unwrap();
        let interval = getsockopt(&stream, sockopt::TcpKeepInterval).unwrap();
        let count = getsockopt(&stream, sockopt::TcpKeepCount).unwrap();
        assert!(idle + interval * count <= 120, "{idle} s, then {count} times {interval} s");
        let given_up_ms = getsockopt(&stream, sockopt::TcpUserTimeout).unwrap();
        assert!((idle + interval) * 1000 < given_up_ms, "one question that is lost would end it");
    });
}

#[test]
fn tcp_in_the_clear_works_where_it_is_configured() {
    let fixture = Fixture::new();
    let port = listen(&fixture, None);
    fixture.runtime.block_on(async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(first_option(&mut stream, option::GO, &info("disk", &[])).await.unwrap(), reply::ACK);
        stream.write_all(&request(command::READ, 0, 1, 0, 512)).await.unwrap();
        let mut answer = [1; 16 + 512];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[8..16], 1_u64.to_be_bytes());
    });
}

#[test]
fn libnbd_speaks_tls_with_us() {
    if Command::new("nbdinfo").arg("--version").output().is_err() {
        eprintln!("nbdinfo is not installed: not checked");
        return;
    }
    let (fixture, papers) = (Fixture::new(), papers());
    let port = listen(&fixture, Some(papers.acceptor()));
    let folder = fixture.folder.path().join("pki");
    std::fs::create_dir(&folder).unwrap();
    for (name, text) in
        [("ca-cert.pem", &papers.authority), ("client-cert.pem", &papers.certificate), ("client-key.pem", &papers.key)]
    {
        std::fs::write(folder.join(name), text).unwrap();
    }
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={}", folder.display());
    let output = Command::new("nbdinfo").args(["--size", &uri]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), SIZE.to_string(), "{said}");
    let uri = format!("nbd://localhost:{port}/disk");
    assert!(!Command::new("nbdinfo").args(["--size", &uri]).output().unwrap().status.success());
}

#[test]
fn papers_that_cannot_be_used_are_refused_by_name() {
    let (papers, others) = (papers(), papers());
    for (certificate, key, authority, words) in [
        ("", &papers.key, &papers.authority, "certificate"),
        (&papers.certificate, &String::new(), &papers.authority, "key"),
        (&papers.certificate, &others.key, &papers.authority, "certificate and key"),
        (&papers.certificate, &papers.key, &String::new(), "client authorities"),
    ] {
        let error = tls::acceptor(certificate.as_bytes(), key.as_bytes(), authority.as_bytes()).err().unwrap();
        assert!(error.to_string().starts_with(words), "{error}");
    }
}
