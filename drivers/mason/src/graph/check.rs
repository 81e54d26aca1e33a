//! What must hold of a graph before anything is opened: wiring, access, contents, sizes, and what its text asks for.
//!
//! ```text
//!   wiring      ports, disks, sharing, cycles        ─┐ a graph that has these mistakes
//!   access      who writes to what                   ─┘ is not looked at further
//!   contents    images in use twice, what is lost with the process
//!   sizes       from the bottom up, as far as they are known
//!   conditions  `check ...;`
//! ```

use super::resolve::takes;
use super::signature::{Below, Classes, Keeps, Need, ROOT};
use super::value::Value;
use super::{Edge, Fact, Graph, MAX_LEVELS, NodeId};
use crate::lang::ast::{BinaryOp, Modifier};
use crate::lang::{Diagnostic, Span};
use std::collections::BTreeMap;
use tap_images::same_path;

/// What is known of a graph that was checked.
pub struct Checked {
    /// What is wrong with it.
    pub messages: Vec<Diagnostic>,
    /// Which nodes are written to.
    pub written: Vec<bool>,
    /// The size of each node's disk in bytes, if it is known.
    pub sizes: Vec<Option<u64>>,
}

impl Checked {
    /// Whether the graph may be built: it has no mistakes, though perhaps warnings.
    pub fn is_good(&self) -> bool {
        self.messages.iter().all(|message| message.is_warning)
    }
}

/// Checks `graph`. `size_of` is the size in bytes of the disk of a node that only opening it tells, if it is known.
pub fn check(classes: &Classes, graph: &Graph, size_of: &dyn Fn(NodeId) -> Option<u64>) -> Checked {
    let mut checks = Checks { classes, graph, above: graph.above(), messages: Vec::new() };
    let (none, unknown) = (vec![false; graph.nodes.len()], vec![None; graph.nodes.len()]);
    checks.ports();
    checks.roots();
    checks.cycles();
    checks.levels();
    checks.names();
    if checks.messages.iter().any(|message| !message.is_warning) {
        return Checked { messages: checks.messages, written: none, sizes: unknown };
    }
    let written = checks.access();
    checks.files();
    checks.memory(&written);
    checks.agreement();
    let sizes = checks.sizes(size_of);
    checks.conditions(&written, &sizes);
    Checked { messages: checks.messages, written, sizes }
}

struct Checks<'a> {
    classes: &'a Classes,
    graph: &'a Graph,
    above: Vec<Vec<(NodeId, Edge)>>,
    messages: Vec<Diagnostic>,
}

