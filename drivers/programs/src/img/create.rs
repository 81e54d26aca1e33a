//! `tap-img create`.

use super::apart::apart;
use super::target::{Target, TargetOptions};
use super::{Failure, Outcome};
use crate::Console;
use crate::disk::format_parser;
use clap::Args;
use tap_host::SECTOR_BYTES;
use tap_images::{Format, Formats, ImageFormat, ImageHost, ImageSpec, check_merging, parse_size, resolve};

#[derive(Args, Debug)]
pub(super) struct Create {
    /// Format of the new image
    #[arg(short, long, value_parser = format_parser(), default_value = "raw", value_name = "FORMAT")]
    format: Format,
    /// Backing file, whose content shows where nothing was written; a relative name is relative to the image
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// Format of that file
    #[arg(short = 'F', long, value_parser = format_parser(), value_name = "FORMAT")]
    backing_format: Option<Format>,
    #[command(flatten)]
    options: TargetOptions,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image
    file: String,
    /// Size of the disk, such as 20G; not needed with a backing file
    size: Option<String>,
}

impl Create {
    pub(super) async fn run<H: ImageHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let create = |why: String| Failure::new(format!("create {}: {why}", self.file));
        let size = match &self.size {
            Some(text) => Some(parse_size(text).map_err(create)?),
            None => None,
        };
        let spec = super::image(&self.file, None).map_err(Failure::new)?;
        let format = match spec.format {
            ImageFormat::As(format) => format,
            ImageFormat::Probe => self.format,
        };
        let formats = Formats::shipped();
        let (below_bytes, apart) = match &self.backing {
            // Also checks that the file exists.
            Some(name) => {
                let format = self.backing_format.map_or(ImageFormat::Probe, ImageFormat::As);
                let below = ImageSpec { format, path: resolve(&spec.path, name) };
                check_merging(host, &below.path, &spec.path).await.map_err(Failure::new)?;
                let files = apart(host, &spec.path, &below, (true, false)).await.map_err(create)?;
                (Some(formats.describe(host, &below, false).await.map_err(Failure::new)?.disk_bytes), files)
            }
            None => (None, Vec::new()),
        };
        let Some(size) = size.or(below_bytes) else {
            return Err(create("its size is missing; give one, such as 20G".to_owned()));
        };
        let Some(size_bytes) = size.checked_next_multiple_of(SECTOR_BYTES) else {
            return Err(create(format!("a disk of {size} bytes is larger than a file can be")));
        };
        let target = Target { format, path: spec.path, size_bytes, backing: self.backing.clone(), apart };
        target.create(host, &self.options).await.map_err(Failure::new)?;
        if !self.quiet {
            console.out(&format!("Formatting '{}', fmt={format} size={size}", target.path));
        }
        Ok(0)
    }
}
