//! Shrinking: the smallest set of decisions that still fails in the same way.
//!
//! Decisions are sparse and keyed, so any subset of a failing run's decisions is a run: passes leave out halves, then
//! quarters, down to single ones, then lower values (whole, or field by field where a label packs several), until a
//! whole round changes nothing. A decision that is keyed by a count (of accesses, of events) refers to a different
//! moment when something before it is left out: so while many decisions remain, some are left out while one of those
//! moves ahead.

use crate::decide::{DecisionMap, Key};

/// When shrinking gives up and returns the best so far.
#[derive(Clone, Copy)]
pub struct ShrinkLimits<'a> {
    /// Runs tried.
    pub runs: u64,
    /// Asked before each run: whether to give up now.
    pub stop: &'a dyn Fn() -> bool,
}

impl Default for ShrinkLimits<'_> {
    fn default() -> Self {
        Self { runs: 20_000, stop: &|| false }
    }
}

/// A shrunk run.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The remaining decisions.
    pub decisions: DecisionMap,
    /// Runs tried.
    pub runs: u64,
    /// Whether nothing more can be left out (as opposed to: the limit was reached).
    pub complete: bool,
}

/// Shrinks `start`. `fails` runs a candidate and, if it fails in the wanted way, returns the decisions that it used.
pub fn shrink(
    start: &DecisionMap,
    limits: ShrinkLimits<'_>,
    fails: impl FnMut(&DecisionMap) -> Option<DecisionMap>,
) -> Shrunk {
    let mut s = Shrinker { best: start.clone(), runs: 0, limits, stopped: false, fails };
    loop {
        let before = s.best.clone();
        s.drop_by_label();
        s.drop_chunks();
        s.lower_values();
        s.slide();
        if s.best == before || s.exhausted() {
            break;
        }
    }
    let complete = !s.exhausted();
    Shrunk { decisions: s.best, runs: s.runs, complete }
}

/// From this many decisions on it is worth moving decisions ahead.
const SLIDES_FROM: usize = 16;
/// How far: more than the count by which one request advances anything.
const SLIDE_MOST: u32 = 32;
/// Decisions that are keyed by a count and matter are rare. Those that make up the load of a run are more frequent.
const RARE: usize = 6;

struct Shrinker<'a, F> {
    best: DecisionMap,
    runs: u64,
    limits: ShrinkLimits<'a>,
    stopped: bool,
    fails: F,
}

