use super::*;
use crate::testing::{Outcome, Pool, Script, read, write};
use crate::wait::{Sender, oneshot};
use crate::{KindMeasures, Op, Scheduler, SchedulerLimits};
use tap_host::{IoKind, Whereabouts};

fn slot(pool: &Pool, script: &Script) -> Slot<Pool> {
    Slot::new(pool.clone(), VbdId(1), Rc::new(script.clone()))
}

fn pause(pool: &Pool, slot: &Slot<Pool>) -> Outcome<Result<(), Errno>> {
    let slot = slot.clone();
    pool.start(async move { slot.pause().await })
}

fn states(pool: &Pool) -> Vec<&'static str> {
    let state = |e: &Event| match e {
        Event::VbdState { state, .. } => Some(*state),
        _ => None,
    };
    pool.logged().iter().filter_map(state).collect()
}

#[test]
fn pause_drains_and_resume_admits_waiters_in_order() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    let before = pool.start(slot.submit(write(1, 1)));
    let paused = pause(&pool, &slot);
    let waiting: Vec<_> = (2..5).map(|i| pool.start(slot.submit(write(i, 1)))).collect();
    assert!(paused.get().is_none() && slot.in_flight() == 1);
    script.release();
    pool.run();
    assert_eq!(paused.take(), Some(Ok(())));
    assert!(before.get().is_some() && waiting.iter().all(|w| w.get().is_none()));
    assert_eq!(script.seen().len(), 1, "nothing goes down while paused");

    slot.resume().unwrap();
    // Arrives after the resume, but before the waiters were polled.
    let late = pool.start(slot.submit(read(9, 1)));
    assert!(late.get().is_some() && waiting.iter().all(|w| w.get().is_some()));
    let order: Vec<u64> = script.seen().iter().map(|s| s.1.start.0).collect();
    assert_eq!(order, [1, 2, 3, 4, 9]);
    assert_eq!(states(&pool), ["running", "draining", "paused", "running"]);
}

#[test]
fn resume_cancels_a_pause_that_is_still_draining() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    let request = pool.start(slot.submit(write(1, 1)));
    let paused = pause(&pool, &slot);
    slot.resume().unwrap();
    pool.run();
    assert_eq!(paused.take(), Some(Err(Errno::EINTR)));
    // A pause completes even if its future is dropped.
    let dropped = pause(&pool, &slot);
    pool.cancel(dropped.task);
    script.release();
    pool.run();
    assert!(request.get().is_some());
    assert_eq!(states(&pool).last(), Some(&"paused"));
}

#[test]
fn a_close_that_is_given_up_before_it_closes_anything_can_be_made_again() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    let running = pool.start(slot.submit(write(1, 1)));
    let given_up = pool.start(slot.close());
    pool.cancel(given_up.task);
    script.release();
    pool.run();
    assert!(running.get().is_some() && script.times_closed() == 0);
    assert_eq!(pool.start(slot.close()).take(), Some(Ok(())));
    assert_eq!(script.times_closed(), 1);
}

#[test]
fn close_refuses_waiters_drains_and_closes_the_lower_node_once() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    let running = pool.start(slot.submit(write(1, 1)));
    let paused = pause(&pool, &slot);
    let waiting = pool.start(slot.submit(write(2, 1)));
    let closes = [pool.start(slot.close()), pool.start(slot.close())];
    let late = pool.start(slot.submit(write(3, 1)));
    assert_eq!(waiting.take().unwrap().result, Err(Errno::ESHUTDOWN));
    assert_eq!(late.take().unwrap().result, Err(Errno::ESHUTDOWN));
    assert_eq!(paused.take(), Some(Err(Errno::ESHUTDOWN)));
    assert!(closes.iter().all(|c| c.get().is_none()) && script.times_closed() == 0);
    script.release();
    pool.run();
    assert_eq!(running.take().unwrap().result, Ok(()));
    assert!(closes.iter().all(|c| c.take() == Some(Ok(()))));
    assert_eq!(script.times_closed(), 1);
    assert_eq!(slot.resume(), Err(Errno::ESHUTDOWN));
}

#[test]
fn a_dropped_request_counts_until_it_ends_and_a_dropped_waiter_leaves() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    let stuck = pool.start(slot.submit(write(1, 1)));
    let paused = pause(&pool, &slot);
    let waiting: Vec<_> = (2..5).map(|i| pool.start(slot.submit(write(i, 1)))).collect();
    pool.cancel(stuck.task);
    pool.run();
    assert!(paused.get().is_none() && slot.in_flight() == 1, "its effect may still happen");
    pool.cancel(waiting[0].task);
    script.release();
    pool.run();
    assert_eq!(paused.take(), Some(Ok(())));
    slot.resume().unwrap();
    pool.run();
    assert!(waiting[1..].iter().all(|w| w.get().is_some()));
    assert_eq!(slot.in_flight(), 0);
}

