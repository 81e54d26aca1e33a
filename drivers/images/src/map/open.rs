//! Turns what a format has read of an image into a disk, or a check report.
//!
//! ```text
//!   format: file, header, root ─► Front ─► survey ─► Surveyed ─► disk
//!                                   │      to write: checks every reference, and extends the file as far as they
//!                                   │      reach; to read: checks nothing
//!                                   └────► check
//! ```

use super::owners::Owners;
use super::table::{cache_bytes, table_cost};
use super::walk::{FRONTIER_FROM_LAST_L1, Stopped, Walked, walk};
use super::{
    Allocator, Cache, DOUBTS, Frontier, Geometry, HostOffset, Image, Layout, MappedDisk, Parts, SUSPECT_BYTES,
};
use crate::io::ImageFile;
use crate::memory::ImageStages;
use crate::{CheckReport, Description, Format, ImageError, ImageHost, OpenImage};
use std::marker::PhantomData;
use std::ops::Range;
use std::rc::Rc;
use tap_core::Node;
use tap_host::{Errno, SECTOR_BYTES};

tap_host::listed! {
    pub(super) BUGS: Bug;
    SIZE_BEHIND = "size-behind",
        "an image whose references point past the end of its file after a crash is served as it is";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    SIZE_RECOVERED = "size-recovered",
        "a file that a crash had left shorter than its references was made longer";
}

/// The parts of an image that a format has read, before its tables are read.
pub struct Front<H: ImageHost, L: Layout> {
    file: ImageFile<H>,
    geometry: Geometry,
    /// Offsets of the tables; 0 for none.
    root: Vec<HostOffset>,
    /// Ranges of the file that belong to the format itself, and their names.
    fixed: Vec<(Range<HostOffset>, &'static str)>,
    /// Space that is used, although it belongs to none of them.
    padding: Range<HostOffset>,
    layout: PhantomData<L>,
}

/// An image whose references are checked, if it is opened for writing.
pub struct Surveyed<H: ImageHost, L: Layout> {
    front: Front<H, L>,
    memory: ImageStages,
    cache: Cache,
    space: Frontier,
    read_only: bool,
}

impl<H: ImageHost, L: Layout<Allocator = Frontier>> Front<H, L> {
    /// An image in `file`, which is open and locked. `root` has the offsets of its tables, as many as the geometry
    /// says; 0 for none.
    pub fn new(file: ImageFile<H>, geometry: Geometry, root: Vec<HostOffset>) -> Self {
        Self { file, geometry, root, fixed: Vec::new(), padding: Range::default(), layout: PhantomData }
    }

