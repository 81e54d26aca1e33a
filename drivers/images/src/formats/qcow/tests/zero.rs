//! Zeros, discards and extents.

use super::*;
use crate::testing::{Effect, Fault};
use tap_core::{NodeName, Source, ZeroFlags};

fn zero(qcow: &Qcow<World>, start: u64, sectors: u32, flags: ZeroFlags) -> LocalBoxFuture<Response> {
    qcow.submit(Request::write_zeroes(SectorRange::new(start, sectors), flags))
}

const PLAIN: ZeroFlags = ZeroFlags { unmap: false, fast: false };
const FAST: ZeroFlags = ZeroFlags { unmap: true, fast: true };

fn overlay() -> Setup {
    Setup { base_sectors: Some(200), compressed: true, ..SMALL }
}

#[test]
fn zeros_hide_the_backing_file_and_discards_do_not() {
    // Of a buffered file only whole pages are zeroed in place.
    let overlay = || Setup { direct: true, ..overlay() };
    for refuse in [false, true] {
        let world = World::new(3);
        overlay().create(&world);
        if refuse {
            world.refuse_zeroing();
        }
        let qcow = overlay().open(&world);
        // Sectors from 10 on are written; clusters 0, 3 and 70 are compressed; the rest reads as the base.
        world.block_on(write(&qcow, 10, 4, 9)).result.unwrap();
        let before = all(&world, &qcow);
        world.block_on(qcow.submit(Request::discard(SectorRange::new(0, 256)))).result.unwrap();
        let after = all(&world, &qcow);
        for (s, (old, new)) in before.iter().zip(&after).enumerate() {
            assert!(new == old || *new == Some(0) && !refuse, "sector {s}: {old:?} became {new:?}");
        }
        assert_eq!(after[10..14], if refuse { [Some(9); 4] } else { [Some(0); 4] });
        assert_eq!(world.block_on(zero(&qcow, 100, 20, FAST)).result, Err(Errno::EOPNOTSUPP));
        assert_eq!(all(&world, &qcow), after, "a refusal changes nothing");
        let fast = world.block_on(zero(&qcow, 10, 4, FAST)).result;
        assert_eq!(fast, if refuse { Err(Errno::EOPNOTSUPP) } else { Ok(()) });
        world.block_on(zero(&qcow, 1, 30, PLAIN)).result.unwrap();
        world.block_on(zero(&qcow, 195, 20, ZeroFlags { unmap: true, fast: false })).result.unwrap();
        world.block_on(qcow.close()).unwrap();
        let again = all(&world, &overlay().open(&world));
        for (s, got) in again.iter().enumerate() {
            let zeroed = (1..31).contains(&s) || s >= 195;
            assert_eq!(*got, if zeroed { Some(0) } else { after[s] }, "sector {s}");
        }
        assert_eq!(checked(&world).problem_count, 0);
    }
}

/// With the least memory zeros are written in many parts; the last one counts as much as the first.
#[test]
fn zeros_larger_than_their_memory_are_written_to_the_end() {
    let world = World::new(6);
    let setup = Setup { sectors: 1024, l2_bits: 9, base_sectors: Some(1024), tables: 1, ..SMALL };
    setup.create(&world);
    let qcow = setup.open(&world);
    world.block_on(zero(&qcow, 3, 1000, PLAIN)).result.unwrap();
    for (s, got) in all(&world, &qcow).into_iter().enumerate() {
        let want = if (3..1003).contains(&s) { 0 } else { base_fill(s as u64) };
        assert_eq!(got, Some(want), "sector {s}");
    }
}

#[test]
fn zeros_over_unmapped_clusters_cost_no_operation() {
    let world = World::new(4);
    let setup = Setup { direct: true, ..SMALL };
    setup.create(&world);
    let qcow = setup.open(&world);
    world.block_on(write(&qcow, 0, 3, 7)).result.unwrap();
    let (size, ops) = (world.bytes(PATH).len(), world.ops());
    world.block_on(zero(&qcow, 8, 240, FAST)).result.unwrap();
    assert_eq!((world.bytes(PATH).len(), world.ops()), (size, ops), "no operation of the host");
    world.block_on(zero(&qcow, 1, 100, FAST)).result.unwrap();
    assert_eq!(world.bytes(PATH).len(), size);
    assert_eq!(all(&world, &qcow)[..4], [Some(7), Some(0), Some(0), Some(0)]);
    assert_eq!(world.block_on(zero(&qcow, 250, 7, PLAIN)).result, Err(Errno::EINVAL));
}

