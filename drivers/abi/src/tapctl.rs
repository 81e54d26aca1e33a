//! The messages between tapdisk and those who control it: the tap-ctl protocol of tapdisk3.
//!
//! ```text
//!   0      2        4    8                                  544
//!   kind   cookie   0    body, by kind, the rest zeros
//!
//!   tap-ctl:  OPEN      5  params{flags, path "raw:/a"}       tapdisk:  OPEN_RSP  5  image{sectors, sector size}
//!             PAUSE     5                                               ERROR     5  response{16, "..."}
//! ```
//!
//! Follows `tapdisk-message.h` of tapdisk3 on x86-64, where every message has the size of the largest one, numbers are
//! little-endian, and there is neither a version nor a length. The cookie is the minor number of the disk. A client
//! connects, sends one message, and reads the answer; [`Kind::List`] is answered by a message per disk and one more,
//! whose count is 0, and [`Kind::Stats`] by a message and text behind it.

use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a message.
pub const MESSAGE_BYTES: usize = 544;
/// Bytes of a text in a message, with its NUL.
pub const TEXT_BYTES: usize = 256;
/// Longest text in bytes: programs of others cut one of 255 bytes silently.
pub const TEXT_BYTES_MAX: usize = 254;
/// The cookie of a message about no disk in particular.
pub const ALL: u16 = 0xffff;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a message is about. A request for which no answer is named is answered by the next number.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u16)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// All of them, by number.
            pub const EVERY: &[Self] = &[$(Self::$name,)*];
        }
    };
}

kinds! {
    /// The answer to a request that failed: [`Outcome`].
    Error = 1,
    /// A disk failed while nobody had asked; never sent.
    RuntimeError = 2,
    /// Asks for the number of the process.
    Pid = 3,
    /// [`PidOf`].
    PidRsp = 4,
    /// The process takes a minor number.
    Attach = 5,
    /// Done.
    AttachRsp = 6,
    /// Opens an image: [`Params`].
    Open = 7,
    /// [`Image`].
    OpenRsp = 8,
    /// Lets no more requests through, and closes the image.
    Pause = 9,
    /// Done.
    PauseRsp = 10,
    /// Opens the image again, or another: [`Params`].
    Resume = 11,
    /// Done.
    ResumeRsp = 12,
    /// Closes the image.
    Close = 13,
    /// Done; also the answer to [`Kind::ForceShutdown`].
    CloseRsp = 14,
    /// The process gives the minor number up.
    Detach = 15,
    /// Done.
    DetachRsp = 16,
    /// Asks for the minor numbers.
    ListMinors = 17,
    /// [`Minors`].
    ListMinorsRsp = 18,
    /// Asks for all disks.
    List = 19,
    /// [`Entry`].
    ListRsp = 20,
    /// Asks for a disk's counters.
    Stats = 21,
    /// [`Announced`], and then text.
    StatsRsp = 22,
    /// As [`Kind::Close`], without waiting for clients.
    ForceShutdown = 23,
    /// Connects a guest's ring: [`Blkif`].
    XenblkifConnect = 24,
    /// Done.
    XenblkifConnectRsp = 25,
    /// Disconnects a guest's ring: [`Blkif`].
    XenblkifDisconnect = 26,
    /// Done.
    XenblkifDisconnectRsp = 27,
    /// Asks for a disk's size.
    DiskInfo = 28,
    /// [`Image`].
    DiskInfoRsp = 29,
    /// The process is to end.
    Exit = 30,
    /// Merges an image into the one below (XCP-ng).
    Commit = 31,
    /// Done.
    CommitRsp = 32,
    /// Asks how far a merge is (XCP-ng).
    QueryCommitJob = 33,
    /// How far.
    QueryCommitJobRsp = 34,
    /// Gives a merge up (XCP-ng).
    CancelCommitJob = 35,
    /// Done.
    CancelCommitJobRsp = 36,
}

impl Kind {
    /// Its number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// The kind with this number; `None` for an unknown one.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::EVERY.iter().copied().find(|kind| kind.number() == number)
    }

    /// What a request of this kind is answered with when it is done; `None` for what is no request, or is not answered.
    pub fn answer(self) -> Option<Self> {
        match self {
            Self::ForceShutdown => Some(Self::CloseRsp),
            Self::Error | Self::RuntimeError | Self::Exit => None,
            request => Self::from_number(request.number() + 1).filter(|_| request.is_request()),
        }
    }

    fn is_request(self) -> bool {
        // Answers have even numbers up to 22, and odd ones behind FORCE_SHUTDOWN until XCP-ng's additions.
        match self.number() {
            0..=22 | 31.. => !self.number().is_multiple_of(2),
            23..=30 => self.number().is_multiple_of(2),
        }
    }
}

