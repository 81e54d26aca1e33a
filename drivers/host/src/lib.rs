//! The seam: what a tapdisk may ask of the machine it runs on, and nothing else.
//!
//! ```text
//!      images   core   ring   xenbus            (drivers: one source)
//!         \       |      |      /
//!          +------+------+-----+
//!          |      tap-host     |   one small trait per resource
//!          +---------+---------+
//!             /             \
//!     simulated host      real host             (two types, chosen by the program)
//! ```
//!
//! A crate bounds its types on the traits it uses (`images` on [`Files`] and [`Time`]). Dispatch is static, futures are
//! `!Send` and run on one thread.
//!
//! # Contract
//!
//! * **Buffers are owned.** An operation takes [`IoVec`]s and returns them with its result. Dropping the future of an
//!   operation neither frees the buffers early nor undoes the effect: a write may still land.
//! * **Shared memory is a type.** [`SharedPage`] has ordered loads, stores and copies; no reference to memory that
//!   another domain can write ever exists. Entries are copied out once and parsed from the copy.
//! * **Errors are [`Errno`]s** at this level; the crates above turn them into sentences.
//! * **Seeded bugs** are asked for through [`Probe::bug`], which returns `false` everywhere but in a simulated host.
//!
//! # Implementers
//!
//! | trait | simulated by | real |
//! |---|---|---|
//! | [`Files`], [`File`] | `kernel-model` (page cache or direct, above a drive with a volatile cache) | `tap-linux` |
//! | [`Sockets`], [`Listener`], [`Stream`] | `kernel-model` | `tap-linux` |
//! | [`NbdDevices`], [`NbdClaim`] | `kernel-model` (the nbd driver and the block layer above it) | `tap-linux`, by netlink |
//! | [`Time`], [`Tasks`], [`Log`], [`Entropy`] | `kernel-model` (a process) | `tap-linux` |
//! | [`TapDevices`], [`TapRing`] | `kernel-model` | `tap-linux`, where the kernel has a blktap2 module |
//! | [`Grants`], [`Events`], [`SharedPages`], [`Xenstore`] | `xen-model` | `tap-linux`, in a domain of Xen |
//!
//! `tap-conformance` has the tests that both columns pass.

mod budget;
mod buf;
mod bug;
mod errno;
mod event;
mod files;
mod nbd_devices;
mod priority;
mod retry;
mod sockets;
mod tap;
mod types;
mod wake;
mod xen;

pub use budget::{Budget, BudgetFigures, Share, Stage};
pub use buf::{BufPool, IoBuf, IoVec, PAGE_BYTES, Room, bytes_of, copy_from_slice, copy_to_slice, cost_of};
pub use bug::{Bug, Mark, Probe, joined, length};
pub use errno::Errno;
pub use event::{Event, IoKind, Level, Whereabouts};
pub use files::{File, FileExtent, FileId, FileInfo, Files, LockKind, OpenMode, ZeroMode};
pub use nbd_devices::{NbdClaim, NbdConfig, NbdDevice, NbdDevices, NbdIndex};
pub use priority::{IoPriority, PriorityCell};
pub use retry::{Patience, Tried};
pub use sockets::{Listener, Piece, SendList, SocketAddress, Sockets, Stream};
pub use tap::{TAP_NAME_BYTES, TAP_PARAMS_BYTES, TapDevices, TapRing, TapSegment};
pub use types::{DomId, GrantRef, Port, SECTOR_BYTES, Sector, SectorRange, VbdId};
pub use wake::{Either, OneWaiter, poll_once, select, unless};
pub use xen::{
    EventChannel, Events, GrantSegment, Grants, SharedPage, SharedPages, StorePath, Transaction, WatchEvent,
    Watcher, Xenstore,
};

use std::future::Future;

/// Monotonic time and sleeping.
pub trait Time: Clone + 'static {
    /// Nanoseconds since an arbitrary start; never goes back.
    fn now_ns(&self) -> u64;
    /// Completes once at least `ns` nanoseconds have passed.
    fn sleep_ns(&self, ns: u64) -> impl Future<Output = ()> + 'static;
}

/// Tasks on the one thread of the process.
pub trait Tasks: Clone + 'static {
    /// Starts `task`. `role` names its kind in traces ("request"); `key` tells tasks of one role apart and should be a
    /// property of the work (a sector, a domain), not a running number, so that it stays the same when other work is
    /// removed.
    fn spawn(&self, role: &'static str, key: u64, task: impl Future<Output = ()> + 'static);
    /// Completes after every task that is ready now has had its turn.
    fn yield_now(&self) -> impl Future<Output = ()> + 'static;
}

/// Typed events: a simulator's trace and a host's journal print the same lines.
pub trait Log: Clone + 'static {
    /// Records `event`. Implementations on a real host limit the rate of those that a guest can cause at will.
    fn log(&self, event: Event);
}

/// Random bytes for identifiers; never for decisions.
pub trait Entropy: Clone + 'static {
    /// Fills `buf` with bytes that differ from run to run on a real host, and from seed to seed in a world.
    fn fill(&self, buf: &mut [u8]);
}

/// The process as others see it: its number, and their requests to end (SIGTERM, SIGINT, SIGHUP).
pub trait Signals: Clone + 'static {
    /// The number of the process on its machine.
    fn process_id(&self) -> u32;
    /// Completes when the process is asked to end (SIGTERM or SIGINT), at once if it was asked before the call.
    fn asked_to_stop(&self) -> impl Future<Output = ()> + 'static;
}
