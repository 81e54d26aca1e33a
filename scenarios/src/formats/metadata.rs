//! What a format has beside the bytes of the disk: how it is read, and where it can be damaged.

use super::ImageShape;
use crate::check::{Invariant, Oracle, is_broken};
use kernel_model::Content;
use std::ops::RangeInclusive;

/// The metadata of a format, read from the bytes alone.
pub trait Metadata: Sync {
    /// Whether a file that begins with `head` calls itself an image of this format.
    fn recognises(&self, head: &[u8]) -> bool;

    /// Sizes that clusters may have, in bytes as powers of two.
    fn cluster_bits(&self) -> RangeInclusive<u32>;

    /// Entries that tables may have, as powers of two.
    fn table_bits(&self) -> RangeInclusive<u32>;

    /// Whether clusters may be held compressed.
    fn compresses(&self) -> bool;

    /// What is in front of all clusters may be filled up to a multiple of so many bytes.
    fn front_align_bytes(&self) -> u64;

    /// Reads all of it.
    ///
    /// # Errors
    /// The first broken invariant.
    fn walk(&self, content: &Content) -> Result<ImageMap, Broken>;

    /// Where the fields are of `image`, which was made with `shape`.
    fn places(&self, image: Bytes<'_>, shape: &ImageShape) -> Places;

    /// An entry of a table that is unlike those of plain clusters, made of two numbers; any entry where there is only
    /// one kind.
    fn odd_entry(&self, cluster_bits: u32, number: u64, place: u64) -> u64;

    /// What the header of `image` says, in order or not.
    fn claims(&self, image: Bytes<'_>) -> Claims;

    /// What the tables of `image` say of a cluster, by no rule but how entries are found.
    fn claimed(&self, image: Bytes<'_>, cluster: u64) -> Claimed;
}

/// Those of `choices` that are in `range`; what is not is as near as can be.
pub fn fitting(range: &RangeInclusive<u32>, choices: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = Vec::new();
    for choice in choices.iter().map(|choice| *choice.clamp(range.start(), range.end())) {
        if !all.contains(&choice) {
            all.push(choice);
        }
    }
    all
}

/// Where damage matters, in bytes of the file.
#[derive(Clone, Debug)]
pub struct Places {
    /// Offset and width of each field of the header.
    pub fields: &'static [(usize, usize)],
    /// Offset of the root that names the tables, and how many entries it has; none where tables are at fixed places.
    pub root: (u64, u64),
    /// Offsets of the tables.
    pub tables: Vec<u64>,
    /// Entries of a table.
    pub table_entries: u64,
    /// Bytes in a cluster, as a power of two.
    pub cluster_bits: u32,
}

/// What the header of an image says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claims {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes in a cluster, as a power of two; `None` where the rest says nothing.
    pub cluster_bits: Option<u32>,
    /// It has a backing file.
    pub has_backing: bool,
}

/// What an entry of a table says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claimed {
    /// Nothing is mapped.
    Unmapped,
    /// The cluster is at this byte of the file.
    At(u64),
    /// Compressed bytes: offset and length.
    Compressed(u64, u64),
}

/// The bytes of a file; zeros behind its end.
#[derive(Clone, Copy)]
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    /// Fills `out` from byte `at` on.
    pub fn window(self, at: u64, out: &mut [u8]) {
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(self.0.len());
        let len = out.len().min(self.0.len() - from);
        out[..len].copy_from_slice(&self.0[from..from + len]);
    }

    /// The number at byte `at`, of 64 bits, big endian.
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

/// What the bytes say.
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
    /// The byte offset of each cluster in the file; 0 is unmapped. [`COMPRESSED`] marks those that are.
    pub entries: Vec<u64>,
    /// Compressed clusters in their order: number, byte offset and length of the extent.
    pub packed: Vec<(u64, u64, u64)>,
    /// Byte offsets of tables; 0 is absent.
    pub tables: Vec<u64>,
    /// Where the root begins that names the tables.
    pub root_at: u64,
    /// Name of the backing file.
    pub backing: Option<String>,
    /// Host clusters of the file that nothing refers to.
    pub leaked: u64,
    /// Where the last thing ends that is referred to, in bytes of the file.
    pub end: u64,
    /// Data clusters that are mapped (compressed ones too).
    pub mapped: u64,
}

/// What is wrong with the metadata.
pub type Broken = (Invariant, String);

impl ImageMap {
    /// The host byte offset of a cluster that is stored plainly.
    pub fn host_offset(&self, cluster: u64) -> Option<u64> {
        let entry = *self.entries.get(cluster as usize)?;
        (entry != 0 && entry & COMPRESSED == 0).then_some(entry)
    }

    /// Offset and length in bytes of a compressed cluster's extent.
    pub fn compressed(&self, cluster: u64) -> Option<(u64, u64)> {
        let at = self.packed.binary_search_by_key(&cluster, |packed| packed.0).ok()?;
        Some((self.packed[at].1, self.packed[at].2))
    }

    /// Inflates compressed clusters: at most [`INFLATED_MAX`], of more some.
    pub(super) fn inflate_some(&self, content: &Content) -> Result<(), Broken> {
        let mut bytes = vec![0; if self.packed.is_empty() { 0 } else { 1 << self.cluster_bits }];
        for (cluster, ..) in self.packed.iter().step_by(self.packed.len() / INFLATED_MAX + 1) {
            self.read_cluster(content, *cluster, &mut bytes)?;
        }
        Ok(())
    }

    /// Reads the guest's view of a cluster that the image itself holds; `None` where the backing file shows.
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

/// Compressed clusters that are inflated at most.
const INFLATED_MAX: usize = 64;
