//! Files and block devices that hold images.

use crate::{Errno, IoPriority, IoVec};
use std::future::Future;

/// How to open a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenMode {
    /// For writing as well as reading.
    pub write: bool,
    /// Create it; fail with `EEXIST` if it is there.
    pub create_new: bool,
    /// Bypass the page cache (O_DIRECT). Offsets, lengths and buffers must then be multiples of
    /// [`FileInfo::align_bytes`].
    pub direct: bool,
}

impl OpenMode {
    /// Read only, buffered.
    pub const READ: Self = Self { write: false, create_new: false, direct: false };
    /// Read and write, buffered.
    pub const WRITE: Self = Self { write: true, create_new: false, direct: false };
    /// A new file, buffered.
    pub const CREATE: Self = Self { write: true, create_new: true, direct: false };
}

/// Whole-file advisory locks: the first two as QEMU and we take them on images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockKind {
    /// Many readers (a backing file).
    Shared,
    /// One writer.
    Exclusive,
    /// As `Exclusive`, and also against programs that use flock(2), which sees no other kind and is seen by none: for
    /// files that such programs lock, too.
    Sole,
}

/// What becomes of the space of a range that is made to read as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZeroMode {
    /// It is given back: the range becomes a hole.
    Unmap,
    /// It stays allocated, so that writing there later needs none.
    Keep,
}

/// A run of a file that is all data or all hole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileExtent {
    /// Length in bytes, at least 1.
    pub len_bytes: u64,
    /// Bytes may be there; otherwise it is a hole and reads as zeros.
    pub data: bool,
}

/// Identifies a file whatever its name: the same for every open of it as long as it exists, and never that of
/// another file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FileId {
    /// The device that holds the file; for a block device itself.
    pub device: u64,
    /// The number of the file there; 0 for a block device.
    pub inode: u64,
    /// Distinguishes it from earlier files with the same numbers, as far as the host can; 0 where it cannot.
    pub generation: u64,
}

/// What holds for an open file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileInfo {
    /// Size in bytes at the time of the call.
    pub size_bytes: u64,
    /// Bytes of storage that it takes up; less than the size where it has holes.
    pub allocated_bytes: u64,
    /// Alignment in bytes that offset, length and memory must have: a power of two, 1 for buffered files.
    pub align_bytes: u32,
    /// Ranges for [`File::zero_at`] begin and end at multiples of this, in bytes: the sector of a block device, also
    /// of a buffered one; 1 for a file.
    pub zero_align_bytes: u32,
    /// Opened with [`OpenMode::direct`].
    pub direct: bool,
    /// A block device: its size is fixed, and unwritten space holds old bytes rather than zeros.
    pub block_device: bool,
    /// Which file it is.
    pub id: FileId,
}

/// Opens, removes and syncs files by path.
pub trait Files: Clone + 'static {
    /// An open file; clones share the descriptor.
    type File: File;
    /// Opens `path`.
    ///
    /// # Errors
    /// As open(2): `ENOENT`, `EEXIST`, `EACCES`, `EROFS`, `ENOTBLK` for what is neither a file nor a block device,
    /// `EINVAL` where O_DIRECT is refused.
    fn open(&self, path: &str, mode: OpenMode) -> impl Future<Output = Result<Self::File, Errno>>;
    /// Makes the directory entry of `path` durable (fsync of the directory that holds it).
    ///
    /// # Errors
    /// As fsync(2).
    fn sync_parent(&self, path: &str) -> impl Future<Output = Result<(), Errno>>;
    /// Removes the name; open descriptors keep the file.
    ///
    /// # Errors
    /// As unlink(2).
    fn remove(&self, path: &str) -> impl Future<Output = Result<(), Errno>>;
    /// Exchanges what two names stand for, in one step: no name is missing at any moment, or after a crash. Durable
    /// once [`Files::sync_parent`] was called for both. After another error than those below it may have happened.
    ///
    /// # Errors
    /// As renameat2(2) with `RENAME_EXCHANGE`: `ENOENT`, `EACCES`, `EXDEV` for two file systems, `EINVAL` and `ENOSYS`
    /// where names cannot be exchanged.
    fn exchange(&self, one: &str, other: &str) -> impl Future<Output = Result<(), Errno>>;
    /// The names of the files and sockets in `folder`, without their folder, sorted; names that are no UTF-8 are left
    /// out.
    ///
    /// # Errors
    /// As open(2) and readdir(3): `ENOENT`, `EACCES`, `ENOTDIR`.
    fn names_in(&self, folder: &str) -> impl Future<Output = Result<Vec<String>, Errno>>;
    /// Completes when the files whose last clones were dropped before are closed and their locks gone, however long the
    /// host takes over that; until then another process may find them in use.
    fn closed(&self) -> impl Future<Output = ()>;
    /// The same host, for files of a group of their own, such as those of one disk: those that are opened through this
    /// handle and its clones. They share one I/O priority; until one is set, it is that of the process. Operations of
    /// one group that hang leave room for those of others, as far as the host can.
    fn apart(&self) -> Self;
    /// Sets the I/O priority of the files of this handle's group, those that are open and those that will be: every
    /// operation that is started from now on has it. `None` is that of the process.
    ///
    /// # Errors
    /// `EPERM` for a priority that this process may not have, with nothing changed.
    fn set_priority(&self, priority: Option<IoPriority>) -> impl Future<Output = Result<(), Errno>>;
    /// The I/O priority of the files of this handle's group.
    fn priority(&self) -> Option<IoPriority>;
}

