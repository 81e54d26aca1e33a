//! A disk in use becomes larger.
//!
//! ```text
//!   drain ──► flush ──► no image ──► the image grows (tap_images, durably) ──► opened again ──► requests go on
//!               │ too late, or an error: it goes on as it was
//! ```
//!
//! # Contract
//!
//! * Who uses the disk notices a delay, never an error. NBD has no message about another size: a client knows the new
//!   one once it connects anew. Guests on rings are told by whoever connected them, who hears of it as of any event.
//! * The disk has its new size for those who use it, and rings take requests for that, once the image has it durably.
//! * The disk has the size that was told, durably, once that is answered. After a crash, or an error on the way, it has
//!   the old size or the new one; it goes on with whichever its image has, and never becomes smaller.

use super::{ControlledHost, Open, Stage, Vbd, file_of};
use crate::control::open::spec_of;
use crate::control::settings::Settings;
use crate::disk::open_options;
use crate::spec::DiskSpec;
use std::rc::Rc;
use tap_control::Refusal;
use tap_control::json::{Happened, Resized};
use tap_core::{Node, Unfit};
use tap_host::{Errno, SECTOR_BYTES};
use tap_images::{Formats, sync_file};

tap_host::listed! {
    pub(super) BUGS: Bug;
    RESIZED_UNKNOWN = "resized-unknown", "a disk whose image has become larger insists on its old size";
    RESIZE_REFUSED_STAYS = "resize-refused-stays", "a disk whose image cannot become larger stays paused";
    SIZE_TOLD_EARLY = "size-told-early", "a disk says its new size, and takes requests for it, before its image has it";
    RESIZED_ANY_FILE = "resized-any-file", "the file that has got the name of a disk's image becomes larger";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    RESIZED = "resized", "a disk in use was made larger";
    RESIZE_REFUSED = "resize-refused", "the image of a disk in use could not be made larger, and the disk went on";
}

impl<H: ControlledHost> Vbd<H> {
    /// Makes the disk larger.
    pub(in crate::control) async fn resize(
        &self,
        settings: &Settings<H>,
        size_bytes: u64,
    ) -> Result<Resized, Refusal> {
        let what = format!("resize minor {}", self.minor);
        let open = self.opened(&what)?;
        self.may_resize(&open, size_bytes, &what)?;
        let size_sectors = size_bytes / SECTOR_BYTES;
        if open.disk.slot().info().size_sectors == size_sectors {
            // The call that gave it the size may have failed to make that durable.
            let spec = spec_of(&open.name.borrow(), &what)?;
            if let DiskSpec::Image(image) = spec {
                let synced = sync_file(&open.files, &image.path).await;
                synced.map_err(|error| Refusal::new(error.errno(), format!("{what}: {error}")))?;
            }
            return Ok(Resized { minor: self.minor, size_sectors });
        }
        self.resize_to(settings, &open, size_bytes, &what).await
    }

    async fn resize_to(
        &self,
        settings: &Settings<H>,
        open: &Open<H>,
        size_bytes: u64,
        what: &str,
    ) -> Result<Resized, Refusal> {
        open.check_file(settings, what).await?;
        let (name, size_sectors) = (open.name.borrow().clone(), size_bytes / SECTOR_BYTES);
        self.park_for(settings, open).await?;
        if let Err(why) = open.check_file(settings, what).await {
            open.stage.set(Stage::Stranded);
            self.tell(settings, Happened::Stranded);
            return Err(Refusal::new(why.error, format!("{}; it stays paused", why.words)));
        }
        if settings.host.bug(&SIZE_TOLD_EARLY) {
            open.disk.grow_parked(size_sectors);
            self.tell(settings, Happened::Resized);
        }
        let grown = open.grow(&name, size_bytes, what).await;
        if grown.is_err() && settings.host.bug(&RESIZE_REFUSED_STAYS) {
            return grown.map(|()| Resized { minor: self.minor, size_sectors });
        }
        let back = self.go_on(settings, open, &name).await;
        match (grown, back) {
            (Ok(()), Ok(())) if open.disk.slot().info().size_sectors < size_sectors => {
                let words =
                    format!("{what}: its image has the new size, and cannot be synchronised; it goes on");
                Err(Refusal::new(Errno::EIO, words))
            }
            (Ok(()), Ok(())) => {
                settings.host.mark(&RESIZED);
                self.tell(settings, Happened::Resized);
                Ok(Resized { minor: self.minor, size_sectors })
            }
            (Err(why), Ok(())) => {
                settings.host.mark(&RESIZE_REFUSED);
                Err(Refusal::new(why.error, format!("{}; it goes on", why.words)))
            }
            (Ok(()), Err(why)) => {
                Err(Refusal::new(why.error, format!("{}; its image has the new size", why.words)))
            }
            (Err(first), Err(why)) => {
                Err(Refusal::new(first.error, format!("{}; failed to {}", first.words, why.words)))
            }
        }
    }

