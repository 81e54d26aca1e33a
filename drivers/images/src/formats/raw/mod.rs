//! Raw images: the file, or block device, is the disk.
//!
//! If a file does not end with a whole sector, its last sector is padded with zeros, and a write of it makes the file
//! longer.

mod ahead;

use crate::calls::closed;
use crate::grow::{grows, refused};
use crate::io::{ImageFile, sync_name};
use crate::sync::{FLUSH_EARLY, FUA_UNSYNCED};
use crate::{Description, Format, FormatInfo, ImageError, ImageHost, NewImage, OpenImage, OpenOptions};
use ahead::{Ahead, Change};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::{Extent, LocalBoxFuture, Node, NodeInfo, NodeName, Op, Request, Response, Source};
use tap_host::{Errno, FileExtent, FileId, IoVec, SECTOR_BYTES, SectorRange, ZeroMode};

tap_host::listed! {
    pub(crate) BUGS: Bug with [ahead::BUGS];
    GROWN_RAW_UNSYNCED = "grown-raw-unsynced", "a raw image is reported larger before that is durable";
    CLOSE_UNSYNCED = "close-unsynced", "a raw image is closed without being synchronised";
}

/// The format.
pub const FORMAT: Format = Format::new(&FormatInfo {
    name: "raw",
    aliases: &[],
    about: "The file is the disk",
    options: &[],
    has_backing: false,
});

/// Its registry entry.
pub struct Driver;

impl<H: ImageHost> crate::Driver<H> for Driver {
    fn format(&self) -> Format {
        FORMAT
    }

    fn open(&self, host: H, image: OpenImage<H>) -> LocalBoxFuture<Result<Rc<dyn Node>, ImageError>> {
        Box::pin(async move { Ok(Rc::new(Raw::open(&host, &image).await?) as Rc<dyn Node>) })
    }

    fn create(&self, host: H, path: String, image: NewImage) -> LocalBoxFuture<Result<(), ImageError>> {
        Box::pin(async move { create(&host, &path, image.size_bytes, image.existing.as_deref()).await })
    }

    fn describe(
        &self,
        host: H,
        path: String,
        how: OpenOptions,
    ) -> LocalBoxFuture<Result<Description, ImageError>> {
        Box::pin(async move {
            let file = ImageFile::open(&host, &path, &how).await?;
            Ok(Description {
                format: FORMAT,
                disk_bytes: file.info.size_bytes.next_multiple_of(SECTOR_BYTES),
                cluster_bytes: None,
                backing: None,
                backing_path: None,
                file_bytes: file.info.size_bytes,
                allocated_bytes: file.info.allocated_bytes,
            })
        })
    }

    fn grow(
        &self,
        host: H,
        image: OpenImage<H>,
        size_bytes: u64,
    ) -> Option<LocalBoxFuture<Result<(), ImageError>>> {
        Some(Box::pin(async move { grow(&host, &image, size_bytes).await }))
    }
}

/// An open raw image.
struct Raw<H: ImageHost> {
    /// `None` once closed.
    open: RefCell<Option<Rc<Inner<H>>>>,
    info: Rc<Cell<NodeInfo>>,
}

struct Inner<H: ImageHost> {
    host: H,
    file: ImageFile<H>,
    ahead: Ahead,
}

/// Creates a raw image of `size_bytes` that reads as zeros, durable together with its name. With `existing` it
/// overwrites the file at the path, unless that is one of those.
///
/// # Errors
/// [`ImageError`]; a file created before the error stays.
async fn create<H: ImageHost>(
    host: &H,
    path: &str,
    size_bytes: u64,
    existing: Option<&[FileId]>,
) -> Result<(), ImageError> {
    if !size_bytes.is_multiple_of(SECTOR_BYTES) || size_bytes > i64::MAX as u64 {
        let what = format!("a size of {size_bytes} bytes is not a multiple of {SECTOR_BYTES}, or too large");
        return Err(ImageError::Options { path: path.to_owned(), format: FORMAT.name(), what });
    }
    let file = ImageFile::create(host, path, existing).await?;
    if file.info.block_device {
        let what = "a block device is already a raw image; write into it with convert -n".to_owned();
        return Err(ImageError::Options { path: path.to_owned(), format: FORMAT.name(), what });
    }
    file.set_size(size_bytes).await.map_err(ImageError::io("set the size of", path))?;
    file.sync().await.map_err(ImageError::io("synchronise", path))?;
    sync_name(host, path).await
}

