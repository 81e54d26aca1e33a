//! Linux's nbd driver: block devices whose requests go to a server over a stream.
//!
//! ```text
//!   Gendisk ── queue ──► waiting ──► sender ── request ──► stream ══ server
//!                           ▲           │ sent                 │
//!               look again ─┴── sent ◄──┘◄──── receiver ◄── reply
//! ```
//!
//! As in Linux since 5.14, for a device with one socket and no time limit for requests:
//!
//! * When the stream breaks the device stays. A request that is not sent yet waits for another stream, for as long as
//!   the device's patience; then it and those after it fail, until there is another stream.
//! * A request that was sent and not answered stays so. Its timer fires again and again, and has it sent again once
//!   there is another stream.
//! * Each time that a request is sent it gets another cookie. A reply without its request breaks the stream.
//! * A device whose stream has not broken keeps it: who offers another one is told that all is well.
//! * A disconnect fails everything that is not answered. Who has the device open keeps it, without a stream.
//!
//! # Faults
//!
//! | fault | effect |
//! |---|---|
//! | cut | the kernel ends the stream before it sends a request: it had no memory |

mod serve;

use crate::gendisk::{Bio, BlockDriver, BlockRequest, Gendisk, Opener, QueueLimits};
use crate::process::{Kernel, Process};
use crate::sockets::ProcessStream;
use sim::{FaultKind, Label};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{pending, poll_fn};
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use tap_abi::nbd::export;
use tap_host::{
    Errno, IoKind, NbdClaim, NbdConfig, NbdDevice, NbdDevices, NbdIndex, OneWaiter, SECTOR_BYTES,
    SectorRange, Stream,
};

/// Whether the kernel ends the stream of a device before it sends a request.
pub(crate) static DEVICE_CUT: Label = Label::new("device-cut", "the kernel ends the stream of the device");

static CUT: FaultKind = FaultKind { name: "device-cut", max_ppm: 100_000 };

/// Devices that exist from the beginning.
const DEVICES: u32 = 16;
/// Requests of a device that are sent and not answered.
const DEPTH: usize = 128;
/// Most sectors of a read or write, unless the server takes less.
const MAX_SECTORS: u32 = 256;
/// The timer of a request, in nanoseconds.
const LOOK_AGAIN_NS: u64 = 5_000_000_000;

/// Is told what the server does wrong.
pub type NbdComplaint = Rc<dyn Fn(String)>;

/// The driver of one kernel.
#[derive(Default)]
pub(crate) struct NbdDriver {
    devices: RefCell<BTreeMap<u32, Rc<Device>>>,
    /// Whose tasks the driver's are; it ends with the kernel.
    kernel: RefCell<Option<Process>>,
    /// What every call fails with.
    refusal: Cell<Option<Errno>>,
    /// What taking a device away fails with.
    keeps: Cell<Option<Errno>>,
    complain: RefCell<Option<NbdComplaint>>,
    /// It does not send zeros, as before Linux 6.11.
    no_zeroes: Cell<bool>,
}

impl NbdDriver {
    /// From now on every call fails, or none: there is no driver, or it is too old.
    pub(crate) fn refuse(&self, error: Option<Errno>) {
        self.refusal.set(error);
    }

    pub(crate) fn on_complaint(&self, complain: NbdComplaint) {
        *self.complain.borrow_mut() = Some(complain);
    }

    /// From now on nobody is told what servers do wrong.
    pub(crate) fn forget_listener(&self) {
        self.complain.take();
    }

    /// The kernel ends: no device and no request is left.
    pub(crate) fn power_cut(&self) {
        self.devices.borrow_mut().clear();
        if let Some(kernel) = self.kernel.take() {
            kernel.node().kill();
        }
    }

    fn device(&self, of: &Kernel, index: u32) -> Rc<Device> {
        let own = || of.process("nbd driver", u64::from(of.storage().0.power_cuts()));
        let kernel = self.kernel.borrow_mut().get_or_insert_with(own).clone();
        let mut devices = self.devices.borrow_mut();
        let new = || Device::new(kernel, index, (self.complain.borrow().clone(), !self.no_zeroes.get()));
        Rc::clone(devices.entry(index).or_insert_with(new))
    }

    /// A device that neither is attached nor has an opener.
    fn free(&self, of: &Kernel) -> Result<Rc<Device>, Errno> {
        let all = (0..DEVICES).map(|index| self.device(of, index));
        all.into_iter().find(|device| !device.is_used()).ok_or(Errno::EBUSY)
    }