    /// Whether the disk is one that can become larger now, and this is a larger size.
    fn may_resize(&self, open: &Open<H>, size_bytes: u64, what: &str) -> Result<(), Refusal> {
        let (info, name) = (open.disk.slot().info(), open.name.borrow());
        let have_bytes = info.size_sectors * SECTOR_BYTES;
        let refusal = if open.stage.get() != Stage::Running {
            Some((Errno::EINVAL, "it is paused; resume it first".to_owned()))
        } else if !matches!(spec_of(&name, what)?, DiskSpec::Image(_)) {
            Some((Errno::EOPNOTSUPP, format!("{name} is no file; make it larger where it is one")))
        } else if info.read_only {
            Some((Errno::EROFS, "it is read-only".to_owned()))
        } else if self.merges() {
            let words =
                "images below it are being merged; tap-ctl cancel ends that, and query shows how far it is";
            Some((Errno::EBUSY, words.to_owned()))
        } else if !size_bytes.is_multiple_of(SECTOR_BYTES) {
            Some((Errno::EINVAL, format!("{size_bytes} bytes are not a multiple of {SECTOR_BYTES}")))
        } else if size_bytes < have_bytes {
            let words = format!(
                "it has {have_bytes} bytes, and what is past byte {size_bytes} would be lost; it can only become larger"
            );
            Some((Errno::EINVAL, words))
        } else {
            None
        };
        refusal.map_or(Ok(()), |(error, words)| Err(Refusal::new(error, format!("{what}: {words}"))))
    }
}

impl<H: ControlledHost> Open<H> {
    /// The name of the disk's image still has the file that the disk has.
    async fn check_file(&self, settings: &Settings<H>, what: &str) -> Result<(), Refusal> {
        let name = self.name.borrow().clone();
        let found = file_of(&self.files, &name).await;
        if settings.host.bug(&RESIZED_ANY_FILE) || (found.is_some() && found == self.file.get()) {
            return Ok(());
        }
        let words = format!("{what}: {name} is not the file that the disk has open");
        Err(Refusal::new(Errno::ESTALE, words))
    }

    /// Makes the image larger, which is not open.
    async fn grow(&self, name: &str, size_bytes: u64, what: &str) -> Result<(), Refusal> {
        let DiskSpec::Image(image) = spec_of(name, what)? else {
            return Err(Refusal::new(Errno::EOPNOTSUPP, format!("{what}: {name} is no file")));
        };
        let options = open_options(&self.options);
        let grown = Formats::shipped().grow(&self.files, &image, &options, size_bytes).await;
        grown.map_err(|error| Refusal::new(error.errno(), error.to_string()))
    }

    /// `image`, that of the disk, which is paused, opened again, as it can take its place: it may have become larger,
    /// whatever was said about that, or whoever did it. The disk does so, too, once it is durable.
    pub(super) fn fit_own(
        &self,
        settings: &Settings<H>,
        image: Rc<dyn Node>,
        is_durable: bool,
    ) -> Result<Rc<dyn Node>, Unfit> {
        let (size_sectors, have_sectors) = (image.info().size_sectors, self.disk.slot().info().size_sectors);
        if size_sectors > have_sectors && !settings.host.bug(&RESIZED_UNKNOWN) {
            if !is_durable {
                return self.disk.fit_larger(image);
            }
            self.disk.grow_parked(size_sectors);
        }
        self.disk.fit(image)
    }
}
