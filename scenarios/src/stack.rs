//! A disk as programs build it, with limits that a seed draws.

use crate::check::{Contract, Frozen};
use crate::formats;
use crate::limits::{PROGRAM_BYTES, StackLimits, budget_of};
use crate::world::World;
use kernel_model::SimHost;
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::{CacheMode, Disk, ExchangeError, Lease, Node, WaitReport, wait_report};
use tap_host::{Budget, Errno, VbdId};
use tap_images::{BackingPolicy, ImageError, ImageFormat, ImageSpec};
use tap_programs::Tuning;
use tap_programs::disk::{DiskOptions, OpenError, open_disk};
use tap_programs::spec::DiskSpec;
use tap_programs::tuning::Layer;
use tap_xenbus::RingLimits;

impl StackLimits {
    /// What a program in `process` has no options for. Adds checkers between the parts of the disk, and reports which
    /// task waits for what if the run is stuck. `memory` is that of all disks together, in bytes; 0 is the minimum.
    pub fn tuning(&self, world: &World, process: &sim::Node, memory: usize) -> Tuning {
        let (w, node, limits) = (world.clone(), process.clone(), *self);
        let over_image: Layer = Rc::new(move |_, image| Contract::new(&w, &node, image, &limits));
        let (w, node) = (world.clone(), process.clone());
        let over_disk: Layer = Rc::new(move |_, disk| {
            let top = Rc::downgrade(&disk);
            w.sim.on_stall(move || lines(top.upgrade().map(wait_report).unwrap_or_default()));
            Frozen::over(&w, &node, disk)
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
}

fn lines(report: Vec<WaitReport>) -> Vec<String> {
    report.iter().map(ToString::to_string).collect()
}

/// A disk as programs build it, without a program around it: requests are submitted directly.
pub struct Stack {
    /// The disk as programs build it.
    pub disk: Disk<SimHost>,
    /// The budget that its memory is taken from.
    pub memory: Budget,
    /// The checker above the current image.
    contract: RefCell<Rc<Contract>>,
}

impl Stack {
    /// Opens the image `spec` with its backing files, for writing unless `limits` say otherwise, and builds the disk
    /// over it.
    ///
    /// # Errors
    /// Those of the image.
    pub async fn open(
        host: &SimHost,
        world: &World,
        spec: &ImageSpec,
        limits: &StackLimits,
    ) -> Result<Self, ImageError> {
        let image = DiskSpec::Image(spec.clone());
        match Self::open_disk(host, world, &image, limits, CacheMode::WriteBack).await {
            Ok(stack) => Ok(stack),
            Err(OpenError::Image(error)) => Err(error),
            Err(other) => unreachable!("an image is neither an export nor a graph: {other}"),
        }
    }

    /// The same for the disk `spec`, which is durable as `cache` says.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn open_disk(
        host: &SimHost,
        world: &World,
        spec: &DiskSpec,
        limits: &StackLimits,
        cache: CacheMode,
    ) -> Result<Self, OpenError> {
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
            unlocked: false,
            direct: limits.direct,
            cache,
            backing: BackingPolicy::any(ImageFormat::Probe),
            // A process that was killed may still have operations under way.
            patience_ns: if matches!(spec, DiskSpec::Mason { .. }) { 10_000_000_000 } else { 0 },
            memory: memory.clone(),
            tuning: Tuning { over_image: Some(over_image), ..tuning },
        };
        let disk = open_disk(host, formats::drivers(), VbdId(51712), spec, &options).await?;
        let report = disk.wait_report();
        world.sim.on_stall(move || lines(report()));
        let contract = seen.take().expect("an opened image has a contract");
        Ok(Self { disk, memory, contract: RefCell::new(contract) })
    }

    /// Replaces the image by the one that `change` makes: see [`Disk::exchange`].
    ///
    /// # Errors
    /// Those of [`Disk::exchange`].
    pub async fn exchange<E>(
        &self,
        host: &SimHost,
        world: &World,
        limits: &StackLimits,
        change: impl AsyncFnOnce(Lease) -> Result<Rc<dyn Node>, E>,
    ) -> Result<Result<(), Errno>, ExchangeError<E>> {
        let change = async |lease| {
            let before = Rc::clone(&self.contract.borrow());
            before.set_shared(true);
            let image = change(lease).await.inspect_err(|_| before.set_shared(false))?;
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
