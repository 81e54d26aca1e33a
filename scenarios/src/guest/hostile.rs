//! A front end that violates the protocol, one decision per trick.
//!
//! It writes the ring's bytes itself, so nothing keeps it from lying. It also counts how often the back end loads an
//! entry, because a second load may see different bytes.

mod scribble;

pub use scribble::SCRIBBLE;

use crate::check::Invariant;
use crate::check::oracle::{Oracle, is_broken};
use crate::machine::Attached;
use crate::world::World;
use sim::{Draw, Entity, Label};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::blkif::{BlkifOp, BlkifRequest, ENTRY_BYTES, RawResponse, Segment};
use tap_host::{DomId, Errno, EventChannel, Xenstore};
use xen_model::{GrantedPage, GuestRing};

/// The hostile guest's next action: trick in 4 bits, detail in 32.
pub static TRICK: Label = Label::packed("trick", "the hostile guest plays trick {}", &[4, 32]);
/// The keys of its first connection; 0 for valid ones.
pub static KEYS: Label = Label::new("keys", "the hostile guest first connects with bad keys number {}");
/// Number of further requests posted together with it, valid and invalid ones.
pub static TOGETHER: Label = Label::new("together", "the hostile guest posts {} more requests with it");
/// Number of malformed requests that another CPU of the hostile guest posts, each as soon as the previous one is
/// answered.
pub static FLOOD: Label =
    Label::new("flood", "another CPU of the hostile guest posts {} malformed requests without a pause");

/// Sectors that honest requests of the hostile guest stay below; nothing may change those above.
pub const HONEST_SECTORS: u64 = 512;
/// Bytes of the ring's header.
const HEADER: usize = 64;
/// Byte offsets of the indices in the header.
const REQ_PROD: usize = 0;
const RSP_PROD: usize = 8;
/// Byte offsets within an entry.
const OP: usize = 0;
const NR_SEGMENTS: usize = 1;
const SECTOR: usize = 16;
const FIRST: usize = 28;
const LAST: usize = 29;
/// Maximum number of requests posted together with another.
const MAX_TOGETHER: u64 = 5;
/// Maximum time until an answer, in virtual nanoseconds.
const PATIENCE_NS: u64 = 30_000_000_000;

/// How the back end must answer a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    Ok,
    Error,
    Any,
}

/// A [`KEYS`] value in words.
pub fn describe_keys(value: u64) -> &'static str {
    match value {
        0 => "connects with good keys",
        1 => "first connects with an event channel that does not exist",
        2 => "first connects with a grant that does not exist",
        3 => "first connects with a negative grant",
        4 => "first connects with an event channel that is not a 32-bit number",
        5 => "first connects with an unknown protocol",
        7 => "first connects with four queues",
        8 => "first connects with a ring of four pages",
        9 => "first connects with a grant that has a plus sign",
        10 => "first connects with an event channel behind a blank",
        11 => "first connects with a grant in hexadecimal digits",
        12 => "first connects with a grant of eleven digits",
        13 => "first connects with an event channel before a blank",
        _ => "first connects with empty keys",
    }
}

/// A [`TRICK`] value in words.
pub fn describe_trick(value: u64) -> String {
    let detail = value >> 4;
    let text = match value & 15 {
        0 => "nothing",
        1 => "an honest write",
        2 => "an honest read",
        3 => "a request without segments",
        4 => "too many segments",
        5 => "a segment that ends before it begins",
        6 => "a segment that leaves its page",
        7 => "a request past the end of the disk",
        8 => "a sector number that wraps",
        9 => "a grant that does not exist",
        10 => "a read into a read-only page",
        11 => return format!("unknown operation {}", UNKNOWN_OPS[(detail % 5) as usize]),
        12 => "an entry of random bytes",
        13 => "a grant of no domain",
        14 => "an honest flush",
        _ if !detail.is_multiple_of(4) => "nonsense in the ring's header",
        _ => return format!("{} more requests than the ring has room for", 1 + (detail as u32 >> 1)),
    };
    text.into()
}

/// Operation codes unknown to the back end.
const UNKNOWN_OPS: [u8; 5] = [5, 6, 4, 77, 255];

/// The id of a request.
fn id_of(entry: &[u8; ENTRY_BYTES]) -> u64 {
    u64::from_le_bytes(entry[8..16].try_into().expect("eight bytes"))
}

