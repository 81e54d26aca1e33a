//! From what a format has read of an image to a disk, and to what a check says.
//!
//! ```text
//!   format: file, header, root ─► Front ─► survey ─► Surveyed ─► disk
//!                                   │      to write: every reference is looked at, and the file made as long as they
//!                                   │      reach; to read: nothing needs to be known
//!                                   └────► check
//! ```

use super::owners::Owners;
use super::table::{cache_bytes, table_cost};
use super::walk::{Stopped, Walked, walk};
use super::{Cache, DOUBTS, Frontier, Geometry, HostOffset, Image, Layout, MappedDisk, Parts, SUSPECT_BYTES};
use crate::io::ImageFile;
use crate::memory::ImageStages;
use crate::{CheckReport, Description, Format, ImageError, ImageHost, OpenImage};
use std::marker::PhantomData;
use std::ops::Range;
use std::rc::Rc;
use tap_core::Node;
use tap_host::{Bug, Errno, Mark, SECTOR_BYTES};

/// What a format has read of an image, before anybody has looked at its tables.
pub struct Front<H: ImageHost, L: Layout> {
    file: ImageFile<H>,
    geometry: Geometry,
    /// Where the tables are; 0 where there is none.
    root: Vec<HostOffset>,
    /// What belongs to the format itself: ranges of the file, and names.
    fixed: Vec<(Range<HostOffset>, &'static str)>,
    /// What comes before all tables and clusters, in bytes.
    front_bytes: u64,
    layout: PhantomData<L>,
}

/// An image whose references are known as far as they need to be.
pub struct Surveyed<H: ImageHost, L: Layout> {
    front: Front<H, L>,
    memory: ImageStages,
    cache: Cache,
    space: Frontier,
    read_only: bool,
}

/// Header and root are usually followed by unused bytes up to here or a multiple.
const FRONT_ALIGN: u64 = 4096;

impl<H: ImageHost, L: Layout<Allocator = Frontier>> Front<H, L> {
    /// Of an image in `file`, which is open and locked. `root` says where its tables are, as many as the
    /// geometry says; 0 where there is none.
    pub fn new(file: ImageFile<H>, geometry: Geometry, root: Vec<HostOffset>) -> Self {
        Self { file, geometry, root, fixed: Vec::new(), front_bytes: 0, layout: PhantomData }
    }

