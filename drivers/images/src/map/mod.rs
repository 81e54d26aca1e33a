//! The map engine: maps a disk to a file cluster by cluster, through a root and tables.
//!
//! ```text
//!   byte of the disk ─► index in the root ─► table ─► entry ─► cluster of the file
//!
//!   read   mapped ─► file       compressed ─► inflate      unmapped ─► backing file, or zeros
//!   write  mapped ─► in place
//!          else   ─► claim the clusters ─► load or create table ─► place ─► data ─► [sync] ─► entries ─► answer
//!   zeros, discards: see `zero`
//! ```
//!
//! A format provides its [`Layout`] (the meaning of entries) and its [`Allocator`] (places for new clusters), reads its
//! header and root, and passes them as a [`Front`], which becomes a disk. Everything else is here, once: reading,
//! splitting, zeroes, copying up, compressed clusters, extents, tables in memory and the writing of mappings.
//!
//! # Order of writes
//!
//! * A new table: zeros, sync, entry of the root. The table is visible only once that entry is accepted.
//! * A new cluster: data, then its entry. A sync comes between if losing the data would expose anything but the zeros
//!   that were there before: above a backing file, in place of a compressed cluster, on a block device, and in a place
//!   that a failed try has used.
//! * A write is answered once the file has accepted data and mapping. A flush makes both durable.
//! * Each write that allocates runs in a separate task: dropping the request does not stop it half way.
//!
//! | module | what |
//! |---|---|
//! | `layout` | geometry, the meaning of an entry |
//! | `offset` | offsets on the disk and in the file, as distinct types |
//! | `open` | turns what a format has read into a disk, or a check report |
//! | `grow` | prepares an image for a larger disk |
//! | `table` | tables in memory, loaded once |
//! | `commit` | writes mappings, several at a time |
//! | `space`, `doubt` | places for new clusters; places that may or may not be mapped |
//! | `read`, `write`, `zero`, `extents`, `inflate` | requests |
//! | `walk`, `owners`, `bits` | visits all tables, to open for writing and to check; the owner of each byte |

mod bits;
mod commit;
mod doubt;
mod extents;
mod grow;
mod inflate;
mod layout;
mod offset;
mod open;
mod owners;
mod read;
mod space;
mod table;
mod walk;
mod write;
mod zero;

pub use grow::Zeroed;
pub use layout::{Compressed, Geometry, Layout, Mapping, decode_entries};
pub use offset::{GuestCluster, GuestOffset, HostOffset};
pub use open::{Front, Surveyed};
pub use space::{Allocator, Frontier};

pub(crate) use inflate::Unreadable;
#[cfg(test)]
pub(crate) use table::table_cost;

use crate::ImageHost;
use crate::calls::closed;
use crate::io::ImageFile;
use crate::memory::ImageStages;
use crate::sync::{FLUSH_EARLY, FUA_UNSYNCED};
use doubt::{DOUBTS, SUSPECT_BYTES, Suspects};
use inflate::Inflater;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use table::Cache;
use tap_core::wait::Semaphore;
use tap_core::{Child, Extent, LocalBoxFuture, Node, NodeInfo, NodeName, Op, Request, Response, WaitReport};
use tap_host::{Errno, IoVec, SECTOR_BYTES, SectorRange};

tap_host::listed! {
    pub(super) BUGS: Bug with [
        commit::BUGS, doubt::BUGS, extents::BUGS, grow::BUGS, open::BUGS, read::BUGS, table::BUGS, walk::BUGS,
        write::BUGS, zero::BUGS,
    ];
}

tap_host::listed! {
    pub(super) MARKS: Mark with [commit::MARKS, inflate::MARKS, open::MARKS, table::MARKS, write::MARKS];
}

/// An open image as a node.
pub struct MappedDisk<H: ImageHost, L: Layout> {
    /// `None` once closed.
    image: RefCell<Option<Rc<Image<H, L>>>>,
    info: Rc<Cell<NodeInfo>>,
}

/// The components of an open image.
struct Parts<H: ImageHost, L: Layout> {
    file: ImageFile<H>,
    geometry: Geometry,
    /// See [`Image::reach`] and [`Image::tables_reach`].
    reaches: (HostOffset, HostOffset),
    empty_table: Option<usize>,
    /// Offsets of the tables; 0 for none.
    root: Vec<HostOffset>,
    memory: ImageStages,
    cache: Cache,
    space: L::Allocator,
    backing: Option<Rc<dyn Node>>,
}

