//! What operations and power cuts did to the files, for reports. Kept only if the engine keeps lines.

use super::{Inner, OpenFile, Storage};
use crate::inode::{Content, Pending};
use sim::{Sim, Span, SpanId};
use std::ops::Range;

/// Power cuts that are kept; a run has few.
const CUTS_MAX: usize = 64;

/// What one power cut did; or what one now would find, if nothing was cut.
#[derive(Clone, Default)]
pub struct Cut {
    /// Virtual time in nanoseconds.
    pub at_ns: u64,
    /// The files, by name.
    pub files: Vec<CutFile>,
}

/// A file at a power cut.
#[derive(Clone, Default)]
pub struct CutFile {
    /// Its path.
    pub name: String,
    /// What reads saw before.
    pub before: Content,
    /// What is left; `None` if the file is gone, because its name was not durable.
    pub after: Option<Content>,
    /// The writes that were not durable, in order.
    pub writes: Vec<CutWrite>,
}

/// A write to one page that was not durable when the power was cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CutWrite {
    /// The page within the file.
    pub page: u64,
    /// The sectors of the page that it wrote, as a mask.
    pub sectors: u8,
    /// Those of them that reached the medium.
    pub kept: u8,
    /// Who wrote it.
    pub by: String,
}

/// Collects a [`Cut`] while it happens.
pub(super) struct CutRecorder {
    /// Set only while a report is made.
    sim: Option<Sim>,
    cut: Cut,
}

/// One file of a [`CutRecorder`].
pub(super) struct FileRecorder(Option<(Sim, CutFile)>);

impl CutRecorder {
    pub(super) fn new(sim: &Sim) -> Self {
        let cut = Cut { at_ns: sim.now_ns(), files: Vec::new() };
        Self { sim: sim.keeps_lines().then(|| sim.clone()), cut }
    }

    pub(super) fn name_lost(&mut self, name: &str, before: &Content) {
        if self.sim.is_some() {
            let before = before.clone();
            self.cut.files.push(CutFile { name: name.into(), before, ..CutFile::default() });
        }
    }

    pub(super) fn file(&self, name: &str, before: &Content) -> FileRecorder {
        let file = |sim: &Sim| {
            let before = before.clone();
            (sim.clone(), CutFile { name: name.into(), before, ..CutFile::default() })
        };
        FileRecorder(self.sim.as_ref().map(file))
    }

    pub(super) fn left(&mut self, file: FileRecorder, after: &Content) {
        if let Some((_, file)) = file.0 {
            self.cut.files.push(CutFile { after: Some(after.clone()), ..file });
        }
    }
}

impl FileRecorder {
    pub(super) fn wrote(&mut self, p: &Pending, kept: u8) {
        if let Some((sim, file)) = &mut self.0 {
            file.writes.push(CutWrite { page: p.page, sectors: p.sectors, kept, by: sim.name_of(p.io) });
        }
    }
}

impl Inner {
    /// An operation on `bytes` of a file begins.
    pub(super) fn begin_span(&self, kind: &'static str, open: &OpenFile, bytes: Range<u64>) -> SpanId {
        self.sim.begin_span(|| Span {
            track: open.file.name.clone(),
            kind,
            name: self.sim.name_of(self.sim.current()),
            bytes,
            ..Span::default()
        })
    }

    /// Keeps the newest cuts.
    pub(super) fn keep_cut(&self, recorder: CutRecorder) {
        if recorder.sim.is_some() {
            let mut cuts = self.cuts.borrow_mut();
            if cuts.len() == CUTS_MAX {
                cuts.remove(0);
            }
            cuts.push(recorder.cut);
        }
    }
}

impl Storage {
    /// The power cuts so far; none unless the engine keeps lines.
    pub fn cuts(&self) -> Vec<Cut> {
        self.0.cuts.borrow().clone()
    }

    /// What a power cut now would find, as if it left nothing of what is not durable.
    pub fn state_now(&self) -> Cut {
        let mut now = CutRecorder::new(&self.0.sim);
        for (name, file) in self.0.files.borrow().iter() {
            let inode = file.inode.borrow();
            let mut told = now.file(name, &inode.live);
            inode.pending.iter().for_each(|p| told.wrote(p, 0));
            now.left(told, &inode.base);
        }
        now.cut
    }
}
