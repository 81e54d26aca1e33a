//! Disks of `tapdisk control` that become larger while they are in use.

use crate::control::{Admin, read, write};
use crate::world;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::{Errno, SECTOR_BYTES};

const MIB: u64 = 1 << 20;

#[test]
fn a_disk_in_use_grows_and_who_connects_anew_knows_it() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB as usize]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let (at, old) = (format!("-p {pid} -m 0"), admin.client(pid, 0).await);
        assert_eq!(write(&old, 3, 7).await, Ok(()));
        assert_eq!(admin.done(&format!("resize {at} -s +1M")).await, format!("size={}", 2 * MIB));
        let json = admin.done(&format!("resize {at} -s 3M --json")).await;
        assert_eq!(json, r#"{"minor":0,"size_sectors":6144}"#);
        assert_eq!(admin.done(&format!("resize {at} -s 3M")).await, format!("size={}", 3 * MIB), "once more");
        // It goes on, with the size that it was told.
        assert_eq!(write(&old, 4, 8).await, Ok(()));
        let new = admin.client(pid, 0).await;
        let sectors = [&old, &new].map(|disk| disk.info().size_sectors);
        assert_eq!(sectors, [MIB, 3 * MIB].map(|bytes| bytes / SECTOR_BYTES));
        assert_eq!((read(&new, 3).await, read(&new, 4).await, read(&new, 6143).await), (7, 8, 0));
        assert_eq!(write(&new, 6143, 9).await, Ok(()));
        admin.done(&format!("pause {at}")).await;
        admin.done(&format!("unpause {at}")).await;
        assert_eq!(read(&new, 6143).await, 9);
        admin.done(&format!("destroy {at}")).await;
        assert_eq!(kernel.storage().bytes("/a").unwrap().len() as u64, 3 * MIB);
    });
}

#[test]
fn a_disk_that_does_not_grow_says_why_and_goes_on() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB as usize]);
        kernel.storage().put_bytes("/b", &[2; MIB as usize]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let at = format!("-p {pid} -m 0");
        for (size, error, words) in [
            ("512k", Errno::EINVAL, "it has 1048576 bytes, and what is past byte 524288 would be lost"),
            ("9E", Errno::EINVAL, "larger than a file can be; it goes on"),
        ] {
            admin.refused(&format!("resize {at} -s {size}"), error, words).await;
        }
        admin.refused(&format!("resize -p {pid} -m 1 -s 2M"), Errno::ENODEV, "has not attached it").await;
        admin.done(&format!("pause {at}")).await;
        admin.refused(&format!("resize {at} -s 2M"), Errno::EINVAL, "it is paused; resume it first").await;
        admin.done(&format!("unpause {at}")).await;
        admin.done("allocate").await;
        admin.done(&format!("attach -p {pid} -m 1")).await;
        let other = format!("resize -p {pid} -m 1 -s +1M");
        admin.refused(&other, Errno::EINVAL, "it has no image open").await;
        admin.done(&format!("open -p {pid} -m 1 -R -a raw:/b")).await;
        admin.refused(&other, Errno::EROFS, "it is read-only").await;
        admin.done(&format!("close -p {pid} -m 1")).await;
        let server = format!("nbd:unix:/run/blktap-control/nbd{pid}.0");
        admin.done(&format!("open -p {pid} -m 1 -D -a {server}")).await;
        admin.refused(&other, Errno::EOPNOTSUPP, "is no file; make it larger where it is one").await;
        admin.done(&format!("close -p {pid} -m 1")).await;
        kernel.storage().rename("/a", "/c");
        kernel.storage().put_bytes("/a", &[3; MIB as usize]);
        admin
            .refused(&format!("resize {at} -s 2M"), Errno::ESTALE, "is not the file that the disk has")
            .await;
        assert_eq!(read(&admin.client(pid, 0).await, 5).await, 1);
        assert_eq!(kernel.storage().bytes("/a").unwrap().len() as u64, MIB);
    });
}

#[test]
fn a_file_that_takes_the_name_meanwhile_is_neither_grown_nor_used() {
    let stayed = Rc::new(Cell::new(0));
    for after_ns in (0..300_000).step_by(10_000) {
        let count = Rc::clone(&stayed);
        world(move |sim, kernel, xen| async move {
            kernel.storage().put_bytes("/a", &[1; MIB as usize]);
            let admin = Admin::new(&sim, &kernel, &xen);
            let pid = admin.create("raw:/a").await;
            let disk = admin.client(pid, 0).await;
            assert_eq!(write(&disk, 3, 7).await, Ok(()));
            let (own, ended) = (Rc::clone(&admin), Rc::new(RefCell::new(None)));
            let put = Rc::clone(&ended);
            sim.spawn("resize", 0, async move {
                let outcome = own.ctl(&format!("resize -p {pid} -m 0 -s 2M")).await;
                *put.borrow_mut() = Some(outcome);
            });
            sim.sleep_ns(after_ns).await;
            kernel.storage().rename("/a", "/c");
            kernel.storage().put_bytes("/a", &[3; MIB as usize]);
            sim.sleep_ns(1_000_000_000).await;
            let (status, words) = ended.borrow().clone().unwrap();
            assert_eq!(kernel.storage().bytes("/a").unwrap(), vec![3; MIB as usize], "{after_ns}: {words}");
            if words.contains("it stays paused") {
                assert_eq!(i32::from(status), Errno::ESTALE.0);
                // With its own file it goes on.
                kernel.storage().rename("/c", "/a");
                admin.done(&format!("unpause -p {pid} -m 0")).await;
                assert_eq!(read(&disk, 3).await, 7);
                count.set(count.get() + 1);
            }
        });
    }
    assert!(stayed.get() > 0, "no exchange came while the disk was drained");
}
