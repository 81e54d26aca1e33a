//! The command line as a user meets it: invalid input is refused with one line and exit status 2, and has no effect.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A separate working directory.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
    fn tapsim(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tapsim"))
            .args(args)
            .current_dir(self.path())
            .output()
            .expect("tapsim starts")
    }
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).expect("the directory is readable");
        let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, text).expect("the file can be written");
        path
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A saved run that fails, which is in every checkout.
fn saved() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions/data-after-mapping.run");
    std::fs::read_to_string(path).expect("the regression is there")
}

/// `args` must be refused with a single line that contains `word`, without any effect.
fn refused(folder: &Folder, args: &[&str], word: &str) {
    let before = folder.names();
    let output = folder.tapsim(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}{}", stdout(&output));
    assert!(text.contains(word), "{args:?} says {text:?}, without {word:?}");
    assert_eq!(text.lines().count(), 1, "{args:?} says {text:?}");
    assert_eq!(stdout(&output), "", "{args:?}");
    assert_eq!(folder.names(), before, "{args:?} leaves files");
}

#[test]
fn unknown_names_are_refused() {
    let folder = Folder::new();
    refused(&folder, &["sweep", "no-such"], "unknown scenario \"no-such\"");
    refused(&folder, &["run", "no-such", "1"], "unknown scenario \"no-such\"");
    refused(&folder, &["run", "qcow-power-cut", "1", "--bug", "no-such"], "unknown seeded bug \"no-such\"");
    refused(&folder, &["sweep", "--bug", "no-such"], "unknown seeded bug");
    refused(&folder, &["bugs", "no-such"], "unknown seeded bug");
}

#[test]
fn bad_numbers_are_refused() {
    let folder = Folder::new();
    for seeds in ["5", "9..3", "4..4", "a..b", "0..99999999999999999999"] {
        refused(&folder, &["sweep", "--seeds", seeds], seeds);
    }
    for time in ["10x", "0s", "1.5s", ""] {
        refused(&folder, &["sweep", "--for", time], "for");
    }
    refused(&folder, &["run", "qcow-power-cut", "minus-one"], "minus-one");
    refused(&folder, &["sweep", "--jobs", "0"], "jobs");
    refused(&folder, &["sweep", "--seeds", "0..1", "--for", "1s"], "cannot be used with");
    refused(&folder, &["fuzz", "--format", "vhd"], "possible values: qcow, nbd");
    refused(&folder, &["fuzz", "--for", "ever"], "not a time");
    refused(&folder, &["fuzz", "--bug", "no-such"], "unknown seeded bug");
    refused(&folder, &["no-such-command"], "no-such-command");
}

#[test]
fn bad_decision_files_are_refused() {
    let folder = Folder::new();
    let whole = saved();
    let cut = &whole[..whole.rfind("lost").expect("a decision of that kind") + 4];
    let files = [
        ("version.run", whole.replacen("tapsim-run 1", "tapsim-run 9", 1), "version 9"),
        ("cut.run", cut.to_string(), "cut off"),
        ("head.run", "tapsim-run 1\n".to_string(), "cut off"),
        ("other.run", "hello\n".to_string(), "not a decision file"),
        ("empty.run", String::new(), "not a decision file"),
        ("scenario.run", whole.replace("scenario qcow", "scenario no-such"), "unknown scenario"),
        ("label.run", whole.replace(" lost ", " no-such "), "unknown kind of decision"),
        ("bug.run", whole.replace("bug=data", "bug=no-such"), "unknown seeded bug"),
    ];
    for (name, text, _) in &files {
        folder.write(name, text);
    }
    for (name, text, word) in &files {
        for command in ["replay", "shrink", "explain"] {
            refused(&folder, &[command, name], word);
        }
        let now = std::fs::read_to_string(folder.path().join(name)).expect("it is still there");
        assert_eq!(&now, text, "{name} was changed");
    }
    refused(&folder, &["replay", "missing.run"], "missing.run");
    refused(&folder, &["shrink", "missing.run"], "missing.run");
    refused(&folder, &["replay", "."], "failed to read");
}

