//! Block requests and responses on a ring, in the layout of 64-bit front ends (`x86_64-abi`, and `arm-abi`).
//!
//! ```text
//!   request, 112 bytes                              response, 16 bytes
//!   0  op u8                                        0  id u64
//!   1  nr_segments u8, 1..=11                       8  op u8
//!   2  handle u16                                  10  status i16: 0, -1 error, -2 not supported
//!   8 id u64, the front end's, returned
//!   16 sector u64
//!   24 segments [11]: gref u32, first u8, last u8, padding u16
//! ```
//!
//! All numbers are little-endian. Sectors are 512 bytes whatever the disk's `sector-size` says, `first` and `last` are
//! inclusive sectors within the granted page (0..=7). One page holds 32 entries of 112 bytes.

use crate::ring;
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{I16, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// How a ring lies in memory: what its two ends agree on in xenstore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingLayout {
    /// Pages, a power of two.
    pub pages: u32,
    /// Slots, a power of two.
    pub entries: u32,
    /// Bytes of a slot: a request, or a response and the rest of the request that it overwrote.
    pub entry_bytes: usize,
    /// Its name, the value of the key `protocol`.
    pub protocol: &'static str,
}

impl RingLayout {
    /// One page, in the layout of 64-bit front ends.
    pub const X86_64: Self = Self { pages: 1, entries: 32, entry_bytes: ENTRY_BYTES, protocol: "x86_64-abi" };

    /// Byte offset within the ring of the slot of index `index`.
    pub const fn entry_offset(&self, index: u32) -> usize {
        ring::HEADER_BYTES + (index % self.entries) as usize * self.entry_bytes
    }

    /// The binary logarithm of its number of pages, as front ends state it.
    pub const fn page_order(&self) -> u32 {
        self.pages.ilog2()
    }
}

/// Bytes of a slot of [`RingLayout::X86_64`].
pub const ENTRY_BYTES: usize = 112;
/// Bytes of a response.
pub const RESPONSE_BYTES: usize = 16;
/// Most segments of one request.
pub const MAX_SEGMENTS: usize = 11;
/// Sectors of 512 bytes in a page.
pub const SECTORS_PER_PAGE: u8 = 8;

/// Read sectors.
pub const OP_READ: u8 = 0;
/// Write sectors.
pub const OP_WRITE: u8 = 1;
/// Write after everything before it and before everything after it.
pub const OP_WRITE_BARRIER: u8 = 2;
/// Make completed writes durable.
pub const OP_FLUSH_DISKCACHE: u8 = 3;
/// Forget sectors.
pub const OP_DISCARD: u8 = 5;
/// A request whose segments are in further pages.
pub const OP_INDIRECT: u8 = 6;

/// Done.
pub const STATUS_OKAY: i16 = 0;
/// Failed.
pub const STATUS_ERROR: i16 = -1;
/// The operation is unknown here.
pub const STATUS_EOPNOTSUPP: i16 = -2;

/// `info` of a disk that cannot be written.
pub const INFO_READ_ONLY: u32 = 4;

/// A segment as it lies in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RawSegment {
    /// The granted page.
    pub gref: U32,
    /// First sector within the page.
    pub first: u8,
    /// Last sector within the page, inclusive.
    pub last: u8,
    /// Unused.
    pub padding: U16,
}

/// A request as it lies in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RawRequest {
    /// `OP_*`.
    pub op: u8,
    /// How many of `segments` count.
    pub nr_segments: u8,
    /// Which of the front end's disks; the ring already says it, so it is ignored.
    pub handle: U16,
    /// Unused.
    pub padding: U32,
    /// Comes back in the response.
    pub id: U64,
    /// First sector on the disk.
    pub sector: U64,
    /// Where the data is.
    pub segments: [RawSegment; MAX_SEGMENTS],
}

/// A response as it lies in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RawResponse {
    /// The request's.
    pub id: U64,
    /// The request's.
    pub op: u8,
    /// Zero: the guest can read whatever is here.
    pub padding: u8,
    /// `STATUS_*`.
    pub status: I16,
    /// Zero, for the same reason.
    pub tail: U32,
}

const _: () = {
    assert!(size_of::<RawSegment>() == 8);
    assert!(offset_of!(RawSegment, first) == 4 && offset_of!(RawSegment, last) == 5);
    assert!(size_of::<RawRequest>() == ENTRY_BYTES);
    assert!(offset_of!(RawRequest, handle) == 2);
    assert!(offset_of!(RawRequest, id) == 8);
    assert!(offset_of!(RawRequest, sector) == 16);
    assert!(offset_of!(RawRequest, segments) == 24);
    assert!(size_of::<RawResponse>() == RESPONSE_BYTES);
    assert!(offset_of!(RawResponse, op) == 8);
    assert!(offset_of!(RawResponse, status) == 10);
    let ring = RingLayout::X86_64;
    assert!(ring.entries == 1 << ((4096 - ring::HEADER_BYTES) / ENTRY_BYTES).ilog2());
    assert!(ring.entry_offset(ring.entries - 1) + ENTRY_BYTES <= 4096);
};

impl RawResponse {
    /// A response whose padding is zero.
    pub fn new(id: u64, op: u8, status: i16) -> Self {
        Self { id: id.into(), op, padding: 0, status: status.into(), tail: U32::ZERO }
    }
}

