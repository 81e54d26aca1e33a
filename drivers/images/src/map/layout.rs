//! The tables of a format.

use super::{Allocator, HostOffset};
use tap_host::SECTOR_BYTES;

/// The sizes and places in an image with two levels of tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Clusters have 2^n bytes.
    pub cluster_bits: u32,
    /// Tables have 2^n entries, at least 2^6: whole sectors.
    pub table_bits: u32,
    /// Offset of the root in the file. A format with all tables at fixed places has no root in the file, and writes
    /// nothing there.
    pub root_at: HostOffset,
}

/// Bytes of an entry of a table or the root.
pub(crate) const ENTRY_BYTES: u64 = 8;

impl Geometry {
    /// Whole sectors of the disk: QEMU does not show a part of a sector at its end, either.
    pub fn disk_sectors(&self) -> u64 {
        self.size_bytes / SECTOR_BYTES
    }
    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// Entries of a table.
    pub fn table_entries(&self) -> usize {
        1 << self.table_bits
    }
    /// Bytes of a table in the file.
    pub fn table_bytes(&self) -> u64 {
        ENTRY_BYTES << self.table_bits
    }
    /// Bytes of the disk that one table maps.
    pub fn table_span(&self) -> u64 {
        1 << (self.cluster_bits + self.table_bits)
    }
    /// Entries of the root, one for each possible table.
    pub fn root_entries(&self) -> u64 {
        self.size_bytes.div_ceil(self.table_span())
    }
    /// The end of the root in the file.
    pub fn root_end(&self) -> HostOffset {
        self.root_at + self.root_entries() * ENTRY_BYTES
    }
    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.size_bytes.div_ceil(self.cluster_bytes())
    }

    /// An upper bound of every byte that an image can use when `file_bytes` of its file are used or lost: no crash
    /// leaves a reference past it.
    pub(super) fn reach(&self, file_bytes: u64) -> HostOffset {
        let tables = self.root_entries() * self.table_bytes().next_multiple_of(self.cluster_bytes());
        let all = self.clusters() * self.cluster_bytes() + tables + (1 << 20);
        HostOffset(file_bytes.max(self.root_end().0).saturating_add(all))
    }
}

/// The meaning of a table entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// Not mapped: reads as the backing file, or zeros.
    Unmapped,
    /// Mapped to this cluster of the file.
    Plain(HostOffset),
    /// Stored compressed.
    Compressed(Compressed),
}

/// A run of compressed bytes: raw deflate of one cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Compressed {
    /// Offset in the file.
    pub offset: HostOffset,
    /// Length in bytes.
    pub len: u64,
}

/// The tables of a format. Entries are numbers of 64 bits, big endian in the file; 0 is unmapped.
pub trait Layout: 'static {
    /// The name of a table in messages.
    const TABLE: &'static str;
    /// Places new clusters.
    type Allocator: Allocator;

    /// Decodes a table entry.
    fn mapping(entry: u64, geometry: &Geometry) -> Mapping;

    /// The entry that maps a whole cluster to the one at `host` in the file.
    fn entry(host: HostOffset) -> u64;
}

/// Big-endian entries as numbers.
pub fn decode_entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b))
}

/// Numbers as big-endian entries.
pub(super) fn encode_entries(bytes: &mut [u8], numbers: impl IntoIterator<Item = u64>) {
    for (to, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
        *to = number.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables take whole clusters, like everything else.
    #[test]
    fn a_full_disk_is_within_reach() {
        for (cluster_bits, table_bits) in [(16, 6), (9, 13), (12, 9)] {
            let geometry =
                Geometry { size_bytes: 4 << 30, cluster_bits, table_bits, root_at: HostOffset(4096) };
            let cluster = geometry.cluster_bytes();
            let front = geometry.root_end().0.next_multiple_of(cluster);
            let tables = geometry.root_entries() * geometry.table_bytes().next_multiple_of(cluster);
            let end = front + tables + geometry.clusters() * cluster;
            assert!(end <= geometry.reach(geometry.root_end().0).0, "{cluster_bits} {table_bits}");
        }
    }
}
