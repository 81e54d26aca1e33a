//! The output of a program.

/// Output of a program.
pub trait Console {
    /// A line of the result, on standard output.
    fn out(&self, line: &str);
    /// A line about the run, on standard error.
    fn err(&self, line: &str);
    /// A service has begun: clients can connect. Called once, after the lines that say where.
    fn ready(&self) {}
    /// Whether somebody may still read standard output; false once its reader has gone.
    fn is_read(&self) -> bool {
        true
    }
    /// Whether people read standard output, rather than programs.
    fn is_terminal(&self) -> bool {
        false
    }
    /// Progress of long work, in bytes; called often.
    fn progress(&self, done_bytes: u64, total_bytes: u64);
}
