//! The reader of decision files knows every kind of decision that a model or a scenario makes, so that what is saved
//! can be read again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn all_labels_are_listed() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut files = Vec::new();
    for folder in ["scenarios/src", "kernel-model/src", "xen-model/src"] {
        sources(&top.join(folder), &mut files);
    }
    let (mut made, mut listed) = (BTreeSet::new(), BTreeSet::new());
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a source");
        for part in text.split("static ").skip(1) {
            let name = part.split(':').next().unwrap_or_default();
            if part[name.len()..].starts_with(": Label") {
                made.insert(name.to_owned());
            }
        }
        if text.contains("LABELS") {
            let words = text.split(|c: char| c.is_whitespace() || ",[]()".contains(c));
            let last =
                |word: &str| word.rsplit("::").next().map(|name| name.trim_start_matches('&').to_owned());
            listed.extend(words.filter(|word| word.starts_with('&')).filter_map(last));
        }
    }
    assert!(made.len() > 60, "the search for labels is broken: {made:?}");
    let unknown: Vec<_> = made.difference(&listed).collect();
    assert!(unknown.is_empty(), "{unknown:?} are in no list of labels");
}
