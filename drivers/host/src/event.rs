//! What the stack reports about itself: typed, so that a trace can be hashed without being printed.

use crate::{DomId, Errno, SectorRange, VbdId};
use std::fmt;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum IoKind {
    /// Read sectors.
    Read,
    /// Write sectors.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Make sectors read as zeros.
    WriteZeroes,
    /// Deallocate sectors.
    Discard,
}

impl fmt::Display for IoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoKind::Read => "read",
            IoKind::Write => "write",
            IoKind::Flush => "flush",
            IoKind::WriteZeroes => "write-zeroes",
            IoKind::Discard => "discard",
        })
    }
}

/// One thing that happened in the stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A request was taken from a ring.
    RequestTaken {
        /// The disk.
        vbd: VbdId,
        /// The guest's identifier of the request.
        id: u64,
        /// What it does.
        kind: IoKind,
        /// Where.
        range: SectorRange,
    },
    /// A response was put on a ring.
    RequestDone {
        /// The disk.
        vbd: VbdId,
        /// The guest's identifier of the request.
        id: u64,
        /// How it ended.
        result: Result<(), Errno>,
    },
    /// A request was refused before it reached the disk.
    RequestRefused {
        /// The disk.
        vbd: VbdId,
        /// The guest's identifier of the request.
        id: u64,
        /// Why.
        why: &'static str,
    },
    /// A request in flight was taken over from the record of a dead process.
    RequestResumed {
        /// The disk.
        vbd: VbdId,
        /// The guest's identifier of the request.
        id: u64,
        /// Where.
        range: SectorRange,
    },
    /// A ring was connected.
    RingConnected {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
    },
    /// A ring was given up.
    RingClosed {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
        /// Why.
        why: &'static str,
    },
    /// Contiguous requests go down as one.
    Merged {
        /// How many.
        parts: u32,
        /// What they cover together.
        range: SectorRange,
    },
    /// A request is repeated after a transient error.
    Retried {
        /// Where.
        range: SectorRange,
        /// The error.
        error: Errno,
    },
    /// A data cluster was allocated and mapped.
    ClusterMapped {
        /// Guest cluster.
        cluster: u64,
        /// Byte offset in the image file.
        host_offset: u64,
    },
    /// An L2 table was allocated and published.
    L2Mapped {
        /// Index in the L1 table.
        l1_index: u64,
        /// Byte offset in the image file.
        host_offset: u64,
    },
    /// The back end of a disk changed its xenbus state.
    BackendState {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
        /// The new state's number.
        state: u8,
    },
    /// A front end was told that it cannot be served; the reason is in xenstore.
    FrontendRefused {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
    },
    /// The in-flight record of a device that is gone was removed.
    OrphanRemoved {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
    },
    /// The state of a disk changed.
    VbdState {
        /// The disk.
        vbd: VbdId,
        /// What it is now ("running", "draining", "paused", "closing", "closed").
        state: &'static str,
    },
    /// A client of the NBD server connected.
    NbdConnected {
        /// Counts connections of the server, from 1.
        connection: u64,
    },
    /// A connection of the NBD server ended.
    NbdClosed {
        /// Which.
        connection: u64,
        /// Requests that were taken from it.
        requests: u64,
        /// Why.
        why: &'static str,
    },
    /// The NBD server did not take a connection.
    NbdRefused {
        /// The number that it would have got.
        connection: u64,
        /// Why.
        why: &'static str,
    },
    /// An NBD client lost its server, and tries to connect again.
    NbdServerLost {
        /// Why.
        why: &'static str,
    },
    /// An NBD client has its server again.
    NbdServerBack {
        /// Requests that were sent again.
        resent: u64,
    },
    /// An NBD client answers requests with errors.
    NbdServerGone {
        /// Why.
        why: &'static str,
    },
}

fn ok(result: Result<(), Errno>) -> i32 {
    result.map_or_else(|e| e.0, |()| 0)
}

