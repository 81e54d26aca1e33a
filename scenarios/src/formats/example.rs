//! The example format (`tap_example`): images built and parsed from its description alone.
//!
//! A header of 16 bytes (magic, size of the disk), at byte 4096 a table of u64 offsets in the file, then clusters of
//! 4096 bytes; all numbers are big endian.

use super::owners::{Owners, be_words, broken};
use super::{
    Broken, Bytes, Claimed, Claims, FormatModel, ImageMap, ImageShape, Metadata, PAST_THE_END, Places,
    layer_cluster,
};
use crate::check::{Invariant, Oracle, is_broken};
use kernel_model::{Content, PageMap};
use std::ops::RangeInclusive;
use tap_host::{Bug, SECTOR_BYTES};
use tap_images::Format;

const MAGIC: &[u8; 8] = b"TAPTABLE";
const HEADER_BYTES: u64 = 16;
/// Size of the header with the free space after it, of each page of the table, and of each cluster, in bytes.
const BLOCK: u64 = 4096;
const BLOCK_BITS: u32 = 12;
/// Entries in a page of the table, as a power of two.
const PAGE_BITS: u32 = 9;
/// Nothing here creates larger disks.
const PAGES_MAX: u64 = 1 << 20;

/// The model.
pub(super) struct Example;

/// Number of table pages of a disk of `size` bytes.
fn pages(size: u64) -> u64 {
    size.div_ceil(BLOCK << PAGE_BITS)
}

impl FormatModel for Example {
    fn format(&self) -> Format {
        tap_example::FORMAT
    }

    fn make(&self, shape: &ImageShape, view: &mut PageMap) -> Vec<u8> {
        let mut file = vec![0; ((1 + pages(shape.size)) * BLOCK) as usize];
        file[..8].copy_from_slice(MAGIC);
        file[8..16].copy_from_slice(&shape.size.to_be_bytes());
        for (cluster, _) in &shape.clusters {
            let bytes = layer_cluster(shape.writer, *cluster, BLOCK as usize);
            view.write(cluster * BLOCK, &bytes);
            let slot = (BLOCK + cluster * 8) as usize;
            let at = file.len() as u64;
            file[slot..slot + 8].copy_from_slice(&at.to_be_bytes());
            file.extend(bytes);
        }
        file
    }

    fn bugs(&self) -> &'static [&'static Bug] {
        tap_example::BUGS
    }

    fn metadata(&self) -> Option<&dyn Metadata> {
        Some(self)
    }
}

impl Metadata for Example {
    fn recognises(&self, head: &[u8]) -> bool {
        head.starts_with(MAGIC)
    }

    fn cluster_bits(&self) -> RangeInclusive<u32> {
        BLOCK_BITS..=BLOCK_BITS
    }

    fn table_bits(&self) -> RangeInclusive<u32> {
        PAGE_BITS..=PAGE_BITS
    }

    fn compresses(&self) -> bool {
        false
    }

    fn walk(&self, content: &Content) -> Result<ImageMap, Broken> {
        walk(content)
    }

    fn places(&self, _: Bytes<'_>, shape: &ImageShape) -> Places {
        let tables = (1..=pages(shape.size)).map(|page| page * BLOCK).collect();
        Places {
            fields: &[(0, 8), (8, 8)],
            root: (0, 0),
            tables,
            table_entries: 1 << PAGE_BITS,
            cluster_bits: BLOCK_BITS,
        }
    }

    fn odd_entry(&self, _: u32, number: u64, place: u64) -> u64 {
        number << 56 ^ place
    }

    fn claims(&self, image: Bytes<'_>) -> Claims {
        Claims { size: image.number(8), cluster_bits: Some(BLOCK_BITS), has_backing: false }
    }

    fn claimed(&self, image: Bytes<'_>, cluster: u64) -> Claimed {
        match image.number(BLOCK.saturating_add(cluster.saturating_mul(8))) {
            0 => Claimed::Unmapped,
            entry => Claimed::At(entry),
        }
    }
}

