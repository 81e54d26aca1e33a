//! The emulated machine: boots it, reads its console, and ends it.
//!
//! ```text
//!   QEMU --- console of dom0 ---> a thread that reads lines ---> events ---> the user's terminal, and the exit status
//!     |                                                            ^ until the time is up
//!     +-- virtio disk: what dom0 leaves in /out is returned as a tar
//! ```
//!
//! dom0 reports what happens in lines that contain [`MARK`], see [`Event`]; everything else on its console is passed
//! through. No process is left over: QEMU is killed when the time is up, and by the kernel (`setpriv --pdeathsig`) when
//! this process dies for any reason.

use super::image::Image;
use super::packages::Pool;
use super::{Result, progress};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Marks a message of dom0 to this program; the rest of the line is the message.
const MARK: &str = "@xen-host ";
/// Exit status when the time was up.
pub(super) const TIME_IS_UP: u8 = 124;
/// Exit status if the machine ended without one from dom0.
pub(super) const NO_STATUS: u8 = 125;
/// Space for the content of /out. The file is sparse.
const OUT_SIZE_BYTES: u64 = 1 << 30;

/// What a line on the console means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// `ready`: xenstored answers.
    Ready,
    /// `out`: the content of /out is on the disk.
    Out,
    /// `exit STATUS`: the exit status of the script.
    Exit(u8),
    /// `test NAME starts`
    TestStarts(String),
    /// `test NAME ends STATUS SECONDS`
    TestEnds { name: String, status: u8, seconds: u64 },
    /// Anything else.
    Text(String),
}

impl Event {
    /// Xen may have written a message of its own before it on the same line.
    pub(super) fn parse(line: &str) -> Self {
        let text = || Self::Text(line.to_owned());
        let Some((_, said)) = line.split_once(MARK) else { return text() };
        let words: Vec<&str> = said.split_whitespace().collect();
        match words.as_slice() {
            ["ready"] => Self::Ready,
            ["out"] => Self::Out,
            ["exit", status] => status.parse().map_or_else(|_| text(), Self::Exit),
            ["test", name, "starts"] => Self::TestStarts((*name).to_owned()),
            ["test", name, "ends", status, seconds] => match (status.parse(), seconds.parse()) {
                (Ok(status), Ok(seconds)) => Self::TestEnds { name: (*name).to_owned(), status, seconds },
                _ => text(),
            },
            _ => text(),
        }
    }
}

/// The parts of a machine.
pub(super) struct Machine<'a> {
    pub(super) pool: &'a Pool,
    pub(super) image: &'a Image,
    /// Folder of this run: has `initrd`; gets `console.log`, `out.img`.
    pub(super) run: &'a Path,
    pub(super) memory_mib: u64,
    pub(super) cpus: u32,
    /// The clock counts instructions (`-icount`).
    pub(super) icount: bool,
    /// Counted from the start; `None` means no limit.
    pub(super) timeout: Option<Duration>,
    /// The console is the user's terminal, not a stream of lines.
    pub(super) terminal: bool,
}

/// How a machine ended.
pub(super) struct Ended {
    /// The exit status of the script, or [`TIME_IS_UP`] or [`NO_STATUS`].
    pub(super) status: u8,
    /// All messages of dom0, in order.
    pub(super) events: Vec<Event>,
}

