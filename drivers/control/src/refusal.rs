//! Why a request was not carried out.

use tap_host::Errno;

/// Why a request was not carried out.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{words}")]
pub struct Refusal {
    /// Its number.
    pub error: Errno,
    /// Continue "failed to".
    pub words: String,
}

impl Refusal {
    /// A refusal with these `words`, which continue "failed to".
    pub fn new(error: Errno, words: impl Into<String>) -> Self {
        Self { error, words: words.into() }
    }
}
