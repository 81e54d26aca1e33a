//! A disk that stays while its image is away.
//!
//! ```text
//!   running ──park──► drain ──► flush ──► no image, requests wait, the image is closed
//!      ▲                 │ too late, or an error: as before
//!      └────unpark, with the same image opened again, or another one that can stand in for it
//! ```
//!
//! Whoever uses the disk notices a delay and nothing else. So an image that takes the place of another promises what
//! that one promised: see [`StandIn`]. Only the size may change, while the image is away: see [`Disk::grow_parked`].

use crate::{
    Child, Disk, ExchangeError, Extent, LocalBoxFuture, Node, NodeInfo, NodeName, Op, Request, Response,
};
use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, ready};
use std::rc::Rc;
use tap_host::{Errno, Log, Probe, SectorRange, Tasks, Time, unless};

tap_host::listed! {
    pub(super) BUGS: Bug;
    PARKED_LATE_STAYS = "parked-late-stays", "a disk that could not be paused in time lets no requests through afterwards";
    PARKED_OPEN = "parked-open", "a paused disk keeps its image open";
    STAND_IN_UNCHECKED = "stand-in-unchecked", "an image of another size takes the place of a disk's own";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    PARKED = "parked", "a disk was paused and its image closed";
    PARKED_TOO_LATE = "parked-too-late", "a disk could not be paused in time, and went on";
    STOOD_IN = "stood-in", "an image with other block sizes took the place of a disk's own";
}

/// Why a disk was not parked. It has its image, and requests go through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParkError {
    /// It is closed.
    #[error("the disk is closed")]
    Closed,
    /// Requests in flight did not end in time.
    #[error("its requests did not end in time")]
    Late,
    /// Answered writes could not be made durable.
    #[error("flush the disk: {0}")]
    Flush(Errno),
}

/// Why an image cannot take the place of another.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unfit {
    /// It has another size.
    #[error("it has {new} sectors, and the disk has {old}")]
    Size {
        /// The disk's, in sectors.
        old: u64,
        /// The image's, in sectors.
        new: u64,
    },
    /// One of them takes no writes.
    #[error("it is {}, and the disk is not", if *read_only { "read-only" } else { "writable" })]
    Mode {
        /// Whether it is the new one.
        read_only: bool,
    },
    /// Its writes are durable later.
    #[error("its writes are durable later than the disk promises")]
    Durability,
}

/// What is below the scheduler of a disk without image. No request gets here but a flush, which has nothing to do.
struct Absent(Rc<Cell<NodeInfo>>);

impl Node for Absent {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let result = if request.op == Op::Flush { Ok(()) } else { Err(Errno::ESHUTDOWN) };
        Box::pin(ready(Response { result, bufs: request.bufs }))
    }

    fn info(&self) -> NodeInfo {
        self.0.get()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        Box::pin(ready(Ok(())))
    }
}

/// An image in the place of another, which promises what that one promised: the same size and mode, writes that are
/// durable no later. Block sizes and limits are those of the other one: they only say what is fast.
pub struct StandIn {
    node: Rc<dyn Node>,
    promised: NodeInfo,
}

impl StandIn {
    /// `node`, with the properties in `promised`; itself if it has them.
    ///
    /// # Errors
    /// [`Unfit`] if it cannot promise them; it is still open then.
    pub fn over(node: Rc<dyn Node>, promised: NodeInfo) -> Result<Rc<dyn Node>, Unfit> {
        let (old, new) = (promised.size_sectors, node.info().size_sectors);
        if new == old { Self::within(node, promised) } else { Err(Unfit::Size { old, new }) }
    }

    /// As [`StandIn::over`], but `node` may be larger: what is behind the promised end is not shown.
    ///
    /// # Errors
    /// [`Unfit`] if it cannot promise them; it is still open then.
    pub fn within(node: Rc<dyn Node>, promised: NodeInfo) -> Result<Rc<dyn Node>, Unfit> {
        let own = node.info();
        if own == promised {
            return Ok(node);
        }
        if own.size_sectors < promised.size_sectors {
            return Err(Unfit::Size { old: promised.size_sectors, new: own.size_sectors });
        }
        if own.read_only != promised.read_only {
            return Err(Unfit::Mode { read_only: own.read_only });
        }
        if own.durable > promised.durable {
            return Err(Unfit::Durability);
        }
        Ok(Rc::new(Self { node, promised }))
    }
}

impl Node for StandIn {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        self.node.submit(request)
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        self.node.extents(range, max)
    }

    fn info(&self) -> NodeInfo {
        self.promised
    }

    fn name(&self) -> Option<NodeName> {
        None
    }

    fn children(&self) -> Vec<Child> {
        vec![Child::lower(Rc::clone(&self.node))]
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.node.freeze()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.node.close()
    }
}

