//! The stages at which an image takes memory, in the order in which one request may hold several of them.
//!
//! ```text
//!   map    tables ─► zeros ─► parts ─► doubts ─┐             fixed: memory of an open image
//!   file                                       └─► single ─► bounce ─► rest
//! ```
//!
//! A backing file has separate stages, all of them after those of the image. So a request that holds memory only waits
//! further down, and no deadlock is possible (see [`tap_host::Budget`]). Each stage guarantees the memory of its
//! largest single step; with more room, more is taken at once.

use crate::ImageError;
use tap_host::{Budget, Errno, IoBuf, IoVec, Share, Stage, cost_of};

/// Largest buffer of a list made here, in bytes.
pub(crate) const PART_BYTES: usize = 64 << 10;
/// Limit of memory taken at once, in bytes.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Memory of a list of buffers of `len` bytes in total, in bytes.
pub fn cost_of_list(len: usize) -> usize {
    len / PART_BYTES * PART_BYTES + if len.is_multiple_of(PART_BYTES) { 0 } else { cost_of(len % PART_BYTES) }
}

/// Buffers of unspecified content from `share`, `len` bytes in total; they take [`cost_of_list`].
pub(crate) fn buffers(share: &mut Share, mut len: usize) -> Result<IoVec, Errno> {
    let mut bufs = IoVec::new();
    while len > 0 {
        let part = len.min(PART_BYTES);
        bufs.push(share.buffer(part)?);
        len -= part;
    }
    Ok(bufs)
}

/// Takes `want_bytes`, at most [`MAX_BYTES`]. If there is less room, it waits for the guarantee of `stage` only, and
/// takes no more than that.
pub(crate) async fn take_some(stage: &Stage, want_bytes: usize) -> Result<Share, Errno> {
    let want_bytes = want_bytes.min(MAX_BYTES);
    if want_bytes == 0 {
        return Ok(stage.nothing());
    }
    match stage.try_take(want_bytes) {
        Some(share) => Ok(share),
        None => stage.take(want_bytes.min(stage.guarantee_bytes())).await,
    }
}

/// A stage, or an error with advice.
pub(crate) fn stage(budget: &Budget, path: &str, guarantee: usize) -> Result<Stage, ImageError> {
    budget.stage(guarantee).map_err(|_| ImageError::Refused {
        path: path.to_owned(),
        format: "image",
        what: format!("the memory limit of {} bytes is too small for it", budget.figures().limit_bytes),
        advice: "raise it (--memory), or serve fewer images",
    })
}

/// Stages of an open file.
pub(crate) struct FileStages {
    pub(crate) budget: Budget,
    /// One table, a part of one, the bytes of one compressed cluster, or zeros: at most [`PART_BYTES`].
    pub(crate) single: Stage,
    /// Whole blocks around unaligned bytes.
    pub(crate) bounce: Stage,
    /// The rest of a buffer after a short transfer.
    pub(crate) rest: Stage,
}

impl FileStages {
    pub(crate) fn new(budget: &Budget, path: &str, align: usize) -> Result<Self, ImageError> {
        Ok(Self {
            budget: budget.clone(),
            single: stage(budget, path, PART_BYTES)?,
            bounce: stage(budget, path, bounce_cost(bounce_len(PART_BYTES, align), align))?,
            rest: stage(budget, path, cost_of(align.max(PART_BYTES)))?,
        })
    }

    /// A buffer of at most [`PART_BYTES`].
    pub(crate) async fn buffer(&self, len: usize) -> Result<IoBuf, Errno> {
        self.single.buffer(len).await
    }

    /// A buffer for whole blocks of `align` bytes around `len` bytes, and the number of these bytes that it is for,
    /// which is less if there is no room.
    pub(crate) async fn bounce(&self, len: usize, align: usize) -> Result<(IoBuf, usize), Errno> {
        let max = len.min(bounce_len(MAX_BYTES, align));
        let (mut share, len) = match self.bounce.try_take(bounce_cost(max, align)) {
            Some(share) => (share, max),
            None => {
                let min = len.min(bounce_len(PART_BYTES, align));
                (self.bounce.take(bounce_cost(min, align)).await?, min)
            }
        };
        let bytes = share.bytes();
        Ok((share.buffer(bytes)?, len))
    }
}

/// The bytes that fit at once in a bounce buffer of about `room` bytes.
fn bounce_len(room: usize, align: usize) -> usize {
    if align <= room / 8 { room - 2 * (align - 1) } else { room }
}

/// Memory of a buffer for whole blocks around `len` bytes.
fn bounce_cost(len: usize, align: usize) -> usize {
    cost_of(len + 2 * (align - 1))
}

/// Stages of an open image of the map engine, before those of its file.
pub(crate) struct ImageStages {
    /// Memory it always has: the L1 table, the index of L2 tables, the decoder; and that of a walk.
    pub(crate) fixed: Stage,
    /// L2 tables.
    pub(crate) tables: Stage,
    /// Zeros to be written as data.
    pub(crate) zeros: Stage,
    /// Parts of requests, and the rest of their clusters.
    pub(crate) parts: Stage,
    /// Runs whose mapping is or may become in doubt.
    pub(crate) doubts: Stage,
    always: Option<Share>,
}

/// The decoder of compressed clusters, and its cached cluster.
const DECODER_BYTES: usize = 128 << 10;

impl ImageStages {
    /// Stages of an image with clusters of `cluster` bytes and tables that take `table` bytes each in memory. It holds
    /// `front` bytes while it is open, and reserves `doubts` for mappings in doubt.
    pub(crate) fn new(
        budget: &Budget,
        path: &str,
        (front, table, cluster, doubts): (usize, usize, usize, usize),
    ) -> Result<Self, ImageError> {
        let fixed = stage(budget, path, front + DECODER_BYTES)?;
        Ok(Self {
            always: fixed.try_take(front),
            fixed,
            tables: stage(budget, path, table)?,
            zeros: stage(budget, path, PART_BYTES)?,
            parts: stage(budget, path, 2 * PART_BYTES + 4 * cost_of(cluster))?,
            doubts: stage(budget, path, doubts)?,
        })
    }

    /// Called at the end of the walk, before anything is decompressed.
    pub(crate) fn walked(&mut self) {
        if let (Some(always), Some(decoder)) = (&mut self.always, self.fixed.try_take(DECODER_BYTES)) {
            always.join(decoder);
        }
    }
}
