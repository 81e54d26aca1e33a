//! The modules: what the nodes of a graph are.
//!
//! | class | what | module |
//! |---|---|---|
//! | `disk` | what the graph offers | (here) |
//! | a format of the registry | an image | `tap-images` |
//! | `ram` | a disk in memory | [`ram`] |
//! | `zero`, `pattern`, `error` | disks without a place for data | [`fixed`] |
//! | `concat`, `stripe`, `slice` | other orders of sectors | [`split`] and a module each |
//! | `delay`, `throttle` | requests, later | [`pass`] |
//!
//! A module is a [`Signature`], from which all checks follow, and a function that makes the node.

pub mod concat;
pub mod fixed;
pub mod pass;
pub mod ram;
pub mod slice;
pub mod split;
pub mod stripe;

use crate::graph::signature::{Arity, Below, Classes, Keeps, Need, Param, Params, Port, ROOT, Signature};
use crate::graph::value::{Type, Value};
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_core::Node;
use tap_host::{Budget, Errno, SECTOR_BYTES};
use tap_images::{Format, Formats, ImageHost};

tap_host::listed! {
    pub(crate) BUGS: Bug with [pass::BUGS, slice::BUGS, split::BUGS, stripe::BUGS];
}

tap_host::listed! {
    pub(crate) MARKS: Mark with [pass::MARKS, split::MARKS];
}

/// The classes of a program, and how their nodes are made.
pub struct Modules<H: 'static> {
    /// Their signatures.
    pub classes: Classes,
    /// In the order of the classes.
    makers: Vec<Maker<H>>,
    /// The formats of images.
    pub formats: Formats<H>,
}

/// How a node is made.
pub enum Maker<H: 'static> {
    /// It is the node below it.
    Root,
    /// An image of this format is opened.
    Image(Format),
    /// By this function.
    Node(Make<H>),
}

/// Makes a node.
///
/// # Errors
/// `ENOMEM` if the memory of the process is used up.
pub type Make<H> = fn(Made<'_, H>) -> Result<Rc<dyn Node>, Errno>;

impl<H> Clone for Maker<H> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<H> Copy for Maker<H> {}

/// A node that is to be made.
pub struct Made<'a, H> {
    /// The host.
    pub host: &'a H,
    /// Its parameters.
    pub params: &'a Params,
    /// The size of its disk in bytes.
    pub size_bytes: u64,
    /// Whether it will be written to.
    pub written: bool,
    /// The nodes below it, port by port.
    pub below: Vec<Rc<dyn Node>>,
    /// The memory of the process.
    pub memory: &'a Budget,
    /// The limits that throttles of the graph share, by the name of their group.
    pub groups: &'a mut BTreeMap<String, Rc<pass::Limits>>,
}

impl<H: ImageHost> Modules<H> {
    /// The modules of this crate, and images of `formats`.
    pub fn new(formats: Formats<H>) -> Self {
        let makers = [
            Maker::Root,
            Maker::Node(|made| Ok(Rc::new(ram::Ram::new(made.size_bytes, made.written, made.memory)?))),
            Maker::Node(|made| Ok(made.fixed(fixed::Answer::Zeros))),
            Maker::Node(|made| Ok(made.fixed(fixed::Answer::Pattern(made.params.number(1))))),
            Maker::Node(|made| {
                Ok(made.fixed(fixed::Answer::Error(fixed::Fixed::error_called(made.params.text(1)))))
            }),
            Maker::Node(|made| {
                let layout = concat::Concat::new(made.below.iter().map(|node| node.info().size_sectors));
                made.split(layout, "part")
            }),
            Maker::Node(|made| {
                let layout =
                    stripe::Stripe::new(made.host, made.params.number(0) / SECTOR_BYTES, made.below.len());
                made.split(layout, "member")
            }),
            Maker::Node(|made| {
                let (from, to) = made.params.range(0);
                let layout = slice::Slice::new(made.host, from / SECTOR_BYTES, (to - from) / SECTOR_BYTES);
                made.split(layout, "whole")
            }),
            Maker::Node(|made| {
                let pace = pass::Pace::Delay(made.params.number(0), made.params.number(1));
                Ok(made.pass(pace))
            }),
            Maker::Node(|mut made| {
                let limits = made.limits();
                Ok(made.pass(pass::Pace::Limits(limits)))
            }),
        ];
        let images = formats.all().map(Maker::Image);
        Self {
            classes: Classes(signatures(formats.all())),
            makers: makers.into_iter().chain(images).collect(),
            formats,
        }
    }

