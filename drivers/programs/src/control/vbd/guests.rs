//! Guests that use a disk through rings of their own.
//!
//! ```text
//!   tapback ── XENBLKIF_CONNECT ──► Guest: a ring, served ──┬── XENBLKIF_DISCONNECT, once all is answered ──► none
//!                                                           ├── what the guest wrote is impossible ──► failed, until then
//!                                                           └── the disk is closed: its record waits for a successor
//! ```
//!
//! # Contract
//!
//! * A guest's ring is known by the numbers of the guest and of the device in it; a process serves it once.
//! * A disk that a guest uses is not closed. Where that is forced, or the process ends, the guest is not told: its ring
//!   has a record, and the next tapdisk that is told to connect it carries out what was not answered.
//! * A paused disk keeps its guests' requests waiting.
//! * A disk is at least as large as its guests know. It may be larger: whoever connects a ring hears of that, and tells
//!   the guest. The ring takes requests for all that the disk has.

use super::{Open, Stage, Vbd};
use crate::control::ControlledHost;
use crate::control::settings::Settings;
use crate::vdev;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_abi::tapctl::Blkif;
use tap_control::Refusal;
use tap_control::json::{self, Happened};
use tap_core::Node as _;
use tap_core::wait::Event as Flag;
use tap_host::{DomId, Errno, GrantRef, Port, VbdId};
use tap_ring::{BlkifRing, ConnectError, RingCloser, RingConfig, RingEnd};

tap_host::listed! {
    pub(in crate::control) BUGS: Bug;
    GUEST_CLOSED = "guest-closed", "a disk is closed although a guest uses it";
    GUEST_TWICE = "guest-twice", "a ring that is connected already is connected once more";
    SIZE_UNCHECKED = "size-unchecked", "a guest is connected to a disk that is smaller than it knows";
    MODE_UNCHECKED = "mode-unchecked", "a guest that writes is connected to a disk that may only be read";
    WRITABLE_GIVEN = "writable-given", "a guest that may only read is connected to a disk as if it could write";
    DISCONNECTED_EARLY = "disconnected-early", "a ring counts as disconnected while its requests are in flight";
    GUEST_UNRECORDED = "guest-unrecorded", "a guest's ring has no record outside the process";
    FAILED_GUEST_GONE = "failed-guest-gone", "a ring that was given up is no longer listed";
}

tap_host::listed! {
    pub(in crate::control) MARKS: Mark;
    GUEST_CONNECTED = "guest-connected", "a controlled disk got a guest's ring";
    GUEST_DISCONNECTED = "guest-disconnected", "a guest's ring was taken from a controlled disk";
    GUEST_KEPT = "guest-kept", "a ring was connected once more, and stayed as it was";
    GUEST_FAILED = "guest-failed", "a controlled disk gave a guest's ring up";
    GUEST_BUSY = "guest-busy", "a disk was not closed because a guest uses it";
    GUEST_ABANDONED = "guest-abandoned", "a disk was closed under a guest, which waits for the next";
}

/// Most guests that use one disk at one time.
const GUESTS_MAX: usize = 16;

/// The layout of this machine, which is that of [`LAYOUT_64`].
const LAYOUT_NATIVE: u32 = 1;
/// The layout of 64-bit guests.
const LAYOUT_64: u32 = 3;

/// Who a ring belongs to: the guest, and the device in it.
pub(in crate::control) type Id = (DomId, VbdId);

/// A ring that is to be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::control) struct Wanted {
    pub id: Id,
    pub ring_ref: GrantRef,
    pub port: Port,
    /// The size that the guest knows, if whoever asks knows that.
    pub size_sectors: Option<u64>,
    /// The guest may only read.
    pub read_only: bool,
}

impl Wanted {
    /// What a message asks for.
    pub(in crate::control) fn of(blkif: &Blkif) -> Result<Self, Refusal> {
        let what = "connect a guest";
        check_layout(blkif, what)?;
        let (ring_ref, port) = (GrantRef(blkif.gref[0].get()), Port(blkif.port.get()));
        Ok(Self { id: id_of(blkif, what)?, ring_ref, port, size_sectors: None, read_only: false })
    }

