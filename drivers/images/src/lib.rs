//! tap-images
