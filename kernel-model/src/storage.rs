//! Host storage: named files, their I/O in virtual time, power cuts.
//!
//! Operations belong to the device, not to the process: when a process dies, they still land. Its descriptors, and with
//! them its locks, are closed only when its last operation has ended, as on Linux; so the next owner of the lock sees
//! no stray writes.

mod bad;
mod closing;
mod config;
mod cuts;
mod effect;
mod exchange;
mod full;
mod nth;
mod outage;
mod power;

use crate::calls::{Call, CallRates};
use crate::faults::{Fault, FaultPlan, IO_FAULT, IO_LATE, IoOp, Rates, SyncErrors, decode};
use crate::inode::{Content, Inode};
use bad::Places;
pub use bad::Spoilt;
pub(crate) use closing::Descriptor;
pub use config::{IoCounts, StorageConfig};
pub use cuts::{Cut, CutFile, CutWrite};
pub(crate) use exchange::EXCHANGES_LOST;
use exchange::Exchanges;
pub(crate) use exchange::{directory, swap};
pub use nth::{Concerned, NthFailure};
use nth::{Nth, NthCounts, Rows};
use outage::Outage;
use sim::{Entity, Sim, SpanId, Timed, text_hash};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::{Poll, Waker};
use tap_host::{Errno, IoVec, LockKind, ZeroMode, copy_from_slice};

const READ_NS: u64 = 8_000;
const WRITE_NS: u64 = 12_000;
/// How long a file system searches for space before it finds that there is none.
const FULL_SEARCH_NS: u64 = 400_000;
const SYNC_NS: u64 = 80_000;
const STUCK_NS: u64 = 10_000_000_000;

pub(crate) struct FileState {
    pub(crate) name: String,
    pub(crate) inode: RefCell<Inode>,
    entity: Entity,
    pub(crate) name_durable: Cell<bool>,
    /// A failed synchronisation of the directory has given up the new name: no later one makes it durable.
    pub(crate) name_given_up: Cell<bool>,
    /// (open file, kind).
    pub(crate) locks: RefCell<Vec<(u64, LockKind)>>,
    sync_latched: Cell<bool>,
    /// A block device: its size is fixed, and all of its space is allocated.
    pub(crate) device: Cell<bool>,
    places: Places,
    /// Sequence number of its creation: distinguishes it from earlier files of that name.
    pub(crate) born: u64,
}

impl FileState {
    /// What distinguishes it from all others; a recreated name has the same number, because inodes are reused.
    pub(crate) fn number(&self) -> u64 {
        self.entity.0
    }
}

/// A descriptor's open file, which owns its locks.
pub(crate) struct OpenFile {
    pub(crate) id: u64,
    pub(crate) file: Rc<FileState>,
    pub(crate) direct: bool,
    pub(crate) write: bool,
    /// Losses of the file system that this open file need not report.
    losses_told: Cell<u64>,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.file.locks.borrow_mut().retain(|l| l.0 != self.id);
    }
}

struct Running {
    op: IoOp,
    open: Rc<OpenFile>,
    io: Entity,
    offset: u64,
    /// Its length in bytes.
    len: u64,
    bufs: IoVec,
    fault: Fault,
    /// A synchronisation covers writes numbered below this.
    covers: u64,
    waker: Option<Waker>,
    orphan: bool,
    span: SpanId,
}

enum Slot {
    Free,
    Running(Running),
    Done(Result<usize, Errno>, IoVec, Option<DriveLoss>),
}

/// What a drive gave up of its cache; it counts from the moment when the caller of the synchronisation learns of it.
struct DriveLoss {
    file: Rc<FileState>,
    covers: u64,
}

