//! `tapdisk`, the program that ships, in a process of a world.

use crate::overseer::Overseer;
use crate::world::World;
use clap::Parser as _;
use kernel_model::SimHost;
use sim::Node;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::{CacheMode, wait};
use tap_images::ImageSpec;
use tap_programs::daemon::{Cli, Command, MAX_DISKS, run};
use tap_programs::{Console, Disks, Tuning};

/// Receives each line as it is printed.
type Reader = Box<dyn Fn(&str)>;

/// What a program prints, line by line.
#[derive(Default)]
pub(crate) struct Printed {
    pub(crate) out: RefCell<Vec<String>>,
    pub(crate) err: RefCell<Vec<String>>,
    /// Receives the lines of standard error.
    reader: Option<Reader>,
    /// Set with each line on standard output, and at the end.
    news: wait::Event,
    status: Cell<Option<u8>>,
}

impl Printed {
    /// Passes each line of standard error to `reader` as it comes.
    pub(crate) fn read_by(reader: impl Fn(&str) + 'static) -> Self {
        Self { reader: Some(Box::new(reader)), ..Self::default() }
    }

    /// Waits until a line on standard output begins with `start`; false if the program ends without one.
    pub(crate) async fn says(&self, start: &str) -> bool {
        loop {
            if self.out.borrow().iter().any(|line| line.starts_with(start)) {
                return true;
            }
            if self.status.get().is_some() {
                return false;
            }
            self.news.clear();
            self.news.wait().await;
        }
    }

    /// Notes that the program has ended with `status`.
    pub(crate) fn end(&self, status: u8) {
        self.status.set(Some(status));
        self.news.set();
    }

    /// Its exit status, once it has ended.
    pub(crate) fn status(&self) -> Option<u8> {
        self.status.get()
    }

    /// Waits until the program has ended.
    pub(crate) async fn ended(&self) {
        while self.status.get().is_none() {
            self.news.clear();
            self.news.wait().await;
        }
    }
}

impl Console for Printed {
    fn out(&self, line: &str) {
        self.out.borrow_mut().push(line.to_owned());
        self.news.set();
    }
    fn err(&self, line: &str) {
        self.err.borrow_mut().push(line.to_owned());
        self.reader.iter().for_each(|read| read(line));
    }
    fn progress(&self, _: u64, _: u64) {}
}

/// Puts what a process prints into the story of the run.
struct Told {
    said: Rc<Printed>,
    world: World,
    node: Node,
}

impl Told {
    fn tell(&self, line: &str) {
        self.world.sim.remark(self.node.name(), || format!("prints: {line}"));
    }
}

impl Console for Told {
    fn out(&self, line: &str) {
        self.tell(line);
        self.said.out(line);
    }
    fn err(&self, line: &str) {
        self.tell(line);
        self.said.err(line);
    }
    fn ready(&self) {
        self.said.ready();
    }
    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        self.said.progress(done_bytes, total_bytes);
    }
}

/// Runs `tapdisk` with the arguments of `line` in the process of `host` until it ends, and returns its exit status. A
/// program that is killed has none, even if it comes to its end in the turn in which its calls begin to fail.
///
/// # Panics
/// If the command line cannot be parsed.
pub(crate) async fn tapdisk(
    world: &World,
    host: &SimHost,
    line: &str,
    tuning: Tuning,
    said: &Rc<Printed>,
) -> u8 {
    let cli = Cli::try_parse_from(std::iter::once("tapdisk").chain(line.split_whitespace()));
    let cli = cli.unwrap_or_else(|e| panic!("tapdisk {line}: {e}"));
    // As `main` does.
    let host = host.clone().with_run_folder(&cli.command.run_dir().to_string_lossy());
    let disks = Disks::new(host.clone(), MAX_DISKS);
    // Disks under control are paused by those who control them.
    let pauses = !matches!(cli.command, Command::Control(_));
    let overseer = Overseer::start(world, &host, &disks, pauses);
    let node = host.process.node().clone();
    let told = Rc::new(Told { said: Rc::clone(said), world: world.clone(), node: node.clone() });
    let status = run(host, cli, tuning, disks, told).await;
    if !node.is_alive() {
        std::future::pending::<()>().await;
    }
    if let Some(overseer) = overseer {
        overseer.end().await;
    }
    status
}

/// Runs `tapback` likewise.
///
/// # Panics
/// If the command line cannot be parsed.
pub(crate) async fn tapback(world: &World, host: &SimHost, line: &str, said: &Rc<Printed>) -> u8 {
    let cli =
        tap_programs::tapback::Cli::try_parse_from(std::iter::once("tapback").chain(line.split_whitespace()));
    let cli = cli.unwrap_or_else(|e| panic!("tapback {line}: {e}"));
    let host = host.clone().with_run_folder(&cli.run_dir.to_string_lossy());
    let node = host.process.node().clone();
    let told = Rc::new(Told { said: Rc::clone(said), world: world.clone(), node: node.clone() });
    let status = tap_programs::tapback::run(host, cli, told).await;
    if !node.is_alive() {
        std::future::pending::<()>().await;
    }
    status
}

/// An image as an argument of a program, with its format.
pub fn named(spec: &ImageSpec) -> String {
    format!("{}:{}", spec.format.name(), spec.path)
}

/// The cache mode as an option.
pub(crate) fn option_of(cache: CacheMode) -> &'static str {
    match cache {
        CacheMode::WriteBack => "",
        CacheMode::WriteThrough => "--cache writethrough",
        CacheMode::Unsafe => "--cache unsafe",
    }
}
