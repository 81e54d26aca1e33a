//! Faults of calls other than transfers: opening, sizing, removing, locking, querying, synchronising a directory.
//!
//! | kind | error | of | may take effect all the same |
//! |---|---|---|---|
//! | 1 | `EINTR` | opening, sizing, removing, locking, seeking holes, synchronising a directory | a new file; a size; a
//! removal |
//! | 2 | `EIO` | all, including asking the file system what it lost, whose answer is then gone | a size; a removal; an
//! exchange of names |
//! | 3 | `EMFILE`, `ENOSPC`, `EBUSY`, `ENOLCK` | opening, sizing, removing, locking | |
//! | 4 | `ENOENT` of an existing file: its storage is temporarily away | opening | |

use crate::faults::{FaultPlan, SyncErrors};
use crate::storage::{Inner, OpenFile, directory, swap};
use sim::{Draw, Entity, FaultKind, Label, Sim, text_hash};
use tap_host::{Errno, LockKind};

/// Which fault a call meets: kind in the low 3 bits; the next bit says that the call took effect all the same.
pub static CALL_FAULT: Label = Label::packed("call-fault", "the call meets fault {}", &[3, 1]);

/// How long a call takes.
pub static CALL_LATE: Label = Label::new("call-late", "the call takes {} ns");
/// How long after a file was dropped it is closed.
pub static CLOSE_LATE: Label = Label::new("file-close-late", "the file is closed {} ns after it was dropped");

/// How many extents a look at a file reports, if not all that were asked for.
pub static EXTENTS_CUT: Label = Label::new("extents-cut", "the look reports {} extents");

static LOOK_SHORT: FaultKind = FaultKind { name: "short-look", max_ppm: 300_000 };
static CALL_SLOW: FaultKind = FaultKind { name: "slow-call", max_ppm: 200_000 };
static CLOSE_SLOW: FaultKind = FaultKind { name: "slow-close", max_ppm: 300_000 };
static CALL_ERROR: FaultKind = FaultKind { name: "call-error", max_ppm: 100_000 };
/// The rate is high because there are few of these calls.
static DIRECTORY_ERROR: FaultKind = FaultKind { name: "directory-error", max_ppm: 400_000 };
static EXCHANGE_ERROR: FaultKind = FaultKind { name: "exchange-error", max_ppm: 400_000 };
static CALL_INTERRUPTED: FaultKind = FaultKind { name: "call-interrupted", max_ppm: 100_000 };

const KIND_EINTR: u64 = 1;
const KIND_EIO: u64 = 2;
const KIND_LACK: u64 = 3;
const KIND_AWAY: u64 = 4;
const HAPPENED: u64 = 8;

/// A call about a file that takes effect at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    Open,
    Create,
    SetSize,
    Remove,
    Exchange,
    Lock,
    Info,
    Extent,
    SyncName,
    SyncAll,
}

impl Call {
    /// The role of its decisions; frozen, because keys of decisions contain it.
    fn role(self) -> &'static str {
        match self {
            Call::Open => "open-call",
            Call::Create => "create-call",
            Call::SetSize => "size-call",
            Call::Remove => "remove-call",
            Call::Exchange => "exchange-call",
            Call::Lock => "lock-call",
            Call::Info => "look-call",
            Call::Extent => "hole-call",
            Call::SyncName => "directory-call",
            Call::SyncAll => "file-system-call",
        }
    }

    /// The error of a kind; `None` if this call has no such fault.
    fn error(self, kind: u64) -> Option<Errno> {
        match (kind, self) {
            // What was exchanged would be exchanged back by another try.
            (KIND_EINTR, Call::Info | Call::SyncAll | Call::Exchange) => None,
            (KIND_EINTR, _) => Some(Errno::EINTR),
            (KIND_EIO, _) => Some(Errno::EIO),
            (KIND_LACK, Call::Open | Call::Create) => Some(Errno::EMFILE),
            (KIND_LACK, Call::SetSize) => Some(Errno::ENOSPC),
            (KIND_LACK, Call::Remove) => Some(Errno::EBUSY),
            (KIND_LACK, Call::Lock) => Some(Errno::ENOLCK),
            (KIND_AWAY, Call::Open) => Some(Errno::ENOENT),
            _ => None,
        }
    }

    /// Whether it may fail with `EINTR`.
    pub(crate) fn is_interruptible(self) -> bool {
        self.error(KIND_EINTR).is_some()
    }

    /// Whether it may have taken effect although it fails in this way.
    fn may_happen(self, kind: u64) -> bool {
        match self {
            Call::Create => kind == KIND_EINTR,
            Call::SetSize | Call::Remove => kind == KIND_EINTR || kind == KIND_EIO,
            Call::Exchange => kind == KIND_EIO,
            _ => false,
        }
    }
}

