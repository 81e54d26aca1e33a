//! Generic netlink, as far as the kernel's nbd driver needs it.
//!
//! ```text
//!   0         4      6       8          12     16       20
//!   length    family flags   sequence   port   command  attributes
//!                                              version
//!   attribute: length u16, kind u16, payload, padded to 4; a nested one has attributes as its payload
//! ```
//!
//! Follows Linux's `uapi/linux/netlink.h`, `genetlink.h` and `nbd-netlink.h`. Numbers are in the machine's order. The
//! kernel does what a message asks for before the send returns, and has then queued its reply and an acknowledgement.

use crate::files::of_rustix;
use rustix::net::netlink::GENERIC;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with, sockopt,
};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tap_host::Errno;

/// Bytes before the attributes.
const HEAD_BYTES: usize = 20;
/// The message is a request, and wants an acknowledgement.
const REQUEST_AND_ACK: u16 = 1 | 4;
/// The kind of an acknowledgement, whose first word after the header is an error or 0.
const ACK: u16 = 2;
/// The family that knows the others.
const CONTROL_FAMILY: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const FAMILY_MAX_ATTRIBUTE: u16 = 5;
/// Marks attributes that have attributes as their payload.
const NESTED: u16 = 1 << 15;
/// The bits of a kind that mark something.
const MARKS: u16 = 3 << 14;
/// Room for the longest reply: the status of some thousand devices.
const REPLY_BYTES_MAX: usize = 64 << 10;
/// The kernel has answered before we ask; this is for one that does not answer at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// Commands of the nbd driver.
pub(super) mod command {
    pub(in super::super) const CONNECT: u8 = 1;
    pub(in super::super) const DISCONNECT: u8 = 2;
    pub(in super::super) const RECONFIGURE: u8 = 3;
    pub(in super::super) const STATUS: u8 = 5;
}

/// Attributes of the nbd driver's messages.
pub(super) mod attribute {
    /// u32.
    pub(in super::super) const INDEX: u16 = 1;
    /// u64.
    pub(in super::super) const SIZE_BYTES: u16 = 2;
    /// u64.
    pub(in super::super) const BLOCK_SIZE_BYTES: u16 = 3;
    /// u64.
    pub(in super::super) const SERVER_FLAGS: u16 = 5;
    /// [`SOCKET_ITEM`]s.
    pub(in super::super) const SOCKETS: u16 = 7;
    /// u64, seconds.
    pub(in super::super) const DEAD_CONNECTION_TIMEOUT: u16 = 8;
    /// [`DEVICE_ITEM`]s.
    pub(in super::super) const DEVICE_LIST: u16 = 9;
    /// A string, since Linux 5.14.
    pub(in super::super) const BACKEND_IDENTIFIER: u16 = 10;
    /// In a list of sockets: a [`SOCKET_FD`].
    pub(in super::super) const SOCKET_ITEM: u16 = 1;
    /// u32.
    pub(in super::super) const SOCKET_FD: u16 = 1;
    /// In a list of devices: a [`DEVICE_INDEX`] and more.
    pub(in super::super) const DEVICE_ITEM: u16 = 1;
    /// u32.
    pub(in super::super) const DEVICE_INDEX: u16 = 1;
}

/// A message to the kernel.
pub(super) struct Message(Vec<u8>);

impl Message {
    /// `command` for a family, without attributes.
    pub(super) fn new(family: u16, command: u8) -> Self {
        let mut bytes = vec![0; HEAD_BYTES];
        bytes[4..6].copy_from_slice(&family.to_ne_bytes());
        bytes[6..8].copy_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
        bytes[16] = command;
        bytes[17] = 1;
        Self(bytes)
    }

    /// With one more attribute.
    pub(super) fn with(mut self, kind: u16, payload: &[u8]) -> Self {
        put(&mut self.0, kind, payload);
        self
    }

