//! The death of the serving process, the power cut, and the death of the guest.

use super::{BlockHistory, Cell};
use crate::check::frontier::Block;

impl BlockHistory {
    /// The process that serves the disk died. Its successor repeats all unanswered requests in the same order, so a
    /// running read may see a write that was submitted after it and has run already. Of a failed write the successor
    /// knows what the file says, which may be more than its predecessor did.
    pub fn server_died(&mut self) {
        self.repeated_to = self.clock;
        self.revive_failed();
    }

    /// Failed writes may be in the file.
    pub(super) fn revive_failed(&mut self) {
        let order = self.order;
        self.each_changed(|block| block.server_died(order));
    }

    /// The power was cut, which ends everything that ran.
    pub fn power_cut(&mut self) {
        self.cut_fences();
        let now = self.tick();
        self.was_cut = true;
        self.running.clear();
        self.reads.clear();
        self.each_changed(|block| block.power_cut(now));
    }

    /// The guest ended. Its requests in flight may or may not have taken effect, and have no one to answer to.
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
