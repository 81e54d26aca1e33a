//! Fuzzing: bytes become runs, and runs that reach something new are kept and varied.
//!
//! ```text
//!   bytes ──► scenario, script of decisions ──► run ──► marks, faults met ──► new? kept in the corpus
//!     ▲                                          └──► broken? ──► its decisions ──► shrunk, saved, replayed as any other
//!     └── varied, crossed ── corpus ◄────────────────────────────────────────────────────────┘
//! ```
//!
//! An input is one byte for the scenario and then records of seven: kind, ordinal, value. "The third operation of the
//! guest writes there", "the fortieth I/O fails", "the power is cut at the ninetieth", "the seventh unsynchronised page
//! is lost", "the L2 entry holds that". Inputs therefore need no format: any bytes describe a run, and most small
//! changes of the bytes are small changes of the run.

use crate::catalog::{crash, damage, failures, nbd, of_format, ring};
use crate::formats::{self, FormatModel};
use crate::guest::NBD_TRICK;
use crate::panics::apart;
use crate::power;
use crate::run::run;
use crate::scenario::Scenario;
use crate::spec::{Outcome, RunSpec};
use crate::workload::{OP, OP_FORM};
use crate::world::SETTING;
use arbitrary::{Arbitrary, Unstructured};
use kernel_model::faults::{IO_FAULT, IO_LATE, LOST, SIZES_LOST, SYNC_LOST};
use kernel_model::sockets;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sim::{DecisionMap, Label, Script, Source, WAKE};
use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock, Mutex};
use tap_host::Bug;
use tap_images::SHIPPED;
use tap_mason::graph::check::check;
use tap_mason::graph::resolve::{Text, resolve};
use tap_mason::graph::show::Picture;
use tap_mason::graph::signature::Classes;
use tap_mason::lang::Sources;

