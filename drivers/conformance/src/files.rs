//! Reading, writing, growing and shrinking.

use crate::{
    BLOCK, FileHost, OrFail, Outcome, Place, Test, buffers, buffers_of, content, holds, pattern, read, same,
    same_bytes, tests, write,
};
use std::cell::Cell;
use std::rc::Rc;
use tap_host::{Errno, File, IoVec, OpenMode, copy_from_slice};

/// Bodies that need a file system.
pub fn on_files<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![
        a_missing_file_is_not_opened,
        a_folder_that_is_missing_holds_no_file,
        a_file_is_created_once,
        a_new_file_is_empty,
        a_read_only_file_takes_no_changes,
        a_sparse_file_reads_as_zeros,
        reads_stop_at_the_end,
        a_write_past_the_end_leaves_zeros_between,
        shrinking_cuts_and_growing_gives_zeros,
        sizes_of_odd_bytes_hold,
        a_file_is_the_same_under_every_open,
        no_file_is_larger_than_an_offset,
    ]
}

/// Bodies that also run on a block device.
pub fn on_disks<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![
        bytes_come_back,
        the_last_of_overlapping_writes_wins,
        writes_at_once_all_land,
        overlapping_writes_at_once_leave_bytes_of_either,
        lists_of_buffers_are_one_run_of_bytes,
        lists_longer_than_a_call_takes_are_resumed,
        large_transfers_are_whole,
        buffers_come_back_with_the_result,
        alignment_is_asked_for_as_information_says,
        a_second_descriptor_sees_writes_at_once,
        clones_share_the_file,
        synchronising_succeeds_again_and_again,
    ]
}

async fn a_missing_file_is_not_opened<H: FileHost>(place: Place<H>) -> Outcome {
    for mode in [OpenMode::READ, OpenMode::WRITE] {
        let opened = place.host.open(&place.path("missing"), place.mode(mode)).await;
        same("open", opened.err(), Some(Errno::ENOENT))?;
    }
    same("remove", place.host.remove(&place.path("missing")).await, Err(Errno::ENOENT))
}

async fn a_folder_that_is_missing_holds_no_file<H: FileHost>(place: Place<H>) -> Outcome {
    let path = place.path("missing/file");
    let opened = place.host.open(&path, place.mode(OpenMode::CREATE)).await;
    same("create", opened.err(), Some(Errno::ENOENT))?;
    same("sync the folder", place.host.sync_parent(&path).await, Err(Errno::ENOENT))
}

async fn a_file_is_created_once<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    write(&file, 0, &pattern(1, BLOCK)).await?;
    let again = place.host.open(&place.path("a"), place.mode(OpenMode::CREATE)).await;
    same("create again", again.err(), Some(Errno::EEXIST))?;
    let file = place.open("a").await?;
    same_bytes("the file", &read(&file, 0, BLOCK).await?, &pattern(1, BLOCK))
}

async fn a_new_file_is_empty<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    let info = file.info().await.or_fail("look at a file")?;
    same("size", info.size_bytes, 0)?;
    same("direct", info.direct, place.direct)?;
    same("device", info.block_device, false)?;
    holds("the alignment is a power of two of at most 4096", info.align_bytes.is_power_of_two())?;
    holds("and 1 for buffered files", (info.align_bytes == 1) != place.direct)?;
    same("bytes", read(&file, 0, BLOCK).await?.len(), 0)?;
    same("extents", file.extents_at(0, 4).await, Ok(Vec::new()))
}

async fn a_read_only_file_takes_no_changes<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    write(&file, 0, &pattern(1, BLOCK)).await?;
    let file =
        place.host.open(&place.path("a"), place.mode(OpenMode::READ)).await.or_fail("open for reading")?;
    let (count, _) = file.write_at(0, buffers(&[BLOCK])?).await;
    same("write", count, Err(Errno::EBADF))?;
    same("set the size", file.set_size(0).await, Err(Errno::EBADF))?;
    let zeroed = file.zero_at(0, BLOCK as u64, tap_host::ZeroMode::Unmap).await;
    same("zero", zeroed, Err(Errno::EBADF))?;
    same_bytes("the file", &read(&file, 0, 2 * BLOCK).await?, &pattern(1, BLOCK))
}

async fn a_sparse_file_reads_as_zeros<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    let size = 64 * BLOCK;
    file.set_size(size as u64).await.or_fail("set the size")?;
    write(&file, 20 * BLOCK as u64, &pattern(1, BLOCK)).await?;
    let mut want = vec![0; size];
    want[20 * BLOCK..21 * BLOCK].copy_from_slice(&pattern(1, BLOCK));
    same_bytes("the file", &read(&file, 0, size).await?, &want)
}

