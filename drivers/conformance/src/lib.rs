//! Test bodies that every implementation of the seam passes.
