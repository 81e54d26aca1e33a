//! Guests that the kernel's own back end serves, xen-blkback, over a block device of tapdisk: a disk `phy:/dev/nbd0`.
//!
//! ```text
//!   Guest ─ Blkfront ═ ring ═ Blkback ─ Gendisk ─┬─ nbd driver ══ stream ══ tapdisk attach ─ image
//!                                                └─ blktap2 module ═ ring ═ tapdisk attach --via blktap
//! ```
//!
//! Over nbd a guest must not notice that tapdisk ends. Over a blktap2 module its requests fail from then on, until its
//! disk is unplugged.

use super::served::{Plan, Served};
use super::{NO_ERRORS, after_power_cut, check_closed, leave, setup, start};
use crate::catalog::crash::arm_power_cut;
use crate::catalog::ring::{in_guest, kills, not_stuck};
use crate::catalog::setup::{Setup, cut_after_close, workload};
use crate::catalog::tap::{Attached as TapAttached, Dom0};
use crate::check::Invariant;
use crate::formats::Kind;
use crate::guest::{ErrorPolicy, Guest, RingDisk};
use crate::machine::{Attached, Machine};
use crate::scenario::Scenario;
use crate::workload::{Op, Workload, operations};
use crate::world::World;
use kernel_model::gendisk::Gendisk;
use kernel_model::{BLKFRONT_MAX_SECTORS, Blkback, Blkfront, DeviceNumber, Published, TapKind};
use sim::{Entity, Node};
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::{DomId, Errno, SECTOR_BYTES, Xenstore, select};
use xen_model::{Counts, FrontKeys, remove_vbd};

/// How often more than xl the end of a disk is waited for whose guest was destroyed while tapdisk was away.
const END_TRIES: u32 = 5;

/// Every way from a guest through the kernel to tapdisk.
pub static BLKBACK_OVER_DEVICE: Scenario = Scenario {
    name: "blkback-over-device",
    about: "a guest of Linux's xen-blkback over a block device of tapdisk: nbd, or a blktap2 module; deaths, detach, power cuts",
    // A toolstack waits for ten seconds for the end of a disk.
    storage: &|_| not_stuck(),
    body: &|w| Box::pin(over_device(w)),
};

/// Size of the image in bytes.
const DISK_BYTES: u64 = 1 << 20;

/// What makes the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Via {
    Nbd,
    Blktap,
}

async fn over_device(world: World) {
    match world.setting("device-via", &[Via::Nbd, Via::Blktap]) {
        Via::Nbd => over_nbd(world).await,
        Via::Blktap => over_blktap(world).await,
    }
}

/// A guest and the back end of its disk.
#[derive(Clone)]
struct Behind {
    world: World,
    toolstack: Rc<Machine>,
    attached: Attached,
    back: Blkback,
    front: Blkfront,
    device: Gendisk,
}

impl Behind {
    /// Gives a new guest `device` as its disk; `None` if it cannot be opened.
    async fn plug(
        toolstack: &Rc<Machine>,
        setup: &Setup,
        nth: u64,
        (number, device): (DeviceNumber, Gendisk),
    ) -> Option<Self> {
        let world = &toolstack.world;
        let attached = toolstack.attach(setup.clone(), nth).await;
        let key = toolstack.boot << 32 | nth;
        let back = Blkback::probe(&world.kernel, &world.xen, attached.dom, &attached.paths, key);
        let front = attached.front(world);
        let own =
            Self { world: world.clone(), toolstack: Rc::clone(toolstack), attached, back, front, device };
        own.prepare_front();
        if let Err(error) = own.run_script(number).await {
            world.fail(Invariant::K1, format!("the toolstack failed to attach a disk: {error:?}"));
        }
        if own.back.has_opened().await {
            return Some(own);
        }
        own.attached.node.kill();
        own.attached.node.dead().await;
        own.unplug().await;
        None
    }

    /// What xl's script does, once the back end has seen the disk.
    async fn run_script(&self, number: DeviceNumber) -> Result<(), Errno> {
        self.toolstack.wait_for_back(&self.attached, b"2").await?;
        let (port, back) = (&self.toolstack.toolstack.port, &self.attached.paths.backend);
        port.write(&format!("{back}/physical-device"), number.to_string().as_bytes()).await?;
        port.write(&format!("{back}/hotplug-status"), b"connected").await
    }

