//! `report`: runs as pages and as trace events.

use super::args::{Common, ReportArgs};
use super::output::load_run;
use super::paths::try_file;
use super::{Exit, Stop};
use crate::interrupt;
use crate::report::Report;
use crate::report::files::{Entry, index, page_of, replay};
use crate::run::run_apart;
use crate::spec::RunSpec;
use sim::TraceLevel;
use std::path::{Path, PathBuf};

/// `tapsim report`
pub(super) fn report_command(common: &Common, args: &ReportArgs) -> Result<Exit, Stop> {
    if args.path.is_dir() { folder(common, args) } else { one(common, args) }
}

/// A single run.
fn one(common: &Common, args: &ReportArgs) -> Result<Exit, Stop> {
    let page = args.page.clone().unwrap_or_else(|| page_of(&args.path));
    if page == args.path {
        return Err(Stop::usage(format!("{} is not a saved run: name a file like NAME.run", page.display())));
    }
    let report = report_of(common, &args.path, [Some(&page), args.perfetto.as_ref()])?;
    write(&page, &report.page(&replay(&args.path)))?;
    if let Some(path) = &args.perfetto {
        write(path, &report.perfetto())?;
    }
    Ok(Exit::Ok)
}

/// Runs a saved run again, once `outputs` can be written.
fn report_of(common: &Common, path: &Path, outputs: [Option<&PathBuf>; 2]) -> Result<Report, Stop> {
    let (_, spec) = load_run(path)?;
    for output in outputs.into_iter().flatten() {
        try_file(output).map_err(|e| Stop::usage(format!("failed to write {}: {e}", output.display())))?;
    }
    let spec = RunSpec { record: true, trace: TraceLevel::Events, ..spec };
    let outcome = run_apart(common.guarded(), &spec);
    Ok(Report::new(&spec, &outcome))
}

/// All runs of a folder, and a table of them.
fn folder(common: &Common, args: &ReportArgs) -> Result<Exit, Stop> {
    if args.perfetto.is_some() || args.page.is_some() {
        return Err(Stop::usage(format!(
            "--page and --perfetto are for one run, and {} is a folder",
            args.path.display()
        )));
    }
    let unreadable = |e| Stop::usage(format!("failed to list {}: {e}", args.path.display()));
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(&args.path).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        files.extend(path.extension().is_some_and(|e| e == "run").then_some(path));
    }
    files.sort();
    if files.is_empty() {
        println!("there is no saved run in {}", args.path.display());
        return Ok(Exit::NothingRan);
    }
    let (mut entries, mut exit) = (Vec::new(), Exit::Ok);
    for path in files {
        if interrupt::asked() {
            exit = Exit::Interrupted;
            break;
        }
        let page = page_of(&path);
        let report = report_of(common, &path, [Some(&page), None]);
        if let Ok(report) = &report {
            write(&page, &report.page(&replay(&path)))?;
        }
        let report = report.map_err(|Stop(_, why)| {
            eprintln!("tapsim: {why}");
            exit = Exit::Usage;
            why
        });
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        entries.push(Entry { name, report });
    }
    write(&args.path.join("index.html"), &index(&args.path, &entries))?;
    Ok(exit)
}

fn write(path: &Path, text: &str) -> Result<(), Stop> {
    std::fs::write(path, text)
        .map_err(|e| Stop::usage(format!("failed to write {}: {e}", path.display())))?;
    println!("{}", path.display());
    Ok(())
}
