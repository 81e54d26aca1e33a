//! Which errors bad sectors of the host's files explain.
//!
//! ```text
//!   a request's range ─► what it needs: bytes that are read, and pages or blocks that are written in part
//!                                         │
//!   sectors that were bad while it ran ───┴──► some of them are in it: it may fail;  none: it must not
//! ```
//!
//! What a request needs comes from the walker's map of the image and from the size of what the host reads at once: a
//! page of a buffered file, a block of a direct one. A write needs the pages that it covers in part, and not those that
//! it covers; so a place that cannot be read can be written, and be read afterwards.

use crate::catalog::setup::Setup;
use crate::formats::ImageMap;
use crate::world::World;
use kernel_model::PAGE;
use std::ops::Range;
use tap_host::{IoKind, SECTOR_BYTES, SectorRange};

/// A sector of one of the disk's files that could not be read while a request ran.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Unreadable {
    /// Of the image, or of the file below it.
    pub(super) of_image: bool,
    /// Its first byte.
    pub(super) at: u64,
}

/// Bytes at the beginning of a file that say which format it has; they are read before the file is opened for use.
const HEAD_BYTES: u64 = PAGE as u64;

/// The state of the drive when a request began.
pub(super) struct Before(Vec<Unreadable>, usize);

/// What may make requests of a disk fail.
#[derive(Clone)]
pub(super) struct Causes {
    setup: Setup,
    /// What the host reads at once, in bytes.
    grain: u64,
}

impl Causes {
    /// Of the disk `setup`, whose files are direct if `direct`.
    pub(super) fn new(world: &World, setup: &Setup, direct: bool) -> Self {
        let grain = if direct { u64::from(world.storage.direct_align_bytes()) } else { PAGE as u64 };
        Self { setup: setup.clone(), grain }
    }

    fn now(&self, world: &World) -> Vec<Unreadable> {
        let of = |path: &String, of_image| {
            let bad = world.storage.bad_sectors(path);
            let sectors = |(page, mask): (u64, u8)| {
                let bad = (0..8).filter(move |i| mask & 1 << i != 0);
                bad.map(move |i| Unreadable { of_image, at: page * PAGE as u64 + i * SECTOR_BYTES })
            };
            bad.pages().flat_map(sectors).collect::<Vec<_>>()
        };
        let image = &self.setup.spec.path;
        self.setup.files().flat_map(|path| of(path, path == image)).collect()
    }

    /// To be called before a request begins.
    pub(super) fn before(&self, world: &World) -> Before {
        Before(self.now(world), world.storage.spoilt(|spoilt| spoilt.len()))
    }

    /// The sectors that could not be read at some time since.
    fn since(&self, world: &World, before: &Before) -> Vec<Unreadable> {
        let image = &self.setup.spec.path;
        let mut bad = before.0.clone();
        world.storage.spoilt(|spoilt| {
            for (name, page, mask) in &spoilt[before.1..] {
                let sectors = (0..8).filter(|i| mask & 1 << i != 0);
                let of_image = name == image;
                bad.extend(
                    sectors.map(|i| Unreadable { of_image, at: page * PAGE as u64 + i * SECTOR_BYTES }),
                );
            }
        });
        bad
    }

    /// Whether bad sectors explain that a request of `kind` for `range` failed.
    pub(super) fn explain(&self, world: &World, before: &Before, kind: IoKind, range: SectorRange) -> bool {
        let bad = self.since(world, before);
        if bad.is_empty() || kind == IoKind::Flush {
            return false;
        }
        let bytes = range.start.0 * SECTOR_BYTES..range.start.0 * SECTOR_BYTES + range.len_bytes();
        let content = self.setup.content(world);
        match self.setup.model().walk(&content) {
            None => self.needs_of_bytes(&bytes, kind).iter().any(|need| touched(&bad, true, need)),
            Some(Ok(map)) => self.of_map(&map, &bad, &bytes, kind),
            // Whoever breaks the metadata is found by the walker.
            Some(Err(_)) => true,
        }
    }

    /// Whether bad sectors explain that the image could not be opened.
    pub(super) fn explain_opening(&self, world: &World, before: &Before) -> bool {
        let bad = self.since(world, before);
        let content = self.setup.content(world);
        // The beginning of each file says what it is.
        let head = self.widened(&(0..HEAD_BYTES));
        if touched(&bad, true, &head) || touched(&bad, false, &head) {
            return true;
        }
        let Some(Ok(map)) = self.setup.model().walk(&content) else { return false };
        metadata(&map).iter().any(|bytes| touched(&bad, true, &self.widened(bytes)))
            || map.packed.iter().any(|(_, at, len)| touched(&bad, true, &self.widened(&(*at..at + len))))
    }

