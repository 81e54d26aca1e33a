//! Mutants that are set aside because their change cannot be seen, with the proofs.

use super::sample::Mutant;
use serde::Deserialize;
use std::path::Path;

/// Where they are listed, from the top of the tree.
pub(crate) const FILE: &str = "scripts/mutants-equivalent.toml";
/// Shortest text that can be a proof, in bytes.
const PROOF_LEAST: usize = 40;

/// A mutant that is set aside.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Equivalent {
    /// The file.
    pub file: String,
    /// The kind of slip.
    pub operator: String,
    /// The source line where it begins, without surrounding whitespace.
    pub line: String,
    /// The code with the slip; absent if all of that kind on that line are meant.
    pub becomes: Option<String>,
    /// Why nothing can notice.
    pub proof: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    #[serde(default)]
    equivalent: Vec<Equivalent>,
}

impl Equivalent {
    /// Whether `mutant` is it.
    pub(crate) fn is(&self, mutant: &Mutant) -> bool {
        self.file == mutant.file
            && self.operator == mutant.slip.operator
            && self.line == mutant.source_line
            && self.becomes.as_ref().is_none_or(|becomes| *becomes == mutant.slip.becomes)
    }
}

/// The equivalents of the tree at `top`.
///
/// # Errors
/// What is wrong with the list.
pub(crate) fn load(top: &Path) -> Result<Vec<Equivalent>, String> {
    let text = std::fs::read_to_string(top.join(FILE)).map_err(|e| format!("failed to read {FILE}: {e}"))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Vec<Equivalent>, String> {
    let list: List = toml::from_str(text).map_err(|e| format!("{FILE}: {e}"))?;
    for entry in &list.equivalent {
        if entry.proof.trim().len() < PROOF_LEAST {
            return Err(format!("{FILE}: {} in {} has no proof", entry.operator, entry.file));
        }
    }
    Ok(list.equivalent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_the_tree_can_be_read() {
        load(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
    }

    #[test]
    fn an_entry_needs_a_proof() {
        let entry = |proof: &str| {
            parse(&format!("[[equivalent]]\nfile = 'f'\noperator = 'o'\nline = 'l'\nproof = '{proof}'\n"))
        };
        assert!(entry("trivial").is_err());
        let proof = "the value is overwritten by the next line before anything reads it";
        assert_eq!(entry(proof).unwrap()[0].proof, proof);
        assert!(parse("[[equivalent]]\nfile = 'f'\n").is_err() && parse("[[other]]\n").is_err());
    }
}
