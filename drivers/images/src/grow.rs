//! Makes disks larger.
//!
//! A driver that can do so ([`Driver::grow`](crate::Driver::grow)) follows this contract:
//!
//! * The new part reads as zeros, also where a backing file is longer than the old disk.
//! * A crash at any moment leaves the disk with its old size or its new one, and all that was on it. Space that was
//!   prepared is lost then.
//! * After a success the new size is durable. So an image that has the size already is synchronised as well: the call
//!   that gave it the size may have been cut short.

use crate::{Format, ImageError};
use tap_host::SECTOR_BYTES;

/// Whether a disk of `have_bytes` is to change to become one of `size_bytes`.
///
/// # Errors
/// [`ImageError`] if it cannot become one.
pub(crate) fn grows(
    (path, format): (&str, Format),
    have_bytes: u64,
    size_bytes: u64,
) -> Result<bool, ImageError> {
    let what = if size_bytes < have_bytes {
        format!(
            "the disk has {have_bytes} bytes, and what is past byte {size_bytes} would be lost; copy it to a smaller \
             one instead"
        )
    } else if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        format!("a size of {size_bytes} bytes is not a multiple of {SECTOR_BYTES}")
    } else if size_bytes > i64::MAX as u64 {
        format!("a disk of {size_bytes} bytes is larger than a file can be")
    } else {
        return Ok(size_bytes != have_bytes);
    };
    Err(refused(path, format, what))
}

/// The error of an image that cannot have the size.
pub(crate) fn refused(path: &str, format: Format, what: String) -> ImageError {
    ImageError::Resize { path: path.to_owned(), format: format.name(), what }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::raw::FORMAT;

    #[test]
    fn only_larger_disks_of_whole_sectors_are_made() {
        let of = |have, size| grows(("/disk", FORMAT), have, size).map_err(|error| error.to_string());
        assert_eq!((of(1024, 1536), of(1024, 1024)), (Ok(true), Ok(false)));
        for (size, word) in
            [(512, "past byte 512 would be lost"), (1537, "multiple of 512"), (1 << 63, "larger than a file")]
        {
            let why = of(1024, size).unwrap_err();
            assert!(why.starts_with("resize /disk as raw: ") && why.contains(word), "{why}");
        }
    }
}
