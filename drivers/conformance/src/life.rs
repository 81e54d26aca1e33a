//! Names that disappear while files are open, and operations that are not waited for.

use crate::{
    BLOCK, FileHost, OrFail, Outcome, Place, Test, buffers_of, pattern, read, same, same_bytes, tests, write,
};
use tap_host::{BufPool, Errno, File, IoVec, LockKind, poll_once};

/// Bodies that need a file system.
pub fn on_files<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![
        a_removed_file_lives_while_it_is_open,
        a_folder_lists_its_names,
        names_are_made_durable,
        two_names_are_exchanged,
        a_dropped_write_lands_as_a_whole,
    ]
}

/// Bodies that also run on a block device.
pub fn on_disks<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![dropped_operations_take_their_buffers_along, dropped_reads_disturb_nobody]
}

async fn a_removed_file_lives_while_it_is_open<H: FileHost>(place: Place<H>) -> Outcome {
    let old = place.create("a").await?;
    write(&old, 0, &pattern(1, BLOCK)).await?;
    place.host.remove(&place.path("a")).await.or_fail("remove")?;
    let new = place.create("a").await?;
    same("size of the new file", new.info().await.or_fail("look")?.size_bytes, 0)?;
    write(&old, BLOCK as u64, &pattern(2, BLOCK)).await?;
    write(&new, 0, &pattern(3, BLOCK)).await?;
    let want = [pattern(1, BLOCK), pattern(2, BLOCK)].concat();
    same_bytes("the old file", &read(&old, 0, 4 * BLOCK).await?, &want)?;
    same_bytes("the new file", &read(&new, 0, 4 * BLOCK).await?, &pattern(3, BLOCK))?;
    old.sync_data().await.or_fail("synchronise a file without a name")
}

async fn a_folder_lists_its_names<H: FileHost>(place: Place<H>) -> Outcome {
    let names = || async { place.host.names_in(&place.folder).await.or_fail("list a folder") };
    same("an empty folder", names().await?, Vec::<String>::new())?;
    let _open = (place.create("b").await?, place.create("a").await?);
    same("two names", names().await?, ["a", "b"].map(String::from).to_vec())?;
    place.host.remove(&place.path("a")).await.or_fail("remove")?;
    same("a name", names().await?, vec!["b".to_owned()])
}

async fn names_are_made_durable<H: FileHost>(place: Place<H>) -> Outcome {
    let path = place.path("a");
    let file = place.create("a").await?;
    place.host.sync_parent(&path).await.or_fail("make a name durable")?;
    drop(file);
    place.host.remove(&path).await.or_fail("remove")?;
    place.host.sync_parent(&path).await.or_fail("make the removal durable")
}

async fn two_names_are_exchanged<H: FileHost>(place: Place<H>) -> Outcome {
    let [a, b] = ["a", "b"].map(|name| place.path(name));
    let (first, second) = (place.create("a").await?, place.create("b").await?);
    first.lock(LockKind::Exclusive).await.or_fail("lock")?;
    write(&first, 0, &pattern(1, BLOCK)).await?;
    write(&second, 0, &pattern(2, BLOCK)).await?;
    same("exchange with nothing", place.host.exchange(&a, &place.path("c")).await, Err(Errno::ENOENT))?;
    place.host.exchange(&a, &b).await.or_fail("exchange")?;
    place.host.sync_parent(&a).await.or_fail("make the names durable")?;
    write(&first, BLOCK as u64, &pattern(3, BLOCK)).await?;
    let [at_a, at_b] = [place.open("a").await?, place.open("b").await?];
    same_bytes("what the first name has", &read(&at_a, 0, 2 * BLOCK).await?, &pattern(2, BLOCK))?;
    let want = [pattern(1, BLOCK), pattern(3, BLOCK)].concat();
    same_bytes("what the second name has", &read(&at_b, 0, 4 * BLOCK).await?, &want)?;
    same("the lock of the file", at_b.lock(LockKind::Shared).await, Err(Errno::EAGAIN))?;
    at_a.lock(LockKind::Exclusive).await.or_fail("lock the other file")
}

async fn a_dropped_write_lands_as_a_whole<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    let bytes = pattern(7, 16 * BLOCK);
    poll_once(file.write_at(0, buffers_of(&bytes)?)).await;
    let mut size = 0;
    while size < bytes.len() as u64 {
        place.host.sleep_ns(1_000_000).await;
        size = file.info().await.or_fail("look")?.size_bytes;
    }
    // Its size may show before its last byte; a write after it in the file's order sees all of it.
    write(&file, bytes.len() as u64, &pattern(8, BLOCK)).await?;
    file.sync_data().await.or_fail("synchronise")?;
    same_bytes("the file", &read(&file, 0, bytes.len()).await?, &bytes)
}

async fn dropped_operations_take_their_buffers_along<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(8).await?;
    let pool = BufPool::new(1 << 20);
    for block in 0..8_u64 {
        let mut buf = pool.alloc(BLOCK).await.or_fail("have a buffer")?;
        buf.copy_from_slice(&pattern(block as u8, BLOCK));
        poll_once(file.write_at(block * BLOCK as u64, IoVec::from_iter([buf]))).await;
    }
    place.until("the return of all buffers", || pool.used_bytes() == 0).await?;
    let want: Vec<u8> = (0..8).flat_map(|block| pattern(block, BLOCK)).collect();
    same_bytes("the disk", &read(&file, 0, want.len()).await?, &want)
}

async fn dropped_reads_disturb_nobody<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(4).await?;
    write(&file, 0, &pattern(1, 4 * BLOCK)).await?;
    let pool = BufPool::new(64 * BLOCK);
    for _ in 0..50 {
        let buf = pool.alloc(BLOCK).await.or_fail("have a buffer")?;
        poll_once(file.read_at(0, IoVec::from_iter([buf]))).await;
        // This one may get memory that the earlier read would still write to, if it had been freed too early.
        let mut buf = pool.alloc(BLOCK).await.or_fail("have a buffer")?;
        buf.fill(0x55);
        place.host.sleep_ns(0).await;
        same_bytes("a buffer of another owner", &buf, &[0x55; BLOCK])?;
    }
    place.until("the return of all buffers", || pool.used_bytes() == 0).await
}