    /// The block device `index`, for openers.
    pub(crate) fn disk(&self, of: &Kernel, index: NbdIndex) -> Gendisk {
        self.device(of, index.0).disk.clone()
    }

    fn existing(&self, index: NbdIndex) -> Result<Rc<Device>, Errno> {
        self.devices.borrow().get(&index.0).map(Rc::clone).ok_or(Errno::EINVAL)
    }

    fn attached(&self) -> Vec<NbdDevice> {
        self.devices.borrow().values().filter_map(|device| device.describe()).collect()
    }
}

impl Kernel {
    /// The block device `index` of the nbd driver, for whoever opens it.
    pub fn nbd_disk(&self, index: NbdIndex) -> Gendisk {
        self.nbd().disk(self, index)
    }

    /// Tells `complain` what servers of block devices do wrong.
    pub fn on_nbd_complaint(&self, complain: NbdComplaint) {
        self.nbd().on_complaint(complain);
    }

    /// Whether the nbd driver sends zeros; for devices that nobody has looked at yet.
    pub fn nbd_sends_zeroes(&self, sends: bool) {
        self.nbd().no_zeroes.set(!sends);
    }

    /// From now on every call to the nbd driver fails with `error`, or none.
    pub fn refuse_nbd(&self, error: Option<Errno>) {
        self.nbd().refuse(error);
    }

    /// From now on taking a device away fails with `error`, or not any more.
    pub fn refuse_nbd_detach(&self, error: Option<Errno>) {
        self.nbd().keeps.set(error);
    }

    /// The kernel ends the stream of a device.
    pub fn cut_nbd(&self, index: NbdIndex) {
        let device = self.nbd().device(self, index.0);
        let number = device.config.borrow().as_ref().map(|config| config.line.number);
        number.into_iter().for_each(|number| device.end_stream(number));
    }

    /// The machine's power fails: no block device is left. Its processes and files are the caller's.
    pub fn power_cut_nbd(&self) {
        self.nbd().power_cut();
    }
}

/// A request of a device.
struct Command {
    request: Rc<BlockRequest>,
    tag: u32,
    /// Counts how often it was sent.
    cookie: u32,
    /// The stream that it was sent on.
    stream: u32,
}

/// A device's stream.
struct Line {
    stream: ProcessStream,
    /// Counts the streams of the device.
    number: u32,
    dead: bool,
}

/// An attached device.
struct Config {
    identifier: String,
    read_only: bool,
    patience_ns: u64,
    line: Line,
    /// Requests fail instead of waiting for another stream.
    disconnected: bool,
    /// It was not taken away.
    held: bool,
}

struct Device {
    kernel: Process,
    index: u32,
    disk: Gendisk,
    config: RefCell<Option<Config>>,
    waiting: RefCell<VecDeque<Command>>,
    sent: RefCell<BTreeMap<u32, Command>>,
    /// A message is being sent.
    sending: Cell<bool>,
    tags: Cell<u32>,
    streams: Cell<u32>,
    messages: Cell<u64>,
    sender: OneWaiter,
    /// Who waits until no message is being sent.
    quiet: RefCell<Vec<Waker>>,
    complain: Option<NbdComplaint>,
    /// The driver sends zeros.
    zeroes: bool,
}

fn limits(flags: u16, request_bytes: u32) -> QueueLimits {
    let has = |flag: u16| flags & flag != 0;
    QueueLimits {
        depth: DEPTH,
        logical_block_bytes: SECTOR_BYTES as u32,
        max_sectors: MAX_SECTORS.min(request_bytes / SECTOR_BYTES as u32),
        max_discard_sectors: if has(export::SEND_TRIM) { u32::MAX } else { 0 },
        max_zeroes_sectors: if has(export::SEND_WRITE_ZEROES) { u32::MAX } else { 0 },
        write_cache: has(export::SEND_FLUSH),
        fua: has(export::SEND_FUA),
    }
}

impl Device {
    fn new(kernel: Process, index: u32, (complain, zeroes): (Option<NbdComplaint>, bool)) -> Rc<Self> {
        let device = Rc::new(Self {
            kernel,
            index,
            disk: Gendisk::new(&format!("nbd{index}"), limits(0, u32::MAX)),
            config: RefCell::default(),
            waiting: RefCell::default(),
            sent: RefCell::default(),
            sending: Cell::new(false),
            tags: Cell::new(0),
            streams: Cell::new(0),
            messages: Cell::new(0),
            sender: OneWaiter::default(),
            quiet: RefCell::default(),
            complain,
            zeroes,
        });
        device.disk.set_driver(Rc::new(Queue(Rc::downgrade(&device))));
        let own = Rc::clone(&device);
        device.kernel.node().spawn("nbd-send", u64::from(index), async move { own.send_all().await });
        device
    }

