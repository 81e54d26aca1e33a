//! A disk that a tapdisk serves: its ring is connected there, and followed when that tapdisk dies and another has the
//! disk.
//!
//! ```text
//!   shown ──► find the disk ──► connect ──► follow: events of the tapdisk ──┬─ told to close ──► disconnect
//!                 ▲                                               │         ├─ ring given up ──► refused
//!                 │                                               └ larger: published
//!                 └───────────── pause ◄── gone: died, or closed by force ──┘
//! ```

use super::BackHost;
use super::tapdisks::{Place, Ring, Seen, Tapdisks};
use crate::{Console, vdev};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use tap_control::client::CallError;
use tap_control::json::{Guest, News, Standing};
use tap_core::wait::joined;
use tap_host::{DomId, Either, Errno, GrantRef, Patience, Port, Transaction, VbdId, select};
use tap_ring::{ConnectError, RingCloser, RingConfig, RingEnd};
use tap_xenbus::{DiskSize, ServedDisk, Serving, Shown, Unserved, patiently};

tap_host::listed! {
    pub(super) BUGS: Bug;
    RING_NOT_FOLLOWED = "ring-not-followed", "a guest whose tapdisk died is not given to the one that has its disk since";
    NUMBER_FOLLOWED = "number-followed", "a guest whose disk is gone gets another one that has its minor number since";
    GROWTH_UNHEARD = "growth-unheard", "tapback does not hear that a disk has become larger";
    OLD_SIZE_GIVEN = "old-size-given", "a guest gets a disk of the size that it was told first, although it was told of a larger one since";
    CLOSED_UNRELEASED = "closed-unreleased", "a device counts as closed while a tapdisk serves its ring";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    RING_FOLLOWED = "ring-followed", "a guest whose tapdisk was gone was given to the one that has its disk";
    FRONT_WAITS = "front-waits", "a front end waits because no tapdisk has its disk open";
    NUMBER_REUSED = "number-reused", "tapback did not take another disk for a guest's because it has its minor number";
    RING_LOST = "ring-lost", "tapback heard that a ring is not served any more";
    GROWTH_HEARD = "growth-heard", "tapback heard that a disk has become larger";
}

/// How often a disk that is gone is looked for, in nanoseconds.
const LOOK_PAUSE_NS: u64 = 500_000_000;
/// How long a disk may take to be there, in nanoseconds, before that is said: its tapdisk may be starting again. A
/// toolstack that takes the device away meanwhile waits ten seconds.
const FIND_PATIENCE_NS: u64 = 4_000_000_000;
/// How long a disk that is there may take to get a ring, in nanoseconds: a predecessor may be dying.
const GIVE_PATIENCE_NS: u64 = 2_000_000_000;

/// The name of the disk in xenstore: the socket where its tapdisk offers it over NBD.
const PATH_KEY: &str = "physical-device-path";
/// That name, a space, and which allocation of the minor number the disk has.
const ALLOCATION_KEY: &str = "minor-allocation";
/// Whose time the guest's I/O takes.
const PID_KEY: &str = "kthread-pid";

/// A ring that is given to whoever has the disk.
struct Given {
    ring: (GrantRef, Port),
    read_only: bool,
    /// What its guest was told at first.
    first_sectors: u64,
    /// What it was told since, and what there is to tell.
    size: DiskSize,
}

/// Why a ring is not served any more.
enum Lost {
    /// Its tapdisk has died, or closed the disk.
    Gone,
    /// Its tapdisk gave it up, because of what the guest wrote.
    Failed,
}

/// Whether another attempt to find a disk, or to have a ring served, may succeed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hope {
    /// Something has to change.
    None,
    /// What is in the way should be gone soon.
    Soon,
    /// Whoever has the disk is away, which may take any time.
    Away,
}

/// The disk of one device.
pub(super) struct Remote<H: BackHost>(Rc<Inner<H>>);

struct Inner<H: BackHost> {
    tapdisks: Rc<Tapdisks<H>>,
    console: Rc<dyn Console>,
    backend: String,
    dom: DomId,
    vbd: VbdId,
    /// What stands in the way, as it was said last.
    said: Rc<RefCell<String>>,
    /// The tapdisks that were asked to serve a ring.
    asked: RefCell<BTreeSet<Place>>,
    /// One of them did: no predecessor's ring is left.
    connected: Cell<bool>,
}

