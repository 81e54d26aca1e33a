//! `tap-img info`.

use super::{Failure, Outcome, Output, print_json};
use crate::Console;
use crate::disk::format_parser;
use clap::Args;
use serde::Serialize;
use tap_images::{Description, Format, Formats, ImageFormat, ImageHost, ImageSpec, MAX_CHAIN, show_size};

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
    /// The image
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
    actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<&'a str>,
    dirty_flag: bool,
}

impl Info {
    pub(super) async fn run<H: ImageHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let mut next = Some(super::image(&self.file, self.format).map_err(Failure::new)?);
        let mut chain: Vec<(String, Description)> = Vec::new();
        while let Some(spec) = next.take() {
            if chain.len() == MAX_CHAIN {
                let text = format!("show {}: there are more than {MAX_CHAIN} images below it", self.file);
                return Err(Failure::new(text));
            }
            let image = Formats::shipped().describe(host, &spec).await.map_err(Failure::new)?;
            if self.backing_chain {
                let below = image.backing_path.clone();
                next = below.map(|path| ImageSpec { format: ImageFormat::Probe, path });
            }
            chain.push((spec.path, image));
        }
        let all: Vec<Shown> = chain.iter().map(|(path, image)| shown(path, image)).collect();
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
        Ok(0)
    }
}

fn shown<'a>(path: &'a str, image: &'a Description) -> Shown<'a> {
    Shown {
        virtual_size: image.disk_bytes,
        filename: path,
        cluster_size: image.cluster_bytes,
        format: image.format.name(),
        actual_size: image.allocated_bytes,
        full_backing_filename: image.backing_path.as_deref(),
        backing_filename: image.backing.as_deref(),
        dirty_flag: false,
    }
}

fn print_human(console: &dyn Console, image: &Shown) {
    console.out(&format!("image: {}", image.filename));
    console.out(&format!("file format: {}", image.format));
    console.out(&format!("virtual size: {} ({} bytes)", show_size(image.virtual_size), image.virtual_size));
    console.out(&format!("disk size: {}", show_size(image.actual_size)));
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
