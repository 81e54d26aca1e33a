//! Newtypes for quantities and identifiers: mixing sectors with bytes, or ports with grants, does not compile.

use std::fmt;

/// Bytes in a sector. blkif counts in units of 512 whatever the device's logical block size.
pub const SECTOR_BYTES: u64 = 512;

/// A sector of a virtual disk, in units of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Sector(pub u64);

/// `count` sectors from `start`; may be empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SectorRange {
    /// First sector.
    pub start: Sector,
    /// Number of sectors.
    pub count: u32,
}

impl SectorRange {
    /// `count` sectors from `start`.
    pub fn new(start: u64, count: u32) -> Self {
        Self { start: Sector(start), count }
    }
    /// The first sector past the range, or `None` above 2^64.
    pub fn end(self) -> Option<u64> {
        self.start.0.checked_add(u64::from(self.count))
    }
    /// Length in bytes.
    pub fn len_bytes(self) -> u64 {
        u64::from(self.count) * SECTOR_BYTES
    }
    /// Whether the range lies within a disk of `size_sectors`.
    pub fn fits(self, size_sectors: u64) -> bool {
        self.end().is_some_and(|end| end <= size_sectors)
    }
    /// Whether both ranges share a sector.
    pub fn overlaps(self, other: Self) -> bool {
        let (a, b) = (self.start.0, other.start.0);
        a < b.saturating_add(u64::from(other.count)) && b < a.saturating_add(u64::from(self.count))
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start.0, self.count)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub $inner);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number!(
    /// A Xen domain. 0 is the control domain.
    DomId(u16), "dom"
);
number!(
    /// An event channel port, meaningful within one domain.
    Port(u32), "port"
);
number!(
    /// An entry of a domain's grant table.
    GrantRef(u32), "gref"
);
number!(
    /// A virtual block device's number as it appears in xenstore (202 << 8 is xvda).
    VbdId(u32), "vbd"
);
