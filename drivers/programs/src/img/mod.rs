//! `tap-img`: images made, looked at, checked, compared and converted, with the options, the JSON keys and the exit
//! statuses of `qemu-img`, for the formats of this project.

mod apart;
mod check;
mod compare;
mod convert;
mod create;
mod info;
mod map;
mod pump;
mod target;

use crate::Console;
use crate::disk::{BackingArg, DiskHost, DiskOptions, REFUSE, backing_parser, open_disk};
use crate::help;
use crate::spec::DiskSpec;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::fmt::Display;
use std::rc::Rc;
use tap_core::Node;
use tap_host::VbdId;
use tap_images::{Format, Formats, ImageFormat, ImageSpec};

/// The command line of `tap-img`.
#[derive(Parser, Debug)]
#[command(name = "tap-img", version, about = "Creates, shows, checks, compares and converts disk images")]
#[command(after_help = help::img())]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Makes a new image; a file that is there is replaced
    Create(create::Create),
    /// Shows what an image says of itself
    Info(info::Info),
    /// Checks the metadata of an image without changing it
    #[command(
        after_help = "Exit status: 0 nothing is wrong, 1 the check could not be made, 2 the image is damaged, \
                            3 it has lost clusters only, 63 the format has nothing to check"
    )]
    Check(check::Check),
    /// Shows which parts of the disk come from where
    Map(map::Map),
    /// Compares what two images show
    #[command(
        after_help = "Exit status: 0 equal, 1 different, 2 an image could not be opened, 4 reading failed"
    )]
    Compare(compare::Compare),
    /// Copies what an image shows into another one
    Convert(convert::Convert),
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
enum Output {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

/// Below an image.
#[derive(Args, Clone, Copy, Debug)]
struct BackingArgs {
    /// Which backing files may be opened, and as what
    #[arg(long, value_parser = backing_parser(), default_value = REFUSE, value_name = "HOW")]
    backing: BackingArg,
}

/// Why a command failed: its exit status, and the text after "failed to".
struct Failure {
    status: u8,
    text: String,
}

impl Failure {
    fn new(error: impl Display) -> Self {
        Self { status: 1, text: error.to_string() }
    }
    fn with(status: u8) -> impl Fn(String) -> Self {
        move |text| Self { status, text }
    }
}

type Outcome = Result<u8, Failure>;

/// Runs `tap-img` and gives its exit status.
pub async fn run<H: DiskHost>(host: H, cli: Cli, console: &dyn Console) -> u8 {
    let outcome = match cli.command {
        Command::Create(args) => args.run(&host, console).await,
        Command::Info(args) => args.run(&host, console).await,
        Command::Check(args) => args.run(&host, console).await,
        Command::Map(args) => args.run(&host, console).await,
        Command::Compare(args) => args.run(&host, console).await,
        Command::Convert(args) => args.run(&host, console).await,
    };
    outcome.unwrap_or_else(|failure| {
        console.err(&format!("tap-img: failed to {}", failure.text));
        failure.status
    })
}

/// The disk called `file`, which may name its format itself; `format` is what an option says.
fn disk(file: &str, format: Option<Format>) -> Result<DiskSpec, String> {
    let spec = match file.parse::<DiskSpec>().map_err(|why| format!("use {file}: {why}"))? {
        DiskSpec::Image(spec) => spec,
        nbd => return Ok(nbd),
    };
    match (format.map(ImageFormat::As), spec.format) {
        (None, _) => Ok(DiskSpec::Image(spec)),
        (Some(format), ImageFormat::Probe) => Ok(DiskSpec::Image(ImageSpec { format, ..spec })),
        (Some(format), named) if format == named => Ok(DiskSpec::Image(spec)),
        (Some(_), _) => Err(format!("use {file}: it is named as another format than the option says")),
    }
}

/// Opens a disk for a tool: it ends with the tool, so it needs no name.
async fn open_node<H: DiskHost>(
    host: &H,
    spec: &DiskSpec,
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, String> {
    let disk =
        open_disk(host, Formats::shipped(), VbdId(0), spec, options).await.map_err(|e| e.to_string())?;
    Ok(disk.node())
}

/// As [`disk`], for what needs a file.
fn image(file: &str, format: Option<Format>) -> Result<ImageSpec, String> {
    match disk(file, format)? {
        DiskSpec::Image(spec) => Ok(spec),
        DiskSpec::Nbd { .. } => Err(format!("use {file}: this needs a file")),
    }
}

/// Prints `value` as JSON, laid out as `qemu-img` does.
fn print_json(console: &dyn Console, value: &impl serde::Serialize) {
    console.out(&serde_json::to_string_pretty(value).expect("numbers and texts can be written as JSON"));
}
