//! The bounds of a stack that a seed draws, and a disk under them as programs build it.

use crate::check::Contract;
use crate::formats;
use crate::world::World;
use kernel_model::SimHost;
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::{CacheMode, Disk, ExchangeError, Lease, Node, SchedulerLimits, WaitReport, wait_report};
use tap_host::{Budget, Errno, VbdId};
use tap_images::{BackingPolicy, ImageError, ImageFormat, ImageSpec};
use tap_programs::Tuning;
use tap_programs::disk::{DiskOptions, OpenError, open_disk};
use tap_programs::spec::DiskSpec;
use tap_programs::tuning::Layer;
use tap_xenbus::RingLimits;

/// Room for two tables of 512 entries, in bytes.
const TWO_TABLES: usize = 2 * (512 * 8 + 256);

/// Limits that a seed draws; each may be as low as it goes.
#[derive(Clone, Copy, Debug)]
pub struct StackLimits {
    /// Of the scheduler.
    pub scheduler: SchedulerLimits,
    /// Memory for the tables of one image that are kept, in bytes.
    pub table_bytes: usize,
    /// Buffers in bytes.
    pub pool_bytes: usize,
    /// Requests that the guest has running at once.
    pub guest_depth: usize,
    /// Requests that a ring takes before others have their turn.
    pub ring_batch: u32,
    /// Sectors in each buffer of a guest without a ring; 0 where a request has one buffer.
    pub piece_sectors: u32,
    /// O_DIRECT.
    pub direct: bool,
    /// The image is opened for reading only; not drawn.
    pub read_only: bool,
    /// Memory budget of the images of one disk in bytes; 0 is what they are guaranteed, and nothing on top.
    pub memory_bytes: usize,
}

impl StackLimits {
    /// Draws them.
    pub fn draw(world: &World) -> Self {
        let scheduler = SchedulerLimits {
            depth: world.setting("depth", &[32, 128, 4, 1]),
            merge_sectors: world.setting("merge", &[1024, 0, 16]),
            ..SchedulerLimits::default()
        };
        let table_bytes = world.setting("l2-tables", &[1 << 20, TWO_TABLES, 1]);
        Self {
            scheduler,
            table_bytes,
            pool_bytes: world.setting("pool", &[4 << 20, 256 << 10, 64 << 10]),
            guest_depth: world.setting("guest-depth", &[8, 32, 2, 1]),
            ring_batch: world.setting("ring-batch", &[32, 4, 1]),
            piece_sectors: world.setting("direct-pieces", &[0, 8, 1, 3]),
            direct: world.setting("direct", &[false, true]),
            read_only: false,
            memory_bytes: world.setting("memory", &[64 << 20, 4 << 20, 0]),
        }
    }
}

/// Least memory that a program can be told to do with, in bytes.
const PROGRAM_BYTES: usize = 16 << 20;

impl StackLimits {
    /// As options of a program that serves disks, as far as it has them.
    pub fn options(&self) -> String {
        let direct = if self.direct { "--direct" } else { "" };
        let read_only = if self.read_only { "--read-only" } else { "" };
        let memory = match self.memory_bytes {
            PROGRAM_BYTES.. => format!("--memory {}M", self.memory_bytes >> 20),
            _ => String::new(),
        };
        format!("--backing probe {direct} {read_only} {memory}")
    }

    /// What a program in `process` has no options for. Checkers are put between its parts, and it tells what waits for
    /// what if the run is stuck. `memory` is that of all disks together, in bytes; 0 is the least that they can have.
    pub fn tuning(&self, world: &World, process: &sim::Node, memory: usize) -> Tuning {
        let (w, node, limits) = (world.clone(), process.clone(), *self);
        let over_image: Layer = Rc::new(move |_, image| Contract::new(&w, &node, image, &limits));
        let sim = world.sim.clone();
        let over_disk: Layer = Rc::new(move |_, disk| {
            let top = Rc::downgrade(&disk);
            sim.on_stall(move || lines(top.upgrade().map(wait_report).unwrap_or_default()));
            disk
        });
        Tuning {
            scheduler: self.scheduler,
            table_bytes: self.table_bytes,
            ring: RingLimits { buffer_bytes: self.pool_bytes, batch: self.ring_batch },
            memory: (self.memory_bytes < PROGRAM_BYTES).then(|| budget_of(memory)),
            over_image: Some(over_image),
            over_disk: Some(over_disk),
            ..Tuning::default()
        }
    }

