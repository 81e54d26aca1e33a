//! The engine's own promises: order, time, kill, replay, determinism with and without the guard.

use sim::{Config, Label, Limits, Scheduling, ShrinkLimits, Sim, Source, StallKind, guard, shrink};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

static STEP: Label = Label::new("engine-test-step", "{}");

fn note(log: &Rc<RefCell<Vec<String>>>, line: impl Into<String>) {
    log.borrow_mut().push(line.into());
}

#[test]
fn time_moves_only_when_nothing_is_ready() {
    let sim = Sim::new(&Config::new(1));
    let log = Rc::new(RefCell::new(Vec::new()));
    let (s, l) = (sim.clone(), Rc::clone(&log));
    sim.run(async move {
        for (i, ns) in [300, 100, 200].into_iter().enumerate() {
            let (s2, l2) = (s.clone(), Rc::clone(&l));
            s.spawn("sleeper", i as u64, async move {
                s2.sleep_ns(ns).await;
                note(&l2, format!("{i} at {}", s2.now_ns()));
            });
        }
        s.yield_now().await;
        assert_eq!(s.now_ns(), 0);
        s.sleep_ns(1000).await;
        note(&l, format!("root at {}", s.now_ns()));
    })
    .unwrap();
    assert_eq!(*log.borrow(), ["1 at 100", "2 at 200", "0 at 300", "root at 1000"]);
}

#[test]
fn a_killed_node_has_no_effects_and_is_cleaned_up_after() {
    struct SetOnDrop(Rc<Cell<bool>>, sim::Node, Rc<Cell<bool>>);
    impl Drop for SetOnDrop {
        fn drop(&mut self) {
            self.0.set(true);
            self.2.set(self.1.step());
        }
    }
    let sim = Sim::new(&Config::new(1));
    let s = sim.clone();
    sim.run(async move {
        let node = s.node("process", 1);
        let (dropped, effect, hooked) = (Rc::default(), Rc::new(Cell::new(true)), Rc::new(Cell::new(false)));
        let guard = SetOnDrop(Rc::clone(&dropped), node.clone(), Rc::clone(&effect));
        let (n, s2) = (node.clone(), s.clone());
        node.spawn("work", 0, async move {
            let _guard = guard;
            loop {
                if !n.step() {
                    // Even code that continues after its death stops at the next await.
                    s2.sleep_ns(1).await;
                    unreachable!("a dead node got a turn");
                }
                s2.sleep_ns(10).await;
            }
        });
        let h = Rc::clone(&hooked);
        node.on_death(move || h.set(true));
        node.kill_after_steps(3);
        node.dead().await;
        assert!(dropped.get() && hooked.get() && !effect.get());
        assert_eq!((node.steps(), s.now_ns()), (3, 30));
    })
    .unwrap();
}

#[test]
fn a_deadlock_names_who_waits() {
    let sim = Sim::new(&Config::new(1));
    sim.on_stall(|| vec!["ticket 3 waits for ticket 1".into()]);
    let stall = sim.run(std::future::pending::<()>()).unwrap_err();
    assert_eq!(stall.kind, StallKind::Deadlock);
    assert!(stall.tasks.iter().any(|task| task.node == "world" && task.role == "root"), "{stall:?}");
    assert_eq!(stall.reports, ["ticket 3 waits for ticket 1"]);
}

#[test]
fn limits_end_a_run() {
    let limits = Limits { turns: 1000, time_ns: 1_000_000 };
    let spin = Sim::new(&Config { limits, ..Config::new(1) });
    let s = spin.clone();
    let stall = spin.run(async move {
        loop {
            s.yield_now().await;
        }
    });
    assert_eq!(stall.unwrap_err().kind, StallKind::TurnLimit);
    let late = Sim::new(&Config { limits, ..Config::new(1) });
    let s = late.clone();
    let stall = late.run(async move { s.sleep_ns(2_000_000).await });
    assert_eq!(stall.unwrap_err().kind, StallKind::TimeLimit);
}