    fn prepare_front(&self) {
        let counted = self.world.setting("front-end-counts", &[false, true]);
        // xen-blkback believes a key that an earlier front end has left.
        self.front.set_keys(Rc::new(move |_| FrontKeys { counted, leftovers: false }));
        self.front.ask_for_discards();
        let (world, device) = (self.world.clone(), self.device.clone());
        let before = device.size_sectors();
        self.front.on_published(Rc::new(move |published| {
            let (limits, now) = (device.limits(), device.size_sectors());
            let truth = Published {
                sectors: published.sectors.filter(|sectors| [before, now].contains(sectors)).or(Some(now)),
                sector_bytes: Some(SECTOR_BYTES),
                read_only: Some(false),
                flushes: limits.write_cache,
                discards: limits.max_discard_sectors > 0,
                error: None,
                hotplug: Some("connected".into()),
            };
            if *published != truth {
                let text = format!("xen-blkback published {published:?}, and the device has {truth:?}");
                world.fail(Invariant::F1, text);
            }
        }));
    }

    /// Connects the front end, and makes a guest of its disk.
    async fn boot(&self, policy: ErrorPolicy, apart: bool) -> Option<Guest<RingDisk>> {
        let front = self.front.clone();
        let (task, connected) = joined(async move { front.connect().await });
        self.attached.node.spawn("boot", 0, task);
        match connected.await {
            Some(Ok(())) => {}
            failed => {
                let (error, why) = (failed.and_then(Result::err), self.back.gave_up());
                let text = format!("the front end failed to connect: {error:?}; xen-blkback: {why:?}");
                self.world.fail(Invariant::L1, text);
                return None;
            }
        }
        let front = self.front.clone();
        let disk = if apart { RingDisk::apart(front) } else { RingDisk::new(front) };
        Some(Guest::new(&self.world, disk, Rc::clone(&self.attached.setup.history), policy))
    }

    fn operations(&self, number: u64) -> Vec<Option<Op>> {
        let entity = Entity::WORLD.child("guest-ops", number);
        self.world.sim.name_entity(entity, || format!("guest {number} of xen-blkback"));
        let size = self.attached.setup.size_sectors;
        let load = Workload { zeroes: true, ..workload(&self.world, size, 40, BLKFRONT_MAX_SECTORS) };
        operations(&self.world.sim, entity, number, &load)
    }

    /// Runs `work` as a task of the guest, until it has ended or the guest has.
    async fn in_guest(&self, work: impl Future<Output = ()> + 'static) {
        select(self.attached.node.dead(), in_guest(&self.attached, work)).await;
    }

    async fn read_all(&self, guest: &Guest<RingDisk>, when: &'static str) {
        let (world, own) = (self.world.clone(), guest.clone());
        self.in_guest(async move {
            if let Err(error) = own.read_all().await {
                world.fail(Invariant::E4, format!("{when} reading the whole disk failed with {error:?}"));
            }
        })
        .await;
    }

    /// Shuts the guest down and unplugs its disk.
    async fn shut_down(&self, guest: Guest<RingDisk>) {
        let (world, attached) = (self.world.clone(), self.attached.clone());
        self.in_guest(async move { attached.shut_down(&world, &guest).await }).await;
        self.unplug().await;
    }

    /// The toolstack removes the disk, and the back end forgets it.
    async fn unplug(&self) {
        let done = async {
            self.toolstack.take_offline(&self.attached, false).await?;
            remove_vbd(&self.toolstack.toolstack.port, &self.attached.paths).await
        };
        if let Err(error) = done.await {
            self.world.fail(Invariant::K1, format!("the toolstack failed to remove a disk: {error:?}"));
        }
        self.forget().await;
    }

    /// The guest is destroyed, whatever it is doing.
    async fn destroy(&self, guest: &Guest<RingDisk>) {
        guest.retire();
        self.attached.node.kill();
        self.attached.node.dead().await;
        let done = async {
            self.toolstack.take_offline(&self.attached, true).await?;
            // xl does not wait longer than once. The kernel does, for requests that wait for the next tapdisk.
            let mut tries = 0;
            while let Err(error) = self.toolstack.wait_for_back(&self.attached, b"6").await {
                tries += 1;
                if error != Errno::ETIMEDOUT || tries > END_TRIES {
                    return Err(error);
                }
            }
            self.toolstack.toolstack.port.remove(&self.attached.paths.backend).await
        };
        if let Err(error) = done.await {
            self.world.fail(Invariant::K1, format!("the toolstack failed to destroy a guest: {error:?}"));
        }
        self.world.xen.destroy_domain(self.attached.dom);
        self.forget().await;
    }

