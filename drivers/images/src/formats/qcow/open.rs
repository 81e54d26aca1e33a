//! Opening.

use super::alloc::{Allocator, DOUBTS, SUSPECT_BYTES};
use super::format::{self, Geometry, Header, XEN_CHECKSUM_AT, decode_entries};
use super::inflate::Inflater;
use super::table::{Cache, Table, cache_bytes, table_cost};
use super::walk::{FirstProblem, Walk};
use super::{Image, Qcow};
use crate::io::ImageFile;
use crate::memory::ImageStages;
use crate::{ImageError, ImageHost, OpenImage};
use smallvec::smallvec;
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::wait::Semaphore;
use tap_core::{Node, NodeInfo};
use tap_host::{Budget, Bug, Errno, IoBuf, Mark, SECTOR_BYTES, cost_of};

/// Read at once: the header, the backing file's name and the L1 table of most images.
const HEAD_BYTES: u64 = 8192;

/// What an image says of itself, before its L2 tables are looked at.
pub(super) struct Front<H: ImageHost> {
    pub(super) file: ImageFile<H>,
    pub(super) header: Header,
    pub(super) l1: Vec<u64>,
    pub(super) backing_name: Option<Vec<u8>>,
}

/// An image that was walked: its cache is filled as far as it goes.
pub(super) struct Walked {
    cache: Cache,
    /// The end of the last thing that is referred to.
    end: u64,
    frontier: u64,
}

impl Walked {
    /// For reading nothing needs to be known.
    pub(super) fn not_at_all(l1_entries: usize, limit: usize) -> Self {
        Self { cache: Cache::new(l1_entries, limit), end: 0, frontier: 0 }
    }
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
        let l1_bytes = header.geometry.l1_entries() * 8;
        let l1 = bytes_at(&file, &head, header.geometry.l1_offset, l1_bytes).await.map_err(io)?;
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
        Ok(Self { file, header, l1, backing_name })
    }

    /// The memory that the image needs to be open.
    pub(super) fn memory(&self, path: &str) -> Result<ImageStages, ImageError> {
        let geometry = &self.header.geometry;
        let front = self.l1.len() * 8 + cache_bytes(self.l1.len());
        let (table, cluster) = (table_cost(geometry.l2_entries()), geometry.cluster_bytes() as usize);
        ImageStages::new(self.file.budget(), path, (front, table, cluster, DOUBTS * SUSPECT_BYTES))
    }

    pub(super) fn into_image(
        self,
        host: &H,
        mut memory: ImageStages,
        walked: Walked,
        backing: Option<Rc<dyn Node>>,
    ) -> Image<H> {
        memory.walked();
        let info = self.file.info;
        let device_bytes = info.block_device.then_some(info.size_bytes);
        Image {
            host: host.clone(),
            reach: self.header.geometry.reach(info.size_bytes),
            file: self.file,
            geometry: self.header.geometry,
            l1: RefCell::new(self.l1),
            l1_turn: Semaphore::new(1),
            memory,
            cache: RefCell::new(walked.cache),
            allocator: RefCell::new(Allocator::new(walked.frontier, device_bytes)),
            backing_bytes: backing.as_ref().map_or(0, |b| b.info().size_sectors * SECTOR_BYTES),
            backing,
            inflater: RefCell::new(Inflater::default()),
            unwritten: RefCell::default(),
        }
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

/// Reads table after table in the order of the file; each is a buffer that is used again.
pub(super) struct TableReader<'a, H: ImageHost> {
    file: &'a ImageFile<H>,
    buf: Option<IoBuf>,
}

impl<'a, H: ImageHost> TableReader<'a, H> {
    pub(super) async fn new(file: &'a ImageFile<H>, geometry: &Geometry) -> Result<Self, Errno> {
        // A stage of its own: it is held while compressed clusters are read.
        let bytes = geometry.table_bytes() as usize;
        let buf = file.budget().stage(cost_of(bytes))?.buffer(bytes).await?;
        Ok(Self { file, buf: Some(buf) })
    }