impl<F: FnMut(&DecisionMap) -> Option<DecisionMap>> Shrinker<'_, F> {
    fn exhausted(&self) -> bool {
        self.stopped || self.runs >= self.limits.runs
    }

    fn try_candidate(&mut self, candidate: &DecisionMap) -> bool {
        self.stopped |= (self.limits.stop)();
        if self.exhausted() {
            return false;
        }
        self.runs += 1;
        match (self.fails)(candidate) {
            // A run may use fewer decisions than it was given, never more.
            Some(used) => {
                self.best = if used.len() <= candidate.len() { used } else { candidate.clone() };
                true
            }
            None => false,
        }
    }

    /// Drops whole kinds at once: all late turns, all latencies. This usually removes most of a run.
    fn drop_by_label(&mut self) {
        let mut labels: Vec<&'static str> = self.best.keys().map(|k| k.label.name).collect();
        labels.sort_unstable();
        labels.dedup();
        for label in labels {
            let mut candidate = self.best.clone();
            candidate.retain(|k, _| k.label.name != label);
            self.try_candidate(&candidate);
        }
    }

    fn drop_chunks(&mut self) {
        let mut size = self.best.len().div_ceil(2).max(1);
        loop {
            // From the end: late decisions matter least, and removing them changes nothing before them.
            let mut end = self.best.len();
            while end > 0 && !self.exhausted() {
                let start = end.saturating_sub(size);
                let mut keys = self.in_time_order();
                let gone: Vec<Key> = keys.drain(start..end).collect();
                let mut candidate = self.best.clone();
                for key in &gone {
                    candidate.remove(key);
                }
                self.try_candidate(&candidate);
                end = start.min(self.best.len());
            }
            if size == 1 || self.exhausted() {
                return;
            }
            size = size.div_ceil(2);
        }
    }

    /// Leaves out single decisions while another one, keyed by a count, moves ahead.
    fn slide(&mut self) {
        if self.best.len() < SLIDES_FROM {
            return;
        }
        for gone in self.in_time_order().into_iter().rev() {
            let many = |label| self.best.keys().filter(|k| std::ptr::eq(k.label, label)).count() > RARE;
            let late = |k: &Key| k.attempt > 0 && *k != gone && !many(k.label);
            let late: Vec<Key> = self.in_time_order().into_iter().rev().filter(late).collect();
            let slid = late.into_iter().any(|key| self.slide_without(&gone, key));
            if self.exhausted() || (slid && self.best.len() < SLIDES_FROM) {
                return;
            }
        }
    }

    fn slide_without(&mut self, gone: &Key, key: Key) -> bool {
        (1..=SLIDE_MOST.min(key.attempt)).any(|by| {
            let mut candidate = self.best.clone();
            let moved = Key { attempt: key.attempt - by, ..key };
            if candidate.remove(gone).is_none() || candidate.contains_key(&moved) {
                return false;
            }
            let Some(decision) = candidate.remove(&key) else { return false };
            candidate.insert(moved, decision);
            self.try_candidate(&candidate)
        })
    }

    fn in_time_order(&self) -> Vec<Key> {
        let mut keys: Vec<(u64, Key)> = self.best.iter().map(|(k, d)| (d.at_ns, *k)).collect();
        keys.sort_unstable();
        keys.into_iter().map(|(_, k)| k).collect()
    }

    fn lower_values(&mut self) {
        for key in self.in_time_order() {
            if key.label.fields.is_empty() {
                self.lower_field(&key, 0, 64);
            } else {
                let mut shift = 0;
                for width in key.label.fields {
                    self.lower_field(&key, shift, *width);
                    shift += width;
                }
            }
        }
    }

    /// Lowers one field of a value: to 0, to 1, then by ever smaller steps.
    fn lower_field(&mut self, key: &Key, shift: u32, width: u32) {
        let mask = if width == 64 { u64::MAX } else { ((1 << width) - 1) << shift };
        let field = |s: &Self| s.best.get(key).map_or(0, |d| (d.value & mask) >> shift);
        for least in [0, 1] {
            if field(self) > least && self.try_field(key, mask, least << shift) {
                return;
            }
        }
        let mut step = field(self) / 2;
        while step > 0 && !self.exhausted() {
            let now = field(self);
            let lowered = now > step && self.try_field(key, mask, (now - step) << shift);
            if !lowered {
                step /= 2;
            }
        }
    }

    fn try_field(&mut self, key: &Key, mask: u64, bits: u64) -> bool {
        let Some(decision) = self.best.get(key) else { return false };
        let value = decision.value & !mask | bits;
        let mut candidate = self.best.clone();
        if value == 0 {
            candidate.remove(key);
        } else if let Some(d) = candidate.get_mut(key) {
            d.value = value;
        }
        self.try_candidate(&candidate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::{Decision, Label};
    use crate::mix::Entity;

    static A: Label = Label::new("shrink-test-a", "{}");
    static PACKED: Label = Label::packed("shrink-test-packed", "{}", &[8, 8]);

    fn map(entries: &[(u64, &'static Label, u64)]) -> DecisionMap {
        entries
            .iter()
            .enumerate()
            .map(|(i, (entity, label, value))| {
                let key = Key { entity: Entity(*entity), label, attempt: 0 };
                (key, Decision { value: *value, at_ns: i as u64, entity_name: String::new() })
            })
            .collect()
    }

    #[test]
    fn finds_the_two_that_matter() {
        let many: Vec<_> = (0..500).map(|i| (i, &A, 1 + i)).collect();
        let need = |m: &DecisionMap| {
            let has = |e, least| m.iter().any(|(k, d)| k.entity == Entity(e) && d.value >= least);
            (has(77, 10) && has(300, 1)).then(|| m.clone())
        };
        let out = shrink(&map(&many), ShrinkLimits::default(), need);
        let left: Vec<_> = out.decisions.iter().map(|(k, d)| (k.entity.0, d.value)).collect();
        assert_eq!(left, [(77, 10), (300, 1)]);
        assert!(out.complete);
        assert!(out.runs < 200, "{} runs", out.runs);
    }

    #[test]
    fn what_is_counted_moves_ahead_of_what_is_left_out() {
        // Each request takes five accesses; the failure is at the second access of the last one.
        let mut start = map(&(0..30).map(|i| (i, &A, 1)).collect::<Vec<_>>());
        let key = |attempt| Key { entity: Entity(99), label: &PACKED, attempt };
        start.insert(key(147), Decision { value: 1, at_ns: 99, entity_name: String::new() });
        let fails = |m: &DecisionMap| {
            let requests = m.len() as u32 - 1;
            (requests > 0 && m.contains_key(&key(5 * (requests - 1) + 2))).then(|| m.clone())
        };
        let out = shrink(&start, ShrinkLimits::default(), fails);
        assert_eq!(out.decisions.len(), SLIDES_FROM - 1, "in {} runs", out.runs);
    }

    #[test]
    fn fields_shrink_apart() {
        let start = map(&[(1, &PACKED, 0x5533)]);
        let out = shrink(&start, ShrinkLimits::default(), |m| {
            m.values().any(|d| d.value & 0xff >= 3 && d.value >> 8 >= 2).then(|| m.clone())
        });
        assert_eq!(out.decisions.values().next().unwrap().value, 0x0203);
    }

    #[test]
    fn the_limit_holds() {
        let many: Vec<_> = (0..100).map(|i| (i, &A, 1 + i)).collect();
        let out = shrink(&map(&many), ShrinkLimits { runs: 5, ..ShrinkLimits::default() }, |_| None);
        assert_eq!((out.runs, out.complete, out.decisions.len()), (5, false, 100));
    }

    #[test]
    fn asked_to_stop_it_returns_the_best_so_far() {
        let many: Vec<_> = (0..100).map(|i| (i, &A, 1 + i)).collect();
        let runs = std::cell::Cell::new(0);
        let stop = || runs.get() == 3;
        let fails = |m: &DecisionMap| {
            runs.set(runs.get() + 1);
            (!m.is_empty()).then(|| m.clone())
        };
        let out = shrink(&map(&many), ShrinkLimits { stop: &stop, ..ShrinkLimits::default() }, fails);
        assert!(out.runs == 3 && !out.complete && (1..100).contains(&out.decisions.len()), "{out:?}");
    }
}