    /// With one more attribute that has a single one as its payload, which has a single one, too.
    pub(super) fn with_nested(self, kind: u16, item: u16, inner: u16, payload: &[u8]) -> Self {
        let (mut outer, mut list) = (Vec::new(), Vec::new());
        put(&mut outer, inner, payload);
        put(&mut list, item | NESTED, &outer);
        self.with(kind | NESTED, &list)
    }

    /// The message as the `sequence`-th one.
    fn bytes(mut self, sequence: u32) -> Vec<u8> {
        // Some hundred bytes.
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

fn put(to: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    let len = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    to.extend_from_slice(&len.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(payload);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// The attributes in `bytes`, up to the first malformed one.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & !MARKS;
        let payload = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The payload of the first attribute of `kind`.
pub(super) fn attribute_of(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, payload)| payload)
}

/// A number in the payload of an attribute.
pub(super) fn u32_of(payload: &[u8]) -> Option<u32> {
    payload.try_into().ok().map(u32::from_ne_bytes)
}

/// What a received message is.
#[derive(PartialEq, Eq, Debug)]
enum Received {
    /// The attributes of a reply.
    Reply(Vec<u8>),
    /// The end of the exchange.
    Done(Result<(), Errno>),
}

/// The messages with the given sequence number in what was received at one time.
fn messages(bytes: &[u8], sequence: u32) -> Result<Vec<Received>, Errno> {
    let (mut rest, mut found) = (bytes, Vec::new());
    while !rest.is_empty() {
        let word = |at: usize| rest.get(at..at + 4).and_then(u32_of).ok_or(Errno::EPROTO);
        let len = word(0)? as usize;
        let kind = word(4)? as u16;
        let body = rest.get(16..len).ok_or(Errno::EPROTO)?;
        if word(8)? != sequence {
            // Of an earlier exchange that was given up.
        } else if kind == ACK {
            let error = body.get(..4).and_then(u32_of).ok_or(Errno::EPROTO)?.cast_signed();
            found.push(Received::Done(if error == 0 { Ok(()) } else { Err(Errno(error.saturating_neg())) }));
        } else {
            found.push(Received::Reply(body.get(4..).ok_or(Errno::EPROTO)?.to_vec()));
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

/// A connection to the nbd driver.
pub(super) struct Netlink {
    socket: OwnedFd,
    /// The number of its family.
    pub(super) family: u16,
    sequence: u32,
}

impl Netlink {
    /// Finds the driver.
    ///
    /// # Errors
    /// `ENODEV` if it is not there, `EOPNOTSUPP` if it has no identifiers.
    pub(super) fn open() -> Result<Self, Errno> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(GENERIC));
        let socket = socket.map_err(of_rustix)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE)).map_err(of_rustix)?;
        let mut own = Self { socket, family: 0, sequence: 0 };
        let found = own.call(Message::new(CONTROL_FAMILY, GET_FAMILY).with(FAMILY_NAME, b"nbd\0"));
        let found = found.map_err(|error| if error == Errno::ENOENT { Errno::ENODEV } else { error })?;
        let id = attribute_of(&found, FAMILY_ID).and_then(|id| id.try_into().ok());
        own.family = id.map(u16::from_ne_bytes).ok_or(Errno::EPROTO)?;
        let max = attribute_of(&found, FAMILY_MAX_ATTRIBUTE).and_then(u32_of);
        if max.is_none_or(|max| max < u32::from(attribute::BACKEND_IDENTIFIER)) {
            return Err(Errno::EOPNOTSUPP);
        }
        Ok(own)
    }

    /// A message to the driver.
    pub(super) fn message(&self, command: u8) -> Message {
        Message::new(self.family, command)
    }

    /// Sends a message, and returns the attributes of its reply; none if there was only an acknowledgement.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn call(&mut self, message: Message) -> Result<Vec<u8>, Errno> {
        self.sequence += 1;
        let bytes = message.bytes(self.sequence);
        let sent = send(&self.socket, &bytes, SendFlags::empty()).map_err(of_rustix)?;
        if sent != bytes.len() {
            return Err(Errno::EPROTO);
        }
        let (mut buf, mut reply) = (vec![0; REPLY_BYTES_MAX], Vec::new());
        loop {
            let received = match recv(&self.socket, &mut buf, RecvFlags::TRUNC) {
                Err(rustix::io::Errno::INTR) => continue,
                received => received.map_err(of_rustix)?.1,
            };
            let bytes = buf.get(..received).ok_or(Errno::EOVERFLOW)?;
            for message in messages(bytes, self.sequence)? {
                match message {
                    Received::Reply(attributes) => reply = attributes,
                    Received::Done(result) => return result.map(|()| reply),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_as_the_kernel_reads_it() {
        let message = Message::new(0x1d, command::RECONFIGURE)
            .with(attribute::INDEX, &3_u32.to_ne_bytes())
            .with(attribute::BACKEND_IDENTIFIER, b"ab\0")
            .with_nested(
                attribute::SOCKETS,
                attribute::SOCKET_ITEM,
                attribute::SOCKET_FD,
                &9_u32.to_ne_bytes(),
            );
        let bytes = message.bytes(7);
        #[rustfmt::skip]
        let golden = [
            52, 0, 0, 0,  0x1d, 0, 5, 0,  7, 0, 0, 0,  0, 0, 0, 0,  3, 1, 0, 0,
            8, 0, 1, 0,  3, 0, 0, 0,
            7, 0, 10, 0,  b'a', b'b', 0, 0,
            16, 0, 7, 0x80,  12, 0, 1, 0x80,  8, 0, 1, 0,  9, 0, 0, 0,
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(bytes, golden);
        }
        let found: Vec<(u16, &[u8])> = attributes(&bytes[HEAD_BYTES..]).collect();
        assert_eq!((found.len(), found[1]), (3, (10, &b"ab\0"[..])));
        let item = attribute_of(found[2].1, attribute::SOCKET_ITEM).expect("an item");
        assert_eq!(attribute_of(item, attribute::SOCKET_FD).and_then(u32_of), Some(9));
        assert_eq!(attribute_of(item, attribute::INDEX + 1), None);
    }

    fn received(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Message::new(kind, 0).bytes(sequence);
        bytes.truncate(16);
        bytes.extend_from_slice(body);
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_reply_and_its_acknowledgement() {
        let reply = received(0x1d, 2, &[1, 1, 0, 0, 8, 0, 1, 0, 5, 0, 0, 0]);
        let ack = |error: i32| received(ACK, 2, &error.to_ne_bytes());
        let both = [reply.clone(), ack(0)].concat();
        let attributes = reply[HEAD_BYTES..].to_vec();
        assert_eq!(messages(&both, 2), Ok(vec![Received::Reply(attributes), Received::Done(Ok(()))]));
        assert_eq!(messages(&ack(-16), 2), Ok(vec![Received::Done(Err(Errno::EBUSY))]));
        assert_eq!(messages(&both, 3), Ok(Vec::new()), "another exchange");
        assert_eq!(messages(&ack(i32::MIN), 2), Ok(vec![Received::Done(Err(Errno(i32::MAX)))]));
    }

    #[test]
    fn nonsense_ends_without_harm() {
        let reply = received(0x1d, 2, &[1, 1, 0, 0, 8, 0, 1, 0, 5, 0, 0, 0]);
        for end in 1..reply.len() {
            assert_eq!(messages(&reply[..end], 2), Err(Errno::EPROTO), "{end}");
        }
        let mut short = reply.clone();
        short[..4].copy_from_slice(&8_u32.to_ne_bytes());
        assert_eq!(messages(&short, 2), Err(Errno::EPROTO));
        for bad in [&[3, 0, 1, 0][..], &[9, 0, 1, 0, 1], &[0, 0, 0, 0], &[8]] {
            assert_eq!(attributes(bad).count(), 0, "{bad:?}");
        }
    }
}
