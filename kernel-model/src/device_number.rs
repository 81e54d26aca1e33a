//! Numbers of block devices: what a toolstack's script tells the kernel's back end about a device.

use crate::gendisk::Gendisk;
use crate::process::Kernel;
use std::fmt;
use tap_host::NbdIndex;

const NBD_MAJOR: u32 = 43;
/// Minors of an nbd device: the disk's, and those of its partitions.
const NBD_MINORS: u32 = 32;
/// Linux gives blktap2 modules any major number that is free.
const TAP_MAJOR: u32 = 253;

/// Major and minor number of a block device. Shown in hexadecimal, as scripts write them to xenstore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceNumber {
    major: u32,
    minor: u32,
}

impl DeviceNumber {
    /// That of a whole device of the nbd driver.
    pub fn of_nbd(index: NbdIndex) -> Self {
        Self { major: NBD_MAJOR, minor: index.0 * NBD_MINORS }
    }

    /// That of a device of a blktap2 module.
    pub fn of_tap(minor: u32) -> Self {
        Self { major: TAP_MAJOR, minor }
    }

    /// As it was shown; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        let number = |digits| u32::from_str_radix(digits, 16).ok();
        Some(Self { major: number(major)?, minor: number(minor)? })
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}", self.major, self.minor)
    }
}

impl Kernel {
    /// The whole block device with this number, if there is one.
    pub fn block_device(&self, number: DeviceNumber) -> Option<Gendisk> {
        match number.major {
            NBD_MAJOR if number.minor.is_multiple_of(NBD_MINORS) => {
                Some(self.nbd_disk(NbdIndex(number.minor / NBD_MINORS)))
            }
            TAP_MAJOR => self.tap_module()?.disk(number.minor),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_are_written() {
        let third = DeviceNumber::of_nbd(NbdIndex(3));
        assert_eq!(third.to_string(), "2b:60");
        assert_eq!(DeviceNumber::parse("2b:60"), Some(third));
        assert_eq!(DeviceNumber::parse("fd:1"), Some(DeviceNumber::of_tap(1)));
        for bad in ["", "2b", "2b:", ":1", "2b:60 ", "/dev/nbd3"] {
            assert_eq!(DeviceNumber::parse(bad), None, "{bad}");
        }
    }
}
