//! Graphs that a seed draws, and what each of them means.
//!
//! ```text
//!   decisions ─► text for the program            vm -> n0; n0 :: concat(); n0 -> n1; ...
//!             └► places: sector of the disk ─► (leaf, sector of the leaf)
//! ```
//!
//! The meaning is a table, made as the graph is drawn. It shares nothing with how the modules compute theirs.

use crate::formats::{ImageShape, Kind, fitting};
use crate::tag::Tag;
use crate::world::World;
use kernel_model::PageMap;
use sim::{Draw, Entity, Label};
use std::fmt::Write;
use tap_host::SECTOR_BYTES;
use tap_images::ImageFormat;
use tap_mason::modules::fixed::pattern_of;

/// What node of a graph is drawn: its kind in 4 bits, then its parameters. 0 is a raw image of zeros.
pub static GRAPH_NODE: Label = Label::new("graph-node", "node {n} of the graph is of kind {} (see the text)");

/// Nodes of a graph, at most, not counting the slices of a shared image and bases.
const MAX_NODES: u32 = 12;
/// Smallest disk that the checks of a recovered one take, in sectors.
const LEAST_SECTORS: usize = 160;
/// Where graphs and their images are.
pub(super) const FOLDER: &str = "/images/";
/// The text.
pub(super) const TEXT: &str = "/images/graph.mason";
/// Sizes of images, in sectors: whole blocks of any drive.
const SIZES: [u64; 4] = [256, 88, 312, 40];
/// Sectors of a chunk of a stripe.
const CHUNKS: [u64; 4] = [8, 16, 1, 3];

/// A file of a graph.
pub(super) struct Leaf {
    /// Its path.
    pub(super) path: String,
    /// Its format.
    pub(super) format: ImageFormat,
    /// It is written to.
    pub(super) is_written: bool,
}

/// A graph and its meaning.
pub(super) struct Drawn {
    /// The text.
    pub(super) text: String,
    /// Its files.
    pub(super) leaves: Vec<Leaf>,
    /// For each sector of the disk the leaf and the sector there.
    pub(super) places: Vec<(usize, u64)>,
    /// What the disk holds at first.
    pub(super) view: PageMap,
}

struct Gardener<'w> {
    world: &'w World,
    graph: Drawn,
    /// What each leaf holds at first.
    contents: Vec<PageMap>,
    nodes: u32,
}

/// A part of a graph: its name, and where its sectors are.
struct Part {
    name: String,
    places: Vec<(usize, u64)>,
}

/// Draws a graph and makes its images.
pub(super) fn draw(world: &World) -> Drawn {
    let graph =
        Drawn { text: String::new(), leaves: Vec::new(), places: Vec::new(), view: PageMap::default() };
    let mut gardener = Gardener { world, graph, contents: Vec::new(), nodes: 0 };
    let mut top = gardener.part(0);
    if top.places.len() < LEAST_SECTORS {
        let rest = gardener.image(0, 0);
        top = gardener.concat(vec![top, rest]);
    }
    let Gardener { mut graph, contents, .. } = gardener;
    let _infallible =
        writeln!(graph.text, "vm :: disk(size = {} sectors);\nvm -> {};", top.places.len(), top.name);
    for (at, (leaf, sector)) in top.places.iter().enumerate() {
        let mut bytes = [0; SECTOR_BYTES as usize];
        contents[*leaf].read(sector * SECTOR_BYTES, &mut bytes);
        graph.view.write(at as u64 * SECTOR_BYTES, &bytes);
    }
    graph.places = top.places;
    world.storage.put_bytes(TEXT, graph.text.as_bytes());
    graph
}

