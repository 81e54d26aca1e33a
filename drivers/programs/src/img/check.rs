//! `tap-img check`.

use super::{Failure, Outcome, Output, SharedArgs, print_json};
use crate::Console;
use crate::disk::format_parser;
use clap::Args;
use serde::Serialize;
use tap_images::{Format, Formats, ImageHost, ImageSpec};

#[derive(Args, Debug)]
pub(super) struct Check {
    /// Format of the image, instead of probing it
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Print nothing unless there is a problem
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    shared: SharedArgs,
    /// The image
    file: String,
}

/// The keys of `qemu-img check --output=json`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Shown<'a> {
    image_end_offset: u64,
    total_clusters: u64,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    allocated_clusters: u64,
    compressed_clusters: u64,
    filename: &'a str,
    format: &'static str,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NOTHING_TO_CHECK: u8 = 63;

impl Check {
    pub(super) async fn run<H: ImageHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let spec = super::image(&self.file, self.format).map_err(Failure::new)?;
        let (formats, unlocked) = (Formats::shipped(), self.shared.force_share);
        let image = formats.describe(host, &spec, unlocked).await.map_err(Failure::new)?;
        // The format that was described, even if the file has changed since.
        let spec = ImageSpec { format: image.format.into(), ..spec };
        let Some(report) = formats.check(host, &spec, unlocked).await.map_err(Failure::new)? else {
            let text = format!("check {}: the format {} has no metadata", spec.path, image.format);
            return Err(Failure { status: NOTHING_TO_CHECK, text });
        };
        let total = image.cluster_bytes.map_or(0, |bytes| image.disk_bytes.div_ceil(bytes));
        let shown = Shown {
            image_end_offset: report.end_bytes,
            total_clusters: total,
            check_errors: 0,
            corruptions: report.problem_count + report.missing_clusters,
            leaks: report.leaked_clusters,
            allocated_clusters: report.plain_clusters + report.compressed_clusters,
            compressed_clusters: report.compressed_clusters,
            filename: &spec.path,
            format: image.format.name(),
        };
        let status = match (shown.corruptions, shown.leaks) {
            (0, 0) => 0,
            (0, _) => LEAKS,
            _ => CORRUPT,
        };
        if report.end_bytes > report.file_bytes {
            console.err(&format!(
                "tap-img: warning: {} ends at byte {}, but its mappings reach byte {}: after a crash of the \
                 host that data was never flushed; otherwise the file was truncated",
                spec.path, report.file_bytes, report.end_bytes
            ));
        }
        if self.output == Output::Json {
            print_json(console, &shown);
        } else if status != 0 || !self.quiet {
            for problem in &report.problems {
                console.out(&format!("ERROR {problem}"));
            }
            print_human(console, &shown);
        }
        Ok(status)
    }
}

fn print_human(console: &dyn Console, shown: &Shown) {
    match (shown.corruptions, shown.leaks) {
        (0, 0) => console.out("No errors were found on the image."),
        (0, leaks) => console.out(&format!(
            "{leaks} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data."
        )),
        (errors, _) => console.out(&format!(
            "{errors} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it."
        )),
    }
    let percent = |part: u64| part as f64 * 100.0 / shown.total_clusters.max(1) as f64;
    console.out(&format!(
        "{}/{} = {:.2}% allocated, {:.2}% compressed clusters",
        shown.allocated_clusters,
        shown.total_clusters,
        percent(shown.allocated_clusters),
        percent(shown.compressed_clusters)
    ));
    console.out(&format!("Image end offset: {}", shown.image_end_offset));
}
