//! New sizes of disks, as options give them.

use tap_host::SECTOR_BYTES;
use tap_images::parse_size;

/// What to make of the size that a disk has, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NewSize {
    /// This one.
    To(u64),
    /// It plus this.
    By(u64),
}

impl NewSize {
    /// Parses `20G` or `+5G`.
    ///
    /// # Errors
    /// A sentence that says how to write a size.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix('+') {
            Some(more) => parse_size(more).map(Self::By),
            None if text.starts_with('-') => Err("a disk cannot be made smaller: what is past its new end \
                                                  would be lost; copy it to a smaller one instead"
                .to_owned()),
            None => parse_size(text).map(Self::To),
        }
    }

    /// The size of a disk that has `have_bytes`, in whole sectors.
    ///
    /// # Errors
    /// A sentence, if no disk can have so many.
    pub(crate) fn of(self, have_bytes: u64) -> Result<u64, String> {
        let bytes = match self {
            Self::To(bytes) => Some(bytes),
            Self::By(bytes) => have_bytes.checked_add(bytes),
        };
        let sectors = bytes.and_then(|bytes| bytes.checked_next_multiple_of(SECTOR_BYTES));
        sectors.ok_or_else(|| "the disk would be larger than a file can be".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_added_and_never_smaller() {
        let of = |text: &str, have| NewSize::parse(text).and_then(|size| size.of(have));
        assert_eq!((of("2k", 1024), of("+2k", 1024)), (Ok(2048), Ok(3072)));
        assert_eq!(of("1000", 512), Ok(1024), "whole sectors");
        assert!(of("-1k", 4096).unwrap_err().contains("cannot be made smaller"));
        assert!(of("+16383P", 1 << 60).unwrap_err().contains("larger than a file"));
        assert!(of("+", 512).unwrap_err().contains("not a size"));
    }
}
