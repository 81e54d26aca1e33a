//! A toolstack that acts as xl does, with its time limit for each step.
//!
//! ```text
//!   plug      nodes, state 1 ─► waits for the back end's 2 ─► its script: connected
//!   unplug    online 0, state 5 ─► waits for the back end's 6 ─► nodes gone
//!   destroy   front end's nodes gone, online 0, state 5 ─► waits for the back end's 6 ─► nodes gone, domain gone
//! ```
//!
//! The order of the steps and the time limits are those of libxl in Xen 4.17.

use crate::check::Invariant;
use crate::machine::{Attached, Machine, SCRIPT, XVDA};
use crate::program::named;
use std::pin::pin;
use tap_host::{Errno, Transaction, Watcher, Xenstore, unless};
use xen_model::{VbdPaths, attach_vbd, remove_vbd};

/// How long xl waits for a state of the back end, in nanoseconds.
const XL_WAITS_NS: u64 = 10_000_000_000;

/// How long tapdisk may work after a guest is gone, and how long it must then be silent, in nanoseconds. Each error of
/// xenstored may cost it a pause of seconds, after which it opens the disk once more.
const HALT_NS: [u64; 2] = [20_000_000_000, 500_000_000];

impl Machine {
    /// Attaches `disk` to its guest with a script; the watching tapdisk has to find it.
    pub async fn plug(&self, disk: &Attached) {
        self.add(disk);
        loop {
            match self.try_plug(disk).await {
                Ok(None) => return,
                // The toolstack has read the reason, and tries again.
                Ok(Some(_)) if self.world.errors_allowed() => {}
                Ok(Some(why)) => {
                    return self.world.fail(Invariant::L1, format!("an intact disk is refused: {why}"));
                }
                Err(error) => {
                    let text = format!("the toolstack failed to attach a disk: {error:?}");
                    return self.world.fail(Invariant::L1, text);
                }
            }
            if let Err(error) = self.try_unplug(disk).await {
                let text = format!("the toolstack failed to detach a refused disk: {error:?}");
                return self.world.fail(Invariant::L1, text);
            }
        }
    }

    /// Tries to attach `disk` while its image is absent: the toolstack must read why, and detaches the disk again.
    pub async fn plug_without_image(&self, disk: &Attached) {
        self.add(disk);
        let why = match self.try_plug(disk).await {
            Ok(Some(why)) if why.contains(&disk.setup.spec.path) => None,
            Ok(Some(why)) => Some(format!("a disk without an image is refused without the reason: {why}")),
            Ok(None) => Some("a disk without an image is served".into()),
            Err(error) => Some(format!("a disk without an image is not refused: {error:?}")),
        };
        if let Some(why) = why {
            self.world.fail(Invariant::L1, why);
        } else if let Err(error) = self.try_unplug(disk).await {
            let text = format!("the toolstack failed to detach a refused disk: {error:?}");
            self.world.fail(Invariant::L1, text);
        }
        self.disks.borrow_mut().retain(|d| d.paths != disk.paths);
    }

    /// Attaches a disk of another guest that another program serves. Returns its directories.
    pub async fn plug_foreign(&self) -> VbdPaths {
        let dom = self.world.xen.create_domain();
        let (port, paths) = (&self.toolstack.port, VbdPaths::new("vbd", dom, XVDA));
        let made = async {
            attach_vbd(port, dom, XVDA, &paths, false).await?;
            port.write(&format!("{}/script", paths.backend), b"/etc/xen/scripts/block").await
        };
        if let Err(error) = made.await {
            self.world
                .fail(Invariant::K1, format!("the toolstack failed to attach a foreign disk: {error:?}"));
        }
        paths
    }

    /// Detaches a foreign disk, which must be untouched.
    pub async fn unplug_foreign(&self, paths: &VbdPaths) {
        let port = &self.toolstack.port;
        let state = port.read(&format!("{}/state", paths.backend)).await;
        if state != Ok(b"1".to_vec()) {
            self.world
                .fail(Invariant::K1, format!("tapdisk has served the disk of another program: {state:?}"));
        }
        if let Err(error) = remove_vbd(port, paths).await {
            self.world
                .fail(Invariant::K1, format!("the toolstack failed to remove a foreign disk: {error:?}"));
        }
    }

