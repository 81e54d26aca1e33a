//! The I/O priority of files.

use crate::{
    BLOCK, FileHost, OrFail, Outcome, Place, Test, holds, pattern, read, same, same_bytes, tests, write,
};
use tap_host::{Errno, File, IoPriority, OpenMode, ZeroMode};

/// All bodies; they need a file system.
pub fn on_files<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![
        a_priority_is_that_of_a_group,
        a_priority_is_had_or_refused_as_a_whole,
        files_do_the_same_at_every_priority,
    ]
}

fn priority(text: &str) -> Result<IoPriority, String> {
    text.parse().map_err(|why| format!("failed to name {text}: {why}"))
}

async fn a_priority_is_that_of_a_group<H: FileHost>(place: Place<H>) -> Outcome {
    let host = place.host;
    let (one, other) = (host.apart(), host.apart());
    same("that of a new group", one.priority(), None)?;
    let (idle, low) = (priority("idle")?, priority("best-effort:7")?);
    one.set_priority(Some(idle)).await.or_fail("set a priority")?;
    let clone = one.clone();
    same("that of a clone", clone.priority(), Some(idle))?;
    same("that of another group", other.priority(), None)?;
    same("that of all other files", host.priority(), None)?;
    same("that of a group begun in it", one.apart().priority(), None)?;
    clone.set_priority(Some(low)).await.or_fail("set a priority again")?;
    same("what a clone has set", one.priority(), Some(low))?;
    one.set_priority(None).await.or_fail("take a priority away")?;
    same("that of the process", clone.priority(), None)
}

async fn a_priority_is_had_or_refused_as_a_whole<H: FileHost>(place: Place<H>) -> Outcome {
    let host = place.host.apart();
    let low = priority("best-effort:6")?;
    host.set_priority(Some(low)).await.or_fail("set a priority")?;
    for text in ["realtime:0", "realtime:7"] {
        let asked = priority(text)?;
        match host.set_priority(Some(asked)).await {
            Ok(()) => same("what was set", host.priority(), Some(asked))?,
            Err(error) => {
                same("why it is refused", error, Errno::EPERM)?;
                same("what was set before", host.priority(), Some(low))?;
            }
        }
    }
    Ok(())
}

async fn files_do_the_same_at_every_priority<H: FileHost>(place: Place<H>) -> Outcome {
    let host = place.host.apart();
    let place = Place { host: host.clone(), ..place };
    let before = place.create("a").await?;
    for (n, text) in (1..).zip(["", "idle", "best-effort:0", "best-effort:7", "", "idle"]) {
        let asked = if text.is_empty() { None } else { Some(priority(text)?) };
        host.set_priority(asked).await.or_fail("set a priority")?;
        let path = place.path("a");
        let after = host.open(&path, place.mode(OpenMode::WRITE)).await.or_fail("open a file")?;
        for (file, tag) in [(&before, n), (&after, n + 100)] {
            write(file, 0, &pattern(tag, 4 * BLOCK)).await?;
            file.sync_data().await.or_fail("synchronise")?;
            same_bytes(text, &read(file, 0, 8 * BLOCK).await?, &pattern(tag, 4 * BLOCK))?;
            let zeroed = file.zero_at(0, BLOCK as u64, ZeroMode::Unmap).await;
            holds("zeros are made or not supported", matches!(zeroed, Ok(()) | Err(Errno::EOPNOTSUPP)))?;
            file.set_size(2 * BLOCK as u64).await.or_fail("set the size")?;
            same("size", file.info().await.or_fail("look")?.size_bytes, 2 * BLOCK as u64)?;
            let found = file.extents_at(BLOCK as u64, 1).await.or_fail("look for holes")?;
            same("what was written", found.first().map(|extent| extent.data), Some(true))?;
        }
        host.sync_parent(&path).await.or_fail("make a name durable")?;
    }
    Ok(())
}
