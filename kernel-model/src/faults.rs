//! The faults of the host's storage: those that exist, and those that must not be injected.
//!
//! | fault | what the caller sees | what happens to the bytes |
//! |---|---|---|
//! | error | EIO | for a write: nothing, everything, or a part landed; zeros that keep their space drop dirty pages
//! first |
//! | no space | ENOSPC | nothing landed |
//! | pages dropped | ENOSPC from zeros that keep their space | the range's dirty pages are gone, as on ext4 |
//! | short | fewer bytes than asked for, no error | a prefix of whole sectors landed |
//! | nothing read | 0 bytes of a buffered read before the end of the file, no error | |
//! | transient | EAGAIN | nothing landed |
//! | slow, stuck | nothing for milliseconds, or for ten seconds | as usual |
//! | bad sectors | EIO, or less than asked for, of what reads them, until they are written | nothing: see `storage/bad.rs`
//! |
//! | sync error | EIO from fdatasync, or ENOMEM | see [`SyncErrors`] |
//! | sync interrupted | EINTR from fdatasync | nothing is lost: all of it stays pending |
//! | power cut | everything ends | any subset of the unsynchronised sectors remains; a prefix of the size changes |
//!
//! Never injected here: a medium that returns other bytes than were written, and a synchronisation that lies. (The
//! lying drive exists as a canary, [`crate::StorageConfig::flush_lies`]: with it on, the checkers must report a loss.)

use sim::{Draw, FaultKind, Label, Sim};
use tap_host::{Errno, ZeroMode};

/// Which fault an I/O meets: kind in the low 3 bits, detail in the next 8.
pub static IO_FAULT: Label = Label::packed("io-fault", "the I/O meets fault {}", &[3, 8]);
/// How long an I/O takes beyond the minimum.
pub static IO_LATE: Label = Label::new("io-late", "the I/O takes {} ns longer");
/// Which sectors of a page become unreadable: a mask, whether direct reads end before them, and after how many more
/// operations.
pub static BAD_SECTORS: Label =
    Label::packed("bad-sectors", "sectors of the page become unreadable ({})", &[8, 1, 15]);
/// Which sectors of a pending write a power cut takes.
pub static LOST: Label = Label::new("lost", "the power cut takes sectors {} of the page (mask)");
/// How many of the pending size changes a power cut takes.
pub static SIZES_LOST: Label = Label::new("sizes-lost", "the power cut takes the last {} size changes");
/// A run of sectors in which a power cut takes everything pending: its length, and its first sector.
pub static RUN_LOST: Label =
    Label::packed("run-lost", "the power cut takes all that is pending in a run of sectors ({})", &[24, 40]);
/// How many sectors of the first lost growth remain all the same.
pub static SIZE_PARTLY: Label =
    Label::new("size-partly", "the power cut leaves {} sectors of the growth that it takes first");
/// Which sectors of a write a failed synchronisation loses.
pub static SYNC_LOST: Label =
    Label::new("sync-lost", "the failed synchronisation loses sectors {} of the page (mask)");
/// Whether a new name is lost in a power cut.
pub static NAME_LOST: Label = Label::new("name-lost", "the power cut takes the file's name");

/// The labels of this crate, for registration.
pub static LABELS: &[&Label] = &[
    &IO_FAULT,
    &IO_LATE,
    &BAD_SECTORS,
    &LOST,
    &SIZES_LOST,
    &RUN_LOST,
    &SIZE_PARTLY,
    &SYNC_LOST,
    &NAME_LOST,
    &crate::storage::EXCHANGES_LOST,
    &crate::calls::CALL_FAULT,
    &crate::calls::CALL_LATE,
    &crate::calls::CLOSE_LATE,
    &crate::calls::EXTENTS_CUT,
    &crate::nbd_device::DEVICE_CUT,
    &crate::sockets::SEND_CUT,
    &crate::sockets::ARRIVE_LATE,
    &crate::sockets::RECV_CUT,
    &crate::sockets::SOCKET_BUFFER,
    &crate::sockets::PEER_RESET,
    crate::blktap::LABELS[0],
    crate::blktap::LABELS[1],
];

