//! Checking an image without changing it.

use super::open::Front;
use crate::map::{Cache, Frontier};
use crate::{CheckReport, ImageError, ImageHost};
use tap_host::Budget;

/// Header and L1 table are usually followed by unused bytes up to here or a multiple.
const FRONT_ALIGN: u64 = 4096;

/// Walks the image at `path`, which is opened read-only, and decompresses every compressed cluster. Memory is bounded
/// by what is mapped: a bit for each cluster.
///
/// # Errors
/// [`ImageError`] when any of it cannot be read, or it is not a qcow image at all. What cannot be read is not damage.
pub(super) async fn check<H: ImageHost>(host: &H, path: &str) -> Result<CheckReport, ImageError> {
    let front = Front::read(host, path, false, false, &Budget::default()).await?;
    let geometry = front.header.geometry;
    let file_bytes = front.file.info.size_bytes;
    let mut report = CheckReport { file_bytes, ..CheckReport::default() };
    let memory = front.memory(path)?;
    let mut owners = front.owners(&memory);
    let root = front.root.clone();
    // Without what is below: only this file is checked.
    let image = front.into_image(host, memory, Cache::new(0, &geometry, 0), Frontier::new(0, None), None);
    let checked = image.check(&root, &mut owners, &mut report).await;
    checked.map_err(|(action, error)| ImageError::io(action, path)(error))?;
    let bytes = geometry.cluster_bytes();
    let used = (report.plain_clusters + owners.compressed_units) * bytes
        + report.tables * geometry.table_bytes().next_multiple_of(bytes);
    let front = geometry.root_end().next_multiple_of(FRONT_ALIGN.max(bytes));
    // A device goes on behind what is in use.
    let there = if image.file.info.block_device { 0 } else { file_bytes };
    report.leaked_clusters = there.max(owners.end).saturating_sub(front + used).div_ceil(bytes);
    Ok(report)
}
