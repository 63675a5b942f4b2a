//! Promise: the tour in the README really runs.

use std::path::Path;
use std::process::{Command, Stdio};

use cdp_tests::process::{binaries, scratch};

#[test]
fn the_tour_of_the_readme_runs_as_it_stands() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(readme).unwrap();
    let (_, rest) = text.split_once("```sh tour\n").expect("the README has a tour");
    let (tour, _) = rest.split_once("```").expect("the tour ends");
    let folder = scratch();
    let here = folder.path().join("tour");
    let tour = tour.replace("/var/tmp/cdp-tour", here.to_str().unwrap());
    let path = format!("{}:{}", binaries().display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        // -m: the tour ends its agent by %1, as in a terminal.
        .args(["-meuo", "pipefail", "-c", &format!("trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{tour}")])
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .expect("run bash");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("verification failed"), "{said}");
}
