//! The engine's errors as gRPC status codes: the one place where that is decided.

use cdp_journal::Error;
use tonic::{Code, Status};

/// The code of an error.
pub fn code(error: &Error) -> Code {
    match error {
        Error::Invalid { .. } => Code::InvalidArgument,
        Error::NotFound { .. } => Code::NotFound,
        Error::Exists { .. } => Code::AlreadyExists,
        Error::State(_) => Code::FailedPrecondition,
        Error::OutOfCoverage { .. } => Code::OutOfRange,
        Error::NoSpace { .. } => Code::ResourceExhausted,
        Error::Damaged { .. } => Code::DataLoss,
        Error::Gone(_) => Code::Aborted,
        // Device errors, and kinds that came later than this table.
        _ => Code::Internal,
    }
}

/// An error as the answer of a call. The text names field, value and bound by itself.
pub fn status(error: &Error) -> Status {
    Status::new(code(error), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_journal::Instant;

    #[test]
    fn each_kind_of_error_has_its_code_and_keeps_its_words() {
        let table = [
            (
                Error::invalid("size", 5, "a multiple of 512"),
                Code::InvalidArgument,
                vec!["size", "5", "a multiple of 512"],
            ),
            (Error::NotFound { what: "volume", name: "x".into() }, Code::NotFound, vec!["volume", "\"x\""]),
            (Error::Exists { what: "marker", name: "m".into() }, Code::AlreadyExists, vec!["marker", "\"m\""]),
            (Error::State("enable it first".into()), Code::FailedPrecondition, vec!["enable it first"]),
            (
                Error::OutOfCoverage { instant: Instant(7), coverage: "10 to 20".into() },
                Code::OutOfRange,
                vec!["7", "10 to 20"],
            ),
            (
                Error::NoSpace { what: "revert", needed: 30, free: 20 },
                Code::ResourceExhausted,
                vec!["revert", "30", "20"],
            ),
            (
                Error::Device { op: "write", device: "/dev/x".into(), message: "broken".into(), errno: 5 },
                Code::Internal,
                vec!["write", "/dev/x", "broken"],
            ),
            (Error::Damaged { what: "frame", place: "segment 4".into() }, Code::DataLoss, vec!["frame", "segment 4"]),
            (Error::Gone("it was closed".into()), Code::Aborted, vec!["it was closed"]),
        ];
        for (error, code, words) in table {
            let status = status(&error);
            assert_eq!(status.code(), code, "{error}");
            for word in words {
                assert!(status.message().contains(word), "{:?} lacks {word:?}", status.message());
            }
        }
    }
}
