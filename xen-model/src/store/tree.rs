//! Nodes and the operations on them, whether in the store itself or in a transaction's copy.

use super::{Perms, Quota, path};
use std::collections::{BTreeMap, BTreeSet};
use tap_host::{DomId, Errno};

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TreeNode {
    pub(crate) value: Vec<u8>,
    pub(crate) children: BTreeSet<String>,
    pub(crate) perms: Perms,
    /// Changes with every change of the node; never the same twice.
    pub(crate) generation: u64,
}

/// A change that may fire watches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Change {
    pub(crate) path: String,
    /// The node's permissions (before its removal): only domains that may read it are notified. `None` for special
    /// watches.
    pub(crate) perms: Option<Perms>,
    /// Fires only watches at this exact path: a node that was removed with its parent.
    pub(crate) exact: bool,
}

impl Change {
    pub(crate) fn special(name: &str) -> Self {
        Self { path: name.into(), perms: None, exact: true }
    }
}

/// A set of nodes that operations work on.
pub(crate) trait View {
    fn get(&mut self, path: &str) -> Option<TreeNode>;
    /// Stores or removes a node. The view assigns the generation.
    fn put(&mut self, path: &str, node: Option<TreeNode>);
    fn quota(&self) -> Quota;
    /// Nodes that `dom` owns.
    fn owned(&self, dom: DomId) -> usize;
}

pub(crate) struct Tree {
    nodes: BTreeMap<String, TreeNode>,
    generation: u64,
    quota: Quota,
}

impl Tree {
    pub(crate) fn new(quota: Quota) -> Self {
        let root = TreeNode {
            value: Vec::new(),
            children: BTreeSet::new(),
            perms: Perms::private(DomId(0)),
            generation: 0,
        };
        Self { nodes: BTreeMap::from([("/".into(), root)]), generation: 1, quota }
    }

    pub(crate) fn peek(&self, path: &str) -> Option<&TreeNode> {
        self.nodes.get(path)
    }

    pub(crate) fn count_owned(&self, dom: DomId) -> usize {
        self.nodes.values().filter(|node| node.perms.owner == dom).count()
    }

    pub(crate) fn quota(&self) -> Quota {
        self.quota
    }
}

impl View for Tree {
    fn get(&mut self, path: &str) -> Option<TreeNode> {
        self.nodes.get(path).cloned()
    }
    fn put(&mut self, path: &str, node: Option<TreeNode>) {
        self.generation += 1;
        match node {
            Some(node) => {
                self.nodes.insert(path.into(), TreeNode { generation: self.generation, ..node });
            }
            None => {
                self.nodes.remove(path);
            }
        }
    }
    fn quota(&self) -> Quota {
        self.quota
    }
    fn owned(&self, dom: DomId) -> usize {
        self.count_owned(dom)
    }
}

/// The error of a missing node for `dom`: a domain that may not read its parent learns nothing.
fn missing(view: &mut dyn View, dom: DomId, path: &str) -> Errno {
    let mut at = path;
    loop {
        at = path::parent(at);
        if let Some(node) = view.get(at) {
            return if node.perms.of(dom).reads() { Errno::ENOENT } else { Errno::EACCES };
        }
    }
}

pub(crate) fn read(view: &mut dyn View, dom: DomId, path: &str) -> Result<TreeNode, Errno> {
    match view.get(path) {
        Some(node) if node.perms.of(dom).reads() => Ok(node),
        Some(_) => Err(Errno::EACCES),
        None => Err(missing(view, dom, path)),
    }
}

pub(crate) fn write(view: &mut dyn View, dom: DomId, path: &str, value: &[u8]) -> Result<Vec<Change>, Errno> {
    if dom != DomId(0) && value.len() > view.quota().value_bytes {
        return Err(Errno::ENOSPC);
    }
    let node = match view.get(path) {
        Some(node) if node.perms.of(dom).writes() => node,
        Some(_) => return Err(Errno::EACCES),
        None => create(view, dom, path)?,
    };
    let perms = node.perms.clone();
    view.put(path, Some(TreeNode { value: value.to_vec(), ..node }));
    Ok(vec![Change { path: path.into(), perms: Some(perms), exact: false }])
}

/// Creates the missing parents of `path`, and links the topmost one to its parent; the caller stores the node itself.
fn create(view: &mut dyn View, dom: DomId, path: &str) -> Result<TreeNode, Errno> {
    let mut chain = vec![path.to_string()];
    let mut above = path::parent(path).to_string();
    let mut top = loop {
        match view.get(&above) {
            Some(node) => break node,
            None => {
                chain.push(above.clone());
                above = path::parent(&above).to_string();
            }
        }
    };
    if !top.perms.of(dom).writes() {
        return Err(Errno::EACCES);
    }
    let mut perms = top.perms.clone();
    if dom != DomId(0) {
        // A guest's nodes belong to it and count against its quota, wherever it was allowed to create them.
        perms.owner = dom;
        if view.owned(dom) + chain.len() > view.quota().nodes {
            return Err(Errno::ENOSPC);
        }
    }
    top.children.insert(path::name(&chain[chain.len() - 1]).into());
    view.put(&above, Some(top));
    let blank = TreeNode { value: Vec::new(), children: BTreeSet::new(), perms, generation: 0 };
    while let Some(next) = chain.pop() {
        let Some(below) = chain.last() else { break };
        let children = BTreeSet::from([path::name(below).to_string()]);
        view.put(&next, Some(TreeNode { children, ..blank.clone() }));
    }
    Ok(blank)
}

pub(crate) fn remove(view: &mut dyn View, dom: DomId, path: &str) -> Result<Vec<Change>, Errno> {
    if path == "/" {
        return Err(Errno::EINVAL);
    }
    let Some(node) = view.get(path) else {
        // Removing an absent node succeeds if its parent exists.
        let why = missing(view, dom, path);
        let has_parent = view.get(path::parent(path)).is_some();
        return if why == Errno::ENOENT && has_parent { Ok(Vec::new()) } else { Err(why) };
    };
    if !node.perms.of(dom).writes() {
        return Err(Errno::EACCES);
    }
    let mut changes = Vec::new();
    drop_subtree(view, path, node, false, &mut changes);
    let above = path::parent(path);
    if let Some(mut parent) = view.get(above) {
        parent.children.remove(path::name(path));
        view.put(above, Some(parent));
    }
    Ok(changes)
}

fn drop_subtree(view: &mut dyn View, path: &str, node: TreeNode, exact: bool, changes: &mut Vec<Change>) {
    for name in &node.children {
        let below = path::child(path, name);
        if let Some(child) = view.get(&below) {
            drop_subtree(view, &below, child, true, changes);
        }
    }
    view.put(path, None);
    changes.push(Change { path: path.into(), perms: Some(node.perms), exact });
}

pub(crate) fn set_perms(
    view: &mut dyn View,
    dom: DomId,
    path: &str,
    perms: Perms,
) -> Result<Vec<Change>, Errno> {
    let node = view.get(path).ok_or_else(|| missing(view, dom, path))?;
    if dom != DomId(0) && (node.perms.owner != dom || perms.owner != dom) {
        return Err(Errno::EACCES);
    }
    view.put(path, Some(TreeNode { perms: perms.clone(), ..node }));
    Ok(vec![Change { path: path.into(), perms: Some(perms), exact: false }])
}
