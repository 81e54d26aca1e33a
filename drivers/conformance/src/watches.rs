//! Xenstore: watches.
//!
//! Events may be spurious, and one may stand for several changes. So a body first takes unrelated events, makes the
//! change, and then requires an event.

use crate::store::{StoreHost, read, remove, write};
use crate::{
    EVENTS_MAX, OrFail, Outcome, PATIENCE_MS, Place, QUIET_NS, Test, holds, same, same_bytes, soon, tests,
    within_ns,
};
use std::pin::pin;
use tap_host::{Errno, Transaction, Watcher, poll_once};

/// All bodies.
pub fn all<H: StoreHost>() -> Vec<Test<Place<H>>> {
    tests![
        a_watch_fires_when_it_is_registered,
        a_watch_fires_for_its_node,
        a_watch_fires_for_a_node_that_was_missing,
        a_watch_fires_for_what_is_below,
        a_watch_fires_when_its_node_is_removed,
        a_watch_fires_when_what_is_above_is_removed,
        a_watch_fires_for_the_same_value_again,
        a_watch_fires_for_committed_transactions,
        a_watch_tells_of_nothing_elsewhere,
        changes_that_nobody_looks_at_are_told,
        two_watches_of_one_path_both_fire,
        nested_watches_both_fire,
        a_dropped_watch_leaves_the_others,
        a_dropped_look_takes_no_event,
        impatient_looks_lose_no_event,
        many_watches_come_and_go,
    ]
}

/// A watch, with its path.
struct Watching<H: StoreHost> {
    place: Place<H>,
    path: String,
    watcher: H::Watcher,
}

impl<H: StoreHost> Watching<H> {
    /// Registers it and takes the event of the registration.
    async fn start(place: &Place<H>, name: &str) -> Result<Self, String> {
        let path = if name.is_empty() { place.folder.clone() } else { place.path(name) };
        let watcher = place.host.watch(&path).await.or_fail("watch")?;
        let watching = Self { place: place.clone(), path, watcher };
        watching.event("the event of its registration").await?;
        watching.drain().await?;
        Ok(watching)
    }

    /// The next event, which must come; its path.
    async fn event(&self, what: &str) -> Result<String, String> {
        let event = soon(&self.place.host, what, self.watcher.next()).await?.or_fail("hear of a change")?;
        let below = event.path.strip_prefix(&self.path);
        let within = below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        holds(&format!("{} is at or below {}, which is watched", event.path, self.path), within)?;
        Ok(event.path)
    }

    /// Takes events until none comes.
    async fn drain(&self) -> Outcome {
        for _ in 0..EVENTS_MAX {
            match within_ns(&self.place.host, QUIET_NS, self.watcher.next()).await {
                Some(event) => event.or_fail("hear of a change")?,
                None => return Ok(()),
            };
        }
        Err("events come without end".into())
    }

    /// Takes events until one is of `name`, or may stand for it.
    async fn until(&self, name: &str) -> Outcome {
        let path = self.place.path(name);
        loop {
            let told = self.event(&format!("an event of {name}")).await?;
            if told == path || told == self.path {
                return Ok(());
            }
        }
    }
}

async fn a_watch_fires_when_it_is_registered<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("there"), b"").await?;
    for name in ["there", "missing", "missing/below"] {
        let watcher = place.host.watch(&place.path(name)).await.or_fail("watch")?;
        let event = soon(&place.host, "the event of a registration", watcher.next()).await?;
        same("its path", event.or_fail("hear of it")?.path, place.path(name))?;
    }
    Ok(())
}

async fn a_watch_fires_for_its_node<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a"), b"0").await?;
    let watching = Watching::start(&place, "a").await?;
    for value in [b"1", b"2", b"3"] {
        write(&place, &place.path("a"), value).await?;
        watching.until("a").await?;
        same_bytes("the value", &read(&place, &place.path("a")).await?, value)?;
        watching.drain().await?;
    }
    Ok(())
}

async fn a_watch_fires_for_a_node_that_was_missing<H: StoreHost>(place: Place<H>) -> Outcome {
    let watching = Watching::start(&place, "a/b").await?;
    write(&place, &place.path("a/b"), b"").await?;
    watching.until("a/b").await?;
    let parent = Watching::start(&place, "c").await?;
    write(&place, &place.path("c/d"), b"").await?;
    parent.event("an event of a new directory").await?;
    Ok(())
}

async fn a_watch_fires_for_what_is_below<H: StoreHost>(place: Place<H>) -> Outcome {
    let watching = Watching::start(&place, "").await?;
    for name in ["a", "a/b/c", "d"] {
        write(&place, &place.path(name), b"").await?;
        watching.until(name).await?;
        watching.drain().await?;
    }
    remove(&place, &place.path("a/b/c")).await?;
    watching.until("a/b/c").await
}

async fn a_watch_fires_when_its_node_is_removed<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a"), b"").await?;
    let watching = Watching::start(&place, "a").await?;
    remove(&place, &place.path("a")).await?;
    watching.until("a").await?;
    watching.drain().await?;
    write(&place, &place.path("a"), b"").await?;
    watching.until("a").await
}

async fn a_watch_fires_when_what_is_above_is_removed<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a/b/c"), b"").await?;
    let watching = Watching::start(&place, "a/b/c").await?;
    remove(&place, &place.path("a")).await?;
    watching.until("a/b/c").await
}

