//! Why a blktap2 device could not be served.

use tap_host::Errno;

/// Why a device could not be served.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TapError {
    /// There is no memory for a single request.
    #[error("take memory for the device: {0}; give more (--memory)")]
    Memory(Errno),
    /// There is no module.
    #[error(
        "find a blktap2 module in the kernel: {0}; load it (modprobe blktap), or use the nbd driver (--via nbd)"
    )]
    NoModule(Errno),
    /// No device can be reserved.
    #[error("reserve a blktap2 device: {0}")]
    Allocate(Errno),
    /// The page that says whose device it is.
    #[error("own {name}, the record of the device: {error}")]
    Record {
        /// The page's name.
        name: String,
        /// Why.
        error: Errno,
    },
    /// The name by which the kernel knows whose device it is.
    #[error("name blktap2 device {minor}: {error}")]
    Name {
        /// The device.
        minor: u32,
        /// Why.
        error: Errno,
    },
    /// The module takes memory out of the process.
    #[error(
        "work with this blktap2 module: it is blktap-dkms, which unmaps memory of the process that may be another's by then; use the nbd driver (--via nbd)"
    )]
    Unmaps,
    /// The module does not know the call that makes a device.
    #[error(
        "work with this blktap2 module: it is of Linux 3 or older, and lacks ioctl 208; use the nbd driver (--via nbd)"
    )]
    TooOld,
    /// Its ring.
    #[error("open the ring of blktap2 device {minor}: {error}")]
    Open {
        /// The device.
        minor: u32,
        /// Why.
        error: Errno,
    },
    /// The block device.
    #[error("make block device {path}: {error}")]
    Create {
        /// Its path.
        path: String,
        /// Why.
        error: Errno,
    },
    /// Nobody can say whether the device is in use.
    #[error("remove block device {path}: {error}; its users get errors until they close it")]
    Remove {
        /// Its path.
        path: String,
        /// Why.
        error: Errno,
    },
    /// The kernel broke the protocol.
    #[error("serve {path}: {why}; its users get errors until they close it")]
    Refused {
        /// Its path.
        path: String,
        /// What the kernel did.
        why: &'static str,
    },
}

impl TapError {
    /// What the host answered, if that was it.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Memory(error) | Self::NoModule(error) | Self::Allocate(error) => Some(*error),
            Self::Record { error, .. }
            | Self::Name { error, .. }
            | Self::Open { error, .. }
            | Self::Create { error, .. }
            | Self::Remove { error, .. } => Some(*error),
            Self::Unmaps => Some(Errno::EOPNOTSUPP),
            Self::TooOld => Some(Errno::ENOTTY),
            Self::Refused { .. } => None,
        }
    }
}