    /// Adds ranges of the file that belong to the format itself, and their names in messages. `padding` is space next
    /// to them that a check does not count as lost.
    pub fn with_fixed(
        mut self,
        padding: Range<HostOffset>,
        fixed: impl IntoIterator<Item = (Range<HostOffset>, &'static str)>,
    ) -> Self {
        self.fixed.extend(fixed);
        Self { padding, ..self }
    }

    /// The properties of the image, without a backing file.
    pub fn describe(&self, format: Format) -> Description {
        Description {
            format,
            disk_bytes: self.geometry.disk_sectors() * SECTOR_BYTES,
            cluster_bytes: Some(self.geometry.cluster_bytes()),
            backing: None,
            backing_path: None,
            file_bytes: self.file.info.size_bytes,
            allocated_bytes: self.file.info.allocated_bytes,
        }
    }

    /// Checks every reference of an image that is opened for writing, and extends its file as far as they reach.
    ///
    /// # Errors
    /// [`ImageError`] when the tables cannot be read or are damaged.
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
            self.reach_all(host, end, frontier).await.map_err(ImageError::io("extend", path))?;
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
    /// [`ImageError`] when any of it cannot be read, which is not damage.
    pub async fn check(self, host: &H, path: &str) -> Result<CheckReport, ImageError> {
        let (geometry, padding, info) = (self.geometry, self.padding.clone(), self.file.info);
        let mut report = CheckReport { file_bytes: info.size_bytes, ..CheckReport::default() };
        let memory = self.memory(path)?;
        let mut owners = self.owners(&memory);
        let root = self.root.clone();
        // Without a backing file: only this file is checked.
        let (cache, space) = (Cache::new(0, &geometry, 0), Frontier::new(HostOffset(0), None));
        let image = Surveyed { front: self, memory, cache, space, read_only: true }.into_image(host, None);
        let checked = image.check(&root, &mut owners, &mut report).await;
        checked.map_err(|(action, error)| ImageError::io(action, path)(error))?;
        // A device continues past the used part.
        let space_bytes = if info.block_device { owners.end.0.min(info.size_bytes) } else { info.size_bytes };
        report.leaked_clusters = owners.lost(padding, space_bytes, &mut report);
        Ok(report)
    }

    /// The memory that the image needs to be open.
    fn memory(&self, path: &str) -> Result<ImageStages, ImageError> {
        let front = self.root.len() * 8 + cache_bytes(self.root.len());
        let table = table_cost(self.geometry.table_entries());
        let cluster = self.geometry.cluster_bytes() as usize;
        ImageStages::new(self.file.budget(), path, (front, table, cluster, DOUBTS * SUSPECT_BYTES))
    }

    /// The owners of the ranges that are not clusters.
    fn owners(&self, memory: &ImageStages) -> Owners<L> {
        let file_bytes = self.file.info.size_bytes;
        let sizes = (file_bytes, self.geometry.reach(file_bytes), self.unwritten_table());
        Owners::new(self.geometry, sizes, self.fixed.iter().cloned(), &memory.fixed)
    }

    /// The table that a crash has left out of the file: the only one that is not there, where the file ends. QEMU
    /// begins a new table at the end of the file, and makes the L1 entry durable before it writes the table. Such a
    /// table is empty. No crash leaves any other table out: this driver writes a table first.
    fn unwritten_table(&self) -> Option<usize> {
        let info = &self.file.info;
        let is_out = |at: HostOffset| at.0.saturating_add(self.geometry.table_bytes()) > info.size_bytes;
        let tables = self.root.iter().copied().enumerate().filter(|(_, at)| *at != HostOffset(0));
        let mut out = tables.filter(|(_, at)| is_out(*at));
        let (index, at) = out.next()?;
        let place = info.size_bytes.checked_next_multiple_of(self.geometry.cluster_bytes());
        (!info.block_device && place == Some(at.0) && out.next().is_none()).then_some(index)
    }

    /// Where new clusters may begin; `end` is the end of the highest reference.
    fn frontier(&self, host: &H, end: HostOffset) -> HostOffset {
        let info = &self.file.info;
        // A device does not end with the image: space past the last reference is free, and holds anything.
        let open_ended = info.block_device || host.bug(&FRONTIER_FROM_LAST_L1);
        let end = if open_ended { end.0 } else { end.0.max(info.size_bytes) };
        HostOffset(end.next_multiple_of(self.geometry.cluster_bytes()))
    }

    /// A crash may have left references past the end of the file. The file is extended as far as they reach, durably,
    /// before anything is served: all bounds on references are relative to the size, and would be exceeded by the next
    /// writes, or by what the next crash leaves.
    ///
    /// It is first extended to one sector less. If the process dies before that is durable, or gets an error although
    /// it took effect, the file is still too short for its references, so the next process starts over. The file then
    /// ends at a sector boundary, so that no later write has a sector partly past the end.
    async fn reach_all(&mut self, host: &H, end: HostOffset, frontier: HostOffset) -> Result<(), Errno> {
        let info = &mut self.file.info;
        if info.block_device || end.0 <= info.size_bytes || host.bug(&SIZE_BEHIND) {
            return Ok(());
        }
        let nearly = ((end.0 - 1) / SECTOR_BYTES * SECTOR_BYTES).max(info.size_bytes);
        info.size_bytes = frontier.0;
        host.mark(&SIZE_RECOVERED);
        for size in [nearly, frontier.0] {
            self.file.set_size(size).await?;
            // Any other failure is latched: no later flush of this file succeeds, so none promises data written there.
            // After `EINTR` no write was dropped, and nothing is latched.
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

    /// The disk of the image, above `backing` if it has a backing file.
    pub fn into_disk(self, host: &H, backing: Option<Rc<dyn Node>>) -> MappedDisk<H, L> {
        let read_only = self.read_only;
        MappedDisk::new(self.into_image(host, backing), read_only)
    }

    /// The end of its space; past it nothing is in use.
    pub(super) fn space_end(&self) -> HostOffset {
        self.space.end()
    }

    /// Its file, without all the rest.
    pub(super) fn into_front_file(self) -> ImageFile<H> {
        self.front.file
    }

    pub(super) fn into_image(self, host: &H, backing: Option<Rc<dyn Node>>) -> Image<H, L> {
        // Opening for writing has made it part of the file.
        let empty_table = if self.read_only { self.front.unwritten_table() } else { None };
        let Self { front: Front { file, geometry, root, .. }, mut memory, cache, space, read_only } = self;
        memory.walked();
        let reach = geometry.reach(file.info.size_bytes);
        // Opening for writing has checked all tables, and new ones are past the end that the file had.
        let tables_reach = if read_only { HostOffset(file.info.size_bytes) } else { reach };
        let reaches = (reach, tables_reach);
        Image::new(host, Parts { file, geometry, reaches, empty_table, root, memory, cache, space, backing })
    }
}
