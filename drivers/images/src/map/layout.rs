//! What a format says of its tables.

use super::{Allocator, HostOffset};

/// Where things are in an image of two levels of tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Clusters have 2^n bytes.
    pub cluster_bits: u32,
    /// Tables have 2^n entries.
    pub table_bits: u32,
    /// Where the root is in the file. Where all tables are at fixed places there is none in the file, and nothing is
    /// written there.
    pub root_at: HostOffset,
}

/// Bytes of an entry of a table, and of the root.
pub(crate) const ENTRY_BYTES: u64 = 8;

impl Geometry {
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
    /// Entries of the root: how many tables there can be.
    pub fn root_entries(&self) -> u64 {
        self.size_bytes.div_ceil(self.table_span())
    }
    /// Where the root ends in the file.
    pub fn root_end(&self) -> HostOffset {
        self.root_at + self.root_entries() * ENTRY_BYTES
    }
    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.size_bytes.div_ceil(self.cluster_bytes())
    }

    /// Above every byte that an image can use, when `file_bytes` of its file are used or lost: no crash leaves a
    /// reference further out.
    pub(super) fn reach(&self, file_bytes: u64) -> HostOffset {
        let tables = self.root_entries() * self.table_bytes().next_multiple_of(self.cluster_bytes());
        let all = self.clusters() * self.cluster_bytes() + tables + (1 << 20);
        HostOffset(file_bytes.max(self.root_end().0).saturating_add(all))
    }
}

/// What an entry of a table says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// Nothing: the backing file shows, or zeros.
    Unmapped,
    /// Where the cluster is in the file.
    Plain(HostOffset),
    /// It is held compressed.
    Compressed(Compressed),
}

/// A run of compressed bytes: raw deflate of one cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Compressed {
    /// Where they begin in the file.
    pub offset: HostOffset,
    /// Length in bytes.
    pub len: u64,
}

/// The tables of a format. Entries are numbers of 64 bits, big endian in the file; 0 says that nothing is mapped.
pub trait Layout: 'static {
    /// What a table is called in messages.
    const TABLE: &'static str;
    /// Where new clusters go.
    type Allocator: Allocator;

    /// What an entry of a table says.
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

    /// Tables take whole clusters, as everything else does.
    #[test]
    fn a_disk_that_is_full_lies_within_reach() {
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
