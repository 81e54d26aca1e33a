//! Transactions: private copies of what was touched, checked against the store at the end.

use super::tree::{Change, Tree, TreeNode, View};
use super::{Client, Quota};
use std::collections::BTreeMap;
use tap_host::{DomId, Errno};

struct Touched {
    /// The generation at first touch; `None` when there was no such node.
    base: Option<u64>,
    /// The transaction's own version, once it has changed the node.
    own: Option<Option<TreeNode>>,
}

pub(crate) struct Tx {
    pub(crate) client: Client,
    pub(crate) changes: Vec<Change>,
    touched: BTreeMap<String, Touched>,
}

pub(crate) struct TxView<'a> {
    touched: &'a mut BTreeMap<String, Touched>,
    tree: &'a Tree,
}

impl Tx {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, changes: Vec::new(), touched: BTreeMap::new() }
    }

    pub(crate) fn view<'a>(&'a mut self, tree: &'a Tree) -> TxView<'a> {
        TxView { touched: &mut self.touched, tree }
    }

    /// Applies the changes, and returns them for the watches.
    pub(crate) fn commit(self, tree: &mut Tree) -> Result<Vec<Change>, Errno> {
        let moved = |(path, touched): (&String, &Touched)| {
            tree.peek(path).map(|node| node.generation) != touched.base
        };
        if self.touched.iter().any(moved) {
            return Err(Errno::EAGAIN);
        }
        for (path, touched) in self.touched {
            if let Some(own) = touched.own {
                tree.put(&path, own);
            }
        }
        Ok(self.changes)
    }
}

impl TxView<'_> {
    fn touch(&mut self, path: &str) -> &mut Touched {
        let tree = self.tree;
        self.touched
            .entry(path.into())
            .or_insert_with(|| Touched { base: tree.peek(path).map(|n| n.generation), own: None })
    }
}

impl View for TxView<'_> {
    fn get(&mut self, path: &str) -> Option<TreeNode> {
        // The store may have changed since the first touch: the view is then inconsistent, and the commit fails with
        // EAGAIN.
        if let Some(own) = &self.touch(path).own {
            return own.clone();
        }
        self.tree.peek(path).cloned()
    }
    fn put(&mut self, path: &str, node: Option<TreeNode>) {
        self.touch(path).own = Some(node);
    }
    fn quota(&self) -> Quota {
        self.tree.quota()
    }
    fn owned(&self, dom: DomId) -> usize {
        let owns = |node: Option<&TreeNode>| usize::from(node.is_some_and(|n| n.perms.owner == dom));
        let mut count = self.tree.count_owned(dom);
        for (path, touched) in self.touched.iter() {
            if let Some(own) = &touched.own {
                count += owns(own.as_ref());
                count -= owns(self.tree.peek(path)).min(count);
            }
        }
        count
    }
}
