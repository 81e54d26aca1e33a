//! Writes.
//!
//! Clusters that are mapped and not compressed are written in place, without claims. All other writes claim their
//! clusters, so that a second writer of a cluster waits and then finds it mapped.

use super::Image;
use super::layout::{Layout, Mapping};
use super::space::Allocator;
use super::table::{ALLOCATION_RETRIED, Table};
use super::{GuestCluster, GuestOffset, HostOffset};
use crate::ImageHost;
use crate::carve::Carver;
use crate::memory::{PART_BYTES, take_some};
use futures_util::future::{OptionFuture, join_all};
use smallvec::SmallVec;
use std::rc::Rc;
use tap_core::wait::joined;
use tap_core::{Access, Op, Response, Space};
use tap_host::{Errno, Event, IoVec, Share, bytes_of, cost_of};

tap_host::listed! {
    pub(super) BUGS: Bug;
    OVERLAY_DROPS_REST = "overlay-drops-rest",
        "a partial write to a new overlay cluster drops the rest of the cluster";
    DATA_AFTER_MAPPING = "data-after-mapping",
        "a cluster is mapped before its data is durable although losing the data exposes old bytes";
    DOUBLE_ALLOCATION = "double-allocation", "two writes to one unallocated cluster both allocate it";
    COMPRESSED_IN_PLACE = "compressed-in-place",
        "a write to a compressed cluster goes into the compressed bytes";
    TABLE_KEPT = "table-kept", "a write keeps the memory of its table from its first part to its last";
    CLUSTER_PASSED_OVER = "cluster-passed-over",
        "a write in as many pieces as are written at once skips a cluster and continues after it";
    MEMORY_FORGOTTEN = "memory-forgotten",
        "the memory reserved for a mapping in doubt is not returned when it is not needed";
    PLACE_LOST = "place-lost", "a place whose data could not be written is not returned to the allocator";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    CLUSTER_ALLOCATED = "cluster-allocated", "a data cluster was allocated";
    COPY_UP = "copy-up", "a partial write filled the rest of its cluster from below";
    COMPRESSED_REWRITTEN = "compressed-rewritten", "a compressed cluster was replaced by a normal one";
    WRITE_PARTED = "write-parted", "a write had more pieces than are written at once";
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Already mapped: written in place.
    Mapped,
    /// Needs new space.
    New,
    /// Gets the space of an earlier failed try.
    Again,
}

/// Limit of groups written at once.
const MAX_GROUPS: usize = 64;

/// Contiguous clusters of one table that are written together.
#[derive(Clone, Copy)]
struct Group {
    place: Place,
    /// Index of the first in the table.
    first: usize,
    count: usize,
    /// Their offset in the file; unused for [`Place::New`].
    host: HostOffset,
    /// Some of them are stored compressed.
    compressed: bool,
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    pub(super) async fn write(self: Rc<Self>, start: GuestOffset, bufs: IoVec) -> Response {
        let len = bytes_of(&bufs) as u64;
        let mut tables = self.by_table(start, len);
        if let (Some((index, ..)), None) = (tables.next(), tables.next()) {
            // Perhaps only the table was missing in memory.
            match self.table(index).await {
                Ok(_table) => {
                    if let Some(offset) = self.cached_extent(start, len) {
                        let (result, bufs) = self.file.write(offset.0, bufs).await;
                        return Response { result, bufs };
                    }
                }
                Err(e) => return Response { result: Err(e), bufs },
            }
        }
        let image = Rc::clone(&self);
        // The request may be dropped; its effect still happens.
        let (task, response) = joined(async move { image.write_all(start, bufs).await });
        self.host.spawn("allocate", self.cluster(start).0, task);
        // The task ends without an answer only when the process does.
        response.await.unwrap_or_else(|| Response { result: Err(Errno::EIO), bufs: IoVec::new() })
    }