impl Event {
    /// The event as numbers that differ when the event does; the input of a trace hash.
    pub fn words(&self) -> [u64; 4] {
        fn range(r: SectorRange) -> u64 {
            r.start.0 << 16 ^ u64::from(r.count)
        }
        fn text(s: &str) -> u64 {
            s.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
        }
        match *self {
            Event::RequestTaken { vbd, id, kind, range: r } => {
                [1 | u64::from(vbd.0) << 8, id, kind as u64, range(r)]
            }
            Event::RequestDone { vbd, id, result } => [2 | u64::from(vbd.0) << 8, id, ok(result) as u64, 0],
            Event::RequestRefused { vbd, id, why } => [3 | u64::from(vbd.0) << 8, id, text(why), 0],
            Event::RequestResumed { vbd, id, range: r } => [4 | u64::from(vbd.0) << 8, id, range(r), 0],
            Event::RingConnected { dom, vbd } => [5, u64::from(dom.0), u64::from(vbd.0), 0],
            Event::RingClosed { dom, vbd, why } => [6, u64::from(dom.0), u64::from(vbd.0), text(why)],
            Event::Merged { parts, range: r } => [7, u64::from(parts), range(r), 0],
            Event::Retried { range: r, error } => [8, range(r), error.0 as u64, 0],
            Event::ClusterMapped { cluster, host_offset } => [9, cluster, host_offset, 0],
            Event::L2Mapped { l1_index, host_offset } => [10, l1_index, host_offset, 0],
            Event::BackendState { dom, vbd, state } => {
                [11, u64::from(dom.0), u64::from(vbd.0), u64::from(state)]
            }
            Event::VbdState { vbd, state } => [12, u64::from(vbd.0), text(state), 0],
            Event::NbdConnected { connection } => [13, connection, 0, 0],
            Event::NbdClosed { connection, requests, why } => [14, connection, requests, text(why)],
            Event::NbdRefused { connection, why } => [15, connection, text(why), 0],
            Event::NbdServerLost { why } => [16, text(why), 0, 0],
            Event::NbdServerBack { resent } => [17, resent, 0, 0],
            Event::NbdServerGone { why } => [18, text(why), 0, 0],
            Event::OrphanRemoved { dom, vbd } => [20, u64::from(dom.0), u64::from(vbd.0), 0],
            Event::FrontendRefused { dom, vbd } => [19, u64::from(dom.0), u64::from(vbd.0), 0],
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Event::RequestTaken { vbd, id, kind, range } => write!(f, "{vbd} takes #{id} {kind} {range}"),
            Event::RequestDone { vbd, id, result: Ok(()) } => write!(f, "{vbd} answers #{id} ok"),
            Event::RequestDone { vbd, id, result: Err(e) } => write!(f, "{vbd} answers #{id} with {e:?}"),
            Event::RequestRefused { vbd, id, why } => write!(f, "{vbd} refuses #{id}: {why}"),
            Event::RequestResumed { vbd, id, range } => {
                write!(f, "{vbd} takes up #{id} {range} from the record")
            }
            Event::OrphanRemoved { dom, vbd } => {
                write!(f, "{vbd} of {dom}: it is gone, its in-flight record was removed")
            }
            Event::RingConnected { dom, vbd } => write!(f, "{vbd} of {dom} connected"),
            Event::RingClosed { dom, vbd, why } => write!(f, "{vbd} of {dom} closed: {why}"),
            Event::Merged { parts, range } => write!(f, "{parts} requests merged into {range}"),
            Event::Retried { range, error } => write!(f, "{range} repeated after {error:?}"),
            Event::ClusterMapped { cluster, host_offset } => {
                write!(f, "cluster {cluster} mapped at {host_offset:#x}")
            }
            Event::L2Mapped { l1_index, host_offset } => {
                write!(f, "L2 table {l1_index} mapped at {host_offset:#x}")
            }
            Event::BackendState { dom, vbd, state } => write!(f, "{vbd} of {dom}: back end in state {state}"),
            Event::FrontendRefused { dom, vbd } => {
                write!(
                    f,
                    "{vbd} of {dom}: the front end is refused; the back end's key error in xenstore says why"
                )
            }
            Event::VbdState { vbd, state } => write!(f, "{vbd} is {state}"),
            Event::NbdConnected { connection } => write!(f, "NBD connection {connection} opened"),
            Event::NbdClosed { connection, requests, why } => {
                write!(f, "NBD connection {connection} closed after {requests} requests: {why}")
            }
            Event::NbdRefused { connection, why } => write!(f, "NBD connection {connection} refused: {why}"),
            Event::NbdServerLost { why } => write!(f, "NBD server lost: {why}"),
            Event::NbdServerBack { resent } => {
                write!(f, "NBD server is back, {resent} requests were sent again")
            }
            Event::NbdServerGone { why } => write!(f, "NBD server is gone: {why}"),
        }
    }
}
