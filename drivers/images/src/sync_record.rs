//! Records a file's failed synchronisations outside the process.
//!
//! ```text
//!   begun ─► fdatasync ─► clean          success, or interrupted before a write was dropped
//!                 │  └──► lost           for as long as the host is up
//!                 ╳ the process dies: its successor finds "begun" and asks the file system
//! ```
//!
//! Linux reports a dropped write once, to the first caller that synchronises. If that process dies before it has
//! reported it, or is replaced afterwards, its successor would see success. The page is named after the file's identity
//! (not its path), and is valid for one boot: a reboot drops the page cache with the lost data, and the guest checks
//! its disk.

use crate::ImageHost;
use tap_host::{Errno, File, FileId, FileInfo, Patience, SharedPage, Tried};

tap_host::listed! {
    pub(super) BUGS: Bug;
    LOST_WITH_PROCESS = "lost-with-process",
        "that a synchronisation failed is forgotten when the process is replaced";
    BEGUN_SYNC_FORGOTTEN = "begun-sync-forgotten",
        "a synchronisation during which the process died counts as a success without a check";
    LOST_OUTLIVES_BOOT = "lost-outlives-boot",
        "a loss in a synchronisation is still held against the disk after a reboot";
    SYNC_PAGE_KEPT = "sync-page-kept",
        "the page about a file's synchronisations stays when the file is closed and nothing was lost";
}

/// Offset of the boot's number in the page: 16 bytes.
const BOOT: usize = 0;
/// Offset of the state, a number.
const STATE: usize = 16;

/// Retries of opening a page on a host that is short of memory or descriptors: about a second.
const LACK_REPEATS: u32 = 10;
/// Retries while another process owns the page and writes back a whole file system: about two minutes.
const OWNER_REPEATS: u32 = 130;

const CLEAN: u32 = 0;
const BEGUN: u32 = 1;
const LOST: u32 = 2;

/// The page of one file.
pub(crate) struct SyncRecord<H: ImageHost> {
    host: H,
    page: H::Region,
    name: String,
}

impl<H: ImageHost> SyncRecord<H> {
    /// The page of the file `id`; `open` opens a page by its name.
    ///
    /// # Errors
    /// An error that may pass ([`Tried::LeftPage`]) if the page may exist but cannot be opened; any other on a host
    /// that keeps none for us.
    async fn of(
        host: &H,
        what: &str,
        id: FileId,
        open: impl Fn(&str) -> Result<H::Region, Errno>,
    ) -> Result<Self, Errno> {
        let boot = host.boot_id()?;
        let name = page_name(what, id);
        let page = page(host, || open(&name)).await?;
        let mut seen = [0; 16];
        page.copy_in(BOOT, &mut seen);
        if seen != boot && !host.bug(&LOST_OUTLIVES_BOOT) {
            // Of an earlier boot, or new. The state is only valid with the number, which is written last.
            page.store_u32(STATE, CLEAN);
            page.copy_out(BOOT, &boot);
        }
        Ok(Self { host: host.clone(), page, name })
    }

    /// Takes over the page of `file` from its predecessors, if there can be one, and returns whether data may be lost.
    pub(crate) async fn take_up(host: &H, file: &H::File, info: &FileInfo) -> (Option<Self>, bool) {
        let record = match Self::of(host, "sync", info.id, |name| host.region(name)).await {
            Ok(record) => record,
            // A predecessor's page cannot be read. A host without space has no page there.
            Err(error) => return (None, Tried::LeftPage.may_pass(error)),
        };
        let lost = match record.page.load_u32(STATE) {
            CLEAN => false,
            BEGUN if !host.bug(&BEGUN_SYNC_FORGOTTEN) => died_in_sync(host, file, info).await,
            BEGUN => false,
            _ => !host.bug(&LOST_WITH_PROCESS),
        };
        record.ended(lost);
        (Some(record), lost)
    }

