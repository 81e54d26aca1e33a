//! `tap-ctl`: controls tapdisks, with the verbs, the options, the output and the exit statuses of tapdisk3's.
//!
//! ```text
//!   folder/ctl<pid>              control sockets: which tapdisks there are
//!   folder/nbd<pid>.<minor>      where an open disk is served
//!   folder/tapdisk/tapdisk-<n>   a file for each minor number that is allocated, locked while a tapdisk has it
//! ```
//!
//! # Contract
//!
//! * Every failure is one line on standard error, and the exit status is its error number.
//! * What a verb of several parts (`create`) has begun it takes back when a later part fails.
//! * `list` shows what can be seen, whatever does not answer; that is named on standard error. All are asked side by
//!   side: those that hang cost the time limit once.

mod commit;
mod events;
mod list;
mod minors;
mod open;
mod resize;
mod set;
mod snapshot;
mod top;

pub(crate) use list::pids_in;
pub use minors::marker_of;
pub(crate) use minors::{allocation_of, is_named};
pub use tap_control::{owner_of, pid_of};

use crate::Console;
use crate::help;
use clap::{Args, Parser, Subcommand};
use commit::CommitArgs;
use events::EventsArgs;
use list::ListArgs;
use open::{CreateArgs, OpenArgs, UnpauseArgs};
use resize::ResizeArgs;
use serde_json::{Value, json};
use set::SetArgs;
use snapshot::SnapshotArgs;
use std::future::Future;
use tap_abi::tapctl::{Kind, Message, PidOf};
use tap_control::FOLDER;
use tap_control::client::{CallError, Tapdisk};
use tap_control::json::{Disks, Metrics, Request, Stats};
use tap_host::{Errno, Files, Probe, Signals, Sockets, Time};
use top::TopArgs;

tap_host::listed! {
    pub(super) BUGS: Bug with [list::BUGS, minors::BUGS, top::BUGS];
}

tap_host::listed! {
    pub(super) MARKS: Mark with [events::MARKS, list::MARKS, minors::MARKS, top::MARKS];
}

/// The parts of a host that `tap-ctl` uses.
pub trait CtlHost: Files + Sockets + Time + Probe + Signals {}
impl<T: Files + Sockets + Time + Probe + Signals> CtlHost for T {}

/// Starts processes.
pub trait Launch {
    /// Starts `tapdisk control` in the background, with `options` behind its own, and returns its process number once
    /// it can be controlled.
    ///
    /// # Errors
    /// Text that continues "failed to".
    fn tapdisk(&self, folder: &str, options: &[String]) -> impl Future<Output = Result<u32, String>>;
}

/// The command line of `tap-ctl`.
#[derive(Parser, Debug)]
#[command(name = "tap-ctl", version, about = "Controls tapdisks", after_help = help::ctl())]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Folder of control sockets, NBD sockets and minor numbers
    #[arg(long, global = true, value_name = "FOLDER", default_value = FOLDER)]
    pub folder: String,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Lists tapdisks, their disks, and minor numbers that no tapdisk has
    List(ListArgs),
    /// Takes a minor number, and prints the path of its marker
    Allocate,
    /// Gives a minor number back
    Free(MinorArgs),
    /// Starts a tapdisk, which serves no disk yet
    Spawn(SpawnArgs),
    /// Has a tapdisk take a minor number
    Attach(DiskArgs),
    /// Has a tapdisk give a minor number up; it ends with its last one
    Detach(DiskArgs),
    /// Opens an image at a minor number, and serves it over NBD
    Open(OpenArgs),
    /// Closes the image of a minor number
    Close(CloseArgs),
    /// Lets no more requests through, and closes the image; who uses the disk waits
    Pause(WaitArgs),
    /// Opens the image again, or another one, and lets requests through
    Unpause(UnpauseArgs),
    /// Takes a snapshot of a disk in use: its image no longer changes, and a new one above it takes the writes
    Snapshot(SnapshotArgs),
    /// Merges an image below a disk in use into its backing file; the disk goes on without it
    Commit(CommitArgs),
    /// Says how far a merge is
    Query(DiskArgs),
    /// Ends a merge, which can be begun again
    Cancel(DiskArgs),
    /// Makes a disk in use larger
    Resize(ResizeArgs),
    /// Sets the I/O priority of a disk in use, and prints it; without an option it only prints
    Set(SetArgs),
    /// Allocates a minor number, starts a tapdisk, attaches and opens; prints the path of the marker
    Create(CreateArgs),
    /// Closes, detaches and frees
    Destroy(WaitArgs),
    /// Prints the counters of a disk, or of all disks of a tapdisk, as JSON
    Stats(StatsArgs),
    /// Prints the metrics of a tapdisk as OpenMetrics text
    Metrics(PidArgs),
    /// Prints what happens to disks, line by line, until it is interrupted
    Events(EventsArgs),
    /// Shows what disks do: requests and bytes in each second, and how long they take
    Top(TopArgs),
    /// Prints the process number that a tapdisk itself says
    Pid(PidArgs),
    /// Prints the block major number of blktap2's module, where there is one
    Major,
    /// Says whether disks can be controlled on this machine
    Check,
}

