//! Circular dependencies between files of one crate.
//!
//! ```text
//!   use crate::check::Invariant;      check/mod.rs says `pub use invariant::Invariant`:  an edge to check/invariant.rs
//!   super::setup::Setup::new()        an edge to setup.rs
//! ```
//!
//! A module and the modules inside it count as one: they may use one another. Tests are left out.

use super::Finding;
use super::exceptions::Exceptions;
use super::sources::Sources;
use std::collections::{BTreeMap, BTreeSet};
use syn::visit::{self, Visit};
use syn::{ItemMod, ItemUse, UseTree, Visibility};

type Path = Vec<String>;

pub(super) fn look(sources: &Sources, exceptions: &mut Exceptions) -> Vec<Finding> {
    let mut crates: BTreeMap<&str, Crate> = BTreeMap::new();
    for (path, rust) in &sources.rust {
        let Some((top, inside)) = path.split_once("/src/") else { continue };
        let Some(module) = module_of(inside) else { continue };
        let mut names = Names { module: module.clone(), used: BTreeSet::new(), passed_on: Vec::new() };
        names.visit_file(&rust.tree);
        let file = File { path: path.clone(), used: names.used, passed_on: names.passed_on };
        crates.entry(top).or_default().0.insert(module, file);
    }
    let mut findings = Vec::new();
    for one in crates.values() {
        for circle in circles(&one.edges()) {
            let files: Vec<&str> = circle.iter().map(|module| one.0[*module].path.as_str()).collect();
            let what = files.join(", ");
            if !exceptions.allow("circle", &what) {
                findings.push(Finding::new(
                    files[0],
                    0,
                    format!("these use one another in a circle: {what}"),
                ));
            }
        }
    }
    findings
}

/// The module of a file of `src`; `None` for tests, and for separate programs.
fn module_of(inside: &str) -> Option<Path> {
    let mut parts: Path = inside.strip_suffix(".rs")?.split('/').map(str::to_owned).collect();
    if parts.iter().any(|part| ["tests", "testing", "bin"].contains(&part.as_str())) {
        return None;
    }
    let last = parts.last()?;
    if last == "mod" || (parts.len() == 1 && (last == "lib" || last == "main")) {
        parts.pop();
    }
    Some(parts)
}

struct File {
    path: String,
    /// The paths that it names, from the top of the crate.
    used: BTreeSet<Path>,
    /// What it re-exports under a name, or as a whole (`*`).
    passed_on: Vec<(String, Path)>,
}

/// The files of a crate by module.
#[derive(Default)]
struct Crate(BTreeMap<Path, File>);

impl Crate {
    /// The module that defines `path`.
    fn home(&self, path: &[String], depth: usize) -> Option<&Path> {
        let len = (0..=path.len()).rev().find(|len| self.0.contains_key(&path[..*len]))?;
        let (module, file) = self.0.get_key_value(&path[..len])?;
        let Some(name) = path.get(len).filter(|_| depth < 8) else { return Some(module) };
        let named = file.passed_on.iter().find(|(as_name, _)| as_name == name).map(|(_, to)| to.clone());
        match named {
            Some(to) => self.home(&[&to[..], &path[len + 1..]].concat(), depth + 1),
            None => Some(module),
        }
    }

    fn edges(&self) -> BTreeMap<&Path, BTreeSet<&Path>> {
        let mut edges = BTreeMap::new();
        for (module, file) in &self.0 {
            let homes = file.used.iter().filter_map(|path| self.home(path, 0));
            let others = homes.filter(|home| !home.starts_with(module) && !module.starts_with(home));
            edges.insert(module, others.collect());
        }
        edges
    }
}

/// The paths of a file that begin with `crate`, `super` or `self`.
struct Names {
    module: Path,
    used: BTreeSet<Path>,
    passed_on: Vec<(String, Path)>,
}

impl Names {
    fn absolute(&self, path: &[String]) -> Option<Path> {
        let (first, rest) = path.split_first()?;
        let mut base = match first.as_str() {
            "crate" => Vec::new(),
            "self" => self.module.clone(),
            "super" => self.module[..self.module.len().checked_sub(1)?].to_vec(),
            _ => return None,
        };
        for part in rest {
            if part == "super" { drop(base.pop()) } else { base.push(part.clone()) }
        }
        Some(base)
    }