async fn reads_stop_at_the_end<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    write(&file, 0, &pattern(1, 2 * BLOCK)).await?;
    same_bytes(
        "across the end",
        &read(&file, BLOCK as u64, 4 * BLOCK).await?,
        &pattern(1, 2 * BLOCK)[BLOCK..],
    )?;
    for blocks in [2, 3, 1000] {
        let (count, _) = file.read_at((blocks * BLOCK) as u64, buffers(&[BLOCK])?).await;
        same("a read past the end", count, Ok(0))?;
    }
    same("size", file.info().await.or_fail("look")?.size_bytes, 2 * BLOCK as u64)
}

async fn a_write_past_the_end_leaves_zeros_between<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    write(&file, 0, &pattern(1, BLOCK)).await?;
    write(&file, 9 * BLOCK as u64, &pattern(2, BLOCK)).await?;
    same("size", file.info().await.or_fail("look")?.size_bytes, 10 * BLOCK as u64)?;
    let want = [pattern(1, BLOCK), vec![0; 8 * BLOCK], pattern(2, BLOCK)].concat();
    same_bytes("the file", &read(&file, 0, want.len()).await?, &want)
}

async fn shrinking_cuts_and_growing_gives_zeros<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    write(&file, 0, &pattern(1, 4 * BLOCK)).await?;
    file.set_size(2 * BLOCK as u64).await.or_fail("shrink")?;
    same("size", file.info().await.or_fail("look")?.size_bytes, 2 * BLOCK as u64)?;
    same_bytes("the rest", &read(&file, 0, 4 * BLOCK).await?, &pattern(1, 4 * BLOCK)[..2 * BLOCK])?;
    file.set_size(4 * BLOCK as u64).await.or_fail("grow")?;
    let want = [&pattern(1, 4 * BLOCK)[..2 * BLOCK], &vec![0; 2 * BLOCK]].concat();
    same_bytes("after growing", &read(&file, 0, 8 * BLOCK).await?, &want)?;
    file.set_size(4 * BLOCK as u64).await.or_fail("keep the size")?;
    same_bytes("after nothing", &read(&file, 0, 8 * BLOCK).await?, &want)
}

async fn sizes_of_odd_bytes_hold<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    write(&file, 0, &pattern(1, 2 * BLOCK)).await?;
    file.set_size(5000).await.or_fail("shrink")?;
    same_bytes(
        "a read across an odd end",
        &read(&file, 0, 2 * BLOCK).await?,
        &pattern(1, 2 * BLOCK)[..5000],
    )?;
    file.set_size(2 * BLOCK as u64).await.or_fail("grow")?;
    let want = [&pattern(1, 2 * BLOCK)[..5000], &vec![0; 2 * BLOCK - 5000]].concat();
    same_bytes("what was cut off within a block", &read(&file, 0, 2 * BLOCK).await?, &want)?;
    if place.direct {
        return Ok(());
    }
    write(&file, 2 * BLOCK as u64 + 7, &pattern(2, 100)).await?;
    same("size", file.info().await.or_fail("look")?.size_bytes, 2 * BLOCK as u64 + 107)?;
    let tail = [&[0; 7], &*pattern(2, 100)].concat();
    same_bytes("the tail", &read(&file, 2 * BLOCK as u64, BLOCK).await?, &tail)
}

async fn no_file_is_larger_than_an_offset<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    for offset in [i64::MAX as u64 / BLOCK as u64 * BLOCK as u64, u64::MAX / BLOCK as u64 * BLOCK as u64] {
        let (count, _) = file.write_at(offset, buffers(&[BLOCK])?).await;
        same("write", count, Err(Errno::EFBIG))?;
        let (count, _) = file.read_at(offset, buffers(&[BLOCK])?).await;
        same("read", count, Err(Errno::EFBIG))?;
    }
    same("set the size", file.set_size(u64::MAX).await, Err(Errno::EFBIG))?;
    same("size", file.info().await.or_fail("look")?.size_bytes, 0)
}

async fn bytes_come_back<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(32).await?;
    let mut want = vec![0; 32 * BLOCK];
    for (i, block) in [3, 17, 4, 31, 0].into_iter().enumerate() {
        write(&file, (block * BLOCK) as u64, &pattern(i as u8, BLOCK)).await?;
        want[block * BLOCK..][..BLOCK].copy_from_slice(&pattern(i as u8, BLOCK));
    }
    same_bytes("the disk", &read(&file, 0, want.len()).await?, &want)?;
    file.sync_data().await.or_fail("synchronise")?;
    same_bytes("the synchronised disk", &read(&file, 0, want.len()).await?, &want)
}

