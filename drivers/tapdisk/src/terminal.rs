//! The console of a real process: its standard streams.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::{Cell, RefCell};
use std::io::{self, IsTerminal, Write, stderr, stdout};
use std::time::Duration;
use tap_linux::{Lines, Starting};
use tap_programs::Console;

/// Standard output and standard error; a progress bar on a terminal that can draw one, plain lines elsewhere.
pub struct Terminal {
    /// The name of the program.
    program: &'static str,
    /// Whether bars are drawn.
    draws: bool,
    /// Printing must not wait for a reader: disks are being served.
    serves: bool,
    bar: RefCell<Option<ProgressBar>>,
    /// Tenths of the progress that were printed as lines.
    tenths: Cell<u64>,
    /// Something could not be printed.
    failed: Cell<bool>,
    /// The reader of standard output has gone.
    gone: Cell<bool>,
    /// For whom the program starts in the background.
    starting: RefCell<Option<Starting>>,
}

/// How long to wait at the end for a reader.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Fits into 80 columns, whatever the sizes.
const BAR: &str = "{bar:20} {percent:>3} % {bytes}/{total_bytes} {bytes_per_sec} {eta}";

impl Terminal {
    /// The console of `program`.
    pub fn new(program: &'static str) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        Self {
            program,
            draws: !dumb && stderr().is_terminal(),
            serves: false,
            bar: RefCell::default(),
            tenths: Cell::default(),
            failed: Cell::default(),
            gone: Cell::default(),
            starting: RefCell::default(),
        }
    }

    /// The console of a program that serves disks: printing never waits for a reader, see [`Lines`]. With `starting`
    /// it serves in the background: once it is ready, it prints nothing any more.
    pub fn of_service(program: &'static str, starting: Option<Starting>) -> Self {
        Self { draws: false, serves: true, starting: RefCell::new(starting), ..Self::new(program) }
    }

    /// The exit status of a program that wants to end with `status`: not 0 if output was lost.
    pub fn status(&self, status: u8) -> u8 {
        let lost = self.serves && !Lines::stdout().finish(LAST_LINES);
        if lost {
            self.err(&format!("{}: failed to print every line to standard output", self.program));
        }
        status.max(u8::from(lost || self.failed.get()))
    }

    fn draw(&self, done_bytes: u64, total_bytes: u64) {
        let mut bar = self.bar.borrow_mut();
        let bar = bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr()).with_style(style)
        });
        bar.set_position(done_bytes);
    }

    /// Leaves the bar as it is, and continues below it.
    fn leave_bar(&self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
            let _ = writeln!(stderr());
        }
    }

    fn print(&self, line: &str, to: &mut dyn Write) {
        let Err(error) = writeln!(to, "{line}").and_then(|()| to.flush()) else { return };
        // One message is enough, and none if the reader is gone.
        if error.kind() == io::ErrorKind::BrokenPipe {
            self.gone.set(true);
        } else if !self.failed.replace(true) {
            self.err(&format!("{}: failed to print: {error}", self.program));
        }
    }
}

impl Console for Terminal {
    fn out(&self, line: &str) {
        if self.serves {
            return Lines::stdout().put(line.to_owned());
        }
        self.leave_bar();
        self.print(line, &mut stdout());
    }

    fn err(&self, line: &str) {
        if self.serves {
            return Lines::stderr().put(line.to_owned());
        }
        self.leave_bar();
        // There is nowhere left to report that this failed.
        let _ = writeln!(stderr(), "{line}");
    }

    fn is_read(&self) -> bool {
        !self.gone.get()
    }

    fn is_terminal(&self) -> bool {
        !self.serves && stdout().is_terminal()
    }

    fn ready(&self) {
        let Some(starting) = self.starting.take() else { return };
        // What was said so far belongs to the caller.
        Lines::stdout().finish(LAST_LINES);
        Lines::stderr().finish(LAST_LINES);
        if let Err(error) = starting.ready() {
            self.err(&format!("{}: failed to leave the streams of its caller: {error}", self.program));
        }
    }

    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        if self.draws {
            self.draw(done_bytes, total_bytes);
            if done_bytes >= total_bytes {
                self.leave_bar();
            }
            return;
        }
        let tenths = (u128::from(done_bytes) * 10).checked_div(u128::from(total_bytes)).unwrap_or(10) as u64;
        if tenths > self.tenths.replace(tenths) {
            self.err(&format!("{} %", tenths * 10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails every write.
    struct Full(io::ErrorKind);

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_cannot_be_printed_is_in_the_status() {
        let terminal = Terminal::new("tap-img");
        terminal.print("to nobody", &mut Full(io::ErrorKind::BrokenPipe));
        assert_eq!((terminal.status(0), terminal.is_read()), (0, false));
        terminal.print("to a full disk", &mut Full(io::ErrorKind::StorageFull));
        assert_eq!((terminal.status(0), terminal.status(4)), (1, 4));
    }
}