pub(crate) struct Inner {
    pub(crate) sim: Sim,
    config: RefCell<StorageConfig>,
    rates: Rates,
    pub(crate) call_rates: CallRates,
    pub(crate) files: RefCell<BTreeMap<String, Rc<FileState>>>,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    next_open: Cell<u64>,
    counts: Cell<IoCounts>,
    missing: Cell<u64>,
    ops: Cell<u64>,
    born: Cell<u64>,
    /// Failed synchronisations of buffered files, and how many of them were reported as losses.
    losses: Cell<u64>,
    losses_seen: Cell<u64>,
    power_cuts: Cell<u32>,
    stopped: Cell<bool>,
    calm: Cell<bool>,
    full: Cell<bool>,
    refusing: Cell<bool>,
    nth_counts: NthCounts,
    rows: Rows,
    pub(crate) exchanges: Exchanges,
    outage: Outage,
    spoilt: RefCell<Vec<Spoilt>>,
    /// Files that were dropped and are not closed yet, and when they will be.
    closing: RefCell<Vec<(u64, Rc<OpenFile>)>>,
    hook: RefCell<Option<Hook>>,
    /// What power cuts did, while a report keeps it.
    cuts: RefCell<Vec<Cut>>,
}

/// Called after each operation took effect, with its number; crash exploration then examines the files.
pub type Hook = Rc<dyn Fn(u64)>;

/// The host's storage; clones share it.
#[derive(Clone)]
pub struct Storage(pub(crate) Rc<Inner>);

impl Storage {
    /// Empty storage.
    pub fn new(sim: &Sim, config: StorageConfig) -> Self {
        Self(Rc::new(Inner {
            sim: sim.clone(),
            rates: Rates::new(sim, config.faults),
            call_rates: CallRates::new(sim, config.faults),
            config: RefCell::new(config),
            files: RefCell::default(),
            slots: RefCell::default(),
            free: RefCell::default(),
            next_open: Cell::new(1),
            counts: Cell::default(),
            missing: Cell::default(),
            ops: Cell::new(0),
            born: Cell::new(0),
            losses: Cell::new(0),
            losses_seen: Cell::new(0),
            power_cuts: Cell::new(0),
            stopped: Cell::new(false),
            calm: Cell::new(false),
            full: Cell::new(false),
            refusing: Cell::new(false),
            nth_counts: NthCounts::default(),
            rows: Rows::default(),
            exchanges: Exchanges::default(),
            outage: Outage::default(),
            spoilt: RefCell::default(),
            closing: RefCell::default(),
            hook: RefCell::default(),
            cuts: RefCell::default(),
        }))
    }

    /// Puts a durable file in place, as if it had always been there.
    pub fn put(&self, name: &str, content: Content) {
        self.0.files.borrow_mut().insert(name.into(), self.0.new_file(name, Inode::durable(content), true));
    }

    /// Puts a block device in place, of the size of its content.
    pub fn put_device(&self, name: &str, content: Content) {
        self.put(name, content);
        self.0.files.borrow()[name].device.set(true);
    }

    /// Whether it is a block device.
    pub fn is_device(&self, name: &str) -> bool {
        self.0.files.borrow().get(name).is_some_and(|f| f.device.get())
    }

    /// As [`Storage::put`], from bytes.
    pub fn put_bytes(&self, name: &str, bytes: &[u8]) {
        let mut content = Content { size: bytes.len() as u64, ..Content::default() };
        content.pages.write(0, bytes);
        self.put(name, content);
    }

    /// Renames a file, as an administrator may; open descriptors keep it.
    pub fn rename(&self, name: &str, to: &str) {
        let mut files = self.0.files.borrow_mut();
        if let Some(file) = files.remove(name) {
            files.insert(to.into(), file);
        }
    }

    /// The content that reads of the file see now.
    pub fn content(&self, name: &str) -> Option<Content> {
        self.0.files.borrow().get(name).map(|f| f.inode.borrow().live.clone())
    }

    /// Which file it is, whatever its name.
    pub fn file_number(&self, name: &str) -> Option<u64> {
        self.0.files.borrow().get(name).map(|file| file.born)
    }

    /// The file in all tenses.
    pub fn inode(&self, name: &str) -> Option<Inode> {
        self.0.files.borrow().get(name).map(|f| f.inode.borrow().clone())
    }

