//! The limits that a server sets its clients.

use tap_host::{Budget, PAGE_BYTES};

/// The limits that a server sets its clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerLimits {
    /// Connections at one time that have chosen an export, at least 1.
    pub connections: usize,
    /// Connections at one time that have not chosen yet, at least 1. If there are more, the oldest is closed.
    pub negotiating: usize,
    /// Requests of one connection that are not answered, at least 1.
    pub requests: u32,
    /// Most bytes of one read or write: a power of two from 4096 to 32 MiB.
    pub request_bytes: u32,
    /// Most bytes of zeros or of a trim in one request to a disk, 4 KiB to 1 TiB; longer requests of clients are
    /// divided.
    pub range_bytes: u64,
    /// Memory for the data of one connection's requests in bytes; at least `request_bytes`.
    pub connection_bytes: usize,
    /// Receive buffer of one connection in bytes, 16 KiB to 4 MiB.
    pub receive_bytes: usize,
    /// How long a client may take to choose an export, in nanoseconds.
    pub negotiation_ns: u64,
    /// How long a client whose connection is ending may take none of its last replies, in nanoseconds.
    pub grace_ns: u64,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 16,
            negotiating: 16,
            requests: 128,
            request_bytes: REQUEST_BYTES_MAX,
            range_bytes: RANGE_BYTES_MAX,
            connection_bytes: REQUEST_BYTES_MAX as usize,
            receive_bytes: 256 << 10,
            negotiation_ns: 30_000_000_000,
            grace_ns: 5_000_000_000,
        }
    }
}

/// The request size that the protocol expects every server to accept.
const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// What fits a range of sectors, with room to spare.
const RANGE_BYTES_MAX: u64 = 1 << 40;
pub(super) const RECEIVE_BYTES_MIN: usize = 16 << 10;
const RECEIVE_BYTES_MAX: usize = 4 << 20;
/// The most memory reserved for one connection, in bytes.
const OWN_BYTES: usize = 256 << 10;

impl ServerLimits {
    /// The minimum of every limit.
    pub const LEAST: Self = Self {
        connections: 1,
        negotiating: 1,
        requests: 1,
        request_bytes: PAGE_BYTES as u32,
        range_bytes: PAGE_BYTES as u64,
        connection_bytes: PAGE_BYTES,
        receive_bytes: RECEIVE_BYTES_MIN,
        negotiation_ns: 1_000_000_000,
        grace_ns: 1_000_000,
    };

    /// With the largest request that `memory` can reasonably hold.
    pub(super) fn within(self, memory: &Budget) -> Self {
        let request_bytes = memory.most_for_one_bytes().clamp(PAGE_BYTES, REQUEST_BYTES_MAX as usize) as u32;
        Self { request_bytes: self.request_bytes.min(1 << request_bytes.ilog2()), ..self }
    }

    /// Memory reserved for one connection, in bytes.
    pub(super) fn own_bytes(&self, memory: &Budget) -> usize {
        let share = memory.most_for_one_bytes() / self.connections;
        OWN_BYTES.min(share).max(PAGE_BYTES).min(self.request_bytes as usize)
    }

    /// Most bytes of memory for data that clients can make the server hold. In addition each request costs a few
    /// hundred bytes, a block status reply up to 32 KiB (one at a time is built for each connection), and zeros that
    /// have to be written as data 1 MiB while they are written; with TLS each connection has 160 KiB more.
    pub fn memory_bytes(&self) -> usize {
        // A connection that gives up its place may not have ended when the next one begins.
        let negotiating = 2 * self.negotiating * RECEIVE_BYTES_MIN;
        self.connections * (self.connection_bytes + self.receive_bytes) + negotiating
    }

    /// With every value clamped to its range.
    pub(super) fn in_range(self) -> Self {
        let request_bytes = self.request_bytes.clamp(PAGE_BYTES as u32, REQUEST_BYTES_MAX);
        let request_bytes = 1 << request_bytes.ilog2();
        Self {
            connections: self.connections.max(1),
            negotiating: self.negotiating.max(1),
            requests: self.requests.max(1),
            request_bytes,
            range_bytes: self.range_bytes.clamp(PAGE_BYTES as u64, RANGE_BYTES_MAX),
            connection_bytes: self.connection_bytes.max(request_bytes as usize),
            receive_bytes: self.receive_bytes.clamp(RECEIVE_BYTES_MIN, RECEIVE_BYTES_MAX),
            ..self
        }
    }
}
