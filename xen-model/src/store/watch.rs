//! Watches: each has its own queue, which loses nothing.
//!
//! An event that is already queued is not added again, and too many different ones become a single event of the watched
//! path, which stands for all: the real host's client does the same, because its memory is bounded.

use super::tree::Change;
use super::{Client, Wakers, path};
use std::collections::{BTreeMap, VecDeque};
use std::task::Waker;
use tap_host::{DomId, Errno};

/// Maximum number of different events kept for one watch.
const QUEUE_MAX: usize = 64;

struct Watch {
    client: Client,
    path: String,
    queue: VecDeque<String>,
    /// The queue has a single event, which stands for all further ones.
    merged: bool,
    waker: Option<Waker>,
}

impl Watch {
    fn add(&mut self, path: &str) -> Option<Waker> {
        if self.merged || self.queue.iter().any(|queued| queued == path) {
            return None;
        }
        if self.queue.len() < QUEUE_MAX {
            self.queue.push_back(path.into());
        } else {
            self.queue = VecDeque::from([self.path.clone()]);
            self.merged = true;
        }
        self.waker.take()
    }
}

#[derive(Default)]
pub(crate) struct Watches {
    all: BTreeMap<u64, Watch>,
}

impl Watches {
    /// Adds a watch, which fires once for its registration.
    pub(crate) fn add(&mut self, id: u64, client: Client, path: String) {
        let queue = VecDeque::from([path.clone()]);
        self.all.insert(id, Watch { client, path, queue, merged: false, waker: None });
    }

    pub(crate) fn remove(&mut self, id: u64) {
        self.all.remove(&id);
    }

    pub(crate) fn of(&self, dom: DomId) -> usize {
        self.all.values().filter(|w| w.client.dom == dom).count()
    }

    pub(crate) fn poll(&mut self, id: u64, waker: &Waker) -> Result<bool, Errno> {
        let watch = self.all.get_mut(&id).ok_or(Errno::ESHUTDOWN)?;
        if watch.queue.is_empty() {
            watch.waker = Some(waker.clone());
        }
        Ok(!watch.queue.is_empty())
    }

    pub(crate) fn take(&mut self, id: u64) -> Result<String, Errno> {
        let watch = self.all.get_mut(&id).ok_or(Errno::ESHUTDOWN)?;
        watch.merged = false;
        watch.queue.pop_front().ok_or(Errno::EAGAIN)
    }

    /// Queues `changes` at every watch that is at or above them; returns the wakers of those whose queue was empty.
    pub(crate) fn fire(&mut self, changes: &[Change]) -> Wakers {
        let mut wakers = Wakers::new();
        for change in changes {
            for watch in self.all.values_mut() {
                let hears = if change.exact {
                    change.path == watch.path
                } else {
                    path::within(&change.path, &watch.path)
                };
                let may = change.perms.as_ref().is_none_or(|perms| perms.of(watch.client.dom).reads());
                if hears && may {
                    wakers.extend(watch.add(&change.path));
                }
            }
        }
        wakers
    }

    pub(crate) fn disconnect(&mut self, conn: u64) -> Wakers {
        let mut wakers = Wakers::new();
        self.all.retain(|_, watch| {
            let stays = watch.client.conn != conn;
            if !stays {
                wakers.extend(watch.waker.take());
            }
            stays
        });
        wakers
    }
}
