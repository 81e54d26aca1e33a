//! Lines for standard output and standard error, written without making the program wait.
//!
//! ```text
//!   put(line) ──► queue, bounded ──► a thread of its own ──write──► the descriptor
//!                    └─ full: the line is dropped and counted
//! ```
//!
//! The reader of a service's log may stop reading. A write to the full pipe would then wait, and with it every disk
//! that the process serves. So lines go into a bounded queue, and lines without room are dropped; the next line that
//! has room is preceded by the number of dropped ones. The descriptor's mode is not changed: it is shared with the
//! process that gave it to us.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes that wait to be written.
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
    /// A line has been taken out and is not yet written.
    writing: bool,
    /// A write failed, for another reason than that the reader is gone.
    failed: bool,
}

impl Lines {
    /// Lines for `to`. If no thread can be started, every line is dropped.
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

    /// Queues a line, without its newline; never waits for the reader.
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

    /// Waits until everything is written, or `most` is over. Returns whether nothing was lost, other than to a reader
    /// that is gone.
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
        // Nothing panics with the lock held; the state would still be consistent.
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

    /// A reader that stops reading stops no one else; when it continues it learns how many lines it missed.
    #[test]
    fn nobody_waits_for_who_reads() {
        let (near, far) = UnixStream::pair().expect("sockets");
        let lines = Lines::new(near);
        let line = "x".repeat(1023);
        // More than the socket and the queue hold together: this ends only because lines are dropped.
        for _ in 0..8192 {
            lines.put(line.clone());
        }
        assert!(!lines.finish(Duration::from_millis(10)), "nothing was read");
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
        // Reported as soon as there is room again, so perhaps more than once.
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
