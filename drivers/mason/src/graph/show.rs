//! Pictures of a graph: a tree of text, the DOT language of Graphviz, and SVG.
//!
//! ```text
//!   vm: disk, 8 GiB
//!   └─ qos: throttle(rate = 40 MiB/s)
//!      └─ leaf: qcow("vm1.qcow")
//!         └─ [backing] golden: raw("golden.img"), readonly
//! ```

use super::check::Checked;
use super::signature::Classes;
use super::value::Value;
use super::{Graph, NodeId};
use std::fmt::Write;

/// A graph to draw.
pub struct Picture<'a> {
    /// Its classes.
    pub classes: &'a Classes,
    /// The graph.
    pub graph: &'a Graph,
    /// What is known of it.
    pub checked: &'a Checked,
}

impl Picture<'_> {
    /// The name of a node, what it is, its modifiers and its size.
    fn words(&self, id: NodeId) -> (String, String) {
        let node = &self.graph.nodes[id];
        let class = &self.classes.0[node.class];
        let first = class.params.first().map(|param| param.name);
        let args: Vec<String> = class
            .params
            .iter()
            .zip(&node.params.0)
            .filter_map(|(param, value)| value.as_ref().map(|value| (param, value)))
            .filter(|(param, value)| !param.is_default(value))
            .map(|(param, value)| match (Some(param.name) == first, value) {
                (true, Value::Path(_)) => value.to_string(),
                _ => format!("{} = {value}", param.name),
            })
            .collect();
        let mut what = match args.is_empty() {
            true => class.name.to_owned(),
            false => format!("{}({})", class.name, args.join(", ")),
        };
        for modifier in &node.modifiers {
            let _infallible = write!(what, ", {}", modifier.word());
        }
        if let Some(size) = self.checked.sizes[id] {
            let _infallible = write!(what, ", {}", Value::Bytes(size));
        }
        (node.name.clone(), what)
    }

    /// The port of an edge, unless it is the only one of its node, or one in order.
    fn port(&self, above: NodeId, edge: usize) -> String {
        let node = &self.graph.nodes[above];
        let class = &self.classes.0[node.class];
        let port = node.below[edge].port;
        match node.below.iter().filter(|other| other.port == port).count() {
            1 if class.ports.len() == 1 && port == 0 => String::new(),
            1 => format!("[{}] ", class.ports[port].name),
            _ => format!("[{} {}] ", class.ports[port].name, edge),
        }
    }

    /// Lines of text, each node below those that use it.
    pub fn tree(&self) -> String {
        let mut text = String::new();
        let mut shown = vec![false; self.graph.nodes.len()];
        for root in self.graph.roots(&self.classes.0) {
            // The node, the lines before it, and its port.
            let mut todo = vec![(root, String::new(), String::new(), String::new())];
            while let Some((id, first, rest, port)) = todo.pop() {
                let (name, what) = self.words(id);
                if std::mem::replace(&mut shown[id], true) {
                    let _infallible = writeln!(text, "{first}{port}{name} (above)");
                    continue;
                }
                let _infallible = writeln!(text, "{first}{port}{name}: {what}");
                let below = &self.graph.nodes[id].below;
                for (i, edge) in below.iter().enumerate().rev() {
                    let (branch, line) =
                        if i + 1 == below.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
                    todo.push((
                        edge.to,
                        format!("{rest}{branch}"),
                        format!("{rest}{line}"),
                        self.port(id, i),
                    ));
                }
            }
        }
        text
    }

    /// The graph in the DOT language.
    pub fn dot(&self) -> String {
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ");
        let mut text = String::from("digraph mason {\n  node [shape=box, fontname=\"sans-serif\"];\n");
        for id in 0..self.graph.nodes.len() {
            let (name, what) = self.words(id);
            let (name, what) = (quoted(&name), quoted(&what));
            let _infallible = writeln!(text, "  n{id} [label=\"{name}\\n{what}\"];");
        }
        for (id, node) in self.graph.nodes.iter().enumerate() {
            for (i, edge) in node.below.iter().enumerate() {
                let port = quoted(self.port(id, i).trim_end());
                let _infallible = writeln!(text, "  n{id} -> n{} [label=\"{port}\"];", edge.to);
            }
        }
        text + "}\n"
    }

    /// The graph as a drawing: what is below is drawn below.
    pub fn svg(&self) -> String {
        let places = self.places();
        let wide = self.widths();
        let across = wide.iter().max().copied().unwrap_or(0) + GAP;
        let right = places.iter().map(|(column, _)| (column + 1) * across + GAP).max().unwrap_or(0);
        let bottom = places.iter().map(|(_, row)| (row + 1) * ROW).max().unwrap_or(0);
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{right}\" height=\"{bottom}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let corner = |id: NodeId| (places[id].0 * across + GAP, places[id].1 * ROW + GAP);
        for (id, node) in self.graph.nodes.iter().enumerate() {
            for (i, edge) in node.below.iter().enumerate() {
                let ((x, y), (to_x, to_y)) = (corner(id), corner(edge.to));
                let (x, y, to_x) = (x + wide[id] / 2, y + BOX, to_x + wide[edge.to] / 2);
                let port = escaped(self.port(id, i).trim_end());
                let _infallible = writeln!(
                    text,
                    "<line x1=\"{x}\" y1=\"{y}\" x2=\"{to_x}\" y2=\"{to_y}\" stroke=\"#555\"/>\n\
                     <text x=\"{}\" y=\"{}\" fill=\"#555\" font-size=\"11\">{port}</text>",
                    (x + to_x) / 2 + 4,
                    (y + to_y) / 2 + 4,
                );
            }
        }
        for (id, &width) in wide.iter().enumerate() {
            let ((x, y), (name, what)) = (corner(id), self.words(id));
            let fill = if self.checked.written[id] { "#e8f0fe" } else { "#f4f4f4" };
            let _infallible = writeln!(
                text,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{BOX}\" rx=\"4\" fill=\"{fill}\" \
                 stroke=\"#333\"/>\n<text x=\"{0}\" y=\"{1}\" font-weight=\"bold\">{2}</text>\n\
                 <text x=\"{0}\" y=\"{3}\" font-size=\"11\">{4}</text>",
                x + 8,
                y + 18,
                escaped(&name),
                y + 34,
                escaped(&what),
            );
        }
        text + "</svg>\n"
    }

    /// The width of each node's box.
    fn widths(&self) -> Vec<usize> {
        let width = |id| {
            let (name, what) = self.words(id);
            (name.chars().count() * 9).max(what.chars().count() * 7) + 16
        };
        (0..self.graph.nodes.len()).map(width).collect()
    }

    /// The column and the row of each node: a node is below all that use it.
    fn places(&self) -> Vec<(usize, usize)> {
        let count = self.graph.nodes.len();
        let mut row = vec![0; count];
        // From the top down.
        for id in self.graph.order().into_iter().rev() {
            for edge in &self.graph.nodes[id].below {
                row[edge.to] = row[edge.to].max(row[id] + 1);
            }
        }
        let mut used = vec![0; count + 1];
        row.iter()
            .map(|row| {
                used[*row] += 1;
                (used[*row] - 1, *row)
            })
            .collect()
    }
}

/// Height of a box, of a row, and the space between boxes, in pixels.
const BOX: usize = 44;
const ROW: usize = 92;
const GAP: usize = 24;

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
