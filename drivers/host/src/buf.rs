//! Owned, page-aligned I/O buffers from a bounded pool.
//!
//! A request takes all buffers it will ever need before it starts and then holds them, so a full pool delays new
//! requests and never deadlocks old ones. Buffers of one size are reused without being cleared; [`BufPool::alloc`]
//! callers overwrite what they read from, or ask for [`BufPool::alloc_zeroed`].

use crate::{Errno, Share, Stage};
use smallvec::SmallVec;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::task::{Poll, Waker};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Alignment and granularity of buffers: enough for O_DIRECT on any sector size, and one guest page.
pub const PAGE_BYTES: usize = 4096;

/// Largest single buffer; a guest request of 256 indirect segments is 1 MiB.
pub(crate) const MAX_BUF_BYTES: usize = 4 << 20;
/// Size classes are powers of two of pages: 4 KiB .. 4 MiB.
const CLASSES: usize = 11;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub(crate) struct Page([u8; PAGE_BYTES]);

/// A list of buffers that one vectored operation moves; one buffer needs no heap.
pub type IoVec = SmallVec<[IoBuf; 1]>;

/// An owned buffer, aligned to 4096 bytes at its start; dereferences to its bytes. Returns to its pool when dropped.
pub struct IoBuf {
    pages: Pages,
    len: usize,
    home: Option<Rc<PoolInner>>,
    share: Option<Share>,
}

/// The memory of a buffer: a power-of-two number of pages if it comes from a pool or a budget.
pub(crate) type Pages = Box<[Page]>;

/// What a buffer of `len_bytes` costs a pool or a [`Budget`](crate::Budget), in bytes: whole size classes.
pub fn cost_of(len_bytes: usize) -> usize {
    PAGE_BYTES << class_of(len_bytes)
}

impl IoBuf {
    /// A zeroed buffer outside any pool, for set-up work such as opening and creating images.
    ///
    /// # Errors
    /// `EINVAL` above 4 MiB.
    pub fn unpooled(len_bytes: usize) -> Result<Self, Errno> {
        if len_bytes > MAX_BUF_BYTES {
            return Err(Errno::EINVAL);
        }
        Ok(Self { pages: new_pages(len_bytes.div_ceil(PAGE_BYTES)), len: len_bytes, home: None, share: None })
    }

    /// A buffer outside any pool that holds a copy of `bytes` (at most 4 MiB, as for [`IoBuf::unpooled`]).
    ///
    /// # Errors
    /// `EINVAL` above 4 MiB.
    pub fn copy_of(bytes: &[u8]) -> Result<Self, Errno> {
        let mut buf = Self::unpooled(bytes.len())?;
        buf.copy_from_slice(bytes);
        Ok(buf)
    }

    /// `pages` as a buffer that returns `share` when it is dropped.
    pub(crate) fn with_share(pages: Pages, len_bytes: usize, share: Share) -> Self {
        Self { pages, len: len_bytes, home: None, share: Some(share) }
    }

    /// Shortens the buffer to `len_bytes`; longer values leave it as it is.
    pub fn truncate(&mut self, len_bytes: usize) {
        self.len = self.len.min(len_bytes);
    }

    /// Undoes [`IoBuf::truncate`]: the buffer has `len_bytes` again, at most all of its memory. What appears has the
    /// bytes that were there before; in a part that was never used these are of any earlier user of the memory.
    pub fn untruncate(&mut self, len_bytes: usize) {
        self.len = self.len.max(len_bytes.min(self.pages.as_bytes().len()));
    }
}

impl Deref for IoBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.pages.as_bytes()[..self.len]
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.pages.as_mut_bytes()[..self.len]
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({} bytes)", self.len)
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        let mut pages = std::mem::take(&mut self.pages);
        let count = pages.len();
        if let Some(share) = self.share.take() {
            share.end_with(std::mem::take(&mut pages));
        }
        if let Some(home) = self.home.take() {
            home.give_back(count, pages);
        }
    }
}

fn new_pages(count: usize) -> Box<[Page]> {
    // Fails only when the allocator does, which is not survivable anyway.
    <[Page]>::new_box_zeroed_with_elems(count).unwrap_or_else(|_| panic!("out of memory for {count} pages"))
}

/// Total length in bytes of the buffers of `bufs`.
pub fn bytes_of(bufs: &[IoBuf]) -> usize {
    bufs.iter().map(|b| b.len()).sum()
}

