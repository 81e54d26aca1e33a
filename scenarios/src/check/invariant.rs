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
    /// Disks that grow.
    G12,
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
    /// Every request ends.
    L1,
    /// What a front end is told about its disk.
    F1,
    /// Grants, channels, pages and requests are released.
    K1,
    /// Metadata of images.
    Q2,
    /// Compressed clusters.
    Q3,
    /// Order of writes of metadata.
    Q5,
    /// Checksums in images.
    Q6,
    /// A parent never changes.
    C1,
    /// Files in use are locked.
    C2,
    /// A snapshot happens as a whole.
    C3,
    /// Merges of images.
    C4,
    /// The back end refuses invalid requests.
    H1,
    /// A guest cannot disturb another.
    H2,
    /// Connections that break.
    N1,
    /// What an NBD server says about its disk.
    N2,
    /// What an NBD client asks of a server.
    N3,
    /// What an NBD client refuses.
    N4,
    /// Pauses and closes of a disk.
    D1,
    /// What layers ask of each other.
    D2,
    /// The list of a program's disks.
    D3,
    /// What a tool has created.
    I1,
    /// What a tool reports.
    I2,
    /// The shipped check agrees with the walker.
    V1,
    /// Work per turn, and operations in flight.
    M1,
    /// Work for the ordering of requests.
    M2,
    /// Memory.
    M3,
    /// Cost of discards.
    M4,
    /// How long small requests wait for large ones.
    M5,
    /// File operations of a read.
    M6,
    /// No circle of references.
    M7,
    /// Promised space is available.
    S1,
    /// Released space is free.
    S2,
    /// Turns of tasks are short.
    T1,
    /// Answers to those who control disks.
    U1,
    /// I/O priorities of disks.
    U2,
    /// No panic.
    A1,
}

impl Invariant {
    /// All of them.
    pub const ALL: [Invariant; 47] = [
        Self::G1,
        Self::G7,
        Self::G9,
        Self::G10,
        Self::G11,
        Self::G12,
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
        Self::Q6,
        Self::C1,
        Self::C2,
        Self::C3,
        Self::C4,
        Self::H1,
        Self::H2,
        Self::N1,
        Self::N2,
        Self::N3,
        Self::N4,
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
        Self::M6,
        Self::M7,
        Self::S1,
        Self::S2,
        Self::T1,
        Self::U1,
        Self::U2,
        Self::A1,
    ];

    /// The invariant as a sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::G1 => "a read returns, for every sector, the newest answered write or a concurrent one",
            Self::G7 => {
                "after a power cut every sector holds one version that is not older than a flushed one"
            }
            Self::G9 => "what was once read after recovery stays, even after another crash",
            Self::G10 => "a sector holds only what was written to that sector",
            Self::G11 => "after a crash the image opens, and every sector can be read and written",
            Self::G12 => {
                "a disk that grows has its old size or the new one, keeps its bytes, and shows zeros in the new part"
            }
            Self::G13 => "errors and crashes leak no more than a few clusters each",
            Self::E2 => "a flush that succeeds covers everything that an earlier failed one did not",
            Self::E4 => "a request fails only where the storage below it failed",
            Self::P1 => "every answered write is readable after tapdisk died and was restarted",
            Self::X1 => "every request is answered exactly once",
            Self::L1 => "every request ends once faults have ended",
            Self::F1 => "what a front end reads about its disk is true",
            Self::K1 => "every grant, event channel, buffer and request is released",
            Self::Q2 => {
                "every table and cluster of an image lies in the file, aligned, and belongs to one owner"
            }
            Self::Q3 => "every compressed cluster lies in the file and inflates to a whole cluster",
            Self::Q5 => "an L2 table is on the medium before the L1 entry that names it",
            Self::Q6 => "a checksum in an image is right or cleared",
            Self::C1 => "a backing file never changes",
            Self::C2 => "an image in use is locked for others, and each file below it for writers",
            Self::C4 => {
                "a merge changes nothing that the images above its base show, and what has bytes of both is marked"
            }
            Self::C3 => "a snapshot leaves the old chain or the new one, whatever fails",
            Self::H1 => "malformed requests are refused, and a ring that cannot be trusted is closed",
            Self::H2 => "a guest that misbehaves does not disturb another",
            Self::N1 => "an NBD connection breaks only where one of its ends dies or misbehaves",
            Self::N2 => "every answer of an NBD server follows the protocol and is true of its disk",
            Self::N3 => "an NBD client asks only for what the server offers and its caller needs",
            Self::N4 => "an NBD client takes an export exactly if it can use it",
            Self::D1 => "a paused disk does nothing, and a closed one accepts nothing",
            Self::D2 => {
                "a layer receives only requests that its contract permits, and is closed once, when idle"
            }
            Self::D3 => "a program's list of disks has no closed disk, and a watcher misses no change",
            Self::I1 => "what a tool reports as created is there, even after a power cut",
            Self::I2 => "what a tool says about an image is true",
            Self::V1 => "the shipped check and the independent walker agree on every image",
            Self::M1 => "a turn does, and a request has in flight, no more than a fixed amount",
            Self::M2 => "ordering a request costs at most one comparison with each request in flight",
            Self::M3 => "a closed disk holds no memory of the budget",
            Self::M4 => {
                "discards and fast zeros write almost nothing, and a device is not asked again for what it refused"
            }
            Self::M5 => "a small request does not wait for unrelated large ones",
            Self::M6 => "contiguous clusters are read in one operation, and a cached table is not read again",
            Self::M7 => "what a run allocated is freed with its world: no circle of references keeps it",
            Self::S1 => {
                "a write needs no space where data, or zeros that keep their space, were written before"
            }
            Self::S2 => "zeros that release their space leave a hole, where the file can have one",
            Self::T1 => "a task does a bounded amount of work before other tasks run",
            Self::U1 => "a control request that is done is done, and one that is refused changes nothing",
            Self::U2 => "every operation on a file of a disk has the I/O priority that was set for the disk",
            Self::A1 => "no input makes the stack panic",
        }
    }
}

impl std::fmt::Display for Invariant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}
