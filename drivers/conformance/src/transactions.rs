//! Xenstore: reads and writes that take effect together or not at all.
//!
//! A store may refuse any transaction and ask for it to be started again, so bodies about the effects of a transaction
//! repeat it until it is accepted; a refusal is required only where the seam promises a conflict.

use crate::store::{StoreHost, missing, read, remove, write};
use crate::{OrFail, Outcome, Place, Test, holds, same, same_bytes, tests, until};
use std::cell::Cell;
use std::rc::Rc;
use tap_host::{Errno, Transaction, Xenstore};

/// All bodies.
pub fn all<H: StoreHost>() -> Vec<Test<Place<H>>> {
    tests![
        a_transaction_is_seen_at_its_end_only,
        a_transaction_sees_its_own_changes,
        a_dropped_transaction_has_no_effect,
        what_a_transaction_removes_is_gone_at_its_end,
        a_node_that_was_read_and_changed_conflicts,
        a_node_that_was_missed_and_made_conflicts,
        a_node_that_was_read_and_removed_conflicts,
        a_node_that_both_write_conflicts,
        of_two_transactions_one_has_to_be_repeated,
        changes_elsewhere_may_conflict_and_lose_nothing,
        repeated_transactions_lose_no_change,
        errors_within_a_transaction_leave_it_usable,
    ]
}

type Tx<H> = <H as Xenstore>::Transaction;

async fn start<H: StoreHost>(place: &Place<H>) -> Result<Tx<H>, String> {
    place.host.transaction().await.or_fail("start a transaction")
}

/// Ends one; returns whether it took effect.
async fn commit<T: Transaction>(tx: T) -> Result<bool, String> {
    match tx.commit().await {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN) => Ok(false),
        Err(e) => Err(format!("failed to commit: {e}")),
    }
}

/// Ends one that must be refused.
async fn conflicts<T: Transaction>(tx: T) -> Outcome {
    same("commit", tx.commit().await, Err(Errno::EAGAIN))
}

/// How often a transaction is started again before a body gives up.
const TRIES: u32 = 1000;

async fn a_transaction_is_seen_at_its_end_only<H: StoreHost>(place: Place<H>) -> Outcome {
    let (old, new) = (place.path("old"), place.path("new/below"));
    write(&place, &old, b"1").await?;
    for _ in 0..TRIES {
        let tx = start(&place).await?;
        tx.write(&old, b"2").await.or_fail("write")?;
        tx.write(&new, b"3").await.or_fail("write")?;
        same_bytes("what others read", &read(&place, &old).await?, b"1")?;
        missing(&place, &new).await?;
        missing(&place, &place.path("new")).await?;
        if commit(tx).await? {
            same_bytes("after the commit", &read(&place, &old).await?, b"2")?;
            return same_bytes("after the commit", &read(&place, &new).await?, b"3");
        }
        same_bytes("after a refused commit", &read(&place, &old).await?, b"1")?;
        missing(&place, &new).await?;
    }
    Err("no transaction is ever accepted".into())
}

async fn a_transaction_sees_its_own_changes<H: StoreHost>(place: Place<H>) -> Outcome {
    let (a, b) = (place.path("a"), place.path("b/c"));
    write(&place, &a, b"1").await?;
    let tx = start(&place).await?;
    same("before", tx.read(&a).await, Ok(b"1".to_vec()))?;
    tx.write(&a, b"2").await.or_fail("write")?;
    tx.write(&b, b"\0").await.or_fail("write")?;
    same("a changed node", tx.read(&a).await, Ok(b"2".to_vec()))?;
    same("a new node", tx.read(&b).await, Ok(b"\0".to_vec()))?;
    same("its parent", tx.read(&place.path("b")).await, Ok(vec![]))?;
    tx.remove(&a).await.or_fail("remove")?;
    same("a removed node", tx.read(&a).await, Err(Errno::ENOENT))?;
    tx.remove(&place.path("b")).await.or_fail("remove")?;
    same("below a removed node", tx.read(&b).await, Err(Errno::ENOENT))?;
    tx.write(&a, b"3").await.or_fail("write")?;
    same("a node made again", tx.read(&a).await, Ok(b"3".to_vec()))?;
    drop(tx);
    same_bytes("outside", &read(&place, &a).await?, b"1")
}

async fn a_dropped_transaction_has_no_effect<H: StoreHost>(place: Place<H>) -> Outcome {
    write(&place, &place.path("a"), b"1").await?;
    for _ in 0..20 {
        let tx = start(&place).await?;
        tx.write(&place.path("a"), b"2").await.or_fail("write")?;
        tx.write(&place.path("b"), b"2").await.or_fail("write")?;
        drop(tx);
        same_bytes("the node", &read(&place, &place.path("a")).await?, b"1")?;
        missing(&place, &place.path("b")).await?;
    }
    write(&place, &place.path("a"), b"3").await?;
    same_bytes("written since", &read(&place, &place.path("a")).await?, b"3")
}

async fn what_a_transaction_removes_is_gone_at_its_end<H: StoreHost>(place: Place<H>) -> Outcome {
    let (a, b) = (place.path("a"), place.path("a/b"));
    write(&place, &b, b"1").await?;
    for _ in 0..TRIES {
        let tx = start(&place).await?;
        tx.remove(&a).await.or_fail("remove")?;
        same_bytes("what others read", &read(&place, &b).await?, b"1")?;
        if commit(tx).await? {
            missing(&place, &b).await?;
            return missing(&place, &a).await;
        }
    }
    Err("no transaction is ever accepted".into())
}

