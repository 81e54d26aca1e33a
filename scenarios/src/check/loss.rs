//! How many clusters of an image a power cut may lose: what G13 allows.
//!
//! ```text
//!   mapped before the cut, not there after it      one cluster each (it may be what was compressed again)
//!   a table before the cut   , none after it      the clusters of a table
//!   a write that runs at the cut                   its clusters, and the tables that they lack
//! ```
//!
//! Both maps come from a walk, so the bound is the image's own: an allocator that takes more than it needs is told
//! after a few requests.

use crate::formats::{FormatModel, ImageMap};
use kernel_model::Content;
use tap_host::{SECTOR_BYTES, SectorRange};

/// An image just before the power is cut.
pub struct BeforeCut {
    model: &'static dyn FormatModel,
    map: ImageMap,
    /// Clusters that writes in flight may have taken.
    in_flight: u64,
}

/// Clusters of a table.
fn table_clusters(map: &ImageMap) -> u64 {
    map.table_bytes.div_ceil(1 << map.cluster_bits)
}

/// The most clusters that a write of `range` takes, tables included, where `map` holds.
fn taken_by(map: &ImageMap, range: SectorRange) -> u64 {
    let first = (range.start.0 * SECTOR_BYTES) >> map.cluster_bits;
    let last = ((range.start.0 + u64::from(range.count)) * SECTOR_BYTES - 1) >> map.cluster_bits;
    let tables = (first >> map.table_bits..=last >> map.table_bits)
        .filter(|index| map.tables.get(*index as usize).is_some_and(|offset| *offset == 0));
    last - first + 1 + tables.count() as u64 * table_clusters(map)
}

impl BeforeCut {
    /// Looks at the living image, on which writes of `running` run. `None` where it has no
    /// metadata.
    pub fn look(
        model: &'static dyn FormatModel,
        content: &Content,
        running: impl Iterator<Item = SectorRange>,
    ) -> Option<Self> {
        let map = model.walk(content)?.ok()?;
        let in_flight = running.map(|range| taken_by(&map, range)).sum();
        Some(Self { model, map, in_flight })
    }

    /// The most clusters that a power cut may have lost which left `content`.
    pub fn lost(&self, content: &Content) -> u64 {
        let Some(Ok(after)) = self.model.walk(content) else { return 0 };
        let gone = |a: &[u64], b: &[u64]| a.iter().zip(b).filter(|(a, b)| **a != 0 && a != b).count() as u64;
        self.in_flight
            + gone(&self.map.entries, &after.entries)
            + gone(&self.map.tables, &after.tables) * table_clusters(&self.map)
    }
}

/// The most clusters that a failed request of `sectors` may leave without owner.
pub fn lost_to_error(model: &dyn FormatModel, content: &Content, sectors: u32) -> u64 {
    let Some(Ok(map)) = model.walk(content) else { return 0 };
    let clusters = (u64::from(sectors) * SECTOR_BYTES).div_ceil(1 << map.cluster_bits) + 1;
    clusters + (clusters.div_ceil(1 << map.table_bits) + 1) * table_clusters(&map)
}
