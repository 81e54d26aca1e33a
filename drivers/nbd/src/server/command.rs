//! What a request asks for, and whether it is allowed.

use super::Export;
use tap_abi::nbd::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, ExtendedRequest,
    command, error,
};
use tap_core::{Op, ZeroFlags};
use tap_host::{Errno, PAGE_BYTES, SECTOR_BYTES, SectorRange};

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// An operation of the node.
    Op(Op),
    /// The same on so many bytes that it is divided: see [`Job::pieces`].
    Long(Op, u64),
    /// Nothing.
    Cache,
    /// Extents; only the first, or all that fit.
    Status { one: bool },
}

/// A request that was checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Job {
    pub(super) cookie: u64,
    /// The first byte that the client named.
    pub(super) at: u64,
    pub(super) kind: Kind,
    /// The sectors of which it concerns at least a byte; none if there is nothing to do.
    pub(super) range: SectorRange,
    /// Bytes of the first sector before the request.
    pub(super) skip: u32,
    /// Bytes of the last sector after it.
    pub(super) cut: u32,
    /// Durable when answered.
    pub(super) fua: bool,
}

/// Why a request is refused: the protocol's error number, and a sentence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Refusal(pub(super) u32, pub(super) &'static str);

const KNOWN_FLAGS: u16 =
    command::FUA | command::NO_HOLE | command::DF | command::REQ_ONE | command::FAST_ZERO;

/// What requests of a connection are checked against.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    pub(super) export: &'a Export,
    /// Changes are refused.
    pub(super) read_only: bool,
    /// Most bytes of a read or write.
    pub(super) request_bytes: u32,
    /// Most bytes of another change that is not divided.
    pub(super) range_bytes: u64,
    /// Block status was agreed on.
    pub(super) status: bool,
    /// Headers are extended.
    pub(super) extended: bool,
}

impl Rules<'_> {
    /// What a request asks for.
    fn kind(&self, command: u16, flags: u16) -> Result<Kind, Refusal> {
        let invalid = |why| Err(Refusal(error::EINVAL, why));
        // A write has its payload anyway.
        let payload = if self.extended { command::PAYLOAD_LEN } else { 0 };
        if flags & !(KNOWN_FLAGS | payload) != 0 {
            return invalid("the request has unknown flags");
        }
        if flags & payload != 0 && command != CMD_WRITE {
            return invalid("the request has a payload that it does not need");
        }
        Ok(match command {
            CMD_READ => Kind::Op(Op::Read),
            CMD_WRITE => Kind::Op(Op::Write),
            CMD_FLUSH => Kind::Op(Op::Flush),
            CMD_TRIM => Kind::Op(Op::Discard),
            CMD_CACHE => Kind::Cache,
            CMD_WRITE_ZEROES => Kind::Op(Op::WriteZeroes(ZeroFlags {
                unmap: flags & command::NO_HOLE == 0,
                fast: flags & command::FAST_ZERO != 0,
            })),
            CMD_BLOCK_STATUS if self.status => Kind::Status { one: flags & command::REQ_ONE != 0 },
            CMD_BLOCK_STATUS => return invalid("block status was not agreed on"),
            _ => return invalid("the command is unknown"),
        })
    }
}

