//! Makes disks larger.
//!
//! ```text
//!   old:  header ─► L1 table ─► L2 tables ─► clusters
//!   new:     ┆  └─► larger L1 table, at the end of the file ─► the same L2 tables, and a copy of the last one
//!            └─ size and place of the L1 table: one sector
//!
//!   the larger L1 table ─► zeros where the backing file would show ─► sync ─► sector 0 ─► sync
//! ```
//!
//! Until sector 0 is written, nothing that the old disk uses has changed, except bytes past its end. The format cannot
//! say that a cluster is zeros, so the new part gets clusters of zeros as far as the backing file reaches. They are
//! entered below the new L1 table only: an L2 table that the old disk has, too, must not map clusters past its end. The
//! space of the old L1 table, and of an L2 table that was copied, is lost.

use super::format::{MAX_L1_BYTES, RawHeader};
use super::open::{Front, clear_checksum};
use super::{FORMAT, create::L1_ALIGN};
use crate::calls::closed;
use crate::grow::{grows, refused};
use crate::io::ImageFile;
use crate::map::{Geometry, GuestOffset, HostOffset};
use crate::{ImageError, ImageHost, OpenImage};
use std::ops::Range;
use tap_host::{Errno, SECTOR_BYTES};
use zerocopy::FromBytes;

tap_host::listed! {
    pub(crate) BUGS: Bug;
    GROWN_HEADER_FIRST = "grown-header-first", "the header of a larger disk is written before its L1 table";
    GROWN_TOO_SMALL = "grown-too-small", "a larger disk is a cluster smaller than it should be";
    GROWN_TAIL_KEPT = "grown-tail-kept", "the rest of the last cluster of a disk that grows is not zeroed";
    GROWN_TABLE_SHARED = "grown-table-shared", "the last L2 table of a disk that grows maps clusters past its end";
}

/// The places of a larger image.
struct Plan {
    new: Geometry,
    /// Bytes of the disk that may read as anything but zeros, although they are new.
    dirty: Range<GuestOffset>,
    /// The L1 table does not stay where it is.
    moves: bool,
    /// The L2 table that also maps clusters of the new part.
    copied: Option<usize>,
}

impl Plan {
    fn new(old: Geometry, size_bytes: u64, below_bytes: u64) -> Self {
        let new = Geometry { size_bytes, ..old };
        let start = GuestOffset(old.disk_sectors() * SECTOR_BYTES);
        let clusters_end = old.clusters() * old.cluster_bytes();
        // Entries past the end of the old disk, which another program may have left, map anything.
        let tables_end = old.root_entries().saturating_mul(old.table_span());
        let end = GuestOffset(below_bytes.max(tables_end).min(size_bytes));
        let shows_below = below_bytes > clusters_end;
        let shared = !clusters_end.is_multiple_of(old.table_span());
        Self {
            new,
            dirty: start..end,
            moves: shows_below || new.root_entries() > old.root_entries(),
            copied: (shows_below && shared).then_some(old.root_entries() as usize - 1),
        }
    }
}

/// Makes the disk of the image larger: `size_bytes`.
///
/// # Errors
/// [`ImageError`]; the disk has its old size or the new one.
pub(super) async fn grow<H: ImageHost>(
    host: &H,
    image: &OpenImage<H>,
    size_bytes: u64,
) -> Result<(), ImageError> {
    let path = image.path.as_str();
    let mut front = Front::read(host, path, &image.options).await?;
    let old = front.header.geometry;
    if !grows((path, FORMAT), old.disk_sectors() * SECTOR_BYTES, size_bytes)? {
        let synced = front.file.sync_to_close().await;
        drop(front);
        closed(host).await;
        return synced.map_err(ImageError::io("synchronise", path));
    }
    if (Geometry { size_bytes, ..old }).root_entries() * 8 > MAX_L1_BYTES {
        let bits = old.cluster_bits;
        let what = format!("a size of {size_bytes} bytes is too large for clusters of 2^{bits} bytes");
        return Err(refused(path, FORMAT, what));
    }
    let backing = match &front.backing_name {
        Some(name) => Some(image.backing(host, name).await?),
        None => None,
    };
    let below_bytes = backing.as_ref().map_or(0, |backing| backing.info().size_sectors * SECTOR_BYTES);
    let plan = Plan::new(old, size_bytes, below_bytes);
    let xen = front.header.xen;
    if plan.moves {
        front = with_larger_root(host, image, front, &plan).await?;
    }
    let geometry = Geometry { size_bytes, ..front.header.geometry };
    front.header.geometry = geometry;
    let surveyed = front.into_map().survey(host, image).await?;
    clear_checksum(surveyed.file(), xen).await.map_err(ImageError::io("clear the checksum of", path))?;
    let mut dirty = plan.dirty.clone();
    if host.bug(&GROWN_TAIL_KEPT) {
        dirty.start = GuestOffset(dirty.start.0.next_multiple_of(geometry.cluster_bytes()).min(dirty.end.0));
    }
    let zeroed = surveyed.zeroed(host, backing, dirty).await;
    let zeroed = zeroed.map_err(ImageError::io("write zeros to", path))?;
    let written = write_header(zeroed.file(), &said(host, geometry)).await;
    zeroed.close().await;
    written.map_err(ImageError::io("write the header of", path))
}

