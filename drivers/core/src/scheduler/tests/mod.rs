mod random;

use super::*;
use crate::testing::{Outcome, Pool, Script, Step, read, write};
use tap_host::{Event, SectorRange, copy_to_slice};

struct Bench {
    pool: Pool,
    script: Script,
    scheduler: Scheduler<Pool>,
}

impl Bench {
    fn new(script: Script, limits: SchedulerLimits) -> Self {
        let pool = Pool::new();
        let scheduler = Scheduler::new(pool.clone(), Rc::new(script.clone()), limits);
        Self { pool, script, scheduler }
    }

    /// Submits all requests in one turn.
    fn batch(&self, requests: Vec<Request>) -> Vec<Outcome<Response>> {
        let gate = Rc::new(crate::wait::Event::new());
        let started = requests.into_iter().map(|request| {
            let (future, gate) = (self.scheduler.submit(request), Rc::clone(&gate));
            self.pool.start(async move {
                gate.wait().await;
                future.await
            })
        });
        let started = started.collect();
        gate.set();
        self.pool.run();
        started
    }

    fn lower(&self) -> Vec<(Op, u64, u32)> {
        self.script.seen().iter().map(|(op, r)| (*op, r.start.0, r.count)).collect()
    }

    fn assert_idle(&self) {
        assert!(self.scheduler.0.line.borrow().is_idle(self.scheduler.0.limits.depth));
        assert!(self.scheduler.0.tracker.is_empty());
    }
}

fn results(outcomes: &[Outcome<Response>]) -> Vec<Option<Result<(), Errno>>> {
    outcomes.iter().map(|o| o.get().as_ref().map(|r| r.result)).collect()
}

const FEW: SchedulerLimits =
    SchedulerLimits { depth: 4, merge_sectors: 64, retries: 3, backoff_ns: 10, backoff_total_ns: 1000 };

#[test]
fn contiguous_requests_merge_both_ways_and_get_their_own_bytes() {
    let bench = Bench::new(Script::default(), FEW);
    let got = bench.batch(vec![read(16, 8), read(24, 8), read(8, 8), write(32, 8), read(100, 1)]);
    assert_eq!(bench.lower(), [(Op::Read, 8, 24), (Op::Write, 32, 8), (Op::Read, 100, 1)]);
    for (outcome, first) in got.iter().zip([16_u8, 24, 8]) {
        let response = outcome.take().unwrap();
        assert_eq!((response.result, response.bufs.len()), (Ok(()), 1));
        let mut bytes = [0; 8 * 512];
        copy_to_slice(&response.bufs, 0, &mut bytes);
        assert!(bytes.chunks(512).zip(first..).all(|(s, n)| s.iter().all(|b| *b == n)));
    }
    assert_eq!(bench.pool.marked("requests-merged"), 1);
    assert!(bench.pool.logged().contains(&Event::Merged { parts: 3, range: SectorRange::new(8, 24) }));
    let stats = bench.scheduler.stats();
    assert_eq!((stats.reads, stats.writes, stats.merged, stats.lower_requests), (4, 1, 2, 3));
    assert_eq!((stats.sectors_read, stats.sectors_written), (25, 8));
    bench.assert_idle();
}

#[test]
fn requests_with_and_without_fua_do_not_merge() {
    let bench = Bench::new(Script::default(), FEW);
    let durable = |start| write(start, 8).with_fua(true);
    let got = bench.batch(vec![write(0, 8), durable(8), durable(16), write(24, 8)]);
    assert_eq!(bench.lower(), [(Op::Write, 0, 8), (Op::Write, 8, 16), (Op::Write, 24, 8)]);
    assert_eq!(results(&got), [Some(Ok(())); 4]);
    assert_eq!(bench.script.durable(), [SectorRange::new(8, 16)]);
    let refused = bench.batch(vec![read(0, 1).with_fua(true), Request::flush().with_fua(true)]);
    assert_eq!(results(&refused), [Some(Err(Errno::EINVAL)); 2]);
    bench.assert_idle();
}

#[test]
fn merging_stops_at_its_limit_and_can_be_turned_off() {
    let bench = Bench::new(Script::default(), SchedulerLimits { merge_sectors: 16, ..FEW });
    bench.batch(vec![write(0, 8), write(8, 8), write(16, 8)]);
    assert_eq!(bench.lower(), [(Op::Write, 0, 16), (Op::Write, 16, 8)]);
    let bench = Bench::new(Script::default(), SchedulerLimits { merge_sectors: 0, ..FEW });
    bench.batch(vec![write(0, 8), write(8, 8)]);
    assert_eq!(bench.lower().len(), 2);
}

