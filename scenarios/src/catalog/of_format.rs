//! Scenarios for every format: a body each, which becomes a scenario for each format that it fits.
//!
//! ```text
//!   formats::ALL  ×  ALL  ──fits──►  "FORMAT-power-cut", "FORMAT-errors", ...
//! ```

use super::{bad_sectors, crash, created, damage, ring, scale};
use crate::formats::{self, FormatModel};
use crate::scenario::{OfFormat, Scenario};
use sim::Sim;
use std::sync::LazyLock;

/// All of them.
static ALL: [&OfFormat; 11] = [
    &crash::POWER_CUT,
    &crash::OVERLAY_POWER_CUT,
    &crash::FILLED_POWER_CUT,
    &crash::RECOVERY_CRASH,
    &crash::ERRORS,
    &crash::ZEROS,
    &bad_sectors::BAD_SECTORS,
    &damage::DAMAGED_IMAGE,
    &scale::SCALE,
    &scale::FULL,
    &created::CREATED,
];

/// Those on a ring, which run the shipped programs.
static ON_RING: [&OfFormat; 1] = [&ring::TAPDISK_KILLED];

/// Those that explore every crash state; they are neither listed nor found by name.
static EXPLORED: [&OfFormat; 2] = [&crash::EXPLORE, &crash::EXPLORE_OVERLAY];

/// A scenario of a format.
pub(super) struct Made {
    pub(super) scenario: &'static Scenario,
    /// It needs few runs: it has been swept for a long time, or the format is an example.
    pub(super) settled: bool,
}

/// The scenario of `of_format` for `model`, if it fits.
pub fn of(of_format: &OfFormat, model: &dyn FormatModel) -> Option<&'static Scenario> {
    let name = named(of_format.name, model);
    all().iter().map(|made| made.scenario).find(|scenario| scenario.name == name)
}

fn named(text: &str, model: &dyn FormatModel) -> String {
    text.replace("FORMAT", model.format().name())
}

/// Called once per scenario, which is kept for good.
fn make(scenario: &'static OfFormat, model: &'static dyn FormatModel) -> Made {
    let made = Scenario {
        name: named(scenario.name, model).leak(),
        about: named(scenario.about, model).leak(),
        storage: Box::leak(Box::new(move |sim: &Sim| (scenario.storage)(sim, model))),
        body: Box::leak(Box::new(move |world| (scenario.body)(world, model))),
    };
    Made { scenario: Box::leak(Box::new(made)), settled: scenario.settled || !model.is_shipped() }
}

fn each(
    scenarios: &'static [&'static OfFormat],
    fits: fn(&dyn FormatModel) -> bool,
) -> impl Iterator<Item = Made> {
    let of = move |model: &'static dyn FormatModel| {
        let fit = scenarios.iter().filter(move |scenario| fits(model) && (scenario.fits)(model));
        fit.map(move |scenario| make(scenario, model))
    };
    formats::ALL.iter().flat_map(move |model| of(*model))
}

/// The scenarios of all formats.
pub(super) fn all() -> &'static [Made] {
    static MADE: LazyLock<Vec<Made>> =
        LazyLock::new(|| each(&ALL, |_| true).chain(each(&ON_RING, |model| model.is_shipped())).collect());
    &MADE
}

/// Those of formats that ship that explore every crash state.
pub fn explored() -> &'static [&'static Scenario] {
    static MADE: LazyLock<Vec<&Scenario>> =
        LazyLock::new(|| each(&EXPLORED, |model| model.is_shipped()).map(|made| made.scenario).collect());
    &MADE
}
