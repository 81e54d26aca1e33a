//! The tapdisk of a machine: `tapdisk xen`, the program that ships, from its command line to its exit status.
//!
//! ```text
//!   disks of the machine ─► command line ─► tapdisk xen ─┬─► lines on standard error: an unjustified one fails the run
//!                                                        └─► exit status: done, or a successor is started
//! ```
//!
//! The machine knows what an administrator knows: what the program prints, how it ends, and what it does to files.

use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::limits::StackLimits;
use crate::machine::{Attached, Machine, SCRIPT};
use crate::program::{Printed, named, option_of, tapback, tapdisk};
use crate::respawn::may_lose;
use kernel_model::SimHost;
use std::cell::Cell;
use std::rc::Rc;
use tap_core::{Node, wait};
use tap_host::Tasks;
use tap_programs::Tuning;
use tap_programs::spec::DiskSpec;

/// Maximum number of disks of one machine, for the memory of a tapdisk that starts without disks.
const DISKS_MAX: usize = 3;

/// Complaints of one tapdisk.
#[derive(Default)]
struct Heard {
    any: Cell<bool>,
    /// An image could not be opened, and a later try may succeed.
    not_opened: Cell<bool>,
    /// It has lost its events, or its connection to xenstored.
    lost: Cell<bool>,
}

/// The subject of a line on standard error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Complaint {
    /// The whole program cannot continue.
    Whole,
    /// A disk is not served and was not changed.
    NotTaken,
    /// Events are lost.
    Deaf,
    /// An image could not be closed.
    Close,
    /// The vbd is not in xenstore.
    NoVbd,
    /// xenstored refused an operation.
    Store,
    /// It already has a disk of this name, or too many disks.
    Listed,
    /// Another process has the image.
    InUse,
    /// The image is invalid.
    Refused,
    /// The image could not be opened for another reason.
    Open,
}

impl Complaint {
    /// `None` for a line that does not say what is wrong.
    fn of(line: &str) -> Option<Self> {
        let (_, why) = line.split_once("failed to ").filter(|(_, why)| !why.is_empty())?;
        Some(match () {
            () if line.starts_with("tapdisk: failed to ") => Self::Whole,
            () if why.contains("nothing was changed") => Self::NotTaken,
            () if why.contains("cannot be heard any more") => Self::Deaf,
            () if why.contains("may be lost") => Self::Close,
            () if why.contains("a toolstack makes it") => Self::NoVbd,
            () if why.contains(" in xenstore: ") => Self::Store,
            () if why.starts_with("serve '") => Self::Listed,
            () if why.contains("it is in use by another process") => Self::InUse,
            () if why.starts_with("open ") && why.contains(" as ") => Self::Refused,
            () => Self::Open,
        })
    }
}