    /// Removes the page that a killed process has left of a file that nobody writes to, unless something was lost.
    pub(crate) fn drop_left(host: &H, info: &FileInfo) {
        let name = page_name("sync", info.id);
        if !host.region_names().is_ok_and(|names| names.contains(&name)) {
            return;
        }
        // In use by another reader that does the same.
        let Ok(page) = host.region(&name) else { return };
        drop(Self { host: host.clone(), page, name });
    }

    /// Called before a synchronisation begins.
    pub(crate) fn begun(&self) {
        self.page.store_u32(STATE, BEGUN);
    }

    /// Called once it has ended, or its result has become known.
    pub(crate) fn ended(&self, lost: bool) {
        self.page.store_u32(STATE, if lost { LOST } else { CLEAN });
    }
}

impl<H: ImageHost> Drop for SyncRecord<H> {
    fn drop(&mut self) {
        if self.page.load_u32(STATE) == CLEAN && !self.host.bug(&SYNC_PAGE_KEPT) {
            self.host.remove_region(&self.name);
        }
    }
}

fn page_name(what: &str, id: FileId) -> String {
    format!("{what}-{:x}-{:x}-{:x}", id.device, id.inode, id.generation)
}

/// Opens a page with `open`; retries for about a second if the host lacks resources, and two minutes if the page has
/// another owner.
///
/// # Errors
/// Those of `open`; `EBUSY` if the other owner keeps it.
async fn page<H: ImageHost>(
    host: &H,
    open: impl Fn() -> Result<H::Region, Errno>,
) -> Result<H::Region, Errno> {
    let (mut lack, mut owner) = (Patience::of(LACK_REPEATS), Patience::of(OWNER_REPEATS));
    loop {
        let result = open();
        let again = match &result {
            Err(Errno::EBUSY) => owner.again(host).await,
            Err(error) if Tried::LeftPage.may_pass(*error) => lack.again(host).await,
            _ => false,
        };
        if !again {
            return result;
        }
    }
}

/// Whether a synchronisation whose caller died in it may have failed. For a direct file there is no way to ask: a loss
/// of the drive's cache at that moment is not detected.
async fn died_in_sync<H: ImageHost>(host: &H, file: &H::File, info: &FileInfo) -> bool {
    if info.direct {
        return false;
    }
    // The file system also reports a loss once, and several files may need the answer: one asks at a time.
    let whole = FileId { device: info.id.device, inode: 0, generation: 0 };
    let told = SyncRecord::of(host, "sync-all", whole, |name| host.own_region(name)).await;
    let Ok(told) = told else { return true };
    let before = told.page.load_u32(STATE) == LOST;
    // If this process dies with the answer, no other gets it: record the worst first.
    told.ended(true);
    // If the file system cannot tell, assume a loss.
    let lost = file.file_system_lost().await.unwrap_or(true) || before;
    told.ended(lost);
    lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;
    use tap_host::{Files, OpenMode};

    /// Whether data of a process that died in a synchronisation counts as lost, while another process owns the file
    /// system's page for the first `tries` tries.
    fn lost_while_owned(tries: u32) -> bool {
        let world = World::new(1);
        world.put("/disk", vec![0; 512]);
        world.owned_by_another(tries);
        world.block_on({
            let world = world.clone();
            async move {
                let file = world.open("/disk", OpenMode::WRITE).await.unwrap();
                let info = file.info().await.unwrap();
                let (record, _) = SyncRecord::take_up(&world, &file, &info).await;
                record.as_ref().unwrap().begun();
                // The process dies here.
                std::mem::forget(record);
                SyncRecord::take_up(&world, &file, &info).await.1
            }
        })
    }

    #[test]
    fn the_wait_for_another_owner_is_bounded() {
        assert!(!lost_while_owned(0));
        assert!(!lost_while_owned(OWNER_REPEATS));
        assert!(lost_while_owned(OWNER_REPEATS + 1), "without an answer a loss is assumed");
        assert!(lost_while_owned(u32::MAX));
    }
}