/// A target of fuzzing.
pub struct Subject {
    /// Its name.
    pub name: &'static str,
    scenarios: Vec<&'static Scenario>,
    kinds: &'static [Kind],
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All targets: the images of each format that ships and has metadata, then clients and servers of NBD.
pub static SUBJECTS: LazyLock<Vec<Subject>> = LazyLock::new(|| {
    let formats = formats::ALL.iter().filter(|model| model.has_metadata() && model.is_shipped());
    formats.map(|model| images(*model)).chain([nbd()]).collect()
});

/// Images of a format.
fn images(model: &'static dyn FormatModel) -> Subject {
    let of_format = [
        &crash::OVERLAY_POWER_CUT,
        &damage::DAMAGED_IMAGE,
        &crash::ERRORS,
        &crash::POWER_CUT,
        &crash::RECOVERY_CRASH,
        &ring::TAPDISK_KILLED,
    ];
    let scenarios = of_format.into_iter().filter_map(|scenario| of_format::of(scenario, model));
    let scenarios = scenarios.chain([&ring::FRONTEND_RECONNECT]).collect();
    Subject { name: model.format().name(), scenarios, kinds: &IMAGE_KINDS }
}

/// Clients and servers of NBD.
fn nbd() -> Subject {
    let scenarios = [
        &nbd::NBD_HOSTILE_CLIENT,
        &nbd::NBD_SPLIT_READS,
        &nbd::NBD_HOSTILE_CLIENT,
        &nbd::NBD_SERVER_RESTARTS,
        &nbd::NBD_CLIENT_DIES,
        &nbd::NBD_SLOW_CLIENT,
        &nbd::NBD_SERVER_POWER_CUT,
    ];
    Subject { name: "nbd", scenarios: scenarios.to_vec(), kinds: &NBD_KINDS }
}

/// A kind of record: the label, how many of its first decisions are worth a value, and the width of a value in bits.
struct Kind {
    label: &'static Label,
    first: u32,
    bits: u64,
}

const fn kind(label: &'static Label, first: u32, bits: u32) -> Kind {
    Kind { label, first, bits: (1 << bits) - 1 }
}

/// Kinds of records for images. The more decisions of a kind a run has, the more often it is listed.
static IMAGE_KINDS: [Kind; 17] = [
    kind(&OP, 160, 22),
    kind(&OP, 40, 22),
    kind(&OP, 16, 22),
    kind(&OP_FORM, 160, 3),
    kind(&SETTING, 16, 3),
    kind(&SETTING, 16, 2),
    kind(&failures::FAIL_NTH, 1, 7),
    kind(&power::CRASH_AT, 3, 7),
    kind(&LOST, 256, 8),
    kind(&LOST, 64, 8),
    kind(&SIZES_LOST, 8, 4),
    kind(&IO_FAULT, 256, 11),
    kind(&IO_LATE, 512, 20),
    kind(&SYNC_LOST, 64, 8),
    kind(&WAKE, 4096, 17),
    kind(&damage::DAMAGE, 6, 40),
    kind(&ring::KILL_AFTER, 4, 9),
];
/// Kinds of records for NBD.
static NBD_KINDS: [Kind; 17] = [
    kind(&OP, 160, 22),
    kind(&OP, 24, 22),
    kind(&OP_FORM, 160, 3),
    kind(&SETTING, 24, 3),
    kind(&SETTING, 24, 2),
    kind(&NBD_TRICK, 100, 28),
    kind(&NBD_TRICK, 100, 28),
    kind(&NBD_TRICK, 24, 28),
    kind(&sockets::SEND_CUT, 512, 12),
    kind(&sockets::RECV_CUT, 512, 12),
    kind(&sockets::ARRIVE_LATE, 512, 22),
    kind(&sockets::SOCKET_BUFFER, 8, 2),
    kind(&sockets::PEER_RESET, 8, 1),
    kind(&nbd::CLIENT_DIES, 3, 9),
    kind(&ring::KILL_AFTER, 4, 9),
    kind(&power::CRASH_AT, 3, 8),
    kind(&WAKE, 4096, 17),
];
/// For front ends that reconnect, the same kind of record holds the time of it.
static RECONNECTS: Kind = kind(&ring::RECONNECT_AT, 3, 20);

/// One record of an input.
#[derive(Arbitrary, Debug)]
struct Record {
    kind: u8,
    nth: u16,
    value: u32,
}

/// Bytes of a record.
const RECORD_BYTES: usize = 7;
/// Maximum number of records in an input.
const RECORDS_MAX: usize = 400;

/// The run of `subject` that `bytes` describe.
pub fn spec_of(subject: &Subject, bytes: &[u8], bug: Option<&'static Bug>) -> RunSpec {
    let (scenarios, kinds) = (&subject.scenarios, subject.kinds);
    let mut input = Unstructured::new(bytes);
    let scenario = scenarios[input.arbitrary::<u8>().map_or(0, usize::from) % scenarios.len()];
    let mut script = Script::new();
    while !input.is_empty() && script.len() < RECORDS_MAX {
        let Ok(record) = Record::arbitrary(&mut input) else { break };
        let mut kind = &kinds[usize::from(record.kind) % kinds.len()];
        if std::ptr::eq(kind.label, &ring::KILL_AFTER) && std::ptr::eq(scenario, &ring::FRONTEND_RECONNECT) {
            kind = &RECONNECTS;
        }
        // A label wider than a record's value takes its upper bits from a product, which serves as well as any.
        let value = u64::from(record.value);
        let value = if kind.bits >> 32 == 0 { value } else { value | value.wrapping_mul(0x9e37_79b1) << 16 };
        script.insert((kind.label.name, u32::from(record.nth) % kind.first), value & kind.bits);
    }
    script.retain(|_, value| *value != 0);
    RunSpec { source: Source::Script(script), record: true, ..RunSpec::new(scenario, 0).with_bug(bug) }
}

/// Runs `bytes` once, on this thread.
pub fn run_bytes(subject: &Subject, bytes: &[u8], bug: Option<&'static Bug>) -> (RunSpec, Outcome) {
    let spec = spec_of(subject, bytes, bug);
    let outcome = run(&spec);
    (spec, outcome)
}

/// A target for any fuzzer: runs `bytes` on images of the first format.
///
/// # Panics
/// If an invariant is broken. The message contains the decision file.
pub fn image_target(bytes: &[u8]) {
    let (spec, outcome) = run_bytes(&SUBJECTS[0], bytes, None);
    if outcome.failure.is_some() {
        panic!("an invariant is broken; the decision file:\n{}", spec.to_file(&outcome, "fuzz").print());
    }
}

/// Another target: `bytes` are what a client sends to an NBD server, after a valid negotiation if the first is odd.
///
/// # Panics
/// If the server panics, exceeds its limits, or is damaged by it.
pub fn nbd_stream(bytes: &[u8]) {
    let mut spec =
        RunSpec { source: Source::Replay(DecisionMap::new()), ..RunSpec::new(&nbd::NBD_STREAM, 0) };
    spec.options.stream = Some(bytes.into());
    if let Some(failure) = run(&spec).failure {
        panic!("{}: {}", failure.invariant, failure.detail);
    }
}

/// Another target: `bytes` are the text of a graph.
///
/// # Panics
/// If the language panics, or lays a text out differently the second time.
pub fn mason_text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let classes = Classes(tap_mason::modules::signatures(SHIPPED.iter().copied()));
    let (file, messages) = tap_mason::lang::parse(0, text);
    let (graph, found) = resolve(&classes, &[Text { file: &file, folder: String::new() }]);
    let mut sources = Sources::default();
    sources.add("text", text.to_owned());
    sources.render(&messages, false);
    sources.render(&found, true);
    let checked = check(&classes, &graph, &|_| None);
    sources.render(&checked.messages, false);
    if messages.is_empty() && found.is_empty() && checked.is_good() {
        let picture = Picture { classes: &classes, graph: &graph, checked: &checked };
        assert!(!picture.tree().is_empty() && !picture.svg().is_empty() && !picture.dot().is_empty());
    }
    if let Ok(laid_out) = tap_mason::lang::format(text) {
        assert_eq!(tap_mason::lang::format(&laid_out).as_deref(), Ok(laid_out.as_str()));
    }
}

