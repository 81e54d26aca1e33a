//! Two domains: the host under test, and another one that grants it pages and offers it channels.
//!
//! ```text
//!     Pair
//!      ├─ host   the seam under test            own ────────── map, copy, bind
//!      └─ peer   a domain of the runner       dom() ──────── grant, alloc_unbound, end_access
//! ```
//!
//! The seam has only the back end's half of grants and channels, so the runner provides the other: on the model a
//! guest, on a real host dom0 itself, through /dev/xen/gntalloc and /dev/xen/evtchn.

use tap_host::{
    DomId, Errno, EventChannel, Events, GrantRef, Grants, Port, SharedPage, SharedPages, Tasks, Time,
    Xenstore,
};

/// What bodies about Xen need from a host.
pub trait XenHost: Grants + Events + SharedPages + Xenstore + Time + Tasks {}
impl<T: Grants + Events + SharedPages + Xenstore + Time + Tasks> XenHost for T {}

/// The domain at the other end.
pub trait Peer: Clone + 'static {
    /// Its own view of a page that it granted; may be dropped while others use the page.
    type Page: SharedPage;
    /// Its end of a channel; closed when dropped.
    type Channel: EventChannel;
    /// Its number.
    fn dom(&self) -> DomId;
    /// Lets `to` use a new page of zeros.
    ///
    /// # Errors
    /// The system's error.
    fn grant(&self, to: DomId, writable: bool) -> Result<(GrantRef, Self::Page), Errno>;
    /// Revokes a grant. The caller has dropped the page. Once it is not mapped any more, it cannot be mapped again;
    /// that may take the peer a moment.
    ///
    /// # Errors
    /// `EBUSY` while it is mapped, on systems that report this; the grant then stays.
    fn end_access(&self, gref: GrantRef) -> Result<(), Errno>;
    /// A new channel that waits for `remote` to bind it.
    ///
    /// # Errors
    /// The system's error.
    fn alloc_unbound(&self, remote: DomId) -> Result<Self::Channel, Errno>;
}

/// Where bodies about two domains work.
#[derive(Clone)]
pub struct Pair<H, P> {
    /// The host under test.
    pub host: H,
    /// The other end.
    pub peer: P,
    /// The domain of the host.
    pub own: DomId,
    /// A domain that is neither of them, and need not exist.
    pub stranger: DomId,
}

/// Both ends of a channel: the host's and the peer's.
pub(crate) type Ends<H, P> = (<H as Events>::Channel, <P as Peer>::Channel);

impl<H: XenHost, P: Peer> Pair<H, P> {
    /// A page that the host may use.
    pub(crate) fn grant(&self, writable: bool) -> Result<(GrantRef, P::Page), String> {
        self.peer.grant(self.own, writable).map_err(|e| format!("failed to grant a page: {e}"))
    }

    /// Maps a page of the peer.
    pub(crate) fn map(&self, gref: GrantRef, write: bool) -> Result<H::Page, String> {
        self.host.map(self.peer.dom(), gref, write).map_err(|e| format!("failed to map {gref}: {e}"))
    }

    /// A channel that waits for the host.
    pub(crate) fn unbound(&self) -> Result<P::Channel, String> {
        self.peer.alloc_unbound(self.own).map_err(|e| format!("failed to make a channel: {e}"))
    }

    /// Binds a channel of the peer.
    pub(crate) fn bind(&self, port: Port) -> Result<H::Channel, String> {
        let bound = self.host.bind_interdomain(self.peer.dom(), port);
        bound.map_err(|e| format!("failed to bind {port}: {e}"))
    }

    /// A bound channel in its initial state under Xen: pending at the host's end.
    pub(crate) fn channel(&self) -> Result<Ends<H, P>, String> {
        let far = self.unbound()?;
        let near = self.bind(far.local_port())?;
        Ok((near, far))
    }
}
