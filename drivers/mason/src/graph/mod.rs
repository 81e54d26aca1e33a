//! Graphs: from statements to a plan of nodes that was checked before anything is opened.
//!
//! ```text
//!   statements ──resolve──► Graph ──check──► Graph that may be built
//!                names, values,   wiring, access,
//!                modules          contents, sizes
//! ```
//!
//! # Contract
//!
//! * Everything follows from the signatures of the classes ([`signature`]).
//! * What the checks accept can be built, unless a file says otherwise.
//! * A graph has at most [`MAX_NODES`] nodes, whatever its text says.

pub mod canonical;
pub mod check;
pub mod resolve;
pub mod show;
pub mod signature;
pub mod value;

use crate::lang::Span;
use crate::lang::ast::Modifier;
use signature::{Params, Signature};
use value::Value;

/// Most nodes of a graph, counting those that modules stand for.
pub const MAX_NODES: usize = 4096;

/// Most nodes above one another.
pub const MAX_LEVELS: usize = 64;

/// The number of a node in its graph.
pub type NodeId = usize;

/// A graph with all names looked up, and modules replaced by what they stand for.
#[derive(Default)]
pub struct Graph {
    /// Its nodes, in the order of the text.
    pub nodes: Vec<Node>,
    /// What must be true of it besides.
    pub conditions: Vec<Condition>,
}

/// A node of a graph.
pub struct Node {
    /// Its name: with those of the modules that it is in, as `d1/leaf`; made up for a node without one.
    pub name: String,
    /// It has a name of its own.
    pub is_named: bool,
    /// The number of its class.
    pub class: usize,
    /// Its parameters, those that were left out with what they mean.
    pub params: Params,
    /// What is said of it.
    pub modifiers: Vec<Modifier>,
    /// The nodes below it, in order.
    pub below: Vec<Edge>,
    /// Where it is declared.
    pub span: Span,
}

/// A node below another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Edge {
    /// The number of the port, in the signature of the node above.
    pub port: usize,
    /// The node below.
    pub to: NodeId,
    /// Where it is connected.
    pub span: Span,
}

/// A condition: `check EXPRESSION;`
pub struct Condition {
    /// What must be true.
    pub fact: Fact,
    /// Where it says so.
    pub span: Span,
}

/// An expression about a graph.
pub enum Fact {
    /// A value that is known already.
    Value(Value),
    /// The size of a node's disk.
    Size(NodeId),
    /// Nothing in the graph changes a node.
    Immutable(NodeId),
    /// What is written to a node may be lost with the process.
    Volatile(NodeId),
    /// The second node is below the first, or is the first.
    Reaches(NodeId, NodeId),
    /// The opposite.
    Not(Box<Fact>),
    /// Two facts and an operator.
    Binary(crate::lang::ast::BinaryOp, Box<Fact>, Box<Fact>),
}

impl Node {
    /// Whether it is said to be `modifier`.
    pub fn is(&self, modifier: Modifier) -> bool {
        self.modifiers.contains(&modifier)
    }
}

impl Graph {
    /// The nodes that are disks: what the graph offers.
    pub fn roots<'a>(&'a self, classes: &'a [Signature]) -> impl Iterator<Item = NodeId> + 'a {
        let is_root = |id: &NodeId| classes[self.nodes[*id].class].name == signature::ROOT;
        (0..self.nodes.len()).filter(is_root)
    }

    /// The node called `name`.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.nodes.iter().position(|node| node.name == name)
    }

    /// `top` and all nodes below it, each once, those below a node before it.
    ///
    /// A cycle is cut where it closes.
    pub fn below(&self, top: NodeId) -> Vec<NodeId> {
        let mut done = Vec::new();
        self.visit(top, &mut vec![false; self.nodes.len()], &mut done);
        done
    }

    /// Adds `top` and what is below it to `done`, as far as it was not `seen`.
    fn visit(&self, top: NodeId, seen: &mut [bool], done: &mut Vec<NodeId>) {
        if std::mem::replace(&mut seen[top], true) {
            return;
        }
        let mut path = vec![(top, 0)];
        while let Some((id, at)) = path.last_mut() {
            match self.nodes[*id].below.get(*at) {
                Some(edge) => {
                    *at += 1;
                    if !std::mem::replace(&mut seen[edge.to], true) {
                        path.push((edge.to, 0));
                    }
                }
                None => {
                    done.push(*id);
                    path.pop();
                }
            }
        }
    }

    /// All nodes, each after those below it. A cycle is cut where it closes.
    pub fn order(&self) -> Vec<NodeId> {
        let (mut done, mut seen) = (Vec::with_capacity(self.nodes.len()), vec![false; self.nodes.len()]);
        (0..self.nodes.len()).for_each(|top| self.visit(top, &mut seen, &mut done));
        done
    }

    /// The nodes above each node, with the edges.
    pub fn above(&self) -> Vec<Vec<(NodeId, Edge)>> {
        let mut above = vec![Vec::new(); self.nodes.len()];
        for (id, node) in self.nodes.iter().enumerate() {
            node.below.iter().for_each(|edge| above[edge.to].push((id, *edge)));
        }
        above
    }
}
