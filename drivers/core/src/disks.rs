//! The disks of a process, by name.
//!
//! ```text
//!   program ──reserve──► Listed ──fill──► Disks ◄── list, watch, get ── control and monitoring
//!      └───────────────── Disk ─────────────┘
//! ```
//!
//! A program opens disks and serves them. All other code that inspects or controls them finds them here.
//!
//! # Contract
//!
//! * A name is taken from [`Disks::reserve`] until the returned [`Listed`] is dropped. The disk is in the list from
//!   [`Listed::fill`] until it is closed: the list contains no closed disk, and keeps none alive.
//! * There are never more disks than the limit, including those that are being opened.
//! * The list is sorted by name.
//! * [`Disks::watch`] misses nothing: it completes if a disk was added, removed or changed its state since the given
//!   number of changes.

use crate::wait::Event as Flag;
use crate::{Disk, Node, NodeInfo, SchedulerStats};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_host::{Errno, Log, Probe, Tasks, Time};

tap_host::listed! {
    pub(super) BUGS: Bug;
    CLOSED_LISTED = "closed-listed", "a disk that is closed stays in the list of its process";
    CHANGE_MISSED = "change-missed",
        "a change of the list of disks is missed by whoever was not waiting for it";
    PLACE_KEPT = "place-kept", "the name of a disk that is gone stays taken in its process";
}

/// The disks of a process; clones share them.
pub struct Disks<H>(Rc<Inner<H>>);

struct Inner<H> {
    host: H,
    limit: usize,
    /// By name; `None` before the disk is open and after it is closed.
    all: RefCell<BTreeMap<String, Option<Open<H>>>>,
    changes: Cell<u64>,
    changed: Flag,
}

/// An open disk.
struct Open<H> {
    about: String,
    disk: Rc<Disk<H>>,
}

impl<H> Clone for Disks<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// Why a disk cannot be in the list.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ListError {
    /// Another disk has the name.
    #[error("serve '{0}' twice; give each disk a different name")]
    Taken(String),
    /// The process has reached its limit of disks.
    #[error("serve '{name}': the process already has {limit} disks, its limit; start another process for it")]
    Full {
        /// The refused disk.
        name: String,
        /// The limit.
        limit: usize,
    },
}

/// The properties, state and counters of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskStatus {
    /// Its name in the list.
    pub name: String,
    /// Describes where its bytes are, for people.
    pub about: String,
    /// `running`, `draining`, `paused`, `closing` or `closed`.
    pub state: &'static str,
    /// Requests and extent queries in flight.
    pub in_flight: usize,
    /// Size, mode, block sizes and durability.
    pub info: NodeInfo,
    /// Its counters.
    pub stats: SchedulerStats,
}

/// A name in the list, freed when this is dropped.
pub struct Listed<H: Time + Tasks + Log + Probe> {
    disks: Rc<Inner<H>>,
    name: String,
    stats: Option<Box<dyn Fn() -> SchedulerStats>>,
}

impl<H> Inner<H> {
    fn notify(&self) {
        self.changes.set(self.changes.get() + 1);
        self.changed.set();
        self.changed.clear();
    }
}

impl<H: Time + Tasks + Log + Probe> Inner<H> {
    /// Called when the disk `name` has changed its state.
    fn note(&self, name: &str) {
        let is_closed = |open: &mut Open<H>| open.disk.slot().is_closed() && !self.host.bug(&CLOSED_LISTED);
        let closed = self.all.borrow_mut().get_mut(name).and_then(|open| open.take_if(is_closed));
        // Dropped after the borrow has ended: the drop may call back into the list.
        drop(closed);
        self.notify();
    }
}

impl<H: Time + Tasks + Log + Probe> Disks<H> {
    /// An empty list for at most `limit` disks.
    pub fn new(host: H, limit: usize) -> Self {
        let (all, changes, changed) = (RefCell::default(), Cell::new(0), Flag::new());
        Self(Rc::new(Inner { host, limit, all, changes, changed }))
    }

