//! Zeros and holes.

use crate::{
    BLOCK, FileHost, OrFail, Outcome, Place, Test, holds, pattern, read, same, same_bytes, tests, write,
};
use tap_host::{Errno, File, ZeroMode};

/// Bodies that need a file system.
pub fn on_files<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![zeros_end_with_the_file, zeros_of_odd_bytes_spare_their_neighbours, a_hole_may_be_written_again]
}

/// Bodies that also run on a block device.
pub fn on_disks<H: FileHost>() -> Vec<Test<Place<H>>> {
    tests![
        zeros_fill_their_range_only,
        zeros_of_no_range_are_refused,
        zeros_of_parts_of_sectors_change_nothing,
        extents_cover_the_disk,
        extents_show_what_was_written,
        extents_after_zeros_hide_no_data,
    ]
}

const MODES: [ZeroMode; 2] = [ZeroMode::Unmap, ZeroMode::Keep];

/// Makes zeros, by writing them if the file cannot do better; fails if the refused call changed anything (a block
/// device with a page cache may have lost what was not synchronised).
async fn zero<F: File>(file: &F, offset: u64, len: usize, mode: ZeroMode) -> Outcome {
    let before = read(file, offset, len).await?;
    match file.zero_at(offset, len as u64, mode).await {
        Err(Errno::EOPNOTSUPP) => {
            let info = file.info().await.or_fail("look")?;
            if info.direct || !info.block_device {
                same_bytes("what was not changed", &read(file, offset, len).await?, &before)?;
            }
            write(file, offset, &vec![0; before.len()]).await
        }
        result => result.or_fail("make zeros"),
    }
}

async fn zeros_fill_their_range_only<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(64).await?;
    let size = file.info().await.or_fail("look")?.size_bytes;
    for (tag, mode) in MODES.into_iter().enumerate() {
        let mut want = pattern(tag as u8 + 1, 64 * BLOCK);
        write(&file, 0, &want).await?;
        for (first, count) in [(3, 1), (8, 20), (63, 1), (30, 2), (9, 3)] {
            zero(&file, (first * BLOCK) as u64, count * BLOCK, mode).await?;
            want[first * BLOCK..][..count * BLOCK].fill(0);
            same_bytes("the disk", &read(&file, 0, want.len()).await?, &want)?;
        }
        file.sync_data().await.or_fail("synchronise")?;
        same_bytes("the synchronised disk", &read(&file, 0, want.len()).await?, &want)?;
    }
    same("size", file.info().await.or_fail("look")?.size_bytes, size)
}

async fn zeros_of_no_range_are_refused<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(2).await?;
    write(&file, 0, &pattern(1, BLOCK)).await?;
    for mode in MODES {
        same("nothing", file.zero_at(0, 0, mode).await, Err(Errno::EINVAL))?;
        let beyond = file.zero_at(BLOCK as u64, u64::MAX - 100, mode).await;
        same("more than there can be", beyond, Err(Errno::EINVAL))?;
    }
    same_bytes("the disk", &read(&file, 0, BLOCK).await?, &pattern(1, BLOCK))
}

async fn zeros_of_parts_of_sectors_change_nothing<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(4).await?;
    let info = file.info().await.or_fail("look")?;
    let sector = info.zero_align_bytes as usize;
    same("what zeros are aligned to on a device", info.block_device, sector > 1)?;
    same("sectors in the device", info.size_bytes % sector as u64, 0)?;
    write(&file, 0, &pattern(1, 4 * BLOCK)).await?;
    for mode in MODES.into_iter().filter(|_| sector > 1) {
        for (offset, len) in [(512, sector - 256), (sector / 2, 3 * BLOCK), (0, BLOCK + sector / 2)] {
            let refused = file.zero_at(offset as u64, len as u64, mode).await;
            same("zeros of parts of sectors", refused, Err(Errno::EOPNOTSUPP))?;
        }
    }
    same_bytes("what was not synchronised", &read(&file, 0, 4 * BLOCK).await?, &pattern(1, 4 * BLOCK))
}

async fn zeros_end_with_the_file<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    for mode in MODES {
        write(&file, 0, &pattern(1, 4 * BLOCK)).await?;
        zero(&file, 3 * BLOCK as u64, 5 * BLOCK, mode).await?;
        zero(&file, 9 * BLOCK as u64, BLOCK, mode).await?;
        same("size", file.info().await.or_fail("look")?.size_bytes, 4 * BLOCK as u64)?;
        let want = [&pattern(1, 4 * BLOCK)[..3 * BLOCK], &[0; BLOCK]].concat();
        same_bytes("the file", &read(&file, 0, 8 * BLOCK).await?, &want)?;
        file.set_size(6 * BLOCK as u64).await.or_fail("grow")?;
        same_bytes("past the old end", &read(&file, 4 * BLOCK as u64, 4 * BLOCK).await?, &[0; 2 * BLOCK])?;
        file.set_size(4 * BLOCK as u64).await.or_fail("shrink")?;
    }
    Ok(())
}

