//! `tap-img resize`: makes the disk of an image that nobody has open larger.

use super::{Failure, Outcome};
use crate::Console;
use crate::disk::{BackingArgs, format_parser};
use crate::size::NewSize;
use clap::Args;
use tap_images::{Format, Formats, ImageHost, ImageSpec, OpenOptions};

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
