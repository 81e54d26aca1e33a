//! Values and their types: quantities with units, words, texts, paths.
//!
//! A number says its unit, and only the unit makes it bytes or time: `16` where bytes are expected is a mistake, not 16
//! bytes. Everything is an integer in the base unit; a quantity that is none (`0.3 B`) is refused, as is one that does
//! not fit.

use crate::lang::ast::{self, Quantity, TypeKind, Unit};
use std::fmt;

/// The type of a parameter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Type {
    /// A number of bytes.
    Bytes,
    /// A time, in nanoseconds.
    Duration,
    /// A number without a unit.
    Count,
    /// Bytes per second.
    ByteRate,
    /// Requests per second.
    RequestRate,
    /// A part of the whole, in millionths.
    Ratio,
    /// `true` or `false`.
    Bool,
    /// Text.
    Text,
    /// The path of a file, relative to the folder of the text that has it.
    Path,
    /// A range of bytes.
    ByteRange,
    /// One of a few words.
    OneOf(Vec<String>),
}

/// A value.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Value {
    /// Bytes.
    Bytes(u64),
    /// Nanoseconds.
    Duration(u64),
    /// A number.
    Count(u64),
    /// Bytes per second.
    ByteRate(u64),
    /// Requests per second.
    RequestRate(u64),
    /// Millionths.
    Ratio(u64),
    /// Truth.
    Bool(bool),
    /// Text.
    Text(String),
    /// A path.
    Path(String),
    /// From the first byte to the one after the last.
    ByteRange(u64, u64),
    /// A word.
    Word(String),
}

/// The types that have a name of their own.
const NAMED: [(&str, Type); 8] = [
    ("Bytes", Type::Bytes),
    ("Duration", Type::Duration),
    ("Count", Type::Count),
    ("Ratio", Type::Ratio),
    ("Bool", Type::Bool),
    ("Text", Type::Text),
    ("Path", Type::Path),
    ("Seed", Type::Count),
];

impl Type {
    /// The type that `written` means.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(written: &ast::Type) -> Result<Type, String> {
        match &written.kind {
            TypeKind::Named(name) => {
                let found = NAMED.iter().find(|(known, _)| known == name);
                let known: Vec<&str> = NAMED.iter().map(|(name, _)| *name).collect();
                found.map(|(_, ty)| ty.clone()).ok_or_else(|| {
                    format!("there is no type {name}; the types are {}, Rate<Bytes>, Rate<Count>, Range<Bytes> and one of {{...}}", known.join(", "))
                })
            }
            TypeKind::Of(outer, inner) => match (outer.as_str(), Type::of(inner)?) {
                ("Rate", Type::Bytes) => Ok(Type::ByteRate),
                ("Rate", Type::Count) => Ok(Type::RequestRate),
                ("Range", Type::Bytes) => Ok(Type::ByteRange),
                (outer, inner) => Err(format!(
                    "there is no type {outer}<{inner}>; there are Rate<Bytes>, Rate<Count> and Range<Bytes>"
                )),
            },
            TypeKind::OneOf(words) => Ok(Type::OneOf(words.iter().map(|word| word.node.clone()).collect())),
        }
    }

    /// What a value of this type looks like, for advice.
    pub fn example(&self) -> String {
        match self {
            Type::Bytes => "64 KiB".into(),
            Type::Duration => "10 ms".into(),
            Type::Count => "3".into(),
            Type::ByteRate => "40 MiB/s".into(),
            Type::RequestRate => "500 io/s".into(),
            Type::Ratio => "0.1 %".into(),
            Type::Bool => "true".into(),
            Type::Text => "\"text\"".into(),
            Type::Path => "\"disk.img\"".into(),
            Type::ByteRange => "64 MiB .. 128 MiB".into(),
            Type::OneOf(words) => words.first().cloned().unwrap_or_default(),
        }
    }

    /// Whether `value` has this type.
    pub fn has(&self, value: &Value) -> bool {
        match (self, value) {
            (Type::OneOf(words), Value::Word(word)) => words.contains(word),
            _ => *self == value.ty(),
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Bytes => "Bytes",
            Type::Duration => "Duration",
            Type::Count => "Count",
            Type::ByteRate => "Rate<Bytes>",
            Type::RequestRate => "Rate<Count>",
            Type::Ratio => "Ratio",
            Type::Bool => "Bool",
            Type::Text => "Text",
            Type::Path => "Path",
            Type::ByteRange => "Range<Bytes>",
            Type::OneOf(words) => return write!(f, "one of {{ {} }}", words.join(", ")),
        })
    }
}

