//! Doors for the fuzzers: each takes any bytes, as a client or a file may hold them, through the agent's own parsers. Nothing else
//! uses them. Each answers whether the bytes were taken for what they claim to be.

use crate::config::Config;
use crate::frontend::nbd::fuzz::{self, fuzz_request};

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

/// An NBD client's side of the handshake, before exports that it can be let in to.
pub fn handshake(data: &[u8]) -> bool {
    fuzz::handshake(data)
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
