//! What documents say of the tree: paths in code marks, and how many scenarios there are.

use super::Finding;
use super::sources::Sources;

/// Endings of what is taken for a path.
const ENDINGS: [&str; 5] = [".rs", ".md", ".toml", ".sh", ".run"];

pub(super) fn look(sources: &Sources) -> Vec<Finding> {
    let mut findings = Vec::new();
    let scenarios = scenarios(sources);
    for (file, text) in &sources.prose {
        for (i, line) in text.lines().enumerate() {
            for path in paths(line) {
                if !is_there(sources, path) {
                    findings.push(Finding::new(file, i + 1, format!("there is no `{path}`")));
                }
            }
            if let Some(count) =
                count_before(line, " scenarios").filter(|count| *count > 9 && *count != scenarios)
            {
                let text = format!("{count} scenarios are named, and there are {scenarios}");
                findings.push(Finding::new(file, i + 1, text));
            }
        }
    }
    findings
}

/// Paths in code marks: words with a slash or an ending that a source file has. Patterns, and what stands for something
/// else, are left alone.
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
    marked.filter(is_path).filter(|word| !word.contains("NAME")).collect()
}

/// A path may leave out the folders that the text is about.
fn is_there(sources: &Sources, path: &str) -> bool {
    sources
        .files()
        .any(|file| file == path || file.strip_suffix(path).is_some_and(|rest| rest.ends_with('/')))
}

/// The number in front of `word`.
fn count_before(line: &str, word: &str) -> Option<usize> {
    let before = &line[..line.find(word)?];
    let digits = before.rfind(|c: char| !c.is_ascii_digit()).map_or(before, |at| &before[at + 1..]);
    digits.parse().ok()
}

/// Statics that are a scenario.
fn scenarios(sources: &Sources) -> usize {
    let catalog = sources.rust.iter().filter(|(path, _)| path.starts_with("scenarios/src/catalog"));
    catalog
        .flat_map(|(_, rust)| &rust.tree.items)
        .filter(|item| match item {
            syn::Item::Static(item) => {
                matches!(&*item.ty, syn::Type::Path(ty) if ty.path.is_ident("Scenario"))
            }
            _ => false,
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_counts_that_are_not_there_are_found() {
        let mut sources = Sources::default();
        let catalog = "pub static A: Scenario = B;\npub static C: Other = D;\n";
        sources.put("scenarios/src/catalog/a.rs", catalog.into()).unwrap();
        let text =
            "`catalog/a.rs` and `a.rs`, not `b.rs` or `log/a.rs`\n12 scenarios, `target/b.rs`, 1 scenarios\n";
        sources.put("x.md", text.into()).unwrap();
        let found: Vec<String> = look(&sources).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "x.md:1: there is no `b.rs`",
                "x.md:1: there is no `log/a.rs`",
                "x.md:2: 12 scenarios are named, and there are 1",
            ]
        );
    }
}
