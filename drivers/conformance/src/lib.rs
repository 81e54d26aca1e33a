//! What every host promises, as tests: one body, run on the models and on Linux.
//!
//! ```text
//!              Test { name, body(Place) }
//!               /                  \
//!     kernel-model/tests       drivers/linux/tests
//!     xen-model/tests          (io_uring, threads × buffered, direct × file systems, devices; Xen's dom0)
//!     (virtual time)
//! ```
//!
//! A body sees only the seam, and requires what its documentation promises, no more: where hosts may differ, a body
//! accepts every answer that the contract allows. It gets a [`Place`] of its own, or a [`Pair`] if another domain takes
//! part. Results come as sentences; nothing depends on how long anything takes.
//!
//! The list of bodies, and those that a host does not pass with the reasons, is in docs/testing/conformance.md.

pub mod events;
pub mod files;
pub mod grants;
pub mod life;
pub mod locks;
pub mod pages;
mod pair;
pub mod priorities;
pub mod sockets;
pub mod store;
pub mod tap;
pub mod tasks;
pub mod transactions;
pub mod watches;
pub mod zeros;

pub use pair::{Pair, Peer};

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use tap_host::{
    Errno, File, Files, IoBuf, IoVec, OpenMode, SocketAddress, Tasks, Time, bytes_of, copy_from_slice,
    copy_to_slice, unless,
};

/// Unit of the bodies in bytes: a multiple of every existing sector size.
pub const BLOCK: usize = 4096;

/// How a body ends: a sentence says what is wrong.
pub type Outcome = Result<(), String>;

/// A running body.
pub type Running = Pin<Box<dyn Future<Output = Outcome>>>;

/// One test, which works in a `P`.
pub struct Test<P> {
    /// Its name, which is that of its function.
    pub name: &'static str,
    /// Starts it.
    pub body: fn(P) -> Running,
}

/// Where a body works.
#[derive(Clone)]
pub struct Place<H> {
    /// The host under test.
    pub host: H,
    /// An empty folder, without a slash at its end; for bodies about xenstore a directory of xenstore, outside of
    /// /local. No other body uses it, and pages are named after it.
    pub folder: String,
    /// Whether files are opened with [`OpenMode::direct`].
    pub direct: bool,
    /// A block device of at least [`DEVICE_BYTES`] to use instead of new files; its content is lost.
    pub device: Option<String>,
    /// Whether sockets are TCP on 127.0.0.1 instead of unix.
    pub tcp: bool,
}

/// Least size in bytes of a block device for the bodies that run on one.
pub const DEVICE_BYTES: u64 = 5 << 20;

/// What bodies about files need from a host.
pub trait FileHost: Files + Time + Tasks {}
impl<T: Files + Time + Tasks> FileHost for T {}

impl<H> Place<H> {
    /// A path in the folder.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    /// An address to listen at.
    pub fn address(&self, name: &str) -> SocketAddress {
        if self.tcp {
            SocketAddress::Tcp { host: "127.0.0.1".into(), port: 0 }
        } else {
            SocketAddress::Unix(self.path(name))
        }
    }

    fn mode(&self, mode: OpenMode) -> OpenMode {
        OpenMode { direct: self.direct, ..mode }
    }
}

impl<H: FileHost> Place<H> {
    /// A new, empty file.
    async fn create(&self, name: &str) -> Result<H::File, String> {
        self.host.open(&self.path(name), self.mode(OpenMode::CREATE)).await.or_fail("create a file")
    }

    /// A file that exists, for reading and writing.
    async fn open(&self, name: &str) -> Result<H::File, String> {
        self.host.open(&self.path(name), self.mode(OpenMode::WRITE)).await.or_fail("open a file")
    }

    /// `blocks` blocks of zeros, in a new file of that size or at the start of the device.
    async fn disk(&self, blocks: usize) -> Result<H::File, String> {
        let Some(device) = &self.device else {
            let file = self.create("disk").await?;
            file.set_size((blocks * BLOCK) as u64).await.or_fail("set the size")?;
            return Ok(file);
        };
        let file = self.host.open(device, self.mode(OpenMode::WRITE)).await.or_fail("open the device")?;
        write(&file, 0, &vec![0; blocks * BLOCK]).await?;
        Ok(file)
    }

    /// The disk of [`Place::disk`], opened again.
    async fn disk_again(&self) -> Result<H::File, String> {
        let path = self.device.clone().unwrap_or_else(|| self.path("disk"));
        self.host.open(&path, self.mode(OpenMode::WRITE)).await.or_fail("open the disk again")
    }

    /// Lets other tasks run until `there` returns true.
    async fn until(&self, what: &str, there: impl FnMut() -> bool) -> Outcome {
        until(&self.host, what, there).await
    }
}

/// Milliseconds after which something counts as never happening; nothing takes nearly as long.
const PATIENCE_MS: u32 = 60_000;

