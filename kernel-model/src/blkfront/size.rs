//! The size of a disk in use: a back end that writes its state 4 once more has another one.
//!
//! Linux's `blkback_changed` calls `blkfront_connect` in state 4, which reads `sectors` and nothing else if the front
//! end is connected.

use super::{Blkfront, Inner, OnResized};
use std::future::poll_fn;
use std::task::{Poll, Waker};
use tap_host::{Errno, Watcher, Xenstore};

impl Blkfront {
    /// Calls `look` whenever the back end publishes a size for the disk in use. Linux always looks; this front end does
    /// from its next connect on.
    pub fn on_resized(&self, look: OnResized) {
        *self.0.on_resized.borrow_mut() = Some(look);
    }

    /// The size of its disk in sectors, as it was published last.
    pub fn size_sectors(&self) -> u64 {
        self.0.size_sectors.get()
    }

    /// Completes once its disk has more than `sectors`, with the size.
    pub async fn grown_past(&self, sectors: u64) -> u64 {
        poll_fn(|cx| {
            let size = self.size_sectors();
            if size > sectors {
                return Poll::Ready(size);
            }
            self.0.resized.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Looks at the size whenever the back end writes its state, until the next connect.
    pub(super) fn watch_size(&self) {
        let Some(look) = self.0.on_resized.borrow().clone() else { return };
        let (this, nth) = (self.clone(), self.0.connects.get());
        self.0.node.spawn("size", u64::from(nth), async move {
            let own = &this.0;
            let path = format!("{}/state", own.paths.backend);
            let Ok(watch) = own.port.watch(&path).await else { return };
            while watch.next().await.is_ok() {
                if own.connects.get() != nth || !own.open.get() {
                    return;
                }
                if !matches!(own.port.read(&path).await.as_deref(), Ok(b"4")) {
                    continue;
                }
                match own.published_sectors().await {
                    Ok(Some(sectors)) if sectors != own.size_sectors.get() => {
                        look(sectors);
                        own.set_size(sectors);
                    }
                    Ok(_) => {}
                    Err(error) => (own.complain)(format!("the size of the disk cannot be read: {error:?}")),
                }
            }
        });
    }
}

impl Inner {
    pub(super) fn set_size(&self, sectors: u64) {
        self.size_sectors.set(sectors);
        let waiting = std::mem::take(&mut *self.resized.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    async fn published_sectors(&self) -> Result<Option<u64>, Errno> {
        match self.port.read(&format!("{}/sectors", self.paths.backend)).await {
            Ok(value) => Ok(String::from_utf8_lossy(&value).parse().ok()),
            // It is being removed.
            Err(Errno::ENOENT | Errno::EACCES) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
