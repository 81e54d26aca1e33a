//! The second control socket: what the protocol of tap-ctl cannot say, in JSON.
//!
//! ```text
//!   {"verb":"stats","minor":5}  ──►  {"ok":{"disks":[...]}}
//!                                    {"error":{"errno":19,"name":"ENODEV","words":"count what minor 5 did: ..."}}
//! ```
//!
//! # Contract
//!
//! * A request is one line of at most [`REQUEST_BYTES_MAX`]; what follows it is not read. The answer is one line.
//! * Fields and verbs that nobody knows are refused by name: nothing is left out of a request silently.
//! * Events are answered with a line for each, until the client hangs up or the tapdisk ends; [`Feed`] is bounded
//!   whatever clients do.
//! * For connections holds what holds for those of tap-ctl.
//!
//! A new verb is a variant of [`Request`], one of [`Reply`], and what [`Verbs`] does for it.

mod feed;
mod news;
mod server;
mod vocabulary;

pub use feed::{EVENTS_KEPT, Feed};
pub use news::{Happened, News, Standing};
pub use server::{Json, REQUEST_BYTES_MAX, Verbs};
pub use vocabulary::{
    Answer, Disk, Disks, ErrorAnswer, Guest, ImageStats, Job, JobState, Latency, Metrics, Operation, Reply,
    Request, Resized, SetFor, State, Stats, Taken,
};

tap_host::listed! {
    pub(super) BUGS: Bug with [feed::BUGS, server::BUGS];
}

tap_host::listed! {
    pub(super) MARKS: Mark with [feed::MARKS, server::MARKS];
}
