//! An independent parser of qcow (version 1) metadata.
//!
//! It shares no code with the driver, so the driver's view of an image is checked against the bytes. It needs only the
//! bytes, so it runs on any crash state, and it is fast enough to run on every one.
//!
//! Layout (big endian): header of 48 bytes, L1 table of u64 file offsets, L2 tables of 2^l2_bits entries; bit 63 of an
//! entry marks a compressed cluster, whose size in bytes is in the bits from (63 - cluster_bits) on.

use super::{XEN_MAGIC, checksum};
use crate::check::{Invariant, Oracle, is_broken};
use crate::formats::owners::{Owners, be_words, broken};
use crate::formats::{Broken, COMPRESSED, ImageMap, PAST_THE_END};
use kernel_model::Content;
use tap_host::SECTOR_BYTES;

const MAGIC: u32 = 0x5146_49fb;
const HEADER_BYTES: u64 = 48;
/// The L1 table of a new image begins here, or before.
const L1_IN_FRONT: u64 = 4096;
/// Nothing here creates larger tables.
const L1_ENTRIES_MAX: u64 = 1 << 22;

fn extent(entry: u64, cluster_bits: u32) -> (u64, u64) {
    let shift = 63 - cluster_bits;
    ((entry & ((1 << shift) - 1)), (entry & !COMPRESSED) >> shift)
}

