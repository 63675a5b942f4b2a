//! The control state of a volume: the fold of the records of its newest log.

use std::collections::BTreeMap;

use zerocopy::FromBytes;

use super::stream::Descriptor;
use crate::format::{ControlKind, ControlLog, ControlSettings, DescriptorKind, log_flags};

/// Rows that are kept (128 bytes each): more than any disk can hold logs.
const ROWS_MAX: usize = 1 << 20;

/// What records say so far.
#[derive(Clone, Default)]
pub(super) struct Control {
    pub settings: Option<ControlSettings>,
    /// Logs by seq.
    pub rows: BTreeMap<u64, ControlLog>,
    /// The carried state is complete.
    pub complete: bool,
    /// A flag of a row is unknown.
    pub unknown_flags: bool,
}

impl Control {
    /// Applies a record; the lengths of bodies were judged with the frame.
    pub fn apply(&mut self, d: &Descriptor<'_>) {
        if d.kind != DescriptorKind::Control {
            return;
        }
        match ControlKind::from_byte(d.header.sub) {
            Some(ControlKind::Settings) => self.settings = ControlSettings::read_from_bytes(d.extra).ok(),
            Some(ControlKind::Log) => {
                if let Ok(row) = ControlLog::read_from_bytes(d.extra)
                    && self.rows.len() < ROWS_MAX
                {
                    self.unknown_flags |= row.flags.get() & !log_flags::KNOWN != 0;
                    self.rows.insert(row.seq.get(), row);
                }
            }
            Some(ControlKind::LogGone) => {
                self.rows.remove(&d.header.start.get());
            }
            Some(ControlKind::End) => self.complete = true,
            Some(ControlKind::Hint | ControlKind::Revert) | None => {}
        }
    }
}

/// Folds records, and goes back to before a doubt that is never resolved.
#[derive(Default)]
pub(super) struct Fold {
    now: Control,
    before_doubt: Option<Control>,
}

impl Fold {
    pub fn event(&mut self, event: &super::stream::Event<'_>) {
        use super::stream::Event;
        match event {
            Event::Frame(_, descriptors) => descriptors.iter().for_each(|d| self.now.apply(d)),
            Event::Doubt => {
                self.before_doubt.get_or_insert_with(|| self.now.clone());
            }
            Event::Certain => self.before_doubt = None,
            Event::Segment => {}
        }
    }

    pub fn finish(self) -> Control {
        self.before_doubt.unwrap_or(self.now)
    }
}
