//! A read-only disk on a ring: no request of a guest changes a byte, whatever dies, and reads are always served.

use super::ring::{DISK_BYTES, NO_ERRORS, finish, in_guest, kills, not_stuck, operations_of};
use super::setup::Setup;
use crate::check::Invariant;
use crate::formats::Kind;
use crate::guest::{Gate, Guest, GuestDisk, RingDisk};
use crate::limits::StackLimits;
use crate::machine::{Attached, Machine};
use crate::scenario::Scenario;
use crate::workload::Op;
use crate::world::World;
use std::rc::Rc;
use tap_host::IoKind;

/// The mode of the disk, of the image, or of both is read-only.
pub static RING_READ_ONLY: Scenario = Scenario {
    name: "ring-read-only",
    about: "a guest reads, writes and flushes a read-only disk on a ring while tapdisk dies: no byte of any file changes",
    storage: &|_| not_stuck(),
    body: &|w| Box::pin(read_only(w)),
};

/// The byte that a guest tries to write.
const FOREIGN: u8 = 0x5a;

async fn read_only(world: World) {
    let setup = Setup::new(&world, world.setting("image", &Kind::all()), 0, DISK_BYTES);
    let path = setup.spec.path.clone();
    let before = world.storage.bytes(&path);
    // The toolstack makes it read-only, or the image, or both.
    let toolstack = world.setting("toolstack-mode", &["r", "w"]) == "r";
    let image = world.setting("image-mode", &[false, true]) || !toolstack;
    let machine = Machine::new(&world, StackLimits { read_only: image, ..StackLimits::draw(&world) });
    let attached = if toolstack {
        machine.attach_read_only(setup, 0).await
    } else {
        Attached { read_only: true, ..machine.attach(setup, 0).await }
    };
    machine.start_tapdisk();
    let Some(guest) = attached.boot(&world, NO_ERRORS).await else { return };
    world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 2, 400)));
    let ops = operations_of(&world, &attached, 0, 60);
    let (w, g, depth) = (world.clone(), guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    in_guest(&attached, async move {
        let gate = Gate::default();
        for (i, op) in ops.iter().enumerate() {
            let Some(op) = *op else { continue };
            gate.below(depth).await;
            gate.enter();
            let (world, guest, gate) = (w.clone(), g.clone(), gate.clone());
            w.sim.spawn_once("op", i as u64, async move {
                ask(&world, &guest, op).await;
                gate.leave();
            });
        }
        gate.below(1).await;
    })
    .await;
    machine.end_kills();
    finish(&world, &machine, &[(attached, guest)]).await;
    if world.storage.bytes(&path) != before {
        world.fail(Invariant::H1, "the image of a read-only disk has changed");
    }
}

/// One request: changes must be refused, and everything else served.
async fn ask(world: &World, guest: &Guest<RingDisk>, op: Op) {
    let fill = |bytes: &mut [u8]| bytes.fill(FOREIGN);
    let refused = match op.kind {
        IoKind::Write if op.flushes => guest.disk().write_and_flush(op.range, fill).await.is_err(),
        IoKind::Write => guest.disk().write(op.range, fill).await.is_err(),
        _ => return guest.one(op).await,
    };
    world.count(|s| s.requests += 1);
    if !refused {
        world.fail(Invariant::H1, format!("{op} was carried out on a read-only disk"));
    }
}