#[test]
fn a_dropped_query_ends_below_before_the_node_is_closed() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    let query = pool.start(slot.extents(SectorRange::new(0, 8), 1));
    pool.cancel(query.task);
    pool.run();
    assert_eq!(slot.in_flight(), 1);
    let closed = pool.start(slot.close());
    assert!(closed.get().is_none() && script.times_closed() == 0);
    script.release();
    pool.run();
    assert_eq!((closed.take(), slot.in_flight(), script.times_closed()), (Some(Ok(())), 0, 1));
}

#[test]
fn a_slot_over_a_scheduler_answers() {
    let (pool, script) = (Pool::new(), Script::default());
    let scheduler = Scheduler::new(pool.clone(), Rc::new(script.clone()), SchedulerLimits::default());
    let slot = Slot::new(pool.clone(), VbdId(1), Rc::new(scheduler));
    let answers = [read(0, 8), write(8, 8), Request::flush()].map(|r| pool.start(slot.submit(r)));
    assert!(answers.iter().all(|a| a.take().unwrap().result == Ok(())));
    assert!(script.seen().iter().any(|s| s.0 == Op::Flush));
    assert_eq!(pool.start(slot.close()).take(), Some(Ok(())));
}

/// Exchanges the node of `slot` for `next`, or fails with the error of `next`.
fn exchange(
    pool: &Pool,
    slot: &Slot<Pool>,
    next: Result<&Script, Errno>,
) -> Outcome<Result<usize, ExchangeError<Errno>>> {
    let (slot, next) = (slot.clone(), next.cloned());
    pool.start(async move {
        let mut calls = 0;
        let change = async |_| {
            calls += 1;
            next.map(|script| Rc::new(script) as Rc<dyn Node>)
        };
        slot.exchange(change).await.map(|_| calls)
    })
}

/// Exchanges the node of `slot` for `next` once the sender sends.
fn slow_exchange(
    pool: &Pool,
    slot: &Slot<Pool>,
    next: &Script,
) -> (Sender<()>, Outcome<Result<(), ExchangeError<Errno>>>) {
    let (go, ready) = oneshot();
    let (slot, next) = (slot.clone(), next.clone());
    let done = pool.start(async move {
        let change = async |_| {
            let _ = ready.await;
            Ok(Rc::new(next) as Rc<dyn Node>)
        };
        slot.exchange(change).await.map(drop)
    });
    (go, done)
}

