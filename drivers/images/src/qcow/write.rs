//! Writing.
//!
//! What is mapped and not compressed is written in place, without claims. Everything else claims its clusters, so that a
//! second writer of a cluster waits and then finds it mapped.

use super::Image;
use super::format::Mapping;
use super::table::Table;
use crate::ImageHost;
use crate::carve::Carver;
use futures_util::future::join_all;
use smallvec::SmallVec;
use std::rc::Rc;
use tap_core::wait::oneshot;
use tap_core::{Access, Op, Response, Space};
use tap_host::{Bug, Errno, Event, IoVec, Mark, bytes_of};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Mapped: stays where it is.
    Mapped,
    /// Gets new space.
    New,
    /// Gets the space that a failed try has used.
    Again,
}

/// Contiguous clusters of one table that are written together.
#[derive(Clone, Copy)]
struct Group {
    place: Place,
    /// Index of the first in the table.
    first: usize,
    count: usize,
    /// Byte offset in the file; of no meaning for [`Place::New`].
    host: u64,
    /// Some of them are compressed now.
    compressed: bool,
}

impl<H: ImageHost> Image<H> {
    pub(super) async fn write(self: Rc<Self>, start: u64, bufs: IoVec) -> Response {
        let len = bytes_of(&bufs) as u64;
        let mut tables = self.by_table(start, len);
        if let (Some((index, ..)), None) = (tables.next(), tables.next()) {
            // Perhaps only the table was not in memory.
            match self.table(index).await {
                Ok(_table) => {
                    if let Some(offset) = self.cached_extent(start, len) {
                        let (result, bufs) = self.file.write(offset, bufs).await;
                        return Response { result, bufs };
                    }
                }
                Err(e) => return Response { result: Err(e), bufs },
            }
        }
        let (sender, receiver) = oneshot();
        let image = Rc::clone(&self);
        self.host.spawn("allocate", self.cluster(start), async move {
            let response = image.write_all(start, bufs).await;
            // The request may have been dropped; its effect was not.
            drop(sender.send(response));
        });
        // The task ends without an answer only when the process does.
        receiver.await.unwrap_or_else(|| Response { result: Err(Errno::EIO), bufs: IoVec::new() })
    }

    async fn write_all(&self, start: u64, bufs: IoVec) -> Response {
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

    /// Writes `len` bytes from `start` on, all of table `index`; they are at byte `at` of the request.
    async fn write_table(
        &self,
        index: usize,
        start: u64,
        len: usize,
        at: usize,
        carver: &mut Carver,
    ) -> Result<(), Errno> {
        let (first, last) = (self.cluster(start), self.cluster(start + len as u64 - 1));
        let ticket = self.file.tracker().ticket("allocation of cluster", first);
        if !self.host.bug(Bug::DoubleAllocation) {
            let claimed = ticket.claim(Space::Clusters, first..last + 1, Access::Exclusive);
            claimed.expect("nobody waits for a ticket that is new");
        }
        ticket.ready().await;
        let table = self.table_or_new(index).await?;
        let groups = self.groups(&table, first, (last - first) as usize + 1);
        let mut result = Ok(());
        let mut writes = Vec::with_capacity(groups.len());
        for group in groups {
            let cluster = (table.l1_index as u64) << self.geometry.l2_bits | group.first as u64;
            let group_start = (cluster << self.geometry.cluster_bits).max(start);
            let group_end =
                ((cluster + group.count as u64) << self.geometry.cluster_bits).min(start + len as u64);
            let part_at = at + (group_start - start) as usize;
            match carver.take(&self.file, part_at, (group_end - group_start) as usize).await {
                Ok(mut part) => {
                    let table = &table;
                    writes.push(Box::pin(async move {
                        let bufs = std::mem::take(&mut part.bufs);
                        let (result, bufs) = self.write_group(table, group, cluster, group_start, bufs).await;
                        part.bufs = bufs;
                        (result, part)
                    }));
                }
                Err(e) => result = Err(e),
            }
        }
        for (write, part) in join_all(writes).await {
            result = result.and(write);
            carver.put(part);
        }
        result
    }

    /// Splits `count` clusters from `first` on by what has to be done with them.
    fn groups(&self, table: &Table, first: u64, count: usize) -> SmallVec<[Group; 2]> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let allocator = self.allocator.borrow();
        let mut groups: SmallVec<[Group; 2]> = SmallVec::new();
        let start = self.split(first).1;
        for (at, cluster) in (start..start + count).zip(first..) {
            let mapping = table.mapping(at, self.geometry.cluster_bits);
            let compressed = matches!(mapping, Mapping::Compressed(_));
            let (place, host) = match mapping {
                Mapping::Plain(host) => (Place::Mapped, host),
                Mapping::Compressed(run) if self.host.bug(Bug::CompressedInPlace) => {
                    (Place::Mapped, run.offset)
                }
                Mapping::Unmapped | Mapping::Compressed(_) => match allocator.suspects.get(&cluster) {
                    Some(host) => (Place::Again, *host),
                    None => (Place::New, 0),
                },
            };
            if let Some(last) = groups.last_mut()
                && last.place == place
                && (place == Place::New || last.host + last.count as u64 * cluster_bytes == host)
            {
                last.count += 1;
                last.compressed |= compressed;
            } else {
                groups.push(Group { place, first: at, count: 1, host, compressed });
            }
        }
        groups
    }

