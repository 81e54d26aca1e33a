//! Tells the programs from which commit they are built: `TAP_REVISION` of the environment if it is set (for sources
//! without a repository), otherwise git's. Only the mains are built anew after a commit.

use std::path::Path;
use std::process::Command;

/// Digits of the commit's hash.
const DIGITS: &str = "--short=12";

fn main() {
    println!("cargo::rerun-if-env-changed=TAP_REVISION");
    let revision = std::env::var("TAP_REVISION").ok().or_else(from_git).unwrap_or_default();
    let shown = if revision.is_empty() { String::new() } else { format!(" ({revision})") };
    println!("cargo::rustc-env=TAPDISK_REVISION={shown}");
}

/// The commit that is checked out, and what to watch for the next one.
fn from_git() -> Option<String> {
    println!("cargo::rerun-if-changed=build.rs");
    // HEAD changes with the branch, the branch's file with each commit; the log of HEAD stands in for a packed branch.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD", "logs/HEAD"].into_iter().chain(branch.as_deref()) {
        // cargo takes a file that is missing for one that has changed.
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", DIGITS, "HEAD"])
}

/// What git prints, if it is there, and this is a repository.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
