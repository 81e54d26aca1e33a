//! Disks in use are made larger by tap-ctl.
//!
//! ```text
//!   resize ──► the disk has the new size   |   refused: it has the old one   |   killed: either
//!        └── beside a pause; tapdisk is killed; the power fails
//! ```

use super::Disk;
use super::admin::Outcome;
use super::snapshots::SNAPSHOT_DIES;
use super::verbs::{Act, Acts};
use crate::check::Invariant;
use crate::formats;
use crate::world::World;
use kernel_model::SimHost;
use sim::Entity;
use tap_control::FOLDER;
use tap_core::{Node as _, Request};
use tap_host::{Errno, IoBuf, SECTOR_BYTES, SectorRange, SocketAddress, select};
use tap_nbd::{Client, ClientConfig};

/// What a disk grows by, in bytes.
const STEPS: [u64; 4] = [64 << 10, SECTOR_BYTES, 40 << 10, 3 << 20];
/// What is said of a disk that could not go on.
const STRANDED: &str = "it stays paused";
/// More bytes than any file can have.
const TOO_LARGE: u64 = 1 << 63;

impl Disk {
    /// The size that its image says now, in bytes; `None` if it has none.
    pub(super) fn size_of_image(&self, world: &World) -> Option<u64> {
        let spec = self.setup().spec;
        let content = world.storage.content(&spec.path)?;
        match formats::of(spec.format).walk(&content) {
            Some(walked) => walked.ok().map(|map| map.size),
            None => Some(content.size),
        }
    }

    /// Whether a list may show these sectors: what was said, or what a resize was to make that was not answered.
    pub(super) fn may_show(&self, sectors: &serde_json::Value) -> bool {
        sectors.as_u64().is_some_and(|sectors| sectors * SECTOR_BYTES >= self.told_bytes.get())
    }

    /// A disk is at least as large as was said.
    pub(super) fn check_size(&self, world: &World, when: &str) {
        let told = self.told_bytes.get();
        match self.size_of_image(world) {
            Some(size) if size < told => {
                let text = format!("{when} the disk has {size} bytes, and was said to have {told}");
                world.fail(Invariant::G12, text);
            }
            _ => {}
        }
    }
}