/// Copies `src` into `bufs`, starting at byte `at` of their concatenation. `src` must fit.
pub fn copy_from_slice(bufs: &mut [IoBuf], mut at: usize, mut src: &[u8]) {
    for buf in bufs {
        if at >= buf.len() {
            at -= buf.len();
            continue;
        }
        let n = src.len().min(buf.len() - at);
        buf[at..at + n].copy_from_slice(&src[..n]);
        src = &src[n..];
        at = 0;
        if src.is_empty() {
            return;
        }
    }
    assert!(src.is_empty(), "copy of {} bytes past the end of the buffers", src.len());
}

/// Fills `dst`, starting at byte `at` of the concatenation of `bufs`. `dst` must not reach past their end.
pub fn copy_to_slice(bufs: &[IoBuf], mut at: usize, mut dst: &mut [u8]) {
    for buf in bufs {
        if at >= buf.len() {
            at -= buf.len();
            continue;
        }
        let n = dst.len().min(buf.len() - at);
        dst[..n].copy_from_slice(&buf[at..at + n]);
        dst = &mut dst[n..];
        at = 0;
        if dst.is_empty() {
            return;
        }
    }
    assert!(dst.is_empty(), "copy of {} bytes past the end of the buffers", dst.len());
}

/// Memory kept for reuse, by size class.
#[derive(Default)]
pub(crate) struct Kept {
    free: [Vec<Pages>; CLASSES],
    pages: usize,
}

impl Kept {
    pub(crate) fn bytes(&self) -> usize {
        self.pages * PAGE_BYTES
    }

    /// Memory of `bytes`, a size class: reused from an earlier buffer, or new.
    pub(crate) fn take(&mut self, bytes: usize) -> Pages {
        let reused = self.free.get_mut(class_of(bytes)).and_then(Vec::pop);
        self.pages -= reused.as_ref().map_or(0, |pages| pages.len());
        reused.unwrap_or_else(|| new_pages(bytes / PAGE_BYTES))
    }

    /// Keeps `pages` if the total kept stays within both `room_bytes` and `most_bytes`.
    pub(crate) fn put(&mut self, pages: Pages, room_bytes: usize, most_bytes: usize) {
        if (self.pages + pages.len()) * PAGE_BYTES <= room_bytes.min(most_bytes) {
            self.pages += pages.len();
            self.free[pages.len().trailing_zeros() as usize].push(pages);
        }
    }

    /// Frees memory until at most `room_bytes` are kept, the largest pieces first.
    pub(crate) fn shed(&mut self, room_bytes: usize) {
        if self.bytes() <= room_bytes {
            return;
        }
        for free in self.free.iter_mut().rev() {
            while self.pages * PAGE_BYTES > room_bytes
                && let Some(pages) = free.pop()
            {
                self.pages -= pages.len();
            }
        }
    }
}

/// A bounded source of [`IoBuf`]s; clones share the bound.
#[derive(Clone)]
pub struct BufPool(Rc<PoolInner>);

struct PoolInner {
    limit_pages: usize,
    /// Where the memory comes from, if it comes from a budget.
    stage: Option<Stage>,
    state: RefCell<PoolState>,
}

#[derive(Default)]
struct PoolState {
    used_pages: usize,
    /// Together with what is handed out it stays within the limit.
    kept: Kept,
    /// First come, first served: a large request is not starved by small ones after it.
    waiting: VecDeque<(u64, Waker)>,
    next_ticket: u64,
}

impl BufPool {
    /// A pool that never has more than `limit_bytes` (rounded down to pages, at least one page) handed out.
    pub fn new(limit_bytes: usize) -> Self {
        Self::with(limit_bytes, None)
    }

    /// As [`BufPool::new`], with memory taken from `stage`. The rules of [`Stage::take`] for waiting callers hold for
    /// [`BufPool::alloc`] as well: no buffer above the stage's guarantee, and a caller that holds one asks for no other
    /// here.
    pub fn of_stage(limit_bytes: usize, stage: Stage) -> Self {
        Self::with(limit_bytes, Some(stage))
    }

    fn with(limit_bytes: usize, stage: Option<Stage>) -> Self {
        let limit_pages = (limit_bytes / PAGE_BYTES).max(1);
        Self(Rc::new(PoolInner { limit_pages, stage, state: RefCell::default() }))
    }

    /// Bytes handed out now, counted in whole size classes.
    pub fn used_bytes(&self) -> usize {
        self.0.state.borrow().used_pages * PAGE_BYTES
    }

    /// A buffer of `len_bytes` with unspecified content, as soon as the pool has room. A request above the pool's
    /// limit is served when the pool is otherwise empty, so that no size waits forever.
    ///
    /// # Errors
    /// `EINVAL` above 4 MiB.
    pub async fn alloc(&self, len_bytes: usize) -> Result<IoBuf, Errno> {
        if len_bytes > MAX_BUF_BYTES {
            return Err(Errno::EINVAL);
        }
        let place = self.place(1 << class_of(len_bytes)).await;
        let Some(stage) = &self.0.stage else { return Ok(place.buffer(len_bytes)) };
        let mut buf = stage.buffer(len_bytes).await?;
        buf.home = Some(place.taken());
        Ok(buf)
    }

