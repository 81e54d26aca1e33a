//! `tap-img`: creates, shows, checks, compares, converts, merges and enlarges images, with the options, the JSON keys
//! and the exit statuses of `qemu-img`, for the formats of this project.

mod apart;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod damage;
mod info;
mod map;
mod pump;
mod resize;
mod target;

use crate::Console;
use crate::disk::{BackingArgs, DiskHost, DiskOptions, open_disk};
use crate::help;
use crate::spec::DiskSpec;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::fmt::Display;
use std::rc::Rc;
use tap_core::Node;
use tap_host::VbdId;
use tap_images::{Format, Formats, ImageFormat, ImageSpec};

tap_host::listed! {
    pub(super) BUGS: Bug with [apart::BUGS, commit::BUGS, convert::BUGS];
}

/// The command line of `tap-img`.
#[derive(Parser, Debug)]
#[command(
    name = "tap-img",
    version,
    about = "Creates, shows, checks, compares, converts, merges and enlarges disk images"
)]
#[command(after_help = help::img())]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Creates an image; an existing file is replaced
    Create(create::Create),
    /// Shows the properties of an image
    Info(info::Info),
    /// Checks the metadata of an image without changing it
    #[command(after_help = "Exit status: 0 no problem, 1 the check failed to run, 2 the image is damaged, \
                            3 it only has leaked clusters, 63 the format has nothing to check")]
    Check(check::Check),
    /// Shows where the parts of the disk come from
    #[command(
        after_help = "Exit status: 0 done, 1 failed, or parts of the map are damaged: they are marked and named"
    )]
    Map(map::Map),
    /// Compares the contents of two images
    #[command(
        after_help = "Exit status: 0 equal, 1 different, 2 an image could not be opened, 4 reading failed"
    )]
    Compare(compare::Compare),
    /// Copies the contents of an image to another one
    Convert(convert::Convert),
    /// Merges an image into its backing file
    #[command(after_help = help::commit())]
    Commit(commit::Commit),
    /// Makes the disk of an image that nobody has open larger
    #[command(after_help = help::resize())]
    Resize(resize::Resize),
}

/// The output format.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
enum Output {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

/// An option of commands that only read.
#[derive(Args, Clone, Copy, Debug)]
struct SharedArgs {
    /// Read an image that another process has open for writing; what is read may be inconsistent
    #[arg(short = 'U', long)]
    force_share: bool,
}

/// How to open the images that a command reads.
#[derive(Args, Clone, Debug)]
struct SourceArgs {
    #[command(flatten)]
    backing: BackingArgs,
    #[command(flatten)]
    shared: SharedArgs,
}

impl SourceArgs {
    fn options(&self) -> DiskOptions {
        let (backing, unlocked) = (self.backing.policy(), self.shared.force_share);
        DiskOptions { backing, unlocked, ..DiskOptions::default() }
    }
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

/// Runs `tap-img` and returns its exit status.
pub async fn run<H: DiskHost>(host: H, cli: Cli, console: &dyn Console) -> u8 {
    let outcome = match cli.command {
        Command::Create(args) => args.run(&host, console).await,
        Command::Info(args) => args.run(&host, console).await,
        Command::Check(args) => args.run(&host, console).await,
        Command::Map(args) => args.run(&host, console).await,
        Command::Compare(args) => args.run(&host, console).await,
        Command::Convert(args) => args.run(&host, console).await,
        Command::Commit(args) => args.run(&host, console).await,
        Command::Resize(args) => args.run(&host, console).await,
    };
    outcome.unwrap_or_else(|failure| {
        console.err(&format!("tap-img: failed to {}", failure.text));
        failure.status
    })
}

/// The disk `file`, which may include a format; `format` is that of an option.
fn disk(file: &str, format: Option<Format>) -> Result<DiskSpec, String> {
    let spec = match file.parse::<DiskSpec>().map_err(|why| format!("use {file}: {why}"))? {
        DiskSpec::Image(spec) => spec,
        other => return Ok(other),
    };
    match (format.map(ImageFormat::As), spec.format) {
        (None, _) => Ok(DiskSpec::Image(spec)),
        (Some(format), ImageFormat::Probe) => Ok(DiskSpec::Image(ImageSpec { format, ..spec })),
        (Some(format), named) if format == named => Ok(DiskSpec::Image(spec)),
        (Some(_), _) => Err(format!("use {file}: its name has another format than the option")),
    }
}

/// Opens a disk for a tool; only one is open at a time, so it needs no id.
async fn open_node<H: DiskHost>(
    host: &H,
    spec: &DiskSpec,
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, String> {
    let disk =
        open_disk(host, Formats::shipped(), VbdId(0), spec, options).await.map_err(|e| e.to_string())?;
    Ok(disk.node())
}

/// As [`disk`], for commands that need a file.
fn image(file: &str, format: Option<Format>) -> Result<ImageSpec, String> {
    match disk(file, format)? {
        DiskSpec::Image(spec) => Ok(spec),
        DiskSpec::Nbd { .. } => Err(format!("use {file}: this needs a file")),
        DiskSpec::Mason { .. } => Err(format!("use {file}: this needs an image, and a graph is none")),
    }
}

/// Prints `value` as JSON in the layout of `qemu-img`.
fn print_json(console: &dyn Console, value: &impl serde::Serialize) {
    console.out(&serde_json::to_string_pretty(value).expect("numbers and texts serialise to JSON"));
}
