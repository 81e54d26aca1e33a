//! Block devices of the host's kernel that an NBD server serves: `/dev/nbd0` and the like.
//!
//! ```text
//!   a mount, a guest's back end ──► /dev/nbd0 ──► the kernel's nbd driver ══ stream ══► us: requests as in NBD's
//!                                                                                        transmission phase
//! ```
//!
//! The kernel is the client. It negotiates nothing: size and flags are stated when a device is attached. When the
//! stream ends without a disconnect, for example by our death, the device stays. The kernel keeps its requests, those
//! that were sent included, and sends them again on the stream of [`NbdDevices::reattach`].
//!
//! A device belongs to whoever knows its identifier, which the kernel compares. Linux has this since 5.14.

use crate::{Errno, Stream};
use std::fmt;
use std::future::Future;

/// The number of a device: 0 is `/dev/nbd0`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NbdIndex(pub u32);

impl fmt::Display for NbdIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/nbd{}", self.0)
    }
}

/// A device to attach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdConfig {
    /// Which one; without it any that is free.
    pub index: Option<NbdIndex>,
    /// Says whose it is: printable, at most 64 bytes.
    pub identifier: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What the server can do: the protocol's transmission flags.
    pub flags: u16,
    /// Most bytes of a read or write that the server takes, at least 4096.
    pub request_bytes: u32,
    /// How long the kernel keeps requests while nobody serves the device, in seconds, at least 1. After that it fails
    /// those that it has not sent yet.
    pub patience_s: u32,
}

/// A device that is attached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdDevice {
    /// Which one.
    pub index: NbdIndex,
    /// Whose it is; empty if whoever attached it has not said so.
    pub identifier: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// It may only be read.
    pub read_only: bool,
}

/// NBD block devices.
pub trait NbdDevices: Clone + 'static {
    /// Our end of a device's stream.
    type DeviceStream: Stream;
    /// A device that is held open.
    type Claim: NbdClaim;

    /// The devices that are attached, by number.
    ///
    /// # Errors
    /// `ENODEV` without the driver, `EOPNOTSUPP` if it is too old, `EACCES` or `EPERM`.
    fn attached(&self) -> impl Future<Output = Result<Vec<NbdDevice>, Errno>>;
    /// Attaches a device. It has requests as soon as someone opens it.
    ///
    /// # Errors
    /// As [`NbdDevices::attached`]; `EBUSY` if the device is in use, `EINVAL` for a number that is too high.
    fn attach(
        &self,
        config: &NbdConfig,
    ) -> impl Future<Output = Result<(NbdIndex, Self::DeviceStream), Errno>>;
    /// A new stream for the device `index` of `config.identifier`, whose stream has ended; `size_bytes` becomes its
    /// size. No request of the old stream may be carried out any more, except those that are already under way.
    ///
    /// The kernel says yes even if it has not noticed yet that the old stream has ended: the new one then ends at once.
    ///
    /// # Errors
    /// As [`NbdDevices::attached`]; `EINVAL` if the device is not attached, or is another's.
    fn reattach(
        &self,
        index: NbdIndex,
        config: &NbdConfig,
    ) -> impl Future<Output = Result<Self::DeviceStream, Errno>>;
    /// Takes the device away: its stream gets a disconnect and ends, and requests that are not answered fail. Nothing
    /// happens if it is not attached.
    ///
    /// # Errors
    /// As [`NbdDevices::attached`]; `EINVAL` if there is no such device.
    fn detach(&self, index: NbdIndex) -> impl Future<Output = Result<(), Errno>>;
    /// Has the kernel look for partitions, as it does when a device is opened. Someone must serve the device.
    ///
    /// # Errors
    /// Of opening it.
    fn look_for_partitions(&self, index: NbdIndex) -> impl Future<Output = Result<(), Errno>>;
    /// Opens the device in a way that others who need it for themselves, like mounts, exclude.
    ///
    /// # Errors
    /// `EBUSY` if it is mounted or the like; those of opening it.
    fn claim(&self, index: NbdIndex) -> impl Future<Output = Result<Self::Claim, Errno>>;
    /// Who else uses the device or its partitions, in words.
    fn users(&self, index: NbdIndex) -> impl Future<Output = Vec<String>>;
}

/// A device that is held open, until this is dropped.
pub trait NbdClaim: 'static {
    /// Makes durable what was written through the kernel's page cache.
    ///
    /// # Errors
    /// `EIO`.
    fn sync(&self) -> impl Future<Output = Result<(), Errno>>;
}
