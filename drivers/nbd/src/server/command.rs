//! What a request asks for, and whether it is allowed.

use super::Export;
use tap_abi::nbd::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, RequestHeader,
    STATE_HOLE, STATE_ZERO, StatusExtent, command, error,
};
use tap_core::{Node, Op, ZeroFlags};
use tap_host::{Errno, Probe, SECTOR_BYTES, SectorRange, Tasks};

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_STATUS_SOLID = "nbd-status-solid", "a server reports holes as data";
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// An operation of the node.
    Op(Op),
    /// Nothing.
    Cache,
    /// Extents; only the first, or all that fit.
    Status { one: bool },
}

/// A request that was checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Job {
    pub(super) cookie: u64,
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

impl Job {
    /// Checks a request against the export, which may be `read_only`. `request_bytes` is the maximum of a read or
    /// write, `status` says whether block status was negotiated.
    pub(super) fn check(
        header: &RequestHeader,
        export: &Export,
        read_only: bool,
        request_bytes: u32,
        status: bool,
    ) -> Result<Self, Refusal> {
        let invalid = |why| Err(Refusal(error::EINVAL, why));
        let (flags, command, len) = (header.flags.get(), header.command.get(), header.len.get());
        if flags & !KNOWN_FLAGS != 0 {
            return invalid("the request has unknown flags");
        }
        let kind = match command {
            CMD_READ => Kind::Op(Op::Read),
            CMD_WRITE => Kind::Op(Op::Write),
            CMD_FLUSH => Kind::Op(Op::Flush),
            CMD_TRIM => Kind::Op(Op::Discard),
            CMD_CACHE => Kind::Cache,
            CMD_WRITE_ZEROES => Kind::Op(Op::WriteZeroes(ZeroFlags {
                unmap: flags & command::NO_HOLE == 0,
                fast: flags & command::FAST_ZERO != 0,
            })),
            CMD_BLOCK_STATUS if status => Kind::Status { one: flags & command::REQ_ONE != 0 },
            CMD_BLOCK_STATUS => return invalid("block status was not agreed on"),
            _ => return invalid("the command is unknown"),
        };
        let writes = matches!(kind, Kind::Op(op) if op.is_write());
        let fua = writes && flags & command::FUA != 0;
        let range = SectorRange::default();
        let job = Self { cookie: header.cookie.get(), kind, range, skip: 0, cut: 0, fua };
        if kind == Kind::Op(Op::Flush) {
            return Ok(job);
        }
        if writes && read_only {
            return Err(Refusal(error::EPERM, "the export is read-only"));
        }
        if matches!(kind, Kind::Op(op) if op.has_data()) && len > request_bytes {
            return invalid("the request is larger than the maximum block size");
        }
        let (offset, size_bytes) = (header.offset.get(), export.size_sectors() * SECTOR_BYTES);
        if offset > size_bytes || u64::from(len) > size_bytes - offset {
            // As QEMU does: without a byte there is no lack of space.
            let error = if writes && len > 0 { error::ENOSPC } else { error::EINVAL };
            return Err(Refusal(error, "the request extends past the end of the export"));
        }
        match kind {
            Kind::Status { .. } if len == 0 => invalid("the request asks for the status of no bytes"),
            // The lengths of extents are sums in 32 bits, and a reply may be short.
            Kind::Status { .. } => Ok(job.around(offset, len.min(STATUS_BYTES_MAX))),
            Kind::Op(Op::Discard) => Ok(job.within(offset, len)),
            _ => Ok(job.around(offset, len)),
        }
    }

    /// With the sectors that contain the bytes.
    fn around(self, offset: u64, len: u32) -> Self {
        if len == 0 {
            return self;
        }
        let (start, end) = (offset / SECTOR_BYTES, (offset + u64::from(len)).div_ceil(SECTOR_BYTES));
        let skip = (offset - start * SECTOR_BYTES) as u32;
        let cut = (end * SECTOR_BYTES - offset - u64::from(len)) as u32;
        // At most 2^23 + 1 sectors.
        Self { range: SectorRange::new(start, (end - start) as u32), skip, cut, ..self }
    }

    /// With the sectors that consist of these bytes alone: a trim promises nothing about the rest.
    fn within(self, offset: u64, len: u32) -> Self {
        let (start, end) = (offset.div_ceil(SECTOR_BYTES), (offset + u64::from(len)) / SECTOR_BYTES);
        if start >= end {
            return self;
        }
        Self { range: SectorRange::new(start, (end - start) as u32), ..self }
    }

    /// Whether it begins and ends between sectors.
    pub(super) fn is_aligned(&self) -> bool {
        self.skip == 0 && self.cut == 0
    }

    /// Its first byte.
    pub(super) fn offset(&self) -> u64 {
        self.range.start.0 * SECTOR_BYTES + u64::from(self.skip)
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
const STATUS_BYTES_MAX: u32 = u32::MAX - 2 * SECTOR_BYTES as u32;
/// Most extents in one reply, and of one query to a node.
const EXTENTS_MAX: usize = 1024;
/// Queries for one reply: a reply may be short, so that no other request waits long.
const LOOKS_MAX: usize = 32;

/// The extents of `job`, or of a part from its start on: at most one if `one`. Other tasks have their turn in between.
pub(super) async fn extents<H: Tasks + Probe>(
    host: &H,
    node: &dyn Node,
    job: &Job,
    one: bool,
) -> Result<Vec<StatusExtent>, Errno> {
    let range = job.range;
    let most = if one { 1 } else { EXTENTS_MAX };
    let mut found: Vec<StatusExtent> = Vec::new();
    let (mut at, end) = (range.start.0, range.start.0 + u64::from(range.count));
    let mut looks = 0;
    // One more than is sent, so that the last one sent is complete, unless the query ends early.
    while at < end && found.len() <= most && looks < LOOKS_MAX {
        if looks > 0 {
            host.yield_now().await;
        }
        looks += 1;
        let before = at;
        let asked = SectorRange::new(at, (end - at) as u32);
        // A client that wants one extent mostly gets it from the first two.
        let ask = if one && looks == 1 { 2 } else { EXTENTS_MAX };
        for extent in node.extents(asked, ask).await? {
            let hole = if extent.allocated || host.bug(&NBD_STATUS_SOLID) { 0 } else { STATE_HOLE };
            let state = hole | if extent.zero { STATE_ZERO } else { 0 };
            // Only the bytes that were asked for.
            let before = if at == range.start.0 { u64::from(job.skip) } else { 0 };
            let after = if at + extent.count == end { u64::from(job.cut) } else { 0 };
            let len = (extent.count * SECTOR_BYTES - before - after) as u32;
            match found.last_mut() {
                Some(last) if last.state.get() == state => last.len += len,
                _ => found.push(StatusExtent { len: len.into(), state: state.into() }),
            }
            at += extent.count;
        }
        assert!(at <= end, "a node reports no more sectors than it is asked about");
        if at == before {
            return Err(Errno::EIO);
        }
    }
    found.truncate(most);
    Ok(found)
}
