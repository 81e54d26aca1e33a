//! Sparse copy-on-write bytes, the storage of files. A fork costs one pointer per 256 KiB.

use std::cell::RefCell;
use std::rc::Rc;

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Pages in a chunk.
const CHUNK: usize = 64;

/// One page of bytes.
pub type Page = [u8; PAGE];

thread_local! {
    /// Unused pages; the last one is used first, because it is still in the CPU's cache.
    static SPARE: RefCell<Vec<Rc<Page>>> = const { RefCell::new(Vec::new()) };
}
/// Spare pages kept per thread: 4 MiB.
const SPARE_MAX: usize = 1024;

/// An unshared page of unspecified bytes.
fn spare_page() -> Rc<Page> {
    SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| Rc::new([0; PAGE]))
}

/// Returns a page for reuse, if it is not shared.
pub fn recycle(page: Rc<Page>) {
    if Rc::strong_count(&page) == 1 {
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < SPARE_MAX {
                spare.push(page);
            }
        });
    }
}

#[derive(Clone)]
struct Chunk([Option<Rc<Page>>; CHUNK]);

impl Default for Chunk {
    fn default() -> Self {
        Self([const { None }; CHUNK])
    }
}

/// A sparse array of pages; absent ones read as zeros. Clones share pages until one side writes.
#[derive(Clone, Default)]
pub struct PageMap {
    chunks: Vec<Option<Rc<Chunk>>>,
}

impl PageMap {
    /// Page `index`, if it was ever written.
    #[inline]
    pub fn get(&self, index: u64) -> Option<&Rc<Page>> {
        let index = index as usize;
        self.chunks.get(index / CHUNK)?.as_ref()?.0[index % CHUNK].as_ref()
    }

    fn slot(&mut self, index: u64) -> &mut Option<Rc<Page>> {
        let index = index as usize;
        if self.chunks.len() <= index / CHUNK {
            self.chunks.resize(index / CHUNK + 1, None);
        }
        let chunk = self.chunks[index / CHUNK].get_or_insert_with(Rc::default);
        &mut Rc::make_mut(chunk).0[index % CHUNK]
    }

    /// Replaces page `index`.
    pub fn set(&mut self, index: u64, page: Option<Rc<Page>>) {
        if let Some(old) = std::mem::replace(self.slot(index), page) {
            recycle(old);
        }
    }

    /// Makes page `index` unshared; its bytes are kept if `keep`, otherwise unspecified.
    fn own(slot: &mut Option<Rc<Page>>, keep: bool) -> &mut Rc<Page> {
        if slot.as_mut().is_none_or(|page| Rc::get_mut(page).is_none()) {
            let mut fresh = spare_page();
            if keep && let Some(bytes) = Rc::get_mut(&mut fresh) {
                match &slot {
                    Some(old) => bytes.copy_from_slice(&old[..]),
                    None => bytes.fill(0),
                }
            }
            *slot = Some(fresh);
        }
        slot.get_or_insert_with(spare_page)
    }

    /// Fills `out` from byte `offset` on.
    pub fn read(&self, mut offset: u64, mut out: &mut [u8]) {
        while !out.is_empty() {
            let within = (offset % PAGE as u64) as usize;
            let n = out.len().min(PAGE - within);
            let (now, rest) = out.split_at_mut(n);
            match self.get(offset / PAGE as u64) {
                Some(page) => now.copy_from_slice(&page[within..within + n]),
                None => now.fill(0),
            }
            out = rest;
            offset += n as u64;
        }
    }

    /// Stores `bytes` within page `index` from `within` on, and returns the page.
    pub fn write_in_page(&mut self, index: u64, within: usize, bytes: &[u8]) -> &Rc<Page> {
        let page = Self::own(self.slot(index), bytes.len() < PAGE);
        if let Some(page) = Rc::get_mut(page) {
            page[within..within + bytes.len()].copy_from_slice(bytes);
        }
        page
    }

    /// Stores `bytes` from byte `offset` on.
    pub fn write(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let within = (offset % PAGE as u64) as usize;
            let n = bytes.len().min(PAGE - within);
            self.write_in_page(offset / PAGE as u64, within, &bytes[..n]);
            bytes = &bytes[n..];
            offset += n as u64;
        }
    }

    /// Makes everything from byte `size` on read as zeros.
    pub fn truncate(&mut self, size: u64) {
        let page = size / PAGE as u64;
        let within = (size % PAGE as u64) as usize;
        if within > 0 && self.get(page).is_some() {
            let zeros = [0; PAGE];
            self.write_in_page(page, within, &zeros[within..]);
        }
        let first = page + u64::from(within > 0);
        for index in first..(self.chunks.len() * CHUNK) as u64 {
            if self.get(index).is_some() {
                self.set(index, None);
            }
        }
    }

    /// Indices of the pages that exist, ascending.
    pub fn present(&self) -> impl Iterator<Item = u64> + '_ {
        self.chunks.iter().enumerate().flat_map(|(c, chunk)| {
            let pages = chunk.iter().flat_map(|chunk| chunk.0.iter().enumerate());
            pages.filter(|(_, p)| p.is_some()).map(move |(i, _)| (c * CHUNK + i) as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_do_not_see_each_other() {
        let mut a = PageMap::default();
        a.write(4090, &[1; 10]);
        let mut b = a.clone();
        b.write(4095, &[2, 2]);
        let mut out = [9; 12];
        a.read(4089, &mut out);
        assert_eq!(out, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
        b.read(4094, &mut out[..4]);
        assert_eq!(out[..4], [1, 2, 2, 1]);
        assert_eq!(b.present().collect::<Vec<_>>(), [0, 1]);
        b.truncate(4095);
        b.read(4094, &mut out[..4]);
        assert_eq!(out[..4], [1, 0, 0, 0]);
        assert_eq!(a.present().count(), 2);
    }
}
