//! The socket for JSON, asked by a client that shares no code with ours.

use super::Disk;
use super::openmetrics::Metrics;
use super::verbs::{Act, Acts};
use crate::check::Invariant;
use crate::guest::RawNbd;
use crate::program::named;
use kernel_model::SimHost;
use serde_json::Value;
use sim::{Entity, Label};
use tap_control::{FOLDER, json_socket_of};
use tap_host::{Errno, SocketAddress, Sockets, unless};

/// What a stranger sends to the JSON socket: which kind, a number for it, and after how many bytes it rests.
pub static JSON_SENT: Label = Label::packed(
    "control-json",
    "a stranger at the JSON socket sends, as line {n}, kind {} with the number {}; the first part of it has {} bytes",
    &[3, 10, 5],
);

/// How often an administrator looks whether requests have been answered.
const LOOKS: u32 = 20;
/// How long an answer may take, in nanoseconds: others may first be dropped, several times.
const ANSWER_NS: u64 = 60_000_000_000;
/// Lines that a stranger sends.
const LINES: u32 = 3;
const LIST: &[u8] = b"{\"verb\":\"list\"}\n";

/// What comes back.
enum Back {
    /// Nothing, and the end.
    Nothing,
    Ok(Value),
    Error(i64),
    Garbage(String),
}

impl Back {
    /// An answer is one line.
    fn of(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).into_owned();
        if text.is_empty() {
            return Self::Nothing;
        }
        let line = text.strip_suffix('\n').filter(|line| !line.contains('\n'));
        let value = line.and_then(|line| serde_json::from_str::<Value>(line).ok());
        let Some(Value::Object(map)) = value else { return Self::Garbage(text) };
        let error = || {
            let error = map.get("error")?;
            let named = error["name"].is_string() && error["words"].is_string();
            error["errno"].as_i64().filter(|_| named)
        };
        match (map.get("ok"), error()) {
            (Some(ok), None) if map.len() == 1 => Self::Ok(ok.clone()),
            (None, Some(errno)) if map.len() == 1 => Self::Error(errno),
            _ => Self::Garbage(text),
        }
    }
}

/// What the metrics say otherwise than the counters of a disk, which were looked at before.
fn differing(metrics: &Metrics, before: &Value) -> Option<String> {
    let minor = before["minor"].to_string();
    let own = [("minor", &*minor)];
    let image = before["name"].as_str()?;
    let expected = [
        ("tapdisk_image", "_info", vec![own[0], ("image", image)], 1),
        ("tapdisk_state", "", vec![own[0], ("tapdisk_state", "running")], 1),
        ("tapdisk_size_bytes", "", own.to_vec(), before["size_sectors"].as_u64()? * 512),
    ];
    for (family, suffix, labels, value) in expected {
        if metrics.number(family, suffix, &labels) != Some(value) {
            return Some(format!("{family}{suffix} of {labels:?} is not {value}"));
        }
    }
    for (operation, counters) in before["operations"].as_object()? {
        let labels = [own[0], ("operation", &**operation)];
        let above = [own[0], ("operation", &**operation), ("le", "+Inf")];
        for (family, suffix, labels, field) in [
            ("tapdisk_requests", "_total", &labels[..], "requests"),
            ("tapdisk_bytes", "_total", &labels[..], "bytes"),
            ("tapdisk_errors", "_total", &labels[..], "errors"),
            ("tapdisk_latency_seconds", "_bucket", &above[..], "requests"),
        ] {
            let value = metrics.number(family, suffix, labels);
            if value.is_none() || value < counters[field].as_u64() {
                return Some(format!(
                    "{family}{suffix} of {labels:?} is {value:?}, and was {}",
                    counters[field]
                ));
            }
        }
    }
    None
}

/// What the counters by operation must have in common with one another, and with the others, at any moment.
fn are_consistent(stats: &Value) -> bool {
    let Some(all) = stats["operations"].as_object() else { return false };
    let number = |name: &str, field: &str| all.get(name).and_then(|one| one[field].as_u64());
    let counted = |one: &Value| {
        let buckets = one["latency"]["buckets"].as_array()?;
        let counts = buckets.iter().map(|bucket| bucket[1].as_u64());
        let bounds = buckets.iter().map(|bucket| bucket[0].as_u64().unwrap_or(u64::MAX));
        let max_ns = one["latency"]["max_ns"].as_u64()?;
        // The longest time is in the last bucket.
        let (before, last) =
            (bounds.clone().rev().nth(1).unwrap_or(0), bounds.clone().next_back().unwrap_or(0));
        let in_order =
            bounds.is_sorted_by(|a, b| a < b) && (max_ns > before || max_ns == 0) && max_ns <= last;
        Some(in_order && counts.sum::<Option<u64>>()? == one["requests"].as_u64()?)
    };
    let in_flight = all.values().map(|one| one["in_flight"].as_u64()).sum::<Option<u64>>();
    let (sectors, bytes) = (&stats["secs"], |name| number(name, "bytes"));
    let times = |value: &Value| value.as_u64().map(|sectors| sectors * 512);
    all.len() == 5
        && all.values().all(|one| counted(one) == Some(true))
        && bytes("read") == times(&sectors[0])
        && bytes("write") == times(&sectors[1])
        && bytes("write-zeroes") == times(&stats["sectors_zeroed"])
        && bytes("discard") == times(&stats["sectors_discarded"])
        // Queries are in flight, too, and not counted by operation.
        && in_flight.is_some_and(|own| {
            stats["in_flight"].as_u64().zip(stats["waiting"].as_u64()).is_some_and(|(down, held)| own <= down + held)
        })
}

