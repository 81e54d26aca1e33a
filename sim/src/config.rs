//! What a world is built from, and why a run did not end.

use crate::decide::Source;
use crate::trace::{Span, TraceLevel};

/// The order in which ready tasks run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Scheduling {
    /// In the order in which they were woken.
    #[default]
    Fifo,
    /// As [`Scheduling::Fifo`], but one in `one_in` turns is delayed in virtual time, by up to 2^`bits` ns. (A decision
    /// per turn: 0 is in order.)
    Random {
        /// How rare.
        one_in: u32,
        /// How far.
        bits: u32,
    },
}

/// When a run is given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Turns of tasks.
    pub turns: u64,
    /// Virtual nanoseconds.
    pub time_ns: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { turns: 50_000_000, time_ns: 3_600_000_000_000 }
    }
}

/// What a world is built from.
#[derive(Clone, Debug)]
pub struct Config {
    /// The seed of decisions that are drawn.
    pub seed: u64,
    /// Where decisions come from.
    pub source: Source,
    /// Whether non-zero decisions are recorded; with the names of their entities, if lines of the trace are kept too.
    pub record: bool,
    /// How much of the trace is kept.
    pub trace: TraceLevel,
    /// The order of turns.
    pub scheduling: Scheduling,
    /// Whether faults are drawn at all.
    pub faults: bool,
    /// Watchdog.
    pub limits: Limits,
}

impl Config {
    /// Decisions from `seed`, nothing recorded, FIFO, faults on.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            source: Source::Seed,
            record: false,
            trace: TraceLevel::Hash,
            scheduling: Scheduling::Fifo,
            faults: true,
            limits: Limits::default(),
        }
    }
}

/// Why a run did not end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StallKind {
    /// No task is ready and no timer is set.
    Deadlock,
    /// [`Limits::turns`] was reached.
    TurnLimit,
    /// [`Limits::time_ns`] was reached.
    TimeLimit,
}

/// A task that waits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WaitingTask {
    /// The name of its node.
    pub node: String,
    /// Its role.
    pub role: &'static str,
    /// Its key.
    pub key: u64,
}

/// A run that did not end, with the waiting tasks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stall {
    /// Why.
    pub kind: StallKind,
    /// Virtual time in nanoseconds.
    pub at_ns: u64,
    /// The living tasks.
    pub tasks: Vec<WaitingTask>,
    /// Spans that have not ended, if spans are kept.
    pub open: Vec<Span>,
    /// What reporters added, in lines.
    pub reports: Vec<String>,
}