async fn the_last_of_overlapping_writes_wins<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(8).await?;
    let mut want = vec![0; 8 * BLOCK];
    for (tag, first, count) in [(1, 0, 6), (2, 2, 3), (3, 4, 4), (4, 3, 2)] {
        write(&file, (first * BLOCK) as u64, &pattern(tag, count * BLOCK)).await?;
        want[first * BLOCK..][..count * BLOCK].copy_from_slice(&pattern(tag, count * BLOCK));
        same_bytes("the disk", &read(&file, 0, want.len()).await?, &want)?;
    }
    Ok(())
}

async fn writes_at_once_all_land<H: FileHost>(place: Place<H>) -> Outcome {
    const MANY: usize = 300;
    let file = place.disk(MANY).await?;
    let left = Rc::new(Cell::new(MANY));
    let wrong = Rc::new(Cell::new(0));
    for i in 0..MANY {
        let (file, left, wrong) = (file.clone(), Rc::clone(&left), Rc::clone(&wrong));
        place.host.spawn("writer", i as u64, async move {
            let ok = write(&file, (i * BLOCK) as u64, &pattern(i as u8, BLOCK)).await.is_ok();
            let back = read(&file, (i * BLOCK) as u64, BLOCK).await;
            if !ok || back != Ok(pattern(i as u8, BLOCK)) {
                wrong.set(wrong.get() + 1);
            }
            left.set(left.get() - 1);
        });
    }
    place.until("the end of all writes", || left.get() == 0).await?;
    same("writers that went wrong", wrong.get(), 0)?;
    let want: Vec<u8> = (0..MANY).flat_map(|i| pattern(i as u8, BLOCK)).collect();
    same_bytes("the disk", &read(&file, 0, want.len()).await?, &want)
}

async fn overlapping_writes_at_once_leave_bytes_of_either<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(4).await?;
    let left = Rc::new(Cell::new(8));
    for i in 0..8_u8 {
        let (file, left) = (file.clone(), Rc::clone(&left));
        place.host.spawn("writer", u64::from(i), async move {
            if write(&file, 0, &vec![i + 1; 4 * BLOCK]).await.is_ok() {
                left.set(left.get() - 1);
            }
        });
    }
    place.until("the end of all writes", || left.get() == 0).await?;
    let bytes = read(&file, 0, 4 * BLOCK).await?;
    holds("each byte is one that was written", bytes.iter().all(|b| (1..=8).contains(b)))
}

async fn lists_of_buffers_are_one_run_of_bytes<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(16).await?;
    let bytes = pattern(5, 11 * BLOCK);
    let mut bufs = buffers(&[BLOCK, 3 * BLOCK, 2 * BLOCK, 5 * BLOCK])?;
    copy_from_slice(&mut bufs, 0, &bytes);
    let (count, _) = file.write_at(BLOCK as u64, bufs).await;
    let count = count.or_fail("write a list")?;
    holds("a count of whole blocks", count > 0 && count <= bytes.len() && count % BLOCK == 0)?;
    write(&file, (BLOCK + count) as u64, &bytes[count..]).await?;
    let (count, bufs) = file.read_at(BLOCK as u64, buffers(&[4 * BLOCK, BLOCK, 6 * BLOCK])?).await;
    let count = count.or_fail("read a list")?;
    same_bytes("the list", &content(&bufs)[..count], &bytes[..count])?;
    same_bytes("the disk", &read(&file, BLOCK as u64, bytes.len()).await?, &bytes)
}

async fn lists_longer_than_a_call_takes_are_resumed<H: FileHost>(place: Place<H>) -> Outcome {
    const PIECES: usize = 1100;
    let file = place.disk(PIECES).await?;
    let bytes = pattern(9, PIECES * BLOCK);
    let mut done = 0;
    while done < bytes.len() {
        let mut bufs = buffers(&vec![BLOCK; PIECES - done / BLOCK])?;
        copy_from_slice(&mut bufs, 0, &bytes[done..]);
        let (count, _) = file.write_at(done as u64, bufs).await;
        let count = count.or_fail("write a long list")?;
        holds("progress", count > 0)?;
        // A transfer that ends within a block is continued from the start of that block.
        done += count / BLOCK * BLOCK;
        holds("whole blocks", count >= BLOCK)?;
    }
    let (count, bufs) = file.read_at(0, buffers(&vec![BLOCK; PIECES])?).await;
    let count = count.or_fail("read a long list")?;
    same_bytes("what a long list got", &content(&bufs)[..count], &bytes[..count])?;
    same_bytes("the disk", &read(&file, 0, bytes.len()).await?, &bytes)
}