impl<H: Time + Tasks + Log + Probe> Disk<H> {
    /// Lets no more requests through, waits for those in flight unless `limit` completes before, makes everything
    /// durable and closes the image; the inner result is that of closing it. Requests wait until [`Disk::unpark`].
    ///
    /// # Errors
    /// [`ParkError`]: the disk runs as before.
    pub async fn park(&self, limit: impl Future<Output = ()>) -> Result<Result<(), Errno>, ParkError> {
        let info = Rc::clone(self.image_info());
        let drained = async {
            self.slot().pause().await.map_err(|_| ParkError::Closed)?;
            if self.host().bug(&PARKED_OPEN) {
                return Ok(None);
            }
            let absent = async |_| Ok::<_, Infallible>(Rc::new(Absent(info)) as Rc<dyn Node>);
            self.swap(absent).await.map(Some).map_err(|error| match error {
                ExchangeError::Closed => ParkError::Closed,
                ExchangeError::Flush(error) => ParkError::Flush(error),
                ExchangeError::Change(never) => match never {},
            })
        };
        let parked = unless(limit, drained).await.unwrap_or(Err(ParkError::Late));
        match parked {
            Ok(old) => {
                self.host().mark(&PARKED);
                Ok(match old {
                    Some(old) => old.close().await,
                    None => Ok(()),
                })
            }
            Err(why) => {
                if why == ParkError::Late {
                    self.host().mark(&PARKED_TOO_LATE);
                    if self.host().bug(&PARKED_LATE_STAYS) {
                        return Err(why);
                    }
                }
                // Closed meanwhile, it stays closed.
                let _closed = self.slot().resume();
                Err(why)
            }
        }
    }

    /// The image of a parked disk has become larger: from now on the disk has `size_sectors`, and so must every image
    /// that takes its place.
    ///
    /// # Panics
    /// If it would be smaller, or has its image.
    pub fn grow_parked(&self, size_sectors: u64) {
        let info = self.image_info().get();
        assert!(size_sectors >= info.size_sectors, "a disk becomes smaller");
        self.image_info().set(NodeInfo { size_sectors, ..info });
        assert_eq!(self.slot().info().size_sectors, size_sectors, "a disk grows that has its image");
    }

    /// `image`, as it can take the place of the disk's own.
    ///
    /// # Errors
    /// [`Unfit`]; `image` is still open.
    pub fn fit(&self, image: Rc<dyn Node>) -> Result<Rc<dyn Node>, Unfit> {
        let promised = self.image_info().get();
        if self.host().bug(&STAND_IN_UNCHECKED) {
            return Ok(Rc::new(StandIn { node: image, promised }));
        }
        let same = image.info() == promised;
        let fit = StandIn::over(image, promised)?;
        if !same {
            self.host().mark(&STOOD_IN);
        }
        Ok(fit)
    }

    /// As [`Disk::fit`], but `image` may be larger than the disk, which keeps its size: nobody knows yet whether that
    /// of the image is durable.
    ///
    /// # Errors
    /// [`Unfit`]; `image` is still open.
    pub fn fit_larger(&self, image: Rc<dyn Node>) -> Result<Rc<dyn Node>, Unfit> {
        StandIn::within(image, self.image_info().get())
    }

