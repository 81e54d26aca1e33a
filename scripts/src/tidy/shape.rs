//! The length of files and functions, and the width of comments.

use super::Finding;
use super::exceptions::Exceptions;
use super::sources::{Rust, Sources};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Block, Signature};

const FILE_LINES: usize = 600;
const FUNCTION_LINES: usize = 70;
/// The width of code is rustfmt's job.
const PROSE_COLUMNS: usize = 120;

pub(super) fn look(sources: &Sources, exceptions: &mut Exceptions) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, rust) in &sources.rust {
        findings.extend(file(path, rust));
        let mut functions = Functions { path, exceptions, findings: &mut findings };
        functions.visit_file(&rust.tree);
    }
    for (path, text) in &sources.prose {
        findings.extend(prose(path, text));
    }
    findings
}

fn file(path: &str, rust: &Rust) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lines = rust.text.lines().count();
    if lines > FILE_LINES {
        findings.push(Finding::new(path, 0, format!("{lines} lines, at most {FILE_LINES}")));
    }
    for (i, line) in rust.text.lines().enumerate() {
        let Some(at) = line.trim_start().strip_prefix("//") else { continue };
        let text = at.trim_start_matches(['/', '!']);
        let free = text.starts_with(" |") || text.starts_with("     ") || text.contains("](");
        let columns = line.chars().count();
        if columns > PROSE_COLUMNS && !free {
            findings.push(Finding::new(path, i + 1, format!("{columns} columns, at most {PROSE_COLUMNS}")));
        }
    }
    findings
}

/// Tables, URLs and blocks of code may have any width.
fn prose(path: &str, text: &str) -> Vec<Finding> {
    let (mut findings, mut code) = (Vec::new(), false);
    for (i, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        let free = code || line.starts_with('|') || line.starts_with("    ") || line.contains("](");
        let columns = line.chars().count();
        if columns > PROSE_COLUMNS && !free {
            findings.push(Finding::new(path, i + 1, format!("{columns} columns, at most {PROSE_COLUMNS}")));
        }
    }
    findings
}

struct Functions<'a> {
    path: &'a str,
    exceptions: &'a mut Exceptions,
    findings: &'a mut Vec<Finding>,
}

impl Functions<'_> {
    fn function(&mut self, sig: &Signature, block: &Block) {
        let (first, last) = (sig.span().start().line, block.span().end().line);
        let lines = last + 1 - first;
        let what = format!("{}: {}", self.path, sig.ident);
        if lines > FUNCTION_LINES && !self.exceptions.allow("long-function", &what) {
            let text = format!("`{}` has {lines} lines, at most {FUNCTION_LINES}", sig.ident);
            self.findings.push(Finding::new(self.path, first, text));
        }
    }
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_fn(&mut self, i: &'ast syn::ItemFn) {
        self.function(&i.sig, &i.block);
        visit::visit_item_fn(self, i);
    }
    fn visit_impl_item_fn(&mut self, i: &'ast syn::ImplItemFn) {
        self.function(&i.sig, &i.block);
        visit::visit_impl_item_fn(self, i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: String) -> Vec<String> {
        let mut sources = Sources::default();
        sources.put(path, text).unwrap();
        let findings = look(&sources, &mut Exceptions::parse("").unwrap());
        findings.into_iter().map(|finding| finding.to_string()).collect()
    }

    #[test]
    fn long_files_and_functions_and_wide_lines_are_found() {
        let function = |lines: usize| format!("fn f() {{\n{}}}\n", "    a();\n".repeat(lines - 2));
        assert_eq!(found("a.rs", function(70)), Vec::<String>::new());
        assert_eq!(found("a.rs", function(71)), ["a.rs:1: `f` has 71 lines, at most 70"]);
        let file = "const A: u8 = 1;\n".repeat(601);
        assert_eq!(found("a.rs", file), ["a.rs: 601 lines, at most 600"]);
        assert_eq!(found("a.rs", format!("// {}\n", "x".repeat(117))), Vec::<String>::new());
        assert_eq!(found("a.rs", format!("// {}\n", "x".repeat(118))), ["a.rs:1: 121 columns, at most 120"]);
        assert_eq!(found("a.md", format!("{}\n", "x".repeat(121))), ["a.md:1: 121 columns, at most 120"]);
        assert_eq!(found("a.md", format!("```\n{}\n```\n", "x".repeat(121))), Vec::<String>::new());
    }
}
