//! TLS: what is said before it, and everything through it, over streams that are split anywhere. Keys are random, so
//! nothing here depends on the hash of a run.

mod common;

use common::asking::*;
use common::{Disk, Raw, World, address, export, go, world};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CipherSuiteCommon, ClientConfig, ClientConnection, RootCertStore, ServerConfig, SupportedCipherSuite,
    Tls12CipherSuite,
};
use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use tap_abi::nbd::*;
use tap_core::{Node, Op};
use tap_host::{Budget, Listener, Sockets};
use tap_nbd::{Breaks, Client, ClientError, ClientTls, Server, ServerLimits};
use zerocopy::IntoBytes;

const MIB: usize = 1 << 20;

/// An authority, and what it has signed.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        Arc::new(roots)
    }

    fn sign(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    /// A server called `name` that wants certificates of this authority.
    fn server(&self, name: &str) -> Arc<ServerConfig> {
        self.server_with(name, provider())
    }

    fn server_with(&self, name: &str, provider: Arc<CryptoProvider>) -> Arc<ServerConfig> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots(), Arc::clone(&provider));
        let verifier = verifier.build().unwrap();
        let config = ServerConfig::builder_with_provider(provider);
        let config =
            config.with_safe_default_protocol_versions().unwrap().with_client_cert_verifier(verifier);
        let (chain, key) = self.sign(name);
        Arc::new(config.with_single_cert(chain, key).unwrap())
    }

    /// A client that trusts this authority, with a certificate by `signer`.
    fn client(&self, signer: Option<&Authority>) -> ClientTls {
        self.client_with(signer, provider())
    }

    fn client_with(&self, signer: Option<&Authority>, provider: Arc<CryptoProvider>) -> ClientTls {
        let config = ClientConfig::builder_with_provider(provider);
        let config = config.with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(self.roots());
        let config = match signer.map(|signer| signer.sign("client")) {
            Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
            None => config.with_no_client_auth(),
        };
        ClientTls { config: Arc::new(config), name: "server".try_into().unwrap() }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Only a cipher of TLS 1.2 whose keys are used up after so many records.
fn short_lived(records: u64) -> Arc<CryptoProvider> {
    let SupportedCipherSuite::Tls12(suite) = ring::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
    else {
        panic!("a suite of TLS 1.2");
    };
    let Tls12CipherSuite { ref common, prf_provider, kx, sign, aead_alg } = *suite;
    let CipherSuiteCommon { suite, hash_provider, .. } = *common;
    let common = CipherSuiteCommon { suite, hash_provider, confidentiality_limit: records };
    let suite = Box::leak(Box::new(Tls12CipherSuite { common, prf_provider, kx, sign, aead_alg }));
    let cipher_suites = vec![SupportedCipherSuite::Tls12(suite)];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

/// A server with certificates of `authority`.
async fn serve(
    w: &World,
    disk: &std::rc::Rc<Disk>,
    authority: &Authority,
) -> (Server<kernel_model::Process>, Budget) {
    serve_with(w, disk, authority.server("server")).await
}

async fn serve_with(
    w: &World,
    disk: &std::rc::Rc<Disk>,
    config: Arc<ServerConfig>,
) -> (Server<kernel_model::Process>, Budget) {
    let process = w.process("server");
    let (memory, limits) = (Budget::new(1 << 30), ServerLimits::default());
    let exports = vec![export("disk", disk)];
    let server = Server::with_tls(process.clone(), exports, limits, &memory, config).unwrap();
    let listener = process.listen(&address()).await.unwrap();
    let own = server.clone();
    process.node().spawn("serve", 0, async move { own.serve(listener).await });
    (server, memory)
}

async fn connect(w: &World, tls: Option<ClientTls>) -> Result<Client<kernel_model::Process>, ClientError> {
    Client::connect(w.process("client"), tap_nbd::ClientConfig { tls, ..config() }).await
}

#[test]
fn everything_goes_through_streams_that_are_cut() {
    for seed in 0..40 {
        world(seed, seed > 0, |w| async move {
            let authority = Authority::new();
            let disk = Disk::new(4 * MIB);
            let (server, memory) = serve(&w, &disk, &authority).await;
            let before = memory.figures().used_bytes;
            let client = connect(&w, Some(authority.client(Some(&authority)))).await.unwrap();
            assert_eq!(write(&client, 3, 300 << 10, 7).await, Ok(()));
            assert!(disk.bytes.borrow()[3 * 512..][..300 << 10].iter().all(|byte| *byte == 7));
            assert_eq!(read(&client, 3, 300 << 10).await.unwrap(), vec![7; 300 << 10]);
            assert_eq!(write(&client, 0, 512, 9).await, Ok(()));
            assert_eq!(read(&client, 0, 1024).await.unwrap(), [[9; 512], [0; 512]].concat());
            assert_eq!(flush(&client).await, Ok(()));
            assert_eq!((disk.count(Op::Flush), client.connections()), (1, 1));
            assert_eq!(client.close().await, Ok(()));
            w.sim.sleep_ns(10_000_000_000).await;
            assert_eq!(server.connections(), 0);
            // What is kept for the next connection makes room for anything else.
            let after = memory.figures();
            assert_eq!(after.used_bytes - after.kept_bytes, before);
        });
    }
}

/// A session of TLS 1.2 ends when its keys are used up.
#[test]
fn a_session_whose_keys_are_used_up_is_replaced() {
    for (server_records, client_records) in [(20, 1 << 24), (1 << 24, 20)] {
        world(1, false, move |w| async move {
            let authority = Authority::new();
            let disk = Disk::new(MIB);
            serve_with(&w, &disk, authority.server_with("server", short_lived(server_records))).await;
            let tls = Some(authority.client_with(Some(&authority), short_lived(client_records)));
            // The server lives on, so that nothing is lost with a connection.
            let config = tap_nbd::ClientConfig { tls, breaks: Breaks::Keep, ..config() };
            let client = Client::connect(w.process("client"), config).await.unwrap();
            for n in 0..100 {
                assert_eq!(write(&client, n, 512, n as u8).await, Ok(()));
                assert_eq!(read(&client, n, 512).await.unwrap(), [n as u8; 512]);
            }
            assert!(client.connections() > 5, "{} connections", client.connections());
            assert_eq!(client.close().await, Ok(()));
        });
    }
}

#[test]
fn nothing_but_tls_is_agreed_on_first() {
    world(1, false, |w| async move {
        let authority = Authority::new();
        serve(&w, &Disk::new(MIB), &authority).await;
        let raw = w.raw("client").await;
        raw.hello().await;
        for (option, data) in [
            (OPT_LIST, Vec::new()),
            (OPT_INFO, go("disk", &[])),
            (OPT_GO, go("disk", &[])),
            (OPT_STRUCTURED_REPLY, Vec::new()),
            (OPT_EXTENDED_HEADERS, Vec::new()),
            (OPT_SET_META_CONTEXT, b"x".to_vec()),
            (77, vec![0; 100_000]),
        ] {
            raw.option(option, &data).await;
            assert_eq!(raw.reply().await.0, REP_ERR_TLS_REQD, "{option}");
        }
        raw.option(OPT_STARTTLS, b"x").await;
        assert_eq!(raw.reply().await.0, REP_ERR_INVALID);
        raw.option(OPT_ABORT, b"").await;
        assert_eq!((raw.reply().await.0, raw.take(1).await.len()), (REP_ACK, 0));
        let raw = w.raw("old").await;
        raw.hello().await;
        raw.option(OPT_EXPORT_NAME, b"disk").await;
        assert_eq!(raw.take(1).await, b"", "there is no other way to refuse");
    });
}

/// CVE-2021-3716: options that someone put after STARTTLS were taken for what was sent securely.
#[test]
fn plain_text_after_starttls_is_never_an_option() {
    world(1, false, |w| async move {
        let authority = Authority::new();
        serve(&w, &Disk::new(MIB), &authority).await;
        let raw = w.raw("client").await;
        raw.hello().await;
        let structured = OptionHeader::new(OPT_STRUCTURED_REPLY, 0);
        let both = [OptionHeader::new(OPT_STARTTLS, 0).as_bytes(), structured.as_bytes()].concat();
        raw.send(&both).await.unwrap();
        assert_eq!(raw.reply().await.0, REP_ACK);
        assert_eq!(raw.take(1).await, b"", "the connection is closed");
        // The same from a server: our client believes nothing of it.
        let process = w.process("other server");
        let listener = process.listen(&tap_host::SocketAddress::Unix("/run/other".into())).await.unwrap();
        process.node().spawn("serve", 0, async move {
            let raw = Raw { stream: listener.accept().await.unwrap(), structured: false };
            raw.send(Hello::new(handshake::FIXED_NEWSTYLE).as_bytes()).await.unwrap();
            raw.take(20).await;
            let replies = [OPT_STARTTLS, OPT_EXTENDED_HEADERS].map(|o| OptionReply::new(o, REP_ACK, 0));
            raw.send(replies.as_bytes()).await.unwrap();
            raw.take(1).await;
        });
        let tls = Some(authority.client(Some(&authority)));
        let there = tap_host::SocketAddress::Unix("/run/other".into());
        let config = tap_nbd::ClientConfig { address: there.clone(), tls, ..config() };
        let refused = Client::connect(w.process("client"), config).await.err();
        let why = "it sent data in plain text before the TLS handshake";
        assert_eq!(refused, Some(ClientError::Negotiation(there, why)));
    });
}

#[test]
fn a_client_that_is_silent_or_sends_garbage_in_the_handshake_is_closed() {
    for (seed, bytes) in [(1, 0), (2, 1), (3, 5), (4, 700), (5, 90_000)] {
        world(seed, false, move |w| async move {
            let (server, _) = serve(&w, &Disk::new(MIB), &Authority::new()).await;
            let raw = w.raw("client").await;
            raw.hello().await;
            raw.option(OPT_STARTTLS, b"").await;
            assert_eq!(raw.reply().await.0, REP_ACK);
            // Like the record of a handshake, then anything.
            let mut garbage: Vec<u8> = (0..bytes).map(|i: usize| (i * 37 + seed as usize) as u8).collect();
            let head = [22, 3, 1, 63, 255, 1, 0, 255, 255];
            let count = garbage.len().min(head.len());
            garbage[..count].copy_from_slice(&head[..count]);
            // It may be closed meanwhile.
            let _gone = raw.send(&garbage).await;
            assert!(raw.take(1000).await.len() < 1000, "the end, perhaps after an alert");
            w.sim.sleep_ns(1_000_000_000).await;
            assert_eq!(server.connections(), 0);
        });
    }
}

#[test]
fn who_is_not_trusted_is_refused_with_the_reason() {
    world(1, false, |w| async move {
        let (ours, other) = (Authority::new(), Authority::new());
        let (server, _) = serve(&w, &Disk::new(MIB), &ours).await;
        let stranger = ClientTls { name: "elsewhere".try_into().unwrap(), ..ours.client(Some(&ours)) };
        for (tls, why) in [
            (ours.client(None), "it wants a certificate of ours"),
            (ours.client(Some(&other)), "it does not trust our certificate"),
            (other.client(Some(&ours)), "its certificate is from an authority that is not trusted here"),
            (stranger, "its certificate is for another name"),
        ] {
            let refused = connect(&w, Some(tls)).await.err();
            assert_eq!(refused, Some(ClientError::Negotiation(address(), why)));
        }
        let why = "it requires TLS: use nbds instead of nbd";
        assert_eq!(connect(&w, None).await.err(), Some(ClientError::Negotiation(address(), why)));
        w.sim.sleep_ns(1_000_000_000).await;
        assert_eq!(server.connections(), 0);
        server.stop().await;
    });
}

/// A client on a secure connection that speaks bytes.
struct Secured {
    raw: Raw,
    session: ClientConnection,
}

impl Secured {
    async fn agree(w: &World, tls: ClientTls) -> Self {
        let raw = w.raw("client").await;
        raw.hello().await;
        raw.option(OPT_STARTTLS, b"").await;
        assert_eq!(raw.reply().await.0, REP_ACK);
        let session = ClientConnection::new(tls.config, tls.name).unwrap();
        let mut own = Self { raw, session };
        own.send(b"").await;
        while own.session.is_handshaking() {
            own.receive().await;
            own.send(b"").await;
        }
        own
    }

    async fn choose(&mut self, export: &str) {
        let choice = go(export, &[]);
        let option = OptionHeader::new(OPT_GO, choice.len() as u32);
        self.send(&[option.as_bytes(), &choice].concat()).await;
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.session.writer().write_all(bytes).unwrap();
        let mut records = Vec::new();
        while self.session.wants_write() {
            self.session.write_tls(&mut records).unwrap();
        }
        // The server may have ended the connection.
        let _gone = self.raw.send(&records).await;
    }

    /// Receives at least a byte, unless the stream has ended.
    async fn receive(&mut self) {
        let records = self.raw.take(1).await;
        self.session.read_tls(&mut &records[..]).unwrap();
        self.session.process_new_packets().unwrap();
    }

    /// Everything up to the end; an error if that was not announced.
    async fn rest(&mut self) -> std::io::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            match self.session.reader().read_to_end(&mut all) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.receive().await,
                ended => return ended.map(|_| all),
            }
        }
    }
}

