//! Images made from nothing, by code of its own: what the driver reads was not written by the driver.

use crate::check::walker;
use crate::tag::Tag;
use flate2::{Compress, Compression, FlushCompress};
use kernel_model::{Content, PAGE, PageMap};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use tap_host::SECTOR_BYTES;
use tap_images::{ImageFormat, qcow, raw};

/// The format of raw images.
pub const RAW: ImageFormat = ImageFormat::As(raw::FORMAT);
/// The format of qcow images.
pub const QCOW: ImageFormat = ImageFormat::As(qcow::FORMAT);

/// How a cluster is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// As it is.
    Plain,
    /// Deflated.
    Compressed,
}

/// A qcow image to be made.
#[derive(Clone, Debug)]
pub struct QcowShape {
    /// Bytes in a cluster, as a power of two (9..=16).
    pub cluster_bits: u32,
    /// Entries in an L2 table, as a power of two (6..=13).
    pub l2_bits: u32,
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

fn deflate(bytes: &[u8]) -> Vec<u8> {
    // As QEMU: raw deflate with a window of 4 KiB.
    let mut packer = Compress::new_with_window_bits(Compression::default(), false, 12);
    let mut out = Vec::with_capacity(bytes.len() * 2 + 64);
    packer.compress_vec(bytes, &mut out, FlushCompress::Finish).expect("the output has room");
    out
}

/// Makes the image; also puts what its clusters hold into `view`, the guest's bytes.
pub fn make_qcow(shape: &QcowShape, view: &mut PageMap) -> Vec<u8> {
    let cluster_bytes = 1_usize << shape.cluster_bits;
    let clusters = shape.size.div_ceil(cluster_bytes as u64);
    let l1_entries = clusters.div_ceil(1 << shape.l2_bits) as usize;
    let name = shape.backing.as_deref().unwrap_or_default().as_bytes();
    let l1_offset = (48 + name.len()).next_multiple_of(8);
    let align = |n: usize| n.next_multiple_of(cluster_bytes);
    let mut file = vec![0; align(l1_offset + l1_entries * 8)];
    file[0..4].copy_from_slice(b"QFI\xfb");
    file[7] = 1;
    if !name.is_empty() {
        file[8..16].copy_from_slice(&48_u64.to_be_bytes());
        file[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        file[48..48 + name.len()].copy_from_slice(name);
    }
    file[24..32].copy_from_slice(&shape.size.to_be_bytes());
    file[32] = shape.cluster_bits as u8;
    file[33] = shape.l2_bits as u8;
    file[40..48].copy_from_slice(&(l1_offset as u64).to_be_bytes());
    for (cluster, stored) in &shape.clusters {
        let bytes = layer_cluster(shape.writer, *cluster, cluster_bytes);
        view.write(cluster * cluster_bytes as u64, &bytes);
        let l1_at = l1_offset + (cluster >> shape.l2_bits) as usize * 8;
        let mut l2 = u64::from_be_bytes(file[l1_at..l1_at + 8].try_into().expect("eight bytes")) as usize;
        if l2 == 0 {
            l2 = align(file.len());
            file.resize(l2 + (8 << shape.l2_bits), 0);
            file[l1_at..l1_at + 8].copy_from_slice(&(l2 as u64).to_be_bytes());
        }
        let packed =
            (*stored == Stored::Compressed).then(|| deflate(&bytes)).filter(|p| p.len() < cluster_bytes);
        let entry = match packed {
            Some(packed) => {
                // Extents lie one behind the other, in clusters that hold nothing else.
                let at = align(file.len());
                file.resize(at, 0);
                file.extend_from_slice(&packed);
                1 << 63 | (packed.len() as u64) << (63 - shape.cluster_bits) | at as u64
            }
            None => {
                let at = align(file.len());
                file.resize(at, 0);
                file.extend_from_slice(&bytes);
                at as u64
            }
        };
        let at = l2 + (cluster % (1 << shape.l2_bits)) as usize * 8;
        file[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    }
    file.resize(align(file.len()), 0);
    file
}

/// Largest disk that a real image may have here: histories are kept per sector.
const REAL_DISK_MAX: u64 = 2 << 30;
/// Largest file that is loaded.
const REAL_FILE_MAX: u64 = 1 << 30;
/// Longest chain of backing files.
const CHAIN_MAX: usize = 8;

/// An image from a real file, with those it is based on.
#[derive(Debug)]
pub struct RealImage {
    path: String,
    /// Names as the simulated host has them, and bytes; the image itself comes first.
    files: Vec<(String, Vec<u8>)>,
}

/// A real image as one thread's worlds share it.
pub struct LoadedImage {
    /// Files by name; the image itself comes first.
    pub files: Vec<(String, Content)>,
    /// What the guest sees.
    pub view: PageMap,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes in a cluster, as a power of two.
    pub cluster_bits: u32,
}

thread_local! {
    static LOADED: RefCell<Option<(String, Rc<LoadedImage>)>> = const { RefCell::new(None) };
}

impl RealImage {
    /// Reads the qcow image at `path` and the files below it.
    ///
    /// # Errors
    /// One line on what is wrong with which file.
    pub fn load(path: &Path) -> Result<Self, String> {
        let mut image = Self { path: path.display().to_string(), files: Vec::new() };
        let mut next = Some(path.to_path_buf());
        while let Some(path) = next.take() {
            if image.files.len() == CHAIN_MAX {
                return Err(format!("{} has more than {CHAIN_MAX} files below it", image.path));
            }
            let shown = path.display().to_string();
            let size = std::fs::metadata(&path).map_err(|e| format!("failed to open {shown}: {e}"))?.len();
            if size > REAL_FILE_MAX {
                return Err(format!("{shown} is {size} bytes long, at most {REAL_FILE_MAX} are loaded"));
            }
            let bytes = std::fs::read(&path).map_err(|e| format!("failed to read {shown}: {e}"))?;
            let is_qcow = bytes.starts_with(b"QFI\xfb\0\0\0\x01");
            if !is_qcow && image.files.is_empty() {
                return Err(format!("{shown} is not a qcow image of version 1"));
            }
            if is_qcow {
                let map = walker::walk(&content_of(&bytes))
                    .map_err(|(rule, text)| format!("{shown}: {rule}: {text}"))?;
                if map.size > REAL_DISK_MAX || map.size == 0 || !map.size.is_multiple_of(SECTOR_BYTES) {
                    return Err(format!(
                        "{shown} has a disk of {} bytes, which is none or too large here",
                        map.size
                    ));
                }
                next = map.backing.map(|name| path.parent().unwrap_or(Path::new("")).join(name));
            }
            image.files.push((shown, bytes));
        }
        Ok(image)
    }

    /// One line on what it is.
    pub fn describe(&self) -> String {
        let loaded = self.loaded();
        let map = walker::walk(&loaded.files[0].1).unwrap_or_default();
        let packed = (0..map.entries.len() as u64).filter(|c| map.compressed(*c).is_some()).count();
        let below = match &self.files[1..] {
            [] => "no backing file".to_string(),
            files => {
                format!("over {}", files.iter().map(|f| f.0.as_str()).collect::<Vec<_>>().join(" over "))
            }
        };
        format!(
            "{}: qcow, {} bytes, clusters of {}, {} mapped ({packed} compressed), {below}",
            self.path,
            loaded.size_bytes,
            1 << loaded.cluster_bits,
            map.mapped
        )
    }

    /// Where it came from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The image as worlds of this thread share it.
    pub fn loaded(&self) -> Rc<LoadedImage> {
        if let Some(loaded) =
            LOADED.with_borrow(|l| l.as_ref().filter(|l| l.0 == self.path).map(|l| Rc::clone(&l.1)))
        {
            return loaded;
        }
        let files: Vec<(String, Content)> =
            self.files.iter().map(|(name, bytes)| (name.clone(), content_of(bytes))).collect();
        let mut view = PageMap::default();
        let mut top = (0, 9);
        for (_, content) in files.iter().rev() {
            // From the bottom to the top, each covers what it holds. What does not walk is raw.
            match walker::walk(content) {
                Ok(map) => {
                    let mut cluster_bytes = vec![0; 1 << map.cluster_bits];
                    for cluster in 0..map.entries.len() as u64 {
                        if let Ok(Some(())) = walker::read_cluster(content, &map, cluster, &mut cluster_bytes)
                        {
                            view.write(cluster << map.cluster_bits, &cluster_bytes);
                        }
                    }
                    top = (map.size, map.cluster_bits);
                }
                Err(_) => view = content.pages.clone(),
            }
        }
        view.truncate(top.0);
        let loaded = Rc::new(LoadedImage { files, view, size_bytes: top.0, cluster_bits: top.1 });
        LOADED.with_borrow_mut(|l| *l = Some((self.path.clone(), Rc::clone(&loaded))));
        loaded
    }
}

fn content_of(bytes: &[u8]) -> Content {
    let mut content = Content { size: bytes.len() as u64, ..Content::default() };
    for (i, page) in bytes.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        content.pages.write((i * PAGE) as u64, page);
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walker_reads_what_was_made() {
        for cluster_bits in [9, 12, 16] {
            let shape = QcowShape {
                cluster_bits,
                l2_bits: 6,
                size: 8 << 20,
                backing: Some("base.raw".into()),
                clusters: vec![
                    (0, Stored::Plain),
                    (3, Stored::Compressed),
                    (70, Stored::Compressed),
                    (90, Stored::Plain),
                ],
                writer: 7,
            };
            let mut view = PageMap::default();
            let file = make_qcow(&shape, &mut view);
            let mut content = Content { size: file.len() as u64, ..Content::default() };
            content.pages.write(0, &file);
            let map = walker::walk(&content).unwrap();
            assert_eq!((map.mapped, map.backing.as_deref()), (4, Some("base.raw")));
            for (cluster, _) in shape.clusters {
                let mut got = vec![0; 1 << cluster_bits];
                walker::read_cluster(&content, &map, cluster, &mut got).unwrap().unwrap();
                assert_eq!(got, layer_cluster(7, cluster, 1 << cluster_bits));
            }
        }
    }
}
