//! Who may read and write a node.

use tap_host::DomId;

/// Rights of a domain on a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// `n`
    None,
    /// `r`
    Read,
    /// `w`
    Write,
    /// `b`
    Both,
}

impl Access {
    pub(crate) fn reads(self) -> bool {
        matches!(self, Access::Read | Access::Both)
    }
    pub(crate) fn writes(self) -> bool {
        matches!(self, Access::Write | Access::Both)
    }
}

/// A node's permissions: the first entry names the owner, who may do everything, and what domains without an entry
/// may do; the others name domains.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Perms {
    /// The owner, whose quota the node counts against.
    pub owner: DomId,
    /// For domains without an entry.
    pub others: Access,
    /// For the domains with an entry.
    pub named: Vec<(DomId, Access)>,
}

impl Perms {
    /// Only `owner` (and the control domain) has access.
    pub fn private(owner: DomId) -> Self {
        Self { owner, others: Access::None, named: Vec::new() }
    }

    /// Owned by `owner`, readable by `reader`, as for both ends of a device.
    pub fn readable(owner: DomId, reader: DomId) -> Self {
        Self { owner, others: Access::None, named: vec![(reader, Access::Read)] }
    }

    /// What `dom` may do. The control domain may do everything.
    pub fn of(&self, dom: DomId) -> Access {
        if dom == DomId(0) || dom == self.owner {
            return Access::Both;
        }
        self.named.iter().find(|(named, _)| *named == dom).map_or(self.others, |(_, access)| *access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_named_and_others() {
        let perms = Perms::readable(DomId(5), DomId(6));
        assert_eq!(perms.of(DomId(0)), Access::Both);
        assert_eq!(perms.of(DomId(5)), Access::Both);
        assert_eq!(perms.of(DomId(6)), Access::Read);
        assert_eq!(perms.of(DomId(7)), Access::None);
        assert!(Access::Write.writes() && !Access::Write.reads() && Access::Read.reads());
    }
}