/// A session whose keys are used up takes data, and sends nothing. The server must notice, even if its client does not.
#[test]
fn a_reply_that_cannot_be_sealed_ends_the_connection() {
    world(1, false, |w| async move {
        let authority = Authority::new();
        let (server, _) =
            serve_with(&w, &Disk::new(MIB), authority.server_with("server", short_lived(20))).await;
        let tls = authority.client_with(Some(&authority), short_lived(1 << 24));
        let mut client = Secured::agree(&w, tls).await;
        client.choose("disk").await;
        for n in 0..40 {
            client.send(RequestHeader::new(CMD_READ, 0, n, 0, 512).as_bytes()).await;
            // Replies that are ready together are sealed together.
            w.sim.sleep_ns(1_000_000).await;
        }
        assert!(client.rest().await.is_err(), "replies are missing, so this is no end in order");
        w.sim.sleep_ns(1_000_000_000).await;
        assert_eq!(server.connections(), 0, "without a word of the client");
    });
}

/// Without it a client could not tell the end of the connection from an attack that cuts off the rest.
#[test]
fn a_server_announces_the_end_of_a_connection() {
    world(1, false, |w| async move {
        let authority = Authority::new();
        let (server, _) = serve(&w, &Disk::new(MIB), &authority).await;
        let mut client = Secured::agree(&w, authority.client(Some(&authority))).await;
        client.choose("disk").await;
        let read = RequestHeader::new(CMD_READ, 0, 7, 0, 512);
        let leave = RequestHeader::new(CMD_DISC, 0, 8, 0, 0);
        client.send(&[read.as_bytes(), leave.as_bytes()].concat()).await;
        let received = client.rest().await.unwrap();
        assert!(received.ends_with(&[0; 512]) && received.len() > 512 + SimpleReply::BYTES);
        w.sim.sleep_ns(1_000_000_000).await;
        assert_eq!(server.connections(), 0);
    });
}

#[test]
fn a_client_that_wants_tls_takes_nothing_less() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let authority = Authority::new();
        let refused = connect(&w, Some(authority.client(None))).await.err();
        assert_eq!(refused, Some(ClientError::Negotiation(address(), "it offers no TLS")));
        assert!(disk.seen.borrow().is_empty());
    });
}
