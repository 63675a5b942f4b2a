//! How answers reach people and programs.

use std::io::Write;

use cdp_proto::parse::rfc3339;
use serde_json::{Map, Value};

use crate::{args::Format, exit::Exit, failure::Failure};

/// What a command answers: the same thing in both forms, and how it ends.
pub struct Answer {
    /// For programs.
    pub json: Value,
    /// For people, on standard output.
    pub text: String,
    /// For people, on standard error: volumes of a batch that failed.
    pub complaints: Vec<String>,
    /// Exit code.
    pub exit: Exit,
}

impl Answer {
    pub fn done(json: Value, text: impl Into<String>) -> Self {
        Self { json, text: text.into(), complaints: Vec::new(), exit: Exit::Ok }
    }

    /// A command that has printed everything already.
    pub fn printed() -> Self {
        Self::done(Value::Null, "")
    }
}

/// Prints an answer.
pub fn print(answer: &Answer, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json if answer.json.is_null() => Ok(()),
        Format::Json => write(&format!("{:#}\n", answer.json)),
        Format::Table => {
            write(&answer.text)?;
            for complaint in &answer.complaints {
                eprintln!("cdpctl: {complaint}");
            }
            Ok(())
        }
    }
}

/// Standard output, at once.
pub fn write(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|source| Failure::io("write to standard output", source))
}

/// Aligned columns. A header that begins with '>' is right-aligned; an empty table is a sentence.
pub fn table(headers: &[&str], rows: &[Vec<String>], empty: &str) -> String {
    if rows.is_empty() {
        return format!("{empty}\n");
    }
    let names: Vec<&str> = headers.iter().map(|header| header.trim_start_matches('>')).collect();
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([names[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut row = String::new();
        for (column, cell) in cells.enumerate() {
            let (gap, width) = (if column == 0 { "" } else { "  " }, widths[column]);
            row += &if headers[column].starts_with('>') {
                format!("{gap}{cell:>width$}")
            } else {
                format!("{gap}{cell:<width$}")
            };
        }
        text += row.trim_end();
        text.push('\n');
    };
    line(&mut names.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// `label  value` lines; those with an empty value are left out.
pub fn fields(rows: &[(&str, String)]) -> String {
    let width = rows.iter().filter(|(_, value)| !value.is_empty()).map(|(label, _)| label.len()).max().unwrap_or(0);
    rows.iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(label, value)| format!("{label:<width$}  {value}\n"))
        .collect()
}

/// An instant for people; "-" where there is none.
pub fn instant(ns: u64) -> String {
    if ns == 0 { "-".into() } else { rfc3339(ns) }
}

/// A length of time for people, from nanoseconds: `2m5s`, `1.250s`, `3.100ms`.
pub fn span(ns: u64) -> String {
    match ns {
        0..1_000_000 => format!("{ns}ns"),
        1_000_000..1_000_000_000 => format!("{}.{:03}ms", ns / 1_000_000, ns / 1_000 % 1_000),
        1_000_000_000..60_000_000_000 => format!("{}.{:03}s", ns / 1_000_000_000, ns / 1_000_000 % 1_000),
        _ => cdp_proto::parse::duration_text(ns / 1_000_000_000),
    }
}

/// One thing or many: `1 block`, `2 blocks`.
pub fn count(n: u64, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

/// Puts the fields of `more` behind those of `base`; what `base` has stays.
pub fn merge(base: Value, more: Value) -> Value {
    match (base, more) {
        (Value::Object(mut base), Value::Object(more)) => {
            for (key, value) in more {
                base.entry(key).or_insert(value);
            }
            Value::Object(base)
        }
        (base, _) => base,
    }
}

/// An instant in JSON where 0 means that there is none.
pub fn instant_or_null(ns: u64) -> Value {
    if ns == 0 { Value::Null } else { ns.into() }
}

/// An empty JSON object.
pub fn object() -> Value {
    Value::Object(Map::new())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_align() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "1000".to_owned()]];
        assert_eq!(table(&["NAME", ">N"], &rows, "none"), "NAME     N\na        1\nlong  1000\n");
        assert_eq!(table(&["NAME", ">N"], &[], "none"), "none\n");
        assert_eq!(fields(&[("a", "1".into()), ("bcd", "2".into()), ("left out", String::new())]), "a    1\nbcd  2\n");
    }

    #[test]
    fn json_numbers_are_exact() {
        let merged = merge(json!({ "time": u64::MAX }), json!({ "time": 1, "x": u64::MAX - 1 }));
        assert_eq!(merged.to_string(), r#"{"time":18446744073709551615,"x":18446744073709551614}"#);
    }

    #[test]
    fn spans_read_well() {
        for (ns, text) in [(7, "7ns"), (3_100_000, "3.100ms"), (1_250_000_000, "1.250s"), (125_000_000_000, "2m5s")] {
            assert_eq!(span(ns), text);
        }
    }
}