impl<H: BackHost> Remote<H> {
    pub(super) fn new(
        tapdisks: Rc<Tapdisks<H>>,
        console: Rc<dyn Console>,
        backend: String,
        dom: DomId,
        vbd: VbdId,
        said: Rc<RefCell<String>>,
    ) -> Self {
        let (asked, connected) = (RefCell::default(), Cell::new(false));
        Self(Rc::new(Inner { tapdisks, console, backend, dom, vbd, said, asked, connected }))
    }
}

impl<H: BackHost> ServedDisk<H> for Remote<H> {
    async fn appeared(&self) {
        // What stands in the way is said when the front end connects.
        let _noted_or_not = self.0.find().await;
    }

    async fn shown(&self) -> Result<Shown, Unserved> {
        let host = &self.0.tapdisks.host;
        // Once it is known to be away, it is looked for once at a time.
        let patience_ns = if self.0.said.borrow().is_empty() { FIND_PATIENCE_NS } else { 0 };
        let until_ns = host.now_ns().saturating_add(patience_ns);
        let mut patience = Patience::until();
        loop {
            match self.0.find().await {
                Ok((_, seen)) => return Ok(Shown::sized(seen.size_sectors, seen.read_only)),
                Err(_) if patience.again_before(host, until_ns).await => {}
                Err((words, hope)) => return Err(self.0.unserved(words, hope)),
            }
        }
    }

    async fn connect(&self, host: &H, ring: RingConfig, size: &DiskSize) -> Result<Serving, ConnectError> {
        let (key, read_only) = ((ring.ring_ref, ring.port), ring.read_only);
        let given = Given { ring: key, first_sectors: size.told_sectors(), size: size.clone(), read_only };
        let until_ns = host.now_ns().saturating_add(GIVE_PATIENCE_NS);
        let mut patience = Patience::until();
        let place = loop {
            match self.0.give_again(&given).await {
                Err((_, Hope::Soon | Hope::Away)) if patience.again_before(host, until_ns).await => {}
                Err((words, hope)) => {
                    let Unserved { words, away } = self.0.unserved(words, hope);
                    return Err(ConnectError::Told { words, away });
                }
                Ok(place) => break place,
            }
        };
        let closer = RingCloser::default();
        let (own, order) = (Rc::clone(&self.0), closer.clone());
        let (task, ended) = joined(async move { own.follow(place, given, order).await });
        host.spawn("follow", u64::from(self.0.dom.0) << 32 | u64::from(self.0.vbd.0), task);
        Ok(Serving { closer, ended })
    }

    async fn release(&self) {
        if self.0.tapdisks.host.bug(&CLOSED_UNRELEASED) {
            return;
        }
        self.0.take_back_from_all().await;
    }

    async fn close(&self, over: bool) -> Result<(), Errno> {
        if over {
            self.release().await;
        }
        Ok(())
    }
}

impl<H: BackHost> Inner<H> {
    fn name(&self) -> String {
        vdev::of_guest(self.dom, self.vbd)
    }

    /// Says why a front end waits; one that is refused is told itself.
    fn unserved(&self, words: String, hope: Hope) -> Unserved {
        let away = hope == Hope::Away;
        if away {
            self.tapdisks.host.mark(&FRONT_WAITS);
            self.say_again(&words);
        }
        Unserved { words, away }
    }

    fn say_again(&self, why: &str) {
        if *self.said.borrow() != why {
            self.console.err(&format!("tapback: {}: failed to {why}; it is tried again", self.name()));
            why.clone_into(&mut self.said.borrow_mut());
        }
    }

