//! Lines for standard output and standard error that nobody waits for.
//!
//! ```text
//!   put(line) ──► queue, bounded ──► a thread of its own ──write──► the descriptor
//!                    └─ full: the line is dropped and counted
//! ```
//!
//! Whoever reads a service's log may stop reading. A write to the full pipe would then wait, and with it every disk
//! that the process serves. So lines are put into a queue that is bounded, and what finds no room is dropped; the next
//! line that finds room comes behind the count of those that did not. The descriptor itself is left as it is: its mode
//! is shared with whoever gave it to us.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that wait to be written at most.
const QUEUE_BYTES: usize = 256 << 10;

/// Lines that are written by a thread of their own.
#[derive(Clone)]
pub struct Lines(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<String>,
    bytes: usize,
    dropped: u64,
    /// A line has been taken out and is not written yet.
    writing: bool,
    /// Something could not be written, and the reader has not gone.
    failed: bool,
}

impl Lines {
    /// Lines for `to`. Where there is no thread to be had, every line is dropped.
    pub fn new(to: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("lines".into()).spawn(move || own.write_to(to));
        drop(thread);
        Self(shared)
    }

    /// Those of standard output.
    pub fn stdout() -> &'static Self {
        static LINES: OnceLock<Lines> = OnceLock::new();
        LINES.get_or_init(|| Self::new(io::stdout()))
    }

    /// Those of standard error.
    pub fn stderr() -> &'static Self {
        static LINES: OnceLock<Lines> = OnceLock::new();
        LINES.get_or_init(|| Self::new(io::stderr()))
    }

    /// Puts in a line, without its end; never waits for who reads.
    pub fn put(&self, line: String) {
        let mut state = self.0.lock();
        if state.bytes + line.len() > QUEUE_BYTES {
            state.dropped += 1;
            return;
        }
        match std::mem::take(&mut state.dropped) {
            0 => {}
            n => state.push(format!("{n} lines were left out: nobody read them")),
        }
        state.push(line);
        self.0.changed.notify_all();
    }

    /// Waits until everything is written, or `most` is over. Gives whether nothing was lost but to a reader that has
    /// gone.
    pub fn finish(&self, most: Duration) -> bool {
        let deadline = Instant::now() + most;
        let mut state = self.0.lock();
        while state.writing || !state.queue.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        !state.failed && state.dropped == 0
    }
}

impl State {
    fn push(&mut self, line: String) {
        self.bytes += line.len();
        self.queue.push_back(line);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held; the state would be whole all the same.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to(&self, mut to: impl Write) {
        let mut state = self.lock();
        loop {
            let Some(mut line) = state.queue.pop_front() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.writing = true;
            drop(state);
            let bytes = line.len();
            line.push('\n');
            // In one piece, so that lines of several processes do not mix.
            let written = to.write_all(line.as_bytes()).and_then(|()| to.flush());
            state = self.lock();
            state.bytes -= bytes;
            state.writing = false;
            state.failed |= written.is_err_and(|error| error.kind() != io::ErrorKind::BrokenPipe);
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::net::UnixStream;

    /// A reader that stops reading stops nobody; when it goes on it learns how much it has missed.
    #[test]
    fn nobody_waits_for_who_reads() {
        let (near, far) = UnixStream::pair().expect("sockets");
        let lines = Lines::new(near);
        let line = "x".repeat(1023);
        // More than the socket and the queue hold together: this ends only because lines are dropped.
        for _ in 0..8192 {
            lines.put(line.clone());
        }
        assert!(!lines.finish(Duration::from_millis(10)), "nobody has read");
        let reader = std::thread::spawn(move || {
            let lines = BufReader::new(far).lines().map_while(Result::ok);
            lines.take_while(|line| line != "last").collect::<Vec<_>>()
        });
        while !lines.0.lock().queue.is_empty() {
            std::thread::yield_now();
        }
        lines.put("last".into());
        assert!(lines.finish(Duration::from_secs(60)));
        let read = reader.join().expect("the reader ends");
        // Told as soon as there is room again, so perhaps more than once.
        let missing_of = |text: &String| {
            let number = text.strip_suffix(" lines were left out: nobody read them")?;
            number.parse::<usize>().ok()
        };
        let missing: usize = read.iter().filter_map(missing_of).sum();
        let read: Vec<&String> = read.iter().filter(|read| missing_of(read).is_none()).collect();
        assert!(missing > 0);
        assert_eq!(read.len() + missing, 8192);
        assert!(read.iter().all(|read| **read == line), "whole lines");
    }
}
