//! The testbed's knowledge of image formats: models that share no code with the drivers.
//!
//! ```text
//!   a shape ─► make ─► bytes of an image       (not written by a driver)
//!   bytes, even after a crash ─► walk ─► ImageMap (their meaning, or the invariant that they break)
//!   bytes ─► places ─► damaged bytes ─► claims (their contents without any checks)
//! ```
//!
//! A format is one [`FormatModel`] and one line in this file: see [`ALL`]. It has [`Metadata`] if the image contains
//! more than the bytes of the disk. Scenarios and checks use the model of the image at hand. The scenarios for every
//! format are in `catalog/of_format.rs`.

mod example;
mod metadata;
mod owners;
mod qcow;
mod raw;
mod real;

pub use metadata::{
    Broken, Bytes, COMPRESSED, Claimed, Claims, ImageMap, Metadata, Places, fitting, is_tolerable,
};
use metadata::{PACKED_TWICE, PAST_THE_END};
pub use real::{LoadedImage, RealImage, content_of};

use crate::tag::Tag;
use kernel_model::{Content, PageMap, Storage};
use std::fmt;
use std::marker::PhantomData;
use tap_host::{Bug, Mark, SECTOR_BYTES};
use tap_images::{Driver, Format, Formats, ImageFormat, ImageHost, ImageSpec, SHIPPED};

/// The format of raw images.
pub const RAW: ImageFormat = ImageFormat::As(tap_images::formats::raw::FORMAT);

/// A format.
pub trait FormatModel: Sync {
    /// The format that it models.
    fn format(&self) -> Format;

    /// Makes an image of `shape`, and writes the content of its clusters into `view`, the guest's bytes.
    fn make(&self, shape: &ImageShape, view: &mut PageMap) -> Vec<u8>;

    /// The model of its metadata; `None` if the file is the disk.
    fn metadata(&self) -> Option<&dyn Metadata>;

    /// The seeded bugs of its driver, where that is in a crate of its own.
    fn bugs(&self) -> &'static [&'static Bug] {
        &[]
    }

    /// Its marks, likewise.
    fn marks(&self) -> &'static [&'static Mark] {
        &[]
    }
}

impl dyn FormatModel + '_ {
    /// Whether images contain more than the bytes of the disk.
    pub fn has_metadata(&self) -> bool {
        self.metadata().is_some()
    }

    /// Whether the shipped programs support it.
    pub fn is_shipped(&self) -> bool {
        SHIPPED.contains(&self.format())
    }

    /// Parses all metadata of `content`; `None` if the format has none.
    pub fn walk(&self, content: &Content) -> Option<Result<ImageMap, Broken>> {
        Some(self.metadata()?.walk(content))
    }

    /// The same, and inflates compressed clusters.
    pub fn walk_whole(&self, content: &Content) -> Option<Result<ImageMap, Broken>> {
        Some(self.walk(content)?.and_then(|map| {
            map.inflate_some(content)?;
            Ok(map)
        }))
    }
}

/// Registers formats: models, and drivers.
macro_rules! formats {
    ($($model:expr => $driver:expr),+ $(,)?) => {
        /// The models of all formats.
        pub static ALL: &[&dyn FormatModel] = &[$(&$model),+];

        impl<H: ImageHost> Drivers<H> {
            const ALL: &'static [&'static dyn Driver<H>] = &[$(&$driver),+];
        }
    };
}

struct Drivers<H>(PhantomData<H>);

/// The registry of formats in worlds, which has those that ship and those that do not.
pub const fn drivers<H: ImageHost>() -> Formats<H> {
    Formats::new(Drivers::ALL)
}

// One line per format. The first is what no other recognises.
formats! {
    raw::Raw => tap_images::formats::raw::Driver,
    qcow::Qcow => tap_images::formats::qcow::Driver,
    example::Example => tap_example::Driver,
}

/// The model of `format`.
///
/// # Panics
/// If the format is yet to be probed: worlds always name it.
pub fn of(format: ImageFormat) -> &'static dyn FormatModel {
    let found = ALL.iter().find(|model| ImageFormat::As(model.format()) == format);
    *found.unwrap_or_else(|| panic!("format {} has no model", format.name()))
}

/// The bytes that the image `spec` uses: its file, or on a block device the part up to the end of the last object
/// referred to.
pub fn used_content(storage: &Storage, spec: &ImageSpec) -> Content {
    let path = &spec.path;
    let mut content = storage.content(path).unwrap_or_default();
    if storage.is_device(path)
        && let Some(Ok(map)) = of(spec.format).walk(&content)
    {
        content.size = map.end.next_multiple_of(1 << map.cluster_bits).min(content.size);
    }
    content
}

/// A kind of image.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Its format.
    pub model: &'static dyn FormatModel,
    /// It is above a raw file, and may have compressed clusters.
    pub overlay: bool,
}

impl Kind {
    /// An image of `model` without a backing file.
    pub fn alone(model: &'static dyn FormatModel) -> Self {
        Self { model, overlay: false }
    }