    /// The format and the path of `node`, if it is an image.
    pub fn image<'n>(&self, node: &'n crate::graph::Node) -> Option<(Format, &'n str)> {
        match self.makers[node.class] {
            Maker::Image(format) => Some((format, node.params.text(0))),
            Maker::Root | Maker::Node(_) => None,
        }
    }

    /// How nodes of class number `class` are made.
    pub(crate) fn maker(&self, class: usize) -> Maker<H> {
        self.makers[class]
    }
}

/// The signatures of the modules of this crate, and those of images of `formats`.
pub fn signatures(formats: impl Iterator<Item = Format>) -> Vec<Signature> {
    let own = [
        root(),
        ram::signature(),
        fixed::zero(),
        fixed::pattern(),
        fixed::error(),
        concat::signature(),
        stripe::signature(),
        slice::signature(),
        pass::delay(),
        pass::throttle(),
    ];
    own.into_iter().chain(formats.map(image)).collect()
}

impl<H: ImageHost> Made<'_, H> {
    fn fixed(&self, answer: fixed::Answer) -> Rc<dyn Node> {
        Rc::new(fixed::Fixed::new(self.size_bytes, answer))
    }

    fn pass(self, pace: pass::Pace) -> Rc<dyn Node> {
        let lower = self.below.into_iter().next().expect("the checks gave it a node below");
        Rc::new(pass::Pass::new(self.host.clone(), pace, lower))
    }

    fn split(self, layout: impl split::Layout, role: &'static str) -> Result<Rc<dyn Node>, Errno> {
        let sectors = self.size_bytes / SECTOR_BYTES;
        let node = split::Split::new(self.host.clone(), layout, sectors, role, self.below, self.memory)?;
        Ok(Rc::new(node))
    }

    /// The limits of a throttle, which are those of its group if it is in one.
    fn limits(&mut self) -> Rc<pass::Limits> {
        let new = || Rc::new(pass::Limits::new(self.params));
        match &self.params.0[pass::GROUP] {
            Some(Value::Text(group)) => Rc::clone(self.groups.entry(group.clone()).or_insert_with(new)),
            _ => new(),
        }
    }
}

/// What a graph offers. It is the node below it.
fn root() -> Signature {
    fn size(params: &Params, below: &[Below]) -> Result<u64, String> {
        let size = below.first().map_or(0, |lower| lower.size_bytes);
        match params.optional_number(0) {
            Some(wanted) if wanted != size => {
                Err(format!("it is said to have {}, and has {}", Value::Bytes(wanted), Value::Bytes(size)))
            }
            _ => Ok(size),
        }
    }
    Signature {
        name: ROOT,
        about: "what the graph offers: a disk, for a guest or another client",
        params: vec![
            Param::new("size", Type::Bytes, "the size that it must have, if it is said")
                .optional()
                .within(SECTOR_BYTES, 1 << 62)
                .multiple_of(SECTOR_BYTES),
        ],
        ports: vec![Port {
            name: "lower",
            arity: Arity::One,
            need: Need::AsAbove,
            about: "the disk's contents",
        }],
        writable: true,
        keeps: Keeps::Passing,
        agree: None,
        size: Some(size),
    }
}

/// Images of `format`.
fn image(format: Format) -> Signature {
    let info = format.info();
    let backing = Port {
        name: BACKING,
        arity: Arity::Optional,
        need: Need::Unchanged,
        about: "what shows where nothing was written, in place of the file that the image names",
    };
    Signature {
        name: info.name,
        about: info.about,
        params: vec![Param::new("path", Type::Path, "its file")],
        ports: if info.has_backing { vec![backing] } else { vec![] },
        writable: true,
        keeps: Keeps::File(0),
        agree: None,
        size: None,
    }
}

/// The port of an image for what is below it.
const BACKING: &str = "backing";
