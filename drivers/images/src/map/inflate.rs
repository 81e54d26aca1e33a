//! Compressed clusters: raw deflate of one whole cluster each.

use super::Image;
use super::layout::{Compressed, Layout};
use crate::ImageHost;
use flate2::{Decompress, FlushDecompress};
use smallvec::smallvec;
use std::rc::Rc;
use tap_host::Errno;

tap_host::listed! {
    pub(super) MARKS: Mark;
    COMPRESSED_READ = "compressed-read", "a compressed cluster was read";
}

/// Caches the last cluster, since guests read one cluster in several requests, and the state of the decoder, which is
/// large.
#[derive(Default)]
pub(super) struct Inflater {
    last: Option<(Compressed, Rc<[u8]>)>,
    state: Option<Decompress>,
}

impl Inflater {
    fn inflate(&mut self, bytes: &[u8], cluster_bytes: usize) -> Option<Rc<[u8]>> {
        let state = self.state.get_or_insert_with(|| Decompress::new(false));
        state.reset(false);
        let mut out = vec![0; cluster_bytes];
        state.decompress(bytes, &mut out, FlushDecompress::Finish).ok()?;
        (state.total_out() == cluster_bytes as u64).then(|| out.into())
    }
}

/// Why a compressed cluster cannot be read.
pub(crate) enum Unreadable {
    /// The stored bytes are not a whole cluster.
    Damaged,
    /// It could not be read.
    Failed(Errno),
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// Whether there are bytes of a compressed cluster. Those past the end of the file read as zeros: the stream may
    /// have ended before.
    pub(super) fn is_in_file(&self, run: Compressed) -> bool {
        run.len > 0 && run.offset < self.tables_reach
    }

    /// The content of a compressed cluster.
    pub(super) async fn inflate(&self, run: Compressed) -> Result<Rc<[u8]>, Errno> {
        self.inflate_or_why(run, false).await.map_err(|why| match why {
            Unreadable::Damaged => Errno::EIO,
            Unreadable::Failed(error) => error,
        })
    }

    /// As [`Image::inflate`], but tells damage from errors. `patiently` retries transient errors, for callers without a
    /// scheduler.
    pub(crate) async fn inflate_or_why(
        &self,
        run: Compressed,
        patiently: bool,
    ) -> Result<Rc<[u8]>, Unreadable> {
        self.host.mark(&COMPRESSED_READ);
        if let Some((last, bytes)) = &self.inflater.borrow().last
            && *last == run
        {
            return Ok(Rc::clone(bytes));
        }
        // The length has fewer bits than a cluster has bytes.
        if !self.is_in_file(run) {
            return Err(Unreadable::Damaged);
        }
        let buf = self.file.buffer(run.len as usize).await.map_err(Unreadable::Failed)?;
        let bufs = smallvec![buf];
        let (result, bufs) = match patiently {
            true => self.file.read_patiently(run.offset.0, bufs).await,
            false => self.file.read(run.offset.0, bufs).await,
        };
        result.map_err(Unreadable::Failed)?;
        let mut inflater = self.inflater.borrow_mut();
        let bytes = inflater.inflate(&bufs[0], self.geometry.cluster_bytes() as usize);
        let bytes = bytes.ok_or(Unreadable::Damaged)?;
        inflater.last = Some((run, Rc::clone(&bytes)));
        Ok(bytes)
    }
}
