//! The tapdisks of a machine, as tapback sees them: where a minor number's disk is, and what can be asked of it.

use crate::control::ControlledHost;
use crate::ctl::pids_in;
use tap_abi::tapctl::{Blkif, Kind, Message};
use tap_control::client::{CallError, Tapdisk};
use tap_control::json::{Disk, Disks, Guest, Request};
use tap_host::{DomId, Errno, GrantRef, Port, VbdId};

tap_host::listed! {
    pub(super) BUGS: Bug;
    FOUND_BY_PID = "found-by-pid", "a disk is looked for only in the process that had it first";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    FOUND_ELSEWHERE = "found-elsewhere", "tapback found a disk in another tapdisk than the one that had it";
}

/// How long a tapdisk may take for an answer that needs no storage, in seconds.
const ANSWER_S: u64 = 10;

/// All tapdisks whose sockets are in one folder.
pub(super) struct Tapdisks<H> {
    pub(super) host: H,
    folder: String,
}

/// A disk in a tapdisk: the process number and the minor number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Place {
    pub(super) pid: u32,
    pub(super) minor: u16,
}

impl Place {
    /// The disk that is offered at the NBD socket `path` in `folder`.
    pub(super) fn of(path: &str, folder: &str) -> Option<Self> {
        let name = path.strip_prefix(folder)?.strip_prefix("/nbd")?;
        let (pid, minor) = name.split_once('.')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(pid) || !digits(minor) {
            return None;
        }
        Some(Self { pid: pid.parse().ok()?, minor: minor.parse().ok()? })
    }
}

/// A disk as a tapdisk has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    /// Which allocation of its minor number it has.
    pub(super) allocation: String,
    pub(super) size_sectors: u64,
    pub(super) read_only: bool,
}

/// A guest's ring, and what the guest knows of its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ring {
    pub(super) ring: (GrantRef, Port),
    pub(super) told_sectors: u64,
    pub(super) read_only: bool,
}

/// What tapback asks of one tapdisk.
pub(super) struct Asked<H>(Tapdisk<H>);

impl<H: ControlledHost> Tapdisks<H> {
    pub(super) fn new(host: H, folder: String) -> Self {
        Self { host, folder }
    }

    pub(super) fn folder(&self) -> &str {
        &self.folder
    }

    /// The NBD socket of a disk, which is its name in xenstore.
    pub(super) fn path_of(&self, place: Place) -> String {
        format!("{}/nbd{}.{}", self.folder, place.pid, place.minor)
    }

    pub(super) fn at(&self, pid: u32) -> Asked<H> {
        Asked(Tapdisk { host: self.host.clone(), folder: self.folder.clone(), pid, limit_s: ANSWER_S })
    }

    async fn pids(&self) -> Result<Vec<u32>, String> {
        let pids = pids_in(&self.host, &self.folder).await;
        pids.map_err(|error| format!("list {}: {error}", self.folder))
    }

    /// Where the disk of `known` is now: there, or in a tapdisk that has its minor number since.
    ///
    /// # Errors
    /// It is not open anywhere; the sentence continues "failed to".
    pub(super) async fn find(&self, known: Place) -> Result<(Place, Seen), String> {
        if let Some(seen) = self.at(known.pid).disk(known.minor).await {
            return Ok((known, seen));
        }
        let others = if self.host.bug(&FOUND_BY_PID) { Vec::new() } else { self.pids().await? };
        for pid in others.into_iter().filter(|pid| *pid != known.pid) {
            if let Some(seen) = self.at(pid).disk(known.minor).await {
                self.host.mark(&FOUND_ELSEWHERE);
                return Ok((Place { pid, ..known }, seen));
            }
        }
        let Place { pid, minor } = known;
        Err(format!("find minor {minor}, which tapdisk {pid} had: no tapdisk in {} has it open", self.folder))
    }

    /// The guests that tapdisks serve, and those whose rings they gave up, each with its disk.
    ///
    /// # Errors
    /// The tapdisks cannot be listed; the sentence continues "failed to".
    pub(super) async fn guests(&self) -> Result<Vec<(Place, (DomId, VbdId))>, String> {
        let mut found = Vec::new();
        for pid in self.pids().await? {
            // What cannot be asked has ended, or is of another kind.
            let disks = self.at(pid).disks().await.unwrap_or_default();
            for Disk { minor, guests, .. } in disks {
                let place = Place { pid, minor };
                found.extend(guests.iter().map(|guest| (place, (DomId(guest.domid), VbdId(guest.devid)))));
            }
        }
        Ok(found)
    }
}