/// The flags of [`Params`].
pub mod flags {
    /// Others may have the image open.
    pub const SHARED: u32 = 0x1;
    /// For reading only.
    pub const RDONLY: u32 = 0x2;
    /// With a cache in memory.
    pub const ADD_CACHE: u32 = 0x4;
    /// With an index of a VHD.
    pub const VHD_INDEX: u32 = 0x8;
    /// With a log of changed blocks, whose path follows the message in [`super::TEXT_BYTES`] bytes.
    pub const ADD_LOG: u32 = 0x10;
    /// With a cache on local storage.
    pub const ADD_LCACHE: u32 = 0x20;
    /// On the chain of another disk of this process.
    pub const REUSE_PRT: u32 = 0x40;
    /// With a second image that gets all writes, too.
    pub const SECONDARY: u32 = 0x80;
    /// The second image is used only when the first is full.
    pub const STANDBY: u32 = 0x100;
    /// Through the page cache.
    pub const NO_O_DIRECT: u32 = 0x200;
    /// A key follows the message.
    pub const OPEN_ENCRYPTED: u32 = 0x400;
}

/// Bits of [`Entry::state`].
pub mod state {
    /// The image is closed.
    pub const CLOSED: i32 = 0x2;
    /// Requests are being waited for.
    pub const QUIESCE_REQUESTED: i32 = 0x4;
    /// No request is let through.
    pub const QUIESCED: i32 = 0x8;
    /// The disk is to be paused.
    pub const PAUSE_REQUESTED: i32 = 0x10;
    /// The disk is paused.
    pub const PAUSED: i32 = 0x20;
    /// The disk is being closed.
    pub const SHUTDOWN_REQUESTED: i32 = 0x40;
    /// The image could not be opened again.
    pub const RESUME_FAILED: i32 = 0x200;
}

/// What stands behind the head of a message.
pub trait Body: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned {}

