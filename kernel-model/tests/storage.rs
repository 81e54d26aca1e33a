//! The guarantees of the storage model itself.

use kernel_model::faults::{FaultPlan, SyncErrors};
use kernel_model::{Concerned, FILE_BYTES_MAX, Kernel, NthFailure, Process, Storage, StorageConfig, to_bufs};
use sim::{Config, Sim};
use tap_host::{Errno, File, Files, IoBuf, IoVec, LockKind, OpenMode, Tasks};

fn quiet() -> StorageConfig {
    StorageConfig { faults: FaultPlan::default(), ..StorageConfig::default() }
}

/// Runs `body` in a world with one kernel.
fn world<F: Future<Output = ()> + 'static>(
    seed: u64,
    config: StorageConfig,
    body: impl FnOnce(Sim, Kernel) -> F,
) {
    let sim = Sim::new(&Config::new(seed));
    let kernel = Kernel::new(&sim, &Storage::new(&sim, config));
    let body = body(sim.clone(), kernel);
    sim.run(body).unwrap();
}

async fn write(process: &Process, path: &str, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
    process.open(path, OpenMode::WRITE).await?.write_at(offset, to_bufs(bytes)?).await.0
}

#[test]
fn a_lock_outlives_its_process_until_its_last_write_has_landed() {
    world(1, quiet(), |sim, kernel| async move {
        kernel.storage().put_bytes("/a", &[0; 4096]);
        let (one, two) = (kernel.process("one", 1), kernel.process("two", 2));
        let file = one.open("/a", OpenMode::WRITE).await.unwrap();
        file.lock(LockKind::Exclusive).await.unwrap();
        let late = file.write_at(0, to_bufs(&[7; 512]).unwrap());
        one.spawn("writer", 0, async move {
            let _ = late.await;
            unreachable!("the process is dead by then");
        });
        drop(file);
        sim.yield_now().await;
        one.node().kill();
        one.node().dead().await;
        let file = two.open("/a", OpenMode::WRITE).await.unwrap();
        assert_eq!(file.lock(LockKind::Exclusive).await, Err(Errno::EAGAIN));
        assert_eq!(kernel.storage().bytes("/a").unwrap()[0], 0);
        sim.sleep_ns(1_000_000).await;
        assert_eq!(file.lock(LockKind::Exclusive).await, Ok(()));
        assert_eq!(kernel.storage().bytes("/a").unwrap()[0], 7, "a late write lands");
    });
}

#[test]
fn a_dead_process_has_no_effect() {
    world(1, quiet(), |sim, kernel| async move {
        kernel.storage().put_bytes("/a", &[0; 512]);
        let process = kernel.process("p", 1);
        let file = process.open("/a", OpenMode::WRITE).await.unwrap();
        process.node().kill();
        let write = file.write_at(0, to_bufs(&[1; 512]).unwrap());
        sim.spawn("late", 0, async move {
            write.await.0.unwrap();
        });
        sim.sleep_ns(1_000_000_000).await;
        assert_eq!(kernel.storage().bytes("/a").unwrap(), [0; 512]);
    });
}

#[test]
fn the_nth_operation_fails_with_a_part_of_its_effect() {
    let failure = NthFailure { n: 2, times: 1, of: Concerned::All, effect: 128, error: Errno::EIO };
    let config = StorageConfig { nth_failure: Some(failure), ..quiet() };
    world(1, config, |_, kernel| async move {
        kernel.storage().put_bytes("/a", &[0; 2048]);
        let process = kernel.process("p", 1);
        assert_eq!(write(&process, "/a", 0, &[1; 512]).await, Ok(512));
        assert_eq!(write(&process, "/a", 0, &[2; 2048]).await, Err(Errno::EIO));
        let bytes = kernel.storage().bytes("/a").unwrap();
        assert_eq!(bytes.iter().filter(|b| **b == 2).count(), 1024);
        assert_eq!(write(&process, "/a", 0, &[3; 512]).await, Ok(512));
    });
}

#[test]
fn a_power_cut_keeps_what_was_synchronised_and_any_part_of_the_rest() {
    let mut kept = [0, 0];
    for seed in 0..64 {
        let sim = Sim::new(&Config::new(seed));
        let storage = Storage::new(&sim, quiet());
        let kernel = Kernel::new(&sim, &storage);
        sim.run(async move {
            let process = kernel.process("p", 1);
            let file = process.open("/a", OpenMode::CREATE).await.unwrap();
            process.sync_parent("/a").await.unwrap();
            file.write_at(0, to_bufs(&[1; 1024]).unwrap()).await.0.unwrap();
            file.sync_data().await.unwrap();
            file.write_at(512, to_bufs(&[2; 1024]).unwrap()).await.0.unwrap();
            process.node().kill();
        })
        .unwrap();
        storage.power_cut();
        let bytes = storage.bytes("/a").unwrap();
        assert!(bytes.len() == 1024 || bytes.len() == 1536);
        assert_eq!(bytes[..512], [1; 512]);
        assert!(bytes[512..1024] == [1; 512] || bytes[512..1024] == [2; 512]);
        kept[usize::from(bytes[512] == 2)] += 1;
    }
    assert!(kept[0] > 5 && kept[1] > 5, "{kept:?}");
}

