//! Decisions: every choice a world makes, keyed by what it is about.

use crate::mix::{Entity, FixedMap, mix, mix2, text_hash};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{LazyLock, Mutex};

/// A kind of decision. Declared as a `static`; its name is part of every stored run and is never changed or reused.
pub struct Label {
    /// Unique name, kebab case.
    pub name: &'static str,
    /// What a value means, for people; `{}` stands for the value, `{n}` for the attempt.
    pub words: &'static str,
    /// Widths in bits of the fields of a packed value, lowest first; empty for a plain number. Shrinking works on
    /// fields one by one.
    pub fields: &'static [u32],
    id: u64,
}

impl Label {
    /// A label of a plain number.
    pub const fn new(name: &'static str, words: &'static str) -> Self {
        Self { name, words, fields: &[], id: text_hash(name) }
    }
    /// A label whose values are packed from fields of the given widths in bits.
    pub const fn packed(name: &'static str, words: &'static str, fields: &'static [u32]) -> Self {
        Self { name, words, fields, id: text_hash(name) }
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

static LABELS: LazyLock<Mutex<BTreeMap<&'static str, &'static Label>>> = LazyLock::new(Mutex::default);

/// Makes labels known to the reader of decision files. Models and scenarios call it once per process.
///
/// # Panics
/// If two labels share a name.
pub fn register_labels(labels: &[&'static Label]) {
    let mut known = LABELS.lock().expect("no panic while the table of labels is held");
    for label in labels {
        let old = known.insert(label.name, label);
        assert!(old.is_none_or(|old| std::ptr::eq(old, *label)), "two labels called {}", label.name);
    }
}

/// The label called `name`, if registered.
pub fn label_by_name(name: &str) -> Option<&'static Label> {
    LABELS.lock().expect("no panic while the table of labels is held").get(name).copied()
}

/// What a decision is about.
#[derive(Clone, Copy)]
pub struct Key {
    /// The entity.
    pub entity: Entity,
    /// The kind.
    pub label: &'static Label,
    /// Distinguishes decisions of this kind about this entity: a count that the caller keeps, such as the number of an
    /// operation or of a wake-up; 0 if there is only one.
    pub attempt: u32,
}

impl Key {
    fn sort_key(&self) -> (u64, &'static str, u32) {
        (self.entity.0, self.label.name, self.attempt)
    }
}
impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.sort_key() == other.sort_key()
    }
}
impl Eq for Key {}
impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.sort_key().cmp(&other.sort_key())
    }
}
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x} {} {}", self.entity.0, self.label.name, self.attempt)
    }
}

/// A decision that was taken: value and, when recorded, where in the run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The value; never 0.
    pub value: u64,
    /// Virtual time in nanoseconds at which it was drawn.
    pub at_ns: u64,
    /// The entity in words; empty if names were not kept (see [`crate::Config::record`]).
    pub entity_name: String,
}

/// The non-zero decisions of a run.
pub type DecisionMap = BTreeMap<Key, Decision>;

/// Values by the name of the label and by how many decisions of that label came before, for any entity.
pub type Script = BTreeMap<(&'static str, u32), u64>;

/// Where decisions come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Drawn from the seed.
    Seed,
    /// Taken from a map; what is not in it is 0.
    Replay(DecisionMap),
    /// Taken from a script; what is not in it is 0. This is how bytes become a run: they need not name the entities
    /// beforehand. The recorded decisions replay like those of any other run.
    Script(Script),
}

/// Hash bits for one decision; as many as needed.
pub struct Draw(u64);

impl Draw {
    /// A draw from `state`.
    pub fn new(state: u64) -> Self {
        Self(state)
    }
    /// 64 fresh bits.
    #[inline]
    pub fn bits(&mut self) -> u64 {
        let out = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        out
    }
    /// A number below `n` (0 if `n` is 0).
    #[inline]
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }
    /// True with a probability of `ppm` in a million.
    #[inline]
    pub fn ppm(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.below(1_000_000) < u64::from(ppm)
    }
    /// A number in `1..=2^bits`, small ones as likely as large ones: the magnitude is drawn first.
    pub fn magnitude(&mut self, bits: u32) -> u64 {
        let b = self.below(u64::from(bits) + 1) as u32;
        1 + self.below(1 << b)
    }
}

pub(crate) struct Decisions {
    seed: u64,
    given: FixedMap<(u64, u64, u32), u64>,
    /// Per label: how many were asked for, and the remaining values, the last one first.
    script: FixedMap<u64, (u32, Vec<(u32, u64)>)>,
    draw_missing: bool,
    record: Option<DecisionMap>,
    /// Names of entities, if they are kept.
    names: Option<FixedMap<u64, String>>,
    pub(crate) faults_stopped: bool,
}

