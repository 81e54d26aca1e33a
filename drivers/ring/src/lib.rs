//! tap-ring
