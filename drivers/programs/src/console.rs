//! Where a program speaks to the person or the script that started it.

/// Output of a program.
pub trait Console {
    /// A line of the result, on standard output.
    fn out(&self, line: &str);
    /// A line about the run, on standard error.
    fn err(&self, line: &str);
    /// How far a long piece of work has come, in bytes; called often.
    fn progress(&self, done_bytes: u64, total_bytes: u64);
}
