//! Our client on a server that lies.

use super::plan::{DISK_BYTES, NO_ERRORS, Plan, address, client_config, client_stack, within};
use crate::check::{BlockHistory, Initial, Invariant};
use crate::guest::{DirectDisk, ErrorPolicy, Guest, LyingServer, Offer, ServerMode};
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::StorageConfig;
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::CacheMode;
use tap_core::wait::Event;
use tap_host::{Listener, SECTOR_BYTES, SectorRange, Sockets};
use tap_nbd::{Breaks, ClientConfig};

/// A server with wrong answers.
pub static NBD_HOSTILE_SERVER: Scenario = Scenario {
    name: "nbd-hostile-server",
    about: "our NBD client on a server whose answers are duplicated, missing, misplaced or truncated: a read has every byte or fails",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(hostile_server(w)),
};

async fn hostile_server(world: World) {
    let plan = Plan::alone(&world);
    let structured = world.setting("nbd-structured", &[true, false]);
    let request_bytes = world.setting("nbd-server-request", &[32 << 20, 64 << 10, 4096]);
    let extended = structured && world.setting("nbd-extended", &[false, true]);
    let offer = Offer { extended, ..Offer::plain(DISK_BYTES, structured, request_bytes) };
    let server = LyingServer::new(&world, offer, ServerMode::Lies);
    let far = plan.process("server", 0);
    let Ok(listener) = far.listen(&address()).await else { return };
    let own = Rc::clone(&server);
    let process = far.process.clone();
    far.process.node().spawn("serve", 0, async move {
        while let Ok(stream) = listener.accept().await {
            process.node().spawn("connection", 0, Rc::clone(&own).serve(stream));
        }
    });
    let size_sectors = DISK_BYTES / SECTOR_BYTES;
    let full = world.setting("bodies", &[false, true]);
    let mut history = BlockHistory::new(size_sectors, 1, Initial::Zero, full);
    history.relax_order();
    let history = Rc::new(RefCell::new(history));
    let host = plan.process("client", 0);
    // A server that never answers is given up soon; one that lies is tried again and again.
    let config = ClientConfig {
        breaks: Breaks::Keep,
        request_ns: world.setting("nbd-patience", &[400_000_000, 50_000_000]),
        ..client_config(&world)
    };
    let ops = plan.operations(0, size_sectors, 60);
    let (p, h, w, past) = (plan.clone(), host.clone(), world.clone(), Rc::clone(&history));
    within(&host, async move {
        let (client, node) = client_stack(&p, &h, &config, CacheMode::WriteBack).await;
        let disk = DirectDisk::new(Rc::clone(&node), p.limits.pool_bytes);
        let policy = ErrorPolicy { errors_allowed: true, reads: Invariant::G1, ..NO_ERRORS };
        let guest = Guest::new(&w, disk, past, policy);
        let (g, sim, looked) = (guest.clone(), w.sim.clone(), Rc::new(Event::new()));
        let done = Rc::clone(&looked);
        h.process.node().spawn("looks", 0, async move {
            for at in 0..16 {
                let range = SectorRange::new(at * 128, (size_sectors - at * 128) as u32);
                // Errors here are also seen by the guest.
                let _ = g.extents(&*node, range, 4096).await;
                sim.sleep_ns(200_000).await;
            }
            done.set();
        });
        guest.run(&ops, p.limits.guest_depth).await;
        server.become_honest();
        w.sim.stop_faults();
        if let Err(error) = guest.read_all().await {
            w.fail(Invariant::E4, format!("reading the disk from an honest server failed with {error:?}"));
        }
        looked.wait().await;
        if client.in_flight() > 0 || guest.disk().buffers_out() > 0 {
            w.fail(Invariant::K1, "requests or buffers of the client are left");
        }
    })
    .await;
}
