//! Network block devices: a server that exports nodes, and a client that is a node.
//!
//! ```text
//!              Server ── Export: name, Rc<dyn Node>               Client: a Node
//!   listener ──► connection                                          │ submit
//!                  Inlet ──► request ──► Node::submit                ▼
//!                  Outbox ◄── reply ◄────────┘             Inlet, Outbox ── stream ──► any server
//! ```
//!
//! Either side may be secured by TLS (`wire.rs`); certificates, and what is checked, are configured by the caller.
//! Follows the NBD project's `doc/proto.md` (see [`tap_abi::nbd`]), fixed newstyle only.
//!
//! # Contract
//!
//! * Uses only the seam: a stream may be split anywhere, and every byte of a peer is checked before it is trusted. What
//!   a peer sends never causes a panic, and never takes more memory than the limits allow.
//! * Requests and replies are moved in batches: one receive takes everything that has arrived, one send takes every
//!   reply that is ready. Payload is copied at most once on its way in, and not at all on its way out.
//! * Addresses of disks are sectors of 512 bytes. The server asks for such requests and refuses others with `EINVAL`;
//!   the client refuses servers that want larger ones.

pub mod client;
mod inlet;
mod outbox;
pub mod server;
mod stop;
mod wire;

pub use client::{Breaks, Client, ClientConfig, ClientError, ClientTls};
pub use server::{Export, ExportError, Parted, Server, ServerLimits};

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [client::BUGS, server::BUGS, wire::BUGS];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [client::MARKS, server::MARKS, wire::MARKS];
}
