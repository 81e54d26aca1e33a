//! Block Mason: disks as graphs of small nodes, declared in a language.
//!
//! ```text
//!   text ──lang──► statements ──graph──► a plan of nodes ──build──► nodes, from the bottom up
//!                               checked before anything is opened    made by modules
//! ```
//!
//! # Contract
//!
//! * A text, and what it imports, is read once, and may be anything: mistakes become messages.
//! * A graph opens files only as the caller's policy allows, as images open their backing files.
//! * Nothing is opened for a graph that has a mistake. When anything cannot be opened, what was is closed.
//! * A node passes on what makes a write durable: a flush reaches everything below it that was written to, and FUA goes
//!   with every part of a request.

pub mod build;
pub mod codes;
pub mod graph;
pub mod lang;
pub mod load;

pub mod modules;

#[cfg(test)]
mod tests;

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [build::BUGS, modules::BUGS];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [build::MARKS, modules::MARKS];
}
