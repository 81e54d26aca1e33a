//! The command line of `tapdisk`.

use crate::attach::{self, AttachArgs, AttachHost, DetachArgs};
use crate::control::{self, ControlArgs};
use crate::help;
use crate::serve::{self, ServeArgs};
use crate::xen::{self, GuestHost, XenArgs};
use crate::{Console, Tuning};
use clap::{Parser, Subcommand, ValueEnum};
use std::path::Path;
use std::rc::Rc;
use tap_core::Disks;
use tap_host::IoPriority;

/// Limit of disks that one `tapdisk` serves.
pub const MAX_DISKS: usize = 1024;

/// The command line of `tapdisk`.
#[derive(Parser, Debug)]
#[command(name = "tapdisk", version, about = "Serves disk images")]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
    /// How files are read and written
    #[arg(long, global = true, value_enum, default_value_t, value_name = "ENGINE")]
    pub aio: AioArg,
    /// I/O priority of this process: realtime[:0-7], best-effort[:0-7] or idle
    #[arg(long, global = true, value_name = "CLASS[:LEVEL]")]
    pub ionice: Option<IoPriority>,
    /// How long to poll for events before sleeping, if the last wait was no longer; 0 sleeps at once
    #[arg(long, global = true, value_name = "MICROSECONDS", default_value_t = 32)]
    pub poll_us: u16,
    /// Also log internal events: merged requests, new clusters
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// The commands of `tapdisk`.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serves disks over NBD until it is asked to stop (SIGTERM, SIGINT, SIGHUP)
    #[command(after_help = help::serve())]
    Serve(ServeArgs),
    /// Serves disks of Xen's guests until they are closed, or until it is asked to stop (SIGTERM, SIGINT, SIGHUP)
    #[command(after_help = help::xen())]
    Xen(XenArgs),
    /// Gives the host a block device of a disk, until it is detached, or until it is asked to stop (SIGTERM, SIGINT,
    /// SIGHUP)
    #[command(after_help = help::attach())]
    Attach(AttachArgs),
    /// Takes a block device away
    Detach(DetachArgs),
    /// Serves disks that tap-ctl opens, over NBD, until the last one is detached, or until it is asked to stop
    /// (SIGTERM, SIGINT, SIGHUP)
    #[command(after_help = help::control())]
    Control(ControlArgs),
}

impl Command {
    /// Whether the command continues in the background.
    pub fn forks(&self) -> bool {
        match self {
            Self::Serve(args) => args.fork,
            Self::Attach(args) => args.fork,
            Self::Control(args) => args.fork,
            Self::Xen(_) | Self::Detach(_) => false,
        }
    }

    /// The file for the number of the serving process.
    pub fn pid_file(&self) -> Option<&Path> {
        match self {
            Self::Serve(args) => args.pid_file.as_deref(),
            Self::Attach(args) => args.pid_file.as_deref(),
            Self::Control(args) => args.pid_file.as_deref(),
            Self::Xen(_) | Self::Detach(_) => None,
        }
    }

    /// The folder for what outlives the process.
    pub fn run_dir(&self) -> &Path {
        match self {
            Self::Serve(args) => &args.run_dir,
            Self::Xen(args) => &args.run_dir,
            Self::Attach(args) => &args.run_dir,
            Self::Detach(args) => &args.run_dir,
            Self::Control(args) => &args.run_dir,
        }
    }
}

/// The parts of a host that `tapdisk` uses.
pub trait DaemonHost: GuestHost + AttachHost {}
impl<T: GuestHost + AttachHost> DaemonHost for T {}

/// How files are read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum AioArg {
    /// io_uring if the kernel allows it, threads otherwise
    #[default]
    Auto,
    /// io_uring, or fail
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads
    Threads,
}

/// Runs `tapdisk` and returns its exit status.
///
/// The disks that it serves are in `disks`, for control and monitoring.
pub async fn run<H: DaemonHost>(
    host: H,
    cli: Cli,
    tuning: Tuning,
    disks: Disks<H>,
    console: Rc<dyn Console>,
) -> u8 {
    match cli.command {
        Command::Serve(args) => serve::run(host, args, tuning, &disks, &*console).await,
        Command::Xen(args) => xen::run(host, args, tuning, disks, console).await,
        Command::Attach(args) => attach::run(host, args, tuning, &disks, &*console).await,
        Command::Detach(args) => attach::detach(host, args, &*console).await,
        Command::Control(args) => control::run(host, args, tuning, disks, console).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        crate::img::Cli::command().debug_assert();
        crate::ctl::Cli::command().debug_assert();
    }

    #[test]
    fn a_script_is_only_accepted_with_watch() {
        for (line, right) in [
            ("xen --watch", true),
            ("xen --watch --script mine", true),
            ("xen 3/xvda=raw:/a", true),
            ("xen", false),
            ("xen --watch 3/xvda=raw:/a", false),
            ("xen --script mine 3/xvda=raw:/a", false),
        ] {
            let parsed = Cli::try_parse_from(std::iter::once("tapdisk").chain(line.split(' ')));
            assert_eq!(parsed.is_ok(), right, "{line}");
        }
    }
}
