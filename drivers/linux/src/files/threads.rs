//! A small pool of threads that make plain system calls, for use where io_uring is refused.
//!
//! ```text
//!   push ──► jobs ──► up to 64 threads ──► done ──► eventfd ──► reap
//! ```

use super::call::{Call, Memory, Wait, errno};
use super::engine::{Job, Submit};
use crate::priority::ThreadPriority;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tap_host::Errno;

/// Most threads, and with that operations at a time; the rest waits in the engine's queue, which knows whose turn it
/// is. Threads start as they are needed.
const THREADS_MAX: usize = 64;
/// Most threads that work for one disk.
const OF_ONE_DISK_MAX: usize = 16;

struct Pushed {
    index: u32,
    job: Job,
    memory: Memory,
}

// SAFETY: the memory belongs to an operation in the slot table, which does not touch it until the job is done.
unsafe impl Send for Pushed {}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Pushed>,
    idle: usize,
    stop: bool,
}

#[derive(Debug)]
struct Done {
    /// Slot and count, or negative error number.
    results: Mutex<Vec<(u32, i32)>>,
    changed: Condvar,
    event: OwnedFd,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    done: Done,
}

/// The pool; dropping it waits for every job to end.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Jobs pushed and not yet handed over, so that one turn takes the lock once.
    fresh: Vec<Pushed>,
}

/// No thread panics while holding one of these locks, so the value is intact.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn work(&self) {
        let mut thread = ThreadPriority::new();
        loop {
            let mut queue = lock(&self.queue);
            let Pushed { index, job, memory } = loop {
                if let Some(pushed) = queue.jobs.pop_front() {
                    break pushed;
                }
                if queue.stop {
                    return;
                }
                queue.idle += 1;
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            };
            drop(queue);
            thread.become_that_of(job.priority);
            // SAFETY: the slot table keeps the memory, and the file open, until the result is reaped.
            let result = unsafe { job.call.execute(job.fd, &memory, Wait::Allowed) };
            // MAX_RW_COUNT is below 2^31.
            self.done.put(index, result.map_or_else(|e| -e.0, |count| count as i32));
        }
    }
}

impl Done {
    fn put(&self, index: u32, result: i32) {
        let mut results = lock(&self.results);
        let first = results.is_empty();
        results.push((index, result));
        drop(results);
        self.changed.notify_one();
        if first {
            // Fails only if the counter is near 2^64: it is at most 1 between two reaps.
            let told = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
            assert!(told.is_ok(), "failed to tell of file operations that ended: {told:?}");
        }
    }
}

impl Threads {
    /// A pool without threads yet.
    ///
    /// # Errors
    /// `EMFILE` without a free descriptor.
    pub(crate) fn new() -> Result<Self, Errno> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|e| Errno(e.raw_os_error()))?;
        let done = Done { results: Mutex::default(), changed: Condvar::new(), event };
        let shared = Shared { queue: Mutex::default(), work: Condvar::new(), done };
        Ok(Self { shared: Arc::new(shared), threads: Vec::new(), fresh: Vec::new() })
    }

    fn start_thread(&mut self) -> Result<(), Errno> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("file".into()).spawn(move || shared.work());
        self.threads.push(thread.map_err(|e| errno(&e))?);
        Ok(())
    }
}

impl Submit for Threads {
    fn fd(&self) -> BorrowedFd<'_> {
        self.shared.done.event.as_fd()
    }

    fn room(&self) -> (usize, usize) {
        (THREADS_MAX, OF_ONE_DISK_MAX)
    }

    fn does(&self, _call: Call) -> bool {
        true
    }

    unsafe fn push(&mut self, index: u32, job: Job, memory: &Memory) {
        self.fresh.push(Pushed { index, job, memory: memory.clone() });
    }

    fn submit(&mut self) -> Result<(), Errno> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        let mut queue = lock(&self.shared.queue);
        queue.jobs.extend(self.fresh.drain(..));
        let (waiting, idle) = (queue.jobs.len(), queue.idle);
        drop(queue);
        for _ in 0..waiting.min(idle) {
            self.shared.work.notify_one();
        }
        for _ in idle..waiting {
            if self.threads.len() < THREADS_MAX
                && let Err(error) = self.start_thread()
            {
                // The threads that already run are enough; without any, no job would ever end.
                return if self.threads.is_empty() { Err(error) } else { Ok(()) };
            }
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<(u32, i32)>) {
        done.append(&mut lock(&self.shared.done.results));
    }

    fn wait(&mut self) -> Result<(), Errno> {
        self.submit()?;
        let mut results = lock(&self.shared.done.results);
        while results.is_empty() {
            results = self.shared.done.changed.wait(results).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn unsubmitted(&mut self) -> bool {
        !self.fresh.is_empty()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.queue).stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A worker that panicked has already printed its message.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::priority::of_thread;
    use std::os::fd::AsRawFd;
    use tap_host::IoPriority;

    /// The priority of a thread after it has synchronised a file with each of these priorities.
    fn left(priorities: &[Option<IoPriority>]) -> u16 {
        let file = tempfile::tempfile().unwrap();
        let pool = Threads::new().unwrap();
        let job = |priority| Job { call: Call::SyncData, fd: file.as_raw_fd(), priority };
        let jobs =
            priorities.iter().map(|priority| Pushed { index: 0, job: job(*priority), memory: Memory::new() });
        let mut queue = lock(&pool.shared.queue);
        queue.jobs.extend(jobs);
        queue.stop = true;
        drop(queue);
        let shared = Arc::clone(&pool.shared);
        let worker = std::thread::spawn(move || {
            shared.work();
            of_thread()
        });
        let left = worker.join().unwrap();
        assert_eq!(lock(&pool.shared.done.results).len(), priorities.len());
        left
    }

    #[test]
    fn a_thread_has_the_priority_of_the_file_that_it_works_for() {
        let own = std::thread::spawn(of_thread).join().unwrap();
        let [idle, low] = ["idle", "best-effort:6"].map(|text| text.parse().ok());
        assert_eq!(left(&[idle]), 3 << 13);
        assert_eq!(left(&[idle, low]), 2 << 13 | 6);
        assert_eq!(left(&[low, idle, None]), own);
    }
}