    /// Returns the reason if the disk is refused: xl's script finds it, and fails.
    async fn try_plug(&self, disk: &Attached) -> Result<Option<String>, Errno> {
        let (port, back) = (&self.toolstack.port, &disk.paths.backend);
        attach_vbd(port, disk.dom, disk.vbd, &disk.paths, disk.read_only).await?;
        port.write(&format!("{back}/params"), named(&disk.setup.spec).as_bytes()).await?;
        // xl writes it in one transaction with the others. It is what makes the disk tapdisk's, so here it comes last.
        port.write(&format!("{back}/script"), format!("/etc/xen/scripts/{SCRIPT}").as_bytes()).await?;
        self.wait_for_back(disk, b"2").await?;
        match port.read(&format!("{back}/hotplug-error")).await {
            Ok(why) => return Ok(Some(String::from_utf8_lossy(&why).into_owned())),
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error),
        }
        if let Some(script) = &self.script {
            let mut path = script.add(disk).await;
            loop {
                port.write(&format!("{back}/physical-device-path"), path.as_bytes()).await?;
                // Its tapdisk may have died before it could be named, and another one have it.
                let now = script.add(disk).await;
                if now == path {
                    break;
                }
                path = now;
            }
        }
        port.write(&format!("{back}/hotplug-status"), b"connected").await?;
        Ok(None)
    }

    async fn try_unplug(&self, disk: &Attached) -> Result<(), Errno> {
        self.take_offline(disk, false).await?;
        self.wait_for_back(disk, b"6").await?;
        self.check_unmapped(disk);
        self.close_by_script(disk).await;
        remove_vbd(&self.toolstack.port, &disk.paths).await
    }

    /// The script's other half.
    async fn close_by_script(&self, disk: &Attached) {
        if let Some(script) = &self.script {
            script.remove(disk).await;
        }
    }

    /// Detaches `disk` from its guest, whose front end has released it or is about to.
    pub async fn unplug(&self, disk: &Attached) {
        if let Err(error) = self.try_unplug(disk).await {
            self.world.fail(Invariant::L1, format!("the toolstack failed to detach a disk: {error:?}"));
        }
        self.disks.borrow_mut().retain(|d| d.paths != disk.paths);
    }

    /// Destroys a guest while no tapdisk runs: the wait for it times out, and the nodes are removed anyway.
    pub async fn destroy_alone(&self, disk: &Attached) {
        disk.node.kill();
        disk.node.dead().await;
        let result = async {
            self.take_offline(disk, true).await?;
            match self.wait_for_back(disk, b"6").await {
                Ok(()) | Err(Errno::ETIMEDOUT) => {}
                Err(error) => return Err(error),
            }
            self.toolstack.port.remove(&disk.paths.backend).await
        };
        if let Err(error) = result.await {
            self.world.fail(Invariant::L1, format!("the toolstack failed to destroy a guest: {error:?}"));
        }
        self.world.xen.destroy_domain(disk.dom);
        self.disks.borrow_mut().retain(|d| d.dom != disk.dom);
    }

    /// Destroys a guest, whatever it is doing.
    pub async fn destroy(&self, disk: &Attached) {
        disk.node.kill();
        disk.node.dead().await;
        let result = async {
            if self.is_watching() && self.world.setting("toolstack-halts", &[false, true]) {
                self.halt(disk).await?;
            }
            self.take_offline(disk, true).await?;
            self.wait_for_back(disk, b"6").await?;
            self.check_unmapped(disk);
            self.close_by_script(disk).await;
            self.toolstack.port.remove(&disk.paths.backend).await
        };
        if let Err(error) = result.await {
            self.world.fail(Invariant::L1, format!("the toolstack failed to destroy a guest: {error:?}"));
        }
        self.world.xen.destroy_domain(disk.dom);
        self.disks.borrow_mut().retain(|d| d.dom != disk.dom);
    }

    /// The toolstack dies once the front end's nodes are gone, and its work is finished later. The tapdisk that served
    /// the disk closes it and does nothing further.
    async fn halt(&self, disk: &Attached) -> Result<(), Errno> {
        self.toolstack.port.remove(&disk.paths.frontend).await?;
        self.world.sim.sleep_ns(HALT_NS[0]).await;
        let before = self.world.storage.counts();
        self.world.sim.sleep_ns(HALT_NS[1]).await;
        if self.world.storage.counts() != before {
            self.world.fail(Invariant::D1, "files are used after the last active guest has gone");
        }
        Ok(())
    }

    /// After state 6 of a disk that is being removed, no page of its guest is mapped.
    pub(crate) fn check_unmapped(&self, disk: &Attached) {
        let others = self.disks.borrow().iter().filter(|d| d.dom == disk.dom).count() > 1;
        if !others && self.world.xen.mapped_from(disk.dom) > 0 {
            self.world.fail(Invariant::K1, "a back end in state Closed has a page of its guest mapped");
        }
    }

    /// Asks the back end to close, unless it has, and not to open again; with `force` the front end is gone then.
    pub(crate) async fn take_offline(&self, disk: &Attached, force: bool) -> Result<(), Errno> {
        loop {
            let tx = self.toolstack.port.transaction().await?;
            if force {
                tx.remove(&disk.paths.frontend).await?;
            }
            tx.write(&format!("{}/online", disk.paths.backend), b"0").await?;
            let state = format!("{}/state", disk.paths.backend);
            if tx.read(&state).await? != b"6" {
                tx.write(&state, b"5").await?;
            }
            match tx.commit().await {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
    }

    pub(crate) async fn wait_for_back(&self, disk: &Attached, state: &[u8]) -> Result<(), Errno> {
        let path = format!("{}/state", disk.paths.backend);
        let watch = self.toolstack.port.watch(&path).await?;
        let mut enough = pin!(self.world.sim.sleep_ns(XL_WAITS_NS));
        loop {
            unless(enough.as_mut(), watch.next()).await.ok_or(Errno::ETIMEDOUT)??;
            if self.toolstack.port.read(&path).await? == state {
                return Ok(());
            }
        }
    }
}