    /// Looks for the disk that xenstore names, and remembers it.
    async fn find(&self) -> Result<(Place, Seen), (String, Hope)> {
        let (host, path) = (&self.tapdisks.host, format!("{}/{PATH_KEY}", self.backend));
        let named = match patiently(host, async || host.read(&path).await).await {
            Ok(value) => String::from_utf8_lossy(&value).into_owned(),
            Err(Errno::ENOENT) => {
                let why =
                    format!("find {path} in xenstore; the script writes it once tap-ctl has opened the disk");
                return Err((why, Hope::None));
            }
            Err(error) => return Err((format!("read {path} in xenstore: {error}"), Hope::Away)),
        };
        let folder = self.tapdisks.folder();
        let known = Place::of(&named, folder).ok_or_else(|| {
            let why = format!("read {path} in xenstore: {named:?} is not {folder}/nbd<pid>.<minor>");
            (why, Hope::None)
        })?;
        let away = |why| (why, Hope::Away);
        let (place, seen) = self.tapdisks.find(known).await.map_err(away)?;
        let known_by = self.allocation_of(&named).await.map_err(away)?;
        let allocation = &seen.allocation;
        // A tapdisk of an older version does not tell which allocation it has.
        let is_ours = match &known_by {
            Some(known) => known == allocation || allocation.is_empty(),
            None => place == known,
        };
        if !is_ours && !host.bug(&NUMBER_FOLLOWED) {
            host.mark(&NUMBER_REUSED);
            return Err(away(format!(
                "take minor {} of tapdisk {} for its disk: the number may have been freed, and be another disk's; open \
                 the right one, write where it is to {path}, and remove {ALLOCATION_KEY} beside it",
                place.minor, place.pid
            )));
        }
        if (place != known || known_by.is_none())
            && !self.rename(&named, place, allocation).await.map_err(away)?
        {
            return Err(away(format!("read {path} in xenstore: it has changed meanwhile")));
        }
        Ok((place, seen))
    }

    /// Takes the ring back from every tapdisk that may serve it.
    async fn take_back_from_all(&self) {
        let Self { tapdisks, dom, vbd, .. } = self;
        let mut places = self.asked.borrow().clone();
        if !self.connected.get() {
            // That of a predecessor may be anywhere.
            let guests = tapdisks.guests().await.unwrap_or_default();
            places.extend(guests.into_iter().filter(|(_, id)| *id == (*dom, *vbd)).map(|(place, _)| place));
        }
        // One that does not answer is in no list; if xenstore names it, it may have the ring.
        places.extend(self.named().await);
        for place in places {
            // Usually it does not, and a request that is refused is mentioned in a log.
            if tapdisks.at(place.pid).serves(*dom, *vbd).await {
                self.take_back(place).await;
            }
        }
    }

    /// The place that xenstore names, if it can be read.
    async fn named(&self) -> Option<Place> {
        let (host, path) = (&self.tapdisks.host, format!("{}/{PATH_KEY}", self.backend));
        let named = patiently(host, async || host.read(&path).await).await.ok()?;
        Place::of(&String::from_utf8_lossy(&named), self.tapdisks.folder())
    }

    /// Which allocation of its minor number the disk at `path` had; `None` if it was not looked for before.
    async fn allocation_of(&self, path: &str) -> Result<Option<String>, String> {
        let (host, key) = (&self.tapdisks.host, format!("{}/{ALLOCATION_KEY}", self.backend));
        match patiently(host, async || host.read(&key).await).await {
            Ok(value) => {
                let value = String::from_utf8_lossy(&value);
                let (of, allocation) = value.rsplit_once(' ').unwrap_or_default();
                Ok((of == path).then(|| allocation.to_owned()))
            }
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(format!("read {key} in xenstore: {error}")),
        }
    }

    /// Writes where the disk is, and whose time its I/O takes, unless somebody else has named another since; returns
    /// whether it did.
    async fn rename(&self, old: &str, place: Place, allocation: &str) -> Result<bool, String> {
        let host = &self.tapdisks.host;
        let at = |key: &str| format!("{}/{key}", self.backend);
        let new = self.tapdisks.path_of(place);
        let write = async || {
            let tx = host.transaction().await?;
            if tx.read(&at(PATH_KEY)).await? != old.as_bytes() {
                return Ok(false);
            }
            tx.write(&at(PATH_KEY), new.as_bytes()).await?;
            if !allocation.is_empty() {
                tx.write(&at(ALLOCATION_KEY), format!("{new} {allocation}").as_bytes()).await?;
            }
            tx.write(&at(PID_KEY), place.pid.to_string().as_bytes()).await?;
            tx.commit().await.map(|()| true)
        };
        loop {
            match patiently(host, write).await {
                Err(Errno::EAGAIN) => {}
                // The device is gone; its end is noticed elsewhere.
                Err(Errno::ENOENT) => return Ok(false),
                Ok(written) => return Ok(written),
                Err(error) => return Err(format!("write {}/{PATH_KEY} in xenstore: {error}", self.backend)),
            }
        }
    }

