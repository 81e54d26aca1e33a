//! Connects the nodes of chains, and takes the ports of modules out again.

use super::{Item, Named, Resolver, Scope, Wire, unknown};
use crate::graph::signature::Arity;
use crate::graph::{Edge, Graph, Node};
use crate::lang::ast::{self, Chain, Hop, NodeRef, PortRef, QName};
use crate::lang::{Diagnostic, Span};
use std::collections::BTreeMap;

/// Both ends of a hop.
struct Ends {
    /// What the one before is connected to.
    above: usize,
    /// Where the next one is connected.
    below: usize,
    /// The port of that, if it is a node.
    port: Option<PortRef>,
    span: Span,
}

impl<'a> Resolver<'a> {
    /// `a -> b -> c => d, e;`
    pub(super) fn chain(&mut self, chain: &'a Chain, scope: &mut Scope) {
        let mut last: Option<Ends> = None;
        for (i, hop) in chain.hops.iter().enumerate() {
            let goes_on = i + 1 < chain.hops.len() || !chain.fan.is_empty();
            let ends = self.hop(hop, last.as_ref(), goes_on, scope);
            self.wire(last.as_ref(), ends.as_ref());
            last = ends;
        }
        for leg in &chain.fan {
            if let Some(key) = &leg.key {
                let title = format!("`{}:` is a key, and no class has ports with keys", key.node);
                self.say(Diagnostic::error("M3008", title, key.span, "this key").help("leave it out"));
            }
            let to = self.hop(&leg.hop, last.as_ref(), false, scope);
            self.wire(last.as_ref(), to.as_ref());
        }
    }

    fn wire(&mut self, from: Option<&Ends>, to: Option<&Ends>) {
        let Some(from) = from else { return };
        let Some(to) = to else {
            // What should be below it was reported.
            self.excused.push(from.below);
            return;
        };
        self.wires.push(Wire {
            from: from.below,
            port: from.port.clone(),
            to: to.above,
            span: from.span.to(to.span),
        });
    }

    fn hop(&mut self, hop: &'a Hop, last: Option<&Ends>, goes_on: bool, scope: &mut Scope) -> Option<Ends> {
        let named = match &hop.node {
            NodeRef::Named(name) => self.look_up(name, scope)?,
            NodeRef::New { name: Some(name), .. } => scope.names.get(&name.node)?.clone(),
            NodeRef::New { modifiers, name: None, ctor } => {
                let above = last.and_then(|ends| match &self.items[ends.below] {
                    Item::Node(node) => Some(format!("{}.", node.name)),
                    Item::Port { .. } => None,
                });
                let name = above.unwrap_or_else(|| scope.prefix.clone()) + &ctor.class.node;
                let name = self.unused(name);
                let modifiers = modifiers.iter().map(|m| m.node).collect();
                self.instance(name, false, ctor.span, modifiers, ctor, scope)
            }
        };
        self.ends(hop, &named, goes_on)
    }

    /// `name`, with a number if there is one already.
    fn unused(&self, name: String) -> String {
        let taken =
            |name: &str| self.items.iter().any(|item| matches!(item, Item::Node(n) if n.name == name));
        if !taken(&name) {
            return name;
        }
        (2..).map(|n| format!("{name}#{n}")).find(|name| !taken(name)).expect("there are always more numbers")
    }

    fn ends(&mut self, hop: &'a Hop, named: &Named, goes_on: bool) -> Option<Ends> {
        let span = hop.span;
        match named {
            Named::Broken => None,
            Named::Node(at) | Named::Port(at) => {
                if let Some(port) = &hop.above {
                    let title = format!("`{}` is not a port of a module", port.name.node);
                    let message = Diagnostic::error("M3003", title, port.span, "a node has one port above");
                    self.say(message.help("leave it out"));
                }
                if let (Named::Port(_), Some(port)) = (named, &hop.below) {
                    let title = format!("`{}` follows a port, which has no ports", port.name.node);
                    self.say(Diagnostic::error("M3003", title, port.span, "leave it out"));
                }
                Some(Ends { above: *at, below: *at, port: hop.below.clone(), span })
            }
            Named::Module { above, below, .. } => {
                let below = match &hop.below {
                    Some(port) => match below.iter().find(|(name, _)| *name == port.name.node) {
                        Some((_, at)) => *at,
                        None => {
                            let known = below.iter().map(|(name, _)| name.as_str());
                            let message = unknown("M3003", "port below", &port.name, known);
                            self.say(message);
                            return None;
                        }
                    },
                    None => match &below[..] {
                        [(_, at)] => *at,
                        _ if !goes_on => *above,
                        several => {
                            let names: Vec<&str> = several.iter().map(|(name, _)| name.as_str()).collect();
                            let title = match names.is_empty() {
                                true => "a module without ports below has nothing below it".to_owned(),
                                false => format!("a module with several ports below: {}", names.join(", ")),
                            };
                            let message = Diagnostic::error("M3003", title, span, "which one is meant?");
                            self.say(message);
                            return None;
                        }
                    },
                };
                Some(Ends { above: *above, below, port: None, span })
            }
        }
    }

