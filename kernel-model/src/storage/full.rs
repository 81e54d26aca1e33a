//! A full file system: what operations do that find no space.

use super::{Inner, OpenFile, Storage};
use crate::faults::{self, Fault, IO_FAULT, IoOp};
use sim::Entity;
use tap_host::{Errno, ZeroMode};

impl Storage {
    /// From now on no operation that takes new space succeeds (`true`), or there is space again (`false`). Space that a
    /// file already has can be written.
    pub fn set_full(&self, full: bool) {
        self.0.full.set(full);
    }
}

impl Inner {
    pub(super) fn no_space(&self, op: IoOp) -> Fault {
        self.count(op);
        Fault::Error(Errno::ENOSPC, 0)
    }

    pub(super) fn hole_wants_space(&self, open: &OpenFile, offset: u64, len: u64) -> bool {
        let splits = || !open.file.device.get() && open.file.inode.borrow().has_some_space(offset, len);
        self.full.get() && self.config.borrow().holes_want_space && splits()
    }

    /// If dirty pages are dropped before a hole is made, they are gone when it fails.
    pub(super) fn no_space_for_hole(&self) -> Fault {
        let fault = self.no_space(IoOp::Zero(ZeroMode::Unmap));
        if self.config.borrow().holes_write_back { fault } else { Fault::DropsPages(false) }
    }

    /// How zeros that keep their space end while there is no space. For whole blocks, dirty pages are dropped before
    /// the lack of space is found, as on ext4; and a range that has its space may need more for the list of its
    /// extents.
    pub(super) fn full_zeros(&self, io: Entity, has_space: bool) -> Fault {
        self.count(IoOp::Zero(ZeroMode::Keep));
        faults::full(self.sim.fault(io, &IO_FAULT, 1_000_000, |d| faults::draw_full(d, has_space)), has_space)
    }
}
