//! Exit codes: one table for the program, its help and `docs/cli.md`.

use tonic::Code;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    SomeFailed = 3,
    NotFound = 4,
    Unreachable = 5,
    Refused = 6,
    OutOfCoverage = 7,
    NoSpace = 8,
    TimedOut = 9,
    Damage = 10,
    Denied = 11,
}

/// Every exit code and what it says.
pub const TABLE: &[(Exit, &str)] = &[
    (Exit::Ok, "done"),
    (Exit::Failed, "the call failed: a device, or the agent itself"),
    (Exit::Usage, "the command line, or a value in it, can never be right"),
    (Exit::SomeFailed, "done for some of the volumes and not for others"),
    (Exit::NotFound, "no volume, disk, view, marker or log of this name"),
    (Exit::Unreachable, "the agent cannot be reached, or is starting or stopping"),
    (
        Exit::Refused,
        "right in itself, but not in the present state (in use, name taken, another volume of the group failed)",
    ),
    (Exit::OutOfCoverage, "the instant lies outside the history that can be viewed"),
    (Exit::NoSpace, "not enough room"),
    (Exit::TimedOut, "no answer within --timeout"),
    (Exit::Damage, "damage was found on a disk"),
    (Exit::Denied, "the agent does not let this client do that"),
];

impl Exit {
    /// The exit code of a status code, of a call or of one volume's answer.
    pub fn of(code: Code) -> Exit {
        match code {
            Code::Ok => Exit::Ok,
            Code::InvalidArgument => Exit::Usage,
            Code::NotFound => Exit::NotFound,
            Code::Unavailable => Exit::Unreachable,
            Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => Exit::Refused,
            Code::OutOfRange => Exit::OutOfCoverage,
            Code::ResourceExhausted => Exit::NoSpace,
            Code::DeadlineExceeded => Exit::TimedOut,
            Code::DataLoss => Exit::Damage,
            Code::PermissionDenied | Code::Unauthenticated => Exit::Denied,
            Code::Cancelled | Code::Unknown | Code::Unimplemented | Code::Internal => Exit::Failed,
        }
    }

    /// The exit code of a batch: that of the first failure where nothing was done, [`Exit::SomeFailed`] where something was.
    pub fn of_batch(codes: impl IntoIterator<Item = i32>) -> Exit {
        let (mut done, mut failure) = (false, None);
        for code in codes {
            match Exit::of(Code::from_i32(code)) {
                Exit::Ok => done = true,
                exit if matches!(failure, None | Some(Exit::Refused)) => failure = Some(exit),
                _ => {}
            }
        }
        match (failure, done) {
            (None, _) => Exit::Ok,
            (Some(_), true) => Exit::SomeFailed,
            (Some(exit), false) => exit,
        }
    }
}

/// The name of a status code as gRPC spells it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The end of `cdpctl --help`.
pub fn help() -> String {
    let mut text = String::from(
        "WHEN is nanoseconds since the epoch, RFC 3339 (2026-11-21T04:38:00Z), a marker's name, 'now', or relative ('5m ago').\n\
         Sizes are bytes or 30GiB, durations seconds or 24h.\n\n\
         Examples:\n  cdpctl status\n  cdpctl info vm1-root\n  cdpctl view open vm1-root --at '5m ago'\n  \
         cdpctl revert vm1-root --at before-upgrade --dry-run\n\nExit codes:\n",
    );
    for (exit, meaning) in TABLE {
        text += &format!("  {:>2}  {meaning}\n", *exit as u8);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_with_the_code_that_says_most() {
        let (ok, not_found, aborted, no_space) = (0, 5, 10, 8);
        let table: &[(&[i32], Exit)] = &[
            (&[], Exit::Ok),
            (&[ok, ok], Exit::Ok),
            (&[not_found], Exit::NotFound),
            (&[ok, not_found], Exit::SomeFailed),
            (&[not_found, no_space], Exit::NotFound),
            // In a group that goes together, one volume has the cause and the others are ABORTED.
            (&[aborted, no_space], Exit::NoSpace),
            (&[aborted, aborted], Exit::Refused),
        ];
        for (codes, exit) in table {
            assert_eq!(Exit::of_batch(codes.iter().copied()), *exit, "{codes:?}");
        }
    }

    #[test]
    fn the_table_is_complete_and_in_order() {
        for (at, (exit, _)) in TABLE.iter().enumerate() {
            assert_eq!(*exit as usize, at);
        }
        let page = include_str!("../../docs/cli.md");
        for (exit, meaning) in TABLE {
            assert!(
                page.contains(&format!("| {} | {meaning} |\n", *exit as u8)),
                "docs/cli.md lacks exit code {exit:?}"
            );
        }
        for code in 0..=16 {
            let exit = Exit::of(Code::from_i32(code));
            assert!(TABLE.iter().any(|(known, _)| *known == exit));
            assert_eq!(exit == Exit::Ok, code == 0);
        }
    }
}