impl Decisions {
    pub(crate) fn new(seed: u64, source: &Source, record: bool, names: bool) -> Self {
        let (map, draw_missing) = match source {
            Source::Seed => (None, true),
            Source::Replay(map) => (Some(map), false),
            Source::Script(_) => (None, false),
        };
        let mut script: FixedMap<u64, (u32, Vec<(u32, u64)>)> = FixedMap::default();
        if let Source::Script(values) = source {
            for ((label, nth), value) in values.iter().rev() {
                script.entry(text_hash(label)).or_default().1.push((*nth, *value));
            }
        }
        let given =
            map.into_iter().flatten().map(|(k, d)| ((k.entity.0, k.label.id, k.attempt), d.value)).collect();
        Self {
            seed: mix(seed ^ 0x7461_7073_696d),
            given,
            script,
            draw_missing,
            record: record.then(DecisionMap::new),
            names: names.then(FixedMap::default),
            faults_stopped: false,
        }
    }

    #[inline]
    pub(crate) fn decide(
        &mut self,
        entity: Entity,
        label: &'static Label,
        attempt: u32,
        now_ns: u64,
        draw: impl FnOnce(&mut Draw) -> u64,
    ) -> u64 {
        let given = if self.given.is_empty() { None } else { self.given.get(&(entity.0, label.id, attempt)) };
        let value = match given {
            Some(value) => *value,
            None if self.draw_missing => {
                draw(&mut Draw(mix2(self.seed ^ entity.0, label.id.wrapping_add(u64::from(attempt)))))
            }
            None if !self.script.is_empty() => self.next_of_script(entity, label, attempt),
            None => 0,
        };
        if value != 0 && self.record.is_some() {
            self.note(Key { entity, label, attempt }, value, now_ns);
        }
        value
    }

    fn next_of_script(&mut self, entity: Entity, label: &'static Label, attempt: u32) -> u64 {
        let Some((asked, left)) = self.script.get_mut(&label.id) else { return 0 };
        let nth = *asked;
        *asked += 1;
        let value = left.pop_if(|(n, _)| *n == nth).map_or(0, |(_, value)| value);
        // A repeated question gets the same answer, as from every other source.
        self.given.insert((entity.0, label.id, attempt), value);
        value
    }

    #[cold]
    fn note(&mut self, key: Key, value: u64, at_ns: u64) {
        if let Some(record) = &mut self.record {
            record.insert(key, Decision { value, at_ns, entity_name: String::new() });
        }
    }

    pub(crate) fn is_replaying(&self) -> bool {
        !self.draw_missing
    }

    pub(crate) fn has_given(&self) -> bool {
        !self.given.is_empty() || !self.script.is_empty()
    }

    #[inline]
    pub(crate) fn naming(&self) -> bool {
        self.names.is_some()
    }

    pub(crate) fn name(&mut self, entity: Entity, name: impl FnOnce() -> String) {
        if let Some(names) = &mut self.names {
            names.entry(entity.0).or_insert_with(name);
        }
    }

    pub(crate) fn name_of(&self, entity: Entity) -> Option<&str> {
        self.names.as_ref()?.get(&entity.0).map(String::as_str)
    }

    /// The recorded decisions, with the names known by now.
    pub(crate) fn take_record(&mut self) -> DecisionMap {
        let mut record = self.record.take().unwrap_or_default();
        for (key, decision) in &mut record {
            decision.entity_name = self.name_of(key.entity).unwrap_or_default().to_string();
        }
        record
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_taken_in_turn_and_its_record_is_a_map() {
        static A: Label = Label::new("script-test-a", "{}");
        static B: Label = Label::new("script-test-b", "{}");
        let script: Script = [((A.name, 0), 5), ((A.name, 2), 7), ((B.name, 1), 9)].into();
        let mut d = Decisions::new(1, &Source::Script(script), true, false);
        let asks = [(1, &A), (2, &B), (3, &A), (4, &A), (4, &B), (5, &A)];
        let run = |d: &mut Decisions| asks.map(|(e, l)| d.decide(Entity(e), l, 0, 0, |_| 1));
        let values = run(&mut d);
        assert_eq!(values, [5, 0, 0, 7, 9, 0]);
        assert_eq!(d.decide(Entity(1), &A, 0, 0, |_| 1), 5, "asked again");
        assert!(d.is_replaying() && d.has_given());
        let mut again = Decisions::new(1, &Source::Replay(d.take_record()), false, false);
        assert_eq!(run(&mut again), values);
    }
}