impl Value {
    /// Its type.
    pub fn ty(&self) -> Type {
        match self {
            Value::Bytes(_) => Type::Bytes,
            Value::Duration(_) => Type::Duration,
            Value::Count(_) => Type::Count,
            Value::ByteRate(_) => Type::ByteRate,
            Value::RequestRate(_) => Type::RequestRate,
            Value::Ratio(_) => Type::Ratio,
            Value::Bool(_) => Type::Bool,
            Value::Text(_) => Type::Text,
            Value::Path(_) => Type::Path,
            Value::ByteRange(..) => Type::ByteRange,
            Value::Word(word) => Type::OneOf(vec![word.clone()]),
        }
    }

    /// The value of `quantity`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(quantity: &Quantity) -> Result<Value, String> {
        let times = |factor: u64| -> Result<u64, String> {
            let whole = u128::from(quantity.digits) * u128::from(factor);
            let parts = 10u128.checked_pow(quantity.decimals).ok_or("it has too many digits")?;
            match (whole % parts, u64::try_from(whole / parts)) {
                (0, Ok(value)) => Ok(value),
                (0, Err(_)) => Err("it is larger than this program can count".into()),
                _ => Err("it is not a whole number of the smallest unit".into()),
            }
        };
        const SECOND: Unit = Unit::Nanoseconds(1_000_000_000);
        match (quantity.unit.as_ref().map(|u| u.node), quantity.per.as_ref().map(|u| u.node)) {
            (None, None) => Ok(Value::Count(times(1)?)),
            (Some(Unit::Bytes(n)), None) => Ok(Value::Bytes(times(n)?)),
            (Some(Unit::Nanoseconds(n)), None) => Ok(Value::Duration(times(n)?)),
            (Some(Unit::Percent), None) => Ok(Value::Ratio(times(10_000)?)),
            (Some(Unit::Bytes(n)), Some(SECOND)) => Ok(Value::ByteRate(times(n)?)),
            (Some(Unit::Requests), Some(SECOND)) => Ok(Value::RequestRate(times(1)?)),
            (Some(Unit::Requests), None) => {
                Err("a number of requests has no unit; `io` is for rates: `io/s`".into())
            }
            (_, Some(_)) => Err("rates are per second: bytes or `io`, then `/s`".into()),
        }
    }

    /// `self + other`, `self - other` or `self * other`.
    ///
    /// # Errors
    /// What is wrong with that.
    pub fn combine(op: ast::BinaryOp, a: &Value, b: &Value) -> Result<Value, String> {
        use ast::BinaryOp::{Add, Multiply, Subtract};
        let (x, y) = match (a.number(), b.number()) {
            (Some(x), Some(y)) => (x, y),
            _ => return Err(format!("{} and {} are not numbers", a.ty(), b.ty())),
        };
        let (ty, result) = match op {
            Add | Subtract if a.ty() != b.ty() => {
                return Err(format!("{} and {} are of different types", a.ty(), b.ty()));
            }
            Add => (a, x.checked_add(y)),
            Subtract => (a, x.checked_sub(y)),
            Multiply => match (a, b) {
                (Value::Count(_), _) => (b, x.checked_mul(y)),
                (_, Value::Count(_)) => (a, x.checked_mul(y)),
                _ => return Err(format!("one of {} and {} must be a number without a unit", a.ty(), b.ty())),
            },
            _ => return Err("this is no arithmetic".into()),
        };
        let result = result.ok_or(match op {
            Subtract => "the result is below zero",
            _ => "the result is larger than this program can count",
        })?;
        Ok(match ty {
            Value::Bytes(_) => Value::Bytes(result),
            Value::Duration(_) => Value::Duration(result),
            Value::ByteRate(_) => Value::ByteRate(result),
            Value::RequestRate(_) => Value::RequestRate(result),
            Value::Ratio(_) => Value::Ratio(result),
            _ => Value::Count(result),
        })
    }

    /// The number in its base unit, if it is one.
    pub fn number(&self) -> Option<u64> {
        match self {
            Value::Bytes(n)
            | Value::Duration(n)
            | Value::Count(n)
            | Value::ByteRate(n)
            | Value::RequestRate(n)
            | Value::Ratio(n) => Some(*n),
            _ => None,
        }
    }
}

/// Writes `n` with the largest of the units that divides it.
fn with_unit(f: &mut fmt::Formatter<'_>, n: u64, units: &[(u64, &str)], after: &str) -> fmt::Result {
    let fits = units.iter().find(|(factor, _)| n > 0 && n.is_multiple_of(*factor));
    let (factor, unit) = fits.or(units.last()).copied().unwrap_or((1, ""));
    write!(f, "{} {unit}{after}", n / factor)
}

