//! Which of the operations that wait is started next, so that a disk whose storage hangs leaves room for the others.
//!
//! ```text
//!   group 1 ── waiting ──┐
//!   group 2 ── waiting ──┼── in turn, those below their share ──► started
//!   group 3 ── waiting ──┘
//! ```
//!
//! # Contract
//!
//! * Operations of one group start in order.
//! * Groups take turns. One that has as many under way as its share is passed over until one of them ends.
//! * A share is a fixed number at most, and half of what is free: whatever hangs, some room is left for who comes next.
//!   Groups that hang one after the other get ever less; it takes ten of them to take all threads.

use std::collections::{BTreeMap, VecDeque};

/// The files of a disk.
pub(crate) type GroupId = u64;

#[derive(Default)]
struct Group {
    waiting: VecDeque<u32>,
    started: usize,
    /// It is in the list of those whose turn comes.
    has_turn: bool,
}

/// The operations that wait, and how many of each group are under way.
pub(crate) struct Turns {
    groups: BTreeMap<GroupId, Group>,
    turns: VecDeque<GroupId>,
    waiting: usize,
    started: usize,
    /// Limit of all groups together.
    room: usize,
    /// Limit of one.
    share_max: usize,
}

impl Turns {
    pub(crate) fn new(room: usize, share_max: usize) -> Self {
        let (groups, turns) = (BTreeMap::new(), VecDeque::new());
        Self { groups, turns, waiting: 0, started: 0, room, share_max }
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many are under way.
    pub(crate) fn started(&self) -> usize {
        self.started
    }

    /// Adds an operation.
    pub(crate) fn put(&mut self, id: GroupId, index: u32) {
        self.waiting += 1;
        let group = self.groups.entry(id).or_default();
        group.waiting.push_back(index);
        if !std::mem::replace(&mut group.has_turn, true) {
            self.turns.push_back(id);
        }
    }

    /// The next one to start, if there is room for it.
    pub(crate) fn next(&mut self) -> Option<u32> {
        for _ in 0..self.turns.len() {
            let share = self.share_max.min((self.room - self.started).div_ceil(2));
            let id = self.turns.pop_front()?;
            let group = self.groups.get_mut(&id)?;
            if group.started >= share {
                // Its turn comes again: more may be free by then.
                self.turns.push_back(id);
                continue;
            }
            let index = group.waiting.pop_front();
            group.started += 1;
            (self.started, self.waiting) = (self.started + 1, self.waiting - 1);
            group.has_turn = !group.waiting.is_empty();
            if group.has_turn {
                self.turns.push_back(id);
            }
            return index;
        }
        None
    }

    /// An operation of this group has ended.
    pub(crate) fn end(&mut self, id: GroupId) {
        self.started -= 1;
        let Some(group) = self.groups.get_mut(&id) else { unreachable!("what has ended was started") };
        group.started -= 1;
        if group.started == 0 && group.waiting.is_empty() {
            self.groups.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(turns: &mut Turns) -> Vec<u32> {
        std::iter::from_fn(|| turns.next()).collect()
    }

    #[test]
    fn groups_take_turns_and_each_keeps_its_order() {
        let mut turns = Turns::new(64, 16);
        for (id, index) in [(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)] {
            turns.put(id, index);
        }
        assert_eq!(all(&mut turns), [10, 20, 30, 11, 21, 12]);
        for id in [1, 1, 1, 2, 2, 3] {
            turns.end(id);
        }
        assert_eq!((turns.started(), turns.waiting(), turns.groups.len(), turns.turns.len()), (0, 0, 0, 0));
    }

    #[test]
    fn disks_that_hang_leave_room_for_the_next() {
        let mut turns = Turns::new(64, 16);
        let mut started = Vec::new();
        for id in 0..8 {
            (0..200).for_each(|index| turns.put(id, index));
            started.push(all(&mut turns).len());
        }
        assert_eq!(started, [16, 16, 11, 7, 5, 3, 2, 2]);
        // Somebody else still gets on, again and again.
        for index in 0..100 {
            turns.put(100, index);
            assert_eq!(turns.next(), Some(index));
            assert_eq!(turns.next(), None);
            turns.end(100);
        }
        assert_eq!(turns.started(), 62);
    }

    #[test]
    fn everything_is_started_once_there_is_room() {
        let mut turns = Turns::new(4, 2);
        for id in 0..5 {
            (0..10).for_each(|index| turns.put(id, index));
        }
        let (mut under_way, mut seen) = (VecDeque::new(), 0);
        // Every index of a group comes in order.
        let mut last = [0; 5];
        while turns.waiting() + turns.started() > 0 {
            let before = turns.groups.iter().map(|(id, group)| (*id, group.started)).collect::<Vec<_>>();
            if let Some(index) = turns.next() {
                let id = (0..5).find(|id| {
                    let was = before.iter().find(|(other, _)| other == id).map_or(0, |(_, started)| *started);
                    turns.groups.get(id).is_some_and(|group| group.started > was)
                });
                let id = id.unwrap();
                assert_eq!(index, last[id as usize]);
                last[id as usize] += 1;
                seen += 1;
                under_way.push_back(id);
            } else {
                turns.end(under_way.pop_front().unwrap());
            }
            assert!(turns.started() <= 4);
        }
        assert_eq!(seen, 50);
    }
}
