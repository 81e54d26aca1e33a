//! `tapdisk` as a process of a simulated machine.

mod attach;
mod control;
mod given;
mod guests;
mod json;
mod resize;
mod serve;
mod stuck;

use clap::Parser;
use kernel_model::faults::FaultPlan;
use kernel_model::{Kernel, SimHost, Storage, StorageConfig};
use sim::{Config, Sim};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::Tasks;
use tap_programs::daemon::{Cli, MAX_DISKS, run};
use tap_programs::{Console, Disks, Tuning};
use xen_model::Xen;

#[derive(Default)]
struct Printed {
    lines: RefCell<Vec<String>>,
    /// How many lines there were when it was ready.
    ready: Cell<Option<usize>>,
}

impl Console for Printed {
    fn out(&self, line: &str) {
        self.lines.borrow_mut().push(line.to_owned());
    }
    fn err(&self, line: &str) {
        self.lines.borrow_mut().push(line.to_owned());
    }
    fn ready(&self) {
        assert_eq!(self.ready.replace(Some(self.lines.borrow().len())), None, "ready once");
    }
    fn progress(&self, _done_bytes: u64, _total_bytes: u64) {}
}

/// A process that runs `tapdisk` with these arguments.
struct Daemon {
    host: SimHost,
    disks: Disks<SimHost>,
    printed: Rc<Printed>,
    status: Rc<RefCell<Option<u8>>>,
}

impl Daemon {
    fn start(kernel: &Kernel, xen: &Xen, key: u64, line: &str) -> Self {
        Self::start_with(kernel, xen, key, line, MAX_DISKS)
    }

    /// With another limit of disks.
    fn start_with(kernel: &Kernel, xen: &Xen, key: u64, line: &str, limit: usize) -> Self {
        let cli = Cli::try_parse_from(std::iter::once("tapdisk").chain(line.split_whitespace()));
        let cli = cli.unwrap_or_else(|e| panic!("{line}: {e}"));
        let host = SimHost::start(kernel, xen, "tapdisk", key);
        let (printed, status) = (Rc::new(Printed::default()), Rc::new(RefCell::new(None)));
        let disks = Disks::new(host.clone(), limit);
        let (h, d, p, s) = (host.clone(), disks.clone(), Rc::clone(&printed), Rc::clone(&status));
        host.spawn("main", 0, async move {
            *s.borrow_mut() = Some(run(h, cli, Tuning::default(), d, p).await);
        });
        Self { host, disks, printed, status }
    }

    fn said(&self) -> String {
        self.printed.lines.borrow().join("\n")
    }
}

fn world<F: Future<Output = ()> + 'static>(body: impl FnOnce(Sim, Kernel, Xen) -> F) {
    let sim = Sim::new(&Config::new(1));
    let config = StorageConfig { faults: FaultPlan::default(), ..StorageConfig::default() };
    let kernel = Kernel::new(&sim, &Storage::new(&sim, config));
    let xen = Xen::new(&sim, xen_model::Options::default());
    let body = body(sim.clone(), kernel, xen);
    sim.run(body).unwrap();
}
