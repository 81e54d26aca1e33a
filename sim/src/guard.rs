//! The guard: worlds run inside madsim, where the real clock, real randomness and threads cannot be reached.
//!
//! madsim replaces `clock_gettime`, `getrandom` and thread creation of the process for the thread that runs inside it.
//! Nothing in a world should use them; if something does, it gets simulated answers, the same in every run. A run that
//! differs with the guard on and off is a bug.

/// Whether this build has the guard. An environment RUSTFLAGS hides the cfg that selects it (see .cargo/config.toml).
pub const AVAILABLE: bool = cfg!(madsim);

/// Runs `work` on a thread of its own, inside the guard if `on` and available. A panic in `work` resumes in the caller.
pub fn run<T: Send + 'static>(on: bool, seed: u64, work: impl FnOnce() -> T + Send + 'static) -> T {
    let body = move || if on { inside(seed, work) } else { work() };
    let thread = std::thread::Builder::new().name(format!("world-{seed}")).stack_size(8 << 20).spawn(body);
    match thread.expect("the machine has a thread to spare").join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[cfg(madsim)]
mod imp {
    use std::cell::RefCell;
    use std::time::Duration;

    thread_local! {
        static CLOCK: RefCell<Option<madsim::time::TimeHandle>> = const { RefCell::new(None) };
    }

    pub(super) fn inside<T: 'static>(seed: u64, work: impl FnOnce() -> T + 'static) -> T {
        let runtime = madsim::runtime::Runtime::with_seed_and_config(seed, madsim::Config::default());
        runtime.block_on(async move {
            CLOCK.with_borrow_mut(|c| *c = Some(madsim::time::TimeHandle::current()));
            let value = work();
            CLOCK.with_borrow_mut(|c| *c = None);
            value
        })
    }

    pub(crate) fn advance(ns: u64) {
        CLOCK.with_borrow(|c| {
            if let Some(clock) = c {
                clock.advance(Duration::from_nanos(ns));
            }
        });
    }
}

#[cfg(not(madsim))]
mod imp {
    pub(super) fn inside<T>(_seed: u64, work: impl FnOnce() -> T) -> T {
        work()
    }
    pub(crate) fn advance(_ns: u64) {}
}

pub(crate) use imp::advance;
use imp::inside;
