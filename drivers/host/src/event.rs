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

/// How important an event, or a line of a program, is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Level {
    /// Something failed.
    Error,
    /// Something is wrong, but nothing failed.
    Warning,
    /// What an administrator wants to know.
    #[default]
    Info,
    /// Every request.
    Debug,
}

/// How often a kind of event is printed on a real host.
enum Rate {
    /// It may be caused at will, by a guest, a client or a server: its lines are limited.
    Limited,
    /// Something else limits it, or its level.
    Free,
}

/// Makes the events: for each its fields, its level and rate, the numbers that stand for it in a trace hash, and its
/// words.
macro_rules! events {
    ($($(#[$doc:meta])* $name:ident {
        $($(#[$field_doc:meta])* $field:ident: $of:ty,)*
    } = $level:ident, $rate:ident, $numbers:expr, $words:literal $(, $more:expr)?;)*) => {
        /// One thing that happened in the stack.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Event {
            $($(#[$doc])* $name { $($(#[$field_doc])* $field: $of,)* },)*
        }

        enum Kind { $($name,)* }

        impl Event {
            /// Kinds of events.
            pub const KINDS: usize = [$(Kind::$name),*].len();

            /// Its kind, below [`Event::KINDS`].
            pub fn kind(&self) -> usize {
                match self { $(Event::$name { .. } => Kind::$name as usize,)* }
            }

            /// How important it is.
            pub fn level(&self) -> Level {
                match self { $(Event::$name { .. } => Level::$level,)* }
            }

            /// Whether a real host limits how often events of its kind are printed.
            pub fn is_limited(&self) -> bool {
                let rate = match self { $(Event::$name { .. } => Rate::$rate,)* };
                matches!(rate, Rate::Limited)
            }

            /// The event as numbers that differ when the event does; the input of a trace hash.
            pub fn words(&self) -> [u64; 4] {
                match *self { $(Event::$name { $($field),* } => $numbers,)* }
            }
        }

        impl fmt::Display for Event {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self { $(Event::$name { $($field),* } => write!(f, $words $(, $more)?),)* }
            }
        }
    };
}

// The first number of an event is never given to another one: saved hashes are of such numbers.
events! {
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
    } = Debug, Free, [1 | number(vbd) << 8, id, kind as u64, place(range)],
        "{vbd} takes #{id} {kind} {range}";
    /// A response was put on a ring.
    RequestDone {
        /// The disk.
        vbd: VbdId,
        /// The guest's identifier of the request.
        id: u64,
        /// How it ended.
        result: Result<(), Errno>,
    } = Debug, Free, [2 | number(vbd) << 8, id, code(result) as u64, 0],
        "{vbd} answers #{id} {}", Ended(result);
    /// The disk failed a request of a guest.
    RequestFailed {
        /// The disk.
        vbd: VbdId,
        /// What it does.
        kind: IoKind,
        /// Where.
        range: SectorRange,
        /// The error.
        error: Errno,
    } = Warning, Limited, [21 | number(vbd) << 8, kind as u64, place(range), error.0 as u64],
        "{vbd} failed to {kind} {range}: {error}";
    /// A request was refused before it reached the disk.
    RequestRefused {
        /// The disk.
        vbd: VbdId,
        /// The guest's identifier of the request.
        id: u64,
        /// Why.
        why: &'static str,
    } = Warning, Limited, [3 | number(vbd) << 8, id, text(why), 0], "{vbd} refuses #{id}: {why}";
    /// A request in flight was taken over from the record of a dead process.
    RequestResumed {
        /// The disk.
        vbd: VbdId,
        /// The guest's identifier of the request.
        id: u64,
        /// Where.
        range: SectorRange,
    } = Info, Free, [4 | number(vbd) << 8, id, place(range), 0],
        "{vbd} takes up #{id} {range} from the record";
    /// A ring was connected.
    RingConnected {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
    } = Info, Limited, [5, domain(dom), number(vbd), 0], "{vbd} of {dom} connected";
    /// A ring was given up.
    RingClosed {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
        /// Why.
        why: &'static str,
    } = Info, Limited, [6, domain(dom), number(vbd), text(why)], "{vbd} of {dom} closed: {why}";
    /// Contiguous requests go down as one.
    Merged {
        /// How many.
        parts: u32,
        /// What they cover together.
        range: SectorRange,
    } = Debug, Free, [7, u64::from(parts), place(range), 0], "{parts} requests merged into {range}";
    /// A request is repeated after a transient error.
    Retried {
        /// Where.
        range: SectorRange,
        /// The error.
        error: Errno,
    } = Warning, Limited, [8, place(range), error.0 as u64, 0], "{range} repeated after {error:?}";
    /// A data cluster was allocated and mapped.
    ClusterMapped {
        /// Guest cluster.
        cluster: u64,
        /// Byte offset in the image file.
        host_offset: u64,
    } = Debug, Free, [9, cluster, host_offset, 0], "cluster {cluster} mapped at {host_offset:#x}";
    /// An L2 table was allocated and published.
    L2Mapped {
        /// Index in the L1 table.
        l1_index: u64,
        /// Byte offset in the image file.
        host_offset: u64,
    } = Debug, Free, [10, l1_index, host_offset, 0], "L2 table {l1_index} mapped at {host_offset:#x}";
    /// The back end of a disk changed its xenbus state.
    BackendState {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
        /// The new state's number.
        state: u8,
    } = Info, Limited, [11, domain(dom), number(vbd), u64::from(state)],
        "{vbd} of {dom}: back end in state {state}";
    /// A front end was told that it cannot be served; the reason is in xenstore.
    FrontendRefused {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
    } = Warning, Limited, [19, domain(dom), number(vbd), 0],
        "{vbd} of {dom}: the front end is refused; the back end's key error in xenstore says why";
    /// The in-flight record of a device that is gone was removed.
    OrphanRemoved {
        /// The guest.
        dom: DomId,
        /// The disk.
        vbd: VbdId,
    } = Info, Free, [20, domain(dom), number(vbd), 0],
        "{vbd} of {dom}: it is gone, its in-flight record was removed";
    /// The state of a disk changed.
    VbdState {
        /// The disk.
        vbd: VbdId,
        /// What it is now ("running", "draining", "paused", "closing", "closed").
        state: &'static str,
    } = Debug, Limited, [12, number(vbd), text(state), 0], "{vbd} is {state}";
    /// A client of the NBD server connected.
    NbdConnected {
        /// Counts connections of the server, from 1.
        connection: u64,
        /// The disk that it serves, if that is one of many.
        vbd: Option<VbdId>,
    } = Info, Limited, [13, connection, one_of(vbd), 0], "NBD connection {connection}{} opened", To(vbd);
    /// A connection of the NBD server ended.
    NbdClosed {
        /// Which.
        connection: u64,
        /// Requests that were taken from it.
        requests: u64,
        /// Why.
        why: &'static str,
        /// The disk that it serves, if that is one of many.
        vbd: Option<VbdId>,
    } = Info, Limited, [14 | one_of(vbd) << 8, connection, requests, text(why)],
        "NBD connection {connection}{} closed after {requests} requests: {why}", To(vbd);
    /// The NBD server did not take a connection.
    NbdRefused {
        /// The number that it would have got.
        connection: u64,
        /// Why.
        why: &'static str,
        /// The disk that it serves, if that is one of many.
        vbd: Option<VbdId>,
    } = Warning, Limited, [15, connection, text(why), one_of(vbd)],
        "NBD connection {connection}{} refused: {why}", To(vbd);
    /// An NBD client lost its server, and tries to connect again.
    NbdServerLost {
        /// Why.
        why: &'static str,
    } = Warning, Limited, [16, text(why), 0, 0], "NBD server lost: {why}";
    /// An NBD client has its server again.
    NbdServerBack {
        /// Requests that were sent again.
        resent: u64,
    } = Info, Limited, [17, resent, 0, 0], "NBD server is back, {resent} requests were sent again";
    /// An NBD client answers requests with errors.
    NbdServerGone {
        /// Why.
        why: &'static str,
    } = Warning, Limited, [18, text(why), 0, 0], "NBD server is gone: {why}";
    /// A client of the control socket was not heard.
    ControlDropped {
        /// Counts connections of the socket, from 1.
        connection: u64,
        /// Why.
        why: &'static str,
    } = Warning, Limited, [22, connection, text(why), 0], "control connection {connection} dropped: {why}";
    /// A process of another user connected to a socket that is not for it.
    PeerRefused {
        /// The user's number; the largest one if it is not known.
        uid: u32,
    } = Warning, Limited, [24, uid as u64, 0, 0], "a process of user {uid} may not connect to this private socket";
    /// A connection to the control socket could not be accepted.
    ControlNotAccepted {
        /// As accept(2).
        error: Errno,
    } = Warning, Limited, [23, error.0 as u64, 0, 0],
        "a control connection could not be accepted: {error}";
    /// A request takes long.
    RequestHangs {
        /// The disk.
        vbd: VbdId,
        /// What it does.
        kind: IoKind,
        /// Where.
        range: SectorRange,
        /// For how long, in milliseconds.
        for_ms: u64,
        /// Where in the stack it is.
        at: Whereabouts,
    } = Warning, Limited, [25 | number(vbd) << 8, kind as u64, place(range), for_ms << 8 ^ at.number()],
        "{vbd} has not answered {kind} {range} for {for_ms} ms: {at}";
    /// A request that took long was answered, or its caller has left.
    RequestHung {
        /// The disk.
        vbd: VbdId,
        /// What it did.
        kind: IoKind,
        /// Where.
        range: SectorRange,
        /// How long it took, in milliseconds.
        for_ms: u64,
    } = Warning, Limited, [26 | number(vbd) << 8, kind as u64, place(range), for_ms],
        "{vbd} is done with {kind} {range} after {for_ms} ms";
}

/// Where in the stack a request is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Whereabouts {
    /// At the disk, which is paused.
    Paused,
    /// In the scheduler, behind another one that overlaps it.
    Behind {
        /// What that does.
        what: &'static str,
        /// Its first sector.
        sector: u64,
    },
    /// In the scheduler, because enough others are below.
    Line,
    /// At the image, or below it.
    Image,
}

