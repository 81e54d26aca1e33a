//! Sectors of a medium that cannot be read until they are written.

use crate::pages::PAGE;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_host::SECTOR_BYTES;

/// The unreadable sectors of a file, as a mask for each page that has some. Clones share it until one side changes.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct BadSectors(Rc<BTreeMap<u64, u8>>);

impl BadSectors {
    /// Those of `page`, as a mask.
    #[inline]
    pub fn of(&self, page: u64) -> u8 {
        if self.0.is_empty() { 0 } else { self.0.get(&page).copied().unwrap_or(0) }
    }

    /// Whether all sectors can be read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pages that have some, ascending, with their masks.
    pub fn pages(&self) -> impl Iterator<Item = (u64, u8)> {
        self.0.iter().map(|(page, mask)| (*page, *mask))
    }

    /// Makes `mask` those of `page`.
    pub(crate) fn set(&mut self, page: u64, mask: u8) {
        if self.of(page) == mask {
            return;
        }
        let pages = Rc::make_mut(&mut self.0);
        if mask == 0 {
            pages.remove(&page);
        } else {
            pages.insert(page, mask);
        }
    }

    /// `sectors` of `page` were written.
    #[inline]
    pub(crate) fn mend(&mut self, page: u64, sectors: u8) {
        if !self.0.is_empty() {
            self.set(page, self.of(page) & !sectors);
        }
    }

    /// The file ends at byte `size`.
    pub(crate) fn truncate(&mut self, size: u64) {
        let first = size / PAGE as u64;
        let Some(last) = self.0.keys().next_back().copied().filter(|last| *last >= first) else { return };
        self.set(first, self.of(first) & sectors_below(size, first));
        (first + 1..=last).for_each(|page| self.set(page, 0));
    }
}

/// The sectors of `page` that a file of `size` bytes has, as a mask.
pub(crate) fn sectors_below(size: u64, page: u64) -> u8 {
    let left = size.saturating_sub(page * PAGE as u64).div_ceil(SECTOR_BYTES);
    if left >= 8 { 0xff } else { (1 << left) - 1 }
}
