use super::*;
use crate::testing::{Outcome, Pool, Script, read, write};
use crate::{Op, Scheduler, SchedulerLimits};

fn vbd(pool: &Pool, script: &Script) -> Vbd<Pool> {
    Vbd::new(pool.clone(), VbdId(1), Rc::new(script.clone()))
}

fn pause(pool: &Pool, vbd: &Vbd<Pool>) -> Outcome<Result<(), Errno>> {
    let vbd = vbd.clone();
    pool.start(async move { vbd.pause().await })
}

fn states(pool: &Pool) -> Vec<&'static str> {
    let state = |e: &Event| match e {
        Event::VbdState { state, .. } => Some(*state),
        _ => None,
    };
    pool.logged().iter().filter_map(state).collect()
}

#[test]
fn pause_drains_and_resume_lets_waiters_in_by_order() {
    let (pool, script) = (Pool::new(), Script::held());
    let vbd = vbd(&pool, &script);
    let before = pool.start(vbd.submit(write(1, 1)));
    let paused = pause(&pool, &vbd);
    let waiting: Vec<_> = (2..5).map(|i| pool.start(vbd.submit(write(i, 1)))).collect();
    assert!(paused.get().is_none() && vbd.in_flight() == 1);
    script.release();
    pool.run();
    assert_eq!(paused.take(), Some(Ok(())));
    assert!(before.get().is_some() && waiting.iter().all(|w| w.get().is_none()));
    assert_eq!(script.seen().len(), 1, "nothing goes down while paused");

    vbd.resume().unwrap();
    // Comes after resume, but before those that waited had their turn.
    let late = pool.start(vbd.submit(read(9, 1)));
    assert!(late.get().is_some() && waiting.iter().all(|w| w.get().is_some()));
    let order: Vec<u64> = script.seen().iter().map(|s| s.1.start.0).collect();
    assert_eq!(order, [1, 2, 3, 4, 9]);
    assert_eq!(states(&pool), ["running", "draining", "paused", "running"]);
}

#[test]
fn resume_ends_a_pause_that_was_not_reached() {
    let (pool, script) = (Pool::new(), Script::held());
    let vbd = vbd(&pool, &script);
    let request = pool.start(vbd.submit(write(1, 1)));
    let paused = pause(&pool, &vbd);
    vbd.resume().unwrap();
    pool.run();
    assert_eq!(paused.take(), Some(Err(Errno::EINTR)));
    // A pause that nobody waits for is reached all the same.
    let dropped = pause(&pool, &vbd);
    pool.cancel(dropped.task);
    script.release();
    pool.run();
    assert!(request.get().is_some());
    assert_eq!(states(&pool).last(), Some(&"paused"));
}

#[test]
fn close_refuses_drains_and_closes_below_once() {
    let (pool, script) = (Pool::new(), Script::held());
    let vbd = vbd(&pool, &script);
    let running = pool.start(vbd.submit(write(1, 1)));
    let paused = pause(&pool, &vbd);
    let waiting = pool.start(vbd.submit(write(2, 1)));
    let closes = [pool.start(vbd.close()), pool.start(vbd.close())];
    let late = pool.start(vbd.submit(write(3, 1)));
    assert_eq!(waiting.take().unwrap().result, Err(Errno::ESHUTDOWN));
    assert_eq!(late.take().unwrap().result, Err(Errno::ESHUTDOWN));
    assert_eq!(paused.take(), Some(Err(Errno::ESHUTDOWN)));
    assert!(closes.iter().all(|c| c.get().is_none()) && script.times_closed() == 0);
    script.release();
    pool.run();
    assert_eq!(running.take().unwrap().result, Ok(()));
    assert!(closes.iter().all(|c| c.take() == Some(Ok(()))));
    assert_eq!(script.times_closed(), 1);
    assert_eq!(vbd.resume(), Err(Errno::ESHUTDOWN));
}

#[test]
fn a_request_that_is_given_up_counts_until_it_ends_and_one_that_waits_is_forgotten() {
    let (pool, script) = (Pool::new(), Script::held());
    let vbd = vbd(&pool, &script);
    let stuck = pool.start(vbd.submit(write(1, 1)));
    let paused = pause(&pool, &vbd);
    let waiting: Vec<_> = (2..5).map(|i| pool.start(vbd.submit(write(i, 1)))).collect();
    pool.cancel(stuck.task);
    pool.run();
    assert!(paused.get().is_none() && vbd.in_flight() == 1, "its effect may still come");
    pool.cancel(waiting[0].task);
    script.release();
    pool.run();
    assert_eq!(paused.take(), Some(Ok(())));
    vbd.resume().unwrap();
    pool.run();
    assert!(waiting[1..].iter().all(|w| w.get().is_some()));
    assert_eq!(vbd.in_flight(), 0);
}

#[test]
fn the_whole_stack_answers() {
    let (pool, script) = (Pool::new(), Script::default());
    let scheduler = Scheduler::new(pool.clone(), Rc::new(script.clone()), SchedulerLimits::default());
    let vbd = Vbd::new(pool.clone(), VbdId(1), Rc::new(scheduler));
    let answers = [read(0, 8), write(8, 8), Request::flush()].map(|r| pool.start(vbd.submit(r)));
    assert!(answers.iter().all(|a| a.take().unwrap().result == Ok(())));
    assert!(script.seen().iter().any(|s| s.0 == Op::Flush));
    assert_eq!(pool.start(vbd.close()).take(), Some(Ok(())));
}
