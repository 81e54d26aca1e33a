//! The registry: the drivers that open, create, describe, check and enlarge images of each format.
//!
//! ```text
//!   name on a command line ─► Format ─┐
//!   first bytes of a file ────────────┴► Formats ─► Driver ─► open ─► its backing file, through Formats again
//!                                        a row each       └─► create, describe, check, grow
//! ```
//!
//! A format is one [`Driver`] in one row. No other code depends on the format of an image.

use crate::chain::{Backing, MAX_CHAIN, OpenOptions, resolve, same_path};
use crate::foreign::foreign;
use crate::format::{CheckReport, Description, Format, FormatInfo, ImageFormat, ImageSpec, NewImage};
use crate::grow::refused;
use crate::io::{ImageFile, is_transient as passes};
use crate::merging::{MERGE_MARK_STAYS, check_merging, merging, unmark_merged};
use crate::{ImageError, ImageHost, file_id};
use std::rc::Rc;
use tap_core::{LocalBoxFuture, Node, nodes};
use tap_host::Patience;

tap_host::listed! {
    pub(crate) BUGS: Bug;
    PRIORITY_OF_TOP = "priority-of-top", "the I/O priority of a disk is not that of the images below its own";
}

/// One format: a row of the registry.
///
/// Every image that it opens follows the contract of this crate.
pub trait Driver<H: ImageHost> {
    /// Its format.
    fn format(&self) -> Format;

    /// Whether a file that begins with `head` claims to be of this format, in any version. `head` has [`HEAD_BYTES`],
    /// zeros past the end of the file.
    fn recognises(&self, head: &[u8]) -> bool {
        let _ = head;
        false
    }

    /// Opens `image` and its backing file.
    fn open(&self, host: H, image: OpenImage<H>) -> LocalBoxFuture<Result<Rc<dyn Node>, ImageError>>;

    /// Creates an empty image at `path`, durable together with its name. After an error a file that is not an image may
    /// be left there.
    fn create(&self, host: H, path: String, image: NewImage) -> LocalBoxFuture<Result<(), ImageError>>;

    /// Reads the properties of the image at `path`, which is opened as `how` says, for reading.
    fn describe(
        &self,
        host: H,
        path: String,
        how: OpenOptions,
    ) -> LocalBoxFuture<Result<Description, ImageError>>;

    /// Checks the metadata of the image at `path` without changing it, opened as `how` says, for reading; `None` if it
    /// has none. A failure to read is an error, not damage.
    fn check(
        &self,
        host: H,
        path: String,
        how: OpenOptions,
    ) -> Option<LocalBoxFuture<Result<CheckReport, ImageError>>> {
        let _ = (host, path, how);
        None
    }

    /// Makes the disk of `image`, which is opened for writing, larger: it has `size_bytes` then, durably, and the new
    /// part reads as zeros. A disk that has this size already stays as it is. `None` if the format cannot.
    fn grow(
        &self,
        host: H,
        image: OpenImage<H>,
        size_bytes: u64,
    ) -> Option<LocalBoxFuture<Result<(), ImageError>>> {
        let _ = (host, image, size_bytes);
        None
    }
}

/// The arguments to open an image.
pub struct OpenImage<H: 'static> {
    /// Its file.
    pub path: String,
    /// How to open it.
    pub options: OpenOptions,
    format: Format,
    formats: Formats<H>,
    /// The caller has not named this file, but allowed any file as this format.
    any: bool,
    /// The paths of the images above it, the one that was asked for first.
    above: Vec<String>,
}

/// Bytes of a file that are read to recognise its format.
pub const HEAD_BYTES: usize = 72;

