//! `cargo xtask dist`: what is deployed, as a tree of files and as a Debian package.
//!
//! ```text
//!   tapdisk, tapback, tap-*, static ──────┐
//!   man pages, completions ───────────────┼─► target/dist/tree ──► target/dist/tapdisk_VERSION_amd64.deb
//!   drivers/tapdisk/package, docs ────────┘
//! ```
//!
//! The same commit gives the same bytes, on a machine with the same compiler and C library, in a folder of the same
//! name. Nothing here knows what is in a package beyond `tree.rs`.

mod deb;
mod files;
mod inspect;
mod notices;
mod old_kernel;
mod tree;
mod trial;

use std::path::{Path, PathBuf};
use std::time::Instant;
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What ships, besides documents.
pub(crate) const PROGRAMS: [&str; 5] = ["tapdisk", "tap-ctl", "tapback", "tap-img", "mason"];

const HELP: &str = "\
Builds what is deployed: target/dist/tree, and of it a Debian package, target/dist/tapdisk_VERSION_amd64.deb.

Usage: cargo xtask dist [--test] [--again]

  --test    try both: the package is inspected, installed, upgraded, removed and purged in a scratch folder, and the
            programs serve images and handle them without any system call that is younger than Linux 4.19
  --again   build everything a second time in another target folder, and compare the two packages byte by byte

The version has the date and the revision of the commit. Sources without a repository need both in the environment:
TAP_REVISION (any text) and SOURCE_DATE_EPOCH (seconds since 1970).
";

/// What was built.
pub(crate) struct Release {
    /// The files, as they are installed.
    pub(crate) tree: PathBuf,
    /// The package.
    pub(crate) deb: PathBuf,
    /// The programs with their symbols.
    pub(crate) unstripped: Vec<PathBuf>,
    source: Source,
    /// Where they were built.
    target: PathBuf,
}

/// Which sources these are.
#[derive(Clone, Debug)]
struct Source {
    /// What `--version` says after the number; ends with `-changed` if files differ from the commit's.
    revision: String,
    /// Whether the build script of the programs finds the same revision by itself.
    by_git: bool,
    /// When the commit was made, in seconds since 1970.
    epoch_s: u64,
    /// The version of the package: later commits have greater ones.
    version: String,
}

impl Source {
    fn find(sh: &Shell) -> Result<Self> {
        let number = env!("CARGO_PKG_VERSION");
        let given = std::env::var("TAP_REVISION").ok();
        let changed = || cmd!(sh, "git status --porcelain").quiet().read().is_ok_and(|text| !text.is_empty());
        let (revision, by_git) = match given {
            Some(revision) => (revision, false),
            None => {
                let commit = cmd!(sh, "git rev-parse --short=12 HEAD").quiet().read();
                let commit =
                    commit.map_err(|_| "this is no repository: TAP_REVISION must say what is built")?;
                if changed() { (format!("{commit}-changed"), false) } else { (commit, true) }
            }
        };
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(epoch) => epoch,
            Err(_) => cmd!(sh, "git log -1 --format=%ct").quiet().read()?,
        };
        let epoch_s =
            epoch.trim().parse().map_err(|_| format!("SOURCE_DATE_EPOCH is {epoch:?}, no number"))?;
        let date = cmd!(sh, "date --utc --date=@{epoch} +%Y%m%d%H%M%S").quiet().read()?;
        Ok(Self { version: version(number, &date, &revision), revision, by_git, epoch_s })
    }
}

/// The version of the package: of the characters in a revision, only those that Debian allows.
fn version(number: &str, date: &str, revision: &str) -> String {
    let plain: String = revision.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '.' }).collect();
    format!("{number}+git{date}.{plain}")
}

pub(crate) fn run(args: &[String]) -> Result<()> {
    let mut test = false;
    let mut again = false;
    for arg in args {
        match arg.as_str() {
            "--help" | "-h" => {
                print!("{HELP}");
                return Ok(());
            }
            "--test" => test = true,
            "--again" => again = true,
            other => return Err(format!("unknown option {other}: see cargo xtask dist --help").into()),
        }
    }
    let sh = Shell::new()?;
    let release = build(&sh)?;
    if test {
        try_out(&sh, &release)?;
    }
    if again {
        build_again(&sh, &release)?;
    }
    Ok(())
}

