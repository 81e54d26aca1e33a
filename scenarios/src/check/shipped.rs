//! Compares the shipped check with the independent walker: both must agree on an image.

use super::Invariant;
use super::oracle::{Oracle, is_broken};
use crate::formats::{self, Broken, ImageMap};
use crate::world::World;
use kernel_model::SimHost;
use tap_images::{CheckReport, ImageError, ImageSpec};

/// Describes how the two disagree, if they do: on whether the image is sound, or on the number of mapped or lost
/// clusters.
pub fn difference(
    walked: &Result<ImageMap, Broken>,
    checked: &Result<CheckReport, ImageError>,
) -> Option<String> {
    if is_broken(Oracle::ShippedIgnored) {
        return None;
    }
    let report = match checked {
        Ok(report) => report,
        Err(error) => {
            return walked.is_ok().then(|| format!("the shipped check failed on a sound image: {error}"));
        }
    };
    let map = match (walked, report.problem_count) {
        (Ok(map), 0) => map,
        (Err(_), 1..) => return None,
        (Ok(_), n) => {
            let first = report.problems.first().map_or("", String::as_str);
            return Some(format!("the shipped check found {n} problems in a sound image: {first}"));
        }
        (Err((_, text)), 0) => return Some(format!("the shipped check found no problem, but {text}")),
    };
    let mapped = report.plain_clusters + report.compressed_clusters;
    if mapped != map.mapped {
        return Some(format!("the shipped check counts {mapped} mapped clusters, the walker {}", map.mapped));
    }
    let (lost, known) = (report.leaked_clusters, map.leaked - map.padding);
    (lost != known).then(|| format!("the shipped check counts {lost} lost clusters, the walker {known}"))
}

/// Runs the shipped check on the image `spec`, which must not be open for writing, in a separate process. Reports V1
/// unless it agrees with the walker.
pub async fn agree(world: &World, spec: &ImageSpec, when: &str) {
    let path = &spec.path;
    if world.storage.content(path).is_none() {
        return world.fail(Invariant::G11, format!("{when} the image is gone"));
    }
    let Some(walked) = formats::of(spec.format).walk_whole(&formats::used_content(&world.storage, spec))
    else {
        return;
    };
    // Both read the medium, so the drive must not delay or fail.
    world.storage.set_calm(true);
    let host = SimHost::start(&world.kernel, &world.xen, "check", 0);
    let checked = check(&host, spec).await;
    host.process.node().kill();
    world.storage.set_calm(false);
    if let Some(text) = difference(&walked, &checked) {
        world.fail(Invariant::V1, format!("{when} {text}"));
    }
}

async fn check(host: &SimHost, spec: &ImageSpec) -> Result<CheckReport, ImageError> {
    Ok(formats::drivers().check(host, spec, false).await?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::setup::Setup;
    use crate::formats::Kind;
    use crate::limits::StackLimits;
    use crate::stack::Stack;
    use crate::world::broken_by;
    use kernel_model::Content;
    use std::cell::RefCell;
    use std::rc::Rc;

    fn walk(content: &Content) -> Result<ImageMap, Broken> {
        Kind::mapped(true).model.walk(content).unwrap()
    }

    /// The results of both for a small image after `damage`.
    fn both(
        damage: impl FnOnce(&mut Content) + 'static,
    ) -> (Result<ImageMap, Broken>, Result<CheckReport, ImageError>) {
        let out = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&out);
        let broken = broken_by(|world| async move {
            let setup = Setup::mapped(&world, 0, 1 << 20, true);
            let mut content = world.storage.content(&setup.spec.path).unwrap();
            damage(&mut content);
            world.storage.put(&setup.spec.path, content.clone());
            let host = SimHost::start(&world.kernel, &world.xen, "check", 0);
            *slot.borrow_mut() = Some((walk(&content), check(&host, &setup.spec).await));
        });
        assert_eq!(broken, None);
        out.take().unwrap()
    }

    /// Byte offset of the L2 entry of `cluster` in an image with one table.
    fn entry_at(content: &Content, cluster: u64) -> u64 {
        walk(content).unwrap().tables[0] + cluster * 8
    }

    #[test]
    fn both_find_a_cluster_with_two_owners() {
        let (walked, checked) = both(|content| {
            let map = walk(content).unwrap();
            let plain = (0..256).find_map(|c| map.host_offset(c)).unwrap();
            let at = entry_at(content, 77);
            content.pages.write(at, &plain.to_be_bytes());
        });
        assert_eq!(walked.as_ref().unwrap_err().0, Invariant::Q2);
        assert!(checked.as_ref().unwrap().problem_count > 0);
        assert_eq!(difference(&walked, &checked), None);
    }

    #[test]
    fn disagreements_are_reported() {
        let (sound, fine) = both(|_| {});
        assert_eq!(difference(&sound, &fine), None);
        let broken = Err((Invariant::Q2, "two owners".to_string()));
        assert!(difference(&broken, &fine).unwrap().contains("two owners"));
        let report = fine.clone().unwrap_or_default();
        let finds = CheckReport { problem_count: 1, problems: vec!["a problem".into()], ..report.clone() };
        assert!(difference(&sound, &Ok(finds)).unwrap().contains("a problem"));
        let counts = CheckReport { plain_clusters: report.plain_clusters + 1, ..report.clone() };
        assert!(difference(&sound, &Ok(counts)).unwrap().contains("mapped"));
        let plain = ImageMap { mapped: 4, leaked: 3, padding: 1, cluster_bits: 11, ..ImageMap::default() };
        let agrees = CheckReport { plain_clusters: 4, leaked_clusters: 2, ..CheckReport::default() };
        assert_eq!(difference(&Ok(plain.clone()), &Ok(agrees.clone())), None, "one is padding");
        let loses = CheckReport { leaked_clusters: 1, ..agrees };
        assert!(difference(&Ok(plain), &Ok(loses)).unwrap().contains("lost"));
        let gone = Err(ImageError::InUse { path: "x".into() });
        assert!(difference(&sound, &gone).unwrap().contains("failed on"));
    }

    #[test]
    fn a_disagreement_breaks_v1() {
        let broken = broken_by(|world| async move {
            let setup = Setup::mapped(&world, 0, 1 << 20, false);
            agree(&world, &setup.spec, "here").await;
            assert!(!world.verdict.is_broken());
            // The shipped check refuses an image that another process may write to; the walker ignores locks.
            let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", 0);
            let stack = Stack::open(&host, &world, &setup.spec, &StackLimits::draw(&world)).await.unwrap();
            agree(&world, &setup.spec, "here").await;
            drop(stack);
        });
        assert_eq!(broken, Some(Invariant::V1));
    }
}
