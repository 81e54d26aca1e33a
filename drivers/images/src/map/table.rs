//! Tables in memory.
//!
//! ```text
//!   kept ──evicted for a newer one──► loose: in memory while it is in use ──► freed
//! ```
//!
//! A table is in memory once: its users hold an `Rc`, and the cache finds it through a `Weak`. Each has a share of the
//! memory budget for as long as it exists. If there is no room for another one, kept tables are evicted, oldest first;
//! if that does not help, the next load waits until tables in use are released. Loading and creating a table claim its
//! number in the tracker; concurrent users wait and then find it.

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
use tap_host::{Errno, Event, IoBuf, Share};

tap_host::listed! {
    pub(super) BUGS: Bug;
    L1_BEFORE_L2 = "l1-before-l2", "the L1 entry is written before the new L2 table is durable";
    TABLE_UNKEPT = "table-unkept", "a table that was read is not kept, although there is memory for it";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    L2_TABLE_ALLOCATED = "l2-table-allocated", "an L2 table was allocated";
    pub(super) ALLOCATION_RETRIED = "allocation-retried",
        "an allocation was repeated after its mapping write had failed";
}

/// A table.
pub(crate) struct Table {
    /// Its index in the root.
    pub(super) index: usize,
    /// Its offset in the file.
    pub(super) offset: HostOffset,
    /// The published entries: as in the file, or as they were there before a failed write.
    pub(super) entries: RefCell<Box<[u64]>>,
    /// Entries to be written.
    pub(super) pending: RefCell<Vec<Rc<Commit>>>,
    /// Serialises writes of entries.
    pub(super) turn: Semaphore,
    used: Cell<bool>,
    _share: Share,
}

/// Bytes of a table besides its entries, roughly.
const TABLE_OVERHEAD: usize = 256;

/// Memory of a table of `entries` entries, in bytes.
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

    /// The mapping of entry `index`.
    pub(super) fn mapping<L: Layout>(&self, index: usize, geometry: &Geometry) -> Mapping {
        L::mapping(self.entries.borrow()[index], geometry)
    }
}

/// The tables in memory.
pub(crate) struct Cache {
    /// For each entry of the root the number of its place, plus 1; 0 for none.
    by_index: Vec<u32>,
    places: Vec<Place>,
    unused: Vec<u32>,
    /// Kept tables in the order of eviction.
    order: VecDeque<usize>,
    /// Evicted tables that were still in use at the last check.
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
    /// A cache for a root of `root_entries`, which keeps tables of `bytes`, at least one.
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

    /// Whether no table has entries to be written.
    pub(super) fn is_at_rest(&self) -> bool {
        let tables = self.places.iter().filter_map(|place| place.found.upgrade());
        tables.into_iter().all(|table| table.pending.borrow().is_empty())
    }

    pub(crate) fn has_room(&self) -> bool {
        self.order.len() < self.limit
    }

    /// The table of root entry `index`, if it is in memory.
    pub(super) fn get(&self, index: usize) -> Option<Rc<Table>> {
        let place = &self.places[self.by_index[index].checked_sub(1)? as usize];
        let table = match &place.kept {
            Some(table) => Rc::clone(table),
            None => place.found.upgrade()?,
        };
        table.used.set(true);
        Some(table)
    }

    /// Adds `table`, and keeps it if `keep`.
    pub(crate) fn insert(&mut self, table: &Rc<Table>, keep: bool) {
        let index = table.index;
        assert!(self.get(index).is_none(), "table {index} is in memory twice");
        self.forget_ended();
        let place = self.by_index[index].checked_sub(1).or_else(|| self.unused.pop());
        let place = place.unwrap_or_else(|| {
            self.places.push(Place::default());
            (self.places.len() - 1) as u32
        });
        let present = self.places.len() - self.unused.len();
        assert!(
            present <= self.order.len() + self.loose.len() + 1,
            "tables that have ended keep their places"
        );
        self.by_index[index] = place + 1;
        self.places[place as usize] = Place { kept: None, found: Rc::downgrade(table) };
        self.loose.push(index);
        if keep {
            while self.order.len() >= self.limit && self.evict_one() {}
            self.loose.retain(|other| *other != index);
            self.places[place as usize].kept = Some(Rc::clone(table));
            self.order.push_back(index);
            assert!(self.order.len() <= self.limit, "more tables are kept than the limit");
        }
    }

    /// Evicts one kept table; `false` if none is kept. Second chance: one that was used since its last turn, or is in
    /// use, moves to the end once.
    pub(super) fn evict_one(&mut self) -> bool {
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
    /// The table of root entry `index`, or `None` if there is none.
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

    /// The table of root entry `index`, created if there is none.
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
        ticket.claim(Space::Tables, number..number + 1, Access::Exclusive);
        ticket.ready().await;
        ticket
    }

