//! Opens and makes the nodes of a graph, from the bottom up.
//!
//! ```text
//!   golden ─► rc ─► leaf ─► throttle ─► disk        each is made when everything below it is there
//! ```
//!
//! A node with several parents is leased to each of them; if more than one of these writes, a scheduler in between
//! keeps the order of overlapping requests. When anything fails, what was opened is closed, the last first.

use crate::graph::check::{Checked, check};
use crate::graph::signature::Below;
use crate::graph::{Graph, NodeId};
use crate::lang::Diagnostic;
use crate::modules::{Made, Maker, Modules};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_core::{Lease, Node, Scheduler, SchedulerLimits};
use tap_host::{Errno, SECTOR_BYTES};
use tap_images::{Backing, BackingPolicy, ImageError, ImageFormat, ImageHost, ImageSpec, OpenOptions};

tap_host::listed! {
    pub(crate) BUGS: Bug;
    BASES_WRITTEN = "bases-written", "images that are only read are opened for writing";
}

tap_host::listed! {
    pub(crate) MARKS: Mark;
    WRITING_PARENTS = "writing-parents", "a node that several others write to was made";
}

/// Why a graph cannot be opened; the text continues "failed to".
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BuildError {
    /// One of its images cannot be opened.
    #[error("{error} (node {node})")]
    Image {
        /// The name of its node.
        node: String,
        /// Why not.
        error: ImageError,
    },
    /// A file may not be opened, or not as this.
    #[error("open {path} for node {node}: {what}")]
    Refused {
        /// The name of its node.
        node: String,
        /// The file.
        path: String,
        /// Why not, and what to do.
        what: String,
    },
    /// A node cannot be made.
    #[error("make node {node}: {error}")]
    Node {
        /// Its name.
        node: String,
        /// Why not.
        error: Errno,
    },
    /// The images that were opened do not fit the graph.
    #[error("build the graph: {}", .0.title)]
    Graph(Diagnostic),
}

/// A node while others are made.
enum Held {
    /// It has one parent, which takes it.
    Own(Rc<dyn Node>),
    /// It has several.
    Shared(Lease),
}

struct Builder<'a, H: 'static> {
    host: &'a H,
    modules: &'a Modules<H>,
    graph: &'a Graph,
    written: &'a [bool],
    options: &'a OpenOptions,
    held: BTreeMap<NodeId, Held>,
    /// Those above each node that are made, once for each edge.
    parents: Vec<Vec<NodeId>>,
    /// The sizes of those that are there, in bytes.
    sizes: Vec<Option<u64>>,
    groups: BTreeMap<String, Rc<crate::modules::pass::Limits>>,
}

/// Opens the disk `root` of `graph`, which was checked and is good.
///
/// # Errors
/// [`BuildError`]; everything is closed again.
pub async fn build<H: ImageHost>(
    host: &H,
    modules: &Modules<H>,
    graph: &Graph,
    checked: &Checked,
    root: NodeId,
    options: &OpenOptions,
) -> Result<Rc<dyn Node>, BuildError> {
    let written: Vec<bool> = checked.written.iter().map(|written| *written && options.write).collect();
    let sizes = vec![None; graph.nodes.len()];
    let (held, groups) = (BTreeMap::new(), BTreeMap::new());
    let order = graph.below(root);
    let mut parents = vec![Vec::new(); graph.nodes.len()];
    for above in &order {
        graph.nodes[*above].below.iter().for_each(|edge| parents[edge.to].push(*above));
    }
    let mut builder =
        Builder { host, modules, graph, written: &written, options, held, parents, sizes, groups };
    let mut result = Ok(());
    for id in &order {
        result = builder.make(*id).await;
        if result.is_err() {
            break;
        }
    }
    let result = result.and_then(|()| builder.fits());
    if let Err(error) = result {
        builder.close(&order).await;
        return Err(error);
    }
    Ok(builder.take(root))
}

