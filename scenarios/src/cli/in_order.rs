//! Independent work on several threads, with results in order.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

/// Does `work` on each of `items`, on `jobs` threads, and passes each result to `tell` after those of all items before
/// it. An error of `tell` ends it; items in progress are finished.
pub(super) fn in_order<I: Sync, R: Send, E>(
    jobs: usize,
    items: &[I],
    work: impl Fn(&I) -> R + Sync,
    mut tell: impl FnMut(&I, R) -> Result<(), E>,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let (done, results) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, items.len().max(1)) {
            let (done, next, work) = (done.clone(), &next, &work);
            scope.spawn(move || {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { break };
                    if done.send((at, work(item))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(done);
        let (mut early, mut told) = (BTreeMap::new(), 0);
        for (at, result) in results {
            early.insert(at, result);
            while let Some(result) = early.remove(&told) {
                tell(&items[told], result)?;
                told += 1;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::in_order;
    use std::sync::Barrier;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        let items: Vec<u32> = (0..64).collect();
        // Two items are always in progress, or neither completes.
        let pair = Barrier::new(2);
        let mut told = Vec::new();
        let work = |n: &u32| {
            pair.wait();
            n * 2
        };
        let all: Result<(), ()> = in_order(2, &items, work, |item, result| {
            told.push((*item, result));
            Ok(())
        });
        assert_eq!(all, Ok(()));
        assert_eq!(told, items.iter().map(|n| (*n, n * 2)).collect::<Vec<_>>());
    }

    #[test]
    fn an_error_ends_the_work() {
        let items: Vec<u32> = (0..1_000_000).collect();
        let mut told = 0;
        let ended = in_order(
            4,
            &items,
            |n| *n,
            |item, _| {
                told += 1;
                if *item == 3 { Err("enough") } else { Ok(()) }
            },
        );
        assert_eq!((ended, told), (Err("enough"), 4));
        let nothing: Result<(), ()> = in_order(4, &[], |n: &u32| *n, |_, _| Err(()));
        assert_eq!(nothing, Ok(()));
    }
}