    /// Loads a table that is claimed.
    async fn load(&self, index: usize) -> Result<Rc<Table>, Errno> {
        if let Some(table) = self.cache.borrow().get(index) {
            return Ok(table);
        }
        let offset = self.root.borrow()[index];
        let end = offset.0.checked_add(self.geometry.table_bytes());
        let is_empty = self.empty_table == Some(index);
        // Opening for writing has checked all of them; for reading they are checked here. Any other table that is not
        // in the file is lost, and was not zeros.
        if !is_empty && end.is_none_or(|end| HostOffset(end) > self.tables_reach) {
            return Err(Errno::EIO);
        }
        let share = self.table_share().await?;
        let entries = if is_empty { self.no_entries() } else { self.read_entries(offset).await? };
        let table = Table::new(index, offset, entries, share);
        self.cache_table(&table);
        Ok(table)
    }

    pub(super) async fn read_entries(&self, offset: HostOffset) -> Result<Box<[u64]>, Errno> {
        let buf = self.file.buffer(self.geometry.table_bytes() as usize).await?;
        let (result, bufs) = self.file.read(offset.0, smallvec![buf]).await;
        result?;
        Ok(decode_entries(&bufs[0]).collect())
    }

    /// The entries of an empty table.
    fn no_entries(&self) -> Box<[u64]> {
        vec![0; self.geometry.table_entries()].into()
    }

    /// Memory for one more table.
    async fn table_share(&self) -> Result<Share, Errno> {
        let (stage, cost) = (&self.memory.tables, table_cost(self.geometry.table_entries()));
        loop {
            if let Some(share) = stage.try_keep(cost) {
                return Ok(share);
            }
            if !self.cache.borrow_mut().evict_one() {
                return stage.take(cost).await;
            }
        }
    }

    /// Adds `table` to the cache. It is kept unless others wait for its memory: nothing would wake them when it is no
    /// longer in use.
    fn cache_table(&self, table: &Rc<Table>) {
        let keep = !self.memory.tables.is_waited_for() && !self.host.bug(&TABLE_UNKEPT);
        self.cache.borrow_mut().insert(table, keep);
    }

    /// Creates a table that is claimed: zeros in the file, made durable, and only then the root entry that refers to
    /// them.
    async fn create_table(&self, index: usize) -> Result<Rc<Table>, Errno> {
        let share = self.table_share().await?;
        let known = self.suspects.borrow().table(index);
        let clusters = self.geometry.table_bytes().div_ceil(self.geometry.cluster_bytes());
        let offset = match known {
            Some(offset) => {
                self.host.mark(&ALLOCATION_RETRIED);
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
        // From now on the place belongs to this table only, whatever fails.
        self.suspects.borrow_mut().suspect_table(index, offset);
        self.write_root(index, offset).await?;
        self.suspects.borrow_mut().settle_table(index);
        let table = Table::new(index, offset, self.no_entries(), share);
        self.cache_table(&table);
        self.host.mark(&L2_TABLE_ALLOCATED);
        self.host.log(Event::L2Mapped { l1_index: index as u64, host_offset: offset.0 });
        Ok(table)
    }

    /// Also returns whether the medium failed at that place.
    async fn write_empty_table(&self, offset: HostOffset) -> (Result<(), Errno>, bool) {
        let mut zeros: IoBuf = match self.file.buffer(self.geometry.table_bytes() as usize).await {
            Ok(zeros) => zeros,
            Err(error) => return (Err(error), false),
        };
        zeros.fill(0);
        let written = self.file.write(offset.0, smallvec![zeros]).await.0;
        if written.is_err() || self.host.bug(&L1_BEFORE_L2) {
            return (written, self.file.spoils(written));
        }
        (self.file.sync().await, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_host::Budget;

    /// A cache with room for so many tables, and a table of number `n` as often as it is called.
    fn cache(tables: usize) -> (Cache, impl Fn(usize) -> Rc<Table>) {
        let geometry =
            Geometry { size_bytes: 1 << 20, cluster_bits: 12, table_bits: 3, root_at: HostOffset(4096) };
        let entries = geometry.table_entries();
        let stage = Budget::default().stage(64 * table_cost(entries)).unwrap();
        let table = move |n| {
            let share = stage.try_keep(table_cost(entries)).unwrap();
            Table::new(n, HostOffset(4096), vec![0; entries].into(), share)
        };
        (Cache::new(32, &geometry, tables * table_cost(entries)), table)
    }

    #[test]
    fn as_many_tables_are_kept_as_there_is_room_for() {
        let (mut cache, table) = cache(3);
        for n in 0..3 {
            assert!(cache.has_room(), "for table {n}");
            cache.insert(&table(n), true);
            assert!((0..=n).all(|n| cache.get(n).is_some()), "none goes while there is room");
        }
        assert!(!cache.has_room());
        cache.insert(&table(3), true);
        let kept = (0..4).filter(|n| cache.get(*n).is_some()).count();
        assert_eq!(kept, 3, "one goes for one that comes");
    }
}
