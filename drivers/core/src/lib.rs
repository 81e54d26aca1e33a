//! The request engine: what every disk has, whatever its format and wherever its requests come from.
//!
//! ```text
//!   ring ──► Vbd ──► Scheduler ──► (graph) ──► image
//!            life    order, depth,             any Node
//!            cycle   merging, retry
//! ```
//!
//! # Contract
//!
//! A [`Node`] takes a [`Request`] and answers it exactly once. Whoever submits may drop the future: the effect may
//! then still happen. Nodes hold no thread, no clock and no file; they are generic over the seam inside and
//! `Rc<dyn Node>` outside.

mod node;
mod request;

pub use node::{LocalBoxFuture, Node, NodeInfo};
pub use request::{Op, Request, Response};
