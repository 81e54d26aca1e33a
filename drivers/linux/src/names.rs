//! Names of hosts in a program that brings its own C library.

use std::ffi::{CStr, c_char, c_int};

/// The database of names, and where to look, in this order: both are parts of the C library.
const HOSTS: &CStr = c"hosts";
const FILES_AND_DNS: &CStr = c"files dns";

unsafe extern "C" {
    /// <nss.h> of glibc: replaces a database's line of /etc/nsswitch.conf for this process.
    fn __nss_configure_lookup(database: *const c_char, services: *const c_char) -> c_int;
}

/// From now on names of hosts are looked up in /etc/hosts and by DNS, whatever /etc/nsswitch.conf says.
///
/// For programs that are linked statically. Other services are plugins, shared libraries that belong to the C library
/// of the machine; loading one into a program with another C library is undefined.
pub fn resolve_without_plugins() {
    // SAFETY: both are constants that end with a NUL; the function copies what it needs.
    let status = unsafe { __nss_configure_lookup(HOSTS.as_ptr(), FILES_AND_DNS.as_ptr()) };
    assert_eq!(status, 0, "the line can be parsed");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::ToSocketAddrs;

    #[test]
    fn names_are_still_found() {
        resolve_without_plugins();
        let found: Vec<_> = ("localhost", 1).to_socket_addrs().expect("it is in /etc/hosts").collect();
        assert!(found.iter().all(|address| address.ip().is_loopback()), "{found:?}");
    }
}
