//! Xen: grants, event channels, shared pages and xenstore.

use crate::{DomId, Errno, GrantRef, Port};
use std::future::Future;

/// A path in xenstore: absolute, of letters, digits and `-/_@`, without empty parts. It has at most 2048 bytes, not
/// counting `/local/domain/N/`.
pub type StorePath = String;

/// 4096 bytes that another party can write at any moment. No reference into it ever exists.
pub trait SharedPage: Clone + 'static {
    /// The little-endian u32 at byte `offset` (a multiple of 4 below 4096), with acquire ordering.
    fn load_u32(&self, offset: usize) -> u32;
    /// Stores a little-endian u32 at byte `offset` (a multiple of 4 below 4096), with release ordering.
    fn store_u32(&self, offset: usize, value: u32);
    /// Copies bytes out of the page, from `offset` on, into private memory.
    fn copy_in(&self, offset: usize, private: &mut [u8]);
    /// Copies private bytes into the page from `offset` on.
    fn copy_out(&self, offset: usize, private: &[u8]);
    /// A full barrier: stores before it are seen before loads after it. It belongs between a consumer's `event`
    /// store and its last look at the producer's index.
    fn full_barrier(&self);
}

/// A part of a granted page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GrantSegment {
    /// The granted page.
    pub gref: GrantRef,
    /// First byte within the page.
    pub offset: u16,
    /// Length in bytes; `offset + len` is at most 4096.
    pub len: u16,
}

/// The grant table of other domains, as /dev/xen/gntdev offers it.
pub trait Grants: Clone + 'static {
    /// A mapped page; unmapped when the last clone is dropped.
    type Page: SharedPage;
    /// Maps a page that `dom` granted to us.
    ///
    /// # Errors
    /// `EINVAL` for a grant that does not exist, is not for us, or is read-only when `write` is asked for.
    fn map(&self, dom: DomId, gref: GrantRef, write: bool) -> Result<Self::Page, Errno>;
    /// Copies granted segments, one after the other, into `private` (whose length is their sum).
    ///
    /// # Errors
    /// `EINVAL` if any grant is bad; what was copied by then is unspecified.
    fn copy_in(&self, dom: DomId, segments: &[GrantSegment], private: &mut [u8]) -> Result<(), Errno>;
    /// Copies `private` into granted segments, one after the other.
    ///
    /// # Errors
    /// `EINVAL` if any grant is bad or read-only; what was copied by then is unspecified.
    fn copy_out(&self, dom: DomId, segments: &[GrantSegment], private: &[u8]) -> Result<(), Errno>;
}

/// Event channels, as /dev/xen/evtchn offers them.
pub trait Events: Clone + 'static {
    /// One bound channel; closed when dropped.
    type Channel: EventChannel;
    /// Binds to `remote`'s unbound port, which waits for our domain. A port whose previous peer of the same domain is
    /// gone can be bound again. A channel starts pending, as Xen has it.
    ///
    /// # Errors
    /// `EINVAL` if the port does not exist, is bound, or waits for another domain; `ESRCH` if there is no such domain.
    fn bind_interdomain(&self, dom: DomId, remote: Port) -> Result<Self::Channel, Errno>;
}

/// One end of an event channel. Events are levels, not counts: several notifications may arrive as one.
pub trait EventChannel: 'static {
    /// Raises the event at the other end. A channel whose other end is gone swallows it.
    fn notify(&self);
    /// Completes when the event is pending, and clears it.
    ///
    /// # Errors
    /// `ESHUTDOWN` once the channel cannot be used any more.
    fn wait(&self) -> impl Future<Output = Result<(), Errno>>;
    /// The local port.
    fn local_port(&self) -> Port;
}

