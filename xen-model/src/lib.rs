//! xen-model
