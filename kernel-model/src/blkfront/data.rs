//! The pages of a request: how its sectors lie in them, and how to detect that a back end touched anything else.
//!
//! ```text
//!   page 0   ▒▒████▒▒     page 1   ▒▒████▒▒     page 2   ▒▒██▒▒▒▒        ████ the request's sectors, ▒▒ poison
//! ```
//!
//! While no request uses a page, each of its sectors begins with poison: bytes that no disk holds. That reveals a read
//! that delivers nothing, a write outside the segments, a write to a page whose request was answered, and data that was
//! copied from such a page too late.

use super::PAGE_SECTORS;
use tap_abi::blkif::{ENTRY_BYTES, MAX_SEGMENTS, OP_DISCARD, Segment};
use tap_host::{SECTOR_BYTES, SectorRange};
use xen_model::GrantedPage;

const POISON: [u8; 8] = *b"\xa5poison\xa5";

/// How a request's sectors lie in its pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentLayout {
    /// Sectors in each page but the last, 1 to 8.
    pub per_page: u32,
    /// The first of them within the page.
    pub first: u32,
}

impl SegmentLayout {
    /// Whole pages.
    pub const WHOLE: Self = Self { per_page: PAGE_SECTORS, first: 0 };

    /// The first and last sector in each page of a request of `count` sectors.
    pub(crate) fn segments(self, count: u32) -> Vec<(u8, u8)> {
        let Self { per_page, first } = self.fitted(count);
        let counts = (0..count).step_by(per_page as usize).map(|at| (count - at).min(per_page));
        counts.map(|count| (first as u8, (first + count - 1) as u8)).collect()
    }

    /// As requested, as far as a request of `count` sectors allows.
    fn fitted(self, count: u32) -> Self {
        let per_page = self.per_page.clamp(1, PAGE_SECTORS);
        if count.div_ceil(per_page) > MAX_SEGMENTS as u32 {
            return Self::WHOLE;
        }
        Self { per_page, first: self.first.min(PAGE_SECTORS - per_page) }
    }
}

/// A run of sectors in a granted page.
#[derive(Clone, Copy, Debug)]
pub struct DataPiece<'a> {
    page: &'a GrantedPage,
    first: u32,
    count: u32,
}

impl DataPiece<'_> {
    /// Bytes in it.
    pub fn len_bytes(&self) -> usize {
        self.count as usize * SECTOR_BYTES as usize
    }

    fn offset(&self) -> usize {
        self.first as usize * SECTOR_BYTES as usize
    }

    /// Calls `look` with its bytes.
    pub fn with<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        let range = self.offset()..self.offset() + self.len_bytes();
        self.page.page.with(|bytes| look(&bytes[range]))
    }

    /// Calls `change` with its bytes, to change them.
    pub fn with_mut<R>(&self, change: impl FnOnce(&mut [u8]) -> R) -> R {
        let range = self.offset()..self.offset() + self.len_bytes();
        self.page.page.with_mut(|bytes| change(&mut bytes[range]))
    }

    pub(super) fn segment(&self) -> Segment {
        let last = self.first + self.count - 1;
        Segment { gref: self.page.gref.0, first: self.first as u8, last: last as u8 }
    }

    /// Whether the rest of the page is still poison.
    pub(super) fn is_alone(&self) -> bool {
        let own = self.first..self.first + self.count;
        (0..PAGE_SECTORS).filter(|sector| !own.contains(sector)).all(|sector| has_poison(self.page, sector))
    }
}

/// The pieces of a request, in order.
#[derive(Clone, Copy, Debug)]
pub struct DataPieces<'a> {
    pages: &'a [GrantedPage],
    count: u32,
    layout: SegmentLayout,
}

impl<'a> DataPieces<'a> {
    /// Those of a request of `count` sectors in `pages`, which are as many as it needs, or none.
    pub(super) fn new(pages: &'a [GrantedPage], count: u32, layout: SegmentLayout) -> Self {
        Self { pages, count, layout: layout.fitted(count) }
    }

    /// All of them.
    pub fn iter(self) -> impl Iterator<Item = DataPiece<'a>> {
        let SegmentLayout { per_page, first } = self.layout;
        (0..).zip(self.pages).map(move |(at, page)| {
            let count = (self.count - at * per_page).min(per_page);
            DataPiece { page, first, count }
        })
    }

    /// The only one, if it is.
    pub fn only(self) -> Option<DataPiece<'a>> {
        if self.pages.len() == 1 { self.iter().next() } else { None }
    }
}

/// Pages that a request of `count` sectors needs.
pub(super) fn pages_for(count: u32, layout: SegmentLayout) -> usize {
    count.div_ceil(layout.fitted(count).per_page) as usize
}

pub(super) fn poison(page: &GrantedPage) {
    page.page.with_mut(|bytes| {
        for sector in bytes.chunks_exact_mut(SECTOR_BYTES as usize) {
            *sector.first_chunk_mut().expect("a sector is longer") = POISON;
        }
    });
}

fn begins_with_poison(sector: &[u8]) -> bool {
    sector.first_chunk() == Some(&POISON)
}

fn has_poison(page: &GrantedPage, sector: u32) -> bool {
    let at = sector as usize * SECTOR_BYTES as usize;
    page.page.with(|bytes| begins_with_poison(&bytes[at..]))
}

pub(super) fn is_poisoned(page: &GrantedPage) -> bool {
    page.page.with(|bytes| bytes.chunks_exact(SECTOR_BYTES as usize).all(begins_with_poison))
}

/// A discard as it lies on the ring: a number of sectors takes the place of the segments.
pub(super) fn discard(id: u64, range: SectorRange) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[0] = OP_DISCARD;
    for (at, number) in [(8, id), (16, range.start.0), (24, u64::from(range.count))] {
        entry[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    entry
}
