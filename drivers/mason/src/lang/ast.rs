//! What a text says: its statements, each with its place in the text.
//!
//! Names are not looked up here, and quantities have no type yet: that is the business of the resolver.

use std::fmt;

/// A place in a text: the number of the text among those that were read, and a range of bytes in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Span {
    /// Which text.
    pub file: u16,
    /// The first byte.
    pub from: u32,
    /// One after the last byte.
    pub to: u32,
}

impl Span {
    /// From the beginning of this place to the end of `other`, which is in the same text.
    pub fn to(self, other: Span) -> Span {
        Span { to: other.to.max(self.to), ..self }
    }
}

/// Something with its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spanned<T> {
    /// What is there.
    pub node: T,
    /// Where it is.
    pub span: Span,
}

/// A name in the text.
pub type Name = Spanned<String>;

/// The statements of one text.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct File {
    /// The version of the language that the text asks for: `mason 1;`.
    pub version: Option<Spanned<u64>>,
    /// Its statements, in order.
    pub statements: Vec<Statement>,
}

/// One statement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Statement {
    /// `import "PATH";`
    Import {
        /// The other text, relative to the folder of this one.
        path: Spanned<String>,
        /// All of it.
        span: Span,
    },
    /// `let $NAME: TYPE = VALUE;`
    Let {
        /// The name, without `$`.
        name: Name,
        /// The type, if it is said.
        ty: Option<Type>,
        /// The value.
        value: Expr,
        /// All of it.
        span: Span,
    },
    /// `class NAME(...) [...] -> [...] { ... }`
    Class(Class),
    /// `NAME :: CLASS(...);`
    Declare(Declare),
    /// `a -> b -> c;`
    Chain(Chain),
    /// `check EXPRESSION;`
    Check {
        /// What must be true.
        expr: Expr,
        /// All of it.
        span: Span,
    },
}

impl Statement {
    /// All of it.
    pub fn span(&self) -> Span {
        match self {
            Statement::Import { span, .. } | Statement::Let { span, .. } | Statement::Check { span, .. } => {
                *span
            }
            Statement::Class(class) => class.span,
            Statement::Declare(declare) => declare.span,
            Statement::Chain(chain) => chain.span,
        }
    }
}

/// A compound module: a graph with a name, parameters and ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Class {
    /// Its name.
    pub name: Name,
    /// Its parameters.
    pub formals: Vec<Formal>,
    /// The ports above it, where others use it. Exactly one is meaningful.
    pub above: Vec<PortDef>,
    /// The ports below it, to which other nodes are connected.
    pub below: Vec<PortDef>,
    /// Its statements: `let`, declarations, chains and checks.
    pub body: Vec<Statement>,
    /// All of it.
    pub span: Span,
}

/// A parameter of a class: `$NAME: TYPE = DEFAULT`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Formal {
    /// Its name, without `$`.
    pub name: Name,
    /// Its type.
    pub ty: Type,
    /// Its value if none is given.
    pub default: Option<Expr>,
}

/// A type, as it is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Type {
    /// What it is.
    pub kind: TypeKind,
    /// All of it.
    pub span: Span,
}

/// The kinds of types.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TypeKind {
    /// `Bytes`.
    Named(String),
    /// `Rate<Bytes>`.
    Of(String, Box<Type>),
    /// `one of { a, b }`.
    OneOf(Vec<Name>),
}

/// A port of a class: `NAME`, or `NAME: ACCESS`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortDef {
    /// Its name.
    pub name: Name,
    /// `ro` or `rw`, if it is said.
    pub access: Option<Name>,
}

/// `MODIFIER ... NAME, ... :: CLASS(...);`
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Declare {
    /// Its modifiers.
    pub modifiers: Vec<Spanned<Modifier>>,
    /// The names, at least one: a node each.
    pub names: Vec<Name>,
    /// What they are.
    pub ctor: Ctor,
    /// All of it.
    pub span: Span,
}

/// What is said of a node before its name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Modifier {
    /// Several nodes may use it.
    Shared,
    /// Nobody writes to it.
    Readonly,
    /// Its contents may be lost.
    Volatile,
}

impl Modifier {
    /// All of them.
    pub const ALL: [Modifier; 3] = [Modifier::Shared, Modifier::Readonly, Modifier::Volatile];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Modifier::Shared => "shared",
            Modifier::Readonly => "readonly",
            Modifier::Volatile => "volatile",
        }
    }
}

/// `CLASS(ARGUMENT, ...)`
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ctor {
    /// The class.
    pub class: Name,
    /// Its arguments.
    pub args: Vec<Arg>,
    /// All of it.
    pub span: Span,
}

/// An argument: `VALUE`, or `NAME = VALUE`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Arg {
    /// Its name, if it is given by name.
    pub name: Option<Name>,
    /// Its value.
    pub value: Expr,
}