/// The header, and offset and length in bytes of the backing file's name.
fn header(content: &Content) -> Result<(ImageMap, Option<(u64, u64)>), Broken> {
    let mut raw = [0; 48];
    content.pages.read(0, &mut raw);
    let u32_at = |at: usize| u32::from_be_bytes(raw[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_be_bytes(raw[at..at + 8].try_into().expect("eight bytes"));
    if content.size < 48 || u32_at(0) != MAGIC || u32_at(4) != 1 {
        return broken(Invariant::Q2, "the header is not that of a qcow image".into());
    }
    let (cluster_bits, l2_bits) = (u32::from(raw[32]), u32::from(raw[33]));
    if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&l2_bits) {
        return broken(
            Invariant::Q2,
            format!("cluster_bits {cluster_bits} or l2_bits {l2_bits} is out of range"),
        );
    }
    let (backing_offset, backing_len) = (u64_at(8), u64::from(u32_at(16)));
    let backing = if backing_offset == 0 {
        None
    } else if backing_len > 1023 || backing_offset.saturating_add(backing_len) > content.size {
        return broken(Invariant::Q2, "the name of the backing file is outside the file".into());
    } else {
        let mut name = vec![0; backing_len as usize];
        content.pages.read(backing_offset, &mut name);
        Some(String::from_utf8_lossy(&name).into_owned())
    };
    let name = backing.is_some().then_some((backing_offset, backing_len));
    let map = ImageMap {
        cluster_bits,
        table_bits: l2_bits,
        table_bytes: 8 << l2_bits,
        size: u64_at(24),
        root_at: u64_at(40),
        backing,
        ..ImageMap::default()
    };
    Ok((map, name))
}

/// Parses all metadata of `content`.
///
/// # Errors
/// The first broken invariant.
pub(super) fn walk(content: &Content) -> Result<ImageMap, Broken> {
    let (mut map, name) = header(content)?;
    let (cluster_bits, l2_bits) = (map.cluster_bits, map.table_bits);
    let clusters = map.size.div_ceil(1 << cluster_bits);
    let l1_entries = clusters.div_ceil(1 << l2_bits);
    if l1_entries > L1_ENTRIES_MAX || map.root_at.saturating_add(l1_entries * 8) > content.size {
        return broken(Invariant::Q2, format!("the L1 table of {l1_entries} entries is not within the file"));
    }
    let mut owners = Owners::new(cluster_bits);
    take_front(&mut owners, content, &map, (l1_entries * 8).max(1), name)?;
    let mut table = vec![0; (l1_entries * 8) as usize];
    content.pages.read(map.root_at, &mut table);
    check_sum(content, &map, &table)?;
    map.tables = be_words(&table).collect();
    map.entries = vec![0; clusters as usize];
    let mut table = vec![0; 8 << l2_bits];
    for (index, l2_offset) in map.tables.clone().into_iter().enumerate() {
        if l2_offset != 0 {
            walk_l2(content, &mut map, &mut owners, index as u64, l2_offset, &mut table)?;
        }
    }
    // QEMU writes an L1 table in whole sectors, wherever it begins.
    let start = if map.root_at <= L1_IN_FRONT { 0 } else { map.root_at };
    owners.fill(start..map.root_at + (l1_entries * 8).next_multiple_of(SECTOR_BYTES));
    owners.finish(content, &mut map)?;
    Ok(map)
}

/// The header, the L1 table of `l1_bytes` and the backing file's name. A new image has them together at its front, with
/// the name in between or in separate space. The L1 table of a disk that has grown is somewhere behind them, perhaps
/// where that of a new image can be, with tables of the smaller disk in between.
fn take_front(
    owners: &mut Owners,
    content: &Content,
    map: &ImageMap,
    l1_bytes: u64,
    name: Option<(u64, u64)>,
) -> Result<(), Broken> {
    let is_between = |(at, len): (u64, u64)| at >= HEADER_BYTES && at + len <= map.root_at;
    let front = name.filter(|name| is_between(*name)).map_or(HEADER_BYTES, |(at, len)| at + len);
    let joined = front.next_multiple_of(1 << map.cluster_bits) > map.root_at || is_extended(content, map);
    if map.root_at <= L1_IN_FRONT && joined {
        owners.take(0, map.root_at + l1_bytes, || "the header".into())?;
        return match name.filter(|name| !is_between(*name)) {
            Some((at, len)) => owners.take(at, len.max(1), || "the name of the backing file".into()),
            None => Ok(()),
        };
    }
    let front = name.map_or(HEADER_BYTES, |(at, len)| (at + len).max(HEADER_BYTES));
    owners.take(0, front, || "the header".into())?;
    owners.take(map.root_at, l1_bytes, || "the L1 table".into())
}

/// Magic number and checksum of Xen's extended header, if there is one.
fn extended_words(content: &Content) -> [u32; 2] {
    let mut words = [0; 8];
    content.pages.read(HEADER_BYTES, &mut words);
    [0, 4].map(|at| u32::from_be_bytes(words[at..at + 4].try_into().expect("four bytes")))
}

fn is_extended(content: &Content, map: &ImageMap) -> bool {
    extended_words(content)[0] == XEN_MAGIC && map.root_at.is_multiple_of(4096)
}

/// The checksum in Xen's extended header, if there is one: right, or cleared.
fn check_sum(content: &Content, map: &ImageMap, table: &[u8]) -> Result<(), Broken> {
    let sum = extended_words(content)[1];
    if is_extended(content, map) && sum != 0 && sum != checksum(table) {
        return broken(
            Invariant::Q6,
            "the checksum in the extended header is that of an older L1 table".into(),
        );
    }
    Ok(())
}

fn walk_l2(
    content: &Content,
    map: &mut ImageMap,
    owners: &mut Owners,
    index: u64,
    l2_offset: u64,
    table: &mut [u8],
) -> Result<(), Broken> {
    let cluster_size = 1_u64 << map.cluster_bits;
    // A power cut may shorten the file, but no allocation was ever this far out: the limit is the space of all clusters
    // and tables, and of those that may be lost.
    let tables = map.tables.len() as u64 * map.table_bytes.next_multiple_of(cluster_size);
    let disk = map.size.next_multiple_of(cluster_size).saturating_add(tables);
    let far = content.size.saturating_add(disk).saturating_add(1 << 20);
    if !l2_offset.is_multiple_of(SECTOR_BYTES) || l2_offset >= 1 << 56 {
        return broken(
            Invariant::Q2,
            format!("L1 entry {index} is {l2_offset:#x}, which is not the offset of a table"),
        );
    }
    if l2_offset + table.len() as u64 > content.size && !is_broken(Oracle::TablesBeyond) {
        return broken(
            Invariant::Q5,
            format!(
                "L1 entry {index} refers to an L2 table at {l2_offset:#x}, past the end of the file at {:#x}",
                content.size
            ),
        );
    }
    owners.take(l2_offset, table.len() as u64, || format!("L2 table {index}"))?;
    content.pages.read(l2_offset, table);
    for (i, entry) in be_words(table).enumerate() {
        let cluster = (index << map.table_bits) + i as u64;
        if entry == 0 {
            continue;
        }
        let Some(slot) = map.entries.get_mut(cluster as usize) else {
            return broken(Invariant::Q2, format!("L2 table {index} maps cluster {cluster}, {PAST_THE_END}"));
        };
        *slot = entry;
        map.mapped += 1;
        if entry & COMPRESSED != 0 {
            let (offset, len) = extent(entry, map.cluster_bits);
            if len == 0 || offset + len > content.size {
                return broken(
                    Invariant::Q3,
                    format!("the compressed extent of cluster {cluster} leaves the file"),
                );
            }
            map.packed.push((cluster, offset, len));
            owners.take_extent(offset, len);
        } else if (entry % cluster_size != 0 || entry > far - cluster_size) && !is_broken(Oracle::WildEntries)
        {
            return broken(
                Invariant::Q2,
                format!(
                    "the L2 entry of cluster {cluster} is {entry:#x}, which is not the offset of a cluster"
                ),
            );
        } else {
            owners.take(entry, cluster_size, || format!("cluster {cluster}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 1 MiB: header and L1 in cluster 0, L2 tables from 0x1000 on as given.
    fn image(l1: &[u64], l2: &[(usize, u64)], size: u64) -> Content {
        let mut raw = vec![0; size as usize];
        raw[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        raw[7] = 1;
        raw[24..32].copy_from_slice(&(1_u64 << 20).to_be_bytes());
        raw[32] = 12;
        raw[33] = 9;
        raw[40..48].copy_from_slice(&64_u64.to_be_bytes());
        for (i, entry) in l1.iter().enumerate() {
            raw[64 + i * 8..72 + i * 8].copy_from_slice(&entry.to_be_bytes());
        }
        for (i, entry) in l2 {
            raw[0x1000 + i * 8..0x1008 + i * 8].copy_from_slice(&entry.to_be_bytes());
        }
        let mut content = Content { size, ..Content::default() };
        content.pages.write(0, &raw);
        content
    }

    #[test]
    fn a_valid_image_passes_and_leaks_are_counted() {
        let map = walk(&image(&[0x1000], &[(0, 0x2000), (5, 0x4000)], 0x5000)).unwrap();
        assert_eq!((map.mapped, map.leaked), (2, 1));
        assert_eq!((map.host_offset(5), map.host_offset(1)), (Some(0x4000), None));
    }

    #[test]
    fn each_rule_is_enforced() {
        let class = |l1: &[u64], l2: &[(usize, u64)], size| walk(&image(l1, l2, size)).unwrap_err().0;
        assert_eq!(class(&[0x1000], &[(0, 0x2000), (1, 0x2000)], 0x5000), Invariant::Q2, "shared cluster");
        assert_eq!(class(&[0x1000], &[(0, 0x1000)], 0x5000), Invariant::Q2, "data on a table");
        assert_eq!(class(&[0x1000], &[(0, 0)], 0x1800), Invariant::Q5, "table past the end");
        assert_eq!(class(&[0x1000], &[(0, 0x2200)], 0x5000), Invariant::Q2, "unaligned cluster");
        assert_eq!(class(&[0x1000], &[(300, 0x2000)], 0x5000), Invariant::Q2, "past the end of the disk");
        let packed = COMPRESSED | 100 << 51 | 0x4fff;
        assert_eq!(class(&[0x1000], &[(0, packed)], 0x5000), Invariant::Q3, "extent leaves the file");
        let data = COMPRESSED | 100 << 51 | 0x2100;
        assert_eq!(
            class(&[0x1000], &[(0, data), (1, 0x2000)], 0x5000),
            Invariant::Q2,
            "extent in a data cluster"
        );
        assert!(walk(&image(&[0x1000], &[(0, data), (1, COMPRESSED | 16 << 51 | 0x2164)], 0x5000)).is_ok());
        let overlap = [(0, data), (1, COMPRESSED | 16 << 51 | 0x2160)];
        assert_eq!(class(&[0x1000], &overlap, 0x5000), Invariant::Q2, "extents share four bytes");
        let mut torn = image(&[], &[], 0x5000);
        torn.pages.write(0, &[0]);
        assert_eq!(walk(&torn).unwrap_err().0, Invariant::Q2);
    }
}
