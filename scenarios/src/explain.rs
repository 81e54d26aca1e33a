//! Decisions in words.

use crate::guest::{
    KEYS, NBD_GREETING, NBD_LIE, NBD_TRICK, TRICK, describe_greeting, describe_keys, describe_nbd_lie,
    describe_nbd_trick, describe_trick,
};
use crate::workload::{OP, Op};
use crate::world::SETTING;
use kernel_model::calls::{CALL_FAULT, describe_call_fault};
use kernel_model::faults::{BAD_SECTORS, IO_FAULT, describe_fault};
use sim::{Decision, Key, micros};

/// Upper bound of a scenario's disk; operations are shown modulo the disk.
const SHOWN_SECTORS: u64 = 1 << 40;

/// One decision in words.
pub fn decision(key: &Key, d: &Decision) -> String {
    let who = if d.entity_name.is_empty() { format!("{:016x}", key.entity.0) } else { d.entity_name.clone() };
    let is = |label: &sim::Label| key.label.name == label.name;
    let what = if is(&SETTING) && !d.entity_name.is_empty() {
        // The name contains the setting and its value.
        return who;
    } else if is(&OP) {
        let op = operation(d).map_or("nothing".into(), |op| op.to_string());
        format!("operation {}: {op}", key.attempt)
    } else if is(&IO_FAULT) {
        describe_fault(d.value)
    } else if is(&BAD_SECTORS) {
        bad_sectors(d.value)
    } else if is(&CALL_FAULT) {
        describe_call_fault(d.value)
    } else if is(&TRICK) {
        format!("trick {}: {}", key.attempt, describe_trick(d.value))
    } else if is(&NBD_TRICK) {
        format!("message {}: {}", key.attempt, describe_nbd_trick(d.value))
    } else if is(&NBD_LIE) {
        format!("answer {} is wrong: {}", key.attempt, describe_nbd_lie(d.value))
    } else if is(&NBD_GREETING) {
        format!("greeting {} is wrong: {}", key.attempt, describe_greeting(d.value))
    } else if is(&KEYS) {
        describe_keys(d.value).into()
    } else {
        in_words(key, d.value)
    };
    format!("{who}: {what}")
}

/// Which sectors become unreadable.
fn bad_sectors(value: u64) -> String {
    let reads = if value & 0x100 == 0 { "fail" } else { "end before them" };
    let becomes = if (value & 0xff).count_ones() == 1 { "becomes" } else { "become" };
    let (sectors, after) = (sectors_of(value & 0xff), value >> 9);
    format!("{sectors} {becomes} unreadable after {after} more operations; direct reads {reads}")
}

/// The operation that a decision of that kind stands for.
pub fn operation(d: &Decision) -> Option<Op> {
    Op::decode(d.value, SHOWN_SECTORS)
}

/// A decision by the words of its label: `{} ns` is a time, `(mask)` a set of sectors, `{n}` the attempt.
fn in_words(key: &Key, value: u64) -> String {
    let words = key.label.words.replace("{n}", &key.attempt.to_string());
    if let Some(words) = words.strip_suffix(" (mask)") {
        return words.replace("sectors {}", &sectors_of(value));
    }
    words.replace("{} ns", &time(value)).replace("{}", &value.to_string())
}

/// A time in the unit of traces, as short as it is exact.
fn time(ns: u64) -> String {
    let text = micros(ns);
    format!("{} us", text.trim_end_matches('0').trim_end_matches('.'))
}

/// The sectors of a page whose bits are set, in words.
fn sectors_of(mask: u64) -> String {
    if mask & 0xff == 0xff {
        return "all sectors".into();
    }
    let set: Vec<String> = (0..8).filter(|i| mask & 1 << i != 0).map(|i| i.to_string()).collect();
    format!("{} {}", if set.len() == 1 { "sector" } else { "sectors" }, set.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sim::{Entity, Label};

    fn words(label: &'static Label, attempt: u32, value: u64, name: &str) -> String {
        let key = Key { entity: Entity(0xabc), label, attempt };
        decision(&key, &Decision { value, at_ns: 0, entity_name: name.into() })
    }

    #[test]
    fn decisions_read_well() {
        assert_eq!(words(&SETTING, 0, 2, "cluster-bits is 9"), "cluster-bits is 9");
        assert_eq!(
            words(&sim::WAKE, 3, 1_234, "tapdisk op 7"),
            "tapdisk op 7: its turn 3 is delayed by 1.234 us"
        );
        assert_eq!(
            words(&kernel_model::faults::LOST, 0, 0b1001, "write of x, page 3"),
            "write of x, page 3: the power cut takes sectors 0, 3 of the page"
        );
        assert_eq!(words(&IO_FAULT, 0, 6, "sync of x"), "sync of x: fails with EIO");
        assert_eq!(
            words(&BAD_SECTORS, 0, 0b101 | 7 << 9, "page 2 of x"),
            "page 2 of x: sectors 0, 2 become unreadable after 7 more operations; direct reads fail"
        );
        assert_eq!(
            words(&BAD_SECTORS, 0, 0b100 | 1 << 8, "page 2 of x"),
            "page 2 of x: sector 2 becomes unreadable after 0 more operations; direct reads end before them"
        );
        assert_eq!(words(&OP, 5, 3 | 7 << 2 | 16 << 10, "guest"), "guest: operation 5: write 16+8");
        assert_eq!(words(&sim::WAKE, 0, 5, ""), "0000000000000abc: its turn 0 is delayed by 0.005 us");
        assert_eq!(
            (time(20_000_000), time(999), time(1_230)),
            ("20000 us".into(), "0.999 us".into(), "1.23 us".into())
        );
    }

    #[test]
    fn every_label_has_words_for_its_value() {
        crate::run::prepare();
        for label in
            kernel_model::faults::LABELS.iter().chain(&xen_model::LABELS).chain(crate::catalog::LABELS)
        {
            let text = words(label, 1, 1, "entity");
            assert!(!text.contains(['{', '}']) && text.len() > "entity: ".len(), "{}: {text}", label.name);
        }
    }
}
