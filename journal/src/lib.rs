//! The continuous data protection engine.
//!
//! Single-threaded `async` code over two small traits, [`Device`] and [`Host`]: no threads, no sockets, no configuration
//! files, so the same code runs on io_uring in production and in a deterministic simulator in tests.
#![deny(unsafe_code)]

pub mod buf;
pub mod check;
pub mod clock;
mod disk;
mod engine;
mod error;
mod fence;
pub mod format;
mod frame;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod group;
pub mod host;
pub mod index;
pub mod info;
mod log;
pub mod mutation;
mod overlay;
mod signal;
mod types;
mod view;
mod volume;

pub use buf::{IoBuf, Slice};
pub use engine::*;
pub use error::{Error, Result};
pub use fence::{Fence, FenceState};
pub use host::{Allocation, Device, Host, Identity, LocalFuture, StateStore};
pub use types::{BLOCK, Instant, SECTOR, SECTORS_PER_BLOCK};
pub use view::View;
pub use volume::{Volume, auto_names};
