use super::*;
use crate::testing::Pool;
use proptest::prelude::*;
use std::cell::Cell;

fn claimed(tracker: &Tracker, number: u64, range: Range<u64>, access: Access) -> Ticket {
    let ticket = tracker.ticket("test", number);
    ticket.claim(Space::Sectors, range, access);
    ticket
}

#[test]
fn readers_share_and_a_writer_waits_for_all_of_them() {
    let tracker = Tracker::new();
    let first = claimed(&tracker, 1, 0..8, Access::Shared);
    let second = claimed(&tracker, 2, 4..12, Access::Shared);
    let writer = claimed(&tracker, 3, 7..9, Access::Exclusive);
    let other = claimed(&tracker, 4, 12..13, Access::Exclusive);
    assert!(first.is_ready() && second.is_ready() && other.is_ready() && !writer.is_ready());
    let report = tracker.report();
    assert_eq!(report.len(), 1);
    assert_eq!(report[0].to_string(), "test 3 waits for test 1, test 2");
    drop(second);
    assert!(!writer.is_ready());
    drop(first);
    assert!(writer.is_ready());
    assert!(tracker.report().is_empty());
}

proptest! {
    #[test]
    fn a_union_covers_exactly_the_added_ranges_and_merges_adjacent_ones(
        ranges in proptest::collection::vec((0..40_u64, 1..9_u64), 1..30)
    ) {
        let (mut union, mut there) = (Union::default(), [false; 50]);
        for (start, len) in ranges {
            union.add(start, start + len);
            there[start as usize..(start + len) as usize].fill(true);
            for start in 0..there.len() {
                for end in start + 1..=there.len() {
                    let all = there[start..end].iter().all(|there| *there);
                    prop_assert_eq!(union.covers(start as u64, end as u64), all, "{} to {}", start, end);
                }
            }
            let runs = there.windows(2).filter(|pair| !pair[0] && pair[1]).count() + usize::from(there[0]);
            prop_assert_eq!(union.0.len(), runs);
        }
    }
}

#[test]
fn spaces_do_not_conflict_and_a_ticket_does_not_conflict_with_itself() {
    let tracker = Tracker::new();
    let a = claimed(&tracker, 1, 0..8, Access::Exclusive);
    a.claim(Space::Sectors, 2..4, Access::Exclusive);
    let b = tracker.ticket("cluster", 0);
    b.claim(Space::Clusters, 0..8, Access::Exclusive);
    b.claim(Space::Sectors, 3..3, Access::Exclusive);
    assert!(a.is_ready() && b.is_ready());
}

#[test]
fn a_waiter_is_woken_once_by_the_last_ticket_it_waits_for() {
    let (pool, tracker) = (Pool::new(), Tracker::new());
    let before =
        [claimed(&tracker, 1, 0..1, Access::Exclusive), claimed(&tracker, 2, 1..2, Access::Exclusive)];
    let ticket = claimed(&tracker, 3, 0..2, Access::Exclusive);
    let polls = Rc::new(Cell::new(0));
    let counted = Rc::clone(&polls);
    let done = pool.start(async move {
        let mut ready = std::pin::pin!(ticket.ready());
        poll_fn(|cx| {
            counted.set(counted.get() + 1);
            ready.as_mut().poll(cx)
        })
        .await;
    });
    assert_eq!(polls.get(), 1);
    for ticket in before {
        assert!(done.get().is_none());
        drop(ticket);
        pool.run();
    }
    assert_eq!((done.take(), polls.get()), (Some(()), 2));
    assert!(tracker.is_empty());
}

#[test]
fn a_ticket_dropped_while_it_waits_lets_nothing_past() {
    let tracker = Tracker::new();
    let first = claimed(&tracker, 1, 0..4, Access::Exclusive);
    let middle = claimed(&tracker, 2, 0..8, Access::Exclusive);
    let last = claimed(&tracker, 3, 4..8, Access::Exclusive);
    drop(middle);
    drop(first);
    assert!(!last.is_ready());
    assert!(!claimed(&tracker, 4, 7..9, Access::Exclusive).is_ready());
}

