//! The blktap2 devices of a host: block devices whose requests a process serves.
//!
//! ```text
//!   allocate ─► name ─► open (maps the ring and the data) ─► create ─► requests ... ─► remove ─► close ─► free
//! ```
//!
//! The calls are those of the kernel's modules, with their structures as bytes: what they mean differs between modules,
//! and it is the stack that has to suit all of them.

use crate::{Errno, SharedPage};
use std::future::Future;

/// Bytes of the argument with which a device is made.
pub const TAP_PARAMS_BYTES: usize = 56;
/// Longest name of a device, in bytes.
pub const TAP_NAME_BYTES: usize = 255;

/// A part of one of the data pages of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TapSegment {
    /// The request's slot, below 32.
    pub slot: u8,
    /// The page within the slot, below 11.
    pub page: u8,
    /// First byte within the page.
    pub offset: u16,
    /// Length in bytes; `offset + len` is at most 4096.
    pub len: u16,
}

/// The blktap2 module of a host.
pub trait TapDevices: Clone + 'static {
    /// A ring that this process has open.
    type Ring: TapRing;

    /// Reserves a device and returns its minor number. Its nodes exist afterwards.
    ///
    /// # Errors
    /// `ENOENT` or `ENODEV` where there is no module, `EACCES`, `ENOMEM` if all minors are in use.
    fn allocate_tap(&self) -> impl Future<Output = Result<u32, Errno>>;

    /// Frees a reserved device.
    ///
    /// # Errors
    /// `EBUSY` while it is open or being closed, `ENODEV` or `EINVAL` if it is not reserved.
    fn free_tap(&self, minor: u32) -> impl Future<Output = Result<(), Errno>>;

    /// Names a reserved device. The name is the kernel's: it lasts until the device is freed, and says whose it is.
    ///
    /// # Errors
    /// `ENOENT` if it is not reserved, `ENAMETOOLONG`, `EACCES`, `ENOMEM`; `ENODEV` where names cannot be reached;
    /// `EPERM` from a module of which [`TapDevices::open_tap`] says `ENOTTY`.
    fn name_tap(&self, minor: u32, name: &str) -> impl Future<Output = Result<(), Errno>>;

    /// The reserved devices by minor number, with their names. One without a name has its number for a name; one whose
    /// name is not UTF-8 may be missing.
    ///
    /// # Errors
    /// `ENOENT` where there is no module, `EACCES`, `ENOMEM`.
    fn tap_names(&self) -> impl Future<Output = Result<Vec<(u32, String)>, Errno>>;

    /// Opens the ring of a reserved device and maps its pages, which a child process does not inherit.
    ///
    /// # Errors
    /// `EBUSY` while a process has it open, `ENXIO` or `ENODEV` if it is not reserved or being freed, `EACCES`,
    /// `ENOMEM`. `EOPNOTSUPP` from a module that takes the pages of an answered request out of the process's memory,
    /// which no process can survive for sure; `ENOTTY` from one that does not know the call of [`TapRing::create`].
    fn open_tap(&self, minor: u32) -> impl Future<Output = Result<Self::Ring, Errno>>;

    /// The path of the block device, for people and their programs.
    fn tap_path(&self, minor: u32) -> String;
}

/// The ring of a blktap2 device, open and mapped. When it is dropped, it is closed in the background; requests in
/// flight fail.
pub trait TapRing: 'static {
    /// The ring's page.
    type Page: SharedPage;

    /// The ring's page.
    fn page(&self) -> &Self::Page;

    /// Makes the block device. The module may write into `params`. Requests may come before this returns.
    ///
    /// # Errors
    /// `EEXIST` if there is a device, `EINVAL`, `ENOMEM`.
    fn create(&self, params: &mut [u8; TAP_PARAMS_BYTES]) -> impl Future<Output = Result<(), Errno>>;

    /// Removes the block device.
    ///
    /// # Errors
    /// `EBUSY` while somebody has it open, or opens or closes it at this moment.
    fn remove(&self) -> impl Future<Output = Result<(), Errno>>;

    /// Lets the kernel put requests on the ring, as poll(2) does: many modules put them there at no other time. They do
    /// not do so by themselves when responses have made room.
    fn pull(&self);

    /// Completes when the kernel has called since the last completion; calls are levels, not counts. A kernel with
    /// requests calls, unless it has called since the last [`TapRing::pull`] or the ring is full.
    ///
    /// # Errors
    /// `ESHUTDOWN` if the ring cannot be used any more.
    fn called(&self) -> impl Future<Output = Result<(), Errno>>;

    /// Makes the kernel look at the responses. The data pages of their requests are gone afterwards.
    fn respond(&self);

    /// Copies segments of requests in flight, one after the other, into `private` (whose length is their sum).
    fn copy_in(&self, segments: &[TapSegment], private: &mut [u8]);

    /// Copies `private` into segments of reads in flight, one after the other.
    fn copy_out(&self, segments: &[TapSegment], private: &[u8]);

    /// Unmaps and closes the ring, and completes when the kernel has done so. With some modules this takes until the
    /// last user of the block device has closed it.
    fn close(self) -> impl Future<Output = ()>;
}
