//! Files of the repository, and files that are made.

use super::Result;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The root of the repository.
pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Writes a file and the folders above it.
pub(super) fn put(path: &Path, data: &[u8], mode: u32) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let say = |e| format!("failed to write {}: {e}", path.display());
    fs::write(path, data).map_err(say)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(say)?)
}
