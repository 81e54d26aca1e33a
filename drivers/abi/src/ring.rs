//! The shared ring: where its header is, and arithmetic on its free-running indices.
//!
//! ```text
//!   0         4          8         12         16        64                  4096
//!   +---------+----------+---------+----------+---------+----------------------+
//!   |req_prod |req_event |rsp_prod |rsp_event | padding | entries, 2^n of them |
//!   +---------+----------+---------+----------+---------+----------------------+
//! ```
//!
//! Indices are u32, wrap at 2^32 and are never reduced to the ring's size; entry `i` lives in slot `i mod entries`.
//! Each slot holds a request until the back end writes a response over it. Each of the four numbers is written by one
//! side: `req_prod` and `rsp_event` by the front end, `rsp_prod` and `req_event` by the back end. A fresh ring has
//! both producers at 0 and both events at 1.

/// Byte offset of the index after the last request, written by the front end.
pub const REQ_PROD: usize = 0;
/// Byte offset of the request index at which the back end wants an event, written by the back end.
pub const REQ_EVENT: usize = 4;
/// Byte offset of the index after the last response, written by the back end.
pub const RSP_PROD: usize = 8;
/// Byte offset of the response index at which the front end wants an event, written by the front end.
pub const RSP_EVENT: usize = 12;
/// Byte offset of the first entry.
pub const HEADER_BYTES: usize = 64;

/// How many entries lie between a consumer at `cons` and a producer at `prod`. More than the ring has means that one
/// of the two indices is wrong.
pub const fn unconsumed(prod: u32, cons: u32) -> u32 {
    prod.wrapping_sub(cons)
}

/// Whether a ring of `entries` has no free slot between a producer at `prod` and the responses consumed up to `cons`.
pub const fn full(prod: u32, cons: u32, entries: u32) -> bool {
    unconsumed(prod, cons) >= entries
}

/// Whether moving a producer from `old` to `new` passes the index `event` at which the other side asked to be woken:
/// some `i` in `old < i <= new` equals `event`.
pub const fn needs_notify(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn indices_wrap() {
        assert_eq!(unconsumed(2, u32::MAX - 1), 4);
        assert!(full(31, u32::MAX, 32));
        assert!(!full(30, u32::MAX, 32));
    }

    #[test]
    fn an_unchanged_producer_wakes_nobody() {
        assert!(!needs_notify(7, 7, 7));
        assert!(needs_notify(0, 1, 1), "a fresh ring asks for the first entry");
        assert!(!needs_notify(1, 2, 1), "passed before");
        assert!(needs_notify(u32::MAX, 1, 0));
    }

    proptest! {
        #[test]
        fn notify_is_exactly_for_an_event_in_the_published_span(old: u32, step in 0_u32..64, event_from_old in -80_i64..80) {
            let event = old.wrapping_add(event_from_old as u32);
            let passed = (1..=i64::from(step)).contains(&event_from_old);
            prop_assert_eq!(needs_notify(old, old.wrapping_add(step), event), passed);
        }
    }
}