    /// Takes the ring back, and returns once no tapdisk serves it.
    async fn take_back(&self, place: Place) {
        let mut told = false;
        loop {
            match self.tapdisks.at(place.pid).disconnect(place.minor, self.dom, self.vbd).await {
                Ok(()) => return,
                Err(why) if is_not_there(&why) => return,
                Err(why) => {
                    if !std::mem::replace(&mut told, true) {
                        self.console.err(&format!("tapback: {}: failed to {why}", self.name()));
                    }
                    self.tapdisks.host.sleep_ns(LOOK_PAUSE_NS).await;
                }
            }
        }
    }

    /// Keeps the ring served, wherever its disk is, until `order` says otherwise.
    async fn follow(&self, mut place: Place, given: Given, order: RingCloser) -> RingEnd {
        loop {
            let given_ns = self.tapdisks.host.now_ns();
            match select(order.told(), self.listen(place, &given)).await {
                Either::First(RingEnd::Closed) => {
                    if !self.tapdisks.host.bug(&CLOSED_UNRELEASED) {
                        self.take_back(place).await;
                    }
                    return RingEnd::Closed;
                }
                // Its tapdisk goes on without us.
                Either::First(end) => return end,
                Either::Second(Lost::Failed) => {
                    return RingEnd::Refused("its tapdisk gave it up; the log of that says why");
                }
                Either::Second(Lost::Gone) => {}
            }
            self.tapdisks.host.mark(&RING_LOST);
            self.console.err(&format!(
                "tapback: {}: its disk is not open any more; the guest waits until a tapdisk has minor {} open again",
                self.name(),
                place.minor
            ));
            match self.again(&given, given_ns, &order).await {
                Either::First(RingEnd::Closed) => {
                    // What an attempt without an answer may have given.
                    self.take_back_from_all().await;
                    return RingEnd::Closed;
                }
                Either::First(end) => return end,
                Either::Second(found) => place = found,
            }
            self.tapdisks.host.mark(&RING_FOLLOWED);
            self.console.out(&format!("{}: tapdisk {} has it", self.name(), place.pid));
        }
    }

    /// Looks for the disk, and gives the ring to the tapdisk that has it. With the error comes whether another attempt
    /// may succeed.
    async fn give_again(&self, given: &Given) -> Result<Place, (String, Hope)> {
        let (place, seen) = self.find().await?;
        let (number, id) = ((place.minor, seen.allocation.as_str()), (self.dom, self.vbd));
        self.asked.borrow_mut().insert(place);
        let told_sectors = match self.tapdisks.host.bug(&OLD_SIZE_GIVEN) {
            true => given.first_sectors,
            false => given.size.told_sectors(),
        };
        let (ring, read_only) = (given.ring, given.read_only);
        let answer =
            self.tapdisks.at(place.pid).connect(number, id, Ring { ring, told_sectors, read_only }).await;
        answer.map_err(|why| (why.to_string(), hope_after(&why)))?;
        self.connected.set(true);
        self.grew(given, seen.size_sectors);
        // With the process number.
        let path = self.tapdisks.path_of(place);
        self.rename(&path, place, &seen.allocation).await.map_err(|why| (why, Hope::Away))?;
        self.said.borrow_mut().clear();
        Ok(place)
    }

    /// Gives the ring to the tapdisk that has the disk, once there is one, unless `order` comes first. An attempt is
    /// not given up half way: nobody would know whether it succeeded. A ring that was lost soon after it was given, at
    /// `given_ns`, is not given at once.
    async fn again(&self, given: &Given, given_ns: u64, order: &RingCloser) -> Either<RingEnd, Place> {
        let host = &self.tapdisks.host;
        let soonest = host.sleep_ns(given_ns.saturating_add(LOOK_PAUSE_NS).saturating_sub(host.now_ns()));
        if let Either::First(end) = select(order.told(), soonest).await {
            return Either::First(end);
        }
        loop {
            if host.bug(&RING_NOT_FOLLOWED) {
                return Either::First(order.told().await);
            }
            match self.give_again(given).await {
                Ok(place) => return Either::Second(place),
                Err((why, _)) => self.say_again(&why),
            }
            if let Either::First(end) = select(order.told(), host.sleep_ns(LOOK_PAUSE_NS)).await {
                return Either::First(end);
            }
        }
    }

