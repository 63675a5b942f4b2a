//! TLS for NBD over TCP: who the server is, and whose certificates it accepts; and how many strangers may be about to show theirs.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

/// An acceptor that shows `certificate` (a chain, PEM) with `key` (PEM) and demands a client certificate signed by one of
/// `client_authorities` (PEM).
///
/// # Errors
/// When one of them cannot be read or does not fit the others; the text says which.
pub fn acceptor(certificate: &[u8], key: &[u8], client_authorities: &[u8]) -> io::Result<TlsAcceptor> {
    let bad = |what: &'static str| move |error: &dyn std::fmt::Display| invalid(format!("{what}: {error}"));
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>().map_err(|e| bad("certificate")(&e))?;
    if chain.is_empty() {
        return Err(invalid("certificate: the PEM text holds none".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| bad("key")(&e))?;
    let mut authorities = RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(client_authorities) {
        let authority = authority.map_err(|e| bad("client authorities")(&e))?;
        authorities.add(authority).map_err(|e| bad("client authorities")(&e))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), Arc::clone(&provider))
        .build()
        .map_err(|e| bad("client authorities")(&e))?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| bad("protocol versions")(&e))?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .map_err(|e| bad("certificate and key")(&e))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The handshakes of a TCP listener that are under way. Whoever reaches the port can begin one and say nothing more, so where there are too many the
/// oldest is ended: an honest handshake takes a few round trips and is done long before it is the oldest. (Were the newest refused, or made to wait, a
/// few silent peers would keep everybody else out.)
pub struct Handshakes {
    max: usize,
    under_way: VecDeque<AbortHandle>,
}

impl Handshakes {
    /// At most `max` at a time, and at least one.
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), under_way: VecDeque::new() }
    }

    /// One more has begun.
    pub fn begun(&mut self, handshake: AbortHandle) {
        self.under_way.retain(|handshake| !handshake.is_finished());
        while self.under_way.len() >= self.max {
            if let Some(oldest) = self.under_way.pop_front() {
                oldest.abort();
            }
        }
        self.under_way.push_back(handshake);
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
