//! `cargo xtask tidy`: rules of the house that neither the compiler nor clippy knows.
//!
//! ```text
//!   shape      files up to 600 lines, functions up to 70, line widths
//!   circles    circular dependencies between files of a crate; a module and what is inside it count as one
//!   dead       public items that nothing names
//!   docs       paths that documents name
//! ```
//!
//! Exceptions are in `scripts/tidy.toml`, each with its reason. An exception that is no longer needed is a finding,
//! too.

mod circles;
mod dead;
mod docs;
mod exceptions;
mod shape;
mod sources;

use exceptions::Exceptions;
use sources::Sources;
use std::fmt;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const HELP: &str = "\
Looks for what breaks the rules of the house: long files and functions, wide lines, files that use one another in a circle,
public items that nothing names, and documents that name files that are not there.

Usage: cargo xtask tidy

Exceptions are in scripts/tidy.toml, each with its reason. Ends with 1 where there is a finding.
";

/// Something that breaks a rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Finding {
    /// Relative to the top of the tree.
    file: String,
    /// From 1; 0 if the whole file is meant.
    line: usize,
    what: String,
}

impl Finding {
    fn new(file: &str, line: usize, what: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.what),
            line => write!(f, "{}:{line}: {}", self.file, self.what),
        }
    }
}

pub(crate) fn run(args: &[String]) -> Result<()> {
    match args.first().map(String::as_str) {
        None => {}
        Some("--help" | "-h") => {
            print!("{HELP}");
            return Ok(());
        }
        Some(other) => {
            return Err(format!("unexpected argument {other:?}; see cargo xtask tidy --help").into());
        }
    }
    let sources = Sources::of_tree()?;
    let mut exceptions = Exceptions::read(&sources)?;
    let mut findings = Vec::new();
    findings.extend(shape::look(&sources, &mut exceptions));
    findings.extend(circles::look(&sources, &mut exceptions));
    findings.extend(dead::look(&sources, &mut exceptions));
    findings.extend(docs::look(&sources));
    findings.extend(exceptions.unused());
    findings.sort();
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => {
            println!("{} files are tidy", sources.files().count());
            Ok(())
        }
        count => Err(format!("{count} findings; rules and exceptions: cargo xtask tidy --help").into()),
    }
}