    /// With ranges of the file that belong to the format itself, and what each is called in messages.
    /// `front_bytes` are before all tables and clusters.
    pub fn with_fixed(
        mut self,
        front_bytes: u64,
        fixed: impl IntoIterator<Item = (Range<HostOffset>, &'static str)>,
    ) -> Self {
        self.fixed.extend(fixed);
        Self { front_bytes, ..self }
    }

    /// What the image says of itself, without a backing file.
    pub fn describe(&self, format: Format) -> Description {
        Description {
            format,
            disk_bytes: self.geometry.size_bytes,
            cluster_bytes: Some(self.geometry.cluster_bytes()),
            backing: None,
            backing_path: None,
            file_bytes: self.file.info.size_bytes,
            allocated_bytes: self.file.info.allocated_bytes,
        }
    }

    /// Looks at every reference of an image that is opened for writing, and makes its file as long as they reach.
    ///
    /// # Errors
    /// [`ImageError`]: the tables cannot be read, or are damaged.
    pub async fn survey(mut self, host: &H, image: &OpenImage<H>) -> Result<Surveyed<H, L>, ImageError> {
        let (path, options) = (&image.path, &image.options);
        let memory = self.memory(path)?;
        let (cache, frontier) = if options.write {
            let owners = self.owners(&memory);
            let parts = (&self.file, &self.geometry, &self.root[..]);
            let walked = walk(host, parts, owners, &memory, options.table_bytes).await;
            let Walked { cache, end } = walked.map_err(|stopped| match stopped {
                Stopped::Failed(error) => ImageError::io("read the tables of", path)(error),
                Stopped::Damaged(what) => {
                    image.refused(what, "open it read-only and copy what can be read to a new image")
                }
            })?;
            let frontier = self.frontier(host, end);
            self.reach_all(host, end, frontier).await.map_err(ImageError::io("lengthen", path))?;
            (cache, frontier)
        } else {
            (Cache::new(self.root.len(), &self.geometry, options.table_bytes), HostOffset(0))
        };
        let info = self.file.info;
        let space = Frontier::new(frontier, info.block_device.then_some(info.size_bytes));
        Ok(Surveyed { front: self, memory, cache, space, read_only: !options.write })
    }

    /// Checks all metadata of the image at `path`, which is opened read-only, and decompresses every compressed
    /// cluster. Memory is bounded by what is mapped: a bit for each cluster.
    ///
    /// # Errors
    /// [`ImageError`] when any of it cannot be read. What cannot be read is not damage.
    pub async fn check(self, host: &H, path: &str) -> Result<CheckReport, ImageError> {
        let (geometry, front_bytes, info) = (self.geometry, self.front_bytes, self.file.info);
        let mut report = CheckReport { file_bytes: info.size_bytes, ..CheckReport::default() };
        let memory = self.memory(path)?;
        let mut owners = self.owners(&memory);
        let root = self.root.clone();
        // Without what is below: only this file is checked.
        let (cache, space) = (Cache::new(0, &geometry, 0), Frontier::new(HostOffset(0), None));
        let image = Surveyed { front: self, memory, cache, space, read_only: true }.into_image(host, None);
        let checked = image.check(&root, &mut owners, &mut report).await;
        checked.map_err(|(action, error)| ImageError::io(action, path)(error))?;
        let bytes = geometry.cluster_bytes();
        let used = (report.plain_clusters + owners.compressed_units) * bytes
            + report.tables * geometry.table_bytes().next_multiple_of(bytes);
        let front = front_bytes.next_multiple_of(FRONT_ALIGN.max(bytes));
        // A device goes on behind what is in use.
        let there = if info.block_device { 0 } else { info.size_bytes };
        report.leaked_clusters = there.max(owners.end.0).saturating_sub(front + used).div_ceil(bytes);
        Ok(report)
    }

    /// The memory that the image needs to be open.
    fn memory(&self, path: &str) -> Result<ImageStages, ImageError> {
        let front = self.root.len() * 8 + cache_bytes(self.root.len());
        let table = table_cost(self.geometry.table_entries());
        let cluster = self.geometry.cluster_bytes() as usize;
        ImageStages::new(self.file.budget(), path, (front, table, cluster, DOUBTS * SUSPECT_BYTES))
    }

    /// What is no cluster, and has an owner.
    fn owners(&self, memory: &ImageStages) -> Owners<L> {
        let file_bytes = self.file.info.size_bytes;
        let sizes = (file_bytes, self.geometry.reach(file_bytes));
        Owners::new(self.geometry, sizes, self.fixed.iter().cloned(), &memory.fixed)
    }

    /// Where new clusters may go, with `end` as the end of the last thing that is referred to.
    fn frontier(&self, host: &H, end: HostOffset) -> HostOffset {
        let info = &self.file.info;
        // A device has no end of its own: what is behind the last reference is free, and holds anything.
        let goes_on = info.block_device || host.bug(Bug::FrontierFromLastL1);
        let end = if goes_on { end.0 } else { end.0.max(info.size_bytes) };
        HostOffset(end.next_multiple_of(self.geometry.cluster_bytes()))
    }

    /// A crash may have left references to what lies behind the end of the file. The file gets as long as they are,
    /// durably, before anything is served: all bounds on where references may lead count from the size, and would be
    /// passed by what is written now, or by what the next crash leaves.
    ///
    /// It gets nearly as long first. Who dies before that is durable, or is told of an error although it has happened,
    /// leaves a file that is still too short for its references, so that the next one begins anew. It ends between two
    /// sectors then: what is written there later has no sector of which a part is behind the end.
    async fn reach_all(&mut self, host: &H, end: HostOffset, frontier: HostOffset) -> Result<(), Errno> {
        let info = &mut self.file.info;
        if info.block_device || end.0 <= info.size_bytes || host.bug(Bug::SizeBehind) {
            return Ok(());
        }
        let nearly = ((end.0 - 1) / SECTOR_BYTES * SECTOR_BYTES).max(info.size_bytes);
        info.size_bytes = frontier.0;
        host.mark(Mark::SizeRecovered);
        for size in [nearly, frontier.0] {
            self.file.set_size(size).await?;
            // One that fails otherwise is remembered: no flush of this file succeeds any more, and so none promises
            // what is written there. After this one nothing was given up, and nothing is remembered.
            if self.file.sync_to_close().await == Err(Errno::EINTR) {
                return Err(Errno::EINTR);
            }
        }
        Ok(())
    }
}

impl<H: ImageHost, L: Layout<Allocator = Frontier>> Surveyed<H, L> {
    /// Its file.
    pub fn file(&self) -> &ImageFile<H> {
        &self.front.file
    }

    /// The disk that the image is, above `backing` if it has a backing file.
    pub fn into_disk(self, host: &H, backing: Option<Rc<dyn Node>>) -> MappedDisk<H, L> {
        let read_only = self.read_only;
        MappedDisk::new(self.into_image(host, backing), read_only)
    }

    fn into_image(self, host: &H, backing: Option<Rc<dyn Node>>) -> Image<H, L> {
        let Self { front: Front { file, geometry, root, .. }, mut memory, cache, space, .. } = self;
        memory.walked();
        let reach = geometry.reach(file.info.size_bytes);
        Image::new(host, Parts { file, geometry, reach, root, memory, cache, space, backing })
    }
}
