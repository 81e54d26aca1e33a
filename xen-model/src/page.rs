//! A page of memory that several parties see.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use tap_host::PAGE_BYTES;

type LoadHook = Rc<dyn Fn(usize, usize)>;

/// 4096 bytes; clones are the same page. What its owner does to it goes through these methods and counts as nothing
/// but memory; what a back end does goes through a mapping ([`crate::Mapping`]).
#[derive(Clone)]
pub struct Page(Rc<Inner>);

struct Inner {
    bytes: RefCell<[u8; PAGE_BYTES]>,
    hooked: Cell<bool>,
    hook: RefCell<Option<LoadHook>>,
}

impl Page {
    /// A page of zeros.
    pub fn new() -> Self {
        let bytes = RefCell::new([0; PAGE_BYTES]);
        Self(Rc::new(Inner { bytes, hooked: Cell::new(false), hook: RefCell::default() }))
    }

    /// The bytes from `offset` on. The range must lie in the page.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.0.bytes.borrow()[offset..offset + into.len()]);
    }

    /// Shows the whole page to its owner.
    pub fn with<R>(&self, look: impl FnOnce(&[u8; PAGE_BYTES]) -> R) -> R {
        look(&self.0.bytes.borrow())
    }

    /// Lets its owner change the page.
    pub fn with_mut<R>(&self, change: impl FnOnce(&mut [u8; PAGE_BYTES]) -> R) -> R {
        change(&mut self.0.bytes.borrow_mut())
    }

    /// Stores bytes from `offset` on. The range must lie in the page.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.0.bytes.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
    }

    /// The little-endian number at `offset`.
    pub fn load_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Stores a little-endian number at `offset`.
    pub fn store_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Calls `hook(offset, len)` before every load that somebody else's mapping or copy does, so that a hostile owner
    /// can change the page between two loads; `None` ends that.
    pub fn on_foreign_load(&self, hook: Option<Rc<dyn Fn(usize, usize)>>) {
        self.0.hooked.set(hook.is_some());
        *self.0.hook.borrow_mut() = hook;
    }

    pub(crate) fn before_foreign_load(&self, offset: usize, len: usize) {
        if self.0.hooked.get() {
            let hook = self.0.hook.borrow().clone();
            if let Some(hook) = hook {
                hook(offset, len);
            }
        }
    }
}

impl Default for Page {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Page")
    }
}