/// Lets other tasks run until `there` returns true.
async fn until(time: &impl Time, what: &str, mut there: impl FnMut() -> bool) -> Outcome {
    for _ in 0..PATIENCE_MS {
        if there() {
            return Ok(());
        }
        time.sleep_ns(1_000_000).await;
    }
    Err(format!("{what} never happens"))
}

/// The output of `future` within `ns` nanoseconds; it is dropped if that is not enough.
async fn within_ns<T>(time: &impl Time, ns: u64, future: impl Future<Output = T>) -> Option<T> {
    unless(time.sleep_ns(ns), future).await
}

/// The output of `future`, or an error if it never completes.
async fn soon<T>(time: &impl Time, what: &str, future: impl Future<Output = T>) -> Result<T, String> {
    let given = within_ns(time, u64::from(PATIENCE_MS) * 1_000_000, future).await;
    given.ok_or_else(|| format!("{what} never comes"))
}

/// Nanoseconds within which anything in transit arrives. If it takes longer, a body may pass that should fail, never
/// the reverse.
const QUIET_NS: u64 = 20_000_000;

/// More events than any body causes.
const EVENTS_MAX: u32 = 1000;

/// Turns errors into sentences.
trait OrFail<T> {
    fn or_fail(self, what: &str) -> Result<T, String>;
}
impl<T> OrFail<T> for Result<T, Errno> {
    fn or_fail(self, what: &str) -> Result<T, String> {
        self.map_err(|e| format!("failed to {what}: {e}"))
    }
}

/// Fails unless both are equal.
fn same<T: PartialEq + Debug>(what: &str, got: T, want: T) -> Outcome {
    if got == want { Ok(()) } else { Err(format!("{what}: {got:?} instead of {want:?}")) }
}

/// Fails unless it holds.
fn holds(what: &str, condition: bool) -> Outcome {
    if condition { Ok(()) } else { Err(format!("does not hold: {what}")) }
}

/// Fails unless the bytes are equal; says where they differ first.
fn same_bytes(what: &str, got: &[u8], want: &[u8]) -> Outcome {
    same(&format!("length of {what}"), got.len(), want.len())?;
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("{what}: byte {at} is {} instead of {}", got[at], want[at])),
    }
}

/// `len` bytes that encode their position and `tag`.
fn pattern(tag: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| tag.wrapping_mul(31) ^ (i as u8) ^ ((i >> 8) as u8).wrapping_mul(7)).collect()
}

/// Buffers of these lengths in bytes.
fn buffers(lens: &[usize]) -> Result<IoVec, String> {
    lens.iter().map(|len| IoBuf::unpooled(*len).or_fail("make a buffer")).collect()
}

/// Buffers of at most 1 MiB that hold `bytes`.
fn buffers_of(bytes: &[u8]) -> Result<IoVec, String> {
    let lens: Vec<usize> = bytes.chunks(1 << 20).map(<[u8]>::len).collect();
    let mut bufs = buffers(&lens)?;
    copy_from_slice(&mut bufs, 0, bytes);
    Ok(bufs)
}

/// The bytes that buffers hold.
fn content(bufs: &IoVec) -> Vec<u8> {
    let mut bytes = vec![0; bytes_of(bufs)];
    copy_to_slice(bufs, 0, &mut bytes);
    bytes
}

/// Writes everything, continuing after short transfers.
async fn write<F: File>(file: &F, offset: u64, bytes: &[u8]) -> Outcome {
    let mut done = 0;
    while done < bytes.len() {
        let (count, _) = file.write_at(offset + done as u64, buffers_of(&bytes[done..])?).await;
        let count = count.or_fail("write")?;
        holds("a write that succeeds makes progress", count > 0 && count <= bytes.len() - done)?;
        done += count;
    }
    Ok(())
}

/// Reads up to `len` bytes, continuing after short transfers, until the end of the file.
async fn read<F: File>(file: &F, offset: u64, len: usize) -> Result<Vec<u8>, String> {
    let align = file.info().await.or_fail("look")?.align_bytes as usize;
    let mut bytes = Vec::new();
    // Only the end of a file ends a direct read within a sector, and no read can begin past it.
    while bytes.len() < len && bytes.len().is_multiple_of(align) {
        let bufs = buffers_of(&vec![0xee; len - bytes.len()])?;
        let (count, bufs) = file.read_at(offset + bytes.len() as u64, bufs).await;
        let count = count.or_fail("read")?;
        holds("a read returns no more than was asked for", count <= len - bytes.len())?;
        if count == 0 {
            break;
        }
        bytes.extend_from_slice(&content(&bufs)[..count]);
    }
    Ok(bytes)
}

/// A list of tests out of a list of functions.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        vec![$($crate::Test { name: stringify!($name), body: |place| Box::pin($name(place)) }),*]
    };
}
use tests;
