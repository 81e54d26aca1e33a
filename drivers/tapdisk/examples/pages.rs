//! Writes the man pages and shell completions of the programs, from their command lines:
//! `cargo run -p tapdisk --example pages -- FOLDER` fills `FOLDER/usr/share` as packages do.

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use std::error::Error;
use std::fs::create_dir_all;
use std::path::Path;
use tapdisk::VERSION;

/// Each shell, and where packages put its completions.
const SHELLS: [(Shell, &str); 3] = [
    (Shell::Bash, "usr/share/bash-completion/completions"),
    (Shell::Fish, "usr/share/fish/vendor_completions.d"),
    (Shell::Zsh, "usr/share/zsh/vendor-completions"),
];
const MANUALS: &str = "usr/share/man/man1";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("which folder?")?;
    let all = [
        tap_programs::daemon::Cli::command(),
        tap_programs::ctl::Cli::command(),
        tap_programs::tapback::Cli::command(),
        tap_programs::img::Cli::command(),
        tap_programs::mason::Cli::command(),
    ];
    for command in all {
        write(command.version(VERSION), Path::new(&folder))?;
    }
    Ok(())
}

fn write(command: Command, folder: &Path) -> Result<(), Box<dyn Error>> {
    let name = command.get_name().to_owned();
    for (shell, at) in SHELLS {
        create_dir_all(folder.join(at))?;
        let written = generate_to(shell, &mut command.clone(), &name, folder.join(at))?;
        if shell == Shell::Bash {
            // Loaded by the name of the command.
            std::fs::rename(written, folder.join(at).join(&name))?;
        }
    }
    create_dir_all(folder.join(MANUALS))?;
    Ok(clap_mangen::generate_to(command, folder.join(MANUALS))?)
}
