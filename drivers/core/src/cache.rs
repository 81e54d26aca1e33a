//! Cache modes: what the answer to a write promises.
//!
//! ```text
//!   write back      unchanged: durable after a flush      (no node needed)
//!   write through   an answered write is durable: it is sent down with FUA
//!   unsafe          flushes are answered but not performed, FUA is dropped; only closing makes data durable
//! ```

use crate::{Child, Durable, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response};
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
    /// When the disk is closed; a crash of the host may leave anything. For disks that can be recreated.
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
            (mode, op) if op.is_write() => {
                let fua = mode == CacheMode::WriteThrough || mode == CacheMode::WriteBack && request.fua;
                self.lower.submit(request.with_fua(fua))
            }
            _ => self.lower.submit(request),
        }
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        self.lower.extents(range, max)
    }

    fn info(&self) -> NodeInfo {
        let durable = match self.mode {
            CacheMode::WriteBack => self.lower.info().durable,
            CacheMode::WriteThrough => Durable::AtAnswer,
            CacheMode::Unsafe => Durable::AtClose,
        };
        NodeInfo { durable, ..self.lower.info() }
    }

    fn children(&self) -> Vec<Child> {
        vec![Child::lower(Rc::clone(&self.lower))]
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
        seen: RefCell<Vec<(Op, bool)>>,
        write: Result<(), Errno>,
    }

    impl Node for Notes {
        fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
            self.seen.borrow_mut().push((request.op, request.fua));
            let result = if request.op.is_write() { self.write } else { Ok(()) };
            Box::pin(std::future::ready(Response { result, bufs: request.bufs }))
        }
        fn info(&self) -> NodeInfo {
            NodeInfo::new(8, false)
        }
        fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    /// Submits a discard, with FUA if `fua`, and a flush. Returns the requests that reach the lower node and the result
    /// of the discard.
    fn seen(mode: CacheMode, fua: bool, write: Result<(), Errno>) -> (Vec<(Op, bool)>, Result<(), Errno>) {
        let notes = Rc::new(Notes { seen: RefCell::default(), write });
        let node = mode.over(Rc::clone(&notes) as Rc<dyn Node>);
        let ask = |request| {
            let Poll::Ready(response) =
                pin!(node.submit(request)).poll(&mut Context::from_waker(Waker::noop()))
            else {
                panic!("the test node never waits")
            };
            response.result
        };
        let result = ask(Request::discard(SectorRange::new(0, 1)).with_fua(fua));
        assert_eq!(ask(Request::flush()), Ok(()));
        (notes.seen.take(), result)
    }

    #[test]
    fn write_through_adds_fua_and_unsafe_drops_fua_and_flushes() {
        let (discard, flush) = (|fua| (Op::Discard, fua), (Op::Flush, false));
        for fua in [false, true] {
            assert_eq!(seen(CacheMode::WriteBack, fua, Ok(())).0, [discard(fua), flush]);
            assert_eq!(seen(CacheMode::WriteThrough, fua, Ok(())).0, [discard(true), flush]);
            assert_eq!(seen(CacheMode::Unsafe, fua, Ok(())).0, [discard(false)]);
        }
        assert_eq!(seen(CacheMode::WriteThrough, false, Err(Errno::EIO)).1, Err(Errno::EIO));
    }
}