#[test]
fn exit_statuses_are_as_documented() {
    let folder = Folder::new();
    let code = |args: &[&str]| {
        let output = folder.tapsim(args);
        (output.status.code(), stdout(&output) + &stderr(&output))
    };
    let (ok, text) = code(&["sweep", "qcow-power-cut", "--seeds", "0..3", "--check-determinism"]);
    assert_eq!(ok, Some(0), "{text}");
    assert!(text.trim_end().ends_with("3 passed, 0 failed"), "{text}");
    assert_eq!(folder.names(), Vec::<String>::new(), "a sweep without failures saves nothing");

    let (broken, text) = code(&["run", "qcow-power-cut", "0", "--bug", "edge-dropped"]);
    assert_eq!(broken, Some(1), "{text}");
    assert!(text.contains("cargo tapsim replay") && text.contains("0 passed, 1 failed"), "{text}");
    assert_eq!(folder.names(), ["tapsim-failures"]);

    folder.write("bug.run", &saved());
    let (broken, text) = code(&["replay", "bug.run"]);
    assert_eq!(broken, Some(1), "{text}");
    assert!(text.contains("broken G7"), "{text}");
    let (broken, text) = code(&["explain", "bug.run"]);
    assert_eq!(broken, Some(1), "{text}");
    folder.write("clean.run", &saved().replace("option bug=data-after-mapping\n", ""));
    let (ok, text) = code(&["replay", "clean.run"]);
    assert_eq!(ok, Some(0), "{text}");

    let (list, text) = code(&["list"]);
    assert_eq!(list, Some(0), "{text}");
    assert!(text.contains("qcow-power-cut") && text.contains("data-after-mapping"), "{text}");
    assert_eq!(code(&["--help"]).0, Some(0));
}

#[test]
fn an_unwritable_path_is_refused_before_the_work() {
    let folder = Folder::new();
    folder.write("file", "");
    for option in ["--json", "--junit", "--out"] {
        refused(&folder, &["sweep", "qcow-power-cut", option, "file/below"], "file/below");
    }
    refused(
        &folder,
        &["run", "qcow-power-cut", "0", "--bug", "edge-dropped", "--out", "file/below"],
        "file/below",
    );
    refused(&folder, &["list", "--json", "."], "failed to write .");
}

#[test]
fn what_was_found_is_printed_whatever_cannot_be_written() {
    let folder = Folder::new();
    let args = ["sweep", "qcow-power-cut", "--seeds", "0..4", "--bug", "edge-dropped", "--json", "/dev/full"];
    let output = folder.tapsim(&args);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stdout(&output).contains("--bug edge-dropped: broken"), "{}", stdout(&output));
    assert!(stderr(&output).contains("failed to write /dev/full"), "{}", stderr(&output));
    let passes = folder.tapsim(&["sweep", "qcow-power-cut", "--seeds", "0..1", "--json", "/dev/full"]);
    assert_eq!(passes.status.code(), Some(2), "{}", stdout(&passes));
}

#[test]
fn options_without_effect_are_refused() {
    let folder = Folder::new();
    refused(&folder, &["explain", "x.run", "--json", "x"], "--json has no effect on explain");
    refused(&folder, &["--jobs", "2", "list"], "--jobs has no effect on list");
    refused(&folder, &["shrink", "x.run", "--log", "full"], "--log has no effect on shrink");
    refused(&folder, &["bugs", "--oracles", "--out", "x"], "--out has no effect on bugs");
    refused(&folder, &["bugs", "--oracles", "--within", "9"], "cannot be used with");
    refused(&folder, &["sweep", "--seeds", "0..2", "--from", "1"], "cannot be used with");
    refused(&folder, &["sweep", "--for", "1s", "--check-determinism"], "cannot be used with");
}

#[test]
fn the_last_seeds_run() {
    let folder = Folder::new();
    let last = u64::MAX.to_string();
    refused(&folder, &["sweep", "--from", &last], "the last seed of a sweep is 18446744073709551614");
    for args in [
        ["run", "qcow-created", &last].as_slice(),
        &["sweep", "qcow-created", "--from", "18446744073709551613"],
        &["sweep", "qcow-created", "--seeds", "18446744073709551613..18446744073709551615"],
    ] {
        let output = folder.tapsim(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}{}", stdout(&output), stderr(&output));
    }
}

