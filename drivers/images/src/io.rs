//! Whole transfers on files that make short ones, and on files that want alignment.
//!
//! ```text
//!   request ──► aligned? ──yes──► one operation ──short?──► the rest, until done
//!                  └─no──► a bounce buffer around it; a write reads the edges first,
//!                          with its blocks claimed, so that neighbours do not undo each other
//! ```
//!
//! An operation that a transient error refuses is repeated in place, twice at most; then its request learns of it, and
//! its scheduler repeats the whole of it. While an image is made or closed there is no scheduler, and more patience.
//!
//! A read past the end of the file gives zeros: after a crash a mapping may be there before the size is.

mod keep;
mod zero;

use crate::calls::uninterrupted;
use crate::memory::{FileStages, PART_BYTES};
use crate::patience::Patience;
use crate::sync::GroupSync;
use crate::{ImageError, ImageHost};
use keep::KeptZeros;
use smallvec::smallvec;
use tap_core::{Access, NodeInfo, NodeName, Space, Tracker};
use tap_host::{
    Budget, Bug, Errno, File, FileId, FileInfo, Files, IoBuf, IoVec, LockKind, Mark, OpenMode, SECTOR_BYTES,
    bytes_of, copy_from_slice, copy_to_slice,
};

/// Repetitions of one operation after transient errors, within a request. The scheduler repeats whole requests: where
/// one operation in ten is refused, that alone would hardly ever get a request of many operations through.
const REPEATS: u32 = 2;
/// The same while an image is being made or closed, where there is no scheduler.
const LONE_REPEATS: u32 = 8;
/// Repetitions of a read while an image is being opened.
const READ_REPEATS: u32 = 8;

/// An open, locked file.
pub struct ImageFile<H: ImageHost> {
    /// First, so that its record is put away before the lock goes with the file.
    sync: GroupSync<H>,
    host: H,
    file: H::File,
    /// Its path.
    pub(crate) name: NodeName,
    /// Size as it was when the file was opened; the rest does not change.
    pub info: FileInfo,
    tracker: Tracker,
    kept: KeptZeros,
    memory: FileStages,
    /// Repetitions of one operation after transient errors.
    repeats: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// The page of the host's cache, and the usual block of a file system, in bytes.
const PAGE_BYTES: u32 = 4096;

impl<H: ImageHost> ImageFile<H> {
    /// What holds for a disk of `size_sectors` whose sectors lie in this file, and are written through it.
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

    /// Opens and locks `path`: alone for writing, together with other readers otherwise.
    pub async fn open(host: &H, path: &str, write: bool, direct: bool) -> Result<Self, ImageError> {
        let mode = OpenMode { write, create_new: false, direct };
        let file =
            uninterrupted(host, || host.open(path, mode)).await.map_err(ImageError::io("open", path))?;
        Self::locked(host, path, file, write).await
    }

    /// Creates and locks `path`; or locks and empties what is there, unless it is one of the files in `existing`. A
    /// block device keeps its bytes.
    pub async fn create(host: &H, path: &str, existing: Option<&[FileId]>) -> Result<Self, ImageError> {
        let mode = if existing.is_some() { OpenMode::WRITE } else { OpenMode::CREATE };
        let file = uninterrupted(host, || host.open(path, mode)).await;
        let file = file.map_err(ImageError::io("create", path))?;
        if let Some(others) = existing {
            // Not by its name: what that leads to may have changed since somebody looked.
            let id = file.info().await.map_err(ImageError::io("look at", path))?.id;
            if others.contains(&id) {
                let what = "it is the same file as one that it is made from, which would be lost".to_owned();
                return Err(ImageError::Options { path: path.to_owned(), format: "new", what });
            }
        }
        let mut file = Self::locked(host, path, file, true).await?;
        file.repeats = LONE_REPEATS;
        if existing.is_some() && !file.info.block_device {
            file.set_size(0).await.map_err(ImageError::io("empty", path))?;
            file.info.size_bytes = 0;
        }
        Ok(file)
    }

    async fn locked(host: &H, path: &str, file: H::File, write: bool) -> Result<Self, ImageError> {
        let kind = if write { LockKind::Exclusive } else { LockKind::Shared };
        let locked = match write || !host.bug(Bug::BackingUnlocked) {
            true => uninterrupted(host, || file.lock(kind)).await,
            false => Ok(()),
        };
        locked.map_err(|error| match error {
            Errno::EAGAIN => ImageError::InUse { path: path.to_owned() },
            error => ImageError::io("lock", path)(error),
        })?;
        let info = file.info().await.map_err(ImageError::io("look at", path))?;
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

    /// Takes its memory of `budget` from now on, instead of one of its own.
    pub fn within(mut self, budget: &Budget, path: &str) -> Result<Self, ImageError> {
        self.memory = FileStages::new(budget, path, self.info.align_bytes as usize)?;
        Ok(self)
    }

    /// What its memory is taken of.
    pub(crate) fn budget(&self) -> &Budget {
        &self.memory.budget
    }

    /// The tracker that orders work on this file.
    pub(crate) fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// A buffer of unspecified content, of at most [`PART_BYTES`]. Who has one asks for no other.
    pub(crate) async fn buffer(&self, len: usize) -> Result<IoBuf, Errno> {
        self.memory.buffer(len).await
    }

    /// Fills `bufs` from byte `offset` on; with zeros from the end of the file on.
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
            // At the first byte nothing was moved: the whole of it is the rest.
            Err(e) if is_transient(e) => Box::pin(self.repeat(Direction::Read, offset, e, bufs)).await,
            Ok(n) => Box::pin(self.resume(Direction::Read, offset, n, bufs)).await,
            Err(e) => (Err(e), bufs),
        }
    }