static EIO: FaultKind = FaultKind { name: "io-error", max_ppm: 60_000 };
static ENOSPC: FaultKind = FaultKind { name: "no-space", max_ppm: 60_000 };
static SHORT: FaultKind = FaultKind { name: "short-transfer", max_ppm: 200_000 };
static NOTHING: FaultKind = FaultKind { name: "nothing-read", max_ppm: 100_000 };
static TRANSIENT: FaultKind = FaultKind { name: "transient-error", max_ppm: 100_000 };
static SLOW: FaultKind = FaultKind { name: "slow-io", max_ppm: 100_000 };
static STUCK: FaultKind = FaultKind { name: "stuck-io", max_ppm: 4_000 };
static SYNC: FaultKind = FaultKind { name: "sync-error", max_ppm: 100_000 };
static SYNC_INTERRUPTED: FaultKind = FaultKind { name: "sync-interrupted", max_ppm: 100_000 };
static DROPS: FaultKind = FaultKind { name: "pages-dropped", max_ppm: 900_000 };
static BAD: FaultKind = FaultKind { name: "bad-sectors", max_ppm: 60_000 };
static JITTER: FaultKind = FaultKind { name: "io-jitter", max_ppm: 500_000 };

/// What a failed fdatasync leaves. A direct file has no pages that could be forgotten, but its drive has a cache: a
/// drive that failed a flush may have lost the content of its cache (it was reset, or went away and came back), and its
/// next flush succeeds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SyncErrors {
    /// Everything stays pending; a later one may succeed.
    #[default]
    Retryable,
    /// As ext4 and XFS: pages are marked clean, reads still show them, the next one succeeds; what had not reached the
    /// medium is lost at the next power cut.
    Linux,
    /// As btrfs: reads show the old bytes again.
    Reverts,
    /// It fails forever.
    Latched,
}

/// Which kinds of fault a world may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultPlan {
    /// EIO on reads and writes.
    pub errors: bool,
    /// ENOSPC on writes.
    pub no_space: bool,
    /// Short transfers; for buffered reads also empty ones before the end of the file, as returned by non-waiting reads
    /// on Linux 5.9 and 5.10.
    pub short: bool,
    /// Sectors that cannot be read until they are written: see `storage/bad.rs`.
    pub bad_sectors: bool,
    /// EAGAIN.
    pub transient: bool,
    /// Slow I/O, and jitter that makes I/Os overtake each other.
    pub latency: bool,
    /// I/O that is stuck for ten seconds.
    pub stuck: bool,
    /// fdatasync errors.
    pub sync_errors: bool,
    /// fdatasync that ends with EINTR, after which a retry is as good as the first attempt; if `sync_errors` is set,
    /// equally often with ENOMEM, which counts as a sync error.
    pub sync_interrupted: bool,
    /// Errors of calls other than transfers: see [`crate::calls`].
    pub calls: bool,
    /// Files are found where they are: none is away for a moment because somebody puts another in its place.
    pub found: bool,
    /// Errors of those that exchange names and synchronise directories only.
    pub names: bool,
    /// EINTR of calls.
    pub calls_interrupted: bool,
}

impl FaultPlan {
    /// Latency only.
    pub const LATENCY: Self = Self {
        errors: false,
        no_space: false,
        short: false,
        bad_sectors: false,
        transient: false,
        latency: true,
        stuck: true,
        sync_errors: false,
        sync_interrupted: false,
        calls: false,
        found: false,
        names: false,
        calls_interrupted: false,
    };
    /// Transient faults only: nothing fails for good.
    pub const PASSING: Self = Self {
        short: true,
        transient: true,
        sync_interrupted: true,
        calls_interrupted: true,
        ..Self::LATENCY
    };
    /// Everything.
    pub const ALL: Self = Self {
        errors: true,
        no_space: true,
        short: true,
        bad_sectors: true,
        transient: true,
        latency: true,
        stuck: true,
        sync_errors: true,
        sync_interrupted: true,
        calls: true,
        found: false,
        names: true,
        calls_interrupted: true,
    };
}

/// What an I/O does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum IoOp {
    Read,
    Write,
    Zero(ZeroMode),
    Sync,
}

impl IoOp {
    /// How it is called, also in keys of decisions.
    pub(crate) fn name(self) -> &'static str {
        match self {
            IoOp::Read => "read",
            IoOp::Write => "write",
            IoOp::Zero(_) => "zero",
            IoOp::Sync => "sync",
        }
    }

    /// Whether it may need space that the file does not have yet. A hole needs none.
    pub(crate) fn takes_space(self) -> bool {
        matches!(self, IoOp::Write | IoOp::Zero(ZeroMode::Keep))
    }

    /// Whether it changes bytes of the file.
    pub(crate) fn changes(self) -> bool {
        matches!(self, IoOp::Write | IoOp::Zero(_))
    }
}

