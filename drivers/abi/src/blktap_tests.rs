use super::*;
use proptest::prelude::*;

/// `len` bytes that are zero but for these.
fn bytes<const LEN: usize>(set: &[(usize, &[u8])]) -> [u8; LEN] {
    let mut all = [0; LEN];
    for (at, bytes) in set {
        all[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    all
}

#[test]
fn the_parameters_of_a_device_suit_both_layouts() {
    let params = DeviceParams::new(2_097_152, 4096, true);
    let expected: [u8; 56] = bytes(&[
        (2, &[0x20]),
        (9, &[2]),
        (13, &[0x10]),
        (16, &[1 | 2 | 4 | 8, 0, 0, 0x80]),
        (25, &[0x10]),
        (33, &[0x10]),
    ]);
    assert_eq!(params.as_bytes(), expected);
    assert_eq!(DeviceParams::from_bytes(&params.to_bytes()), params);
    assert_eq!(params.known_flags(), 0, "a module that writes nothing back");
    let known = DeviceParams { flags: (params.flags.get() & 0x1f).into(), ..params };
    assert_eq!(known.known_flags(), FLAG_READ_ONLY | FLAG_PHYSICAL_SIZE | FLAG_FLUSH | FLAG_TRIM);
    assert_eq!(DeviceParams::new(1, 512, false).flags.get() & FLAG_READ_ONLY, 0);
}

#[test]
fn a_question_makes_no_device_and_its_answer_tells_the_module() {
    let question = DeviceParams::question();
    let expected: [u8; 56] = bytes(&[(9, &[2]), (13, &[2]), (16, &[16, 0, 0, 0x80]), (25, &[2]), (33, &[2])]);
    assert_eq!(question.as_bytes(), expected, "without a size");
    let answered = |known: u64| DeviceParams { flags: (question.flags.get() & known).into(), ..question };
    assert!(answered(0x1f).says_it_unmaps(), "blktap-dkms");
    assert!(!answered(0x0f).says_it_unmaps(), "OpenXT");
    assert!(!question.says_it_unmaps(), "XenServer, which writes nothing back");
}

#[test]
fn requests_are_parsed() {
    let entry = encode_data(31, OP_WRITE, 0x0102, &[(4, 7), (0, 2)]);
    let expected = bytes::<112>(&[(0, &[1, 2]), (8, &[31]), (16, &[2, 1]), (28, &[4, 7]), (36, &[0, 2])]);
    assert_eq!(entry, expected);
    let request = TapRequest::parse(&entry).unwrap();
    assert_eq!((request.slot, request.op, request.sector, request.count), (31, TapOp::Write, 0x0102, 7));
    assert_eq!(request.segments().len(), 2);
    let trim = encode_dataless(0, OP_TRIM, 8, 0xffff_ffff);
    assert_eq!(trim, bytes::<112>(&[(0, &[3]), (16, &[8]), (24, &[255; 4])]));
    let trim = TapRequest::parse(&trim).unwrap();
    assert_eq!((trim.op, trim.sector, trim.count, trim.segments().len()), (TapOp::Trim, 8, u32::MAX, 0));
    let flush = TapRequest::parse(&encode_dataless(5, OP_FLUSH, 0, 0)).unwrap();
    assert_eq!((flush.slot, flush.op, flush.count), (5, TapOp::Flush, 0));
}

#[test]
fn what_breaks_the_protocol_is_refused() {
    let refused = |entry| match TapRequest::parse(&entry) {
        Err(TapMalformed::Answer { slot: 3, why, .. }) => why,
        other => panic!("{other:?}"),
    };
    let whole = |op, segments: &[(u8, u8)]| refused(encode_data(3, op, 0, segments));
    assert_eq!(whole(4, &[(0, 7)]), "unknown operation");
    assert_eq!(whole(OP_READ, &[]), "not 1 to 11 segments");
    assert_eq!(whole(OP_READ, &[(0, 7), (2, 1)]), "a segment ends before it starts");
    assert_eq!(whole(OP_WRITE, &[(0, 8)]), "a segment reaches past its page");
    assert_eq!(whole(OP_FLUSH, &[(0, 0)]), "segments of a request without data");
    assert_eq!(refused(encode_dataless(3, OP_TRIM, 0, 0)), "a trim of no sector, or of too many");
    assert_eq!(refused(encode_dataless(3, OP_TRIM, 0, 1 << 32)), "a trim of no sector, or of too many");
    let mut many = encode_data(3, OP_READ, 0, &[(0, 7); 11]);
    many[1] = 12;
    assert_eq!(refused(many), "not 1 to 11 segments");
    for id in [32_u64, 255, 256, u64::MAX] {
        let mut entry = encode_data(0, OP_READ, 0, &[(0, 7)]);
        entry[8..16].copy_from_slice(&id.to_le_bytes());
        assert_eq!(TapRequest::parse(&entry), Err(TapMalformed::NoSlot), "{id}");
    }
}

#[test]
fn a_response_is_read_as_it_was_written() {
    let response = decode_response(&bytes(&[(0, &[7]), (8, &[3]), (10, &[255, 255])]));
    assert_eq!((response.id.get(), response.op, response.status.get()), (7, OP_TRIM, STATUS_ERROR));
}

proptest! {
    #[test]
    fn any_bytes_can_be_parsed(mut entry: [u8; 112], op in 0_u8..5, slot in 0_u64..34, count in 0_u8..13) {
        entry[0] = op;
        entry[1] = count;
        entry[8..16].copy_from_slice(&slot.to_le_bytes());
        if let Ok(request) = TapRequest::parse(&entry) {
            prop_assert!(request.slot < SLOTS);
            prop_assert!(request.segments().iter().all(|s| s.first <= s.last && s.last < 8));
            let with_data = matches!(request.op, TapOp::Read | TapOp::Write);
            prop_assert_eq!(with_data, !request.segments().is_empty());
            prop_assert_eq!(request.count == 0, request.op == TapOp::Flush);
        }
    }
}
