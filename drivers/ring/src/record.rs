//! The in-flight record: what a new process must know to continue where a dead one stopped.
//!
//! Responses overwrite request slots and come out of order, so the ring alone does not say which requests were taken
//! and not answered. A page of memory outside the process does:
//!
//! ```text
//!   0   magic, version, dom, vbd, ring_ref, port, epoch, req_cons    u32 each, little-endian
//!   64  32 slots of 120 bytes:
//!       0 state       0 free, 1 taken, 2 | -status << 8 answering
//!       4 ring index  of the request
//!       8 response index, valid while answering
//!       12 op u8, nr_segments u8, zero u16
//!       16 bytes 8..112 of the request
//! ```
//!
//! # Order of stores
//!
//! The process may die after any of them, so a slot's words are written before the state that makes them count:
//!
//! * take: slot body, state = taken, `req_cons`. A request counts as taken from the second store on.
//! * answer: response index, state = answering, the response itself, the ring's `rsp_prod` for the whole batch,
//!   state = free. A response counts as delivered from the fourth store on.
//! * new record: magic last.
//!
//! The epoch is also in the last word of the ring header's padding, which front ends clear in a new ring and never
//! read: it distinguishes a ring from its successor with the same grant and port.

use tap_abi::blkif::{ENTRY_BYTES, MAX_SEGMENTS, RingLayout};
use tap_host::{DomId, GrantRef, PAGE_BYTES, Port, SharedPage, VbdId};

/// Of rings of this layout and no other.
const RING: RingLayout = RingLayout::X86_64;

const MAGIC: u32 = 0x5249_4c42;
const VERSION: u32 = 1;
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = 4;
const IDENTITY_AT: usize = 8;
const REQ_CONS_AT: usize = 28;
const SLOTS_AT: usize = 64;
const SLOT_BYTES: usize = 120;
const STATE_AT: usize = 0;
const BODY_AT: usize = 4;
const RESPONSE_AT: usize = 8;
const TAKEN: u32 = 1;
const ANSWERING: u32 = 2;
/// Bytes of a request before its identifier: operation and count are kept, handle and padding are not.
const ENTRY_HEAD: usize = 8;
const BODY_BYTES: usize = 12 + ENTRY_BYTES - ENTRY_HEAD;

const _: () = {
    assert!(BODY_AT + BODY_BYTES == SLOT_BYTES);
    assert!(SLOTS_AT + RING.entries as usize * SLOT_BYTES <= PAGE_BYTES);
    assert!(24 + MAX_SEGMENTS * 8 == ENTRY_BYTES);
};

/// Byte offset in the ring page of the word that holds the epoch.
pub(crate) const EPOCH_AT: usize = 60;

/// Which ring a record is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The guest.
    pub dom: DomId,
    /// The disk.
    pub vbd: VbdId,
    /// The ring's page.
    pub ring_ref: GrantRef,
    /// The guest's end of the channel.
    pub port: Port,
    /// Not 0; differs from that of any earlier ring.
    pub epoch: u32,
}

impl Identity {
    fn words(self) -> [u32; 5] {
        [u32::from(self.dom.0), self.vbd.0, self.ring_ref.0, self.port.0, self.epoch]
    }
}

/// What a slot of a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotState {
    /// Taken from the ring at `index`, not answered.
    Taken {
        /// Ring index.
        index: u32,
    },
    /// Being answered.
    Answering {
        /// Response index.
        response: u32,
        /// blkif status.
        status: i16,
    },
}

/// A slot in use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Its number, 0..32.
    pub number: u8,
    /// Its state.
    pub state: SlotState,
    /// The request, without handle and padding.
    pub entry: [u8; ENTRY_BYTES],
}

/// The content of a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Content {
    /// Ring index after the last request known to be taken.
    pub req_cons: u32,
    /// Slots in use, by number.
    pub slots: Vec<Slot>,
}

/// A record on a page.
pub struct Record<P>(P);

impl<P: SharedPage> Record<P> {
    /// The record on `page`, whatever is there now.
    pub fn new(page: P) -> Self {
        Self(page)
    }

    /// Whether the page holds a record of this ring.
    pub fn is_of(&self, identity: Identity) -> bool {
        self.identity() == Some(identity)
    }

    /// Which ring the page holds a record of, if it holds one.
    pub fn identity(&self) -> Option<Identity> {
        if self.0.load_u32(MAGIC_AT) != MAGIC || self.0.load_u32(VERSION_AT) != VERSION {
            return None;
        }
        let [dom, vbd, ring_ref, port, epoch] = std::array::from_fn(|i| self.0.load_u32(IDENTITY_AT + 4 * i));
        Some(Identity {
            dom: DomId(u16::try_from(dom).ok()?),
            vbd: VbdId(vbd),
            ring_ref: GrantRef(ring_ref),
            port: Port(port),
            epoch,
        })
    }

    /// Starts an empty record of a ring from which nothing was taken.
    pub fn reset(&self, identity: Identity) {
        self.0.store_u32(MAGIC_AT, 0);
        self.0.copy_out(VERSION_AT, &[0; PAGE_BYTES - VERSION_AT]);
        self.0.store_u32(VERSION_AT, VERSION);
        for (i, word) in identity.words().into_iter().enumerate() {
            self.0.store_u32(IDENTITY_AT + 4 * i, word);
        }
        self.0.store_u32(MAGIC_AT, MAGIC);
    }

