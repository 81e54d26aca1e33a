//! The descriptor of a connection: xenstored's socket, or the kernel's device.
//!
//! | | socket | /dev/xen/xenbus |
//! |---|---|---|
//! | a write | may take a part; the rest waits for room | takes a whole message in one call, or refuses it |
//! | waits in the call | never | for xenstored, when it sets or removes a watch |
//! | polls as writable | yes | never |
//! | payload, bytes | 4096 | 4080: with its header a message fits in a page |
//! | requests at a time | any | one, see below |
//!
//! So writes to the device are made by another thread, without a poll before them. Reads work the same way for both.
//!
//! While a watch is set or removed, Linux 6.1 holds a lock of the open device that it also needs to hand out the answer
//! to an earlier request. If there is one, the kernel's only thread that talks to xenstored waits forever, and with it
//! the whole domain. Xen's own client makes one request at a time, so anything else is untested on many kernels.

use crate::files::{blocking, errno, of_rustix};
use crate::sockets::connect_unix;
use crate::watch::watch;
use rustix::fs::{FileType, Mode, OFlags, open, stat};
use rustix::net::SendFlags;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tap_abi::xenstore::{MessageHeader, PAYLOAD_BYTES_MAX};
use tap_host::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An open connection.
pub(super) enum Link {
    /// A stream socket of xenstored.
    Socket(AsyncFd<OwnedFd>),
    /// The kernel's device, which forwards messages.
    Device {
        /// Polled for arriving data.
        read: AsyncFd<OwnedFd>,
        /// The same device, for a thread that may outlive the connection.
        write: Arc<OwnedFd>,
    },
}

/// What may be sent over a link.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most bytes of payload of one message.
    pub(super) payload_bytes: usize,
    /// A request is sent when the previous one has its answer.
    pub(super) one_at_a_time: bool,
}

/// Why a message was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unsent {
    /// This one was refused; the next may be accepted.
    Refused(Errno),
    /// Nothing more can be sent.
    Lost(Errno),
}

impl Link {
    /// Opens the socket or device called `place`.
    ///
    /// # Errors
    /// As stat(2), connect(2) and open(2); `ENODEV` if it is neither socket nor device.
    pub(super) async fn open(place: &str) -> Result<Self, Errno> {
        let mode = stat(place).map_err(of_rustix)?.st_mode;
        match FileType::from_raw_mode(mode) {
            FileType::Socket => {
                let socket = connect_unix(place).await?;
                Ok(Self::Socket(watch(socket, Interest::READABLE | Interest::WRITABLE)?))
            }
            FileType::CharacterDevice => {
                let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
                Self::device(open(place, flags, Mode::empty()).map_err(of_rustix)?)
            }
            _ => Err(Errno::ENODEV),
        }
    }

    /// A link over a descriptor that takes one message per write, and whose reads do not block.
    pub(super) fn device(device: OwnedFd) -> Result<Self, Errno> {
        let write = Arc::new(device.try_clone().map_err(|e| errno(&e))?);
        // A device that cannot be polled, like /dev/null, is refused with `EPERM`, although permissions would not help.
        let refused = |error| if error == Errno::EPERM { Errno::ENODEV } else { error };
        Ok(Self::Device { read: watch(device, Interest::READABLE).map_err(refused)?, write })
    }

    /// What may be sent.
    pub(super) fn limits(&self) -> Limits {
        match self {
            Self::Socket(_) => Limits { payload_bytes: PAYLOAD_BYTES_MAX, one_at_a_time: false },
            Self::Device { .. } => {
                Limits { payload_bytes: PAYLOAD_BYTES_MAX - MessageHeader::BYTES, one_at_a_time: true }
            }
        }
    }

    /// Waits for bytes and puts them into `buffer`; returns the count, 0 at the end of the stream.
    ///
    /// # Errors
    /// As read(2).
    pub(super) async fn recv(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let (Self::Socket(fd) | Self::Device { read: fd, .. }) = self;
        loop {
            let mut ready = fd.readable().await.map_err(|e| errno(&e))?;
            match rustix::io::read(fd, &mut *buffer).map_err(of_rustix) {
                Ok(count) => return Ok(count),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a whole message.
    ///
    /// # Errors
    /// Whether the connection survives, and the error.
    pub(super) async fn send(&self, message: Vec<u8>) -> Result<(), Unsent> {
        match self {
            Self::Socket(fd) => send_all(fd, &message).await.map_err(Unsent::Lost),
            Self::Device { write, .. } => {
                let (fd, len) = (Arc::clone(write), message.len());
                let count = blocking(move || write_once(&fd, &message)).await.map_err(Unsent::Refused)?;
                // The rest would be taken for the head of the next message.
                if count == len { Ok(()) } else { Err(Unsent::Lost(Errno::EIO)) }
            }
        }
    }
}

async fn send_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await.map_err(|e| errno(&e))?;
        match rustix::net::send(fd, bytes, SendFlags::NOSIGNAL).map_err(of_rustix) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_once(fd: &OwnedFd, message: &[u8]) -> Result<usize, Errno> {
    loop {
        match rustix::io::write(fd, message).map_err(of_rustix) {
            Err(Errno::EINTR) => {}
            written => return written,
        }
    }
}
