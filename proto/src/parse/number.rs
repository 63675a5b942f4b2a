//! Sizes and durations: exact decimal numbers with a unit, no floating point.

use super::InputError;

const SIZE_FORMS: &str = "write bytes, or a number with KiB, MiB, GiB, TiB, PiB (powers of 1024; K, M, G, T, P are the same) \
                          or kB, MB, GB, TB, PB (powers of 1000), such as 30GiB";
const DURATION_FORMS: &str =
    "write seconds, or numbers with w, d, h, m, s, ms, us, ns from the longest to the shortest, such as 1h30m";

const SIZE_UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("p", 1 << 50),
    ("pib", 1 << 50),
    ("pb", 1_000_000_000_000_000),
];

/// Longest first: the order in which they may follow one another.
const DURATION_UNITS: &[(&str, u64)] = &[
    ("w", 604_800_000_000_000),
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Bytes: `30GiB`, `1.5TiB`, `500 MB`, `4096`.
pub fn size(text: &str) -> Result<u64, InputError> {
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let unit = unit.trim_start().to_ascii_lowercase();
    let Some((_, factor)) = SIZE_UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(InputError::new("size", text, SIZE_FORMS));
    };
    scale(number, *factor).map_err(|fault| InputError::new("size", text, fault.text(SIZE_FORMS, "bytes")))
}

/// [`size`], inside bounds (both included).
pub fn size_between(text: &str, min: u64, max: u64) -> Result<u64, InputError> {
    let bytes = size(text)?;
    if (min..=max).contains(&bytes) {
        return Ok(bytes);
    }
    Err(InputError::new(
        "size",
        text,
        format!("must be from {} ({min} bytes) to {} ({max} bytes)", size_text(min), size_text(max)),
    ))
}

/// Nanoseconds: `24h`, `1h30m`, `90s`, `250ms`, and plain seconds.
pub fn duration_ns(text: &str) -> Result<u64, InputError> {
    let refuse = |bound: &str| InputError::new("duration", text, bound);
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(refuse(DURATION_FORMS));
    }
    let (mut total, mut units) = (0u64, DURATION_UNITS);
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len()));
        let after = after.trim_start();
        let (unit, after) = after.split_at(after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len()));
        let bare = unit.is_empty() && after.is_empty() && units.len() == DURATION_UNITS.len();
        let unit = if bare { "s" } else { unit };
        let place = units.iter().position(|(name, _)| *name == unit).ok_or_else(|| refuse(DURATION_FORMS))?;
        let part = scale(number, units[place].1).map_err(|fault| refuse(&fault.text(DURATION_FORMS, "nanoseconds")))?;
        total = total.checked_add(part).ok_or_else(|| refuse(&Fault::TooLarge.text("", "nanoseconds")))?;
        units = &units[place + 1..];
        rest = after.trim_start();
    }
    Ok(total)
}

/// Whole seconds: as [`duration_ns`], refused when it is not a whole number of them.
pub fn duration_s(text: &str) -> Result<u64, InputError> {
    // Without a unit more seconds fit than nanoseconds do.
    match text.trim().parse::<u64>() {
        Ok(seconds) if !text.contains('+') => return Ok(seconds),
        _ => {}
    }
    let ns = duration_ns(text)?;
    if !ns.is_multiple_of(1_000_000_000) {
        return Err(InputError::new("duration", text, "must be a whole number of seconds"));
    }
    Ok(ns / 1_000_000_000)
}

/// Bytes for people: `30 GiB`, `1.46 TiB`; exact below 1 KiB and for whole units, else three digits.
pub fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut power = (bytes.ilog2() / 10) as usize;
    let scaled = |power: usize| (u128::from(bytes) * 100 + (1 << (10 * power - 1))) >> (10 * power);
    if scaled(power) >= 102_350 && power < UNITS.len() {
        power += 1; // 1023.5 and more would print as 1024
    }
    let (hundredths, unit) = (scaled(power), UNITS[power - 1]);
    match (hundredths / 100, hundredths % 100) {
        (whole, 0) => format!("{whole} {unit}"),
        (whole @ 0..=9, fraction) => format!("{whole}.{fraction:02} {unit}"),
        (whole @ 10..=99, fraction) => format!("{whole}.{} {unit}", fraction / 10),
        (whole, fraction) => format!("{} {unit}", whole + u128::from(fraction >= 50)),
    }
}

/// Seconds for people, in the form that [`duration_s`] reads: `1d2h`, `90s` as `1m30s`.
pub fn duration_text(seconds: u64) -> String {
    let mut rest = seconds;
    let mut text = String::new();
    for (unit, in_seconds) in [("d", 86400), ("h", 3600), ("m", 60), ("s", 1)] {
        if rest >= in_seconds {
            text += &format!("{}{unit}", rest / in_seconds);
            rest %= in_seconds;
        }
    }
    if text.is_empty() { "0s".into() } else { text }
}

enum Fault {
    Form,
    TooLarge,
    NotWhole,
}

impl Fault {
    fn text(&self, forms: &str, unit: &str) -> String {
        match self {
            Fault::Form => forms.to_owned(),
            Fault::TooLarge => format!("must be at most {} {unit}", u64::MAX),
            Fault::NotWhole => format!("must be a whole number of {unit}"),
        }
    }
}