macro_rules! bodies {
    ($($(#[$doc:meta])* $name:ident: $bytes:literal bytes
        { $($(#[$field_doc:meta])* $field:ident: $type:ty = $offset:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl Body for $name {}

        impl Default for $name {
            fn default() -> Self {
                Self::new_zeroed()
            }
        }

        const _: () = {
            assert!(size_of::<$name>() == $bytes);
            $(assert!(offset_of!($name, $field) == $offset);)*
        };
    )*};
}

bodies! {
    /// What to open, and how.
    Params: 532 bytes {
        /// Of [`flags`].
        flags: U32 = 0,
        /// The minor number again.
        devnum: U32 = 4,
        /// The guest; not used.
        domid: U32 = 8,
        /// TYPE:PATH; in a [`Kind::Resume`] empty for the same one.
        path: Text = 12,
        /// The minor number of the disk below, or -1.
        prt_devnum: I32 = 268,
        /// How long a request may take, in seconds; 0 leaves it to the process.
        req_timeout_s: U16 = 272,
        /// TYPE:PATH of a second image.
        secondary: Text = 274,
        /// Zero.
        padding: [u8; 2] = 530,
    }
    /// A disk's size.
    Image: 16 bytes {
        /// Its sectors.
        sectors: U64 = 0,
        /// Bytes of a sector.
        sector_size: U32 = 8,
        /// The bits of a vbd's key `info`: 4 for a read-only disk.
        info: U32 = 12,
    }
    /// Why a request failed.
    Outcome: 260 bytes {
        /// The error number; others send it negative, too.
        error: I32 = 0,
        /// In words; others leave it empty.
        message: Text = 4,
    }
    /// The minor numbers of a process.
    Minors: 256 bytes {
        /// How many.
        count: I32 = 0,
        /// The first of them.
        list: [I32; 63] = 4,
    }
    /// A disk of a process.
    Entry: 268 bytes {
        /// How many follow, with this one; 0 in the last message, which has no disk.
        count: I32 = 0,
        /// Its minor number, -1 in the last message.
        minor: I32 = 4,
        /// Of [`state`].
        state: I32 = 8,
        /// TYPE:PATH, empty while no image is open.
        path: Text = 12,
    }
    /// The length of the text that follows.
    Announced: 16 bytes {
        /// Zero.
        unused: [u8; 8] = 0,
        /// Bytes of text.
        length: U64 = 8,
    }
    /// The number of a process.
    PidOf: 4 bytes {
        /// The number.
        pid: I32 = 0,
    }
    /// A guest's ring.
    Blkif: 316 bytes {
        /// The guest.
        domid: U32 = 0,
        /// The device's number in its guest.
        devid: U32 = 4,
        /// The grants of its pages.
        gref: [U32; 8] = 8,
        /// The number of pages is two to the power of this.
        order: U32 = 40,
        /// 1 the layout of this machine, 2 that of 32-bit guests, 3 that of 64-bit guests.
        proto: U32 = 44,
        /// The name of a pool of pages; may be empty.
        pool: Text = 48,
        /// The guest's port.
        port: U32 = 304,
        /// How long to poll before sleeping, in microseconds.
        poll_duration_us: U32 = 308,
        /// Polling ends when less of the processor than this is idle, in percent.
        poll_idle_threshold: U32 = 312,
    }
}

/// A text of a message, with a NUL behind it and zeros to its end.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct Text([u8; TEXT_BYTES]);

impl Text {
    /// `text`, if it has at most [`TEXT_BYTES_MAX`] bytes and no NUL.
    pub fn new(text: &str) -> Option<Self> {
        if text.len() > TEXT_BYTES_MAX || text.contains('\0') {
            return None;
        }
        let mut bytes = [0; TEXT_BYTES];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Some(Self(bytes))
    }

    /// `text`, without its middle if it does not fit: for people, never for paths.
    pub fn cut(text: &str) -> Self {
        let text = text.split('\0').next().unwrap_or_default();
        let shortened = if text.len() <= TEXT_BYTES_MAX { text.to_owned() } else { without_middle(text) };
        Self::new(&shortened).unwrap_or(Self([0; TEXT_BYTES]))
    }

    /// The text before the first NUL; `None` without a NUL, or if it is not UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        let end = self.0.iter().position(|&byte| byte == 0)?;
        str::from_utf8(&self.0[..end]).ok()
    }
}

/// The beginning and the end of a text that is too long: the end says why something failed.
fn without_middle(text: &str) -> String {
    const GAP: &str = "...";
    let (mut head, mut tail) = (TEXT_BYTES_MAX / 3, text.len() - (TEXT_BYTES_MAX * 2 / 3 - GAP.len()));
    while !text.is_char_boundary(head) {
        head -= 1;
    }
    while !text.is_char_boundary(tail) {
        tail += 1;
    }
    format!("{}{GAP}{}", &text[..head], &text[tail..])
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.as_str() {
            Some(text) => write!(f, "{text:?}"),
            None => f.write_str("(no text)"),
        }
    }
}

/// A message: a private copy of its bytes.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Message {
    kind: U16,
    cookie: U16,
    unused: [u8; 4],
    body: [u8; MESSAGE_BYTES - 8],
}

const _: () = {
    assert!(size_of::<Message>() == MESSAGE_BYTES);
    assert!(offset_of!(Message, cookie) == 2);
    assert!(offset_of!(Message, body) == 8);
    // A body is as long as the largest one, rounded up to the alignment of its numbers.
    assert!(size_of::<Params>().next_multiple_of(8) == MESSAGE_BYTES - 8);
};

impl Message {
    /// A message with a body of zeros.
    pub fn new(kind: Kind, cookie: u16) -> Self {
        Self {
            kind: kind.number().into(),
            cookie: cookie.into(),
            unused: [0; 4],
            body: [0; MESSAGE_BYTES - 8],
        }
    }

    /// A message with this body.
    pub fn with(kind: Kind, cookie: u16, body: &impl Body) -> Self {
        let mut message = Self::new(kind, cookie);
        let bytes = body.as_bytes();
        message.body[..bytes.len()].copy_from_slice(bytes);
        message
    }

    /// The answer to a request about `cookie` that failed with the error number `error`.
    pub fn error(cookie: u16, error: i32, words: &str) -> Self {
        Self::with(Kind::Error, cookie, &Outcome { error: error.into(), message: Text::cut(words) })
    }

    /// What it is; `None` for an unknown number, see [`Message::number`].
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_number(self.kind.get())
    }

    /// The number of its kind.
    pub fn number(&self) -> u16 {
        self.kind.get()
    }

    /// The minor number of the disk that it is about.
    pub fn cookie(&self) -> u16 {
        self.cookie.get()
    }

    /// Its body, taken as `T`: any bytes are one.
    ///
    /// # Panics
    /// Never: a body has room for each of them.
    pub fn body<T: Body>(&self) -> T {
        T::read_from_prefix(&self.body).expect("a body is as long as the longest").0
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind() {
            Some(kind) => write!(f, "{kind:?} for {}", self.cookie()),
            None => write!(f, "kind {} for {}", self.number(), self.cookie()),
        }
    }
}

#[cfg(test)]
#[path = "tapctl_tests.rs"]
mod tests;