    async fn write_all(&self, start: GuestOffset, bufs: IoVec) -> Response {
        let len = bytes_of(&bufs) as u64;
        let mut carver = Carver::new(Op::Write, bufs);
        let mut result = Ok(());
        for (index, from, len) in self.by_table(start, len) {
            result = self.write_table(index, from, len, (from - start) as usize, &mut carver).await;
            if result.is_err() {
                break;
            }
        }
        Response { result, bufs: carver.finish() }
    }

    /// Writes `len` bytes from `start` on, all mapped by table `index`; they are at byte `at` of the request.
    async fn write_table(
        &self,
        index: usize,
        start: GuestOffset,
        len: usize,
        at: usize,
        carver: &mut Carver,
    ) -> Result<(), Errno> {
        let (first, last) = (self.cluster(start), self.cluster(GuestOffset(start.0 + len as u64 - 1)));
        let ticket = self.file.tracker().ticket("allocation of cluster", first.0);
        if !self.host.bug(&DOUBLE_ALLOCATION) {
            ticket.claim(Space::Clusters, first.0..last.0 + 1, Access::Exclusive);
        }
        ticket.ready().await;
        let _kept = OptionFuture::from(self.host.bug(&TABLE_KEPT).then_some(self.table_or_new(index))).await;
        let (mut from, end) = (start, start + len as u64);
        while from < end {
            // The table is held for one part at a time, since others may wait for its memory.
            let table = self.table_or_new(index).await?;
            from = self.write_some(&table, from, end, (at, start), carver).await?;
        }
        Ok(())
    }

    /// Writes bytes of `table` from `from` on, as many before `end` as fit in memory; returns where it ended. Byte
    /// `at.0` of the request is at `at.1` on the disk.
    async fn write_some(
        &self,
        table: &Rc<Table>,
        from: GuestOffset,
        end: GuestOffset,
        at: (usize, GuestOffset),
        carver: &mut Carver,
    ) -> Result<GuestOffset, Errno> {
        let (first, last) = (self.cluster(from), self.cluster(GuestOffset(end.0 - 1)));
        let groups = self.groups(table, first, (last - first) as usize + 1);
        let base = (table.index as u64) << self.geometry.table_bits;
        // First cluster and byte range of a group.
        let span = |group: &Group| {
            let cluster = GuestCluster(base | group.first as u64);
            let after = self.start_of(cluster + group.count as u64);
            (cluster, self.start_of(cluster).max(from), after.min(end))
        };
        let part_at = |start: GuestOffset| at.0 + (start - at.1) as usize;
        let cost = |carver: &Carver, group: &Group| {
            let (_, start, end) = span(group);
            let fill = self.fill_cost(group, start, end);
            (carver.cost(part_at(start), (end - start) as usize) + fill, fill)
        };
        let need = groups.iter().map(|group| cost(carver, group).0).sum();
        let mut share = take_some(&self.memory.parts, need).await?;
        let mut writes = Vec::with_capacity(groups.len());
        let mut done = from;
        for mut group in groups {
            let cut = cost(carver, &group).0 > share.bytes();
            if cut {
                if !writes.is_empty() {
                    break;
                }
                group.count = (PART_BYTES >> self.geometry.cluster_bits).clamp(1, group.count);
            }
            let (cluster, group_start, group_end) = span(&group);
            let fill = share.split(cost(carver, &group).1).expect("its cost was counted");
            let part = carver.take(&mut share, part_at(group_start), (group_end - group_start) as usize);
            let mut part = part.expect("its cost was counted");
            done = group_end;
            writes.push(Box::pin(async move {
                let bufs = std::mem::take(&mut part.bufs);
                let (result, bufs) = self.write_group(table, group, cluster, group_start, (bufs, fill)).await;
                part.bufs = bufs;
                (result, part)
            }));
            // Later groups wait for the rest of a group that was cut.
            if cut {
                break;
            }
        }
        let mut result = Ok(());
        for (write, part) in join_all(writes).await {
            result = result.and(write);
            carver.put(part);
        }
        result.map(|()| done)
    }

