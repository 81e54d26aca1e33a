//! Decision files: a failing run as text.
//!
//! ```text
//! tapsim-run 1
//! scenario raw-power-cut
//! seed 145
//! revision 4f2a91c
//! invariant G7
//! trace 0x0123456789abcdef
//! option bug=l1-before-l2
//! decision 8d1c5b0a44e1f203 op 57 1048577 0 # guest 0
//! end 1
//! ```
//!
//! A decision has five parts: entity, label, attempt, value, virtual time in nanoseconds. Everything after ` # ` is for
//! people. The end line carries the number of decisions, so that a truncated file is not taken for a smaller run. Keys
//! name what a decision is about, so files survive code changes that a bare seed would not; a decision that is no
//! longer asked for is left unused.

use crate::decide::{Decision, DecisionMap, Key, label_by_name};
use crate::mix::Entity;
use std::fmt::Write as _;

const VERSION: u32 = 1;
/// A shrunk run has tens of decisions, an unshrunk one thousands; a file above this is not ours.
const DECISIONS_MAX: usize = 1_000_000;

/// A stored run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RunFile {
    /// Name of the scenario.
    pub scenario: String,
    /// The seed it was found with.
    pub seed: u64,
    /// The revision of the code that it was found with.
    pub revision: String,
    /// The invariant that it breaks; empty for a run that is kept because it once broke one.
    pub invariant: String,
    /// The trace hash at that revision.
    pub trace_hash: u64,
    /// Settings of the run, such as a seeded bug.
    pub options: Vec<(String, String)>,
    /// Lines for people.
    pub story: Vec<String>,
    /// The decisions.
    pub decisions: DecisionMap,
}

/// Why a file is not a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RunFileError {
    /// The first line is not that of a decision file.
    NotARun,
    /// Another version of the format.
    Version(String),
    /// An invalid line: its number and what is wrong.
    Line(usize, String),
}

impl std::fmt::Display for RunFileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotARun => f.write_str("not a decision file: its first line is not \"tapsim-run 1\""),
            Self::Version(v) => {
                write!(
                    f,
                    "a decision file of version {v}, this build reads {VERSION}: replay it with a build of its revision"
                )
            }
            Self::Line(n, what) => write!(f, "line {n}: {what}"),
        }
    }
}
impl std::error::Error for RunFileError {}

impl RunFile {
    /// The value of an option.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The file's text.
    pub fn print(&self) -> String {
        let mut out = format!("tapsim-run {VERSION}\n");
        for line in self.story.iter().flat_map(|text| text.lines()) {
            let _ = writeln!(out, "# {line}");
        }
        let _ = writeln!(out, "scenario {}\nseed {}\nrevision {}", self.scenario, self.seed, self.revision);
        if !self.invariant.is_empty() {
            let _ = writeln!(out, "invariant {}", self.invariant);
        }
        let _ = writeln!(out, "trace {:#018x}", self.trace_hash);
        for (name, value) in &self.options {
            let _ = writeln!(out, "option {name}={value}");
        }
        let mut decisions: Vec<_> = self.decisions.iter().collect();
        decisions.sort_by_key(|(k, d)| (d.at_ns, **k));
        for (key, d) in decisions {
            let _ = write!(
                out,
                "decision {:016x} {} {} {} {}",
                key.entity.0, key.label.name, key.attempt, d.value, d.at_ns
            );
            let _ = writeln!(out, "{}{}", if d.entity_name.is_empty() { "" } else { " # " }, d.entity_name);
        }
        let _ = writeln!(out, "end {}", self.decisions.len());
        out
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// [`RunFileError`], for a person to act on.
    pub fn parse(text: &str) -> Result<Self, RunFileError> {
        let mut lines = text.lines().enumerate();
        let first = lines.next().map_or("", |l| l.1);
        let version = first.strip_prefix("tapsim-run ").ok_or(RunFileError::NotARun)?.trim();
        if version != VERSION.to_string() {
            return Err(RunFileError::Version(version.into()));
        }
        let mut run = Self::default();
        let mut seen = (false, false);
        let mut end = None;
        let mut last = 1;
        for (i, line) in lines {
            last = i + 1;
            match line.strip_prefix("end ") {
                Some(count) => end = Some(count.trim().to_string()),
                None => run.parse_line(line, &mut seen).map_err(|what| RunFileError::Line(i + 1, what))?,
            }
        }
        if end != Some(run.decisions.len().to_string()) {
            let what = format!(
                "the file is cut off: it has {} decisions and no end that says so",
                run.decisions.len()
            );
            return Err(RunFileError::Line(last, what));
        }
        match seen {
            (true, true) => Ok(run),
            _ => Err(RunFileError::Line(1, "scenario or seed is missing: the file is cut off".into())),
        }
    }

    fn parse_line(&mut self, line: &str, seen: &mut (bool, bool)) -> Result<(), String> {
        let line = line.trim();
        if line.is_empty() {
            return Ok(());
        }
        if let Some(story) = line.strip_prefix('#') {
            self.story.push(story.trim().into());
            return Ok(());
        }
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "scenario" => (self.scenario, seen.0) = (rest.into(), true),
            "seed" => (self.seed, seen.1) = (rest.parse().map_err(|_| format!("bad seed {rest:?}"))?, true),
            "revision" => self.revision = rest.into(),
            "invariant" => self.invariant = rest.into(),
            "trace" => self.trace_hash = hex(rest)?,
            "option" => {
                let (name, value) = rest.split_once('=').ok_or_else(|| format!("bad option {rest:?}"))?;
                self.options.push((name.into(), value.into()));
            }
            "decision" => self.parse_decision(rest)?,
            other => return Err(format!("unknown word {other:?}")),
        }
        Ok(())
    }

