//! The ring of a blktap2 device, and the structures of its ioctls: how Linux hands the requests of a block device of
//! dom0 to a process.
//!
//! ```text
//!   request, 112 bytes                              response, 16 bytes
//!   0  op u8: 0 read, 1 write, 2 flush, 3 trim      0  id u64: that of the request
//!   1  nr_segments u8, 0..=11                       8  op u8: that of the request
//!   8  id u64: a slot, 0..=31                      10  status i16: 0, anything else is an error
//!   16 sector u64
//!   24 segments [11]: unused u32, first u8, last u8, padding u16     (a trim: sectors u64)
//!
//!   mapping, 353 pages: the ring's page, then 11 pages of data for each of the 32 slots
//! ```
//!
//! The page has the header of every [ring], with a byte for messages of the kernel at
//! [`MESSAGE`]. The kernel chooses the id, and trusts the one in a response: some modules stop the machine if it is
//! not that of a request in flight. Numbers are in the byte order of the machine; all machines that have such modules
//! are little-endian.
//!
//! Follows the sources of the modules: Xen's kernels of 2009, blktap-dkms, XenServer's 4.19, OpenXT's 6.1.
//! [docs/protocol/blktap2.md](../../../docs/protocol/blktap2.md) says what differs between them.

use crate::blkif::{
    ENTRY_BYTES, MAX_SEGMENTS, RawRequest, RawResponse, RingLayout, SECTORS_PER_PAGE, Segment,
};
use crate::ring;
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The ring's layout, which is that of a blkif ring of one page.
pub const LAYOUT: RingLayout = RingLayout::X86_64;
/// Requests that can be in flight; each has a slot, which is its id.
pub const SLOTS: u8 = 32;
/// Pages of the mapping: the ring, and the data of every slot.
pub const MAPPED_PAGES: usize = 1 + SLOTS as usize * MAX_SEGMENTS;
/// Byte offset in the ring's page of the byte with a message of the kernel.
pub const MESSAGE: usize = 16;
/// The kernel asks the process to close the device.
pub const MESSAGE_CLOSE: u8 = 3;

/// Read sectors.
pub const OP_READ: u8 = 0;
/// Write sectors.
pub const OP_WRITE: u8 = 1;
/// Make completed writes durable.
pub const OP_FLUSH: u8 = 2;
/// Forget sectors.
pub const OP_TRIM: u8 = 3;

/// Carried out.
pub const STATUS_OKAY: i16 = 0;
/// Failed.
pub const STATUS_ERROR: i16 = -1;

/// Reserve a device, on the control node: fills an [`AllocatedTap`].
pub const IOCTL_ALLOC_TAP: u32 = 200;
/// Free the device whose minor is the argument, on the control node.
pub const IOCTL_FREE_TAP: u32 = 201;
/// Look at the responses, on the ring; no argument.
pub const IOCTL_RESPOND: u32 = 1;
/// Remove the block device, on the ring; no argument.
pub const IOCTL_REMOVE_DEVICE: u32 = 207;
/// Make the block device, on the ring: a [`DeviceParams`].
pub const IOCTL_CREATE_DEVICE: u32 = 208;

/// The device cannot be written.
pub const FLAG_READ_ONLY: u64 = 1;
/// The physical block size is stated.
pub const FLAG_PHYSICAL_SIZE: u64 = 2;
/// Flushes are carried out: the device has a volatile cache.
pub const FLAG_FLUSH: u64 = 4;
/// Trims are carried out.
pub const FLAG_TRIM: u64 = 8;
/// Trimmed sectors read as zeros: known to blktap-dkms and its forerunners, and to no other module.
pub const FLAG_TRIM_ZEROES: u64 = 16;
/// A flag that no module knows: one that says which flags it knows clears it.
pub const FLAG_UNKNOWN: u64 = 1 << 31;

/// What a reserved device is called: the answer of [`IOCTL_ALLOC_TAP`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AllocatedTap {
    /// Major number of the character devices.
    pub ring_major: U32,
    /// Major number of the block devices.
    pub block_major: U32,
    /// Minor number of both.
    pub minor: U32,
}

impl AllocatedTap {
    /// The structure from its bytes.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        zerocopy::transmute!(*bytes)
    }
}

