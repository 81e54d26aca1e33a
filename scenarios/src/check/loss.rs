//! How many clusters of a qcow image a power cut may lose: what G13 allows.
//!
//! ```text
//!   mapped before the cut, not there after it      one cluster each (it may be what was compressed again)
//!   an L2 table before the cut, none after it      the clusters of a table
//!   a write that runs at the cut                   its clusters, and the tables that they lack
//! ```
//!
//! Both maps come from [`walker`], so the bound is the image's own: an allocator that takes more than it needs is told
//! after a few requests.

use super::walker::{self, QcowMap};
use kernel_model::Content;
use tap_host::{SECTOR_BYTES, SectorRange};

/// An image just before the power is cut.
pub struct BeforeCut {
    map: QcowMap,
    /// Clusters that writes in flight may have taken.
    in_flight: u64,
}

/// Clusters of an L2 table.
fn table_clusters(map: &QcowMap) -> u64 {
    (8_u64 << map.l2_bits).div_ceil(1 << map.cluster_bits)
}

/// The most clusters that a write of `range` takes, tables included, where `map` holds.
fn taken_by(map: &QcowMap, range: SectorRange) -> u64 {
    let first = (range.start.0 * SECTOR_BYTES) >> map.cluster_bits;
    let last = ((range.start.0 + u64::from(range.count)) * SECTOR_BYTES - 1) >> map.cluster_bits;
    let tables = (first >> map.l2_bits..=last >> map.l2_bits)
        .filter(|index| map.l1.get(*index as usize).is_some_and(|offset| *offset == 0));
    last - first + 1 + tables.count() as u64 * table_clusters(map)
}

impl BeforeCut {
    /// Looks at the living image, on which writes of `running` run. `None` where it is no qcow image.
    pub fn look(content: &Content, running: impl Iterator<Item = SectorRange>) -> Option<Self> {
        let map = walker::walk(content).ok()?;
        let in_flight = running.map(|range| taken_by(&map, range)).sum();
        Some(Self { map, in_flight })
    }

    /// The most clusters that a power cut may have lost which left `content`.
    pub fn lost(&self, content: &Content) -> u64 {
        let Ok(after) = walker::walk(content) else { return 0 };
        let gone = |a: &[u64], b: &[u64]| a.iter().zip(b).filter(|(a, b)| **a != 0 && a != b).count() as u64;
        self.in_flight
            + gone(&self.map.entries, &after.entries)
            + gone(&self.map.l1, &after.l1) * table_clusters(&self.map)
    }
}

/// The most clusters that a failed request of `sectors` may leave without owner.
pub fn lost_to_error(content: &Content, sectors: u32) -> u64 {
    let Ok(map) = walker::walk(content) else { return 0 };
    let clusters = (u64::from(sectors) * SECTOR_BYTES).div_ceil(1 << map.cluster_bits) + 1;
    clusters + (clusters.div_ceil(1 << map.l2_bits) + 1) * table_clusters(&map)
}
