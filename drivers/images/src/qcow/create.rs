//! Creating.
//!
//! ```text
//!   what is there is no image ─► sync ─► tables, rest of the name ─► sync ─► sector 0 ─► sync ─► name of the file
//! ```
//!
//! Whatever ends this before its time leaves no half image: sector 0 says that there is one.

use super::format::{self, Geometry, MAX_L1_BYTES, MAX_NAME_BYTES};
use crate::io::{ImageFile, sync_name};
use crate::{ImageError, ImageHost};
use tap_host::{Bug, FileId, SECTOR_BYTES};
use zerocopy::IntoBytes;

/// The L1 table begins here or at a multiple: away from the header, whatever a drive writes at once.
const L1_ALIGN: u64 = 4096;

/// How to lay out a new image. `None` takes the usual value.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CreateOptions {
    /// Clusters of 2^n bytes, 9 to 16. Usual: 12, and 9 with a backing file.
    pub cluster_bits: Option<u32>,
    /// L2 tables of 2^n entries, 6 to 13. Usual: 9, and 12 with a backing file.
    pub l2_bits: Option<u32>,
    /// Name of the file that shows where nothing was written; relative to the image's directory.
    pub backing: Option<String>,
    /// Write the image into the file that is at the path, whose content is lost, or onto the block device there; unless
    /// it is one of these.
    pub existing: Option<Vec<FileId>>,
}

/// Creates an empty image of a disk of `size_bytes`, a multiple of 512. The image is durable, and so is its name.
///
/// # Errors
/// [`ImageError`]; after an error a file may be left at `path`.
pub async fn create<H: ImageHost>(
    host: &H,
    path: &str,
    size_bytes: u64,
    options: &CreateOptions,
) -> Result<(), ImageError> {
    let name = options.backing.as_deref().unwrap_or_default();
    let geometry = layout(size_bytes, options, name.len() as u64).map_err(|what| ImageError::Options {
        path: path.to_owned(),
        format: "qcow",
        what,
    })?;
    let file = ImageFile::create(host, path, options.existing.as_deref()).await?;
    let front_bytes = geometry.l1_end().next_multiple_of(L1_ALIGN);
    if file.info.block_device && front_bytes > file.info.size_bytes {
        let what = format!("the device has {} bytes and {front_bytes} are needed", file.info.size_bytes);
        return Err(ImageError::Options { path: path.to_owned(), format: "qcow", what });
    }
    let mut head = format::encode(&geometry, name.len() as u32).as_bytes().to_vec();
    head.extend(name.as_bytes());
    head.resize(head.len().next_multiple_of(SECTOR_BYTES as usize), 0);
    let (first, rest) = head.split_at(SECTOR_BYTES as usize);
    let write = async {
        if options.existing.is_some() && !host.bug(Bug::OldHeaderStays) {
            // What is there must not show as an image once its tables are overwritten.
            if file.info.block_device {
                file.write_bytes(0, &[0; SECTOR_BYTES as usize]).await?;
            }
            file.sync().await?;
        }
        if !file.info.block_device {
            file.set_size(front_bytes).await?;
        }
        file.write_bytes(SECTOR_BYTES, rest).await?;
        let l1 = vec![0; (front_bytes - geometry.l1_offset) as usize];
        file.write_bytes(geometry.l1_offset, &l1).await?;
        // Nor must old content show as an image with a new header.
        file.sync().await?;
        file.write_bytes(0, first).await?;
        file.sync().await
    };
    write.await.map_err(ImageError::io("write", path))?;
    sync_name(host, path).await
}

fn layout(size_bytes: u64, options: &CreateOptions, name_bytes: u64) -> Result<Geometry, String> {
    let (usual_cluster, usual_l2) = if options.backing.is_some() { (9, 12) } else { (12, 9) };
    let cluster_bits = options.cluster_bits.unwrap_or(usual_cluster);
    let l2_bits = options.l2_bits.unwrap_or(usual_l2);
    if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&l2_bits) {
        return Err(format!("cluster_bits {cluster_bits} must be 9 to 16, l2_bits {l2_bits} 6 to 13"));
    }
    if name_bytes > u64::from(MAX_NAME_BYTES) || (options.backing.is_some() && name_bytes == 0) {
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
    let geometry = Geometry { size_bytes, cluster_bits, l2_bits, l1_offset };
    if geometry.l1_entries() * 8 > MAX_L1_BYTES {
        return Err(format!(
            "a size of {size_bytes} bytes is too large for clusters of 2^{cluster_bits} bytes"
        ));
    }
    Ok(geometry)
}
