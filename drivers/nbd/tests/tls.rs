//! TLS: what is said before it, and everything through it, over streams that are split anywhere. Keys are random, so
//! nothing here depends on the hash of a run.

mod common;

use common::asking::*;
use common::{Disk, Raw, World, address, export, go, world};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::sync::Arc;
use tap_abi::nbd::*;
use tap_core::{Node, Op};
use tap_host::{Budget, Listener, Sockets};
use tap_nbd::{Client, ClientError, ClientTls, Server, ServerLimits};
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
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots(), provider()).build().unwrap();
        let config = ServerConfig::builder_with_provider(provider());
        let config =
            config.with_safe_default_protocol_versions().unwrap().with_client_cert_verifier(verifier);
        let (chain, key) = self.sign(name);
        Arc::new(config.with_single_cert(chain, key).unwrap())
    }

    /// A client that trusts this authority, with a certificate by `signer`.
    fn client(&self, signer: Option<&Authority>) -> ClientTls {
        let config = ClientConfig::builder_with_provider(provider());
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

/// A server with certificates of `authority`.
async fn serve(
    w: &World,
    disk: &std::rc::Rc<Disk>,
    authority: &Authority,
) -> (Server<kernel_model::Process>, Budget) {
    let process = w.process("server");
    let (memory, limits) = (Budget::new(1 << 30), ServerLimits::default());
    let exports = vec![export("disk", disk)];
    let server =
        Server::with_tls(process.clone(), exports, limits, &memory, authority.server("server")).unwrap();
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
