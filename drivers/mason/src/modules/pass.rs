//! `delay` and `throttle`: what lets requests through unchanged, later.
//!
//! ```text
//!   request ──► when? ──► sleep until then ──► the disk below
//! ```
//!
//! When a request may go is known as soon as it arrives, and it takes its place in time then. So nobody waits for
//! another request's end, there is no queue, and nothing can be forgotten in it. A flush is never held up.
//!
//! A throttle's place in time is that of the generic cell rate algorithm (ITU-T I.371): a request of `n` bytes moves
//! the time at which the bucket is full again by `n / rate`, and goes when that is at most `burst / rate` away.

use crate::graph::signature::{Arity, Below, Keeps, Need, Param, Params, Port, Signature};
use crate::graph::value::{Type, Value};
use std::cell::Cell;
use std::rc::Rc;
use tap_core::{Child, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response};
use tap_host::{Errno, SectorRange};
use tap_images::ImageHost;

tap_host::listed! {
    pub(crate) BUGS: Bug;
    THROTTLE_FORGETS = "throttle-forgets", "a request that a throttle held up for a second and more is not passed on";
}

tap_host::listed! {
    pub(crate) MARKS: Mark;
    THROTTLED = "throttled", "a throttle held a request up";
}

fn lower() -> Vec<Port> {
    vec![Port { name: "lower", arity: Arity::One, need: Need::AsAbove, about: "the disk" }]
}

fn size(_: &Params, below: &[Below]) -> Result<u64, String> {
    Ok(below.first().map_or(0, |lower| lower.size_bytes))
}

/// The longest delay, in nanoseconds: an hour.
const MAX_DELAY_NS: u64 = 3_600_000_000_000;

pub(super) fn delay() -> Signature {
    let time =
        |name, about| Param::new(name, Type::Duration, about).or(Value::Duration(0)).within(0, MAX_DELAY_NS);
    Signature {
        name: "delay",
        about: "lets requests through after a while",
        params: vec![
            time("read", "how long a read is held up"),
            time("write", "how long a write, zeroes or a discard is held up"),
        ],
        ports: lower(),
        writable: true,
        keeps: Keeps::Nothing,
        agree: None,
        size: Some(size),
    }
}

/// The number of the parameter that names a throttle's group.
pub(super) const GROUP: usize = 4;
/// Limits that are no limits, and rates that can be computed with.
const MAX_RATE: u64 = 1 << 40;

pub(super) fn throttle() -> Signature {
    Signature {
        name: "throttle",
        about: "lets through so many bytes and requests a second",
        params: vec![
            Param::new("rate", Type::ByteRate, "bytes a second that are read and written")
                .optional()
                .within(4096, MAX_RATE),
            Param::new("burst", Type::Bytes, "bytes that go at once after a pause")
                .or(Value::Bytes(1 << 20))
                .within(4096, MAX_RATE),
            Param::new("requests", Type::RequestRate, "requests a second").optional().within(1, MAX_RATE),
            Param::new("request_burst", Type::Count, "requests that go at once after a pause")
                .or(Value::Count(32))
                .within(1, 1 << 20),
            Param::new("group", Type::Text, "throttles of one group share one limit").optional(),
        ],
        ports: lower(),
        writable: true,
        keeps: Keeps::Passing,
        agree: Some(GROUP),
        size: Some(size),
    }
}

/// A limit of so many units a second.
struct Bucket {
    rate: u64,
    /// How far the time at which it is full again may be away, in nanoseconds.
    burst_ns: u64,
    /// When it is full again.
    full_at_ns: Cell<u64>,
}

const SECOND_NS: u128 = 1_000_000_000;

impl Bucket {
    fn new(rate: u64, burst: u64) -> Self {
        Self { rate, burst_ns: time_of(burst, rate), full_at_ns: Cell::new(0) }
    }

