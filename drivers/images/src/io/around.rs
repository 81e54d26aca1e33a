//! Transfers on direct files that are not whole blocks: they go through a bounce buffer of the blocks around them.
//!
//! ```text
//!   request        ├────────────────────┤
//!   blocks      │     │     │     │     │     │
//!   a read      ├───────────────────────┤              reads all of them
//!   a write     ├─────┤                                reads the blocks that it covers in part, then writes all
//! ```
//!
//! A write has its blocks claimed, so that neighbours do not undo each other. It does not depend on the old bytes of
//! the blocks that it covers: one that cannot be read is mended by being written.

use super::ImageFile;
use crate::ImageHost;
use smallvec::smallvec;
use std::ops::Range;
use tap_core::{Access, Space};
use tap_host::{Errno, IoBuf, IoVec, bytes_of, copy_from_slice, copy_to_slice};

tap_host::listed! {
    pub(super) BUGS: Bug;
    BLOCK_CLAIMS_LEFT = "block-claims-left",
        "two writes rewrite the same block of a direct file at the same time";
    COVERED_BLOCKS_READ = "covered-blocks-read",
        "a write to a direct file reads all blocks around it, also those that it covers";
}

impl<H: ImageHost> ImageFile<H> {
    /// Truncates `buf` to the blocks around `len` bytes from `offset` on; returns the offset of the first block.
    fn around(&self, offset: u64, len: usize, buf: &mut IoBuf) -> u64 {
        let align = u64::from(self.info.align_bytes);
        let start = offset - offset % align;
        buf.truncate(((offset + len as u64).next_multiple_of(align) - start) as usize);
        start
    }

    /// A buffer for the blocks around up to `len` bytes from `offset` on, and the number of these bytes. The rest
    /// begins on a block boundary.
    async fn bounce(&self, offset: u64, len: usize) -> Result<(IoBuf, usize), Errno> {
        let align = self.info.align_bytes as usize;
        let (buf, some) = self.memory.bounce(len, align).await?;
        let beyond = (offset + some as u64) as usize % align;
        Ok((buf, if some == len || beyond >= some { some } else { some - beyond }))
    }

    pub(super) async fn read_around(&self, offset: u64, mut bufs: IoVec) -> (Result<(), Errno>, IoVec) {
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

    /// Reads up to `len` bytes from `offset` on. Returns the blocks around them, where they begin in those, and their
    /// number.
    async fn read_piece_around(&self, offset: u64, len: usize) -> Result<(IoBuf, usize, usize), Errno> {
        let (mut bounce, len) = self.bounce(offset, len).await?;
        let start = self.around(offset, len, &mut bounce);
        let (result, mut bounce) = Box::pin(self.read(start, smallvec![bounce])).await;
        result?;
        Ok((bounce.pop().ok_or(Errno::EIO)?, (offset - start) as usize, len))
    }

    pub(super) async fn write_around(&self, offset: u64, bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        let result = self.rewrite_blocks(offset, &bufs).await;
        (result, bufs)
    }

    async fn rewrite_blocks(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Errno> {
        let align = u64::from(self.info.align_bytes);
        let total = bytes_of(bufs);
        let end = offset + total as u64;
        let ticket = self.tracker.ticket("rewrite of block", offset / align);
        let edges = !offset.is_multiple_of(align) || !end.is_multiple_of(align);
        if edges && !self.host.bug(&BLOCK_CLAIMS_LEFT) {
            let blocks = offset / align..end.div_ceil(align);
            ticket.claim(Space::HostBlocks, blocks, Access::Exclusive);
            ticket.ready().await;
        }
        let mut done = 0;
        while done < total {
            done += self.rewrite_piece(offset + done as u64, bufs, done).await?;
        }
        Ok(())
    }

    /// Writes the blocks around a part of `bufs`, from byte `done` on; returns how many bytes of `bufs` that was.
    async fn rewrite_piece(&self, at: u64, bufs: &[IoBuf], done: usize) -> Result<usize, Errno> {
        let (mut bounce, len) = self.bounce(at, bytes_of(bufs) - done).await?;
        let start = self.around(at, len, &mut bounce);
        let skip = (at - start) as usize;
        let mut bounce = self.read_edges(start, bounce, skip..skip + len).await?;
        copy_to_slice(bufs, done, &mut bounce[0][skip..skip + len]);
        Box::pin(self.write(start, bounce)).await.0?;
        Ok(len)
    }

    /// Reads the blocks at the ends of `bounce`, which is for the blocks from byte `start` of the file on, if not all
    /// of their bytes are in `covered`. The blocks between are not read: a sector that cannot be read is mended by
    /// being written, so a write must not depend on the old bytes of what it covers.
    async fn read_edges(&self, start: u64, bounce: IoBuf, covered: Range<usize>) -> Result<IoVec, Errno> {
        let (align, total) = (self.info.align_bytes as usize, bounce.len());
        let (first, last) = (!covered.start.is_multiple_of(align), covered.end < total);
        let mut bounce: IoVec = smallvec![bounce];
        let both = first && last && total <= 2 * align;
        if both || self.host.bug(&COVERED_BLOCKS_READ) {
            if first || last {
                bounce = self.read_to_rewrite(start, bounce).await?;
            }
            return Ok(bounce);
        }
        // The last block goes through the place of the first one, because buffers are read into from their start.
        for (wanted, at) in [(last, total - align), (first, 0)] {
            if !wanted {
                continue;
            }
            bounce[0].truncate(align);
            bounce = self.read_to_rewrite(start + at as u64, bounce).await?;
            bounce[0].untruncate(total);
            bounce[0].copy_within(..align, at);
        }
        Ok(bounce)
    }

    async fn read_to_rewrite(&self, start: u64, bufs: IoVec) -> Result<IoVec, Errno> {
        let (result, bufs) = Box::pin(self.read(start, bufs)).await;
        result.map(|()| bufs)
    }
}
