//! Tables in memory.
//!
//! ```text
//!   kept ──a newer one needs its room──► loose: in memory as long as somebody works with it ──► gone
//! ```
//!
//! A table is in memory once: who works with it holds its `Rc`, and the cache finds it by that. Each has a share of the
//! memory budget, which ends with it. Where there is no room for another one, kept tables are let loose, oldest first;
//! if that does not help, the next in line waits until those who work with tables are done. Loading and creating a
//! table claim its number in the tracker; whoever comes meanwhile waits and then finds it.

use super::HostOffset;
use super::Image;
use super::commit::Commit;
use super::layout::{Geometry, Layout, Mapping, decode_entries};
use super::space::Allocator;
use crate::ImageHost;
use smallvec::smallvec;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use tap_core::wait::Semaphore;
use tap_core::{Access, Space, Ticket};
use tap_host::{Bug, Errno, Event, IoBuf, Mark, Share};

/// A table.
pub(crate) struct Table {
    /// Its index in the root.
    pub(super) index: usize,
    /// Where it is in the file.
    pub(super) offset: HostOffset,
    /// What is published: what stands in the file, or stood there before a write that failed.
    pub(super) entries: RefCell<Box<[u64]>>,
    /// Entries that wait to be written.
    pub(super) pending: RefCell<Vec<Rc<Commit>>>,
    /// One write of entries at a time.
    pub(super) turn: Semaphore,
    used: Cell<bool>,
    _share: Share,
}

/// Bytes of a table besides its entries, roughly.
const TABLE_OVERHEAD: usize = 256;

/// What a table of `entries` entries takes of the budget, in bytes.
pub(crate) fn table_cost(entries: usize) -> usize {
    entries * 8 + TABLE_OVERHEAD
}

impl Table {
    pub(crate) fn new(index: usize, offset: HostOffset, entries: Box<[u64]>, share: Share) -> Rc<Self> {
        Rc::new(Self {
            index,
            offset,
            entries: RefCell::new(entries),
            pending: RefCell::default(),
            turn: Semaphore::new(1),
            used: Cell::new(true),
            _share: share,
        })
    }

    /// What entry `index` says.
    pub(super) fn mapping<L: Layout>(&self, index: usize, geometry: &Geometry) -> Mapping {
        L::mapping(self.entries.borrow()[index], geometry)
    }
}

/// The tables in memory.
pub(crate) struct Cache {
    /// For each entry of the root the number of its place, plus 1; 0 where it has none.
    by_index: Vec<u32>,
    places: Vec<Place>,
    unused: Vec<u32>,
    /// Kept tables in the order in which they may go.
    order: VecDeque<usize>,
    /// Tables that were let loose and had not ended when that was last looked at.
    loose: Vec<usize>,
    limit: usize,
}

#[derive(Default)]
struct Place {
    kept: Option<Rc<Table>>,
    found: Weak<Table>,
}

/// Bytes of a [`Cache`] without tables.
pub(crate) fn cache_bytes(root_entries: usize) -> usize {
    root_entries * size_of::<u32>()
}

impl Cache {
    /// For a root of so many entries; tables of `bytes` are kept, and one at the least.
    pub(crate) fn new(root_entries: usize, geometry: &Geometry, bytes: usize) -> Self {
        Self {
            by_index: vec![0; root_entries],
            places: Vec::new(),
            unused: Vec::new(),
            order: VecDeque::new(),
            loose: Vec::new(),
            limit: (bytes / table_cost(geometry.table_entries())).max(1),
        }
    }

    /// Whether no entry of a table waits to be written.
    pub(super) fn is_at_rest(&self) -> bool {
        let tables = self.places.iter().filter_map(|place| place.found.upgrade());
        tables.into_iter().all(|table| table.pending.borrow().is_empty())
    }

    pub(crate) fn has_room(&self) -> bool {
        self.order.len() < self.limit
    }

    /// The table of entry `index` of the root, if it is in memory.
    pub(super) fn get(&self, index: usize) -> Option<Rc<Table>> {
        let place = &self.places[self.by_index[index].checked_sub(1)? as usize];
        let table = match &place.kept {
            Some(table) => Rc::clone(table),
            None => place.found.upgrade()?,
        };
        table.used.set(true);
        Some(table)
    }

    /// Makes `table` one that is found, and keeps it if `keep`.
    pub(crate) fn insert(&mut self, table: &Rc<Table>, keep: bool) {
        let index = table.index;
        assert!(self.get(index).is_none(), "table {index} is in memory twice");
        self.forget_ended();
        let place = self.by_index[index].checked_sub(1).or_else(|| self.unused.pop());
        let place = place.unwrap_or_else(|| {
            self.places.push(Place::default());
            (self.places.len() - 1) as u32
        });
        self.by_index[index] = place + 1;
        self.places[place as usize] = Place { kept: None, found: Rc::downgrade(table) };
        self.loose.push(index);
        if keep {
            while self.order.len() >= self.limit && self.let_loose() {}
            self.loose.retain(|other| *other != index);
            self.places[place as usize].kept = Some(Rc::clone(table));
            self.order.push_back(index);
            assert!(self.order.len() <= self.limit, "more tables are kept than may be");
        }
    }

