//! `tapdisk control`: disks that tap-ctl opens and closes, each served over NBD.
//!
//! ```text
//!   tap-ctl ──► ctl<pid>, json<pid> ──► Vbds ── attach, detach ──► Vbd ── open, pause, resume, close ──► Disk
//!                                                                   │                                     ▲
//!   qemu, nbd-client ──► nbd<pid>.<minor> ──► Server ───────────────┴─────────────────────────────────────┘
//! ```
//!
//! # Contract
//!
//! * A minor number belongs to one process at a time: it has the marker that `tap-ctl allocate` makes locked from
//!   attach to detach.
//! * Requests about one disk are carried out one after the other, those about several at the same time.
//! * A paused disk has no image open: its file can be changed, renamed or replaced. Those who use the disk notice a
//!   delay, never an error, and never another size or mode. A pause that does not come about in time leaves the disk
//!   running.
//! * An image, and its name, are durable before the disk is served from it: what was flushed is found again.
//! * A resume that fails leaves the disk running with the image that it had, if that can be opened and its name still
//!   has the same file; otherwise it stays paused. When a paused disk is closed its clients lose their connections, and
//!   can send what waited to whoever serves the image next.
//! * A forced close cuts the clients off at once. The image is in use until its storage has answered; if that takes
//!   longer than `--pause-limit`, the client of the control socket is told so, and the image is closed later.
//! * Whatever changes what a list shows of a disk, apart from its counters, is told to those who listen, once it is so.
//! * The process ends when it is asked to, or with the last minor number that is detached.

mod forced;
mod metrics;
mod open;
mod settings;
mod vbd;
mod vbds;

use crate::disk::{DiskHost, ImageArgs, memory_summary};
use crate::{Console, Tuning};
use clap::Args;
use futures_util::future::join;
use std::path::PathBuf;
use std::rc::Rc;
use tap_control::json::{Json, Verbs};
use tap_control::{Control, FOLDER, TapCtl, json_socket_of, socket_of};
use tap_core::Disks;
use tap_core::wait::Event as Flag;
use tap_host::{Errno, Events, Grants, SharedPages, Signals, Sockets, select};
use vbds::Vbds;

tap_host::listed! {
    pub(super) BUGS: Bug with [forced::BUGS, metrics::BUGS, vbd::BUGS, vbds::BUGS];
    ENDS_UNHEARD = "ends-unheard", "a tapdisk that ends gives its control sockets up while guests use its disks";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [vbd::MARKS, vbds::MARKS];
}

/// The parts of a host that controlled disks use.
pub trait ControlledHost: DiskHost + Signals + Grants + Events + SharedPages {}
impl<T: DiskHost + Signals + Grants + Events + SharedPages> ControlledHost for T {}

/// The command line of `tapdisk control`. The main carries out `fork` and `pid_file` before there is a host; in a world
/// they have no effect.
#[derive(Args, Clone, Debug)]
pub struct ControlArgs {
    /// Folder of control sockets, NBD sockets and minor numbers
    #[arg(long, value_name = "FOLDER", default_value = FOLDER)]
    pub folder: String,
    /// Folder for the records of files that lost data, for the next tapdisk; on a tmpfs
    #[arg(long, value_name = "FOLDER", default_value = "/run/tapdisk")]
    pub run_dir: PathBuf,
    #[command(flatten)]
    images: ImageArgs,
    /// Limit of NBD clients of one disk at one time
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// How long the requests of a disk may take to end when it is paused; if they take longer, it goes on. Its image is
    /// then closed without limit: nobody may touch the file before. A forced close waits as long, and if that takes
    /// longer, the image is closed later
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pause_limit: u32,
    /// How long a request may take before a warning says where in the stack it is; 0 never
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    watchdog: u32,
    /// Return once the control socket is there, and serve in the background; with the status 1 and a message if that
    /// failed
    #[arg(long)]
    pub fork: bool,
    /// File for the number of the serving process; removed at the end
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
}

/// Runs `tapdisk control` until it is asked to stop or its last disk is detached, and returns its exit status.
pub async fn run<H: ControlledHost>(
    host: H,
    args: ControlArgs,
    tuning: Tuning,
    disks: Disks<H>,
    console: Rc<dyn Console>,
) -> u8 {
    // Registered before the socket exists: a process that sees the socket may send a signal.
    let stopped = host.asked_to_stop();
    // Who sees the first one, by which a tapdisk is found, can use the second.
    let (folder, pid) = (&args.folder, host.process_id());
    let (path, second) = (socket_of(folder, pid), json_socket_of(folder, pid));
    let listeners = async { Ok((listen(&host, &second).await?, listen(&host, &path).await?)) };
    let (json, messages) = match listeners.await {
        Ok(listeners) => listeners,
        Err(words) => {
            let words: String = words;
            console.err(&format!("tapdisk: failed to {words}"));
            return 1;
        }
    };
    // The line that whoever starts a tapdisk reads: before it is ready, and nothing else.
    console.out(&path);
    console.ready();
    let memory = args.images.budget(&tuning);
    let vbds = Rc::new(Vbds::new(host.clone(), args, memory.clone(), tuning, disks, Rc::clone(&console)));
    let over = Flag::new();
    let tap_ctl = Control::new(host.clone(), TapCtl(Rc::clone(&vbds)));
    let beside = Control::new(host.clone(), Json(Rc::clone(&vbds)));
    // Heard until nothing is in use any more: whoever cannot reach it takes it for dead, and its guests for gone.
    let closed = async {
        select(stopped, vbds.last_detached()).await;
        if host.bug(&ENDS_UNHEARD) {
            over.set();
        }
        let failures = vbds.close_all().await;
        over.set();
        failures
    };
    let serving = join(tap_ctl.serve(messages, over.wait()), beside.serve(json, over.wait()));
    let (_, failures) = join(serving, closed).await;
    let mut status = 0;
    for failure in failures {
        console.err(&format!("tapdisk: failed to {failure}"));
        status = 1;
    }
    // Everything has happened that will.
    vbds.feed().end();
    join(tap_ctl.answered(), beside.answered()).await;
    console.out(&memory_summary(&memory));
    status
}

async fn listen<H: Sockets>(host: &H, path: &str) -> Result<H::Listener, String> {
    host.listen_private(path).await.map_err(|error| {
        let hint = match error {
            Errno::ENOENT => "; make the folder, or name another with --folder",
            _ => "",
        };
        format!("listen at {path}: {error}{hint}")
    })
}
