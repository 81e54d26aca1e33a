//! What to run, and the outcome.
//!
//! ```text
//!   decision file ──► RunSpec ──► run ──► Outcome ──► decision file
//! ```

use crate::catalog;
use crate::check::Failure;
use crate::check::oracle::Oracle;
use crate::explore::{BadState, Explored};
use crate::formats::RealImage;
use crate::probes::find_bug;
use crate::report::images::Images;
use crate::scenario::Scenario;
use crate::world::{RunOptions, Stats};
use sim::{DecisionMap, RunFile, Source, TraceLevel, TraceReport};
use std::sync::Arc;
use tap_host::Bug;

/// What to run.
#[derive(Clone, Debug)]
pub struct RunSpec {
    /// Which scenario.
    pub scenario: &'static Scenario,
    /// The seed.
    pub seed: u64,
    /// Where decisions come from.
    pub source: Source,
    /// Settings that are not decisions.
    pub options: RunOptions,
    /// How much of the trace is kept.
    pub trace: TraceLevel,
    /// Whether decisions are recorded.
    pub record: bool,
}

impl RunSpec {
    /// A plain run of `seed`.
    pub fn new(scenario: &'static Scenario, seed: u64) -> Self {
        Self {
            scenario,
            seed,
            source: Source::Seed,
            options: RunOptions::default(),
            trace: TraceLevel::Hash,
            record: false,
        }
    }

    /// With a seeded bug.
    pub fn with_bug(mut self, bug: Option<&'static Bug>) -> Self {
        self.options.bug = bug;
        self
    }

    /// The options that make it what it is.
    fn switches(&self) -> String {
        let bug = self.options.bug.map_or(String::new(), |bug| format!(" --bug {}", bug.name()));
        format!("{bug}{}", if self.options.canary { " --canary" } else { "" })
    }

    /// Scenario, seed, and what was switched on.
    pub fn heading(&self) -> String {
        format!("{} seed {}{}", self.scenario.name, self.seed, self.switches())
    }

    /// The command that runs the seed again.
    pub fn command(&self) -> String {
        format!("cargo tapsim run {} {}{}", self.scenario.name, self.seed, self.switches())
    }

    /// The run that a decision file describes.
    ///
    /// # Errors
    /// What the file asks for that does not exist.
    pub fn from_file(file: &RunFile) -> Result<Self, String> {
        let scenario = catalog::find(&file.scenario).ok_or_else(|| {
            format!("unknown scenario {:?}: `tapsim list` lists the known ones", file.scenario)
        })?;
        let mut spec = Self::new(scenario, file.seed);
        if let Some(name) = file.option("bug") {
            let bug = find_bug(name);
            spec.options.bug = Some(bug.ok_or_else(|| format!("unknown seeded bug {name:?}"))?);
        }
        spec.options.canary = file.option("canary") == Some("on");
        if let Some(name) = file.option("oracle") {
            spec.options.oracle = Some(Oracle::find(name).ok_or_else(|| format!("unknown oracle {name:?}"))?);
        }
        if let Some(path) = file.option("image") {
            spec.options.image = Some(Arc::new(RealImage::load(path.as_ref())?));
        }
        spec.source = Source::Replay(file.decisions.clone());
        Ok(spec)
    }

    /// The decision file of a run.
    pub fn to_file(&self, outcome: &Outcome, revision: &str) -> RunFile {
        let mut options = Vec::new();
        if let Some(bug) = self.options.bug {
            options.push(("bug".into(), bug.name().into()));
        }
        if self.options.canary {
            options.push(("canary".into(), "on".into()));
        }
        if let Some(oracle) = self.options.oracle {
            options.push(("oracle".into(), oracle.name()));
        }
        if let Some(image) = &self.options.image {
            options.push(("image".into(), image.path().into()));
        }
        let story = outcome.failure.iter().map(|f| format!("{}: {}", f.invariant, f.detail));
        RunFile {
            scenario: self.scenario.name.into(),
            seed: self.seed,
            revision: revision.into(),
            invariant: outcome.failure.as_ref().map_or(String::new(), |f| f.invariant.to_string()),
            trace_hash: outcome.trace.hash,
            options,
            story: story.collect(),
            decisions: outcome.decisions.clone(),
        }
    }
}

/// The outcome of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The first broken invariant.
    pub failure: Option<Failure>,
    /// The trace.
    pub trace: TraceReport,
    /// The non-zero decisions, if recorded.
    pub decisions: DecisionMap,
    /// How often each mark was reached, in the order of [`MARKS`](crate::probes::MARKS).
    pub marks: Vec<u64>,
    /// Counts.
    pub stats: Stats,
    /// Virtual nanoseconds.
    pub virtual_ns: u64,
    /// Counters of exploring crash states.
    pub explored: Explored,
    /// The bad state that exploring found.
    pub bad_state: Option<BadState>,
    /// The images at each power cut, if lines were kept.
    pub images: Vec<Images>,
}