#[test]
fn an_error_of_a_merged_request_reaches_only_the_failing_part() {
    let bench = Bench::new(Script::default(), FEW);
    bench.script.break_sector(9);
    let got = bench.batch(vec![write(0, 8), write(8, 8), write(16, 8)]);
    assert_eq!(results(&got), [Some(Ok(())), Some(Err(Errno::EIO)), Some(Ok(()))]);
    assert_eq!(bench.pool.marked("merged-split"), 1);
    assert_eq!(bench.lower().len(), 4);
    bench.assert_idle();
}

#[test]
fn the_seeded_bug_loses_the_error_of_the_tail() {
    let bench = Bench::new(Script::default(), FEW);
    bench.pool.switch_on("merged-error-lost");
    bench.script.break_sector(9);
    let got = bench.batch(vec![write(0, 8), write(8, 8)]);
    assert_eq!(results(&got), [Some(Err(Errno::EIO)), Some(Ok(()))]);
}

#[test]
fn overlapping_requests_run_in_submission_order_and_reads_share() {
    let bench = Bench::new(Script::held(), SchedulerLimits { merge_sectors: 0, ..FEW });
    let got = bench.batch(vec![write(0, 8), read(4, 2), read(4, 4), write(6, 8)]);
    assert_eq!(bench.lower(), [(Op::Write, 0, 8)]);
    let waits: Vec<String> = bench.scheduler.waits().iter().map(ToString::to_string).collect();
    let wanted = [
        "read 4 waits for write 0",
        "read 4 waits for write 0",
        "write 6 waits for read 4, read 4",
        "write 0 waits for the node below",
    ];
    assert!(waits[..2] == wanted[..2] && waits[3] == wanted[3], "{waits:?}");
    bench.script.release_now();
    bench.pool.run();
    assert_eq!(bench.lower()[1..], [(Op::Read, 4, 2), (Op::Read, 4, 4)]);
    bench.script.release();
    bench.pool.run();
    assert_eq!(bench.lower()[3], (Op::Write, 6, 8));
    assert!(results(&got).iter().all(|r| *r == Some(Ok(()))));
    assert_eq!(bench.pool.marked("overlap-waited"), 3);
    bench.assert_idle();
}

#[test]
fn the_seeded_bug_lets_a_write_overtake_another() {
    let bench = Bench::new(Script::held(), FEW);
    bench.pool.switch_on("edge-dropped");
    bench.batch(vec![write(0, 8), write(4, 8)]);
    assert_eq!(bench.lower().len(), 2);
}

#[test]
fn depth_is_never_exceeded_and_waiters_go_in_order() {
    let bench = Bench::new(Script::held(), SchedulerLimits { depth: 1, ..FEW });
    let got = bench.batch((0..4).map(|i| write(i * 20, 1)).collect());
    let waits: Vec<String> = bench.scheduler.waits().iter().map(ToString::to_string).collect();
    assert_eq!(waits[0], "write 20 waits for one of the 1 places below, which are all taken");
    assert_eq!((waits.len(), waits[3].as_str()), (4, "write 0 waits for the node below"));
    for done in 1..=4 {
        assert_eq!(bench.lower().len(), done);
        bench.script.release_now();
        bench.pool.run();
        assert!(got[..done].iter().all(|g| g.get().is_some()));
    }
    assert_eq!(bench.lower().iter().map(|l| l.1).collect::<Vec<_>>(), [0, 20, 40, 60]);
    assert_eq!(bench.script.max_in_flight(), 1);
    assert_eq!(bench.pool.marked("depth-reached"), 3);
    bench.assert_idle();
}

#[test]
fn a_depth_of_nothing_is_a_depth_of_one() {
    let bench = Bench::new(Script::default(), SchedulerLimits { depth: 0, merge_sectors: 0, ..FEW });
    let got = bench.batch(vec![write(0, 1), write(20, 1)]);
    assert_eq!(results(&got), [Some(Ok(())), Some(Ok(()))]);
    assert_eq!(bench.script.max_in_flight(), 1);
}