/// The geometry that the header is to have.
fn said<H: ImageHost>(host: &H, geometry: Geometry) -> Geometry {
    match host.bug(&GROWN_TOO_SMALL) {
        true => Geometry { size_bytes: geometry.size_bytes - geometry.cluster_bytes(), ..geometry },
        false => geometry,
    }
}

/// Writes the larger L1 table to the end of the file, and the copy of the last L2 table if there is one.
async fn with_larger_root<H: ImageHost>(
    host: &H,
    image: &OpenImage<H>,
    front: Front<H>,
    plan: &Plan,
) -> Result<Front<H>, ImageError> {
    let path = image.path.as_str();
    let (mut header, backing_name, mut root) = (front.header, front.backing_name.clone(), front.root.clone());
    let (mut file, end) = front.into_map().survey(host, image).await?.into_file();
    let geometry = Geometry { root_at: HostOffset(end.0.next_multiple_of(L1_ALIGN)), ..plan.new };
    root.resize(geometry.root_entries() as usize, 0);
    let mut end = HostOffset(geometry.root_end().0.next_multiple_of(geometry.cluster_bytes().max(L1_ALIGN)));
    let copied = plan.copied.filter(|_| !host.bug(&GROWN_TABLE_SHARED)).filter(|index| root[*index] != 0);
    let copy = copied.map(|index| {
        let copy = (HostOffset(std::mem::replace(&mut root[index], end.0)), end);
        end = HostOffset((end.0 + geometry.table_bytes()).next_multiple_of(geometry.cluster_bytes()));
        copy
    });
    if file.info.block_device && end.0 > file.info.size_bytes {
        let have = file.info.size_bytes;
        let what = format!("the device has {have} bytes, but {} are needed", end.0);
        return Err(refused(path, FORMAT, what));
    }
    let write = async {
        if !file.info.block_device {
            file.set_size(end.0).await?;
        }
        if host.bug(&GROWN_HEADER_FIRST) {
            write_header(&file, &geometry).await?;
        }
        write_root(&file, &geometry, &root, copy).await
    };
    write.await.map_err(ImageError::io("write the new L1 table of", path))?;
    file.info.size_bytes = file.info.size_bytes.max(end.0);
    header.geometry = geometry;
    Ok(Front { file, header, root, backing_name })
}

/// Writes `root`, and to the second of the places in `copy` the table at the first one.
async fn write_root<H: ImageHost>(
    file: &ImageFile<H>,
    geometry: &Geometry,
    root: &[u64],
    copy: Option<(HostOffset, HostOffset)>,
) -> Result<(), Errno> {
    if let Some((from, to)) = copy {
        let mut table = vec![0; geometry.table_bytes() as usize];
        file.read_bytes(from.0, &mut table).await?;
        file.write_bytes(to.0, &table).await?;
    }
    let mut bytes: Vec<u8> = root.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES as usize), 0);
    file.write_bytes(geometry.root_at.0, &bytes).await
}

/// Writes size and place of the L1 table, which are in one sector, durably.
async fn write_header<H: ImageHost>(file: &ImageFile<H>, geometry: &Geometry) -> Result<(), Errno> {
    let mut sector = [0; SECTOR_BYTES as usize];
    file.read_bytes(0, &mut sector).await?;
    let (raw, _) = RawHeader::mut_from_prefix(&mut sector).expect("a sector is longer than the header");
    raw.size_bytes = geometry.size_bytes.into();
    raw.l1_offset = geometry.root_at.0.into();
    file.write_bytes(0, &sector).await?;
    file.sync_to_close().await
}
