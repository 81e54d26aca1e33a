//! Seeded bugs and marks: how the testbed proves that it looks where it should.

macro_rules! list {
    ($(#[$doc:meta])* $name:ident { $($(#[$item_doc:meta])* $item:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum $name { $($(#[$item_doc])* #[doc = $text] $item,)* }
        impl $name {
            /// All of them, in order of declaration.
            pub const ALL: &'static [$name] = &[$($name::$item,)*];
            /// Its name in kebab case, as used on command lines.
            pub fn name(self) -> String {
                let mut out = String::new();
                for c in format!("{self:?}").chars() {
                    if c.is_ascii_uppercase() && !out.is_empty() { out.push('-'); }
                    out.push(c.to_ascii_lowercase());
                }
                out
            }
            /// One sentence.
            pub fn sentence(self) -> &'static str {
                match self { $($name::$item => $text,)* }
            }
        }
    };
}

list! {
    /// A mistake that a simulated host can switch on. A site is at most three lines that omit or move a step; it is
    /// there to be found, and proves that the invariant it breaks is checked.
    Bug {
        L1BeforeL2 = "the L1 entry is written before the new L2 table is durable",
        FailedL2Cached = "an L2 entry whose write failed stays in the cache",
        FrontierFromLastL1 = "the allocator frontier at open is taken from the last L1 entry",
        SizeBehind = "an image whose references point past the end of its file after a crash is served as it is",
        ClusterLeaked = "each allocation takes one cluster more than it uses",
        MappingInMemory = "a new mapping is kept in memory and not written",
        OverlayDropsRest = "a partial write to a new overlay cluster drops the rest of the cluster",
        DataAfterMapping = "a cluster is mapped before its data is durable although losing the data exposes old bytes",
        FailedClusterReused = "a cluster whose L2 write failed is handed to another owner",
        DoubleAllocation = "two writes to one unallocated cluster both allocate it",
        CompressedInPlace = "a write to a compressed cluster goes into the compressed bytes",
        FlushPassesZeros = "a flush does not wait for zeros that are in flight and may still fail",
        FlushBesideFailedZeros = "a flush that ran while zeros failed counts as a success",
        HolesTrusted = "a hole that could not be made is taken to have left its file as it was",
        FailedZerosLeft = "zeros that failed leave the range as the host left it",
        UnsettledForgotten = "a flush succeeds on a file that was given up because failed zeros could not be settled",
        DeviceTrusted = "a block device that says it cannot make holes is taken to have changed nothing",
        TableKept = "a write keeps the memory of its table from its first part to its last",
        SlotKept = "a request that was merged keeps its place in the line once it is answered",
        CommitKept = "a mapping whose write failed stays in the list of mappings to be written",
        ClusterPassedOver = "a write in as many pieces as are written at once skips a cluster and continues after it",
        CloseUnawaited = "a disk is reported closed while the host is still closing its file",
        HolesAskedAgain = "a block device that cannot make holes is asked with each discard",
        KeptUnmapped = "zeros that must keep their space are skipped where nothing is mapped",
        KeptGivenBack = "zeros that must keep their space release it",
        GivenBackKept = "zeros whose space may go keep it",
        ZeroesSkippedBelow = "zeros over a backing file are skipped where nothing is mapped above it",
        ZeroesUnyielding = "a request of zeros looks at all of its tables in one turn",
        MemoryForgotten = "the memory reserved for a mapping in doubt is not returned when it is not needed",
        ClaimTooWide = "everything past zeros and discards waits for them, not only what they touch",
        OutOfReach = "a new cluster is placed further out than an image is opened with after a crash",
        PlaceLost = "a place whose data could not be written is not returned to the allocator",
        PiecesUnbounded = "all pieces of a scattered read are asked for at once",
        MergedErrorLost = "the error of a merged request reaches only its head",
        NothingReadEnds = "a read that returns nothing is taken as the end of the file, wherever it is",
        ShortTransfer = "a short transfer is taken as complete",
        ResponseTwice = "a request that ended while the ring was reconnecting is answered twice",
        FuaUnsynced = "a write with FUA is answered before it is durable",
        FlushEarly = "a flush is acknowledged before the file was synchronised",
        FlushForgets = "a flush succeeds after an earlier one failed",
        DirectFlushForgets = "a flush of a direct file succeeds after an earlier one failed",
        InterruptedSyncLatches = "a synchronisation that was interrupted counts as one that lost data",
        LostWithProcess = "that a synchronisation failed is forgotten when the process is replaced",
        BegunSyncForgotten = "a synchronisation during which the process died counts as a success without a check",
        LostOutlivesBoot = "a loss in a synchronisation is still held against the disk after a reboot",
        NameUnsynced = "the name of a new image is not made durable",
        DirectoryBelieved = "a directory that could not be synchronised is not reported",
        WrittenThroughLater = "a disk that writes through answers writes before they are durable",
        UnsafeFlushed = "a disk whose flushes are to be left out carries them out",
        SizeBelieved = "a size that could not be set is taken as set",
        OldHeaderStays = "an image that is created over an old one keeps the old header until the new one is written",
        ExampleHeaderEarly = "a new image of the example format gets its header before its empty table is durable",
        UnknownFileApart = "a file that cannot be examined is taken as a different file",
        CopyUnclosed = "a copy is reported done before its target is closed",
        ExtentsJoined = "a map reports clusters that lie apart in the file as one run",
        GivenUpForgotten = "a request that is dropped half way is no longer waited for",
        LooksUncounted = "a query for extents does not count as a request in flight",
        ClosedListed = "a disk that is closed stays in the list of its process",
        ChangeMissed = "a change of the list of disks is missed by whoever was not waiting for it",
        PlaceKept = "the name of a disk that is gone stays taken in its process",
        PauseUnwatched = "a disk counts as paused while requests are in flight",
        ExchangeUnflushed = "what was answered before an exchange need not be durable after it",
        PauseBesideExchange = "a disk counts as paused while its image is being exchanged",
        LeaseUncounted = "the old image is closed after an exchange although the new one is based on it",
        EdgeDropped = "a write does not wait for an overlapping request in flight",
        FlushDataUnordered = "a request that overlaps the data of an earlier flush with data does not wait for it",
        SegmentFirstIgnored = "the data of a segment is taken from the start of its page",
        ClaimInPieces = "a request claims its range in 64 pieces",
        RefusedAsOk = "a malformed request is answered as if it had been carried out",
        RingReadTwice = "a ring entry is read again after it was checked",
        GrantLeaked = "a mapped grant is not unmapped when connecting fails",
        LostAtReconnect = "requests in the in-flight record are not executed after a restart",
        RecordLate = "the in-flight record is written after the request was taken",
        BegunStatusLost = "a failed answer that was begun when the process died arrives as a success",
        ResumedForgotten = "a request that was taken over from a dead process is no longer in the record",
        RecordGoneAtLeave = "the in-flight record is removed when a process leaves its ring in order",
        GoneNotClosed = "a back end whose front end is gone ends without closing its own end",
        BindOnce = "a port that a dying predecessor still holds is taken as a broken ring",
        CloseErrorFirst = "the error of closing a disk replaces the error that ended its back end",
        DeafCloses = "a ring whose event channel is lost is closed instead of left to another process",
        PauseStays = "the pause between two attempts to serve a disk does not grow",
        RefusalUntold = "a disk that cannot be served is neither refused nor served",
        ForeignEndsLook = "the search for disks ends at the first one that another program serves",
        ServedAgain = "a device whose serving has ended is served again while its directory is there",
        DiskNotCompared = "a disk of a different size or mode is put under a running guest",
        RingLeftBehind = "a back end reports itself closed while its ring is still being served",
        ReadOnlyUntold = "a disk whose image can only be read is announced as writable",
        EpochIgnored = "the record of an earlier ring with the same grant and port is taken for that of a new one",
        RspProdBelieved = "the index of responses is taken from the page, where the guest can write it",
        NoSecondLook = "the ring is not checked for requests again after asking for an event",
        EarlyDrain = "a ring counts as drained before its last responses are published",
        PauseUnheard = "the end of a pause is noticed only when something else happens",
        StaleRingRef = "the grant of a ring is taken from a key that an earlier front end left",
        MemoryOnce = "a temporary lack of memory on the host is taken as a broken ring",
        CopyInFirst = "a failure to copy the first segment of a write from the guest goes unnoticed",
        CopyOutIgnored = "a read whose data could not be copied to the guest is answered as a success",
        StoreErrorEnds = "a transient error of xenstored ends a disk",
        GoneNotSeen = "a front end that vanishes while its ring is taken over counts as a ring that cannot be served",
        OrphansStay = "the records of guests that are gone are not removed",
        DiskNotOwned = "two processes that are told to serve one disk both begin",
        UnservedRecordStays = "the record of a guest that is destroyed before its ring was taken over is not removed",
        ServedRingClosed = "a ring that another process serves is taken as broken, and its front end is told to close",
        ArmWithoutBarrier = "there is no barrier between asking for an event and the last look at the requests",
        PublishWithoutBarrier = "there is no barrier between publishing responses and checking whether an event is due",
        IndexBeforeResponse = "the index of responses is stored before the responses",
        TurnWithoutEnd = "requests that are answered at once do not count towards the end of a turn",
        NbdWrongCookie = "a reply carries the cookie of the latest request",
        NbdInletAnew = "an NBD client that reconnects asks for memory that the requests waiting for it may hold",
        NbdFlushOwn = "a flush on a connection that wrote nothing is answered without being carried out",
        NbdFuaIgnored = "the flag FUA is ignored",
        NbdRequestCut = "the first bytes of a request that was received in two parts are lost",
        NbdFlushAfterBreak = "a flush succeeds although the connection broke between it and a write that was answered",
        NbdLostAtBreak = "writes that were in flight when the connection broke are not sent again but answered",
        FlushDataEarly = "the data of a flush is written before what the flush covers is durable",
        PaceIgnored = "a front end that reconnects in a loop is never slowed down",
        NbdStatusAtOnce = "all block status replies that a connection asks for are built at once",
        NbdErrorTextLeft = "the text of an error is left unread in the stream",
        NbdLessIgnored = "a server that comes back with fewer capabilities is used as before",
        NbdReadHalf = "a read whose last chunk has arrived is taken as complete",
        NbdBufferKept = "requests that wait to be sent on a broken connection keep their buffers",
        NbdMemoryKept = "a client that takes no replies keeps memory that others wait for",
        NbdTrimFrozen = "a trim on a read-only export is passed to its disk",
        NbdZeroesEarly = "zeros with the flag FUA are answered before they are durable",
        FlushWritesFrozen = "a flush with data is carried out on a read-only disk",
        BlockClaimsLeft = "two writes rewrite the same block of a direct file at the same time",
        BackingUnlocked = "a file that is only read is not locked",
        SyncJoined = "a flush is answered by a synchronisation that had begun before it",
        CloseUnsynced = "a raw image is closed without being synchronised",
        NbdPartSentEnds = "a connection that takes a reply in parts is taken as broken",
        NbdAnnouncedKept = "an NBD client that announced a large write and stopped sending it keeps the memory for it",
        NbdWriterKept = "the task that sends the replies of a connection outlives it",
        NbdSeatLost = "a connection that does not end in order keeps the memory that the next one needs",
        NbdOneKept = "an NBD client that ends forgets to answer the oldest request",
        NbdDeafKept = "a client that has stopped sending and takes no replies keeps its place",
    }
}

