//! The ring of a back end, and what its front end is told of the disk.

use super::Backend;
use crate::config::{BackendError, XenHost};
use crate::disk::{DiskSize, ServedDisk, Serving, Shown, Unserved};
use crate::keys;
use crate::rules::{Action, Phase, next};
use crate::states::{self, Written};
use tap_abi::blkif::INFO_READ_ONLY;
use tap_abi::xenbus::XenbusState;
use tap_host::{Errno, Event, Patience, SECTOR_BYTES};
use tap_ring::{ConnectError, RingConfig};

tap_host::listed! {
    pub(super) BUGS: Bug;
    BIND_ONCE = "bind-once", "a port that a dying predecessor still holds is taken as a broken ring";
    DISK_NOT_COMPARED = "disk-not-compared",
        "a smaller disk, or one of another mode, is put under a running guest";
    RING_LEFT_BEHIND = "ring-left-behind",
        "a back end reports itself closed while its ring is still being served";
    READ_ONLY_UNTOLD = "read-only-untold", "a disk whose image can only be read is announced as writable";
    MEMORY_ONCE = "memory-once", "a temporary lack of memory on the host is taken as a broken ring";
    STORE_LOSS_CLOSES = "store-loss-closes",
        "a back end that has lost xenstore closes its ring, which no successor can take over";
    AWAY_REFUSED = "away-refused",
        "a front end that connects while whoever serves its disk is away is refused";
    GROWTH_NOT_TAKEN_UP = "growth-not-taken-up",
        "a disk that became larger while no back end ran is not published";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    BIND_WAITED = "bind-waited", "a ring's port was bound once a dying predecessor had released it";
    MEMORY_WAITED = "memory-waited", "a ring was connected once the host had memory for it";
    RECONNECTED = "reconnected", "a front end connected again";
    GROWTH_PUBLISHED = "growth-published", "a front end was told that its disk has become larger";
    GROWTH_FOUND = "growth-found", "a ring was taken over whose disk had become larger";
}

impl<H: XenHost, D: ServedDisk<H>> Backend<H, D> {
    /// Tells the front end how large the disk of its ring is now.
    pub(super) async fn publish_size(&mut self) -> Result<(), BackendError> {
        let Some(sectors) = self.size.untold_sectors() else { return Ok(()) };
        let (host, keys) = (&self.host, [("sectors", sectors.to_string())]);
        // From now on no smaller disk may take this one's place.
        let before = self.size.told_sectors();
        self.size.tell(sectors);
        match states::repeat(host, &self.config.backend_path, &keys).await? {
            Written::Yes => {
                host.mark(&GROWTH_PUBLISHED);
                let (dom, vbd, state) = (self.config.dom, self.config.vbd, self.state.number());
                host.log(Event::BackendState { dom, vbd, state });
            }
            // The rules are applied again.
            Written::No => self.size.tell(before),
        }
        Ok(())
    }

    async fn ring_from_keys(
        &self,
        read_only: bool,
        size: &DiskSize,
    ) -> Result<Result<Serving, Unserved>, BackendError> {
        let keys = match self.features.ring(&self.host, &self.frontend).await? {
            Ok(keys) => keys,
            Err(why) => return Ok(Err(Unserved { words: format!("connect: {why}"), away: false })),
        };
        let config = RingConfig {
            dom: self.config.dom,
            vbd: self.config.vbd,
            ring_ref: keys.ring_ref,
            port: keys.port,
            record: self.config.record.clone(),
            limits: self.config.limits,
            read_only,
            memory: self.config.memory.clone(),
        };
        Ok(self.bind_ring(config, size).await.map_err(Unserved::from))
    }

    /// Connects; waits a while for a port that is still held, and for a host that is short of memory.
    async fn bind_ring(&self, config: RingConfig, size: &DiskSize) -> Result<Serving, ConnectError> {
        let until_ns = self.host.now_ns().saturating_add(self.config.bind_patience_ns);
        let (mut patience, mut waited_for) = (Patience::until(), None);
        loop {
            match self.disk.connect(&self.host, config.clone(), size).await {
                Err(error) if self.may_pass(&error) && patience.again_before(&self.host, until_ns).await => {
                    waited_for = Some(if error.passes() { &MEMORY_WAITED } else { &BIND_WAITED });
                }
                result => {
                    waited_for.filter(|_| result.is_ok()).into_iter().for_each(|mark| self.host.mark(mark));
                    return result;
                }
            }
        }
    }

    fn may_pass(&self, error: &ConnectError) -> bool {
        match error {
            ConnectError::Bind { error: Errno::EINVAL, .. } => !self.host.bug(&BIND_ONCE),
            error => error.passes() && !self.host.bug(&MEMORY_ONCE),
        }
    }

    /// What front ends are to be told; read-only also if the toolstack wants it.
    async fn shown(&self) -> Result<Result<Shown, Unserved>, BackendError> {
        let toolstack_wants = keys::is_read_only(&self.host, &self.config.backend_path).await?;
        Ok(self.disk.shown().await.map(|shown| {
            let disk_is = shown.read_only && !self.host.bug(&READ_ONLY_UNTOLD);
            Shown { read_only: disk_is || toolstack_wants, ..shown }
        }))
    }

