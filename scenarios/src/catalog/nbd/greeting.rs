//! Our client on what is no server for it.

use super::plan::{DISK_BYTES, Plan, address, client_config, within};
use crate::check::Invariant;
use crate::guest::{NBD_GREETING, RawNbd, draw_greeting, greet, is_wrong};
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::{SimHost, StorageConfig};
use sim::Entity;
use std::cell::Cell;
use std::rc::Rc;
use tap_core::Node;
use tap_host::{Either, Listener, SECTOR_BYTES, Sockets, select};
use tap_nbd::Client;

/// Peers that do not speak NBD, or not as the client does.
pub static NBD_WRONG_GREETING: Scenario = Scenario {
    name: "nbd-wrong-greeting",
    about: "our NBD client on a peer that is no NBD server, or whose export it cannot use: it says so soon, and keeps nothing",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(wrong_greeting(w)),
};

/// Connections of one run.
const CONNECTIONS: u32 = 6;
/// How much later than agreed the client may give up, and how soon its stream must have ended then.
const SOON_NS: u64 = 1_000_000_000;

/// What the peer does next, and the connections that it has.
#[derive(Default)]
struct Peer {
    greeting: Cell<u64>,
    open: Cell<u32>,
}

async fn wrong_greeting(world: World) {
    let plan = Plan::alone(&world);
    let far = plan.process("server", 0);
    let Ok(listener) = far.listen(&address()).await else { return };
    let peer = Rc::new(Peer::default());
    let (own, process) = (Rc::clone(&peer), far.process.clone());
    far.process.node().spawn("serve", 0, async move {
        while let Ok(stream) = listener.accept().await {
            let own = Rc::clone(&own);
            own.open.set(own.open.get() + 1);
            process.node().spawn("connection", 0, async move {
                greet(&RawNbd::new(stream), own.greeting.get(), DISK_BYTES).await;
                own.open.set(own.open.get() - 1);
            });
        }
    });
    let (host, w) = (plan.process("client", 0), world.clone());
    let client = host.clone();
    within(&host, async move {
        for n in 0..CONNECTIONS {
            let value =
                w.sim.decide(Entity::WORLD, &NBD_GREETING, n, |d| draw_greeting(|most| d.below(most)));
            peer.greeting.set(value);
            connect(&w, &client, &peer).await;
        }
    })
    .await;
}

/// One attempt of the client.
async fn connect(world: &World, host: &SimHost, peer: &Peer) {
    let config = client_config(world);
    let wrong = is_wrong(peer.greeting.get());
    let used = || config.memory.figures().used_bytes - config.memory.figures().kept_bytes;
    let before = used();
    let patience = world.sim.sleep_ns(config.connect_ns + SOON_NS);
    match select(patience, Client::connect(host.clone(), config.clone())).await {
        Either::First(()) => {
            let text =
                format!("the client has been waiting for its peer for {} ns", config.connect_ns + SOON_NS);
            world.fail(Invariant::L1, text);
        }
        Either::Second(Ok(client)) => {
            let size_sectors = client.info().size_sectors;
            if wrong || size_sectors != DISK_BYTES / SECTOR_BYTES {
                world.fail(Invariant::N4, format!("the client took an export of {size_sectors} sectors"));
            }
            if let Err(error) = client.close().await {
                world.fail(Invariant::E4, format!("closing the disk failed with {error:?}"));
            }
        }
        Either::Second(Err(error)) => {
            world.sim.remark("client", || format!("failed to {error}"));
            if !wrong {
                world.fail(Invariant::N4, format!("the client failed to {error}"));
            }
        }
    }
    world.sim.sleep_ns(SOON_NS).await;
    if peer.open.get() > 0 {
        world.fail(Invariant::K1, "the stream of a client that has given up is still open");
    }
    if used() != before {
        let text = format!("{} bytes are taken after a client that had {before}", used());
        world.fail(Invariant::M3, text);
    }
}