async fn a_watch_fires_for_the_same_value_again<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a"), b"1").await?;
    let watching = Watching::start(&place, "a").await?;
    write(&place, &place.path("a"), b"1").await?;
    watching.until("a").await
}

async fn a_watch_fires_for_committed_transactions<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("b"), b"").await?;
    let (a, b) = (Watching::start(&place, "a").await?, Watching::start(&place, "b").await?);
    loop {
        let tx = place.host.transaction().await.or_fail("start a transaction")?;
        tx.write(&place.path("a"), b"1").await.or_fail("write")?;
        tx.remove(&place.path("b")).await.or_fail("remove")?;
        match tx.commit().await {
            Err(Errno::EAGAIN) => {}
            other => break other.or_fail("commit")?,
        }
    }
    a.until("a").await?;
    b.until("b").await
}

async fn a_watch_tells_of_nothing_elsewhere<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a/b"), b"").await?;
    let watching = Watching::start(&place, "a").await?;
    // The origin of every event is checked.
    for name in ["ab", "b", "a-b", "b/a"] {
        write(&place, &place.path(name), b"").await?;
        remove(&place, &place.path(name)).await?;
    }
    write(&place, &place.path("a/mark"), b"").await?;
    watching.until("a/mark").await
}

async fn changes_that_nobody_looks_at_are_told<H: StoreHost>(place: Place<H>) -> Outcome {
    let watching = Watching::start(&place, "").await?;
    for i in 0..300 {
        write(&place, &place.path(&format!("n{}", i % 100)), format!("{i}").as_bytes()).await?;
    }
    write(&place, &place.path("last"), b"1").await?;
    watching.until("last").await?;
    watching.drain().await?;
    write(&place, &place.path("more"), b"1").await?;
    watching.until("more").await
}

async fn two_watches_of_one_path_both_fire<H: StoreHost>(place: Place<H>) -> Outcome {
    let (one, two) = (Watching::start(&place, "a").await?, Watching::start(&place, "a").await?);
    for _ in 0..3 {
        write(&place, &place.path("a"), b"").await?;
        one.until("a").await?;
        two.until("a").await?;
        one.drain().await?;
        two.drain().await?;
    }
    Ok(())
}

async fn nested_watches_both_fire<H: StoreHost>(place: Place<H>) -> Outcome {
    let (above, below) = (Watching::start(&place, "a").await?, Watching::start(&place, "a/b").await?);
    write(&place, &place.path("a/b"), b"").await?;
    above.until("a/b").await?;
    below.until("a/b").await?;
    remove(&place, &place.path("a")).await?;
    above.until("a").await?;
    below.until("a/b").await
}

async fn a_dropped_watch_leaves_the_others<H: StoreHost>(place: Place<H>) -> Outcome {
    let (one, two) = (Watching::start(&place, "a").await?, Watching::start(&place, "a").await?);
    let above = Watching::start(&place, "").await?;
    write(&place, &place.path("a"), b"1").await?;
    drop(one);
    two.until("a").await?;
    two.drain().await?;
    write(&place, &place.path("a"), b"2").await?;
    two.until("a").await?;
    drop(two);
    above.drain().await?;
    write(&place, &place.path("a"), b"3").await?;
    above.until("a").await?;
    let again = Watching::start(&place, "a").await?;
    write(&place, &place.path("a"), b"4").await?;
    again.until("a").await
}

async fn a_dropped_look_takes_no_event<H: StoreHost>(place: Place<H>) -> Outcome {
    let watching = Watching::start(&place, "a").await?;
    for i in 0..5_u8 {
        {
            let mut next = pin!(watching.watcher.next());
            let waits = poll_once(next.as_mut()).await.is_none();
            holds("nothing has changed", waits)?;
            write(&place, &place.path("a"), &[i]).await?;
            // The event arrives, and the waiting future is dropped without having seen it.
            place.host.sleep_ns(QUIET_NS / 4).await;
        }
        watching.until("a").await?;
        watching.drain().await?;
    }
    Ok(())
}

async fn impatient_looks_lose_no_event<H: StoreHost>(place: Place<H>) -> Outcome {
    let watching = Watching::start(&place, "a").await?;
    for i in 0..10_u8 {
        write(&place, &place.path("a"), &[i]).await?;
        let mut patience_ns = 1_000;
        let event = loop {
            let event = within_ns(&place.host, patience_ns, watching.watcher.next()).await;
            match event {
                Some(event) => break event.or_fail("hear of a change")?,
                None => patience_ns *= 2,
            }
            holds("an event comes eventually", patience_ns < u64::from(PATIENCE_MS) * 1_000_000)?;
        };
        same("its path", event.path, place.path("a"))?;
        watching.drain().await?;
    }
    Ok(())
}

async fn many_watches_come_and_go<H: StoreHost>(place: Place<H>) -> Outcome {
    for round in 0..3 {
        let mut watchers = Vec::new();
        for i in 0..50 {
            let path = place.path(&format!("n{i}"));
            watchers.push((i, place.host.watch(&path).await.or_fail("watch")?));
        }
        for (i, watcher) in &watchers {
            let event = soon(&place.host, "the event of a registration", watcher.next()).await?;
            same(
                &format!("path in round {round}"),
                event.or_fail("hear of it")?.path,
                place.path(&format!("n{i}")),
            )?;
        }
    }
    Ok(())
}
