//! Completes short transfers, and aligns transfers on files that need it.
//!
//! ```text
//!   request ──► aligned? ──yes──► one operation ──short?──► the rest, until done
//!                  └─no──► a bounce buffer around it; a write reads the edges first,
//!                          with its blocks claimed, so that neighbours do not undo each other
//! ```
//!
//! An operation that fails with a transient error is retried in place, at most twice; then the request fails, and its
//! scheduler retries it as a whole. While an image is opened, created or closed there is no scheduler, so there are
//! more retries.
//!
//! A read past the end of the file returns zeros: after a crash a mapping may be there without the size.

mod around;
mod keep;
mod zero;

use crate::calls::{LONE_REPEATS, OPERATION_REPEATED, uninterrupted};
use crate::memory::{FileStages, PART_BYTES};
use crate::sync::GroupSync;
use crate::sync_record::SyncRecord;
use crate::{ImageError, ImageHost, OpenOptions};
use keep::KeptZeros;
use smallvec::smallvec;
use tap_core::{NodeInfo, NodeName, Tracker};
use tap_host::{
    Budget, Errno, File, FileExtent, FileId, FileInfo, Files, IoBuf, IoVec, LockKind, OpenMode, Patience,
    SECTOR_BYTES, Tried, bytes_of,
};

tap_host::listed! {
    pub(super) BUGS: Bug with [around::BUGS, keep::BUGS, zero::BUGS];
    UNSETTLED_FORGOTTEN = "unsettled-forgotten",
        "a flush succeeds on a file that was given up because failed zeros could not be settled";
    NOTHING_READ_ENDS = "nothing-read-ends",
        "a read that returns nothing is taken as the end of the file, wherever it is";
    SHORT_TRANSFER = "short-transfer", "a short transfer is taken as complete";
    NAME_UNSYNCED = "name-unsynced", "the name of a new image is not made durable";
    DIRECTORY_BELIEVED = "directory-believed", "a directory that could not be synchronised is not reported";
    SIZE_BELIEVED = "size-believed", "a size that could not be set is taken as set";
    BACKING_UNLOCKED = "backing-unlocked", "a file that is only read is not locked";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [keep::MARKS];
    SHORT_RESUMED = "short-resumed", "a short transfer was continued";
}

/// Retries of one operation after transient errors, within a request. The scheduler retries whole requests: if one
/// operation in ten fails, that alone would hardly ever complete a request of many operations.
const REPEATS: u32 = 2;

/// An open, locked file.
pub struct ImageFile<H: ImageHost> {
    /// The first field, so that its record is dropped before the file and its lock.
    sync: GroupSync<H>,
    host: H,
    file: H::File,
    /// Its path.
    pub(crate) name: NodeName,
    /// The size is that at open; the rest does not change.
    pub info: FileInfo,
    tracker: Tracker,
    kept: KeptZeros,
    memory: FileStages,
    /// Retries of one operation after transient errors.
    repeats: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// Page size of the host's cache, and the usual block size of a file system, in bytes.
const PAGE_BYTES: u32 = 4096;

impl<H: ImageHost> ImageFile<H> {
    /// The properties of a disk of `size_sectors` that is stored in this file.
    pub(crate) fn node_info(&self, size_sectors: u64) -> NodeInfo {
        let info = &self.info;
        let sector = SECTOR_BYTES as u32;
        let discard_bytes = if info.block_device { info.zero_align_bytes.max(sector) } else { PAGE_BYTES };
        NodeInfo {
            physical_block_bytes: if info.direct { info.align_bytes.max(sector) } else { PAGE_BYTES },
            discard_bytes,
            ..NodeInfo::new(size_sectors, false)
        }
    }