    /// As [`ImageFile::read`], repeated after transient errors: for opening, where no scheduler does that yet. Each
    /// read has its own patience, or a long chain of reads would hardly ever get through.
    pub(crate) async fn read_patiently(&self, offset: u64, mut bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        let mut patience = Patience::of(READ_REPEATS);
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
            // At the first byte nothing was moved: the whole of it is the rest.
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

    /// The run of data or hole from byte `offset` on, at most `len` bytes; a hole at and behind the end of the file.
    pub(crate) async fn extent(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        Ok(match uninterrupted(&self.host, || self.file.extent_at(offset)).await? {
            Some(extent) => (extent.len_bytes.min(len), extent.data),
            None => (len, false),
        })
    }

    /// Whether a write that ended with `result` found that its place cannot be written. A file that was given up
    /// refuses all.
    pub(crate) fn spoils(&self, result: Result<(), Errno>) -> bool {
        result == Err(Errno::EIO) && !self.kept.gave_up()
    }

    /// Makes durable what was written before; shared by all who wait for it.
    pub async fn sync(&self) -> Result<(), Errno> {
        self.sync_again(self.repeats).await
    }

    /// The same before the file is closed, or served: nobody repeats that.
    pub(crate) async fn sync_to_close(&self) -> Result<(), Errno> {
        self.sync_again(LONE_REPEATS).await
    }

    async fn sync_again(&self, most: u32) -> Result<(), Errno> {
        let mut patience = Patience::of(most);
        loop {
            let failures = self.kept.failures();
            match self.sync.sync(&self.host, &self.file, self.info.direct).await {
                // Nothing was given up: see `sync.rs`.
                Err(Errno::EINTR) if patience.again(&self.host).await => {
                    self.host.mark(Mark::OperationRepeated);
                    continue;
                }
                result => result?,
            }
            if self.kept.gave_up() && !self.host.bug(Bug::UnsettledForgotten) {
                return Err(Errno::EIO);
            }
            if !self.kept.failed_since(&self.host, failures).await {
                return Ok(());
            }
        }
    }

    /// The size in bytes as it is now.
    pub(crate) async fn size(&self) -> Result<u64, Errno> {
        Ok(self.file.info().await?.size_bytes)
    }

    /// Sets the size in bytes.
    pub async fn set_size(&self, size_bytes: u64) -> Result<(), Errno> {
        match uninterrupted(&self.host, || self.file.set_size(size_bytes)).await {
            Err(_) if self.host.bug(Bug::SizeBelieved) => Ok(()),
            result => result,
        }
    }

    fn is_aligned(&self, offset: u64, bufs: &[IoBuf]) -> bool {
        let align = self.info.align_bytes;
        align == 1
            || (offset.is_multiple_of(u64::from(align))
                && bufs.iter().all(|b| b.len().is_multiple_of(align as usize)))
    }

    /// A transfer that a transient error refused: once more from its first byte on.
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

    /// The rest of a transfer of which `done` bytes were made.
    async fn resume(
        &self,
        direction: Direction,
        offset: u64,
        mut done: usize,
        mut bufs: IoVec,
    ) -> (Result<(), Errno>, IoVec) {
        let total = bytes_of(&bufs);
        if self.host.bug(Bug::ShortTransfer) && done > 0 {
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
                    self.host.mark(Mark::ShortResumed);
                    done += n;
                }
            }
        }
    }

    /// Rounds `done` to where a direct file can go on; `false` if a read ended there because the file does.
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
            // Less than one block was moved: it would be no more the next time.
            Direction::Write => Err(Errno::EIO),
        }
    }

    /// One operation from byte `done` of the transfer on; gives how far it came.
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
        if result != Ok(0) || bytes_of(&bufs) == 0 || self.host.bug(Bug::NothingReadEnds) {
            return (result, bufs);
        }
        // Nothing is the end of the file only where it ends: what would have had to wait may give nothing too.
        match self.file.info().await {
            Ok(info) if at < info.size_bytes => (Err(Errno::EAGAIN), bufs),
            info => (info.map(|_| 0), bufs),
        }
    }

    /// Repeats an operation that `error` has refused.
    async fn operate_again(
        &self,
        direction: Direction,
        at: u64,
        error: Errno,
        mut bufs: IoVec,
    ) -> (Result<usize, Errno>, IoVec) {
        let (mut result, mut patience) = (Err(error), Patience::of(self.repeats));
        while result.is_err_and(is_transient) && patience.again(&self.host).await {
            self.host.mark(Mark::OperationRepeated);
            (result, bufs) = self.operate_once(direction, at, bufs).await;
        }
        (result, bufs)
    }

    /// Cuts a buffer that has room for it to the blocks around `len` bytes from `offset` on: with the first byte.
    fn around(&self, offset: u64, len: usize, buf: &mut IoBuf) -> u64 {
        let align = u64::from(self.info.align_bytes);
        let start = offset - offset % align;
        buf.truncate(((offset + len as u64).next_multiple_of(align) - start) as usize);
        start
    }

    /// A buffer for the blocks around up to `len` bytes from `offset` on, and how many bytes these are. What is left
    /// begins with a block.
    async fn bounce(&self, offset: u64, len: usize) -> Result<(IoBuf, usize), Errno> {
        let align = self.info.align_bytes as usize;
        let (buf, some) = self.memory.bounce(len, align).await?;
        let beyond = (offset + some as u64) as usize % align;
        Ok((buf, if some == len || beyond >= some { some } else { some - beyond }))
    }

    async fn read_around(&self, offset: u64, mut bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        let total = bytes_of(&bufs);
        let mut done = 0;
        while done < total {
            match self.read_piece_around(offset + done as u64, total - done).await {
                Ok((bounce, skip, len)) => {
                    copy_from_slice(&mut bufs, done, &bounce[skip..skip + len]);
                    done += len;
                }
                Err(e) => return (Err(e), bufs),
            }
        }
        (Ok(()), bufs)
    }

    /// Reads up to `len` bytes from `offset` on: the blocks around them, where in those they begin, and how many.
    async fn read_piece_around(&self, offset: u64, len: usize) -> Result<(IoBuf, usize, usize), Errno> {
        let (mut bounce, len) = self.bounce(offset, len).await?;
        let start = self.around(offset, len, &mut bounce);
        let (result, mut bounce) = Box::pin(self.read(start, smallvec![bounce])).await;
        result?;
        Ok((bounce.pop().ok_or(Errno::EIO)?, (offset - start) as usize, len))
    }

    async fn write_around(&self, offset: u64, bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        let result = self.rewrite_blocks(offset, &bufs).await;
        (result, bufs)
    }

    async fn rewrite_blocks(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Errno> {
        let align = u64::from(self.info.align_bytes);
        let total = bytes_of(bufs);
        let end = offset + total as u64;
        let ticket = self.tracker.ticket("rewrite of block", offset / align);
        let edges = !offset.is_multiple_of(align) || !end.is_multiple_of(align);
        if edges && !self.host.bug(Bug::BlockClaimsLeft) {
            let blocks = offset / align..end.div_ceil(align);
            let claimed = ticket.claim(Space::HostBlocks, blocks, Access::Exclusive);
            claimed.expect("nobody waits for a ticket that is new");
            ticket.ready().await;
        }
        let mut done = 0;
        while done < total {
            done += self.rewrite_piece(offset + done as u64, bufs, done).await?;
        }
        Ok(())
    }

    /// Writes the blocks around a part of `bufs`, from byte `done` of them on; gives how many of their bytes.
    async fn rewrite_piece(&self, at: u64, bufs: &[IoBuf], done: usize) -> Result<usize, Errno> {
        let (mut bounce, len) = self.bounce(at, bytes_of(bufs) - done).await?;
        let start = self.around(at, len, &mut bounce);
        let skip = (at - start) as usize;
        let mut bounce: IoVec = smallvec![bounce];
        if bounce[0].len() > len {
            let (result, read) = Box::pin(self.read(start, bounce)).await;
            result?;
            bounce = read;
        }
        copy_to_slice(bufs, done, &mut bounce[0][skip..skip + len]);
        Box::pin(self.write(start, bounce)).await.0?;
        Ok(len)
    }
}

/// Makes the name of a new image durable.
pub async fn sync_name<H: ImageHost>(host: &H, path: &str) -> Result<(), ImageError> {
    if host.bug(Bug::NameUnsynced) {
        return Ok(());
    }
    match uninterrupted(host, || Files::sync_parent(host, path)).await {
        Err(_) if host.bug(Bug::DirectoryBelieved) => Ok(()),
        result => result.map_err(ImageError::io("synchronise the directory of", path)),
    }
}

/// The operation did nothing, and may do it the next time.
pub(crate) fn is_transient(error: Errno) -> bool {
    matches!(error, Errno::EAGAIN | Errno::EINTR)
}

/// Zeroes everything from byte `at` on.
fn zero_from(bufs: &mut [IoBuf], mut at: usize) {
    for buf in bufs {
        let skip = at.min(buf.len());
        buf[skip..].fill(0);
        at -= skip;
    }
}
