//! What the merges of an image into its backing file have in common, whether anybody has them open or not.
//!
//! ```text
//!   before             merging                     done                     keeping the name
//!   image ─► base      image ─► base (marked)      image ─► base            image (was base)
//!                        └── what it has ─►┘
//! ```
//!
//! # Contract
//!
//! * Whatever fails, the image shows what it showed, and so does every image above it. The base is marked before its
//!   first byte changes (see [`mark_merging`]); until the merge was begun again and has succeeded, nothing else can be
//!   opened above the base.
//! * A merge that is done: the base shows what the image shows, durably, and the mark is gone.
//! * To keep the name, the files exchange theirs once the merged one is durable. What is left of the image then has the
//!   other name, and is removed together with the mark.

use tap_control::Refusal;
use tap_core::{NodeName, Source};
use tap_host::{Errno, File, FileId, OpenMode};
use tap_images::{
    Backing, BackingPolicy, Description, Formats, ImageError, ImageFormat, ImageHost, ImageSpec,
    check_merging, file_id, folder, mark_merging, merging, name_beside, same_path, sync_name, unmark_merged,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    MERGE_RENAMED = "merge-renamed", "an image that is partly merged into its base gets another name than its mark has";
    MERGE_ANY_FILE = "merge-any-file", "a merge gives away the name of a file that somebody has put in the place of an image";
    MERGE_NEXT = "merge-next", "a merge that is repeated after it was completed merges the next image, too";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    MERGE_REPEATED = "merge-repeated", "a merge that had been cut short was completed";
    MERGE_CLEARED = "merge-cleared", "only what a completed merge had left was removed";
}

/// The images, and what becomes of them.
#[derive(Clone, Debug)]
pub(crate) struct Merge {
    pub(crate) image: ImageSpec,
    pub(crate) base: ImageSpec,
    pub(crate) keeps_name: bool,
    /// What the mark of the base calls the image.
    name: String,
    /// The base was marked before.
    repeated: bool,
    /// The files of image and base, once it has begun.
    files: [Option<FileId>; 2],
}

impl Merge {
    /// The merge of `image` into its backing file, which must be `base` if that is given, and which `policy` must
    /// allow; `None` if it was done before, and only what it had left had to be removed.
    ///
    /// # Errors
    /// [`Refusal`]: nothing has changed.
    pub(crate) async fn plan<H: ImageHost>(
        host: &H,
        image: &ImageSpec,
        base: Option<&str>,
        policy: &BackingPolicy,
        keeps_name: bool,
    ) -> Result<Option<Self>, Refusal> {
        let about = Formats::shipped().describe(host, image, false).await.map_err(of)?;
        let images = Images { image, about: &about };
        if images.is_merged(host, base).await? && !host.bug(&MERGE_NEXT) {
            host.mark(&MERGE_CLEARED);
            return Ok(None);
        }
        let mut merge = images.merge(policy, keeps_name)?;
        check_merging(host, &merge.base.path, &image.path).await.map_err(of)?;
        images.check_file(host, &merge.base.path).await?;
        if keeps_name {
            images.check_names(host, &merge.base).await?;
        }
        merge.repeated = merging(host, &merge.base.path).await.map_err(of)?.is_some();
        if merge.repeated {
            host.mark(&MERGE_REPEATED);
        }
        Ok(Some(merge))
    }

    /// Marks the base, which has `base_bytes`, and the image `image_bytes`.
    ///
    /// # Errors
    /// [`Refusal`]: nothing has changed.
    pub(crate) async fn begin<H: ImageHost>(
        &mut self,
        host: &H,
        image_bytes: u64,
        base_bytes: u64,
    ) -> Result<(), Refusal> {
        let base = &self.base.path;
        if image_bytes != base_bytes {
            let why = format!("it has {image_bytes} bytes, and {base} has {base_bytes}");
            return Err(refused(&self.image, Errno::EMEDIUMTYPE, &why));
        }
        self.files = self.files_now(host).await?;
        match mark_merging(host, base, &self.name).await {
            Ok(()) => Ok(()),
            // Perhaps it has the mark.
            Err(why) => Err(self.give_up(host, of(why)).await),
        }
    }

