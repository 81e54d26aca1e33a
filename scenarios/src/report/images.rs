//! The images at a power cut: which sector of which structure was durable, reached the medium, or was lost.

use crate::formats::{self, FormatModel, ImageMap};
use kernel_model::{Content, Cut, CutFile, CutWrite};
use std::collections::{BTreeMap, BTreeSet};
use tap_host::SECTOR_BYTES;

/// Parts of one file that a report shows.
const PARTS_MAX: usize = 120;
/// Sectors of one part that it shows.
const SECTORS_MAX: u64 = 4096;
/// Writers of one part that it names.
const WRITERS_MAX: usize = 4;

/// The files of the host at one moment.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// Virtual time in nanoseconds.
    pub at_ns: u64,
    /// The number of the power cut, from 1; `None` if the power was not cut.
    pub cut: Option<usize>,
    /// The files that had something to lose, or hold the wrong sector.
    pub files: Vec<FileMap>,
    /// Number of other files, which were durable.
    pub others: usize,
}

/// A file.
#[derive(Clone, Debug)]
pub struct FileMap {
    /// Its path.
    pub name: String,
    /// Its format.
    pub format: &'static str,
    /// Its size before, in bytes.
    pub size: u64,
    /// Its size after; `None` if its name was lost, and the file with it.
    pub size_after: Option<u64>,
    /// What an independent reader says of the metadata that is left, if it is not valid.
    pub after: Option<String>,
    /// Structures that had something to lose, or lead to the wrong sector.
    pub parts: Vec<Part>,
    /// Number of structures that are not shown.
    pub hidden: usize,
}

/// The state of a sector, or of a structure.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum State {
    /// It was durable before.
    Durable,
    /// It was not durable, and reached the medium.
    Kept,
    /// It is not durable; the power was not cut.
    Pending,
    /// It was not durable, and is lost; of several writes, the last one.
    Lost,
    /// Some of it is lost and some of it is not.
    Torn,
}

impl State {
    /// It in a word.
    pub fn word(self) -> &'static str {
        match self {
            State::Durable => "durable",
            State::Kept => "kept",
            State::Pending => "not durable",
            State::Lost => "lost",
            State::Torn => "torn",
        }
    }
}

/// A run of sectors in one state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cells {
    /// The state.
    pub state: State,
    /// How many sectors.
    pub sectors: u64,
}

/// A structure of an image.
#[derive(Clone, Debug)]
pub struct Part {
    /// What it is.
    pub name: String,
    /// Its first byte in the file, rounded down to a sector.
    pub start: u64,
    /// Its length in bytes, in whole sectors.
    pub len: u64,
    /// Its state as a whole.
    pub state: State,
    /// Its sectors.
    pub cells: Vec<Cells>,
    /// Who wrote what was not durable.
    pub writers: Vec<String>,
    /// It holds, or leads to, the sector that the failure names.
    pub focus: bool,
    /// If it holds that sector: its number within this, and its state.
    pub wrong: Option<(u64, State)>,
}

/// The images at `cut`, the `number`th; `sector` is that which the failure names.
pub(super) fn images(cut: &Cut, number: Option<usize>, sector: Option<u64>) -> Images {
    let files = cut.files.iter().map(|file| map(file, number.is_some(), sector));
    let (files, others): (Vec<_>, Vec<_>) = files.partition(|file| {
        !file.parts.is_empty() || file.size_after != Some(file.size) || file.after.is_some()
    });
    Images { at_ns: cut.at_ns, cut: number, files, others: others.len() }
}

/// What was not durable, by sector.
struct Pending<'a> {
    sectors: BTreeMap<u64, (State, &'a CutWrite)>,
}

impl<'a> Pending<'a> {
    fn of(file: &'a CutFile, was_cut: bool) -> Self {
        let end = file.after.as_ref().map_or(0, |after| after.size).div_ceil(SECTOR_BYTES);
        let lost = if was_cut { State::Lost } else { State::Pending };
        let mut sectors = BTreeMap::new();
        for write in &file.writes {
            for i in (0..8).filter(|i| write.sectors & 1 << i != 0) {
                let at = write.page * 8 + i;
                // What lies past the end that is left does not exist.
                let kept = write.kept & 1 << i != 0 && at < end;
                sectors.insert(at, (if kept { State::Kept } else { lost }, write));
            }
        }
        Self { sectors }
    }

