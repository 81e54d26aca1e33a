//! Processes: the seam as a program of dom0 sees it. Code of a dead process that still runs has no effect.

mod files;
mod priorities;

use crate::blktap::TapModule;
use crate::calls::Call;
use crate::faults::IoOp;
use crate::load::Load;
use crate::nbd_device::NbdDriver;
use crate::pages::PAGE;
use crate::signals::Stop;
use crate::sockets::Network;
use crate::storage::{Descriptor, Storage};
use crate::traced::Traced;
pub use priorities::IoSeen;
use priorities::Priorities;
use sim::{Node, Sim, Sleep};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tap_host::{
    Bug, Entropy, Errno, Event, File, FileExtent, FileId, FileInfo, Files, IoVec, LockKind, Log, Mark,
    PriorityCell, Probe, SharedPages, Tasks, Time, ZeroMode, bytes_of,
};
use xen_model::Mapping;

/// Alignment in bytes that O_DIRECT requires, unless the storage says otherwise.
pub const DIRECT_ALIGN_BYTES: u32 = 512;

/// Size in bytes of the largest file; file systems have such a limit, most of them a higher one.
pub const FILE_BYTES_MAX: u64 = 256 << 30;

/// The number of the first process; the kernel's own have smaller ones.
const FIRST_PID: u32 = 300;

/// The kernel of one simulated host; clones share it.
#[derive(Clone)]
pub struct Kernel(Rc<KernelInner>);

struct KernelInner {
    sim: Sim,
    storage: Storage,
    bugs: RefCell<Vec<&'static Bug>>,
    marks: RefCell<BTreeMap<&'static Mark, u64>>,
    load: Load,
    entropy: Cell<u64>,
    /// The number of the next process.
    pids: Cell<u32>,
    network: Network,
    nbd: NbdDriver,
    answers_lost: Cell<bool>,
    listeners: RefCell<Vec<Listener>>,
    priorities: Priorities,
    tap: RefCell<Option<TapModule>>,
}

/// Is called with each event and the process that logs it.
type Listener = Rc<dyn Fn(&Node, Event)>;

impl Kernel {
    /// The machine is off for good: the kernel forgets its devices and whom it tells about them, which refer to it.
    pub fn halt(&self) {
        self.0.nbd.power_cut();
        self.0.tap.take();
        self.0.listeners.take();
        self.0.priorities.forget_watchers();
        self.0.nbd.forget_listener();
    }

    /// Whether a process died with the answer to whether its file system gave up writes: the answer is then lost.
    pub fn answers_lost(&self) -> bool {
        self.0.answers_lost.get()
    }

    /// The maximum work counted in one turn of a task ([`Probe::work`]).
    pub fn max_work(&self) -> u64 {
        self.0.load.max_work.get()
    }

    /// The maximum number of file operations awaited at one time.
    pub fn max_running(&self) -> u64 {
        self.0.load.max_running.get()
    }

    /// How often data was copied between a process and the other end of a ring.
    pub fn copies(&self) -> u64 {
        self.0.load.copies.get()
    }

    pub(crate) fn count_copy(&self) {
        self.0.load.copies.set(self.0.load.copies.get() + 1);
    }

    /// A kernel over `storage`.
    pub fn new(sim: &Sim, storage: &Storage) -> Self {
        Self(Rc::new(KernelInner {
            sim: sim.clone(),
            storage: storage.clone(),
            bugs: RefCell::default(),
            marks: RefCell::default(),
            load: Load::default(),
            entropy: Cell::new(sim.swarm().seed()),
            pids: Cell::new(FIRST_PID),
            network: Network::default(),
            nbd: NbdDriver::default(),
            answers_lost: Cell::new(false),
            listeners: RefCell::default(),
            priorities: Priorities::default(),
            tap: RefCell::default(),
        }))
    }

    /// Switches a seeded bug on in every process.
    pub fn plant(&self, bug: &'static Bug) {
        self.0.bugs.borrow_mut().push(bug);
    }

    /// How often `mark` was reached.
    pub fn marked(&self, mark: &'static Mark) -> u64 {
        self.0.marks.borrow().get(mark).copied().unwrap_or_default()
    }

    /// Tells `listener` of each event that a living process logs from now on, as a reader of the journal would be.
    pub fn on_event(&self, listener: impl Fn(&Node, Event) + 'static) {
        self.0.listeners.borrow_mut().push(Rc::new(listener));
    }