impl Acts<'_> {
    /// Makes the disk larger, alone or beside something else.
    pub(super) async fn resize(&self, entity: Entity, disk: &Disk, hold_ns: u64) -> Act {
        let step = STEPS[(hold_ns >> 4) as usize % STEPS.len()];
        match hold_ns >> 1 & 7 {
            0 => self.refused_resizes(disk).await,
            1 | 2 => self.resize_beside(disk, hold_ns, step).await,
            3 => self.resize_renamed(disk, step).await,
            _ => {
                let dies = |d: &mut sim::Draw| if d.below(3) == 0 { 1 + d.below(60) } else { 0 };
                let steps = self.world.sim.decide(entity, &SNAPSHOT_DIES, 0, dies);
                if steps > 0 {
                    self.tapdisk.host.process.node().kill_after_steps(steps);
                }
                self.resize_alone(disk, step).await
            }
        }
    }

    fn line_of_resize(&self, disk: &Disk, step: u64) -> (String, u64) {
        let to = disk.told_bytes.get().max(disk.size_of_image(self.world).unwrap_or(0)) + step;
        (format!("resize {} -s {to}", disk.at(self.tapdisk)), to)
    }

    async fn resize_alone(&self, disk: &Disk, step: u64) -> Act {
        let (line, to) = self.line_of_resize(disk, step);
        let done = self.admin.ctl(&line).await;
        self.resized(disk, &line, &done, to).await
    }

    /// `line` ended with `done`: what was said holds, and the disk runs.
    async fn resized(&self, disk: &Disk, line: &str, done: &Outcome, to: u64) -> Act {
        if !self.tapdisk.is_alive() {
            return None;
        }
        if done.status == 0 {
            disk.told_bytes.set(to);
            disk.check_size(self.world, &format!("after tap-ctl {line}"));
            self.check_grown(disk).await;
        } else {
            let late = i32::from(done.status) == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
            let passes = self.admin.passes(done.status.into()) || self.admin.may_have_lost(done);
            if !late && !passes {
                self.world.fail(Invariant::U1, format!("tap-ctl {line} ended with {done:?}"));
            }
        }
        if done.err.contains(STRANDED) {
            self.resume(disk).await?;
        }
        self.runs(disk).await
    }

    /// Who connects anew finds the size that was said, and zeros in the new part.
    async fn check_grown(&self, disk: &Disk) {
        let (world, minor) = (self.world, disk.minor.get().expect("it has a minor number"));
        let host = SimHost::start(&world.kernel, &world.xen, "reader", world.sim.now_ns());
        let address = SocketAddress::Unix(format!("{FOLDER}/nbd{}.{minor}", self.tapdisk.pid()));
        let config = ClientConfig { export: String::new(), ..ClientConfig::new(address) };
        // A client waits for long for a server that has died.
        select(self.tapdisk.ended(), self.check_shown(&host, config, disk.told_bytes.get() / SECTOR_BYTES))
            .await;
        host.process.node().kill();
    }

    async fn check_shown(&self, host: &SimHost, config: ClientConfig, told: u64) {
        let Ok(client) = Client::connect(host.clone(), config).await else { return };
        let size = client.info().size_sectors;
        if size != told {
            let text = format!("a disk of {told} sectors shows {size} to who connects anew");
            self.world.fail(Invariant::G12, text);
        }
        let buf = IoBuf::unpooled(SECTOR_BYTES as usize).expect("there is memory");
        let last = SectorRange::new(size - 1, 1);
        let read = client.submit(Request::read(last, [buf].into_iter().collect())).await;
        if read.result.is_ok() && read.bufs.iter().any(|buf| buf.iter().any(|byte| *byte != 0)) {
            self.world.fail(Invariant::G12, "the last sector of a disk that has grown is not zeros");
        }
        let _read_only = client.close().await;
    }

    /// What must be refused, and changes nothing.
    async fn refused_resizes(&self, disk: &Disk) -> Act {
        let (at, told) = (disk.at(self.tapdisk), disk.told_bytes.get());
        self.refuse(&format!("resize {at} -s {}", told - SECTOR_BYTES), Errno::EINVAL).await?;
        let line = format!("resize {at} -s {TOO_LARGE}");
        let refused = self.admin.ctl(&line).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        // Only the format knows what is too large, and is asked while the disk rests: storage that hangs comes first.
        let late = i32::from(refused.status) == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
        if i32::from(refused.status) != Errno::EINVAL.0 && !late {
            self.world.fail(Invariant::U1, format!("tap-ctl {line} ended with {refused:?}"));
        }
        if refused.err.contains(STRANDED) {
            self.resume(disk).await?;
        }
        self.runs(disk).await?;
        if self.pause(disk).await? {
            self.refuse(&format!("resize {at} -s {}", told + SECTOR_BYTES), Errno::EINVAL).await?;
            self.resume(disk).await?;
        }
        disk.check_size(self.world, "after resizes that were refused");
        self.runs(disk).await
    }

    /// A resize and a pause at the same time.
    async fn resize_beside(&self, disk: &Disk, hold_ns: u64, step: u64) -> Act {
        let (line, to) = self.line_of_resize(disk, step);
        let outcomes =
            self.at_once([line.clone(), format!("pause {}", disk.at(self.tapdisk))], hold_ns).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        self.resume(disk).await?;
        // The pause came first.
        if i32::from(outcomes[0].status) == Errno::EINVAL.0 {
            return self.runs(disk).await;
        }
        self.resized(disk, &line, &outcomes[0], to).await
    }

    /// The disk's name has another file: that one does not become larger.
    async fn resize_renamed(&self, disk: &Disk, step: u64) -> Act {
        let (storage, path) = (&self.world.storage, disk.setup().spec.path);
        let (aside, number) = (format!("{path}.aside"), storage.file_number(&path));
        storage.rename(&path, &aside);
        storage.put(&path, storage.content(&aside).unwrap_or_default());
        let before = storage.bytes(&path);
        let refused = self.admin.ctl(&self.line_of_resize(disk, step).0).await;
        let same = storage.bytes(&path) == before && storage.file_number(&aside) == number;
        storage.rename(&aside, &path);
        if !same {
            let text = format!("a resize changed a file that the disk does not have: {refused:?}");
            self.world.fail(Invariant::U1, text);
        }
        if !self.tapdisk.is_alive() {
            return None;
        }
        if i32::from(refused.status) != Errno::ESTALE.0 {
            self.world
                .fail(Invariant::U1, format!("a resize of a disk whose name has another file: {refused:?}"));
        }
        self.runs(disk).await
    }
}
