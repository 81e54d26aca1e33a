//! What those who listen are told about a disk.

use super::{ControlledHost, Vbd};
use crate::control::settings::Settings;
use std::rc::Rc;
use tap_control::json::{Disk as Listed, Happened, Standing};
use tap_core::Disk;
use tap_host::Event;
use tap_nbd::Server;

tap_host::listed! {
    pub(super) BUGS: Bug;
    PAUSED_UNTOLD = "paused-untold", "who listens for events is not told that a disk is paused";
}

impl<H: ControlledHost> Vbd<H> {
    /// As it is, apart from its counters.
    pub(in crate::control) fn standing(&self, host: &H) -> Standing {
        let Listed { minor, state, image, size_sectors, read_only, nbd_clients, ionice, guests, .. } =
            self.listed(host);
        Standing { minor, state, image, size_sectors, read_only, nbd_clients, ionice, guests }
    }

    /// Says what happened to it, once it is so.
    pub(in crate::control) fn tell(&self, settings: &Settings<H>, event: Happened) {
        if event == Happened::Paused && settings.host.bug(&PAUSED_UNTOLD) {
            return;
        }
        settings.feed.tell(event, self.minor, Some(self.standing(&settings.host)), None);
    }

    /// Has those who listen told about the clients of `server`, once the disk is open.
    pub(super) fn tell_of_clients(self: &Rc<Self>, settings: &Settings<H>, server: &Server<H>) {
        let (own, feed, host) = (Rc::downgrade(self), settings.feed.clone(), settings.host.clone());
        server.on_change(move || {
            if let Some(own) = own.upgrade().filter(|own| own.is_open()) {
                feed.tell(Happened::Clients, own.minor, Some(own.standing(&host)), None);
            }
        });
    }

    /// Has those who listen told about the requests of `disk` that take long.
    pub(super) fn tell_of_hangs(&self, settings: &Settings<H>, disk: &Disk<H>) {
        let (feed, minor) = (settings.feed.clone(), self.minor);
        disk.slot().on_hang(move |event| {
            let happened = match event {
                Event::RequestHung { .. } => Happened::Hung,
                _ => Happened::Hangs,
            };
            feed.tell(happened, minor, None, Some(event.to_string()));
        });
    }
}
