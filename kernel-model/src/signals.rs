//! How others ask a process to end.

use crate::process::Process;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Poll, Waker};
use tap_host::Signals;

/// Whether the process was asked to end, and the tasks that wait for that.
#[derive(Default)]
pub(crate) struct Stop {
    asked: Cell<bool>,
    wakers: RefCell<Vec<Waker>>,
}

impl Process {
    /// Asks the process to end, as SIGTERM does.
    pub fn ask_to_stop(&self) {
        self.stop().asked.set(true);
        self.stop().wakers.take().into_iter().for_each(Waker::wake);
    }
}

impl Signals for Process {
    fn process_id(&self) -> u32 {
        self.pid()
    }

    fn asked_to_stop(&self) -> impl Future<Output = ()> + 'static {
        let stop = Rc::clone(self.stop());
        poll_fn(move |cx| {
            if stop.asked.get() {
                return Poll::Ready(());
            }
            let mut wakers = stop.wakers.borrow_mut();
            if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
    }
}