    /// Calls `look` with the file in all tenses.
    pub fn with_inode<R>(&self, name: &str, look: impl FnOnce(&Inode) -> R) -> Option<R> {
        let file = self.0.files.borrow().get(name).cloned()?;
        let inode = file.inode.borrow();
        Some(look(&inode))
    }

    /// The locks that open files hold on it.
    pub fn locks(&self, name: &str) -> Vec<LockKind> {
        self.0.close_due();
        let files = self.0.files.borrow();
        files.get(name).map_or(Vec::new(), |f| f.locks.borrow().iter().map(|l| l.1).collect())
    }

    /// Whether some process has dropped the file and it is not closed yet.
    pub fn is_closing(&self, name: &str) -> bool {
        self.0.close_due();
        let named = self.0.files.borrow().get(name).cloned();
        // A file may have another name than it was opened by.
        let is_it = |file: &Rc<FileState>| named.as_ref().map_or(file.name == name, |n| Rc::ptr_eq(n, file));
        self.0.closing.borrow().iter().any(|(_, open)| is_it(&open.file))
    }

    /// Closes all files that were dropped and would be closed later: every process that dropped one has ended, and was
    /// waited for.
    pub fn close_all(&self) {
        self.0.closing.borrow_mut().clear();
    }

    /// The file's bytes as reads see them now.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let content = self.content(name)?;
        let mut out = vec![0; content.size as usize];
        content.pages.read(0, &mut out);
        Some(out)
    }

    /// The alignment of offsets and lengths of direct files, in bytes.
    pub fn direct_align_bytes(&self) -> u32 {
        self.0.direct_align()
    }

    /// Whether ranges of files can be made zeros.
    pub fn makes_holes(&self) -> bool {
        self.0.can_zero()
    }

    /// Operations so far.
    pub fn counts(&self) -> IoCounts {
        self.0.counts.get()
    }

    /// Attempts to open a file that is not there.
    pub fn missing(&self) -> u64 {
        self.0.missing.get()
    }

    /// Operations that took effect so far.
    pub fn ops(&self) -> u64 {
        self.0.ops.get()
    }

    /// Synchronisations of buffered files that failed so far.
    pub fn losses(&self) -> u64 {
        self.0.losses.get()
    }

    /// Calls `hook` after each effect.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.0.hook.borrow_mut() = hook;
    }

    /// From now on no operation fails by plan; drawn faults are stopped by the engine.
    pub fn stop_failures(&self) {
        self.0.stopped.set(true);
    }

    /// While it refuses, every write fails and stores nothing: the path to the drive is down, or a part of it is bad.
    pub fn set_refusing(&self, refusing: bool) {
        self.0.refusing.set(refusing);
    }

    /// While it is calm, no operation fails, none is late, and none is counted: for examining files outside the run.
    pub fn set_calm(&self, calm: bool) {
        self.0.calm.set(calm);
    }
}

impl Inner {
    pub(crate) fn plan(&self) -> FaultPlan {
        self.config.borrow().faults
    }

    pub(crate) fn sync_errors(&self) -> SyncErrors {
        self.config.borrow().sync_errors
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.calm.get()
    }

    pub(crate) fn direct_align(&self) -> u32 {
        self.config.borrow().direct_align_bytes
    }

    pub(crate) fn can_zero(&self) -> bool {
        self.config.borrow().zeroing
    }

    fn new_file(&self, name: &str, inode: Inode, name_durable: bool) -> Rc<FileState> {
        let born = self.born.replace(self.born.get() + 1);
        self.file(name, inode, name_durable, born)
    }

    fn file(&self, name: &str, inode: Inode, name_durable: bool, born: u64) -> Rc<FileState> {
        let entity = Entity::WORLD.child("file", text_hash(name));
        self.sim.name_entity(entity, || name.to_string());
        Rc::new(FileState {
            name: name.into(),
            inode: RefCell::new(inode),
            entity,
            name_durable: Cell::new(name_durable),
            name_given_up: Cell::new(false),
            locks: RefCell::default(),
            sync_latched: Cell::new(false),
            device: Cell::new(false),
            places: Places::default(),
            born,
        })
    }

