//! `tap-img resize`: makes the disk of an image that nobody has open larger.

use super::{Failure, Outcome};
use crate::Console;
use crate::disk::{BackingArgs, format_parser};
use clap::Args;
use tap_host::SECTOR_BYTES;
use tap_images::{Format, Formats, ImageHost, ImageSpec, OpenOptions, parse_size};

#[derive(Args, Debug)]
pub(super) struct Resize {
    /// Format of the image, instead of probing it
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    backing: BackingArgs,
    /// The image
    image: String,
    /// New size of the disk, such as 20G, or what it grows by, such as +5G
    size: String,
}

/// What to make of the size that a disk has, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NewSize {
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
    fn parse(text: &str) -> Result<Self, String> {
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
    fn of(self, have_bytes: u64) -> Result<u64, String> {
        let bytes = match self {
            Self::To(bytes) => Some(bytes),
            Self::By(bytes) => have_bytes.checked_add(bytes),
        };
        let sectors = bytes.and_then(|bytes| bytes.checked_next_multiple_of(SECTOR_BYTES));
        sectors.ok_or_else(|| "the disk would be larger than a file can be".to_owned())
    }
}

impl Resize {
    pub(super) async fn run<H: ImageHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let failed = |why: String| Failure::new(format!("resize {}: {why}", self.image));
        let size = NewSize::parse(&self.size).map_err(failed)?;
        let spec = super::image(&self.image, self.format).map_err(Failure::new)?;
        let formats = Formats::shipped();
        let image = formats.describe(host, &spec, false).await.map_err(Failure::new)?;
        // The format that was described, even if the file has changed since.
        let spec = ImageSpec { format: image.format.into(), ..spec };
        let size_bytes = size.of(image.disk_bytes).map_err(failed)?;
        let options = OpenOptions { backing: self.backing.policy(), ..OpenOptions::default() };
        formats.grow(host, &spec, &options, size_bytes).await.map_err(Failure::new)?;
        if !self.quiet {
            console.out("Image resized.");
        }
        Ok(0)
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