    async fn forget(&self) {
        self.back.removed().await;
        self.toolstack.disks.borrow_mut().retain(|disk| disk.paths != self.attached.paths);
        let held = self.world.xen.counts(DomId(0));
        if held != Counts::default() {
            self.world
                .fail(Invariant::K1, format!("xen-blkback has forgotten a disk, and dom0 has {held:?}"));
        }
    }

    fn nodes(&self) -> Vec<Node> {
        let toolstack = self.toolstack.toolstack.process.node();
        [&self.attached.node, self.back.node(), toolstack].into_iter().cloned().collect()
    }
}

async fn over_nbd(world: World) {
    let plan = Plan::draw(&world);
    let served = Served::new(&plan, setup(&world, world.setting("image", &Kind::plain()), 0), 0);
    let asked = start(&world, std::slice::from_ref(&served));
    served.attached().await;
    let toolstack = Machine::new(&world, plan.limits);
    let device = || (DeviceNumber::of_nbd(served.index()), world.kernel.nbd_disk(served.index()));
    let Some(behind) = Behind::plug(&toolstack, &served.setup, 0, device()).await else {
        return world.fail(Invariant::L1, "xen-blkback cannot open the device of tapdisk");
    };
    served.note_user();
    let Some(guest) = behind.boot(NO_ERRORS, true).await else { return };
    let (hosts, mortal) = (Rc::clone(&served), behind.nodes());
    arm_power_cut(&world, &served.setup, 0, 240, move || {
        hosts.stop_at_once();
        mortal.iter().for_each(Node::kill);
    });
    let (own, ops, depth) = (guest.clone(), behind.operations(0), plan.limits.guest_depth);
    behind.in_guest(async move { own.run(&ops, depth).await }).await;
    // A device that nobody uses would go with a tapdisk that is asked to stop.
    let destroyed = !asked && world.setting("guest-destroyed", &[false, true]);
    let (behind, guest) = match destroyed && behind.attached.node.is_alive() {
        true => match next_guest(&behind, &guest, device(), depth).await {
            Some(next) => next,
            None => return,
        },
        false => (behind, guest),
    };
    world.sim.stop_faults();
    world.storage.set_hook(None);
    let node = behind.attached.node.clone();
    if !node.is_alive() || world.setting("power-fails-at-last", &[false, true]) {
        drop(guest);
        for node in behind.nodes() {
            node.kill();
            node.dead().await;
        }
        return after_power_cut(&world, &plan, &[served], &node).await;
    }
    served.spare();
    finish_nbd(&plan, &served, &behind, guest).await;
    check_closed(&world, &plan, &[served]).await;
}

/// The guest is destroyed while it has requests in flight, and another one gets its disk.
async fn next_guest(
    behind: &Behind,
    guest: &Guest<RingDisk>,
    device: (DeviceNumber, Gendisk),
    depth: usize,
) -> Option<(Behind, Guest<RingDisk>)> {
    let world = &behind.world;
    world.storage.set_hook(None);
    let (own, ops) = (guest.clone(), behind.operations(1));
    behind.attached.node.spawn("main", 1, async move { own.run(&ops, depth).await });
    let after_ns = world.setting("destroyed-after-us", &[50, 0, 10, 400]) * 1000;
    world.sim.sleep_ns(after_ns).await;
    behind.destroy(guest).await;
    let Some(next) = Behind::plug(&behind.toolstack, &behind.attached.setup, 1, device).await else {
        world.fail(Invariant::L1, "xen-blkback cannot open the device of tapdisk again");
        return None;
    };
    let guest = next.boot(NO_ERRORS, true).await?;
    Some((next, guest))
}

/// Nothing ends any more: the guest has all of its data, keeps its device, and leaves; then the device goes.
async fn finish_nbd(plan: &Plan, served: &Rc<Served>, behind: &Behind, guest: Guest<RingDisk>) {
    let world = &behind.world;
    behind.may_reconnect().await;
    behind.read_all(&guest, "at last").await;
    if world.setting("detached-while-open", &[false, true]) {
        let status = plan.detach(served, "").await;
        if status != 16 {
            let text = format!("a device that xen-blkback has open was detached with status {status}");
            world.fail(Invariant::L1, text);
        }
        behind.read_all(&guest, "after a refused detach").await;
    }
    let (told, size) = (behind.told_sectors().await, behind.device.size_sectors());
    if told != Some(size) {
        world.fail(Invariant::F1, format!("the guest was told {told:?} sectors, and the device has {size}"));
    }
    behind.shut_down(guest).await;
    leave(world, plan, served).await;
}

