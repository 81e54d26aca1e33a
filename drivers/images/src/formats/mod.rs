//! The formats, one folder each.
//!
//! | module | format |
//! |---|---|
//! | [`raw`] | the file is the disk |
//! | [`qcow`] | QEMU copy-on-write, version 1, with Xen's extended header |

pub mod qcow;
pub mod raw;

use crate::ImageHost;
use crate::format::Format;
use crate::registry::{Driver, Formats};

macro_rules! shipped {
    ($($module:ident),+) => {
        /// The formats of [`Formats::shipped`].
        pub static SHIPPED: &[Format] = &[$($module::FORMAT),+];

        tap_host::listed! {
            pub(crate) BUGS: Bug with [$($module::BUGS),+];
        }

        impl<H: ImageHost> Formats<H> {
            const ROWS: &'static [&'static dyn Driver<H>] = &[$(&$module::Driver),+];
        }
    };
}

// A file that no other format recognises is raw.
shipped![raw, qcow];

impl<H: ImageHost> Formats<H> {
    /// The formats of this crate.
    pub const fn shipped() -> Self {
        Self::new(Self::ROWS)
    }
}

/// The format of this crate with the name or alias `name`.
pub fn format_called(name: &str) -> Option<Format> {
    SHIPPED.iter().copied().find(|format| format.is_called(name))
}