/// The argument of [`IOCTL_CREATE_DEVICE`], in a form that is right in both of its layouts: what one of them has in a
/// place is 0, unused or the same in the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceParams {
    /// Size in logical blocks.
    pub capacity: U64,
    /// Bytes of a logical block.
    pub sector_bytes: U32,
    /// Bytes of a physical block, where XenServer's module reads it.
    pub physical_bytes: U32,
    /// `FLAG_*`. All modules but XenServer's write back those that they know.
    pub flags: U64,
    /// Bytes of a physical block, where the others read it.
    pub physical_bytes_too: U32,
    /// Where physical blocks start.
    pub physical_offset: U32,
    /// Bytes of the smallest trim.
    pub trim_bytes: U32,
    /// Where such blocks start.
    pub trim_offset: U32,
    /// Unused.
    pub reserved: [U64; 2],
}

/// A trim as it lies in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawTrim {
    op: u8,
    nr_segments: u8,
    padding: [u8; 6],
    id: U64,
    sector: U64,
    count: U64,
    rest: [u8; 80],
}

const _: () = {
    assert!(size_of::<AllocatedTap>() == 12);
    assert!(size_of::<DeviceParams>() == 56);
    assert!(offset_of!(DeviceParams, sector_bytes) == 8);
    assert!(offset_of!(DeviceParams, physical_bytes) == 12);
    assert!(offset_of!(DeviceParams, flags) == 16);
    assert!(offset_of!(DeviceParams, physical_bytes_too) == 24);
    assert!(offset_of!(DeviceParams, trim_bytes) == 32);
    assert!(size_of::<RawTrim>() == ENTRY_BYTES && size_of::<RawRequest>() == ENTRY_BYTES);
    assert!(offset_of!(RawTrim, id) == 8 && offset_of!(RawTrim, count) == 24);
    assert!(MAPPED_PAGES == 353 && LAYOUT.entries == SLOTS as u32);
    assert!(MESSAGE >= 16 && MESSAGE < ring::HEADER_BYTES);
};

impl DeviceParams {
    /// A device of `size_sectors` sectors of 512 bytes, in logical blocks of 512 bytes and physical ones of
    /// `physical_bytes`. It takes flushes and trims, if the module knows those.
    pub fn new(size_sectors: u64, physical_bytes: u32, read_only: bool) -> Self {
        let read_only = if read_only { FLAG_READ_ONLY } else { 0 };
        let flags = FLAG_PHYSICAL_SIZE | FLAG_FLUSH | FLAG_TRIM | FLAG_UNKNOWN | read_only;
        Self {
            capacity: size_sectors.into(),
            sector_bytes: U32::new(512),
            physical_bytes: physical_bytes.into(),
            flags: flags.into(),
            physical_bytes_too: physical_bytes.into(),
            trim_bytes: physical_bytes.into(),
            ..Self::new_zeroed()
        }
    }

    /// A question: no module makes a device without a size, but one that says which flags it knows has said so by then.
    pub fn question() -> Self {
        Self { flags: U64::new(FLAG_TRIM_ZEROES | FLAG_UNKNOWN), ..Self::new(0, 512, false) }
    }

    /// Whether the module takes the pages of an answered request out of the process's memory, from what is here after a
    /// [question](DeviceParams::question). Each that does so knows [`FLAG_TRIM_ZEROES`].
    pub fn says_it_unmaps(&self) -> bool {
        self.known_flags() & FLAG_TRIM_ZEROES != 0
    }

    /// The structure from its bytes.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        zerocopy::transmute!(*bytes)
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        zerocopy::transmute!(self)
    }

    /// The flags that the module has said it knows, from what is here after the call; none from a module that says
    /// nothing.
    pub fn known_flags(&self) -> u64 {
        let flags = self.flags.get();
        if flags & FLAG_UNKNOWN == 0 { flags } else { 0 }
    }
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum TapOp {
    /// [`OP_READ`].
    Read = OP_READ,
    /// [`OP_WRITE`].
    Write = OP_WRITE,
    /// [`OP_FLUSH`].
    Flush = OP_FLUSH,
    /// [`OP_TRIM`].
    Trim = OP_TRIM,
}

/// A request that obeys the protocol. Whether it fits the disk is not checked here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TapRequest {
    /// Its slot, below [`SLOTS`].
    pub slot: u8,
    /// What to do.
    pub op: TapOp,
    /// First sector.
    pub sector: u64,
    /// Sectors: those of all segments, or of the trim; 0 for a flush.
    pub count: u32,
    segments: [Segment; MAX_SEGMENTS],
    nr_segments: u8,
}