/// Extends the file of `image` to `size_bytes`; the new part is a hole. A block device that has the size already is
/// left as it is.
///
/// # Errors
/// [`ImageError`].
async fn grow<H: ImageHost>(host: &H, image: &OpenImage<H>, size_bytes: u64) -> Result<(), ImageError> {
    let path = image.path.as_str();
    let file = ImageFile::open(host, path, &image.options).await?;
    let have_bytes = file.info.size_bytes.next_multiple_of(SECTOR_BYTES);
    // A file that does not end with a whole sector gets the rest of it.
    if grows((path, FORMAT), have_bytes, size_bytes)? || file.info.size_bytes < size_bytes {
        if file.info.block_device {
            let what =
                "it is a block device, whose size is not this program's to change; extend the device itself";
            return Err(refused(path, FORMAT, what.to_owned()));
        }
        let align_bytes = file.info.align_bytes;
        if !size_bytes.is_multiple_of(align_bytes.into()) {
            // It could not be opened again.
            let what = format!(
                "a size of {size_bytes} bytes is not a multiple of the {align_bytes} bytes that direct I/O needs"
            );
            return Err(refused(path, FORMAT, what));
        }
        file.set_size(size_bytes).await.map_err(ImageError::io("set the size of", path))?;
    }
    if !host.bug(&GROWN_RAW_UNSYNCED) {
        file.sync_to_close().await.map_err(ImageError::io("synchronise", path))?;
    }
    drop(file);
    closed(host).await;
    Ok(())
}

impl<H: ImageHost> Raw<H> {
    async fn open(host: &H, image: &OpenImage<H>) -> Result<Self, ImageError> {
        let (path, options) = (&image.path, &image.options);
        let write = options.write;
        let file = ImageFile::open(host, path, options).await?;
        image.unlike_others(&file).await?;
        let (size, align) = (file.info.size_bytes, u64::from(file.info.align_bytes));
        let refused = |what, advice| Err(image.refused(what, advice));
        if write && !size.is_multiple_of(align) {
            // Rewriting the last block as a whole would make the file, and the disk, longer.
            let what = format!(
                "its size of {size} bytes is not a multiple of the {align} bytes that direct I/O needs"
            );
            return refused(what, "extend it, or open it without direct I/O");
        }
        let info = NodeInfo { read_only: !write, ..file.node_info(size.div_ceil(SECTOR_BYTES)) };
        let inner = Inner { host: host.clone(), file, ahead: Ahead::new(!options.unlocked) };
        Ok(Self { open: RefCell::new(Some(Rc::new(inner))), info: Rc::new(Cell::new(info)) })
    }
}

impl<H: ImageHost> Inner<H> {
    /// Completes a `change` of the file that returned `result`: with `fua` it is made durable first.
    async fn settled(&self, change: Change<'_>, result: Result<(), Errno>, fua: bool) -> Result<(), Errno> {
        change.end();
        if !fua || result.is_err() || self.host.bug(&FUA_UNSYNCED) {
            return result;
        }
        self.file.sync().await
    }

    /// Holes and data of the file.
    async fn extents(&self, range: SectorRange, max: usize) -> Result<Vec<Extent>, Errno> {
        let (mut at, end) = (range.start.0 * SECTOR_BYTES, range.end().unwrap_or(0) * SECTOR_BYTES);
        let mut found = self.look(at, end, max).await?;
        if found.is_empty() {
            // Past the end of the file.
            found.push(FileExtent { len_bytes: end - at, data: false });
        }
        let (mut out, mut run_end) = (Vec::with_capacity(found.len()), at);
        for run in found {
            run_end += run.len_bytes;
            let left = run_end.min(end).saturating_sub(at);
            // A sector that is partly data counts as data, and may contain all of the next run.
            if left > 0 {
                let len =
                    if run.data { left.next_multiple_of(SECTOR_BYTES) } else { left - left % SECTOR_BYTES };
                let (len, data) = if len == 0 { (SECTOR_BYTES, true) } else { (len, run.data) };
                let source =
                    Source::Node { name: Some(self.file.name.clone()), offset: Some(at), compressed: false };
                out.push(Extent { count: len / SECTOR_BYTES, source, zero: !data, allocated: data });
                at += len;
            }
        }
        Ok(out)
    }

