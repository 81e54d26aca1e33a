use super::*;
use proptest::prelude::*;

#[test]
fn golden_bytes() {
    assert_eq!(HELLO_MAGIC.to_be_bytes(), *b"NBDMAGIC");
    assert_eq!(OPTION_MAGIC.to_be_bytes(), *b"IHAVEOPT");
    let hello = Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    assert_eq!(hello.as_bytes(), b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(OptionHeader::new(OPT_GO, 0x0102).as_bytes(), b"IHAVEOPT\0\0\0\x07\0\0\x01\x02");
    let reply = OptionReply::new(OPT_LIST, REP_ERR_UNSUP, 5);
    let bytes = [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 3, 0x80, 0, 0, 1, 0, 0, 0, 5];
    assert_eq!(reply.as_bytes(), bytes);
    let info = InfoExport { kind: INFO_EXPORT.into(), size: 0x0100.into(), flags: export::HAS_FLAGS.into() };
    assert_eq!(info.as_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1]);
    let sizes = InfoBlockSize {
        kind: INFO_BLOCK_SIZE.into(),
        minimum: 512.into(),
        preferred: 4096.into(),
        maximum: (32 << 20).into(),
    };
    assert_eq!(sizes.as_bytes(), [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    let request = RequestHeader::new(CMD_WRITE, command::FUA, 0x0807_0605_0403_0201, 0x1000, 512);
    let bytes =
        [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0];
    assert_eq!(request.as_bytes(), bytes);
    assert_eq!(RequestHeader::parse(&bytes), Ok(request));
    let simple = SimpleReply::new(7, error::EIO);
    assert_eq!(simple.as_bytes(), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7]);
    let chunk = ChunkHeader::new(7, CHUNK_ERROR, true, 6);
    let bytes = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 6];
    assert_eq!(chunk.as_bytes(), bytes);
}

#[test]
fn golden_bytes_of_extended_headers() {
    let flags = command::FUA | command::PAYLOAD_LEN;
    let request = ExtendedRequest::new(CMD_WRITE, flags, 0x0807_0605_0403_0201, 0x1000, 1 << 40);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&[0x21, 0xe4, 0x1c, 0x71, 0, 0x21, 0, 1]);
    bytes[8..16].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
    (bytes[22], bytes[26]) = (0x10, 1);
    assert_eq!(request.as_bytes(), bytes);
    assert_eq!(ExtendedRequest::parse(&bytes), Ok(request));
    bytes[3] = 0;
    assert!(ExtendedRequest::parse(&bytes).is_err());
    let short = RequestHeader::new(CMD_READ, command::DF, 7, 9, u32::MAX);
    let want = ExtendedRequest::new(CMD_READ, command::DF, 7, 9, u64::from(u32::MAX));
    assert_eq!(ExtendedRequest::from(short), want);
    let chunk = ExtendedChunk::new(7, 0x0200, CHUNK_BLOCK_STATUS_EXT, true, 24);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&[0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6]);
    (bytes[15], bytes[22], bytes[31]) = (7, 2, 24);
    assert_eq!(chunk.as_bytes(), bytes);
}

fn go(name: &str, count: u16, kinds: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&count.to_be_bytes());
    kinds.iter().for_each(|k| data.extend_from_slice(&k.to_be_bytes()));
    data
}

#[test]
fn info_queries_are_read_and_checked() {
    let data = go("disk", 2, &[INFO_NAME, INFO_BLOCK_SIZE]);
    let query = InfoQuery::parse(&data).unwrap();
    assert_eq!(query.name, "disk");
    assert!(query.asks(INFO_BLOCK_SIZE) && query.asks(INFO_NAME) && !query.asks(INFO_DESCRIPTION));
    for cut in 0..data.len() {
        assert!(InfoQuery::parse(&data[..cut]).is_err(), "cut at {cut}");
    }
    assert!(InfoQuery::parse(&go("disk", 1, &[1, 2])).is_err());
    assert!(InfoQuery::parse(&go(&"x".repeat(4096), 0, &[])).is_ok());
    assert!(InfoQuery::parse(&go(&"x".repeat(4097), 0, &[])).is_err());
    assert!(InfoQuery::parse(b"\0\0\0\x01\xff\0\0").is_err(), "not UTF-8");
}

#[test]
fn meta_queries_are_read_and_checked() {
    let data = b"\0\0\0\x01d\0\0\0\x02\0\0\0\x05base:\0\0\0\x00";
    let query = MetaQuery::parse(data).unwrap();
    assert_eq!((query.name, query.count), ("d", 2));
    assert_eq!(query.queries().collect::<Vec<_>>(), ["base:", ""]);
    for cut in 0..data.len() {
        assert!(MetaQuery::parse(&data[..cut]).is_err(), "cut at {cut}");
    }
    assert!(MetaQuery::parse(b"\0\0\0\0\xff\xff\xff\xff").is_err(), "more queries than bytes");
}

proptest! {
    #[test]
    fn parsers_take_any_bytes(data: Vec<u8>, head: [u8; 28]) {
        if let Ok(query) = InfoQuery::parse(&data) {
            prop_assert!(query.name.len() <= data.len());
        }
        if let Ok(query) = MetaQuery::parse(&data) {
            prop_assert_eq!(query.queries().count(), query.count as usize);
        }
        let magic = head[..4] == REQUEST_MAGIC.to_be_bytes();
        prop_assert_eq!(RequestHeader::parse(&head).is_ok(), magic);
    }
}
