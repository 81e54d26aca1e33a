//! Values from xenstore: supposed to be short and decimal, but possibly anything.

use crate::config::BackendError;
use crate::patience::patiently;
use tap_abi::xenbus::XenbusState;
use tap_host::{Errno, GrantRef, Port, Probe, Time, Xenstore};

tap_host::listed! {
    pub(super) BUGS: Bug;
    STALE_RING_REF = "stale-ring-ref",
        "the grant of a ring is taken from a key that an earlier front end left";
}

/// Longest value that any key here may have.
pub(crate) const MAX_VALUE_BYTES: usize = 256;

/// A decimal number without sign, which may end in a NUL.
pub(crate) fn number(value: &[u8]) -> Option<u32> {
    let digits = value.strip_suffix(b"\0").unwrap_or(value);
    if digits.is_empty() || digits.len() > 10 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The value at `dir/key`; `None` when there is none, or we may not read it.
///
/// # Errors
/// Any other error of xenstore.
pub(crate) async fn read<H: Xenstore + Time + Probe>(
    host: &H,
    dir: &str,
    key: &str,
) -> Result<Option<Vec<u8>>, BackendError> {
    let path = format!("{dir}/{key}");
    let value = patiently(host, async || host.read(&path).await).await;
    known(value, MAX_VALUE_BYTES).map_err(|error| BackendError::Store { what: "read", path, error })
}

/// A value as [`read`] returns it, of up to `most` bytes.
pub(crate) fn known(value: Result<Vec<u8>, Errno>, most: usize) -> Result<Option<Vec<u8>>, Errno> {
    match value {
        Ok(value) if value.len() <= most => Ok(Some(value)),
        // Too long for any key read here: treated as nonsense.
        Ok(_) => Ok(Some(Vec::new())),
        Err(Errno::ENOENT | Errno::EACCES) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What `mode` says: a disk that is not clearly writable is read-only.
pub(crate) fn is_read_only(mode: Option<&[u8]>) -> bool {
    mode.is_some_and(|mode| !mode.starts_with(b"w"))
}

/// What `online` says: whether the toolstack wants the device gone once it is closed.
pub(crate) fn is_offline(online: Option<&[u8]>) -> bool {
    online.is_some_and(|value| number(value) == Some(0))
}

/// The state at `dir`; `None` when the key is gone, [`XenbusState::Unknown`] when it is nonsense.
pub(crate) async fn state<H: Xenstore + Time + Probe>(
    host: &H,
    dir: &str,
) -> Result<Option<XenbusState>, BackendError> {
    Ok(read(host, dir, "state").await?.map(|value| state_of(&value)))
}

/// The state that a value of the key `state` stands for; [`XenbusState::Unknown`] for nonsense.
pub(crate) fn state_of(value: &[u8]) -> XenbusState {
    XenbusState::parse(value).unwrap_or(XenbusState::Unknown)
}

/// What the front end says about its ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RingKeys {
    pub(crate) ring_ref: GrantRef,
    pub(crate) port: Port,
}

/// Reads all keys of the front end that describe its ring.
///
/// # Errors
/// The outer one from xenstore; the inner one for what we cannot or will not serve.
pub(crate) async fn ring<H: Xenstore + Time + Probe>(
    host: &H,
    frontend: &str,
) -> Result<Result<RingKeys, &'static str>, BackendError> {
    let key = async |name| read(host, frontend, name).await;
    match key("protocol").await?.as_deref() {
        None | Some(b"x86_64-abi") => {}
        Some(_) => return Ok(Err("protocol is not x86_64-abi, which is the only one served")),
    }
    // Only one page and one queue were offered.
    for (name, least, why) in [
        ("ring-page-order", 0, "ring-page-order is not 0, the only one offered"),
        ("num-ring-pages", 1, "num-ring-pages is not 1, the only number offered"),
        ("multi-queue-num-queues", 1, "multi-queue-num-queues is not 1, the only number offered"),
    ] {
        if key(name).await?.is_some_and(|value| number(&value) != Some(least)) {
            return Ok(Err(why));
        }
    }
    // A front end that states its number of pages has the first one in ring-ref0. Without that number, ring-ref0 is
    // left over from an earlier front end.
    let counts = key("ring-page-order").await?.is_some() || host.bug(&STALE_RING_REF);
    let first = if counts { key("ring-ref0").await? } else { None };
    let ring_ref = if first.is_some() { first } else { key("ring-ref").await? };
    let Some(ring_ref) = ring_ref.and_then(|value| number(&value)) else {
        return Ok(Err("ring-ref is not a number"));
    };
    let Some(port) = key("event-channel").await?.and_then(|value| number(&value)) else {
        return Ok(Err("event-channel is not a number"));
    };
    Ok(Ok(RingKeys { ring_ref: GrantRef(ring_ref), port: Port(port) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_and_fit() {
        for (text, value) in [("0", 0), ("8", 8), ("008", 8), ("4294967295", u32::MAX), ("7\0", 7)] {
            assert_eq!(number(text.as_bytes()), Some(value), "{text:?}");
        }
        for bad in ["", "\0", "-1", "+1", " 1", "1 ", "0x8", "4294967296", "00000000001", "1\0\0", "ä"] {
            assert_eq!(number(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn values_may_be_as_long_as_they_may_be() {
        assert_eq!(known(Ok(vec![b'1'; 4]), 4), Ok(Some(vec![b'1'; 4])));
        assert_eq!(known(Ok(vec![b'1'; 5]), 4), Ok(Some(Vec::new())), "treated as nonsense");
        assert_eq!(known(Err(Errno::EACCES), 4), Ok(None));
        assert_eq!(known(Err(Errno::EIO), 4), Err(Errno::EIO));
    }
}
