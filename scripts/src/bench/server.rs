//! Server processes: started, measured, ended.

use super::Result;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server to measure: a command line with the placeholders `{socket}`, `{image}` and `{format}`.
#[derive(Clone, Debug)]
pub(super) struct ServerSpec {
    pub(super) name: String,
    pub(super) command: Vec<String>,
}

impl ServerSpec {
    pub(super) fn new(name: &str, command: &str) -> Self {
        Self { name: name.to_owned(), command: command.split_whitespace().map(str::to_owned).collect() }
    }

    /// Starts it with a socket and an image.
    pub(super) fn start(&self, socket: &Path, image: &Path, format: &str) -> Result<Running> {
        // Otherwise the client would connect to the socket of an earlier run.
        let _ = fs::remove_file(socket);
        let fill = |part: &String| {
            part.replace("{socket}", &socket.display().to_string())
                .replace("{image}", &image.display().to_string())
                .replace("{format}", format)
        };
        let parts: Vec<String> = self.command.iter().map(fill).collect();
        let Some((program, args)) = parts.split_first() else { return Err("an empty command".into()) };
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().map_err(|e| format!("start {program}: {e}"))?;
        Ok(Running { child, socket: socket.to_owned() })
    }
}

/// A running server; killed when dropped.
pub(super) struct Running {
    child: Child,
    socket: PathBuf,
}

impl Running {
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time that all its threads have used so far. Threads that have ended do not count.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let mut ns = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            ns += text.split_whitespace().next().unwrap_or("0").parse::<u64>()?;
        }
        Ok(Duration::from_nanos(ns))
    }

    /// Counts system calls from now on, if `perf` can.
    pub(super) fn count_calls(&self) -> Option<CallCounter> {
        CallCounter::start(self.pid())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGTERM first, so that the server removes its socket. One that does not react is killed.
        let _ = Command::new("kill").arg(self.pid().to_string()).status();
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if start.elapsed() > Duration::from_secs(5) {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = fs::remove_file(&self.socket);
    }
}

/// `perf stat` beside a server.
pub(super) struct CallCounter {
    perf: Child,
    output: PathBuf,
}

impl CallCounter {
    fn start(pid: u32) -> Option<Self> {
        let output = std::env::temp_dir().join(format!("xtask-calls-{pid}"));
        let mut perf = Command::new("perf");
        perf.args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", &pid.to_string(), "-o"]);
        let perf = perf.arg(&output).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
        // It does not report when it has attached.
        std::thread::sleep(Duration::from_millis(300));
        Some(Self { perf, output })
    }

    /// How many there were; `None` if this machine cannot count them.
    pub(super) fn stop(mut self) -> Option<u64> {
        Command::new("kill").args(["-INT", &self.perf.id().to_string()]).status().ok()?;
        self.perf.wait().ok()?;
        let text = fs::read_to_string(&self.output).ok()?;
        let _ = fs::remove_file(&self.output);
        text.lines().find(|line| line.contains("sys_enter"))?.split(',').next()?.parse().ok()
    }
}