impl Job {
    /// Checks a request.
    pub(super) fn check(header: &ExtendedRequest, rules: &Rules<'_>) -> Result<Self, Refusal> {
        let invalid = |why| Err(Refusal(error::EINVAL, why));
        let (flags, offset, len) = (header.flags.get(), header.offset.get(), header.len.get());
        let kind = rules.kind(header.command.get(), flags)?;
        let writes = matches!(kind, Kind::Op(op) if op.is_write());
        let fua = writes && flags & command::FUA != 0;
        let range = SectorRange::default();
        let job = Self { cookie: header.cookie.get(), at: offset, kind, range, skip: 0, cut: 0, fua };
        if kind == Kind::Op(Op::Flush) {
            return Ok(job);
        }
        if writes && rules.read_only {
            return Err(Refusal(error::EPERM, "the export is read-only"));
        }
        if matches!(kind, Kind::Op(op) if op.has_data()) && len > u64::from(rules.request_bytes) {
            return invalid("the request is larger than the maximum block size");
        }
        let size_bytes = rules.export.size_sectors() * SECTOR_BYTES;
        if offset > size_bytes || len > size_bytes - offset {
            // As QEMU does: without a byte there is no lack of space.
            let error = if writes && len > 0 { error::ENOSPC } else { error::EINVAL };
            return Err(Refusal(error, "the request extends past the end of the export"));
        }
        match kind {
            Kind::Status { .. } if len == 0 => invalid("the request asks for the status of no bytes"),
            // A reply may be short. Without extended headers the lengths of extents are sums in 32 bits.
            Kind::Status { .. } if rules.extended => Ok(job.around(offset, len.min(LONG_STATUS_BYTES_MAX))),
            Kind::Status { .. } => Ok(job.around(offset, len.min(STATUS_BYTES_MAX))),
            Kind::Cache => Ok(job),
            Kind::Op(op) if len > rules.range_bytes && !op.has_data() => {
                Ok(Self { kind: Kind::Long(op, len), ..job })
            }
            Kind::Op(Op::Discard) => Ok(job.within(offset, len)),
            _ => Ok(job.around(offset, len)),
        }
    }

    /// The pieces of a request on `len` bytes, at most `range_bytes` each, and divided between sectors.
    pub(super) fn pieces(self, op: Op, len: u64, range_bytes: u64) -> impl Iterator<Item = Self> {
        let (mut at, end) = (self.at, self.at + len);
        std::iter::from_fn(move || {
            let from = at;
            at = end.min((from + range_bytes) / SECTOR_BYTES * SECTOR_BYTES);
            let piece = Self { kind: Kind::Op(op), ..self };
            (from < end).then(|| match op {
                Op::Discard => piece.within(from, at - from),
                _ => piece.around(from, at - from),
            })
        })
    }

    /// With the sectors that contain the bytes.
    fn around(self, offset: u64, len: u64) -> Self {
        if len == 0 {
            return self;
        }
        let (start, end) = (offset / SECTOR_BYTES, (offset + len).div_ceil(SECTOR_BYTES));
        let skip = (offset - start * SECTOR_BYTES) as u32;
        let cut = (end * SECTOR_BYTES - offset - len) as u32;
        // Less than 2^32 sectors: longer requests were divided or cut.
        Self { range: SectorRange::new(start, (end - start) as u32), skip, cut, ..self }
    }

    /// With the sectors that consist of these bytes alone: a trim promises nothing about the rest.
    fn within(self, offset: u64, len: u64) -> Self {
        let (start, end) = (offset.div_ceil(SECTOR_BYTES), (offset + len) / SECTOR_BYTES);
        if start >= end {
            return self;
        }
        Self { range: SectorRange::new(start, (end - start) as u32), ..self }
    }

    /// Whether it begins and ends between sectors.
    pub(super) fn is_aligned(&self) -> bool {
        self.skip == 0 && self.cut == 0
    }

    /// Its bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        self.range.len_bytes() - u64::from(self.skip) - u64::from(self.cut)
    }
}

/// The protocol's number for an error of a node. It has few; all others become input/output errors.
pub(super) fn error_of(errno: Errno) -> u32 {
    match errno {
        Errno::EPERM | Errno::EROFS | Errno::EACCES => error::EPERM,
        Errno::ENOMEM => error::ENOMEM,
        Errno::EINVAL => error::EINVAL,
        Errno::ENOSPC | Errno::EFBIG => error::ENOSPC,
        Errno::EOVERFLOW => error::EOVERFLOW,
        Errno::EOPNOTSUPP => error::ENOTSUP,
        Errno::ESHUTDOWN => error::ESHUTDOWN,
        _ => error::EIO,
    }
}

/// Most bytes that one block status is about.
const STATUS_BYTES_MAX: u64 = (1 << 32) - PAGE_BYTES as u64;
/// The same with extended headers: what one range of sectors holds.
const LONG_STATUS_BYTES_MAX: u64 = (u32::MAX as u64 - 2) * SECTOR_BYTES;