/// A registry of formats. The first row is the format of a file that no other row recognises.
pub struct Formats<H: 'static>(&'static [&'static dyn Driver<H>]);

impl<H> Clone for Formats<H> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<H> Copy for Formats<H> {}

impl<H: ImageHost> Formats<H> {
    /// A registry of `rows`.
    ///
    /// # Panics
    /// Without a row.
    pub const fn new(rows: &'static [&'static dyn Driver<H>]) -> Self {
        assert!(!rows.is_empty(), "a registry needs a format for files that no other recognises");
        Self(rows)
    }

    /// The formats of its rows.
    pub fn all(self) -> impl Iterator<Item = Format> {
        self.0.iter().map(|row| row.format())
    }

    /// The driver of the image `spec`, which is probed if its format is not given, without a lock if `unlocked`.
    ///
    /// # Errors
    /// [`ImageError`] when the file cannot be read, or there is no driver for the format.
    pub(crate) async fn driver(
        self,
        host: &H,
        spec: &ImageSpec,
        unlocked: bool,
    ) -> Result<&'static dyn Driver<H>, ImageError> {
        let path = &spec.path;
        match spec.format {
            ImageFormat::As(format) => self.row(format, path),
            ImageFormat::Probe => {
                let how = OpenOptions { unlocked, ..OpenOptions::default() };
                let head = head_of(&ImageFile::open(host, path, &how).await?).await?;
                match self.recognised(&head) {
                    Some(Recognised::Row(row)) => Ok(row),
                    Some(Recognised::Foreign(name)) => Err(ImageError::Refused {
                        path: path.clone(),
                        format: self.0[0].format().name(),
                        what: format!(
                            "it begins like an image in the format {name}, which has no driver here"
                        ),
                        advice: "convert it with qemu-img, or name the format if this is a disk that only looks so",
                    }),
                    None => Ok(self.0[0]),
                }
            }
        }
    }

    /// The format that a file beginning with `head` claims to have; `None` for a raw disk.
    fn recognised(self, head: &[u8]) -> Option<Recognised<H>> {
        if let Some(name) = foreign(head) {
            return Some(Recognised::Foreign(name));
        }
        self.0.iter().find(|row| row.recognises(head)).map(|row| Recognised::Row(*row))
    }

    fn row(self, format: Format, path: &str) -> Result<&'static dyn Driver<H>, ImageError> {
        let row = self.0.iter().find(|row| row.format() == format);
        row.copied().ok_or_else(|| ImageError::Refused {
            path: path.to_owned(),
            format: format.name(),
            what: "there is no driver for this format".to_owned(),
            advice: "use a program that has one",
        })
    }

    /// Reads the properties of the image `spec`, `unlocked` also while another process writes to it.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn describe(
        self,
        host: &H,
        spec: &ImageSpec,
        unlocked: bool,
    ) -> Result<Description, ImageError> {
        let how = OpenOptions { unlocked, ..OpenOptions::default() };
        self.driver(host, spec, unlocked).await?.describe(host.clone(), spec.path.clone(), how).await
    }

    /// Checks the metadata of the image `spec` without changing it, `unlocked` also while another process writes to it;
    /// `None` if its format has none.
    ///
    /// # Errors
    /// [`ImageError`] when any of it cannot be read, which is not damage.
    pub async fn check(
        self,
        host: &H,
        spec: &ImageSpec,
        unlocked: bool,
    ) -> Result<Option<CheckReport>, ImageError> {
        let how = OpenOptions { unlocked, ..OpenOptions::default() };
        match self.driver(host, spec, unlocked).await?.check(host.clone(), spec.path.clone(), how) {
            Some(check) => check.await.map(Some),
            None => Ok(None),
        }
    }

    /// Creates an empty image of `format` at `path`, durable together with its name.
    ///
    /// # Errors
    /// [`ImageError`]; after one a file may be left at `path`.
    pub async fn create(
        self,
        host: &H,
        format: Format,
        path: &str,
        image: NewImage,
    ) -> Result<(), ImageError> {
        let row = self.row(format, path)?;
        let refused = |what| Err(ImageError::Options { path: path.to_owned(), format: format.name(), what });
        let info = format.info();
        if let Some((name, _)) = image.options.iter().find(|o| info.options.iter().all(|i| i.name != o.0)) {
            return refused(format!("unknown option '{name}'; {}", options_of(info)));
        }
        if image.backing.is_some() && !info.has_backing {
            let all = self.0.iter().map(|row| row.format().info()).filter(|info| info.has_backing);
            let able: Vec<&str> = all.map(|info| info.name).collect();
            return refused(format!("the format has no backing files; use -f {}", able.join(" or -f ")));
        }
        // A mark that is left speaks of a file that had this name before. While that is there, the mark may be true.
        let marked = merging(host, path).await?.is_some() && !host.bug(&MERGE_MARK_STAYS);
        let gone = marked && file_id(host, path).await.map_err(ImageError::io("look for", path))?.is_none();
        if gone {
            unmark_merged(host, path).await?;
        }
        row.create(host.clone(), path.to_owned(), image).await?;
        if marked && !gone { unmark_merged(host, path).await } else { Ok(()) }
    }
}