    /// Loads a blktap2 module.
    pub fn load_tap(&self, module: &TapModule) {
        *self.0.tap.borrow_mut() = Some(module.clone());
    }

    /// Starts a process that does nothing yet.
    pub fn process(&self, name: impl Into<String>, key: u64) -> Process {
        Process {
            kernel: self.clone(),
            node: self.0.sim.node(name, key),
            stop: Rc::default(),
            closed_at_ns: Rc::default(),
            pid: self.0.pids.replace(self.0.pids.get() + 1),
            priority: PriorityCell::default(),
        }
    }

    pub(crate) fn nbd(&self) -> &NbdDriver {
        &self.0.nbd
    }

    pub(crate) fn tap_module(&self) -> Option<TapModule> {
        self.0.tap.borrow().clone()
    }

    /// The storage.
    pub fn storage(&self) -> &Storage {
        &self.0.storage
    }
}

/// A process of dom0.
#[derive(Clone)]
pub struct Process {
    kernel: Kernel,
    node: Node,
    stop: Rc<Stop>,
    /// When all files that it has dropped will be closed.
    closed_at_ns: Rc<Cell<u64>>,
    pid: u32,
    /// That of the files that are opened through this handle.
    priority: PriorityCell,
}

impl Process {
    /// The node that dies when the process is killed.
    pub fn node(&self) -> &Node {
        &self.node
    }

    pub(crate) fn stop(&self) -> &Rc<Stop> {
        &self.stop
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn sim(&self) -> &Sim {
        &self.kernel.0.sim
    }

    pub(crate) fn power_cuts(&self) -> u32 {
        self.kernel.0.storage.0.power_cuts()
    }

    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    pub(crate) fn network(&self) -> &Network {
        &self.kernel.0.network
    }
}

impl Time for Process {
    fn now_ns(&self) -> u64 {
        self.sim().now_ns()
    }
    fn sleep_ns(&self, ns: u64) -> impl Future<Output = ()> + 'static {
        let sleep: Sleep = self.sim().sleep_ns(ns);
        sleep
    }
}

impl Tasks for Process {
    fn spawn(&self, role: &'static str, key: u64, task: impl Future<Output = ()> + 'static) {
        self.node.spawn(role, key, task);
    }
    fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        self.sim().yield_now()
    }
}

impl Log for Process {
    fn log(&self, event: Event) {
        if self.node.is_alive() {
            self.sim().trace(self.node.name(), &Traced(event));
            self.kernel.0.listeners.borrow().iter().for_each(|listener| listener(&self.node, event));
        }
    }
}

impl Entropy for Process {
    fn fill(&self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let state = self.kernel.0.entropy.get().wrapping_add(1);
            self.kernel.0.entropy.set(state);
            let bits = sim::mix(state).to_le_bytes();
            chunk.copy_from_slice(&bits[..chunk.len()]);
        }
    }
}

impl Probe for Process {
    #[inline]
    fn bug(&self, bug: &'static Bug) -> bool {
        self.kernel.0.bugs.borrow().contains(&bug)
    }
    fn work(&self, units: u64) {
        self.kernel.0.load.add(self.kernel.0.sim.turns(), units);
    }
    fn mark(&self, mark: &'static Mark) {
        *self.kernel.0.marks.borrow_mut().entry(mark).or_default() += 1;
    }
}

/// A process without Xen has no pages that outlive it, as on a host whose run folder cannot be used;
/// [`crate::SimHost`] has.
impl SharedPages for Process {
    type Region = Mapping;
    fn region(&self, _: &str) -> Result<Mapping, Errno> {
        Err(Errno::ENODEV)
    }
    fn own_region(&self, _: &str) -> Result<Mapping, Errno> {
        Err(Errno::ENODEV)
    }
    fn boot_id(&self) -> Result<[u8; 16], Errno> {
        Err(Errno::ENODEV)
    }
    fn remove_region(&self, _: &str) {}
    fn region_names(&self) -> Result<Vec<String>, Errno> {
        Ok(Vec::new())
    }
}

impl Process {
    /// Counts one effect of the process; never completes once the process is dead.
    async fn alive(&self) {
        if !self.node.step() {
            pending::<()>().await;
        }
    }

    /// Whether a file that it has dropped is not closed yet.
    fn is_closing(&self) -> bool {
        self.closed_at_ns.get() > self.now_ns()
    }

    /// Waits for as long as a call on a file takes.
    async fn takes(&self, call: Call, name: &str) {
        let late_ns = self.kernel.0.storage.0.call_late_ns(call, name);
        if late_ns > 0 {
            self.sim().sleep_ns(late_ns).await;
        }
    }
}

