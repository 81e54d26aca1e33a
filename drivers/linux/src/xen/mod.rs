//! Xen, as its devices present it to a domain's user space.
//!
//! ```text
//!   Grants       /dev/xen/gntdev            gntdev.rs
//!   Events       /dev/xen/evtchn            evtchn.rs
//!   SharedPages  files in a folder          regions.rs
//!   Xenstore     xenstored's socket, or /dev/xen/xenbus
//!                                           ../xenstore/
//! ```
//!
//! Opened by [`crate::run`] for programs that ask for it ([`crate::Options::xen`]). Elsewhere every call here fails
//! with `ENODEV`.

mod evtchn;
mod gntdev;
mod ioctl;
mod page;
mod regions;

pub use evtchn::LinuxChannel;
pub use page::LinuxPage;
pub(crate) use page::{copy_from_shared, copy_to_shared};

use crate::files::of_rustix;
use crate::xenstore::{StoreClient, StoreOpenError, StorePlaces, StoreTransaction, StoreWatcher};
use crate::{Level, LinuxHost};
use evtchn::Evtchn;
use gntdev::Gntdev;
pub(crate) use regions::Regions;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use tap_host::{DomId, Errno, Events, GrantRef, GrantSegment, Grants, Port, SharedPages, Tasks, Xenstore};

/// Whether a program needs the devices for guests' rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rings {
    /// It serves none.
    Unused,
    /// It serves them on a host that has Xen, and does other things elsewhere.
    IfThere,
    /// It cannot do without.
    Needed,
}

/// What of Xen a program uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct XenOptions {
    /// Grants and event channels.
    pub rings: Rings,
    /// Where xenstored is, for programs that drive devices. Those need the folder of [`SharedPages`], too.
    pub store: Option<StorePlaces>,
}

impl Default for XenOptions {
    /// All of it.
    fn default() -> Self {
        Self { rings: Rings::Needed, store: Some(StorePlaces::usual()) }
    }
}

/// Why Xen cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum XenError {
    /// One of its devices.
    #[error("open {path}: {error}{}", hint(*error))]
    Device {
        /// The device.
        path: &'static str,
        /// Why.
        error: Errno,
    },
    /// The folder for pages that outlive the process.
    #[error("use {folder} for what outlives the process: {error}{}", folder_hint(*error))]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        error: Errno,
    },
    /// xenstored.
    #[error(transparent)]
    Store(#[from] StoreOpenError),
}

fn hint(error: Errno) -> &'static str {
    match error {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            "; it is there in a domain of Xen with the modules xen-gntdev and xen-evtchn"
        }
        Errno::EACCES | Errno::EPERM => "; it takes root",
        _ => "",
    }
}

fn folder_hint(error: Errno) -> &'static str {
    match error {
        Errno::EACCES => "; it has to be ours, and nobody else may write to it",
        _ => "",
    }
}

/// The devices for guests' rings.
struct RingDevices {
    gntdev: Gntdev,
    evtchn: Rc<Evtchn>,
}

/// What of Xen is open.
pub(crate) struct Xen {
    rings: Option<RingDevices>,
    store: Option<StoreClient>,
}

const GNTDEV: &str = "/dev/xen/gntdev";
const EVTCHN: &str = "/dev/xen/evtchn";

impl Xen {
    /// Opens what `options` name, on the thread of `host`.
    pub(crate) async fn open(host: &LinuxHost, options: &XenOptions) -> Result<Self, XenError> {
        let rings = match options.rings {
            Rings::Unused => None,
            Rings::Needed => Some(RingDevices::open(host)?),
            Rings::IfThere => match RingDevices::open(host) {
                Ok(devices) => Some(devices),
                Err(XenError::Device { error: Errno::ENOENT | Errno::ENODEV | Errno::ENXIO, .. }) => None,
                Err(error) => {
                    host.say(Level::Warning, format_args!("no guest can be connected: failed to {error}"));
                    None
                }
            },
        };
        let store = match &options.store {
            None => None,
            Some(places) => {
                let folder = || host.0.run_folder.clone().unwrap_or_default();
                host.regions().map_err(|error| XenError::Folder { folder: folder(), error })?;
                Some(StoreClient::open(host, places).await?)
            }
        };
        Ok(Self { rings, store })
    }
}

