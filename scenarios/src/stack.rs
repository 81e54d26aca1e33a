//! A disk as programs build it, under the bounds that a seed draws.

use crate::check::Contract;
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
