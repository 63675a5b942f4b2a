//! Tells the binary which commit it was built from, for what it prints of a failing seed.

use std::path::Path;
use std::process::Command;

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn main() {
    // A commit or a checkout; and changes of the engine, since `-dirty` is about that, too. What is not there would be taken for changed each time.
    let heads = ["HEAD", "logs/HEAD"].into_iter().filter_map(|name| git(&["rev-parse", "--git-path", name]));
    let sources = ["../journal/src", "src", "build.rs"].map(str::to_owned);
    for path in heads.chain(sources).filter(|path| Path::new(path).exists()) {
        println!("cargo::rerun-if-changed={path}");
    }
    let commit = git(&["describe", "--always", "--abbrev=40", "--dirty", "--match", ""]);
    println!("cargo::rustc-env=CDP_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}
