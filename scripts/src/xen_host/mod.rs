//! `cargo xtask xen-host`: a real Xen host under emulation, to run scripts and tests in.
//!
//! ```text
//!   packages -> image -> machine -> console, /out, exit status
//!   (Debian)   (once)    (QEMU)          suite: named tests in one boot, and their table
//! ```
//!
//! Downloads and images are kept in a cache folder. One process at a time uses a cache: it holds a lock until it ends.
//! The folder `run` in it belongs to the last run: it has the console log and the returned files.

mod cpio;
mod image;
mod machine;
mod options;
mod packages;
mod suite;
mod test_program;

use cpio::Archive;
use image::Image;
use machine::{Event, Machine};
use options::{Action, Options};
use packages::Pool;
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use suite::Test;
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Exit status if something could not be built or started.
pub(crate) const NOT_STARTED: u8 = 126;
/// Free space that a cache without packages needs: downloads, their unpacked files, images.
const CACHE_SIZE_MIB: u64 = 1024;
/// Free space that a run needs: its initrd, and the returned files.
const RUN_SIZE_MIB: u64 = 512;
/// Memory that QEMU needs in addition to the machine's.
const QEMU_MEMORY_MIB: u64 = 300;

/// Prints a line of progress.
fn progress(line: &str) {
    eprintln!("xen-host: {line}");
}

/// Runs the task; the exit status is part of its contract (see its help).
pub(crate) fn main(args: &[String]) -> ExitCode {
    let options = match Options::parse(args) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("xtask: {error}");
            return ExitCode::from(2);
        }
    };
    let status = run(&options).unwrap_or_else(|error| {
        eprintln!("xtask: failed to {error}");
        NOT_STARTED
    });
    ExitCode::from(status)
}

fn run(options: &Options) -> Result<u8> {
    let sh = Shell::new()?;
    match &options.action {
        Action::Help => print!("{}", options::HELP),
        Action::List => suite::list()?,
        Action::Build => {
            let cache = Cache::open(&sh, options)?;
            progress(&format!("ready in {}", cache.folder.display()));
        }
        Action::Run(script) => {
            let script = fs::read(script).map_err(|e| format!("read {}: {e}", script.display()))?;
            return Ok(boot(&sh, options, &script, &[])?.status);
        }
        Action::Shell => return Ok(boot(&sh, options, b"", &[])?.status),
        Action::Test(names) => {
            let tests = suite::choose(names)?;
            let ended = boot(&sh, options, suite::script(&tests).as_bytes(), &tests)?;
            return Ok(suite::report(&tests, &ended.events));
        }
    }
    Ok(0)
}

/// The cache with everything built, locked.
struct Cache {
    folder: PathBuf,
    pool: Pool,
    image: Image,
    _lock: File,
}

impl Cache {
    fn open(sh: &Shell, options: &Options) -> Result<Self> {
        let say = |e| format!("use {} as cache: {e}", options.cache.display());
        fs::create_dir_all(&options.cache).map_err(say)?;
        let folder = fs::canonicalize(&options.cache).map_err(say)?;
        let lock = File::create(folder.join("lock")).map_err(say)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(format!(
                    "use {}: another xen-host does; wait, or name another --cache",
                    folder.display()
                )
                .into());
            }
            Err(TryLockError::Error(e)) => return Err(say(e).into()),
        }
        let fresh = !folder.join("image/key").exists();
        need_disk(sh, &folder, if fresh { CACHE_SIZE_MIB } else { RUN_SIZE_MIB })?;
        let start = Instant::now();
        let pool = Pool::open(sh, &folder)?;
        let image = Image::open(sh, &folder, &pool)?;
        if fresh {
            progress(&format!("built in {} s", start.elapsed().as_secs()));
        }
        Ok(Self { folder, pool, image, _lock: lock })
    }
}

/// Boots, runs a script (none if it is empty) with the programs of these tests, and brings back /out.
fn boot(sh: &Shell, options: &Options, script: &[u8], tests: &[Test]) -> Result<machine::Ended> {
    if options.shell && !std::io::stdin().is_terminal() {
        return Err("open a shell without a terminal: use `run SCRIPT`".into());
    }
    need_memory(&fs::read_to_string("/proc/meminfo")?, options.memory_mib + QEMU_MEMORY_MIB)?;
    let own = Own::build(sh, options)?;
    let test_programs = test_programs(sh, tests)?;
    let cache = Cache::open(sh, options)?;
    let run = cache.folder.join("run");
    if run.exists() {
        fs::remove_dir_all(&run)?;
    }
    fs::create_dir_all(&run)?;
    fs::copy(&cache.image.dom0, run.join("initrd"))?;
    let initrd = File::options().append(true).open(run.join("initrd"))?;
    layer(options, &own, &test_programs, script, BufWriter::new(initrd))?;
    let machine = Machine {
        pool: &cache.pool,
        image: &cache.image,
        run: &run,
        memory_mib: options.memory_mib,
        cpus: options.cpus,
        icount: options.icount,
        timeout: options.timeout,
        terminal: options.shell,
    };
    progress(&format!("booting; the console is also in {}", run.join("console.log").display()));
    let start = Instant::now();
    let ended = machine.boot(|event| match event {
        Event::Text(line) => println!("{line}"),
        Event::Ready => progress(&format!("dom0 is ready after {} s", start.elapsed().as_secs())),
        Event::TestStarts(name) => progress(&format!("test {name}")),
        Event::TestEnds { name, status, seconds } => {
            progress(&format!("test {name} {}, {seconds} s", suite::verdict(*status)));
        }
        Event::Out | Event::Exit(_) => {}
    })?;
    progress(&format!("the machine ran {} s", start.elapsed().as_secs()));
    if ended.events.contains(&Event::Out) {
        bring_back(sh, &machine.out(), &options.out.clone().unwrap_or_else(|| run.join("out")))?;
    }
    if options.keep {
        progress(&format!("to boot it again: {:?}", machine.command()));
    } else {
        fs::remove_file(run.join("initrd"))?;
        fs::remove_file(machine.out())?;
    }
    Ok(ended)
}

