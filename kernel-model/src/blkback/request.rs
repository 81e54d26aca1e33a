//! The bytes of a request, as xen-blkback understands them.

use tap_abi::blkif::{
    ENTRY_BYTES, MAX_SEGMENTS, OP_FLUSH_DISKCACHE, OP_INDIRECT, OP_READ, OP_WRITE, OP_WRITE_BARRIER,
};
use tap_host::{GrantRef, IoKind, PAGE_BYTES, SECTOR_BYTES};

/// Most segments of an indirect request.
const MAX_INDIRECT_SEGMENTS: usize = 256;
/// Bytes of a segment, in a request or in an indirect page.
const SEGMENT_BYTES: usize = 8;
/// Segments in an indirect page.
pub(super) const SEGMENTS_PER_PAGE: usize = PAGE_BYTES / SEGMENT_BYTES;
const SECTORS_PER_PAGE: u8 = 8;

/// A run of sectors in a granted page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) gref: GrantRef,
    /// First byte in the page.
    pub(super) offset: usize,
    pub(super) len_bytes: usize,
}

/// A request with data, or a flush.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Request {
    /// The operation that its answer names.
    pub(super) op: u8,
    pub(super) sector: u64,
    pub(super) pieces: Vec<Piece>,
}

impl Request {
    /// A read or a write; a flush is a write, perhaps of nothing.
    pub(super) fn kind(&self) -> IoKind {
        if self.op == OP_READ { IoKind::Read } else { IoKind::Write }
    }

    /// Everything that was answered before is made durable first.
    pub(super) fn flushes(&self) -> bool {
        matches!(self.op, OP_FLUSH_DISKCACHE | OP_WRITE_BARRIER)
    }

    pub(super) fn len_bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len_bytes).sum()
    }

    pub(super) fn sectors(&self) -> u32 {
        (self.len_bytes() as u64 / SECTOR_BYTES) as u32
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

/// The segments in `bytes`; `None` if one does not lie in its page.
fn pieces(bytes: &[u8], count: usize) -> Option<Vec<Piece>> {
    let piece = |segment: &[u8]| {
        let (first, last) = (segment[4], segment[5]);
        (first <= last && last < SECTORS_PER_PAGE).then(|| Piece {
            gref: GrantRef(u32_at(segment, 0)),
            offset: usize::from(first) * SECTOR_BYTES as usize,
            len_bytes: usize::from(last - first + 1) * SECTOR_BYTES as usize,
        })
    };
    bytes.chunks_exact(SEGMENT_BYTES).take(count).map(piece).collect()
}

/// The request in `entry`, whose operation has data; `load` copies the segments out of an indirect page.
///
/// # Errors
/// The operation that the answer names, for a request that breaks the protocol.
pub(super) fn parse(
    entry: &[u8; ENTRY_BYTES],
    load: impl Fn(GrantRef) -> Option<Vec<u8>>,
) -> Result<Request, u8> {
    let indirect = entry[0] == OP_INDIRECT;
    let op = if indirect { entry[1] } else { entry[0] };
    let request = |pieces: Option<Vec<Piece>>| {
        pieces.map(|pieces| Request { op, sector: u64_at(entry, 16), pieces }).ok_or(op)
    };
    if indirect {
        let count = usize::from(u16::from_le_bytes(array(entry, 2)));
        if ![OP_READ, OP_WRITE].contains(&op) || count == 0 || count > MAX_INDIRECT_SEGMENTS {
            return Err(op);
        }
        let grants = (0..count.div_ceil(SEGMENTS_PER_PAGE)).map(|i| GrantRef(u32_at(entry, 28 + 4 * i)));
        let pages: Option<Vec<Vec<u8>>> = grants.map(load).collect();
        return request(pages.and_then(|pages| pieces(&pages.concat(), count)));
    }
    let count = usize::from(entry[1]);
    let may_be_empty = [OP_FLUSH_DISKCACHE, OP_WRITE_BARRIER].contains(&op);
    if count > MAX_SEGMENTS || count == 0 && !may_be_empty {
        return Err(op);
    }
    request(pieces(&entry[24..], count))
}
