//! What differs between the rings that are served: who is at the other end, how it is woken, and where data is.

use tap_abi::blkif::{BlkifOp, BlkifRequest, ENTRY_BYTES, Malformed, Segment};
use tap_host::{Errno, IoKind, SectorRange, SharedPage};

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    /// Also of data.
    Flush,
    Discard,
}

impl From<Kind> for IoKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Read => Self::Read,
            Kind::Write => Self::Write,
            Kind::Flush => Self::Flush,
            Kind::Discard => Self::Discard,
        }
    }
}

/// A request that obeys the protocol of its ring.
pub(crate) trait RingRequest: Copy + 'static {
    /// What to do.
    fn kind(&self) -> Kind;
    /// The operation as the ring has it.
    fn op(&self) -> u8;
    /// The other end's identifier.
    fn id(&self) -> u64;
    /// First sector; meaningless without sectors.
    fn sector(&self) -> u64;
    /// Number of sectors.
    fn count(&self) -> u32;
    /// Where the data is, if it has data.
    fn segments(&self) -> &[Segment];

    /// The sectors it covers; none for a flush without data.
    fn range(&self) -> SectorRange {
        match self.count() {
            0 => SectorRange::default(),
            count => SectorRange::new(self.sector(), count),
        }
    }
}

impl RingRequest for BlkifRequest {
    fn kind(&self) -> Kind {
        match self.op {
            BlkifOp::Read => Kind::Read,
            BlkifOp::Write => Kind::Write,
            BlkifOp::Flush => Kind::Flush,
        }
    }
    fn op(&self) -> u8 {
        self.op as u8
    }
    fn id(&self) -> u64 {
        self.id
    }
    fn sector(&self) -> u64 {
        self.sector
    }
    fn count(&self) -> u32 {
        BlkifRequest::count(self)
    }
    fn segments(&self) -> &[Segment] {
        BlkifRequest::segments(self)
    }
}

/// Why an entry of a ring is no request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bad {
    /// It is answered with an error.
    Answer(Malformed),
    /// It cannot be answered: the ring has to end.
    Refuse(&'static str),
}

/// The other end of a ring.
pub(crate) trait Peer<H>: 'static {
    /// The ring's page.
    type Page: SharedPage;
    /// Its requests.
    type Request: RingRequest;
    /// Whether the identifier of a request is the number of its slot, which the other end chooses.
    const ID_IS_SLOT: bool;

    /// The ring's page.
    fn page(&self) -> &Self::Page;

    /// Parses a private copy of an entry.
    fn parse(&self, entry: &[u8; ENTRY_BYTES]) -> Result<Self::Request, Bad>;

    /// Completes when the other end has called since the last completion. Calls are levels, not counts.
    ///
    /// # Errors
    /// `ESHUTDOWN` if no call will ever be heard again.
    fn wait(&self) -> impl Future<Output = Result<(), Errno>>;

    /// Asks to be called at the request of index `next`, once all before it were taken. `false` if it is already there.
    fn ask(&self, host: &H, next: u32) -> bool;

    /// Whether to call the other end, whose responses `old..new` were just stored.
    fn is_due(&self, host: &H, old: u32, new: u32) -> bool;

    /// Calls the other end.
    fn call(&self);

    /// Copies the data of `request` into `private`, which is as long.
    ///
    /// # Errors
    /// The host's, if it cannot be reached.
    fn copy_in(&self, host: &H, request: &Self::Request, private: &mut [u8]) -> Result<(), Errno>;

    /// Copies `private` to where the data of `request` belongs.
    ///
    /// # Errors
    /// The host's, if it cannot be reached.
    fn copy_out(&self, host: &H, request: &Self::Request, private: &[u8]) -> Result<(), Errno>;
}