impl Whereabouts {
    fn number(self) -> u64 {
        match self {
            Self::Paused => 1,
            Self::Behind { what, sector } => 2 ^ text(what) ^ sector << 8,
            Self::Line => 3,
            Self::Image => 4,
        }
    }
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paused => f.write_str("it waits because the disk is paused"),
            Self::Behind { what, sector } => write!(f, "it waits for a {what} at sector {sector}"),
            Self::Line => f.write_str("it waits in line for others at the image"),
            Self::Image => f.write_str("it is at the image"),
        }
    }
}

/// How a request ended, in words.
struct Ended(Result<(), Errno>);

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Ok(()) => f.write_str("ok"),
            Err(e) => write!(f, "with {e:?}"),
        }
    }
}

/// The disk of an NBD server, in words.
struct To(Option<VbdId>);

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |vbd| write!(f, " to {vbd}"))
    }
}

/// One of several disks; 0 for the only one.
fn one_of(vbd: Option<VbdId>) -> u64 {
    vbd.map_or(0, |vbd| number(vbd) + 1)
}

fn number(vbd: VbdId) -> u64 {
    u64::from(vbd.0)
}

fn domain(dom: DomId) -> u64 {
    u64::from(dom.0)
}

fn place(range: SectorRange) -> u64 {
    range.start.0 << 16 ^ u64::from(range.count)
}

