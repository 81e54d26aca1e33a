//! The conformance suite on the model of Xen: the same bodies that run in a real dom0.
//!
//! ```text
//!     SimHost   a process of the control domain       Guest   the domain that grants and makes channels
//! ```
//!
//! Each body runs in several worlds: a quiet one, then ones with late events, a slow xenstored, transactions that must
//! be retried, and late turns.

use kernel_model::{Kernel, SimHost, Storage, StorageConfig};
use libtest_mimic::{Arguments, Failed, Trial};
use sim::{Config, Scheduling, Sim};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::rc::Rc;
use tap_conformance::{
    Outcome, Pair, Peer, Place, Test, events, grants, pages, store, transactions, watches,
};
use tap_host::{DomId, Errno, GrantRef, SharedPage, Xenstore};
use xen_model::{Channel, GrantedPage, Options, Page, Xen, XenPort};

const DOM0: DomId = DomId(0);
/// A domain that does not exist.
const STRANGER: DomId = DomId(77);
/// In xenstore.
const FOLDER: &str = "/conformance/folder";
/// Worlds in addition to the quiet one. Half of the faults are off in each.
const SEEDS: u64 = 12;

fn main() -> ExitCode {
    let pair = |host, peer| Pair { host, peer, own: DOM0, stranger: STRANGER };
    let place = |host, _| Place { host, folder: FOLDER.into(), direct: false, device: None, tcp: false };
    let mut trials = Vec::new();
    for (kind, list) in with_peer() {
        trials.extend(list.into_iter().map(|test| trial(kind, test, pair)));
    }
    for (kind, list) in alone() {
        trials.extend(list.into_iter().map(|test| trial(kind, test, place)));
    }
    trials.push(Trial::test("the_documentation_lists_every_body", documented));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

type Lists<P> = Vec<(&'static str, Vec<Test<P>>)>;

fn with_peer() -> Lists<Pair<SimHost, Guest>> {
    vec![("grants", grants::all()), ("events", events::all())]
}

fn alone() -> Lists<Place<SimHost>> {
    let xenstore =
        [("store", store::all()), ("transactions", transactions::all()), ("watches", watches::all())];
    [("pages", pages::all())].into_iter().chain(xenstore).collect()
}

fn documented() -> Result<(), Failed> {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/testing/conformance.md"))?;
    let xen = text.split_once("\n# Xen\n").ok_or("there is no part about Xen")?.1;
    let pairs = with_peer().into_iter().flat_map(|(_, list)| list).map(|test| test.name);
    let places = alone().into_iter().flat_map(|(_, list)| list).map(|test| test.name);
    let mut names: Vec<_> = pairs.chain(places).collect();
    names.sort_unstable();
    let mut rows: Vec<_> =
        xen.lines().filter_map(|l| l.strip_prefix("| `")?.split_once('`')).map(|(n, _)| n).collect();
    rows.retain(|name| !name.contains('/'));
    rows.sort_unstable();
    assert_eq!(rows, names);
    Ok(())
}

fn trial<P: 'static>(
    kind: &str,
    test: Test<P>,
    place: impl Fn(SimHost, Guest) -> P + Send + 'static,
) -> Trial {
    Trial::test(format!("{kind}/{}", test.name), move || {
        let quiet = Config { faults: false, ..Config::new(1) };
        in_world(&quiet, &test, &place).map_err(|e| format!("in a quiet world: {e}"))?;
        for seed in 1..=SEEDS {
            let scheduling = Scheduling::Random { one_in: 8, bits: 16 };
            let config = Config { scheduling, ..Config::new(seed) };
            in_world(&config, &test, &place).map_err(|e| format!("with seed {seed}: {e}"))?;
        }
        Ok(())
    })
}

fn in_world<P>(config: &Config, test: &Test<P>, place: impl Fn(SimHost, Guest) -> P) -> Outcome {
    let sim = Sim::new(config);
    // Both ends of a body run on the same CPU.
    let xen = Xen::new(&sim, Options { other_cpus: false, ..Options::default() });
    let kernel = Kernel::new(&sim, &Storage::new(&sim, StorageConfig::default()));
    let host = SimHost::start(&kernel, &xen, "conformance", 1);
    let dom = xen.create_domain();
    let guest = Guest { port: xen.attach(dom, &sim.node("guest", 1)), pages: Rc::default() };
    let body = (test.body)(place(host.clone(), guest));
    let running = async move {
        host.write(FOLDER, b"").await.map_err(|e| format!("failed to make the folder: {e}"))?;
        body.await
    };
    sim.run(running).map_err(|e| format!("the world does not end: {e:?}"))?
}

/// The other end.
#[derive(Clone)]
struct Guest {
    port: XenPort,
    pages: Rc<RefCell<BTreeMap<GrantRef, Page>>>,
}

impl Peer for Guest {
    type Page = OwnPage;
    type Channel = Channel;
    fn dom(&self) -> DomId {
        self.port.dom()
    }
    fn grant(&self, to: DomId, writable: bool) -> Result<(GrantRef, OwnPage), Errno> {
        let GrantedPage { page, gref } = GrantedPage::new(&self.port, to, !writable)?;
        self.pages.borrow_mut().insert(gref, page.clone());
        Ok((gref, OwnPage(page)))
    }
    fn end_access(&self, gref: GrantRef) -> Result<(), Errno> {
        let page = self.pages.borrow().get(&gref).cloned().ok_or(Errno::EINVAL)?;
        GrantedPage { page, gref }.end(&self.port)?;
        self.pages.borrow_mut().remove(&gref);
        Ok(())
    }
    fn alloc_unbound(&self, remote: DomId) -> Result<Channel, Errno> {
        self.port.alloc_unbound(remote)
    }
}

/// A page as the guest that owns it sees it.
#[derive(Clone)]
struct OwnPage(Page);

impl SharedPage for OwnPage {
    fn load_u32(&self, offset: usize) -> u32 {
        self.0.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.0.store_u32(offset, value);
    }
    fn copy_in(&self, offset: usize, private: &mut [u8]) {
        self.0.read(offset, private);
    }
    fn copy_out(&self, offset: usize, private: &[u8]) {
        self.0.write(offset, private);
    }
    fn full_barrier(&self) {}
}