/// A hostile guest.
pub struct Hostile {
    world: World,
    attached: Attached,
    ring: RefCell<Option<Rc<GuestRing>>>,
    entity: Entity,
    next_id: Cell<u64>,
    /// How often the back end's process was started: each may load an entry once.
    lives: Rc<Cell<u32>>,
    /// It may make its ring unrecoverable.
    ring_may_break: bool,
    /// The life of the back end in which it overwrote what a successor has to read, until something restores that.
    scribbled: Cell<Option<u32>>,
    /// Whether it overwrote the epoch, which nothing restores.
    epoch_lost: Cell<bool>,
}

impl Hostile {
    /// A hostile guest on `attached`. With `ring_may_break` it overwrites what the successor of a dead back end needs.
    pub fn new(world: &World, attached: Attached, lives: Rc<Cell<u32>>, ring_may_break: bool) -> Self {
        let entity = Entity::WORLD.child("hostile", u64::from(attached.dom.0));
        world.sim.name_entity(entity, || "hostile guest".into());
        Self {
            world: world.clone(),
            attached,
            ring: RefCell::default(),
            entity,
            next_id: Cell::new(1),
            lives,
            ring_may_break,
            scribbled: Cell::new(None),
            epoch_lost: Cell::new(false),
        }
    }

    async fn back_state(&self) -> u8 {
        let path = format!("{}/state", self.attached.paths.backend);
        let value = self.attached.port.read(&path).await.unwrap_or_default();
        std::str::from_utf8(&value).ok().and_then(|s| s.parse().ok()).unwrap_or(0)
    }

    /// Waits for a state of the back end; `false` on a timeout.
    async fn wait_for_back(&self, wanted: impl Fn(u8) -> bool) -> bool {
        let until = self.world.sim.now_ns() + PATIENCE_NS;
        while self.world.sim.now_ns() < until {
            if wanted(self.back_state().await) {
                return true;
            }
            self.world.sim.sleep_ns(50_000).await;
        }
        false
    }

    async fn write(&self, key: &str, value: &str) -> Result<(), Errno> {
        self.attached.port.write(&format!("{}/{key}", self.attached.paths.frontend), value.as_bytes()).await
    }

    async fn published_error(&self) -> Result<Vec<u8>, Errno> {
        self.attached.port.read(&format!("{}/error", self.attached.paths.backend)).await
    }

    /// Connects with bad keys first, if the seed says so, then with valid ones.
    pub async fn connect(&self) -> Result<(), Errno> {
        self.wait_for_back(|s| s == 2).await;
        let bad = self.world.sim.decide(self.entity, &KEYS, 0, |d| d.below(14));
        if bad > 0 {
            self.connect_badly(bad).await?;
        }
        let ring = Rc::new(GuestRing::new(&self.attached.port, DomId(0))?);
        self.watch_loads(&ring);
        ring.publish_in_store(&self.attached.paths.frontend).await?;
        if !self.wait_for_back(|s| s == 4).await {
            self.world.fail(Invariant::H1, "a front end with valid keys is not connected");
        }
        if self.published_error().await != Err(Errno::ENOENT) {
            self.world.fail(Invariant::F1, "the back end of a connected front end published an error");
        }
        self.write("state", "4").await?;
        *self.ring.borrow_mut() = Some(ring);
        Ok(())
    }

    async fn connect_badly(&self, number: u64) -> Result<(), Errno> {
        let ring = GuestRing::new(&self.attached.port, DomId(0))?;
        let (gref, port) = (ring.ring_ref().0, ring.event_port().0);
        let gref = match number {
            9 => format!("+{gref}"),
            11 => format!("{gref:#x}"),
            12 => format!("{gref:011}"),
            _ => gref.to_string(),
        };
        let port = match number {
            10 => format!(" {port}"),
            13 => format!("{port} "),
            _ => port.to_string(),
        };
        let (gref, port, protocol) = match number {
            1 => (gref.as_str(), "9999", "x86_64-abi"),
            2 => ("4000000000", port.as_str(), "x86_64-abi"),
            3 => ("-1", port.as_str(), "x86_64-abi"),
            4 => (gref.as_str(), "99999999999999999999", "x86_64-abi"),
            5 => (gref.as_str(), port.as_str(), "sparc-abi"),
            7.. => (gref.as_str(), port.as_str(), "x86_64-abi"),
            _ => ("", "", ""),
        };
        self.write("ring-ref", gref).await?;
        self.write("event-channel", port).await?;
        self.write("protocol", protocol).await?;
        let counted = [(7, "multi-queue-num-queues", "4"), (8, "ring-page-order", "2")];
        let counted = counted.into_iter().find(|(kind, _, _)| *kind == number);
        if let Some((_, key, count)) = counted {
            self.write(key, count).await?;
        }
        self.write("state", "3").await?;
        if !self.wait_for_back(|s| s >= 5).await {
            self.world
                .fail(Invariant::H1, format!("a front end with bad keys (number {number}) is not refused"));
        }
        if self.world.xen.mapped_from(self.attached.dom) > 0 {
            self.world.fail(Invariant::K1, "a page of a refused front end stays mapped");
        }
        self.write("state", "6").await?;
        self.wait_for_back(|s| s == 6).await;
        if ring.end().is_err() {
            self.world.fail(Invariant::K1, "the ring of a refused front end cannot be revoked");
        }
        if let Some((_, key, _)) = counted {
            self.attached.port.remove(&format!("{}/{key}", self.attached.paths.frontend)).await?;
        }
        let told = self.published_error().await;
        if !matches!(&told, Ok(text) if text.starts_with(b"failed to ")) {
            let text =
                format!("the error published to a refused front end is {told:?}, which names no failure");
            self.world.fail(Invariant::F1, text);
        }
        self.write("state", "1").await?;
        if self.wait_for_back(|s| s == 2).await && self.published_error().await != Err(Errno::ENOENT) {
            self.world.fail(Invariant::F1, "a front end that reconnects reads an earlier error");
        }
        Ok(())
    }

