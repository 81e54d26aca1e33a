//! A device, its front end and a toolstack, for tests of the back end.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]
#[path = "../../../ring/tests/common/mod.rs"]
pub mod common;

use common::front::{Front, workload};
use common::{Disk, World};
use sim::Config;
use std::cell::RefCell;
use std::rc::Rc;
use tap_abi::xenbus::XenbusState;
use tap_core::wait;
use tap_host::{DomId, VbdId, Watcher, Xenstore};
use tap_xenbus::{Backend, BackendConfig, BackendEnd, BackendError};
use xen_model::{Counts, VbdPaths, XenPort, attach_vbd};

pub const VBD: VbdId = VbdId(51712);

pub type Ends = Rc<RefCell<Vec<Result<BackendEnd, BackendError>>>>;

/// A device, its front end and the toolstack.
#[derive(Clone)]
pub struct Device {
    pub world: World,
    pub toolstack: XenPort,
    pub guest: XenPort,
    pub paths: VbdPaths,
    pub disk: Disk,
    pub config: BackendConfig,
    pub leave: Rc<wait::Event>,
    pub ends: Ends,
}

impl Device {
    pub async fn new(world: &World, read_only: bool) -> Self {
        let toolstack = world.xen.attach(DomId(0), &world.sim.node("toolstack", 0));
        let guest = world.guest();
        let paths = VbdPaths::new("vbd", guest.dom(), VBD);
        attach_vbd(&toolstack, guest.dom(), VBD, &paths, read_only).await.unwrap();
        let mut config = BackendConfig::new(&paths.backend, guest.dom(), VBD);
        config.record = Some("record".into());
        let disk = Disk::new(&world.sim, 1024);
        Self {
            world: world.clone(),
            toolstack,
            guest,
            paths,
            disk,
            config,
            leave: Rc::default(),
            ends: Ends::default(),
        }
    }

    /// Starts the `nth` process of the back end.
    pub fn start(&self, nth: u64) -> sim::Node {
        let host = self.world.process("tapdisk", nth);
        let node = host.process.node().clone();
        let (config, disk, ends) = (self.config.clone(), self.disk.node(), Rc::clone(&self.ends));
        let leave = Rc::clone(&self.leave);
        let own = node.clone();
        node.spawn("backend", 0, async move {
            let end = Backend::run(host, config, async || Ok(disk), leave).await;
            if own.is_alive() {
                ends.borrow_mut().push(end);
            }
        });
        node
    }

    pub async fn read(&self, dir: &str, key: &str) -> Option<String> {
        let value = self.toolstack.read(&format!("{dir}/{key}")).await.ok()?;
        Some(String::from_utf8(value).unwrap())
    }

    pub async fn back(&self, key: &str) -> Option<String> {
        self.read(&self.paths.backend, key).await
    }

    pub async fn set_front(&self, key: &str, value: &str) {
        self.guest.write(&format!("{}/{key}", self.paths.frontend), value.as_bytes()).await.unwrap();
    }

    pub async fn set_back(&self, key: &str, value: &str) {
        self.toolstack.write(&format!("{}/{key}", self.paths.backend), value.as_bytes()).await.unwrap();
    }

    /// Waits until the back end is in `state`, as a front end does.
    pub async fn until_back(&self, state: XenbusState) {
        let path = format!("{}/state", self.paths.backend);
        let watch = self.guest.watch(&path).await.unwrap();
        loop {
            watch.next().await.unwrap();
            if self.guest.read(&path).await.is_ok_and(|value| XenbusState::parse(&value) == Some(state)) {
                return;
            }
        }
    }

    /// What a front end does from state 1 to 4.
    pub async fn connect(&self) -> Rc<Front> {
        self.until_back(XenbusState::InitWait).await;
        let front = Front::new(&self.guest);
        front.ring.publish_in_store(&self.paths.frontend).await.unwrap();
        self.until_back(XenbusState::Connected).await;
        self.set_front("state", "4").await;
        *front.expected.borrow_mut() = self.disk.sectors(0, 512);
        front
    }

    pub async fn work(&self, front: &Rc<Front>, count: u64) {
        workload(self.world.sim.clone(), Rc::clone(front), count, 16, count).await.unwrap();
    }

    /// What a front end does from state 4 to 6; afterwards it has its ring for itself again.
    pub async fn disconnect(&self, front: Rc<Front>) {
        self.set_front("state", "5").await;
        self.until_back(XenbusState::Closing).await;
        self.set_front("state", "6").await;
        self.until_back(XenbusState::Closed).await;
        let Ok(Front { ring, .. }) = Rc::try_unwrap(front) else { panic!("the ring is still in use") };
        ring.end().expect("the page is no longer mapped");
    }

    pub async fn settle(&self) {
        self.world.sim.sleep_ns(50_000_000).await;
    }

    pub fn assert_nothing_held(&self) {
        // The toolstack's own connection holds nothing either.
        assert_eq!(self.world.xen.counts(DomId(0)), Counts::default());
        assert_eq!(self.world.xen.mapped_from(self.guest.dom()), 0);
        assert!(self.world.xen.regions().is_empty());
    }

    pub fn end(&self) -> Option<Result<BackendEnd, BackendError>> {
        self.ends.borrow().last().cloned()
    }
}

pub fn world(config: &Config, body: impl AsyncFnOnce(World) + 'static) -> World {
    let world = World::new(config);
    let inside = world.clone();
    if let Err(stall) = world.sim.run(async move { body(inside).await }) {
        panic!("seed {}: {stall:?}", config.seed);
    }
    world
}
