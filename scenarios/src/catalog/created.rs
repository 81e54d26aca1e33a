//! New images of a format, created over whatever is there.
//!
//! ```text
//!   nothing, other bytes, an image, what the last round left ──create──► ... cut? ... ──► done: empty and durable
//!                                                                                     └─► else: no image, an empty
//!                                                                                         one, or the one before
//! ```

use super::shown::{calls_itself_image, put_used, shown};
use super::until_cut::run_until_cut;
use crate::check::{Invariant, shipped};
use crate::formats::{self, FormatModel};
use crate::power::{CRASH_AT, power};
use crate::scenario::OfFormat;
use crate::world::{World, setting};
use kernel_model::faults::FaultPlan;
use kernel_model::{SimHost, StorageConfig};
use sim::{Draw, Entity, Label};
use tap_host::Errno;
use tap_images::{Format, ImageError, ImageSpec, NewImage};

/// Images created repeatedly.
pub static CREATED: OfFormat = OfFormat {
    name: "FORMAT-created",
    about: "empty FORMAT images are created over what is there, power cut at any host operation: whole and durable, or no image",
    fits: |model| model.has_metadata(),
    storage: |sim, _| {
        let errors = setting(sim, "create-errors", &[false, true]);
        let faults = if errors { FaultPlan::ALL } else { FaultPlan::PASSING };
        StorageConfig { faults, ..StorageConfig::default() }
    },
    body: |world, model| Box::pin(created(world, model)),
    settled: false,
};

/// A round: what is there before (0: there is no round), the size of the disk, and whether the power is cut afterwards.
pub static ROUND: Label = Label::packed("create-round", "is created (settings {})", &[3, 2, 1]);

const ROUNDS: u32 = 8;
/// Sizes of the disk, in bytes.
const SIZES: [u64; 4] = [64 << 10, 512, 67 * 512, (2 << 20) + 4096];
/// Maximum number of operations before the power is cut.
const OPERATIONS: u64 = 12;

fn draw(d: &mut Draw) -> u64 {
    (1 + d.below(4)) | d.below(4) << 3 | u64::from(d.below(4) == 0) << 5
}

async fn created(world: World, model: &'static dyn FormatModel) {
    // The path of the last round's image, and what a power cut may restore there.
    let (mut left, mut may_show) = (0, Vec::new());
    for n in 0..ROUNDS {
        let entity = Entity::WORLD.child("create-round", u64::from(n));
        let value = world.sim.decide(entity, &ROUND, 0, draw);
        let (old, size_bytes, cut_then) = (value & 7, SIZES[(value >> 3 & 3) as usize], value >> 5 & 1 == 1);
        if old == 0 {
            continue;
        }
        if old != 4 {
            left = n;
            may_show = Vec::new();
        }
        let mut round = Round::new(&world, model, (n, left), old, size_bytes);
        round.may_show.append(&mut may_show);
        world.sim.name_entity(entity, || format!("{} of {size_bytes} bytes", round.spec.path));
        let made = round.run(&world, model.format(), cut_then).await;
        if world.verdict.is_broken() {
            return;
        }
        may_show = if made { Vec::new() } else { round.may_show };
    }
}

/// An image to be created.
struct Round {
    number: u32,
    spec: ImageSpec,
    size_bytes: u64,
    /// What it may show if the creation fails: everything that was there, as long as nothing has become durable.
    may_show: Vec<Vec<u8>>,
}

impl Round {
    /// Puts the previous content in place: for 2 other bytes, for 3 an image.
    fn new(
        world: &World,
        model: &'static dyn FormatModel,
        (number, place): (u32, u32),
        old: u64,
        size_bytes: u64,
    ) -> Self {
        let spec = ImageSpec { format: model.format().into(), path: format!("/images/new{place}.img") };
        match old {
            2 => world.storage.put_bytes(&spec.path, &vec![0xa5; 3 * size_bytes as usize]),
            3 => drop(put_used(world, &spec, size_bytes)),
            _ => {}
        }
        let is_image = calls_itself_image(world, &spec);
        let before = is_image.then(|| shown(world, &spec, None).ok()).flatten();
        let may_show = before.into_iter().chain([vec![0; size_bytes as usize]]).collect();
        Self { number, spec, size_bytes, may_show }
    }

    /// Returns whether the image was created.
    async fn run(&self, world: &World, format: Format, cut_then: bool) -> bool {
        let made = self.make(world, format).await;
        world.count(|s| s.requests += 1);
        if made.is_none() || cut_then {
            world.power_cut();
        }
        let succeeded = matches!(made, Some(Ok(())));
        match made {
            Some(Ok(())) => self.check_made(world).await,
            Some(Err(error)) if !world.errors_allowed() => {
                world.fail(Invariant::I1, format!("failed to create {}: {error}", self.spec.path));
            }
            Some(Err(_)) => {
                world.count(|s| s.errors += 1);
                self.check_unfinished(world);
            }
            None => self.check_unfinished(world),
        }
        succeeded
    }

    /// Runs the driver; `None` if the power was cut meanwhile.
    async fn make(&self, world: &World, format: Format) -> Option<Result<(), ImageError>> {
        let size_bytes = self.size_bytes;
        let host = SimHost::start(&world.kernel, &world.xen, "maker", u64::from(self.number));
        let entity = power(self.number);
        world.sim.name_entity(entity, || format!("power, round {}", self.number));
        let after = world
            .sim
            .decide(entity, &CRASH_AT, 0, |d| if d.below(2) == 0 { 0 } else { 1 + d.below(OPERATIONS) });
        let path = self.spec.path.clone();
        let process = host.process.clone();
        let main = async move { create(&host, format, &path, size_bytes).await };
        run_until_cut(world, &process, Some(after).filter(|after| *after > 0), main).await
    }

    /// Checks that the image exists, is empty, and has the right size.
    async fn check_made(&self, world: &World) {
        match shown(world, &self.spec, None) {
            Ok(bytes) if bytes.len() as u64 == self.size_bytes && bytes.iter().all(|b| *b == 0) => {}
            Ok(bytes) => {
                let (len, wanted) = (bytes.len(), self.size_bytes);
                let text = format!(
                    "{} was created with {wanted} zeros, but has {len} bytes, some of them not zero",
                    self.spec.path
                );
                return world.fail(Invariant::I1, text);
            }
            Err((invariant, text)) => return world.fail(invariant, format!("{}: {text}", self.spec.path)),
        }
        shipped::agree(world, &self.spec, "after it was created").await;
    }

    /// Checks that an incomplete image is not recognised as one.
    fn check_unfinished(&self, world: &World) {
        if !calls_itself_image(world, &self.spec) {
            return;
        }
        let what = match shown(world, &self.spec, None) {
            Ok(bytes) if self.may_show.contains(&bytes) => return,
            Ok(bytes) => format!("it is an image of {} other bytes", bytes.len()),
            Err((_, text)) => text,
        };
        let text = format!(
            "creating {} did not succeed, but what it left is recognised as an image: {what}",
            self.spec.path
        );
        world.fail(Invariant::I1, text);
    }
}

/// As `tap-img create` does: overwrites a file only after it was found to exist.
async fn create(host: &SimHost, format: Format, path: &str, size_bytes: u64) -> Result<(), ImageError> {
    let image = NewImage { size_bytes, ..NewImage::default() };
    match formats::drivers().create(host, format, path, image.clone()).await {
        Err(error) if error.errno() == Errno::EEXIST => {
            let image = NewImage { existing: Some(Vec::new()), ..image };
            formats::drivers().create(host, format, path, image).await
        }
        result => result,
    }
}
