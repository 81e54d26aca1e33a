//! Parts of a disk that cannot be read.

use super::pump::read;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_core::Node;
use tap_host::{BufPool, Errno, IoBuf, SECTOR_BYTES, Tried};

/// Sectors that cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lost {
    /// First sector.
    pub(super) start: u64,
    /// Sectors, at least 1.
    pub(super) count: u64,
    /// What reading them fails with.
    pub(super) error: Errno,
}

impl Lost {
    /// For people: which bytes of `disk`, and why.
    pub(super) fn text(&self, disk: &str) -> String {
        let (start, len) = (self.start * SECTOR_BYTES, self.count * SECTOR_BYTES);
        format!("{len} bytes of {disk} from byte {start} on cannot be read: {}", self.error)
    }

    /// Whether `next` continues it.
    fn joins(&self, next: &Lost) -> bool {
        self.start + self.count == next.start && self.error == next.error
    }
}

/// Whether `error` says that something is damaged: no other try will help, and the disk is still there.
pub(super) fn is_damage(error: Errno) -> bool {
    let is_gone = [Errno::ESHUTDOWN, Errno::ENOTCONN, Errno::ENODEV, Errno::ENXIO].contains(&error);
    !Tried::Request.may_pass(error) && !is_gone
}

/// Runs that are remembered; when there are more, the first ones in the disk are reported early.
const MAX_RUNS: usize = 4096;

/// What was lost so far, with neighbours joined. Pieces of a disk end in any order.
#[derive(Default)]
pub(super) struct Losses(BTreeMap<u64, Lost>);

impl Losses {
    /// Adds sectors that were not added before; returns a run to report now if there are too many.
    pub(super) fn add(&mut self, mut lost: Lost) -> Option<Lost> {
        let before = self.0.range(..lost.start).next_back().map(|(_, before)| *before);
        if let Some(before) = before.filter(|before| before.joins(&lost)) {
            lost = Lost { start: before.start, count: before.count + lost.count, ..lost };
        }
        let end = lost.start + lost.count;
        if let Some(after) = self.0.get(&end).copied().filter(|after| lost.joins(after)) {
            self.0.remove(&end);
            lost.count += after.count;
        }
        self.0.insert(lost.start, lost);
        if self.0.len() <= MAX_RUNS { None } else { self.0.pop_first().map(|(_, first)| first) }
    }

    /// The runs that were not reported, in order.
    pub(super) fn into_runs(self) -> impl Iterator<Item = Lost> {
        self.0.into_values()
    }
}

/// What can be read of a run whose read has failed, with zeros in place of the other sectors, which are returned as
/// well. It narrows them down by halves, each of which is tried once.
pub(super) async fn read_rest(
    node: &Rc<dyn Node>,
    pool: &BufPool,
    all: Lost,
) -> Result<(IoBuf, Vec<Lost>), Errno> {
    let Lost { start, count, .. } = all;
    let mut whole = pool.alloc_zeroed((count * SECTOR_BYTES) as usize).await?;
    let mut lost: Vec<Lost> = Vec::new();
    // Runs that have failed, the next one in the disk last.
    let mut failed = vec![all];
    while let Some(run) = failed.pop() {
        if run.count == 1 {
            match lost.last_mut() {
                Some(last) if last.joins(&run) => last.count += 1,
                _ => lost.push(run),
            }
            continue;
        }
        let half = run.count / 2;
        for (at, count) in [(run.start + half, run.count - half), (run.start, half)] {
            match read(node, pool, at, count).await {
                Ok(buf) => {
                    let from = ((at - start) * SECTOR_BYTES) as usize;
                    whole[from..from + buf.len()].copy_from_slice(&buf);
                }
                Err(error) if is_damage(error) => failed.push(Lost { start: at, count, error }),
                Err(error) => return Err(error),
            }
        }
    }
    Ok((whole, lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What follows would be taken for damage, to the end of the disk.
    #[test]
    fn a_disk_that_is_gone_is_not_damaged() {
        for gone in [Errno::ENOTCONN, Errno::ENODEV, Errno::ENXIO, Errno::ESHUTDOWN, Errno::EAGAIN] {
            assert!(!is_damage(gone), "{gone:?}");
        }
        assert!(is_damage(Errno::EIO));
    }
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};
    use tap_core::{LocalBoxFuture, NodeInfo, Request, Response};

    fn lost(start: u64, count: u64) -> Lost {
        Lost { start, count, error: Errno::EIO }
    }

    #[test]
    fn neighbours_are_joined_in_any_order() {
        let mut losses = Losses::default();
        let other = Lost { error: Errno::ENOSPC, ..lost(30, 1) };
        for run in [lost(20, 10), lost(0, 5), lost(10, 10), lost(6, 1), lost(5, 1), other] {
            assert_eq!(losses.add(run), None);
        }
        assert_eq!(losses.into_runs().collect::<Vec<_>>(), [lost(0, 7), lost(10, 20), other]);
    }

    #[test]
    fn too_many_runs_are_reported_early() {
        let mut losses = Losses::default();
        for n in 0..MAX_RUNS as u64 {
            assert_eq!(losses.add(lost(2 * n, 1)), None);
        }
        assert_eq!(losses.add(lost(2 * MAX_RUNS as u64, 1)), Some(lost(0, 1)));
        assert_eq!(losses.add(lost(3, 1)), None, "it joins two");
        assert_eq!(losses.into_runs().count(), MAX_RUNS - 1);
    }

    /// Reads of these sectors fail.
    struct Bad(Vec<u64>, Errno);

    impl Node for Bad {
        fn submit(&self, mut request: Request) -> LocalBoxFuture<Response> {
            let (start, end) =
                (request.range.start.0, request.range.start.0 + u64::from(request.range.count));
            let hit = self.0.iter().any(|sector| (start..end).contains(sector));
            request.bufs.iter_mut().for_each(|buf| buf.fill(7));
            let result = if hit { Err(self.1) } else { Ok(()) };
            Box::pin(std::future::ready(Response { result, bufs: request.bufs }))
        }
        fn info(&self) -> NodeInfo {
            NodeInfo::new(1 << 20, true)
        }
        fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    /// Reads 64 sectors from sector 100 on, after a read of all of them has failed.
    fn rest(bad: Bad) -> Result<(IoBuf, Vec<Lost>), Errno> {
        let (node, pool): (Rc<dyn Node>, _) = (Rc::new(bad), BufPool::new(1 << 20));
        match pin!(read_rest(&node, &pool, lost(100, 64))).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => result,
            Poll::Pending => panic!("nothing waits"),
        }
    }

    #[test]
    fn every_sector_that_can_be_read_is_read() {
        for bad in [vec![], vec![100], vec![163], vec![110, 111, 112, 140], (100..164).collect()] {
            let (buf, runs) = rest(Bad(bad.clone(), Errno::EIO)).unwrap();
            let sectors = (100..).zip(buf.chunks(512));
            assert!(sectors.clone().count() == 64);
            for (sector, bytes) in sectors {
                let want = if bad.contains(&sector) { 0 } else { 7 };
                assert!(bytes.iter().all(|b| *b == want), "sector {sector} of {bad:?}");
            }
            let found: Vec<u64> = runs.iter().flat_map(|run| run.start..run.start + run.count).collect();
            assert_eq!(found, bad);
            assert!(runs.len() <= 2, "{runs:?}");
        }
    }

    #[test]
    fn other_errors_than_damage_are_no_loss() {
        for error in [Errno::ENOMEM, Errno::ESHUTDOWN] {
            assert_eq!(rest(Bad(vec![120], error)).err(), Some(error));
        }
    }
}
