//! `ram`: a disk in memory, which ends with the process.
//!
//! Only pages that were written take memory, and they count against the limit of the process. Without room a write
//! fails with `ENOSPC`.

use crate::graph::signature::{Below, Keeps, Param, Params, Signature};
use crate::graph::value::Type;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::ready;
use tap_core::{Durable, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, Source};
use tap_host::{
    Budget, Errno, IoVec, SECTOR_BYTES, SectorRange, Share, Stage, copy_from_slice, copy_to_slice,
};

/// Size of a page, in bytes.
const PAGE_BYTES: u64 = 4096;
const PAGE_SECTORS: u64 = PAGE_BYTES / SECTOR_BYTES;
/// Memory that a page is counted with: its bytes, and its place in the map.
const PAGE_COST: usize = PAGE_BYTES as usize + 64;

pub(super) fn signature() -> Signature {
    Signature {
        name: "ram",
        about: "a disk in memory, which is lost when the process ends",
        params: vec![
            Param::new("size", Type::Bytes, "size of the disk; only what is written takes memory")
                .within(SECTOR_BYTES, 1 << 40)
                .multiple_of(SECTOR_BYTES),
        ],
        ports: vec![],
        writable: true,
        keeps: Keeps::Memory,
        agree: None,
        size: Some(size),
    }
}

fn size(params: &Params, _: &[Below]) -> Result<u64, String> {
    Ok(params.number(0))
}

struct Page {
    bytes: Box<[u8; PAGE_BYTES as usize]>,
    _memory: Share,
}

/// A disk in memory.
pub struct Ram {
    info: NodeInfo,
    memory: Stage,
    pages: RefCell<BTreeMap<u64, Page>>,
}

impl Ram {
    /// An empty disk of `size_bytes`, which is written to or not, with memory from `memory`.
    ///
    /// # Errors
    /// `ENOMEM` if that is used up.
    pub fn new(size_bytes: u64, written: bool, memory: &Budget) -> Result<Self, Errno> {
        let info =
            NodeInfo { durable: Durable::AtAnswer, ..NodeInfo::new(size_bytes / SECTOR_BYTES, !written) };
        let memory = memory.stage(0).map_err(|_| Errno::ENOMEM)?;
        Ok(Self { info, memory, pages: RefCell::default() })
    }

    /// The parts of `range` in each page: the page, the first byte in it, the bytes, and where they are in the request.
    fn parts(range: SectorRange) -> impl Iterator<Item = (u64, usize, usize, usize)> {
        let (mut sector, end) = (range.start.0, range.start.0 + u64::from(range.count));
        std::iter::from_fn(move || {
            (sector < end).then(|| {
                let (page, within) = (sector / PAGE_SECTORS, sector % PAGE_SECTORS);
                let count = (PAGE_SECTORS - within).min(end - sector);
                let at = ((sector - range.start.0) * SECTOR_BYTES) as usize;
                sector += count;
                (page, (within * SECTOR_BYTES) as usize, (count * SECTOR_BYTES) as usize, at)
            })
        })
    }

    fn read(&self, range: SectorRange, bufs: &mut IoVec) {
        let pages = self.pages.borrow();
        let zeros = [0; PAGE_BYTES as usize];
        for (page, from, len, at) in Self::parts(range) {
            let bytes = pages.get(&page).map_or(&zeros, |page| &*page.bytes);
            copy_from_slice(bufs, at, &bytes[from..from + len]);
        }
    }

    fn write(&self, range: SectorRange, bufs: &IoVec) -> Result<(), Errno> {
        let mut pages = self.pages.borrow_mut();
        for (page, from, len, at) in Self::parts(range) {
            let page = match pages.entry(page) {
                std::collections::btree_map::Entry::Occupied(page) => page.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => {
                    let memory = self.memory.try_keep(PAGE_COST).ok_or(Errno::ENOSPC)?;
                    place.insert(Page { bytes: Box::new([0; PAGE_BYTES as usize]), _memory: memory })
                }
            };
            copy_to_slice(bufs, at, &mut page.bytes[from..from + len]);
        }
        Ok(())
    }

    /// Only pages that are there are looked at: the range may be the whole disk.
    fn zero(&self, range: SectorRange) {
        let (first, end) = (range.start.0, range.start.0 + u64::from(range.count));
        let mut pages = self.pages.borrow_mut();
        let there = pages.range(first / PAGE_SECTORS..end.div_ceil(PAGE_SECTORS)).map(|(page, _)| *page);
        for number in there.collect::<Vec<u64>>() {
            let starts = number * PAGE_SECTORS;
            let (from, to) = (first.max(starts) - starts, end.min(starts + PAGE_SECTORS) - starts);
            if (from, to) == (0, PAGE_SECTORS) {
                pages.remove(&number);
            } else if let Some(page) = pages.get_mut(&number) {
                page.bytes[(from * SECTOR_BYTES) as usize..(to * SECTOR_BYTES) as usize].fill(0);
            }
        }
    }

    /// Whether the first sector of `range` is in a page that is there, and how many are alike from there on.
    fn alike(&self, range: SectorRange) -> (bool, u64) {
        let (first, end) = (range.start.0, range.start.0 + u64::from(range.count));
        let pages = self.pages.borrow();
        let mut next = first / PAGE_SECTORS;
        let mut there = pages.range(next..end.div_ceil(PAGE_SECTORS)).map(|(page, _)| *page).peekable();
        let is_there = there.peek() == Some(&next);
        if is_there {
            while there.next_if_eq(&next).is_some() {
                next += 1;
            }
        } else {
            next = there.next().unwrap_or(u64::MAX / PAGE_SECTORS);
        }
        (is_there, end.min(next * PAGE_SECTORS) - first)
    }
}

impl Node for Ram {
    fn submit(&self, mut request: Request) -> LocalBoxFuture<Response> {
        let result = self.info.check(&request).and_then(|()| match request.op {
            Op::Read => {
                self.read(request.range, &mut request.bufs);
                Ok(())
            }
            Op::Write => self.write(request.range, &request.bufs),
            Op::WriteZeroes(_) | Op::Discard => {
                self.zero(request.range);
                Ok(())
            }
            Op::Flush => Ok(()),
        });
        Box::pin(ready(Response { result, bufs: request.bufs }))
    }

    fn extents(&self, range: SectorRange, _: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let (allocated, count) = self.alike(range);
        let source = if allocated { Source::UNKNOWN } else { Source::Nothing };
        Box::pin(ready(Ok(vec![Extent { count, source, zero: !allocated, allocated }])))
    }

    fn info(&self) -> NodeInfo {
        self.info
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        Box::pin(ready(Ok(())))
    }
}