    /// Takes back the mark that [`Merge::begin`] may have made, before anything was written to the base; returns `why`,
    /// and what is left.
    pub(crate) async fn give_up<H: ImageHost>(&self, host: &H, why: Refusal) -> Refusal {
        let base = &self.base.path;
        let withdrawn = async {
            let of_another =
                merging(host, base).await?.is_some_and(|other| !same_path(&other, &self.image.path));
            if self.repeated || of_another { Ok(()) } else { unmark_merged(host, base).await }
        };
        match withdrawn.await {
            Ok(()) => why,
            Err(left) => Refusal::new(why.error, format!("{}; its mark is left: {left}", why.words)),
        }
    }

    async fn files_now<H: ImageHost>(&self, host: &H) -> Result<[Option<FileId>; 2], Refusal> {
        let id =
            async |path: &str| file_id(host, path).await.map_err(ImageError::io("look at", path)).map_err(of);
        Ok([id(&self.image.path).await?, id(&self.base.path).await?])
    }

    /// Completes it, once the base is durable.
    ///
    /// # Errors
    /// [`Refusal`].
    pub(crate) async fn complete<H: ImageHost>(&self, host: &H) -> Result<(), Refusal> {
        match self.keeps_name {
            true => self.exchange(host).await,
            false => unmark_merged(host, &self.base.path)
                .await
                .map_err(|error| self.failed(error.errno(), &error.to_string())),
        }
    }

    /// The merged image gets the name of the other one, and that one is removed.
    async fn exchange<H: ImageHost>(&self, host: &H) -> Result<(), Refusal> {
        let [image, base] = [&self.image.path, &self.base.path];
        let now = self.files_now(host).await.map_err(|why| self.failed(why.error, &why.words))?;
        if now != self.files && !host.bug(&MERGE_ANY_FILE) {
            return Err(self.failed(Errno::ESTALE, "one of the names has another file by now"));
        }
        let before = now[1];
        if let Err(error) = host.exchange(image, base).await {
            let hint = match error {
                Errno::EXDEV => "; they are on two file systems",
                Errno::EINVAL | Errno::ENOSYS => "; this file system cannot: merge it without its name",
                _ => "",
            };
            // It may have happened all the same.
            if file_id(host, image).await != Ok(before) {
                return Err(self.failed(error, &format!("exchange {image} and {base}: {error}{hint}")));
            }
        }
        let durable = sync_name(host, image).await;
        durable.map_err(|error| self.failed(error.errno(), &error.to_string()))?;
        clear(host, &self.image, base).await
    }

    /// The error of a merge that failed after its base was marked.
    pub(crate) fn failed(&self, error: Errno, why: &str) -> Refusal {
        let [image, base] = [&self.image.path, &self.base.path];
        let next = format!("{image} is as it was, and {base} may be partly merged; merge it again");
        Refusal { error, words: format!("merge {image} into {base}: {why}; {next}") }
    }
}

/// The refusal for an error of an image.
fn of(error: ImageError) -> Refusal {
    Refusal::new(error.errno(), error.to_string())
}

/// Whether an image that is called `own` has the bytes of an extent itself.
///
/// # Errors
/// Where that cannot be known.
pub(crate) fn is_own(source: &Source, own: Option<&NodeName>) -> Result<bool, Errno> {
    match source {
        Source::Nothing => Ok(false),
        Source::Node { name, .. } => Ok(name.as_ref() == own),
        Source::Unreadable { error, .. } => Err(*error),
    }
}

fn refused(image: &ImageSpec, error: Errno, why: &str) -> Refusal {
    Refusal { error, words: format!("merge {}: {why}", image.path) }
}

/// Fails if the image above the one at `base` cannot have another name, because the mark of a merge names it.
///
/// # Errors
/// [`ImageError`].
pub(crate) async fn check_named<H: ImageHost>(host: &H, base: &str) -> Result<(), ImageError> {
    match merging(host, base).await? {
        Some(other) if !host.bug(&MERGE_RENAMED) => Err(ImageError::Merging { path: base.to_owned(), other }),
        _ => Ok(()),
    }
}

/// Removes what is left of an image that has given its name to the merged one, and then the mark.
async fn clear<H: ImageHost>(host: &H, image: &ImageSpec, base: &str) -> Result<(), Refusal> {
    match host.remove(base).await {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(error) => {
            return Err(refused(image, error, &format!("it is merged, but {base} is left: {error}")));
        }
    }
    // Without the mark nobody would know what the rest is.
    let cleared = async {
        sync_name(host, base).await?;
        unmark_merged(host, base).await
    };
    let left =
        |why: ImageError| refused(image, why.errno(), &format!("it is merged, but its mark is left: {why}"));
    cleared.await.map_err(left)
}

