//! Test programs of this repository that run in dom0: built as `cargo test` builds them, and copied in.
//!
//! A test requests one in its file with `# test program: PACKAGE TEST`, and finds it in its PATH as PACKAGE-TEST.

use super::Result;
use serde_json::Value;
use std::path::PathBuf;
use xshell::{Shell, cmd};

/// A file `tests/TEST.rs` of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TestProgram {
    package: String,
    test: String,
}

impl TestProgram {
    /// The program that a line of a test's file requests; `None` for other lines.
    pub(super) fn parse(line: &str) -> Result<Option<Self>> {
        let Some(words) = line.strip_prefix("# test program:") else { return Ok(None) };
        match words.split_whitespace().collect::<Vec<_>>().as_slice() {
            [package, test] => Ok(Some(Self { package: (*package).into(), test: (*test).into() })),
            _ => Err(format!("understand {line:?}: it wants PACKAGE TEST").into()),
        }
    }

    /// Its name in dom0.
    pub(super) fn name(&self) -> String {
        format!("{}-{}", self.package, self.test)
    }

    /// Builds it; returns its path.
    pub(super) fn build(&self, sh: &Shell) -> Result<PathBuf> {
        let Self { package, test } = self;
        // In release mode like tapdisk itself, because a debug build runs slowly under emulation.
        let messages = cmd!(
            sh,
            "cargo test --release --locked -p {package} --test {test} --no-run --message-format json-render-diagnostics"
        )
        .read()
        .map_err(|e| format!("build test {test} of {package}: {e}"))?;
        executable(&messages, test).ok_or_else(|| format!("find what cargo built of test {test}").into())
    }
}

/// The executable of a test, from cargo's messages in lines of JSON.
fn executable(messages: &str, test: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut built = messages.filter(|m| m["target"]["name"] == test && m["target"]["kind"][0] == "test");
    built.find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_package_and_test() {
        let program = TestProgram::parse("# test program: tap-linux xen").expect("good").expect("one");
        assert_eq!(program.name(), "tap-linux-xen");
        assert_eq!(TestProgram::parse("# test programs are fun").expect("another line"), None);
        let error = TestProgram::parse("# test program: xen").expect_err("too short").to_string();
        assert_eq!(error, "understand \"# test program: xen\": it wants PACKAGE TEST");
    }

    #[test]
    fn cargo_says_where_it_put_it() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"xen","kind":["lib"]},"executable":null}
not JSON
{"reason":"compiler-artifact","target":{"name":"xen","kind":["test"]},"executable":"/target/xen-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "xen"), Some(PathBuf::from("/target/xen-1")));
        assert_eq!(executable(messages, "other"), None);
    }
}
