//! `tap-img map`.

use super::pump::{Extents, Run};
use super::{BackingArgs, Failure, FormatArg, Outcome, Output, print_json};
use crate::Console;
use crate::disk::{DiskHost, DiskOptions, open_any};
use crate::spec::DiskSpec;
use clap::Args;
use serde::Serialize;
use tap_core::Source;
use tap_host::SECTOR_BYTES;
use tap_images::{ImageFormat, ImageHost, ImageSpec, describe};

#[derive(Args, Debug)]
pub(super) struct Map {
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    format: Option<FormatArg>,
    /// How to print it
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    backing: BackingArgs,
    /// The image
    file: String,
}

/// The keys of `qemu-img map --output=json`.
#[derive(Serialize, Clone, Copy)]
struct Shown {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Map {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let spec = super::disk(&self.file, self.format).map_err(Failure::new)?;
        let options = DiskOptions { backing: self.backing.backing.policy(), ..DiskOptions::default() };
        let node = open_any(host, &spec, &options).await.map_err(Failure::new)?;
        let mut extents = Extents::new(&node);
        let mut all: Vec<Shown> = Vec::new();
        loop {
            match extents.next(u64::MAX).await {
                Ok(Some(run)) => push(&mut all, shown(&run)),
                Ok(None) => break,
                Err(e) => return Err(Failure::new(format!("read the map of {spec}: {e}"))),
            }
        }
        node.close().await.map_err(|e| Failure::new(format!("close {spec}: {e}")))?;
        match self.output {
            Output::Json => print_json(console, &all)?,
            Output::Human => {
                let files = files(host, spec).await?;
                console.out(&format!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"));
                for run in all.iter().filter(|run| run.data) {
                    let place = match run.offset {
                        Some(offset) => format!("{offset:#x}"),
                        None => "compressed".to_owned(),
                    };
                    let file = files.get(run.depth as usize).map_or("", String::as_str);
                    let (start, length) = (format!("{:#x}", run.start), format!("{:#x}", run.length));
                    console.out(&format!("{start:<16}{length:<16}{place:<16}{file}"));
                }
            }
        }
        Ok(0)
    }
}

/// The paths of the chain, the image first.
async fn files<H: ImageHost>(host: &H, spec: DiskSpec) -> Result<Vec<String>, Failure> {
    let DiskSpec::Image(spec) = spec else { return Ok(vec![spec.to_string()]) };
    let (mut files, mut next) = (Vec::new(), Some(spec));
    // Opening has found the chain to be of bounded length.
    while let Some(spec) = next {
        let image = describe(host, &spec).await.map_err(Failure::new)?;
        files.push(spec.path);
        next = image.backing_path.map(|path| ImageSpec { format: ImageFormat::Probe, path });
        if files.len() > 64 {
            break;
        }
    }
    Ok(files)
}

fn shown(run: &Run) -> Shown {
    let (depth, present, compressed, offset) = match run.extent.source {
        Source::Nothing => (0, false, false, None),
        Source::Image { depth, offset, compressed } => (depth, true, compressed, offset),
    };
    Shown {
        start: run.start * SECTOR_BYTES,
        length: run.count * SECTOR_BYTES,
        depth,
        present,
        zero: run.extent.zero,
        data: run.extent.allocated && !run.extent.zero,
        compressed,
        offset,
    }
}

/// Appends a run, to the last one if it goes on.
fn push(all: &mut Vec<Shown>, run: Shown) {
    if let Some(last) = all.last_mut() {
        let same = (last.depth, last.present, last.zero, last.data, last.compressed)
            == (run.depth, run.present, run.zero, run.data, run.compressed);
        let goes_on = match (last.offset, run.offset) {
            (Some(a), Some(b)) => a + last.length == b,
            (a, b) => a.is_none() && b.is_none(),
        };
        if same && goes_on {
            last.length += run.length;
            return;
        }
    }
    all.push(run);
}