/// The fault that an I/O meets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    None,
    /// The error, and how much of a write lands: 0 nothing, 255 everything.
    Error(Errno, u8),
    /// No space, detected after the dirty pages of the range's whole blocks were dropped: what had been written back
    /// shows. The pages are dropped when the operation begins (`true`), or when it ends.
    DropsPages(bool),
    /// How much of the transfer happens: 1..=254 of 255.
    Short(u8),
    /// A buffered read returns nothing.
    Nothing,
    /// It takes ten seconds.
    Stuck,
}

const KIND_EIO: u64 = 1;
const KIND_ENOSPC: u64 = 2;
const KIND_SHORT: u64 = 3;
const KIND_TRANSIENT: u64 = 4;
const KIND_STUCK: u64 = 5;
const KIND_SYNC: u64 = 6;
const KIND_DROPS: u64 = 7;
/// For reads.
const KIND_NOTHING: u64 = KIND_DROPS;

/// The rates of one seed, looked up once.
pub(crate) struct Rates {
    eio: u32,
    enospc: u32,
    short: u32,
    nothing: u32,
    transient: u32,
    stuck: u32,
    sync: u32,
    interrupted: u32,
    drops: u32,
    slow: u32,
    jitter: u32,
    /// For each page of a file.
    pub(crate) bad_sectors: u32,
}

impl Rates {
    pub(crate) fn new(sim: &Sim, plan: FaultPlan) -> Self {
        let swarm = sim.swarm();
        let rate = |on: bool, kind| if on { swarm.rate_ppm(kind) } else { 0 };
        Self {
            eio: rate(plan.errors, &EIO),
            enospc: rate(plan.no_space, &ENOSPC),
            short: rate(plan.short, &SHORT),
            nothing: rate(plan.short, &NOTHING),
            transient: rate(plan.transient, &TRANSIENT),
            stuck: rate(plan.stuck, &STUCK),
            sync: rate(plan.sync_errors, &SYNC),
            interrupted: rate(plan.sync_interrupted, &SYNC_INTERRUPTED),
            drops: rate(plan.no_space, &DROPS),
            slow: rate(plan.latency, &SLOW),
            jitter: rate(plan.latency, &JITTER),
            bad_sectors: rate(plan.bad_sectors, &BAD),
        }
    }

    /// The value of the [`IO_FAULT`] decision.
    pub(crate) fn draw_fault(&self, op: IoOp, d: &mut Draw) -> u64 {
        let table: [(u64, u32); 5] = match op {
            IoOp::Read => [
                (KIND_EIO, self.eio),
                (KIND_SHORT, self.short),
                (KIND_TRANSIENT, self.transient),
                (KIND_STUCK, self.stuck),
                (KIND_NOTHING, self.nothing),
            ],
            IoOp::Write => [
                (KIND_EIO, self.eio),
                (KIND_SHORT, self.short),
                (KIND_TRANSIENT, self.transient),
                (KIND_STUCK, self.stuck),
                (KIND_ENOSPC, self.enospc),
            ],
            IoOp::Zero(_) => [
                (KIND_EIO, self.eio),
                (KIND_TRANSIENT, self.transient),
                (KIND_STUCK, self.stuck),
                (KIND_ENOSPC, if op.takes_space() { self.enospc } else { 0 }),
                (KIND_DROPS, if op.takes_space() { self.drops } else { 0 }),
            ],
            IoOp::Sync => [
                (KIND_SYNC, self.sync),
                (KIND_STUCK, self.stuck),
                (KIND_TRANSIENT, self.interrupted),
                (0, 0),
                (0, 0),
            ],
        };
        let mut at = d.below(1_000_000);
        for (kind, ppm) in table {
            if at < u64::from(ppm) {
                return kind | draw_detail(op, kind, d) << 3;
            }
            at -= u64::from(ppm);
        }
        0
    }

    /// Whether `op` can meet any fault.
    pub(crate) fn any(&self, op: IoOp) -> bool {
        match op {
            IoOp::Read => self.eio | self.short | self.nothing | self.transient | self.stuck != 0,
            IoOp::Write => self.eio | self.short | self.transient | self.stuck | self.enospc != 0,
            IoOp::Zero(_) => self.eio | self.transient | self.stuck | self.enospc | self.drops != 0,
            IoOp::Sync => self.sync | self.stuck | self.interrupted != 0,
        }
    }

    /// The value of the [`IO_LATE`] decision.
    pub(crate) fn draw_late(&self, d: &mut Draw) -> u64 {
        if d.ppm(self.slow) {
            1_000_000 + d.below(20_000_000)
        } else if d.ppm(self.jitter) {
            d.magnitude(15)
        } else {
            0
        }
    }

    pub(crate) fn any_late(&self) -> bool {
        self.slow | self.jitter != 0
    }
}

