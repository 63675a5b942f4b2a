//! The continuous data protection engine.
//!
//! Single-threaded `async` code over two small traits, [`Device`] and [`Host`]: no threads, no sockets, no configuration
//! files, so the same code runs on io_uring in production and in a deterministic simulator in tests.
#![deny(unsafe_code)]

pub mod buf;
pub mod check;
pub mod clock;
mod engine;
mod error;
mod fence;
pub mod format;
pub mod host;
pub mod info;
mod types;

pub use buf::{IoBuf, Slice};
pub use engine::*;
pub use error::{Error, Result};
pub use fence::{Fence, FenceState};
pub use host::{Allocation, Device, Host, Identity, LocalFuture, StateStore};
pub use types::{BLOCK, Instant, SECTOR, SECTORS_PER_BLOCK};