    /// Opens `path` and locks it: exclusively for writing, shared with other readers otherwise, unless `how` says
    /// without a lock. Its memory comes from the budget of `how`.
    pub async fn open(host: &H, path: &str, how: &OpenOptions) -> Result<Self, ImageError> {
        let mode = OpenMode { write: how.write, create_new: false, direct: how.direct };
        let file =
            uninterrupted(host, || host.open(path, mode)).await.map_err(ImageError::io("open", path))?;
        let lock = match how.write {
            true => Some(LockKind::Exclusive),
            false => (!how.unlocked).then_some(LockKind::Shared),
        };
        Self::locked(host, path, file, lock).await?.within(&how.memory, path)
    }

    /// Creates and locks `path`. With `existing` it locks and truncates the file there, unless it is one of those. A
    /// block device keeps its bytes.
    pub async fn create(host: &H, path: &str, existing: Option<&[FileId]>) -> Result<Self, ImageError> {
        let mode = if existing.is_some() { OpenMode::WRITE } else { OpenMode::CREATE };
        let file = uninterrupted(host, || host.open(path, mode)).await;
        let file = file.map_err(ImageError::io("create", path))?;
        if let Some(others) = existing {
            // Compared by identity: the path may lead to another file by now.
            let id = file.info().await.map_err(ImageError::io("query", path))?.id;
            if others.contains(&id) {
                let what = "it is also a source of the new image, and would be lost".to_owned();
                return Err(ImageError::Options { path: path.to_owned(), format: "new", what });
            }
        }
        let mut file = Self::locked(host, path, file, Some(LockKind::Exclusive)).await?;
        file.repeats = LONE_REPEATS;
        if existing.is_some() && !file.info.block_device {
            file.set_size(0).await.map_err(ImageError::io("truncate", path))?;
            file.info.size_bytes = 0;
        }
        Ok(file)
    }

    async fn locked(host: &H, path: &str, file: H::File, lock: Option<LockKind>) -> Result<Self, ImageError> {
        let write = lock == Some(LockKind::Exclusive);
        let locked = match lock {
            Some(kind) if write || !host.bug(&BACKING_UNLOCKED) => {
                uninterrupted(host, || file.lock(kind)).await
            }
            _ => Ok(()),
        };
        locked.map_err(|error| match error {
            Errno::EAGAIN => ImageError::InUse { path: path.to_owned() },
            error => ImageError::io("lock", path)(error),
        })?;
        let info = file.info().await.map_err(ImageError::io("query", path))?;
        if lock == Some(LockKind::Shared) {
            SyncRecord::drop_left(host, &info);
        }
        let memory = FileStages::new(&Budget::default(), path, info.align_bytes as usize)?;
        let sync = GroupSync::of(host, &file, &info, write).await;
        Ok(Self {
            host: host.clone(),
            file,
            name: NodeName::new(path),
            info,
            tracker: Tracker::new(),
            sync,
            kept: KeptZeros::default(),
            memory,
            repeats: REPEATS,
        })
    }

    /// Takes its memory from `budget` from now on, instead of the default one.
    fn within(mut self, budget: &Budget, path: &str) -> Result<Self, ImageError> {
        self.memory = FileStages::new(budget, path, self.info.align_bytes as usize)?;
        Ok(self)
    }

    /// The budget of its memory.
    pub(crate) fn budget(&self) -> &Budget {
        &self.memory.budget
    }

    /// The tracker that orders work on this file.
    pub(crate) fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// A buffer of unspecified content, of at most [`PART_BYTES`]. A caller must not hold one and wait for another.
    pub(crate) async fn buffer(&self, len: usize) -> Result<IoBuf, Errno> {
        self.memory.buffer(len).await
    }

    /// Fills `bufs` from byte `offset` on, with zeros past the end of the file.
    pub(crate) async fn read(&self, offset: u64, bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        if self.kept.gave_up() {
            return (Err(Errno::EIO), bufs);
        }
        if !self.is_aligned(offset, &bufs) {
            return Box::pin(self.read_around(offset, bufs)).await;
        }
        let want = bytes_of(&bufs);
        let (got, bufs) = self.operate_once(Direction::Read, offset, bufs).await;
        match got {
            Ok(n) if n == want => (Ok(()), bufs),
            // Nothing was moved: the whole transfer is left.
            Err(e) if is_transient(e) => Box::pin(self.repeat(Direction::Read, offset, e, bufs)).await,
            Ok(n) => Box::pin(self.resume(Direction::Read, offset, n, bufs)).await,
            Err(e) => (Err(e), bufs),
        }
    }

