//! Requests and responses.

use tap_host::{Errno, IoVec, SectorRange, bytes_of};

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Fill the buffers from the range.
    Read,
    /// Store the buffers in the range.
    Write,
    /// Make every request that was answered before durable. Range and buffers are empty.
    Flush,
}

/// One request to a [`crate::Node`].
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Where, in sectors of 512 bytes; within the disk, and not empty for reads and writes.
    pub range: SectorRange,
    /// Memory of exactly the range's length.
    pub bufs: IoVec,
}

impl Request {
    /// A read into `bufs`.
    pub fn read(range: SectorRange, bufs: IoVec) -> Self {
        debug_assert_eq!(bytes_of(&bufs) as u64, range.len_bytes());
        Self { op: Op::Read, range, bufs }
    }
    /// A write of `bufs`.
    pub fn write(range: SectorRange, bufs: IoVec) -> Self {
        debug_assert_eq!(bytes_of(&bufs) as u64, range.len_bytes());
        Self { op: Op::Write, range, bufs }
    }
    /// A flush.
    pub fn flush() -> Self {
        Self { op: Op::Flush, range: SectorRange::default(), bufs: IoVec::new() }
    }
}

/// The answer to a [`Request`]: the result, and the request's buffers.
#[derive(Debug)]
pub struct Response {
    /// How it went. After an error of a write each sector of the range holds either its old or its new bytes.
    pub result: Result<(), Errno>,
    /// The buffers of the request, in order; what they hold after an error of a read is unspecified.
    pub bufs: IoVec,
}
