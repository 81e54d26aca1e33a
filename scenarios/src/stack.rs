//! The stack as a tapdisk builds it: image, scheduler, disk.

use crate::check::Contract;
use crate::world::World;
use kernel_model::SimHost;
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::{CacheMode, Disk, DiskConfig, ExchangeError, Lease, Node, SchedulerLimits};
use tap_host::{Budget, Errno, VbdId};
use tap_images::{BackingPolicy, Formats, ImageError, ImageFormat, ImageSpec, OpenOptions};

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

impl StackLimits {
    /// As options of a program, as far as it has them.
    pub fn images(&self) -> String {
        let direct = if self.direct { "--direct" } else { "" };
        format!("--backing probe --memory {}M {direct}", (self.memory_bytes >> 20).max(16))
    }

    /// The memory of one disk.
    pub fn budget(&self) -> Budget {
        if self.memory_bytes == 0 { Budget::least() } else { Budget::new(self.memory_bytes) }
    }
}

/// A disk of a tapdisk: what requests are submitted to.
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
        Self::open_within(host, world, spec, limits, limits.budget()).await
    }

    /// As [`Stack::open`], with a budget that others have a part of.
    ///
    /// # Errors
    /// As the image's.
    pub async fn open_within(
        host: &SimHost,
        world: &World,
        spec: &ImageSpec,
        limits: &StackLimits,
        memory: Budget,
    ) -> Result<Self, ImageError> {
        let options = OpenOptions {
            write: !limits.read_only,
            direct: limits.direct,
            table_bytes: limits.table_bytes,
            backing: BackingPolicy::any(ImageFormat::Probe),
            memory: memory.clone(),
        };
        let image = Formats::shipped().open(host, spec, &options).await?;
        let image = Contract::new(world, host.process.node(), image, limits);
        let config =
            DiskConfig { id: VbdId(51712), cache: CacheMode::WriteBack, scheduler: limits.scheduler };
        let disk = Disk::new(host, Rc::clone(&image) as Rc<dyn Node>, config);
        let report = disk.wait_report();
        world.sim.on_stall(move || report().iter().map(|line| line.to_string()).collect());
        Ok(Self { disk, memory, contract: RefCell::new(image) })
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
