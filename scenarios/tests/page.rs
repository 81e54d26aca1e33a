//! The page of a run in a browser: it opens from a file, without a network, and can be used by keyboard.
//!
//! Where there is no Chromium, the tests report themselves ignored; `.ci/run` installs it.

use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Uses the page, and leaves what is wrong in an element.
const READER: &str = include_str!("page.js");
/// A saved run whose crash tears a cluster.
const RUN: &str = "regressions/data-after-mapping.run";

fn main() -> ExitCode {
    let browser = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|name| {
        Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
    });
    let test = |name: &str, work: fn(&str) -> Result<(), Failed>| {
        Trial::test(name, move || work(browser.unwrap_or_default())).with_ignored_flag(browser.is_none())
    };
    let trials = vec![
        test("page::is_usable_in_a_window", |browser| used(browser, "1200,900")),
        test("page::is_usable_on_a_phone", |browser| used(browser, "360,740")),
        test("page::has_a_picture", picture),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Makes the page of [`RUN`] in `folder`.
fn page(folder: &Path) -> Result<PathBuf, Failed> {
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join(RUN);
    let page = folder.join("page.html");
    let output = Command::new(env!("CARGO_BIN_EXE_tapsim"))
        .arg("report")
        .arg(run)
        .arg("--page")
        .arg(&page)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(page)
}

/// Runs the browser without a window, a network or a profile.
fn browse(browser: &str, folder: &Path, options: &[&str], page: &Path) -> Result<Vec<u8>, Failed> {
    let profile = format!("--user-data-dir={}", folder.join("profile").display());
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"])
        .args(["--host-resolver-rules=MAP * ~NOTFOUND", &profile])
        .args(options)
        .arg(format!("file://{}", page.display()))
        .output()?;
    if !output.status.success() {
        return Err(format!("{browser} ends with {}", output.status).into());
    }
    Ok(output.stdout)
}

fn used(browser: &str, size: &str) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let text = std::fs::read_to_string(page(folder.path())?)?;
    if text.contains("://") && text.replace("http://www.w3.org/2000/svg", "").contains("://") {
        return Err("the page names something outside".into());
    }
    let watch = "<script>window.thrown = []; onerror = (e) => window.thrown.push(String(e));</script>";
    let text = text.replacen("<title>", &format!("{watch}<title>"), 1);
    let used = folder.path().join("used.html");
    std::fs::write(&used, text.replace("</body>", &format!("<script>{READER}</script></body>")))?;
    let dom = browse(browser, folder.path(), &["--dump-dom", &format!("--window-size={size}")], &used)?;
    let dom = String::from_utf8_lossy(&dom).into_owned();
    let result = dom.split_once("<pre id=\"result\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    match result {
        Some(("fine", _)) => Ok(()),
        Some((wrong, _)) => Err(wrong.to_owned().into()),
        None => Err("the script did not end".into()),
    }
}

fn picture(browser: &str) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let (page, file) = (page(folder.path())?, folder.path().join("page.png"));
    let shot = format!("--screenshot={}", file.display());
    browse(browser, folder.path(), &[&shot, "--window-size=1000,1400"], &page)?;
    let bytes = std::fs::read(&file)?;
    let is_png = bytes.starts_with(b"\x89PNG\r\n\x1a\n");
    let size =
        |at: usize| bytes.get(at..at + 4).map(|b| b.iter().fold(0, |n: u32, b| n << 8 | u32::from(*b)));
    if is_png && size(16) == Some(1000) && size(20) == Some(1400) && bytes.len() > 20_000 {
        return Ok(());
    }
    Err(format!("{} bytes, png: {is_png}, {:?} x {:?}", bytes.len(), size(16), size(20)).into())
}