    /// Whether the guest's ring and rights are those of `other`.
    fn is_like(&self, other: &Self) -> bool {
        (self.ring_ref, self.port, self.read_only) == (other.ring_ref, other.port, other.read_only)
    }
}

/// A guest's ring.
pub(super) struct Guest {
    wanted: Wanted,
    closer: RingCloser,
    /// Why it was given up.
    failed: Cell<Option<&'static str>>,
    /// It is neither mapped nor served any more.
    over: Flag,
}

/// The guests of a disk.
pub(super) type Guests = BTreeMap<Id, Rc<Guest>>;

/// The ring that a message is about.
pub(in crate::control) fn id_of(blkif: &Blkif, what: &str) -> Result<Id, Refusal> {
    let dom = u16::try_from(blkif.domid.get())
        .map_err(|_| Refusal::new(Errno::EINVAL, format!("{what}: {} is no domain", blkif.domid)))?;
    Ok((DomId(dom), VbdId(blkif.devid.get())))
}

/// A guest's disk in messages.
pub(in crate::control) fn shown((dom, vbd): Id) -> String {
    vdev::of_guest(dom, vbd)
}

/// Whether rings of this kind are served.
fn check_layout(blkif: &Blkif, what: &str) -> Result<(), Refusal> {
    if blkif.order.get() != 0 {
        let words = format!("{what}: rings of more than one page are not supported");
        return Err(Refusal::new(Errno::EOPNOTSUPP, words));
    }
    match blkif.proto.get() {
        LAYOUT_NATIVE | LAYOUT_64 => Ok(()),
        other => {
            let words = format!("{what}: the layout {other} of rings is not supported, only that of x86_64");
            Err(Refusal::new(Errno::EOPNOTSUPP, words))
        }
    }
}

impl<H: ControlledHost> Vbd<H> {
    /// Serves a guest's ring.
    pub(in crate::control) fn connect(
        self: &Rc<Self>,
        settings: &Rc<Settings<H>>,
        wanted: &Wanted,
    ) -> Result<json::Guest, Refusal> {
        let (id, what) = (wanted.id, format!("connect {} to minor {}", shown(wanted.id), self.minor));
        let open = self.opened(&what)?;
        if open.stage.get() == Stage::Closing {
            return Err(Refusal::new(Errno::ESHUTDOWN, format!("{what}: it is being closed")));
        }
        let info = open.disk.slot().info();
        let size_sectors = info.size_sectors;
        let told = wanted.size_sectors.is_some() && !settings.host.bug(&MODE_UNCHECKED);
        if told && info.read_only && !wanted.read_only {
            let words =
                format!("{what}: the disk may only be read, and the guest was told that it can write");
            return Err(Refusal::new(Errno::EMEDIUMTYPE, words));
        }
        if let Some(known) = wanted.size_sectors.filter(|_| !settings.host.bug(&SIZE_UNCHECKED))
            && known > size_sectors
        {
            let words =
                format!("{what}: the disk has {size_sectors} sectors, and the guest was told {known}");
            return Err(Refusal::new(Errno::EMEDIUMTYPE, words));
        }
        if let Some(guest) = open.guests.borrow().get(&id).filter(|_| !settings.host.bug(&GUEST_TWICE)) {
            return Err(connected_already(settings, guest, wanted, &what));
        }
        if open.guests.borrow().len() >= GUESTS_MAX {
            return Err(Refusal::new(Errno::ENOSPC, format!("{what}: it has {GUESTS_MAX} guests already")));
        }
        let config = ring_of(settings, wanted);
        let ring = BlkifRing::connect(settings.host.clone(), config, Rc::clone(&open.node))
            .map_err(|why| Refusal::new(errno_of(&why), format!("{what}: {why}")))?;
        let (closer, failed, over) = (ring.closer(), Cell::new(None), Flag::new());
        let guest = Rc::new(Guest { wanted: *wanted, closer, failed, over });
        let listed = guest.listed();
        open.guests.borrow_mut().insert(id, Rc::clone(&guest));
        settings.host.mark(&GUEST_CONNECTED);
        self.serve_guest(settings, &open, guest, ring);
        self.tell(settings, Happened::Guests);
        Ok(listed)
    }