fn walk(content: &Content) -> Result<ImageMap, Broken> {
    let mut header = [0; HEADER_BYTES as usize];
    content.pages.read(0, &mut header);
    if content.size < HEADER_BYTES || !header.starts_with(MAGIC) {
        return broken(Invariant::Q2, "the header is not that of an example image".into());
    }
    let size = be_words(&header[8..]).next().expect("eight bytes");
    let pages = pages(size);
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || pages > PAGES_MAX {
        return broken(Invariant::Q2, format!("the size of the disk is {size} bytes"));
    }
    if (1 + pages) * BLOCK > content.size {
        let file = content.size;
        return broken(Invariant::Q2, format!("a table of {pages} pages leaves the file of {file} bytes"));
    }
    let mut owners = Owners::new(BLOCK_BITS);
    owners.take(0, (1 + pages) * BLOCK, || "the table".into())?;
    let clusters = size.div_ceil(BLOCK);
    let mut map = ImageMap {
        cluster_bits: BLOCK_BITS,
        table_bits: PAGE_BITS,
        table_bytes: BLOCK,
        size,
        root_at: BLOCK,
        tables: (1..=pages).map(|page| page * BLOCK).collect(),
        entries: vec![0; clusters as usize],
        ..ImageMap::default()
    };
    // A power cut may shorten the file, but no allocation was ever this far out.
    let far = content.size.saturating_add(clusters * BLOCK).saturating_add(1 << 20);
    let mut table = vec![0; (pages * BLOCK) as usize];
    content.pages.read(BLOCK, &mut table);
    for (cluster, entry) in be_words(&table).enumerate().filter(|(_, entry)| *entry != 0) {
        let Some(slot) = map.entries.get_mut(cluster) else {
            return broken(Invariant::Q2, format!("cluster {cluster} is mapped, {PAST_THE_END}"));
        };
        if (!entry.is_multiple_of(BLOCK) || entry > far) && !is_broken(Oracle::WildEntries) {
            let text =
                format!("the entry of cluster {cluster} is {entry:#x}, which is not the offset of a cluster");
            return broken(Invariant::Q2, text);
        }
        *slot = entry;
        map.mapped += 1;
        owners.take(entry, BLOCK, || format!("cluster {cluster}"))?;
    }
    owners.finish(content, &mut map)?;
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::content_of;

    /// A disk of 1 MiB with these entries, in a file of `size` bytes.
    fn image(entries: &[(usize, u64)], size: usize) -> Content {
        let mut raw = vec![0; size];
        raw[..8].copy_from_slice(MAGIC);
        raw[8..16].copy_from_slice(&(1_u64 << 20).to_be_bytes());
        for (cluster, entry) in entries {
            raw[4096 + cluster * 8..4104 + cluster * 8].copy_from_slice(&entry.to_be_bytes());
        }
        content_of(&raw)
    }

    #[test]
    fn a_valid_image_passes_and_leaks_are_counted() {
        let map = walk(&image(&[(0, 0x2000), (5, 0x4000)], 0x5000)).unwrap();
        assert_eq!((map.mapped, map.leaked, map.end), (2, 1, 0x5000));
        assert_eq!((map.host_offset(5), map.host_offset(1)), (Some(0x4000), None));
    }

    #[test]
    fn each_rule_is_enforced() {
        let refused = |entries: &[(usize, u64)]| walk(&image(entries, 0x5000)).unwrap_err().1;
        assert!(refused(&[(0, 0x2000), (1, 0x2000)]).contains("another owner"));
        assert!(refused(&[(0, 0x1000)]).contains("another owner"), "data on the table");
        assert!(refused(&[(0, 0x2200)]).contains("not the offset of a cluster"));
        assert!(refused(&[(0, 1 << 40)]).contains("not the offset of a cluster"));
        let mut owners = Owners::new(BLOCK_BITS);
        assert!(owners.take(u64::MAX - BLOCK, BLOCK, || "it".into()).unwrap_err().1.contains("far out"));
        assert!(refused(&[(300, 0x2000)]).contains("past the end of the disk"));
        let mut odd = image(&[], 0x5000);
        odd.pages.write(8, &[0xff]);
        assert!(walk(&odd).unwrap_err().1.contains("the size of the disk"));
        assert!(walk(&image(&[], 0x1800)).unwrap_err().1.contains("leaves the file"));
        let mut torn = image(&[], 0x5000);
        torn.pages.write(0, &[0]);
        assert!(walk(&torn).unwrap_err().1.contains("the header"));
    }
}
