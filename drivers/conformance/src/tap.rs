//! Devices of a blktap2 module: reserving, opening, making, removing, freeing.
//!
//! There must be no other device while a body runs.

use crate::{OrFail, Outcome, Place, Test, holds, same, tests};
use tap_host::{Errno, SharedPage, TAP_PARAMS_BYTES, TapDevices, TapRing, Time};

/// What bodies about blktap2 need from a host.
pub trait TapHost: TapDevices + Time {}
impl<T: TapDevices + Time> TapHost for T {}

/// Sectors of a device.
const SECTORS: u64 = 2048;

/// All bodies.
pub fn all<H: TapHost>() -> Vec<Test<Place<H>>> {
    tests![
        a_device_is_reserved_and_freed,
        two_devices_have_two_numbers,
        a_device_has_its_name_until_it_is_freed,
        a_device_that_is_not_reserved_is_neither_opened_nor_freed,
        a_ring_is_open_once,
        a_ring_begins_empty,
        a_dropped_ring_is_closed,
        a_block_device_is_made_once,
        a_block_device_without_a_size_is_refused,
        a_closed_ring_takes_its_block_device_along,
    ]
}

fn is_absent(error: Errno) -> bool {
    matches!(error, Errno::ENODEV | Errno::ENXIO | Errno::EINVAL | Errno::ENOENT)
}

/// Frees `minor`, whose ring may be being closed.
async fn free<H: TapHost>(host: &H, minor: u32) -> Outcome {
    for _ in 0..1000 {
        match host.free_tap(minor).await {
            Err(Errno::EBUSY) => host.sleep_ns(1_000_000).await,
            freed => return freed.or_fail("free a device"),
        }
    }
    Err("a device whose ring is closed stays busy".into())
}

async fn reserve<H: TapHost>(host: &H) -> Result<u32, String> {
    host.allocate_tap().await.or_fail("reserve a device")
}

async fn open<H: TapHost>(host: &H, minor: u32) -> Result<H::Ring, String> {
    host.open_tap(minor).await.or_fail("open a ring")
}

/// `LEN` bytes of zeros but for these numbers.
fn structure<const LEN: usize>(numbers: &[(usize, u64)]) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    for (at, number) in numbers {
        bytes[*at..*at + 8].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// Sectors, 512 bytes in a logical block, and in a physical one, where both layouts have it.
fn params(sectors: u64) -> [u8; TAP_PARAMS_BYTES] {
    structure(&[(0, sectors), (8, 512 << 32 | 512), (16, 2), (24, 512)])
}

/// Makes the block device.
async fn make(ring: &impl TapRing, sectors: u64) -> Result<(), Errno> {
    ring.create(&mut params(sectors)).await
}

/// Removes the block device, which others may look at for a moment.
async fn remove<H: TapHost>(host: &H, ring: &H::Ring) -> Outcome {
    for _ in 0..5000 {
        match ring.remove().await {
            Err(Errno::EBUSY) => host.sleep_ns(1_000_000).await,
            removed => return removed.or_fail("remove a block device"),
        }
    }
    Err("a block device that nobody uses stays busy".into())
}

async fn a_device_is_reserved_and_freed<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    free(host, minor).await?;
    let again = reserve(host).await?;
    holds(&format!("after {minor} was freed, {again} is the first that is free"), again == minor)?;
    free(host, again).await
}

async fn two_devices_have_two_numbers<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let (one, other) = (reserve(host).await?, reserve(host).await?);
    holds(&format!("both are {one}"), one != other)?;
    holds("both have one path", host.tap_path(one) != host.tap_path(other))?;
    free(host, one).await?;
    free(host, other).await
}

async fn a_device_has_its_name_until_it_is_freed<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    let name_of = async || {
        let names = host.tap_names().await.or_fail("look for names")?;
        Ok::<_, String>(names.into_iter().find(|(number, _)| *number == minor).map(|(_, name)| name))
    };
    same("the name of a device that has none", name_of().await?, Some(minor.to_string()))?;
    let token = "n".repeat(40);
    host.name_tap(minor, &token).await.or_fail("name a device")?;
    same("the name of a device", name_of().await?, Some(token.clone()))?;
    let ring = open(host, minor).await?;
    make(&ring, SECTORS).await.or_fail("make a block device")?;
    same("the name of a device in use", name_of().await?, Some(token))?;
    remove(host, &ring).await?;
    ring.close().await;
    free(host, minor).await?;
    // Some modules free it a moment later.
    for _ in 0..1000 {
        if name_of().await?.is_none() {
            break;
        }
        host.sleep_ns(1_000_000).await;
    }
    same("the name of a device that was freed", name_of().await?, None)?;
    let absent = host.name_tap(minor, "name").await.err();
    holds(&format!("naming a device that is not reserved: {absent:?}"), absent.is_some_and(is_absent))?;
    let again = reserve(host).await?;
    same("the same number", again, minor)?;
    same("the name of the next device", name_of().await?, Some(minor.to_string()))?;
    free(host, again).await
}

async fn a_device_that_is_not_reserved_is_neither_opened_nor_freed<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    free(host, minor).await?;
    // Some modules free it a moment later.
    let mut gone = false;
    for _ in 0..1000 {
        gone = host.free_tap(minor).await.is_err_and(is_absent);
        if gone {
            break;
        }
        host.sleep_ns(1_000_000).await;
    }
    holds("a device that was freed can be freed again and again", gone)?;
    let opened = host.open_tap(minor).await.err();
    holds(&format!("opening a device that is not reserved: {opened:?}"), opened.is_some_and(is_absent))
}

async fn a_ring_is_open_once<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    let ring = open(host, minor).await?;
    let again = host.open_tap(minor).await.err();
    holds(&format!("opening an open ring: {again:?}"), again == Some(Errno::EBUSY))?;
    ring.close().await;
    let ring = open(host, minor).await?;
    ring.close().await;
    free(host, minor).await
}

async fn a_ring_begins_empty<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    let ring = open(host, minor).await?;
    ring.pull();
    let words: Vec<u32> = [0, 4, 8, 12].iter().map(|at| ring.page().load_u32(*at)).collect();
    ring.close().await;
    free(host, minor).await?;
    holds(&format!("the header of a new ring is {words:?}"), words == [0, 1, 0, 1])
}

async fn a_dropped_ring_is_closed<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    drop(open(host, minor).await?);
    free(host, minor).await
}

async fn a_block_device_is_made_once<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    let ring = open(host, minor).await?;
    let made = make(&ring, SECTORS).await;
    let again = make(&ring, SECTORS).await.err();
    remove(host, &ring).await?;
    ring.close().await;
    free(host, minor).await?;
    made.or_fail("make a block device")?;
    holds(&format!("making it again: {again:?}"), again == Some(Errno::EEXIST))
}

async fn a_block_device_without_a_size_is_refused<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    let ring = open(host, minor).await?;
    let made = make(&ring, 0).await.err();
    ring.close().await;
    free(host, minor).await?;
    holds(&format!("a block device of no sector: {made:?}"), made == Some(Errno::EINVAL))
}

async fn a_closed_ring_takes_its_block_device_along<H: TapHost>(place: Place<H>) -> Outcome {
    let host = &place.host;
    let minor = reserve(host).await?;
    let ring = open(host, minor).await?;
    make(&ring, SECTORS).await.or_fail("make a block device")?;
    ring.close().await;
    let ring = open(host, minor).await?;
    // There is none any more, or it could not be made.
    let made = make(&ring, SECTORS).await;
    remove(host, &ring).await?;
    ring.close().await;
    free(host, minor).await?;
    made.or_fail("make a block device where there was one")
}
