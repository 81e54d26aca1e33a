//! Files in memory.

use super::{Change, Effect, Store, World, apply};
use std::future::Future;
use std::rc::Rc;
use tap_host::{
    Errno, File, FileExtent, FileId, FileInfo, Files, IoPriority, IoVec, LockKind, OpenMode, ZeroMode,
    bytes_of, copy_from_slice, copy_to_slice,
};

impl Files for World {
    type File = MemFile;
    async fn open(&self, path: &str, mode: OpenMode) -> Result<MemFile, Errno> {
        if mode.create_new {
            if self.has(path) {
                return Err(Errno::EEXIST);
            }
            self.put(path, Vec::new());
        }
        let store = self.0.files.borrow().get(path).cloned().ok_or(Errno::ENOENT)?;
        let id = self.0.next.get();
        self.0.next.set(id + 1);
        Ok(MemFile(Rc::new(Handle { world: self.clone(), store, id, mode })))
    }
    async fn sync_parent(&self, _: &str) -> Result<(), Errno> {
        self.operation().await.map_or(Ok(()), |f| Err(f.error))
    }
    async fn remove(&self, path: &str) -> Result<(), Errno> {
        self.0.files.borrow_mut().remove(path).map(drop).ok_or(Errno::ENOENT)
    }
    async fn exchange(&self, one: &str, other: &str) -> Result<(), Errno> {
        let mut files = self.0.files.borrow_mut();
        let [a, b] = [one, other].map(|name| files.get(name).cloned());
        let (Some(a), Some(b)) = (a, b) else { return Err(Errno::ENOENT) };
        files.insert(one.to_owned(), b);
        files.insert(other.to_owned(), a);
        Ok(())
    }
    async fn names_in(&self, _: &str) -> Result<Vec<String>, Errno> {
        Ok(self.0.files.borrow().keys().cloned().collect())
    }
    async fn closed(&self) {}
    fn apart(&self) -> Self {
        self.clone()
    }
    async fn set_priority(&self, _: Option<IoPriority>) -> Result<(), Errno> {
        Err(Errno::EPERM)
    }
    fn priority(&self) -> Option<IoPriority> {
        None
    }
}

#[derive(Clone)]
pub(crate) struct MemFile(Rc<Handle>);

struct Handle {
    world: World,
    store: Rc<Store>,
    id: usize,
    mode: OpenMode,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.store.locks.borrow_mut().retain(|l| l.0 != self.id);
    }
}

impl Handle {
    fn align(&self) -> u32 {
        if self.mode.direct { self.world.0.align.get() } else { 1 }
    }
    fn assert_aligned(&self, offset: u64, bufs: &IoVec) {
        let align = self.align() as usize;
        let aligned = |n: usize| n.is_multiple_of(align);
        assert!(aligned(offset as usize) && bufs.iter().all(|b| aligned(b.len())), "misaligned direct I/O");
    }
    fn change(&self, change: Change) {
        apply(&mut self.store.now.borrow_mut(), &change, |_| true);
        self.store.open.borrow_mut().push(change);
    }
}

impl File for MemFile {
    fn read_at(
        &self,
        offset: u64,
        mut bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static {
        let handle = Rc::clone(&self.0);
        async move {
            handle.assert_aligned(offset, &bufs);
            if let Some(fault) = handle.world.operation().await {
                return (Err(fault.error), bufs);
            }
            let now = handle.store.now.borrow();
            let start = now.len().min(usize::try_from(offset).unwrap_or(usize::MAX));
            let len = bytes_of(&bufs).min(now.len() - start);
            let len = handle.world.moved(len, handle.align());
            copy_from_slice(&mut bufs, 0, &now[start..start + len]);
            (Ok(len), bufs)
        }
    }

    fn write_at(
        &self,
        offset: u64,
        bufs: IoVec,
    ) -> impl Future<Output = (Result<usize, Errno>, IoVec)> + 'static {
        let handle = Rc::clone(&self.0);
        async move {
            assert!(handle.mode.write, "write to a file opened for reading");
            handle.assert_aligned(offset, &bufs);
            let mut bytes = vec![0; bytes_of(&bufs)];
            copy_to_slice(&bufs, 0, &mut bytes);
            let fault = handle.world.operation().await;
            let len = match fault.map(|f| f.effect) {
                Some(Effect::None) => 0,
                // Sectors are not torn.
                Some(Effect::Half) => bytes.len() / 2 / 512 * 512,
                Some(Effect::All) => bytes.len(),
                // A file system does not stop within a sector.
                None => handle.world.moved(bytes.len(), handle.align().max(512)),
            };
            if handle.store.device.get() && offset + len as u64 > handle.store.now.borrow().len() as u64 {
                return (Err(Errno::ENOSPC), bufs);
            }
            bytes.truncate(len);
            handle.change(Change::Bytes(offset, bytes));
            (fault.map_or(Ok(len), |f| Err(f.error)), bufs)
        }
    }

