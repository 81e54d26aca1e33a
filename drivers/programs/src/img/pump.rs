//! Iterates over a disk from start to end: extents one by one, and work with several requests in flight.

use futures_util::stream::{FuturesUnordered, StreamExt};
use smallvec::smallvec;
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use tap_core::{Extent, Node, Request, Source};
use tap_host::{BufPool, Errno, IoBuf, SECTOR_BYTES, SectorRange};

/// Largest piece read at once.
pub(super) const PIECE_SECTORS: u64 = 2048;

/// Extents per query.
const MAX_EXTENTS: usize = 1024;

/// A run of a disk.
#[derive(Clone)]
pub(super) struct Run {
    /// First sector.
    pub(super) start: u64,
    /// Sectors.
    pub(super) count: u64,
    /// Their extent.
    pub(super) extent: Extent,
}

/// The extents of a disk, from its first sector to its last.
pub(super) struct Extents {
    node: Rc<dyn Node>,
    at: u64,
    known: VecDeque<Extent>,
}

impl Extents {
    pub(super) fn new(node: &Rc<dyn Node>) -> Self {
        Self { node: Rc::clone(node), at: 0, known: VecDeque::new() }
    }

    /// The run that begins where the last one ended; `None` at the end of the disk. Data comes in runs of at most `max`
    /// sectors; zeros, which are not read, in runs of up to 2^32 - 1.
    ///
    /// # Errors
    /// Those of the node; the next call tries again at the same place, see [`Extents::skip`].
    pub(super) async fn next(&mut self, max: u64) -> Result<Option<Run>, Errno> {
        let left = self.left();
        if left == 0 {
            return Ok(None);
        }
        if self.known.is_empty() {
            let range = SectorRange::new(self.at, left.min(u64::from(u32::MAX)) as u32);
            self.known = self.node.extents(range, MAX_EXTENTS).await?.into();
        }
        let first = self.known.front_mut().ok_or(Errno::EIO)?;
        let max = if first.zero { u64::from(u32::MAX) } else { max };
        let count = first.count.min(max).min(left);
        let run = Run { start: self.at, count, extent: first.clone() };
        first.count -= count;
        if first.count == 0 {
            self.known.pop_front();
        }
        self.at += count;
        Ok(Some(run))
    }

    /// The next `max` sectors, or those up to the end of the disk, of which nothing is known.
    pub(super) fn skip(&mut self, max: u64) -> Run {
        let (start, count) = (self.at, self.left().min(max));
        self.at += count;
        Run { start, count, extent: Extent { count, source: Source::UNKNOWN, zero: false, allocated: true } }
    }

    fn left(&self) -> u64 {
        self.node.info().size_sectors - self.at
    }
}

/// A set of tasks, of which a bounded number runs at once.
pub(super) struct TaskSet<F: Future> {
    running: FuturesUnordered<F>,
    max: usize,
}

impl<F: Future> TaskSet<F> {
    /// Runs at most `max` tasks at once; 0 acts as 1.
    pub(super) fn new(max: usize) -> Self {
        Self { running: FuturesUnordered::new(), max }
    }

    /// Starts `work` once there is room for it; returns the result of the task that made room.
    pub(super) async fn start(&mut self, work: F) -> Option<F::Output> {
        let done = if self.running.len() >= self.max { self.running.next().await } else { None };
        self.running.push(work);
        done
    }

    /// The result of the next task to end; `None` if none runs.
    pub(super) async fn finish(&mut self) -> Option<F::Output> {
        self.running.next().await
    }
}

/// Reads at most [`PIECE_SECTORS`].
pub(super) async fn read(
    node: &Rc<dyn Node>,
    pool: &BufPool,
    start: u64,
    count: u64,
) -> Result<IoBuf, Errno> {
    let buf = pool.alloc((count * SECTOR_BYTES) as usize).await?;
    let range = SectorRange::new(start, count as u32);
    let mut response = node.submit(Request::read(range, smallvec![buf])).await;
    response.result?;
    response.bufs.pop().ok_or(Errno::EIO)
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::{pending, ready};
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn every_byte_is_checked_for_zero() {
        for len in [0, 1, 63, 64, 65, 200] {
            assert!(is_zero(&vec![0; len]));
            for at in 0..len {
                let mut bytes = vec![0; len];
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
            }
        }
    }

    #[test]
    fn a_task_set_never_exceeds_its_limit() {
        let started = Cell::new(0);
        let mut tasks = TaskSet::new(2);
        let mut work = pin!(async {
            for _ in 0..3 {
                tasks.start(pending::<()>()).await;
                started.set(started.get() + 1);
            }
        });
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!((work.as_mut().poll(&mut cx), started.get()), (Poll::Pending, 2));
        let mut tasks = TaskSet::new(1);
        let mut work =
            pin!(async { (tasks.start(ready(1)).await, tasks.start(ready(2)).await, tasks.finish().await) });
        assert_eq!(work.as_mut().poll(&mut cx), Poll::Ready((None, Some(1), Some(2))));
    }
}