    /// Room for buffers of `lens` bytes, as soon as the pool has it for all of them; two callers that take buffers
    /// one by one could wait for each other. More than the pool's limit is served when the pool is otherwise empty.
    pub async fn room(&self, lens: impl Iterator<Item = usize>) -> Room {
        let pages = lens.map(|len| 1 << class_of(len)).sum();
        Room(self.place(pages).await)
    }

    async fn place(&self, pages: usize) -> Place {
        let place = if self.0.state.borrow().waiting.is_empty() { self.0.try_place(pages) } else { None };
        match place {
            Some(place) => place,
            None => {
                let mut turn = Turn { pool: &self.0, ticket: None };
                poll_fn(|cx| turn.poll(pages, cx.waker())).await
            }
        }
    }

    /// As [`BufPool::alloc`], with zeros in it.
    ///
    /// # Errors
    /// `EINVAL` above 4 MiB.
    pub async fn alloc_zeroed(&self, len_bytes: usize) -> Result<IoBuf, Errno> {
        let mut buf = self.alloc(len_bytes).await?;
        buf.fill(0);
        Ok(buf)
    }
}

/// Room for several buffers of a pool, whose memory comes from a [`Share`].
pub struct Room(Place);

impl Room {
    /// A buffer of `len_bytes` of unspecified content out of `share`.
    ///
    /// # Errors
    /// `ENOMEM` where the room or the share has too little, `EINVAL` above 4 MiB.
    pub fn buffer(&mut self, share: &mut Share, len_bytes: usize) -> Result<IoBuf, Errno> {
        let pages = 1 << class_of(len_bytes);
        let left = self.0.pages.checked_sub(pages).ok_or(Errno::ENOMEM)?;
        let mut buf = share.buffer(len_bytes)?;
        self.0.pages = left;
        buf.home = self.0.home.clone();
        Ok(buf)
    }
}

/// Room taken from a pool, before there is a buffer.
struct Place {
    home: Option<Rc<PoolInner>>,
    pages: usize,
}

impl Place {
    fn buffer(self, len: usize) -> IoBuf {
        let pages = self.pages;
        let home = self.taken();
        let mut state = home.state.borrow_mut();
        let pages = state.kept.take(pages * PAGE_BYTES);
        let room = home.limit_pages.saturating_sub(state.used_pages).saturating_mul(PAGE_BYTES);
        state.kept.shed(room);
        drop(state);
        IoBuf { pages, len, home: Some(home), share: None }
    }

    /// The pool; the caller must tell it when the room is free again.
    fn taken(mut self) -> Rc<PoolInner> {
        self.home.take().expect("a place is taken once")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.give_back(self.pages, Pages::default());
        }
    }
}

impl PoolInner {
    fn try_place(self: &Rc<Self>, pages: usize) -> Option<Place> {
        let mut state = self.state.borrow_mut();
        if state.used_pages > 0 && state.used_pages + pages > self.limit_pages {
            return None;
        }
        state.used_pages += pages;
        Some(Place { home: Some(Rc::clone(self)), pages })
    }

    /// `count` fewer pages are handed out; `pages`, if any, may be reused.
    fn give_back(&self, count: usize, pages: Pages) {
        let mut state = self.state.borrow_mut();
        state.used_pages -= count;
        if !pages.is_empty() {
            let room = self.limit_pages.saturating_sub(state.used_pages).saturating_mul(PAGE_BYTES);
            state.kept.put(pages, room, room);
        }
        if let Some((_, waker)) = state.waiting.front() {
            waker.wake_by_ref();
        }
    }
}

fn class_of(len: usize) -> usize {
    len.div_ceil(PAGE_BYTES).max(1).next_power_of_two().trailing_zeros() as usize
}

struct Turn<'a> {
    pool: &'a Rc<PoolInner>,
    ticket: Option<u64>,
}

