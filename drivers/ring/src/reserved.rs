//! Which blktap2 devices are ours.
//!
//! ```text
//!   own a page, called after a token ─► reserve a device ─► give it the token for a name ─► ... ─► free it ─► no page
//! ```
//!
//! The kernel does not free the device of a dead process, and gives a number that was freed to the next one who asks.
//! So a device is known by its name in the kernel, a token that was never used before: a device is freed only while it
//! has the name of a page that we own. A page is owned as long as the process lives that made it. A page whose token no
//! device has is of a device that is gone, be it that the module was loaded anew, or that the host was started again
//! and the pages outlived that.
//!
//! A process that dies between reserving a device and naming it leaves a number that nobody can tell from one of
//! another program: it stays reserved until the module is unloaded, or the host started again.

use crate::tap_error::TapError;
use tap_host::{Entropy, Errno, Patience, Probe, SharedPages, TapDevices, Time};

tap_host::listed! {
    pub(super) BUGS: Bug;
    TAP_STALE_STAYS = "tap-stale-stays", "the devices that dead processes left are not freed";
    TAP_OF_ANOTHER = "tap-of-another",
        "the first device that has a name is taken for that of a dead process, whoever's it is";
    TAP_OPEN_FAILED = "tap-open-failed", "a device whose ring cannot be opened is not freed";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    TAP_STALE = "tap-stale", "a device of a dead process is gone, or was freed";
}

/// Prefix of the names of our devices.
const OURS: &str = "tapdisk-";
/// How often a device that should be closed by now is tried to be freed.
const FREE_TRIES: u32 = 12;

/// What reserving needs from a host.
pub(crate) trait ReserveHost: Time + Entropy + Probe + SharedPages + TapDevices {}
impl<T: Time + Entropy + Probe + SharedPages + TapDevices> ReserveHost for T {}

/// A device that is ours.
pub(crate) struct Reserved<H: ReserveHost> {
    pub(crate) minor: u32,
    token: String,
    records: &'static str,
    /// Owned as long as we live.
    page: H::Region,
}

fn page_of(records: &str, token: &str) -> String {
    format!("{records}-{token}")
}

impl<H: ReserveHost> Reserved<H> {
    /// Frees the devices that dead processes have left, and reserves one.
    ///
    /// # Errors
    /// [`TapError`]; no device stays reserved.
    pub(crate) async fn new(host: &H, records: &'static str) -> Result<Self, TapError> {
        free_stale(host, records).await;
        let mut token = [0; 16];
        host.fill(&mut token);
        let token = format!("{:032x}", u128::from_be_bytes(token));
        let name = page_of(records, &token);
        let page = match host.own_region(&name) {
            Ok(page) => page,
            Err(error) => return Err(TapError::Record { name, error }),
        };
        let minor = match host.allocate_tap().await {
            Ok(minor) => minor,
            Err(error) => {
                host.remove_region(&name);
                return Err(match error {
                    Errno::ENOENT | Errno::ENODEV => TapError::NoModule(error),
                    error => TapError::Allocate(error),
                });
            }
        };
        let own = Self { minor, token, records, page };
        if let Err(error) = host.name_tap(minor, &format!("{OURS}{}", own.token)).await {
            // Without that number it was freed by somebody, and may be another's by the next call. Otherwise nobody
            // can know it, so it is still ours.
            let freed =
                error == Errno::ENOENT || patiently(host, async || is_free(host.free_tap(minor).await)).await;
            own.end(host, freed);
            return Err(TapError::Name { minor, error });
        }
        Ok(own)
    }

    /// Frees the device, which is closed, for which the kernel may take a moment. If that does not succeed the page
    /// tells the next process of it.
    pub(crate) async fn free(self, host: &H) {
        let freed = patiently(host, async || free_named(host, &self.token).await).await;
        self.end(host, freed);
    }

    /// The same for a device whose ring cannot be opened.
    pub(crate) async fn give_up(self, host: &H) {
        if host.bug(&TAP_OPEN_FAILED) { self.end(host, true) } else { self.free(host).await }
    }

    /// The device is freed, or left to the next process.
    pub(crate) fn end(self, host: &H, freed: bool) {
        if freed {
            host.remove_region(&page_of(self.records, &self.token));
        }
        drop(self.page);
    }
}

/// Tries until it succeeds, for as long as the kernel may need to close a device.
async fn patiently(host: &impl Time, attempt: impl AsyncFn() -> bool) -> bool {
    let mut patience = Patience::of(FREE_TRIES);
    loop {
        if attempt().await {
            return true;
        }
        if !patience.again(host).await {
            return false;
        }
    }
}

/// Whether a device is free after an attempt to free it.
fn is_free(freed: Result<(), Errno>) -> bool {
    matches!(freed, Ok(()) | Err(Errno::ENODEV | Errno::EINVAL | Errno::ENXIO))
}

/// The device that has `token` for a name.
///
/// # Errors
/// As the module's, but for a module that is gone, and all its devices with it.
async fn named<H: ReserveHost>(host: &H, token: &str) -> Result<Option<u32>, Errno> {
    let all = match host.tap_names().await {
        Err(Errno::ENOENT) => Vec::new(),
        all => all?,
    };
    let ours = |name: &str| name.strip_prefix(OURS) == Some(token) || host.bug(&TAP_OF_ANOTHER);
    Ok(all.iter().find(|(_, name)| ours(name)).map(|(minor, _)| *minor))
}

/// Frees the device that has `token` for a name. Whether there is none any more.
async fn free_named<H: ReserveHost>(host: &H, token: &str) -> bool {
    match named(host, token).await {
        Ok(Some(minor)) => is_free(host.free_tap(minor).await),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// Frees the devices whose processes have died, unless they still have users.
pub(crate) async fn free_stale<H: ReserveHost>(host: &H, records: &str) {
    for name in host.region_names().unwrap_or_default() {
        let Some(token) = name.strip_prefix(records).and_then(|rest| rest.strip_prefix('-')) else {
            continue;
        };
        // Its owner lives.
        let Ok(_ours) = host.own_region(&name) else { continue };
        if !host.bug(&TAP_STALE_STAYS) && free_named(host, token).await {
            host.mark(&TAP_STALE);
            host.remove_region(&name);
        }
    }
}