    /// Checks that every entry is loaded once per request.
    fn watch_loads(&self, ring: &Rc<GuestRing>) {
        let (world, loads) = (self.world.clone(), RefCell::new([0_u32; 32]));
        let last_id = RefCell::new([(0_u64, 0_u32); 32]);
        // The page must not keep itself.
        let (own, lives) = (Rc::downgrade(ring), Rc::clone(&self.lives));
        ring.page().on_foreign_load(Some(Rc::new(move |offset, len| {
            let Some(ring) = own.upgrade().filter(|_| offset >= HEADER && len <= ENTRY_BYTES) else { return };
            let slot = (offset - HEADER) / ENTRY_BYTES % 32;
            let mut id = [0; 8];
            ring.page().read(HEADER + slot * ENTRY_BYTES + 8, &mut id);
            let id = (u64::from_le_bytes(id), lives.get());
            let (mut loads, mut last) = (loads.borrow_mut(), last_id.borrow_mut());
            if last[slot] != id {
                (last[slot], loads[slot]) = (id, 0);
            }
            loads[slot] += 1;
            if loads[slot] > 1 {
                world.fail(
                    Invariant::H1,
                    format!("the entry in slot {slot} is read again after it was checked"),
                );
            }
        })));
    }

    /// Plays `count` tricks, or stops once the ring is closed.
    pub async fn play(&self, count: u32) -> Result<(), Errno> {
        let Some(ring) = self.ring.borrow().clone() else { return Ok(()) };
        let page = GrantedPage::new(&self.attached.port, DomId(0), false)?;
        let read_only = GrantedPage::new(&self.attached.port, DomId(0), true)?;
        self.flood(&ring).await;
        for i in 0..count {
            let value =
                self.world.sim.decide(self.entity, &TRICK, i, |d| d.below(16) | d.below(1 << 32) << 4);
            let (trick, detail) = (value & 15, value >> 4);
            match trick {
                0 => {}
                15 if !detail.is_multiple_of(4) => self.scribble(&ring, detail),
                15 => {
                    self.overrun(&ring, detail).await;
                    break;
                }
                _ => {
                    let entry = |trick, detail| self.entry(trick, detail, page.gref.0, read_only.gref.0);
                    let mut asked = vec![entry(trick, detail)];
                    let draw = |d: &mut Draw| if d.below(3) == 0 { 1 + d.below(MAX_TOGETHER) } else { 0 };
                    let more = self.world.sim.decide(self.entity, &TOGETHER, i, draw).min(MAX_TOGETHER);
                    for k in 1..=more {
                        let number = (i + 1) * 256 + k as u32;
                        let draw = |d: &mut Draw| (1 + d.below(14)) | (d.below(1 << 32) << 4);
                        let value = self.world.sim.decide(self.entity, &TRICK, number, draw);
                        if !matches!(value & 15, 0 | 15) {
                            asked.push(entry(value & 15, value >> 4));
                        }
                    }
                    self.ask(&ring, asked, i).await;
                }
            }
            if self.world.verdict.is_broken() || self.may_be_unrecoverable() || self.back_state().await != 4 {
                break;
            }
        }
        self.close_channel(&ring);
        drop(ring);
        self.leave(page, read_only).await
    }

