//! Reads text of OpenMetrics 1.0, strictly: what the format forbids, or only discourages, is an error.

use std::collections::BTreeMap;

/// A number of seconds or a count, in billionths.
const ONE: u128 = 1_000_000_000;

type Labels = BTreeMap<String, String>;

/// A metric family: its type, and its samples in order.
#[derive(Debug)]
struct Family {
    kind: String,
    samples: Vec<Sample>,
}

#[derive(Debug)]
struct Sample {
    name: String,
    labels: Labels,
    /// In billionths.
    value: u128,
}

/// The families of a text, by name.
#[derive(Debug)]
pub(super) struct Metrics(BTreeMap<String, Family>);

impl Metrics {
    /// What `text` says, or what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let lines = text.strip_suffix("# EOF").ok_or("it does not end with # EOF")?;
        let mut all: BTreeMap<String, Family> = BTreeMap::new();
        let mut name = String::new();
        let mut described: Vec<String> = Vec::new();
        for line in lines.lines() {
            let wrong = |why: &str| format!("{why}: {line}");
            if let Some(rest) = line.strip_prefix("# ") {
                let mut words = rest.splitn(3, ' ');
                let (what, of, value) = (words.next(), words.next(), words.next());
                let (Some(what), Some(of), Some(value)) = (what, of, value) else {
                    return Err(wrong("a comment"));
                };
                if of != name {
                    of.clone_into(&mut name);
                    described.clear();
                    let family = Family { kind: "unknown".into(), samples: Vec::new() };
                    if !is_name(of) || all.insert(of.to_owned(), family).is_some() {
                        return Err(wrong("a family that is there already, or no name"));
                    }
                }
                let family = all.get_mut(of).ok_or_else(|| wrong("no family"))?;
                if described.iter().any(|one| one == what) || !family.samples.is_empty() {
                    return Err(wrong("described twice, or too late"));
                }
                described.push(what.to_owned());
                match what {
                    "TYPE" => value.clone_into(&mut family.kind),
                    "UNIT" if of.strip_suffix(value).is_some_and(|rest| rest.ends_with('_')) => {}
                    "HELP" if !value.is_empty() => {}
                    _ => return Err(wrong("no description")),
                }
                continue;
            }
            let sample = Sample::parse(line).ok_or_else(|| wrong("no sample"))?;
            let family = all.get_mut(&name).ok_or_else(|| wrong("of no family"))?;
            let suffix = sample.name.strip_prefix(&*name).ok_or_else(|| wrong("of another family"))?;
            let allowed: &[&str] = match &*family.kind {
                "counter" => &["_total"],
                "gauge" | "stateset" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_count", "_sum"],
                _ => &[],
            };
            if !allowed.contains(&suffix) {
                return Err(wrong("a name that its type does not have"));
            }
            let same = |other: &Sample| other.name == sample.name && other.labels == sample.labels;
            if family.samples.iter().any(same) {
                return Err(wrong("a sample that is there already"));
            }
            family.samples.push(sample);
        }
        all.iter()
            .try_for_each(|(name, family)| family.check(name).map_err(|why| format!("{name}: {why}")))?;
        Ok(Self(all))
    }

    /// The value of a sample that is a whole number.
    pub(super) fn number(&self, family: &str, suffix: &str, labels: &[(&str, &str)]) -> Option<u64> {
        let labels: Labels = labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let name = format!("{family}{suffix}");
        let samples = &self.0.get(family)?.samples;
        let value = samples.iter().find(|sample| sample.name == name && sample.labels == labels)?.value;
        u64::try_from(value / ONE).ok().filter(|_| value.is_multiple_of(ONE))
    }
}

impl Family {
    fn check(&self, name: &str) -> Result<(), String> {
        match &*self.kind {
            "counter" | "gauge" => Ok(()),
            "info" if self.samples.iter().all(|sample| sample.value == ONE) => Ok(()),
            "stateset" => self.check_states(name),
            "histogram" => self.check_buckets(name),
            other => Err(format!("the type {other}, or a wrong value")),
        }
    }

    /// Each of them is in one state.
    fn check_states(&self, name: &str) -> Result<(), String> {
        let mut on: BTreeMap<Labels, u128> = BTreeMap::new();
        for sample in &self.samples {
            let mut labels = sample.labels.clone();
            if labels.remove(name).is_none() || sample.value > ONE {
                return Err(format!("no state: {sample:?}"));
            }
            *on.entry(labels).or_default() += sample.value;
        }
        if on.values().all(|sum| *sum == ONE) { Ok(()) } else { Err("not in one state".into()) }
    }