/// `HOP -> HOP -> HOP => LEG, LEG;`
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    /// At least one; at least two without legs.
    pub hops: Vec<Hop>,
    /// The nodes below the last one, in order; often none.
    pub fan: Vec<Leg>,
    /// All of it.
    pub span: Span,
}

/// One of several nodes below another: `HOP`, or `KEY: HOP`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leg {
    /// Its key, if it has one.
    pub key: Option<Name>,
    /// The node.
    pub hop: Hop,
}

/// A node of a chain with its ports: `[above] node [below]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hop {
    /// The port of the node that the one before uses.
    pub above: Option<PortRef>,
    /// The node.
    pub node: NodeRef,
    /// The port of the node to which the next one is connected.
    pub below: Option<PortRef>,
    /// All of it.
    pub span: Span,
}

/// `[NAME]`, or `[NAME.KEY]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortRef {
    /// The port.
    pub name: Name,
    /// Which of its legs.
    pub key: Option<Name>,
    /// All of it.
    pub span: Span,
}

/// A node in a chain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeRef {
    /// One that is declared elsewhere: `NAME`, or `NAME/NAME`.
    Named(QName),
    /// One that is declared here: `NAME :: CLASS(...)`, or without a name.
    New {
        /// Its modifiers.
        modifiers: Vec<Spanned<Modifier>>,
        /// Its name.
        name: Option<Name>,
        /// What it is.
        ctor: Ctor,
    },
}

/// A name with the names of the modules that it is in: `a/b/c`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QName {
    /// Its parts, at least one.
    pub parts: Vec<Name>,
    /// All of it.
    pub span: Span,
}

impl fmt::Display for QName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, part) in self.parts.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { "" } else { "/" }, part.node)?;
        }
        Ok(())
    }
}

/// An expression.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expr {
    /// What it is.
    pub kind: ExprKind,
    /// All of it.
    pub span: Span,
}

/// The kinds of expressions. Parentheses are not kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExprKind {
    /// `2.5 MiB/s`.
    Quantity(Quantity),
    /// `$NAME`, without `$`.
    Param(String),
    /// `"TEXT"`, without quotes and with its escapes resolved.
    Text(String),
    /// A word, or the name of a node.
    Name(QName),
    /// `NAME(...)`.
    Call(Name, Vec<Arg>),
    /// `[a, b]`.
    List(Vec<Expr>),
    /// `a .. b`.
    Range(Box<Expr>, Box<Expr>),
    /// `not a`.
    Not(Box<Expr>),
    /// `a + b`.
    Binary(Spanned<BinaryOp>, Box<Expr>, Box<Expr>),
}

/// Operators between two expressions, the weakest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BinaryOp {
    /// `implies`; to the right.
    Implies,
    /// `or`.
    Or,
    /// `and`.
    And,
    /// `==`.
    Equal,
    /// `!=`.
    NotEqual,
    /// `<=`.
    AtMost,
    /// `>=`.
    AtLeast,
    /// `<`.
    Less,
    /// `>`.
    Greater,
    /// `+`.
    Add,
    /// `-`.
    Subtract,
    /// `*`.
    Multiply,
}

/// A number and its unit: `digits / 10^decimals UNIT / PER`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quantity {
    /// All its digits, without the point.
    pub digits: u64,
    /// How many of them are after the point.
    pub decimals: u32,
    /// Its unit, if it has one.
    pub unit: Option<Spanned<Unit>>,
    /// The unit after `/`, if it is a rate.
    pub per: Option<Spanned<Unit>>,
}

/// A unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// So many bytes: `B`, `kB`, `KiB`, `sectors`, ...
    Bytes(u64),
    /// So many nanoseconds: `ns`, `us`, `ms`, `s`, `min`, `h`.
    Nanoseconds(u64),
    /// Requests: `io`.
    Requests,
    /// `%`.
    Percent,
}

/// The units and their names.
pub const UNITS: [(&str, Unit); 19] = [
    ("B", Unit::Bytes(1)),
    ("kB", Unit::Bytes(1_000)),
    ("MB", Unit::Bytes(1_000_000)),
    ("GB", Unit::Bytes(1_000_000_000)),
    ("TB", Unit::Bytes(1_000_000_000_000)),
    ("KiB", Unit::Bytes(1 << 10)),
    ("MiB", Unit::Bytes(1 << 20)),
    ("GiB", Unit::Bytes(1 << 30)),
    ("TiB", Unit::Bytes(1 << 40)),
    ("sectors", Unit::Bytes(512)),
    ("io", Unit::Requests),
    ("ns", Unit::Nanoseconds(1)),
    ("us", Unit::Nanoseconds(1_000)),
    ("ms", Unit::Nanoseconds(1_000_000)),
    ("s", Unit::Nanoseconds(1_000_000_000)),
    ("min", Unit::Nanoseconds(60_000_000_000)),
    ("h", Unit::Nanoseconds(3_600_000_000_000)),
    ("%", Unit::Percent),
    ("sector", Unit::Bytes(512)),
];
