//! What is known of a file's synchronisations, kept outside the process.
//!
//! ```text
//!   begun ─► fdatasync ─► clean          ok, or interrupted before anything was given up
//!                 │  └──► lost           for as long as the host is up
//!                 ╳ the process dies: its successor finds "begun" and asks the file system
//! ```
//!
//! Linux tells of a write that it gave up once, to whoever synchronises first. If that one dies before it has said so,
//! or is replaced after it has, its successor would be told that all is well. The page is called after the file (not
//! its name), and holds for one boot: what was lost is gone for good with the page cache, and a guest has to look.

use crate::ImageHost;
use crate::patience::Patience;
use tap_host::{Bug, Errno, File, FileId, FileInfo, SharedPage};

/// Where in the page the number of the boot is: 16 bytes.
const BOOT: usize = 0;
/// Where the state is: a number.
const STATE: usize = 16;

/// Repetitions of opening a page on a host that is short of memory or descriptors: about a second.
const LACK_REPEATS: u32 = 10;
/// Repetitions while somebody else owns the page, who writes back all of a file system meanwhile: about two minutes.
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
    /// The page of the file `id`, which `open` opens by its name.
    ///
    /// # Errors
    /// One that [`may_pass`] where the page may be there and cannot be had; any other on a host that keeps none for us.
    async fn of(
        host: &H,
        what: &str,
        id: FileId,
        open: impl Fn(&str) -> Result<H::Region, Errno>,
    ) -> Result<Self, Errno> {
        let boot = host.boot_id()?;
        let name = format!("{what}-{:x}-{:x}-{:x}", id.device, id.inode, id.generation);
        let page = page(host, || open(&name)).await?;
        let mut seen = [0; 16];
        page.copy_in(BOOT, &mut seen);
        if seen != boot && !host.bug(Bug::LostOutlivesBoot) {
            // Of an earlier boot, or new. Without the number the state counts for nothing.
            page.store_u32(STATE, CLEAN);
            page.copy_out(BOOT, &boot);
        }
        Ok(Self { host: host.clone(), page, name })
    }

    /// Takes up what predecessors left of `file`: its page, if there can be one, and whether something may be lost.
    pub(crate) async fn take_up(host: &H, file: &H::File, info: &FileInfo) -> (Option<Self>, bool) {
        let record = match Self::of(host, "sync", info.id, |name| host.region(name)).await {
            Ok(record) => record,
            // What a predecessor left cannot be looked at. A host without space has none there already.
            Err(error) => return (None, may_pass(error)),
        };
        let lost = match record.page.load_u32(STATE) {
            CLEAN => false,
            BEGUN if !host.bug(Bug::BegunSyncForgotten) => died_in_it(host, file, info).await,
            BEGUN => false,
            _ => !host.bug(Bug::LostWithProcess),
        };
        record.ended(lost);
        (Some(record), lost)
    }

    /// A synchronisation is about to begin.
    pub(crate) fn begun(&self) {
        self.page.store_u32(STATE, BEGUN);
    }

    /// It has ended, or its end has become known.
    pub(crate) fn ended(&self, lost: bool) {
        self.page.store_u32(STATE, if lost { LOST } else { CLEAN });
    }
}

impl<H: ImageHost> Drop for SyncRecord<H> {
    fn drop(&mut self) {
        if self.page.load_u32(STATE) == CLEAN {
            self.host.remove_region(&self.name);
        }
    }
}

/// Whether a page may be there that cannot be had at the moment: for want of memory or a descriptor, or as it cannot be
/// read.
fn may_pass(error: Errno) -> bool {
    matches!(error, Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE | Errno::EINTR | Errno::EIO)
}

/// A page that `open` opens; waits about a second for a host that is short of something, and two minutes for another
/// owner.
///
/// # Errors
/// As `open`'s; `EBUSY` where the other owner does not come to an end.
async fn page<H: ImageHost>(
    host: &H,
    open: impl Fn() -> Result<H::Region, Errno>,
) -> Result<H::Region, Errno> {
    let (mut lack, mut owner) = (Patience::of(LACK_REPEATS), Patience::of(OWNER_REPEATS));
    loop {
        let result = open();
        let again = match &result {
            Err(Errno::EBUSY) => owner.again(host).await,
            Err(error) if may_pass(*error) => lack.again(host).await,
            _ => false,
        };
        if !again {
            return result;
        }
    }
}

/// Whether a synchronisation whose caller died in it may have failed. Below a direct file there is nobody to ask: what
/// a drive loses of its own cache at that very moment is not found out.
async fn died_in_it<H: ImageHost>(host: &H, file: &H::File, info: &FileInfo) -> bool {
    if info.direct {
        return false;
    }
    // The file system tells once as well, and several files may want to know: one asks at a time.
    let whole = FileId { device: info.id.device, inode: 0, generation: 0 };
    let told = SyncRecord::of(host, "sync-all", whole, |name| host.own_region(name)).await;
    let Ok(told) = told else { return true };
    let before = told.page.load_u32(STATE) == LOST;
    // Who dies with the answer leaves the worst: nobody is told again.
    told.ended(true);
    // Where nothing can be said, nothing is promised.
    let lost = file.file_system_lost().await.unwrap_or(true) || before;
    told.ended(lost);
    lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;
    use tap_host::{Files, OpenMode};

    /// Whether the file of a process that died in a synchronisation may be lost, while somebody else owns the page
    /// about the file system for so many looks.
    fn lost_while_owned(looks: u32) -> bool {
        let world = World::new(1);
        world.put("/disk", vec![0; 512]);
        world.owned_by_another(looks);
        world.block_on({
            let world = world.clone();
            async move {
                let file = world.open("/disk", OpenMode::WRITE).await.unwrap();
                let info = file.info().await.unwrap();
                let (record, _) = SyncRecord::take_up(&world, &file, &info).await;
                record.as_ref().unwrap().begun();
                // As a death leaves it.
                std::mem::forget(record);
                SyncRecord::take_up(&world, &file, &info).await.1
            }
        })
    }

    #[test]
    fn another_owner_is_waited_for_and_not_for_ever() {
        assert!(!lost_while_owned(0));
        assert!(!lost_while_owned(OWNER_REPEATS));
        assert!(lost_while_owned(OWNER_REPEATS + 1), "where nothing can be said, nothing is promised");
        assert!(lost_while_owned(u32::MAX));
    }
}