/// Builds the tree and the package.
pub(crate) fn build(sh: &Shell) -> Result<Release> {
    let start = Instant::now();
    let target = crate::target_dir(sh)?;
    let source = Source::find(sh)?;
    let release = build_in(sh, &target, &source)?;
    for path in PROGRAMS.map(|name| release.tree.join("usr/bin").join(name)).iter().chain([&release.deb]) {
        let kib = std::fs::metadata(path)?.len() / 1024;
        eprintln!("dist: {kib:>6} KiB  {}", path.display());
    }
    eprintln!("dist: built in {} s", start.elapsed().as_secs());
    Ok(release)
}

fn build_in(sh: &Shell, target: &Path, source: &Source) -> Result<Release> {
    let unstripped = programs(sh, target, source)?;
    let dist = target.join("dist");
    let release = Release {
        tree: dist.join("tree"),
        deb: dist.join(format!("tapdisk_{}_amd64.deb", source.version)),
        unstripped,
        source: source.clone(),
        target: target.to_owned(),
    };
    if dist.exists() {
        std::fs::remove_dir_all(&dist)?;
    }
    tree::make(sh, target, &release)?;
    deb::pack(sh, &release, &source.version, &release.deb)?;
    Ok(release)
}

/// The programs, with their symbols. Paths of this machine are replaced in all crates; the other flags are those of the
/// last crate only.
fn programs(sh: &Shell, target: &Path, source: &Source) -> Result<Vec<PathBuf>> {
    let renamed: Vec<String> = machine_paths(target)?
        .iter()
        .map(|(path, name)| format!("--remap-path-prefix={}={name}", path.display()))
        .collect();
    // Joined with the flags of .cargo/config.toml, which an environment RUSTFLAGS would hide.
    let config = format!("target.'cfg(all())'.rustflags={}", serde_json::to_string(&renamed)?);
    for name in PROGRAMS {
        let to = ["--release", "--config", &config, "--target-dir"];
        let flags = ["-C", "target-feature=+crt-static"];
        let build = cmd!(sh, "cargo rustc --locked {to...} {target} -p tapdisk --bin {name} -- {flags...}");
        // Told, so that a commit that is made meanwhile does not get into one of them.
        build.env("TAP_REVISION", &source.revision).run()?;
    }
    Ok(PROGRAMS.map(|name| target.join("release").join(name)).into())
}

/// Folders that say something about this machine, and what a program says instead. The last one that fits counts.
fn machine_paths(target: &Path) -> Result<Vec<(PathBuf, &'static str)>> {
    let home = PathBuf::from(std::env::var_os("HOME").ok_or("HOME is not set")?);
    let cargo = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let rustup = std::env::var_os("RUSTUP_HOME").map_or_else(|| home.join(".rustup"), PathBuf::from);
    let root = files::root().canonicalize()?;
    Ok(vec![
        (home, "home"),
        (rustup, "rustup"),
        (cargo.join("registry/src"), "registry"),
        (root, "tapdisk"),
        (target.to_owned(), "target"),
    ])
}

impl Source {
    /// Tells a build for which git's revision will do, unless that is another one: built before, it is not built again.
    fn pass<'a>(&self, command: xshell::Cmd<'a>) -> xshell::Cmd<'a> {
        if self.by_git { command } else { command.env("TAP_REVISION", &self.revision) }
    }
}

/// Everything that can be found out on this machine.
pub(crate) fn try_out(sh: &Shell, release: &Release) -> Result<()> {
    let start = Instant::now();
    inspect::package(sh, release)?;
    inspect::units(sh, release)?;
    trial::packaging(sh, release)?;
    old_kernel::trial(sh, release)?;
    eprintln!("dist: tried in {} s", start.elapsed().as_secs());
    Ok(())
}

/// Fails unless another target folder gives the same package.
fn build_again(sh: &Shell, release: &Release) -> Result<()> {
    let target = crate::target_dir(sh)?.join("again");
    let other = build_in(sh, &target, &release.source)?;
    if sh.read_binary_file(&other.deb)? != sh.read_binary_file(&release.deb)? {
        let (a, b) = (release.deb.display(), other.deb.display());
        return Err(format!("two builds differ: {a} and {b}").into());
    }
    eprintln!("dist: two builds are the same, byte by byte");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_only_characters_that_debian_allows() {
        assert_eq!(version("0.1.0", "20261129", "0a4-changed"), "0.1.0+git20261129.0a4.changed");
    }
}
