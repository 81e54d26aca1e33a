//! The ring of a guest: a blkif ring in a granted page.

use crate::config::RingConfig;
use crate::end::{RingCloser, RingEnd};
use crate::guest::Guest;
use crate::ring::Ring;
use std::rc::Rc;
use tap_host::{Event, Events, Grants, Log, Probe, SharedPages, Tasks, Time};

tap_host::listed! {
    pub(super) BUGS: Bug;
    UNUSED_RING_SPENT = "unused-ring-spent",
        "a ring that is disconnected before its first request cannot be connected again";
    RECORD_GONE_AT_LEAVE = "record-gone-at-leave",
        "the in-flight record is removed when a process leaves its ring in order";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    RING_LEFT = "ring-left", "a process left its ring in order";
    RING_ABANDONED = "ring-abandoned", "a process left its ring without answering what was in flight";
    RING_REFUSED = "ring-refused", "a ring was closed because of its content";
}

/// A connected ring. Dropping it, or the end of [`BlkifRing::run`], unmaps the page and closes the channel.
pub struct BlkifRing<H: Grants + Events + SharedPages> {
    pub(crate) ring: Ring<H, Guest<H>>,
    pub(crate) config: RingConfig,
}

impl<H> BlkifRing<H>
where
    H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
{
    /// A handle that ends this ring.
    pub fn closer(&self) -> RingCloser {
        self.ring.closer()
    }

    /// Serves the ring until it is closed, left or abandoned, or refused because of what the guest wrote. Then waits
    /// for the requests in flight, removes the in-flight record unless another process will continue with it, unmaps
    /// the ring and closes its channel. The record of a refused ring stays until the caller has told the front end: if
    /// this process dies earlier, the ring can be taken over, and is refused again.
    pub async fn run(self) -> RingEnd {
        let Self { ring, config } = self;
        let (end, host) = (ring.run().await, ring.host());
        if end == RingEnd::Closed && !host.bug(&UNUSED_RING_SPENT) {
            ring.forget_unused();
        }
        if let (Some(_), Some(name)) = (&ring.parts.record, &config.record)
            && (end == RingEnd::Closed || host.bug(&RECORD_GONE_AT_LEAVE))
        {
            host.remove_region(name);
        }
        let why = match end {
            RingEnd::Closed => "closed",
            RingEnd::Left => {
                host.mark(&RING_LEFT);
                "left to another process"
            }
            RingEnd::Abandoned => {
                host.mark(&RING_ABANDONED);
                "abandoned to another process"
            }
            RingEnd::ChannelGone => "event channel gone",
            RingEnd::Refused(why) => {
                host.mark(&RING_REFUSED);
                why
            }
        };
        host.log(Event::RingClosed { dom: config.dom, vbd: config.vbd, why });
        assert_eq!(Rc::strong_count(&ring.parts.target), 1, "a request outlived its ring");
        end
    }
}
