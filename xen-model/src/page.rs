//! A page of memory that several parties share.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use tap_host::PAGE_BYTES;

/// Bytes of a page whose loads are recorded together.
const PIECE: usize = PAGE_BYTES / 128;

type Hook = Rc<dyn Fn(usize, usize)>;

/// 4096 bytes; clones are the same page. Its owner accesses it through these methods, which are plain memory accesses;
/// a back end accesses it through a mapping ([`crate::Mapping`]).
#[derive(Clone)]
pub struct Page(Rc<Inner>);

struct Inner {
    bytes: RefCell<[u8; PAGE_BYTES]>,
    /// Which pieces of 32 bytes others have loaded since that was last asked.
    loaded: Cell<u128>,
    hooked: Cell<bool>,
    stores_hooked: Cell<bool>,
    hook: RefCell<Option<Hook>>,
    store_hook: RefCell<Option<Hook>>,
}

impl Page {
    /// A page of zeros.
    pub fn new() -> Self {
        let bytes = RefCell::new([0; PAGE_BYTES]);
        let (loaded, hooked, stores_hooked) = Default::default();
        Self(Rc::new(Inner {
            bytes,
            loaded,
            hooked,
            stores_hooked,
            hook: RefCell::default(),
            store_hook: RefCell::default(),
        }))
    }

    /// The bytes from `offset` on. The range must lie in the page.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.0.bytes.borrow()[offset..offset + into.len()]);
    }

    /// Calls `look` with the whole page, for its owner.
    #[inline]
    pub fn with<R>(&self, look: impl FnOnce(&[u8; PAGE_BYTES]) -> R) -> R {
        look(&self.0.bytes.borrow())
    }

    /// Calls `change` with the whole page, for its owner.
    #[inline]
    pub fn with_mut<R>(&self, change: impl FnOnce(&mut [u8; PAGE_BYTES]) -> R) -> R {
        change(&mut self.0.bytes.borrow_mut())
    }

    /// Stores bytes from `offset` on. The range must lie in the page.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.0.bytes.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
    }

    /// The little-endian number at `offset`.
    #[inline]
    pub fn load_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Stores a little-endian number at `offset`.
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Calls `hook(offset, len)` before every load through another party's mapping or copy, so that a hostile owner can
    /// change the page between two loads; `None` ends that.
    pub fn on_foreign_load(&self, hook: Option<Rc<dyn Fn(usize, usize)>>) {
        self.0.hooked.set(hook.is_some());
        *self.0.hook.borrow_mut() = hook;
    }

    /// Calls `hook(offset, len)` after every store of a mapping or ring became visible, like another CPU of the owner
    /// that polls for it; `None` ends that.
    pub fn on_shared_store(&self, hook: Option<Rc<dyn Fn(usize, usize)>>) {
        self.0.stores_hooked.set(hook.is_some());
        *self.0.store_hook.borrow_mut() = hook;
    }

    #[inline]
    pub(crate) fn write_shared(&self, offset: usize, from: &[u8]) {
        self.write(offset, from);
        if self.0.stores_hooked.get() {
            call(&self.0.store_hook, offset, from.len());
        }
    }

    /// Whether both are the same page.
    pub(crate) fn is(&self, other: &Page) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Whether another party has loaded the 32 bytes around `offset`; `forget` makes it start over.
    pub(crate) fn was_loaded(&self, offset: usize, forget: bool) -> bool {
        let (loaded, bit) = (self.0.loaded.get(), 1 << (offset / PIECE));
        if forget {
            self.0.loaded.set(loaded & !bit);
        }
        loaded & bit != 0
    }

    #[inline]
    pub(crate) fn before_foreign_load(&self, offset: usize, len: usize) {
        let (first, last) = (offset / PIECE, (offset + len.max(1) - 1) / PIECE);
        let pieces = u128::MAX >> (127 - (last - first)) << first;
        self.0.loaded.set(self.0.loaded.get() | pieces);
        if self.0.hooked.get() {
            call(&self.0.hook, offset, len);
        }
    }
}

/// Calls a hook, which may replace itself.
fn call(hook: &RefCell<Option<Hook>>, offset: usize, len: usize) {
    let hook = hook.borrow().clone();
    if let Some(hook) = hook {
        hook(offset, len);
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
