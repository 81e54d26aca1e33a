//! A kernel that starts in a guest whose devices are connected, because another kernel started it (kexec), not a
//! toolstack.
//!
//! Linux's `xenbus_reset_frontend`: each state in turn, each with a limited time for the back end.

use super::Blkfront;
use tap_host::{Errno, Xenstore, unless};

/// How long it waits for each state, in nanoseconds.
const WAITS_NS: u64 = 5_000_000_000;

impl Blkfront {
    /// Takes both ends from the state that the previous kernel left back to the beginning.
    ///
    /// # Errors
    /// As xenstore's.
    pub async fn reset(&self) -> Result<(), Errno> {
        let value = self.0.port.read(&format!("{}/state", self.0.paths.backend)).await?;
        let steps: &[(u8, u8)] = match &value[..] {
            b"4" => &[(5, 5), (6, 6), (1, 2)],
            b"5" => &[(6, 6), (1, 2)],
            b"6" => &[(1, 2)],
            _ => &[],
        };
        for (own, other) in steps {
            self.0.set_state(*own).await?;
            self.wait_a_while(*other).await?;
        }
        // What the previous kernel left does not belong to this one.
        self.0.set_state(1).await
    }

    async fn wait_a_while(&self, state: u8) -> Result<(), Errno> {
        let there = self.0.wait_for_back(|s| s == state);
        let enough = self.0.port.xen().sim().sleep_ns(WAITS_NS);
        unless(enough, there).await.map_or(Ok(()), |reached| reached.map(drop))
    }
}
