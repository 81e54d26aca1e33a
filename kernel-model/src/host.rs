//! The simulated host: a process with its access to Xen, as one type of the seam.

use crate::{Kernel, Process, ProcessClaim, ProcessFile, ProcessListener, ProcessStream};
use std::future::Future;
use std::rc::Rc;
use tap_host::{
    Bug, DomId, Entropy, Errno, Event, Events, Files, GrantRef, GrantSegment, Grants, IoPriority, Log, Mark,
    NbdConfig, NbdDevice, NbdDevices, NbdIndex, OpenMode, Port, Probe, SharedPages, Signals, SocketAddress,
    Sockets, Tasks, Time, Xenstore,
};
use xen_model::{Channel, Mapping, StoreTransaction, StoreWatcher, Xen, XenPort};

/// The usual folder of processes for their shared pages.
const USUAL_FOLDER: &str = "/run/tapdisk";

/// A process of the control domain.
#[derive(Clone)]
pub struct SimHost {
    /// Its Linux side.
    pub process: Process,
    /// Its Xen side.
    pub port: XenPort,
    /// Prefix of the names of its shared pages, if they are not in the [usual folder](USUAL_FOLDER).
    folder: Rc<str>,
}

impl SimHost {
    /// Starts a process called `name` in the control domain.
    pub fn start(kernel: &Kernel, xen: &Xen, name: &str, key: u64) -> Self {
        let process = kernel.process(name, key);
        let port = xen.attach(DomId(0), process.node());
        Self { process, port, folder: "".into() }
    }

    /// Sets the folder of its shared pages; those in other folders are separate.
    pub fn with_run_folder(self, folder: &str) -> Self {
        let folder = if folder == USUAL_FOLDER { "".into() } else { format!("{folder}/").into() };
        Self { folder, ..self }
    }

    fn page(&self, name: &str) -> String {
        format!("{}{name}", self.folder)
    }
}

impl Time for SimHost {
    fn now_ns(&self) -> u64 {
        self.process.now_ns()
    }
    fn sleep_ns(&self, ns: u64) -> impl Future<Output = ()> + 'static {
        self.process.sleep_ns(ns)
    }
}

impl Tasks for SimHost {
    fn spawn(&self, role: &'static str, key: u64, task: impl Future<Output = ()> + 'static) {
        self.process.spawn(role, key, task);
    }
    fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        self.process.yield_now()
    }
}

impl Log for SimHost {
    fn log(&self, event: Event) {
        self.process.log(event);
    }
}

impl Entropy for SimHost {
    fn fill(&self, buf: &mut [u8]) {
        self.process.fill(buf);
    }
}

impl Probe for SimHost {
    fn work(&self, units: u64) {
        self.process.work(units);
    }
    #[inline]
    fn bug(&self, bug: &'static Bug) -> bool {
        self.process.bug(bug)
    }
    fn mark(&self, mark: &'static Mark) {
        self.process.mark(mark);
    }
}

impl Files for SimHost {
    type File = ProcessFile;
    fn open(&self, path: &str, mode: OpenMode) -> impl Future<Output = Result<ProcessFile, Errno>> {
        self.process.open(path, mode)
    }
    fn sync_parent(&self, path: &str) -> impl Future<Output = Result<(), Errno>> {
        self.process.sync_parent(path)
    }
    fn remove(&self, path: &str) -> impl Future<Output = Result<(), Errno>> {
        Files::remove(&self.process, path)
    }
    fn exchange(&self, one: &str, other: &str) -> impl Future<Output = Result<(), Errno>> {
        self.process.exchange(one, other)
    }
    fn names_in(&self, folder: &str) -> impl Future<Output = Result<Vec<String>, Errno>> {
        self.process.names_in(folder)
    }
    fn closed(&self) -> impl Future<Output = ()> {
        self.process.closed()
    }
    fn apart(&self) -> Self {
        Self { process: self.process.apart(), ..self.clone() }
    }
    fn set_priority(&self, priority: Option<IoPriority>) -> impl Future<Output = Result<(), Errno>> {
        self.process.set_priority(priority)
    }
    fn priority(&self) -> Option<IoPriority> {
        self.process.priority()
    }
}

impl Sockets for SimHost {
    type Listener = ProcessListener;
    type Stream = ProcessStream;
    fn listen(&self, address: &SocketAddress) -> impl Future<Output = Result<ProcessListener, Errno>> {
        self.process.listen(address)
    }
    fn listen_private(&self, path: &str) -> impl Future<Output = Result<ProcessListener, Errno>> {
        self.process.listen_private(path)
    }
    fn connect(&self, address: &SocketAddress) -> impl Future<Output = Result<ProcessStream, Errno>> {
        self.process.connect(address)
    }
    fn inherited(&self) -> Vec<ProcessListener> {
        self.process.inherited()
    }
}

