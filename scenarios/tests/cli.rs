//! The command line as a user meets it: invalid input is refused with one line and exit status 2, and has no effect.

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
fn an_unwritable_path_is_named() {
    let folder = Folder::new();
    folder.write("file", "");
    let output =
        folder.tapsim(&["run", "qcow-power-cut", "0", "--bug", "edge-dropped", "--out", "file/below"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("file/below") && stderr(&output).lines().count() == 1,
        "{}",
        stderr(&output)
    );
}
