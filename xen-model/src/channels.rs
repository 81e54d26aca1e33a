//! Event channels: pairs of ports, each with one pending bit.
//!
//! ```text
//!   guest: alloc_unbound(dom0) ──► Unbound{dom0} ◄───────────── close of dom0's end
//!                                      │  bind_interdomain            ▲
//!                                      ▼                              │
//!                                 Bound{dom0, port} ──────────────────┘
//! ```
//!
//! When one end closes, the other waits again for the same domain: this is how a restarted back end rebinds its channel
//! without the guest's help.

use std::task::Waker;
use tap_host::{DomId, Errno, Port};

/// Ports of one domain; Xen's 2-level ABI has 4096 on 64-bit.
const MAX_PORTS: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    /// Waits for `remote` to bind.
    Unbound {
        remote: DomId,
    },
    Bound {
        remote: DomId,
        port: Port,
    },
}

struct Slot {
    state: State,
    /// Distinguishes uses of one port number.
    generation: u32,
    pending: bool,
    /// Events raised through this port number.
    raised: u32,
    waker: Option<Waker>,
}

/// One use of one port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct PortId {
    pub(crate) dom: DomId,
    pub(crate) port: Port,
    generation: u32,
}

impl PortId {
    pub(crate) fn token(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.dom.0) << 16 | u64::from(self.port.0)
    }
    pub(crate) fn from_token(token: u64) -> Self {
        let low = |shift: u32| (token >> shift & 0xffff) as u16;
        Self { dom: DomId(low(16)), port: Port(low(0).into()), generation: (token >> 32) as u32 }
    }
}

/// All ports of all domains.
#[derive(Default)]
pub(crate) struct Channels {
    doms: Vec<Vec<Slot>>,
}

impl Channels {
    fn allocate(&mut self, dom: DomId, state: State) -> Result<PortId, Errno> {
        let index = usize::from(dom.0);
        if self.doms.len() <= index {
            self.doms.resize_with(index + 1, Vec::new);
        }
        let slots = &mut self.doms[index];
        let free = slots.iter().position(|s| s.state == State::Free).unwrap_or(slots.len());
        if free >= MAX_PORTS {
            return Err(Errno::ENOSPC);
        }
        if free == slots.len() {
            slots.push(Slot { state: State::Free, generation: 0, pending: false, raised: 0, waker: None });
        }
        let slot = &mut slots[free];
        slot.state = state;
        slot.generation += 1;
        slot.pending = false;
        // Port 0 does not exist.
        Ok(PortId { dom, port: Port(free as u32 + 1), generation: slot.generation })
    }

    fn slot(&mut self, dom: DomId, port: Port) -> Option<&mut Slot> {
        let slots = self.doms.get_mut(usize::from(dom.0))?;
        slots.get_mut(port.0.checked_sub(1)? as usize).filter(|s| s.state != State::Free)
    }

    fn live(&mut self, id: PortId) -> Option<&mut Slot> {
        self.slot(id.dom, id.port).filter(|s| s.generation == id.generation)
    }

    pub(crate) fn alloc_unbound(&mut self, dom: DomId, remote: DomId) -> Result<PortId, Errno> {
        self.allocate(dom, State::Unbound { remote })
    }

    pub(crate) fn bind(&mut self, dom: DomId, remote: DomId, port: Port) -> Result<PortId, Errno> {
        match self.slot(remote, port).map(|slot| slot.state) {
            Some(State::Unbound { remote: waits_for }) if waits_for == dom => {}
            _ => return Err(Errno::EINVAL),
        }
        let own = self.allocate(dom, State::Bound { remote, port })?;
        let far = self.slot(remote, port).expect("checked above");
        far.state = State::Bound { remote: dom, port: own.port };
        // The event may have been raised before the channel was bound.
        self.live(own).expect("made above").pending = true;
        Ok(own)
    }

    /// The port at the other end, if there is one.
    pub(crate) fn peer(&mut self, id: PortId) -> Option<PortId> {
        let State::Bound { remote, port } = self.live(id)?.state else { return None };
        let generation = self.slot(remote, port)?.generation;
        Some(PortId { dom: remote, port, generation })
    }

