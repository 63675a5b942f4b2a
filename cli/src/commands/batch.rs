//! Answers of calls on several volumes.

use cdp_proto::v1::VolumeResult;
use serde_json::{Value, json};

use crate::{
    exit::Exit,
    output::{self, Answer},
    shape,
};

/// One volume's answer: who, its data as JSON, and its line for people when it was done.
pub struct Part {
    pub result: Option<VolumeResult>,
    pub data: Value,
    pub line: String,
}

impl Part {
    /// Whether it was done. An answer that does not say so is none.
    pub fn is_done(&self) -> bool {
        self.result.as_ref().is_some_and(|result| result.code == 0)
    }
}

/// The whole answer: counts and one entry per volume. With a single volume its data is at the top level too.
pub fn answer(parts: Vec<Part>, top: Value) -> Answer {
    let done = parts.iter().filter(|part| part.is_done()).count();
    let entry = |part: &Part| {
        let head = shape::result(part.result.as_ref());
        if part.is_done() { output::merge(head, part.data.clone()) } else { head }
    };
    let counts = json!({
        "success": done,
        "fail": parts.len() - done,
        "results": parts.iter().map(entry).collect::<Vec<_>>(),
    });
    let mut json = output::merge(top, counts);
    if let [only] = parts.as_slice()
        && only.is_done()
    {
        json = output::merge(json, only.data.clone());
    }
    let complain = |result: &VolumeResult| format!("{}: {}", result.volume, result.message);
    let failed = parts.iter().filter(|part| !part.is_done());
    Answer {
        json,
        text: parts.iter().filter(|part| part.is_done()).map(|part| format!("{}\n", part.line)).collect(),
        complaints: failed
            .map(|part| part.result.as_ref().map_or_else(|| "a volume has no answer".into(), complain))
            .collect(),
        exit: Exit::of_batch(
            parts.iter().map(|part| part.result.as_ref().map_or(tonic::Code::Internal as i32, |result| result.code)),
        ),
    }
}

/// The name of the volume that a result is about, for people.
pub fn name(result: Option<&VolumeResult>) -> &str {
    match result {
        Some(result) if !result.volume_name.is_empty() => &result.volume_name,
        Some(result) => &result.volume,
        None => "?",
    }
}
