//! Names of volumes and markers, and the words for priorities.

use uuid::Uuid;

use super::{InputError, when};

const NAME_BYTES_MAX: usize = 127;

/// Checks the name of a volume, which is an export name and part of URIs too.
pub fn volume_name(text: &str) -> Result<&str, InputError> {
    let bound = if text.is_empty() || text.len() > NAME_BYTES_MAX {
        "must have 1 to 127 bytes"
    } else if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) || text.starts_with(['.', '-']) {
        "may have letters, digits, '.', '_' and '-', and begins with a letter, a digit or '_'"
    } else if Uuid::try_parse(text).is_ok() {
        "must not be a uuid, which would hide the volume that has it"
    } else {
        return Ok(text);
    };
    Err(InputError::new("volume name", text, bound))
}

/// Checks the name of a marker. What reads as an instant is none, so that `--at` has one meaning.
pub fn marker_name(text: &str) -> Result<&str, InputError> {
    let bound = if text.trim().is_empty() || text.len() > NAME_BYTES_MAX {
        "must have 1 to 127 bytes"
    } else if text.chars().any(char::is_control) {
        "must not have control characters"
    } else if text.trim() != text {
        "must not begin or end with a space"
    } else if when::time(text).is_some() || text.starts_with(when::FLUSH_BEFORE) {
        "must not read as an instant"
    } else {
        return Ok(text);
    };
    Err(InputError::new("marker name", text, bound))
}

/// Checks a `cdp_priority`.
pub fn priority(text: &str) -> Result<&str, InputError> {
    if ["low", "mid", "high"].contains(&text) {
        return Ok(text);
    }
    Err(InputError::new("cdp_priority", text, "must be low, mid or high"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_names_are_plain_words() {
        for good in ["demo", "vm-1_root.img", "_x", "0", "ABC", &"a".repeat(127)] {
            assert_eq!(volume_name(good), Ok(good));
        }
        let table = [
            ("", "1 to 127"),
            (&"a".repeat(128), "1 to 127"),
            ("a b", "letters"),
            ("a/b", "letters"),
            ("..", "begins"),
            ("-x", "begins"),
            ("é", "letters"),
            ("aae751ba-8b97-4259-9579-c40cbb806d9d", "uuid"),
            ("aae751ba8b9742599579c40cbb806d9d", "uuid"),
        ];
        for (bad, bound) in table {
            assert!(volume_name(bad).expect_err(bad).bound.contains(bound), "{bad}");
        }
    }

    #[test]
    fn marker_names_are_no_instants() {
        for good in ["halfway", "before upgrade", "CDP-auto-1630057893", "naïve", "12x"] {
            assert_eq!(marker_name(good), Ok(good));
        }
        let table = [
            ("", "1 to 127"),
            (" ", "1 to 127"),
            (&"a".repeat(128), "1 to 127"),
            (" x", "space"),
            ("a\tb", "control"),
            ("now", "instant"),
            ("12", "instant"),
            ("5m ago", "instant"),
            ("2021-08-27", "instant"),
            ("2021-08-27T09:51:33Z", "instant"),
        ];
        for (bad, bound) in table {
            assert!(marker_name(bad).expect_err(bad).bound.contains(bound), "{bad}");
        }
    }

    #[test]
    fn priorities_are_three_words() {
        assert_eq!(priority("mid"), Ok("mid"));
        assert_eq!(
            priority("urgent").expect_err("unknown").to_string(),
            "cdp_priority \"urgent\" is not valid: must be low, mid or high"
        );
    }
}