impl Checks<'_> {
    fn class(&self, id: NodeId) -> &super::signature::Signature {
        &self.classes.0[self.graph.nodes[id].class]
    }

    fn name(&self, id: NodeId) -> &str {
        &self.graph.nodes[id].name
    }

    fn say(&mut self, message: Diagnostic) {
        self.messages.push(message);
    }

    fn error(&mut self, code: &'static str, title: String, span: Span, label: &str) {
        self.say(Diagnostic::error(code, title, span, label));
    }

    /// Each port has as many nodes below it as it takes.
    fn ports(&mut self) {
        for (id, node) in self.graph.nodes.iter().enumerate() {
            for (number, port) in self.classes.0[node.class].ports.iter().enumerate() {
                let edges: Vec<&Edge> = node.below.iter().filter(|edge| edge.port == number).collect();
                let takes = takes(port.arity);
                if edges.len() < *takes.start() {
                    let title = match takes.start() {
                        1 => format!("nothing is connected to `{}` [{}]", self.name(id), port.name),
                        n => format!("`{}` [{}] needs at least {n} disks", self.name(id), port.name),
                    };
                    let message = Diagnostic::error("M3001", title, node.span, "this node");
                    self.say(message.help(format!("the port is for {}", port.about)));
                } else if let Some(extra) = edges.get(*takes.end()) {
                    let title = format!("`{}` [{}] takes one disk", self.name(id), port.name);
                    let message = Diagnostic::error("M3002", title, extra.span, "one too many");
                    self.say(message.label(edges[0].span, "the first one"));
                }
            }
        }
    }

    /// There is a disk, and disks are above everything.
    fn roots(&mut self) {
        let roots: Vec<NodeId> = self.graph.roots(&self.classes.0).collect();
        if roots.is_empty() {
            let span = self.graph.nodes.first().map_or_else(Span::default, |node| node.span);
            let message = Diagnostic::error("M3010", "the graph offers no disk", span, "nothing here is one");
            self.say(message.help(format!("write `vm :: {ROOT}(); vm -> ...;`")));
        }
        for root in &roots {
            if let Some((above, edge)) = self.above[*root].first() {
                let title = format!("`{}` is a {ROOT}, and cannot be below another node", self.name(*root));
                let label = format!("below `{}` here", self.name(*above));
                self.error("M3006", title, edge.span, &label);
            }
        }
        let mut used = vec![false; self.graph.nodes.len()];
        roots.iter().for_each(|root| used[*root] = true);
        for id in self.graph.order().into_iter().rev() {
            if used[id] {
                self.graph.nodes[id].below.iter().for_each(|edge| used[edge.to] = true);
            }
        }
        for (id, _) in used.iter().enumerate().filter(|(_, used)| !**used && !roots.is_empty()) {
            let title = format!("`{}` is below no {ROOT}", self.name(id));
            let span = self.graph.nodes[id].span;
            self.say(Diagnostic::error("M3011", title, span, "nobody uses it").warning());
        }
    }

    /// No node is below itself.
    fn cycles(&mut self) {
        let count = self.graph.nodes.len();
        // 0 not seen, 1 on the path, 2 done.
        let mut state = vec![0u8; count];
        for start in 0..count {
            let mut path = vec![(start, 0)];
            if state[start] != 0 {
                continue;
            }
            state[start] = 1;
            while let Some((id, at)) = path.last_mut() {
                let Some(edge) = self.graph.nodes[*id].below.get(*at).copied() else {
                    state[*id] = 2;
                    path.pop();
                    continue;
                };
                *at += 1;
                match state[edge.to] {
                    0 => {
                        state[edge.to] = 1;
                        path.push((edge.to, 0));
                    }
                    1 => {
                        let from = path.iter().position(|(id, _)| *id == edge.to).unwrap_or(0);
                        let names: Vec<&str> = path[from..].iter().map(|(id, _)| self.name(*id)).collect();
                        let title = format!("a cycle: {} -> {}", names.join(" -> "), self.name(edge.to));
                        self.error("M3005", title, edge.span, "closed here");
                    }
                    _ => {}
                }
            }
        }
    }

    /// Requests pass through a limited number of nodes.
    fn levels(&mut self) {
        let mut levels = vec![1; self.graph.nodes.len()];
        for id in self.graph.order() {
            let below = self.graph.nodes[id].below.iter().map(|edge| levels[edge.to]).max();
            levels[id] = 1 + below.unwrap_or(0);
            if levels[id] == MAX_LEVELS + 1 {
                let title = format!("more than {MAX_LEVELS} nodes are above one another");
                self.error("M3012", title, self.graph.nodes[id].span, "at this one");
            }
        }
    }

    /// What is used by several nodes is declared shared, and what keeps something has a name.
    fn names(&mut self) {
        for id in 0..self.graph.nodes.len() {
            let node = &self.graph.nodes[id];
            let users = &self.above[id];
            if users.len() > 1 && !node.is(Modifier::Shared) {
                let title =
                    format!("`{}` is used {} times, but is not declared shared", node.name, users.len());
                let mut message = Diagnostic::error("M3004", title, node.span, "declared here");
                for (_, edge) in users.iter().take(4) {
                    message = message.label(edge.span, "used here");
                }
                let help = format!("write `shared {} :: ...` if that is meant", node.name);
                self.say(message.help(help));
            }
            if !node.is_named && self.class(id).keeps != Keeps::Nothing {
                let class = self.class(id).name;
                let title = format!("a {class} needs a name, because it keeps something");
                let message = Diagnostic::error("M2009", title, node.span, "this one has none");
                self.say(message.help(format!("write `name :: {class}(...)`")));
            }
            if node.is(Modifier::Volatile) && self.class(id).keeps != Keeps::Memory {
                let title = format!("`{}` is volatile, but keeps nothing in memory", node.name);
                self.error("M2013", title, node.span, "declared here");
            }
        }
    }

    /// Who writes to what. Returns which nodes are written to.
    fn access(&mut self) -> Vec<bool> {
        let count = self.graph.nodes.len();
        let mut written = vec![false; count];
        // From which node each one gets its writes.
        let mut writer: Vec<Option<NodeId>> = vec![None; count];
        let mut todo: Vec<NodeId> = Vec::new();
        for root in self.graph.roots(&self.classes.0) {
            if !self.graph.nodes[root].is(Modifier::Readonly) {
                written[root] = true;
                todo.push(root);
            }
        }
        while let Some(id) = todo.pop() {
            let node = &self.graph.nodes[id];
            for edge in &node.below {
                let need = self.classes.0[node.class].ports[edge.port].need;
                if need == Need::AsAbove && !std::mem::replace(&mut written[edge.to], true) {
                    writer[edge.to] = Some(id);
                    todo.push(edge.to);
                }
            }
        }
        for id in (0..count).filter(|id| written[*id]) {
            let node = &self.graph.nodes[id];
            let is_readonly = node.is(Modifier::Readonly);
            if !is_readonly && self.class(id).writable {
                continue;
            }
            let why = match is_readonly {
                true => "is declared readonly".to_owned(),
                false => format!("is a {}, which takes no writes", self.class(id).name),
            };
            let mut path = vec![self.name(id)];
            let mut at = id;
            while let Some(above) = writer[at].filter(|_| path.len() <= count) {
                path.push(self.name(above));
                at = above;
            }
            path.reverse();
            let title = format!("`{}` would be written to, and {why}", node.name);
            let message = Diagnostic::error("M4001", title, node.span, path.join(" -> "));
            let help = format!("declare `readonly {}` if the disk is only read", path[0]);
            self.say(message.help(help));
        }
        self.unchanged(&written);
        written
    }

    /// What must not change is not written to.
    fn unchanged(&mut self, written: &[bool]) {
        let mut changes = written.to_vec();
        for id in self.graph.order() {
            changes[id] |= self.graph.nodes[id].below.iter().any(|edge| changes[edge.to]);
        }
        for id in (0..self.graph.nodes.len()).filter(|id| changes[*id]) {
            let base = self.above[id]
                .iter()
                .find(|(above, edge)| self.class(*above).ports[edge.port].need == Need::Unchanged);
            let Some((above, edge)) = base.copied() else { continue };
            if let Some(changed) = self.graph.below(id).into_iter().find(|below| written[*below]) {
                let what = match changed == id {
                    true => format!("`{}`", self.name(id)),
                    false => format!("`{}`, which is below `{}`,", self.name(changed), self.name(id)),
                };
                let title = format!("{what} would be written to while `{}` relies on it", self.name(above));
                let message = Diagnostic::error("M4002", title, edge.span, "must not change below this");
                let span = self.graph.nodes[changed].span;
                self.say(message.label(span, "would be written to"));
            }
        }
    }

    /// No two nodes open one file.
    fn files(&mut self) {
        let mut files: Vec<(String, NodeId)> = Vec::new();
        for (id, node) in self.graph.nodes.iter().enumerate() {
            let Keeps::File(param) = self.class(id).keeps else { continue };
            files.push((normal(node.params.text(param)), id));
        }
        files.sort();
        for pair in files.windows(2).filter(|pair| same_path(&pair[0].0, &pair[1].0)) {
            let (first, second) = (pair[0].1, pair[1].1);
            let title = format!("`{}` and `{}` are the same file", self.name(first), self.name(second));
            let message = Diagnostic::error("M3007", title, self.graph.nodes[second].span, "the second time");
            let message = message.label(self.graph.nodes[first].span, "the first time");
            self.say(message.help("use one node, and declare it shared"));
        }
    }

    /// What is lost with the process is said to be.
    fn memory(&mut self, written: &[bool]) {
        for (id, node) in self.graph.nodes.iter().enumerate() {
            if written[id] && self.class(id).keeps == Keeps::Memory && !node.is(Modifier::Volatile) {
                let title = format!("what is written to `{}` is lost when the process ends", node.name);
                let message = Diagnostic::error("M6001", title, node.span, "kept in memory only");
                let help = format!("write `volatile {} :: ...` if that is meant", node.name);
                self.say(message.help(help));
            }
        }
    }

    /// Nodes that share something mean the same by it.
    fn agreement(&mut self) {
        let nodes = &self.graph.nodes;
        let mut firsts: BTreeMap<(usize, Value), NodeId> = BTreeMap::new();
        for id in 0..nodes.len() {
            let Some(param) = self.class(id).agree else { continue };
            let Some(group) = nodes[id].params.0[param].clone() else { continue };
            let first = *firsts.entry((nodes[id].class, group.clone())).or_insert(id);
            if nodes[first].params != nodes[id].params {
                let title =
                    format!("`{}` and `{}` share {group}, and differ", self.name(first), self.name(id));
                let message = Diagnostic::error("M2014", title, nodes[id].span, "the second one");
                let message = message.label(nodes[first].span, "the first one");
                self.say(message.help("give both the same parameters"));
            }
        }
    }

    /// The sizes of all disks, from the bottom up.
    fn sizes(&mut self, size_of: &dyn Fn(NodeId) -> Option<u64>) -> Vec<Option<u64>> {
        let mut sizes = vec![None; self.graph.nodes.len()];
        for id in self.graph.order() {
            sizes[id] = self.size(id, &sizes, size_of);
        }
        sizes
    }

    fn size(
        &mut self,
        id: NodeId,
        sizes: &[Option<u64>],
        size_of: &dyn Fn(NodeId) -> Option<u64>,
    ) -> Option<u64> {
        let node = &self.graph.nodes[id];
        let Some(rule) = self.class(id).size else { return size_of(id) };
        let below: Option<Vec<Below>> = node
            .below
            .iter()
            .map(|edge| sizes[edge.to].map(|size_bytes| Below { port: edge.port, size_bytes }))
            .collect();
        match rule(&node.params, &below?) {
            Ok(size) => Some(size),
            Err(why) => {
                self.error("M5001", format!("`{}` is impossible: {why}", node.name), node.span, "this node");
                None
            }
        }
    }

    fn conditions(&mut self, written: &[bool], sizes: &[Option<u64>]) {
        for condition in &self.graph.conditions {
            let facts = Facts { checks: self, written, sizes };
            match facts.value(&condition.fact) {
                // What is not known yet is checked when the images are open.
                Ok(None | Some(Value::Bool(true))) => {}
                Ok(Some(Value::Bool(false))) => {
                    let text = facts.shown(&condition.fact);
                    self.error("M7001", format!("this is not so: {text}"), condition.span, "asked for here");
                }
                Ok(Some(other)) => {
                    let title = format!("a condition is true or false, and this is {}", other.ty());
                    self.error("M7002", title, condition.span, "no condition");
                }
                Err(why) => self.error("M7002", why, condition.span, "in this condition"),
            }
        }
    }
}