/// Named memory outside the process that survives its death, but not that of the host (/dev/shm).
pub trait SharedPages: Clone + 'static {
    /// A page of such memory.
    type Region: SharedPage;
    /// Opens the page called `name`, zeroed when it did not exist.
    ///
    /// # Errors
    /// `ENOMEM`, `EACCES`.
    fn region(&self, name: &str) -> Result<Self::Region, Errno>;
    /// As [`SharedPages::region`], and the page is owned by us alone until the last clone of the returned region is
    /// dropped, or our process has died. Callers that do not ask for ownership can still open it.
    ///
    /// # Errors
    /// `EBUSY` while it is owned, also by ourselves; `ENOMEM`, `EACCES`.
    fn own_region(&self, name: &str) -> Result<Self::Region, Errno>;
    /// The identifier of the host's boot: a new one each time the host comes up, the same for all its processes.
    ///
    /// # Errors
    /// As the host's.
    fn boot_id(&self) -> Result<[u8; 16], Errno>;
    /// Removes the name, if it exists. An owner of the page then no longer owns anything of that name.
    fn remove_region(&self, name: &str);
    /// The names that exist, sorted.
    ///
    /// # Errors
    /// `EACCES`, `EIO`.
    fn region_names(&self) -> Result<Vec<String>, Errno>;
}

/// A xenstore connection of one domain.
pub trait Xenstore: Clone + 'static {
    /// A running transaction; aborted when dropped without commit.
    type Transaction: Transaction;
    /// A registered watch; unregistered when dropped.
    type Watcher: Watcher;
    /// The value at `path`.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`, `EINVAL` for a bad path.
    fn read(&self, path: &str) -> impl Future<Output = Result<Vec<u8>, Errno>>;
    /// Writes the value at `path`, creating it and its parents, which get no value. Path and value fit a message when
    /// they have 4079 bytes together; more than 4095 never do.
    ///
    /// # Errors
    /// `EACCES`, `ENOSPC` over quota or when they fit no message, `EINVAL` for a bad path.
    fn write(&self, path: &str, value: &[u8]) -> impl Future<Output = Result<(), Errno>>;
    /// Removes `path` and everything below; no error if it is absent while its parent exists.
    ///
    /// # Errors
    /// `ENOENT` without parent, `EACCES`, `EINVAL` for a bad path.
    fn remove(&self, path: &str) -> impl Future<Output = Result<(), Errno>>;
    /// The names below `path`, sorted.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`, `EINVAL` for a bad path.
    fn directory(&self, path: &str) -> impl Future<Output = Result<Vec<String>, Errno>>;
    /// Watches `path` and everything below. Fires once at registration; may be spurious or stand for several changes;
    /// none is ever dropped for good.
    ///
    /// # Errors
    /// `EINVAL` for a bad path.
    fn watch(&self, path: &str) -> impl Future<Output = Result<Self::Watcher, Errno>>;
    /// Starts a transaction.
    ///
    /// # Errors
    /// `ENOSPC` over quota.
    fn transaction(&self) -> impl Future<Output = Result<Self::Transaction, Errno>>;
}

/// Reads and writes that take effect together or not at all.
pub trait Transaction {
    /// As [`Xenstore::read`], within the transaction.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`, `EINVAL` for a bad path.
    fn read(&self, path: &str) -> impl Future<Output = Result<Vec<u8>, Errno>>;
    /// As [`Xenstore::write`], within the transaction.
    ///
    /// # Errors
    /// `EACCES`, `ENOSPC`, `EINVAL`.
    fn write(&self, path: &str, value: &[u8]) -> impl Future<Output = Result<(), Errno>>;
    /// As [`Xenstore::remove`], within the transaction.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`, `EINVAL` for a bad path.
    fn remove(&self, path: &str) -> impl Future<Output = Result<(), Errno>>;
    /// Ends it with effect.
    ///
    /// # Errors
    /// `EAGAIN` when something it read or wrote was changed by others since: start again.
    fn commit(self) -> impl Future<Output = Result<(), Errno>>;
}

/// One firing of a watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WatchEvent {
    /// The path that changed or was registered. The watched path may stand for anything below it.
    pub path: StorePath,
}

/// A registered watch.
pub trait Watcher {
    /// The next firing.
    ///
    /// # Errors
    /// `ESHUTDOWN` when the connection is gone.
    fn next(&self) -> impl Future<Output = Result<WatchEvent, Errno>>;
}
