//! The engine's one error type. Variants are what a caller decides by; the text names the field, the value and the bound.

use crate::types::Instant;

/// Shorthand for results of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in the engine.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument that can never be right.
    #[error("{field}: {value} is not valid: {bound}")]
    Invalid {
        /// Name of the argument.
        field: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        bound: String,
    },
    /// Nothing has this name or id.
    #[error("{what} {name:?} not found")]
    NotFound {
        /// Kind of thing: volume, disk, view, marker, log.
        what: &'static str,
        /// What was looked for.
        name: String,
    },
    /// The name or id is taken.
    #[error("{what} {name:?} already exists")]
    Exists {
        /// Kind of thing.
        what: &'static str,
        /// The name or id.
        name: String,
    },
    /// Right in itself, but not in the present state; the text says what to do first.
    #[error("{0}")]
    State(String),
    /// An instant outside the intervals that can be viewed.
    #[error("instant {instant} is outside the retained history: {coverage}")]
    OutOfCoverage {
        /// What was asked for.
        instant: Instant,
        /// The intervals, for people.
        coverage: String,
    },
    /// Not enough room.
    #[error("{what}: {needed} bytes needed, {free} bytes free")]
    NoSpace {
        /// What wanted the room.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A device failed.
    #[error("{op} {device}: {message}")]
    Device {
        /// What was tried.
        op: &'static str,
        /// Which device.
        device: String,
        /// The system's words.
        message: String,
        /// The errno that a frontend passes on (EIO where there is none).
        errno: i32,
    },
    /// Bytes on a disk are not what was written. They are never served.
    #[error("damaged {what} at {place}")]
    Damaged {
        /// What should have been there.
        what: &'static str,
        /// Disk, segment and byte offset.
        place: String,
    },
    /// The thing was closed, lost or stopped while the call ran.
    #[error("{0}")]
    Gone(String),
}

impl Error {
    /// An [`Error::Device`] from an I/O error.
    pub fn device(op: &'static str, device: impl Into<String>, source: &std::io::Error) -> Self {
        Error::Device {
            op,
            device: device.into(),
            message: source.to_string(),
            errno: source.raw_os_error().unwrap_or(5),
        }
    }
    /// An [`Error::Invalid`].
    pub fn invalid(field: &'static str, value: impl ToString, bound: impl Into<String>) -> Self {
        Error::Invalid { field, value: value.to_string(), bound: bound.into() }
    }
}
