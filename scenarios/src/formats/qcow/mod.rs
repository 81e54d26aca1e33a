//! qcow version 1: images made and walked from the specification alone.

mod walker;

pub use walker::walk;

use super::{Broken, FormatModel, ImageMap, ImageShape, Stored, layer_cluster};
use flate2::{Compress, Compression, FlushCompress};
use kernel_model::{Content, PageMap};
use tap_images::{Format, qcow};

/// The model.
pub struct Qcow;

impl FormatModel for Qcow {
    fn format(&self) -> Format {
        qcow::FORMAT
    }

    fn make(&self, shape: &ImageShape, view: &mut PageMap) -> Vec<u8> {
        make(shape, view)
    }

    fn walk(&self, content: &Content) -> Option<Result<ImageMap, Broken>> {
        Some(walk(content))
    }

    fn front_align_bytes(&self) -> u64 {
        4096
    }
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    // As QEMU: raw deflate with a window of 4 KiB.
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
        let at = l2 + (cluster % (1 << shape.table_bits)) as usize * 8;
        file[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    }
    file.resize(align(file.len()), 0);
    file
}
