//! TLS for NBD over TCP: who the server is, and whose certificates it accepts.

use std::io;
use std::sync::Arc;

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

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
