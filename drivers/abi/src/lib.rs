//! Bytes and numbers defined elsewhere: what a guest, xenstore or a control tool puts on the wire.
//!
//! ```text
//!   shared memory ──copy──► [u8; 112] ──parse──► BlkifRequest ──► back end
//!                           [u8; 16]  ◄─encode── RawResponse  ◄──
//! ```
//!
//! # Contract
//!
//! Bytes only: no I/O, no policy, no allocation. Every layout has const size and offset asserts and a golden test
//! that spells its bytes out. Parsers take a private copy, accept any bytes and never panic; whatever they return was
//! checked, so that their callers need not check again.
//!
//! | module | follows |
//! |---|---|
//! | [`ring`] | Xen's `io/ring.h`: the header of a shared ring and its free-running indices |
//! | [`blkif`] | Xen's `io/blkif.h`: block requests and responses, x86_64 layout |
//! | [`blktap`] | the blktap2 modules: the ring of a block device of dom0, and their ioctls |
//! | [`nbd`] | the NBD project's `doc/proto.md`: negotiation, requests and replies of network block devices |
//! | [`tapctl`] | tapdisk3: messages of who controls a tapdisk |
//! | [`xenbus`] | Xen's `io/xenbus.h`: the states of a device's two ends |
//! | [`xenstore`] | Xen's `io/xs_wire.h`: messages between xenstored and its clients |

pub mod blkif;
pub mod blktap;
pub mod nbd;
pub mod ring;
pub mod tapctl;
pub mod xenbus;
pub mod xenstore;