#[test]
#[should_panic(expected = "a claim by a ticket that others wait for")]
fn a_ticket_that_others_wait_for_claims_nothing_more() {
    let tracker = Tracker::new();
    let first = claimed(&tracker, 1, 0..1, Access::Exclusive);
    let _waits = claimed(&tracker, 2, 0..2, Access::Exclusive);
    first.claim(Space::Sectors, 1..2, Access::Exclusive);
}

/// The rule of the contract, applied to a plain list of live tickets.
#[derive(Default)]
struct Model {
    alive: Vec<(usize, Vec<usize>)>,
    claims: Vec<(usize, u64, u64, bool)>,
}

impl Model {
    fn claim(&mut self, id: usize, start: u64, end: u64, exclusive: bool) {
        let before =
            self.claims.iter().filter(|c| c.0 != id && c.1 < end && start < c.2 && (c.3 || exclusive));
        let before: Vec<usize> = before.map(|c| c.0).collect();
        let entry = self.alive.iter_mut().find(|a| a.0 == id).expect("a claim belongs to a live ticket");
        entry.1.extend(before);
        self.claims.push((id, start, end, exclusive));
    }
    fn remove(&mut self, id: usize) {
        self.alive.retain(|a| a.0 != id);
        self.claims.retain(|c| c.0 != id);
        self.alive.iter_mut().for_each(|a| a.1.retain(|b| *b != id));
    }
}

proptest! {
    /// Each ticket makes one or two claims when it is made, as requests do, so that no cycle can arise.
    #[test]
    fn readiness_is_that_of_the_naive_model(
        steps in prop::collection::vec((0u8..3, 0usize..8, 0u64..20, 1u64..6, any::<bool>()), 1..120)
    ) {
        let tracker = Tracker::new();
        let mut model = Model::default();
        let mut tickets: Vec<(usize, Ticket)> = Vec::new();
        for (serial, (kind, pick, start, len, exclusive)) in steps.into_iter().enumerate() {
            let ready: Vec<usize> = (0..tickets.len()).filter(|at| tickets[*at].1.is_ready()).collect();
            if kind == 0 && !ready.is_empty() {
                let (id, ticket) = tickets.remove(ready[pick % ready.len()]);
                drop(ticket);
                model.remove(id);
            } else {
                let access = if exclusive { Access::Exclusive } else { Access::Shared };
                let ticket = tracker.ticket("model", serial as u64);
                model.alive.push((serial, Vec::new()));
                for at in (start..start + u64::from(kind) * 7).step_by(7) {
                    ticket.claim(Space::Sectors, at..at + len, access);
                    model.claim(serial, at, at + len, exclusive);
                }
                tickets.push((serial, ticket));
            }
            for ((id, ticket), (model_id, before)) in tickets.iter().zip(&model.alive) {
                prop_assert_eq!(id, model_id);
                prop_assert_eq!(ticket.is_ready(), before.is_empty());
            }
        }
    }
}

#[test]
fn a_thousand_claims_of_one_block_are_a_chain() {
    let tracker = Tracker::new();
    let mut tickets: std::collections::VecDeque<Ticket> =
        (0..1000).map(|i| claimed(&tracker, i, 0..8, Access::Exclusive)).collect();
    assert!(tracker.steps() <= 3 * 1000, "{} steps", tracker.steps());
    while let Some(first) = tickets.pop_front() {
        assert!(first.is_ready() && tickets.front().is_none_or(|next| !next.is_ready()));
    }
    assert!(tracker.steps() <= 5 * 1000, "{} steps", tracker.steps());
}

#[test]
fn a_ticket_waits_for_none_that_another_of_its_predecessors_waits_for() {
    let tracker = Tracker::new();
    let tickets = [1..4, 2..5, 3..10].map(|range| claimed(&tracker, range.start, range, Access::Exclusive));
    let report: Vec<String> = tracker.report().iter().map(|w| w.to_string()).collect();
    // Within its own claim, the third finds nothing of the first that the second does not cover.
    assert_eq!(report, ["test 2 waits for test 1", "test 3 waits for test 2"]);
    drop(tickets);
}
