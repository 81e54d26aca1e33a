//! Prepares an image for a larger disk, before its header says so.
//!
//! ```text
//!   format: a root for the larger disk ─► survey ─► zeroed: zeros where anything else would show ─► durable
//!                                                      └─► format: the header, in one write
//! ```

use super::{Frontier, GuestOffset, HostOffset, Image, Layout, Surveyed};
use crate::ImageHost;
use crate::calls::{LONE_REPEATS, closed};
use crate::io::{ImageFile, is_transient};
use std::ops::Range;
use std::rc::Rc;
use tap_core::{Node, ZeroFlags};
use tap_host::{Errno, Patience};

tap_host::listed! {
    pub(super) BUGS: Bug;
    GROWN_UNSYNCED = "grown-unsynced", "the header of a larger disk is written before its tables are durable";
    GROWN_SHOWS_BELOW = "grown-shows-below", "the new part of a larger disk shows the rest of its backing file";
}

/// An image whose file is ready for a larger disk.
pub struct Zeroed<H: ImageHost, L: Layout> {
    image: Rc<Image<H, L>>,
    host: H,
}

impl<H: ImageHost, L: Layout<Allocator = Frontier>> Surveyed<H, L> {
    /// Its file, and the end of its space: from there on nothing is in use.
    pub fn into_file(self) -> (ImageFile<H>, HostOffset) {
        let end = self.space_end();
        (self.into_front_file(), end)
    }

    /// Writes zeros to these `bytes` of the disk, above `backing`, wherever they read as anything else, and makes all
    /// of the file durable.
    ///
    /// # Errors
    /// Those of the file. What was written is not undone.
    pub async fn zeroed(
        self,
        host: &H,
        backing: Option<Rc<dyn Node>>,
        bytes: Range<GuestOffset>,
    ) -> Result<Zeroed<H, L>, Errno> {
        let image = Rc::new(self.into_image(host, backing));
        let zeroed = image.zero_patiently(&bytes).await;
        let finished = match zeroed {
            Ok(()) if host.bug(&GROWN_UNSYNCED) => Ok(()),
            Ok(()) => image.finish().await,
            Err(error) => Err(error),
        };
        if let Some(backing) = &image.backing {
            // It was only read.
            let _nothing_lost = backing.close().await;
        }
        finished?;
        Ok(Zeroed { image, host: host.clone() })
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// As [`Image::write_zeroes`], retried after transient errors: there is no scheduler that does so.
    async fn zero_patiently(self: &Rc<Self>, bytes: &Range<GuestOffset>) -> Result<(), Errno> {
        if bytes.is_empty() || self.host.bug(&GROWN_SHOWS_BELOW) {
            return Ok(());
        }
        let mut patience = Patience::of(LONE_REPEATS);
        loop {
            let len = bytes.end - bytes.start;
            let flags = ZeroFlags { unmap: true, fast: false };
            match Rc::clone(self).write_zeroes(bytes.start, len, flags).await {
                Err(error) if is_transient(error) && patience.again(&self.host).await => {}
                result => return result,
            }
        }
    }
}

impl<H: ImageHost, L: Layout> Zeroed<H, L> {
    /// Its file, for the header.
    pub fn file(&self) -> &ImageFile<H> {
        &self.image.file
    }

    /// Closes it.
    pub async fn close(self) {
        let Self { image, host } = self;
        drop(image);
        closed(&host).await;
    }
}