async fn zeros_of_odd_bytes_spare_their_neighbours<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    for mode in MODES {
        let mut want = pattern(2, 8 * BLOCK);
        write(&file, 0, &want).await?;
        for (from, to) in [(100, 200), (4000, 5000), (9000, 25_001)] {
            match file.zero_at(from, to - from, mode).await {
                Err(Errno::EOPNOTSUPP) => {}
                result => {
                    result.or_fail("make zeros")?;
                    want[from as usize..to as usize].fill(0);
                }
            }
            same_bytes("the file", &read(&file, 0, want.len()).await?, &want)?;
        }
    }
    Ok(())
}

async fn a_hole_may_be_written_again<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.create("a").await?;
    write(&file, 0, &pattern(1, 8 * BLOCK)).await?;
    zero(&file, 0, 8 * BLOCK, ZeroMode::Unmap).await?;
    write(&file, 2 * BLOCK as u64, &pattern(2, BLOCK)).await?;
    let mut want = vec![0; 8 * BLOCK];
    want[2 * BLOCK..3 * BLOCK].copy_from_slice(&pattern(2, BLOCK));
    same_bytes("the file", &read(&file, 0, want.len()).await?, &want)
}

/// Which of the first `blocks` blocks contain data, even in part. Checks that the extents are contiguous, and the same
/// however many are asked for at once.
async fn data_blocks<F: File>(file: &F, blocks: usize) -> Result<Vec<bool>, String> {
    let one = data_blocks_by(file, blocks, 1).await?;
    for max in [2, 3, 1000] {
        same("the same extents", &data_blocks_by(file, blocks, max).await?, &one)?;
    }
    Ok(one)
}

async fn data_blocks_by<F: File>(file: &F, blocks: usize, max: usize) -> Result<Vec<bool>, String> {
    let size = file.info().await.or_fail("look")?.size_bytes;
    let mut data = vec![false; blocks];
    let mut at = 0;
    loop {
        let found = file.extents_at(at, max).await.or_fail("look for extents")?;
        holds("no more extents than were asked for", found.len() <= max)?;
        if found.is_empty() {
            break;
        }
        for extent in found {
            holds("an extent has a length", extent.len_bytes > 0)?;
            holds("an extent ends with the file", extent.len_bytes <= size - at)?;
            let end = at + extent.len_bytes;
            for (block, there) in data.iter_mut().enumerate() {
                let (from, to) = ((block * BLOCK) as u64, ((block + 1) * BLOCK) as u64);
                *there |= extent.data && at < to && from < end;
            }
            at = end;
        }
    }
    same("the end of the last extent", at, size)?;
    Ok(data)
}

async fn extents_cover_the_disk<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(16).await?;
    let size = file.info().await.or_fail("look")?.size_bytes;
    data_blocks(&file, 16).await?;
    for offset in [size, size + 1, u64::MAX >> 1] {
        same("extents past the end", file.extents_at(offset, 4).await, Ok(Vec::new()))?;
    }
    let last = file.extents_at(size - 1, 4).await.or_fail("look for the last extent")?;
    same("the length of the last byte", last.iter().map(|e| e.len_bytes).collect::<Vec<_>>(), vec![1])
}

async fn extents_show_what_was_written<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(64).await?;
    for block in [0, 7, 40, 41, 63] {
        write(&file, (block * BLOCK) as u64, &pattern(1, BLOCK)).await?;
        let data = data_blocks(&file, 64).await?;
        holds("a block that was written is data", data[block])?;
    }
    let data = data_blocks(&file, 64).await?;
    for block in [0, 7, 40, 41, 63] {
        holds("and stays data", data[block])?;
    }
    for (block, _) in data.iter().enumerate().filter(|(_, data)| !**data) {
        let bytes = read(&file, (block * BLOCK) as u64, BLOCK).await?;
        same_bytes("a hole", &bytes, &[0; BLOCK])?;
    }
    Ok(())
}

async fn extents_after_zeros_hide_no_data<H: FileHost>(place: Place<H>) -> Outcome {
    let file = place.disk(64).await?;
    for mode in MODES {
        write(&file, 0, &pattern(1, 64 * BLOCK)).await?;
        zero(&file, 8 * BLOCK as u64, 16 * BLOCK, mode).await?;
        let data = data_blocks(&file, 64).await?;
        holds("the rest is data", data[..8].iter().chain(&data[24..]).all(|d| *d))?;
    }
    Ok(())
}
