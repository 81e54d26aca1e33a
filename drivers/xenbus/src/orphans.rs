//! In-flight records that will never be used again.
//!
//! A guest that is destroyed while no tapdisk runs leaves the record of its ring. A record names its device, so the
//! next process to start can see that the device is gone. The lock of such a device is removed with it.

use crate::config::{BackendError, XenHost};
use crate::keys;
use crate::lock;
use std::collections::BTreeSet;
use tap_host::{DomId, Event, Tried, VbdId};

tap_host::listed! {
    pub(super) BUGS: Bug;
    ORPHANS_STAY = "orphans-stay", "the records of guests that are gone are not removed";
}

/// How long to wait for a host that is short of memory, in nanoseconds.
const PATIENCE_NS: u64 = 2_000_000_000;

/// Removes the records named `prefix-DOMAIN-VBD`, and their locks, whose device is neither in `root` of xenstore nor
/// among the back ends of another type beside it, or has lost its front end's directory. Records of devices that exist
/// stay, whichever process serves them; returns those devices.
///
/// # Errors
/// [`BackendError::Store`]; [`BackendError::Records`] if they cannot be listed.
pub(crate) async fn remove_orphans<H: XenHost>(
    host: &H,
    root: &str,
    prefix: &str,
) -> Result<BTreeSet<(DomId, VbdId)>, BackendError> {
    let names = host.region_names().map_err(|error| BackendError::Records { error })?;
    let mut devices: BTreeSet<_> = names.iter().filter_map(|name| device_of(name, prefix)).collect();
    for device in devices.clone() {
        if remove_orphan(host, root, prefix, device).await? {
            devices.remove(&device);
        }
    }
    Ok(devices)
}

/// Removes what is left of one device if it is gone; returns whether it is.
///
/// # Errors
/// [`BackendError::Store`].
pub(crate) async fn remove_orphan<H: XenHost>(
    host: &H,
    root: &str,
    prefix: &str,
    (dom, vbd): (DomId, VbdId),
) -> Result<bool, BackendError> {
    if is_device(host, root, dom, vbd).await? || host.bug(&ORPHANS_STAY) {
        return Ok(false);
    }
    let record = format!("{prefix}-{}-{}", dom.0, vbd.0);
    let lock = format!("{record}{}", lock::SUFFIX);
    // A process that is still ending this device removes both itself.
    if let Ok(_ours) = lock::own(host, &lock, PATIENCE_NS, |error| Tried::Page.may_pass(error)).await {
        host.log(Event::OrphanRemoved { dom, vbd });
        host.remove_region(&record);
        host.remove_region(&lock);
    }
    Ok(true)
}

/// Whether this device has a back end of any type, and a front end; `root` has those of one type.
///
/// # Errors
/// [`BackendError::Store`].
pub async fn is_device<H: XenHost>(
    host: &H,
    root: &str,
    dom: DomId,
    vbd: VbdId,
) -> Result<bool, BackendError> {
    let (backends, own) = root.rsplit_once('/').unwrap_or(("", root));
    let others = keys::names(host, backends).await?.into_iter().filter(|kind| kind != own);
    for kind in std::iter::once(own.to_owned()).chain(others) {
        if has_front_end(host, &format!("{backends}/{kind}/{}/{}", dom.0, vbd.0)).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn has_front_end<H: XenHost>(host: &H, path: &str) -> Result<bool, BackendError> {
    let Some(frontend) = keys::read(host, path, "frontend").await? else { return Ok(false) };
    Ok(keys::state(host, &String::from_utf8_lossy(&frontend)).await?.is_some())
}

/// The device that a record or lock of this name belongs to.
fn device_of(name: &str, prefix: &str) -> Option<(DomId, VbdId)> {
    let (dom, vbd) = name.strip_prefix(prefix)?.strip_prefix('-')?.split_once('-')?;
    let vbd = vbd.strip_suffix(lock::SUFFIX).unwrap_or(vbd);
    let dom = u16::try_from(keys::number(dom.as_bytes())?).ok()?;
    Some((DomId(dom), VbdId(keys::number(vbd.as_bytes())?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_records() {
        assert_eq!(device_of("ring-3-51712", "ring"), Some((DomId(3), VbdId(51712))));
        assert_eq!(device_of("ring-3-51712.lock", "ring"), Some((DomId(3), VbdId(51712))));
        for other in
            ["ring-3", "ring-x-1", "ring-70000-1", "rings-3-1", "sync-3-51712", "ring-3-51712-old", ""]
        {
            assert_eq!(device_of(other, "ring"), None, "{other}");
        }
    }
}
