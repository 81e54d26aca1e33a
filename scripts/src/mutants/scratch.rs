//! The scratch copy: the tree with those mutants of a sample that compile.

use super::render::{Edit, Rendered, render};
use super::sample::Mutant;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The copy's folder, from the top of the tree.
const FOLDER: &str = "target/mutants";
/// The crate that all crates with mutants depend on.
const HOST_LIB: &str = "drivers/host/src/lib.rs";
/// Its module that says which mutant is selected, in the copy only.
const SELECTOR_FILE: &str = "drivers/host/src/mutant.rs";
/// Rounds of compiling and dropping; each finds the errors of one compiler phase.
const ROUNDS: usize = 60;

/// What is added to the copy's `tap-host`: which mutant is selected, and which were reached.
const SELECTOR: &str = r#"//! Which mutant is selected.
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::sync::{LazyLock, Mutex};

static SELECTED: LazyLock<u32> =
    LazyLock::new(|| std::env::var("TAPSIM_MUTANT").ok().and_then(|n| n.parse().ok()).unwrap_or(0));
static REACHED: LazyLock<Option<Mutex<(File, BTreeSet<u32>)>>> = LazyLock::new(|| {
    let path = std::env::var_os("TAPSIM_MUTANTS_REACHED")?;
    let file = File::options().create(true).append(true).open(path).expect("the file of reached mutants");
    Some(Mutex::new((file, BTreeSet::new())))
});

/// Whether the mutant `number` is selected.
pub fn is(number: u32) -> bool {
    if let Some(reached) = &*REACHED {
        let mut reached = reached.lock().unwrap_or_else(|e| e.into_inner());
        if reached.1.insert(number) {
            let _ = reached.0.write_all(format!("{number}\n").as_bytes());
        }
    }
    *SELECTED == number
}
"#;

/// A copy of the tree with mutants in it.
pub(crate) struct Scratch {
    top: PathBuf,
    tree: PathBuf,
    target: PathBuf,
}

impl Scratch {
    /// Copies the tree at `top`: everything tracked, or untracked and not ignored.
    pub(crate) fn new(sh: &Shell, top: &Path) -> Result<Self> {
        let (tree, target) = (top.join(FOLDER).join("tree"), top.join(FOLDER).join("target"));
        std::fs::create_dir_all(&tree)?;
        let files = cmd!(sh, "git ls-files -co --exclude-standard").quiet().read()?;
        let files: BTreeSet<&str> = files.lines().filter(|f| top.join(f).is_file()).collect();
        for file in &files {
            let mut bytes = std::fs::read(top.join(file))?;
            if *file == HOST_LIB {
                bytes.extend_from_slice(b"\npub mod mutant;\n");
            }
            write_changed(&tree.join(file), &bytes)?;
        }
        remove_others(&tree, &tree, &files)?;
        let scratch = Self { top: top.into(), tree, target };
        write_changed(&scratch.tree.join(SELECTOR_FILE), SELECTOR.as_bytes())?;
        Ok(scratch)
    }

    /// Where files of the trials go.
    pub(crate) fn folder(&self) -> PathBuf {
        self.top.join(FOLDER)
    }