impl Machine {
    /// Starts the tapdisk process, which serves all attached disks.
    pub fn start_tapdisk(self: &Rc<Self>) -> SimHost {
        let start = self.starts.replace(self.starts.get() + 1);
        let key = self.boot << 32 | u64::from(start);
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "tapdisk", key);
        host.port.allow_store_errors();
        if self.world.draws_errors() {
            host.port.allow_copy_errors();
        }
        if self.may_lose.get() {
            may_lose(&host);
        }
        if self.stopping.get() {
            host.process.ask_to_stop();
        }
        let disks = self.disks.borrow().clone();
        self.running.set(0);
        *self.tapdisk.borrow_mut() = Some(host.clone());
        if self.watching || !disks.is_empty() {
            self.run(&host, &disks);
        } else {
            // Without disks there is no tapdisk.
            self.wake_waiter();
        }
        host
    }

    /// Another process tries to serve `disk`, which is served already, with another image; it must fail.
    pub async fn try_to_serve(&self, disk: &Attached, image: &Setup, number: u32, read_only: bool) {
        let world = &self.world;
        let host = SimHost::start(&world.kernel, &world.xen, "second", u64::from(number));
        let limits = StackLimits { read_only, ..self.limits };
        // With different run folders, the two processes do not know of each other.
        let folder = world.setting("second-run-dir", &["/run/tapdisk", "/run/elsewhere"]);
        let line = format!("xen --run-dir {folder} {} {}", limits.options(), self.argument(disk, image));
        let tuning = limits.tuning(world, host.process.node(), limits.memory_bytes);
        let (w, h) = (world.clone(), host.clone());
        let (task, ended) = wait::joined(async move {
            let said = Rc::<Printed>::default();
            if tapdisk(&w, &h, &line, tuning, &said).await == 0 {
                let text = format!("a second tapdisk served the disk: {}", said.out.take().join("; "));
                w.fail(Invariant::L1, text);
            }
        });
        host.spawn("main", 0, task);
        let _ = ended.await;
        host.process.node().kill();
    }

    /// Starts another process that is to serve `disk`: with `twin`, an image of the same bytes, or if tapdisk watches,
    /// with the image in xenstore.
    pub fn start_rival(self: &Rc<Self>, disk: &Attached, twin: &Setup) -> SimHost {
        self.rivals.set(true);
        self.setups.borrow_mut().push((twin.clone(), self.limits.read_only));
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "second", self.boot);
        self.run(&host, &[Attached { setup: twin.clone(), ..disk.clone() }]);
        host
    }

    /// Runs `tapdisk xen` in `host`, for `disks` unless it watches xenstore.
    fn run(self: &Rc<Self>, host: &SimHost, disks: &[Attached]) {
        self.running.set(self.running.get() + 1);
        if self.script.is_some() {
            host.spawn("main", 0, Rc::clone(self).back_program(host.clone()));
            return;
        }
        let what = if self.watching {
            format!("--watch --script {SCRIPT}")
        } else {
            disks.iter().map(|disk| self.argument(disk, &disk.setup)).collect::<Vec<_>>().join(" ")
        };
        let line = format!("xen {} {} {what}", self.limits.options(), option_of(self.cache));
        let memory = self.limits.memory_bytes * if self.watching { DISKS_MAX } else { disks.len() };
        let tuning = self.tuning(host, memory);
        host.spawn("main", 0, Rc::clone(self).program(host.clone(), line, tuning));
    }

    /// `disk` as an argument of `tapdisk xen`, with `image`.
    fn argument(&self, disk: &Attached, image: &Setup) -> String {
        format!("{}/{}={}", disk.dom.0, self.vdev.0, named(&image.spec))
    }

    /// Tuning that also checks the locks of each opened image.
    fn tuning(self: &Rc<Self>, host: &SimHost, memory: usize) -> Tuning {
        let tuning = self.limits.tuning(&self.world, host.process.node(), memory);
        let (machine, node, over) = (Rc::clone(self), host.process.node().clone(), tuning.over_image);
        let over_image = Rc::new(move |spec: &DiskSpec, image: Rc<dyn Node>| {
            if node.is_alive() {
                machine.check_opened(spec);
            }
            match &over {
                Some(over) => over(spec, image),
                None => image,
            }
        });
        Tuning { over_image: Some(over_image), ..tuning }
    }

    /// Checks that an opened image is one of the machine's, and that it is locked.
    fn check_opened(&self, spec: &DiskSpec) {
        let setups = self.setups.borrow();
        let known = setups.iter().rev().find(|(s, _)| *spec == DiskSpec::Image(s.spec.clone()));
        match known {
            Some((setup, read_only)) => setup.check_locks(&self.world, *read_only),
            None => self.world.fail(Invariant::K1, format!("tapdisk opens {spec}, which is not attached")),
        }
    }

    /// Runs `tapback` in `host`.
    async fn back_program(self: Rc<Self>, host: SimHost) {
        let marked = if self.kind == "vbd" { format!("--script {SCRIPT}") } else { String::new() };
        let line = format!("--type {} {marked}", self.kind);
        let heard = Rc::<Heard>::default();
        let (machine, own, all) = (Rc::clone(&self), host.clone(), Rc::clone(&heard));
        let said = Rc::new(Printed::read_by(move |line| machine.judge_back_line(&own, &all, line)));
        let status = tapback(&self.world, &host, &line, &said).await;
        self.ended(&host, &heard, status);
    }

    /// Judges a line that a tapback has printed on standard error.
    fn judge_back_line(&self, host: &SimHost, heard: &Heard, line: &str) {
        if !host.process.node().is_alive() {
            return;
        }
        self.told.set(self.told.get() + 1);
        heard.any.set(true);
        let away = self.script.as_ref().is_some_and(|script| script.was_away());
        let broken = self.broken.get().is_some_and(|dom| line.starts_with(&format!("tapback: {}/", dom.0)));
        let told = line.contains(" in xenstore: ");
        let of_one = !line.starts_with("tapback: failed to ");
        let is_right = self.has_lost(host) || of_one && (away || broken || told);
        if !is_right {
            self.world.fail(Invariant::L1, format!("tapback complains: {line}"));
        }
        heard.lost.set(heard.lost.get() || self.has_lost(host));
    }

    async fn program(self: Rc<Self>, host: SimHost, line: String, tuning: Tuning) {
        let heard = Rc::<Heard>::default();
        let (machine, own, all) = (Rc::clone(&self), host.clone(), Rc::clone(&heard));
        let said = Rc::new(Printed::read_by(move |line| machine.judge_line(&own, &all, line)));
        let status = tapdisk(&self.world, &host, &line, tuning, &said).await;
        self.ended(&host, &heard, status);
    }

    /// Judges a line that `host` has printed on standard error.
    fn judge_line(&self, host: &SimHost, heard: &Heard, line: &str) {
        // A dying process may fail in any way.
        if !host.process.node().is_alive() {
            return;
        }
        self.told.set(self.told.get() + 1);
        heard.any.set(true);
        let complaint = Complaint::of(line);
        let is_right = match complaint {
            Some(Complaint::Whole | Complaint::Store) if self.has_lost(host) => true,
            None | Some(Complaint::Whole | Complaint::Listed | Complaint::Refused) => false,
            Some(Complaint::NotTaken) => {
                self.rivals.get() || self.broken.get().is_some_and(|dom| is_of(line, dom.0))
            }
            Some(Complaint::Deaf) => self.has_lost(host),
            // One that got the disk from the toolstack retries.
            Some(Complaint::Store) => self.watching,
            Some(Complaint::NoVbd) => {
                !self.disks.borrow().iter().any(|d| is_of(line, d.dom.0) && d.node.is_alive())
            }
            Some(Complaint::InUse) => true,
            Some(Complaint::Open) => self.absences.get() || self.world.errors_allowed(),
            Some(Complaint::Close) => self.world.errors_allowed(),
        };
        if !is_right {
            let image = matches!(complaint, Some(Complaint::Refused | Complaint::Open | Complaint::Close));
            let invariant = if image { Invariant::G11 } else { Invariant::L1 };
            self.world.fail(invariant, format!("tapdisk complains: {line}"));
        }
        // The line may name it as the second of two failures.
        self.close_failed.set(self.close_failed.get() || line.contains("may be lost"));
        heard.lost.set(heard.lost.get() || self.has_lost(host));
        if matches!(complaint, Some(Complaint::InUse | Complaint::Open)) && !self.watching {
            heard.not_opened.set(true);
            // Other disks of this process are served; its supervisor starts it again.
            host.process.ask_to_stop();
        }
    }

    /// Whether `host` has lost its events, or its connection to xenstored, as it may.
    fn has_lost(&self, host: &SimHost) -> bool {
        self.may_lose.get() && (host.port.is_deaf() || host.port.has_lost_store())
    }

    /// `host` has ended with `status`. A supervisor starts it again if it lost something, or if an image could not be
    /// opened: a dead process may hold it for ten seconds, and an error may be transient.
    fn ended(self: &Rc<Self>, host: &SimHost, heard: &Heard, status: u8) {
        if heard.any.get() != (status != 0) && !(self.watching && status == 0) {
            let text = format!("tapdisk ended with status {status}; complained: {}", heard.any.get());
            self.world.fail(Invariant::L1, text);
        }
        if heard.lost.get() || heard.not_opened.get() && !self.rivals.get() {
            return self.respawn(host);
        }
        self.running.set(self.running.get() - 1);
        self.wake_waiter();
    }
}

