//! Reads a graph from a file, with the texts that it imports.

use crate::graph::check::{Checked, check};
use crate::graph::resolve::{Text, resolve};
use crate::graph::signature::Classes;
use crate::graph::{Graph, NodeId};
use crate::lang::ast::{File, Statement};
use crate::lang::lex::MAX_TEXT_BYTES;
use crate::lang::{Diagnostic, Sources, Span, parse};
use tap_host::Errno;
use tap_images::{ImageHost, folder, read_small, resolve as beside, same_path};

/// Texts of one graph, at most.
const MAX_TEXTS: usize = 64;

/// A graph, and the texts that it was read from.
pub struct Loaded {
    /// The texts.
    pub sources: Sources,
    /// What is wrong with them, and with the graph.
    pub messages: Vec<Diagnostic>,
    /// The graph, as far as it could be understood.
    pub graph: Graph,
}

/// Why a text cannot be read; the text continues "failed to".
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LoadError {
    /// The host fails.
    #[error("read {path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// Why not.
        error: Errno,
    },
    /// It is no text.
    #[error("read {path}: it is not text in UTF-8")]
    Text {
        /// The file.
        path: String,
    },
}

/// Reads the graph at `path`. Mistakes in it are messages.
///
/// # Errors
/// [`LoadError`] when the file itself cannot be read.
pub async fn load<H: ImageHost>(host: &H, path: &str, classes: &Classes) -> Result<Loaded, LoadError> {
    let text = read(host, path).await?;
    let (mut sources, mut messages) = (Sources::default(), Vec::new());
    let mut files: Vec<File> = Vec::new();
    let mut paths: Vec<String> = Vec::new();
    let mut add = |path: String, text: String, files: &mut Vec<File>, paths: &mut Vec<String>| {
        let (file, found) = parse(files.len() as u16, &text);
        sources.add(&path, text);
        files.push(file);
        paths.push(path);
        found
    };
    messages.extend(add(path.to_owned(), text, &mut files, &mut paths));
    let mut at = 0;
    while at < files.len() {
        let imports = imports(&files[at]);
        for (name, span) in imports {
            let other = beside(&paths[at], &name);
            if paths.iter().any(|known| same_path(known, &other)) {
                continue;
            }
            let why = match files.len() < MAX_TEXTS {
                false => format!("a graph has at most {MAX_TEXTS} texts"),
                true => match read(host, &other).await {
                    Ok(text) => {
                        messages.extend(add(other, text, &mut files, &mut paths));
                        continue;
                    }
                    Err(error) => format!("failed to {error}"),
                },
            };
            messages.push(Diagnostic::error("M2015", why, span, "imported here"));
        }
        at += 1;
    }
    let texts = files.iter().zip(&paths);
    let texts: Vec<Text<'_>> =
        texts.map(|(file, path)| Text { file, folder: folder(path).to_owned() }).collect();
    // Names in a text that was not understood mean nothing.
    let is_read = messages.iter().all(|message| message.is_warning);
    let (graph, found) = if is_read { resolve(classes, &texts) } else { Default::default() };
    messages.extend(found);
    Ok(Loaded { sources, messages, graph })
}

/// The texts that `file` imports.
fn imports(file: &File) -> Vec<(String, Span)> {
    let import = |statement: &Statement| match statement {
        Statement::Import { path, .. } => Some((path.node.clone(), path.span)),
        _ => None,
    };
    file.statements.iter().filter_map(import).collect()
}

async fn read<H: ImageHost>(host: &H, path: &str) -> Result<String, LoadError> {
    let path = path.to_owned();
    match read_small(host, &path, MAX_TEXT_BYTES).await {
        Ok(Some(bytes)) => String::from_utf8(bytes).map_err(|_| LoadError::Text { path }),
        Ok(None) => Err(LoadError::Io { path, error: Errno::ENOENT }),
        Err(error) => Err(LoadError::Io { path, error }),
    }
}

impl Loaded {
    /// Checks the graph, unless its text has mistakes. `size_of` is the size in bytes of the disk of an image, if it is
    /// known. The messages are added to those of the text.
    pub fn check(&mut self, classes: &Classes, size_of: &dyn Fn(NodeId) -> Option<u64>) -> Option<Checked> {
        if !self.is_good() {
            return None;
        }
        let checked = check(classes, &self.graph, size_of);
        self.messages.extend(checked.messages.iter().cloned());
        Some(checked)
    }

    /// Whether there are no mistakes, though perhaps warnings.
    pub fn is_good(&self) -> bool {
        self.messages.iter().all(|message| message.is_warning)
    }

    /// The disk called `name`, or the only one.
    ///
    /// # Errors
    /// Why there is none, and which ones there are.
    pub fn disk(&self, classes: &Classes, name: Option<&str>) -> Result<NodeId, String> {
        let disks: Vec<NodeId> = self.graph.roots(&classes.0).collect();
        let names: Vec<&str> = disks.iter().map(|id| self.graph.nodes[*id].name.as_str()).collect();
        match (name, &disks[..]) {
            (None, [only]) => Ok(*only),
            (None, _) => Err(format!("it offers the disks {}; name one", names.join(", "))),
            (Some(name), _) => match names.iter().position(|known| *known == name) {
                Some(at) => Ok(disks[at]),
                None => Err(format!("it offers no disk {name}; there is {}", names.join(", "))),
            },
        }
    }
}