    pub(crate) fn open(
        &self,
        name: &str,
        create_new: bool,
        write: bool,
        direct: bool,
    ) -> Result<Rc<OpenFile>, Errno> {
        let failed = self.call_fault(if create_new { Call::Create } else { Call::Open }, name);
        if let Some(failed) = failed.filter(|f| !f.happened) {
            return Err(failed.error);
        }
        let found = self.files.borrow().get(name).cloned();
        let file = match (found, create_new) {
            (Some(_), true) => return Err(Errno::EEXIST),
            (Some(file), false) => file,
            (None, false) => {
                self.missing.set(self.missing.get() + 1);
                return Err(Errno::ENOENT);
            }
            (None, true) => {
                let file = self.new_file(name, Inode::default(), false);
                self.files.borrow_mut().insert(name.into(), Rc::clone(&file));
                file
            }
        };
        if let Some(failed) = failed {
            return Err(failed.error);
        }
        let id = self.next_open.replace(self.next_open.get() + 1);
        // As Linux samples errors: one that was not reported to anyone yet is reported to the next that opens a file.
        let seen = self.losses_seen.get() == self.losses.get();
        let losses_told = Cell::new(if seen { self.losses.get() } else { self.losses_seen.get() });
        Ok(Rc::new(OpenFile { id, file, direct, write, losses_told }))
    }

    /// Whether anything buffered was given up that this open file was not told about.
    pub(crate) fn lost(&self, open: &OpenFile) -> bool {
        let losses = self.losses.get();
        self.losses_seen.set(losses);
        open.losses_told.replace(losses) != losses
    }

    pub(crate) fn power_cuts(&self) -> u32 {
        self.power_cuts.get()
    }

    /// Starts an operation on `len` bytes, which are those of `bufs` for reads and writes; it ends whatever happens to
    /// its caller.
    pub(crate) fn start(
        self: &Rc<Self>,
        op: IoOp,
        open: &Rc<OpenFile>,
        offset: u64,
        len: u64,
        bufs: IoVec,
    ) -> u32 {
        let role = op.name();
        let io = self.sim.derive(role, offset ^ open.file.entity.0 << 40);
        self.sim.name_entity(io, || {
            let by = self.sim.name_of(self.sim.current());
            let place = if op == IoOp::Sync { String::new() } else { format!(" at {offset:#x}") };
            format!("{role} of {by}{place} of {}", open.file.name)
        });
        let full = self.full.get() && op.takes_space();
        let has_space = !full || open.file.device.get() || open.file.inode.borrow().has_space(offset, len);
        let fault = match op {
            IoOp::Zero(ZeroMode::Unmap) if self.hole_wants_space(open, offset, len) => {
                self.no_space_for_hole()
            }
            IoOp::Zero(_) if full => self.full_zeros(io, has_space),
            _ if !has_space => self.no_space(op),
            _ => self.draw_fault(op, io),
        };
        let base = match op {
            IoOp::Read => READ_NS,
            IoOp::Write | IoOp::Zero(_) => WRITE_NS,
            IoOp::Sync => SYNC_NS,
        };
        let late = self.late_ns(io);
        let stuck = match fault {
            Fault::Stuck => STUCK_NS,
            Fault::DropsPages(true) => FULL_SEARCH_NS,
            _ => 0,
        };
        let covers = open.file.inode.borrow().seq();
        let span = self.begin_span(role, open, if op == IoOp::Sync { 0..0 } else { offset..offset + len });
        let running = Running {
            op,
            open: Rc::clone(open),
            io,
            offset,
            len,
            bufs,
            fault,
            covers,
            waker: None,
            orphan: false,
            span,
        };
        if fault == Fault::DropsPages(true) {
            self.drop_pages(&running);
        }
        let index = self.keep(running);
        let timed: Rc<dyn Timed> = self.clone();
        self.sim.call_at(self.sim.now_ns() + base + late + stuck, timed, u64::from(index));
        index
    }

