//! Zeros and discards of ranges of a file.

use super::keep::KeptZeros;
use super::{ImageFile, is_transient};
use crate::ImageHost;
use crate::calls::OPERATION_REPEATED;
use crate::memory::PART_BYTES;
use smallvec::smallvec;
use std::ops::Range;
use tap_core::{Access, Space};
use tap_host::{Errno, File, IoVec, Patience, ZeroMode};

tap_host::listed! {
    pub(super) BUGS: Bug;
    KEPT_GIVEN_BACK = "kept-given-back", "zeros that must keep their space release it";
    PARTS_IN_PLACE = "parts-in-place", "parts of pages are zeroed in place, and not written";
    GIVEN_BACK_KEPT = "given-back-kept", "zeros whose space may go keep it";
}

/// Bytes of a page of memory. No file system that drops dirty pages has larger blocks.
const ZEROED_BYTES: u64 = tap_host::PAGE_BYTES as u64;

impl<H: ImageHost> ImageFile<H> {
    /// Makes `len` bytes from `offset` on read as zeros, in place or by writing. `fast`: fails with `EOPNOTSUPP`,
    /// without a change, if they would have to be written. Bytes past the end of the file get no space, unless `mode`
    /// asks for it.
    pub(crate) async fn zero(&self, offset: u64, len: u64, mode: ZeroMode, fast: bool) -> Result<(), Errno> {
        let end = offset + len;
        let whole = self.whole_blocks(offset, len);
        let done = match whole.is_empty() {
            false => self.zero_in_place(whole.start, whole.end - whole.start, mode).await?,
            true => 0,
        };
        if done == 0 && fast {
            return Err(Errno::EOPNOTSUPP);
        }
        let rest = if done > 0 { whole.start + done } else { offset };
        if mode == ZeroMode::Keep && !self.info.block_device && rest == whole.end {
            let from = self.size().await?.max(whole.start);
            self.write_zeros(from, whole.end.saturating_sub(from)).await?;
        }
        if done > 0 {
            self.write_zeros(offset, whole.start - offset).await?;
        }
        self.write_zeros(rest, end - rest).await
    }

    /// Frees as much of `len` bytes from `offset` on as possible without writing: that part then reads as zeros, the
    /// rest as before. Returns whether the file supports that at all.
    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<bool, Errno> {
        let whole = self.whole_blocks(offset, len);
        if whole.is_empty() {
            return Ok(true);
        }
        Ok(self.zero_in_place(whole.start, whole.end - whole.start, ZeroMode::Unmap).await? > 0)
    }

    /// Whether a range is aligned so that all of it can be zeroed in place.
    pub(crate) fn is_whole(&self, offset: u64, len: u64) -> bool {
        let align = self.zero_align();
        offset.is_multiple_of(align) && len.is_multiple_of(align)
    }

    /// The blocks that are wholly in a range and can be zeroed in place; may be empty.
    fn whole_blocks(&self, offset: u64, len: u64) -> Range<u64> {
        let align = self.zero_align();
        offset.next_multiple_of(align)..(offset + len) / align * align
    }

    /// The size in bytes of the blocks that are zeroed in place: whole pages of memory where a failure has to be
    /// settled. Who zeroes a part of a page, or writes it, first reads the rest. If that cannot be read, accepted
    /// writes to other pages of the range may be gone by then, and nothing can be put in their place.
    fn zero_align(&self) -> u64 {
        let align = u64::from(self.info.zero_align_bytes);
        let settles = KeptZeros::concerns(&self.host, &self.info, ZeroMode::Keep);
        if settles && !self.host.bug(&PARTS_IN_PLACE) { align.max(ZEROED_BYTES) } else { align }
    }

    /// Zeroes a range without writing; returns the number of bytes done before the file refused.
    async fn zero_in_place(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<u64, Errno> {
        let mode = match mode {
            ZeroMode::Keep if self.host.bug(&KEPT_GIVEN_BACK) => ZeroMode::Unmap,
            ZeroMode::Unmap if self.host.bug(&GIVEN_BACK_KEPT) => ZeroMode::Keep,
            mode => mode,
        };
        let align = u64::from(self.info.align_bytes);
        let edges = !offset.is_multiple_of(align) || !len.is_multiple_of(align);
        let ticket = self.tracker.ticket("zeros in block", offset / align);
        if edges {
            // A concurrent rewrite of a whole block must not bring back old bytes.
            let blocks = offset / align..(offset + len).div_ceil(align);
            ticket.claim(Space::HostBlocks, blocks, Access::Exclusive);
            ticket.ready().await;
        }
        let mut done = 0;
        while done < len {
            let part = (len - done).min(self.kept.max_at_once(&self.host, &self.info, mode));
            match self.zero_part(offset + done, part, mode).await {
                Err(Errno::EOPNOTSUPP) => break,
                result => result?,
            }
            done += part;
        }
        Ok(done)
    }

    /// Zeroes a part, with retries after transient errors.
    async fn zero_part(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<(), Errno> {
        let mut patience = Patience::of(self.repeats);
        loop {
            let result = match KeptZeros::concerns(&self.host, &self.info, mode) {
                true => self.zero_kept(offset, len, mode).await,
                false => self.file.zero_at(offset, len, mode).await,
            };
            if !result.is_err_and(is_transient) || !patience.again(&self.host).await {
                return result;
            }
            self.host.mark(&OPERATION_REPEATED);
        }
    }

    pub(super) async fn write_zeros(&self, offset: u64, len: u64) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        let mut buf = self.buffer(len.min(PART_BYTES as u64) as usize).await?;
        buf.fill(0);
        let mut bufs: IoVec = smallvec![buf];
        let mut done = 0;
        while done < len {
            bufs[0].truncate((len - done).min(PART_BYTES as u64) as usize);
            let part = bufs[0].len() as u64;
            let (result, back) = self.write(offset + done, bufs).await;
            result?;
            bufs = back;
            done += part;
        }
        Ok(())
    }
}