    /// Serves `ring` in a task of its own, and says what became of it.
    fn serve_guest(
        self: &Rc<Self>,
        settings: &Rc<Settings<H>>,
        open: &Rc<Open<H>>,
        guest: Rc<Guest>,
        ring: BlkifRing<H>,
    ) {
        let (own, all, of) = (Rc::downgrade(self), Rc::clone(settings), Rc::downgrade(open));
        let id = guest.wanted.id;
        let key = u64::from(id.0.0) << 32 | u64::from(id.1.0);
        settings.host.spawn("ring", key, async move {
            let end = ring.run().await;
            guest.failed.set(all.give_up(id, end));
            guest.over.set();
            let (Some(own), Some(open)) = (own.upgrade(), of.upgrade()) else { return };
            if guest.failed.get().is_none() || all.host.bug(&FAILED_GUEST_GONE) {
                open.forget(&guest);
            }
            own.tell(&all, Happened::Guests);
        });
    }

    /// Whether it has this guest, connected or given up.
    pub(in crate::control) fn has_guest(&self, id: Id) -> bool {
        self.open.borrow().as_ref().is_some_and(|open| open.guests.borrow().contains_key(&id))
    }

    /// Takes a guest's ring away, once every request that was taken is answered.
    pub(in crate::control) async fn disconnect(&self, settings: &Settings<H>, id: Id) -> Result<(), Refusal> {
        let open = self.opened("disconnect a guest")?;
        let guest = open.guests.borrow().get(&id).cloned();
        let Some(guest) = guest else { return Err(not_connected(id)) };
        guest.closer.close();
        if !settings.host.bug(&DISCONNECTED_EARLY) {
            guest.over.wait().await;
        }
        open.forget(&guest);
        if guest.failed.get().is_some() {
            // Its record stays until the guest is told, as with any ring that was given up.
            self.tell(settings, Happened::Guests);
        }
        settings.host.mark(&GUEST_DISCONNECTED);
        Ok(())
    }

    /// Refuses if a guest uses the disk.
    pub(super) fn unused(&self, settings: &Settings<H>, open: &Open<H>) -> Result<(), Refusal> {
        let guests = open.guests.borrow();
        let connected = guests.iter().find(|(_, guest)| guest.failed.get().is_none());
        let Some((id, _)) = connected.filter(|_| !settings.host.bug(&GUEST_CLOSED)) else { return Ok(()) };
        settings.host.mark(&GUEST_BUSY);
        let words = format!(
            "close minor {}: the guest {} uses it; detach it there first, or force it (-f): the guest then waits until \
             another tapdisk has the image open",
            self.minor,
            shown(*id)
        );
        Err(Refusal::new(Errno::EBUSY, words))
    }
}

impl Guest {
    /// In lists.
    fn listed(&self) -> json::Guest {
        let Wanted { id: (dom, vbd), read_only, .. } = self.wanted;
        let error = self.failed.get().map(str::to_owned);
        json::Guest { domid: dom.0, devid: vbd.0, read_only, error }
    }
}

impl<H: ControlledHost> Open<H> {
    /// It has not this guest any more, unless that has come again.
    fn forget(&self, guest: &Rc<Guest>) {
        let mut guests = self.guests.borrow_mut();
        if guests.get(&guest.wanted.id).is_some_and(|known| Rc::ptr_eq(known, guest)) {
            guests.remove(&guest.wanted.id);
        }
    }

    /// Leaves the rings of all guests to whoever is told to connect them next. `at_once`, nothing that is in flight is
    /// answered any more.
    pub(super) fn leave_guests(&self, host: &H, at_once: bool) {
        for guest in self.guests.borrow().values().filter(|guest| guest.failed.get().is_none()) {
            host.mark(&GUEST_ABANDONED);
            if at_once { guest.closer.abandon() } else { guest.closer.leave() }
        }
    }