    /// Reads everything.
    ///
    /// # Errors
    /// What is wrong, for a slot that no process of this version can have written.
    pub fn load(&self) -> Result<Content, &'static str> {
        let mut page = [0; PAGE_BYTES];
        self.0.copy_in(0, &mut page);
        let mut slots = Vec::new();
        for number in 0..RING.entries as u8 {
            let at = slot_at(number);
            let bytes = &page[at..at + SLOT_BYTES];
            let state = word(bytes, STATE_AT);
            let state = match state & 0xff {
                0 if state == 0 => continue,
                TAKEN if state == TAKEN => SlotState::Taken { index: word(bytes, BODY_AT) },
                ANSWERING if state >> 8 <= 2 => SlotState::Answering {
                    response: word(bytes, RESPONSE_AT),
                    status: -((state >> 8) as i16),
                },
                _ => return Err("a slot of the in-flight record has an unknown state"),
            };
            let mut entry = [0; ENTRY_BYTES];
            entry[..2].copy_from_slice(&bytes[12..14]);
            entry[ENTRY_HEAD..].copy_from_slice(&bytes[16..]);
            slots.push(Slot { number, state, entry });
        }
        Ok(Content { req_cons: word(&page, REQ_CONS_AT), slots })
    }

    /// Notes that `entry` is taken from ring index `index`.
    pub fn take(&self, slot: u8, index: u32, entry: &[u8; ENTRY_BYTES]) {
        let mut body = [0; BODY_BYTES];
        body[..4].copy_from_slice(&index.to_le_bytes());
        body[8..10].copy_from_slice(&entry[..2]);
        body[12..].copy_from_slice(&entry[ENTRY_HEAD..]);
        self.0.copy_out(slot_at(slot) + BODY_AT, &body);
        self.0.store_u32(slot_at(slot) + STATE_AT, TAKEN);
    }

    /// Notes how far requests are taken.
    pub fn set_req_cons(&self, req_cons: u32) {
        self.0.store_u32(REQ_CONS_AT, req_cons);
    }

    /// Notes that the response at index `response`, about to be written, answers the slot's request.
    pub fn answer(&self, slot: u8, response: u32, status: i16) {
        self.0.store_u32(slot_at(slot) + RESPONSE_AT, response);
        self.0.store_u32(slot_at(slot) + STATE_AT, ANSWERING | u32::from(status.unsigned_abs()) << 8);
    }

    /// Notes that the guest has its response.
    pub fn free(&self, slot: u8) {
        self.0.store_u32(slot_at(slot) + STATE_AT, 0);
    }
}

fn slot_at(slot: u8) -> usize {
    SLOTS_AT + usize::from(slot) * SLOT_BYTES
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    #[derive(Clone)]
    struct Memory(Rc<RefCell<[u8; PAGE_BYTES]>>);

    impl SharedPage for Memory {
        fn load_u32(&self, offset: usize) -> u32 {
            word(&*self.0.borrow(), offset)
        }
        fn store_u32(&self, offset: usize, value: u32) {
            self.copy_out(offset, &value.to_le_bytes());
        }
        fn copy_in(&self, offset: usize, private: &mut [u8]) {
            private.copy_from_slice(&self.0.borrow()[offset..offset + private.len()]);
        }
        fn copy_out(&self, offset: usize, private: &[u8]) {
            self.0.borrow_mut()[offset..offset + private.len()].copy_from_slice(private);
        }
        fn full_barrier(&self) {}
    }

    const IDENTITY: Identity =
        Identity { dom: DomId(5), vbd: VbdId(51712), ring_ref: GrantRef(8), port: Port(3), epoch: 77 };

    fn record(fill: u8) -> (Memory, Record<Memory>) {
        let memory = Memory(Rc::new(RefCell::new([fill; PAGE_BYTES])));
        (memory.clone(), Record::new(memory))
    }

    #[test]
    fn a_slot_goes_through_its_states() {
        let (_, record) = record(0xee);
        assert!(!record.is_of(IDENTITY));
        record.reset(IDENTITY);
        assert!(record.is_of(IDENTITY));
        for other in [Identity { epoch: 78, ..IDENTITY }, Identity { port: Port(4), ..IDENTITY }] {
            assert!(!record.is_of(other));
        }
        let mut entry: [u8; ENTRY_BYTES] = std::array::from_fn(|i| i as u8);
        record.take(31, 40, &entry);
        record.set_req_cons(41);
        entry[2..8].fill(0);
        let taken = Slot { number: 31, state: SlotState::Taken { index: 40 }, entry };
        assert_eq!(record.load(), Ok(Content { req_cons: 41, slots: vec![taken.clone()] }));
        record.answer(31, 39, -2);
        let answering = SlotState::Answering { response: 39, status: -2 };
        assert_eq!(record.load().unwrap().slots, [Slot { state: answering, ..taken }]);
        record.free(31);
        assert_eq!(record.load(), Ok(Content { req_cons: 41, slots: vec![] }));
    }

    #[test]
    fn the_layout_is_frozen() {
        // Other versions of the program read what this one wrote.
        let (memory, record) = record(0);
        record.reset(IDENTITY);
        record.take(1, 2, &[9; ENTRY_BYTES]);
        record.set_req_cons(3);
        let page = *memory.0.borrow();
        let words: Vec<u32> = (0..8).map(|i| word(&page, 4 * i)).collect();
        assert_eq!(words, [u32::from_le_bytes(*b"BLIR"), 1, 5, 51712, 8, 3, 77, 3]);
        assert_eq!(page[184..200], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9, 9, 0, 0]);
        assert!(page[200..304].iter().all(|b| *b == 9) && page[304..].iter().all(|b| *b == 0));
    }

    #[test]
    fn unknown_states_are_damage() {
        for state in [3_u32, 0x101, 0x100, 2 | 3 << 8, u32::MAX] {
            let (memory, record) = record(0);
            record.reset(IDENTITY);
            memory.store_u32(slot_at(7), state);
            assert!(record.load().is_err(), "{state:#x}");
        }
    }
}
