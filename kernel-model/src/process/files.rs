//! Names of files, as a process opens, removes and exchanges them.

use super::{PriorityCell, Process, ProcessFile};
use crate::calls::Call;
use std::future::Future;
use tap_host::{Errno, Files, IoPriority, OpenMode, Time as _};

impl Files for Process {
    type File = ProcessFile;

    async fn open(&self, path: &str, mode: OpenMode) -> Result<ProcessFile, Errno> {
        let storage = &self.kernel.0.storage.0;
        self.takes(if mode.create_new { Call::Create } else { Call::Open }, path).await;
        self.alive().await;
        let open = storage.open(path, mode.create_new, mode.write, mode.direct)?;
        Ok(ProcessFile { process: self.clone(), open: storage.descriptor(open, &self.closed_at_ns) })
    }

    async fn sync_parent(&self, path: &str) -> Result<(), Errno> {
        self.takes(Call::SyncName, path).await;
        self.alive().await;
        self.kernel.0.storage.0.sync_name(path)
    }

    async fn remove(&self, path: &str) -> Result<(), Errno> {
        self.takes(Call::Remove, path).await;
        self.alive().await;
        self.kernel.0.storage.0.remove(path)
    }

    async fn exchange(&self, one: &str, other: &str) -> Result<(), Errno> {
        self.takes(Call::Exchange, one).await;
        self.alive().await;
        self.kernel.0.storage.0.exchange(one, other)
    }

    async fn names_in(&self, folder: &str) -> Result<Vec<String>, Errno> {
        self.alive().await;
        let (files, sockets) = (self.kernel.0.storage.0.files.borrow(), self.network().paths());
        let all = files.keys().cloned().chain(sockets);
        let inside = |path: String| Some(path.strip_prefix(folder)?.strip_prefix('/')?.to_owned());
        let mut names: Vec<String> = all.filter_map(inside).filter(|name| !name.contains('/')).collect();
        names.sort_unstable();
        Ok(names)
    }

    async fn closed(&self) {
        if self.is_closing() {
            self.sleep_ns(self.closed_at_ns.get() - self.now_ns()).await;
        }
    }

    fn apart(&self) -> Self {
        Self { priority: PriorityCell::default(), ..self.clone() }
    }

    fn set_priority(&self, priority: Option<IoPriority>) -> impl Future<Output = Result<(), Errno>> {
        self.have_priority(priority)
    }

    fn priority(&self) -> Option<IoPriority> {
        self.priority.get()
    }
}
