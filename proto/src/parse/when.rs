//! Instants as people give them.

use std::{fmt, str::FromStr};

use jiff::{Timestamp, civil};

use super::{InputError, duration_ns, marker_name};

/// A point on a host's time line, as given on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// Nanoseconds since the epoch: from a number, or from RFC 3339.
    At(u64),
    /// So many nanoseconds before the agent's present instant: `5m ago`, `now`.
    Ago(u64),
    /// A marker's name: everything else.
    Marker(String),
    /// The newest flush-clean instant at or before another: `flush-before:5m ago`.
    FlushBefore(Box<When>),
}

/// What stands before the other instant.
pub(super) const FLUSH_BEFORE: &str = "flush-before:";

impl FromStr for When {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        if let Some(other) = text.trim_start().strip_prefix(FLUSH_BEFORE) {
            return match other.parse()? {
                When::FlushBefore(_) => Err(InputError::new("instant", text, "must have flush-before: only once")),
                other => Ok(When::FlushBefore(Box::new(other))),
            };
        }
        match time(text.trim()) {
            Some(time) => time.map_err(|bound| InputError::new("instant", text, bound)),
            None => Ok(When::Marker(marker_name(text)?.to_owned())),
        }
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            When::At(ns) => write!(f, "{ns}"),
            When::Ago(0) => write!(f, "now"),
            When::Ago(ns) => write!(f, "{ns}ns ago"),
            When::Marker(name) => write!(f, "{name}"),
            When::FlushBefore(other) => write!(f, "{FLUSH_BEFORE}{other}"),
        }
    }
}

/// Nanoseconds since the epoch as RFC 3339 in UTC with all nine digits, `2026-11-21T04:38:00.000000001Z`.
pub fn rfc3339(ns: u64) -> String {
    // Every u64 of nanoseconds (up to the year 2554) is inside jiff's range; the number itself is a true answer all the same.
    Timestamp::from_nanosecond(i128::from(ns)).map_or_else(|_| ns.to_string(), |time| format!("{time:.9}"))
}

/// `None`: it does not read as a time at all. `Some(Err)`: it does, and is wrong.
pub(super) fn time(text: &str) -> Option<Result<When, String>> {
    if text.eq_ignore_ascii_case("now") {
        return Some(Ok(When::Ago(0)));
    }
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Some(
            text.parse().map(When::At).map_err(|_| format!("must be at most {} nanoseconds since the epoch", u64::MAX)),
        );
    }
    if let Some(before) = text.strip_suffix("ago").filter(|before| before.starts_with(|c: char| c.is_ascii_digit())) {
        return Some(duration_ns(before).map(When::Ago).map_err(|error| error.bound));
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        let range = "must lie between 1970 and the year 2554";
        return Some(u64::try_from(time.as_nanosecond()).map(When::At).map_err(|_| range.to_owned()));
    }
    let looks_like_a_date = text.as_bytes().first().is_some_and(u8::is_ascii_digit)
        && (text.parse::<civil::DateTime>().is_ok() || text.parse::<civil::Date>().is_ok());
    looks_like_a_date.then(|| {
        Err("a date needs its time and its zone: 2026-11-21T04:38:00Z or 2026-11-21T04:38:00+02:00".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_an_instant() {
        let table = [
            ("1630057893506590075", When::At(1_630_057_893_506_590_075)),
            ("0", When::At(0)),
            ("18446744073709551615", When::At(u64::MAX)),
            ("2021-08-27T09:51:33.506590075Z", When::At(1_630_057_893_506_590_075)),
            ("2021-08-27T11:51:33.506590075+02:00", When::At(1_630_057_893_506_590_075)),
            ("2021-08-27 09:51:33Z", When::At(1_630_057_893_000_000_000)),
            ("now", When::Ago(0)),
            ("NOW", When::Ago(0)),
            ("5m ago", When::Ago(300_000_000_000)),
            ("5mago", When::Ago(300_000_000_000)),
            (" 1h30m ago ", When::Ago(5_400_000_000_000)),
            ("10 ms ago", When::Ago(10_000_000)),
            ("halfway", When::Marker("halfway".into())),
            ("before upgrade", When::Marker("before upgrade".into())),
            ("long ago", When::Marker("long ago".into())),
            ("CDP-auto-1630057893", When::Marker("CDP-auto-1630057893".into())),
            ("nightly-2021-08-27", When::Marker("nightly-2021-08-27".into())),
            ("flush-before:now", When::FlushBefore(Box::new(When::Ago(0)))),
            ("flush-before:5m ago", When::FlushBefore(Box::new(When::Ago(300_000_000_000)))),
            ("flush-before:nightly", When::FlushBefore(Box::new(When::Marker("nightly".into())))),
        ];
        for (text, when) in table {
            assert_eq!(text.parse(), Ok(when), "{text}");
        }
    }

    #[test]
    fn what_is_no_instant_says_why() {
        let table = [
            ("18446744073709551616", "at most 18446744073709551615"),
            ("1969-12-31T23:59:59Z", "between 1970"),
            ("2600-01-01T00:00:00Z", "between 1970"),
            ("2021-08-27T09:51:33", "zone"),
            ("2021-08-27", "zone"),
            ("5 parsecs ago", "write seconds"),
            ("", "1 to 127 bytes"),
            ("   ", "1 to 127 bytes"),
            ("a\nb", "control characters"),
            ("flush-before:", "1 to 127 bytes"),
            ("flush-before:flush-before:now", "only once"),
            ("flush-before:2021-08-27", "zone"),
        ];
        for (text, bound) in table {
            let error = text.parse::<When>().expect_err(text).to_string();
            assert!(error.contains(bound), "{text}: {error}");
        }
    }

    #[test]
    fn a_printed_instant_reads_back() {
        for ns in [0, 1, 1_630_057_893_506_590_075, u64::MAX] {
            assert_eq!(rfc3339(ns).parse(), Ok(When::At(ns)));
        }
        assert_eq!(rfc3339(1_630_057_893_500_000_000), "2021-08-27T09:51:33.500000000Z");
        for when in [When::At(7), When::Ago(0), When::Ago(5), When::Marker("x".into())] {
            assert_eq!(when.to_string().parse(), Ok(when));
        }
    }
}