/// The rates of one seed, looked up once.
pub(crate) struct CallRates {
    error: u32,
    directory: u32,
    exchange: u32,
    interrupted: u32,
    slow: u32,
    look_short: u32,
    pub(crate) close_late: u32,
}

impl CallRates {
    pub(crate) fn new(sim: &Sim, plan: FaultPlan) -> Self {
        let rate = |on: bool, kind| if on { sim.swarm().rate_ppm(kind) } else { 0 };
        Self {
            error: rate(plan.calls, &CALL_ERROR),
            directory: rate(plan.calls || plan.names, &DIRECTORY_ERROR),
            exchange: rate(plan.calls || plan.names, &EXCHANGE_ERROR),
            interrupted: rate(plan.calls_interrupted, &CALL_INTERRUPTED),
            slow: rate(plan.latency, &CALL_SLOW),
            look_short: rate(plan.short, &LOOK_SHORT),
            close_late: rate(plan.latency, &CLOSE_SLOW),
        }
    }

    fn draw(&self, call: Call, d: &mut Draw) -> u64 {
        let at = d.below(1_000_000) as u32;
        let rate = match call {
            Call::SyncName => self.directory,
            Call::Exchange => self.exchange,
            _ => self.error,
        };
        let kind = if at < self.interrupted {
            KIND_EINTR
        } else if at - self.interrupted < rate {
            let mut kinds = [KIND_EIO, KIND_LACK, KIND_AWAY].into_iter().filter(|k| call.error(*k).is_some());
            let count = kinds.clone().count() as u64;
            kinds.nth(d.below(count) as usize).unwrap_or(0)
        } else {
            return 0;
        };
        if call.error(kind).is_none() {
            return 0;
        }
        kind | if call.may_happen(kind) { HAPPENED * d.below(2) } else { 0 }
    }
}

/// A call that fails.
#[derive(Clone, Copy)]
pub(crate) struct Failed {
    pub(crate) error: Errno,
    /// It took effect all the same.
    pub(crate) happened: bool,
}

impl Inner {
    /// How long `call` about `name` takes before it takes effect, in nanoseconds.
    pub(crate) fn call_late_ns(&self, call: Call, name: &str) -> u64 {
        let rate = self.call_rates.slow;
        if self.is_calm() || rate == 0 && !self.sim.has_given_decisions() {
            return 0;
        }
        let entity: Entity = self.sim.derive("slow-call", text_hash(name) ^ text_hash(call.role()));
        self.sim.name_entity(entity, || {
            format!("{} of {} about {name}", call.role(), self.sim.name_of(self.sim.current()))
        });
        self.sim.fault(entity, &CALL_LATE, rate, |d| d.magnitude(25))
    }

    /// The fault that `call` meets, about the file or directory `name`; none if the plan does not have it, whatever a
    /// decision file says.
    pub(crate) fn call_fault(&self, call: Call, name: &str) -> Option<Failed> {
        let CallRates { error, directory, exchange, interrupted, .. } = self.call_rates;
        if self.is_calm() {
            return None;
        }
        let nth = self.nth_call(call);
        if nth == Some(true) {
            return Some(Failed { error: Errno::EINTR, happened: false });
        }
        if error | directory | exchange | interrupted == 0 && !self.sim.has_given_decisions() {
            return None;
        }
        let entity: Entity = self.sim.derive(call.role(), text_hash(name));
        self.sim.name_entity(entity, || {
            format!("{} of {} about {name}", call.role(), self.sim.name_of(self.sim.current()))
        });
        let value = self.sim.fault(entity, &CALL_FAULT, 1_000_000, |d| self.call_rates.draw(call, d));
        let kind = value & 7;
        let plan = self.plan();
        let of_names = plan.names && matches!(call, Call::Exchange | Call::SyncName);
        let allowed = match kind {
            KIND_EINTR => plan.calls_interrupted,
            KIND_AWAY => plan.calls && !plan.found,
            _ => plan.calls || of_names,
        };
        let spared = kind == KIND_EINTR && nth.is_some();
        let error = call.error(kind).filter(|_| allowed && !spared)?;
        Some(Failed { error, happened: value & HAPPENED != 0 && call.may_happen(kind) })
    }

