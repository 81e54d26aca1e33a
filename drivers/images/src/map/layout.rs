//! What a format says of its tables.

use super::Allocator;

/// Where things are in an image of two levels of tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Geometry {
    /// Size of the disk in bytes.
    pub(crate) size_bytes: u64,
    /// Clusters have 2^n bytes.
    pub(crate) cluster_bits: u32,
    /// Tables have 2^n entries.
    pub(crate) table_bits: u32,
    /// Byte offset of the root in the file.
    pub(crate) root_at: u64,
}

/// Bytes of an entry of a table, and of the root.
pub(crate) const ENTRY_BYTES: u64 = 8;

impl Geometry {
    pub(crate) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// Entries of a table.
    pub(crate) fn table_entries(&self) -> usize {
        1 << self.table_bits
    }
    pub(crate) fn table_bytes(&self) -> u64 {
        ENTRY_BYTES << self.table_bits
    }
    /// Bytes of the disk that one table maps.
    pub(crate) fn table_span(&self) -> u64 {
        1 << (self.cluster_bits + self.table_bits)
    }
    pub(crate) fn root_entries(&self) -> u64 {
        self.size_bytes.div_ceil(self.table_span())
    }
    pub(crate) fn root_end(&self) -> u64 {
        self.root_at + self.root_entries() * ENTRY_BYTES
    }
    /// Clusters of the disk.
    pub(crate) fn clusters(&self) -> u64 {
        self.size_bytes.div_ceil(self.cluster_bytes())
    }
}

/// What an entry of a table says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mapping {
    Unmapped,
    /// Byte offset of the cluster.
    Plain(u64),
    Compressed(Compressed),
}

/// A run of compressed bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Compressed {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// The tables of a format. Entries are numbers of 64 bits, big endian in the file; 0 says that nothing is mapped.
pub(crate) trait Layout: 'static {
    /// What a table is called.
    const TABLE: &'static str;
    /// Where new clusters go.
    type Allocator: Allocator;

    /// What an entry of a table says.
    fn mapping(entry: u64, geometry: &Geometry) -> Mapping;

    /// The entry that maps a whole cluster to the one at byte `host` of the file.
    fn entry(host: u64) -> u64;
}

/// Big-endian entries as numbers.
pub(crate) fn decode_entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b))
}

/// Numbers as big-endian entries.
pub(super) fn encode_entries(bytes: &mut [u8], numbers: impl IntoIterator<Item = u64>) {
    for (to, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
        *to = number.to_be_bytes();
    }
}
