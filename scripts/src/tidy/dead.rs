//! Public items that are named nowhere: not in their own crate, in another one, or in a test.
//!
//! It compares words only, so an item whose name is also used for something else is not found. Whatever is found is
//! dead.

use super::Finding;
use super::exceptions::Exceptions;
use super::sources::Sources;
use std::collections::BTreeMap;
use syn::visit::{self, Visit};
use syn::{Ident, Visibility};

pub(super) fn look(sources: &Sources, exceptions: &mut Exceptions) -> Vec<Finding> {
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for rust in sources.rust.values() {
        // A mention in a comment does not count as a use.
        for line in rust.text.lines().map(without_comment) {
            let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            words.for_each(|word| *times.entry(word).or_default() += 1);
        }
    }
    let mut findings = Vec::new();
    for (path, rust) in &sources.rust {
        let mut items = Items(Vec::new());
        items.visit_file(&rust.tree);
        for item in items.0 {
            let name = item.to_string();
            if times.get(name.as_str()) == Some(&1) && !exceptions.allow("dead", &format!("{path}: {name}")) {
                let line = item.span().start().line;
                findings.push(Finding::new(path, line, format!("nothing names `{name}`")));
            }
        }
    }
    findings
}

fn without_comment(line: &str) -> &str {
    line.find("//").map_or(line, |at| &line[..at])
}

/// Names of public items.
struct Items(Vec<Ident>);

impl Items {
    fn item(&mut self, vis: &Visibility, ident: &Ident) {
        if !matches!(vis, Visibility::Inherited) {
            self.0.push(ident.clone());
        }
    }
}

impl<'ast> Visit<'ast> for Items {
    fn visit_item_fn(&mut self, i: &'ast syn::ItemFn) {
        self.item(&i.vis, &i.sig.ident);
    }
    fn visit_impl_item_fn(&mut self, i: &'ast syn::ImplItemFn) {
        self.item(&i.vis, &i.sig.ident);
    }
    fn visit_item_struct(&mut self, i: &'ast syn::ItemStruct) {
        self.item(&i.vis, &i.ident);
        visit::visit_item_struct(self, i);
    }
    fn visit_item_enum(&mut self, i: &'ast syn::ItemEnum) {
        self.item(&i.vis, &i.ident);
    }
    fn visit_item_trait(&mut self, i: &'ast syn::ItemTrait) {
        self.item(&i.vis, &i.ident);
    }
    fn visit_item_type(&mut self, i: &'ast syn::ItemType) {
        self.item(&i.vis, &i.ident);
    }
    fn visit_item_const(&mut self, i: &'ast syn::ItemConst) {
        self.item(&i.vis, &i.ident);
    }
    fn visit_impl_item_const(&mut self, i: &'ast syn::ImplItemConst) {
        self.item(&i.vis, &i.ident);
    }
    fn visit_item_static(&mut self, i: &'ast syn::ItemStatic) {
        self.item(&i.vis, &i.ident);
    }
    fn visit_field(&mut self, i: &'ast syn::Field) {
        if let Some(ident) = &i.ident {
            self.item(&i.vis, ident);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nothing_names_is_found() {
        let mut sources = Sources::default();
        sources.put("a.rs", "pub fn a() {}\npub(crate) struct B;\n// B and c\nfn c() {}\n".into()).unwrap();
        sources.put("b.rs", "fn d() { a(); }\npub struct E { pub f: u8 }\nfn g(e: E) {}".into()).unwrap();
        let mut exceptions =
            Exceptions::parse("[[exception]]\nrule = 'dead'\nwhat = 'b.rs: f'\nreason = 'so'").unwrap();
        let found = look(&sources, &mut exceptions);
        assert_eq!(found, [Finding::new("a.rs", 2, "nothing names `B`")]);
        assert_eq!(exceptions.unused(), []);
    }
}