/// An open file of a process.
#[derive(Clone)]
pub struct ProcessFile {
    process: Process,
    open: Rc<Descriptor>,
}

enum IoState {
    Start(IoOp, u64, u64, IoVec),
    Running(u32),
    /// The process died before the operation could start: it never completes.
    Never,
    Done,
}

/// An operation: starts when first polled, continues when dropped.
struct Io {
    file: ProcessFile,
    state: IoState,
}

impl Future for Io {
    type Output = (Result<usize, Errno>, IoVec);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let IoState::Start(op, offset, len, ref mut bufs) = this.state {
            let bufs = std::mem::take(bufs);
            this.state = IoState::Done;
            if !this.file.process.node.step() {
                this.state = IoState::Never;
                return Poll::Pending;
            }
            if let Err(error) = this.file.check(op, offset, len, &bufs) {
                return Poll::Ready((Err(error), bufs));
            }
            this.file.seen(op);
            let storage = &this.file.process.kernel.0.storage.0;
            this.state = IoState::Running(storage.start(op, this.file.open.open_file(), offset, len, bufs));
            this.file.process.kernel.0.load.start();
        }
        match this.state {
            IoState::Running(index) => {
                let result = this.file.process.kernel.0.storage.0.poll(index, cx.waker());
                if result.is_ready() {
                    this.state = IoState::Done;
                    this.file.process.kernel.0.load.end();
                }
                result
            }
            _ => Poll::Pending,
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        if let IoState::Running(index) = self.state {
            self.file.process.kernel.0.storage.0.abandon(index);
            self.file.process.kernel.0.load.end();
        }
    }
}

impl ProcessFile {
    fn io(&self, op: IoOp, offset: u64, bufs: IoVec) -> Io {
        let len = bytes_of(&bufs) as u64;
        Io { file: self.clone(), state: IoState::Start(op, offset, len, bufs) }
    }

    fn check(&self, op: IoOp, offset: u64, len: u64, bufs: &IoVec) -> Result<(), Errno> {
        if op.changes() && !self.open.write {
            return Err(Errno::EBADF);
        }
        let device = self.open.file.device.get();
        if let IoOp::Zero(mode) = op {
            let storage = &self.process.kernel.0.storage.0;
            if !storage.can_zero() && !device {
                return Err(storage.refuse_zeros());
            }
            let valid = len > 0 && offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
            if !valid {
                return Err(Errno::EINVAL);
            }
            if device {
                let sector = u64::from(storage.direct_align());
                if !offset.is_multiple_of(sector) || !len.is_multiple_of(sector) {
                    return Err(Errno::EOPNOTSUPP);
                }
                // Zeros that keep their space are written by Linux itself. For the others it learns whether the drive
                // supports them only after it has dropped the dirty pages.
                if !storage.can_zero() && mode == ZeroMode::Unmap {
                    storage.drop_range(&self.open, offset, len);
                    return Err(storage.refuse_zeros());
                }
            }
            return Ok(());
        }
        let align = u64::from(self.align());
        let unaligned = |n: u64| !n.is_multiple_of(align);
        if op != IoOp::Sync && (unaligned(offset) || bufs.iter().any(|b| unaligned(b.len() as u64))) {
            return Err(Errno::EINVAL);
        }
        // The limit of Linux's loff_t, and a file system's own limit.
        let max = if op == IoOp::Write { FILE_BYTES_MAX } else { i64::MAX as u64 };
        if offset.checked_add(len).is_none_or(|end| end > max) {
            return Err(Errno::EFBIG);
        }
        Ok(())
    }

    fn align(&self) -> u32 {
        if self.open.direct { self.process.kernel.0.storage.0.direct_align() } else { 1 }
    }
}

impl File for ProcessFile {
    fn read_at(
        &self,
        offset: u64,
        bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static {
        self.io(IoOp::Read, offset, bufs)
    }

    fn write_at(
        &self,
        offset: u64,
        bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static {
        self.io(IoOp::Write, offset, bufs)
    }

    fn sync_data(&self) -> impl Future<Output = Result<(), Errno>> + 'static {
        let (io, file) = (self.io(IoOp::Sync, 0, IoVec::new()), self.clone());
        async move {
            let result = io.await.0.map(|_| ());
            if result.is_err() && file.open.direct {
                // Only the caller knows the answer until it has noted it: see the storage's fault model.
                file.process.node.spare_next_step();
            }
            result
        }
    }

    fn set_size(&self, size_bytes: u64) -> impl Future<Output = Result<(), Errno>> + 'static {
        let file = self.clone();
        async move {
            file.takes(Call::SetSize).await;
            file.process.alive().await;
            if !file.open.write {
                return Err(Errno::EBADF);
            }
            if file.open.file.device.get() {
                return Err(Errno::EINVAL);
            }
            if size_bytes > FILE_BYTES_MAX {
                return Err(Errno::EFBIG);
            }
            file.process.kernel.0.storage.0.set_size(&file.open, size_bytes)
        }
    }