/// How much of an operation happens, if that applies.
fn draw_detail(op: IoOp, kind: u64, d: &mut Draw) -> u64 {
    match (op, kind) {
        // EINTR or ENOMEM.
        (IoOp::Sync, KIND_TRANSIENT) => return d.below(2),
        // The pages are dropped when it ends, or when it begins.
        (IoOp::Zero(_), KIND_DROPS) => return d.below(2),
        (IoOp::Write | IoOp::Zero(_), KIND_EIO) | (_, KIND_SHORT) => {}
        _ => return 0,
    }
    // Nothing, everything and something in between are equally likely.
    match d.below(3) {
        0 => 0,
        1 => 255,
        _ => d.below(256),
    }
}

/// The value of the [`IO_FAULT`] decision for zeros on a full file system.
pub(crate) fn draw_full(d: &mut Draw, has_space: bool) -> u64 {
    if has_space && d.below(2) == 0 { 0 } else { KIND_DROPS | d.below(2) << 3 }
}

/// The fault of such a value.
pub(crate) fn full(value: u64, has_space: bool) -> Fault {
    match decode_any(value) {
        Fault::DropsPages(early) => Fault::DropsPages(early),
        _ if has_space => Fault::None,
        _ => Fault::DropsPages(false),
    }
}

/// The fault of an [`IO_FAULT`] value; none if the plan does not have it, whatever a decision file says.
pub(crate) fn decode(value: u64, plan: FaultPlan, op: IoOp) -> Fault {
    let fault = match decode_any(value) {
        Fault::Error(Errno::EAGAIN, detail) if op == IoOp::Sync => {
            Fault::Error(if detail == 0 || !plan.sync_errors { Errno::EINTR } else { Errno::ENOMEM }, 0)
        }
        Fault::DropsPages(_) if op == IoOp::Read => Fault::Nothing,
        fault => fault,
    };
    let allowed = match fault {
        Fault::None => true,
        Fault::Error(Errno::EIO, _) if value & 7 == KIND_SYNC => plan.sync_errors && op == IoOp::Sync,
        Fault::Error(Errno::EIO, _) => plan.errors && op != IoOp::Sync,
        Fault::Error(Errno::ENOSPC, _) => plan.no_space && op.takes_space(),
        Fault::DropsPages(_) => plan.no_space && op == IoOp::Zero(ZeroMode::Keep),
        Fault::Error(..) if op == IoOp::Sync => plan.sync_interrupted,
        Fault::Error(..) => plan.transient,
        Fault::Short(_) => plan.short && matches!(op, IoOp::Read | IoOp::Write),
        Fault::Nothing => plan.short,
        Fault::Stuck => plan.latency,
    };
    if allowed { fault } else { Fault::None }
}

fn decode_any(value: u64) -> Fault {
    let detail = (value >> 3) as u8;
    match value & 7 {
        KIND_EIO => Fault::Error(Errno::EIO, detail),
        KIND_ENOSPC => Fault::Error(Errno::ENOSPC, 0),
        KIND_SHORT => Fault::Short(detail.clamp(1, 254)),
        KIND_TRANSIENT => Fault::Error(Errno::EAGAIN, detail),
        KIND_STUCK => Fault::Stuck,
        KIND_SYNC => Fault::Error(Errno::EIO, 0),
        KIND_DROPS => Fault::DropsPages(detail != 0),
        _ => Fault::None,
    }
}

/// An [`IO_FAULT`] value in words.
pub fn describe_fault(value: u64) -> String {
    match decode_any(value) {
        Fault::None => "meets no fault".into(),
        // What a failed synchronisation leaves is a setting of the world, not part of the value.
        Fault::Error(Errno::EIO, _) if value & 7 == KIND_SYNC => "fails with EIO".into(),
        Fault::Error(Errno::EIO, 0) => "fails with EIO and has no effect".into(),
        Fault::Error(Errno::EIO, 255) => "fails with EIO although all of it took effect".into(),
        Fault::Error(Errno::EIO, part) => format!("fails with EIO after {part}/255 of it took effect"),
        Fault::Error(Errno::EAGAIN, _) => "fails for now (EAGAIN; a sync with EINTR or ENOMEM)".into(),
        Fault::Error(e, _) => format!("fails with {e:?}"),
        Fault::DropsPages(early) => format!(
            "returns nothing (a read), or drops the dirty pages of its range when it {}, and fails with ENOSPC",
            if early { "begins" } else { "ends" }
        ),
        Fault::Nothing => "returns nothing".into(),
        Fault::Short(part) => format!("transfers only {part}/255 of its bytes"),
        Fault::Stuck => "is stuck for ten seconds".into(),
    }
}
