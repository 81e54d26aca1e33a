//! Results as JUnit's XML, which servers of continuous integration show.

use super::Stop;
use crate::report;
use std::fmt::Write as _;
use std::path::Path;

/// One row of the result: a scenario, a seeded bug.
pub(super) struct Case {
    pub name: String,
    pub cpu_ns: u64,
    /// A headline and the details, if it failed.
    pub failure: Option<(String, String)>,
}

/// Writes `cases` of `suite` to the file that the option names, if it is given.
///
/// # Errors
/// The file cannot be written.
pub(super) fn save(path: Option<&Path>, suite: &str, cases: &[Case]) -> Result<(), Stop> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, print(suite, cases))
        .map_err(|e| Stop::usage(format!("failed to write {}: {e}", path.display())))
}

fn print(suite: &str, cases: &[Case]) -> String {
    let failed = cases.iter().filter(|case| case.failure.is_some()).count();
    let totals = format!(
        "tests=\"{}\" failures=\"{failed}\" errors=\"0\" time=\"{}\"",
        cases.len(),
        seconds(cases.iter().map(|case| case.cpu_ns).sum())
    );
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites {totals}>\n<testsuite name=\"tapsim {suite}\" {totals}>\n"
    );
    for Case { name, cpu_ns, failure } in cases {
        let (name, time) = (escaped(name), seconds(*cpu_ns));
        let _ = write!(out, "<testcase classname=\"tapsim.{suite}\" name=\"{name}\" time=\"{time}\"");
        let _ = match failure {
            None => writeln!(out, "/>"),
            Some((headline, details)) => writeln!(
                out,
                ">\n<failure message=\"{}\">{}</failure>\n</testcase>",
                escaped(headline),
                escaped(details)
            ),
        };
    }
    out + "</testsuite>\n</testsuites>\n"
}

fn seconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000_000, ns / 1_000_000 % 1000)
}

/// Text as XML; characters that XML cannot contain become question marks.
fn escaped(text: &str) -> String {
    let unknown = |c: char| c != '\n' && c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}');
    report::escaped(&text.replace(unknown, "?")).replace('\n', "&#10;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_counted_and_text_is_escaped() {
        let case = |name: &str, failure| Case { name: name.into(), cpu_ns: 1_234_567_890, failure };
        let broken = Some(("broken <G1>".into(), "a & \"b\"\n\u{1}".into()));
        let text = print("sweep", &[case("one", None), case("two", broken)]);
        assert!(
            text.contains("<testsuites tests=\"2\" failures=\"1\" errors=\"0\" time=\"2.469\">"),
            "{text}"
        );
        assert!(
            text.contains("<testcase classname=\"tapsim.sweep\" name=\"one\" time=\"1.234\"/>"),
            "{text}"
        );
        let failure = "<failure message=\"broken &lt;G1&gt;\">a &amp; &quot;b&quot;&#10;?</failure>";
        assert!(text.contains(failure), "{text}");
    }
}
