//! Exchanges of two names, until they are durable.
//!
//! A journaling file system keeps the order of such changes: a power cut undoes the last ones, or none. One that is
//! kept has made both names durable. It becomes durable by itself once the folders of both names are synchronised.

use super::{FileState, Inner};
use sim::{Entity, Label};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_host::Errno;

/// How many exchanges of names a power cut undoes, the last ones first.
pub(crate) static EXCHANGES_LOST: Label =
    Label::new("exchanges-lost", "the power cut undoes the last {} exchanges of two names");

/// The folder of a name.
pub(crate) fn directory(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(dir, _)| dir)
}

/// One exchange that a power cut may undo.
struct Exchange {
    names: [String; 2],
    /// Which of their folders were synchronised since.
    synced: [bool; 2],
    /// A synchronisation has failed: no later one makes it durable.
    given_up: bool,
}

/// Those that a power cut may undo, in order.
#[derive(Default)]
pub(crate) struct Exchanges(RefCell<Vec<Exchange>>);

impl Exchanges {
    pub(crate) fn push(&self, one: &str, other: &str) {
        let names = [one, other].map(str::to_owned);
        self.0.borrow_mut().push(Exchange { names, synced: [false; 2], given_up: false });
    }

    /// The folder `dir` was synchronised.
    pub(crate) fn harden(&self, dir: &str) {
        let mut all = self.0.borrow_mut();
        for exchange in all.iter_mut().filter(|exchange| !exchange.given_up) {
            for (name, synced) in exchange.names.iter().zip(&mut exchange.synced) {
                *synced |= directory(name) == dir;
            }
        }
        let durable = all.iter().take_while(|exchange| exchange.synced == [true; 2]).count();
        all.drain(..durable);
    }

    /// The synchronisation of the folder `dir` has failed.
    pub(crate) fn give_up(&self, dir: &str) {
        let concerned = |exchange: &Exchange| exchange.names.iter().any(|name| directory(name) == dir);
        self.0.borrow_mut().iter_mut().filter(|e| concerned(e)).for_each(|e| e.given_up = true);
    }
}

/// Exchanges what two names stand for.
pub(crate) fn swap(files: &mut BTreeMap<String, Rc<FileState>>, one: &str, other: &str) -> Result<(), Errno> {
    let [a, b] = [one, other].map(|name| files.get(name).cloned());
    let (Some(a), Some(b)) = (a, b) else { return Err(Errno::ENOENT) };
    files.insert(one.to_owned(), b);
    files.insert(other.to_owned(), a);
    Ok(())
}

impl Inner {
    /// Power cut number `cut` undoes the last exchanges, or none.
    pub(super) fn undo_exchanges(&self, cut: u32) {
        let mut pending = self.exchanges.0.take();
        if pending.is_empty() {
            return;
        }
        let count = pending.len() as u64;
        let names = Entity::WORLD.child("exchanged-names", 0);
        self.sim.name_entity(names, || "the names that were exchanged".into());
        let lost = self.sim.decide(names, &EXCHANGES_LOST, cut, |d| d.below(count + 1)).min(count);
        let undone = pending.split_off((count - lost) as usize);
        let mut files = self.files.borrow_mut();
        for Exchange { names: [one, other], .. } in undone.iter().rev() {
            // One of them may have been removed since, which is durable at once.
            let _gone = swap(&mut files, one, other);
        }
        for name in pending.iter().flat_map(|exchange| &exchange.names) {
            if let Some(file) = files.get(name) {
                file.name_durable.set(true);
            }
        }
    }
}
