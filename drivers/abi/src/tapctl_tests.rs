use super::*;
use proptest::prelude::*;

/// A message that is zero but for these bytes.
fn bytes(set: &[(usize, &[u8])]) -> Vec<u8> {
    let mut all = vec![0; MESSAGE_BYTES];
    for (at, bytes) in set {
        all[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    all
}

fn text(text: &str) -> Text {
    Text::new(text).unwrap()
}

#[test]
fn messages_have_the_bytes_of_tapdisk3() {
    let minor_5 = |kind| Message::new(kind, 5);
    let open = Params {
        flags: flags::RDONLY.into(),
        devnum: 5.into(),
        path: text("vhd:/a"),
        prt_devnum: (-1).into(),
        req_timeout_s: 60.into(),
        ..Params::default()
    };
    let second = Params { flags: flags::SECONDARY.into(), secondary: text("nbd:x"), ..Params::default() };
    let ring = Blkif {
        domid: 7.into(),
        devid: 51712.into(),
        gref: [8, 9, 0, 0, 0, 0, 0, 0].map(U32::new),
        order: 1.into(),
        proto: 3.into(),
        port: 11.into(),
        ..Blkif::default()
    };
    let gone = Blkif { domid: 7.into(), devid: 51712.into(), ..Blkif::default() };
    let image = Image { sectors: 2_097_152.into(), sector_size: 512.into(), ..Image::default() };
    for (message, set) in [
        (Message::new(Kind::Pid, 0), &[(0, &[3][..])][..]),
        (minor_5(Kind::Attach), &[(0, &[5]), (2, &[5])]),
        (
            Message::with(Kind::Open, 5, &open),
            &[(0, &[7]), (2, &[5]), (8, &[2]), (12, &[5]), (20, b"vhd:/a"), (276, b"\xff\xff\xff\xff\x3c")],
        ),
        (minor_5(Kind::Pause), &[(0, &[9]), (2, &[5])]),
        (
            Message::with(Kind::Resume, 5, &Params { path: text("vhd:/b"), ..Params::default() }),
            &[(0, &[11]), (2, &[5]), (20, b"vhd:/b")],
        ),
        (Message::with(Kind::Resume, 5, &second), &[(0, &[11]), (2, &[5]), (8, &[0x80]), (282, b"nbd:x")]),
        (minor_5(Kind::Close), &[(0, &[13]), (2, &[5])]),
        (minor_5(Kind::ForceShutdown), &[(0, &[23]), (2, &[5])]),
        (minor_5(Kind::Detach), &[(0, &[15]), (2, &[5])]),
        (Message::new(Kind::List, ALL), &[(0, &[19]), (2, &[0xff, 0xff])]),
        (minor_5(Kind::Stats), &[(0, &[21]), (2, &[5])]),
        (
            Message::with(Kind::XenblkifConnect, 5, &ring),
            &[
                (0, &[24]),
                (2, &[5]),
                (8, &[7]),
                (13, &[0xca]),
                (16, &[8]),
                (20, &[9]),
                (48, &[1]),
                (52, &[3]),
                (312, &[11]),
            ],
        ),
        (Message::with(Kind::XenblkifDisconnect, 0, &gone), &[(0, &[26]), (8, &[7]), (13, &[0xca])]),
        (Message::with(Kind::OpenRsp, 5, &image), &[(0, &[8]), (2, &[5]), (10, &[0x20]), (17, &[2])]),
        (Message::error(5, 2, ""), &[(0, &[1]), (2, &[5]), (8, &[2])]),
        (Message::error(5, 2, "no"), &[(0, &[1]), (2, &[5]), (8, &[2]), (12, b"no")]),
    ] {
        assert_eq!(message.as_bytes(), bytes(set), "{message:?}");
    }
}

#[test]
fn entries_and_lengths_have_the_bytes_of_tapdisk3() {
    let entry = Entry { count: 2.into(), minor: 5.into(), state: state::PAUSED.into(), path: text("vhd:/a") };
    let listed = Message::with(Kind::ListRsp, ALL, &entry);
    assert_eq!(
        listed.as_bytes(),
        bytes(&[(0, &[20]), (2, &[0xff, 0xff]), (8, &[2]), (12, &[5]), (16, &[0x20]), (20, b"vhd:/a")])
    );
    let last = Message::with(Kind::ListRsp, ALL, &Entry { minor: (-1).into(), ..Entry::default() });
    assert_eq!(last.as_bytes(), bytes(&[(0, &[20]), (2, &[0xff, 0xff]), (12, &[0xff; 4])]));
    let stats = Message::with(Kind::StatsRsp, 5, &Announced { length: 258.into(), ..Announced::default() });
    assert_eq!(stats.as_bytes(), bytes(&[(0, &[22]), (2, &[5]), (16, &[2, 1])]));
    let pid = Message::with(Kind::PidRsp, 0, &PidOf { pid: 258.into() });
    assert_eq!(pid.as_bytes(), bytes(&[(0, &[4]), (8, &[2, 1])]));
    let minors = Minors { count: 1.into(), list: [5; 63].map(I32::new) };
    let minors = Message::with(Kind::ListMinorsRsp, ALL, &minors);
    assert_eq!(&minors.as_bytes()[8..16], [1, 0, 0, 0, 5, 0, 0, 0]);
    assert_eq!(minors.body::<Minors>().list[62].get(), 5);
}

#[test]
fn every_request_has_its_answer() {
    let answers: Vec<(u16, u16)> =
        Kind::EVERY.iter().filter_map(|kind| Some((kind.number(), kind.answer()?.number()))).collect();
    assert_eq!(
        answers,
        [
            (3, 4),
            (5, 6),
            (7, 8),
            (9, 10),
            (11, 12),
            (13, 14),
            (15, 16),
            (17, 18),
            (19, 20),
            (21, 22),
            (23, 14),
            (24, 25),
            (26, 27),
            (28, 29),
            (31, 32),
            (33, 34),
            (35, 36),
        ]
    );
    assert_eq!(
        Kind::EVERY.iter().map(|kind| kind.number()).collect::<Vec<_>>(),
        (1..=36).collect::<Vec<_>>()
    );
    assert!(Kind::from_number(0).is_none() && Kind::from_number(37).is_none());
}

#[test]
fn texts_are_refused_rather_than_cut() {
    let longest = "a".repeat(TEXT_BYTES_MAX);
    assert_eq!(text(&longest).as_str(), Some(&*longest));
    assert!(Text::new(&"a".repeat(TEXT_BYTES_MAX + 1)).is_none() && Text::new("a\0b").is_none());
    let cut = Text::cut(&format!("a{}z", "é".repeat(200)));
    let cut = cut.as_str().unwrap();
    assert!(cut.starts_with("aé") && cut.contains("é...é") && cut.ends_with("éz"), "{cut}");
    assert!((250..=TEXT_BYTES_MAX).contains(&cut.len()), "between characters: {}", cut.len());
    assert_eq!(Text::cut(&longest).as_str(), Some(&*longest));
    assert_eq!(Text::cut("a\0b").as_str(), Some("a"));
    assert!(Text([b'a'; TEXT_BYTES]).as_str().is_none(), "no NUL");
    let mut odd = [0; TEXT_BYTES];
    odd[0] = 0xff;
    assert_eq!((Text(odd).as_str(), format!("{:?}", Text(odd))), (None, "(no text)".to_owned()));
}

proptest! {
    #[test]
    fn any_bytes_are_a_message(raw in proptest::collection::vec(any::<u8>(), MESSAGE_BYTES)) {
        let message = Message::read_from_bytes(&raw).unwrap();
        let _words = format!("{message:?} {:?}", message.kind());
        prop_assert_eq!(message.as_bytes(), &raw);
        let (params, ring): (Params, Blkif) = (message.body(), message.body());
        prop_assert_eq!(params.as_bytes(), &raw[8..540]);
        prop_assert_eq!(ring.as_bytes(), &raw[8..324]);
        let _path = message.body::<Entry>().path.as_str();
    }
}