    /// As [`ImageFile::read`], retried after transient errors: for opening, where no scheduler does that yet. Each read
    /// counts its own retries, or a long chain of reads would hardly ever complete.
    pub(crate) async fn read_patiently(&self, offset: u64, mut bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        let mut patience = Patience::of(LONE_REPEATS);
        loop {
            let (result, back) = self.read(offset, bufs).await;
            if !result.is_err_and(is_transient) || !patience.again(&self.host).await {
                return (result, back);
            }
            bufs = back;
        }
    }

    /// Stores `bufs` from byte `offset` on.
    pub(crate) async fn write(&self, offset: u64, bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        if self.kept.gave_up() {
            return (Err(Errno::EIO), bufs);
        }
        if !self.is_aligned(offset, &bufs) {
            return Box::pin(self.write_around(offset, bufs)).await;
        }
        let want = bytes_of(&bufs);
        let (got, bufs) = self.file.write_at(offset, bufs).await;
        match got {
            Ok(n) if n == want => (Ok(()), bufs),
            // Nothing was moved: the whole transfer is left.
            Err(e) if is_transient(e) => Box::pin(self.repeat(Direction::Write, offset, e, bufs)).await,
            Ok(n) => Box::pin(self.resume(Direction::Write, offset, n, bufs)).await,
            Err(e) => (Err(e), bufs),
        }
    }

