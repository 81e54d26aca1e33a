//! A `tapdisk serve` with a command line that it cannot carry out, next to one that serves.

use super::plan::{DISK_BYTES, Plan, address, client_config, end, within};
use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::program::{Printed, named, tapdisk};
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::StorageConfig;
use std::rc::Rc;
use tap_core::CacheMode;
use tap_core::wait::joined;
use tap_host::{SocketAddress, Sockets};
use tap_nbd::ClientConfig;
use tap_programs::Tuning;

/// A server with an invalid command line.
pub static NBD_SERVE_REFUSED: Scenario = Scenario {
    name: "nbd-serve-refused",
    about: "tapdisk serve cannot do what its command line says: it reports why, releases everything, and disturbs no other; once corrected, it serves",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(serve_refused(w)),
};

/// What is wrong with the command line.
const WHY: [&str; 9] = [
    "an image is missing",
    "an image is in use",
    "an address is in use",
    "a name stands twice",
    "a name is missing",
    "there is no address",
    "a format is missing",
    "memory is short",
    "a name is too long",
];

/// The longest name that the protocol permits.
const LONGEST: &str = match std::str::from_utf8(&[b'n'; 4096]) {
    Ok(name) => name,
    Err(_) => "",
};

fn second_address() -> SocketAddress {
    SocketAddress::Unix("/run/second.nbd".into())
}

/// Arguments that cannot be carried out, with an image `own` that can be served, and a part of the expected message.
fn wrong(why: &str, own: &str, used: &str) -> (String, &'static str) {
    let (here, there) = (second_address(), address());
    match why {
        "an image is missing" => {
            (format!("--nbd {here} a={own} b=raw:/images/gone.img"), "open /images/gone.img: ")
        }
        "an image is in use" => (format!("--nbd {here} a={own} b={used}"), "it is in use by another process"),
        "an address is in use" => (format!("--nbd {here} --nbd {there} a={own}"), "another server is there"),
        "a name stands twice" => (format!("--nbd {here} a={own} a=raw:/images/disk2.img"), "serve 'a' twice"),
        "a name is missing" => (format!("--nbd {here} a={own} raw:/images/disk2.img"), "need names"),
        "there is no address" => (format!("a={own}"), "there is no address"),
        "a name is too long" => {
            (format!("--nbd {here} a={own} {LONGEST}n=raw:/images/disk2.img"), "longer than 4096 bytes")
        }
        "a format is missing" => (format!("--nbd {here} a={own} b=/images/disk2.img"), "name its format"),
        _ => (format!("--nbd {here} --memory 16M --connections 600 a={own}"), "its memory of"),
    }
}

async fn serve_refused(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let own = Setup::raw(&world, 1, DISK_BYTES);
    own.history.borrow_mut().relax_order();
    // Another disk that could be served.
    let _other = Setup::raw(&world, 2, DISK_BYTES);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let host = plan.process("client", 0);
    let (disk, clients) = plan.spread(&host, &client_config(&world), 1, CacheMode::WriteBack).await;
    let guest = plan.guest(disk, &setup, Invariant::H2);
    let (g, ops, depth) = (guest, plan.operations(0, setup.size_sectors, 40), plan.limits.guest_depth);
    let (task, finished) = joined(async move {
        g.run(&ops, depth).await;
    });
    host.process.node().spawn("main", 0, task);
    refuse(&world, &plan, &setup, &own).await;
    serve_corrected(&world, &plan, &own).await;
    let _ = finished.await;
    end(&plan, served, &clients, &setup).await;
}

/// Starts a server that must refuse, and waits for its end.
async fn refuse(world: &World, plan: &Plan, setup: &Setup, own: &Setup) {
    let why = world.setting("refused-because", &WHY);
    let (arguments, text) = wrong(why, &named(&own.spec), &named(&setup.spec));
    let host = plan.process("second", 0);
    let (h, w, said) = (host.clone(), world.clone(), Rc::<Printed>::default());
    let tuning = Tuning { memory: None, ..plan.limits.tuning(world, host.process.node(), 0) };
    let line = format!("serve {arguments}");
    let own = own.clone();
    within(&host, async move {
        let status = tapdisk(&w, &h, &line, tuning, &said).await;
        let lines = said.err.take();
        let is_said = |line: &String| line.starts_with("tapdisk: failed to ") && line.contains(text);
        if status != 1 || lines.len() != 1 || !is_said(&lines[0]) {
            let told = format!("tapdisk {line} ended with status {status}: {}", lines.join("; "));
            w.fail(Invariant::L1, format!("{told}; expected: {text}"));
        }
        own.check_closed(&w);
        let locks = w.storage.locks(&own.spec.path);
        if !locks.is_empty() || h.connect(&second_address()).await.is_ok() {
            w.fail(Invariant::K1, format!("a server that has refused keeps {locks:?}, or listens"));
        }
    })
    .await;
    host.process.node().kill();
}

/// The same image alone: its export needs no name, or has the longest.
async fn serve_corrected(world: &World, plan: &Plan, own: &Setup) {
    let name = if world.setting("long-export-name", &[false, true]) { LONGEST } else { "" };
    let plan = plan.other(name, own, second_address());
    let Some(second) = plan.serve(&plan.process("second", 1)).await else { return };
    let host = plan.process("other client", 0);
    let config = ClientConfig { address: second_address(), export: name.to_owned(), ..client_config(world) };
    let (disk, clients) = plan.spread(&host, &config, 1, CacheMode::WriteBack).await;
    let guest = plan.guest(disk, own, Invariant::G1);
    let ops = plan.operations(1, own.size_sectors, 10);
    within(&host, async move { guest.run(&ops, 4).await }).await;
    for client in &clients {
        if let Err(error) = tap_core::Node::close(&**client).await {
            world.fail(Invariant::E4, format!("closing a client failed with {error:?}"));
        }
    }
    second.stop(world, own).await;
}