    /// Buckets of one histogram follow one another with ascending bounds; each has all that the one before has.
    fn check_buckets(&self, name: &str) -> Result<(), String> {
        let mut samples = self.samples.iter().peekable();
        while let Some(first) = samples.peek() {
            let mut own = first.labels.clone();
            own.remove("le");
            let of = |sample: &Sample, suffix: &str| {
                let mut labels = sample.labels.clone();
                let le = labels.remove("le");
                (sample.name == format!("{name}{suffix}") && labels == own).then_some((le, sample.value))
            };
            let (mut before, mut count) = (None, 0);
            while let Some((le, value)) = samples.peek().and_then(|sample| of(sample, "_bucket")) {
                let le = le.ok_or("a bucket without bound")?;
                let bound = if le == "+Inf" { Some(u128::MAX) } else { decimal(&le) };
                if bound.is_none() || bound <= before || value < count {
                    return Err(format!("not in order or not summed: {:?}", samples.peek()));
                }
                (before, count) = (bound, value);
                samples.next();
            }
            let counted = samples.next().and_then(|sample| of(sample, "_count"));
            let summed = samples.next().and_then(|sample| of(sample, "_sum"));
            if before != Some(u128::MAX)
                || counted != Some((None, count))
                || !matches!(summed, Some((None, _)))
            {
                return Err(format!("buckets, count and sum do not fit: {own:?}"));
            }
        }
        Ok(())
    }
}

impl Sample {
    fn parse(line: &str) -> Option<Self> {
        let (name, rest) = line.split_at(line.find(['{', ' '])?);
        let (mut labels, mut rest) = (Labels::new(), rest.strip_prefix('{').unwrap_or(rest));
        while !rest.starts_with(' ') {
            let (label, value) = rest.split_once("=\"")?;
            let (value, after) = quoted(value)?;
            if !is_name(label) || label.contains(':') || labels.insert(label.to_owned(), value).is_some() {
                return None;
            }
            rest = after
                .strip_prefix('}')
                .or_else(|| after.strip_prefix(',').filter(|more| !more.starts_with('}')))?;
        }
        let value = decimal(&rest[1..])?;
        is_name(name).then(|| Self { name: name.to_owned(), labels, value })
    }
}

/// A text up to its closing quotation mark, and what follows that.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut all = text.char_indices();
    while let Some((at, c)) = all.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match all.next()?.1 {
                'n' => '\n',
                c @ ('\\' | '"') => c,
                _ => return None,
            }),
            c => value.push(c),
        }
    }
    None
}

fn is_name(name: &str) -> bool {
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    first && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
}

/// A number that is not negative, with at most nine digits behind its point, in billionths.
fn decimal(text: &str) -> Option<u128> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 9 {
        return None;
    }
    Some(whole.parse::<u128>().ok()? * ONE + format!("{part:0<9}").parse::<u128>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "# TYPE a counter\n# HELP a Words.\na_total{b=\"c \\\"d\\\"\",e=\"\"} 3\na_total 4.5\n\
        # TYPE h_seconds histogram\n# UNIT h_seconds seconds\nh_seconds_bucket{le=\"0.5\"} 1\n\
        h_seconds_bucket{le=\"+Inf\"} 2\nh_seconds_count 2\nh_seconds_sum 7.25\n\
        # TYPE s stateset\ns{s=\"on\"} 1\ns{s=\"off\"} 0\n# TYPE i info\ni_info{v=\"1\"} 1\n# EOF";

    #[test]
    fn right_text_is_read() {
        let all = Metrics::parse(RIGHT).unwrap();
        assert_eq!(all.number("a", "_total", &[("b", "c \"d\""), ("e", "")]), Some(3));
        assert_eq!(all.number("a", "_total", &[]), None, "no whole number");
        assert_eq!(all.number("h_seconds", "_bucket", &[("le", "+Inf")]), Some(2));
    }

    #[test]
    fn wrong_text_is_refused() {
        for (right, wrong) in [
            ("# EOF", "# EOF\n"),
            ("# EOF", ""),
            ("a_total 4.5", "a 4.5"),
            ("a_total 4.5", "a_total 4.5 "),
            ("a_total 4.5", "a_total 4,5"),
            ("a_total 4.5", "\na_total 4.5"),
            ("a_total 4.5", "a_total{b=\"c \\\"d\\\"\",e=\"\"} 4"),
            ("a_total 4.5", "# HELP a Words.\na_total 4.5"),
            ("a_total 4.5", "h_seconds_sum 4.5"),
            ("{b=\"c", "{b=\"\\c"),
            ("e=\"\"", "b=\"\""),
            ("e=\"\"", "e=\"\","),
            ("# UNIT h_seconds seconds", "# UNIT h_seconds bytes"),
            ("le=\"+Inf\"} 2", "le=\"+Inf\"} 0"),
            ("le=\"+Inf\"", "le=\"0.5000\""),
            ("le=\"+Inf\"", "le=\"0.4\""),
            ("le=\"+Inf\"", "le=\"2\""),
            ("h_seconds_count 2", "h_seconds_count 3"),
            ("h_seconds_sum 7.25\n", ""),
            ("s{s=\"off\"} 0", "s{s=\"off\"} 1"),
            ("i_info{v=\"1\"} 1", "i_info{v=\"1\"} 2"),
            ("# TYPE i info", "# TYPE i infos"),
            ("# TYPE i info", "# TYPE a info"),
        ] {
            assert!(RIGHT.contains(right), "{right}");
            let text = RIGHT.replacen(right, wrong, 1);
            assert!(Metrics::parse(&text).is_err(), "{text}");
        }
    }
}
