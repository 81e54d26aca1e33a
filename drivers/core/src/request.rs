//! Requests and responses.

use tap_host::{Errno, IoVec, SECTOR_BYTES, SectorRange, bytes_of};

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Fill the buffers from the range.
    Read,
    /// Store the buffers in the range.
    Write,
    /// Make durable every request that was answered before. Range and buffers are empty.
    Flush,
    /// Make the range read as zeros, as a write of zeros would. Without buffers.
    WriteZeroes(ZeroFlags),
    /// The contents of the range are no longer needed: each sector may keep its bytes or become zeros, consistently
    /// until it is written again, and its space may be freed. Without buffers; a node may do nothing.
    Discard,
}

impl Op {
    /// Whether it changes the contents of the disk.
    pub fn is_write(self) -> bool {
        match self {
            Op::Read | Op::Flush => false,
            Op::Write | Op::WriteZeroes(_) | Op::Discard => true,
        }
    }
    /// Whether it has buffers, which are then as long as its range.
    pub fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }
}

/// How to zero a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ZeroFlags {
    /// Space may be freed; without it, allocated space stays allocated.
    pub unmap: bool,
    /// Fail with `EOPNOTSUPP`, without a change, if it would take as long as writing zeros.
    pub fast: bool,
}

/// One request to a [`crate::Node`].
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Where, in sectors of 512 bytes; within the disk, and not empty for reads and writes.
    pub range: SectorRange,
    /// Memory of exactly the range's length for reads and writes; empty for all others.
    pub bufs: IoVec,
    /// Force unit access: the change is durable when the request is answered. Only for requests that change something.
    pub fua: bool,
}

impl Request {
    /// A read into `bufs`.
    ///
    /// # Panics
    /// If `bufs` have not the length of `range`.
    pub fn read(range: SectorRange, bufs: IoVec) -> Self {
        assert_eq!(bytes_of(&bufs) as u64, range.len_bytes(), "buffers do not fit the range");
        Self { op: Op::Read, range, bufs, fua: false }
    }
    /// A write of `bufs`.
    ///
    /// # Panics
    /// If `bufs` have not the length of `range`.
    pub fn write(range: SectorRange, bufs: IoVec) -> Self {
        assert_eq!(bytes_of(&bufs) as u64, range.len_bytes(), "buffers do not fit the range");
        Self { op: Op::Write, range, bufs, fua: false }
    }
    /// A request to zero `range`.
    pub fn write_zeroes(range: SectorRange, flags: ZeroFlags) -> Self {
        Self { op: Op::WriteZeroes(flags), range, bufs: IoVec::new(), fua: false }
    }
    /// A discard.
    pub fn discard(range: SectorRange) -> Self {
        Self { op: Op::Discard, range, bufs: IoVec::new(), fua: false }
    }
    /// The same request, durable when answered if `fua`.
    pub fn with_fua(self, fua: bool) -> Self {
        Self { fua, ..self }
    }
    /// Whether range, buffers and `fua` fit `op`, and the range is within a disk of `size_sectors`.
    pub fn is_well_formed(&self, size_sectors: u64) -> bool {
        let data_bytes = if self.op.has_data() { self.range.len_bytes() } else { 0 };
        (self.range.count == 0) == (self.op == Op::Flush)
            && bytes_of(&self.bufs) as u64 == data_bytes
            && (!self.fua || self.op.is_write())
            && (self.op == Op::Flush || self.range.fits(size_sectors.min(u64::MAX / SECTOR_BYTES)))
    }
    /// A flush.
    pub fn flush() -> Self {
        Self { op: Op::Flush, range: SectorRange::default(), bufs: IoVec::new(), fua: false }
    }
}

/// The answer to a [`Request`]: the result, and the request's buffers.
#[derive(Debug)]
pub struct Response {
    /// Success or the error. After a failed write each sector of the range holds either its old or its new bytes.
    pub result: Result<(), Errno>,
    /// The buffers of the request, in order; their contents after a failed read are unspecified.
    pub bufs: IoVec,
}