    fn parse_decision(&mut self, rest: &str) -> Result<(), String> {
        if self.decisions.len() >= DECISIONS_MAX {
            return Err(format!("more than {DECISIONS_MAX} decisions"));
        }
        let (data, name) = rest.split_once(" # ").unwrap_or((rest, ""));
        let parts: Vec<&str> = data.split_whitespace().collect();
        let [entity, label, attempt, value, at_ns] = parts[..] else {
            return Err(format!("a decision has five parts, this has {}: the file is cut off", parts.len()));
        };
        let number = |s: &str| s.parse::<u64>().map_err(|_| format!("bad number {s:?}"));
        let key = Key {
            entity: Entity(hex(entity)?),
            label: label_by_name(label).ok_or_else(|| {
                format!("unknown kind of decision {label:?}: the file is of another revision")
            })?,
            attempt: attempt.parse().map_err(|_| format!("bad number {attempt:?}"))?,
        };
        let decision =
            Decision { value: number(value)?, at_ns: number(at_ns)?, entity_name: name.trim().into() };
        self.decisions.insert(key, decision);
        Ok(())
    }
}

fn hex(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16)
        .map_err(|_| format!("bad number {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::{Label, register_labels};

    static LABEL: Label = Label::new("file-test", "{}");

    #[test]
    fn round_trip_and_refusals() {
        register_labels(&[&LABEL]);
        let key = Key { entity: Entity(0xabc), label: &LABEL, attempt: 2 };
        let run = RunFile {
            scenario: "raw".into(),
            seed: 7,
            revision: "abc".into(),
            invariant: "G7".into(),
            trace_hash: 0x1234,
            options: vec![("bug".into(), "x".into())],
            story: vec!["a story".into()],
            decisions: [(key, Decision { value: 5, at_ns: 9, entity_name: "guest 0".into() })].into(),
        };
        let text = run.print();
        assert_eq!(RunFile::parse(&text).unwrap(), run);
        let long = RunFile { story: vec!["one\ntwo".into()], ..run.clone() };
        assert_eq!(RunFile::parse(&long.print()).unwrap().story, ["one", "two"]);
        assert_eq!(RunFile::parse("hello"), Err(RunFileError::NotARun));
        assert_eq!(RunFile::parse("tapsim-run 9\n"), Err(RunFileError::Version("9".into())));
        for len in "tapsim-run 1\n".len()..text.len() - 1 {
            assert!(RunFile::parse(&text[..len]).is_err(), "cut off after {len} bytes");
        }
        assert!(RunFile::parse(&text.replace("file-test", "no-such")).is_err());
    }
}
