//! The metadata of a format: how to read it, and where to damage it.

use super::ImageShape;
use crate::check::{Invariant, Oracle, is_broken};
use kernel_model::Content;
use std::ops::RangeInclusive;

/// The metadata of a format, parsed from the bytes alone.
pub trait Metadata: Sync {
    /// Whether a file that begins with `head` has the magic of this format.
    fn recognises(&self, head: &[u8]) -> bool;

    /// Cluster sizes that the format permits, in bytes as powers of two.
    fn cluster_bits(&self) -> RangeInclusive<u32>;

    /// Numbers of entries per table that the format permits, as powers of two.
    fn table_bits(&self) -> RangeInclusive<u32>;

    /// Whether clusters may be compressed.
    fn compresses(&self) -> bool;

    /// Whether some programs extend the header, with a checksum that others do not maintain.
    fn extends(&self) -> bool {
        false
    }

    /// Parses all metadata.
    ///
    /// # Errors
    /// The first broken invariant.
    fn walk(&self, content: &Content) -> Result<ImageMap, Broken>;

    /// The places of the fields of `image`, which was made with `shape`.
    fn places(&self, image: Bytes<'_>, shape: &ImageShape) -> Places;

    /// A table entry that differs from those of plain clusters, made of two numbers; any entry if the format has only
    /// one kind.
    fn odd_entry(&self, cluster_bits: u32, number: u64, place: u64) -> u64;

    /// The contents of the header of `image`, valid or not.
    fn claims(&self, image: Bytes<'_>) -> Claims;

    /// The table entry of a cluster of `image`, read without any checks.
    fn claimed(&self, image: Bytes<'_>, cluster: u64) -> Claimed;
}

/// The `choices` that are in `range`; others become the nearest value in it.
pub fn fitting(range: &RangeInclusive<u32>, choices: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = Vec::new();
    for choice in choices.iter().map(|choice| *choice.clamp(range.start(), range.end())) {
        if !all.contains(&choice) {
            all.push(choice);
        }
    }
    all
}

/// Places where damage matters, in bytes of the file.
#[derive(Clone, Debug)]
pub struct Places {
    /// Offset and width of each field of the header.
    pub fields: &'static [(usize, usize)],
    /// Offset of the root that contains the tables' offsets, and its entries; no entries if tables are at fixed
    /// places.
    pub root: (u64, u64),
    /// Offsets of the tables.
    pub tables: Vec<u64>,
    /// Entries of a table.
    pub table_entries: u64,
    /// Bytes in a cluster, as a power of two.
    pub cluster_bits: u32,
}

/// The contents of the header of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claims {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes in a cluster, as a power of two; `None` if the header is unusable.
    pub cluster_bits: Option<u32>,
    /// It has a backing file.
    pub has_backing: bool,
}

/// The contents of a table entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claimed {
    /// Nothing is mapped.
    Unmapped,
    /// The cluster is at this byte of the file.
    At(u64),
    /// Compressed bytes: offset and length.
    Compressed(u64, u64),
}

/// The bytes of a file; zeros past its end.
#[derive(Clone, Copy)]
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    /// Fills `out` with the bytes from `at` on.
    pub fn window(self, at: u64, out: &mut [u8]) {
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(self.0.len());
        let len = out.len().min(self.0.len() - from);
        out[..len].copy_from_slice(&self.0[from..from + len]);
    }

    /// The 64-bit big-endian number at byte `at`.
    pub fn number(self, at: u64) -> u64 {
        let mut raw = [0; 8];
        self.window(at, &mut raw);
        u64::from_be_bytes(raw)
    }

    /// The byte at `at`.
    pub fn byte(self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }
}