/// A small world: workers draw, sleep and race; one pair of draws is a "bug".
fn small_world(config: &Config) -> (u64, sim::DecisionMap, bool) {
    let sim = Sim::new(config);
    let bad = Rc::new(Cell::new(0));
    let (s, b) = (sim.clone(), Rc::clone(&bad));
    sim.run(async move {
        for worker in 0..8_u64 {
            let (s2, b2) = (s.clone(), Rc::clone(&b));
            s.spawn("worker", worker, async move {
                for round in 0..50 {
                    let me = s2.current();
                    let ns = s2.decide(me, &STEP, round, |d| if d.below(2) == 0 { d.below(100) } else { 0 });
                    if ns > 90 && worker == 3 || ns > 95 && worker == 5 {
                        b2.set(b2.get() | 1 << worker);
                    }
                    s2.sleep_ns(ns).await;
                }
            });
        }
        s.sleep_ns(100_000).await;
    })
    .unwrap();
    let (trace, decisions) = sim.finish();
    (trace.hash, decisions, bad.get() == 1 << 3 | 1 << 5)
}

#[test]
fn equal_seeds_give_equal_runs_with_and_without_the_guard() {
    let run = |guarded: bool, seed| {
        guard::run(guarded, seed, move || {
            let scheduling = Scheduling::Random { one_in: 4, bits: 10 };
            small_world(&Config { scheduling, ..Config::new(seed) }).0
        })
    };
    for seed in 0..20 {
        assert_eq!(run(true, seed), run(false, seed));
    }
    assert_ne!(run(true, 1), run(true, 2));
}

#[test]
fn a_recorded_run_replays_and_shrinks() {
    let scheduling = Scheduling::Random { one_in: 4, bits: 10 };
    let config = |seed| Config { scheduling, record: true, ..Config::new(seed) };
    let (seed, hash, decisions) = (0..200)
        .find_map(|seed| {
            let (hash, decisions, bad) = small_world(&config(seed));
            bad.then_some((seed, hash, decisions))
        })
        .expect("a seed with the planted pair");
    let replay =
        |map: &sim::DecisionMap| small_world(&Config { source: Source::Replay(map.clone()), ..config(seed) });
    let again = replay(&decisions);
    assert_eq!((again.0, &again.1), (hash, &decisions));
    let out = shrink(&decisions, ShrinkLimits::default(), |map| {
        let (_, used, bad) = replay(map);
        bad.then_some(used)
    });
    let values: Vec<u64> = out.decisions.values().map(|d| d.value).collect();
    assert_eq!(values.len(), 2, "{:?}", out.decisions);
    assert!(values.contains(&91) && values.contains(&96), "{values:?}");
}

#[test]
fn a_long_sleep_in_a_loop_leaves_nothing_behind() {
    let sim = Sim::new(&Config::new(1));
    let s = sim.clone();
    sim.run(async move {
        for _ in 0..10_000 {
            let mut long = Box::pin(s.sleep_ns(1_000_000_000));
            std::future::poll_fn(|cx| {
                assert!(std::future::Future::poll(long.as_mut(), cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
        }
        s.sleep_ns(1).await;
        assert_eq!(s.now_ns(), 1);
    })
    .unwrap();
}

#[test]
fn tasks_of_other_nodes_run_inside_a_turn_and_no_deeper() {
    let sim = Sim::new(&Config::new(1));
    let log = Rc::new(RefCell::new(Vec::new()));
    let (s, l) = (sim.clone(), Rc::clone(&log));
    sim.run(async move {
        let (own, other) = (s.node("own", 0), s.node("other", 0));
        let (sim, log) = (s.clone(), Rc::clone(&l));
        own.spawn("first", 0, async move {
            note(&log, "first begins");
            assert!(sim.next_access().is_some());
            sim.run_others(1);
            note(&log, "first ends");
        });
        let log = Rc::clone(&l);
        own.spawn("same node", 0, async move { note(&log, "same node") });
        for i in 0..2 {
            let (sim, log) = (s.clone(), Rc::clone(&l));
            other.spawn("other", i, async move {
                note(&log, format!("other {i} begins"));
                sim.run_others(9);
                note(&log, format!("other {i} ends"));
            });
        }
        s.sleep_ns(1).await;
    })
    .unwrap();
    assert_eq!(
        log.borrow().join(", "),
        "first begins, other 0 begins, other 0 ends, first ends, same node, other 1 begins, other 1 ends"
    );
}

#[test]
fn the_longest_turn_is_told() {
    let sim = Sim::new(&Config::new(1));
    let s = sim.clone();
    sim.run(async move {
        let node = s.node("process", 0);
        let n = node.clone();
        node.spawn("works", 7, async move {
            for _ in 0..5 {
                assert!(n.step());
            }
        });
        s.sleep_ns(1).await;
    })
    .unwrap();
    let longest = sim.longest_turn();
    assert_eq!((longest.done, longest.role, longest.key), (5, "works", 7));
}
