//! The bounds of a stack that a seed draws.

use crate::world::World;
use tap_core::SchedulerLimits;
use tap_host::Budget;

/// Minimum memory that a program can be limited to, in bytes.
pub const PROGRAM_BYTES: usize = 16 << 20;
/// Room for two tables of 512 entries, in bytes.
const TWO_TABLES: usize = 2 * (512 * 8 + 256);

/// Limits that a seed draws; each may be as low as its minimum.
#[derive(Clone, Copy, Debug)]
pub struct StackLimits {
    /// Of the scheduler.
    pub scheduler: SchedulerLimits,
    /// Memory for the cached tables of one image, in bytes.
    pub table_bytes: usize,
    /// Buffers in bytes.
    pub pool_bytes: usize,
    /// Maximum number of requests that the guest has in flight.
    pub guest_depth: usize,
    /// Maximum number of requests that a ring takes before other tasks run.
    pub ring_batch: u32,
    /// Sectors in each buffer of a guest without a ring; 0 for one buffer per request.
    pub piece_sectors: u32,
    /// O_DIRECT.
    pub direct: bool,
    /// The image is opened read-only; not drawn.
    pub read_only: bool,
    /// Clients also read and write parts of sectors: the sectors at the edges are buffers of their own. Not drawn.
    pub unaligned: bool,
    /// Memory budget of the images of one disk in bytes; 0 is just their guaranteed minimum.
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
            unaligned: false,
            memory_bytes: world.setting("memory", &[64 << 20, 4 << 20, 0]),
        }
    }

    /// The options of a program that serves disks, as far as it has them.
    pub fn options(&self) -> String {
        let direct = if self.direct { "--direct" } else { "" };
        let read_only = if self.read_only { "--read-only" } else { "" };
        let memory = match self.memory_bytes {
            PROGRAM_BYTES.. => format!("--memory {}M", self.memory_bytes >> 20),
            _ => String::new(),
        };
        format!("--backing probe {direct} {read_only} {memory}")
    }

    /// The memory of one disk.
    pub fn budget(&self) -> Budget {
        budget_of(self.memory_bytes)
    }
}

/// A budget of `bytes`; for 0 the smallest possible one.
pub fn budget_of(bytes: usize) -> Budget {
    if bytes == 0 { Budget::least() } else { Budget::new(bytes) }
}
