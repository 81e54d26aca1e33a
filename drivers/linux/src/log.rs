//! The log: one line on standard error for each event of the stack and each message of a program.
//!
//! ```text
//!   2026-11-24T08:15:00.123Z warning: vbd51712 refuses #7: too many segments
//!   <4>vbd51712 refuses #7: too many segments                                  under systemd (JOURNAL_STREAM)
//! ```
//!
//! Single requests are logged at level debug; while that is off, each costs one comparison. Events that a guest or a
//! client can cause at will are limited to bursts of 20 lines for each kind of event, refilled with one every half
//! second; the next line of the kind that is printed is preceded by the count of those that were not. Logging never
//! waits for a reader of the log (see [`Lines`]).

use crate::Lines;
use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tap_host::{Event, Level};

fn name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
    }
}

/// The level as syslog numbers it.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warning => 4,
        Level::Info => 6,
        Level::Debug => 7,
    }
}

/// Where lines go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogTo {
    /// Standard error, in the journal's format if it is connected to the journal (JOURNAL_STREAM is set).
    #[default]
    Auto,
    /// Standard error, with time and level.
    Stderr,
    /// Standard error, each line with its priority; journald adds the time.
    Journal,
}

/// Lines of one kind that may be printed at once.
const BURST: u32 = 20;
/// One more is allowed after this time.
const REFILL: Duration = Duration::from_millis(500);

/// How often one kind of event may be printed.
#[derive(Clone, Copy)]
struct Limit {
    left: u32,
    since: Instant,
    suppressed: u64,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { left: BURST, since: now, suppressed: 0 }
    }

    /// Whether a line may be printed now (`Some`), with the number of lines suppressed since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let periods = now.duration_since(self.since).as_nanos() / REFILL.as_nanos();
        if periods > 0 {
            let refill = u32::try_from(periods).unwrap_or(BURST);
            self.left = self.left.saturating_add(refill).min(BURST);
            self.since = now;
        }
        if self.left == 0 {
            self.suppressed += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// The log of one process.
pub(crate) struct Logger {
    level: Level,
    journal: bool,
    /// By kind of event.
    limits: [Cell<Limit>; Event::KINDS],
}

impl Logger {
    pub(crate) fn new(level: Level, to: LogTo) -> Self {
        let journal = match to {
            LogTo::Auto => std::env::var_os("JOURNAL_STREAM").is_some(),
            LogTo::Stderr => false,
            LogTo::Journal => true,
        };
        let limits = std::array::from_fn(|_| Cell::new(Limit::new(Instant::now())));
        Self { level, journal, limits }
    }

    /// Prints an event, if its level is enabled and its kind is within its limit.
    pub(crate) fn event(&self, event: Event) {
        let level = event.level();
        if level > self.level {
            return;
        }
        if event.is_limited() {
            let own = &self.limits[event.kind()];
            let mut limit = own.get();
            let admitted = limit.admit(Instant::now());
            own.set(limit);
            match admitted {
                None => return,
                Some(0) => {}
                Some(count) => self.line(level, format_args!("{count} lines like the next were left out")),
            }
        }
        self.line(level, format_args!("{event}"));
    }

    /// Prints a line, if its level is enabled.
    pub(crate) fn line(&self, level: Level, text: fmt::Arguments<'_>) {
        if level > self.level {
            return;
        }
        let line = if self.journal {
            format!("<{}>{text}", priority(level))
        } else {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            format!("{} {}: {text}", Stamp(now), name(level))
        };
        Lines::stderr().put(line);
    }
}

/// A time since 1970 in ISO 8601 format, in UTC, to the millisecond.
struct Stamp(Duration);

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, second) = (self.0.as_secs() / 86_400, self.0.as_secs() % 86_400);
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let millis = self.0.subsec_millis();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years that begin in March have the leap day at their end; eras of 400 years all have 146097 days.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let month_day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, month_day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        let text = |seconds: u64, millis| Stamp(Duration::from_millis(seconds * 1000 + millis)).to_string();
        assert_eq!(text(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(text(951_782_400, 7), "2000-02-29T00:00:00.007Z");
        assert_eq!(text(1_795_508_100, 123), "2026-11-24T08:15:00.123Z");
        assert_eq!(text(4_107_542_399, 999), "2100-02-28T23:59:59.999Z");
        assert_eq!(text(4_107_542_400, 0), "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn a_storm_is_counted_instead_of_printed() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        let printed = (0..100).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(printed, BURST as usize);
        let later = start + REFILL;
        assert_eq!(limit.admit(later), Some(80));
        assert_eq!(limit.admit(later), None);
        assert_eq!(limit.admit(later + 1000 * REFILL), Some(1));
        assert_eq!((1..100).filter(|_| limit.admit(later + 1000 * REFILL).is_some()).count(), 19);
    }
}