#[derive(Args, Clone, Copy, Debug)]
struct PidArgs {
    /// The tapdisk's process number
    #[arg(short, value_name = "PID")]
    pid: u32,
}

#[derive(Args, Clone, Copy, Debug)]
struct MinorArgs {
    /// The minor number
    #[arg(short, value_name = "MINOR", value_parser = clap::value_parser!(u16).range(..=0xfffe))]
    minor: u16,
}

#[derive(Args, Clone, Copy, Debug)]
struct DiskArgs {
    #[command(flatten)]
    pid: PidArgs,
    #[command(flatten)]
    minor: MinorArgs,
}

#[derive(Args, Clone, Copy, Debug)]
struct StatsArgs {
    #[command(flatten)]
    pid: PidArgs,
    /// The minor number; without it all that are open
    #[arg(short, value_name = "MINOR")]
    minor: Option<u16>,
}

#[derive(Args, Clone, Copy, Debug)]
struct WaitArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// How long to wait for the tapdisk, in seconds; it may still carry the request out later
    #[arg(short, value_name = "SECONDS", default_value_t = 0)]
    timeout: u32,
}

#[derive(Args, Clone, Copy, Debug)]
struct CloseArgs {
    #[command(flatten)]
    wait: WaitArgs,
    /// Cut the clients off at once: what they have no answer for they may send to whoever serves the image next. Waits
    /// for storage only as long as a pause would
    #[arg(short)]
    force: bool,
}

