//! Why a request was not carried out.

use tap_host::Errno;

/// Why a request was not carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    pub error: Errno,
    /// Continue "failed to".
    pub words: String,
}

impl Refusal {
    pub(super) fn new(error: Errno, words: impl Into<String>) -> Self {
        Self { error, words: words.into() }
    }
}