    /// The memory of one disk.
    pub fn budget(&self) -> Budget {
        budget_of(self.memory_bytes)
    }
}

fn budget_of(bytes: usize) -> Budget {
    if bytes == 0 { Budget::least() } else { Budget::new(bytes) }
}

fn lines(report: Vec<WaitReport>) -> Vec<String> {
    report.iter().map(ToString::to_string).collect()
}

/// A disk as programs build it, without a program around it: what requests are submitted to.
pub struct Stack {
    /// What programs build.
    pub disk: Disk<SimHost>,
    /// What its memory is taken of.
    pub memory: Budget,
    /// Above the image that the disk has now.
    contract: RefCell<Rc<Contract>>,
}

impl Stack {
    /// Opens the image `spec`, for writing unless `limits` say otherwise, with its backing files, and builds the disk
    /// over it.
    ///
    /// # Errors
    /// As the image's.
    pub async fn open(
        host: &SimHost,
        world: &World,
        spec: &ImageSpec,
        limits: &StackLimits,
    ) -> Result<Self, ImageError> {
        let memory = limits.budget();
        let seen = Rc::new(RefCell::new(None));
        let (w, node, l, out) = (world.clone(), host.process.node().clone(), *limits, Rc::clone(&seen));
        let over_image: Layer = Rc::new(move |_, image| {
            let contract = Contract::new(&w, &node, image, &l);
            *out.borrow_mut() = Some(Rc::clone(&contract));
            contract
        });
        let tuning = limits.tuning(world, host.process.node(), limits.memory_bytes);
        let options = DiskOptions {
            write: !limits.read_only,
            direct: limits.direct,
            cache: CacheMode::WriteBack,
            backing: BackingPolicy::any(ImageFormat::Probe),
            patience_ns: 0,
            memory: memory.clone(),
            tuning: Tuning { over_image: Some(over_image), ..tuning },
        };
        let image = DiskSpec::Image(spec.clone());
        let disk = match open_disk(host, formats::drivers(), VbdId(51712), &image, &options).await {
            Ok(disk) => disk,
            Err(OpenError::Image(error)) => return Err(error),
            Err(OpenError::Server(error)) => unreachable!("an image is no export: {error}"),
        };
        let report = disk.wait_report();
        world.sim.on_stall(move || lines(report()));
        let contract = seen.take().expect("an image that was opened has a contract");
        Ok(Self { disk, memory, contract: RefCell::new(contract) })
    }

    /// Exchanges the image for the one that `change` makes: see [`Disk::exchange`].
    ///
    /// # Errors
    /// As there.
    pub async fn exchange<E>(
        &self,
        host: &SimHost,
        world: &World,
        limits: &StackLimits,
        change: impl AsyncFnOnce(Lease) -> Result<Rc<dyn Node>, E>,
    ) -> Result<Result<(), Errno>, ExchangeError<E>> {
        let change = async |lease| {
            let before = Rc::clone(&self.contract.borrow());
            before.has_others_above(true);
            let image = change(lease).await.inspect_err(|_| before.has_others_above(false))?;
            let contract = Contract::new(world, host.process.node(), image, limits);
            *self.contract.borrow_mut() = Rc::clone(&contract);
            Ok(contract as Rc<dyn Node>)
        };
        self.disk.exchange(change).await
    }

    /// The top as a node.
    pub fn node(&self) -> Rc<dyn Node> {
        self.disk.node()
    }
}
