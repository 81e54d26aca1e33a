//! Panics inside runs: each is a finding with its place, whatever happens to the thread.
//!
//! ```text
//!   one panic ──► unwinds to `inside`: the run failed, the thread continues
//!   one more while that unwinds (in a destructor) ──► the process would abort
//!       thread of `apart` ──► the hook hands its run over, the thread stops for good, the others continue
//!       any other thread  ──► the run is printed, exit status 1
//! ```

use crate::check::{Failure, Invariant};
use crate::spec::{Outcome, RunSpec};
use sim::{Sim, Source, guard};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;

/// The exit status that a shell reports for a program that wrote to a closed pipe.
const BROKEN_PIPE: i32 = 141;
/// Exit status of a broken invariant.
const BROKEN: i32 = 1;

/// A run that could not be ended on its thread, and its outcome as far as known.
pub(crate) type Lost = (RunSpec, Box<Outcome>);

thread_local! {
    /// Place of the panic that is unwinding.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// The run of this thread; its engine while it has one.
    static CURRENT: RefCell<Option<(RunSpec, Option<Sim>)>> = const { RefCell::new(None) };
    /// Receives a run that this thread cannot end.
    static HEIR: RefCell<Option<mpsc::Sender<Lost>>> = const { RefCell::new(None) };
}

/// Turns panics inside a run into findings; others print as usual.
pub(crate) fn catch_places() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.payload_as_str().is_some_and(|text| text.starts_with("failed printing to std")) {
            // The reader of our output has gone (`| head`), which is no finding.
            std::process::exit(BROKEN_PIPE);
        }
        if !INSIDE.get() {
            return usual(info);
        }
        let text = info.payload_as_str().unwrap_or("panic");
        let place = info.location().map_or(String::new(), |l| format!(" at {}:{}", l.file(), l.line()));
        match PLACE.take() {
            None => PLACE.set(Some(format!("{text}{place}"))),
            Some(first) => abandon_thread(&format!("{first}; and while that unwound: {text}{place}")),
        }
    }));
}

/// Gives up the thread of a run that panicked twice.
fn abandon_thread(text: &str) -> ! {
    let (spec, sim) = CURRENT.take().unzip();
    let sim = sim.flatten();
    let at_ns = sim.as_ref().map_or(0, Sim::now_ns);
    let failure = Failure { detail: text.into(), at_ns, ..Failure::of(Invariant::A1) };
    let (trace, decisions) = sim.as_ref().and_then(Sim::salvage).unwrap_or_default();
    // Dropping the engine is what just failed, so it is leaked.
    std::mem::forget(sim);
    match (HEIR.take(), spec) {
        (Some(heir), Some(mut spec)) => {
            if spec.record {
                spec.source = Source::Replay(decisions.clone());
            }
            let outcome = Outcome { failure: Some(failure), trace, decisions, ..Outcome::default() };
            if heir.send((spec, Box::new(outcome))).is_err() {
                std::process::exit(BROKEN);
            }
            loop {
                std::thread::park();
            }
        }
        (_, spec) => {
            let name = spec.map_or(String::new(), |s| format!("{} seed {}: ", s.scenario.name, s.seed));
            eprintln!("{name}broken {}: {}\n  {text}", Invariant::A1, Invariant::A1.sentence());
            std::process::exit(BROKEN);
        }
    }
}

/// From now on this thread runs `spec` on `sim`.
pub(crate) fn begin(spec: &RunSpec, sim: &Sim) {
    // Decisions of a replay need not be copied: if needed, they are recorded again.
    let spec = RunSpec {
        scenario: spec.scenario,
        seed: spec.seed,
        source: Source::Seed,
        options: spec.options.clone(),
        trace: spec.trace,
        record: spec.record,
    };
    CURRENT.set(Some((spec, Some(sim.clone()))));
}

/// The engine of this thread's run is about to be dropped.
pub(crate) fn dropping_engine() {
    let engine = CURRENT.with_borrow_mut(|current| current.as_mut().and_then(|(_, sim)| sim.take()));
    drop(engine);
}

/// Runs part of a world and catches panics.
///
/// # Errors
/// The text and place of the panic.
pub(crate) fn inside<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    INSIDE.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    INSIDE.set(false);
    result.map_err(|_| PLACE.take().unwrap_or_else(|| "panic".into()))
}

/// Runs `work`, which runs worlds, on a thread that can be given up, guarded if asked for.
///
/// # Errors
/// The run that the thread could not end.
pub(crate) fn apart<T: Send + 'static>(
    guarded: bool,
    seed: u64,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Lost> {
    let (heir, lost) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        guard::run(guarded, seed, move || {
            HEIR.set(Some(heir));
            let value = work();
            // Ends the caller's wait.
            HEIR.take();
            value
        })
    });
    match lost.recv() {
        Ok(lost) => Err(lost),
        Err(_) => match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => resume_unwind(panic),
        },
    }
}
