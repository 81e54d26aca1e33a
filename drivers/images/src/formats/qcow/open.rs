//! Opening.

use super::format::{self, Header, XEN_CHECKSUM_AT};
use super::{Qcow, Qcow1};
use crate::io::ImageFile;
use crate::map::{
    Cache, DOUBTS, Frontier, Image, MappedDisk, Owners, Parts, SUSPECT_BYTES, Stopped, Walked, cache_bytes,
    decode_entries, table_cost, walk,
};
use crate::memory::ImageStages;
use crate::{ImageError, ImageHost, OpenImage};
use smallvec::smallvec;
use std::rc::Rc;
use tap_core::Node;
use tap_host::{Budget, Bug, Errno, IoBuf, Mark, SECTOR_BYTES};

/// Read at once: the header, the backing file's name and the L1 table of most images.
const HEAD_BYTES: u64 = 8192;

/// What an image says of itself, before its L2 tables are looked at.
pub(super) struct Front<H: ImageHost> {
    pub(super) file: ImageFile<H>,
    pub(super) header: Header,
    /// Byte offsets of L2 tables.
    pub(super) root: Vec<u64>,
    pub(super) backing_name: Option<Vec<u8>>,
}

pub(super) fn refused(path: &str, what: String, advice: &'static str) -> ImageError {
    ImageError::Refused { path: path.to_owned(), format: super::FORMAT.name(), what, advice }
}

impl<H: ImageHost> Front<H> {
    /// Opens the file and reads its header, L1 table and backing file's name.
    pub(super) async fn read(
        host: &H,
        path: &str,
        write: bool,
        direct: bool,
        memory: &Budget,
    ) -> Result<Self, ImageError> {
        let file = ImageFile::open(host, path, write, direct).await?.within(memory, path)?;
        let io = |error| ImageError::io("read", path)(error);
        let head = read_head(&file).await.map_err(io)?;
        let header = format::parse(&head, file.info.size_bytes)
            .map_err(|what| refused(path, what, "check that this is the right file"))?;
        let l1_bytes = header.geometry.root_entries() * 8;
        let l1 = bytes_at(&file, &head, header.geometry.root_at, l1_bytes).await.map_err(io)?;
        let mut l1: Vec<u64> = decode_entries(&l1).collect();
        if header.xen.is_some_and(|xen| !xen.l1_big_endian) {
            if write {
                let what = "its L1 table is in the byte order of the machine that wrote it".to_owned();
                return Err(refused(path, what, "open it read-only, and convert it to write to it"));
            }
            l1.iter_mut().for_each(|entry| *entry = entry.swap_bytes());
        }
        let backing_name = match header.backing {
            Some((offset, len)) => Some(bytes_at(&file, &head, offset, u64::from(len)).await.map_err(io)?),
            None => None,
        };
        Ok(Self { file, header, root: l1, backing_name })
    }

    /// The memory that the image needs to be open.
    pub(super) fn memory(&self, path: &str) -> Result<ImageStages, ImageError> {
        let geometry = &self.header.geometry;
        let front = self.root.len() * 8 + cache_bytes(self.root.len());
        let (table, cluster) = (table_cost(geometry.table_entries()), geometry.cluster_bytes() as usize);
        ImageStages::new(self.file.budget(), path, (front, table, cluster, DOUBTS * SUSPECT_BYTES))
    }

    /// What is no cluster, and has an owner.
    pub(super) fn owners(&self, memory: &ImageStages) -> Owners<Qcow1> {
        let (header, geometry) = (&self.header, self.header.geometry);
        let header_end = if header.xen.is_some() { 64 } else { 48 };
        let name = header.backing.map(|(at, len)| (at..at + u64::from(len), "the name of the backing file"));
        let fixed = [(0..header_end, "the header"), (geometry.root_at..geometry.root_end(), "the L1 table")];
        let file_bytes = self.file.info.size_bytes;
        let fixed = fixed.into_iter().chain(name);
        Owners::new(geometry, (file_bytes, format::reach(&geometry, file_bytes)), fixed, &memory.fixed)
    }

    pub(super) fn into_image(
        self,
        host: &H,
        mut memory: ImageStages,
        cache: Cache,
        space: Frontier,
        backing: Option<Rc<dyn Node>>,
    ) -> Image<H, Qcow1> {
        memory.walked();
        let Self { file, header: Header { geometry, .. }, root, .. } = self;
        let reach = format::reach(&geometry, file.info.size_bytes);
        Image::new(host, Parts { file, geometry, reach, root, memory, cache, space, backing })
    }
}

async fn read_head<H: ImageHost>(file: &ImageFile<H>) -> Result<IoBuf, Errno> {
    let len = file.info.size_bytes.min(HEAD_BYTES) as usize;
    let (result, mut bufs) = file.read_patiently(0, smallvec![file.buffer(len).await?]).await;
    result?;
    bufs.pop().ok_or(Errno::EIO)
}

