//! `tap-img` on a real host.

use clap::Parser;
use std::process::ExitCode;
use tap_linux::{Level, Options};
use tapdisk::img::{Cli, run};
use tapdisk::terminal::Terminal;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = Options { log_level: Level::Warning, ..Options::default() };
    match tap_linux::run(&options, |host| async move { run(host, cli, &Terminal::new()).await }) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tap-img: failed to {error}");
            ExitCode::FAILURE
        }
    }
}
