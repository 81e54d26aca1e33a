//! An image loaded from a real file, with its backing files.

use super::{ALL, Broken, FormatModel, ImageMap};
use kernel_model::{Content, PAGE, PageMap};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use tap_host::SECTOR_BYTES;
use tap_images::HEAD_BYTES;

/// Maximum size of a real image's disk: histories are kept per sector.
const REAL_DISK_MAX: u64 = 2 << 30;
/// Maximum size of a loaded file.
const REAL_FILE_MAX: u64 = 1 << 30;
/// Maximum length of a chain of backing files.
const CHAIN_MAX: usize = 8;

/// An image from a real file, with its backing files.
#[derive(Debug)]
pub struct RealImage {
    path: String,
    /// Names on the simulated host, and bytes; the image itself comes first.
    files: Vec<(String, Vec<u8>)>,
}

/// A real image that the worlds of one thread share.
pub struct LoadedImage {
    /// Files by name; the image itself comes first.
    pub files: Vec<(String, Content)>,
    /// The format of the image itself.
    pub model: &'static dyn FormatModel,
    /// What the guest sees.
    pub view: PageMap,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes in a cluster, as a power of two.
    pub cluster_bits: u32,
}

thread_local! {
    static LOADED: RefCell<Option<(String, Rc<LoadedImage>)>> = const { RefCell::new(None) };
}

impl RealImage {
    /// Reads the image at `path`, of a format with metadata, and its backing files.
    ///
    /// # Errors
    /// One line with the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, String> {
        let mut image = Self { path: path.display().to_string(), files: Vec::new() };
        let mut next = Some(path.to_path_buf());
        while let Some(path) = next.take() {
            if image.files.len() == CHAIN_MAX {
                return Err(format!("{} has more than {CHAIN_MAX} files below it", image.path));
            }
            let shown = path.display().to_string();
            let size = std::fs::metadata(&path).map_err(|e| format!("failed to open {shown}: {e}"))?.len();
            if size > REAL_FILE_MAX {
                return Err(format!("{shown} is {size} bytes long, at most {REAL_FILE_MAX} are loaded"));
            }
            let bytes = std::fs::read(&path).map_err(|e| format!("failed to read {shown}: {e}"))?;
            let walked = walk(&content_of(&bytes));
            if walked.is_none() && image.files.is_empty() {
                let known: Vec<&str> = walkable().map(|model| model.format().name()).collect();
                return Err(format!("{shown} is not an image of the format {}", known.join(" or ")));
            }
            if let Some((_, walked)) = walked {
                let map = walked.map_err(|(rule, text)| format!("{shown}: {rule}: {text}"))?;
                if map.size > REAL_DISK_MAX || map.size == 0 || !map.size.is_multiple_of(SECTOR_BYTES) {
                    return Err(format!(
                        "{shown} has a disk of {} bytes, which is empty or too large here",
                        map.size
                    ));
                }
                next = map.backing.map(|name| path.parent().unwrap_or(Path::new("")).join(name));
            }
            image.files.push((shown, bytes));
        }
        Ok(image)
    }

    /// One line that describes it.
    pub fn describe(&self) -> String {
        let loaded = self.loaded();
        let map = walk(&loaded.files[0].1).and_then(|(_, map)| map.ok()).unwrap_or_default();
        let packed = (0..map.entries.len() as u64).filter(|c| map.compressed(*c).is_some()).count();
        let below = match &self.files[1..] {
            [] => "no backing file".to_string(),
            files => {
                format!("over {}", files.iter().map(|f| f.0.as_str()).collect::<Vec<_>>().join(" over "))
            }
        };
        format!(
            "{}: {}, {} bytes, clusters of {}, {} mapped ({packed} compressed), {below}",
            self.path,
            loaded.model.format(),
            loaded.size_bytes,
            1 << loaded.cluster_bits,
            map.mapped
        )
    }

    /// Path of the image.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The image as the worlds of this thread share it.
    pub fn loaded(&self) -> Rc<LoadedImage> {
        if let Some(loaded) =
            LOADED.with_borrow(|l| l.as_ref().filter(|l| l.0 == self.path).map(|l| Rc::clone(&l.1)))
        {
            return loaded;
        }
        let files: Vec<(String, Content)> =
            self.files.iter().map(|(name, bytes)| (name.clone(), content_of(bytes))).collect();
        let mut view = PageMap::default();
        let mut top = (super::of(super::RAW), 0, 9);
        for (_, content) in files.iter().rev() {
            // From the bottom up, each layer covers those below. A file that has no valid metadata is raw.
            match walk(content) {
                Some((model, Ok(map))) => {
                    let mut cluster_bytes = vec![0; 1 << map.cluster_bits];
                    for cluster in 0..map.entries.len() as u64 {
                        if let Ok(Some(())) = map.read_cluster(content, cluster, &mut cluster_bytes) {
                            view.write(cluster << map.cluster_bits, &cluster_bytes);
                        }
                    }
                    top = (model, map.size, map.cluster_bits);
                }
                _ => view = content.pages.clone(),
            }
        }
        let (model, size_bytes, cluster_bits) = top;
        view.truncate(size_bytes);
        let loaded = Rc::new(LoadedImage { files, model, view, size_bytes, cluster_bits });
        LOADED.with_borrow_mut(|l| *l = Some((self.path.clone(), Rc::clone(&loaded))));
        loaded
    }
}

fn walkable() -> impl Iterator<Item = &'static dyn FormatModel> {
    ALL.iter().copied().filter(|model| model.has_metadata())
}

/// The format whose magic a file has, if that has metadata, and its parsed metadata.
fn walk(content: &Content) -> Option<(&'static dyn FormatModel, Result<ImageMap, Broken>)> {
    let mut head = vec![0; HEAD_BYTES.min(content.size as usize)];
    content.pages.read(0, &mut head);
    walkable().find_map(|model| {
        let metadata = model.metadata().filter(|metadata| metadata.recognises(&head))?;
        Some((model, metadata.walk(content)))
    })
}

/// A file of these bytes; pages of zeros are holes.
pub fn content_of(bytes: &[u8]) -> Content {
    let mut content = Content { size: bytes.len() as u64, ..Content::default() };
    for (i, page) in bytes.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        content.pages.write((i * PAGE) as u64, page);
    }
    content
}