impl Turn<'_> {
    fn poll(&mut self, pages: usize, waker: &Waker) -> Poll<Place> {
        let ticket = match self.ticket {
            Some(ticket) => ticket,
            None => {
                let mut state = self.pool.state.borrow_mut();
                let ticket = state.next_ticket;
                state.next_ticket += 1;
                state.waiting.push_back((ticket, waker.clone()));
                self.ticket = Some(ticket);
                ticket
            }
        };
        let first = self.pool.state.borrow().waiting.front().is_some_and(|w| w.0 == ticket);
        if first && let Some(place) = self.pool.try_place(pages) {
            return Poll::Ready(place);
        }
        let mut state = self.pool.state.borrow_mut();
        if let Some(entry) = state.waiting.iter_mut().find(|w| w.0 == ticket) {
            entry.1.clone_from(waker);
        }
        Poll::Pending
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = self.pool.state.borrow_mut();
        state.waiting.retain(|w| w.0 != ticket);
        // There may be room for the next in line, or this one was woken and did not use its turn.
        if let Some((_, waker)) = state.waiting.front() {
            waker.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_sized() {
        let buf = IoBuf::unpooled(5000).unwrap();
        assert_eq!(buf.len(), 5000);
        assert_eq!(buf.as_ptr().addr() % PAGE_BYTES, 0);
        assert!(IoBuf::unpooled(MAX_BUF_BYTES + 1).is_err());
    }

    #[test]
    fn copies_cross_buffers() {
        let mut bufs: IoVec =
            [IoBuf::unpooled(3).unwrap(), IoBuf::unpooled(4).unwrap()].into_iter().collect();
        copy_from_slice(&mut bufs, 2, &[1, 2, 3]);
        let mut out = [9; 4];
        copy_to_slice(&bufs, 1, &mut out);
        assert_eq!(out, [0, 1, 2, 3]);
    }

    #[test]
    fn pool_is_bounded_and_first_come_first_served() {
        let pool = BufPool::new(2 * PAGE_BYTES);
        let waker = Waker::noop();
        let mut cx = std::task::Context::from_waker(waker);
        let mut take = |len| {
            let mut alloc = Box::pin(pool.alloc(len));
            match alloc.as_mut().poll(&mut cx) {
                Poll::Ready(buf) => Ok(buf.unwrap()),
                Poll::Pending => Err(()),
            }
        };
        let (a, b) = (take(1).unwrap(), take(4096).unwrap());
        assert!(take(1).is_err(), "the pool is used up");
        drop(a);
        let mut large = Box::pin(pool.alloc(8192));
        assert!(large.as_mut().poll(&mut cx).is_pending());
        let mut small = Box::pin(pool.alloc(1));
        assert!(small.as_mut().poll(&mut cx).is_pending(), "the large one is first in line");
        drop(b);
        let Poll::Ready(Ok(got)) = large.as_mut().poll(&mut cx) else { panic!("room for the large one") };
        drop(large);
        assert!(small.as_mut().poll(&mut cx).is_pending());
        drop(got);
        assert!(small.as_mut().poll(&mut cx).is_ready());
        drop(small);
        assert_eq!(pool.used_bytes(), 0);
    }

    #[test]
    fn room_for_several_buffers_is_taken_at_once_and_given_back() {
        let (pool, stage) =
            (BufPool::new(4 * PAGE_BYTES), crate::Budget::new(1 << 20).stage(1 << 16).unwrap());
        let mut cx = std::task::Context::from_waker(Waker::noop());
        let mut room = Box::pin(pool.room([4096, 5000].into_iter()));
        let Poll::Ready(mut room) = room.as_mut().poll(&mut cx) else { panic!("the pool is empty") };
        assert_eq!(pool.used_bytes(), 3 * PAGE_BYTES);
        let mut share = stage.try_take(cost_of(4096) + cost_of(5000)).unwrap();
        let small = room.buffer(&mut share, 4096).unwrap();
        assert_eq!(room.buffer(&mut share, 3 * PAGE_BYTES).err(), Some(Errno::ENOMEM));
        let mut second = Box::pin(pool.alloc(2 * PAGE_BYTES));
        assert!(second.as_mut().poll(&mut cx).is_pending());
        drop(room);
        assert!(second.as_mut().poll(&mut cx).is_ready(), "what was not used goes back with the room");
        drop((small, second));
        assert_eq!(pool.used_bytes(), 0);
    }

    #[test]
    fn what_is_kept_for_reuse_is_within_the_limit_too() {
        let pool = BufPool::new(4 * PAGE_BYTES);
        let take = |len| pool.0.try_place(1 << class_of(len)).unwrap().buffer(len);
        let kept = || pool.0.state.borrow().kept.pages;
        let all = [take(1), take(1), take(1), take(1)];
        drop(all);
        assert_eq!(kept(), 4);
        let large = take(3 * PAGE_BYTES);
        assert!(kept() + pool.used_bytes() / PAGE_BYTES <= 4, "room for the large one was made");
        assert_eq!(kept(), 0);
        drop(large);
        let small = take(1);
        assert_eq!(kept(), 0, "the large one is too much beside a small one");
        drop(small);
        assert_eq!((pool.used_bytes(), kept()), (0, 1));
    }
}
