//! `tapdisk` on a real host.

use clap::Parser;
use std::process::ExitCode;
use std::time::Duration;
use tap_linux::{AioEngine, Level, Options, set_io_priority};
use tapdisk::daemon::{AioArg, Cli, run};
use tapdisk::terminal::Terminal;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = Options {
        aio: match cli.aio {
            AioArg::Auto => AioEngine::Auto,
            AioArg::IoUring => AioEngine::IoUring,
            AioArg::Threads => AioEngine::Threads,
        },
        log_level: if cli.verbose { Level::Debug } else { Level::Info },
        poll: Duration::from_micros(cli.poll_us.into()),
        ..Options::default()
    };
    // Before there are threads: they inherit it.
    if let Some(nice) = cli.ionice
        && let Err(error) = set_io_priority(nice.class, nice.level)
    {
        eprintln!("tapdisk: failed to set the priority at the drives: {error}");
        return ExitCode::FAILURE;
    }
    match tap_linux::run(&options, |host| async move { run(host, cli, &Terminal::new()).await }) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tapdisk: failed to {error}");
            ExitCode::FAILURE
        }
    }
}
