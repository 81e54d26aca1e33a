//! The model through its public interface, in small worlds.

use crate::*;
use sim::{Config, Sim};
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use tap_abi::blkif::{BlkifOp, BlkifRequest, RawResponse, RingLayout};
use tap_host::{
    DomId, Errno, EventChannel, Events, GrantRef, GrantSegment, Grants, SharedPage, SharedPages, Transaction,
    VbdId, Watcher, Xenstore,
};
use zerocopy::IntoBytes;

const DOM0: DomId = DomId(0);

struct World {
    sim: Sim,
    xen: Xen,
    back_node: sim::Node,
    back: XenPort,
    guest: XenPort,
}

fn world<F: Future<Output = ()> + 'static>(seed: u64, body: impl FnOnce(World) -> F) -> u64 {
    let sim = Sim::new(&Config::new(seed));
    let xen = Xen::new(&sim, Options::default());
    let dom = xen.create_domain();
    let back_node = sim.node("back", 0);
    let back = xen.attach(DOM0, &back_node);
    let guest = xen.attach(dom, &sim.node("guest", u64::from(dom.0)));
    let world = World { sim: sim.clone(), xen, back_node, back, guest };
    sim.run(body(world)).unwrap();
    sim.trace_hash()
}

fn segment(gref: GrantRef, offset: u16, len: u16) -> GrantSegment {
    GrantSegment { gref, offset, len }
}

#[test]
fn copies_cross_pages_and_respect_the_grant() {
    world(1, async |w| {
        let dom = w.guest.dom();
        let a = GrantedPage::new(&w.guest, DOM0, false).unwrap();
        let b = GrantedPage::new(&w.guest, DOM0, true).unwrap();
        a.page.write(512, &[1; 512]);
        b.page.write(0, &[2; 1024]);
        let mut got = [0; 1536];
        let parts = [segment(a.gref, 512, 512), segment(b.gref, 0, 1024)];
        w.back.copy_in(dom, &parts, &mut got).unwrap();
        assert!(got[..512] == [1; 512] && got[512..] == [2; 1024]);
        assert_eq!(w.back.copy_out(dom, &parts, &got), Err(Errno::EINVAL), "the second page is read-only");
        assert_eq!(w.back.copy_in(dom, &parts, &mut [0; 1535]), Err(Errno::EINVAL));
        assert_eq!(w.back.copy_in(dom, &parts, &mut [0; 1537]), Err(Errno::EINVAL));
        assert_eq!(w.back.copy_in(dom, &[segment(a.gref, 4000, 97)], &mut [0; 97]), Err(Errno::EINVAL));
        assert_eq!(w.back.copy_in(DomId(9), &parts, &mut got), Err(Errno::EINVAL));
        assert_eq!(w.guest.copy_in(dom, &parts, &mut got), Err(Errno::EINVAL), "not granted to itself");
        a.end(&w.guest).unwrap();
        assert_eq!(w.back.copy_in(dom, &parts, &mut got), Err(Errno::EINVAL));
    });
}

#[test]
fn a_failed_segment_does_not_stop_the_others() {
    world(1, async |w| {
        let dom = w.guest.dom();
        let [a, b] = [0, 1].map(|_| GrantedPage::new(&w.guest, DOM0, false).unwrap());
        let parts = [segment(a.gref, 0, 512), segment(GrantRef(5000), 0, 512), segment(b.gref, 0, 512)];
        assert_eq!(w.back.copy_out(dom, &parts, &[3; 1536]), Err(Errno::EINVAL));
        let mut got = [0; 1536];
        assert_eq!(w.back.copy_in(dom, &parts, &mut got), Err(Errno::EINVAL));
        assert!(got[..512] == [3; 512] && got[512..1024] == [0; 512] && got[1024..] == [3; 512]);
    });
}

#[test]
fn a_hostile_page_changes_under_each_load() {
    world(1, async |w| {
        let shared = GrantedPage::new(&w.guest, DOM0, false).unwrap();
        let (page, loads) = (shared.page.clone(), Rc::new(Cell::new(0)));
        let count = Rc::clone(&loads);
        shared.page.on_foreign_load(Some(Rc::new(move |offset, _| {
            count.set(count.get() + 1);
            page.store_u32(offset, count.get());
        })));
        let map = w.back.map(w.guest.dom(), shared.gref, true).unwrap();
        assert_eq!((map.load_u32(8), map.load_u32(8)), (1, 2));
        shared.page.on_foreign_load(None);
        assert_eq!((map.load_u32(8), loads.get()), (2, 2));
    });
}

