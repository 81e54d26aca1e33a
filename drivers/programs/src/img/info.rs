//! `tap-img info`.

use super::{Failure, Outcome, Output, SharedArgs, open_node, print_json};
use crate::Console;
use crate::disk::{DiskHost, DiskOptions, format_parser};
use crate::spec::DiskSpec;
use clap::Args;
use serde::Serialize;
use tap_host::SECTOR_BYTES;
use tap_images::{Description, Format, Formats, ImageFormat, ImageSpec, MAX_CHAIN, same_path, show_size};

#[derive(Args, Debug)]
pub(super) struct Info {
    /// Format of the image, instead of probing it
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Also show the images below it
    #[arg(long)]
    backing_chain: bool,
    #[command(flatten)]
    shared: SharedArgs,
    /// The image, or an export of an NBD server
    file: String,
}

/// The keys of `qemu-img info --output=json`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Shown<'a> {
    virtual_size: u64,
    filename: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<&'a str>,
    dirty_flag: bool,
}

impl Info {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let mut next = match super::disk(&self.file, self.format).map_err(Failure::new)? {
            DiskSpec::Image(spec) => Some(spec),
            export @ DiskSpec::Nbd { .. } => return self.of_export(host, &export, console).await,
            DiskSpec::Mason { path, .. } => {
                let text =
                    format!("show {}: a graph is no image; mason check {path} shows its disks", self.file);
                return Err(Failure::new(text));
            }
        };
        let mut chain: Vec<(String, Description)> = Vec::new();
        while let Some(spec) = next.take() {
            if chain.len() == MAX_CHAIN {
                let text = format!("show {}: there are more than {MAX_CHAIN} images below it", self.file);
                return Err(Failure::new(text));
            }
            let image = Formats::shipped()
                .describe(host, &spec, self.shared.force_share)
                .await
                .map_err(Failure::new)?;
            if self.backing_chain {
                let below = image.backing_path.clone();
                next = below.map(|path| ImageSpec { format: ImageFormat::Probe, path });
            }
            chain.push((spec.path, image));
            if let Some(below) = &next
                && chain.iter().any(|(path, _)| same_path(path, &below.path))
            {
                let below = clean(&below.path);
                let text = format!("show {}: {below} is among the images that it is based on", self.file);
                return Err(Failure::new(text));
            }
        }
        let all: Vec<Shown> = chain.iter().map(|(path, image)| shown(path, image)).collect();
        self.print(&all, console);
        Ok(0)
    }

    /// Shows the export of a server, which says how large it is and nothing else.
    async fn of_export<H: DiskHost>(&self, host: &H, export: &DiskSpec, console: &dyn Console) -> Outcome {
        let node = open_node(host, export, &DiskOptions::default()).await.map_err(Failure::new)?;
        let shown = Shown {
            virtual_size: node.info().size_sectors * SECTOR_BYTES,
            filename: &self.file,
            cluster_size: None,
            format: "raw",
            actual_size: None,
            full_backing_filename: None,
            backing_filename: None,
            dirty_flag: false,
        };
        self.print(&[shown], console);
        node.close().await.map_err(|e| Failure::new(format!("close {export}: {e}")))?;
        Ok(0)
    }

    fn print(&self, all: &[Shown], console: &dyn Console) {
        match self.output {
            Output::Json if self.backing_chain => print_json(console, &all),
            Output::Json => print_json(console, &all[0]),
            Output::Human => {
                for (i, image) in all.iter().enumerate() {
                    if i > 0 {
                        console.out("");
                    }
                    print_human(console, image);
                }
            }
        }
    }
}

fn shown<'a>(path: &'a str, image: &'a Description) -> Shown<'a> {
    Shown {
        virtual_size: image.disk_bytes,
        filename: path,
        cluster_size: image.cluster_bytes,
        format: image.format.name(),
        actual_size: Some(image.allocated_bytes),
        full_backing_filename: image.backing_path.as_deref(),
        backing_filename: image.backing.as_deref(),
        dirty_flag: false,
    }
}

fn print_human(console: &dyn Console, image: &Shown) {
    console.out(&format!("image: {}", image.filename));
    console.out(&format!("file format: {}", image.format));
    console.out(&format!("virtual size: {} ({} bytes)", show_size(image.virtual_size), image.virtual_size));
    let disk_size = image.actual_size.map_or_else(|| "unavailable".to_owned(), show_size);
    console.out(&format!("disk size: {disk_size}"));
    if let Some(bytes) = image.cluster_size {
        console.out(&format!("cluster_size: {bytes}"));
    }
    match (image.backing_filename, image.full_backing_filename) {
        (Some(name), Some(path)) if name != path => {
            console.out(&format!("backing file: {} (actual path: {})", clean(name), clean(path)));
        }
        (Some(name), _) => console.out(&format!("backing file: {}", clean(name))),
        _ => {}
    }
}

/// A name from an image, with control characters replaced: they could control a terminal.
fn clean(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
