//! Offsets on a disk and in the file of its image, as types that cannot be mixed up.

use std::ops::{Add, AddAssign, Sub};

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub u64);

        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }
        impl AddAssign<u64> for $name {
            fn add_assign(&mut self, bytes: u64) {
                self.0 += bytes;
            }
        }
        impl Sub for $name {
            type Output = u64;
            fn sub(self, from: Self) -> u64 {
                self.0 - from.0
            }
        }
    };
}

offset! {
    /// Byte offset on the disk, as the guest sees it.
    GuestOffset
}
offset! {
    /// Byte offset in the file of an image. In tables of offsets 0 means none: the header is there.
    HostOffset
}
offset! {
    /// Number of a cluster of the disk.
    GuestCluster
}
