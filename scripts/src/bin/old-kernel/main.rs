//! Runs a program as if the kernel were Linux 4.19: `old-kernel PROGRAM [ARGUMENT...]`.
//!
//! System calls that are younger fail with `ENOSYS` (io_uring, openat2, clone3, faccessat2, pidfd_open, close_range,
//! epoll_pwait2 and all others), in the program and in whatever it starts: a seccomp filter cannot be taken off again.
//! Flags and files of younger kernels are not hidden, nor is the kernel's own idea of its version.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use std::collections::BTreeMap;
use std::error::Error;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// On x86-64, rseq is 334, the last one of Linux 4.19. Not one number above the second is used yet.
const YOUNGER: std::ops::Range<i64> = 335..700;
/// "Function not implemented", on all architectures but a few.
const ENOSYS: u32 = 38;

const HELP: &str = "\
Runs a program as on Linux 4.19: younger system calls fail with ENOSYS.

Usage: old-kernel PROGRAM [ARGUMENT...]";

fn filter() -> Result<BpfProgram, Box<dyn Error>> {
    if std::env::consts::ARCH != "x86_64" {
        return Err("the numbers of system calls are known for x86-64 only".into());
    }
    // No condition on arguments.
    let rules: BTreeMap<i64, Vec<_>> = YOUNGER.map(|number| (number, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(ENOSYS), arch)?.try_into()?)
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(program) = args.next() else {
        eprintln!("{HELP}");
        return ExitCode::from(2);
    };
    let error = match filter().and_then(|filter| Ok(apply_filter(&filter)?)) {
        Ok(()) => format!("start {}: {}", program.display(), Command::new(&program).args(args).exec()),
        Err(error) => format!("install the filter: {error}"),
    };
    eprintln!("old-kernel: failed to {error}");
    ExitCode::from(126)
}
