//! The files of the tree, as git lists them.

use super::Result;
use std::collections::BTreeMap;
use xshell::{Shell, cmd};

/// A Rust file, as text and as a syntax tree.
pub(super) struct Rust {
    pub(super) text: String,
    pub(super) tree: syn::File,
}

/// Everything that is checked, by path relative to the top.
#[derive(Default)]
pub(super) struct Sources {
    pub(super) rust: BTreeMap<String, Rust>,
    /// Markdown.
    pub(super) prose: BTreeMap<String, String>,
    /// All other files, whose text does not matter.
    pub(super) others: Vec<String>,
}

impl Sources {
    /// The files of the working tree.
    pub(super) fn of_tree() -> Result<Self> {
        let sh = Shell::new()?;
        let top = cmd!(sh, "git rev-parse --show-toplevel").quiet().read()?;
        sh.change_dir(&top);
        let listed = cmd!(sh, "git ls-files --cached --others --exclude-standard").quiet().read()?;
        let mut sources = Self::default();
        // A removed file whose removal is not committed is listed, too.
        for path in listed.lines().filter(|path| sh.path_exists(path)) {
            if path.ends_with(".rs") || path.ends_with(".md") {
                sources.put(path, sh.read_file(path)?)?;
            } else {
                sources.others.push(path.to_owned());
            }
        }
        Ok(sources)
    }

    /// Adds a file with this text.
    ///
    /// # Errors
    /// If it is not valid Rust.
    pub(super) fn put(&mut self, path: &str, text: String) -> Result<()> {
        if path.ends_with(".md") {
            self.prose.insert(path.to_owned(), text);
            return Ok(());
        }
        let tree = syn::parse_file(&text)
            .map_err(|error| format!("{path}:{}: {error}", error.span().start().line))?;
        self.rust.insert(path.to_owned(), Rust { text, tree });
        Ok(())
    }

    /// All paths.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        let known = self.rust.keys().chain(self.prose.keys()).chain(&self.others);
        known.map(String::as_str)
    }
}
