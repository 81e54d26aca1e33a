//! The messages between xenstored and its clients.
//!
//! ```text
//!   0      4         8             12    16
//!   kind   request   transaction   len   payload, len bytes, at most 4096
//!
//!   client: WRITE  7  0  12  "/a/b\0value"            xenstored: WRITE        7  0  3   "OK\0"
//!   client: READ   8  0  5   "/a/x\0"                            ERROR        8  0  7   "ENOENT\0"
//!                                                                WATCH_EVENT  .  .  ..  "/a/b\0token\0"
//! ```
//!
//! Follows Xen's `io/xs_wire.h` and `docs/misc/xenstore.txt`. Numbers are little-endian, strings end in a NUL, values
//! are any bytes. A reply has the kind and the request number of its request, or the kind [`MessageKind::Error`] and an
//! error's name; events may come in between at any point.

use std::mem::{offset_of, size_of};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most bytes of payload of one message. A client that exceeds it is disconnected.
pub const PAYLOAD_BYTES_MAX: usize = 4096;
/// Longest absolute path in bytes, without its NUL.
pub const ABSOLUTE_PATH_BYTES_MAX: usize = 3072;
/// Longest path in bytes that is relative to a domain's own directory, without its NUL.
pub const RELATIVE_PATH_BYTES_MAX: usize = 2048;
/// The transaction number of messages outside any transaction.
pub const NO_TRANSACTION: u32 = 0;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a message is about.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u32)]
        pub enum MessageKind { $($(#[$doc])* $name = $number,)* }

        impl MessageKind {
            /// All of them, by number. 20 is obsolete.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

kinds! {
    /// Asks xenstored about itself.
    Control = 0,
    /// Path: the names of its children, each with a NUL.
    Directory = 1,
    /// Path: its value.
    Read = 2,
    /// Path: its permissions.
    GetPerms = 3,
    /// Path, token: events from now on, the first one at once.
    Watch = 4,
    /// Path, token: no more of them.
    Unwatch = 5,
    /// An empty string: the number of a new transaction, in decimal.
    TransactionStart = 6,
    /// `T` commits the transaction, `F` aborts it.
    TransactionEnd = 7,
    /// Makes a domain known.
    Introduce = 8,
    /// Forgets a domain.
    Release = 9,
    /// A domain's number: its directory.
    GetDomainPath = 10,
    /// Path, and then a value without a NUL of its own.
    Write = 11,
    /// Path: makes it, without a value.
    Mkdir = 12,
    /// Path: removes it and everything below.
    Rm = 13,
    /// Path, permissions.
    SetPerms = 14,
    /// From xenstored only: path that changed, token.
    WatchEvent = 15,
    /// From xenstored only: an error's name.
    Error = 16,
    /// A domain's number: whether it is known.
    IsDomainIntroduced = 17,
    /// A domain goes on after it was suspended.
    Resume = 18,
    /// Gives one domain another's rights.
    SetTarget = 19,
    /// Forgets all watches and transactions of this connection.
    ResetWatches = 21,
    /// Path, offset in bytes: generation of the list of children, and the part of the list from the offset on. An
    /// empty string ends the list.
    DirectoryPart = 22,
}

impl MessageKind {
    /// Its number on the wire.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The kind with this number; `None` for an unknown one.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.number() == number)
    }
}

/// What precedes the payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MessageHeader {
    /// What the message is: a number of [`MessageKind`].
    kind: U32,
    /// The client's number for its request, which the answer repeats.
    request: U32,
    /// The transaction that it belongs to; 0 for none.
    transaction: U32,
    /// Bytes of the payload that follow.
    len: U32,
}

const _: () = {
    assert!(size_of::<MessageHeader>() == MessageHeader::BYTES);
    assert!(offset_of!(MessageHeader, kind) == 0);
    assert!(offset_of!(MessageHeader, request) == 4);
    assert!(offset_of!(MessageHeader, transaction) == 8);
    assert!(offset_of!(MessageHeader, len) == 12);
};

impl MessageHeader {
    /// Bytes on the wire.
    pub const BYTES: usize = 16;

    /// The header of a message with `payload_bytes` bytes of payload, at most [`PAYLOAD_BYTES_MAX`].
    ///
    /// # Panics
    /// If the payload is larger.
    pub fn new(kind: MessageKind, request: u32, transaction: u32, payload_bytes: usize) -> Self {
        assert!(
            payload_bytes <= PAYLOAD_BYTES_MAX,
            "a payload of {payload_bytes} bytes breaks the connection"
        );
        Self {
            kind: kind.number().into(),
            request: request.into(),
            transaction: transaction.into(),
            len: (payload_bytes as u32).into(),
        }
    }

    /// The header in `bytes`, whatever its kind.
    ///
    /// # Errors
    /// The length of its payload in bytes, if that is above [`PAYLOAD_BYTES_MAX`].
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self, u32> {
        let header: Self = zerocopy::transmute!(*bytes);
        match header.len.get() {
            len if len as usize <= PAYLOAD_BYTES_MAX => Ok(header),
            len => Err(len),
        }
    }

    /// The header's bytes on the wire.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        zerocopy::transmute!(self)
    }

    /// What the message is about; the number if the kind is unknown.
    ///
    /// # Errors
    /// The kind's number.
    pub fn kind(&self) -> Result<MessageKind, u32> {
        let number = self.kind.get();
        MessageKind::from_number(number).ok_or(number)
    }

    /// The number that the client gave its request; without meaning in an event.
    pub fn request(&self) -> u32 {
        self.request.get()
    }

    /// The transaction that the message belongs to, or [`NO_TRANSACTION`].
    pub fn transaction(&self) -> u32 {
        self.transaction.get()
    }

    /// Bytes of payload, at most [`PAYLOAD_BYTES_MAX`].
    pub fn payload_bytes(&self) -> usize {
        self.len.get() as usize
    }
}

/// The errors that xenstored reports, by name, with Linux's numbers.
pub const ERRORS: [(&str, i32); 16] = [
    ("EINVAL", 22),
    ("EACCES", 13),
    ("EEXIST", 17),
    ("EISDIR", 21),
    ("ENOENT", 2),
    ("ENOMEM", 12),
    ("ENOSPC", 28),
    ("EIO", 5),
    ("ENOTEMPTY", 39),
    ("ENOSYS", 38),
    ("EROFS", 30),
    ("EBUSY", 16),
    ("EAGAIN", 11),
    ("EISCONN", 106),
    ("E2BIG", 7),
    ("EPERM", 1),
];

/// Linux's number of the error in the payload of a [`MessageKind::Error`]; `None` for an unknown name.
pub fn error_number(payload: &[u8]) -> Option<i32> {
    let (name, _) = split_string(payload)?;
    ERRORS.iter().find(|(known, _)| known.as_bytes() == name).map(|(_, number)| *number)
}

/// The string that `payload` begins with, without its NUL, and what follows it; `None` without a NUL.
pub fn split_string(payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = payload.iter().position(|byte| *byte == 0)?;
    Some((&payload[..end], &payload[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let header = MessageHeader::new(MessageKind::DirectoryPart, 0x0403_0201, 0x0807_0605, 4096);
        let bytes = [22, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 16, 0, 0];
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(MessageHeader::parse(&bytes), Ok(header));
        assert_eq!(header.kind(), Ok(MessageKind::DirectoryPart));
        assert_eq!((header.request(), header.transaction()), (0x0403_0201, 0x0807_0605));
        assert_eq!(header.payload_bytes(), 4096);
    }

    #[test]
    fn kinds_have_the_numbers_of_the_wire() {
        let numbers: Vec<u32> = MessageKind::ALL.iter().map(|kind| kind.number()).collect();
        assert_eq!(numbers, (0..=19).chain(21..=22).collect::<Vec<u32>>());
        for kind in MessageKind::ALL {
            assert_eq!(MessageKind::from_number(kind.number()), Some(*kind));
        }
        for unknown in [20, 23, 0xffff, u32::MAX] {
            assert_eq!(MessageKind::from_number(unknown), None);
        }
        // Counted by hand in the header, where most have no explicit number.
        let some = [
            (MessageKind::Directory, 1),
            (MessageKind::Watch, 4),
            (MessageKind::TransactionEnd, 7),
            (MessageKind::Write, 11),
            (MessageKind::Rm, 13),
            (MessageKind::WatchEvent, 15),
            (MessageKind::Error, 16),
            (MessageKind::ResetWatches, 21),
        ];
        assert!(some.iter().all(|(kind, number)| kind.number() == *number));
    }

    #[test]
    fn errors_have_names() {
        assert_eq!(error_number(b"ENOENT\0"), Some(2));
        assert_eq!(error_number(b"E2BIG\0"), Some(7));
        assert_eq!(error_number(b"EAGAIN\0 and more"), Some(11));
        for unknown in [&b""[..], b"ENOENT", b"\0", b"ENOEN\0", b"enoent\0", b"ENOENT2\0", b"\xff\0"] {
            assert_eq!(error_number(unknown), None, "{unknown:?}");
        }
    }

    #[test]
    fn strings_end_in_a_nul() {
        assert_eq!(split_string(b"a\0b\0"), Some((&b"a"[..], &b"b\0"[..])));
        assert_eq!(split_string(b"\0"), Some((&b""[..], &b""[..])));
        assert_eq!(split_string(b"ab"), None);
        assert_eq!(split_string(b""), None);
    }

    #[test]
    #[should_panic(expected = "breaks the connection")]
    fn nobody_sends_too_much() {
        let _header = MessageHeader::new(MessageKind::Write, 1, NO_TRANSACTION, PAYLOAD_BYTES_MAX + 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_too_long(bytes: [u8; 16]) {
            match MessageHeader::parse(&bytes) {
                Ok(header) => {
                    prop_assert!(header.payload_bytes() <= PAYLOAD_BYTES_MAX);
                    prop_assert_eq!(header.to_bytes(), bytes);
                }
                Err(len) => prop_assert!(len as usize > PAYLOAD_BYTES_MAX),
            }
        }
    }
}
