//! Doors for the fuzzers: each takes any bytes, as a client or a file may hold them, through the agent's own parsers. Nothing else
//! uses them. Each answers whether the bytes were taken for what they claim to be.

use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use cdp_journal::Export;
use futures::future::{BoxFuture, FutureExt as _};
use uuid::Uuid;

use crate::config::Config;
use crate::frontend::nbd::fuzz::{self, fuzz_request, plain};
use crate::frontend::nbd::{ExportDirectory, ExportEntry, ExportInfo, ExportKind, ExportSource};

/// The configuration file.
pub fn config(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let parsed = Config::parse("config.toml", text);
    if let Err(error) = &parsed {
        // Its line is a line of the text.
        assert!(error.line <= text.lines().count().max(1), "{error}");
        assert!(!error.message.is_empty());
    }
    parsed.is_ok()
}

/// An NBD client's side of the handshake.
pub fn handshake(data: &[u8]) -> bool {
    let mut stream = tokio::io::join(data, tokio::io::sink());
    let ended = pin!(plain(&mut stream, &Shelf)).poll(&mut Context::from_waker(Waker::noop()));
    // All bytes are there, so nothing is waited for; and nothing can be served.
    match ended {
        Poll::Ready(Ok(served)) => {
            assert!(served.is_none());
            true
        }
        Poll::Ready(Err(_)) => false,
        Poll::Pending => panic!("the handshake waits for something"),
    }
}

/// Requests, one after the other, to an export whose kind the first bytes choose.
pub fn requests(data: &[u8]) -> bool {
    let Some((kind, data)) = data.split_first() else { return false };
    let Some((size, data)) = data.split_first_chunk::<8>() else { return false };
    let size = u64::from_le_bytes(*size) >> (kind >> 3);
    let mut taken = false;
    for head in data.chunks_exact(28) {
        let head = head.try_into().expect("28 bytes");
        taken |= fuzz_request(head, size, kind & 1 != 0, kind & 2 != 0, kind & 4 != 0);
    }
    taken
}

/// All that a client says once its handshake is over, to the real server on a real ring. The first byte chooses what the handshake
/// agreed on, the second in what pieces the client sends.
pub fn stream(data: &[u8]) -> bool {
    fuzz::stream(data)
}

/// Lists an export and never finds one.
struct Shelf;

#[derive(Clone)]
struct Nothing;

impl ExportSource for Nothing {
    fn export(&self, _key: Uuid) -> Option<Rc<dyn Export>> {
        None
    }
}

impl ExportDirectory<Nothing> for Shelf {
    fn list(&self) -> BoxFuture<'_, Vec<ExportEntry>> {
        async {
            vec![ExportEntry { name: "demo".to_owned(), description: "a volume".to_owned(), kind: ExportKind::Volume }]
        }
        .boxed()
    }

    fn find<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, Option<ExportInfo<Nothing>>> {
        async { None }.boxed()
    }
}