    /// What a request needs of bytes that are at a fixed place.
    fn needs_of_bytes(&self, bytes: &Range<u64>, kind: IoKind) -> Vec<Range<u64>> {
        if kind == IoKind::Read {
            return vec![self.widened(bytes)];
        }
        // Zeros are made in the page cache, also those of a direct file.
        let grain = if kind == IoKind::Write { self.grain } else { PAGE as u64 };
        let edge = |at: u64| {
            let start = at - at % grain;
            (start != at).then_some(start..start + grain)
        };
        [edge(bytes.start), edge(bytes.end)].into_iter().flatten().collect()
    }

    fn widened(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start - bytes.start % self.grain..bytes.end.next_multiple_of(self.grain)
    }

    /// The same for a disk in clusters.
    fn of_map(&self, map: &ImageMap, bad: &[Unreadable], bytes: &Range<u64>, kind: IoKind) -> bool {
        let cluster_bytes = 1 << map.cluster_bits;
        let clusters = bytes.start >> map.cluster_bits..((bytes.end - 1) >> map.cluster_bits) + 1;
        let mut allocates = false;
        for cluster in clusters {
            let start = cluster * cluster_bytes;
            let part = bytes.start.max(start)..bytes.end.min(start + cluster_bytes);
            let table = (cluster >> map.table_bits) as usize;
            let is_missing = map.tables.get(table).is_none_or(|at| *at == 0);
            if !is_missing {
                let at = map.tables[table];
                if touched(bad, true, &self.widened(&(at..at + map.table_bytes))) {
                    return true;
                }
            }
            match (map.host_offset(cluster), map.compressed(cluster)) {
                (Some(host), _) => {
                    let part = host + (part.start - start)..host + (part.end - start);
                    if self.needs_of_bytes(&part, kind).iter().any(|need| touched(bad, true, need)) {
                        return true;
                    }
                }
                (None, Some((at, len))) => {
                    allocates |= kind != IoKind::Read;
                    if touched(bad, true, &self.widened(&(at..at + len))) {
                        return true;
                    }
                }
                (None, None) => allocates |= kind != IoKind::Read,
            }
            // It may have been unmapped when the request began, and a write to a new cluster reads the rest of it.
            let below = match kind {
                IoKind::Read => vec![self.widened(&part)],
                _ => [start..part.start, part.end..start + cluster_bytes]
                    .into_iter()
                    .filter(|rest| !rest.is_empty())
                    .map(|rest| self.widened(&rest))
                    .collect(),
            };
            if below.iter().any(|need| touched(bad, false, need)) {
                return true;
            }
        }
        // New space is next to old space, and so are the entries that refer to it.
        let owned = owned(map);
        let is_free = |bad: &&Unreadable| {
            let page = bad.at - bad.at % PAGE as u64;
            let in_part = |range: &Range<u64>| range.start <= page && range.end >= page + PAGE as u64;
            bad.of_image && !owned.iter().any(in_part)
        };
        let root = map.root_at..map.root_at + map.tables.len() as u64 * 8;
        (allocates || kind != IoKind::Read)
            && (bad.iter().find(is_free).is_some() || touched(bad, true, &self.widened(&root)))
    }
}

fn touched(bad: &[Unreadable], of_image: bool, need: &Range<u64>) -> bool {
    bad.iter().any(|bad| bad.of_image == of_image && need.contains(&bad.at))
}

/// The bytes of the header, of the tables and of what refers to them.
fn metadata(map: &ImageMap) -> Vec<Range<u64>> {
    let root = 0..map.root_at + map.tables.len() as u64 * 8;
    let tables = map.tables.iter().filter(|at| **at != 0);
    std::iter::once(root).chain(tables.map(|at| *at..at + map.table_bytes)).collect()
}

/// The ranges of the file that are in use, each as long as possible.
fn owned(map: &ImageMap) -> Vec<Range<u64>> {
    let cluster_bytes = 1 << map.cluster_bits;
    let hosts = (0..map.entries.len() as u64).filter_map(|cluster| map.host_offset(cluster));
    let mut all: Vec<_> = metadata(map).into_iter().chain(hosts.map(|at| at..at + cluster_bytes)).collect();
    all.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in all {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
