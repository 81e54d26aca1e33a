//! qcow version 1: clusters on demand, above an optional backing file.
//!
//! ```text
//!   read   mapped ─► file       compressed ─► inflate      unmapped ─► backing file, or zeros
//!   write  mapped ─► in place
//!          else   ─► claim the clusters ─► table there? ─► place ─► data ─► [sync] ─► L2 entries ─► answer
//!   zeros, discards: see `zero`
//! ```
//!
//! # Order of writes
//!
//! * A new L2 table: zeros, sync, L1 entry. Only when that was accepted does anybody see the table.
//! * A new cluster: data, then the L2 entry. Where losing the data would show anything but the zeros that were there
//!   before, a sync comes between: above a backing file, in place of a compressed cluster, on a block device, and in a
//!   place that a failed try has used.
//! * A write is answered when data and mapping were accepted by the file. A flush makes both durable.
//! * Writes that allocate run in a task of their own: dropping the request does not stop them half way.
//!
//! # What is supported
//!
//! Clusters of 512 bytes to 64 KiB, L2 tables of 64 to 8192 entries, compressed clusters (read, and replaced when
//! written), backing files. Not encryption. Images with Xen's extended header open as what they also are, plain qcow;
//! opening for writing clears the header's checksum, which covers the L1 table and would be stale, so that other
//! readers ignore the extension as they do after a crash. Old ones whose L1 table is in the byte order of a PC open
//! read-only.

mod alloc;
mod check;
mod commit;
mod create;
mod format;
mod inflate;
mod open;
mod read;
mod table;
mod walk;
mod write;
mod zero;

use crate::calls::closed;
use crate::io::ImageFile;
use crate::memory::ImageStages;
use crate::{
    CheckReport, Description, Format, FormatInfo, ImageError, ImageHost, NewImage, OpenImage, OptionInfo,
};
use alloc::Allocator;
use format::{COMPRESSED, Geometry};
use inflate::Inflater;
use open::Front;
use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use table::{Cache, Table};
use tap_core::wait::Semaphore;
use tap_core::{Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, WaitReport};
use tap_host::{Budget, Bug, Errno, SECTOR_BYTES, SectorRange};

/// The format.
pub const FORMAT: Format = Format::new(&FormatInfo {
    name: "qcow",
    aliases: &[],
    about: "QEMU copy-on-write, version 1",
    options: &[
        OptionInfo { name: create::CLUSTER_SIZE, values: "512 to 64k" },
        OptionInfo { name: create::L2_ENTRIES, values: "64 to 8192" },
    ],
    has_backing: true,
});

/// Its row in a registry.
pub struct Driver;

impl<H: ImageHost> crate::Driver<H> for Driver {
    fn format(&self) -> Format {
        FORMAT
    }

    fn recognises(&self, head: &[u8]) -> bool {
        format::is_qcow(head)
    }

    fn open(&self, host: H, image: OpenImage<H>) -> LocalBoxFuture<Result<Rc<dyn Node>, ImageError>> {
        Box::pin(async move { Ok(Rc::new(Qcow::open(&host, &image).await?) as Rc<dyn Node>) })
    }

    fn create(&self, host: H, path: String, image: NewImage) -> LocalBoxFuture<Result<(), ImageError>> {
        Box::pin(async move { create::create(&host, &path, &image).await })
    }

    fn describe(&self, host: H, path: String) -> LocalBoxFuture<Result<Description, ImageError>> {
        Box::pin(async move { describe(&host, &path).await })
    }

    fn check(&self, host: H, path: String) -> Option<LocalBoxFuture<Result<CheckReport, ImageError>>> {
        Some(Box::pin(async move { check::check(&host, &path).await }))
    }
}

async fn describe<H: ImageHost>(host: &H, path: &str) -> Result<Description, ImageError> {
    let front = Front::read(host, path, false, false, &Budget::default()).await?;
    let (geometry, info) = (front.header.geometry, front.file.info);
    let backing = front.backing_name.map(|name| String::from_utf8_lossy(&name).into_owned());
    Ok(Description {
        format: FORMAT,
        disk_bytes: geometry.size_bytes,
        cluster_bytes: Some(geometry.cluster_bytes()),
        backing_path: backing.as_deref().map(|name| crate::resolve(path, name)),
        backing,
        file_bytes: info.size_bytes,
        allocated_bytes: info.allocated_bytes,
    })
}

/// An open qcow image.
struct Qcow<H: ImageHost> {
    /// `None` once closed.
    image: RefCell<Option<Rc<Image<H>>>>,
    info: NodeInfo,
}

struct Image<H: ImageHost> {
    host: H,
    file: ImageFile<H>,
    geometry: Geometry,
    /// No reference may reach further; see [`Geometry::reach`].
    reach: u64,
    /// Byte offsets of L2 tables, as published.
    l1: RefCell<Vec<u64>>,
    l1_turn: Semaphore,
    memory: ImageStages,
    cache: RefCell<Cache>,
    allocator: RefCell<Allocator>,
    backing: Option<Rc<dyn Node>>,
    backing_bytes: u64,
    inflater: RefCell<Inflater>,
    /// Tables that [`Bug::MappingInMemory`] did not write.
    unwritten: RefCell<Vec<Rc<Table>>>,
}

