//! Checkers that are broken on purpose, to show that each of them would notice something.
//!
//! A run can ask for one broken oracle ([`crate::world::RunOptions::oracle`]), and so can the environment variable
//! `TAPSIM_ORACLE`, for unit tests. `tapsim bugs --oracles` breaks each in turn; the result of a seeded bug's saved run
//! must then change, or a test of the checkers must fail.

use super::Invariant;
use std::cell::Cell;
use std::sync::LazyLock;

/// One way to break a checker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Oracle {
    /// Violations of this invariant are dropped.
    Deaf(Invariant),
    /// A flush makes nothing durable.
    FlushForgotten,
    /// A read may see versions that were overwritten before it.
    StaleAllowed,
    /// Order of submission is not checked.
    OrderIgnored,
    /// Zeros are accepted wherever there were zeros at any time.
    ZerosAnywhere,
    /// Reads after a power cut are not checked.
    ReadsAfterCut,
    /// What was read after a crash may change again.
    SettledForgotten,
    /// A tag is accepted in any sector.
    PlaceIgnored,
    /// A tag is accepted from any writer.
    WriterIgnored,
    /// The body of a sector need not match its tag.
    TornAllowed,
    /// Explored crash states may hold anything.
    SurvivorsIgnored,
    /// Clusters may have several owners.
    SharedClusters,
    /// Compressed extents may overlap.
    OverlappingExtents,
    /// Entries may contain any offset.
    WildEntries,
    /// L2 tables may lie beyond the end of the file.
    TablesBeyond,
    /// Compressed clusters need not inflate.
    NothingInflated,
    /// Any number of clusters may be lost.
    LeaksIgnored,
    /// A run that is stuck passes.
    StallIgnored,
    /// A request may be answered twice or never.
    AnswersIgnored,
    /// Grants, channels and records may be left at the end.
    LeftoversIgnored,
    /// A request may fail without a cause.
    ErrorsIgnored,
    /// Malformed requests may be answered with any status.
    StatusIgnored,
    /// Any report of the shipped check is accepted.
    ShippedIgnored,
}

impl Oracle {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Oracle> {
        Self::SINGLE.iter().copied().chain(Invariant::ALL.iter().map(|invariant| Self::Deaf(*invariant)))
    }

    const SINGLE: &'static [Oracle] = &[
        Self::FlushForgotten,
        Self::StaleAllowed,
        Self::OrderIgnored,
        Self::ZerosAnywhere,
        Self::ReadsAfterCut,
        Self::SettledForgotten,
        Self::PlaceIgnored,
        Self::WriterIgnored,
        Self::TornAllowed,
        Self::SurvivorsIgnored,
        Self::SharedClusters,
        Self::OverlappingExtents,
        Self::WildEntries,
        Self::TablesBeyond,
        Self::NothingInflated,
        Self::LeaksIgnored,
        Self::StallIgnored,
        Self::AnswersIgnored,
        Self::LeftoversIgnored,
        Self::ErrorsIgnored,
        Self::StatusIgnored,
        Self::ShippedIgnored,
    ];

    /// Its name in kebab case, such as `flush-forgotten` or `deaf-g7`.
    pub fn name(self) -> String {
        if let Self::Deaf(invariant) = self {
            return format!("deaf-{}", invariant.to_string().to_ascii_lowercase());
        }
        let mut out = String::new();
        for c in format!("{self:?}").chars() {
            if c.is_ascii_uppercase() && !out.is_empty() {
                out.push('-');
            }
            out.push(c.to_ascii_lowercase());
        }
        out
    }

    /// The one called `name`.
    pub fn find(name: &str) -> Option<Self> {
        Self::all().find(|oracle| oracle.name() == name)
    }

    /// Why nothing has to notice that this oracle is broken, where that is so.
    pub fn excuse(self) -> Option<&'static str> {
        match self {
            Self::Deaf(Invariant::G9) => Some(
                "a sector that changes after it was read is reported only by the unit tests of the history, \
                      which involve no verdict; settled-forgotten breaks the rule itself",
            ),
            _ => None,
        }
    }
}

static FROM_ENVIRONMENT: LazyLock<Option<Oracle>> = LazyLock::new(|| {
    let name = std::env::var("TAPSIM_ORACLE").ok()?;
    // A misspelt name would look like an oracle that nothing notices.
    Some(Oracle::find(&name).unwrap_or_else(|| panic!("TAPSIM_ORACLE: unknown oracle {name:?}")))
});

thread_local! {
    static BROKEN: Cell<Option<Oracle>> = Cell::new(*FROM_ENVIRONMENT);
}

/// Breaks `oracle` for the runs of this thread, until the next call.
pub(crate) fn break_for_run(oracle: Option<Oracle>) {
    BROKEN.set(oracle.or(*FROM_ENVIRONMENT));
}

/// Whether `oracle` is broken.
#[inline]
pub(crate) fn is_broken(oracle: Oracle) -> bool {
    BROKEN.get() == Some(oracle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oracles_have_unique_names() {
        let names: std::collections::BTreeSet<String> = Oracle::all().map(Oracle::name).collect();
        assert_eq!(names.len(), Oracle::all().count());
        assert!(Oracle::all().all(|oracle| Oracle::find(&oracle.name()) == Some(oracle)));
        assert_eq!(Oracle::find("deaf-g7"), Some(Oracle::Deaf(Invariant::G7)));
        assert!(Oracle::find("none").is_none());
    }
}