impl NbdDevices for SimHost {
    type DeviceStream = ProcessStream;
    type Claim = ProcessClaim;
    fn attached(&self) -> impl Future<Output = Result<Vec<NbdDevice>, Errno>> {
        self.process.attached()
    }
    fn attach(&self, config: &NbdConfig) -> impl Future<Output = Result<(NbdIndex, ProcessStream), Errno>> {
        self.process.attach(config)
    }
    fn reattach(
        &self,
        index: NbdIndex,
        config: &NbdConfig,
    ) -> impl Future<Output = Result<ProcessStream, Errno>> {
        self.process.reattach(index, config)
    }
    fn detach(&self, index: NbdIndex) -> impl Future<Output = Result<(), Errno>> {
        self.process.detach(index)
    }
    fn look_for_partitions(&self, index: NbdIndex) -> impl Future<Output = Result<(), Errno>> {
        self.process.look_for_partitions(index)
    }
    fn claim(&self, index: NbdIndex) -> impl Future<Output = Result<ProcessClaim, Errno>> {
        self.process.claim(index)
    }
    fn users(&self, index: NbdIndex) -> impl Future<Output = Vec<String>> {
        self.process.users(index)
    }
}

impl Signals for SimHost {
    fn process_id(&self) -> u32 {
        self.process.process_id()
    }
    fn asked_to_stop(&self) -> impl Future<Output = ()> + 'static {
        self.process.asked_to_stop()
    }
}

impl Grants for SimHost {
    type Page = Mapping;
    fn map(&self, dom: DomId, gref: GrantRef, write: bool) -> Result<Mapping, Errno> {
        self.port.map(dom, gref, write)
    }
    fn copy_in(&self, dom: DomId, segments: &[GrantSegment], private: &mut [u8]) -> Result<(), Errno> {
        self.process.kernel().count_copy();
        self.port.copy_in(dom, segments, private)
    }
    fn copy_out(&self, dom: DomId, segments: &[GrantSegment], private: &[u8]) -> Result<(), Errno> {
        self.process.kernel().count_copy();
        self.port.copy_out(dom, segments, private)
    }
}

impl Events for SimHost {
    type Channel = Channel;
    fn bind_interdomain(&self, dom: DomId, remote: Port) -> Result<Channel, Errno> {
        self.port.bind_interdomain(dom, remote)
    }
}

impl SharedPages for SimHost {
    type Region = Mapping;
    fn region(&self, name: &str) -> Result<Mapping, Errno> {
        self.port.region(&self.page(name))
    }
    fn own_region(&self, name: &str) -> Result<Mapping, Errno> {
        self.port.own_region(&self.page(name))
    }
    fn boot_id(&self) -> Result<[u8; 16], Errno> {
        let mut id = self.port.boot_id()?;
        id[8..12].copy_from_slice(&self.process.power_cuts().to_le_bytes());
        Ok(id)
    }
    fn remove_region(&self, name: &str) {
        self.port.remove_region(&self.page(name));
    }
    fn region_names(&self) -> Result<Vec<String>, Errno> {
        let own = |name: String| {
            let name = name.strip_prefix(&*self.folder)?;
            (!name.contains('/')).then(|| name.to_owned())
        };
        Ok(self.port.region_names()?.into_iter().filter_map(own).collect())
    }
}

impl Xenstore for SimHost {
    type Transaction = StoreTransaction;
    type Watcher = StoreWatcher;
    fn read(&self, path: &str) -> impl Future<Output = Result<Vec<u8>, Errno>> {
        self.port.read(path)
    }
    fn write(&self, path: &str, value: &[u8]) -> impl Future<Output = Result<(), Errno>> {
        self.port.write(path, value)
    }
    fn remove(&self, path: &str) -> impl Future<Output = Result<(), Errno>> {
        self.port.remove(path)
    }
    fn directory(&self, path: &str) -> impl Future<Output = Result<Vec<String>, Errno>> {
        self.port.directory(path)
    }
    fn watch(&self, path: &str) -> impl Future<Output = Result<StoreWatcher, Errno>> {
        self.port.watch(path)
    }
    fn transaction(&self) -> impl Future<Output = Result<StoreTransaction, Errno>> {
        self.port.transaction()
    }
}