impl Acts<'_> {
    /// Sends `bytes`, the first `part` of them a while before the others, and then no more; what comes back.
    async fn send(&self, host: &SimHost, bytes: &[u8], part: usize, rest_ns: u64) -> Option<Back> {
        let address = SocketAddress::Unix(json_socket_of(FOLDER, self.tapdisk.pid()));
        let stream = host.connect(&address).await.ok()?;
        let client = RawNbd::new(stream);
        let (first, second) = bytes.split_at(part.min(bytes.len()));
        // Who was refused may be disconnected before it has sent everything.
        let _ended = client.send(first).await;
        self.world.sim.sleep_ns(rest_ns).await;
        let _ended = client.send(second).await;
        client.finish();
        let back = unless(self.world.sim.sleep_ns(ANSWER_NS), client.take_all()).await.unwrap_or_default();
        self.tapdisk.is_alive().then(|| Back::of(&back))
    }

    /// What the JSON socket answers to `line`, which is a right request.
    async fn json(&self, line: &[u8]) -> Option<Value> {
        let host =
            SimHost::start(&self.world.kernel, &self.world.xen, "json client", self.world.sim.now_ns());
        let text = || String::from_utf8_lossy(line).into_owned();
        let what = match self.send(&host, line, 0, 0).await {
            Some(Back::Ok(value)) => return Some(value),
            _ if !self.tapdisk.is_alive() => return None,
            None => "nobody listens".to_owned(),
            Some(Back::Nothing) => "there is no answer".to_owned(),
            Some(Back::Error(errno)) => format!("it is refused with {errno}"),
            Some(Back::Garbage(text)) => format!("the answer is {text}"),
        };
        self.world.fail(Invariant::U1, format!("to {} at the JSON socket {what}", text().trim_end()));
        None
    }

    /// What the JSON socket lists.
    pub(super) async fn list_in_json(&self) -> Option<Value> {
        self.json(LIST).await
    }

    /// The JSON socket lists the disk in this state, with its image.
    pub(super) async fn listed(&self, disk: &Disk, state: &str) -> Act {
        let (setup, minor) = (disk.setup(), disk.minor.get().unwrap_or_default());
        let list = self.json(LIST).await?;
        let own = list["disks"].as_array().and_then(|all| all.iter().find(|one| one["minor"] == minor));
        let right = own.is_some_and(|own| {
            own["state"] == state
                && own["image"] == named(&setup.spec)
                && disk.may_show(&own["size_sectors"])
                && own["read_only"] == false
                && own["nbd_clients"].is_u64()
        });
        if !right {
            let text =
                format!("a disk that is {state}, of {}, is listed in JSON as {own:?}", named(&setup.spec));
            self.world.fail(Invariant::U1, text);
        }
        Some(())
    }

    /// How many requests wait, because the disk is paused.
    pub(super) async fn waiting(&self, disk: &Disk) -> Option<u64> {
        Some(self.stats_in_json(disk).await?["waiting"].as_u64().unwrap_or(0))
    }

    /// A request has waited for the disk for `held_ns`: this is the longest time that is shown, or less than another,
    /// once all are answered.
    pub(super) async fn measured(&self, disk: &Disk, held_ns: u64) -> Act {
        for _ in 0..LOOKS {
            let stats = self.stats_in_json(disk).await?;
            let all: Vec<&Value> = stats["operations"].as_object().map(|all| all.values().collect())?;
            let longest_ns = all.iter().filter_map(|one| one["latency"]["max_ns"].as_u64()).max();
            if longest_ns >= Some(held_ns) {
                break;
            }
            if all.iter().all(|one| one["in_flight"] == 0) {
                let text =
                    format!("a request waited for {held_ns} ns, and the longest time is {longest_ns:?} ns");
                self.world.fail(Invariant::U1, text);
                break;
            }
            self.world.sim.sleep_ns(5_000_000).await;
        }
        Some(())
    }

    pub(super) async fn stats_in_json(&self, disk: &Disk) -> Option<Value> {
        let minor = disk.minor.get().unwrap_or_default();
        let line = format!("{{\"minor\":{minor},\"verb\":\"stats\"}}\n");
        Some(self.json(line.as_bytes()).await?["disks"][0].take())
    }

    /// Both sockets and tap-ctl count the same.
    pub(super) async fn counted(&self, disk: &Disk) -> Act {
        let at = disk.at(self.tapdisk);
        let minor = disk.minor.get().unwrap_or_default();
        let before = self.stats_of(&format!("stats {at}")).await?;
        let here = self.stats_in_json(disk).await?;
        let all = self.stats_of(&format!("stats -p {}", self.tapdisk.pid())).await?;
        let own = all.as_array().and_then(|all| all.iter().find(|one| one["minor"] == minor));
        self.scraped(own.unwrap_or(&Value::Null)).await?;
        let after = self.stats_of(&format!("stats {at}")).await?;
        let texts = [&before, &here, own.unwrap_or(&Value::Null), &after];
        let same = |field: &str| texts.iter().all(|text| text[field] == before[field]);
        // They grow meanwhile.
        let ordered = |field: &dyn Fn(&Value) -> Option<u64>| {
            texts.iter().all(|text| field(text).is_some()) && texts.is_sorted_by_key(|text| field(text))
        };
        let right = ["minor", "name", "size_sectors", "read_only"].into_iter().all(same)
            && ["reads", "writes", "flushes", "zeroes", "discards", "errors"]
                .into_iter()
                .all(|name| ordered(&|text: &Value| text[name].as_u64()))
            && [0, 1].into_iter().all(|i| ordered(&|text: &Value| text["secs"][i].as_u64()))
            && disk.may_show(&before["size_sectors"])
            && texts.into_iter().all(are_consistent);
        if !right {
            self.world
                .fail(Invariant::U1, format!("the counters of a disk are, one after the other, {texts:?}"));
        }
        Some(())
    }

    /// The metrics are right in form, and a disk's say no less than its counters of a moment ago.
    async fn scraped(&self, before: &Value) -> Act {
        let line = format!("metrics -p {}", self.tapdisk.pid());
        let printed = self.admin.expect(self.tapdisk, &line, 0).await?.out.join("\n");
        let wrong = match Metrics::parse(&printed) {
            Ok(metrics) => differing(&metrics, before),
            Err(why) => Some(why),
        };
        if let Some(wrong) = wrong {
            self.world.fail(Invariant::U1, format!("the metrics are wrong: {wrong}"));
        }
        Some(())
    }

    async fn stats_of(&self, line: &str) -> Option<Value> {
        let stats = self.admin.expect(self.tapdisk, line, 0).await?;
        let stats = stats.out.first().and_then(|text| serde_json::from_str(text).ok());
        if stats.is_none() {
            self.world.fail(Invariant::U1, format!("tap-ctl {line} printed no JSON"));
        }
        stats
    }

    /// Somebody sends lines that are no requests, a part of one, or one in two parts.
    pub(super) async fn strangers_of_json(&self, entity: Entity, host: &SimHost, hold_ns: u64) -> Act {
        for n in 0..LINES {
            self.stranger_of_json(entity, n, host, hold_ns).await?;
        }
        Some(())
    }

    async fn stranger_of_json(&self, entity: Entity, n: u32, host: &SimHost, hold_ns: u64) -> Act {
        let value = self
            .world
            .sim
            .decide(entity, &JSON_SENT, n, |d| (1 + d.below(7)) | d.below(1024) << 3 | d.below(32) << 13);
        let (number, part) = (value >> 3 & 0x3ff, (value >> 13 & 0x1f) as usize);
        let (line, expected) = match value & 7 {
            0 => return Some(()),
            1 => (LIST.to_vec(), 0),
            2 => (
                format!("{{\"verb\":\"stats\",\"minor\":{}}}\n", 4000 + number).into_bytes(),
                Errno::ENODEV.0,
            ),
            3 => (b"{\"verb\":\"fly\"}\n".to_vec(), Errno::EINVAL.0),
            4 => (b"{\"verb\":\"list\",\"depth\":1}\n".to_vec(), Errno::EINVAL.0),
            5 => {
                let byte = |i| sim::mix(entity.0 ^ i) as u8;
                ((0..number).map(byte).chain([b'\n']).collect(), Errno::EINVAL.0)
            }
            // All but its end, or less.
            6 => {
                let len =
                    if number.is_multiple_of(4) { number as usize % LIST.len() } else { LIST.len() - 1 };
                (LIST[..len].to_vec(), Errno::EINVAL.0)
            }
            _ => (vec![b'['; 70_000], Errno::EINVAL.0),
        };
        let nothing_said = line.is_empty();
        let right = match self.send(host, &line, part, hold_ns).await {
            _ if !self.tapdisk.is_alive() => return None,
            Some(Back::Ok(_)) => expected == 0,
            Some(Back::Error(errno)) => errno == i64::from(expected),
            Some(Back::Nothing) => nothing_said,
            Some(Back::Garbage(_)) | None => false,
        };
        if !right {
            let text = String::from_utf8_lossy(&line[..line.len().min(100)]).into_owned();
            self.world
                .fail(Invariant::U1, format!("{text:?} at the JSON socket is not answered with {expected}"));
        }
        Some(())
    }
}