    pub(super) async fn read(&mut self, offset: u64) -> Result<impl Iterator<Item = u64> + '_, Errno> {
        let buf = self.buf.take().ok_or(Errno::EIO)?;
        let (result, mut bufs) = self.file.read_patiently(offset, smallvec![buf]).await;
        self.buf = bufs.pop();
        result?;
        Ok(decode_entries(self.buf.as_deref().unwrap_or_default()))
    }
}

impl<H: ImageHost> Qcow<H> {
    pub(super) async fn open(host: &H, image: &OpenImage<H>) -> Result<Self, ImageError> {
        let (path, options) = (&image.path, &image.options);
        let mut front = Front::read(host, path, options.write, options.direct, &options.memory).await?;
        let backing = match &front.backing_name {
            Some(name) => Some(image.backing(host, name).await?),
            None => None,
        };
        let memory = front.memory(path)?;
        let walked = if options.write {
            let walked = walk(host, path, &front, &memory, options.tables).await?;
            reach_all(host, &mut front, &walked).await.map_err(ImageError::io("lengthen", path))?;
            clear_checksum(&front).await.map_err(ImageError::io("clear the checksum of", path))?;
            walked
        } else {
            Walked::not_at_all(front.l1.len(), options.tables)
        };
        let geometry = front.header.geometry;
        let info =
            NodeInfo { size_sectors: geometry.size_bytes.div_ceil(SECTOR_BYTES), read_only: !options.write };
        let image = front.into_image(host, memory, walked, backing);
        Ok(Self { image: RefCell::new(Some(Rc::new(image))), info })
    }
}

/// Looks at every reference, to know where new clusters may go.
async fn walk<H: ImageHost>(
    host: &H,
    path: &str,
    front: &Front<H>,
    memory: &ImageStages,
    limit: usize,
) -> Result<Walked, ImageError> {
    let geometry = front.header.geometry;
    let mut walk = Walk::new(&front.header, front.file.info.size_bytes, &memory.fixed);
    let mut cache = Cache::new(front.l1.len(), limit);
    let mut problem = FirstProblem::default();
    let io = |error| ImageError::io("read the tables of", path)(error);
    if let Some(tables) = walk.take_l1(&front.l1, &mut problem) {
        let mut reader = TableReader::new(&front.file, &geometry).await.map_err(io)?;
        for (index, offset) in tables {
            if host.bug(Bug::FrontierFromLastL1) && front.l1[index + 1..].iter().any(|entry| *entry != 0) {
                continue;
            }
            let entries: Box<[u64]> = reader.read(offset).await.map_err(io)?.collect();
            if walk.take_l2(index, &entries, &mut problem).is_none() {
                break;
            }
            if cache.has_room()
                && let Some(share) = memory.tables.try_keep(table_cost(entries.len()))
            {
                cache.insert(&Table::new(index, offset, entries, share), true);
            }
        }
    }
    if problem.0.is_none() {
        walk.finish(&mut problem);
    }
    if let Some(what) = problem.0 {
        return Err(refused(path, what, "open it read-only and copy what can be read to a new image"));
    }
    let referred = walk.end;
    let mut end = referred;
    // A device has no end of its own: what is behind the last reference is free, and holds anything.
    if !front.file.info.block_device && !host.bug(Bug::FrontierFromLastL1) {
        end = end.max(front.file.info.size_bytes);
    }
    Ok(Walked { cache, end: referred, frontier: end.next_multiple_of(geometry.cluster_bytes()) })
}

/// A crash may have left references to what lies behind the end of the file. The file gets as long as they are,
/// durably, before anything is served: all bounds on where references may lead count from the size, and would be passed
/// by what is written now, or by what the next crash leaves.
///
/// It gets nearly as long first. Who dies before that is durable, or is told of an error although it has happened,
/// leaves a file that is still too short for its references, so that the next one begins anew.
async fn reach_all<H: ImageHost>(host: &H, front: &mut Front<H>, walked: &Walked) -> Result<(), Errno> {
    let info = &mut front.file.info;
    if info.block_device || walked.end <= info.size_bytes || host.bug(Bug::SizeBehind) {
        return Ok(());
    }
    info.size_bytes = walked.frontier;
    host.mark(Mark::SizeRecovered);
    for size in [walked.end - 1, walked.frontier] {
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