/// An open file. Closed when the last clone is dropped and its operations have ended; only then do its locks go.
pub trait File: Clone + 'static {
    /// Reads into `bufs` from `offset` (bytes). Returns the count of bytes read, which may be short for no reason; 0
    /// at or past the end of the file, but not only there: [`File::info`] says where the end is.
    ///
    /// # Errors
    /// As preadv(2). What the buffers hold after an error is unspecified.
    fn read_at(
        &self,
        offset: u64,
        bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static;
    /// Writes `bufs` at `offset` (bytes), growing the file; a gap reads as zeros. Returns the count of bytes
    /// written, which may be short for no reason.
    ///
    /// # Errors
    /// As pwritev(2). After an error any part of the range may hold the new bytes.
    fn write_at(
        &self,
        offset: u64,
        bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static;
    /// Makes every write that had completed before the call durable, with the size and extents needed to read it.
    ///
    /// # Errors
    /// As fdatasync(2). On buffered files an error may be reported once and then forgotten, although the data is lost:
    /// callers that care must remember it.
    fn sync_data(&self) -> impl Future<Output = Result<(), Errno>> + 'static;
    /// Sets the size in bytes; growth reads as zeros.
    ///
    /// # Errors
    /// As ftruncate(2).
    fn set_size(&self, size_bytes: u64) -> impl Future<Output = Result<(), Errno>> + 'static;
    /// Makes `len` bytes from `offset` on read as zeros, without writing them one by one and without changing the size;
    /// the part of the range past the end is ignored. Durable after [`File::sync_data`], like a write.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the file cannot do it this way, with nothing changed: write zeros instead. (On a block device
    /// with a page cache, this and any other error may lose what was written to the range since the last
    /// synchronisation, unless the range is refused for [`FileInfo::zero_align_bytes`].) Otherwise as fallocate(2); any
    /// part of the range may then read as zeros. With [`ZeroMode::Keep`] on a buffered file, whole blocks may also show
    /// older bytes again: what was written since the last synchronisation is gone (ext4, out of space).
    fn zero_at(
        &self,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> impl Future<Output = Result<(), Errno>> + 'static;
    /// Whether the host gave up buffered data that was written to the file system of this file. An error is reported
    /// once: after one caller was told in this way, a caller that opens a file later is not told. May take as long as
    /// writing everything back.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where it cannot tell (block devices; Linux before 5.8), otherwise as syncfs(2).
    fn file_system_lost(&self) -> impl Future<Output = Result<bool, Errno>> + 'static;
    /// The runs of data and holes from byte `offset` on, one after the other: at most `max` (at least 1), and fewer for
    /// no reason, but at least the first; none at or past the end of the file. Neighbours may be alike. A file that
    /// does not know its holes is one run of data. What changes meanwhile may or may not be seen.
    ///
    /// # Errors
    /// As lseek(2).
    fn extents_at(
        &self,
        offset: u64,
        max: usize,
    ) -> impl Future<Output = Result<Vec<FileExtent>, Errno>> + 'static;
    /// Size, alignment and kind.
    ///
    /// # Errors
    /// As fstat(2).
    fn info(&self) -> impl Future<Output = Result<FileInfo, Errno>> + 'static;
    /// Takes or changes this open file's lock without waiting for a holder; but it does wait for files that this
    /// process has dropped and that are not closed yet.
    ///
    /// # Errors
    /// `EAGAIN` while another open file holds a conflicting lock.
    fn lock(&self, kind: LockKind) -> impl Future<Output = Result<(), Errno>> + 'static;
}
