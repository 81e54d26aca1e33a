//! The cost of reads of an idle disk: a contiguous run of clusters is read with one operation, and a cached table is
//! not read again.

use super::setup::Setup;
use crate::check::Invariant;
use crate::formats::ImageMap;
use crate::limits::StackLimits;
use crate::world::World;
use tap_core::{Node, Request};
use tap_host::{IoBuf, IoVec, SECTOR_BYTES, SectorRange};

/// Pieces that are looked at.
const PIECES: usize = 8;
/// Sectors of a read, and how many of them at most are in the first cluster.
const SECTORS: u64 = 16;
const FIRST_SECTORS: u64 = 8;
/// Bytes of a table in memory beside its entries.
const TABLE_OVERHEAD: usize = 256;

/// Reads pieces of the disk `node`, all of which was read before.
pub(super) async fn check_reads(world: &World, setup: &Setup, node: &dyn Node, limits: &StackLimits) {
    // An operation that fails is repeated, which costs another.
    world.storage.stop_failures();
    let content = setup.content(world);
    let Some(Ok(map)) = setup.model().walk(&content) else { return };
    let tables_bytes = map.tables.len() * ((8 << map.table_bits) + TABLE_OVERHEAD);
    let all_kept = tables_bytes <= limits.table_bytes && 4 * tables_bytes <= limits.memory_bytes;
    let (whole, holed) = (in_one_piece(&map, content.size), after_a_hole(&map, content.size));
    for range in whole.into_iter().take(PIECES).chain(holed.into_iter().take(PIECES)) {
        // Where there is no room for all tables, the first read may have to load one.
        for (range, most) in
            [(SectorRange::new(range.start.0, 1), if all_kept { 1 } else { u64::MAX }), (range, 1)]
        {
            let before = world.storage.counts().reads;
            let buf = IoBuf::unpooled(range.len_bytes() as usize).expect("a few sectors are not too large");
            let response = node.submit(Request::read(range, IoVec::from_iter([buf]))).await;
            let reads = world.storage.counts().reads - before;
            if response.result.is_err() || reads > most {
                let text = format!("a read of {range}, which is in one piece, took {reads} operations");
                return world.fail(Invariant::M6, format!("{text}: {:?}", response.result));
            }
        }
    }
}

/// Whether cluster `at` and the next one are of one table and contiguous in a file of `file_bytes`. A pair that the end
/// of the file cuts does not count: finding that end takes another operation.
fn goes_on(map: &ImageMap, file_bytes: u64, at: u64) -> bool {
    let next = map.host_offset(at).map(|host| host + (1 << map.cluster_bits));
    next.is_some_and(|next| next + (1 << map.cluster_bits) <= file_bytes)
        && next == map.host_offset(at + 1)
        && at >> map.table_bits == (at + 1) >> map.table_bits
}

/// Clusters that are whole on the disk.
fn whole_clusters(map: &ImageMap) -> u64 {
    (map.size >> map.cluster_bits).min(map.entries.len() as u64)
}

/// Ranges of two clusters that are contiguous in a file of `file_bytes`, after the end of one of the same table that is
/// in no file. Those of large clusters are left out.
fn after_a_hole(map: &ImageMap, file_bytes: u64) -> Vec<SectorRange> {
    let cluster_sectors = (1 << map.cluster_bits) / SECTOR_BYTES;
    if map.backing.is_some() || cluster_sectors > SECTORS {
        return Vec::new();
    }
    let some = cluster_sectors.min(FIRST_SECTORS);
    let pairs = (1..whole_clusters(map).saturating_sub(1)).filter(|at| {
        map.entries[*at as usize - 1] == 0
            && (at - 1) >> map.table_bits == at >> map.table_bits
            && goes_on(map, file_bytes, *at)
    });
    let range = |at| SectorRange::new(at * cluster_sectors - some, (some + cluster_sectors + some) as u32);
    pairs.map(range).collect()
}

/// Ranges of several clusters of one table that are contiguous in a file of `file_bytes`.
fn in_one_piece(map: &ImageMap, file_bytes: u64) -> Vec<SectorRange> {
    let cluster_sectors = (1 << map.cluster_bits) / SECTOR_BYTES;
    let whole = whole_clusters(map);
    let goes_on = |at: u64| goes_on(map, file_bytes, at);
    let (mut ranges, mut at) = (Vec::new(), 0);
    while at < whole {
        let last = (at..whole - 1).find(|cluster| !goes_on(*cluster)).unwrap_or(whole - 1);
        if last > at {
            let start = (at + 1) * cluster_sectors - cluster_sectors.min(FIRST_SECTORS);
            let count = ((last + 1) * cluster_sectors - start).min(SECTORS);
            ranges.push(SectorRange::new(start, count as u32));
        }
        at = last + 1;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_with_the_run_the_table_and_the_disk() {
        let entries = vec![0x1000, 0x2000, 0x3000, 0, 0x5000, 0x9000, 0xa000, 0x4000, 0x5000, 0x6000];
        let map = ImageMap { cluster_bits: 12, table_bits: 3, size: 9 << 12, entries, ..ImageMap::default() };
        let ranges = [SectorRange::new(0, 16), SectorRange::new(40, 16)];
        assert_eq!(in_one_piece(&map, 0x3fff), ranges[..1], "the file ends within the third");
        assert_eq!(in_one_piece(&map, 0xb000), ranges, "the last two are of another table, and past the end");
        assert_eq!(after_a_hole(&map, 0xb000), [], "the fifth cluster is alone");
        let entries = vec![0, 0x2000, 0x3000, 0x4000, 0, 0x6000, 0x7000, 0, 0x8000, 0x9000];
        let map = ImageMap { entries, size: 10 << 12, ..map };
        let ranges = [SectorRange::new(0, 24), SectorRange::new(32, 24)];
        assert_eq!(after_a_hole(&map, 0xb000), ranges, "the last hole is of another table");
        assert_eq!(after_a_hole(&ImageMap { backing: Some("b".into()), ..map }, 0xb000), []);
    }
}
