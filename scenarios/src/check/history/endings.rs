//! What ends: the process that serves a disk, its power, its guest.

use super::{BlockHistory, Cell};
use crate::check::frontier::Block;

impl BlockHistory {
    /// The process that serves the disk died: its successor carries out what has no answer again, in the same order. A
    /// read that runs now may see a write that was submitted after it and is carried out already. And it knows of a
    /// failed write what the file says, which may be more than its predecessor did.
    pub fn server_died(&mut self) {
        self.repeated_to = self.clock;
        self.revive_failed();
    }

    /// Failed writes may be in the file.
    pub(super) fn revive_failed(&mut self) {
        let order = self.order;
        self.each_changed(|block| block.server_died(order));
    }

    /// The power was cut, and with it everything that ran.
    pub fn power_cut(&mut self) {
        self.cut_fences();
        let now = self.tick();
        self.was_cut = true;
        self.running.clear();
        self.reads.clear();
        self.each_changed(|block| block.power_cut(now));
    }

    /// The guest ended, and nobody waits any more for what it had in flight: that has happened or has not.
    pub fn guest_died(&mut self) {
        self.reads.clear();
        for (write, _) in self.running.clone() {
            self.end_write(write, false);
        }
    }

    fn each_changed(&mut self, act: impl Fn(&mut Block)) {
        for cell in &self.dirty {
            match &mut self.cells[*cell as usize] {
                Cell::Whole(block) => act(block),
                Cell::Split(blocks) => blocks.iter_mut().for_each(&act),
            }
        }
    }
}
