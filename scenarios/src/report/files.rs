//! Pages beside saved runs, and the page of a folder.

use super::Report;
use super::page::{escaped, fill};
use crate::spec::{Outcome, RunSpec};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// The page of the run that is saved as `path`.
pub fn page_of(path: &Path) -> PathBuf {
    path.with_extension("html")
}

/// Writes the page of a run, which is saved as `path`, beside it. Returns the page's path.
///
/// # Errors
/// The page cannot be written.
pub fn save_page(path: &Path, spec: &RunSpec, outcome: &Outcome) -> io::Result<PathBuf> {
    let page = page_of(path);
    std::fs::write(&page, Report::new(spec, outcome).page(&replay(path)))?;
    Ok(page)
}

/// The command that replays a saved run.
pub fn replay(path: &Path) -> String {
    format!("cargo tapsim replay {}", path.display())
}

/// A row of the page of a folder.
pub struct Entry {
    /// The file's name, without the folder.
    pub name: String,
    /// Its report, or why there is none.
    pub report: Result<Report, String>,
}

/// The page of a folder.
pub fn index(folder: &Path, entries: &[Entry]) -> String {
    let title = format!("Saved runs in {}", folder.display());
    let mut body = format!(
        "<h1>{}</h1>\n<p class=\"faint\">{} runs.</p>\n<main><table class=\"parts\"><thead><tr><th>Run</th>\
         <th>Broken</th><th>What was observed</th><th>Decisions</th></tr></thead>\n<tbody>\n",
        escaped(&title),
        entries.len()
    );
    for Entry { name, report } in entries {
        let page = page_of(Path::new(name)).to_string_lossy().into_owned();
        let _ = match report {
            Err(why) => writeln!(
                body,
                "<tr><th scope=\"row\">{}</th><td>unknown</td><td>{}</td><td></td></tr>",
                escaped(name),
                escaped(why)
            ),
            Ok(report) => {
                let broken = report.broken.as_ref();
                let (invariant, detail) = broken.map_or(("nothing", ""), |b| {
                    (b.invariant.as_str(), b.detail.lines().next().unwrap_or_default())
                });
                writeln!(
                    body,
                    "<tr><th scope=\"row\"><a href=\"{}\">{}</a><br><span class=\"faint\">{}</span></th><td>{}</td>\
                     <td>{}</td><td>{}</td></tr>",
                    escaped(&page),
                    escaped(&report.heading),
                    escaped(name),
                    escaped(invariant),
                    escaped(detail),
                    report.decisions.len()
                )
            }
        };
    }
    body += "</tbody></table></main>\n";
    fill(&title, &body)
}
