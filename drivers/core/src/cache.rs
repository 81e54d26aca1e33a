//! What an answered write means to the one who wrote.
//!
//! ```text
//!   write back      as it is: durable after a flush       (no node needed)
//!   write through   every answered write is durable: a flush follows it
//!   unsafe          flushes are answered and not carried out; only closing makes durable
//! ```

use crate::{Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, WaitReport};
use std::rc::Rc;
use tap_host::{Errno, SectorRange};

/// When writes become durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CacheMode {
    /// At a flush.
    #[default]
    WriteBack,
    /// Before they are answered.
    WriteThrough,
    /// When the disk is closed; a crash of the host may leave anything. For disks that can be made anew.
    Unsafe,
}

impl CacheMode {
    /// `lower` with this mode.
    pub fn over(self, lower: Rc<dyn Node>) -> Rc<dyn Node> {
        if self == CacheMode::WriteBack { lower } else { Rc::new(Cached { mode: self, lower }) }
    }
}

struct Cached {
    mode: CacheMode,
    lower: Rc<dyn Node>,
}

impl Node for Cached {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        match (self.mode, request.op) {
            (CacheMode::Unsafe, Op::Flush) => {
                Box::pin(std::future::ready(Response { result: Ok(()), bufs: request.bufs }))
            }
            (CacheMode::WriteThrough, op) if op.is_write() => {
                let (answer, lower) = (self.lower.submit(request), Rc::clone(&self.lower));
                Box::pin(async move {
                    let response = answer.await;
                    if response.result.is_err() {
                        return response;
                    }
                    let result = lower.submit(Request::flush()).await.result;
                    Response { result, bufs: response.bufs }
                })
            }
            _ => self.lower.submit(request),
        }
    }

    fn extents(&self, range: SectorRange, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        self.lower.extents(range, most)
    }

    fn info(&self) -> NodeInfo {
        self.lower.info()
    }

    fn wait_report(&self) -> Vec<WaitReport> {
        self.lower.wait_report()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.lower.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    struct Notes {
        seen: RefCell<Vec<Op>>,
        write: Result<(), Errno>,
    }

    impl Node for Notes {
        fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
            self.seen.borrow_mut().push(request.op);
            let result = if request.op.is_write() { self.write } else { Ok(()) };
            Box::pin(std::future::ready(Response { result, bufs: request.bufs }))
        }
        fn info(&self) -> NodeInfo {
            NodeInfo { size_sectors: 8, read_only: false }
        }
        fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    fn seen(mode: CacheMode, write: Result<(), Errno>) -> (Vec<Op>, Result<(), Errno>) {
        let notes = Rc::new(Notes { seen: RefCell::default(), write });
        let node = mode.over(Rc::clone(&notes) as Rc<dyn Node>);
        let ask = |request| {
            let Poll::Ready(response) =
                pin!(node.submit(request)).poll(&mut Context::from_waker(Waker::noop()))
            else {
                panic!("nothing here waits")
            };
            response.result
        };
        let result = ask(Request::discard(SectorRange::new(0, 1)));
        assert_eq!(ask(Request::flush()), Ok(()));
        (notes.seen.take(), result)
    }

    #[test]
    fn writes_are_flushed_or_flushes_are_left_out() {
        let flush = Op::Flush;
        assert_eq!(seen(CacheMode::WriteBack, Ok(())).0, [Op::Discard, flush]);
        assert_eq!(seen(CacheMode::WriteThrough, Ok(())).0, [Op::Discard, flush, flush]);
        assert_eq!(seen(CacheMode::Unsafe, Ok(())).0, [Op::Discard]);
        let failed = seen(CacheMode::WriteThrough, Err(Errno::EIO));
        assert_eq!(failed, (vec![Op::Discard, flush], Err(Errno::EIO)), "a failed write is not flushed");
    }
}