    /// Another CPU watches the index of responses and posts a malformed request at once for each response.
    async fn flood(&self, ring: &Rc<GuestRing>) {
        let count = self
            .world
            .sim
            .decide(self.entity, &FLOOD, 0, |d| if d.below(2) == 0 { 0 } else { 500 + d.below(1500) });
        if count == 0 {
            return;
        }
        let (mut entry, _) = self.entry(3, 0, 0, 0);
        let (own, left, next_id) = (Rc::downgrade(ring), Cell::new(count), self.next_id.get());
        let post = move || {
            let (Some(ring), Some(rest)) = (own.upgrade(), left.get().checked_sub(1)) else { return };
            left.set(rest);
            let page = ring.page();
            let produced = page.load_u32(REQ_PROD);
            entry[8..16].copy_from_slice(&(next_id + rest).to_le_bytes());
            page.write(HEADER + produced as usize % 32 * ENTRY_BYTES, &entry);
            page.store_u32(REQ_PROD, produced.wrapping_add(1));
        };
        self.next_id.set(next_id + count);
        let post = RefCell::new(post);
        post.borrow_mut()();
        ring.page().on_shared_store(Some(Rc::new(move |offset, _| {
            if offset == RSP_PROD {
                post.borrow_mut()();
            }
        })));
        ring.channel().notify();
        let until = self.world.sim.now_ns() + PATIENCE_NS;
        while ring.page().load_u32(REQ_PROD) != ring.page().load_u32(RSP_PROD) {
            if self.world.sim.now_ns() > until {
                self.world.fail(Invariant::X1, "a request of a flood got no answer");
                break;
            }
            self.world.sim.sleep_ns(50_000).await;
        }
        ring.page().on_shared_store(None);
        ring.catch_up();
    }

    /// An entry, and how it must be answered.
    fn entry(&self, trick: u64, detail: u64, page: u32, read_only: u32) -> ([u8; ENTRY_BYTES], Expect) {
        let id = self.next_id.replace(self.next_id.get() + 1);
        let op = if trick == 2 || trick == 10 { BlkifOp::Read } else { BlkifOp::Write };
        let gref = if trick == 10 { read_only } else { page };
        // Up to eight segments; only the last of them is invalid.
        let count = 1 + (detail >> 29 & 7);
        let at = (count as usize - 1) * size_of::<Segment>();
        let honest = if trick == 10 { page } else { gref };
        let mut segments = vec![Segment { gref: honest, first: 0, last: 7 }; count as usize];
        segments[count as usize - 1].gref = gref;
        let request = BlkifRequest::new(id, op, detail % (HONEST_SECTORS - 8 * count), &segments);
        let mut e = request.map(|r| r.encode()).unwrap_or([0; ENTRY_BYTES]);
        let expect = spoil(&mut e, trick, detail, at, self.attached.setup.size_sectors);
        (e, expect)
    }

    /// Posts requests together, as the `nth` batch, and waits for the answers to all.
    async fn ask(&self, ring: &GuestRing, mut asked: Vec<([u8; ENTRY_BYTES], Expect)>, nth: u32) {
        asked.iter().for_each(|(entry, _)| ring.put_raw(entry));
        let consumed = ring.consumed();
        self.scribble_before(ring, nth, consumed);
        if !ring.publish() {
            // What it asked for may have been overwritten.
            ring.channel().notify();
        }
        if self.scribbled.get().is_some() && !self.index_is_restored(ring, consumed, asked.len() as u32).await
        {
            return;
        }
        let until = self.world.sim.now_ns() + PATIENCE_NS;
        while let Some((first, _)) = asked.first() {
            let response = match ring.take() {
                Ok(Some(response)) => response,
                Ok(None) if self.may_be_unrecoverable() => return,
                Ok(None) if self.world.sim.now_ns() < until => {
                    self.world.sim.sleep_ns(20_000).await;
                    continue;
                }
                Ok(None) => {
                    let text = format!("request #{} of the hostile guest got no answer", id_of(first));
                    return self.world.fail(Invariant::X1, text);
                }
                Err(_) => return self.world.fail(Invariant::X1, "more responses than requests"),
            };
            let Some(at) = asked.iter().position(|(entry, _)| id_of(entry) == response.id.get()) else {
                let text = format!("a response has id {}, which is not in flight", response.id.get());
                return self.world.fail(Invariant::X1, text);
            };
            let (entry, expect) = asked.remove(at);
            self.check_response(&response, &entry, expect);
        }
    }

