//! Sectors that cannot be read until they are written: who notices them, and what mends them.

use kernel_model::faults::FaultPlan;
use kernel_model::{Kernel, PAGE, Process, ProcessFile, Storage, StorageConfig, to_bufs};
use sim::{Config, Script, Sim, Source};
use tap_host::{Errno, File, Files, IoBuf, IoVec, OpenMode, SECTOR_BYTES, ZeroMode};

const PAGES: usize = 4;
const P: u64 = PAGE as u64;
const S: u64 = SECTOR_BYTES;

/// Whether direct reads are short before a bad place.
const SHORT: u64 = 0x100;

/// Runs `body` on a file of four pages of which page `page` loses `sectors` (a mask, and [`SHORT`]) when it is used.
fn with_bad<F: Future<Output = ()> + 'static>(
    page: u32,
    sectors: u64,
    mode: OpenMode,
    body: impl FnOnce(ProcessFile, Kernel) -> F + 'static,
) {
    // The pages of the first read are decided about in their order.
    let script = Script::from([(("bad-sectors", page), sectors)]);
    let sim = Sim::new(&Config { faults: false, source: Source::Script(script), ..Config::new(1) });
    let faults = FaultPlan { bad_sectors: true, ..FaultPlan::default() };
    let storage = Storage::new(&sim, StorageConfig { faults, ..StorageConfig::default() });
    storage.put_bytes("/a", &[7; PAGES * PAGE]);
    let kernel = Kernel::new(&sim, &storage);
    sim.run(async move {
        let process = kernel.process("p", 1);
        let file = process.open("/a", mode).await.unwrap();
        let _ = read(&file, 0, PAGES as u64 * P).await;
        body(file, kernel).await;
    })
    .unwrap();
}

async fn read(file: &ProcessFile, offset: u64, len: u64) -> Result<usize, Errno> {
    let bufs = IoVec::from_iter([IoBuf::unpooled(len as usize).unwrap()]);
    let (result, bufs) = file.read_at(offset, bufs).await;
    if let Ok(n) = result {
        assert!(bufs[0][..n].iter().all(|byte| *byte == 7 || *byte == 1), "what is read was written");
    }
    result
}

async fn write(file: &ProcessFile, offset: u64, len: u64) -> Result<usize, Errno> {
    file.write_at(offset, to_bufs(&vec![1; len as usize]).unwrap()).await.0
}

async fn opened(process: &Process) -> ProcessFile {
    process.open("/a", OpenMode::WRITE).await.unwrap()
}

#[test]
fn a_buffered_read_ends_before_the_page_and_fails_in_it() {
    with_bad(2, 0b100, OpenMode::WRITE, |file, _| async move {
        for _ in 0..2 {
            assert_eq!(read(&file, P, 3 * P).await, Ok(PAGE), "whoever reads it, and each time");
            assert_eq!(read(&file, 2 * P, S).await, Err(Errno::EIO), "the whole page cannot be read");
            assert_eq!(read(&file, 3 * P, P).await, Ok(PAGE), "its neighbours can");
        }
        assert_eq!(file.sync_data().await, Ok(()));
    });
}

#[test]
fn a_direct_read_fails_as_a_whole_or_ends_before_the_block() {
    with_bad(2, 0b100, OpenMode { direct: true, ..OpenMode::WRITE }, |file, _| async move {
        assert_eq!(read(&file, P, 3 * P).await, Err(Errno::EIO));
        assert_eq!(read(&file, P, P + 2 * S).await, Ok(PAGE + 2 * S as usize), "up to the block");
        assert_eq!(read(&file, 2 * P + 3 * S, S).await, Ok(S as usize), "and behind it");
        assert_eq!(write(&file, 2 * P + S, S).await, Ok(S as usize), "direct writes do not read");
        assert_eq!(read(&file, 2 * P + 2 * S, S).await, Err(Errno::EIO));
        assert_eq!(write(&file, 2 * P + 2 * S, S).await, Ok(S as usize));
        assert_eq!(read(&file, 0, 4 * P).await, Ok(PAGES * PAGE));
    });
    with_bad(2, 0b100 | SHORT, OpenMode { direct: true, ..OpenMode::WRITE }, |file, _| async move {
        assert_eq!(read(&file, P, 3 * P).await, Ok(PAGE + 2 * S as usize));
        assert_eq!(read(&file, 2 * P + 2 * S, P).await, Err(Errno::EIO));
    });
}

#[test]
fn a_buffered_write_of_a_part_of_a_page_reads_it_and_one_of_all_of_it_mends_it() {
    with_bad(2, 0xff, OpenMode::WRITE, |file, _| async move {
        assert_eq!(write(&file, 2 * P, P - S).await, Err(Errno::EIO));
        assert_eq!(write(&file, P, P + S).await, Ok(PAGE), "up to the page");
        assert_eq!(read(&file, 2 * P, P).await, Err(Errno::EIO));
        assert_eq!(write(&file, 2 * P - S, P + S).await, Ok(PAGE + S as usize));
        assert_eq!(read(&file, 0, 4 * P).await, Ok(PAGES * PAGE));
        assert_eq!(write(&file, 2 * P, S).await, Ok(S as usize), "for good");
    });
}

#[test]
fn zeros_of_a_part_of_a_page_fail_and_those_of_all_of_it_mend_it() {
    for mode in [ZeroMode::Unmap, ZeroMode::Keep] {
        with_bad(2, 1, OpenMode::WRITE, move |file, kernel| async move {
            assert_eq!(file.zero_at(P, P + S, mode).await, Err(Errno::EIO));
            assert_eq!(kernel.storage().bytes("/a").unwrap(), [7; PAGES * PAGE], "nothing has changed");
            assert_eq!(file.zero_at(2 * P, P, mode).await, Ok(()));
            assert!(kernel.storage().bad_sectors("/a").is_empty());
        });
    }
}

#[test]
fn a_size_below_the_place_does_away_with_it() {
    with_bad(2, 0b1000_0001, OpenMode::WRITE, |file, kernel| async move {
        let bad = || kernel.storage().bad_sectors("/a").pages().collect::<Vec<_>>();
        assert_eq!(bad(), [(2, 0b1000_0001)]);
        file.set_size(2 * P + S).await.unwrap();
        assert_eq!(bad(), [(2, 1)]);
        file.set_size(2 * P).await.unwrap();
        assert_eq!(bad(), []);
    });
}

#[test]
fn a_power_cut_takes_the_mending_that_was_not_synchronised() {
    for synced in [false, true] {
        with_bad(2, 0xff, OpenMode::WRITE, move |file, kernel| async move {
            assert_eq!(write(&file, 2 * P, P).await, Ok(PAGE));
            if synced {
                file.sync_data().await.unwrap();
            }
            // What is kept of a pending write is decided; here everything is.
            let storage = kernel.storage();
            let inode = storage.inode("/a").unwrap();
            let nothing = inode.after_power_cut(0, 0, |_, _| 0);
            let half = inode.after_power_cut(0, 0, |_, _| 0xf0);
            let bad = |content: &kernel_model::Content| content.bad.of(2);
            assert_eq!((bad(&nothing), bad(&half)), if synced { (0, 0) } else { (0xff, 0x0f) });
            storage.power_cut();
            let file = opened(&kernel.process("q", 2)).await;
            assert_eq!(read(&file, 2 * P, P).await, Ok(PAGE));
        });
    }
}
