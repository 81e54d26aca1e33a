//! Values from xenstore: supposed to be short and decimal, but possibly anything.

use crate::config::BackendError;
use crate::patience::patiently;
use tap_abi::xenbus::XenbusState;
use tap_host::{Errno, Probe, Time, Xenstore};

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

/// A number of sectors, as [`number`].
pub(crate) fn sectors(value: &[u8]) -> Option<u64> {
    let digits = value.strip_suffix(b"\0").unwrap_or(value);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
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

/// Whether the toolstack wants the vbd at `backend_path` to be read-only: if its `mode` does not begin with `w`. One
/// without that key is writable.
///
/// # Errors
/// [`BackendError::Store`].
pub async fn is_read_only<H: Xenstore + Time + Probe>(
    host: &H,
    backend_path: &str,
) -> Result<bool, BackendError> {
    Ok(read(host, backend_path, "mode").await?.is_some_and(|mode| !mode.starts_with(b"w")))
}

/// The names below `path`; none if there is no such directory.
///
/// # Errors
/// Any other error of xenstore.
pub(crate) async fn names<H: Xenstore + Time + Probe>(
    host: &H,
    path: &str,
) -> Result<Vec<String>, BackendError> {
    match patiently(host, async || host.directory(path).await).await {
        // The first device creates it.
        Err(Errno::ENOENT) => Ok(Vec::new()),
        result => result.map_err(|error| BackendError::Store { what: "list", path: path.to_owned(), error }),
    }
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
    fn disks_may_be_large() {
        for (text, value) in [("0", 0), ("4294967296\0", 1 << 32), ("18446744073709551615", u64::MAX)] {
            assert_eq!(sectors(text.as_bytes()), Some(value), "{text:?}");
        }
        for bad in ["", "\0", "-1", "+1", "1 ", "18446744073709551616"] {
            assert_eq!(sectors(bad.as_bytes()), None, "{bad:?}");
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
