//! The network block device protocol: fixed newstyle negotiation, requests, simple and structured replies.
//!
//! ```text
//!   server                                  client
//!   Hello 18 ───────────────────────────►
//!            ◄─────────────────────────────  client flags u32
//!            ◄─────────────────────────────  OptionHeader 16 + data          any number of times
//!   OptionReply 20 + data ──────────────►
//!            ◄─────────────────────────────  RequestHeader 28 (+ data of a write)
//!   SimpleReply 16 (+ data of a read) ──►                                    or chunks:
//!   ChunkHeader 20 + payload ───────────►
//! ```
//!
//! Follows `doc/proto.md` of the NetworkBlockDevice/nbd repository, with its extended headers, where requests and
//! chunks have 32 bytes before their data. All numbers are big-endian; offsets and lengths are bytes.

use std::mem::{offset_of, size_of};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "NBDMAGIC", the first word of a server.
pub const HELLO_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": a server of the new style, and every option of a client.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// A simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// A chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// Every request with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Every chunk of a reply with an extended header.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Longest name, description, query or message in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// Zeros after the reply to [`OPT_EXPORT_NAME`], unless both sides set `NO_ZEROES`.
pub const EXPORT_PADDING_BYTES: usize = 124;
/// The metadata context that says which parts are allocated, and which are zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The metadata context that says in which level of a chain of images a part is: 0 in none, 1 in the topmost.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// Handshake flags, the same bits from both sides.
pub mod handshake {
    /// Options are answered, and unknown ones refused without ending the connection.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No zeros after the reply to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Choose an export and begin, without a way to refuse.
pub const OPT_EXPORT_NAME: u32 = 1;
/// End the connection.
pub const OPT_ABORT: u32 = 2;
/// List all exports.
pub const OPT_LIST: u32 = 3;
/// Encrypt.
pub const OPT_STARTTLS: u32 = 5;
/// Describe an export.
pub const OPT_INFO: u32 = 6;
/// Describe an export and begin.
pub const OPT_GO: u32 = 7;
/// Use structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// List metadata contexts.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Choose metadata contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Use headers with lengths of 64 bits, and structured replies.
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// Done.
pub const REP_ACK: u32 = 1;
/// One export of a list.
pub const REP_SERVER: u32 = 2;
/// One piece of information.
pub const REP_INFO: u32 = 3;
/// One metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Set in replies that refuse.
pub const REP_ERROR: u32 = 1 << 31;
/// The option is unknown here.
pub const REP_ERR_UNSUP: u32 = REP_ERROR | 1;
/// The option is forbidden here.
pub const REP_ERR_POLICY: u32 = REP_ERROR | 2;
/// The option is malformed, or not allowed at this point.
pub const REP_ERR_INVALID: u32 = REP_ERROR | 3;
/// TLS must be agreed on first.
pub const REP_ERR_TLS_REQD: u32 = REP_ERROR | 5;
/// There is no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;
/// The server is shutting down.
pub const REP_ERR_SHUTDOWN: u32 = REP_ERROR | 7;
/// The option is too large.
pub const REP_ERR_TOO_BIG: u32 = REP_ERROR | 9;
/// It has no place beside extended headers.
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_ERROR | 10;

/// Size and flags; always sent.
pub const INFO_EXPORT: u16 = 0;
/// The export's name on the server.
pub const INFO_NAME: u16 = 1;
/// A description for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Sizes of requests.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// What an export can do.
pub mod export {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH`.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag `FUA`.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM`.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES`, with the flag `NO_HOLE`.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag `DF`.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `CACHE`.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The flag `FAST_ZERO`.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Read bytes.
pub const CMD_READ: u16 = 0;
/// Write the bytes that follow.
pub const CMD_WRITE: u16 = 1;
/// End the connection; never answered.
pub const CMD_DISC: u16 = 2;
/// Make what was answered durable.
pub const CMD_FLUSH: u16 = 3;
/// Discard bytes.
pub const CMD_TRIM: u16 = 4;
/// Read ahead.
pub const CMD_CACHE: u16 = 5;
/// Write zeros.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Report what is allocated.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Flags of requests.
pub mod command {
    /// Durable when answered.
    pub const FUA: u16 = 1 << 0;
    /// Zeros stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The data of a read comes in one chunk.
    pub const DF: u16 = 1 << 2;
    /// Only the first extent is wanted.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Refuse zeros that would take as long as writing them.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// With extended headers: as many bytes as the length says follow. Every write has it.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Flag of the last chunk of a reply.
pub const CHUNK_DONE: u16 = 1 << 0;
/// A chunk without payload; only as the last one.
pub const CHUNK_NONE: u16 = 0;
/// Data: [`OffsetData`] and bytes.
pub const CHUNK_OFFSET_DATA: u16 = 1;
/// Zeros: [`OffsetHole`].
pub const CHUNK_OFFSET_HOLE: u16 = 2;
/// Extents: a context's number (u32) and [`StatusExtent`]s.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Extents after an extended header: [`StatusHead`] and [`LongExtent`]s.
pub const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
/// Set in types of chunks that say that the request failed.
pub const CHUNK_ERROR_BIT: u16 = 1 << 15;
/// It failed: [`ErrorHead`] and a message.
pub const CHUNK_ERROR: u16 = CHUNK_ERROR_BIT | 1;
/// It failed at a place: [`ErrorHead`], a message, and an offset (u64).
pub const CHUNK_ERROR_OFFSET: u16 = CHUNK_ERROR_BIT | 2;

/// `base:allocation`: no space is allocated.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: it reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;

/// Errors, with Linux's numbers; others become [`error::EINVAL`].
pub mod error {
    /// The export is read-only.
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// The request is wrong.
    pub const EINVAL: u32 = 22;
    /// No space is left.
    pub const ENOSPC: u32 = 28;
    /// The answer would be too large.
    pub const EOVERFLOW: u32 = 75;
    /// It cannot be done this way.
    pub const ENOTSUP: u32 = 95;
    /// The server is shutting down.
    pub const ESHUTDOWN: u32 = 108;
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $bytes:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty = $at:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        const _: () = {
            assert!(size_of::<$name>() == $bytes);
            $(assert!(offset_of!($name, $field) == $at);)*
        };
        impl $name {
            /// Bytes on the wire.
            pub const BYTES: usize = $bytes;
        }
    };
}

wire!(
    /// The first words of a server.
    Hello, 18 {
        /// [`HELLO_MAGIC`].
        magic: U64 = 0,
        /// [`OPTION_MAGIC`].
        style: U64 = 8,
        /// [`handshake`] flags.
        flags: U16 = 16,
    }
);
wire!(
    /// What precedes an option's data.
    OptionHeader, 16 {
        /// [`OPTION_MAGIC`].
        magic: U64 = 0,
        /// `OPT_*`.
        option: U32 = 8,
        /// Bytes of data.
        len: U32 = 12,
    }
);
wire!(
    /// What precedes the data of a reply to an option.
    OptionReply, 20 {
        /// [`OPTION_REPLY_MAGIC`].
        magic: U64 = 0,
        /// The option.
        option: U32 = 8,
        /// `REP_*`.
        reply: U32 = 12,
        /// Bytes of data.
        len: U32 = 16,
    }
);
wire!(
    /// The reply to [`OPT_EXPORT_NAME`]; [`EXPORT_PADDING_BYTES`] zeros may follow.
    ExportReply, 10 {
        /// Size in bytes.
        size: U64 = 0,
        /// [`export`] flags.
        flags: U16 = 8,
    }
);
wire!(
    /// Data of [`REP_INFO`] with [`INFO_EXPORT`].
    InfoExport, 12 {
        /// [`INFO_EXPORT`].
        kind: U16 = 0,
        /// Size in bytes.
        size: U64 = 2,
        /// [`export`] flags.
        flags: U16 = 10,
    }
);
wire!(
    /// Data of [`REP_INFO`] with [`INFO_BLOCK_SIZE`].
    InfoBlockSize, 14 {
        /// [`INFO_BLOCK_SIZE`].
        kind: U16 = 0,
        /// Every offset and length is a multiple of it, in bytes.
        minimum: U32 = 2,
        /// Multiples of it are fast, in bytes.
        preferred: U32 = 6,
        /// Most bytes of one read or write.
        maximum: U32 = 10,
    }
);
wire!(
    /// A request; the data of a write follows.
    RequestHeader, 28 {
        /// [`REQUEST_MAGIC`].
        magic: U32 = 0,
        /// [`command`] flags.
        flags: U16 = 4,
        /// `CMD_*`.
        command: U16 = 6,
        /// Comes back in the reply.
        cookie: U64 = 8,
        /// First byte.
        offset: U64 = 16,
        /// Bytes.
        len: U32 = 24,
    }
);
wire!(
    /// A simple reply; the data of a read that succeeded follows.
    SimpleReply, 16 {
        /// [`SIMPLE_MAGIC`].
        magic: U32 = 0,
        /// [`mod@error`], or 0.
        error: U32 = 4,
        /// The request's.
        cookie: U64 = 8,
    }
);
wire!(
    /// What precedes the payload of a chunk.
    ChunkHeader, 20 {
        /// [`CHUNK_MAGIC`].
        magic: U32 = 0,
        /// [`CHUNK_DONE`] or 0.
        flags: U16 = 4,
        /// `CHUNK_*`.
        kind: U16 = 6,
        /// The request's.
        cookie: U64 = 8,
        /// Bytes of payload.
        len: U32 = 16,
    }
);
wire!(
    /// What precedes the data of [`CHUNK_OFFSET_DATA`].
    OffsetData, 8 {
        /// Where the data belongs, in bytes of the export.
        offset: U64 = 0,
    }
);
wire!(
    /// The payload of [`CHUNK_OFFSET_HOLE`].
    OffsetHole, 12 {
        /// Where the zeros belong, in bytes of the export.
        offset: U64 = 0,
        /// How many.
        len: U32 = 8,
    }
);
wire!(
    /// What precedes the message of [`CHUNK_ERROR`].
    ErrorHead, 6 {
        /// [`mod@error`], not 0.
        error: U32 = 0,
        /// Bytes of the message.
        message_len: U16 = 4,
    }
);
wire!(
    /// One extent of [`CHUNK_BLOCK_STATUS`].
    StatusExtent, 8 {
        /// Bytes, not 0.
        len: U32 = 0,
        /// `STATE_*`.
        state: U32 = 4,
    }
);

mod extended;
pub use extended::{ExtendedChunk, ExtendedRequest, LongExtent, StatusHead};

impl Hello {
    /// A server's greeting.
    pub fn new(flags: u16) -> Self {
        Self { magic: HELLO_MAGIC.into(), style: OPTION_MAGIC.into(), flags: flags.into() }
    }
}

impl OptionHeader {
    /// An option with `len` bytes of data.
    pub fn new(option: u32, len: u32) -> Self {
        Self { magic: OPTION_MAGIC.into(), option: option.into(), len: len.into() }
    }
}

impl OptionReply {
    /// A reply with `len` bytes of data.
    pub fn new(option: u32, reply: u32, len: u32) -> Self {
        Self { magic: OPTION_REPLY_MAGIC.into(), option: option.into(), reply: reply.into(), len: len.into() }
    }
}

impl RequestHeader {
    /// A request.
    pub fn new(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Self {
        Self {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            len: len.into(),
        }
    }
}

impl SimpleReply {
    /// A reply; `error` is 0 for success.
    pub fn new(cookie: u64, error: u32) -> Self {
        Self { magic: SIMPLE_MAGIC.into(), error: error.into(), cookie: cookie.into() }
    }
}

impl ChunkHeader {
    /// A chunk with `len` bytes of payload, the last one if `done`.
    pub fn new(cookie: u64, kind: u16, done: bool, len: u32) -> Self {
        let flags = if done { CHUNK_DONE } else { 0 };
        Self {
            magic: CHUNK_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            len: len.into(),
        }
    }
}

/// Takes a value of fixed size off the front of `data`.
fn take<T: FromBytes + Unaligned + Immutable + KnownLayout>(data: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(data).ok()
}

/// Takes a string, preceded by its length (u32), off the front of `data`.
fn take_string(data: &[u8]) -> Result<(&str, &[u8]), &'static str> {
    let (len, rest) = take::<U32>(data).ok_or("the option ends before the length of a string")?;
    let len = len.get() as usize;
    if len > STRING_BYTES_MAX {
        return Err("a string is longer than 4096 bytes");
    }
    let (text, rest) = rest.split_at_checked(len).ok_or("the option ends within a string")?;
    Ok((std::str::from_utf8(text).map_err(|_| "a string is not UTF-8")?, rest))
}

/// The data of [`OPT_INFO`] and [`OPT_GO`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InfoQuery<'a> {
    /// The export's name.
    pub name: &'a str,
    /// The kinds of information asked for.
    kinds: &'a [U16],
}

impl<'a> InfoQuery<'a> {
    /// Parses the data of the option.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(data: &'a [u8]) -> Result<Self, &'static str> {
        let (name, rest) = take_string(data)?;
        let (count, rest) = take::<U16>(rest).ok_or("the option ends before the number of requests")?;
        let kinds =
            <[U16]>::ref_from_bytes(rest).map_err(|_| "the information requests are not two bytes each")?;
        if kinds.len() != usize::from(count.get()) {
            return Err("the number of information requests is not that which the option says");
        }
        Ok(Self { name, kinds })
    }
    /// Whether information of `kind` (`INFO_*`) is asked for.
    pub fn asks(&self, kind: u16) -> bool {
        self.kinds.iter().any(|k| k.get() == kind)
    }
}

/// The data of [`OPT_LIST_META_CONTEXT`] and [`OPT_SET_META_CONTEXT`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaQuery<'a> {
    /// The export's name.
    pub name: &'a str,
    /// How many queries there are.
    pub count: u32,
    queries: &'a [u8],
}

impl<'a> MetaQuery<'a> {
    /// Parses the data of the option.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(data: &'a [u8]) -> Result<Self, &'static str> {
        let (name, rest) = take_string(data)?;
        let (count, queries) = take::<U32>(rest).ok_or("the option ends before the number of queries")?;
        let query = Self { name, count: count.get(), queries };
        let mut rest = queries;
        for _ in 0..query.count {
            (_, rest) = take_string(rest)?;
        }
        if rest.is_empty() { Ok(query) } else { Err("the option goes on behind its last query") }
    }
    /// The queries.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> {
        let mut rest = self.queries;
        std::iter::from_fn(move || {
            let (text, left) = take_string(rest).ok()?;
            rest = left;
            Some(text)
        })
    }
}

impl RequestHeader {
    /// Parses a private copy of a request's header.
    ///
    /// # Errors
    /// When it does not begin with [`REQUEST_MAGIC`]; the rest of the stream is then unusable.
    pub fn parse(bytes: &[u8; 28]) -> Result<Self, &'static str> {
        let header: Self = zerocopy::transmute!(*bytes);
        if header.magic.get() == REQUEST_MAGIC {
            Ok(header)
        } else {
            Err("a request without its magic number")
        }
    }
}

#[cfg(test)]
#[path = "nbd_tests.rs"]
mod tests;
