//! The stages at which an image asks for memory, in the order in which one request may hold several of them.
//!
//! ```text
//!   map    tables ─► zeros ─► parts ─► doubts ─┐             fixed: what an open image always has
//!   file                                       └─► single ─► bounce ─► rest
//! ```
//!
//! What lies below an image has stages of its own, all of them after those of the image. So who holds memory asks for
//! more only further down, and nobody waits for ever (see [`tap_host::Budget`]). Each stage has what the largest single
//! step of it needs; whoever finds room takes more at once.

use crate::ImageError;
use tap_host::{Budget, Errno, IoBuf, IoVec, Share, Stage, cost_of};

/// Largest buffer of a list that is made here, in bytes.
pub(crate) const PART_BYTES: usize = 64 << 10;
/// What is taken at once where there is room, in bytes.
pub(crate) const MOST_BYTES: usize = 1 << 20;
/// What a list of buffers of `len` bytes together takes, in bytes.
pub(crate) fn cost_of_list(len: usize) -> usize {
    len / PART_BYTES * PART_BYTES + if len.is_multiple_of(PART_BYTES) { 0 } else { cost_of(len % PART_BYTES) }
}

/// Buffers of unspecified content out of `share`, `len` bytes together; they take [`cost_of_list`].
pub(crate) fn buffers(share: &mut Share, mut len: usize) -> Result<IoVec, Errno> {
    let mut bufs = IoVec::new();
    while len > 0 {
        let part = len.min(PART_BYTES);
        bufs.push(share.buffer(part)?);
        len -= part;
    }
    Ok(bufs)
}

/// `want_bytes`, at most [`MOST_BYTES`], or fewer, but not fewer than the guarantee of `stage` if so much is wanted;
/// waits for that only.
pub(crate) async fn take_some(stage: &Stage, want_bytes: usize) -> Result<Share, Errno> {
    let want_bytes = want_bytes.min(MOST_BYTES);
    if want_bytes == 0 {
        return Ok(stage.nothing());
    }
    match stage.try_take(want_bytes) {
        Some(share) => Ok(share),
        None => stage.take(want_bytes.min(stage.guarantee_bytes())).await,
    }
}

/// A stage, or an error that says what to do.
pub(crate) fn stage(budget: &Budget, path: &str, guarantee: usize) -> Result<Stage, ImageError> {
    budget.stage(guarantee).map_err(|_| ImageError::Refused {
        path: path.to_owned(),
        format: "image",
        what: format!("the memory of {} bytes is not enough for it", budget.figures().limit_bytes),
        advice: "give more (--memory), or serve fewer images",
    })
}

/// Stages of an open file.
pub(crate) struct FileStages {
    pub(crate) budget: Budget,
    /// One table, a part of one, the bytes of one compressed cluster, or zeros: at most [`PART_BYTES`].
    pub(crate) single: Stage,
    /// Whole blocks around what is not aligned.
    pub(crate) bounce: Stage,
    /// What a short transfer has left of a buffer.
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

    /// A buffer for whole blocks around `len` bytes of a file whose blocks have `align` bytes, and for how many of them
    /// it is, which are fewer where there is no room.
    pub(crate) async fn bounce(&self, len: usize, align: usize) -> Result<(IoBuf, usize), Errno> {
        let most = len.min(bounce_len(MOST_BYTES, align));
        let (mut share, len) = match self.bounce.try_take(bounce_cost(most, align)) {
            Some(share) => (share, most),
            None => {
                let least = len.min(bounce_len(PART_BYTES, align));
                (self.bounce.take(bounce_cost(least, align)).await?, least)
            }
        };
        let bytes = share.bytes();
        Ok((share.buffer(bytes)?, len))
    }
}

/// What is bounced at once in a buffer of about `room` bytes.
fn bounce_len(room: usize, align: usize) -> usize {
    if align <= room / 8 { room - 2 * (align - 1) } else { room }
}

/// Bytes of a buffer for whole blocks around `len` bytes.
fn bounce_cost(len: usize, align: usize) -> usize {
    cost_of(len + 2 * (align - 1))
}

/// Stages of an open image of the map engine, in front of those of its file.
pub(crate) struct ImageStages {
    /// What it always has: the L1 table, where to find L2 tables, the decoder; and what a walk needs.
    pub(crate) fixed: Stage,
    /// L2 tables.
    pub(crate) tables: Stage,
    /// Zeros that are written like any data.
    pub(crate) zeros: Stage,
    /// Parts of requests, and what fills the rest of their clusters.
    pub(crate) parts: Stage,
    /// Clusters whose mapping is in doubt, or may come to be.
    pub(crate) doubts: Stage,
    always: Option<Share>,
}

/// The decoder of compressed clusters, and the cluster that it keeps.
const DECODER_BYTES: usize = 128 << 10;

impl ImageStages {
    /// For an image with clusters of `cluster` bytes, whose tables take `table` bytes each in memory, and which has
    /// `front` bytes as long as it is open, and `doubts` for mappings in doubt.
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

    /// The walk through the tables, which comes before anything is decompressed, has ended.
    pub(crate) fn walked(&mut self) {
        if let (Some(always), Some(decoder)) = (&mut self.always, self.fixed.try_take(DECODER_BYTES)) {
            always.join(decoder);
        }
    }
}