#[test]
fn an_exchange_drains_and_flushes_the_old_node_and_sends_waiters_to_the_new_one_in_order() {
    let (pool, old, new) = (Pool::new(), Script::held(), Script::default());
    let slot = slot(&pool, &old);
    let before = pool.start(slot.submit(write(1, 1)));
    let done = exchange(&pool, &slot, Ok(&new));
    let waiting: Vec<_> = (2..5).map(|i| pool.start(slot.submit(write(i, 1)))).collect();
    let query = pool.start(slot.extents(SectorRange::new(0, 8), 1));
    assert!(done.get().is_none() && query.get().is_none(), "an extent query waits like a request");
    old.release_now();
    pool.run();
    assert!(before.get().is_some() && done.get().is_none(), "the flush is not answered");
    assert_eq!(old.seen().last().map(|s| s.0), Some(Op::Flush));
    old.release();
    pool.run();
    assert_eq!(done.take(), Some(Ok(1)));
    assert!(waiting.iter().all(|w| w.take().unwrap().result == Ok(())) && query.get().is_some());
    assert_eq!(old.seen().len(), 2, "nothing more reaches the old node");
    assert_eq!(new.seen().iter().map(|s| s.1.start.0).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(states(&pool), ["running", "draining", "paused", "running"]);
    assert_eq!(pool.start(slot.close()).take(), Some(Ok(())));
    assert_eq!((old.times_closed(), new.times_closed()), (0, 1));
    assert_eq!(exchange(&pool, &slot, Ok(&old)).take(), Some(Err(ExchangeError::Closed)));
}

#[test]
fn a_failed_or_dropped_exchange_leaves_the_old_node() {
    let (pool, old, new) = (Pool::new(), Script::default(), Script::default());
    let slot = slot(&pool, &old);
    let failed = exchange(&pool, &slot, Err(Errno::ENOSPC));
    assert_eq!(failed.take(), Some(Err(ExchangeError::Change(Errno::ENOSPC))));
    old.answer((0, 0), &[crate::testing::Step::Fail(Errno::EIO)]);
    let unflushed = exchange(&pool, &slot, Ok(&new));
    assert_eq!(unflushed.take(), Some(Err(ExchangeError::Flush(Errno::EIO))));
    let endless = {
        let slot = slot.clone();
        pool.start(async move {
            let change = async |_| std::future::pending::<Result<Rc<dyn Node>, Errno>>().await;
            slot.exchange(change).await.map(drop)
        })
    };
    let waits = pool.start(slot.submit(write(1, 1)));
    assert!(waits.get().is_none());
    pool.cancel(endless.task);
    pool.run();
    assert!(waits.get().is_some() && slot.state() == "running");
    assert!(new.seen().is_empty());
}

#[test]
fn an_exchange_that_is_dropped_ends_with_its_flush() {
    let (pool, old) = (Pool::new(), Script::held());
    let slot = slot(&pool, &old);
    let dropped = exchange(&pool, &slot, Ok(&Script::default()));
    assert_eq!(old.seen().last().map(|s| s.0), Some(Op::Flush));
    pool.cancel(dropped.task);
    let request = pool.start(slot.submit(write(1, 1)));
    let paused = pause(&pool, &slot);
    assert!(paused.get().is_none(), "the flush is in flight");
    assert_eq!(old.seen().len(), 1, "the request waits for it");
    slot.resume().unwrap();
    pool.run();
    assert_eq!(paused.take(), Some(Err(Errno::EINTR)));
    let closed = pool.start(slot.close());
    assert_eq!(request.take().unwrap().result, Err(Errno::ESHUTDOWN));
    assert!(closed.get().is_none() && old.times_closed() == 0, "the flush is in flight");
    old.release();
    pool.run();
    assert_eq!((closed.take(), old.times_closed(), old.seen().len()), (Some(Ok(())), 1, 1));
}

#[test]
fn a_paused_slot_stays_paused_after_an_exchange_and_resume_waits_for_one() {
    let (pool, old, new) = (Pool::new(), Script::default(), Script::default());
    let slot = slot(&pool, &old);
    assert_eq!(pause(&pool, &slot).take(), Some(Ok(())));
    assert_eq!(exchange(&pool, &slot, Ok(&new)).take(), Some(Ok(1)));
    let waits = pool.start(slot.submit(write(1, 1)));
    assert!(waits.get().is_none() && slot.state() == "paused");
    slot.resume().unwrap();
    pool.run();
    assert!(waits.get().is_some());

    // Resumed while an exchange drains: the slot runs once the exchange has ended.
    new.hold();
    let running = pool.start(slot.submit(write(2, 1)));
    let (paused, done) = (pause(&pool, &slot), exchange(&pool, &slot, Ok(&old)));
    slot.resume().unwrap();
    pool.run();
    assert_eq!(paused.take(), Some(Err(Errno::EINTR)));
    assert!(done.get().is_none() && slot.state() == "draining");
    new.release();
    pool.run();
    assert!(running.get().is_some() && done.take() == Some(Ok(1)) && slot.state() == "running");
}

#[test]
fn a_close_waits_for_an_exchange_and_closes_the_new_node() {
    let (pool, old, new) = (Pool::new(), Script::default(), Script::default());
    let slot = slot(&pool, &old);
    let (go, done) = slow_exchange(&pool, &slot, &new);
    let closed = pool.start(slot.close());
    let drained = exchange(&pool, &slot, Ok(&old));
    assert!(done.get().is_none() && closed.get().is_none());
    go.send(()).unwrap();
    pool.run();
    assert_eq!((done.take(), closed.take()), (Some(Ok(())), Some(Ok(()))));
    assert_eq!((old.times_closed(), new.times_closed()), (0, 1));
    assert_eq!(drained.take(), Some(Err(ExchangeError::Closed)));
}

#[test]
fn a_pause_during_an_exchange_completes_after_it() {
    let (pool, old, new) = (Pool::new(), Script::default(), Script::default());
    let slot = slot(&pool, &old);
    let (go, done) = slow_exchange(&pool, &slot, &new);
    let paused = pause(&pool, &slot);
    assert!(paused.get().is_none(), "the exchange still does I/O");
    go.send(()).unwrap();
    pool.run();
    assert_eq!((done.take(), paused.take()), (Some(Ok(())), Some(Ok(()))));
    assert_eq!(slot.state(), "paused");
}

#[test]
fn requests_are_measured_from_their_arrival_to_their_answer() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    let of = |kind| *slot.measures().of(kind);
    let first = pool.start(slot.submit(write(1, 3)));
    assert_eq!((of(IoKind::Write).in_flight, of(IoKind::Write).latency.count()), (1, 0));
    pool.pass(2_000);
    // Whose caller leaves is measured when it ends; who leaves while it waits, not at all.
    let (given_up, paused) = (pool.start(slot.submit(read(5, 2))), pause(&pool, &slot));
    let (waits, leaves) = (pool.start(slot.submit(write(9, 1))), pool.start(slot.submit(Request::flush())));
    pool.cancel(given_up.task);
    pool.cancel(leaves.task);
    script.release();
    pool.run();
    assert!(first.get().is_some() && paused.get().is_some() && waits.get().is_none());
    assert_eq!((of(IoKind::Read).latency.count(), of(IoKind::Read).sectors), (1, 2));
    assert_eq!(of(IoKind::Flush), KindMeasures::default());
    let writes = of(IoKind::Write);
    assert_eq!(
        (writes.in_flight, writes.latency.count(), writes.latency.max_ns, writes.sectors),
        (1, 1, 2_000, 3)
    );
    pool.pass(5_000_000_000);
    slot.resume().unwrap();
    pool.run();
    let writes = of(IoKind::Write);
    assert_eq!(
        (writes.in_flight, writes.latency.max_ns, writes.latency.sum_ns),
        (0, 5_000_000_000, 5_000_002_000)
    );
    assert_eq!(pool.start(slot.close()).take(), Some(Ok(())));
    assert!(pool.start(slot.submit(read(5, 2))).get().is_some());
    let reads = of(IoKind::Read);
    assert_eq!((reads.latency.count(), reads.sectors, reads.errors, reads.in_flight), (2, 2, 1, 0));
}