    /// Completes once no ring is served any more.
    pub(super) async fn guests_gone(&self) {
        let all: Vec<Rc<Guest>> = self.guests.borrow().values().cloned().collect();
        for guest in all {
            guest.over.wait().await;
        }
    }

    /// In lists.
    pub(super) fn listed_guests(&self) -> Vec<json::Guest> {
        self.guests.borrow().values().map(|guest| guest.listed()).collect()
    }
}

impl<H: ControlledHost> Settings<H> {
    /// Says why a ring was given up; `None` if it was not, or another tapdisk can have it.
    fn give_up(&self, id: Id, end: RingEnd) -> Option<&'static str> {
        let say = |words: &str| {
            self.console.err(&format!("tapdisk: {}: failed to serve the ring: {words}", shown(id)));
        };
        match end {
            RingEnd::Closed | RingEnd::Left | RingEnd::Abandoned => None,
            RingEnd::Refused(why) => {
                self.host.mark(&GUEST_FAILED);
                say(why);
                Some(why)
            }
            RingEnd::ChannelGone => {
                say("events are not heard any more; restart this tapdisk");
                None
            }
        }
    }
}

/// How a ring is served.
fn ring_of<H: ControlledHost>(settings: &Settings<H>, wanted: &Wanted) -> RingConfig {
    let Wanted { id: (dom, vbd), ring_ref, port, read_only, .. } = *wanted;
    RingConfig {
        dom,
        vbd,
        ring_ref,
        port,
        record: (!settings.host.bug(&GUEST_UNRECORDED)).then(|| crate::xen::record_of(dom, vbd)),
        limits: settings.tuning.ring,
        read_only: read_only && !settings.host.bug(&WRITABLE_GIVEN),
        memory: settings.memory.clone(),
    }
}

/// Why a ring that is there is not connected: whoever asks may not know that it is, because it has just begun, or
/// because an answer was lost.
fn connected_already<H: ControlledHost>(
    settings: &Settings<H>,
    guest: &Guest,
    wanted: &Wanted,
    what: &str,
) -> Refusal {
    if !guest.wanted.is_like(wanted) {
        let words = format!("{what}: it is connected with another ring; disconnect it first");
        return Refusal::new(Errno::EEXIST, words);
    }
    settings.host.mark(&GUEST_KEPT);
    let failed = guest.failed.get().map_or_else(String::new, |why| format!(", which was given up: {why}"));
    Refusal::new(Errno::EALREADY, format!("{what}: it is connected with this ring already{failed}"))
}

/// There is no such ring.
pub(in crate::control) fn not_connected(id: Id) -> Refusal {
    let words = format!("disconnect {}: this tapdisk does not serve it", shown(id));
    Refusal::new(Errno::ENOTCONN, words)
}

fn errno_of(why: &ConnectError) -> Errno {
    match why {
        ConnectError::Map { error, .. }
        | ConnectError::Bind { error, .. }
        | ConnectError::Region { error, .. }
        | ConnectError::Memory(error) => *error,
        ConnectError::InUse => Errno::EBUSY,
        ConnectError::Record(_) | ConnectError::Told { .. } => Errno::EPROTO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_of_another_kind_are_refused_by_name() {
        let blkif =
            |order: u32, proto: u32| Blkif { order: order.into(), proto: proto.into(), ..Blkif::default() };
        let check = |order, proto| check_layout(&blkif(order, proto), "connect").map_err(|why| why.words);
        assert_eq!(check(0, LAYOUT_NATIVE), Ok(()));
        assert_eq!(check(0, LAYOUT_64), Ok(()));
        for (order, proto, word) in [(1, 3, "more than one page"), (0, 2, "layout 2"), (0, 0, "layout 0")] {
            assert!(check(order, proto).unwrap_err().contains(word), "{order} {proto}");
        }
        let id = |domid: u32| id_of(&Blkif { domid: domid.into(), ..Blkif::default() }, "connect");
        assert_eq!(id(7), Ok((DomId(7), VbdId(0))));
        assert!(id(65_536).is_err());
    }
}