/// What goes into dom0 of this repository, built first.
struct Own {
    deb: Option<PathBuf>,
    /// Programs for tests, which need no libraries.
    programs: Vec<PathBuf>,
}

impl Own {
    fn build(sh: &Shell, options: &Options) -> Result<Self> {
        let deb = match &options.deb {
            _ if !options.take_deb => None,
            Some(deb) if deb.is_file() => Some(deb.clone()),
            Some(deb) => return Err(format!("find {}: --deb says which package", deb.display()).into()),
            None => Some(crate::dist::build(sh)?.deb),
        };
        let mut programs = Vec::new();
        for name in ["disk-load", "old-kernel"] {
            let flags = ["-C", "target-feature=+crt-static", "-C", "strip=symbols"];
            cmd!(sh, "cargo rustc --quiet --locked -p scripts --bin {name} -- {flags...}").run()?;
            programs.push(crate::target_dir(sh)?.join("debug").join(name));
        }
        Ok(Self { deb, programs })
    }
}

/// The programs that only these tests need, by their names in dom0.
fn test_programs(sh: &Shell, tests: &[Test]) -> Result<BTreeMap<String, PathBuf>> {
    let wanted = tests.iter().filter_map(|test| test.program.as_ref());
    wanted.map(|program| Ok((program.name(), program.build(sh)?))).collect()
}

/// The layer over dom0's image for this run only.
fn layer(
    options: &Options,
    own: &Own,
    test_programs: &BTreeMap<String, PathBuf>,
    script: &[u8],
    to: impl Write,
) -> Result<()> {
    let scripts = suite::folder();
    let mut archive = Archive::new(to);
    archive.copy("init", &scripts.join("dom0-init"))?;
    archive.tree("xen-host", &scripts)?;
    if let Some(deb) = &own.deb {
        archive.copy("xen-host/tapdisk.deb", deb)?;
    }
    if let Some(module) = &options.blktap_module {
        archive.copy("xen-host/blktap.ko", module)?;
    }
    if !script.is_empty() {
        archive.file("xen-host/script", 0o755, script)?;
    }
    if options.shell {
        archive.file("xen-host/shell", 0o644, b"")?;
    }
    for program in &own.programs {
        archive.copy(&format!("usr/local/bin/{}", name_of(program)?), program)?;
    }
    for (name, program) in test_programs {
        archive.copy(&format!("usr/local/bin/{name}"), program)?;
    }
    for file in &options.copy {
        archive.copy(&format!("root/{}", name_of(file)?), file)?;
    }
    for tree in &options.trees {
        archive.tree("", tree)?;
    }
    Ok(archive.finish()?.flush()?)
}

fn name_of(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    Ok(name.ok_or_else(|| format!("copy {}: it has no name", path.display()))?.to_owned())
}

fn bring_back(sh: &Shell, tar: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(|e| format!("bring back /out to {}: {e}", to.display()))?;
    cmd!(sh, "tar -x --no-same-owner -f {tar} -C {to}").quiet().run()?;
    progress(&format!("dom0's /out is in {}", to.display()));
    Ok(())
}

/// `meminfo` is the content of /proc/meminfo.
fn need_memory(meminfo: &str, needed_mib: u64) -> Result<()> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .ok_or("find MemAvailable in /proc/meminfo")?;
    if kib / 1024 >= needed_mib {
        return Ok(());
    }
    Err(format!("boot: needs {needed_mib} MiB of memory, {} MiB are available; see --memory", kib / 1024)
        .into())
}

fn need_disk(sh: &Shell, folder: &Path, needed_mib: u64) -> Result<()> {
    let text = cmd!(sh, "df --output=avail -BM {folder}").quiet().read()?;
    let free_mib: u64 = text
        .lines()
        .nth(1)
        .and_then(|line| line.trim().trim_end_matches('M').parse().ok())
        .ok_or_else(|| format!("understand df's {text:?}"))?;
    if free_mib >= needed_mib {
        return Ok(());
    }
    Err(format!(
        "use {}: needs {needed_mib} MiB of disk, {free_mib} MiB are free; name another --cache",
        folder.display()
    )
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_said() {
        let meminfo = "MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable:    2097152 kB\n";
        need_memory(meminfo, 2048).expect("enough");
        let error = need_memory(meminfo, 2049).expect_err("too little").to_string();
        assert_eq!(error, "boot: needs 2049 MiB of memory, 2048 MiB are available; see --memory");
        assert!(need_memory("MemTotal: 1 kB\n", 1).is_err());
    }
}
