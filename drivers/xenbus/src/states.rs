//! Writing our state and the keys that belong to it, all at once or not at all.

use crate::config::BackendError;
use crate::keys;
use crate::patience::patiently;
use tap_abi::xenbus::XenbusState;
use tap_host::{Errno, Probe, Time, Transaction, Xenstore};

tap_host::listed! {
    pub(super) BUGS: Bug;
    GROWTH_UNANNOUNCED = "growth-unannounced",
        "the new size of a disk is written without the state that has front ends look at it";
}

/// Most bytes of a value; only sentences for people can be longer. A driver domain may have no more than 2048, and a
/// message has to hold the path as well; one that is too long fails like an exhausted quota, and is never written.
const VALUE_BYTES_MAX: usize = 1024;

/// Keys beside the state, relative to the directory.
pub(crate) type Keys<'a> = &'a [(&'a str, String)];

/// How writing a state ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Written {
    /// Done.
    Yes,
    /// The directory is gone, or another party wrote a state: look again.
    No,
}

/// Writes `keys` and `state` in `dir` if the state there is still `expected`. A closing state is written whatever is
/// there, except over a new device: its predecessor's end does not concern it. A device that is being closed is offered
/// again only while it is online: what the caller knows about that may be older than the state.
pub(crate) async fn write<H: Xenstore + Time + Probe>(
    host: &H,
    dir: &str,
    expected: XenbusState,
    state: XenbusState,
    keys: Keys<'_>,
) -> Result<Written, BackendError> {
    until_written(host, dir, async || attempt(host, dir, expected, state, keys).await).await
}

/// Writes `keys` in `dir`, and the state again that is there, if that is [`XenbusState::Connected`]: front ends look at
/// the size of their disk then.
pub(crate) async fn repeat<H: Xenstore + Time + Probe>(
    host: &H,
    dir: &str,
    keys: Keys<'_>,
) -> Result<Written, BackendError> {
    let again = async || {
        let (tx, path) = (host.transaction().await?, format!("{dir}/state"));
        match tx.read(&path).await {
            Ok(value) if XenbusState::parse(&value) == Some(XenbusState::Connected) => {}
            Ok(_) | Err(Errno::ENOENT) => return Ok(Written::No),
            Err(error) => return Err(error),
        }
        for (key, value) in keys {
            tx.write(&format!("{dir}/{key}"), value.as_bytes()).await?;
        }
        if !host.bug(&GROWTH_UNANNOUNCED) {
            tx.write(&path, XenbusState::Connected.as_bytes()).await?;
        }
        tx.commit().await?;
        Ok(Written::Yes)
    };
    until_written(host, dir, again).await
}

async fn until_written<H: Xenstore + Time + Probe>(
    host: &H,
    dir: &str,
    attempt: impl AsyncFn() -> Result<Written, Errno>,
) -> Result<Written, BackendError> {
    loop {
        match patiently(host, &attempt).await {
            Ok(written) => return Ok(written),
            // Another party changed the same nodes; none of our writes took effect.
            Err(Errno::EAGAIN) => {}
            Err(error) => return Err(BackendError::Store { what: "write", path: dir.to_string(), error }),
        }
    }
}

async fn attempt<H: Xenstore>(
    host: &H,
    dir: &str,
    expected: XenbusState,
    state: XenbusState,
    keys: Keys<'_>,
) -> Result<Written, Errno> {
    let tx = host.transaction().await?;
    let path = format!("{dir}/state");
    let now = match tx.read(&path).await {
        Ok(value) => XenbusState::parse(&value).unwrap_or(XenbusState::Unknown),
        Err(Errno::ENOENT) => return Ok(Written::No),
        Err(error) => return Err(error),
    };
    let own = now != XenbusState::Initialising;
    let closing = matches!(state, XenbusState::Closing | XenbusState::Closed) && own;
    if now == state && now != XenbusState::Closing {
        // An earlier attempt whose answer was lost: nothing else writes this state for us. Or that of a predecessor,
        // whose disk may have been smaller.
        let is_other = now == XenbusState::Connected && now == expected && !has_all(&tx, dir, keys).await?;
        if !is_other {
            return Ok(Written::Yes);
        }
    }
    if now != expected && !closing {
        return Ok(Written::No);
    }
    if state == XenbusState::InitWait && now == XenbusState::Closing {
        // A toolstack may have written it meanwhile; it does so once the device is offline.
        let online = keys::known(tx.read(&format!("{dir}/online")).await, keys::MAX_VALUE_BYTES)?;
        if keys::is_offline(online.as_deref()) {
            return Ok(Written::No);
        }
    }
    if state == XenbusState::InitWait {
        // A new beginning: what went wrong before is history.
        tx.remove(&format!("{dir}/error")).await?;
    }
    for (key, value) in keys {
        let end = value.floor_char_boundary(VALUE_BYTES_MAX);
        tx.write(&format!("{dir}/{key}"), &value.as_bytes()[..end]).await?;
    }
    tx.write(&path, state.as_bytes()).await?;
    tx.commit().await?;
    Ok(Written::Yes)
}

/// Whether all of `keys` are there.
async fn has_all<T: Transaction>(tx: &T, dir: &str, keys: Keys<'_>) -> Result<bool, Errno> {
    for (key, value) in keys {
        match tx.read(&format!("{dir}/{key}")).await {
            Ok(found) if found == value.as_bytes() => {}
            Ok(_) | Err(Errno::ENOENT) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
