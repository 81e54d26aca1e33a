//! The bounds of a stack that a seed draws.

use crate::world::World;
use tap_core::SchedulerLimits;
use tap_host::Budget;

/// Least memory that a program can be told to do with, in bytes.
pub const PROGRAM_BYTES: usize = 16 << 20;
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

    /// The memory of one disk.
    pub fn budget(&self) -> Budget {
        budget_of(self.memory_bytes)
    }
}

/// A budget of so many bytes; of 0 the least that there can be.
pub fn budget_of(bytes: usize) -> Budget {
    if bytes == 0 { Budget::least() } else { Budget::new(bytes) }
}
