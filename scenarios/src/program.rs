//! `tapdisk`, the program that ships, in a process of a world.

use clap::Parser as _;
use kernel_model::SimHost;
use std::cell::RefCell;
use std::rc::Rc;
use tap_images::ImageSpec;
use tap_programs::Console;
use tap_programs::daemon::{Cli, run};

/// What a program prints, line by line.
#[derive(Default)]
pub(crate) struct Printed {
    pub(crate) out: RefCell<Vec<String>>,
    pub(crate) err: RefCell<Vec<String>>,
}

impl Console for Printed {
    fn out(&self, line: &str) {
        self.out.borrow_mut().push(line.to_owned());
    }
    fn err(&self, line: &str) {
        self.err.borrow_mut().push(line.to_owned());
    }
    fn progress(&self, _: u64, _: u64) {}
}

/// Runs `tapdisk` with the arguments of `line` in the process of `host` until it ends: its exit status, and what it has
/// printed on standard error.
///
/// # Panics
/// When the command line cannot be parsed.
pub async fn tapdisk(host: &SimHost, line: &str) -> (u8, String) {
    let cli = Cli::try_parse_from(std::iter::once("tapdisk").chain(line.split_whitespace()));
    let cli = cli.unwrap_or_else(|e| panic!("tapdisk {line}: {e}"));
    let said = Rc::new(Printed::default());
    let status = run(host.clone(), cli, Rc::clone(&said) as Rc<dyn Console>).await;
    (status, said.err.take().join("; "))
}

/// An image as an argument of a program: its format is named.
pub fn named(spec: &ImageSpec) -> String {
    format!("{}:{}", spec.format.name(), spec.path)
}
