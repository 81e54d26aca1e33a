//! `tapdisk` on a real host.

use std::env::args_os;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;
use tap_linux::{
    AioEngine, Divided, Level, LinuxHost, Options, PidFile, Rings, Starting, XenOptions, divide,
    remove_dead_sockets, resolve_without_plugins, set_io_priority, writes_for_the_kernel,
};
use tap_programs::ctl::owner_of;
use tap_programs::daemon::{AioArg, Cli, Command, MAX_DISKS, run};
use tap_programs::usage;
use tap_programs::{Console, Disks, Tuning};
use tapdisk::{Terminal, VERSION, make_control_folder};

/// Exit status if the command line cannot be parsed.
const UNUSABLE: u8 = 2;

fn main() -> ExitCode {
    // A program with its own C library must not load parts of another.
    if cfg!(target_feature = "crt-static") {
        resolve_without_plugins();
    }
    let cli: Cli = match usage::parse(("tapdisk", VERSION), args_os(), UNUSABLE, &Terminal::new("tapdisk")) {
        Ok(cli) => cli,
        Err(status) => return ExitCode::from(status),
    };
    // Before anything else exists.
    let divided = match cli.command.forks() {
        true => divide().map(Some).map_err(|error| error.to_string()),
        false => Ok(None),
    };
    let status = divided.and_then(|divided| match divided {
        Some(Divided::Caller(status)) => Ok(status),
        Some(Divided::Background(starting)) => {
            // It lives longer than whoever starts it, and serves only what it opens itself.
            if let Command::Control(_) = &cli.command {
                starting.keep_nothing();
            }
            serve(cli, Some(starting))
        }
        None => serve(cli, None),
    });
    match status {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tapdisk: failed to {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves to the end, and returns the exit status; `starting` if a caller waits for the begin.
fn serve(cli: Cli, starting: Option<Starting>) -> Result<u8, String> {
    let pid_file = cli.command.pid_file();
    // Kept to the end. Not served without it, because nobody would know whom to stop.
    let _pid_file = pid_file.map(PidFile::create).transpose().map_err(|error| error.to_string())?;
    let run_folder = cli.command.run_dir().to_owned();
    let options = Options {
        aio: match cli.aio {
            AioArg::Auto => AioEngine::Auto,
            AioArg::IoUring => AioEngine::IoUring,
            AioArg::Threads => AioEngine::Threads,
        },
        log_level: if cli.verbose { Level::Debug } else { Level::Info },
        poll: Duration::from_micros(cli.poll_us.into()),
        run_folder: Some(run_folder),
        xen: match &cli.command {
            Command::Xen(_) => Some(XenOptions::default()),
            Command::Control(_) => Some(XenOptions { rings: Rings::IfThere, store: None }),
            _ => None,
        },
        ..Options::default()
    };
    if let Command::Control(args) = &cli.command {
        make_control_folder(&args.folder)?;
        remove_dead_sockets(&args.folder, owner_of);
    }
    if let Command::Attach(_) = &cli.command {
        // Without it the kernel may wait for our device to give it memory. Without permission it is only less safe.
        let _refused = writes_for_the_kernel();
    }
    // Set before there are threads: they inherit it.
    if let Some(priority) = cli.ionice {
        let set = set_io_priority(priority);
        set.map_err(|error| format!("set the I/O priority: {error}"))?;
    }
    let run = |host: LinuxHost| async move {
        let terminal = Rc::new(Terminal::of_service("tapdisk", starting));
        let (disks, console) = (Disks::new(host.clone(), MAX_DISKS), Rc::clone(&terminal) as Rc<dyn Console>);
        let status = run(host, cli, Tuning::default(), disks, console).await;
        terminal.status(status)
    };
    tap_linux::run(&options, run).map_err(|error| error.to_string())
}
