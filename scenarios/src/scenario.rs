//! What a scenario is: a name, the storage of its world, and what happens there.

use crate::formats::FormatModel;
use crate::world::World;
use kernel_model::StorageConfig;
use sim::Sim;
use std::future::Future;
use std::pin::Pin;

/// A world's life.
pub type Life = Pin<Box<dyn Future<Output = ()>>>;

/// A scenario of the catalogue.
pub struct Scenario {
    /// Its name, kebab case.
    pub name: &'static str,
    /// One line: what happens and what is checked.
    pub about: &'static str,
    /// The host's storage for a seed.
    pub storage: &'static (dyn Fn(&Sim) -> StorageConfig + Sync),
    /// The world's life.
    pub body: &'static (dyn Fn(World) -> Life + Sync),
}

impl std::fmt::Debug for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// A scenario for every format that it fits.
pub struct OfFormat {
    /// Its name, with FORMAT in place of the format's name.
    pub name: &'static str,
    /// One line with the same placeholder: what happens and what is checked.
    pub about: &'static str,
    /// Whether it makes sense for a format.
    pub fits: fn(&dyn FormatModel) -> bool,
    /// The host's storage for a seed.
    pub storage: fn(&Sim, &dyn FormatModel) -> StorageConfig,
    /// The world's life.
    pub body: fn(World, &'static dyn FormatModel) -> Life,
    /// It has been swept for a long time.
    pub settled: bool,
}