/// An open image.
struct Image<H: ImageHost, L: Layout> {
    host: H,
    file: ImageFile<H>,
    geometry: Geometry,
    /// No reference may end past it.
    reach: HostOffset,
    /// No table may end past it, and no compressed cluster may begin there or past it.
    tables_reach: HostOffset,
    /// A table that is not in the file, although the root refers to it.
    empty_table: Option<usize>,
    /// Published offsets of the tables; 0 for none.
    root: RefCell<Vec<HostOffset>>,
    root_turn: Semaphore,
    memory: ImageStages,
    cache: RefCell<Cache>,
    space: RefCell<L::Allocator>,
    suspects: RefCell<Suspects>,
    backing: Option<Rc<dyn Node>>,
    backing_bytes: u64,
    inflater: RefCell<Inflater>,
}

impl<H: ImageHost, L: Layout> MappedDisk<H, L> {
    fn new(image: Image<H, L>, read_only: bool) -> Self {
        let size_sectors = image.geometry.disk_sectors();
        let info = NodeInfo { read_only, ..image.file.node_info(size_sectors) };
        Self { image: RefCell::new(Some(Rc::new(image))), info: Rc::new(Cell::new(info)) }
    }

    /// Performs a request that is within the disk.
    fn execute(
        image: Rc<Image<H, L>>,
        op: Op,
        start: GuestOffset,
        len: u64,
        bufs: IoVec,
    ) -> LocalBoxFuture<Response> {
        match op {
            Op::Read => Box::pin(async move {
                if let Some(offset) = image.cached_extent(start, len) {
                    let (result, bufs) = image.file.read(offset.0, bufs).await;
                    return Response { result, bufs };
                }
                Box::pin(image.read(start, bufs)).await
            }),
            Op::Write => Box::pin(async move {
                if let Some(offset) = image.cached_extent(start, len) {
                    let (result, bufs) = image.file.write(offset.0, bufs).await;
                    return Response { result, bufs };
                }
                Box::pin(image.write(start, bufs)).await
            }),
            Op::WriteZeroes(flags) => Box::pin(async move {
                let result = image.write_zeroes(start, len, flags).await;
                Response { result, bufs }
            }),
            Op::Discard => {
                Box::pin(async move { Response { result: image.discard(start, len).await, bufs } })
            }
            Op::Flush => Box::pin(async move { Response { result: image.flush().await, bufs } }),
        }
    }
}

