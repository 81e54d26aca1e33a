//! The programs on an old kernel: as `scripts/src/bin/old-kernel` shows it to them, without io_uring.

use super::{Release, Result};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use xshell::{Shell, cmd};

/// Said once by a daemon that does without io_uring.
const SAID: &str =
    "the kernel refuses io_uring (function not implemented (ENOSYS)): file operations go through threads";
/// Size of a disk; half of it is data.
const SIZE_BYTES: usize = 16 << 20;

/// A `tapdisk serve` that listens; killed when dropped.
pub(super) struct Served {
    child: Child,
    socket: PathBuf,
}

impl Served {
    /// Starts `tapdisk` behind a launcher (or none) for one disk, with its files in `folder`; waits until it listens.
    pub(super) fn start(
        launcher: &[&Path],
        tapdisk: &Path,
        folder: &Path,
        spec: &str,
        options: &[&str],
    ) -> Result<Self> {
        let mut words = launcher.iter().copied().chain([tapdisk]);
        let mut command = Command::new(words.next().ok_or("no program")?);
        let socket = folder.join("socket");
        command.args(words).arg("serve").arg("--run-dir").arg(folder.join("run"));
        command.arg("--nbd").arg(format!("unix:{}", socket.display())).args(options).arg(spec);
        let log = File::options().create(true).append(true).open(folder.join("log"))?;
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()?;
        let lines = child.stdout.take().ok_or("tapdisk has no output")?;
        // Killed from here on, whatever happens.
        let served = Self { child, socket };
        for line in BufReader::new(lines).lines() {
            if line?.starts_with("listening at ") {
                return Ok(served);
            }
        }
        Err(format!("tapdisk does not serve {spec}: {}", fs::read_to_string(folder.join("log"))?).into())
    }

    /// For tools that take NBD addresses.
    pub(super) fn uri(&self) -> String {
        format!("nbd:unix:{}", self.socket.display())
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    pub(super) fn runs(&self) -> Result<bool> {
        // A process that ended is a zombie until it is waited for, and has no program.
        Ok(fs::read_link(Path::new("/proc").join(self.id().to_string()).join("exe")).is_ok())
    }

    /// Asks it to end; it must do so in order.
    pub(super) fn stop(mut self) -> Result<()> {
        let ended = self.signal("TERM")?;
        if ended.success() { Ok(()) } else { Err(format!("tapdisk ended with {ended}").into()) }
    }

    fn signal(&mut self, name: &str) -> Result<ExitStatus> {
        Command::new("kill").args(["-s", name, &self.id().to_string()]).status()?;
        Ok(self.child.wait()?)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Builds the launcher.
pub(super) fn launcher(sh: &Shell) -> Result<PathBuf> {
    cmd!(sh, "cargo build --quiet --locked --workspace --bin old-kernel").run()?;
    Ok(crate::target_dir(sh)?.join("debug/old-kernel"))
}

/// Serves a raw and a qcow image, through the page cache and past it, over a kill; and runs the commands of tap-img.
pub(super) fn trial(sh: &Shell, release: &Release) -> Result<()> {
    let scratch = sh.create_temp_dir()?;
    let launcher = launcher(sh)?;
    let trial = Trial {
        sh,
        folder: scratch.path(),
        launcher: &launcher,
        tapdisk: &release.tree.join("usr/bin/tapdisk"),
        tap_img: &release.tree.join("usr/bin/tap-img"),
    };
    trial.source()?;
    for (format, options) in [("raw", &[][..]), ("qcow", &[]), ("qcow", &["--direct"])] {
        trial.serve(format, options).map_err(|e| format!("{format} {options:?} as on Linux 4.19: {e}"))?;
    }
    trial.no_ring()
}

struct Trial<'a> {
    sh: &'a Shell,
    folder: &'a Path,
    launcher: &'a Path,
    tapdisk: &'a Path,
    tap_img: &'a Path,
}

impl Trial<'_> {
    /// Runs tap-img, which must have nothing to say on standard error.
    fn tap_img(&self, args: &[&str]) -> Result<String> {
        let output =
            Command::new(self.launcher).arg(self.tap_img).args(args).current_dir(self.folder).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() && said.is_empty() {
            return Ok(String::from_utf8(output.stdout)?);
        }
        Err(format!("tap-img {}: {}: {said}", args.join(" "), output.status).into())
    }

    /// A raw disk: data that does not repeat, between holes.
    fn source(&self) -> Result<()> {
        let mut file = File::create(self.folder.join("source"))?;
        let words: Vec<u8> = (0..SIZE_BYTES as u64 / 16)
            .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        file.write_all(&words)?;
        Ok(file.set_len(SIZE_BYTES as u64)?)
    }

    fn serve(&self, format: &str, options: &[&str]) -> Result<()> {
        let spec = format!("{format}:{}", self.folder.join("disk").display());
        let start = || Served::start(&[self.launcher], self.tapdisk, self.folder, &spec, options);
        let log = self.folder.join("log");
        fs::write(&log, "")?;
        self.tap_img(&["create", "-q", "-f", format, "disk", &SIZE_BYTES.to_string()])?;

        let mut served = start()?;
        let uri = served.uri();
        self.tap_img(&["convert", "-n", "-m", "16", "source", &uri])?;
        self.tap_img(&["compare", "-q", "source", &uri])?;
        served.signal("KILL")?;
        // What was answered is there.
        let served = start()?;
        self.tap_img(&["compare", "-q", "source", &uri])?;
        self.tap_img(&["map", &uri])?;
        served.stop()?;

        let log = fs::read_to_string(&log)?;
        if log.matches(SAID).count() != 2 {
            return Err(format!("each of two processes must say once that it uses threads: {log}").into());
        }
        self.tap_img(&["info", "--output", "json", "disk"])?;
        if format != "raw" {
            self.tap_img(&["check", "-q", "disk"])?;
        }
        for to in ["raw", "qcow"] {
            let copy = format!("copy.{to}");
            self.tap_img(&["convert", "-q", "-O", to, &spec, &copy])?;
            self.tap_img(&["compare", "-q", "source", &format!("{to}:{copy}")])?;
        }
        Ok(())
    }

    /// Whoever insists on io_uring is told why there is none: this also proves that the filter works.
    fn no_ring(&self) -> Result<()> {
        let (launcher, tapdisk) = (self.launcher, self.tapdisk);
        let refused = cmd!(self.sh, "{launcher} {tapdisk} --aio io_uring serve raw:source");
        let output = refused.quiet().ignore_status().output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(1)
            && said.contains("failed to set up io_uring: function not implemented")
        {
            return Ok(());
        }
        Err(format!("io_uring is not refused as on Linux 4.19: {}: {said}", output.status).into())
    }
}
