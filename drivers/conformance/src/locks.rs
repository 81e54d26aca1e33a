//! Locks: one writer or many readers, for as long as the file is open.

use crate::{BLOCK, FileHost, OrFail, Outcome, Place, Test, buffers, pattern, read, same, same_bytes, tests};
use tap_host::LockKind::{Exclusive, Shared, Sole};
use tap_host::{Errno, File, OpenMode, poll_once};

/// All bodies; they need a file system.
pub fn on_files<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![
        one_writer_keeps_all_others_out,
        readers_share_and_keep_writers_out,
        a_lock_can_be_raised_and_lowered,
        a_refused_lock_leaves_the_old_one,
        a_sole_holder_keeps_all_others_out,
        clones_hold_one_lock,
        a_lock_goes_with_the_last_clone,
        a_lock_outlives_its_last_operation,
        a_file_open_for_reading_can_share,
    ]
}

/// Two descriptors of one file.
async fn two<H: FileHost>(place: &Place<H>) -> Result<(H::File, H::File), String> {
    Ok((place.create("a").await?, place.open("a").await?))
}

async fn one_writer_keeps_all_others_out<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    one.lock(Exclusive).await.or_fail("lock")?;
    same("a second writer", two.lock(Exclusive).await, Err(Errno::EAGAIN))?;
    same("a reader", two.lock(Shared).await, Err(Errno::EAGAIN))?;
    same("the writer again", one.lock(Exclusive).await, Ok(()))?;
    drop(one);
    same("the next writer", two.lock(Exclusive).await, Ok(()))
}

async fn readers_share_and_keep_writers_out<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    let three = place.open("a").await?;
    same("a reader", one.lock(Shared).await, Ok(()))?;
    same("another", two.lock(Shared).await, Ok(()))?;
    same("a writer", three.lock(Exclusive).await, Err(Errno::EAGAIN))?;
    drop(one);
    same("a writer beside one reader", three.lock(Exclusive).await, Err(Errno::EAGAIN))?;
    drop(two);
    same("a writer alone", three.lock(Exclusive).await, Ok(()))
}

async fn a_lock_can_be_raised_and_lowered<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    same("share", one.lock(Shared).await, Ok(()))?;
    same("raise", one.lock(Exclusive).await, Ok(()))?;
    same("a reader of a raised lock", two.lock(Shared).await, Err(Errno::EAGAIN))?;
    same("lower", one.lock(Shared).await, Ok(()))?;
    same("a reader of a lowered lock", two.lock(Shared).await, Ok(()))
}

async fn a_refused_lock_leaves_the_old_one<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    let three = place.open("a").await?;
    same("a reader", one.lock(Shared).await, Ok(()))?;
    same("another", two.lock(Shared).await, Ok(()))?;
    same("raise", one.lock(Exclusive).await, Err(Errno::EAGAIN))?;
    drop(two);
    same("a writer against the lock that was not raised", three.lock(Exclusive).await, Err(Errno::EAGAIN))?;
    same("a reader beside it", three.lock(Shared).await, Ok(()))?;
    drop(three);
    same("raise alone", one.lock(Exclusive).await, Ok(()))
}

async fn a_sole_holder_keeps_all_others_out<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    same("hold alone", one.lock(Sole).await, Ok(()))?;
    for kind in [Shared, Exclusive, Sole] {
        same("another", two.lock(kind).await, Err(Errno::EAGAIN))?;
    }
    same("the holder again", one.lock(Sole).await, Ok(()))?;
    same("lower", one.lock(Shared).await, Ok(()))?;
    same("a reader of a lowered lock", two.lock(Shared).await, Ok(()))?;
    same("hold alone beside a reader", one.lock(Sole).await, Err(Errno::EAGAIN))?;
    drop(one);
    same("the next holder", two.lock(Sole).await, Ok(()))
}

async fn clones_hold_one_lock<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    let clone = one.clone();
    same("lock", one.lock(Exclusive).await, Ok(()))?;
    same("the clone", clone.lock(Exclusive).await, Ok(()))?;
    same("another", two.lock(Shared).await, Err(Errno::EAGAIN))
}

async fn a_lock_goes_with_the_last_clone<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    let clone = one.clone();
    same("lock", one.lock(Exclusive).await, Ok(()))?;
    drop(one);
    same("another while a clone lives", two.lock(Exclusive).await, Err(Errno::EAGAIN))?;
    drop(clone);
    same("another after that", two.lock(Exclusive).await, Ok(()))
}

async fn a_lock_outlives_its_last_operation<H: FileHost>(place: Place<H>) -> Outcome {
    let (one, two) = two(&place).await?;
    same("lock", one.lock(Exclusive).await, Ok(()))?;
    let bytes = pattern(1, 64 * BLOCK);
    let mut bufs = buffers(&[bytes.len()])?;
    bufs[0].copy_from_slice(&bytes);
    let ended = poll_once(one.write_at(0, bufs)).await;
    drop(one);
    // The lock may be available at once or later, but never before the write has landed.
    while two.lock(Exclusive).await.is_err() {
        place.host.sleep_ns(1_000_000).await;
    }
    if let Some((count, _)) = ended {
        same("a write that ended at once", count, Ok(bytes.len()))?;
    }
    same_bytes("the file", &read(&two, 0, bytes.len()).await?, &bytes)
}

async fn a_file_open_for_reading_can_share<H: FileHost>(place: Place<H>) -> Outcome {
    let one = place.create("a").await?;
    let mode = place.mode(OpenMode::READ);
    let two = place.host.open(&place.path("a"), mode).await.or_fail("open for reading")?;
    same("a reader", two.lock(Shared).await, Ok(()))?;
    same("a writer", one.lock(Exclusive).await, Err(Errno::EAGAIN))?;
    drop(two);
    same("a writer alone", one.lock(Exclusive).await, Ok(()))
}
