//! Files and block devices.
//!
//! ```text
//!   LinuxFile ──► Op ──┬─ in place: a plain system call that cannot wait for a device
//!                      └─ engine: io_uring, or a pool of threads
//! ```
//!
//! On file systems that live in memory every call is made in place: that is cheapest, and no call waits for a device.
//! Elsewhere a read is tried in place with RWF_NOWAIT, which succeeds when the page cache has the bytes; everything
//! else, and any read that would wait, goes to the engine. An operation in place counts against tokio's budget, so that
//! a task that always finds its data lets others run.
//!
//! Closing may write back dirty pages (a block device), free a removed file, or talk to a server: it happens on another
//! thread, except for files in memory. Queries about a file (fstat, locks) are answered at once on local file systems,
//! and made on another thread for all others.
//!
//! # Priority
//!
//! A file may have an I/O priority of its own. The kernel takes that of a request from two places, and each engine sets
//! the right one:
//!
//! | operation | where the kernel looks | so |
//! |---|---|---|
//! | direct read, direct write | `ioprio` of the entry of io_uring; the thread for a plain call | either engine |
//! | buffered read, fdatasync, fallocate, ftruncate, close | the thread; io_uring ignores a buffered read's `ioprio`, and refuses one for all others | threads |
//! | buffered write | the thread, where it has to read a part of a page | threads; what it leaves in the page cache is written by an fdatasync, or later by the kernel, which knows no priority |
//!
//! So what goes through the page cache uses threads once its file has a priority. A thread sets its own before each
//! call whose file has another one, and a read is not tried in place: the kernel may read ahead.
//!
//! Measured with `examples/file_cost.rs` on Linux 6.18 with two virtual CPUs; microseconds of CPU for a random transfer
//! of 4 KiB, kernel workers and threads included:
//!
//! | file | how | read, depth 1 / 32 | write, depth 1 / 32 |
//! |---|---|---|---|
//! | tmpfs | **in place** | 1.4 / 1.3 | 1.4 / 1.5 |
//! | tmpfs | io_uring (has no NOWAIT, so a kernel worker does it) | 41 / 2.9 | 42 / 2.8 |
//! | tmpfs | threads | 24 / 5.7 | 23 / 6.5 |
//! | ext4, cached | **in place with RWF_NOWAIT** | 1.2 / 1.2 | not supported |
//! | ext4, cached | **io_uring** (writes: a kernel worker) | 2.4 / 1.2 | 23-58 / 15 |
//! | ext4, cached | plain calls in place, which may wait for the journal | 1.0 / 1.0 | 8.6 / 10 |
//! | ext4, cached | threads | | 59 / 36 |
//! | ext4, O_DIRECT | **io_uring** | 30 / 3.1 | 32 / 3.5 |
//! | ext4, O_DIRECT | threads | 55 / 14 | 58 / 14 |
//!
//! At depth 1 most of a figure is the cost of going to sleep and waking up.

mod call;
mod closing;
mod engine;
mod extents;
mod lock;
mod open;
mod ring;
mod threads;
mod turns;

pub(crate) use call::{errno, last_error};
pub(crate) use closing::Closing;
pub(crate) use engine::{Engine, driver};

use crate::LinuxHost;
use crate::priority::{AtPriority, try_out};
use call::{Call, Wait};
use engine::Op;
use std::cell::Cell;
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use tap_host::{
    Errno, File, FileExtent, FileId, FileInfo, Files, IoPriority, IoVec, LockKind, OpenMode, PriorityCell,
    ZeroMode,
};
use turns::GroupId;

/// How file operations that may wait are executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AioEngine {
    /// io_uring, or threads where the kernel refuses it.
    #[default]
    Auto,
    /// io_uring.
    IoUring,
    /// A pool of threads that make plain system calls.
    Threads,
}

/// The largest block of a file system, in bytes.
const BLOCK_BYTES_MAX: u64 = 64 << 10;