#[test]
fn transient_errors_are_retried_and_permanent_ones_are_not() {
    let bench = Bench::new(Script::default(), FEW);
    bench.script.answer((0, 1), &[Step::Fail(Errno::EAGAIN), Step::Fail(Errno::ENOMEM), Step::Ok]);
    bench.script.answer((50, 1), &[Step::Fail(Errno::ENOSPC), Step::Ok]);
    bench.script.answer((90, 1), &[Step::Fail(Errno::EBUSY); 9]);
    let got = bench.batch(vec![write(0, 1), write(50, 1), write(90, 1)]);
    assert_eq!(results(&got), [None, Some(Err(Errno::ENOSPC)), None]);
    bench.pool.run_through_time();
    assert_eq!(results(&got)[0], Some(Ok(())));
    assert_eq!(results(&got)[2], Some(Err(Errno::EBUSY)));
    assert_eq!(bench.pool.now_ns(), 10 + 20 + 40);
    assert_eq!(bench.pool.marked("request-retried"), 2 + 3);
    bench.assert_idle();
}

#[test]
fn extent_queries_are_retried_after_the_same_pauses() {
    let bench = Bench::new(Script::default(), FEW);
    bench.script.answer((0, 1), &[Step::Fail(Errno::EAGAIN), Step::Fail(Errno::ENOMEM), Step::Ok]);
    bench.script.answer((90, 1), &[Step::Fail(Errno::EBUSY); 9]);
    let query = |at| bench.pool.start(bench.scheduler.extents(SectorRange::new(at, 1), 1));
    let (passing, lasting) = (query(0), query(90));
    bench.pool.run_through_time();
    assert_eq!(passing.take().unwrap().unwrap().len(), 1);
    assert_eq!(lasting.take().unwrap().unwrap_err(), Errno::EBUSY);
    assert_eq!(bench.pool.now_ns(), 10 + 20 + 40);
}

#[test]
fn the_sum_of_the_pauses_of_a_request_is_bounded() {
    let bench = Bench::new(Script::default(), SchedulerLimits { retries: 50, backoff_total_ns: 70, ..FEW });
    bench.script.answer((0, 1), &[Step::Fail(Errno::EINTR); 60]);
    let got = bench.batch(vec![read(0, 1)]);
    bench.pool.run_through_time();
    assert_eq!(results(&got), [Some(Err(Errno::EINTR))]);
    assert_eq!(bench.pool.now_ns(), 70);
}

#[test]
fn a_flush_overtakes_what_is_in_flight() {
    let bench = Bench::new(Script::held(), SchedulerLimits { depth: 1, ..FEW });
    bench.batch(vec![write(0, 8), write(20, 8), Request::flush()]);
    assert_eq!(bench.lower().iter().map(|l| l.0).collect::<Vec<_>>(), [Op::Flush, Op::Write]);
}

#[test]
fn bad_requests_are_refused() {
    let bench = Bench::new(Script::default(), FEW);
    let empty = Request::read(SectorRange::new(0, 0), Default::default());
    let short =
        Request { op: Op::Read, range: SectorRange::new(0, 2), bufs: crate::testing::sectors(1), fua: false };
    let refused = bench.batch(vec![read(1000, 1), read(999, 2), read(u64::MAX, 1), empty, short]);
    assert!(results(&refused).iter().all(|r| *r == Some(Err(Errno::EINVAL))));
    bench.script.make_read_only();
    assert_eq!(results(&bench.batch(vec![write(0, 1)])), [Some(Err(Errno::EROFS))]);
    assert!(bench.lower().is_empty());
    assert_eq!(bench.scheduler.stats().errors, 6);
}

/// A node that panics.
struct Panics;

impl Node for Panics {
    fn submit(&self, _: Request) -> crate::LocalBoxFuture<Response> {
        Box::pin(async { panic!("a broken node") })
    }
    fn info(&self) -> crate::NodeInfo {
        crate::NodeInfo::new(1 << 20, false)
    }
    fn close(&self) -> crate::LocalBoxFuture<Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
}

#[test]
fn unwinding_from_a_panic_below_does_not_panic_again() {
    let pool = Pool::new();
    let scheduler = Scheduler::new(pool.clone(), Rc::new(Panics), SchedulerLimits::default());
    // Merged: the leader drives the requests of the others.
    let started: Vec<_> = (0..4).map(|i| pool.defer(scheduler.submit(write(i * 8, 8)))).collect();
    let run = std::panic::AssertUnwindSafe(|| pool.run());
    let panic = std::panic::catch_unwind(run).expect_err("the node panics");
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"a broken node"));
    // A second panic in one of these drops would abort the process.
    drop((started, scheduler, pool));
}
