//! What documents say about the tree: paths in code marks.

use super::Finding;
use super::sources::Sources;

/// Endings of words that are taken for paths.
const ENDINGS: [&str; 5] = [".rs", ".md", ".toml", ".sh", ".run"];

pub(super) fn look(sources: &Sources) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, text) in &sources.prose {
        for (i, line) in text.lines().enumerate() {
            for path in paths(line) {
                if !is_there(sources, path) {
                    findings.push(Finding::new(file, i + 1, format!("there is no `{path}`")));
                }
            }
        }
    }
    findings
}

/// Paths in code marks: words with a slash or an ending that a source file has. Patterns and placeholders are ignored.
fn paths(line: &str) -> Vec<&str> {
    let marked = line.split('`').skip(1).step_by(2);
    let is_path = |word: &&str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        ENDINGS.iter().any(|ending| word.ends_with(ending))
            && word.chars().all(plain)
            && !word.starts_with(['/', '.'])
            && !word.contains("target/")
            && word.chars().any(|c| c.is_ascii_lowercase())
    };
    // A word in capitals is a placeholder.
    let any = |word: &&str| {
        word.split(['/', '.']).any(|part| part.len() > 1 && part.chars().all(|c| c.is_ascii_uppercase()))
    };
    marked.filter(is_path).filter(|word| !any(word)).collect()
}

/// A path may omit leading folders.
fn is_there(sources: &Sources, path: &str) -> bool {
    sources
        .files()
        .any(|file| file == path || file.strip_suffix(path).is_some_and(|rest| rest.ends_with('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_are_not_there_are_found() {
        let mut sources = Sources::default();
        sources.put("scenarios/src/catalog/a.rs", String::new()).unwrap();
        let text = "`catalog/a.rs` and `a.rs`, not `b.rs` or `log/a.rs`\n`target/b.rs`\n";
        sources.put("x.md", text.into()).unwrap();
        let found: Vec<String> = look(&sources).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["x.md:1: there is no `b.rs`", "x.md:1: there is no `log/a.rs`"]);
    }
}
