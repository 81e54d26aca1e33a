//! L2 tables in memory.
//!
//! A table is in memory once: who works with it holds its `Rc`, and only tables that nobody holds make room for others.
//! So the cache may be above its limit by the tables in use. Loading and creating a table claim its number in the
//! tracker; whoever comes meanwhile waits and then finds it.

use super::Image;
use super::commit::Commit;
use super::format::{Mapping, decode_entries};
use crate::ImageHost;
use smallvec::smallvec;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use tap_core::wait::Semaphore;
use tap_core::{Access, Space, Ticket};
use tap_host::{Bug, Errno, Event, IoBuf, Mark};

/// An L2 table.
pub(super) struct Table {
    pub(super) l1_index: usize,
    /// Byte offset in the file.
    pub(super) offset: u64,
    /// What is published: what stands in the file, or stood there before a write that failed.
    pub(super) entries: RefCell<Box<[u64]>>,
    /// Entries that wait to be written.
    pub(super) pending: RefCell<Vec<Rc<Commit>>>,
    /// One write of entries at a time.
    pub(super) turn: Semaphore,
    used: Cell<bool>,
}

impl Table {
    pub(super) fn new(l1_index: usize, offset: u64, entries: Box<[u64]>) -> Rc<Self> {
        Rc::new(Self {
            l1_index,
            offset,
            entries: RefCell::new(entries),
            pending: RefCell::default(),
            turn: Semaphore::new(1),
            used: Cell::new(true),
        })
    }

    /// What entry `index` says.
    pub(super) fn mapping(&self, index: usize, cluster_bits: u32) -> Mapping {
        Mapping::of(self.entries.borrow()[index], cluster_bits)
    }
}

/// The tables that are kept.
pub(super) struct Cache {
    slots: Vec<Option<Rc<Table>>>,
    /// Kept tables in the order in which they may go.
    order: VecDeque<usize>,
    limit: usize,
}

impl Cache {
    pub(super) fn new(l1_entries: usize, limit: usize) -> Self {
        Self { slots: vec![None; l1_entries], order: VecDeque::new(), limit: limit.max(1) }
    }

    pub(super) fn has_room(&self) -> bool {
        self.order.len() < self.limit
    }

    /// The table of L1 entry `index`, if it is kept.
    pub(super) fn get(&self, index: usize) -> Option<&Rc<Table>> {
        let table = self.slots[index].as_ref()?;
        table.used.set(true);
        Some(table)
    }

    pub(super) fn insert(&mut self, table: Rc<Table>) {
        self.make_room();
        self.order.push_back(table.l1_index);
        let index = table.l1_index;
        assert!(self.slots[index].replace(table).is_none(), "L2 table {index} is in memory twice");
    }

    /// Second chance: a table that was used since its last turn, or is in use, goes to the end once more.
    fn make_room(&mut self) {
        let mut turns = 2 * self.order.len();
        while self.order.len() >= self.limit && turns > 0 {
            turns -= 1;
            let Some(index) = self.order.pop_front() else { return };
            let in_use =
                self.slots[index].as_ref().is_some_and(|t| t.used.replace(false) || Rc::strong_count(t) > 1);
            if in_use {
                self.order.push_back(index);
            } else {
                self.slots[index] = None;
            }
        }
    }
}

impl<H: ImageHost> Image<H> {
    /// The table of L1 entry `index`, or `None` where there is none.
    pub(super) async fn table(&self, index: usize) -> Result<Option<Rc<Table>>, Errno> {
        if let Some(table) = self.cache.borrow().get(index) {
            return Ok(Some(Rc::clone(table)));
        }
        if self.l1.borrow()[index] == 0 {
            return Ok(None);
        }
        let _ticket = self.claim_table(index).await;
        self.load(index).await.map(Some)
    }

    /// The table of L1 entry `index`, made now if there is none.
    pub(super) async fn table_or_new(&self, index: usize) -> Result<Rc<Table>, Errno> {
        if let Some(table) = self.cache.borrow().get(index) {
            return Ok(Rc::clone(table));
        }
        let _ticket = self.claim_table(index).await;
        if self.l1.borrow()[index] == 0 { self.create_table(index).await } else { self.load(index).await }
    }

    async fn claim_table(&self, index: usize) -> Ticket {
        let ticket = self.file.tracker().ticket("L2 table", index as u64);
        let number = index as u64;
        let claimed = ticket.claim(Space::Tables, number..number + 1, Access::Exclusive);
        claimed.expect("nobody waits for a ticket that is new");
        ticket.ready().await;
        ticket
    }

    /// With the table claimed.
    async fn load(&self, index: usize) -> Result<Rc<Table>, Errno> {
        if let Some(table) = self.cache.borrow().get(index) {
            return Ok(Rc::clone(table));
        }
        let offset = self.l1.borrow()[index];
        let end = offset.checked_add(self.geometry.table_bytes());
        // Opening for writing has looked at all of them; reading finds out here.
        if end.is_none_or(|end| end > self.reach) {
            return Err(Errno::EIO);
        }
        let buf = self.file.buffer(self.geometry.table_bytes() as usize).await?;
        let (result, bufs) = self.file.read(offset, smallvec![buf]).await;
        result?;
        let table = Table::new(index, offset, decode_entries(&bufs[0]).collect());
        self.cache.borrow_mut().insert(Rc::clone(&table));
        Ok(table)
    }

    /// With the table claimed: zeros in the file, durable, and only then the L1 entry that makes them a table.
    async fn create_table(&self, index: usize) -> Result<Rc<Table>, Errno> {
        let known = self.allocator.borrow().table_suspects.get(&index).copied();
        let offset = match known {
            Some(offset) => {
                self.host.mark(Mark::AllocationRetried);
                offset
            }
            None => self.allocate(self.geometry.table_bytes().div_ceil(self.geometry.cluster_bytes()))?,
        };
        // Until the L1 entry is written the place belongs to this table and no other, whatever fails.
        self.allocator.borrow_mut().table_suspects.insert(index, offset);
        let mut zeros: IoBuf = self.file.buffer(self.geometry.table_bytes() as usize).await?;
        zeros.fill(0);
        self.file.write(offset, smallvec![zeros]).await.0?;
        if !self.host.bug(Bug::L1BeforeL2) {
            self.file.sync().await?;
        }
        self.write_l1(index, offset).await?;
        self.allocator.borrow_mut().table_suspects.remove(&index);
        let table = Table::new(index, offset, vec![0; self.geometry.l2_entries()].into());
        self.cache.borrow_mut().insert(Rc::clone(&table));
        self.host.mark(Mark::L2TableAllocated);
        self.host.log(Event::L2Mapped { l1_index: index as u64, host_offset: offset });
        Ok(table)
    }
}
