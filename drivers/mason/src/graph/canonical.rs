//! The canonical form of a graph, and its digest: what two texts have in common that mean the same.
//!
//! Nodes are sorted by name, parameters are all there in their order, and values have their largest whole unit. Nodes
//! that no disk uses, comments, conditions, and how the text is divided into classes and chains are left out.

use super::Graph;
use super::signature::Classes;
use crate::lang::ast::Modifier;
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// The canonical form of `graph`.
pub fn canonical(classes: &Classes, graph: &Graph) -> String {
    let mut used: Vec<usize> = graph.roots(&classes.0).flat_map(|root| graph.below(root)).collect();
    used.sort_by(|a, b| graph.nodes[*a].name.cmp(&graph.nodes[*b].name));
    used.dedup();
    let mut text = String::from("mason 1;\n");
    for id in &used {
        let node = &graph.nodes[*id];
        let class = &classes.0[node.class];
        for modifier in Modifier::ALL.into_iter().filter(|modifier| node.is(*modifier)) {
            let _infallible = write!(text, "{} ", modifier.word());
        }
        let given = class.params.iter().zip(&node.params.0);
        let args: Vec<String> = given
            .filter_map(|(param, value)| value.as_ref().map(|value| format!("{} = {value}", param.name)))
            .collect();
        let _infallible = writeln!(text, "{} :: {}({});", node.name, class.name, args.join(", "));
        for edge in &node.below {
            let (port, to) = (class.ports[edge.port].name, &graph.nodes[edge.to].name);
            let _infallible = writeln!(text, "{} [{port}] -> {to};", node.name);
        }
    }
    text
}

/// The digest of a canonical form: 16 hexadecimal digits of its SHA-256.
pub fn digest(canonical: &str) -> String {
    let hash = Sha256::digest(canonical.as_bytes());
    hash.iter().take(8).fold(String::new(), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}
