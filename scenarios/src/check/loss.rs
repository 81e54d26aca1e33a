//! How many clusters of an image a power cut may lose: the bound of G13.
//!
//! ```text
//!   mapped before the cut, not after it            one cluster each (it may have been compressed again)
//!   a table before the cut, none after it          the clusters of a table
//!   a write that runs at the cut                   its clusters, and the tables that they need
//! ```
//!
//! Both maps come from a walk, so the bound follows the image: an allocator that takes more than it needs fails the
//! check after a few requests.

use crate::formats::{FormatModel, ImageMap};
use kernel_model::Content;
use tap_host::{SECTOR_BYTES, SectorRange};

/// An image just before the power is cut.
pub struct BeforeCut {
    model: &'static dyn FormatModel,
    map: ImageMap,
    /// Clusters that writes in flight may have allocated.
    in_flight: u64,
}

/// Clusters of a table.
fn table_clusters(map: &ImageMap) -> u64 {
    map.table_bytes.div_ceil(1 << map.cluster_bits)
}

/// Maximum number of clusters that a write of `range` allocates, tables included, in an image with this `map`.
fn taken_by(map: &ImageMap, range: SectorRange) -> u64 {
    let first = (range.start.0 * SECTOR_BYTES) >> map.cluster_bits;
    let last = ((range.start.0 + u64::from(range.count)) * SECTOR_BYTES - 1) >> map.cluster_bits;
    let tables = (first >> map.table_bits..=last >> map.table_bits)
        .filter(|index| map.tables.get(*index as usize).is_some_and(|offset| *offset == 0));
    last - first + 1 + tables.count() as u64 * table_clusters(map)
}

impl BeforeCut {
    /// Walks the live image while writes of `running` run. `None` for an image without metadata.
    pub fn capture(
        model: &'static dyn FormatModel,
        content: &Content,
        running: impl Iterator<Item = SectorRange>,
    ) -> Option<Self> {
        let map = model.walk(content)?.ok()?;
        let in_flight = running.map(|range| taken_by(&map, range)).sum();
        Some(Self { model, map, in_flight })
    }

    /// Maximum number of clusters lost in a power cut that left `content`.
    pub fn max_lost(&self, content: &Content) -> u64 {
        let Some(Ok(after)) = self.model.walk(content) else { return 0 };
        let gone = |a: &[u64], b: &[u64]| a.iter().zip(b).filter(|(a, b)| **a != 0 && a != b).count() as u64;
        self.in_flight
            + gone(&self.map.entries, &after.entries)
            + gone(&self.map.tables, &after.tables) * table_clusters(&self.map)
    }
}

/// Maximum number of clusters that a failed request of `sectors` may leave without an owner.
pub fn lost_to_error(model: &dyn FormatModel, content: &Content, sectors: u32) -> u64 {
    let Some(Ok(map)) = model.walk(content) else { return 0 };
    let clusters = (u64::from(sectors) * SECTOR_BYTES).div_ceil(1 << map.cluster_bits) + 1;
    clusters + (clusters.div_ceil(1 << map.table_bits) + 1) * table_clusters(&map)
}