impl<H: ImageHost> Builder<'_, H> {
    /// Makes node `id`; everything below it is there.
    async fn make(&mut self, id: NodeId) -> Result<(), BuildError> {
        let node = &self.graph.nodes[id];
        let made = match self.modules.maker(node.class) {
            Maker::Root => self.take(node.below[0].to),
            Maker::Image(format) => self.open(id, format.into()).await?,
            Maker::Node(make) => {
                let size_bytes = self.size(id)?;
                let ports = 0..self.modules.classes.0[node.class].ports.len();
                let edges = ports.flat_map(|port| node.below.iter().filter(move |edge| edge.port == port));
                let below = edges.map(|edge| self.take(edge.to)).collect();
                let (host, memory, groups) = (self.host, &self.options.memory, &mut self.groups);
                let (params, written) = (&node.params, self.written[id]);
                let made = Made { host, params, size_bytes, written, below, memory, groups };
                make(made).map_err(|error| BuildError::Node { node: node.name.clone(), error })?
            }
        };
        self.sizes[id] = Some(made.info().size_sectors * SECTOR_BYTES);
        let held = self.hold(id, made);
        self.held.insert(id, held);
        Ok(())
    }

    /// The size of a disk that follows from those below it.
    fn size(&self, id: NodeId) -> Result<u64, BuildError> {
        let node = &self.graph.nodes[id];
        let class = &self.modules.classes.0[node.class];
        let below = node.below.iter().map(|edge| Below {
            port: edge.port,
            size_bytes: self.sizes[edge.to].expect("what is below is there"),
        });
        let rule = class.size.expect("only images have no rule");
        rule(&node.params, &below.collect::<Vec<_>>()).map_err(|why| {
            let title = format!("`{}` is impossible: {why}", node.name);
            BuildError::Graph(Diagnostic::error("M5001", title, node.span, "this node"))
        })
    }

    /// Prepares `made` for its parents.
    fn hold(&self, id: NodeId, made: Rc<dyn Node>) -> Held {
        let parents = &self.parents[id];
        if parents.len() < 2 {
            return Held::Own(made);
        }
        let writers = parents.iter().filter(|parent| self.written[**parent]).count();
        if writers < 2 || !self.written[id] {
            return Held::Shared(Lease::new(made));
        }
        self.host.mark(&WRITING_PARENTS);
        // The scheduler of the disk tries again; this one only keeps the order.
        let limits = SchedulerLimits { retries: 0, ..SchedulerLimits::default() };
        Held::Shared(Lease::new(Rc::new(Scheduler::new(self.host.clone(), made, limits))))
    }

    /// The node `id`, for one parent.
    fn take(&mut self, id: NodeId) -> Rc<dyn Node> {
        match self.held.remove(&id) {
            Some(Held::Own(node)) => node,
            Some(Held::Shared(lease)) => {
                let share = Rc::new(lease.share());
                self.held.insert(id, Held::Shared(lease));
                share
            }
            None => panic!("node {id} is made before its parents, and has one"),
        }
    }

    /// Whether the image of node `id` is opened for writing.
    fn may_write(&self, id: NodeId) -> bool {
        self.written[id] || self.options.write && self.host.bug(&BASES_WRITTEN)
    }

    /// Opens the image of node `id`.
    async fn open(&mut self, id: NodeId, format: ImageFormat) -> Result<Rc<dyn Node>, BuildError> {
        let node = &self.graph.nodes[id];
        let path = node.params.text(0).to_owned();
        let refused =
            |what: String| BuildError::Refused { node: node.name.clone(), path: path.clone(), what };
        let any = match self.options.backing.allowed(&path) {
            Some(Backing::File(meant)) if fits(meant, format) => false,
            Some(Backing::Any(meant)) if fits(meant, format) => true,
            Some(Backing::File(meant) | Backing::Any(meant)) => {
                let (meant, format) = (meant.name(), format.name());
                return Err(refused(format!("it may be opened as {meant}, and the graph says {format}")));
            }
            Some(Backing::Open(_)) => return Err(refused("it is open already".to_owned())),
            None => {
                let format = format.name();
                return Err(refused(format!(
                    "it may not be opened; allow it with --backing {format}:{path}"
                )));
            }
        };
        let mut options = OpenOptions { write: self.may_write(id), ..self.options.clone() };
        let (mut lent, asked) = (None, Rc::new(Cell::new(false)));
        if let Some(edge) = node.below.first().copied() {
            // What fails to open does not close what it was given.
            let base = Lease::new(self.take(edge.to));
            let (share, asked): (Rc<dyn Node>, _) = (Rc::new(base.share()), Rc::clone(&asked));
            options.backing = BackingPolicy::Ask(Rc::new(move |_| {
                asked.set(true);
                Some(Backing::Open(Rc::clone(&share)))
            }));
            lent = Some(base);
        }
        let spec = ImageSpec { format, path: path.clone() };
        let opened = self.modules.formats.open_meant(self.host, &spec, &options, any).await;
        let error = match opened {
            Ok(image) if asked.get() || lent.is_none() => return Ok(image),
            Ok(image) => {
                let _first_error_counts = image.close().await;
                refused("it has no backing file, and the graph connects one".to_owned())
            }
            Err(error) => BuildError::Image { node: node.name.clone(), error },
        };
        if let Some(base) = lent {
            drop(options);
            let _first_error_counts = base.close().await;
        }
        Err(error)
    }

    /// Whether the images that were opened fit the graph.
    fn fits(&self) -> Result<(), BuildError> {
        let checked = check(&self.modules.classes, self.graph, &|id| self.sizes[id]);
        match checked.messages.into_iter().find(|message| !message.is_warning) {
            Some(message) => Err(BuildError::Graph(message)),
            None => Ok(()),
        }
    }

    /// Closes what no other node closes, the last first.
    async fn close(&mut self, order: &[NodeId]) {
        for id in order.iter().rev() {
            let _first_error_counts = match self.held.remove(id) {
                Some(Held::Own(node)) => node.close().await,
                Some(Held::Shared(lease)) => lease.close().await,
                None => Ok(()),
            };
        }
    }
}

/// Whether a file that may be opened as `meant` may be opened as `format`.
fn fits(meant: ImageFormat, format: ImageFormat) -> bool {
    meant == format || meant == ImageFormat::Probe
}
