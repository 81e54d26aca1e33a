//! Parts of a request's buffers.
//!
//! An [`IoBuf`] moves as a whole. A part on buffer boundaries takes the buffers; any other part gets a new buffer, and
//! its bytes are copied.

use crate::memory::buffers;
pub use crate::memory::cost_of_list;
use smallvec::SmallVec;
use tap_core::Op;
use tap_host::{Errno, IoBuf, IoVec, Share};

/// The buffers of a request while parts of them are taken out.
pub struct Carver {
    op: Op,
    slots: SmallVec<[Option<IoBuf>; 4]>,
    /// Where each buffer starts, in bytes of the request, and where the last one ends.
    starts: SmallVec<[usize; 5]>,
}

/// A part that was taken out.
pub struct Part {
    at: usize,
    /// The first slot, if the buffers themselves were taken.
    moved_from: Option<usize>,
    /// The buffers to work with.
    pub(crate) bufs: IoVec,
}

impl Part {
    /// The buffers to work with. They are put back as they are when the part is.
    pub fn bufs(&mut self) -> &mut IoVec {
        &mut self.bufs
    }
}

impl Carver {
    /// The buffers `bufs` of a request that does `op`.
    pub fn new(op: Op, bufs: IoVec) -> Self {
        let mut starts: SmallVec<[usize; 5]> = SmallVec::new();
        let mut at = 0;
        for buf in &bufs {
            starts.push(at);
            at += buf.len();
        }
        starts.push(at);
        Self { op, slots: bufs.into_iter().map(Some).collect(), starts }
    }

    /// The buffers that hold exactly `len` bytes from byte `at` on.
    fn whole(&self, at: usize, len: usize) -> Option<std::ops::Range<usize>> {
        Some(self.starts.binary_search(&at).ok()?..self.starts.binary_search(&(at + len)).ok()?)
    }

    /// Bytes of memory that taking `len` bytes from byte `at` on needs.
    pub fn cost(&self, at: usize, len: usize) -> usize {
        if self.whole(at, len).is_some() { 0 } else { cost_of_list(len) }
    }

    /// Takes `len` bytes from byte `at` on, with memory from `share` if it needs any. Parts taken out at the same time
    /// must not overlap.
    ///
    /// # Errors
    /// `ENOMEM` if `share` has less than [`Carver::cost`].
    ///
    /// # Panics
    /// If a buffer of the part is taken already.
    pub fn take(&mut self, share: &mut Share, at: usize, len: usize) -> Result<Part, Errno> {
        if let Some(slots) = self.whole(at, len) {
            let first = slots.start;
            let taken = self.slots[slots].iter_mut().map(|s| s.take().expect("a part is taken once"));
            return Ok(Part { at, moved_from: Some(first), bufs: taken.collect() });
        }
        let mut bufs = buffers(share, len)?;
        if self.op == Op::Write {
            let mut from = at;
            for buf in &mut bufs {
                self.overlaps(from, buf.len(), |own, other| buf[other].copy_from_slice(own));
                from += buf.len();
            }
        }
        Ok(Part { at, moved_from: None, bufs })
    }

    /// Puts a part back, with the bytes read into it.
    pub fn put(&mut self, part: Part) {
        match part.moved_from {
            Some(first) => {
                for (slot, buf) in self.slots[first..].iter_mut().zip(part.bufs) {
                    *slot = Some(buf);
                }
            }
            None if self.op == Op::Read => {
                let mut from = part.at;
                for buf in &part.bufs {
                    self.overlaps(from, buf.len(), |own, other| own.copy_from_slice(&buf[other]));
                    from += buf.len();
                }
            }
            None => {}
        }
    }

    /// All buffers, once every part is back.
    ///
    /// # Panics
    /// If one is not.
    pub fn finish(self) -> IoVec {
        self.slots.into_iter().map(|s| s.expect("every part was put back")).collect()
    }

    /// Calls `copy` with every piece of a buffer within `len` bytes from `at`, and its range relative to `at`.
    fn overlaps(&mut self, at: usize, len: usize, mut copy: impl FnMut(&mut [u8], std::ops::Range<usize>)) {
        for (slot, start) in self.slots.iter_mut().zip(&self.starts) {
            let Some(buf) = slot else { continue };
            let (from, to) = ((*start).max(at), (start + buf.len()).min(at + len));
            if from < to {
                copy(&mut buf[from - start..to - start], from - at..to - at);
            }
        }
    }
}