fn code(result: Result<(), Errno>) -> i32 {
    result.map_or_else(|e| e.0, |()| 0)
}

fn text(s: &str) -> u64 {
    s.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_everything_about_its_event() {
        let (vbd, dom) = (VbdId(3), DomId(7));
        let done = |result| Event::RequestDone { vbd, id: 5, result };
        assert_eq!(done(Ok(())).words(), [2 | 3 << 8, 5, 0, 0]);
        assert_eq!(done(Err(Errno::EIO)).words(), [2 | 3 << 8, 5, Errno::EIO.0 as u64, 0]);
        assert_eq!(done(Ok(())).to_string(), format!("{vbd} answers #5 ok"));
        assert_eq!(done(Err(Errno::EIO)).to_string(), format!("{vbd} answers #5 with {:?}", Errno::EIO));
        assert_eq!((done(Ok(())).level(), done(Ok(())).is_limited()), (Level::Debug, false));
        let refused = Event::FrontendRefused { dom, vbd };
        assert_eq!(refused.words(), [19, 7, 3, 0]);
        assert_eq!((refused.level(), refused.is_limited()), (Level::Warning, true));
        let opened = |vbd| Event::NbdConnected { connection: 1, vbd }.to_string();
        assert_eq!(opened(None), "NBD connection 1 opened");
        assert_eq!(opened(Some(vbd)), format!("NBD connection 1 to {vbd} opened"));
        let dropped = Event::ControlDropped { connection: 1, why: "" };
        let next = Event::ControlNotAccepted { error: Errno::EMFILE };
        let (kind, range) = (IoKind::Flush, SectorRange::default());
        let last = Event::RequestHung { vbd, kind, range, for_ms: 1 };
        assert_eq!((dropped.kind() + 2, last.kind() + 1), (next.kind(), Event::KINDS));
        let hangs = |at| Event::RequestHangs {
            vbd,
            kind: IoKind::Write,
            range: SectorRange::new(8, 1),
            for_ms: 1,
            at,
        };
        let behind = Whereabouts::Behind { what: "write", sector: 5 };
        let text = "vbd3 has not answered write 8+1 for 1 ms: it waits for a write at sector 5";
        assert_eq!(hangs(behind).to_string(), text);
        assert_ne!(hangs(behind).words(), hangs(Whereabouts::Image).words());
    }
}
