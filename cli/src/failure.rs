//! Why a command did not end well, and how that is said.

use serde_json::json;
use tonic::{Code, Status};

use crate::exit::{Exit, code_name};

/// What ends a command early.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A value that can never be right, found after the command line was parsed.
    #[error("{0}")]
    Usage(String),
    /// No connection.
    #[error("agent {endpoint}: {why}")]
    Unreachable {
        /// Where it was looked for.
        endpoint: String,
        /// The system's words, and a hint.
        why: String,
    },
    /// The agent's answer.
    #[error("{what}: {}", status.message())]
    Call {
        /// What was asked for.
        what: String,
        /// The answer.
        status: Box<Status>,
    },
    /// Standard output, or a local file.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's words.
        source: std::io::Error,
    },
}

impl Failure {
    pub fn call(what: impl Into<String>, status: Status) -> Self {
        Failure::Call { what: what.into(), status: Box::new(status) }
    }

    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Failure::Io { what: what.into(), source }
    }

    pub fn exit(&self) -> Exit {
        match self {
            Failure::Usage(_) => Exit::Usage,
            Failure::Unreachable { .. } => Exit::Unreachable,
            Failure::Call { status, .. } => Exit::of(status.code()),
            Failure::Io { .. } => Exit::Failed,
        }
    }

    /// Whoever read our output has gone, which is no failure (`cdpctl events | head`).
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Failure::Io { source, .. } if source.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// One line of JSON for programs that read standard error.
    pub fn json(&self) -> String {
        let code = match self {
            Failure::Usage(_) => Code::InvalidArgument,
            Failure::Unreachable { .. } => Code::Unavailable,
            Failure::Call { status, .. } => status.code(),
            Failure::Io { .. } => Code::Unknown,
        };
        json!({ "error": { "code": code as i32, "status": code_name(code), "message": self.to_string(), "exit": self.exit() as u8 } })
            .to_string()
    }
}