#[derive(Args, Clone, Debug)]
struct SpawnArgs {
    /// Options of `tapdisk control`, behind --
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Why a verb failed: the error number that is the exit status, and words that continue "failed to".
#[derive(Clone, PartialEq, Eq, Debug)]
struct Failure {
    error: Errno,
    words: String,
}

impl Failure {
    fn new(error: Errno, words: impl Into<String>) -> Self {
        Self { error, words: words.into() }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

/// Limit of time for requests that are answered at once, in seconds: a tapdisk that does not answer is stuck.
const AT_ONCE_S: u64 = 30;
/// No limit.
const FOR_EVER_S: u64 = 0;

/// One call of `tap-ctl`.
struct Ctl<'a, H, L> {
    host: &'a H,
    launch: &'a L,
    console: &'a dyn Console,
    folder: String,
    json: bool,
}

/// Runs `tap-ctl` and returns its exit status: 0, or an error number.
pub async fn run<H: CtlHost, L: Launch>(host: &H, cli: Cli, launch: &L, console: &dyn Console) -> u8 {
    let ctl = Ctl { host, launch, console, folder: cli.folder, json: cli.json };
    match ctl.carry_out(cli.verb).await {
        Ok(()) => 0,
        Err(Failure { error, words }) => {
            console.err(&format!("tap-ctl: failed to {words}"));
            u8::try_from(error.0).unwrap_or(u8::MAX)
        }
    }
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    async fn carry_out(&self, verb: Verb) -> Result<(), Failure> {
        match verb {
            Verb::List(args) => self.list(&args).await,
            Verb::Allocate => self.allocate().await.map(|minor| self.say_minor(minor)),
            Verb::Free(args) => self.free(args.minor).await,
            Verb::Spawn(args) => {
                let pid = self.spawn(&args.options).await?;
                // Scripts read the number alone.
                let words = if self.console.is_terminal() { "tapdisk spawned with pid " } else { "" };
                self.say(&format!("{words}{pid}"), &json!({ "pid": pid }));
                Ok(())
            }
            Verb::Attach(args) => self.ask(args, Kind::Attach, AT_ONCE_S).await,
            Verb::Detach(args) => self.ask(args, Kind::Detach, AT_ONCE_S).await,
            Verb::Open(args) => self.open(&args).await,
            Verb::Close(args) => {
                let kind = if args.force { Kind::ForceShutdown } else { Kind::Close };
                self.ask(args.wait.disk, kind, args.wait.timeout.into()).await
            }
            Verb::Pause(args) => self.ask(args.disk, Kind::Pause, args.timeout.into()).await,
            Verb::Unpause(args) => self.unpause(&args).await,
            Verb::Snapshot(args) => self.snapshot(&args).await,
            Verb::Commit(args) => self.commit(&args).await,
            Verb::Query(args) => self.query(args).await,
            Verb::Cancel(args) => self.cancel(args).await,
            Verb::Resize(args) => self.resize(&args).await,
            Verb::Set(args) => self.set(&args).await,
            Verb::Create(args) => self.create(&args).await,
            Verb::Destroy(args) => {
                self.ask(args.disk, Kind::Close, args.timeout.into()).await?;
                self.ask(args.disk, Kind::Detach, AT_ONCE_S).await?;
                self.free(args.disk.minor.minor).await
            }
            Verb::Stats(args) => self.stats(args).await,
            Verb::Metrics(args) => {
                let metrics: Metrics = self.tapdisk(args.pid, AT_ONCE_S).json(&Request::Metrics {}).await?;
                self.console.out(metrics.text.trim_end());
                Ok(())
            }
            Verb::Events(args) => self.events(args).await,
            Verb::Top(args) => self.top(args).await,
            Verb::Pid(args) => {
                let answer = self.tapdisk(args.pid, AT_ONCE_S).call(&Message::new(Kind::Pid, 0)).await?;
                let pid = answer.body::<PidOf>().pid.get();
                self.say(&pid.to_string(), &json!({ "pid": pid }));
                Ok(())
            }
            Verb::Major => self.major().await,
            Verb::Check => self.check().await,
        }
    }

    fn tapdisk(&self, pid: u32, limit_s: u64) -> Tapdisk<H> {
        Tapdisk { host: self.host.clone(), folder: self.folder.clone(), pid, limit_s }
    }

    async fn ask(&self, disk: DiskArgs, kind: Kind, limit_s: u64) -> Result<(), Failure> {
        let tapdisk = self.tapdisk(disk.pid.pid, limit_s);
        tapdisk.call(&Message::new(kind, disk.minor.minor)).await?;
        Ok(())
    }

    async fn stats(&self, args: StatsArgs) -> Result<(), Failure> {
        let tapdisk = self.tapdisk(args.pid.pid, AT_ONCE_S);
        let text = match args.minor {
            // As from every tapdisk.
            Some(minor) => tapdisk.stats(minor).await?,
            None => {
                let all: Disks<Stats> = tapdisk.json(&Request::Stats { minor: None }).await?;
                serde_json::to_string(&all.disks).expect("maps have texts as keys")
            }
        };
        self.console.out(&text);
        Ok(())
    }

    async fn spawn(&self, options: &[String]) -> Result<u32, Failure> {
        let pid = self.launch.tapdisk(&self.folder, options).await;
        pid.map_err(|words| Failure::new(Errno::ECHILD, words))
    }

    /// A result, for people or for programs.
    fn say(&self, words: &str, json: &Value) {
        self.console.out(&if self.json { json.to_string() } else { words.to_owned() });
    }

    fn say_minor(&self, minor: u16) {
        let path = marker_of(&self.folder, minor);
        self.say(&path, &json!({ "minor": minor, "path": path }));
    }
}
