//! One process leads a disk: who has its lock.
//!
//! The lock is a page beside the in-flight record, owned from before the first look at the device until nothing of it
//! is in use: the ring is unmapped and the image closed. Its owner's death frees it. Of what is left then, the last
//! word in xenstore, nobody else has a part. Whoever never had the lock writes nothing, in xenstore or anywhere else.

use crate::config::{BackendConfig, BackendEnd, BackendError, XenHost};
use std::cell::{Cell, RefCell};
use tap_host::{Bug, Errno};

/// First pause before the lock is tried again, in nanoseconds; each further one is twice as long.
const PAUSE_NS: u64 = 1_000_000;

/// What a record's name is followed by in that of its lock.
pub(crate) const SUFFIX: &str = ".lock";

/// A disk that is ours alone, until this is dropped.
pub(crate) struct Lock<H: XenHost> {
    /// The name, and what keeps it ours; nothing for a disk without a record, and once the lock was given up.
    page: RefCell<Option<(String, H::Region)>>,
    given_up: Cell<bool>,
}

/// Why a disk is not ours.
pub(crate) enum NotOurs {
    /// Another process leads it.
    Led,
    /// The lock's page cannot be had.
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
    /// Takes the lock of a disk; waits up to `patience_ns` for a process that is about to end.
    pub(crate) async fn take(host: &H, config: &BackendConfig, patience_ns: u64) -> Result<Self, NotOurs> {
        let record = config.record.as_ref().filter(|_| !host.bug(Bug::DiskNotOwned));
        let Some(name) = record.map(|record| format!("{record}{SUFFIX}")) else {
            return Ok(Self::of(None));
        };
        match own(host, &name, patience_ns, |error| error == Errno::EBUSY || is_short(error)).await {
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

    /// Removes the name of the lock of a device that is none of ours.
    pub(crate) fn forget(&self, host: &H) {
        if let Some((name, owned)) = self.page.take() {
            self.given_up.set(true);
            host.remove_region(&name);
            drop(owned);
        }
    }

    /// Gives up the lock of a device that is gone, and removes its name: before the last word about it, since who dies
    /// in between leaves that to somebody who takes the lock anew. With it goes the record, which a predecessor may
    /// have left for a device that we never came to serve. Both are somebody else's from then on: nothing is removed
    /// twice.
    pub(crate) fn give_up(&self, host: &H, end: &Result<BackendEnd, BackendError>) {
        if !is_over(end) {
            return;
        }
        if let Some((name, _)) = &*self.page.borrow()
            && !host.bug(Bug::UnservedRecordStays)
        {
            host.remove_region(name.strip_suffix(SUFFIX).unwrap_or(name));
        }
        self.forget(host);
    }
}

/// Owns the page called `name`; waits up to `patience_ns` while `passes` likes the error.
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
    let mut pause_ns = PAUSE_NS;
    loop {
        match host.own_region(name) {
            Err(error) if passes(error) && host.now_ns() < until_ns => {
                host.sleep_ns(pause_ns).await;
                pause_ns *= 2;
            }
            result => return result,
        }
    }
}

/// Whether the host has no memory, or no space, for a page now.
pub(crate) fn is_short(error: Errno) -> bool {
    matches!(error, Errno::ENOMEM | Errno::ENOSPC)
}

/// Whether nobody will ask for this device again.
pub(crate) fn is_over(end: &Result<BackendEnd, BackendError>) -> bool {
    matches!(end, Ok(BackendEnd::Offline | BackendEnd::FrontendGone | BackendEnd::BackendGone))
}