    /// Completes once the tapdisk at `place` does not serve the ring any more. Says meanwhile when the disk becomes
    /// larger.
    async fn listen(&self, place: Place, given: &Given) -> Lost {
        let asked = self.tapdisks.at(place.pid);
        loop {
            if let Ok(mut events) = asked.tapdisk().events().await {
                while let Ok(Some(news)) = events.next().await {
                    if let Some(lost) = self.lost_in(place, &news, given) {
                        return lost;
                    }
                }
            }
            // It has ended, or as many listen as may: then it is asked from time to time.
            match asked.standing(place.minor).await {
                Ok((guests, size_sectors)) => {
                    if let Some(lost) = self.lost(&guests, size_sectors, given) {
                        return lost;
                    }
                }
                Err(why) if is_not_there(&why) => return Lost::Gone,
                Err(_) => {}
            }
            self.tapdisks.host.sleep_ns(LOOK_PAUSE_NS).await;
        }
    }

    /// What `news` says about the ring, if that is bad.
    fn lost_in(&self, place: Place, news: &News, given: &Given) -> Option<Lost> {
        let is_ours = |disk: &&Standing| disk.minor == place.minor;
        let disk = match (&news.disks, &news.disk) {
            (Some(disks), _) => disks.iter().find(is_ours),
            (None, Some(disk)) if is_ours(&disk) => Some(disk),
            (None, _) => return None,
        };
        self.lost(disk.map_or(&[], |disk| &disk.guests), disk.and_then(|disk| disk.size_sectors), given)
    }

    /// What it means that a disk has these guests, if that is bad. If it is the ring's, it may have become larger.
    fn lost(&self, guests: &[Guest], size_sectors: Option<u64>, given: &Given) -> Option<Lost> {
        match guests.iter().find(|guest| self.is(guest)) {
            None => Some(Lost::Gone),
            Some(guest) if guest.error.is_some() => Some(Lost::Failed),
            Some(_) => {
                self.grew(given, size_sectors.unwrap_or(0));
                None
            }
        }
    }

    /// The ring's disk has this size, which the back end publishes if it is news.
    fn grew(&self, given: &Given, size_sectors: u64) {
        let host = &self.tapdisks.host;
        if !host.bug(&GROWTH_UNHEARD) && given.size.grew(size_sectors) {
            host.mark(&GROWTH_HEARD);
            self.console.out(&format!("{}: its disk has {size_sectors} sectors now", self.name()));
        }
    }

    fn is(&self, guest: &Guest) -> bool {
        (DomId(guest.domid), VbdId(guest.devid)) == (self.dom, self.vbd)
    }
}

/// Whether nobody serves the ring where it was looked for.
fn is_not_there(why: &CallError) -> bool {
    matches!(
        why,
        CallError::Connect { error: Errno::ENOENT | Errno::ECONNREFUSED, .. }
            | CallError::Refused { error: Errno::ENOTCONN, .. }
    )
}

/// Whether what a tapdisk did not do may be possible later: it died, or has closed or changed the disk; its host lacks
/// something; or a predecessor has the port.
fn hope_after(why: &CallError) -> Hope {
    match why {
        CallError::Refused { error, .. } => match *error {
            Errno::EINVAL | Errno::EBUSY | Errno::ENOMEM | Errno::ENOSPC | Errno::EAGAIN => Hope::Soon,
            Errno::ENODEV | Errno::ESHUTDOWN | Errno::EMEDIUMTYPE => Hope::Away,
            _ => Hope::None,
        },
        CallError::Strange { .. } | CallError::Garbled { .. } => Hope::None,
        CallError::Connect { .. }
        | CallError::Broken { .. }
        | CallError::Ended { .. }
        | CallError::Late { .. } => Hope::Away,
    }
}