/// What all clones of an open file share.
pub(crate) struct OpenFile {
    /// Shared with calls on other threads, so that the descriptor, and with it the lock, outlives them. `None` only
    /// while this is dropped.
    fd: Option<Arc<OwnedFd>>,
    closing: Rc<Closing>,
    write: bool,
    direct: bool,
    block_device: bool,
    id: FileId,
    /// Alignment in bytes of offset, length and memory.
    align_bytes: u32,
    /// Alignment in bytes of ranges to be made zeros: the sector of a device.
    zero_align_bytes: u32,
    /// Lives in memory: no call waits.
    in_memory: bool,
    /// Queries about it go to another machine, as on NFS.
    remote: bool,
    /// Whether to try RWF_NOWAIT.
    nowait: Cell<bool>,
    lock: Cell<Option<LockKind>>,
    group: Group,
}

/// Which files belong together: those of one disk.
#[derive(Clone, Default)]
pub(crate) struct Group {
    id: GroupId,
    priority: PriorityCell,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        let fd = self.fd.take();
        if let Some(fd) = fd.filter(|_| !self.in_memory) {
            self.closing.close(fd, self.group.priority.get());
        }
    }
}

impl OpenFile {
    fn fd(&self) -> &Arc<OwnedFd> {
        self.fd.as_ref().expect("an open file has its descriptor until it is dropped")
    }

    /// Whether `call` should be tried by the caller itself.
    fn in_place(&self, call: Call) -> Option<Wait> {
        match call {
            _ if self.in_memory => Some(Wait::Allowed),
            // Even a read that does not wait may have the kernel read ahead, with the priority of this thread.
            Call::Read(_) if self.nowait.get() && self.group.priority.get().is_none() => Some(Wait::Never),
            _ => None,
        }
    }

    /// Notes that the file system does not support RWF_NOWAIT.
    fn never_nowait(&self) {
        self.nowait.set(false);
    }

    /// Refuses what the seam refuses; Linux would decide from case to case.
    fn check(&self, offset: u64, bufs: &IoVec, write: bool) -> Result<(), Errno> {
        if write && !self.write {
            return Err(Errno::EBADF);
        }
        let unaligned = |n: u64| !n.is_multiple_of(u64::from(self.align_bytes));
        let mut end = offset;
        let mut aligned = !unaligned(offset);
        for buf in bufs {
            aligned &= !unaligned(buf.len() as u64);
            end = end.checked_add(buf.len() as u64).ok_or(Errno::EFBIG)?;
        }
        if !aligned {
            return Err(Errno::EINVAL);
        }
        // The limit of loff_t.
        if end > i64::MAX as u64 { Err(Errno::EFBIG) } else { Ok(()) }
    }

    /// Runs `call` here if it does not wait, otherwise on another thread.
    async fn ask<R: Send + 'static>(
        &self,
        call: impl FnOnce(&OwnedFd) -> Result<R, Errno> + Send + 'static,
    ) -> Result<R, Errno> {
        if !self.remote {
            return call(self.fd());
        }
        let fd = Arc::clone(self.fd());
        self.blocking(move || call(&fd)).await
    }

    /// Makes a call that may wait on another thread, with the priority of this file.
    async fn blocking<R: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<R, Errno> + Send + 'static,
    ) -> Result<R, Errno> {
        blocking_at(self.group.priority.get(), call).await
    }

    async fn size_bytes(&self) -> Result<u64, Errno> {
        let block_device = self.block_device;
        self.ask(move |fd| open::size_bytes(fd, block_device)).await
    }

    /// The length of a range to be made zeros, cut at the end of the file.
    async fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<u64, Errno> {
        if !self.write {
            return Err(Errno::EBADF);
        }
        let end = offset.checked_add(len).filter(|end| len > 0 && *end <= i64::MAX as u64);
        let size = self.size_bytes().await?;
        let there = match mode {
            // The end of the hole is rounded up to a block; otherwise the last block would stay allocated.
            ZeroMode::Unmap if !self.block_device => size.next_multiple_of(BLOCK_BYTES_MAX),
            ZeroMode::Unmap | ZeroMode::Keep => size,
        };
        let end = end.ok_or(Errno::EINVAL)?.min(if offset < size { there } else { size });
        let len = end.saturating_sub(offset);
        if self.block_device {
            let sector = u64::from(self.zero_align_bytes);
            if !offset.is_multiple_of(sector) || !len.is_multiple_of(sector) {
                return Err(Errno::EOPNOTSUPP);
            }
        }
        Ok(len)
    }
}

