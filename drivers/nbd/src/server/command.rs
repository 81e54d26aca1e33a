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
    pub(super) range: SectorRange,
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
        let job = Self { cookie: header.cookie.get(), kind, range: SectorRange::default(), fua };
        if kind == Kind::Op(Op::Flush) {
            return Ok(job);
        }
        if writes && read_only {
            return Err(Refusal(error::EPERM, "the export is read-only"));
        }
        let sector_bytes = SECTOR_BYTES as u32;
        if !header.offset.get().is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(sector_bytes) || len == 0
        {
            return invalid("the request does not consist of sectors of 512 bytes");
        }
        if matches!(kind, Kind::Op(op) if op.has_data()) && len > request_bytes {
            return invalid("the request is larger than the maximum block size");
        }
        let range = SectorRange::new(header.offset.get() / SECTOR_BYTES, len / sector_bytes);
        if !range.fits(export.size_sectors()) {
            let error = if writes { error::ENOSPC } else { error::EINVAL };
            return Err(Refusal(error, "the request extends past the end of the export"));
        }
        Ok(Self { range, ..job })
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

/// Most extents in one reply.
const EXTENTS_MAX: usize = 1024;
/// Sectors of one query to a node: bounds the list that it makes.
const STATUS_SECTORS: u64 = (64 << 20) / SECTOR_BYTES;

/// Extents of one query to a node, and queries for one reply: a reply may be short, so that no other request waits
/// long.
const EXTENTS_AT_ONCE: usize = 128;
const LOOKS_MAX: usize = 32;

/// The extents of `range`, or of a part from its start on: at most one if `one`. Other tasks have their turn in
/// between.
pub(super) async fn extents<H: Tasks + Probe>(
    host: &H,
    node: &dyn Node,
    range: SectorRange,
    one: bool,
) -> Result<Vec<StatusExtent>, Errno> {
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
        let asked_end = end.min(at + STATUS_SECTORS);
        let before = at;
        let asked = SectorRange::new(at, (asked_end - at) as u32);
        // A client that wants one extent mostly gets it from the first two.
        let ask = if one && looks == 1 { 2 } else { EXTENTS_AT_ONCE };
        for extent in node.extents(asked, ask).await? {
            let hole = if extent.allocated || host.bug(&NBD_STATUS_SOLID) { 0 } else { STATE_HOLE };
            let state = hole | if extent.zero { STATE_ZERO } else { 0 };
            let len = (extent.count * SECTOR_BYTES) as u32;
            match found.last_mut() {
                Some(last) if last.state.get() == state => last.len += len,
                _ => found.push(StatusExtent { len: len.into(), state: state.into() }),
            }
            at += extent.count;
        }
        assert!(at <= asked_end, "a node reports no more sectors than it is asked about");
        if at == before {
            return Err(Errno::EIO);
        }
    }
    found.truncate(most);
    Ok(found)
}
