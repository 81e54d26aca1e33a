//! Errors of an image as a whole. Errors of single requests are [`Errno`]s.

use tap_host::Errno;

/// An image could not be opened, created or checked. The text reads on after "failed to".
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ImageError {
    /// An operation of the host failed.
    #[error("{action} {path}: {error}")]
    Io {
        /// The attempted action ("open").
        action: &'static str,
        /// The file.
        path: String,
        /// The cause.
        error: Errno,
    },
    /// Another process holds a conflicting lock.
    #[error("lock {path}: it is in use by another process; close it there first")]
    InUse {
        /// The file.
        path: String,
    },
    /// The contents of the file do not allow it to be opened this way.
    #[error("open {path} as {format}: {what}; {advice}")]
    Refused {
        /// The file.
        path: String,
        /// The format it was opened as.
        format: &'static str,
        /// What is wrong, and where.
        what: String,
        /// What the user can do.
        advice: &'static str,
    },
    /// A new image cannot have these options.
    #[error("create {path} as {format}: {what}")]
    Options {
        /// The file.
        path: String,
        /// The format.
        format: &'static str,
        /// Which option, and what it may be.
        what: String,
    },
    /// The disk cannot have this size.
    #[error("resize {path} as {format}: {what}")]
    Resize {
        /// The file.
        path: String,
        /// The format.
        format: &'static str,
        /// Why not.
        what: String,
    },
    /// Another image is being merged into it, so that only that one can be above it.
    #[error("use {path}: it is partly merged with {other}; merge that again, to complete it")]
    Merging {
        /// The file.
        path: String,
        /// The image that is being merged into it.
        other: String,
    },
    /// A backing file, or one further below, cannot be used. The text names this pair and the cause, not every image in
    /// between.
    #[error("use {backing} as backing file of {path}: {}", error.cause())]
    Backing {
        /// The image.
        path: String,
        /// The file below it.
        backing: String,
        /// The cause.
        error: Box<ImageError>,
    },
}

impl ImageError {
    /// Makes the error of a host operation that failed to do `action` ("open") with the file at `path`.
    pub fn io(action: &'static str, path: &str) -> impl FnOnce(Errno) -> ImageError {
        let path = path.to_owned();
        move |error| ImageError::Io { action, path, error }
    }

    /// The error of the lowest image that was reached.
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

    /// The closest error number.
    pub fn errno(&self) -> Errno {
        match self {
            ImageError::Io { error, .. } => *error,
            ImageError::InUse { .. } => Errno::EAGAIN,
            ImageError::Refused { .. } => Errno::EUCLEAN,
            ImageError::Merging { .. } => Errno::EBUSY,
            ImageError::Options { .. } | ImageError::Resize { .. } => Errno::EINVAL,
            ImageError::Backing { error, .. } => error.errno(),
        }
    }
}
