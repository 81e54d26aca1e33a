//! The deterministic engine: executor, clock, decisions, faults, trace, replay, shrinking. It knows nothing of disks.
//!
//! ```text
//!   seed or decision file ──► Decisions ──► every choice: which task runs late, which I/O fails, what the guest does
//!                                              │ keyed by (entity, label, attempt); 0 is the boring answer
//!   Sim: tasks on one thread ◄── timers (ns) ──┘
//!     │                                            ┌─► trace hash: equal runs have equal hashes
//!     └─ events ──────────────────────────────────-┴─► lines, when they are to be read
//! ```
//!
//! # Contract
//!
//! * A run is a function of its scenario and its decisions. Nothing else (no clock, thread, address or iteration order
//!   of a hash map) may decide anything.
//! * A decision is keyed by what it is about, not by when it is drawn, and only non-zero ones are stored. So any subset
//!   of a run's decisions is a run, and leaving one out does not shift the others: this is what makes shrinking work.
//! * Time is virtual, in nanoseconds, and moves only when no task is ready.
//! * Killing a [`Node`] first makes its handles dead ([`Node::step`] returns `false`), then drops its tasks:
//!   destructors have no effect.
//! * [`guard`] runs worlds inside madsim, which takes away the real clock, real randomness and threads. The trace hash
//!   is the same with and without it; this is checked.

mod config;
mod decide;
mod exec;
mod fault;
mod file;
pub mod guard;
mod mix;
mod nested;
mod node;
mod shrink;
mod task;
mod time;
mod trace;

pub use config::{Config, Limits, Scheduling, Stall, StallKind, WaitingTask};
pub use decide::{Decision, DecisionMap, Draw, Key, Label, Script, Source, label_by_name, register_labels};
pub use exec::{Sim, WAKE, Witness};
pub use fault::{FaultKind, Swarm};
pub use file::{RunFile, RunFileError};
pub use mix::{Entity, FixedMap, mix, mix2, text_hash};
pub use nested::Work;
pub use node::Node;
pub use shrink::{ShrinkLimits, Shrunk, shrink};
pub use time::{Sleep, Timed};
pub use trace::{Span, SpanId, TraceEvent, TraceLevel, TraceLine, TraceReport, first_difference, micros};