    /// Stores a running operation; returns the index of its slot.
    fn keep(&self, running: Running) -> u32 {
        let slot = Slot::Running(running);
        let mut slots = self.slots.borrow_mut();
        match self.free.borrow_mut().pop() {
            Some(index) => {
                slots[index as usize] = slot;
                index
            }
            None => {
                slots.push(slot);
                (slots.len() - 1) as u32
            }
        }
    }

    /// How much longer than the minimum it takes.
    fn late_ns(&self, io: Entity) -> u64 {
        if self.calm.get() || !self.rates.any_late() && !self.sim.has_given_decisions() {
            return 0;
        }
        self.sim.fault(io, &IO_LATE, 1_000_000, |d| self.rates.draw_late(d))
    }

    /// How long a synchronisation of everything takes.
    pub(crate) fn sync_takes_ns(&self, role: &'static str) -> u64 {
        let io = self.sim.derive(role, 1);
        self.sim.name_entity(io, || format!("{role} of {}", self.sim.name_of(self.sim.current())));
        SYNC_NS + self.late_ns(io)
    }

    fn count(&self, op: IoOp) -> IoCounts {
        let mut counts = self.counts.get();
        match op {
            IoOp::Read => counts.reads += 1,
            IoOp::Write | IoOp::Zero(_) => counts.writes += 1,
            IoOp::Sync => counts.syncs += 1,
        }
        self.counts.set(counts);
        counts
    }

    fn draw_fault(&self, op: IoOp, io: Entity) -> Fault {
        if self.calm.get() {
            return Fault::None;
        }
        let counts = self.count(op);
        if self.refusing.get() && op == IoOp::Write {
            return Fault::Error(Errno::EIO, 0);
        }
        let nth = self.nth(op, counts.reads + counts.writes + counts.syncs);
        if let Nth::Fails(fault) = nth {
            return fault;
        }
        if !self.rates.any(op) && !self.sim.has_given_decisions() {
            return Fault::None;
        }
        let value = self.sim.fault(io, &IO_FAULT, 1_000_000, |d| self.rates.draw_fault(op, d));
        let fault = decode(value, self.config.borrow().faults, op);
        let passes = matches!(fault, Fault::Error(Errno::EAGAIN | Errno::EINTR, _) | Fault::Nothing);
        let spared = passes && (matches!(nth, Nth::Spared) || self.rows.ends(io));
        if spared { Fault::None } else { fault }
    }

    pub(crate) fn poll(&self, index: u32, waker: &Waker) -> Poll<(Result<usize, Errno>, IoVec)> {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[index as usize];
        match slot {
            Slot::Running(running) => {
                match &mut running.waker {
                    Some(old) => old.clone_from(waker),
                    none => *none = Some(waker.clone()),
                }
                Poll::Pending
            }
            Slot::Done(..) => {
                let Slot::Done(result, bufs, loss) = std::mem::replace(slot, Slot::Free) else {
                    unreachable!()
                };
                drop(slots);
                self.free.borrow_mut().push(index);
                if let Some(DriveLoss { file, covers }) = loss {
                    self.give_up(&file, covers);
                }
                Poll::Ready((result, bufs))
            }
            Slot::Free => unreachable!("an operation is polled after its end"),
        }
    }

    /// The result is no longer waited for; the effect still happens.
    pub(crate) fn abandon(&self, index: u32) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[index as usize];
        match slot {
            Slot::Running(running) => {
                running.orphan = true;
                running.waker = None;
            }
            _ => {
                let old = std::mem::replace(slot, Slot::Free);
                self.free.borrow_mut().push(index);
                drop(slots);
                drop(old);
            }
        }
    }
}

/// Puts `bytes` into buffers; used by tests of models.
pub fn to_bufs(bytes: &[u8]) -> Result<IoVec, Errno> {
    let mut bufs: IoVec = IoVec::new();
    bufs.push(tap_host::IoBuf::unpooled(bytes.len())?);
    copy_from_slice(&mut bufs, 0, bytes);
    Ok(bufs)
}
