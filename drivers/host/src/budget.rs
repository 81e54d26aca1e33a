//! One bound on the memory of a process.
//!
//! ```text
//!   Budget (bytes)
//!     ├─ stage "requests"   guarantee 32 MiB ──take──► Share ──► buffers of one request
//!     ├─ stage "parts"      guarantee 0.5 MiB ─take──► Share          │ holds its share and asks
//!     └─ stage "bounces"    guarantee 0.3 MiB ─take──► Share ◄────────┘ stages further down only
//!
//!   in use = for every stage the larger of what it has and what it was guaranteed, plus what is kept for reuse
//! ```
//!
//! # Contract
//!
//! * What is in use never exceeds the limit. A guarantee counts from the moment the stage is made until it is dropped,
//!   so that a stage can always hand out its guarantee. [`Budget::stage`] refuses what no longer fits.
//! * **No take waits forever**, as long as a holder of a share asks for more only at later stages, never at its own or
//!   an earlier one. So one piece of work takes all that it needs from one stage at once, and divides it with
//!   [`Share::split`] and [`Share::buffer`]. Takes that wait are limited to the guarantee; [`Stage::try_take`] takes
//!   more when there is room and refuses otherwise.
//! * First come, first served within a stage. A dropped future gives up its place.
//! * Memory that outlives requests (caches) is taken with [`Stage::try_keep`], which leaves a quarter of the limit
//!   to the rest.

use crate::Errno;
use crate::buf::{IoBuf, Kept, MAX_BUF_BYTES, Pages, cost_of};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// What is kept for reuse is at most the limit divided by this.
const KEPT_PART: usize = 8;

/// The limit in bytes on all memory of variable size in one process; clones share it.
#[derive(Clone)]
pub struct Budget(Rc<Shared>);

/// How much of a [`Budget`] is in use, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BudgetFigures {
    /// In use now, including guarantees and what is kept for reuse.
    pub used_bytes: usize,
    /// The part of it that is kept for reuse and makes room for anything else.
    pub kept_bytes: usize,
    /// The most that was in use at one time.
    pub peak_bytes: usize,
    /// The limit.
    pub limit_bytes: usize,
}

struct Shared {
    limit: Cell<usize>,
    /// Each guarantee raises the limit by its size for as long as its stage exists.
    least: bool,
    /// Sum over the stages of the larger of what each has and its guarantee.
    held: Cell<usize>,
    peak: Cell<usize>,
    kept: RefCell<Kept>,
    stages: RefCell<Stages>,
}

#[derive(Default)]
struct Stages {
    /// The queues of stages that have waiters, by the stage's number.
    waiting: BTreeMap<u64, VecDeque<Waiter>>,
    next_stage: u64,
    next_ticket: u64,
}

struct Waiter {
    ticket: u64,
    stage: Stage,
    bytes: usize,
    waker: Waker,
}

/// The users of memory at one point of a request's path; clones share it.
#[derive(Clone)]
pub struct Stage(Rc<StageInner>);

struct StageInner {
    budget: Budget,
    number: u64,
    guarantee: usize,
    used: Cell<usize>,
}

/// Bytes of a [`Budget`]; returned when dropped.
pub struct Share {
    stage: Stage,
    bytes: usize,
}

impl Budget {
    /// The default limit of a process: 256 MiB.
    pub const DEFAULT_BYTES: usize = 256 << 20;