    /// A ring for the front end, and what it is to be told of the disk.
    async fn ring_and_disk(&mut self) -> Result<Result<(Serving, Shown), Unserved>, BackendError> {
        let disk = match self.shown().await? {
            Ok(disk) => disk,
            Err(why) => return Ok(Err(why)),
        };
        let size = DiskSize::new(disk.size_sectors);
        let ring = self.ring_from_keys(disk.read_only, &size).await?;
        self.size = size;
        Ok(ring.map(|ring| (ring, disk)))
    }

    pub(super) async fn connect(&mut self) -> Result<(), BackendError> {
        let (ring, disk) = match self.ring_and_disk().await? {
            Ok(found) => found,
            Err(Unserved { words: why, away }) => {
                let seen = self.look().await?;
                if seen.backend == Some(XenbusState::Connected) && self.state != XenbusState::Connected {
                    // Held by a process that does not use our lock: an older version, or another program.
                    return Err(BackendError::NotTaken { path: self.config.backend_path.clone(), why });
                }
                return match next(self.phase, &seen) {
                    Action::Connect if away && !self.host.bug(&AWAY_REFUSED) => self.pause().await,
                    Action::Connect => self.fail(&why).await,
                    // What was in the way may have changed meanwhile.
                    _ => Ok(()),
                };
            }
        };
        let keys = [
            ("sectors", disk.size_sectors.to_string()),
            ("sector-size", SECTOR_BYTES.to_string()),
            ("physical-sector-size", disk.physical_block_bytes.to_string()),
            ("info", info_of(disk.read_only).to_string()),
        ];
        // From here on it is released with everything else.
        self.ring = Some(ring);
        match self.write_state(XenbusState::Connected, &keys).await? {
            Written::Yes => self.serve(),
            // It was closed meanwhile.
            Written::No => {
                self.release_ring(false).await;
                self.phase = Phase::Failed;
            }
        }
        Ok(())
    }

    /// Takes over the ring of a predecessor; nothing is written, because the front end must not notice. What has become
    /// larger since is published once the ring is served.
    pub(super) async fn resume(&mut self) -> Result<Result<(), String>, BackendError> {
        let disk = match self.shown().await? {
            Ok(disk) => disk,
            Err(why) => return Ok(Err(why.words)),
        };
        let told_sectors = match self.told_of(&disk).await? {
            Ok(told_sectors) => told_sectors,
            Err(_) if self.host.bug(&DISK_NOT_COMPARED) => disk.size_sectors,
            Err(why) => return Ok(Err(why)),
        };
        let told_sectors = if self.host.bug(&GROWTH_NOT_TAKEN_UP) { disk.size_sectors } else { told_sectors };
        let size = DiskSize::new(told_sectors);
        if size.grew(disk.size_sectors) {
            self.host.mark(&GROWTH_FOUND);
        }
        Ok(self.ring_from_keys(disk.read_only, &size).await?.map_err(|why| why.words).map(|ring| {
            self.size = size;
            self.ring = Some(ring);
            self.serve();
        }))
    }

    /// The size in sectors that the front end was told, or how our disk cannot be the one that it was told about.
    async fn told_of(&self, disk: &Shown) -> Result<Result<u64, String>, BackendError> {
        let dir = &self.config.backend_path;
        let told = async |key| keys::read(&self.host, dir, key).await;
        let size_sectors = disk.size_sectors;
        let told_sectors = match told("sectors").await? {
            None => size_sectors,
            Some(value) => match keys::sectors(&value) {
                // Disks become larger.
                Some(told) if told <= size_sectors => told,
                _ => {
                    let told = String::from_utf8_lossy(&value).into_owned();
                    let why =
                        format!("the disk has {size_sectors} sectors, and the front end was told {told}");
                    return Ok(Err(why));
                }
            },
        };
        let info = told("info").await?;
        if info.is_some_and(|info| keys::number(&info) != Some(info_of(disk.read_only))) {
            let what = if disk.read_only { "read-only" } else { "writable" };
            return Ok(Err(format!("the disk is {what}, and the front end was told otherwise")));
        }
        Ok(Ok(told_sectors))
    }

    fn serve(&mut self) {
        self.phase = Phase::Serving;
        self.connects += 1;
        if self.connects > 1 {
            self.host.mark(&RECONNECTED);
        }
    }

    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
        if let Some(ring) = &self.ring {
            ring.closer.close();
        }
    }

    pub(super) fn leave_ring(&mut self) {
        self.phase = Phase::Leaving;
        if let Some(ring) = &self.ring {
            ring.closer.leave();
        }
    }

    /// Whatever happened, when we are gone no request of the guest is in flight and none of its pages is mapped.
    pub(super) async fn release_ring(&mut self, left: bool) {
        if self.host.bug(&RING_LEFT_BEHIND) {
            return;
        }
        if let Some(Serving { closer, ended }) = self.ring.take() {
            if left && !self.host.bug(&STORE_LOSS_CLOSES) {
                closer.leave();
            } else {
                closer.close();
            }
            ended.await;
        }
    }
}

fn info_of(read_only: bool) -> u32 {
    if read_only { INFO_READ_ONLY } else { 0 }
}
