//! The seam's xenstore: immediate operations, with delays added.

use crate::event::XenEvent;
use crate::port::XenPort;
use crate::store::{Perms, Store, Wakers};
use crate::xen::{STORE_CONFLICT, STORE_ERROR, STORE_LATE, WATCH_LATE};
use sim::Draw;
use std::future::{pending, poll_fn};
use std::task::{Poll, Waker};
use tap_host::{Errno, Transaction, WatchEvent, Watcher, Xenstore};

/// How long xenstored refuses all requests of one process.
const STORE_AWAY_NS: u64 = 1_500_000_000;
/// How long after that it does not do so again: toolstacks give a disk ten seconds to come up, and a xenstored that is
/// away all that time leaves a back end no chance.
const STORE_CALM_NS: u64 = 10_000_000_000;

/// The kind of an operation, as far as its errors depend on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    Look,
    Take,
    Commit,
}

impl XenPort {
    /// Waits until xenstored processes the request. If the process dies meanwhile, this never completes.
    async fn turn(&self) {
        let xen = &self.xen().0;
        let late_ns = xen.sim.decide(self.entity(), &STORE_LATE, self.next_store_op(), |draw| {
            if draw.ppm(xen.rates.store_late) { draw.magnitude(xen.options.store_late_bits) } else { 0 }
        });
        xen.sim.sleep_ns(xen.options.store_ns + late_ns).await;
        if !self.node().step() {
            pending::<()>().await;
        }
    }

    /// As [`XenPort::turn`]; xenstored may be busy, short of memory, or unable to answer, in which case it does
    /// nothing.
    async fn turn_that_may_fail(&self) -> Result<(), Errno> {
        self.turn_for(Asks::Look).await
    }

    /// The same for an operation that counts against a quota, which may be used up.
    async fn turn_that_takes(&self) -> Result<(), Errno> {
        self.turn_for(Asks::Take).await
    }

    async fn turn_for(&self, asks: Asks) -> Result<(), Errno> {
        self.turn().await;
        match self.store_error(asks) {
            _ if self.has_lost_store() => Err(Errno::ESHUTDOWN),
            Some((error, _)) => Err(error),
            None => Ok(()),
        }
    }

    /// The error that xenstored answers with, and whether the operation was carried out all the same, which only a
    /// commit can be.
    fn store_error(&self, asks: Asks) -> Option<(Errno, bool)> {
        let xen = &self.xen().0;
        let (sim, rate) = (&xen.sim, xen.rates.store_error);
        if !self.has_store_errors() || (rate == 0 && !sim.has_given_decisions()) {
            return None;
        }
        if sim.now_ns() < self.store_away_ns().get() {
            return Some((Errno::EBUSY, false));
        }
        let entity = sim.derive("store-error", 0);
        sim.name_entity(entity, || format!("xenstore for {}", sim.name_of(sim.current())));
        let (commit, takes) = (asks == Asks::Commit, asks == Asks::Take);
        let kinds = if commit || takes { 5 } else { 4 };
        let draw = |draw: &mut Draw| match 1 + draw.below(kinds) {
            5 if takes => 6,
            kind => kind,
        };
        match sim.fault(entity, &STORE_ERROR, rate, draw) {
            0 => None,
            1 => Some((Errno::EBUSY, false)),
            2 => Some((Errno::ENOMEM, false)),
            4 => {
                let until_ns = self.store_away_ns();
                if until_ns.get() == 0 || sim.now_ns() >= until_ns.get() + STORE_CALM_NS {
                    until_ns.set(sim.now_ns() + STORE_AWAY_NS);
                }
                Some((Errno::EBUSY, false))
            }
            // The quota of a driver domain, which xenstored does not treat as a control domain.
            6 => takes.then_some((Errno::ENOSPC, false)),
            kind => Some((Errno::EIO, commit && kind == 5)),
        }
    }

    fn apply<T>(&self, op: impl FnOnce(&mut Store) -> Result<T, Errno>) -> Result<T, Errno> {
        op(&mut self.xen().0.store.borrow_mut())
    }

    async fn change(
        &self,
        asks: Asks,
        op: impl FnOnce(&mut Store) -> Result<Wakers, Errno>,
    ) -> Result<(), Errno> {
        self.turn_for(asks).await?;
        let wakers = self.apply(op)?;
        wakers.into_iter().for_each(Waker::wake);
        Ok(())
    }

    async fn do_write(&self, tx: Option<u64>, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.change(Asks::Take, |store| store.write(self.client(), tx, path, value)).await?;
        self.xen().trace(XenEvent::Written { dom: self.dom(), path, value });
        Ok(())
    }

    async fn do_remove(&self, tx: Option<u64>, path: &str) -> Result<(), Errno> {
        self.change(Asks::Look, |store| store.remove(self.client(), tx, path)).await?;
        self.xen().trace(XenEvent::Removed { dom: self.dom(), path });
        Ok(())
    }