    /// `cargo` in the copy.
    fn cargo(&self, args: &[&str]) -> Command {
        let mut cargo = Command::new("cargo");
        cargo.args(args).args(["--locked", "--release", "--message-format=json"]);
        cargo
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target)
            .stderr(std::process::Stdio::null());
        // Built once and run for minutes: the build time matters most.
        for (name, value) in
            [("LTO", "off"), ("CODEGEN_UNITS", "64"), ("DEBUG", "0"), ("INCREMENTAL", "true")]
        {
            cargo.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
        }
        cargo
    }

    /// Writes `mutants` into the copy and removes those that do not compile; returns those that remain, and the others.
    pub(crate) fn keep_what_compiles(
        &self,
        mutants: Vec<Mutant>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(Vec<Mutant>, Vec<Mutant>)> {
        let mut dropped: BTreeSet<u32> = BTreeSet::new();
        let files: BTreeSet<&str> = mutants.iter().map(|m| m.file.as_str()).collect();
        for round in 0..ROUNDS {
            let mut written = BTreeMap::new();
            for file in &files {
                let edits = mutants.iter().filter(|m| m.file == *file && !dropped.contains(&m.number));
                let edits: Vec<(u32, Edit)> = edits.map(|m| (m.number, m.slip.edit.clone())).collect();
                let rendered = render(&std::fs::read_to_string(self.top.join(file))?, &edits);
                write_changed(&self.tree.join(file), rendered.text.as_bytes())?;
                written.insert((*file).to_string(), rendered);
            }
            let errors = self.errors(&["check", "--keep-going", "-p", "scenarios", "-p", "tap-programs"])?;
            if errors.is_empty() {
                let (gone, kept) = mutants.into_iter().partition(|m| dropped.contains(&m.number));
                return Ok((kept, gone));
            }
            let before = dropped.len();
            for error in &errors {
                dropped.extend(blamed(error, &written));
            }
            if dropped.len() == before {
                let text = errors[0]["rendered"].as_str().unwrap_or("an error without a text");
                return Err(format!("the copy does not compile, and no mutant is to blame:\n{text}").into());
            }
            progress(round + 1, dropped.len());
        }
        Err(format!("the copy does not compile after {ROUNDS} rounds").into())
    }

    /// Runs cargo; returns the compiler's errors.
    fn errors(&self, args: &[&str]) -> Result<Vec<Value>> {
        let output = self.cargo(args).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let errors = messages.filter(|m| m["message"]["level"] == "error").map(|mut m| m["message"].take());
        let errors: Vec<Value> =
            errors.filter(|m| !m["spans"].as_array().is_none_or(Vec::is_empty)).collect();
        if errors.is_empty() && !output.status.success() {
            return Err(format!("cargo {}: {}", args.join(" "), output.status).into());
        }
        Ok(errors)
    }

    /// Builds the simulator.
    pub(crate) fn simulator(&self) -> Result<PathBuf> {
        let built = self.executables(&["build", "-p", "scenarios", "--bin", "tapsim"])?;
        let tapsim = built.into_iter().find(|b| b.path.file_name().is_some_and(|n| n == "tapsim"));
        Ok(tapsim.ok_or("cargo built no tapsim")?.path)
    }

    /// Builds the tests of the crates that have mutants.
    pub(crate) fn tests(&self) -> Result<Vec<Executable>> {
        let packages = ["tap-core", "tap-images", "tap-ring", "tap-nbd", "tap-xenbus", "tap-programs"];
        let mut args = vec!["test", "--no-run"];
        packages.iter().for_each(|package| args.extend(["-p", package]));
        Ok(self.executables(&args)?.into_iter().filter(|e| e.is_test).collect())
    }

    fn executables(&self, args: &[&str]) -> Result<Vec<Executable>> {
        let output = self.cargo(args).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let messages: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        if !output.status.success() {
            let error = messages.iter().find(|m| m["message"]["level"] == "error");
            let why = error.and_then(|m| m["message"]["rendered"].as_str()).unwrap_or_default();
            return Err(format!("cargo {}: {}\n{why}", args.join(" "), output.status).into());
        }
        let built = messages.iter().filter_map(|m| {
            let folder = Path::new(m["manifest_path"].as_str()?).parent()?.to_path_buf();
            let package = folder.file_name()?.to_string_lossy().into_owned();
            Some(Executable {
                name: format!("{package}/{}", m["target"]["name"].as_str()?),
                path: m["executable"].as_str()?.into(),
                is_test: m["profile"]["test"] == true,
                folder,
            })
        });
        Ok(built.collect())
    }
}

/// A program that cargo built.
#[derive(Clone, Debug)]
pub(crate) struct Executable {
    /// Folder of the package and name of the target.
    pub name: String,
    /// The program.
    pub path: PathBuf,
    /// Whether it runs tests.
    pub is_test: bool,
    /// Where cargo would run it.
    pub folder: PathBuf,
}

/// Which mutants a compiler error is about: those around its primary location, otherwise around any other, otherwise
/// the nearest one.
fn blamed(error: &Value, written: &BTreeMap<String, Rendered>) -> Vec<u32> {
    let spans = error["spans"].as_array().cloned().unwrap_or_default();
    let children = error["children"].as_array().cloned().unwrap_or_default();
    let more = children.iter().flat_map(|c| c["spans"].as_array().cloned().unwrap_or_default());
    let place = |span: &Value| {
        let rendered = written.get(span["file_name"].as_str()?)?;
        Some((rendered, span["byte_start"].as_u64()? as usize))
    };
    let around = |span: &Value| place(span).and_then(|(rendered, at)| rendered.innermost(at));
    let (main, others): (Vec<Value>, Vec<Value>) = spans.into_iter().partition(|s| s["is_primary"] == true);
    let found: Vec<u32> = main.iter().filter_map(around).collect();
    if !found.is_empty() {
        return found;
    }
    let found: Vec<u32> = others.iter().chain(&more.collect::<Vec<_>>()).filter_map(around).collect();
    if !found.is_empty() {
        return found;
    }
    let nearest = |span: &Value| {
        let (rendered, at) = place(span)?;
        let distance = |place: &std::ops::Range<usize>| place.start.abs_diff(at).min(place.end.abs_diff(at));
        rendered.places.iter().min_by_key(|(place, _)| distance(place)).map(|(_, number)| *number)
    };
    main.iter().filter_map(nearest).collect()
}

/// Writes a file unless its content is unchanged: cargo goes by modification times.
fn write_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, bytes).map_err(|e| format!("failed to write {}: {e}", path.display()).into())
}

/// Removes files of an earlier copy that are not in the tree.
fn remove_others(top: &Path, folder: &Path, files: &BTreeSet<&str>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            remove_others(top, &path, files)?;
        } else {
            let name = path.strip_prefix(top)?.to_string_lossy().into_owned();
            if !files.contains(name.as_str()) && name != SELECTOR_FILE {
                std::fs::remove_file(&path)?;
            }
        }
    }
    Ok(())
}
