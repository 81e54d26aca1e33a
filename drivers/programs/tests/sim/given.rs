//! Rings of guests in `tapdisk control`, connected by the messages of tapdisk3.

use crate::control::{Admin, messages};
use crate::{json, world};
use serde_json::{Value, json};
use std::rc::Rc;
use tap_abi::blkif::{BlkifOp, BlkifRequest, Segment};
use tap_abi::tapctl::{Blkif, Kind, MESSAGE_BYTES, Message, Outcome};
use tap_host::{DomId, Errno};
use xen_model::{GrantedPage, GuestRing, XenPort};
use zerocopy::{FromBytes, IntoBytes};

/// xvda.
const XVDA: u32 = 202 << 8;

/// The answer's kind, and the error number of one that is an error.
async fn ask(admin: &Rc<Admin>, pid: u32, kind: Kind, blkif: &Blkif) -> (Kind, i32) {
    let message = Message::with(kind, 0, blkif);
    let answer = messages(admin, pid, message.as_bytes(), MESSAGE_BYTES).await.unwrap();
    let answer = Message::read_from_bytes(&answer).unwrap();
    let kind = answer.kind().unwrap();
    (kind, if kind == Kind::Error { answer.body::<Outcome>().error.get() } else { 0 })
}

/// What the JSON socket answers.
async fn said(admin: &Rc<Admin>, pid: u32, request: &Value) -> Value {
    json::ask(admin, pid, format!("{request}\n").as_bytes(), 100).await
}

fn blkif(dom: DomId, ring: &GuestRing) -> Blkif {
    let mut blkif = Blkif {
        domid: u32::from(dom.0).into(),
        devid: XVDA.into(),
        proto: 3.into(),
        port: ring.event_port().0.into(),
        ..Blkif::default()
    };
    blkif.gref[0] = ring.ring_ref().0.into();
    blkif
}

async fn read_one(ring: &GuestRing, port: &XenPort) -> i16 {
    read_at(ring, port, 0).await
}

async fn read_at(ring: &GuestRing, port: &XenPort, sector: u64) -> i16 {
    let page = GrantedPage::new(port, DomId(0), false).unwrap();
    let segments = [Segment { gref: page.gref.0, first: 0, last: 7 }];
    assert!(ring.put(&BlkifRequest::new(7, BlkifOp::Read, sector, &segments).unwrap()));
    ring.publish();
    let response = ring.next().await.unwrap();
    page.end(port).unwrap();
    response.status.get()
}

#[test]
fn a_guest_is_connected_by_the_messages_of_tapdisk3() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let dom = xen.create_domain();
        let port = xen.attach(dom, &sim.node("guest", 1));
        let ring = GuestRing::new(&port, DomId(0)).unwrap();
        let own = blkif(dom, &ring);
        assert_eq!(ask(&admin, pid, Kind::XenblkifConnect, &own).await, (Kind::XenblkifConnectRsp, 0));
        assert_eq!(read_one(&ring, &port).await, 0);
        let again = ask(&admin, pid, Kind::XenblkifConnect, &own).await;
        assert_eq!(again, (Kind::Error, Errno::EALREADY.0));
        let other = Blkif { port: 9.into(), ..own };
        assert_eq!(ask(&admin, pid, Kind::XenblkifConnect, &other).await, (Kind::Error, Errno::EEXIST.0));
        let listed = admin.done("list --json").await;
        assert!(listed.contains("\"minor\":0"), "{listed}");
        admin.refused(&format!("close -p {pid} -m 0"), Errno::EBUSY, "1/xvda uses it").await;
        // The last page of the disk, and the next one, which it gets.
        assert_eq!((read_at(&ring, &port, 2040).await, read_at(&ring, &port, 2041).await), (0, -1));
        admin.done(&format!("resize -p {pid} -m 0 -s +1M")).await;
        assert_eq!((read_at(&ring, &port, 2041).await, read_at(&ring, &port, 4088).await), (0, 0));
        assert_eq!(read_at(&ring, &port, 4089).await, -1);
        for (refused, error) in [
            (Blkif { order: 1.into(), ..own }, Errno::EOPNOTSUPP),
            (Blkif { proto: 2.into(), ..own }, Errno::EOPNOTSUPP),
            (Blkif { domid: 70_000.into(), ..own }, Errno::EINVAL),
        ] {
            let answer = ask(&admin, pid, Kind::XenblkifConnect, &refused).await;
            assert_eq!(answer, (Kind::Error, error.0));
        }
        let stranger = Blkif { devid: 5.into(), ..own };
        assert_eq!(
            ask(&admin, pid, Kind::XenblkifDisconnect, &stranger).await,
            (Kind::Error, Errno::ENOTCONN.0)
        );
        assert_eq!(xen.mapped_from(dom), 1);
        let gone = ask(&admin, pid, Kind::XenblkifDisconnect, &own).await;
        assert_eq!((gone, xen.mapped_from(dom)), ((Kind::XenblkifDisconnectRsp, 0), 0));
        admin.done(&format!("destroy -p {pid} -m 0")).await;
    });
}

#[test]
fn a_number_that_was_freed_is_another_disks() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        kernel.storage().put_bytes("/b", &[2; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let allocation = async |pid: u32| {
            let list = said(&admin, pid, &json!({ "verb": "list" })).await;
            list["ok"]["disks"][0]["allocation"].as_str().unwrap().to_owned()
        };
        let pid = admin.create("raw:/a").await;
        let first = allocation(pid).await;
        // With its last number the process would end.
        for line in [
            "allocate",
            "attach -p PID -m 1",
            "close -p PID -m 0",
            "detach -p PID -m 0",
            "free -m 0",
            "allocate",
        ] {
            admin.done(&line.replace("PID", &pid.to_string())).await;
        }
        admin.done(&format!("attach -p {pid} -m 0")).await;
        admin.done(&format!("open -p {pid} -m 0 -a raw:/b -D")).await;
        let second = allocation(pid).await;
        assert_ne!(first, second);
        let dom = xen.create_domain();
        let port = xen.attach(dom, &sim.node("guest", 1));
        let ring = GuestRing::new(&port, DomId(0)).unwrap();
        let connect = |allocation: &str| {
            json!({
                "verb": "connect", "minor": 0, "domid": dom.0, "devid": XVDA, "ring_ref": ring.ring_ref().0,
                "port": ring.event_port().0, "size_sectors": 2048, "allocation": allocation,
            })
        };
        let refused = said(&admin, pid, &connect(&first)).await;
        let words = refused["error"]["words"].as_str().unwrap_or_default();
        assert!(words.contains("is another disk's"), "{refused}");
        assert_eq!(xen.mapped_from(dom), 0);
        let mut larger = connect(&second);
        larger["size_sectors"] = json!(2049);
        let refused = said(&admin, pid, &larger).await;
        let words = refused["error"]["words"].as_str().unwrap_or_default();
        assert!(words.contains("has 2048 sectors, and the guest was told 2049"), "{refused}");
        admin.done(&format!("resize -p {pid} -m 0 -s +1M")).await;
        // The guest is told of the rest by whoever connects it.
        let connected = said(&admin, pid, &connect(&second)).await;
        assert_eq!(connected["ok"]["domid"], json!(dom.0));
        assert_eq!((read_one(&ring, &port).await, read_at(&ring, &port, 4088).await), (0, 0));
    });
}