    fn check_response(&self, response: &RawResponse, entry: &[u8; ENTRY_BYTES], expect: Expect) {
        let status = response.status.get();
        let good = match expect {
            // Once data is lost in unknown places, flushes fail, and so do writes that need one.
            Expect::Ok => status == 0 || self.world.kernel.answers_lost(),
            Expect::Error => status < 0,
            Expect::Any => true,
        } || is_broken(Oracle::StatusIgnored);
        if !good {
            let what = if expect == Expect::Ok { "an honest request" } else { "a malformed request" };
            let text = format!(
                "{what} (op {}, {} segments) was answered with status {status}",
                entry[OP], entry[NR_SEGMENTS]
            );
            self.world.fail(Invariant::H1, text);
        }
        if response.padding != 0 || response.tail.get() != 0 {
            self.world.fail(Invariant::H1, "the padding of a response is not zero");
        }
        self.world.count(|s| s.requests += 1);
    }

    /// Overwrites fields of the header where only the front end is affected.
    fn scribble(&self, ring: &GuestRing, detail: u64) {
        ring.page().write(16, &detail.to_le_bytes());
        ring.page().write(32, &detail.rotate_left(17).to_le_bytes());
        ring.channel().notify();
    }

    /// Announces more requests than the ring has room for: the back end must close the ring.
    async fn overrun(&self, ring: &GuestRing, detail: u64) {
        let produced = ring.page().load_u32(0);
        ring.page().store_u32(0, produced.wrapping_add(33 + (detail as u32 >> 1)));
        ring.channel().notify();
        // A successor refuses a ring whose epoch was overwritten, and so serves nothing of it.
        if !self.wait_for_back(|s| s >= 5 || self.may_be_unrecoverable()).await {
            self.world.fail(Invariant::H1, "a ring with impossible indices is not closed");
        }
    }

    /// Leaves: in order, or by vanishing.
    async fn leave(&self, page: GrantedPage, read_only: GrantedPage) -> Result<(), Errno> {
        if self.world.setting("hostile-exit", &[false, true]) {
            let (xen, dom, node) = (self.world.xen.clone(), self.attached.dom, self.attached.node.clone());
            node.kill();
            xen.destroy_domain(dom);
            return Ok(());
        }
        self.write("state", "5").await?;
        self.wait_for_back(|s| s >= 5).await;
        self.write("state", "6").await?;
        self.wait_for_back(|s| s == 6).await;
        let ring = self.ring.borrow_mut().take().and_then(Rc::into_inner);
        let ended = ring.is_none_or(|r| r.end().is_ok());
        if !ended || page.end(&self.attached.port).is_err() || read_only.end(&self.attached.port).is_err() {
            self.world.fail(Invariant::K1, "the back end keeps pages of a closed front end mapped");
        }
        Ok(())
    }
}

/// Applies `trick` to `e`, whose last segment is at byte `at`. Returns how it must be answered.
fn spoil(e: &mut [u8; ENTRY_BYTES], trick: u64, detail: u64, at: usize, size_sectors: u64) -> Expect {
    let sector = |e: &mut [u8; ENTRY_BYTES], s: u64| e[SECTOR..SECTOR + 8].copy_from_slice(&s.to_le_bytes());
    match trick {
        1 | 2 => Expect::Ok,
        3 => {
            e[NR_SEGMENTS] = 0;
            Expect::Error
        }
        4 => {
            e[NR_SEGMENTS] = 12 + (detail % 240) as u8;
            Expect::Error
        }
        5 => {
            (e[at + FIRST], e[at + LAST]) = (5, 2);
            Expect::Error
        }
        6 => {
            e[at + LAST] = 8 + (detail % 240) as u8;
            Expect::Error
        }
        7 => {
            sector(e, size_sectors - detail % 7);
            Expect::Error
        }
        8 => {
            sector(e, u64::MAX - detail % 16);
            Expect::Error
        }
        9 => {
            e[at + 24..at + 28].copy_from_slice(&(5000 + (detail as u32 & 0xfff_ffff)).to_le_bytes());
            Expect::Error
        }
        10 => Expect::Error,
        11 => {
            e[OP] = UNKNOWN_OPS[(detail % 5) as usize];
            Expect::Error
        }
        12 => {
            // Whatever it may mean stays within the honest sectors; only the id is kept.
            let mut draw = sim::Draw::new(detail);
            let keep = (e[SECTOR..SECTOR + 8].to_vec(), e[8..16].to_vec());
            e.iter_mut().for_each(|b| *b = draw.bits() as u8);
            e[SECTOR..SECTOR + 8].copy_from_slice(&keep.0);
            e[8..16].copy_from_slice(&keep.1);
            Expect::Any
        }
        13 => {
            // A page of another table, or of none.
            e[at + 24..at + 28].copy_from_slice(&[0xff; 4]);
            Expect::Error
        }
        _ => {
            e[OP] = 3;
            e[NR_SEGMENTS] = 0;
            Expect::Ok
        }
    }
}
