//! What can go wrong with an image as a whole. Errors of single requests are [`Errno`]s.

use tap_host::Errno;

/// An image could not be opened, created or checked. The text reads on after "failed to".
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ImageError {
    /// An operation of the host failed.
    #[error("{action} {path}: {error}")]
    Io {
        /// What was tried ("open").
        action: &'static str,
        /// The file.
        path: String,
        /// Why not.
        error: Errno,
    },
    /// Another process holds a lock that conflicts.
    #[error("lock {path}: it is in use by another process; close it there first")]
    InUse {
        /// The file.
        path: String,
    },
    /// The file cannot be used as asked because of what is in it.
    #[error("open {path} as {format}: {what}; {advice}")]
    Refused {
        /// The file.
        path: String,
        /// The format it was opened as.
        format: &'static str,
        /// What is wrong, and where.
        what: String,
        /// What to do.
        advice: &'static str,
    },
    /// A new image cannot be made as asked.
    #[error("create {path} as {format}: {what}")]
    Options {
        /// The file.
        path: String,
        /// The format.
        format: &'static str,
        /// Which option, and what it may be.
        what: String,
    },
    /// Something is wrong with the file that an image is based on, or further below. The text names this pair and the
    /// cause, not every image in between.
    #[error("use {backing} below {path}: {}", error.cause())]
    Backing {
        /// The image.
        path: String,
        /// The file below it.
        backing: String,
        /// Why not.
        error: Box<ImageError>,
    },
}

impl ImageError {
    /// Makes the error of an operation of the host that was to do `action` ("open") to the file at `path`.
    pub fn io(action: &'static str, path: &str) -> impl FnOnce(Errno) -> ImageError {
        let path = path.to_owned();
        move |error| ImageError::Io { action, path, error }
    }

    /// What is wrong in the lowest image that was reached.
    fn cause(&self) -> &ImageError {
        let mut cause = self;
        while let ImageError::Backing { error, .. } = cause {
            cause = error;
        }
        cause
    }

    /// Whether the file, or one that it is based on, is in use by another process.
    pub fn is_in_use(&self) -> bool {
        matches!(self.cause(), ImageError::InUse { .. })
    }

    /// The error number that stands for it where only a number fits.
    pub fn errno(&self) -> Errno {
        match self {
            ImageError::Io { error, .. } => *error,
            ImageError::InUse { .. } => Errno::EAGAIN,
            ImageError::Refused { .. } => Errno::EUCLEAN,
            ImageError::Options { .. } => Errno::EINVAL,
            ImageError::Backing { error, .. } => error.errno(),
        }
    }
}
