//! The task of a connection: sends what is queued, and distributes what arrives.

use super::StoreLost;
use super::inbox::Inbox;
use super::link::{Link, Unsent};
use super::shared::Shared;
use std::rc::Rc;
use tap_host::{Either, select};

/// Our end of the connection, and the state shared with its users. Dropping it ends the connection.
pub(super) struct Driver {
    link: Link,
    shared: Rc<Shared>,
}

impl Driver {
    pub(super) fn new(link: Link, shared: Rc<Shared>) -> Self {
        Self { link, shared }
    }

    /// Runs until the connection has no more users.
    ///
    /// # Errors
    /// Why it cannot continue.
    pub(super) async fn run(self) -> Result<(), StoreLost> {
        match select(self.send(), self.receive()).await {
            Either::First(ended) | Either::Second(ended) => ended,
        }
    }

    async fn send(&self) -> Result<(), StoreLost> {
        while let Some(message) = self.shared.next_message().await {
            match self.link.send(message.bytes).await {
                Ok(()) => {}
                Err(Unsent::Refused(error)) => self.shared.refused(message.request, error),
                Err(Unsent::Lost(error)) => return Err(StoreLost::Io(error)),
            }
        }
        Ok(())
    }

    async fn receive(&self) -> Result<(), StoreLost> {
        let mut inbox = Inbox::new();
        loop {
            while let Some((header, payload)) = inbox.next()? {
                self.shared.arrived(&header, payload)?;
            }
            match self.link.recv(inbox.space()).await {
                Ok(0) => return Err(StoreLost::Closed),
                Ok(count) => inbox.filled(count),
                Err(error) => return Err(StoreLost::Io(error)),
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.lost();
    }
}
