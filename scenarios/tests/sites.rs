//! Every seeded bug and every mark that a driver declares is in a list that the testbed knows, and every bug is asked
//! for.

use scenarios::probes::{BUGS, MARKS};
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

/// Rows of the lists of `kind` in a source: a static, and its name.
fn declared<'a>(text: &'a str, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let lists =
        text.split("\ntap_host::listed! {\n").skip(1).map(|list| list.split("\n}").next().unwrap_or(list));
    let of_kind = move |list: &&str| list.split_once("S: ").is_some_and(|(_, rest)| rest.starts_with(kind));
    lists.filter(of_kind).flat_map(str::lines).filter_map(|line| {
        let (item, name) = line.split_once(" = \"")?;
        Some((item.split_whitespace().last()?, name.split('"').next()?))
    })
}

#[test]
fn what_drivers_declare_is_listed_and_bugs_are_asked_for() {
    let drivers = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("drivers");
    let mut files = Vec::new();
    sources(&drivers, &mut files);
    let texts: Vec<_> = files
        .iter()
        .filter(|file| !file.starts_with(drivers.join("host")))
        .map(|file| std::fs::read_to_string(file).expect("a source"))
        .collect();
    let rows = |kind| texts.iter().flat_map(move |text| declared(text, kind));
    let names = |kind| rows(kind).map(|(_, name)| name).collect::<BTreeSet<_>>();
    assert_eq!(names("Bug"), BUGS.iter().map(|bug| bug.name()).collect());
    assert_eq!(names("Mark"), MARKS.iter().map(|mark| mark.name()).collect());
    let is_asked = |item: &str| texts.iter().any(|text| text.contains(&format!(".bug(&{item})")));
    let idle: Vec<_> = rows("Bug").filter(|(item, _)| !is_asked(item)).collect();
    assert!(idle.is_empty(), "no code asks for {idle:?}");
}
