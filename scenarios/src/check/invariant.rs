//! The invariants by name.

/// Something that must hold. Failures of one invariant are one class for shrinking.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Invariant {
    /// Reads of a living disk.
    G1,
    /// After a power cut.
    G7,
    /// Stability after recovery.
    G9,
    /// Reads and writes stay within their range.
    G10,
    /// The image opens and reads after a crash.
    G11,
    /// Leaks of clusters.
    G13,
    /// A failed flush is not forgotten.
    E2,
    /// Errors only where something failed.
    E4,
    /// Death of tapdisk alone.
    P1,
    /// Exactly one response.
    X1,
    /// Everything ends.
    L1,
    /// What a front end is told.
    F1,
    /// Grants, channels, pages, requests are given back.
    K1,
    /// Metadata of images.
    Q2,
    /// Compressed clusters.
    Q3,
    /// Order of writes of metadata.
    Q5,
    /// A parent never changes.
    C1,
    /// Files in use are locked.
    C2,
    /// The back end refuses what it must refuse.
    H1,
    /// A guest may not hang or break another.
    H2,
    /// Connections that break.
    N1,
    /// What an NBD server says of its disk.
    N2,
    /// What an NBD client asks for.
    N3,
    /// Pauses and closes of a disk.
    D1,
    /// What layers ask of each other.
    D2,
    /// The list of a program's disks.
    D3,
    /// What a tool has made.
    I1,
    /// What a tool says.
    I2,
    /// The shipped check agrees with the walker.
    V1,
    /// Work of a turn, operations at once.
    M1,
    /// Work of the order of requests.
    M2,
    /// Memory.
    M3,
    /// What a discard costs.
    M4,
    /// How long small requests wait for large ones.
    M5,
    /// Space that is promised is there.
    S1,
    /// Space that is given back is gone.
    S2,
    /// Turns of tasks are short.
    T1,
    /// No panic.
    A1,
}

impl Invariant {
    /// All of them.
    pub const ALL: [Invariant; 38] = [
        Self::G1,
        Self::G7,
        Self::G9,
        Self::G10,
        Self::G11,
        Self::G13,
        Self::E2,
        Self::E4,
        Self::P1,
        Self::X1,
        Self::L1,
        Self::F1,
        Self::K1,
        Self::Q2,
        Self::Q3,
        Self::Q5,
        Self::C1,
        Self::C2,
        Self::H1,
        Self::H2,
        Self::N1,
        Self::N2,
        Self::N3,
        Self::D1,
        Self::D2,
        Self::D3,
        Self::I1,
        Self::I2,
        Self::V1,
        Self::M1,
        Self::M2,
        Self::M3,
        Self::M4,
        Self::M5,
        Self::S1,
        Self::S2,
        Self::T1,
        Self::A1,
    ];

    /// The invariant as a sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::G1 => {
                "a read returns, for every sector, the newest answered write or one that ran beside it"
            }
            Self::G7 => {
                "after a power cut every sector holds one version that is not older than a flushed one"
            }
            Self::G9 => "what was once read after recovery stays, also through another crash",
            Self::G10 => "a sector holds only what was written to that sector",
            Self::G11 => "after a crash the image opens, and every sector can be read and written",
            Self::G13 => "errors and crashes leak no more than a few clusters each",
            Self::E2 => "a flush that succeeds covers everything that an earlier failed one did not",
            Self::E4 => "a request fails only where the storage below it failed",
            Self::P1 => "every answered write is readable after tapdisk died and was restarted",
            Self::X1 => "every request is answered exactly once",
            Self::L1 => "every request ends once faults have ended",
            Self::F1 => "a front end is told the truth about its disk",
            Self::K1 => "every grant, event channel, buffer and request is given back",
            Self::Q2 => {
                "every table and cluster of an image lies in the file, aligned, and belongs to one owner"
            }
            Self::Q3 => "every compressed cluster lies in the file and inflates to a whole cluster",
            Self::Q5 => "an L2 table is on the medium before the L1 entry that names it",
            Self::C1 => "a backing file never changes",
            Self::C2 => "an image in use is locked against everybody, and each file below it against writers",
            Self::H1 => "malformed requests are refused, and the ring is closed where it cannot be trusted",
            Self::H2 => "a guest that misbehaves does not disturb another",
            Self::N1 => "an NBD connection breaks only where one of its ends dies or misbehaves",
            Self::N2 => "every answer of an NBD server keeps to the protocol and is true of its disk",
            Self::N3 => {
                "an NBD client asks a server for what it offers and what its caller wants, and for nothing else"
            }
            Self::D1 => "a paused disk does nothing, and a closed one takes nothing",
            Self::D2 => {
                "a layer of a disk is asked only for what it may be asked for, and closed once, when it rests"
            }
            Self::D3 => {
                "the list of a program's disks has no closed one, and whoever watches it misses no change"
            }
            Self::I1 => "what a tool says it has made is there, also after a power cut",
            Self::I2 => "what a tool says of an image is true",
            Self::V1 => "the shipped check and the independent walker agree on every image",
            Self::M1 => "one turn does, and one request has running, no more than a fixed amount",
            Self::M2 => "the order of requests costs no more than each of them once for each in flight",
            Self::M3 => "a disk that is closed holds no memory of the budget",
            Self::M4 => {
                "discards and fast zeros write next to nothing, and a discard asks a device once for what it cannot do"
            }
            Self::M5 => "a small request waits for no large one that has nothing to do with it",
            Self::S1 => "a write to what was written, or made zeros that keep their space, needs no space",
            Self::S2 => "zeros that give their space back leave a hole, where the file can have one",
            Self::T1 => "a task does a bounded amount of work before others have their turn",
            Self::A1 => "no input makes the stack panic",
        }
    }
}

impl std::fmt::Display for Invariant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}
