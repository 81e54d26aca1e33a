//! Simulated Linux, as far as a tapdisk in dom0 and a block front end in a guest see it.
//!
//! ```text
//!   Process (Time, Tasks, Files, Log, Probe)     dies as a whole; its I/O in flight still lands
//!        │ read, write, fdatasync
//!   Storage ── Inode: live / pending / base      page cache and volatile drive cache in one: what is not
//!        │                                       synchronised may be lost, sector by sector
//!   power cut: keeps the base and any part of what is pending
//!   sockets: streams between processes, split and delayed, closed by death
//!   gendisk: the block layer above a driver of block devices; nbd_device: such a driver
//!   blktap: the driver whose requests a process serves through a ring, in the four kinds that exist
//!   blkback: guests' disks over block devices; blkfront: the other end, in a guest
//! ```
//!
//! The fault model is documented where faults are made: see [`faults`] and [`sockets`]. The model takes the seam's
//! vocabulary from `tap-host` and nothing from the stack: both sides are written separately, or the simulator would
//! agree with its own bugs.

mod blkback;
mod blkfront;
mod blktap;
pub mod calls;
mod device_number;
pub mod faults;
pub mod gendisk;
mod host;
mod inode;
mod load;
mod nbd_device;
mod pages;
mod process;
mod signals;
pub mod sockets;
mod storage;
mod traced;

pub use blkback::Blkback;
pub use blkfront::{
    BLKFRONT_MAX_SECTORS, Blkfront, Complaint, DataPiece, DataPieces, KeysOf, LayoutOf, LingersOf,
    OnPublished, OnResized, Published, SegmentLayout,
};
pub use blktap::{ProcessTap, TapCall, TapKind, TapLayoutOf, TapModule, TapTrouble};
pub use device_number::DeviceNumber;
pub use host::SimHost;
pub use inode::{BadSectors, Content, Inode, Pending, PendingSize, apply};
pub use nbd_device::{NbdComplaint, ProcessClaim};
pub use pages::{PAGE, Page, PageMap, recycle};
pub use process::{DIRECT_ALIGN_BYTES, FILE_BYTES_MAX, IoSeen, Kernel, Process, ProcessFile};
pub use sockets::{ProcessListener, ProcessStream};
pub use storage::{
    Concerned, Cut, CutFile, CutWrite, Hook, IoCounts, NthFailure, Spoilt, Storage, StorageConfig, to_bufs,
};