    /// The part of that name, if it had anything to lose or is in focus.
    fn part(&self, name: String, bytes: std::ops::Range<u64>, focus: bool) -> Option<Part> {
        let first = bytes.start / SECTOR_BYTES;
        let end = bytes.end.div_ceil(SECTOR_BYTES).max(first + 1).min(first + SECTORS_MAX);
        if !focus && self.sectors.range(first..end).next().is_none() {
            return None;
        }
        let state = |at: u64| self.sectors.get(&at).map_or(State::Durable, |s| s.0);
        let mut cells: Vec<Cells> = Vec::new();
        for state in (first..end).map(state) {
            match cells.last_mut() {
                Some(last) if last.state == state => last.sectors += 1,
                _ => cells.push(Cells { state, sectors: 1 }),
            }
        }
        let has = |state| cells.iter().any(|c| c.state == state);
        let whole = match (has(State::Lost), has(State::Kept)) {
            (true, true) => State::Torn,
            (true, false) => State::Lost,
            (false, true) => State::Kept,
            (false, false) if has(State::Pending) => State::Pending,
            (false, false) => State::Durable,
        };
        let writers: BTreeSet<&str> = self.sectors.range(first..end).map(|(_, s)| s.1.by.as_str()).collect();
        let writers = writers.into_iter().take(WRITERS_MAX).map(str::to_owned).collect();
        let (start, len) = (first * SECTOR_BYTES, (end - first) * SECTOR_BYTES);
        Some(Part { name, start, len, state: whole, cells, writers, focus, wrong: None })
    }

    /// The same, if the sector `wrong` of the file is the one that the failure names.
    fn part_with(&self, structure: Structure) -> Option<Part> {
        let Structure { name, bytes, focus, wrong } = structure;
        let part = self.part(name, bytes, focus)?;
        let state = |at: u64| self.sectors.get(&at).map_or(State::Durable, |s| s.0);
        let wrong = wrong.map(|at| (at - part.start / SECTOR_BYTES, state(at)));
        Some(Part { wrong, ..part })
    }
}

fn map(file: &CutFile, was_cut: bool, sector: Option<u64>) -> FileMap {
    let pending = Pending::of(file, was_cut);
    let model = recognised(&file.before).or_else(|| recognised(file.after.as_ref()?));
    let walked = model.and_then(|model| walk(model, file));
    let structures = match &walked {
        Some(walked) => of_image(walked, sector),
        None => sector.map(|s| whole_file(s, file.before.size)).into_iter().flatten().collect(),
    };
    let mut seen: BTreeSet<u64> = BTreeSet::new();
    let mut parts: Vec<Part> = Vec::new();
    for structure in structures {
        seen.extend(structure.bytes.start / SECTOR_BYTES..structure.bytes.end.div_ceil(SECTOR_BYTES));
        parts.extend(pending.part_with(structure));
    }
    for run in runs(pending.sectors.keys().copied().filter(|at| !seen.contains(at))) {
        let name = match walked {
            Some(_) => format!("nothing refers to this, {:#x}", run.start * SECTOR_BYTES),
            None if model.is_some() => format!("at {:#x}", run.start * SECTOR_BYTES),
            None => format!("sectors {}+{}", run.start, run.end - run.start),
        };
        parts.extend(pending.part(name, run.start * SECTOR_BYTES..run.end * SECTOR_BYTES, false));
    }
    let hidden = keep_the_worst(&mut parts);
    let left =
        model.zip(file.after.as_ref()).filter(|_| was_cut).and_then(|(model, after)| model.walk_whole(after));
    let after = left.and_then(Result::err).map(|(invariant, text)| format!("{invariant}: {text}"));
    FileMap {
        name: file.name.clone(),
        format: model.map_or("raw", |model| model.format().name()),
        size: file.before.size,
        size_after: file.after.as_ref().map(|after| after.size),
        after,
        parts,
        hidden,
    }
}