    /// When a request of `units` that arrives at `now_ns` may go.
    fn take(&self, now_ns: u64, units: u64) -> u64 {
        let full_at_ns = self.full_at_ns.get().max(now_ns);
        self.full_at_ns.set(full_at_ns.saturating_add(time_of(units, self.rate)));
        full_at_ns.saturating_sub(self.burst_ns).max(now_ns)
    }
}

/// How long `units` take at `rate` a second, in nanoseconds.
fn time_of(units: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(units) * SECOND_NS / u128::from(rate)).unwrap_or(u64::MAX)
}

/// The limits of a throttle; several throttles may share them.
pub struct Limits {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl Limits {
    /// The limits that the parameters of a throttle say.
    pub(super) fn new(params: &Params) -> Self {
        Self {
            bytes: params.optional_number(0).map(|rate| Bucket::new(rate, params.number(1))),
            requests: params.optional_number(2).map(|rate| Bucket::new(rate, params.number(3))),
        }
    }

    /// When a request of `bytes` that arrives at `now_ns` may go.
    fn take(&self, now_ns: u64, bytes: u64) -> u64 {
        let at = |bucket: &Option<Bucket>, units| bucket.as_ref().map_or(now_ns, |b| b.take(now_ns, units));
        at(&self.bytes, bytes).max(at(&self.requests, 1))
    }
}

/// When a request may go.
#[derive(Clone)]
pub enum Pace {
    /// After a time, in nanoseconds: reads, and everything else.
    Delay(u64, u64),
    /// As limits allow.
    Limits(Rc<Limits>),
}

/// Lets requests through, later.
pub struct Pass<H> {
    host: H,
    pace: Pace,
    lower: Rc<dyn Node>,
}

impl<H: ImageHost> Pass<H> {
    /// Lets requests to `lower` through as `pace` says.
    pub fn new(host: H, pace: Pace, lower: Rc<dyn Node>) -> Self {
        Self { host, pace, lower }
    }
}

impl<H: ImageHost> Node for Pass<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let now_ns = self.host.now_ns();
        let at_ns = match (&self.pace, request.op) {
            (_, Op::Flush) => now_ns,
            (Pace::Delay(ns, _), Op::Read) | (Pace::Delay(_, ns), _) => now_ns.saturating_add(*ns),
            (Pace::Limits(limits), op) => {
                limits.take(now_ns, if op.has_data() { request.range.len_bytes() } else { 0 })
            }
        };
        let wait_ns = at_ns.saturating_sub(now_ns);
        if wait_ns == 0 {
            return self.lower.submit(request);
        }
        if let Pace::Limits(_) = self.pace {
            self.host.mark(&THROTTLED);
            if wait_ns >= 1_000_000_000 && self.host.bug(&THROTTLE_FORGETS) {
                return Box::pin(std::future::pending());
            }
        }
        let (host, lower) = (self.host.clone(), Rc::clone(&self.lower));
        Box::pin(async move {
            host.sleep_ns(wait_ns).await;
            lower.submit(request).await
        })
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        self.lower.extents(range, max)
    }

    fn info(&self) -> NodeInfo {
        self.lower.info()
    }

    fn children(&self) -> Vec<Child> {
        vec![Child::lower(Rc::clone(&self.lower))]
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.lower.freeze()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.lower.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_its_rate() {
        let bucket = Bucket::new(1_000, 500);
        // 500 units at once, and those that make it overflow.
        let at: Vec<u64> = (0..5).map(|_| bucket.take(0, 250)).collect();
        assert_eq!(at, [0, 0, 0, 250_000_000, 500_000_000]);
        // After a pause it is full again, and no fuller.
        let late = 10_000_000_000;
        let at: Vec<u64> = (0..4).map(|_| bucket.take(late, 250) - late).collect();
        assert_eq!(at, [0, 0, 0, 250_000_000]);
    }

    #[test]
    fn places_in_time_never_overflow() {
        let (bucket, now) = (Bucket::new(1, 1 << 40), u64::MAX - 1);
        let at: Vec<u64> = (0..3).map(|_| bucket.take(now, u64::MAX)).collect();
        assert!(at.is_sorted() && at[0] == now, "{at:?}");
    }
}
