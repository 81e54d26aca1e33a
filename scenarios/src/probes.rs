//! The seeded bugs and the marks that worlds know: those of all crates, and those of formats in crates of their own.

use crate::formats;
use kernel_model::Kernel;
use std::sync::LazyLock;
use tap_host::{Bug, Mark};

/// All seeded bugs, crate by crate.
pub static BUGS: LazyLock<Vec<&'static Bug>> = LazyLock::new(|| {
    let crates = [
        tap_control::BUGS,
        tap_core::BUGS,
        tap_images::BUGS,
        tap_mason::BUGS,
        tap_ring::BUGS,
        tap_xenbus::BUGS,
        tap_nbd::BUGS,
        tap_programs::BUGS,
    ];
    crates.into_iter().chain(formats::ALL.iter().map(|model| model.bugs())).flatten().copied().collect()
});

/// All marks, crate by crate.
pub static MARKS: LazyLock<Vec<&'static Mark>> = LazyLock::new(|| {
    let crates = [
        tap_control::MARKS,
        tap_core::MARKS,
        tap_images::MARKS,
        tap_mason::MARKS,
        tap_ring::MARKS,
        tap_xenbus::MARKS,
        tap_nbd::MARKS,
        tap_programs::MARKS,
    ];
    crates.into_iter().chain(formats::ALL.iter().map(|model| model.marks())).flatten().copied().collect()
});

/// The seeded bug called `name`.
pub fn find_bug(name: &str) -> Option<&'static Bug> {
    Bug::find(&BUGS, name)
}

/// How often the mark called `name` was reached on `kernel`.
///
/// # Panics
/// Where there is no such mark.
pub(crate) fn marked(kernel: &Kernel, name: &str) -> u64 {
    kernel.marked(Mark::find(&MARKS, name).unwrap_or_else(|| panic!("no mark is called {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn check(all: &[(&str, &str)]) {
        let names: BTreeSet<_> = all.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), all.len(), "each name is there once");
        for (name, sentence) in all {
            let kebab = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(name.chars().all(kebab) && !sentence.ends_with('.'), "{name}: {sentence}");
        }
    }

    #[test]
    fn names_are_unique_and_sentences_have_no_end() {
        check(&BUGS.iter().map(|bug| (bug.name(), bug.sentence())).collect::<Vec<_>>());
        check(&MARKS.iter().map(|mark| (mark.name(), mark.sentence())).collect::<Vec<_>>());
    }
}
