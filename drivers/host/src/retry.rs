//! What is tried again after an error: which errors may pass, and after which pauses.
//!
//! An error that is worth another try in one place is the answer in another, so the set of errors belongs to what was
//! tried. All sets are here, so that they can be compared. The caller decides how often to repeat.

use crate::{Errno, Time};

/// What was tried and failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tried {
    /// A call about a whole file, which may have had its effect: to open, size, lock, synchronise or remove it. Only an
    /// interruption passes: `EAGAIN` says that somebody else has the lock, and after any other error of a
    /// synchronisation data may be lost.
    FileCall,
    /// One operation on bytes of a file, which did nothing. It is repeated in place, after pauses that are short for a
    /// request: what the host lacks (`EBUSY`, `ENOMEM`) is left to the owner of the request.
    Transfer,
    /// A request to a node, repeated as a whole.
    Request,
    /// A page, a mapping or a channel that is to be made, for which others may free memory or space.
    Page,
    /// A page that a predecessor may have left. It may be there although there is no descriptor for it, or it cannot be
    /// read. A host without space (`ENOSPC`) has no such page: that one needs none.
    LeftPage,
    /// A request to xenstored, safe to make twice: the server is busy or short of memory, a quota is used up
    /// (`ENOSPC`), or a message was lost (`EIO`). A connection that is gone for good is `ESHUTDOWN`.
    Store,
}

impl Tried {
    /// Whether another try may succeed after `error`. An interruption passes everywhere.
    pub fn may_pass(self, error: Errno) -> bool {
        error == Errno::EINTR
            || match self {
                Self::FileCall => false,
                Self::Transfer => error == Errno::EAGAIN,
                Self::Request => matches!(error, Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM),
                Self::Page => matches!(error, Errno::ENOMEM | Errno::ENOSPC),
                Self::LeftPage => {
                    matches!(error, Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE | Errno::EIO)
                }
                Self::Store => {
                    matches!(error, Errno::EBUSY | Errno::ENOMEM | Errno::ENOSPC | Errno::EIO)
                }
            }
    }
}

/// Before the second try, in nanoseconds; it doubles with each.
const PAUSE_NS: u64 = 1_000_000;
/// The longest pause, in nanoseconds, where what is waited for is no longer a moment's trouble.
const PAUSE_MAX_NS: u64 = 1_000_000_000;

/// What is left of the patience with one thing: a number of repetitions, after pauses that double.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    repeats: u32,
    pause_ns: u64,
    pause_max_ns: u64,
    left_ns: u64,
}

impl Patience {
    /// To try once, and `repeats` times more; pauses double from a millisecond on, and end at a second.
    pub const fn of(repeats: u32) -> Self {
        Self { repeats, pause_ns: PAUSE_NS, pause_max_ns: PAUSE_MAX_NS, left_ns: u64::MAX }
    }

    /// To try until a deadline; pauses double from a millisecond on. See [`Patience::again_before`].
    pub const fn until() -> Self {
        Self { pause_max_ns: u64::MAX, ..Self::of(u32::MAX) }
    }

    /// The same with pauses that double from `first_ns` on, and are `total_ns` nanoseconds together at most.
    pub const fn with_pauses(self, first_ns: u64, total_ns: u64) -> Self {
        Self { pause_ns: first_ns, pause_max_ns: u64::MAX, left_ns: total_ns, ..self }
    }

    /// Takes one repetition; the pause before it in nanoseconds, or `None` where none is left.
    pub fn next_pause_ns(&mut self) -> Option<u64> {
        self.repeats = self.repeats.checked_sub(1)?;
        self.left_ns = self.left_ns.checked_sub(self.pause_ns)?;
        let pause_ns = self.pause_ns;
        self.pause_ns = pause_ns.saturating_mul(2).min(self.pause_max_ns);
        Some(pause_ns)
    }

    /// Takes one repetition and waits until it is due; `false`, at once, where none is left.
    pub async fn again(&mut self, time: &impl Time) -> bool {
        let Some(pause_ns) = self.next_pause_ns() else { return false };
        time.sleep_ns(pause_ns).await;
        true
    }

    /// The same unless it is `deadline_ns` already. The pause may end after the deadline, and the try is made all the
    /// same.
    pub async fn again_before(&mut self, time: &impl Time, deadline_ns: u64) -> bool {
        time.now_ns() < deadline_ns && self.again(time).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::{Future, ready};
    use std::pin::pin;
    use std::rc::Rc;
    use std::task::{Context, Poll, Waker};

    const ALL: [Tried; 6] =
        [Tried::FileCall, Tried::Transfer, Tried::Request, Tried::Page, Tried::LeftPage, Tried::Store];

    fn after(error: Errno) -> Vec<Tried> {
        ALL.into_iter().filter(|tried| tried.may_pass(error)).collect()
    }

    #[test]
    fn an_error_passes_where_another_try_can_help_and_nowhere_else() {
        assert_eq!(after(Errno::EINTR), ALL);
        assert_eq!(after(Errno::EAGAIN), [Tried::Transfer, Tried::Request]);
        assert_eq!(after(Errno::EBUSY), [Tried::Request, Tried::Store]);
        assert_eq!(after(Errno::ENOMEM), [Tried::Request, Tried::Page, Tried::LeftPage, Tried::Store]);
        assert_eq!(after(Errno::ENOSPC), [Tried::Page, Tried::Store], "a full disk stays full for a request");
        assert_eq!(after(Errno::EIO), [Tried::LeftPage, Tried::Store]);
        assert_eq!(after(Errno::EMFILE), [Tried::LeftPage]);
        for lasts in [Errno::ESHUTDOWN, Errno::ENOENT, Errno::EINVAL, Errno::EOPNOTSUPP] {
            assert_eq!(after(lasts), []);
        }
    }

    /// Sleeps in no time.
    #[derive(Clone, Default)]
    struct Clock(Rc<Cell<u64>>);

    impl Time for Clock {
        fn now_ns(&self) -> u64 {
            self.0.get()
        }
        fn sleep_ns(&self, ns: u64) -> impl Future<Output = ()> + 'static {
            self.0.set(self.0.get() + ns);
            ready(())
        }
    }

    fn now<F: Future>(future: F) -> F::Output {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => output,
            Poll::Pending => unreachable!("the clock does not wait"),
        }
    }

    fn pauses_ms(mut patience: Patience) -> Vec<u64> {
        std::iter::from_fn(|| patience.next_pause_ns()).map(|ns| ns / 1_000_000).collect()
    }

    #[test]
    fn pauses_double_up_to_a_second_as_often_as_was_said() {
        assert_eq!(pauses_ms(Patience::of(0)), []);
        assert_eq!(
            pauses_ms(Patience::of(12)),
            [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000],
            "a second is the longest"
        );
        let own = Patience::of(12).with_pauses(500_000_000, 4_000_000_000);
        assert_eq!(pauses_ms(own), [500, 1000, 2000], "the fourth would be more than four seconds");
        assert_eq!(pauses_ms(Patience::of(2).with_pauses(0, 0)), [0, 0]);
    }

    #[test]
    fn a_deadline_ends_what_has_no_number() {
        let (clock, mut patience) = (Clock::default(), Patience::until());
        let mut tries = 1;
        while now(patience.again_before(&clock, 2_000_000_000)) {
            tries += 1;
        }
        assert_eq!((tries, clock.now_ns()), (12, 2_047_000_000));
        assert!(!now(Patience::of(0).again(&clock)));
    }
}
