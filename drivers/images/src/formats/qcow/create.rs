//! Creates images.
//!
//! ```text
//!   clear an old image ─► sync ─► tables, rest of the name ─► sync ─► sector 0 ─► sync ─► directory entry
//! ```
//!
//! An interruption leaves no partial image: only sector 0 makes the file an image.

use super::format::{self, MAX_L1_BYTES, MAX_NAME_BYTES};
use crate::io::{ImageFile, sync_name};
use crate::map::{Geometry, HostOffset};
use crate::{ImageError, ImageHost, NewImage, parse_size};
use std::ops::RangeInclusive;
use tap_host::SECTOR_BYTES;
use zerocopy::IntoBytes;

tap_host::listed! {
    pub(crate) BUGS: Bug;
    OLD_HEADER_STAYS = "old-header-stays",
        "an image that is created over an old one keeps the old header until the new one is written";
}

/// Alignment of the L1 table: no drive writes the table and the header in one unit.
pub(super) const L1_ALIGN: u64 = 4096;

/// Name of the option for the size of clusters, in bytes. Default: 4 KiB, and 512 with a backing file.
pub(super) const CLUSTER_SIZE: &str = "cluster_size";
/// Name of the option for the number of entries of an L2 table. Default: 512, and 4096 with a backing file.
pub(super) const L2_ENTRIES: &str = "l2_entries";

/// Creates an empty image, durable together with its name.
///
/// # Errors
/// [`ImageError`]; after an error a file may be left at `path`.
pub(super) async fn create<H: ImageHost>(host: &H, path: &str, image: &NewImage) -> Result<(), ImageError> {
    let refused = |what| ImageError::Options { path: path.to_owned(), format: super::FORMAT.name(), what };
    let name = image.backing.as_deref().unwrap_or_default();
    let geometry = layout(image, name.len() as u64).map_err(refused)?;
    let file = ImageFile::create(host, path, image.existing.as_deref()).await?;
    let front_bytes = geometry.root_end().0.next_multiple_of(L1_ALIGN);
    if file.info.block_device && front_bytes > file.info.size_bytes {
        let have = file.info.size_bytes;
        return Err(refused(format!("the device has {have} bytes, but {front_bytes} are needed")));
    }
    let mut head = format::encode(&geometry, name.len() as u32).as_bytes().to_vec();
    head.extend(name.as_bytes());
    head.resize(head.len().next_multiple_of(SECTOR_BYTES as usize), 0);
    let (first, rest) = head.split_at(SECTOR_BYTES as usize);
    let write = async {
        if image.existing.is_some() && !host.bug(&OLD_HEADER_STAYS) {
            // An old image must not be recognised once its tables are overwritten.
            if file.info.block_device {
                file.write_bytes(0, &[0; SECTOR_BYTES as usize]).await?;
            }
            file.sync().await?;
        }
        if !file.info.block_device {
            file.set_size(front_bytes).await?;
        }
        file.write_bytes(SECTOR_BYTES, rest).await?;
        let l1 = vec![0; (front_bytes - geometry.root_at.0) as usize];
        file.write_bytes(geometry.root_at.0, &l1).await?;
        // Nor must old content be taken as tables of the new header.
        file.sync().await?;
        file.write_bytes(0, first).await?;
        file.sync().await
    };
    write.await.map_err(ImageError::io("write", path))?;
    sync_name(host, path).await
}

fn layout(image: &NewImage, name_bytes: u64) -> Result<Geometry, String> {
    let size_bytes = image.size_bytes;
    let (default_cluster, default_l2) = if image.backing.is_some() { (9, 12) } else { (12, 9) };
    let cluster_bits = power_of_two(image, CLUSTER_SIZE, 9..=16)?.unwrap_or(default_cluster);
    let l2_bits = power_of_two(image, L2_ENTRIES, 6..=13)?.unwrap_or(default_l2);
    if name_bytes > u64::from(MAX_NAME_BYTES) || (image.backing.is_some() && name_bytes == 0) {
        return Err(format!(
            "the name of the backing file has {name_bytes} bytes, not 1 to {MAX_NAME_BYTES}"
        ));
    }
    let valid = size_bytes >= SECTOR_BYTES && size_bytes.is_multiple_of(SECTOR_BYTES);
    if !valid || size_bytes > i64::MAX as u64 {
        return Err(format!(
            "a size of {size_bytes} bytes is not a multiple of {SECTOR_BYTES} above 0, or too large"
        ));
    }
    let l1_offset = (size_of::<format::RawHeader>() as u64 + name_bytes).next_multiple_of(L1_ALIGN);
    let geometry = Geometry { size_bytes, cluster_bits, table_bits: l2_bits, root_at: HostOffset(l1_offset) };
    if geometry.root_entries() * 8 > MAX_L1_BYTES {
        return Err(format!(
            "a size of {size_bytes} bytes is too large for clusters of 2^{cluster_bits} bytes"
        ));
    }
    Ok(geometry)
}

/// The exponent of the option `name`, which must be a power of two with an exponent in `bits`.
fn power_of_two(image: &NewImage, name: &str, bits: RangeInclusive<u32>) -> Result<Option<u32>, String> {
    let Some((_, text)) = image.options.iter().rfind(|option| option.0 == name) else { return Ok(None) };
    let value = parse_size(text)?;
    match value.trailing_zeros() {
        exponent if value.is_power_of_two() && bits.contains(&exponent) => Ok(Some(exponent)),
        _ => {
            let (min, max) = (1_u64 << bits.start(), 1_u64 << bits.end());
            Err(format!("{name} is {text}, not a power of two from {min} to {max}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_the_l1_table_limits_the_disk() {
        let options = [(CLUSTER_SIZE, "512"), (L2_ENTRIES, "64")].map(|(n, v)| (n.to_owned(), v.to_owned()));
        let max_bytes = (MAX_L1_BYTES / 8) << (9 + 6);
        let of = |size_bytes| {
            layout(&NewImage { size_bytes, options: options.to_vec(), ..NewImage::default() }, 0)
        };
        assert_eq!(of(max_bytes).unwrap().root_entries() * 8, MAX_L1_BYTES);
        assert!(of(max_bytes + SECTOR_BYTES).unwrap_err().contains("too large for clusters of 2^9 bytes"));
    }
}