#[test]
fn a_request_that_takes_long_is_said_once_with_its_place_and_at_its_end() {
    let (pool, script) = (Pool::new(), Script::held());
    let limits = SchedulerLimits { depth: 1, ..SchedulerLimits::default() };
    let own = Scheduler::new(pool.clone(), Rc::new(script.clone()), limits);
    let slot = Slot::new(pool.clone(), VbdId(1), Rc::new(own));
    slot.watch(1_000_000_000);
    let said = || {
        let of = |event: &Event| match *event {
            Event::RequestHangs { kind, range, for_ms, at, .. } => {
                Some((kind, range.start.0, for_ms, Some(at)))
            }
            Event::RequestHung { kind, range, for_ms, .. } => Some((kind, range.start.0, for_ms, None)),
            _ => None,
        };
        pool.logged().iter().filter_map(of).collect::<Vec<_>>()
    };
    // One after the other goes down, is behind it, is in line, and comes when the disk is to be paused.
    let first = pool.start(slot.submit(write(1, 4)));
    let behind = pool.start(slot.submit(write(2, 1)));
    pool.pass(500_000_000);
    let in_line = pool.start(slot.submit(read(50, 1)));
    let paused = pause(&pool, &slot);
    let held = pool.start(slot.submit(Request::flush()));
    assert!(said().is_empty());
    pool.pass(5_000_000_000);
    let place = Whereabouts::Behind { what: "write", sector: 1 };
    let hang = [
        (IoKind::Write, 1, 1000, Some(Whereabouts::Image)),
        (IoKind::Write, 2, 1000, Some(place)),
        (IoKind::Read, 50, 1000, Some(Whereabouts::Line)),
        (IoKind::Flush, 0, 1000, Some(Whereabouts::Paused)),
    ];
    assert_eq!(said(), hang, "once each");
    script.release();
    pool.run();
    assert!(
        first.get().is_some() && behind.get().is_some() && in_line.get().is_some() && paused.get().is_some()
    );
    slot.resume().unwrap();
    pool.run();
    assert!(held.get().is_some());
    let mut ends: Vec<_> = said().split_off(4);
    ends.sort_unstable();
    let ended = |kind, sector, for_ms| (kind, sector, for_ms, None);
    let expected = [
        ended(IoKind::Read, 50, 5000),
        ended(IoKind::Write, 1, 5500),
        ended(IoKind::Write, 2, 5500),
        ended(IoKind::Flush, 0, 5000),
    ];
    assert_eq!(ends, expected);
    // With nothing open it ends, and begins again with the next request.
    pool.run_through_time();
    script.hold();
    let next = pool.start(slot.submit(write(7, 1)));
    pool.pass(1_500_000_000);
    assert_eq!(said().len(), 9);
    script.release();
    pool.run();
    assert!(next.get().is_some());
    assert_eq!(pool.start(slot.close()).take(), Some(Ok(())));
    pool.run_through_time();
    assert_eq!(said().len(), 10);
}

#[test]
fn requests_that_are_answered_in_time_are_not_mentioned_and_nothing_is_watched_after_a_close() {
    let (pool, script) = (Pool::new(), Script::held());
    let slot = slot(&pool, &script);
    slot.watch(1_000_000_000);
    for _ in 0..10 {
        script.hold();
        let request = pool.start(slot.submit(write(1, 1)));
        pool.pass(900_000_000);
        script.release();
        pool.run();
        assert!(request.get().is_some());
    }
    assert!(!pool.logged().iter().any(|event| matches!(event, Event::RequestHangs { .. })));
    assert_eq!(pool.start(slot.close()).take(), Some(Ok(())));
    pool.run();
    assert_eq!(pool.tasks(), 0);
}
