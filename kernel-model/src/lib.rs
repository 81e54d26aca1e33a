//! kernel-model
