//! Which mutants are made: a sample over all kinds of slips, the same on every machine for the same code.

use super::operators::{Slip, slips};
use super::render::compatible;
use std::collections::BTreeMap;
use std::path::Path;
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Crates of the stack that have mutants.
const CRATES: [&str; 6] = ["core", "images", "nbd", "programs", "ring", "xenbus"];
/// Files of tests, or that only produce output for people.
const LEFT_OUT: [&str; 11] = [
    "/tests/",
    "/tests.rs",
    "_tests.rs",
    "/testing/",
    "/testing.rs",
    "/bin/",
    "/usage.rs",
    "/console.rs",
    "/terminal.rs",
    "/error.rs",
    "/info.rs",
];

/// A mutant.
#[derive(Clone, Debug)]
pub(crate) struct Mutant {
    /// Its number in the binary, from 1; 0 before it has one.
    pub number: u32,
    /// Path from the top of the tree.
    pub file: String,
    /// Line of the file, from 1.
    pub line: usize,
    /// That line, without surrounding whitespace.
    pub source_line: String,
    /// The slip there.
    pub slip: Slip,
}

impl Mutant {
    /// File and line.
    pub(crate) fn place(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}

/// A hash of a text, the same on every machine.
pub(crate) fn hash(seed: u64, text: &str) -> u64 {
    let mut h = seed ^ 0xcbf2_9ce4_8422_2325;
    for byte in text.bytes() {
        h = (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    h ^= h >> 32;
    h = h.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^ h >> 29
}

/// The seed of the sample: the last commit that touched code of the drivers.
pub(crate) fn usual_seed(sh: &Shell) -> Result<u64> {
    let commit = cmd!(sh, "git log -1 --format=%H -- drivers/*.rs").quiet().read()?;
    let digits = commit.get(..16).ok_or("no commit touches drivers: --seed gives the sample another seed")?;
    Ok(u64::from_str_radix(digits, 16)?)
}

/// Every mutant of the files below `top` whose path begins with `only`.
pub(crate) fn all(sh: &Shell, top: &Path, only: &str) -> Result<Vec<Mutant>> {
    let folders = CRATES.map(|name| format!("drivers/{name}/src"));
    let files = cmd!(sh, "git ls-files -co --exclude-standard -- {folders...}").quiet().read()?;
    let mut found = Vec::new();
    for file in files.lines().filter(|f| f.ends_with(".rs") && f.starts_with(only)) {
        if LEFT_OUT.iter().any(|part| file.contains(part)) || !top.join(file).exists() {
            continue;
        }
        let source = std::fs::read_to_string(top.join(file))?;
        for slip in slips(&source).map_err(|e| format!("{file}: {e}"))? {
            let start = slip.edit.span.start;
            let line = source[..start].matches('\n').count() + 1;
            let source_line = source.lines().nth(line - 1).unwrap_or("").trim().to_string();
            found.push(Mutant { number: 0, file: file.into(), line, source_line, slip });
        }
    }
    Ok(found)
}

/// Up to `count` of `all`, from every kind of slip in turn, so that rare kinds are included; numbered from 1.
pub(crate) fn sample(all: Vec<Mutant>, count: usize, seed: u64) -> Vec<Mutant> {
    let mut kinds: BTreeMap<&'static str, Vec<(u64, Mutant)>> = BTreeMap::new();
    for mutant in all {
        let at = mutant.slip.edit.span.clone();
        let name = format!("{} {} {at:?} {}", mutant.file, mutant.slip.operator, mutant.slip.becomes);
        kinds.entry(mutant.slip.operator).or_default().push((hash(seed, &name), mutant));
    }
    for kind in kinds.values_mut() {
        kind.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.place().cmp(&b.1.place())));
    }
    let mut chosen: Vec<Mutant> = Vec::new();
    while chosen.len() < count && kinds.values().any(|kind| !kind.is_empty()) {
        for kind in kinds.values_mut() {
            // Two overlapping edits cannot be in one binary.
            while let Some((_, mutant)) = kind.pop() {
                let span = &mutant.slip.edit.span;
                let apart =
                    chosen.iter().all(|c| c.file != mutant.file || compatible(&c.slip.edit.span, span));
                if apart && chosen.len() < count {
                    chosen.push(Mutant { number: chosen.len() as u32 + 1, ..mutant });
                    break;
                }
            }
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutants() -> Vec<Mutant> {
        let source = "fn f() { a(); b(); c.wake(); if x < 1 { d(); } }";
        let of =
            |slip: Slip| Mutant { number: 0, file: "f.rs".into(), line: 1, source_line: String::new(), slip };
        slips(source).unwrap().into_iter().map(of).collect()
    }

    #[test]
    fn samples_have_every_kind_and_no_crossing_edits() {
        let all = mutants();
        let some = sample(all.clone(), 7, 1);
        let kinds: std::collections::BTreeSet<_> = some.iter().map(|m| m.slip.operator).collect();
        assert_eq!((some.len(), kinds.len()), (7, 7), "{kinds:?}");
        assert_eq!(some.iter().map(|m| m.number).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
        let places = |seed| sample(all.clone(), 5, seed).iter().map(|m| m.slip.clone()).collect::<Vec<_>>();
        assert_eq!(places(3), places(3));
        assert!((0..20).any(|seed| places(seed) != places(3)));
        let everything = sample(all, 1000, 0);
        for (i, a) in everything.iter().enumerate() {
            let crosses = |b: &Mutant| !compatible(&a.slip.edit.span, &b.slip.edit.span);
            assert!(!everything[i + 1..].iter().any(crosses));
        }
    }
}