    /// Counts an event through `id`; returns its number and its destination.
    pub(crate) fn count_raised(&mut self, id: PortId) -> Option<(u32, PortId)> {
        let peer = self.peer(id)?;
        let slot = self.live(id)?;
        slot.raised = slot.raised.wrapping_add(1);
        Some((slot.raised, peer))
    }

    /// Makes the event at `id` pending; returns the waker of its waiter.
    pub(crate) fn raise(&mut self, id: PortId) -> Option<Waker> {
        let slot = self.live(id)?;
        slot.pending = true;
        slot.waker.take()
    }

    /// Takes the pending event, or registers `waker` for the next.
    pub(crate) fn poll(&mut self, id: PortId, waker: &Waker) -> Result<bool, Errno> {
        let slot = self.live(id).ok_or(Errno::ESHUTDOWN)?;
        if std::mem::take(&mut slot.pending) {
            return Ok(true);
        }
        match &mut slot.waker {
            Some(old) => old.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        Ok(false)
    }

    /// Frees the port; its peer waits for the same domain again. Returns the waker of its waiter.
    pub(crate) fn close(&mut self, id: PortId) -> Option<Waker> {
        let peer = self.peer(id);
        let slot = self.live(id)?;
        slot.state = State::Free;
        slot.pending = false;
        let waker = slot.waker.take();
        if let Some(far) = peer.and_then(|peer| self.live(peer)) {
            far.state = State::Unbound { remote: id.dom };
        }
        waker
    }

    /// Every port of `dom` that is in use.
    pub(crate) fn of(&self, dom: DomId) -> Vec<PortId> {
        let slots = self.doms.get(usize::from(dom.0)).map_or(&[][..], Vec::as_slice);
        (1..)
            .zip(slots)
            .filter(|(_, slot)| slot.state != State::Free)
            .map(|(port, slot)| PortId { dom, port: Port(port), generation: slot.generation })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOM0: DomId = DomId(0);
    const GUEST: DomId = DomId(5);

    fn pending(channels: &mut Channels, id: PortId) -> bool {
        channels.poll(id, Waker::noop()).unwrap()
    }

    #[test]
    fn a_bound_channel_starts_pending_and_events_coalesce() {
        let mut ch = Channels::default();
        let guest = ch.alloc_unbound(GUEST, DOM0).unwrap();
        let back = ch.bind(DOM0, GUEST, guest.port).unwrap();
        assert!(pending(&mut ch, back));
        assert!(!pending(&mut ch, guest));
        let far = ch.peer(guest).unwrap();
        assert_eq!(far, back);
        ch.raise(far);
        ch.raise(far);
        assert!(pending(&mut ch, back));
        assert!(!pending(&mut ch, back), "a level, not a count");
    }

    #[test]
    fn an_end_whose_peer_is_gone_waits_for_the_same_domain() {
        let mut ch = Channels::default();
        let guest = ch.alloc_unbound(GUEST, DOM0).unwrap();
        assert!(ch.bind(DomId(7), GUEST, guest.port).is_err(), "waits for another domain");
        let back = ch.bind(DOM0, GUEST, guest.port).unwrap();
        assert!(ch.bind(DOM0, GUEST, guest.port).is_err(), "bound");
        ch.close(back);
        assert_eq!(ch.peer(guest), None);
        assert_eq!(ch.poll(back, Waker::noop()), Err(Errno::ESHUTDOWN));
        let again = ch.bind(DOM0, GUEST, guest.port).unwrap();
        assert_ne!(again, back, "same number, another use");
        assert!(ch.raise(back).is_none() && pending(&mut ch, again));
        ch.close(guest);
        assert!(ch.bind(DOM0, GUEST, guest.port).is_err());
        assert_eq!(ch.peer(again), None);
        assert_eq!((ch.of(GUEST).len(), ch.of(DOM0).len()), (0, 1));
    }
}
