use super::*;
use crate::PAGE_BYTES;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Wake};

const KIB: usize = 1024;

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

type Taking<'a> = Pin<Box<dyn Future<Output = Result<Share, Errno>> + 'a>>;

fn poll(taking: &mut Taking<'_>, woken: &Arc<Woken>) -> Option<Share> {
    match taking.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(woken)))) {
        Poll::Ready(share) => Some(share.unwrap()),
        Poll::Pending => None,
    }
}

fn take<'a>(stage: &'a Stage, bytes: usize, woken: &Arc<Woken>) -> Result<Share, Taking<'a>> {
    let mut taking: Taking<'a> = Box::pin(stage.take(bytes));
    poll(&mut taking, woken).ok_or(taking)
}

#[test]
fn guarantees_are_in_use_from_the_start_and_refused_where_they_do_not_fit() {
    let budget = Budget::new(100);
    let a = budget.stage(60).unwrap();
    assert_eq!(budget.stage(41).err(), Some(Errno::ENOMEM));
    let b = budget.stage(40).unwrap();
    let all = BudgetFigures { used_bytes: 100, kept_bytes: 0, peak_bytes: 100, limit_bytes: 100 };
    assert_eq!(budget.figures(), all);
    let (x, y) = (a.try_take(60).unwrap(), b.try_take(40).unwrap());
    assert_eq!(budget.figures().used_bytes, 100);
    assert!(a.try_take(1).is_none() && b.try_take(1).is_none());
    drop((x, y, a));
    assert_eq!(budget.figures().used_bytes, 40);
    assert!(b.try_take(100).is_some(), "memory that no stage was promised is free for all");
}

#[test]
fn a_take_waits_for_its_turn_and_no_longer() {
    let budget = Budget::new(100);
    let (a, b) = (budget.stage(50).unwrap(), budget.stage(20).unwrap());
    let woken: [Arc<Woken>; 3] = Default::default();
    let all = b.try_take(50).unwrap();
    let first = a.try_take(30).unwrap();
    let mut second = take(&a, 30, &woken[0]).err().unwrap();
    let mut third = take(&a, 5, &woken[1]).err().unwrap();
    assert!(a.try_take(1).is_none(), "no take overtakes another");
    assert_eq!(a.take(51).now().err(), Some(Errno::EINVAL));
    drop(all);
    assert_eq!([0, 1].map(|i| woken[i].0.load(Ordering::Relaxed)), [1, 0], "there is room elsewhere");
    let second = poll(&mut second, &woken[0]).unwrap();
    assert_eq!(woken[1].0.load(Ordering::Relaxed), 1, "and for the next as well");
    let third = poll(&mut third, &woken[1]).unwrap();
    assert_eq!(a.used_bytes(), 65);
    drop((first, second, third));
    assert_eq!(budget.figures().used_bytes, 70);
}

#[test]
fn who_gives_up_lets_the_next_go_on() {
    let budget = Budget::new(64);
    let a = budget.stage(64).unwrap();
    let woken: [Arc<Woken>; 2] = Default::default();
    let most = a.try_take(60).unwrap();
    let large = take(&a, 64, &woken[0]).err().unwrap();
    let mut small = take(&a, 4, &woken[1]).err().unwrap();
    drop(large);
    assert_eq!(woken[1].0.load(Ordering::Relaxed), 1);
    assert!(poll(&mut small, &woken[1]).is_some());
    drop(small);
    assert!(!a.is_waited_for());
    drop(most);
}

#[test]
fn what_is_kept_for_long_leaves_a_quarter() {
    let budget = Budget::new(100);
    let (cache, other) = (budget.stage(10).unwrap(), budget.stage(10).unwrap());
    let kept: Vec<Share> = std::iter::from_fn(|| cache.try_keep(5)).collect();
    assert_eq!(cache.used_bytes(), 65);
    assert!(other.try_take(35).is_some());
    drop(kept);
    let taken = other.try_take(90).unwrap();
    let guaranteed: Vec<Share> = std::iter::from_fn(|| cache.try_keep(5)).collect();
    assert_eq!(guaranteed.len(), 2);
    drop(taken);
}

#[test]
fn buffers_of_a_share_cost_size_classes_and_are_used_again() {
    let budget = Budget::new(1 << 20);
    let stage = budget.stage(64 * KIB).unwrap();
    let mut share = stage.try_take(32 * KIB).unwrap();
    let buf = share.buffer(9 * KIB).unwrap();
    assert_eq!((buf.len(), share.bytes()), (9 * KIB, 16 * KIB));
    let at = buf.as_ptr();
    assert_eq!(share.buffer(17 * KIB).err(), Some(Errno::ENOMEM));
    drop(share);
    assert_eq!(stage.used_bytes(), 16 * KIB);
    drop(buf);
    assert_eq!((stage.used_bytes(), budget.figures().used_bytes), (0, 80 * KIB), "it is kept");
    let again = stage.take(16 * KIB).now().unwrap().buffer(16 * KIB).unwrap();
    assert_eq!(again.as_ptr(), at);
    drop(again);
    let all = stage.try_take(1 << 20).unwrap();
    assert_eq!(budget.figures().used_bytes, 1 << 20, "what is kept makes room");
    drop(all);
    assert_eq!(cost_of(1), PAGE_BYTES);
}

/// Requests that hold a share of one stage and ask for one of the next, more of them than the budget has room for.
#[test]
fn whoever_asks_downwards_only_goes_on() {
    for seed in 0_u64..200 {
        let budget = Budget::new(300);
        let stages = [40, 60, 80].map(|guarantee| budget.stage(guarantee).unwrap());
        let mut state = seed;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let sizes: Vec<[usize; 3]> =
            (0..30).map(|_| [40, 60, 80].map(|most| 1 + next(most) as usize)).collect();
        let woken: Arc<Woken> = Arc::default();
        let mut works: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for size in sizes {
            let stages = stages.clone();
            works.push(Box::pin(async move {
                let _first = stages[0].take(size[0]).await.unwrap();
                let _second = stages[1].take(size[1]).await.unwrap();
                let _third = stages[2].take(size[2]).await.unwrap();
                let mut once = false;
                poll_fn(|cx| {
                    cx.waker().wake_by_ref();
                    if std::mem::replace(&mut once, true) { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            }));
        }
        let waker = Waker::from(Arc::clone(&woken));
        while !works.is_empty() {
            let before = woken.0.load(Ordering::Relaxed);
            let mut left = works.len();
            let first = next(left as u64) as usize;
            works.rotate_left(first);
            works.retain_mut(|w| w.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            left -= works.len();
            assert!(
                left > 0 || woken.0.load(Ordering::Relaxed) > before,
                "seed {seed}: no request makes progress"
            );
        }
        assert!(budget.figures().peak_bytes <= 300);
        assert_eq!(budget.figures().used_bytes, 180);
    }
}

trait Now<T> {
    fn now(self) -> T;
}

impl<T, F: Future<Output = T>> Now<T> for F {
    fn now(self) -> T {
        match std::pin::pin!(self).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it waits"),
        }
    }
}
