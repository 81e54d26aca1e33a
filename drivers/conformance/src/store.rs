//! Xenstore: nodes and their values.

use crate::{OrFail, Outcome, Place, Test, holds, same, same_bytes, soon, tests, until};
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{Errno, Tasks, Time, Xenstore, poll_once};

/// What bodies about xenstore need from a host.
pub trait StoreHost: Xenstore + Time + Tasks {}
impl<T: Xenstore + Time + Tasks> StoreHost for T {}

/// All bodies.
pub fn all<H: StoreHost>() -> Vec<Test<Place<H>>> {
    tests![
        any_bytes_come_back,
        long_values_come_back,
        a_value_that_fits_no_message_is_refused,
        a_missing_node_is_not_read,
        parents_are_made_without_a_value,
        writing_keeps_what_is_below,
        a_node_is_removed_with_all_below,
        what_is_missing_is_removed_below_a_parent_only,
        names_are_sorted,
        a_large_directory_is_listed_whole,
        bad_paths_are_refused,
        operations_at_once_get_their_own_answers,
        dropped_operations_disturb_nobody,
    ]
}

/// A read that must succeed.
pub(crate) async fn read<H: StoreHost>(place: &Place<H>, path: &str) -> Result<Vec<u8>, String> {
    soon(&place.host, "an answer", place.host.read(path)).await?.or_fail(&format!("read {path}"))
}

/// A write that must succeed.
pub(crate) async fn write<H: StoreHost>(place: &Place<H>, path: &str, value: &[u8]) -> Outcome {
    soon(&place.host, "an answer", place.host.write(path, value)).await?.or_fail(&format!("write {path}"))
}

/// A removal that must succeed.
pub(crate) async fn remove<H: StoreHost>(place: &Place<H>, path: &str) -> Outcome {
    soon(&place.host, "an answer", place.host.remove(path)).await?.or_fail(&format!("remove {path}"))
}

/// Fails unless there is no such node.
pub(crate) async fn missing<H: StoreHost>(place: &Place<H>, path: &str) -> Outcome {
    let read = soon(&place.host, "an answer", place.host.read(path)).await?;
    same(&format!("read {path}"), read, Err(Errno::ENOENT))
}

async fn list<H: StoreHost>(place: &Place<H>, path: &str) -> Result<Vec<String>, String> {
    soon(&place.host, "an answer", place.host.directory(path)).await?.or_fail(&format!("list {path}"))
}

async fn any_bytes_come_back<H: StoreHost>(place: Place<H>) -> Outcome {
    let path = place.path("a");
    let all: Vec<u8> = (0..=255).collect();
    for value in [&b"text"[..], b"", b"\0", b"a\0b\0\0", &all, b"\n \xff", b"end"] {
        write(&place, &path, value).await?;
        same_bytes("a value", &read(&place, &path).await?, value)?;
    }
    Ok(())
}

async fn long_values_come_back<H: StoreHost>(place: Place<H>) -> Outcome {
    for len in [2048, 3000, 3800] {
        let value = crate::pattern(len as u8, len);
        write(&place, &place.path("long"), &value).await?;
        same_bytes("a long value", &read(&place, &place.path("long")).await?, &value)?;
    }
    Ok(())
}

async fn a_value_that_fits_no_message_is_refused<H: StoreHost>(place: Place<H>) -> Outcome {
    let path = place.path("a");
    write(&place, &path, b"old").await?;
    for len in [4096 - path.len(), 4095, 4096, 4097, 100_000] {
        let refused = soon(&place.host, "an answer", place.host.write(&path, &vec![1; len])).await?;
        same(&format!("write {len} bytes"), refused, Err(Errno::ENOSPC))?;
    }
    same_bytes("the value", &read(&place, &path).await?, b"old")?;
    let longest = vec![2; 4079 - path.len()];
    write(&place, &path, &longest).await?;
    same_bytes("the longest value", &read(&place, &path).await?, &longest)
}

async fn a_missing_node_is_not_read<H: StoreHost>(place: Place<H>) -> Outcome {
    for name in ["missing", "missing/below"] {
        missing(&place, &place.path(name)).await?;
        let listed = place.host.directory(&place.path(name)).await;
        same("list it", listed, Err(Errno::ENOENT))?;
    }
    Ok(())
}

async fn parents_are_made_without_a_value<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a/b/c"), b"value").await?;
    for parent in ["a", "a/b"] {
        same_bytes(parent, &read(&place, &place.path(parent)).await?, b"")?;
    }
    same("below a", list(&place, &place.path("a")).await?, vec!["b".to_owned()])?;
    same("below a/b", list(&place, &place.path("a/b")).await?, vec!["c".to_owned()])?;
    same("below a/b/c", list(&place, &place.path("a/b/c")).await?, vec![])
}