/// Keeps at most [`PARTS_MAX`] parts, in their order in the file; returns how many are left out.
fn keep_the_worst(parts: &mut Vec<Part>) -> usize {
    let mut worst: Vec<usize> = (0..parts.len()).collect();
    worst.sort_by_key(|at| (!parts[*at].focus, std::cmp::Reverse(parts[*at].state)));
    let dropped: BTreeSet<usize> = worst.into_iter().skip(PARTS_MAX).collect();
    let mut at = 0;
    parts.retain(|_| {
        at += 1;
        !dropped.contains(&(at - 1))
    });
    parts.sort_by_key(|part| part.start);
    dropped.len()
}

/// The format with metadata that the content begins like.
fn recognised(content: &Content) -> Option<&'static dyn FormatModel> {
    let mut head = [0; 48];
    content.pages.read(0, &mut head);
    let is = |model: &&&'static dyn FormatModel| model.metadata().is_some_and(|m| m.recognises(&head));
    formats::ALL.iter().find(is).copied()
}

/// The meaning of the bytes before the cut, or of those that are left.
fn walk(model: &'static dyn FormatModel, file: &CutFile) -> Option<ImageMap> {
    let of = |content: &Content| model.walk(content).and_then(Result::ok);
    of(&file.before).or_else(|| of(file.after.as_ref()?))
}

struct Structure {
    name: String,
    bytes: std::ops::Range<u64>,
    focus: bool,
    /// The sector of the file that the failure names.
    wrong: Option<u64>,
}

/// The structures of an image; `sector` is one of its disk.
fn of_image(map: &ImageMap, sector: Option<u64>) -> Vec<Structure> {
    let wanted =
        sector.map(|s| (s * SECTOR_BYTES) >> map.cluster_bits).filter(|c| *c < map.entries.len() as u64);
    let root_len = (map.tables.len() as u64 * 8).max(1);
    let structure = |name: String, bytes, focus| Structure { name, bytes, focus, wrong: None };
    let root = map.root_at..map.root_at + root_len;
    let mut out = vec![
        structure("header".into(), 0..map.root_at.max(1), false),
        structure("L1 table".into(), root, wanted.is_some()),
    ];
    for (index, at) in (0..).zip(&map.tables).filter(|(_, at)| **at != 0) {
        let focus = wanted.is_some_and(|c| c >> map.table_bits == index);
        out.push(structure(format!("L2 table {index}"), *at..*at + map.table_bytes, focus));
    }
    let sectors = (1_u64 << map.cluster_bits) / SECTOR_BYTES;
    for cluster in 0..map.entries.len() as u64 {
        let plain = map.host_offset(cluster).map(|at| at..at + (1 << map.cluster_bits));
        let packed = || map.compressed(cluster).map(|(at, len)| at..at + len);
        if let Some(bytes) = plain.or_else(packed) {
            let name = format!("cluster {cluster}, sectors {}+{sectors} of the disk", cluster * sectors);
            let focus = wanted == Some(cluster);
            // The sector of a compressed cluster is in no particular one.
            let within = sector.filter(|_| focus && map.host_offset(cluster).is_some()).map(|s| s % sectors);
            let wrong = within.map(|s| bytes.start / SECTOR_BYTES + s);
            out.push(Structure { name, bytes, focus, wrong });
        }
    }
    out
}

/// The page of a raw file that holds the sector.
fn whole_file(sector: u64, size: u64) -> Option<Structure> {
    let first = sector / 8 * 8;
    let bytes = first * SECTOR_BYTES..(first + 8) * SECTOR_BYTES;
    let name = format!("sectors {first}+8");
    (bytes.start < size).then_some(Structure { name, bytes, focus: true, wrong: Some(sector) })
}

