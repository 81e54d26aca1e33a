//! The checks before a change lands, in the order of their cost.

use crate::dist;
use crate::xen_host::NOT_STARTED;
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs of the sweep, over all scenarios; new ones get more of them.
const SWEEP_RUNS: u64 = 60_000;
/// Seeds that one commit may use: more than any scenario gets.
const SEEDS_MAX: u64 = 100_000;

pub(crate) fn run() -> Result<()> {
    let sh = Shell::new()?;
    refuse_hidden_cfg()?;
    install_peers(&sh);
    step("format", || Ok(cmd!(sh, "cargo fmt --all --check").run()?))?;
    step("lints", || {
        Ok(cmd!(sh, "cargo clippy --workspace --all-targets --locked -- --deny warnings").run()?)
    })?;
    step("tidy", || crate::tidy::run(&[]))?;
    step("documentation", || Ok(cmd!(sh, "cargo doc --workspace --no-deps --locked --quiet").run()?))?;
    step("tests", || Ok(cmd!(sh, "cargo test").run()?))?;
    step("build without the guard", || {
        // An environment RUSTFLAGS, even an empty one, hides the cfg of .cargo/config.toml.
        let check = cmd!(sh, "cargo check --workspace --locked --target-dir target/unguarded");
        Ok(check.env("RUSTFLAGS", "").run()?)
    })?;
    let release = step("the package that ships", || release(&sh))?;
    step("a guest on a real Xen host", || real_guest(&release.deb))?;
    step("seeded bugs", || {
        let out = crate::target_dir(&sh)?.join("bugs");
        Ok(cmd!(sh, "cargo run --release --bin tapsim -- bugs --out {out}").run()?)
    })?;
    step("checkers", || Ok(cmd!(sh, "cargo run --release --bin tapsim -- bugs --oracles").run()?))?;
    step("sweep", || sweep(&sh))
}

fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    eprintln!("== {name}");
    let done = work().map_err(|e| format!("{name}: {e}"))?;
    eprintln!("== {name}: {} s", start.elapsed().as_secs());
    Ok(done)
}

/// With RUSTFLAGS set, worlds would silently run unguarded.
fn refuse_hidden_cfg() -> Result<()> {
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        if std::env::var_os(name).is_some() {
            return Err(format!("{name} is set, which hides the guard: unset it").into());
        }
    }
    Ok(())
}

/// The tests against QEMU's and libnbd's tools, those in a browser, and the check of systemd's units report themselves
/// ignored if these are missing; here they should run.
fn install_peers(sh: &Shell) {
    let there = |tool: &str| cmd!(sh, "which {tool}").quiet().ignore_stdout().ignore_stderr().run().is_ok();
    let packages: [(&str, &[&str]); 7] = [
        ("qemu-utils", &["qemu-img", "qemu-io"]),
        ("libnbd-bin", &["nbdinfo", "nbdcopy"]),
        ("python3-libnbd", &["nbdsh"]),
        ("chromium", &["chromium"]),
        ("systemd", &["systemd-analyze"]),
        ("xz-utils", &["xz"]),
        ("binutils", &["readelf", "strip"]),
    ];
    let missing = packages.iter().filter(|(_, tools)| !tools.iter().all(|tool| there(tool)));
    let missing: Vec<&str> = missing.map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return;
    }
    let update = cmd!(sh, "apt-get update").run();
    if let Err(error) = update.and_then(|()| {
        cmd!(sh, "apt-get install -y").args(&missing).env("DEBIAN_FRONTEND", "noninteractive").run()
    }) {
        eprintln!("xtask: {missing:?} cannot be installed, their tests will be ignored: {error}");
    }
}

/// Builds what ships and tries it out; and checks that it contains nothing of the simulator: madsim replaces functions
/// of libc for the whole process, and there must be no seeded bug to switch on.
fn release(sh: &Shell) -> Result<dist::Release> {
    let tree = cmd!(sh, "cargo tree --locked -p tapdisk -e normal,build --prefix none").read()?;
    if let Some(line) = tree.lines().find(|line| SIMULATOR.iter().any(|name| line.starts_with(name))) {
        return Err(format!("tapdisk depends on {line}").into());
    }
    let release = dist::build(sh)?;
    for program in &release.unstripped {
        let symbols = cmd!(sh, "nm {program}").quiet().read()?;
        if let Some(line) = symbols.lines().find(|line| line.contains("madsim")) {
            return Err(format!("{} has madsim in it: {line}", program.display()).into());
        }
        let bytes = sh.read_binary_file(program)?;
        // The sentence of a seeded bug: only a program that can switch bugs on contains it.
        let sentence = b"is kept in memory and not written";
        if bytes.windows(sentence.len()).any(|window| window == sentence) {
            return Err(format!("{} has seeded bugs in it", program.display()).into());
        }
    }
    dist::try_out(sh, &release)?;
    Ok(release)
}

/// A guest of a real Xen host, under emulation, on a qcow image; tapdisk is installed from the package. If such a
/// machine cannot be started (no packages, too little memory) this is reported, but does not fail the check.
fn real_guest(deb: &Path) -> Result<()> {
    let args = ["xtask", "xen-host", "test", "guest-qcow", "nbd-attach", "--deb"];
    let status = Command::new("cargo").args(args).arg(deb).status()?;
    if status.code() == Some(i32::from(NOT_STARTED)) {
        eprintln!("xtask: NO REAL GUEST WAS RUN, for the reason above");
        return Ok(());
    }
    if status.success() { Ok(()) } else { Err(format!("cargo {}: {status}", args.join(" ")).into()) }
}

/// Crates that no shipped program depends on.
const SIMULATOR: [&str; 5] = ["madsim", "sim ", "kernel-model", "xen-model", "scenarios"];

/// New seeds with every commit, the same on every machine for that commit.
fn sweep(sh: &Shell) -> Result<()> {
    let commit = cmd!(sh, "git rev-parse HEAD").read()?;
    let first = (u64::from_str_radix(&commit[..8], 16)? * SEEDS_MAX).to_string();
    let (runs, json) = (SWEEP_RUNS.to_string(), crate::target_dir(sh)?.join("sweep.json"));
    let args = ["--runs", &runs, "--from", &first, "--check-determinism", "--json"];
    cmd!(sh, "cargo run --release --bin tapsim -- sweep {args...} {json}").run()?;
    let report: serde_json::Value = serde_json::from_str(&sh.read_file(&json)?)?;
    if report["guarded"] != true {
        return Err("the sweep ran without the guard".into());
    }
    Ok(())
}
