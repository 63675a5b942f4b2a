//! `disk check PATH`: reads a CDP disk offline, without an agent, and verifies every checksum on it.
//!
//! The reading is the engine's, with code independent of what wrote the disk; here are the bar, the exit code and the two forms of the answer.

use std::{fmt::Display, io, path::Path};

use serde_json::Value;

use crate::{
    exit::Exit,
    failure::Failure,
    output::{Answer, merge},
    progress,
};

/// What a report says to programs and to people, and whether the disk is sound.
pub struct Findings {
    pub json: Value,
    pub text: String,
    pub sound: bool,
}

/// Runs `check` on `path`, shows how far it is, and ends with [`Exit::Damage`] when it found some.
pub fn run<R, E: Display>(
    path: &Path,
    check: impl FnOnce(&Path, &mut dyn FnMut(u64, u64)) -> Result<R, E>,
    findings: impl FnOnce(R) -> Findings,
) -> Result<Answer, Failure> {
    let what = format!("disk check {}", path.display());
    let report = check(path, &mut progress::bytes(&what))
        .map_err(|error| Failure::io(what, io::Error::other(error.to_string())))?;
    let Findings { json, text, sound } = findings(report);
    let head = serde_json::json!({ "path": path.display().to_string(), "sound": sound });
    let exit = if sound { Exit::Ok } else { Exit::Damage };
    Ok(Answer { exit, ..Answer::done(merge(head, json), text) })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn findings(bad: u64) -> Findings {
        Findings { json: json!({ "bad_frames": bad }), text: format!("{bad} bad frames\n"), sound: bad == 0 }
    }

    #[test]
    fn damage_has_its_exit_code() {
        for (bad, exit) in [(0, Exit::Ok), (3, Exit::Damage)] {
            let check = |_: &Path, progress: &mut dyn FnMut(u64, u64)| {
                progress(1, 2);
                progress(2, 2);
                Ok::<_, String>(bad)
            };
            let answer =
                run(Path::new("/dev/sdd"), check, findings).map_err(|failure| failure.to_string()).expect("is checked");
            assert_eq!(answer.exit, exit);
            assert_eq!(answer.json, json!({ "path": "/dev/sdd", "sound": bad == 0, "bad_frames": bad }));
        }
    }

    #[test]
    fn what_cannot_be_read_is_a_failure() {
        let check = |_: &Path, _: &mut dyn FnMut(u64, u64)| Err::<u64, _>("no CDP disk: bad magic");
        let failure = run(Path::new("/dev/sdd"), check, findings).err().expect("fails");
        assert_eq!(failure.to_string(), "disk check /dev/sdd: no CDP disk: bad magic");
        assert_eq!(failure.exit(), Exit::Failed);
    }
}