/// Runs of consecutive numbers.
fn runs(numbers: impl Iterator<Item = u64>) -> Vec<std::ops::Range<u64>> {
    let mut out: Vec<std::ops::Range<u64>> = Vec::new();
    for n in numbers {
        match out.last_mut() {
            Some(last) if last.end == n => last.end += 1,
            _ => out.push(n..n + 1),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{ImageShape, Kind, Stored, content_of};
    use kernel_model::PageMap;

    /// An image of two clusters of 4 KiB.
    fn image() -> Content {
        let shape = ImageShape {
            cluster_bits: 12,
            table_bits: 9,
            size: 1 << 20,
            backing: None,
            clusters: vec![(0, Stored::Plain), (7, Stored::Plain)],
            writer: 1,
            extended: false,
        };
        content_of(&Kind::mapped(false).model.make(&shape, &mut PageMap::default()))
    }

    fn write(page: u64, sectors: u8, kept: u8) -> CutWrite {
        CutWrite { page, sectors, kept, by: format!("write of page {page}") }
    }

    #[test]
    fn structures_are_durable_kept_lost_or_torn() {
        let content = image();
        let map = Kind::mapped(false).model.walk(&content).expect("metadata").expect("a valid image");
        let (data, table) = (map.host_offset(7).expect("a cluster") / 4096, map.tables[0]);
        let name = "/images/x".to_owned();
        let of = |writes, after: Option<Content>| {
            let file = CutFile { name: name.clone(), before: content.clone(), after, writes };
            let cut = Cut { at_ns: 5, files: vec![file] };
            images(&cut, Some(1), Some(7 * 8 + 2)).files.remove(0)
        };
        let torn = of(vec![write(data, 0xff, 0b1111_1011)], Some(content.clone()));
        let part = |file: &FileMap, wanted: &str| {
            let found = file.parts.iter().find(|part| part.name.starts_with(wanted));
            found.unwrap_or_else(|| panic!("no {wanted} in {file:?}")).clone()
        };
        let cluster = part(&torn, "cluster 7, sectors 56+8");
        let cells: Vec<_> = cluster.cells.iter().map(|c| (c.state, c.sectors)).collect();
        assert_eq!(cells, [(State::Kept, 2), (State::Lost, 1), (State::Kept, 5)]);
        assert_eq!((cluster.state, cluster.wrong), (State::Torn, Some((2, State::Lost))));
        assert_eq!(cluster.writers, [format!("write of page {data}")]);
        let l2 = part(&torn, "L2 table 0");
        assert!(l2.focus && l2.state == State::Durable && l2.start == table, "{l2:?}");
        assert!(
            torn.parts.iter().all(|part| !part.name.starts_with("cluster 0")),
            "durable and not in focus"
        );

        // Of two writes the last one counts.
        let again = of(vec![write(data, 1, 0), write(data, 1, 1)], Some(content.clone()));
        assert_eq!(part(&again, "cluster 7").state, State::Kept);
        // What is past the end that is left is lost.
        let mut short = content.clone();
        short.size = data * 4096;
        let cut_off = of(vec![write(data, 0xff, 0xff)], Some(short));
        assert_eq!(part(&cut_off, "cluster 7").state, State::Lost);
        assert!(cut_off.size_after < Some(cut_off.size), "{cut_off:?}");
        // A file without a durable name is gone with all that is in it.
        let gone = of(Vec::new(), None);
        assert_eq!(gone.size_after, None);
        // Without a cut nothing is lost yet.
        let file = CutFile {
            name: name.clone(),
            before: content.clone(),
            after: Some(content.clone()),
            writes: vec![write(data, 1, 0)],
        };
        let now = images(&Cut { at_ns: 5, files: vec![file] }, None, None).files.remove(0);
        assert_eq!(part(&now, "cluster 7").state, State::Pending);
        let unowned = of(vec![write(1 << 20, 0xf0, 0)], Some(content.clone()));
        assert_eq!(
            part(&unowned, "nothing refers to this").cells,
            [Cells { state: State::Lost, sectors: 4 }]
        );
    }
}