/// Operations that this back end accepts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BlkifOp {
    /// [`OP_READ`].
    Read = OP_READ,
    /// [`OP_WRITE`].
    Write = OP_WRITE,
    /// [`OP_FLUSH_DISKCACHE`].
    Flush = OP_FLUSH_DISKCACHE,
}

/// A checked segment: `first <= last < 8`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// The granted page.
    pub gref: u32,
    /// First sector within the page.
    pub first: u8,
    /// Last sector within the page, inclusive.
    pub last: u8,
}

impl Segment {
    /// Sectors covered, 1..=8.
    pub const fn count(self) -> u8 {
        self.last - self.first + 1
    }
}

const TOO_MANY_SEGMENTS: &str = "more than 11 segments";

/// A request that obeys the protocol. The back end checks whether it fits the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlkifRequest {
    /// Comes back in the response.
    pub id: u64,
    /// What to do.
    pub op: BlkifOp,
    /// The front end's number of the disk.
    pub handle: u16,
    /// First sector on the disk.
    pub sector: u64,
    segments: [Segment; MAX_SEGMENTS],
    nr_segments: u8,
}

/// What is wrong with a request, and what its response needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed {
    /// The front end's identifier.
    pub id: u64,
    /// The operation, known or not.
    pub op: u8,
    /// [`STATUS_ERROR`] or [`STATUS_EOPNOTSUPP`].
    pub status: i16,
    /// What is wrong.
    pub why: &'static str,
}

impl BlkifRequest {
    /// A request over `segments` (1..=11 of them; a flush may have none).
    ///
    /// # Errors
    /// The sentence of [`Malformed::why`] when the request would not obey the protocol.
    pub fn new(id: u64, op: BlkifOp, sector: u64, segments: &[Segment]) -> Result<Self, &'static str> {
        if segments.len() > MAX_SEGMENTS {
            return Err(TOO_MANY_SEGMENTS);
        }
        let mut request = Self::blank(id, op, sector, segments.len());
        request.segments[..segments.len()].copy_from_slice(segments);
        request.check()?;
        Ok(request)
    }

    fn blank(id: u64, op: BlkifOp, sector: u64, nr_segments: usize) -> Self {
        let segments = [Segment::default(); MAX_SEGMENTS];
        Self { id, op, handle: 0, sector, segments, nr_segments: nr_segments as u8 }
    }

    fn check(&self) -> Result<(), &'static str> {
        let segments = self.segments();
        if segments.is_empty() && self.op != BlkifOp::Flush {
            return Err("no segment");
        }
        if segments.iter().any(|s| s.first > s.last) {
            return Err("a segment ends before it starts");
        }
        if segments.iter().any(|s| s.last >= SECTORS_PER_PAGE) {
            return Err("a segment reaches past its page");
        }
        Ok(())
    }

    /// Parses a private copy of a ring entry.
    ///
    /// # Errors
    /// [`Malformed`] for an unknown operation, a segment count outside 1..=11 (a flush may also have 0) or a segment
    /// that does not lie in its page.
    pub fn parse(entry: &[u8; ENTRY_BYTES]) -> Result<Self, Malformed> {
        let raw: RawRequest = zerocopy::transmute!(*entry);
        let bad = |status, why| Malformed { id: raw.id.get(), op: raw.op, status, why };
        let op = match raw.op {
            OP_READ => BlkifOp::Read,
            OP_WRITE => BlkifOp::Write,
            OP_FLUSH_DISKCACHE => BlkifOp::Flush,
            _ => return Err(bad(STATUS_EOPNOTSUPP, "unknown operation")),
        };
        let count = usize::from(raw.nr_segments);
        if count > MAX_SEGMENTS {
            return Err(bad(STATUS_ERROR, TOO_MANY_SEGMENTS));
        }
        let mut request = Self::blank(raw.id.get(), op, raw.sector.get(), count);
        request.handle = raw.handle.get();
        for (own, raw) in request.segments.iter_mut().zip(&raw.segments[..count]) {
            *own = Segment { gref: raw.gref.get(), first: raw.first, last: raw.last };
        }
        request.check().map_err(|why| bad(STATUS_ERROR, why))?;
        Ok(request)
    }

    /// The entry's bytes, with zeros where the layout has none.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut raw = RawRequest::new_zeroed();
        raw.op = self.op as u8;
        raw.nr_segments = self.nr_segments;
        raw.handle = self.handle.into();
        raw.id = self.id.into();
        raw.sector = self.sector.into();
        for (raw, own) in raw.segments.iter_mut().zip(self.segments()) {
            *raw = RawSegment { gref: own.gref.into(), first: own.first, last: own.last, padding: U16::ZERO };
        }
        zerocopy::transmute!(raw)
    }

    /// Where the data is; empty for a flush without data only.
    pub fn segments(&self) -> &[Segment] {
        &self.segments[..usize::from(self.nr_segments)]
    }

    /// Sectors covered by all segments, 0..=88.
    pub fn count(&self) -> u32 {
        self.segments().iter().map(|s| u32::from(s.count())).sum()
    }
}

#[cfg(test)]
#[path = "blkif_tests.rs"]
mod tests;