/// Whether `line` is about a disk of domain `dom`.
fn is_of(line: &str, dom: u16) -> bool {
    line.starts_with(&format!("tapdisk: {dom}/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_program_are_classified() {
        let path = "/local/domain/0/backend/vbd/1/51712";
        for (line, complaint) in [
            ("tapdisk: failed to list /x in xenstore: EIO", Some(Complaint::Whole)),
            ("tapdisk: 1/xvda: failed to ", None),
            (
                "tapdisk: 1/xvda: failed to lock /a: it is in use by another process; close it",
                Some(Complaint::InUse),
            ),
            ("tapdisk: 1/xvda: failed to open /a as qcow: it is torn; restore it", Some(Complaint::Refused)),
            ("tapdisk: 1/xvda: failed to write /x in xenstore: EIO", Some(Complaint::Store)),
            ("tapdisk: 1/xvda: failed to open /a: ENOENT", Some(Complaint::Open)),
            ("tapdisk: 1/xvda: failed to serve '1/xvda' twice; give each", Some(Complaint::Listed)),
            (
                &format!("tapdisk: 1/xvda: failed to find {path} in xenstore; a toolstack makes it"),
                Some(Complaint::NoVbd),
            ),
        ] {
            assert_eq!(Complaint::of(line), complaint, "{line}");
        }
        let close = tap_host::Errno::EIO;
        let error = tap_xenbus::BackendError::Deaf { path: path.into() };
        let and_close = tap_xenbus::BackendError::AndClose { first: Box::new(error.clone()), close };
        for (error, complaint) in [
            (tap_xenbus::BackendError::NotTaken { path: path.into(), why: "x".into() }, Complaint::NotTaken),
            (tap_xenbus::BackendError::Close { path: path.into(), error: close }, Complaint::Close),
            (error, Complaint::Deaf),
            (and_close, Complaint::Deaf),
        ] {
            let line = format!("tapdisk: 1/xvda: failed to {error}");
            assert_eq!(Complaint::of(&line), Some(complaint), "{line}");
        }
    }
}