/// What the first bytes of a file claim.
enum Recognised<H: 'static> {
    /// A format with a driver.
    Row(&'static dyn Driver<H>),
    /// A format without one.
    Foreign(&'static str),
}

/// The first bytes of a file.
async fn head_of<H: ImageHost>(file: &ImageFile<H>) -> Result<[u8; HEAD_BYTES], ImageError> {
    let mut head = [0; HEAD_BYTES];
    file.read_bytes(0, &mut head).await.map_err(ImageError::io("read", file.name.as_str()))?;
    Ok(head)
}

fn options_of(info: &FormatInfo) -> String {
    let names: Vec<&str> = info.options.iter().map(|o| o.name).collect();
    if names.is_empty() {
        "the format has none".to_owned()
    } else {
        format!("the format has {}", names.join(", "))
    }
}

/// For how long an image is opened anew after transient errors, in nanoseconds: as long as the scheduler, which is not
/// there yet, repeats a request. Operations that are themselves repeated may make it twice as long.
const OPEN_ANEW_NS: u64 = 4_000_000_000;

fn is_transient(error: &ImageError) -> bool {
    !error.is_in_use() && passes(error.errno())
}

impl<H: ImageHost> Formats<H> {
    /// Opens the image `spec` and everything below it.
    ///
    /// # Errors
    /// [`ImageError`] with the path of the file that caused it.
    pub async fn open(
        self,
        host: &H,
        spec: &ImageSpec,
        options: &OpenOptions,
    ) -> Result<Rc<dyn Node>, ImageError> {
        self.open_meant(host, spec, options, false).await
    }

    /// The same. If `any`, the caller has not named this file, but allowed any file as this format.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn open_meant(
        self,
        host: &H,
        spec: &ImageSpec,
        options: &OpenOptions,
        any: bool,
    ) -> Result<Rc<dyn Node>, ImageError> {
        let (mut patience, until_ns) = (Patience::until(), host.now_ns() + OPEN_ANEW_NS);
        loop {
            match self.open_level(host.clone(), spec.clone(), options.clone(), (any, Vec::new())).await {
                Err(error) if is_transient(&error) && patience.again_before(host, until_ns).await => {}
                result => return result,
            }
        }
    }

    /// Makes the disk of the image `spec`, which nobody has open, larger: it has `size_bytes` then, durably, and the
    /// new part reads as zeros. A crash or an error leaves it with its old size or the new one.
    ///
    /// # Errors
    /// [`ImageError`], also when the disk is larger already, or disks of its format cannot grow.
    pub async fn grow(
        self,
        host: &H,
        spec: &ImageSpec,
        options: &OpenOptions,
        size_bytes: u64,
    ) -> Result<(), ImageError> {
        let (mut patience, until_ns) = (Patience::until(), host.now_ns() + OPEN_ANEW_NS);
        loop {
            match self.grow_once(host, spec, options, size_bytes).await {
                Err(error) if is_transient(&error) && patience.again_before(host, until_ns).await => {}
                result => return result,
            }
        }
    }

    async fn grow_once(
        self,
        host: &H,
        spec: &ImageSpec,
        options: &OpenOptions,
        size_bytes: u64,
    ) -> Result<(), ImageError> {
        let driver = self.driver(host, spec, false).await?;
        let (path, format) = (spec.path.clone(), driver.format());
        let options = OpenOptions { write: true, unlocked: false, ..options.clone() };
        let image = OpenImage { path, options, format, formats: self, any: false, above: Vec::new() };
        match driver.grow(host.clone(), image, size_bytes) {
            Some(grown) => grown.await,
            None => Err(refused(
                &spec.path,
                format,
                "disks of this format cannot grow; convert it to another one".to_owned(),
            )),
        }
    }

    fn open_level(
        self,
        host: H,
        spec: ImageSpec,
        options: OpenOptions,
        (any, above): (bool, Vec<String>),
    ) -> LocalBoxFuture<Result<Rc<dyn Node>, ImageError>> {
        Box::pin(async move {
            let driver = self.driver(&host, &spec, options.unlocked).await?;
            let format = driver.format();
            driver.open(host, OpenImage { path: spec.path, options, format, formats: self, any, above }).await
        })
    }
}

