//! The language: from text to statements, and from mistakes to messages.
//!
//! ```text
//!   text ──lex──► tokens ──parse──► File (ast)
//!                   │
//!                   └──print──► the same text, laid out
//! ```
//!
//! # Contract
//!
//! * Any text is taken: parsing never panics, and takes time and memory that are linear in the text.
//! * All mistakes of a text are reported, not only the first; a [`File`](ast::File) has what could be understood.
//! * Laying out a text changes neither its statements nor its comments, and laying it out again changes nothing.

pub mod ast;
pub mod diagnose;
pub mod lex;
pub mod parse;
pub mod print;

pub use ast::Span;
pub use diagnose::{Diagnostic, Sources};
pub use parse::parse;
pub use print::format;
