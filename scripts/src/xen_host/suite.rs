//! Named tests: one boot, one script each, a table at the end.
//!
//! A test is a file `scripts/xen-host/tests/NAME.sh`. It begins with comments; the first one says what it proves. It
//! runs in dom0 as root, with `bash -eu` in an empty folder, with the functions of `lib.sh`; it passes if its exit
//! status is zero, and says with 77 that something which it needs is not there. Tests do not depend on each other: each
//! leaves dom0 as it was. A comment may request a program (`test_program.rs`).

use super::Result;
use super::machine::Event;
use super::test_program::TestProgram;
use std::fs;
use std::path::{Path, PathBuf};

/// A test in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) name: String,
    /// What it proves, in one line.
    pub(super) about: String,
    /// A program that it runs, besides those available to all tests.
    pub(super) program: Option<TestProgram>,
}

/// The folder with dom0's scripts.
pub(super) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("xen-host")
}

/// All tests, by name.
fn all() -> Result<Vec<Test>> {
    let folder = folder().join("tests");
    let mut tests = Vec::new();
    for entry in fs::read_dir(&folder).map_err(|e| format!("read {}: {e}", folder.display()))? {
        let path = entry?.path();
        if let (Some(name), Some("sh")) =
            (path.file_stem().and_then(|n| n.to_str()), path.extension().and_then(|n| n.to_str()))
        {
            let text = fs::read_to_string(&path)?;
            let about = text.lines().next().and_then(|line| line.strip_prefix("# "));
            let about =
                about.ok_or_else(|| format!("find out what test {name} is: its first line says nothing"))?;
            let programs = text.lines().map(TestProgram::parse).collect::<Result<Vec<_>>>()?;
            let program = programs.into_iter().flatten().next();
            tests.push(Test { name: name.to_owned(), about: about.to_owned(), program });
        }
    }
    tests.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tests)
}

/// The named ones, or all.
pub(super) fn choose(names: &[String]) -> Result<Vec<Test>> {
    let all = all()?;
    if names.is_empty() {
        return Ok(all);
    }
    let find = |name: &String| {
        let found = all.iter().find(|test| test.name == *name).cloned();
        found.ok_or_else(|| format!("find test {name}; see cargo xtask xen-host test --list").into())
    };
    names.iter().map(find).collect()
}

pub(super) fn list() -> Result<()> {
    for test in all()? {
        println!("{:<14} {}", test.name, test.about);
    }
    Ok(())
}

/// The script that dom0 runs.
pub(super) fn script(tests: &[Test]) -> String {
    let names: Vec<&str> = tests.iter().map(|test| test.name.as_str()).collect();
    format!("exec bash /xen-host/run-tests {}\n", names.join(" "))
}

/// The status of a test that lacks what it needs, which it has said.
const NOT_RUN: u8 = 77;

/// A status in words. `timeout` of busybox ends a test by SIGTERM.
pub(super) fn verdict(status: u8) -> String {
    match status {
        0 => "passed".to_owned(),
        NOT_RUN => "not run".to_owned(),
        143 => "failed: its time was up".to_owned(),
        other => format!("failed with status {other}"),
    }
}

/// Prints the table; the exit status is 0 if all passed.
pub(super) fn report(tests: &[Test], events: &[Event]) -> u8 {
    let (table, status) = table(tests, events);
    print!("{table}");
    status
}

fn table(tests: &[Test], events: &[Event]) -> (String, u8) {
    let mut text = String::new();
    let (mut passed, mut not_run) = (0, 0);
    for test in tests {
        let end = events.iter().find_map(|event| match event {
            Event::TestEnds { name, status, seconds } if *name == test.name => Some((*status, *seconds)),
            _ => None,
        });
        let started = events.contains(&Event::TestStarts(test.name.clone()));
        let line = match end {
            Some((status, seconds)) => {
                passed += usize::from(status == 0);
                not_run += usize::from(status == NOT_RUN);
                format!("{}, {seconds} s", verdict(status))
            }
            None if started => "failed: it did not end".to_owned(),
            None => "failed: it did not run".to_owned(),
        };
        text += &format!("{:<14} {line:<28} {}\n", test.name, test.about);
    }
    let failed = tests.len() - passed - not_run;
    text += &format!("{passed} passed, {failed} failed");
    if not_run > 0 {
        text += &format!(", {not_run} not run");
    }
    (text + "\n", u8::from(failed > 0 || passed == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &str) -> Test {
        Test { name: name.into(), about: format!("about {name}"), program: None }
    }

    #[test]
    fn only_tests_that_ended_well_have_passed() {
        let ends = |name: &str, status| Event::TestEnds { name: name.into(), status, seconds: 3 };
        let events = [ends("good", 0), ends("bad", 1), ends("slow", 143), Event::TestStarts("crash".into())];
        let (text, status) = table(&["good", "bad", "slow", "crash", "later"].map(test), &events);
        let expected = "\
good           passed, 3 s                  about good
bad            failed with status 1, 3 s    about bad
slow           failed: its time was up, 3 s about slow
crash          failed: it did not end       about crash
later          failed: it did not run       about later
1 passed, 4 failed
";
        assert_eq!((text.as_str(), status), (expected, 1));
        assert_eq!(table(&[test("good")], &events).1, 0);
        let events = [ends("good", 0), ends("poor", 77)];
        let (text, status) = table(&["good", "poor"].map(test), &events);
        assert!(text.ends_with("about poor\n1 passed, 0 failed, 1 not run\n"), "{text}");
        assert_eq!((status, table(&[test("poor")], &events).1), (0, 1), "one that was asked for has to run");
    }

    #[test]
    fn every_test_says_what_it_is() {
        let all = choose(&[]).expect("readable");
        assert!(all.iter().any(|test| test.name == "nbd-kernel"));
        assert!(all.iter().all(|test| test.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')));
        assert_eq!(choose(&["nbd-kernel".to_owned()]).expect("there").len(), 1);
        let error = choose(&["nothing".to_owned()]).expect_err("not there").to_string();
        assert!(error.starts_with("find test nothing"), "{error}");
    }
}
