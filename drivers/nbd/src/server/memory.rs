//! Where the memory of connections comes from.

use super::{RECEIVE_BYTES_MIN, ServerLimits, connection, unaligned};
use crate::wire::TLS_BYTES;
use std::cell::RefCell;
use tap_host::{Budget, Errno, Stage};

/// The stages that the memory of all connections comes from.
pub(super) struct Memory {
    /// The reserves of connections that are allowed but not open.
    pub(super) seats: RefCell<Vec<Stage>>,
    /// Receive buffers of the size that every connection begins with.
    pub(super) inlets: Stage,
    /// Larger receive buffers, if there is room: from memory that is not promised to any stage.
    pub(super) spare: Stage,
    /// Requests larger than the reserve of a connection, when there is no room: one after the other.
    pub(super) large: Stage,
    /// The first and the last sector of unaligned requests, for as long as the disk has them. Taken after all other
    /// memory of a request.
    pub(super) edges: Stage,
    /// Sessions of TLS.
    pub(super) tls: Stage,
}

impl Memory {
    pub(super) fn new(limits: &ServerLimits, budget: &Budget, tls: bool) -> Result<Self, Errno> {
        let own = connection::cost_of_pieces(limits.own_bytes(budget));
        let seats = (0..limits.connections).map(|_| budget.stage(own)).collect::<Result<Vec<_>, _>>()?;
        let sessions = limits.negotiating + limits.connections;
        // Twice: connections that are ending may not have ended when the next ones begin.
        let inlets = 2 * sessions * RECEIVE_BYTES_MIN;
        Ok(Self {
            seats: RefCell::new(seats),
            inlets: budget.stage(inlets)?,
            spare: budget.stage(0)?,
            large: budget.stage(connection::cost_of_pieces(limits.request_bytes as usize))?,
            edges: budget.stage(unaligned::EDGES_COST)?,
            tls: budget.stage(if tls { sessions * TLS_BYTES } else { 0 })?,
        })
    }
}
