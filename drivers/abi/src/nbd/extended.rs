//! Headers with lengths of 64 bits, after the option [`OPT_EXTENDED_HEADERS`](super::OPT_EXTENDED_HEADERS).

use super::{CHUNK_DONE, EXTENDED_CHUNK_MAGIC, EXTENDED_REQUEST_MAGIC, RequestHeader};
use std::mem::offset_of;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

wire!(
    /// A request with an extended header; the data of a write follows.
    ExtendedRequest, 32 {
        /// [`EXTENDED_REQUEST_MAGIC`].
        magic: U32 = 0,
        /// Flags, of [`command`](super::command).
        flags: U16 = 4,
        /// `CMD_*`.
        command: U16 = 6,
        /// Comes back in the reply.
        cookie: U64 = 8,
        /// First byte.
        offset: U64 = 16,
        /// Bytes.
        len: U64 = 24,
    }
);
wire!(
    /// What precedes the payload of a chunk, if headers are extended.
    ExtendedChunk, 32 {
        /// [`EXTENDED_CHUNK_MAGIC`].
        magic: U32 = 0,
        /// [`CHUNK_DONE`] or 0.
        flags: U16 = 4,
        /// `CHUNK_*`.
        kind: U16 = 6,
        /// The request's.
        cookie: U64 = 8,
        /// The request's.
        offset: U64 = 16,
        /// Bytes of payload.
        len: U64 = 24,
    }
);
wire!(
    /// What precedes the extents of [`CHUNK_BLOCK_STATUS_EXT`](super::CHUNK_BLOCK_STATUS_EXT).
    StatusHead, 8 {
        /// The context's number.
        context: U32 = 0,
        /// Extents.
        count: U32 = 4,
    }
);
wire!(
    /// One extent of [`CHUNK_BLOCK_STATUS_EXT`](super::CHUNK_BLOCK_STATUS_EXT).
    LongExtent, 16 {
        /// Bytes, not 0.
        len: U64 = 0,
        /// `STATE_*`.
        state: U64 = 8,
    }
);

impl ExtendedRequest {
    /// A request.
    pub fn new(command: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Self {
        Self {
            magic: EXTENDED_REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            len: len.into(),
        }
    }

    /// Parses a private copy of a request's header.
    ///
    /// # Errors
    /// When it does not begin with [`EXTENDED_REQUEST_MAGIC`]; the rest of the stream is then unusable.
    pub fn parse(bytes: &[u8; 32]) -> Result<Self, &'static str> {
        let header: Self = zerocopy::transmute!(*bytes);
        if header.magic.get() == EXTENDED_REQUEST_MAGIC {
            Ok(header)
        } else {
            Err("a request without its magic number")
        }
    }
}

impl From<RequestHeader> for ExtendedRequest {
    fn from(header: RequestHeader) -> Self {
        let RequestHeader { flags, command, cookie, offset, len, .. } = header;
        Self::new(command.get(), flags.get(), cookie.get(), offset.get(), u64::from(len.get()))
    }
}

impl ExtendedChunk {
    /// A chunk with `len` bytes of payload, the last one if `done`, of the reply to a request at `offset`.
    pub fn new(cookie: u64, offset: u64, kind: u16, done: bool, len: u64) -> Self {
        let flags = if done { CHUNK_DONE } else { 0 };
        Self {
            magic: EXTENDED_CHUNK_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            len: len.into(),
        }
    }
}
