//! Pages of other domains: mapping, copying, and the errors of hypervisor and kernel.
//!
//! Each segment of a copy has its own status: if one fails, the others, before and after it, are still copied. The
//! kernel itself retries segments that may succeed later (`GNTST_eagain`); what it reports has failed.

use crate::mapping::{MappedGrant, Mapping, Origin};
use crate::page::Page;
use crate::port::XenPort;
use crate::xen::Xen;
use sim::{Draw, FaultKind, Label};
use tap_host::{DomId, Errno, GrantRef, GrantSegment, Grants, PAGE_BYTES};

pub(crate) static COPY_ERROR: Label =
    Label::new("copy-error", "these segments of the copy fail, one bit for each: {}");
pub(crate) static NO_MEMORY: Label =
    Label::new("no-memory", "the kernel has no memory for it (1 now, 2 for half a second): {}");

pub(crate) static COPY_ERROR_KIND: FaultKind = FaultKind { name: "copy-error", max_ppm: 100_000 };
pub(crate) static NO_MEMORY_KIND: FaultKind = FaultKind { name: "no-memory", max_ppm: 100_000 };

/// How long the kernel is short of memory, in nanoseconds, if not only for a moment.
const SHORT_NS: u64 = 500_000_000;
/// How long after that it is not short of memory again.
const CALM_NS: u64 = 10_000_000_000;

impl Xen {
    /// The control domain's kernel has no memory for mappings, ports and named pages for `for_ns` nanoseconds.
    pub fn run_short(&self, for_ns: u64) {
        self.0.short_until_ns.set(self.0.sim.now_ns() + for_ns);
    }
}

impl XenPort {
    /// From now on a copy may fail for some of its segments, whatever the guest did.
    pub fn allow_copy_errors(&self) {
        self.copy_errors().set(true);
    }

    /// The kernel's memory for a mapping, a port or a page.
    ///
    /// # Errors
    /// `ENOMEM` now, or for a while.
    pub(crate) fn memory(&self) -> Result<(), Errno> {
        let xen = &self.xen().0;
        let (sim, rate) = (&xen.sim, xen.rates.no_memory);
        let short_until_ns = xen.short_until_ns.get();
        if sim.now_ns() < short_until_ns {
            return Err(Errno::ENOMEM);
        }
        if !self.has_store_errors() || (rate == 0 && !sim.has_given_decisions()) {
            return Ok(());
        }
        let entity = sim.derive("no-memory", 0);
        sim.name_entity(entity, || format!("memory for {}", sim.name_of(sim.current())));
        let kind = sim.fault(entity, &NO_MEMORY, rate, |draw| 1 + draw.below(2));
        let calm = short_until_ns > 0 && sim.now_ns() < short_until_ns + CALM_NS;
        if kind == 0 || calm {
            return Ok(());
        }
        if kind > 1 {
            self.xen().run_short(SHORT_NS);
        }
        Err(Errno::ENOMEM)
    }

    /// Which segments of a copy fail, by their number.
    fn failing(&self, segments: &[GrantSegment]) -> impl Fn(usize) -> bool + use<> {
        let bits = self.failing_bits(segments);
        move |segment| segment < 32 && bits >> segment & 1 != 0
    }

    fn failing_bits(&self, segments: &[GrantSegment]) -> u64 {
        let xen = &self.xen().0;
        let (sim, rate) = (&xen.sim, xen.rates.copy_error);
        if !self.copy_errors().get() || (rate == 0 && !sim.has_given_decisions()) {
            return 0;
        }
        let Some(first) = segments.first() else { return 0 };
        let entity = sim.derive("grant-copy", u64::from(first.gref.0));
        sim.name_entity(entity, || format!("grant copy of {}", sim.name_of(sim.current())));
        let count = segments.len().min(32) as u64;
        sim.fault(entity, &COPY_ERROR, rate, |draw: &mut Draw| match draw.below(4) {
            0 => 1,
            1 => 1 << (count - 1),
            2 => 1 << draw.below(count),
            _ => 1 + draw.below((1 << count) - 1),
        })
    }

    /// The part of a page that a segment names.
    fn segment(&self, dom: DomId, segment: GrantSegment, write: bool) -> Result<Page, Errno> {
        let grants = self.xen().0.grants.borrow();
        let table = grants.get(usize::from(dom.0)).and_then(Option::as_ref).ok_or(Errno::EINVAL)?;
        table.page(segment.gref, self.dom(), write).cloned()
    }
}

/// The offset of each segment in private memory of `len` bytes.
///
/// # Errors
/// `EINVAL` if one exceeds its page, or their sum is not `len`.
fn places(segments: &[GrantSegment], len: usize) -> Result<impl Iterator<Item = usize>, Errno> {
    let within = |s: &GrantSegment| usize::from(s.offset) + usize::from(s.len) <= PAGE_BYTES;
    let sum: usize = segments.iter().map(|s| usize::from(s.len)).sum();
    if sum != len || !segments.iter().all(within) {
        return Err(Errno::EINVAL);
    }
    Ok(segments.iter().scan(0, |at, segment| {
        let here = *at;
        *at += usize::from(segment.len);
        Some(here)
    }))
}

impl Grants for XenPort {
    type Page = Mapping;

    fn map(&self, dom: DomId, gref: GrantRef, write: bool) -> Result<Mapping, Errno> {
        if !self.node().step() {
            return Err(Errno::ESHUTDOWN);
        }
        self.memory()?;
        let page = self.xen().map(self.dom(), dom, gref, write)?;
        let key = self.note_mapping(MappedGrant { dom, gref });
        Ok(Mapping::new(self.clone(), page, Origin::Grant { key, write }))
    }

    fn copy_in(&self, dom: DomId, segments: &[GrantSegment], private: &mut [u8]) -> Result<(), Errno> {
        if !self.node().step() {
            return Err(Errno::ESHUTDOWN);
        }
        self.drain_stores();
        let (fails, mut result) = (self.failing(segments), Ok(()));
        for (i, (at, segment)) in places(segments, private.len())?.zip(segments).enumerate() {
            let page = match self.segment(dom, *segment, false) {
                Ok(page) if !fails(i) => page,
                _ => {
                    result = Err(Errno::EINVAL);
                    continue;
                }
            };
            let into = &mut private[at..at + usize::from(segment.len)];
            page.before_foreign_load(usize::from(segment.offset), into.len());
            page.read(usize::from(segment.offset), into);
        }
        result
    }

    fn copy_out(&self, dom: DomId, segments: &[GrantSegment], private: &[u8]) -> Result<(), Errno> {
        self.drain_stores();
        let (fails, mut result) = (self.failing(segments), Ok(()));
        for (i, (at, segment)) in places(segments, private.len())?.zip(segments).enumerate() {
            self.other_cpus();
            // Each page is a step: a process can die in the middle of a copy.
            if !self.node().step() {
                return Err(Errno::ESHUTDOWN);
            }
            match self.segment(dom, *segment, true) {
                Ok(page) if !fails(i) => {
                    page.write(usize::from(segment.offset), &private[at..at + usize::from(segment.len)]);
                }
                _ => result = Err(Errno::EINVAL),
            }
        }
        result
    }
}
