//! Time and tasks.

use crate::{Outcome, Place, Test, holds, same, tests};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use tap_host::{Tasks, Time};

/// What bodies about tasks need from a host.
pub trait TaskHost: Time + Tasks {}
impl<T: Time + Tasks> TaskHost for T {}

/// All bodies.
pub fn all<H: TaskHost>() -> Vec<Test<Place<H>>> {
    tests![
        time_does_not_go_back,
        sleeping_takes_its_time,
        sleepers_wake_in_order,
        a_dropped_sleep_wakes_nobody,
        tasks_begin_in_order_and_not_at_once,
        yielding_lets_every_ready_task_run,
        yielding_tasks_take_turns,
        tasks_of_tasks_run,
        more_tasks_than_a_turn_holds_keep_their_order,
    ]
}

/// Names in the order in which things happened.
#[derive(Clone, Default)]
struct Order(Rc<RefCell<Vec<u32>>>);

impl Order {
    fn note(&self, what: u32) {
        self.0.borrow_mut().push(what);
    }
    fn so_far(&self) -> Vec<u32> {
        self.0.borrow().clone()
    }
}

async fn time_does_not_go_back<H: TaskHost>(place: Place<H>) -> Outcome {
    let mut last = place.host.now_ns();
    for i in 0..1000 {
        if i % 100 == 0 {
            place.host.yield_now().await;
        }
        let now = place.host.now_ns();
        holds("time does not go back", now >= last)?;
        last = now;
    }
    Ok(())
}

async fn sleeping_takes_its_time<H: TaskHost>(place: Place<H>) -> Outcome {
    for ns in [0, 1, 1000, 1_000_000, 5_500_000] {
        let before = place.host.now_ns();
        place.host.sleep_ns(ns).await;
        holds("a sleeper does not wake early", place.host.now_ns() - before >= ns)?;
    }
    Ok(())
}

async fn sleepers_wake_in_order<H: TaskHost>(place: Place<H>) -> Outcome {
    let order = Order::default();
    for ms in [90, 30, 60] {
        let (host, order) = (place.host.clone(), order.clone());
        place.host.spawn("sleeper", u64::from(ms), async move {
            host.sleep_ns(u64::from(ms) * 1_000_000).await;
            order.note(ms);
        });
    }
    while order.so_far().len() < 3 {
        place.host.sleep_ns(10_000_000).await;
    }
    same("order of waking", order.so_far(), vec![30, 60, 90])
}

async fn a_dropped_sleep_wakes_nobody<H: TaskHost>(place: Place<H>) -> Outcome {
    let before = place.host.now_ns();
    let mut sleep = Box::pin(place.host.sleep_ns(u64::MAX / 4));
    std::future::poll_fn(|cx| {
        let pending = sleep.as_mut().poll(cx).is_pending();
        std::task::Poll::Ready(pending)
    })
    .await;
    drop(sleep);
    place.host.sleep_ns(1_000_000).await;
    holds("time advances", place.host.now_ns() > before)
}

async fn tasks_begin_in_order_and_not_at_once<H: TaskHost>(place: Place<H>) -> Outcome {
    let order = Order::default();
    for i in 0..10 {
        let noted = order.clone();
        place.host.spawn("task", u64::from(i), async move { noted.note(i) });
        same("what ran within spawn", order.so_far().len(), 0)?;
    }
    place.host.yield_now().await;
    same("order of beginning", order.so_far(), (0..10).collect())
}

async fn yielding_lets_every_ready_task_run<H: TaskHost>(place: Place<H>) -> Outcome {
    let ran = Rc::new(Cell::new(0));
    for i in 0..200 {
        let ran = Rc::clone(&ran);
        place.host.spawn("task", i, async move { ran.set(ran.get() + 1) });
    }
    place.host.yield_now().await;
    same("tasks that ran", ran.get(), 200)
}

async fn yielding_tasks_take_turns<H: TaskHost>(place: Place<H>) -> Outcome {
    let order = Order::default();
    for i in 0..3 {
        let (host, order) = (place.host.clone(), order.clone());
        place.host.spawn("task", u64::from(i), async move {
            for round in 0..3 {
                order.note(round * 3 + i);
                host.yield_now().await;
            }
        });
    }
    for _ in 0..5 {
        place.host.yield_now().await;
    }
    same("turns", order.so_far(), (0..9).collect())
}

async fn tasks_of_tasks_run<H: TaskHost>(place: Place<H>) -> Outcome {
    let order = Order::default();
    let (host, noted) = (place.host.clone(), order.clone());
    place.host.spawn("outer", 0, async move {
        let inner = noted.clone();
        host.spawn("inner", 0, async move { inner.note(2) });
        noted.note(1);
    });
    place.host.yield_now().await;
    place.host.yield_now().await;
    same("order", order.so_far(), vec![1, 2])
}

async fn more_tasks_than_a_turn_holds_keep_their_order<H: TaskHost>(place: Place<H>) -> Outcome {
    let order = Order::default();
    for i in 0..1000 {
        let (host, order) = (place.host.clone(), order.clone());
        place.host.spawn("task", u64::from(i), async move {
            host.yield_now().await;
            order.note(i);
        });
    }
    while order.so_far().len() < 1000 {
        place.host.sleep_ns(1_000_000).await;
    }
    same("order", order.so_far(), (0..1000).collect())
}
