//! Panics inside runs: each is a finding with its place, whatever it does to the thread.
//!
//! ```text
//!   one panic ──► unwinds to `inside`: the run failed, the thread goes on
//!   one more while that unwinds (in a destructor) ──► the process would abort
//!       thread of `apart` ──► its run is handed over from the hook, the thread stops for ever, the others go on
//!       any other thread  ──► the run is named, exit status 1
//! ```

use crate::check::{Failure, Invariant};
use crate::spec::{Outcome, RunSpec};
use sim::{Sim, Source, guard};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;

/// What a shell shows for a program that wrote to a closed pipe.
const BROKEN_PIPE: i32 = 141;
/// Exit status of a broken invariant.
const BROKEN: i32 = 1;

/// A run that took its thread with it: what was run, and what is known of it.
pub(crate) type Lost = (RunSpec, Box<Outcome>);

thread_local! {
    /// Where the panic that is unwinding came from.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// The run of this thread; its engine while it has one.
    static CURRENT: RefCell<Option<(RunSpec, Option<Sim>)>> = const { RefCell::new(None) };
    /// Who takes over a run that this thread cannot end.
    static HEIR: RefCell<Option<mpsc::Sender<Lost>>> = const { RefCell::new(None) };
}

/// Panics inside a run are findings; others print as usual.
pub(crate) fn catch_places() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.payload_as_str().is_some_and(|text| text.starts_with("failed printing to std")) {
            // Whoever read our output has gone (`| head`): that is no finding and nobody is left to tell.
            std::process::exit(BROKEN_PIPE);
        }
        if !INSIDE.get() {
            return usual(info);
        }
        let text = info.payload_as_str().unwrap_or("panic");
        let place = info.location().map_or(String::new(), |l| format!(" at {}:{}", l.file(), l.line()));
        match PLACE.take() {
            None => PLACE.set(Some(format!("{text}{place}"))),
            Some(first) => give_up(&format!("{first}; and while that unwound: {text}{place}")),
        }
    }));
}

/// The thread of a run that panicked twice never comes back.
fn give_up(text: &str) -> ! {
    let (spec, sim) = CURRENT.take().unzip();
    let sim = sim.flatten();
    let failure =
        Failure { invariant: Invariant::A1, detail: text.into(), at_ns: sim.as_ref().map_or(0, Sim::now_ns) };
    let (trace, decisions) = sim.as_ref().and_then(Sim::salvage).unwrap_or_default();
    // What the engine holds must not be taken down: that is what just failed.
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
    // Decisions of a replay need not be copied: they are recorded again where anybody wants them.
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

/// The engine of this thread's run is about to go.
pub(crate) fn taking_down() {
    let engine = CURRENT.with_borrow_mut(|current| current.as_mut().and_then(|(_, sim)| sim.take()));
    drop(engine);
}

/// Runs part of a world. A panic is caught.
///
/// # Errors
/// Its text and place.
pub(crate) fn inside<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    INSIDE.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    INSIDE.set(false);
    result.map_err(|_| PLACE.take().unwrap_or_else(|| "panic".into()))
}

/// Runs `work`, which runs worlds, on a thread that can be given up, inside the guard if asked for.
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
            // Ends what the caller waits for.
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
