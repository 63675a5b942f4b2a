//! What people write, turned into numbers: sizes, durations, instants, endpoints and names, alike in the configuration, on the
//! command line and in requests. Each error names the thing, the value and the bound.

mod endpoint;
mod name;
mod number;
mod when;

pub use endpoint::Endpoint;
pub use name::{marker_name, priority, volume_name};
pub use number::{duration_ns, duration_s, duration_text, size, size_between, size_text};
pub use when::{When, rfc3339};

/// Seconds in the longest `reserve_duration`: 100 years.
pub const RESERVE_DURATION_S_MAX: u64 = 100 * 365 * 86400;

/// Why a text was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: {bound}")]
pub struct InputError {
    /// Kind of thing: size, duration, instant...
    pub what: &'static str,
    /// What was given.
    pub value: String,
    /// What would be right.
    pub bound: String,
}

impl InputError {
    fn new(what: &'static str, value: &str, bound: impl Into<String>) -> Self {
        Self { what, value: value.to_owned(), bound: bound.into() }
    }
}