    /// Takes `name` for a disk about to be opened.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn reserve(&self, name: &str) -> Result<Listed<H>, ListError> {
        let mut all = self.0.all.borrow_mut();
        if all.contains_key(name) {
            return Err(ListError::Taken(name.to_owned()));
        }
        if all.len() >= self.0.limit {
            return Err(ListError::Full { name: name.to_owned(), limit: self.0.limit });
        }
        all.insert(name.to_owned(), None);
        Ok(Listed { disks: Rc::clone(&self.0), name: name.to_owned(), stats: None })
    }

    /// The disk called `name`.
    pub fn get(&self, name: &str) -> Option<Rc<Disk<H>>> {
        self.0.all.borrow().get(name)?.as_ref().map(|open| Rc::clone(&open.disk))
    }

    /// All open disks, and the number of changes so far.
    pub fn list(&self) -> (Vec<DiskStatus>, u64) {
        let all = self.0.all.borrow();
        let open = all.iter().filter_map(|(name, open)| Some(open.as_ref()?.status(name)));
        (open.collect(), self.0.changes.get())
    }

    /// Closes all open disks, one after the other. Returns those that failed to close, with their status from before.
    pub async fn close_all(&self) -> Vec<(DiskStatus, Errno)> {
        let mut failed = Vec::new();
        for disk in self.list().0 {
            if let Some(open) = self.get(&disk.name)
                && let Err(error) = open.close().await
            {
                failed.push((disk, error));
            }
        }
        failed
    }

    /// Waits until there have been more than `seen` changes, and returns their number.
    pub async fn watch(&self, seen: u64) -> u64 {
        if self.0.changes.get() <= seen || self.0.host.bug(&CHANGE_MISSED) {
            self.0.changed.wait().await;
        }
        self.0.changes.get()
    }
}

impl<H: Time + Tasks + Log + Probe> Open<H> {
    fn status(&self, name: &str) -> DiskStatus {
        let slot = self.disk.slot();
        DiskStatus {
            name: name.to_owned(),
            about: self.about.clone(),
            state: slot.state(),
            in_flight: slot.in_flight(),
            info: slot.info(),
            stats: self.disk.stats(),
        }
    }
}

impl<H: Time + Tasks + Log + Probe> Listed<H> {
    /// Puts `disk` in the list, with `about` to describe where its bytes are, and returns its status.
    pub fn fill(&mut self, about: &str, disk: &Rc<Disk<H>>) -> DiskStatus {
        self.stats = Some(Box::new(disk.stats_later()));
        let open = Open { about: about.to_owned(), disk: Rc::clone(disk) };
        let status = open.status(&self.name);
        self.disks.all.borrow_mut().insert(self.name.clone(), Some(open));
        let (disks, name) = (Rc::downgrade(&self.disks), self.name.clone());
        disk.slot().on_change(move || disks.upgrade().iter().for_each(|disks| disks.note(&name)));
        self.disks.notify();
        status
    }

    /// The counters of the disk, even if it is closed; `None` if it was never open.
    pub fn stats(&self) -> Option<SchedulerStats> {
        self.stats.as_ref().map(|stats| stats())
    }
}