#[test]
fn a_failed_sync_on_linux_is_reported_once_and_loses_data() {
    let config = StorageConfig {
        nth_failure: Some(NthFailure { n: 2, times: 1, of: Concerned::All, effect: 0, error: Errno::EIO }),
        sync_errors: SyncErrors::Linux,
        ..quiet()
    };
    let lost = (0..64).filter(|seed| {
        let sim = Sim::new(&Config::new(*seed));
        let storage = Storage::new(&sim, config);
        storage.put_bytes("/a", &[0; 512]);
        let kernel = Kernel::new(&sim, &storage);
        let s = storage.clone();
        sim.run(async move {
            let process = kernel.process("p", 1);
            let file = process.open("/a", OpenMode::WRITE).await.unwrap();
            file.write_at(0, to_bufs(&[1; 512]).unwrap()).await.0.unwrap();
            assert_eq!(file.sync_data().await, Err(Errno::EIO));
            assert_eq!(file.sync_data().await, Ok(()));
            assert_eq!(s.bytes("/a").unwrap()[0], 1, "the page cache still shows it");
            process.node().kill();
        })
        .unwrap();
        storage.power_cut();
        storage.bytes("/a").unwrap()[0] == 0
    });
    assert!(lost.count() > 10);
}

#[test]
fn direct_io_is_refused_unaligned() {
    world(1, quiet(), |_, kernel| async move {
        kernel.storage().put_bytes("/a", &[0; 4096]);
        let process = kernel.process("p", 1);
        let mode = OpenMode { direct: true, ..OpenMode::WRITE };
        let file = process.open("/a", mode).await.unwrap();
        let bufs = || -> IoVec { [IoBuf::unpooled(100).unwrap()].into_iter().collect() };
        assert_eq!(file.read_at(0, bufs()).await.0, Err(Errno::EINVAL));
        assert_eq!(file.write_at(256, to_bufs(&[1; 512]).unwrap()).await.0, Err(Errno::EINVAL));
        assert_eq!(file.write_at(512, to_bufs(&[1; 512]).unwrap()).await.0, Ok(512));
    });
}

#[test]
fn a_seed_repeats_its_faults() {
    let run = |seed| {
        let sim = Sim::new(&Config::new(seed));
        let storage = Storage::new(&sim, StorageConfig { faults: FaultPlan::ALL, ..quiet() });
        storage.put_bytes("/a", &[0; 8192]);
        let kernel = Kernel::new(&sim, &storage);
        let results = sim
            .run(async move {
                let process = kernel.process("p", 1);
                let mut results = Vec::new();
                for i in 0..40 {
                    results.push(write(&process, "/a", i * 128, &[1; 2048]).await);
                }
                results
            })
            .unwrap();
        (results, sim.trace_hash())
    };
    assert!((0..20).all(|seed| run(seed) == run(seed)));
    let all: Vec<_> = (0..40).flat_map(|seed| run(seed).0).collect();
    for wanted in [Err(Errno::EIO), Err(Errno::ENOSPC), Err(Errno::EAGAIN), Ok(2048)] {
        assert!(all.contains(&wanted), "{wanted:?} is never drawn");
    }
    assert!(all.iter().any(|r| matches!(r, Ok(n) if *n < 2048)), "no short transfer is drawn");
}

#[test]
fn a_file_has_a_maximum_size() {
    world(1, quiet(), |_, kernel| async move {
        kernel.storage().put_bytes("/a", &[0; 512]);
        let process = kernel.process("p", 1);
        assert_eq!(write(&process, "/a", FILE_BYTES_MAX - 511, &[1; 512]).await, Err(Errno::EFBIG));
        let file = process.open("/a", OpenMode::WRITE).await.unwrap();
        assert_eq!(file.set_size(FILE_BYTES_MAX + 1).await, Err(Errno::EFBIG));
        assert_eq!(file.info().await.unwrap().size_bytes, 512);
    });
}

#[test]
fn calm_storage_fails_and_counts_nothing() {
    let failure =
        NthFailure { n: 1, times: NthFailure::FOR_GOOD, of: Concerned::All, effect: 0, error: Errno::EIO };
    let config = StorageConfig { faults: FaultPlan::ALL, nth_failure: Some(failure), ..quiet() };
    world(7, config, |_, kernel| async move {
        kernel.storage().put_bytes("/a", &[0; 512]);
        let process = kernel.process("p", 1);
        kernel.storage().set_calm(true);
        for _ in 0..50 {
            assert_eq!(write(&process, "/a", 0, &[1; 512]).await, Ok(512));
        }
        kernel.storage().set_calm(false);
        assert_eq!(kernel.storage().counts().writes, 0);
        assert_eq!(write(&process, "/a", 0, &[1; 512]).await, Err(Errno::EIO));
    });
}
