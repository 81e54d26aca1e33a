//! tap-abi
