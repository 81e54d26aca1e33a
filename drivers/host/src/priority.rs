//! The priority of I/O, where the host's storage has one (ioprio_set(2)).

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::str::FromStr;

/// The priority of I/O: a class, and a level where the class has levels. There are no others than those that exist.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IoPriority {
    class: u8,
    level: u8,
}

/// The classes, as they are called and as Linux numbers them.
const CLASSES: [(&str, u8); 3] = [("realtime", REALTIME), ("best-effort", 2), ("idle", IDLE)];
const REALTIME: u8 = 1;
const IDLE: u8 = 3;
/// The level of who names none, as Linux has it.
const LEVEL_DEFAULT: u8 = 4;
const LEVEL_MAX: u8 = 7;

impl IoPriority {
    /// 1 realtime, 2 best effort, 3 idle.
    pub fn class(self) -> u8 {
        self.class
    }

    /// 0 (first) to 7 (last); 0 of the class without levels.
    pub fn level(self) -> u8 {
        self.level
    }

    /// Whether it precedes all I/O of others, which the host may refuse.
    pub fn is_realtime(self) -> bool {
        self.class == REALTIME
    }
}

/// `CLASS` or `CLASS:LEVEL`.
impl FromStr for IoPriority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, level) = text.split_once(':').map_or((text, None), |(name, level)| (name, Some(level)));
        let Some((_, class)) = CLASSES.into_iter().find(|(class, _)| *class == name) else {
            return Err(format!("'{name}' is not a class; use realtime, best-effort or idle"));
        };
        let level = match level {
            None if class == IDLE => 0,
            None => LEVEL_DEFAULT,
            Some(_) if class == IDLE => return Err("the class idle has no levels".to_owned()),
            Some(level) => match level.parse() {
                Ok(level @ 0..=LEVEL_MAX) => level,
                _ => return Err(format!("the level '{level}' is not from 0 to {LEVEL_MAX}")),
            },
        };
        Ok(Self { class, level })
    }
}

impl fmt::Display for IoPriority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = CLASSES.iter().find(|(_, class)| *class == self.class).map_or("", |(name, _)| name);
        if self.class == IDLE { f.write_str(name) } else { write!(f, "{name}:{}", self.level) }
    }
}

/// The priority that files share; clones are the same one. Without one it is that of the process.
#[derive(Clone, Debug, Default)]
pub struct PriorityCell(Rc<Cell<Option<IoPriority>>>);

impl PriorityCell {
    /// What it is now.
    pub fn get(&self) -> Option<IoPriority> {
        self.0.get()
    }

    /// Sets it.
    pub fn set(&self, priority: Option<IoPriority>) {
        self.0.set(priority);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_parsed() {
        let read = |text: &str| text.parse::<IoPriority>();
        for (text, class, level, shown) in [
            ("idle", 3, 0, "idle"),
            ("best-effort:7", 2, 7, "best-effort:7"),
            ("realtime", 1, 4, "realtime:4"),
            ("realtime:0", 1, 0, "realtime:0"),
        ] {
            let priority = read(text).unwrap();
            assert_eq!((priority.class(), priority.level()), (class, level), "{text}");
            assert_eq!(priority.to_string(), shown);
            assert_eq!(read(shown), Ok(priority));
        }
        for bad in ["", "slow", "none", "best-effort:8", "idle:1", "realtime:", "best-effort:-1"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