#[test]
fn death_ends_effects_and_then_everything_held() {
    world(1, async |w| {
        let ring = GuestRing::new(&w.guest, DOM0).unwrap();
        let dom = w.guest.dom();
        let map = w.back.map(dom, ring.ring_ref(), true).unwrap();
        let leaked = w.back.map(dom, ring.ring_ref(), true).unwrap();
        let channel = w.back.bind_interdomain(dom, ring.event_port()).unwrap();
        let region = w.back.region("r").unwrap();
        let watch = w.back.watch("/x").await.unwrap();
        let tx = w.back.transaction().await.unwrap();
        std::mem::forget(leaked);
        assert_eq!(w.xen.counts(DOM0), Counts { maps: 2, channels: 1, watches: 1, transactions: 1 });
        w.back_node.kill_after_steps(1);
        region.store_u32(0, 7);
        map.store_u32(100, 7); // it dies at this step
        region.store_u32(4, 7);
        channel.notify();
        drop((map, channel, watch, tx));
        assert_eq!(w.xen.counts(DOM0).maps, 2, "destructors of a dead process do nothing");
        w.back_node.dead().await;
        assert_eq!(w.xen.counts(DOM0), Counts::default());
        assert_eq!(w.xen.mapped_from(dom), 0);
        assert_eq!((ring.page().load_u32(100), w.xen.notified()), (0, 0));
        let left = w.xen.region_page("r").unwrap();
        assert_eq!((left.load_u32(0), left.load_u32(4)), (7, 0), "named pages stay");

        let again = w.xen.attach(DOM0, &w.sim.node("back", 1));
        let channel = again.bind_interdomain(dom, ring.event_port()).unwrap();
        channel.wait().await.unwrap();
        assert_eq!(again.region("r").unwrap().load_u32(0), 7);
        drop(channel);
        ring.end().unwrap();
    });
}

#[test]
fn a_ring_is_served_by_hand() {
    world(1, async |w| {
        let ring = GuestRing::new(&w.guest, DOM0).unwrap();
        let map = w.back.map(w.guest.dom(), ring.ring_ref(), true).unwrap();
        let channel = w.back.bind_interdomain(w.guest.dom(), ring.event_port()).unwrap();
        channel.wait().await.unwrap();
        let flush = |id| BlkifRequest::new(id, BlkifOp::Flush, 0, &[]).unwrap();
        assert!((0..32).all(|id| ring.put(&flush(id))));
        assert!(!ring.put(&flush(32)), "full");
        assert!(ring.publish(), "a fresh ring asks for an event");
        assert!(!ring.publish(), "nothing new");
        channel.wait().await.unwrap();
        assert_eq!(map.load_u32(0), 32);
        map.copy_out(RingLayout::X86_64.entry_offset(0), RawResponse::new(31, 3, 0).as_bytes());
        map.store_u32(8, 1);
        assert_eq!(ring.next().await.unwrap().id.get(), 31);
        assert!(ring.take().unwrap().is_none() && ring.put(&flush(32)));
        map.store_u32(8, 34);
        assert_eq!(ring.take().unwrap_err(), Errno::EPROTO);
    });
}

#[test]
fn a_destroyed_domain_takes_its_ports_and_grants_along() {
    world(1, async |w| {
        let ring = GuestRing::new(&w.guest, DOM0).unwrap();
        let dom = w.guest.dom();
        let watch = w.back.watch("@releaseDomain").await.unwrap();
        watch.next().await.unwrap();
        let map = w.back.map(dom, ring.ring_ref(), true).unwrap();
        w.xen.destroy_domain(dom);
        assert_eq!(ring.channel().wait().await, Err(Errno::ESHUTDOWN));
        assert_eq!(watch.next().await.unwrap().path, "@releaseDomain");
        map.store_u32(0, 1);
        assert!(w.back.map(dom, ring.ring_ref(), true).is_err());
        drop(map);
        assert_eq!(w.xen.counts(DOM0).maps, 0);
    });
}

#[test]
fn the_toolstack_makes_directories_that_each_end_can_use() {
    world(1, async |w| {
        let paths = VbdPaths::new("vbd", w.guest.dom(), VbdId(51712));
        attach_vbd(&w.back, w.guest.dom(), VbdId(51712), &paths, false).await.unwrap();
        let ring = GuestRing::new(&w.guest, DOM0).unwrap();
        ring.publish_in_store(&paths.frontend).await.unwrap();
        let read = async |key: &str| w.back.read(&format!("{}/{key}", paths.frontend)).await.unwrap();
        assert_eq!(read("state").await, b"3");
        assert_eq!(read("ring-ref").await, ring.ring_ref().0.to_string().as_bytes());
        assert_eq!(w.guest.read(&format!("{}/state", paths.backend)).await.unwrap(), b"1");
        assert_eq!(w.guest.write(&format!("{}/state", paths.backend), b"4").await, Err(Errno::EACCES));
        remove_vbd(&w.back, &paths).await.unwrap();
        assert_eq!(w.guest.read("device/vbd/51712").await, Err(Errno::EACCES));
    });
}

#[test]
fn every_event_arrives_whatever_the_latency_and_a_run_repeats() {
    let run = |seed| {
        world(seed, async |w| {
            let ring = GuestRing::new(&w.guest, DOM0).unwrap();
            let channel = w.back.bind_interdomain(w.guest.dom(), ring.event_port()).unwrap();
            for _ in 0..20 {
                ring.channel().notify();
                channel.wait().await.unwrap();
                let tx = w.back.transaction().await.unwrap();
                tx.write("/n", b"1").await.unwrap();
                // A conflict without another party is a decision.
                assert!(matches!(tx.commit().await, Ok(()) | Err(Errno::EAGAIN)));
            }
        })
    };
    let hashes: Vec<u64> = (0..20).map(run).collect();
    assert_eq!(hashes, (0..20).map(run).collect::<Vec<_>>());
    assert!(hashes.windows(2).any(|pair| pair[0] != pair[1]), "no seed draws any latency");
}
