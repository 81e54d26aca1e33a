//! A toolstack as xl is one: it waits so long for each step and no longer.
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
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use tap_host::{Errno, Transaction, Watcher, Xenstore};
use xen_model::{VbdPaths, attach_vbd, remove_vbd};

/// How long xl waits for a state of the back end, in nanoseconds.
const XL_WAITS_NS: u64 = 10_000_000_000;

/// What tapdisk has to do once a guest is gone is done after so many nanoseconds, and nothing comes after it.
const HALT_NS: [u64; 2] = [4_000_000_000, 500_000_000];

impl Machine {
    /// Gives `disk` to its guest, with a script; the tapdisk that watches has to find it.
    pub async fn plug(&self, disk: &Attached) {
        self.add(disk);
        loop {
            match self.try_plug(disk).await {
                Ok(None) => return,
                // Who has read why tries again.
                Ok(Some(_)) if self.world.errors_allowed() => {}
                Ok(Some(why)) => {
                    return self.world.fail(Invariant::L1, format!("a disk that is whole is refused: {why}"));
                }
                Err(error) => {
                    let text = format!("the toolstack failed to plug a disk in: {error:?}");
                    return self.world.fail(Invariant::L1, text);
                }
            }
            if let Err(error) = self.try_unplug(disk).await {
                let text = format!("the toolstack failed to take away a disk that was refused: {error:?}");
                return self.world.fail(Invariant::L1, text);
            }
        }
    }

    /// Tries to give `disk` to its guest while its image is away: the toolstack is told why, and takes the disk away
    /// again.
    pub async fn plug_in_vain(&self, disk: &Attached) {
        self.add(disk);
        let why = match self.try_plug(disk).await {
            Ok(Some(why)) if why.contains(&disk.setup.spec.path) => None,
            Ok(Some(why)) => {
                Some(format!("a disk without an image is refused and it does not say why: {why}"))
            }
            Ok(None) => Some("a disk without an image is served".into()),
            Err(error) => Some(format!("a disk without an image is not refused: {error:?}")),
        };
        if let Some(why) = why {
            self.world.fail(Invariant::L1, why);
        } else if let Err(error) = self.try_unplug(disk).await {
            let text = format!("the toolstack failed to take away a disk that was refused: {error:?}");
            self.world.fail(Invariant::L1, text);
        }
        self.disks.borrow_mut().retain(|d| d.paths != disk.paths);
    }

    /// A disk of another guest that another program serves. Gives its directories.
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

    /// Takes a foreign disk away, which nobody may have touched.
    pub async fn unplug_foreign(&self, paths: &VbdPaths) {
        let port = &self.toolstack.port;
        let state = port.read(&format!("{}/state", paths.backend)).await;
        if state != Ok(b"1".to_vec()) {
            self.world.fail(Invariant::K1, format!("tapdisk has led the disk of another program: {state:?}"));
        }
        if let Err(error) = remove_vbd(port, paths).await {
            self.world
                .fail(Invariant::K1, format!("the toolstack failed to remove a foreign disk: {error:?}"));
        }
    }