    fn sync_data(&self) -> impl Future<Output = Result<(), Errno>> + 'static {
        let handle = Rc::clone(&self.0);
        async move {
            // Changes during the synchronisation are not covered.
            let covered = handle.store.open.borrow().len();
            let fault = handle.world.operation().await;
            let mut open = handle.store.open.borrow_mut();
            let covered = covered.min(open.len());
            let done: Vec<Change> = open.drain(..covered).collect();
            if let Some(fault) = fault {
                // A page cache drops pages it could not write.
                if handle.mode.direct {
                    open.splice(0..0, done);
                }
                return Err(fault.error);
            }
            done.iter().for_each(|change| apply(&mut handle.store.durable.borrow_mut(), change, |_| true));
            Ok(())
        }
    }

    fn set_size(&self, size_bytes: u64) -> impl Future<Output = Result<(), Errno>> + 'static {
        let handle = Rc::clone(&self.0);
        async move {
            if let Some(fault) = handle.world.operation().await {
                return Err(fault.error);
            }
            handle.change(Change::Size(size_bytes));
            Ok(())
        }
    }

    fn zero_at(
        &self,
        offset: u64,
        len: u64,
        _mode: ZeroMode,
    ) -> impl Future<Output = Result<(), Errno>> + 'static {
        let handle = Rc::clone(&self.0);
        async move {
            assert!(handle.mode.write, "zeros in a file opened for reading");
            if let Some(error) = handle.world.0.zeroing_fails.get() {
                return Err(error);
            }
            let fault = handle.world.operation().await;
            let end = (offset + len).min(handle.store.now.borrow().len() as u64);
            let len = end.saturating_sub(offset) as usize;
            let len = match fault.map(|f| f.effect) {
                Some(Effect::None) => 0,
                Some(Effect::Half) => len / 2 / 512 * 512,
                Some(Effect::All) | None => len,
            };
            handle.change(Change::Bytes(offset, vec![0; len]));
            fault.map_or(Ok(()), |f| Err(f.error))
        }
    }

    fn file_system_lost(&self) -> impl Future<Output = Result<bool, Errno>> + 'static {
        std::future::ready(Ok(false))
    }

    fn extents_at(
        &self,
        offset: u64,
        max: usize,
    ) -> impl Future<Output = Result<Vec<FileExtent>, Errno>> + 'static {
        let handle = Rc::clone(&self.0);
        async move {
            handle.store.looks.set(handle.store.looks.get() + 1);
            let now = handle.store.now.borrow();
            let rest = now.get(offset as usize..).unwrap_or_default();
            // In blocks of 512 bytes; a block of zeros is a hole.
            let (first, others) = rest.split_at((512 - offset as usize % 512).min(rest.len()));
            let is_data = |block: &&[u8]| block.iter().any(|b| *b != 0);
            let blocks: Vec<&[u8]> = [first].into_iter().chain(others.chunks(512)).collect();
            let runs = blocks.chunk_by(|a, b| is_data(a) == is_data(b)).filter(|run| !run[0].is_empty());
            let extent = |run: &[&[u8]]| (run.concat().len() as u64, is_data(&run[0]));
            Ok(runs.take(max).map(extent).map(|(len_bytes, data)| FileExtent { len_bytes, data }).collect())
        }
    }

    fn info(&self) -> impl Future<Output = Result<FileInfo, Errno>> + 'static {
        let size_bytes = self.0.store.now.borrow().len() as u64;
        std::future::ready(Ok(FileInfo {
            id: FileId { device: 1, inode: Rc::as_ptr(&self.0.store) as usize as u64, generation: 0 },
            size_bytes,
            allocated_bytes: size_bytes,
            align_bytes: self.0.align(),
            zero_align_bytes: 1,
            direct: self.0.mode.direct,
            block_device: self.0.store.device.get(),
        }))
    }

    fn lock(&self, kind: LockKind) -> impl Future<Output = Result<(), Errno>> + 'static {
        std::future::ready(self.try_lock(kind))
    }
}

impl MemFile {
    fn try_lock(&self, kind: LockKind) -> Result<(), Errno> {
        let mut locks = self.0.store.locks.borrow_mut();
        let alone = kind != LockKind::Shared;
        if locks.iter().any(|l| l.0 != self.0.id && (alone || l.1 != LockKind::Shared)) {
            return Err(Errno::EAGAIN);
        }
        locks.retain(|l| l.0 != self.0.id);
        locks.push((self.0.id, kind));
        Ok(())
    }
}
