//! A world: one engine, one host, the options of the run, and what comes out.

use crate::check::{About, Failure, Invariant, Oracle, Verdict};
use crate::explore::Explorer;
use crate::formats::RealImage;
use kernel_model::{Kernel, Storage, StorageConfig};
use sim::{Entity, Label, Sim, text_hash};
use std::cell::{Cell, RefCell};
use std::fmt::Debug;
#[cfg(test)]
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use tap_host::Bug;
use xen_model::{Options, Xen};

/// The index of a setting in its list of choices. The name of its entity says what the choice means.
pub static SETTING: Label = Label::new("setting", "choice {}");

/// Chooses one of `choices` by a decision of the world: the first is the boring one.
pub fn setting<T: Copy + Debug>(sim: &Sim, name: &'static str, choices: &[T]) -> T {
    let entity = Entity::WORLD.child(name, 0);
    let n = choices.len() as u64;
    let value = sim.decide(entity, &SETTING, 0, |d| d.below(n));
    let choice = choices[value.min(n - 1) as usize];
    sim.name_entity(entity, || format!("{name} is {choice:?}"));
    choice
}

/// Options of a run besides decisions.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// A seeded bug that is switched on.
    pub bug: Option<&'static Bug>,
    /// The drive lies about flushes.
    pub canary: bool,
    /// A checker that is broken.
    pub oracle: Option<Oracle>,
    /// The image that the scenario `real-image` starts from.
    pub image: Option<Arc<RealImage>>,
    /// What the client of the scenario `nbd-stream` sends.
    pub stream: Option<Arc<[u8]>>,
    /// Every crash state of the first epoch is checked, instead of one.
    pub explore: bool,
}

/// Counters of one run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Guest requests answered.
    pub requests: u64,
    /// Guest requests answered with an error.
    pub errors: u64,
    /// Power cuts and kills.
    pub crashes: u64,
    /// Operations on the host's files.
    pub host_ios: u64,
    /// Maximum number of clusters that the power cuts may have lost.
    pub lost_clusters: u64,
}

/// One world; clones share it.
#[derive(Clone)]
pub struct World {
    /// The engine.
    pub sim: Sim,
    /// Where checkers report.
    pub verdict: Verdict,
    /// Linux of the host.
    pub kernel: Kernel,
    /// The storage of the host.
    pub storage: Storage,
    /// The Xen hypervisor below it.
    pub xen: Xen,
    /// The options of the run.
    pub options: Rc<RunOptions>,
    stats: Rc<Cell<Stats>>,
    errors_allowed: bool,
    boots: Rc<Cell<u64>>,
    explorer: Rc<RefCell<Option<Rc<Explorer>>>>,
}

impl World {
    /// A world on `sim`.
    pub fn new(sim: &Sim, mut storage: StorageConfig, options: RunOptions) -> Self {
        storage.flush_lies |= options.canary;
        let errors_allowed = storage.faults.errors
            || storage.faults.no_space
            || storage.faults.bad_sectors
            || storage.faults.sync_errors
            || storage.faults.calls
            || storage.nth_failure.is_some_and(|nth| !nth.is_passing());
        let storage = Storage::new(sim, storage);
        let kernel = Kernel::new(sim, &storage);
        if let Some(bug) = options.bug {
            kernel.plant(bug);
        }
        Self {
            xen: Xen::new(sim, Options { events_again: true, ..Options::default() }),
            sim: sim.clone(),
            verdict: Verdict::default(),
            kernel,
            storage,
            options: Rc::new(options),
            stats: Rc::default(),
            errors_allowed,
            boots: Rc::default(),
            explorer: Rc::default(),
        }
    }

    /// The number of the next machine of this world, from 0.
    pub fn next_boot(&self) -> u64 {
        self.boots.replace(self.boots.get() + 1)
    }

    /// Cuts the power of a machine without guests, and counts that.
    pub fn power_cut(&self) {
        self.storage.power_cut();
        self.count(|s| s.crashes += 1);
    }

    /// Whether operations of the host fail in this world for longer than a retry can hide.
    pub fn draws_errors(&self) -> bool {
        self.errors_allowed
    }

    /// Whether what depends on the host may fail: its operations may, or it has lost data in unknown places.
    pub fn errors_allowed(&self) -> bool {
        self.errors_allowed || self.kernel.answers_lost()
    }

    /// Reports a broken invariant.
    pub fn fail(&self, invariant: Invariant, detail: impl Into<String>) {
        self.fail_about(invariant, detail, About::default());
    }

    /// Reports a broken invariant that is `about` some requests.
    pub fn fail_about(&self, invariant: Invariant, detail: impl Into<String>, about: About) {
        let at_ns = self.sim.now_ns();
        self.verdict.fail(Failure { invariant, detail: detail.into(), at_ns, about });
    }

    /// One of `choices`, a decision: the first is the boring one.
    pub fn setting<T: Copy + Debug>(&self, name: &'static str, choices: &[T]) -> T {
        setting(&self.sim, name, choices)
    }

    /// A property of the seed that shapes how decisions are drawn but is not a decision; 0 in a replay.
    pub fn mood(&self, name: &str, n: u64) -> u64 {
        if self.sim.is_replaying() {
            return 0;
        }
        sim::Draw::new(sim::mix2(self.sim.swarm().seed(), text_hash(name))).below(n)
    }

    /// The explorer of crash states, if there is one.
    pub fn explorer(&self) -> Option<Rc<Explorer>> {
        self.explorer.borrow().clone()
    }

    /// Sets the explorer.
    pub fn set_explorer(&self, explorer: Rc<Explorer>) {
        *self.explorer.borrow_mut() = Some(explorer);
    }

    /// Changes the counters.
    pub fn count(&self, change: impl FnOnce(&mut Stats)) {
        let mut stats = self.stats.get();
        change(&mut stats);
        self.stats.set(stats);
    }

    /// The counters so far.
    pub fn stats(&self) -> Stats {
        let counts = self.storage.counts();
        Stats { host_ios: counts.reads + counts.writes + counts.syncs, ..self.stats.get() }
    }
}

/// The invariant that `body` breaks in a world without faults, for tests of checkers.
#[cfg(test)]
pub(crate) fn broken_by<F: Future<Output = ()> + 'static>(
    body: impl FnOnce(World) -> F,
) -> Option<Invariant> {
    let config = sim::Config {
        faults: false,
        source: sim::Source::Replay(sim::DecisionMap::new()),
        ..sim::Config::new(1)
    };
    let sim = Sim::new(&config);
    let world = World::new(&sim, StorageConfig::default(), RunOptions::default());
    sim.run(body(world.clone())).unwrap_or_else(|stall| panic!("{stall:?}"));
    world.verdict.failure().map(|f| f.invariant)
}
