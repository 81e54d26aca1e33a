//! A page that a process has mapped: what the seam calls a shared page.

use crate::page::Page;
use crate::port::XenPort;
use std::cell::Cell;
use std::rc::Rc;
use tap_host::{DomId, GrantRef, PAGE_BYTES, SharedPage};

/// What to undo when a mapping ends.
pub(crate) enum Origin {
    /// A page that another domain granted. The key identifies the mapping within its process.
    Grant { key: u64, write: bool },
    /// A named page: it stays, and its ownership ends.
    Region { owned: Option<Rc<Cell<bool>>> },
    /// A page of the kernel, which looks at it only when it is called.
    Kernel,
}

struct Inner {
    port: XenPort,
    page: Page,
    origin: Origin,
}

/// A mapped page; unmapped when the last clone is dropped by a living process. Every store is one step of the process
/// and does not happen once it is dead.
#[derive(Clone)]
pub struct Mapping(Rc<Inner>);

impl Mapping {
    pub(crate) fn new(port: XenPort, page: Page, origin: Origin) -> Self {
        Self(Rc::new(Inner { port, page, origin }))
    }

    pub(crate) fn of_kernel(port: &XenPort, page: &Page) -> Self {
        Self::new(port.clone(), page.clone(), Origin::Kernel)
    }

    #[inline]
    fn before_load(&self, offset: usize, len: usize) {
        self.0.port.other_cpus();
        self.0.port.xen().0.sim.count_work();
        if self.0.port.node().is_alive() {
            self.0.page.before_foreign_load(offset, len);
        }
    }

    #[inline]
    fn store(&self, offset: usize, bytes: &[u8]) {
        // On real hardware this would be a page fault.
        assert!(
            !matches!(self.0.origin, Origin::Grant { write: false, .. }),
            "store into a read-only mapping"
        );
        self.0.port.other_cpus();
        if self.0.port.node().step() {
            match self.0.origin {
                Origin::Grant { .. } => self.0.port.shared_store(&self.0.page, offset, bytes),
                // Others read it only once this process is dead, when no store is left in its buffer.
                Origin::Region { .. } => self.0.page.write(offset, bytes),
                // A call of the kernel is a barrier.
                Origin::Kernel => self.0.page.write(offset, bytes),
            }
        }
    }
}

impl SharedPage for Mapping {
    #[inline]
    fn load_u32(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4) && offset < PAGE_BYTES, "load of a number at {offset}");
        self.before_load(offset, 4);
        let mut bytes = [0; 4];
        self.0.port.shared_load(&self.0.page, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    #[inline]
    fn store_u32(&self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4) && offset < PAGE_BYTES, "store of a number at {offset}");
        self.store(offset, &value.to_le_bytes());
    }
    #[inline]
    fn copy_in(&self, offset: usize, private: &mut [u8]) {
        self.before_load(offset, private.len());
        self.0.port.shared_load(&self.0.page, offset, private);
    }
    #[inline]
    fn copy_out(&self, offset: usize, private: &[u8]) {
        self.store(offset, private);
    }
    #[inline]
    fn full_barrier(&self) {
        self.0.port.other_cpus();
        self.0.port.drain_stores();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.port.node().is_alive() {
            return;
        }
        match &self.origin {
            Origin::Grant { key, .. } => {
                self.port.drain_stores();
                self.port.unmap(*key);
            }
            Origin::Region { owned } => owned.iter().for_each(|owned| self.port.disown(owned)),
            Origin::Kernel => {}
        }
    }
}

/// A grant mapped by a process.
#[derive(Clone, Copy)]
pub(crate) struct MappedGrant {
    pub(crate) dom: DomId,
    pub(crate) gref: GrantRef,
}
