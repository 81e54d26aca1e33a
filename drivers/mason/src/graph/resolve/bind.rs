//! Arguments: which parameter each is for, and whether it fits.

use super::{Resolver, Scope, unknown};
use crate::graph::signature::{Default, Param, Signature};
use crate::graph::value::{Type, Value};
use crate::lang::ast::{Arg, Class, Ctor};
use crate::lang::{Diagnostic, Span};

/// One parameter, of a class of this program or of a text.
struct Wanted<'a> {
    name: &'a str,
    ty: Type,
    /// It must be given.
    required: bool,
}

impl<'a> Resolver<'a> {
    /// The values of the parameters of `signature`; `None` after a mistake.
    pub(super) fn arguments(
        &mut self,
        signature: &Signature,
        ctor: &'a Ctor,
        scope: &Scope,
    ) -> Option<Vec<Option<Value>>> {
        let required = |param: &Param| matches!(param.default, Default::None);
        let wanted = signature.params.iter().map(|param| Wanted {
            name: param.name,
            ty: param.ty.clone(),
            required: required(param),
        });
        let given = self.bind(&wanted.collect::<Vec<_>>(), ctor, scope)?;
        let mut values = Vec::new();
        let mut good = true;
        for (param, given) in signature.params.iter().zip(given) {
            match given {
                Some((value, span)) => {
                    good &= self.fits(param, &value, span);
                    values.push(Some(value));
                }
                None => values.push(match &param.default {
                    Default::Value(value) => Some(value.clone()),
                    Default::None | Default::Absent => None,
                }),
            }
        }
        good.then_some(values)
    }

    fn fits(&mut self, param: &Param, value: &Value, span: Span) -> bool {
        let name = param.name;
        let as_value = |number: u64| match value {
            Value::Bytes(_) => Value::Bytes(number),
            Value::Duration(_) => Value::Duration(number),
            Value::ByteRate(_) => Value::ByteRate(number),
            Value::RequestRate(_) => Value::RequestRate(number),
            Value::Ratio(_) => Value::Ratio(number),
            _ => Value::Count(number),
        };
        let ends = match value {
            Value::ByteRange(from, to) => vec![*from, *to],
            other => other.number().into_iter().collect(),
        };
        let (least, most) = param.range;
        for number in ends {
            let shown = as_value(number);
            if number < least || number > most {
                let limit = match number < least {
                    true => format!("at least {}", as_value(least)),
                    false => format!("at most {}", as_value(most)),
                };
                let title = format!("`{name}` must be {limit}");
                self.say(Diagnostic::error("M2007", title, span, format!("this is {shown}")));
                return false;
            }
            if !number.is_multiple_of(param.multiple) {
                let title = format!("`{name}` must be a multiple of {}", as_value(param.multiple));
                self.say(Diagnostic::error("M2007", title, span, format!("this is {shown}")));
                return false;
            }
        }
        true
    }

    /// Gives a module its parameters; `false` after a mistake.
    pub(super) fn formals(
        &mut self,
        class: &'a Class,
        ctor: &'a Ctor,
        scope: &Scope,
        inner: &mut Scope,
    ) -> bool {
        let mut wanted = Vec::new();
        for formal in &class.formals {
            match Type::of(&formal.ty) {
                Ok(ty) => {
                    wanted.push(Wanted { name: &formal.name.node, ty, required: formal.default.is_none() });
                }
                Err(why) => {
                    self.say(Diagnostic::error("M2007", why, formal.ty.span, "this type"));
                    return false;
                }
            }
        }
        let Some(given) = self.bind(&wanted, ctor, scope) else { return false };
        for ((formal, wanted), given) in class.formals.iter().zip(&wanted).zip(given) {
            let value = match (given, &formal.default) {
                (Some((value, _)), _) => Some(value),
                (None, Some(default)) => self.evaluate(default, Some(&wanted.ty), inner),
                (None, None) => None,
            };
            let Some(value) = value else { return false };
            inner.params.insert(formal.name.node.clone(), value);
            inner.spans.insert(format!("${}", formal.name.node), formal.name.span);
        }
        true
    }

    /// The values that `ctor` gives, in the order of `wanted`; `None` after a mistake.
    fn bind(
        &mut self,
        wanted: &[Wanted<'_>],
        ctor: &'a Ctor,
        scope: &Scope,
    ) -> Option<Vec<Option<(Value, Span)>>> {
        let mut values: Vec<Option<(Value, Span)>> = vec![None; wanted.len()];
        let mut good = true;
        let mut at = 0;
        for arg in &ctor.args {
            match self.place(wanted, arg, at, ctor) {
                Some(place) if values[place].is_some() => {
                    let title = format!("`{}` is given twice", wanted[place].name);
                    let first = values[place].as_ref().map_or(arg.value.span, |(_, span)| *span);
                    let message = Diagnostic::error("M2004", title, arg.value.span, "the second time");
                    self.say(message.label(first, "the first time"));
                    good = false;
                }
                Some(place) => match self.evaluate(&arg.value, Some(&wanted[place].ty), scope) {
                    Some(value) => values[place] = Some((value, arg.value.span)),
                    None => return None,
                },
                None => good = false,
            }
            at += usize::from(arg.name.is_none());
        }
        for (wanted, _) in
            wanted.iter().zip(&values).filter(|(wanted, value)| wanted.required && value.is_none())
        {
            let title = format!("`{}` needs `{}`", ctor.class.node, wanted.name);
            let message = Diagnostic::error("M2005", title, ctor.span, "not given here");
            self.say(message.help(format!("write `{} = {}`", wanted.name, wanted.ty.example())));
            good = false;
        }
        good.then_some(values)
    }

    /// Which parameter `arg` is for, which is number `at` of those without a name.
    fn place(&mut self, wanted: &[Wanted<'_>], arg: &Arg, at: usize, ctor: &Ctor) -> Option<usize> {
        match &arg.name {
            Some(name) => {
                let found = wanted.iter().position(|wanted| wanted.name == name.node);
                if found.is_none() {
                    let kind = format!("parameter of `{}` called", ctor.class.node);
                    let message = unknown("M2004", &kind, name, wanted.iter().map(|wanted| wanted.name));
                    self.say(message);
                }
                found
            }
            None if at < wanted.len() => Some(at),
            None => {
                let title = match wanted.len() {
                    0 => format!("`{}` has no parameters", ctor.class.node),
                    1 => format!("`{}` has one parameter", ctor.class.node),
                    n => format!("`{}` has {n} parameters", ctor.class.node),
                };
                self.say(Diagnostic::error("M2004", title, arg.value.span, "one too many"));
                None
            }
        }
    }
}