async fn large_transfers_are_whole<H: FileHost>(place: Place<H>) -> Outcome {
    let bytes = pattern(3, 2 << 20);
    let file = place.disk(bytes.len() / BLOCK).await?;
    write(&file, 0, &bytes).await?;
    same_bytes("the disk", &read(&file, 0, bytes.len()).await?, &bytes)
}

async fn buffers_come_back_with_the_result<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(4).await?;
    let bufs = buffers_of(&pattern(1, 2 * BLOCK))?;
    let address = bufs[0].as_ptr();
    let (_, bufs): (_, IoVec) = file.write_at(0, bufs).await;
    holds("the same buffer is returned", bufs.len() == 1 && bufs[0].as_ptr() == address)?;
    same_bytes("a buffer that was written", &content(&bufs), &pattern(1, 2 * BLOCK))?;
    let (count, bufs) = file.read_at(u64::MAX / BLOCK as u64 * BLOCK as u64, bufs).await;
    holds("an offset out of range is refused", count.is_err())?;
    holds("and the buffer is returned", bufs.len() == 1 && bufs[0].as_ptr() == address)
}

async fn alignment_is_asked_for_as_information_says<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(4).await?;
    write(&file, 0, &pattern(1, 2 * BLOCK)).await?;
    let align = file.info().await.or_fail("look")?.align_bytes as usize;
    if align == 1 {
        write(&file, 4001, &pattern(2, 333)).await?;
        let mut want = pattern(1, 2 * BLOCK);
        want[4001..4334].copy_from_slice(&pattern(2, 333));
        same_bytes("odd reads", &read(&file, 3, 8000).await?, &want[3..8003])?;
        return same_bytes("the disk", &read(&file, 0, 2 * BLOCK).await?, &want);
    }
    for (offset, len) in [(align / 2, align), (0, align / 2), (1, align), (align, align + 1)] {
        let (count, _) = file.read_at(offset as u64, buffers(&[len])?).await;
        same("an unaligned read", count, Err(Errno::EINVAL))?;
        let (count, _) = file.write_at(offset as u64, buffers(&[len])?).await;
        same("an unaligned write", count, Err(Errno::EINVAL))?;
    }
    let (count, _) = file.write_at(0, buffers(&[align / 2, align / 2])?).await;
    same("a list of unaligned pieces", count, Err(Errno::EINVAL))?;
    write(&file, align as u64, &pattern(2, align)).await?;
    let mut want = pattern(1, 2 * BLOCK);
    want[align..2 * align].copy_from_slice(&pattern(2, align));
    same_bytes("the disk", &read(&file, 0, 2 * BLOCK).await?, &want)
}

async fn a_second_descriptor_sees_writes_at_once<H: FileHost>(place: Place<H>) -> Outcome {
    let one = place.disk(4).await?;
    let two = place.disk_again().await?;
    write(&one, 0, &pattern(1, BLOCK)).await?;
    same_bytes("the other's view", &read(&two, 0, BLOCK).await?, &pattern(1, BLOCK))?;
    write(&two, 0, &pattern(2, BLOCK)).await?;
    two.sync_data().await.or_fail("synchronise")?;
    same_bytes("the first one's view", &read(&one, 0, BLOCK).await?, &pattern(2, BLOCK))
}

async fn clones_share_the_file<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(2).await?;
    let clone = file.clone();
    write(&file, 0, &pattern(1, BLOCK)).await?;
    drop(file);
    same_bytes("the clone's view", &read(&clone, 0, BLOCK).await?, &pattern(1, BLOCK))
}

async fn synchronising_succeeds_again_and_again<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(2).await?;
    for tag in 0..3 {
        write(&file, 0, &pattern(tag, BLOCK)).await?;
        file.sync_data().await.or_fail("synchronise")?;
        file.sync_data().await.or_fail("synchronise what is durable")?;
    }
    same_bytes("the disk", &read(&file, 0, BLOCK).await?, &pattern(2, BLOCK))
}

async fn a_file_is_the_same_under_every_open<H: FileHost>(place: Place<H>) -> Outcome {
    let one = place.create("a").await?;
    let other = place.create("b").await?;
    write(&one, 0, &pattern(1, BLOCK)).await?;
    let again = place.open("a").await?;
    let id = async |file: &H::File| file.info().await.map(|info| info.id).or_fail("look");
    same("the file, opened again", id(&again).await?, id(&one).await?)?;
    holds("another file has another identity", id(&other).await? != id(&one).await?)?;
    match one.file_system_lost().await {
        // It may be unable to tell, and the host may have given up writes of other programs.
        Err(Errno::EOPNOTSUPP) | Ok(_) => Ok(()),
        Err(error) => Err(format!("asking for losses failed with {error}")),
    }
}