/// A path without `//` and `/./`, so that equal files sort next to one another.
fn normal(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    format!("{}{}", if path.starts_with('/') { "/" } else { "" }, parts.join("/"))
}

/// What is known, for conditions.
struct Facts<'c, 'a> {
    checks: &'c Checks<'a>,
    written: &'c [bool],
    sizes: &'c [Option<u64>],
}

impl Facts<'_, '_> {
    fn value(&self, fact: &Fact) -> Result<Option<Value>, String> {
        let graph = self.checks.graph;
        Ok(match fact {
            Fact::Value(value) => Some(value.clone()),
            Fact::Size(id) => self.sizes[*id].map(Value::Bytes),
            Fact::Immutable(id) => Some(Value::Bool(!graph.below(*id).iter().any(|id| self.written[*id]))),
            Fact::Volatile(id) => {
                let in_memory =
                    |id: &NodeId| self.written[*id] && self.checks.class(*id).keeps == Keeps::Memory;
                Some(Value::Bool(graph.below(*id).iter().any(in_memory)))
            }
            Fact::Reaches(from, to) => Some(Value::Bool(graph.below(*from).contains(to))),
            Fact::Not(inner) => match self.value(inner)? {
                Some(Value::Bool(b)) => Some(Value::Bool(!b)),
                None => None,
                Some(other) => {
                    return Err(format!("`not` is for true and false, and this is {}", other.ty()));
                }
            },
            Fact::Binary(op, a, b) => match (self.value(a)?, self.value(b)?) {
                (Some(a), Some(b)) => Some(combine(*op, &a, &b)?),
                _ => None,
            },
        })
    }