impl Machine<'_> {
    /// Boots, and returns when the machine has ended. `watch` is called with every event as it arrives.
    pub(super) fn boot(&self, mut watch: impl FnMut(&Event)) -> Result<Ended> {
        File::create(self.out())?.set_len(OUT_SIZE_BYTES)?;
        let mut command = self.command();
        command.stdin(if self.terminal { Stdio::inherit() } else { Stdio::null() });
        command.stdout(if self.terminal { Stdio::inherit() } else { Stdio::piped() });
        let child = command.spawn().map_err(|e| format!("start the emulator by setpriv: {e}"))?;
        let mut process = Process { child };
        let deadline = self.timeout.map(|limit| Instant::now() + limit);
        let mut events = Vec::new();
        let mut in_time = true;
        match process.child.stdout.take() {
            Some(stdout) => {
                in_time = follow(&lines(stdout), deadline, |event| {
                    watch(&event);
                    events.push(event);
                });
            }
            // On a terminal QEMU itself shows everything, and writes it to the log that is read below.
            None => in_time &= process.wait_until(deadline)?,
        }
        if !in_time {
            progress("the time is up (--timeout)");
            process.child.kill()?;
        }
        let qemu = process.child.wait()?;
        if self.terminal {
            let log = fs::read(self.run.join("console.log"))?;
            events.extend(String::from_utf8_lossy(&log).lines().map(|l| Event::parse(l.trim_end())));
        }
        let said = events.iter().rev().find_map(|e| if let Event::Exit(n) = e { Some(*n) } else { None });
        let status = match said {
            Some(status) => status,
            None if !in_time => TIME_IS_UP,
            None => {
                progress(&format!(
                    "the machine ended before dom0 said how the script did; the emulator: {qemu}"
                ));
                NO_STATUS
            }
        };
        Ok(Ended { status, events })
    }

    /// The tar that dom0 may have written.
    pub(super) fn out(&self) -> PathBuf {
        self.run.join("out.img")
    }

    /// QEMU's command line. In -initrd a comma separates file names, so the names are relative.
    pub(super) fn command(&self) -> Command {
        let root = &self.pool.root;
        let cpus = self.cpus.to_string();
        let dom0_mib = self.memory_mib / 2;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(self.pool.loader());
        command.arg("--library-path").arg(self.pool.libraries()).arg(root.join("usr/bin/qemu-system-x86_64"));
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.join(data));
        }
        command.env("QEMU_MODULE_DIR", self.pool.libraries().join("qemu")).current_dir(self.run);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "pc"]);
        let accel: &[_] = match self.icount {
            // 8 ns per instruction, about as fast as without -icount; idle time is skipped.
            true => &["-accel", "tcg,thread=single", "-icount", "shift=3,sleep=off"],
            false => &["-accel", "tcg,thread=multi"],
        };
        command.args(accel).args(["-smp", &cpus, "-m", &self.memory_mib.to_string()]);
        // No AVX: Debian's programs do not need it, and emulating it was seen to go wrong.
        command.args(["-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+svm,+npt"]);
        command.args([
            "-chardev",
            "stdio,id=console,signal=off,logfile=console.log",
            "-serial",
            "chardev:console",
        ]);
        // dom0 ends the machine by writing a byte to this port.
        command.args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"]);
        // dom0 should report a full disk; QEMU's default is to stop the machine.
        command.args(["-drive", "file=out.img,format=raw,if=none,id=out,cache=unsafe,werror=report"]);
        command.args(["-device", "virtio-blk-pci,drive=out,disable-legacy=on"]);
        command.arg("-kernel").arg(&self.image.xen).arg("-append").arg(format!(
            "com1=115200,8n1 console=com1 loglvl=warning guest_loglvl=warning dom0_mem={dom0_mib}M,max:{dom0_mib}M \
             dom0_max_vcpus={cpus}"
        ));
        let kernel = "console=hvc0 quiet loglevel=4 mitigations=off random.trust_cpu=1";
        command.arg("-initrd").arg(format!("../image/vmlinux {kernel},initrd"));
        command
    }
}

/// A child that does not outlive its owner.
struct Process {
    child: Child,
}

impl Process {
    /// False if the deadline came first.
    fn wait_until(&mut self, deadline: Option<Instant>) -> Result<bool> {
        let Some(deadline) = deadline else {
            self.child.wait()?;
            return Ok(true);
        };
        while self.child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(true)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have exited already, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines of a stream, read by a thread that ends with it.
fn lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        // Ends when the console can no longer be read, or the receiver is gone.
        while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    receive
}

/// Passes on events until there are no more; false if the deadline came first.
fn follow(lines: &Receiver<String>, deadline: Option<Instant>, mut to: impl FnMut(Event)) -> bool {
    loop {
        let line = match deadline {
            None => lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => lines.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        };
        match line {
            Ok(line) => to(Event::parse(&line)),
            Err(RecvTimeoutError::Disconnected) => return true,
            Err(RecvTimeoutError::Timeout) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dom0_is_understood() {
        let ends = |status, seconds| Event::TestEnds { name: "nbd-kernel".into(), status, seconds };
        for (line, event) in [
            ("@xen-host ready", Event::Ready),
            ("(XEN) something @xen-host out", Event::Out),
            ("@xen-host exit 3", Event::Exit(3)),
            ("@xen-host test nbd-kernel starts", Event::TestStarts("nbd-kernel".into())),
            ("@xen-host test nbd-kernel ends 0 17", ends(0, 17)),
            ("@xen-host test nbd-kernel ends 143 2", ends(143, 2)),
        ] {
            assert_eq!(Event::parse(line), event, "{line}");
        }
        for line in
            ["exit 3", "@xen-host exit", "@xen-host exit 300", "@xen-host test a ends x 1", "@xen-host", ""]
        {
            assert_eq!(Event::parse(line), Event::Text(line.into()), "{line}");
        }
    }

    #[test]
    fn every_line_arrives_and_then_the_end() {
        let mut seen = Vec::new();
        let bytes = "one\r\n\u{fffd}two\n@xen-host exit 7\nlast".as_bytes();
        assert!(follow(&lines(bytes), None, |event| seen.push(event)));
        let text = |line: &str| Event::Text(line.into());
        assert_eq!(seen, [text("one"), text("\u{fffd}two"), Event::Exit(7), text("last")]);
    }

    #[test]
    fn a_deadline_that_has_passed_ends_the_listening() {
        let (_sender_that_says_nothing, silent) = channel();
        assert!(!follow(&silent, Some(Instant::now()), |_| ()));
    }
}