    /// Memory to fill the rest of the clusters of `group`, of which `start` to `end` is written.
    fn fill_cost(&self, group: &Group, start: GuestOffset, end: GuestOffset) -> usize {
        let cluster = self.geometry.cluster_bytes();
        let whole = start.0.is_multiple_of(cluster) && end.0.is_multiple_of(cluster);
        // The bytes on each side may come from two places.
        if whole || group.place == Place::Mapped { 0 } else { 4 * cost_of(cluster as usize) }
    }

    /// Splits `count` clusters from `first` on into at most [`MAX_GROUPS`] groups that are written in one way.
    fn groups(&self, table: &Table, first: GuestCluster, count: usize) -> SmallVec<[Group; 2]> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let suspects = self.suspects.borrow();
        let mut groups: SmallVec<[Group; 2]> = SmallVec::new();
        let start = self.split(first).1;
        for (at, cluster) in (start..start + count).zip((first.0..).map(GuestCluster)) {
            let mapping = table.mapping::<L>(at, &self.geometry);
            let compressed = matches!(mapping, Mapping::Compressed(_));
            let (place, host) = match mapping {
                Mapping::Plain(host) => (Place::Mapped, host),
                Mapping::Compressed(run) if self.host.bug(&COMPRESSED_IN_PLACE) => {
                    (Place::Mapped, run.offset)
                }
                Mapping::Unmapped | Mapping::Compressed(_) => {
                    match suspects.place_of(cluster, cluster_bytes) {
                        Some(host) => (Place::Again, host),
                        None => (Place::New, HostOffset(0)),
                    }
                }
            };
            if let Some(last) = groups.last_mut()
                && last.place == place
                && (place == Place::New || last.host + last.count as u64 * cluster_bytes == host)
            {
                last.count += 1;
                last.compressed |= compressed;
            } else if groups.len() == MAX_GROUPS && self.host.bug(&CLUSTER_PASSED_OVER) {
                continue;
            } else if groups.len() == MAX_GROUPS {
                self.host.mark(&WRITE_PARTED);
                break;
            } else {
                groups.push(Group { place, first: at, count: 1, host, compressed });
            }
        }
        groups
    }

    /// Writes buffers at `start` of the disk, within the clusters of `group`, the first of which is `cluster`; the
    /// share is memory to fill the rest of them.
    async fn write_group(
        &self,
        table: &Rc<Table>,
        group: Group,
        cluster: GuestCluster,
        start: GuestOffset,
        (bufs, fill): (IoVec, Share),
    ) -> (Result<(), Errno>, IoVec) {
        let host = match group.place {
            Place::Mapped => {
                let skip = start - self.start_of(cluster);
                return self.file.write((group.host + skip).0, bufs).await;
            }
            Place::New => match self.allocate(group.count as u64) {
                Ok(host) => host,
                Err(e) => return (Err(e), bufs),
            },
            Place::Again => {
                self.host.mark(&ALLOCATION_RETRIED);
                group.host
            }
        };
        let group = Group { host, ..group };
        let (result, spoilt, bufs) = self.write_new(table, group, cluster, start, (bufs, fill)).await;
        // Until a mapping is tried no crash can leave a reference to a new place.
        let doubt = match result {
            Ok(()) => self.doubt().await,
            Err(e) => Err(e),
        };
        let doubt = match doubt {
            Ok(doubt) => doubt,
            Err(e) => {
                if group.place == Place::New && !spoilt && !self.host.bug(&PLACE_LOST) {
                    let len = (group.count as u64) << self.geometry.cluster_bits;
                    self.space.borrow_mut().take_back(host, len);
                }
                return (Err(e), bufs);
            }
        };
        let result = self.commit(table, group.first..group.first + group.count, group.host).await;
        match result {
            Ok(()) if self.host.bug(&MEMORY_FORGOTTEN) => {
                std::mem::forget(doubt);
                self.mapped(group, cluster);
            }
            Ok(()) => self.mapped(group, cluster),
            Err(_) if group.place == Place::New => self.suspect(cluster, group.count, host, doubt),
            Err(_) => {}
        }
        (result, bufs)
    }

    /// Writes data to a place that is about to be mapped, and makes it durable if losing it would expose other bytes
    /// than zeros. Also returns whether the medium failed at that place; failed reads and syncs do not count.
    async fn write_new(
        &self,
        table: &Rc<Table>,
        group: Group,
        cluster: GuestCluster,
        start: GuestOffset,
        (bufs, fill): (IoVec, Share),
    ) -> (Result<(), Errno>, bool, IoVec) {
        let group_start = self.start_of(cluster);
        let covered = self.backing_shows(group_start) || group.compressed;
        // The place may contain other bytes than zeros.
        let dirty = group.place == Place::Again || self.space.borrow().is_dirty(group.host);
        let (result, spoilt, bufs) = if covered || dirty {
            self.write_whole(table, group, group_start, start, (bufs, fill)).await
        } else {
            let (result, bufs) = self.file.write((group.host + (start - group_start)).0, bufs).await;
            (result, self.file.spoils(result), bufs)
        };
        if result.is_ok()
            && (covered || dirty)
            && !self.host.bug(&DATA_AFTER_MAPPING)
            && let Err(e) = self.file.sync().await
        {
            return (Err(e), false, bufs);
        }
        (result, spoilt, bufs)
    }

    /// Writes the group's clusters as a whole: bytes that the request does not cover get the current contents of the
    /// disk.
    async fn write_whole(
        &self,
        table: &Table,
        group: Group,
        group_start: GuestOffset,
        start: GuestOffset,
        (bufs, mut fill): (IoVec, Share),
    ) -> (Result<(), Errno>, bool, IoVec) {
        let end = start + bytes_of(&bufs) as u64;
        let group_end = group_start + ((group.count as u64) << self.geometry.cluster_bits);
        let (before, after) = ((start - group_start) as usize, (group_end - end) as usize);
        if (before == 0 && after == 0) || self.host.bug(&OVERLAY_DROPS_REST) {
            let (result, bufs) = self.file.write((group.host + before as u64).0, bufs).await;
            return (result, self.file.spoils(result), bufs);
        }
        self.host.mark(&COPY_UP);
        let (head, tail) = match self.rest(table, (group_start, before), (end, after), &mut fill).await {
            Ok(rest) => rest,
            Err(e) => return (Err(e), false, bufs),
        };
        let (skip, count) = (head.len(), bufs.len());
        let all: IoVec = head.into_iter().chain(bufs).chain(tail).collect();
        let (result, all) = self.file.write(group.host.0, all).await;
        (result, self.file.spoils(result), all.into_iter().skip(skip).take(count).collect())
    }

    /// The current contents of the disk before and after the request, within its clusters.
    async fn rest(
        &self,
        table: &Table,
        before: (GuestOffset, usize),
        after: (GuestOffset, usize),
        fill: &mut Share,
    ) -> Result<(IoVec, IoVec), Errno> {
        let head = self.shown(table, before.0, before.1, fill).await?;
        Ok((head, self.shown(table, after.0, after.1, fill).await?))
    }

    fn mapped(&self, group: Group, first: GuestCluster) {
        self.settled(first, group.count);
        self.host.mark(&CLUSTER_ALLOCATED);
        if group.compressed {
            self.host.mark(&COMPRESSED_REWRITTEN);
        }
        for n in 0..group.count as u64 {
            let host_offset = (group.host + n * self.geometry.cluster_bytes()).0;
            self.host.log(Event::ClusterMapped { cluster: (first + n).0, host_offset });
        }
    }
}