    /// A raw image.
    pub fn raw() -> Self {
        Self::alone(of(RAW))
    }

    /// The kind for scenarios that are not about formats: the first format with metadata.
    pub fn mapped(overlay: bool) -> Self {
        let model = shipped().find(|model| model.has_metadata()).expect("one that ships has metadata");
        Self { model, overlay }
    }

    /// For each format that ships, an image without a backing file.
    pub fn plain() -> Vec<Self> {
        shipped().map(Self::alone).collect()
    }

    /// The same, and one above a raw file if the format permits.
    pub fn all() -> Vec<Self> {
        let of = |model: &'static dyn FormatModel| {
            let overlay = model.format().info().has_backing.then_some(Self { model, overlay: true });
            std::iter::once(Self::alone(model)).chain(overlay)
        };
        shipped().flat_map(of).collect()
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.model.format(), if self.overlay { " over raw" } else { "" })
    }
}

fn shipped() -> impl Iterator<Item = &'static dyn FormatModel> {
    ALL.iter().copied().filter(|model| model.is_shipped())
}

/// How a cluster is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// As it is.
    Plain,
    /// Deflated.
    Compressed,
}

/// Parameters of an image to be made.
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
    /// Clusters that it holds, in ascending order.
    pub clusters: Vec<(u64, Stored)>,
    /// Writer's number in their tags.
    pub writer: u32,
    /// With the extension of the header: see [`Metadata::extends`].
    pub extended: bool,
}

/// Bytes of one cluster of layer `writer`, in which every sector is tagged as write 0.
pub fn layer_cluster(writer: u32, cluster: u64, cluster_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; cluster_bytes];
    let sectors = cluster_bytes as u64 / SECTOR_BYTES;
    for (i, sector) in bytes.chunks_exact_mut(SECTOR_BYTES as usize).enumerate() {
        Tag { writer, op: 0, sector: cluster * sectors + i as u64 }.fill(sector, false);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_a_model_show_what_it_reports() {
        for (model, bits) in ALL.iter().flat_map(|model| [9, 12, 16].map(|bits| (model, bits))) {
            let has_backing = model.format().info().has_backing;
            let bits =
                model.metadata().map_or(bits, |metadata| fitting(&metadata.cluster_bits(), &[bits])[0]);
            let table_bits = model.metadata().map_or(0, |metadata| *metadata.table_bits().start());
            let odd = match model.metadata().is_some_and(Metadata::compresses) {
                true => Stored::Compressed,
                false => Stored::Plain,
            };
            let shape = ImageShape {
                cluster_bits: bits,
                table_bits,
                size: 8 << 20,
                backing: has_backing.then(|| "base.raw".into()),
                clusters: vec![(0, Stored::Plain), (3, odd), (70, odd), (90, Stored::Plain)],
                writer: 7,
                extended: bits == 12 && model.metadata().is_some_and(Metadata::extends),
            };
            let mut view = PageMap::default();
            let file = model.make(&shape, &mut view);
            let content = content_of(&file);
            let map = model.walk_whole(&content).transpose().unwrap();
            for (cluster, _) in &shape.clusters {
                let held = layer_cluster(7, *cluster, 1 << bits);
                let at = cluster << bits;
                let (mut told, mut shown) = (held.clone(), held.clone());
                view.read(at, &mut told);
                match &map {
                    Some(map) => map.read_cluster(&content, *cluster, &mut shown).unwrap().unwrap(),
                    None => content.pages.read(at, &mut shown),
                }
                assert!(told == held && shown == held, "cluster {cluster} of {}", model.format());
            }
            let walked = map.map(|map| (map.mapped, map.backing, map.leaked));
            assert_eq!(walked, model.has_metadata().then(|| (4, shape.backing.clone(), 0)));
            // Of a valid image, reading without checks finds the same.
            let Some(metadata) = model.metadata() else { continue };
            let image = Bytes(&file);
            assert!(metadata.recognises(&file[..48]) && !metadata.recognises(&[0; 48]));
            let claims = metadata.claims(image);
            assert_eq!(
                (claims.size, claims.cluster_bits, claims.has_backing),
                (8 << 20, Some(bits), has_backing)
            );
            for cluster in 0..100 {
                let held = shape.clusters.iter().any(|held| held.0 == cluster);
                assert_eq!(metadata.claimed(image, cluster) != Claimed::Unmapped, held, "cluster {cluster}");
            }
            assert!(!metadata.places(image, &shape).tables.is_empty());
        }
    }

    #[test]
    fn unsupported_choices_become_supported_ones() {
        assert_eq!(fitting(&(9..=16), &[12, 16, 9, 14]), [12, 16, 9, 14]);
        assert_eq!(fitting(&(12..=12), &[12, 16, 9]), [12]);
        assert_eq!(fitting(&(10..=12), &[16, 12, 9]), [12, 10]);
    }
}