    /// Writes `bufs` at byte `start` of the disk, within the clusters of `group`, the first of which is `cluster`.
    async fn write_group(
        &self,
        table: &Rc<Table>,
        group: Group,
        cluster: u64,
        start: u64,
        bufs: IoVec,
    ) -> (Result<(), Errno>, IoVec) {
        let host = match group.place {
            Place::Mapped => {
                let skip = start - (cluster << self.geometry.cluster_bits);
                return self.file.write(group.host + skip, bufs).await;
            }
            Place::New => match self.allocate(group.count as u64) {
                Ok(host) => host,
                Err(e) => return (Err(e), bufs),
            },
            Place::Again => {
                self.host.mark(Mark::AllocationRetried);
                group.host
            }
        };
        let group = Group { host, ..group };
        let (result, bufs) = self.write_new(table, group, cluster, start, bufs).await;
        match result {
            Ok(()) => self.mapped(group, cluster),
            Err(_) => self.suspect(cluster, group.count, host),
        }
        (result, bufs)
    }

    /// Data first, then the mapping.
    async fn write_new(
        &self,
        table: &Rc<Table>,
        group: Group,
        cluster: u64,
        start: u64,
        bufs: IoVec,
    ) -> (Result<(), Errno>, IoVec) {
        let group_start = cluster << self.geometry.cluster_bits;
        let covered = self.backing_shows(group_start) || group.compressed;
        // The place may hold other bytes than zeros.
        let dirty = group.place == Place::Again || self.file.info.block_device;
        let (result, bufs) = if covered || dirty {
            self.write_whole(table, group, group_start, start, bufs).await
        } else {
            self.file.write(group.host + (start - group_start), bufs).await
        };
        if result.is_err() {
            return (result, bufs);
        }
        if (covered || dirty)
            && !self.host.bug(Bug::DataAfterMapping)
            && let Err(e) = self.file.sync().await
        {
            return (Err(e), bufs);
        }
        (self.commit(table, group.first..group.first + group.count, group.host).await, bufs)
    }

    /// Writes all of the group's clusters: what the request does not cover is filled with what the disk shows there.
    async fn write_whole(
        &self,
        table: &Table,
        group: Group,
        group_start: u64,
        start: u64,
        bufs: IoVec,
    ) -> (Result<(), Errno>, IoVec) {
        let end = start + bytes_of(&bufs) as u64;
        let group_end = group_start + ((group.count as u64) << self.geometry.cluster_bits);
        let (before, after) = ((start - group_start) as usize, (group_end - end) as usize);
        if (before == 0 && after == 0) || self.host.bug(Bug::OverlayDropsRest) {
            return self.file.write(group.host + before as u64, bufs).await;
        }
        self.host.mark(Mark::CopyUp);
        let (head, tail) = match self.rest(table, group_start, before, end, after).await {
            Ok(rest) => rest,
            Err(e) => return (Err(e), bufs),
        };
        let (skip, count) = (head.len(), bufs.len());
        let all: IoVec = head.into_iter().chain(bufs).chain(tail).collect();
        let (result, all) = self.file.write(group.host, all).await;
        (result, all.into_iter().skip(skip).take(count).collect())
    }

    /// What the disk shows in `before` bytes from `group_start` and in `after` bytes from `end` on.
    async fn rest(
        &self,
        table: &Table,
        group_start: u64,
        before: usize,
        end: u64,
        after: usize,
    ) -> Result<(IoVec, IoVec), Errno> {
        Ok((self.shown(table, group_start, before).await?, self.shown(table, end, after).await?))
    }

    fn mapped(&self, group: Group, first: u64) {
        self.settled(first, group.count);
        self.host.mark(Mark::ClusterAllocated);
        if group.compressed {
            self.host.mark(Mark::CompressedRewritten);
        }
        let places = (group.host..).step_by(self.geometry.cluster_bytes() as usize);
        for (cluster, host_offset) in (first..).zip(places).take(group.count) {
            self.host.log(Event::ClusterMapped { cluster, host_offset });
        }
    }
}
