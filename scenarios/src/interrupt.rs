//! Ctrl-C: work stops at the next run and reports what it has.

use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit status that a shell reports for a program that Ctrl-C ended.
pub const STATUS: u8 = 130;

static ASKED: AtomicBool = AtomicBool::new(false);

/// Whether the user wants the work to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// From now on the first Ctrl-C asks for an end, and the second one ends the process.
///
/// # Errors
/// The system refuses a thread or the signal's handler.
pub fn listen() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let work = async || -> std::io::Result<()> {
        let mut signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        while signals.recv().await.is_some() {
            if ASKED.swap(true, Ordering::Relaxed) {
                exit(i32::from(STATUS));
            }
            eprintln!("tapsim: stopping; Ctrl-C again to end at once");
        }
        Ok(())
    };
    let thread = move || {
        if let Err(error) = runtime.block_on(work()) {
            eprintln!("tapsim: failed to watch for Ctrl-C: {error}");
        }
    };
    std::thread::Builder::new().name("interrupt".into()).spawn(thread).map(drop)
}