    fn tree(&mut self, before: &mut Path, tree: &UseTree, public: bool) {
        let (name, as_name) = match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(before, &path.tree, public);
                before.pop();
                return;
            }
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.tree(before, tree, public));
                return;
            }
            UseTree::Name(name) => (name.ident.to_string(), name.ident.to_string()),
            UseTree::Rename(name) => (name.ident.to_string(), name.rename.to_string()),
            UseTree::Glob(_) => return,
        };
        let mut path = before.clone();
        if name != "self" {
            path.push(name);
        }
        match self.absolute(&path) {
            Some(path) => {
                if public {
                    self.passed_on.push((as_name, path.clone()));
                }
                self.used.insert(path);
            }
            // A path of a module inside this one, or of another crate, which is not found.
            None if public => self.passed_on.push((as_name, [self.module.clone(), path].concat())),
            None => {}
        }
    }
}

impl<'ast> Visit<'ast> for Names {
    fn visit_item_mod(&mut self, i: &'ast ItemMod) {
        if i.content.is_some() && i.ident != "tests" {
            self.module.push(i.ident.to_string());
            visit::visit_item_mod(self, i);
            self.module.pop();
        }
    }
    fn visit_item_use(&mut self, i: &'ast ItemUse) {
        let public = !matches!(i.vis, Visibility::Inherited);
        self.tree(&mut Vec::new(), &i.tree, public);
    }
    fn visit_path(&mut self, i: &'ast syn::Path) {
        let path: Path = i.segments.iter().map(|part| part.ident.to_string()).collect();
        self.used.extend(self.absolute(&path));
        visit::visit_path(self, i);
    }
}

/// Sets of modules that can all reach one another.
fn circles<'a>(edges: &BTreeMap<&'a Path, BTreeSet<&'a Path>>) -> Vec<BTreeSet<&'a Path>> {
    let reach: BTreeMap<&Path, BTreeSet<&Path>> = edges
        .keys()
        .map(|from| {
            let (mut seen, mut open) = (BTreeSet::new(), vec![*from]);
            while let Some(at) = open.pop() {
                for to in edges.get(at).into_iter().flatten() {
                    if seen.insert(*to) {
                        open.push(*to);
                    }
                }
            }
            (*from, seen)
        })
        .collect();
    let mut found: Vec<BTreeSet<&Path>> = Vec::new();
    for (from, seen) in &reach {
        if seen.contains(from) && !found.iter().any(|circle| circle.contains(from)) {
            found.push(seen.iter().copied().filter(|to| reach[to].contains(from)).collect());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let mut sources = Sources::default();
        for (path, text) in files {
            sources.put(&format!("x/src/{path}"), (*text).to_owned()).unwrap();
        }
        let findings = look(&sources, &mut Exceptions::parse("").unwrap());
        let what = |finding: Finding| finding.what.replace("these use one another in a circle: ", "");
        findings.into_iter().map(what).collect()
    }

    #[test]
    fn circles_are_found_also_through_names_that_are_passed_on() {
        let circle = found(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::C;"),
            ("b/mod.rs", "mod c; pub use c::C;"),
            ("b/c.rs", "pub struct C; fn f() { super::super::a::g(); }"),
        ]);
        assert_eq!(circle, ["x/src/a.rs, x/src/b/c.rs"]);
        let chain = found(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::{self, D};"),
            ("b.rs", "use crate::c; #[cfg(test)] mod tests { use crate::a; }"),
            ("c.rs", "fn f() { other::a(); }"),
        ]);
        assert_eq!(chain, Vec::<String>::new());
    }

    #[test]
    fn a_module_and_what_is_in_it_are_one_room() {
        let room = found(&[
            ("lib.rs", "mod a; pub use a::b::F;"),
            ("a/mod.rs", "mod b; use b::F;"),
            ("a/b.rs", "use super::G;"),
        ]);
        assert_eq!(room, Vec::<String>::new());
        let siblings =
            found(&[("a/mod.rs", ""), ("a/b.rs", "use super::c::X;"), ("a/c.rs", "use super::b;")]);
        assert_eq!(siblings, ["x/src/a/b.rs, x/src/a/c.rs"]);
    }
}
