//! Other people's tools: they have no idea of how the agent works, so what they say counts.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs a program that must succeed and returns its standard output.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> String {
    let output = output(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}\n{text}", describe(program, &output));
    text
}

/// Runs a program that must fail and returns its standard error.
pub fn run_refused<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> String {
    let output = output(program, args);
    assert!(!output.status.success(), "{} should have failed", describe(program, &output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a program.
pub fn output<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Output {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        // mkfs and friends live there, and not everybody's PATH has it.
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .output()
        .unwrap_or_else(|e| panic!("{program} cannot be run ({e}); scripts/setup.sh installs what the tests need"))
}

/// Checks an ext4 image: replays its log in it, as a mount would, and then finds no fault.
pub fn assert_ext4_sound(image: &Path, what: &str) {
    check_ext4(image).unwrap_or_else(|fault| panic!("{what}: {fault}"));
}

/// The same, and tells what is wrong.
pub fn check_ext4(image: &Path) -> Result<(), String> {
    // -E journal_only replays and does nothing else, but only where there is something to replay: otherwise it repairs whatever it finds.
    let head = output("dumpe2fs", [OsStr::new("-h"), image.as_os_str()]);
    if !head.status.success() {
        return Err(describe("dumpe2fs -h", &head));
    }
    if String::from_utf8_lossy(&head.stdout).contains("needs_recovery") {
        let replay = output("e2fsck", [OsStr::new("-fy"), "-E".as_ref(), "journal_only".as_ref(), image.as_os_str()]);
        // 0 and 1 are its good ends.
        if !matches!(replay.status.code(), Some(0 | 1)) {
            return Err(describe("e2fsck journal_only", &replay));
        }
    }
    let check = output("e2fsck", [OsStr::new("-fn"), image.as_os_str()]);
    if check.status.code() != Some(0) {
        return Err(format!("{}\n{}", describe("e2fsck -fn", &check), String::from_utf8_lossy(&check.stdout)));
    }
    Ok(())
}

/// Checks an XFS image that was unmounted cleanly.
pub fn assert_xfs_sound(image: &Path, what: &str) {
    let check = output("xfs_repair", [OsStr::new("-n"), "-f".as_ref(), image.as_os_str()]);
    assert_eq!(check.status.code(), Some(0), "{what}: {}", describe("xfs_repair -n", &check));
}

fn describe(program: &str, output: &Output) -> String {
    format!("{program}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr))
}