    fn zero_at(
        &self,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> impl Future<Output = Result<(), Errno>> + 'static {
        let start = IoState::Start(IoOp::Zero(mode), offset, len, IoVec::new());
        let io = Io { file: self.clone(), state: start };
        async move { io.await.0.map(|_| ()) }
    }

    fn file_system_lost(&self) -> impl Future<Output = Result<bool, Errno>> + 'static {
        let file = self.clone();
        async move {
            let (node, kernel) = (file.process.node.clone(), file.process.kernel.clone());
            let (dying, answered) = (node.clone(), Rc::new(Cell::new(None)));
            let at = Rc::clone(&answered);
            node.on_death(move || {
                // The call was not answered, or the process did nothing since: a process that notes the worst case
                // beforehand has left that note.
                if at.get().is_none_or(|steps| dying.steps() <= steps + 1) {
                    kernel.0.answers_lost.set(true);
                }
            });
            file.process.alive().await;
            let storage = &file.process.kernel.0.storage.0;
            let (answer, takes_ns) = storage.ask_file_system(&file.open);
            // If the process dies meanwhile, the call was made all the same, and its answer is lost.
            file.process.kernel.0.sim.sleep_ns(takes_ns).await;
            answered.set(Some(node.steps()));
            answer
        }
    }

    fn extents_at(
        &self,
        offset: u64,
        max: usize,
    ) -> impl Future<Output = Result<Vec<FileExtent>, Errno>> + 'static {
        let file = self.clone();
        async move {
            file.takes(Call::Extent).await;
            file.process.alive().await;
            let storage = &file.process.kernel.0.storage.0;
            storage.look(Call::Extent, &file.open)?;
            let max = storage.extents_max(&file.open, max);
            let inode = file.open.file.inode.borrow();
            let mut at = offset;
            let found = std::iter::from_fn(|| {
                let (len_bytes, data) = match inode.live.size.checked_sub(at).filter(|left| *left > 0) {
                    // A device does not know its holes.
                    Some(left) if file.open.file.device.get() => (left, true),
                    _ => inode.extent(at)?,
                };
                at += len_bytes;
                Some(FileExtent { len_bytes, data })
            });
            Ok(found.take(max).collect())
        }
    }

    fn info(&self) -> impl Future<Output = Result<FileInfo, Errno>> + 'static {
        let file = self.clone();
        async move {
            file.takes(Call::Info).await;
            file.look()
        }
    }

    fn lock(&self, kind: LockKind) -> impl Future<Output = Result<(), Errno>> + 'static {
        let file = self.clone();
        async move {
            file.takes(Call::Lock).await;
            loop {
                file.process.alive().await;
                let result = file.process.kernel.0.storage.0.lock(&file.open, kind);
                // As in tap-linux: files that the process itself has dropped are waited for.
                let drops = result == Err(Errno::EAGAIN) && file.process.is_closing();
                if !drops {
                    return result;
                }
                file.process.closed().await;
            }
        }
    }
}

impl ProcessFile {
    async fn takes(&self, call: Call) {
        self.process.takes(call, &self.open.file.name).await;
    }

    fn look(&self) -> Result<FileInfo, Errno> {
        self.process.kernel.0.storage.0.look(Call::Info, &self.open)?;
        let file = &self.open.file;
        let (size_bytes, block_device) = (file.inode.borrow().live.size, file.device.get());
        let (device, inode) = if block_device { (file.number(), 0) } else { (1, file.number()) };
        let present = || file.inode.borrow().live.allocated_pages() * PAGE as u64;
        Ok(FileInfo {
            size_bytes,
            allocated_bytes: if block_device { size_bytes } else { present() },
            align_bytes: self.align(),
            zero_align_bytes: if block_device { self.process.kernel.0.storage.0.direct_align() } else { 1 },
            direct: self.open.direct,
            block_device,
            id: FileId { device, inode, generation: file.born },
        })
    }
}
