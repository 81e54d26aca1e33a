//! The settings of a back end, and the ways it can end.

use tap_host::{
    Budget, DomId, Errno, Events, Grants, Log, Probe, SharedPages, StorePath, Tasks, Time, VbdId, Xenstore,
};
use tap_ring::Limits;

/// The part of the seam that a back end needs.
pub trait XenHost: Time + Tasks + Log + Probe + Grants + Events + SharedPages + Xenstore {}
impl<T: Time + Tasks + Log + Probe + Grants + Events + SharedPages + Xenstore> XenHost for T {}

/// Which side reports that the disk is set up in dom0 (`hotplug-status`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Hotplug {
    /// Neither; the key is left alone.
    Ignore,
    /// We do, with the features.
    #[default]
    Write,
    /// A hotplug script; the ring is not connected before it has written `connected`.
    Wait,
}

/// Which disk, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendConfig {
    /// The back end's directory.
    pub backend_path: StorePath,
    /// The guest.
    pub dom: DomId,
    /// The disk's number.
    pub vbd: VbdId,
    /// Name of the in-flight record; without one a ring cannot be taken over after a restart.
    pub record: Option<String>,
    /// What the ring may use.
    pub limits: Limits,
    /// The budget from which its buffers are taken.
    pub memory: Budget,
    /// Whether flushes are offered.
    pub flush_cache: bool,
    /// Which side reports the hotplug status.
    pub hotplug: Hotplug,
    /// How long to wait for a port that a predecessor holds, and with [`lead`](crate::lead) for its disk, in
    /// nanoseconds: a process that was killed releases its resources one by one, and its image may be free before
    /// its ports are.
    pub bind_patience_ns: u64,
}

impl BackendConfig {
    /// The defaults: flushes offered, hotplug status written by us, two seconds for a dying predecessor.
    pub fn new(backend_path: impl Into<StorePath>, dom: DomId, vbd: VbdId) -> Self {
        Self {
            backend_path: backend_path.into(),
            dom,
            vbd,
            record: None,
            limits: Limits::default(),
            memory: Budget::default(),
            flush_cache: true,
            hotplug: Hotplug::default(),
            bind_patience_ns: 2_000_000_000,
        }
    }
}

/// Why a back end ended. By then nothing is mapped, bound or watched, and the disk is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendEnd {
    /// The toolstack took the device offline, and it is closed.
    Offline,
    /// The front end's directory is gone.
    FrontendGone,
    /// The back end's directory is gone, or a new device is in its place.
    BackendGone,
    /// We were asked to leave. The disk stays as it is in xenstore and at the front end, for another process.
    Left,
}

/// Why a back end could not continue.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackendError {
    /// xenstore refused.
    #[error("{what} {path} in xenstore: {error}")]
    Store {
        /// "read", "list", "write" or "watch".
        what: &'static str,
        /// Where.
        path: StorePath,
        /// Why.
        error: Errno,
    },
    /// The disk cannot be opened.
    #[error("{why}")]
    Open {
        /// A sentence that reads on after "failed to".
        why: String,
    },
    /// Another process drives the disk, or a front end is connected whose ring cannot be taken over. Nothing was
    /// changed: another process may be able to serve it.
    #[error("serve {path}: {why}; nothing was changed")]
    NotTaken {
        /// The back end's directory.
        path: StorePath,
        /// What is in the way.
        why: String,
    },
    /// Events of guests no longer reach us. The ring is left to another process.
    #[error("serve {path}: its event channel cannot be heard any more")]
    Deaf {
        /// The back end's directory.
        path: StorePath,
    },
    /// The in-flight records of guests that are gone cannot be found.
    #[error("list the in-flight records: {error}")]
    Records {
        /// Why.
        error: Errno,
    },
    /// The disk could not be closed; what was written since the last flush may be lost.
    #[error("close the disk of {path}: {error}; what was written since the last flush may be lost")]
    Close {
        /// The back end's directory.
        path: StorePath,
        /// Why.
        error: Errno,
    },
    /// An error ended the back end, and the disk could not be closed either.
    #[error(
        "{first}; its disk failed to close, too: {close}; what was written since the last flush may be lost"
    )]
    AndClose {
        /// What ended it.
        first: Box<BackendError>,
        /// Why the disk could not be closed.
        close: Errno,
    },
    /// The directory is not that of a disk of this guest.
    #[error("use {path} as a back end of {dom}: {why}")]
    NotOurs {
        /// The back end's directory.
        path: StorePath,
        /// The guest.
        dom: DomId,
        /// What does not fit.
        why: &'static str,
    },
}

impl BackendError {
    /// The error that ended the back end, whatever else went wrong then: it decides what to do next.
    pub fn first(&self) -> &Self {
        match self {
            Self::AndClose { first, .. } => first,
            other => other,
        }
    }
}
