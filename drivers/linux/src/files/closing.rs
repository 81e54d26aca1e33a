//! Descriptors that are being closed on other threads.

use crate::priority::AtPriority;
use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tap_host::IoPriority;
use tokio::runtime::Handle;
use tokio::task::{Id, JoinHandle};

/// The interval between two checks of what is being closed; most descriptors are closed sooner.
const LOOK: Duration = Duration::from_millis(1);

/// The descriptors of one host that are being closed.
#[derive(Default)]
pub(crate) struct Closing {
    running: RefCell<Vec<JoinHandle<()>>>,
    begun: Cell<u64>,
}

/// A snapshot of what is being closed.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    begun: u64,
    any: bool,
}

impl Closing {
    /// Closes `fd` on a thread that may wait, with this priority: a block device is written back. If `fd` is shared,
    /// its last owner closes it.
    pub(crate) fn close(&self, fd: Arc<OwnedFd>, priority: Option<IoPriority>) {
        // After the program's end a wait here delays nothing.
        let Ok(runtime) = Handle::try_current() else { return drop(fd) };
        let mut running = self.running.borrow_mut();
        running.retain(|task| !task.is_finished());
        running.push(runtime.spawn_blocking(move || {
            let _at = AtPriority::new(priority);
            drop(fd);
        }));
        self.begun.set(self.begun.get() + 1);
    }

    /// What is being closed now.
    pub(crate) fn seen(&self) -> Seen {
        Seen { begun: self.begun.get(), any: !self.unfinished().is_empty() }
    }

    /// Waits for what is being closed now. Several tasks may wait, and the future may be dropped.
    pub(crate) async fn ended(&self) {
        let waited_for = self.unfinished();
        while self.unfinished().iter().any(|id| waited_for.contains(id)) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// As [`Closing::ended`]; returns whether anything was being closed at `before` or since.
    pub(crate) async fn ended_since(&self, before: Seen) -> bool {
        self.ended().await;
        before.any || self.begun.get() != before.begun
    }

    fn unfinished(&self) -> Vec<Id> {
        self.running.borrow().iter().filter(|task| !task.is_finished()).map(JoinHandle::id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn everybody_waits_for_what_is_being_closed() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let closing = Rc::new(Closing::default());
            let nothing = closing.seen();
            assert!(!closing.ended_since(nothing).await);
            let (release, held) = std::sync::mpsc::channel::<()>();
            closing.running.borrow_mut().push(tokio::task::spawn_blocking(move || _ = held.recv()));
            let seen = closing.seen();
            let mut one = Box::pin(closing.ended_since(seen));
            let mut other = Box::pin(closing.ended_since(seen));
            let soon = tokio::time::sleep(LOOK * 3);
            tokio::pin!(soon);
            std::future::poll_fn(|cx| {
                assert!(one.as_mut().poll(cx).is_pending() && other.as_mut().poll(cx).is_pending());
                soon.as_mut().poll(cx)
            })
            .await;
            drop(one);
            release.send(()).unwrap();
            assert!(other.await);
            assert!(!closing.ended_since(closing.seen()).await);
        });
    }
}
