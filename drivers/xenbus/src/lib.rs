//! tap-xenbus
