//! Seeded bugs and marks: how the testbed proves that it looks where it should.
//!
//! ```text
//!   static + listed!   in the file whose code it speaks of
//!   BUGS, MARKS of a file ─► of the module above ─► of the crate ─► of all crates, in the testbed
//! ```
//!
//! A test of the testbed (`scenarios/tests/sites.rs`) compares the last list with the sources, so none is forgotten.

/// Both are a name and a sentence.
macro_rules! named {
    ($(#[$doc:meta])* $kind:ident) => {
        $(#[$doc])*
        #[derive(PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $kind {
            name: &'static str,
            sentence: &'static str,
        }

        impl $kind {
            /// What [`listed!`](crate::listed) makes. Two of one name should be the same.
            pub const fn new(name: &'static str, sentence: &'static str) -> Self {
                Self { name, sentence }
            }
            /// Its name in kebab case, as used on command lines.
            pub const fn name(&self) -> &'static str {
                self.name
            }
            /// One sentence.
            pub const fn sentence(&self) -> &'static str {
                self.sentence
            }
            /// The one called `name` in `list`.
            pub fn find(list: &[&'static Self], name: &str) -> Option<&'static Self> {
                list.iter().find(|one| one.name == name).copied()
            }
        }
    };
}

named! {
    /// A mistake that a simulated host can switch on. A site is at most three lines that omit or move a step; it is
    /// there to be found, and proves that the invariant it breaks is checked.
    Bug
}

named! {
    /// A rare branch that a sweep must reach; one that is never hit fails the sweep.
    Mark
}

/// Declares seeded bugs or marks beside their code: a `static` for each, and the list of them, which goes on with the
/// lists of the modules below.
///
/// ```
/// mod table {
///     tap_host::listed! {
///         pub(super) BUGS: Bug;
///         ENTRY_FIRST = "entry-first", "an entry is written before what it names is durable";
///     }
///     pub fn publish(host: &impl tap_host::Probe) -> bool {
///         host.bug(&ENTRY_FIRST)
///     }
/// }
/// tap_host::listed! {
///     /// The seeded bugs of this crate.
///     pub BUGS: Bug with [table::BUGS];
/// }
/// # fn main() { assert_eq!(BUGS[0].name(), "entry-first"); }
/// ```
#[macro_export]
macro_rules! listed {
    (
        $(#[$meta:meta])* $vis:vis $list:ident: $kind:ident $(with [$($below:expr),* $(,)?])?;
        $($item_vis:vis $item:ident = $name:literal, $sentence:literal;)*
    ) => {
        $(#[doc = $sentence] $item_vis static $item: $crate::$kind = $crate::$kind::new($name, $sentence);)*

        $(#[$meta])*
        $vis const $list: &[&$crate::$kind] = {
            const LISTS: &[&[&$crate::$kind]] = &[&[$(&$item),*], $($($below),*)?];
            &$crate::joined::<_, { $crate::length(LISTS) }>(LISTS)
        };
    };
}

/// Entries of all `lists`, for [`listed!`](crate::listed).
#[doc(hidden)]
pub const fn length<T>(lists: &[&[&'static T]]) -> usize {
    let (mut sum, mut at) = (0, 0);
    while at < lists.len() {
        sum += lists[at].len();
        at += 1;
    }
    sum
}

/// The `N` entries of all `lists`, for [`listed!`](crate::listed). There must be one.
#[doc(hidden)]
pub const fn joined<T, const N: usize>(lists: &[&[&'static T]]) -> [&'static T; N] {
    let mut first = 0;
    while lists[first].is_empty() {
        first += 1;
    }
    let mut all = [lists[first][0]; N];
    let (mut filled, mut at) = (0, first);
    while at < lists.len() {
        let mut entry = 0;
        while entry < lists[at].len() {
            all[filled] = lists[at][entry];
            (filled, entry) = (filled + 1, entry + 1);
        }
        at += 1;
    }
    all
}

/// Hooks of the testbed in code that ships. A real host keeps the provided methods, which cost nothing.
pub trait Probe: Clone + 'static {
    /// Whether `bug` is switched on.
    fn bug(&self, bug: &'static Bug) -> bool {
        let _ = bug;
        false
    }
    /// Counts `units` of work that grows with what is asked or stored: table entries examined, claims compared. The
    /// work of one turn is bounded.
    fn work(&self, units: u64) {
        let _ = units;
    }
    /// Counts that `mark` was reached.
    fn mark(&self, mark: &'static Mark) {
        let _ = mark;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    mod below {
        pub(super) mod deeper {
            crate::listed! {
                pub(in super::super) BUGS: Bug;
                LAST = "last", "the last";
            }
        }
        crate::listed! {
            pub(super) BUGS: Bug with [deeper::BUGS];
        }
    }

    crate::listed! {
        BUGS: Bug with [below::BUGS, below::deeper::BUGS];
        FIRST = "first", "the first";
        SECOND = "second", "the second";
    }

    #[test]
    fn a_list_has_its_own_and_then_those_below() {
        let names: Vec<_> = BUGS.iter().map(|bug| bug.name()).collect();
        assert_eq!(names, ["first", "second", "last", "last"]);
        assert_eq!(Bug::find(BUGS, "second").map(Bug::sentence), Some("the second"));
        assert_eq!((Bug::find(BUGS, "third"), below::BUGS[0] == BUGS[3]), (None, true));
        assert!(FIRST != SECOND && FIRST == *BUGS[0]);
    }
}