list! {
    /// A rare branch that a sweep must reach; one that is never hit fails the sweep.
    Mark {
        ClusterAllocated = "a data cluster was allocated",
        L2TableAllocated = "an L2 table was allocated",
        CopyUp = "a partial write filled the rest of its cluster from below",
        CompressedRead = "a compressed cluster was read",
        CompressedRewritten = "a compressed cluster was replaced by a normal one",
        AllocationRetried = "an allocation was repeated after its mapping write had failed",
        SyncShared = "one synchronisation served several allocations",
        CommitShared = "one L2 write carried several entries",
        RequestsMerged = "contiguous requests were merged",
        MergedSplit = "a merged request failed and its parts were repeated one by one",
        ShortResumed = "a short transfer was continued",
        OperationRepeated = "one operation of a request was repeated after a transient error",
        WriteParted = "a write had more pieces than are written at once",
        RequestRetried = "a request was repeated after a transient error",
        OverlapWaited = "a request waited for an overlapping one",
        Exchanged = "the lower node of a slot was exchanged",
        ExchangeHeld = "requests waited for the lower node of a slot to be exchanged",
        DepthReached = "the scheduler's depth held a request back",
        FileGivenUp = "accepted writes of a file were gone, and nothing could be put in their place",
        FailedZerosSettled = "zeros failed in a way that may have lost accepted writes, and a hole was made",
        FlushLatched = "a flush was refused because an earlier one had failed",
        SizeRecovered = "a file that a crash had left shorter than its references was made longer",
        RecordResumed = "a request was taken over from the in-flight record",
        ResponseResumed = "a response that a dead process had begun was completed",
        RingLeft = "a process left its ring in order",
        BindWaited = "a ring's port was bound once a dying predecessor had released it",
        MemoryWaited = "a ring was connected once the host had memory for it",
        RingRefused = "a ring was closed because of its content",
        RequestRefused = "a malformed request was answered with an error",
        Reconnected = "a front end connected again",
        NbdRequestCut = "an NBD request was received in two parts",
        NbdRoomWaited = "an NBD connection had as many requests in flight as it may have",
        NbdPayloadDirect = "the payload of an NBD write was received into its own buffer",
        NbdRequestRefused = "a wrong NBD request was answered with an error",
        NbdServerBack = "an NBD client connected again",
        NbdResent = "a request was sent again to an NBD server that had been lost",
        NbdUnflushedLost = "an NBD server was lost with answered writes that no flush had covered",
        NbdDataDirect = "data of an NBD read was received into its own buffer",
        NbdSplit = "a request was larger than the NBD server takes",
        WritesThrough = "a disk was built whose writes are durable when answered",
        FlushesLeftOut = "a disk was built whose flushes are answered and not carried out",
        ImageAwaited = "a program waited for an image that another process had",
        ServerAsDisk = "a program opened the export of an NBD server as a disk",
        ExportsServed = "tapdisk serve listened",
        ServeRefused = "tapdisk serve ended because a disk could not be opened",
        ServeStopped = "tapdisk serve was asked to stop, and closed its disks",
        VbdNamed = "tapdisk xen served a vbd of its command line",
        VbdFound = "tapdisk xen served a vbd that it found by its script",
        VbdRefused = "tapdisk xen said why a vbd that it found is not served",
        VbdFailed = "tapdisk xen said what ended the service of a vbd",
        VbdLeft = "tapdisk xen was asked to stop, and left a vbd as it was",
        VbdGone = "tapdisk xen closed a vbd whose back end was taken away",
        LeftDeaf = "tapdisk xen ended because it heard no events any more",
    }
}

/// Hooks of the testbed in code that ships. A real host keeps the provided methods, which cost nothing.
pub trait Probe: Clone + 'static {
    /// Whether `bug` is switched on.
    fn bug(&self, bug: Bug) -> bool {
        let _ = bug;
        false
    }
    /// Counts `units` of work that grows with what is asked or stored: table entries examined, claims compared. The
    /// work of one turn is bounded.
    fn work(&self, units: u64) {
        let _ = units;
    }
    /// Counts that `mark` was reached.
    fn mark(&self, mark: Mark) {
        let _ = mark;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kebab_case_and_unique() {
        assert_eq!(Bug::L1BeforeL2.name(), "l1-before-l2");
        let names: std::collections::BTreeSet<_> = Bug::ALL.iter().map(|b| b.name()).collect();
        assert_eq!(names.len(), Bug::ALL.len());
        assert!(Bug::ALL.iter().all(|b| !b.sentence().ends_with('.')));
    }
}
