//! The bytes of replies, in the form that was agreed on.
//!
//! ```text
//!   simple       SimpleReply 16 (+ data of a read)
//!   structured   SimpleReply 16 without data, or ChunkHeader 20 + payload
//!   extended     ExtendedChunk 32 + payload
//! ```
//!
//! Each reply is one chunk, but for the status of several contexts, which has one for each.

use super::command::{Job, Refusal};
use tap_abi::nbd::{
    CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CHUNK_ERROR, CHUNK_NONE, CHUNK_OFFSET_DATA,
    CHUNK_OFFSET_HOLE, ChunkHeader, ErrorHead, ExtendedChunk, LongExtent, OffsetData, OffsetHole,
    SimpleReply, StatusExtent, StatusHead,
};
use tap_host::{IoBuf, IoVec, SECTOR_BYTES, SendList};
use zerocopy::IntoBytes;

/// The form of replies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    Simple,
    Structured,
    Extended,
}

/// Whose reply it is, and its form.
#[derive(Clone, Copy)]
pub(super) struct To {
    pub(super) cookie: u64,
    /// The first byte of the request.
    pub(super) at: u64,
    pub(super) form: Form,
}

impl To {
    /// The header of the one chunk; `len` bytes follow. Never in the simple form.
    fn chunk(self, list: &mut SendList, kind: u16, len: usize) {
        self.chunk_of(list, kind, true, len);
    }

    /// The header of a chunk, the last one if `done`.
    fn chunk_of(self, list: &mut SendList, kind: u16, done: bool, len: usize) {
        match self.form {
            Form::Extended => {
                list.push_bytes(ExtendedChunk::new(self.cookie, self.at, kind, done, len as u64).as_bytes());
            }
            // Bounded by the size of requests and replies, far below 2^32.
            _ => list.push_bytes(ChunkHeader::new(self.cookie, kind, done, len as u32).as_bytes()),
        }
    }

    /// Success without data.
    pub(super) fn done(self, list: &mut SendList) {
        match self.form {
            Form::Extended => self.chunk(list, CHUNK_NONE, 0),
            _ => list.push_bytes(SimpleReply::new(self.cookie, 0).as_bytes()),
        }
    }

    /// Success of a read of no bytes.
    pub(super) fn nothing(self, list: &mut SendList) {
        match self.form {
            Form::Simple => self.done(list),
            _ => self.chunk(list, CHUNK_NONE, 0),
        }
    }

    pub(super) fn error(self, list: &mut SendList, Refusal(error, why): Refusal) {
        if self.form == Form::Simple {
            list.push_bytes(SimpleReply::new(self.cookie, error).as_bytes());
            return;
        }
        self.chunk(list, CHUNK_ERROR, ErrorHead::BYTES + why.len());
        let head = ErrorHead { error: error.into(), message_len: (why.len() as u16).into() };
        list.push_bytes(head.as_bytes());
        list.push_bytes(why.as_bytes());
    }

    /// The data of a read that is all zeros. Never in the simple form.
    pub(super) fn hole(self, list: &mut SendList, job: &Job) {
        self.chunk(list, CHUNK_OFFSET_HOLE, OffsetHole::BYTES);
        // A read is far below 2^32 bytes.
        let hole = OffsetHole { offset: job.at.into(), len: (job.len_bytes() as u32).into() };
        list.push_bytes(hole.as_bytes());
    }

    /// The data of a read.
    pub(super) fn data(self, list: &mut SendList, job: &Job, bufs: IoVec) {
        if self.form == Form::Simple {
            list.push_bytes(SimpleReply::new(self.cookie, 0).as_bytes());
        } else {
            self.chunk(list, CHUNK_OFFSET_DATA, OffsetData::BYTES + job.len_bytes() as usize);
            list.push_bytes(&job.at.to_be_bytes());
        }
        let last = bufs.len().saturating_sub(1);
        for (i, buf) in bufs.into_iter().enumerate() {
            let from = if i == 0 { job.skip as usize } else { 0 };
            let to = buf.len() - if i == last { job.cut as usize } else { 0 };
            // Parts are of sectors at the edges, which are buffers of their own.
            match (from, buf.len() - to) {
                (0, 0) => list.push_buf(buf),
                _ => list.push_bytes(&buf[from..to]),
            }
        }
    }

    /// The extents of one context, the last one if `done`: bytes and state. Without extended headers they are less
    /// than 4 GiB together.
    pub(super) fn status(self, list: &mut SendList, context: u32, found: &[(u64, u32)], done: bool) {
        if self.form == Form::Extended {
            let len = StatusHead::BYTES + found.len() * LongExtent::BYTES;
            self.chunk_of(list, CHUNK_BLOCK_STATUS_EXT, done, len);
            let head = StatusHead { context: context.into(), count: (found.len() as u32).into() };
            list.push_bytes(head.as_bytes());
            let long = |(len, state): &(u64, u32)| LongExtent {
                len: (*len).into(),
                state: u64::from(*state).into(),
            };
            list.push_bytes(found.iter().map(long).collect::<Vec<_>>().as_slice().as_bytes());
            return;
        }
        let len = size_of::<u32>() + found.len() * StatusExtent::BYTES;
        self.chunk_of(list, CHUNK_BLOCK_STATUS, done, len);
        list.push_bytes(&context.to_be_bytes());
        let short =
            |(len, state): &(u64, u32)| StatusExtent { len: (*len as u32).into(), state: (*state).into() };
        list.push_bytes(found.iter().map(short).collect::<Vec<_>>().as_slice().as_bytes());
    }
}

/// Whether every byte of the first `sectors` sectors is 0. Stops after the first sector that has another byte, and
/// looks at the first byte of each on its own, so that a read of data costs next to nothing.
pub(super) fn is_zero(bufs: &[IoBuf], sectors: usize) -> bool {
    // The loop over a sector has no early exit, so that the compiler can vectorise it.
    let zero = |sector: &[u8]| sector[0] == 0 && sector.iter().fold(0, |all, byte| all | byte) == 0;
    bufs.iter().flat_map(|buf| buf.chunks(SECTOR_BYTES as usize)).take(sectors).all(zero)
}