    pub(crate) fn sync_name(&self, name: &str) -> Result<(), Errno> {
        // A directory is synchronised as a whole.
        let dir = directory(name);
        let failed = self.call_fault(Call::SyncName, dir);
        for (_, file) in self.files.borrow().iter().filter(|(other, _)| directory(other) == dir) {
            match failed {
                None if !file.name_given_up.get() => file.name_durable.set(true),
                // As with a file: reported once, and treated as written from then on.
                Some(f) if f.error != Errno::EINTR && self.sync_errors() != SyncErrors::Retryable => {
                    file.name_given_up.set(!file.name_durable.get());
                }
                _ => {}
            }
        }
        match failed {
            None => self.exchanges.harden(dir),
            Some(f) if f.error != Errno::EINTR && self.sync_errors() != SyncErrors::Retryable => {
                self.exchanges.give_up(dir);
            }
            Some(_) => {}
        }
        failed.map_or(Ok(()), |f| Err(f.error))
    }

    /// Exchanges what two names stand for, in one step.
    pub(crate) fn exchange(&self, one: &str, other: &str) -> Result<(), Errno> {
        let failed = self.call_fault(Call::Exchange, one);
        if failed.is_none_or(|f| f.happened) {
            swap(&mut self.files.borrow_mut(), one, other)?;
            self.exchanges.push(one, other);
        }
        failed.map_or(Ok(()), |f| Err(f.error))
    }

    pub(crate) fn remove(&self, name: &str) -> Result<(), Errno> {
        let failed = self.call_fault(Call::Remove, name);
        if failed.is_none_or(|f| f.happened) {
            let removed = self.files.borrow_mut().remove(name);
            removed.ok_or(Errno::ENOENT)?;
        }
        failed.map_or(Ok(()), |f| Err(f.error))
    }

    pub(crate) fn lock(&self, open: &OpenFile, kind: LockKind) -> Result<(), Errno> {
        if let Some(failed) = self.call_fault(Call::Lock, &open.file.name) {
            return Err(failed.error);
        }
        self.close_due();
        let mut locks = open.file.locks.borrow_mut();
        let conflict =
            |l: &(u64, LockKind)| l.0 != open.id && (kind != LockKind::Shared || l.1 != LockKind::Shared);
        if locks.iter().any(conflict) {
            return Err(Errno::EAGAIN);
        }
        locks.retain(|l| l.0 != open.id);
        locks.push((open.id, kind));
        Ok(())
    }

    pub(crate) fn set_size(&self, open: &OpenFile, size_bytes: u64) -> Result<(), Errno> {
        let failed = self.call_fault(Call::SetSize, &open.file.name);
        if failed.is_none_or(|f| f.happened) {
            open.file.inode.borrow_mut().resize(size_bytes);
        }
        failed.map_or(Ok(()), |f| Err(f.error))
    }

    /// Synchronises the file system of `open`, which reports whether it lost anything before; returns the answer, and
    /// how long that takes in nanoseconds. If it fails, the answer is lost: no later caller gets it.
    pub(crate) fn ask_file_system(&self, open: &OpenFile) -> (Result<bool, Errno>, u64) {
        let failed = self.call_fault(Call::SyncAll, "");
        let lost = self.lost(open);
        (failed.map_or(Ok(lost), |f| Err(f.error)), self.sync_takes_ns(Call::SyncAll.role()))
    }

    /// How many extents of `max` a look at `open` reports.
    pub(crate) fn extents_max(&self, open: &OpenFile, max: usize) -> usize {
        let rate = self.call_rates.look_short;
        if max <= 1 || self.is_calm() || rate == 0 && !self.sim.has_given_decisions() {
            return max.max(1);
        }
        let name = &open.file.name;
        let entity: Entity = self.sim.derive("short-look", text_hash(name));
        self.sim
            .name_entity(entity, || format!("look of {} at {name}", self.sim.name_of(self.sim.current())));
        let cut = self.sim.fault(entity, &EXTENTS_CUT, rate, |d| 1 + d.below(3));
        if cut == 0 || !self.plan().short { max } else { max.min(cut as usize) }
    }

    /// A call that only queries a file.
    pub(crate) fn look(&self, call: Call, open: &OpenFile) -> Result<(), Errno> {
        self.call_fault(call, &open.file.name).map_or(Ok(()), |f| Err(f.error))
    }
}

/// A [`CALL_FAULT`] value in words.
pub fn describe_call_fault(value: u64) -> String {
    let how = match value & 7 {
        KIND_EINTR => "is interrupted (EINTR)",
        KIND_EIO => "fails with EIO",
        KIND_LACK => "fails for lack of a descriptor, space or locks (EMFILE, ENOSPC, ENOLCK), or with EBUSY",
        KIND_AWAY => "does not find the file for a moment (ENOENT)",
        _ => "meets no fault",
    };
    format!("{how}{}", if value & HAPPENED != 0 { ", although it has happened" } else { "" })
}
