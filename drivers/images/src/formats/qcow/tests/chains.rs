//! Chains of images: their limit, the locks of their files, and that reading changes none of them.

use super::*;
use crate::{Backing, ImageSpec};
use tap_core::ZeroFlags;

/// Creates `count` images, each the backing file of the one before: `/0` is the top.
fn chain(world: &World, count: usize) {
    part_of_chain(world, 0..count, None);
}

/// The same for a range of numbers; the last has `below` as backing file.
fn part_of_chain(world: &World, levels: std::ops::Range<usize>, below: Option<&str>) {
    for level in levels.clone().rev() {
        let next = (level + 1 < levels.end).then(|| (level + 1).to_string());
        let image = NewImage {
            size_bytes: 4096,
            backing: next.or(below.map(str::to_owned)),
            existing: None,
            options: layout(9, 6),
        };
        make(world, &format!("/{level}"), image).unwrap();
    }
}

fn open_file(world: &World, path: &str, write: bool) -> Result<Rc<dyn Node>, ImageError> {
    let spec = ImageSpec { format: QCOW, path: path.to_owned() };
    let backing = BackingPolicy::any(QCOW);
    let (host, options) = (world.clone(), OpenOptions { write, backing, ..OpenOptions::default() });
    world.block_on(async move { Formats::shipped().open(&host, &spec, &options).await })
}

#[test]
fn sizes_that_are_no_number_of_sectors_are_refused() {
    for size_bytes in [0, 1, 511, 513, 1 << 63, u64::MAX] {
        let image = NewImage { size_bytes, backing: None, existing: None, options: layout(12, 9) };
        let error = make(&World::new(1), PATH, image).unwrap_err().to_string();
        assert!(error.contains("size"), "{size_bytes}: {error}");
    }
}

#[test]
fn a_chain_of_sixty_four_images_opens_and_one_more_is_refused() {
    let world = World::new(1);
    chain(&world, 64);
    let top = open_file(&world, "/0", true).unwrap();
    let read = world.block_on(top.submit(request(Op::Read, 7, &[1], 9)));
    assert_eq!((read.result, read.bufs[0][511]), (Ok(()), 0));
    let world = World::new(1);
    chain(&world, 65);
    let refused = open_file(&world, "/0", true).err().unwrap().to_string();
    assert!(refused.contains("more than 64 images above /64"), "{refused}");
}

#[test]
fn the_images_of_an_open_backing_node_count() {
    for (above, told) in [(24, None), (25, Some("its chain of 65 images would be longer than 64"))] {
        let world = World::new(1);
        chain(&world, 40);
        part_of_chain(&world, 100..100 + above, Some("0"));
        let open = open_file(&world, "/0", false).unwrap();
        let gate = move |path: &str| match path {
            "/0" => Some(Backing::Open(Rc::clone(&open))),
            _ => Some(QCOW.into()),
        };
        let backing = BackingPolicy::Ask(Rc::new(gate));
        let (host, options) = (world.clone(), OpenOptions { backing, ..OpenOptions::default() });
        let spec = ImageSpec { format: QCOW, path: "/100".to_owned() };
        let opened = world.block_on(async move { Formats::shipped().open(&host, &spec, &options).await });
        match (opened, told) {
            (Ok(_), None) => {}
            (Err(error), Some(told)) => assert!(error.to_string().contains(told), "{error}"),
            (other, _) => panic!("{above} above 40: {:?}", other.map(|node| node.info())),
        }
    }
}

#[test]
fn every_file_of_an_open_chain_is_locked_against_writers() {
    let world = World::new(1);
    chain(&world, 3);
    for write in [true, false] {
        let top = open_file(&world, "/0", write).unwrap();
        for level in 0..3 {
            let path = format!("/{level}");
            assert!(open_file(&world, &path, true).is_err_and(|e| e.is_in_use()), "a writer of {path}");
            let reader = open_file(&world, &path, false);
            assert_eq!(reader.is_ok(), !write || level > 0, "a reader of {path}");
        }
        world.block_on(top.close()).unwrap();
        drop(top);
        (0..3).for_each(|level| drop(open_file(&world, &format!("/{level}"), true).unwrap()));
    }
}

#[test]
fn no_request_changes_an_image_opened_for_reading() {
    let world = World::new(1);
    chain(&world, 2);
    let before = [world.bytes("/0"), world.bytes("/1")];
    let top = open_file(&world, "/0", false).unwrap();
    let flags = [(false, false), (true, false), (false, true), (true, true)];
    let zeroes = flags.map(|(unmap, fast)| Op::WriteZeroes(ZeroFlags { unmap, fast }));
    for op in zeroes.into_iter().chain([Op::Discard]) {
        let request = Request { op, range: SectorRange::new(1, 4), bufs: IoVec::new(), fua: false };
        assert_eq!(world.block_on(top.submit(request)).result, Err(Errno::EROFS), "{op:?}");
    }
    assert_eq!(world.block_on(top.submit(request(Op::Write, 1, &[2], 9))).result, Err(Errno::EROFS));
    assert_eq!(world.block_on(top.submit(Request::flush())).result, Ok(()));
    world.block_on(top.close()).unwrap();
    assert!([world.bytes("/0"), world.bytes("/1")] == before);
}

/// A live snapshot keeps an open image below a new one.
#[test]
fn a_frozen_image_is_durable_and_shared_with_readers() {
    for (path, format) in [("/0", QCOW), ("/raw", RAW)] {
        let world = World::new(1);
        chain(&world, 1);
        world.put("/raw", vec![0; 4096]);
        let open = |write| {
            let spec = ImageSpec { format, path: path.to_owned() };
            let (host, options) = (world.clone(), OpenOptions { write, ..OpenOptions::default() });
            world.block_on(async move { Formats::shipped().open(&host, &spec, &options).await })
        };
        let image = open(true).unwrap();
        assert_eq!(world.block_on(image.submit(request(Op::Write, 2, &[1], 7))).result, Ok(()));
        assert!(open(false).is_err_and(|error| error.is_in_use()), "nobody else has {path}");
        for _ in 0..2 {
            assert_eq!(world.block_on(image.freeze()), Ok(()));
        }
        assert!(image.info().read_only);
        let late = world.block_on(image.submit(request(Op::Write, 3, &[1], 8)));
        assert_eq!(late.result, Err(Errno::EROFS), "{path} does not change");
        let crashed = world.after_crash(0);
        assert_eq!(crashed.bytes(path), world.bytes(path), "{path} is durable");
        let reader = open(false).unwrap();
        let read = world.block_on(reader.submit(request(Op::Read, 2, &[1], 1)));
        assert_eq!((read.result, read.bufs[0][0]), (Ok(()), 7));
        assert!(open(true).is_err_and(|error| error.is_in_use()), "{path} is still in use");
        let below = world.block_on(image.submit(request(Op::Read, 2, &[1], 1)));
        assert_eq!((below.result, below.bufs[0][0]), (Ok(()), 7));
        assert_eq!(world.block_on(image.close()), Ok(()));
        assert_eq!(world.block_on(image.freeze()), Err(Errno::ESHUTDOWN));
    }
}
