//! Only one process drives a disk: the one that has its lock.
//!
//! The lock is a page beside the in-flight record. It is owned from before the device is first examined until nothing
//! of it is in use: the ring is unmapped and the image closed. Its owner's death frees it. What remains then, the
//! final state in xenstore, concerns no other process. A process that never had the lock writes nothing, in xenstore
//! or anywhere else.

use crate::config::{BackendConfig, BackendEnd, BackendError, XenHost};
use std::cell::{Cell, RefCell};
use tap_host::{Errno, Patience, Tried};

tap_host::listed! {
    pub(super) BUGS: Bug;
    DISK_NOT_OWNED = "disk-not-owned", "two processes that are told to serve one disk both begin";
    UNSERVED_RECORD_STAYS = "unserved-record-stays",
        "the record of a guest that is destroyed before its ring was taken over is not removed";
}

/// What is appended to a record's name to name its lock.
pub(crate) const SUFFIX: &str = ".lock";

/// A disk that is ours alone, until this is dropped.
pub(crate) struct Lock<H: XenHost> {
    /// The name, and the page that we own; `None` for a disk without a record, and once the lock was given up.
    page: RefCell<Option<(String, H::Region)>>,
    given_up: Cell<bool>,
}

/// Why a disk is not ours.
pub(crate) enum NotOurs {
    /// Another process drives it.
    Led,
    /// The lock's page cannot be opened.
    Page(String),
}

impl NotOurs {
    pub(crate) fn error(self, config: &BackendConfig) -> BackendError {
        let why = match self {
            Self::Led => "another process serves it".to_owned(),
            Self::Page(why) => why,
        };
        BackendError::NotTaken { path: config.backend_path.clone(), why }
    }
}

impl<H: XenHost> Lock<H> {
    /// Takes the lock of a disk; waits up to `patience_ns` for a process that is ending.
    pub(crate) async fn take(host: &H, config: &BackendConfig, patience_ns: u64) -> Result<Self, NotOurs> {
        let record = config.record.as_ref().filter(|_| !host.bug(&DISK_NOT_OWNED));
        let Some(name) = record.map(|record| format!("{record}{SUFFIX}")) else {
            return Ok(Self::of(None));
        };
        match own(host, &name, patience_ns, |error| error == Errno::EBUSY || Tried::Page.may_pass(error))
            .await
        {
            Ok(page) => Ok(Self::of(Some((name, page)))),
            Err(Errno::EBUSY) => Err(NotOurs::Led),
            Err(error) => Err(NotOurs::Page(format!("own {name}: {error}"))),
        }
    }

    fn of(page: Option<(String, H::Region)>) -> Self {
        Self { page: RefCell::new(page), given_up: Cell::new(false) }
    }

    /// Whether another process may have it by now.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.get()
    }

    /// Removes the name of the lock of a device that is not ours.
    pub(crate) fn forget(&self, host: &H) {
        if let Some((name, owned)) = self.page.take() {
            self.given_up.set(true);
            host.remove_region(&name);
            drop(owned);
        }
    }

    /// Gives up the lock of a device that is gone, and removes its name. This comes before the device's final state is
    /// written: if the process dies in between, the next owner of the lock writes it. The record is removed, too: a
    /// predecessor may have left one for a device that we never served. From then on both names may belong to another
    /// process: nothing is removed twice.
    pub(crate) fn give_up(&self, host: &H, end: &Result<BackendEnd, BackendError>) {
        if !is_over(end) {
            return;
        }
        if let Some((name, _)) = &*self.page.borrow()
            && !host.bug(&UNSERVED_RECORD_STAYS)
        {
            host.remove_region(name.strip_suffix(SUFFIX).unwrap_or(name));
        }
        self.forget(host);
    }
}

/// Owns the page called `name`; waits up to `patience_ns` while `passes` accepts the error.
///
/// # Errors
/// The last one.
pub(crate) async fn own<H: XenHost>(
    host: &H,
    name: &str,
    patience_ns: u64,
    passes: impl Fn(Errno) -> bool,
) -> Result<H::Region, Errno> {
    let until_ns = host.now_ns().saturating_add(patience_ns);
    let mut patience = Patience::until();
    loop {
        match host.own_region(name) {
            Err(error) if passes(error) && patience.again_before(host, until_ns).await => {}
            result => return result,
        }
    }
}

/// Whether this device is gone for good.
pub(crate) fn is_over(end: &Result<BackendEnd, BackendError>) -> bool {
    matches!(end, Ok(BackendEnd::Offline | BackendEnd::FrontendGone | BackendEnd::BackendGone))
}
