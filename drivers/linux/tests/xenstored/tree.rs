//! The nodes and the operations on them.

use std::collections::BTreeMap;
use tap_abi::xenstore::{MessageKind, PAYLOAD_BYTES_MAX};

#[derive(Clone)]
pub(crate) struct Tree {
    nodes: BTreeMap<String, Vec<u8>>,
    /// Counts changes.
    generation: u64,
    changed: Vec<String>,
}

impl Default for Tree {
    fn default() -> Self {
        let nodes = ["/", "/tool"].map(|path| (path.to_owned(), Vec::new())).into();
        Self { nodes, generation: 1, changed: Vec::new() }
    }
}

fn parent(path: &str) -> &str {
    match path.rfind('/') {
        None | Some(0) => "/",
        Some(at) => &path[..at],
    }
}

/// Whether `path` is `top` or below it.
pub(crate) fn within(path: &str, top: &str) -> bool {
    top == "/" || path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Tree {
    /// The operations that a client may do both inside and outside a transaction.
    pub(crate) fn apply(
        &mut self,
        kind: MessageKind,
        path: &str,
        rest: &[u8],
    ) -> Result<Vec<u8>, &'static str> {
        if !path.starts_with('/') {
            return Err("EINVAL");
        }
        match kind {
            MessageKind::Read => self.nodes.get(path).cloned().ok_or("ENOENT"),
            MessageKind::Directory => self.list(path),
            MessageKind::Write => self.write(path, rest).map(|()| b"OK\0".to_vec()),
            MessageKind::Rm => self.remove(path).map(|()| b"OK\0".to_vec()),
            _ => Err("ENOSYS"),
        }
    }

    pub(crate) fn write(&mut self, path: &str, value: &[u8]) -> Result<(), &'static str> {
        let mut above = parent(path);
        while !self.nodes.contains_key(above) {
            self.nodes.insert(above.to_owned(), Vec::new());
            above = parent(above);
        }
        self.nodes.insert(path.to_owned(), value.to_vec());
        self.touch(path);
        Ok(())
    }

    fn remove(&mut self, path: &str) -> Result<(), &'static str> {
        if self.nodes.contains_key(path) {
            self.nodes.retain(|node, _| !within(node, path));
            self.touch(path);
            return Ok(());
        }
        if self.nodes.contains_key(parent(path)) { Ok(()) } else { Err("ENOENT") }
    }

    fn touch(&mut self, path: &str) {
        self.generation += 1;
        self.changed.push(path.to_owned());
    }

    /// What has changed since the last call.
    pub(crate) fn changed(&mut self) -> Vec<String> {
        std::mem::take(&mut self.changed)
    }

    /// The names below `path`, each with its NUL; not sorted.
    fn list(&self, path: &str) -> Result<Vec<u8>, &'static str> {
        if !self.nodes.contains_key(path) {
            return Err("ENOENT");
        }
        let below = self.nodes.keys().rev().filter(|node| *node != "/" && parent(node) == path);
        Ok(below
            .flat_map(|node| [&node[node.rfind('/').unwrap() + 1..], "\0"].concat().into_bytes())
            .collect())
    }

    /// Whole names from `offset` on, as many as a message takes.
    pub(crate) fn directory_part(&self, path: &str, offset: usize) -> Result<Vec<u8>, &'static str> {
        let list = self.list(path)?;
        let mut answer = format!("{}\0", self.generation).into_bytes();
        let room = PAYLOAD_BYTES_MAX - answer.len() - 1;
        let rest = list.get(offset..).unwrap_or_default();
        let fits = if rest.len() <= room {
            rest.len()
        } else {
            rest[..room].iter().rposition(|b| *b == 0).unwrap() + 1
        };
        answer.extend_from_slice(&rest[..fits]);
        if fits == rest.len() {
            answer.push(0);
        }
        Ok(answer)
    }

    /// Takes over the changes made in a copy, unless anything has changed here since; returns what has changed.
    pub(crate) fn take_over(&mut self, mut copy: Tree) -> Result<Vec<String>, &'static str> {
        if copy.generation - copy.changed.len() as u64 != self.generation {
            return Err("EAGAIN");
        }
        let changed = copy.changed();
        *self = copy;
        Ok(changed)
    }
}
