//! Signatures: everything that the checks of a graph, and whoever builds it, know of a class.
//!
//! ```text
//!          above: one port, a disk
//!        ┌────────┐
//!        │  class │  parameters
//!        └────────┘
//!          below: ports by name; one node each, or several in order
//! ```
//!
//! A class is a row of data. No check knows a class by its name.

use super::value::{Type, Value};

/// A class of nodes.
pub struct Signature {
    /// Its name.
    pub name: &'static str,
    /// What it is for, in a line without a full stop.
    pub about: &'static str,
    /// Its parameters. Arguments without a name take their places in order.
    pub params: Vec<Param>,
    /// The ports below it, the one first that a chain means if it names none.
    pub ports: Vec<Port>,
    /// Whether the node can be written to, provided that what is below can.
    pub writable: bool,
    /// What it keeps that a node of the same class and parameters would not have.
    pub keeps: Keeps,
    /// Nodes that have the same value for this parameter share something: all of their parameters are the same.
    pub agree: Option<usize>,
    /// The size of its disk in bytes, from its parameters and the sizes of the nodes below it; `None`: only opening it
    /// tells.
    pub size: Option<SizeRule>,
}

/// Computes the size of a disk in bytes.
///
/// # Errors
/// Why there can be no such disk, as a sentence about the node.
pub type SizeRule = fn(&Params, &[Below]) -> Result<u64, String>;

/// A node below another, as rules see it.
pub struct Below {
    /// The port that it is connected to, by its number in the signature.
    pub port: usize,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// What a node keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keeps {
    /// Nothing. It may have no name of its own.
    Nothing,
    /// Something that is lost without harm: what it counted, when it last let something through.
    Passing,
    /// The contents of a disk, in memory: they end with the process.
    Memory,
    /// The contents of a disk, in the file of this parameter.
    File(usize),
}

/// A parameter.
pub struct Param {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// What it means if it is not given.
    pub default: Default,
    /// The least and the largest number that it may be, in its base unit.
    pub range: (u64, u64),
    /// It must be a multiple of this, in its base unit.
    pub multiple: u64,
    /// What it is for, in a line without a full stop.
    pub about: &'static str,
}

/// What a parameter means that is not given.
pub enum Default {
    /// It must be given.
    None,
    /// It may be left out, which means something else than any value.
    Absent,
    /// The same as this.
    Value(Value),
}

impl Param {
    /// A parameter that must be given.
    pub fn new(name: &'static str, ty: Type, about: &'static str) -> Self {
        Self { name, ty, default: Default::None, range: (0, u64::MAX), multiple: 1, about }
    }
    /// Whether `value` is what leaving it out means.
    pub fn is_default(&self, value: &Value) -> bool {
        matches!(&self.default, Default::Value(default) if default == value)
    }
    /// The same, and it may be left out.
    pub fn optional(self) -> Self {
        Self { default: Default::Absent, ..self }
    }
    /// The same, and it is `value` if it is left out.
    pub fn or(self, value: Value) -> Self {
        Self { default: Default::Value(value), ..self }
    }
    /// The same, between `least` and `most`.
    pub fn within(self, least: u64, most: u64) -> Self {
        Self { range: (least, most), ..self }
    }
    /// The same, and a multiple of `n`.
    pub fn multiple_of(self, n: u64) -> Self {
        Self { multiple: n, ..self }
    }
}

/// A port below a class.
pub struct Port {
    /// Its name.
    pub name: &'static str,
    /// How many nodes are connected to it.
    pub arity: Arity,
    /// What it does to them.
    pub need: Need,
    /// What it is for, in a line without a full stop.
    pub about: &'static str,
}

/// How many nodes are connected to a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arity {
    /// One.
    One,
    /// One, or none.
    Optional,
    /// At least so many, in order.
    Ordered(usize),
}

/// What a node does to one below it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// It writes to it if it is written to itself.
    AsAbove,
    /// It only reads, and nobody may change it meanwhile.
    Unchanged,
}

/// The parameters of a node, by their numbers in the signature.
#[derive(Clone, PartialEq, Eq, Debug, std::default::Default)]
pub struct Params(pub Vec<Option<Value>>);

impl Params {
    /// The number of parameter `i`, in its base unit.
    ///
    /// # Panics
    /// If it has no such parameter, or that is no number: the checks give every class what its signature says.
    pub fn number(&self, i: usize) -> u64 {
        self.optional_number(i).expect("the checks gave it a number")
    }
    /// The number of parameter `i`, if it was given.
    pub fn optional_number(&self, i: usize) -> Option<u64> {
        self.0.get(i)?.as_ref()?.number()
    }
    /// The text, path or word of parameter `i`.
    ///
    /// # Panics
    /// If it has none.
    pub fn text(&self, i: usize) -> &str {
        match self.0.get(i).and_then(Option::as_ref) {
            Some(Value::Text(text) | Value::Path(text) | Value::Word(text)) => text,
            other => panic!("the checks gave it {other:?} instead of text"),
        }
    }
    /// The range of parameter `i`, in bytes.
    ///
    /// # Panics
    /// If it has none.
    pub fn range(&self, i: usize) -> (u64, u64) {
        match self.0.get(i).and_then(Option::as_ref) {
            Some(Value::ByteRange(from, to)) => (*from, *to),
            other => panic!("the checks gave it {other:?} instead of a range"),
        }
    }
}

/// The classes that a graph may have.
#[derive(std::default::Default)]
pub struct Classes(pub Vec<Signature>);

impl Classes {
    /// The class called `name`.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|class| class.name == name)
    }
}

/// The class of what a graph offers: the disks of the text.
pub const ROOT: &str = "disk";
