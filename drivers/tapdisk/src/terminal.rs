//! The console of a real process: its standard streams.

use crate::Console;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::{Cell, RefCell};
use std::io::{IsTerminal, Write, stderr, stdout};

/// Standard output and standard error; a progress bar on a terminal, plain lines elsewhere.
#[derive(Default)]
pub struct Terminal {
    bar: RefCell<Option<ProgressBar>>,
    /// Tenths that were printed as lines.
    tenths: Cell<u64>,
}

impl Terminal {
    /// The console.
    pub fn new() -> Self {
        Self::default()
    }

    fn bar(&self, total_bytes: u64) -> ProgressBar {
        let mut bar = self.bar.borrow_mut();
        let bar = bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(
                "{bar:40} {percent:>3} % {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            );
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr()).with_style(style)
        });
        bar.clone()
    }
}

impl Console for Terminal {
    fn out(&self, line: &str) {
        // Nobody is left to be told when a reader goes.
        if let Err(error) = writeln!(stdout(), "{line}").and_then(|()| stdout().flush())
            && error.kind() != std::io::ErrorKind::BrokenPipe
        {
            self.err(&format!("failed to print: {error}"));
        }
    }

    fn err(&self, line: &str) {
        // There is no place left to say that this failed.
        let _ = writeln!(stderr(), "{line}");
    }

    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        if stderr().is_terminal() {
            let bar = self.bar(total_bytes);
            bar.set_position(done_bytes);
            if done_bytes >= total_bytes {
                bar.finish();
            }
            return;
        }
        let tenths = (u128::from(done_bytes) * 10).checked_div(u128::from(total_bytes)).unwrap_or(10) as u64;
        if tenths > self.tenths.replace(tenths) {
            self.err(&format!("{} %", tenths * 10));
        }
    }
}