impl<H: ControlledHost> Asked<H> {
    pub(super) fn tapdisk(&self) -> &Tapdisk<H> {
        &self.0
    }

    async fn disks(&self) -> Result<Vec<Disk>, CallError> {
        Ok(self.0.json::<Disks<Disk>>(&Request::List {}).await?.disks)
    }

    /// The disk with this minor number, if it has an image open. Asked by a list, which is never refused: refusals are
    /// mentioned in the log of whoever refuses.
    async fn disk(&self, minor: u16) -> Option<Seen> {
        let disks = self.disks().await.ok()?;
        let disk = disks.into_iter().find(|disk| disk.minor == minor)?;
        let (size_sectors, read_only) = (disk.size_sectors?, disk.read_only?);
        Some(Seen { allocation: disk.allocation, size_sectors, read_only })
    }

    /// The guests of this disk, and its size in sectors; none if it is not there.
    pub(super) async fn standing(&self, minor: u16) -> Result<(Vec<Guest>, Option<u64>), CallError> {
        let disk = self.disks().await?.into_iter().find(|disk| disk.minor == minor);
        Ok(disk.map_or_else(Default::default, |disk| (disk.guests, disk.size_sectors)))
    }

    /// Has it serve a ring, if the minor number has this allocation.
    pub(super) async fn connect(
        &self,
        (minor, allocation): (u16, &str),
        (dom, vbd): (DomId, VbdId),
        ring: Ring,
    ) -> Result<(), CallError> {
        let Ring { ring: (ring_ref, port), told_sectors, read_only } = ring;
        let request = Request::Connect {
            minor,
            domid: dom.0,
            devid: vbd.0,
            ring_ref: ring_ref.0,
            port: port.0,
            // One that does not tell it does not understand it.
            allocation: (!allocation.is_empty()).then(|| allocation.to_owned()),
            size_sectors: told_sectors,
            read_only,
        };
        match self.0.json::<Guest>(&request).await {
            // It began before: that one's answer was lost, or whoever asked for it died. What became of it since is
            // told to those who listen.
            Err(CallError::Refused { error: Errno::EALREADY, .. }) => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Whether it serves a ring of this device, or may do so.
    pub(super) async fn serves(&self, dom: DomId, vbd: VbdId) -> bool {
        match self.disks().await {
            Ok(disks) => {
                let guests = disks.iter().flat_map(|disk| &disk.guests);
                guests.into_iter().any(|guest| (DomId(guest.domid), VbdId(guest.devid)) == (dom, vbd))
            }
            Err(CallError::Connect { error: Errno::ENOENT | Errno::ECONNREFUSED, .. }) => false,
            Err(_) => true,
        }
    }

    /// Takes a ring away, once what was taken from it is answered; that may take as long as storage does.
    /// The minor number only decides whose place the request has while it waits.
    pub(super) async fn disconnect(&self, minor: u16, dom: DomId, vbd: VbdId) -> Result<(), CallError> {
        let blkif = Blkif { domid: u32::from(dom.0).into(), devid: vbd.0.into(), ..Blkif::default() };
        let patient = Tapdisk { limit_s: 0, ..self.0.clone() };
        patient.call(&Message::with(Kind::XenblkifDisconnect, minor, &blkif)).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_socket() {
        let place = |path: &str| Place::of(path, "/run/blktap-control");
        assert_eq!(place("/run/blktap-control/nbd17.3"), Some(Place { pid: 17, minor: 3 }));
        for other in [
            "",
            "/run/blktap-control/nbd17",
            "/run/blktap-control/nbd.3",
            "/run/blktap-control/nbd17.65536",
            "/run/blktap-control/nbd+7.3",
            "/run/blktap-control/nbd-old17.3",
            "/run/blktap-control2/nbd17.3",
            "/run/nbd17.3",
            "/dev/xen/blktap-2/tapdev3",
        ] {
            assert_eq!(place(other), None, "{other}");
        }
    }
}