    /// Reads `dst.len()` bytes into ordinary memory.
    pub async fn read_bytes(&self, offset: u64, dst: &mut [u8]) -> Result<(), Errno> {
        let mut at = offset;
        for part in dst.chunks_mut(PART_BYTES) {
            let (result, bufs) = self.read_patiently(at, smallvec![self.buffer(part.len()).await?]).await;
            result?;
            part.copy_from_slice(&bufs[0]);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes bytes from ordinary memory.
    pub async fn write_bytes(&self, offset: u64, src: &[u8]) -> Result<(), Errno> {
        let mut at = offset;
        for part in src.chunks(PART_BYTES) {
            let mut buf = self.buffer(part.len()).await?;
            buf.copy_from_slice(part);
            self.write(at, smallvec![buf]).await.0?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// The run of data or hole from byte `offset` on, at most `len` bytes; a hole at and past the end of the file.
    pub(crate) async fn extent(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        Ok(match self.extents(offset, 1).await?.first() {
            Some(extent) => (extent.len_bytes.min(len), extent.data),
            None => (len, false),
        })
    }

    /// The first runs of data and holes from byte `offset` on, at most `max`; none at and past the end of the file.
    pub(crate) async fn extents(&self, offset: u64, max: usize) -> Result<Vec<FileExtent>, Errno> {
        uninterrupted(&self.host, || self.file.extents_at(offset, max)).await
    }

    /// Whether `result` of a write shows that its place cannot be written. A file that was given up refuses all writes.
    pub(crate) fn spoils(&self, result: Result<(), Errno>) -> bool {
        result == Err(Errno::EIO) && !self.kept.gave_up()
    }

    /// Makes durable what was written before; concurrent callers share one synchronisation.
    pub async fn sync(&self) -> Result<(), Errno> {
        self.sync_again(self.repeats).await
    }

    /// The same before the file is closed or served, where no scheduler retries it.
    pub(crate) async fn sync_to_close(&self) -> Result<(), Errno> {
        self.sync_again(LONE_REPEATS).await
    }

    async fn sync_again(&self, retries: u32) -> Result<(), Errno> {
        let mut patience = Patience::of(retries);
        loop {
            let failures = self.kept.failures();
            match self.sync.sync(&self.host, &self.file, self.info.direct).await {
                // No write was dropped: see `sync.rs`.
                Err(error) if Tried::FileCall.may_pass(error) && patience.again(&self.host).await => {
                    self.host.mark(&OPERATION_REPEATED);
                    continue;
                }
                result => result?,
            }
            if self.kept.gave_up() && !self.host.bug(&UNSETTLED_FORGOTTEN) {
                return Err(Errno::EIO);
            }
            if !self.kept.failed_since(&self.host, failures).await {
                return Ok(());
            }
        }
    }

    /// Lets other readers have the file, too; it is not written to from now on.
    pub(crate) async fn share(&self) -> Result<(), Errno> {
        uninterrupted(&self.host, || self.file.lock(LockKind::Shared)).await
    }

    /// The current size in bytes.
    pub(crate) async fn size(&self) -> Result<u64, Errno> {
        Ok(self.file.info().await?.size_bytes)
    }

    /// Sets the size in bytes.
    pub async fn set_size(&self, size_bytes: u64) -> Result<(), Errno> {
        match uninterrupted(&self.host, || self.file.set_size(size_bytes)).await {
            Err(_) if self.host.bug(&SIZE_BELIEVED) => Ok(()),
            result => result,
        }
    }

    fn is_aligned(&self, offset: u64, bufs: &[IoBuf]) -> bool {
        let align = self.info.align_bytes;
        align == 1
            || (offset.is_multiple_of(u64::from(align))
                && bufs.iter().all(|b| b.len().is_multiple_of(align as usize)))
    }

    /// Retries a transfer that failed with a transient error, from its first byte on.
    async fn repeat(
        &self,
        direction: Direction,
        offset: u64,
        error: Errno,
        bufs: IoVec,
    ) -> (Result<(), Errno>, IoVec) {
        let want = bytes_of(&bufs);
        match self.operate_again(direction, offset, error, bufs).await {
            (Ok(n), bufs) if n == want => (Ok(()), bufs),
            (Ok(n), bufs) => self.resume(direction, offset, n, bufs).await,
            (Err(e), bufs) => (Err(e), bufs),
        }
    }

    /// Completes a transfer of which `done` bytes were moved.
    async fn resume(
        &self,
        direction: Direction,
        offset: u64,
        mut done: usize,
        mut bufs: IoVec,
    ) -> (Result<(), Errno>, IoVec) {
        let total = bytes_of(&bufs);
        if self.host.bug(&SHORT_TRANSFER) && done > 0 {
            return (Ok(()), bufs);
        }
        loop {
            match self.settle(direction, offset, &mut done).await {
                Ok(true) => {}
                Ok(false) => {
                    zero_from(&mut bufs, done);
                    return (Ok(()), bufs);
                }
                Err(e) => return (Err(e), bufs),
            }
            if done == total {
                return (Ok(()), bufs);
            }
            match self.step(direction, offset, done, &mut bufs).await {
                Err(e) => return (Err(e), bufs),
                Ok(0) if direction == Direction::Read => {
                    zero_from(&mut bufs, done);
                    return (Ok(()), bufs);
                }
                // A zero-byte write would loop forever.
                Ok(0) => return (Err(Errno::EIO), bufs),
                Ok(n) => {
                    self.host.mark(&SHORT_RESUMED);
                    done += n;
                }
            }
        }
    }

    /// Rounds `done` down to where a direct file can continue; `false` if a read ended there at the end of the file.
    async fn settle(&self, direction: Direction, offset: u64, done: &mut usize) -> Result<bool, Errno> {
        let rest = *done % self.info.align_bytes as usize;
        if rest == 0 {
            return Ok(true);
        }
        if direction == Direction::Read && offset + *done as u64 >= self.file.info().await?.size_bytes {
            return Ok(false);
        }
        *done -= rest;
        match direction {
            _ if *done > 0 => Ok(true),
            // The file ended here and has grown since.
            Direction::Read => Err(Errno::EAGAIN),
            // Less than one block was moved: a retry would move no more.
            Direction::Write => Err(Errno::EIO),
        }
    }

    /// One operation from byte `done` of the transfer on; returns the bytes moved.
    async fn step(
        &self,
        direction: Direction,
        offset: u64,
        done: usize,
        bufs: &mut IoVec,
    ) -> Result<usize, Errno> {
        let (mut index, mut inner) = (0, done);
        while inner >= bufs[index].len() {
            inner -= bufs[index].len();
            index += 1;
        }
        let at = offset + done as u64;
        if inner == 0 {
            let rest: IoVec = bufs.drain(index..).collect();
            let (result, rest) = self.operate(direction, at, rest).await;
            bufs.extend(rest);
            return result;
        }
        // Buffers move whole, so the rest of this one goes through another.
        let stage = &self.memory.rest;
        let len = (bufs[index].len() - inner).min(stage.guarantee_bytes());
        let mut bounce = stage.buffer(len).await?;
        bounce.copy_from_slice(&bufs[index][inner..inner + len]);
        let (result, bounce) = self.operate(direction, at, smallvec![bounce]).await;
        let n = result?;
        if direction == Direction::Read {
            bufs[index][inner..inner + n].copy_from_slice(&bounce[0][..n]);
        }
        Ok(n)
    }

    async fn operate(&self, direction: Direction, at: u64, bufs: IoVec) -> (Result<usize, Errno>, IoVec) {
        match self.operate_once(direction, at, bufs).await {
            (Err(e), bufs) if is_transient(e) => self.operate_again(direction, at, e, bufs).await,
            answer => answer,
        }
    }

    async fn operate_once(
        &self,
        direction: Direction,
        at: u64,
        bufs: IoVec,
    ) -> (Result<usize, Errno>, IoVec) {
        if direction == Direction::Write {
            return self.file.write_at(at, bufs).await;
        }
        let (result, bufs) = self.file.read_at(at, bufs).await;
        if result != Ok(0) || bytes_of(&bufs) == 0 || self.host.bug(&NOTHING_READ_ENDS) {
            return (result, bufs);
        }
        // An empty read is the end of the file only if the file ends there: a read that would have to wait may also
        // return nothing.
        match self.file.info().await {
            Ok(info) if at < info.size_bytes => (Err(Errno::EAGAIN), bufs),
            info => (info.map(|_| 0), bufs),
        }
    }

    /// Retries an operation that failed with `error`.
    async fn operate_again(
        &self,
        direction: Direction,
        at: u64,
        error: Errno,
        mut bufs: IoVec,
    ) -> (Result<usize, Errno>, IoVec) {
        let (mut result, mut patience) = (Err(error), Patience::of(self.repeats));
        while result.is_err_and(is_transient) && patience.again(&self.host).await {
            self.host.mark(&OPERATION_REPEATED);
            (result, bufs) = self.operate_once(direction, at, bufs).await;
        }
        (result, bufs)
    }
}

/// Makes the name of a new image durable.
pub async fn sync_name<H: ImageHost>(host: &H, path: &str) -> Result<(), ImageError> {
    if host.bug(&NAME_UNSYNCED) {
        return Ok(());
    }
    match uninterrupted(host, || Files::sync_parent(host, path)).await {
        Err(_) if host.bug(&DIRECTORY_BELIEVED) => Ok(()),
        result => result.map_err(ImageError::io("synchronise the directory of", path)),
    }
}

/// Makes a file durable that others have written to.
///
/// # Errors
/// [`ImageError`].
pub async fn sync_file<H: ImageHost>(host: &H, path: &str) -> Result<(), ImageError> {
    let synced = async {
        let file = uninterrupted(host, || host.open(path, OpenMode::READ)).await?;
        uninterrupted(host, || file.sync_data()).await
    };
    synced.await.map_err(ImageError::io("synchronise", path))
}

/// The operation did nothing, and may succeed when retried.
pub(crate) fn is_transient(error: Errno) -> bool {
    Tried::Transfer.may_pass(error)
}

/// Zeroes everything from byte `at` on.
fn zero_from(bufs: &mut [IoBuf], mut at: usize) {
    for buf in bufs {
        let skip = at.min(buf.len());
        buf[skip..].fill(0);
        at -= skip;
    }
}
