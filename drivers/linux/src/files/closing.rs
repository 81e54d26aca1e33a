//! Descriptors that are being closed on other threads.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Those of one host.
#[derive(Default)]
pub(crate) struct Closing(RefCell<Vec<JoinHandle<()>>>);

impl Closing {
    /// Closes `fd` where it may wait, unless somebody else has it as well, who closes it then.
    pub(crate) fn close(&self, fd: Arc<OwnedFd>) {
        // After the program's end there is nothing left that it could hold up.
        let Ok(runtime) = Handle::try_current() else { return drop(fd) };
        let mut running = self.0.borrow_mut();
        running.retain(|task| !task.is_finished());
        running.push(runtime.spawn_blocking(move || drop(fd)));
    }

    /// Waits for what is being closed now; false if that is nothing.
    pub(crate) async fn ended(&self) -> bool {
        let running = self.0.take();
        let any = !running.is_empty();
        for task in running {
            // A close cannot fail in a way that anybody could do something about.
            let _closed = task.await;
        }
        any
    }
}
