//! What the testbed knows of image formats: models that share no code with the drivers.
//!
//! ```text
//!   a shape ─► make ─► bytes of an image       (no driver has written them)
//!   bytes, also of a crash ─► walk ─► ImageMap (what they say, or which invariant they break)
//! ```
//!
//! A format is one [`FormatModel`]. Scenarios and checks ask the model of the image at hand.

pub mod qcow;
mod raw;
mod real;

pub use real::{LoadedImage, RealImage, content_of};

use crate::check::{Invariant, Oracle, is_broken};
use crate::tag::Tag;
use kernel_model::{Content, PageMap};
use tap_host::SECTOR_BYTES;
use tap_images::{Format, ImageFormat};

/// The format of raw images.
pub const RAW: ImageFormat = ImageFormat::As(tap_images::raw::FORMAT);
/// The format of qcow images.
pub const QCOW: ImageFormat = ImageFormat::As(tap_images::qcow::FORMAT);

/// A format.
pub trait FormatModel: Sync {
    /// What it is.
    fn format(&self) -> Format;

    /// Makes an image of `shape`; also puts what its clusters hold into `view`, the guest's bytes.
    fn make(&self, shape: &ImageShape, view: &mut PageMap) -> Vec<u8>;

    /// Reads all metadata of `content`; `None` where the format has none.
    fn walk(&self, content: &Content) -> Option<Result<ImageMap, Broken>>;

    /// What is in front of all clusters may be filled up to a multiple of so many bytes.
    fn front_align_bytes(&self) -> u64;

    /// As [`FormatModel::walk`], and inflates compressed clusters.
    fn walk_whole(&self, content: &Content) -> Option<Result<ImageMap, Broken>> {
        Some(self.walk(content)?.and_then(|map| {
            map.inflate_some(content)?;
            Ok(map)
        }))
    }
}

/// All formats.
pub static ALL: [&dyn FormatModel; 2] = [&raw::Raw, &qcow::Qcow];

/// The model of `format`.
///
/// # Panics
/// Where the format of an image is to be found out: worlds name it.
pub fn of(format: ImageFormat) -> &'static dyn FormatModel {
    let found = ALL.iter().find(|model| ImageFormat::As(model.format()) == format);
    *found.unwrap_or_else(|| panic!("no model of images of the format {}", format.name()))
}

/// How a cluster is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// As it is.
    Plain,
    /// Deflated.
    Compressed,
}

/// An image to be made.
#[derive(Clone, Debug)]
pub struct ImageShape {
    /// Bytes in a cluster, as a power of two.
    pub cluster_bits: u32,
    /// Entries in a table, as a power of two.
    pub table_bits: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Name of the backing file.
    pub backing: Option<String>,
    /// Clusters that it holds, ascending.
    pub clusters: Vec<(u64, Stored)>,
    /// Writer's number in their tags.
    pub writer: u32,
}

/// Bytes of one cluster of layer `writer`: every sector tagged as write 0.
pub fn layer_cluster(writer: u32, cluster: u64, cluster_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; cluster_bytes];
    let sectors = cluster_bytes as u64 / SECTOR_BYTES;
    for (i, sector) in bytes.chunks_exact_mut(SECTOR_BYTES as usize).enumerate() {
        Tag { writer, op: 0, sector: cluster * sectors + i as u64 }.fill(sector, false);
    }
    bytes
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
    fn inflate_some(&self, content: &Content) -> Result<(), Broken> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_model_makes_shows_what_it_says_it_does() {
        for (model, cluster_bits) in ALL.iter().flat_map(|model| [9, 12, 16].map(|bits| (model, bits))) {
            let (plain, compressed) = (Stored::Plain, Stored::Compressed);
            let shape = ImageShape {
                cluster_bits,
                table_bits: 6,
                size: 8 << 20,
                backing: Some("base.raw".into()),
                clusters: vec![(0, plain), (3, compressed), (70, compressed), (90, plain)],
                writer: 7,
            };
            let mut view = PageMap::default();
            let file = model.make(&shape, &mut view);
            let content = content_of(&file);
            let map = model.walk_whole(&content).transpose().unwrap();
            for (cluster, _) in shape.clusters {
                let held = layer_cluster(7, cluster, 1 << cluster_bits);
                let at = cluster << cluster_bits;
                let (mut told, mut shown) = (held.clone(), held.clone());
                view.read(at, &mut told);
                match &map {
                    Some(map) => map.read_cluster(&content, cluster, &mut shown).unwrap().unwrap(),
                    None => content.pages.read(at, &mut shown),
                }
                assert!(told == held && shown == held, "cluster {cluster} of {}", model.format());
            }
            let walked = map.map(|map| (map.mapped, map.backing));
            let expected =
                (model.format() != tap_images::raw::FORMAT).then(|| (4, Some("base.raw".to_owned())));
            assert_eq!(walked, expected);
        }
    }
}