impl<H: ImageHost> Node for Qcow<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let open = self.image.borrow().clone().ok_or(Errno::ESHUTDOWN);
        let image = match crate::check_request(&request, self.info).and(open) {
            Ok(image) => image,
            Err(e) => return Box::pin(std::future::ready(Response { result: Err(e), bufs: request.bufs })),
        };
        let (start, len) = (request.range.start.0 * SECTOR_BYTES, request.range.len_bytes());
        match request.op {
            Op::Read => Box::pin(async move {
                if let Some(offset) = image.cached_extent(start, len) {
                    let (result, bufs) = image.file.read(offset, request.bufs).await;
                    return Response { result, bufs };
                }
                Box::pin(image.read(start, request.bufs)).await
            }),
            Op::Write => Box::pin(async move {
                if let Some(offset) = image.cached_extent(start, len) {
                    let (result, bufs) = image.file.write(offset, request.bufs).await;
                    return Response { result, bufs };
                }
                Box::pin(image.write(start, request.bufs)).await
            }),
            Op::WriteZeroes(flags) => Box::pin(async move {
                let result = image.write_zeroes(start, len, flags).await;
                Response { result, bufs: request.bufs }
            }),
            Op::Discard => {
                Box::pin(
                    async move { Response { result: image.discard(start, len).await, bufs: request.bufs } },
                )
            }
            Op::Flush => {
                Box::pin(async move { Response { result: image.flush().await, bufs: request.bufs } })
            }
        }
    }

    fn extents(&self, range: SectorRange, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let open = self.image.borrow().clone();
        Box::pin(async move { open.ok_or(Errno::ESHUTDOWN)?.extents(range, most).await })
    }

    fn info(&self) -> NodeInfo {
        self.info
    }

    /// Allocations and tables that wait for others, and what waits below.
    fn wait_report(&self) -> Vec<WaitReport> {
        let Some(image) = self.image.borrow().clone() else { return Vec::new() };
        let mut all = image.file.tracker().report();
        all.extend(image.backing.iter().flat_map(|backing| backing.wait_report()));
        all
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let (open, read_only) = (self.image.take(), self.info.read_only);
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

impl<H: ImageHost> Image<H> {
    /// Where `len` bytes of the disk from `start` on are in the file, if they are in one piece, uncompressed, and
    /// their table is in memory.
    fn cached_extent(&self, start: u64, len: u64) -> Option<u64> {
        let (first, last) = (self.cluster(start), self.cluster(start + len.checked_sub(1)?));
        let (index, at) = self.split(first);
        if self.split(last).0 != index {
            return None;
        }
        let cache = self.cache.borrow();
        let table = cache.get(index)?;
        let entries = table.entries.borrow();
        let host = entries[at];
        if host == 0 || host & COMPRESSED != 0 || host > self.reach {
            return None;
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut places = (host..).step_by(cluster_bytes as usize);
        let contiguous = entries[at..=at + (last - first) as usize].iter().all(|e| Some(*e) == places.next());
        contiguous.then_some(host + start % cluster_bytes)
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.flush_by(self.file.sync()).await
    }

    async fn flush_by(&self, sync: impl Future<Output = Result<(), Errno>>) -> Result<(), Errno> {
        if self.host.bug(Bug::FlushEarly) {
            return Ok(());
        }
        for table in self.unwritten.take() {
            self.write_entries(&table, 0..self.geometry.l2_entries(), &[]).await?;
        }
        // Every mapping was written before its request was answered.
        sync.await
    }

    /// Leaves a file that ends where its last cluster does: others put new clusters, or compressed bytes, at its end.
    async fn finish(&self) -> Result<(), Errno> {
        // What was written is made durable whether or not that succeeds.
        let sized = self.reach_frontier().await;
        self.flush_by(self.file.sync_to_close()).await.and(sized)
    }

    async fn reach_frontier(&self) -> Result<(), Errno> {
        let frontier = self.allocator.borrow().frontier;
        if !self.file.info.block_device && self.file.size().await? < frontier {
            self.file.set_size(frontier).await?;
        }
        Ok(())
    }

    /// The cluster that holds byte `at` of the disk.
    fn cluster(&self, at: u64) -> u64 {
        at >> self.geometry.cluster_bits
    }

    /// L1 index and L2 index of a cluster.
    fn split(&self, cluster: u64) -> (usize, usize) {
        let bits = self.geometry.l2_bits;
        ((cluster >> bits) as usize, (cluster & ((1 << bits) - 1)) as usize)
    }

    /// Whether the backing file has bytes for the disk from byte `start` on.
    fn backing_shows(&self, start: u64) -> bool {
        self.backing.is_some() && start < self.backing_bytes
    }

    /// Cuts `len` bytes from `start` on where one L2 table ends and the next begins: L1 index, start, length.
    fn by_table(&self, start: u64, len: u64) -> impl Iterator<Item = (usize, u64, usize)> + use<H> {
        let (span, end) = (self.geometry.table_span(), start + len);
        let mut at = start;
        std::iter::from_fn(move || {
            let (index, from) = (at / span, at);
            at = end.min((index + 1).saturating_mul(span));
            (from < end).then_some((index as usize, from, (at - from) as usize))
        })
    }
}

#[cfg(test)]
mod tests;