    fn is_used(&self) -> bool {
        self.config.borrow().is_some() || !self.disk.openers().is_empty()
    }

    fn describe(&self) -> Option<NbdDevice> {
        let config = self.config.borrow();
        let config = config.as_ref()?;
        Some(NbdDevice {
            index: NbdIndex(self.index),
            identifier: config.identifier.clone(),
            size_bytes: self.disk.size_sectors() * SECTOR_BYTES,
            read_only: config.read_only,
        })
    }

    /// Reports what the server has done wrong.
    fn complain(&self, what: &str) {
        if let Some(complain) = &self.complain {
            complain(format!("nbd{}: {what}", self.index));
        }
    }

    /// Ends the stream `number`, unless it has ended.
    fn end_stream(&self, number: u32) {
        let mut config = self.config.borrow_mut();
        if let Some(line) = config.as_mut().map(|config| &mut config.line)
            && line.number == number
            && !line.dead
        {
            line.dead = true;
            line.stream.shutdown();
        }
        self.sender.wake();
    }

    fn new_line(self: &Rc<Self>, stream: ProcessStream) -> Line {
        let number = self.streams.get() + 1;
        self.streams.set(number);
        let (own, receives) = (Rc::clone(self), stream.clone());
        self.kernel.node().spawn("nbd-receive", u64::from(number), async move {
            own.receive_all(receives, number).await;
            own.end_stream(number);
        });
        Line { stream, number, dead: false }
    }

    fn attach(self: &Rc<Self>, config: &NbdConfig, stream: ProcessStream) -> Result<(), Errno> {
        if self.is_used() {
            return Err(Errno::EBUSY);
        }
        let read_only = config.flags & export::READ_ONLY != 0;
        let unknown = if self.zeroes { 0 } else { export::SEND_WRITE_ZEROES };
        self.disk.set_limits(limits(config.flags & !unknown, config.request_bytes));
        self.disk.set_read_only(read_only);
        self.disk.set_size(config.size_bytes / SECTOR_BYTES);
        *self.config.borrow_mut() = Some(Config {
            identifier: config.identifier.clone(),
            read_only,
            patience_ns: u64::from(config.patience_s) * 1_000_000_000,
            line: self.new_line(stream),
            disconnected: false,
            held: true,
        });
        Ok(())
    }

    fn reattach(self: &Rc<Self>, config: &NbdConfig, stream: ProcessStream) -> Result<(), Errno> {
        let mut own = self.config.borrow_mut();
        let own = own.as_mut().filter(|own| own.identifier == config.identifier).ok_or(Errno::EINVAL)?;
        self.disk.set_limits(QueueLimits {
            max_sectors: limits(0, config.request_bytes).max_sectors,
            ..self.disk.limits()
        });
        self.disk.set_size(config.size_bytes / SECTOR_BYTES);
        own.patience_ns = u64::from(config.patience_s) * 1_000_000_000;
        if own.line.dead {
            own.line = self.new_line(stream);
            own.disconnected = false;
            self.sender.wake();
        }
        Ok(())
    }

    /// Takes the device away.
    async fn detach(&self) {
        self.begin_sending().await;
        let line =
            self.config.borrow().as_ref().map(|config| (config.line.stream.clone(), config.line.number));
        if let Some((stream, _)) = &line {
            serve::send_disconnect(stream).await;
        }
        self.end_sending();
        let Some((_, number)) = line else { return };
        if let Some(config) = &mut *self.config.borrow_mut() {
            (config.disconnected, config.held) = (true, false);
        }
        self.end_stream(number);
        self.waiting.borrow_mut().clear();
        self.sent.borrow_mut().clear();
        self.disk.fail_all(Errno::EIO);
        self.forget();
    }