impl<H: ImageHost, L: Layout> Node for MappedDisk<H, L> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let open = self.image.borrow().clone().ok_or(Errno::ESHUTDOWN);
        let image = match self.info.get().check(&request).and(open) {
            Ok(image) => image,
            Err(e) => return Box::pin(std::future::ready(Response { result: Err(e), bufs: request.bufs })),
        };
        let start = GuestOffset(request.range.start.0 * SECTOR_BYTES);
        let len = request.range.len_bytes();
        if !request.fua {
            return Self::execute(image, request.op, start, len, request.bufs);
        }
        let answer = Self::execute(Rc::clone(&image), request.op, start, len, request.bufs);
        Box::pin(async move {
            let Response { result, bufs } = answer.await;
            let synced = result.is_err() || image.host.bug(&FUA_UNSYNCED);
            let result = if synced { result } else { image.flush().await };
            Response { result, bufs }
        })
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let open = self.image.borrow().clone();
        Box::pin(async move { open.ok_or(Errno::ESHUTDOWN)?.extents(range, max).await })
    }

    fn info(&self) -> NodeInfo {
        self.info.get()
    }

    fn name(&self) -> Option<NodeName> {
        self.image.borrow().as_ref().map(|image| image.file.name.clone())
    }

    fn children(&self) -> Vec<Child> {
        let backing = self.image.borrow().as_ref().and_then(|image| image.backing.clone());
        backing.into_iter().map(|node| Child { role: "backing", node }).collect()
    }

    /// Allocations and tables that wait for others.
    fn waits(&self) -> Vec<WaitReport> {
        self.image.borrow().as_ref().map_or_else(Vec::new, |image| image.file.tracker().report())
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let (open, info) = (self.image.borrow().clone(), Rc::clone(&self.info));
        Box::pin(async move {
            let image = open.ok_or(Errno::ESHUTDOWN)?;
            if !info.get().read_only {
                image.finish().await?;
                image.file.share().await?;
                info.set(NodeInfo { read_only: true, ..info.get() });
            }
            Ok(())
        })
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let (open, read_only) = (self.image.take(), self.info.get().read_only);
        Box::pin(async move {
            let Some(image) = open else { return Ok(()) };
            let flushed = if read_only { Ok(()) } else { image.finish().await };
            let below = match &image.backing {
                Some(backing) => backing.close().await,
                None => Ok(()),
            };
            let host = image.host.clone();
            drop(image);
            closed(&host).await;
            flushed.and(below)
        })
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    fn new(host: &H, parts: Parts<H, L>) -> Self {
        let Parts { file, geometry, reaches, empty_table, root, memory, cache, space, backing } = parts;
        let (reach, tables_reach) = reaches;
        assert!(geometry.table_bytes() >= SECTOR_BYTES, "a table smaller than a sector");
        Self {
            host: host.clone(),
            file,
            geometry,
            reach,
            tables_reach,
            empty_table,
            root: RefCell::new(root),
            root_turn: Semaphore::new(1),
            memory,
            cache: RefCell::new(cache),
            space: RefCell::new(space),
            suspects: RefCell::default(),
            backing_bytes: backing.as_ref().map_or(0, |b| b.info().size_sectors * SECTOR_BYTES),
            backing,
            inflater: RefCell::default(),
        }
    }

    /// The offset in the file of `len` bytes of the disk from `start` on, if they are contiguous, uncompressed, and
    /// their table is in memory.
    fn cached_extent(&self, start: GuestOffset, len: u64) -> Option<HostOffset> {
        let (first, last) = (self.cluster(start), self.cluster(start + len.checked_sub(1)?));
        let (index, at) = self.split(first);
        if self.split(last).0 != index {
            return None;
        }
        let cache = self.cache.borrow();
        let table = cache.get(index)?;
        let entries = table.entries.borrow();
        let Mapping::Plain(host) = L::mapping(entries[at], &self.geometry) else { return None };
        if host > self.reach {
            return None;
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let run = &entries[at..=at + (last - first) as usize];
        let contiguous = (0..).zip(run).all(|(n, entry)| *entry == L::entry(host + n * cluster_bytes));
        contiguous.then_some(host + start.0 % cluster_bytes)
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.flush_by(self.file.sync()).await
    }

    async fn flush_by(&self, sync: impl Future<Output = Result<(), Errno>>) -> Result<(), Errno> {
        if self.host.bug(&FLUSH_EARLY) {
            return Ok(());
        }
        // Every mapping was written before its request was answered.
        sync.await
    }

    /// Extends the file to the end of its last cluster, since other programs append clusters or compressed bytes at its
    /// end.
    async fn finish(&self) -> Result<(), Errno> {
        assert!(self.cache.borrow().is_at_rest(), "an image is closed with table entries left to write");
        // Written data is made durable whether or not that succeeds.
        let sized = self.reach_frontier().await;
        self.flush_by(self.file.sync_to_close()).await.and(sized)
    }

    async fn reach_frontier(&self) -> Result<(), Errno> {
        let frontier = self.space.borrow().end();
        if !self.file.info.block_device && self.file.size().await? < frontier.0 {
            self.file.set_size(frontier.0).await?;
        }
        Ok(())
    }

    /// The cluster that holds the byte at `at`.
    fn cluster(&self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.geometry.cluster_bits)
    }

    /// Where `cluster` begins on the disk.
    fn start_of(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.geometry.cluster_bits)
    }

    /// Index in the root, and index in the table, of a cluster.
    fn split(&self, cluster: GuestCluster) -> (usize, usize) {
        let bits = self.geometry.table_bits;
        ((cluster.0 >> bits) as usize, (cluster.0 & ((1 << bits) - 1)) as usize)
    }

    /// Whether unmapped bytes at `start` read as the backing file.
    fn backing_shows(&self, start: GuestOffset) -> bool {
        self.backing.is_some() && start.0 < self.backing_bytes
    }

    /// Splits `len` bytes from `start` on at the boundaries of tables: index in the root, start, length.
    fn by_table(
        &self,
        start: GuestOffset,
        len: u64,
    ) -> impl Iterator<Item = (usize, GuestOffset, usize)> + use<H, L> {
        let (span, end) = (self.geometry.table_span(), start + len);
        let mut at = start;
        std::iter::from_fn(move || {
            let (index, from) = (at.0 / span, at);
            at = end.min(GuestOffset((index + 1).saturating_mul(span)));
            (from < end).then_some((index as usize, from, (at - from) as usize))
        })
    }
}