/// An image that is to be merged.
struct Images<'a> {
    image: &'a ImageSpec,
    about: &'a Description,
}

impl Images<'_> {
    fn refused(&self, error: Errno, why: &str) -> Refusal {
        refused(self.image, error, why)
    }

    /// Whether the image already is the merged one, and only the rest had to be removed.
    async fn is_merged<H: ImageHost>(&self, host: &H, base: Option<&str>) -> Result<bool, Refusal> {
        let (Some(base), backing) = (base, self.about.backing_path.as_ref()) else { return Ok(false) };
        if backing.is_some_and(|path| same_path(path, base)) {
            return Ok(false);
        }
        let other = merging(host, base).await.map_err(of)?;
        if other.is_none_or(|other| !same_path(&other, &self.image.path)) {
            let has = match backing {
                Some(path) => format!("its backing file is {path}, not {base}, unless it is merged already"),
                None => format!("it has no backing file, unless {base} is merged already"),
            };
            return Err(self.refused(Errno::EINVAL, &has));
        }
        self.check_rest(host, base).await?;
        clear(host, self.image, base).await?;
        Ok(true)
    }

    /// Fails if the file at `base` is not the rest of the image, which called the base its backing file.
    async fn check_rest<H: ImageHost>(&self, host: &H, base: &str) -> Result<(), Refusal> {
        let rest = ImageSpec { format: ImageFormat::Probe, path: base.to_owned() };
        let names = match Formats::shipped().describe(host, &rest, false).await {
            Ok(rest) => rest.backing_path,
            Err(error) if error.errno() == Errno::ENOENT => return Ok(()),
            Err(error) => return Err(of(error)),
        };
        if names.is_some_and(|path| same_path(&path, base)) {
            return Ok(());
        }
        let why = format!("it is not based on {base}, which is partly merged with another file of this name");
        Err(self.refused(Errno::EINVAL, &why))
    }

    fn merge(&self, policy: &BackingPolicy, keeps_name: bool) -> Result<Merge, Refusal> {
        let Some(path) = self.about.backing_path.clone() else {
            return Err(self.refused(Errno::EINVAL, "it has no backing file"));
        };
        let format = match policy.allowed(&path) {
            // Its bytes are not looked at: they may be those of any format.
            Some(Backing::Any(ImageFormat::As(format))) if !format.info().has_backing => {
                let why = format!("name its backing file, with --backing {format}:{path}");
                return Err(self.refused(Errno::EACCES, &why));
            }
            Some(Backing::File(format) | Backing::Any(format)) => format,
            Some(Backing::Open(_)) | None => {
                let why = format!("its backing file {path} may not be opened; allow it with --backing");
                return Err(self.refused(Errno::EACCES, &why));
            }
        };
        let Some(name) = name_beside(&path, &self.image.path) else {
            let why = format!("name it by its absolute path, since {path} is in another folder");
            return Err(self.refused(Errno::EINVAL, &why));
        };
        let (image, base) = (self.image.clone(), ImageSpec { format, path });
        Ok(Merge { image, base, keeps_name, name, repeated: false, files: [None; 2] })
    }

    /// Whether a mark beside the base would last.
    async fn check_file<H: ImageHost>(&self, host: &H, base: &str) -> Result<(), Refusal> {
        let look = async { host.open(base, OpenMode::READ).await?.info().await };
        let info = look.await.map_err(ImageError::io("look at", base)).map_err(of)?;
        if info.block_device {
            let why = format!("{base} is a block device, beside which no mark would last; convert the image");
            return Err(self.refused(Errno::EINVAL, &why));
        }
        Ok(())
    }

    /// Whether the base can have the image's name.
    async fn check_names<H: ImageHost>(&self, host: &H, base: &ImageSpec) -> Result<(), Refusal> {
        if folder(&self.image.path) != folder(&base.path) {
            let why = format!("{} is in another folder, and what is below it is looked for there", base.path);
            return Err(self.refused(Errno::EINVAL, &why));
        }
        let below = Formats::shipped().describe(host, base, false).await.map_err(of)?;
        if below.format != self.about.format {
            let (path, other, own) = (&base.path, below.format, self.about.format);
            let why = format!("{path} has the format {other}, and cannot have the name of a {own}");
            return Err(self.refused(Errno::EMEDIUMTYPE, &why));
        }
        match below.backing_path {
            Some(next) => check_named(host, &next).await.map_err(of),
            None => Ok(()),
        }
    }
}