/// `number` (digits with at most one point) times `factor`, exactly.
fn scale(number: &str, factor: u64) -> Result<u64, Fault> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
        return Err(Fault::Form);
    }
    let whole: u64 = whole.parse().map_err(|_| Fault::TooLarge)?;
    let mut total = u128::from(whole) * u128::from(factor);
    if !fraction.is_empty() {
        let fraction = fraction.trim_end_matches('0');
        if fraction.len() > 18 {
            return Err(Fault::NotWhole);
        }
        let digits: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| Fault::Form)? };
        let ten = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| Fault::NotWhole)?);
        if !(digits * u128::from(factor)).is_multiple_of(ten) {
            return Err(Fault::NotWhole);
        }
        total += digits * u128::from(factor) / ten;
    }
    u64::try_from(total).map_err(|_| Fault::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact() {
        let table: &[(&str, u64)] = &[
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("1k", 1024),
            ("1KiB", 1024),
            ("1kB", 1000),
            ("30GiB", 32_212_254_720),
            ("30 GiB", 32_212_254_720),
            (" 30gib ", 32_212_254_720),
            ("1.5TiB", 1_649_267_441_664),
            ("1.50TiB", 1_649_267_441_664),
            ("0.5K", 512),
            ("2.0", 2),
            ("1.000000000000000000000000MiB", 1 << 20),
            ("500MB", 500_000_000),
            ("3PB", 3_000_000_000_000_000),
            ("18446744073709551615", u64::MAX),
            ("16383PiB", 16383 << 50),
        ];
        for (text, bytes) in table {
            assert_eq!(size(text), Ok(*bytes), "{text}");
        }
    }

    #[test]
    fn sizes_that_are_none_name_what_is_right() {
        let table = [
            ("", "write bytes"),
            ("GiB", "write bytes"),
            (".5GiB", "write bytes"),
            ("1.GiB", "write bytes"),
            ("1.2.3", "write bytes"),
            ("-1", "write bytes"),
            ("1GiBs", "write bytes"),
            ("1e9", "write bytes"),
            ("12 34", "write bytes"),
            ("0.3", "whole number of bytes"),
            ("0.3KiB", "whole number of bytes"),
            ("0.1234567890123456789KiB", "whole number of bytes"),
            ("18446744073709551616", "at most 18446744073709551615 bytes"),
            ("16384PiB", "at most 18446744073709551615 bytes"),
            ("99999999999999999999999999", "at most 18446744073709551615 bytes"),
        ];
        for (text, bound) in table {
            let error = size(text).expect_err(text).to_string();
            assert!(error.contains(bound) && error.contains(&format!("{text:?}")), "{text}: {error}");
        }
    }

    #[test]
    fn size_bounds_are_named() {
        assert_eq!(size_between("1MiB", 1 << 20, 256 << 20), Ok(1 << 20));
        assert_eq!(size_between("256MiB", 1 << 20, 256 << 20), Ok(256 << 20));
        let error = size_between("1", 1 << 20, 256 << 20).expect_err("below").to_string();
        assert_eq!(error, "size \"1\" is not valid: must be from 1 MiB (1048576 bytes) to 256 MiB (268435456 bytes)");
        assert!(size_between("257MiB", 1 << 20, 256 << 20).is_err());
    }

    #[test]
    fn durations_are_exact() {
        let table: &[(&str, u64)] = &[
            ("0", 0),
            ("90", 90_000_000_000),
            ("90s", 90_000_000_000),
            ("24h", 86_400_000_000_000),
            ("1h30m", 5_400_000_000_000),
            ("1h 30m", 5_400_000_000_000),
            ("1 h 30 m", 5_400_000_000_000),
            ("1.5h", 5_400_000_000_000),
            ("2w1d", 15 * 86_400_000_000_000),
            ("250ms", 250_000_000),
            ("1s1ms1us1ns", 1_001_001_001),
            ("0.25", 250_000_000),
        ];
        for (text, ns) in table {
            assert_eq!(duration_ns(text), Ok(*ns), "{text}");
        }
        assert_eq!(duration_s("24h"), Ok(86400));
        assert_eq!(duration_s("3153600000"), Ok(3_153_600_000));
        assert_eq!(duration_s("1000ms"), Ok(1));
    }

    #[test]
    fn durations_that_are_none_name_what_is_right() {
        let table = [
            ("", "write seconds"),
            ("h", "write seconds"),
            ("5x", "write seconds"),
            ("30m1h", "write seconds"),
            ("1h1h", "write seconds"),
            ("1h30", "write seconds"),
            ("-5m", "write seconds"),
            ("5m ago", "write seconds"),
            ("0.5ns", "whole number of nanoseconds"),
            ("1000000w", "at most"),
            ("30000w25000d", "at most"),
        ];
        for (text, bound) in table {
            let error = duration_ns(text).expect_err(text).to_string();
            assert!(error.contains(bound), "{text}: {error}");
        }
        assert!(duration_s("+5").is_err());
        assert!(duration_s("1500ms").expect_err("half").to_string().contains("whole number of seconds"));
    }

    #[test]
    fn people_read_short_numbers() {
        let sizes = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            (32_212_254_720, "30 GiB"),
            (1_600_000_000_000, "1.46 TiB"),
            (1 << 40, "1 TiB"),
            ((1 << 20) - 1, "1 MiB"),
            (123 * 1024 + 600, "124 KiB"),
            (99 * 1024 + 1000, "99.9 KiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in sizes {
            assert_eq!(size_text(bytes), text, "{bytes}");
        }
        for (seconds, text) in [(0, "0s"), (90, "1m30s"), (86400, "1d"), (93600, "1d2h"), (3601, "1h1s")] {
            assert_eq!(duration_text(seconds), text);
            assert_eq!(duration_s(text), Ok(seconds));
        }
    }
}