/// An open file of the host; clones share it.
#[derive(Clone)]
pub struct LinuxFile {
    host: LinuxHost,
    open: Rc<OpenFile>,
}

impl LinuxFile {
    /// What executes `call` with the priority of this file.
    fn engine(&self, call: Call) -> &Rc<Engine> {
        // io_uring has a priority for transfers only, which the page cache ignores.
        let carried = self.open.direct && matches!(call, Call::Read(_) | Call::Write(_));
        let threads = self.host.threads().filter(|_| self.open.group.priority.get().is_some() && !carried);
        threads.unwrap_or(self.host.engine())
    }

    fn op(&self, call: Call, bufs: IoVec) -> Op {
        Op::new(self.engine(call), &self.open, call, bufs)
    }

    fn io(&self, call: Call, offset: u64, bufs: IoVec) -> Op {
        match self.open.check(offset, &bufs, matches!(call, Call::Write(_))) {
            Ok(()) => self.op(call, bufs),
            Err(error) => Op::refused(self.host.engine(), &self.open, error, bufs),
        }
    }

    async fn done(self, call: Call) -> Result<(), Errno> {
        self.op(call, IoVec::new()).await.0.map(|_| ())
    }
}

impl File for LinuxFile {
    fn read_at(
        &self,
        offset: u64,
        bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static {
        self.io(Call::Read(offset), offset, bufs)
    }

    fn write_at(
        &self,
        offset: u64,
        bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static {
        self.io(Call::Write(offset), offset, bufs)
    }

    fn sync_data(&self) -> impl Future<Output = Result<(), Errno>> + 'static {
        self.clone().done(Call::SyncData)
    }

    fn set_size(&self, size_bytes: u64) -> impl Future<Output = Result<(), Errno>> + 'static {
        let file = self.clone();
        async move {
            if !file.open.write {
                return Err(Errno::EBADF);
            }
            if size_bytes > i64::MAX as u64 {
                return Err(Errno::EFBIG);
            }
            let call = Call::SetSize(size_bytes);
            if file.engine(call).does(call) {
                return file.done(call).await;
            }
            let fd = Arc::clone(file.open.fd());
            // SAFETY: the call uses no memory.
            let set = move || unsafe { call.execute(fd.as_raw_fd(), &[], Wait::Allowed) };
            file.open.blocking(set).await.map(|_| ())
        }
    }

    fn zero_at(
        &self,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> impl Future<Output = Result<(), Errno>> + 'static {
        let file = self.clone();
        async move {
            let len = file.open.zero_range(offset, len, mode).await?;
            if len == 0 {
                return Ok(());
            }
            match file.done(Call::Zero { offset, len, mode }).await {
                Err(Errno(libc::ENOSYS | libc::ENOTTY)) => Err(Errno::EOPNOTSUPP),
                result => result,
            }
        }
    }

    fn file_system_lost(&self) -> impl Future<Output = Result<bool, Errno>> + 'static {
        let open = Rc::clone(&self.open);
        async move {
            if open.in_memory {
                return Ok(false);
            }
            if open.block_device || !open::syncfs_tells() {
                return Err(Errno::EOPNOTSUPP);
            }
            let fd = Arc::clone(open.fd());
            let told = open.blocking(move || rustix::fs::syncfs(&*fd).map_err(of_rustix)).await;
            Ok(told.is_err())
        }
    }

    fn extents_at(
        &self,
        offset: u64,
        max: usize,
    ) -> impl Future<Output = Result<Vec<FileExtent>, Errno>> + 'static {
        let open = Rc::clone(&self.open);
        async move {
            let (fd, block_device) = (Arc::clone(open.fd()), open.block_device);
            let look = move || extents::look(&fd, block_device, offset, max);
            // Extent maps may have to be read from the device.
            if open.in_memory { look() } else { open.blocking(look).await }
        }
    }

    fn info(&self) -> impl Future<Output = Result<FileInfo, Errno>> + 'static {
        let open = Rc::clone(&self.open);
        async move {
            let OpenFile { id, align_bytes, zero_align_bytes, direct, block_device, .. } = *open;
            let look = move |fd: &OwnedFd| {
                let stat = rustix::fs::fstat(fd).map_err(of_rustix)?;
                let size_bytes = open::size_bytes(fd, block_device)?;
                // st_blocks counts units of 512; a device always has all of its space.
                let allocated_bytes = if block_device { size_bytes } else { stat.st_blocks as u64 * 512 };
                Ok(FileInfo {
                    size_bytes,
                    allocated_bytes,
                    align_bytes,
                    zero_align_bytes,
                    direct,
                    block_device,
                    id,
                })
            };
            open.ask(look).await
        }
    }

    fn lock(&self, kind: LockKind) -> impl Future<Output = Result<(), Errno>> + 'static {
        let file = self.clone();
        async move {
            loop {
                let before = file.open.closing.seen();
                let result = file.try_lock(kind).await;
                // A file that this program has dropped may hold the lock until the kernel has closed it.
                if result != Err(Errno::EAGAIN) || !file.open.closing.ended_since(before).await {
                    return result;
                }
            }
        }
    }
}