/// Bytes that may have come with the head.
async fn bytes_at<H: ImageHost>(
    file: &ImageFile<H>,
    head: &[u8],
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, Errno> {
    let within =
        usize::try_from(offset).ok().and_then(|from| head.get(from..from.checked_add(len as usize)?));
    if let Some(bytes) = within {
        return Ok(bytes.to_vec());
    }
    let mut bytes = vec![0; len as usize];
    file.read_bytes(offset, &mut bytes).await?;
    Ok(bytes)
}

/// Opens an image, and what it is based on.
pub(super) async fn open<H: ImageHost>(host: &H, image: &OpenImage<H>) -> Result<Qcow<H>, ImageError> {
    let (path, options) = (&image.path, &image.options);
    let mut front = Front::read(host, path, options.write, options.direct, &options.memory).await?;
    let backing = match &front.backing_name {
        Some(name) => Some(image.backing(host, name).await?),
        None => None,
    };
    let memory = front.memory(path)?;
    let (cache, frontier) = if options.write {
        let walked = walk_all(host, path, &front, &memory, options.table_bytes).await?;
        let frontier = frontier(host, &front, walked.end);
        reach_all(host, &mut front, walked.end, frontier).await.map_err(ImageError::io("lengthen", path))?;
        clear_checksum(&front).await.map_err(ImageError::io("clear the checksum of", path))?;
        (walked.cache, frontier)
    } else {
        // For reading nothing needs to be known.
        (Cache::new(front.root.len(), &front.header.geometry, options.table_bytes), 0)
    };
    let info = front.file.info;
    let space = Frontier::new(frontier, info.block_device.then_some(info.size_bytes));
    Ok(MappedDisk::new(front.into_image(host, memory, cache, space, backing), !options.write))
}

/// Looks at every reference.
async fn walk_all<H: ImageHost>(
    host: &H,
    path: &str,
    front: &Front<H>,
    memory: &ImageStages,
    table_bytes: usize,
) -> Result<Walked, ImageError> {
    let image = (&front.file, &front.header.geometry, &front.root[..]);
    walk(host, image, front.owners(memory), memory, table_bytes).await.map_err(|stopped| match stopped {
        Stopped::Failed(error) => ImageError::io("read the tables of", path)(error),
        Stopped::Damaged(what) => {
            refused(path, what, "open it read-only and copy what can be read to a new image")
        }
    })
}

/// Where new clusters may go, with `end` as the end of the last thing that is referred to.
fn frontier<H: ImageHost>(host: &H, front: &Front<H>, end: u64) -> u64 {
    let info = &front.file.info;
    // A device has no end of its own: what is behind the last reference is free, and holds anything.
    let goes_on = info.block_device || host.bug(Bug::FrontierFromLastL1);
    let end = if goes_on { end } else { end.max(info.size_bytes) };
    end.next_multiple_of(front.header.geometry.cluster_bytes())
}

/// A crash may have left references to what lies behind the end of the file. The file gets as long as they are,
/// durably, before anything is served: all bounds on where references may lead count from the size, and would be passed
/// by what is written now, or by what the next crash leaves.
///
/// It gets nearly as long first. Who dies before that is durable, or is told of an error although it has happened,
/// leaves a file that is still too short for its references, so that the next one begins anew. It ends between two
/// sectors then: what is written there later has no sector of which a part is behind the end.
async fn reach_all<H: ImageHost>(
    host: &H,
    front: &mut Front<H>,
    end: u64,
    frontier: u64,
) -> Result<(), Errno> {
    let info = &mut front.file.info;
    if info.block_device || end <= info.size_bytes || host.bug(Bug::SizeBehind) {
        return Ok(());
    }
    let nearly = ((end - 1) / SECTOR_BYTES * SECTOR_BYTES).max(info.size_bytes);
    info.size_bytes = frontier;
    host.mark(Mark::SizeRecovered);
    for size in [nearly, frontier] {
        front.file.set_size(size).await?;
        // One that fails otherwise is remembered: no flush of this file succeeds any more, and so none promises what is
        // written there. After this one nothing was given up, and nothing is remembered.
        if front.file.sync_to_close().await == Err(Errno::EINTR) {
            return Err(Errno::EINTR);
        }
    }
    Ok(())
}

/// The checksum of Xen's extended header covers the L1 table and is not kept up.
async fn clear_checksum<H: ImageHost>(front: &Front<H>) -> Result<(), Errno> {
    match front.header.xen {
        Some(xen) if xen.checksum != 0 => front.file.write_bytes(XEN_CHECKSUM_AT, &[0; 4]).await,
        _ => Ok(()),
    }
}
