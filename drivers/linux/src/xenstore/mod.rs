//! A client of xenstored.
//!
//! ```text
//!   StoreClient ─┐                            ┌─► socket of xenstored
//!   transactions ├─► Shared ◄── Driver ◄─► Link
//!   watchers    ─┘  (calls, watches,          └─► /dev/xen/xenbus
//!                    outbox)
//! ```
//!
//! # Contract
//!
//! * Requests are sent in the order in which they are made; to a socket without waiting for the answers of earlier
//!   ones.
//! * Dropping the future of a request does not cancel the request. Its result is released: a transaction is ended
//!   without effect, a watch is removed.
//! * Dropping a watcher or a transaction tells xenstored, without waiting.
//! * No event is lost: equal events may be merged into one, and many different ones into an event of the watched path.
//! * An impossible message from xenstored ends the connection. Once it has ended, all waiting and all later requests
//!   fail with `ESHUTDOWN`, and a line is logged. Xen has no way to resume a connection.
//! * Memory is bounded: 4096 unanswered requests (one more fails with `EBUSY`) of a message each, as many requests that
//!   release what those began, 64 paths for each watch, and 1 MiB of names in a directory.
//! * Reading a directory that does not fit into a message and keeps changing while it is read fails with `EAGAIN`.
//! * Events of a relative path are relative, as xenstored sends them.
//! * No system call waits on the thread of the program.
//!
//! The wire format is [`tap_abi::xenstore`]; the differences between sockets and devices are in `link.rs`.

mod calls;
mod driver;
mod inbox;
mod link;
mod open;
mod paths;
mod session;
mod shared;
mod watches;

#[cfg(test)]
mod link_tests;

pub use open::{StoreOpenError, StorePlaces};

use crate::{Level, LinuxHost};
use calls::transaction_number;
use driver::Driver;
use link::Link;
use session::Session;
use shared::Shared;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tap_abi::xenstore::MessageKind;
use tap_host::{Errno, Tasks, Transaction, WatchEvent, Watcher, Xenstore};

/// A connection to xenstored; clones share it.
#[derive(Clone)]
pub struct StoreClient(Session);

/// Keeps the connection open: users hold it, the driver does not.
struct Client(Rc<Shared>);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Why a connection ended; an error in what xenstored sent, or of the descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
enum StoreLost {
    #[error("it closed the connection")]
    Closed,
    #[error("{0}")]
    Io(Errno),
    #[error("it sent a message of {0} bytes, more than there can be")]
    TooLong(u32),
    #[error("it answered request {0}, which nobody had made")]
    NotAsked(u32),
    #[error("it answered a request of kind {0:?} with another kind")]
    OtherKind(MessageKind),
    #[error("it sent an event without path or token")]
    BadEvent,
}

impl StoreClient {
    /// Connects to the first of `places` that works, and starts a task on `host` that serves the connection until its
    /// last user is gone. Call it on the thread of `host`, in a program that [`crate::run`] runs.
    ///
    /// # Errors
    /// The places that were tried, and what to do.
    pub async fn open(host: &LinuxHost, places: &StorePlaces) -> Result<Self, StoreOpenError> {
        let (link, place) = places.open().await?;
        Ok(Self::over(host, link, place))
    }

    fn over(host: &LinuxHost, link: Link, place: &str) -> Self {
        let shared = Rc::new(Shared::new(link.limits()));
        let driver = Driver::new(link, Rc::clone(&shared));
        let (place, log) = (place.to_owned(), host.clone());
        host.spawn("xenstore", 0, async move {
            if let Err(lost) = driver.run().await {
                let text = format_args!(
                    "xenstored at {place} is lost: {lost}; start this program again once it is there"
                );
                log.say(Level::Error, text);
            }
        });
        Self(Session::outside(Rc::new(Client(shared))))
    }
}

impl Xenstore for StoreClient {
    type Transaction = StoreTransaction;
    type Watcher = StoreWatcher;

    async fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.0.read(path).await
    }

    async fn write(&self, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.0.write(path, value).await
    }

    async fn remove(&self, path: &str) -> Result<(), Errno> {
        self.0.remove(path).await
    }

    async fn directory(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.0.directory(path).await
    }

    async fn watch(&self, path: &str) -> Result<StoreWatcher, Errno> {
        paths::check(path)?;
        let session = self.0.clone();
        // Events may arrive before the answer.
        let token = session.shared().add_watch(path);
        let mut watcher = StoreWatcher { session, token, told: false };
        let text = token.to_string();
        let parts = [path.as_bytes(), b"\0", text.as_bytes(), b"\0"];
        let asked = watcher.session.ask(MessageKind::Watch, &parts)?;
        watcher.told = true;
        let answer = asked.await;
        watcher.told = answer.is_ok();
        answer.map(|_| watcher)
    }

    async fn transaction(&self) -> Result<StoreTransaction, Errno> {
        let answer = self.0.ask(MessageKind::TransactionStart, &[b"\0"])?.await?;
        let session = Session { transaction: transaction_number(&answer)?, ..self.0.clone() };
        Ok(StoreTransaction { session, ended: false })
    }
}

/// A running transaction; ended without effect when dropped without commit.
pub struct StoreTransaction {
    session: Session,
    /// xenstored was told how it ends.
    ended: bool,
}

impl Transaction for StoreTransaction {
    async fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.session.read(path).await
    }

    async fn write(&self, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.session.write(path, value).await
    }

    async fn remove(&self, path: &str) -> Result<(), Errno> {
        self.session.remove(path).await
    }

    async fn commit(mut self) -> Result<(), Errno> {
        let asked = self.session.ask(MessageKind::TransactionEnd, &[b"T\0"])?;
        // Whatever the answer is, xenstored has forgotten the transaction by then.
        self.ended = true;
        asked.await?;
        Ok(())
    }
}

impl Drop for StoreTransaction {
    fn drop(&mut self) {
        if !self.ended {
            self.session.shared().abort(self.session.transaction);
        }
    }
}

/// A registered watch; removed when dropped.
pub struct StoreWatcher {
    session: Session,
    token: u64,
    /// xenstored knows it, or will.
    told: bool,
}

impl Watcher for StoreWatcher {
    async fn next(&self) -> Result<WatchEvent, Errno> {
        Next { watcher: self, waiter: None }.await
    }
}

/// The future of one waiter for the next event.
struct Next<'a> {
    watcher: &'a StoreWatcher,
    waiter: Option<u64>,
}

impl Future for Next<'_> {
    type Output = Result<WatchEvent, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let watcher = self.watcher;
        let path = ready!(watcher.session.shared().poll_event(watcher.token, &mut self.waiter, cx));
        Poll::Ready(path.map(|path| WatchEvent { path }))
    }
}

impl Drop for Next<'_> {
    fn drop(&mut self) {
        if let Some(waiter) = self.waiter {
            self.watcher.session.shared().forget_waiter(self.watcher.token, waiter);
        }
    }
}

impl Drop for StoreWatcher {
    fn drop(&mut self) {
        self.session.shared().remove_watch(self.token, self.told);
    }
}