    /// What `name` means, through the modules that it names.
    pub(super) fn look_up(&mut self, name: &QName, scope: &Scope) -> Option<Named> {
        let mut names: &BTreeMap<String, Named> = &scope.names;
        for (i, part) in name.parts.iter().enumerate() {
            let Some(found) = names.get(&part.node) else {
                // What was declared with a mistake was reported where it is declared.
                if i > 0 || !scope.spans.contains_key(&part.node) {
                    let known = names.keys().map(String::as_str);
                    let message = unknown("M2002", "node", part, known);
                    self.say(message);
                }
                return None;
            };
            match found {
                found if i + 1 == name.parts.len() => return Some(found.clone()),
                Named::Module { names: inner, .. } => names = inner,
                Named::Broken => return None,
                Named::Node(_) | Named::Port(_) => {
                    let title = format!("`{}` is a node, and has no nodes in it", part.node);
                    self.say(Diagnostic::error("M2002", title, name.span, "this name"));
                    return None;
                }
            }
        }
        None
    }

    /// The graph, without the ports of modules.
    pub(super) fn finish(mut self) -> (Graph, Vec<Diagnostic>) {
        let next = self.ports();
        let mut numbers = vec![None; self.items.len()];
        let nodes = self.items.iter().enumerate().filter(|(_, item)| matches!(item, Item::Node(_)));
        nodes.enumerate().for_each(|(number, (at, _))| numbers[at] = Some(number));
        let mut nodes: Vec<Node> = Vec::new();
        for item in std::mem::take(&mut self.items) {
            if let Item::Node(node) = item {
                nodes.push(node);
            }
        }
        for wire in std::mem::take(&mut self.wires) {
            let (Some(from), Some(to)) = (numbers[wire.from], follow(&next, wire.to)) else { continue };
            let Some(to) = numbers[to] else { continue };
            let class = nodes[from].class;
            if let Some(port) = self.port_of(class, &nodes[from].name, &wire) {
                nodes[from].below.push(Edge { port, to, span: wire.span });
            }
        }
        let node_of = |at: usize| follow(&next, at).and_then(|at| numbers[at]);
        // A condition about a port that is not connected has nothing to say; the port was reported.
        let mut conditions = std::mem::take(&mut self.conditions);
        conditions.retain_mut(|condition| condition.fact.renumber(&node_of).is_some());
        (Graph { nodes, conditions }, self.messages)
    }

    /// What is connected below each port of a module.
    fn ports(&mut self) -> Vec<Option<usize>> {
        let mut next: Vec<Option<usize>> = vec![None; self.items.len()];
        let mut first: Vec<Option<Span>> = vec![None; self.items.len()];
        let mut messages = Vec::new();
        for wire in &self.wires {
            let Item::Port { name, .. } = &self.items[wire.from] else { continue };
            if let Some(first) = first[wire.from] {
                let title = format!("{name} is connected twice");
                let message = Diagnostic::error("M3002", title, wire.span, "the second time");
                messages.push(message.label(first, "the first time"));
                continue;
            }
            (next[wire.from], first[wire.from]) = (Some(wire.to), Some(wire.span));
        }
        for (at, item) in self.items.iter().enumerate() {
            let Item::Port { name, span } = item else { continue };
            if next[at].is_none() && self.excused.contains(&at) {
                continue;
            }
            if next[at].is_none() {
                let title = format!("{name} is not connected");
                messages.push(Diagnostic::error("M3001", title, *span, "this port of the module"));
            } else if follow(&next, at).is_none() {
                let title = format!("{name} is connected to itself");
                messages.push(Diagnostic::error("M3005", title, *span, "this port of the module"));
            }
        }
        messages.into_iter().for_each(|message| self.say(message));
        next
    }

    /// The number of the port that `wire` is connected to, at a node of `class`.
    fn port_of(&mut self, class: usize, node: &str, wire: &Wire) -> Option<usize> {
        let ports = &self.classes.0[class].ports;
        let name = match &wire.port {
            None if ports.is_empty() => {
                let title =
                    format!("nothing can be below `{node}`: a {} has no ports", self.classes.0[class].name);
                self.say(Diagnostic::error("M3003", title, wire.span, "connected here"));
                return None;
            }
            None => return Some(0),
            Some(ast::PortRef { name, key: None, .. }) => name,
            Some(ast::PortRef { key: Some(key), .. }) => {
                let title = format!("`.{}` is a key, and no class has ports with keys", key.node);
                self.say(Diagnostic::error("M3008", title, key.span, "this key").help("leave it out"));
                return None;
            }
        };
        let found = ports.iter().position(|port| port.name == name.node);
        if found.is_none() {
            let message = unknown("M3003", "port below", name, ports.iter().map(|port| port.name));
            self.say(message.help(format!("`{node}` is a {}", self.classes.0[class].name)));
        }
        found
    }
}

/// The node that `at` stands for.
fn follow(next: &[Option<usize>], mut at: usize) -> Option<usize> {
    for _ in 0..=next.len() {
        match next[at] {
            Some(below) => at = below,
            None => return Some(at),
        }
    }
    None
}

/// How many nodes a port takes.
pub(crate) fn takes(arity: Arity) -> std::ops::RangeInclusive<usize> {
    match arity {
        Arity::One => 1..=1,
        Arity::Optional => 0..=1,
        Arity::Ordered(least) => least..=usize::MAX,
    }
}