impl LinuxFile {
    async fn try_lock(&self, kind: LockKind) -> Result<(), Errno> {
        let before = self.open.lock.get();
        match self.open.ask(move |fd| lock::take(fd.as_fd(), before, kind)).await {
            Ok(()) => self.open.lock.set(Some(kind)),
            Err(error @ Errno(libc::ENOLCK | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
                self.host.warn_no_locks(error);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl Files for LinuxHost {
    type File = LinuxFile;

    async fn open(&self, path: &str, mode: OpenMode) -> Result<LinuxFile, Errno> {
        let path = path.to_owned();
        let open = self.blocking(move || open::open(&path, mode)).await?;
        let open = Rc::new(open.into_file(self.closing(), self.1.clone()));
        Ok(LinuxFile { host: self.clone(), open })
    }

    async fn sync_parent(&self, path: &str) -> Result<(), Errno> {
        let path = path.to_owned();
        self.blocking(move || open::sync_parent(&path)).await
    }

    async fn remove(&self, path: &str) -> Result<(), Errno> {
        let path = path.to_owned();
        self.blocking(move || rustix::fs::unlink(path).map_err(of_rustix)).await
    }

    async fn exchange(&self, one: &str, other: &str) -> Result<(), Errno> {
        let (one, other) = (one.to_owned(), other.to_owned());
        self.blocking(move || {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(of_rustix)
        })
        .await
    }

    async fn names_in(&self, folder: &str) -> Result<Vec<String>, Errno> {
        let folder = folder.to_owned();
        self.blocking(move || open::names_in(&folder)).await
    }

    async fn closed(&self) {
        self.closing().ended().await;
    }

    fn apart(&self) -> Self {
        Self(Rc::clone(&self.0), Group { id: self.next_group(), priority: PriorityCell::default() })
    }

    async fn set_priority(&self, priority: Option<IoPriority>) -> Result<(), Errno> {
        if let Some(priority) = priority {
            blocking(move || try_out(priority)).await?;
            self.need_threads()?;
        }
        self.1.priority.set(priority);
        Ok(())
    }

    fn priority(&self) -> Option<IoPriority> {
        self.1.priority.get()
    }
}

impl LinuxHost {
    /// Makes a call that may wait on another thread, with the priority of this handle's files.
    async fn blocking<R: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<R, Errno> + Send + 'static,
    ) -> Result<R, Errno> {
        blocking_at(self.1.priority.get(), call).await
    }
}

/// As [`blocking`], with a priority.
async fn blocking_at<R: Send + 'static>(
    priority: Option<IoPriority>,
    call: impl FnOnce() -> Result<R, Errno> + Send + 'static,
) -> Result<R, Errno> {
    blocking(move || {
        let _at = AtPriority::new(priority);
        call()
    })
    .await
}

/// Makes a call that may wait on another thread. The call runs to its end even if the future is dropped.
pub(crate) async fn blocking<R: Send + 'static>(
    call: impl FnOnce() -> Result<R, Errno> + Send + 'static,
) -> Result<R, Errno> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is ending, and every task that could use the result with it.
            Err(_) => Err(Errno::ESHUTDOWN),
        },
    }
}

pub(crate) fn of_rustix(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}