const BYTES: [(u64, &str); 5] =
    [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")];
const TIMES: [(u64, &str); 4] = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"), (1, "ns")];

/// As the language has it, in canonical form.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bytes(n) => with_unit(f, *n, &BYTES, ""),
            Value::Duration(n) => with_unit(f, *n, &TIMES, ""),
            Value::Count(n) => write!(f, "{n}"),
            Value::ByteRate(n) => with_unit(f, *n, &BYTES, "/s"),
            Value::RequestRate(n) => write!(f, "{n} io/s"),
            Value::Ratio(n) => match (n / 10_000, n % 10_000) {
                (whole, 0) => write!(f, "{whole} %"),
                (whole, part) => write!(f, "{whole}.{} %", format!("{part:04}").trim_end_matches('0')),
            },
            Value::Bool(b) => write!(f, "{b}"),
            Value::Text(text) | Value::Path(text) => {
                f.write_str("\"")?;
                for c in text.chars() {
                    match c {
                        '"' => f.write_str("\\\"")?,
                        '\\' => f.write_str("\\\\")?,
                        '\n' => f.write_str("\\n")?,
                        '\t' => f.write_str("\\t")?,
                        c => write!(f, "{c}")?,
                    }
                }
                f.write_str("\"")
            }
            Value::ByteRange(from, to) => write!(f, "{} .. {}", Value::Bytes(*from), Value::Bytes(*to)),
            Value::Word(word) => f.write_str(word),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lang::ast::{BinaryOp, Span, Spanned};

    fn quantity(digits: u64, decimals: u32, unit: Option<Unit>, per: Option<Unit>) -> Quantity {
        let at = |node| Spanned { node, span: Span::default() };
        Quantity { digits, decimals, unit: unit.map(at), per: per.map(at) }
    }

    #[test]
    fn quantities_are_whole_numbers_of_the_base_unit() {
        let second = Some(Unit::Nanoseconds(1_000_000_000));
        for (quantity, value) in [
            (quantity(25, 1, Some(Unit::Bytes(1 << 20)), None), Ok(Value::Bytes(2_621_440))),
            (quantity(1, 1, Some(Unit::Percent), None), Ok(Value::Ratio(1_000))),
            (quantity(40, 0, Some(Unit::Bytes(1 << 20)), second), Ok(Value::ByteRate(40 << 20))),
            (quantity(500, 0, Some(Unit::Requests), second), Ok(Value::RequestRate(500))),
            (quantity(3, 1, Some(Unit::Bytes(1)), None), Err("not a whole number")),
            (quantity(u64::MAX, 0, Some(Unit::Bytes(2)), None), Err("larger")),
            (quantity(1, 99, None, None), Err("too many digits")),
            (quantity(5, 0, Some(Unit::Requests), None), Err("`io/s`")),
            (quantity(5, 0, Some(Unit::Bytes(1)), Some(Unit::Nanoseconds(1))), Err("per second")),
        ] {
            match (Value::of(&quantity), value) {
                (Ok(found), Ok(value)) => assert_eq!(found, value),
                (Err(why), Err(part)) => assert!(why.contains(part), "{why}"),
                (found, value) => panic!("{found:?} instead of {value:?}"),
            }
        }
    }

    #[test]
    fn arithmetic_keeps_types_and_never_wraps() {
        use BinaryOp::{Add, Multiply, Subtract};
        let (small, large) = (Value::Bytes(1), Value::Bytes(u64::MAX));
        assert_eq!(Value::combine(Multiply, &Value::Count(2), &Value::Bytes(8)), Ok(Value::Bytes(16)));
        assert!(Value::combine(Add, &small, &large).unwrap_err().contains("larger"));
        assert!(Value::combine(Subtract, &small, &large).unwrap_err().contains("below zero"));
        assert!(Value::combine(Add, &small, &Value::Duration(1)).unwrap_err().contains("different types"));
        assert!(Value::combine(Multiply, &small, &small).unwrap_err().contains("without a unit"));
        assert!(Value::combine(Add, &Value::Bool(true), &small).unwrap_err().contains("not numbers"));
    }

    #[test]
    fn values_are_printed_in_their_largest_whole_unit() {
        for (value, text) in [
            (Value::Bytes(0), "0 B"),
            (Value::Bytes(1536), "1536 B"),
            (Value::Bytes(3 << 20), "3 MiB"),
            (Value::Duration(1_500_000), "1500 us"),
            (Value::ByteRate(1 << 30), "1 GiB/s"),
            (Value::Ratio(1_000), "0.1 %"),
            (Value::Ratio(250_000), "25 %"),
            (Value::ByteRange(0, 512), "0 B .. 512 B"),
            (Value::Text("a\"b\\".into()), "\"a\\\"b\\\\\""),
        ] {
            assert_eq!(value.to_string(), text);
        }
    }
}