impl<H: Time + Tasks + Log + Probe> Drop for Listed<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if std::thread::panicking() || self.disks.host.bug(&PLACE_KEPT) {
            return;
        }
        let place = self.disks.all.borrow_mut().remove(&self.name);
        if let Some(open) = place.expect("a reserved name is in the list") {
            open.disk.slot().on_change(|| {});
            self.disks.notify();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Pool, Script, write};
    use crate::{CacheMode, DiskConfig, SchedulerLimits};
    use tap_host::VbdId;

    fn disk(pool: &Pool, script: &Script) -> Rc<Disk<Pool>> {
        let config =
            DiskConfig { id: VbdId(1), cache: CacheMode::WriteBack, scheduler: SchedulerLimits::default() };
        Rc::new(Disk::new(pool, Rc::new(script.clone()), config))
    }

    fn listed(disks: &Disks<Pool>, name: &str, disk: &Rc<Disk<Pool>>) -> Listed<Pool> {
        let mut listed = disks.reserve(name).unwrap();
        listed.fill(&format!("raw:/{name}"), disk);
        listed
    }

    fn states(disks: &Disks<Pool>) -> Vec<(String, &'static str)> {
        disks.list().0.into_iter().map(|disk| (disk.name, disk.state)).collect()
    }

    #[test]
    fn disks_are_listed_by_name_until_dropped() {
        let (pool, script) = (Pool::new(), Script::held());
        let disks = Disks::new(pool.clone(), 3);
        let [a, b] = [disk(&pool, &script), disk(&pool, &script)];
        let (second, _first) = (listed(&disks, "b", &b), listed(&disks, "a", &a));
        assert_eq!(disks.reserve("b").err(), Some(ListError::Taken("b".into())));
        let answer = pool.start(disks.get("b").unwrap().node().submit(write(0, 8)));
        assert_eq!(states(&disks), [("a".into(), "running"), ("b".into(), "running")]);
        assert_eq!(disks.list().0[1].in_flight, 1);
        script.release();
        pool.run();
        assert!(answer.get().is_some());
        let status = disks.list().0.remove(1);
        assert_eq!((status.stats.writes, &*status.about, status.info.size_sectors), (1, "raw:/b", 1000));
        drop(second);
        assert!(disks.get("b").is_none());
        assert_eq!(disks.list().0.len(), 1);
        let _again = listed(&disks, "b", &b);
        assert_eq!(disks.list().0.len(), 2);
    }

    #[test]
    fn a_disk_above_the_limit_is_refused() {
        let (pool, script) = (Pool::new(), Script::default());
        let disks = Disks::new(pool.clone(), 2);
        let _first = listed(&disks, "a", &disk(&pool, &script));
        let opening = disks.reserve("b").unwrap();
        let error = disks.reserve("c").err().unwrap();
        assert_eq!(
            error.to_string(),
            "serve 'c': the process already has 2 disks, its limit; start another process for it"
        );
        assert_eq!(disks.list().0.len(), 1, "a disk that is being opened is not listed");
        drop(opening);
        assert!(disks.reserve("c").is_ok());
    }

    #[test]
    fn a_closed_disk_is_not_listed_or_kept_alive_but_keeps_its_counters() {
        let (pool, script) = (Pool::new(), Script::default());
        let disks = Disks::new(pool.clone(), 1);
        let open = disk(&pool, &script);
        let listed = listed(&disks, "a", &open);
        assert!(pool.start(open.node().submit(write(0, 8))).get().is_some());
        let (top, alive) = (open.node(), Rc::downgrade(&open));
        drop(open);
        assert!(alive.upgrade().is_some());
        assert_eq!(pool.start(top.close()).take(), Some(Ok(())));
        assert!(states(&disks).is_empty() && disks.get("a").is_none() && alive.upgrade().is_none());
        assert_eq!(listed.stats().map(|stats| stats.writes), Some(1));
        assert!(disks.reserve("a").is_err(), "the name is taken until the entry is dropped");
        drop(listed);
        assert_eq!(disks.reserve("a").ok().and_then(|listed| listed.stats()), None);
    }

    #[test]
    fn a_watch_misses_no_change() {
        let (pool, script) = (Pool::new(), Script::default());
        let disks = Disks::new(pool.clone(), 1);
        let watch = |seen| {
            let disks = disks.clone();
            pool.start(async move { disks.watch(seen).await })
        };
        let first = watch(0);
        assert!(first.get().is_none());
        let disk = disk(&pool, &script);
        let listed = listed(&disks, "a", &disk);
        pool.run();
        let seen = first.take().unwrap();
        let (next, own) = (watch(seen), Rc::clone(&disk));
        assert!(next.get().is_none());
        assert_eq!(pool.start(async move { own.slot().pause().await }).take(), Some(Ok(())));
        pool.run();
        assert!(next.take().unwrap() > seen);
        let (listing, seen) = disks.list();
        assert_eq!(listing[0].state, "paused");
        // A change before the call completes the watch at once.
        drop(listed);
        assert!(watch(seen).take().unwrap() > seen);
        // Changes of a disk that has left the list do not count.
        let last = watch(disks.list().1);
        disk.slot().resume().unwrap();
        pool.run();
        assert!(last.get().is_none());
    }

    #[test]
    fn close_all_closes_every_disk_and_returns_those_that_failed() {
        let pool = Pool::new();
        let disks = Disks::new(pool.clone(), 3);
        let scripts = [Script::default(), Script::default(), Script::default()];
        let _listed: Vec<_> = ["a", "b", "c"]
            .iter()
            .zip(&scripts)
            .map(|(name, s)| listed(&disks, name, &disk(&pool, s)))
            .collect();
        scripts[1].fail_close(Errno::EIO);
        let all = disks.clone();
        let failed = pool.start(async move { all.close_all().await }).take().unwrap();
        let failed: Vec<_> = failed.iter().map(|(disk, error)| (&*disk.about, *error)).collect();
        assert_eq!(failed, [("raw:/b", Errno::EIO)]);
        assert!(states(&disks).is_empty());
        assert!(scripts.iter().all(|script| script.times_closed() == 1));
    }
}