/// The parsed metadata of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageMap {
    /// Bytes in a cluster, as a power of two.
    pub cluster_bits: u32,
    /// Entries in a table, as a power of two.
    pub table_bits: u32,
    /// Bytes of a table.
    pub table_bytes: u64,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The byte offset of each cluster in the file; 0 if unmapped. Entries with [`COMPRESSED`] are compressed.
    pub entries: Vec<u64>,
    /// Compressed clusters in order of their extents: number, byte offset and length of the extent.
    pub packed: Vec<(u64, u64, u64)>,
    /// Byte offsets of tables; 0 is absent.
    pub tables: Vec<u64>,
    /// Offset of the root that contains the tables' offsets.
    pub root_at: u64,
    /// Name of the backing file.
    pub backing: Option<String>,
    /// Number of host clusters of the file that nothing refers to.
    pub leaked: u64,
    /// How many of them are between something that is referred to and the end of its block of 4096 bytes.
    pub padding: u64,
    /// End of the last object that is referred to, in bytes of the file.
    pub end: u64,
    /// Number of mapped data clusters, compressed ones included.
    pub mapped: u64,
}

/// The broken invariant, and what is wrong with the metadata.
pub type Broken = (Invariant, String);

/// What no driver may make, but no disk loses anything by: an entry past its end, and compressed clusters that share
/// bytes, which are never overwritten in place. A check of any image tolerates them.
pub(super) const PAST_THE_END: &str = "past the end of the disk";
pub(super) const PACKED_TWICE: &str = "are compressed extents that overlap";

/// Whether a check of images may tolerate it.
pub fn is_tolerable(broken: &Broken) -> bool {
    [PAST_THE_END, PACKED_TWICE].iter().any(|reason| broken.1.ends_with(reason))
}

impl ImageMap {
    /// The host byte offset of a plain cluster.
    pub fn host_offset(&self, cluster: u64) -> Option<u64> {
        let entry = *self.entries.get(cluster as usize)?;
        (entry != 0 && entry & COMPRESSED == 0).then_some(entry)
    }

    /// Offset and length in bytes of a compressed cluster's extent.
    pub fn compressed(&self, cluster: u64) -> Option<(u64, u64)> {
        let at = self.packed.binary_search_by_key(&cluster, |packed| packed.0).ok()?;
        Some((self.packed[at].1, self.packed[at].2))
    }

    /// Inflates compressed clusters: all, or a sample if there are more than [`INFLATED_MAX`].
    pub(super) fn inflate_some(&self, content: &Content) -> Result<(), Broken> {
        let mut bytes = vec![0; if self.packed.is_empty() { 0 } else { 1 << self.cluster_bits }];
        for (cluster, ..) in self.packed.iter().step_by(self.packed.len() / INFLATED_MAX + 1) {
            self.read_cluster(content, *cluster, &mut bytes)?;
        }
        Ok(())
    }

    /// Reads a cluster of the guest's view that the image itself holds; `None` if it comes from the backing file.
    ///
    /// # Errors
    /// A compressed cluster that does not inflate to a whole cluster.
    pub fn read_cluster(
        &self,
        content: &Content,
        cluster: u64,
        out: &mut [u8],
    ) -> Result<Option<()>, Broken> {
        if let Some(offset) = self.host_offset(cluster) {
            content.pages.read(offset, out);
            return Ok(Some(()));
        }
        let Some((offset, len)) = self.compressed(cluster) else { return Ok(None) };
        let mut packed = vec![0; len as usize];
        content.pages.read(offset, &mut packed);
        let mut inflate = flate2::Decompress::new(false);
        let done = inflate.decompress(&packed, out, flate2::FlushDecompress::Finish);
        let whole = done.is_ok() && inflate.total_out() == out.len() as u64;
        if !whole && !is_broken(Oracle::NothingInflated) {
            let inflated = inflate.total_out();
            let text = format!("compressed cluster {cluster} at {offset:#x} inflates to {inflated} bytes");
            return Err((Invariant::Q3, text));
        }
        Ok(Some(()))
    }
}

/// Marks entries of compressed clusters.
pub const COMPRESSED: u64 = 1 << 63;

/// Maximum number of compressed clusters that are inflated.
const INFLATED_MAX: usize = 64;