    /// The first runs of the file in the bytes `at..end`, at most `max`, from what is known or by a look at the file.
    async fn look(&self, at: u64, end: u64, max: usize) -> Result<Vec<FileExtent>, Errno> {
        let now_ns = self.host.now_ns();
        let known = self.ahead.take(now_ns, at, end, max);
        if !known.is_empty() {
            return Ok(known);
        }
        let (stamp, count) = (self.ahead.stamp(), self.ahead.count(at, max));
        let found = self.file.extents(at, count).await?;
        let first = found.iter().take(max).copied().collect();
        self.ahead.keep(stamp, now_ns, at, found);
        Ok(first)
    }
}

impl<H: ImageHost> Node for Raw<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let open = self.open.borrow().clone().ok_or(Errno::ESHUTDOWN);
        let inner = match self.info.get().check(&request).and(open) {
            Ok(inner) => inner,
            Err(e) => return Box::pin(std::future::ready(Response { result: Err(e), bufs: request.bufs })),
        };
        let (offset, len, fua) =
            (request.range.start.0 * SECTOR_BYTES, request.range.len_bytes(), request.fua);
        match request.op {
            Op::Read => Box::pin(async move {
                let (result, bufs) = inner.file.read(offset, request.bufs).await;
                Response { result, bufs }
            }),
            Op::Write => Box::pin(async move {
                let change = inner.ahead.change(&inner.host);
                let (result, bufs) = inner.file.write(offset, request.bufs).await;
                Response { result: inner.settled(change, result, fua).await, bufs }
            }),
            Op::WriteZeroes(flags) => Box::pin(async move {
                let mode = if flags.unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
                let change = inner.ahead.change(&inner.host);
                let result = inner.file.zero(offset, len, mode, flags.fast).await;
                Response { result: inner.settled(change, result, fua).await, bufs: request.bufs }
            }),
            Op::Discard => Box::pin(async move {
                let change = inner.ahead.change(&inner.host);
                let result = inner.file.discard(offset, len).await.map(drop);
                Response { result: inner.settled(change, result, fua).await, bufs: request.bufs }
            }),
            Op::Flush => Box::pin(async move {
                if inner.host.bug(&FLUSH_EARLY) {
                    return Response { result: Ok(()), bufs: IoVec::new() };
                }
                Response { result: inner.file.sync().await, bufs: request.bufs }
            }),
        }
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let open = self.open.borrow().clone();
        Box::pin(async move { open.ok_or(Errno::ESHUTDOWN)?.extents(range, max).await })
    }

    fn info(&self) -> NodeInfo {
        self.info.get()
    }

    fn name(&self) -> Option<NodeName> {
        self.open.borrow().as_ref().map(|inner| inner.file.name.clone())
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let (open, info) = (self.open.borrow().clone(), Rc::clone(&self.info));
        Box::pin(async move {
            let inner = open.ok_or(Errno::ESHUTDOWN)?;
            if !info.get().read_only {
                inner.file.sync_to_close().await?;
                inner.file.share().await?;
                info.set(NodeInfo { read_only: true, ..info.get() });
            }
            Ok(())
        })
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let (open, read_only) = (self.open.take(), self.info.get().read_only);
        Box::pin(async move {
            let Some(inner) = open else { return Ok(()) };
            let synced = match read_only || inner.host.bug(&CLOSE_UNSYNCED) {
                true => Ok(()),
                false => inner.file.sync_to_close().await,
            };
            let host = inner.host.clone();
            drop(inner);
            closed(&host).await;
            synced
        })
    }
}

#[cfg(test)]
mod tests;