    /// Gives a parked disk `image`, which [`Disk::fit`] has returned, and lets requests through.
    ///
    /// # Errors
    /// [`ExchangeError`], if the disk is closed; `image` is still open.
    pub async fn unpark(&self, image: Rc<dyn Node>) -> Result<(), ExchangeError<Infallible>> {
        let _nothing = self.exchange(async |_| Ok::<_, Infallible>(image)).await?;
        self.slot().resume().map_err(|_| ExchangeError::Closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Pool, Script, read, write};
    use crate::{CacheMode, DiskConfig, Durable, SchedulerLimits};
    use std::future::pending;
    use tap_host::VbdId;

    fn disk(pool: &Pool, script: &Script) -> Rc<Disk<Pool>> {
        let config =
            DiskConfig { id: VbdId(1), cache: CacheMode::WriteBack, scheduler: SchedulerLimits::default() };
        Rc::new(Disk::new(pool, Rc::new(script.clone()), config))
    }

    #[test]
    fn requests_wait_while_the_image_is_away() {
        let (pool, first, second) = (Pool::new(), Script::default(), Script::default());
        let disk = disk(&pool, &first);
        let own = Rc::clone(&disk);
        let parked = pool.start(async move { own.park(pending()).await });
        pool.run();
        assert_eq!(parked.take(), Some(Ok(Ok(()))));
        assert_eq!((first.times_closed(), disk.slot().state()), (1, "paused"));
        let flushes = first.seen().iter().filter(|(op, _)| *op == Op::Flush).count();
        assert_eq!(flushes, 1, "everything is durable before the image is closed");
        let waiting = [write(3, 1), Request::flush()].map(|request| pool.start(disk.node().submit(request)));
        pool.run();
        assert!(waiting.iter().all(|answer| answer.get().is_none()));
        let (own, image) = (Rc::clone(&disk), Rc::new(second.clone()) as Rc<dyn Node>);
        let back = pool.start(async move { own.unpark(own.fit(image).unwrap()).await });
        pool.run();
        assert_eq!(back.take(), Some(Ok(())));
        assert!(waiting.iter().all(|answer| answer.take().unwrap().result == Ok(())));
        assert_eq!((disk.slot().state(), second.seen().len()), ("running", 2));
        assert_eq!(pool.start(async move { disk.close().await }).take(), Some(Ok(())));
        assert_eq!(second.times_closed(), 1);
    }

    #[test]
    fn a_disk_that_cannot_be_parked_in_time_goes_on() {
        let (pool, script) = (Pool::new(), Script::held());
        let disk = disk(&pool, &script);
        let slow = pool.start(disk.node().submit(write(3, 1)));
        let own = Rc::clone(&disk);
        let limit = pool.sleep_ns(5);
        let parked = pool.start(async move { own.park(limit).await });
        pool.run();
        let later = pool.start(disk.node().submit(read(9, 1)));
        pool.run();
        assert!(parked.get().is_none() && later.get().is_none(), "it drains");
        pool.run_through_time();
        assert_eq!(parked.take(), Some(Err(ParkError::Late)));
        assert_eq!((disk.slot().state(), script.times_closed()), ("running", 0));
        script.release();
        pool.run();
        assert!([slow, later].iter().all(|answer| answer.take().unwrap().result == Ok(())));
    }

    #[test]
    fn a_parked_disk_grows_with_its_image() {
        let (pool, first) = (Pool::new(), Script::default());
        let disk = disk(&pool, &first);
        let (own, old) = (Rc::clone(&disk), disk.slot().info().size_sectors);
        let parked = pool.start(async move { own.park(pending()).await });
        pool.run();
        assert_eq!(parked.take(), Some(Ok(Ok(()))));
        disk.grow_parked(old + 8);
        assert_eq!(disk.slot().info().size_sectors, old + 8);
        let small = Rc::new(Script::default()) as Rc<dyn Node>;
        assert_eq!(disk.fit(Rc::clone(&small)).err(), Some(Unfit::Size { old: old + 8, new: old }));
        assert_eq!(disk.fit_larger(small).err(), Some(Unfit::Size { old: old + 8, new: old }));
    }

    #[test]
    fn a_closed_disk_is_not_parked_and_a_parked_one_can_be_closed() {
        let (pool, script) = (Pool::new(), Script::default());
        let disk = disk(&pool, &script);
        let run = |own: Rc<Disk<Pool>>| {
            let parked = pool.start(async move { own.park(pending()).await });
            pool.run();
            parked.take().unwrap()
        };
        assert_eq!(run(Rc::clone(&disk)), Ok(Ok(())));
        let waiting = pool.start(disk.node().submit(write(3, 1)));
        let own = Rc::clone(&disk);
        assert_eq!(pool.start(async move { own.close().await }).take(), Some(Ok(())));
        pool.run();
        assert_eq!(waiting.take().unwrap().result, Err(Errno::ESHUTDOWN));
        assert_eq!((run(Rc::clone(&disk)), script.times_closed()), (Err(ParkError::Closed), 1));
        let (own, image) = (Rc::clone(&disk), Rc::new(Script::default()) as Rc<dyn Node>);
        let back = pool.start(async move { own.unpark(image).await });
        assert_eq!(back.take(), Some(Err(ExchangeError::Closed)));
    }

    #[test]
    fn an_image_that_breaks_the_promise_is_unfit() {
        struct Like(NodeInfo);
        impl Node for Like {
            fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
                Box::pin(ready(Response { result: Ok(()), bufs: request.bufs }))
            }
            fn info(&self) -> NodeInfo {
                self.0
            }
            fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
                Box::pin(ready(Ok(())))
            }
        }
        let old = NodeInfo::new(1000, false);
        let offered = |info: NodeInfo| StandIn::over(Rc::new(Like(info)), old).map(|node| node.info());
        assert_eq!(offered(NodeInfo { physical_block_bytes: 65_536, discard_bytes: 4096, ..old }), Ok(old));
        assert_eq!(offered(NodeInfo { durable: Durable::AtAnswer, ..old }), Ok(old));
        assert_eq!(
            offered(NodeInfo::new(999, false)).map_err(|unfit| unfit.to_string()),
            Err("it has 999 sectors, and the disk has 1000".to_owned())
        );
        let larger = || Rc::new(Like(NodeInfo::new(1001, false)));
        assert_eq!(StandIn::over(larger(), old).err(), Some(Unfit::Size { old: 1000, new: 1001 }));
        assert_eq!(StandIn::within(larger(), old).map(|node| node.info()), Ok(old));
        assert_eq!(offered(NodeInfo::new(1000, true)), Err(Unfit::Mode { read_only: true }));
        assert_eq!(offered(NodeInfo { durable: Durable::AtClose, ..old }), Err(Unfit::Durability));
        let strict = NodeInfo { durable: Durable::AtAnswer, ..old };
        let weaker = StandIn::over(Rc::new(Like(old)), strict);
        assert_eq!(weaker.err(), Some(Unfit::Durability));
    }
}