impl RingDevices {
    fn open(host: &LinuxHost) -> Result<Self, XenError> {
        let gntdev = Gntdev::new(device(GNTDEV)?);
        let evtchn =
            Evtchn::new(device(EVTCHN)?).map_err(|error| XenError::Device { path: EVTCHN, error })?;
        host.spawn("events", 0, Rc::clone(&evtchn).read_all(host.clone()));
        Ok(Self { gntdev, evtchn })
    }
}

fn device(path: &'static str) -> Result<OwnedFd, XenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    openat(CWD, path, flags, Mode::empty())
        .map_err(|error| XenError::Device { path, error: of_rustix(error) })
}

impl LinuxHost {
    /// The folder of pages that outlive the process; made when it is first needed.
    fn regions(&self) -> Result<&Regions, Errno> {
        let folder = self.0.run_folder.as_deref().ok_or(Errno::ENODEV)?;
        if let Some(regions) = self.0.regions.get() {
            return Ok(regions);
        }
        // A failure is not remembered: the next attempt may succeed.
        let regions = Regions::open(folder)?;
        Ok(self.0.regions.get_or_init(|| regions))
    }

    fn rings(&self) -> Result<&RingDevices, Errno> {
        self.0.xen.get().and_then(|xen| xen.rings.as_ref()).ok_or(Errno::ENODEV)
    }

    fn store(&self) -> Result<&StoreClient, Errno> {
        self.0.xen.get().and_then(|xen| xen.store.as_ref()).ok_or(Errno::ENODEV)
    }
}

impl Grants for LinuxHost {
    type Page = LinuxPage;

    fn map(&self, dom: DomId, gref: GrantRef, write: bool) -> Result<LinuxPage, Errno> {
        self.rings()?.gntdev.map(dom, gref, write)
    }
    fn copy_in(&self, dom: DomId, segments: &[GrantSegment], private: &mut [u8]) -> Result<(), Errno> {
        self.rings()?.gntdev.copy_in(dom, segments, private)
    }
    fn copy_out(&self, dom: DomId, segments: &[GrantSegment], private: &[u8]) -> Result<(), Errno> {
        self.rings()?.gntdev.copy_out(dom, segments, private)
    }
}

impl Events for LinuxHost {
    type Channel = LinuxChannel;

    fn bind_interdomain(&self, dom: DomId, remote: Port) -> Result<LinuxChannel, Errno> {
        self.rings()?.evtchn.bind(dom, remote)
    }
}

impl SharedPages for LinuxHost {
    type Region = LinuxPage;

    fn region(&self, name: &str) -> Result<LinuxPage, Errno> {
        self.regions()?.region(name)
    }
    fn own_region(&self, name: &str) -> Result<LinuxPage, Errno> {
        self.regions()?.own(name)
    }
    fn boot_id(&self) -> Result<[u8; 16], Errno> {
        regions::boot_id()
    }
    fn remove_region(&self, name: &str) {
        if let Err(error) = self.regions().and_then(|regions| regions.remove(name)) {
            self.say(Level::Warning, format_args!("failed to remove the record {name}: {error}"));
        }
    }
    fn region_names(&self) -> Result<Vec<String>, Errno> {
        self.regions()?.names()
    }
}

impl Xenstore for LinuxHost {
    type Transaction = StoreTransaction;
    type Watcher = StoreWatcher;

    async fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.store()?.read(path).await
    }
    async fn write(&self, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.store()?.write(path, value).await
    }
    async fn remove(&self, path: &str) -> Result<(), Errno> {
        self.store()?.remove(path).await
    }
    async fn directory(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.store()?.directory(path).await
    }
    async fn watch(&self, path: &str) -> Result<StoreWatcher, Errno> {
        self.store()?.watch(path).await
    }
    async fn transaction(&self) -> Result<StoreTransaction, Errno> {
        self.store()?.transaction().await
    }
}