impl Gardener<'_> {
    fn say(&mut self, line: &str) {
        self.graph.text.push_str(line);
        self.graph.text.push('\n');
    }

    /// The next node at `depth`, and what is below it.
    fn part(&mut self, depth: u32) -> Part {
        let number = self.nodes;
        self.nodes += 1;
        let entity = Entity::WORLD.child("graph", 0);
        self.world.sim.name_entity(entity, || "the graph".into());
        let value = self.world.sim.decide(entity, &GRAPH_NODE, number, |d: &mut Draw| d.below(1 << 16));
        let (kind, more) = (value % 16, value >> 4);
        let is_leaf = depth >= 4 || self.nodes >= MAX_NODES;
        match kind {
            1 | 2 if !is_leaf => {
                let parts = (0..2 + more % 2).map(|_| self.part(depth + 1)).collect();
                self.concat(parts)
            }
            3 | 4 if !is_leaf => {
                let parts = (0..2 + more % 2).map(|_| self.part(depth + 1)).collect();
                self.stripe(parts, CHUNKS[(more >> 1) as usize % 4])
            }
            5 | 6 if !is_leaf => {
                let whole = self.part(depth + 1);
                self.slice(whole, more)
            }
            7 if !is_leaf => {
                let (read_us, write_us) = (more % 4 * 30, more / 4 % 4 * 700);
                let lower = self.part(depth + 1);
                self.pass(lower, &format!("delay(read = {read_us} us, write = {write_us} us)"))
            }
            8 | 9 if !is_leaf => {
                let rate = [
                    "rate = 64 KiB/s, burst = 4 KiB",
                    "rate = 8 MiB/s, group = \"g\"",
                    "requests = 20 io/s, \
                            request_burst = 2",
                ][more as usize % 3];
                let lower = self.part(depth + 1);
                self.pass(lower, &format!("throttle({rate})"))
            }
            10 => self.halves(number, more),
            11 | 12 => self.mapped(number, more, false),
            13 | 14 => self.mapped(number, more, true),
            _ => self.image(number, more),
        }
    }

    fn leaf(&mut self, path: String, format: ImageFormat, is_written: bool, content: PageMap) -> usize {
        self.graph.leaves.push(Leaf { path, format, is_written });
        self.contents.push(content);
        self.graph.leaves.len() - 1
    }

    /// The bytes of `sectors` sectors that were written before: each tells where it is.
    fn used(&self, sectors: u64) -> Vec<u8> {
        let mut bytes = vec![0; (sectors * SECTOR_BYTES) as usize];
        let writer = 3000 + self.graph.leaves.len() as u32;
        for (sector, bytes) in bytes.chunks_exact_mut(SECTOR_BYTES as usize).enumerate() {
            Tag { writer, op: 0, sector: sector as u64 }.fill(bytes, false);
        }
        bytes
    }

    /// A raw image, of zeros or in use.
    fn image(&mut self, number: u32, more: u64) -> Part {
        let (name, sectors) =
            (format!("raw{number}_{}", self.graph.leaves.len()), SIZES[(more >> 1) as usize % 4]);
        let path = format!("{FOLDER}{name}.img");
        let bytes =
            if more % 2 == 1 { self.used(sectors) } else { vec![0; (sectors * SECTOR_BYTES) as usize] };
        self.world.storage.put_bytes(&path, &bytes);
        let mut content = PageMap::default();
        content.write(0, &bytes);
        self.say(&format!("{name} :: raw(\"{name}.img\");"));
        let leaf = self.leaf(path, crate::formats::RAW, true, content);
        Part { name, places: (0..sectors).map(|sector| (leaf, sector)).collect() }
    }

    /// An image with metadata, perhaps over a base in the graph.
    fn mapped(&mut self, number: u32, more: u64, over_base: bool) -> Part {
        let model = Kind::mapped(false).model;
        let metadata = model.metadata().expect("it has metadata");
        let (name, sectors) = (format!("map{number}"), SIZES[(more % 2) as usize]);
        let (size, bits) = (sectors * SECTOR_BYTES, fitting(&metadata.cluster_bits(), &[12, 9]));
        let shape = ImageShape {
            cluster_bits: bits[(more >> 1) as usize % bits.len()],
            table_bits: fitting(&metadata.table_bits(), &[6])[0],
            size,
            backing: over_base.then(|| "elsewhere.img".to_owned()),
            clusters: vec![],
            writer: 1001,
            extended: false,
        };
        let path = format!("{FOLDER}{name}.img");
        let file = model.make(&shape, &mut PageMap::default());
        self.world.storage.put_bytes(&path, &file);
        self.say(&format!("{name} :: {}(\"{name}.img\");", model.format()));
        let mut content = PageMap::default();
        if over_base {
            let base = self.base(number, sectors, more >> 2);
            content.write(0, &base);
            self.say(&format!("{name} [backing] -> base{number};"));
        }
        let leaf = self.leaf(path, model.format().into(), true, content);
        Part { name, places: (0..sectors).map(|sector| (leaf, sector)).collect() }
    }

    /// Something of `sectors` that is only read, called `base{number}`. Returns its bytes.
    fn base(&mut self, number: u32, sectors: u64, more: u64) -> Vec<u8> {
        let name = format!("base{number}");
        let raw = |gardener: &mut Self, sectors: u64| {
            let bytes = gardener.used(sectors);
            let path = format!("{FOLDER}{name}.raw");
            gardener.world.storage.put_bytes(&path, &bytes);
            gardener.leaf(path, crate::formats::RAW, false, PageMap::default());
            bytes
        };
        match more % 4 {
            0 => {
                self.say(&format!("{name} :: pattern({sectors} sectors, seed = {number});"));
                (0..sectors).flat_map(|sector| pattern_of(number.into(), sector)).collect()
            }
            1 => {
                let bytes = raw(self, sectors);
                self.say(&format!("readonly {name} :: raw(\"{name}.raw\");"));
                bytes
            }
            2 => {
                // What precedes and follows the slice must not show.
                let bytes = raw(self, sectors + 16);
                let (from, to) = (5, sectors + 5);
                self.say(&format!("readonly {name}raw :: raw(\"{name}.raw\");"));
                self.say(&format!("{name} :: slice({from} sectors .. {to} sectors); {name} -> {name}raw;"));
                bytes[(from * SECTOR_BYTES) as usize..(to * SECTOR_BYTES) as usize].to_vec()
            }
            _ => {
                let half = sectors / 16 * 8;
                let mut bytes = raw(self, half);
                self.say(&format!("readonly {name}raw :: raw(\"{name}.raw\");"));
                self.say(&format!(
                    "{name} :: concat(); {name} => {name}raw, zero({} sectors);",
                    sectors - half
                ));
                bytes.resize((sectors * SECTOR_BYTES) as usize, 0);
                bytes
            }
        }
    }

    fn node(&mut self, class: &str) -> String {
        let name = format!("n{}", self.graph.text.lines().count());
        self.say(&format!("{name} :: {class};"));
        name
    }

    fn above(&mut self, class: &str, parts: &[Part]) -> String {
        let name = self.node(class);
        let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
        self.say(&format!("{name} => {};", names.join(", ")));
        name
    }

    fn concat(&mut self, parts: Vec<Part>) -> Part {
        let name = self.above("concat()", &parts);
        Part { name, places: parts.into_iter().flat_map(|part| part.places).collect() }
    }

    fn stripe(&mut self, mut parts: Vec<Part>, chunk: u64) -> Part {
        let chunk = chunk as usize;
        let least = parts.iter().map(|part| part.places.len()).min().unwrap_or(0);
        if least < chunk {
            return self.concat(parts);
        }
        let name = self.above(&format!("stripe(chunk = {chunk} sectors)"), &parts);
        parts.iter_mut().for_each(|part| part.places.truncate(least / chunk * chunk));
        let rows = 0..least / chunk;
        let of_row =
            |row: usize| parts.iter().flat_map(move |part| part.places[row * chunk..][..chunk].to_vec());
        Part { name, places: rows.flat_map(of_row).collect() }
    }

    fn slice(&mut self, whole: Part, more: u64) -> Part {
        let size = whole.places.len();
        let from = (more % 8) as usize * size / 16;
        let to = size - (more >> 3) as usize % 8 * size / 32;
        let name = self.node(&format!("slice({from} sectors .. {to} sectors)"));
        self.say(&format!("{name} -> {};", whole.name));
        Part { name, places: whole.places[from..to].to_vec() }
    }

    fn pass(&mut self, lower: Part, class: &str) -> Part {
        let name = self.node(class);
        self.say(&format!("{name} -> {};", lower.name));
        Part { name, places: lower.places }
    }

    /// The second half of an image, then the first: two nodes write to one.
    fn halves(&mut self, number: u32, more: u64) -> Part {
        let whole = self.image(number, more);
        let (name, size) = (whole.name.clone(), whole.places.len());
        let declared = format!("{name} :: raw");
        self.graph.text = self.graph.text.replace(&declared, &format!("shared {declared}"));
        let at = size / 2;
        let second = Part { name: name.clone(), places: whole.places.clone() };
        let parts = [(at, size, whole), (0, at, second)].map(|(from, to, part)| {
            let name = self.node(&format!("slice({from} sectors .. {to} sectors)"));
            self.say(&format!("{name} -> {};", part.name));
            Part { name, places: part.places[from..to].to_vec() }
        });
        self.concat(parts.into())
    }
}
