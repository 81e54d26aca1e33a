//! What is offered to front ends, and what one of them may state in return.

use crate::config::{BackendConfig, BackendError};
use crate::keys::{number, read};
use tap_abi::blkif::RingLayout;
use tap_host::{GrantRef, Port, Probe, Time, Xenstore};

tap_host::listed! {
    pub(super) BUGS: Bug;
    STALE_RING_REF = "stale-ring-ref",
        "the grant of a ring is taken from a key that an earlier front end left";
}

/// Keys in which a front end states how its ring is to be served; those that it leaves out have our value.
const STATED: [&str; 4] = ["protocol", "ring-page-order", "num-ring-pages", "multi-queue-num-queues"];

/// What the front end says about its ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RingKeys {
    pub(crate) ring_ref: GrantRef,
    pub(crate) port: Port,
}

/// One disk's offer. What we write and what we accept both come from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Features {
    /// Flushes.
    flush_cache: bool,
    /// The only ring that is served.
    ring: RingLayout,
}

impl Features {
    /// What `config` has us offer.
    pub(crate) fn of(config: &BackendConfig) -> Self {
        Self { flush_cache: config.flush_cache, ring: tap_ring::LAYOUT }
    }

    /// The keys that tell front ends of it.
    pub(crate) fn keys(&self) -> Vec<(&'static str, String)> {
        vec![
            ("feature-flush-cache", u8::from(self.flush_cache).to_string()),
            ("max-ring-page-order", self.ring.page_order().to_string()),
        ]
    }

    /// Reads all keys of the front end that describe its ring.
    ///
    /// # Errors
    /// The outer one from xenstore; the inner one for what we cannot or will not serve.
    pub(crate) async fn ring<H: Xenstore + Time + Probe>(
        &self,
        host: &H,
        frontend: &str,
    ) -> Result<Result<RingKeys, String>, BackendError> {
        let key = async |name| read(host, frontend, name).await;
        for name in STATED {
            if let Some(why) = key(name).await?.and_then(|value| self.refusal(name, &value)) {
                return Ok(Err(why));
            }
        }
        // A front end that states its number of pages has the first one in ring-ref0. Without that number, ring-ref0 is
        // left over from an earlier front end.
        let counts = key("ring-page-order").await?.is_some() || host.bug(&STALE_RING_REF);
        let first = if counts { key("ring-ref0").await? } else { None };
        let ring_ref = if first.is_some() { first } else { key("ring-ref").await? };
        let Some(ring_ref) = ring_ref.and_then(|value| number(&value)) else {
            return Ok(Err("ring-ref is not a number".into()));
        };
        let Some(port) = key("event-channel").await?.and_then(|value| number(&value)) else {
            return Ok(Err("event-channel is not a number".into()));
        };
        Ok(Ok(RingKeys { ring_ref: GrantRef(ring_ref), port: Port(port) }))
    }

    /// Why `value` of one of [`STATED`] is not served.
    fn refusal(&self, key: &'static str, value: &[u8]) -> Option<String> {
        let (offered, what) = match key {
            "protocol" if value == self.ring.protocol.as_bytes() => return None,
            "protocol" => {
                return Some(format!("protocol is not {}, which is the only one served", self.ring.protocol));
            }
            "ring-page-order" => (self.ring.page_order(), "one"),
            "num-ring-pages" => (self.ring.pages, "number"),
            // One queue.
            _ => (1, "number"),
        };
        (number(value) != Some(offered)).then(|| format!("{key} is not {offered}, the only {what} offered"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_host::{DomId, VbdId};

    #[test]
    fn what_was_offered_is_accepted_and_nothing_else() {
        let features = Features::of(&BackendConfig::new("/b", DomId(1), VbdId(51712)));
        let offered: Vec<_> =
            features.keys().into_iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(offered, ["feature-flush-cache=1", "max-ring-page-order=0"]);
        for (key, value) in STATED.into_iter().zip(["x86_64-abi", "0", "1", "1"]) {
            assert_eq!(features.refusal(key, value.as_bytes()), None, "{key}");
            for other in ["", "2", "x86_32-abi", "x86_64-abi\0"] {
                assert!(
                    features.refusal(key, other.as_bytes()).is_some_and(|why| why.starts_with(key)),
                    "{key}"
                );
            }
        }
        let why = features.refusal("ring-page-order", b"1");
        assert_eq!(why.as_deref(), Some("ring-page-order is not 0, the only one offered"));
        assert_eq!(
            features.refusal("num-ring-pages", b"2").as_deref(),
            Some("num-ring-pages is not 1, the only number offered")
        );
    }
}