#[test]
fn a_short_sweep_runs_every_scenario_once_and_interrupted_it_prints_what_was_done() {
    let folder = Folder::new();
    let output = folder.tapsim(&["sweep", "--for", "1s", "--json", "short.json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let text = std::fs::read_to_string(folder.path().join("short.json")).expect("it was written");
    let report: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let scenarios = report["scenarios"].as_array().expect("a list");
    assert!(scenarios.len() > 40 && scenarios.iter().all(|s| s["passed"] != 0), "{text}");

    let mut child = Command::new(env!("CARGO_BIN_EXE_tapsim"))
        .args(["sweep", "qcow-created", "--for", "1h"])
        .current_dir(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("tapsim starts");
    // Its progress says that it is at work.
    let mut said = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    assert!(said.any(|line| line.expect("text").contains(" runs, 0 failed")));
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(130), "{}", stdout(&output));
    let text = stdout(&output);
    assert!(text.trim_end().ends_with(" passed, 0 failed") && text.contains("\nqcow-created "), "{text}");
}

#[test]
fn a_sweep_stops_at_the_first_failure_and_shrinks_the_lowest_seed() {
    let folder = Folder::new();
    let sweep = ["sweep", "qcow-power-cut", "--seeds", "0..400", "--bug", "edge-dropped", "--stop"];
    let output = folder.tapsim(&[&sweep[..], &["--no-shrink", "--json", "stop.json"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = stdout(&output);
    let seed = text.split("qcow-power-cut seed ").nth(1).and_then(|t| t.split(' ').next()).expect("a seed");
    assert!(text.contains(&format!("cargo tapsim run qcow-power-cut {seed} --bug edge-dropped")), "{text}");
    assert_eq!(folder.names(), ["stop.json"], "nothing is saved");
    let report = std::fs::read_to_string(folder.path().join("stop.json")).expect("it was written");
    let report: serde_json::Value = serde_json::from_str(&report).expect("it is JSON");
    assert!(report["passed"].as_u64().expect("a number") < 100, "{report}");

    let output = folder.tapsim(&[&sweep[..], &["--junit", "stop.xml"]].concat());
    assert!(stdout(&output).contains("  shrunk from "), "{}", stdout(&output));
    let saved = std::fs::read_dir(folder.path().join("tapsim-failures")).expect("a failure is saved");
    assert_eq!(
        saved.filter(|e| e.as_ref().is_ok_and(|e| e.path().extension().is_some_and(|x| x == "run"))).count(),
        1
    );
    let xml = std::fs::read_to_string(folder.path().join("stop.xml")).expect("it was written");
    assert!(
        xml.contains("tests=\"1\" failures=\"1\"") && xml.contains("<failure message=\"broken "),
        "{xml}"
    );
}

#[test]
fn commands_that_did_their_job_end_with_0_and_others_do_not() {
    let folder = Folder::new();
    folder.write("bug.run", &saved());
    let shrunk = folder.tapsim(&["shrink", "bug.run"]);
    assert_eq!(shrunk.status.code(), Some(0), "{}{}", stdout(&shrunk), stderr(&shrunk));
    let missed = folder.tapsim(&["fuzz", "--for", "1s", "--bug", "nbd-seat-lost"]);
    assert_eq!(missed.status.code(), Some(1), "{}", stdout(&missed));
    assert!(stdout(&missed).contains("nbd-seat-lost was not found"), "{}", stdout(&missed));
    let regressions = concat!(env!("CARGO_MANIFEST_DIR"), "/regressions");
    let fresh = folder.tapsim(&["bugs", "--stale", "data-after-mapping", "--saved", regressions]);
    assert_eq!(fresh.status.code(), Some(0), "{}", stderr(&fresh));
    assert_eq!(stdout(&fresh), "nothing is stale: each saved run still shows its bug\n");
}

/// Two writes and a read of one sector; the second write does not wait for the first one.
const BETWEEN: &str = "tapsim-run 1
scenario raw-power-cut
seed 0
revision none
trace 0x0
option bug=edge-dropped
decision 58149a86cd2507b4 op 1 1360899 0
decision 58149a86cd2507b4 op 4 1360897 0
decision 58149a86cd2507b4 op 7 1360899 0
end 3
";

#[test]
fn a_story_tells_why() {
    let folder = Folder::new();
    let explain = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(name);
        let output = folder.tapsim(&["explain", path.to_str().expect("a path in UTF-8")]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        stdout(&output)
    };
    // An order that is broken: the write and the read, in the order of their submission.
    let order = explain("edge-dropped.run");
    assert!(order.lines().next().is_some_and(|line| line.ends_with(" --bug edge-dropped")), "{order}");
    let (_, requests) = order.split_once("in the order of their submission:\n").expect("requests are named");
    let kinds: Vec<&str> = requests.lines().filter_map(|line| line.trim_start().split(' ').next()).collect();
    let count = |wanted: &str| kinds.iter().filter(|kind| **kind == wanted).count();
    assert!(count("read") == 1 && count("write") > 0, "{order}");
    assert!(requests.lines().all(|line| line.contains(": submitted at ")), "{order}");
    assert!(!order.contains(" ns"), "there is one unit of time: {order}");
    // The same where a checker between two layers notices: both requests, and when they were submitted.
    folder.write("between.run", BETWEEN);
    let between = stdout(&folder.tapsim(&["explain", "between.run"]));
    for write in [1, 2] {
        let told = format!("  write {write} to 1329+1 of guest 1: submitted at 0.000, not answered\n");
        assert!(between.contains(&told), "{between}");
    }
    // What follows a fault is shown with it.
    let fault = explain("failed-l2-cached.run");
    let lines: Vec<&str> = fault.lines().collect();
    let happened =
        lines.iter().position(|line| line.starts_with("What happened")).expect("a part of the story");
    let fails = lines[happened..].iter().position(|line| line.contains("fails with")).expect("the fault");
    assert!(lines[happened + fails..][..5].iter().any(|line| line.contains("failed with")), "{fault}");
}

#[test]
fn reports_are_pages_of_runs_and_of_folders() {
    let folder = Folder::new();
    folder.write("bug.run", &saved());
    refused(&folder, &["report", "missing.run"], "missing.run");
    refused(&folder, &["report", "bug.run", "--perfetto", "missing/x"], "failed to write missing/x");
    refused(&folder, &["report", ".", "--perfetto", "x"], "are for one run");
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("it was written");
    let one = folder.tapsim(&["report", "bug.run", "--perfetto", "bug.json"]);
    assert_eq!(
        (one.status.code(), stdout(&one).as_str()),
        (Some(0), "bug.html\nbug.json\n"),
        "{}",
        stderr(&one)
    );
    let page = read("bug.html");
    for wanted in
        ["cargo tapsim replay bug.run", "--bug data-after-mapping", "<td>torn</td>", "holds the wrong sector"]
    {
        assert!(page.contains(wanted), "the page does not contain {wanted:?}");
    }
    let trace: serde_json::Value = serde_json::from_str(&read("bug.json")).expect("it is JSON");
    let events = trace["traceEvents"].as_array().expect("a list");
    assert!(events.iter().any(|e| e["ph"] == "i" && e["s"] == "g"), "no crash is marked");
    assert!(events.iter().any(|e| e["ph"] == "X" && e["args"]["outcome"] == "ok"), "no work is shown");

    folder.write("broken.run", "hello\n");
    let all = folder.tapsim(&["report", "."]);
    assert_eq!(all.status.code(), Some(2), "one of them cannot be read: {}", stdout(&all));
    let index = read("index.html");
    for wanted in ["href=\"bug.html\"", "<td>G7</td>", "broken.run: not a decision file"] {
        assert!(index.contains(wanted), "the table does not contain {wanted:?}: {index}");
    }
}

#[test]
fn a_saved_failure_comes_with_its_page() {
    let folder = Folder::new();
    let output = folder.tapsim(&["run", "qcow-power-cut", "0", "--bug", "edge-dropped"]);
    let name = "tapsim-failures/qcow-power-cut-edge-dropped-0.html";
    assert!(stdout(&output).contains(&format!("  page:    {name}\n")), "{}", stdout(&output));
    let page = std::fs::read_to_string(folder.path().join(name)).expect("it was written");
    assert!(page.contains("cargo tapsim replay tapsim-failures/qcow-power-cut-edge-dropped-0.run"), "{page}");
}
