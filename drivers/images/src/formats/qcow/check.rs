//! Checking an image without changing it.

use super::format::Mapping;
use super::inflate::Unreadable;
use super::open::{Front, TableReader, Walked};
use super::walk::{Report, Walk};
use crate::{CheckReport, ImageError, ImageHost};
use tap_host::Budget;

/// Most problems that are told in words; the others are counted.
const MAX_TOLD: usize = 100;

/// Header and L1 table are usually followed by unused bytes up to here or a multiple.
const FRONT_ALIGN: u64 = 4096;

impl Report for CheckReport {
    fn problem(&mut self, what: String) -> bool {
        self.problem_count += 1;
        if self.problems.len() < MAX_TOLD {
            self.problems.push(what);
        }
        true
    }
}

/// Walks the image at `path`, which is opened read-only, and decompresses every compressed cluster. Memory is bounded
/// by what is mapped: a bit for each cluster.
///
/// # Errors
/// [`ImageError`] when any of it cannot be read, or it is not a qcow image at all. What cannot be read is not damage.
pub(super) async fn check<H: ImageHost>(host: &H, path: &str) -> Result<CheckReport, ImageError> {
    let mut report = CheckReport::default();
    let front = Front::read(host, path, false, false, &Budget::default()).await?;
    let geometry = front.header.geometry;
    let file_bytes = front.file.info.size_bytes;
    let memory = front.memory(path)?;
    let mut walk = Walk::new(&front.header, file_bytes, &memory.fixed);
    let io = |error| ImageError::io("read the tables of", path)(error);
    let tables = walk.take_l1(&front.l1, &mut report).unwrap_or_default();
    report.tables = tables.len() as u64;
    // Without what is below: only this file is checked.
    let image = front.into_image(host, memory, Walked::not_at_all(0, 0), None);
    let mut reader = TableReader::new(&image.file, &geometry).await.map_err(io)?;
    for (index, offset) in tables {
        let entries: Vec<u64> = reader.read(offset).await.map_err(io)?.collect();
        walk.take_l2(index, &entries, &mut report);
        for (at, entry) in entries.iter().enumerate() {
            if let Mapping::Compressed(run) = Mapping::of(*entry, geometry.cluster_bits) {
                let cluster = index * entries.len() + at;
                match image.inflate_or_why(run).await {
                    Ok(_) => {}
                    Err(Unreadable::Damaged) => {
                        report.problem(format!("cluster {cluster} cannot be decompressed"));
                    }
                    Err(Unreadable::Failed(error)) => {
                        return Err(ImageError::io("read compressed clusters of", path)(error));
                    }
                }
            }
        }
    }
    walk.finish(&mut report);
    report.plain_clusters = walk.plain_clusters;
    report.compressed_clusters = walk.compressed_clusters;
    (report.file_bytes, report.end_bytes) = (file_bytes, walk.end);
    let bytes = geometry.cluster_bytes();
    let used = walk.plain_clusters * bytes + walk.compressed_bytes.next_multiple_of(bytes);
    let used = used + report.tables * geometry.table_bytes().next_multiple_of(bytes);
    let front = geometry.l1_end().next_multiple_of(FRONT_ALIGN.max(bytes));
    // A device goes on behind what is in use.
    let there = if image.file.info.block_device { 0 } else { file_bytes };
    report.leaked_clusters = there.max(walk.end).saturating_sub(front + used).div_ceil(bytes);
    Ok(report)
}
