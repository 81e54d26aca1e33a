//! What to do with a record that a dead process left.

use crate::config::LAYOUT;
use crate::record::{Content, Slot, SlotState};

/// A response that was begun and not published: at this index, with this status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Begun {
    pub(crate) slot: Slot,
    pub(crate) status: i16,
}

/// How to continue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Plan {
    /// Ring index of the next request to take.
    pub(crate) req_cons: u32,
    /// Requests to execute again, in the order in which they were taken.
    pub(crate) taken: Vec<Slot>,
    /// Responses to write again, from the ring's `rsp_prod` on.
    pub(crate) begun: Vec<Begun>,
    /// Slots whose response the guest already has.
    pub(crate) given: Vec<Slot>,
}

/// Reads the record against the ring's published `rsp_prod`. The guest can write that number, so it is believed only
/// as far as it agrees with the record: every request up to `req_cons` was either answered or is in a slot.
pub(crate) fn plan(content: Content, rsp_prod: u32) -> Result<Plan, &'static str> {
    let mut plan = Plan { req_cons: content.req_cons, taken: vec![], begun: vec![], given: vec![] };
    let mut begun = Vec::new();
    for slot in content.slots {
        match slot.state {
            SlotState::Taken { index } => {
                // Death between the slot and the index: the request at the index counts as taken.
                if index == content.req_cons {
                    plan.req_cons = index.wrapping_add(1);
                }
                plan.taken.push(slot);
            }
            SlotState::Answering { response, status } => match response.wrapping_sub(rsp_prod) {
                ahead if ahead < LAYOUT.entries => begun.push((ahead, Begun { slot, status })),
                behind if behind.wrapping_neg() <= LAYOUT.entries => plan.given.push(slot),
                _ => return Err("a response in the record is outside the ring's window"),
            },
        }
    }
    let req_cons = plan.req_cons;
    let age = |slot: &Slot| match slot.state {
        SlotState::Taken { index } => req_cons.wrapping_sub(index),
        SlotState::Answering { .. } => 0,
    };
    plan.taken.sort_by_key(|slot| std::cmp::Reverse(age(slot)));
    // A slow request may lag any number of fast ones, but never be ahead.
    if plan.taken.iter().any(|slot| !(1..=u32::MAX / 2).contains(&age(slot)))
        || plan.taken.windows(2).any(|pair| age(&pair[0]) == age(&pair[1]))
    {
        return Err("a request in the record is at an impossible place of the ring");
    }
    begun.sort_by_key(|(ahead, _)| *ahead);
    if begun.iter().zip(0..).any(|((ahead, _), n)| *ahead != n)
        || !(begun.is_empty() || plan.given.is_empty())
    {
        return Err("the ring shows a part of a batch of responses");
    }
    plan.begun = begun.into_iter().map(|(_, response)| response).collect();
    if req_cons.wrapping_sub(rsp_prod) as usize != plan.taken.len() + plan.begun.len() {
        return Err("the record does not account for every request that was taken");
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(number: u8, index: u32) -> Slot {
        Slot { number, state: SlotState::Taken { index }, entry: [0; 112] }
    }
    fn answering(number: u8, response: u32) -> Slot {
        Slot { number, state: SlotState::Answering { response, status: 0 }, entry: [0; 112] }
    }
    fn numbers<'a>(slots: impl IntoIterator<Item = &'a Slot>) -> Vec<u8> {
        slots.into_iter().map(|s| s.number).collect()
    }

    #[test]
    fn taken_requests_come_back_in_ring_order_across_the_wrap() {
        let slots = vec![taken(0, 1), taken(1, u32::MAX), taken(2, 0)];
        let plan = plan(Content { req_cons: 2, slots }, u32::MAX).unwrap();
        assert_eq!((plan.req_cons, numbers(&plan.taken)), (2, vec![1, 2, 0]));
    }

    #[test]
    fn a_slow_request_may_be_far_behind() {
        let plan = plan(Content { req_cons: 5000, slots: vec![taken(4, 7)] }, 4999).unwrap();
        assert_eq!(numbers(&plan.taken), [4]);
    }

    #[test]
    fn a_request_noted_but_not_counted_is_taken() {
        let plan = plan(Content { req_cons: 7, slots: vec![taken(4, 7), taken(5, 6)] }, 6).unwrap();
        assert_eq!((plan.req_cons, numbers(&plan.taken)), (8, vec![5, 4]));
    }

    #[test]
    fn a_batch_is_published_or_not() {
        let slots = || vec![answering(9, 3), answering(1, 2), taken(2, 4)];
        let before = plan(Content { req_cons: 5, slots: slots() }, 2).unwrap();
        assert_eq!(numbers(before.begun.iter().map(|b| &b.slot)), [1, 9]);
        let after = plan(Content { req_cons: 5, slots: slots() }, 4).unwrap();
        assert_eq!((after.begun.len(), numbers(&after.given), after.taken.len()), (0, vec![9, 1], 1));
        assert!(plan(Content { req_cons: 5, slots: slots() }, 3).is_err(), "half of it");
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        let bad = [
            (5, vec![], 4),                                 // one request lost
            (5, vec![], 6),                                 // more answers than requests
            (5, vec![taken(0, 4), taken(1, 4)], 3),         // one index twice
            (5, vec![taken(0, 6)], 4),                      // not yet reached
            (5, vec![answering(0, 5)], 4),                  // a gap before it
            (5, vec![answering(0, 100)], 4),                // elsewhere
            (5, vec![answering(0, 4), answering(1, 4)], 3), // one response twice
        ];
        for (req_cons, slots, rsp_prod) in bad {
            let content = Content { req_cons, slots };
            assert!(plan(content.clone(), rsp_prod).is_err(), "{content:?} {rsp_prod}");
        }
    }
}
