//! Golden bytes written out by hand from the field table, and round trips.

use super::*;
use proptest::prelude::*;

fn golden_write() -> [u8; ENTRY_BYTES] {
    let mut b = [0; ENTRY_BYTES];
    b[0] = 1; // WRITE
    b[1] = 2; // two segments
    b[2..4].copy_from_slice(&[0x34, 0x12]); // handle
    b[8..16].copy_from_slice(&[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]); // id
    b[16..24].copy_from_slice(&[0x10, 0x32, 0x54, 0x76, 0, 0, 0, 0]); // sector
    b[24..32].copy_from_slice(&[8, 0, 0, 0, 0, 7, 0, 0]); // gref 8, all of the page
    b[32..40].copy_from_slice(&[0xef, 0xbe, 0xad, 0xde, 3, 3, 0, 0]); // gref 0xdeadbeef, one sector
    b
}

#[test]
fn a_request_has_the_bytes_of_the_table() {
    let segments = [Segment { gref: 8, first: 0, last: 7 }, Segment { gref: 0xdead_beef, first: 3, last: 3 }];
    let mut request =
        BlkifRequest::new(0x1122_3344_5566_7788, BlkifOp::Write, 0x7654_3210, &segments).unwrap();
    request.handle = 0x1234;
    assert_eq!(request.encode(), golden_write());
    assert_eq!(BlkifRequest::parse(&golden_write()), Ok(request));
    assert_eq!(request.count(), 9);
}

#[test]
fn a_response_has_the_bytes_of_the_table() {
    let ok = RawResponse::new(0x0102_0304_0506_0708, OP_FLUSH_DISKCACHE, STATUS_OKAY);
    assert_eq!(ok.as_bytes(), [8, 7, 6, 5, 4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0]);
    let bad = RawResponse::new(1, OP_READ, STATUS_EOPNOTSUPP);
    assert_eq!(bad.as_bytes(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0xff, 0, 0, 0, 0]);
}

#[test]
fn entries_lie_behind_the_header_and_wrap() {
    let ring = RingLayout::X86_64;
    assert_eq!(ring.entry_offset(0), 64);
    assert_eq!(ring.entry_offset(1), 176);
    assert_eq!(ring.entry_offset(31), 64 + 31 * 112);
    assert_eq!(ring.entry_offset(32), 64);
    assert_eq!(ring.entry_offset(u32::MAX), ring.entry_offset(31));
    assert_eq!((ring.page_order(), RingLayout { pages: 4, ..ring }.page_order()), (0, 2));
}

#[test]
fn what_breaks_the_protocol_is_refused_with_its_id() {
    // (byte to change, value, status)
    let cases = [
        (0, OP_WRITE_BARRIER, STATUS_EOPNOTSUPP),
        (0, 4, STATUS_EOPNOTSUPP),
        (0, OP_DISCARD, STATUS_EOPNOTSUPP),
        (0, OP_INDIRECT, STATUS_EOPNOTSUPP),
        (0, 255, STATUS_EOPNOTSUPP),
        (1, 0, STATUS_ERROR),
        (1, 12, STATUS_ERROR),
        (1, 255, STATUS_ERROR),
        (28, 8, STATUS_ERROR),
        (29, 8, STATUS_ERROR),
        (36, 4, STATUS_ERROR),
        (37, 255, STATUS_ERROR),
    ];
    for (at, value, status) in cases {
        let mut bytes = golden_write();
        bytes[at] = value;
        let bad = BlkifRequest::parse(&bytes).unwrap_err();
        assert_eq!((bad.id, bad.op, bad.status), (0x1122_3344_5566_7788, bytes[0], status), "{at}: {value}");
    }
}

#[test]
fn a_flush_needs_no_segment_but_checks_those_it_has() {
    let mut bytes = golden_write();
    bytes[0] = OP_FLUSH_DISKCACHE;
    assert_eq!(BlkifRequest::parse(&bytes).unwrap().count(), 9);
    bytes[1] = 0;
    assert_eq!(BlkifRequest::parse(&bytes).unwrap().segments(), []);
    bytes[1] = 1;
    bytes[29] = 8;
    assert!(BlkifRequest::parse(&bytes).is_err());
}

fn segment() -> impl Strategy<Value = Segment> {
    (any::<u32>(), 0_u8..8, 0_u8..8).prop_map(|(gref, a, b)| Segment {
        gref,
        first: a.min(b),
        last: a.max(b),
    })
}

proptest! {
    #[test]
    fn requests_round_trip(
        id: u64, sector: u64, handle: u16, op in 0_usize..3, segments in prop::collection::vec(segment(), 1..=11),
    ) {
        let op = [BlkifOp::Read, BlkifOp::Write, BlkifOp::Flush][op];
        let request = BlkifRequest { handle, ..BlkifRequest::new(id, op, sector, &segments).unwrap() };
        prop_assert_eq!(BlkifRequest::parse(&request.encode()), Ok(request));
        prop_assert_eq!(request.segments(), &segments[..]);
    }

    #[test]
    fn any_bytes_are_refused_or_obey_the_protocol(mut bytes: [u8; 16], rest in prop::collection::vec(any::<u8>(), 96), few: bool) {
        if few {
            // Otherwise hardly any case gets past the operation and the segment count.
            bytes[0] %= 4;
            bytes[1] %= 13;
        }
        let mut entry = [0; ENTRY_BYTES];
        entry[..16].copy_from_slice(&bytes);
        entry[16..].copy_from_slice(&rest);
        match BlkifRequest::parse(&entry) {
            Ok(request) => {
                prop_assert!(request.segments().iter().all(|s| s.first <= s.last && s.last < 8));
                prop_assert!(request.op == BlkifOp::Flush || request.count() > 0);
                prop_assert_eq!(request.encode()[..2].to_vec(), entry[..2].to_vec());
            }
            Err(bad) => {
                prop_assert_eq!(bad.id.to_le_bytes(), &entry[8..16]);
                prop_assert_eq!(bad.op, entry[0]);
            }
        }
    }

    #[test]
    fn responses_round_trip(id: u64, op: u8, status: i16) {
        let bytes = RawResponse::new(id, op, status).as_bytes().to_vec();
        let back = RawResponse::read_from_bytes(&bytes).unwrap();
        prop_assert_eq!((back.id.get(), back.op, back.status.get()), (id, op, status));
        prop_assert!(bytes[9] == 0 && bytes[12..].iter().all(|b| *b == 0));
    }
}