    /// The condition, with what is known put in.
    fn shown(&self, fact: &Fact) -> String {
        let name = |id: &NodeId| self.checks.name(*id);
        match fact {
            Fact::Value(value) => value.to_string(),
            Fact::Size(id) => match self.sizes[*id] {
                Some(size) => format!("size({}), which is {},", name(id), Value::Bytes(size)),
                None => format!("size({})", name(id)),
            },
            Fact::Immutable(id) => format!("immutable({})", name(id)),
            Fact::Volatile(id) => format!("volatile({})", name(id)),
            Fact::Reaches(a, b) => format!("reaches({}, {})", name(a), name(b)),
            Fact::Not(inner) => format!("not {}", self.shown(inner)),
            Fact::Binary(op, a, b) => format!("{} {} {}", self.shown(a), word(*op), self.shown(b)),
        }
    }
}

/// How an operator is written.
fn word(op: BinaryOp) -> &'static str {
    match op {
        BinaryOp::Implies => "implies",
        BinaryOp::Or => "or",
        BinaryOp::And => "and",
        BinaryOp::Equal => "==",
        BinaryOp::NotEqual => "!=",
        BinaryOp::AtMost => "<=",
        BinaryOp::AtLeast => ">=",
        BinaryOp::Less => "<",
        BinaryOp::Greater => ">",
        BinaryOp::Add => "+",
        BinaryOp::Subtract => "-",
        BinaryOp::Multiply => "*",
    }
}