/// Why a request cannot be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TapMalformed {
    /// Its id is that of no slot: nothing may be answered.
    NoSlot,
    /// It has to be answered with an error.
    Answer {
        /// Its slot, below [`SLOTS`].
        slot: u8,
        /// Its operation, known or not.
        op: u8,
        /// What is wrong.
        why: &'static str,
    },
}

impl TapRequest {
    /// Parses a private copy of a ring entry.
    ///
    /// # Errors
    /// [`TapMalformed`] for a slot above 31, an unknown operation, a number of segments that the operation cannot have,
    /// a segment that does not lie in its page, or a trim of no sector or more than 2^32 - 1.
    pub fn parse(entry: &[u8; ENTRY_BYTES]) -> Result<Self, TapMalformed> {
        let raw: RawRequest = zerocopy::transmute!(*entry);
        let slot = match u8::try_from(raw.id.get()) {
            Ok(slot) if slot < SLOTS => slot,
            _ => return Err(TapMalformed::NoSlot),
        };
        let bad = |why| TapMalformed::Answer { slot, op: raw.op, why };
        let op = match raw.op {
            OP_READ => TapOp::Read,
            OP_WRITE => TapOp::Write,
            OP_FLUSH => TapOp::Flush,
            OP_TRIM => TapOp::Trim,
            _ => return Err(bad("unknown operation")),
        };
        let segments = [Segment::default(); MAX_SEGMENTS];
        let mut request =
            Self { slot, op, sector: raw.sector.get(), count: 0, segments, nr_segments: raw.nr_segments };
        match op {
            TapOp::Read | TapOp::Write => request.read_segments(&raw).map_err(bad)?,
            _ if raw.nr_segments > 0 => return Err(bad("segments of a request without data")),
            TapOp::Flush => request.sector = 0,
            TapOp::Trim => {
                let raw: RawTrim = zerocopy::transmute!(*entry);
                let count = u32::try_from(raw.count.get()).ok().filter(|count| *count > 0);
                request.count = count.ok_or(bad("a trim of no sector, or of too many"))?;
            }
        }
        Ok(request)
    }

    fn read_segments(&mut self, raw: &RawRequest) -> Result<(), &'static str> {
        let count = usize::from(raw.nr_segments);
        if !(1..=MAX_SEGMENTS).contains(&count) {
            return Err("not 1 to 11 segments");
        }
        for (own, raw) in self.segments.iter_mut().zip(&raw.segments[..count]) {
            if raw.first > raw.last {
                return Err("a segment ends before it starts");
            }
            if raw.last >= SECTORS_PER_PAGE {
                return Err("a segment reaches past its page");
            }
            *own = Segment { gref: 0, first: raw.first, last: raw.last };
            self.count += u32::from(own.count());
        }
        Ok(())
    }

    /// Where in the slot's pages the data is, a segment for each page from the first on; none for a flush or a trim.
    pub fn segments(&self) -> &[Segment] {
        &self.segments[..usize::from(self.nr_segments)]
    }
}

/// The entry of a read or write of `segments` (first and last sector in each page), as the kernel makes it.
pub fn encode_data(slot: u8, op: u8, sector: u64, segments: &[(u8, u8)]) -> [u8; ENTRY_BYTES] {
    let mut raw = RawRequest::new_zeroed();
    raw.op = op;
    raw.nr_segments = segments.len() as u8;
    raw.id = u64::from(slot).into();
    raw.sector = sector.into();
    for (raw, (first, last)) in raw.segments.iter_mut().zip(segments) {
        raw.first = *first;
        raw.last = *last;
        raw.padding = U16::ZERO;
    }
    zerocopy::transmute!(raw)
}

/// The entry of a flush, or of a trim of `count` sectors, as the kernel makes it.
pub fn encode_dataless(slot: u8, op: u8, sector: u64, count: u64) -> [u8; ENTRY_BYTES] {
    let mut raw = RawTrim::new_zeroed();
    raw.op = op;
    raw.id = u64::from(slot).into();
    raw.sector = sector.into();
    raw.count = count.into();
    zerocopy::transmute!(raw)
}

/// A response as the kernel reads it.
pub fn decode_response(bytes: &[u8; crate::blkif::RESPONSE_BYTES]) -> RawResponse {
    zerocopy::transmute!(*bytes)
}

#[cfg(test)]
#[path = "blktap_tests.rs"]
mod tests;
