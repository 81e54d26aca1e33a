//! Ends tapdisk and starts another.

use crate::machine::Machine;
use kernel_model::SimHost;
use std::rc::Rc;

/// From now on `tapdisk` may lose its events, or its connection to xenstored.
pub(crate) fn may_lose(tapdisk: &SimHost) {
    tapdisk.port.allow_deafness();
    tapdisk.port.allow_store_loss();
}

impl Machine {
    /// Kills tapdisk `times` times, each after the number of effects in `after`, and restarts it.
    pub async fn kill_and_restart(self: Rc<Self>, after: Vec<u64>) {
        for steps in after {
            let Some(host) = self.tapdisk().filter(|_| !self.spared.get()) else { return };
            host.process.node().kill_after_steps(steps);
            host.process.node().dead().await;
            self.world.count(|s| s.crashes += 1);
            self.note_death();
            self.world.sim.sleep_ns(10_000).await;
            if self.off.get() {
                return;
            }
            self.start_after(&host);
        }
    }

    /// The program has died, and with it what it was doing for guests; tapback does nothing for them.
    fn note_death(&self) {
        if self.script.is_none() {
            self.disks.borrow().iter().for_each(|disk| disk.setup.history.borrow_mut().server_died());
        }
    }

    /// Starts a tapdisk in place of `ended`, unless another task has done so already.
    fn start_after(self: &Rc<Self>, ended: &SimHost) {
        let of = |host: &SimHost| host.process.node().entity();
        if self.tapdisk().is_none_or(|now| of(&now) == of(ended)) {
            self.start_tapdisk();
        }
    }

    /// Asks tapdisk to stop after each of these times, and starts another once it has ended.
    pub async fn replace(self: Rc<Self>, after_ns: Vec<u64>) {
        for ns in after_ns {
            self.world.sim.sleep_ns(ns).await;
            let Some(host) = self.tapdisk().filter(|_| !self.spared.get()) else { return };
            host.process.ask_to_stop();
            self.all_ended().await;
            host.process.node().kill();
            host.process.node().dead().await;
            if self.off.get() {
                return;
            }
            self.start_tapdisk();
        }
    }

    /// From now on tapdisk may lose its events, or its connection to xenstored; it then ends, and another is started.
    pub fn allow_losses(&self) {
        self.may_lose.set(true);
        self.tapdisk().iter().for_each(may_lose);
    }

    /// Asks tapdisk to stop, and waits until it has. If it has just lost something, its successor is asked.
    pub(crate) async fn stop_tapdisk(&self) {
        self.stopping.set(true);
        self.tapdisk().iter().for_each(|host| host.process.ask_to_stop());
        self.all_ended().await;
        self.stopping.set(false);
    }

    /// `host` has ended, or is killed now: starts a successor, unless there is one already.
    pub(crate) fn respawn(self: &Rc<Self>, host: &SimHost) {
        let (machine, host) = (Rc::clone(self), host.clone());
        let node = host.process.node().clone();
        // A task of another process than the one that ends.
        self.toolstack.process.node().spawn("respawn", node.entity().0, async move {
            node.kill();
            node.dead().await;
            machine.world.count(|s| s.crashes += 1);
            machine.note_death();
            machine.world.sim.sleep_ns(20_000).await;
            if !machine.off.get() {
                machine.start_after(&host);
            }
        });
    }
}