impl<H: ImageHost> OpenImage<H> {
    /// The image at `path`, of `format`, as the top of a chain of `formats`.
    #[cfg(test)]
    pub(crate) fn alone(path: &str, format: Format, formats: Formats<H>, options: &OpenOptions) -> Self {
        let (options, above) = (options.clone(), Vec::new());
        Self { path: path.to_owned(), options, format, formats, any: false, above }
    }

    /// The error of opening a file with unusable contents; `advice` says what to do.
    pub fn refused(&self, what: String, advice: &'static str) -> ImageError {
        ImageError::Refused { path: self.path.clone(), format: self.format.name(), what, advice }
    }

    /// Opens the backing file `name` of the image, if the options allow it.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn backing(&self, host: &H, name: &[u8]) -> Result<Rc<dyn Node>, ImageError> {
        let Some(name) = std::str::from_utf8(name).ok().filter(|n| !n.is_empty() && !n.contains('\0')) else {
            let what = "the name of its backing file is not text".to_owned();
            return Err(self.refused(what, "restore the image from a backup"));
        };
        let backing = resolve(&self.path, name);
        if self.above.iter().chain([&self.path]).any(|above| same_path(above, &backing)) {
            let what = format!("its backing file {backing} is this image, or one that is based on it");
            return Err(self.refused(what, "give it another backing file"));
        }
        self.below_limit(1, &backing)?;
        let (format, any) = match self.options.backing.allowed(&backing) {
            Some(Backing::File(format)) => (format, false),
            Some(Backing::Any(format)) => (format, true),
            Some(Backing::Open(node)) => {
                let depth =
                    |(above, node): &(usize, Rc<dyn Node>)| above + usize::from(node.name().is_some());
                let images = nodes(Rc::clone(&node)).iter().map(depth).max().unwrap_or(0);
                self.below_limit(images, &backing)?;
                return Ok(node);
            }
            None => {
                let what = format!("it is based on {backing}, which may not be opened");
                return Err(self.refused(what, "allow it with --backing, or flatten the image"));
            }
        };
        let spec = ImageSpec { format, path: backing.clone() };
        let below = OpenOptions { write: false, ..self.options.clone() };
        let above = self.above.iter().chain([&self.path]).cloned().collect();
        let files = if host.bug(&PRIORITY_OF_TOP) { host.apart() } else { host.clone() };
        let opened = self.formats.open_level(files, spec, below, (any, above)).await;
        let opened = async {
            let node = opened?;
            // Locked, it is not marked any more.
            match check_merging(host, &backing, &self.path).await {
                Ok(()) => Ok(node),
                Err(why) => {
                    // It was only looked at.
                    let _unused = node.close().await;
                    Err(why)
                }
            }
        };
        let (path, opened) = (self.path.clone(), opened.await);
        opened.map_err(|error| ImageError::Backing { path, backing, error: Box::new(error) })
    }

    /// Fails if `file`, which is to be read as a raw disk because the caller said so of any file, begins like an image:
    /// its bytes would be shown as those of the disk.
    ///
    /// # Errors
    /// [`ImageError`], also if its first bytes cannot be read.
    pub(crate) async fn unlike_others(&self, file: &ImageFile<H>) -> Result<(), ImageError> {
        if !self.any {
            return Ok(());
        }
        let name = match self.formats.recognised(&head_of(file).await?) {
            Some(Recognised::Row(row)) => row.format().name(),
            Some(Recognised::Foreign(name)) => name,
            None => return Ok(()),
        };
        let what = format!("it begins like an image in the format {name}");
        Err(self
            .refused(what, "name the format of this file with --backing FORMAT:PATH, raw if it is a disk"))
    }

    /// 1 for the image that was asked for, one more with each below it.
    fn level(&self) -> usize {
        self.above.len() + 1
    }

    /// Fails if `images` more below this one make the chain too long.
    fn below_limit(&self, images: usize, backing: &str) -> Result<(), ImageError> {
        if self.level() + images <= MAX_CHAIN {
            return Ok(());
        }
        let what = if images == 1 {
            format!("there are more than {MAX_CHAIN} images above {backing}")
        } else {
            format!("its chain of {} images would be longer than {MAX_CHAIN}", self.level() + images)
        };
        Err(self.refused(what, "merge some of them"))
    }
}