    /// Keeps one table less; `false` if none is kept. Second chance: one that was used since its last turn, or is in
    /// use, goes to the end once more.
    pub(super) fn let_loose(&mut self) -> bool {
        let mut turns = 2 * self.order.len();
        while let Some(index) = self.order.pop_front() {
            let Some(place) = self.by_index[index].checked_sub(1) else { continue };
            let place = &mut self.places[place as usize];
            let in_use =
                place.kept.as_ref().is_some_and(|t| t.used.replace(false) || Rc::strong_count(t) > 1);
            if in_use && turns > 0 {
                turns -= 1;
                self.order.push_back(index);
                continue;
            }
            place.kept = None;
            self.loose.push(index);
            return true;
        }
        false
    }

    fn forget_ended(&mut self) {
        let (by_index, places, unused) = (&mut self.by_index, &mut self.places, &mut self.unused);
        self.loose.retain(|index| {
            let Some(place) = by_index[*index].checked_sub(1) else { return false };
            let lives = places[place as usize].found.strong_count() > 0;
            if !lives {
                by_index[*index] = 0;
                places[place as usize] = Place::default();
                unused.push(place);
            }
            lives
        });
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// The table of entry `index` of the root, or `None` where there is none.
    pub(super) async fn table(&self, index: usize) -> Result<Option<Rc<Table>>, Errno> {
        if let Some(table) = self.cache.borrow().get(index) {
            return Ok(Some(table));
        }
        if self.root.borrow()[index] == HostOffset(0) {
            return Ok(None);
        }
        let _ticket = self.claim_table(index).await;
        self.load(index).await.map(Some)
    }

    /// The table of entry `index` of the root, made now if there is none.
    pub(super) async fn table_or_new(&self, index: usize) -> Result<Rc<Table>, Errno> {
        if let Some(table) = self.cache.borrow().get(index) {
            return Ok(table);
        }
        let _ticket = self.claim_table(index).await;
        if self.root.borrow()[index] == HostOffset(0) {
            self.create_table(index).await
        } else {
            self.load(index).await
        }
    }

    async fn claim_table(&self, index: usize) -> Ticket {
        let ticket = self.file.tracker().ticket(L::TABLE, index as u64);
        let number = index as u64;
        let claimed = ticket.claim(Space::Tables, number..number + 1, Access::Exclusive);
        claimed.expect("nobody waits for a ticket that is new");
        ticket.ready().await;
        ticket
    }

    /// With the table claimed.
    async fn load(&self, index: usize) -> Result<Rc<Table>, Errno> {
        if let Some(table) = self.cache.borrow().get(index) {
            return Ok(table);
        }
        let offset = self.root.borrow()[index];
        let end = offset.0.checked_add(self.geometry.table_bytes());
        // Opening for writing has looked at all of them; reading finds out here.
        if end.is_none_or(|end| HostOffset(end) > self.reach) {
            return Err(Errno::EIO);
        }
        let share = self.table_share().await?;
        let buf = self.file.buffer(self.geometry.table_bytes() as usize).await?;
        let (result, bufs) = self.file.read(offset.0, smallvec![buf]).await;
        result?;
        let table = Table::new(index, offset, decode_entries(&bufs[0]).collect(), share);
        self.found(&table);
        Ok(table)
    }

    /// Memory for one more table.
    async fn table_share(&self) -> Result<Share, Errno> {
        let (stage, cost) = (&self.memory.tables, table_cost(self.geometry.table_entries()));
        loop {
            if let Some(share) = stage.try_keep(cost) {
                return Ok(share);
            }
            if !self.cache.borrow_mut().let_loose() {
                return stage.take(cost).await;
            }
        }
    }

    /// Lets `table` be found from now on. It is kept unless others wait for its memory: nobody would tell them when it
    /// is no longer in use.
    fn found(&self, table: &Rc<Table>) {
        self.cache.borrow_mut().insert(table, !self.memory.tables.is_waited_for());
    }

    /// With the table claimed: zeros in the file, durable, and only then the entry of the root that makes them a table.
    async fn create_table(&self, index: usize) -> Result<Rc<Table>, Errno> {
        let share = self.table_share().await?;
        let known = self.suspects.borrow().table(index);
        let clusters = self.geometry.table_bytes().div_ceil(self.geometry.cluster_bytes());
        let offset = match known {
            Some(offset) => {
                self.host.mark(Mark::AllocationRetried);
                offset
            }
            None => self.allocate(clusters)?,
        };
        let (written, spoilt) = self.write_empty_table(offset).await;
        if let Err(error) = written {
            if known.is_none() && !spoilt {
                let len = clusters * self.geometry.cluster_bytes();
                self.space.borrow_mut().take_back(offset, len);
            }
            return Err(error);
        }
        // From now on the place belongs to this table and no other, whatever fails.
        self.suspects.borrow_mut().suspect_table(index, offset);
        self.write_root(index, offset).await?;
        self.suspects.borrow_mut().settle_table(index);
        let table = Table::new(index, offset, vec![0; self.geometry.table_entries()].into(), share);
        self.found(&table);
        self.host.mark(Mark::L2TableAllocated);
        self.host.log(Event::L2Mapped { l1_index: index as u64, host_offset: offset.0 });
        Ok(table)
    }

    /// Also gives whether the medium failed at that place.
    async fn write_empty_table(&self, offset: HostOffset) -> (Result<(), Errno>, bool) {
        let mut zeros: IoBuf = match self.file.buffer(self.geometry.table_bytes() as usize).await {
            Ok(zeros) => zeros,
            Err(error) => return (Err(error), false),
        };
        zeros.fill(0);
        let written = self.file.write(offset.0, smallvec![zeros]).await.0;
        if written.is_err() || self.host.bug(Bug::L1BeforeL2) {
            return (written, self.file.spoils(written));
        }
        (self.file.sync().await, false)
    }
}