    /// The permissions of a node.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`.
    pub async fn perms(&self, path: &str) -> Result<Perms, Errno> {
        self.turn_that_may_fail().await?;
        self.apply(|store| store.perms(self.client(), None, path))
    }

    /// Changes the permissions of a node that the caller owns.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`.
    pub async fn set_perms(&self, path: &str, perms: Perms) -> Result<(), Errno> {
        self.change(Asks::Look, |store| store.set_perms(self.client(), None, path, perms)).await
    }
}

impl Xenstore for XenPort {
    type Transaction = StoreTransaction;
    type Watcher = StoreWatcher;

    async fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.turn_that_may_fail().await?;
        self.apply(|store| store.read(self.client(), None, path))
    }

    async fn write(&self, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.do_write(None, path, value).await
    }

    async fn remove(&self, path: &str) -> Result<(), Errno> {
        self.do_remove(None, path).await
    }

    async fn directory(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.turn_that_may_fail().await?;
        self.apply(|store| store.directory(self.client(), None, path))
    }

    async fn watch(&self, path: &str) -> Result<StoreWatcher, Errno> {
        self.turn_that_takes().await?;
        let id = self.apply(|store| store.watch(self.client(), path))?;
        Ok(StoreWatcher { port: self.clone(), id })
    }

    async fn transaction(&self) -> Result<StoreTransaction, Errno> {
        self.turn_that_takes().await?;
        let id = self.apply(|store| store.start(self.client()))?;
        Ok(StoreTransaction { port: self.clone(), id })
    }
}

/// A running transaction; aborted when dropped by a living process.
pub struct StoreTransaction {
    port: XenPort,
    id: u64,
}

impl Transaction for StoreTransaction {
    async fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.port.turn_that_may_fail().await?;
        self.port.apply(|store| store.read(self.port.client(), Some(self.id), path))
    }

    async fn write(&self, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.port.do_write(Some(self.id), path, value).await
    }

    async fn remove(&self, path: &str) -> Result<(), Errno> {
        self.port.do_remove(Some(self.id), path).await
    }

    async fn commit(self) -> Result<(), Errno> {
        self.port.turn().await;
        let error = self.port.store_error(Asks::Commit);
        if self.port.has_lost_store() {
            return Err(Errno::ESHUTDOWN);
        }
        if let Some((error, false)) = error {
            return Err(error);
        }
        let xen = &self.port.xen().0;
        let entity = xen.sim.derive("commit", u64::from(self.port.dom().0));
        xen.sim.name_entity(entity, || format!("commit of {}", xen.sim.name_of(xen.sim.current())));
        let conflict = xen.sim.fault(entity, &STORE_CONFLICT, xen.rates.conflict, |_| 1) != 0;
        let result =
            if conflict { Err(Errno::EAGAIN) } else { self.port.apply(|store| store.commit(self.id)) };
        self.port.xen().trace(XenEvent::Committed { dom: self.port.dom(), done: result.is_ok() });
        result.map(|wakers| wakers.into_iter().for_each(Waker::wake))?;
        error.map_or(Ok(()), |(error, _)| Err(error))
    }
}

impl Drop for StoreTransaction {
    fn drop(&mut self) {
        if self.port.node().is_alive() {
            self.port.xen().0.store.borrow_mut().abort(self.id);
        }
    }
}

/// A registered watch; gone when dropped by a living process.
pub struct StoreWatcher {
    port: XenPort,
    id: u64,
}

impl StoreWatcher {
    async fn ready(&self) -> Result<(), Errno> {
        poll_fn(|cx| match self.port.xen().0.store.borrow_mut().poll_watch(self.id, cx.waker()) {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(e) => Poll::Ready(Err(e)),
        })
        .await
    }
}

impl Watcher for StoreWatcher {
    async fn next(&self) -> Result<WatchEvent, Errno> {
        self.ready().await?;
        let xen = &self.port.xen().0;
        let late_ns = xen.sim.decide(self.port.entity(), &WATCH_LATE, self.port.next_store_op(), |draw| {
            if draw.ppm(xen.rates.store_late) { draw.magnitude(xen.options.store_late_bits) } else { 0 }
        });
        if late_ns > 0 {
            // The event stays queued meanwhile, so that dropping the future does not lose it.
            xen.sim.sleep_ns(late_ns).await;
        }
        let path = xen.store.borrow_mut().take_watch(self.id)?;
        Ok(WatchEvent { path })
    }
}

impl Drop for StoreWatcher {
    fn drop(&mut self) {
        if self.port.node().is_alive() {
            self.port.xen().0.store.borrow_mut().unwatch(self.id);
        }
    }
}
