//! House scripts, as one program: `cargo xtask TASK`.
//!
//! It depends on no other crate of the workspace, so that it builds in seconds and works when they do not build.

mod bench;
mod ci;
mod coverage;
mod dist;
mod mutants;
mod tidy;
mod xen_host;

use std::path::PathBuf;
use std::process::ExitCode;
use xshell::{Shell, cmd};

/// The folder that cargo builds into: `target`, or what `CARGO_TARGET_DIR` or a configuration says.
fn target_dir(sh: &Shell) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let text = cmd!(sh, "cargo metadata --format-version 1 --no-deps --offline").quiet().read()?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let folder = metadata["target_directory"].as_str().ok_or("cargo names no target folder")?;
    Ok(folder.into())
}

const HELP: &str = "\
House scripts.

Usage: cargo xtask TASK

Tasks:
  ci        everything that must hold before a change lands: format, lints, tidy, tests, the build without the guard's
            cfg, the package that ships, a guest on a real Xen host under emulation, and a release sweep whose seeds come
            from the commit
  bench     measures tapdisk against other servers; `cargo xtask bench --help`
  coverage  shows which lines no sweep executes; `cargo xtask coverage --help`
  dist      builds what is deployed: a tree of files, and a Debian package; `cargo xtask dist --help`
  mutants   puts slips of engineers into a copy of the stack and counts which of them sweeps and tests notice;
            `cargo xtask mutants --help`
  tidy      looks for long files and functions, circles between files, public items that nothing names, and documents
            that name what is not there
  xen-host  boots a real Xen host under QEMU's emulation and runs tests, a script or a shell in its dom0;
            `cargo xtask xen-host --help`
  help      this text
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let task = args.first().cloned().unwrap_or_else(|| "help".into());
    let result = match task.as_str() {
        "ci" => ci::run(),
        "bench" => bench::run(&args[1..]),
        "coverage" => coverage::run(&args[1..]),
        "dist" => dist::run(&args[1..]),
        "mutants" => mutants::run(&args[1..]),
        "tidy" => tidy::run(&args[1..]),
        // Its exit status is that of the script that ran inside.
        "xen-host" => return xen_host::main(&args[1..]),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => {
            eprintln!("xtask: unknown task {other:?}: `cargo xtask help` lists the tasks");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_folder_is_the_one_that_cargo_uses() {
        let sh = Shell::new().expect("there is a current folder");
        sh.set_var("CARGO_TARGET_DIR", "/elsewhere/target");
        assert_eq!(target_dir(&sh).expect("cargo runs"), PathBuf::from("/elsewhere/target"));
    }
}