/// What a run reached, as self-describing numbers.
fn features(subject: &Subject, spec: &RunSpec, outcome: &Outcome) -> Vec<u32> {
    let scenario = subject.scenarios.iter().position(|s| std::ptr::eq(*s, spec.scenario)).unwrap_or(0) as u32;
    let bucket = |n: u64| 64 - n.leading_zeros();
    let mut found = Vec::new();
    let mut reached = Vec::new();
    for (i, n) in outcome.marks.iter().enumerate().filter(|(_, n)| **n > 0) {
        found.push(scenario << 24 | (i as u32) << 8 | bucket(*n));
        reached.push(i as u32);
    }
    let s = &outcome.stats;
    for (i, n) in [s.errors, s.crashes, s.lost_clusters, s.host_ios, outcome.trace.events].iter().enumerate()
    {
        found.push(scenario << 24 | 1 << 20 | (i as u32) << 8 | bucket(*n));
    }
    // Pairs of a fault and what the run had reached.
    let faults: BTreeSet<u32> = outcome
        .decisions
        .iter()
        .filter(|(key, _)| std::ptr::eq(key.label, &IO_FAULT))
        .map(|(_, d)| (d.value & 7) as u32)
        .collect();
    for fault in &faults {
        found.extend(reached.iter().map(|mark| scenario << 24 | 2 << 20 | mark << 8 | fault));
    }
    let lost = outcome.decisions.iter().filter(|(key, _)| std::ptr::eq(key.label, &LOST)).count() as u64;
    found.push(scenario << 24 | 3 << 20 | bucket(lost));
    found
}

/// Parameters of fuzzing.
#[derive(Clone, Debug)]
pub struct FuzzSpec {
    /// What is fuzzed.
    pub subject: &'static Subject,
    /// The seed of the inputs.
    pub seed: u64,
    /// Number of threads.
    pub jobs: usize,
    /// Whether worlds run inside the guard.
    pub guarded: bool,
    /// A seeded bug that is switched on; the first finding then ends the session.
    pub bug: Option<&'static Bug>,
}

/// Results of fuzzing.
#[derive(Debug, Default)]
pub struct FuzzReport {
    /// Runs without a failure.
    pub passed: u64,
    /// Runs with one.
    pub failed: u64,
    /// Inputs kept.
    pub kept: usize,
    /// Features reached.
    pub features: usize,
    /// The first failing run for each scenario and invariant, to be replayed.
    pub findings: Vec<(RunSpec, Outcome)>,
}

#[derive(Default)]
struct State {
    corpus: Vec<Vec<u8>>,
    seen: BTreeSet<u32>,
    report: FuzzReport,
    stop: bool,
}

/// Inputs that a thread runs between two visits to the corpus.
const BATCH: usize = 24;
/// Maximum number of inputs kept.
const CORPUS_MAX: usize = 20_000;