    /// Waits until no other message is being sent.
    async fn begin_sending(&self) {
        poll_fn(|cx| {
            if !self.sending.replace(true) {
                return Poll::Ready(());
            }
            self.quiet.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn end_sending(&self) {
        self.sending.set(false);
        self.quiet.take().into_iter().for_each(Waker::wake);
    }

    /// Forgets a device that was taken away and that nobody has open.
    fn forget(&self) {
        let gone = self.config.borrow().as_ref().is_some_and(|config| !config.held);
        if gone && self.disk.openers().is_empty() {
            self.config.take();
            self.disk.set_size(0);
        }
    }
}

/// The driver's side of the block layer.
struct Queue(Weak<Device>);

impl BlockDriver for Queue {
    fn queue(&self, request: Rc<BlockRequest>) {
        let device = self.0.upgrade().filter(|device| device.config.borrow().is_some());
        let Some(device) = device else {
            request.end(Err(Errno::EIO));
            return;
        };
        let tag = device.tags.replace(device.tags.get().wrapping_add(1));
        device.waiting.borrow_mut().push_back(Command { request, tag, cookie: 0, stream: 0 });
        device.sender.wake();
    }

    fn released(&self) {
        self.0.upgrade().iter().for_each(|device| device.forget());
    }
}

/// A device that a process holds open.
pub struct ProcessClaim(Opener);

impl NbdClaim for ProcessClaim {
    async fn sync(&self) -> Result<(), Errno> {
        self.0.submit(Bio::new(IoKind::Flush, SectorRange::default())).await.0
    }
}

impl Process {
    /// The name of its claims among openers.
    fn claim_name(&self) -> String {
        format!("{} {:x}", self.node().name(), self.node().entity().0)
    }

    /// One call to the driver: an effect of the process.
    async fn calls_nbd(&self) -> Result<&NbdDriver, Errno> {
        if !self.node().step() {
            pending::<()>().await;
        }
        let driver = self.kernel().nbd();
        driver.refusal.get().map_or(Ok(driver), Err)
    }

    fn device_streams(&self, driver: &NbdDriver, index: u32) -> (ProcessStream, ProcessStream) {
        let kernel = driver.device(self.kernel(), index).kernel.clone();
        self.pair(&kernel, u64::from(index))
    }
}

impl NbdDevices for Process {
    type DeviceStream = ProcessStream;
    type Claim = ProcessClaim;

    async fn attached(&self) -> Result<Vec<NbdDevice>, Errno> {
        Ok(self.calls_nbd().await?.attached())
    }

    async fn attach(&self, config: &NbdConfig) -> Result<(NbdIndex, ProcessStream), Errno> {
        let driver = self.calls_nbd().await?;
        let device = match config.index {
            Some(NbdIndex(index)) if index >= DEVICES => return Err(Errno::EINVAL),
            Some(NbdIndex(index)) => driver.device(self.kernel(), index),
            None => driver.free(self.kernel())?,
        };
        let (own, kernels) = self.device_streams(driver, device.index);
        device.attach(config, kernels)?;
        Ok((NbdIndex(device.index), own))
    }

    async fn reattach(&self, index: NbdIndex, config: &NbdConfig) -> Result<ProcessStream, Errno> {
        let driver = self.calls_nbd().await?;
        let device = driver.existing(index)?;
        let (own, kernels) = self.device_streams(driver, index.0);
        device.reattach(config, kernels)?;
        Ok(own)
    }

    async fn detach(&self, index: NbdIndex) -> Result<(), Errno> {
        let driver = self.calls_nbd().await?;
        driver.keeps.get().map_or(Ok(()), Err)?;
        driver.existing(index)?.detach().await;
        Ok(())
    }

    async fn look_for_partitions(&self, index: NbdIndex) -> Result<(), Errno> {
        let opener = self.calls_nbd().await?.existing(index)?.disk.open("partitions", false, false)?;
        let first = SectorRange::new(0, opener.disk().size_sectors().min(8) as u32);
        let data = vec![0; first.len_bytes() as usize];
        // A disk that cannot be read has no partitions.
        let _unread = opener.submit(Bio { data, ..Bio::new(IoKind::Read, first) }).await;
        Ok(())
    }

    async fn claim(&self, index: NbdIndex) -> Result<ProcessClaim, Errno> {
        let device = self.calls_nbd().await?.existing(index)?;
        device.disk.open(&self.claim_name(), false, true).map(ProcessClaim)
    }

    async fn users(&self, index: NbdIndex) -> Vec<String> {
        let own = self.claim_name();
        let device = self.calls_nbd().await.and_then(|driver| driver.existing(index));
        let openers = device.map_or_else(|_| Vec::new(), |device| device.disk.openers());
        openers.into_iter().filter(|name| *name != own).collect()
    }
}
