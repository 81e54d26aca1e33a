//! Programs as processes.

use libtest_mimic::Failed;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

pub(crate) const TAPDISK: &str = env!("CARGO_BIN_EXE_tapdisk");
pub(crate) const TAP_CTL: &str = env!("CARGO_BIN_EXE_tap-ctl");
pub(crate) const MASON: &str = env!("CARGO_BIN_EXE_mason");
pub(crate) const TAP_IMG: &str = env!("CARGO_BIN_EXE_tap-img");

/// A `tapdisk serve` that listens; killed when dropped.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts it at `socket` and waits until it reports that it listens.
    pub(crate) fn start(socket: &Path, args: &[&str]) -> Result<Self, Failed> {
        Self::start_with(socket, args, Stdio::inherit())
    }

    /// As [`Server::start`], with another standard error.
    pub(crate) fn start_with(socket: &Path, args: &[&str], err: Stdio) -> Result<Self, Failed> {
        Self::begin(socket, args, err)?.listens()
    }

    /// Starts it, without waiting.
    pub(crate) fn begin(socket: &Path, args: &[&str], err: Stdio) -> Result<Self, Failed> {
        // The tests may run with SIGHUP ignored (nohup), and children inherit that.
        let mut command = Command::new("env");
        let address = format!("unix:{}", socket.display());
        command.args(["--default-signal=HUP", TAPDISK, "serve", "--nbd", &address]).args(args);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(err).spawn()?;
        Ok(Self { child, socket: socket.to_owned() })
    }

    /// Waits until it reports that it listens.
    pub(crate) fn listens(mut self) -> Result<Self, Failed> {
        let out = self.child.stdout.take().ok_or("no output")?;
        for line in BufReader::new(out).lines() {
            if line?.starts_with("listening at ") {
                return Ok(self);
            }
        }
        Err(format!("tapdisk ended with {}", self.child.wait()?).into())
    }

    /// The number of its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The address for tools that take NBD addresses.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) -> Result<(), Failed> {
        self.child.kill()?;
        let status = self.child.wait()?;
        if status.signal() == Some(9) {
            Ok(())
        } else {
            Err(format!("tapdisk had ended with {status}").into())
        }
    }

    /// Sends SIGTERM; returns how it ends.
    pub(crate) fn stop(mut self) -> Result<ExitStatus, Failed> {
        self.signal("TERM")
    }

    /// Sends a signal that ends it; returns how it ends.
    pub(crate) fn signal(&mut self, name: &str) -> Result<ExitStatus, Failed> {
        let done = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status()?;
        if !done.success() {
            return Err("kill does not work".into());
        }
        Ok(self.child.wait()?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As [`tool`], on images that a killed process may have had: the kernel closes them when their last operations have
/// ended, which may be after the process has ended.
pub(crate) fn tool_after_kill(program: &str, args: &[&str]) -> Result<String, Failed> {
    for _ in 0..1000 {
        match tool(program, args) {
            Err(why) if why.message().is_some_and(|said| said.contains("in use by another process")) => {}
            done => return done,
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    tool(program, args)
}

/// Runs a tool and returns its output; a status other than 0, or the word "failed", is a failure.
pub(crate) fn tool(program: &str, args: &[&str]) -> Result<String, Failed> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    // qemu-io says "failed" and exits with 0.
    if output.status.success() && !text.contains("failed") {
        return Ok(text.into_owned());
    }
    Err(format!("{program} {}: {}, {text}", args.join(" "), output.status).into())
}