/// Nothing shows through past the end of a backing file, even if a cluster begins there.
#[test]
fn zeros_past_the_end_of_the_backing_file_cost_no_operation() {
    let world = World::new(4);
    overlay().create(&world);
    let qcow = overlay().open(&world);
    let (size, ops) = (world.bytes(PATH).len(), world.ops());
    world.block_on(zero(&qcow, 200, 56, FAST)).result.unwrap();
    assert_eq!((world.bytes(PATH).len(), world.ops()), (size, ops), "no operation of the host");
    assert_eq!(world.block_on(zero(&qcow, 198, 58, FAST)).result, Err(Errno::EOPNOTSUPP));
}

/// The entry of a failed write may still be in the file, and appear after a crash: answered zeros are written to its
/// place instead of relying on the published mapping.
#[test]
fn zeros_are_written_where_a_failed_write_may_have_left_bytes() {
    let world = World::new(5);
    SMALL.create(&world);
    let qcow = SMALL.open(&world);
    world.block_on(write(&qcow, 0, 1, 1)).result.unwrap();
    // The data is written; the entry fails.
    let nth = world.ops() + 1;
    world.fail(Some(Fault { nth, error: Errno::EIO, effect: Effect::All, sticky: false }));
    let failing = world.clone();
    let answer = world.block_on({
        let qcow = Rc::clone(&qcow);
        async move {
            let answer = write(&qcow, 20, 2, 5).await;
            failing.fail(None);
            answer
        }
    });
    assert_eq!(answer.result, Err(Errno::EIO));
    world.block_on(zero(&qcow, 20, 2, PLAIN)).result.unwrap();
    let extents = world.block_on(qcow.extents(SectorRange::new(20, 2), 1024)).unwrap();
    assert!(
        matches!(&extents[0].source, Source::Node { name: Some(name), .. } if name.as_str() == PATH),
        "{extents:?}"
    );
    flush(&world, &qcow).unwrap();
    let world = world.as_seen();
    assert_eq!(all(&world, &SMALL.open(&world))[20..22], [Some(0); 2]);
}

/// The later writes are not tried, so none of them loses its place.
#[test]
fn a_file_that_was_given_up_loses_no_space() {
    let world = World::new(7);
    let setup = Setup { cluster_bits: 12, ..SMALL };
    setup.create(&world);
    let qcow = setup.open(&world);
    world.block_on(write(&qcow, 0, 8, 7)).result.unwrap();
    flush(&world, &qcow).unwrap();
    let size = world.bytes(PATH).len();
    world.fail(Some(Fault { nth: world.ops(), error: Errno::EIO, effect: Effect::None, sticky: true }));
    assert_eq!(world.block_on(zero(&qcow, 0, 8, PLAIN)).result, Err(Errno::EIO));
    world.fail(None);
    assert_eq!(world.marked("file-given-up"), 1);
    for start in (16..240).step_by(8) {
        assert_eq!(world.block_on(write(&qcow, start, 2, 8)).result, Err(Errno::EIO));
    }
    assert_eq!(world.block_on(qcow.close()), Err(Errno::EIO));
    assert_eq!(world.bytes(PATH).len(), size);
}

#[test]
fn extents_report_the_source_of_bytes() {
    let world = World::new(6);
    overlay().create(&world);
    let qcow = overlay().open(&world);
    world.block_on(write(&qcow, 12, 8, 9)).result.unwrap();
    let mut seen = Vec::new();
    let mut at = 0;
    while at < 256 {
        for extent in world.block_on(qcow.extents(SectorRange::new(at, (256 - at) as u32), 1024)).unwrap() {
            let from = match extent.source {
                Source::Nothing | Source::Unreadable { .. } => None,
                Source::Node { name, compressed, .. } => {
                    Some((if name == Some(NodeName::new(PATH)) { "top" } else { "base" }, compressed))
                }
            };
            seen.push((at, extent.count, from, extent.zero));
            at += extent.count;
        }
    }
    assert_eq!(at, 256);
    let of = |sector: u64| *seen.iter().find(|s| s.0 <= sector && sector < s.0 + s.1).unwrap();
    assert_eq!(of(0).2, Some(("top", true)), "compressed");
    assert_eq!(of(2).2, Some(("base", false)), "from the base");
    assert_eq!(of(13).2, Some(("top", false)), "our own");
    assert_eq!(
        (of(199).2, of(200).2, of(200).3),
        (Some(("base", false)), None, true),
        "past the end of the base"
    );
    // An image opened for reading reports the same.
    world.block_on(qcow.close()).unwrap();
    let reader = overlay().try_open(&world, false).unwrap();
    let first = world.block_on(reader.extents(SectorRange::new(0, 256), 1024)).unwrap();
    assert_eq!(
        first[0].source,
        Source::Node { name: Some(NodeName::new(PATH)), offset: None, compressed: true }
    );
}