/// Fuzzes until `go_on`, which is called with the numbers of runs and failures, returns `false`.
///
/// # Panics
/// If a thread panicked, which is a bug of the testbed.
pub fn fuzz(spec: &FuzzSpec, mut go_on: impl FnMut(u64, u64) -> bool) -> FuzzReport {
    let state = Mutex::new(State::default());
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for job in 0..spec.jobs.max(1) {
            let (state, tell) = (&state, tell.clone());
            scope.spawn(move || {
                let mut maker = Maker::new(spec.seed, job as u64);
                loop {
                    let inputs = {
                        let state = state.lock().expect("no panic while the state is held");
                        if state.stop {
                            return;
                        }
                        (0..BATCH).map(|_| maker.make(&state.corpus)).collect()
                    };
                    let results = run_batch(spec, inputs);
                    let counts =
                        merge(&mut state.lock().expect("no panic while the state is held"), spec, results);
                    if tell.send(counts).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        for (runs, failed) in told {
            if !go_on(runs, failed) {
                state.lock().expect("no panic while the state is held").stop = true;
            }
        }
    });
    let state = state.into_inner().expect("no panic while the state is held");
    FuzzReport { kept: state.corpus.len(), features: state.seen.len(), ..state.report }
}

type Ran = (Vec<u8>, Vec<u32>, Option<(RunSpec, Outcome)>);

fn run_batch(spec: &FuzzSpec, mut inputs: Vec<Vec<u8>>) -> Vec<Ran> {
    let (subject, bug) = (spec.subject, spec.bug);
    inputs.reverse();
    // Shared, because a thread that a run blocks for good leaves them here.
    let shared = Arc::new(Mutex::new((inputs, Vec::<Ran>::new())));
    loop {
        let mine = Arc::clone(&shared);
        let ended = apart(spec.guarded, spec.seed, move || {
            let next = || mine.lock().expect("no panic while inputs are held").0.pop();
            while let Some(bytes) = next() {
                let (spec, outcome) = run_bytes(subject, &bytes, bug);
                let found = features(subject, &spec, &outcome);
                let broken = outcome.failure.is_some();
                // From here on the run is defined by its decisions, not by the input.
                let replay = RunSpec { source: Source::Replay(outcome.decisions.clone()), ..spec };
                let ran = (bytes, found, broken.then_some((replay, outcome)));
                mine.lock().expect("no panic while results are held").1.push(ran);
            }
        });
        let mut shared = shared.lock().expect("no panic while results are held");
        match ended {
            Ok(()) => return std::mem::take(&mut shared.1),
            Err((replay, outcome)) => shared.1.push((Vec::new(), Vec::new(), Some((replay, *outcome)))),
        }
    }
}

fn merge(state: &mut State, spec: &FuzzSpec, results: Vec<Ran>) -> (u64, u64) {
    for (bytes, found, broken) in results {
        let before = state.seen.len();
        state.seen.extend(found);
        if state.seen.len() > before && state.corpus.len() < CORPUS_MAX {
            state.corpus.push(bytes);
        }
        let Some((run, outcome)) = broken else {
            state.report.passed += 1;
            continue;
        };
        state.report.failed += 1;
        let class = |r: &(RunSpec, Outcome)| (r.0.scenario.name, r.1.failure.as_ref().map(|f| f.invariant));
        let finding = (run, outcome);
        if !state.report.findings.iter().any(|f| class(f) == class(&finding)) {
            state.report.findings.push(finding);
        }
        state.stop |= spec.bug.is_some();
    }
    (state.report.passed + state.report.failed, state.report.failed)
}

/// Makes inputs.
struct Maker(ChaCha8Rng);

impl Maker {
    fn new(seed: u64, job: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(job);
        Self(rng)
    }

    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill_bytes(&mut bytes);
        bytes
    }

    fn make(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        if corpus.len() < 16 || self.below(8) == 0 {
            let records = 4 + self.below(120);
            return self.bytes(1 + records * RECORD_BYTES);
        }
        let mut input = corpus[self.below(corpus.len())].clone();
        if self.below(6) == 0 {
            let other = &corpus[self.below(corpus.len())];
            input.truncate(1 + self.below(input.len() / RECORD_BYTES + 1) * RECORD_BYTES);
            let from = 1 + self.below(other.len() / RECORD_BYTES + 1) * RECORD_BYTES;
            input.extend_from_slice(other.get(from..).unwrap_or_default());
        }
        for _ in 0..1 + self.below(6) {
            self.vary(&mut input);
        }
        input.truncate(1 + RECORDS_MAX * RECORD_BYTES);
        input
    }

    fn vary(&mut self, input: &mut Vec<u8>) {
        let records = input.len().saturating_sub(1) / RECORD_BYTES;
        let at = 1 + self.below(records.max(1)) * RECORD_BYTES;
        let how = if records == 0 { 0 } else { self.below(8) };
        match how {
            0 | 1 => {
                let new = self.bytes(RECORD_BYTES);
                input.splice(at.min(input.len())..at.min(input.len()), new);
            }
            2 => drop(input.drain(at..at + RECORD_BYTES)),
            3 => {
                // Repeat a record, one later.
                let mut copy = input[at..at + RECORD_BYTES].to_vec();
                copy[1] = copy[1].wrapping_add(1);
                input.splice(at..at, copy);
            }
            4 => input[at + self.below(RECORD_BYTES)] = self.0.next_u64() as u8,
            5 => input[at + self.below(RECORD_BYTES)] ^= 1 << self.below(8),
            6 => {
                let byte = &mut input[at + 3 + self.below(4)];
                *byte = byte.wrapping_add([1, 255][self.below(2)]);
            }
            _ => input[0] = self.0.next_u64() as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probes::find_bug;

    #[test]
    fn records_have_the_length_that_is_parsed() {
        let bytes = [1; 1 + 3 * RECORD_BYTES];
        let mut input = Unstructured::new(&bytes[1..]);
        Record::arbitrary(&mut input).unwrap();
        assert_eq!(input.len(), 2 * RECORD_BYTES);
    }

    #[test]
    fn any_bytes_describe_a_run_that_replays() {
        crate::run::prepare();
        for subject in SUBJECTS.iter() {
            let mut maker = Maker::new(1, 0);
            let mut replayed = 0;
            for len in [0, 1, 2, 7, 8, 100, 400, 401, 402, 403, 404, 405, 406] {
                let mut bytes = maker.bytes(len);
                if let Some(first) = bytes.first_mut() {
                    *first = len as u8;
                }
                let (spec, outcome) = run_bytes(subject, &bytes, None);
                assert_eq!(outcome.failure, None, "{} with {len} bytes", spec.scenario.name);
                let again = run(&RunSpec { source: Source::Replay(outcome.decisions.clone()), ..spec });
                assert_eq!(again.trace.hash, outcome.trace.hash, "{} with {len} bytes", spec.scenario.name);
                replayed += usize::from(!outcome.decisions.is_empty());
            }
            assert!(replayed >= 7, "{replayed}");
        }
    }

    #[test]
    fn a_server_survives_any_bytes() {
        crate::run::prepare();
        let mut maker = Maker::new(2, 0);
        for len in (0..60).map(|i| i * 7) {
            let mut bytes = maker.bytes(len);
            // Half of them begin as requests do.
            if len > 40 && len % 2 == 0 {
                bytes[0] |= 1;
                bytes[1..5].copy_from_slice(&tap_abi::nbd::REQUEST_MAGIC.to_be_bytes());
                bytes[5..9].copy_from_slice(&[0, 0, 0, len as u8 % 8]);
            }
            nbd_stream(&bytes);
        }
    }

    #[test]
    fn graphs_may_be_any_text() {
        let text = include_bytes!("../../drivers/mason/examples/desktops.mason");
        let mut maker = Maker::new(3, 0);
        for _ in 0..400 {
            let (from, with) = (maker.bytes(2), maker.bytes(3));
            let at = usize::from(u16::from_le_bytes([from[0], from[1]])) % text.len();
            let mut changed = text.to_vec();
            let to = (at + usize::from(with[0] % 24)).min(changed.len());
            changed.splice(at..to, with[1..].iter().map(|byte| byte % 96 + 32));
            mason_text(&changed);
        }
    }

    #[test]
    fn a_planted_bug_is_found() {
        crate::run::prepare();
        let last = SUBJECTS.last().unwrap();
        for (subject, bug) in [(&SUBJECTS[0], "overlay-drops-rest"), (last, "nbd-wrong-cookie")] {
            let spec = FuzzSpec { subject, seed: 1, jobs: 1, guarded: false, bug: find_bug(bug) };
            let report = fuzz(&spec, |runs, _| runs < 2000);
            let (run_spec, outcome) = &report.findings[0];
            assert_eq!(run(run_spec).failure, outcome.failure, "the finding replays");
            assert!(report.features > 10 && report.kept > 0);
        }
    }
}
