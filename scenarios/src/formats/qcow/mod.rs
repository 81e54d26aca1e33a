//! qcow version 1: images built and parsed from the specification alone.

mod walker;

use walker::walk;

use super::{
    Broken, Bytes, COMPRESSED, Claimed, Claims, FormatModel, ImageMap, ImageShape, Metadata, Places, Stored,
    layer_cluster,
};
use flate2::{Compress, Compression, FlushCompress};
use kernel_model::{Content, PageMap};
use std::ops::RangeInclusive;
use tap_images::Format;
use tap_images::formats::qcow;

/// The model.
pub(super) struct Qcow;

impl FormatModel for Qcow {
    fn format(&self) -> Format {
        qcow::FORMAT
    }

    fn make(&self, shape: &ImageShape, view: &mut PageMap) -> Vec<u8> {
        make(shape, view)
    }

    fn metadata(&self) -> Option<&dyn Metadata> {
        Some(self)
    }
}

/// Byte offset and width of each field of the header.
const FIELDS: [(usize, usize); 11] =
    [(0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 1), (33, 1), (36, 4), (40, 8), (48, 4)];

impl Metadata for Qcow {
    fn recognises(&self, head: &[u8]) -> bool {
        head.starts_with(b"QFI\xfb")
    }

    fn cluster_bits(&self) -> RangeInclusive<u32> {
        9..=16
    }

    fn table_bits(&self) -> RangeInclusive<u32> {
        6..=13
    }

    fn compresses(&self) -> bool {
        true
    }

    fn extends(&self) -> bool {
        true
    }

    fn walk(&self, content: &Content) -> Result<ImageMap, Broken> {
        walk(content)
    }

    fn places(&self, image: Bytes<'_>, shape: &ImageShape) -> Places {
        let root = (image.number(40), shape.size.div_ceil(1 << (shape.cluster_bits + shape.table_bits)));
        let tables = (0..root.1).map(|i| image.number(root.0 + i * 8)).filter(|at| *at != 0).collect();
        let (table_entries, cluster_bits) = (1 << shape.table_bits, shape.cluster_bits);
        Places { fields: &FIELDS, root, tables, table_entries, cluster_bits }
    }

    /// The entry of a compressed cluster.
    fn odd_entry(&self, cluster_bits: u32, number: u64, place: u64) -> u64 {
        let shift = 63 - cluster_bits;
        COMPRESSED | (number << shift & !COMPRESSED) | place & ((1 << shift) - 1)
    }

    fn claims(&self, image: Bytes<'_>) -> Claims {
        let (cluster_bits, l2_bits) = (u32::from(image.byte(32)), u32::from(image.byte(33)));
        let sane = self.cluster_bits().contains(&cluster_bits) && self.table_bits().contains(&l2_bits);
        let has_backing = image.number(8) != 0;
        Claims { size: image.number(24), cluster_bits: sane.then_some(cluster_bits), has_backing }
    }

    fn claimed(&self, image: Bytes<'_>, cluster: u64) -> Claimed {
        let (cluster_bits, l2_bits) = (u32::from(image.byte(32)), u32::from(image.byte(33)));
        let table = image.number(image.number(40).saturating_add((cluster >> l2_bits) * 8));
        let slot = table.saturating_add(cluster % (1 << l2_bits) * 8);
        match if table == 0 { 0 } else { image.number(slot) } {
            0 => Claimed::Unmapped,
            entry if entry & COMPRESSED != 0 => {
                let shift = 63 - cluster_bits;
                Claimed::Compressed(entry & ((1 << shift) - 1), (entry & !COMPRESSED) >> shift)
            }
            entry => Claimed::At(entry),
        }
    }
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    // As QEMU does: raw deflate with a window of 4 KiB.
    let mut packer = Compress::new_with_window_bits(Compression::default(), false, 12);
    let mut out = Vec::with_capacity(bytes.len() * 2 + 64);
    packer.compress_vec(bytes, &mut out, FlushCompress::Finish).expect("the output has room");
    out
}

fn make(shape: &ImageShape, view: &mut PageMap) -> Vec<u8> {
    let cluster_bytes = 1_usize << shape.cluster_bits;
    let clusters = shape.size.div_ceil(cluster_bytes as u64);
    let l1_entries = clusters.div_ceil(1 << shape.table_bits) as usize;
    let name = shape.backing.as_deref().unwrap_or_default().as_bytes();
    let head = if shape.extended { 64 } else { 48 };
    let l1_offset = (head + name.len()).next_multiple_of(if shape.extended { 4096 } else { 8 });
    let align = |n: usize| n.next_multiple_of(cluster_bytes);
    let mut file = vec![0; align(l1_offset + l1_entries * 8)];
    file[0..4].copy_from_slice(b"QFI\xfb");
    file[7] = 1;
    if !name.is_empty() {
        file[8..16].copy_from_slice(&(head as u64).to_be_bytes());
        file[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        file[head..head + name.len()].copy_from_slice(name);
    }
    file[24..32].copy_from_slice(&shape.size.to_be_bytes());
    file[32] = shape.cluster_bits as u8;
    file[33] = shape.table_bits as u8;
    file[40..48].copy_from_slice(&(l1_offset as u64).to_be_bytes());
    for (cluster, stored) in &shape.clusters {
        let bytes = layer_cluster(shape.writer, *cluster, cluster_bytes);
        view.write(cluster * cluster_bytes as u64, &bytes);
        let l1_at = l1_offset + (cluster >> shape.table_bits) as usize * 8;
        let mut l2 = u64::from_be_bytes(file[l1_at..l1_at + 8].try_into().expect("eight bytes")) as usize;
        if l2 == 0 {
            l2 = align(file.len());
            file.resize(l2 + (8 << shape.table_bits), 0);
            file[l1_at..l1_at + 8].copy_from_slice(&(l2 as u64).to_be_bytes());
        }
        let packed =
            (*stored == Stored::Compressed).then(|| deflate(&bytes)).filter(|p| p.len() < cluster_bytes);
        let entry = match packed {
            Some(packed) => {
                // Extents follow each other, in clusters that hold nothing else.
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
        let at = l2 + (cluster % (1 << shape.table_bits)) as usize * 8;
        file[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    }
    file.resize(align(file.len()), 0);
    if shape.extended {
        let sum = checksum(&file[l1_offset..l1_offset + l1_entries * 8]);
        // The file is sparse, and the L1 table big endian.
        for (at, value) in [(48, XEN_MAGIC), (52, sum), (56, 8), (60, 3)] {
            file[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
    }
    file
}

/// "XEN\xfb", in the extended header of Xen's own tapdisk.
const XEN_MAGIC: u32 = 0x5845_4efb;

/// The checksum of an L1 table, never 0. Xen's tapdisk takes the first bytes of the MD5: no program under test computes
/// it, so another function does.
fn checksum(table: &[u8]) -> u32 {
    table.iter().fold(0x811c_9dc5, |sum: u32, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)) | 1
}
