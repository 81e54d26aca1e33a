//! xenstored: a tree of small values with owners, watches and transactions.
//!
//! Follows the rules of Xen's C xenstored as far as a client can see them: permissions are inherited at creation,
//! missing parents are created, removing takes the whole subtree, and a transaction fails with `EAGAIN` when any node
//! that it read or changed was changed by another party since it first touched it. Creating or removing a child changes
//! the parent (its list of children), writing a value does not.
//!
//! Everything here is immediate; [`crate::XenPort`] adds delays.

mod path;
mod perms;
mod tree;
mod tx;
mod watch;

pub use perms::{Access, Perms};

use std::collections::BTreeMap;
use std::task::Waker;
use tap_host::{DomId, Errno};
use tree::{Change, Tree};
use tx::Tx;
use watch::Watches;

/// What one domain may use; the control domain is exempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    /// Nodes owned.
    pub nodes: usize,
    /// Bytes of one value.
    pub value_bytes: usize,
    /// Registered watches.
    pub watches: usize,
    /// Transactions at a time.
    pub transactions: usize,
}

impl Default for Quota {
    fn default() -> Self {
        Self { nodes: 1000, value_bytes: 2048, watches: 128, transactions: 10 }
    }
}

/// What a message holds: a path, a zero and a value.
const MESSAGE_BYTES: usize = 4096;

/// The requester: a connection of a domain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Client {
    pub(crate) dom: DomId,
    pub(crate) conn: u64,
}

/// The whole store.
pub(crate) struct Store {
    tree: Tree,
    watches: Watches,
    transactions: BTreeMap<u64, Tx>,
    next_id: u64,
    quota: Quota,
}

/// Wakers of clients whose watches fired; wake them once nothing is borrowed.
pub(crate) type Wakers = Vec<Waker>;

impl Store {
    pub(crate) fn new(quota: Quota) -> Self {
        Self {
            tree: Tree::new(quota),
            watches: Watches::default(),
            transactions: BTreeMap::new(),
            next_id: 1,
            quota,
        }
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Runs `op` on the tree, or on what transaction `tx` sees of it, and fires watches for what changed.
    fn change(
        &mut self,
        tx: Option<u64>,
        op: impl FnOnce(&mut dyn tree::View) -> Result<Vec<Change>, Errno>,
    ) -> Result<Wakers, Errno> {
        match tx {
            None => {
                let changes = op(&mut self.tree)?;
                Ok(self.watches.fire(&changes))
            }
            Some(id) => {
                let tx = self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?;
                let changes = op(&mut tx.view(&self.tree))?;
                tx.changes.extend(changes);
                Ok(Wakers::new())
            }
        }
    }

    fn look<T>(
        &mut self,
        tx: Option<u64>,
        op: impl FnOnce(&mut dyn tree::View) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match tx {
            None => op(&mut self.tree),
            Some(id) => op(&mut self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?.view(&self.tree)),
        }
    }

    pub(crate) fn read(&mut self, who: Client, tx: Option<u64>, path: &str) -> Result<Vec<u8>, Errno> {
        let path = path::absolute(who.dom, path)?;
        self.look(tx, |view| tree::read(view, who.dom, &path).map(|node| node.value))
    }

    pub(crate) fn directory(
        &mut self,
        who: Client,
        tx: Option<u64>,
        path: &str,
    ) -> Result<Vec<String>, Errno> {
        let path = path::absolute(who.dom, path)?;
        self.look(tx, |view| tree::read(view, who.dom, &path).map(|node| node.children.into_iter().collect()))
    }

    pub(crate) fn perms(&mut self, who: Client, tx: Option<u64>, path: &str) -> Result<Perms, Errno> {
        let path = path::absolute(who.dom, path)?;
        self.look(tx, |view| tree::read(view, who.dom, &path).map(|node| node.perms))
    }

    pub(crate) fn write(
        &mut self,
        who: Client,
        tx: Option<u64>,
        path: &str,
        value: &[u8],
    ) -> Result<Wakers, Errno> {
        let message_bytes = path.len() + 1 + value.len();
        let path = path::absolute(who.dom, path)?;
        if message_bytes > MESSAGE_BYTES {
            return Err(Errno::ENOSPC);
        }
        self.change(tx, |view| tree::write(view, who.dom, &path, value))
    }

    pub(crate) fn remove(&mut self, who: Client, tx: Option<u64>, path: &str) -> Result<Wakers, Errno> {
        let path = path::absolute(who.dom, path)?;
        self.change(tx, |view| tree::remove(view, who.dom, &path))
    }

    pub(crate) fn set_perms(
        &mut self,
        who: Client,
        tx: Option<u64>,
        path: &str,
        perms: Perms,
    ) -> Result<Wakers, Errno> {
        let path = path::absolute(who.dom, path)?;
        self.change(tx, |view| tree::set_perms(view, who.dom, &path, perms))
    }

    pub(crate) fn start(&mut self, who: Client) -> Result<u64, Errno> {
        let open = self.transactions.values().filter(|tx| tx.client.dom == who.dom).count();
        if who.dom != DomId(0) && open >= self.quota.transactions {
            return Err(Errno::ENOSPC);
        }
        let id = self.next_id();
        self.transactions.insert(id, Tx::new(who));
        Ok(id)
    }

    pub(crate) fn abort(&mut self, tx: u64) {
        self.transactions.remove(&tx);
    }

    pub(crate) fn commit(&mut self, tx: u64) -> Result<Wakers, Errno> {
        let tx = self.transactions.remove(&tx).ok_or(Errno::ENOENT)?;
        let changes = tx.commit(&mut self.tree)?;
        Ok(self.watches.fire(&changes))
    }

    pub(crate) fn watch(&mut self, who: Client, path: &str) -> Result<u64, Errno> {
        let own = if path.starts_with('@') { path.to_string() } else { path::absolute(who.dom, path)? };
        if who.dom != DomId(0) && self.watches.of(who.dom) >= self.quota.watches {
            return Err(Errno::ENOSPC);
        }
        let id = self.next_id();
        self.watches.add(id, who, own);
        Ok(id)
    }

    pub(crate) fn unwatch(&mut self, watch: u64) {
        self.watches.remove(watch);
    }

    /// Whether `watch` has an event; registers `waker` if not.
    pub(crate) fn poll_watch(&mut self, watch: u64, waker: &Waker) -> Result<bool, Errno> {
        self.watches.poll(watch, waker)
    }

    /// Takes the first event of `watch`, which has one.
    pub(crate) fn take_watch(&mut self, watch: u64) -> Result<String, Errno> {
        self.watches.take(watch)
    }

    /// Fires `@introduceDomain` or `@releaseDomain`.
    pub(crate) fn fire_special(&mut self, name: &str) -> Wakers {
        self.watches.fire(&[Change::special(name)])
    }

    /// Ends a connection: its transactions are aborted and its watches removed.
    pub(crate) fn disconnect(&mut self, conn: u64) -> Wakers {
        self.transactions.retain(|_, tx| tx.client.conn != conn);
        self.watches.disconnect(conn)
    }

    pub(crate) fn watch_count(&self, dom: DomId) -> usize {
        self.watches.of(dom)
    }

    pub(crate) fn transaction_count(&self, dom: DomId) -> usize {
        self.transactions.values().filter(|tx| tx.client.dom == dom).count()
    }
}

#[cfg(test)]
mod tests;
