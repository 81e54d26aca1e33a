//! Which ring to connect, with what, and why that can fail.

use tap_abi::blkif::RingLayout;
use tap_host::{Budget, DomId, Errno, GrantRef, Port, Tried, VbdId};

/// The layout of the rings that are served, which is the only one that may be offered to front ends.
pub const LAYOUT: RingLayout = RingLayout::X86_64;

/// What a ring may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes of data buffers in use at a time. A request larger than this is served alone.
    pub buffer_bytes: usize,
    /// Most requests taken before responses are published and other tasks have their turn; at least 1.
    pub batch: u32,
}

impl Default for Limits {
    /// Enough for a ring full of requests of eleven pages.
    fn default() -> Self {
        Self { buffer_bytes: LAYOUT.entries as usize * (64 << 10), batch: LAYOUT.entries }
    }
}

/// Which ring to connect, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RingConfig {
    /// The guest.
    pub dom: DomId,
    /// The disk.
    pub vbd: VbdId,
    /// The ring's page.
    pub ring_ref: GrantRef,
    /// The guest's port.
    pub port: Port,
    /// Name of the in-flight record ([`SharedPages`](tap_host::SharedPages)); without one a ring cannot be taken over
    /// after a restart.
    pub record: Option<String>,
    /// Memory and fairness.
    pub limits: Limits,
    /// Writes are refused, even if the node would accept them.
    pub read_only: bool,
    /// The budget from which data buffers are taken, within the limits.
    pub memory: Budget,
}

/// Why a ring could not be connected.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConnectError {
    /// The ring's page.
    #[error("map ring page {gref} of {dom}: {error}")]
    Map {
        /// The guest.
        dom: DomId,
        /// The grant.
        gref: GrantRef,
        /// Why.
        error: Errno,
    },
    /// The event channel.
    #[error("bind event channel {port} of {dom}: {error}")]
    Bind {
        /// The guest.
        dom: DomId,
        /// The guest's port.
        port: Port,
        /// Why.
        error: Errno,
    },
    /// The record's page.
    #[error("open in-flight record {name}: {error}")]
    Region {
        /// The page's name.
        name: String,
        /// Why.
        error: Errno,
    },
    /// There is no memory for a single request.
    #[error("take memory for the ring: {0}; give more (--memory), or serve fewer disks")]
    Memory(Errno),
    /// The ring was served before by a process that left no record of it.
    #[error("connect a ring that is in use and has no in-flight record: the front end has to make a new one")]
    InUse,
    /// Another process, which was to serve the ring, refused or cannot be reached.
    #[error("{words}")]
    Told {
        /// Why.
        words: String,
        /// It may be back soon.
        away: bool,
    },
    /// The record contradicts the ring.
    #[error("take up the ring: {0}; the front end has to make a new one")]
    Record(&'static str),
}

impl ConnectError {
    /// Whether the host lacked a resource, which may be temporary; the front end did nothing wrong.
    pub fn passes(&self) -> bool {
        match self {
            Self::Map { error, .. } | Self::Bind { error, .. } | Self::Region { error, .. } => {
                Tried::Page.may_pass(*error)
            }
            // Other disks may release memory.
            Self::Memory(_) => true,
            Self::InUse | Self::Told { .. } | Self::Record(_) => false,
        }
    }
}
