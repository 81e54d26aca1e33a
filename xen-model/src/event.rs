//! What the model did, for traces.

use sim::{TraceEvent, text_hash};
use std::fmt;
use tap_host::{DomId, GrantRef, Port};

/// One thing that happened in Xen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum XenEvent<'a> {
    /// A domain was made.
    DomainCreated {
        /// Its number.
        dom: DomId,
    },
    /// A domain ended.
    DomainDestroyed {
        /// Its number.
        dom: DomId,
    },
    /// A granted page was mapped.
    Mapped {
        /// The domain that mapped it.
        by: DomId,
        /// The domain that granted it.
        dom: DomId,
        /// The grant.
        gref: GrantRef,
    },
    /// A mapping ended.
    Unmapped {
        /// The domain that had mapped it.
        by: DomId,
        /// The domain that granted it.
        dom: DomId,
        /// The grant.
        gref: GrantRef,
    },
    /// An event channel was bound.
    Bound {
        /// The domain that bound it.
        dom: DomId,
        /// Its port.
        port: Port,
        /// The domain at the other end.
        remote: DomId,
        /// The port at the other end.
        remote_port: Port,
    },
    /// An event channel was closed.
    Closed {
        /// The domain that closed it.
        dom: DomId,
        /// The port.
        port: Port,
    },
    /// An event was raised.
    Notified {
        /// The domain that raised it.
        dom: DomId,
        /// Its port.
        port: Port,
        /// Delay of the arrival.
        late_ns: u64,
    },
    /// A value was written in xenstore.
    Written {
        /// The domain that wrote it.
        dom: DomId,
        /// The path.
        path: &'a str,
        /// The value.
        value: &'a [u8],
    },
    /// A node was removed from xenstore.
    Removed {
        /// The domain that removed it.
        dom: DomId,
        /// The path.
        path: &'a str,
    },
    /// A transaction ended.
    Committed {
        /// The domain that started it.
        dom: DomId,
        /// Whether it took effect.
        done: bool,
    },
}

impl TraceEvent for XenEvent<'_> {
    fn words(&self) -> [u64; 4] {
        // Numbers distinct from those of the stack's own events.
        let n = |tag: u64, dom: DomId| tag << 32 | u64::from(dom.0);
        match *self {
            Self::DomainCreated { dom } => [n(101, dom), 0, 0, 0],
            Self::DomainDestroyed { dom } => [n(102, dom), 0, 0, 0],
            Self::Mapped { by, dom, gref } => [n(103, by), u64::from(dom.0), u64::from(gref.0), 0],
            Self::Unmapped { by, dom, gref } => [n(104, by), u64::from(dom.0), u64::from(gref.0), 0],
            Self::Bound { dom, port, remote, remote_port } => {
                [n(105, dom), u64::from(port.0), u64::from(remote.0), u64::from(remote_port.0)]
            }
            Self::Closed { dom, port } => [n(106, dom), u64::from(port.0), 0, 0],
            Self::Notified { dom, port, late_ns } => [n(107, dom), u64::from(port.0), late_ns, 0],
            Self::Written { dom, path, value } => {
                let hash = value.iter().fold(0_u64, |h, b| sim::mix2(h, u64::from(*b)));
                [n(108, dom), text_hash(path), hash, 0]
            }
            Self::Removed { dom, path } => [n(109, dom), text_hash(path), 0, 0],
            Self::Committed { dom, done } => [n(110, dom), u64::from(done), 0, 0],
        }
    }
}

impl fmt::Display for XenEvent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::DomainCreated { dom } => write!(f, "{dom} created"),
            Self::DomainDestroyed { dom } => write!(f, "{dom} destroyed"),
            Self::Mapped { by, dom, gref } => write!(f, "{by} maps {gref} of {dom}"),
            Self::Unmapped { by, dom, gref } => write!(f, "{by} unmaps {gref} of {dom}"),
            Self::Bound { dom, port, remote, remote_port } => {
                write!(f, "{dom} binds {port} to {remote_port} of {remote}")
            }
            Self::Closed { dom, port } => write!(f, "{dom} closes {port}"),
            Self::Notified { dom, port, late_ns: 0 } => write!(f, "{dom} raises {port}"),
            Self::Notified { dom, port, late_ns } => write!(f, "{dom} raises {port}, {late_ns} ns late"),
            Self::Written { dom, path, value } => {
                write!(f, "{dom} writes {path} = {:?}", String::from_utf8_lossy(value))
            }
            Self::Removed { dom, path } => write!(f, "{dom} removes {path}"),
            Self::Committed { dom, done: true } => write!(f, "{dom} commits"),
            Self::Committed { dom, done: false } => write!(f, "{dom} has to repeat a transaction"),
        }
    }
}
