//! Which files differ between two mounted states of one file system, by what the file system itself notes of each file: nothing is read but names and
//! their attributes. Best effort: what was written through a mapping, or with lazy times, may show only later.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Names that are listed; all are counted.
pub const LISTED_MAX: usize = 1000;
/// Files that are looked at: a file system with more is answered in part.
const FILES_MAX: u64 = 2_000_000;

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is in both states and differs.
    Differs,
    /// Only the state that the volume goes back to has it.
    ComesBack,
    /// Only the present state has it.
    Vanishes,
}

impl Fate {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Fate::Differs => "differs",
            Fate::ComesBack => "comes back",
            Fate::Vanishes => "vanishes",
        }
    }
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The first names, by path.
    pub files: Vec<(PathBuf, Fate)>,
    /// How many there are.
    pub total: u64,
    /// Not every file was looked at.
    pub partial: bool,
}

/// Compares two trees: the state that the volume goes back to, and the present one.
pub fn compare(then: &Path, now: &Path) -> io::Result<Found> {
    let mut walk = Walk { found: Found::default(), left: FILES_MAX };
    walk.folders(then, now, Path::new("/"))?;
    Ok(walk.found)
}

struct Walk {
    found: Found,
    left: u64,
}

impl Walk {
    fn folders(&mut self, then: &Path, now: &Path, shown: &Path) -> io::Result<()> {
        let (before, after) = (names(then)?, names(now)?);
        let all: std::collections::BTreeSet<&OsString> = before.keys().chain(after.keys()).collect();
        for name in all {
            if self.left == 0 {
                self.found.partial = true;
                return Ok(());
            }
            self.left -= 1;
            let path = shown.join(name);
            match (before.get(name), after.get(name)) {
                (Some(a), Some(b)) if a.is_dir() && b.is_dir() => {
                    // A folder's own attributes change with each name in it: those are told.
                    if (a.mode(), a.uid(), a.gid()) != (b.mode(), b.uid(), b.gid()) {
                        self.tell(path.clone(), Fate::Differs);
                    }
                    self.folders(&then.join(name), &now.join(name), &path)?;
                }
                (Some(a), Some(b)) if same(a, b) => {}
                (Some(_), Some(_)) => self.tell(path, Fate::Differs),
                (Some(_), None) => self.tell(path, Fate::ComesBack),
                (None, _) => self.tell(path, Fate::Vanishes),
            }
        }
        Ok(())
    }

    fn tell(&mut self, path: PathBuf, fate: Fate) {
        self.found.total += 1;
        if self.found.files.len() < LISTED_MAX {
            self.found.files.push((path, fate));
        }
    }
}

fn names(folder: &Path) -> io::Result<BTreeMap<OsString, Metadata>> {
    fs::read_dir(folder)?
        .map(|entry| {
            let entry = entry?;
            // Of the name itself, not of what a link points to.
            Ok((entry.file_name(), entry.path().symlink_metadata()?))
        })
        .collect()
}

fn same(a: &Metadata, b: &Metadata) -> bool {
    let of = |m: &Metadata| {
        (
            m.ino(),
            m.mode(),
            m.uid(),
            m.gid(),
            m.size(),
            m.rdev(),
            (m.mtime(), m.mtime_nsec()),
            (m.ctime(), m.ctime_nsec()),
        )
    };
    of(a) == of(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what changed, came and went is told by name, and nothing else.
    /// Method: a tree and one of hard links to its files, so that unchanged files are the same file.
    #[test]
    fn what_differs_is_told_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let (then, now) = (folder.path().join("then"), folder.path().join("now"));
        for side in [&then, &now] {
            fs::create_dir_all(side.join("etc/deep")).expect("makes");
        }
        for name in ["same", "etc/rewritten", "etc/deep/removed", "kind"] {
            fs::write(then.join(name), name).expect("writes");
        }
        fs::hard_link(then.join("same"), now.join("same")).expect("links");
        fs::write(now.join("etc/rewritten"), "rewritten, and longer").expect("writes");
        fs::write(now.join("etc/new"), "").expect("writes");
        fs::create_dir(now.join("kind")).expect("makes");
        // A link that leads out is not followed.
        std::os::unix::fs::symlink("/", now.join("out")).expect("links");
        let found = compare(&then, &now).expect("compares");
        let told: Vec<_> =
            found.files.iter().map(|(path, fate)| (path.to_str().expect("plain"), fate.word())).collect();
        assert_eq!(
            told,
            [
                ("/etc/deep/removed", "comes back"),
                ("/etc/new", "vanishes"),
                ("/etc/rewritten", "differs"),
                ("/kind", "differs"),
                ("/out", "vanishes"),
            ]
        );
        assert_eq!((found.total, found.partial), (5, false));
        assert_eq!(compare(&then, &then).expect("compares"), Found::default());
        assert!(compare(&then, &folder.path().join("nowhere")).is_err());
    }
}
