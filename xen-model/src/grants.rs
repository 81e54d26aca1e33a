//! Grant tables, version 1: what a domain lets others map or copy.
//!
//! An entry names a page, one other domain and whether it may write. Revoking the permission does not undo an existing
//! mapping: the page stays reachable through it, and the entry cannot be reused before it is unmapped.

use crate::Page;
use std::collections::BTreeMap;
use tap_host::{DomId, Errno, GrantRef};

/// The first references belong to the toolstack (console, xenstore), as in Linux.
const RESERVED: u32 = 8;
/// A table of 32 frames of 512 entries, Xen's default limit.
const MAX_ENTRIES: usize = 32 * 512;

/// What an entry permits.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The page.
    pub page: Page,
    /// Who may use it.
    pub to: DomId,
    /// The other side may not write.
    pub read_only: bool,
}

#[derive(Default)]
struct Entry {
    grant: Option<Grant>,
    maps: u32,
    in_use: bool,
    /// A process died while it had it mapped.
    torn: bool,
}

#[derive(Default)]
pub(crate) struct GrantTable {
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// What was mapped when another kernel started in the domain, and how often it is. As long as that is so, the
    /// hypervisor takes the reference to mean this page, whatever the new kernel has granted by it.
    pinned: BTreeMap<u32, (Grant, u32)>,
}

impl GrantTable {
    /// Another kernel has started in the domain: it has granted nothing yet.
    pub(crate) fn reset(&mut self) {
        for (index, entry) in std::mem::take(&mut self.entries).into_iter().enumerate() {
            if let (Some(grant), true) = (entry.grant, entry.maps > 0) {
                self.pinned.insert(index as u32 + RESERVED, (grant, entry.maps));
            }
        }
        self.free.clear();
    }

    pub(crate) fn allocate(&mut self, grant: Grant) -> Result<GrantRef, Errno> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.entries.len() >= MAX_ENTRIES => return Err(Errno::ENOSPC),
            None => {
                self.entries.push(Entry::default());
                (self.entries.len() - 1) as u32
            }
        };
        self.entries[index as usize] = Entry { grant: Some(grant), maps: 0, in_use: true, torn: false };
        Ok(GrantRef(index + RESERVED))
    }

    fn entry(&mut self, gref: GrantRef) -> Option<&mut Entry> {
        let index = gref.0.checked_sub(RESERVED)?;
        self.entries.get_mut(index as usize).filter(|e| e.in_use)
    }

    /// Frees the entry.
    pub(crate) fn end_access(&mut self, gref: GrantRef) -> Result<(), Errno> {
        let entry = self.entry(gref).ok_or(Errno::EINVAL)?;
        if entry.maps > 0 {
            return Err(Errno::EBUSY);
        }
        *entry = Entry::default();
        self.free.push(gref.0 - RESERVED);
        Ok(())
    }

    /// The page of `gref`, if `who` may use it in this way.
    pub(crate) fn page(&self, gref: GrantRef, who: DomId, write: bool) -> Result<&Page, Errno> {
        let granted = || {
            let index = gref.0.checked_sub(RESERVED)?;
            self.entries.get(index as usize)?.grant.as_ref()
        };
        let pinned = self.pinned.get(&gref.0).map(|(grant, _)| grant);
        pinned
            .or_else(granted)
            .filter(|grant| grant.to == who && !(write && grant.read_only))
            .map(|grant| &grant.page)
            .ok_or(Errno::EINVAL)
    }

    pub(crate) fn map(&mut self, gref: GrantRef, who: DomId, write: bool) -> Result<Page, Errno> {
        let page = self.page(gref, who, write)?.clone();
        if let Some((_, maps)) = self.pinned.get_mut(&gref.0) {
            *maps += 1;
            return Ok(page);
        }
        self.entry(gref).ok_or(Errno::EINVAL)?.maps += 1;
        Ok(page)
    }

    pub(crate) fn unmap(&mut self, gref: GrantRef) {
        if let Some((_, maps)) = self.pinned.get_mut(&gref.0) {
            *maps -= 1;
            if *maps == 0 {
                self.pinned.remove(&gref.0);
            }
            return;
        }
        let entry = self.entry(gref).expect("a mapped entry is in use");
        entry.maps = entry.maps.checked_sub(1).expect("unmapped more often than mapped");
    }

    /// Notes that a process died while it had `gref` mapped.
    pub(crate) fn tear(&mut self, gref: GrantRef) {
        self.entry(gref).into_iter().for_each(|entry| entry.torn = true);
    }

    /// Whether a process died while it had `gref` mapped.
    pub(crate) fn is_torn(&self, gref: GrantRef) -> bool {
        let index = gref.0.checked_sub(RESERVED);
        index.and_then(|i| self.entries.get(i as usize)).is_some_and(|e| e.torn)
    }

    /// The number of mappings of `gref` now.
    pub(crate) fn maps(&self, gref: GrantRef) -> u32 {
        let index = gref.0.checked_sub(RESERVED);
        index.and_then(|i| self.entries.get(i as usize)).map_or(0, |e| e.maps)
    }

    /// Mappings of all entries.
    pub(crate) fn mapped(&self) -> u32 {
        self.entries.iter().map(|e| e.maps).chain(self.pinned.values().map(|(_, maps)| *maps)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACK: DomId = DomId(0);

    fn grant(read_only: bool) -> Grant {
        Grant { page: Page::new(), to: BACK, read_only }
    }

    #[test]
    fn only_the_named_domain_and_mode_get_through() {
        let mut table = GrantTable::default();
        let gref = table.allocate(grant(true)).unwrap();
        assert!(table.page(gref, BACK, false).is_ok());
        assert_eq!(table.page(gref, BACK, true).unwrap_err(), Errno::EINVAL);
        assert_eq!(table.page(gref, DomId(3), false).unwrap_err(), Errno::EINVAL);
        for absent in [0, 7, gref.0 + 1, u32::MAX] {
            assert_eq!(table.map(GrantRef(absent), BACK, false).unwrap_err(), Errno::EINVAL);
        }
    }

    #[test]
    fn a_mapped_entry_is_not_given_back() {
        let mut table = GrantTable::default();
        let gref = table.allocate(grant(false)).unwrap();
        let page = table.map(gref, BACK, true).unwrap();
        assert_eq!(table.end_access(gref), Err(Errno::EBUSY));
        page.store_u32(0, 7); // the mapping still works
        table.unmap(gref);
        assert_eq!(table.end_access(gref), Ok(()));
        assert_eq!(table.end_access(gref), Err(Errno::EINVAL));
        assert_eq!(table.allocate(grant(false)).unwrap(), gref, "reused");
    }

    #[test]
    fn a_page_that_is_mapped_outlives_its_kernel() {
        let mut table = GrantTable::default();
        let old = table.allocate(grant(false)).unwrap();
        let page = table.map(old, BACK, true).unwrap();
        table.reset();
        let new = table.allocate(grant(false)).unwrap();
        assert_eq!(new, old, "the next kernel counts from the same number");
        page.store_u32(0, 7);
        assert_eq!(table.map(new, BACK, true).unwrap().load_u32(0), 7, "still the old page");
        assert_eq!(table.mapped(), 2);
        table.unmap(new);
        table.unmap(old);
        assert_eq!(table.map(new, BACK, true).unwrap().load_u32(0), 0, "the new one");
        assert_eq!(table.mapped(), 1);
    }
}
