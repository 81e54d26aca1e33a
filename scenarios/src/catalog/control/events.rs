//! What those who listen for events must know, and how many may listen.

use super::listeners::{AGAIN_NS, EVENTS, LISTENERS, LOOKS};
use super::verbs::{Act, Acts};
use crate::check::Invariant;
use crate::guest::RawNbd;
use kernel_model::SimHost;
use serde_json::Value;
use std::collections::BTreeMap;
use tap_control::{FOLDER, LISTENING_MAX, json_socket_of};
use tap_host::{Errno, IoBuf, SocketAddress, Sockets, Stream, unless};

/// Clients that want to listen at the same time, more than may.
const CROWD: usize = LISTENING_MAX + 4;
/// How long one may have to wait for its first line, in nanoseconds: others may first be dropped.
const FIRST_NS: u64 = 12_000_000_000;
/// The fields of a list that a state has, too.
const FIELDS: [&str; 7] = ["minor", "state", "image", "size_sectors", "read_only", "nbd_clients", "ionice"];

/// What a list says of each disk, as far as a state does.
fn standing(list: &Value) -> BTreeMap<u64, Value> {
    let all = list["disks"].as_array().into_iter().flatten();
    let of = |disk: &Value| FIELDS.iter().map(|field| ((*field).to_owned(), disk[*field].clone())).collect();
    all.filter_map(|disk| Some((disk["minor"].as_u64()?, Value::Object(of(disk))))).collect()
}

impl Acts<'_> {
    /// Those who listen know what a list shows.
    pub(super) async fn known(&self) -> Act {
        if self.listening.awake().next().is_none() {
            return Some(());
        }
        let mut last = String::new();
        for _ in 0..LOOKS {
            let list = standing(&self.list_in_json().await?);
            let behind = self.listening.awake().find(|own| !own.knows(&list));
            let Some(behind) = behind else { return Some(()) };
            last = format!("{}, and a list {list:?}", behind.known());
            self.world.sim.sleep_ns(AGAIN_NS).await;
            if !self.tapdisk.is_alive() {
                return None;
            }
        }
        self.world.fail(Invariant::U1, format!("who listens for events knows {last}"));
        Some(())
    }

    /// More clients want to listen than may. The others are refused, and nobody else notices; those that hang up make
    /// room.
    pub(super) async fn many_listen(&self) -> Act {
        for _ in 0..2 {
            self.crowd_listens().await?;
        }
        Some(())
    }

    async fn crowd_listens(&self) -> Act {
        let sim = &self.world.sim;
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "listeners", sim.now_ns());
        let address = SocketAddress::Unix(json_socket_of(FOLDER, self.tapdisk.pid()));
        let mut streams = Vec::new();
        for _ in 0..CROWD {
            let Ok(stream) = host.connect(&address).await else { continue };
            let _sent = RawNbd::new(stream.clone()).send(EVENTS).await;
            streams.push(stream);
        }
        let (mut told, mut refused) = (0, 0);
        for stream in &streams {
            match unless(sim.sleep_ns(FIRST_NS), first_line(stream)).await.flatten() {
                Some(line) if line["event"] == "state" => told += 1,
                Some(line) if line["error"]["errno"] == Errno::EAGAIN.0 => refused += 1,
                _ => {}
            }
        }
        let stats = self.admin.expect(self.tapdisk, &format!("stats -p {}", self.tapdisk.pid()), 0).await;
        drop(streams);
        host.process.node().kill();
        stats?;
        let few = LISTENING_MAX - LISTENERS as usize;
        if told + refused != CROWD || !(few..=LISTENING_MAX).contains(&told) {
            let text = format!("of {CROWD} that wanted to listen {told} could, and {refused} were refused");
            self.world.fail(Invariant::K1, text);
        }
        sim.sleep_ns(AGAIN_NS).await;
        self.tapdisk.is_alive().then_some(())
    }
}

async fn first_line(stream: &impl Stream) -> Option<Value> {
    let mut line = Vec::new();
    while !line.contains(&b'\n') {
        let (count, buf) = stream.recv(IoBuf::unpooled(1 << 10).ok()?, 0).await;
        let count = count.ok().filter(|count| *count > 0)?;
        line.extend_from_slice(&buf[..count]);
    }
    let end = line.iter().position(|byte| *byte == b'\n')?;
    serde_json::from_slice(&line[..end]).ok()
}
