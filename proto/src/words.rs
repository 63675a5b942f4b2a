//! Enumerations of the interface in the lower-case words that people and JSON see.

use crate::v1::{ChangeKind, EventKind, Health, MarkerKind};

macro_rules! words {
    ($type:ty, $prefix:literal) => {
        impl $type {
            /// The lower-case word, such as `needs_journal`; it is the same in JSON, tables and on the command line.
            pub fn word(self) -> String {
                self.as_str_name().trim_start_matches($prefix).to_ascii_lowercase()
            }
            /// The value of a word.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::from_str_name(&format!("{}{}", $prefix, word.to_ascii_uppercase()))
            }
        }
    };
}

words!(Health, "HEALTH_");
words!(MarkerKind, "MARKER_KIND_");
words!(EventKind, "EVENT_KIND_");
words!(ChangeKind, "CHANGE_KIND_");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_go_both_ways() {
        assert_eq!(Health::NeedsJournal.word(), "needs_journal");
        assert_eq!(Health::from_word("needs_journal"), Some(Health::NeedsJournal));
        assert_eq!(EventKind::EvictedEarly.word(), "evicted_early");
        assert_eq!(EventKind::from_word("EVICTED_EARLY"), Some(EventKind::EvictedEarly));
        assert_eq!(MarkerKind::Application.word(), "application");
        assert_eq!(MarkerKind::from_word("nothing"), None);
    }
}