async fn writing_keeps_what_is_below<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a/b"), b"below").await?;
    write(&place, &place.path("a"), b"above").await?;
    same_bytes("the node", &read(&place, &place.path("a")).await?, b"above")?;
    same_bytes("below", &read(&place, &place.path("a/b")).await?, b"below")
}

async fn a_node_is_removed_with_all_below<H: StoreHost>(place: Place<H>) -> Outcome {
    for name in ["a", "a/b", "a/b/c", "a/d", "ab"] {
        write(&place, &place.path(name), name.as_bytes()).await?;
    }
    remove(&place, &place.path("a")).await?;
    for name in ["a", "a/b", "a/b/c", "a/d"] {
        missing(&place, &place.path(name)).await?;
    }
    same("what is left", list(&place, &place.folder).await?, vec!["ab".to_owned()])?;
    write(&place, &place.path("a"), b"again").await?;
    same("below a new node", list(&place, &place.path("a")).await?, vec![])
}

async fn what_is_missing_is_removed_below_a_parent_only<H: StoreHost>(place: Place<H>) -> Outcome {
    remove(&place, &place.path("missing")).await?;
    let removed = place.host.remove(&place.path("missing/below")).await;
    same("remove a node without a parent", removed, Err(Errno::ENOENT))?;
    missing(&place, &place.path("missing")).await
}

async fn names_are_sorted<H: StoreHost>(place: Place<H>) -> Outcome {
    let names = ["b", "a", "ab", "10", "9", "A", "a-b", "a_b", "@"];
    for name in names {
        write(&place, &place.path(name), b"").await?;
    }
    let mut sorted = names.map(str::to_owned).to_vec();
    sorted.sort_unstable();
    same("names", list(&place, &place.folder).await?, sorted)
}

async fn a_large_directory_is_listed_whole<H: StoreHost>(place: Place<H>) -> Outcome {
    // About 9000 bytes of names: more than two messages hold.
    let names: Vec<String> = (0..150).map(|i| format!("{i:04}-{}", "n".repeat(i % 100 + 5))).collect();
    for name in names.iter().rev() {
        write(&place, &place.path(name), b"").await?;
    }
    same("names", list(&place, &place.folder).await?, names)
}

async fn bad_paths_are_refused<H: StoreHost>(place: Place<H>) -> Outcome {
    let long = place.path(&"n".repeat(2048 - place.folder.len()));
    for path in ["", "/a//b", "/a/", "//", "/a b", "/a\0b", "/a\n", "/\u{e4}", &long] {
        let host = &place.host;
        same(&format!("read {path:?}"), host.read(path).await.err(), Some(Errno::EINVAL))?;
        same(&format!("write {path:?}"), host.write(path, b"").await.err(), Some(Errno::EINVAL))?;
        same(&format!("remove {path:?}"), host.remove(path).await.err(), Some(Errno::EINVAL))?;
        same(&format!("list {path:?}"), host.directory(path).await.err(), Some(Errno::EINVAL))?;
        same(&format!("watch {path:?}"), host.watch(path).await.err(), Some(Errno::EINVAL))?;
    }
    let longest = place.path(&"n".repeat(2047 - place.folder.len()));
    write(&place, &longest, b"1").await?;
    same_bytes("the value at the longest path", &read(&place, &longest).await?, b"1")
}

async fn operations_at_once_get_their_own_answers<H: StoreHost>(place: Place<H>) -> Outcome {
    const COUNT: usize = 60;
    for i in 0..COUNT {
        write(&place, &place.path(&format!("n{i}")), format!("{i}").as_bytes()).await?;
    }
    let answers = Rc::new(RefCell::new(Vec::new()));
    for i in 0..COUNT {
        let (place, answers) = (place.clone(), Rc::clone(&answers));
        place.host.clone().spawn("reader", i as u64, async move {
            let path = place.path(&format!("n{i}"));
            let right = match i % 3 {
                0 => place.host.read(&path).await == Ok(format!("{i}").into_bytes()),
                1 => place.host.directory(&path).await == Ok(vec![]),
                _ => place.host.read(&format!("{path}/missing")).await == Err(Errno::ENOENT),
            };
            answers.borrow_mut().push(right);
        });
    }
    until(&place.host, "an answer to every request", || answers.borrow().len() == COUNT).await?;
    holds("every request got its own answer", answers.borrow().iter().all(|right| *right))
}

async fn dropped_operations_disturb_nobody<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a"), b"1").await?;
    for i in 0..20_u8 {
        poll_once(place.host.read(&place.path("missing"))).await;
        poll_once(place.host.directory(&place.folder)).await;
        poll_once(place.host.write(&place.path("dropped"), &[i])).await;
        poll_once(place.host.watch(&place.path("a"))).await;
        poll_once(place.host.transaction()).await;
        same_bytes("a value", &read(&place, &place.path("a")).await?, b"1")?;
    }
    write(&place, &place.path("b"), b"2").await?;
    same_bytes("another", &read(&place, &place.path("b")).await?, b"2")
}
