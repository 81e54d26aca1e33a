//! Checks that a message can carry a path. Which characters are allowed is for xenstored to decide.

use tap_abi::xenstore::{ABSOLUTE_PATH_BYTES_MAX, RELATIVE_PATH_BYTES_MAX};
use tap_host::Errno;

/// Refuses a path that would change the meaning of the message.
///
/// # Errors
/// `EINVAL` for a path that is empty, has a NUL, or is too long.
pub(super) fn check(path: &str) -> Result<(), Errno> {
    let bytes_max = if path.starts_with('/') { ABSOLUTE_PATH_BYTES_MAX } else { RELATIVE_PATH_BYTES_MAX };
    let good = !path.is_empty() && path.len() <= bytes_max && !path.as_bytes().contains(&0);
    good.then_some(()).ok_or(Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_fit_a_message() {
        for good in ["/", "/a", "a", "@releaseDomain", &"a".repeat(2048), &format!("/{}", "a".repeat(3071))] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["", "/a\0b", "\0", &"a".repeat(2049), &format!("/{}", "a".repeat(3072))] {
            assert_eq!(check(bad), Err(Errno::EINVAL), "{bad}");
        }
    }
}