async fn a_node_that_was_read_and_changed_conflicts<H: StoreHost>(place: Place<H>) -> Outcome {
    let (a, b) = (place.path("a"), place.path("b"));
    write(&place, &a, b"1").await?;
    let tx = start(&place).await?;
    same("before", tx.read(&a).await, Ok(b"1".to_vec()))?;
    tx.write(&b, b"1").await.or_fail("write")?;
    write(&place, &a, b"2").await?;
    conflicts(tx).await?;
    same_bytes("the other's value", &read(&place, &a).await?, b"2")?;
    missing(&place, &b).await
}

async fn a_node_that_was_missed_and_made_conflicts<H: StoreHost>(place: Place<H>) -> Outcome {
    let tx = start(&place).await?;
    same("before", tx.read(&place.path("a")).await, Err(Errno::ENOENT))?;
    tx.write(&place.path("b"), b"1").await.or_fail("write")?;
    write(&place, &place.path("a"), b"2").await?;
    conflicts(tx).await?;
    missing(&place, &place.path("b")).await
}

async fn a_node_that_was_read_and_removed_conflicts<H: StoreHost>(place: Place<H>) -> Outcome {
    for removed in ["a/b", "a"] {
        write(&place, &place.path("a/b"), b"1").await?;
        let tx = start(&place).await?;
        same("before", tx.read(&place.path("a/b")).await, Ok(b"1".to_vec()))?;
        remove(&place, &place.path(removed)).await?;
        tx.write(&place.path("c"), b"1").await.or_fail("write")?;
        conflicts(tx).await?;
        missing(&place, &place.path("c")).await?;
    }
    Ok(())
}

async fn a_node_that_both_write_conflicts<H: StoreHost>(place: Place<H>) -> Outcome {
    let a = place.path("a");
    write(&place, &a, b"1").await?;
    let tx = start(&place).await?;
    tx.write(&a, b"2").await.or_fail("write")?;
    write(&place, &a, b"3").await?;
    conflicts(tx).await?;
    same_bytes("the other's value", &read(&place, &a).await?, b"3")
}

async fn of_two_transactions_one_has_to_be_repeated<H: StoreHost>(place: Place<H>) -> Outcome {
    let a = place.path("a");
    write(&place, &a, b"0").await?;
    let (one, two) = (start(&place).await?, start(&place).await?);
    for (tx, value) in [(&one, b"1"), (&two, b"2")] {
        same("before", tx.read(&a).await, Ok(b"0".to_vec()))?;
        tx.write(&a, value).await.or_fail("write")?;
    }
    let taken = [commit(two).await?, commit(one).await?];
    holds("they are not both accepted", taken != [true, true])?;
    let want = match taken {
        [true, _] => b"2",
        [_, true] => b"1",
        _ => b"0",
    };
    same_bytes("the value", &read(&place, &a).await?, want)
}

async fn changes_elsewhere_may_conflict_and_lose_nothing<H: StoreHost>(place: Place<H>) -> Outcome {
    let (own, other) = (place.path("own/a"), place.path("other/b"));
    write(&place, &own, b"1").await?;
    for i in 0..20_u8 {
        let tx = start(&place).await?;
        tx.write(&own, &[i]).await.or_fail("write")?;
        write(&place, &other, &[i]).await?;
        let taken = commit(tx).await?;
        same_bytes("the other's value", &read(&place, &other).await?, &[i])?;
        let value = read(&place, &own).await?;
        holds("an accepted write is there, a refused one is not", (value == [i]) == taken)?;
    }
    Ok(())
}

/// Adds one to the number at `path`.
async fn increment<H: StoreHost>(place: &Place<H>, path: &str) -> Outcome {
    for _ in 0..TRIES {
        let tx = start(place).await?;
        let value = tx.read(path).await.or_fail("read")?;
        tx.write(path, &[value[0] + 1]).await.or_fail("write")?;
        if commit(tx).await? {
            return Ok(());
        }
    }
    Err("no transaction is ever accepted".into())
}

async fn repeated_transactions_lose_no_change<H: StoreHost>(place: Place<H>) -> Outcome {
    let path = place.path("count");
    write(&place, &path, &[0]).await?;
    let done = Rc::new(Cell::new(0));
    for i in 0..3 {
        let (place, path, done) = (place.clone(), path.clone(), Rc::clone(&done));
        place.host.clone().spawn("counter", i, async move {
            for _ in 0..5 {
                if increment(&place, &path).await.is_ok() {
                    done.set(done.get() + 1);
                }
            }
        });
    }
    until(&place.host, "the end of all transactions", || done.get() == 15).await?;
    same_bytes("the number", &read(&place, &path).await?, &[15])
}

async fn errors_within_a_transaction_leave_it_usable<H: StoreHost>(place: Place<H>) -> Outcome {
    let path = place.path("a");
    for _ in 0..TRIES {
        let tx = start(&place).await?;
        same("read what is missing", tx.read(&path).await, Err(Errno::ENOENT))?;
        same("read a bad path", tx.read("/a//b").await, Err(Errno::EINVAL))?;
        same("write a bad path", tx.write("/a b", b"").await, Err(Errno::EINVAL))?;
        let removed = tx.remove(&place.path("missing/below")).await;
        same("remove a node without a parent", removed, Err(Errno::ENOENT))?;
        tx.write(&path, b"1").await.or_fail("write")?;
        if commit(tx).await? {
            return same_bytes("the value", &read(&place, &path).await?, b"1");
        }
    }
    Err("no transaction is ever accepted".into())
}