fn combine(op: BinaryOp, a: &Value, b: &Value) -> Result<Value, String> {
    use std::cmp::Ordering;
    let truth = match op {
        BinaryOp::Add | BinaryOp::Subtract | BinaryOp::Multiply => return Value::combine(op, a, b),
        BinaryOp::Implies | BinaryOp::Or | BinaryOp::And => match (a, b) {
            (Value::Bool(a), Value::Bool(b)) => match op {
                BinaryOp::Implies => !*a || *b,
                BinaryOp::Or => *a || *b,
                _ => *a && *b,
            },
            _ => return Err(format!("`{}` is for true and false", word(op))),
        },
        _ if a.ty() != b.ty() => return Err(format!("{} and {} cannot be compared", a.ty(), b.ty())),
        BinaryOp::Equal => a == b,
        BinaryOp::NotEqual => a != b,
        _ => {
            let (Some(a), Some(b)) = (a.number(), b.number()) else {
                return Err(format!("{} has no order", a.ty()));
            };
            match (op, a.cmp(&b)) {
                (BinaryOp::AtMost, order) => order != Ordering::Greater,
                (BinaryOp::AtLeast, order) => order != Ordering::Less,
                (BinaryOp::Less, order) => order == Ordering::Less,
                (_, order) => order == Ordering::Greater,
            }
        }
    };
    Ok(Value::Bool(truth))
}