    /// A budget of `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        Self::with(limit_bytes, false)
    }

    /// A budget of exactly what its stages are guaranteed, however many there are: the minimum that any program can run
    /// with, for tests.
    pub fn least() -> Self {
        Self::with(0, true)
    }

    fn with(limit_bytes: usize, least: bool) -> Self {
        Self(Rc::new(Shared {
            limit: Cell::new(limit_bytes),
            least,
            held: Cell::new(0),
            peak: Cell::new(0),
            kept: RefCell::default(),
            stages: RefCell::default(),
        }))
    }

    /// The most that one piece of work may take, so that there is room for others: a quarter of the limit, or no
    /// bound where each guarantee raises the limit.
    pub fn most_for_one_bytes(&self) -> usize {
        if self.0.least { usize::MAX } else { self.limit() / 4 }
    }

    /// How much is in use.
    pub fn figures(&self) -> BudgetFigures {
        BudgetFigures {
            used_bytes: self.0.held.get() + self.0.kept.borrow().bytes(),
            kept_bytes: self.0.kept.borrow().bytes(),
            peak_bytes: self.0.peak.get(),
            limit_bytes: self.limit(),
        }
    }

    /// A stage that can always hand out `guarantee_bytes`.
    ///
    /// # Errors
    /// `ENOMEM` where the guarantee does not fit into what is left.
    pub fn stage(&self, guarantee_bytes: usize) -> Result<Stage, Errno> {
        if self.0.least {
            self.0.limit.set(self.0.limit.get().checked_add(guarantee_bytes).ok_or(Errno::ENOMEM)?);
        }
        self.grow(guarantee_bytes, self.limit()).ok_or(Errno::ENOMEM)?;
        let mut stages = self.0.stages.borrow_mut();
        let number = stages.next_stage;
        stages.next_stage += 1;
        Ok(Stage(Rc::new(StageInner {
            budget: self.clone(),
            number,
            guarantee: guarantee_bytes,
            used: Cell::new(0),
        })))
    }

    fn limit(&self) -> usize {
        self.0.limit.get()
    }

    /// Holds `bytes` more if that stays within `limit`; what is kept for reuse makes room.
    fn grow(&self, bytes: usize, limit: usize) -> Option<()> {
        let held = self.0.held.get().checked_add(bytes).filter(|held| *held <= limit)?;
        self.0.kept.borrow_mut().shed(self.limit() - held);
        self.0.held.set(held);
        self.note_peak();
        Some(())
    }

    fn note_peak(&self) {
        let used = self.0.held.get() + self.0.kept.borrow().bytes();
        assert!(used <= self.limit(), "{used} bytes of a memory budget of {} are in use", self.limit());
        self.0.peak.set(self.0.peak.get().max(used));
    }

    /// Wakes the first waiters for which there is room, at stage `only` or at all stages.
    fn wake(&self, only: Option<u64>) {
        let stages = self.0.stages.borrow();
        if stages.waiting.is_empty() {
            return;
        }
        let lines = stages.waiting.iter().filter(|(number, _)| only.is_none_or(|only| only == **number));
        let can_go_on = |waiter: &&Waiter| waiter.stage.has_room(waiter.bytes, self.limit());
        let first = lines.filter_map(|(_, line)| line.front().filter(can_go_on));
        let wakers: Vec<Waker> = first.map(|waiter| waiter.waker.clone()).collect();
        drop(stages);
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// Whether it is the same budget.
impl PartialEq for Budget {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Budget {}

impl Default for Budget {
    fn default() -> Self {
        Self::new(Self::DEFAULT_BYTES)
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = self.figures();
        write!(f, "Budget({} of {} bytes)", figures.used_bytes, figures.limit_bytes)
    }
}

impl Stage {
    /// Bytes that it can always hand out.
    pub fn guarantee_bytes(&self) -> usize {
        self.0.guarantee
    }

    /// Bytes of its shares.
    pub fn used_bytes(&self) -> usize {
        self.0.used.get()
    }

    /// Whether a caller waits in [`Stage::take`].
    pub fn is_waited_for(&self) -> bool {
        self.0.budget.0.stages.borrow().waiting.contains_key(&self.0.number)
    }

    /// `bytes`, if there is room for them and no caller waits.
    pub fn try_take(&self, bytes: usize) -> Option<Share> {
        if self.is_waited_for() { None } else { self.claim(bytes, self.0.budget.limit()) }
    }

    /// As [`Stage::try_take`], for memory that outlives its request: within the guarantee, or within three quarters
    /// of the limit.
    pub fn try_keep(&self, bytes: usize) -> Option<Share> {
        let limit = self.0.budget.limit();
        if self.is_waited_for() { None } else { self.claim(bytes, limit - limit / 4) }
    }

    /// A share of no bytes.
    pub fn nothing(&self) -> Share {
        Share { stage: self.clone(), bytes: 0 }
    }

    /// `bytes` as soon as there is room for them, in turn.
    ///
    /// # Errors
    /// `EINVAL` above the guarantee: that could wait forever.
    pub async fn take(&self, bytes: usize) -> Result<Share, Errno> {
        if bytes > self.0.guarantee {
            return Err(Errno::EINVAL);
        }
        if let Some(share) = self.try_take(bytes) {
            return Ok(share);
        }
        let mut turn = Turn { stage: self, ticket: None };
        Ok(poll_fn(|cx| turn.poll(bytes, cx.waker())).await)
    }

    /// A buffer of `len_bytes` of unspecified content with a share of its own, as [`Stage::take`].
    ///
    /// # Errors
    /// `EINVAL` above 4 MiB or the guarantee.
    pub async fn buffer(&self, len_bytes: usize) -> Result<IoBuf, Errno> {
        self.take(cost_of(len_bytes)).await?.buffer(len_bytes)
    }

    /// By how much the budget's total would grow with `bytes` more here.
    fn more(&self, bytes: usize) -> Option<usize> {
        let (used, guarantee) = (self.0.used.get(), self.0.guarantee);
        Some(used.checked_add(bytes)?.max(guarantee) - used.max(guarantee))
    }

    fn has_room(&self, bytes: usize, limit: usize) -> bool {
        let held = self.0.budget.0.held.get();
        self.more(bytes).is_some_and(|more| more == 0 || held.checked_add(more).is_some_and(|h| h <= limit))
    }

    fn claim(&self, bytes: usize, limit: usize) -> Option<Share> {
        let more = self.more(bytes)?;
        if more > 0 {
            self.0.budget.grow(more, limit)?;
        }
        self.0.used.set(self.0.used.get() + bytes);
        Some(Share { stage: self.clone(), bytes })
    }

    fn give_back(&self, bytes: usize) {
        let (used, guarantee) = (self.0.used.get(), self.0.guarantee);
        let after = used - bytes;
        let less = used.max(guarantee) - after.max(guarantee);
        self.0.used.set(after);
        let budget = &self.0.budget.0;
        budget.held.set(budget.held.get() - less);
        self.0.budget.wake(if less > 0 { None } else { Some(self.0.number) });
    }
}

impl Drop for StageInner {
    fn drop(&mut self) {
        let budget = &self.budget.0;
        let held = budget.held.get() - self.guarantee;
        budget.held.set(held);
        if budget.least {
            let limit = budget.limit.get() - self.guarantee;
            budget.limit.set(limit);
            budget.kept.borrow_mut().shed(limit - held);
        }
        self.budget.wake(None);
    }
}

impl Share {
    /// Bytes in it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The stage that it belongs to.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// `bytes` of it as a share of their own.
    ///
    /// # Errors
    /// `ENOMEM` where it has fewer.
    pub fn split(&mut self, bytes: usize) -> Result<Share, Errno> {
        self.bytes = self.bytes.checked_sub(bytes).ok_or(Errno::ENOMEM)?;
        Ok(Share { stage: self.stage.clone(), bytes })
    }

    /// Adds `other`, which must be of the same stage.
    pub fn join(&mut self, mut other: Share) {
        assert!(Rc::ptr_eq(&self.stage.0, &other.stage.0), "shares of different stages");
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// A buffer of `len_bytes` of unspecified content out of it; costs [`cost_of`] bytes.
    ///
    /// # Errors
    /// `EINVAL` above 4 MiB, `ENOMEM` where the share has too little.
    pub fn buffer(&mut self, len_bytes: usize) -> Result<IoBuf, Errno> {
        if len_bytes > MAX_BUF_BYTES {
            return Err(Errno::EINVAL);
        }
        let share = self.split(cost_of(len_bytes))?;
        let pages = share.stage.0.budget.0.kept.borrow_mut().take(share.bytes);
        Ok(IoBuf::with_share(pages, len_bytes, share))
    }

    /// Keeps `pages` for the next buffer of that size if there is room, and returns the bytes.
    pub(crate) fn end_with(self, pages: Pages) {
        let budget = self.stage.0.budget.clone();
        drop(self);
        let (held, limit) = (budget.0.held.get(), budget.limit());
        budget.0.kept.borrow_mut().put(pages, limit - held, limit / KEPT_PART);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.stage.give_back(self.bytes);
        }
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Share({} bytes)", self.bytes)
    }
}

struct Turn<'a> {
    stage: &'a Stage,
    ticket: Option<u64>,
}

impl Turn<'_> {
    fn poll(&mut self, bytes: usize, waker: &Waker) -> Poll<Share> {
        let inner = &self.stage.0;
        let mut stages = inner.budget.0.stages.borrow_mut();
        let ticket = *self.ticket.get_or_insert_with(|| {
            stages.next_ticket += 1;
            stages.next_ticket
        });
        let line = stages.waiting.entry(inner.number).or_default();
        match line.iter_mut().find(|w| w.ticket == ticket) {
            Some(waiter) => waiter.waker.clone_from(waker),
            None => {
                line.push_back(Waiter { ticket, stage: self.stage.clone(), bytes, waker: waker.clone() });
            }
        }
        let is_first = line.front().is_some_and(|w| w.ticket == ticket);
        drop(stages);
        if is_first && let Some(share) = self.stage.claim(bytes, inner.budget.limit()) {
            return Poll::Ready(share);
        }
        Poll::Pending
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let inner = &self.stage.0;
        let mut stages = inner.budget.0.stages.borrow_mut();
        let mut left = None;
        if let Some(line) = stages.waiting.get_mut(&inner.number) {
            left = line.iter().position(|w| w.ticket == ticket).and_then(|at| line.remove(at));
            if line.is_empty() {
                stages.waiting.remove(&inner.number);
            }
        }
        drop(stages);
        drop(left);
        // There may be room for the next as well, or this one was woken and did not use its turn.
        inner.budget.wake(Some(inner.number));
    }
}

#[cfg(test)]
mod tests;