impl Behind {
    /// In some worlds the guest's driver is loaded anew, while no request is in flight.
    async fn may_reconnect(&self) {
        if !self.world.setting("front-end-reconnects", &[false, true]) {
            return;
        }
        let (world, front) = (self.world.clone(), self.front.clone());
        self.in_guest(async move {
            if let Err(error) = front.reconnect().await {
                world.fail(Invariant::L1, format!("the front end failed to reconnect: {error:?}"));
            }
        })
        .await;
    }

    /// The size that xenstore has now, as the front end reads it.
    async fn told_sectors(&self) -> Option<u64> {
        let path = format!("{}/sectors", self.attached.paths.backend);
        let value = self.toolstack.toolstack.port.read(&path).await.ok()?;
        String::from_utf8(value).ok()?.parse().ok()
    }
}

/// The number of a device of a blktap2 module.
fn tap_number(disk: &Gendisk) -> DeviceNumber {
    let minor = disk.name().strip_prefix("tap").and_then(|minor| minor.parse().ok());
    DeviceNumber::of_tap(minor.unwrap_or(u32::MAX))
}

async fn over_blktap(world: World) {
    let setup = Setup::new(&world, world.setting("image", &Kind::plain()), 0, DISK_BYTES);
    let dom0 = Dom0::new(&world, setup.clone(), &TapKind::SERVED);
    let toolstack = Machine::new(&world, dom0.limits);
    for (nth, steps) in (0..).zip(kills(&world, 2, 500)) {
        let attached = dom0.start(Some(steps));
        if let Some((behind, guest)) = tap_guest(&dom0, &toolstack, &attached, &setup, nth).await {
            let (own, ops, depth) = (guest.clone(), behind.operations(nth), dom0.limits.guest_depth);
            behind.in_guest(async move { own.run(&ops, depth).await }).await;
            behind.shut_down(guest.clone()).await;
            dom0.close(guest);
        }
        attached.host.process.node().kill();
        attached.host.process.node().dead().await;
        if world.verdict.is_broken() {
            return;
        }
    }
    let attached = dom0.start(None);
    let Some((behind, guest)) = tap_guest(&dom0, &toolstack, &attached, &setup, 8).await else {
        return world.fail(Invariant::L1, "a tapdisk that nothing kept from it made no device for a guest");
    };
    let mut nodes = behind.nodes();
    nodes.push(attached.host.process.node().clone());
    let mortal = nodes.clone();
    let cut = world.setting("host-loses-power", &[false, true]);
    if cut {
        arm_power_cut(&world, &setup, 0, 240, move || mortal.iter().for_each(Node::kill));
    }
    // It is served to its end all the same.
    if world.setting("tap-stopped-in-use", &[false, true]) {
        attached.host.process.ask_to_stop();
    }
    let (own, ops, depth) = (guest.clone(), behind.operations(8), dom0.limits.guest_depth);
    behind.in_guest(async move { own.run(&ops, depth).await }).await;
    if cut {
        dom0.close(guest);
        setup.cut_power(&world, &nodes.iter().collect::<Vec<_>>()).await;
        world.xen.power_cut();
        setup.check(&world, "after the power cut").await;
        if !world.verdict.is_broken() {
            Dom0::new(&world, setup.clone(), &TapKind::SERVED).after_cut().await;
        }
    } else {
        world.sim.stop_faults();
        behind.may_reconnect().await;
        behind.read_all(&guest, "at last").await;
        behind.shut_down(guest.clone()).await;
        dom0.close(guest);
        drop(behind);
        dom0.stop(&attached, true).await;
        dom0.check_leaks(&attached).await;
    }
    if !world.verdict.is_broken() {
        cut_after_close(&world, [setup.spec.path.as_str()]);
    }
    setup.check_bytes(&world, "in the end");
}

/// A guest on the device of `tapdisk`; `None` if that died before there was one.
async fn tap_guest(
    dom0: &Rc<Dom0>,
    toolstack: &Rc<Machine>,
    tapdisk: &Rc<TapAttached>,
    setup: &Setup,
    nth: u64,
) -> Option<(Behind, Guest<RingDisk>)> {
    let Some(device) = dom0.device(tapdisk).await else {
        dom0.ended(tapdisk).await;
        return None;
    };
    let behind = Behind::plug(toolstack, setup, nth, (tap_number(&device), device)).await?;
    let guest = behind.boot(NO_ERRORS, false).await?;
    if !tapdisk.host.process.node().is_alive() {
        guest.set_error_policy(ErrorPolicy { errors_allowed: true, ..NO_ERRORS });
    }
    dom0.opened_by(&guest);
    Some((behind, guest))
}
