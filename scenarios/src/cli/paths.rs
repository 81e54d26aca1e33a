//! Paths of results: tried before the work, and never the reason to lose what was found.

use super::args::Common;
use super::{Exit, Stop};
use std::fs::{OpenOptions, remove_file};
use std::io;
use std::path::Path;

/// Checks that results can be written, and failures saved if the command `saves` any. Leaves no file.
///
/// # Errors
/// The path that cannot be written.
pub(super) fn try_outputs(common: &Common, saves: bool) -> Result<(), Stop> {
    for path in [&common.json, &common.junit].into_iter().flatten() {
        try_file(path).map_err(|e| Stop::usage(format!("failed to write {}: {e}", path.display())))?;
    }
    let out = &common.out;
    if !saves {
        return Ok(());
    }
    try_folder(out).map_err(|e| Stop::usage(format!("failed to save failures in {}: {e}", out.display())))
}

/// Opens a file for writing; its content stays.
pub(super) fn try_file(path: &Path) -> io::Result<()> {
    let existed = path.symlink_metadata().is_ok();
    OpenOptions::new().append(true).create(true).open(path)?;
    if existed { Ok(()) } else { remove_file(path) }
}

/// Makes a file in the folder, or in the nearest one above it that exists.
fn try_folder(folder: &Path) -> io::Result<()> {
    let there = |path: &&Path| path.as_os_str().is_empty() || path.symlink_metadata().is_ok();
    let nearest = folder.ancestors().find(there).unwrap_or(Path::new(""));
    try_file(&nearest.join(format!(".tapsim-{}", std::process::id())))
}

/// The result of a command of which part of the output could not be stored: what was found outweighs that.
pub(super) fn after(found: Exit, stored: Result<(), Stop>) -> Result<Exit, Stop> {
    match (found, stored) {
        (found, Ok(())) => Ok(found),
        (Exit::Broken | Exit::Nondeterminism, Err(Stop(_, text))) => {
            eprintln!("tapsim: {text}");
            Ok(found)
        }
        (_, Err(stop)) => Err(stop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_report_does_not_hide_a_finding() {
        let lost = || Err(Stop::usage("failed to write x"));
        assert_eq!(after(Exit::Broken, lost()).ok(), Some(Exit::Broken));
        assert!(after(Exit::Ok, lost()).is_err_and(|stop| stop.0 == Exit::Usage));
        assert_eq!(after(Exit::Ok, Ok(())).ok(), Some(Exit::Ok));
    }
}
