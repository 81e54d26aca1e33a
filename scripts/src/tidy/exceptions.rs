//! The exceptions to the rules: `scripts/tidy.toml`.

use super::{Finding, Result, Sources};
use serde::Deserialize;

const PATH: &str = "scripts/tidy.toml";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    #[serde(default)]
    exception: Vec<Exception>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    /// `long-function`, `circle` or `dead`.
    rule: String,
    /// The subject, as the rule names it.
    what: String,
    /// Why it stays.
    reason: String,
    #[serde(skip)]
    used: bool,
}

/// The list, and which entries were needed.
pub(super) struct Exceptions(Vec<Exception>);

impl Exceptions {
    pub(super) fn read(sources: &Sources) -> Result<Self> {
        if !sources.files().any(|path| path == PATH) {
            return Ok(Self(Vec::new()));
        }
        Self::parse(&std::fs::read_to_string(PATH)?)
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let list: List = toml::from_str(text).map_err(|error| format!("{PATH}: {error}"))?;
        if let Some(bare) = list.exception.iter().find(|one| one.reason.trim().is_empty()) {
            return Err(format!("{PATH}: {} {} has no reason", bare.rule, bare.what).into());
        }
        Ok(Self(list.exception))
    }

    /// Whether `what` is allowed to break `rule`.
    pub(super) fn allow(&mut self, rule: &str, what: &str) -> bool {
        let found = self.0.iter_mut().find(|one| one.rule == rule && one.what == what);
        found.map(|one| one.used = true).is_some()
    }

    /// The exceptions that were not needed.
    pub(super) fn unused(&self) -> Vec<Finding> {
        let unused = self.0.iter().filter(|one| !one.used);
        unused.map(|one| Finding::new(PATH, 0, format!("nothing needs {} {}", one.rule, one.what))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_has_a_reason_and_is_needed() {
        let one =
            |reason: &str| format!("[[exception]]\nrule = 'dead'\nwhat = 'a.rs: b'\nreason = '{reason}'");
        assert!(Exceptions::parse(&one(" ")).is_err() && Exceptions::parse("[[other]]").is_err());
        let mut list = Exceptions::parse(&one("so")).unwrap();
        assert!(!list.allow("circle", "a.rs: b") && !list.allow("dead", "a.rs"));
        assert_eq!(list.unused().len(), 1);
        assert!(list.allow("dead", "a.rs: b"));
        assert_eq!(list.unused(), []);
    }
}