    /// Gives the reason if the disk is refused: xl's script finds it, and fails.
    async fn try_plug(&self, disk: &Attached) -> Result<Option<String>, Errno> {
        let (port, back) = (&self.toolstack.port, &disk.paths.backend);
        attach_vbd(port, disk.dom, disk.vbd, &disk.paths, disk.read_only).await?;
        port.write(&format!("{back}/params"), named(&disk.setup.spec).as_bytes()).await?;
        // In one transaction with the others for xl; here it is what makes the disk tapdisk's, so it comes last.
        port.write(&format!("{back}/script"), format!("/etc/xen/scripts/{SCRIPT}").as_bytes()).await?;
        self.wait_for_back(disk, b"2").await?;
        match port.read(&format!("{back}/hotplug-error")).await {
            Ok(why) => return Ok(Some(String::from_utf8_lossy(&why).into_owned())),
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error),
        }
        port.write(&format!("{back}/hotplug-status"), b"connected").await?;
        Ok(None)
    }

    async fn try_unplug(&self, disk: &Attached) -> Result<(), Errno> {
        self.take_offline(disk).await?;
        self.wait_for_back(disk, b"6").await?;
        self.check_unmapped(disk);
        remove_vbd(&self.toolstack.port, &disk.paths).await
    }

    /// Takes `disk` away from its guest, whose front end has let go of it or does so meanwhile.
    pub async fn unplug(&self, disk: &Attached) {
        if let Err(error) = self.try_unplug(disk).await {
            self.world.fail(Invariant::L1, format!("the toolstack failed to take a disk away: {error:?}"));
        }
        self.disks.borrow_mut().retain(|d| d.paths != disk.paths);
    }

    /// Ends a guest while no tapdisk runs: nobody answers, and the nodes are removed after a while all the same.
    pub async fn destroy_alone(&self, disk: &Attached) {
        disk.node.kill();
        disk.node.dead().await;
        let result = async {
            self.force_offline(disk).await?;
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

    /// Ends a guest, whatever it is doing.
    pub async fn destroy(&self, disk: &Attached) {
        disk.node.kill();
        disk.node.dead().await;
        let result = async {
            if self.is_watching() && self.world.setting("toolstack-halts", &[false, true]) {
                self.halt(disk).await?;
            }
            self.force_offline(disk).await?;
            self.wait_for_back(disk, b"6").await?;
            self.check_unmapped(disk);
            self.toolstack.port.remove(&disk.paths.backend).await
        };
        if let Err(error) = result.await {
            self.world.fail(Invariant::L1, format!("the toolstack failed to destroy a guest: {error:?}"));
        }
        self.world.xen.destroy_domain(disk.dom);
        self.disks.borrow_mut().retain(|d| d.dom != disk.dom);
    }

    /// The toolstack dies once the front end's nodes are gone, and somebody ends its work later. The tapdisk that
    /// served the disk closes it, and leaves it at that.
    async fn halt(&self, disk: &Attached) -> Result<(), Errno> {
        self.toolstack.port.remove(&disk.paths.frontend).await?;
        self.world.sim.sleep_ns(HALT_NS[0]).await;
        let before = self.world.storage.counts();
        self.world.sim.sleep_ns(HALT_NS[1]).await;
        if self.world.storage.counts() != before {
            self.world.fail(Invariant::D1, "files are used although no guest is left that is at work");
        }
        Ok(())
    }

    /// State 6 was said: of a disk that is taken away, nothing is in use any more.
    fn check_unmapped(&self, disk: &Attached) {
        let others = self.disks.borrow().iter().filter(|d| d.dom == disk.dom).count() > 1;
        if !others && self.world.xen.mapped_from(disk.dom) > 0 {
            self.world
                .fail(Invariant::K1, "a back end that says it is closed has a page of its guest mapped");
        }
    }

    async fn force_offline(&self, disk: &Attached) -> Result<(), Errno> {
        loop {
            let tx = self.toolstack.port.transaction().await?;
            tx.remove(&disk.paths.frontend).await?;
            let state = format!("{}/state", disk.paths.backend);
            if tx.read(&state).await? != b"6" {
                tx.write(&format!("{}/online", disk.paths.backend), b"0").await?;
                tx.write(&state, b"5").await?;
            }
            match tx.commit().await {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
    }

    async fn wait_for_back(&self, disk: &Attached, state: &[u8]) -> Result<(), Errno> {
        let path = format!("{}/state", disk.paths.backend);
        let watch = self.toolstack.port.watch(&path).await?;
        let mut enough = pin!(self.world.sim.sleep_ns(XL_WAITS_NS));
        loop {
            let mut changed = pin!(watch.next());
            std::future::poll_fn(|cx| {
                if let Poll::Ready(event) = changed.as_mut().poll(cx) {
                    return Poll::Ready(event.map(drop));
                }
                enough.as_mut().poll(cx).map(|()| Err(Errno::ETIMEDOUT))
            })
            .await?;
            if self.toolstack.port.read(&path).await? == state {
                return Ok(());
            }
        }
    }
}
